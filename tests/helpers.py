"""What several test files share: users to train on, the errors a user sees, code in a process of its own."""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lore.embedding_files
import lore.files
import lore.scripts
import utils

ROOT = Path(__file__).parents[1]


def random_users(counts, d, seed=0, scale=30.0):
    """One float32 `[m_i, d]` per user, allocated separately; the scale brings margins / 100 to the bend of the sigmoid.

    The pairs lean towards a direction of the user's own, so that there is something to learn.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * (torch.randn(m, d, generator=generator) + 0.5 * torch.randn(d, generator=generator))
        for m in counts
    ]


def planted_basis(d, K, seed=0, length=300.0):
    """K orthogonal directions of the given length, `[d, K]`."""
    generator = torch.Generator().manual_seed(seed)
    return length * torch.linalg.qr(torch.randn(d, K, generator=generator)).Q


def planted_weights(N, K, concentration=0.2, seed=0):
    """N mixtures over K directions, Dirichlet draws `[N, K]`."""
    return torch.tensor(
        np.random.default_rng(seed).dirichlet([concentration] * K, N), dtype=torch.float32
    )


def planted_pairs(V, W, pairs, seed=0, sampled=False):
    """`pairs` of each user whose weights are a row of W: the larger margin always wins, or (sampled) Bradley-Terry."""
    generator = torch.Generator().manual_seed(seed)
    features = []
    for w in W:
        X = torch.randn(pairs, len(V), generator=generator)
        margins = X @ V @ w
        wins = (
            torch.rand(pairs, generator=generator) < torch.sigmoid(margins / 100)
            if sampled
            else margins > 0
        )
        features.append(torch.where(wins[:, None], X, -X))
    return features


@contextlib.contextmanager
def input_error(*named):
    """The block raises an InputError of one line that contains each of the strings; what it yields gives the line."""
    with pytest.raises(utils.InputError) as caught:
        yield lambda: str(caught.value)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for name in named:
        assert name in message


def fresh_process(code, *arguments, **environment):
    """Start `python -c code arguments` outside the repository, with its root on the path -> subprocess.Popen."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        text=True,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def outcome(process, timeout=120):
    """(exit status, stdout, stderr) of a process that `fresh_process` started."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def sign_again(folder):
    """Have the reward head's file in `folder` vouch for the embeddings that now lie there, changed as they are."""
    head = folder / lore.embedding_files.HEAD_FILE
    if head.exists():
        tensors, about = lore.files.load_tensors(head)
        about["files"] = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in about["files"]
        }
        lore.files.save_tensors(head, tensors, **about)


def copy_of_tree(target):
    """A copy of what is committed of the product, without results of anybody's runs -> its root."""
    for name in ("utils.py", "lore", "RedditTLDR", "PRISM", "PersonalLLM"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, target)
        else:
            shutil.copytree(
                ROOT / name,
                target / name,
                ignore=shutil.ignore_patterns(
                    ".*", "__pycache__", "data", "results", "checkpoints", "*.pkl", "*.safetensors"
                ),
            )
    return target


def load_script(folder, name):
    """A fresh module of a script in a folder of the repository, so that a test can set its constants."""
    if (
        str(ROOT / folder) not in sys.path
    ):  # where the script's own folder stands: it does `import tldr`
        sys.path.insert(0, str(ROOT / folder))
    spec = importlib.util.spec_from_file_location(
        f"{folder}_{name}".replace("-", "_"), ROOT / folder / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(monkeypatch, module, *arguments):
    """Call a script's main with a command line, as `python script.py` does."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    lore.scripts.run_script(module.main)


def refused(monkeypatch, capsys, module, arguments, *named):
    """The script ends with status 2 and one line on stderr that contains each of the strings."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, module, *arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line]
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for name in named:
        assert str(name) in lines[0]
