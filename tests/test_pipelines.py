"""run, run_regularized and run_few_shot_vary_shots: what they return, what they print, what they refuse."""

import contextlib
import io
import math
import re
import statistics

import numpy as np
import pytest
import torch
from helpers import input_error, planted_basis, planted_pairs, planted_weights

import utils
from utils import LoRe, LoRe_regularized, Pairs, PersonalizeBatch, evaluate_model, run, run_few_shot_vary_shots

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = ("Train Performance", "Seen User Unseen Prompts", "Few Shot Train Performance", "Unseen User Unseen Prompts")
d, N, N_UNSEEN = 6, 9, 5
PLANTED = planted_basis(d, 3)
V_FINAL = PLANTED.mean(1, keepdim=True)


def planted_features():
    """Train and test pairs of the seen users, then of the unseen, in the order of `run`; users have 12 to 44 pairs."""
    return [[X[: 12 + 4 * i] for i, X in enumerate(part)] for part in planted_crowd(N, N_UNSEEN, (44, 44, 44, 44))]


def planted_crowd(N, N_unseen, pairs):
    """`pairs` of each user, in the order of `run`'s features."""
    seen, unseen = planted_weights(N, 3), planted_weights(N_unseen, 3, seed=1)
    return [planted_pairs(PLANTED, W, m, seed) for seed, (W, m) in enumerate(zip((seen, seen, unseen, unseen), pairs))]


CROWD = 60, 20, (100, 100, 40, 200)  # enough users to find the planted basis


def printed_by(pipeline, *arguments, **options):
    """(what the pipeline returned, what it printed, its fits)."""
    out, fits = io.StringIO(), []
    with contextlib.redirect_stdout(out):
        found = pipeline(*arguments, fits=fits, **options)
    return found, out.getvalue(), fits


def sweep(K_list=(0, 1, 3), alpha_list=(0, 0.1), features=None, V_final=V_FINAL, users=(N, N_UNSEEN), pipeline=run,
          num_iterations=60, **options):
    return printed_by(pipeline, list(K_list), list(alpha_list), V_final, *(features or planted_features()), *users,
                      "cpu", num_iterations=num_iterations, **options)


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
    return {setting: [accuracy_by_counting(X, fit.V, w) for X, w in zip(part, W, strict=True)]
            for setting, part, W in zip(SETTINGS, planted_features(), (fit.W, fit.W, fit.W_unseen, fit.W_unseen))}


def assert_same_weights(one, other):
    """Of logits too, which still move where the weights have nearly reached a corner of the simplex."""
    for x, y in ((one, torch.stack(other)), (one.clamp(1e-30).log(), torch.stack(other).clamp(1e-30).log())):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)


def expected_print(headings, of_settings):
    """The quickstart's step 5: the headings of a model, then each setting's name and its two lines."""
    lines = list(headings)
    for setting, accuracies in of_settings.items():
        lines += [setting, f"Average accuracy: {statistics.fmean(accuracies):.4f}",
                  f"Standard deviation of accuracy: {statistics.pstdev(accuracies):.4f}"]
    return "".join(line + "\n" for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# What the sweeps return
# ---------------------------------------------------------------------------------------------------------------------


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
        for setting, part, W in zip(SETTINGS, planted_features(), (fit.W, fit.W, fit.W_unseen, fit.W_unseen)):
            of_users = [evaluate_model(X, fit.V, w) for X, w in zip(part, W)]
            assert fit.accuracies[setting].tolist() == pytest.approx(of_users)


def test_a_sweep_goes_through_the_penalties_and_for_each_through_the_ranks(swept):
    found, _, fits = swept
    assert [(fit.alpha, fit.K, fit.seed) for fit in fits] == [(alpha, K, 0) for alpha in (0, 0.1) for K in (0, 1, 3)]
    alone = [sweep(K_list=[K], alpha_list=[alpha])[0] for alpha, K in ((0, 3), (0.1, 1))]
    for i, single in zip((2, 4), alone):
        assert [values[i] for values in found] == pytest.approx([values[0] for values in single])


def test_rank_0_is_the_reward_head_with_weights_of_one(swept, swept_regularized):
    for _, _, fits in (swept, swept_regularized):
        for fit in (fits[0], fits[3]):
            assert torch.equal(fit.V, V_FINAL)
            assert torch.equal(fit.W, torch.ones(N, 1)) and torch.equal(fit.W_unseen, torch.ones(N_UNSEEN, 1))


def test_rank_1_gives_every_unseen_user_the_weight_1(swept, swept_regularized):
    for _, _, fits in (swept, swept_regularized):
        for fit in (fits[1], fits[4]):
            assert fit.V.shape == (d, 1)
            assert torch.equal(fit.W_unseen, torch.ones(N_UNSEEN, 1))


def test_run_trains_lore_at_a_half_and_fits_the_unseen_at_a_tenth(swept):
    train, _, unseen, _ = planted_features()
    for fit in swept[2]:
        if fit.K:
            w, V = LoRe(V_FINAL, fit.alpha, N, d, fit.K, num_iterations=60, learning_rate=0.5).train(train)
            torch.testing.assert_close((fit.W, fit.V), (w, V), rtol=1e-3, atol=1e-3)
        if fit.K > 1:
            w_unseen = PersonalizeBatch(N_UNSEEN, d, 3, num_iterations=500, learning_rate=0.1).train(unseen, fit.V)
            assert_same_weights(fit.W_unseen, w_unseen)


def test_run_regularized_trains_the_alternating_model_and_fits_the_unseen_at_a_half(swept_regularized):
    train, _, unseen, _ = planted_features()
    for fit in swept_regularized[2]:
        if fit.K:
            w, V = LoRe_regularized(V_FINAL, fit.alpha, N, d, fit.K, num_iterations=60, learning_rate=0.5).train(train)
            torch.testing.assert_close((fit.W, fit.V), (w, V), rtol=1e-3, atol=1e-3)
        kept = fit.V.shape[1]
        if kept > 1:
            w_unseen = PersonalizeBatch(N_UNSEEN, d, kept, num_iterations=500, learning_rate=0.5).train(unseen, fit.V)
            assert_same_weights(fit.W_unseen, w_unseen)
    assert any(1 < fit.V.shape[1] < 8 for fit in swept_regularized[2])  # columns were left out


def test_run_regularized_keeps_every_column_at_threshold_0():
    _, _, fits = sweep(pipeline=utils.run_regularized, K_list=[8], alpha_list=[0], threshold=0)
    assert fits[0].V.shape == (d, 8) and fits[0].W.shape == (N, 8) and fits[0].W_unseen.shape == (N_UNSEEN, 8)


def test_the_published_number_of_iterations_is_the_default():
    train = planted_features()[0]
    fits = []
    with contextlib.redirect_stdout(io.StringIO()):
        run([2], [0], V_FINAL, *planted_features(), N, N_UNSEEN, "cpu", fits=fits)
    torch.testing.assert_close(fits[0].V, LoRe(None, 0, N, d, 2, 1000, 0.5).train(train)[1], rtol=1e-3, atol=1e-3)
    assert utils.run_regularized.__defaults__[1] == 20000


def test_planted_users_are_served_best_at_the_planted_rank():
    _, seen, _, unseen, *_ = sweep(K_list=(0, 1, 3), alpha_list=[0], num_iterations=1000,
                                   features=planted_crowd(*CROWD), users=CROWD[:2])[0]
    assert seen[2] > 0.9 and unseen[2] > 0.88
    assert max(*seen[:2], *unseen[:2]) < 0.8


# ---------------------------------------------------------------------------------------------------------------------
# What they print
# ---------------------------------------------------------------------------------------------------------------------


def test_run_prints_the_quickstarts_lines(swept):
    _, printed, fits = swept
    assert printed == "".join(expected_print([f"K : {fit.K}"], accuracies_by_counting(fit)) for fit in fits)
    assert re.match(r"K : 0\nTrain Performance\nAverage accuracy: 0\.\d{4}\nStandard deviation of accuracy: 0\.\d{4}\n"
                    r"Seen User Unseen Prompts\n", printed)


def test_run_regularized_prints_alpha_and_rank(swept_regularized):
    _, printed, fits = swept_regularized
    assert printed == "".join(expected_print([f"alpha : {fit.alpha}", f"Rank : {fit.K}"], accuracies_by_counting(fit))
                              for fit in fits)
    assert "alpha : 0\n" in printed and "alpha : 10000.0\n" in printed  # as they stand in alpha_list


def test_eval_multiple_prints_the_mean_and_deviation_of_what_it_returns(swept, capsys):
    fit, train = swept[2][2], planted_features()[0]
    accuracies = utils.eval_multiple(list(fit.W), [fit.V] * N, train)
    assert accuracies == pytest.approx([accuracy_by_counting(X, fit.V, w) for X, w in zip(train, fit.W)])
    assert capsys.readouterr().out == expected_print([], {"": accuracies})[1:]


def test_a_pair_is_right_where_its_margin_is_positive_and_not_where_it_is_zero():
    X, V = torch.tensor([[1.0], [-1.0], [0.0], [3.0], [1e-20]]), torch.tensor([[2.0, -1.0]])
    assert evaluate_model(X, V, torch.tensor([1.0, 0.0])) == pytest.approx(3 / 5)
    assert evaluate_model(X, V, torch.tensor([0.0, 1.0])) == pytest.approx(1 / 5)
    assert isinstance(evaluate_model(X, V, torch.tensor([0.5, 0.5])), float)
    zeros = [[0 * X for X in part] for part in planted_features()]
    assert np.all(np.array(sweep(features=zeros, num_iterations=2)[0]) == 0)
    assert not any(map(any, vary_shots(2, [0], [0, 2], [3], features=zeros, num_iterations=2)))


# ---------------------------------------------------------------------------------------------------------------------
# Seeds, pairs
# ---------------------------------------------------------------------------------------------------------------------


def test_several_seeds_are_averaged_user_by_user(swept):
    found, printed, fits = sweep(K_list=[3], alpha_list=[0], seed=[0, 1, 2])
    assert [fit.seed for fit in fits] == [0, 1, 2]
    assert not torch.allclose(fits[0].V, fits[1].V)
    torch.testing.assert_close(fits[0].V, swept[2][2].V, rtol=1e-3, atol=1e-3)
    of_seeds = [accuracies_by_counting(fit) for fit in fits]
    averaged = {s: [statistics.fmean(users) for users in zip(*(of_seed[s] for of_seed in of_seeds))] for s in SETTINGS}
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


@pytest.mark.parametrize("as_pairs", [pairs_of_one_table, lambda part: [pairs_of_one_table([X])[0] for X in part]],
                         ids=["one table", "a table each"])
def test_pairs_give_what_the_dense_features_give(swept, as_pairs):
    found, printed, _ = sweep(features=[as_pairs(part) for part in planted_features()])
    assert printed == swept[1]
    for one, other in zip(found, swept[0]):
        assert one.tolist() == pytest.approx(other.tolist())


@pytest.mark.parametrize("pipeline", [run, utils.run_regularized])
def test_a_sweep_leaves_features_and_reward_head_as_they_were(pipeline):
    features, head = planted_features(), V_FINAL.clone()
    sweep(features=features, V_final=head, pipeline=pipeline, num_iterations=5)
    assert torch.equal(head, V_FINAL)
    for part, before in zip(features, planted_features(), strict=True):
        assert all(torch.equal(X, same) for X, same in zip(part, before, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Number of shots
# ---------------------------------------------------------------------------------------------------------------------


def vary_shots(trials, alpha_list, K_list, num_shots, num_iterations=300, features=None, V_final=V_FINAL,
               users=(N, N_UNSEEN), **options):
    train, _, unseen, unseen_test = features or planted_features()
    return run_few_shot_vary_shots(trials, alpha_list, K_list, num_shots, train, unseen, unseen_test, V_final,
                                   *users, "cpu", num_iterations=num_iterations, **options)


def test_vary_shots_returns_four_lists_over_the_numbers_of_shots():
    found = vary_shots(3, [0, 0.1], [0, 2], [1, 4, 8], num_iterations=5)
    assert len(found) == 4
    assert all(isinstance(values, list) and len(values) == 2 * 2 * 3 for values in found)
    for values in found:
        assert values[:3] == values[6:9]  # the reward head is the same at every penalty


def test_more_shots_serve_planted_users_better():
    train, _, unseen, _ = vary_shots(4, [0], [3], [1, 4, 16, 40], num_iterations=1000,
                                     features=planted_crowd(*CROWD), users=CROWD[:2])
    assert unseen == sorted(unseen)
    assert unseen[0] < 0.8 and unseen[3] > 0.88
    assert train[0] > 0.95  # weights fitted to a single pair satisfy it


def test_with_the_reward_head_only_the_shots_that_are_drawn_vary():
    train_mean, train_std, unseen_mean, unseen_std = vary_shots(6, [0], [0], [2, 99], num_iterations=5)
    _, _, unseen, unseen_test = planted_features()
    everything, test = (statistics.fmean(accuracy_by_counting(X, V_FINAL, torch.ones(1)) for X in part)
                        for part in (unseen, unseen_test))
    assert unseen_mean == pytest.approx([test, test]) and unseen_std == pytest.approx([0, 0])
    assert train_std[0] > 0.01
    assert train_mean[1] == pytest.approx(everything) and train_std[1] == pytest.approx(0)


def test_every_pair_as_shot_is_the_few_shot_fit_of_run():
    train, _, unseen, unseen_test = planted_features()
    _, V = LoRe(None, 0, N, d, 3, num_iterations=500, learning_rate=0.5).train(train)
    w = PersonalizeBatch(N_UNSEEN, d, 3, num_iterations=500, learning_rate=0.1).train(unseen, V)
    expected = [statistics.fmean(map(evaluate_model, part, [V] * N_UNSEEN, w)) for part in (unseen, unseen_test)]
    train_mean, _, unseen_mean, _ = vary_shots(4, [0], [3], [99], num_iterations=500)
    assert [train_mean[0], unseen_mean[0]] == pytest.approx(expected, abs=0.03)


def test_vary_shots_is_fixed_by_its_seed():
    first, same, other = (vary_shots(2, [0], [2], [3], num_iterations=5, seed=seed) for seed in (1, 1, 2))
    assert list(first) == list(same) != list(other)


def test_vary_shots_prints_the_rank_the_shots_and_their_two_settings(capsys):
    vary_shots(2, [0], [2], [3, 5], num_iterations=5)
    shape = r"K : 2\n" + "".join(
        rf"Shots : {shots}\n" + "".join(rf"{setting}\nAverage accuracy: \d\.\d{{4}}\n"
                                        r"Standard deviation of accuracy: \d\.\d{4}\n" for setting in SETTINGS[2:])
        for shots in (3, 5))
    assert re.fullmatch(shape, capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input
# ---------------------------------------------------------------------------------------------------------------------

RANKS_AND_PENALTIES = [
    (dict(K_list=[]), "K_list"), (dict(K_list=[-1]), "K_list", "-1"), (dict(K_list=[1.5]), "K_list", "1.5"),
    (dict(K_list=[2, 1, 2]), "K_list", "[2, 1, 2]"), (dict(K_list=[True]), "K_list", "True"),
    (dict(K_list=["2"]), "K_list", "'2'"),
    (dict(alpha_list=[-1]), "alpha_list", "-1"), (dict(alpha_list=[math.nan]), "alpha_list", "nan"),
    (dict(alpha_list=[math.inf]), "alpha_list", "inf"), (dict(alpha_list=[]), "alpha_list"),
    (dict(alpha_list=[1e16]), "alpha_list", "1e+16"), (dict(alpha_list=[10**400]), "alpha_list"),
    (dict(alpha_list=[0, 1, 0.0]), "alpha_list", "[0, 1, 0.0]")]
NAMES = ("train_features", "test_features_sparse", "train_features_unseen", "test_features_sparse_unseen")


@pytest.mark.parametrize("pipeline", [run, utils.run_regularized])
@pytest.mark.parametrize("wrong", RANKS_AND_PENALTIES, ids=lambda wrong: str(wrong[0]))
def test_ranks_and_penalties_that_mean_nothing_are_refused(pipeline, wrong, capsys):
    options, *named = wrong
    with input_error(*named):
        sweep(pipeline=pipeline, num_iterations=1, **options)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("wrong", RANKS_AND_PENALTIES, ids=lambda wrong: str(wrong[0]))
def test_vary_shots_refuses_the_same_ranks_and_penalties(wrong):
    options, *named = wrong
    with input_error(*named):
        vary_shots(2, options.get("alpha_list", [0]), options.get("K_list", [2]), [2], num_iterations=1)


@pytest.mark.parametrize("trials, num_shots, named",
                         [(0, [2], "0"), (2.5, [2], "2.5"), (2, [0], "0"), (2, [1.5], "1.5"), (2, [-3], "-3")])
def test_vary_shots_refuses_numbers_of_trials_or_shots_below_one(trials, num_shots, named):
    with input_error(f"{'num_shots' if trials == 2 else 'trials'} = {named}"):
        vary_shots(trials, [0], [2], num_shots, num_iterations=1)


@pytest.mark.parametrize("group", [[1] * 30, [0] * 29, [0, 2] * 15, [-1, 0] * 15])
def test_groups_of_shots_that_are_not_numbered_from_0_are_refused(group):
    features = [torch.randn(30, 4) for _ in range(2)]
    with input_error("groups, user 1"):
        utils.run_few_shot_vary_shots(1, [0], [2], [1], features, features, features, torch.ones(4, 1), 2, 2, "cpu",
                                      num_iterations=1, groups=[torch.zeros(30).long(), torch.tensor(group)])


@pytest.mark.parametrize("part", range(4), ids=NAMES)
@pytest.mark.parametrize("damage, named", [
    (lambda X: X * math.nan, "NaN"), (lambda X: X / 0, "infinite"), (lambda X: X[:0], "(0, 6)"),
    (lambda X: X[:, :4], "4)"), (lambda X: X[0], "(6,)")], ids=["NaN", "infinite", "no pairs", "narrow", "one vector"])
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
        sweep(features=[features[0], features[1][1:], *features[2:]], pipeline=pipeline, num_iterations=1)


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
