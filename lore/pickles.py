"""Pickles of strangers: read without running code, and without changing anything in the process.

A pickle is a program: it names functions ("globals") and calls them. The functions that it may call
are those of this module, which check their arguments.
"""

import math
import pickle
import re
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import torch

# How a file of torch.save's older format begins, which is no zip
LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)

# How many parts a key of a dict, or a member of a set, may have. Tuples in tuples can be a few
# bytes of a pickle, and have so many parts that to hash them takes for ever.
MOST_KEY_PARTS = 1000


def load_plain_pickle(file: BinaryIO) -> Any:
    """Load what `pickle.dump` wrote: tensors, which are loaded on the CPU, and plain containers.

    It takes no more memory than about the size of the file, and time in proportion to it, unless
    the pickle has very many whole numbers with one hash as the keys of a dict.
    Raises nearly any class of errors: the pickle is damaged, or asks for anything else.
    """
    with warnings.catch_warnings():
        # Of tensors that are views of bytes. Nobody else uses these, so tensors may change them.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return _PlainUnpickler(file).load()


class _PlainUnpickler(pickle._Unpickler):
    """Builds tensors and plain containers, and refuses everything else.

    This is Python's unpickler in the version that is written in Python, where each instruction of a
    pickle is a method, and those that could do harm are replaced here. The version in C hashes any
    key, and takes as much memory as a pickle says that it has objects.
    """

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in PLAIN_GLOBALS:
            raise pickle.UnpicklingError(
                f"refused: it asks for {module}.{name}, and only tensors and plain containers are "
                "loaded"
            )
        return PLAIN_GLOBALS[module, name]

    def load_build(self) -> None:
        """Give an object attributes: those of a function would change it for the whole process.

        A state_dict, which is an OrderedDict, has some that nobody needs here. They are left out.
        """
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            raise pickle.UnpicklingError("refused: it gives attributes to what is no plain data")

    def load_extension(self) -> None:
        """Take an object by its number in a table of the process, without asking `find_class`."""
        raise pickle.UnpicklingError("refused: it asks for an object without naming it")

    def load_bytearray8(self) -> None:
        """Take bytes that can be changed: no more of them than there are, whatever their count."""
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(count)))

    def load_setitem(self) -> None:
        """Put a key and its value, the last two on the stack, into a dict."""
        value = self.stack.pop()
        key = self.stack.pop()
        _fill_dict(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        """Put all keys and values since the last mark on the stack into a dict."""
        items = self.pop_mark()
        _fill_dict(self.stack[-1], items)

    def load_dict(self) -> None:
        """Make a dict of the keys and values since the last mark."""
        items = self.pop_mark()
        self.append(_fill_dict({}, items))

    def load_additems(self) -> None:
        """Add the members since the last mark to a set."""
        members = _make_set(self.pop_mark())
        if type(self.stack[-1]) is not set:
            raise pickle.UnpicklingError("it adds members to what is no set")
        self.stack[-1].update(members)

    def load_frozenset(self) -> None:
        """Make a frozenset of the members since the last mark."""
        members = _make_set(self.pop_mark())
        self.append(frozenset(members))

    def load_unknown(self) -> None:
        raise pickle.UnpicklingError("it holds what is no instruction")

    # Number of an instruction -> its method
    dispatch = {
        **dict.fromkeys(range(256), load_unknown),
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.EXT1[0]: load_extension,
        pickle.EXT2[0]: load_extension,
        pickle.EXT4[0]: load_extension,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
    }


# ---- Containers


def _fill_dict(target: Any, items: list[Any]) -> dict[Any, Any]:
    """Put items, which are keys and values by turns, into a dict, and return it."""
    if not isinstance(target, dict):  # a tensor takes items, too
        raise pickle.UnpicklingError("it puts a key into what is no dict")
    keys = items[::2]
    _check_keys(keys)
    target.update(zip(keys, items[1::2], strict=True))
    return target


def _make_set(members: list[Any]) -> set[Any]:
    """A set of a list."""
    if type(members) is not list:
        raise pickle.UnpicklingError("it makes a set of what is no list")
    _check_keys(members)
    return set(members)


def _check_keys(keys: list[Any]) -> None:
    """Refuse a key of a dict, or a member of a set, of more than MOST_KEY_PARTS parts."""
    for key in keys:
        if not isinstance(key, (tuple, frozenset)):
            continue
        parts = [key]
        count = 0
        while parts:
            count += 1
            if count > MOST_KEY_PARTS:
                raise pickle.UnpicklingError(
                    "refused: a key of a dict, or a member of a set, has more than "
                    f"{MOST_KEY_PARTS} parts"
                )
            part = parts.pop()
            if isinstance(part, (tuple, frozenset)):
                parts.extend(part)


def _make_ordered_dict(items: Iterable[list[Any]] = ()) -> OrderedDict[Any, Any]:
    """An OrderedDict of pairs, as in pickles of Python 2; those of Python 3 fill it later."""
    ordered_dict = OrderedDict()
    for key, value in items:
        _fill_dict(ordered_dict, [key, value])
    return ordered_dict


def _make_size(sizes: tuple[int, ...]) -> torch.Size:
    """The shape of a tensor."""
    return torch.Size(sizes)


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in pickles of old protocols, which hold them as text."""
    if encoding != "latin1":  # others import modules, or unpack what is compressed
        raise pickle.UnpicklingError(f"refused: it asks for the encoding {encoding}")
    return text.encode("latin1")


# ---- Tensors

# The numbers of a tensor are a file of torch's older format, which is a sequence of pickles, then
# the count of the numbers, and then the numbers. torch has always written it in the same way, so
# the pickles need not be run.
STORAGE_FILE = re.compile(
    re.escape(LEGACY_MAGIC)
    + re.escape(pickle.dumps(1001, protocol=2))  # the version of the format
    + rb"\x80\x02}q\x00.{40,160}?uu\."  # the system that wrote it
    + rb"\x80\x02\(X\x07\x00\x00\x00storageq\x00"  # ("storage",
    + rb"ctorch\n(?P<name>\w+Storage)\nq\x01"  # its class,
    + rb"X.{4}(?P<key>\d+)q\x02"  # a key,
    + rb"X.{4}[\w:]+q\x03"  # the device,
    + rb"(?:K.|M..|J.{4}|\x8a.{1,9})"  # the count of the numbers,
    + rb"Ntq\x04Q\."  # None)
    + rb"\x80\x02\]q\x00X.{4}(?P=key)q\x01a\."  # the keys of all storages
    + rb"(?P<count>.{8})",
    re.DOTALL,
)


def _load_numbers(data: bytes) -> torch.Tensor:
    """The numbers of a tensor, on the CPU whatever the device was.

    They are a view of `data`. The unpickler keeps these bytes in memory anyway until it is done, so
    a copy would double the peak.
    """
    if type(data) is not bytes:
        raise pickle.UnpicklingError("it has a tensor whose memory is no bytes")
    header = STORAGE_FILE.match(data)
    if header is None:
        raise pickle.UnpicklingError("refused: a tensor whose memory is not in torch.save's format")
    storage_class = getattr(torch, header["name"].decode(), None)
    dtype = getattr(storage_class, "_dtype", None)
    (count,) = struct.unpack("<q", header["count"])
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("it has a tensor of an unknown type")
    if len(data) != header.end() + count * dtype.itemsize:
        raise pickle.UnpicklingError("it has a tensor of more or fewer numbers than it says")
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=header.end())


def _make_tensor(
    numbers: torch.Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    backward_hooks: Any = None,
    metadata: Any = None,
) -> torch.Tensor:
    """A tensor over numbers, as `torch._utils._rebuild_tensor_v2` makes it.

    torch would take more memory, with anything in it, if the numbers were too few. Hooks, which are
    functions, are left out. metadata: of a tensor that is negated or conjugated when it is read.
    """
    places = [offset, *size, *stride]
    if any(type(place) is not int or place < 0 for place in places):
        raise pickle.UnpicklingError("it has a tensor whose shape is none")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > len(numbers) or (count > 0 and last >= len(numbers)):
        raise pickle.UnpicklingError("it has a tensor with fewer numbers than its shape needs")
    if metadata:
        raise pickle.UnpicklingError("refused: a tensor whose numbers change when they are read")
    tensor = torch.empty(0, dtype=numbers.dtype)
    tensor.set_(numbers.untyped_storage(), offset, size, stride)
    return tensor.requires_grad_(bool(requires_grad))


def _make_parameter(
    tensor: torch.Tensor, requires_grad: bool, backward_hooks: Any
) -> torch.nn.Parameter:
    """A parameter, as `torch._utils._rebuild_parameter` makes it, but without hooks."""
    if not isinstance(tensor, torch.Tensor):
        raise pickle.UnpicklingError("it has a parameter that is no tensor")
    return torch.nn.Parameter(tensor, bool(requires_grad))


# What a plain pickle may call, by the names that it uses
PLAIN_GLOBALS = {
    ("torch.storage", "_load_from_bytes"): _load_numbers,
    ("torch._utils", "_rebuild_tensor_v2"): _make_tensor,
    ("torch._utils", "_rebuild_parameter"): _make_parameter,
    ("torch", "Size"): _make_size,
    ("collections", "OrderedDict"): _make_ordered_dict,
    ("builtins", "set"): _make_set,
    ("__builtin__", "set"): _make_set,  # Python 2's name, in pickles of old protocols
    ("_codecs", "encode"): _encode,
}
