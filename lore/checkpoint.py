"""What is in a checkpoint: a whole model, an adapter, quantised weights, or a mixture.

A checkpoint is given by name: a folder, or the id of a model on the Hugging Face hub.
`inspect_checkpoint` looks at it once and decides, as `from_pretrained` of transformers does, which
of its files hold the weights. What cannot be used is refused in one line with the remedy.
"""

from __future__ import annotations

import dataclasses
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
import torch

from lore.files import ARCHIVES, READING_ERRORS, digest_of, parse_json_object, printable
from utils import InputError

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"  # all tensors of a small checkpoint
SHARD_INDEX = "model.safetensors.index.json"  # the file of each tensor of a large one

# `from_pretrained` reads the first of these that is there: transformers 4.46 and 5.23 agree.
WEIGHTS = (SINGLE_FILE, SHARD_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MERGE = "merge it first: `model.merge_and_unload()`, then `save_pretrained`"

# transformers 5.23 prefers these to all WEIGHTS, and older versions do not know them.
DISTRIBUTED_SHARD = re.compile(r"^shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")

# Files of weights that `from_pretrained` does not take, and what to do about each: the first
# pattern that a name matches.
OTHER_WEIGHTS = (
    (r"\.gguf$", "in GGUF format; give the checkpoint that it was converted from"),
    (
        DISTRIBUTED_SHARD,
        "a shard of one of several processes; load it with the version that wrote it, and save the "
        "whole model",
    ),
    (
        r"^(model|pytorch_model)(-\d+)+-of-\d+\.(safetensors|bin)$",
        f"a shard without its index; add the index, {SHARD_INDEX} or that of the .bin files",
    ),
    (
        r"^(model|pytorch_model)\.(safetensors\.index\.|bin\.index\.)?[^.]+\.(safetensors|bin|json)$"
        r"|^(model|pytorch_model)\.[^.]+-\d+-of-\d+\.(safetensors|bin)$",
        "a variant, which is not loaded without being asked for; load it with "
        "`from_pretrained(folder, variant=..)` and save it without one",
    ),
    (
        r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx)$",
        "not in the format of transformers; give the checkpoint that is",
    ),
)

# The number formats that can be computed with as they are, by their names in safetensors files
PLAIN_FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

LFS_POINTER = b"version https://git-lfs"  # how the file begins that git keeps for a large one


def is_plain_table(tensor: torch.Tensor) -> bool:
    """Whether this is a matrix `[n, d]` of numbers that can be computed with as they are."""
    return tensor.dtype in PLAIN_FORMATS.values() and tensor.ndim == 2 and tensor.numel() > 0


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What lies in a checkpoint, and what of it `from_pretrained` reads."""

    name: str  # as the user gave it
    folder: Path  # for an id on the hub its folder in the hub's cache
    is_on_hub: bool
    config: dict[str, Any]  # of config.json; empty if there is none
    weight_files: tuple[str, ...]  # relative to the folder; on the hub not downloaded yet
    index: dict[str, Any]  # of the index of shards; empty if there is one file

    @property
    def is_safetensors(self) -> bool:
        return all(file.endswith(".safetensors") for file in self.weight_files)

    @property
    def quantiser(self) -> str | None:
        """The method by which config.json says that the weights are quantised."""
        settings = _quantisation_config(self.config)
        return None if settings is None else str(settings.get("quant_method", "unknown"))


def _quantisation_config(config: dict[str, Any]) -> Any:
    """The settings of a quantiser, if there are any.

    In the config of a model of text and images, those of the text are nested.
    """
    settings = config.get("quantization_config")
    nested = config.get("text_config")
    if settings is None and isinstance(nested, dict):
        return nested.get("quantization_config")
    return settings


# ---- Folders


def checkpoint_folder(model_name: str | Path, *patterns: str) -> Path:
    """The folder of a checkpoint.

    For an id on the hub this is its folder in the hub's cache, after a download of the files whose
    names match one of `patterns`. Raises InputError: no such folder, and not served by the hub.
    """
    if os.path.isdir(model_name):
        return Path(model_name).resolve()
    if os.path.isfile(model_name):
        raise InputError(f"model {model_name}: it is a file; give the folder that holds it")

    from huggingface_hub import logging, snapshot_download

    logging.set_verbosity_error()  # its warnings about retries: the error below says it in one line
    try:
        return Path(snapshot_download(str(model_name), allow_patterns=patterns))
    except Exception as error:  # the hub's client has a class for each: unknown id, network, access
        raise InputError(
            f"model {model_name}: no such folder, and the hub did not serve it "
            f"({type(error).__name__}); check the name and the network, or give the path of a "
            "downloaded checkpoint"
        ) from None


def _names_of_files(model_name: str | Path, folder: Path, is_on_hub: bool) -> set[str]:
    """The names of the files of a checkpoint, of those on the hub also if not downloaded."""
    if is_on_hub:
        from huggingface_hub import list_repo_files

        try:
            return set(list_repo_files(str(model_name)))
        except Exception:  # offline: what was downloaded before has to do
            pass
    if not folder.is_dir():
        return set()
    return {path.name for path in folder.iterdir() if path.is_file()}


def download(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, with its weights, config and code on this machine."""
    if not checkpoint.is_on_hub:
        return checkpoint
    folder = checkpoint_folder(checkpoint.name, CONFIG, "*.py", *checkpoint.weight_files)
    return dataclasses.replace(checkpoint, folder=folder, is_on_hub=False)


# ---- Inspection


def inspect_checkpoint(model_name: str | Path) -> Checkpoint:
    """Look at what a checkpoint holds. No weights are downloaded.

    Raises InputError: unknown model; no weights of a whole model; an adapter, alone or beside whole
    weights; two different models; a damaged config or index.
    A missing config.json, missing shards and quantised weights are not refused: to read a single
    tensor, none of these is needed. `check_loadable` looks for them.
    """
    is_on_hub = not os.path.isdir(model_name)
    folder = checkpoint_folder(model_name, CONFIG, ADAPTER_CONFIG, "*.index.json")
    names = _names_of_files(model_name, folder, is_on_hub)
    what = f"model {model_name}"

    weights = next((name for name in WEIGHTS if name in names), None)
    _check_no_adapter(what, folder, names, weights)
    config = _read_config(what, folder / CONFIG) if CONFIG in names else {}
    _check_versions_agree(what, names, weights, config)
    if weights is None:
        raise InputError(f"{what}: {_why_no_weights(folder, names, is_on_hub)}")

    index = {}
    weight_files = (weights,)
    if weights.endswith(".index.json"):
        index = _read_index(what, folder / weights)
        weight_files = tuple(sorted(set(index["weight_map"].values())))
    elif weights == SINGLE_FILE and SHARD_INDEX in names and not is_on_hub:
        _check_shards_beside_are_equal(what, folder)
    return Checkpoint(str(model_name), folder, is_on_hub, config, weight_files, index)


def _check_no_adapter(what: str, folder: Path, names: set[str], weights: str | None) -> None:
    """Raise InputError if a checkpoint is an adapter, or is loaded with one if peft is installed.

    An adapter's weights without its config, beside a whole model, are never loaded.
    """
    has_config = ADAPTER_CONFIG in names
    adapter_files = [name for name in ADAPTER_WEIGHTS if name in names]
    if not has_config and (weights or not adapter_files):
        return
    base = ""
    if has_config:
        base_name = read_json(what, folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if base_name:
            base = f" of the model {base_name!r:.200}"
    if weights is None:
        raise InputError(
            f"{what}: an adapter{base}, not a whole model; load it with that model and its reward "
            f"head, and {MERGE}"
        )
    raise InputError(
        f"{what}: whole weights ({weights}) and an adapter{base}, which transformers adds to them "
        f"if peft is installed; if it is merged already, remove {ADAPTER_CONFIG}, else {MERGE}"
    )


def _check_versions_agree(
    what: str, names: set[str], weights: str | None, config: dict[str, Any]
) -> None:
    """Raise InputError if versions of transformers would read different files."""
    named = config.get("transformers_weights")
    if named not in (None, weights):
        raise InputError(
            f"{what}: its {CONFIG} names {named!r:.100} as transformers_weights, which not all "
            f"versions of transformers read; rename that file to {SINGLE_FILE} and remove the entry"
        )
    shards = sorted(name for name in names if DISTRIBUTED_SHARD.match(name))
    if shards and weights:
        raise InputError(
            f"{what}: shards of several processes ({shards[0]}) beside {weights}, and versions of "
            "transformers read different ones; remove those that are not meant"
        )


def _why_no_weights(folder: Path, names: set[str], is_on_hub: bool) -> str:
    """What is wrong with a checkpoint without any of WEIGHTS, and what to do."""
    broken_links = [
        name for name in WEIGHTS if (folder / name).is_symlink() and not (folder / name).exists()
    ]
    if broken_links:
        return f"{broken_links[0]} is a link to a file that is not there; download it again"

    for name in (*WEIGHTS, ADAPTER_CONFIG):
        for depth in ("*", "*/*"):  # a trainer's checkpoint-500, or snapshots/.. of the hub's cache
            nested = sorted(folder.glob(f"{depth}/{name}"))
            if nested and not is_on_hub:
                subfolder = str(nested[-1].parent.relative_to(folder))
                return f"no weights in it, but in folders below, as in {subfolder!r}; give that one"

    for pattern, explanation in OTHER_WEIGHTS:
        matching = sorted(name for name in names if re.search(pattern, name))
        if matching:
            return f"no {SINGLE_FILE} in it; {matching[0]!r:.100} is {explanation}"
    remedy = "give a checkpoint in safetensors format, as `save_pretrained` writes it"
    if is_on_hub:
        remedy += ", and check the network if it has one"
    return f"no {SINGLE_FILE} in it; {remedy}"


# ---- JSON


def read_json(what: str, path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint. what: begins the message. Raises InputError: it is damaged."""
    reason = damage(path)
    if reason is None:
        try:
            return parse_json_object(path.read_text(encoding="utf-8"))
        except READING_ERRORS as error:
            reason = f"is no JSON object ({one_line(error)}); download or save it again"
    raise InputError(f"{what}: its {path.name} {reason}")


def _read_config(what: str, path: Path) -> dict[str, Any]:
    """The content of config.json. Raises InputError: it is damaged."""
    config = read_json(what, path)
    if not isinstance(_quantisation_config(config), dict | None):
        raise InputError(
            f"{what}: quantization_config in its {path.name} is no JSON object; download or save "
            "it again"
        )
    return config


def _read_index(what: str, path: Path) -> dict[str, Any]:
    """The content of an index of shards. Raises InputError: it is damaged, or names no files."""
    index = read_json(what, path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            f"{what}: its {path.name} has no weight_map that names files; download or save it again"
        )
    for file in weight_map.values():
        is_inside = isinstance(file, str) and file and ".." not in PurePosixPath(file).parts
        if not is_inside or PurePosixPath(file).is_absolute():
            raise InputError(
                f"{what}: its {path.name} names {file!r:.100}, which is no file of the checkpoint; "
                "download or save it again"
            )
    return index


def damage(path: Path) -> str | None:
    """Why a file is not what a checkpoint should hold, and what to do; None if nothing shows."""
    if not os.path.isfile(path):  # no error for a name that is none
        return "is not there; download or save the checkpoint again"
    with open(path, "rb") as file:
        begin = file.read(len(LFS_POINTER))
    if not begin:
        return "is empty; download or save it again"
    if begin == LFS_POINTER:
        return "is a pointer of git-lfs and not the file itself; fetch it with `git lfs pull`"
    return None


def one_line(error: BaseException) -> str:
    """The text of an error, or its class if it has none, as one printable line of bounded length.

    Other people's names are in it.
    """
    text = " ".join(str(error).split())[:300]
    return printable(text) or type(error).__name__


# ---- Tensors


def open_safetensors(checkpoint: Checkpoint, file: str) -> safetensors.safe_open:
    """Open a safetensors file of a checkpoint. Raises InputError: it is missing or damaged."""
    if not file.endswith(".safetensors"):
        raise InputError(
            f"model {checkpoint.name}: no {SINGLE_FILE} in it, but {file!r:.100}; give a "
            "checkpoint in safetensors format, as `save_pretrained` writes it"
        )
    folder = checkpoint.folder
    if checkpoint.is_on_hub:
        folder = checkpoint_folder(checkpoint.name, file)
    path = folder / file
    reason = damage(path)
    if reason is None:
        try:
            return safetensors.safe_open(path, "pt")
        except READING_ERRORS as error:
            reason = f"is no whole safetensors file ({one_line(error)}); download or save it again"
    raise InputError(f"model {checkpoint.name}: its {file!r:.100} {reason}")


def file_per_tensor(checkpoint: Checkpoint) -> dict[str, str]:
    """The name of each tensor of a checkpoint -> the name of the safetensors file that holds it.

    Raises InputError: its weights are not in safetensors format, or damaged.
    """
    if checkpoint.index and checkpoint.is_safetensors:
        return checkpoint.index["weight_map"]
    file = checkpoint.weight_files[0]
    return dict.fromkeys(open_safetensors(checkpoint, file).keys(), file)


def open_tensor(checkpoint: Checkpoint, file: str, name: str) -> Any:
    """A tensor of a safetensors file, of which only the part that is indexed will be read.

    Raises InputError: the file is missing or damaged, does not hold the tensor, or holds it in a
    number format that cannot be computed with, such as integers.
    """
    opened = open_safetensors(checkpoint, file)
    if name not in opened.keys():
        raise InputError(
            f"model {checkpoint.name}: {file!r:.100} does not hold {name!r:.100}, which the index "
            "says; index and shards are of different saves, download or save them again"
        )
    tensor = opened.get_slice(name)
    if tensor.get_dtype() not in PLAIN_FORMATS:
        raise InputError(
            f"model {checkpoint.name}: its {name!r:.100} is in the number format "
            f"{tensor.get_dtype()}, which cannot be computed with; give the checkpoint as it was "
            "before it was quantised"
        )
    return tensor


def number_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """The name of each tensor -> its number format, such as "BF16" or "torch.int8".

    checkpoint: of `download`. Raises InputError: a safetensors file is missing or damaged; a tensor
    is in two files, of which transformers would take either.
    """
    formats = {}
    for file in checkpoint.weight_files:
        formats_in_file = _formats_in(checkpoint, file)
        twice = sorted(formats_in_file.keys() & formats.keys())
        if twice:
            raise InputError(
                f"model {checkpoint.name}: {twice[0]!r:.100} is in {file!r:.100} and in another of "
                "its files; they are of different saves, download or save the checkpoint again"
            )
        formats |= formats_in_file
    return formats


def _formats_in(checkpoint: Checkpoint, file: str) -> dict[str, str]:
    """The name of each tensor in one file of weights -> its number format.

    Nothing is said of a .bin file that cannot be loaded, as transformers says why, nor before torch
    2.6, which might run code from it.
    """
    if file.endswith(".safetensors"):
        opened = open_safetensors(checkpoint, file)
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
    if not ARCHIVES:
        return {}
    path = checkpoint.folder / file
    try:
        # With mmap the numbers stay on the disk. The format without archive does not allow it.
        tensors = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    except Exception:  # a class for each kind of damage
        return {}
    names = {dtype: name for name, dtype in PLAIN_FORMATS.items()}
    return {name: names.get(dtype, str(dtype)) for name, dtype in dtypes.items()}


def layer_of(name: str) -> str:
    """The layer of a tensor: a.b of a.b.weight, a.b.weight.absmax, a.b.weight_scale and a.b.SCB."""
    return re.sub(r"\.weight.*$|\.[^.]*$", "", name)


def head_names(names: Iterable[str]) -> list[str]:
    """Which of these tensors are reward heads: score.weight, also with a prefix such as model."""
    return [name for name in names if re.search(r"(^|\.)score\.weight$", name)]


def hold_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a model that still wraps its adapter."""
    # The last two are names that peft gives to the layers it wraps, whatever the kind of adapter.
    marks = (".lora_", ".base_layer.", ".modules_to_save.")
    return any(mark in name for name in names for mark in marks)


def _check_shards_beside_are_equal(what: str, folder: Path) -> None:
    """Raise InputError if whole shards beside the single file hold another model.

    `save_pretrained` leaves an old single file when it writes shards, and `from_pretrained` reads
    the old one. Of shards that it replaces by a single file it leaves the index alone, which does
    no harm; so an index that is damaged, or whose shards are not all there, is ignored.
    """
    try:
        files = sorted(set(_read_index(what, folder / SHARD_INDEX)["weight_map"].values()))
        shards = _digest_of_sample(safetensors.safe_open(folder / file, "pt") for file in files)
    except (InputError, *READING_ERRORS):
        return
    try:
        single = _digest_of_sample([safetensors.safe_open(folder / SINGLE_FILE, "pt")])
    except READING_ERRORS:
        return  # damaged: who opens it says so
    if single != shards:
        raise InputError(
            f"{what}: two different models, {SINGLE_FILE}, which transformers reads, and the "
            f"shards of {SHARD_INDEX}; remove the older one"
        )


def backbone_digest(checkpoint: Checkpoint) -> str:
    """A digest of all weights but the reward head, by a sample of the numbers of each tensor.

    It takes no longer for large tensors, and depends on the numbers alone: a download, a local copy
    of it, other shards or a copy in a wider number format have the same. A model that was trained
    further has another, as training changes all rows of a matrix; a model with a few edited rows
    may not. Config and tokenizer are no part of it.
    checkpoint: of `download`. Raises InputError: its weights are not in safetensors format, or
    damaged.
    """
    files = (open_safetensors(checkpoint, file) for file in checkpoint.weight_files)
    return _digest_of_sample(files, with_head=False)


def _digest_of_sample(files: Iterable[safetensors.safe_open], with_head: bool = True) -> str:
    """A digest of the name, shape and first numbers, up to 64, of each tensor in opened files."""
    sample = {}
    for file in files:
        names = set(file.keys())
        if not with_head:
            names -= set(head_names(names))
        for name in names:
            tensor = file.get_slice(name)
            shape = tensor.get_shape()
            if not shape:
                numbers = file.get_tensor(name).reshape(1)
            elif len(shape) == 1:
                numbers = tensor[:64]
            else:
                numbers = tensor[:1].flatten()[:64]
            if numbers.dtype in PLAIN_FORMATS.values():
                numbers = numbers.double()  # equal numbers are equal in all these formats
            else:
                numbers = numbers.contiguous().view(torch.uint8)
            sample[name] = [shape, numbers.tolist()]
    return digest_of(dict(sorted(sample.items())))


# ---- Loading


def check_loadable(checkpoint: Checkpoint) -> None:
    """Raise InputError if transformers cannot load a checkpoint, or would load it wrongly.

    checkpoint: of `download`. All files that `from_pretrained` reads have to be there and whole,
    and weights that are no plain floats have to come with a quantiser that turns them into such.
    Whether that quantiser is installed, transformers finds out.
    """
    what = f"model {checkpoint.name}"
    if not checkpoint.config:
        raise InputError(
            f"{what}: no {CONFIG} in it, or an empty one; download or save the checkpoint again"
        )
    if checkpoint.index:
        _check_index(what, checkpoint)
    for file in checkpoint.weight_files:
        reason = damage(checkpoint.folder / file)
        if reason:
            raise InputError(f"{what}: its {file!r:.100} {reason}")
    _check_number_formats(what, checkpoint)


def _check_index(what: str, checkpoint: Checkpoint) -> None:
    """Raise InputError if shards are missing, or an entry that transformers asks for."""
    files = checkpoint.weight_files
    missing = [file for file in files if not os.path.isfile(checkpoint.folder / file)]
    if missing:
        raise InputError(
            f"{what}: its index names {len(missing)} files that are not there, such as "
            f"{missing[0]!r:.100}; download or save the checkpoint again"
        )
    if not isinstance(checkpoint.index.get("metadata"), dict):
        raise InputError(
            f"{what}: its index has no entry metadata, which transformers asks for; write "
            '"metadata": {} into it'
        )


def _check_number_formats(what: str, checkpoint: Checkpoint) -> None:
    """Raise InputError if weights are in integers or float8, and nothing says what these mean.

    transformers takes such numbers for the weights themselves. A quantiser keeps their scale in
    another tensor of the same layer.
    """
    formats = number_formats(checkpoint)
    tensors_of_layer = Counter(layer_of(name) for name in formats if not name.endswith(".bias"))
    for name, number_format in formats.items():
        if not name.endswith(".weight") or number_format in PLAIN_FORMATS:
            continue
        if not checkpoint.quantiser:
            missing = f"{CONFIG} names no quantiser"
        elif tensors_of_layer[layer_of(name)] == 1:
            missing = "its scale is missing"
        else:
            continue
        raise InputError(
            f"{what}: its {name!r:.100} is in the number format {number_format}, and {missing}; "
            "give the checkpoint as it was before it was quantised"
        )
