"""LoRe: low-rank reward modelling for personalised language models (arXiv 2504.14439).

What the scripts of the three data sets share, in nine parts, each using only those above it:

    1. Errors and files           one line for what a user can mend; whole files; hostile ones refused (`load_pickle`)
    2. Reward model               the frozen model, its head, its identity; files of embeddings
    3. Embedding                  phi(prompt, response), every token once (`embed_conversations`); the model's proof
    4. Preference pairs           rows of others' files; differences of embeddings, shots, simulated users
    5. The models                 the loss (`Likelihood`), its kernel (`_gradients`), few-shot fit (`fit_users`)
    6. Evaluation and evidence    accuracies of personalised rewards; is it personal, by how much
    7. Pipelines                  run, run_regularized, run_few_shot_vary_shots; baselines; what prepare.py begins with
    8. Results and plots          JSON, safetensors, CSV, report.md, pictures
    9. Use                        exported reward models, rewards for trainers, new users, which question to ask

In formulas: x = phi(chosen) - phi(rejected) is a preference pair of user i, V (d x K) the shared reward basis,
w_i = softmax(W_i) that user's weights, m = x V w_i / 100 the margin, and P(chosen beats rejected) = sigmoid(m).
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import functools
import glob
import gzip
import hashlib
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
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path

import numba
import numpy as np
import pandas as pd
import pydantic
import safetensors.torch
import torch
import torch.distributed as dist
from torch.nn.functional import cosine_similarity, logsigmoid, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# 1. Errors and files
# ---------------------------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """Input that cannot be used; its message is one line that says what, where and the remedy."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))


WHOLE, POSITIVE = (Integral, 0, 2**32 - 1), (Integral, 1, 2**32 - 1)
RULES = {  # for what stands at the top of a script, or is given to a function; of lists, for each value
    **dict.fromkeys(("seed", "split_seed", "population_seed", "seeds", "question_seeds", "test_seed", "K_list",
                     "num_iterations"), WHOLE),
    **dict.fromkeys(("N", "N_unseen", "trials", "train_pairs", "unseen_pairs", "num_basis_vectors", "shots", "num_shots",
                     "num_questions", "limit", "top_k", "token_budget", "shard_size", "max_length", "batch_size"), POSITIVE),
    "fewest_conversations": (Integral, 2, 2**32 - 1), "alpha_list": (Real, 0, 1e15), "learning_rate": (Real, 1e-9, 1e9),
    "threshold": (Real, 0, 1), "validation_share": (Real, 0, 0.9), "seen_share": (Real, 0.01, 0.99),
    "test_share": (Real, 0.01, 0.99), "concentration": (Real, 1e-6, 1e6), "fractions": (Real, 1e-9, 1),
    "head_bias": (Real, -1e6, 1e6)}


def check_settings(**settings):
    """Check settings by their names, before any data are loaded. Raises InputError that names the setting."""
    for name, value in settings.items():
        kind, least, most = RULES[name.lstrip("-")]
        is_list = name in ("K_list", "alpha_list", "seeds", "question_seeds", "num_shots", "fractions")
        if is_list and (not isinstance(value, (list, tuple, range, np.ndarray)) or len(value) == 0):
            raise InputError(f"{name}: {value!r}; give a list of one value or more")
        for one in value if is_list else [value]:
            if not isinstance(one, kind) or isinstance(one, bool) or not least <= one <= most:
                raise InputError(f"{name}: {one!r}; give a {'whole ' * (kind is Integral)}number from {least} to {most}")
        if is_list and name != "fractions" and len(set(value)) < len(value):
            raise InputError(f"{name}: {list(value)}; give each value once")


def run_script(main):
    """Call a script's main(). What the reader can mend ends in one line on stderr and exit status 2, Ctrl-C in 130;
    under torchrun only the first process prints."""
    if process_rank() > 0 or sys.stdout is None:  # None: closed by the shell
        sys.stdout = open(os.devnull, "w")
    status = 2
    try:
        main()
        sys.stdout.flush()
        return
    except (InputError, torch.cuda.OutOfMemoryError) as error:
        message = " ".join(str(error).split())
    except KeyboardInterrupt:
        status = 130
        message = "interrupted: finished files and embeddings are kept, run the same command again to resume"
    except OSError as error:
        if error.filename is None:  # standard output: a closed pipe, a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        message = f"{error.filename or 'standard output'}: {error.strerror or error}; free or choose another place"
    print("error:", message, file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def atomic_write(path):
    """Open `path` for writing bytes. The file appears under its name complete or not at all.
    Raises OSError that names `path` (disk full, read-only); the file that stood there before is then untouched."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")  # others may write the same
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
def together(folder, replaces=()):
    """A folder to write files in, which move to `folder` once all are there: never do those of two runs stand mixed.
    replaces: patterns of names whose files in `folder` go when the new ones come."""
    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".new-*"):
        if time.time() - left.stat().st_mtime > 3600:  # of a run that was killed, not of one beside this
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


def _json(content, **options):
    """JSON of plain values, with arrays, numpy's numbers and ranges as lists and numbers."""
    return json.dumps(content, default=lambda v: v.tolist() if hasattr(v, "tolist") else list(v), **options)


def save_text(path, text):
    """Write a text file."""
    with atomic_write(path) as file:
        file.write(text.encode())


def save_json(path, content):
    """Write a dict as indented JSON."""
    save_text(path, _json(content, indent=1) + "\n")


def load_json(path, *keys):
    """Read a JSON object. Raises InputError where the file is missing or damaged, or lacks one of `keys`."""
    with _readable(path, "JSON object"):
        content = json.loads(Path(path).read_text())
        return {**content, **{key: content[key] for key in keys}}


@contextlib.contextmanager
def _readable(path, kind, written_by="prepare.py"):
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
        file.write(safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                                          {"about": _json(about)}))  # one entry: several come in an order that varies


def load_tensors(path):
    """Read what `save_tensors` wrote -> (dict of tensors, dict). Raises InputError where the file is damaged."""
    with _readable(path, "safetensors file"), safetensors.safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, about


# Before torch 2.6 an archive could pass weights_only: there none is read, and none written.
ARCHIVES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how torch.save's files without an archive begin
_PLAIN_GLOBALS = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("torch", "Size"),
                  ("collections", "OrderedDict"), ("builtins", "set"), ("__builtin__", "set"), ("_codecs", "encode")}


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that builds tensors and plain containers, and refuses every other global."""

    def find_class(self, module, name):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: _MemoryUnpickler(data).load()
        if (module, name) not in _PLAIN_GLOBALS:
            raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}, and only tensors and plain "
                                         "containers are loaded")
        return super().find_class(module, name)


class _MemoryUnpickler(pickle.Unpickler):
    """Of the memory of a tensor in a plain pickle, which torch.save has written without an archive: used where it lies,
    at the end of the data, as the unpickler keeps these until a file is read and a copy would be a second one."""

    def __init__(self, data):
        super().__init__(io.BytesIO(data))
        self.data = data

    def load(self):
        if not self.data.startswith(_LEGACY_MAGIC):
            raise pickle.UnpicklingError("refused: a tensor whose memory is not in torch.save's format")
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
            memory = torch.frombuffer(self.data, dtype=dtype, count=count, offset=start) if count else torch.empty(0, dtype=dtype)
        return torch.storage.TypedStorage(wrap_storage=memory.untyped_storage(), dtype=memory.dtype, _internal=True)


def load_pickle(path, written_by="prepare.py"):
    """Load a file of `pickle.dump` or `torch.save` without running code from it, tensors on the CPU.
    Accepts tensors and plain containers, so every file of the released scripts. An archive of torch.save goes to
    `torch.load(weights_only=True)` and to nothing else, and is refused on torch before 2.6, where that can be passed.
    written_by: the script named where the file is missing.
    Raises InputError: file missing, truncated, of another kind, or naming a global that could run code (it says which).
    """
    remedy = "do not trust this file, or, where it is yours, write it again as plain tensors, lists and dicts"
    with _readable(path, "file", written_by), open(path, "rb") as file:
        try:
            begin = file.read(len(_LEGACY_MAGIC))
            file.seek(0)
            if begin[:2] == b"PK" and not ARCHIVES:
                remedy = "load it with torch 2.6 or newer, or write it again here"
                raise pickle.UnpicklingError(f"refused: an archive, through which torch {torch.__version__} may run code")
            if begin[:2] == b"PK" or begin == _LEGACY_MAGIC:
                return torch.load(file, map_location="cpu", weights_only=True)
            return _PlainUnpickler(file).load()
        except Exception as error:  # a damaged pickle raises nearly anything
            found = re.search(r"[^\n.]*(refused|GLOBAL|class|TorchScript)[^\n]*?(?=\.\s|\n|$)", str(error))
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


def process_rank():
    """The number of this process under torchrun, 0 without it."""
    return int(os.environ.get("RANK", 0))


def process_count():
    """How many processes torchrun has started, 1 without it. Connects them at the first call."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(default_device())  # where NCCL's barrier runs
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(days=7))  # a slow neighbour may embed for hours
    return count


def default_device():
    """This process's GPU, or the CPU where there is none. Raises InputError where processes outnumber the GPUs."""
    return check_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


def check_device(device):
    """A torch.device that is there. Raises InputError where it is not."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {device!r}: not on this machine ({str(error).splitlines()[0]}); give cpu, or a GPU "
                         "that is there, such as cuda:0") from None


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
# 2. Reward model
# ---------------------------------------------------------------------------------------------------------------------

_DIGESTS = {}  # path, size and time of a file -> its digest
ENGINE = 4  # of the embeddings' cache: how they are computed
TODAY = time.strptime("2024-07-26", "%Y-%m-%d")  # for templates that print the date; Llama 3.1's own default


def _checkpoint_folder(model_name, *patterns):
    """A checkpoint's folder; of an id on the hub, that in its cache, with the files that fit the patterns."""
    if os.path.isdir(model_name):
        return Path(model_name).resolve()
    from huggingface_hub import logging, snapshot_download
    logging.set_verbosity_error()  # its retries end in the one line below
    try:
        return Path(snapshot_download(str(model_name), allow_patterns=patterns))
    except Exception as error:  # unknown id, no network, no access: the hub's client has a class for each
        raise InputError(f"model {model_name}: no such folder, and the hub did not serve it ({type(error).__name__}); "
                         "check the name and the network, or give the path of a downloaded checkpoint") from None


def _opened(model_name, filename):
    """A safetensors file of a checkpoint. Raises InputError where it is missing or damaged."""
    path = _checkpoint_folder(model_name, filename) / filename
    if not path.exists():
        raise InputError(f"model {model_name}: no {filename} in it; give a checkpoint in safetensors format")
    with _readable(path, "safetensors file"):
        return safetensors.safe_open(path, "pt")


def _shard_of_tensor(model_name):
    """Which safetensors file of a checkpoint holds each tensor: its name -> the file's name."""
    one, index = "model.safetensors", "model.safetensors.index.json"
    path = _checkpoint_folder(model_name, index) / index
    return load_json(path, "weight_map")["weight_map"] if path.exists() else dict.fromkeys(_opened(model_name, one).keys(), one)


def _slices(model_name, choose):
    """The tensors of a checkpoint that `choose` picks from their names: name -> slice, of its file alone."""
    shards = _shard_of_tensor(model_name)
    return {name: _opened(model_name, shards[name]).get_slice(name) for name in choose(shards)}


def load_reward_head(model_name):
    """The reward head of a checkpoint (a folder, or an id on the hub): its `score.weight` transposed, float32 `[d, 1]`.
    Raises InputError: unknown model, no safetensors, or not exactly one scalar head."""
    found = _slices(model_name, lambda names: [name for name in names if name.endswith("score.weight")])
    heads = [head[:] for head in found.values()]
    if [head.shape[:-1] for head in heads] != [(1,)] or not heads[0].isfinite().all():
        raise InputError(f"model {model_name}: needs exactly one scalar reward head, and finite; its score.weight are "
                         f"{[tuple(head.shape) for head in heads]}; give a sequence-classification checkpoint")
    return heads[0].float().T.contiguous()


def load_released_reference(model_name):
    """What the released scripts took for the reward head, to compare with: float32 `[d, 1]`, the first column of the
    last MLP's down-projection. Raises InputError: unknown model, no safetensors, or one without such layers."""
    layer = re.compile(r".*layers\.(\d+)\.mlp\.down_proj\.weight$")
    found = _slices(model_name, lambda names: sorted(filter(layer.match, names),
                                                     key=lambda name: int(layer.match(name)[1]))[-1:])
    if not found:
        raise InputError(f"model {model_name}: no MLP down-projection in it; the released reference is that of Llama")
    return found.popitem()[1][:, :1].float().contiguous()


def load_tokenizer(model_name, trust_remote_code=False):
    """The tokenizer of a checkpoint. Raises InputError: unknown model, none in it, no chat template."""
    from transformers import AutoTokenizer, logging
    logging.set_verbosity_error()  # what matters of its notes is said in errors of ours
    _checkpoint_folder(model_name, "tokenizer_config.json")  # says in one line where it is unknown
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=trust_remote_code)
    except Exception as error:  # files missing, damaged or of another kind: a class of its own for each
        raise InputError(f"model {model_name}: its tokenizer cannot be loaded ({str(error) or type(error).__name__}); "
                         "check the name, the network and that it holds one") from None
    if not tokenizer.chat_template:
        raise InputError(f"model {model_name}: its tokenizer has no chat template; give a chat model")
    return tokenizer


def load_reward_model(model_name, device=None, attention=None, dtype=None, tokenizer_name=None,
                      trust_remote_code=False):
    """Load the frozen reward model without its head -> (backbone, tokenizer), in eval mode on `device`.
    device: default this process's GPU, else the CPU. attention: a transformers implementation; default, and in place of
    flash_attention_2, the architecture's own: PyTorch's ("sdpa"), which shares prompts and has flash kernels itself,
    where that is exact. dtype: default bfloat16 on a GPU, as released, and float32 on the CPU. tokenizer_name: default
    the model's. Raises InputError: unknown model, weights missing in it, no chat template."""
    from transformers import AutoModel, AutoModelForSequenceClassification, logging
    tokenizer = load_tokenizer(tokenizer_name or model_name, trust_remote_code)
    device = check_device(device) if device is not None else default_device()
    options = dict(torch_dtype=dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32), num_labels=1,
                   trust_remote_code=trust_remote_code, output_loading_info=True, ignore_mismatched_sizes=True)
    if attention not in (None, "flash_attention_2"):
        options["attn_implementation"] = attention
    if device.type == "cuda":  # else every process would hold the whole model on the host first
        options["device_map"] = {"": device}
    logging.disable_progress_bar()
    try:
        try:  # the class whose own score `_proof` compares with
            whole, loading = AutoModelForSequenceClassification.from_pretrained(model_name, **options)
        except ValueError:  # there is none for this architecture
            whole, loading = AutoModel.from_pretrained(model_name, **options)
    except Exception as error:  # files missing, damaged or of different models: a class of its own for each
        raise InputError(f"model {model_name}: cannot be loaded ({str(error) or type(error).__name__}); check the "
                         "name, the network and that it holds a model") from None
    model = whole.base_model  # shares its weights with the whole
    lost = {key for key, *_ in loading["mismatched_keys"]}.union(loading["missing_keys"], (  # or for no layer of it
        key for key in loading["unexpected_keys"] if key.startswith(f"{whole.base_model_prefix}.")))
    backbone = set(model.parameters())
    head = {name for name, parameter in whole.named_parameters() if parameter not in backbone}
    if missing := sorted(lost - head):  # which transformers fills at random
        raise InputError(f"model {model_name}: {len(missing)} weights are not in it or not of its config, as "
                         f"{missing[0]}; save it whole and without a wrapper, whose prefix (module., _orig_mod.) would "
                         "stand before each name")
    model.reward_checkpoint, model.reward_scorer = str(_checkpoint_folder(model_name, "config.json")), []
    with contextlib.suppress(InputError):  # on a head that is not to be read from safetensors nothing rests
        if head and not lost & head:
            model.reward_scorer.append((whole, load_reward_head(model_name)))  # in a list, so no part of the backbone
    whole.eval().requires_grad_(False).to(device)
    return model, tokenizer


def _quoted(conversation):
    """How an error message names a conversation: its beginning and end."""
    return " .. ".join(repr(message["content"][:60]) for message in (conversation[0], conversation[-1]))


def _tokenized(conversations, tokenizer):
    """Chat-format and tokenize: of each conversation the ids as bytes, four each, which sort as the ids do. What stands
    between special tokens, which a tokenizer takes out first, is tokenized once, if the first texts allow."""
    template, known = tokenizer.chat_template, {}
    if isinstance(template, dict):
        template = template.get("default", "{{ raise_exception('none of its templates is named default') }}")
    template = re.sub(r"""strftime_now\((['"])(.*?)\1\)""", lambda call: repr(time.strftime(call[2], TODAY)), template)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    marks = sorted((token.content for token in added), reverse=True)
    cut = re.compile(f"({'|'.join(map(re.escape, marks))})")
    fast = getattr(getattr(tokenizer, "backend_tokenizer", None), "encode_batch_fast", None)  # ids without offsets
    whole = any(token.lstrip or token.rstrip or token.single_word for token in added) or not marks or None  # to be tried

    def formatted(conversation):
        try:
            text = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
            text.encode()  # half a surrogate pair is no Unicode
            return text
        except Exception as error:  # the template is the checkpoint's program
            raise InputError(f"the model's chat template cannot format the conversation {_quoted(conversation)} "
                             f"({error}); repair it or leave it out") from None

    def encode(texts, fast=None):  # the template has written the special tokens: the tokenizer must not add its own again
        ids = ([one.ids for one in fast(texts, add_special_tokens=False)] if fast else
               texts and tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])
        return [np.array(sequence, ">u4").tobytes() for sequence in ids]

    def encode_pieces(texts):
        pieces = [[piece for piece in cut.split(text) if piece] for text in texts]
        new = list({piece for of_text in pieces for piece in of_text if piece not in known})
        known.update(zip(new, encode(new, fast)))
        return [b"".join(map(known.get, of_text)) for of_text in pieces]

    for start in range(0, len(conversations), 256):
        texts = list(map(formatted, conversations[start:start + 256]))
        whole = encode(texts) != encode_pieces(texts) if whole is None else whole
        yield from encode(texts) if whole else encode_pieces(texts)


def _ids(sequence):
    return np.frombuffer(sequence, ">u4").astype(np.int64)


def _on(device, array):
    """An array as a tensor on a device, without waiting for what that still computes."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _out_of_memory(error):
    """Whether an error says that a GPU's memory ran out."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def tokenize_conversations(conversations, tokenizer):
    """Chat-format and tokenize conversations -> one list of token ids each, special tokens once. Raises InputError."""
    return [_ids(sequence).tolist() for sequence in _tokenized(conversations, tokenizer)]


def model_identity(model_name, folder=None):
    """Digests of what a checkpoint holds, wherever it lies: {"weights": .., "tokenizer": with its template}. Those of
    files in the hub's cache are their names; others are read, and remembered in `folder` by size and time."""
    memory, parts = folder and Path(folder, "digests.json"), {"weights": {}, "tokenizer": {}}
    with contextlib.suppress(InputError):
        _DIGESTS.update(load_json(memory) if folder else {})
    where = _checkpoint_folder(model_name, "*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py")
    for path in sorted([*where.glob("*.*"), *where.glob("additional_chat_templates/*.jinja")]):
        weights = re.search(r"\.(safetensors|bin|py)$|^config\.json$", path.name)
        if weights or re.search(r"token|template|vocab|merges|spiece|\.jinja$", path.name):
            real, stat = path.resolve(), path.stat()
            key = f"{real} {stat.st_size} {stat.st_mtime_ns}"
            _DIGESTS[key] = _DIGESTS.get(key) or (real.name if real.parent.name == "blobs" else digest_of(real))
            parts["weights" if weights else "tokenizer"][path.name] = _DIGESTS[key]
    if folder and memory.parent.exists() and process_rank() == 0:
        save_json(memory, _DIGESTS)
    return {part: digest_of(files) for part, files in parts.items()}


def _fingerprint(model, folder):
    """A digest of what a loaded model's states depend on besides the tokens; of its weights only where states are kept."""
    checkpoint, settings = getattr(model, "reward_checkpoint", None), model.config.to_dict()
    settings.update(_name_or_path=None, transformers_version=None)  # another path or version is no other model
    runs = [ENGINE, model.dtype, model.config._attn_implementation, model.device.type, torch.__version__, settings,
            checkpoint and folder and model_identity(checkpoint, folder)["weights"]]
    digest = hashlib.sha256(json.dumps(runs, sort_keys=True, default=str).encode())
    for name, values in model.state_dict().items() if folder else ():  # of a checkpoint's a sample: changed since?
        values = values.flatten()[::values.numel() // 64 + 1 if checkpoint else 1].cpu().contiguous()
        digest.update(f"{name} {len(values)}".encode() + values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


HEAD_FILE = "reward_head.safetensors"


def check_gpu(model_name):
    """Raise InputError unless there is a GPU for a model that does not fit the CPU."""
    if not torch.cuda.is_available():
        raise InputError(f"no CUDA GPU here, and {model_name} needs one with 18 GB; try --demo, or --model with a "
                         "reward model that fits this machine")


def embeddings_are_finished(outputs, identity, overwrite):
    """Whether the files `outputs` already hold the embeddings of this model and data.
    identity: a dict of JSON values; that of the files, and their digests, stand in the reward head's file beside
    them. Digests are compared as far as both hold them; "model" is but a name. Files that are damaged or missing are not
    finished. Raises InputError where they hold other embeddings and `overwrite` is not set."""
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
    theirs = about.get("identity") or dict.fromkeys(identity)
    if other := [part for part in theirs if part in identity and part != "model" and theirs[part] != identity[part]]:
        held = ", ".join(f"{key} {about.get(key, 'unknown')}" for key in ("model", "data"))
        names = {"weights": "weights or config", "tokenizer": "tokenizer or chat template"}
        raise InputError(f"{existing[0]} holds finished embeddings of other {', '.join(names.get(o, o) for o in other)} ({held}); "
                         "move it away, or replace it with --overwrite")
    return all(path.exists() and digest_of(path) == about["files"].get(path.name) for path in outputs)


@contextlib.contextmanager
def new_embeddings(folder, head, identity, **about):
    """Where to write embeddings that then, with the reward head beside them, replace those in `folder` together.
    identity: see `embeddings_are_finished`; about: further JSON values."""
    with together(folder) as new:
        yield new
        save_tensors(new / HEAD_FILE, {"reward_head": head}, identity=identity, **about,
                     files={path.name: digest_of(path) for path in sorted(new.iterdir())})


def find_reward_head(folder, model_name, title, width, outputs):
    """The reward head beside the embeddings in the files `outputs`, else from `model_name`'s checkpoint.
    width: d -> where an embedding of that width was found. Returns (float32 `[d, 1]`, a dict of what is known of model
    and data, with a `title` for plots that begins with `title`). Raises InputError where one of the files is not that
    which the head was written with, or is of another width."""
    path, about = Path(folder) / HEAD_FILE, {"model": model_name}
    if path.exists():
        tensors, about = load_tensors(path)
        for output in (Path(folder) / name for name in outputs if "files" in about):
            if digest_of(output) != about["files"].get(output.name):
                raise InputError(f"{output}: not the file that {HEAD_FILE} was written with, but changed, or of another "
                                 "run; make the embeddings again")
        head = tensors.get("reward_head", torch.zeros(0))
    else:
        head = load_reward_head(model_name)
    if len(width) > 1 or head.shape != (next(iter(width)), 1) or not torch.isfinite(head).all():
        raise InputError(f"embeddings and reward head of different models: {tuple(head.shape)} in {path}, or "
                         f"{about.get('model')}'s, " + ", ".join(f"d = {d} in {where}" for d, where in width.items())
                         + "; prepare all files with one model")
    if about.get("identity", {}).get("reward_head", found := digest_of(head.tolist())) != found:
        raise InputError(f"{path}: its head is not the one that it names; make the embeddings again")
    return head, {**about, "title": f"{title} ({about['data']})" if "data" in about else title}


# ---------------------------------------------------------------------------------------------------------------------
# 3. Embedding
# ---------------------------------------------------------------------------------------------------------------------


class _Paths(TorchFunctionMode):
    """Within it, causal attention over one row of tails, each what a sequence does not share with the one before, is
    that of the whole sequences: a tail asks the keys of its own path and no other. Nothing is padded or masked out."""

    def __init__(self, lengths, shared, model):
        super().__init__()
        paths, path, new, device = [], np.zeros(0, np.int64), lengths - shared, model.device
        ends = np.cumsum(new)
        for n, start, end in zip(shared, ends - new, ends):  # path: where the row has the sequence's tokens
            paths.append(path := np.concatenate([path[:n], np.arange(start, end)]))
        self.keys = _on(device, np.concatenate(paths))
        self.key_heads, self.flash = getattr(model.config.get_text_config(), "num_key_value_heads", None), None
        if device.type == "cuda" and model.dtype.itemsize == 2:
            first = [_on(device, np.cumsum([0, *counts], dtype=np.int32)) for counts in (new, lengths)]
            self.flash = *first, int(new.max()), int(lengths.max())
        else:
            masks = (torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n) if n < m else None
                     for n, m in zip(new.tolist(), lengths.tolist()))
            self.tails = list(zip(map(slice, ends - new, ends), self.keys.split(lengths.tolist()), masks))

    def gathered(self, x):  # (keys, heads, width): a head of keys that was repeated for several of queries once
        x = x[0, ::max(1, x.shape[1] // (self.key_heads or x.shape[1]))].transpose(0, 1)
        return x.flatten(1)[self.keys].view(-1, *x.shape[1:])

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs or {})
        q, k, v = args[:3]  # (1, heads, tokens, width)
        options = {name: value for name, value in (kwargs or {}).items() if name in ("scale", "enable_gqa")}
        if self.flash:
            out = torch.ops.aten._flash_attention_forward(q[0].transpose(0, 1), self.gathered(k), self.gathered(v),
                                                          *self.flash, 0.0, True, False, scale=options.get("scale"))
            return out[0].transpose(0, 1)[None]
        out = torch.empty_like(q)
        for tail, keys, mask in self.tails:
            out[:, :, tail] = scaled_dot_product_attention(q[:, :, tail], k[:, :, keys], v[:, :, keys], mask,
                                                           is_causal=mask is None, **options)
        return out


def _forward(model, ids, shared=None):
    """The last tokens' states of sequences, `[n, d]`: of rows padded on the right, which causal attention does not see;
    or, given how many tokens each shares with the one before, of their tails in one row."""
    lengths, device, options, within = np.array(list(map(len, ids))), model.device, {}, contextlib.nullcontext()
    if shared is None:
        width, last = lengths.max(), np.arange(len(ids)) * lengths.max() + lengths - 1
        tokens = np.stack([np.pad(sequence, (0, width - len(sequence))) for sequence in ids])
    else:
        within, last = _Paths(lengths, shared, model), np.cumsum(lengths - shared) - 1
        tokens = np.concatenate([sequence[n:] for sequence, n in zip(ids, shared)])[None]
        position = np.concatenate([np.arange(n, length) for n, length in zip(shared, lengths)])[None]
        no_mask = torch.zeros(1, 1, 1, tokens.shape[1], dtype=model.dtype, device=device)  # 4-D: taken as it is
        options = {"position_ids": _on(device, position), "attention_mask": no_mask}
    with within:
        states = model(input_ids=_on(device, tokens), use_cache=False, **options).last_hidden_state
    return states.flatten(0, 1)[_on(device, last)]


def _next_batch(lengths, shared, way, budget, batch_size):
    """How many of sorted sequences the next batch holds, at most `budget` tokens or one sequence, and its tokens."""
    tokens = np.cumsum(lengths - shared) if way == "shared" else lengths[0] * np.arange(1, len(lengths) + 1)
    least, most = (max(1, int((tokens <= limit).sum())) for limit in (budget / 2, budget))
    if way == "shared" and most < len(tokens):  # cut where least is shared, in the second half
        most -= int(shared[least:most + 1][::-1].argmin())
    count = 1 if way == "alone" else min(most, batch_size or most)
    return count, int(tokens[count - 1])


@torch.inference_mode()
def _launched(model, shards, way, budget, batch_size):
    """Each batch of the shards of `_states` once it is on its way to be computed: (shard, its rows, their states on the
    CPU, what tells when they are there). The budget is halved where memory runs out, and stays so."""
    on_gpu = model.device.type == "cuda"
    for shard in shards:
        _, sequences, states = shard
        order, start = list(range(len(sequences))), 0
        if states is not None:
            yield shard, order, states, None
            continue
        if way == "rows":  # longest first
            order.sort(key=lambda n: -len(sequences[n]))
        ids = [_ids(sequences[n]) for n in order]
        same = [a[:len(b)] == b[:len(a)] for a, b in zip(ids, ids[1:])]
        shared = np.array([0] + [len(s) if s.all() else int(s.argmin()) for s in same])
        lengths = np.array(list(map(len, ids)))
        while start < len(ids):
            before = np.append(0, shared[start + 1:])  # the first of a batch has none before it
            count, tokens = _next_batch(lengths[start:], before, way, budget, batch_size)
            in_one_row = way == "shared" and tokens > 1  # a lone token's heads may be laid out otherwise
            try:
                states = _forward(model, ids[start:start + count], before[:count] if in_one_row else None)
            except RuntimeError as error:
                if count == 1 or not _out_of_memory(error):
                    raise
                torch.cuda.empty_cache()
                budget = min(budget, tokens) // 2
            else:
                states = states.to("cpu", non_blocking=on_gpu)
                copied = torch.cuda.current_stream(model.device).record_event() if on_gpu else None
                yield shard, order[start:start + count], states, copied
                start += count


def _states(model, shards, way, budget, batch_size=None, update=lambda count: None):
    """(shard, the last tokens' states of its sequences, `[n, d]` on the CPU) of each shard: (path, sorted sequences, states
    where these are known). A GPU's are copied while the next batch runs. way: "shared" (tails in one row), "rows" or "alone"."""
    done, parts, batches = [], [], _launched(model, shards, way, budget, batch_size)
    if model.device.type == "cuda":  # each is looked at when the next one is on its way
        batches = (batch for batch, _ in itertools.pairwise(itertools.chain(batches, [None])))
    for shard, rows, states, copied in batches:
        if copied:
            copied.synchronize()
        done.extend(rows)
        parts.append(states)
        update(len(rows))
        if len(done) == len(shard[1]):
            yield shard, torch.cat(parts)[np.argsort(done)]
            done, parts = [], []


def _proof(model, sequences):
    """How the model's states are rightly computed, tried on some of the sorted sequences: the shortest, the middle one,
    its neighbour, one token behind half of it, which will stand behind its other half, and the longest; each by itself,
    in padded rows, and with shared beginnings.

    Returns {"way", "tokens": the shortest, the longest; "rows", "shared", "score": relative differences to one by one},
    the fastest way that differs no more than the number format rounds: shared by 3 % in bfloat16, 1e-5 in float32.
    Raises InputError where phi @ head is not what the checkpoint's own class gives without a pad token."""
    by_length = sorted(sequences, key=len)
    middle, longest = by_length[len(by_length) // 2], by_length[-1]
    neighbour, ids = sequences[sequences.index(middle) - 1], [middle[n:n + 4] for n in range(0, len(middle), 4)]
    half = next((n for n in range(len(ids) // 2, len(ids)) if ids[n] < max(ids)), 0)
    sample = sorted({by_length[0], neighbour, middle, b"".join(ids[:half]) + max(ids), longest})
    (whole, head), = getattr(model, "reward_scorer", None) or [(model, None)]
    config, alone, eps = whole.config.get_text_config(), [], torch.finfo(model.dtype).eps
    pad, config.pad_token_id = config.pad_token_id, -1  # at one that ends a text, its class scores an earlier token
    hook = model.register_forward_hook(lambda model, inputs, output: alone.append(output[0][0, -1]))
    try:
        with torch.inference_mode():
            own = [whole(input_ids=_on(model.device, _ids(one)[None]), use_cache=False)[0] for one in sample]
    finally:
        hook.remove()
        config.pad_token_id = pad
    alone = torch.stack(alone).float().cpu()
    proof = {"way": "alone", "tokens": [len(by_length[0]) // 4, len(longest) // 4 if alone.isfinite().all() else 0]}

    def off(found, wanted):
        return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()

    if head is not None:
        own, scores = torch.cat(own)[:, 0].float().cpu(), (alone @ head)[:, 0]
        proof["score"] = off(scores, own)
        if proof["score"] > eps ** 0.5:
            raise InputError(f"model {model.reward_checkpoint}: its own score of a conversation is {own[0]:.5g}, its "
                             f"last state times its head {scores[0]:.5g}: more than that is in it; give another model")
        if pad == _ids(longest)[-1]:
            print("note: the model's pad token ends its chats: its class scores the token before, phi is the last")
    for way in ("rows", "shared"):
        try:  # all in one batch, as one's neighbours may change it
            (_, states), = _states(model, [(None, sample, None)], way, len(sample) * len(longest))
        except (TypeError, ValueError, IndexError, RuntimeError) as error:  # it takes no such input
            if _out_of_memory(error):
                raise
            continue
        proof[way] = off(states.float(), alone)
        noise = eps ** 0.5 if way == "rows" else min(eps ** 0.5, max(eps ** 0.7, 3 * proof.get("rows", 0)))
        proof["way"] = way if proof[way] <= noise else proof["way"]
    if proof["way"] != "shared":
        changed = {way: f"changes its states by {proof[way]:.1e}" if way in proof else "fails" for way in ("rows", "shared")}
        print(f"note: this model takes conversations whole{' and alone' * (proof['way'] == 'alone')}: sharing what they "
              f"begin with {changed['shared']}, a batch of rows {changed['rows']}")
    return proof


def _proven(model, sequences, fingerprint, folder):
    """The proof that is kept with the model and in the cache folder, made anew for shorter or longer sequences."""
    proofs, path = model.__dict__.setdefault("reward_proofs", {}), folder and folder / "proof.json"
    with contextlib.suppress(InputError):  # missing or damaged
        proofs.setdefault(fingerprint, load_json(path, "way", "tokens") if path else {})
    least, most = proofs.get(fingerprint, {}).get("tokens", (math.inf, 0))
    if new := not least <= min(map(len, sequences)) // 4 <= max(map(len, sequences)) // 4 <= most:
        proofs[fingerprint] = _proof(model, sequences)
    if path and process_rank() == 0 and (new or not path.exists()):
        save_json(path, proofs[fingerprint])
    return proofs[fingerprint]


def _numbered(conversations, tokenizer, cut, ranks):
    """The distinct sequences of conversations, cut and sorted: bytes -> conversations' numbers. Each of `ranks`
    processes tokenizes a share. Raises InputError."""
    if not conversations:
        raise InputError("no conversations to embed; give at least one")
    for one in conversations:
        if not one or not all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in one):
            raise InputError(f"the conversation {one!r:.80}: not a list of messages {{'role': .., 'content': a text}}")
    rank, parts, numbers = process_rank() if ranks > 1 else 0, [None] * ranks, {}
    parts[rank] = [sequence[cut] for sequence in _tokenized(conversations[rank::ranks], tokenizer)]
    if ranks > 1:
        dist.all_gather_object(parts, parts[rank])
    for n in range(len(conversations)):
        numbers.setdefault(parts[n % ranks][n // ranks], []).append(n)
    return dict(sorted(numbers.items()))


def _check_sequences(numbers, model, conversations):
    """Raise InputError for a sequence that the model does not take."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    table = model.get_input_embeddings().weight.shape[0]
    for sequence, (n, *_) in numbers.items():
        ids = _ids(sequence)
        if not 0 < len(ids) <= limit or ids.max() >= table:
            raise InputError(f"the conversation {_quoted(conversations[n])} has {len(ids)} tokens up to id "
                             f"{ids.max(initial=0)}, the model takes 1 to {limit} of {table}; leave it out or cut it")


def _embedded(model, sequences, cache_dir, ranks, budget, shard_size, batch_size, about):
    """(sequences, states) of each shard of sorted sequences, kept or made by this process, then those of the others."""
    fingerprint = _fingerprint(model, cache_dir)
    if folder := cache_dir and Path(cache_dir, fingerprint[:16]):
        check_writable(folder)
    about.update(_proven(model, sequences, fingerprint, folder))

    def kept(path, count):
        with contextlib.suppress(InputError):  # it is missing or damaged
            states = load_tensors(path)[0].get("embeddings", torch.zeros(0))
            return states if len(states) == count and is_finite(states) else None

    def shards(starts):
        for start in starts:
            shard = sequences[start:start + shard_size]
            digest = hashlib.sha256(b" end".join(shard)).hexdigest()  # " end" as an id is above any vocabulary
            path = folder and folder / f"{digest[:24]}.safetensors"
            yield path, shard, path and kept(path, len(shard))

    starts = range(0, len(sequences), shard_size)
    mine = starts[process_rank() if ranks > 1 else 0::ranks]
    total = sum(min(shard_size, len(sequences) - start) for start in mine)
    with progress_bar("embedding", total, unit="text") as bar:
        for (path, shard, old), states in _states(model, shards(mine), about["way"], budget, batch_size, bar.update):
            yield shard, states  # where they are not finite, the caller raises, and they are not kept
            if path and old is None:
                save_tensors(path, {"embeddings": states})
    if ranks > 1:
        dist.barrier()
        for other in set(range(ranks)) - {process_rank()}:
            for path, shard, states in shards(starts[other::ranks]):
                if states is None:
                    raise InputError(f"{path}: not made by the other processes; give all one folder, and run "
                                     "the same command again")
                yield shard, states


def embed_conversations(conversations, model, tokenizer=None, cache_dir=None, token_budget=None, shard_size=1024,
                        max_length=None, truncation_side="left", batch_size=None, dtype=None, about=None):
    """phi of each conversation: the state, after the final norm, of its last token.
    conversations: list of lists of {"role", "content"} messages, the last one the response that is judged.
    model, tokenizer: from `load_reward_model`; or a checkpoint's name, which is loaded when all is tokenized; the tokenizer
    is the model's by default. Returns a CPU tensor `[n, d]` of `dtype`, default the model's.
    Equal conversations are computed once, and so is what several begin with, unless `_proof` finds that this changes
    the model's states. A batch holds up to `token_budget` tokens (default 8192 on a GPU, 4096 on a CPU), or one
    conversation, and up to `batch_size` of them. max_length: cut longer ones, at their "left" or "right"
    `truncation_side`. about: a dict that is told what the embeddings depend on. With `cache_dir`, shards of that size
    are saved as they are made: a call for the same conversations resumes behind the last, and processes share them.
    Raises InputError: no conversation; an empty one, one beyond the model's context or vocabulary, or with an embedding
    that is not finite; a model whose own score is not phi @ head; a `cache_dir` that not all processes see."""
    given = dict(token_budget=token_budget, shard_size=shard_size, max_length=max_length, batch_size=batch_size)
    check_settings(**{name: value for name, value in given.items() if value is not None})
    if truncation_side not in ("left", "right"):
        raise InputError(f"truncation_side = {truncation_side!r}: give left or right")
    end, about, embeddings = max_length and 4 * max_length, {} if about is None else about, None
    cut = slice(end and -end, None) if truncation_side == "left" else slice(end)
    conversations = list(conversations)
    tokenizer = tokenizer or load_tokenizer(getattr(model, "reward_checkpoint", model))
    ranks = process_count() if cache_dir else 1
    numbers = _numbered(conversations, tokenizer, cut, ranks)
    model = load_reward_model(model)[0] if isinstance(model, (str, Path)) else model
    _check_sequences(numbers, model, conversations)
    on_gpu = model.device.type == "cuda"
    budget = token_budget or (8192 if on_gpu else 4096)
    about.update(device=torch.cuda.get_device_name(model.device) if on_gpu else "cpu", torch=torch.__version__,
                 attention=model.config._attn_implementation, dtype=str(model.dtype), token_budget=budget,
                 date=time.strftime("%Y-%m-%d", TODAY))
    for shard, states in _embedded(model, list(numbers), cache_dir, ranks, budget, shard_size, batch_size, about):
        if not is_finite(states):
            worst = conversations[numbers[shard[int(states.isfinite().all(1).int().argmin())]][0]]
            raise InputError(f"the model gives the conversation {_quoted(worst)} NaN or infinite values in "
                             f"{model.dtype}; leave it out, or check the model")
        if embeddings is None:
            embeddings = torch.empty(len(conversations), states.shape[1], dtype=dtype or states.dtype)
        rows, places = zip(*((row, n) for row, sequence in enumerate(shard) for n in numbers[sequence]))
        embeddings[list(places)] = states[list(rows)].to(embeddings.dtype)
    return embeddings


# ---------------------------------------------------------------------------------------------------------------------
# 4. Preference pairs
# ---------------------------------------------------------------------------------------------------------------------


DATA_FILE = re.compile(r"^[^.].*\.(parquet|jsonl|csv|jsonl\.gz|csv\.gz)$")


def split_files(folder, **words):
    """The files of each split in a folder, one .parquet, .jsonl(.gz), .csv(.gz) or its shards: split -> list of paths.
    words: for each split, the words of which its files' names hold one, whole (train-00000-of-00002.parquet).
    Raises InputError: no such folder, no file or several for a split, one for two."""
    folder, found = Path(folder), {}
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder or file; give the one that holds the data")
    paths = [path for path in sorted(folder.iterdir()) if DATA_FILE.search(path.name)]
    holds = f"it holds {', '.join(p.name for p in paths) or 'no parquet, jsonl or csv file'}"
    for split, names in words.items():
        found[split] = [p for p in paths if set(names) & set(re.split(r"[\W\d_]+", p.name.lower()))]
        shards = [re.search(r"(\d+)-of-(\d+)", p.name) for p in found[split]]
        if len(found[split]) != 1 or shards[0]:
            whole = all(shards) and len({re.sub(r"\d+-of", "", p.name) for p in found[split]}) == 1
            if not whole or len(shards) != int(shards[0][2]):
                raise InputError(f"{folder}: one file with {' or '.join(names)} in its name is needed, or all its "
                                 f"shards; {holds}")
    if len(set(sum(found.values(), []))) < sum(map(len, found.values())):
        raise InputError(f"{folder}: a file cannot be two of {', '.join(words)}; {holds}")
    return found


def read_rows(path):
    """The rows of a parquet, JSON lines or CSV file, as (where, row) pairs, a few in memory at a time.
    Raises InputError that names file and row: no such file, of another format, damaged, a line that is no JSON."""
    path, i = Path(path), 0
    if not DATA_FILE.search(path.name):
        raise InputError(f"{path}: not a .parquet, .jsonl or .csv file, the last two also .gz; write it as one of these")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            rows = (row for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024) for row in batch.to_pylist())
        else:
            file = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="")
            rows = (json.loads(line) for line in file if line.strip())
            if ".csv" in path.suffixes:
                rows = _csv_rows(file)
        for i, row in enumerate(rows, 1):
            yield f"{path}, row {i}", row
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the folder that holds it with --data") from None
    except (ValueError, OSError, EOFError, RecursionError, zlib.error, csv.Error) as error:  # pyarrow's are ValueErrors
        raise InputError(f"{path}, row {i + 1}: cannot be read ({error}): the file is cut short, of another format or "
                         "encoding, an error page, or closed to you; download or write it again") from None
    if i == 0:
        raise InputError(f"{path}: no row in it; download or write it again")


def _csv_rows(file):
    """The rows of an open CSV file. Raises ValueError: a name twice in its header, fields without a name."""
    csv.field_size_limit(2**31 - 1)  # a text may be long
    table = csv.DictReader(file, strict=True)
    if len(set(table.fieldnames or ())) < len(table.fieldnames or ()):
        raise ValueError(f"its header names a field twice: {table.fieldnames}")
    for row in table:
        if None in row:
            raise ValueError(f"{len(row[None])} more fields than its header names")
        yield row


def hub_rows(dataset, **options):
    """A data set of the hub by `datasets.load_dataset`: split -> (where, row) pairs. Raises InputError: not served."""
    from datasets import load_dataset
    try:
        splits = load_dataset(dataset, **options)
    except Exception as error:  # no network, no such revision, no access: a class of its own for each
        raise InputError(f"data set {dataset}: the hub did not serve it ({type(error).__name__}: {error}); check the "
                         "network, or give a downloaded copy with --data") from None
    return {split: zip(map(f"{dataset}, {split}, row {{}}".format, itertools.count(1)), rows)
            for split, rows in splits.items()}


def parse_rows(rows, schema, dataset):
    """(where, row) pairs as (where, object of a pydantic schema) pairs. Raises InputError that names row and field."""
    for where, row in rows:
        try:
            yield where, schema.model_validate(row)
        except pydantic.ValidationError as error:
            first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union the part that came furthest
            field, value = ".".join(map(str, first["loc"])) or "the row", repr(first["input"])
            raise InputError(f"{where}: {field}: {first['msg']}, and it is {value[:40]}; expected is the schema of "
                             f"{dataset}, repair the row or leave it out") from None


class Pairs:
    """Preference pairs as row numbers of one table of embeddings, for many pairs over few responses.
    embeddings: `[rows, d]`, any float dtype; chosen, rejected: int64 `[m]`. Behaves like the float32 matrix
    `embeddings[chosen] - embeddings[rejected]` of shape `[m, d]` without holding it."""

    def __init__(self, embeddings, chosen, rejected):
        self.embeddings, self.chosen, self.rejected = embeddings, torch.as_tensor(chosen), torch.as_tensor(rejected)
        for rows in (self.chosen, self.rejected):
            if rows.shape != self.chosen.shape or rows.ndim != 1 or rows.dtype == torch.bool or len(rows) and (
                    rows.min() < 0 or rows.max() >= len(embeddings) or (rows != rows.long()).any()):
                raise InputError(f"Pairs: chosen {tuple(self.chosen.shape)}, rejected {tuple(self.rejected.shape)}: rows "
                                 f"{rows.tolist()[:5]}; give two equally long lists of row numbers of the "
                                 f"{len(embeddings)} rows")
        self.chosen, self.rejected = self.chosen.long(), self.rejected.long()

    def __len__(self):
        return len(self.chosen)

    @property
    def shape(self):
        return torch.Size((len(self), self.embeddings.shape[1]))

    def __getitem__(self, rows):
        return Pairs(self.embeddings, self.chosen[rows], self.rejected[rows])

    def __matmul__(self, V):
        return next(_scores([self], V))

    def dense(self):
        """The float32 matrix `[m, d]` itself."""
        return self.embeddings[self.chosen].float() - self.embeddings[self.rejected].float()


def _scores(features, V):
    """X_i V of each user in turn, `[m_i, C]`; the rows of a table that users share are multiplied once."""
    table = scores = None
    for X in features:
        if isinstance(X, Pairs):
            if X.embeddings is not table:
                table = X.embeddings
                scores = torch.cat([part.to(V.device, torch.float32) @ V for part in table.split(8192)])
            yield scores[X.chosen.to(V.device)] - scores[X.rejected.to(V.device)]
        else:
            yield X.to(V.device) @ V


def is_finite(table):
    """Whether a tensor's numbers are no NaN and within float32, without a copy of it."""
    return all(abs(float(extreme)) <= torch.finfo(torch.float32).max for extreme in table.aminmax())


def check_matrix(X, what, rows=None, columns=None, finite=None):
    """X, a tensor, array or Pairs, as a finite float32 tensor `[rows, columns]` (None: any number from 1) or as Pairs.
    finite: a table that is known to be. Raises InputError that begins with `what`."""
    try:
        table = X.embeddings if isinstance(X, Pairs) else torch.as_tensor(X).detach()
    except (TypeError, ValueError, RuntimeError):
        table = torch.zeros(0, dtype=torch.bool)
    if table.is_complex() or table.dtype == torch.bool:
        raise InputError(f"{what}: {type(X).__name__} where a matrix of numbers should be; give a float32 tensor")
    X = X if isinstance(X, Pairs) else table.float()
    if len(X.shape) != 2 or 0 in X.shape or rows not in (None, X.shape[0]) or columns not in (None, X.shape[1]):
        raise InputError(f"{what}: shape {tuple(X.shape)} where [{rows or 'rows >= 1'}, {columns or 'd'}] should be; "
                         "give one of that shape, of the same model and users, none without pairs")
    if table is not finite and not is_finite(table):
        raise InputError(f"{what}: NaN or infinite values; leave them out, or make them again")
    return X


def check_features(features, what, users=None, d=None):
    """A list with one finite float32 `[m_i, d]` tensor (or Pairs) per user, of any iterable of tensors, arrays or Pairs.
    Raises InputError that names the user: no users or not `users` of them, a user without pairs, another width than `d`
    or than the first user's, NaN or infinite values."""
    features = list(features) if isinstance(features, Iterable) else []
    if not features or users not in (None, len(features)):
        raise InputError(f"{what}: {len(features)} users where {users or 'at least 1'} should be; "
                         "give one tensor per user")
    for i, X in enumerate(features):
        before = getattr(features[i - 1], "embeddings", None) if i else None
        features[i] = check_matrix(X, f"{what}, user {i}", None, d, before)
        d = features[i].shape[1]
    return features


def check_head(V, what, d=None):
    """A reward head as float32 `[d, 1]`; raises InputError where it is no such vector, not finite or all zero."""
    if isinstance(V, (torch.Tensor, np.ndarray)) and math.prod(V.shape) == max(V.shape, default=0):
        V = V.reshape(-1, 1)
    V = check_matrix(V, what, d, 1)
    if not V.any():
        raise InputError(f"{what}: all zero; read the reward head again")
    return V


def sample_shots(train_features_unseen, shots, generator=None, groups=None):
    """For each user `shots` of the pairs, drawn without replacement anew at each call (all pairs of a user with fewer).
    train_features_unseen: list of `[m_i, d]`. Returns a list of `[min(shots, m_i), d]`.
    generator: a CPU torch.Generator; default torch's own. groups: see `run_few_shot_vary_shots`."""
    check_settings(shots=shots)
    if groups is None:
        return [X[torch.randperm(len(X), generator=generator)[:shots]] for X in train_features_unseen]
    check_groups(groups, train_features_unseen)
    return [X[torch.isin(group, torch.randperm(int(group.max()) + 1, generator=generator)[:shots])]
            for X, group in zip(train_features_unseen, groups)]


def check_groups(groups, features):
    """Raise InputError unless each user has one int64 `[m_i]` that numbers groups of pairs from 0 without a gap."""
    groups = groups if isinstance(groups, (list, tuple)) else []
    for i, (group, X) in enumerate(itertools.zip_longest(groups, features)):
        if X is None or not isinstance(group, torch.Tensor) or tuple(group.shape) != (len(X),) or (
                set(group.tolist()) != set(range(int(group.max()) + 1))):
            raise InputError(f"groups, user {i}: not a number for each pair of this user; give a list with a tensor per "
                             "user that has the number of each pair's group, counted from 0 without a gap")


def generate_population(alpha, N, seed=None):
    """N users as mixtures over scorers: Dirichlet draws, numpy float64 `[N, scorers]`.
    alpha: the concentration, one number per scorer, or a single number for ten scorers. seed: default another each time.
    """
    concentration = np.full(10, alpha) if np.ndim(alpha) == 0 else np.asarray(alpha)
    for value in concentration.tolist():
        check_settings(concentration=value, N=N)
    return np.random.default_rng(seed).dirichlet(concentration, N)


generate_popupulation = generate_population  # the released spelling


def best_and_worst(reward_tensor, w):
    """The responses that a user scores highest and lowest -> two int64 `[prompts]`, equal where all are tied.
    reward_tensor: `[prompts, responses, scorers]`, a tensor or an array, also of objects; w: the mixture `[scorers]`."""
    if not isinstance(reward_tensor, torch.Tensor):
        reward_tensor = torch.from_numpy(np.asarray(reward_tensor, np.float64))
    reward_tensor = reward_tensor if reward_tensor.is_floating_point() else reward_tensor.float()
    scores = reward_tensor @ torch.as_tensor(w, dtype=reward_tensor.dtype, device=reward_tensor.device)
    best, worst = scores.argmax(1), scores.argmin(1)
    tied = (reward_tensor == reward_tensor[:, :1]).all(2).all(1)  # here rounding would decide
    return best, torch.where(tied, best, worst)


def simulate_user(reward_tensor, features, w):
    """One simulated user's pairs: the embedding of the response scored highest minus that of the one scored lowest.
    reward_tensor: `[prompts, responses, scorers]`; features: `[prompts, responses, d]`, a tensor or nested lists of
    vectors; w: `[scorers]`. Returns float32 `[prompts, d]`."""
    return simulate_population(reward_tensor, features, [w])[0]


def simulate_population(reward_tensor, features, W):
    """`simulate_user` for every row of W `[N, scorers]` -> float32 `[N, prompts, d]`. For many users take `Pairs`."""
    if not isinstance(features, torch.Tensor):
        features = torch.stack([torch.stack(list(map(torch.as_tensor, responses))) for responses in features])
    prompts = torch.arange(len(features))
    choices = (best_and_worst(reward_tensor, w) for w in W)
    return torch.stack([features[prompts, best].float() - features[prompts, worst].float() for best, worst in choices])


def create_sparse_tensor(dense_tensor, sample_percentage, generator=None):
    """For each user a random share of the prompts, rounded down, as a list of N tensors `[int(share * prompts), d]`.
    dense_tensor: `[N, prompts, d]`; sample_percentage: a share from 0 to 1, as released. InputError: that leaves no pair.
    """
    return sample_shots(list(dense_tensor), share_of(dense_tensor.shape[1], sample_percentage), generator)


def share_of(prompts, fraction, what="sample_percentage"):
    """How many a fraction of so many prompts is, rounded down. Raises InputError where none is left."""
    if not isinstance(fraction, Real) or not 1 <= fraction * prompts + 1e-9 <= prompts + 1e-6:
        raise InputError(f"{what}: fraction {fraction} of {prompts} prompts leaves no pairs for a user, or is more "
                         f"than all; give a number from {1 / prompts:.2g} to 1.0, or more prompts")
    return int(fraction * prompts + 1e-9)  # 0.29 of 100 is 29, not the 28.999.. of the floating-point product


def turn_pairs(row):
    """The pairs of one turn of a dialogue, chosen minus each rejected response: float32 `[rejected, d]`.
    row: `extra_info` holds `chosen_conv_embedding` `[d]` and `rejected_conv_embedding` `[rejected, d]` (released: `[d]`).
    """
    chosen, rejected = (torch.as_tensor(row["extra_info"][side]).float() for side in
                        ("chosen_conv_embedding", "rejected_conv_embedding"))
    return chosen.reshape(1, -1) - rejected.reshape(-1, chosen.numel())


def group_by_dialog(embeddings):
    """user -> conversation -> list of rows, users and conversations in order of their ids.
    embeddings: a list of rows with `user_id` and `dialog_id` in `extra_info`, or a dict of such lists."""
    rows = embeddings if isinstance(embeddings, list) else itertools.chain(*embeddings.values())
    users = {}
    for row in sorted(rows, key=lambda row: [str(row["extra_info"][key]) for key in ("user_id", "dialog_id")]):
        users.setdefault(row["extra_info"]["user_id"], {}).setdefault(row["extra_info"]["dialog_id"], []).append(row)
    return users


def create_dataset_prism(embeddings):
    """The pairs of each user, users sorted by id: list of float32 `[m_i, d]`. embeddings: see `group_by_dialog`."""
    return create_dataset_prism_shots(embeddings, None)


def create_dataset_prism_shots(embeddings, shots, generator=None):
    """As `create_dataset_prism`, from `shots` conversations of each user (None: all), drawn anew at each call."""
    features = []
    for dialogs in group_by_dialog(embeddings).values():
        drawn = range(len(dialogs)) if shots is None else torch.randperm(len(dialogs), generator=generator)[:shots]
        features.append(torch.cat([turn_pairs(row) for i in drawn for row in list(dialogs.values())[i]]))
    return features


# ---------------------------------------------------------------------------------------------------------------------
# 5. The models
# ---------------------------------------------------------------------------------------------------------------------

TEMPERATURE = 100.0  # of the Bradley-Terry model, fixed
FEW_SHOT_ITERATIONS = 500
BLOCK = 1024  # numbers of a pair that the kernel takes at a time; four pairs' lie in a core's first cache
KERNEL_NUMBERS = 2**22  # in the pairs, from which on a CPU compiles the kernel: seconds, at its first use
CHECKPOINT_SECONDS = 60  # of training that an interruption loses at most


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of a sweep: `K` columns of the wide basis that all members are trained in, side by side."""
    K: int
    alpha: float = 0.0
    seed: int = 0

    def generator(self, step):  # of the member's own, so that its start does not depend on its neighbours
        state, = np.random.SeedSequence([self.seed, self.K, step]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state) >> 1)

    def start(self, N, d, regularized):
        """The logits and the basis that a training begins with, `[N, K]` and `[K, d]`."""
        generator = self.generator(0)
        return (torch.rand if regularized else torch.randn)(N, self.K, generator=generator), torch.randn(
            self.K, d, generator=generator)


class Likelihood:
    """The Bradley-Terry likelihood of the users' choices under every member of a sweep at once, and its derivatives.
    N users with M pairs in all, G members with C columns in all; P = X V `[M, C]`, w `[N, C]` the user weights.
    counts: pairs of each user; sizes: K of each member; total: the loss is a mean over that many pairs, None: the sum
    over users of each one's mean."""

    def __init__(self, counts, sizes, device, total=None):
        self.counts, self.sizes, self.threads = torch.tensor(counts, device=device), list(sizes), torch.get_num_threads()
        self.user = torch.arange(len(counts), device=device).repeat_interleave(self.counts)  # (M,)
        self.weight = 1 / (self.counts if total is None else torch.full_like(self.counts, total))  # (N,)
        self.member = torch.tensor([g for g, K in enumerate(sizes) for _ in range(K)], device=device)  # (C,)
        self.of_member = torch.nn.functional.one_hot(self.member, len(sizes)).float()  # (C, G)

    def weights(self, W):  # the softmax over each member's logits: (N, C)
        return torch.cat([logits.softmax(1) for logits in W.split(self.sizes, 1)], 1)

    def margins(self, P, w):  # x V w_i / 100 of each pair under each member: (M, G)
        return (P * w[self.user]) @ self.of_member / TEMPERATURE

    def loss(self, P, w):  # negative log-likelihood of each member: (G,)
        return -(self.weight[self.user, None] * logsigmoid(self.margins(P, w))).sum(0)

    def residuals(self, P, w):  # the loss derived by x V w_i, at each column of its member: (M, C)
        return (-self.weight[self.user, None] * torch.sigmoid(-self.margins(P, w)) / TEMPERATURE)[:, self.member]

    def by_weights(self, P, r):  # the loss derived by w: (N, C)
        return torch.segment_reduce(r * P, "sum", lengths=self.counts, axis=0)

    def by_logits(self, w, by_weights):  # the loss derived by W, through the softmax: (N, C)
        return w * (by_weights - ((w * by_weights) @ self.of_member)[:, self.member])

    def plain(self, X, w, V, of_weights=True, of_basis=True):
        """The loss derived by w: (N, C), and by V: (C, d), of X `[M, d]` and V `[C, d]` on any device."""
        P = X @ V.T  # (M, C)
        r = self.residuals(P, w)
        return self.by_weights(P, r) if of_weights else None, (r * w[self.user]).T @ X if of_basis else None

    def kernel(self, X, w, V, of_weights=True, of_basis=True):
        """The same for many pairs on a CPU: see `_gradients`."""
        numba.set_num_threads(threads := min(self.threads, numba.config.NUMBA_NUM_THREADS))
        size, start = np.array(self.sizes), np.concatenate([[0], np.cumsum(self.counts.numpy())])
        by_weights, by_basis = torch.zeros(w.shape), torch.zeros(threads, *V.shape)
        _gradients(X.numpy(), start, self.weight.numpy(), w.numpy(), V.numpy(), np.cumsum(size) - size, size,
                   by_weights.numpy(), by_basis.numpy(), of_weights, of_basis)
        return by_weights, by_basis.sum(0)


_zero, _one, _temperature = np.float32([0, 1, TEMPERATURE])
try:  # machine code is kept on disk, or only in this process where no folder for it can be written
    KEPT = bool(numba.njit(cache=True)(process_rank))
except RuntimeError:
    KEPT = False
_four = numba.njit(lambda X, p, last, j, end: (  # a block of the numbers of four pairs, or less and the last again
    X[p, j:end], X[min(p + 1, last), j:end], X[min(p + 2, last), j:end], X[min(p + 3, last), j:end]))


@numba.njit(cache=KEPT, parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp", "afn"})
def _gradients(X, start, weight, w, V, first, size, by_weights, by_basis, of_weights, of_basis):
    """The kernel: fills by_weights `[N, C]`, and by_basis `[threads, C, d]`, whose sum is the loss derived by V.
    It reads X `[M, d]` once, users shared out among threads: user i's pairs are the rows start[i] to start[i + 1],
    member g's columns first[g] to first[g] + size[g]. The margin x V w_i is taken as x (V w_i): one reward vector
    v_g = V w_i / 100 of a member meets the pairs; s_g, their sum weighted by the residuals, gives both derivatives."""
    threads, G, d, block = len(by_basis), len(size), X.shape[1], BLOCK if len(size) > 1 else X.shape[1]
    for thread in numba.prange(threads):
        v, s, m = np.empty((G, d), np.float32), np.empty((G, d), np.float32), np.empty((G, 4), np.float32)
        for i in range(thread, len(weight), threads):
            last = start[i + 1] - 1
            for g in range(G):
                v[g], s[g] = _zero, _zero
                for c in range(first[g], first[g] + size[g]):
                    for j in range(d):
                        v[g, j] += w[i, c] / _temperature * V[c, j]
            for p in range(start[i], last + 1, 4):  # four pairs, of which a block stays in the cache for all members
                m[:] = _zero
                for j in range(0, d, block):
                    x0, x1, x2, x3 = _four(X, p, last, j, j + block)
                    for g in range(G):
                        vg, m0, m1, m2, m3 = v[g, j:j + block], m[g, 0], m[g, 1], m[g, 2], m[g, 3]
                        for k in range(len(vg)):
                            m0 += x0[k] * vg[k]
                            m1 += x1[k] * vg[k]
                            m2 += x2[k] * vg[k]
                            m3 += x3[k] * vg[k]
                        m[g, 0], m[g, 1], m[g, 2], m[g, 3] = m0, m1, m2, m3
                for q in range(4):  # where there are fewer than four, the last stands in, weighted 0
                    for g in range(G):
                        m[g, q] = -(weight[i] if p + q <= last else _zero) / (_one + math.exp(m[g, q])) / _temperature
                for j in range(0, d, block):
                    x0, x1, x2, x3 = _four(X, p, last, j, j + block)
                    for g in range(G):
                        sg, r0, r1, r2, r3 = s[g, j:j + block], m[g, 0], m[g, 1], m[g, 2], m[g, 3]
                        for k in range(len(sg)):
                            sg[k] += r0 * x0[k] + r1 * x1[k] + r2 * x2[k] + r3 * x3[k]
            for g in range(G):
                for c in range(first[g], first[g] + size[g]):
                    total = _zero
                    if of_basis:
                        for j in range(d):
                            by_basis[thread, c, j] += w[i, c] * s[g, j]
                    if of_weights:
                        for j in range(d):
                            total += V[c, j] * s[g, j]
                        by_weights[i, c] = total


@contextlib.contextmanager
def _one_thread_of_torch():
    """Torch's own threads would wait, busily, on the kernel's cores, and for small products longer than these take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread_of_torch()
def _descend(likelihood, W, V, derivatives, num_iterations, learning_rate, penalty=None, alternating=False,
             checkpoint=None, identity=None):
    """Adam on the logits W `[N, C]` and, unless it is None, on the basis V `[C, d]`; both are changed in place, and have to
    be contiguous for torch's fused Adam, taken from torch 2.6 on (as ARCHIVES).
    derivatives(w, of_weights, of_basis) are the loss's, penalty(V, t) is `[C]`. Alternating: the step on V sees the new
    W. checkpoint: a `TrainingCheckpoint` to leave the state in and to go on from, which belongs to `identity`."""
    variables = [W] if V is None else [W, V]
    adams = [torch.optim.Adam([variable], lr=learning_rate, fused=ARCHIVES or None) for variable in variables]
    first, saved = 0, time.monotonic()
    if checkpoint and (state := checkpoint.load(identity)):
        for variable, adam, variable_saved, adam_saved in zip(variables, adams, state["variables"], state["adams"]):
            variable.copy_(variable_saved)
            adam.load_state_dict(adam_saved)
        first = state["iterations"]
        print(f"resuming the training after {first:,} iterations")
    bar = progress_bar("few-shot" if V is None else "training", num_iterations, initial=first, unit="it", leave=False)
    for t in range(first, num_iterations):
        w = likelihood.weights(W)
        by_weights, by_basis = derivatives(w, True, V is not None and not alternating)
        W.grad = likelihood.by_logits(w, by_weights)
        adams[0].step()
        if V is not None:
            if alternating:
                _, by_basis = derivatives(likelihood.weights(W), False, True)
            if process_count() > 1:
                dist.all_reduce(by_basis)
            V.grad = by_basis if penalty is None else by_basis + torch.func.grad(lambda V: penalty(V, t).sum())(V)
            adams[1].step()
        if checkpoint and (t + 1 == num_iterations or time.monotonic() - saved > CHECKPOINT_SECONDS):
            checkpoint.save(identity, {"iterations": t + 1, "variables": variables,
                                       "adams": [adam.state_dict() for adam in adams]})
            saved = time.monotonic()
        bar.update()
    bar.close()


@torch.no_grad()
def fit_basis(features, members, V_sft, num_iterations, learning_rate, regularized=False, device=None, checkpoint=None):
    """Learn basis and user weights of every member of a sweep together -> list of (w `[N, K]`, V `[d, K]`, loss).
    features: list of float32 `[m_i, d]` (or Pairs), one per user. Members share nothing but the reading of X, as Adam is
    elementwise. V_sft: `[d, 1]`, needed where an alpha is not 0. regularized: as `LoRe_regularized`. checkpoint: a
    `TrainingCheckpoint`, to go on from when it is started again, which the caller clears. loss: without penalty.
    Under torchrun each process holds a part of the users, all return the whole, and nothing is saved on the way."""
    ranks, N, d = process_count(), len(features), features[0].shape[1]
    mine = slice(process_rank(), None, ranks)
    if N < ranks:
        raise InputError(f"{N} users for {ranks} processes; start at most one process per user")
    if any(member.alpha for member in members) and (V_sft is None or not V_sft.any()):
        raise InputError("V_sft: missing or all 0, and alpha is not 0; give the reward head [d, 1]")
    device = torch.device(device or getattr(features[0], "device", "cpu"))
    counts, sizes = list(map(len, features[mine])), [member.K for member in members]
    X = torch.empty(sum(counts), d, device=device)  # (M, d)
    for rows, of_user in zip(X.split(counts), features[mine]):
        rows.copy_(of_user.dense() if isinstance(of_user, Pairs) else of_user)
    likelihood = Likelihood(counts, sizes, device, sum(map(len, features)) if regularized else None)
    W, V = zip(*(member.start(N, d, regularized) for member in members))
    W, V = torch.cat(W, 1)[mine].contiguous().to(device), torch.cat(V).to(device)  # (N, C), (C, d)
    alpha = torch.tensor([m.alpha / (m.K if regularized else 1) for m in members], device=device)[likelihood.member]

    def penalty(V, t):  # (C,)
        reference = V_sft.to(V).reshape(1, -1)
        if not regularized:
            return alpha * ((V - reference) ** 2).sum(1)
        share = min(max((t / num_iterations - 0.2) / 0.6, 0.0), 1.0)  # 0 for 20 % of the iterations, 1 from 80 % on
        return share * alpha * (1 - cosine_similarity(V, reference, dim=1))

    on_kernel = device.type == "cpu" and X.numel() >= KERNEL_NUMBERS
    derivatives = functools.partial(likelihood.kernel if on_kernel else likelihood.plain, X)
    identity, checkpoint = None, None if ranks > 1 else checkpoint
    if checkpoint:
        settings = (torch.__version__, str(device), list(map(len, features)), members, num_iterations, learning_rate,
                    regularized, None if V_sft is None else V_sft.tolist())
        identity = hashlib.sha256(repr(settings).encode()).hexdigest() + hashlib.sha256(X.cpu().numpy()).hexdigest()
    _descend(likelihood, W, V, lambda w, *of: derivatives(w, V, *of), num_iterations, learning_rate,
             penalty if alpha.any() else None, regularized, checkpoint, identity)
    if not V.isfinite().all():
        if checkpoint:
            checkpoint.clear()
        raise InputError("the training has diverged, its basis is not finite; give a smaller alpha, or smaller pairs")
    w = torch.zeros(N, sum(sizes), device=device)
    w[mine] = likelihood.weights(W)
    loss = likelihood.loss(X @ V.T, w[mine])
    for total in (w, loss) if ranks > 1 else ():
        dist.all_reduce(total)
    return list(zip(w.split(sizes, 1), (V_k.T for V_k in V.split(sizes)), loss.tolist()))


@torch.no_grad()
def fit_users(scores, members, sizes, num_iterations, learning_rate):
    """Few-shot fit of new users: their weights over each of several frozen bases -> list of w `[N, K]`.
    scores: P_i = X_i V `[m_i, C]` of each user under all bases, constants; members, sizes: Member and K of each."""
    P, N = torch.cat(scores), len(scores)
    likelihood = Likelihood(list(map(len, scores)), sizes, P.device)
    W = torch.cat([torch.randn(N, K, generator=dataclasses.replace(member, K=K).generator(1))
                   for member, K in zip(members, sizes)], 1).to(P.device)
    _descend(likelihood, W, None, lambda w, *of: (likelihood.by_weights(P, likelihood.residuals(P, w)), None),
             num_iterations, learning_rate)
    return list(likelihood.weights(W).split(sizes, 1))


class LoRe:
    """Low-rank reward model: basis and user weights by one Adam on both.
    Loss: the sum over users of the user's mean negative log-likelihood, plus alpha * sum_j |V_j - V_sft|^2.
    V_sft: `[d, 1]` (None where alpha is 0). num_classes: users N; num_features: d; num_basis_vectors: K."""
    regularized = False

    def __init__(self, V_sft, alpha, num_classes, num_features, num_basis_vectors, num_iterations=1000,
                 learning_rate=0.5, seed=0, threshold=0.0):
        check_settings(num_basis_vectors=num_basis_vectors, alpha_list=[alpha], num_iterations=num_iterations,
                       learning_rate=learning_rate, seed=seed, threshold=threshold)
        self.V_sft = None if V_sft is None else check_head(V_sft, "V_sft", num_features)
        self.shape, self.steps, self.threshold = (num_classes, num_features), (num_iterations, learning_rate), threshold
        self.member = Member(num_basis_vectors, float(alpha), seed)

    def train(self, X):
        """X: a float32 `[m_i, d]` per user -> (softmax(W) `[N, K]`, V `[d, K]`). Raises InputError: other users or widths."""
        X = check_features(X, "features", *self.shape)
        w, V, _ = fit_basis(X, [self.member], self.V_sft, *self.steps, self.regularized)[0]
        return prune(w, V, self.threshold)


class LoRe_regularized(LoRe):
    """LoRe with alternating steps and a cosine anchor: in each iteration one Adam step on W, then one on V.
    Loss: the mean negative log-likelihood of all pairs, plus alpha_t * mean_j (1 - cos(V_j, V_sft)), so one column feels
    alpha_t / K; alpha_t is 0 for the first 20 % of the iterations, rises linearly and is alpha from 80 % on.
    `train` leaves out columns whose largest user weight is below `threshold` (0 keeps all)."""
    regularized = True

    def __init__(self, V_sft, alpha, num_classes, num_features, num_basis_vectors, num_iterations=20000,
                 learning_rate=0.5, seed=0, threshold=1e-2):
        super().__init__(V_sft, alpha, num_classes, num_features, num_basis_vectors, num_iterations, learning_rate, seed,
                         threshold)


def prune(w, V, threshold):
    """Keep the columns whose largest user weight reaches `threshold`, at least the largest -> (w, V)."""
    keep = (largest := w.max(0).values) >= largest.max().clamp(max=threshold)
    return w[:, keep], V[:, keep]


class PersonalizeBatch(LoRe):
    """Few-shot fit of new users' weights with the basis V frozen, from logits drawn from N(0, 1).
    Loss: the sum over users of the user's mean negative log-likelihood. Arguments as of `LoRe`."""

    def __init__(self, num_classes, num_features, num_basis_vectors, num_iterations=FEW_SHOT_ITERATIONS,
                 learning_rate=0.1, seed=0):
        super().__init__(None, 0.0, num_classes, num_features, num_basis_vectors, num_iterations, learning_rate, seed)

    def train(self, X, V):
        """X: list of `[m_i, d]`, one per user; V: `[d, K]`. Returns a list of N simplex vectors `[K]`."""
        scores = _scores(check_features(X, "features", *self.shape), check_matrix(V, "V", self.shape[1], self.member.K))
        return list(fit_users(list(scores), [self.member], [self.member.K], *self.steps)[0])


# ---------------------------------------------------------------------------------------------------------------------
# 6. Evaluation and evidence
# ---------------------------------------------------------------------------------------------------------------------

SETTINGS = ("Train Performance", "Seen User Unseen Prompts", "Few Shot Train Performance", "Unseen User Unseen Prompts")
UNSEEN_TEST, VALIDATION = SETTINGS[3], "Validation"  # the setting that counts; held-out training pairs
DRAWS = 2000  # of the bootstrap over users
NOTHING = 0.01  # of accuracy: a personal part that is surely smaller counts as none
FEWEST_USERS = 6  # with fewer no signed-rank test can reach p < 0.05, and an interval says nothing
COLLAPSED = 0.99  # cosine with the reward head from which on a column is that head
INTERVAL, DIFFERENCE = "{mean:.3f} [{low:.3f}, {high:.3f}]", "{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


@dataclasses.dataclass
class Fit:
    """What a pipeline found at one rank, one alpha, one seed."""
    K: int
    alpha: float
    seed: int
    V: torch.Tensor  # (d, columns), the basis
    W: torch.Tensor  # (N, columns), weights of the seen users
    W_unseen: torch.Tensor  # (N_unseen, columns), weights of the unseen users
    loss: float  # of the training, without the penalty; NaN for the reference, which is not trained
    accuracies: dict = dataclasses.field(default_factory=dict)  # setting -> float64 array, one accuracy per user


def evaluate_model(X, V, w):
    """The fraction of pairs with a positive margin x V w, a float.
    X: `[m, d]` or Pairs; V: `[d, K]`; w: `[K]`, tensors or arrays. Raises InputError: no pairs, other shapes, NaN."""
    V = check_matrix(V, "V")
    w = w.detach() if isinstance(w, torch.Tensor) else np.asarray(w)
    w = check_matrix(w.reshape(-1, 1), "w", V.shape[1], 1).to(V.device)
    return float(_accuracies([check_matrix(X, "X", None, len(V))], [V], [w.T])[0, 0])


def eval_multiple(W_list, V_list, test_features):
    """`evaluate_model` for every user, with a w `[K]`, a V `[d, K]` and pairs of each -> list of accuracies; prints
    their mean and standard deviation."""
    W_list, V_list, test_features = map(list, (W_list, V_list, test_features))
    if not len(W_list) == len(V_list) == len(test_features) > 0:
        raise InputError(f"{len(W_list)} weights, {len(V_list)} bases, {len(test_features)} users; give equally many")
    accuracies = [evaluate_model(X, V, w) for w, V, X in zip(W_list, V_list, test_features)]
    _print_accuracy(accuracies)
    return accuracies


def _print_accuracy(accuracies):
    print(f"Average accuracy: {np.mean(accuracies):.4f}")
    print(f"Standard deviation of accuracy: {np.std(accuracies):.4f}")


def _accuracies(features, bases, weights):
    """Accuracy of each user under each of G models: float64 array `[G, N]`; `[G, N, J]` for J weight vectors a user.
    features: N of `[m_i, d]` or Pairs; bases: G tensors `[d, K]`; weights: G tensors `[N, K]` or `[N, J, K]`."""
    sizes = [V.shape[1] for V in bases]
    right = [torch.stack([(w[i] @ P.T).gt_(0).sum(-1).double() / len(P) for w, P in zip(weights, S.split(sizes, 1))])
             for i, S in enumerate(_scores(features, torch.cat(bases, 1)))]
    return torch.stack(right, 1).cpu().numpy()


def by_model(fits):
    """The fits of each row of the tables, one a seed: {(K, alpha): [Fit]}, in the order of the sweep."""
    return {row: [fit for fit in fits if (fit.K, fit.alpha) == row]
            for row in dict.fromkeys((fit.K, fit.alpha) for fit in fits)}


def accuracy_of_users(fits, setting):
    """The accuracy of each user in a setting, averaged over the seeds of one row: float64 `[users]`."""
    return np.mean([fit.accuracies[setting] for fit in fits], 0)


def best_fit(fits):
    """Of one row's seeds the model to keep: best on held-out pairs where there are any, else of the lowest loss."""
    return max(fits, key=lambda fit: (fit.accuracies.get(VALIDATION, np.zeros(1)).mean(), -fit.loss))


def toss(features, seed=0):
    """The same pairs, each turned round or not by the toss of a seeded coin, user after user."""
    coin = torch.Generator().manual_seed(seed)
    for X in features:
        heads = torch.rand(len(X), generator=coin) < 0.5
        yield (Pairs(X.embeddings, X.chosen.where(heads, X.rejected), X.rejected.where(heads, X.chosen))
               if isinstance(X, Pairs) else X.where(heads.to(X.device)[:, None], -X))


def hold_out(prompts, share, seed=0):
    """Which pairs of each user are held out: bool `[m_i]`, those of a seeded `share` of the user's prompts.
    prompts: one list of prompts (texts, ids or digests) per user. Raises InputError where a user has one prompt only."""
    chance, held = np.random.default_rng(seed), []
    for i, of_user in enumerate(prompts):
        numbers, distinct = pd.factorize(np.array(of_user, object))
        if len(distinct) < 2:
            raise InputError(f"validation_share: user {i} has training pairs of one prompt only; leave this user out")
        count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
        held.append(torch.from_numpy(np.isin(numbers, chance.permutation(len(distinct))[:count])))
    return held


@functools.cache
def _resampling(N):
    """Each user's share in the means of DRAWS bootstrap draws of N users, the same for all quantities: `[DRAWS, N]`."""
    return np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), DRAWS) / N


def interval(values, difference=False):
    """The mean over users of float64 `[N]` and its 95 % percentile interval, {mean, low, high}; None for None.
    A difference has p too, of the Wilcoxon signed-rank test that it is symmetric about 0."""
    if values is None:
        return None
    low, high = np.percentile(_resampling(len(values)) @ values, (2.5, 97.5)).tolist()
    found = {"mean": float(np.mean(values)), "low": low, "high": high}
    if difference:
        from scipy.stats import wilcoxon  # here: it takes a second to load
        values = values.round(9)  # whether two users tie must not hang on the order of additions
        found["p"] = float(wilcoxon(values, method="approx").pvalue) if values.any() else 1.0
    return found


def exchanged_accuracies(features, fits):
    """Accuracy of each unseen user's pairs under the user's own weights, everyone's mean weights, and another user's
    weights, as a mean over all others (None if there are none): three float64 `[N]`, means over the fits of a row."""
    N, weights = len(features), [torch.cat([fit.W_unseen, fit.W_unseen.mean(0, keepdim=True)]) for fit in fits]
    right = _accuracies(features, [fit.V for fit in fits], [w.expand(N, -1, -1) for w in weights]).mean(0)  # (N, N + 1)
    own = right.diagonal()
    return own, right[:, -1], (right[:, :-1].sum(1) - own) / (N - 1) if N > 1 else None


def basis_of(fits, V_final):
    """What the basis of one row looks like: the kept seed's, and the principal angles between the spans of all seeds,
    in degrees, smallest first, means over pairs of seeds. Cosines are absolute, entropies in nats; the effective rank
    is the exponential of the entropy of the squared singular values of V diag(mean w)."""
    from scipy.linalg import subspace_angles
    from scipy.stats import entropy
    kept = best_fit(fits)
    V, w, head = (tensor.double().cpu().numpy() for tensor in (kept.V, kept.W, V_final.reshape(-1)))
    unit = V / np.linalg.norm(V, axis=0)
    between = np.abs(unit.T @ unit)[np.triu_indices(V.shape[1], 1)]
    angles = [np.degrees(subspace_angles(one.V.double().cpu().numpy(), other.V.double().cpu().numpy()))[::-1]
              for one, other in itertools.combinations(fits, 2) if kept.K]
    return {"columns": V.shape[1],
            "effective_rank": float(np.exp(entropy(np.linalg.svd(V * w.mean(0), compute_uv=False) ** 2))),
            "largest_cosine_between_columns": float(between.max()) if between.size else None,
            "largest_cosine_to_head": float(np.abs(unit.T @ head).max() / np.linalg.norm(head)),
            "mean_weight_entropy": float(entropy(w, axis=1).mean()),
            "angles_between_seeds": np.mean(angles, 0).tolist() if angles else None}


def leaks_of(prompts):
    """{setting: share of the test pairs whose prompt stands among the training pairs of the same side; None: unknown}.
    prompts: {part: one list per user of the pairs' prompts, their texts or digests of these}, or None."""
    leaks = dict.fromkeys((SETTINGS[1], UNSEEN_TEST))
    for setting, train, test in zip(leaks, ("train", "train_unseen"), ("test", "test_unseen")):
        if prompts and {train, test} <= prompts.keys():
            known = set().union(*prompts[train])
            leaks[setting] = float(np.mean([prompt in known for of_user in prompts[test] for prompt in of_user]))
    return leaks


def evidence(fits, data, V_final, tossed=()):
    """Is it personal, by how much, and is any of it an artefact -> {evidence, chosen, leaks, verdict} of results.json.
    fits: list of `Fit`, of all ranks, alphas and seeds; with accuracies under "Validation" these choose the row.
    data: `test_unseen`, `[m_i, d]` or Pairs per unseen user; where known `prompts`, see `leaks_of`, and `longer`,
    {part: one array per user, 1 where the chosen answer is the longer one, -1 where the shorter, else 0}.
    tossed: (K, alpha, accuracies `[N_unseen]`) of models whose pairs' directions were tossed, in training and test."""
    rows, entries, parts = by_model(fits), [], []
    tossed = {(K, alpha): accuracies for K, alpha, accuracies in tossed}
    longer = data.get("longer") and [(1 + np.mean(signs)) / 2 for signs in data["longer"]["test_unseen"]]
    for (K, alpha), of_row in rows.items():
        accuracy = {setting: accuracy_of_users(of_row, setting) for setting in of_row[0].accuracies}
        minus = {name: {setting: interval(accuracy[setting] - accuracy_of_users(rows[other, alpha], setting), True)
                        if (other, alpha) in rows else None for setting in accuracy}
                 for name, other in (("minus_reference", 0), ("minus_pooled", 1))}
        own, mean, others = exchanged_accuracies(data["test_unseen"], of_row) if K > 1 else [None] * 3
        parts.append(own - mean if K > 1 else None)
        controls = {"mean_weights": mean, "other_users": others, "tossed": tossed.get((K, alpha)), "longer": longer}
        entries.append({"K": K, "alpha": alpha, "seeds": [fit.seed for fit in of_row],
                        "accuracy": {setting: interval(values) for setting, values in accuracy.items()}, **minus,
                        "controls": {name: interval(values) for name, values in controls.items()},
                        "personal_part": interval(parts[-1], True), "basis": basis_of(of_row, V_final)})
    best = None
    if VALIDATION in fits[0].accuracies:  # of equals the smallest rank
        best = max(entries, key=lambda entry: (entry["accuracy"][VALIDATION]["mean"], -entry["K"]))
    chosen = {key: best and best[key] for key in ("K", "alpha")} | {"by": "validation" if best else "none"}
    judged = [(entry, part) for entry, part in zip(entries, parts) if part is not None and best in (None, entry)]
    leaks = leaks_of(data.get("prompts"))
    users = len(data["test_unseen"])
    if judged:
        verdict, named, lines = judgement(*zip(*judged))
    else:
        verdict, named = "no" if users >= FEWEST_USERS else "undecided", best or entries[-1]
        lines = [f"{verdict.capitalize()}: {_name(named)} is one reward for everybody, it has no user weights."]
    explained, signs = explanations(entries, named, verdict, leaks[UNSEEN_TEST], users)
    if signs:
        lines[0] += " But see the signs of an artefact below."
    lines += explained
    if collapsed := [entry for entry, of_row in zip(entries, rows.values()) if entry["K"] and all(
            (cosine_similarity(fit.V, V_final.to(fit.V), 0).abs() >= COLLAPSED).all() for fit in of_row)]:
        lines += [f"Collapsed onto the reward head, all columns within a cosine of {COLLAPSED}: {_name(*collapsed)}. "
                  "Put smaller penalties into alpha_list and have validation_share choose."]
    return {"evidence": entries, "chosen": chosen, "leaks": leaks,
            "verdict": {"personal": verdict, "text": "\n".join(lines)}}


def judgement(entries, parts):
    """The verdict on rows with user weights -> ("yes" | "no" | "undecided", the row it names, lines of text).
    parts: the unseen users' personal parts, float64 `[N]` of each row. Intervals of several rows hold for all at once:
    half-widths are the 95 % quantile of the largest deviation of any row from its mean, in units of standard errors.
    These are taken from the normal distribution to Student's t, for a bootstrap of few users is too narrow."""
    from scipy.stats import norm, t
    parts, N, rows = np.stack(parts, 1), len(parts[0]), len(entries)  # (N, rows)
    mean, draws = parts.mean(0), _resampling(N) @ parts
    error, freedom = draws.std(0), max(N - 1, 1)
    errors = np.percentile((np.abs(draws - mean) / np.where(error > 0, error, np.inf)).max(1), 95)
    half = (N / freedom) ** 0.5 * t.ppf(norm.cdf(errors), freedom) * error
    low, high = mean - half, mean + half
    above = [entry for entry, end in zip(entries, low) if end > 0]
    i = np.where(low > 0, mean, mean - 2).argmax()  # the largest, of those above 0 if any is
    verdict = "undecided" if N < FEWEST_USERS else "yes" if above else "no" if high.max() < NOTHING else "undecided"
    own, others = entries[i]["accuracy"][UNSEEN_TEST]["mean"], entries[i]["controls"]["mean_weights"]["mean"]
    lines = [f"{verdict.capitalize()}: at {_name(entries[i])} unseen users' own weights predict {own:.3f} of their "
             f"unseen pairs, everybody's mean weights {others:.3f}: a personal part of {mean[i]:+.3f}, with a 95 % "
             f"interval over users of [{low[i]:+.3f}, {high[i]:+.3f}], " + (
                 f"which holds for all {rows} models at once and is wider than those in the tables." if rows > 1 else
                 "a little wider than in the tables, for the number of users.")]
    if rows > 1:
        lines += [f"By such intervals the personal part is above 0 at {_name(*above) or 'no rank'}."]
    if own <= 0.5:
        lines += ["But own weights predict no better than chance."]
    if N < FEWEST_USERS:
        lines += [f"{N} unseen users are too few to tell, at least {FEWEST_USERS} are needed."]
    elif verdict == "undecided":  # an interval shrinks with the root of the number of users
        users = N * ((high[i] - low[i]) / 2 / max(mean[i], NOTHING - mean[i])) ** 2
        lines += [f"About {max(N + 1, float(f'{users:.2g}')):,.0f} unseen users with as many pairs as "
                  f"these {N} would decide it."]
    return verdict, entries[i], lines


def explanations(entries, named, verdict, leak, users):
    """Lines on what is the same for everybody, and on what may only look like a preference; the signs of an artefact.
    leak: a share or None; users: how many unseen ones."""
    at, lines = {entry["K"]: entry for entry in entries if entry["alpha"] == named["alpha"]}, []
    if users >= FEWEST_USERS and 0 in at and (reference := at[0]["accuracy"][UNSEEN_TEST])["low"] <= 0.5:
        is_at = "is at or below" if reference["mean"] <= 0.5 else "cannot be told from"
        lines += [f"The reference {is_at} chance (K = 0, {INTERVAL.format(**reference)}): either this vector is not the "
                  "model's reward head, or that head knows little of these choices."]
    if 0 in at and 1 in at:
        gain, more = at[1]["minus_reference"][UNSEEN_TEST], named["minus_pooled"][UNSEEN_TEST]
        lines += [f"One direction for everybody (K = 1) against the reference: {DIFFERENCE.format(**gain)}" + (
            f"; {_name(named)} against K = 1: {DIFFERENCE.format(**more)}." if named["K"] > 1 else ".")]
        if gain["low"] > 0 and verdict != "yes" and users >= FEWEST_USERS:
            lines += ["So one direction explains the gain over the reference: it is the same for everybody."]
    signs = ["shared prompts"] if leak else []
    for key, name in ("tossed", "trained on choices swapped by a coin"), ("longer", "taking the longer answer"):
        if found := next(filter(None, (entry["controls"][key] for entry in entries)), None):
            lines += [f"Control, {name}: {INTERVAL.format(**found)}; chance is 0.5."]
            signs += [name] if found["low"] > 0.5 and users >= FEWEST_USERS else []
    lines += ["Whether test prompts stand among the training prompts is not known." if leak is None else
              f"Of the unseen users' test pairs {leak:.1%} have a prompt that stands among their training pairs.",
              f"Signs of an artefact: {'; '.join(signs) or 'none in these checks'}."]
    return lines, signs


def _name(*entries):
    """`K = 2, 3 (alpha 0) and K = 2 (alpha 0.001)` of the entries."""
    return " and ".join(f"K = {', '.join(str(entry['K']) for entry in entries if entry['alpha'] == alpha)} "
                        f"(alpha {alpha:g})" for alpha in dict.fromkeys(entry["alpha"] for entry in entries))


# ---------------------------------------------------------------------------------------------------------------------
# 7. Pipelines
# ---------------------------------------------------------------------------------------------------------------------


CHECKPOINT_FILE, FEW_SHOT_CHECKPOINT_FILE = ".training.pt", ".vary_fewshot.pt"  # beside results, until these are there


def _members(K_list, alpha_list, seeds):
    """The members of a sweep: alpha outer, rank, seed inner. A whole alpha stays whole, as it is printed."""
    alphas = [alpha if isinstance(alpha, int) else float(alpha) for alpha in alpha_list]
    return [Member(int(K), alpha, int(seed)) for alpha in alphas for K in K_list for seed in seeds]


def _fit(members, parts, V_final, num_iterations, regularized, threshold, device, checkpoint=None):
    """Train the members, fit the unseen users few-shot, evaluate -> a Fit each. parts: features under each setting."""
    trained = [member for member in members if member.K]
    N, N_unseen = (len(parts[setting]) for setting in (SETTINGS[0], SETTINGS[2]))
    bases, fits = iter(fit_basis(parts[SETTINGS[0]], trained, V_final, num_iterations, 0.5, regularized, device,
                                 checkpoint) if trained else ()), []
    for member in members:
        w, V, loss = next(bases) if member.K else (torch.ones(N, 1, device=device), V_final, math.nan)
        w, V = prune(w, V, threshold)
        fits.append(Fit(member.K, member.alpha, member.seed, V, w, torch.ones(N_unseen, 1, device=device), loss))
    personal = [fit for fit in fits if fit.V.shape[1] > 1]
    if personal:
        scores = list(_scores(parts[SETTINGS[2]], torch.cat([fit.V for fit in personal], 1)))
        weights = fit_users(scores, [Member(fit.K, fit.alpha, fit.seed) for fit in personal],
                            [fit.V.shape[1] for fit in personal], FEW_SHOT_ITERATIONS, 0.5 if regularized else 0.1)
        for fit, w in zip(personal, weights):
            fit.W_unseen = w
    for setting, features in parts.items():
        weights = [fit.W_unseen if setting in SETTINGS[2:] else fit.W for fit in fits]
        for fit, accuracies in zip(fits, _accuracies(features, [fit.V for fit in fits], weights)):
            fit.accuracies[setting] = accuracies
    return fits


def run(K_list, alpha_list, V_final, train_features, test_features_sparse, train_features_unseen,
        test_features_sparse_unseen, N, N_unseen, device, seed=0, num_iterations=1000, fits=None, checkpoint=None,
        validation_share=0, prompts=None, tossed=None, regularized=False, threshold=0.0):
    """Sweep ranks and penalties: learn LoRe on the seen users, fit the unseen few-shot, evaluate and print.
    K_list: ranks; 0 is the reference model (V_final, every weight 1), 1 the pooled Bradley-Terry model.
    alpha_list: penalties of `LoRe`. V_final: the reward head, float32 `[d, 1]`.
    The four features: one float32 `[m_i, d]` (or Pairs) per user; N and N_unseen: how many users.
    seed: whole number, or several whose accuracies are averaged; all are trained together.
    fits: a list that is extended with a `Fit` per alpha, rank and seed. checkpoint: see `fit_basis`.
    validation_share: of each seen user's training prompts, held out; fits then have accuracies of "Validation", too.
    prompts: a list per seen user of what tells the pairs' prompts apart; default every pair has its own.
    tossed: a list that is extended with (K, alpha, accuracies `[N_unseen]`) of the largest rank where no choice means
    anything. All pairs are tossed: an untossed test would still see on which side of any direction their mean lies.
    Returns 8 arrays of length len(alpha_list) * len(K_list), alpha outer: the mean accuracy over users of the four
    SETTINGS, then for each a quarter of the standard deviation over users. Raises InputError on unusable arguments."""
    seeds = seed if isinstance(seed, (list, tuple, range, np.ndarray)) else [seed]
    check_settings(K_list=K_list, alpha_list=alpha_list, seeds=seeds, num_iterations=num_iterations,
                   threshold=threshold, validation_share=validation_share)
    device, V_final = check_device(device), check_head(V_final, "V_final")
    parts = {setting: check_features(features, name, users, len(V_final)) for setting, features, name, users in zip(
        SETTINGS, (train_features, test_features_sparse, train_features_unseen, test_features_sparse_unseen),
        ("train_features", "test_features_sparse", "train_features_unseen", "test_features_sparse_unseen"),
        (N, N, N_unseen, N_unseen))}
    if validation_share:
        train = parts[SETTINGS[0]]
        held = hold_out(prompts or [range(len(X)) for X in train], validation_share)
        parts[VALIDATION], parts[SETTINGS[0]] = ([X[rows] for X, rows in zip(train, of)] for of in (held, [~h for h in held]))
    members, how = _members(K_list, alpha_list, seeds), (V_final.to(device), num_iterations, regularized, threshold, device)
    found = _fit(members, parts, *how, checkpoint)
    largest = max(members, key=lambda member: member.K)
    if tossed is not None and largest.K > 1:
        coins = {setting: toss(parts[setting], i) for i, setting in enumerate((SETTINGS[0], *SETTINGS[2:]))}
        fit, = _fit([largest], {s: coin if s == UNSEEN_TEST else list(coin) for s, coin in coins.items()}, *how)
        tossed.append((fit.K, fit.alpha, fit.accuracies[UNSEEN_TEST]))
    if fits is not None:
        fits.extend(found)
    return _report(found, {"alpha": "alpha", "Rank": "K"} if regularized else {"K": "K"})


def _report(fits, lines):
    """Print each model's accuracies and return the eight arrays of `run`; seeds are averaged user by user."""
    means, bands = ([[] for _ in SETTINGS] for _ in range(2))
    for group in by_model(fits).values():
        for label, field in lines.items():
            print(label, ":", getattr(group[0], field))
        for i, setting in enumerate(SETTINGS):
            print(setting)
            accuracies = accuracy_of_users(group, setting)
            _print_accuracy(accuracies)
            means[i].append(np.mean(accuracies))
            bands[i].append(np.std(accuracies) / 4)
    return tuple(np.array(values) for values in means + bands)


def run_regularized(K_list, alpha_list, V_final, train_features, test_features_sparse, train_features_unseen,
                    test_features_sparse_unseen, N, N_unseen, device, seed=0, num_iterations=20000, threshold=1e-2,
                    **options):
    """`run` with `LoRe_regularized`: alternating steps, a cosine anchor to V_final, unused columns left out.
    threshold: leave out columns whose largest weight among the seen users is below it; 0 keeps all."""
    return run(K_list, alpha_list, V_final, train_features, test_features_sparse, train_features_unseen,
               test_features_sparse_unseen, N, N_unseen, device, seed, num_iterations, regularized=True,
               threshold=threshold, **options)


def run_few_shot_vary_shots(trials, alpha_list, K_list, num_shots, train_features, train_features_unseen,
                            test_features_sparse_unseen, V_final, N, N_unseen, device, seed=0, num_iterations=500,
                            groups=None, checkpoint=None, of_users=None):
    """How the accuracy on unseen users grows with the number of pairs that they are fitted from.
    trials: how often each number of shots is drawn anew; num_shots: list of whole numbers. Otherwise as `run`.
    groups: for each unseen user an int64 `[m_i]` that names the group of each pair, such as its conversation, numbered
    from 0; a shot is then a whole group. of_users: a list that is extended with a dict per alpha, rank and number of
    shots: K, alpha, shots, and under each of SETTINGS[2:] means over trials `[N_unseen]`.
    Returns 4 lists over num_shots (for each alpha and rank in turn, where there are several): mean and standard
    deviation over trials of the few-shot train accuracy, then of the accuracy on unseen users' unseen prompts."""
    check_settings(K_list=K_list, alpha_list=alpha_list, num_shots=num_shots, trials=trials, seed=seed,
                   num_iterations=num_iterations)
    device, V_final = check_device(device), check_head(V_final, "V_final")
    train, train_unseen, test_unseen = (check_features(part, name, users, len(V_final)) for part, name, users in (
        (train_features, "train_features", N), (train_features_unseen, "train_features_unseen", N_unseen),
        (test_features_sparse_unseen, "test_features_sparse_unseen", N_unseen)))
    if groups is not None:
        check_groups(groups, train_unseen)
    members = _members(K_list, alpha_list, [seed])
    trained = [member for member in members if member.K]
    bases = iter(fit_basis(train, trained, V_final, num_iterations, 0.5, device=device, checkpoint=checkpoint)
                 if trained else ())
    results = ([], [], [], [])
    for member in members:
        V = next(bases)[1] if member.K else V_final.to(device)
        print("K :", member.K)
        S_train, S_test = (list(_scores(part, V)) for part in (train_unseen, test_unseen))
        for shots in num_shots:
            print("Shots :", shots)
            found = dict(zip(SETTINGS[2:], _trials(member, S_train, S_test, shots, trials, groups)))
            for i, (setting, accuracies) in enumerate(found.items()):
                print(setting)
                _print_accuracy(values := accuracies.mean(1))
                results[2 * i].append(float(np.mean(values)))
                results[2 * i + 1].append(float(np.std(values)))
            if of_users is not None:
                of_users.append({"K": member.K, "alpha": member.alpha, "shots": shots,
                                 **{setting: accuracies.mean(0) for setting, accuracies in found.items()}})
    return results


def _trials(member, S_train, S_test, shots, trials, groups):
    """Fit every unseen user from `shots` pairs, drawn anew in each trial -> two float64 arrays `[trials, users]`,
    the accuracy on these pairs and on the test pairs. S: the pairs' scores X V `[m_i, K]` of each user."""
    generator = member.generator(2 + shots)
    drawn = [S for _ in range(trials) for S in sample_shots(S_train, shots, generator, groups)]
    w = torch.ones(len(drawn), 1, device=drawn[0].device)
    if member.K > 1:
        w, = fit_users(drawn, [member], [member.K], FEW_SHOT_ITERATIONS, 0.1)
    train = [(S @ w[i] > 0).double().mean().item() for i, S in enumerate(drawn)]
    w = w.reshape(trials, len(S_test), -1)
    test = torch.stack([(S @ w[:, i].T > 0).double().mean(0) for i, S in enumerate(S_test)])  # (users, trials)
    return np.reshape(train, (trials, -1)), test.T.cpu().numpy()


def solve(train_features, num_basis_vectors, num_iterations=1000, learning_rate=0.01, seed=0):
    """Train `LoRe` without a penalty -> (softmax(W) `[N, K]`, V `[d, K]`)."""
    return solve_regularized(None, 0.0, train_features, num_basis_vectors, num_iterations, learning_rate, seed)


def solve_regularized(V_sft, alpha, train_features, num_basis_vectors, num_iterations=1000, learning_rate=0.01, seed=0,
                      model=LoRe):
    """Train `LoRe` -> (softmax(W) `[N, K]`, V `[d, K]`)."""
    X = check_features(train_features, "train_features")
    return model(V_sft, alpha, len(X), X[0].shape[1], num_basis_vectors, num_iterations, learning_rate, seed).train(X)


def solve_regularized_simplex(V_sft, alpha, train_features, num_basis_vectors, num_iterations=1000, learning_rate=0.01,
                              seed=0):
    """Train `LoRe_regularized` -> (softmax(W) `[N, kept]`, V `[d, kept]`), kept <= K columns."""
    return solve_regularized(V_sft, alpha, train_features, num_basis_vectors, num_iterations, learning_rate, seed,
                             LoRe_regularized)


def learn_multiple_few_shot(train_features, V, num_iterations=FEW_SHOT_ITERATIONS, learning_rate=0.1, seed=0):
    """Train `PersonalizeBatch` -> list of N simplex vectors `[K]`."""
    X, V = check_features(train_features, "train_features"), check_matrix(V, "V")
    return PersonalizeBatch(len(X), *V.shape, num_iterations, learning_rate, seed).train(X, V)


def learn_single_reward(train_features, num_iterations=1000, learning_rate=0.01, seed=0):
    """One Bradley-Terry model for all users, LoRe at K = 1 -> V `[d, 1]`. A baseline."""
    return solve(train_features, 1, num_iterations, learning_rate, seed)[1]


def learn_single_reward_regularized(V_ref, alpha, train_features, num_iterations=1000, learning_rate=0.01, seed=0):
    """`learn_single_reward` with the penalty alpha * |V - V_ref|^2 -> V `[d, 1]`. A baseline."""
    return solve_regularized(V_ref, alpha, train_features, 1, num_iterations, learning_rate, seed)[1]


def learn_multiple(train_features, num_iterations=1000, learning_rate=0.01, seed=0):
    """A Bradley-Terry model of each user's own -> (N weights `[1]`, all 1, and N bases `[d, 1]`). A baseline."""
    features = check_features(train_features, "train_features")
    V = [learn_single_reward([X], num_iterations, learning_rate, seed) for X in features]
    return [torch.ones(1) for _ in V], V


def prepare_arguments(description, folder, model_name, embeds=True):
    """Read and check the command line of a prepare.py; with --demo build the stand-in model, for the data in demo/.
    embeds: whether the script itself runs the model, which asks for a GPU unless a model was named.
    Returns a namespace: dir, data (a folder, or None for the download), model, limit, overwrite, demo, label (of the
    data). Raises InputError: --limit below 1, --demo with other sources, no CUDA GPU for the default model."""
    parser = script_parser(description, folder)
    parser.add_argument("--data", type=Path, metavar="DIR", help="read the splits from here instead of downloading "
                        "them: parquet, jsonl, csv, the last two also .gz; as in demo/ beside this script")
    parser.add_argument("--model", metavar="ID_OR_PATH", help=f"the reward model (default: {model_name})")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each split, or users")
    parser.add_argument("--demo", action="store_true", help="the synthetic data in demo/ and a tiny stand-in model")
    parser.add_argument("--overwrite", action="store_true", help="replace finished embeddings of another model or data")
    args = parser.parse_args()
    if args.limit is not None:
        check_settings(**{"--limit": args.limit})
    if args.demo and (args.data or args.model):
        raise InputError("--demo brings its own data and model; leave out --data and --model, or --demo")
    if embeds and not args.demo and not args.model:
        check_gpu(model_name)
    check_writable(args.dir)
    args.label = "synthetic demo" if args.demo else args.data.name if args.data else None
    if args.demo:
        print("demo: the reward model is a tiny stand-in with random weights and the data are synthetic, written for "
              "this demo; the accuracies say nothing about real models or people")
        args.data, args.model = Path(folder) / "demo", args.dir / ".standin"
        if process_rank() == 0:
            texts = [json.dumps(row) for path in sorted(args.data.glob("*.jsonl.gz")) for _, row in read_rows(path)]
            build_standin_model(args.model, texts)
        if process_count() > 1:
            dist.barrier()
    args.model = os.path.normpath(args.model) if os.path.isdir(args.model or "") else args.model or model_name
    return args


def warn_of_equal_sides(what, equal, pairs):
    """Say how many pairs have two equal texts: their margin is 0, so they count as wrong for ever, as released."""
    if equal:
        print(f"{what}: {equal:,} of {pairs:,} pairs have two equal texts and count as wrong under every reward"
              + (f"; warning: that is {equal / pairs:.1%}, leave them out" if equal > 0.01 * pairs else ""))


def warn_of_blank_texts(what, texts):
    """Say how many texts are blank, which are embedded as they are."""
    if blank := sum(not text.strip() for text in texts):
        print(f"warning: {blank:,} {what} are blank, and stay as they are")


def build_standin_model(folder, texts, seed=0, hidden_size=64, layers=2, heads=4, key_value_heads=2, context=8192):
    """Write a tiny Llama reward model of random weights to `folder`: config, safetensors, tokenizer, chat template.
    texts: what the byte-level BPE tokenizer is trained on. hidden_size: d, a multiple of 2 * heads. Equal arguments
    give equal weights, in any process."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2048, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
                                        pad_token="<|pad|>")  # of its own, as the end of a turn stands in the middle too
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>"
        "\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_value_heads,
                         max_position_embeddings=context, num_labels=1, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config.architectures = ["LlamaForSequenceClassification"]
    with torch.device("meta"):
        weights = dict(LlamaForSequenceClassification(LlamaConfig(**config.to_dict())).named_parameters())
    # Flat attention and a weak MLP keep the last state near a mean over the words read, which tells styles apart.
    gains, generator = {"v_proj": 1.0, "o_proj": 2.0, "score": 1.0}, torch.Generator().manual_seed(seed)
    for name, weight in sorted(weights.items()):
        layer, weights[name] = name.split(".")[-2], torch.ones(weight.shape)  # as the norms stay
        if weight.ndim == 2:
            std = 1.0 if layer == "embed_tokens" else gains.get(layer, 0.3) / weight.shape[1] ** 0.5
            torch.nn.init.normal_(weights[name], std=std, generator=generator)
    with atomic_write(Path(folder) / "model.safetensors") as file:
        file.write(safetensors.torch.save(weights, {"format": "pt"}))
    try:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # a full disk: the tokenizers' library in Rust has a class of its own for it
        raise OSError(0, str(error), str(folder)) from None


# ---------------------------------------------------------------------------------------------------------------------
# 8. Results and plots
# ---------------------------------------------------------------------------------------------------------------------

RELEASED_BAND = False  # True: in the picture a quarter of the standard deviation over users, as released
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.25, "pdf.fonttype": 42}


def _about_run(data, about, config):
    """What every result carries: settings, versions, counts, the model and data that the embeddings name."""
    from importlib.metadata import version
    parts, d = ("train", "test", "train_unseen", "test_unseen"), data["train"][0].shape[1]
    probe = torch.randn(d, 1, generator=torch.Generator().manual_seed(0))  # scores only pairs of equal sides 0
    return {"config": {"data": about["title"], "model": about.get("model"), **config},
            "identity": about.get("identity"), "users": data["seen"], "unseen_users": data["unseen"],
            "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "numpy", "numba")}},
            "counts": {"seen users": len(data["seen"]), "unseen users": len(data["unseen"]),
                       **{f"{part.replace('_', ' ')} pairs": sum(map(len, data[part])) for part in parts},
                       "pairs with equal sides": sum(int((S == 0).sum()) for part in parts
                                                     for S in _scores(data[part], probe)), "d": d}}


def _shown(results):
    """The entries that tables and pictures show: the reference once, not once an alpha."""
    return [entry for entry in results["evidence"] if entry["K"] or entry["alpha"] == results["evidence"][0]["alpha"]]


def _cell(value):
    """The text of an interval, a number, a list of numbers, or of what is not known."""
    if isinstance(value, dict):
        return (DIFFERENCE + ", p {p:.2g}" if "p" in value else INTERVAL).format(**value)
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(entries, values):
    """A DataFrame of texts, a row per dict with K and alpha; values: of such a dict {heading: value}."""
    return pd.DataFrame([{"K": str(entry["K"] or "ref"), "alpha": f"{entry['alpha']:g}" if entry["K"] else "-"} | {
        heading.replace("_", " "): _cell(value) for heading, value in values(entry).items()} for entry in entries])


def print_results(results):
    """What a sweep ends with: the accuracies with their intervals, and the verdict."""
    accuracies = _table(_shown(results), lambda entry: entry["accuracy"])
    print(f"\n{accuracies.to_string(index=False)}\n\n{results['verdict']['text']}")


def report(results):
    """`report.md` of what `results.json` holds: the verdict, then the tables that it rests on."""
    counts, chosen, (first, *more) = results["counts"], results["chosen"], results["verdict"]["text"].splitlines()
    trained, fits = ([entry for entry in results[name] if entry["K"]] for name in ("evidence", "fits"))

    def markdown(entries, values):
        table = _table(entries, values)
        return "\n".join(f"| {' | '.join(row)} |" for row in (table, ["---"] * table.shape[1], *table.to_numpy()))

    return "\n\n".join([
        f"# {results['config']['data']}: is the reward personal?", f"**{first}**", *more, "---",
        f"The verdict is about {'all ranks K >= 2 at once' if chosen['by'] == 'none' else 'the model'}, "
        f"{'as none was' if chosen['by'] == 'none' else 'that was'} chosen by held-out pairs. The basis was learnt from "
        f"{counts['train pairs']:,} pairs of {counts['seen users']} seen users; the weights of {counts['unseen users']} "
        f"unseen users from {counts['train unseen pairs']:,} of their pairs, tested on {counts['test unseen pairs']:,} "
        f"other pairs of theirs. {counts.get('pairs with equal sides', 0):,} pairs in all have two equal sides, and count as "
        "wrong under every reward. K is the rank: ref (K = 0) the pretrained reward head, the reference; K = 1 one direction "
        "for everybody; from K = 2 on a basis that users mix. alpha penalises the distance to the head. Figures: shares "
        "of pairs predicted right, means over users and seeds, with 95 % intervals over users, for each row alone; p: "
        "Wilcoxon signed-rank test.",
        "## Accuracy", markdown(_shown(results), lambda entry: entry["accuracy"]),
        "![accuracy by rank](accuracy_by_rank.png)",
        f"## Controls, on {UNSEEN_TEST}", "Accuracies with other weights: the mean of all unseen users' weights; each "
        "other user's weights, averaged over these users. Tossed: the largest rank, trained and tested on pairs that a "
        "coin has turned round. Longer: always taking the longer answer. Personal part: the accuracy with own weights "
        "minus that with mean weights; minus reference and minus pooled: minus that of K = 0 and of K = 1.",
        markdown(trained, lambda entry: entry["controls"] | {"personal_part": entry["personal_part"]} | {
            name: entry[name][UNSEEN_TEST] for name in ("minus_reference", "minus_pooled")}),
        "![personal part](personal_part.png)" * any(entry["personal_part"] for entry in trained),
        "## Basis and seeds", "Of each rank the kept seed, whose basis this is, has the " + (
            "lowest training loss." if chosen["by"] == "none" else "best accuracy on held-out pairs.") +
        " Cosines are absolute; entropies, in nats, means over seen users; angles, in degrees, between two seeds' spans.",
        markdown(trained, lambda entry: entry["basis"]), markdown(fits, lambda fit: {
            **{k: fit[k] for k in ("seed", "kept", "training_loss")}, UNSEEN_TEST: fit["mean_accuracy"][UNSEEN_TEST]}),
        "## Leaks", "Test pairs whose prompt stands among the training pairs of that group of users: " + "; ".join(
            f"{name} {'not known' if share is None else f'{share:.1%}'}" for name, share in results["leaks"].items())
        + "."]) + "\n"


def _picture(results, points, x, band="95 % interval", note=""):
    """A Figure of small multiples: a panel for each `row` and `column` of the points, a curve for each `line`, with its
    name at its end. Intervals are bands, or, of more than three curves, bars. x: "rank K", or a column of numbers."""
    from scipy.optimize import isotonic_regression
    os.environ.pop("MPLBACKEND", None)  # a notebook's backend, none here, would keep the library from loading
    import matplotlib.figure
    counts, seeds, frame = results["counts"], len(results["seeds"]), pd.DataFrame(points)
    positions, ranks = pd.factorize(frame[x])
    frame["x"] = positions if x == "rank K" else frame[x]
    rows, columns, lines = (frame[key].unique() for key in ("row", "column", "line"))
    scale = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, len({*lines} - {"ref"})))
    colors = dict(zip([line for line in lines if line != "ref"], scale.tolist())) | {"ref": "0.4"}
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure((2.2 * len(columns) + 2.4, 2.4 * len(rows) + 0.5), layout="constrained")
        figure.suptitle(f"{results['config']['data']}: {counts['seen users']} seen, {counts['unseen users']} unseen "
                        f"users, {seeds} seed{'s' * (seeds > 1)}\nband or bar: {band} over users{note}", fontsize=9)
        figure.supxlabel(x, fontsize=9)
        grid = figure.subplots(len(rows), len(columns), sharex=True, sharey="row", squeeze=False)
        for axes, (row, column) in zip(grid.flat, itertools.product(rows, columns)):
            level = (0, "nothing personal", "0.3") if row.startswith("personal") else (0.5, "chance", "0.3")
            axes.set(title=column if row == rows[0] else "", ylabel=row if column == columns[0] else "")
            axes.axhline(level[0], color="0.3", linewidth=0.9, linestyle="--")
            if x == "rank K":
                axes.set_xticks(range(len(ranks)), [K or "ref" for K in ranks])
            curves = list(frame[(frame["row"] == row) & (frame["column"] == column)].groupby("line", sort=False))
            for i, (line, of_line) in enumerate(curves):
                at, mean, low, high = of_line[["x", "mean", "low", "high"]].to_numpy(float).T
                if bars := len(curves) > 3 or len(at) == 1:
                    at = at + (i - (len(curves) - 1) / 2) * 0.12 * np.ptp(at) / max(len(at) - 1, 1)  # side by side
                    axes.vlines(at, low, high, color=colors[line], linewidth=1)
                else:
                    axes.fill_between(at, low, high, color=colors[line], alpha=0.15, linewidth=0)
                axes.plot(at, mean, "o-", color=colors[line], markersize=3, linewidth=0.7 if bars else 1.4)
            if column == columns[-1]:
                ends = sorted([level] + [(of_line["mean"].iloc[-1], line, colors[line]) for line, of_line in curves
                                         if len(of_line) > 1 or line != "ref"])
                gaps = 0.085 * np.ptp(axes.get_ylim()) * np.arange(len(ends))  # lest names lie over each other
                for y, (_, name, color) in zip(isotonic_regression([y for y, *_ in ends] - gaps).x + gaps, ends):
                    axes.annotate(name, (1, y), (3, 0), ("axes fraction", "data"), "offset points", va="center",
                                  color=color, fontsize=8, annotation_clip=False)
    return figure


def draw_accuracy_by_rank(results):
    """A Figure: a panel per setting, a curve per alpha, the reference at its left."""
    def released(entry, setting):
        of_user = np.mean([list(fit["accuracy_of_user"][setting].values()) for fit in results["fits"]
                           if (fit["K"], fit["alpha"]) == (entry["K"], entry["alpha"])], 0)
        return dict(zip(("low", "mean", "high"), of_user.mean() + of_user.std() / 4 * np.array([-1, 0, 1])))
    return _picture(results, [
        {"row": "accuracy", "column": setting, "line": f"alpha {entry['alpha']:g}" if entry["K"] else "ref",
         "rank K": entry["K"], **(released(entry, setting) if RELEASED_BAND else entry["accuracy"][setting])}
        for entry in _shown(results) for setting in SETTINGS], "rank K",
        "a quarter of the standard deviation" if RELEASED_BAND else "95 % interval")


def draw_personal_part(results):
    """A Figure: accuracy by whose weights are used, and the personal part below; a column per alpha."""
    return _picture(results, [
        {"row": row, "column": f"alpha {entry['alpha']:g}", "line": line, "rank K": entry["K"], **values}
        for entry in results["evidence"] if entry["personal_part"] for row, line, values in (
            ("accuracy", "own weights", entry["accuracy"][UNSEEN_TEST]),
            ("accuracy", "everybody's mean", entry["controls"]["mean_weights"]),
            ("accuracy", "other users'", entry["controls"]["other_users"]),
            ("personal part, own less mean", "own weights", entry["personal_part"])) if values], "rank K",
        note=f"; {UNSEEN_TEST}")


def save_picture(folder, name, figure):
    """Write `name`.png and `name`.pdf."""
    for form, metadata in (("png", None), ("pdf", {"CreationDate": None})):  # equal figures give equal files
        with atomic_write(Path(folder) / f"{name}.{form}") as file:
            figure.savefig(file, format=form, dpi=200, metadata=metadata)


def save_results(folder, fits, data, about, config, seconds, found):
    """Write results.json, results.csv, report.md, pictures, and a safetensors file per Fit -> what results.json holds.
    data: users' ids, `seen` and `unseen`, in the order of the rows of W and W_unseen, and features, `train`, `test`,
    `train_unseen`, `test_unseen`. about: of `find_reward_head`. config: what the reader set, JSON values. seconds: of
    training and evaluation. found: of `evidence`. The file without a seed in its name is the kept seed's. Files of an
    earlier sweep and the training's checkpoint go when these are there."""
    entries, about, rows = [], _about_run(data, about, config), by_model(fits)
    with together(folder, ["K_*.safetensors", "personal_part.*", CHECKPOINT_FILE]) as new:
        for fit in fits:
            kept, model = fit is best_fit(rows[fit.K, fit.alpha]), {"K": fit.K, "alpha": fit.alpha, "seed": fit.seed}
            several = len({alpha for _, alpha in rows}) > 1
            name = f"K_{fit.K}" + f"_alpha_{fit.alpha}" * several + f"_seed_{fit.seed}" * (not kept) + ".safetensors"
            save_tensors(new / name, {"V": fit.V, "W": fit.W, "W_unseen": fit.W_unseen}, **model,
                         **{key: value for key, value in about.items() if key != "counts"})
            entries.append({
                **model, "columns": fit.V.shape[1], "file": name, "kept": kept,
                "training_loss": None if math.isnan(fit.loss) else fit.loss,
                "mean_accuracy": {s: float(a.mean()) for s, a in fit.accuracies.items()},
                "std_over_users": {s: float(a.std()) for s, a in fit.accuracies.items()},
                "accuracy_of_user": {s: dict(zip(data["unseen" if s in SETTINGS[2:] else "seen"], a.tolist()))
                                     for s, a in fit.accuracies.items()}})
        results = {**about, "seeds": sorted({fit.seed for fit in fits}), "seconds": seconds, "fits": entries, **found}
        save_json(new / "results.json", results)
        save_text(new / "report.md", report(results))
        save_text(new / "results.csv", pd.json_normalize(_shown(results)).to_csv(index=False))
        save_picture(new, "accuracy_by_rank", draw_accuracy_by_rank(results))
        if any(entry["personal_part"] for entry in results["evidence"]):
            save_picture(new, "personal_part", draw_personal_part(results))
    return results


def save_few_shot_curves(folder, curves, of_users, data, about, config, groups=None):
    """Write what `run_few_shot_vary_shots` found as vary_fewshot.json, .csv, .tex, .png and .pdf.
    curves: what it returned; of_users: what it has extended; groups: what it was given. data, about: as for
    `save_results`. config: what the reader set, with K_list, alpha_list, num_shots, trials. The training's checkpoint
    in `folder` goes. Returns the table of accuracies on unseen prompts: a row per number of shots, a column per model."""
    about, shots = _about_run(data, about, config), list(map(int, config["num_shots"]))
    of_shot = "conversations" if groups else "pairs"
    has = [int(group.max()) + 1 for group in groups] if groups else list(map(len, data["train_unseen"]))
    reached = [float(np.minimum(has, n).mean()) for n in shots]
    note = f"\nfrom {min(has) + 1} {of_shot} on not every unseen user has so many" * (max(shots) > min(has))
    if note:
        print(f"{note}: of {max(shots)} the mean user has {max(reached):.1f}")
    names = "few_shot_train_mean", "few_shot_train_std", "unseen_mean", "unseen_std"
    by_shots = zip(*(np.reshape(curve, (-1, len(shots))).tolist() for curve in curves))
    found = [{"K": K, "alpha": alpha, **dict(zip(names, of_model))} for (alpha, K), of_model in
             zip(itertools.product(config["alpha_list"], config["K_list"]), by_shots)]
    frame = pd.DataFrame([{**{key: row[key] for key in ("K", "alpha", "shots")}, "setting": setting,
                           **interval(row[setting])} for setting in SETTINGS[2:] for row in of_users])
    once = frame[(frame["K"] > 0) | (frame["alpha"] == frame["alpha"][0])]  # the reference, the same at every alpha
    table = pd.DataFrame({
        f"K = {K}, alpha {alpha:g}" if K else "ref": pd.Series(map(_cell, rows.to_dict("records")), rows["shots"])
        for (alpha, K), rows in once[once["setting"] == UNSEEN_TEST].groupby(["alpha", "K"], sort=False)})
    x = f"{of_shot} per unseen user"
    points = [{**row, "row": row["setting"].replace(" Performance", ""), "column": f"alpha {row['alpha']:g}",
               "line": f"K = {row['K']}" if row["K"] else "ref", x: row["shots"]} for row in frame.to_dict("records")]
    with together(folder, [FEW_SHOT_CHECKPOINT_FILE, "vary_questions.*"]) as new:
        save_json(new / "vary_fewshot.json", {**about, "shots_are": of_shot, "shots_of_the_mean_user": reached,
                                              "curves": found})
        save_text(new / "vary_fewshot.csv", once.to_csv(index=False))
        save_text(new / "vary_fewshot.tex", table.to_latex(escape=True, caption=(
            f"{about['config']['data']}: {UNSEEN_TEST}, with 95 \\% intervals over users")))
        save_picture(new, "vary_fewshot", _picture({**about, "seeds": [config.get("seed", 0)]}, points, x,
                                                   note=f", {config['trials']} draws{note}"))
    return table


# ---------------------------------------------------------------------------------------------------------------------
# 9. Use
# ---------------------------------------------------------------------------------------------------------------------

PROBES = [[{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts)] for texts in (
    ("Is tea better than coffee?", "Tea."), ("How far is the moon?", "384,000 km.", "And the sun?", "150 million km."))]


def export_reward_model(folder, model_name, V, w=None, about=None, conversations=PROBES):
    """Write a reward model that anyone loads as `AutoModelForSequenceClassification`, and prove it.
    folder: a new one. model_name: the reward model of the basis V `[d, K]`. w: one user's weights `[K]`, for one label;
    default the whole basis, K labels. about: for the model card, what `load_tensors` and `load_json` read in results/.
    The backbone's files are linked, the head is float32. Raises InputError, and leaves nothing: where logits of these
    conversations, one by one or padded, are not phi @ V @ w within 1e-4, in float32 on the CPU; where the model needs
    code of its own or has no token to pad with."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as classes
    old_head, folder = load_reward_head(model_name), Path(folder)
    V = check_matrix(V, "V", len(old_head)).cpu()
    head = V if w is None else V @ check_matrix(torch.as_tensor(w).reshape(-1, 1), "w", V.shape[1], 1).cpu()
    config = load_json(_checkpoint_folder(model_name, "config.json") / "config.json", "model_type")
    if "auto_map" in config or config["model_type"] not in classes:
        raise InputError(f"model {model_name}: needs code of its own (trust_remote_code), which servers and trainers "
                         "do not run; take one that transformers has as a sequence classifier")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: a file, or not empty; give a new folder")
    about = about or {}
    learnt = (about.get("identity") or {}).get("reward_head")
    if learnt not in (None, digest_of(old_head.tolist())) or about.get("K", V.shape[1]) < V.shape[1]:
        raise InputError(f"{folder}: the basis is of {about.get('config', {}).get('model')} at rank {about.get('K')}, not "
                         f"{model_name}'s of {V.shape[1]} columns; give the model and `about` of this basis")
    model, tokenizer = load_reward_model(model_name, "cpu")
    expected = embed_conversations(conversations, model, tokenizer, batch_size=1).float() @ head  # (n, labels)
    pad, pad_name = _pad_token(model_name, tokenizer, conversations, model.get_input_embeddings().num_embeddings)
    del model  # memory need hold one of the two
    labels = [f"LABEL_{k}" for k in range(head.shape[1])]
    config |= {"architectures": [classes[config["model_type"]]], "num_labels": len(labels), "pad_token_id": pad,
               "id2label": dict(enumerate(labels)), "label2id": dict(zip(labels, itertools.count())),
               "problem_type": "regression"}  # a server would put another through a sigmoid or softmax
    try:
        with together(folder) as new:
            save_json(new / "config.json", config)
            _write_checkpoint(new, model_name, tokenizer, pad_name, head)
            save_text(new / "README.md", _model_card(model_name, V.shape[1], w is not None, about))
            _prove_export(new, conversations, expected)
    finally:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _pad_token(model_name, tokenizer, conversations, embeddings):
    """(id, name) of a special token with an embedding that no conversation holds: the pad token, else a spare one."""
    used = set(itertools.chain(*tokenize_conversations(conversations, tokenizer)))
    free = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()
            if token.special and i < embeddings and i not in used}
    if not free:
        raise InputError(f"model {model_name}: padding with the end of a turn would change scores, and none of its "
                         f"special tokens within {embeddings} embeddings is free; add one to its tokenizer")
    return min(free.items(), key=lambda item: (item[0] != tokenizer.pad_token_id, *(
        word not in item[1].lower() for word in ("pad", "reserved", "unused")), -item[0]))


def _write_checkpoint(folder, model_name, tokenizer, pad_name, head):
    """The checkpoint's own tokenizer files, which older versions of transformers can read too, with `pad_name` to pad;
    its shards, linked, or written anew where one held the old head; the new head in one of its own."""
    settings = "tokenizer_config.json", "special_tokens_map.json"
    names = {*tokenizer.vocab_files_names.values(), *settings, "tokenizer.json", "added_tokens.json",
             "chat_template.jinja", "chat_template.json"}
    shards, source = _shard_of_tensor(model_name), _checkpoint_folder(model_name, "*.safetensors", *names)
    for name in filter(lambda name: (source / name).exists(), names):
        shutil.copyfile(source / name, folder / name)
        if name in settings:
            save_json(folder / name, load_json(source / name) | {"pad_token": pad_name})
    old, = (name for name in shards if name.endswith("score.weight"))
    files = [*sorted({file for name, file in shards.items() if name != old}), None]  # None: the new head's
    paths = [folder / f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for file, path in zip(files, paths):
        if file in (shards[old], None):
            tensors = {name: tensor for name, tensor in load_tensors(source / file)[0].items() if name != old} if file else {
                old: head.T.contiguous()}
            with atomic_write(path) as new:
                new.write(safetensors.torch.save(tensors, {"format": "pt"}))
            continue
        try:
            os.link((source / file).resolve(), path)  # the hub's cache holds links
        except OSError:  # another disk
            shutil.copyfile(source / file, path)
    file_of = dict(zip(files, (path.name for path in paths)))
    save_json(folder / "model.safetensors.index.json", {
        "metadata": {"total_size": sum(path.stat().st_size for path in paths)},
        "weight_map": {name: file_of[None if name == old else file] for name, file in shards.items()}})


def _prove_export(folder, conversations, expected):
    """Raise InputError unless the model in `folder` gives the expected logits, one by one and in a padded batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(folder, torch_dtype=torch.float32).eval()
    texts, found = [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations], []
    for batch in (*([text] for text in texts), texts):
        tokens = tokenizer(batch, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.inference_mode():
            found.append(model(tokens["input_ids"], tokens["attention_mask"]).logits)
    error = (torch.cat(found) - expected.repeat(2, 1)).norm() / torch.cat(found).norm()
    if not error <= 1e-4:
        raise InputError(f"{folder.parent}: the export's logits differ from phi @ V by {error:.1e} of their size, so "
                         "nothing was written; transformers computes this model otherwise than embed_conversations")


def _model_card(model_name, K, personal, about):
    """The text of the export's README.md."""
    row = {"rank": about.get("K", K), "alpha": about.get("alpha")}
    facts = {"reward model": Path(model_name).name if os.path.isdir(model_name) else model_name,
             "data": about.get("config", {}).get("data"), **row, "seed": about.get("seed")}
    facts |= {f"accuracy, {UNSEEN_TEST}": entry["accuracy"][UNSEEN_TEST] for entry in about.get("evidence", ())
              if [entry["K"], entry["alpha"]] == list(row.values())}
    return "\n\n".join([
        "---\nlibrary_name: transformers\npipeline_tag: text-classification\n---", "# A low-rank reward model",
        ("One user's reward: one logit" if personal else f"A basis of {K} rewards that users mix: {K} logits") +
        " of a chat-formatted conversation, without a sigmoid or softmax. The head is in float32; in bfloat16 rewards "
        "lose digits that close answers may need.",
        "    tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "    model = AutoModelForSequenceClassification.from_pretrained(folder)\n"
        "    text = tokenizer.apply_chat_template(messages, tokenize=False)\n"
        "    model(**tokenizer(text, add_special_tokens=False, return_tensors='pt')).logits",
        "\n".join(f"- {name}: {_cell(value)}" for name, value in facts.items() if value is not None),
        *(["The whole run's verdict:", about["verdict"]["text"]] if "verdict" in about else [])]) + "\n"


def as_messages(role, content):
    """A text as one message of this role; a list of messages as it is. Raises InputError: neither."""
    if not isinstance(content, (str, list, tuple)):
        raise InputError(f"{content!r:.60}: neither a text nor a list of messages; give one of these")
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def personal_reward(model_name, V, weights, device=None, **options):
    """A reward as TRL's trainers call it: reward(prompts, completions, user=[..], **columns) -> list of float.
    V: `[d, K]`; weights: a dict, user -> w `[K]`; options: of `embed_conversations`. Prompts and completions are texts
    or lists of messages. Raises InputError, also when called: a user without weights."""
    model, tokenizer = load_reward_model(model_name, device)
    V = check_matrix(V, "V", model.config.hidden_size).cpu()
    W = {user: check_matrix(torch.as_tensor(w)[None], f"weights of {user}", 1, V.shape[1]).cpu()
         for user, w in (weights if isinstance(weights, dict) else dict(enumerate(weights))).items()}

    def personal_reward(prompts, completions, user, **columns):
        if not len(prompts) == len(completions) == len(user):
            raise InputError(f"{len(prompts)} prompts, {len(completions)} completions, {len(user)} users; give equally many")
        for unknown in set(user) - W.keys():
            raise InputError(f"user {unknown!r}: no weights; fit them from this user's choices with fit_new_user, and "
                             "give them to personal_reward")
        conversations = [as_messages("user", p) + as_messages("assistant", c) for p, c in zip(prompts, completions)]
        phi = embed_conversations(conversations, model, tokenizer, **options).float()
        return (phi @ V * torch.cat([W[one] for one in user])).sum(1).tolist()
    return personal_reward


def best_of_n(reward, prompt, completions, user):
    """Score the completions of one prompt for one user -> (scores, their numbers in order, best first)."""
    scores = reward([prompt] * len(completions), completions, user=[user] * len(completions))
    return scores, sorted(range(len(scores)), key=lambda i: -scores[i])


def _log_likelihoods(features, V, W):
    """log P of each choice under the reward V w_j of each seen user j: float64 `[m, N]`, m from 0."""
    V, W = check_matrix(V, "V").cpu(), check_matrix(W, "W", None, V.shape[1]).cpu()
    if len(features) == 0:
        return torch.zeros(0, len(W), dtype=torch.float64)
    scores, = _scores([check_matrix(features, "features", None, len(V))], V)
    return logsigmoid(scores.double() @ W.double().T / TEMPERATURE)


def fit_new_user(features, V, W):
    """A new user's weights, with the seen users as the prior -> (w `[K]`, posterior `[N]`).
    features: `[m, d]` (or Pairs), chosen minus rejected, m from 0; V: `[d, K]`; W: `[N, K]`, the seen users' weights.
    posterior: how probable each seen user's weights are after these choices; w is their mean."""
    posterior = _log_likelihoods(features, V, W).sum(0).softmax(0)
    return (posterior @ torch.as_tensor(W).cpu().double()).float(), posterior.float()


def question_values(candidates, V, W, posterior):
    """What the answer to each candidate pair would tell of a new user, in nats `[n]`: ask the largest next.
    candidates: `[n, d]` (or Pairs), either answer minus the other; posterior: `[N]`, of `fit_new_user`. The value is
    the mutual information of answer and user, the entropy of the mean answer less the mean entropy."""
    posterior = check_matrix(torch.as_tensor(posterior)[None], "posterior", 1, len(W))[0].cpu().double()  # (N,)
    P = _log_likelihoods(candidates, V, W).exp()  # (n, N)

    def entropy(p):
        return torch.special.entr(p) + torch.special.entr(1 - p)
    return (entropy(P @ posterior) - entropy(P) @ posterior).clamp(min=0).float()


def _asked(S, W, orders, questions):
    """A user's posterior weights after 1, 2, .. of the questions in each order: `[orders, questions, K]`.
    S: the scores X V of the user's pairs `[m, K]`; orders: pair numbers `[orders, n]`, the last one is repeated."""
    w = _log_likelihoods(S, torch.eye(S.shape[1]), W)[orders].cumsum(1).softmax(2) @ W.double()
    return w[:, np.minimum(range(questions), orders.shape[1] - 1)].float()


def _chosen_order(S, W, questions):
    """The pairs that `question_values` asks, each after the answers to those before: `[1, n]`."""
    order, V = [], torch.eye(S.shape[1])
    for _ in range(min(questions, len(S))):
        values = question_values(S, V, W, fit_new_user(S[order], V, W)[1])
        values[order] = -1
        order.append(int(values.argmax()))
    return torch.tensor([order])


def question_curves(questions, trials, alpha_list, K_list, data, V_final, device, seeds=(0, 1, 2), num_iterations=500):
    """Accuracy on unseen users' unseen prompts after 1, 2, .. answered questions, which are pairs of `train_unseen`.
    data: as for `save_results`; trials: how often random questions are drawn; ranks from 2 up. Returns a DataFrame K,
    alpha, fit, questions, mean, low, high: means over seeds, then over users, with their 95 % intervals."""
    check_settings(num_questions=questions, K_list=K_list, alpha_list=alpha_list, seeds=seeds, trials=trials,
                   num_iterations=num_iterations)
    questions = min(questions, max(map(len, data["train_unseen"])))
    members, found = [member for member in _members(K_list, alpha_list, seeds) if member.K > 1], {}
    fits = fit_basis(data["train"], members, V_final, num_iterations, 0.5, device=device) if members else []
    for member, (W, V, _) in zip(members, fits):
        S_train, S_test = ([S.cpu() for S in _scores(data[part], V)] for part in ("train_unseen", "test_unseen"))
        W, generator = W.cpu(), member.generator(2)
        random_orders = [torch.stack([torch.randperm(len(S), generator=generator)[:questions] for _ in range(trials)])
                         for S in S_train]
        by_fit = {"released fit, random": np.stack([_trials(member, S_train, S_test, shots, trials, None)[1].mean(0)
                                                    for shots in range(1, questions + 1)], 1)}  # (users, questions)
        for name, orders in (("posterior, random", random_orders),
                             ("posterior, chosen", [_chosen_order(S, W, questions) for S in S_train])):
            by_fit[name] = np.stack([(test @ _asked(S, W, order, questions).mT > 0).double().mean((0, 1)).numpy()
                                     for S, test, order in zip(S_train, S_test, orders)])
        for name, accuracies in by_fit.items():
            found.setdefault((name, member.K, member.alpha), []).append(accuracies)
    return pd.DataFrame([{"K": K, "alpha": alpha, "fit": name, "questions": i, **interval(of_users)}
                         for (name, K, alpha), of_seeds in found.items()
                         for i, of_users in enumerate(np.mean(of_seeds, 0).T, 1)])


def vary_questions(folder, data, V_final, about, config, device):
    """Print `question_curves`, a table, and write vary_questions.json, .csv, .png and .pdf; needs a rank from 2 up.
    data, about: as for `save_results`; config: what the reader set, with what `question_curves` takes."""
    frame = question_curves(config["num_questions"], config["trials"], config["alpha_list"], config["K_list"], data,
                            V_final, device, config["question_seeds"], config["num_iterations"])
    if process_rank() > 0 or frame.empty:
        return
    about, x = {**_about_run(data, about, config), "seeds": config["question_seeds"]}, "questions per unseen user"
    frame["model"] = [f"K = {K}, alpha {alpha:g}" for K, alpha in zip(frame["K"], frame["alpha"])]
    points = [{**row, "row": "accuracy", "column": row["model"], "line": row["fit"], x: row["questions"]}
              for row in frame.to_dict("records")]
    with together(folder) as new:
        save_json(new / "vary_questions.json", {**about, "curves": frame.to_dict("records")})
        save_text(new / "vary_questions.csv", frame.to_csv(index=False))
        save_picture(new, "vary_questions", _picture(about, points, x, note=f"; {UNSEEN_TEST}"))
    cells = frame.assign(cell=list(map(_cell, frame[["mean", "low", "high"]].to_dict("records"))))
    table = cells.pivot(index="questions", columns=["model", "fit"], values="cell")
    print(f"\n{UNSEEN_TEST}, mean over seeds {config['question_seeds']}, by questions asked: random pairs, or those that "
          "question_values puts first; as released, or with the seen users as the prior (posterior, fit_new_user):\n"
          f"{table.to_string()}")
