"""Properties that hold for every input of a kind, tried on many that Hypothesis makes up.

Seeded and bounded, so the same inputs are tried each time.
"""

import collections
import copy
import csv
import functools
import io
import json
import math
import pickle
import shutil
import struct
import warnings

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from studies import described_results

import lore.pickles
import utils
from lore.checkpoint import inspect_checkpoint
from lore.embedding_files import HEAD_FILE, embeddings_are_finished, find_reward_head
from lore.files import load_json, load_pickle, load_tensors, printable, save_json
from lore.reward_model import load_reward_head
from lore.tables import csv_text, latex_text, markdown_text
from utils import InputError


def examples(count: int):
    """Try a property on so many inputs, the same ones each time."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all inputs: each writes its file anew."""
    return tmp_path_factory.mktemp("properties")


# ---- Any bytes load to a result or one line, and change nothing


def state_of(thing) -> tuple:
    """What a pickle could change of a function or class that it may name."""
    names = ("__defaults__", "__kwdefaults__", "__code__", "__name__", "__annotations__")
    attributes = {name: copy.copy(getattr(thing, name, None)) for name in names}
    return attributes, dict(vars(thing)) if hasattr(thing, "__dict__") else {}


def states_of_globals() -> list[tuple]:
    """The states of all that files may name, whoever loads them."""
    things = [
        *lore.pickles.PLAIN_GLOBALS.values(),
        *(value for name, value in vars(torch._utils).items() if name.startswith("_rebuild")),
        torch.storage._load_from_bytes,
        torch.FloatStorage,
        torch.BFloat16Storage,
        torch.Size,
        torch.nn.Parameter,
        collections.OrderedDict,
    ]
    return [state_of(thing) for thing in things]


def loads_or_says_why(load, path, content: bytes):
    """What a file with this content holds; None if it is refused, in one printable line."""
    path.write_bytes(content)
    before = states_of_globals()
    try:
        result = load(path)
    except InputError as error:
        message = str(error)
        assert message.isprintable() and str(path) in message
        result = None
    assert states_of_globals() == before
    return result


def torch_bytes(content, archive: bool) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


def seed_files() -> list[tuple]:
    """(loader, the bytes of a whole file) of every kind that is loaded."""
    tensors = [torch.arange(12.0).reshape(3, 4).T, torch.ones(2).bfloat16()]
    content = {
        "worker é": [{"text": "post", "embeddings": {"winning": tensors, "losing": tensors[:1]}}],
        "plain": [(1, (2.5, None)), {True, "two"}, b"three", collections.OrderedDict(four=4)],
        "size": torch.Size([2, 3]),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    files = [(load_pickle, pickle.dumps(content, protocol)) for protocol in range(6)]
    files += [(load_pickle, torch_bytes(content, archive)) for archive in (True, False)]
    record = {"identity": {"data": "12ab"}, "files": {"a.pkl": "34cd"}, "users": ["é", 7, None]}
    metadata = {"about": json.dumps(record)}
    files.append(
        (
            load_tensors,
            save({"reward_head": tensors[0].contiguous(), "V": tensors[1].contiguous()}, metadata),
        )
    )
    files.append((load_json, json.dumps({**record, "p": [0.5, 1e9, True]}).encode()))
    return files


FILES = seed_files()

# Instructions that change what a pickle does, to be put anywhere into one
INSTRUCTIONS = [
    *(bytes([code[0]]) for code in vars(pickle).values() if isinstance(code, bytes) and code),
    b"h\0",  # the first object of the memo, and its number
    b"q\0",
    pickle.LONG_BINPUT + b"\xff\xff\xff\x07",
    pickle.BINUNICODE + b"\xff\xff\xff\x07",
]

change = st.one_of(
    st.tuples(st.just("replace"), st.integers(0, 255).map(lambda byte: bytes([byte]))),
    st.tuples(st.just("insert"), st.sampled_from(INSTRUCTIONS) | st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("remove"), st.integers(1, 40)),
    st.tuples(st.just("repeat"), st.integers(1, 40)),
    st.tuples(st.just("cut"), st.just(0)),
)
places = st.floats(0, 1, exclude_max=True)  # of the length of the file


def changed(content: bytes, changes: list) -> bytes:
    """The bytes after each of the changes."""
    for place, (kind, value) in changes:
        i = int(place * len(content))
        if kind == "replace":
            content = content[:i] + value + content[i + 1 :]
        elif kind == "insert":
            content = content[:i] + value + content[i:]
        elif kind == "remove":
            content = content[:i] + content[i + value :]
        elif kind == "repeat":
            content = content[: i + value] + content[i:]
        else:
            content = content[:i]
    return content


@pytest.mark.filterwarnings("ignore")
@examples(600)
@given(st.sampled_from(FILES), st.lists(st.tuples(places, change), min_size=1, max_size=4))
def test_a_changed_file_loads_or_is_refused_in_one_line_and_changes_nothing(folder, file, changes):
    load, content = file
    loads_or_says_why(load, folder / "changed", changed(content, changes))


@pytest.mark.filterwarnings("ignore")
@examples(100)
@given(st.sampled_from([load_pickle, load_tensors, load_json]), st.binary(max_size=200))
def test_any_bytes_load_or_are_refused(folder, load, content):
    loads_or_says_why(load, folder / "any", content)


@pytest.mark.filterwarnings("ignore")
@examples(100)
@given(st.sampled_from(FILES), st.integers(0, 40), places)
def test_a_file_that_is_cut_is_refused(folder, file, from_end, place):
    """Near its end, and anywhere."""
    load, content = file
    for length in (len(content) - 1 - from_end, int(place * len(content))):
        assert loads_or_says_why(load, folder / "cut", content[:length]) is None


def text(value: str) -> bytes:
    """The instruction that puts a text on the stack."""
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


# Pieces of programs: what a pickle may name, arguments, and what can be done with them
PIECES = [
    *(
        pickle.GLOBAL + f"{module}\n{name}\n".encode()
        for module, name in lore.pickles.PLAIN_GLOBALS
    ),
    *(text(word) for word in ("__defaults__", "__kwdefaults__", "neg", "latin1", "a")),
    pickle.NONE,
    pickle.NEWTRUE,
    b"K\0",
    b"K\3",
    pickle.EMPTY_DICT,
    pickle.EMPTY_LIST,
    pickle.EMPTY_SET,
    pickle.EMPTY_TUPLE,
    pickle.MARK,
    pickle.DUP,
    pickle.TUPLE1,
    pickle.TUPLE2,
    pickle.TUPLE3,
    pickle.TUPLE,
    pickle.DUP + pickle.TUPLE2,
    30 * (pickle.DUP + pickle.TUPLE2),
    pickle.SETITEM,
    pickle.SETITEMS,
    pickle.DICT,
    pickle.APPEND,
    pickle.ADDITEMS,
    pickle.FROZENSET,
    pickle.REDUCE,
    pickle.NEWOBJ,
    pickle.OBJ,
    pickle.BUILD,
    pickle.NONE + pickle.EMPTY_DICT + text("__defaults__") + pickle.NONE + b"s\x86" + pickle.BUILD,
    pickle.EMPTY_DICT + text("a") + pickle.NONE + b"s" + pickle.BUILD,
    pickle.EXT1 + b"\1",
    pickle.BINPERSID,
    pickle.BINPUT + b"\1",
    pickle.BINGET + b"\1",
    pickle.dumps(torch.arange(3.0), 2)[2:-1],
]


@pytest.mark.filterwarnings("ignore")
@examples(500)
@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_a_program_of_any_pieces_loads_or_is_refused_and_changes_nothing(folder, pieces):
    content = pickle.PROTO + b"\4" + b"".join(pieces) + pickle.STOP
    loads_or_says_why(load_pickle, folder / "program", content)


# ---- What is plain comes back

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
atoms = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | words
    | st.binary(min_size=1, max_size=5)
)
keys = st.recursive(
    words | st.integers() | st.booleans(), lambda part: st.tuples(part, part), max_leaves=5
)
plain = st.recursive(
    atoms,
    lambda part: (
        st.lists(part, max_size=3)
        | st.tuples(part, part)
        | st.dictionaries(keys, part, max_size=3)
        | st.sets(keys, max_size=3)
        | st.dictionaries(words, part, max_size=2).map(collections.OrderedDict)
    ),
    max_leaves=8,
)


def with_types(value):
    """A value with the type of each part, as `1 == True` and `-0.0 == 0.0`; a set has no order."""
    if isinstance(value, dict):
        parts = [(with_types(key), with_types(part)) for key, part in value.items()]
    elif isinstance(value, set):
        parts = sorted(map(with_types, value), key=repr)
    elif isinstance(value, list | tuple):
        parts = [with_types(part) for part in value]
    else:
        parts = repr(value)
    return type(value), parts


@examples(150)
@given(plain, st.integers(0, 5))
def test_plain_content_comes_back_from_a_pickle_of_any_protocol(folder, content, protocol):
    path = folder / "plain"
    path.write_bytes(pickle.dumps(content, protocol))
    assert with_types(load_pickle(path)) == with_types(content)


shapes = st.lists(st.integers(0, 4), max_size=3)
dtypes = st.sampled_from(["float32", "bfloat16", "float64", "int64", "bool", "uint8"])


@examples(100)
@given(shapes, dtypes, st.integers(0, 3), st.integers(0, 5))
def test_parts_of_tensors_come_back_from_a_pickle_of_any_protocol(
    folder, shape, dtype, begin, protocol
):
    whole = torch.arange(math.prod(shape)).reshape(shape).to(getattr(torch, dtype))
    part = whole.T[begin:] if len(shape) == 2 else whole
    path = folder / "tensor"
    path.write_bytes(pickle.dumps([whole, part], protocol))
    for found, expected in zip(load_pickle(path), (whole, part), strict=True):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert torch.equal(found, expected)


# ---- The likelihood's derivatives

counts_of_pairs = st.lists(st.integers(1, 9), min_size=1, max_size=6)
ranks = st.lists(st.integers(1, 5), min_size=1, max_size=4)
widths = st.integers(1, 40)
# From pairs without any margin to margins in the thousands, of which the sigmoid is 0 or 1
magnitudes = st.floats(-2, 3).map(lambda exponent: 10**exponent)
flags = st.booleans()


def derivatives_in_float64(X, w, V, counts, sizes, weight):
    """Loss of each member, and its derivatives by w and V, by autograd on the formula."""
    w = w.double().requires_grad_()
    V = V.double().requires_grad_()
    losses = []
    columns = torch.arange(sum(sizes)).split(sizes)
    for columns_of_member in columns:
        loss = 0
        for user, X_i in enumerate(X.double().split(counts)):
            margins = X_i @ V[columns_of_member].T @ w[user, columns_of_member] / 100
            loss = loss - weight[user] * torch.nn.functional.logsigmoid(margins).sum()
        losses.append(loss)
    grad_w, grad_V = torch.autograd.grad(sum(losses), (w, V))
    return torch.stack(losses).detach(), grad_w, grad_V


@examples(60)
@given(counts_of_pairs, ranks, widths, magnitudes, magnitudes, flags, flags, flags, st.data())
def test_both_ways_to_the_derivatives_are_those_of_autograd_on_the_formula(
    counts, sizes, d, size_of_X, size_of_V, is_mean_of_pairs, need_w, need_V, data
):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    X = size_of_X * torch.randn(sum(counts), d, generator=generator)
    V = size_of_V * torch.randn(sum(sizes), d, generator=generator)
    total = sum(counts) if is_mean_of_pairs else None
    likelihood = utils.Likelihood(counts, sizes, "cpu", total)
    w = likelihood.weights(5 * torch.randn(len(counts), sum(sizes), generator=generator))

    weight = [1 / (total or count) for count in counts]
    losses, grad_w, grad_V = derivatives_in_float64(X, w, V, counts, sizes, weight)

    # A float32 margin has an error in proportion to the numbers that were added up to it, and the
    # share 1 - P of a pair has a quarter of this error, and rounding of its own.
    P = X.abs() @ V.abs().T  # (M, C)
    error = 2e-6 * (1 + P.max() / 100)
    weight_of_pair = torch.tensor(weight)[likelihood.user_of_pair, None]
    bound_w = torch.stack([part.sum(0) for part in (weight_of_pair * P / 100).split(counts)])
    bound_V = (weight_of_pair * w[likelihood.user_of_pair] / 100).T @ X.abs()

    assert ((likelihood.loss(X @ V.T, w) - losses).abs() <= error * (1 + losses)).all()
    for way in (likelihood.plain, likelihood.kernel):
        found_w, found_V = way(X, w, V, need_w, need_V)
        if need_w:
            assert ((found_w - grad_w).abs() <= error * bound_w).all()
        if need_V:
            assert ((found_V - grad_V).abs() <= error * bound_V).all()


# ---- JSON of any shape

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part, max_size=3)
    ),
    max_leaves=10,
)


@examples(150)
@given(json_values, st.integers(0, 120))
def test_json_comes_back_the_same_or_is_refused_in_one_line(folder, value, depth):
    nested = functools.reduce(lambda inner, _: [inner], range(depth), value)
    for content in (value, {"a": nested}):
        encoded = json.dumps(content).encode()
        found = loads_or_says_why(load_json, folder / "a.json", encoded)
        if not isinstance(content, dict) or depth >= 100:
            continue
        if found is None:
            assert depth >= 80  # `value` itself is less than 20 deep
            continue
        assert found == content
        results = {"results": [found]}  # two deeper
        save_json(folder / "b.json", results)
        again = loads_or_says_why(load_json, folder / "c.json", (folder / "b.json").read_bytes())
        assert again == results or (again is None and depth >= 78)


FIELDS = ("identity", "files", "model", "data", "title", "demo", "embedding")
records = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4) | json_values
HEAD = torch.ones(3, 1)


@examples(200)
@given(records)
def test_a_record_of_embeddings_of_any_shape_is_a_result_or_one_line(folder, record):
    embeddings = folder / "a.pkl"
    embeddings.write_text("embeddings")
    encoded = save({"reward_head": HEAD}, {"about": json.dumps(record)})

    def found(path):
        head, provenance = find_reward_head(folder, "a/model", "Own", {3: "a.pkl"}, ["a.pkl"])
        assert torch.equal(head, HEAD)
        save_json(folder / "results.json", provenance)
        assert provenance["title"].isprintable()
        return head

    def finished(path):
        return embeddings_are_finished([embeddings], {"data": "1", "weights": "2"}, False)

    (folder / HEAD_FILE).write_bytes(encoded)
    for look in (found, finished):
        try:
            look(folder)
        except InputError as error:
            assert str(error).isprintable()


CHECKPOINT_FILES = ("config.json", "adapter_config.json", "model.safetensors.index.json")
CHECKPOINT_FIELDS = (
    "weight_map",
    "metadata",
    "quantization_config",
    "text_config",
    "transformers_weights",
    "base_model_name_or_path",
    "model_type",
)
descriptions = (
    st.dictionaries(st.sampled_from(CHECKPOINT_FIELDS), json_values, max_size=4)
    | st.dictionaries(st.text(max_size=5), st.text(max_size=5)).map(lambda x: {"weight_map": x})
    | json_values
)


@examples(200)
@given(st.sampled_from(CHECKPOINT_FILES), descriptions, st.booleans())
def test_what_a_checkpoint_says_of_itself_is_a_result_or_one_line(
    folder, name, description, has_weights
):
    checkpoint = folder / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir()
    (checkpoint / name).write_text(json.dumps(description))
    if has_weights:
        (checkpoint / "model.safetensors").write_bytes(save({"score.weight": HEAD.T.contiguous()}))
    try:
        found = inspect_checkpoint(checkpoint)
        assert found.quantiser is None or isinstance(found.quantiser, str)
        assert torch.equal(load_reward_head(checkpoint), HEAD)
    except InputError as error:
        assert str(error).isprintable()
        assert str(checkpoint) in str(error)


# ---- Names of any characters

names = st.text(max_size=20) | st.text("=+-@$_%&\\{}[]<>|`*#!~^' \t\r\n,\"ab", max_size=20)


@examples(300)
@given(names)
def test_a_name_is_one_line_of_plain_text_in_every_format(name):
    assert printable(name).isprintable()
    assert printable(printable(name)) == printable(name)
    for escaped in (markdown_text(name), latex_text(name)):
        assert escaped.isprintable()
        escaped.encode()  # there is UTF-8 of it

    for sign in "<>|~$":
        assert sign not in markdown_text(name)
    without_escapes = latex_text(name).replace("\\" + "textbackslash{}", "")
    for sign in "$&#%_":
        assert without_escapes.count(sign) == without_escapes.count(f"\\{sign}") == name.count(sign)


@examples(200)
@given(st.lists(st.tuples(names, st.floats(allow_nan=False)), min_size=1, max_size=4))
def test_a_csv_file_has_a_row_per_row_and_no_formula(rows):
    frame = pd.DataFrame(rows, columns=["user", "weight"])
    header, *found = csv.reader(io.StringIO(csv_text(frame)))
    assert header == ["user", "weight"]
    for (user, weight), (cell, number) in zip(rows, found, strict=True):
        assert cell in (printable(user), f"'{printable(user)}")
        assert float(number) == weight
        if cell.strip()[:1] in tuple("=+-@"):
            float(cell)


@pytest.mark.filterwarnings("error:.*[gG]lyph")
@examples(8)
@given(st.text(min_size=1, max_size=8) | st.text("$\\{}_^%", min_size=1, max_size=8))
def test_a_picture_can_have_any_name(folder, name):
    from lore.pictures import save_picture, small_multiples

    point = {"row": name, "column": name, "line": name, "x": 1, "mean": 0.5, "low": 0, "high": 1}
    figure = small_multiples(described_results(name), [point], "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_picture(folder, "a", figure)
