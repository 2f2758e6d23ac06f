"""PRISM as a user runs it: the released split, honest pairs, RewardBench 2, and every slip."""

import csv
import functools
import gzip
import hashlib
import json
import math
import shutil
import types
from collections import Counter

import numpy as np
import pandas as pd
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

import lore.embedding_files
import lore.files
import lore.reward_model
import prism

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPTS = ROOT / "PRISM"
TRAIN, TEST = EMBEDDINGS["PRISM"]
GENERATE = "generate-prism-embeddings"
script = functools.partial(load_script, "PRISM")


@pytest.fixture
def trainer(monkeypatch):
    """train_basis.py with the reference model alone, which takes no training."""
    return quick(monkeypatch, script("train_basis"), K_list=[0], demo_K_list=[0])


def rows_of(folder):
    """The rows of both embedding files of a folder."""
    return [torch.load(folder / name, weights_only=True) for name in (TRAIN, TEST)]


def prepared(folder):
    """What prepare.py wrote: (split.json, rows of train.parquet, rows of test.parquet)."""
    folder = folder / "data" / "prism"
    return json.loads((folder / "split.json").read_text()), *(
        json.loads(pd.read_parquet(folder / f"{name}.parquet").to_json(orient="records"))
        for name in ("train", "test")
    )


# ---- The demo, the formats, the results -----------------------------------------------------------------------------


def test_demo_says_that_it_is_synthetic_and_rises_to_the_planted_rank(ran):
    assert "stand-in" in ran.printed["prepare"] and "synthetic" in ran.printed["prepare"]
    assert (
        "synthetic" in ran.printed["train_basis"] and "demo settings" in ran.printed["train_basis"]
    )
    assert "synthetic" in ran.results["config"]["data"]
    unseen = {fit["K"]: fit["mean_accuracy"][FINAL] for fit in ran.results["fits"]}
    assert unseen[1] < unseen[2] and unseen[PLANTED_RANK] > unseen[1] + 0.2


def test_demo_writes_what_its_scripts_say(ran):
    assert set(content_of(ran.folder / "data" / "prism")) == {
        "train.parquet",
        "test.parquet",
        "split.json",
    }
    fits = ran.results["fits"]
    assert [fit["K"] for fit in fits] == script("train_basis").demo_K_list
    assert set(content_of(ran.folder / "checkpoints")) == {
        f"PRISM_{tensor}_lore_K_{fit['K']}_alpha_{fit['alpha']}.pt"
        for fit in fits
        for tensor in "VW"
    }
    for fit in fits:
        tensors = load_file(ran.folder / "results" / fit["file"])
        for name in "VW":
            path = (
                ran.folder
                / "checkpoints"
                / f"PRISM_{name}_lore_K_{fit['K']}_alpha_{fit['alpha']}.pt"
            )
            assert torch.equal(torch.load(path, weights_only=True), tensors[name])
        survived = f"rank {fit['K']}, seed 0: {fit['columns']} of {fit['K']} columns"
        assert fit["K"] == 0 or survived in ran.printed["train_basis"]
    assert (ran.folder / "results" / "accuracy_by_rank.png").read_bytes().startswith(b"\x89PNG")


def test_results_agree_with_the_saved_tensors_and_the_embeddings(ran):
    (fit,) = (fit for fit in ran.results["fits"] if fit["K"] == PLANTED_RANK)
    tensors = load_file(ran.folder / "results" / fit["file"])
    V, w = (
        tensors["V"].double(),
        dict(zip(ran.results["unseen_users"], tensors["W_unseen"].double())),
    )
    margins = {user: [] for user in w}
    for info in (
        row["extra_info"] for row in rows_of(ran.folder)[1] if not row["extra_info"]["seen"]
    ):
        for rejected in info["rejected_conv_embedding"]:
            x = info["chosen_conv_embedding"].double() - rejected.double()
            margins[info["user_id"]].append(float(x @ V @ w[info["user_id"]]))
    of_user = {user: np.mean(np.array(values) > 0) for user, values in margins.items()}
    assert fit["accuracy_of_user"][FINAL] == pytest.approx(
        of_user, abs=0.1
    )  # float32 may turn a margin near 0
    assert fit["mean_accuracy"][FINAL] == pytest.approx(np.mean(list(of_user.values())), abs=0.02)


def test_shots_are_conversations_of_which_users_have_three(monkeypatch, capsys, ran, embeddings):
    module = quick(
        monkeypatch,
        script("vary_fewshot"),
        num_shots=[1, 3, 5],
        K_list=[3],
        num_iterations=100,
        trials=5,
    )
    call(monkeypatch, module, "--dir", embeddings)
    found = json.loads((embeddings / "results" / "vary_fewshot.json").read_text())
    assert found["shots_are"] == "conversations" and found["shots_of_the_mean_user"] == [1, 3, 3]
    assert "from 4 conversations on" in capsys.readouterr().out
    (curve,) = found["curves"]
    assert curve["unseen_std"][0] > 1e-3 and curve["unseen_std"][1:] == pytest.approx(
        [0, 0], abs=1e-9
    )
    data = prism.load_embeddings(ran.folder, None)[0]
    pairs = {user: Counter() for user in data["unseen"]}
    for info in (
        row["extra_info"] for row in rows_of(ran.folder)[0] if not row["extra_info"]["seen"]
    ):
        pairs[info["user_id"]][info["dialog_id"]] += len(info["rejected_utterance"])
    for user, X, groups in zip(
        data["unseen"], data["train_unseen"], data["dialogs_unseen"], strict=True
    ):
        assert len(groups) == len(X)
        assert groups.unique(return_counts=True)[1].tolist() == [
            n for _, n in sorted(pairs[user].items())
        ]


def test_two_processes_give_the_same_embeddings_and_nearly_the_same_basis(ran, tmp_path):
    shutil.copytree(ran.folder / "data", tmp_path / "data")
    first, second = two_processes(SCRIPTS, GENERATE, "--dir", tmp_path, "--model", ran.model)
    assert "next: " in first and second == ""
    assert plain(rows_of(tmp_path)) == plain(rows_of(ran.folder))
    single, few = (
        ran.copy_to(tmp_path / "single"),
        dict(demo_K_list=[0, PLANTED_RANK], demo_num_iterations=200),
    )
    alone = start(SCRIPTS, "train_basis", "--dir", single, **few)
    first, second = two_processes(SCRIPTS, "train_basis", "--dir", tmp_path, **few)
    assert first.count(f"Rank : {PLANTED_RANK}") == 1 and second == "" and printed(alone)
    for fit, expected in zip(results_in(tmp_path)["fits"], results_in(single)["fits"], strict=True):
        assert fit["mean_accuracy"] == pytest.approx(expected["mean_accuracy"], abs=0.03)


# ---- The split ------------------------------------------------------------------------------------------------------


def message(turn, role, content, if_chosen=None):
    return {"turn": turn, "role": role, "content": content, "if_chosen": if_chosen}


def turn(number, name=""):
    """One user message, a chosen and a rejected response."""
    return [
        message(number, "user", f"question {name}{number}"),
        message(number, "model", f"good {name}{number}", True),
        message(number, "model", f"bad {name}{number}", False),
    ]


def conversation(name, user, history):
    return {"conversation_id": name, "user_id": user, "conversation_history": history}


@pytest.fixture
def small():
    """Survey and conversations of 23 users with none to eight conversations: two lists of rows, to be spoilt."""
    survey = [{"user_id": f"user{i}", "num_completed_conversations": i % 9} for i in range(23)]
    owners = [
        user["user_id"] for user in survey for _ in range(user["num_completed_conversations"])
    ]
    owners = owners[::2] + owners[1::2]  # a user's conversations are not in one piece
    return survey, [
        conversation(f"c{i}", user, turn(0, f"{i}.") + turn(1, f"{i}."))
        for i, user in enumerate(owners)
    ]


def write(folder, small):
    for name, rows in zip(("survey", "conversations"), small):
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def prepare(monkeypatch, folder, small, *arguments):
    """Run prepare.py on two lists of rows -> (split.json, rows of train.parquet, of test.parquet)."""
    call(
        monkeypatch,
        script("prepare"),
        "--data",
        write(folder / "source", small),
        "--dir",
        folder / "out",
        *arguments,
    )
    return prepared(folder / "out")


def numpy_split(survey, conversations):
    """The released split, from its description: [(user, seen, train conversations, test conversations)]."""
    rng = np.random.RandomState(123)
    users = np.array(
        [user["user_id"] for user in survey if user["num_completed_conversations"] > 0]
    )
    rng.shuffle(users)
    found = []
    for place, user in enumerate(users):
        ids = np.array([c["conversation_id"] for c in conversations if c["user_id"] == user])
        if len(ids) > 5:
            rng.shuffle(ids)
            found.append(
                (
                    str(user),
                    bool(place < int(0.8 * len(users))),
                    list(ids[: len(ids) // 2]),
                    list(ids[len(ids) // 2 :]),
                )
            )
    return found


def test_split_is_the_function_of_seed_123_that_was_released_in_any_process(
    monkeypatch, tmp_path, small
):
    split, train, test = expected = prepare(monkeypatch, tmp_path, small)
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    process = fresh_process(
        code,
        SCRIPTS / "prepare.py",
        "--data",
        tmp_path / "source",
        "--dir",
        tmp_path / "other",
        PYTHONHASHSEED="7",
    )
    users = numpy_split(*small)
    assert [
        (user, of["seen"], of["train"], of["test"]) for user, of in split["users"].items()
    ] == users
    assert {True, False} == {seen for _, seen, _, _ in users} and len(users) == 6
    for rows, name, part in ((train, "train", 2), (test, "test", 3)):
        infos = [row["extra_info"] for row in rows]
        assert [(i["user_id"], i["seen"], i["dialog_id"], i["turn_nb"]) for i in infos] == [
            (of[0], of[1], dialog, number)
            for of in users
            for dialog in of[part]
            for number in (0, 1)
        ]
        assert {(i["split"], i["total_turn_nb"]) for i in infos} == {(name, 2)}
    assert outcome(process)[0] == 0 and prepared(tmp_path / "other") == expected


def test_printed_counts_and_prompts_are_the_corpuses(ran):
    survey, conversations = (
        rows_in(ran.data / f"{name}.jsonl.gz") for name in ("survey", "conversations")
    )
    by_id = {c["conversation_id"]: c["conversation_history"] for c in conversations}
    counts = Counter()
    for _, seen, *parts in numpy_split(survey, conversations):
        counts["seen users" if seen else "unseen users"] += 1
        for name, ids in zip(("train", "test"), parts):
            replies = [m for i in ids for m in by_id[i] if m["role"] == "model"]
            counts[f"{name} turns"] += sum(m["if_chosen"] for m in replies)
            counts[f"{name} pairs"] += sum(not m["if_chosen"] for m in replies)
    for name, count in counts.items():
        assert f"\n{name}: {count:,}\n" in ran.printed["prepare"]
    lengths = set()
    for row in (row for rows in prepared(ran.folder)[1:] for row in rows):
        info, expected = row["extra_info"], []
        for m in by_id[info["dialog_id"]]:  # the chosen path only
            if m["role"] == "user" and m["turn"] <= info["turn_nb"]:
                expected.append({"role": "user", "content": m["content"]})
            elif m["if_chosen"] and m["turn"] < info["turn_nb"]:
                expected.append({"role": "assistant", "content": m["content"]})
        assert row["prompt"] == expected
        lengths.add((len(expected), len(info["rejected_utterance"])))
    assert lengths == {(1, 1), (1, 2), (1, 3), (3, 1), (5, 1)}


# ---- What prepare.py drops, refuses and keeps -----------------------------------------------------------------------


def test_incomplete_turns_are_left_out_and_counted(monkeypatch, capsys, tmp_path, small):
    asked, good, bad = turn(0)
    spoilt = next(c for c in small[1] if c["user_id"] == "user17")  # one of eight
    spoilt["conversation_history"] = [
        asked,
        bad,  # no chosen response
        *(
            dict(m, turn=1) for m in (asked, good, dict(good, content="also good"), bad)
        ),  # two different ones
        *(
            dict(m, turn=2) for m in (asked, good, good, bad, dict(bad, content="worse"))
        ),  # the same one twice
        *(dict(m, turn=3) for m in (asked, good)),  # no rejected one
        *(dict(m, turn=4) for m in (asked, asked, good, bad)),  # two messages
        *turn(5),
    ]
    small[1].append(conversation("nothing complete", "user17", [asked, bad]))
    split, *files = prepare(monkeypatch, tmp_path, small)
    assert "5 turns without" in capsys.readouterr().out
    rows = [
        row
        for rows in files
        for row in rows
        if row["extra_info"]["dialog_id"] == spoilt["conversation_id"]
    ]
    third, sixth = sorted(rows, key=lambda row: row["extra_info"]["turn_nb"])
    assert [
        third["extra_info"][key]
        for key in ("turn_nb", "total_turn_nb", "chosen_utterance", "rejected_utterance")
    ] == [2, 2, "good 0", ["bad 0", "worse"]]
    question, answer = (
        {"role": "user", "content": "question 0"},
        {"role": "assistant", "content": "good 0"},
    )
    assert third["prompt"] == [question] and "nothing complete" not in str(split)
    *_, before, last = sixth["prompt"]
    assert before == answer and last == {"role": "user", "content": "question 5"}


def test_a_null_response_is_left_out_and_counted(monkeypatch, capsys, tmp_path, small):
    first, second = [c for c in small[1] if c["user_id"] == "user17"][:2]
    first["conversation_history"].append(message(0, "model", None, False))  # the turn stays
    second["conversation_history"][2]["content"] = (
        None  # the only rejected one of its turn, which goes
    )
    files = prepare(monkeypatch, tmp_path, small)[1:]
    out = capsys.readouterr().out
    assert "1 turns without" in out and "2 responses" in out
    turns = {c["conversation_id"]: [] for c in (first, second)}
    for info in (
        row["extra_info"]
        for rows in files
        for row in rows
        if row["extra_info"]["dialog_id"] in turns
    ):
        turns[info["dialog_id"]].append((info["turn_nb"], len(info["rejected_utterance"])))
    assert turns == {
        first["conversation_id"]: [(0, 1), (1, 1)],
        second["conversation_id"]: [(1, 1)],
    }


def test_pairs_of_two_equal_texts_are_counted_and_warned_about(
    monkeypatch, capsys, tmp_path, small
):
    for c in (c for c in small[1] if c["user_id"] == "user17"):
        c["conversation_history"][2]["content"] = c["conversation_history"][1]["content"]
    pairs = sum(len(rows) for rows in prepare(monkeypatch, tmp_path, small)[1:])
    out = capsys.readouterr().out
    assert (
        f"8 of {pairs} pairs have two equal texts" in out
        and "warning" in out
        and "blank" not in out
    )


def test_blank_responses_are_counted(monkeypatch, capsys, tmp_path, small):
    for c in (c for c in small[1] if c["user_id"] == "user17"):
        c["conversation_history"][2]["content"] = "  "
    prepare(monkeypatch, tmp_path, small)
    assert "warning: 8 responses are blank" in capsys.readouterr().out


def test_full_data_that_differs_from_the_published_counts_is_warned_about(
    monkeypatch, capsys, tmp_path, small
):
    write(tmp_path, small)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda dataset, name, **options: str(tmp_path / name)
    )
    call(monkeypatch, script("prepare"), "--dir", tmp_path / "out")
    out = capsys.readouterr().out
    for count in ("1,030", "12,999", "19,638", "19,727"):
        assert f"WARNING: {count} expected" in out


def named_history(history):
    return lambda survey, conversations: conversations[2].update(conversation_history=history)


@pytest.mark.parametrize(
    "change, named",
    [
        (
            lambda survey, conversations: conversations[2].update(user_id="stranger"),
            ["c2", "stranger", "survey.jsonl"],
        ),
        (
            named_history([message(0, "narrator", "Once.")]),
            ["conversations.jsonl, row 3: conversation_history.0.role"],
        ),
        (
            named_history([message("first", "user", "Once.")]),
            ["conversations.jsonl, row 3", "turn"],
        ),
        (named_history([{"turn": 0, "role": "user"}]), ["conversations.jsonl, row 3", "content"]),
        (named_history([message(0, "user", 5)]), ["conversations.jsonl, row 3", "content"]),
        (
            lambda survey, conversations: conversations[2].pop("conversation_history"),
            ["row 3: conversation_history"],
        ),
        (
            lambda survey, conversations: survey[2].pop("num_completed_conversations"),
            ["survey.jsonl, row 3"],
        ),
        (
            lambda survey, conversations: conversations.append(conversations[3]),
            ["stands there twice"],
        ),
        (
            lambda survey, conversations: conversations.__delitem__(slice(30, None)),
            ["6 conversations"],
        ),
    ],
)
def test_a_spoilt_row_is_named_and_nothing_written(
    monkeypatch, capsys, tmp_path, small, change, named
):
    change(*small)
    write(tmp_path, small)
    refused(
        monkeypatch,
        capsys,
        script("prepare"),
        ["--data", tmp_path, "--dir", tmp_path / "out"],
        *named,
    )
    assert not content_of(tmp_path / "out")


@pytest.mark.parametrize("file", ["survey", "conversations"])
@pytest.mark.parametrize(
    "spoil, named",
    [
        (
            lambda content: "<!DOCTYPE html>\n<html><body>429 Too Many Requests</body></html>\n",
            "row 1",
        ),
        (lambda content: '{"error": "Too Many Requests"}\n', "row 1"),
        (lambda content: content[:-20], "row "),
    ],
)
def test_an_error_page_and_a_short_line_are_named(
    monkeypatch, capsys, tmp_path, small, file, spoil, named
):
    path = write(tmp_path, small) / f"{file}.jsonl"
    path.write_text(spoil(path.read_text()))
    refused(
        monkeypatch,
        capsys,
        script("prepare"),
        ["--data", tmp_path, "--dir", tmp_path / "out"],
        path,
        named,
    )
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


def test_a_demo_on_a_full_disk_is_one_line(tmp_path):
    status, _, err = start(
        SCRIPTS, "prepare", "--demo", "--dir", tmp_path / "out", largest_file=200_000
    ).outcome()
    assert status == 2 and [line.startswith("error: ") for line in err.splitlines()] == [True]
    assert not (tmp_path / "out" / "data").exists()


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
        ("vary_fewshot", "num_shots", [0]),
        ("vary_fewshot", "trials", -1),
    ],
)
def test_an_unusable_constant_is_named_before_any_data_are_read(
    monkeypatch, capsys, tmp_path, name, constant, value
):
    module = quick(monkeypatch, script(name), **{constant: value})
    refused(
        monkeypatch,
        capsys,
        module,
        ["--dir", tmp_path / "out"],
        f"{constant.removeprefix('demo_')}: ",
    )
    assert not content_of(tmp_path)


def test_other_rows_are_replaced_only_with_overwrite(monkeypatch, capsys, tmp_path, small):
    first = prepare(monkeypatch, tmp_path, small)
    assert prepare(monkeypatch, tmp_path, small) == first
    before, options = (
        content_of(tmp_path / "out"),
        ["--data", tmp_path / "source", "--dir", tmp_path / "out"],
    )
    small[1][:] = [c for c in small[1] if c["user_id"] != "user17"]
    write(tmp_path / "source", small)
    refused(monkeypatch, capsys, script("prepare"), options, "--overwrite")
    assert content_of(tmp_path / "out") == before
    assert len(prepare(monkeypatch, tmp_path, small, "--overwrite")[1]) < len(first[1])
    (
        tmp_path / "out" / "data" / "prism" / "split.json"
    ).unlink()  # as beside files of the released script
    refused(monkeypatch, capsys, script("prepare"), options, "--overwrite")


# ---- Honest pairs ---------------------------------------------------------------------------------------------------


def test_every_response_reaches_the_tokenizer_as_prose_and_its_embedding_is_the_models(
    monkeypatch, ran, tmp_path
):
    call(monkeypatch, script("prepare"), "--data", ran.data, "--dir", tmp_path, "--limit", 12)
    module, texts, load_tokenizer = script(GENERATE), [], lore.reward_model.load_tokenizer

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
    call(monkeypatch, module, "--dir", tmp_path, "--model", ran.model)
    assert texts and not any(bracket in text for text in texts for bracket in "[]")
    last = {
        text.split("<|end_header_id|>")[-1].strip().removesuffix("<|eot_id|>") for text in texts
    }
    rows = [row for rows in rows_of(tmp_path) for row in rows]
    for row in rows:
        assert {
            row["extra_info"]["chosen_utterance"],
            *row["extra_info"]["rejected_utterance"],
        } <= last
    backbone, tokenizer = lore.reward_model.load_reward_model(ran.model, device="cpu")
    row = max(rows, key=lambda row: len(row["extra_info"]["rejected_utterance"]))
    info = row["extra_info"]
    assert info["pair_format"] == prism.PAIR_FORMAT and info["rejected_conv_embedding"].shape == (
        3,
        64,
    )
    for response, vector in [
        (info["chosen_utterance"], info["chosen_conv_embedding"]),
        *zip(info["rejected_utterance"], info["rejected_conv_embedding"]),
    ]:
        alone = state_alone(
            backbone, tokenizer, [*row["prompt"], {"role": "assistant", "content": response}]
        )
        assert vector.dtype == torch.bfloat16
        torch.testing.assert_close(vector.float(), alone, rtol=0.01, atol=0.01)


def test_embedding_resumes_from_its_cache_and_finished_files_are_recognised(
    monkeypatch, capsys, ran, tmp_path
):
    for name in ("data", ".embedding_cache"):
        shutil.copytree(ran.folder / name, tmp_path / name)
    options = ["--dir", tmp_path, "--model", ran.model]
    module = script(GENERATE)
    without_forward(monkeypatch)
    call(monkeypatch, module, *options)
    assert plain(rows_of(tmp_path)) == plain(rows_of(ran.folder))
    finished = content_of(tmp_path)
    call(monkeypatch, module, *options)
    assert "finished already" in capsys.readouterr().out
    (
        tmp_path / lore.embedding_files.HEAD_FILE
    ).unlink()  # files of the released script come without
    refused(monkeypatch, capsys, module, options, TRAIN, "--overwrite")
    assert {**finished, **content_of(tmp_path)} == finished


def test_ctrl_c_in_the_embedding_says_that_a_second_run_resumes(monkeypatch, capsys, ran, tmp_path):
    shutil.copytree(ran.folder / "data", tmp_path / "data")
    module = script(GENERATE)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "embed_with_record", stop)
    interrupted(monkeypatch, capsys, module, "--dir", tmp_path, "--model", ran.model)
    assert not list(tmp_path.glob("*.pkl"))


def test_parquet_files_of_different_runs_are_named(monkeypatch, capsys, ran, embeddings):
    folder, options = embeddings / "data" / "prism", ["--dir", embeddings, "--model", ran.model]
    finished = [(embeddings / name).read_bytes() for name in (TRAIN, TEST)]
    module = script(GENERATE)
    pd.read_parquet(folder / "test.parquet")[1:].to_parquet(folder / "test.parquet")
    refused(monkeypatch, capsys, module, options, folder, "different runs")
    (folder / "test.parquet").write_bytes(b"<html>")
    refused(monkeypatch, capsys, module, options, "test.parquet")
    for content in ((folder / "split.json").read_text()[:100], "[]", '{"rows": 1}'):
        (folder / "split.json").write_text(content)
        refused(monkeypatch, capsys, module, options, folder / "split.json")
    shutil.rmtree(folder)
    refused(monkeypatch, capsys, module, options, "prepare.py")
    assert [(embeddings / name).read_bytes() for name in (TRAIN, TEST)] == finished


# ---- What train_basis.py reads --------------------------------------------------------------------------------------


def spoil(folder, change, name=TRAIN):
    """Apply `change` to the rows of one of the embedding files."""
    rows = torch.load(folder / name, weights_only=True)
    change(rows)
    lore.files.save_torch(folder / name, rows)
    sign_again(folder)


def as_released(rows):
    for info in (row["extra_info"] for row in rows):
        info["rejected_conv_embedding"] = info["rejected_conv_embedding"].float().mean(0).bfloat16()
        del info["pair_format"]


def test_released_embeddings_are_read_and_called_malformed(
    monkeypatch, capsys, ran, embeddings, trainer
):
    for name in (TRAIN, TEST):
        spoil(embeddings, as_released, name)
    (embeddings / lore.embedding_files.HEAD_FILE).unlink()
    quick(monkeypatch, trainer, MODEL_NAME=str(ran.model), K_list=[0, 2], num_iterations=5)
    call(monkeypatch, trainer, "--dir", embeddings)
    train, test = rows_of(embeddings)
    out = capsys.readouterr().out
    assert (
        f"{len(train) + len(test):,} rows are in the released format, whose rejected side is malformed"
        in out
    )
    seen = sum(row["extra_info"]["seen"] for row in train)
    assert f"{seen:,} train pairs" in out  # one a turn
    assert (embeddings / "checkpoints" / "PRISM_V_lore_K_2_alpha_10000.0.pt").exists()


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
        torch.save(
            [
                {
                    "prompt": [],
                    "extra_info": {
                        "split": "train",
                        "seen": user < 3,
                        "user_id": f"user{user}",
                        "dialog_id": f"c{user}",
                        "turn_nb": 0,
                        "chosen_utterance": "good",
                        "rejected_utterance": ["bad"],
                        "pair_format": prism.PAIR_FORMAT,
                        "chosen_conv_embedding": torch.randn(4, generator=generator).bfloat16(),
                        "rejected_conv_embedding": torch.randn(
                            1, 4, generator=generator
                        ).bfloat16(),
                    },
                }
                for user in range(5)
            ],
            tmp_path / name,
            _use_new_zipfile_serialization=archive,
        )
    about = {
        "identity": {
            "model": "m",
            "reward_head": hashlib.sha256(
                json.dumps(torch.ones(4, 1).tolist()).encode()
            ).hexdigest(),
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
    save_file(
        {"reward_head": torch.ones(4, 1)},
        tmp_path / lore.embedding_files.HEAD_FILE,
        {"about": json.dumps(about)},
    )
    call(monkeypatch, trainer, "--dir", tmp_path)
    results = results_in(tmp_path)
    assert results["config"]["data"] == "PRISM (d)" and results["identity"] == about["identity"]
    assert (results["users"], results["unseen_users"]) == (
        ["user0", "user1", "user2"],
        ["user3", "user4"],
    )


def test_pairs_are_the_chosen_minus_each_rejected_response(ran):
    data = prism.load_embeddings(ran.folder, None)[0]
    expected = {}
    for info in (row["extra_info"] for row in rows_of(ran.folder)[0] if row["extra_info"]["seen"]):
        for rejected in info["rejected_conv_embedding"]:
            pair = info["chosen_conv_embedding"].float() - rejected.float()
            expected.setdefault(info["user_id"], []).append(pair.tolist())
    assert data["seen"] == sorted(expected)
    for user, X in zip(data["seen"], data["train"]):
        assert sorted(X.tolist()) == sorted(expected[user])


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda rows: rows[4]["extra_info"]["chosen_conv_embedding"].fill_(float("nan")), "row 4"),
        (lambda rows: rows[4]["extra_info"].pop("rejected_conv_embedding"), "row 4"),
        (
            lambda rows: rows[4]["extra_info"].update(rejected_conv_embedding=torch.zeros(0, 64)),
            "row 4",
        ),
        (
            lambda rows: [
                row["extra_info"].update(
                    chosen_conv_embedding=torch.ones(32), rejected_conv_embedding=torch.zeros(1, 32)
                )
                for row in rows
            ],
            "d = 32",
        ),
        (
            lambda rows: rows[4]["extra_info"].update(
                chosen_conv_embedding=torch.ones(32), rejected_conv_embedding=torch.zeros(1, 32)
            ),
            "row 4",
        ),
        (lambda rows: rows.clear(), "list of rows"),
        (lambda rows: [row["extra_info"].update(seen=True) for row in rows], "0 unseen users"),
        (lambda rows: rows[0]["extra_info"].update(user_id="somebody"), "users"),
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
    split, path = embeddings / "data" / "prism" / "split.json", embeddings / TEST
    content = split.read_text()
    split.write_text(json.dumps({**json.loads(content), "rows": "of another run"}))
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], "other rows")
    split.write_text(content)
    whole = path.read_bytes()
    shutil.copy(embeddings / TRAIN, path)
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path, "another run")
    path.write_bytes(whole[: len(whole) // 2])
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path)
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(embeddings / "owned").encode() + b"'\ntR.")
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path, "os.system")
    assert not (embeddings / "owned").exists()
    path.unlink()
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path, GENERATE)


# ---- RewardBench 2: the benchmark's rules ---------------------------------------------------------------------------


def ties_by_the_formula(prompts):
    """The score of Ties in numpy: five means over the prompts of each kind, not-a-number counted as 0."""
    kinds = {kind: {} for kind in ("ref", "tied")}
    for name, correct, incorrect in prompts:
        kind, number = name.split(":")
        kinds[kind][number] = np.array([min(correct) - max(incorrect), max(correct) - min(correct)])
    common = [number for number in kinds["tied"] if number in kinds["ref"]]
    ref, tied = (
        np.array([kinds[kind][number] for number in common]).reshape(-1, 2)
        for kind in ("ref", "tied")
    )
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
    score, chance = script("eval_rb2").ties_score, np.random.default_rng(0)
    for _ in range(50):
        prompts = [
            (
                f"{kind}:{number}",
                chance.integers(0, 4, correct).astype(float).tolist(),
                chance.integers(0, 3, 3).astype(float).tolist(),
            )
            for number in range(6)
            for kind, correct in (("ref", 1), ("tied", 3))
            if chance.random() < 0.8
        ]
        if prompts:
            assert score(prompts) == pytest.approx(ties_by_the_formula(prompts))
    # tied: worst correct 5, best incorrect 1, so margin 4, spread 1; ref margin 2
    assert score(
        [("ref:A", [3.0], [1.0, 0.0]), ("tied:A", [5.0, 6.0], [1.0, -2.0])]
    ) == pytest.approx(1 + 0.01 * math.tanh(2 / 1 - 1))
    for prompts, named in (
        ([("odd:A", [1.0], [0.0])], "odd:A"),
        ([("tied:3", [1.0, 2.0], [0.0])] * 2, "tied:3"),
    ):
        with input_error(named):
            score(prompts)


def test_a_shared_top_score_counts_one_over_the_number_at_the_top():
    rows = [
        types.SimpleNamespace(id=str(i), subset="Math", chosen=["a"], rejected=["b", "c", "d"])
        for i in range(5)
    ]
    scores = np.array(
        [[3, 1, 2, 0], [3, 3, 2, 0], [3, 3, 3, 3], [2, 3, 0, 0], [2, 3, 3, 0]], np.float64
    )
    table, failures = script("eval_rb2").evaluate(rows, scores.ravel())
    assert (
        table["Math"] == pytest.approx((1 + 1 / 2 + 1 / 4 + 0 + 0) / 5)
        and table["Average"] == table["Math"]
    )
    assert failures == ["1", "2", "3", "4"]


# ---- RewardBench 2: the script --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rewardbench(ran, tmp_path_factory):
    """A folder with a random basis and weights of four users in every format; the rows, the basis, the weights."""
    folder, generator = tmp_path_factory.mktemp("rewardbench"), torch.Generator().manual_seed(1)
    basis, weights = (
        torch.randn(64, 3, generator=generator),
        torch.rand(4, 3, generator=generator).softmax(1),
    )
    lore.files.save_torch(folder / "basis.pt", basis)
    np.save(folder / "basis.npy", basis.numpy())
    lore.files.save_tensors(
        folder / "basis.safetensors", {"V": basis, "W": weights}
    )  # as before a basis named its model
    lore.files.save_tensors(folder / "named.safetensors", {"other": basis, "V": basis * 0})
    lore.files.save_torch(folder / "weights.pt", weights)
    return folder, rows_in(ran.data / "rewardbench_test.jsonl.gz"), basis, weights


@pytest.fixture
def table(monkeypatch, rewardbench, ran, tmp_path):
    """A function: run eval_rb2.py with arguments -> its table, reward -> subset -> score."""

    def evaluated(*arguments, dir=rewardbench[0] / "cache"):
        call(
            monkeypatch,
            script("eval_rb2"),
            "--data",
            ran.data,
            "--model",
            ran.model,
            "--device",
            "cpu",
            "--dir",
            dir,
            "--save_csv",
            tmp_path / "table.csv",
            *arguments,
        )
        with open(tmp_path / "table.csv", newline="") as file:
            return {
                row.pop("reward"): {subset: float(score) for subset, score in row.items()}
                for row in csv.DictReader(file)
            }

    return evaluated


@pytest.fixture(scope="module")
def states(rewardbench, ran):
    """A function: subset -> for each of its rows the states of the answers, each computed alone.

    max_tokens: what is left of a conversation, `side` where it is cut.
    """
    backbone, tokenizer = lore.reward_model.load_reward_model(ran.model, device="cpu")

    @functools.cache
    def computed(subset=None, max_tokens=None, side="left"):
        found = []
        for row in (row for row in rewardbench[1] if subset in (None, row["subset"])):
            found.append([])
            for answer in (*row["chosen"], *row["rejected"]):
                text = tokenizer.apply_chat_template(
                    [
                        {"role": "user", "content": row["prompt"]},
                        {"role": "assistant", "content": answer},
                    ],
                    tokenize=False,
                )
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
                if max_tokens:
                    ids = ids[:, -max_tokens:] if side == "left" else ids[:, :max_tokens]
                with torch.no_grad():
                    found[-1].append(backbone(ids).last_hidden_state[0, -1])
        return [torch.stack(of_row) for of_row in found]

    return computed


def expected_table(rows, states, reward):
    """The scores by subset of a reward vector, by a plain loop."""
    right, ties = {}, []
    for row, of_row in zip(rows, states, strict=True):
        scores = (of_row.double() @ reward.double()).numpy()
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
    for name, reward in (
        *((f"column {k}", basis[:, k]) for k in range(3)),
        ("mean user", basis @ weights.mean(0)),
    ):
        assert found[name] == pytest.approx(expected_table(rows, states(), reward), abs=1e-5)
    of_users = [expected_table(rows, states(), basis @ w) for w in weights]
    average = {subset: np.mean([of_user[subset] for of_user in of_users]) for subset in of_users[0]}
    assert found["average over users"] == pytest.approx(average, abs=1e-5)


def test_heads_are_read_from_pt_npy_and_safetensors_and_one_column_is_a_head(
    table, rewardbench, ran, tmp_path
):
    folder, _, basis, _ = rewardbench
    expected = table("--rm_head", folder / "basis.pt", "--user_weights", folder / "weights.pt")
    for head, *more in (
        ("basis.npy",),
        ("basis.safetensors",),
        ("named.safetensors", "--head_key", "other"),
    ):
        assert (
            table("--rm_head", folder / head, *more, "--user_weights", folder / "basis.safetensors")
            == expected
        )
    lore.files.save_torch(tmp_path / "column.pt", basis[:, 1].clone())
    assert table("--rm_head", tmp_path / "column.pt")["reward head"] == pytest.approx(
        expected["column 1"], abs=1e-5
    )
    lore.files.save_torch(
        tmp_path / "head.pt", load_file(ran.model / "model.safetensors")["score.weight"]
    )
    assert (
        table("--mode", "seqclf")
        == table("--mode", "lmhead", "--rm_head", tmp_path / "head.pt")
        == table()
    )
    lore.files.save_torch(tmp_path / "zero.pt", torch.zeros(64))  # all four answers share the top
    assert (
        table("--rm_head", tmp_path / "zero.pt", "--subset", "Math")["reward head"]["Math"] == 0.25
    )


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
    found = table(
        "--rm_head",
        folder / "basis.pt",
        "--subset",
        "Safety",
        "--max_length",
        90,
        "--truncation_side",
        side,
    )
    cut = states("Safety", 90, side)
    assert not all(torch.allclose(a, b) for a, b in zip(cut, states("Safety")))
    for k in range(3):
        assert found[f"column {k}"] == pytest.approx(
            expected_table(rows, cut, basis[:, k]), abs=1e-5
        )


def test_subset_limit_top_k_and_failures(table, rewardbench, capsys):
    folder, rows, _, _ = rewardbench
    found = table("--subset", "Math", "--limit", 2, "--verbose_failures")
    out = capsys.readouterr().out
    assert list(found["reward head"]) == ["Math", "Average"] and "2 rows" in out
    wrong = out.split("gets wrong: ")[1].strip()
    assert (
        found["reward head"]["Math"] == 1 - (0 if wrong == "none" else len(wrong.split(", "))) / 2
    )
    assert set(wrong.split(", ")) <= {row["id"] for row in rows if row["subset"] == "Math"} | {
        "none"
    }
    everything, best = (
        table("--rm_head", folder / "basis.pt", *more) for more in ([], ["--top_k", 1])
    )
    assert best == {
        name: scores
        for name, scores in everything.items()
        if scores["Average"] == max(other["Average"] for other in everything.values())
    }


def test_the_demos_own_basis_is_scored_and_one_of_another_model_refused(
    monkeypatch, capsys, ran, rewardbench, tmp_path
):
    own = ran.folder / "results" / f"K_{PLANTED_RANK}.safetensors"
    options = ["--subset", "Math", "--dir", ran.folder, "--save_csv", tmp_path / "table.csv"]
    module = quick(monkeypatch, script("eval_rb2"), HERE=ran.folder)
    call(monkeypatch, module, *options, "--rm_head", own, "--user_weights", own)
    out = capsys.readouterr().out
    assert "synthetic" in out
    with open(tmp_path / "table.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["reward", "Math", "Average"]
    printed_rows = [line.split() for line in out.splitlines()[-len(rows) :]]
    assert [[" ".join(cells[:-2]), *cells[-2:]] for cells in printed_rows] == [
        [row[0], *(f"{float(score):.4f}" for score in row[1:])] for row in rows
    ]
    tensors, about = lore.files.load_tensors(own)
    about["identity"].update(
        model="another/model", reward_head=hashlib.sha256(b"another").hexdigest()
    )
    lore.files.save_tensors(tmp_path / "foreign.safetensors", tensors, **about)
    foreign = tmp_path / "foreign.safetensors"
    for head in (
        ["--rm_head", foreign],
        ["--rm_head", rewardbench[0] / "basis.pt", "--user_weights", foreign],
    ):
        refused(monkeypatch, capsys, module, [*options, *head], foreign, "another/model")


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
        (["--rm_head", "empty.pt"], ["empty.pt"]),
        (["--rm_head", "basis.pt", "--user_weights", "scaled.pt"], ["scaled.pt", "shares of 1"]),
        (
            ["--rm_head", "basis.safetensors", "--user_weights", "other_seed.safetensors"],
            ["other_seed", "another fit"],
        ),
        (["--rm_head", "basis.pt", "--user_weights", "empty.pt"], ["empty.pt"]),
        (["--save_csv", "."], ["--save_csv"]),
    ],
)
def test_unusable_heads_and_options_are_one_line(
    monkeypatch, capsys, tmp_path, rewardbench, ran, arguments, named
):
    for name in ("basis.pt", "basis.safetensors"):
        shutil.copy(rewardbench[0] / name, tmp_path)
    lore.files.save_torch(tmp_path / "wide.pt", torch.ones(32, 2))
    lore.files.save_torch(tmp_path / "nan.pt", torch.full((64, 1), float("nan")))
    lore.files.save_torch(tmp_path / "complex.pt", torch.ones(64, 1, dtype=torch.complex64))
    lore.files.save_torch(tmp_path / "empty.pt", torch.ones(64, 0))
    tensors, about = lore.files.load_tensors(tmp_path / "basis.safetensors")
    columns = lore.files.load_pickle(tmp_path / "basis.pt").shape[1]
    lore.files.save_torch(tmp_path / "scaled.pt", torch.full((5, columns), 2.0))
    lore.files.save_tensors(
        tmp_path / "other_seed.safetensors", {"W": torch.full((5, columns), 1 / columns)}, seed=17
    )
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "cut.safetensors").write_bytes(
        (rewardbench[0] / "basis.safetensors").read_bytes()[:100]
    )
    arguments = [tmp_path / a if "." in str(a) and "/" not in str(a) else a for a in arguments]
    before = content_of(tmp_path)
    options = [
        "--data",
        ran.data,
        "--model",
        ran.model,
        "--dir",
        rewardbench[0] / "c",
        "--save_csv",
        tmp_path / "t.csv",
    ]
    refused(monkeypatch, capsys, script("eval_rb2"), [*options, *arguments], *named)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"subset": "Poetry"}, "subset"),
        ({"chosen": []}, "chosen"),
        ({"rejected": []}, "rejected"),
        ({"chosen": None}, "chosen"),
        ({"prompt": ...}, "prompt"),
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
        rows[2][column] = value
        if value is ...:
            del rows[2][column]
    write_rows(tmp_path / "test.jsonl", rows)
    options = ["--data", tmp_path, "--model", "unread", "--dir", tmp_path / "out"]
    refused(monkeypatch, capsys, script("eval_rb2"), options, f"test.jsonl, row 3: {named}")


def test_without_a_gpu_a_model_is_asked_for(monkeypatch, capsys, tmp_path, ran):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(
        monkeypatch,
        capsys,
        script("eval_rb2"),
        ["--data", ran.data, "--dir", tmp_path],
        "Skywork",
        "--model",
    )


def test_a_survey_twice_in_a_folder_is_refused(monkeypatch, capsys, ran, tmp_path):
    for path in ran.data.glob("*.gz"):
        shutil.copy(path, tmp_path)
    (tmp_path / "survey.jsonl").write_bytes(
        gzip.decompress((tmp_path / "survey.jsonl.gz").read_bytes())
    )
    refused(
        monkeypatch,
        capsys,
        script("prepare"),
        ["--data", tmp_path, "--model", ran.model, "--dir", tmp_path / "out"],
        "survey.jsonl, survey.jsonl.gz",
    )


def test_checkpoints_of_an_earlier_sweep_go_with_it(monkeypatch, trainer, embeddings):
    folder = embeddings / "checkpoints"
    folder.mkdir(exist_ok=True)
    for name in ("PRISM_V_lore_K_9_alpha_1.0.pt", "PRISM_W_lore_K_9_alpha_1.0.pt", "mine.pt"):
        (folder / name).write_bytes(b"")
    call(
        monkeypatch,
        quick(monkeypatch, trainer, demo_K_list=[1], demo_num_iterations=5, controls=False),
        "--dir",
        embeddings,
    )
    assert {path.name for path in folder.iterdir()} == {
        "mine.pt",
        "PRISM_V_lore_K_1_alpha_0.1.pt",
        "PRISM_W_lore_K_1_alpha_0.1.pt",
    }
