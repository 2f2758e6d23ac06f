"""PRISM as a user runs it: the released split, honest pairs, RewardBench 2, and every slip."""

import csv
import datetime
import functools
import gzip
import hashlib
import json
import math
import pickle
import shutil
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpora import PLANTED_RANK
from demos import (
    EMBEDDINGS,
    FINAL,
    content_of,
    interrupted,
    plain,
    printed,
    quick,
    results_in,
    rows_in,
    start,
    state_alone,
    two_processes,
    without_forward,
    write_rows,
)
from helpers import (
    ROOT,
    call,
    fresh_process,
    input_error,
    load_script,
    outcome,
    refused,
    sign_again,
)
from safetensors.torch import load_file, save_file

import lore.embedding
import lore.embedding_files
import lore.files
import lore.reward_model
import lore.scripts
import prism
from lore.normal_forms import prompt_key

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPTS = ROOT / "PRISM"
TRAIN, TEST = EMBEDDINGS["PRISM"]
GENERATE = "generate-prism-embeddings"

Rows = list[dict[str, Any]]

script = functools.partial(load_script, "PRISM")


@pytest.fixture
def trainer(monkeypatch):
    """train_basis.py with the reference model alone, which takes no training."""
    return quick(monkeypatch, script("train_basis"), K_list=[0], demo_K_list=[0])


def embedded_rows(folder: Path) -> list[Rows]:
    """The rows of the train file and of the test file of embeddings in a folder."""
    return [torch.load(folder / name, weights_only=True) for name in (TRAIN, TEST)]


def infos(rows: Rows, seen: bool) -> Rows:
    """The `extra_info` of the rows of seen or of unseen users."""
    return [row["extra_info"] for row in rows if row["extra_info"]["seen"] == seen]


def prepared(folder: Path) -> tuple[dict, Rows, Rows]:
    """What prepare.py wrote: (split.json, rows of train.parquet, rows of test.parquet)."""
    folder = folder / "data" / "prism"
    split = json.loads((folder / "split.json").read_text())
    train, test = (
        json.loads(pd.read_parquet(folder / f"{name}.parquet").to_json(orient="records"))
        for name in ("train", "test")
    )
    return split, train, test


# ---- The demo, the formats, the results


def test_demo_says_that_it_is_synthetic_and_rises_to_the_planted_rank(ran):
    assert "stand-in" in ran.printed["prepare"]
    assert "synthetic" in ran.printed["prepare"]
    assert "synthetic" in ran.printed["train_basis"]
    assert "demo settings" in ran.printed["train_basis"]
    assert "synthetic" in ran.results["config"]["data"]
    unseen = {fit["K"]: fit["mean_accuracy"][FINAL] for fit in ran.results["fits"]}
    assert unseen[1] < unseen[2]
    assert unseen[PLANTED_RANK] > unseen[1] + 0.2


def test_demo_writes_what_its_scripts_say(ran):
    split_files = {"train.parquet", "test.parquet", "split.json", "about_users.json"}
    assert set(content_of(ran.folder / "data" / "prism")) == split_files
    fits = ran.results["fits"]
    assert [fit["K"] for fit in fits] == script("train_basis").demo_K_list
    checkpoints = ran.folder / "checkpoints"
    expected = {
        f"PRISM_{tensor}_lore_K_{fit['K']}_alpha_{fit['alpha']}.pt"
        for fit in fits
        for tensor in "VW"
    }
    assert set(content_of(checkpoints)) == expected
    for fit in fits:
        tensors = load_file(ran.folder / "results" / fit["file"])
        for name in "VW":
            path = checkpoints / f"PRISM_{name}_lore_K_{fit['K']}_alpha_{fit['alpha']}.pt"
            assert torch.equal(torch.load(path, weights_only=True), tensors[name])
        survived = f"rank {fit['K']}, seed 0: {fit['columns']} of {fit['K']} columns"
        assert fit["K"] == 0 or survived in ran.printed["train_basis"]
    assert (ran.folder / "results" / "accuracy_by_rank.png").read_bytes().startswith(b"\x89PNG")


def test_results_agree_with_the_saved_tensors_and_the_embeddings(ran):
    (fit,) = (fit for fit in ran.results["fits"] if fit["K"] == PLANTED_RANK)
    tensors = load_file(ran.folder / "results" / fit["file"])
    V = tensors["V"].double()
    weights = dict(zip(ran.results["unseen_users"], tensors["W_unseen"].double()))
    margins = {user: [] for user in weights}
    for info in infos(embedded_rows(ran.folder)[1], seen=False):
        user = info["user_id"]
        for rejected in info["rejected_conv_embedding"]:
            x = info["chosen_conv_embedding"].double() - rejected.double()
            margins[user].append(float(x @ V @ weights[user]))
    accuracies = {user: np.mean(np.array(values) > 0) for user, values in margins.items()}
    # float32 may turn a margin near 0
    assert fit["accuracy_of_user"][FINAL] == pytest.approx(accuracies, abs=0.1)
    mean = np.mean(list(accuracies.values()))
    assert fit["mean_accuracy"][FINAL] == pytest.approx(mean, abs=0.02)


def test_shots_are_conversations_of_which_users_have_three(monkeypatch, capsys, embeddings):
    module = quick(
        monkeypatch,
        script("vary_fewshot"),
        num_shots=[1, 3, 5],
        K_list=[3],
        num_iterations=100,
        trials=5,
    )
    call(monkeypatch, module, "--dir", embeddings)
    results = json.loads((embeddings / "results" / "vary_fewshot.json").read_text())
    assert results["shots_are"] == "conversations"
    assert results["shots_of_the_mean_user"] == [1, 3, 3]
    assert "not every unseen user has more than 3 conversations" in capsys.readouterr().out
    (curve,) = results["curves"]
    assert curve["unseen_std"][0] > 1e-3
    assert curve["unseen_std"][1:] == pytest.approx([0, 0], abs=1e-9)


def test_two_processes_give_the_same_embeddings_and_nearly_the_same_basis(ran, tmp_path):
    shutil.copytree(ran.folder / "data", tmp_path / "data")
    first, second = two_processes(SCRIPTS, GENERATE, "--dir", tmp_path, "--model", ran.model)
    assert "next: " in first and second == ""
    assert plain(embedded_rows(tmp_path)) == plain(embedded_rows(ran.folder))
    single = ran.copy_to(tmp_path / "single")
    few = dict(demo_K_list=[0, PLANTED_RANK], demo_num_iterations=200)
    alone = start(SCRIPTS, "train_basis", "--dir", single, **few)
    first, second = two_processes(SCRIPTS, "train_basis", "--dir", tmp_path, **few)
    assert first.count(f"Rank : {PLANTED_RANK}") == 1 and second == ""
    assert printed(alone)
    for fit, expected in zip(results_in(tmp_path)["fits"], results_in(single)["fits"], strict=True):
        assert fit["mean_accuracy"] == pytest.approx(expected["mean_accuracy"], abs=0.03)


# ---- The split


def message(turn: int | str, role: str, content: Any, if_chosen: bool | None = None) -> dict:
    return {"turn": turn, "role": role, "content": content, "if_chosen": if_chosen}


def turn(number: int, name: str = "") -> list[dict]:
    """One user message, a chosen and a rejected response."""
    return [
        message(number, "user", f"question {name}{number}"),
        message(number, "model", f"good {name}{number}", True),
        message(number, "model", f"bad {name}{number}", False),
    ]


def conversation(name: str, user: str, history: list[dict]) -> dict:
    return {"conversation_id": name, "user_id": user, "conversation_history": history}


@pytest.fixture
def corpus():
    """Survey and conversations of 23 users with none to eight conversations each.

    Two lists of rows, which a test may spoil. A user's conversations are not in one piece.
    """
    survey = [{"user_id": f"user{i}", "num_completed_conversations": i % 9} for i in range(23)]
    owners = []
    for user in survey:
        owners += [user["user_id"]] * user["num_completed_conversations"]
    conversations = [
        conversation(f"c{i}", user, turn(0, f"{i}.") + turn(1, f"{i}."))
        for i, user in enumerate(owners[::2] + owners[1::2])
    ]
    return survey, conversations


def conversations_of(corpus: tuple[Rows, Rows], user: str) -> Rows:
    return [row for row in corpus[1] if row["user_id"] == user]


def write(folder: Path, corpus: tuple[Rows, Rows]) -> Path:
    for name, rows in zip(("survey", "conversations"), corpus):
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def prepare(
    monkeypatch: pytest.MonkeyPatch, folder: Path, corpus: tuple[Rows, Rows], *arguments: str
) -> tuple[dict, Rows, Rows]:
    """Run prepare.py on a corpus -> (split.json, rows of train.parquet, of test.parquet)."""
    source = write(folder / "source", corpus)
    out = folder / "out"
    call(monkeypatch, script("prepare"), "--data", source, "--dir", out, *arguments)
    return prepared(out)


def numpy_split(survey: Rows, conversations: Rows) -> list[tuple[str, bool, list, list]]:
    """The released split, from its description: [(user, seen, train and test conversations)]."""
    rng = np.random.RandomState(123)
    users = np.array(
        [user["user_id"] for user in survey if user["num_completed_conversations"] > 0]
    )
    rng.shuffle(users)
    split = []
    for place, user in enumerate(users):
        ids = np.array([c["conversation_id"] for c in conversations if c["user_id"] == user])
        if len(ids) > 5:
            rng.shuffle(ids)
            seen = bool(place < int(0.8 * len(users)))
            half = len(ids) // 2
            split.append((str(user), seen, list(ids[:half]), list(ids[half:])))
    return split


def test_split_is_the_function_of_seed_123_that_was_released_in_any_process(
    monkeypatch, tmp_path, corpus
):
    split, train, test = expected = prepare(monkeypatch, tmp_path, corpus)
    process = fresh_process(
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')",
        SCRIPTS / "prepare.py",
        "--data",
        tmp_path / "source",
        "--dir",
        tmp_path / "other",
        PYTHONHASHSEED="7",
    )
    users = numpy_split(*corpus)
    written = split["users"].items()
    assert [(user, of["seen"], of["train"], of["test"]) for user, of in written] == users
    assert {seen for _, seen, _, _ in users} == {True, False}
    assert len(users) == 6
    for rows, name, part in ((train, "train", 2), (test, "test", 3)):
        found = []
        for info in (row["extra_info"] for row in rows):
            found.append((info["user_id"], info["seen"], info["dialog_id"], info["turn_nb"]))
            assert (info["split"], info["total_turn_nb"]) == (name, 2)
        assert found == [
            (user[0], user[1], dialog, number)
            for user in users
            for dialog in user[part]
            for number in (0, 1)
        ]
    assert outcome(process)[0] == 0
    assert prepared(tmp_path / "other") == expected


def test_printed_counts_and_prompts_are_the_corpuses(ran):
    survey = rows_in(ran.data / "survey.jsonl.gz")
    conversations = rows_in(ran.data / "conversations.jsonl.gz")
    history = {row["conversation_id"]: row["conversation_history"] for row in conversations}

    counts = Counter()
    for _, seen, train, test in numpy_split(survey, conversations):
        counts["seen users" if seen else "unseen users"] += 1
        for name, ids in (("train", train), ("test", test)):
            replies = [m for i in ids for m in history[i] if m["role"] == "model"]
            counts[f"{name} turns"] += sum(m["if_chosen"] for m in replies)
            counts[f"{name} pairs"] += sum(not m["if_chosen"] for m in replies)
    for name, count in counts.items():
        assert f"\n{name}: {count:,}\n" in ran.printed["prepare"]

    lengths = set()
    _, train_rows, test_rows = prepared(ran.folder)
    for row in train_rows + test_rows:
        info = row["extra_info"]
        chosen_path = []
        for m in history[info["dialog_id"]]:
            if m["role"] == "user" and m["turn"] <= info["turn_nb"]:
                chosen_path.append({"role": "user", "content": m["content"]})
            elif m["if_chosen"] and m["turn"] < info["turn_nb"]:
                chosen_path.append({"role": "assistant", "content": m["content"]})
        assert row["prompt"] == chosen_path
        lengths.add((len(chosen_path), len(info["rejected_utterance"])))
    assert lengths == {(1, 1), (1, 2), (1, 3), (3, 1), (5, 1)}


# ---- What prepare.py leaves out, refuses and keeps


def test_incomplete_turns_are_left_out_and_counted(monkeypatch, capsys, tmp_path, corpus):
    asked, good, bad = turn(0)
    worse = dict(bad, content="worse")
    other_good = dict(good, content="also good")
    turns = [
        [asked, bad],  # no chosen response
        [asked, good, other_good, bad],  # two different ones
        [asked, good, good, bad, worse],  # the same one twice
        [asked, good],  # no rejected one
        [asked, asked, good, bad],  # two messages
    ]
    history = [dict(m, turn=number) for number, messages in enumerate(turns) for m in messages]
    spoilt = conversations_of(corpus, "user17")[0]  # one of eight
    spoilt["conversation_history"] = history + turn(5)
    corpus[1].append(conversation("nothing complete", "user17", [asked, bad]))

    split, train, test = prepare(monkeypatch, tmp_path, corpus)
    assert "5 turns without" in capsys.readouterr().out
    assert "nothing complete" not in str(split)
    rows = [
        row for row in train + test if row["extra_info"]["dialog_id"] == spoilt["conversation_id"]
    ]
    third, sixth = sorted(rows, key=lambda row: row["extra_info"]["turn_nb"])
    assert third["extra_info"]["turn_nb"] == 2
    assert third["extra_info"]["total_turn_nb"] == 2
    assert third["extra_info"]["chosen_utterance"] == "good 0"
    assert third["extra_info"]["rejected_utterance"] == ["bad 0", "worse"]
    assert third["prompt"] == [{"role": "user", "content": "question 0"}]
    *_, before, last = sixth["prompt"]
    assert before == {"role": "assistant", "content": "good 0"}
    assert last == {"role": "user", "content": "question 5"}


def test_a_null_response_is_left_out_and_counted(monkeypatch, capsys, tmp_path, corpus):
    first, second = conversations_of(corpus, "user17")[:2]
    first["conversation_history"].append(message(0, "model", None, False))  # the turn stays
    rejected = second["conversation_history"][2]  # the only one of its turn, which goes
    rejected["content"] = None
    _, train, test = prepare(monkeypatch, tmp_path, corpus)
    out = capsys.readouterr().out
    assert "1 turns without" in out and "2 responses" in out
    turns = {row["conversation_id"]: [] for row in (first, second)}
    for info in (row["extra_info"] for row in train + test):
        if info["dialog_id"] in turns:
            turns[info["dialog_id"]].append((info["turn_nb"], len(info["rejected_utterance"])))
    assert turns == {
        first["conversation_id"]: [(0, 1), (1, 1)],
        second["conversation_id"]: [(1, 1)],
    }


def test_pairs_of_two_equal_texts_are_counted_and_warned_about(
    monkeypatch, capsys, tmp_path, corpus
):
    for row in conversations_of(corpus, "user17"):
        _, chosen, rejected, *_ = row["conversation_history"]
        rejected["content"] = chosen["content"]
    _, train, test = prepare(monkeypatch, tmp_path, corpus)
    out = capsys.readouterr().out
    assert f"8 of {len(train) + len(test)} pairs have two equal texts" in out
    assert "warning" in out
    assert "blank" not in out


def test_blank_responses_are_counted(monkeypatch, capsys, tmp_path, corpus):
    for row in conversations_of(corpus, "user17"):
        row["conversation_history"][2]["content"] = "  "
    split, _, _ = prepare(monkeypatch, tmp_path, corpus)
    out = capsys.readouterr().out
    for part in ("train", "test"):
        note = f"rejected answers of the pairs in {part}: 4 are blank, and stay as they are"
        assert out.count(note) == 1 and note in split["data_notes"]


def test_a_user_and_a_conversation_are_one_however_their_ids_are_written(
    monkeypatch, tmp_path, corpus
):
    """Composed and decomposed letters, white space at the ends, numbers from a float column."""
    survey, conversations = corpus
    ways = {
        "user17": ["Zoë", "Zoe\u0308", " Zoë\n"],
        "user7": ["3", 3, 3.0, "3.0"],
    }
    for user, names in ways.items():
        for row in survey:
            if row["user_id"] == user:
                row["user_id"] = names[-1]
        for i, row in enumerate(conversations_of(corpus, user)):
            row["user_id"] = names[i % len(names)]
            row["conversation_id"] = float(1000 * len(names) + i)
    split, train, test = prepare(monkeypatch, tmp_path, corpus)
    users = split["users"]
    assert {"Zoë", "3"} <= set(users) and len(users) == 6
    ids = [info["dialog_id"] for info in (row["extra_info"] for row in train + test)]
    assert {"3000", "4000"} <= set(ids)
    assert len(users["Zoë"]["train"] + users["Zoë"]["test"]) == 8


def test_columns_that_are_not_needed_may_hold_what_python_cannot(monkeypatch, tmp_path, corpus):
    expected = prepare(monkeypatch, tmp_path, corpus)
    source = tmp_path / "parquet"
    source.mkdir()
    for name, rows in zip(("survey", "conversations"), corpus):
        table = pa.Table.from_pylist(rows)
        times = pa.array([2**60] * len(rows), pa.timestamp("us"))
        pq.write_table(table.append_column("written", times), source / f"{name}.parquet")
    call(monkeypatch, script("prepare"), "--data", source, "--dir", tmp_path / "other")
    split, train, test = prepared(tmp_path / "other")
    assert (split["users"], train, test) == (expected[0]["users"], *expected[1:])


def test_what_is_odd_is_kept_with_the_split_and_with_the_embeddings(monkeypatch, ran, embeddings):
    """Between prepare.py and the study lies the script that embeds."""
    path = embeddings / "data" / "prism" / "split.json"
    split = json.loads(path.read_text())
    assert split["data_notes"] == []
    assert prism.load_embeddings(embeddings, None).provenance["data_notes"] == []
    split["data_notes"] = ["something odd"]
    path.write_text(json.dumps(split))
    options = ["--model", ran.model, "--dir", embeddings, "--overwrite"]
    call(monkeypatch, script(GENERATE), *options)
    assert prism.load_embeddings(embeddings, None).provenance["data_notes"] == ["something odd"]


def test_what_the_survey_tells_of_the_users_of_the_split_reaches_the_study(ran):
    study = prism.load_embeddings(ran.folder, None)
    rows = {row["user_id"]: row for row in rows_in(ran.data / "survey.jsonl.gz")}
    assert set(study.about_users) == {*study.seen, *study.unseen}
    for user, about in study.about_users.items():
        row = rows[user]
        assert about == {
            "age": row["age"],
            "gender": row["gender"],
            "lm_familiarity": row["lm_familiarity"],
            "country": row["location"]["reside_country"],
        }
    known = json.loads((ran.folder / "results" / "reading.json").read_text())["known"]
    assert known["users"] == len(study.about_users)
    assert "age: 18-24 years old" in known["names"] or "age: 25-34 years old" in known["names"]


def test_answers_of_the_published_survey(monkeypatch, tmp_path, corpus):
    """Its objects are taken apart; what is missing, null or no answer of a list is left out."""
    corpus[0][8] |= {
        "age": "25-34 years old",
        "education": None,
        "religion": {"self_described": "none", "categorised": "Non-religious", "simplified": "No"},
        "ethnicity": {"self_described": "white", "simplified": "White"},
        "location": {"birth_country": "Chile", "reside_country": "Canada"},
        "stated_prefs": {"values": 61.5, "safety": 0, "other_text": "wit", "other": None},
        "self_description": "I am ..",
    }
    corpus[0][7] |= {"age": ["odd"], "religion": "odd", "stated_prefs": [1], "gender": float("nan")}
    prepare(monkeypatch, tmp_path, corpus)
    about = prism.load_about_users(tmp_path / "out" / "data" / "prism")
    assert about["user8"] == {
        "age": "25-34 years old",
        "religion": "No",
        "ethnicity": "White",
        "country": "Canada",
        "stated preference for values": 61.5,
        "stated preference for safety": 0,
    }
    assert about["user7"] == {}
    assert "user0" not in about  # has no conversation


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"users": []}', '{"users": {"a": 3}}'])
def test_damaged_answers_are_named_and_missing_ones_are_not_known(embeddings, content):
    path = embeddings / "data" / "prism" / "about_users.json"
    path.unlink()
    assert prism.load_embeddings(embeddings, None).about_users == {}
    path.write_text(content)
    with input_error(str(path)):
        prism.load_embeddings(embeddings, None)


def test_full_data_that_differs_from_the_published_counts_is_warned_about(
    monkeypatch, capsys, tmp_path, corpus
):
    write(tmp_path, corpus)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda dataset, name, **options: str(tmp_path / name)
    )
    call(monkeypatch, script("prepare"), "--dir", tmp_path / "out")
    out = capsys.readouterr().out
    for count in ("1,030", "12,999", "19,638", "19,727"):
        assert f"WARNING: {count} expected" in out


def with_history(history: Any) -> Any:
    """A change: the third conversation has this history."""
    return lambda survey, conversations: conversations[2].update(conversation_history=history)


def with_a_stranger(survey: Rows, conversations: Rows) -> None:
    conversations[2].update(user_id="stranger")


def without_a_history(survey: Rows, conversations: Rows) -> None:
    del conversations[2]["conversation_history"]


def without_a_count(survey: Rows, conversations: Rows) -> None:
    del survey[2]["num_completed_conversations"]


def with_a_conversation_twice(survey: Rows, conversations: Rows) -> None:
    conversations.append(conversations[3])


def with_a_user_twice(survey: Rows, conversations: Rows) -> None:
    survey.append({**survey[3], "user_id": f" {survey[3]['user_id']}\n"})


def with_few_conversations(survey: Rows, conversations: Rows) -> None:
    del conversations[30:]


@pytest.mark.parametrize(
    "change, named",
    [
        (with_a_stranger, ["c2", "stranger", "survey.jsonl"]),
        (
            with_history([message(0, "narrator", "Once.")]),
            ["conversations.jsonl, row 3: conversation_history.0.role"],
        ),
        (
            with_history([message("first", "user", "Once.")]),
            ["conversations.jsonl, row 3", "turn"],
        ),
        (with_history([{"turn": 0, "role": "user"}]), ["conversations.jsonl, row 3", "content"]),
        (with_history([message(0, "user", 5)]), ["conversations.jsonl, row 3", "content"]),
        (without_a_history, ["row 3: conversation_history"]),
        (without_a_count, ["survey.jsonl, row 3"]),
        (with_a_conversation_twice, ["c3", "in the file twice"]),
        (with_a_user_twice, ["survey.jsonl, row ", "user3", "in the file twice"]),
        (with_few_conversations, ["6 conversations"]),
    ],
)
def test_a_spoilt_row_is_named_and_nothing_written(
    monkeypatch, capsys, tmp_path, corpus, change, named
):
    change(*corpus)
    write(tmp_path, corpus)
    options = ["--data", tmp_path, "--dir", tmp_path / "out"]
    refused(monkeypatch, capsys, script("prepare"), options, *named)
    assert not content_of(tmp_path / "out")


@pytest.mark.parametrize("file", ["survey", "conversations"])
@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda content: "<!DOCTYPE html>\n<html><body>429 Too Many</body></html>\n", "row 1"),
        (lambda content: '{"error": "Too Many Requests"}\n', "row 1"),
        (lambda content: content[:-20], "row "),
    ],
)
def test_an_error_page_and_a_short_line_are_named(
    monkeypatch, capsys, tmp_path, corpus, file, spoil, named
):
    path = write(tmp_path, corpus) / f"{file}.jsonl"
    path.write_text(spoil(path.read_text()))
    options = ["--data", tmp_path, "--dir", tmp_path / "out"]
    refused(monkeypatch, capsys, script("prepare"), options, path, named)
    assert not content_of(tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--data", "/nowhere"], "/nowhere"),
        (["--limit", 0], "--limit: 0"),
        (["--demo", "--data", "/tmp"], "--demo"),
        (["--sideways"], "--sideways"),
    ],
)
def test_an_unusable_command_line_is_one_line(monkeypatch, capsys, tmp_path, arguments, named):
    refused(monkeypatch, capsys, script("prepare"), [*arguments, "--dir", tmp_path], named)


def test_all_shards_of_both_files_are_read(tmp_path):
    whole = ROOT / "PRISM" / "demo"
    for name, suffix in (("survey", "csv"), ("conversations", "jsonl")):
        rows = [row for _, row in lore.rows.read_rows(whole / f"{name}.jsonl.gz")]
        for number, part in enumerate((rows[:20], rows[20:30], rows[30:])):
            path = tmp_path / f"{name}-0000{number}-of-00003.{suffix}"
            if suffix == "csv":
                pd.DataFrame(part).to_csv(path, index=False)
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in part))
    assert prism.read_conversations(tmp_path) == prism.read_conversations(whole)
    assert prism.read_survey(tmp_path) == prism.read_survey(whole)


def test_a_survey_twice_in_a_folder_is_refused(monkeypatch, capsys, ran, tmp_path):
    for path in ran.data.glob("*.gz"):
        shutil.copy(path, tmp_path)
    unpacked = gzip.decompress((tmp_path / "survey.jsonl.gz").read_bytes())
    (tmp_path / "survey.jsonl").write_bytes(unpacked)
    options = ["--data", tmp_path, "--model", ran.model, "--dir", tmp_path / "out"]
    refused(monkeypatch, capsys, script("prepare"), options, "survey.jsonl, survey.jsonl.gz")


def test_a_demo_on_a_full_disk_is_one_line(tmp_path):
    out = tmp_path / "out"
    full = start(SCRIPTS, "prepare", "--demo", "--dir", out, largest_file=200_000)
    status, _, err = full.outcome()
    assert status == 2
    assert [line.startswith("error: ") for line in err.splitlines()] == [True]
    assert not (out / "data").exists()


@pytest.mark.parametrize(
    "name, constant, value",
    [
        ("prepare", "split_seed", -1),
        ("prepare", "seen_share", 1.5),
        ("prepare", "fewest_conversations", 1),
        ("train_basis", "K_list", [2, 2]),
        ("train_basis", "demo_K_list", [-1]),
        ("train_basis", "alpha_list", []),
        ("train_basis", "demo_alpha_list", [float("inf")]),
        ("train_basis", "num_iterations", 0.5),
        ("train_basis", "threshold", -0.1),
        ("train_basis", "seeds", [True]),
        ("train_basis", "validation_share", 1),
        ("vary_fewshot", "num_shots", [0]),
        ("vary_fewshot", "trials", -1),
    ],
)
def test_an_unusable_constant_is_named_before_any_data_are_read(
    monkeypatch, capsys, tmp_path, name, constant, value
):
    module = quick(monkeypatch, script(name), **{constant: value})
    named = f"{constant.removeprefix('demo_')}: "
    refused(monkeypatch, capsys, module, ["--dir", tmp_path / "out"], named)
    assert not content_of(tmp_path)


def test_other_rows_are_replaced_only_with_overwrite(monkeypatch, capsys, tmp_path, corpus):
    out = tmp_path / "out"
    options = ["--data", tmp_path / "source", "--dir", out]
    first = prepare(monkeypatch, tmp_path, corpus)
    assert prepare(monkeypatch, tmp_path, corpus) == first
    before = content_of(out)
    corpus[1][:] = [row for row in corpus[1] if row["user_id"] != "user17"]
    write(tmp_path / "source", corpus)
    refused(monkeypatch, capsys, script("prepare"), options, "--overwrite")
    assert content_of(out) == before
    second = prepare(monkeypatch, tmp_path, corpus, "--overwrite")
    assert len(second[1]) < len(first[1])
    (out / "data" / "prism" / "split.json").unlink()  # the released script writes none
    refused(monkeypatch, capsys, script("prepare"), options, "--overwrite")


# ---- Honest pairs


def test_every_response_reaches_the_tokenizer_as_prose_and_its_embedding_is_the_models(
    monkeypatch, ran, tmp_path
):
    call(monkeypatch, script("prepare"), "--data", ran.data, "--dir", tmp_path, "--limit", 12)
    texts = []
    load_tokenizer = lore.reward_model.load_tokenizer

    def load(*arguments, **options):
        tokenizer = load_tokenizer(*arguments, **options)
        template = tokenizer.apply_chat_template

        def recorded(*arguments, **options):
            texts.append(template(*arguments, **options))
            return texts[-1]

        monkeypatch.setattr(tokenizer, "apply_chat_template", recorded)
        return tokenizer

    monkeypatch.setattr(lore.reward_model, "load_tokenizer", load)
    monkeypatch.setattr(lore.embedding, "load_tokenizer", load)
    call(monkeypatch, script(GENERATE), "--dir", tmp_path, "--model", ran.model)
    assert texts and not any(bracket in text for text in texts for bracket in "[]")
    last_messages = {
        text.split("<|end_header_id|>")[-1].strip().removesuffix("<|eot_id|>") for text in texts
    }
    train, test = embedded_rows(tmp_path)
    for row in train + test:
        info = row["extra_info"]
        assert {info["chosen_utterance"], *info["rejected_utterance"]} <= last_messages

    backbone, tokenizer = lore.reward_model.load_reward_model(ran.model, device="cpu")
    row = max(train + test, key=lambda row: len(row["extra_info"]["rejected_utterance"]))
    info = row["extra_info"]
    assert info["pair_format"] == prism.PAIR_FORMAT
    assert info["rejected_conv_embedding"].shape == (3, 64)
    responses = [info["chosen_utterance"], *info["rejected_utterance"]]
    vectors = [info["chosen_conv_embedding"], *info["rejected_conv_embedding"]]
    for response, vector in zip(responses, vectors, strict=True):
        messages = [*row["prompt"], {"role": "assistant", "content": response}]
        alone = state_alone(backbone, tokenizer, messages)
        assert vector.dtype == torch.bfloat16
        torch.testing.assert_close(vector.float(), alone, rtol=0.01, atol=0.01)


def test_an_embeddings_file_holds_each_vector_once(ran):
    for name in (TRAIN, TEST):
        numbers = 0
        for row in torch.load(ran.folder / name, weights_only=True):
            for side in ("chosen_conv_embedding", "rejected_conv_embedding"):
                vectors = row["extra_info"][side]
                assert vectors.untyped_storage().nbytes() == 2 * vectors.numel()
                numbers += vectors.numel()
        assert numbers > 0


def test_embedding_resumes_from_its_cache_and_finished_files_are_recognised(
    monkeypatch, capsys, ran, tmp_path
):
    for name in ("data", ".embedding_cache"):
        shutil.copytree(ran.folder / name, tmp_path / name)
    options = ["--dir", tmp_path, "--model", ran.model]
    module = script(GENERATE)
    without_forward(monkeypatch)
    call(monkeypatch, module, *options)
    assert plain(embedded_rows(tmp_path)) == plain(embedded_rows(ran.folder))
    finished = content_of(tmp_path)
    call(monkeypatch, module, *options)
    assert "finished already" in capsys.readouterr().out
    (tmp_path / lore.embedding_files.HEAD_FILE).unlink()  # the released script writes none
    refused(monkeypatch, capsys, module, options, TRAIN, "--overwrite")
    assert {**finished, **content_of(tmp_path)} == finished


def test_ctrl_c_in_the_embedding_says_that_a_second_run_resumes(monkeypatch, capsys, ran, tmp_path):
    shutil.copytree(ran.folder / "data", tmp_path / "data")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lore.scripts, "embed_distinct", stop)
    interrupted(monkeypatch, capsys, script(GENERATE), "--dir", tmp_path, "--model", ran.model)
    assert not list(tmp_path.glob("*.pkl"))


def test_parquet_files_of_different_runs_are_named(monkeypatch, capsys, ran, embeddings):
    folder = embeddings / "data" / "prism"
    options = ["--dir", embeddings, "--model", ran.model]
    module = script(GENERATE)
    finished = [(embeddings / name).read_bytes() for name in (TRAIN, TEST)]
    pd.read_parquet(folder / "test.parquet")[1:].to_parquet(folder / "test.parquet")
    refused(monkeypatch, capsys, module, options, folder, "different runs")
    (folder / "test.parquet").write_bytes(b"<html>")
    refused(monkeypatch, capsys, module, options, "test.parquet")
    whole = (folder / "split.json").read_text()
    others = [
        json.dumps(json.loads(whole) | changes)
        for changes in ({"rows": ["a"]}, {"model": 5}, {"demo": "no"}, {"data_notes": [1]})
    ]
    for content in (whole[:100], "[]", '{"rows": 1}', *others):
        (folder / "split.json").write_text(content)
        refused(monkeypatch, capsys, module, options, folder / "split.json")
    shutil.rmtree(folder)
    refused(monkeypatch, capsys, module, options, "prepare.py")
    assert [(embeddings / name).read_bytes() for name in (TRAIN, TEST)] == finished


# ---- What train_basis.py reads


def spoil(folder: Path, change: Any, name: str = TRAIN) -> None:
    """Apply `change` to the rows of one of the embeddings files."""
    rows = torch.load(folder / name, weights_only=True)
    change(rows)
    lore.files.save_torch(folder / name, rows)
    sign_again(folder)


def as_released(rows: Rows) -> None:
    """Make the rows what the released script writes: one vector for all rejected responses."""
    for info in (row["extra_info"] for row in rows):
        vectors = info["rejected_conv_embedding"]
        info["rejected_conv_embedding"] = vectors.float().mean(0).bfloat16()
        del info["pair_format"]


def release(folder: Path) -> None:
    """Make the embeddings in a folder those of the released script, in data/prism/ below it."""
    (folder / lore.embedding_files.HEAD_FILE).unlink()
    for name in (TRAIN, TEST):
        rows = torch.load(folder / name, weights_only=True)
        as_released(rows)
        torch.save(
            rows,
            folder / "data" / "prism" / name,
            _use_new_zipfile_serialization=lore.files.ARCHIVES,
        )
        (folder / name).unlink()


def test_released_embeddings_are_read_and_called_malformed(
    monkeypatch, capsys, ran, embeddings, trainer
):
    for name in (TRAIN, TEST):
        spoil(embeddings, as_released, name)
    (embeddings / lore.embedding_files.HEAD_FILE).unlink()
    quick(monkeypatch, trainer, MODEL_NAME=str(ran.model), K_list=[0, 2], num_iterations=5)
    call(monkeypatch, trainer, "--dir", embeddings)
    train, test = embedded_rows(embeddings)
    out = capsys.readouterr().out
    count = len(train) + len(test)
    assert f"{count:,} rows are in the released format, whose rejected side is malformed" in out
    assert f"{len(infos(train, seen=True)):,} train pairs" in out  # one a turn
    assert (embeddings / "checkpoints" / "PRISM_V_lore_K_2_alpha_10000.0.pt").exists()


def test_embeddings_are_found_where_the_released_script_writes_them(
    monkeypatch, capsys, ran, embeddings, trainer
):
    release(embeddings)
    study = prism.load_embeddings(embeddings, str(ran.model))
    assert "in the released format" in capsys.readouterr().out
    ours = prism.load_embeddings(ran.folder, None)
    assert (study.seen, study.unseen) == (ours.seen, ours.unseen)
    assert torch.equal(study.reward_head, ours.reward_head)
    quick(monkeypatch, trainer, MODEL_NAME=str(ran.model))
    call(monkeypatch, trainer, "--dir", embeddings)
    assert results_in(embeddings)["users"] == ours.seen


def test_embeddings_beside_the_script_go_before_released_ones(ran, embeddings, tmp_path):
    released = ran.copy_to(tmp_path / "released")
    release(released)
    for name in (TRAIN, TEST):
        shutil.copy(released / "data" / "prism" / name, embeddings / "data" / "prism")
    assert prism.load_embeddings(embeddings, None).texts  # released ones have none that count


def test_missing_embeddings_are_named_with_both_places(monkeypatch, capsys, embeddings, trainer):
    release(embeddings)
    released = embeddings / "data" / "prism"
    (released / TEST).unlink()
    options = ["--dir", embeddings]
    refused(monkeypatch, capsys, trainer, options, released / TEST, f"{embeddings} or", GENERATE)
    shutil.move(released / TRAIN, embeddings)
    refused(monkeypatch, capsys, trainer, options, embeddings / TEST, released, GENERATE)
    (embeddings / TRAIN).unlink()
    refused(monkeypatch, capsys, trainer, options, embeddings / TRAIN, released, GENERATE)


@pytest.mark.parametrize(
    "archive",
    [
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not lore.files.ARCHIVES, reason="archives are refused on this torch"
            ),
        ),
        False,
    ],
)
def test_files_of_the_versions_before_load(monkeypatch, tmp_path, trainer, archive):
    """A head with its metadata and rows as an earlier version's torch.save wrote them."""
    generator = torch.Generator().manual_seed(0)
    for name in (TRAIN, TEST):
        rows = []
        for user in range(5):
            info = {
                "split": "train",
                "seen": user < 3,
                "user_id": f"user{user}",
                "dialog_id": f"c{user}",
                "turn_nb": 0,
                "chosen_utterance": "good",
                "rejected_utterance": ["bad"],
                "pair_format": prism.PAIR_FORMAT,
                "chosen_conv_embedding": torch.randn(4, generator=generator).bfloat16(),
                "rejected_conv_embedding": torch.randn(1, 4, generator=generator).bfloat16(),
            }
            rows.append({"prompt": [], "extra_info": info})
        torch.save(rows, tmp_path / name, _use_new_zipfile_serialization=archive)
    head = torch.ones(4, 1)
    about = {
        "identity": {
            "model": "m",
            "reward_head": hashlib.sha256(json.dumps(head.tolist()).encode()).hexdigest(),
            "data": "1" * 64,
        },
        "model": "m",
        "data": "d",
        "demo": False,
        "files": {
            name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
            for name in (TRAIN, TEST)
        },
    }
    head_file = tmp_path / lore.embedding_files.HEAD_FILE
    save_file({"reward_head": head}, head_file, {"about": json.dumps(about)})
    call(monkeypatch, trainer, "--dir", tmp_path)
    results = results_in(tmp_path)
    assert results["config"]["data"] == "PRISM (d)"
    assert results["identity"] == about["identity"]
    assert results["users"] == ["user0", "user1", "user2"]
    assert results["unseen_users"] == ["user3", "user4"]


def test_pairs_are_the_chosen_minus_each_rejected_response(ran):
    study = prism.load_embeddings(ran.folder, None)
    train, _ = embedded_rows(ran.folder)
    for users, features, seen in (
        (study.seen, study.train, True),
        (study.unseen, study.train_unseen, False),
    ):
        expected = {}
        for info in infos(train, seen):
            for rejected in info["rejected_conv_embedding"]:
                pair = info["chosen_conv_embedding"].float() - rejected.float()
                expected.setdefault(info["user_id"], []).append(pair.tolist())
        assert users == sorted(expected)
        for user, X in zip(users, features, strict=True):
            assert sorted(X.tolist()) == sorted(expected[user])


def test_each_pair_has_the_conversation_the_prompt_and_the_texts_that_it_is_from(ran):
    study = prism.load_embeddings(ran.folder, None)
    train, test = embedded_rows(ran.folder)
    turn_of_vector = {}  # the pair's vector -> what it is from
    for row in train + test:
        info = row["extra_info"]
        for text, rejected in zip(info["rejected_utterance"], info["rejected_conv_embedding"]):
            x = tuple((info["chosen_conv_embedding"].float() - rejected.float()).tolist())
            pair = (prompt_key(row["prompt"]), (info["chosen_utterance"], text), info["dialog_id"])
            turn_of_vector[x] = pair
    for part, features in study.features().items():
        for user, X in enumerate(features):
            pairs = [turn_of_vector[tuple(x)] for x in X.tolist()]
            assert study.prompts[part][user] == [prompt for prompt, _, _ in pairs]
            assert study.texts[part][user] == [texts for _, texts, _ in pairs]
            if part in ("train", "train_unseen"):
                dialogs = [dialog for _, _, dialog in pairs]
                numbers = {dialog: i for i, dialog in enumerate(sorted(set(dialogs)))}
                assert study.groups[part][user].tolist() == [numbers[d] for d in dialogs]
                assert len(numbers) == 3
    assert set(study.groups) == {"train", "train_unseen"}


def test_prompts_that_are_equal_to_a_reader_are_one_and_stay_as_they_are(embeddings):
    def write_otherwise(rows: Rows) -> None:
        for row in rows[::2]:
            row["prompt"][-1]["content"] += " \u00a0\n"

    before = prism.load_embeddings(embeddings, None)
    spoil(embeddings, write_otherwise)
    assert prism.load_embeddings(embeddings, None).prompts == before.prompts
    written = [row["prompt"][-1]["content"] for row in embedded_rows(embeddings)[0]]
    assert any(text.endswith("\n") for text in written)


def with_a_prompt_that_is_a_text(rows: Rows) -> None:
    rows[3]["prompt"] = "Why?"


def with_a_message_without_text(rows: Rows) -> None:
    rows[3]["prompt"][0]["content"] = None


def without_prompts(rows: Rows) -> None:
    for row in rows:
        del row["prompt"]


def without_a_text(rows: Rows) -> None:
    rows[3]["extra_info"]["rejected_utterance"].pop()


def without_a_chosen_text(rows: Rows) -> None:
    rows[3]["extra_info"]["chosen_utterance"] = None


def with_a_released_row(rows: Rows) -> None:
    as_released(rows[3:4])


@pytest.mark.parametrize(
    "change",
    [
        without_prompts,
        with_a_prompt_that_is_a_text,
        with_a_message_without_text,
        without_a_text,
        without_a_chosen_text,
        with_a_released_row,
    ],
)
def test_texts_that_are_not_whole_are_not_known(embeddings, change):
    spoil(embeddings, change)
    study = prism.load_embeddings(embeddings, None)
    assert study.prompts == {} and study.texts == {}
    assert len(study.groups["train"]) == len(study.seen)


def with_a_nan(rows: Rows) -> None:
    rows[4]["extra_info"]["chosen_conv_embedding"].fill_(float("nan"))


def without_rejected_vectors(rows: Rows) -> None:
    del rows[4]["extra_info"]["rejected_conv_embedding"]


def with_wide_rejected_vectors(rows: Rows) -> None:
    """Two of the chosen one's width could be read out of each."""
    rows[4]["extra_info"]["rejected_conv_embedding"] = torch.zeros(1, 128)


def with_no_rejected_vector(rows: Rows) -> None:
    rows[4]["extra_info"]["rejected_conv_embedding"] = torch.zeros(0, 64)


def narrow(rows: Rows) -> None:
    for row in rows:
        row["extra_info"]["chosen_conv_embedding"] = torch.ones(32)
        row["extra_info"]["rejected_conv_embedding"] = torch.zeros(1, 32)


def with_a_narrow_row(rows: Rows) -> None:
    narrow(rows[4:5])


def with_seen_users_only(rows: Rows) -> None:
    for row in rows:
        row["extra_info"]["seen"] = True


def with_another_user(rows: Rows) -> None:
    rows[0]["extra_info"]["user_id"] = "somebody"


@pytest.mark.parametrize(
    "change, named",
    [
        (with_a_nan, "row 4"),
        (without_rejected_vectors, "row 4"),
        (with_no_rejected_vector, "row 4"),
        (with_wide_rejected_vectors, "row 4"),
        (narrow, "d = 32"),
        (with_a_narrow_row, "row 4"),
        (lambda rows: rows.clear(), "list of rows"),
        (with_seen_users_only, "0 unseen users"),
        (with_another_user, "users"),
    ],
)
def test_spoilt_embeddings_are_named_and_nothing_written(
    monkeypatch, capsys, embeddings, trainer, change, named
):
    spoil(embeddings, change)
    before = content_of(embeddings)
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], named)
    assert content_of(embeddings) == before


def test_stale_truncated_and_hostile_embeddings_are_named(monkeypatch, capsys, embeddings, trainer):
    options = ["--dir", embeddings]
    split = embeddings / "data" / "prism" / "split.json"
    content = split.read_text()
    split.write_text(json.dumps({**json.loads(content), "rows": "of another run"}))
    refused(monkeypatch, capsys, trainer, options, "other rows")
    split.write_text(content)

    path = embeddings / TEST
    whole = path.read_bytes()
    shutil.copy(embeddings / TRAIN, path)
    refused(monkeypatch, capsys, trainer, options, path, "another run")
    path.write_bytes(whole[: len(whole) // 2])
    refused(monkeypatch, capsys, trainer, options, path)
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(embeddings / "owned").encode() + b"'\ntR.")
    refused(monkeypatch, capsys, trainer, options, path, "os.system")
    assert not (embeddings / "owned").exists()
    path.unlink()
    refused(monkeypatch, capsys, trainer, options, path, GENERATE)


def test_checkpoints_of_an_earlier_sweep_go_with_it(monkeypatch, trainer, embeddings):
    folder = embeddings / "checkpoints"
    folder.mkdir(exist_ok=True)
    for name in ("PRISM_V_lore_K_9_alpha_1.0.pt", "PRISM_W_lore_K_9_alpha_1.0.pt", "mine.pt"):
        (folder / name).write_bytes(b"")
    quick(monkeypatch, trainer, demo_K_list=[1], demo_num_iterations=5, controls=False)
    call(monkeypatch, trainer, "--dir", embeddings)
    assert {path.name for path in folder.iterdir()} == {
        "mine.pt",
        "PRISM_V_lore_K_1_alpha_0.1.pt",
        "PRISM_W_lore_K_1_alpha_0.1.pt",
    }


def test_a_named_sweep_has_checkpoints_of_its_own_with_the_reference_once(
    monkeypatch, trainer, embeddings
):
    quick(
        monkeypatch,
        trainer,
        demo_K_list=[0, 1],
        demo_alpha_list=[1e-5, 1e4],
        demo_num_iterations=2,
        controls=False,
    )
    call(monkeypatch, trainer, "--dir", embeddings, "--results", "alphas")
    models = ["K_0_alpha_0.00001", "K_1_alpha_0.00001", "K_1_alpha_10000.0"]
    assert set(content_of(embeddings / "checkpoints")) == {
        f"alphas/PRISM_{tensor}_lore_{model}.pt" for model in models for tensor in "VW"
    }
    assert (embeddings / "results" / "alphas" / "results.json").exists()


# ---- RewardBench 2: the benchmark's rules


def ties_by_the_formula(prompts: list[tuple[str, Any, Any]]) -> float:
    """The score of Ties in numpy: five means over prompts, not-a-number counted as 0."""
    kinds = {"ref": {}, "tied": {}}
    for name, correct, incorrect in prompts:
        kind, number = name.split(":")
        margin = min(correct) - max(incorrect)
        spread = max(correct) - min(correct)
        kinds[kind][number] = np.array([margin, spread])
    common = [number for number in kinds["tied"] if number in kinds["ref"]]
    ref = np.array([kinds["ref"][number] for number in common]).reshape(-1, 2)
    tied = np.array([kinds["tied"][number] for number in common]).reshape(-1, 2)
    hard = np.minimum(ref[:, 0], tied[:, 0])
    with np.errstate(divide="ignore", invalid="ignore"):
        bonus = np.nan_to_num(np.tanh(hard / tied[:, 1] - 1))

    def mean(values):
        return np.mean(values) if len(values) else 0.0

    return (
        0.3 * mean([margin > 0 for margin, _ in kinds["tied"].values()])
        + 0.3 * mean([margin > 0 for margin, _ in kinds["ref"].values()])
        + 0.2 * mean(tied[:, 0] > tied[:, 1])
        + 0.2 * mean(hard > tied[:, 1])
        + 0.01 * mean(bonus)
    )


def test_ties_score_is_the_benchmarks_formula():
    score = script("eval_rb2").ties_score
    rng = np.random.default_rng(0)
    for _ in range(50):
        prompts = []
        for number in range(6):
            for kind, correct_count in (("ref", 1), ("tied", 3)):
                if rng.random() < 0.8:
                    correct = rng.integers(0, 4, correct_count).astype(float).tolist()
                    incorrect = rng.integers(0, 3, 3).astype(float).tolist()
                    prompts.append((f"{kind}:{number}", correct, incorrect))
        if prompts:
            assert score(prompts) == pytest.approx(ties_by_the_formula(prompts))


def test_ties_score_of_one_prompt_by_hand():
    score = script("eval_rb2").ties_score
    # tied: worst correct 5, best incorrect 1, so margin 4, spread 1; ref margin 2
    prompts = [("ref:A", [3.0], [1.0, 0.0]), ("tied:A", [5.0, 6.0], [1.0, -2.0])]
    assert score(prompts) == pytest.approx(1 + 0.01 * math.tanh(2 / 1 - 1))


@pytest.mark.parametrize(
    "prompts, named",
    [
        ([("odd:A", [1.0], [0.0])], "odd:A"),
        ([("tied:3", [1.0, 2.0], [0.0])] * 2, "tied:3"),
    ],
)
def test_ties_of_unknown_or_repeated_ids_are_refused(prompts, named):
    with input_error(named):
        script("eval_rb2").ties_score(prompts)


def test_a_shared_top_score_counts_one_over_the_number_at_the_top():
    rows = [
        types.SimpleNamespace(id=str(i), subset="Math", chosen=["a"], rejected=["b", "c", "d"])
        for i in range(5)
    ]
    scores = np.array(
        [
            [3, 1, 2, 0],
            [3, 3, 2, 0],
            [3, 3, 3, 3],
            [2, 3, 0, 0],
            [2, 3, 3, 0],
        ],
        np.float64,
    )
    table, wrong_ids = script("eval_rb2").evaluate(rows, scores.ravel())
    assert table["Math"] == pytest.approx((1 + 1 / 2 + 1 / 4 + 0 + 0) / 5)
    assert table["Average"] == table["Math"]
    assert wrong_ids == ["1", "2", "3", "4"]


# ---- RewardBench 2: the script


@pytest.fixture(scope="module")
def rewardbench(ran, tmp_path_factory):
    """(a folder with a random basis and weights of four users in every format; the benchmark's
    rows; the basis; the weights)"""
    folder = tmp_path_factory.mktemp("rewardbench")
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(64, 3, generator=generator)
    weights = torch.rand(4, 3, generator=generator).softmax(1)
    lore.files.save_torch(folder / "basis.pt", basis)
    lore.files.save_torch(folder / "weights.pt", weights)
    np.save(folder / "basis.npy", basis.numpy())
    # As before a basis named its model
    lore.files.save_tensors(folder / "basis.safetensors", {"V": basis, "W": weights})
    lore.files.save_tensors(folder / "named.safetensors", {"other": basis, "V": basis * 0})
    return folder, rows_in(ran.data / "rewardbench_test.jsonl.gz"), basis, weights


def read_table(path: Path) -> dict[str, dict[str, float]]:
    """A table of eval_rb2.py: reward -> subset -> score."""
    table = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            reward = row.pop("reward")
            table[reward] = {subset: float(score) for subset, score in row.items()}
    return table


@pytest.fixture
def table(monkeypatch, rewardbench, ran, tmp_path):
    """A function: run eval_rb2.py with arguments -> its table, see `read_table`."""

    def evaluated(*arguments, dir=rewardbench[0] / "cache"):
        options = ["--data", ran.data, "--model", ran.model, "--device", "cpu", "--dir", dir]
        path = tmp_path / "table.csv"
        call(monkeypatch, script("eval_rb2"), *options, "--save_csv", path, *arguments)
        return read_table(path)

    return evaluated


@pytest.fixture(scope="module")
def states(rewardbench, ran):
    """A function: subset -> for each of its rows the states of the answers, each computed alone.

    max_tokens: what is left of a conversation; side: from which it is cut.
    """
    backbone, tokenizer = lore.reward_model.load_reward_model(ran.model, device="cpu")

    def state(prompt, answer, max_tokens, side):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        if max_tokens:
            ids = ids[:, -max_tokens:] if side == "left" else ids[:, :max_tokens]
        with torch.no_grad():
            return backbone(ids).last_hidden_state[0, -1]

    @functools.cache
    def computed(subset=None, max_tokens=None, side="left"):
        found = []
        for row in rewardbench[1]:
            if subset in (None, row["subset"]):
                answers = [*row["chosen"], *row["rejected"]]
                row_states = [state(row["prompt"], a, max_tokens, side) for a in answers]
                found.append(torch.stack(row_states))
        return found

    return computed


def expected_table(
    rows: Rows, states: list[torch.Tensor], reward: torch.Tensor
) -> dict[str, float]:
    """The scores by subset of a reward vector, by a plain loop."""
    right = {}
    ties = []
    for row, row_states in zip(rows, states, strict=True):
        scores = (row_states.double() @ reward.double()).numpy()
        correct, incorrect = np.split(scores, [len(row["chosen"])])
        if row["subset"] == "Ties":
            ties.append((row["id"], correct, incorrect))
        else:
            right.setdefault(row["subset"], []).append(correct[0] > incorrect.max())
    table = {subset: np.mean(values) for subset, values in right.items()}
    if ties:
        table["Ties"] = ties_by_the_formula(ties)
    return {**table, "Average": np.mean(list(table.values()))}


def test_tables_are_those_of_conversations_scored_alone(table, rewardbench, states, ran):
    folder, rows, basis, weights = rewardbench
    head = load_file(ran.model / "model.safetensors")["score.weight"][0]
    assert table()["reward head"] == pytest.approx(expected_table(rows, states(), head), abs=1e-5)

    found = table("--rm_head", folder / "basis.pt", "--user_weights", folder / "weights.pt")
    assert list(found) == ["column 0", "column 1", "column 2", "mean user", "average over users"]
    rewards = {f"column {k}": basis[:, k] for k in range(3)}
    rewards["mean user"] = basis @ weights.mean(0)
    for name, reward in rewards.items():
        assert found[name] == pytest.approx(expected_table(rows, states(), reward), abs=1e-5)
    users = [expected_table(rows, states(), basis @ w) for w in weights]
    average = {subset: np.mean([user[subset] for user in users]) for subset in users[0]}
    assert found["average over users"] == pytest.approx(average, abs=1e-5)


def test_heads_are_read_from_pt_npy_and_safetensors(table, rewardbench):
    folder = rewardbench[0]
    expected = table("--rm_head", folder / "basis.pt", "--user_weights", folder / "weights.pt")
    for head, *more in (
        ("basis.npy",),
        ("basis.safetensors",),
        ("named.safetensors", "--head_key", "other"),
    ):
        weights = ["--user_weights", folder / "basis.safetensors"]
        assert table("--rm_head", folder / head, *more, *weights) == expected


def test_one_column_is_a_head(table, rewardbench, ran, tmp_path):
    folder, _, basis, _ = rewardbench
    columns = table("--rm_head", folder / "basis.pt")
    lore.files.save_torch(tmp_path / "column.pt", basis[:, 1].clone())
    found = table("--rm_head", tmp_path / "column.pt")
    assert found["reward head"] == pytest.approx(columns["column 1"], abs=1e-5)

    head = load_file(ran.model / "model.safetensors")["score.weight"]
    lore.files.save_torch(tmp_path / "head.pt", head)
    own = table()
    assert table("--mode", "seqclf") == own
    assert table("--mode", "lmhead", "--rm_head", tmp_path / "head.pt") == own

    lore.files.save_torch(tmp_path / "zero.pt", torch.zeros(64))
    found = table("--rm_head", tmp_path / "zero.pt", "--subset", "Math")
    assert found["reward head"]["Math"] == 0.25  # all four answers share the top


def test_padding_has_no_effect_on_the_score(table, rewardbench, tmp_path):
    folder = rewardbench[0]
    expected = table("--rm_head", folder / "basis.pt")
    found = table("--rm_head", folder / "basis.pt", "--batch_size", 2, dir=tmp_path / "other")
    for name, scores in found.items():
        assert scores == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_conversations_are_truncated_from_the_side_asked_for(table, rewardbench, states, side):
    folder, rows, basis, _ = rewardbench
    rows = [row for row in rows if row["subset"] == "Safety"]
    options = ["--subset", "Safety", "--max_length", 90, "--truncation_side", side]
    found = table("--rm_head", folder / "basis.pt", *options)
    cut = states("Safety", 90, side)
    assert not all(torch.allclose(a, b) for a, b in zip(cut, states("Safety")))
    for k in range(3):
        expected = expected_table(rows, cut, basis[:, k])
        assert found[f"column {k}"] == pytest.approx(expected, abs=1e-5)


def test_subset_limit_top_k_and_failures(table, rewardbench, capsys):
    folder, rows, _, _ = rewardbench
    found = table("--subset", "Math", "--limit", 2, "--verbose_failures")
    out = capsys.readouterr().out
    assert list(found["reward head"]) == ["Math", "Average"] and "2 rows" in out
    wrong = out.split("gets wrong: ")[1].strip()
    wrong_ids = [] if wrong == "none" else wrong.split(", ")
    assert found["reward head"]["Math"] == 1 - len(wrong_ids) / 2
    assert set(wrong_ids) <= {row["id"] for row in rows if row["subset"] == "Math"}

    everything = table("--rm_head", folder / "basis.pt")
    top = max(scores["Average"] for scores in everything.values())
    best = {name: scores for name, scores in everything.items() if scores["Average"] == top}
    assert table("--rm_head", folder / "basis.pt", "--top_k", 1) == best


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": None},
        {"prompt": "Why?"},
        {"prompt": [1]},
        {"extra_info": None},
        {"extra_info": ["a"]},
        {"extra_info": {"user_id": datetime.date(2024, 1, 1)}},
        {"extra_info": {"user_id": b"a"}},
        {"prompt": ...},  # the column is missing
    ],
    ids=repr,
)
def test_a_split_with_rows_of_another_shape_is_refused(embeddings, changes):
    folder = embeddings / "data" / "prism"
    row = {"prompt": [{"role": "user", "content": "Why?"}], "extra_info": {"user_id": "a"}}
    row = {name: value for name, value in (row | changes).items() if value is not ...}
    pd.DataFrame([row]).to_parquet(folder / "train.parquet")
    with input_error(str(folder)):
        prism.load_split(folder)


def test_whether_a_split_is_the_demos_is_yes_or_no(embeddings):
    module = script("eval_rb2")
    path = embeddings / "data" / "prism" / "split.json"
    assert module.is_demo(embeddings)
    for demo in ("no", 0, None, []):
        path.write_text(json.dumps({"demo": demo}))
        with input_error(str(path), "'demo'"):
            module.is_demo(embeddings)


@pytest.fixture
def demo_eval(monkeypatch, ran, tmp_path):
    """eval_rb2.py as it lies in the demo's copy of the tree, and what it is run with."""
    module = quick(monkeypatch, script("eval_rb2"), HERE=ran.folder)
    return module, ["--subset", "Math", "--save_csv", tmp_path / "table.csv"]


def test_the_demos_own_basis_is_scored(monkeypatch, capsys, ran, demo_eval, tmp_path):
    module, options = demo_eval
    own = ran.folder / "results" / f"K_{PLANTED_RANK}.safetensors"
    heads = ["--rm_head", own, "--user_weights", own]
    call(monkeypatch, module, *options, "--dir", ran.folder, *heads)
    out = capsys.readouterr().out
    assert "synthetic" in out
    with open(tmp_path / "table.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["reward", "Math", "Average"]
    printed_rows = [line.split() for line in out.splitlines()[-len(rows) :]]
    for cells, (reward, *scores) in zip(printed_rows, rows, strict=True):
        assert " ".join(cells[:-2]) == reward
        assert cells[-2:] == [f"{float(score):.4f}" for score in scores]


def chosen_results(folder: Path, file: str | None) -> Path:
    """A folder with results in which validation chose the model of this file; None: no model."""
    folder.mkdir()
    lore.files.save_json(folder / "results.json", {"chosen": {"file": file}})
    return folder


def test_a_folder_of_results_gives_the_model_that_validation_chose(ran, demo_eval, table, tmp_path):
    own = ran.folder / "results" / f"K_{PLANTED_RANK}.safetensors"
    folder = chosen_results(tmp_path / "results", "K_3_alpha_0.001.safetensors")
    shutil.copy(own, folder / "K_3_alpha_0.001.safetensors")
    shutil.copy(ran.folder / "results" / "K_1.safetensors", folder / "K_1.safetensors")
    expected = table("--rm_head", own, "--user_weights", own, "--subset", "Math")
    found = table("--rm_head", folder, "--user_weights", folder, "--subset", "Math")
    assert found == expected
    assert "column 2" in found


def test_if_no_model_was_chosen_or_named_those_that_are_there_are_listed(tmp_path):
    find_model = script("eval_rb2").find_model
    folder = chosen_results(tmp_path / "results", None)
    names = ["K_3_alpha_0.001.safetensors", "K_3_alpha_0.safetensors"]
    for name in (*names, ".training.pt", "report.md"):
        (folder / name).write_text("")
    listed = f"{folder} has {', '.join(names)}"
    with input_error(f"{folder}: a folder in which validation chose no model", listed):
        find_model(folder)
    with input_error("K_3.safetensors: no such file", listed):
        find_model(folder / "K_3.safetensors")
    (folder / "results.json").unlink()
    with input_error("validation chose no model", listed):
        find_model(folder)
    assert find_model(folder / names[0]) == folder / names[0]
    with input_error("no such file", "has no models"):
        find_model(tmp_path / "nowhere" / "K_3.safetensors")


@pytest.mark.parametrize("file", ["K_9.safetensors", "", ".", 5, ["a"], {}], ids=repr)
def test_a_chosen_model_that_is_no_file_of_the_folder_is_named(tmp_path, file):
    folder = chosen_results(tmp_path / "results", file)
    (folder / "K_3.safetensors").write_text("")
    with input_error(f"{folder}: validation chose", repr(file), "has K_3.safetensors"):
        script("eval_rb2").find_model(folder)


def test_a_basis_of_another_model_is_refused(
    monkeypatch, capsys, ran, demo_eval, rewardbench, tmp_path
):
    module, options = demo_eval
    own = ran.folder / "results" / f"K_{PLANTED_RANK}.safetensors"
    foreign = tmp_path / "foreign.safetensors"
    tensors, about = lore.files.load_tensors(own)
    about["identity"]["model"] = "another/model"
    about["identity"]["reward_head"] = hashlib.sha256(b"another").hexdigest()
    lore.files.save_tensors(foreign, tensors, **about)
    for head in (
        ["--rm_head", foreign],
        ["--rm_head", rewardbench[0] / "basis.pt", "--user_weights", foreign],
    ):
        arguments = [*options, "--dir", ran.folder, *head]
        refused(monkeypatch, capsys, module, arguments, foreign, "another/model")


def test_the_demo_runs_on_its_own_as_after_prepare(monkeypatch, capsys, ran, demo_eval, tmp_path):
    module, options = demo_eval
    after_prepare = [*options, "--dir", ran.folder]
    call(monkeypatch, module, *after_prepare)
    expected = read_table(tmp_path / "table.csv")
    for arguments in ([*after_prepare, "--demo"], [*options, "--dir", tmp_path / "new", "--demo"]):
        (tmp_path / "table.csv").unlink()
        capsys.readouterr()
        call(monkeypatch, module, *arguments)
        assert "synthetic" in capsys.readouterr().out
        assert read_table(tmp_path / "table.csv") == expected
    assert content_of(tmp_path / "new" / ".standin") == content_of(ran.model)


@pytest.mark.parametrize("option", ["--model", "--data"])
def test_the_demo_takes_no_other_model_or_data(monkeypatch, capsys, tmp_path, option):
    arguments = ["--demo", option, tmp_path, "--dir", tmp_path / "out"]
    refused(monkeypatch, capsys, script("eval_rb2"), arguments, "--demo", "leave out")
    assert not content_of(tmp_path)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--subset", "Poetry"], ["--subset Poetry", "Factuality"]),
        (["--limit", 0], ["--limit: 0"]),
        (["--mode", "lmhead"], ["--rm_head"]),
        (["--mode", "seqclf", "--rm_head", "basis.pt"], ["--rm_head"]),
        (["--rm_head", "/nowhere/head.pt"], ["/nowhere/head.pt"]),
        (["--split", "filtered"], ["filtered"]),
        (["--rm_head", "wide.pt"], ["wide.pt", "(32, 2)", "d = 64"]),
        (["--rm_head", "basis.pt", "--user_weights", "wide.pt"], ["wide.pt", "(32, 2)"]),
        (["--rm_head", "basis.safetensors", "--head_key", "U"], ["basis.safetensors", "U"]),
        (["--rm_head", "text.npy"], ["text.npy"]),
        (["--rm_head", "cut.safetensors"], ["cut.safetensors"]),
        (["--rm_head", "nan.pt"], ["nan.pt"]),
        (["--truncation_side", "middle"], ["--truncation_side"]),
        (["--head_bias", "nan"], ["--head_bias"]),
        (["--device", "tpu"], ["tpu"]),
        (["--device", "cuda:7"], ["cuda:7"]),
        (["--rm_head", "complex.pt"], ["complex.pt"]),
        (["--rm_head", "quantised.pt"], ["quantised.pt"]),
        (["--rm_head", "empty.pt"], ["empty.pt"]),
        (["--rm_head", "basis.pt", "--user_weights", "scaled.pt"], ["scaled.pt", "shares of 1"]),
        (
            ["--rm_head", "basis.safetensors", "--user_weights", "other_seed.safetensors"],
            ["other_seed", "another fit"],
        ),
        (
            ["--rm_head", "basis.safetensors", "--user_weights", "other_data.safetensors"],
            ["other_data", "another fit"],
        ),
        (
            ["--rm_head", "basis.pt", "--user_weights", "other_data.safetensors"],
            ["other_data", "another fit"],
        ),
        (["--rm_head", "basis.pt", "--user_weights", "empty.pt"], ["empty.pt"]),
        (["--save_csv", "."], ["--save_csv"]),
    ],
)
def test_unusable_heads_and_options_are_one_line(
    monkeypatch, capsys, tmp_path, rewardbench, ran, arguments, named
):
    folder = rewardbench[0]
    for name in ("basis.pt", "basis.safetensors"):
        shutil.copy(folder / name, tmp_path)
    whole = (folder / "basis.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:100])
    (tmp_path / "text.npy").write_text("no array")
    for name, matrix in {
        "wide.pt": torch.ones(32, 2),
        "nan.pt": torch.full((64, 1), float("nan")),
        "complex.pt": torch.ones(64, 1, dtype=torch.complex64),
        "empty.pt": torch.ones(64, 0),
        "quantised.pt": torch.quantize_per_tensor(torch.ones(64, 1), 0.1, 0, torch.qint8),
        "scaled.pt": torch.full((5, 3), 2.0),
    }.items():
        lore.files.save_torch(tmp_path / name, matrix)
    equal_weights = torch.full((5, 3), 1 / 3)
    lore.files.save_tensors(tmp_path / "other_seed.safetensors", {"W": equal_weights}, seed=17)
    other_data = {"W": equal_weights, "V": torch.ones(64, 3)}  # of a run with the same settings
    lore.files.save_tensors(tmp_path / "other_data.safetensors", other_data)

    arguments = [tmp_path / a if "." in str(a) and "/" not in str(a) else a for a in arguments]
    before = content_of(tmp_path)
    options = ["--data", ran.data, "--model", ran.model, "--dir", folder / "c"]
    options += ["--save_csv", tmp_path / "t.csv"]
    refused(monkeypatch, capsys, script("eval_rb2"), [*options, *arguments], *named)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize(
    "record",
    [
        {"identity": ["a"]},
        {"identity": "a"},
        {"identity": {"reward_head": 5}},
        {"identity": {"reward_head": ["a"], "model": {}}},
        ["identity"],
    ],
    ids=repr,
)
def test_a_basis_with_a_record_of_another_shape_is_refused(record, ran, tmp_path):
    path = tmp_path / "basis.safetensors"
    save_file({"V": torch.ones(64, 2)}, path, {"about": json.dumps(record)})
    module = script("eval_rb2")
    with input_error(str(path)):
        module.check_learnt_on(module.read_model_file(path), str(ran.model))


@pytest.mark.parametrize("record", [{}, {"identity": None}, {"identity": {"model": "a"}}], ids=repr)
def test_a_basis_that_does_not_say_of_which_model_it_is_is_taken(record, ran, tmp_path):
    path = tmp_path / "basis.safetensors"
    save_file({"V": torch.ones(64, 2)}, path, {"about": json.dumps(record)})
    module = script("eval_rb2")
    module.check_learnt_on(module.read_model_file(path), str(ran.model))


def npy(header: str) -> bytes:
    """A file of numpy with a header of its own making, and no numbers."""
    encoded = header.encode()
    return b"\x93NUMPY\1\0" + len(encoded).to_bytes(2, "little") + encoded


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4 no archive",
        npy(""),
        npy("-" * 9000 + "1"),
        npy("{'descr': " + "[" * 150 + "]" * 150 + ", 'fortran_order': False, 'shape': (1,)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (10**12, 1000)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1000)}"),
    ],
    ids=["empty", "archive", "no header", "minuses", "nested", "a formula", "huge"],
)
def test_a_head_in_a_damaged_file_of_numpy_is_refused(tmp_path, content):
    path = tmp_path / "head.npy"
    path.write_bytes(content)
    with input_error(str(path), "no array of numbers"):
        script("eval_rb2").read_model_file(path)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">f8", ">i2"])
def test_an_array_of_a_machine_of_another_byte_order_is_read_right(tmp_path, dtype):
    values = np.arange(6.0).reshape(3, 2)
    np.save(tmp_path / "head.npy", values.astype(dtype))
    module = script("eval_rb2")
    head = module.matrix_in(module.read_model_file(tmp_path / "head.npy"), ["V"], "head")
    assert torch.equal(head, torch.tensor(values).float())


def test_lists_in_lists_are_refused_before_their_numbers_are_counted(tmp_path):
    """A few bytes, in which each list is twice in the next one: 2 ** 60 numbers."""
    doubled = [1.0]
    for _ in range(60):
        doubled = [doubled, doubled]
    path = tmp_path / "head.pkl"
    path.write_bytes(pickle.dumps(doubled))
    module = script("eval_rb2")
    with input_error(str(path), "head", "give a float32 tensor"):
        module.matrix_in(module.read_model_file(path), ["V"], "head")

    names = {"seen": True, "user_id": "a", "dialog_id": "b"}
    for info in (
        {"chosen_conv_embedding": doubled, "rejected_conv_embedding": [1.0]},
        {"chosen_conv_embedding": [1.0], "rejected_conv_embedding": doubled},
    ):
        path.write_bytes(pickle.dumps([{"extra_info": {**names, **info}}]))
        with input_error(str(path), "row 0", "no embeddings"):
            prism._load_rows(path)


def test_the_files_of_a_model_are_read_once(monkeypatch, ran, demo_eval):
    module, options = demo_eval
    own = ran.folder / "results" / f"K_{PLANTED_RANK}.safetensors"
    read = []

    def load_tensors(path, **types):
        read.append(path)
        return lore.files.load_tensors(path, **types)

    monkeypatch.setattr(module, "load_tensors", load_tensors)
    arguments = [*options, "--dir", ran.folder, "--limit", 2]
    call(monkeypatch, module, *arguments, "--rm_head", own, "--user_weights", own)
    assert read == [own]


def test_of_the_benchmark_only_the_needed_columns_are_read(rewardbench, tmp_path, monkeypatch):
    """A date that Python has not, in a column that nobody needs."""
    module = script("eval_rb2")
    table = pa.Table.from_pylist(rewardbench[1])
    late = pa.array([2**60] * len(table), pa.timestamp("us"))
    table = table.append_column("judged", late)
    pq.write_table(table, tmp_path / "test.parquet")
    expected = [module.BenchmarkRow(**row) for row in rewardbench[1]]
    assert module.read_benchmark(tmp_path, "test", None, None) == expected

    asked = []

    def served(dataset, schema=None, **options):
        asked.append(schema)
        return {"test": [("row", row) for row in rewardbench[1]]}

    monkeypatch.setattr(module, "hub_rows", served)
    assert module.read_benchmark(None, "test", None, None) == expected
    assert asked == [module.BenchmarkRow]


def test_a_table_of_scores_has_names_as_plain_text(monkeypatch, ran, rewardbench, tmp_path):
    """A name that a spreadsheet would take for a formula."""
    module = script("eval_rb2")
    scores = pd.DataFrame({"Math": [0.5]}, index=["=1+1"])
    monkeypatch.setattr(module, "table_of_rewards", lambda *arguments: (scores, []))
    options = ["--data", ran.data, "--model", ran.model, "--dir", rewardbench[0] / "cache"]
    call(monkeypatch, module, *options, "--limit", 2, "--save_csv", tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "reward,Math\n'=1+1,0.5\n"


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"subset": "Poetry"}, "subset"),
        ({"chosen": []}, "chosen"),
        ({"rejected": []}, "rejected"),
        ({"chosen": None}, "chosen"),
        ({"prompt": ...}, "prompt"),  # the column is missing
        ({"chosen": [1]}, "chosen.0"),
        ({"prompt": 5}, "prompt"),
        ({"id": 7}, "id"),
    ],
)
def test_a_spoilt_row_of_the_benchmark_is_named(
    monkeypatch, capsys, tmp_path, rewardbench, changes, named
):
    rows = [dict(row) for row in rewardbench[1]]
    for column, value in changes.items():
        if value is ...:
            del rows[2][column]
        else:
            rows[2][column] = value
    write_rows(tmp_path / "test.jsonl", rows)
    options = ["--data", tmp_path, "--model", "unread", "--dir", tmp_path / "out"]
    refused(monkeypatch, capsys, script("eval_rb2"), options, f"test.jsonl, row 3: {named}")


def test_without_a_gpu_a_model_is_asked_for(monkeypatch, capsys, tmp_path, ran):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--data", ran.data, "--dir", tmp_path]
    refused(monkeypatch, capsys, script("eval_rb2"), options, "Skywork", "--model")
