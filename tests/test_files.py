"""Files: whole or not at all, and no code of a stranger's pickle runs. Scripts: one line and status 2."""

import builtins
import collections
import io
import os
import pickle
import random
import subprocess
import time
import zipfile

import numpy as np
import pytest
import torch
from helpers import fresh_process, input_error, outcome

import utils
from utils import load_pickle, load_tensors, save_tensors

PROTOCOLS = [2, 3, 4, 5]


def vector(seed):
    return torch.randn(16, generator=torch.Generator().manual_seed(seed)).bfloat16()


def tldr_content():
    """The released format: worker -> comparisons, embeddings in lists of one bfloat16 tensor."""
    return {worker: [{"text": "post", "winning_summary": "good", "losing_summary": "bad",
                      "embeddings": {"winning": [vector(i)], "losing": [vector(i + 9)]}} for i in range(3)]
            for worker in ("worker é", "other")}


def prism_content():
    return [{"prompt": [{"role": "user", "content": "hello"}],
             "extra_info": {"user_id": "u1", "turn_nb": 0, "seen": True, "score": 0.5, "none": None,
                            "chosen_conv_embedding": vector(1),
                            "rejected_conv_embedding": torch.stack([vector(2), vector(3)])}}]


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


WRITERS = {**{f"pickle {protocol}": lambda content, protocol=protocol: pickle.dumps(content, protocol)
              for protocol in PROTOCOLS},
           "torch": saved, "torch legacy": lambda content: saved(content, _use_new_zipfile_serialization=False)}
every_format = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "embeddings.pkl"


# ---------------------------------------------------------------------------------------------------------------------
# Pickles that load
# ---------------------------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("content", [tldr_content(), prism_content(), {}, []], ids=["TLDR", "PRISM", "dict", "list"])
def test_what_the_released_scripts_wrote_loads(path, content, write):
    path.write_bytes(write(content))
    assert_equal_content(load_pickle(path), content)
    assert_equal_content(load_pickle(str(path)), content)


@every_format
def test_tensors_of_every_kind_load(path, write):
    basis = torch.arange(12.0).reshape(3, 4)
    content = [basis.to(dtype) for dtype in (torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool)]
    content += [basis.T, basis[1:, ::2], torch.zeros(0, 3), torch.tensor(2.5)]
    path.write_bytes(write(content))
    assert_equal_content(load_pickle(path), content)


@every_format
def test_plain_containers_of_every_kind_load(path, write):
    content = [{1, "two"}, (b"two", b"three"), collections.OrderedDict(four=4), torch.Size([2, 3]), None, 5.5]
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
    lengths = {*range(1, 40), *range(40, len(whole), max(1, len(whole) // 60)), *range(len(whole) - 20, len(whole))}
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
    for text in (b"<!DOCTYPE html><html>429 Too Many Requests</html>", b"version https://git-lfs.github.com/spec/v1\n",
                 b"\x1f\x8b\x08\x00gzip", b"PK\x03\x04 not a zip"):
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
PAYLOADS = {"posix.system": lambda marker: Calls(os.system, f"touch {marker}"),
            "eval": lambda marker: Calls(builtins.eval, f"open({str(marker)!r}, 'w').close()"),
            "exec": lambda marker: Calls(builtins.exec, f"open({str(marker)!r}, 'w').close()"),
            "Popen": lambda marker: Calls(subprocess.Popen, ["touch", str(marker)]),
            "getattr": lambda marker: Calls(getattr, Calls(open, str(marker), "w"), "close"),
            "torch.serialization.load": lambda marker: Calls(torch.load, str(marker))}  # itself able to run code


def fake_storage(blob):
    """A pickle in which a tensor's memory is the given bytes."""
    return pickle.dumps(Calls(torch.storage._load_from_bytes, blob))


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
    **{f"pickle {protocol}": lambda payload, protocol=protocol: pickle.dumps({"worker": [payload]}, protocol)
       for protocol in range(6)},
    "torch": lambda payload: saved([payload]),
    "torch legacy": lambda payload: saved([payload], _use_new_zipfile_serialization=False),
    "torch zip": lambda payload: in_torch_zip(pickle.dumps(payload)),
    "storage": lambda payload: fake_storage(pickle.dumps(payload)),
    "legacy storage": lambda payload: fake_storage(with_legacy_magic(pickle.dumps(payload, 2))),
    "storage in storage": lambda payload: fake_storage(with_legacy_magic(fake_storage(saved(
        [payload], _use_new_zipfile_serialization=False))))}


@pytest.mark.parametrize("hide", HIDING_PLACES.values(), ids=HIDING_PLACES)
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_hostile_pickle_is_refused_by_name_and_runs_nothing(path, tmp_path, name, hide):
    marker = tmp_path / "marker"
    path.write_bytes(hide(PAYLOADS[name](marker)))
    named = "refused" if hide is HIDING_PLACES["storage"] else name  # a storage that is no file of torch.save
    with input_error(str(path), "refused", named, "do not trust"):
        load_pickle(path)
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


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_program_is_refused(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))
    with input_error(str(path), "refused", "TorchScript"):
        load_pickle(path)
    path.write_bytes(fake_storage(path.read_bytes()))
    with input_error(str(path), "refused", "memory"):
        load_pickle(path)


@pytest.mark.parametrize("array", [np.ones(2), np.float64(1), Calls(np.ndarray, (1,), np.dtype(object), b"A" * 8)])
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
    tensors = {"V": V.T, "W": vector(0), "part": torch.zeros(6)[2:4], "leaf": torch.ones(2, requires_grad=True)}
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
            whole.replace(b"314159", b"31415["), b"<html>429 Too Many Requests</html>"]:
        assert damaged != whole
        path.write_bytes(damaged)
        with input_error(str(path)):
            load_tensors(path)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_and_its_folder_with_it(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    with utils.atomic_write(path) as file:
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
        with utils.atomic_write(path) as file:
            file.write(b"new")
            file.flush()
            raise failure
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_files_written_together_replace_the_old_ones_together_or_not_at_all(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with utils.together(tmp_path) as new:
            (new / "a").write_text("new")
            raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}
    (tmp_path / ".new-left").mkdir()  # by a process that was killed two hours ago
    os.utime(tmp_path / ".new-left", (time.time() - 7200,) * 2)
    with utils.together(tmp_path) as new:
        (new / "a").write_text("new")
        (new / "c").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "old", "c": "new"}


def test_a_folder_is_proved_writable_before_long_work_and_left_empty(tmp_path):
    utils.check_writable(tmp_path / "results")
    assert os.listdir(tmp_path / "results") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError):
        utils.check_writable(tmp_path / "file" / "results")


# ---------------------------------------------------------------------------------------------------------------------
# Scripts, in processes of their own
# ---------------------------------------------------------------------------------------------------------------------

MAINS = {
    "an input error": ("raise utils.InputError('K_list: 1.5 is no rank;\\n give whole numbers')",
                       "error: K_list: 1.5 is no rank; give whole numbers\n"),
    "an interruption": ("raise KeyboardInterrupt", "error: interrupted: finished files and embeddings are kept, "
                                                   "run the same command again to resume\n"),
    "a folder that is a file": ("open(sys.argv[1] + '/results', 'w')",
                                "file.bin/results: Not a directory; free or choose another place and run again\n"),
    "a full disk": ("resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
                    "    utils.save_tensors(sys.argv[1], {'V': torch.zeros(100_000)})",
                    "File too large; free or choose another place and run again\n")}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """name -> (folder with an old file.bin, exit status, stdout, stderr) of a script whose main() ends like this."""
    processes = {}
    for name, (body, _) in MAINS.items():
        folder = tmp_path_factory.mktemp("script")
        (folder / "file.bin").write_bytes(b"old")
        code = ("import resource, sys, torch, utils\ndef main():\n    print('started')\n"
                f"    {body}\nutils.run_script(main)")
        processes[name] = folder, fresh_process(code, folder / "file.bin")
    return {name: (folder, *outcome(process)) for name, (folder, process) in processes.items()}


@pytest.mark.parametrize("name", MAINS)
def test_a_script_ends_with_one_line_and_status_2_after(ended, name):
    _, status, out, err = ended[name]
    assert status == 2
    assert out == "started\n"
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and err.endswith(MAINS[name][1])


def test_a_full_disk_names_the_file_and_leaves_the_old_one_and_nothing_else(ended):
    folder, _, _, err = ended["a full disk"]
    assert (folder / "file.bin").read_bytes() == b"old"
    assert os.listdir(folder) == ["file.bin"]
    assert str(folder / "file.bin") in err


def test_a_script_that_ends_well_and_an_error_of_ours_pass_through():
    ran = []
    utils.run_script(lambda: ran.append(1))
    assert ran == [1]
    with pytest.raises(ZeroDivisionError):
        utils.run_script(lambda: 1 / 0)


PUBLIC_NAMES = """
    np torch random run run_regularized run_few_shot_vary_shots LoRe LoRe_regularized PersonalizeBatch solve
    solve_regularized solve_regularized_simplex learn_multiple_few_shot learn_multiple learn_single_reward
    evaluate_model eval_multiple sample_shots simulate_user simulate_population generate_population
    generate_popupulation create_sparse_tensor create_dataset_prism create_dataset_prism_shots load_reward_model
    load_reward_head embed_conversations Pairs load_pickle""".split()


def test_star_import_gives_every_public_name_and_prints_nothing():
    code = "import sys\nfrom utils import *\nsys.exit(repr([name for name in sys.argv[1:] if name not in globals()]))"
    status, out, err = outcome(fresh_process(code, *PUBLIC_NAMES))
    assert (out, err) == ("", "[]\n")
