"""What several test files share: users to train on, expected errors, code in a fresh process."""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from layout import DATA_SETS, ROOT, product_files

import lore.embedding_files
import lore.files
import lore.scripts
import utils

# ---- Users


def random_users(
    counts: Sequence[int], d: int, seed: int = 0, scale: float = 30.0
) -> list[torch.Tensor]:
    """One float32 `[m_i, d]` per user, each in memory of its own.

    A user's pairs lean towards a direction of the user's own, so there is something to learn. The
    default scale gives margins / 100 at which the sigmoid bends.
    """
    generator = torch.Generator().manual_seed(seed)
    users = []
    for m in counts:
        noise = torch.randn(m, d, generator=generator)
        direction = torch.randn(d, generator=generator)
        users.append(scale * (noise + 0.5 * direction))
    return users


def planted_basis(d: int, K: int, seed: int = 0, length: float = 300.0) -> torch.Tensor:
    """K orthogonal directions of the given length, `[d, K]`."""
    generator = torch.Generator().manual_seed(seed)
    return length * torch.linalg.qr(torch.randn(d, K, generator=generator)).Q


def planted_weights(N: int, K: int, concentration: float = 0.2, seed: int = 0) -> torch.Tensor:
    """N mixtures over K directions, draws from a Dirichlet distribution, `[N, K]`."""
    draws = np.random.default_rng(seed).dirichlet([concentration] * K, N)
    return torch.tensor(draws, dtype=torch.float32)


def planted_pairs(
    V: torch.Tensor, W: torch.Tensor, pairs: int, seed: int = 0, sampled: bool = False
) -> list[torch.Tensor]:
    """Pairs `[pairs, d]` of each user, whose choices follow V and that user's row of W.

    The answer with the larger margin wins; if `sampled`, with the probability of Bradley-Terry.
    """
    generator = torch.Generator().manual_seed(seed)
    features = []
    for w in W:
        X = torch.randn(pairs, len(V), generator=generator)
        margins = X @ V @ w
        if sampled:
            wins = torch.rand(pairs, generator=generator) < torch.sigmoid(margins / 100)
        else:
            wins = margins > 0
        features.append(torch.where(wins[:, None], X, -X))
    return features


# ---- What the installed versions can do


def safetensors_writes(dtype: torch.dtype) -> bool:
    """Whether safetensors writes tensors of this type; old versions write no complex numbers."""
    try:
        safetensors.torch.save({"tensor": torch.ones(1, dtype=dtype)})
    except KeyError:
        return False
    return True


writes_complex = pytest.mark.skipif(
    not safetensors_writes(torch.complex64), reason="this safetensors writes no complex numbers"
)


# ---- Expected errors


@contextlib.contextmanager
def input_error(*named: str) -> Iterator[Callable[[], str]]:
    """The block raises an InputError of one line that contains each of the strings.

    Yields a function that gives the line, once the block has ended.
    """
    with pytest.raises(utils.InputError) as caught:
        yield lambda: str(caught.value)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for name in named:
        assert name in message


def refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    module: ModuleType,
    arguments: Sequence[Any],
    *named: Any,
) -> None:
    """The script ends with status 2 and one line on stderr that contains each of the strings."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, module, *arguments)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "it/s" not in line]  # without progress bars
    assert stop.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for name in named:
        assert str(name) in lines[0]


# ---- Scripts in this process


def load_script(folder: str, name: str) -> ModuleType:
    """A fresh module of a script in a folder of the repository; a test can set its constants."""
    script_folder = str(ROOT / folder)
    if script_folder not in sys.path:  # the script does `import tldr`
        sys.path.insert(0, script_folder)
    spec = importlib.util.spec_from_file_location(
        f"{folder}_{name}".replace("-", "_"), ROOT / folder / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *arguments: Any) -> None:
    """Call a script's main with a command line, as `python script.py` does."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    lore.scripts.run_script(module.main)


# ---- Code in a process of its own


def fresh_process(code: str, *arguments: Any, **environment: str) -> subprocess.Popen:
    """Start `python -c code arguments` outside the repository, with its root on the path."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        text=True,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def outcome(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a process, once it has ended."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


# ---- Files


def sign_again(folder: Path) -> None:
    """Write new digests of the embeddings in `folder`, which a test has changed, to the head file.

    So a script sees what was changed in them, and does not just see that they are other files.
    """
    head = folder / lore.embedding_files.HEAD_FILE
    if not head.exists():
        return
    tensors, about = lore.files.load_tensors(head)
    about["files"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in about["files"]
    }
    lore.files.save_tensors(head, tensors, **about)


def copy_of_tree(target: Path, root: Path = ROOT) -> Path:
    """Copy the product's code and the demos' data to `target`, and nothing that lies beside it."""
    for path in [*product_files(root), *(root / "lore").glob("*.jinja")]:
        copy = target / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name in DATA_SETS:
        shutil.copytree(root / name / "demo", target / name / "demo")
    return target
