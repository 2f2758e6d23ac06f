"""The demos, each run once a session; scripts in processes of their own; small models.

`session` is a folder that belongs to the session: pytest's `tmp_path_factory.getbasetemp()`.
"""

import dataclasses
import functools
import gzip
import json
import multiprocessing
import re
import shutil
import socket
import sys
import tempfile
import types
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import call, copy_of_tree
from layout import ROOT, paths_of_others

import lore.embedding
import lore.embedding_files
import lore.reward_model
import lore.standin

REAL_TEXT = ROOT.parent / "shared" / "data"  # the developers alone have it
EMBEDDINGS = {  # folder of a data set -> the files of embeddings that it writes
    "RedditTLDR": ("tldr_embeddings_train.pkl", "tldr_embeddings_val.pkl"),
    "PRISM": ("train_embeddings.pkl", "test_embeddings.pkl"),
    "PersonalLLM": ("train.safetensors", "test.safetensors"),
    "OwnData": ("embeddings.safetensors", "pairs.parquet", "users.parquet"),
}
FINAL = "Unseen User Unseen Prompts"

# ---- Processes
#
# A script's process is forked from a server that has imported the libraries, so that it takes a
# second or two, and not ten. It runs CHILD; `job` is a dict that `start_code` makes.

LIBRARIES = [
    "torch",
    "torch.distributed",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "numba",
    "pandas",
    "pydantic",
    "pyarrow.parquet",
    "safetensors.torch",
    "tokenizers",
]

CHILD = """
import os, resource, sys
os.environ.update(job["environment"])
os.chdir(job["cwd"])
for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{job['output']}/{name}", os.O_WRONLY | os.O_CREAT), number)
if job["largest_file"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
sys.path[:] = job["path"]
sys.argv = ["script.py", *job["arguments"]]
exec(job["code"], {"__name__": "code", "job": job})
"""

SCRIPT = """
import importlib
script = importlib.import_module(job["name"])
for name, value in job["constants"].items():
    assert hasattr(script, name)
    setattr(script, name, value)
script.run_script(script.main)
"""


@functools.cache
def fork_server() -> ForkServerContext:
    """Starts processes that have the libraries already, and one thread each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("MPLBACKEND", raising=False)
        forkserver.ensure_running()
    return context


@dataclasses.dataclass
class Started:
    """A script in a process of its own. output: the folder of what it prints."""

    process: multiprocessing.Process
    output: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.output)

    def outcome(self, timeout: float = 240) -> tuple[int, str, str]:
        """(exit status, stdout, stderr), once it has ended."""
        self.process.join(timeout)
        assert self.process.exitcode is not None
        out, err = ((self.output / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self.output)
        return self.process.exitcode, out, err


def start_code(
    code: str,
    folder: Path,
    *arguments: Any,
    cwd: Path | str = "/",
    environment: dict[str, str] | None = None,
    largest_file: int | None = None,
    **job: Any,
) -> Started:
    """Run Python code with `folder` first on its path; nothing else of ours is on the path.

    largest_file: bytes; writing a longer file fails, as on a full disk.
    job: further values that the code finds in its `job`.
    """
    output = Path(tempfile.mkdtemp(prefix="lore-test-"))
    job.update(
        code=code,
        path=[str(folder), *paths_of_others(sys.path)],
        arguments=[str(argument) for argument in arguments],
        cwd=str(cwd),
        environment=environment or {},
        largest_file=largest_file,
        output=str(output),
    )
    process = fork_server().Process(target=exec, args=(CHILD, {"job": job}))
    process.start()
    return Started(process, output)


def start(
    folder: Path,
    name: str,
    *arguments: Any,
    environment: dict[str, str] | None = None,
    largest_file: int | None = None,
    **constants: Any,
) -> Started:
    """Run a script of `folder` with other constants, as `python name.py arguments` does."""
    return start_code(
        SCRIPT,
        folder,
        *arguments,
        environment=environment,
        largest_file=largest_file,
        name=name,
        constants=constants,
    )


def printed(started: Started) -> str:
    """What a script has printed when it ends; it must succeed."""
    status, out, err = started.outcome()
    assert status == 0, out + err
    return out


def two_processes(folder: Path, name: str, *arguments: Any, **constants: Any) -> list[str]:
    """Run a script in two processes that find each other as torchrun's do -> what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    started = []
    for rank in ("0", "1"):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        started.append(start(folder, name, *arguments, environment=environment, **constants))
    return [printed(process) for process in started]


# ---- The demos


@dataclasses.dataclass(frozen=True)
class Demo:
    """A data set's folder in which prepare.py --demo and train_basis.py have run."""

    folder: Path
    printed: dict[str, str]  # script -> what it printed

    @property
    def model(self) -> Path:
        return self.folder / ".standin"

    @property
    def data(self) -> Path:
        return self.folder / "demo"

    @property
    def results(self) -> dict[str, Any]:
        return results_in(self.folder)

    @property
    def files(self) -> tuple[str, ...]:
        """The files of embeddings, and what else lies beside them and belongs to them."""
        beside = [lore.embedding_files.HEAD_FILE, "texts.parquet"]
        return (*EMBEDDINGS[self.folder.name], *(f for f in beside if (self.folder / f).exists()))

    def copy_to(self, folder: Path) -> Path:
        """Copy the embeddings and the head (and PRISM's split) to a folder, to be damaged there."""
        folder.mkdir(exist_ok=True)
        for name in self.files:
            shutil.copy(self.folder / name, folder)
        if (self.folder / "data").exists():
            shutil.copytree(self.folder / "data", folder / "data")
        return folder


@functools.cache
def tree(session: Path) -> Path:
    """The root of a copy of the product, without tests and without anything that a script wrote."""
    return copy_of_tree(session / "tree" / "LoRe")


@functools.cache
def demo(data_set: str, session: Path) -> Demo:
    """The demo of a data set, run once a session."""
    scripts = {"prepare": ["--demo"]}  # name -> arguments
    if data_set == "PRISM":
        scripts["generate-prism-embeddings"] = []
    scripts["train_basis"] = []
    folder = tree(session) / data_set
    outputs = {}
    for name, arguments in scripts.items():
        outputs[name] = printed(start(folder, name, *arguments))
    return Demo(folder, outputs)


def build_model(folder: Path, data_set: str = "RedditTLDR", **sizes: int) -> Path:
    """Write the stand-in reward model, with a tokenizer trained on a demo's texts, to `folder`."""
    texts = []
    for path in sorted((ROOT / data_set / "demo").glob("*.gz")):
        texts += [json.dumps(row) for row in rows_in(path)]
    lore.standin.build_standin_model(folder, texts, **sizes)
    return folder


# ---- Files


def rows_in(path: Path) -> list[Any]:
    """The rows of a JSON lines file, gzipped or not."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    return [json.loads(line) for line in content.decode().splitlines()]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows as JSON lines -> path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def content_of(folder: Path) -> dict[str, bytes]:
    """All files in a folder and below it: relative path -> bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def plain(content: Any) -> Any:
    """Tensors and containers as lists and dicts, which `==` compares."""
    if isinstance(content, torch.Tensor):
        return content.dtype, content.tolist()
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return content


def closing_table(text: str) -> dict[str, list[float]]:
    """The means in the table that train_basis.py ends with: "ref" or a rank -> one per setting."""
    means = {}
    for line in text.splitlines():
        row = re.match(r" *(ref|\d+) +\S+ +(?=\d\.\d{3} \[)", line)
        if row:
            means[row[1]] = [float(mean) for mean in re.findall(r"(\d\.\d{3}) \[", line)]
    return means


def results_in(folder: Path) -> dict[str, Any]:
    """What train_basis.py wrote to results.json."""
    return json.loads((folder / "results" / "results.json").read_text())


def serve_hub(monkeypatch: pytest.MonkeyPatch, **splits: list[Any]) -> None:
    """Let `datasets` serve these splits (lists of rows) for every data set; none: it is offline."""

    def load_dataset(name, **options):
        if not splits:
            raise ConnectionError("no route to the hub")
        return splits

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


# ---- Scripts in this process


def quick(monkeypatch: pytest.MonkeyPatch, script: ModuleType, **constants: Any) -> ModuleType:
    """Set constants of a script, which must exist -> the script."""
    for name, value in constants.items():
        assert hasattr(script, name), name
        monkeypatch.setattr(script, name, value)
    return script


def without_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scripts load a model that cannot embed, so that embeddings must come from the cache."""
    load = lore.reward_model.load_reward_model

    def loaded(*arguments, **options):
        model, tokenizer = load(*arguments, **options)
        model.forward = None
        return model, tokenizer

    # A script that is loaded later takes it from lore.reward_model; lore.embedding has it already.
    monkeypatch.setattr(lore.reward_model, "load_reward_model", loaded)
    monkeypatch.setattr(lore.embedding, "load_reward_model", loaded)


def interrupted(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    script: ModuleType,
    *arguments: Any,
) -> None:
    """The script ends with status 130 and one line that says how to go on."""
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, script, *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 130
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "resume" in lines[0]


def state_alone(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> torch.Tensor:
    """The last token's state of one conversation, computed alone, float32 `[d]`."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        states = model(input_ids=ids).last_hidden_state  # (1, length, d)
    return states[0, -1].float()
