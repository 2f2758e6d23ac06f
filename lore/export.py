"""A reward model that servers and trainers load without this code."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from lore.basis import Basis, Weights, check_rank, check_user_weights, load_basis
from lore.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    download,
    file_per_tensor,
    head_names,
    inspect_checkpoint,
    one_line,
    open_safetensors,
)
from lore.conversations import dated_template, tokenize_conversations
from lore.embedding import embed_conversations
from lore.files import (
    atomic_write,
    load_json,
    replace_files_in,
    save_json,
    save_text,
)
from lore.intervals import INTERVAL
from lore.reward_model import load_reward_head, load_reward_model
from lore.tables import format_cell, markdown_text
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
TEMPLATE_FILE = "chat_template.jinja"  # older versions keep the template in tokenizer_config.json
TOKENIZER_FILES = (
    *TOKENIZER_SETTINGS,
    "tokenizer.json",
    "added_tokens.json",
    TEMPLATE_FILE,
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
    V: Basis,
    w: Weights | None = None,
    about: dict[str, Any] | None = None,
    conversations: list[Conversation] = PROBES,
) -> None:
    """Write a reward model that anyone loads as `AutoModelForSequenceClassification`, and prove it.

    folder: a new folder, or an empty one.
    model_name: the reward model that the basis V was learnt on.
    V: the basis `[d, K]`, or the file `results/K_<rank>.safetensors` that holds it. The file says
        on which model the basis was learnt, which has to be this one.
    w: one user's weights `[K]`, for a model with one label, the reward of this user. The default
        is a model with K labels, the rewards of the basis.
    about: what is known of the basis, for the model card: the dict of results.json (`load_json`
        reads it), updated by the metadata of the rank's file if V is not that file.
    conversations: those that the export is proven on.

    The head is written in float32; files of the backbone are linked, not copied.
    The proof: on the CPU in float32, the logits of the conversations, one by one and padded, are
    phi @ V @ w within a relative error of 1e-4.
    Raises InputError, and leaves nothing: V or w of a wrong shape or not finite; a basis that was
    learnt on another model or at a lower rank; a folder with files in it; a model that needs code
    of its own, or has no token to pad with; logits that are not the rewards.
    """
    folder = Path(folder)
    checkpoint = inspect_checkpoint(model_name)
    reward_head = load_reward_head(model_name)  # (d, 1)
    V, run_info = load_basis(model_name, V, about)
    V = check_matrix(V, "V", len(reward_head)).cpu()
    new_head = V  # (d, labels)
    if w is not None:
        new_head = V @ check_user_weights(w, "w", V.shape[1])[:, None]
    check_rank(V, run_info)
    architecture = _classifier_name(checkpoint)
    card = _model_card(model_name, V.shape[1], w is not None, run_info)
    _check_new_folder(folder)

    expected = _compute_expected_scores(model_name, new_head, conversations)

    config = _classifier_config(
        checkpoint.config, architecture, new_head.shape[1], expected.pad_token
    )
    try:
        with replace_files_in(folder) as new:
            save_json(new / "config.json", config)
            save_text(new / "README.md", card)
            _write_tokenizer(new, model_name, expected.tokenizer, expected.pad_token)
            _write_weights(new, download(checkpoint), new_head)
            _prove_export(new, conversations, expected.logits)
    finally:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


# ---- Check


def _classifier_name(checkpoint: Checkpoint) -> str:
    """The name of the sequence classifier that transformers has of this architecture.

    Raises InputError: there is none, or the checkpoint brings code of its own.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
    )

    model_type = str(checkpoint.config.get("model_type"))
    if "auto_map" in checkpoint.config:
        raise InputError(
            f"model {checkpoint.name}: needs code of its own (trust_remote_code), which servers "
            "and trainers do not run; take one that transformers has as a sequence classifier"
        )
    if model_type not in CLASSIFIERS:
        raise InputError(
            f"model {checkpoint.name}: transformers has no sequence classifier of its model_type "
            f"({model_type!r:.60}); take a model that it has one of"
        )
    return CLASSIFIERS[model_type]


def _check_new_folder(folder: Path) -> None:
    """Raise InputError if there is a file under this name, or a folder with files in it."""
    is_empty_folder = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty_folder:
        raise InputError(f"{folder}: a file, or not empty; give a new folder")


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


def _classifier_config(
    config: dict[str, Any], architecture: str, labels: int, pad_token: PadToken
) -> dict[str, Any]:
    """A checkpoint's config.json, as that of a classifier with so many labels."""
    names = [f"LABEL_{k}" for k in range(labels)]
    classifier = {
        **config,
        "architectures": [architecture],
        "num_labels": labels,
        "pad_token_id": pad_token.token_id,
        "id2label": dict(enumerate(names)),
        "label2id": {name: k for k, name in enumerate(names)},
        "problem_type": "regression",  # with another, servers apply a sigmoid or softmax
        "return_dict": True,  # a config may say otherwise, and transformers' own heads then fail
    }
    if isinstance(config.get("text_config"), dict):  # of a model of text and images: its own token
        text_config = {**config["text_config"], "pad_token_id": pad_token.token_id}
        classifier["text_config"] = text_config
    return classifier


def _write_tokenizer(
    folder: Path, model_name: str | Path, tokenizer: PreTrainedTokenizerBase, pad_token: PadToken
) -> None:
    """Copy the checkpoint's tokenizer files, with another token to pad with and a fixed date.

    Some chat templates print today's date. The rewards would depend on the day, so the export gets
    the template that embeddings are made with, of several the one for plain chats.
    The files are not written by `tokenizer.save_pretrained`, as older versions of transformers may
    not read what it writes.
    """
    template = dated_template(tokenizer)
    names = {*tokenizer.vocab_files_names.values(), *TOKENIZER_FILES}
    checkpoint = checkpoint_folder(model_name, *names)
    for name in names:
        if not (checkpoint / name).exists():
            continue
        if name in TOKENIZER_SETTINGS:
            settings = load_json(checkpoint / name)
            settings["pad_token"] = pad_token.content
            if "chat_template" in settings:
                settings["chat_template"] = template
            save_json(folder / name, settings)
        elif name == TEMPLATE_FILE:
            save_text(folder / name, template)
        else:
            shutil.copyfile(checkpoint / name, folder / name)


def _write_weights(folder: Path, checkpoint: Checkpoint, head: torch.Tensor) -> None:
    """Write the checkpoint's shards with another head, `[d, labels]`, and the index of them.

    The new head has a shard of its own. The backbone's shards are linked; only the one that held
    the old head is written, without it.
    """
    old_shards = dict(file_per_tensor(checkpoint))  # tensor -> file
    # Exactly one tensor is the head: load_reward_head has checked that.
    (head_name,) = head_names(old_shards)
    old_head_file = old_shards.pop(head_name)

    old_files = sorted(set(old_shards.values()))
    total = len(old_files) + 1
    new_files = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    *backbone_files, head_file = new_files
    new_name = dict(zip(old_files, backbone_files))
    for old_file in old_files:
        target = folder / new_name[old_file]
        if old_file == old_head_file:
            shard = open_safetensors(checkpoint, old_file)
            tensors = {name: shard.get_tensor(name) for name in shard.keys() if name != head_name}
            _save_shard(target, tensors, shard.metadata())
        else:
            _link_or_copy(checkpoint.folder / old_file, target)
    _save_shard(folder / head_file, {head_name: head.T.contiguous()})

    weight_map = {name: new_name[file] for name, file in old_shards.items()}
    weight_map[head_name] = head_file
    total_size = sum((folder / file).stat().st_size for file in new_files)
    save_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": weight_map},
    )


def _save_shard(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that transformers accepts: it asks for the format "pt".

    metadata: of the file that the tensors are from. Some quantisers keep their settings there.
    """
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, {**(metadata or {}), "format": "pt"}))


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it if that is on another disk."""
    try:
        os.link(source.resolve(), target)  # resolved, as the hub's cache holds symbolic links
    except OSError:
        shutil.copyfile(source, target)


def _model_card(
    model_name: str | Path, columns: int, is_personal: bool, run_info: dict[str, Any]
) -> str:
    """The text of the export's README.md. Raises InputError: a run_info of another shape."""
    if is_personal:
        meaning = "One user's reward: one logit"
    else:
        meaning = f"A basis of {columns} rewards that users mix: {columns} logits"
    rank = run_info.get("K", columns)
    alpha = run_info.get("alpha")
    facts = {
        "reward model": Path(model_name).name if os.path.isdir(model_name) else str(model_name),
        "data": (run_info.get("config") or {}).get("data"),
        "rank": rank,
        "alpha": alpha,
        "seed": run_info.get("seed"),
    }
    try:
        lines = [
            f"- {name}: {markdown_text(format_cell(fact))}"
            for name, fact in facts.items()
            if fact is not None
        ]
        for entry in run_info.get("evidence", ()):
            if entry["K"] == rank and entry["alpha"] == alpha:
                accuracy = INTERVAL.format(**entry["accuracy"][UNSEEN_TEST])
                lines.append(f"- accuracy, {UNSEEN_TEST}: {accuracy}")
        verdict = []
        if "verdict" in run_info:
            verdict = str(run_info["verdict"]["text"]).splitlines()
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"about: its evidence or verdict is not that of results.json ({one_line(error)}); give "
            "the dict of results.json"
        ) from None

    paragraphs = [
        CARD_HEADER,
        "# A low-rank reward model",
        f"{meaning} of a chat-formatted conversation, without a sigmoid or softmax. The head is in "
        "float32; in bfloat16 rewards lose digits that close answers may need.",
        CARD_EXAMPLE,
        "\n".join(lines),
    ]
    if verdict:
        paragraphs.append("The whole run's verdict:")
        paragraphs.append("\n".join(map(markdown_text, verdict)))
    return "\n\n".join(paragraphs) + "\n"


# ---- Prove


def _prove_export(folder: Path, conversations: list[Conversation], expected: torch.Tensor) -> None:
    """Raise InputError unless the model in `folder` gives the expected logits `[n, labels]`."""
    try:
        logits = _served_logits(folder, conversations)  # (2n, labels)
    except Exception as error:  # of the model's own code, or of its quantiser
        raise InputError(
            f"{folder.parent}: transformers cannot load or run the export, so nothing was written; "
            f"it says: {one_line(error)}"
        ) from None
    error = (logits - expected.repeat(2, 1)).norm() / logits.norm()
    if not error <= LARGEST_ERROR:  # also if it is NaN
        raise InputError(
            f"{folder.parent}: the export's logits differ from phi @ V by {error:.1e} of their "
            "size, so nothing was written; transformers computes this model otherwise than "
            "embed_conversations"
        )


def _served_logits(folder: Path, conversations: list[Conversation]) -> torch.Tensor:
    """The logits of conversations as a server computes them, `[2n, labels]`.

    First one by one, and then in a padded batch.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(folder, torch_dtype=torch.float32)
    model.eval()
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in conversations]

    def compute_logits(batch: list[str]) -> torch.Tensor:
        tokens = tokenizer(batch, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.inference_mode():
            # By name: the mask's place among the arguments differs between architectures.
            return model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).logits

    one_by_one = torch.cat([compute_logits([text]) for text in texts])
    return torch.cat([one_by_one, compute_logits(texts)])
