"""The demos, each run once a session in one copy of the tree; scripts in processes that start at once; small models.

`session` is a folder of the session's own, pytest's `tmp_path_factory.getbasetemp()`.
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
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from helpers import ROOT, call, copy_of_tree

import lore.embedding_files
import lore.reward_model
import lore.standin

REAL_TEXT = ROOT.parent / "shared" / "data"
EMBEDDINGS = {
    "RedditTLDR": ("tldr_embeddings_train.pkl", "tldr_embeddings_val.pkl"),
    "PRISM": ("train_embeddings.pkl", "test_embeddings.pkl"),
    "PersonalLLM": ("train.safetensors", "test.safetensors"),
}
FINAL = "Unseen User Unseen Prompts"

# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------

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
sys.path[:] = [job["folder"], *(path for path in sys.path if not path.startswith(job["root"]))]
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
def forks():
    """Starts processes that have the libraries already and one thread each: a script's run takes a second or two."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("MPLBACKEND", raising=False)
        forkserver.ensure_running()
    return context


@dataclasses.dataclass
class Started:
    """A script in a process of its own."""

    process: multiprocessing.Process
    output: Path

    @property
    def pid(self):
        return self.process.pid

    def running(self):
        return self.process.is_alive()

    def kill(self):
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.output)

    def outcome(self, timeout=240):
        """(exit status, stdout, stderr)"""
        self.process.join(timeout)
        assert self.process.exitcode is not None
        texts = [(self.output / name).read_text() for name in ("out", "err")]
        shutil.rmtree(self.output)
        return self.process.exitcode, *texts


def start_code(code, folder, *arguments, cwd="/", environment=None, largest_file=None, **job):
    """Run Python code with `folder` first on its path -> Started. largest_file: bytes, a disk that is full behind."""
    output = Path(tempfile.mkdtemp(prefix="lore-test-"))
    job.update(
        code=code,
        folder=str(folder),
        root=str(ROOT),
        arguments=list(map(str, arguments)),
        cwd=str(cwd),
        environment=environment or {},
        largest_file=largest_file,
        output=str(output),
    )
    process = forks().Process(target=exec, args=(CHILD, {"job": job}))
    process.start()
    return Started(process, output)


def start(folder, name, *arguments, environment=None, largest_file=None, **constants):
    """Run a script of `folder` with other constants, as `python name.py arguments` -> Started."""
    return start_code(
        SCRIPT,
        folder,
        *arguments,
        environment=environment,
        largest_file=largest_file,
        name=name,
        constants=constants,
    )


def printed(started):
    """What a script has printed at its end; it must have succeeded."""
    status, out, err = started.outcome()
    assert status == 0, out + err
    return out


def two_processes(folder, name, *arguments, **constants):
    """The script in two processes that find each other as torchrun's do -> what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    started = [
        start(
            folder,
            name,
            *arguments,
            **constants,
            environment={**environment, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    return [printed(process) for process in started]


# ---------------------------------------------------------------------------------------------------------------------
# The demos
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Demo:
    """A data set's folder in which prepare.py --demo and train_basis.py ran."""

    folder: Path
    printed: dict  # script -> what it printed

    @property
    def model(self):
        return self.folder / ".standin"

    @property
    def data(self):
        return self.folder / "demo"

    @property
    def results(self):
        return results_in(self.folder)

    @property
    def files(self):
        return (*EMBEDDINGS[self.folder.name], lore.embedding_files.HEAD_FILE)

    def copy_to(self, folder):
        """Copy the embeddings and the head (and PRISM's split) to a folder, to be spoilt."""
        folder.mkdir(exist_ok=True)
        for name in self.files:
            shutil.copy(self.folder / name, folder)
        if (self.folder / "data").exists():
            shutil.copytree(self.folder / "data", folder / "data")
        return folder


@functools.cache
def tree(session):
    """A copy of the product, without tests/ and without anything that a script wrote."""
    root = session / "tree" / "LoRe"
    root.mkdir(parents=True)
    return copy_of_tree(root)


@functools.cache
def demo(data_set, session):
    """The demo of a data set, run once a session -> Demo."""
    folder = tree(session) / data_set
    names = {"prepare": ["--demo"], "generate-prism-embeddings": [], "train_basis": []}
    if data_set != "PRISM":
        del names["generate-prism-embeddings"]
    return Demo(
        folder,
        {name: printed(start(folder, name, *arguments)) for name, arguments in names.items()},
    )


def build_model(folder, data_set="RedditTLDR", **sizes):
    """The stand-in reward model, its tokenizer trained on a demo's texts -> its folder."""
    texts = [
        json.dumps(row)
        for path in sorted((ROOT / data_set / "demo").glob("*.gz"))
        for row in rows_in(path)
    ]
    lore.standin.build_standin_model(folder, texts, **sizes)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def rows_in(path):
    """The rows of a JSON lines file, packed or not."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in content.decode().splitlines()]


def write_rows(path, rows):
    """Write rows as JSON lines -> path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def content_of(folder):
    """What stands in a folder, below it too: relative path -> bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def plain(content):
    """Tensors and containers as lists and dicts that can be compared."""
    if isinstance(content, torch.Tensor):
        return content.dtype, content.tolist()
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    return list(map(plain, content)) if isinstance(content, (list, tuple)) else content


def closing_table(printed):
    """The means in the table that train_basis.py ends with: "ref" or a rank -> one per setting."""
    rows = (re.match(r" *(ref|\d+) +\S+ +(?=\d\.\d{3} \[)", line) for line in printed.splitlines())
    return {
        row[1]: [float(mean) for mean in re.findall(r"(\d\.\d{3}) \[", row.string)]
        for row in rows
        if row
    }


def results_in(folder):
    return json.loads((folder / "results" / "results.json").read_text())


def serve_hub(monkeypatch, **splits):
    """Let `datasets` serve these rows (a list a split) for every data set; nothing at all without any."""

    def load_dataset(name, **options):
        if not splits:
            raise ConnectionError("no route to the hub")
        return splits

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


# ---------------------------------------------------------------------------------------------------------------------
# Scripts in this process
# ---------------------------------------------------------------------------------------------------------------------


def quick(monkeypatch, script, **constants):
    """Set constants of a script, which must be there -> the script."""
    for name, value in constants.items():
        assert hasattr(script, name), name
        monkeypatch.setattr(script, name, value)
    return script


def without_forward(monkeypatch):
    """Let scripts load a model that cannot embed, so that each embedding must come from the cache."""
    load = lore.reward_model.load_reward_model

    def loaded(*arguments, **options):
        model, tokenizer = load(*arguments, **options)
        model.forward = None
        return model, tokenizer

    monkeypatch.setattr(
        lore.reward_model, "load_reward_model", loaded
    )  # where a script that is loaded now looks
    monkeypatch.setattr(lore.embedding, "load_reward_model", loaded)


def interrupted(monkeypatch, capsys, script, *arguments):
    """The script ends with status 130 and one line that says how to go on."""
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, script, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 130 and line.startswith("error: ") and "resume" in line


def state_alone(model, tokenizer, messages):
    """The last token's state of one conversation, computed alone, float32 `[d]`."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state[0, -1].float()
