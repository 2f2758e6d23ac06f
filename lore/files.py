"""Reading and writing files.

- A file appears whole or not at all, and files of one run appear together.
- A missing or damaged file is reported in one printable line that says what to do.
- A pickle from somebody else is read without running code from it, and without changing anything
  in the process.
- An unfinished training is kept in a file, so that a later run goes on from there.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pydantic
import safetensors.torch
import torch

from lore.pickles import LEGACY_MAGIC, load_plain_pickle
from utils import InputError

# Checkpoints of unfinished trainings. They lie where the results will be written.
CHECKPOINT_FILE = ".training.pt"
FEW_SHOT_CHECKPOINT_FILE = ".vary_fewshot.pt"

# Temporary folders of `replace_files_in` begin with NEW_FILES. One that has not changed for
# ABANDONED_SECONDS belongs to a run that was killed; a younger one may be in use by another run.
NEW_FILES = ".new-"
ABANDONED_SECONDS = 3600

# ---- Writing whole files


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes. The file appears complete under its name, or not at all.

    The bytes go to a hidden file beside `path`, which is renamed at the end. If the block fails,
    the hidden file is removed, and an older file at `path` stays as it was.
    Creates missing folders. Raises OSError that names a file: disk full, read-only.
    """
    path = Path(path)
    # Another process or thread may write the same file at the same time, so each has its own name.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replace_files_in(folder: Path | str, replaces: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder. On success all its files are moved into `folder`.

    So `folder` never mixes files of two runs. If the block fails, `folder` stays as it was.
    replaces: patterns of names, such as "K_*.safetensors"; files in `folder` that match one are
    removed before the new files arrive.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_folders(folder)
    with tempfile.TemporaryDirectory(prefix=NEW_FILES, dir=folder) as temporary:
        yield Path(temporary)
        new = sorted(Path(temporary).iterdir())
        old = [folder / path.name for path in new]
        for pattern in replaces:
            old += folder.glob(pattern)
        # All old files go before the first new one arrives: a run that is killed here leaves some
        # files missing, which is noticed, instead of files that do not belong together.
        for path in old:
            path.unlink(missing_ok=True)
        for path in new:
            os.replace(path, folder / path.name)


def _remove_abandoned_folders(folder: Path) -> None:
    """Remove temporary folders that killed runs of `replace_files_in` left in `folder`."""
    for path in folder.glob(f"{NEW_FILES}*"):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(path)


def check_writable(folder: Path | str) -> None:
    """Create `folder` and check that files can be written there, before any long work begins.

    Raises OSError that names `folder`.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        error.filename = str(folder)
        raise


# ---- Damaged files


def printable(text: object) -> str:
    """The text in one line, with an escape such as \\x1b for every character that cannot be seen.

    A name from a file may hold anything: with control characters it could hide on a terminal the
    line in which it is refused, and half of a surrogate pair cannot be printed at all.
    """
    return "".join(c if c.isprintable() else escape(c) for c in str(text))


def escape(character: str) -> str:
    r"""The character as Python writes it in a string, such as \n, \x1b or \u4f60."""
    return character.encode("unicode_escape").decode()


# What reading a damaged file raises. RecursionError: JSON that is nested too deeply.
# AttributeError: a number format of safetensors that this torch lacks.
READING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    safetensors.SafetensorError,
)


@contextlib.contextmanager
def explain_damage(path: Path | str, kind: str, written_by: str = "prepare.py") -> Iterator[None]:
    """While active, an error from reading `path` becomes an InputError that says what to do.

    kind: what the file should be, such as "JSON object".
    written_by: the script to run if the file is missing.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(printable(f"{path}: no such file; run {written_by} first")) from None
    except READING_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        message = f"{path}: no whole {kind} ({reason}); write it again"
        raise InputError(printable(message)) from None


# ---- Text, JSON and digests


def save_text(path: Path | str, text: str) -> None:
    """Write a text file in UTF-8. Half of a surrogate pair, which has no UTF-8, is escaped."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def to_json(content: Any, **options: Any) -> str:
    """JSON of `content`, in which arrays, tensors, ranges and numpy's numbers are plain values.

    options: passed on to `json.dumps`.
    """
    return json.dumps(content, default=_as_plain_value, **options)


def _as_plain_value(value: Any) -> Any:
    """A list or number instead of an object that JSON does not know."""
    if hasattr(value, "tolist"):  # an array, a tensor, or one of numpy's numbers
        return value.tolist()
    return list(value)


def save_json(path: Path | str, content: dict[str, Any]) -> None:
    """Write a dict as indented JSON."""
    save_text(path, to_json(content, indent=1) + "\n")


# How deep lists and objects in JSON may be nested. What we and others write is not nested nearly so
# deep. What is nested about 1000 deep can be read, but not be written again into our results.
MOST_JSON_DEPTH = 100

Type = Any  # an annotation, such as `str | None` or `dict[str, list[int]]`


def load_json(path: Path | str, *keys: str, **types: Type) -> dict[str, Any]:
    """Read a JSON object that has at least these keys.

    types: key -> the type of its value, if it has one, such as `files=dict[str, str]`.
    Raises InputError: the file is missing, damaged or no JSON object, is nested more than
    MOST_JSON_DEPTH deep, or lacks one of `keys`; a value is of another type.
    """
    with explain_damage(path, "JSON object"):
        content = parse_json_object(Path(path).read_text(encoding="utf-8"), **types)
        for key in keys:
            if key not in content:
                raise ValueError(f"it has no {key!r}")
        return content


def parse_json_object(text: str, **types: Type) -> dict[str, Any]:
    """The JSON object in a text; types: see `load_json`.

    All JSON that says something about a file, a model or a run is read by this function.
    Raises ValueError, TypeError or RecursionError: no JSON object, nested more than MOST_JSON_DEPTH
    deep, or not of these types.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}")

    containers = [content]  # those of one depth
    for _ in range(MOST_JSON_DEPTH):
        inner = []
        for container in containers:
            values = container.values() if isinstance(container, dict) else container
            inner += [value for value in values if isinstance(value, (dict, list))]
        containers = inner
    if containers:
        raise ValueError(f"it is nested more than {MOST_JSON_DEPTH} deep")

    _check_types(content, types)
    return content


def _check_types(content: dict[str, Any], types: dict[str, Type]) -> None:
    """Raise TypeError if a value is not of its type; types: see `load_json`."""
    for key, expected in types.items():
        if key not in content:
            continue
        try:
            pydantic.TypeAdapter(expected).validate_python(content[key], strict=True)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, (key, *problem["loc"])))
            kind = type(problem["input"]).__name__
            raise TypeError(f"its {place!r:.100} is a {kind}") from None


def digest_of(content: Any) -> str:
    """SHA-256, in hex digits, of the file at a Path, or of a JSON value."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# ---- Tensors in safetensors files

METADATA_ENTRY = "about"


def save_tensors(path: Path | str, tensors: dict[str, torch.Tensor], **metadata: Any) -> None:
    """Write tensors of any shape and dtype to a safetensors file, with metadata (JSON values).

    All metadata are one entry of the file's metadata. safetensors writes several entries in an
    order that varies, and equal content must give equal bytes.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(on_cpu, {METADATA_ENTRY: to_json(metadata)}))


def load_tensors(path: Path | str, **types: Type) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a safetensors file -> (tensors on the CPU by name, the metadata of `save_tensors`).

    types: key of the metadata -> the type of its value, if it has one.
    Raises InputError: the file is missing or damaged; its metadata are no JSON object, are nested
    more than MOST_JSON_DEPTH deep, or have a value of another type.
    """
    with explain_damage(path, "safetensors file"), safetensors.safe_open(path, "pt") as file:
        entries = file.metadata() or {}
        metadata = parse_json_object(entries.get(METADATA_ENTRY, "{}"), **types)
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, metadata


# ---- Files of pickle.dump and torch.save
#
# A pickle is a program: it names functions ("globals") and calls them. `load_pickle` reads three
# kinds of files, and each has one loader that decides which globals may be called:
#
#   an archive of torch.save (a zip)       torch.load(weights_only=True), from torch 2.6 on
#   torch.save's format without archive    torch.load(weights_only=True)
#   a plain pickle                         lore.pickles.load_plain_pickle
#
# Nothing here looks into an archive: two crafted archives once showed a harmless content to the
# check and another one to the loader.

# Whether torch.save's archives are read and written. Before torch 2.6 an archive could run code in
# spite of weights_only. On such a torch no archive is read, and files are written in the format
# without archive.
ARCHIVES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)
ARCHIVE_MAGIC = b"PK"  # how every zip begins

# The sentence of an error's text that says what was refused. torch's texts have several sentences,
# and others of them say how to run the code all the same.
REFUSAL = re.compile(r"[^\n.]*(refused|GLOBAL|class|TorchScript)[^\n]*?(?=\.\s|\n|$)")


def load_pickle(path: Path | str, written_by: str = "prepare.py") -> Any:
    """Load a file of `pickle.dump` or `torch.save` without running code from it.

    It may hold tensors, which are loaded on the CPU, and plain containers, so every file that the
    released scripts wrote can be read. Nothing in the process is changed by loading it.
    A plain pickle takes time and memory in proportion to its size. Of a file of `torch.save`, which
    torch loads, this is not known: with tuples in tuples as a key it can keep torch busy for ever.
    written_by: the script to run if the file is missing.
    Raises InputError: the file is missing, truncated, of another kind, or names a global that could
    run code (the message says which); or it is an archive, and this torch is older than 2.6.
    """
    with explain_damage(path, "file", written_by), open(path, "rb") as file:
        beginning = file.read(len(LEGACY_MAGIC))
        file.seek(0)
        is_archive = beginning.startswith(ARCHIVE_MAGIC)
        if is_archive and not ARCHIVES:
            message = (
                f"{path}: refused: an archive, through which torch {torch.__version__} may run "
                "code; load it with torch 2.6 or newer, or write it again here"
            )
            raise InputError(printable(message))
        try:
            if is_archive or beginning == LEGACY_MAGIC:
                return torch.load(file, map_location="cpu", weights_only=True)
            return load_plain_pickle(file)
        except Exception as error:  # a damaged pickle can raise nearly any class of errors
            raise InputError(printable(f"{path}: {_reason_and_remedy(error)}")) from None


def _reason_and_remedy(error: Exception) -> str:
    """Say in one line why a pickle was not loaded, and what to do."""
    text = str(error)
    refusal = REFUSAL.search(text)
    if refusal:
        reason = refusal[0]
    else:
        first_sentence = text.split(". ")[0]
        reason = first_sentence or type(error).__name__
    if refusal or "weights_only" in text:
        remedy = (
            "do not trust this file; if it is yours, write it again as plain tensors, lists and "
            "dicts"
        )
    else:
        remedy = "it is truncated or no pickle; write it again"
    one_line = " ".join(reason.split())
    return f"{one_line[:200]}; {remedy}"


def save_torch(path: Path | str, content: Any) -> None:
    """Write tensors and plain containers as `torch.save` does."""
    # torch.save reports a full disk as a RuntimeError, so it writes to memory, and we to the disk.
    memory = io.BytesIO()
    torch.save(content, memory, _use_new_zipfile_serialization=ARCHIVES)
    with atomic_write(path) as file:
        file.write(memory.getbuffer())


# ---- Checkpoints


class TrainingCheckpoint:
    """The state of an unfinished training in a file, from which a later run goes on.

    identity: what tells one training from another, such as a digest of its data and settings.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def load(self, identity: Any) -> dict[str, Any] | None:
        """The state last saved with this identity; None if there is none, or it is damaged."""
        try:
            state = load_pickle(self.path)
        except InputError:
            return None
        if isinstance(state, dict) and state.get("identity") == identity:
            return state
        return None

    def save(self, identity: Any, state: dict[str, Any]) -> None:
        """Replace the file. state: tensors and plain containers by name."""
        save_torch(self.path, {"identity": identity, **state})

    def clear(self) -> None:
        """Remove the file, if there is one."""
        self.path.unlink(missing_ok=True)
