"""Puts the repository root, the rooms and this folder on sys.path, so that the tests import utils, the rooms and each
other; fixtures that several files use."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes run the files side by side
os.environ.setdefault(
    "CUDA_VISIBLE_DEVICES", ""
)  # the tests hold float32 against a CPU's; GPUs: benchmarks/bench_cuda.py
ROOT = Path(__file__).parents[1]
for folder in (ROOT / "RedditTLDR", ROOT / "PRISM", ROOT / "PersonalLLM", ROOT, ROOT / "tests"):
    sys.path.insert(0, str(folder))


@pytest.fixture
def one_thread():
    """One PyTorch thread: with tensors this small, threads that wait for each other on a busy machine cost minutes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def every_problem_on_the_kernel(monkeypatch):
    """However small, on a CPU the pairs go through the compiled kernel."""
    import utils

    monkeypatch.setattr(utils, "KERNEL_NUMBERS", 0)


@pytest.fixture(scope="module")
def ran(request, tmp_path_factory):
    """The demo of the data set whose folder a file names as SCRIPTS, run once a session: a Demo."""
    from demos import demo

    return demo(request.module.SCRIPTS.name, tmp_path_factory.getbasetemp())


@pytest.fixture
def embeddings(ran, tmp_path):
    """A folder with the demo's embeddings, head and what else training reads, to be spoilt."""
    return ran.copy_to(tmp_path / "embeddings")
