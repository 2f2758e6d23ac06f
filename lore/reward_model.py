"""The frozen reward model: its checkpoint, its head, its tokenizer, its identity."""

import contextlib
import os
import re
from pathlib import Path

import safetensors.torch
import torch

from lore.files import digest_of, explain_damage, load_json, save_json
from utils import InputError, check_device, default_device, process_rank

_DIGESTS = {}  # path, size and time of a file -> its digest


def checkpoint_folder(model_name, *patterns):
    """A checkpoint's folder; of an id on the hub, that in its cache, with the files that fit the patterns."""
    if os.path.isdir(model_name):
        return Path(model_name).resolve()
    from huggingface_hub import logging, snapshot_download

    logging.set_verbosity_error()  # its retries end in the one line below
    try:
        return Path(snapshot_download(str(model_name), allow_patterns=patterns))
    except (
        Exception
    ) as error:  # unknown id, no network, no access: the hub's client has a class for each
        raise InputError(
            f"model {model_name}: no such folder, and the hub did not serve it ({type(error).__name__}); "
            "check the name and the network, or give the path of a downloaded checkpoint"
        ) from None


def open_safetensors(model_name, filename):
    """A safetensors file of a checkpoint. Raises InputError where it is missing or damaged."""
    path = checkpoint_folder(model_name, filename) / filename
    if not path.exists():
        raise InputError(
            f"model {model_name}: no {filename} in it; give a checkpoint in safetensors format"
        )
    with explain_damage(path, "safetensors file"):
        return safetensors.safe_open(path, "pt")


def shard_per_tensor(model_name):
    """Which safetensors file of a checkpoint holds each tensor: its name -> the file's name."""
    one, index = "model.safetensors", "model.safetensors.index.json"
    path = checkpoint_folder(model_name, index) / index
    return (
        load_json(path, "weight_map")["weight_map"]
        if path.exists()
        else dict.fromkeys(open_safetensors(model_name, one).keys(), one)
    )


def tensor_slices(model_name, choose):
    """The tensors of a checkpoint that `choose` picks from their names: name -> slice, of its file alone."""
    shards = shard_per_tensor(model_name)
    return {
        name: open_safetensors(model_name, shards[name]).get_slice(name) for name in choose(shards)
    }


def load_reward_head(model_name):
    """The reward head of a checkpoint (a folder, or an id on the hub): its `score.weight` transposed, float32 `[d, 1]`.
    Raises InputError: unknown model, no safetensors, or not exactly one scalar head."""
    found = tensor_slices(
        model_name, lambda names: [name for name in names if name.endswith("score.weight")]
    )
    heads = [head[:] for head in found.values()]
    if [head.shape[:-1] for head in heads] != [(1,)] or not heads[0].isfinite().all():
        raise InputError(
            f"model {model_name}: needs exactly one scalar reward head, and finite; its score.weight are "
            f"{[tuple(head.shape) for head in heads]}; give a sequence-classification checkpoint"
        )
    return heads[0].float().T.contiguous()


def load_released_reference(model_name):
    """What the released scripts took for the reward head, to compare with: float32 `[d, 1]`, the first column of the
    last MLP's down-projection. Raises InputError: unknown model, no safetensors, or one without such layers."""
    layer = re.compile(r".*layers\.(\d+)\.mlp\.down_proj\.weight$")
    found = tensor_slices(
        model_name,
        lambda names: sorted(
            filter(layer.match, names), key=lambda name: int(layer.match(name)[1])
        )[-1:],
    )
    if not found:
        raise InputError(
            f"model {model_name}: no MLP down-projection in it; the released reference is that of Llama"
        )
    return found.popitem()[1][:, :1].float().contiguous()


def load_tokenizer(model_name, trust_remote_code=False):
    """The tokenizer of a checkpoint. Raises InputError: unknown model, none in it, no chat template."""
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()  # what matters of its notes is said in errors of ours
    checkpoint_folder(model_name, "tokenizer_config.json")  # says in one line where it is unknown
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # files missing, damaged or of another kind: a class of its own for each
        raise InputError(
            f"model {model_name}: its tokenizer cannot be loaded ({str(error) or type(error).__name__}); "
            "check the name, the network and that it holds one"
        ) from None
    if not tokenizer.chat_template:
        raise InputError(
            f"model {model_name}: its tokenizer has no chat template; give a chat model"
        )
    return tokenizer


def load_reward_model(
    model_name,
    device=None,
    attention=None,
    dtype=None,
    tokenizer_name=None,
    trust_remote_code=False,
    tokenizer=None,
):
    """Load the frozen reward model without its head -> (backbone, tokenizer), in eval mode on `device`.
    device: default this process's GPU, else the CPU. attention: a transformers implementation; default, and in place of
    flash_attention_2, the architecture's own: PyTorch's ("sdpa"), which shares prompts and has flash kernels itself,
    where that is exact. dtype: default bfloat16 on a GPU, as released, and float32 on the CPU. tokenizer_name: default
    the model's. tokenizer: an already loaded one, given back as it is.
    Raises InputError: unknown model, weights missing in it, no chat template."""
    from transformers import AutoModel, AutoModelForSequenceClassification, logging

    if tokenizer is None:
        tokenizer = load_tokenizer(tokenizer_name or model_name, trust_remote_code)
    device = check_device(device) if device is not None else default_device()
    options = dict(
        torch_dtype=dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32),
        num_labels=1,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if attention not in (None, "flash_attention_2"):
        options["attn_implementation"] = attention
    if device.type == "cuda":  # else every process would hold the whole model on the host first
        options["device_map"] = {"": device}
    logging.disable_progress_bar()
    try:
        try:  # the class whose own score `choose_batching` compares with
            whole, loading = AutoModelForSequenceClassification.from_pretrained(
                model_name, **options
            )
        except ValueError:  # there is none for this architecture
            whole, loading = AutoModel.from_pretrained(model_name, **options)
    except (
        Exception
    ) as error:  # files missing, damaged or of different models: a class of its own for each
        raise InputError(
            f"model {model_name}: cannot be loaded ({str(error) or type(error).__name__}); check the "
            "name, the network and that it holds a model"
        ) from None
    model = whole.base_model  # shares its weights with the whole
    lost = {key for key, *_ in loading["mismatched_keys"]}.union(
        loading["missing_keys"],
        (  # or for no layer of it
            key
            for key in loading["unexpected_keys"]
            if key.startswith(f"{whole.base_model_prefix}.")
        ),
    )
    backbone = set(model.parameters())
    head = {name for name, parameter in whole.named_parameters() if parameter not in backbone}
    if missing := sorted(lost - head):  # which transformers fills at random
        raise InputError(
            f"model {model_name}: {len(missing)} weights are not in it or not of its config, as "
            f"{missing[0]}; save it whole and without a wrapper, whose prefix (module., _orig_mod.) would "
            "stand before each name"
        )
    model.reward_checkpoint, model.reward_scorer = (
        str(checkpoint_folder(model_name, "config.json")),
        [],
    )
    with contextlib.suppress(
        InputError
    ):  # on a head that is not to be read from safetensors nothing rests
        if head and not lost & head:
            model.reward_scorer.append(
                (whole, load_reward_head(model_name))
            )  # in a list, so no part of the backbone
    whole.eval().requires_grad_(False).to(device)
    return model, tokenizer


def model_identity(model_name, folder=None):
    """Digests of what a checkpoint holds, wherever it lies: {"weights": .., "tokenizer": with its template}. Those of
    files in the hub's cache are their names; others are read, and remembered in `folder` by size and time."""
    memory, parts = folder and Path(folder, "digests.json"), {"weights": {}, "tokenizer": {}}
    with contextlib.suppress(InputError):
        _DIGESTS.update(load_json(memory) if folder else {})
    where = checkpoint_folder(
        model_name, "*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"
    )
    for path in sorted([*where.glob("*.*"), *where.glob("additional_chat_templates/*.jinja")]):
        weights = re.search(r"\.(safetensors|bin|py)$|^config\.json$", path.name)
        if weights or re.search(r"token|template|vocab|merges|spiece|\.jinja$", path.name):
            real, stat = path.resolve(), path.stat()
            key = f"{real} {stat.st_size} {stat.st_mtime_ns}"
            _DIGESTS[key] = _DIGESTS.get(key) or (
                real.name if real.parent.name == "blobs" else digest_of(real)
            )
            parts["weights" if weights else "tokenizer"][path.name] = _DIGESTS[key]
    if folder and memory.parent.exists() and process_rank() == 0:
        save_json(memory, _DIGESTS)
    return {part: digest_of(files) for part, files in parts.items()}


def check_gpu(model_name):
    """Raise InputError unless there is a GPU for a model that does not fit the CPU."""
    if not torch.cuda.is_available():
        raise InputError(
            f"no CUDA GPU here, and {model_name} needs one with 18 GB; try --demo, or --model with a "
            "reward model that fits this machine"
        )
