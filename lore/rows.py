"""Rows of other people's files, and the messages in them."""

import ast
import csv
import gzip
import io
import itertools
import json
import re
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pydantic
import typing_extensions

from lore.data_files import CSV, ending_of
from utils import InputError

BATCH = 1024  # rows of a parquet file or of the hub, in memory at a time
SHORT_FLOAT = re.compile(r"\b(halffloat|float)\b")  # of 16 and 32 bits, as pyarrow calls them

DAMAGED_FILE = (
    "the file is cut short, of another format, in another encoding than UTF-8, an error page, or "
    "closed to you; download it again, or save it again, as UTF-8"
)

# A quote that a backslash escapes: in a CSV file that writes quotes twice, a backslash and a single
# quote can only be the end of a field.
ESCAPED_QUOTE = re.compile(r'\\"[^",\r\n]')

# UTF-16 writes an emoji as two halves, which JSON can hold apart; UTF-8 has none.
HALF_CHARACTER = re.compile("[\ud800-\udfff]")

# What some programs write between fields in place of commas.
OTHER_SEPARATOR = re.compile(r"[;\t|]")

# How a CSV cell begins that holds messages as Python, JSON or numpy print them, and a key of one.
PRINTED_OBJECTS = re.compile(r"""(\s|\[|\(|array|list)*\{\s*['"]""")
PRINTED_KEY = re.compile(r"""['"](role|content)['"]\s*:""")
# A string or the end of an object in Python's notation, and the space before another one, between
# which numpy prints no comma. A brace within a string ends no object.
STRING_OR_END_OF_OBJECT = re.compile(
    r"""('(?:[^'\\]++|\\.)*+'|"(?:[^"\\]++|\\.)*+"|\})(\s+(?=['"{]))?""", re.DOTALL
)
PRINTED_ARRAY = re.compile(r"array\((.*),\s*dtype=object\)", re.DOTALL)

# A row with the place that error messages name: "train.jsonl, row 3".
LocatedRow = tuple[str, Any]
Schema = TypeVar("Schema", bound=pydantic.BaseModel)
# The columns that a schema names. A column of objects has the fields that are named in it; a column
# without any is read as it is.
Columns = dict[str, "Columns"]


# ---- Columns


def columns_of(schema: type[pydantic.BaseModel]) -> Columns:
    """The columns that a schema names, under their aliases, too."""
    columns = {}
    for name, field in schema.model_fields.items():
        for alias in _names_of(name, field.validation_alias):
            columns[alias] = _fields_in(field.annotation)
    return columns


def _names_of(
    name: str, alias: str | pydantic.AliasPath | pydantic.AliasChoices | None
) -> list[str]:
    """The names that a field of a schema may have in a row."""
    choices = alias.choices if isinstance(alias, pydantic.AliasChoices) else [alias]
    names = [name]
    for choice in choices:
        if isinstance(choice, pydantic.AliasPath):
            choice = choice.path[0]
        if choice is not None:
            names.append(choice)
    return names


def _fields_in(annotation: Any) -> Columns:
    """The fields of all models and typed dicts in an annotation, such as `list[Message] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return columns_of(annotation)
    if typing_extensions.is_typeddict(annotation):
        hints = typing_extensions.get_type_hints(annotation)
        return {name: _fields_in(hint) for name, hint in hints.items()}
    fields = {}
    for argument in typing.get_args(annotation):
        fields |= _fields_in(argument)
    return fields


class ObjectColumn(NamedTuple):
    """A column that holds objects or lists and nothing else."""

    outline: str  # how a value looks in JSON, such as '[{"text": ..}]'
    is_required: bool


def _object_columns(schema: type[pydantic.BaseModel]) -> dict[str, ObjectColumn]:
    """The columns of a schema that hold objects or lists and nothing else."""
    columns = {}
    for name, field in schema.model_fields.items():
        outline = _outline(field.annotation)
        if outline:
            columns[name] = ObjectColumn(outline, field.is_required())
    return columns


def _outline(annotation: Any) -> str | None:
    """How an object or a list of this type looks in JSON; None if it may be a text or a number."""
    kind = typing.get_origin(annotation) or annotation
    arguments = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    if kind in (typing.Union, types.UnionType):
        outlines = [_outline(alternative) for alternative in arguments]
        return outlines[0] if all(outlines) else None
    if kind is typing.Annotated:
        return _outline(arguments[0])
    if not isinstance(kind, type):  # such as Any
        return None
    if issubclass(kind, list):
        element = _outline(arguments[0]) if arguments else None
        return f"[{element or '..'}]"
    if issubclass(kind, dict | pydantic.BaseModel):  # typed dicts are dicts
        fields = [f'"{name}": ..' for name in _fields_in(annotation)]
        return f"{{{', '.join(fields) or '..'}}}"
    return None


def column_names(path: Path | str) -> set[str]:
    """The columns of a file: those of its header or, of JSON lines, those of its first row.

    Raises InputError: the file cannot be read.
    """
    path = Path(path)
    ending = ending_of(path)
    try:
        if ending == "parquet":
            import pyarrow.parquet  # it loads slowly, and few files need it

            return set(pyarrow.parquet.read_schema(path).names)
        return set(next(_rows_in(path, None), ()))
    except Exception as error:  # each library has its own for what is damaged
        raise _damage(f"{path}, row 1", error, DAMAGED_FILE) from None


def _check_named_once(names: list[str]) -> None:
    """Raise InputError if two columns, or two fields of an object, have one name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"it names {', '.join(map(repr, twice))} twice; rename or remove one")


# ---- Rows


def read_rows(
    path: Path | str, schema: type[pydantic.BaseModel] | None = None
) -> Iterator[LocatedRow]:
    """The rows of a parquet, JSON lines or CSV file with their places, a few in memory at a time.

    A cell of a CSV file that holds an object, a list or messages, which are text there, is given
    as these.
    schema: of the rows; columns that it does not name are not read. None: all are.
    Raises InputError that names file and row: the file is missing, of another format, damaged or
    without a row; a line is no JSON; two columns have one name; the object, the list or the
    messages in a cell of a CSV file cannot be read; a CSV file lacks a column of objects or lists;
    a text holds half of a character.
    """
    path = Path(path)
    ending = ending_of(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; give the folder that holds it with --data")
    columns = None if schema is None else columns_of(schema)
    object_columns = {} if schema is None else _object_columns(schema)
    is_empty = True
    for place, row in _located(str(path), _rows_in(path, columns), DAMAGED_FILE):
        is_empty = False
        if ending in CSV:
            row = _with_objects(row, object_columns, place)
        for name, value in row.items():
            if columns is None or name in columns:
                _check_characters(value, f"{place}: {name}")
        yield place, row
    if is_empty:
        raise InputError(f"{path}: no row in it; download or write it again")


def _check_characters(value: Any, place: str) -> None:
    """Raise InputError that names the place if a text holds half of a character.

    JSON can hold such a text, but no tokenizer reads it.
    """
    if isinstance(value, str):
        half = None if value.isascii() else HALF_CHARACTER.search(value)
        if half:
            raise InputError(
                f"{place}: holds half of a character, {half[0]!r}, as a text does that was cut "
                "within an emoji; remove it, or leave the row out"
            )
    elif isinstance(value, dict):
        for part in value.values():
            _check_characters(part, place)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_characters(part, place)


def hub_rows(
    dataset: str, schema: type[pydantic.BaseModel] | None = None, **options: Any
) -> dict[str, Iterator[LocatedRow]]:
    """The splits of a data set of the hub: split -> its rows with their places.

    schema: as in `read_rows`. options: those of `datasets.load_dataset`.
    Raises InputError: the hub did not serve it; a row cannot be read.
    """
    from datasets import load_dataset  # it loads slowly, and local data do not need it

    try:
        splits = load_dataset(dataset, **options)
    except Exception as error:  # no network, revision or access: each has a class of its own
        raise InputError(
            f"data set {dataset}: the hub did not serve it ({type(error).__name__}: {error}); "
            "check the network, or give a downloaded copy with --data"
        ) from None
    located = {}
    for split, rows in splits.items():
        if hasattr(rows, "with_format"):
            rows = _dataset_rows(rows, None if schema is None else columns_of(schema))
        located[split] = _located(
            f"{dataset}, {split}", rows, "download the data set again, or give a copy with --data"
        )
    return located


def _dataset_rows(dataset: Any, columns: Columns | None) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset`, of which only some columns are read (None: all)."""
    if columns is not None:
        names = [name for name in dataset.column_names if name in columns]
        dataset = dataset.select_columns(names)
    # As tables of pyarrow, which know how many bits a float had.
    for table in dataset.with_format("arrow").iter(BATCH):
        yield from _python_rows(table)


def _located(source: str, rows: Iterable[Any], remedy: str) -> Iterator[LocatedRow]:
    """Rows with their places in a source, counted from 1.

    Raises InputError that names the place and this remedy: a row cannot be read.
    """
    count = 0
    try:
        for row in rows:
            count += 1
            yield f"{source}, row {count}", row
    except Exception as error:  # each library has its own for what is damaged
        raise _damage(f"{source}, row {count + 1}", error, remedy) from None


def _damage(place: str, error: Exception, remedy: str) -> InputError:
    """The error for a row that cannot be read; an `InputError` has its own remedy."""
    if isinstance(error, InputError):
        return InputError(f"{place}: cannot be read: {error}")
    return InputError(f"{place}: cannot be read ({str(error) or type(error).__name__}): {remedy}")


def _rows_in(path: Path, columns: Columns | None) -> Iterator[Any]:
    """The rows of a file, of which only some columns are read (None: all).

    Raises the errors of whatever library reads it.
    """
    ending = ending_of(path)
    if ending == "parquet":
        yield from _parquet_rows(path, columns)
        return
    open_file = gzip.open if ending.endswith(".gz") else open
    with open_file(path, "rb") as file:
        lines = _text_lines(file)
        if ending in CSV:
            yield from _csv_rows(lines, columns)
        else:
            for line in lines:
                if line.strip():
                    yield _json_row(line)


def _text_lines(file: Iterable[bytes]) -> Iterator[str]:
    """The lines of a file in UTF-8, which end as they do there: in "\\n", "\\r" or "\\r\\n".

    Each is decoded by itself, so that an error is that of its row.
    Raises ValueError: the bytes are not in UTF-8. In the first line, zeros say so.
    """
    for number, line in enumerate(file):
        text = line.decode("utf-8-sig" if number == 0 else "utf-8")
        if number == 0 and "\0" in text:
            raise ValueError("it begins with zero bytes between letters, as UTF-16 does")
        yield from io.StringIO(text, newline="")


def _json_row(line: str) -> dict[str, Any]:
    """The row on a line of JSON lines. Raises ValueError: it is no JSON object."""
    try:
        row = _from_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error}; each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise InputError(
            f"the line is no JSON object, and it is {line[:40]!r}; write one object a line, not a "
            "list of them"
        )
    return row


def _from_json(text: str) -> Any:
    """What a JSON text says. Raises ValueError: it is none, or an object names a field twice."""
    return json.loads(text, object_pairs_hook=_json_object)


def _json_object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a JSON object. Raises ValueError: a name is there twice."""
    content = dict(fields)
    if len(content) < len(fields):
        _check_named_once([name for name, _ in fields])
    return content


def _csv_rows(lines: Iterable[str], columns: Columns | None) -> Iterator[dict[str, str]]:
    """The rows of an open CSV file, of which only some columns are read (None: all).

    Raises ValueError: the header names a column twice, or is there once more, as in files that were
    joined; a row has not as many fields as the header; fields are separated by something else than
    commas; and what `_whole_lines` raises.
    """
    csv.field_size_limit(2**31 - 1)  # a text may be long
    lines = _whole_lines(lines)
    first_line = next(lines, "")
    _check_separator(first_line)
    lines = itertools.chain([first_line], lines)
    table = (fields for fields in csv.reader(lines, strict=True) if fields)
    header = [name.strip() for name in next(table, [])]
    place_of = {
        name: place for place, name in enumerate(header) if columns is None or name in columns
    }
    _check_named_once([name for name in header if name in place_of])
    for fields in table:
        if len(fields) != len(header):
            raise ValueError(f"its header names {len(header)} fields, and it has {len(fields)}")
        if [name.strip("\ufeff \t") for name in fields] == header:
            raise InputError("it is the header once more, of a file that was added; remove it")
        yield {name: fields[place] for name, place in place_of.items()}


def _check_separator(header: str) -> None:
    """Raise InputError if the first line of a CSV file has no comma and another separator."""
    separator = OTHER_SEPARATOR.search(header)
    if separator and "," not in header:
        raise InputError(
            f"its fields are separated by {separator[0]!r}; separate them by commas, or write JSON "
            "lines"
        )


def _whole_lines(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a CSV file. Raises InputError: the last one has no end; quotes are escaped.

    Without its end the last field may have been cut short, which nothing else in the file would
    show. If a quote is escaped, all backslashes are, which would be read as they are.
    """
    for line in lines:
        if '\\"' in line and ESCAPED_QUOTE.search(line):  # the first is quicker, and mostly enough
            raise InputError(
                'it escapes quotes with backslashes, \\"; write them twice, "", as pandas and most '
                "programs do by themselves, or write JSON lines"
            )
        if not line.endswith(("\n", "\r")):
            raise InputError(
                "no line break at the end of the file, which may be cut short; write it again or, "
                "if nothing is missing, add a line break there"
            )
        yield line


def _parquet_rows(path: Path, columns: Columns | None) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, of which only some columns are read (None: all).

    Raises ValueError: two columns have one name; and the errors of pyarrow.
    """
    import pyarrow
    import pyarrow.parquet  # it loads slowly, and few files need it

    file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if columns is not None:
        names = [name for name in names if name in columns]
    _check_named_once(names)
    for batch in file.iter_batches(BATCH, columns=names):
        if columns is not None and names:
            batch = batch.select(names)  # "a" has selected a column "a.b", too
            fields = [
                pyarrow.field(field.name, _narrowed(field.type, columns[field.name]))
                for field in batch.schema
            ]
            batch = batch.cast(pyarrow.schema(fields))
        yield from _python_rows(batch)


def _narrowed(kind: Any, fields: Columns) -> Any:
    """A type of pyarrow with only these fields in its objects; as it is if there are none."""
    import pyarrow

    if not fields:
        return kind
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct(
            [
                pyarrow.field(field.name, _narrowed(field.type, fields[field.name]))
                for field in kind
                if field.name in fields
            ]
        )
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(_narrowed(kind.value_type, fields))
    if pyarrow.types.is_large_list(kind):
        return pyarrow.large_list(_narrowed(kind.value_type, fields))
    return kind


def _python_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch or a table of pyarrow as Python has them.

    A float of less than 64 bits is numpy's, so that it tells how exact an id in it can be.
    """
    try:
        rows = batch.to_pylist()
    except Exception:  # such as a date that Python has not: one by one, to tell which row has it
        rows = (batch.slice(i, 1).to_pylist()[0] for i in range(len(batch)))
    short_floats = {
        field.name: field.type for field in batch.schema if SHORT_FLOAT.search(str(field.type))
    }
    for row in rows:
        for name, kind in short_floats.items():
            row[name] = _with_short_floats(row[name], kind)
        yield row


def _with_short_floats(value: Any, kind: Any) -> Any:
    """A value of this type of pyarrow, in which each float of less than 64 bits is numpy's."""
    import pyarrow

    if value is None:
        return None
    if kind in (pyarrow.float16(), pyarrow.float32()):
        return kind.to_pandas_dtype()(value)
    if pyarrow.types.is_struct(kind):
        return {field.name: _with_short_floats(value[field.name], field.type) for field in kind}
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return [_with_short_floats(element, kind.value_type) for element in value]
    return value


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
            reason = problem["msg"].removeprefix("Value error, ")
            value = reprlib.repr(problem["input"])
            raise InputError(
                f"{place}: {field}: {reason}, and it is {value}; expected is the schema of "
                f"{dataset}, repair the row or leave it out"
            ) from None
        yield place, parsed


# ---- Objects, lists and messages in a CSV file


def _with_objects(
    row: dict[str, str], object_columns: dict[str, ObjectColumn], place: str
) -> dict[str, Any]:
    """A row of a CSV file with the objects, lists and messages that its cells hold as text.

    Raises InputError that names the place: a cell cannot be read; a column is missing.
    """
    for name, column in object_columns.items():
        if column.is_required and name not in row:
            raise InputError(
                f"{place}: {name}: no such column; a CSV file must have it, with cells that look "
                f"like {column.outline}"
            )
    content: dict[str, Any] = {}
    for name, value in row.items():
        if name in object_columns:
            content[name] = _object_in(value, object_columns[name].outline, f"{place}: {name}")
        else:
            content[name] = _text_or_messages(value, f"{place}: {name}")
    return content


def _object_in(value: str, outline: str, place: str) -> Any:
    """The object or the list that a cell of a CSV file holds; None for an empty cell.

    Raises InputError that names the place and how the cell should look: it cannot be read.
    """
    if not value.strip():
        return None
    try:
        return _from_print(value)
    except ValueError:
        raise InputError(
            f"{place}: cannot be read as JSON nor as Python or numpy print it, and it is "
            f"{value[:40]!r}; a cell must look like {outline}; repair it, or write the rows as "
            "JSON lines"
        ) from None


def _text_or_messages(value: str, place: str) -> Any:
    """What a cell of a CSV file holds: a text, or messages, with or without a list around them.

    Raises InputError that names the place: it begins like messages, and cannot be read.
    """
    if value.strip() == "[]":
        return []
    if not PRINTED_OBJECTS.match(value) or not PRINTED_KEY.search(value):
        return value
    try:
        content = _from_print(value)
    except ValueError:
        raise InputError(
            f"{place}: begins like messages and cannot be read as JSON nor as a list that Python "
            f"or numpy printed, and it is {value[:40]!r}..; repair it, or write the rows as JSON "
            "lines"
        ) from None
    return content if _has_roles(content) else value


def _from_print(text: str) -> Any:
    """What a text says in JSON, or as Python or numpy print it. Raises ValueError: it is none."""
    # numpy's goes before Python's, which would take two texts of numpy, 'a' 'b', for one.
    for read in (_from_json, _from_numpy, ast.literal_eval):
        try:
            return read(text.strip())
        except InputError:  # JSON that names a field twice, of which Python would take the last
            raise
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    raise ValueError("neither JSON nor printed by Python or numpy")


def _from_numpy(text: str) -> Any:
    """The objects or texts that numpy printed: Python's notation without commas between two.

    Raises what `ast.literal_eval` raises: the text is something else, or numpy left elements out,
    as it does in arrays of more than 1,000.
    """
    array = PRINTED_ARRAY.fullmatch(text)
    if array:
        text = array[1]
    return ast.literal_eval(
        STRING_OR_END_OF_OBJECT.sub(
            lambda match: f"{match[1]},{match[2]}" if match[2] else match[1],
            text,
        )
    )


def _has_roles(content: Any) -> bool:
    """Whether this is a message, or a list of some, however nested."""
    if isinstance(content, dict):
        return "role" in content
    return isinstance(content, list | tuple) and any(map(_has_roles, content))


# ---- Messages


def are_messages(value: Any) -> bool:
    """Whether this is a list of messages, each with a role and a text."""
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    )


def as_messages(role: str, content: str | list[dict] | tuple[dict, ...]) -> list[dict]:
    """A text as one message of this role; a list of messages as it is.

    Raises InputError: the content is neither.
    """
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if isinstance(content, (list, tuple)):
        return list(content)
    raise InputError(f"{content!r:.60}: neither a text nor a list of messages; give one of these")


def as_conversation(
    prompt: str | list[dict] | tuple[dict, ...], answer: str | list[dict] | tuple[dict, ...]
) -> list[dict]:
    """What a reward model is shown: the prompt, then the answer.

    A text is the user's, or the assistant's, only message. Raises InputError: as `as_messages`.
    """
    return as_messages("user", prompt) + as_messages("assistant", answer)
