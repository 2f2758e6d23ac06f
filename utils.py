"""LoRe: low-rank reward modelling for personalised language models (arXiv 2504.14439).

What the scripts of the three data sets share, in six parts, each using only those above it:

    1. Reward model and embedding      phi(prompt, response), one vector a conversation
    2. Preference data                 pairs, shots, simulated users
    3. The models                      LoRe, LoRe_regularized, PersonalizeBatch over one training engine
    4. Evaluation                      accuracies of personalised rewards
    5. Pipelines                       run, run_regularized, run_few_shot_vary_shots
    6. Results and plots               JSON, safetensors, figures

In formulas: x = phi(chosen) - phi(rejected) is a preference pair of user i, V (d x K) the shared reward basis,
w_i = softmax(W_i) that user's weights, m = x V w_i the margin, and P(chosen beats rejected) = sigmoid(m / 100).
"""

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits
from torch.nn.functional import embedding_bag, logsigmoid
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Errors, files, processes: what every part needs
# ---------------------------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """Input that cannot be used; its message is one line that says what, where and the remedy."""


def is_whole(value, least=0):
    """Whether a setting is a whole number from `least`, and below 2^32 as numpy's seeds must be."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value < 2**32


def check_whole(name, value, least=1):
    """Raise InputError unless a setting is a whole number from `least`, below 2^32."""
    if not is_whole(value, least):
        raise InputError(f"{name} = {value!r}: give a whole number from {least}, below 2^32")


def is_number(value, least, most):
    """Whether a setting is a number from `least` to `most`."""
    return isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most


def check_list(name, values):
    """Raise InputError unless a setting is a list of one or more values."""
    if not isinstance(values, (list, tuple, range, np.ndarray)) or len(values) == 0:
        raise InputError(f"{name} = {values!r}: give a list of one value or more")


def check_seeds(seed, name="seed"):
    """One seed or several as a list of int; raises InputError unless they are distinct whole numbers from 0."""
    seeds = list(seed) if isinstance(seed, (list, tuple, range, np.ndarray)) else [seed]
    if not seeds or not all(map(is_whole, seeds)) or len(set(seeds)) < len(seeds):
        raise InputError(f"{name} = {seed!r}: give a whole number from 0, or a list of several")
    return [int(s) for s in seeds]


def _no_such_file(path, written_by="prepare.py"):
    """The InputError of a file that an earlier step should have written."""
    return InputError(f"{path}: no such file; run {written_by} first")


class _Output:
    """Standard output that its reader may close (`| head`): the script goes on in silence and finishes its work."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _unless_closed(self, action, *arguments):
        try:
            return action(*arguments)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except OSError as error:
            error.filename = "standard output"
            raise

    def write(self, text):
        return self._unless_closed(self.stream.write, text)

    def flush(self):
        self._unless_closed(self.stream.flush)


def run_script(main):
    """Call a script's main(). What the reader can mend ends in one line on stderr and exit status 2.

    Under torchrun only the first process prints.
    """
    if process_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        with contextlib.redirect_stdout(_Output(sys.stdout)):
            main()
            sys.stdout.flush()
        return
    except InputError as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted: finished files and embeddings are kept, run the same command again to resume"
    except (MemoryError, RuntimeError) as error:
        of_gpu = isinstance(error, torch.cuda.OutOfMemoryError)
        if not of_gpu and not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        message = (f"the {'GPU' if of_gpu else 'machine'}'s memory is full ({error}); free it, or lower the sizes at "
                   "the top of the script")
    except OSError as error:
        message = f"{error.filename or 'a file'}: {error.strerror or error}; free or choose another place and run again"
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def atomic_write(path):
    """Open `path` for writing bytes. The file appears under its name complete or not at all.

    Raises OSError (disk full, read-only); the file that stood there before is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        with contextlib.suppress(OSError):
            part.unlink()
        raise


@contextlib.contextmanager
def together(folder):
    """A folder to write files in, which move to `folder` once all are there: never do those of two runs stand mixed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".new-*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as new:
        yield Path(new)
        paths = sorted(Path(new).iterdir())
        for path in paths:
            (folder / path.name).unlink(missing_ok=True)
        for path in paths:
            os.replace(path, folder / path.name)


def check_writable(folder):
    """Create `folder` and prove that a file can be written there; raises OSError before any long work has begun."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name, so that several processes can
        file.write(b"1")


def _json(content, **options):
    """JSON of plain values, with arrays, numpy's numbers and ranges as lists and numbers."""
    return json.dumps(content, default=lambda v: v.tolist() if hasattr(v, "tolist") else list(v), **options)


def save_tensors(path, tensors, **about):
    """Write a dict of tensors to a safetensors file, with `about` (JSON values) as its metadata entry of that name.

    Of tensors that lie on the CPU in one piece no second copy is made (by safetensors 0.5, which the paper's versions
    bring, one is).
    """
    with atomic_write(path) as file:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file.name,
                      {"about": _json(about)})  # one entry: several come in an order that varies
            os.chmod(file.name, os.fstat(file.fileno()).st_mode)  # the library puts a private file in its place
        except SafetensorError as error:
            code = re.search(r"(?:os error|code:) (\d+)", str(error))  # the only trace of a full disk
            raise OSError(int(code[1]), os.strerror(int(code[1]))) if code else error from None


def load_tensors(path):
    """Read what `save_tensors` wrote -> (dict of tensors, dict). Raises InputError where the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about
    except FileNotFoundError:
        raise _no_such_file(path) from None
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error}); delete it and run the step that "
                         "writes it again") from None


def load_json(path, *keys):
    """Read a JSON object. Raises InputError where the file is missing or damaged, or lacks one of `keys`."""
    try:
        content = json.loads(Path(path).read_text())
        return {**content, **{key: content[key] for key in keys}}
    except FileNotFoundError:
        raise _no_such_file(path) from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: damaged, or without {' or '.join(keys)} ({error}); make or download it "
                         "again") from None


_PLAIN_GLOBALS = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("torch", "Size"),
                  ("collections", "OrderedDict"), ("builtins", "set"), ("__builtin__", "set"), ("_codecs", "encode")}


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that builds tensors and plain containers, and refuses every other global."""

    def find_class(self, module, name):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if (module, name) not in _PLAIN_GLOBALS:
            raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}, and only tensors and plain "
                                         "containers are loaded")
        return super().find_class(module, name)


class _PlainPickle:
    """The part of the pickle module that torch.load calls, with the unpickler above."""
    __name__ = "pickle"
    Unpickler = _PlainUnpickler
    UnpicklingError = pickle.UnpicklingError

    @staticmethod
    def load(file, **options):
        return _PlainUnpickler(file, **options).load()


_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how a storage inside a plain pickle begins


def _load_storage(data):
    """A tensor's memory inside a plain pickle: itself a file of torch.save's older format."""
    if not data.startswith(_LEGACY_MAGIC):
        raise pickle.UnpicklingError("refused: a tensor whose memory is not in torch.save's format")
    return torch.load(io.BytesIO(data), map_location="cpu", pickle_module=_PlainPickle, weights_only=False)


def load_pickle(path, written_by="prepare.py"):
    """Load a file of `pickle.dump` or `torch.save` without running code from it, tensors on the CPU.

    Accepts tensors and plain containers, so every file of the released scripts. written_by: named where it is missing.
    Raises InputError: file missing, truncated, of another kind, or naming a global that could run code (it says which).
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                file.seek(0)
                legacy = file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC
                file.seek(0)
                return _load_storage(file.read()) if legacy else _PlainPickle.load(file)
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist()):
                raise pickle.UnpicklingError("refused: a TorchScript program, not data")
        return torch.load(path, map_location="cpu", pickle_module=_PlainPickle, weights_only=False)
    except FileNotFoundError:
        raise _no_such_file(path, written_by) from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; give a file that can be read") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        remedy = ("do not trust this file, or save it as plain tensors, lists and dicts" if "refused" in str(error) else
                  "it is truncated or no pickle; delete it and write it again")
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: {reason}; {remedy}") from None


class _StablePickler(pickle.Pickler):
    """A pickler whose bytes depend on the content alone: torch names a tensor's memory by its address."""

    def reducer_override(self, obj):
        if not isinstance(obj, torch.storage.TypedStorage):
            return NotImplemented
        load, (data,) = obj.__reduce__()
        address = str(obj._untyped_storage._cdata).encode()
        return load, (data.replace(b"X" + struct.pack("<I", len(address)) + address, b"X\x01\x00\x00\x000"),)


def save_pickle(path, content):
    """Write content as plain `pickle.dump` does, the same bytes for the same content.

    A tensor takes its whole memory along, so none should be a view of a larger one.
    """
    with atomic_write(path) as file:
        _StablePickler(file, protocol=4).dump(content)


def process_rank():
    """The number of this process under torchrun, 0 without it."""
    return int(os.environ.get("RANK", 0))


def process_count():
    """How many processes torchrun has started, 1 without it. Connects them at the first call."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1 and not dist.is_initialized():
        import datetime
        if torch.cuda.is_available():
            torch.cuda.set_device(default_device())  # where NCCL's barrier runs
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(days=7))  # a slow neighbour may embed for hours
    return count


def default_device():
    """This process's GPU, or the CPU where there is none. Raises InputError where processes outnumber the GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= gpus:
        raise InputError(f"process {number + 1} on a machine with {gpus} GPUs; start torchrun with --nproc-per-node "
                         f"{gpus}")
    return torch.device("cuda", number)


def progress_bar(label, total, **options):
    """A tqdm bar on stderr, shown from the third second on; in a log file it writes a line every ten seconds."""
    return tqdm(desc=label, total=total, delay=2, mininterval=0.2 if sys.stderr.isatty() else 10,
                disable=process_rank() > 0, **options)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def script_parser(description, folder):
    """The command line that every script has: `--dir`, where it reads and writes."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(folder), metavar="DIR",
                        help="read and write here, a folder of this data set's own, instead of beside the script")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# 1. Reward model and embedding
# ---------------------------------------------------------------------------------------------------------------------


def _checkpoint_file(model_name, filename):
    """The local path of one file of a checkpoint (a folder, or an id on the hub); None where it has no such file."""
    if os.path.isdir(model_name):
        path = os.path.join(model_name, filename)
        return path if os.path.exists(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError, logging
    logging.set_verbosity_error()  # its retries end in the one line below
    try:
        return hf_hub_download(str(model_name), filename)
    except LocalEntryNotFoundError as error:
        reason = error
    except EntryNotFoundError:
        return None
    except Exception as error:  # unknown id, no network, no access: the hub's client has a class for each
        reason = error
    raise InputError(f"model {model_name}: no such folder, and the hub did not serve it ({type(reason).__name__}); "
                     "check the name and the network, or give the path of a downloaded checkpoint")


@contextlib.contextmanager
def _shard(model_name, filename):
    """One safetensors file of a checkpoint, open for reading. Raises InputError where it is missing or damaged."""
    path = _checkpoint_file(model_name, filename)
    if path is None:
        raise InputError(f"model {model_name}: no {filename} in it; give a checkpoint in safetensors format")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path}: not a complete safetensors file ({error}); download it again") from None


def _shard_of_tensor(model_name):
    """Which safetensors file of a checkpoint holds each tensor: tensor name -> file name."""
    index = _checkpoint_file(model_name, "model.safetensors.index.json")
    if index:
        return load_json(index, "weight_map")["weight_map"]
    with _shard(model_name, "model.safetensors") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def load_reward_head(model_name):
    """Read the reward head of a checkpoint: one tensor from its safetensors shard, never the model.

    model_name: a folder, or an id on the hub. Returns float32 `[d, 1]`, the transposed `score.weight`: the layer that
    the reward model itself multiplies the last token's state with.
    Raises InputError: unknown model, no safetensors, or not exactly one scalar head.
    """
    heads = {name: shard for name, shard in _shard_of_tensor(model_name).items() if name.endswith("score.weight")}
    found = f"{len(heads)} score.weight tensors"
    if len(heads) == 1:
        (name, shard), = heads.items()
        with _shard(model_name, shard) as file:
            head = file.get_tensor(name)
        if head.ndim == 2 and head.shape[0] == 1:
            return head.float().T.contiguous()
        found = f"one of shape {tuple(head.shape)}"
    raise InputError(f"model {model_name}: needs exactly one scalar reward head and has {found}; give a "
                     "sequence-classification checkpoint with num_labels=1")


def load_released_reference(model_name):
    """The vector that the released scripts took for the reward head, to compare with: float32 `[d, 1]`.

    The last linear layer of the model without its head, which is the last MLP's down-projection; its first column.
    Raises InputError: unknown model, no safetensors, or one without such layers.
    """
    layers = {}
    for name, shard in _shard_of_tensor(model_name).items():
        if layer := re.search(r"layers\.(\d+)\.mlp\.down_proj\.weight$", name):
            layers[int(layer[1])] = name, shard
    if not layers:
        raise InputError(f"model {model_name}: no MLP down-projection in it; the released reference is that of Llama")
    name, shard = layers[max(layers)]
    with _shard(model_name, shard) as file:
        return file.get_slice(name)[:, :1].float().contiguous()


def _check_fits_memory(model_name, dtype):
    """Raise InputError before loading a model into a CPU memory that cannot hold it; only safetensors are measured."""
    if not any(_checkpoint_file(model_name, f"model.safetensors{index}") for index in (".index.json", "")):
        return
    parameters = 0
    for shard in sorted(set(_shard_of_tensor(model_name).values())):
        with _shard(model_name, shard) as file:
            parameters += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    needed = parameters * torch.finfo(dtype).bits // 8
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.8 * memory:
        raise InputError(f"model {model_name}: needs {needed / 2**30:.0f} GiB in memory and this machine has "
                         f"{memory / 2**30:.0f}; run it on a CUDA GPU, or give a smaller model")


def load_reward_model(model_name, device=None, attention=None, dtype=None, tokenizer_name=None,
                      trust_remote_code=False):
    """Load the frozen reward model without its head -> (backbone, tokenizer), in eval mode on `device`.

    device: default this process's GPU, else the CPU. attention: a transformers implementation; default
    flash_attention_2 where it is installed and the GPU can (compute capability 8 and up), else PyTorch's own ("sdpa").
    dtype: default bfloat16 on a GPU, as released, and float32 on the CPU. tokenizer_name: default the model's.
    Raises InputError: unknown model, no chat template, or a CPU without the memory for it.
    """
    from transformers import AutoModel, AutoTokenizer, logging
    device = torch.device(device) if device is not None else default_device()
    on_gpu = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    if attention is None:
        flash = on_gpu and importlib.util.find_spec("flash_attn") and torch.cuda.get_device_capability(device)[0] >= 8
        attention = "flash_attention_2" if flash else "sdpa"
    if not on_gpu:
        _check_fits_memory(model_name, dtype)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # silence the note that the backbone leaves out score.weight
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or model_name, trust_remote_code=trust_remote_code)
        model = AutoModel.from_pretrained(model_name, torch_dtype=dtype, attn_implementation=attention,
                                          trust_remote_code=trust_remote_code)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # files missing, damaged or of different models: a class of its own for each
        raise InputError(f"model {model_name}: cannot be loaded ({str(error) or type(error).__name__}); "
                         "check the name, the network and that it holds a model and a tokenizer") from None
    finally:
        logging.set_verbosity(verbosity)
    if not tokenizer.chat_template:
        raise InputError(f"model {model_name}: its tokenizer has no chat template; give a chat model")
    return model.eval().requires_grad_(False).to(device), tokenizer


def _fingerprint(model):
    """A digest of a loaded model: revision, dtype, attention, settings, and every parameter's shape and checksum."""
    settings = {key: value for key, value in model.config.to_dict().items()
                if key not in ("_name_or_path", "transformers_version")}  # another path or version is no other model
    attention = getattr(model.config, "_attn_implementation", None)
    digest = hashlib.sha256(f"{getattr(model.config, '_commit_hash', None)} {model.dtype} {attention}".encode())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten().view(torch.uint8)
        digest.update(f"{name} {tuple(parameter.shape)} {values[:64].tolist()} {values.sum().item()}".encode())
    return digest.hexdigest()


@dataclasses.dataclass
class _Row:
    """One row of a batch: a prefix computed once, and behind it each continuation that shares it."""
    prefix: list  # token ids
    members: list  # numbers of the conversations
    suffixes: list  # token ids of each conversation behind the prefix, never empty

    def __len__(self):
        return len(self.prefix) + sum(map(len, self.suffixes))

    def only(self, wanted):
        kept = [(m, s) for m, s in zip(self.members, self.suffixes) if m in wanted]
        return dataclasses.replace(self, members=[m for m, _ in kept], suffixes=[s for _, s in kept])


def _rows_of_shared_prefixes(tokens, prompts, token_budget):
    """Rows in order of length, longest first; a prompt whose answers exceed the budget gets several rows.

    tokens: token ids of each conversation; prompts: number of a conversation -> what those that share a prompt share.
    """
    by_prompt = {}
    for number, prompt in prompts.items():
        by_prompt.setdefault(prompt, []).append(number)
    rows = []
    for numbers in by_prompt.values():
        shared = os.path.commonprefix([tokens[n] for n in numbers])
        shared = shared[:min(len(tokens[n]) for n in numbers) - 1]
        row = None
        for n in numbers:
            suffix = tokens[n][len(shared):]
            if row is None or len(row) + len(suffix) > token_budget:
                row = _Row(shared, [], [])
                rows.append(row)
            row.members.append(n)
            row.suffixes.append(suffix)
    return sorted(rows, key=len, reverse=True)


def _padded_length(rows):
    """The width of a batch: that of its longest row, rounded up to what the GPU kernels want, a multiple of 8."""
    return -(-max(map(len, rows)) // 8) * 8


def _batches(rows, token_budget, batch_size=None):
    """Split rows, longest first, so that a padded batch holds at most token_budget tokens (or one row)."""
    batch = []
    for row in rows:
        if batch and (_padded_length(batch[:1]) * (len(batch) + 1) > token_budget or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _forward(model, rows):
    """Last-token states of every member of a batch of rows, in order: `[members, d]` on the CPU."""
    width = _padded_length(rows)
    ids, position, segment = (torch.full((len(rows), width), fill) for fill in (0, 0, -1))
    last = []
    for r, row in enumerate(rows):
        start = len(row.prefix)
        ids[r, :start], segment[r, :start] = torch.tensor(row.prefix, dtype=torch.long), 0
        position[r, :start] = torch.arange(start)
        for s, suffix in enumerate(row.suffixes):
            end = start + len(suffix)
            ids[r, start:end], segment[r, start:end] = torch.tensor(suffix), s + 1
            position[r, start:end] = torch.arange(len(row.prefix), len(row.prefix) + len(suffix))
            last.append((r, end - 1))
            start = end
    ids, position, segment = (part.to(model.device) for part in (ids, position, segment))
    if all(len(row.suffixes) == 1 for row in rows):
        mask = (segment >= 0).long()  # (B, L), what every attention implementation takes
    else:  # a token sees the earlier tokens of its own continuation and of the shared prefix
        seen = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
        seen = seen & torch.ones(width, width, dtype=torch.bool, device=model.device).tril()
        mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
        mask = mask.masked_fill_(~seen, torch.finfo(model.dtype).min)[:, None]  # (B, 1, L, L)
    with torch.inference_mode():
        states = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state
        rows_of, columns = torch.tensor(last, device=model.device).T
        return states[rows_of, columns].cpu()


def _forward_within_memory(model, rows):
    """_forward, in halves where the GPU's memory does not hold the whole batch."""
    try:
        return _forward(model, rows)
    except torch.cuda.OutOfMemoryError:
        if len(rows) == 1 == len(rows[0].members):
            raise
    torch.cuda.empty_cache()
    if len(rows) == 1:
        members = rows[0].members
        halves = [[rows[0].only(part)] for part in (members[:len(members) // 2], members[len(members) // 2:])]
    else:
        halves = rows[:len(rows) // 2], rows[len(rows) // 2:]
    return torch.cat([_forward_within_memory(model, half) for half in halves])


def _quoted(conversation):
    """How an error message names a conversation: its beginning and end."""
    return " .. ".join(repr(message["content"][:60]) for message in (conversation[0], conversation[-1]))


def tokenize_conversations(conversations, tokenizer):
    """Chat-format and tokenize conversations -> one list of token ids each.

    The template already writes the special tokens, so the tokenizer must not add its own a second time.
    """
    try:
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=False) for c in conversations]
    except Exception as error:  # the template is the checkpoint's program
        raise InputError(f"the model's chat template cannot format these conversations ({error})") from None
    for conversation, text in zip(conversations, texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the conversation {_quoted(conversation)} is no Unicode text ({error}); repair it or "
                             "leave it out") from None
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _takes_any_mask(config):
    """Whether a model's attention is all that a mask says: neither flash-attn's nor within a window of its own."""
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return not (window or getattr(config, "attention_chunk_size", None)
                or getattr(config, "_attn_implementation", "eager") == "flash_attention_2")


def _shards(rows, shard_size):
    """Split rows into lists of about `shard_size` conversations each."""
    shards, count = [], shard_size
    for row in rows:
        if count >= shard_size:
            shards.append([])
            count = 0
        shards[-1].append(row)
        count += len(row.members)
    return shards


def _cached(folder):
    """What the shards in a cache folder hold: (key, embedding) pairs. Damaged ones hold nothing and are made again."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors, about = load_tensors(path)
        except InputError:
            continue
        for key, states in zip(about.get("keys", ()), tensors.get("embeddings", ())):
            if states.isfinite().all():
                yield key, states


def embed_conversations(conversations, model, tokenizer, cache_dir=None, token_budget=8192, shard_size=1024,
                        max_length=None, truncation_side="left", batch_size=None, dtype=None):
    """phi of each conversation: the state, after the final norm, of its last token.

    conversations: list of lists of {"role", "content"} messages, the last one the response that is judged.
    model, tokenizer: from `load_reward_model`. Returns a CPU tensor `[n, d]` of `dtype`, default the model's.

    Equal conversations are computed once, and so is the prompt that several responses share: such responses lie behind
    one copy of it in a row, with an attention mask that keeps them apart. flash-attn takes no such mask, and attention
    in a sliding window has one of its own; there each conversation is a row by itself. A padded batch holds at most
    `token_budget` tokens (or a single row) and `batch_size` rows.
    max_length: cut conversations of more tokens, at their "left" or "right" `truncation_side`.

    With `cache_dir`, shards of about `shard_size` conversations are saved there as they are made, and an interrupted
    call resumes after the last of them, with the same bytes in the end. Under torchrun the processes share the work by
    these shards, so they need a `cache_dir` that all of them see.

    Raises InputError: no conversation, an empty one, one longer than the model's context, or one whose embedding is
    not finite; several processes without a common `cache_dir`.
    """
    if not conversations:
        raise InputError("no conversations to embed; give at least one")
    ranks = process_count()
    if ranks > 1 and not cache_dir:
        raise InputError(f"{ranks} processes share their work by a cache folder; give cache_dir")
    for name, value in (("token_budget", token_budget), ("shard_size", shard_size), ("max_length", max_length),
                        ("batch_size", batch_size)):
        if value is not None:
            check_whole(name, value)
    if truncation_side not in ("left", "right"):
        raise InputError(f"truncation_side = {truncation_side!r}: give left or right")
    sequences = tokenize_conversations(conversations, tokenizer)
    if max_length is not None:
        sequences = [ids[-max_length:] if truncation_side == "left" else ids[:max_length] for ids in sequences]
    longest, limit = max(map(len, sequences)), model.config.max_position_embeddings
    if min(map(len, sequences)) == 0 or longest > limit:
        worst = next(i for i, s in enumerate(sequences) if len(s) in (0, longest))
        raise InputError(f"the conversation {_quoted(conversations[worst])} has {len(sequences[worst])} tokens, the "
                         f"model takes 1 to {limit}; leave it out or shorten it")

    fingerprint = _fingerprint(model) + hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    keys = [hashlib.sha256(f"{fingerprint} {sequence}".encode()).hexdigest() for sequence in sequences]
    folder = Path(cache_dir) / hashlib.sha256(fingerprint.encode()).hexdigest()[:16] if cache_dir else None
    embeddings = torch.empty(len(keys), model.config.hidden_size, dtype=dtype or model.dtype)
    first = {}  # key -> number of the first such conversation, the one that is computed
    for number, key in enumerate(keys):
        first.setdefault(key, number)
    distinct = list(first.values())
    missing = set(distinct)

    def take_cached():
        for key, states in _cached(folder):
            if first.get(key) in missing:
                embeddings[first[key]] = states
                missing.discard(first[key])

    if folder:
        check_writable(folder)
        take_cached()
    if ranks > 1:
        dist.barrier()  # all have read the same shards before one writes another
    alone = not _takes_any_mask(model.config)
    prompts = {n: n if alone else json.dumps(conversations[n][:-1]) for n in distinct}
    shards = _shards(_rows_of_shared_prefixes(sequences, prompts, token_budget), shard_size)
    work = [[row.only(missing) for row in rows] for rows in shards]
    work = [sorted((row for row in rows if row.members), key=len, reverse=True) for rows in work]
    work = [rows for rows in work if rows][process_rank()::ranks]
    total = sum(len(row) for rows in shards for row in rows)
    left = sum(len(row) for rows in work for row in rows) * ranks
    with progress_bar("embedding", total, initial=max(0, total - left), unit="tok", unit_scale=True) as bar:
        for rows in work:
            members = [m for row in rows for m in row.members]
            parts = []
            for batch in _batches(rows, token_budget, batch_size):
                parts.append(_forward_within_memory(model, batch))
                bar.update(sum(map(len, batch)) * ranks)
            states = torch.cat(parts)
            if not states.isfinite().all():
                worst = members[int((~states.isfinite()).any(1).nonzero()[0])]
                raise InputError(f"the model gives the conversation {_quoted(conversations[worst])} NaN or infinite "
                                 f"values in {model.dtype}; leave it out, or check the model")
            embeddings[members] = states.to(embeddings.dtype)
            missing.difference_update(members)
            if folder:
                shard_keys = [keys[m] for m in members]
                name = hashlib.sha256("".join(shard_keys).encode()).hexdigest()[:24]
                save_tensors(folder / f"{name}.safetensors", {"embeddings": states}, keys=shard_keys)
    if ranks > 1:
        dist.barrier()
        take_cached()
    if missing:
        raise InputError(f"{folder}: {len(missing)} embeddings of the other processes are not there; give all "
                         "processes one folder, and run the same command again")
    repeated = sorted(set(range(len(keys))) - set(distinct))
    embeddings[repeated] = embeddings[[first[keys[n]] for n in repeated]]
    return embeddings


HEAD_FILE = "reward_head.safetensors"


def check_gpu(model_name):
    """Raise InputError unless there is a GPU for a model that does not fit the CPU."""
    if not torch.cuda.is_available():
        raise InputError(f"no CUDA GPU here, and {model_name} needs one with 18 GB; try --demo, or --model with a "
                         "reward model that fits this machine")


def prepare_arguments(description, folder, model_name, build_demo, embeds=True):
    """Read and check the command line of a prepare.py.

    build_demo(data, model) writes the demo's corpus and stand-in model to these folders. embeds: whether the script
    itself runs the model, which asks for a GPU unless a model was named.
    Returns a namespace: dir, data (a folder, or None for the download), model, limit, overwrite, demo, label (of the
    data). Raises InputError: --limit below 1, --demo with other sources, no CUDA GPU for the default model.
    """
    parser = script_parser(description, folder)
    parser.add_argument("--data", type=Path, metavar="DIR",
                        help="read the splits from here (parquet, jsonl or jsonl.gz) instead of downloading them")
    parser.add_argument("--model", metavar="ID_OR_PATH", help=f"the reward model (default: {model_name})")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each split; PRISM: users")
    parser.add_argument("--demo", action="store_true", help="a tiny stand-in model and a synthetic corpus, anywhere")
    parser.add_argument("--overwrite", action="store_true", help="replace finished embeddings of another model or data")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit}: give a number of rows from 1, or leave it out for all")
    if args.demo and (args.data or args.model):
        raise InputError("--demo brings its own data and model; leave out --data and --model, or --demo")
    if embeds and not args.demo and not args.model:
        check_gpu(model_name)
    args.label = "synthetic demo" if args.demo else args.data.name if args.data else None
    if args.data is not None:
        _check_data_folder(args.data)
    check_writable(args.dir)
    if args.demo:
        args.data, args.model = (args.dir / ".standin" / name for name in (Path(folder).name, "model"))
        if process_rank() == 0:
            try:
                build_demo(args.data, args.model)
            except OSError as error:
                error.filename = error.filename or str(args.data.parent)
                raise
        if process_count() > 1:
            dist.barrier()
    args.model = str(args.model or model_name)
    if os.path.isdir(args.model):
        args.model = os.path.normpath(args.model)
    return args


def _check_data_folder(folder):
    """Raise InputError unless there is a folder to read data from."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; give the one that holds the data")


def read_split(folder, *names):
    """The rows of one split of a data set in a folder: (where, row) pairs, `where` for error messages.

    names: words of which the file's name holds one, such as "validation" or "test"; it ends in .parquet, .jsonl or
    .jsonl.gz. Raises InputError: no such file or several, a line that is not a JSON object.
    """
    endings = (".parquet", ".jsonl", ".jsonl.gz")
    _check_data_folder(folder)
    paths = sorted(p for p in Path(folder).iterdir() if p.name.endswith(endings) and any(n in p.name for n in names))
    if len(paths) != 1:
        raise InputError(f"{folder}: {len(paths)} files with {' or '.join(names)} in the name ({', '.join(endings)}), "
                         "one is needed")
    if paths[0].suffix != ".parquet":
        yield from read_jsonl(paths[0])
        return
    for i, row in enumerate(load_parquet(paths[0]), 1):
        yield f"{paths[0]}, row {i}", row


def load_parquet(path):
    """The rows of a parquet file as a list of dicts. Raises InputError where it is missing or damaged."""
    import pyarrow
    import pyarrow.parquet
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except FileNotFoundError:
        raise _no_such_file(path) from None
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a complete parquet file ({error}); download or write it again") from None


def save_parquet(path, rows):
    """Write a list of dicts of one shape as a parquet file."""
    import pyarrow
    import pyarrow.parquet
    with atomic_write(path) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def read_jsonl(path):
    """The rows of a .jsonl or .jsonl.gz file: (where, row) pairs. Raises InputError: a line that is no JSON object."""
    path = Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            for i, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if "\\ud" in line.lower():  # an escape that may be half a character
                    json.dumps(row, ensure_ascii=False).encode()
                if not isinstance(row, dict):
                    raise InputError(f"{path}, row {i}: not a JSON object; give one object a line")
                yield f"{path}, row {i}", row
    except UnicodeEncodeError as error:
        raise InputError(f"{path}, row {i}: no Unicode text ({error}); repair the row or leave it out") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the folder that holds it with --data") from None
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged ({error}); download or write it again") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, row {i}: not JSON ({error}), so the line is cut short or the file an error page; "
                         "download or write it again") from None


def hub_splits(dataset, **options):
    """A data set of the hub by `datasets.load_dataset` -> dict: split -> (where, row) pairs, as `read_split` gives.

    Raises InputError where the hub does not serve it.
    """
    from datasets import load_dataset
    try:
        splits = load_dataset(dataset, **options)
    except Exception as error:  # no network, no such revision, no access: a class of its own for each
        raise InputError(f"data set {dataset}: the hub did not serve it ({type(error).__name__}: {error}); check the "
                         "network, or give a downloaded copy with --data") from None
    return {split: ((f"{dataset}, {split}, row {i}", row) for i, row in enumerate(rows, 1))
            for split, rows in splits.items()}


def hub_file(dataset, filename):
    """The local path of one file of a data set on the hub. Raises InputError where the hub does not serve it."""
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(dataset, filename, repo_type="dataset"))
    except Exception as error:  # no network, no such file, no access: a class of its own for each
        raise InputError(f"data set {dataset}, {filename}: the hub did not serve it ({type(error).__name__}); check "
                         "the network, or give a downloaded copy with --data") from None


def digest_of(content):
    """SHA-256 of a JSON value, as hex digits."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _file_digest(path):
    """SHA-256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _was_written_with(about, path):
    """Whether a file is the one that a reward head's metadata holds the digest of."""
    return _file_digest(path) == about.get("files", {}).get(path.name)


def embeddings_are_finished(outputs, identity, overwrite):
    """Whether the files `outputs` already hold the embeddings of this model and data.

    identity: a dict of JSON values; that of the files, and their digests, stand in the reward head's file beside
    them. Files that are damaged or missing are not finished.
    Raises InputError where they hold other embeddings and `overwrite` is not set.
    """
    existing = [path for path in outputs if path.exists()]
    if not existing or overwrite:
        return False
    head = existing[0].with_name(HEAD_FILE)
    if not head.exists():
        raise InputError(f"{existing[0]}: finished embeddings without the {HEAD_FILE} that says of which model; move "
                         "them away, or make them again with --overwrite")
    about = {}
    with contextlib.suppress(InputError):  # damaged
        about = load_tensors(head)[1]
    if about.get("identity") != identity:
        held = ", ".join(f"{key} {about.get(key, 'unknown')}" for key in ("model", "data"))
        raise InputError(f"{existing[0]} holds finished embeddings of other rows or another model ({held}); "
                         "move it away, or replace it with --overwrite")
    return all(path.exists() and _was_written_with(about, path) for path in outputs)


@contextlib.contextmanager
def new_embeddings(folder, head, identity, **about):
    """Where to write embeddings that then, with the reward head beside them, replace those in `folder` together.

    identity: see `embeddings_are_finished`; about: further JSON values.
    """
    with together(folder) as new:
        yield new
        save_tensors(new / HEAD_FILE, {"reward_head": head}, identity=identity, **about,
                     files={path.name: _file_digest(path) for path in sorted(new.iterdir())})


def find_reward_head(folder, model_name, data_set, outputs):
    """The reward head beside the embeddings in the files `outputs`, else from `model_name`'s checkpoint.

    Returns (float32 `[d, 1]`, a dict of what is known of model and data, with a `title` for plots: data_set's name).
    Raises InputError where one of the files is not that which the head was written with.
    """
    path = Path(folder) / HEAD_FILE
    if not path.exists():
        try:
            return load_reward_head(model_name), {"model": model_name, "title": data_set}
        except InputError as error:
            raise InputError(f"{path}: no such file, and {error}; prepare.py writes it") from None
    tensors, about = load_tensors(path)
    if "reward_head" not in tensors:
        raise InputError(f"{path}: no reward_head in it; delete it and run prepare.py --overwrite")
    for output in (Path(folder) / name for name in outputs if "files" in about):
        if not _was_written_with(about, output):
            raise InputError(f"{output}: not the file that {HEAD_FILE} was written with, but changed, or of another "
                             "run; make the embeddings again")
    return tensors["reward_head"], {**about, "title": f"{data_set} ({about['data']})" if "data" in about else data_set}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Preference data
# ---------------------------------------------------------------------------------------------------------------------


class Pairs:
    """Preference pairs as row numbers of one table of embeddings, for many pairs over few responses.

    embeddings: `[rows, d]`, any float dtype; chosen, rejected: int64 `[m]`. Behaves like the float32 matrix
    `embeddings[chosen] - embeddings[rejected]` of shape `[m, d]` without holding it.
    """

    def __init__(self, embeddings, chosen, rejected):
        self.embeddings = embeddings
        self.chosen, self.rejected = (torch.as_tensor(rows) for rows in (chosen, rejected))
        if any(rows.dtype == torch.bool or (rows != rows.long()).any() for rows in (self.chosen, self.rejected)):
            raise InputError("Pairs: chosen and rejected are no row numbers; give whole numbers")
        self.chosen, self.rejected = self.chosen.long(), self.rejected.long()
        rows = torch.cat([self.chosen, self.rejected])
        if self.chosen.shape != self.rejected.shape or self.chosen.ndim != 1:
            raise InputError(f"Pairs: chosen {tuple(self.chosen.shape)} and rejected {tuple(self.rejected.shape)} "
                             "must be two lists of the same length")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(embeddings):
            raise InputError(f"Pairs: row numbers {int(rows.min())} to {int(rows.max())} do not fit a table of "
                             f"{len(embeddings)} rows; give the embeddings that the pairs were made for")

    def __len__(self):
        return len(self.chosen)

    @property
    def device(self):
        return self.embeddings.device

    @property
    def shape(self):
        return torch.Size((len(self), self.embeddings.shape[1]))

    def __getitem__(self, rows):
        return Pairs(self.embeddings, self.chosen[rows], self.rejected[rows])

    def __matmul__(self, V):
        return self.of_table(self.table_scores(V))

    def table_scores(self, V):
        """`embeddings @ V` in float32, the part that all users of one table share: `[rows, K]`."""
        return torch.cat([part.to(V.device, torch.float32) @ V for part in self.embeddings.split(8192)])

    def of_table(self, scores):
        """Differences of these pairs' rows of a `[rows, K]` table."""
        return scores[self.chosen.to(scores.device)] - scores[self.rejected.to(scores.device)]

    def dense(self, device=None):
        """The float32 matrix `[m, d]` itself."""
        chosen, rejected = (self.embeddings[rows].to(device, torch.float32) for rows in (self.chosen, self.rejected))
        return chosen.sub_(rejected)


def check_features(features, what, users=None, d=None):
    """Check a list with one float32 `[m_i, d]` tensor (or Pairs) per user, at the border of training and evaluation.

    Raises InputError that names the user: no users or not `users` of them, a user without pairs, another width than
    `d` or than the first user's, another dtype, NaN or infinite values.
    """
    if len(features) == 0 or users not in (None, len(features)):
        raise InputError(f"{what}: {len(features)} users where {users or 'at least 1'} should be; "
                         "give one tensor per user")
    for i, X in enumerate(features):
        if not isinstance(X, (torch.Tensor, Pairs)):
            raise InputError(f"{what}, user {i}: {type(X).__name__} where a tensor or Pairs should be; convert with "
                             "torch.as_tensor")
    d = d if d is not None else features[0].shape[-1]
    finite_tables = set()
    for i, X in enumerate(features):
        if len(X.shape) != 2 or X.shape[0] == 0 or X.shape[1] != d:
            raise InputError(f"{what}, user {i}: shape {tuple(X.shape)} where [pairs >= 1, {d}] should be; leave out "
                             "users without pairs, and use embeddings of one model")
        table = X.embeddings if isinstance(X, Pairs) else X
        if table is X and X.dtype != torch.float32:
            raise InputError(f"{what}, user {i}: {X.dtype} where torch.float32 should be; convert with .float()")
        if id(table) not in finite_tables and not all(torch.isfinite(part).all() for part in table.split(8192)):
            raise InputError(f"{what}, user {i}: NaN or infinite values; make these embeddings again")
        if isinstance(X, Pairs):
            finite_tables.add(id(table))


SMALL_PRODUCT = 100**3  # multiplications of a matrix product up to which OpenBLAS has kernels of its own
BLOCK_NUMBERS = SMALL_PRODUCT // 4  # in a block of pairs, so that four members at once are a small product
ROW_GAP = 16  # numbers between two rows: a power of two from row to row, and all would share one place in the cache
CPU_BATCH_NUMBERS = 5 * 2**18  # in a batch's pairs and reward vectors: so many stay in the cache
GPU_BATCH_NUMBERS = 2**26  # so many keep it busy


@dataclasses.dataclass
class Batch:
    """n blocks of up to m pairs, each block of one user, as one product takes them.

    X: float32 `[n, m, d]`, where shorter blocks end in rows of zeros. weight: float32 `[n, m]`, what each pair counts
    for in the loss, 0 for a row of zeros. blocks: slice, their numbers among the blocks of all batches.
    """
    X: torch.Tensor
    weight: torch.Tensor
    blocks: slice


def pack(features, device=None, total=None, vectors=0):
    """Cut the users' pairs into blocks, and lay blocks of about one size together -> (list of `Batch`, user).

    user: int64 `[blocks]`, whose pairs a block holds. total: the loss is a mean over that many pairs; default the sum
    over users of each one's mean. vectors: how many others of length d each block is worked on with.
    """
    d = features[0].shape[1]
    device = torch.device(device) if device is not None else features[0].device
    blocks = []
    for user, X in enumerate(features):
        count = math.ceil(len(X) / max(1, BLOCK_NUMBERS // d))
        ends = [len(X) * i // count for i in range(count + 1)]
        blocks += [(X[begin:end], 1 / (total or len(X)), user) for begin, end in zip(ends, ends[1:])]
    blocks.sort(key=lambda block: len(block[0]))
    most = CPU_BATCH_NUMBERS if device.type == "cpu" else GPU_BATCH_NUMBERS
    batches, begin = [], 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or (end + 1 - begin) * (len(blocks[end][0]) + vectors) * d > most:
            parts, weights, _ = zip(*blocks[begin:end])
            is_pair = torch.tensor([len(part) for part in parts])[:, None] > torch.arange(len(parts[-1]))  # (n, m)
            weight = is_pair * torch.tensor(weights)[:, None]
            batches.append(Batch(_stack(parts, device), weight.to(device), slice(begin, end)))
            begin = end
    return batches, torch.tensor([user for *_, user in blocks], device=device)


def _stack(parts, device):
    """One float32 tensor `[n, m, d]` of n parts with up to m rows, the last of which has m."""
    m, d = parts[-1].shape
    stacked = torch.zeros(len(parts), m, d + ROW_GAP, device=device)[..., :d]
    for rows, X in zip(stacked, parts):
        rows[:len(X)] = X.dense() if isinstance(X, Pairs) else X
    return stacked


def sample_shots(features, shots, generator=None, groups=None):
    """For each user `shots` of the pairs, drawn without replacement anew at each call (all pairs of a user with fewer).

    features: list of `[m_i, d]`. Returns a list of `[min(shots, m_i), d]`.
    generator: a CPU torch.Generator; default torch's own. groups: see `run_few_shot_vary_shots`.
    """
    check_whole("shots", shots)
    if groups is None:
        return [X[torch.randperm(len(X), generator=generator)[:shots]] for X in features]
    drawn = [torch.randperm(int(group.max()) + 1, generator=generator)[:shots] for group in groups]
    return [X[torch.isin(group, kept)] for X, group, kept in zip(features, groups, drawn)]


PERSONALLLM = "namkoong-lab/PersonalLLM"
PERSONALLLM_FILES = ("train.safetensors", "test.safetensors")
RESPONSES = 8  # to each prompt
SCORER_NAMES = ("gemma_2b", "gemma_7b", "mistral_raft", "llama3_sfairx", "oasst_deberta_v3", "beaver_7b",
                "oasst_pythia_7b", "oasst_pythia_1b", "mistral_ray", "mistral_weqweasdas")  # score each response
SCORERS = len(SCORER_NAMES)


def generate_population(alpha, N, seed=None):
    """N users as mixtures over the scorers: Dirichlet draws, float32 `[N, len(alpha)]`.

    alpha: the concentration, one number per scorer, or a single number for PersonalLLM's ten scorers.
    """
    concentration = np.full(SCORERS, alpha) if np.ndim(alpha) == 0 else np.asarray(alpha, dtype=float)
    if not all(is_number(value, 1e-6, 1e6) for value in concentration.tolist()):
        raise InputError(f"concentration {alpha!r}: give a number from 1e-6 to 1e6, or one per scorer")
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(concentration, N)).float()


generate_popupulation = generate_population  # the released spelling


def best_and_worst(reward_tensor, w):
    """The responses that a user scores highest and lowest -> two int64 `[prompts]`, equal where all are tied.

    reward_tensor: `[prompts, responses, scorers]`; w: the user's mixture `[scorers]`.
    """
    reward_tensor = torch.as_tensor(reward_tensor)
    if not reward_tensor.is_floating_point():
        reward_tensor = reward_tensor.float()
    scores = reward_tensor @ torch.as_tensor(w, dtype=reward_tensor.dtype, device=reward_tensor.device)
    best, worst = scores.argmax(1), scores.argmin(1)
    tied = (reward_tensor == reward_tensor[:, :1]).all(2).all(1)  # here rounding would decide
    return best, torch.where(tied, best, worst)


def simulate_user(reward_tensor, features, w):
    """One simulated user's pairs: the embedding of the response scored highest minus that of the one scored lowest.

    reward_tensor: `[prompts, responses, scorers]`; features: `[prompts, responses, d]`; w: `[scorers]`.
    Returns float32 `[prompts, d]`.
    """
    best, worst = best_and_worst(reward_tensor, w)
    prompts = torch.arange(len(features))
    return features[prompts, best].float() - features[prompts, worst].float()


def simulate_population(reward_tensor, features, W):
    """`simulate_user` for every row of W `[N, scorers]` -> float32 `[N, prompts, d]`.

    Dense: 4 N prompts d bytes. For many users keep `Pairs` of `best_and_worst` instead.
    """
    return torch.stack([simulate_user(reward_tensor, features, w) for w in W])


def create_sparse_tensor(dense, fraction, generator=None):
    """For each user a random `fraction` of the prompts, rounded down.

    dense: `[N, prompts, d]`. Returns a list of N tensors `[int(fraction * prompts), d]`.
    Raises InputError where that leaves no pair.
    """
    return sample_shots(list(dense), _share_of(dense.shape[1], fraction), generator)


def _share_of(prompts, fraction, what="users"):
    if not is_number(fraction, 1 / prompts, 1.0):
        raise InputError(f"{what}: fraction {fraction} of {prompts} prompts leaves no pairs for a user, or is more "
                         f"than all; give a number from {1 / prompts:.2g} to 1.0, or more prompts")
    return int(fraction * prompts + 1e-9)  # 0.29 of 100 is 29, not the 28.999.. of the floating-point product


def simulate_pairs(embeddings, reward_tensor, W, fraction, generator, what="users"):
    """The pairs of `simulate_user` by row numbers, for every row of W and a random `fraction` of the prompts.

    embeddings: `[responses * prompts, d]`, response j of prompt i at row responses * i + j; reward_tensor: `[prompts,
    responses, scorers]`; W: `[N, scorers]`; generator: of numpy; what: names the users in errors. Returns (list of N
    `Pairs`, how many pairs were dropped because all responses to a prompt are tied). Raises InputError where a user is
    left without pairs.
    """
    prompts, responses, _ = reward_tensor.shape
    kept, users, dropped = _share_of(prompts, fraction, what), [], 0
    for i, w in enumerate(W):
        drawn = torch.from_numpy(np.sort(generator.choice(prompts, kept, replace=False)))
        best, worst = best_and_worst(reward_tensor[drawn], w)
        differ = best != worst
        if not differ.any():
            raise InputError(f"{what}, user {i}: all responses to the {kept} prompts drawn are tied; take more "
                             "prompts, or other scores")
        first_row = responses * drawn
        users.append(Pairs(embeddings, (first_row + best)[differ], (first_row + worst)[differ]))
        dropped += kept - len(users[-1])
    return users, dropped


def personalllm_rows(folder=None):
    """The rows of PersonalLLM: split -> (where, row) pairs, from a folder, or from the hub where it is None."""
    if folder is not None:
        return {"train": read_split(folder, "train"), "test": read_split(folder, "test", "validation")}
    splits = hub_splits(PERSONALLLM)
    if not {"train", "test"} <= set(splits):
        raise InputError(f"data set {PERSONALLLM}: has splits {', '.join(splits)} where train and test should be; give "
                         "a downloaded copy with --data")
    return {split: splits[split] for split in ("train", "test")}


def parse_personalllm(rows, split, limit=None):
    """Parse the first `limit` rows of a split of PersonalLLM -> (prompts, responses, scores). split: its name.

    Returns a list of n texts, a list of n lists of eight texts, and float32 `[n, 8, 10]`, scorers in the order of
    SCORER_NAMES. Raises InputError that names the row and the column: a column missing, a prompt or a response that is
    no text, a score that is no finite number; and where there is no row.
    """
    prompts, responses, scores = [], [], []
    texts = ["prompt", *(f"response_{j}" for j in range(1, RESPONSES + 1))]
    numbers = [f"{response}_{scorer}" for response in texts[1:] for scorer in SCORER_NAMES]
    for where, row in itertools.islice(rows, limit):
        missing = [name for name in texts + numbers if name not in row]
        if missing:
            raise InputError(f"{where}: no column {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}; "
                             f"the hub's schema has a prompt and {RESPONSES} responses with {SCORERS} scores each")
        for name in texts:
            if not isinstance(row[name], str):
                raise InputError(f"{where}: {name} is {row[name]!r} and no text; every prompt needs {RESPONSES} "
                                 "responses, repair the row or leave it out")
        for name in numbers:
            number = row[name] if type(row[name]) in (int, float) else math.nan
            if not abs(number) <= torch.finfo(torch.float32).max:
                raise InputError(f"{where}: {name} is {repr(row[name])[:20]} and no finite number; repair the row or "
                                 "leave it out")
        prompts.append(row["prompt"])
        responses.append([row[name] for name in texts[1:]])
        scores.append([row[name] for name in numbers])
    if not prompts:
        raise InputError(f"PersonalLLM: the {split} split has no rows; give one with a prompt a row")
    return prompts, responses, torch.tensor(scores, dtype=torch.float32).reshape(-1, RESPONSES, SCORERS)


def load_personalllm(folder, model_name, data=None):
    """Read the embeddings of PersonalLLM/prepare.py (or of the released script) and the reward head.

    data: the folder of the data set, for the scores of files that hold none, as the released ones; default the hub.
    Returns ({"train": (embeddings `[8 * prompts, d]`, scores `[prompts, 8, 10]`), "test": the same}, head `[d, 1]`,
    what is known of model and data). Raises InputError: missing or damaged files, another number of rows than 8 a
    prompt, embeddings that are not finite or of different widths.
    """
    tables, width, rows = {}, {}, None
    for path, split in zip((Path(folder) / name for name in PERSONALLLM_FILES), ("train", "test")):
        tensors, _ = load_tensors(path)
        embeddings = tensors.get("embeddings")
        if embeddings is None or embeddings.ndim != 2 or not embeddings.is_floating_point():
            raise InputError(f"{path}: no matrix of embeddings in it; run prepare.py --overwrite")
        if "scores" not in tensors:
            rows = rows or personalllm_rows(data)
            tensors["scores"] = parse_personalllm(rows[split], split)[2]
        scores = tensors["scores"]
        if scores.shape[1:] != (RESPONSES, SCORERS) or len(embeddings) != RESPONSES * len(scores):
            raise InputError(f"{path}: {len(embeddings):,} embeddings and scores of shape {tuple(scores.shape)}, where "
                             f"each prompt has {RESPONSES} responses with {SCORERS} scores; run prepare.py --overwrite")
        for first, part in zip(range(0, len(embeddings), 8192), embeddings.split(8192)):
            if not torch.isfinite(part).all():
                row = first + int((~torch.isfinite(part)).any(1).nonzero()[0])
                raise InputError(f"{path}, row {row}: NaN or infinite values; run prepare.py --overwrite")
        if not torch.isfinite(scores).all():
            raise InputError(f"{path}: scores that are NaN or infinite; run prepare.py --overwrite")
        width.setdefault(embeddings.shape[1], path)
        tables[split] = embeddings, scores.float()
    head, about = find_reward_head(folder, model_name, "PersonalLLM", PERSONALLLM_FILES)
    check_width(width, head, folder, about.get("model", model_name))
    return tables, head, about


def personalllm_parser(description, folder):
    """The command line of the scripts that train on PersonalLLM: `--dir`, and `--data` for `load_personalllm`."""
    parser = script_parser(description, folder)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the data set, for embeddings of the released script, "
                        "which hold no scores (default: the hub)")
    return parser


def create_dataset_personalllm(tables, N, N_unseen, concentration, fractions, seed=0):
    """Simulate PersonalLLM's users: Dirichlet mixtures over the scorers, and their pairs as `Pairs`.

    tables: of `load_personalllm`. fractions: the shares of the train prompts that a seen and an unseen user compare,
    and the share of the test prompts of both.

    Returns a dict: `seen` and `unseen`, names of users; `population` `[N, 10]` and `population_unseen` `[N_unseen,
    10]`, their mixtures; a list of Pairs under each of `train`, `test`, `train_unseen`, `test_unseen`; and `dropped`,
    how many pairs were left out because all responses are tied.
    """
    check_whole("N", N)
    check_whole("N_unseen", N_unseen)
    if not is_number(concentration, 1e-6, 1e6):
        raise InputError(f"concentration = {concentration!r}: give a number from 1e-6 to 1e6")
    check_whole("population_seed", seed, 0)
    data = {"seen": [f"seen_{i}" for i in range(N)], "unseen": [f"unseen_{i}" for i in range(N_unseen)],
            "population": generate_population(concentration, N, [seed, 0]),
            "population_unseen": generate_population(concentration, N_unseen, [seed, 1]), "dropped": 0}
    chance = np.random.default_rng([seed, 2])
    for part, split, of, fraction in (("train", "train", "", fractions[0]), ("test", "test", "", fractions[2]),
                                      ("train_unseen", "train", "_unseen", fractions[1]),
                                      ("test_unseen", "test", "_unseen", fractions[2])):
        data[part], dropped = simulate_pairs(*tables[split], data[f"population{of}"], fraction, chance, part)
        data["dropped"] += dropped
    return data


def create_dataset_tldr(train, validation, train_pairs, unseen_pairs, seed=0, leave_out=2):
    """Split the workers of the two Reddit TL;DR files into seen and unseen, and form their pairs.

    train, validation: dicts of `prepare.py`, worker -> list of comparisons. The `leave_out` workers with the fewest
    pairs of each file are left out. The others, where in both files, are sorted, shuffled by `seed` and halved.
    train_pairs, unseen_pairs: how many training pairs a seen and an unseen worker keep at most, drawn by `seed`.

    Returns a dict: `seen` and `unseen`, lists of workers, and for each of them one float32 `[m_i, d]` per worker,
    `train`, `test`, `train_unseen`, `test_unseen`. Raises InputError where fewer than two workers are in both files.
    """
    def kept(file):
        return set(sorted(file, key=lambda worker: (len(file[worker]), str(worker)))[leave_out:])

    check_whole("split_seed", seed, 0)
    check_whole("train_pairs", train_pairs)
    check_whole("unseen_pairs", unseen_pairs)
    workers = sorted(kept(train) & kept(validation), key=str)
    if len(workers) < 2:
        raise InputError(f"{len(workers)} workers are in both the train and the validation file (after the {leave_out} "
                         "smallest of each), at least 2 are needed; prepare both from one data set, without --limit")
    chance = random.Random(int(seed))
    chance.shuffle(workers)
    half = len(workers) // 2

    def features(file, workers, most=None):
        groups = [file[w] if most is None else chance.sample(file[w], min(most, len(file[w]))) for w in workers]
        X = torch.stack([pair_difference(pair) for pairs in groups for pair in pairs])  # (M, d)
        return list(X.split([len(pairs) for pairs in groups]))

    seen, unseen = workers[:half], workers[half:]
    return {"seen": seen, "unseen": unseen,
            "train": features(train, seen, train_pairs), "test": features(validation, seen),
            "train_unseen": features(train, unseen, unseen_pairs), "test_unseen": features(validation, unseen)}


TLDR_FILES = ("tldr_embeddings_train.pkl", "tldr_embeddings_val.pkl")


def load_tldr(folder, model_name):
    """Read the embeddings of RedditTLDR/prepare.py (or of the released script) and the reward head.

    Returns (train, validation, head `[d, 1]`, what is known of model and data). A head that is not beside the pickles
    is read from `model_name`'s checkpoint. Raises InputError that names file, worker and pair: files missing or
    damaged, embeddings missing, not finite or of different widths.
    """
    files, width = [], {}  # width: d -> where it was first seen
    for path in (Path(folder) / name for name in TLDR_FILES):
        content = load_pickle(path)
        if not isinstance(content, dict) or not content:
            raise InputError(f"{path}: not a dict of workers; write it again with prepare.py --overwrite")
        for worker, pairs in content.items():
            where = f"{path}, worker {worker}"
            if not isinstance(pairs, list) or not pairs:
                raise InputError(f"{where}: no pairs; leave this worker out, or run prepare.py --overwrite")
            for i, pair in enumerate(pairs):
                try:
                    sides = [pair["embeddings"][side][0] for side in ("winning", "losing")]
                    usable = all(side.ndim == 1 and len(side) and torch.isfinite(side).all() for side in sides)
                except (KeyError, IndexError, TypeError, AttributeError):
                    usable = False
                if not usable:
                    raise InputError(f"{where}, pair {i}: no embeddings, or NaN or infinite ones; run prepare.py "
                                     "--overwrite")
                for side in sides:
                    width.setdefault(len(side), f"{where}, pair {i}")
        files.append(content)
    head, about = find_reward_head(folder, model_name, "Reddit TL;DR", TLDR_FILES)
    check_width(width, head, folder, about.get("model", model_name))
    return *files, head, about


def pair_difference(pair):
    """phi(winning) - phi(losing) in float32 `[d]` of one comparison in the Reddit TL;DR format."""
    return pair["embeddings"]["winning"][0].float() - pair["embeddings"]["losing"][0].float()


PRISM_FILES = ("train_embeddings.pkl", "test_embeddings.pkl")
PAIR_FORMAT = "one embedding per rejected response"


def _prism_rows(path):
    """The rows of an embeddings file, each checked for its user and for finite pairs; where each width was seen."""
    rows, width = load_pickle(path, "generate-prism-embeddings.py"), {}
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: not a list of rows; run generate-prism-embeddings.py --overwrite")
    for i, row in enumerate(rows):
        try:
            pairs = prism_pairs(row)
            usable = len(pairs) > 0 and bool(torch.isfinite(pairs).all())
            usable &= {"seen", "user_id", "dialog_id"} <= row["extra_info"].keys()
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
            usable = False
        if not usable:
            raise InputError(f"{path}, row {i}: no user, no embeddings, or NaN or infinite ones; run "
                             "generate-prism-embeddings.py --overwrite")
        width.setdefault(pairs.shape[1], f"{path}, row {i}")
    return rows, width


def load_prism(folder, model_name):
    """Read the embeddings of PRISM/generate-prism-embeddings.py (or of the released script) and the reward head.

    Returns (data, head `[d, 1]`, what is known of model and data). data is a dict: `seen` and `unseen`, user ids in
    order; one float32 `[m_i, d]` per user under `train`, `test`, `train_unseen`, `test_unseen`; `dialogs_unseen`, the
    conversation that each few-shot pair of an unseen user is from, int64 `[m_i]`.
    Raises InputError that names file and row: missing or damaged files, embeddings missing, not finite, of different
    widths or of other rows than data/prism/ beside them holds.
    """
    folder, data = Path(folder), {}
    (train, width), (test, width_of_test) = (_prism_rows(folder / name) for name in PRISM_FILES)
    head, about = find_reward_head(folder, model_name, "PRISM", PRISM_FILES)
    check_width({**width_of_test, **width}, head, folder, about.get("model", model_name))
    split_file = folder / "data" / "prism" / "split.json"
    if "identity" in about and split_file.exists():
        if load_json(split_file, "rows")["rows"] != about["identity"].get("data"):
            raise InputError(f"the embeddings in {folder} are of other rows than {split_file.parent} holds; run "
                             "generate-prism-embeddings.py --overwrite")
    malformed = sum("pair_format" not in row["extra_info"] for row in train + test)
    if malformed:
        print(f"{malformed:,} rows are in the released format, whose rejected side is malformed: all rejected "
              "responses of a turn as one printed list")
    for split, rows, name in (("train", train, PRISM_FILES[0]), ("test", test, PRISM_FILES[1])):
        for seen, suffix in ((True, ""), (False, "_unseen")):
            of_group = [row for row in rows if bool(row["extra_info"]["seen"]) == seen]
            users = list(_prism_dialogs(of_group))
            group = "seen" if seen else "unseen"
            if not users or data.setdefault(group, users) != users:
                raise InputError(f"{folder / name}: {len(users)} {group} users, {len(data.get(group, []))} in "
                                 f"{PRISM_FILES[0]}; make both files in one run of generate-prism-embeddings.py")
            data[split + suffix] = create_dataset_prism(of_group)
            if (split, seen) == ("train", False):
                data["dialogs_unseen"] = [
                    torch.tensor([n for n, of_dialog in enumerate(dialogs.values()) for row in of_dialog
                                  for _ in prism_pairs(row)]) for dialogs in _prism_dialogs(of_group).values()]
    return data, head, about


def check_width(width, head, folder, model_name):
    """Raise InputError unless all embeddings have the head's width. width: d -> where such an embedding was found."""
    if len(width) > 1:
        raise InputError("embeddings of different models: " + ", but ".join(
            f"d = {d} in {where}" for d, where in width.items()) + "; prepare all files with one model")
    d, = width
    if tuple(head.shape) != (d, 1):
        raise InputError(f"the reward head of {model_name} is of shape {tuple(head.shape)}, and the embeddings in "
                         f"{folder} have d = {d}; take both from one model")


def prism_pairs(row):
    """The pairs of one PRISM turn, chosen minus each rejected response: float32 `[rejected, d]`.

    row: a row of `train_embeddings.pkl`, of ours or (one vector for all rejected responses) of the released script.
    """
    chosen, rejected = (torch.as_tensor(row["extra_info"][side]).float() for side in
                        ("chosen_conv_embedding", "rejected_conv_embedding"))
    return chosen.reshape(1, -1) - rejected.reshape(-1, chosen.numel())


def _prism_dialogs(embeddings):
    """user -> conversation -> list of rows, users and conversations in order of their ids."""
    rows = embeddings if isinstance(embeddings, list) else [row for rows in embeddings.values() for row in rows]
    users = {}
    for row in rows:
        info = row["extra_info"]
        users.setdefault(info["user_id"], {}).setdefault(info["dialog_id"], []).append(row)
    return {user: {dialog: users[user][dialog] for dialog in sorted(users[user], key=str)}
            for user in sorted(users, key=str)}


def create_dataset_prism(embeddings):
    """The pairs of each PRISM user, users sorted by id: list of float32 `[m_i, d]`.

    embeddings: the list of rows of `train_embeddings.pkl`, or a dict of such lists.
    """
    return [torch.cat([prism_pairs(row) for rows in dialogs.values() for row in rows])
            for dialogs in _prism_dialogs(embeddings).values()]


def create_dataset_prism_shots(embeddings, shots, generator=None):
    """As `create_dataset_prism`, from `shots` conversations of each user, drawn anew at each call."""
    features = []
    for dialogs in _prism_dialogs(embeddings).values():
        drawn = torch.randperm(len(dialogs), generator=generator)[:shots].tolist()
        dialogs = list(dialogs.values())
        features.append(torch.cat([prism_pairs(row) for i in drawn for row in dialogs[i]]))
    return features


# ---------------------------------------------------------------------------------------------------------------------
# 3. The models
# ---------------------------------------------------------------------------------------------------------------------

TEMPERATURE = 100.0  # of the Bradley-Terry model, fixed
MOST_THREADS = 8  # of a training: each call between two products waits for Python's one lock
FEW_SHOT_ITERATIONS = 500


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of a sweep: `K` columns of the wide basis that all members are trained in, side by side."""
    K: int
    alpha: float = 0.0
    seed: int = 0

    def generator(self, step):
        """A generator of the member's own, so that its start does not depend on its neighbours in the sweep."""
        state = np.random.SeedSequence([self.seed, self.K, step]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def check_ranks(K_list, alpha_list):
    """Raise InputError unless K_list holds distinct whole numbers from 0 and alpha_list numbers from 0."""
    check_list("K_list", K_list)
    check_list("alpha_list", alpha_list)
    for K in K_list:
        if not is_whole(K):
            raise InputError(f"K_list: {K!r} is no rank; give whole numbers from 0")
    if len(set(K_list)) < len(K_list):
        raise InputError(f"K_list = {list(K_list)}: give each rank once")
    for alpha in alpha_list:
        if not is_number(alpha, 0, 1e15):  # beyond that the squared gradient overflows in Adam
            raise InputError(f"alpha_list: {alpha!r} is no penalty; give numbers from 0 to 1e15")
    if len(set(alpha_list)) < len(alpha_list):
        raise InputError(f"alpha_list = {list(alpha_list)}: give each penalty once; [0] for none")


def _array_library(device, d):
    """numpy or torch: whose products of few rows with few vectors of length d are faster on the device.

    On processors with AVX-512 numpy's OpenBLAS has kernels for SMALL_PRODUCTs that read their operands where they lie.
    Other libraries copy the operands first, which takes longer than the product itself.
    """
    return np if device.type == "cpu" and d >= 256 and torch.backends.cpu.get_cpu_capability() == "AVX512" else torch


class _Likelihood:
    """The Bradley-Terry likelihood of users' pairs under every member of a sweep at once, and its gradients.

    Letters: N users, G members, C columns of all members together; n blocks of up to m pairs in a batch, see `pack`.
    w `[N, C]` are the user weights (each member's columns sum to 1), V `[C, d]` the bases as rows.

    The margin x V w_i is taken as x (V w_i): one reward vector of each member meets the pairs of user i, not all K
    columns of its basis. Backwards, s_i, the sum of residual * x over the user's pairs, gives both derivatives, V^T s_i
    by w_i and s_i w_i^T by V. So X is multiplied with G columns instead of C, batch by batch, while it is in the cache.
    """

    def __init__(self, features, sizes, device=None, total=None):
        """features: list of `[m_i, d]`, one per user. sizes: K of each member. total: see `pack`."""
        batches, self.user = pack(features, device, total, len(sizes))
        self.sizes, self.d, device = list(sizes), features[0].shape[1], self.user.device
        self.by_user = self.user.argsort(stable=True)  # the blocks, in order of their users
        counts = self.user.bincount()
        self.first_of_user = counts.cumsum(0) - counts
        self.of_member = torch.block_diag(*(torch.ones(K, 1) for K in self.sizes)).to(device)  # (C, G), 0 and 1
        self.runs = [(K, len(list(members))) for K, members in itertools.groupby(self.sizes)]
        ends = list(itertools.accumulate(count for _, count in self.runs))
        self.run_members = [slice(end - count, end) for end, (_, count) in zip(ends, self.runs)]  # of each rank
        self.xp = _array_library(device, self.d)
        self.batches = [Batch(*map(self._array, (batch.X, batch.weight)), batch.blocks) for batch in batches]
        large = device.type == "cpu" and sum(batch.X.numel() for batch in batches) >= 2**20  # else waiting costs more
        threads = min(torch.get_num_threads(), MOST_THREADS, len(batches)) if large else 1
        self.shares, self.map = [self.batches[t::threads] for t in range(threads)], map

    @contextlib.contextmanager
    def workers(self):
        """While it lasts, each share of the batches has a thread of its own, and the libraries start no others.

        The libraries' settings are the process's: one training at a time.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            pool = ThreadPoolExecutor(len(self.shares), initializer=torch.set_num_threads, initargs=(1,))
            with threadpool_limits(1, "blas"), pool:
                self.map = pool.map if len(self.shares) > 1 else map
                yield
        finally:
            self.map = map
            torch.set_num_threads(threads)

    def weights(self, W):
        """User weights, the softmax over each member's logits: (N, C)."""
        return torch.cat([logits.softmax(1) for logits in W.split(self.sizes, 1)], 1)

    def loss(self, w, V):
        """Negative log-likelihood of each member: (G,)."""
        w, V = self._by_rank(w[self.user].T / TEMPERATURE), self._by_rank(V)
        losses = 0
        for batch in self.batches:
            margins, weight = (torch.as_tensor(values) for values in (self._margins(batch, w, V), batch.weight))
            losses -= (weight * logsigmoid(margins)).sum((1, 2))
        return losses

    def gradients(self, w, V, of_weights=True, of_basis=True):
        """Derivatives of the loss by w: (N, C), and by V: (C, d); None in place of one that is not asked for."""
        w_ranks, V_ranks = self._by_rank(w[self.user].T / TEMPERATURE), self._by_rank(V)
        by_weight = torch.empty(len(V), len(self.user), device=V.device)  # (C, blocks)
        by_weight_ranks = self._by_rank(by_weight)

        @np.errstate(over="ignore", invalid="ignore")  # exp(margin) is infinite from 88 on, and the residual 0
        def of_share(batches):
            by_basis, term = (torch.zeros(V.shape, device=V.device) for _ in range(2))
            total, term, term_ranks = self._array(by_basis), self._array(term), self._by_rank(term)
            for batch in batches:
                margins = self._margins(batch, w_ranks, V_ranks)
                residuals = -batch.weight / (1 + self.xp.exp(margins))  # (G, n, m)
                sums = self._empty(len(margins), len(batch.X), self.d)  # (G, n, d)
                for part in self._parts(batch):
                    self.xp.matmul(residuals[part].swapaxes(0, 1), batch.X, out=sums[part].swapaxes(0, 1))
                for i, members in enumerate(self.run_members):
                    if of_weights:  # V^T s_i
                        self.xp.matmul(V_ranks[i], sums[members].swapaxes(1, 2),
                                       out=by_weight_ranks[i][..., batch.blocks])
                    if of_basis:  # s_i w_i^T
                        self.xp.matmul(w_ranks[i][..., batch.blocks], sums[members], out=term_ranks[i])
                if of_basis:
                    total += term
            return by_basis

        by_basis = sum(self.map(of_share, self.shares))
        of_blocks = by_weight.T.contiguous() / TEMPERATURE
        return (embedding_bag(self.by_user, of_blocks, self.first_of_user, mode="sum") if of_weights else None,
                by_basis if of_basis else None)

    def gradient_of_logits(self, w, by_weight):
        """Derivative of the loss by W, through the softmax: (N, C)."""
        return w * (by_weight - (w * by_weight) @ self.of_member @ self.of_member.T)

    def _margins(self, batch, w_ranks, V_ranks):
        """x V w_i / 100 of a batch's pairs: (G, n, m). w_ranks are of w / 100."""
        v = self._empty(len(self.sizes), len(batch.X), self.d)  # (G, n, d), the reward vectors
        for members, w_k, V_k in zip(self.run_members, w_ranks, V_ranks):
            self.xp.matmul(w_k[..., batch.blocks].swapaxes(1, 2), V_k, out=v[members])
        margins = self._empty(len(v), *batch.X.shape[:2])
        for part in self._parts(batch):
            self.xp.matmul(v[part].swapaxes(0, 1), batch.X.swapaxes(1, 2), out=margins[part].swapaxes(0, 1))
        return margins

    def _parts(self, batch):
        """The members that go into one product with a batch's X: for numpy as many as keep it a SMALL_PRODUCT."""
        members = len(self.sizes)
        at_once = max(1, SMALL_PRODUCT // (batch.X.shape[1] * self.d)) if self.xp is np else members
        return [slice(first, first + at_once) for first in range(0, members, at_once)]

    def _by_rank(self, columns):
        """All members' columns as rows `[C, x]` -> an array (members, K, x) for each run of members of one rank."""
        parts = columns.contiguous().split([K * count for K, count in self.runs])
        return [self._array(part.view(count, K, -1)) for part, (K, count) in zip(parts, self.runs)]

    def _array(self, tensor):
        return tensor.numpy() if self.xp is np else tensor

    def _empty(self, *shape):
        return np.empty(shape, np.float32) if self.xp is np else torch.empty(shape, device=self.user.device)


def _squared_distance_gradient(V, V_sft, member_alpha):
    """Derivative of alpha * sum_j |V_j - V_sft|^2, per column: (C, d)."""
    return 2 * member_alpha * (V - V_sft)


def _cosine_gradient(V, V_sft, member_alpha, sizes):
    """Derivative of alpha * mean_j (1 - cos(V_j, V_sft)), per column: (C, d)."""
    length = V.norm(dim=1, keepdim=True)
    direction, reference = V / length, V_sft / V_sft.norm()
    cosine = direction @ reference.T  # (C, 1)
    return -member_alpha / sizes * (reference - cosine * direction) / length


def _ramp(t, num_iterations):
    """The share of alpha in iteration t: 0 for the first 20 %, then linear, all of it from 80 % on."""
    return min(max((t / num_iterations - 0.2) / 0.6, 0.0), 1.0)


CHECKPOINT_FILE, FEW_SHOT_CHECKPOINT_FILE = ".training.pt", ".vary_fewshot.pt"  # beside results, until these are there
CHECKPOINT_SECONDS = 60  # of training that an interruption loses at most


class _Checkpoint:
    """The file that a training leaves its state in, so that the same training, started again, goes on from there."""

    def __init__(self, path, likelihood, *settings):
        """settings: what else the training depends on; their printed form is compared."""
        self.path, self.saved = Path(path), time.monotonic()
        digest = hashlib.sha256()
        for batch in likelihood.batches:
            for values in (batch.X, batch.weight):
                digest.update(torch.as_tensor(values).cpu().contiguous().numpy())
        settings = (torch.__version__, likelihood.user.device.type, likelihood.user.tolist(), *settings)
        self.identity = digest.hexdigest() + digest_of(repr(settings))

    def load(self):
        """The state that `save` was given, None where there is none of this training."""
        with contextlib.suppress(InputError):  # missing, or damaged
            state = load_pickle(self.path)
            return state if isinstance(state, dict) and state.get("identity") == self.identity else None

    def is_due(self):
        return time.monotonic() - self.saved >= CHECKPOINT_SECONDS

    def save(self, **state):
        with atomic_write(self.path) as file:
            torch.save({"identity": self.identity, **state}, file)
        self.saved = time.monotonic()


class _Adam:
    """Adam (Kingma and Ba, 2015, algorithm 1) on one tensor, with torch.optim's defaults, whose first use alone costs
    a second and 80 MB of imports."""

    def __init__(self, variable, learning_rate):
        self.variable, self.learning_rate, self.steps = variable, learning_rate, 0
        self.mean, self.square = torch.zeros_like(variable), torch.zeros_like(variable)  # moments of the gradient

    def step(self, gradient):
        self.steps += 1
        self.mean.lerp_(gradient, 1 - 0.9)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        deviation = (self.square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        self.variable.addcdiv_(self.mean, deviation, value=-self.learning_rate / (1 - 0.9**self.steps))

    def state(self):
        return {"variable": self.variable, "mean": self.mean, "square": self.square, "steps": self.steps}

    def load(self, state):
        for name in ("variable", "mean", "square"):
            getattr(self, name).copy_(state[name])
        self.steps = state["steps"]


def _descend(likelihood, W, V, num_iterations, learning_rate, penalty=None, frozen=False, alternating=False,
             checkpoint=None):
    """Adam on the logits W `[N, C]` and, unless it is frozen, on the basis V `[C, d]`; both are changed in place.

    penalty(V, t) is the gradient of the penalty on V. Alternating: in each iteration one step on W, then one on V that
    sees the new W.
    """
    adam_W, adam_V = (_Adam(variable, learning_rate) for variable in (W, V))
    first = 0
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        first = state["iterations"]
        adam_W.load(state["W"])
        adam_V.load(state["V"])
        print(f"resuming the training after {first:,} of {num_iterations:,} iterations")
    bar = progress_bar("few-shot" if frozen else "training", num_iterations, initial=first, unit="it", leave=False)
    with bar, likelihood.workers():
        for t in range(first, num_iterations):
            w = likelihood.weights(W)
            by_weight, by_basis = likelihood.gradients(w, V, of_basis=not (frozen or alternating))
            adam_W.step(likelihood.gradient_of_logits(w, by_weight))
            if alternating:
                _, by_basis = likelihood.gradients(likelihood.weights(W), V, of_weights=False)
            if not frozen:
                if process_count() > 1:
                    dist.all_reduce(by_basis)
                adam_V.step(by_basis + penalty(V, t))
            if checkpoint is not None and (t + 1 == num_iterations or checkpoint.is_due()):
                checkpoint.save(iterations=t + 1, W=adam_W.state(), V=adam_V.state())
            bar.update()


@torch.no_grad()
def fit_basis(features, members, V_sft, num_iterations, learning_rate, regularized=False, device=None,
              checkpoint=None):
    """Learn basis and user weights of every member of a sweep together -> list of (w `[N, K]`, V `[d, K]`).

    features: list of float32 `[m_i, d]`, one per user. members: list of `Member`. V_sft: `[d, 1]`, needed where an
    alpha is not 0. The members share nothing but the reading of X: Adam is elementwise, their columns are independent
    (up to rounding: products of another width add in another order).
    regularized: the loss, start and alternating steps of `LoRe_regularized` instead of `LoRe`'s.
    device: where to train, default that of the features. checkpoint: a file that the training saves its state in every
    CHECKPOINT_SECONDS and at its end, to go on from there when it is started again after an interruption; the caller
    removes it when what follows is done.
    Under torchrun each process holds a part of the users, all return the whole, and nothing is saved on the way.
    """
    mine = slice(process_rank(), None, process_count())
    if len(features) < process_count():
        raise InputError(f"{len(features)} users for {process_count()} processes; start at most one process per user")
    sizes = [member.K for member in members]
    likelihood = _Likelihood(features[mine], sizes, device, sum(map(len, features)) if regularized else None)
    N, d, device = len(features), likelihood.d, likelihood.user.device
    W, V = [], []
    for member in members:
        generator = member.generator(0)
        W.append((torch.rand if regularized else torch.randn)(N, member.K, generator=generator))
        V.append(torch.randn(member.K, d, generator=generator))
    W, V = torch.cat(W, 1)[mine].to(device), torch.cat(V).to(device)  # (N, C), (C, d)
    if any(member.alpha for member in members) and (V_sft is None or not V_sft.any()):
        raise InputError("alpha is not 0 and V_sft is missing or all 0; give the reward head [d, 1]")
    if V_sft is not None and tuple(V_sft.shape) not in ((d, 1), (1, d), (d,)):
        raise InputError(f"V_sft: shape {tuple(V_sft.shape)} where {(d, 1)} should be; take head and embeddings from "
                         "one model")
    reference = (torch.zeros(d) if V_sft is None else V_sft).to(device, torch.float32).reshape(1, -1)
    alpha = torch.tensor([float(m.alpha) for m in members for _ in range(m.K)], device=device)[:, None]  # (C, 1)
    columns = torch.tensor([m.K for m in members for _ in range(m.K)], device=device)[:, None]

    def penalty(V, t):
        if not any(member.alpha for member in members):
            return 0
        if regularized:
            return _ramp(t, num_iterations) * _cosine_gradient(V, reference, alpha, columns)
        return _squared_distance_gradient(V, reference, alpha)

    if checkpoint is not None and process_count() == 1:
        checkpoint = _Checkpoint(checkpoint, likelihood, members, num_iterations, learning_rate, regularized,
                                 reference.flatten().tolist())
    else:
        checkpoint = None
    _descend(likelihood, W, V, num_iterations, learning_rate, penalty, alternating=regularized, checkpoint=checkpoint)
    if not V.isfinite().all():
        if checkpoint is not None:
            checkpoint.path.unlink(missing_ok=True)
        raise InputError("the training has diverged, its basis is NaN or infinite; give a smaller alpha, or pairs of "
                         "smaller numbers")
    w = torch.zeros(N, sum(sizes), device=device)
    w[mine] = likelihood.weights(W)
    if process_count() > 1:
        dist.all_reduce(w)
    return [(w_k, V_k.T) for w_k, V_k in zip(w.split(sizes, 1), V.split(sizes))]


def _scores(features, V):
    """X_i V of each user in turn, `[m_i, C]`; the rows of a table that users share are multiplied once."""
    table = scores = None
    for X in features:
        if not isinstance(X, Pairs):
            yield X.to(V.device, V.dtype) @ V
            continue
        if X.embeddings is not table:
            table, scores = X.embeddings, X.table_scores(V)
        yield X.of_table(scores)


@torch.no_grad()
def _fit_weights(scores, members, num_iterations, learning_rate):
    """User weights under frozen bases of one rank -> w `[N, K]` of each of the members in turn.

    scores: X_i V `[m_i, K]` of each user under the first member's basis, then under the next one's. They take the place
    of the pairs, and the identity that of the basis: S = S I. A user is then another one under each member.
    """
    K, N = members[0].K, len(scores) // len(members)
    W = torch.cat([torch.randn(N, K, generator=member.generator(1)) for member in members]).to(scores[0].device)
    likelihood = _Likelihood(scores, [K])
    _descend(likelihood, W, torch.eye(K, device=W.device), num_iterations, learning_rate, frozen=True)
    return likelihood.weights(W).split(N)


def fit_users(features, members, bases, num_iterations, learning_rate):
    """Few-shot fit of new users: their weights over each of several frozen bases -> list of w `[N, K]`.

    features: list of `[m_i, d]` or Pairs, one per user; members and bases: one Member and one V `[d, K]` each.
    X V is computed once, so an iteration works on K numbers a pair.
    """
    members = [dataclasses.replace(member, K=V.shape[1]) for member, V in zip(members, bases)]
    of_user = [S.split([member.K for member in members], 1) for S in _scores(features, torch.cat(bases, 1))]
    of_member, found = list(zip(*of_user)), {}
    for K in dict.fromkeys(member.K for member in members):
        same = [i for i, member in enumerate(members) if member.K == K]
        w = _fit_weights([S for i in same for S in of_member[i]], [members[i] for i in same], num_iterations,
                         learning_rate)
        found.update(zip(same, w))
    return [found[i] for i in range(len(members))]


def _checked_member(num_basis_vectors, alpha, seed, num_iterations):
    """The Member of a model that is trained alone; raises InputError where a setting has no meaning."""
    check_ranks([num_basis_vectors], [alpha])
    for name, value, least in (("num_basis_vectors", num_basis_vectors, 1), ("seed", seed, 0),
                               ("num_iterations", num_iterations, 0)):
        check_whole(name, value, least)
    return Member(num_basis_vectors, float(alpha), seed)


class LoRe:
    """Low-rank reward model: basis and user weights by one Adam on both.

    Loss: the sum over users of the user's mean negative log-likelihood, plus alpha * sum_j |V_j - V_sft|^2.
    V_sft: `[d, 1]` (None where alpha is 0). num_classes: users N; num_features: d; num_basis_vectors: K.
    """
    regularized = False

    def __init__(self, V_sft, alpha, num_classes, num_features, num_basis_vectors, num_iterations=1000,
                 learning_rate=0.5, seed=0):
        self.V_sft, self.num_classes, self.num_features = V_sft, num_classes, num_features
        self.num_iterations, self.learning_rate = num_iterations, learning_rate
        self.member = _checked_member(num_basis_vectors, alpha, seed, num_iterations)

    def train(self, features):
        """features: list of float32 `[m_i, d]`, one per user. Returns (softmax(W) `[N, K]`, V `[d, K]`).

        Raises InputError: features of other users or widths than announced, empty or not finite.
        """
        check_features(features, "features", self.num_classes, self.num_features)
        return fit_basis(features, [self.member], self.V_sft, self.num_iterations, self.learning_rate,
                         self.regularized)[0]


class LoRe_regularized(LoRe):
    """LoRe with alternating steps and a cosine anchor: in each iteration one Adam step on W, then one on V.

    Loss: the mean negative log-likelihood of all pairs, plus alpha_t * mean_j (1 - cos(V_j, V_sft)), where alpha_t is
    0 for the first 20 % of the iterations, rises linearly and is alpha from 80 % on. The penalty on one column is so
    alpha / K. `train` leaves out columns whose largest user weight is below `threshold` (0 keeps all).
    """
    regularized = True

    def __init__(self, V_sft, alpha, num_classes, num_features, num_basis_vectors, num_iterations=20000,
                 learning_rate=0.5, seed=0, threshold=1e-2):
        super().__init__(V_sft, alpha, num_classes, num_features, num_basis_vectors, num_iterations, learning_rate,
                         seed)
        self.threshold = threshold

    def train(self, features):
        """As `LoRe.train`, without the columns that no user gives a weight of `threshold` or more."""
        return prune(*super().train(features), self.threshold)


def prune(w, V, threshold):
    """Keep the columns whose largest user weight reaches `threshold`, at least the largest -> (w, V)."""
    largest = w.max(0).values
    keep = (largest >= threshold) | (largest == largest.max())
    return w[:, keep], V[:, keep]


class PersonalizeBatch:
    """Few-shot fit of new users' weights with the basis V frozen, from logits drawn from N(0, 1).

    Loss: the sum over users of the user's mean negative log-likelihood.
    """

    def __init__(self, num_classes, num_features, num_basis_vectors, num_iterations=FEW_SHOT_ITERATIONS,
                 learning_rate=0.1, seed=0):
        self.num_classes, self.num_features = num_classes, num_features
        self.num_iterations, self.learning_rate = num_iterations, learning_rate
        self.member = _checked_member(num_basis_vectors, 0.0, seed, num_iterations)

    def train(self, features, V):
        """features: list of `[m_i, d]`, one per user; V: `[d, K]`. Returns a list of N simplex vectors `[K]`."""
        check_features(features, "features", self.num_classes, self.num_features)
        if tuple(V.shape) != (self.num_features, self.member.K):
            raise InputError(f"V: shape {tuple(V.shape)} where {(self.num_features, self.member.K)} should be")
        if V.dtype != torch.float32 or not torch.isfinite(V).all():
            raise InputError("V: not float32, or NaN or infinite values; give a trained basis")
        return list(fit_users(features, [self.member], [V], self.num_iterations, self.learning_rate)[0])


def solve(features, K, num_iterations=1000, learning_rate=0.01, seed=0):
    """Train `LoRe` without a penalty -> (softmax(W) `[N, K]`, V `[d, K]`)."""
    return solve_regularized(None, 0.0, features, K, num_iterations, learning_rate, seed)


def solve_regularized(V_sft, alpha, features, K, num_iterations=1000, learning_rate=0.01, seed=0):
    """Train `LoRe` -> (softmax(W) `[N, K]`, V `[d, K]`)."""
    return LoRe(V_sft, alpha, len(features), features[0].shape[1], K, num_iterations, learning_rate,
                seed).train(features)


def solve_regularized_simplex(V_sft, alpha, features, K, num_iterations=1000, learning_rate=0.01, seed=0):
    """Train `LoRe_regularized` -> (softmax(W) `[N, kept]`, V `[d, kept]`), kept <= K columns."""
    return LoRe_regularized(V_sft, alpha, len(features), features[0].shape[1], K, num_iterations, learning_rate,
                            seed).train(features)


def learn_multiple_few_shot(features, V, num_iterations=FEW_SHOT_ITERATIONS, learning_rate=0.1, seed=0):
    """Train `PersonalizeBatch` -> list of N simplex vectors `[K]`."""
    return PersonalizeBatch(len(features), *V.shape, num_iterations, learning_rate, seed).train(features, V)


def learn_single_reward(features, num_iterations=1000, learning_rate=0.01, seed=0):
    """One Bradley-Terry model for all users, LoRe at K = 1 -> V `[d, 1]`. A baseline."""
    return solve(features, 1, num_iterations, learning_rate, seed)[1]


@torch.no_grad()
def learn_multiple(features, num_iterations=1000, learning_rate=0.01, seed=0):
    """A Bradley-Terry model of each user's own -> (N weights `[1]`, all 1, and N bases `[d, 1]`). A baseline."""
    check_features(features, "features")
    features = [X.dense() if isinstance(X, Pairs) else X for X in features]
    X = pad_sequence(features, batch_first=True)  # (N, m, d)
    weight = pad_sequence([torch.full((len(X),), 1 / len(X), device=X.device) for X in features], batch_first=True)
    V = torch.randn(len(X), X.shape[2], generator=Member(1, seed=seed).generator(0)).to(X.device)  # (N, d)
    adam = _Adam(V, learning_rate)
    for _ in range(num_iterations):
        margins = (X @ V[:, :, None])[:, :, 0] / TEMPERATURE  # (N, m)
        residuals = -torch.sigmoid(-margins) * weight / TEMPERATURE
        adam.step((residuals[:, None, :] @ X)[:, 0])
    return [torch.ones(1, device=X.device) for _ in V], [v[:, None] for v in V]


# ---------------------------------------------------------------------------------------------------------------------
# 4. Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def evaluate_model(X, V, w):
    """The fraction of pairs with a positive margin x V w, a float.

    X: `[m, d]` or Pairs; V: `[d, K]`; w: `[K]`.
    """
    margins = next(_scores([X], V)) @ torch.as_tensor(w, dtype=V.dtype, device=V.device).reshape(-1)
    return (margins > 0).float().mean().item()


def eval_multiple(W_list, V_list, features):
    """`evaluate_model` for every user -> list of accuracies; prints their mean and standard deviation.

    W_list: one w `[K]` per user; V_list: one V `[d, K]` per user.
    """
    if not len(W_list) == len(V_list) == len(features) > 0:
        raise InputError(f"{len(W_list)} weights and {len(V_list)} bases for {len(features)} users; give one of each "
                         "per user")
    accuracies = [evaluate_model(X, V, w) for w, V, X in zip(W_list, V_list, features)]
    _print_accuracy(accuracies)
    return accuracies


def _print_accuracy(accuracies):
    print(f"Average accuracy: {np.mean(accuracies):.4f}")
    print(f"Standard deviation of accuracy: {np.std(accuracies):.4f}")


def _accuracies(features, bases, weights):
    """Accuracy of each user under each of G models: float64 array `[G, N]`.

    features: list of `[m_i, d]` or Pairs; bases: G tensors `[d, K]`; weights: G tensors `[N, K]`.
    """
    sizes = [V.shape[1] for V in bases]
    V, w = torch.cat([V.T for V in bases]).T, torch.cat(weights, 1)  # (d, C), (N, C)
    of_member = torch.block_diag(*(torch.ones(K, 1) for K in sizes)).to(V.device)  # (C, G)
    right = [((S * w[i]) @ of_member > 0).double().mean(0) for i, S in enumerate(_scores(features, V))]
    return torch.stack(right, 1).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# 5. Pipelines
# ---------------------------------------------------------------------------------------------------------------------

SETTINGS = ("Train Performance", "Seen User Unseen Prompts", "Few Shot Train Performance", "Unseen User Unseen Prompts")


@dataclasses.dataclass
class Fit:
    """What a pipeline found at one rank, one alpha, one seed."""
    K: int
    alpha: float
    seed: int
    V: torch.Tensor  # (d, columns), the basis
    W: torch.Tensor  # (N, columns), weights of the seen users
    W_unseen: torch.Tensor  # (N_unseen, columns), weights of the unseen users
    accuracies: dict  # setting -> float64 array, one accuracy per user


def _reference(V_final, device):
    """The reward head as float32 `[d, 1]` on the device; raises InputError where it is not finite."""
    if not isinstance(V_final, (torch.Tensor, np.ndarray)) or max(V_final.shape, default=0) < math.prod(V_final.shape):
        raise InputError(f"V_final: {getattr(V_final, 'shape', V_final)} where a reward head [d, 1] should be")
    V_final = torch.as_tensor(V_final).to(device, torch.float32).reshape(-1, 1)
    if not torch.isfinite(V_final).all() or not V_final.any():
        raise InputError("V_final: NaN or infinite values, or all zero; read the reward head again")
    return V_final


def _members(K_list, alpha_list, seeds):
    """The members of a sweep: alpha outer, rank, seed inner. A whole alpha stays whole, as it is printed."""
    alphas = [alpha if isinstance(alpha, int) else float(alpha) for alpha in alpha_list]
    return [Member(int(K), alpha, seed) for alpha in alphas for K in K_list for seed in seeds]


def _sweep(K_list, alpha_list, V_final, features, users, device, seed, num_iterations, few_shot_learning_rate,
           regularized=False, threshold=0.0, checkpoint=None):
    """Train and evaluate every rank, alpha and seed -> list of Fit: alpha outer, rank, seed inner.

    features: four lists, of the train and test pairs of the seen, then of the unseen users; users: (N, N_unseen).
    """
    check_ranks(K_list, alpha_list)
    device = torch.device(device)
    V_final = _reference(V_final, device)
    for what, part, N in zip(("train_features", "test_features_sparse", "train_features_unseen",
                              "test_features_sparse_unseen"), features, (users[0], users[0], users[1], users[1])):
        check_features(part, what, N, len(V_final))
    check_whole("num_iterations", num_iterations)
    if not is_number(threshold, 0, 1):
        raise InputError(f"threshold = {threshold!r}: give a number from 0, which keeps all columns, to 1")
    members = _members(K_list, alpha_list, check_seeds(seed))
    train, _, train_unseen, _ = features

    def ones(N):
        return torch.ones(N, 1, device=device)

    trained = [m for m in members if m.K > 0]
    bases = dict(zip(trained, fit_basis(train, trained, V_final, num_iterations, 0.5, regularized, device, checkpoint)
                     if trained else []))
    bases = {m: prune(w, V, threshold) for m, (w, V) in bases.items()}
    bases.update({m: (ones(len(train)), V_final) for m in members if m.K == 0})
    personal = [m for m in members if bases[m][1].shape[1] > 1]
    weights = dict(zip(personal, fit_users(train_unseen, personal, [bases[m][1] for m in personal],
                                           FEW_SHOT_ITERATIONS, few_shot_learning_rate) if personal else []))
    fits = [Fit(m.K, m.alpha, m.seed, bases[m][1], bases[m][0], weights.get(m, ones(len(train_unseen))), {})
            for m in members]
    for setting, part, of in zip(SETTINGS, features, ("W", "W", "W_unseen", "W_unseen")):
        for fit, accuracies in zip(fits, _accuracies(part, [f.V for f in fits], [getattr(f, of) for f in fits])):
            fit.accuracies[setting] = accuracies
    return fits


def _report(fits, lines):
    """Print each model's accuracies and return the eight arrays of `run`; seeds are averaged user by user."""
    groups = {}
    for fit in fits:
        groups.setdefault((fit.alpha, fit.K), []).append(fit)
    means, bands = ([[] for _ in SETTINGS] for _ in range(2))
    for group in groups.values():
        for label, field in lines:
            print(label, ":", getattr(group[0], field))
        for i, setting in enumerate(SETTINGS):
            print(setting)
            accuracies = np.mean([fit.accuracies[setting] for fit in group], 0)  # (users,)
            _print_accuracy(accuracies)
            means[i].append(np.mean(accuracies))
            bands[i].append(np.std(accuracies) / 4)
    return tuple(np.array(values) for values in means + bands)


def run(K_list, alpha_list, V_final, train_features, test_features_sparse, train_features_unseen,
        test_features_sparse_unseen, N, N_unseen, device, seed=0, num_iterations=1000, fits=None, checkpoint=None):
    """Sweep ranks and penalties: learn LoRe on the seen users, fit the unseen few-shot, evaluate and print.

    K_list: ranks; 0 is the reference model (V_final, every weight 1), 1 the pooled Bradley-Terry model.
    alpha_list: penalties of `LoRe`. V_final: the reward head, float32 `[d, 1]`.
    The four features: one float32 `[m_i, d]` (or Pairs) per user; N and N_unseen: how many users.
    seed: whole number, or several whose accuracies are averaged; all are trained together.
    fits: a list that is extended with a `Fit` per alpha, rank and seed. checkpoint: see `fit_basis`.

    Returns 8 arrays of length len(alpha_list) * len(K_list), alpha outer: the mean accuracy over users of the four
    SETTINGS, then for each a quarter of the standard deviation over users. Raises InputError on unusable arguments.
    """
    found = _sweep(K_list, alpha_list, V_final, (train_features, test_features_sparse, train_features_unseen,
                   test_features_sparse_unseen), (N, N_unseen), device, seed, num_iterations, 0.1,
                   checkpoint=checkpoint)
    if fits is not None:
        fits.extend(found)
    return _report(found, [("K", "K")])


def run_regularized(K_list, alpha_list, V_final, train_features, test_features_sparse, train_features_unseen,
                    test_features_sparse_unseen, N, N_unseen, device, seed=0, num_iterations=20000, threshold=1e-2,
                    fits=None, checkpoint=None):
    """`run` with `LoRe_regularized`: alternating steps, a cosine anchor to V_final, unused columns left out.

    threshold: leave out columns whose largest weight among the seen users is below it; 0 keeps all.
    """
    found = _sweep(K_list, alpha_list, V_final, (train_features, test_features_sparse, train_features_unseen,
                   test_features_sparse_unseen), (N, N_unseen), device, seed, num_iterations, 0.5, True, threshold,
                   checkpoint)
    if fits is not None:
        fits.extend(found)
    return _report(found, [("alpha", "alpha"), ("Rank", "K")])


def run_few_shot_vary_shots(trials, alpha_list, K_list, num_shots, train_features, train_features_unseen,
                            test_features_sparse_unseen, V_final, N, N_unseen, device, seed=0, num_iterations=500,
                            groups=None, checkpoint=None):
    """How the accuracy on unseen users grows with the number of pairs that they are fitted from.

    trials: how often each number of shots is drawn anew; num_shots: list of whole numbers. Otherwise as `run`.
    groups: for each unseen user an int64 `[m_i]` that names the group of each pair, such as its conversation, numbered
    from 0; a shot is then a whole group. checkpoint: see `fit_basis`.
    Returns 4 lists over num_shots (for each alpha and rank in turn, where there are several): mean and standard
    deviation over trials of the few-shot train accuracy, then of the accuracy on unseen users' unseen prompts.
    """
    check_ranks(K_list, alpha_list)
    check_list("num_shots", num_shots)
    check_whole("trials", trials)
    check_whole("num_iterations", num_iterations)
    for shots in num_shots:
        check_whole("num_shots", shots)
    if groups is not None:
        if len(groups) != len(train_features_unseen):
            raise InputError(f"groups: of {len(groups)} users, and there are {len(train_features_unseen)} unseen ones")
        for i, (group, X) in enumerate(zip(groups, train_features_unseen)):
            if len(group) != len(X) or set(group.tolist()) != set(range(int(group.max()) + 1)):
                raise InputError(f"groups, user {i}: {len(group)} numbers for {len(X)} pairs; give each pair the "
                                 "number of its group, counted from 0 without a gap")
    V_final = _reference(V_final, device)
    for what, part, users in (("train_features", train_features, N), ("train_features_unseen", train_features_unseen,
                              N_unseen), ("test_features_sparse_unseen", test_features_sparse_unseen, N_unseen)):
        check_features(part, what, users, len(V_final))
    check_whole("seed", seed, 0)
    members = _members(K_list, alpha_list, [int(seed)])
    trained = [m for m in members if m.K > 0]
    bases = dict(zip(trained, fit_basis(train_features, trained, V_final, num_iterations, 0.5, device=device,
                                        checkpoint=checkpoint) if trained else []))
    results = ([], [], [], [])
    for member in members:
        V = bases[member][1] if member.K else V_final
        print("K :", member.K)
        S_train, S_test = (list(_scores(part, V)) for part in (train_features_unseen, test_features_sparse_unseen))
        for shots in num_shots:
            generator = member.generator(2 + shots)
            drawn = [S for _ in range(trials) for S in sample_shots(S_train, shots, generator, groups)]
            w = torch.ones(len(drawn), 1, device=V.device)
            if member.K > 1:
                w = _fit_weights(drawn, [member], FEW_SHOT_ITERATIONS, 0.1)[0]
            w = w.reshape(trials, N_unseen, -1)
            train = [(S @ w[i // N_unseen, i % N_unseen] > 0).double().mean().item() for i, S in enumerate(drawn)]
            test = torch.stack([(S @ w[:, i].T > 0).double().mean(0) for i, S in enumerate(S_test)])  # (users, trials)
            print("Shots :", shots)
            for i, (setting, values) in enumerate(zip(SETTINGS[2:], (np.reshape(train, (trials, -1)).mean(1),
                                                                     test.mean(0).cpu().numpy()))):
                print(setting)
                _print_accuracy(values)
                results[2 * i].append(float(np.mean(values)))
                results[2 * i + 1].append(float(np.std(values)))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# 6. Results and plots
# ---------------------------------------------------------------------------------------------------------------------


def _versions():
    """The versions that a result depends on."""
    from importlib.metadata import version
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", "safetensors")}}


def save_json(path, content):
    """Write a dict as indented JSON."""
    with atomic_write(path) as file:
        file.write((_json(content, indent=1) + "\n").encode())


def _counts(data):
    """Users, pairs and width behind a result; data: as `save_results` takes it."""
    return {"seen users": len(data["seen"]), "unseen users": len(data["unseen"]),
            **{f"{part.replace('_', ' ')} pairs": sum(map(len, data[part]))
               for part in ("train", "test", "train_unseen", "test_unseen")},
            "d": data["train"][0].shape[1]}


def save_results(folder, fits, data, config, seconds):
    """Write what a sweep found: `results.json`, one safetensors file per Fit, `accuracy_by_rank.png`.

    data: a dict of the users' ids, `seen` and `unseen`, in the order of the rows of W and W_unseen, and of the
    features, `train`, `test`, `train_unseen`, `test_unseen`. config: what the reader set, a dict of JSON values;
    `config["data"]` names the data in the plot. seconds: of training and evaluation.
    The training's checkpoint in `folder`, no longer needed then, is removed.
    """
    entries, user_ids, unseen_user_ids, versions = [], data["seen"], data["unseen"], _versions()
    several = {field: len({getattr(fit, field) for fit in fits}) > 1 for field in ("alpha", "seed")}
    with together(folder) as new:
        for fit in fits:
            name = f"K_{fit.K}" + "".join(f"_{f}_{getattr(fit, f)}" for f in ("alpha", "seed") if several[f])
            save_tensors(new / f"{name}.safetensors", {"V": fit.V, "W": fit.W, "W_unseen": fit.W_unseen}, K=fit.K,
                         alpha=fit.alpha, seed=fit.seed, users=user_ids, unseen_users=unseen_user_ids,
                         versions=versions)
            entries.append({
                "K": fit.K, "alpha": fit.alpha, "seed": fit.seed, "columns": fit.V.shape[1],
                "file": f"{name}.safetensors",
                "mean_accuracy": {s: float(a.mean()) for s, a in fit.accuracies.items()},
                "std_over_users": {s: float(a.std()) for s, a in fit.accuracies.items()},
                "accuracy_of_user": {s: dict(zip(unseen_user_ids if s in SETTINGS[2:] else user_ids, a.tolist()))
                                     for s, a in fit.accuracies.items()}})
        save_json(new / "results.json", {
            "config": config, "seeds": sorted({fit.seed for fit in fits}), "versions": versions, "seconds": seconds,
            "counts": _counts(data), "users": user_ids, "unseen_users": unseen_user_ids, "fits": entries})
        plot_accuracy_by_rank(new / "accuracy_by_rank.png", fits, config["data"])
    (Path(folder) / CHECKPOINT_FILE).unlink(missing_ok=True)


def print_table(fits):
    """The closing table: a line per rank, a column per setting, means over users and seeds."""
    print(f"\n{'K':>4} {'alpha':>8} " + " ".join(f"{s.replace(' Performance', ''):>26}" for s in SETTINGS))
    for alpha, K in dict.fromkeys((fit.alpha, fit.K) for fit in fits):
        group = [fit for fit in fits if (fit.alpha, fit.K) == (alpha, K)]
        cells = (np.mean([fit.accuracies[s].mean() for fit in group]) for s in SETTINGS)
        print(f"{K or 'ref':>4} {alpha:>8g} " + " ".join(f"{cell:>26.4f}" for cell in cells))


def _save_figure(path, title, xlabel, draw):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel="accuracy")
    draw(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def plot_accuracy_by_rank(path, fits, title):
    """Accuracy against rank, a curve per setting (and alpha); band: a quarter of the standard deviation over users."""
    alphas = list(dict.fromkeys(fit.alpha for fit in fits))
    ranks = sorted({fit.K for fit in fits})

    def draw(axes):
        for alpha in alphas:
            for color, setting in enumerate(SETTINGS):
                of_user = np.array([np.mean([fit.accuracies[setting] for fit in fits
                                             if (fit.alpha, fit.K) == (alpha, K)], 0) for K in ranks])
                mean, band = of_user.mean(1), of_user.std(1) / 4
                label = setting.replace(" Performance", "") + (f", alpha {alpha:g}" if len(alphas) > 1 else "")
                axes.plot(range(len(ranks)), mean, f"C{color}", marker="o", label=label,
                          linestyle=("-", "--", ":", "-.")[alphas.index(alpha) % 4])
                axes.fill_between(range(len(ranks)), mean - band, mean + band, color=f"C{color}", alpha=0.15)
        axes.set_xticks(range(len(ranks)), ["ref" if K == 0 else str(K) for K in ranks])

    _save_figure(path, title, "rank K", draw)


def save_few_shot_curves(folder, curves, data, config):
    """Write what `run_few_shot_vary_shots` returned: `vary_fewshot.json` and `vary_fewshot.png`.

    data: as for `save_results`. config: what the reader set, with K_list, alpha_list, num_shots, and `data` for the
    plot's title. The training's checkpoint in `folder`, no longer needed then, is removed.
    """
    shots = config["num_shots"]
    models = [(alpha, K) for alpha in config["alpha_list"] for K in config["K_list"]]
    names = ("few_shot_train_mean", "few_shot_train_std", "unseen_mean", "unseen_std")
    found = [{"K": K, "alpha": alpha, **{name: curve[i * len(shots):(i + 1) * len(shots)]
                                         for name, curve in zip(names, curves)}}
             for i, (alpha, K) in enumerate(models)]

    def draw(axes):
        axes.set_xticks(shots)
        for model in found:
            of = f", K = {model['K']}" + (f", alpha {model['alpha']:g}" if len(config["alpha_list"]) > 1 else "")
            for label, name in (("few-shot train", "few_shot_train"), ("unseen prompts", "unseen")):
                axes.errorbar(shots, model[f"{name}_mean"], model[f"{name}_std"], marker="o", capsize=3,
                              label=label + of)

    of_shot = config.get("shots_are", "pairs")
    with together(folder) as new:
        save_json(new / "vary_fewshot.json", {
            "config": config, "versions": _versions(), "counts": _counts(data), "users": data["seen"],
            "unseen_users": data["unseen"], "curves": found})
        _save_figure(new / "vary_fewshot.png", config["data"], f"{of_shot} per unseen user", draw)
    (Path(folder) / FEW_SHOT_CHECKPOINT_FILE).unlink(missing_ok=True)
