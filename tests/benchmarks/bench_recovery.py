"""How many users and pairs it takes to find a planted basis, and whether simpler models do as well.

    python tests/benchmarks/bench_recovery.py     five minutes on two cores; prints a Markdown table

Users choose by the Bradley-Terry model with planted directions V* (d x 3, orthogonal) and planted
weights W* (Dirichlet 0.2). Every model is fitted to the same training pairs, and tested on new
pairs of the same users. Columns of the table:

    angle to V*                   largest principal angle between the spans of the basis and V*
    LoRe                          at the planted rank
    one for all (K = 1)           one model for all users
    one per user                  a model for each user, trained as LoRe is
    logistic regression per user  a model for each user, by scikit-learn
    Bayes rule                    V* and W* themselves, which no model can beat

The last five are accuracies: means over users and data sets. Models per user are fitted for the
first 100 users only.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import subspace_angles
from sklearn.linear_model import LogisticRegression

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
from helpers import planted_basis, planted_pairs, planted_weights

from utils import evaluate_model, learn_multiple, learn_single_reward, solve

# ---- Settings
d = 64
K = 3  # planted, and learnt
concentration = 0.2  # of the Dirichlet distribution of users' weights
user_counts = [10, 100, 1000]
pair_counts = [5, 20, 100, 500]  # of a user, to learn from
test_pairs = 200  # of a user
data_seeds = [0, 1]
users_with_own_models = 100
iterations = 500
learning_rate = 0.5

COLUMNS = (
    "angle to V*",
    "LoRe",
    "one for all (K = 1)",
    "one per user",
    "logistic regression per user",
    "Bayes rule",
)


def mean_accuracy(
    features: Sequence[torch.Tensor], bases: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> float:
    """Mean over users of the share of pairs predicted right; each user has a basis and a w."""
    accuracies = [evaluate_model(X, V, w) for X, V, w in zip(features, bases, weights, strict=True)]
    return float(np.mean(accuracies))


def logistic_regression(X: torch.Tensor) -> torch.Tensor:
    """scikit-learn's Bradley-Terry model of one user `[d, 1]`: each pair from both sides."""
    pairs = X.numpy()
    both_sides = np.concatenate([pairs, -pairs])
    chosen_is_first = np.repeat([1, 0], len(pairs))
    model = LogisticRegression(fit_intercept=False).fit(both_sides, chosen_is_first)
    return torch.from_numpy(model.coef_.T).float()


def measure(N: int, pairs: int, seed: int) -> dict[str, float]:
    """Plant a data set and fit every model -> column -> angle in degrees, or accuracy."""
    V_planted = planted_basis(d, K, seed)
    W_planted = planted_weights(N, K, concentration, seed)
    train = planted_pairs(V_planted, W_planted, pairs, seed=2 * seed, sampled=True)
    test = planted_pairs(V_planted, W_planted, test_pairs, seed=2 * seed + 1, sampled=True)

    W, V = solve(train, K, iterations, learning_rate, seed)
    pooled = learn_single_reward(train, iterations, learning_rate, seed)
    own = min(N, users_with_own_models)
    _, own_by_adam = learn_multiple(train[:own], iterations, learning_rate, seed)
    own_by_sklearn = [logistic_regression(X) for X in train[:own]]

    ones = torch.ones(N, 1)
    measured = (
        np.degrees(subspace_angles(V_planted.numpy(), V.numpy())).max(),
        mean_accuracy(test, [V] * N, W),
        mean_accuracy(test, [pooled] * N, ones),
        mean_accuracy(test[:own], own_by_adam, ones[:own]),
        mean_accuracy(test[:own], own_by_sklearn, ones[:own]),
        mean_accuracy(test, [V_planted] * N, W_planted),
    )
    return dict(zip(COLUMNS, measured, strict=True))


def main() -> None:
    start = time.perf_counter()
    print(f"d = {d}, planted rank {K}, {len(data_seeds)} data sets each\n")
    print(f"| users | pairs each | {' | '.join(COLUMNS)} |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for N in user_counts:
        for pairs in pair_counts:
            measured = [measure(N, pairs, seed) for seed in data_seeds]
            cells = []
            for column in COLUMNS:
                mean = np.mean([values[column] for values in measured])
                cells.append(f"{mean:.0f}°" if column.startswith("angle") else f"{mean:.3f}")
            print(f"| {N:,} | {pairs} | {' | '.join(cells)} |", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
