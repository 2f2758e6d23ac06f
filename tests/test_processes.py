"""Under torchrun P processes read and compute a P-th each, and all find what one finds."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import process_work
import pytest
import torch
from layout import ROOT
from safetensors.torch import save_file

import utils
from lore.files import TrainingCheckpoint
from utils import Member, train_bases

PROCESSES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table for each process, in which the rows of the other one's users are NaN, and for all."""
    folder = tmp_path_factory.mktemp("processes")
    table = process_work.random_table()
    for rank in range(PROCESSES):
        own = torch.full_like(table, math.nan)
        for users in process_work.rows_per_user().values():
            for rows in users[rank::PROCESSES]:
                own[rows.start : rows.stop] = table[rows.start : rows.stop]
        assert own.isnan().any()
        save_file({"table": own}, folder / f"{rank}.safetensors")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes finds."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={PROCESSES}", process_work.__file__, folder],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = [folder / f"found.{rank}" for rank in range(PROCESSES)]
    return [torch.load(name, weights_only=True) for name in names]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds that reads all rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "CHECKPOINT_SECONDS", utils.CHECKPOINT_SECONDS)  # undone at the end
        return process_work.find(process_work.random_table(), tmp_path_factory.mktemp("alone"))


def numbers_in(value: Any) -> list[float]:
    """All numbers in nested containers and tensors, in order; None and texts are left out."""
    if isinstance(value, torch.Tensor):
        return value.double().flatten().tolist()
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [number for inner in value for number in numbers_in(inner)]
    return [float(value)] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("what", ["sweeps", "curves", "rows of curves", "evidence"])
def test_each_process_finds_what_one_finds_without_a_look_at_the_rows_of_others(
    what: str, found: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    expected = numbers_in(alone[what])
    assert len(expected) > 10
    for of_process in found:
        assert numbers_in(of_process[what]) == pytest.approx(
            expected, rel=1e-3, abs=1e-4, nan_ok=True
        )


def test_the_losses_are_those_of_one_process(
    found: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    expected = [fit["loss"] for fit in alone["sweeps"]]
    assert sum(map(math.isfinite, expected)) == 7
    for of_process in found:
        losses = [fit["loss"] for fit in of_process["sweeps"]]
        assert losses == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_the_verdict_is_that_of_one_process(
    found: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for of_process in found:
        assert of_process["evidence"]["verdict"] == alone["evidence"]["verdict"]
        assert of_process["evidence"]["chosen"] == alone["evidence"]["chosen"]


def test_all_processes_name_the_damaged_user_of_one(found: list[dict[str, Any]]) -> None:
    for of_process in found:
        assert of_process["error"].startswith("train_features, user 1: NaN")


def test_a_killed_training_of_two_processes_goes_on_and_ends_the_same(
    found: list[dict[str, Any]],
) -> None:
    for of_process in found:
        training = of_process["resumed"]
        assert training["steps"] == process_work.ITERATIONS - (process_work.KILLED_AT - 1)
        for resumed, expected in zip(training["resumed"], training["uninterrupted"], strict=True):
            assert torch.equal(resumed, expected)


def test_one_process_does_not_go_on_from_the_state_of_two(
    folder: Path, found: list[dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    study = process_work.study_of(process_work.random_table())
    path = folder / "state.pt"
    assert path.exists()
    members = [Member(1, 0.5, 0), Member(3, 0.5, 0)]
    train_bases(
        study.train, members, process_work.HEAD, 30, 0.5, checkpoint=TrainingCheckpoint(path)
    )
    assert "resuming" not in capsys.readouterr().out
