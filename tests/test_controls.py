"""Controls against float64 loops, closed forms and planted truths."""

import numpy as np
import pytest
import torch
from helpers import planted_basis, planted_pairs, planted_weights, random_users
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from studies import (
    N,
    d,
    random_fit,
    study_of,
    study_with_tastes,
    study_without_tastes,
    swept,
    with_repeats,
)

import lore.controls
import lore.files
from lore.controls import (
    ALARM,
    STRENGTHS,
    TossedControl,
    exchanged_accuracies,
    longer_answer_accuracies,
    model_per_user_accuracies,
    own_directions,
    toss,
    tossed_control,
    tossed_deviation,
)
from lore.intervals import interval
from lore.leaks import Identity, identities
from lore.study import PARTS
from utils import TEMPERATURE, UNSEEN_TEST, Fit, Pairs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def study():
    return study_with_tastes()


def table_and_matrices(d=d):
    """Pairs of one table for four users, and the same as matrices."""
    table = torch.randn(30, d, generator=torch.Generator().manual_seed(0))
    pairs = [Pairs(table, torch.arange(i, i + 9), torch.arange(i + 12, i + 21)) for i in range(4)]
    return pairs, [X.dense() for X in pairs]


# ---- Exchanged weights


def plain_accuracy(X, fit, w):
    """The accuracy of pairs `[m, d]` under weights of a fit, in a float64 loop."""
    V = fit.V.double()
    margins = [float(sum(x.double() @ V[:, k] * w[k] for k in range(len(w)))) for x in X]
    return np.mean([margin > 0 for margin in margins])


def test_own_mean_and_other_weights_give_the_accuracies_of_plain_loops(study):
    few_pairs = [X[:7] for X in study.test_unseen[:6]]
    fits = [random_fit(3, seed, N=6) for seed in range(2)]
    exchanged = exchanged_accuracies(few_pairs, fits)
    for i, X in enumerate(few_pairs):
        own, mean, others = [], [], []
        for fit in fits:
            W = fit.W_unseen.double()
            own.append(plain_accuracy(X, fit, W[i]))
            mean.append(plain_accuracy(X, fit, W.mean(0)))
            others += [plain_accuracy(X, fit, W[j]) for j in range(6) if j != i]
        assert exchanged.own[i] == pytest.approx(np.mean(own), abs=1e-6)
        assert exchanged.mean[i] == pytest.approx(np.mean(mean), abs=1e-6)
        assert exchanged.others[i] == pytest.approx(np.mean(others), abs=1e-6)
        difference = np.mean(own) - np.mean(mean)
        assert exchanged.personal_part[i] == pytest.approx(difference, abs=1e-6)


def test_pairs_of_a_table_are_exchanged_as_their_matrices():
    pairs, dense = table_and_matrices()
    fits = [random_fit(5, seed, N=4) for seed in range(2)]
    from_table = exchanged_accuracies(pairs, fits)
    from_matrices = exchanged_accuracies(dense, fits)
    for name in ("own", "mean", "others", "personal_part"):
        np.testing.assert_allclose(getattr(from_table, name), getattr(from_matrices, name))


def test_a_single_user_has_nobody_to_exchange_weights_with():
    X = random_users([9], d)
    assert exchanged_accuracies(X, [random_fit(2, 0, N=1)]).others is None


def test_the_interval_of_the_personal_part_covers_the_planted_one_in_90_to_99_of_100():
    V = planted_basis(d, 3)

    def personal_part(users, pairs, seed):
        """Under the planted models themselves."""
        W = planted_weights(users, 3, 0.1, seed)
        features = planted_pairs(V, W, pairs, seed, sampled=True)
        return exchanged_accuracies(features, [Fit(3, 0, 0, V, W, W, 0.0)]).personal_part

    truth = np.mean([personal_part(40, 200, 1000 + i).mean() for i in range(60)])
    covered = 0
    for seed in range(100):
        result = interval(personal_part(40, 30, seed), difference=True)
        covered += result["low"] <= truth <= result["high"]
    assert truth > 0.1
    assert 90 <= covered <= 99


# ---- Tossed choices


def test_a_toss_turns_half_of_the_pairs_and_no_other():
    (X,) = random_users([200], d)
    pairs = identities(study_of(dict.fromkeys(PARTS, [X])), ("train",))["train"]
    (tossed,) = toss([X], pairs)
    turned = (tossed == -X).all(1)
    assert 70 < turned.sum() < 130
    assert torch.equal(tossed[~turned], X[~turned])


def test_a_pair_falls_the_same_way_wherever_it_is_and_whichever_way_round():
    (X,) = random_users([50], d)
    study = study_of(
        dict(train=[X], test=[X], train_unseen=[-X.flip(0)], test_unseen=[torch.cat([X, -X])])
    )
    pairs = identities(study, PARTS)
    (trained,) = toss(study.train, pairs["train"])
    (few_shots,) = toss(study.train_unseen, pairs["train_unseen"])
    (tested,) = toss(study.test_unseen, pairs["test_unseen"])
    assert torch.equal(few_shots.flip(0), trained)
    assert torch.equal(tested, torch.cat([trained, trained]))


def test_with_texts_the_same_answers_fall_the_same_way_under_other_prompts():
    """The features of one half of the pairs are A minus B, of the other half B minus A."""
    (first,) = random_users([50], d)
    second = -(first + 0.01)  # another prompt moves the features a little
    texts = [(f"a {i}", f"b {i}") for i in range(50)]
    turned_texts = [pair[::-1] for pair in texts]
    study = study_of(
        dict.fromkeys(PARTS, [first]) | {"test_unseen": [second]},
        texts={"train": [texts], "test_unseen": [turned_texts]},
    )
    pairs = identities(study, ("train", "test_unseen"))
    (trained,) = toss(study.train, pairs["train"])
    (tested,) = toss(study.test_unseen, pairs["test_unseen"])
    torch.testing.assert_close(trained, tested, atol=0.011, rtol=0)
    turned = (trained != first).any(1)
    assert 10 < turned.sum() < 40


def test_pairs_of_tables_and_matrices_fall_the_same_way():
    pairs, dense = table_and_matrices()
    from_tables, from_matrices = (
        list(toss(features, identities(study_of(dict.fromkeys(PARTS, features)), PARTS)["test"]))
        for features in (pairs, dense)
    )
    for table, matrix in zip(from_tables, from_matrices):
        assert torch.equal(table.dense(), matrix)


def test_pairs_are_tossed_one_user_at_a_time(study):
    pairs = identities(study, ("test_unseen",))["test_unseen"]
    features = iter(study.test_unseen)
    next(toss(features, iter(pairs)))
    assert len(list(features)) == N - 1


@pytest.mark.parametrize("regularized", [False, True])
def test_the_tossed_control_is_the_largest_rank_with_the_first_alpha_and_seed(study, regularized):
    parts = ("train", "train_unseen", "test_unseen")
    pairs = identities(study, parts)
    tossed = {part: list(toss(study.features()[part], pairs[part])) for part in parts}
    (expected,) = swept(
        study_of(study.features() | tossed),
        K_list=[3],
        alpha_list=[0.1],
        seeds=[5],
        num_iterations=40,
        regularized=regularized,
    )
    control = tossed_control(study, [1, 3, 2], [0.1, 0], [5, 6], 40, "cpu", regularized=regularized)
    assert (control.K, control.alpha) == (3, 0.1)
    np.testing.assert_array_equal(control.accuracies, expected.accuracies[UNSEEN_TEST])
    assert control.deviation == tossed_deviation(pairs["test_unseen"])


def test_without_a_rank_above_1_nothing_is_tossed(study):
    assert tossed_control(study, [0, 1], [0], [0], 40, "cpu") is None


def test_the_tossed_control_resumes_from_a_checkpoint_of_its_own(study, tmp_path):
    class CountedCheckpoint(lore.files.TrainingCheckpoint):
        resumed = 0

        def load(self, identity):
            state = super().load(identity)
            self.resumed += state is not None
            return state

    checkpoint = CountedCheckpoint(tmp_path / "tossed.pt")
    first, again = (
        tossed_control(study, [3], [0], [0], 40, "cpu", checkpoint=checkpoint) for _ in range(2)
    )
    assert checkpoint.resumed == 1
    np.testing.assert_array_equal(first.accuracies, again.accuracies)


def is_alarm(study):
    return tossed_control(study, [5], [0], [0], 300, "cpu").interval["low"] > 0.5


def test_the_alarm_is_silent_without_repeats_even_if_all_differences_share_a_direction(study):
    shared = study_of({part: [X + 2 for X in users] for part, users in study.features().items()})
    for clean in (study, shared, study_without_tastes()):
        assert not is_alarm(clean)


def test_the_alarm_rings_if_the_test_repeats_the_few_shots():
    assert is_alarm(with_repeats(study_without_tastes(), 1.0))


def accuracy_of_coins(keys, coins):
    """The mean over users of what a model scores that says "turned round" of no pair."""
    return np.mean([np.mean([coins[key] for key in user_keys]) for user_keys in keys])


def test_the_deviation_is_that_of_coins_which_users_share():
    """Of all ways in which the coins of five pairs can fall, which three users have."""
    keys = [[0, 1, 1, 2], [2, 3], [2, 4, 0]]
    all_coins = [[number >> key & 1 for key in range(5)] for number in range(2**5)]
    scores = [accuracy_of_coins(keys, coins) for coins in all_coins]
    pairs = [Identity(np.array(user, np.uint64), np.zeros(len(user), bool)) for user in keys]
    assert np.mean(scores) == pytest.approx(0.5)
    assert tossed_deviation(pairs) == pytest.approx(np.std(scores))


def test_the_alarm_rings_beyond_2_6_deviations_and_not_before():
    assert ALARM == 2.6
    for mean, rings in ((0.5 + 2.59 * 0.05, False), (0.5 + 2.61 * 0.05, True), (0.3, False)):
        control = TossedControl(2, 0, np.full(9, mean), deviation=0.05)
        assert control.interval["mean"] == pytest.approx(mean)
        assert (control.interval["low"] > 0.5) == rings


def test_a_mean_far_from_chance_of_few_pairs_is_no_alarm():
    """.588 of 95 pairs of 9 users are 1.7 standard deviations."""
    counts = [10, 11, 10, 11, 10, 11, 10, 11, 11]
    keys = np.arange(95, dtype=np.uint64)
    ends = np.cumsum(counts)
    pairs = [
        Identity(keys[end - count : end], np.zeros(count, bool)) for count, end in zip(counts, ends)
    ]
    control = TossedControl(5, 0, np.full(9, 0.588), tossed_deviation(pairs))
    assert (0.588 - 0.5) / control.deviation == pytest.approx(1.7, abs=0.05)
    assert control.interval["low"] < 0.5


# ---- Longer answers


def test_the_longer_answer_is_scored_if_texts_are_known(study):
    texts = [("longer", "short"), ("longer", "short"), ("short", "longer"), ("equal", "equal")]
    study_with_texts = study_of(study.features(), texts={"test_unseen": [texts] * N})
    assert longer_answer_accuracies(study_with_texts).tolist() == [0.625] * N
    assert longer_answer_accuracies(study) is None


# ---- A model per user


def one_user(m, columns, seed=0):
    """Pairs, a pooled direction and the root mean square length of the pairs."""
    (X,) = random_users([m], columns, seed)
    pooled = torch.randn(columns, 1, generator=torch.Generator().manual_seed(seed + 1))
    return X, 3 * pooled, float(X.square().sum(1).mean().sqrt())


def loss_of(direction, X, pooled, length, strength):
    """What `own_directions` makes least, in float64."""
    X = X.double().numpy()
    u = (direction - pooled[:, 0].double().numpy()) * length / TEMPERATURE
    margins = X @ direction / TEMPERATURE
    return np.logaddexp(0, -margins).sum() + strength / 2 * (u**2).sum()


@pytest.mark.parametrize(("m", "columns"), [(6, 30), (40, 8)])
def test_a_model_per_user_is_the_least_of_its_loss(m, columns):
    X, pooled, length = one_user(m, columns)
    directions = own_directions(X, pooled, length, [1.0, 10.0])
    assert directions.shape == (columns, 2)
    for direction, strength in zip(directions.double().T.numpy(), (1.0, 10.0)):
        arguments = X, pooled, length, strength
        best = minimize(loss_of, pooled[:, 0].double().numpy(), arguments, tol=1e-10)
        np.testing.assert_allclose(direction, best.x, rtol=2e-3, atol=2e-3 * abs(best.x).max())


def test_about_no_direction_a_model_per_user_is_scikit_learns_logistic_ridge():
    X, _, length = one_user(20, 7)
    ridge = LogisticRegression(C=1 / 2, fit_intercept=False, tol=1e-8)  # every pair twice
    ridge.fit(torch.cat([X, -X]).numpy() / length, [1] * 20 + [0] * 20)
    (direction,) = own_directions(X, torch.zeros(7, 1), length, [1.0]).T
    expected = ridge.coef_[0] * TEMPERATURE / length
    np.testing.assert_allclose(direction.numpy(), expected, rtol=1e-3)


def test_a_strongly_held_model_is_the_pooled_direction():
    X, pooled, length = one_user(20, 7)
    direction = own_directions(X, pooled, length, [1e9])
    torch.testing.assert_close(direction, pooled, rtol=1e-4, atol=1e-4)


def test_a_model_per_user_finds_tastes_that_one_direction_cannot(study):
    (pooled,) = swept(study, K_list=[1])
    own = model_per_user_accuracies(study, pooled.V).mean()
    assert own > pooled.accuracies[UNSEEN_TEST].mean() + 0.02


def test_the_strength_is_that_which_does_best_on_the_seen_users_test_pairs(study, monkeypatch):
    (pooled,) = swept(study, K_list=[1])
    given = []

    def accuracies_of(train, test, pooled, length, strengths):
        given.append((train, test, list(strengths)))
        return np.tile([0.6, 0.8, 0.8, 0.7, 0.5, 0.5, 0.5], (N, 1))[:, : len(strengths)]

    monkeypatch.setattr(lore.controls, "own_model_accuracies", accuracies_of)
    model_per_user_accuracies(study, pooled.V)
    (train, test, tried), (train_unseen, test_unseen, taken) = given
    assert train[0] is study.train[0] and test[0] is study.test[0]
    assert train_unseen is study.train_unseen and test_unseen is study.test_unseen
    assert tried == list(STRENGTHS)
    assert taken == [STRENGTHS[2]]  # of equals the strongest


def test_models_of_tables_are_those_of_their_matrices():
    pairs, dense = table_and_matrices()
    pooled = torch.ones(d, 1)
    from_tables, from_matrices = (
        model_per_user_accuracies(study_of(dict.fromkeys(PARTS, features)), pooled)
        for features in (pairs, dense)
    )
    np.testing.assert_allclose(from_tables, from_matrices)


def test_many_users_are_judged_by_their_own_models(study, monkeypatch):
    (pooled,) = swept(study, K_list=[1])
    all_at_once = model_per_user_accuracies(study, pooled.V)
    monkeypatch.setattr(lore.controls, "USERS_AT_ONCE", 5)
    np.testing.assert_allclose(model_per_user_accuracies(study, pooled.V), all_at_once)
