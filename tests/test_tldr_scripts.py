"""The Reddit TL;DR scripts as a user runs them: whole processes, real text, interruptions and every slip."""

import functools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import ROOT, call, fresh_process, load_script, refused, sign_again
from safetensors import safe_open
from standin import PLANTED_RANK, build_reward_model, write_tldr_corpus
from transformers import AutoModel

import utils

SCRIPTS = ROOT / "RedditTLDR"
REAL_TEXT = ROOT.parent / "shared" / "data"


def run_process(*command, cwd=ROOT, check=True, **environment):
    """A finished process; where `check`, it must have succeeded."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=240,
                          env={**os.environ, **environment})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


script = functools.partial(load_script, "RedditTLDR")


def read_pickles(folder):
    return [pickle.loads((folder / name).read_bytes()) for name in utils.TLDR_FILES]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of a stand-in model and of the demo's corpus."""
    folder = tmp_path_factory.mktemp("sources")
    build_reward_model(folder / "model")
    write_tldr_corpus(folder / "data")
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A copy of the repository in which the README's commands ran: (folder, printed by prepare, by train_basis)."""
    copy = tmp_path_factory.mktemp("clone") / "LoRe"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "results", "*.pkl", "*.safetensors"))
    prepared = run_process("RedditTLDR/prepare.py", "--demo", cwd=copy).stdout
    trained = run_process("train_basis.py", cwd=copy / "RedditTLDR").stdout
    return copy / "RedditTLDR", prepared, trained


def copy_embeddings(demo, folder):
    """Copy the demo's pickles and head to a folder."""
    folder.mkdir(exist_ok=True)
    for name in (*utils.TLDR_FILES, utils.HEAD_FILE):
        shutil.copy(demo[0] / name, folder)
    return folder


@pytest.fixture
def embeddings(demo, tmp_path):
    """A folder with the demo's pickles and head, to be spoilt."""
    return copy_embeddings(demo, tmp_path)


# ---- The demo, the formats, the results -----------------------------------------------------------------------------


def test_demo_says_that_it_is_synthetic(demo):
    folder, prepared, trained = demo
    assert "stand-in" in prepared and "synthetic" in prepared
    assert "synthetic" in trained
    assert "synthetic" in json.loads((folder / "results" / "results.json").read_text())["config"]["data"]


def test_demo_rises_from_the_pooled_model_to_the_planted_rank_on_unseen_users(demo):
    fits = json.loads((demo[0] / "results" / "results.json").read_text())["fits"]
    unseen = {fit["K"]: fit["mean_accuracy"]["Unseen User Unseen Prompts"] for fit in fits}
    assert all(unseen[K] < unseen[K + 1] for K in range(1, PLANTED_RANK))
    assert unseen[PLANTED_RANK] > unseen[1] + 0.1


def test_pickles_have_the_released_format(demo, sources):
    rows = [json.loads(line) for line in (sources / "data" / "train.jsonl").read_text().splitlines()]
    expected = {}
    for row in rows:
        if row["info"]["post"]:
            texts = [summary["text"] for summary in row["summaries"]]
            expected.setdefault(row["worker"], []).append((row["info"]["post"], texts[row["choice"]],
                                                           texts[1 - row["choice"]]))
    train, validation = read_pickles(demo[0])
    for by_worker in (train, validation):
        counts = [len(pairs) for pairs in by_worker.values()]
        assert counts == sorted(counts)
        for pair in (pair for pairs in by_worker.values() for pair in pairs):
            assert set(pair) == {"text", "winning_summary", "losing_summary", "embeddings"}
            for side in ("winning", "losing"):
                vector, = pair["embeddings"][side]
                assert vector.dtype == torch.bfloat16 and vector.ndim == 1 and vector.device.type == "cpu"
    assert {worker: [(p["text"], p["winning_summary"], p["losing_summary"]) for p in pairs]
            for worker, pairs in train.items()} == expected


def test_embeddings_in_the_pickle_are_the_models(demo):
    model, tokenizer = utils.load_reward_model(str(demo[0] / ".standin" / "model"), device="cpu")
    pair = read_pickles(demo[0])[1].popitem()[1][0]
    for side in ("winning", "losing"):
        messages = [{"role": "user", "content": pair["text"]},
                    {"role": "assistant", "content": pair[f"{side}_summary"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        state = model(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(pair["embeddings"][side][0].float(), state, rtol=0.01, atol=0.01)


def test_the_readmes_example_of_a_new_person_runs(demo):
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    printed = run_process("-c", code, cwd=demo[0].parent).stdout
    assert re.fullmatch(r"tensor\(\[ *-?[\d.]+, *-?[\d.]+\]\)\n", printed)


def test_results_agree_with_the_saved_tensors_and_the_pickles(demo):
    folder = demo[0]
    results = json.loads((folder / "results" / "results.json").read_text())
    validation = read_pickles(folder)[1]
    assert [fit["K"] for fit in results["fits"]] == [0, 1, 2, 3, 4, 5, 6]
    for fit in results["fits"]:
        with safe_open(folder / "results" / fit["file"], "pt") as file:
            V, W = file.get_tensor("V").double(), file.get_tensor("W_unseen").double()
            assert json.loads(file.metadata()["about"])["unseen_users"] == results["unseen_users"]
        accuracies = []
        for worker, w in zip(results["unseen_users"], W):
            sides = [pair["embeddings"] for pair in validation[worker]]
            margins = torch.stack([(side["winning"][0].double() - side["losing"][0].double()) @ V @ w
                                   for side in sides])
            accuracies.append((margins > 0).double().mean().item())
        of_user = fit["accuracy_of_user"]["Unseen User Unseen Prompts"]
        assert list(of_user.values()) == pytest.approx(accuracies, abs=0.1)  # float32 may turn a margin near 0
        assert fit["mean_accuracy"]["Unseen User Unseen Prompts"] == pytest.approx(np.mean(accuracies), abs=0.01)
        assert fit["std_over_users"]["Unseen User Unseen Prompts"] == pytest.approx(np.std(accuracies), abs=0.02)
    assert (folder / "results" / "accuracy_by_rank.png").read_bytes().startswith(b"\x89PNG")


def test_closing_table_has_ranks_down_and_settings_across(demo):
    results = json.loads((demo[0] / "results" / "results.json").read_text())
    table = [line.split() for line in demo[2].splitlines() if line.startswith(("   1", " ref", "   6"))]
    assert [row[0] for row in table] == ["ref", "1", "6"]
    for row, fit in zip(table, (results["fits"][i] for i in (0, 1, 6))):
        assert [float(cell) for cell in row[2:]] == pytest.approx(list(fit["mean_accuracy"].values()), abs=5e-5)


def test_split_and_results_do_not_depend_on_the_hash_seed_or_the_run(demo, tmp_path):
    def outcome(folder):
        results = json.loads((folder / "results" / "results.json").read_text())
        del results["seconds"]
        return results, {p.name: p.read_bytes() for p in sorted((folder / "results").glob("*.safetensors"))}

    def trained(seed):
        folder = copy_embeddings(demo, tmp_path / seed)
        run_process(SCRIPTS / "train_basis.py", "--dir", folder, cwd="/", PYTHONHASHSEED=seed)
        return outcome(folder)

    with ThreadPoolExecutor() as pool:
        for found in pool.map(trained, ("1", "2")):
            assert found == outcome(demo[0])


def test_vary_fewshot_writes_its_curves(embeddings, monkeypatch, capsys):
    module = script("vary_fewshot")
    monkeypatch.setattr(module, "num_shots", [1, 12])
    monkeypatch.setattr(module, "K_list", [PLANTED_RANK])
    call(monkeypatch, module, "--dir", embeddings)
    curve, = json.loads((embeddings / "results" / "vary_fewshot.json").read_text())["curves"]
    assert curve["unseen_mean"][1] > curve["unseen_mean"][0]
    assert (embeddings / "results" / "vary_fewshot.png").read_bytes().startswith(b"\x89PNG")
    assert "Shots : 12" in capsys.readouterr().out


def test_torchrun_gives_the_same_embeddings_and_nearly_the_same_bases(demo, sources, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    one_thread = {"OMP_NUM_THREADS": "1"}
    single, double = tmp_path / "single", tmp_path / "double"
    options = ("--data", sources / "data", "--model", sources / "model", "--limit", "60")
    with ThreadPoolExecutor() as pool:
        alone = pool.submit(run_process, SCRIPTS / "prepare.py", *options, "--dir", single, **one_thread)
        run_process(*launcher, SCRIPTS / "prepare.py", *options, "--dir", double, **one_thread)
        alone.result()
    for name in utils.TLDR_FILES:
        assert (single / name).read_bytes() == (double / name).read_bytes()
    copy_embeddings(demo, double)
    printed = run_process(*launcher, SCRIPTS / "train_basis.py", "--dir", double, **one_thread).stdout
    assert printed.count("K : 3") == 1
    ours, theirs = (json.loads((folder / "results" / "results.json").read_text())["fits"]
                    for folder in (double, demo[0]))
    for fit, expected in zip(ours, theirs):
        assert fit["mean_accuracy"] == pytest.approx(expected["mean_accuracy"], abs=0.05)


# ---- Interruptions --------------------------------------------------------------------------------------------------

SMALL_SHARDS = ("import sys; sys.path.insert(0, {0!r}); import prepare; prepare.SHARD_SIZE = 4; "
                "prepare.run_script(prepare.main)").format(str(SCRIPTS))


def prepare_in_small_shards(sources, folder):
    return subprocess.Popen([sys.executable, "-c", SMALL_SHARDS, "--data", sources / "data", "--model",
                             sources / "model", "--dir", folder], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def shards_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob(".embedding_cache/*/*.safetensors")}


def kill_five_times(sources, broken, everything, seconds, chance):
    """Start and kill prepare.py -> how often it had made some of its shards, but not `everything`."""
    partial = 0
    for kill in range(5):
        before = shards_in(broken)
        process = prepare_in_small_shards(sources, broken)
        if kill % 2:  # any moment of its life, the start included
            time.sleep(chance.uniform(0, 1.1 * seconds))
        else:  # in the midst of the embedding
            more = len(before) + chance.randint(1, max(1, everything // 8))
            while process.poll() is None and len(shards_in(broken)) < more:
                time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = shards_in(broken)
        assert before.items() <= after.items()  # what was finished is neither lost nor made again
        partial += 0 < len(after) < everything
        if len(after) == everything:  # it came through: begin again
            shutil.rmtree(broken)
    return partial


def test_prepare_killed_at_ten_moments_ends_with_the_same_pickles(sources, tmp_path):
    unbroken, *broken = (tmp_path / name for name in ("unbroken", "one", "other"))
    start = time.perf_counter()
    assert prepare_in_small_shards(sources, unbroken).wait() == 0
    seconds = time.perf_counter() - start
    everything = len(shards_in(unbroken))
    with ThreadPoolExecutor() as pool:
        partial = pool.map(lambda seed: kill_five_times(sources, broken[seed], everything, seconds,
                                                        random.Random(seed)), (0, 1))
        assert sum(partial) >= 3
        resumed = pool.map(lambda folder: prepare_in_small_shards(sources, folder).wait(), broken)
        assert list(resumed) == [0, 0]
    for folder in broken:
        assert len(shards_in(folder)) == everything
        for name in utils.TLDR_FILES:
            assert (folder / name).read_bytes() == (unbroken / name).read_bytes()


def test_ctrl_c_says_that_a_second_run_resumes(sources, tmp_path):
    process = prepare_in_small_shards(sources, tmp_path)
    while process.poll() is None and not shards_in(tmp_path):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 2
    assert message.splitlines()[-1].startswith("error: ") and "resume" in message and "Traceback" not in message
    assert not list(tmp_path.glob("*.pkl"))


def test_full_disk_is_one_line_and_keeps_what_was_there(embeddings, sources):
    import resource
    most = 250_000  # bytes of a file: enough for a shard, not for a pickle
    before = {path.name: path.read_bytes() for path in embeddings.iterdir()}
    command = [sys.executable, SCRIPTS / "prepare.py", "--data", sources / "data", "--model", sources / "model",
               "--dir", embeddings, "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line.startswith("error: ") for line in done.stderr.splitlines()] == [True]
    assert {path.name: path.read_bytes() for path in embeddings.iterdir() if path.is_file()} == before
    assert [path.name for path in embeddings.iterdir() if path.is_dir()] == [".embedding_cache"]


# ---- What prepare.py refuses, drops and keeps -----------------------------------------------------------------------


@pytest.fixture
def rows(sources):
    return [json.loads(line) for line in (sources / "data" / "train.jsonl").read_text().splitlines()]


def spoilt(rows, tmp_path, **changes):
    """A data folder whose third training row is changed; the value None of a change removes the column."""
    for column, value in changes.items():
        rows[2][column] = value
        if value is None:
            del rows[2][column]
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", rows[:30])
    write_rows(tmp_path / "data" / "validation.jsonl", rows[30:60])
    return tmp_path / "data"


@pytest.mark.parametrize("changes, named", [
    ({"choice": 2}, "choice 2"), ({"choice": None}, "choice"), ({"choice": "1"}, "choice '1'"),
    ({"info": None}, "info"), ({"info": {"id": 1}}, "post"), ({"summaries": [{"text": "one"}]}, "1 summaries"),
    ({"summaries": None}, "summaries"), ({"worker": None}, "worker")])
def test_spoilt_row_is_named(monkeypatch, capsys, rows, tmp_path, sources, changes, named):
    data = spoilt(rows, tmp_path, **changes)
    refused(monkeypatch, capsys, script("prepare"), ["--data", data, "--model", sources / "model", "--dir", tmp_path],
            "train.jsonl, row 3", named)
    assert not list(tmp_path.glob("*.pkl"))


def test_null_and_empty_texts_are_dropped_and_counted(monkeypatch, capsys, rows, tmp_path, sources):
    rows[0]["info"]["post"] = None
    rows[1]["info"]["post"] = "  "
    rows[3]["summaries"][1]["text"] = ""
    rows[4]["summaries"][0]["text"] = None
    data = spoilt(rows, tmp_path)
    call(monkeypatch, script("prepare"), "--data", data, "--model", sources / "model", "--dir", tmp_path)
    assert "train: 26 comparisons" in (printed := capsys.readouterr().out) and "4 rows" in printed
    assert sum(map(len, read_pickles(tmp_path)[0].values())) == 26


@pytest.mark.parametrize("content, named", [
    (b'{"info": 1}\n{"info"\n', "row 2"), (b"[1, 2]\n", "row 1"), (b"<html>\n", "row 1"), (b"\xff\xfe\n", "damaged"),
    (b'{"info": ' + b"1" * 5001 + b"}\n", "row 1")])
def test_file_that_is_no_jsonl_is_named(monkeypatch, capsys, rows, tmp_path, sources, content, named):
    data = spoilt(rows, tmp_path)
    (data / "train.jsonl").write_bytes(content)
    if named == "row 2":
        write_rows(data / "train.jsonl", rows[:1])
        with open(data / "train.jsonl", "ab") as file:
            file.write(content.splitlines()[1])
    refused(monkeypatch, capsys, script("prepare"), ["--data", data, "--model", sources / "model", "--dir", tmp_path],
            "train.jsonl", named)


def test_parquet_and_gzip_give_the_same_pickles_as_jsonl(monkeypatch, rows, tmp_path, sources):
    import gzip
    import pyarrow
    import pyarrow.parquet
    plain = spoilt(rows, tmp_path)
    folders = {"plain": plain, "gzip": tmp_path / "gzip", "parquet": tmp_path / "parquet"}
    for name in ("gzip", "parquet"):
        folders[name].mkdir()
    for split, part in (("train", rows[:30]), ("validation", rows[30:60])):
        (folders["gzip"] / f"{split}.jsonl.gz").write_bytes(gzip.compress((plain / f"{split}.jsonl").read_bytes()))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folders["parquet"] / f"{split}-0.parquet")
    for name, data in folders.items():
        call(monkeypatch, script("prepare"), "--data", data, "--model", sources / "model", "--dir",
             tmp_path / f"{name}.out")
    first, *others = (read_pickles(tmp_path / f"{kind}.out") for kind in folders)
    for other in others:
        assert str(other) == str(first)


@pytest.mark.parametrize("arguments, named", [
    (["--limit", 0], "--limit 0"), (["--limit", "many"], "--limit"), (["--demo", "--model", "x"], "--demo"),
    (["--data", "/nowhere", "--model", "x"], "/nowhere"), (["--sideways"], "--sideways")])
def test_unusable_command_line_is_one_line(monkeypatch, capsys, tmp_path, arguments, named):
    refused(monkeypatch, capsys, script("prepare"), [*arguments, "--dir", tmp_path], named)


def test_without_a_gpu_the_demo_is_offered(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(monkeypatch, capsys, script("prepare"), ["--dir", tmp_path], "CUDA", "--demo")


def test_unknown_and_headless_models_are_named(monkeypatch, capsys, tmp_path, sources):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ["--data", sources / "data", "--dir", tmp_path, "--model"]
    refused(monkeypatch, capsys, script("prepare"), [*options, "no-such/model"], "no-such/model")
    headless = shutil.copytree(sources / "model", tmp_path / "headless")
    tensors, _ = utils.load_tensors(headless / "model.safetensors")
    del tensors["score.weight"]
    utils.save_tensors(headless / "model.safetensors", tensors)
    refused(monkeypatch, capsys, script("prepare"), [*options, headless], "headless", "head")


def test_finished_embeddings_are_replaced_only_with_overwrite(monkeypatch, capsys, embeddings, sources):
    before = {path.name: path.read_bytes() for path in embeddings.iterdir()}
    options = ["--data", sources / "data", "--model", sources / "model", "--dir", embeddings]
    refused(monkeypatch, capsys, script("prepare"), options, utils.TLDR_FILES[0], "--overwrite")
    assert {path.name: path.read_bytes() for path in embeddings.iterdir() if path.is_file()} == before
    call(monkeypatch, script("prepare"), *options, "--limit", "40", "--overwrite")
    assert sum(map(len, read_pickles(embeddings)[0].values())) == 40
    refused(monkeypatch, capsys, script("prepare"), ["--demo", "--dir", embeddings], "--overwrite")
    (embeddings / utils.HEAD_FILE).unlink()  # pickles of the released script come without
    refused(monkeypatch, capsys, script("prepare"), options, "--overwrite")


def test_finished_embeddings_are_recognised(monkeypatch, capsys, demo, embeddings):
    call(monkeypatch, script("prepare"), "--demo", "--dir", embeddings)
    assert "finished already" in capsys.readouterr().out


def test_damaged_embeddings_are_not_finished(monkeypatch, capsys, demo, embeddings):
    path = embeddings / utils.TLDR_FILES[1]
    path.write_bytes(path.read_bytes()[:-100])
    call(monkeypatch, script("prepare"), "--demo", "--dir", embeddings)
    assert "finished already" not in capsys.readouterr().out
    assert path.read_bytes() == (demo[0] / path.name).read_bytes()


# ---- What train_basis.py refuses ------------------------------------------------------------------------------------


def spoil_pickle(folder, change, which=0):
    """Apply `change` to the dict in one of the pickles."""
    path = folder / utils.TLDR_FILES[which]
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))
    sign_again(folder)


def pair_of(content):
    return next(reversed(content.values()))[0]


@pytest.mark.parametrize("change, named", [
    (lambda content: pair_of(content)["embeddings"]["losing"][0].fill_(float("nan")), "NaN"),
    (lambda content: pair_of(content)["embeddings"]["winning"][0].view(-1)[3:4].fill_(float("inf")), "infinite"),
    (lambda content: pair_of(content).pop("embeddings"), "no embeddings"),
    (lambda content: next(reversed(content.values())).clear(), "no pairs"),
    (lambda content: pair_of(content)["embeddings"].update(losing=[torch.zeros(32)]), "d = 32"),
    (lambda content: content.clear(), "not a dict of workers"),
    (lambda content: [content.update({f"new {w}": content.pop(w)}) for w in list(content)], "workers are in both"),
])
def test_spoilt_embeddings_are_named(monkeypatch, capsys, embeddings, change, named):
    spoil_pickle(embeddings, change)
    refused(monkeypatch, capsys, script("train_basis"), ["--dir", embeddings], named)
    assert not list((embeddings / "results").glob("*"))


def test_train_and_validation_of_different_models_are_named(monkeypatch, capsys, embeddings):
    def halve(content):
        for pair in (pair for pairs in content.values() for pair in pairs):
            pair["embeddings"] = {side: [vector[0][:32].clone()] for side, vector in pair["embeddings"].items()}

    spoil_pickle(embeddings, halve, which=1)
    refused(monkeypatch, capsys, script("train_basis"), ["--dir", embeddings], "d = 32", *utils.TLDR_FILES)
    spoil_pickle(embeddings, halve, which=0)
    refused(monkeypatch, capsys, script("train_basis"), ["--dir", embeddings], "reward head", "d = 32")


def test_embeddings_of_another_run_than_the_heads_are_named(monkeypatch, capsys, embeddings):
    train, validation = (embeddings / name for name in utils.TLDR_FILES)
    train.rename(embeddings / "swapped")
    validation.rename(train)
    (embeddings / "swapped").rename(validation)
    refused(monkeypatch, capsys, script("train_basis"), ["--dir", embeddings], train, "another run")


def test_missing_truncated_and_hostile_pickles_are_named(monkeypatch, capsys, embeddings):
    path = embeddings / utils.TLDR_FILES[1]
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    refused(monkeypatch, capsys, script("train_basis"), ["--dir", embeddings], path)
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(embeddings / "owned").encode() + b"'\ntR.")
    refused(monkeypatch, capsys, script("train_basis"), ["--dir", embeddings], path, "os.system")
    assert not (embeddings / "owned").exists()
    path.unlink()
    refused(monkeypatch, capsys, script("train_basis"), ["--dir", embeddings], path, "prepare.py")


@pytest.mark.parametrize("K_list", [[], [-1], [1.5], [2, 2], [True]])
def test_unusable_ranks_are_named(monkeypatch, capsys, embeddings, K_list):
    module = script("train_basis")
    monkeypatch.setattr(module, "K_list", K_list)
    refused(monkeypatch, capsys, module, ["--dir", embeddings], "K_list")


def test_ranks_and_seeds_may_be_ranges_and_arrays(monkeypatch, embeddings):
    module = script("train_basis")
    monkeypatch.setattr(module, "K_list", range(2))
    monkeypatch.setattr(module, "seeds", np.arange(2))
    call(monkeypatch, module, "--dir", embeddings)
    results = json.loads((embeddings / "results" / "results.json").read_text())
    assert results["config"]["K_list"] == [0, 1] and results["seeds"] == [0, 1]
    assert [(fit["K"], fit["seed"]) for fit in results["fits"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_reader_that_leaves_loses_no_results(embeddings):
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import train_basis; train_basis.K_list = [0, 1, 2]; "
            "train_basis.run_script(train_basis.main)")
    process = fresh_process(code, SCRIPTS, "--dir", embeddings)
    process.stdout.close()  # as `| head -0` does
    assert process.stderr.read() == "" and process.wait(timeout=120) == 0
    assert len(json.loads((embeddings / "results" / "results.json").read_text())["fits"]) == 3


def test_a_failed_run_leaves_the_results_of_the_run_before(monkeypatch, capsys, embeddings):
    module = script("train_basis")
    monkeypatch.setattr(module, "K_list", [0, 2])
    call(monkeypatch, module, "--dir", embeddings)

    def results():
        return {path.name: path.read_bytes() for path in (embeddings / "results").iterdir() if path.is_file()}

    before, save_json = results(), utils.save_json

    def full_disk(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module, "seeds", [1])
    monkeypatch.setattr(utils, "save_json", full_disk)
    refused(monkeypatch, capsys, module, ["--dir", embeddings], "results.json", "No space")
    after = results()
    assert after.pop(utils.CHECKPOINT_FILE) and after == before
    monkeypatch.setattr(utils, "save_json", save_json)
    call(monkeypatch, module, "--dir", embeddings)
    assert "after 1,000 of 1,000" in capsys.readouterr().out
    assert results().keys() == before.keys() and results() != before


def test_the_released_reference_takes_the_heads_place_where_asked_for(monkeypatch, embeddings, sources):
    module = script("train_basis")
    for name, value in {"MODEL_NAME": str(sources / "model"), "K_list": [0], "released_reference": True}.items():
        monkeypatch.setattr(module, name, value)
    call(monkeypatch, module, "--dir", embeddings)
    with safe_open(embeddings / "results" / "K_0.safetensors", "pt") as file:
        found = file.get_tensor("V")
    model = AutoModel.from_pretrained(sources / "model")  # without its head, as the released scripts load it
    last = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
    assert torch.equal(found, last.weight[:, :1].float())
    assert json.loads((embeddings / "results" / "results.json").read_text())["config"]["released_reference"] is True


def test_an_interrupted_vary_fewshot_goes_on_from_its_training(monkeypatch, capsys, embeddings):
    module = script("vary_fewshot")
    for name, value in {"num_shots": [3], "K_list": [2], "trials": 2}.items():
        monkeypatch.setattr(module, name, value)
    curves = module.save_few_shot_curves
    monkeypatch.setattr(module, "save_few_shot_curves", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    refused(monkeypatch, capsys, module, ["--dir", embeddings], "resume")
    monkeypatch.setattr(module, "save_few_shot_curves", curves)
    call(monkeypatch, module, "--dir", embeddings)
    assert "after 500 of 500" in capsys.readouterr().out
    assert {path.name for path in (embeddings / "results").iterdir()} == {"vary_fewshot.json", "vary_fewshot.png"}


def test_worker_with_one_pair_and_pickles_without_a_head_are_fine(monkeypatch, capsys, embeddings, sources):
    (embeddings / utils.HEAD_FILE).unlink()
    seen = sorted(set(read_pickles(embeddings)[0]))[5]

    def shorten(content):
        largest = sorted(content, key=lambda worker: len(content[worker]))
        for worker in largest[:2]:  # keep the two smallest smaller still, they are left out
            del content[worker]
        content.update({"tiny 1": content[seen][:1], "tiny 2": content[seen][:1]})
        content[seen] = content[seen][:1]

    for which in (0, 1):
        spoil_pickle(embeddings, shorten, which)
    module = script("train_basis")
    monkeypatch.setattr(module, "MODEL_NAME", str(sources / "model"))
    monkeypatch.setattr(module, "K_list", [0, 2])
    call(monkeypatch, module, "--dir", embeddings)
    results = json.loads((embeddings / "results" / "results.json").read_text())
    assert len(results["fits"]) == 2
    head = utils.load_reward_head(str(sources / "model"))
    with safe_open(embeddings / "results" / results["fits"][0]["file"], "pt") as file:
        assert torch.equal(file.get_tensor("V"), head)


# ---- Real text ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_TEXT.is_dir(), reason="the real text lies beside the repository of its developers only")
def test_real_text_goes_through_the_pipeline(monkeypatch, capsys, sources, tmp_path):
    call(monkeypatch, script("prepare"), "--data", REAL_TEXT, "--model", sources / "model", "--dir", tmp_path,
         "--limit", "300")
    module = script("train_basis")
    monkeypatch.setattr(module, "K_list", [0, 1, 2])
    call(monkeypatch, module, "--dir", tmp_path)
    assert "K : 2" in capsys.readouterr().out
    workers = {json.loads(line)["worker"] for line in
               __import__("gzip").open(REAL_TEXT / "comparisons_train.jsonl.gz", "rt")}
    assert set(read_pickles(tmp_path)[0]) <= workers
