"""Files: whole or not at all, and no code of a stranger's pickle runs. Scripts: one line and status 2."""

import argparse
import builtins
import collections
import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import subprocess
import time
import warnings
import zipfile
from typing import Tuple

import numpy as np
import pytest
import torch
from helpers import fresh_process, input_error, outcome

import lore.files
import lore.scripts
import utils
from lore.files import load_pickle, load_tensors, save_tensors

PROTOCOLS = [2, 3, 4, 5]
needs_archives = pytest.mark.skipif(
    not lore.files.ARCHIVES, reason="this torch's archives are not read"
)


def vector(seed):
    return torch.randn(16, generator=torch.Generator().manual_seed(seed)).bfloat16()


def tldr_content():
    """The released format: worker -> comparisons, embeddings in lists of one bfloat16 tensor."""
    return {
        worker: [
            {
                "text": "post",
                "winning_summary": "good",
                "losing_summary": "bad",
                "embeddings": {"winning": [vector(i)], "losing": [vector(i + 9)]},
            }
            for i in range(3)
        ]
        for worker in ("worker é", "other")
    }


def prism_content():
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


def assert_equal_content(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.device.type == "cpu" and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_equal_content(list(one.values()), list(other.values()))
    elif isinstance(one, list):
        assert len(one) == len(other)
        for item, same in zip(one, other):
            assert_equal_content(item, same)
    else:
        assert one == other


def saved(content, **options):
    """The bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


WRITERS = {
    **{
        f"pickle {protocol}": lambda content, protocol=protocol: pickle.dumps(content, protocol)
        for protocol in PROTOCOLS
    },
    "torch": saved,
    "torch legacy": lambda content: saved(content, _use_new_zipfile_serialization=False),
}
every_format = pytest.mark.parametrize(
    "write",
    [
        pytest.param(write, id=name, marks=[needs_archives] if name == "torch" else [])
        for name, write in WRITERS.items()
    ],
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "embeddings.pkl"


# ---------------------------------------------------------------------------------------------------------------------
# Pickles that load
# ---------------------------------------------------------------------------------------------------------------------


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
    content = [
        basis.to(dtype)
        for dtype in (torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool)
    ]
    content += [basis.T, basis[1:, ::2], torch.zeros(0, 3), torch.tensor(2.5)]
    path.write_bytes(write(content))
    assert_equal_content(load_pickle(path), content)


@every_format
def test_plain_containers_of_every_kind_load(path, write):
    content = [("two", 3), collections.OrderedDict(four=4), torch.Size([2, 3]), None, 5.5]
    content += [
        {1, "two"},
        b"three",
    ] * lore.files.ARCHIVES  # which an older torch does not take from a file of its own
    path.write_bytes(write(content))
    assert load_pickle(path) == content


@every_format
def test_a_parameter_loads_as_released_bases_may_be_saved(path, write):
    path.write_bytes(write(torch.nn.Parameter(torch.ones(3, 2))))
    assert torch.equal(load_pickle(path), torch.ones(3, 2))


@every_format
def test_tensors_written_on_a_gpu_load_on_the_cpu(path, write, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path.write_bytes(write(tldr_content()))
    monkeypatch.undo()
    assert_equal_content(load_pickle(path), tldr_content())


# ---------------------------------------------------------------------------------------------------------------------
# Files that are damaged
# ---------------------------------------------------------------------------------------------------------------------


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
    lengths = {
        *range(1, 40),
        *range(40, len(whole), max(1, len(whole) // 60)),
        *range(len(whole) - 20, len(whole)),
    }
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with input_error(str(path), "write it again"):
            load_pickle(path)


def test_random_bytes_are_refused(path):
    chance = random.Random(0)
    for length in range(1, 120):
        path.write_bytes(chance.randbytes(length))
        with input_error(str(path)):
            load_pickle(path)
    texts = [
        b"<!DOCTYPE html><html>429 Too Many Requests</html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x1f\x8b\x08\x00gzip",
    ] + [b"PK\x03\x04 not a zip"] * lore.files.ARCHIVES
    for text in texts:
        path.write_bytes(text)
        with input_error(str(path), "write it again"):
            load_pickle(path)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are hostile
# ---------------------------------------------------------------------------------------------------------------------


class Calls:
    """Unpickles by calling a function, and giving what it returns a state."""

    def __init__(self, function, *arguments, state=None):
        self.call = function, arguments, state

    def __reduce__(self):
        return self.call


# The global's name: old protocols write "builtins" and "subprocess" in Python 2's spelling.
PAYLOADS = {
    "posix.system": lambda marker: Calls(os.system, f"touch {marker}"),
    "eval": lambda marker: Calls(builtins.eval, f"open({str(marker)!r}, 'w').close()"),
    "exec": lambda marker: Calls(builtins.exec, f"open({str(marker)!r}, 'w').close()"),
    "Popen": lambda marker: Calls(subprocess.Popen, ["touch", str(marker)]),
    "getattr": lambda marker: Calls(getattr, Calls(open, str(marker), "w"), "close"),
    "torch.serialization.load": lambda marker: Calls(torch.load, str(marker)),
}  # itself able to run code


def fake_storage(blob):
    """A pickle in which a tensor's memory is the given bytes."""
    return pickle.dumps(Calls(torch.storage._load_from_bytes, blob), 2)


def with_legacy_magic(blob):
    """A file of torch.save's older format whose content is the pickle `blob`."""
    whole = saved([], _use_new_zipfile_serialization=False)
    assert whole.count(pickle.dumps([], 2)) == 2  # the content, then the list of storages
    return whole.replace(pickle.dumps([], 2), blob, 1)


def in_torch_zip(blob):
    """A file of torch.save whose content is the pickle `blob`."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved([]))) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            target.writestr(name, blob if name.endswith("data.pkl") else source.read(name))
    return file.getvalue()


HIDING_PLACES = {
    **{
        f"pickle {protocol}": lambda payload, protocol=protocol: pickle.dumps(
            {"worker": [payload]}, protocol
        )
        for protocol in range(6)
    },
    "torch": lambda payload: saved([payload]),
    "torch legacy": lambda payload: saved([payload], _use_new_zipfile_serialization=False),
    "torch zip": lambda payload: in_torch_zip(pickle.dumps(payload, 2)),
    "storage": lambda payload: fake_storage(pickle.dumps(payload)),
    "legacy storage": lambda payload: fake_storage(with_legacy_magic(pickle.dumps(payload, 2))),
    "storage in storage": lambda payload: fake_storage(
        with_legacy_magic(fake_storage(saved([payload], _use_new_zipfile_serialization=False)))
    ),
}


@pytest.mark.parametrize("place", HIDING_PLACES)
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_hostile_pickle_is_refused_by_name_and_runs_nothing(path, tmp_path, name, place):
    marker = tmp_path / "marker"
    path.write_bytes(HIDING_PLACES[place](PAYLOADS[name](marker)))
    named = [name, "do not trust"]
    if (
        place == "storage" or not lore.files.ARCHIVES and place in ("torch", "torch zip")
    ):  # refused before it is read
        named = ["refused"]
    elif place == "storage in storage":
        named = ["_load_from_bytes", "do not trust"]
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


def test_a_zip_in_a_storage_is_refused(path, tmp_path):
    path.write_bytes(fake_storage(saved([Calls(os.system, f"touch {tmp_path / 'marker'}")])))
    with input_error(str(path), "refused"):
        load_pickle(path)
    assert not (tmp_path / "marker").exists()


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
    def __setstate__(self, state: Tuple[str, bool]):
        self.marker, self.training = state
        torch.save(torch.ones(1), self.marker)


def program(marker):
    """The bytes of a TorchScript file that writes `marker` where torch.jit.load reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(Program(str(marker))), file)
    return file.getvalue()


def directory(entries, moved, size=0):
    """A zip's central directory of ZipInfos, their offsets moved, filled up to a size by the last one's comment."""
    records = b""
    for entry in entries:
        name = entry.filename.encode()
        fill = size - len(records) - 46 - len(name) if size and entry is entries[-1] else 0
        records += (
            struct.pack(
                "<4s6H3L5H2L",
                b"PK\1\2",
                20,
                20,
                0,
                0,
                0,
                33,
                entry.CRC,
                entry.compress_size,
                entry.file_size,
                len(name),
                0,
                fill,
                0,
                0,
                0,
                entry.header_offset + moved,
            )
            + name
        )
        records += b" " * fill
    return records


def two_faced(program, data, zip64):
    """A zip that Python's zipfile reads as `data` and torch as `program`, both the bytes of a zip of torch's.

    Either two central directories of one size, of which the end record names the first and zipfile takes the nearest;
    or (zip64) two end records, of which the locator names the first and zipfile takes the nearest.
    """
    file, counts = io.BytesIO(), []
    with zipfile.ZipFile(file, "w") as target:
        for whole, folder in ((program, "program"), (data, "data")):
            with zipfile.ZipFile(io.BytesIO(whole)) as source:
                for name in source.namelist():
                    target.writestr(folder + name[name.index("/") :], source.read(name))
            counts.append(len(target.infolist()))
        first, second = target.infolist()[: counts[0]], target.infolist()[counts[0] :]
        start = target.start_dir
    body = file.getvalue()[:start]
    if zip64:

        def end_record(directory, entries, at):
            return struct.pack(
                "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *[len(entries)] * 2, len(directory), at
            )

        one, other = directory(first, 0), directory(second, 0)
        body += one + end_record(one, first, start)
        at = len(body)
        body += other + end_record(other, second, at)
        body += struct.pack("<4sLQL", b"PK\6\7", 0, start + len(one), 1)
        return body + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2, 0)
    size = max(len(directory(entries, 0)) for entries in (first, second))
    one, other = directory(first, 0, size), directory(second, -size, size)
    return (
        body
        + one
        + other
        + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *[len(first)] * 2, size, start, 0)
    )


def code_in(path):
    """Whether Python's zipfile finds a program in a zip; a newer Python may find the zip damaged: None."""
    try:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            return any("/code/" in name for name in archive.namelist())
    except zipfile.BadZipFile:
        return None


ARCHIVES = {
    "a program": lambda marker: program(marker),
    "two directories": lambda marker: two_faced(program(marker), saved([vector(0)]), zip64=False),
    "two end records": lambda marker: two_faced(program(marker), saved([vector(0)]), zip64=True),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_with_a_torchscript_program_is_refused_and_runs_nothing(path, tmp_path, name):
    marker = tmp_path / "marker"
    path.write_bytes(ARCHIVES[name](marker))
    marker.unlink(missing_ok=True)
    assert code_in(path) in ([True] if name == "a program" else [False, None])
    for content in (path.read_bytes(), fake_storage(path.read_bytes())):
        path.write_bytes(content)
        with input_error(str(path), "do not trust" if lore.files.ARCHIVES else "refused"):
            load_pickle(path)
        assert not marker.exists()
    path.write_bytes(ARCHIVES[name](marker))
    torch.jit.load(str(path))  # what is so refused would have run
    assert marker.exists()


def test_a_torch_whose_archives_can_be_passed_reads_none_and_writes_what_it_reads(
    path, monkeypatch
):
    monkeypatch.setattr(lore.files, "ARCHIVES", False)
    for content in (saved(tldr_content()), saved([]), b"PK\3\4", b"PK"):
        path.write_bytes(content)
        with input_error(str(path), "refused", f"torch {torch.__version__}", "torch 2.6 or newer"):
            load_pickle(path)
    lore.files.save_torch(path, prism_content())
    assert_equal_content(load_pickle(path), prism_content())
    monkeypatch.undo()
    assert_equal_content(load_pickle(path), prism_content())
    lore.files.save_torch(path, prism_content())
    assert_equal_content(load_pickle(path), prism_content())


@pytest.mark.parametrize(
    "array", [np.ones(2), np.float64(1), Calls(np.ndarray, (1,), np.dtype(object), b"A" * 8)]
)
def test_numpy_arrays_are_refused(path, array):
    """A crafted one makes numpy take the file's bytes for addresses, which ends the process at best."""
    path.write_bytes(pickle.dumps(array))
    with input_error(str(path), "refused", "numpy"):
        load_pickle(path)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


def test_tensors_and_their_metadata_come_back(tmp_path):
    V = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "V": V.T,
        "W": vector(0),
        "part": torch.zeros(6)[2:4],
        "leaf": torch.ones(2, requires_grad=True),
    }
    metadata = {"users": ["é", "b"], "K": 3, "alpha": 1e4, "none": None, "nested": {"a": [1, 2.5]}}
    save_tensors(tmp_path / "new folder" / "basis.safetensors", tensors, **metadata)
    found, about = load_tensors(tmp_path / "new folder" / "basis.safetensors")
    assert about == metadata
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_tensor_file_without_metadata_loads(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["x"], torch.ones(2)) and metadata == {}


def test_a_damaged_tensor_file_is_refused(tmp_path):
    path = tmp_path / "basis.safetensors"
    save_tensors(path, {"V": torch.randn(20, 3)}, K=314159)
    whole = path.read_bytes()
    for damaged in [whole[:length] for length in (0, 4, 8, 30, len(whole) // 2, len(whole) - 1)] + [
        whole.replace(b"314159", b"31415["),
        b"<html>429 Too Many Requests</html>",
    ]:
        assert damaged != whole
        path.write_bytes(damaged)
        with input_error(str(path)):
            load_tensors(path)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


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
    """Another process writes the same file from beginning to end between this one's first and second half."""
    path = tmp_path / "file.bin"
    with lore.files.atomic_write(path) as file:
        file.write(b"half ")
        code = "import sys, lore.files\nwith lore.files.atomic_write(sys.argv[1]) as file: file.write(b'theirs')"
        assert outcome(fresh_process(code, str(path)))[0] == 0 and path.read_bytes() == b"theirs"
        file.write(b"and half")
    assert path.read_bytes() == b"half and half" and os.listdir(tmp_path) == ["file.bin"]


def test_files_written_together_replace_the_old_ones_together_or_not_at_all(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with lore.files.replace_files_in(tmp_path) as new:
            (new / "a").write_text("new")
            raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}
    for name, hours in ((".new-killed", 2), (".new-beside", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b").write_text("of another run")
        os.utime(tmp_path / name, (time.time() - 3600 * hours,) * 2)
    with lore.files.replace_files_in(tmp_path) as new:
        (new / "a").write_text("new")
        (new / "c").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    shutil.rmtree(tmp_path / ".new-beside")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a": "new",
        "b": "old",
        "c": "new",
    }


def test_files_that_the_new_ones_replace_go_when_these_come(tmp_path):
    for name in ("K_1.txt", "K_2.txt", "other"):
        (tmp_path / name).write_text("old")
    with lore.files.replace_files_in(tmp_path, ["K_*.txt", "nothing"]) as new:
        (new / "K_2.txt").write_text("new")
        assert (tmp_path / "K_1.txt").exists()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "K_2.txt": "new",
        "other": "old",
    }


def test_a_folder_is_proved_writable_before_long_work_and_left_empty(tmp_path):
    lore.files.check_writable(tmp_path / "results")
    assert os.listdir(tmp_path / "results") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError) as caught:
        lore.files.check_writable(tmp_path / "file" / "results")
    assert caught.value.filename == str(tmp_path / "file" / "results")


# ---------------------------------------------------------------------------------------------------------------------
# Scripts, in processes of their own
# ---------------------------------------------------------------------------------------------------------------------

MAINS = {  # name -> (body of main, end of the line on stderr, exit status)
    "an input error": (
        "raise utils.InputError('K_list: 1.5 is no rank;\\n give whole numbers')",
        "error: K_list: 1.5 is no rank; give whole numbers\n",
        2,
    ),
    "an interruption": (
        "raise KeyboardInterrupt",
        "error: interrupted: finished files and embeddings are kept, run "
        "the same command again to resume\n",
        130,
    ),
    "a folder that is a file": (
        "open(sys.argv[1] + '/results', 'w')",
        "file.bin/results: Not a directory; free or choose another place\n",
        2,
    ),
    "a full disk": (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "    lore.files.save_tensors(sys.argv[1], {'V': torch.zeros(100_000)})",
        "File too large; free or choose another place\n",
        2,
    ),
    "a full GPU": (
        "raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried\\nto allocate')",
        "error: CUDA out of memory. Tried to allocate\n",
        2,
    ),
    "a full standard output": (
        "sys.stdout = open('/dev/full', 'w')\n    print('x' * 10**5)",
        "error: standard output: No space left on device; free or choose another place\n",
        2,
    ),
}
FORKS = """
import json, os, resource, sys, torch, lore.files, lore.scripts, utils
ended = []
for body, path in json.loads(sys.argv[1]):
    if os.fork() == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(path + name, os.O_WRONLY | os.O_CREAT), number)
        sys.argv[1] = path
        exec("def main():\\n    print('started')\\n    " + body)
        try:
            lore.scripts.run_script(main)
        finally:
            sys.__stdout__.flush()
            sys.stderr.flush()
            os._exit(sys.exc_info()[1].code)
    ended.append(os.waitstatus_to_exitcode(os.wait()[1]))
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """name -> (folder with an old file.bin, exit status, stdout, stderr) of a script whose main() ends like this."""
    paths = {name: tmp_path_factory.mktemp("script") / "file.bin" for name in MAINS}
    for path in paths.values():
        path.write_bytes(b"old")
    bodies = [(MAINS[name][0], str(path)) for name, path in paths.items()]
    status, out, err = outcome(fresh_process(FORKS, json.dumps(bodies)))
    assert status == 0, err
    found = {}
    for (name, path), status in zip(paths.items(), json.loads(out), strict=True):
        out, err = (path.with_name(path.name + end) for end in ("out", "err"))
        found[name] = path.parent, status, out.read_text(), err.read_text()
        out.unlink()
        err.unlink()
    return found


@pytest.mark.parametrize("name", MAINS)
def test_a_script_ends_with_one_line_and_its_status_after(ended, name):
    _, status, out, err = ended[name]
    assert out == "started\n"
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and err.endswith(MAINS[name][1])
    assert status == MAINS[name][2]


def test_a_full_disk_names_the_file_and_leaves_the_old_one_and_nothing_else(ended):
    folder, _, _, err = ended["a full disk"]
    assert (folder / "file.bin").read_bytes() == b"old"
    assert os.listdir(folder) == ["file.bin"]
    assert str(folder / "file.bin") in err


def test_a_script_that_ends_well_and_an_error_of_ours_pass_through():
    ran = []
    lore.scripts.run_script(lambda: ran.append(1))
    assert ran == [1]
    for wrong in (lambda: 1 / 0, lambda: torch.ones(2) @ torch.ones(3)):
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            lore.scripts.run_script(wrong)


def test_importing_utils_changes_no_signal_handler_and_no_global_setting():
    """An interrupt in a notebook stops the cell, not the kernel."""
    code = """
import signal, warnings
import numba, numpy, pandas, pydantic, safetensors.torch, torch, tqdm, torch.distributed
def settings():
    return ([signal.getsignal(number) for number in signal.valid_signals()], list(warnings.filters),
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), numba.get_num_threads())
settings()  # numba starts its threads at the first question, and torch counts others from then on
before = settings()
import utils
assert settings() == before
"""
    status, _, err = outcome(fresh_process(code))
    assert status == 0, err


# ---------------------------------------------------------------------------------------------------------------------
# Settings, devices
# ---------------------------------------------------------------------------------------------------------------------

WRONG = {
    "num_iterations": [-1, 1.5, True, "5", None, math.nan, 2**32],
    "K_list": [[], [1, 1], 3, [1.5], [-1], None, "12"],
    "alpha_list": [[math.nan], [-1.0], [math.inf], [1e16], [1, 1.0], ["1"], 5],
    "seeds": [[-1], [0, 0], []],
    "learning_rate": [0, -0.1, math.nan, math.inf, "0.1", True],
    "threshold": [-0.1, 1.1, math.nan],
    "trials": [0, 2.5],
    "num_shots": [[0], [1.5], []],
    "concentration": [0, math.nan],
    "fractions": [[0], [1.1], []],
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in WRONG.items() for value in values], ids=str
)
def test_a_setting_without_a_meaning_is_refused_by_name(name, value):
    with input_error(name):
        utils.check_settings(**{name: value})


def test_settings_that_mean_something_pass():
    utils.check_settings(
        num_iterations=np.int64(5),
        K_list=range(3),
        alpha_list=np.array([0, 0.5]),
        seeds=(0, 1),
        learning_rate=np.float32(0.1),
        threshold=0,
        fractions=(0.1, 0.1, 1.0),
        num_shots=[5, 10],
    )


@pytest.mark.parametrize("device", ["cuda:99", "no device", 1.5, [], "meta:x"], ids=str)
def test_a_device_that_is_not_there_is_refused(device):
    with input_error("device", str(device), "cpu"):
        utils.check_device(device)
    assert (
        utils.check_device("cpu") == utils.check_device(torch.device("cpu")) == torch.device("cpu")
    )


def test_a_wrong_option_of_a_script_is_an_input_error_and_help_is_none(capsys, monkeypatch):
    parser = lore.scripts.script_parser("what it does", "/folder")
    assert (
        isinstance(parser, argparse.ArgumentParser) and str(parser.parse_args([]).dir) == "/folder"
    )
    with input_error("--no-such", "--help"):
        parser.parse_args(["--no-such"])
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0 and "what it does" in capsys.readouterr().out


def test_json_comes_back_with_arrays_as_lists_and_a_damaged_or_missing_one_is_refused(tmp_path):
    path = tmp_path / "a.json"
    lore.files.save_json(
        path, {"a": np.arange(2), "b": torch.ones(1), "c": range(2), "é": np.float32(0.5)}
    )
    assert lore.files.load_json(path, "a") == {"a": [0, 1], "b": [1.0], "c": [0, 1], "é": 0.5}
    assert json.loads(path.read_text())["c"] == [0, 1]
    with input_error(str(path), "nowhere"):
        lore.files.load_json(path, "nowhere")
    for damaged in (path.read_text()[:-5], "[1]", ""):
        path.write_text(damaged)
        with input_error(str(path), "write it again"):
            lore.files.load_json(path, "a")
    with input_error("no such file", "prepare.py"):
        lore.files.load_json(tmp_path / "b.json")


PUBLIC_NAMES = """
    np torch random run run_regularized run_few_shot_vary_shots LoRe LoRe_regularized PersonalizeBatch solve
    solve_regularized solve_regularized_simplex learn_multiple_few_shot learn_multiple learn_single_reward
    learn_single_reward_regularized evaluate_model eval_multiple sample_shots simulate_user simulate_population
    generate_population generate_popupulation create_sparse_tensor create_dataset_prism create_dataset_prism_shots
    Pairs""".split()


def test_star_import_gives_every_public_name_and_prints_nothing():
    code = "import sys\nfrom utils import *\nsys.exit(repr([name for name in sys.argv[1:] if name not in globals()]))"
    status, out, err = outcome(fresh_process(code, *PUBLIC_NAMES))
    assert (out, err) == ("", "[]\n")


def test_a_standard_output_that_the_shell_has_closed_is_none():
    code = "import sys, lore.scripts; sys.stdout = None; lore.scripts.run_script(lambda: print('into nothing'))"
    assert outcome(fresh_process(code)) == (0, "", "")
