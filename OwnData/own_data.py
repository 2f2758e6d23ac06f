"""The study of own data and of public sets: people, halved into seen and unseen, and their pairs.

    own_rows       the schema of a row of own data, and of each public data set
    own_reading    files, or a data set of the hub, as a list of comparisons
    own_split      the split into train and test; who takes part
    own_files      what prepare.py writes, and how training reads it
    own_data       this module: the study that training takes

A module imports only modules above it.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch

from lore.embedding_files import HEAD_FILE, find_reward_head
from lore.normal_forms import prompt_key
from lore.study import PARTS, Study
from lore.words import count_of
from own_files import (
    EMBEDDINGS_FILE,
    FILES,
    Column,
    PairTable,
    load_pairs,
    load_table,
    load_users,
)
from utils import InputError, Pairs, check_number, check_whole

SEEN_SHARE = 0.5  # of the users, as released
EVERYBODY_IS_SEEN = (
    "every user is seen: the columns of unseen users show the same people, fitted once more with "
    "the basis frozen"
)


def load_embeddings(
    folder: Path | str,
    seen_share: float | None = None,
    split_seed: int = 0,
    train_pairs: int | None = None,
    unseen_pairs: int | None = None,
) -> Study:
    """Read what `prepare.py` wrote, and halve the users into seen and unseen.

    seen_share: of the users, sorted and shuffled by `split_seed`; 1: every user is seen, and the
    few shots of the same users fit their weights once more with V frozen; None: SEEN_SHARE, or 1
    for a data set that is published so. train_pairs, unseen_pairs: how many training pairs a seen
    and an unseen user keeps at most, drawn by `split_seed`; None: all.
    Features are `Pairs` over one table, which is mapped and not copied.
    Raises InputError: a file is missing, damaged, or not of the run that wrote the others; a
    setting is out of its bounds.
    """
    folder = Path(folder)
    check_whole("split_seed", split_seed)
    for name, value in (("train_pairs", train_pairs), ("unseen_pairs", unseen_pairs)):
        if value is not None:
            check_whole(name, value, 1)
    for name in (HEAD_FILE, *FILES):  # the digests in the first vouch for what is in the others
        if not (folder / name).exists():
            raise InputError(f"{folder / name}: no such file; run prepare.py first")
    table = load_table(folder)
    width = {table.shape[1]: folder / EMBEDDINGS_FILE}
    head, provenance = find_reward_head(folder, "", "own data", width, FILES)
    provenance.pop("title")
    pairs = load_pairs(folder)

    if seen_share is None:
        seen_share = 1 if provenance.get("all_users_are_seen") else SEEN_SHARE
    generator = random.Random(split_seed)
    seen, unseen = split_users(pairs.user.values, seen_share, generator)
    rows = rows_of_parts(pairs, seen, unseen, train_pairs, unseen_pairs, generator)
    if seen == unseen:
        provenance["data_notes"] = [*provenance["data_notes"], EVERYBODY_IS_SEEN]
    prompts = prompt_values(pairs.prompt)
    return Study(
        title=provenance["data"],
        seen=seen,
        unseen=unseen,
        **{
            part: [Pairs(table, pairs.chosen[user], pairs.rejected[user]) for user in rows[part]]
            for part in PARTS
        },
        reward_head=head,
        prompts={
            part: [
                [prompts[number] for number in pairs.prompt.numbers[user]] for user in rows[part]
            ]
            for part in PARTS
        },
        texts={part: [texts_of(pairs, user) for user in rows[part]] for part in PARTS},
        groups={
            part: [group_within_user(pairs.group[user]) for user in rows[part]]
            for part in ("train", "train_unseen")
        },
        conversations={part: [pairs.group[user].tolist() for user in rows[part]] for part in PARTS},
        about_users=load_users(folder),
        provenance=provenance,
    )


def users_in_words(study: Study) -> str:
    """How many seen and unseen users there are."""
    if study.everybody_is_seen:
        return f"{count_of(len(study.seen), 'user')} ({EVERYBODY_IS_SEEN})"
    return f"{len(study.seen)} seen and {count_of(len(study.unseen), 'unseen user')}"


def split_users(
    users: list[str], seen_share: float, generator: random.Random
) -> tuple[list[str], list[str]]:
    """The seen and the unseen users; with a share of 1 all users are both.

    Raises InputError: the share is not above 0 and at most 1.
    """
    check_number("seen_share", seen_share, 0.01, 1)
    users = sorted(users)
    generator.shuffle(users)
    if seen_share == 1:
        return users, list(users)
    count = min(max(1, round(seen_share * len(users))), len(users) - 1)
    return users[:count], users[count:]


def rows_of_parts(
    pairs: PairTable,
    seen: list[str],
    unseen: list[str],
    train_pairs: int | None,
    unseen_pairs: int | None,
    generator: random.Random,
) -> dict[str, list[np.ndarray]]:
    """The rows of each user's pairs in each part of a study."""
    order = np.argsort(pairs.user.numbers, kind="stable")
    ends = np.cumsum(np.bincount(pairs.user.numbers))[:-1]
    rows_of_user = dict(zip(pairs.user.values, np.split(order, ends)))
    is_train = np.array([split == "train" for split in pairs.split.values])[pairs.split.numbers]

    def side(users: list[str], train: bool, most: int | None = None) -> list[np.ndarray]:
        rows = [rows_of_user[user] for user in users]
        rows = [user_rows[is_train[user_rows] == train] for user_rows in rows]
        return [draw(user_rows, most, generator) for user_rows in rows]

    return {
        "train": side(seen, True, train_pairs),
        "test": side(seen, False),
        "train_unseen": side(unseen, True, unseen_pairs),
        "test_unseen": side(unseen, False),
    }


def draw(rows: np.ndarray, most: int | None, generator: random.Random) -> np.ndarray:
    """At most so many of the rows, in their order."""
    if most is None or len(rows) <= most:
        return rows
    return np.array(sorted(generator.sample(rows.tolist(), most)))


def prompt_values(prompt: Column) -> list[str]:
    """What the study tells prompts apart by: of each distinct prompt its messages as JSON.

    Prompts that are equal to a reader have the same text.
    """
    text_of_key: dict[str, str] = {}
    return [text_of_key.setdefault(prompt_key(json.loads(text)), text) for text in prompt.values]


def texts_of(pairs: PairTable, rows: np.ndarray) -> list[tuple[str, str]]:
    """The chosen and the rejected text of these pairs."""
    chosen = [pairs.chosen_text.values[number] for number in pairs.chosen_text.numbers[rows]]
    rejected = [pairs.rejected_text.values[number] for number in pairs.rejected_text.numbers[rows]]
    return list(zip(chosen, rejected))


def group_within_user(groups: np.ndarray) -> torch.Tensor:
    """The groups of one user's pairs, counted from 0 without a gap."""
    return torch.from_numpy(np.unique(groups, return_inverse=True)[1])
