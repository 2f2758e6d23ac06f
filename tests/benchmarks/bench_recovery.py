"""How many pairs and users it takes to find a planted basis, and what LoRe is worth against simpler models.

    python tests/benchmarks/bench_recovery.py       under five minutes on two cores; prints a Markdown table

Users' choices are drawn from the Bradley-Terry model with planted directions V* (d x 3, orthogonal) and mixtures W*
(Dirichlet 0.2). Every model is fitted to the same training pairs and tested on new pairs of the same users. Angle: the
largest principal angle between the spans of the basis that was learnt and V*. Accuracies are means over users and data
sets; the Bayes rule predicts with V* and W* themselves, which nobody can beat. Users' own models are fitted for the
first 100 users only.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import subspace_angles
from sklearn.linear_model import LogisticRegression

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
from helpers import planted_basis, planted_pairs, planted_weights

from utils import evaluate_model, learn_multiple, learn_single_reward, solve

# ---------------------------------------------------------------------------------------------------------------------
d, K = 64, 3
user_counts = [10, 100, 1000]
pair_counts = [5, 20, 100, 500]  # per user, to learn from
test_pairs = 200  # per user
data_seeds = [0, 1]
own_models = 100  # users that get a model of their own, at most
iterations, learning_rate = 500, 0.5
# ---------------------------------------------------------------------------------------------------------------------


def accuracy(features, V, weights):
    """Mean over users of the share of right pairs; weights: one w per user."""
    return np.mean([evaluate_model(X, V, w) for X, w in zip(features, weights)])


def logistic_regression(X):
    """scikit-learn's Bradley-Terry model of one user, `[d, 1]`: every pair from both sides, no intercept."""
    X = X.numpy()
    model = LogisticRegression(fit_intercept=False).fit(
        np.concatenate([X, -X]), np.repeat([1, 0], len(X))
    )
    return torch.from_numpy(model.coef_.T).float()


def measured(N, pairs, seed):
    """Angle in degrees, then the accuracies in the order of the table's columns."""
    V, W = planted_basis(d, K, seed), planted_weights(N, K, 0.2, seed)
    train, test = (
        planted_pairs(V, W, count, 2 * seed + i, True)
        for i, count in enumerate((pairs, test_pairs))
    )
    w, found = solve(train, K, iterations, learning_rate, seed)
    ones = torch.ones(N, 1)
    own = min(N, own_models)
    by_adam = learn_multiple(train[:own], iterations, learning_rate, seed)[1]
    by_sklearn = [logistic_regression(X) for X in train[:own]]
    own_accuracies = (
        np.mean([evaluate_model(X, v, ones[0]) for X, v in zip(test, models)])
        for models in (by_adam, by_sklearn)
    )
    return [
        np.degrees(subspace_angles(V.numpy(), found.numpy())[0]),
        accuracy(test, found, w),
        accuracy(test, learn_single_reward(train, iterations, learning_rate, seed), ones),
        *own_accuracies,
        accuracy(test, V, W),
    ]


def main():
    start = time.perf_counter()
    print(f"d = {d}, planted rank {K}, {len(data_seeds)} data sets each\n")
    print(
        "| users | pairs each | angle to V* | LoRe | one for all (K = 1) | one per user | logistic regression per "
        "user | Bayes rule |\n|---|---|---|---|---|---|---|---|"
    )
    for N in user_counts:
        for pairs in pair_counts:
            angle, *accuracies = np.mean([measured(N, pairs, seed) for seed in data_seeds], 0)
            print(
                f"| {N:,} | {pairs} | {angle:.0f}° | "
                + " | ".join(f"{value:.3f}" for value in accuracies)
                + " |",
                flush=True,
            )
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
