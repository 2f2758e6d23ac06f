"""Puts the repository root and this folder on sys.path, so that the tests import utils, the scripts and each other."""

import sys
from pathlib import Path

import pytest

for folder in (Path(__file__).parents[1], Path(__file__).parent):
    sys.path.insert(0, str(folder))


@pytest.fixture
def one_thread():
    """One PyTorch thread: with tensors this small, threads that wait for each other on a busy machine cost minutes."""
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
