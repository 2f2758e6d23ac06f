"""What of other people's files is read, what is refused, and what counts as one and the same."""

import csv
import datetime
import gzip
import json
import shutil
import sys
import types
from decimal import Decimal
from typing import Literal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest
import typing_extensions
from helpers import ROOT, input_error

import lore.data_files
import lore.data_notes
import lore.normal_forms
import lore.rows
import own_reading
import personalllm
import prism
import tldr
from lore.data_notes import Judged
from lore.normal_forms import Asked
from lore.words import count_of

TOO_LATE = 2**60  # microseconds: some 36,000 years after Python's last date


class Said(typing_extensions.TypedDict):
    role: Literal["user", "assistant"]
    content: pydantic.StrictStr


class Post(pydantic.BaseModel):
    text: pydantic.StrictStr


class Row(pydantic.BaseModel):
    """What these tests read; real schemas are like it."""

    user: lore.normal_forms.Id
    prompt: pydantic.StrictStr | list[Said] | None = None
    post: Post | None = None


def said(*texts):
    """Messages of the user and the assistant in turn."""
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


def read(path, schema=Row):
    """The rows of a file, as objects of the schema."""
    rows = lore.rows.parse_rows(lore.rows.read_rows(path, schema), schema, "these tests")
    return [row for _, row in rows]


def users_in(path):
    return [row.user for row in read(path)]


# ---- Columns


def table_with(**columns):
    """A parquet table of the users 0 to 2 with further columns of pyarrow."""
    return pa.table({"user": ["0", "1", "2"], **columns})


DATES = pa.array([0, 1, TOO_LATE], pa.timestamp("us"))
DURATIONS = pa.array([2**62] * 3, pa.duration("s"))
NO_UTF8 = pa.StringArray.from_buffers(
    3, pa.py_buffer(np.arange(4, dtype=np.int32).tobytes()), pa.py_buffer(b"\xff" * 3)
)
CLOCK = pa.array([0, 1, 2], pa.timestamp("us", tz="Nowhere/Atlantis"))


@pytest.mark.parametrize("column", [DATES, DURATIONS, NO_UTF8, CLOCK], ids=lambda a: str(a.type))
def test_a_column_that_no_schema_names_is_not_read(tmp_path, column):
    with pytest.raises((ValueError, ArithmeticError, LookupError)):
        table_with(other=column).to_pylist()
    pq.write_table(table_with(other=column), tmp_path / "a.parquet")
    assert users_in(tmp_path / "a.parquet") == ["0", "1", "2"]


def test_a_field_that_no_schema_names_is_not_read_within_a_column_that_it_names(tmp_path):
    message = pa.struct([("at", pa.timestamp("us")), ("content", "string"), ("role", "string")])
    messages = [[{"role": "user", "content": f"{i}?", "at": TOO_LATE}] for i in range(3)]
    posts = [{"written": TOO_LATE, "text": f"post {i}"} for i in range(2)] + [None]
    for kind in (pa.list_, pa.large_list):
        columns = {
            "prompt": pa.array(messages, kind(message)),
            "post": pa.array(
                posts, pa.struct([("written", pa.timestamp("us")), ("text", "string")])
            ),
        }
        pq.write_table(table_with(**columns), tmp_path / "a.parquet")
        rows = read(tmp_path / "a.parquet")
        assert [row.prompt for row in rows] == [said(f"{i}?") for i in range(3)]
        assert [row.post and row.post.text for row in rows] == ["post 0", "post 1", None]


def test_a_value_that_python_has_not_is_named_with_its_row_if_the_schema_needs_it(tmp_path):
    dates = pa.array([*range(1500), TOO_LATE, *range(500)], pa.timestamp("us"))
    pq.write_table(pa.table({"user": dates}), tmp_path / "a.parquet")
    with input_error(f"{tmp_path / 'a.parquet'}, row 1501: cannot be read", "out of range"):
        list(lore.rows.read_rows(tmp_path / "a.parquet", Row))
    with input_error("a.parquet, row 1501: cannot be read"):
        list(lore.rows.read_rows(tmp_path / "a.parquet"))


def test_a_file_without_any_column_of_the_schema_lacks_the_first_that_it_must_have(tmp_path):
    pd.DataFrame({"name": ["a"], "user.id": [1]}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"name": ["a"]}).to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.parquet", "a.csv"):
        with input_error(f"{name}, row 1: user: Field required"):
            read(tmp_path / name)


def test_a_long_value_that_is_refused_is_shown_with_one_ellipsis(tmp_path):
    path = tmp_path / "a.jsonl"
    for value in ("all the words of a long answer " * 9, ["word"] * 99, {"a": ["word " * 99]}):
        path.write_text(json.dumps({"user": [value]}))
        with input_error("a.jsonl, row 1: user: ", "...", "; expected is") as line:
            read(path)
        assert line().count("...") == 1
        assert len(line().split("and it is ")[1]) < 150


def test_a_column_whose_name_goes_on_behind_a_point_is_another_column(tmp_path):
    columns = {"user.id": [7, 8], "user": ["a", "b"], "post.text": ["c", "d"]}
    pd.DataFrame(columns).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [Row(user="a"), Row(user="b")]


def write_twice(folder, name):
    """A file of each format that names one column twice."""
    others = {"user": "a", "note": "n"}
    columns = [*others, name]
    values = [f"a {column}" for column in columns]
    table = pa.Table.from_arrays([pa.array([value]) for value in values], columns)
    pq.write_table(table, folder / "a.parquet")
    (folder / "a.csv").write_text(f"{','.join(columns)}\n{','.join(values)}\n")
    return [folder / "a.parquet", folder / "a.csv"]


def test_two_columns_of_one_name_are_refused_if_the_schema_names_it(tmp_path):
    for path in write_twice(tmp_path, "user"):
        with input_error(str(path), "'user' twice"):
            read(path)
    for path in write_twice(tmp_path, "note"):
        assert users_in(path) == ["a user"]
        with input_error(str(path), "'note' twice"):
            list(lore.rows.read_rows(path))


@pytest.mark.parametrize(
    "line",
    ['{"user": "a", "user": "b"}', '{"user": "a", "post": {"text": "", "id": 1, "text": "x"}}'],
)
def test_a_json_object_that_names_a_field_twice_is_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"user": "c"}\n' + line + "\n")
    with input_error("a.jsonl, row 2", "twice"):
        read(tmp_path / "a.jsonl")


def test_a_schema_names_its_fields_their_aliases_and_the_fields_in_them():
    class Aliased(pydantic.BaseModel):
        user: str = pydantic.Field(validation_alias=pydantic.AliasChoices("user_id", "worker"))
        kind: str = pydantic.Field(alias="sort")
        deep: str = pydantic.Field(validation_alias=pydantic.AliasPath("outer", "inner"))

    assert lore.rows.columns_of(Row) == {
        "user": {},
        "prompt": {"role": {}, "content": {}},
        "post": {"text": {}},
    }
    assert set(lore.rows.columns_of(Aliased)) == {
        *("user", "user_id", "worker"),
        *("kind", "sort"),
        *("deep", "outer"),
    }


def test_the_columns_of_a_file_are_known_without_its_values(tmp_path):
    pq.write_table(table_with(other=DATES), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("user,other\na,\"[{'role': \"\n")
    (tmp_path / "a.jsonl").write_text('{"user": 1, "other": 2}\n{"broken')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty.csv").write_text("")
    for name in ("a.parquet", "a.csv", "a.jsonl"):
        assert lore.rows.column_names(tmp_path / name) == {"user", "other"}
    assert lore.rows.column_names(tmp_path / "empty.csv") == set()
    (tmp_path / "b.jsonl").write_text("<html>")
    for name in ("b.jsonl", "list.jsonl", "nowhere.parquet", "b.tsv"):
        with input_error(name):
            lore.rows.column_names(tmp_path / name)


def served(monkeypatch, table):
    """The rows of a split of the hub that is this table of pyarrow."""
    splits = {"train": datasets.Dataset(table)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: splits)
    return lore.rows.hub_rows("some/dataset", Row)["train"]


def test_of_the_hubs_rows_only_the_named_columns_are_decoded(monkeypatch):
    rows = list(served(monkeypatch, table_with(other=DATES)))
    assert rows == [(f"some/dataset, train, row {i + 1}", {"user": str(i)}) for i in range(3)]


def test_a_row_of_the_hub_that_cannot_be_decoded_is_named(monkeypatch):
    def rows():
        yield {"user": "a"}
        raise OverflowError("date value out of range")

    hub = types.SimpleNamespace(load_dataset=lambda name, **options: {"train": rows()})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    found = lore.rows.hub_rows("some/dataset", Row)["train"]
    assert next(found)[1] == {"user": "a"}
    with input_error("some/dataset, train, row 2: cannot be read (date value out of range)"):
        next(found)


# ---- Damage


@pytest.mark.parametrize(
    "text, place",
    [
        ("user,prompt\na,b\nc\n", "row 2"),
        ("user,prompt\na\n", "row 1"),
        ("user,prompt\na,b\n  \n", "row 2"),
        ("user,prompt\na,b,c\n", "row 1"),
        ("user,prompt\na,b\nc,d", "row 2"),  # perhaps the beginning of "done"
        ('user,prompt\na,b\nc,"d ""e', "row 2"),
        ('user,prompt\na,b\nc,"d ""', "row 2"),
        ("user,pro", "row 1"),
        ("user,prompt\na,b\rc\nd,e\n", "row 2"),  # as pandas writes a text with a carriage return
        ('user,prompt\na,b"c"\nd,"e"f\n', "row 2"),
    ],
)
def test_a_csv_row_of_too_few_or_too_many_fields_or_without_an_end_is_damage(tmp_path, text, place):
    (tmp_path / "a.csv").write_bytes(text.encode())
    with input_error(f"a.csv, {place}: cannot be read"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_csv_file_may_end_its_lines_as_any_system_does_and_have_empty_ones(tmp_path, end):
    lines = ["\ufeffuser,prompt", "", "a,b", 'c,"d\ne"', "", ""]
    (tmp_path / "a.csv").write_bytes(end.join(lines).encode())
    assert read(tmp_path / "a.csv") == [Row(user="a", prompt="b"), Row(user="c", prompt="d\ne")]


QUOTES = ['He said "no" twice.', 'He said "no", twice.', 'a\\b "c"\n d', '{"a": "b\\"c"}']


@pytest.mark.parametrize("text", QUOTES)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_csv_file_that_escapes_quotes_with_backslashes_is_refused(tmp_path, text, quoting):
    frame = pd.DataFrame([{"user": "a", "prompt": "?"}, {"user": "b", "prompt": text}])
    options = dict(escapechar="\\", doublequote=False, quoting=quoting)
    frame.to_csv(tmp_path / "a.csv", index=False, **options)
    with input_error("a.csv, row 2: cannot be read", "escapes quotes with backslashes", "twice"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "text",
    [
        *QUOTES,
        json.dumps({"quote": 'He said "no"', "path": "C:\\"}),
        'print("\\"a\\", b") \\',
        '\\"',
        '\\"a\\"\n\\"\n\\',
        '\\"{o}sterreich, \\LaTeX',
        "C:\\folder\\",
    ],
)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_backslash_before_a_quote_is_text_if_the_file_writes_quotes_twice(
    tmp_path, text, quoting
):
    rows = [{"user": "a", "prompt": text}, {"prompt": text, "user": "a"}]
    for number, row in enumerate(rows):  # in the last column, and before another
        path = tmp_path / f"{number}.csv"
        pd.DataFrame([row, row]).to_csv(path, index=False, quoting=quoting)
        assert [row.prompt for row in read(path)] == [text, text]


def test_space_around_the_names_in_a_header_is_left_out(tmp_path):
    (tmp_path / "a.csv").write_text(" user ,prompt\t\n u , a b \n")
    assert lore.rows.column_names(tmp_path / "a.csv") == {"user", "prompt"}
    assert [dict(row) for _, row in lore.rows.read_rows(tmp_path / "a.csv")] == [
        {"user": " u ", "prompt": " a b "}
    ]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_header_of_a_file_that_was_added_is_no_row(tmp_path, mark):
    table = "user,prompt\na,user\n"
    (tmp_path / "a.csv").write_text(table + mark + table, encoding="utf-8")
    with input_error("a.csv, row 2", "the header once more"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_csv_file_with_other_separators_is_refused_with_the_right_one(
    tmp_path, separator, quoting
):
    frame = pd.DataFrame([{"user": "a", "prompt": "Why, and how?"}])
    frame.to_csv(tmp_path / "a.csv", index=False, sep=separator, quoting=quoting)
    named = f"a.csv, row 1: cannot be read: its fields are separated by {separator!r}; separate"
    with input_error(named, "by commas") as line:
        lore.rows.column_names(tmp_path / "a.csv")
    with input_error(line()):
        read(tmp_path / "a.csv")


def test_separators_of_others_are_text_in_a_header_with_commas(tmp_path):
    (tmp_path / "a.csv").write_text("user,prompt,a;b\na,b|c,d\te\n")
    assert read(tmp_path / "a.csv") == [Row(user="a", prompt="b|c")]
    assert lore.rows.column_names(tmp_path / "a.csv") == {"user", "prompt", "a;b"}


@pytest.mark.parametrize("indent, said", [(None, "not a list of them"), (2, "one JSON object")])
def test_a_json_array_is_refused_with_how_json_lines_look(tmp_path, indent, said):
    content = json.dumps([{"user": "a"}, {"user": "b"}], indent=indent)
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(content)
    with input_error("a.jsonl, row 1: cannot be read", said):
        read(tmp_path / "a.jsonl")
    for reader in (lore.rows.column_names, read):
        with input_error("a.json: not a .parquet, .jsonl or .csv file", "one JSON object a line"):
            reader(tmp_path / "a.json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_a_file_in_another_encoding_is_refused_with_the_one_to_write(tmp_path, encoding):
    row = {"user": "a", "prompt": "Café?"}
    contents = {
        "a.jsonl": json.dumps(row, ensure_ascii=False) + "\n",
        "a.csv": pd.DataFrame([row]).to_csv(index=False),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode(encoding))
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode(encoding)))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            with input_error(f"{path}, row 1: cannot be read", "UTF-8"):
                read(path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_file_of_plain_letters_in_another_encoding_is_told_by_its_zero_bytes(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes("user,prompt\na,b\n".encode(encoding))
    (tmp_path / "a.jsonl").write_bytes('{"user": "a"}\n'.encode(encoding))
    for name in ("a.csv", "a.jsonl"):
        with input_error(f"{name}, row 1: cannot be read (it begins with zero bytes", "as UTF-8"):
            lore.rows.column_names(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_bytes_that_are_no_text_are_named_with_their_own_row(tmp_path, name):
    rows = [{"user": f"u{i}", "prompt": "?"} for i in range(50)]
    if name == "a.csv":
        content = pd.DataFrame(rows).to_csv(index=False)
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_bytes(content.encode().replace(b"u30", b"u\xff0"))
    with input_error(f"{name}, row 31: cannot be read", "0xff"):
        read(tmp_path / name)


HALVES = [
    ("a.jsonl", {"user": "a", "prompt": "cut \ud83d"}, "prompt"),
    ("a.jsonl", {"user": "a", "prompt": [{"role": "user", "content": "\ude00 é"}]}, "prompt"),
    ("a.jsonl", {"user": "a", "post": {"text": "\ud83d"}}, "post"),
    ("a.csv", {"user": "a", "post": json.dumps({"text": "\ud83d"})}, "post"),
]


@pytest.mark.parametrize("name, row, field", HALVES)
def test_half_of_a_character_is_refused_with_its_row(tmp_path, name, row, field):
    whole = {"user": "b", "prompt": "\U0001f600", "log": "cut \ud83d"}  # nobody reads the log
    if name == "a.jsonl":
        lines = "".join(json.dumps(line) + "\n" for line in (whole, row))
    else:
        lines = pd.DataFrame([{"user": "b", "post": '{"text": ""}'}, row]).to_csv(index=False)
    (tmp_path / name).write_text(lines)
    with input_error(f"{name}, row 2: {field}: holds half of a character, '\\ud"):
        read(tmp_path / name)


def shards(*numbers, count=3, end=".csv"):
    return [f"train-{number:05}-of-{count:05}{end}" for number in numbers]


@pytest.mark.parametrize(
    "names",
    [
        shards(1, 2, 3),
        shards(0, 1, 3),
        shards(0, 2, 2) + ["train-1-of-00003.csv", "train-01-of-00003.csv"],
        shards(0, 1, 2, 3),
        shards(0, count=0),
        shards(1, count=1),
    ],
    ids=str,
)
def test_shards_that_are_not_numbered_from_0_to_the_last_one_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with input_error(str(tmp_path), "shards", names[0]):
        lore.data_files.split_files(tmp_path, train=["train"])


def test_shards_come_in_the_order_of_their_numbers_not_of_their_names(tmp_path):
    names = [f"train-{number}-of-12.csv" for number in range(12)]
    for name in names:
        (tmp_path / name).touch()
    found = lore.data_files.split_files(tmp_path, train=["train"])["train"]
    assert [path.name for path in found] == names


def test_parts_that_are_no_shards_are_refused_with_what_shards_are_called(tmp_path):
    for name in ("part-0.jsonl", "part-1.jsonl"):
        (tmp_path / name).touch()
    named = ["called NAME-00000-of-00002, NAME-00001-of-00002", "it holds part-0.jsonl, part-1.jso"]
    with input_error("one file is needed", "(train; validation, valid, val or dev; test)", *named):
        lore.data_files.files_of_splits(tmp_path, **lore.data_files.SPLIT_WORDS)
    for number in range(2):
        path = tmp_path / f"part-{number}.jsonl"
        path.rename(tmp_path / f"part-0000{number}-of-00002.jsonl")
    (files,) = lore.data_files.files_of_splits(tmp_path, **lore.data_files.SPLIT_WORDS).values()
    assert len(files) == 2


def test_subfolders_with_data_are_not_read_and_named(tmp_path):
    for name in ("train/a.jsonl", "test/a.csv.GZ", ".cache/a.csv", "images/a.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    named = [
        "it holds no parquet, jsonl or csv file",
        f"subfolders are not read ({tmp_path / 'test'}, {tmp_path / 'train'}): give one with --dat",
    ]
    with input_error(*named):
        lore.data_files.files_of_splits(tmp_path, **lore.data_files.SPLIT_WORDS)
    with input_error(*named):
        lore.data_files.split_files(tmp_path, train=["train"])


@pytest.mark.parametrize("name", ["valid", "val", "dev", "validation"])
def test_each_data_set_knows_the_same_words_for_a_split(tmp_path, name):
    for data_set, test in (("RedditTLDR", "validation"), ("PersonalLLM", "test")):
        demo = ROOT / data_set / "demo"
        folder = tmp_path / data_set
        folder.mkdir()
        shutil.copy(demo / "train.jsonl.gz", folder)
        shutil.copy(demo / f"{test}.jsonl.gz", folder / f"{name}.jsonl.gz")
        found, expected = (READERS[data_set](path) for path in (folder, demo))
        for split in expected:
            assert len(list(found[split])) == len(list(expected[split])) > 0
    shutil.copy(tmp_path / "PersonalLLM" / "train.jsonl.gz", tmp_path)
    shutil.copy(tmp_path / "PersonalLLM" / f"{name}.jsonl.gz", tmp_path)
    files_of = lore.data_files.files_of_splits(tmp_path, **lore.data_files.SPLIT_WORDS)
    assert files_of["validation"] == [tmp_path / f"{name}.jsonl.gz"]


def test_files_of_a_folder_that_are_not_read_are_named_in_one_line(tmp_path, capsys):
    read_ones = ["train.jsonl", "test.jsonl.gz"]
    no_data = ["README.md", "LICENSE", ".gitattributes", "._train.jsonl", "dataset_infos.json"]
    for name in [*read_ones, *no_data]:
        (tmp_path / name).touch()
    words = dict(train=["train"], test=["test"])
    lore.data_files.files_of_splits(tmp_path, **words)
    assert capsys.readouterr().out == ""
    for name in ("more.jsonl", "extra-00000-of-00001.parquet"):
        (tmp_path / name).touch()
    lore.data_files.files_of_splits(tmp_path, **words)
    expected = f"{tmp_path}: not read: extra-00000-of-00001.parquet, more.jsonl\n"
    assert capsys.readouterr().out == expected


READERS = {
    "OwnData": own_reading.read_comparisons,
    "RedditTLDR": tldr.read_comparisons,
    "PersonalLLM": personalllm.read_prompts,
    "PRISM": prism.read_conversations,
}


@pytest.mark.parametrize("data_set", READERS)
def test_each_data_set_names_the_files_that_it_does_not_read(tmp_path, capsys, data_set):
    for path in (ROOT / data_set / "demo").glob("*.gz"):
        shutil.copy(path, tmp_path)
    if data_set == "OwnData":  # its demo is one file, so a further one is refused
        rows = tmp_path / "comparisons.jsonl.gz"
        shutil.copy(rows, tmp_path / "train.jsonl.gz")
        rows.rename(tmp_path / "test.jsonl.gz")
    (tmp_path / "more.jsonl").touch()
    READERS[data_set](tmp_path)
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}: not read: more.jsonl"]


# ---- Objects and lists in a CSV file


class Thread(pydantic.BaseModel):
    """A row with an object, and lists of objects and of texts."""

    user: lore.normal_forms.Id
    post: Post
    replies: list[Post] | None = None
    words: typing_extensions.Annotated[list[pydantic.StrictStr], pydantic.Field(min_length=1)]


THREADS = [
    {
        "user": "a",
        "post": {"text": "It's {1}", "by": None, "is_new": True},
        "replies": [{"text": 'She said "[no]",\nand', "by": "b"}, {"text": "é", "by": None}],
        "words": ["x, y", "it's"],
    },
    {"user": "b", "post": {"text": "", "by": "c", "is_new": False}, "replies": None, "words": [""]},
]


def with_printed_objects(rows, writer):
    """A table in which objects and lists are what a writer prints."""
    return pd.DataFrame(
        {
            name: value if value is None or isinstance(value, str) else writer(value)
            for name, value in row.items()
        }
        for row in rows
    )


@pytest.mark.parametrize("writer", [json.dumps, repr, lambda value: value], ids=range(3))
def test_objects_and_lists_are_read_as_json_and_as_python_prints_them(tmp_path, writer):
    with_printed_objects(THREADS, writer).to_csv(tmp_path / "a.csv", index=False)
    assert read(tmp_path / "a.csv", Thread) == [Thread(**row) for row in THREADS]


def test_objects_and_lists_are_read_as_pandas_has_them_from_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist(THREADS), tmp_path / "a.parquet")
    pd.read_parquet(tmp_path / "a.parquet").to_csv(tmp_path / "a.csv", index=False)
    # Without commas, which Python would take for one text.
    assert '[\'x, y\' ""it\'s""]' in (tmp_path / "a.csv").read_text()
    rows = [Thread(**row) for row in THREADS]
    assert read(tmp_path / "a.parquet", Thread) == rows
    assert read(tmp_path / "a.csv", Thread) == rows


@pytest.mark.parametrize(
    "column, cell, outline",
    [
        ("post", "It's", '{"text": ..}'),
        ("post", '{"text": "a', '{"text": ..}'),
        ("replies", "[{'text': 'a'}, {", '[{"text": ..}]'),
        ("words", "a b", "[..]"),
        ("post", '{"text": "a", "text": "b"}', '{"text": ..}'),
    ],
)
def test_a_cell_that_holds_no_object_is_refused_with_its_row_and_how_it_should_look(
    tmp_path, column, cell, outline
):
    table = with_printed_objects(THREADS, json.dumps)
    table.loc[1, column] = cell
    table.to_csv(tmp_path / "a.csv", index=False)
    named = f"a cell must look like {outline};"
    with input_error(f"a.csv, row 2: {column}: cannot be read as JSON", cell[:8], named):
        read(tmp_path / "a.csv", Thread)


def test_what_a_schema_refuses_in_an_object_it_refuses_in_a_cell(tmp_path):
    for cell, field in (("5", "post:"), ('{"text": 5}', "post.text:"), ("", "post:")):
        table = with_printed_objects(THREADS, json.dumps)
        table.loc[1, "post"] = cell
        table.to_csv(tmp_path / "a.csv", index=False)
        with input_error(f"a.csv, row 2: {field} Input should be"):
            read(tmp_path / "a.csv", Thread)


def test_columns_with_parts_of_an_object_are_refused_with_how_its_cells_should_look(tmp_path):
    pd.json_normalize(THREADS).to_csv(tmp_path / "a.csv", index=False)
    assert "post.text" in lore.rows.column_names(tmp_path / "a.csv")
    with input_error("a.csv, row 1: post: no such column; ", 'cells that look like {"text": ..}'):
        read(tmp_path / "a.csv", Thread)


@pytest.mark.parametrize("writer", [json.dumps, lambda value: value], ids=["json", "python"])
@pytest.mark.parametrize("data_set", ["RedditTLDR", "PRISM"])
def test_public_data_are_the_same_from_csv(tmp_path, data_set, writer):
    demo = ROOT / data_set / "demo"
    for path in demo.glob("*.jsonl.gz"):
        rows = [row for _, row in lore.rows.read_rows(path)]
        name = path.name.replace("jsonl", "csv")
        with_printed_objects(rows, writer).to_csv(tmp_path / name, index=False)

    def content_of(folder):
        return {key: list(rows) for key, rows in READERS[data_set](folder).items()}

    assert content_of(tmp_path) == content_of(demo)


@pytest.mark.parametrize("writer", [json.dumps, lambda value: value], ids=["json", "python"])
def test_multipref_is_the_same_from_csv(tmp_path, writer):
    row = {
        "text": "question",
        "completion_a": "answer a",
        "completion_b": "answer b",
        "normal_worker_annotations": [
            {"evaluator": "n1", "overall_pref": "A-is-slightly-better", "time_spent": 80},
            {"evaluator": "n2", "overall_pref": "B-is-clearly-better", "time_spent": None},
        ],
        "expert_worker_annotations": [],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with_printed_objects([row], writer).to_csv(tmp_path / "a.csv", index=False)
    found = [READERS["OwnData"](tmp_path / name).comparisons for name in ("a.jsonl", "a.csv")]
    assert found[0] == found[1] and len(found[1]) == 2


# ---- Messages in a CSV file

CHAT = said("It's {'a': 1}\n {'b': 2} [{]", 'He said "no" } {', "\\n \\ ' \" é\u2028\r\n\t")


def cell_of(text):
    """What a cell with this text is read as, among others that are quoted as they must be."""
    return lore.rows._text_or_messages(text, "here")


WRITERS = {
    "json": json.dumps,
    "json with letters as they are": lambda messages: json.dumps(messages, ensure_ascii=False),
    "json over lines": lambda messages: json.dumps(messages, indent=2),
    "repr": repr,
    "repr of a tuple": lambda messages: repr(tuple(messages)),
    "numpy": lambda messages: str(np.array(messages, dtype=object)),
    "numpy's repr": lambda messages: repr(np.array(messages, dtype=object)),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("messages", [CHAT, CHAT[:1], said(*"ab" * 20)], ids=["chat", "one", "40"])
def test_messages_are_read_as_each_writer_prints_them(tmp_path, writer, messages):
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerows([["user", "prompt"], ["a", WRITERS[writer](messages)]])
    assert read(path) == [Row(user="a", prompt=messages)]


def test_messages_are_read_as_pandas_writes_them_from_lists_and_from_parquet(tmp_path):
    rows = [{"user": "a", "prompt": CHAT}, {"user": "b", "prompt": said("?")}]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame(rows).to_csv(tmp_path / "lists.csv", index=False)
    frame = pd.read_parquet(tmp_path / "a.parquet")
    assert isinstance(frame.prompt[0], np.ndarray)
    frame.to_csv(tmp_path / "arrays.csv", index=False)
    for name in ("lists.csv", "arrays.csv"):
        assert read(tmp_path / name) == [Row(**row) for row in rows]


def test_json_is_read_before_python():
    text = '[{"role": "user", "content": "a\\/b \\ud83d\\ude00"}]'
    assert cell_of(text) == said("a/b \U0001f600")


PRINTED_CHAT = str(np.array(CHAT, dtype=object))


@pytest.mark.parametrize(
    "text",
    [
        repr(CHAT)[:-1],
        json.dumps(CHAT)[:-20],
        PRINTED_CHAT[:-1],
        str(np.array(said(*"?" * 1500), dtype=object)),  # numpy leaves out those in the middle
        repr([np.array(CHAT, dtype=object)]),
        repr({"role": np.array(["user"], dtype=object), "content": np.array(["?"], dtype=object)}),
        "[{'role': 'user', 'content': nan}]",
        "[{'role': 'user', 'content': '?', 'at': datetime.datetime(2024, 1, 1, 0, 0)}]",
        "[{'role': np.str_('user'), 'content': np.str_('?')}]",
        "[{'at': Timestamp('2024-01-01'), 'role': 'user', 'content': '?'}]",
        "  [ { 'role': 'user', 'content': 'It's'}]",
        '[{"role": "user", "role": "assistant", "content": "?"',
        "{'role': 'user', 'content': '?'",
        "[{'content': 'a long text that a spreadsheet has cut",
        "[" * 3000 + "{'role': 1}",
    ],
    ids=lambda text: text[:30],
)
def test_a_cell_that_begins_like_messages_and_is_none_is_refused_with_row_and_field(tmp_path, text):
    rows = [{"user": "a", "prompt": "?"}, {"user": "b", "prompt": text}]
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    with input_error("a.csv, row 2: prompt: begins like messages", "JSON lines"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "content", [[], [said("?")], {"role": "user", "content": "?"}, [{"role": "tool"}]], ids=str
)
@pytest.mark.parametrize("writer", [repr, json.dumps])
def test_what_a_schema_refuses_in_json_lines_it_refuses_in_csv(tmp_path, writer, content):
    (tmp_path / "a.jsonl").write_text(json.dumps({"user": "a", "prompt": content}) + "\n")
    pd.DataFrame([{"user": "a", "prompt": writer(content)}]).to_csv(tmp_path / "a.csv", index=False)

    class Strict(Row):
        prompt: (
            pydantic.StrictStr
            | typing_extensions.Annotated[list[Said], pydantic.Field(min_length=1)]
        )

    for name in ("a.jsonl", "a.csv"):
        with input_error(f"{name}, row 1: prompt"):
            read(tmp_path / name, Strict)


@pytest.mark.parametrize(
    "text",
    [
        "[sic] no",
        "[{" + "-" * 200_000 + "1",
        '[{"name": "Ada"}]',
        '[{"content": "Ada"}]',
        '[{"name": "Ada"',
        '[{"name": "Ada", "job": "the \'role\': none"}]',
        "[{'a': 1}, 5]",
        "[{1}]",
        "{'a': 1",
        '{"answer": 42}',
        "['role': ",
        "the 'role': [{'",
    ],
    ids=lambda text: text[:30],
)
def test_other_texts_in_a_cell_are_texts(text):
    assert cell_of(text) == text


def test_a_cell_of_a_column_that_no_schema_names_is_not_read(tmp_path):
    pd.DataFrame([{"user": "a", "log": repr(CHAT)[:-1]}]).to_csv(tmp_path / "a.csv", index=False)
    assert users_in(tmp_path / "a.csv") == ["a"]


# ---- Ids


@pytest.mark.parametrize(
    "values, expected",
    [
        ([3, 3.0, "3", "3.0", " 3 ", "3.00", np.int64(3), np.float64(3), Decimal("3.0")], "3"),
        ([0, 0.0, -0.0, "0", "-0.0"], "0"),
        ([-7, -7.0, "-7.0"], "-7"),
        ([2**53 - 1, float(2**53 - 1), f"{2**53 - 1}.0"], str(2**53 - 1)),
        ([2**60 + 1, str(2**60 + 1), Decimal(2**60 + 1)], str(2**60 + 1)),
        (["Zoë", "Zoe\u0308", " Zoë\n", "\ufeffZoë\u200b", "Zo\u00ade\u0308"], "Zoë"),
        (["Ada Lovelace", "Ada\u00a0Lovelace", "Ada  Lovelace "], "Ada Lovelace"),
    ],
    ids=lambda values: str(values)[:20],
)
def test_an_id_has_one_text_whatever_its_type_and_writing(values, expected):
    assert [lore.normal_forms.canonical_id(value) for value in values] == [expected] * len(values)
    assert [Row(user=value).user for value in values] == [expected] * len(values)


def test_ids_that_differ_stay_different():
    names = [
        "3",
        "30",
        "3.1",
        "3.10",
        "03",
        "003.0",
        "a",
        "A",
        "ß",
        "ss",
        "①",
        "1e5",
        "5e10",
        "x.0",
    ]
    assert [lore.normal_forms.canonical_id(name) for name in names] == names


@pytest.mark.parametrize(
    "value",
    [2.0**53, -(2.0**53), 1e300, f"{2**53}.0", "1e+16", "1.23457E+11", "9.007199254740993e+18"],
)
def test_an_id_that_a_float_may_have_made_of_another_is_refused(value):
    with pytest.raises(pydantic.ValidationError, match="went through a float"):
        Row(user=value)


@pytest.mark.parametrize("bits, first_inexact", [(16, 2**11), (32, 2**24), (64, 2**53)])
def test_a_column_of_floats_has_ids_as_far_as_its_numbers_are_exact(tmp_path, bits, first_inexact):
    float_type = np.dtype(f"float{bits}").type
    path = tmp_path / "a.parquet"
    exact = [0, 7, 7, first_inexact - 1, -(first_inexact - 1)]
    pq.write_table(pa.table({"user": pa.array(list(map(float_type, exact)))}), path)
    assert users_in(path) == [str(number) for number in exact]
    for number in (first_inexact, -first_inexact, 2 * first_inexact):
        pq.write_table(pa.table({"user": pa.array([float_type(7), float_type(number)])}), path)
        with input_error("a.parquet, row 2: user", "went through a float"):
            users_in(path)


class ByPeople(pydantic.BaseModel):
    by: list[Row] | None


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
@pytest.mark.parametrize("bits, first_inexact", [(16, 2**11), (32, 2**24)])
def test_ids_in_objects_are_as_exact_as_their_floats(tmp_path, kind, bits, first_inexact):
    people = kind(pa.struct([("user", pa.from_numpy_dtype(f"float{bits}"))]))
    float_type = np.dtype(f"float{bits}").type
    path = tmp_path / "a.parquet"

    def write(*users):
        objects = [{"user": float_type(user)} for user in users]
        pq.write_table(pa.table({"by": pa.array([None, [], objects], people)}), path)

    write(7, first_inexact - 1)
    assert [row.by for row in read(path, ByPeople)][:2] == [None, []]
    assert [row.user for row in read(path, ByPeople)[2].by] == ["7", str(first_inexact - 1)]
    write(7, first_inexact)
    with input_error("a.parquet, row 3: by.1.user", "went through a float"):
        read(path, ByPeople)


@pytest.mark.parametrize("bits, first_inexact", [(16, 2**11), (32, 2**24), (64, 2**53)])
def test_ids_of_the_hub_are_as_exact_as_their_floats(monkeypatch, bits, first_inexact):
    def users_of(*users):
        column = pa.array(np.array(users, f"float{bits}"))
        rows = served(monkeypatch, pa.table({"user": column}))
        return [row.user for _, row in lore.rows.parse_rows(rows, Row, "these tests")]

    assert users_of(7, first_inexact - 1) == ["7", str(first_inexact - 1)]
    with input_error("some/dataset, train, row 2: user", "went through a float"):
        users_of(7, first_inexact)


def test_short_floats_are_numbers_where_no_ids_are_needed(tmp_path):
    class Scored(pydantic.BaseModel):
        score: float
        count: int
        share: float | None

    values = [1.5, 2.0**30, -3e38]
    table = {"score": values, "count": [1.0, 2.0, 2.0**25], "share": [None, 0.5, 1.0]}
    columns = {name: pa.array(column, pa.float32()) for name, column in table.items()}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = lore.rows.read_rows(tmp_path / "a.parquet", Scored)
    parsed = [row for _, row in lore.rows.parse_rows(rows, Scored, "scores")]
    assert [row.score for row in parsed] == [float(np.float32(value)) for value in values]
    assert [row.count for row in parsed] == [1, 2, 2**25]
    assert [row.share for row in parsed] == [None, 0.5, 1.0]
    assert all(type(row.score) is float for row in parsed)


@pytest.mark.parametrize(
    "value",
    [None, True, np.True_, 1.5, float("nan"), float("inf"), Decimal("1.5"), "", " ", "\u200b", [1]],
    ids=repr,
)
def test_what_is_no_id_is_refused(value):
    with pytest.raises(pydantic.ValidationError):
        Row(user=value)


@pytest.mark.parametrize("value", [None, True, 1.5, [1]], ids=repr)
def test_what_an_id_may_be_is_said_of_one_that_is_refused(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"user": value}) + "\n")
    named = f"a.jsonl, row 1: user: an id is a text or a whole number, and it is {value!r}"
    with input_error(named):
        read(tmp_path / "a.jsonl")


def test_people_have_the_same_ids_in_every_format_and_column_type(tmp_path):
    numbers = [0, 3, 3, 12, 2**52 + 1]
    expected = [str(number) for number in numbers]
    kinds = {
        "int": numbers,
        "float": [float(number) for number in numbers],
        "text": expected,
        "text of floats": [f"{number}.0" for number in numbers],
        "decimal": [Decimal(number) for number in numbers],
        "Int64": pd.array(numbers, "Int64"),
    }
    for kind, values in kinds.items():
        frame = pd.DataFrame({"user": values})
        frame.to_parquet(tmp_path / f"{kind}.parquet")
        frame.to_csv(tmp_path / f"{kind}.csv", index=False)
        frame.to_csv(tmp_path / f"{kind}.csv.gz", index=False)
        if kind != "decimal":
            frame.to_json(
                tmp_path / f"{kind}.jsonl", orient="records", lines=True, double_precision=0
            )
    found = {path.name: users_in(path) for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(found, expected) and len(found) == 23


# ---- Texts that a reader cannot tell apart


SAME = [
    ("café", "cafe\u0301"),
    ("Why?", " Why?\n\n"),
    ("one two", "one\u00a0 two\u3000"),
    ("\u1e9b\u0323", "\u017f\u0323\u0307"),
    ("각", "\u1100\u1161\u11a8"),
    ("\ufeffa\u200bb", "ab"),
    ("e\u200b\u0301", "é"),
]


@pytest.mark.parametrize("one, other", SAME, ids=map(repr, SAME))
def test_texts_that_are_equal_to_a_reader_have_one_key_as_prompts_and_as_answers(one, other):
    for key in (lore.normal_forms.prompt_key, lore.normal_forms.answer_key):
        assert key(one) == key(other) == key([{"role": json.loads(key(one))[0][0], "content": one}])
        assert key(said("?", one)) == key(said("?", other))


@pytest.mark.parametrize(
    "one, other", [("a", "A"), ("a b", "ab"), ("²", "2"), ("\u200d", ""), ("a", "а"), ("", "?")]
)
def test_texts_that_a_reader_can_tell_apart_differ(one, other):
    assert lore.normal_forms.prompt_key(one) != lore.normal_forms.prompt_key(other)


def test_prompts_of_other_roles_or_other_messages_differ():
    prompts = ["a", said("a", "b"), said("a"), said("b", "a")[1:], [*said("a"), *said("a")], "[]"]
    keys = {lore.normal_forms.prompt_key(prompt) for prompt in prompts}
    assert len(keys) == len(prompts) - 1  # "a" is the user's message


# ---- Answers that begin with their prompt

LONG = "\n\nHuman: Where do we eat?\n\nAssistant:"


@pytest.mark.parametrize(
    "row, answers",
    [
        ((LONG, LONG + " At the pier.", LONG + " No idea."), ("At the pier.", "No idea.")),
        ((LONG + " ", LONG + " a\n b ", LONG + "\n"), ("a\n b ", "")),
        ((LONG, LONG.strip() + "a", LONG + "b"), ("a", "b")),
        (("Where do we", "Where do we eat?", "Where do we?"), ("eat?", "?")),
        ((said(LONG), LONG + " a", LONG + " b"), ("a", "b")),
        ((LONG, said("", LONG + " a")[1:], LONG + " b"), (said("", "a")[1:], "b")),
    ],
)
def test_answers_that_both_begin_with_the_text_of_the_prompt_lose_it(row, answers):
    found, count = lore.normal_forms.without_repeated_prompts([Asked(*row)])
    assert found == [Asked(row[0], *answers)] and count == 1


ANSWERED = Asked("Is it so?", "Yes.", "No.")
GREETED = Asked("Hello!", "Hello! How are you?", "Hello! What is it?")


@pytest.mark.parametrize(
    "row",
    [
        ANSWERED,
        GREETED,
        Asked(LONG, LONG + " At the pier.", "No idea."),  # a matter of taste, perhaps
        Asked("Where do we eat", "Where do we eaten?", "Where do we eats?"),
        Asked(said("?", "!", LONG), LONG + " a", LONG + " b"),
        Asked(LONG, said(LONG, "a", "b", "c"), said(LONG, "a")),
        Asked("", "a", "b"),
        Asked(None, "a", "b"),
    ],
)
def test_other_answers_stay_as_they_are(row):
    rows = [row, ANSWERED, ANSWERED]
    assert lore.normal_forms.without_repeated_prompts(rows) == (rows, 0)


def test_a_short_prompt_is_removed_if_most_rows_repeat_theirs():
    rows = [Asked(LONG, LONG + " a", LONG + " b")] * 3 + [GREETED, ANSWERED]
    found, count = lore.normal_forms.without_repeated_prompts(rows)
    assert count == 4
    assert found[3:] == [Asked("Hello!", "How are you?", "What is it?"), ANSWERED]


def test_messages_of_the_prompt_are_removed_from_each_answer_by_itself():
    without = lore.normal_forms.without_messages
    assert without(said("?"), said("?", "a")) == said("?", "a")[1:]
    assert without("?", said("?", "a")) == said("?", "a")[1:]
    for answer in ("a", None, said("??", "a"), said("", "a")[1:]):
        assert without(said("?"), answer) == answer


# ---- Notes


def notes_on(train, test=()):
    return lore.data_notes.notes_on_comparisons({"train": list(train), "test": list(test)})


def ordinary(first, count=12):
    """Comparisons of three people with nothing odd in them."""
    return [
        Judged(f"u{i % 3}", f"Question {i}?", f"Yes, {i}.", f"No, {i}.")
        for i in range(first, first + count)
    ]


TRAIN, TEST = ordinary(0), ordinary(12)


@pytest.mark.parametrize(
    "train, test, note",
    [
        (
            [*TRAIN, TRAIN[3], TRAIN[3]._replace(prompt=" Question  3?")],
            TEST,
            "rows of train that repeat an earlier one word for word: 2",
        ),
        (
            [
                *TRAIN,
                Judged("u0", "half of \ud83d", "a", "b"),
                Judged("u0", "half of \ud83d ", "a", "b"),
            ],
            TEST,
            "rows of train that repeat an earlier one word for word: 1",
        ),
        (
            [*TRAIN, Judged("u0", said("?", "a", "!"), "b", "c")],
            [*TEST, Judged("u0", said("? ", " a", "!"), "b", "c"), Judged("u0", "? a !", "b", "c")],
            "1 of 14 rows of test are also in train",
        ),
        (TRAIN, [*TEST, TRAIN[4], TRAIN[5]], "2 of 14 rows of test are also in train"),
        (
            [*TRAIN, TRAIN[1]._replace(chosen=TRAIN[1].rejected, rejected=said("", "Yes, 1.")[1:])],
            [*TEST, TRAIN[2]._replace(chosen=TRAIN[2].rejected, rejected=TRAIN[2].chosen)],
            "2 pairs were chosen both ways round by the same user",
        ),
        (
            [*TRAIN, Judged("u0", "?", "Yes.", "Yes. "), Judged("u1", "?", "é", "e\u0301")],
            TEST,
            "train: 2 answers look the same",
        ),
        (
            [*TRAIN, Judged("u0", "?", "a", "['b', 'c']"), Judged("u0", "??", "a", '[{"b": 1}]')],
            TEST,
            "rejected answers of the pairs in train: 2 are lists or objects printed as text",
        ),
        (
            [*TRAIN, Judged("u0", LONG, LONG + " Yes.", "No.")],
            TEST,
            "train: in 1 pair an answer begins with the text of its prompt",
        ),
        (
            [*TRAIN, Judged("u1", "?", " ", "a")],
            TEST,
            "chosen answers of the pairs in train: 1 is blank, and stays as it is",
        ),
        (
            [*TRAIN, Judged("u1", "?", " nan", "a"), Judged("u1", "??", said("", "None")[1:], "a")],
            TEST,
            "chosen answers of the pairs in train: 2 are 'None' or 'nan', as programs write",
        ),
        (
            [*TRAIN, Judged("u1", said("nan", "None", "NaN"), "a", "nancy")],
            TEST,
            "prompts of the pairs in train: 1 is 'NaN', as programs write",
        ),
        (
            [*TRAIN, Judged("u1", said("?", "a", "\n"), "a", "b")],
            TEST,
            "prompts of the pairs in train: 1 is blank",
        ),
        (
            [*TRAIN, TRAIN[0]._replace(user="NaN"), TRAIN[1]._replace(user="NaN")],
            [*TEST, TEST[0]._replace(user="NaN")],
            "a user is called 'NaN', with 3 rows",
        ),
        (
            TRAIN,
            [*TEST, *(row._replace(user="u2") for row in ordinary(24, 20))],
            "user 'u2' has 28 of the 44 rows",
        ),
        ([*TRAIN, Judged("v", "?", "a", "b")], TEST, "1 user is in train only"),
        (TRAIN, [*TEST, Judged("v", "?", "a", "b")], "1 user is in test only"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_each_oddity_is_counted_once_and_nothing_else_is_said(train, test, note):
    (found,) = notes_on(train, test)
    assert note in found and "\n" not in found


def test_a_conversation_that_is_called_nothing_is_said_and_one_without_a_name_is_not():
    ids = ["NaN", "c1", None, "nan", "nan", "None", "null", "nancy"]
    notes = lore.data_notes.notes_on_conversations(ids)
    expected = [("NaN", "1 row"), ("None", "1 row"), ("nan", "2 rows"), ("null", "1 row")]
    for note, (name, rows) in zip(notes, expected, strict=True):
        assert note.startswith(f"a conversation is called {name!r}, with {rows}, which stay toge")


@pytest.mark.parametrize(
    "count, said", [(0, "0 users are"), (1, "1 user is"), (2, "2 users are"), (1200, "1,200 users")]
)
def test_a_count_has_the_word_that_follows_it(count, said):
    assert count_of(count, "user is", "users are").startswith(said)
    assert count_of(count, "user") == said.removesuffix(" is").removesuffix(" are")


def test_ordinary_data_have_no_notes_and_no_block(capsys):
    assert notes_on(TRAIN, TEST) == []
    lore.data_notes.print_notes([])
    assert capsys.readouterr().out == ""


def test_two_equal_texts_are_said_elsewhere():
    assert notes_on([Judged("u0", "?", "a", "a"), *TRAIN], TEST) == []


def test_the_same_answers_of_other_people_or_to_other_prompts_are_not_odd():
    others = [row._replace(user="u0" if row.user != "u0" else "u1") for row in TRAIN]
    turned = [row._replace(chosen=row.rejected, rejected=row.chosen) for row in others]
    assert notes_on([*TRAIN, *others], TEST) == []
    assert notes_on([*TRAIN, *turned], TEST) == []
    assert notes_on([Judged("u0", "?", "a", "a"), *TRAIN], TEST) == []


def test_notes_are_printed_as_one_block(capsys):
    lore.data_notes.print_notes(["one.", "two."])
    assert capsys.readouterr().out == "odd in these data:\n  - one.\n  - two.\n"


def test_a_date_is_no_id(tmp_path):
    table = pa.table({"user": pa.array([datetime.date(2024, 1, 1)])})
    pq.write_table(table, tmp_path / "a.parquet")
    with input_error("a.parquet, row 1: user"):
        read(tmp_path / "a.parquet")
