"""A stranger's pickle changes nothing in the process, and takes no more than its size allows.

The pickles are written instruction by instruction, as no pickler writes them.
"""

import collections
import copyreg
import io
import pickle
import struct

import pytest
import torch
from helpers import fresh_process, input_error, outcome

import lore.pickles
from lore.files import load_pickle

BEGIN = pickle.PROTO + b"\2"
BEGIN_5 = pickle.PROTO + b"\5"


def text(value: str) -> bytes:
    """The instruction that puts a text on the stack."""
    encoded = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def named(module: str, name: str) -> bytes:
    """The instruction that puts a global on the stack."""
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def path(tmp_path):
    return tmp_path / "embeddings.pkl"


def load(path, content: bytes):
    path.write_bytes(content)
    return load_pickle(path)


def is_refused(path, content: bytes, *reasons: str) -> None:
    path.write_bytes(content)
    with input_error(str(path), *reasons) as message:
        load_pickle(path)
    assert message().isprintable()


# ---- What a pickle may call stays as it is


def state_of(thing) -> dict:
    """What a function or class has that a pickle could set."""
    names = ("__defaults__", "__kwdefaults__", "__code__", "__name__", "__doc__", "__annotations__")
    attributes = {name: getattr(thing, name, None) for name in names}
    return attributes | {"__dict__": dict(vars(thing) if hasattr(thing, "__dict__") else {})}


def states_of_all() -> list[dict]:
    """The states of everything that a plain pickle or its tensors may name."""
    things = [
        *lore.pickles.PLAIN_GLOBALS.values(),
        torch._utils._rebuild_tensor_v2,
        torch._utils._rebuild_parameter,
        torch.storage._load_from_bytes,
        torch.FloatStorage,
        torch.Size,
        torch.nn.Parameter,
        collections.OrderedDict,
    ]
    return [state_of(thing) for thing in things]


# The defaults of _rebuild_tensor_v2 that turn the sign of every tensor that is loaded from then on:
# its last argument, metadata, says that the numbers are to be negated.
NEGATED = pickle.EMPTY_DICT + text("neg") + pickle.NEWTRUE + pickle.SETITEM + pickle.TUPLE1
STATES = {
    "slots": pickle.NONE
    + (pickle.EMPTY_DICT + text("__defaults__") + NEGATED + pickle.SETITEM)
    + pickle.TUPLE2,
    "attributes": pickle.EMPTY_DICT + text("__kwdefaults__") + NEGATED + pickle.SETITEM,
    "keyword defaults": pickle.NONE
    + (pickle.EMPTY_DICT + text("__kwdefaults__"))
    + (pickle.EMPTY_DICT + text("metadata") + pickle.NEWTRUE + pickle.SETITEM)
    + (pickle.SETITEM + pickle.TUPLE2),
    "name": pickle.NONE
    + (pickle.EMPTY_DICT + text("__name__") + text("other") + pickle.SETITEM)
    + pickle.TUPLE2,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", lore.pickles.PLAIN_GLOBALS, ids=".".join)
def test_a_function_that_a_pickle_may_call_gets_no_attributes_from_it(path, name, state):
    before = states_of_all()
    is_refused(path, BEGIN + named(*name) + STATES[state] + b"b.", "refused", "do not trust")
    assert states_of_all() == before


def test_tensors_that_are_loaded_after_a_hostile_pickle_keep_their_sign(path):
    hostile = named("torch._utils", "_rebuild_tensor_v2") + STATES["slots"] + pickle.BUILD
    is_refused(path, BEGIN + hostile + b".", "refused")
    assert load(path, pickle.dumps(torch.ones(2))).tolist() == [1, 1]
    torch.save(torch.ones(2), path, _use_new_zipfile_serialization=False)
    assert load_pickle(path).tolist() == [1, 1]


def storage_file(numbers: torch.Tensor) -> bytes:
    """The file of torch's older format that is the memory of a tensor in a plain pickle."""
    file = io.BytesIO()
    torch.save(numbers.storage(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def with_memory(memory: bytes) -> bytes:
    """A pickle of a tensor of three numbers with this file as its memory."""
    return pickle.dumps(
        Calls(
            torch._utils._rebuild_tensor_v2,
            Calls(torch.storage._load_from_bytes, memory),
            0,
            (3,),
            (1,),
            False,
            collections.OrderedDict(),
        )
    )


def test_a_class_of_storages_gets_no_attributes_from_a_pickle_in_a_tensors_memory(path):
    whole = storage_file(torch.ones(3))
    assert load(path, with_memory(whole)).tolist() == [1, 1, 1]
    storage_class = b"ctorch\nFloatStorage\n"
    state = pickle.NONE + pickle.EMPTY_DICT + text("_dtype") + pickle.NONE + b"s\x86b"
    assert whole.count(storage_class) == 1
    before = states_of_all()
    is_refused(path, with_memory(whole.replace(storage_class, storage_class + state)), "refused")
    assert states_of_all() == before


def test_an_object_of_the_process_is_not_taken_by_its_number(path, monkeypatch):
    """Once another unpickler has looked it up, Python gives it to every pickle, and asks nobody."""
    monkeypatch.setattr(copyreg, "_inverted_registry", {7: ("os", "system")})
    monkeypatch.setattr(pickle, "_inverted_registry", {7: ("os", "system")})
    for number in (pickle.EXT1 + b"\7", pickle.EXT2 + b"\7\0", pickle.EXT4 + b"\7\0\0\0"):
        is_refused(path, BEGIN + number + b".", "refused: it asks for an object without naming it")


def test_the_attributes_of_a_state_dict_are_left_out(path):
    """torch's modules give theirs a `_metadata`."""
    state_dict = torch.nn.Linear(2, 3).state_dict()
    assert vars(state_dict)
    for protocol in range(6):
        found = load(path, pickle.dumps(state_dict, protocol))
        assert list(found) == list(state_dict)
        assert torch.equal(found["weight"], state_dict["weight"])
        assert not vars(found)


def test_hooks_are_left_out(path):
    """They are functions that would be called when a gradient is computed."""
    hooks = collections.OrderedDict({1: torch._utils._rebuild_parameter})
    tensor = torch.ones(2)
    arguments = (tensor.storage(), 0, (2,), (1,), True, hooks)
    found = load(path, pickle.dumps(Calls(torch._utils._rebuild_tensor_v2, *arguments)))
    assert found.requires_grad
    assert not found._backward_hooks
    found = load(path, pickle.dumps(Calls(torch._utils._rebuild_parameter, tensor, False, hooks)))
    assert not found._backward_hooks
    assert not found.requires_grad


@pytest.mark.parametrize("encoding", ["zip", "rot13", "idna", "utf-8", "base64"])
def test_bytes_are_read_in_no_encoding_that_imports_or_unpacks_something(path, encoding):
    call = named("_codecs", "encode") + text("a") + text(encoding) + pickle.TUPLE2 + pickle.REDUCE
    is_refused(path, BEGIN + call + b".", "refused", encoding)


@pytest.mark.parametrize(
    "change",
    [
        text("a") + pickle.INT + b"1\n" + pickle.SETITEM,
        pickle.BININT1 + b"\0" + pickle.BININT1 + b"\7" + pickle.SETITEM,
        pickle.MARK + pickle.BININT1 + b"\0" + pickle.BININT1 + b"\7" + pickle.SETITEMS,
        pickle.MARK + pickle.BININT1 + b"\7" + pickle.ADDITEMS,
        pickle.BININT1 + b"\7" + pickle.APPEND,
    ],
    ids=["key", "number", "numbers", "member", "item"],
)
def test_only_containers_are_filled(path, change):
    tensor = pickle.dumps(torch.ones(3), 4)
    assert tensor.endswith(b".")
    is_refused(path, tensor[:-1] + change + b".")


# ---- What a pickle takes: time

ELEMENT = pickle.DUP + pickle.TUPLE2  # a tuple of the last element, twice
DOUBLED = pickle.EMPTY_TUPLE + 60 * ELEMENT  # has 2**60 parts in 121 bytes
DEEP = pickle.EMPTY_TUPLE + 100_000 * pickle.TUPLE1  # to hash it takes all of the C stack
KEYS = {
    "key": lambda key: pickle.EMPTY_DICT + key + pickle.NONE + pickle.SETITEM,
    "keys": lambda key: pickle.EMPTY_DICT + b"(" + key + pickle.NONE + pickle.SETITEMS,
    "dict": lambda key: b"(" + key + pickle.NONE + pickle.DICT,
    "members": lambda key: pickle.EMPTY_SET + b"(" + key + pickle.ADDITEMS,
    "frozenset": lambda key: b"(" + key + pickle.FROZENSET,
    "in a frozenset": lambda key: (
        pickle.EMPTY_DICT + b"(" + key + pickle.FROZENSET + pickle.NONE + pickle.SETITEM
    ),
    "set": lambda key: named("builtins", "set") + b"]" + key + b"a" + pickle.TUPLE1 + b"R",
    "ordered dict": lambda key: (
        named("collections", "OrderedDict") + b"]" + key + b"N\x86a" + pickle.TUPLE1 + b"R"
    ),
}


@pytest.mark.parametrize("parts", [DOUBLED, DEEP], ids=["doubled", "deep"])
@pytest.mark.parametrize("place", KEYS)
def test_a_key_of_very_many_parts_is_refused(path, place, parts):
    content = pickle.PROTO + b"\4" + KEYS[place](parts) + b"."
    is_refused(path, content, "refused", "parts", "do not trust")


def test_keys_of_a_few_parts_load(path):
    content = {
        (1, ("two", (3.0, None))): "tuple",
        frozenset([1, (2, 3)]): {(4, 5), frozenset([6])},
        tuple(range(900)): "long",
        True: b"",
    }
    for protocol in (4, 5):
        assert load(path, pickle.dumps(content, protocol)) == content


def test_values_of_very_many_parts_load(path):
    """Nobody hashes them."""
    wide = tuple(range(5000))
    found = load(path, BEGIN + pickle.EMPTY_DICT + text("a") + DOUBLED + pickle.SETITEM + b".")
    assert len(found["a"]) == 2
    assert load(path, pickle.dumps({"a": wide})) == {"a": wide}


# ---- What a pickle takes: memory

GIB = 2**30
LARGE = {
    "number of an object": BEGIN + b"N" + pickle.LONG_BINPUT + struct.pack("<I", GIB // 16),
    "number in text": BEGIN + b"N" + pickle.PUT + str(GIB // 16).encode() + b"\n",
    "frame": BEGIN_5 + pickle.FRAME + struct.pack("<Q", GIB) + b"N",
    "text": BEGIN_5 + pickle.BINUNICODE8 + struct.pack("<Q", GIB) + b"a",
    "bytes": BEGIN_5 + pickle.BINBYTES8 + struct.pack("<Q", GIB) + b"a",
    "bytearray": BEGIN_5 + pickle.BYTEARRAY8 + struct.pack("<Q", GIB) + b"a",
    "whole number": BEGIN_5 + pickle.LONG4 + struct.pack("<i", GIB) + b"a",
    "length below 0": BEGIN_5 + pickle.BINSTRING + struct.pack("<i", -5) + b"a",
}

MEMORY = """
import resource, sys
import lore.files
from utils import InputError

def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = most()
for path in sys.argv[1:]:
    try:
        lore.files.load_pickle(path)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    print(path, (most() - before) // 1024)
"""


def test_a_few_bytes_take_little_memory_whatever_they_say(tmp_path):
    paths = []
    for i, content in enumerate(LARGE.values()):
        paths.append(tmp_path / f"{i}.pkl")
        paths[-1].write_bytes(content + b".")
    status, out, err = outcome(fresh_process(MEMORY, *paths))
    assert (status, err) == (0, "")
    megabytes = [int(line.split()[-1]) for line in out.splitlines()]
    assert len(megabytes) == len(LARGE)
    assert max(megabytes) < 100, dict(zip(LARGE, megabytes))


def test_numbers_of_objects_that_are_not_there_are_refused(path):
    for get in (pickle.BINGET + b"\1", pickle.LONG_BINGET + b"\1\1\1\1", pickle.GET + b"7\n"):
        is_refused(path, BEGIN + get + b".")


# ---- Tensors are what the file holds


def rebuilt(numbers, offset, size, stride, **more) -> bytes:
    """A pickle of a tensor over `numbers`, as the arguments describe it."""
    arguments = (numbers.storage(), offset, size, stride, False, collections.OrderedDict())
    return pickle.dumps(Calls(torch._utils._rebuild_tensor_v2, *arguments, *more.values()))


SHAPES = {
    "beyond its memory": (0, (4,), (1,)),
    "begins behind its memory": (3, (1,), (1,)),
    "begins far behind it": (2**62, (1,), (1,)),
    "steps beyond it": (0, (2,), (3,)),
    "steps far beyond it": (0, (3,), (2**62,)),
    "begins before it": (-1, (1,), (1,)),
    "below 0": (0, (-1,), (1,)),
    "steps back": (2, (3,), (-1,)),
    "without a step": (0, (1, 3), (1,)),
    "in fractions": (0, (1.5,), (1,)),
    "in truth values": (False, (True,), (1,)),
    "in texts": (0, ("1",), (1,)),
    "huge": (0, (2**40,), (0,)),
    "beyond whole numbers": (0, (2**64, 2**64), (0, 0)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tensor_with_a_shape_that_its_numbers_do_not_fill_is_refused(path, shape):
    is_refused(path, rebuilt(torch.arange(3.0), *SHAPES[shape]), "write it again")


def test_a_tensor_without_numbers_is_filled_with_none_from_elsewhere(path):
    is_refused(path, rebuilt(torch.zeros(0), 0, (100,), (1,)), "fewer numbers")
    assert load(path, rebuilt(torch.zeros(0), 0, (0, 5), (5, 1))).shape == (0, 5)


def test_a_tensor_that_is_to_be_negated_when_it_is_read_is_refused(path):
    negated = rebuilt(torch.ones(3), 0, (3,), (1,), metadata={"neg": True})
    is_refused(path, negated, "refused")


@pytest.mark.parametrize("storage", [7, "text", None, [1.0]], ids=str)
def test_a_tensor_of_what_is_no_memory_is_refused(path, storage):
    arguments = (storage, 0, (1,), (1,), False, collections.OrderedDict())
    is_refused(path, pickle.dumps(Calls(torch._utils._rebuild_tensor_v2, *arguments)))
    is_refused(path, pickle.dumps(Calls(torch._utils._rebuild_parameter, storage, False, {})))
    is_refused(path, pickle.dumps(Calls(torch.storage._load_from_bytes, storage)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int64", "bool", "complex64"])
@pytest.mark.parametrize("count", [0, 1, 255, 256, 70_000])
def test_the_memory_of_tensors_of_every_size_loads(path, dtype, count):
    numbers = torch.arange(count).to(getattr(torch, dtype))
    for protocol in (2, 5):
        found = load(path, pickle.dumps(numbers, protocol))
        assert found.dtype == numbers.dtype
        assert torch.equal(found, numbers)


def test_a_tensors_memory_of_another_length_than_it_says_is_refused(path):
    """Else it would be read shifted, or in part."""
    whole = storage_file(torch.arange(3.0))
    count = struct.pack("<q", 3)
    numbers = torch.arange(3.0).numpy().tobytes()
    assert whole.endswith(count + numbers)
    header = whole.removesuffix(count + numbers)
    for damaged in (
        whole[:-1],
        whole[:-4],
        whole + b"\0\0\0\0",
        header + struct.pack("<q", 2) + numbers,
        header + struct.pack("<q", 4) + numbers,
        header + struct.pack("<q", -3) + numbers,
        header + struct.pack("<q", 2**62) + numbers,
        header,
        whole.replace(b"FloatStorage", b"DoubleStorage"),
        whole.replace(b"FloatStorage", b"UntypedStorage"),
        whole.replace(b"FloatStorage", b"OtherStorage"),
        bytearray(whole),
    ):
        is_refused(path, with_memory(damaged))
