"""What pytest loads first: where modules are imported from, and fixtures of several test files."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from layout import import_folders

# pytest.ini runs the test files in two processes, so each gets one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests compare with float32 on a CPU. tests/benchmarks/bench_cuda.py checks the GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

for folder in import_folders():
    sys.path.insert(0, str(folder))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One PyTorch thread.

    The tensors here are small. On a busy machine, threads that wait for one another cost minutes.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def every_problem_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, the compiled kernel takes every problem, however small."""
    import utils

    monkeypatch.setattr(utils, "KERNEL_NUMBERS", 0)


@pytest.fixture(scope="module")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The `Demo` of a data set, run once a session; the test file names its folder as SCRIPTS."""
    from demos import demo

    return demo(request.module.SCRIPTS.name, tmp_path_factory.getbasetemp())


@pytest.fixture
def embeddings(ran, tmp_path: Path) -> Path:
    """A folder with the demo's embeddings and all else that training reads, to be damaged."""
    return ran.copy_to(tmp_path / "embeddings")
