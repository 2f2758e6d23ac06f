"""The files between prepare.py and training: what they hold, how they are written and read.

They are read by memory mapping, so that a process loads no more than it uses.
"""

import errno
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from lore.checkpoint import is_plain_table
from lore.files import atomic_write, explain_damage, load_tensors
from lore.normal_forms import Turns
from lore.rows import as_conversation, as_messages
from own_rows import Comparison
from utils import InputError

EMBEDDINGS_FILE = "embeddings.safetensors"
PAIRS_FILE = "pairs.parquet"
USERS_FILE = "users.parquet"
FILES = (EMBEDDINGS_FILE, PAIRS_FILE, USERS_FILE)

ROWS_AT_ONCE = 16_384  # of pairs.parquet, in memory when it is written

PAIRS_SCHEMA = pa.schema(
    {
        "user": pa.string(),
        "chosen": pa.int64(),  # the row of the conversation in EMBEDDINGS_FILE
        "rejected": pa.int64(),
        "split": pa.string(),  # train, validation or test
        "group": pa.int64(),  # conversations that a split must not cut
        "prompt": pa.string(),  # the messages, as JSON
        "chosen_text": pa.string(),
        "rejected_text": pa.string(),
    }
)
USERS_SCHEMA = pa.schema({"user": pa.string(), "about": pa.string()})  # about: a JSON object

Conversation = list[dict[str, str]]


# ---- What they are made of


def number_conversations(
    comparisons: list[Comparison],
) -> tuple[list[Conversation], np.ndarray]:
    """The distinct conversations, and the number of each comparison's two: int64 `[m, 2]`.

    The first column has the conversation with the chosen answer, the second the rejected one.
    """
    conversations = []
    number_of: dict[tuple, int] = {}
    numbers = np.empty((len(comparisons), 2), np.int64)
    for place, comparison in enumerate(comparisons):
        prompt = hashable("user", comparison.prompt)
        for side, answer in enumerate((comparison.chosen, comparison.rejected)):
            key = prompt, hashable("assistant", answer)
            number = number_of.setdefault(key, len(conversations))
            if number == len(conversations):
                conversations.append(as_conversation(comparison.prompt, answer))
            numbers[place, side] = number
    return conversations, numbers


def has_equal_sides(comparison: Comparison) -> bool:
    """Whether the model is shown the same conversation for both answers."""
    chosen, rejected = (hashable("assistant", answer) for answer in comparison[2:4])
    return chosen == rejected


def hashable(role: str, turns: Turns) -> tuple:
    """The messages as a key of a dict; a text is one message of this role."""
    if isinstance(turns, str):
        return ((role, turns),)
    return tuple((message["role"], message["content"]) for message in turns)


def digest_of_data(
    comparisons: list[Comparison], groups: np.ndarray, about_users: dict[str, dict[str, Any]]
) -> str:
    """SHA-256, in hex digits, of all that prepare.py's files depend on besides the model."""
    digest = hashlib.sha256(json.dumps(about_users, sort_keys=True).encode())
    for comparison, group in zip(comparisons, groups.tolist()):
        digest.update(json.dumps([*comparison, group]).encode())
    return digest.hexdigest()


# ---- Writing


def save_table(path: Path, table: torch.Tensor) -> None:
    """Write the embeddings of all distinct conversations, bfloat16 `[n, d]`.

    The file is written from the table itself: a copy of it in memory may be too much.
    """
    try:
        safetensors.torch.save_file({"embeddings": table}, path)
    except safetensors.SafetensorError as error:  # such as a full disk
        raise OSError(errno.EIO, str(error), str(path)) from None
    path.chmod(0o644)  # as other files have it; the library lets only its owner read it


def save_pairs(
    path: Path,
    comparisons: list[Comparison],
    groups: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
) -> None:
    """Write a row for each comparison; chosen, rejected: int64 `[m]`, rows of the table."""
    with (
        atomic_write(path) as file,
        pq.ParquetWriter(file, PAIRS_SCHEMA, compression="zstd") as out,
    ):
        for start in range(0, len(comparisons), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            columns = {
                "user": [comparison.user for comparison in comparisons[part]],
                "chosen": chosen[part],
                "rejected": rejected[part],
                "split": [comparison.split for comparison in comparisons[part]],
                "group": groups[part],
                "prompt": [
                    json.dumps(as_messages("user", comparison.prompt))
                    for comparison in comparisons[part]
                ],
                "chosen_text": [as_text(comparison.chosen) for comparison in comparisons[part]],
                "rejected_text": [as_text(comparison.rejected) for comparison in comparisons[part]],
            }
            out.write_table(pa.table(columns, schema=PAIRS_SCHEMA))


def as_text(answer: Turns) -> str:
    """A text as it is; the contents of messages, joined."""
    return "".join(message["content"] for message in as_messages("assistant", answer))


def save_users(path: Path, about_users: dict[str, dict[str, Any]]) -> None:
    """Write what is known of people, a row for each."""
    about = [json.dumps(known) for known in about_users.values()]
    table = pa.table({"user": list(about_users), "about": about}, schema=USERS_SCHEMA)
    with atomic_write(path) as file:
        pq.write_table(table, file)


# ---- Reading


def load_table(folder: Path) -> torch.Tensor:
    """The embeddings `[n, d]`, mapped: a row is read from the disk when it is used.

    Raises InputError: the file is missing or damaged.
    """
    path = folder / EMBEDDINGS_FILE
    tensors, _ = load_tensors(path)
    table = tensors.get("embeddings", torch.zeros(0))
    if not is_plain_table(table):
        raise InputError(f"{path}: holds no table of embeddings; run prepare.py --overwrite")
    return table


@dataclass
class Column:
    """The values of a column of texts."""

    values: list[str]  # each distinct one
    numbers: np.ndarray  # int64 [m], the place of each row's value in `values`


@dataclass
class PairTable:
    """What pairs.parquet holds, a value for each pair. Texts that are equal are held once."""

    user: Column
    split: Column
    prompt: Column
    chosen_text: Column
    rejected_text: Column
    chosen: np.ndarray  # int64 [m]
    rejected: np.ndarray
    group: np.ndarray


def load_pairs(folder: Path) -> PairTable:
    """Read pairs.parquet. Raises InputError: it is missing or damaged."""
    path = folder / PAIRS_FILE
    columns = {}
    with explain_damage(path, "table of pairs"):
        for column in PAIRS_SCHEMA:  # one by one, as the file may be large
            name = column.name
            if column.type == pa.string():
                table = pq.read_table(path, columns=[name], memory_map=True, read_dictionary=[name])
                columns[name] = distinct_values(table[name])
            else:
                table = pq.read_table(path, columns=[name], memory_map=True)
                columns[name] = table[name].to_numpy()
    return PairTable(**columns)


def distinct_values(column: pa.ChunkedArray) -> Column:
    """A column that was read as a dictionary in each of its chunks."""
    number_of: dict[str, int] = {}
    numbers = []
    for chunk in column.chunks:
        values = chunk.dictionary.to_pylist()
        places = [number_of.setdefault(value, len(number_of)) for value in values]
        numbers.append(np.array(places, np.int64)[chunk.indices.to_numpy()])
    return Column(list(number_of), np.concatenate(numbers))


def load_users(folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of people. Raises InputError: the file is missing or damaged."""
    path = folder / USERS_FILE
    with explain_damage(path, "table of users"):
        table = pq.read_table(path)
        users = zip(table["user"].to_pylist(), table["about"].to_pylist())
        return {user: json.loads(about) for user, about in users}
