"""What test_processes.py computes in one process and in two.

    python -m torch.distributed.run --nproc-per-node 2 process_work.py FOLDER

maps the table FOLDER/0.safetensors or FOLDER/1.safetensors, by the number of the process, and
writes what it finds to FOLDER/found.0 or FOLDER/found.1.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import utils
from lore.evidence import evidence, hold_out, judge_held_out, tossed_control
from lore.files import TrainingCheckpoint
from lore.study import PARTS, Study
from utils import Likelihood, Member, Pairs, train_bases

D = 8
# How many pairs each user of a part has. The two processes hold different numbers of users.
COUNTS = {
    "train": [9, 4, 15, 6, 12, 7, 5],
    "test": [6, 8, 5, 9, 4, 7, 6],
    "train_unseen": [8, 3, 6, 5, 9],
    "test_unseen": [7, 6, 9, 5, 8],
}
HEAD = torch.ones(D, 1)
ITERATIONS = 30
KILLED_AT = 20


def rows_per_user() -> dict[str, list[range]]:
    """The rows of the table of each user of each part: those of the pairs' sides."""
    rows: dict[str, list[range]] = {}
    first = 0
    for part, counts in COUNTS.items():
        rows[part] = []
        for count in counts:
            rows[part].append(range(first, first + 2 * count))
            first += 2 * count
    return rows


def random_table() -> torch.Tensor:
    """A bfloat16 row for each side of each pair; the chosen sides lean towards the user's taste."""
    rows = rows_per_user()
    generator = torch.Generator().manual_seed(0)
    table = 30 * torch.randn(rows["test_unseen"][-1].stop, D, generator=generator)
    for part in PARTS:
        for user, of_user in enumerate(rows[part]):
            table[of_user.start : of_user.stop : 2, user % 3] += 25
    return table.bfloat16()


def study_of(table: torch.Tensor) -> Study:
    """The study whose pairs are rows of a table, of which only the row numbers are read here."""
    features = {
        part: [Pairs(table, list(rows[::2]), list(rows[1::2])) for rows in users]
        for part, users in rows_per_user().items()
    }
    seen = [f"seen {i}" for i in range(len(COUNTS["train"]))]
    unseen = [f"unseen {i}" for i in range(len(COUNTS["test_unseen"]))]
    return Study("synthetic", seen, unseen, **features, reward_head=HEAD)


def arguments_of(study: Study) -> tuple:
    """What `run` takes behind the reward head."""
    return *study.features().values(), len(study.seen), len(study.unseen), "cpu"


def find(table: torch.Tensor, folder: Path) -> dict[str, Any]:
    """What the pipelines and the evidence make of the table."""
    study = study_of(table)
    with_validation, held_out = hold_out(study, 0.3)
    few = (*study.features().values(),)
    fits = utils.run([0, 1, 3], [0], HEAD, *arguments_of(with_validation), [0, 1], 40).fits
    fits = judge_held_out(fits, held_out)
    regularized = utils.run_regularized([1, 3], [10.0], HEAD, *arguments_of(study), 0, 40).fits
    curves = utils.run_few_shot_vary_shots(
        3, [0], [1, 3], [2, 5], few[0], few[2], few[3], HEAD, 7, 5, "cpu", 0, 20
    )
    one_unseen = utils.run([2], [0], HEAD, *few[:2], few[2][:1], few[3][:1], 7, 1, "cpu", 0, 5)
    tossed = tossed_control(study, [3], [0], [0], 20, "cpu")
    return {
        "sweeps": [plain(fit) for fit in (*fits, *regularized, *one_unseen.fits)],
        "curves": [list(curve) for curve in curves],
        "rows of curves": [row[utils.UNSEEN_TEST].tolist() for row in curves.rows],
        "evidence": evidence(fits, study, tossed),
        "resumed": killed_and_resumed(study, folder / "state.pt"),
        "error": error_of_a_damaged_user(table),
    }


def error_of_a_damaged_user(table: torch.Tensor) -> str:
    """What `run` says if a pair of the second seen user, whom the second process has, is NaN."""
    damaged = table.clone()
    damaged[rows_per_user()["train"][1].start] = torch.nan
    try:
        utils.run([1], [0], HEAD, *arguments_of(study_of(damaged)))
    except utils.InputError as error:
        return str(error)
    return "none"


def plain(fit: utils.Fit) -> dict[str, Any]:
    """A fit as a dict of tensors and numbers."""
    accuracies = {name: torch.tensor(values) for name, values in fit.accuracies.items()}
    return {"V": fit.V, "W": fit.W, "W_unseen": fit.W_unseen, "loss": fit.loss, **accuracies}


class Killed(Exception):
    """What ends a training in this test."""


def killed_and_resumed(study: Study, path: Path) -> dict[str, Any]:
    """Train, and train again with an interruption: both models, and the steps after resuming."""
    utils.CHECKPOINT_SECONDS = 0
    if utils.process_rank() > 0:
        utils.CHECKPOINT_SECONDS = 1e9  # only the clock of the first process may count
    grad_logits = Likelihood.grad_logits
    steps = []

    def killed(*arguments: Any) -> torch.Tensor:
        steps.append(1)
        if len(steps) == KILLED_AT:
            raise Killed
        return grad_logits(*arguments)

    def train(checkpoint: TrainingCheckpoint | None = None) -> list[torch.Tensor]:
        members = [Member(1, 0.5, 0), Member(3, 0.5, 0)]
        bases = train_bases(study.train, members, HEAD, ITERATIONS, 0.5, checkpoint=checkpoint)
        return [tensor for basis in bases for tensor in (basis.logits, basis.V.contiguous())]

    uninterrupted = train()
    Likelihood.grad_logits = killed
    try:
        train(TrainingCheckpoint(path))
    except Killed:
        steps.clear()
    resumed = train(TrainingCheckpoint(path))
    Likelihood.grad_logits = grad_logits
    return {"uninterrupted": uninterrupted, "resumed": resumed, "steps": len(steps)}


def main() -> None:
    folder = Path(sys.argv[1])
    rank = utils.process_rank()
    with safe_open(folder / f"{rank}.safetensors", "pt") as file:
        found = find(file.get_tensor("table"), folder)
    torch.save(found, folder / f"found.{rank}")
    os._exit(0)  # torch 2.3 now and then aborts as it ends, when the other process has ended before


if __name__ == "__main__":
    main()
