"""How far the verdict can be trusted, on simulated data sets of which the truth is known.

    python tests/benchmarks/bench_verdict.py        some three minutes on one core

It prints, in this order:

1. on how many data sets the verdict is "yes", with 6, 9 and 40 unseen users: data on users who all
   choose by the same direction, and on users with planted tastes. Without tastes, "yes" on more
   than 1 of 40 data sets would be a fault. With them, what predicts how well;
2. the control on flipped choices and the leaks, without tastes, if none, a fifth and all of the
   test pairs repeat the few shots: by prompt, by their answers under other prompts, and by their
   features, of which no texts are known;
3. on how many of 100 data sets without repeats the control rings;
4. on how many of 100 draws of users and pairs the 95 % interval of the personal part, under the
   planted models themselves, covers the planted one, which is the mean over many large draws. Once
   with the mean weights of all people, so that users are independent, and once with the mean
   weights of the users who were drawn, which the bootstrap holds for given.
"""

import dataclasses
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
from helpers import planted_basis, planted_pairs, planted_weights
from studies import PAIRS, d, entry_of, planted_study, with_repeats

from lore.controls import tossed_control
from lore.evidence import evidence
from lore.intervals import interval
from lore.study import Study
from utils import (
    UNSEEN_SETTINGS,
    UNSEEN_TEST,
    Fit,
    accuracies_per_user,
    accuracies_under_each,
    sweep,
)

N = 40  # users, as many seen as unseen
K_list = [0, 1, 2, 3, 5]
planted_rank = 3
iterations = 200

data_sets = 40  # with tastes, and as many without
few_users = {6: 2, 9: 2}  # unseen users: how many groups of so many are made of each data set's
repeated_shares = [0, 0.2, 1]
repeated_data_sets = 5  # of each kind and share
alarm_data_sets = 100
coverage_users = [6, 9, 15, 38, 100]
coverage_draws = 1000
coverage_pairs = 30  # of each user


def simulated_study(seed: int, tastes: bool) -> Study:
    """Seen and unseen users with drawn weights, or all with equal ones if they have no tastes."""
    if not tastes:
        equal = torch.full((N, planted_rank), 1 / planted_rank)
        return planted_study(equal, equal, seed)
    seen, unseen = (planted_weights(N, planted_rank, 0.1, seed + 100 * i) for i in range(2))
    return planted_study(seen, unseen, seed)


def train(study: Study, seed: int) -> list[Fit]:
    return sweep(
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


def with_some_unseen_users(study: Study, fits: list[Fit], users: slice) -> tuple[Study, list[Fit]]:
    """The study and the models with some of the unseen users only.

    Without K = 1: the model per user about it takes time and does not change the answer.
    """
    study = dataclasses.replace(
        study,
        unseen=study.unseen[users],
        train_unseen=study.train_unseen[users],
        test_unseen=study.test_unseen[users],
    )
    fewer = []
    for fit in fits:
        if fit.K != 1:
            accuracies = {
                setting: values[users] if setting in UNSEEN_SETTINGS else values
                for setting, values in fit.accuracies.items()
            }
            fewer.append(
                dataclasses.replace(fit, W_unseen=fit.W_unseen[users], accuracies=accuracies)
            )
    return study, fewer


def report_verdicts(name: str, tastes: bool) -> None:
    """1: the verdicts, and with tastes what predicts how well."""
    start = time.perf_counter()
    verdicts = {users: Counter() for users in (*few_users, N)}
    compared = []
    for seed in range(data_sets):
        study = simulated_study(seed, tastes)
        fits = train(study, seed)
        results = evidence(fits, study)
        verdicts[N][results["verdict"]["personal"]] += 1
        compared.append(comparisons(results))
        for users, groups in few_users.items():
            for group in range(groups):
                some = slice(group * users, (group + 1) * users)
                fewer = evidence(*reversed(with_some_unseen_users(study, fits, some)))
                verdicts[users][fewer["verdict"]["personal"]] += 1
    print(f"{name} ({time.perf_counter() - start:.0f} s)")
    for users, counts in verdicts.items():
        print(f"  {users:3} unseen users: yes {counts['yes']} of {counts.total()}, {dict(counts)}")
    means = {key: np.mean([found[key] for found in compared]) for key in compared[0]}
    print("  means: " + ", ".join(f"{key} {mean:.3f}" for key, mean in means.items()), flush=True)


def comparisons(results: dict) -> dict[str, float]:
    """Means over the unseen users of one data set."""
    entry = entry_of(results, planted_rank)
    return {
        "pooled": entry_of(results, 1)["accuracy"][UNSEEN_TEST]["mean"],
        "a model per user": entry["controls"]["model_per_user"]["mean"],
        f"LoRe at K = {planted_rank}": entry["accuracy"][UNSEEN_TEST]["mean"],
        "personal part": entry["personal_part"]["mean"],
        "worst tenth": entry["worst_served"]["mean"],
        "served worse": entry["served_worse"],
    }


def report_repeats(kind: str) -> None:
    """2: what the control and the leaks say if the test repeats the few shots."""
    for share in repeated_shares:
        scores = []
        alarms = 0
        verdicts = Counter()
        leaks = []
        for seed in range(repeated_data_sets):
            study = with_repeats(simulated_study(seed, tastes=False), share, kind, seed)
            control = tossed_control(study, K_list, [0], [seed], iterations, "cpu")
            results = evidence(train(study, seed), study, control)
            scores.append(control.interval["mean"])
            alarms += control.interval["low"] > 0.5
            verdicts[results["verdict"]["personal"]] += 1
            leaks.append(results["leaks"][UNSEEN_TEST])
        shown = ", ".join(
            f"{key} {'unknown' if leaks[0][key] is None else format(mean_of(leaks, key), '.1%')}"
            for key in leaks[0]
        )
        print(
            f"{share:.0%} repeated by {kind}: control {np.mean(scores):.3f}, {alarms} of "
            f"{repeated_data_sets} alarms; {shown}; {dict(verdicts)}",
            flush=True,
        )


def mean_of(leaks: list[dict], key: str) -> float:
    return float(np.mean([shares[key] for shares in leaks]))


def report_false_alarms() -> None:
    """3: how often the control rings without repeats."""
    alarms = 0
    deviations = []
    for seed in range(alarm_data_sets):
        study = simulated_study(1000 + seed, tastes=seed % 2 == 0)
        control = tossed_control(study, K_list, [0], [seed], iterations, "cpu")
        alarms += control.interval["low"] > 0.5
        deviations.append((control.interval["mean"] - 0.5) / control.deviation)
    print(
        f"without repeats: {alarms} false alarms in {alarm_data_sets}; the controls are "
        f"{np.mean(deviations):+.2f} standard deviations from chance, give or take "
        f"{np.std(deviations):.2f}",
        flush=True,
    )


def personal_parts(users: int, pairs_per_user: int, seed: int) -> np.ndarray:
    """Two personal parts under the planted models: float64 `[2, users]`.

    The first is the accuracy with own weights less that with the mean weights of all people, the
    second less that with the mean weights of these users.
    """
    V = planted_basis(d, planted_rank)
    W = planted_weights(users, planted_rank, 0.1, seed)
    features = planted_pairs(V, W, pairs_per_user, seed, sampled=True)
    (own,) = accuracies_per_user(features, [V], [W])
    mean_weights = torch.stack([torch.full((planted_rank,), 1 / planted_rank), W.mean(0)])
    return own - accuracies_under_each(features, V, mean_weights).T


def report_coverage() -> None:
    """4: the share of draws whose interval covers the planted personal part."""
    for users in coverage_users:
        truth_draws = 20000 // users
        truths = np.mean(
            [personal_parts(users, 200, 50000 + i).mean(1) for i in range(truth_draws)], 0
        )
        covered = np.zeros(2)
        for seed in range(coverage_draws):
            for i, part in enumerate(personal_parts(users, coverage_pairs, seed)):
                result = interval(part, difference=True)
                covered[i] += result["low"] <= truths[i] <= result["high"]
        of_all, of_users = 100 * covered / coverage_draws
        print(
            f"{users:3} users: planted personal part {truths[0]:.3f}, covered by {of_all:.1f} of "
            f"100 intervals; with their own mean weights {truths[1]:.3f}, by {of_users:.1f}",
            flush=True,
        )


def main() -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(f"{N} seen users, pairs of each: {PAIRS}, d = {d}, {iterations} iterations")
    report_verdicts("nobody has tastes", tastes=False)
    report_verdicts("planted tastes", tastes=True)
    for kind in ("prompt", "answers", "features"):
        report_repeats(kind)
    report_false_alarms()
    report_coverage()
    print(f"{time.perf_counter() - start:.0f} s, of which {time.process_time():.0f} s computed")


if __name__ == "__main__":
    main()
