"""The data files in a folder: which of them are read, and of which split each is."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from utils import InputError

DATA_FILE = re.compile(r"^[^.].*\.(parquet|jsonl|csv|jsonl\.gz|csv\.gz)$", re.IGNORECASE)
CSV = ("csv", "csv.gz")  # endings, see `ending_of`
SPLIT_WORDS = {  # split -> its names, in rows and in the names of files
    "train": ["train"],
    "validation": ["validation", "valid", "val", "dev"],
    "test": ["test"],
}
SHARD = re.compile(r"(\d+)-of-(\d+)")  # train-00000-of-00002.parquet
ALL_SHARDS = "all its shards, called NAME-00000-of-00002, NAME-00001-of-00002 and so on"


def ending_of(path: Path) -> str:
    """The ending of a data file in lower case, such as "csv.gz" of "Train.CSV.gz".

    Raises InputError: the file has another ending.
    """
    match = DATA_FILE.search(path.name)
    if not match:
        raise InputError(
            f"{path}: not a .parquet, .jsonl or .csv file, the last two also .gz; write it as one "
            "of these, such as .jsonl, which has one JSON object a line"
        )
    return match[1].lower()


def data_files(folder: Path) -> list[Path]:
    """The parquet, JSON lines and CSV files in a folder, in order.

    Raises InputError: no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder or file; give the one that holds the data")
    return sorted(path for path in folder.glob("*") if DATA_FILE.search(path.name))


def split_files(folder: Path | str, **words: list[str]) -> dict[str, list[Path]]:
    """The files of each split in a folder: split -> one file, or all shards of one, in order.

    A file is .parquet, .jsonl, .csv, .jsonl.gz or .csv.gz, in any case. The shards of a file are
    numbered from 0-of-n to (n - 1)-of-n.
    words: for each split, words that tell its files; a file's name must hold one as a whole word.
    Raises InputError: the folder is missing; a split has no file, several files or not all shards;
    a file belongs to two splits.
    """
    folder = Path(folder)
    paths = data_files(folder)

    files_of = {}
    for split, split_words in words.items():
        files = [path for path in paths if _words_in(path.name) & set(split_words)]
        if not _is_whole(files):
            raise InputError(
                f"{folder}: one file with {_either(split_words)} in its name is needed, or "
                f"{ALL_SHARDS}; {_content_of(folder)}"
            )
        files_of[split] = sorted(files, key=_shard_number)

    assigned = [path for files in files_of.values() for path in files]
    if len(set(assigned)) < len(assigned):
        raise InputError(
            f"{folder}: a file cannot be two of {', '.join(words)}; {_content_of(folder)}"
        )
    return files_of


def files_of_splits(folder: Path | str, **words: list[str]) -> dict[str | None, list[Path]]:
    """As `split_files`, but of the splits only those that have a file.

    If these are fewer than two, the folder is not split: it holds one file, or all shards of one,
    which are given under None. Else data files that are of no split are named in a line.
    """
    folder = Path(folder)
    paths = data_files(folder)
    words_of_paths = set().union(*(_words_in(path.name) for path in paths))
    present = {split: names for split, names in words.items() if words_of_paths & set(names)}
    if len(present) > 1:
        files_of = split_files(folder, **present)
        print_unread(folder, itertools.chain(*files_of.values()))
        return files_of
    if not _is_whole(paths):
        splits = "; ".join(map(_either, words.values()))
        raise InputError(
            f"{folder}: one file is needed, or {ALL_SHARDS}, or a file for each split, with a word "
            f"for it in its name ({splits}); {_content_of(folder)}"
        )
    return {None: sorted(paths, key=_shard_number)}


def print_unread(folder: Path | str, read: Iterable[Path]) -> None:
    """Print which data files in a folder are not among those that are read; nothing if all are."""
    read = set(read)
    unread = [path for path in data_files(Path(folder)) if path not in read]
    if unread:
        print(f"{folder}: not read: {_names_in(unread)}")


def _either(words: list[str]) -> str:
    """One of these words, for messages: "validation, val or dev"."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _content_of(folder: Path) -> str:
    """The data files in a folder, and its subfolders with data files, for messages."""
    content = f"it holds {_names_in(data_files(folder)) or 'no parquet, jsonl or csv file'}"
    subfolders = [str(path) for path in sorted(folder.glob("[!.]*/")) if data_files(path)]
    if subfolders:
        content += (
            f"; subfolders are not read ({', '.join(subfolders)}): give one with --data, or move "
            "its files"
        )
    return content


def _names_in(paths: list[Path]) -> str:
    """The names of files, for messages."""
    return ", ".join(path.name for path in paths)


def _words_in(name: str) -> set[str]:
    """The words in a file's name: "My-Train_00000.csv" -> {"my", "train", "csv"}."""
    return set(re.split(r"[\W\d_]+", name.lower()))


def _shard_number(path: Path) -> int:
    """The number of a shard, by its name; 0 for a file that is none."""
    shard = SHARD.search(path.name)
    return int(shard[1]) if shard else 0


def _is_whole(files: list[Path]) -> bool:
    """Whether these are a single file that is no shard, or all the shards of one."""
    shards = [SHARD.search(path.name) for path in files]
    if len(files) == 1 and shards[0] is None:
        return True
    if not files or None in shards:
        return False
    names = {re.sub(r"\d+-of", "", path.name) for path in files}
    count = int(shards[0][2])
    return len(names) == 1 and sorted(map(_shard_number, files)) == list(range(count))
