"""Files: whole or not at all; damaged ones are refused; no code of a stranger's pickle runs."""

import builtins
import collections
import functools
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import time
import warnings
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from helpers import fresh_process, input_error, outcome
from safetensors.torch import save_file

import lore.files
from lore.files import load_pickle, load_tensors, save_tensors

reads_archives = pytest.mark.skipif(
    not lore.files.ARCHIVES, reason="this torch's archives are not read"
)


def vector(seed: int) -> torch.Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(seed)).bfloat16()


def tldr_content() -> dict[str, list[dict[str, Any]]]:
    """As released: worker -> comparisons, with embeddings in lists of one bfloat16 tensor."""
    comparisons = [
        {
            "text": "post",
            "winning_summary": "good",
            "losing_summary": "bad",
            "embeddings": {"winning": [vector(i)], "losing": [vector(i + 9)]},
        }
        for i in range(3)
    ]
    return {"worker é": comparisons, "other": comparisons[:2]}


def prism_content() -> list[dict[str, Any]]:
    """As released: a row per turn."""
    return [
        {
            "prompt": [{"role": "user", "content": "hello"}],
            "extra_info": {
                "user_id": "u1",
                "turn_nb": 0,
                "seen": True,
                "score": 0.5,
                "none": None,
                "chosen_conv_embedding": vector(1),
                "rejected_conv_embedding": torch.stack([vector(2), vector(3)]),
            },
        }
    ]


def assert_equal_content(found: Any, expected: Any) -> None:
    """The two have the same types, values, dtypes and orders, all the way down, on the CPU."""
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.device.type == "cpu"
        assert torch.equal(found, expected)
    elif isinstance(found, dict):
        assert list(found) == list(expected)
        assert_equal_content(list(found.values()), list(expected.values()))
    elif isinstance(found, list):
        assert len(found) == len(expected)
        for item, expected_item in zip(found, expected):
            assert_equal_content(item, expected_item)
    else:
        assert found == expected


def torch_bytes(content: Any, archive: bool = True) -> bytes:
    """What torch.save writes, as an archive or in its older format."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


def pickle_writer(protocol: int):
    """content -> what pickle.dump writes with this protocol."""
    return functools.partial(pickle.dumps, protocol=protocol)


every_format = pytest.mark.parametrize(
    "write",
    [
        *(pytest.param(pickle_writer(protocol), id=f"pickle {protocol}") for protocol in range(6)),
        pytest.param(torch_bytes, id="torch", marks=reads_archives),
        pytest.param(functools.partial(torch_bytes, archive=False), id="torch legacy"),
    ],
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "embeddings.pkl"


# ---- Pickles that load


@every_format
@pytest.mark.parametrize(
    "content", [tldr_content(), prism_content(), {}, []], ids=["TLDR", "PRISM", "dict", "list"]
)
def test_what_the_released_scripts_wrote_loads(path, content, write):
    path.write_bytes(write(content))
    assert_equal_content(load_pickle(path), content)
    assert_equal_content(load_pickle(str(path)), content)


@every_format
def test_tensors_of_every_kind_load(path, write):
    basis = torch.arange(12.0).reshape(3, 4)
    dtypes = (torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool)
    content = [basis.to(dtype) for dtype in dtypes]
    content += [basis.T, basis[1:, ::2], torch.zeros(0, 3), torch.tensor(2.5)]
    path.write_bytes(write(content))
    assert_equal_content(load_pickle(path), content)


@every_format
def test_plain_containers_of_every_kind_load(path, write):
    content = [("two", 3), collections.OrderedDict(four=4), torch.Size([2, 3]), None, 5.5]
    if lore.files.ARCHIVES:  # an older torch refuses these in a file of its own
        content += [{1, "two"}, b"three"]
    path.write_bytes(write(content))
    assert load_pickle(path) == content


@every_format
def test_a_parameter_loads_since_a_released_basis_may_be_one(path, write):
    path.write_bytes(write(torch.nn.Parameter(torch.ones(3, 2))))
    assert torch.equal(load_pickle(path), torch.ones(3, 2))


@every_format
def test_tensors_written_on_a_gpu_load_on_the_cpu(path, write, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path.write_bytes(write(tldr_content()))
    monkeypatch.undo()
    assert_equal_content(load_pickle(path), tldr_content())


# ---- Pickles that are damaged


def test_a_missing_file_a_folder_and_an_empty_file_are_named(path, tmp_path):
    with input_error(str(path), "no such file", "prepare.py"):
        load_pickle(path)
    with input_error(str(tmp_path), "directory"):
        load_pickle(tmp_path)
    path.write_bytes(b"")
    with input_error(str(path), "truncated"):
        load_pickle(path)


@every_format
def test_a_truncated_file_is_refused_at_any_length(path, write):
    whole = write(tldr_content())
    lengths = set(range(1, 40))
    lengths.update(range(40, len(whole), max(1, len(whole) // 60)))
    lengths.update(range(len(whole) - 20, len(whole)))
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with input_error(str(path), "write it again"):
            load_pickle(path)


def test_random_bytes_are_refused(path):
    rng = random.Random(0)
    for length in range(1, 120):
        path.write_bytes(rng.randbytes(length))
        with input_error(str(path)):
            load_pickle(path)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>429 Too Many Requests</html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x1f\x8b\x08\x00gzip",
        pytest.param(b"PK\x03\x04 not a zip", marks=reads_archives),
    ],
)
def test_files_of_other_kinds_are_refused(path, content):
    path.write_bytes(content)
    with input_error(str(path), "write it again"):
        load_pickle(path)


# ---- Pickles that are hostile


class Calls:
    """Pickles as a call of a function, whose result then gets a state."""

    def __init__(self, function, *arguments, state=None):
        self.call = function, arguments, state

    def __reduce__(self):
        return self.call


# What a message must name -> marker file -> an object that makes the file when it is unpickled.
# Old protocols write "builtins" and "subprocess" in Python 2's spelling, so names are short here.
PAYLOADS = {
    "posix.system": lambda marker: Calls(os.system, f"touch {marker}"),
    "eval": lambda marker: Calls(builtins.eval, f"open({str(marker)!r}, 'w').close()"),
    "exec": lambda marker: Calls(builtins.exec, f"open({str(marker)!r}, 'w').close()"),
    "Popen": lambda marker: Calls(subprocess.Popen, ["touch", str(marker)]),
    "getattr": lambda marker: Calls(getattr, Calls(open, str(marker), "w"), "close"),
    # This one makes no file, but can run the code of another file.
    "torch.serialization.load": lambda marker: Calls(torch.load, str(marker)),
}


def fake_storage(content: bytes) -> bytes:
    """A pickle in which a tensor's memory is `content`."""
    return pickle.dumps(Calls(torch.storage._load_from_bytes, content), 2)


def in_legacy_file(content: bytes) -> bytes:
    """A file of torch.save's older format with the pickle `content` in it."""
    whole = torch_bytes([], archive=False)
    empty_list = pickle.dumps([], 2)
    assert whole.count(empty_list) == 2  # the content, and after it the list of storages
    return whole.replace(empty_list, content, 1)


def in_archive(content: bytes) -> bytes:
    """An archive of torch.save with the pickle `content` in it."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(torch_bytes([]))) as source,
        zipfile.ZipFile(file, "w") as target,
    ):
        for name in source.namelist():
            target.writestr(name, content if name.endswith("data.pkl") else source.read(name))
    return file.getvalue()


def in_pickle(payload: Any, protocol: int) -> bytes:
    return pickle.dumps({"worker": [payload]}, protocol)


# Where a payload is hidden -> payload -> the bytes of the file.
HIDING_PLACES = {
    **{
        f"pickle {protocol}": functools.partial(in_pickle, protocol=protocol)
        for protocol in range(6)
    },
    "torch": lambda payload: torch_bytes([payload]),
    "torch legacy": lambda payload: torch_bytes([payload], archive=False),
    "torch zip": lambda payload: in_archive(pickle.dumps(payload, 2)),
    "storage": lambda payload: fake_storage(pickle.dumps(payload)),
    "legacy storage": lambda payload: fake_storage(in_legacy_file(pickle.dumps(payload, 2))),
    "storage in storage": lambda payload: fake_storage(
        in_legacy_file(fake_storage(torch_bytes([payload], archive=False)))
    ),
}


@pytest.mark.parametrize("place", HIDING_PLACES)
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_hostile_pickle_is_refused_by_name_and_runs_nothing(path, tmp_path, name, place):
    marker = tmp_path / "marker"
    path.write_bytes(HIDING_PLACES[place](PAYLOADS[name](marker)))
    unread_archive = place in ("torch", "torch zip") and not lore.files.ARCHIVES
    if unread_archive:  # refused before the name is read
        named = ["refused"]
    elif "storage" in place:  # so are these: no pickle in a tensor's memory is run
        named = ["refused: a tensor whose memory", "do not trust"]
    else:
        named = [name, "do not trust"]
    with input_error(str(path), *named) as message:
        load_pickle(path)
    assert "weights_only" not in message()  # torch's own text says how to run the code all the same
    assert not marker.exists()


@pytest.mark.parametrize("name", [name for name in PAYLOADS if name != "torch.serialization.load"])
def test_the_hostile_pickles_are_dangerous_to_a_plain_loader(tmp_path, name):
    marker = tmp_path / "marker"
    result = pickle.loads(pickle.dumps(PAYLOADS[name](marker)))
    if isinstance(result, subprocess.Popen):
        result.wait()
    assert marker.exists()


def test_an_archive_as_the_memory_of_a_tensor_is_refused(path, tmp_path):
    marker = tmp_path / "marker"
    path.write_bytes(fake_storage(torch_bytes([Calls(os.system, f"touch {marker}")])))
    with input_error(str(path), "refused"):
        load_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "array",
    [np.ones(2), np.float64(1), Calls(np.ndarray, (1,), np.dtype(object), b"A" * 8)],
    ids=["array", "number", "crafted array"],
)
def test_numpy_arrays_are_refused(path, array):
    """A crafted one makes numpy take the file's bytes for addresses: at best the process dies."""
    path.write_bytes(pickle.dumps(array))
    with input_error(str(path), "refused", "numpy"):
        load_pickle(path)


# ---- Archives that hold a TorchScript program


class Program(torch.nn.Module):
    """A TorchScript program that writes a file when it is loaded."""

    marker: str

    def __init__(self, marker):
        super().__init__()
        self.marker = marker

    @torch.jit.export
    def __getstate__(self):
        return self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.marker, self.training = state
        torch.save(torch.ones(1), self.marker)


def program_bytes(marker) -> bytes:
    """A TorchScript file that writes `marker` when torch.jit.load reads it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Program(str(marker))), file)
    return file.getvalue()


def zipped_files(program: bytes, data: bytes) -> tuple[bytes, list, list]:
    """The files of two zips one after the other -> (bytes, entries of the first, of the second).

    The bytes are a zip without the directory at its end.
    """
    file = io.BytesIO()
    entries = []
    with zipfile.ZipFile(file, "w") as target:
        for folder, content in (("program", program), ("data", data)):
            begin = len(target.infolist())
            with zipfile.ZipFile(io.BytesIO(content)) as source:
                for name in source.namelist():
                    inner_name = name[name.index("/") :]
                    target.writestr(folder + inner_name, source.read(name))
            entries.append(target.infolist()[begin:])
        end_of_files = target.start_dir
    return file.getvalue()[:end_of_files], *entries


def zip_directory(entries: list, moved: int = 0, size: int = 0) -> bytes:
    """A zip's central directory.

    moved: added to the places of the files. size: of the directory; the last entry's comment fills
    it up.
    """
    directory = b""
    for entry in entries:
        name = entry.filename.encode()
        comment = b""
        if size and entry is entries[-1]:
            comment = b" " * (size - len(directory) - 46 - len(name))
        directory += struct.pack(
            "<4s6H3L5H2L",
            b"PK\1\2",
            20,  # made by, and needs, version 2.0
            20,
            0,  # flags
            0,  # stored, not compressed
            0,  # time and date
            33,
            entry.CRC,
            entry.compress_size,
            entry.file_size,
            len(name),
            0,  # no extra field
            len(comment),
            0,  # disk, attributes
            0,
            0,
            entry.header_offset + moved,
        )
        directory += name + comment
    return directory


def two_directories(program: bytes, data: bytes) -> bytes:
    """A zip that is `program` to torch and `data` to Python's zipfile.

    The end record names the place of the first of two directories of one size. zipfile does not
    look there, but takes the directory right before the end record.
    """
    files, program_entries, data_entries = zipped_files(program, data)
    size = max(len(zip_directory(entries)) for entries in (program_entries, data_entries))
    count = len(program_entries)
    end_record = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, len(files), 0)
    return (
        files
        + zip_directory(program_entries, size=size)
        + zip_directory(data_entries, moved=-size, size=size)
        + end_record
    )


def zip64_end_record(directory: bytes, entries: list, place: int) -> bytes:
    """The end record of a large zip, for a directory at `place`."""
    count = len(entries)
    return struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), place
    )


def two_end_records(program: bytes, data: bytes) -> bytes:
    """A zip that is `program` to torch and `data` to Python's zipfile.

    The locator names the first of two end records. zipfile takes the one right before the locator.
    """
    files, program_entries, data_entries = zipped_files(program, data)
    program_directory = zip_directory(program_entries)
    first_record_at = len(files) + len(program_directory)
    content = files + program_directory
    content += zip64_end_record(program_directory, program_entries, len(files))
    data_directory_at = len(content)
    content += zip_directory(data_entries)
    content += zip64_end_record(zip_directory(data_entries), data_entries, data_directory_at)
    content += struct.pack("<4sLQL", b"PK\6\7", 0, first_record_at, 1)  # the locator
    unknown16 = 0xFFFF  # "see the zip64 end record"
    unknown32 = 0xFFFFFFFF
    content += struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, unknown16, unknown16, unknown32, unknown32, 0
    )
    return content


def zipfile_finds_code(path) -> bool | None:
    """Whether Python's zipfile sees a program in a zip; None if it takes the zip for damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            return any("/code/" in name for name in archive.namelist())
    except zipfile.BadZipFile:
        return None


PROGRAMS = {  # kind -> marker file -> an archive that writes it when torch.jit.load reads it
    "a program": program_bytes,
    "two directories": lambda marker: two_directories(
        program_bytes(marker), torch_bytes([vector(0)])
    ),
    "two end records": lambda marker: two_end_records(
        program_bytes(marker), torch_bytes([vector(0)])
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", PROGRAMS)
def test_an_archive_with_a_torchscript_program_is_refused_and_runs_nothing(path, tmp_path, kind):
    marker = tmp_path / "marker"
    content = PROGRAMS[kind](marker)
    marker.unlink(missing_ok=True)
    path.write_bytes(content)
    if kind == "a program":
        assert zipfile_finds_code(path) is True
    else:  # a check by Python's zipfile would let it pass; newer versions of Python see the fraud
        assert zipfile_finds_code(path) in (False, None)
    for hidden in (content, fake_storage(content)):
        path.write_bytes(hidden)
        with input_error(str(path), "do not trust" if lore.files.ARCHIVES else "refused"):
            load_pickle(path)
        assert not marker.exists()
    path.write_bytes(content)
    torch.jit.load(str(path))  # the program does run if it is loaded
    assert marker.exists()


def test_before_torch_2_6_no_archive_is_read_and_what_is_written_can_be_read(path, monkeypatch):
    monkeypatch.setattr(lore.files, "ARCHIVES", False)
    for content in (torch_bytes(tldr_content()), torch_bytes([]), b"PK\3\4", b"PK"):
        path.write_bytes(content)
        with input_error(str(path), "refused", f"torch {torch.__version__}", "torch 2.6 or newer"):
            load_pickle(path)
    lore.files.save_torch(path, prism_content())
    assert_equal_content(load_pickle(path), prism_content())
    monkeypatch.undo()  # a newer torch reads it too
    assert_equal_content(load_pickle(path), prism_content())


def test_what_save_torch_writes_comes_back(path):
    lore.files.save_torch(path, prism_content())
    assert_equal_content(load_pickle(path), prism_content())


# ---- Tensors in safetensors files


def test_tensors_and_their_metadata_come_back(tmp_path):
    path = tmp_path / "new folder" / "basis.safetensors"
    V = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "V": V.T,
        "W": vector(0),
        "part": torch.zeros(6)[2:4],
        "leaf": torch.ones(2, requires_grad=True),
    }
    metadata = {"users": ["é", "b"], "K": 3, "alpha": 1e4, "none": None, "nested": {"a": [1, 2.5]}}
    save_tensors(path, tensors, **metadata)
    found, about = load_tensors(path)
    assert about == metadata
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_tensor_file_without_metadata_loads(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["x"], torch.ones(2))
    assert metadata == {}


def test_a_damaged_tensor_file_is_refused(tmp_path):
    path = tmp_path / "basis.safetensors"
    save_tensors(path, {"V": torch.randn(20, 3)}, K=314159)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in (0, 4, 8, 30, len(whole) // 2, len(whole) - 1)]
    damaged += [whole.replace(b"314159", b"31415["), b"<html>429 Too Many Requests</html>"]
    for content in damaged:
        assert content != whole
        path.write_bytes(content)
        with input_error(str(path)):
            load_tensors(path)


# ---- Writing


def texts_in(folder) -> dict[str, str]:
    """Name -> text of every file in a folder."""
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_file_appears_whole_and_its_folder_with_it(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    with lore.files.atomic_write(path) as file:
        file.write(b"first half, ")
        file.flush()
        assert not path.exists()
        file.write(b"second half")
    assert path.read_bytes() == b"first half, second half"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(failure):
        with lore.files.atomic_write(path) as file:
            file.write(b"new")
            file.flush()
            raise failure
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_two_runs_may_write_one_file_at_once(tmp_path):
    """Another process writes the whole file between this one's first and second half."""
    path = tmp_path / "file.bin"
    code = """
import sys, lore.files
with lore.files.atomic_write(sys.argv[1]) as file:
    file.write(b'theirs')
"""
    with lore.files.atomic_write(path) as file:
        file.write(b"half ")
        status, _, err = outcome(fresh_process(code, path))
        assert status == 0, err
        assert path.read_bytes() == b"theirs"
        file.write(b"and half")
    assert path.read_bytes() == b"half and half"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_files_written_together_do_not_appear_if_the_run_fails(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with lore.files.replace_files_in(tmp_path) as new:
            (new / "a").write_text("new")
            raise KeyboardInterrupt
    assert texts_in(tmp_path) == {"a": "old", "b": "old"}


def test_files_written_together_replace_the_old_ones_together(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("old")
    with lore.files.replace_files_in(tmp_path) as new:
        (new / "a").write_text("new")
        (new / "c").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert texts_in(tmp_path) == {"a": "new", "b": "old", "c": "new"}


def test_what_a_killed_run_left_is_removed_and_what_another_run_writes_is_not(tmp_path):
    for name, hours in ((".new-killed", 2), (".new-beside", 0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "b").write_text("of another run")
        changed = time.time() - 3600 * hours
        os.utime(folder, (changed, changed))
    with lore.files.replace_files_in(tmp_path) as new:
        (new / "a").write_text("new")
    assert sorted(os.listdir(tmp_path)) == [".new-beside", "a"]
    assert texts_in(tmp_path / ".new-beside") == {"b": "of another run"}
    shutil.rmtree(tmp_path / ".new-beside")
    assert texts_in(tmp_path) == {"a": "new"}


def test_files_that_the_new_ones_replace_go_when_these_come(tmp_path):
    for name in ("K_1.txt", "K_2.txt", "other"):
        (tmp_path / name).write_text("old")
    with lore.files.replace_files_in(tmp_path, ["K_*.txt", "nothing"]) as new:
        (new / "K_2.txt").write_text("new")
        assert (tmp_path / "K_1.txt").exists()
    assert texts_in(tmp_path) == {"K_2.txt": "new", "other": "old"}


def test_a_name_that_looks_like_a_pattern_replaces_only_itself(tmp_path):
    for name in ("K_[12].txt", "K_1.txt"):
        (tmp_path / name).write_text("old")
    with lore.files.replace_files_in(tmp_path) as new:
        (new / "K_[12].txt").write_text("new")
    assert texts_in(tmp_path) == {"K_[12].txt": "new", "K_1.txt": "old"}


def test_a_folder_is_proved_writable_before_long_work_and_left_empty(tmp_path):
    lore.files.check_writable(tmp_path / "results")
    assert os.listdir(tmp_path / "results") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError) as caught:
        lore.files.check_writable(tmp_path / "file" / "results")
    assert caught.value.filename == str(tmp_path / "file" / "results")


# ---- JSON


def test_json_comes_back_with_arrays_and_ranges_as_lists(tmp_path):
    path = tmp_path / "a.json"
    content = {"a": np.arange(2), "b": torch.ones(1), "c": range(2), "é": np.float32(0.5)}
    lore.files.save_json(path, content)
    expected = {"a": [0, 1], "b": [1.0], "c": [0, 1], "é": 0.5}
    assert lore.files.load_json(path, "a") == expected
    assert json.loads(path.read_text()) == expected


def test_json_that_is_missing_or_lacks_a_key_is_refused(tmp_path):
    path = tmp_path / "a.json"
    with input_error(str(path), "no such file", "prepare.py"):
        lore.files.load_json(path)
    lore.files.save_json(path, {"a": 1})
    with input_error(str(path), "nowhere"):
        lore.files.load_json(path, "nowhere")


@pytest.mark.parametrize("text", ['{"a": [0, 1', "[1]", "", "[" * 100_000, '{"a": "\\'])
def test_damaged_json_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with input_error(str(path), "write it again"):
        lore.files.load_json(path, "a")


def nested(depth: int) -> Any:
    """Lists and objects in one another, by turns."""
    value = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def test_json_that_can_be_read_can_be_written_again(tmp_path):
    """Python's own reader takes what is deeper than its writer can write."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": nested(99)}))
    content = lore.files.load_json(path)
    lore.files.save_json(tmp_path / "b.json", {"results": content})
    for depth in (100, 500, 900):
        path.write_text(json.dumps({"a": nested(depth)}))
        with input_error(str(path), "nested", "write it again"):
            lore.files.load_json(path)


def test_json_with_a_value_of_another_type_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"files": ["a"], "data": null}')
    assert lore.files.load_json(path, files=list, other=dict)["files"] == ["a"]
    with input_error(str(path), "'files'", "list", "write it again"):
        lore.files.load_json(path, "files", files=dict)
    with input_error(str(path), "'data'", "NoneType"):
        lore.files.load_json(path, data=str)
    assert lore.files.load_json(path, data=str | None)["data"] is None


def test_json_with_a_part_of_another_type_is_refused_and_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"files": {"a": "1", "b": 2}, "notes": ["x", []], "demo": 1, "K": true}')
    with input_error(str(path), "'files.b' is a int"):
        lore.files.load_json(path, files=dict[str, str])
    with input_error(str(path), "'notes.1' is a list"):
        lore.files.load_json(path, notes=list[str])
    for key, kind in (("demo", bool), ("K", int)):  # 1 and true are not one
        with input_error(str(path), repr(key)):
            lore.files.load_json(path, **{key: kind})


@pytest.mark.parametrize("text", ["[1]", "3", '"about"', "null", "[" * 100_000, "{", ""])
def test_tensors_with_metadata_that_are_no_object_are_refused(tmp_path, text):
    path = tmp_path / "a.safetensors"
    save_file({"V": torch.ones(2)}, path, {"about": text})
    with input_error(str(path), "safetensors", "write it again"):
        load_tensors(path)


def test_tensors_with_metadata_that_could_not_be_written_again_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"V": torch.ones(2)}, files={"a": "b"}, deep=nested(150))
    with input_error(str(path), "nested"):
        load_tensors(path)
    save_tensors(path, {"V": torch.ones(2)}, files=["a"])
    assert load_tensors(path)[1] == {"files": ["a"]}
    with input_error(str(path), "'files'", "list"):
        load_tensors(path, files=dict)


# ---- What is printed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("worker é 数据", "worker é 数据"),
        ("a\r\x1b[2K\x1b[1Aok\n", r"a\r\x1b[2K\x1b[1Aok\n"),  # would overwrite its own line
        ("\u202egnp.exe", r"\u202egnp.exe"),  # would be shown from right to left
        ("\udcff", r"\udcff"),  # a byte of a file name that is no UTF-8
        ("\u2028\x85\0", r"\u2028\x85\x00"),
        (7, "7"),
    ],
)
def test_what_is_printable_is_one_line_that_can_be_seen(text, shown):
    assert lore.files.printable(text) == shown


def test_text_of_any_characters_can_be_written(tmp_path):
    lore.files.save_text(tmp_path / "a.md", "é \udcff")
    assert (tmp_path / "a.md").read_text() == "é \\udcff"


@pytest.mark.parametrize("name", ["os\x1b[2K\x1b[1A\r", "os\u202e", "os\u2028\x85"])
def test_a_hostile_name_cannot_hide_its_refusal(path, name):
    in_global = pickle.PROTO + b"\2" + b"c" + name.encode() + b"\nsystem\n."
    for content in (in_global, in_legacy_file(in_global), in_archive(in_global)):
        path.write_bytes(content)
        with input_error(str(path), "refused" if content == in_global else "") as message:
            load_pickle(path)
        assert message().isprintable()


def test_a_refused_path_is_printable(tmp_path):
    path = tmp_path / "a\x1b[2K.json"
    for load in (lore.files.load_json, load_pickle, load_tensors):
        path.unlink(missing_ok=True)
        for _ in range(2):
            with input_error(r"a\x1b[2K.json") as message:
                load(path)
            assert message().isprintable()
            path.write_bytes(b"PK")
