"""Files, or a data set of the hub, as a list of comparisons.

Here a file finds its kind of row, and what cannot be used is left out and counted.
"""

import difflib
import functools
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
from pydantic import Field

from lore.data_files import files_of_splits
from lore.data_notes import notes_on_conversations
from lore.normal_forms import Asked, Turns, without_repeated_prompts
from lore.rows import (
    LocatedRow,
    as_messages,
    column_names,
    columns_of,
    hub_rows,
    parse_rows,
    read_rows,
)
from lore.words import count_of
from own_rows import (
    KINDS,
    PUBLIC,
    SPLIT_WORDS,
    Comparison,
    LeftOut,
    OwnRow,
    Row,
    none_if_blank,
    split_called,
)
from utils import InputError

# Why a comparison is left out, as `prepare.py` counts it
NO_TEXT = "pairs without a prompt or an answer, or with an empty message"
OTHER_LANGUAGE = "pairs in the language {!r}"
NO_LANGUAGE = "pairs whose language is not given"


@dataclass
class Reading:
    """What was read."""

    kind: type[Row]
    comparisons: list[Comparison]
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> how many
    repeats: int = 0  # comparisons whose answers repeated the text of the prompt, now without it
    about_users: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Source(NamedTuple):
    """Rows that are not parsed yet."""

    kind: type[Row]
    rows: dict[str | None, Iterable[LocatedRow]]  # split -> its rows; None: not split
    notes: list[str]


def read_comparisons(
    data: Path,
    *,
    languages: list[str] | None = None,
    about_users: list[str] | None = None,
    hub_split: str = "train",
    limit: int | None = None,
) -> Reading:
    """Read all comparisons of a file, a folder, or a data set of PUBLIC.

    languages: keep only comparisons in these, as the rows write them; None: all. about_users: the
    columns that say who a user is, as patterns such as "annotator_*". hub_split: the one to read of
    a data set of the hub that is not split into train and test. limit: only the first rows of each
    split.
    Raises InputError that names file, row and field, or a setting that is no list of texts.
    """
    for name, setting in (("languages", languages), ("about_users", about_users)):
        if setting is not None and not is_list_of_texts(setting):
            raise InputError(f"{name}: {setting!r}; give None, or a list of texts")
    source = open_source(data, about_users or [], hub_split)
    reading = Reading(source.kind, [], notes=source.notes)
    without_split = None  # the place of the first row without a split
    contradictions: Counter[tuple[str, str]] = Counter()  # of the file's split and the row's own
    for split, rows in source.rows.items():
        located = parse_rows(itertools.islice(rows, limit), source.kind, source.kind.dataset)
        for place, row in located:
            comparisons, left_out = comparisons_in(row, split, languages)
            reading.rows += 1
            reading.comparisons += comparisons
            reading.left_out.update(left_out)
            split_of_row = getattr(row, "split", None)
            if split and split_of_row and split_of_row != split:
                contradictions[split, split_of_row] += 1
            if comparisons and comparisons[0].split is None:
                without_split = without_split or place
            users = {comparison.user for comparison in comparisons}
            if len(users) == 1:  # else its columns are about nobody in particular
                note_user(reading.about_users, users.pop(), row, tuple(about_users or ()))

    if without_split and any(comparison.split for comparison in reading.comparisons):
        raise InputError(
            f"{without_split}: no split, and other rows have one; give each row train, validation "
            "or test"
        )
    keep_usable(reading)
    if not reading.comparisons:
        raise InputError(
            f"{data}: no comparison in {count_of(reading.rows, 'row')} ({counted(reading)}); give "
            "rows with a prompt and two answers, in one of the languages"
        )
    reading.notes += [
        f"{count_of(count, 'row says', 'rows say')} {split_of_row!r} in a file of {split}, whose "
        "name counts"
        for (split, split_of_row), count in contradictions.items()
    ]
    reading.notes += notes_on_conversations(c.conversation for c in reading.comparisons)
    return reading


def is_list_of_texts(value: Any) -> bool:
    """Whether this is a list; a text is none, though Python takes it for a list of letters."""
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def comparisons_in(
    row: Row, split: str | None, languages: list[str] | None
) -> tuple[list[Comparison], Counter[str]]:
    """The comparisons of a row in these languages, and how many of its parts are left out, and why.

    split: that of the file, which goes before the row's own; None: the file has none.
    """
    comparisons = []
    left_out: Counter[str] = Counter()
    for part in row.comparisons():
        if isinstance(part, LeftOut):
            left_out[part.reason] += 1
        elif languages is not None and part.language not in languages:
            language = part.language
            left_out[OTHER_LANGUAGE.format(language) if language else NO_LANGUAGE] += 1
        else:
            comparisons.append(part._replace(split=split or part.split))
    return comparisons, left_out


def open_source(data: Path, about_users: list[str], hub_split: str) -> Source:
    """The rows of a file, a folder, or a data set of PUBLIC. The arguments: `read_comparisons`."""
    if str(data) in PUBLIC and not data.exists():
        kind = PUBLIC[str(data)]
        splits = {split_called(name): rows for name, rows in hub_rows(str(data)).items()}
        if set(splits) <= set(SPLIT_WORDS) and len(splits) > 1:
            return Source(kind, splits, [])
        if hub_split not in splits:
            raise InputError(f"{data}: no split {hub_split!r}; it has {', '.join(splits)}")
        return Source(kind, {None: splits[hub_split]}, [])

    files_of = {None: [data]} if data.is_file() else files_of_splits(data, **SPLIT_WORDS)
    first = next(iter(files_of.values()))[0]
    names = column_names(first)
    kind = kind_of(data, names)
    about = [name for name in names if is_about_user(name, kind, tuple(about_users))]
    notes = check_own_columns(names - set(about), first) if kind is OwnRow and names else []
    read_columns = with_columns(kind, about)
    rows = {
        split: itertools.chain.from_iterable(read_rows(path, read_columns) for path in files)
        for split, files in files_of.items()
    }
    return Source(kind, rows, notes)


def kind_of(data: Path, columns: set[str]) -> type[Row]:
    """The kind of rows that files with these columns have.

    PersonalRewardBench has the columns of own data, so a copy is known by the name of a folder that
    it is in. The name may be a part of that folder's, as in the hub's cache.
    """
    folders = [part.casefold() for part in data.resolve().parts]
    named = [
        kind
        for name, kind in PUBLIC.items()
        if any(Path(name).name.casefold() in folder for folder in folders)
    ]
    return next(kind for kind in (*named, *KINDS) if kind.telltale <= columns)


def with_columns(kind: type[Row], columns: list[str]) -> type[Row]:
    """The kind of row with further columns, so that these are read, too."""
    fields = {
        f"about_{number}": (Any, Field(None, validation_alias=column))
        for number, column in enumerate(columns)
    }
    return pydantic.create_model(kind.__name__, __base__=kind, **fields)


def check_own_columns(names: set[str], path: Path) -> list[str]:
    """A note on the columns that are not read, each with the known one that it may be meant for.

    Raises InputError: a column is missing, or there under two of its names.
    """
    known = columns_of(OwnRow).keys()

    def in_words(name: str) -> str:
        nearest = difflib.get_close_matches(name, known, 1)
        return f"{name!r} (is it {nearest[0]!r}?)" if nearest else repr(name)

    unread = ", ".join(in_words(name) for name in sorted(names - known))
    for column, info in OwnRow.model_fields.items():
        choices = getattr(info.validation_alias, "choices", [column])
        present = [choice for choice in choices if choice in names]
        if len(present) > 1:  # only the first would be read, such as a prompt without its context
            raise InputError(
                f"{path}, row 1: {column}: {' and '.join(map(repr, present))} are names of the "
                "same column; leave out or rename all but one"
            )
        if info.is_required() and not present:
            raise InputError(
                f"{path}, row 1: {column}: no such column, and these are not known: "
                f"{unread or 'none'}; expected is the schema of {OwnRow.dataset}"
            )
    return [f"columns that are not read: {unread}"] if unread else []


@functools.cache  # as it is asked for each row
def is_about_user(column: str, kind: type[Row], patterns: tuple[str, ...]) -> bool:
    """Whether a column says who the user is: a pattern fits, and no field of the row names it."""
    is_field = column in columns_of(kind)
    return not is_field and any(fnmatch(column, pattern) for pattern in patterns)


def note_user(
    about_users: dict[str, dict[str, Any]], user: str, row: Row, patterns: tuple[str, ...]
) -> None:
    """Add to `about_users` what a row says of its user; what was said first stays."""
    for column, value in (row.model_extra or {}).items():
        if none_if_blank(value) is None or not is_about_user(column, type(row), patterns):
            continue
        if not isinstance(value, str | int | float):
            value = str(value)
        about_users.setdefault(user, {}).setdefault(column, value)


def keep_usable(reading: Reading) -> None:
    """Leave out comparisons without a text; take prompts that answers repeat out of these."""
    with_text = [
        comparison
        for comparison in reading.comparisons
        if all(map(has_text, (comparison.prompt, comparison.chosen, comparison.rejected)))
    ]
    asked, reading.repeats = without_repeated_prompts(
        [Asked(c.prompt, c.chosen, c.rejected) for c in with_text]
    )
    usable = [
        comparison._replace(chosen=turns.chosen, rejected=turns.rejected)
        for comparison, turns in zip(with_text, asked)
        if has_text(turns.chosen) and has_text(turns.rejected)  # one may have been its prompt
    ]
    without_text = len(reading.comparisons) - len(usable)
    if without_text:
        reading.left_out[NO_TEXT] += without_text
    reading.comparisons = usable


def has_text(turns: Turns) -> bool:
    """Whether there is a message, and each has text."""
    if not turns:
        return False
    return all(message["content"].strip() for message in as_messages("user", turns))


def counted(reading: Reading) -> str:
    """What was left out, in words."""
    counts = [f"{reason} ({count:,})" for reason, count in sorted(reading.left_out.items())]
    return f"left out: {'; '.join(counts) or 'nothing'}"
