"""Reading and writing files.

- A file appears whole or not at all, and files of one run appear together.
- A missing or damaged file is reported in one line that says what to do.
- A pickle from somebody else is read without running code from it.
- An unfinished training is kept in a file, so that a later run goes on from there.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

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

# What reading a damaged file raises. RecursionError: JSON that is nested too deeply.
READING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
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
        raise InputError(f"{path}: no such file; run {written_by} first") from None
    except READING_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: no whole {kind} ({reason}); write it again") from None


# ---- Text, JSON and digests


def save_text(path: Path | str, text: str) -> None:
    """Write a text file in UTF-8."""
    with atomic_write(path) as file:
        file.write(text.encode())


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


def load_json(path: Path | str, *keys: str) -> dict[str, Any]:
    """Read a JSON object that has at least these keys.

    Raises InputError: the file is missing, damaged or no JSON object, or lacks one of `keys`.
    """
    with explain_damage(path, "JSON object"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        for key in keys:
            if key not in content:
                raise ValueError(f"it has no {key!r}")
        return content


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


def load_tensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a safetensors file -> (tensors on the CPU by name, the metadata of `save_tensors`).

    Raises InputError: the file is missing or damaged.
    """
    with explain_damage(path, "safetensors file"), safetensors.safe_open(path, "pt") as file:
        entries = file.metadata() or {}
        metadata = json.loads(entries.get(METADATA_ENTRY, "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, metadata


# ---- Files of pickle.dump and torch.save
#
# A pickle is a program: it names functions ("globals") and calls them. `load_pickle` reads three
# kinds of files, and each has one loader that decides which globals may be called:
#
#   an archive of torch.save (a zip)       torch.load(weights_only=True), from torch 2.6 on
#   torch.save's format without archive    torch.load(weights_only=True)
#   a plain pickle                         _PlainUnpickler, and _StorageUnpickler for its tensors
#
# Nothing here looks into an archive: two crafted archives once showed a harmless content to the
# check and another one to the loader.

# Whether torch.save's archives are read and written. Before torch 2.6 an archive could run code in
# spite of weights_only. On such a torch no archive is read, and files are written in the format
# without archive.
ARCHIVES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)
ARCHIVE_MAGIC = b"PK"  # how every zip begins
LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how a file without archive begins

PLAIN_GLOBALS = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("__builtin__", "set"),  # Python 2's name, in pickles of old protocols
    ("_codecs", "encode"),  # bytes, in pickles of old protocols
}

# The sentence of an error's text that says what was refused. torch's texts have several sentences,
# and others of them say how to run the code all the same.
REFUSAL = re.compile(r"[^\n.]*(refused|GLOBAL|class|TorchScript)[^\n]*?(?=\.\s|\n|$)")


class _PlainUnpickler(pickle.Unpickler):
    """Reads a plain pickle: builds tensors and plain containers, and refuses every other global."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if (module, name) not in PLAIN_GLOBALS:
            raise pickle.UnpicklingError(
                f"refused: it asks for {module}.{name}, and only tensors and plain containers are "
                "loaded"
            )
        return super().find_class(module, name)


def _load_storage(data: bytes) -> torch.storage.TypedStorage:
    """Load the numbers of a tensor in a plain pickle, which are a file of torch's legacy format.

    Such a file is a sequence of pickles (magic number, version of the format, system, storage), and
    then the storage's bytes.
    """
    if not data.startswith(LEGACY_MAGIC):
        raise pickle.UnpicklingError("refused: a tensor whose memory is not in torch.save's format")
    unpickler = _StorageUnpickler(data)
    unpickler.load()  # the magic number
    unpickler.load()  # the version of the format
    unpickler.load()  # the system that wrote it
    return unpickler.load()


class _StorageUnpickler(pickle.Unpickler):
    """Reads a tensor's storage that is embedded in a plain pickle.

    The storage is a view of the pickled bytes. The unpickler of the whole file keeps these bytes in
    memory anyway until it is done, so a copy would double the peak.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.data = data

    def find_class(self, module: str, name: str) -> type:
        if module != "torch" or not name.endswith("Storage"):
            raise pickle.UnpicklingError(f"refused: a tensor's memory asks for {module}.{name}")
        return getattr(torch, name)

    def persistent_load(self, saved: tuple[Any, ...]) -> torch.storage.TypedStorage:
        # ("storage", its class, a key, the device, the count of numbers, ..). The numbers are the
        # end of the data. They are loaded on the CPU, whatever the device was.
        storage_class = saved[1]
        count = saved[4]
        dtype = storage_class._dtype
        if count == 0:
            numbers = torch.empty(0, dtype=dtype)
        else:
            start = len(self.data) - count * dtype.itemsize
            with warnings.catch_warnings():
                # Nobody else uses these bytes, so it does no harm if a tensor changes them.
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                numbers = torch.frombuffer(self.data, dtype=dtype, count=count, offset=start)
        return torch.storage.TypedStorage(
            wrap_storage=numbers.untyped_storage(), dtype=dtype, _internal=True
        )


def load_pickle(path: Path | str, written_by: str = "prepare.py") -> Any:
    """Load a file of `pickle.dump` or `torch.save` without running code from it.

    It may hold tensors, which are loaded on the CPU, and plain containers, so every file that the
    released scripts wrote can be read.
    written_by: the script to run if the file is missing.
    Raises InputError: the file is missing, truncated, of another kind, or names a global that could
    run code (the message says which); or it is an archive, and this torch is older than 2.6.
    """
    with explain_damage(path, "file", written_by), open(path, "rb") as file:
        beginning = file.read(len(LEGACY_MAGIC))
        file.seek(0)
        is_archive = beginning.startswith(ARCHIVE_MAGIC)
        if is_archive and not ARCHIVES:
            raise InputError(
                f"{path}: refused: an archive, through which torch {torch.__version__} may run "
                "code; load it with torch 2.6 or newer, or write it again here"
            )
        try:
            if is_archive or beginning == LEGACY_MAGIC:
                return torch.load(file, map_location="cpu", weights_only=True)
            return _PlainUnpickler(file).load()
        except Exception as error:  # a damaged pickle can raise nearly any class of errors
            raise InputError(f"{path}: {_reason_and_remedy(error)}") from None


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
