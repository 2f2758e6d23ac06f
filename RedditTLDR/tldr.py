"""Reddit TL;DR, and comparisons of anybody's own: where they are from, how a row becomes conversations, what the
embeddings files hold."""

import ast
import contextlib
import itertools
import json
import random
from pathlib import Path
from typing import List, Literal, Optional, Union

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, Field, StrictStr, model_validator
from typing_extensions import Annotated, TypedDict

from lore.embedding_files import find_reward_head
from lore.files import load_pickle
from lore.rows import DATA_FILE, as_messages, hub_rows, parse_rows, read_rows, split_files
from utils import InputError, check_settings, is_finite

DATASET = "openai/summarize_from_feedback"
SCHEMAS = f"{DATASET}, or {{user, prompt, chosen, rejected}} for data of your own"
FILES = ("tldr_embeddings_train.pkl", "tldr_embeddings_val.pkl")
SIDES = ("winning", "losing")
LEAVE_OUT = 2  # workers of the fewest pairs, in each file; of own data none


def name_of(worker):
    """A worker's id as text; a whole number, as a table may hold it, is its digits; without white space around it."""
    if isinstance(worker, float) and worker.is_integer():
        worker = int(worker)
    worker = str(worker) if isinstance(worker, int) and not isinstance(worker, bool) else worker
    return worker.strip() if isinstance(worker, str) else worker


Worker = Annotated[StrictStr, Field(min_length=1, pattern=r"\S"), BeforeValidator(name_of)]


class Info(BaseModel):
    post: Optional[StrictStr]


class Summary(BaseModel):
    text: Optional[StrictStr]


class Comparison(BaseModel):
    """A row of the hub's `comparisons`, of whose columns these are needed."""

    info: Info
    summaries: Annotated[List[Summary], Field(min_length=2, max_length=2)]
    choice: Annotated[int, Field(ge=0, le=1)]
    worker: Worker

    def parts(self):
        """(worker, prompt, chosen, rejected)"""
        first, second = (summary.text for summary in self.summaries)
        return self.worker, self.info.post, *((second, first) if self.choice else (first, second))


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: StrictStr


Turns = Optional[Union[StrictStr, Annotated[List[Message], Field(min_length=1)]]]


class OwnComparison(BaseModel):
    """A row of data of one's own: each part a text or a list of messages; the answers may repeat the prompt's."""

    user: Worker
    prompt: Turns
    chosen: Turns
    rejected: Turns
    split: Optional[Literal["train", "validation", "test"]] = None

    @model_validator(mode="after")
    def answers_are_an_assistants(self):
        _, prompt, *answers = self.parts()
        roles = [
            [message["role"] for message in as_messages("assistant", turns)]
            for turns in answers
            if turns
        ]
        if (
            isinstance(prompt, list)
            and prompt[-1]["role"] == "assistant"
            or any(role[0] != "assistant" or role[-1] != "assistant" for role in roles)
        ):
            raise ValueError(
                "the prompt must end before, and each answer begin and end with, an assistant's message"
            )
        return self

    def parts(self):
        """(user, prompt, chosen, rejected)"""
        opening = as_messages("user", self.prompt or "")
        return (
            self.user,
            self.prompt,
            *(
                turns[len(opening) :] if turns and turns[: len(opening)] == opening else turns
                for turns in (self.chosen, self.rejected)
            ),
        )


def rows_of(path):
    """The rows of a file, as (where, row) pairs; what a CSV file holds of messages as text, in Python's notation or in
    JSON, is messages again."""
    for where, row in read_rows(path):
        for field, value in row.items() if ".csv" in path.suffixes else ():
            with contextlib.suppress(
                ValueError, TypeError, SyntaxError, MemoryError, RecursionError
            ):  # no messages
                found = (
                    ast.literal_eval(value)
                    if isinstance(value, str) and value.startswith("[{")
                    else ()
                )
                if any("role" in message for message in found):
                    row[field] = found
        yield where, row


def schema_of(path):
    """Of which of the two schemas the rows of a file are, by its first row."""
    row = None
    with contextlib.suppress(InputError):  # which reading it again will raise
        _, row = next(read_rows(path), (None, None))
    return (
        OwnComparison
        if isinstance(row, dict) and {"chosen", "rejected"} & row.keys()
        else Comparison
    )


def read_comparisons(data, test_share, test_seed):
    """(schema, the rows of both splits as (where, row) pairs) of a folder, a file, or of the hub where it is None.

    Own data may be one file, see `split_own`.
    """
    if data is None:
        return Comparison, hub_rows(
            DATASET,
            revision="refs/convert/parquet",
            data_files={
                split: f"comparisons/{split}/*.parquet" for split in ("train", "validation")
            },
        )
    files = (
        [data]
        if data.is_file()
        else [path for path in data.glob("*") if DATA_FILE.search(path.name)]
    )
    if data.is_file() or len(files) == 1 and schema_of(files[0]) is OwnComparison:
        return OwnComparison, split_own(rows_of(files[0]), test_share, test_seed)
    files = split_files(data, train=["train"], validation=["validation", "test"])
    return schema_of(files["train"][0]), {
        split: (row for path in paths for row in rows_of(path)) for split, paths in files.items()
    }


def split_own(rows, test_share, test_seed):
    """Parse the rows of own data in one file and split them by their `split`, or else, seeded, by prompt: each on one side.

    test_share: of the prompts, for validation. Raises InputError: some rows without a split, or all on one side.
    """
    check_settings(test_share=test_share, test_seed=test_seed)
    parsed = list(parse_rows(rows, OwnComparison, SCHEMAS))
    prompts = [prompt_of(row.prompt) for _, row in parsed]
    if any(row.split for _, row in parsed):
        for where in (where for where, row in parsed if not row.split):
            raise InputError(
                f"{where}: no split, and other rows have one; give each row train, validation or test"
            )
        held = [row.split != "train" for _, row in parsed]
    else:
        distinct = sorted(set(prompts))
        random.Random(test_seed).shuffle(distinct)
        chosen = set(distinct[: max(1, round(test_share * len(distinct)))])
        print(
            f"one file without a split: {len(chosen):,} of {len(distinct):,} prompts drawn for validation"
        )
        held = [prompt in chosen for prompt in prompts]
    if len(set(held)) < 2:
        raise InputError(
            f"{len(parsed)} rows of {len(set(prompts))} prompts on one side only; training and test need "
            "prompts of their own, give more rows, or a split of both kinds"
        )
    return {
        split: list(
            itertools.compress(parsed, [is_held == (split == "validation") for is_held in held])
        )
        for split in ("train", "validation")
    }


def comparisons_by_worker(rows, schema=Comparison, limit=None):
    """Group the first `limit` usable rows: worker -> list of {text, winning_summary, losing_summary}.

    Workers come in ascending order of their number of comparisons. Returns also how many rows were dropped because
    their post or a summary is null or empty. Raises InputError that names row and field.
    """
    by_worker, kept, dropped = {}, 0, 0
    for _, row in parse_rows(rows, schema, SCHEMAS):
        worker, *turns = row.parts()
        if not all(
            part and all(m["content"].strip() for m in as_messages("", part)) for part in turns
        ):
            dropped += 1
            continue
        by_worker.setdefault(worker, []).append(
            dict(zip(("text", "winning_summary", "losing_summary"), turns))
        )
        kept += 1
        if kept == limit:
            break
    return dict(sorted(by_worker.items(), key=lambda item: len(item[1]))), dropped


def conversation(post, summary):
    """What the reward model is shown: the post as the user's turn, the summary as the answer; of own data messages."""
    return as_messages("user", post) + as_messages("assistant", summary)


def prompt_of(post):
    """A post or own prompt as one text, to be told from others that differ in more than white space."""
    return json.dumps(
        [
            [message["role"], " ".join(message["content"].split())]
            for message in as_messages("user", post or "")
        ]
    )


def length_of(summary):
    return sum(len(message["content"]) for message in as_messages("assistant", summary))


def load_embeddings(folder, model_name):
    """Read the embeddings of prepare.py (or of the released script) and the reward head.

    Returns (train, validation, head `[d, 1]`, what is known of model and data). A head that is not beside the pickles
    is read from `model_name`'s checkpoint. Raises InputError that names file and worker: files missing or damaged,
    embeddings missing, not finite or of different widths.
    """
    files, width = [], {}  # width: d -> where it was first seen
    for path in (Path(folder) / name for name in FILES):
        content = load_pickle(path)
        if not isinstance(content, dict) or not content:
            raise InputError(
                f"{path}: not a dict of workers; write it again with prepare.py --overwrite"
            )
        for worker, pairs in content.items():
            try:
                vectors = torch.stack(
                    [pair["embeddings"][side][0] for pair in pairs for side in SIDES]
                )
                usable = vectors.ndim == 2 and is_finite(vectors)
            except (KeyError, IndexError, TypeError, RuntimeError):
                usable = False
            if not usable:
                raise InputError(
                    f"{path}, worker {worker}: a pair without embeddings, or with NaN, infinite or "
                    "unequally long ones; run prepare.py --overwrite"
                )
            width.setdefault(vectors.shape[1], f"{path}, worker {worker}")
        files.append(content)
    head, about = find_reward_head(folder, model_name, "Reddit TL;DR", width, FILES)
    about |= (
        {"leave_out": 0, "title": about["data"]} if about.get("own") else {"leave_out": LEAVE_OUT}
    )
    return *files, head, about


def split_workers(train, validation, seed=0, leave_out=LEAVE_OUT):
    """The workers of both files, halved into (seen, unseen), and the generator that goes on to draw their pairs.

    train, validation: dicts of `comparisons_by_worker`. The `leave_out` workers with the fewest pairs of each file are
    left out; the others are sorted, so that nothing depends on Python's hash seed, and shuffled by `seed`.
    Raises InputError where fewer than two workers are in both files.
    """

    def kept(file):
        return set(sorted(file, key=lambda worker: (len(file[worker]), str(worker)))[leave_out:])

    workers = sorted(kept(train) & kept(validation), key=str)
    if len(workers) < 2:
        raise InputError(
            f"workers in both the train and the validation part: {len(workers)}, and at least 2 are needed (the "
            f"{leave_out} smallest of each are left out); give more rows of the same people"
        )
    chance = random.Random(seed)
    chance.shuffle(workers)
    return workers[: len(workers) // 2], workers[len(workers) // 2 :], chance


def create_dataset(train, validation, train_pairs, unseen_pairs, seed=0, leave_out=LEAVE_OUT):
    """Split the workers and form their pairs.

    train_pairs, unseen_pairs: how many training pairs a seen and an unseen worker keep at most, drawn by `seed`.
    Returns a dict: `seen` and `unseen`, lists of workers; one float32 `[m_i, d]` per worker under each of `train`,
    `test`, `train_unseen`, `test_unseen`; `prompts` and `longer` of `evidence`, where the file holds the texts.
    """
    seen, unseen, chance = split_workers(train, validation, seed, leave_out)

    def sample(file, workers, most):
        return [chance.sample(file[worker], min(most, len(file[worker]))) for worker in workers]

    def features(groups):
        winning, losing = (
            torch.stack([pair["embeddings"][side][0] for pairs in groups for pair in pairs]).float()
            for side in SIDES
        )  # (M, d)
        return list(winning.sub_(losing).split([len(pairs) for pairs in groups]))

    drawn = {
        "train": sample(train, seen, train_pairs),
        "test": [validation[w] for w in seen],
        "train_unseen": sample(train, unseen, unseen_pairs),
        "test_unseen": [validation[w] for w in unseen],
    }
    data = {
        "seen": seen,
        "unseen": unseen,
        **{part: features(groups) for part, groups in drawn.items()},
        "prompts": {},
        "longer": None,
    }
    if all(
        {"text", "winning_summary", "losing_summary"} <= pair.keys()
        for groups in drawn.values()
        for pairs in groups
        for pair in pairs
    ):
        data["prompts"] = {
            part: [[prompt_of(pair["text"]) for pair in pairs] for pairs in groups]
            for part, groups in drawn.items()
        }
        data["longer"] = {
            "test_unseen": [
                np.sign(
                    [
                        length_of(pair["winning_summary"]) - length_of(pair["losing_summary"])
                        for pair in pairs
                    ]
                )
                for pairs in drawn["test_unseen"]
            ]
        }
    return data
