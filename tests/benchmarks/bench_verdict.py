"""How often the verdict is "yes" where nobody has tastes, and how often an interval covers the planted personal part.

    python tests/benchmarks/bench_verdict.py        some three minutes on one core

First, data sets of users who all choose by the same direction, and of users with planted tastes: the sweep of
train_basis.py and its verdict on each. "yes" without tastes in more than 1 of 20 would be a fault. Then the planted
models themselves, on many draws of users and pairs: in how many of 100 the 95 % interval of the personal part covers the
planted one, which is the mean over many large draws of as many users.
"""

import contextlib
import io
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
from helpers import planted_basis, planted_pairs, planted_weights

from lore.evidence import evidence, exchanged_accuracies, interval
from utils import Fit, run

# ---------------------------------------------------------------------------------------------------------------------
d, N = 16, 40  # users, as many seen as unseen
K_list = [0, 1, 2, 3, 5]
pairs = {"train": 40, "test": 30, "train_unseen": 30, "test_unseen": 60}  # of a user
data_sets = 40
iterations = 300
covered_sets, covered_pairs = 400, 30  # of the second part; pairs of a user
# ---------------------------------------------------------------------------------------------------------------------

V = planted_basis(d, 3)


def population(seed, tastes):
    """Users whose mixtures are drawn, or all equal where they have no tastes."""
    seen, unseen = (
        planted_weights(N, 3, 0.1, seed + 100 * i) if tastes else torch.full((N, 3), 1 / 3)
        for i in range(2)
    )
    parts = {
        part: planted_pairs(V, seen if i < 2 else unseen, m, 10 * seed + i, sampled=True)
        for i, (part, m) in enumerate(pairs.items())
    }
    return parts | {"seen": list(range(N)), "unseen": list(range(N))}


def verdict_on(data, seed):
    """(yes, no or undecided; the personal part at the planted rank)."""
    fits, head = [], torch.ones(d, 1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(K_list, [0], head, *(data[part] for part in pairs), N, N, "cpu", seed, iterations, fits)
    found = evidence(fits, data, head)
    entry = next(entry for entry in found["evidence"] if entry["K"] == 3)
    return found["verdict"]["personal"], entry["personal_part"]["mean"]


def personal_part(m, seed):
    """Of N users with m pairs each under the planted models: float64 `[N]`."""
    W = planted_weights(N, 3, 0.1, seed)
    own, mean, _ = exchanged_accuracies(
        planted_pairs(V, W, m, seed, sampled=True), [Fit(3, 0, 0, V, W, W, 0.0)]
    )
    return own - mean


def main():
    torch.set_num_threads(1)
    for name, tastes in (("nobody has tastes", False), ("planted tastes", True)):
        start = time.perf_counter()
        verdicts, parts = zip(
            *(verdict_on(population(seed, tastes), seed) for seed in range(data_sets))
        )
        print(
            f"{name}: {dict(Counter(verdicts))} in {data_sets} data sets, mean personal part at K = 3 "
            f"{np.mean(parts):+.3f}; {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    truth = np.mean([personal_part(200, 5000 + i).mean() for i in range(100)])
    covered = []
    for seed in range(covered_sets):
        found = interval(personal_part(covered_pairs, seed))
        covered.append(found["low"] <= truth <= found["high"])
    print(
        f"planted personal part {truth:.3f}: covered in {[sum(covered[i : i + 100]) for i in range(0, covered_sets, 100)]} "
        "of 100 each"
    )


if __name__ == "__main__":
    main()
