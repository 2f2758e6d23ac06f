"""run, run_regularized and run_few_shot_vary_shots: what they return, print and refuse.

Then the calls of the released scripts.
"""

import contextlib
import functools
import inspect
import io
import math
import re
import statistics

import numpy as np
import pytest
import torch
from helpers import input_error, planted_basis, planted_pairs, planted_weights

import lore.files
import utils
from utils import Pairs, evaluate_model, run, run_few_shot_vary_shots

LoRe = functools.partial(utils.LoRe, seed=0)
LoRe_regularized = functools.partial(utils.LoRe_regularized, seed=0)
PersonalizeBatch = functools.partial(utils.PersonalizeBatch, seed=0)

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = (
    "Train Performance",
    "Seen User Unseen Prompts",
    "Few Shot Train Performance",
    "Unseen User Unseen Prompts",
)
d, N, N_UNSEEN = 6, 9, 5
PLANTED = planted_basis(d, 3)
V_FINAL = PLANTED.mean(1, keepdim=True)


def planted_features():
    """Train and test pairs of seen, then of unseen users, as `run` takes them; 12 to 44 each."""
    return [
        [X[: 12 + 4 * i] for i, X in enumerate(part)]
        for part in planted_crowd(N, N_UNSEEN, (44, 44, 44, 44))
    ]


def planted_crowd(N, N_unseen, pairs):
    """`pairs` of each user, in the order of `run`'s features."""
    seen, unseen = planted_weights(N, 3), planted_weights(N_unseen, 3, seed=1)
    return [
        planted_pairs(PLANTED, W, m, seed)
        for seed, (W, m) in enumerate(zip((seen, seen, unseen, unseen), pairs))
    ]


CROWD = 60, 20, (100, 100, 40, 200)  # enough users to find the planted basis


def printed_by(pipeline, *arguments, **options):
    """(what the pipeline returned, what it printed, its fits)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        found = pipeline(*arguments, **options)
    return found, out.getvalue(), found.fits


def sweep(
    K_list=(0, 1, 3),
    alpha_list=(0, 0.1),
    features=None,
    V_final=V_FINAL,
    users=(N, N_UNSEEN),
    pipeline=run,
    num_iterations=60,
    seed=0,
    **options,
):
    return printed_by(
        pipeline,
        K_list,
        alpha_list,
        V_final,
        *(features or planted_features()),
        *users,
        "cpu",
        num_iterations=num_iterations,
        seed=seed,
        **options,
    )


@pytest.fixture(scope="module")
def swept():
    return sweep()


@pytest.fixture(scope="module")
def swept_regularized():
    return sweep(pipeline=utils.run_regularized, K_list=(0, 1, 8), alpha_list=(0, 1e4))


def accuracy_by_counting(X, V, w):
    """Right pairs by right pairs, in float64."""
    return sum(float(x) > 0 for x in X.double() @ V.double() @ w.double()) / len(X)


def accuracies_by_counting(fit):
    """setting -> one accuracy per user."""
    return {
        setting: [accuracy_by_counting(X, fit.V, w) for X, w in zip(part, W, strict=True)]
        for setting, part, W in zip(
            SETTINGS, planted_features(), (fit.W, fit.W, fit.W_unseen, fit.W_unseen)
        )
    }


def assert_same_weights(one, other):
    """Their logits are compared too: near a corner of the simplex only these still move."""
    for x, y in (
        (one, torch.stack(other)),
        (one.clamp(1e-30).log(), torch.stack(other).clamp(1e-30).log()),
    ):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)


def expected_print(headings, of_settings):
    """The quickstart's step 5: a model's headings, then each setting's name and its two lines."""
    lines = list(headings)
    for setting, accuracies in of_settings.items():
        lines += [
            setting,
            f"Average accuracy: {statistics.fmean(accuracies):.4f}",
            f"Standard deviation of accuracy: {statistics.pstdev(accuracies):.4f}",
        ]
    return "".join(line + "\n" for line in lines)


# ---- What the sweeps return


@pytest.mark.parametrize("which", ["swept", "swept_regularized"])
def test_a_sweep_returns_means_over_users_and_a_quarter_of_their_standard_deviation(which, request):
    found, _, fits = request.getfixturevalue(which)
    assert len(found) == 8
    assert all(isinstance(values, np.ndarray) and values.shape == (6,) for values in found)
    for i, fit in enumerate(fits):
        for j, accuracies in enumerate(accuracies_by_counting(fit).values()):
            assert found[j][i] == pytest.approx(statistics.fmean(accuracies))
            assert found[4 + j][i] == pytest.approx(statistics.pstdev(accuracies) / 4)
    assert min(found[4 + j][2] for j in range(4)) > 0


def test_the_accuracies_of_a_fit_are_those_of_its_basis_and_weights(swept):
    for fit in swept[2]:
        assert list(fit.accuracies) == list(SETTINGS)
        for setting, part, W in zip(
            SETTINGS, planted_features(), (fit.W, fit.W, fit.W_unseen, fit.W_unseen)
        ):
            of_users = [evaluate_model(X, fit.V, w) for X, w in zip(part, W)]
            assert fit.accuracies[setting].tolist() == pytest.approx(of_users)


def test_a_sweep_goes_through_the_penalties_and_for_each_through_the_ranks(swept):
    found, _, fits = swept
    assert [(fit.alpha, fit.K, fit.seed) for fit in fits] == [
        (alpha, K, 0) for alpha in (0, 0.1) for K in (0, 1, 3)
    ]
    alone = [sweep(K_list=[K], alpha_list=[alpha])[0] for alpha, K in ((0, 3), (0.1, 1))]
    for i, single in zip((2, 4), alone):
        assert [values[i] for values in found] == pytest.approx([values[0] for values in single])


def test_rank_0_is_the_reward_head_with_weights_of_one(swept, swept_regularized):
    for _, _, fits in (swept, swept_regularized):
        for fit in (fits[0], fits[3]):
            assert torch.equal(fit.V, V_FINAL)
            assert torch.equal(fit.W, torch.ones(N, 1)) and torch.equal(
                fit.W_unseen, torch.ones(N_UNSEEN, 1)
            )


def test_rank_1_gives_every_unseen_user_the_weight_1(swept, swept_regularized):
    for _, _, fits in (swept, swept_regularized):
        for fit in (fits[1], fits[4]):
            assert fit.V.shape == (d, 1)
            assert torch.equal(fit.W_unseen, torch.ones(N_UNSEEN, 1))


def test_run_trains_lore_at_a_half_and_fits_the_unseen_at_a_tenth(swept):
    train, _, unseen, _ = planted_features()
    for fit in swept[2]:
        if fit.K:
            w, V = LoRe(
                V_FINAL, fit.alpha, N, d, fit.K, num_iterations=60, learning_rate=0.5
            ).train(train)
            torch.testing.assert_close((fit.W, fit.V), (w, V), rtol=1e-3, atol=1e-3)
        if fit.K > 1:
            w_unseen = PersonalizeBatch(
                N_UNSEEN, d, 3, num_iterations=500, learning_rate=0.1
            ).train(unseen, fit.V)
            assert_same_weights(fit.W_unseen, w_unseen)


def test_run_regularized_trains_the_alternating_model_and_fits_the_unseen_at_a_half(
    swept_regularized,
):
    train, _, unseen, _ = planted_features()
    for fit in swept_regularized[2]:
        if fit.K:
            w, V = LoRe_regularized(
                V_FINAL, fit.alpha, N, d, fit.K, num_iterations=60, learning_rate=0.5
            ).train(train)
            torch.testing.assert_close((fit.W, fit.V), (w, V), rtol=1e-3, atol=1e-3)
        kept = fit.V.shape[1]
        if kept > 1:
            w_unseen = PersonalizeBatch(
                N_UNSEEN, d, kept, num_iterations=500, learning_rate=0.5
            ).train(unseen, fit.V)
            assert_same_weights(fit.W_unseen, w_unseen)
    assert any(1 < fit.V.shape[1] < 8 for fit in swept_regularized[2])  # columns were left out


def test_run_regularized_keeps_every_column_at_threshold_0():
    _, _, fits = sweep(pipeline=utils.run_regularized, K_list=[8], alpha_list=[0], threshold=0)
    assert (
        fits[0].V.shape == (d, 8)
        and fits[0].W.shape == (N, 8)
        and fits[0].W_unseen.shape == (N_UNSEEN, 8)
    )


def test_the_published_number_of_iterations_is_the_default():
    train = planted_features()[0]
    with contextlib.redirect_stdout(io.StringIO()):
        fits = run([2], [0], V_FINAL, *planted_features(), N, N_UNSEEN, "cpu", seed=0).fits
    torch.testing.assert_close(
        fits[0].V, LoRe(None, 0, N, d, 2, 1000, 0.5).train(train)[1], rtol=1e-3, atol=1e-3
    )
    assert utils.run_regularized.__defaults__[1] == 20000


def test_planted_users_are_served_best_at_the_planted_rank():
    _, seen, _, unseen, *_ = sweep(
        K_list=(0, 1, 3),
        alpha_list=[0],
        num_iterations=1000,
        features=planted_crowd(*CROWD),
        users=CROWD[:2],
    )[0]
    assert seen[2] > 0.9 and unseen[2] > 0.88
    assert max(*seen[:2], *unseen[:2]) < 0.8


# ---- What they print


def test_run_prints_the_quickstarts_lines(swept):
    _, printed, fits = swept
    assert printed == "".join(
        expected_print([f"K : {fit.K}"], accuracies_by_counting(fit)) for fit in fits
    )
    assert re.match(
        r"K : 0\nTrain Performance\n"
        r"Average accuracy: 0\.\d{4}\nStandard deviation of accuracy: 0\.\d{4}\n"
        r"Seen User Unseen Prompts\n",
        printed,
    )


def test_run_regularized_prints_alpha_and_rank(swept_regularized):
    _, printed, fits = swept_regularized
    assert printed == "".join(
        expected_print([f"alpha : {fit.alpha}", f"Rank : {fit.K}"], accuracies_by_counting(fit))
        for fit in fits
    )
    assert (
        "alpha : 0\n" in printed and "alpha : 10000.0\n" in printed
    )  # as they stand in alpha_list


def test_pairs_of_two_equal_sides_count_as_wrong():
    zeros = [[0 * X for X in part] for part in planted_features()]
    assert np.all(np.array(sweep(features=zeros, num_iterations=2)[0]) == 0)
    assert not any(map(any, vary_shots(2, [0], [0, 2], [3], features=zeros, num_iterations=2)))


# ---- Seeds, pairs, features of every kind


def test_several_seeds_are_averaged_user_by_user(swept):
    found, printed, fits = sweep(K_list=[3], alpha_list=[0], seed=[0, 1, 2])
    assert [fit.seed for fit in fits] == [0, 1, 2]
    assert not torch.allclose(fits[0].V, fits[1].V)
    torch.testing.assert_close(fits[0].V, swept[2][2].V, rtol=1e-3, atol=1e-3)
    of_seeds = [accuracies_by_counting(fit) for fit in fits]
    averaged = {
        s: [statistics.fmean(users) for users in zip(*(of_seed[s] for of_seed in of_seeds))]
        for s in SETTINGS
    }
    for j, accuracies in enumerate(averaged.values()):
        assert found[j].tolist() == pytest.approx([statistics.fmean(accuracies)])
        assert found[4 + j].tolist() == pytest.approx([statistics.pstdev(accuracies) / 4])
    assert printed == expected_print(["K : 3"], averaged)


def test_a_seed_gives_the_same_arrays_and_lines_again(swept):
    found, printed, _ = sweep()
    assert printed == swept[1]
    assert all(np.array_equal(one, other) for one, other in zip(found, swept[0]))


def pairs_of_one_table(features):
    """The same users as pairs of one table, whose row 0 is zero."""
    table = torch.cat([torch.zeros(1, d), *features])
    rows = torch.arange(1, len(table)).split([len(X) for X in features])
    return [Pairs(table, of_user, torch.zeros(len(of_user))) for of_user in rows]


@pytest.mark.parametrize(
    "as_pairs",
    [pairs_of_one_table, lambda part: [pairs_of_one_table([X])[0] for X in part]],
    ids=["one table", "a table each"],
)
def test_pairs_give_what_the_dense_features_give(swept, as_pairs):
    found, printed, _ = sweep(features=[as_pairs(part) for part in planted_features()])
    assert printed == swept[1]
    for one, other in zip(found, swept[0]):
        assert one.tolist() == pytest.approx(other.tolist())


def as_generators(features):
    return [(X for X in part) for part in features]


@pytest.mark.parametrize(
    "kind",
    [
        lambda f: [[X.numpy() for X in part] for part in f],
        as_generators,
        lambda f: [[X.double() for X in part] for part in f],
        lambda f: [[X.double().numpy() for X in part] for part in f],
    ],
    ids=["numpy", "generators", "float64", "numpy float64"],
)
def test_features_and_heads_of_every_kind_give_the_same_table(swept, kind):
    head = V_FINAL if kind is as_generators else kind([[V_FINAL]])[0][0]
    assert sweep(features=kind(planted_features()), V_final=head)[1] == swept[1]
    options = dict(trials=1, alpha_list=[0], K_list=[2], num_shots=[3], num_iterations=2)
    assert vary_shots(**options, features=kind(planted_features()), V_final=head) == vary_shots(
        **options
    )


def test_the_kernel_gives_the_table_of_the_plain_way(
    swept, swept_regularized, every_problem_on_the_kernel
):
    for (found, *_), again in (
        (swept, sweep()),
        (
            swept_regularized,
            sweep(pipeline=utils.run_regularized, K_list=(0, 1, 8), alpha_list=(0, 1e4)),
        ),
    ):
        np.testing.assert_allclose(
            found, again[0], atol=0.01
        )  # a pair at the border may change sides


@pytest.mark.parametrize("pipeline", [run, utils.run_regularized])
def test_a_sweep_leaves_features_and_reward_head_as_they_were(pipeline):
    features, head = planted_features(), V_FINAL.clone()
    sweep(features=features, V_final=head, pipeline=pipeline, num_iterations=5)
    assert torch.equal(head, V_FINAL)
    for part, before in zip(features, planted_features(), strict=True):
        assert all(torch.equal(X, same) for X, same in zip(part, before, strict=True))


# ---- Number of shots


def vary_shots(
    trials,
    alpha_list,
    K_list,
    num_shots,
    num_iterations=300,
    features=None,
    V_final=V_FINAL,
    users=(N, N_UNSEEN),
    seed=0,
    **options,
):
    train, _, unseen, unseen_test = features or planted_features()
    return run_few_shot_vary_shots(
        trials,
        alpha_list,
        K_list,
        num_shots,
        train,
        unseen,
        unseen_test,
        V_final,
        *users,
        "cpu",
        num_iterations=num_iterations,
        seed=seed,
        **options,
    )


def test_vary_shots_returns_four_lists_over_the_numbers_of_shots():
    found = vary_shots(3, [0, 0.1], [0, 2], [1, 4, 8], num_iterations=5)
    assert len(found) == 4
    assert all(isinstance(values, list) and len(values) == 2 * 2 * 3 for values in found)
    for values in found:
        assert values[:3] == values[6:9]  # the reward head is the same at every penalty


def test_more_shots_serve_planted_users_better():
    train, _, unseen, _ = vary_shots(
        4,
        [0],
        [3],
        [1, 4, 16, 40],
        num_iterations=1000,
        features=planted_crowd(*CROWD),
        users=CROWD[:2],
    )
    assert unseen == sorted(unseen)
    assert unseen[0] < 0.8 and unseen[3] > 0.88
    assert train[0] > 0.95  # weights fitted to a single pair satisfy it


def test_with_the_reward_head_only_the_shots_that_are_drawn_vary():
    train_mean, train_std, unseen_mean, unseen_std = vary_shots(
        6, [0], [0], [2, 99], num_iterations=5
    )
    _, _, unseen, unseen_test = planted_features()
    everything, test = (
        statistics.fmean(accuracy_by_counting(X, V_FINAL, torch.ones(1)) for X in part)
        for part in (unseen, unseen_test)
    )
    assert unseen_mean == pytest.approx([test, test]) and unseen_std == pytest.approx([0, 0])
    assert train_std[0] > 0.01
    assert train_mean[1] == pytest.approx(everything) and train_std[1] == pytest.approx(0)


def test_every_pair_as_shot_is_the_few_shot_fit_of_run():
    train, _, unseen, unseen_test = planted_features()
    _, V = LoRe(None, 0, N, d, 3, num_iterations=500, learning_rate=0.5).train(train)
    w = PersonalizeBatch(N_UNSEEN, d, 3, num_iterations=500, learning_rate=0.1).train(unseen, V)
    expected = [
        statistics.fmean(map(evaluate_model, part, [V] * N_UNSEEN, w))
        for part in (unseen, unseen_test)
    ]
    train_mean, _, unseen_mean, _ = vary_shots(4, [0], [3], [99], num_iterations=500)
    assert [train_mean[0], unseen_mean[0]] == pytest.approx(expected, abs=0.03)


def test_groups_make_a_shot_a_whole_group():
    """If all pairs of a group are the same one, shots of groups are shots of pairs."""
    train, _, unseen, unseen_test = planted_features()
    groups = [torch.arange(len(X)).repeat_interleave(3) for X in unseen]
    thrice = [train, None, [X.repeat_interleave(3, 0) for X in unseen], unseen_test]
    everything = vary_shots(2, [0], [3], [999], features=thrice, groups=groups)
    expected = vary_shots(2, [0], [3], [999])
    assert everything[0] == pytest.approx(expected[0]) and everything[2] == pytest.approx(
        expected[2], abs=0.02
    )
    one = vary_shots(6, [0], [0], [1], features=thrice, groups=groups)[0][0] * N_UNSEEN * 6
    assert one == pytest.approx(round(one))  # one group is all right or all wrong


def test_vary_shots_is_fixed_by_its_seed():
    first, same, other = (
        vary_shots(2, [0], [2], [3], num_iterations=5, seed=seed) for seed in (1, 1, 2)
    )
    assert list(first) == list(same) != list(other)


def test_vary_shots_prints_the_rank_the_shots_and_their_two_settings(capsys):
    vary_shots(2, [0], [2], [3, 5], num_iterations=5)
    shape = r"K : 2\n" + "".join(
        rf"Shots : {shots}\n"
        + "".join(
            rf"{setting}\nAverage accuracy: \d\.\d{{4}}\n"
            r"Standard deviation of accuracy: \d\.\d{4}\n"
            for setting in SETTINGS[2:]
        )
        for shots in (3, 5)
    )
    assert re.fullmatch(shape, capsys.readouterr().out)


# ---- Wrong input

RANKS_AND_PENALTIES = [
    (dict(K_list=[]), "K_list"),
    (dict(K_list=[-1]), "K_list", "-1"),
    (dict(K_list=[1.5]), "K_list", "1.5"),
    (dict(K_list=[2, 1, 2]), "K_list", "[2, 1, 2]"),
    (dict(K_list=[True]), "K_list", "True"),
    (dict(K_list=["2"]), "K_list", "'2'"),
    (dict(alpha_list=[-1]), "alpha_list", "-1"),
    (dict(alpha_list=[math.nan]), "alpha_list", "nan"),
    (dict(alpha_list=[math.inf]), "alpha_list", "inf"),
    (dict(alpha_list=[]), "alpha_list"),
    (dict(alpha_list=[1e16]), "alpha_list", "1e+16"),
    (dict(alpha_list=[10**400]), "alpha_list"),
    (dict(alpha_list=[0, 1, 0.0]), "alpha_list", "[0, 1, 0.0]"),
    (dict(K_list=5), "K_list", "5"),
    (dict(alpha_list=None), "alpha_list", "None"),
]
NAMES = (
    "train_features",
    "test_features_sparse",
    "train_features_unseen",
    "test_features_sparse_unseen",
)


@pytest.mark.parametrize("wrong", RANKS_AND_PENALTIES, ids=lambda wrong: str(wrong[0]))
def test_ranks_and_penalties_that_mean_nothing_are_refused(wrong, capsys):
    options, *named = wrong
    for pipeline in (run, utils.run_regularized):
        with input_error(*named):
            sweep(pipeline=pipeline, num_iterations=1, **options)
    with input_error(*named):
        vary_shots(
            2, options.get("alpha_list", [0]), options.get("K_list", [2]), [2], num_iterations=1
        )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_iterations", -1),
        ("num_iterations", 2.5),
        ("seed", -1),
        ("seed", "0"),
        ("seed", [0, 0]),
        ("threshold", math.nan),
        ("threshold", -1),
    ],
    ids=str,
)
def test_other_settings_that_mean_nothing_are_refused(name, value):
    for pipeline in (run, utils.run_regularized)[name == "threshold" :]:
        with input_error(name):
            sweep(pipeline=pipeline, **{"num_iterations": 1, name: value})
    if name != "threshold":
        with input_error(name):
            vary_shots(2, [0], [2], [2], **{"num_iterations": 1, name: value})


@pytest.mark.parametrize(
    "trials, num_shots",
    [(0, [2]), (2.5, [2]), (2, [0]), (2, [1.5]), (2, [-3]), (2, []), (2, 5), (2, [5, 5])],
    ids=str,
)
def test_vary_shots_refuses_numbers_of_trials_or_shots_below_one(trials, num_shots):
    with input_error("num_shots" if trials == 2 else "trials"):
        vary_shots(trials, [0], [2], num_shots, num_iterations=1)


@pytest.mark.parametrize(
    "groups",
    [[[0] * 12] * N_UNSEEN, [torch.zeros(12).long()], 5, [None] * N_UNSEEN],
    ids=["lists", "too few", "a number", "none"],
)
def test_groups_that_are_not_one_tensor_a_user_are_refused_before_the_training(groups, monkeypatch):
    monkeypatch.setattr(utils, "train_bases", None)
    with input_error("groups"):
        vary_shots(1, [0], [2], [1], groups=groups)


@pytest.mark.parametrize("device", ["cuda:99", "no device", 1.5])
def test_a_device_that_is_not_there_is_refused(device):
    for pipeline in (run, utils.run_regularized):
        with input_error("device", str(device)):
            pipeline([2], [0], V_FINAL, *planted_features(), N, N_UNSEEN, device)
    train, _, *unseen = planted_features()
    with input_error("device", str(device)):
        run_few_shot_vary_shots(1, [0], [2], [1], train, *unseen, V_FINAL, N, N_UNSEEN, device)


def test_an_interruption_keeps_the_state_of_the_training_that_was_done(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    unbroken, path = sweep()[2], tmp_path / lore.files.CHECKPOINT_FILE
    checkpoint = lore.files.TrainingCheckpoint(path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, "fit_weights", killed)
        sweep(checkpoint=checkpoint)
    assert lore.files.load_pickle(path)["iterations"] == 60
    _, printed, fits = sweep(checkpoint=checkpoint)
    assert "resuming the training after 60 iterations" in printed
    assert all(
        torch.equal(fit.V, same.V) and torch.equal(fit.W, same.W)
        for fit, same in zip(fits, unbroken)
    )


@pytest.mark.parametrize("part", range(4), ids=NAMES)
@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda X: X * math.nan, "NaN"),
        (lambda X: X / 0, "infinite"),
        (lambda X: X[:0], "(0, 6)"),
        (lambda X: X[:, :4], "4)"),
        (lambda X: X[0], "(6,)"),
        (lambda X: None, "NoneType"),
    ],
    ids=["NaN", "infinite", "no pairs", "narrow", "one vector", "none"],
)
def test_features_that_cannot_be_used_are_refused_by_name_and_user(part, damage, named):
    features = planted_features()
    features[part][3] = damage(features[part][3])
    with input_error(NAMES[part] + ", user 3:", named):
        sweep(features=features, num_iterations=1)
    if part != 1:  # vary_fewshot has no test prompts of seen users
        with input_error(NAMES[part] + ", user 3:", named):
            vary_shots(2, [0], [2], [2], features=features)


@pytest.mark.parametrize("pipeline", [run, utils.run_regularized])
def test_numbers_of_users_other_than_announced_are_refused(pipeline):
    with input_error("train_features:", "9 users", "8"):
        sweep(users=(8, N_UNSEEN), pipeline=pipeline, num_iterations=1)
    with input_error("train_features_unseen:", "5 users", "6"):
        sweep(users=(N, 6), pipeline=pipeline, num_iterations=1)
    with input_error("test_features_sparse:", "8 users", "9"):
        features = planted_features()
        sweep(
            features=[features[0], features[1][1:], *features[2:]],
            pipeline=pipeline,
            num_iterations=1,
        )


def test_a_reward_head_of_another_size_is_refused():
    for head in (torch.ones(d + 1, 1), torch.ones(d - 1)):
        with input_error("train_features", "6", str(len(head))):
            sweep(V_final=head, num_iterations=1)
        with input_error("train_features", "6", str(len(head))):
            vary_shots(2, [0], [2], [2], V_final=head)


def test_a_reward_head_with_nan_is_refused():
    with input_error("V_final", "NaN"):
        sweep(V_final=V_FINAL * math.nan, num_iterations=1)
    with input_error("V_final", "NaN"):
        vary_shots(2, [0], [2], [2], V_final=V_FINAL * math.nan, num_iterations=1)


def test_a_reward_head_may_be_one_vector(swept):
    assert sweep(V_final=V_FINAL[:, 0])[1] == swept[1]


def test_what_is_no_list_of_features_is_refused_by_name():
    for part in range(4):
        features = planted_features()
        features[part] = None
        with input_error(NAMES[part]):
            sweep(features=features)


# ---- The calls of the released scripts

FOUR = "train_features test_features_sparse train_features_unseen test_features_sparse_unseen"
MODEL = "V_sft alpha num_classes num_features num_basis_vectors num_iterations learning_rate"
# In this order, by these names; other arguments may only follow, with a default.
ARGUMENTS = {
    "run": f"K_list alpha_list V_final {FOUR} N N_unseen device",
    "run_regularized": f"K_list alpha_list V_final {FOUR} N N_unseen device",
    "run_few_shot_vary_shots": "trials alpha_list K_list num_shots "
    "train_features train_features_unseen "
    "test_features_sparse_unseen V_final N N_unseen device",
    "LoRe": MODEL,
    "LoRe_regularized": MODEL,
    "LoRe.train": "self X",
    "LoRe_regularized.train": "self X",
    "PersonalizeBatch": "num_classes num_features num_basis_vectors num_iterations learning_rate",
    "PersonalizeBatch.train": "self X V",
    "solve": "train_features num_basis_vectors num_iterations learning_rate",
    "solve_regularized": "V_sft alpha train_features num_basis_vectors",
    "solve_regularized_simplex": "V_sft alpha train_features num_basis_vectors",
    "learn_multiple_few_shot": "train_features V",
    "learn_multiple": "train_features",
    "learn_single_reward": "train_features",
    "learn_single_reward_regularized": "V_ref alpha train_features",
    "evaluate_model": "X V w",
    "eval_multiple": "W_list V_list test_features",
    "sample_shots": "train_features_unseen shots",
    "simulate_user": "reward_tensor features w",
    "simulate_population": "reward_tensor features W",
    "generate_population": "alpha N",
    "generate_popupulation": "alpha N",
    "create_sparse_tensor": "dense_tensor sample_percentage",
    "create_dataset_prism": "embeddings",
    "create_dataset_prism_shots": "embeddings shots",
    "Pairs": "embeddings chosen rejected",
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_have_the_released_names_and_order(name):
    function, names = utils, ARGUMENTS[name].split()
    for part in name.split("."):
        function = getattr(function, part)
    parameters = list(inspect.signature(function).parameters.values())
    assert [p.name for p in parameters[: len(names)]] == names
    assert all(
        p.default is not p.empty or p.kind == p.VAR_KEYWORD for p in parameters[len(names) :]
    )


def test_the_personalllm_script_of_the_release_can_be_run():
    """Scores are an array of objects, features nested lists of bfloat16 tensors, W is numpy's."""
    prompts, scorers = 40, 10
    generator, chance = torch.Generator().manual_seed(0), np.random.default_rng(0)
    features = [
        [torch.randn(d, generator=generator).bfloat16() for _ in range(8)] for _ in range(prompts)
    ]
    scores = chance.normal(size=(prompts, 8, scorers))
    reward_tensor = scores.astype(object)
    W = utils.generate_popupulation(alpha=0.1, N=5)
    assert isinstance(W, np.ndarray) and W.shape == (5, scorers)
    dense = utils.simulate_population(reward_tensor=reward_tensor, features=features, W=W)
    assert dense.shape == (5, prompts, d) and dense.dtype == torch.float32
    for w, of_user in zip(W, dense):
        of_one = utils.simulate_user(reward_tensor=reward_tensor, features=features, w=w)
        assert torch.equal(of_one, of_user)
        for p, x in enumerate(of_user):
            order = [sum(w[m] * scores[p, j, m] for m in range(scorers)) for j in range(8)]
            best, worst = features[p][int(np.argmax(order))], features[p][int(np.argmin(order))]
            assert torch.equal(x, best.float() - worst.float())
    sparse = utils.create_sparse_tensor(dense_tensor=dense, sample_percentage=0.5)
    assert [X.shape for X in sparse] == [(20, d)] * 5
    parts = dict(zip(FOUR.split(), (sparse, list(dense), sparse, list(dense))))
    with contextlib.redirect_stdout(io.StringIO()):
        found = run(
            K_list=[0, 2],
            alpha_list=[0],
            V_final=torch.ones(d, 1),
            **parts,
            N=5,
            N_unseen=5,
            device=torch.device("cpu"),
            num_iterations=5,
        )
    assert all(values.shape == (2,) for values in found)


def by_keyword():
    """Each numerical function as others call it, by keyword alone: name -> what it gives."""
    train, test, unseen, unseen_test = planted_features()
    V = planted_basis(d, 2)
    parts = dict(zip(FOUR.split(), (train, test, unseen, unseen_test)))
    sizes = dict(
        num_classes=N, num_features=d, num_basis_vectors=2, num_iterations=3, learning_rate=0.5
    )
    one, other = (
        dict(
            K_list=[1, 2],
            alpha_list=[0.5],
            V_final=V_FINAL,
            N=N,
            N_unseen=N_UNSEEN,
            device="cpu",
            num_iterations=3,
        )
        for _ in range(2)
    )
    del parts["test_features_sparse"]
    yield "run", run(**one, **parts, test_features_sparse=test)
    yield "run_regularized", utils.run_regularized(**one, **parts, test_features_sparse=test)
    yield "vary", run_few_shot_vary_shots(trials=2, num_shots=[2, 3], **other, **parts)
    yield "LoRe", LoRe(V_sft=V_FINAL, alpha=0.1, **sizes).train(X=train)
    yield "LoRe_regularized", LoRe_regularized(V_sft=V_FINAL, alpha=0.1, **sizes).train(X=train)
    yield "PersonalizeBatch", PersonalizeBatch(**sizes).train(X=train, V=V)
    yield (
        "solve",
        utils.solve(train_features=train, num_basis_vectors=2, num_iterations=3, learning_rate=0.1),
    )
    for function in (utils.solve_regularized, utils.solve_regularized_simplex):
        yield (
            function.__name__,
            function(
                V_sft=V_FINAL,
                alpha=0.1,
                train_features=train,
                num_basis_vectors=2,
                num_iterations=3,
                learning_rate=0.1,
            ),
        )
    yield (
        "few_shot",
        utils.learn_multiple_few_shot(
            train_features=train, V=V, num_iterations=3, learning_rate=0.1
        ),
    )
    yield (
        "single",
        utils.learn_single_reward(train_features=train, num_iterations=3, learning_rate=0.1),
    )
    yield (
        "single_regularized",
        utils.learn_single_reward_regularized(
            V_ref=V_FINAL, alpha=0.1, train_features=train, num_iterations=3, learning_rate=0.1
        ),
    )
    W_list, V_list = utils.learn_multiple(train_features=train, num_iterations=3, learning_rate=0.1)
    yield "eval_multiple", utils.eval_multiple(W_list=W_list, V_list=V_list, test_features=test)
    yield "evaluate_model", evaluate_model(X=train[0].numpy(), V=V.numpy(), w=np.array([0.5, 0.5]))
    yield "sample_shots", utils.sample_shots(train_features_unseen=unseen, shots=3)


def test_every_function_is_called_by_keyword(capsys):
    found = dict(by_keyword())
    assert len(found) == 15
    assert len(found["run"]) == len(found["run_regularized"]) == 8 and len(found["vary"]) == 4
    for name in ("LoRe", "solve", "solve_regularized"):
        w, V = found[name]
        assert w.shape == (N, 2) and V.shape == (d, 2)
    for name in ("PersonalizeBatch", "few_shot"):
        assert isinstance(found[name], list) and [w.shape for w in found[name]] == [(2,)] * N
    assert found["single"].shape == found["single_regularized"].shape == (d, 1)
    assert isinstance(found["eval_multiple"], list) and isinstance(found["evaluate_model"], float)
    assert [len(X) for X in found["sample_shots"]] == [3] * N_UNSEEN
