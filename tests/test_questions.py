"""A new user's weights from a few choices, and which question to ask next."""

import math

import pytest
import torch
from helpers import input_error, planted_basis, planted_pairs, planted_weights

from lore.questions import fit_new_user, question_curves, question_values
from utils import Pairs

pytestmark = pytest.mark.usefixtures("one_thread")
D, K = 64, 3


@pytest.fixture(scope="module")
def basis():
    return planted_basis(D, K, length=30.0), planted_weights(7, K)


def by_hand(X, V, W):
    """The posterior over the rows of W in Python's own floats."""
    log = [0.0] * len(W)
    for x in X.double():
        for j, w in enumerate(W.double()):
            log[j] -= math.log1p(math.exp(-float(x @ V.double() @ w) / 100))
    weights = [math.exp(value - max(log)) for value in log]
    return torch.tensor([weight / sum(weights) for weight in weights])


@pytest.mark.parametrize("m", [1, 4, 1000])
def test_a_new_users_weights_are_the_mean_of_the_seen_users_by_their_likelihood(basis, m):
    V, W = basis
    (X,) = planted_pairs(V, W[:1], m, seed=3, sampled=True)
    w, posterior = fit_new_user(X, V, W)
    expected = by_hand(X, V, W)
    torch.testing.assert_close(posterior, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(w, (expected[:, None] * W).sum(0), rtol=1e-4, atol=1e-6)
    table = torch.cat([X, torch.zeros(1, D)])
    of_pairs = fit_new_user(Pairs(table, list(range(m)), [m] * m), V, W)
    torch.testing.assert_close(of_pairs, (w, posterior), rtol=1e-4, atol=1e-5)


def test_without_choices_a_new_user_is_the_mean_user(basis):
    V, W = basis
    for nothing in ([], torch.zeros(0, D)):
        w, posterior = fit_new_user(nothing, V, W)
        torch.testing.assert_close(w, W.mean(0))
        torch.testing.assert_close(posterior, torch.full((7,), 1 / 7))


def test_contradictory_and_extreme_choices_and_one_direction_give_weights_on_the_simplex(basis):
    V, W = basis
    X = 1e4 * torch.randn(500, D, generator=torch.Generator().manual_seed(1))
    for features in (torch.cat([X, -X]), X):
        w, posterior = fit_new_user(features, V, W)
        for weights in (w, posterior):
            assert weights.isfinite().all() and weights.sum() == pytest.approx(1, abs=1e-5)
    w, posterior = fit_new_user(X, V[:, :1], torch.ones(5, 1))
    assert w.tolist() == [1] and posterior.tolist() == pytest.approx([0.2] * 5)


def test_many_choices_find_the_user_who_makes_them():
    V, W = planted_basis(D, K), torch.eye(K)
    (X,) = planted_pairs(V, W[1:2], 50)
    w, posterior = fit_new_user(X, V, W)
    assert posterior[1] > 0.99 and w[1] > 0.99


def test_a_questions_value_is_the_mutual_information_of_answer_and_user(basis):
    V, W = basis
    X = torch.randn(6, D, generator=torch.Generator().manual_seed(2))
    posterior = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.05, 0.15, 0.1])
    found = question_values(X, V, W, posterior)
    for x, value in zip(X.double(), found, strict=True):
        information = 0.0
        yes = [1 / (1 + math.exp(-float(x @ V.double() @ w) / 100)) for w in W.double()]
        for answer in (yes, [1 - p for p in yes]):
            joint = [q * p for q, p in zip(posterior.tolist(), answer)]
            information += sum(
                p * math.log(p / (q * sum(joint))) for p, q in zip(joint, posterior.tolist())
            )
        assert float(value) == pytest.approx(information, abs=1e-6)
    assert not question_values(X, V[:, :1], torch.ones(7, 1), posterior).any()
    assert question_values(1e6 * X, V, W, posterior).isfinite().all()
    assert not question_values(X, V, W, torch.eye(7)[2]).any()  # who the user is is known
    assert len(question_values([], V, W, posterior)) == 0


def test_chosen_questions_tell_more_than_random_ones():
    V, W = planted_basis(24, K), planted_weights(60, K, concentration=0.1)
    data = dict(
        zip(
            ("train", "train_unseen", "test_unseen"),
            (
                planted_pairs(V, W[:40], 40),
                planted_pairs(V, W[40:], 30, seed=1),
                planted_pairs(V, W[40:], 60, seed=2),
            ),
        )
    )
    frame = question_curves(4, 5, [0], [0, 1, K], data, None, "cpu", seeds=[0], num_iterations=200)
    assert list(frame) == ["K", "alpha", "fit", "questions", "mean", "low", "high"] and set(
        frame["K"]
    ) == {K}
    mean = frame.pivot(index="questions", columns="fit", values="mean")
    assert list(mean.columns) == ["posterior, chosen", "posterior, random", "released fit, random"]
    assert (mean["posterior, chosen"] > mean["posterior, random"])[1:].all()
    assert (
        mean["posterior, chosen"][4] > 0.8
        and mean["released fit, random"][4] > mean["released fit, random"][1]
    )
    assert question_curves(4, 5, [0], [0, 1], data, None, "cpu").empty


def test_a_posterior_that_does_not_fit_is_one_line(basis):
    V, W = basis
    for posterior in (torch.ones(6) / 6, torch.full((7,), math.nan), W[0]):
        with input_error("posterior"):
            question_values(torch.ones(2, D), V, W, posterior)


def test_no_more_questions_are_asked_than_there_are(basis):
    V, W = basis
    data = {
        part: planted_pairs(V, W, 5, seed=i)
        for i, part in enumerate(("train", "train_unseen", "test_unseen"))
    }
    assert (
        question_curves(9, 2, [0], [2], data, torch.ones(D, 1), "cpu", [0], 5)["questions"].max()
        == 5
    )
