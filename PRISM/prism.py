"""PRISM: where the conversations are from, how they become turns and pairs, the released split, the embeddings files."""

from pathlib import Path
from typing import List, Literal, Optional

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, Field, StrictStr

from lore.embedding_files import find_reward_head
from lore.files import atomic_write, digest_of, load_json, load_pickle, replace_files_in, save_json
from lore.rows import parse_rows, read_rows, split_files
from utils import InputError, create_dataset_prism, group_by_dialog, is_finite, turn_pairs

DATASET = "HannahRoseKirk/prism-alignment"
FILES = ("train_embeddings.pkl", "test_embeddings.pkl")
PAIR_FORMAT = "one embedding per rejected response"
SPLIT_FOLDER = Path("data") / "prism"  # of what prepare.py writes
INFO = (
    "split",
    "seen",
    "user_id",
    "dialog_id",
    "turn_nb",
    "total_turn_nb",
    "chosen_utterance",
    "rejected_utterance",
)
EXPECTED = {
    "seen users": 1030,
    "train turns": 12999,
    "train pairs": 19638,
    "test pairs": 19727,
}  # of the full data set


class User(BaseModel):
    user_id: StrictStr
    num_completed_conversations: int


class Message(BaseModel):
    turn: int = Field(ge=0, lt=10000)
    role: Literal["user", "model"]
    content: Optional[StrictStr]
    if_chosen: Optional[bool] = None


class Conversation(BaseModel):
    conversation_id: StrictStr
    user_id: StrictStr
    conversation_history: List[Message]


def source_file(folder, name):
    """The path of survey.jsonl or conversations.jsonl in a folder (.gz there too), or downloaded where it is None."""
    if folder is not None:
        word = name.split(".")[0]
        return split_files(folder, **{word: [word]})[word][0]
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(DATASET, name, repo_type="dataset"))
    except Exception as error:  # no network, no such file, no access: a class of its own for each
        raise InputError(
            f"data set {DATASET}, {name}: the hub did not serve it ({type(error).__name__}); check the "
            "network, or give a downloaded copy with --data"
        ) from None


def read_conversations(folder, limit=None):
    """The first `limit` users with a completed conversation -> user -> list of Conversation, in survey and file order.

    Raises InputError that names file, row and field; a conversation twice, or of nobody in the survey.
    """
    survey, conversations = (
        source_file(folder, f"{name}.jsonl") for name in ("survey", "conversations")
    )
    people = [user for _, user in parse_rows(read_rows(survey), User, DATASET)]
    of_user = {
        user.user_id: []
        for user in [u for u in people if u.num_completed_conversations > 0][:limit]
    }
    everyone, ids = {user.user_id for user in people}, set()
    for where, conversation in parse_rows(read_rows(conversations), Conversation, DATASET):
        if conversation.user_id not in everyone or conversation.conversation_id in ids:
            raise InputError(
                f"{where}: conversation {conversation.conversation_id} stands there twice, or its user "
                f"{conversation.user_id} is not in {survey}; take both files of one release"
            )
        ids.add(conversation.conversation_id)
        if conversation.user_id in of_user:
            of_user[conversation.user_id].append(conversation)
    return of_user


def turns_of(conversation):
    """The complete turns of a conversation, each with what was said before on the chosen path, and how many are not.

    A complete turn has a user message, one chosen response (twice the same text counts once) and a rejected one;
    responses without a text are left out. Returns ([{prompt, turn_nb, chosen_utterance, rejected_utterance}], how many
    turns and how many responses were left out).
    """
    by_turn, found, history = {}, [], []
    for message in conversation.conversation_history:
        if message.content is not None:
            by_turn.setdefault(message.turn, []).append(message)
    for number in sorted(by_turn):
        asked = [m.content for m in by_turn[number] if m.role == "user"]
        chosen = {m.content for m in by_turn[number] if m.role == "model" and m.if_chosen}
        rejected = [m.content for m in by_turn[number] if m.role == "model" and not m.if_chosen]
        if len(asked) != 1 or len(chosen) != 1:
            continue
        answer = chosen.pop()
        history = history + [{"role": "user", "content": asked[0]}]
        if rejected:
            found.append(
                {
                    "prompt": history,
                    "turn_nb": number,
                    "chosen_utterance": answer,
                    "rejected_utterance": rejected,
                }
            )
        history = history + [{"role": "assistant", "content": answer}]
    messages = conversation.conversation_history
    return (
        found,
        len({m.turn for m in messages}) - len(found),
        sum(m.content is None for m in messages),
    )


def split_users(dialogs_of, seed, seen_share, fewest_conversations):
    """The released split, from one generator: user -> (seen, train conversation ids, test conversation ids).

    dialogs_of: user id -> list of conversation ids, users in survey order, conversations in file order.
    """
    generator = np.random.RandomState(seed)
    users = np.array(list(dialogs_of))
    generator.shuffle(users)
    first_unseen, split = int(seen_share * len(users)), {}
    for place, user in enumerate(users.tolist()):
        ids = np.array(dialogs_of[user])
        if len(ids) < fewest_conversations:
            continue
        generator.shuffle(ids)
        split[user] = (
            place < first_unseen,
            ids[: len(ids) // 2].tolist(),
            ids[len(ids) // 2 :].tolist(),
        )
    if len({seen for seen, *_ in split.values()}) < 2:
        raise InputError(
            f"no seen or no unseen user has {fewest_conversations} conversations with a complete turn; "
            "take the whole data set, or a larger --limit"
        )
    return split


def rows_of(split, turns):
    """One row per turn -> {"train": rows, "test": rows}. turns: conversation id -> list of its turns."""
    rows = {"train": [], "test": []}
    for user, (seen, *parts) in split.items():
        for name, ids in zip(rows, parts):
            rows[name] += [
                {
                    "prompt": turn["prompt"],
                    "extra_info": dict(
                        zip(
                            INFO,
                            (
                                name,
                                seen,
                                user,
                                dialog,
                                turn["turn_nb"],
                                len(turns[dialog]),
                                turn["chosen_utterance"],
                                turn["rejected_utterance"],
                            ),
                        )
                    ),
                }
                for dialog in ids
                for turn in turns[dialog]
            ]
    return rows


def counts_of(rows):
    """Users, turns and pairs of the rows of a split, those that EXPECTED names among them."""
    infos = pd.DataFrame([row["extra_info"] for name in rows for row in rows[name]])
    infos["pairs"] = infos.rejected_utterance.map(len)
    users = infos.groupby("seen").user_id.nunique()
    turns, pairs = infos.groupby("split").size(), infos.groupby("split").pairs.sum()
    return {
        "seen users": int(users.get(True, 0)),
        "unseen users": int(users.get(False, 0)),
        **{f"{name} turns": int(turns[name]) for name in rows},
        **{f"{name} pairs": int(pairs[name]) for name in rows},
    }


def save_split(folder, rows, about):
    """Write train.parquet and test.parquet, and split.json with `about` and the digest of the rows."""
    with replace_files_in(folder) as new:
        for name in rows:
            with atomic_write(new / f"{name}.parquet") as file:
                pd.DataFrame(rows[name]).to_parquet(file)
        save_json(new / "split.json", {**about, "rows": digest_of(rows)})


def load_split(folder):
    """Read what `save_split` wrote -> (rows, split.json). Raises InputError: files missing, or of different runs."""
    about = load_json(folder / "split.json", "rows", "model", "demo", "data")
    rows = {
        name: [
            {
                "prompt": [
                    {key: message.get(key) for key in ("role", "content")}
                    for message in row["prompt"]
                ],
                "extra_info": {key: row["extra_info"].get(key) for key in INFO},
            }  # some versions of pyarrow sort them
            for _, row in read_rows(folder / f"{name}.parquet")
        ]
        for name in ("train", "test")
    }
    if digest_of(rows) != about["rows"]:
        raise InputError(
            f"{folder}: train.parquet, test.parquet and split.json are of different runs; run prepare.py "
            "--overwrite"
        )
    return rows, about


def conversations_of(row):
    """The conversations of a turn: the chosen response's, then one for each rejected response."""
    info = row["extra_info"]
    return [
        [*row["prompt"], {"role": "assistant", "content": response}]
        for response in (info["chosen_utterance"], *info["rejected_utterance"])
    ]


def _embedded_rows(path):
    """The rows of an embeddings file, each checked for its user and for finite pairs; where each width was seen."""
    rows, width = load_pickle(path, "generate-prism-embeddings.py"), {}
    if not isinstance(rows, list) or not rows:
        raise InputError(
            f"{path}: not a list of rows; run generate-prism-embeddings.py --overwrite"
        )
    for i, row in enumerate(rows):
        try:
            pairs = turn_pairs(row)
            usable = len(pairs) > 0 and is_finite(pairs)
            usable &= {"seen", "user_id", "dialog_id"} <= row["extra_info"].keys()
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
            usable = False
        if not usable:
            raise InputError(
                f"{path}, row {i}: no user, no embeddings, or NaN or infinite ones; run "
                "generate-prism-embeddings.py --overwrite"
            )
        width.setdefault(pairs.shape[1], f"{path}, row {i}")
    return rows, width


def load_embeddings(folder, model_name):
    """Read the embeddings of generate-prism-embeddings.py (or of the released script) and the reward head.

    Returns (data, head `[d, 1]`, what is known of model and data). data is a dict: `seen` and `unseen`, user ids in
    order; one float32 `[m_i, d]` per user under `train`, `test`, `train_unseen`, `test_unseen`; `dialogs` and
    `dialogs_unseen`, the conversation that each training pair of a user is from, int64 `[m_i]`; `prompts` and `longer`
    of `evidence`, where the rows hold the texts and are not malformed.
    Raises InputError that names file and row: missing or damaged files, embeddings missing, not finite, of different
    widths or of other rows than data/prism/ beside them holds.
    """
    folder, data = Path(folder), {}
    (train, width), (test, width_of_test) = (_embedded_rows(folder / name) for name in FILES)
    head, about = find_reward_head(folder, model_name, "PRISM", {**width_of_test, **width}, FILES)
    split_file = folder / SPLIT_FOLDER / "split.json"
    if "identity" in about and split_file.exists():
        if load_json(split_file, "rows")["rows"] != about["identity"].get("data"):
            raise InputError(
                f"the embeddings in {folder} are of other rows than {split_file.parent} holds; run "
                "generate-prism-embeddings.py --overwrite"
            )
    malformed = sum("pair_format" not in row["extra_info"] for row in train + test)
    if malformed:
        print(
            f"{malformed:,} rows are in the released format, whose rejected side is malformed: all rejected "
            "responses of a turn as one printed list"
        )
    texts = not malformed and all(
        "prompt" in row
        and "chosen_utterance" in row["extra_info"]
        and "rejected_utterance" in row["extra_info"]
        for row in train + test
    )
    data.update(prompts={}, longer=None)
    for split, rows in (("train", train), ("test", test)):
        for seen, suffix in ((True, ""), (False, "_unseen")):
            of_group = [row for row in rows if bool(row["extra_info"]["seen"]) == seen]
            users = group_by_dialog(of_group)
            group = "seen" if seen else "unseen"
            if not users or data.setdefault(group, list(users)) != list(users):
                raise InputError(
                    f"{folder}: {len(users)} {group} users in the {split} file, {len(data.get(group, []))} "
                    "in the other; make both files in one run of generate-prism-embeddings.py"
                )
            data[split + suffix] = create_dataset_prism(of_group)
            if split == "train":
                data[f"dialogs{suffix}"] = of_pairs(
                    users, lambda n, row: [n] * len(turn_pairs(row)), torch.tensor
                )
            if texts:
                data["prompts"][split + suffix] = of_pairs(
                    users, lambda _, row: [str(row["prompt"])] * len(turn_pairs(row))
                )
    if texts:  # users: the last, the unseen ones in test
        data["longer"] = {"test_unseen": of_pairs(users, longer_sides, np.array)}
    return data, head, about


def of_pairs(users, found, kind=list):
    """For each user what `found` gives for the pairs of a turn, (number of the conversation, row) -> a list."""
    return [
        kind(
            [
                one
                for n, rows in enumerate(dialogs.values())
                for row in rows
                for one in found(n, row)
            ]
        )
        for dialogs in users.values()
    ]


def longer_sides(_, row):
    """1 for each pair of a turn whose chosen response is the longer one, -1 where it is the shorter, else 0."""
    info = row["extra_info"]
    return [
        np.sign(len(info["chosen_utterance"]) - len(rejected))
        for rejected in info["rejected_utterance"]
    ]
