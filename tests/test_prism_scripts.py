"""The PRISM scripts as a user runs them: the split, honest pairs, RewardBench 2, and every slip."""

import csv
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import ROOT, call, fresh_process, input_error, load_script, outcome, refused, sign_again
from safetensors import safe_open
from standin import PLANTED_RANK, write_prism_corpus, write_rewardbench_corpus

import utils

SCRIPTS = ROOT / "PRISM"
UNSEEN = "Unseen User Unseen Prompts"


def run_process(*command, cwd):
    """What a script printed; it must have succeeded."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


script = functools.partial(load_script, "PRISM")


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def embeddings_in(folder):
    """The rows of both embedding files of a folder."""
    return [torch.load(folder / name, weights_only=True) for name in utils.PRISM_FILES]


def content_of(folder):
    """What stands in a folder, below it too: path -> bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A copy of the repository in which the README's commands ran: (the scripts' folder, script -> what it printed)."""
    copy = tmp_path_factory.mktemp("clone") / "LoRe"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
        ".*", "data", "results", "checkpoints", "*.pkl", "*.safetensors", "*.orig"))
    folder = copy / "PRISM"
    printed = {"prepare": run_process("PRISM/prepare.py", "--demo", cwd=copy)}
    printed["generate-prism-embeddings"] = run_process("generate-prism-embeddings.py", cwd=folder)
    with ThreadPoolExecutor() as pool:
        names = ("train_basis", "vary_fewshot")
        printed |= dict(zip(names, pool.map(lambda name: run_process(f"{name}.py", cwd=folder), names)))
    basis = f"results/K_{PLANTED_RANK}.safetensors"
    printed["eval_rb2"] = run_process("eval_rb2.py", "--rm_head", basis, "--user_weights", basis, "--save_csv",
                                      "results/rewardbench.csv", cwd=folder)
    return folder, printed


@pytest.fixture(scope="module")
def model(demo):
    return demo[0] / ".standin" / "model"


@pytest.fixture
def embeddings(demo, tmp_path):
    """A folder with the demo's rows, embeddings and head, to be spoilt."""
    shutil.copytree(demo[0] / "data", tmp_path / "data")
    for name in (*utils.PRISM_FILES, utils.HEAD_FILE):
        shutil.copy(demo[0] / name, tmp_path)
    return tmp_path


# ---- The demo, the formats, the results -----------------------------------------------------------------------------


def test_every_step_of_the_demo_says_that_it_is_synthetic(demo):
    folder, printed = demo
    for name in ("prepare", "train_basis", "eval_rb2"):
        assert "synthetic" in printed[name]
    assert "stand-in" in printed["prepare"] and "demo settings" in printed["train_basis"]
    assert "synthetic" in json.loads((folder / "results" / "results.json").read_text())["config"]["data"]


def test_demo_rises_from_the_pooled_model_to_the_planted_rank_on_unseen_users(demo):
    fits = json.loads((demo[0] / "results" / "results.json").read_text())["fits"]
    unseen = {fit["K"]: fit["mean_accuracy"][UNSEEN] for fit in fits}
    assert all(unseen[K] < unseen[K + 1] for K in range(1, PLANTED_RANK))
    assert unseen[PLANTED_RANK] > unseen[1] + 0.2


def test_demo_writes_what_its_scripts_say(demo):
    folder = demo[0]
    assert {path.name for path in (folder / "data" / "prism").iterdir()} == {"train.parquet", "test.parquet",
                                                                             "split.json"}
    fits = json.loads((folder / "results" / "results.json").read_text())["fits"]
    assert [fit["K"] for fit in fits] == script("train_basis").demo_K_list
    names = {f"PRISM_{tensor}_lore_K_{fit['K']}_alpha_{fit['alpha']}.pt" for fit in fits for tensor in "VW"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == names
    for fit in fits:
        with safe_open(folder / "results" / fit["file"], "pt") as file:
            for name in "VW":
                saved = torch.load(folder / "checkpoints" / f"PRISM_{name}_lore_K_{fit['K']}_alpha_{fit['alpha']}.pt",
                                   weights_only=True)
                assert torch.equal(saved, file.get_tensor(name))
        survived = f"rank {fit['K']}, seed 0: {fit['columns']} of {fit['K']} columns"
        assert fit["K"] == 0 or survived in demo[1]["train_basis"]
    for name in ("accuracy_by_rank.png", "vary_fewshot.png"):
        assert (folder / "results" / name).read_bytes().startswith(b"\x89PNG")


def test_results_agree_with_the_saved_tensors_and_the_embeddings(demo):
    results = json.loads((demo[0] / "results" / "results.json").read_text())
    margins = {user: [] for user in results["unseen_users"]}
    fit, = (fit for fit in results["fits"] if fit["K"] == PLANTED_RANK)
    with safe_open(demo[0] / "results" / fit["file"], "pt") as file:
        V, W = file.get_tensor("V").double(), file.get_tensor("W_unseen").double()
    w = dict(zip(results["unseen_users"], W))
    for info in (row["extra_info"] for row in embeddings_in(demo[0])[1]):
        for rejected in info["rejected_conv_embedding"]:
            if not info["seen"]:
                x = info["chosen_conv_embedding"].double() - rejected.double()
                margins[info["user_id"]].append(float(x @ V @ w[info["user_id"]]))
    of_user = {user: np.mean(np.array(values) > 0) for user, values in margins.items()}
    assert fit["accuracy_of_user"][UNSEEN] == pytest.approx(of_user, abs=0.1)  # float32 may turn a margin near 0
    assert fit["mean_accuracy"][UNSEEN] == pytest.approx(np.mean(list(of_user.values())), abs=0.02)


def test_shots_are_conversations(demo):
    found = json.loads((demo[0] / "results" / "vary_fewshot.json").read_text())
    assert found["config"]["shots_are"] == "conversations"
    curve, = found["curves"]
    assert len(curve["unseen_mean"]) == len(found["config"]["num_shots"]) == 3
    assert curve["unseen_std"][0] > 1e-3
    assert curve["unseen_std"][2] < 1e-9  # three conversations are all that a user has
    data = utils.load_prism(demo[0], None)[0]
    dialogs = {user: {} for user in data["unseen"]}
    for info in (row["extra_info"] for row in embeddings_in(demo[0])[0] if not row["extra_info"]["seen"]):
        of_user = dialogs[info["user_id"]]
        of_user[info["dialog_id"]] = of_user.get(info["dialog_id"], 0) + len(info["rejected_utterance"])
    for user, X, groups in zip(data["unseen"], data["train_unseen"], data["dialogs_unseen"]):
        assert len(groups) == len(X)
        assert groups.unique(return_counts=True)[1].tolist() == [n for _, n in sorted(dialogs[user].items())]


# ---- The split ------------------------------------------------------------------------------------------------------


def message(turn, role, content, if_chosen=None):
    return {"turn": turn, "role": role, "content": content, "if_chosen": if_chosen}


def turn(number, name=""):
    """One user message, a chosen and a rejected response."""
    return [message(number, "user", f"question {name}{number}"),
            message(number, "model", f"good {name}{number}", True),
            message(number, "model", f"bad {name}{number}", False)]


def conversation(name, user, history):
    return {"conversation_id": name, "user_id": user, "conversation_history": history}


@pytest.fixture
def small(tmp_path):
    """Survey and conversations of 23 users with none to eight conversations: two lists of rows, to be spoilt."""
    survey = [{"user_id": f"user{i}", "num_completed_conversations": i % 9} for i in range(23)]
    owners = [user["user_id"] for user in survey for _ in range(user["num_completed_conversations"])]
    owners = owners[::2] + owners[1::2]  # a user's conversations are not in one piece
    return survey, [conversation(f"c{i}", user, turn(0, f"{i}.") + turn(1, f"{i}.")) for i, user in enumerate(owners)]


def prepare(monkeypatch, folder, small, *arguments):
    """Run prepare.py on two lists of rows -> (split.json, rows of train.parquet, of test.parquet)."""
    for name, rows in zip(("survey", "conversations"), small):
        write_rows(folder / "source" / f"{name}.jsonl", rows)
    call(monkeypatch, script("prepare"), "--data", folder / "source", "--dir", folder / "out", *arguments)
    return prepared(folder / "out")


def prepared(folder):
    folder = folder / "data" / "prism"
    return json.loads((folder / "split.json").read_text()), *(utils.load_parquet(folder / f"{name}.parquet")
                                                              for name in ("train", "test"))


def numpy_split(survey, conversations):
    """The released split, from its description: [(user, seen, train conversations, test conversations)]."""
    rng = np.random.RandomState(123)
    users = np.array([user["user_id"] for user in survey if user["num_completed_conversations"] > 0])
    rng.shuffle(users)
    found = []
    for place, user in enumerate(users):
        ids = np.array([c["conversation_id"] for c in conversations if c["user_id"] == user])
        if len(ids) > 5:
            rng.shuffle(ids)
            found.append((str(user), bool(place < int(0.8 * len(users))), list(ids[:len(ids) // 2]),
                          list(ids[len(ids) // 2:])))
    return found


def test_split_is_the_function_of_seed_123_that_was_released(monkeypatch, tmp_path, small):
    split, train, test = prepare(monkeypatch, tmp_path, small)
    expected = numpy_split(*small)
    assert [(user, of["seen"], of["train"], of["test"]) for user, of in split["users"].items()] == expected
    assert {True, False} == {seen for _, seen, _, _ in expected} and len(expected) == 6
    for rows, name, part in ((train, "train", 2), (test, "test", 3)):
        infos = [row["extra_info"] for row in rows]
        assert [(i["user_id"], i["seen"], i["dialog_id"], i["turn_nb"]) for i in infos] == [
            (of[0], of[1], dialog, number) for of in expected for dialog in of[part] for number in (0, 1)]
        assert {(i["split"], i["total_turn_nb"]) for i in infos} == {(name, 2)}


def test_split_is_the_same_in_a_fresh_process(monkeypatch, tmp_path, small):
    expected = prepare(monkeypatch, tmp_path, small)
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    processes = [fresh_process(code, SCRIPTS / "prepare.py", "--data", tmp_path / "source", "--dir", tmp_path / seed,
                               PYTHONHASHSEED=seed) for seed in ("1", "2")]
    for seed, process in zip(("1", "2"), processes):
        assert outcome(process)[0] == 0
        assert prepared(tmp_path / seed) == expected


def test_corpora_are_those_of_another_process(demo, tmp_path):
    write_prism_corpus(tmp_path / "PRISM")
    write_rewardbench_corpus(tmp_path / "benchmark")
    assert len(content_of(tmp_path)) == 4
    for path, content in content_of(tmp_path).items():
        assert (demo[0] / ".standin" / path.relative_to(tmp_path)).read_bytes() == content


def test_printed_counts_are_the_corpuses(demo):
    source = demo[0] / ".standin" / "PRISM"
    survey, conversations = (read_rows(source / f"{name}.jsonl") for name in ("survey", "conversations"))
    by_id = {c["conversation_id"]: c["conversation_history"] for c in conversations}
    counts = Counter()
    for user, seen, *parts in numpy_split(survey, conversations):
        counts["seen users" if seen else "unseen users"] += 1
        for name, ids in zip(("train", "test"), parts):
            replies = [m for i in ids for m in by_id[i] if m["role"] == "model"]
            rejected = sum(not m["if_chosen"] for m in replies)
            counts[f"{name} turns"] += sum(m["if_chosen"] for m in replies)
            counts[f"{name} pairs"] += rejected
            counts[f"{name} pairs of seen users"] += rejected * seen
    for name, count in counts.items():
        assert f"\n{name}: {count:,}\n" in demo[1]["prepare"]
    assert counts["train pairs"] > counts["train turns"]
    rejected = {len(row["extra_info"]["rejected_utterance"]) for row in prepared(demo[0])[1]}
    assert rejected == {1, 2, 3}


def test_prompt_holds_the_chosen_path_only(demo):
    by_id = {c["conversation_id"]: c["conversation_history"]
             for c in read_rows(demo[0] / ".standin" / "PRISM" / "conversations.jsonl")}
    lengths = set()
    for row in (row for rows in prepared(demo[0])[1:] for row in rows):
        info = row["extra_info"]
        expected = []
        for m in by_id[info["dialog_id"]]:
            if m["role"] == "user" and m["turn"] <= info["turn_nb"]:
                expected.append({"role": "user", "content": m["content"]})
            elif m["if_chosen"] and m["turn"] < info["turn_nb"]:
                expected.append({"role": "assistant", "content": m["content"]})
        assert row["prompt"] == expected
        lengths.add(len(expected))
    assert lengths == {1, 3, 5}


# ---- What prepare.py drops, refuses and keeps -----------------------------------------------------------------------


def test_incomplete_turns_are_left_out_and_counted(monkeypatch, capsys, tmp_path, small):
    asked, good, bad = turn(0)
    spoilt = next(c for c in small[1] if c["user_id"] == "user17")  # one of eight
    spoilt["conversation_history"] = [
        asked, bad,  # no chosen response
        *(dict(m, turn=1) for m in (asked, good, dict(good, content="also good"), bad)),  # two different ones
        *(dict(m, turn=2) for m in (asked, good, good, bad, dict(bad, content="worse"))),  # the same one twice
        *(dict(m, turn=3) for m in (asked, good)),  # no rejected one
        *(dict(m, turn=4) for m in (asked, asked, good, bad)),  # two messages
        *turn(5)]
    small[1].append(conversation("nothing complete", "user17", [asked, bad]))
    split, *files = prepare(monkeypatch, tmp_path, small)
    assert "5 turns without" in capsys.readouterr().out
    rows = [row for rows in files for row in rows if row["extra_info"]["dialog_id"] == spoilt["conversation_id"]]
    third, sixth = sorted(rows, key=lambda row: row["extra_info"]["turn_nb"])
    assert [third["extra_info"][key] for key in ("turn_nb", "total_turn_nb", "chosen_utterance", "rejected_utterance")
            ] == [2, 2, "good 0", ["bad 0", "worse"]]
    answer = {"role": "assistant", "content": "good 0"}
    question = {"role": "user", "content": "question 0"}
    assert third["prompt"] == [question]
    assert sixth["prompt"] == [question, answer, question, answer, {"role": "user", "content": "question 5"}]
    assert "nothing complete" not in str(split)


def test_full_data_that_differs_from_the_published_counts_is_warned_about(monkeypatch, capsys, tmp_path, small):
    for name, rows in zip(("survey", "conversations", "utterances"), (*small, [])):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    module = script("prepare")
    monkeypatch.setattr(module, "hub_file", lambda dataset, name: tmp_path / name)
    call(monkeypatch, module, "--dir", tmp_path / "out")
    printed = capsys.readouterr().out
    for count in ("1,030", "12,999", "19,638", "19,727"):
        assert f"WARNING: {count} expected" in printed


def named_history(history):
    return lambda survey, conversations: conversations[2].update(conversation_history=history)


@pytest.mark.parametrize("change, named", [
    (lambda survey, conversations: conversations[2].update(user_id="stranger"), ["c2", "stranger", "survey.jsonl"]),
    (named_history([message(0, "narrator", "Once.")]), ["conversations.jsonl, row 3", "conversation_history.0.role"]),
    (named_history([message("first", "user", "Once.")]), ["conversations.jsonl, row 3", "turn"]),
    (named_history([{"turn": 0, "role": "user"}]), ["conversations.jsonl, row 3", "content"]),
    (lambda survey, conversations: conversations[2].pop("conversation_history"), ["conversation_history"]),
    (lambda survey, conversations: survey[2].pop("num_completed_conversations"), ["survey.jsonl, row 3"]),
    (lambda survey, conversations: conversations.append(conversations[3]), ["stands there twice"]),
    (lambda survey, conversations: conversations.__delitem__(slice(30, None)), ["6 conversations"])])
def test_spoilt_row_is_named_and_nothing_written(monkeypatch, capsys, tmp_path, small, change, named):
    change(*small)
    for name, rows in zip(("survey", "conversations"), small):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    refused(monkeypatch, capsys, script("prepare"), ["--data", tmp_path, "--dir", tmp_path / "out"], *named)
    assert not content_of(tmp_path / "out")


@pytest.mark.parametrize("file", ["survey", "conversations", "utterances"])
@pytest.mark.parametrize("spoil, named", [
    (lambda content: "<!DOCTYPE html>\n<html><body>429 Too Many Requests</body></html>\n", "row 1"),
    (lambda content: '{"error": "Too Many Requests"}\n', "row 1"), (lambda content: content[:-20], "row ")])
def test_error_page_and_short_line_are_named(monkeypatch, capsys, tmp_path, demo, file, spoil, named):
    shutil.copytree(demo[0] / ".standin" / "PRISM", tmp_path / "source")
    path = tmp_path / "source" / f"{file}.jsonl"
    path.write_text(spoil(path.read_text()))
    refused(monkeypatch, capsys, script("prepare"), ["--data", tmp_path / "source", "--dir", tmp_path / "out"], path,
            named)
    assert not content_of(tmp_path / "out")


def test_missing_file_and_unusable_command_lines_are_named(monkeypatch, capsys, tmp_path):
    for arguments, named in ((["--data", tmp_path], "survey.jsonl"), (["--limit", 0], "--limit 0"),
                             (["--demo", "--data", tmp_path], "--demo"), (["--sideways"], "--sideways")):
        refused(monkeypatch, capsys, script("prepare"), [*arguments, "--dir", tmp_path], named)


def test_other_rows_are_replaced_only_with_overwrite(monkeypatch, capsys, tmp_path, small):
    first = prepare(monkeypatch, tmp_path, small)
    assert prepare(monkeypatch, tmp_path, small) == first
    before = content_of(tmp_path / "out")
    small[1][:] = [c for c in small[1] if c["user_id"] != "user17"]
    write_rows(tmp_path / "source" / "conversations.jsonl", small[1])
    refused(monkeypatch, capsys, script("prepare"), ["--data", tmp_path / "source", "--dir", tmp_path / "out"],
            "--overwrite")
    assert content_of(tmp_path / "out") == before
    assert len(prepare(monkeypatch, tmp_path, small, "--overwrite")[1]) < len(first[1])
    (tmp_path / "out" / "data" / "prism" / "split.json").unlink()  # as beside files of the released script
    refused(monkeypatch, capsys, script("prepare"), ["--data", tmp_path / "source", "--dir", tmp_path / "out"],
            "--overwrite")


# ---- Honest pairs ---------------------------------------------------------------------------------------------------


def test_every_response_reaches_the_tokenizer_as_prose(monkeypatch, demo, tmp_path):
    source = demo[0] / ".standin"
    call(monkeypatch, script("prepare"), "--data", source / "PRISM", "--dir", tmp_path, "--limit", 12)
    module, texts = script("generate-prism-embeddings"), []

    def load(*arguments, **options):
        model, tokenizer = utils.load_reward_model(*arguments, **options)
        template = tokenizer.apply_chat_template

        def recorded(*arguments, **options):
            texts.append(template(*arguments, **options))
            return texts[-1]

        monkeypatch.setattr(tokenizer, "apply_chat_template", recorded)
        return model, tokenizer

    monkeypatch.setattr(module, "load_reward_model", load)
    call(monkeypatch, module, "--dir", tmp_path, "--model", source / "model")
    assert not any(bracket in text for text in texts for bracket in "[]")
    last = Counter(text.split("<|end_header_id|>")[-1].strip().removesuffix("<|eot_id|>") for text in texts)
    for row in (row for rows in embeddings_in(tmp_path) for row in rows):
        for response in (row["extra_info"]["chosen_utterance"], *row["extra_info"]["rejected_utterance"]):
            assert last[response] > 0
    distinct = {json.dumps([row["prompt"], response]) for rows in prepared(tmp_path)[1:] for row in rows for response in
                (row["extra_info"]["chosen_utterance"], *row["extra_info"]["rejected_utterance"])}
    assert len(texts) == len(distinct)


def test_embeddings_are_the_models(demo, model):
    backbone, tokenizer = utils.load_reward_model(str(model), device="cpu")
    row = max(embeddings_in(demo[0])[0], key=lambda row: len(row["extra_info"]["rejected_utterance"]))
    info = row["extra_info"]
    assert info["pair_format"] == utils.PAIR_FORMAT and info["rejected_conv_embedding"].shape == (3, 64)
    for response, vector in [(info["chosen_utterance"], info["chosen_conv_embedding"]),
                             *zip(info["rejected_utterance"], info["rejected_conv_embedding"])]:
        text = tokenizer.apply_chat_template([*row["prompt"], {"role": "assistant", "content": response}],
                                             tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        state = backbone(ids).last_hidden_state[0, -1]
        assert vector.dtype == torch.bfloat16
        torch.testing.assert_close(vector.float(), state, rtol=0.01, atol=0.01)


def test_embedding_resumes_from_its_cache_with_the_same_rows(monkeypatch, demo, tmp_path):
    shutil.copytree(demo[0] / "data", tmp_path / "data")
    shutil.copytree(demo[0] / ".embedding_cache", tmp_path / ".embedding_cache")
    monkeypatch.setattr(utils, "_forward", None)  # no conversation is embedded again
    call(monkeypatch, script("generate-prism-embeddings"), "--dir", tmp_path, "--model", demo[0] / ".standin" / "model")
    for name in utils.PRISM_FILES:
        assert (tmp_path / name).read_bytes() == (demo[0] / name).read_bytes()


def test_finished_embeddings_are_recognised_and_replaced_only_with_overwrite(monkeypatch, capsys, embeddings, model):
    module = script("generate-prism-embeddings")
    before = content_of(embeddings)
    call(monkeypatch, module, "--dir", embeddings, "--model", model)
    assert "finished already" in capsys.readouterr().out
    (embeddings / utils.HEAD_FILE).unlink()  # files of the released script come without
    refused(monkeypatch, capsys, module, ["--dir", embeddings, "--model", model], utils.PRISM_FILES[0], "--overwrite")
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())


def test_parquet_files_of_different_runs_are_named(monkeypatch, capsys, embeddings, model):
    folder, options = embeddings / "data" / "prism", ["--dir", embeddings, "--model", model]
    finished = [(embeddings / name).read_bytes() for name in utils.PRISM_FILES]
    module = script("generate-prism-embeddings")
    utils.save_parquet(folder / "test.parquet", utils.load_parquet(folder / "test.parquet")[1:])
    refused(monkeypatch, capsys, module, options, folder, "different runs")
    (folder / "test.parquet").write_bytes(b"<html>")
    refused(monkeypatch, capsys, module, options, "test.parquet")
    shutil.rmtree(folder)
    refused(monkeypatch, capsys, module, options, "prepare.py")
    assert [(embeddings / name).read_bytes() for name in utils.PRISM_FILES] == finished


# ---- What train_basis.py reads --------------------------------------------------------------------------------------


def spoil(folder, change, which=0):
    """Apply `change` to the rows of one of the embedding files."""
    path = folder / utils.PRISM_FILES[which]
    rows = torch.load(path, weights_only=True)
    change(rows)
    torch.save(rows, path)
    sign_again(folder)


def as_released(rows):
    for info in (row["extra_info"] for row in rows):
        info["rejected_conv_embedding"] = info["rejected_conv_embedding"].float().mean(0).bfloat16()
        del info["pair_format"]


def test_released_embeddings_are_read_and_called_malformed(monkeypatch, capsys, embeddings, model):
    for which in (0, 1):
        spoil(embeddings, as_released, which)
    (embeddings / utils.HEAD_FILE).unlink()
    module = script("train_basis")
    for name, value in {"MODEL_NAME": str(model), "K_list": [0, 2], "num_iterations": 20}.items():
        monkeypatch.setattr(module, name, value)
    call(monkeypatch, module, "--dir", embeddings)
    turns = list(map(len, embeddings_in(embeddings)))
    printed = capsys.readouterr().out
    assert f"{sum(turns):,} rows are in the released format, whose rejected side is malformed" in printed
    seen = sum(row["extra_info"]["seen"] for row in embeddings_in(embeddings)[0])
    assert f"{seen:,} train pairs" in printed  # one a turn
    assert (embeddings / "checkpoints" / "PRISM_V_lore_K_2_alpha_10000.0.pt").exists()


def test_pairs_are_the_chosen_minus_each_rejected_response(demo):
    data = utils.load_prism(demo[0], None)[0]
    expected = {}
    for info in (row["extra_info"] for row in embeddings_in(demo[0])[0] if row["extra_info"]["seen"]):
        for rejected in info["rejected_conv_embedding"]:
            pair = info["chosen_conv_embedding"].float() - rejected.float()
            expected.setdefault(info["user_id"], []).append(pair.tolist())
    assert data["seen"] == sorted(expected)
    for user, X in zip(data["seen"], data["train"]):
        assert sorted(X.tolist()) == sorted(expected[user])


@pytest.mark.parametrize("change, named", [
    (lambda rows: rows[4]["extra_info"]["chosen_conv_embedding"].fill_(float("nan")), "row 4"),
    (lambda rows: rows[4]["extra_info"].pop("rejected_conv_embedding"), "row 4"),
    (lambda rows: rows[4]["extra_info"].update(rejected_conv_embedding=torch.zeros(0, 64)), "row 4"),
    (lambda rows: [row["extra_info"].update(chosen_conv_embedding=torch.ones(32), rejected_conv_embedding=torch.zeros(
        1, 32)) for row in rows], "d = 32"),
    (lambda rows: rows[4]["extra_info"].update(chosen_conv_embedding=torch.ones(32),
                                               rejected_conv_embedding=torch.zeros(1, 32)), "row 4"),
    (lambda rows: rows.clear(), "list of rows"),
    (lambda rows: [row["extra_info"].update(seen=True) for row in rows], "0 unseen users"),
    (lambda rows: rows[0]["extra_info"].update(user_id="somebody"), "users")])
def test_spoilt_embeddings_are_named_and_nothing_written(monkeypatch, capsys, embeddings, change, named):
    spoil(embeddings, change)
    refused(monkeypatch, capsys, script("train_basis"), ["--dir", embeddings], named)
    assert not content_of(embeddings / "results") and not (embeddings / "checkpoints").exists()


def test_embeddings_of_another_run_than_the_heads_are_named(monkeypatch, capsys, embeddings):
    shutil.copy(embeddings / utils.PRISM_FILES[0], embeddings / utils.PRISM_FILES[1])
    refused(monkeypatch, capsys, script("train_basis"), ["--dir", embeddings], utils.PRISM_FILES[1], "another run")


def test_embeddings_of_other_rows_than_the_parquet_files_are_named(monkeypatch, capsys, embeddings):
    path = embeddings / "data" / "prism" / "split.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": "of another run"}))
    refused(monkeypatch, capsys, script("train_basis"), ["--dir", embeddings], "other rows")


@pytest.mark.parametrize("spoil", [lambda content: content[:100], lambda content: "[]", lambda content: '{"rows": 1}'])
def test_a_damaged_split_is_named(monkeypatch, capsys, embeddings, spoil):
    path = embeddings / "data" / "prism" / "split.json"
    path.write_text(spoil(path.read_text()))
    refused(monkeypatch, capsys, script("generate-prism-embeddings"), ["--dir", embeddings], path)
    refused(monkeypatch, capsys, script("train_basis"), ["--dir", embeddings])


# ---- RewardBench 2 --------------------------------------------------------------------------------------------------


def test_ties_score_worked_out_by_hand():
    score = script("eval_rb2").ties_score
    # A: both accurate. Tied: worst correct 5, best incorrect 1, so margin 4, spread 1; ref margin 2
    A = [("ref:A", [3.0], [1.0, 0.0]), ("tied:A", [5.0, 6.0], [1.0, -2.0])]
    assert score(A) == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(2 / 1 - 1))
    # B: tied margin 1 within its spread of 3, ref margin -1
    B = [("ref:B", [0.0], [1.0]), ("tied:B", [2.0, 5.0], [1.0])]
    assert score(B) == pytest.approx(0.3 + 0.01 * math.tanh(-1 / 3 - 1))
    assert score(A + B) == pytest.approx(0.3 + 0.15 + 0.1 + 0.1 + 0.005 * (math.tanh(1) + math.tanh(-4 / 3)))
    # C: the tied margin 4 beats its spread of 3, the ref margin 2 does not
    assert score([("ref:C", [2.0], [0.0]), ("tied:C", [5.0, 8.0], [1.0])]) == pytest.approx(
        0.8 + 0.01 * math.tanh(2 / 3 - 1))


@pytest.mark.parametrize("margin, expected", [(2.0, 1.0 + 0.01), (-2.0, -0.01), (0.0, 0.0)])
def test_ties_without_spread_count_one_minus_one_or_nothing(margin, expected):
    prompts = [("ref:A", [margin], [0.0]), ("tied:A", [margin, margin], [0.0])]  # tanh of +inf, -inf, not a number
    assert script("eval_rb2").ties_score(prompts) == pytest.approx(expected)


def test_one_sided_ties_count_in_their_own_shares_only():
    score = script("eval_rb2").ties_score
    assert score([("ref:A", [1.0], [0.0])]) == pytest.approx(0.3)
    assert score([("ref:A", [0.0], [0.0])]) == 0
    assert score([("tied:A", [3.0, 4.0], [0.0])]) == pytest.approx(0.3)  # the margins' shares need both kinds
    assert score([("tied:A", [3.0, 4.0], [3.5])]) == 0
    pair = [("ref:B", [2.0], [0.0]), ("tied:B", [3.0, 4.0], [0.0])]
    assert score([("ref:A", [-1.0], [0.0]), *pair]) == pytest.approx(0.3 + 0.15 + 0.4 + 0.01 * math.tanh(1))
    with pytest.raises(utils.InputError, match="odd:A"):
        score([("odd:A", [1.0], [0.0])])


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """A folder with the written benchmark, its rows, and a random basis and weights of four users over it."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_rewardbench_corpus(folder)
    generator = torch.Generator().manual_seed(1)
    basis, weights = torch.randn(64, 3, generator=generator), torch.rand(4, 3, generator=generator).softmax(1)
    torch.save(basis, folder / "basis.pt")
    np.save(folder / "basis.npy", basis.numpy())
    utils.save_tensors(folder / "basis.safetensors", {"V": basis, "W": weights})
    torch.save(weights, folder / "weights.pt")
    return folder, read_rows(folder / "test.jsonl"), basis, weights


@pytest.fixture
def table(monkeypatch, benchmark, model, tmp_path):
    """A function: run eval_rb2.py with arguments -> its table, reward -> subset -> score."""
    def evaluated(*arguments):
        call(monkeypatch, script("eval_rb2"), "--data", benchmark[0], "--model", model, "--device", "cpu", "--save_csv",
             tmp_path / "table.csv", *arguments)
        with open(tmp_path / "table.csv", newline="") as file:
            return {row.pop("reward"): {subset: float(score) for subset, score in row.items()}
                    for row in csv.DictReader(file)}
    return evaluated


@pytest.fixture(scope="module")
def states(benchmark, model):
    """A function: rows of the benchmark -> for each the states of its answers, each computed alone and unpadded.

    max_tokens and side: what is left of a conversation.
    """
    backbone, tokenizer = utils.load_reward_model(str(model), device="cpu")

    def computed(rows, max_tokens=None, side="left"):
        found = []
        for row in rows:
            found.append([])
            for answer in (*row["chosen"], *row["rejected"]):
                text = tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]},
                                                      {"role": "assistant", "content": answer}], tokenize=False)
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
                if max_tokens:
                    ids = ids[:, -max_tokens:] if side == "left" else ids[:, :max_tokens]
                with torch.no_grad():
                    found[-1].append(backbone(ids).last_hidden_state[0, -1])
        return [torch.stack(of_row) for of_row in found]
    return computed


def expected_table(rows, states, reward):
    """The scores by subset of a reward vector, by a plain loop; Ties by the benchmark's formula in numpy."""
    right, ties = {}, {"ref": {}, "tied": {}}
    for row, of_row in zip(rows, states):
        scores = (of_row.double() @ reward.double()).numpy()
        correct, incorrect = np.split(scores, [len(row["chosen"])])
        if row["subset"] == "Ties":
            kind, number = row["id"].split(":")
            ties[kind][number] = correct.min() - incorrect.max(), correct.max() - correct.min()
        else:
            right.setdefault(row["subset"], []).append(correct[0] > incorrect.max())
    table = {subset: np.mean(values) for subset, values in right.items()}
    if ties["tied"]:
        ref, tied = (np.array([ties[kind][number] for number in sorted(ties[kind])]).T for kind in ("ref", "tied"))
        hard = np.minimum(ref[0], tied[0])
        table["Ties"] = (0.3 * np.mean(tied[0] > 0) + 0.3 * np.mean(ref[0] > 0) + 0.2 * np.mean(tied[0] > tied[1])
                         + 0.2 * np.mean(hard > tied[1]) + 0.01 * np.mean(np.tanh(hard / tied[1] - 1)))
    return {**table, "Average": np.mean(list(table.values()))}


def test_table_is_that_of_conversations_scored_alone(table, benchmark, states, model):
    _, rows, basis, _ = benchmark
    head = utils.load_reward_head(str(model))[:, 0]
    alone = states(rows)
    assert table()["reward head"] == pytest.approx(expected_table(rows, alone, head), abs=1e-5)
    found = table("--rm_head", benchmark[0] / "basis.pt")
    assert list(found) == ["column 0", "column 1", "column 2"]
    for k, scores in enumerate(found.values()):
        assert scores == pytest.approx(expected_table(rows, alone, basis[:, k]), abs=1e-5)


def test_padding_has_no_effect_on_the_score(table, benchmark):
    basis = benchmark[0] / "basis.pt"
    expected = table("--rm_head", basis, "--batch_size", 1)
    for size in (3, 64):
        for name, scores in table("--rm_head", basis, "--batch_size", size).items():
            assert scores == pytest.approx(expected[name], abs=1e-5)


def test_seqclf_is_lmhead_with_the_models_own_head(table, model, tmp_path):
    torch.save(utils.load_reward_head(str(model)), tmp_path / "head.pt")
    assert table("--mode", "seqclf") == table("--mode", "lmhead", "--rm_head", tmp_path / "head.pt") == table()


def test_all_columns_in_one_pass_are_the_columns_one_at_a_time(table, benchmark, tmp_path):
    found = table("--rm_head", benchmark[0] / "basis.pt")
    for k in range(3):
        torch.save(benchmark[2][:, k].clone(), tmp_path / "column.pt")
        assert table("--rm_head", tmp_path / "column.pt")["reward head"] == pytest.approx(found[f"column {k}"],
                                                                                          abs=1e-5)


def test_mean_user_and_average_over_users_are_those_of_a_plain_loop(table, benchmark, states):
    folder, rows, basis, weights = benchmark
    found = table("--rm_head", folder / "basis.pt", "--user_weights", folder / "weights.pt")
    alone = states(rows)
    assert found["mean user"] == pytest.approx(expected_table(rows, alone, basis @ weights.mean(0)), abs=1e-5)
    of_users = [expected_table(rows, alone, basis @ w) for w in weights]
    average = {subset: np.mean([of_user[subset] for of_user in of_users]) for subset in of_users[0]}
    assert found["average over users"] == pytest.approx(average, abs=1e-5)


def test_head_is_read_from_pt_npy_and_safetensors(table, benchmark):
    folder = benchmark[0]
    expected = table("--rm_head", folder / "basis.pt", "--user_weights", folder / "weights.pt")
    assert table("--rm_head", folder / "basis.npy", "--user_weights", folder / "basis.safetensors") == expected
    assert table("--rm_head", folder / "basis.safetensors", "--user_weights", folder / "weights.pt") == expected
    utils.save_tensors(folder / "named.safetensors", {"other": benchmark[2], "V": benchmark[2] * 0})
    assert table("--rm_head", folder / "named.safetensors", "--head_key", "other", "--user_weights",
                 folder / "weights.pt") == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_conversations_are_truncated_from_the_side_asked_for(table, benchmark, states, side):
    folder, rows, basis, _ = benchmark
    rows = [row for row in rows if row["subset"] == "Safety"]
    found = table("--rm_head", folder / "basis.pt", "--subset", "Safety", "--max_length", 90, "--truncation_side", side)
    cut, whole = states(rows, 90, side), states(rows)
    assert not all(torch.allclose(a, b) for a, b in zip(cut, whole))
    for k in range(3):
        assert found[f"column {k}"] == pytest.approx(expected_table(rows, cut, basis[:, k]), abs=1e-5)


def test_subset_limit_top_k_and_failures(table, benchmark, capsys):
    folder, rows, _, _ = benchmark
    found = table("--subset", "Math", "--limit", 2, "--verbose_failures")
    printed = capsys.readouterr().out
    assert list(found["reward head"]) == ["Math", "Average"] and "2 rows" in printed
    wrong = printed.split("gets wrong: ")[1].strip()
    count = 0 if wrong == "none" else len(wrong.split(", "))
    assert found["reward head"]["Math"] == 1 - count / 2
    assert set(wrong.split(", ")) <= {row["id"] for row in rows if row["subset"] == "Math"} | {"none"}
    everything, best = (table("--rm_head", folder / "basis.pt", *more) for more in ([], ["--top_k", 1]))
    assert best == {name: scores for name, scores in everything.items()
                    if scores["Average"] == max(other["Average"] for other in everything.values())}


def test_a_ties_prompt_that_stands_there_twice_is_named():
    with input_error("tied:3"):
        script("eval_rb2").ties_score([("tied:3", [1.0, 2.0], [0.0]), ("tied:3", [1.0, 2.0], [0.0])])


def test_printed_table_is_the_saved_one(demo):
    with open(demo[0] / "results" / "rewardbench.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["reward", "Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties", "Average"]
    assert [row[0] for row in rows[1:]] == ["column 0", "column 1", "column 2", "mean user", "average over users"]
    for name, *scores in rows[1:]:
        assert name.ljust(20) + "".join(f"{float(score):>12.4f}" for score in scores) in demo[1]["eval_rb2"]


@pytest.mark.parametrize("arguments, named", [
    (["--subset", "Poetry"], ["--subset Poetry", "Factuality"]), (["--limit", 0], ["--limit 0"]),
    (["--mode", "lmhead"], ["--rm_head"]), (["--mode", "seqclf", "--rm_head", "basis.pt"], ["--rm_head"]),
    (["--rm_head", "/nowhere/head.pt"], ["/nowhere/head.pt"]), (["--split", "filtered"], ["filtered"]),
    (["--rm_head", "wide.pt"], ["wide.pt", "(32, 3)", "d = 64"]),
    (["--rm_head", "basis.pt", "--user_weights", "wide.pt"], ["wide.pt", "(32, 2)"]),
    (["--rm_head", "basis.safetensors", "--head_key", "U"], ["basis.safetensors", "U"]),
    (["--rm_head", "text.npy"], ["text.npy"]), (["--rm_head", "cut.safetensors"], ["cut.safetensors"]),
    (["--rm_head", "nan.pt"], ["nan.pt"]), (["--truncation_side", "middle"], ["--truncation_side"]),
    (["--head_bias", "nan"], ["--head_bias"]), (["--device", "tpu"], ["--device tpu"]),
    (["--device", "meta"], ["--device meta"]), (["--rm_head", "complex.pt"], ["complex.pt"]),
    (["--rm_head", "empty.pt"], ["empty.pt"]), (["--rm_head", "basis.pt", "--user_weights", "empty.pt"], ["empty.pt"]),
    (["--save_csv", "."], ["--save_csv", "folder"])])
def test_unusable_heads_and_options_are_one_line(monkeypatch, capsys, tmp_path, benchmark, model, arguments, named):
    for name in ("basis.pt", "basis.safetensors"):
        shutil.copy(benchmark[0] / name, tmp_path)
    torch.save(torch.ones(32, 3 if "--user_weights" not in arguments else 2), tmp_path / "wide.pt")
    torch.save(torch.full((64, 1), float("nan")), tmp_path / "nan.pt")
    torch.save(torch.ones(64, 1, dtype=torch.complex64), tmp_path / "complex.pt")
    torch.save(torch.ones(64, 0), tmp_path / "empty.pt")
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "cut.safetensors").write_bytes((benchmark[0] / "basis.safetensors").read_bytes()[:100])
    arguments = [tmp_path / a if "." in str(a) and "/" not in str(a) else a for a in arguments]
    before = content_of(tmp_path)
    refused(monkeypatch, capsys, script("eval_rb2"), ["--data", benchmark[0], "--model", model, "--save_csv",
                                                      tmp_path / "table.csv", *arguments], *named)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("changes, named", [
    ({"subset": "Poetry"}, "Poetry"), ({"chosen": []}, "no list of chosen"), ({"rejected": []}, "no list of rejected"),
    ({"chosen": None}, "no list of chosen"), ({"prompt": ...}, "prompt"), ({"chosen": [1]}, "chosen"),
    ({"prompt": 5}, "prompt 5"), ({"id": 7}, "id 7")])
def test_spoilt_benchmark_row_is_named(monkeypatch, capsys, tmp_path, benchmark, model, changes, named):
    rows = [dict(row) for row in benchmark[1]]
    for column, value in changes.items():
        rows[2][column] = value
        if value is ...:
            del rows[2][column]
    write_rows(tmp_path / "test.jsonl", rows)
    refused(monkeypatch, capsys, script("eval_rb2"), ["--data", tmp_path, "--model", model], "row 3", named)


def test_without_a_gpu_a_model_is_asked_for(monkeypatch, capsys, tmp_path, benchmark):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(monkeypatch, capsys, script("eval_rb2"), ["--data", benchmark[0], "--dir", tmp_path], "Skywork")
