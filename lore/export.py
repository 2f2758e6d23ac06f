"""A reward model that servers and trainers load without this code."""

import itertools
import os
import shutil
from pathlib import Path

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

PROBES = [
    [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts)]
    for texts in (
        ("Is tea better than coffee?", "Tea."),
        ("How far is the moon?", "384,000 km.", "And the sun?", "150 million km."),
    )
]


def export_reward_model(folder, model_name, V, w=None, about=None, conversations=PROBES):
    """Write a reward model that anyone loads as `AutoModelForSequenceClassification`, and prove it.
    folder: a new one. model_name: the reward model of the basis V `[d, K]`. w: one user's weights `[K]`, for one label;
    default the whole basis, K labels. about: for the model card, what `load_tensors` and `load_json` read in results/.
    The backbone's files are linked, the head is float32. Raises InputError, and leaves nothing: where logits of these
    conversations, one by one or padded, are not phi @ V @ w within 1e-4, in float32 on the CPU; where the model needs
    code of its own or has no token to pad with."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as classes,
    )

    old_head, folder = load_reward_head(model_name), Path(folder)
    V = check_matrix(V, "V", len(old_head)).cpu()
    head = (
        V
        if w is None
        else V @ check_matrix(torch.as_tensor(w).reshape(-1, 1), "w", V.shape[1], 1).cpu()
    )
    config = load_json(checkpoint_folder(model_name, "config.json") / "config.json", "model_type")
    if "auto_map" in config or config["model_type"] not in classes:
        raise InputError(
            f"model {model_name}: needs code of its own (trust_remote_code), which servers and trainers "
            "do not run; take one that transformers has as a sequence classifier"
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: a file, or not empty; give a new folder")
    about = about or {}
    learnt = (about.get("identity") or {}).get("reward_head")
    if (
        learnt not in (None, digest_of(old_head.tolist()))
        or about.get("K", V.shape[1]) < V.shape[1]
    ):
        raise InputError(
            f"{folder}: the basis is of {about.get('config', {}).get('model')} at rank {about.get('K')}, not "
            f"{model_name}'s of {V.shape[1]} columns; give the model and `about` of this basis"
        )
    model, tokenizer = load_reward_model(model_name, "cpu")
    expected = (
        embed_conversations(conversations, model, tokenizer, batch_size=1).float() @ head
    )  # (n, labels)
    pad, pad_name = _pad_token(
        model_name, tokenizer, conversations, model.get_input_embeddings().num_embeddings
    )
    del model  # memory need hold one of the two
    labels = [f"LABEL_{k}" for k in range(head.shape[1])]
    config |= {
        "architectures": [classes[config["model_type"]]],
        "num_labels": len(labels),
        "pad_token_id": pad,
        "id2label": dict(enumerate(labels)),
        "label2id": dict(zip(labels, itertools.count())),
        "problem_type": "regression",
    }  # a server would put another through a sigmoid or softmax
    try:
        with replace_files_in(folder) as new:
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
    free = {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and i < embeddings and i not in used
    }
    if not free:
        raise InputError(
            f"model {model_name}: padding with the end of a turn would change scores, and none of its "
            f"special tokens within {embeddings} embeddings is free; add one to its tokenizer"
        )
    return min(
        free.items(),
        key=lambda item: (
            item[0] != tokenizer.pad_token_id,
            *(word not in item[1].lower() for word in ("pad", "reserved", "unused")),
            -item[0],
        ),
    )


def _write_checkpoint(folder, model_name, tokenizer, pad_name, head):
    """The checkpoint's own tokenizer files, which older versions of transformers can read too, with `pad_name` to pad;
    its shards, linked, or written anew where one held the old head; the new head in one of its own."""
    settings = "tokenizer_config.json", "special_tokens_map.json"
    names = {
        *tokenizer.vocab_files_names.values(),
        *settings,
        "tokenizer.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
    }
    shards, source = (
        shard_per_tensor(model_name),
        checkpoint_folder(model_name, "*.safetensors", *names),
    )
    for name in filter(lambda name: (source / name).exists(), names):
        shutil.copyfile(source / name, folder / name)
        if name in settings:
            save_json(folder / name, load_json(source / name) | {"pad_token": pad_name})
    (old,) = (name for name in shards if name.endswith("score.weight"))
    files = [
        *sorted({file for name, file in shards.items() if name != old}),
        None,
    ]  # None: the new head's
    paths = [
        folder / f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    for file, path in zip(files, paths):
        if file in (shards[old], None):
            tensors = (
                {
                    name: tensor
                    for name, tensor in load_tensors(source / file)[0].items()
                    if name != old
                }
                if file
                else {old: head.T.contiguous()}
            )
            with atomic_write(path) as new:
                new.write(safetensors.torch.save(tensors, {"format": "pt"}))
            continue
        try:
            os.link((source / file).resolve(), path)  # the hub's cache holds links
        except OSError:  # another disk
            shutil.copyfile(source / file, path)
    file_of = dict(zip(files, (path.name for path in paths)))
    save_json(
        folder / "model.safetensors.index.json",
        {
            "metadata": {"total_size": sum(path.stat().st_size for path in paths)},
            "weight_map": {
                name: file_of[None if name == old else file] for name, file in shards.items()
            },
        },
    )


def _prove_export(folder, conversations, expected):
    """Raise InputError unless the model in `folder` gives the expected logits, one by one and in a padded batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, torch_dtype=torch.float32
    ).eval()
    texts, found = [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations], []
    for batch in (*([text] for text in texts), texts):
        tokens = tokenizer(batch, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.inference_mode():
            found.append(model(tokens["input_ids"], tokens["attention_mask"]).logits)
    error = (torch.cat(found) - expected.repeat(2, 1)).norm() / torch.cat(found).norm()
    if not error <= 1e-4:
        raise InputError(
            f"{folder.parent}: the export's logits differ from phi @ V by {error:.1e} of their size, so "
            "nothing was written; transformers computes this model otherwise than embed_conversations"
        )


def _model_card(model_name, K, personal, about):
    """The text of the export's README.md."""
    row = {"rank": about.get("K", K), "alpha": about.get("alpha")}
    facts = {
        "reward model": Path(model_name).name if os.path.isdir(model_name) else model_name,
        "data": about.get("config", {}).get("data"),
        **row,
        "seed": about.get("seed"),
    }
    facts |= {
        f"accuracy, {UNSEEN_TEST}": entry["accuracy"][UNSEEN_TEST]
        for entry in about.get("evidence", ())
        if [entry["K"], entry["alpha"]] == list(row.values())
    }
    return (
        "\n\n".join(
            [
                "---\nlibrary_name: transformers\npipeline_tag: text-classification\n---",
                "# A low-rank reward model",
                (
                    "One user's reward: one logit"
                    if personal
                    else f"A basis of {K} rewards that users mix: {K} logits"
                )
                + " of a chat-formatted conversation, without a sigmoid or softmax. The head is in float32; in bfloat16 rewards "
                "lose digits that close answers may need.",
                "    tokenizer = AutoTokenizer.from_pretrained(folder)\n"
                "    model = AutoModelForSequenceClassification.from_pretrained(folder)\n"
                "    text = tokenizer.apply_chat_template(messages, tokenize=False)\n"
                "    model(**tokenizer(text, add_special_tokens=False, return_tensors='pt')).logits",
                "\n".join(
                    f"- {name}: {format_cell(value)}"
                    for name, value in facts.items()
                    if value is not None
                ),
                *(
                    ["The whole run's verdict:", about["verdict"]["text"]]
                    if "verdict" in about
                    else []
                ),
            ]
        )
        + "\n"
    )
