"""Reddit TL;DR: the rows, the files of embeddings, the study."""

import functools
import itertools
import pickle
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field, StrictStr

from lore.data_files import SPLIT_WORDS, data_files, print_unread, split_files
from lore.data_notes import Judged
from lore.embedding_files import find_reward_head
from lore.files import atomic_write, load_pickle
from lore.normal_forms import (
    Asked,
    Id,
    prompt_key,
    without_repeated_prompts,
)
from lore.rows import (
    LocatedRow,
    are_messages,
    as_conversation,
    column_names,
    hub_rows,
    parse_rows,
    read_rows,
)
from lore.study import Features, Study
from utils import InputError, check_whole, is_finite

DATASET = "openai/summarize_from_feedback"
# Our names of the splits, and the hub's. What our reports call validation is part of train.
HUB_SPLITS = {"train": "train", "val": "validation"}
FILES = ("tldr_embeddings_train.pkl", "tldr_embeddings_val.pkl")  # in the order of HUB_SPLITS
SIDES = ("winning", "losing")
TEXT_FIELDS = ("text", "winning_summary", "losing_summary")  # of a comparison in the files
LEAVE_OUT = 2  # workers with the fewest pairs, in each file

# The comparisons of each worker. A comparison is a dict with the TEXT_FIELDS and, in the files,
# `embeddings`: {"winning": [tensor d], "losing": [tensor d]}.
ByWorker = dict[str, list[dict]]


# ---- The schema of a row


class Preference(NamedTuple):
    """What a row says. A part without a text is None or empty."""

    worker: str
    prompt: str | None
    chosen: str | None
    rejected: str | None


class Info(BaseModel):
    post: StrictStr | None


class Summary(BaseModel):
    text: StrictStr | None


class Comparison(BaseModel):
    """A row of the hub's `comparisons`; it has more columns than these."""

    info: Info
    summaries: Annotated[list[Summary], Field(min_length=2, max_length=2)]
    choice: Annotated[int, Field(ge=0, le=1)]
    worker: Id

    def preference(self) -> Preference:
        """The post, and the summary that was chosen over the other."""
        chosen = self.summaries[self.choice].text
        rejected = self.summaries[1 - self.choice].text
        return Preference(self.worker, self.info.post, chosen, rejected)


# ---- Rows


def read_comparisons(data: Path | None) -> dict[str, Iterator[Comparison]]:
    """The rows of both splits.

    data: a folder, or None for the hub.
    Raises InputError: the data are comparisons of the reader's own, which another script prepares.
    It also names file, row and field of a row that is wrong, when that row is read.
    """
    if data is None:
        files = {name: f"comparisons/{name}/*.parquet" for name in HUB_SPLITS.values()}
        splits = hub_rows(DATASET, Comparison, revision="refs/convert/parquet", data_files=files)
        return {split: _parsed(splits[name]) for split, name in HUB_SPLITS.items()}

    if is_own_data(data):
        raise InputError(
            f"{data}: comparisons of your own have a script of their own; run "
            f"python OwnData/prepare.py --data {data}"
        )
    val_words = SPLIT_WORDS["validation"] + SPLIT_WORDS["test"]
    files_of = split_files(data, train=SPLIT_WORDS["train"], val=val_words)
    print_unread(data, itertools.chain(*files_of.values()))
    return {
        split: _parsed(itertools.chain.from_iterable(read_rows(path, Comparison) for path in files))
        for split, files in files_of.items()
    }


def is_own_data(data: Path) -> bool:
    """Whether this is a single file, or a folder of files with a column `chosen` or `rejected`."""
    if data.is_file():
        return True
    paths = data_files(data)
    try:
        return bool(paths) and bool(column_names(paths[0]) & {"chosen", "rejected"})
    except InputError:  # raised again when the rows are read
        return False


def _parsed(rows: Iterable[LocatedRow]) -> Iterator[Comparison]:
    """Rows as objects of the schema, without their places."""
    for _, row in parse_rows(rows, Comparison, DATASET):
        yield row


class Grouped(NamedTuple):
    """The comparisons of a split."""

    by_worker: ByWorker
    dropped: int  # rows without a prompt or an answer
    repeats: int  # comparisons whose summaries repeated the text of the post, which is left out


def comparisons_by_worker(rows: Iterable[Comparison], limit: int | None = None) -> Grouped:
    """The comparisons of each worker.

    A row is dropped if its prompt or an answer is null, empty or blank.
    limit: take only so many usable rows, the first ones.
    Workers come in ascending order of their number of comparisons.
    """
    usable, dropped = [], 0
    for row in rows:
        preference = row.preference()
        if not all(map(_has_text, preference[1:])):
            dropped += 1
            continue
        usable.append(preference)
        if len(usable) == limit:
            break

    by_worker = {}
    turns_of_rows, repeats = without_repeated_prompts([Asked(*row[1:]) for row in usable])
    for preference, turns in zip(usable, turns_of_rows):
        if not all(map(_has_text, turns)):  # an answer was the prompt and nothing else
            dropped += 1
            continue
        comparison = dict(zip(TEXT_FIELDS, turns))
        by_worker.setdefault(preference.worker, []).append(comparison)
    by_size = sorted(by_worker.items(), key=lambda item: len(item[1]))
    return Grouped(dict(by_size), dropped, repeats)


def _has_text(text: str | None) -> bool:
    """Whether this is a text that is not blank."""
    return bool(text and text.strip())


# ---- Conversations


def comparisons_of(by_worker: ByWorker) -> list[dict]:
    """The comparisons of all workers, in order."""
    return list(itertools.chain.from_iterable(by_worker.values()))


def judged_of(by_worker: ByWorker) -> list[Judged]:
    """The comparisons of all workers, in order, with the names of the workers."""
    return [
        Judged(worker, *(comparison[field] for field in TEXT_FIELDS))
        for worker, comparisons in by_worker.items()
        for comparison in comparisons
    ]


def has_equal_sides(comparison: dict) -> bool:
    """Whether the model is shown the same conversation for both answers."""
    return comparison["winning_summary"] == comparison["losing_summary"]


def conversations_of(by_worker: ByWorker) -> list[list[dict]]:
    """The conversations of all comparisons, in order, each winning one before the losing one."""
    return [
        as_conversation(comparison["text"], comparison[f"{side}_summary"])
        for comparison in comparisons_of(by_worker)
        for side in SIDES
    ]


def distinct_conversations(splits: Iterable[ByWorker]) -> int:
    """How many of the conversations of all splits are different."""
    return len(
        {
            (comparison["text"], comparison[f"{side}_summary"])
            for by_worker in splits
            for comparison in comparisons_of(by_worker)
            for side in SIDES
        }
    )


# ---- Files of embeddings


def save_embeddings(
    path: Path, by_worker: ByWorker, table: torch.Tensor, rows: torch.Tensor
) -> None:
    """Write the comparisons with their embeddings, in the released format.

    table: bfloat16 `[distinct, d]`; rows: int64 `[2 * comparisons]`, the row of each conversation
    there, in the order of `conversations_of`.
    """
    vectors = table.unbind()  # (d,) each; one that conversations share is pickled once
    next_row = iter(rows.tolist())
    content = {}
    for worker, comparisons in by_worker.items():
        content[worker] = []
        for comparison in comparisons:
            sides = {side: [vectors[next(next_row)]] for side in SIDES}
            content[worker].append({**comparison, "embeddings": sides})
    with atomic_write(path) as file:
        RowPickler(file, protocol=4).dump(content)


class RowPickler(pickle.Pickler):
    """Writes each row of a bfloat16 table as torch pickles a tensor that owns its memory.

    torch would write the whole table for each row, unless each were copied first.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):  # a row (d,): its memory goes on as an array of bytes
            d = len(value)
            memory = value.view(torch.uint8).numpy()
            return _pickled_tensor(d).rebuild, (memory, 0, (d,), (1,), False, None)
        if isinstance(value, np.ndarray):
            parts = _pickled_tensor(len(value) // 2)
            return parts.load_memory, (parts.header + value.tobytes(),)
        return NotImplemented


class PickledTensor(NamedTuple):
    """The parts of torch's pickle of a tensor."""

    rebuild: Any  # (memory, offset, shape, strides, requires_grad, hooks) -> the tensor
    load_memory: Any  # header + bytes -> the memory
    header: bytes


@functools.cache
def _pickled_tensor(d: int) -> PickledTensor:
    """How torch pickles a bfloat16 tensor `[d]`."""
    rebuild, arguments = torch.zeros(d, dtype=torch.bfloat16).__reduce_ex__(4)
    load_memory, (header_and_bytes,) = arguments[0].__reduce__()
    return PickledTensor(rebuild, load_memory, header_and_bytes[: -2 * d])


def read_embeddings(folder: Path | str) -> tuple[ByWorker, ByWorker, dict[int, str]]:
    """Read both files of `prepare.py` (or of the released script): train, val, widths.

    widths: d -> a place with embeddings of that width.
    Raises InputError that names file and worker: a file is missing or damaged; embeddings are
    missing, not finite, or of different widths within a worker.
    """
    folder = Path(folder)
    train, train_widths = _read_pickle(folder / FILES[0])
    validation, validation_widths = _read_pickle(folder / FILES[1])
    return train, validation, {**validation_widths, **train_widths}


def _read_pickle(path: Path) -> tuple[ByWorker, dict[int, str]]:
    """The comparisons in a file, and of each width of its embeddings a place."""
    by_worker = load_pickle(path)
    if not isinstance(by_worker, dict) or not by_worker:
        raise InputError(
            f"{path}: not a dict of workers; write it again with prepare.py --overwrite"
        )
    widths = {}
    for worker, comparisons in by_worker.items():
        try:
            vectors = torch.stack(
                [comparison["embeddings"][side][0] for comparison in comparisons for side in SIDES]
            )
            is_table = vectors.ndim == 2 and vectors.is_floating_point()
            is_usable = is_table and is_finite(vectors)
        except (KeyError, IndexError, TypeError, RuntimeError):
            is_usable = False
        if not is_usable:
            raise InputError(
                f"{path}, worker {worker}: a pair without embeddings, or with NaN, infinite or "
                "unequally long ones; run prepare.py --overwrite"
            )
        widths.setdefault(vectors.shape[1], f"{path}, worker {worker}")
    return by_worker, widths


# ---- The study


@dataclass(kw_only=True)
class WorkerStudy(Study):
    """A study of the workers in the files."""

    left_out: int  # how many are in no part of it: those in one file only, or with the fewest pairs


def load_embeddings(
    folder: Path | str, model_name: str, train_pairs: int, unseen_pairs: int, split_seed: int = 0
) -> WorkerStudy:
    """Read the embeddings of `prepare.py` (or of the released script), and split the workers.

    model_name: the checkpoint whose reward head is read if there is none beside the embeddings.
    train_pairs, unseen_pairs, split_seed: of `draw_comparisons`.
    `prompts` and `texts` are left out if the files do not hold the texts.
    Raises InputError that names file and worker: what `read_embeddings` and `draw_comparisons`
    refuse; a reward head of another width.
    """
    check_whole("train_pairs", train_pairs, 1)
    check_whole("unseen_pairs", unseen_pairs, 1)
    check_whole("split_seed", split_seed)
    train, validation, widths = read_embeddings(folder)
    head, provenance = find_reward_head(folder, model_name, "Reddit TL;DR", widths, FILES)
    title = provenance.pop("title")
    seen, unseen, drawn = draw_comparisons(train, validation, train_pairs, unseen_pairs, split_seed)
    prompts = {}
    texts = {}
    if _have_texts(drawn):
        prompts = {part: _prompts_of(users) for part, users in drawn.items()}
        texts = {part: _texts_of(users) for part, users in drawn.items()}
    return WorkerStudy(
        title=title,
        seen=seen,
        unseen=unseen,
        **{part: features_of(users) for part, users in drawn.items()},
        reward_head=head,
        prompts=prompts,
        texts=texts,
        provenance=provenance,
        left_out=len(train.keys() | validation.keys()) - len(seen) - len(unseen),
    )


def split_workers(
    train: ByWorker, validation: ByWorker, seed: int = 0
) -> tuple[list[str], list[str], random.Random]:
    """The workers of both files, halved into seen and unseen, and the generator that split them.

    The LEAVE_OUT workers with the fewest pairs of each file are left out. The others are sorted,
    so that nothing depends on Python's hash seed, and shuffled by `seed`. The generator goes on to
    draw their pairs.
    Raises InputError: fewer than two workers are in both files.
    """

    def kept(by_worker: ByWorker) -> set[str]:
        by_size = sorted(by_worker, key=lambda worker: (len(by_worker[worker]), str(worker)))
        return set(by_size[LEAVE_OUT:])

    workers = sorted(kept(train) & kept(validation), key=str)
    if len(workers) < 2:
        raise InputError(
            f"workers in both the train and the val part: {len(workers)}, and at least 2 are "
            f"needed (the {LEAVE_OUT} smallest of each are left out); give more rows of the same "
            "people"
        )
    generator = random.Random(seed)
    generator.shuffle(workers)
    half = len(workers) // 2
    return workers[:half], workers[half:], generator


def draw_comparisons(
    train: ByWorker,
    validation: ByWorker,
    train_pairs: int,
    unseen_pairs: int,
    seed: int = 0,
) -> tuple[list[str], list[str], dict[str, list[list[dict]]]]:
    """Split the workers, and draw the comparisons that each part of a study holds.

    train_pairs, unseen_pairs: how many training pairs a seen and an unseen worker keep at most.
    Returns the seen workers, the unseen workers, and part -> the comparisons of each worker.
    """
    seen, unseen, generator = split_workers(train, validation, seed)

    def drawn(workers: list[str], pairs: int) -> list[list[dict]]:
        return [generator.sample(train[w], min(pairs, len(train[w]))) for w in workers]

    # One generator for both: the published split draws for the seen workers first.
    train_seen = drawn(seen, train_pairs)
    train_unseen = drawn(unseen, unseen_pairs)
    return (
        seen,
        unseen,
        {
            "train": train_seen,
            "test": [validation[worker] for worker in seen],
            "train_unseen": train_unseen,
            "test_unseen": [validation[worker] for worker in unseen],
        },
    )


def features_of(users: list[list[dict]]) -> Features:
    """Each user's winning minus losing embeddings, float32 `[m_i, d]`."""
    comparisons = [comparison for user in users for comparison in user]
    winning, losing = (
        torch.stack([comparison["embeddings"][side][0] for comparison in comparisons]).float()
        for side in SIDES
    )  # (M, d)
    return list(winning.sub_(losing).split([len(user) for user in users]))


def _have_texts(drawn: dict[str, list[list[dict]]]) -> bool:
    """Whether all comparisons hold their texts; embeddings of other people may come without."""
    return all(
        isinstance(comparison.get(field), str) or are_messages(comparison.get(field))
        for users in drawn.values()
        for user in users
        for comparison in user
        for field in TEXT_FIELDS
    )


def _prompts_of(users: list[list[dict]]) -> list[list[str]]:
    """What tells the prompts of each user's comparisons apart."""
    return [[prompt_key(comparison["text"]) for comparison in user] for user in users]


def _texts_of(users: list[list[dict]]) -> list[list[tuple[str, str]]]:
    """The chosen and the rejected text of each user's comparisons."""
    return [
        [(comparison["winning_summary"], comparison["losing_summary"]) for comparison in user]
        for user in users
    ]
