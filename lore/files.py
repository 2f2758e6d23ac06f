"""Files: whole or not there at all, JSON, safetensors, pickles of others without running their code, checkpoints of trainings."""

import contextlib
import glob
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
from pathlib import Path

import safetensors.torch
import torch

from utils import InputError


@contextlib.contextmanager
def atomic_write(path):
    """Open `path` for writing bytes. The file appears under its name complete or not at all.
    Raises OSError that names `path` (disk full, read-only); the file that stood there before is then untouched."""
    path = Path(path)
    part = path.with_name(
        f".{path.name}.{os.getpid()}.{threading.get_ident()}.part"
    )  # others may write the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def replace_files_in(folder, replaces=()):
    """A folder to write files in, which move to `folder` once all are there: never do those of two runs stand mixed.
    replaces: patterns of names whose files in `folder` go when the new ones come."""
    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".new-*"):
        if (
            time.time() - left.stat().st_mtime > 3600
        ):  # of a run that was killed, not of one beside this
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as new:
        yield Path(new)
        names = [path.name for path in sorted(Path(new).iterdir())]
        for pattern in (*map(glob.escape, names), *replaces):
            for path in folder.glob(pattern):
                path.unlink()
        for name in names:
            os.replace(Path(new) / name, folder / name)


def check_writable(folder):
    """Create `folder` and prove that a file can be written there; raises OSError before any long work has begun."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        error.filename = str(folder)
        raise


def to_json(content, **options):
    """JSON of plain values, with arrays, numpy's numbers and ranges as lists and numbers."""
    return json.dumps(
        content, default=lambda v: v.tolist() if hasattr(v, "tolist") else list(v), **options
    )


def save_text(path, text):
    """Write a text file."""
    with atomic_write(path) as file:
        file.write(text.encode())


def save_json(path, content):
    """Write a dict as indented JSON."""
    save_text(path, to_json(content, indent=1) + "\n")


def load_json(path, *keys):
    """Read a JSON object. Raises InputError where the file is missing or damaged, or lacks one of `keys`."""
    with explain_damage(path, "JSON object"):
        content = json.loads(Path(path).read_text())
        return {**content, **{key: content[key] for key in keys}}


@contextlib.contextmanager
def explain_damage(path, kind, written_by="prepare.py"):
    """Within it, a file that is missing or damaged raises an InputError with the remedy."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run {written_by} first") from None
    except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path}: no whole {kind} ({reason}); write it again") from None


def save_tensors(path, tensors, **about):
    """Write a dict of tensors to a safetensors file, with `about` (JSON values) as its metadata entry of that name."""
    with atomic_write(path) as file:
        file.write(
            safetensors.torch.save(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                {"about": to_json(about)},
            )
        )  # one entry: several come in an order that varies


def load_tensors(path):
    """Read what `save_tensors` wrote -> (dict of tensors, dict). Raises InputError where the file is damaged."""
    with explain_damage(path, "safetensors file"), safetensors.safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, about


# Before torch 2.6 an archive could pass weights_only: there none is read, and none written.
ARCHIVES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
_LEGACY_MAGIC = pickle.dumps(
    0x1950A86A20F9469CFC6C, protocol=2
)  # how torch.save's files without an archive begin
_PLAIN_GLOBALS = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("__builtin__", "set"),
    ("_codecs", "encode"),
}


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that builds tensors and plain containers, and refuses every other global."""

    def find_class(self, module, name):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: _MemoryUnpickler(data).load()
        if (module, name) not in _PLAIN_GLOBALS:
            raise pickle.UnpicklingError(
                f"refused: it asks for {module}.{name}, and only tensors and plain "
                "containers are loaded"
            )
        return super().find_class(module, name)


class _MemoryUnpickler(pickle.Unpickler):
    """Of the memory of a tensor in a plain pickle, which torch.save has written without an archive: used where it lies,
    at the end of the data, as the unpickler keeps these until a file is read and a copy would be a second one."""

    def __init__(self, data):
        super().__init__(io.BytesIO(data))
        self.data = data

    def load(self):
        if not self.data.startswith(_LEGACY_MAGIC):
            raise pickle.UnpicklingError(
                "refused: a tensor whose memory is not in torch.save's format"
            )
        for _ in range(3):  # the magic number, the version, the system
            super().load()
        return super().load()

    def find_class(self, module, name):
        if module != "torch" or not name.endswith("Storage"):
            raise pickle.UnpicklingError(f"refused: a tensor's memory asks for {module}.{name}")
        return getattr(torch, name)

    def persistent_load(self, saved):
        _, storage, _, _, count, *_ = saved
        start, dtype = len(self.data) - count * storage._dtype.itemsize, storage._dtype
        with warnings.catch_warnings():  # the memory is of bytes that no one else holds
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            memory = (
                torch.frombuffer(self.data, dtype=dtype, count=count, offset=start)
                if count
                else torch.empty(0, dtype=dtype)
            )
        return torch.storage.TypedStorage(
            wrap_storage=memory.untyped_storage(), dtype=memory.dtype, _internal=True
        )


def load_pickle(path, written_by="prepare.py"):
    """Load a file of `pickle.dump` or `torch.save` without running code from it, tensors on the CPU.
    Accepts tensors and plain containers, so every file of the released scripts. An archive of torch.save goes to
    `torch.load(weights_only=True)` and to nothing else, and is refused on torch before 2.6, where that can be passed.
    written_by: the script named where the file is missing.
    Raises InputError: file missing, truncated, of another kind, or naming a global that could run code (it says which).
    """
    remedy = "do not trust this file, or, where it is yours, write it again as plain tensors, lists and dicts"
    with explain_damage(path, "file", written_by), open(path, "rb") as file:
        try:
            begin = file.read(len(_LEGACY_MAGIC))
            file.seek(0)
            if begin[:2] == b"PK" and not ARCHIVES:
                remedy = "load it with torch 2.6 or newer, or write it again here"
                raise pickle.UnpicklingError(
                    f"refused: an archive, through which torch {torch.__version__} may run code"
                )
            if begin[:2] == b"PK" or begin == _LEGACY_MAGIC:
                return torch.load(file, map_location="cpu", weights_only=True)
            return _PlainUnpickler(file).load()
        except Exception as error:  # a damaged pickle raises nearly anything
            found = re.search(
                r"[^\n.]*(refused|GLOBAL|class|TorchScript)[^\n]*?(?=\.\s|\n|$)", str(error)
            )
            if not found and "weights_only" not in str(error):
                remedy = "it is truncated or no pickle; write it again"
            reason = found[0] if found else (str(error) or type(error).__name__).split(". ")[0]
            raise InputError(f"{path}: {' '.join(reason.split())[:200]}; {remedy}") from None


def save_torch(path, content):
    """Write content as `torch.save` does."""
    with atomic_write(path) as file:
        memory = io.BytesIO()
        torch.save(content, memory, _use_new_zipfile_serialization=ARCHIVES)
        file.write(memory.getbuffer())


class TrainingCheckpoint:
    """The state of an unfinished training in a file, so that a run that is started again goes on from there."""

    def __init__(self, path):
        self.path = Path(path)

    def load(self, identity):
        """The state that `save` was given last with this identity; None if there is none, or it is damaged."""
        with contextlib.suppress(InputError):
            state = load_pickle(self.path)
            if isinstance(state, dict) and state.get("identity") == identity:
                return state
        return None

    def save(self, identity, state):
        """Replace the file. state: a dict of tensors and plain containers."""
        save_torch(self.path, {"identity": identity, **state})

    def clear(self):
        """Remove the file, if there is one."""
        self.path.unlink(missing_ok=True)


def digest_of(content):
    """SHA-256 of a JSON value, or of the file at a Path, as hex digits."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


CHECKPOINT_FILE, FEW_SHOT_CHECKPOINT_FILE = (
    ".training.pt",
    ".vary_fewshot.pt",
)  # beside results, until these are there
