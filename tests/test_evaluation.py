"""Accuracies: the share of pairs with a positive margin, counted one by one in float64."""

import math
import statistics

import numpy as np
import pytest
import torch
from helpers import input_error, random_users

import utils
from utils import Pairs, eval_multiple, evaluate_model

pytestmark = pytest.mark.usefixtures("one_thread")

d, K = 6, 3
COUNTS = (1, 40, 3, 17)


@pytest.fixture
def features():
    return random_users(COUNTS, d)


@pytest.fixture
def basis():
    return torch.randn(d, K, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights():
    return torch.softmax(torch.randn(len(COUNTS), K, generator=torch.Generator().manual_seed(2)), 1)


def accuracy_by_counting(X, V, w):
    """Right pairs by right pairs, in float64."""
    return sum(float(x) > 0 for x in X.double() @ V.double() @ w.double()) / len(X)


def as_pairs(X):
    return Pairs(torch.cat([torch.zeros(1, d), X]), range(1, len(X) + 1), [0] * len(X))


@pytest.mark.parametrize(
    "kind",
    [
        torch.clone,
        torch.Tensor.double,
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        as_pairs,
        lambda X: X.numpy().astype(np.float64),
        torch.nn.Parameter,
    ],
    ids=["float32", "float64", "numpy", "lists", "Pairs", "numpy float64", "parameter"],
)
def test_the_accuracy_is_the_share_of_positive_margins_of_features_of_every_kind(
    features, basis, weights, kind
):
    of_matrix = torch.clone if kind is as_pairs else kind
    for X, w in zip(features, weights):
        expected = accuracy_by_counting(X, basis, w)
        found = evaluate_model(kind(X), of_matrix(basis), of_matrix(w))
        assert isinstance(found, float) and found == pytest.approx(expected)
        assert evaluate_model(kind(X), basis, w[:, None]) == pytest.approx(expected)


def test_a_pair_is_right_where_its_margin_is_positive_and_not_where_it_is_zero():
    X, V = torch.tensor([[1.0], [-1.0], [0.0], [3.0], [1e-20]]), torch.tensor([[2.0, -1.0]])
    assert evaluate_model(X, V, torch.tensor([1.0, 0.0])) == pytest.approx(3 / 5)
    assert evaluate_model(X, V, torch.tensor([0.0, 1.0])) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    "wrong, named",
    [
        (dict(X=torch.ones(0, d)), ("X:", "(0, 6)")),
        (dict(X=torch.full((3, d), math.nan)), ("X:", "NaN")),
        (dict(X=torch.ones(3, d - 1)), ("X:", "(3, 5)")),
        (dict(X=torch.ones(d)), ("X:", "(6,)")),
        (dict(X=None), ("X:",)),
        (dict(X=np.full((2, d), np.inf)), ("X:", "infinite")),
        (dict(V=torch.full((d, K), math.nan)), ("V:", "NaN")),
        (dict(V=torch.ones(d)), ("V:", "(6,)")),
        (dict(V="text"), ("V:", "str")),
        (dict(w=torch.ones(K + 1)), ("w:", "4")),
        (dict(w=torch.full((K,), math.nan)), ("w:", "NaN")),
        (dict(w=None), ("w:",)),
        (dict(w="text"), ("w:",)),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else str(x),
)
def test_what_has_no_accuracy_is_refused_by_its_own_name(features, basis, weights, wrong, named):
    with input_error(*named):
        evaluate_model(**{"X": features[1], "V": basis, "w": weights[1], **wrong})


def test_eval_multiple_prints_the_mean_and_deviation_of_what_it_returns(
    features, basis, weights, capsys
):
    expected = [accuracy_by_counting(X, basis, w) for X, w in zip(features, weights)]
    lines = (
        f"Average accuracy: {statistics.fmean(expected):.4f}\n"
        f"Standard deviation of accuracy: {statistics.pstdev(expected):.4f}\n"
    )
    bases = [basis] * len(COUNTS)
    arrays = weights.numpy(), [basis.numpy()] * len(COUNTS), [X.numpy() for X in features]
    for W_list, V_list, test_features in (
        (list(weights), bases, features),
        (weights, bases, tuple(features)),
        arrays,
        (iter(weights), iter(bases), iter(features)),
    ):
        found = eval_multiple(W_list, V_list, test_features)
        assert isinstance(found, list) and found == pytest.approx(expected)
        assert capsys.readouterr().out == lines


def test_eval_multiple_refuses_another_number_of_users_and_says_whose_features_are_wrong(
    features, basis, weights
):
    bases = [basis] * len(COUNTS)
    for W_list, V_list, test_features in (
        (weights[1:], bases, features),
        (weights, bases[1:], features),
        (weights, bases, features[1:]),
        ([], [], []),
    ):
        with input_error("user"):
            eval_multiple(W_list, V_list, test_features)
    for wrong in (features[2][:0], features[2] * math.nan, features[2][:, :2]):
        with input_error("X"):
            eval_multiple(weights, bases, [*features[:2], wrong, features[3]])


def test_learnt_models_of_each_user_can_be_evaluated(features, capsys):
    W_list, V_list = utils.learn_multiple(features, num_iterations=150, learning_rate=0.2)
    accuracies = eval_multiple(W_list, V_list, features)
    assert accuracies == pytest.approx(
        [accuracy_by_counting(X, V, w) for X, V, w in zip(features, V_list, W_list)]
    )
    assert accuracies[0] == 1.0  # its only pair
