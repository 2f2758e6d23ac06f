"""How often the verdict says "yes" if nobody has tastes, and how often its interval is right.

    python tests/benchmarks/bench_verdict.py        some three minutes on one core

First the verdict on simulated data sets, by the sweep of train_basis.py: on users who all choose
by the same direction, and on users with planted tastes. Without tastes, "yes" on more than 1 of
20 data sets would be a fault.

Then the 95 % interval of the personal part, under the planted models themselves: on how many of
100 draws of users and pairs it covers the planted one, the mean over many large draws.
"""

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
from lore.study import PARTS, Study
from utils import Fit, sweep

d = 16
N = 40  # users, as many seen as unseen
K_list = [0, 1, 2, 3, 5]
planted_rank = 3
pairs = {"train": 40, "test": 30, "train_unseen": 30, "test_unseen": 60}  # of each user
data_sets = 40  # with tastes, and as many without
iterations = 300
interval_draws = 400
interval_pairs = 30  # of each user

V = planted_basis(d, planted_rank)


def simulated_study(seed: int, tastes: bool) -> Study:
    """Seen and unseen users with drawn weights, or all with equal ones if they have no tastes."""
    weights = [torch.full((N, planted_rank), 1 / planted_rank)] * 2
    if tastes:
        weights = [planted_weights(N, planted_rank, 0.1, seed + 100 * i) for i in range(2)]
    seen, unseen = weights
    features = {
        part: planted_pairs(
            V, unseen if "unseen" in part else seen, pairs[part], 10 * seed + i, sampled=True
        )
        for i, part in enumerate(PARTS)
    }
    return Study(
        title="simulated",
        seen=[f"seen {i}" for i in range(N)],
        unseen=[f"unseen {i}" for i in range(N)],
        reward_head=torch.ones(d, 1),
        **features,
    )


def verdict_on(study: Study, seed: int) -> tuple[str, float]:
    """The verdict ("yes", "no" or "undecided"), and the personal part at the planted rank."""
    fits = sweep(
        K_list,
        [0],
        study.reward_head,
        *study.features().values(),
        N,
        N,
        "cpu",
        seed=seed,
        num_iterations=iterations,
    )
    results = evidence(fits, study)
    entry = next(entry for entry in results["evidence"] if entry["K"] == planted_rank)
    return results["verdict"]["personal"], entry["personal_part"]["mean"]


def personal_part(pairs_per_user: int, seed: int) -> np.ndarray:
    """The personal part of N users under the planted models: float64 `[N]`."""
    W = planted_weights(N, planted_rank, 0.1, seed)
    features = planted_pairs(V, W, pairs_per_user, seed, sampled=True)
    return exchanged_accuracies(features, [Fit(planted_rank, 0, 0, V, W, W, 0.0)]).personal_part


def report_verdicts(name: str, tastes: bool) -> None:
    start = time.perf_counter()
    verdicts = Counter()
    parts = []
    for seed in range(data_sets):
        verdict, part = verdict_on(simulated_study(seed, tastes), seed)
        verdicts[verdict] += 1
        parts.append(part)
    print(
        f"{name}: {dict(verdicts)} on {data_sets} data sets, mean personal part at "
        f"K = {planted_rank} {np.mean(parts):+.3f}; {time.perf_counter() - start:.0f} s",
        flush=True,
    )


def report_coverage() -> None:
    truth = np.mean([personal_part(200, 5000 + i).mean() for i in range(100)])
    covered = []
    for seed in range(interval_draws):
        result = interval(personal_part(interval_pairs, seed))
        covered.append(result["low"] <= truth <= result["high"])
    in_each_hundred = np.reshape(covered, (-1, 100)).sum(1).tolist()
    print(f"planted personal part {truth:.3f}: covered on {in_each_hundred} of 100 draws each")


def main() -> None:
    torch.set_num_threads(1)
    report_verdicts("nobody has tastes", tastes=False)
    report_verdicts("planted tastes", tastes=True)
    report_coverage()


if __name__ == "__main__":
    main()
