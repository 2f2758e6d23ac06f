"""Rows of other people's files, and the messages in them."""

import csv
import gzip
import itertools
import json
import re
import zlib
from pathlib import Path

import pydantic

from utils import InputError

DATA_FILE = re.compile(r"^[^.].*\.(parquet|jsonl|csv|jsonl\.gz|csv\.gz)$")


def split_files(folder, **words):
    """The files of each split in a folder, one .parquet, .jsonl(.gz), .csv(.gz) or its shards: split -> list of paths.
    words: for each split, the words of which its files' names hold one, whole (train-00000-of-00002.parquet).
    Raises InputError: no such folder, no file or several for a split, one for two."""
    folder, found = Path(folder), {}
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder or file; give the one that holds the data")
    paths = [path for path in sorted(folder.iterdir()) if DATA_FILE.search(path.name)]
    holds = f"it holds {', '.join(p.name for p in paths) or 'no parquet, jsonl or csv file'}"
    for split, names in words.items():
        found[split] = [p for p in paths if set(names) & set(re.split(r"[\W\d_]+", p.name.lower()))]
        shards = [re.search(r"(\d+)-of-(\d+)", p.name) for p in found[split]]
        if len(found[split]) != 1 or shards[0]:
            whole = all(shards) and len({re.sub(r"\d+-of", "", p.name) for p in found[split]}) == 1
            if not whole or len(shards) != int(shards[0][2]):
                raise InputError(
                    f"{folder}: one file with {' or '.join(names)} in its name is needed, or all its "
                    f"shards; {holds}"
                )
    if len(set(sum(found.values(), []))) < sum(map(len, found.values())):
        raise InputError(f"{folder}: a file cannot be two of {', '.join(words)}; {holds}")
    return found


def read_rows(path):
    """The rows of a parquet, JSON lines or CSV file, as (where, row) pairs, a few in memory at a time.
    Raises InputError that names file and row: no such file, of another format, damaged, a line that is no JSON."""
    path, i = Path(path), 0
    if not DATA_FILE.search(path.name):
        raise InputError(
            f"{path}: not a .parquet, .jsonl or .csv file, the last two also .gz; write it as one of these"
        )
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows = (
                row
                for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024)
                for row in batch.to_pylist()
            )
        else:
            file = (gzip.open if path.suffix == ".gz" else open)(
                path, "rt", encoding="utf-8-sig", newline=""
            )
            rows = (json.loads(line) for line in file if line.strip())
            if ".csv" in path.suffixes:
                rows = _csv_rows(file)
        for i, row in enumerate(rows, 1):
            yield f"{path}, row {i}", row
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; give the folder that holds it with --data"
        ) from None
    except (
        ValueError,
        OSError,
        EOFError,
        RecursionError,
        zlib.error,
        csv.Error,
    ) as error:  # pyarrow's are ValueErrors
        raise InputError(
            f"{path}, row {i + 1}: cannot be read ({error}): the file is cut short, of another format or "
            "encoding, an error page, or closed to you; download or write it again"
        ) from None
    if i == 0:
        raise InputError(f"{path}: no row in it; download or write it again")


def _csv_rows(file):
    """The rows of an open CSV file. Raises ValueError: a name twice in its header, fields without a name."""
    csv.field_size_limit(2**31 - 1)  # a text may be long
    table = csv.DictReader(file, strict=True)
    if len(set(table.fieldnames or ())) < len(table.fieldnames or ()):
        raise ValueError(f"its header names a field twice: {table.fieldnames}")
    for row in table:
        if None in row:
            raise ValueError(f"{len(row[None])} more fields than its header names")
        yield row


def hub_rows(dataset, **options):
    """A data set of the hub by `datasets.load_dataset`: split -> (where, row) pairs. Raises InputError: not served."""
    from datasets import load_dataset

    try:
        splits = load_dataset(dataset, **options)
    except (
        Exception
    ) as error:  # no network, no such revision, no access: a class of its own for each
        raise InputError(
            f"data set {dataset}: the hub did not serve it ({type(error).__name__}: {error}); check the "
            "network, or give a downloaded copy with --data"
        ) from None
    return {
        split: zip(map(f"{dataset}, {split}, row {{}}".format, itertools.count(1)), rows)
        for split, rows in splits.items()
    }


def parse_rows(rows, schema, dataset):
    """(where, row) pairs as (where, object of a pydantic schema) pairs. Raises InputError that names row and field."""
    for where, row in rows:
        try:
            yield where, schema.model_validate(row)
        except pydantic.ValidationError as error:
            first = max(
                error.errors(), key=lambda one: len(one["loc"])
            )  # of a union the part that came furthest
            field, value = ".".join(map(str, first["loc"])) or "the row", repr(first["input"])
            raise InputError(
                f"{where}: {field}: {first['msg']}, and it is {value[:40]}; expected is the schema of "
                f"{dataset}, repair the row or leave it out"
            ) from None


def warn_of_equal_sides(what, equal, pairs):
    """Say how many pairs have two equal texts: their margin is 0, so they count as wrong for ever, as released."""
    if equal:
        print(
            f"{what}: {equal:,} of {pairs:,} pairs have two equal texts and count as wrong under every reward"
            + (
                f"; warning: that is {equal / pairs:.1%}, leave them out"
                if equal > 0.01 * pairs
                else ""
            )
        )


def warn_of_blank_texts(what, texts):
    """Say how many texts are blank, which are embedded as they are."""
    if blank := sum(not text.strip() for text in texts):
        print(f"warning: {blank:,} {what} are blank, and stay as they are")


def as_messages(role, content):
    """A text as one message of this role; a list of messages as it is. Raises InputError: neither."""
    if not isinstance(content, (str, list, tuple)):
        raise InputError(
            f"{content!r:.60}: neither a text nor a list of messages; give one of these"
        )
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)
