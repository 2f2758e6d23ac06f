"""The frozen reward model: its checkpoint, reward head, tokenizer and identity.

A checkpoint is given by name: a folder, or the id of a model on the Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lore.checkpoint import (
    CONFIG,
    MERGE,
    PLAIN_FORMATS,
    Checkpoint,
    backbone_digest,
    check_loadable,
    checkpoint_folder,
    damage,
    download,
    file_per_tensor,
    head_names,
    hold_adapter,
    inspect_checkpoint,
    layer_of,
    number_formats,
    one_line,
    open_tensor,
)
from lore.files import digest_of, load_json, save_json
from utils import InputError, check_device, default_device, process_rank

if TYPE_CHECKING:  # transformers takes seconds to import, and many runs need no model
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DOWN_PROJECTION = re.compile(r".*layers\.(\d{1,9})\.mlp\.down_proj\.weight$")

# The files that a tokenizer's identity depends on
TOKENIZER_FILE = re.compile(r"token|template|vocab|merges|spiece|\.jinja$")

# The name of a large file in the folder blobs of the hub's cache, which is its SHA-256. Small files
# have names of 40 digits, which are digests of another kind.
BLOB_NAME = re.compile(r"[0-9a-f]{64}")

# What to do if transformers does not know a model
OTHER_VERSION = "give a checkpoint that this version loads, or install the version that wrote it"

# Digests of files by "path size time". A process asks for a model's identity several times, and
# each file of weights is read only once for it.
_known_digests: dict[str, str] = {}


# ---- Reward head


def load_reward_head(model_name: str | Path) -> torch.Tensor:
    """The reward head of a checkpoint: its `score.weight` transposed, float32 `[d, 1]`.

    Reads only the shard that holds it. Raises InputError: unknown model, no whole model in
    safetensors files, not exactly one scalar head, a head that is not finite or in a number format
    that cannot be computed with.
    """
    return _read_head(inspect_checkpoint(model_name))


def _read_head(checkpoint: Checkpoint) -> torch.Tensor:
    """The reward head, see `load_reward_head`."""
    files = file_per_tensor(checkpoint)
    names = head_names(files)
    packed = [name for name in files if re.search(r"(^|\.)score\.(weight.|qweight)", name)]
    if packed and not names:
        raise InputError(
            f"model {checkpoint.name}: its reward head is quantised ({packed[0]!r:.100}) and "
            "cannot be computed with; give the checkpoint as it was before it was quantised"
        )
    stored = [open_tensor(checkpoint, files[name], name) for name in names]  # (labels, d) each
    shapes = [tuple(head.get_shape()) for head in stored]
    if len(shapes) == 1 and len(shapes[0]) == 2 and shapes[0][0] == 1 and shapes[0][1] > 0:
        head = stored[0][:].float()  # (1, d)
        if head.isfinite().all() and head.any():  # all zeros: nobody has filled it
            return head.T.contiguous()  # (d, 1)
    remedy = "give a sequence-classification checkpoint"
    if hold_adapter(files):
        remedy = f"an adapter is among its weights; {MERGE}"
    raise InputError(
        f"model {checkpoint.name}: needs exactly one scalar reward head, of finite values, not all "
        f"0; its score.weight has the shapes {shapes}; {remedy}"
    )


def load_released_reference(model_name: str | Path) -> torch.Tensor:
    """What the released scripts used as the reward head, for comparisons with them.

    It is the first column of the last layer's MLP down-projection, float32 `[d, 1]`.
    Raises InputError: unknown model, no safetensors files, no such layer, no finite matrix there.
    """
    checkpoint = inspect_checkpoint(model_name)
    files = file_per_tensor(checkpoint)
    name_by_layer = {}
    for name in files:
        match = DOWN_PROJECTION.match(name)
        if match:
            name_by_layer[int(match[1])] = name
    if not name_by_layer:
        raise InputError(
            f"model {model_name}: no MLP down-projection in it; the released reference is that of "
            "Llama"
        )
    name = name_by_layer[max(name_by_layer)]
    weight = open_tensor(checkpoint, files[name], name)  # (d, width of the MLP)
    shape = weight.get_shape()
    if len(shape) == 2 and 0 not in shape:
        column = weight[:, :1].float().contiguous()  # (d, 1)
        if column.isfinite().all():
            return column
    raise InputError(
        f"model {model_name}: its {name!r:.100} has the shape {shape}, and should be a matrix of "
        "finite values; download or save the checkpoint again"
    )


# ---- Tokenizer and backbone


def load_tokenizer(
    model_name: str | Path, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises InputError: unknown model, no tokenizer in it, no chat template.
    """
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()  # what a user must know of its warnings, our errors say
    # An unknown model is an error of ours.
    folder = checkpoint_folder(model_name, "tokenizer_config.json")
    options = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, **options)
    except Exception as error:  # a class for each: files missing, damaged or of another kind
        reason = (
            _tokenizer_damage(folder)
            or _config_damage(model_name, options)
            or (
                f"transformers says: {one_line(error)}; save its tokenizer beside it, or name the "
                "checkpoint that has it as tokenizer_name"
            )
        )
        raise InputError(f"model {model_name}: its tokenizer cannot be loaded: {reason}") from None
    if not tokenizer.chat_template:
        raise InputError(
            f"model {model_name}: its tokenizer has no chat template; give a chat model"
        )
    longest = getattr(tokenizer, "model_max_length", 0)  # every text's length is compared with it
    if not isinstance(longest, int | float):
        raise InputError(
            f"model {model_name}: its tokenizer_config.json has model_max_length = "
            f"{longest!r:.60}; write a number, or leave it out"
        )
    return tokenizer


def _tokenizer_damage(folder: Path) -> str | None:
    """Which of a tokenizer's files is damaged, and what to do; None if this does not show."""
    for path in sorted(folder.glob("*")):
        if TOKENIZER_FILE.search(path.name) and not path.is_dir() and damage(path):
            return f"{path.name!r:.100} {damage(path)}"
    return None


def _config_damage(model_name: str | Path, options: dict[str, Any]) -> str | None:
    """Why a checkpoint's config, which its tokenizer depends on, cannot be loaded; None if it can.

    A checkpoint of a tokenizer alone needs none.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model_name, **options)
    except OSError:  # there is none
        return None
    except Exception as error:  # an unknown architecture, code of its own
        return f"transformers says: {one_line(error)}; {OTHER_VERSION}"
    return None


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
    Raises InputError: unknown model, an adapter, weights missing in it, a quantiser that is not
    installed, no chat template, no such device.
    """
    from transformers import logging

    logging.set_verbosity_error()
    checkpoint = inspect_checkpoint(model_name)
    if tokenizer is None:
        tokenizer = load_tokenizer(tokenizer_name or model_name, trust_remote_code)
    device = default_device() if device is None else check_device(device)
    checkpoint = download(checkpoint)
    check_loadable(checkpoint)
    options = _loading_options(checkpoint, device, attention, dtype, trust_remote_code)
    whole, loading_info = _load_whole_model(checkpoint, **options)
    head_names = _head_parameters(whole)
    unread_names = _unread_weights(whole, loading_info)
    _check_backbone_was_read(checkpoint, unread_names - head_names)
    has_head = bool(head_names) and not unread_names & head_names

    # embed_conversations is given the backbone alone, and reads two attributes of it: the
    # checkpoint, as the cache depends on its digests, and the scorer, as phi @ head has to be the
    # score that the checkpoint's own class gives. They are attributes so that the backbone stays an
    # ordinary model of transformers. The scorer is in a list because torch would make a bare module
    # a part of the backbone.
    backbone = whole.base_model  # shares its weights with `whole`
    backbone.reward_checkpoint = str(checkpoint.folder)
    backbone.reward_scorer = _own_scorer(checkpoint, whole) if has_head else []

    whole.eval().requires_grad_(False)
    if not checkpoint.quantiser:  # a quantised model is on its device, and some refuse to move
        whole.to(device)
    return backbone, tokenizer


def _loading_options(
    checkpoint: Checkpoint,
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
        return_dict=True,  # a config may say otherwise, and transformers' own heads then fail
    )
    if attention not in (None, "flash_attention_2"):
        options["attn_implementation"] = attention
    # Without a map every process would hold the whole model on the host first, and a quantiser
    # would choose a device itself.
    if device.type == "cuda" or checkpoint.quantiser:
        options["device_map"] = {"": device}
    return options


def _load_whole_model(
    checkpoint: Checkpoint, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with its head, if transformers has a sequence classifier of its architecture.

    Otherwise the model alone. The second value says which weights were not read.
    Raises InputError: it cannot be loaded.
    """
    import transformers
    from transformers import AutoModel, AutoModelForSequenceClassification, logging

    logging.disable_progress_bar()
    folder = str(checkpoint.folder)
    try:
        try:
            return AutoModelForSequenceClassification.from_pretrained(folder, **options)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            # There is no such class for this architecture.
            return AutoModel.from_pretrained(folder, **options)
    except Exception as error:  # a class for each: unknown architecture, quantiser not installed
        remedy = OTHER_VERSION
        if "auto_map" in checkpoint.config:
            remedy = "it needs code of its own: give trust_remote_code=True if you trust that code"
        if checkpoint.quantiser:
            remedy = (
                f"its weights are quantised ({checkpoint.quantiser!r:.50}): install what that "
                "takes, or give the checkpoint as it was before"
            )
        raise InputError(
            f"model {checkpoint.name}: transformers {transformers.__version__} cannot load it and "
            f"says: {one_line(error)}; {remedy}"
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


def _check_backbone_was_read(checkpoint: Checkpoint, unread_names: set[str]) -> None:
    """Raise InputError if weights of the backbone were not read from the checkpoint."""
    if not unread_names:
        return
    formats = number_formats(checkpoint)
    packed = {layer_of(name) for name in formats if formats[name] not in PLAIN_FORMATS}
    if hold_adapter(formats):
        remedy = f"an adapter is among its weights; {MERGE}"
    elif checkpoint.quantiser or packed & {layer_of(name) for name in unread_names}:
        how = "config.json does not say how"
        if checkpoint.quantiser:
            how = f"by {checkpoint.quantiser!r:.50}"
        remedy = f"they are quantised ({how}); give the checkpoint as it was before"
    else:
        remedy = (
            "save the whole model, without a wrapper that puts a prefix (module., _orig_mod.) "
            "before each name"
        )
    raise InputError(
        f"model {checkpoint.name}: {len(unread_names)} weights are not in it or not of its config, "
        f"such as {min(unread_names)!r:.100}; {remedy}"
    )


def _own_scorer(
    checkpoint: Checkpoint, whole: PreTrainedModel
) -> list[tuple[PreTrainedModel, torch.Tensor]]:
    """The model with its head, and the head `[d, 1]` as read from its file: one pair.

    Empty if the head cannot be read from a safetensors file: the comparison is then left out.
    """
    with contextlib.suppress(InputError):
        return [(whole, _read_head(checkpoint))]
    return []


# ---- Identity


def model_identity(model_name: str | Path, folder: str | Path | None = None) -> dict[str, str]:
    """Digests of what a checkpoint holds: {"weights": .., "tokenizer": .., "backbone": ..}.

    The first two depend on the contents and names of the files that are read, not on where the
    checkpoint lies or on what else lies there: a model on the hub and a copy of its files have the
    same. The chat template is part of the tokenizer, config and code are part of the weights.
    The third is what a basis is compared by, as the weights need not be read for it: see
    `lore.checkpoint.backbone_digest`. Weights that are not in safetensors format have none.
    folder: if given, the digests of files are kept there, in digests.json, for later runs.
    Raises InputError: unknown model, an adapter, files of weights that are missing.
    """
    digests_file = Path(folder, "digests.json") if folder else None
    if digests_file:
        with contextlib.suppress(InputError):  # missing or damaged: the files are read again
            for key, digest in load_json(digests_file).items():
                if isinstance(digest, str):
                    _known_digests[key] = digest

    checkpoint = inspect_checkpoint(model_name)
    weight_files = checkpoint.weight_files
    root = checkpoint_folder(
        model_name, "*.json", "*.jinja", "*.txt", "*.model", "*.py", *weight_files
    )
    weights, tokenizer = {}, {}  # file name -> digest
    for name in weight_files:
        reason = damage(root / name)
        if reason:
            raise InputError(f"model {model_name}: its {name!r:.100} {reason}")
        weights[name] = _file_digest(root / name)
    for path in sorted([*root.glob("*.*"), *root.glob("additional_chat_templates/*.jinja")]):
        if path.suffix == ".py" or path.name == CONFIG:
            weights[path.name] = _file_digest(path)
        elif TOKENIZER_FILE.search(path.name) and path.name not in weights:
            tokenizer[path.name] = _file_digest(path)

    if digests_file and digests_file.parent.exists() and process_rank() == 0:
        save_json(digests_file, _known_digests)
    weights = dict(sorted(weights.items()))  # JSON keeps the order
    identity = {"weights": digest_of(weights), "tokenizer": digest_of(tokenizer)}
    if checkpoint.is_safetensors:
        identity["backbone"] = backbone_digest(download(checkpoint))
    return identity


def _file_digest(path: Path) -> str:
    """The digest of a file, from `_known_digests` if its size and time are as they were."""
    target = path.resolve()
    status = path.stat()
    key = f"{target} {status.st_size} {status.st_mtime_ns}"
    if not _known_digests.get(key):
        in_hub_cache = target.parent.name == "blobs" and BLOB_NAME.fullmatch(target.name)
        _known_digests[key] = target.name if in_hub_cache else digest_of(target)
    return _known_digests[key]


def check_gpu(model_name: str | Path) -> None:
    """Raise InputError unless there is a GPU, for a model that is too large for the CPU."""
    if not torch.cuda.is_available():
        raise InputError(
            f"no CUDA GPU here, and {model_name} needs one with 18 GB; try --demo, or --model with "
            "a reward model that fits this machine"
        )
