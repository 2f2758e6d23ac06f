"""How scripts end: one line on stderr and an exit status; and the command line they share."""

import argparse
import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from helpers import fresh_process, input_error, outcome

import lore.scripts

# Name -> (body of a script's main, end of the line on stderr, exit status).
ENDINGS = {
    "an input error": (
        "raise utils.InputError('K_list: 1.5 is no rank;\\n give whole numbers')",
        "error: K_list: 1.5 is no rank; give whole numbers\n",
        2,
    ),
    "a hostile name": (
        "raise utils.InputError('a\\x1b[2K\\x1b[1A\\u202egnp.json: damaged; write it again')",
        "error: a\\x1b[2K\\x1b[1A\\u202egnp.json: damaged; write it again\n",
        2,
    ),
    "a folder with a hostile name": (
        "open(sys.argv[1] + '\\x1b[2K/results', 'w')",
        "file.bin\\x1b[2K/results: No such file or directory; free or choose another place\n",
        2,
    ),
    "an interruption": (
        "raise KeyboardInterrupt",
        "error: interrupted: finished files, finished embeddings and a training up to its last "
        "minute are kept; run the same command again to resume\n",
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

# Runs each main in a fork of one process, so that the libraries are imported once, and prints the
# list of exit statuses. A main finds the path of its file in sys.argv[1].
RUN_EACH = """
import json, os, resource, sys, torch, lore.files, lore.scripts, utils
statuses = []
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
    statuses.append(os.waitstatus_to_exitcode(os.wait()[1]))
print(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Name -> (folder with an old file.bin, exit status, stdout, stderr) of a script that ended."""
    paths = {name: tmp_path_factory.mktemp("script") / "file.bin" for name in ENDINGS}
    for path in paths.values():
        path.write_bytes(b"old")
    jobs = [(body, str(paths[name])) for name, (body, _, _) in ENDINGS.items()]
    status, out, err = outcome(fresh_process(RUN_EACH, json.dumps(jobs)))
    assert status == 0, err
    results = {}
    for (name, path), script_status in zip(paths.items(), json.loads(out), strict=True):
        printed = []
        for end in ("out", "err"):
            file = path.with_name(path.name + end)
            printed.append(file.read_text())
            file.unlink()
        results[name] = path.parent, script_status, *printed
    return results


@pytest.mark.parametrize("name", ENDINGS)
def test_a_script_ends_with_one_line_and_its_status_after(ended, name):
    _, line_end, expected_status = ENDINGS[name]
    _, status, out, err = ended[name]
    assert out == "started\n"
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert err.endswith(line_end)
    assert status == expected_status


def test_a_full_disk_names_the_file_and_leaves_the_old_one_and_nothing_else(ended):
    folder, _, _, err = ended["a full disk"]
    assert (folder / "file.bin").read_bytes() == b"old"
    assert os.listdir(folder) == ["file.bin"]
    assert str(folder / "file.bin") in err


def test_a_script_that_ends_well_just_returns():
    calls = []
    lore.scripts.run_script(lambda: calls.append(1))
    assert calls == [1]


@pytest.mark.parametrize(
    "main, error",
    [
        (lambda: 1 / 0, ZeroDivisionError),
        (lambda: torch.ones(2) @ torch.ones(3), RuntimeError),
    ],
    ids=["Python", "torch"],
)
def test_an_error_in_our_own_code_keeps_its_traceback(main, error):
    with pytest.raises(error):
        lore.scripts.run_script(main)


def test_a_standard_output_that_the_shell_has_closed_is_no_error():
    code = """
import sys, lore.scripts
sys.stdout = None
lore.scripts.run_script(lambda: print('into nothing'))
"""
    assert outcome(fresh_process(code)) == (0, "", "")


# ---- The command line


def test_a_sweep_with_a_name_has_a_folder_of_its_own(tmp_path):
    assert lore.scripts.sweep_folder(tmp_path, None) == tmp_path
    for name in ("second", "alpha_0-1", "7", "größer"):
        assert lore.scripts.sweep_folder(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/tmp", "../up", "K_3.safetensors", "a b", "a\n", "earlier-1"]
)
def test_a_sweep_has_a_plain_name_that_no_file_of_results_has(tmp_path, name):
    with input_error("--results", "letters, digits, - and _"):
        lore.scripts.sweep_folder(tmp_path, name)


@pytest.mark.parametrize(
    "typed, start, folder, command",
    [
        ("prepare.py", "data", "data", "python train_basis.py"),
        ("data/prepare.py", ".", "data", "python data/train_basis.py"),
        ("data/prepare.py", ".", "mine", "python data/train_basis.py --dir mine"),
        ("prepare.py", "data", "../my own", "python train_basis.py --dir '../my own'"),
        ("../data/prepare.py", "mine", ".", "python ../data/train_basis.py --dir ."),
        ("prepare.py", "data", ".", "python train_basis.py"),
    ],
)
def test_the_next_command_runs_from_where_the_user_is(
    monkeypatch, tmp_path, typed, start, folder, command
):
    for name in ("data", "mine", "my own"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / start)
    monkeypatch.setattr("sys.argv", [typed])
    path = tmp_path / "data" if folder == "data" else Path(folder)  # the default is absolute
    assert lore.scripts.next_command("train_basis.py", path) == command
    (tmp_path / "data" / "train_basis.py").write_text("")
    assert Path(shlex.split(command)[1]).exists()


def test_every_script_has_an_option_for_its_folder():
    parser = lore.scripts.script_parser("what it does", "/folder")
    assert isinstance(parser, argparse.ArgumentParser)
    assert str(parser.parse_args([]).dir) == "/folder"


def test_a_wrong_option_is_an_input_error():
    parser = lore.scripts.script_parser("what it does", "/folder")
    with input_error("--no-such", "--help"):
        parser.parse_args(["--no-such"])


def test_help_is_no_error(capsys):
    parser = lore.scripts.script_parser("what it does", "/folder")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0
    assert "what it does" in capsys.readouterr().out
