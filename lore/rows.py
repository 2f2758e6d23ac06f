"""Rows of other people's files, and the messages in them."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from utils import InputError

DATA_FILE = re.compile(r"^[^.].*\.(parquet|jsonl|csv|jsonl\.gz|csv\.gz)$")
SHARD = re.compile(r"(\d+)-of-(\d+)")  # train-00000-of-00002.parquet

# A row with the place that error messages name: "train.jsonl, row 3".
LocatedRow = tuple[str, Any]
Schema = TypeVar("Schema", bound=pydantic.BaseModel)


# ---- Files


def is_csv(path: Path) -> bool:
    """Whether a file is CSV, packed or not, by its name."""
    return path.name.endswith((".csv", ".csv.gz"))


def data_files(folder: Path) -> list[Path]:
    """The parquet, JSON lines and CSV files in a folder, in order."""
    return sorted(path for path in folder.glob("*") if DATA_FILE.search(path.name))


def split_files(folder: Path | str, **words: list[str]) -> dict[str, list[Path]]:
    """The files of each split in a folder: split -> one file, or all shards of one, in order.

    A file is .parquet, .jsonl, .csv, .jsonl.gz or .csv.gz.
    words: for each split, words that tell its files; a file's name must hold one as a whole word.
    Raises InputError: the folder is missing; a split has no file, several files or not all shards;
    a file belongs to two splits.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder or file; give the one that holds the data")
    paths = data_files(folder)
    names = ", ".join(path.name for path in paths) or "no parquet, jsonl or csv file"

    files_of = {}
    for split, split_words in words.items():
        files = [path for path in paths if _words_in(path.name) & set(split_words)]
        if not _is_whole(files):
            raise InputError(
                f"{folder}: one file with {' or '.join(split_words)} in its name is needed, or all "
                f"its shards; it holds {names}"
            )
        files_of[split] = files

    assigned = [path for files in files_of.values() for path in files]
    if len(set(assigned)) < len(assigned):
        raise InputError(f"{folder}: a file cannot be two of {', '.join(words)}; it holds {names}")
    return files_of


def _words_in(name: str) -> set[str]:
    """The words in a file's name: "My-Train_00000.csv" -> {"my", "train", "csv"}."""
    return set(re.split(r"[\W\d_]+", name.lower()))


def _is_whole(files: list[Path]) -> bool:
    """Whether these are a single file that is no shard, or all the shards of one."""
    shards = [SHARD.search(path.name) for path in files]
    if len(files) == 1 and shards[0] is None:
        return True
    if not files or None in shards:
        return False
    names = {re.sub(r"\d+-of", "", path.name) for path in files}
    return len(names) == 1 and len(files) == int(shards[0][2])


# ---- Rows


def read_rows(path: Path | str) -> Iterator[LocatedRow]:
    """The rows of a parquet, JSON lines or CSV file with their places, a few in memory at a time.

    Raises InputError that names file and row: the file is missing, of another format, damaged or
    without a row; a line is no JSON.
    """
    path = Path(path)
    if not DATA_FILE.search(path.name):
        raise InputError(
            f"{path}: not a .parquet, .jsonl or .csv file, the last two also .gz; write it as one "
            "of these"
        )
    count = 0
    try:
        for row in _rows_in(path):
            count += 1
            yield f"{path}, row {count}", row
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; give the folder that holds it with --data"
        ) from None
    # pyarrow's errors are ValueErrors.
    except (ValueError, OSError, EOFError, RecursionError, zlib.error, csv.Error) as error:
        raise InputError(
            f"{path}, row {count + 1}: cannot be read ({error}): the file is cut short, of another "
            "format or encoding, an error page, or closed to you; download or write it again"
        ) from None
    if count == 0:
        raise InputError(f"{path}: no row in it; download or write it again")


def _rows_in(path: Path) -> Iterator[Any]:
    """The rows of a file. Raises the errors of whatever library reads it."""
    if path.suffix == ".parquet":
        import pyarrow.parquet  # it loads slowly, and few files need it

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
        return

    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rt", encoding="utf-8-sig", newline="") as file:
        if is_csv(path):
            yield from _csv_rows(file)
        else:
            for line in file:
                if line.strip():
                    yield json.loads(line)


def _csv_rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of an open CSV file.

    Raises ValueError: its header names a field twice; a row has more fields than the header.
    """
    csv.field_size_limit(2**31 - 1)  # a text may be long
    table = csv.DictReader(lines, strict=True)
    header = table.fieldnames or []
    if len(set(header)) < len(header):
        raise ValueError(f"its header names a field twice: {header}")
    for row in table:
        if None in row:  # where DictReader puts the fields that have no name
            raise ValueError(f"{len(row[None])} more fields than its header names")
        yield row


def hub_rows(dataset: str, **options: Any) -> dict[str, Iterator[LocatedRow]]:
    """The splits of a data set of the hub: split -> its rows with their places.

    options: those of `datasets.load_dataset`. Raises InputError: the hub did not serve it.
    """
    from datasets import load_dataset  # it loads slowly, and local data do not need it

    try:
        splits = load_dataset(dataset, **options)
    except Exception as error:  # no network, revision or access: each has a class of its own
        raise InputError(
            f"data set {dataset}: the hub did not serve it ({type(error).__name__}: {error}); "
            "check the network, or give a downloaded copy with --data"
        ) from None
    return {split: _located(f"{dataset}, {split}", rows) for split, rows in splits.items()}


def _located(source: str, rows: Iterable[Any]) -> Iterator[LocatedRow]:
    """Rows with their places in a source, counted from 1."""
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


def parse_rows(
    rows: Iterable[LocatedRow], schema: type[Schema], dataset: str
) -> Iterator[tuple[str, Schema]]:
    """Rows as objects of a pydantic schema, with their places, one at a time.

    dataset: what has this schema, for the error. Raises InputError that names row and field.
    """
    for place, row in rows:
        try:
            parsed = schema.model_validate(row)
        except pydantic.ValidationError as error:
            # Of a union, the alternative that came furthest says best what is wrong.
            problem = max(error.errors(), key=lambda problem: len(problem["loc"]))
            field = ".".join(map(str, problem["loc"])) or "the row"
            value = repr(problem["input"])[:40]
            raise InputError(
                f"{place}: {field}: {problem['msg']}, and it is {value}; expected is the schema of "
                f"{dataset}, repair the row or leave it out"
            ) from None
        yield place, parsed


# ---- What is odd in texts


def warn_of_equal_sides(label: str, equal: int, pairs: int) -> None:
    """Print how many of these pairs have two equal texts; nothing if none has.

    Their margin is 0, so they count as wrong under every reward, as in the released scripts.
    """
    if not equal:
        return
    message = (
        f"{label}: {equal:,} of {pairs:,} pairs have two equal texts and count as wrong under "
        "every reward"
    )
    if equal > 0.01 * pairs:
        message += f"; warning: that is {equal / pairs:.1%}, leave them out"
    print(message)


def warn_of_blank_texts(label: str, texts: Iterable[str]) -> None:
    """Print how many texts are blank; they are embedded as they are. Prints nothing if none is."""
    blank = sum(not text.strip() for text in texts)
    if blank:
        print(f"warning: {blank:,} {label} are blank, and stay as they are")


# ---- Messages


def as_messages(role: str, content: str | list[dict] | tuple[dict, ...]) -> list[dict]:
    """A text as one message of this role; a list of messages as it is.

    Raises InputError: the content is neither.
    """
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if isinstance(content, (list, tuple)):
        return list(content)
    raise InputError(f"{content!r:.60}: neither a text nor a list of messages; give one of these")
