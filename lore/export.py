"""A reward model that servers and trainers load without this code."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch

from lore.conversations import tokenize_conversations
from lore.embedding import embed_conversations
from lore.files import (
    atomic_write,
    digest_of,
    load_json,
    load_tensors,
    replace_files_in,
    save_json,
    save_text,
)
from lore.reward_model import (
    checkpoint_folder,
    load_reward_head,
    load_reward_model,
    shard_per_tensor,
)
from lore.tables import format_cell
from utils import UNSEEN_TEST, InputError, check_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, str]]

# Conversations that an export is proven on by default: of different lengths, so that one is padded
PROBES: list[Conversation] = [
    [
        {"role": "user", "content": "Is tea better than coffee?"},
        {"role": "assistant", "content": "Tea."},
    ],
    [
        {"role": "user", "content": "How far is the moon?"},
        {"role": "assistant", "content": "384,000 km."},
        {"role": "user", "content": "And the sun?"},
        {"role": "assistant", "content": "150 million km."},
    ],
]
LARGEST_ERROR = 1e-4  # of the logits, relative: what float32 rounds is below it

# Files of a tokenizer that name its special tokens
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
TOKENIZER_FILES = (
    *TOKENIZER_SETTINGS,
    "tokenizer.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

CARD_HEADER = "---\nlibrary_name: transformers\npipeline_tag: text-classification\n---"
CARD_EXAMPLE = """\
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    model(**tokenizer(text, add_special_tokens=False, return_tensors='pt')).logits"""


@dataclass(frozen=True)
class PadToken:
    """A special token that no conversation holds, so that it can fill up the rows of a batch."""

    token_id: int
    content: str


@dataclass(frozen=True)
class ExpectedScores:
    """What the exported model has to give, and the tokenizer that it is exported with."""

    logits: torch.Tensor  # (conversations, labels), float32
    tokenizer: PreTrainedTokenizerBase
    pad_token: PadToken


def export_reward_model(
    folder: str | Path,
    model_name: str | Path,
    V: torch.Tensor | np.ndarray,
    w: torch.Tensor | np.ndarray | list[float] | None = None,
    about: dict[str, Any] | None = None,
    conversations: list[Conversation] = PROBES,
) -> None:
    """Write a reward model that anyone loads as `AutoModelForSequenceClassification`, and prove it.

    folder: a new folder, or an empty one.
    model_name: the reward model that the basis V was learnt on.
    V: the basis `[d, K]`.
    w: one user's weights `[K]`, for a model with one label, the reward of this user. The default
        is a model with K labels, the rewards of the basis.
    about: what is known of the basis, for the model card: the dict of results.json, updated by that
        of the rank's file (`load_json` and `load_tensors` read them from results/).
    conversations: those that the export is proven on.

    The head is written in float32; files of the backbone are linked, not copied.
    The proof: on the CPU in float32, the logits of the conversations, one by one and padded, are
    phi @ V @ w within a relative error of 1e-4.
    Raises InputError, and leaves nothing: V or w of a wrong shape or not finite; a basis that was
    learnt on another model or at a lower rank; a folder with files in it; a model that needs code
    of its own, or has no token to pad with; logits that are not the rewards.
    """
    folder = Path(folder)
    run_info = about or {}

    reward_head = load_reward_head(model_name)  # (d, 1)
    V = check_matrix(V, "V", len(reward_head)).cpu()
    new_head = V if w is None else V @ _check_weights(w, rank=V.shape[1])  # (d, labels)
    config = load_json(checkpoint_folder(model_name, "config.json") / "config.json", "model_type")
    architecture = _classifier_name(model_name, config)
    _check_new_folder(folder)
    _check_basis_fits_run(folder, model_name, reward_head, V.shape[1], run_info)

    expected = _compute_expected_scores(model_name, new_head, conversations)

    config |= _classifier_settings(architecture, new_head.shape[1], expected.pad_token)
    card = _model_card(model_name, V.shape[1], w is not None, run_info)
    try:
        with replace_files_in(folder) as new:
            save_json(new / "config.json", config)
            save_text(new / "README.md", card)
            _write_tokenizer(new, model_name, expected.tokenizer, expected.pad_token)
            _write_weights(new, model_name, new_head)
            _prove_export(new, conversations, expected.logits)
    finally:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


# ---- Check


def _check_weights(w: torch.Tensor | np.ndarray | list[float], rank: int) -> torch.Tensor:
    """One user's weights as a column `[K, 1]`. Raises InputError: another shape, not finite."""
    column = torch.as_tensor(w).reshape(-1, 1)
    return check_matrix(column, "w", rank, 1).cpu()


def _classifier_name(model_name: str | Path, config: dict[str, Any]) -> str:
    """The name of the sequence classifier that transformers has of this architecture.

    Raises InputError: there is none, or the checkpoint brings code of its own.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
    )

    if "auto_map" in config or config["model_type"] not in CLASSIFIERS:
        raise InputError(
            f"model {model_name}: needs code of its own (trust_remote_code), which servers and "
            "trainers do not run; take one that transformers has as a sequence classifier"
        )
    return CLASSIFIERS[config["model_type"]]


def _check_new_folder(folder: Path) -> None:
    """Raise InputError if there is a file under this name, or a folder with files in it."""
    is_empty_folder = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty_folder:
        raise InputError(f"{folder}: a file, or not empty; give a new folder")


def _check_basis_fits_run(
    folder: Path,
    model_name: str | Path,
    reward_head: torch.Tensor,
    columns: int,
    run_info: dict[str, Any],
) -> None:
    """Raise InputError if the run, as far as it is known, cannot have given this basis.

    A basis may have fewer columns than the run's rank, as those that no user needs are removed.
    """
    digest = (run_info.get("identity") or {}).get("reward_head")
    is_other_model = digest is not None and digest != digest_of(reward_head.tolist())
    rank = run_info.get("K", columns)
    if is_other_model or rank < columns:
        raise InputError(
            f"{folder}: the basis is of {run_info.get('config', {}).get('model')} at rank "
            f"{run_info.get('K')}, not {model_name}'s of {columns} columns; give the model and "
            "`about` of this basis"
        )


# ---- Compute


def _compute_expected_scores(
    model_name: str | Path, head: torch.Tensor, conversations: list[Conversation]
) -> ExpectedScores:
    """phi @ head of the conversations, by the original model in float32 on the CPU.

    The model is freed on return: the proof loads the exported one, and memory needs to hold only
    one of the two. head: `[d, labels]`.
    """
    model, tokenizer = load_reward_model(model_name, "cpu")
    phi = embed_conversations(conversations, model, tokenizer, batch_size=1).float()  # (n, d)
    pad_token = _choose_pad_token(
        model_name, tokenizer, conversations, model.get_input_embeddings().num_embeddings
    )
    return ExpectedScores(phi @ head, tokenizer, pad_token)


def _choose_pad_token(
    model_name: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Conversation],
    embedding_count: int,
) -> PadToken:
    """A special token with an embedding that no conversation holds.

    Sequence classification scores a text at the last token that is no pad token. If the pad token
    also ends a turn, that is not the end of the text. The checkpoint's own pad token is preferred,
    then one that its name calls a pad or a spare token, then the last one.
    Raises InputError: no such token.
    """
    used_ids = set()
    for token_ids in tokenize_conversations(conversations, tokenizer):
        used_ids.update(token_ids)
    free_tokens = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token_id < embedding_count and token_id not in used_ids
    }
    if not free_tokens:
        raise InputError(
            f"model {model_name}: padding with the end of a turn would change scores, and none of "
            f"its special tokens within {embedding_count} embeddings is free; add one to its "
            "tokenizer"
        )

    def preference(token_id: int) -> tuple[bool | int, ...]:
        """The best has the smallest, as False is smaller than True."""
        name = free_tokens[token_id].lower()
        return (
            token_id != tokenizer.pad_token_id,
            "pad" not in name,
            "reserved" not in name,
            "unused" not in name,
            -token_id,
        )

    best_id = min(free_tokens, key=preference)
    return PadToken(best_id, free_tokens[best_id])


# ---- Write


def _classifier_settings(architecture: str, labels: int, pad_token: PadToken) -> dict[str, Any]:
    """The entries of config.json that make a checkpoint a classifier with so many labels."""
    names = [f"LABEL_{k}" for k in range(labels)]
    return {
        "architectures": [architecture],
        "num_labels": labels,
        "pad_token_id": pad_token.token_id,
        "id2label": dict(enumerate(names)),
        "label2id": {name: k for k, name in enumerate(names)},
        "problem_type": "regression",  # with another, servers apply a sigmoid or softmax
    }


def _write_tokenizer(
    folder: Path, model_name: str | Path, tokenizer: PreTrainedTokenizerBase, pad_token: PadToken
) -> None:
    """Copy the checkpoint's tokenizer files, with another token to pad with.

    They are not written by `tokenizer.save_pretrained`, whose files older versions of transformers
    may not read.
    """
    names = {*tokenizer.vocab_files_names.values(), *TOKENIZER_FILES}
    checkpoint = checkpoint_folder(model_name, *names)
    for name in names:
        if not (checkpoint / name).exists():
            continue
        if name in TOKENIZER_SETTINGS:
            settings = load_json(checkpoint / name)
            save_json(folder / name, {**settings, "pad_token": pad_token.content})
        else:
            shutil.copyfile(checkpoint / name, folder / name)


def _write_weights(folder: Path, model_name: str | Path, head: torch.Tensor) -> None:
    """Write the checkpoint's shards with another head, `[d, labels]`, and the index of them.

    The new head has a shard of its own. The backbone's shards are linked; only the one that held
    the old head is written, without it.
    """
    checkpoint = checkpoint_folder(model_name, "*.safetensors")
    old_shards = shard_per_tensor(model_name)  # tensor -> file
    # Exactly one tensor is the head: load_reward_head has checked that.
    (head_name,) = (name for name in old_shards if name.endswith("score.weight"))
    old_head_file = old_shards.pop(head_name)

    old_files = sorted(set(old_shards.values()))
    total = len(old_files) + 1
    new_files = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    *backbone_files, head_file = new_files
    new_name = dict(zip(old_files, backbone_files))
    for old_file in old_files:
        source = checkpoint / old_file
        target = folder / new_name[old_file]
        if old_file == old_head_file:
            tensors, _ = load_tensors(source)
            del tensors[head_name]
            _save_shard(target, tensors)
        else:
            _link_or_copy(source, target)
    _save_shard(folder / head_file, {head_name: head.T.contiguous()})

    weight_map = {name: new_name[file] for name, file in old_shards.items()}
    weight_map[head_name] = head_file
    total_size = sum((folder / file).stat().st_size for file in new_files)
    save_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": weight_map},
    )


def _save_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file that transformers accepts: it asks for the format "pt"."""
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, {"format": "pt"}))


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it if that is on another disk."""
    try:
        os.link(source.resolve(), target)  # resolved, as the hub's cache holds symbolic links
    except OSError:
        shutil.copyfile(source, target)


def _model_card(
    model_name: str | Path, columns: int, is_personal: bool, run_info: dict[str, Any]
) -> str:
    """The text of the export's README.md."""
    if is_personal:
        meaning = "One user's reward: one logit"
    else:
        meaning = f"A basis of {columns} rewards that users mix: {columns} logits"
    rank = run_info.get("K", columns)
    alpha = run_info.get("alpha")
    facts = {
        "reward model": Path(model_name).name if os.path.isdir(model_name) else model_name,
        "data": run_info.get("config", {}).get("data"),
        "rank": rank,
        "alpha": alpha,
        "seed": run_info.get("seed"),
    }
    for entry in run_info.get("evidence", ()):
        if entry["K"] == rank and entry["alpha"] == alpha:
            facts[f"accuracy, {UNSEEN_TEST}"] = entry["accuracy"][UNSEEN_TEST]

    paragraphs = [
        CARD_HEADER,
        "# A low-rank reward model",
        f"{meaning} of a chat-formatted conversation, without a sigmoid or softmax. The head is in "
        "float32; in bfloat16 rewards lose digits that close answers may need.",
        CARD_EXAMPLE,
        "\n".join(
            f"- {name}: {format_cell(value)}" for name, value in facts.items() if value is not None
        ),
    ]
    if "verdict" in run_info:
        paragraphs += ["The whole run's verdict:", run_info["verdict"]["text"]]
    return "\n\n".join(paragraphs) + "\n"


# ---- Prove


def _prove_export(folder: Path, conversations: list[Conversation], expected: torch.Tensor) -> None:
    """Raise InputError unless the model in `folder` gives the expected logits.

    They are computed as a server does: one by one, and in a padded batch. expected: `[n, labels]`.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(folder, torch_dtype=torch.float32)
    model.eval()
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in conversations]

    def compute_logits(batch: list[str]) -> torch.Tensor:
        tokens = tokenizer(batch, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.inference_mode():
            return model(tokens["input_ids"], tokens["attention_mask"]).logits

    one_by_one = torch.cat([compute_logits([text]) for text in texts])
    logits = torch.cat([one_by_one, compute_logits(texts)])  # (2n, labels)
    error = (logits - expected.repeat(2, 1)).norm() / logits.norm()
    if not error <= LARGEST_ERROR:  # also if it is NaN
        raise InputError(
            f"{folder.parent}: the export's logits differ from phi @ V by {error:.1e} of their "
            "size, so nothing was written; transformers computes this model otherwise than "
            "embed_conversations"
        )
