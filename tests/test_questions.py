"""A new user's weights from a few choices, and which question to ask next."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import input_error, planted_basis, planted_pairs, planted_weights

import lore.questions
import utils
from lore.questions import fit_new_user, question_curves, question_values
from lore.study import Study
from utils import Pairs

pytestmark = pytest.mark.usefixtures("one_thread")
D, K = 64, 3


@pytest.fixture(scope="module")
def basis():
    return planted_basis(D, K, length=30.0), planted_weights(7, K)


def study_of(V, seen, unseen, counts):
    """A study whose users choose by planted weights `[users, K]`.

    counts: how many pairs each user has in `train`, `train_unseen` and `test_unseen`.
    """
    return Study(
        title="planted",
        seen=[f"seen {i}" for i in range(len(seen))],
        unseen=[f"unseen {i}" for i in range(len(unseen))],
        train=planted_pairs(V, seen, counts[0]),
        test=planted_pairs(V, seen, 1, seed=3),
        train_unseen=planted_pairs(V, unseen, counts[1], seed=1),
        test_unseen=planted_pairs(V, unseen, counts[2], seed=2),
        reward_head=torch.ones(len(V), 1),
    )


def trained(study, K_list, seeds=(0,), num_iterations=200):
    """A fit of each rank and seed, trained on the seen users."""
    return utils.sweep(
        K_list,
        [0],
        study.reward_head,
        *study.features().values(),
        len(study.seen),
        len(study.unseen),
        "cpu",
        seed=list(seeds),
        num_iterations=num_iterations,
    )


# ---- A new user


def posterior_in_plain_floats(X, V, W):
    """The posterior over the rows of W, pair by pair and user by user."""
    log = [0.0] * len(W)
    for x in X.double():
        for j, w in enumerate(W.double()):
            log[j] -= math.log1p(math.exp(-float(x @ V.double() @ w) / 100))
    likelihoods = [math.exp(value - max(log)) for value in log]
    return torch.tensor([likelihood / sum(likelihoods) for likelihood in likelihoods])


@pytest.mark.parametrize("m", [1, 4, 1000])
def test_a_new_users_weights_are_the_mean_of_the_seen_users_by_their_likelihood(basis, m):
    V, W = basis
    X = planted_pairs(V, W[:1], m, seed=3, sampled=True)[0]
    w, posterior = fit_new_user(X, V, W)
    expected = posterior_in_plain_floats(X, V, W)
    torch.testing.assert_close(posterior, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(w, (expected[:, None] * W).sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("m", [1, 4, 1000])
def test_pairs_of_a_table_give_the_same_new_user(basis, m):
    V, W = basis
    X = planted_pairs(V, W[:1], m, seed=3, sampled=True)[0]
    table = torch.cat([X, torch.zeros(1, D)])  # the last row is everybody's rejected answer
    pairs = Pairs(table, list(range(m)), [m] * m)
    torch.testing.assert_close(
        fit_new_user(pairs, V, W), fit_new_user(X, V, W), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("nothing", [[], torch.zeros(0, D)], ids=["list", "tensor"])
def test_without_choices_a_new_user_is_the_mean_user(basis, nothing):
    V, W = basis
    w, posterior = fit_new_user(nothing, V, W)
    torch.testing.assert_close(w, W.mean(0))
    torch.testing.assert_close(posterior, torch.full((7,), 1 / 7))


def test_contradictory_and_extreme_choices_give_weights_on_the_simplex(basis):
    V, W = basis
    X = 1e4 * torch.randn(500, D, generator=torch.Generator().manual_seed(1))
    for features in (torch.cat([X, -X]), X):
        for weights in fit_new_user(features, V, W):
            assert weights.isfinite().all()
            assert weights.sum() == pytest.approx(1, abs=1e-5)


def test_with_one_direction_every_seen_user_stays_as_probable(basis):
    V, _ = basis
    X = 1e4 * torch.randn(500, D, generator=torch.Generator().manual_seed(1))
    w, posterior = fit_new_user(X, V[:, :1], torch.ones(5, 1))
    assert w.tolist() == [1]
    assert posterior.tolist() == pytest.approx([0.2] * 5)


def test_many_choices_find_the_user_who_makes_them():
    V, W = planted_basis(D, K), torch.eye(K)
    X = planted_pairs(V, W[1:2], 50)[0]
    w, posterior = fit_new_user(X, V, W)
    assert posterior[1] > 0.99
    assert w[1] > 0.99


# ---- What to ask


def information_in_plain_floats(x, V, W, posterior):
    """The mutual information of the answer to one pair and the user, from their joint table."""
    first_wins = [1 / (1 + math.exp(-float(x @ V.double() @ w) / 100)) for w in W.double()]
    information = 0.0
    for answer in (first_wins, [1 - p for p in first_wins]):
        joint = [q * p for q, p in zip(posterior.tolist(), answer)]
        for p, q in zip(joint, posterior.tolist()):
            information += p * math.log(p / (q * sum(joint)))
    return information


def test_a_questions_value_is_the_mutual_information_of_answer_and_user(basis):
    V, W = basis
    X = torch.randn(6, D, generator=torch.Generator().manual_seed(2))
    posterior = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.05, 0.15, 0.1])
    values = question_values(X, V, W, posterior)
    for x, value in zip(X.double(), values, strict=True):
        expected = information_in_plain_floats(x, V, W, posterior)
        assert float(value) == pytest.approx(expected, abs=1e-6)
    assert question_values(1e6 * X, V, W, posterior).isfinite().all()


def test_a_question_is_worth_nothing_if_its_answer_tells_nothing(basis):
    V, W = basis
    X = torch.randn(6, D, generator=torch.Generator().manual_seed(2))
    anybody = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.05, 0.15, 0.1])
    known_user = torch.eye(7)[2]
    assert not question_values(X, V[:, :1], torch.ones(7, 1), anybody).any()
    assert not question_values(X, V, W, known_user).any()
    assert len(question_values([], V, W, anybody)) == 0


def test_a_posterior_that_does_not_fit_is_one_line(basis):
    V, W = basis
    for posterior in (torch.ones(6) / 6, torch.full((7,), math.nan), W[0]):
        with input_error("posterior"):
            question_values(torch.ones(2, D), V, W, posterior)


# ---- Accuracy by the number of questions


@pytest.fixture(scope="module")
def planted():
    V, W = planted_basis(24, K), planted_weights(60, K, concentration=0.1)
    return study_of(V, W[:40], W[40:], counts=(40, 30, 60))


@pytest.fixture(scope="module")
def planted_fits(planted):
    return trained(planted, [0, 1, K])


def test_chosen_questions_tell_more_than_random_ones(planted, planted_fits):
    frame = question_curves(planted_fits, planted, questions=4, trials=5)
    assert list(frame) == ["K", "alpha", "fit", "questions", "mean", "low", "high"]
    mean = frame.pivot(index="questions", columns="fit", values="mean")
    assert list(mean.columns) == ["posterior, chosen", "posterior, random", "released fit, random"]
    assert (mean["posterior, chosen"] > mean["posterior, random"])[1:].all()
    assert mean["posterior, chosen"][4] > 0.8
    assert mean["released fit, random"][4] > mean["released fit, random"][1]


def test_ranks_without_user_weights_have_no_curves(planted, planted_fits):
    with_weights = question_curves(planted_fits, planted, questions=1, trials=1)
    assert set(with_weights["K"]) == {K}
    without_weights = [fit for fit in planted_fits if fit.K < 2]
    assert len(without_weights) == 2
    assert question_curves(without_weights, planted, questions=4, trials=5).empty


def test_the_questions_of_a_trained_model_need_no_training_pairs(planted, planted_fits):
    without = dataclasses.replace(planted, train=[], test=[])
    frame = question_curves(planted_fits, without, questions=2, trials=1)
    assert frame.equals(question_curves(planted_fits, planted, questions=2, trials=1))


def test_seeds_are_averaged_within_a_user(basis):
    V, W = basis
    study = study_of(V, W, W, counts=(10, 4, 30))
    fits = trained(study, [2], seeds=(0, 1), num_iterations=5)
    together = question_curves(fits, study, questions=2, trials=2)
    alone = [question_curves([fit], study, questions=2, trials=2)["mean"] for fit in fits]
    assert not np.allclose(*alone)
    np.testing.assert_allclose(together["mean"], np.mean(alone, axis=0))


def test_random_questions_are_drawn_without_repetition_and_chosen_ones_never_asked_twice(basis):
    V, W = basis
    S = planted_pairs(V, W[:1], 6)[0] @ V
    drawn = lore.questions.random_questions(6, 4, trials=50, generator=torch.Generator())
    assert drawn.shape == (50, 4)
    for order in [*drawn.tolist(), lore.questions.chosen_questions(S, W, 9).tolist()]:
        assert len(set(order)) == len(order)
    assert len(lore.questions.chosen_questions(S, W, 9)) == 6  # all there are


def test_no_more_questions_are_asked_than_there_are(basis):
    V, W = basis
    study = study_of(V, W, W, counts=(5, 5, 5))
    fits = trained(study, [2], num_iterations=5)
    assert question_curves(fits, study, questions=9, trials=2)["questions"].max() == 5


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_unusable_numbers_of_questions_and_trials_are_one_line(planted, planted_fits, wrong):
    with input_error("num_questions: "):
        question_curves(planted_fits, planted, questions=wrong, trials=2)
    with input_error("trials: "):
        question_curves(planted_fits, planted, questions=2, trials=wrong)
