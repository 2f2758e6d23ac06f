"""The frozen reward model: its checkpoint, reward head, tokenizer and identity.

A checkpoint is given by name: a folder, or the id of a model on the Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from lore.files import digest_of, explain_damage, load_json, save_json
from utils import InputError, check_device, default_device, process_rank

if TYPE_CHECKING:  # transformers takes seconds to import, and many runs need no model
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SINGLE_SHARD = "model.safetensors"  # all tensors of a small checkpoint
SHARD_INDEX = "model.safetensors.index.json"  # the file of each tensor of a large one
DOWN_PROJECTION = re.compile(r".*layers\.(\d+)\.mlp\.down_proj\.weight$")

# The files of a checkpoint that its identity depends on
WEIGHT_FILE = re.compile(r"\.(safetensors|bin|py)$|^config\.json$")
TOKENIZER_FILE = re.compile(r"token|template|vocab|merges|spiece|\.jinja$")

# Digests of files by "path size time". A process asks for a model's identity several times, and
# each file of weights is read only once for it.
_known_digests: dict[str, str] = {}


# ---- Files of a checkpoint


def checkpoint_folder(model_name: str | Path, *patterns: str) -> Path:
    """The folder of a checkpoint.

    For an id on the hub this is its folder in the hub's cache, after a download of the files whose
    names match one of `patterns`. Raises InputError: no such folder, and not served by the hub.
    """
    if os.path.isdir(model_name):
        return Path(model_name).resolve()

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


def open_safetensors(model_name: str | Path, filename: str) -> safetensors.safe_open:
    """Open a safetensors file of a checkpoint. Raises InputError: it is missing or damaged."""
    path = checkpoint_folder(model_name, filename) / filename
    if not path.exists():
        raise InputError(
            f"model {model_name}: no {filename} in it; give a checkpoint in safetensors format"
        )
    with explain_damage(path, "safetensors file"):
        return safetensors.safe_open(path, "pt")


def shard_per_tensor(model_name: str | Path) -> dict[str, str]:
    """The name of each tensor of a checkpoint -> the name of the safetensors file that holds it.

    Raises InputError: unknown model, a file missing or damaged.
    """
    index = checkpoint_folder(model_name, SHARD_INDEX) / SHARD_INDEX
    if index.exists():
        return load_json(index, "weight_map")["weight_map"]
    tensor_names = open_safetensors(model_name, SINGLE_SHARD).keys()
    return dict.fromkeys(tensor_names, SINGLE_SHARD)


# ---- Reward head


def load_reward_head(model_name: str | Path) -> torch.Tensor:
    """The reward head of a checkpoint: its `score.weight` transposed, float32 `[d, 1]`.

    Reads only the shard that holds it. Raises InputError: unknown model, no safetensors files, not
    exactly one scalar head, a head that is not finite.
    """
    shards = shard_per_tensor(model_name)
    heads = [
        open_safetensors(model_name, shard).get_slice(name)[:]  # (labels, d)
        for name, shard in shards.items()
        if name.endswith("score.weight")
    ]
    shapes = [tuple(head.shape) for head in heads]
    is_one_scalar_head = len(heads) == 1 and len(shapes[0]) == 2 and shapes[0][0] == 1
    if not is_one_scalar_head or not heads[0].isfinite().all():
        raise InputError(
            f"model {model_name}: needs exactly one scalar reward head, of finite values; its "
            f"score.weight has the shapes {shapes}; give a sequence-classification checkpoint"
        )
    return heads[0].float().T.contiguous()  # (d, 1)


def load_released_reference(model_name: str | Path) -> torch.Tensor:
    """What the released scripts used as the reward head, for comparisons with them.

    It is the first column of the last layer's MLP down-projection, float32 `[d, 1]`.
    Raises InputError: unknown model, no safetensors files, no such layer.
    """
    shards = shard_per_tensor(model_name)
    name_by_layer = {}
    for name in shards:
        match = DOWN_PROJECTION.match(name)
        if match:
            name_by_layer[int(match[1])] = name
    if not name_by_layer:
        raise InputError(
            f"model {model_name}: no MLP down-projection in it; the released reference is that of "
            "Llama"
        )
    name = name_by_layer[max(name_by_layer)]
    weight = open_safetensors(model_name, shards[name]).get_slice(name)  # (d, width of the MLP)
    return weight[:, :1].float().contiguous()  # (d, 1)


# ---- Tokenizer and backbone


def load_tokenizer(
    model_name: str | Path, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises InputError: unknown model, no tokenizer in it, no chat template.
    """
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()  # what a user must know of its warnings, our errors say
    checkpoint_folder(model_name, "tokenizer_config.json")  # an unknown model is an error of ours
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=trust_remote_code)
    except Exception as error:  # a class for each: files missing, damaged or of another kind
        raise InputError(
            f"model {model_name}: its tokenizer cannot be loaded "
            f"({str(error) or type(error).__name__}); check the name, the network and that it "
            "holds one"
        ) from None
    if not tokenizer.chat_template:
        raise InputError(
            f"model {model_name}: its tokenizer has no chat template; give a chat model"
        )
    return tokenizer


def load_reward_model(
    model_name: str | Path,
    device: str | torch.device | None = None,
    attention: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer_name: str | Path | None = None,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the frozen reward model without its head -> (backbone in eval mode, tokenizer).

    device: default this process's GPU, or the CPU if there is none.
    attention: an attention implementation of transformers. The default is the architecture's own,
        and it also replaces flash_attention_2: PyTorch's ("sdpa") has flash kernels itself, and
        with it conversations can share the computation of a common prompt.
    dtype: default bfloat16 on a GPU, as released, and float32 on the CPU.
    tokenizer_name: the checkpoint whose tokenizer is loaded, default the model's.
    tokenizer: an already loaded tokenizer, so that it is not loaded twice; tokenizer_name is then
        ignored.
    Raises InputError: unknown model, weights missing in it, no chat template, no such device.
    """
    from transformers import logging

    logging.set_verbosity_error()
    if tokenizer is None:
        tokenizer = load_tokenizer(tokenizer_name or model_name, trust_remote_code)
    device = default_device() if device is None else check_device(device)
    checkpoint = checkpoint_folder(model_name, "config.json")
    whole, loading_info = _load_whole_model(
        model_name, **_loading_options(device, attention, dtype, trust_remote_code)
    )
    head_names = _head_parameters(whole)
    unread_names = _unread_weights(whole, loading_info)
    _check_backbone_was_read(model_name, unread_names - head_names)
    has_head = bool(head_names) and not unread_names & head_names

    # embed_conversations is given the backbone alone, and reads two attributes of it: the
    # checkpoint, as the cache depends on its digests, and the scorer, as phi @ head has to be the
    # score that the checkpoint's own class gives. They are attributes so that the backbone stays an
    # ordinary model of transformers. The scorer is in a list because torch would make a bare module
    # a part of the backbone.
    backbone = whole.base_model  # shares its weights with `whole`
    backbone.reward_checkpoint = str(checkpoint)
    backbone.reward_scorer = _own_scorer(model_name, whole) if has_head else []

    whole.eval().requires_grad_(False).to(device)
    return backbone, tokenizer


def _loading_options(
    device: torch.device,
    attention: str | None,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """What `from_pretrained` is given, for the arguments of `load_reward_model`."""
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = dict(
        torch_dtype=dtype,
        num_labels=1,
        trust_remote_code=trust_remote_code,
        # Weights that do not fit are no error of transformers: `_unread_weights` finds them.
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if attention not in (None, "flash_attention_2"):
        options["attn_implementation"] = attention
    if device.type == "cuda":  # or every process would hold the whole model on the host first
        options["device_map"] = {"": device}
    return options


def _load_whole_model(
    model_name: str | Path, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with its head, if transformers has a sequence classifier of its architecture.

    Otherwise the model alone. The second value says which weights were not read.
    Raises InputError: it cannot be loaded.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification, logging

    logging.disable_progress_bar()
    try:
        try:
            return AutoModelForSequenceClassification.from_pretrained(model_name, **options)
        except ValueError:  # no such class for this architecture
            return AutoModel.from_pretrained(model_name, **options)
    except Exception as error:  # a class for each: files missing, damaged or of several models
        raise InputError(
            f"model {model_name}: cannot be loaded ({str(error) or type(error).__name__}); check "
            "the name, the network and that it holds a model"
        ) from None


def _head_parameters(whole: PreTrainedModel) -> set[str]:
    """The names of the parameters that a model has beside its backbone."""
    backbone = set(whole.base_model.parameters())
    return {name for name, parameter in whole.named_parameters() if parameter not in backbone}


def _unread_weights(whole: PreTrainedModel, loading_info: dict[str, Any]) -> set[str]:
    """The names of weights by which checkpoint and model differ.

    transformers fills weights at random if they are not in the checkpoint or have another shape,
    and leaves out those of the checkpoint for which the config has no layer.
    """
    other_shape = {name for name, *_ in loading_info["mismatched_keys"]}
    prefix = f"{whole.base_model_prefix}."
    without_layer = {name for name in loading_info["unexpected_keys"] if name.startswith(prefix)}
    return {*loading_info["missing_keys"], *other_shape, *without_layer}


def _check_backbone_was_read(model_name: str | Path, unread_names: set[str]) -> None:
    """Raise InputError if weights of the backbone were not read from the checkpoint."""
    if unread_names:
        raise InputError(
            f"model {model_name}: {len(unread_names)} weights are not in it or not of its config, "
            f"such as {min(unread_names)}; save the whole model, without a wrapper that puts a "
            "prefix (module., _orig_mod.) before each name"
        )


def _own_scorer(
    model_name: str | Path, whole: PreTrainedModel
) -> list[tuple[PreTrainedModel, torch.Tensor]]:
    """The model with its head, and the head `[d, 1]` as read from its file: one pair.

    Empty if the head cannot be read from a safetensors file: the comparison is then left out.
    """
    with contextlib.suppress(InputError):
        return [(whole, load_reward_head(model_name))]
    return []


# ---- Identity


def model_identity(model_name: str | Path, folder: str | Path | None = None) -> dict[str, str]:
    """Digests of what a checkpoint holds: {"weights": .., "tokenizer": ..}.

    They depend on the files' contents and names, not on where the checkpoint lies. The chat
    template is part of the tokenizer, config and code are part of the weights.
    folder: if given, the digests of files are kept there, in digests.json, for later runs.
    Raises InputError: unknown model.
    """
    digests_file = Path(folder, "digests.json") if folder else None
    if digests_file:
        with contextlib.suppress(InputError):  # missing or damaged: the files are read again
            _known_digests.update(load_json(digests_file))

    weights, tokenizer = {}, {}  # file name -> digest
    checkpoint = checkpoint_folder(
        model_name, "*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"
    )
    templates = checkpoint.glob("additional_chat_templates/*.jinja")
    for path in sorted([*checkpoint.glob("*.*"), *templates]):
        if WEIGHT_FILE.search(path.name):
            weights[path.name] = _file_digest(path)
        elif TOKENIZER_FILE.search(path.name):
            tokenizer[path.name] = _file_digest(path)

    if digests_file and digests_file.parent.exists() and process_rank() == 0:
        save_json(digests_file, _known_digests)
    return {"weights": digest_of(weights), "tokenizer": digest_of(tokenizer)}


def _file_digest(path: Path) -> str:
    """The digest of a file, from `_known_digests` if its size and time are as they were."""
    target = path.resolve()
    status = path.stat()
    key = f"{target} {status.st_size} {status.st_mtime_ns}"
    if not _known_digests.get(key):
        in_hub_cache = target.parent.name == "blobs"  # files there are named by their digest
        _known_digests[key] = target.name if in_hub_cache else digest_of(target)
    return _known_digests[key]


def check_gpu(model_name: str | Path) -> None:
    """Raise InputError unless there is a GPU, for a model that is too large for the CPU."""
    if not torch.cuda.is_available():
        raise InputError(
            f"no CUDA GPU here, and {model_name} needs one with 18 GB; try --demo, or --model with "
            "a reward model that fits this machine"
        )
