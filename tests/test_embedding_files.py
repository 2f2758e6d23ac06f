"""Files of embeddings: what their record says is checked, and results of others do not stay."""

import json
import os

import pytest
import torch
from helpers import input_error, writes_complex
from safetensors.torch import save_file

from lore.embedding_files import (
    HEAD_FILE,
    embeddings_are_finished,
    find_reward_head,
    new_embeddings,
)
from lore.files import digest_of, load_tensors

d = 4
HEAD = torch.arange(4.0).reshape(d, 1)
IDENTITY = {
    "model": "a/model",
    "data": "1" * 8,
    "reward_head": digest_of(HEAD.tolist()),
    "weights": "2" * 8,
    "backbone": "5" * 8,
    "tokenizer": "3" * 8,
}


def write_embeddings(folder, identity=IDENTITY, **provenance) -> None:
    """The file `a.pkl`, which holds no embeddings, with the head beside it."""
    with new_embeddings(folder, HEAD, identity, **provenance) as new:
        (new / "a.pkl").write_text("embeddings")


def reward_head(folder):
    return find_reward_head(folder, "a/model", "Own", {d: "a.pkl"}, ["a.pkl"])


def write_record(folder, **record) -> None:
    """Embeddings whose record is these JSON values."""
    folder.mkdir(exist_ok=True)
    (folder / "a.pkl").write_text("embeddings")
    save_file({"reward_head": HEAD}, folder / HEAD_FILE, {"about": json.dumps(record)})


# ---- The record


def test_what_is_written_is_found_again(tmp_path):
    write_embeddings(tmp_path, model="a/model", data="mine.jsonl")
    head, provenance = reward_head(tmp_path)
    assert torch.equal(head, HEAD)
    assert provenance["title"] == "Own (mine.jsonl)"
    assert provenance["identity"] == IDENTITY
    assert embeddings_are_finished([tmp_path / "a.pkl"], IDENTITY, False)
    with input_error("data", "--overwrite"):
        embeddings_are_finished([tmp_path / "a.pkl"], {**IDENTITY, "data": "other"}, False)


@pytest.mark.parametrize("value", [[], ["a"], "text", 3, 2.5, None, True], ids=repr)
@pytest.mark.parametrize("key", ["identity", "files", "model", "data"])
def test_a_record_of_another_shape_ends_in_one_line(tmp_path, key, value):
    write_record(tmp_path, **{key: value})
    if isinstance(value, str) and key in ("model", "data"):
        reward_head(tmp_path)  # that is what a name looks like
        return
    with input_error(HEAD_FILE, repr(key), "write it again"):
        reward_head(tmp_path)
    with input_error("finished embeddings", "unknown", "--overwrite"):
        embeddings_are_finished([tmp_path / "a.pkl"], IDENTITY, False)


@pytest.mark.parametrize("record", ["[]", "[[[]]]", '"files"', "7", "null", "[" * 500 + "]" * 500])
def test_a_record_that_is_no_object_ends_in_one_line(tmp_path, record):
    write_record(tmp_path)
    save_file({"reward_head": HEAD}, tmp_path / HEAD_FILE, {"about": record})
    with input_error(HEAD_FILE, "write it again"):
        reward_head(tmp_path)


@pytest.mark.parametrize(
    "dtype", ["int64", "bool", pytest.param("complex64", marks=writes_complex), "uint8"]
)
def test_a_head_that_is_no_head_ends_in_one_line(tmp_path, dtype):
    write_record(tmp_path)
    save_file({"reward_head": HEAD.to(getattr(torch, dtype))}, tmp_path / HEAD_FILE)
    with input_error(HEAD_FILE, "different models"):
        reward_head(tmp_path)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float64"])
def test_a_head_of_any_precision_is_float32(tmp_path, dtype):
    write_record(tmp_path)
    save_file({"reward_head": HEAD.to(getattr(torch, dtype))}, tmp_path / HEAD_FILE)
    head, _ = reward_head(tmp_path)
    assert head.dtype == torch.float32
    assert torch.equal(head, HEAD)


def test_digests_of_any_shape_are_no_digests(tmp_path):
    for digest in ([], {"a": 1}, 7, None):
        write_record(tmp_path, files={"a.pkl": digest}, identity={"data": digest})
        with input_error("a.pkl", "make the embeddings again"):
            reward_head(tmp_path)
        with input_error("other data"):
            embeddings_are_finished([tmp_path / "a.pkl"], IDENTITY, False)


def test_embeddings_of_other_rows_say_that_a_setting_may_select_them(tmp_path):
    write_embeddings(tmp_path)
    other = {**IDENTITY, "data": "other", "weights": "other", "backbone": "other"}
    with input_error("of other ", "--limit", "weights or config (model") as message:
        embeddings_are_finished([tmp_path / "a.pkl"], other, False)
    assert message().count("weights") == 1


def test_names_can_be_printed_and_written(tmp_path):
    """That of the data is a file's name, which may be any bytes."""
    write_embeddings(tmp_path, model="m\x1b[2K", data="\udcff\n.jsonl")
    _, provenance = reward_head(tmp_path)
    assert provenance["title"] == r"Own (\udcff\n.jsonl)"
    assert provenance["model"] == r"m\x1b[2K"
    with input_error(r"m\x1b[2K", r"\udcff\n.jsonl"):
        embeddings_are_finished([tmp_path / "a.pkl"], {**IDENTITY, "data": "other"}, False)


# ---- Results of other embeddings

OTHER = {**IDENTITY, "data": "4" * 8}


def write_results(folder, identity, name="results.json") -> None:
    """Results that say of which embeddings they are, and PRISM's checkpoints beside them."""
    for subfolder in ("results", "checkpoints"):
        (folder / subfolder).mkdir(exist_ok=True)
    (folder / "results" / name).write_text(json.dumps({"identity": identity}))
    (folder / "results" / "K_2.safetensors").write_text("a basis")
    (folder / "results" / ".training.pt").write_text("names its data itself")
    (folder / "checkpoints" / "PRISM_V_lore_K_2.pt").write_text("a basis")


def names_in(folder) -> set[str]:
    return set(os.listdir(folder))


NAMES = {"results.json", "K_2.safetensors"}


def test_results_of_other_embeddings_are_moved_aside_and_that_is_said(tmp_path, capsys):
    write_embeddings(tmp_path, OTHER)
    write_results(tmp_path, OTHER)
    capsys.readouterr()
    write_embeddings(tmp_path, IDENTITY)
    assert load_tensors(tmp_path / HEAD_FILE)[1]["identity"] == IDENTITY
    assert names_in(tmp_path / "results") == {"earlier-1", ".training.pt"}
    assert names_in(tmp_path / "results" / "earlier-1") == NAMES
    assert names_in(tmp_path / "checkpoints") == {"earlier-1"}
    assert names_in(tmp_path / "checkpoints" / "earlier-1") == {"PRISM_V_lore_K_2.pt"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("results", "checkpoints")):
        assert str(tmp_path / name / "earlier-1") in line


def test_the_next_ones_are_moved_beside_those(tmp_path):
    for identity in (OTHER, IDENTITY, OTHER):
        write_embeddings(tmp_path, identity)
        write_results(tmp_path, identity)
    results = tmp_path / "results"
    assert names_in(results) == {*NAMES, ".training.pt", "earlier-1", "earlier-2"}
    for folder, identity in (("earlier-1", OTHER), ("earlier-2", IDENTITY), (".", OTHER)):
        content = json.loads((results / folder / "results.json").read_text())
        assert content == {"identity": identity}


def test_results_of_the_same_embeddings_stay(tmp_path, capsys):
    """They were made again, perhaps after a file was lost; under another name of the model."""
    for name in ("results.json", "vary_fewshot.json", "vary_questions.json"):
        folder = tmp_path / name
        write_embeddings(folder)
        write_results(folder, IDENTITY, name)
        write_embeddings(folder, {**IDENTITY, "model": "/same/model"})
        assert names_in(folder / "results") == {name, "K_2.safetensors", ".training.pt"}
        assert names_in(folder / "checkpoints") == {"PRISM_V_lore_K_2.pt"}
    assert capsys.readouterr().out == ""


def test_named_sweeps_stay_or_go_as_the_embeddings_that_they_are_of(tmp_path):
    for number, identity in enumerate((IDENTITY, OTHER)):
        folder = tmp_path / str(number)
        named = folder / "results" / "second"
        named.mkdir(parents=True)
        (named / "results.json").write_text(json.dumps({"identity": identity}))
        write_embeddings(folder)
        assert named.exists() == (identity == IDENTITY)
        moved = folder / "results" / "earlier-1" / "second" / "results.json"
        assert moved.exists() == (identity == OTHER)


def test_few_shot_curves_of_other_embeddings_do_not_stay_beside_results_of_these(tmp_path):
    write_results(tmp_path, IDENTITY)
    write_results(tmp_path, OTHER, "vary_fewshot.json")
    write_embeddings(tmp_path)
    assert names_in(tmp_path / "results" / "earlier-1") == {*NAMES, "vary_fewshot.json"}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"identity": null}', '{"identity": 7}'])
def test_results_that_do_not_say_of_what_they_are_do_not_stay(tmp_path, content):
    write_results(tmp_path, IDENTITY)
    (tmp_path / "results" / "results.json").write_text(content)
    write_embeddings(tmp_path)
    assert names_in(tmp_path / "results" / "earlier-1") == NAMES


def test_a_checkpoint_without_results_does_not_stay(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "PRISM_V_lore_K_2.pt").write_text("a basis")
    write_embeddings(tmp_path)
    assert names_in(tmp_path / "checkpoints") == {"earlier-1"}


def test_embeddings_that_fail_leave_all_as_it_was(tmp_path):
    write_embeddings(tmp_path, OTHER)
    write_results(tmp_path, OTHER)
    with pytest.raises(KeyboardInterrupt):
        with new_embeddings(tmp_path, HEAD, IDENTITY):
            raise KeyboardInterrupt
    assert names_in(tmp_path / "results") == {*NAMES, ".training.pt"}
    assert load_tensors(tmp_path / HEAD_FILE)[1]["identity"] == OTHER


def test_without_results_nothing_is_made_or_said(tmp_path, capsys):
    write_embeddings(tmp_path)
    (tmp_path / "results").mkdir()
    write_embeddings(tmp_path, OTHER)
    assert names_in(tmp_path) == {"a.pkl", HEAD_FILE, "results"}
    assert names_in(tmp_path / "results") == set()
    assert capsys.readouterr().out == ""
