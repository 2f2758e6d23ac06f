"""Properties of the reader of rows: what a writer wrote comes back the same, or is refused."""

import csv
import gzip
import io
import json
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
from hypothesis import given, settings
from hypothesis import strategies as st

import lore.normal_forms
import lore.rows
import own_rows
from utils import InputError

# The same examples in each run, so that a failure is one of the code. They take some seconds.
repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=100)

# Ordinary letters, everything that a writer or a reader has to escape, and all else.
awkward = st.sampled_from(
    ["'", '"', "\\", "\n", "\r", "\r\n", "\t", ",", "{", "}", "} {", "[", "]", "'role': ", '"""']
    + ["\\n", "\\'", "\x00", "\x1a", "\x85", "\u2028", "\ufeff", "é", "e\u0301", "😀", "None", " "]
)
letters = st.characters(codec="utf-8")  # all but halves of surrogate pairs
texts = st.lists(st.one_of(awkward, letters, st.just("word ")), max_size=12).map("".join)
roles = st.sampled_from(["system", "user", "assistant"])
message = st.fixed_dictionaries({"role": roles, "content": texts})
# The keys may come in another order, and a program may add some.
other_message = st.fixed_dictionaries({"turn": st.integers(), "content": texts, "role": roles})
messages = st.lists(st.one_of(message, other_message), min_size=1, max_size=6)

Cell = pydantic.StrictStr | list[own_rows.Message] | None


class Row(pydantic.BaseModel):
    """A row with a text, messages, and a last column that is never empty."""

    user: lore.normal_forms.Id
    prompt: Cell
    chosen: Cell


def content_of(cell: Any) -> Any:
    """A text as it is; of messages the role and the content."""
    if isinstance(cell, str):
        return cell
    return [{key: message[key] for key in ("role", "content")} for message in cell]


def read(path: Path) -> list[tuple] | str:
    """The rows of a file, or the error in one line."""
    try:
        rows = lore.rows.parse_rows(lore.rows.read_rows(path, Row), Row, "these tests")
        return [(row.user, row.prompt, row.chosen) for _, row in rows]
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return str(error)


def read_bytes(content: bytes, name: str) -> list[tuple] | str:
    """The rows of a file with this content and name."""
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        return read(path)


# ---- Messages in a CSV file

CELLS = {
    "json": json.dumps,
    "json with letters as they are": lambda value: json.dumps(value, ensure_ascii=False),
    "json over lines": lambda value: json.dumps(value, indent=1),
    "repr": repr,
    "repr of a tuple": lambda value: repr(tuple(value)),
    "numpy": lambda value: str(as_array(value)),
    "numpy's repr": lambda value: repr(as_array(value)),
}


def as_array(values: list[dict]) -> np.ndarray:
    """A one-dimensional array of objects, as pandas has them from parquet."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def by_csv_module(cells: list[Any], printed: Any) -> bytes:
    """A row as the csv module writes it."""
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerow(["user", "prompt", "chosen"])
    table.writerow(["a", printed(cells[0]), printed(cells[1])])
    return file.getvalue().encode()


@repeatable
@given(st.tuples(messages, messages), st.sampled_from(sorted(CELLS)))
def test_messages_come_back_the_same_however_they_are_printed(cells, printed):
    found = read_bytes(by_csv_module(cells, CELLS[printed]), "a.csv")
    assert found == [("a", *map(content_of, cells))]


@repeatable
@given(st.tuples(messages, messages), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_messages_come_back_the_same_from_pandas(cells, are_arrays, end):
    cells = [as_array(cell) if are_arrays else cell for cell in cells]
    frame = pd.DataFrame({"user": ["a"], "prompt": [cells[0]], "chosen": [cells[1]]})
    content = frame.to_csv(index=False, lineterminator=end).encode()
    assert read_bytes(content, "a.csv") == [("a", *map(content_of, cells))]


class Listed(pydantic.BaseModel):
    prompt: list[pydantic.StrictStr]
    chosen: list[own_rows.Message]


@repeatable
@given(st.lists(texts, min_size=1, max_size=6), messages, st.sampled_from(sorted(CELLS)))
def test_lists_come_back_the_same_if_the_schema_has_no_texts_there(words, chat, printed):
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        path.write_bytes(by_csv_module([words, chat], CELLS[printed]))
        ((_, row),) = lore.rows.parse_rows(lore.rows.read_rows(path, Listed), Listed, "tests")
    assert (row.prompt, row.chosen) == (words, content_of(chat))


@repeatable
@given(st.tuples(messages, messages), st.sampled_from(sorted(CELLS)), st.data())
def test_a_printed_list_that_was_cut_is_refused_and_never_a_text(cells, printed, data):
    text = CELLS[printed](cells[0])
    first_key = lore.rows.PRINTED_KEY.search(text).end()  # from here on it begins like messages
    cut = text[: data.draw(st.integers(first_key, len(text) - 1))]
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["user", "prompt", "chosen"], ["a", cut, "b"]])
    found = read_bytes(file.getvalue().encode(), "a.csv")
    assert isinstance(found, str) and "row 1: prompt: " in found


# ---- Texts

plain_texts = texts.filter(lambda text: text.lstrip()[:1] not in tuple("[{(al"))  # no messages


def same_or_refused(found: list[tuple] | str, *expected: str) -> None:
    if not isinstance(found, str):
        assert found == [("a", *expected)]


@repeatable
@given(plain_texts, plain_texts)
def test_texts_come_back_the_same_in_every_format(prompt, chosen):
    row = {"user": "a", "prompt": prompt, "chosen": chosen}
    frame = pd.DataFrame([row])
    packed = io.BytesIO()
    frame.to_parquet(packed)
    assert read_bytes(packed.getvalue(), "a.parquet") == [tuple(row.values())]
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    assert read_bytes(line, "a.jsonl") == [tuple(row.values())]
    quoted = io.StringIO(newline="")
    csv.writer(quoted, quoting=csv.QUOTE_ALL).writerows([row, row.values()])
    content = quoted.getvalue().encode()
    assert read_bytes(content, "a.csv") == [tuple(row.values())]
    assert read_bytes(gzip.compress(content), "a.csv.gz") == [tuple(row.values())]


@repeatable
@given(plain_texts, plain_texts)
def test_a_carriage_return_that_a_writer_leaves_unquoted_is_no_end_of_a_text(prompt, chosen):
    """pandas and the csv module quote it only if it ends their lines; then the row is refused."""
    frame = pd.DataFrame([{"user": "a", "prompt": prompt, "chosen": chosen + "."}])
    found = read_bytes(frame.to_csv(index=False).encode(), "a.csv")
    same_or_refused(found, prompt, chosen + ".")
    assert "\r" in prompt + chosen or not isinstance(found, str)


# ---- Files that were cut

ROWS = [(f"u{i}", f'é "{i}"\n, and', f'chosen {i} "') for i in (12, 7, 1, 300)]


def files_of(rows: list[tuple]) -> dict[str, bytes]:
    """The rows as files of each format."""
    frame = pd.DataFrame(rows, columns=["user", "prompt", "chosen"])
    packed = io.BytesIO()
    frame.to_parquet(packed, row_group_size=2)
    as_csv = frame.to_csv(index=False).encode()
    chats = frame.assign(prompt=[[{"role": "user", "content": text}] for text in frame.prompt])
    lines = frame.to_json(orient="records", lines=True, force_ascii=False).encode()
    return {
        "a.csv": as_csv,
        "of pandas in Windows.csv": frame.to_csv(index=False, lineterminator="\r\n").encode(),
        "of chats.csv": chats.to_csv(index=False).encode(),
        "a.jsonl": lines,
        "without an end.jsonl": lines.rstrip(),
        "a.jsonl.gz": gzip.compress(lines),
        "a.csv.gz": gzip.compress(as_csv),
        "a.parquet": packed.getvalue(),
    }


def test_a_file_that_was_cut_anywhere_gives_whole_rows_or_an_error():
    """At every byte, and of packed ones, which say at their end whether they are whole, at some."""
    with TemporaryDirectory() as folder:
        for name, content in files_of(ROWS).items():
            path = Path(folder, name)
            path.write_bytes(content)
            whole = read(path)
            assert [row[0] for row in whole] == [row[0] for row in ROWS]
            step = 7 if name.endswith(("gz", "parquet")) else 1
            prefixes = 0
            for length in range(0, len(content), step):
                path.write_bytes(content[:length])
                found = read(path)
                if not isinstance(found, str):
                    assert found == whole[: len(found)], (name, length)
                    prefixes += 1
            assert step > 1 or prefixes >= len(ROWS) - 1


# ---- Ids

numbers = st.integers(-(2**70), 2**70)
names = st.one_of(
    texts, numbers.map(str), st.from_regex(r"-?[0-9]{1,4}(\.[0-9]{1,3})?", fullmatch=True)
)


def id_of(value: Any) -> str | None:
    """The id that a schema reads; None if it refuses the value."""
    try:
        return Row(user=value, prompt=None, chosen=None).user
    except pydantic.ValidationError:
        return None


@repeatable
@given(names)
def test_an_id_is_its_own_id_and_that_of_what_looks_the_same(name):
    found = id_of(name)
    if found is not None:
        assert id_of(found) == found
        for other in (f" {name}\n", f"\ufeff{name}", name.replace(" ", "\u00a0")):
            assert id_of(other) == found


@repeatable
@given(st.lists(numbers, min_size=2, max_size=4, unique=True))
def test_numbers_are_one_person_each_in_every_type_or_refused(people):
    for number in people:
        assert {id_of(number), id_of(str(number)), id_of(Decimal(number))} == {str(number)}
        for lossy in (float(number), f"{float(number)!r}", f"{float(number):.1f}"):
            assert id_of(lossy) == (str(number) if abs(number) < 2**53 else None)
    assert len({id_of(number) for number in people}) == len(people)


@repeatable
@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=5), st.booleans())
def test_ids_are_the_same_in_every_format_and_column_type(people, are_floats):
    column = pa.array([float(p) for p in people] if are_floats else people)
    table = pa.table({"user": column, "prompt": ["?"] * len(people), "chosen": ["."] * len(people)})
    frame = table.to_pandas()
    packed = io.BytesIO()
    pq.write_table(table, packed)
    rows = frame.to_dict("records")
    files = {
        "a.parquet": packed.getvalue(),
        "a.csv": frame.to_csv(index=False).encode(),
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
    }
    found = {}
    for name, content in files.items():
        rows = read_bytes(content, name)
        found[name] = "refused" if isinstance(rows, str) else [user for user, _, _ in rows]
    is_exact = not are_floats or all(abs(person) < 2**53 for person in people)
    expected = [str(person) for person in people] if is_exact else "refused"
    assert found == dict.fromkeys(files, expected)


# ---- Texts as a reader sees them


@repeatable
@given(texts)
def test_what_a_reader_sees_is_seen_once_and_for_all(text):
    seen = lore.normal_forms.as_read(text)
    assert lore.normal_forms.as_read(seen) == seen == lore.normal_forms.as_read(f"\n{text} ")
    key = lore.normal_forms.prompt_key
    assert (key(text) == key(seen)) and (key(text) != key(text + "x"))


# ---- Answers that begin with their prompt


@repeatable
@given(texts, texts, texts)
def test_a_repeated_prompt_goes_and_what_was_answered_stays(prompt, chosen, rejected):
    asked = f"Human: {prompt}?\n\nAssistant:"
    answers = [f" {text.strip()}." for text in (chosen, rejected)]
    row = lore.normal_forms.Asked(asked, *(asked + answer for answer in answers))
    ((_, *found),), count = lore.normal_forms.without_repeated_prompts([row])
    assert (found, count) == ([answer.lstrip() for answer in answers], 1)
    unrepeated = lore.normal_forms.Asked(asked, *answers)
    assert lore.normal_forms.without_repeated_prompts([unrepeated]) == ([unrepeated], 0)
