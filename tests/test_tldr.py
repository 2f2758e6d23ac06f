"""Reddit TL;DR as a user runs it: the demo, the published split, files, interruptions, slips."""

import functools
import gzip
import hashlib
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
    REAL_TEXT,
    closing_table,
    content_of,
    interrupted,
    plain,
    printed,
    quick,
    results_in,
    rows_in,
    serve_hub,
    start,
    start_code,
    state_alone,
    write_rows,
)
from helpers import ROOT, call, input_error, load_script, refused, sign_again
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lore.embedding_files
import lore.files
import lore.results
import lore.reward_model
import lore.scripts
import tldr

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPTS = ROOT / "RedditTLDR"
TRAIN, VALIDATION = EMBEDDINGS["RedditTLDR"]
script = functools.partial(load_script, "RedditTLDR")


@pytest.fixture
def trainer(monkeypatch):
    """train_basis.py with the reference model alone, which takes no training."""
    return quick(monkeypatch, script("train_basis"), K_list=[0])


@pytest.fixture
def rows(ran):
    return rows_in(ran.data / "train.jsonl.gz")


def pickles_in(folder):
    return [pickle.loads((folder / name).read_bytes()) for name in (TRAIN, VALIDATION)]


def found_in(folder):
    """The pickles and the head of a folder, to be compared."""
    return plain([*pickles_in(folder), load_file(folder / lore.embedding_files.HEAD_FILE)])


def data_of(folder, rows):
    """A data folder of 30 training rows and 30 validation rows."""
    write_rows(folder / "train.jsonl", rows[:30])
    write_rows(folder / "validation.jsonl", rows[30:60])
    return folder


def prepare(monkeypatch, data, model, folder, *options):
    """Run prepare.py on data in this process."""
    arguments = ["--data", data, "--model", model, "--dir", folder, *options]
    call(monkeypatch, script("prepare"), *arguments)


def prepare_is_refused(monkeypatch, capsys, data, folder, *named):
    """prepare.py refuses data before it reads the model, in one line that holds these strings."""
    arguments = ["--data", data, "--model", "unread", "--dir", folder]
    refused(monkeypatch, capsys, script("prepare"), arguments, *named)


# ---- The split, against Python's own random module


def comparisons(sizes, first):
    """worker -> comparisons, the smallest worker first; each comparison has a number of its own."""
    by_worker, number = {}, first
    for worker, pairs in sorted(sizes.items(), key=lambda item: item[1]):
        by_worker[worker] = []
        for _ in range(pairs):
            sides = {
                "winning": [number // 64, number % 64, 2],  # whole numbers to 256 are exact
                "losing": [1, 1, 5],
            }
            embeddings = {side: [torch.tensor(x).bfloat16()] for side, x in sides.items()}
            by_worker[worker].append({"embeddings": embeddings})
            number += 1
    return by_worker


@pytest.fixture
def files():
    """Train and validation files with eleven workers of both, one of each alone, two tiny ones."""
    chance = random.Random(1)
    common = [f"worker {i:02d}" for i in chance.sample(range(100), 11)]
    train = {worker: chance.randrange(20, 300) for worker in common}
    train |= {"train only": 90, "tiny": 1, "small": 2}
    validation = {worker: chance.randrange(5, 40) for worker in common}
    validation |= {"validation only": 30}
    validation |= {common[0]: 2, common[1]: 3}  # left out for their size in this file
    return comparisons(train, 0), comparisons(validation, 10_000)


def test_the_split_is_the_published_one_whatever_the_global_generator(files):
    """Python's generator with seed 0: workers sorted and halved, then 150 and 50 pairs of each."""
    train, validation = files
    seen, unseen, drawn = tldr.draw_comparisons(train, validation, 150, 50)
    state = random.getstate()
    random.seed(0)
    kept = [sorted(file, key=lambda worker: len(file[worker]))[2:] for file in files]
    workers = sorted(set(kept[0]) & set(kept[1]))
    random.shuffle(workers)
    expected_seen, expected_unseen = workers[:4], workers[4:]
    expected = {
        "train": [random.sample(train[w], min(150, len(train[w]))) for w in expected_seen],
        "train_unseen": [random.sample(train[w], min(50, len(train[w]))) for w in expected_unseen],
        "test": [validation[w] for w in expected_seen],
        "test_unseen": [validation[w] for w in expected_unseen],
    }
    _, _, again = tldr.draw_comparisons(train, validation, 150, 50)
    random.setstate(state)
    assert len(workers) == 9 and (seen, unseen) == (expected_seen, expected_unseen)
    assert drawn == again == expected
    other, _, _ = tldr.draw_comparisons(train, validation, 150, 50, seed=1)
    assert other != seen


def test_features_are_the_winning_minus_the_losing_embeddings_in_float32(files):
    users = list(files[1].values())
    for X, pairs in zip(tldr.features_of(users), users, strict=True):
        differences = [
            pair["embeddings"]["winning"][0].float() - pair["embeddings"]["losing"][0].float()
            for pair in pairs
        ]
        assert X.dtype == torch.float32 and torch.equal(X, torch.stack(differences))


def test_files_without_two_common_workers_are_refused():
    train, validation = (
        comparisons(dict.fromkeys((*small, *workers), 9) | dict.fromkeys(small, 1), 0)
        for small, workers in (("ab", "cd"), ("xy", "cz"))
    )
    with input_error("part: 1", "2 smallest"):
        tldr.draw_comparisons(train, validation, 150, 50)


# ---- The demo, the formats, the results


def test_demo_says_that_it_is_synthetic_and_rises_to_the_planted_rank(ran):
    assert "stand-in" in ran.printed["prepare"] and "synthetic" in ran.printed["prepare"]
    assert (
        "synthetic" in ran.printed["train_basis"] and "synthetic" in ran.results["config"]["data"]
    )
    unseen = {fit["K"]: fit["mean_accuracy"][FINAL] for fit in ran.results["fits"]}
    assert list(unseen) == [0, 1, 2, 3, 4, 5, 6]
    assert unseen[1] < unseen[2] < unseen[PLANTED_RANK] and unseen[PLANTED_RANK] > unseen[1] + 0.2


def test_pickles_have_the_released_format_and_the_models_embeddings(ran, rows):
    expected = {}
    for row in rows:
        texts = [summary["text"] for summary in row["summaries"]]
        expected.setdefault(row["worker"], []).append(
            (row["info"]["post"], texts[row["choice"]], texts[1 - row["choice"]])
        )
    train, validation = pickles_in(ran.folder)
    assert {
        worker: [
            tuple(pair[key] for key in ("text", "winning_summary", "losing_summary"))
            for pair in pairs
        ]
        for worker, pairs in train.items()
    } == expected
    model, tokenizer = lore.reward_model.load_reward_model(ran.model, device="cpu")
    for by_worker in (train, validation):
        counts = list(map(len, by_worker.values()))
        assert counts == sorted(counts)
        for number, pair in enumerate(pair for pairs in by_worker.values() for pair in pairs):
            assert set(pair) == {"text", "winning_summary", "losing_summary", "embeddings"}
            for side in ("winning", "losing"):
                (vector,) = pair["embeddings"][side]
                assert (
                    vector.dtype == torch.bfloat16
                    and vector.shape == (64,)
                    and vector.device.type == "cpu"
                )
                if number % 100 == 0:
                    alone = state_alone(
                        model,
                        tokenizer,
                        [
                            {"role": "user", "content": pair["text"]},
                            {"role": "assistant", "content": pair[f"{side}_summary"]},
                        ],
                    )
                    torch.testing.assert_close(vector.float(), alone, rtol=0.01, atol=0.01)


def test_equal_conversations_are_embedded_by_one_call_and_pickled_once(
    monkeypatch, ran, rows, tmp_path
):
    handed_over = []
    embed = lore.scripts.embed_distinct

    def counted(conversations, *arguments, **options):
        handed_over.extend(conversations)
        return embed(conversations, *arguments, **options)

    monkeypatch.setattr(lore.scripts, "embed_distinct", counted)
    rows[1:3] = [
        {**row, "info": rows[0]["info"], "summaries": rows[0]["summaries"]} for row in rows[1:3]
    ]
    prepare(monkeypatch, data_of(tmp_path / "data", rows), ran.model, tmp_path)
    assert len(handed_over) == 120
    for by_worker in pickles_in(tmp_path):
        vectors = {}
        for pair in (pair for pairs in by_worker.values() for pair in pairs):
            for side in tldr.SIDES:
                key = pair["text"], pair[f"{side}_summary"]
                vectors.setdefault(key, set()).add(id(pair["embeddings"][side][0]))
        assert {len(of_conversation) for of_conversation in vectors.values()} == {1}


def test_the_readmes_examples_run(ran):
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        assert printed(start_code(code, ran.folder.parent, cwd=ran.folder.parent))


def test_results_and_closing_table_agree_with_the_saved_tensors_and_the_pickles(ran):
    validation = pickles_in(ran.folder)[1]
    table = closing_table(ran.printed["train_basis"])
    for fit in ran.results["fits"]:
        tensors = load_file(ran.folder / "results" / fit["file"])
        V, W = tensors["V"].double(), tensors["W_unseen"].double()
        accuracies = []
        for worker, w in zip(ran.results["unseen_users"], W):
            sides = [pair["embeddings"] for pair in validation[worker]]
            accuracies.append(
                np.mean(
                    [
                        float((side["winning"][0].double() - side["losing"][0].double()) @ V @ w)
                        > 0
                        for side in sides
                    ]
                )
            )
        of_user = fit["accuracy_of_user"][FINAL]
        assert list(of_user.values()) == pytest.approx(
            accuracies, abs=0.1
        )  # float32 may turn a margin near 0
        assert fit["mean_accuracy"][FINAL] == pytest.approx(np.mean(accuracies), abs=0.01)
        assert fit["std_over_users"][FINAL] == pytest.approx(np.std(accuracies), abs=0.02)
        of_seeds = [
            other["mean_accuracy"] for other in ran.results["fits"] if other["K"] == fit["K"]
        ]
        means = [
            np.mean([of_seed[setting] for of_seed in of_seeds]) for setting in fit["mean_accuracy"]
        ]
        assert table["ref" if fit["K"] == 0 else str(fit["K"])] == pytest.approx(means, abs=5.1e-4)
    assert (ran.folder / "results" / "accuracy_by_rank.png").read_bytes().startswith(b"\x89PNG")


def test_a_basis_names_its_model_its_data_and_its_settings(ran):
    head = load_file(ran.folder / lore.embedding_files.HEAD_FILE)["reward_head"]
    with safe_open(ran.folder / lore.embedding_files.HEAD_FILE, "pt") as file:
        identity = json.loads(file.metadata()["about"])["identity"]
    assert identity["reward_head"] == hashlib.sha256(json.dumps(head.tolist()).encode()).hexdigest()
    for K in range(7):
        with safe_open(ran.folder / "results" / f"K_{K}.safetensors", "pt") as file:
            about = json.loads(file.metadata()["about"])
        assert about["identity"] == identity and set(identity) == {
            "model",
            "weights",
            "backbone",
            "tokenizer",
            "reward_head",
            "data",
        }
        kept = min(
            (fit for fit in ran.results["fits"] if fit["K"] == K),
            key=lambda fit: fit["training_loss"] or 0,
        )
        assert (about["K"], about["alpha"], about["seed"]) == (K, 0, kept["seed"])
        assert (
            about["config"]["model"] == "stand-in"
            and about["config"]["data"] == "Reddit TL;DR (synthetic demo)"
        )
        assert about["config"]["num_iterations"] == 1000 and about["config"]["K_list"] == [
            0,
            1,
            2,
            3,
            4,
            5,
            6,
        ]
        assert about["unseen_users"] == ran.results["unseen_users"] and "torch" in about["versions"]


def test_another_process_with_another_hash_seed_and_a_notebooks_backend_gives_the_same_results(
    ran, embeddings
):
    environment = {"PYTHONHASHSEED": "7", "MPLBACKEND": "no_such_backend", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "train_basis.py", "--dir", embeddings],
        cwd=ran.folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    theirs, ours = results_in(embeddings), ran.results
    del theirs["seconds"], ours["seconds"]
    assert theirs == ours
    for fit in ours["fits"]:
        name = f"results/{fit['file']}"
        assert (embeddings / name).read_bytes() == (ran.folder / name).read_bytes()


def test_torchrun_gives_nearly_the_same_bases_and_prints_once(ran, embeddings):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*launcher, SCRIPTS / "train_basis.py", "--dir", embeddings],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout.count("K : 3") == 1, done.stderr
    for fit, expected in zip(results_in(embeddings)["fits"], ran.results["fits"], strict=True):
        assert fit["mean_accuracy"] == pytest.approx(expected["mean_accuracy"], abs=0.05)


def test_few_shot_curves_say_where_users_have_fewer_pairs(monkeypatch, capsys, ran, embeddings):
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig

    def kept(figure, *arguments, **options):
        figures.append(figure)
        return savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    module = quick(
        monkeypatch, script("vary_fewshot"), num_shots=[1, 12, 40], K_list=[PLANTED_RANK], trials=4
    )
    call(monkeypatch, module, "--dir", embeddings)
    train = pickles_in(ran.folder)[0]
    has = [len(train[worker]) for worker in ran.results["unseen_users"]]
    found = json.loads((embeddings / "results" / "vary_fewshot.json").read_text())
    reached = [np.mean([min(n, shots) for n in has]) for shots in (1, 12, 40)]
    assert found["shots_are"] == "pairs" and found["shots_of_the_mean_user"] == pytest.approx(
        reached
    )
    (curve,) = found["curves"]
    assert curve["unseen_mean"][1] > curve["unseen_mean"][0] and curve["unseen_std"][0] > 1e-3
    out = capsys.readouterr().out
    assert (
        "Shots : 12" in out and f"{reached[2]:.1f}" in out and f"more than {min(has)} pairs" in out
    )
    assert all(
        "not every unseen user" in figure.get_suptitle() for figure in figures[:2]
    )  # then the questions'
    assert (embeddings / "results" / "vary_fewshot.png").read_bytes().startswith(b"\x89PNG")
    questions = pd.read_csv(embeddings / "results" / "vary_questions.csv").pivot(
        index="questions", columns="fit", values="mean"
    )
    assert (
        questions["widened prior, chosen"][4] > questions["widened prior, random"][8] - 0.02
    )  # half the questions
    assert f"{questions['widened prior, chosen'][4]:.3f} [" in out


# ---- Interruptions and full disks


def small_shards(ran, folder):
    return start(
        SCRIPTS,
        "prepare",
        "--data",
        ran.data,
        "--model",
        ran.model,
        "--dir",
        folder,
        "--limit",
        "60",
        SHARD_SIZE=2,
    )


def shards_in(folder):
    return {
        path: path.stat().st_mtime_ns for path in folder.glob(".embedding_cache/*/*.safetensors")
    }


def test_prepare_killed_at_any_moment_ends_with_the_same_pickles(ran, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    began = time.perf_counter()
    printed(small_shards(ran, unbroken))
    seconds, everything = time.perf_counter() - began, len(shards_in(unbroken))
    assert everything >= 40
    chance, partial = random.Random(0), 0
    for kill in range(4):
        before = shards_in(broken)
        run = small_shards(ran, broken)
        if kill % 2:  # any moment of its life
            time.sleep(chance.uniform(0, seconds))
        else:  # in the midst of the embedding
            while run.running() and len(shards_in(broken)) < len(before) + 3:
                time.sleep(0.001)
        run.kill()
        after = shards_in(broken)
        assert before.items() <= after.items()  # what was finished is neither lost nor made again
        partial += 0 < len(after) < everything
        if len(after) == everything:  # it came through: begin again
            shutil.rmtree(broken)
    assert partial >= 2
    printed(small_shards(ran, broken))
    assert len(shards_in(broken)) == everything
    assert found_in(broken) == found_in(unbroken)


# Runs prepare.py, which waits for Ctrl-C once its first shard is there.
WAITS_FOR_CTRL_C = """
import signal
import prepare
import lore.embedding
save_tensors = lore.embedding.save_tensors

def save_and_wait(path, tensors):
    save_tensors(path, tensors)
    signal.pause()

lore.embedding.save_tensors = save_and_wait
prepare.SHARD_SIZE = 2
prepare.run_script(prepare.main)
"""


def test_ctrl_c_says_that_a_second_run_resumes(ran, tmp_path):
    options = ["--data", ran.data, "--model", ran.model, "--dir", tmp_path]
    run = start_code(WAITS_FOR_CTRL_C, SCRIPTS, *options, "--limit", 60)
    while run.running() and not shards_in(tmp_path):
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGINT)
    status, _, err = run.outcome()
    assert status == 130 and err.splitlines()[-1].startswith("error: ") and "resume" in err
    assert "Traceback" not in err and not list(tmp_path.glob("*.pkl"))
    assert len(shards_in(tmp_path)) == 1


def test_a_full_disk_is_one_line_and_keeps_what_was_there(ran, embeddings):
    before = content_of(embeddings)
    status, _, err = start(
        SCRIPTS,
        "prepare",
        "--data",
        ran.data,
        "--model",
        ran.model,
        "--dir",
        embeddings,
        "--overwrite",
        largest_file=250_000,
    ).outcome()  # enough for a shard, not for a pickle
    lines = [
        line for line in err.splitlines() if "embedding:" not in line
    ]  # the bar of a slow machine
    assert status == 2 and [line.startswith("error: ") for line in lines] == [True] and TRAIN in err
    assert {
        path: content for path, content in content_of(embeddings).items() if "cache" not in path
    } == before
    assert [path.name for path in embeddings.iterdir() if path.is_dir()] == [".embedding_cache"]


@pytest.mark.parametrize("largest_file", [300, 300_000])
def test_a_demo_on_a_full_disk_is_one_line(tmp_path, largest_file):
    status, _, err = start(
        SCRIPTS, "prepare", "--demo", "--dir", tmp_path / "out", largest_file=largest_file
    ).outcome()
    assert status == 2 and [line.startswith("error: ") for line in err.splitlines()] == [True]
    assert str(tmp_path / "out") in err and not list(tmp_path.glob("out/*.pkl"))


def test_a_tokenizer_that_finds_the_disk_full_is_one_line(monkeypatch, capsys, tmp_path):
    from transformers import PreTrainedTokenizerFast

    def full(*arguments, **options):
        raise Exception("No space left on device (os error 28)")  # as the library in Rust says it

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    refused(
        monkeypatch,
        capsys,
        script("prepare"),
        ["--demo", "--dir", tmp_path],
        ".standin",
        "No space left",
    )


def test_a_failed_save_leaves_the_results_of_the_run_before_and_the_training(
    monkeypatch, capsys, embeddings
):
    module = quick(monkeypatch, script("train_basis"), K_list=[0, 2], num_iterations=20, seeds=[0])
    call(monkeypatch, module, "--dir", embeddings)
    before = content_of(embeddings / "results")
    quick(monkeypatch, module, seeds=[1])
    with monkeypatch.context() as patch:

        def full(path, content):
            raise OSError(28, "No space left on device", str(path))

        patch.setattr(lore.results, "save_json", full)
        refused(monkeypatch, capsys, module, ["--dir", embeddings], "results.json", "No space")
    after = content_of(embeddings / "results")
    assert after.pop(lore.files.CHECKPOINT_FILE)
    assert after.pop(lore.scripts.CONTROL_CHECKPOINT_FILE)
    assert after == before
    call(monkeypatch, module, "--dir", embeddings)
    assert "after 20 iterations" in capsys.readouterr().out
    assert content_of(embeddings / "results").keys() == before.keys()


def test_an_interruption_of_the_control_keeps_the_training_and_of_the_end_both(
    monkeypatch, capsys, embeddings
):
    """Each has a checkpoint of its own, and both go when the results are there."""
    module = quick(monkeypatch, script("train_basis"), K_list=[0, 2], num_iterations=20, seeds=[0])
    checkpoints = {lore.files.CHECKPOINT_FILE, lore.scripts.CONTROL_CHECKPOINT_FILE}
    kept = []
    for name in ("tossed_control", "save_results"):
        with monkeypatch.context() as patch:

            def stop(*arguments, **options):
                raise KeyboardInterrupt

            patch.setattr(lore.scripts, name, stop)
            interrupted(monkeypatch, capsys, module, "--dir", embeddings)
        kept.append(set(content_of(embeddings / "results")))
    assert kept == [{lore.files.CHECKPOINT_FILE}, checkpoints]
    call(monkeypatch, module, "--dir", embeddings)
    assert not checkpoints & set(content_of(embeddings / "results"))
    tossed = results_in(embeddings)["evidence"][-1]["controls"]["tossed"]
    assert 0 < tossed["mean"] < 1


def test_an_interrupted_vary_fewshot_goes_on_from_its_training(monkeypatch, capsys, embeddings):
    module = quick(
        monkeypatch, script("vary_fewshot"), num_shots=[3], K_list=[2], trials=2, num_iterations=30
    )
    with monkeypatch.context() as patch:

        def stop(*arguments):
            raise KeyboardInterrupt

        patch.setattr(lore.scripts, "save_few_shot_curves", stop)
        interrupted(monkeypatch, capsys, module, "--dir", embeddings)
    call(monkeypatch, module, "--dir", embeddings)
    assert "after 30 iterations" in capsys.readouterr().out
    assert set(content_of(embeddings / "results")) == {
        *(f"vary_fewshot.{end}" for end in ("json", "csv", "tex", "png", "pdf")),
        *(f"vary_questions.{end}" for end in ("json", "csv", "png", "pdf")),
    }


# ---- What prepare.py reads


def test_a_pandas_export_gives_the_same_pickles(monkeypatch, ran, rows, tmp_path):
    """Parquet, packed and sharded files; workers as whole numbers, choices as true, "1" or 1.0."""
    numbers = {name: i for i, name in enumerate(sorted({row["worker"] for row in rows}))}
    for row in rows:
        row["worker"] = str(numbers[row["worker"]])
    folders = {
        "plain": data_of(tmp_path / "plain", rows),
        **{kind: tmp_path / kind for kind in ("mixed", "hub")},
    }
    exported = [
        {**row, "worker": kind(row["worker"]), "choice": choice(row["choice"])}
        for row, kind, choice in zip(rows, [int, float, str] * 20, [bool, str, float, int] * 15)
    ]
    data_of(folders["mixed"], exported)
    for name in ("train.jsonl", "validation.jsonl"):
        path = folders["mixed"] / name
        path.with_name(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    (folders["mixed"] / "._train.jsonl").write_text("no data")
    folders["hub"].mkdir()
    for name, part in (
        ("train-00000-of-00002", rows[:20]),
        ("train-00001-of-00002", rows[20:30]),
        ("validation-00000-of-00001", rows[30:60]),
    ):
        frame = pd.DataFrame(part)
        frame.assign(worker=frame.worker.astype(int), choice=frame.choice.astype(bool)).to_parquet(
            folders["hub"] / f"{name}.parquet"
        )
    for kind, folder in folders.items():
        prepare(monkeypatch, folder, ran.model, tmp_path / f"{kind}.out")
    first, *others = (found_in(tmp_path / f"{kind}.out") for kind in folders)
    assert others == [first, first]


@pytest.mark.parametrize(
    "files, named",
    [
        (
            ["train_latest.jsonl"],
            ["valid, val, dev or test in its name", "it holds train_latest.jsonl"],
        ),
        (["train_test.jsonl"], ["two of"]),
        ([], ["no parquet"]),
        (["train.jsonl", "train.parquet", "test.jsonl"], ["one file", "train.parquet"]),
        (["train-00000-of-00002.parquet", "test.jsonl"], ["shards"]),
        (["._train.jsonl", "test.jsonl"], ["train"]),
        (
            ["train-00000-of-00002.parquet", "train-00001-of-00003.parquet", "test.jsonl"],
            ["shards"],
        ),
    ],
)
def test_splits_are_told_by_whole_words_and_whole_sets_of_shards(
    monkeypatch, capsys, ran, tmp_path, files, named
):
    for name in files:
        shutil.copy(ran.data / "train.jsonl.gz", tmp_path / name)
    refused(
        monkeypatch,
        capsys,
        script("prepare"),
        ["--data", tmp_path, "--model", ran.model, "--dir", tmp_path / "out"],
        *named,
    )
    assert not content_of(tmp_path / "out")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"choice": 2}, "choice"),
        ({"choice": ...}, "choice"),
        ({"choice": 0.5}, "choice"),
        ({"choice": None}, "choice"),
        ({"info": ...}, "info"),
        ({"info": {"id": 1}}, "info.post"),
        ({"summaries": [{"text": "one"}]}, "summaries"),
        ({"summaries": None}, "summaries"),
        ({"worker": ...}, "worker"),
        ({"worker": ""}, "worker"),
        ({"worker": " "}, "worker"),
        ({"worker": 1.5}, "worker"),
        ({"worker": True}, "worker"),
        ({"worker": float("nan")}, "worker"),
        ({"worker": None}, "worker"),
        ({"worker": 2.0**53}, "worker: an id that went through a float"),
        ({"worker": "1e+16"}, "worker: an id that went through a float"),
    ],
)
def test_a_spoilt_row_is_named(monkeypatch, capsys, rows, tmp_path, changes, named):
    for column, value in changes.items():
        rows[2][column] = value
        if value is ...:
            del rows[2][column]
    data = data_of(tmp_path / "data", rows)
    prepare_is_refused(monkeypatch, capsys, data, tmp_path, "train.jsonl, row 3: ", named)
    assert not list(tmp_path.glob("*.pkl"))


def test_columns_and_fields_that_are_not_needed_may_hold_what_python_cannot(tmp_path, rows):
    (tmp_path / "late").mkdir()
    late = pa.array([2**60] * 30, pa.timestamp("us"))
    for split, part in (("train", rows[:30]), ("validation", rows[30:60])):
        table = pa.Table.from_pylist(part)
        info = table["info"].combine_chunks()
        fields = [*zip(info.type.names, info.flatten()), ("posted", late)]
        info = pa.StructArray.from_arrays([column for _, column in fields], [n for n, _ in fields])
        table = table.set_column(table.schema.get_field_index("info"), "info", info)
        table = table.append_column("judged", late)
        pq.write_table(table, tmp_path / "late" / f"{split}.parquet")
    found = {}
    for data in (tmp_path / "late", data_of(tmp_path / "plain", rows)):
        splits = tldr.read_comparisons(data)
        by_worker = [tldr.comparisons_by_worker(split).by_worker for split in splits.values()]
        found[data.name] = by_worker
    assert found["late"] == found["plain"]


def test_rows_of_the_hub_are_named_after_their_split(monkeypatch, capsys, rows, tmp_path):
    for split in ("train", "validation"):
        parts = {"train": rows[:30], "validation": rows[30:60]}
        parts[split] = [*parts[split][:4], {**rows[4], "choice": 7}]
        serve_hub(monkeypatch, **parts)
        refused(
            monkeypatch,
            capsys,
            script("prepare"),
            ["--model", "unread", "--dir", tmp_path],
            tldr.DATASET,
            f"{split}, row 5: choice",
        )
    serve_hub(monkeypatch)
    refused(
        monkeypatch,
        capsys,
        script("prepare"),
        ["--model", "unread", "--dir", tmp_path],
        tldr.DATASET,
        "--data",
    )


def test_texts_that_are_null_empty_or_equal_are_counted(monkeypatch, capsys, ran, rows, tmp_path):
    rows[0]["info"]["post"] = None
    rows[1]["info"]["post"] = "  "
    rows[3]["summaries"][1]["text"] = ""
    rows[4]["summaries"][0]["text"] = None
    rows[200]["summaries"][0] = rows[200]["summaries"][1]
    for row in rows[400:402]:
        row["summaries"][1] = row["summaries"][0]
    write_rows(tmp_path / "data" / "train.jsonl", rows[:300])
    write_rows(tmp_path / "data" / "validation.jsonl", rows[300:])
    prepare(monkeypatch, tmp_path / "data", ran.model, tmp_path)
    train, validation = capsys.readouterr().out.split("val: ", 1)
    assert "train: 296 comparisons" in train and "4 rows without" in train
    assert (
        "1 of 296 pairs have two equal texts" in train and "warning" not in train
    )  # a third of one per cent
    assert "2 of 187 pairs have two equal texts" in validation and "warning" in validation
    call(monkeypatch, quick(monkeypatch, script("train_basis"), K_list=[0]), "--dir", tmp_path)
    users = set(results_in(tmp_path)["users"] + results_in(tmp_path)["unseen_users"])
    equal = sum(
        row["summaries"][0] == row["summaries"][1] and row["worker"] in users for row in rows
    )
    assert results_in(tmp_path)["counts"]["pairs with equal sides"] == equal > 0


def test_workers_that_no_split_shares_are_refused_before_anything_is_embedded(
    monkeypatch, capsys, ran, rows, tmp_path
):
    for i, row in enumerate(rows[30:60]):
        row["worker"] = f"new {i % 5}"
    monkeypatch.setattr(lore.scripts, "embed_distinct", None)
    data = data_of(tmp_path / "data", rows)
    arguments = ["--data", data, "--model", ran.model, "--dir", tmp_path / "out"]
    refused(monkeypatch, capsys, script("prepare"), arguments, "val part: 0")


@pytest.mark.parametrize(
    "content, named",
    [
        (b'{"info": 1}\n{"info"\n', "row 1"),
        (b"[1, 2]\n", "row 1"),
        (b"<html>\n", "row 1"),
        (b"\xff\xfe\n", "row 1"),
        (b'{"info": ' + b"1" * 5001 + b"}\n", "row 1"),
        (b"\x1f\x8b\x08", "row 1"),
        (b"", "no row in it"),
    ],
)
def test_a_file_that_is_no_jsonl_is_named(monkeypatch, capsys, rows, tmp_path, content, named):
    data = data_of(tmp_path / "data", rows)
    (data / "train.jsonl").write_bytes(content)
    prepare_is_refused(monkeypatch, capsys, data, tmp_path, named, "train.jsonl")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--limit", 0], "--limit: 0"),
        (["--limit", "many"], "--limit"),
        (["--demo", "--model", "x"], "--demo"),
        (["--data", "/nowhere", "--model", "x"], "/nowhere"),
        (["--sideways"], "--sideways"),
        ([], "--demo"),
    ],
)
def test_an_unusable_command_line_is_one_line(monkeypatch, capsys, tmp_path, arguments, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(monkeypatch, capsys, script("prepare"), [*arguments, "--dir", tmp_path], named)


def test_models_without_a_usable_head_are_named(monkeypatch, capsys, ran, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ["--data", ran.data, "--dir", tmp_path, "--model"]
    refused(monkeypatch, capsys, script("prepare"), [*options, "no-such/model"], "no-such/model")
    weights = load_file(ran.model / "model.safetensors")
    for name, head in (
        ("headless", None),
        ("two labels", torch.ones(2, 64)),
        ("NaN", torch.full((1, 64), torch.nan)),
    ):
        shutil.copytree(ran.model, tmp_path / name)
        others = {key: value for key, value in weights.items() if key != "score.weight"}
        save_file(
            {**others, **({} if head is None else {"score.weight": head})},
            tmp_path / name / "model.safetensors",
        )
        refused(
            monkeypatch, capsys, script("prepare"), [*options, tmp_path / name], name, "reward head"
        )
    assert not list(tmp_path.glob("*.pkl"))


def test_finished_embeddings_are_recognised_and_replaced_only_with_overwrite(
    monkeypatch, capsys, ran, embeddings, tmp_path
):
    call(monkeypatch, script("prepare"), "--demo", "--dir", embeddings)
    assert "finished already" in capsys.readouterr().out
    before, model = content_of(embeddings), shutil.copytree(ran.model, tmp_path / "edited")
    options = ["--data", ran.data, "--model", model, "--dir", embeddings]
    call(monkeypatch, script("prepare"), *options)  # the same model elsewhere
    assert "finished already" in capsys.readouterr().out
    template = next(
        path
        for path in (model / "chat_template.jinja", model / "tokenizer_config.json")
        if path.exists()
    )
    template.write_text(template.read_text().replace("|eot_id|", "|end_header_id|"))
    refused(
        monkeypatch,
        capsys,
        script("prepare"),
        options,
        TRAIN,
        "of other tokenizer or chat template (",
        "stand-in",
        "--overwrite",
    )
    assert content_of(embeddings) == before
    (embeddings / VALIDATION).write_bytes(
        before[VALIDATION][:-100]
    )  # damaged ones are not finished
    shutil.copytree(ran.folder / ".embedding_cache", embeddings / ".embedding_cache")
    call(monkeypatch, script("prepare"), "--demo", "--dir", embeddings)
    assert "finished already" not in capsys.readouterr().out
    assert found_in(embeddings) == found_in(ran.folder)
    call(monkeypatch, script("prepare"), *options, "--limit", "40", "--overwrite")
    assert sum(map(len, pickles_in(embeddings)[0].values())) == 40
    (
        embeddings / lore.embedding_files.HEAD_FILE
    ).unlink()  # pickles of the released script come without
    refused(monkeypatch, capsys, script("prepare"), options, "--overwrite")


def test_finished_embeddings_from_before_digests_of_the_model_stay_valid(
    monkeypatch, capsys, ran, embeddings
):
    tensors, about = lore.files.load_tensors(embeddings / lore.embedding_files.HEAD_FILE)
    del about["identity"]["weights"], about["identity"]["tokenizer"], about["embedding"]
    lore.files.save_tensors(embeddings / lore.embedding_files.HEAD_FILE, tensors, **about)
    call(monkeypatch, script("prepare"), "--demo", "--dir", embeddings)
    assert "finished already" in capsys.readouterr().out
    about["identity"]["data"] = "1" * 64
    lore.files.save_tensors(embeddings / lore.embedding_files.HEAD_FILE, tensors, **about)
    refused(
        monkeypatch,
        capsys,
        script("prepare"),
        ["--demo", "--dir", embeddings],
        "of other data or another selection of them",
    )


# ---- What train_basis.py reads, refuses and writes


def spoil(folder, change, name=TRAIN):
    """Apply `change` to the dict in one of the pickles."""
    content = pickle.loads((folder / name).read_bytes())
    change(content)
    (folder / name).write_bytes(pickle.dumps(content))
    sign_again(folder)


def a_comparison(content):
    """The first comparison of the worker with the most, who is in the study."""
    return next(reversed(content.values()))[0]


def a_pair(content):
    return a_comparison(content)["embeddings"]


def halve(content):
    for pair in (pair for pairs in content.values() for pair in pairs):
        pair["embeddings"] = {
            side: [vector[0][:32].clone()] for side, vector in pair["embeddings"].items()
        }


def test_a_study_holds_the_pairs_prompts_and_texts_of_every_worker_in_the_files(ran):
    study = tldr.load_embeddings(ran.folder, None, 1000, 1000)
    files = dict(zip(("train", "test"), pickles_in(ran.folder)))
    assert study.seen == ran.results["users"] and study.unseen == ran.results["unseen_users"]
    assert study.left_out == len(files["train"]) - len(study.seen) - len(study.unseen) == 2
    assert study.title == "Reddit TL;DR (synthetic demo)" and study.provenance["demo"]
    for part, users in study.features().items():
        names = study.unseen if part.endswith("unseen") else study.seen
        for i, name in enumerate(names):
            pairs = files[part.removesuffix("_unseen")][name]
            texts = [(pair["winning_summary"], pair["losing_summary"]) for pair in pairs]
            assert len(users[i]) == len(pairs) and sorted(study.texts[part][i]) == sorted(texts)
            prompts = sorted(tldr.prompt_key(pair["text"]) for pair in pairs)
            assert sorted(study.prompts[part][i]) == prompts


def test_a_study_of_files_without_texts_says_that_they_are_not_known(embeddings):
    for name in (TRAIN, VALIDATION):
        spoil(embeddings, lambda content: a_comparison(content).pop("text"), name)
    study = tldr.load_embeddings(embeddings, None, 150, 50)
    assert study.prompts == study.texts == {} and study.pair_count("train") > 0


@pytest.mark.parametrize(
    "text", [None, 5, b"text", [1], [{"content": "a"}], [{"role": "user", "content": 1}], {}]
)
def test_texts_of_another_type_are_not_known(embeddings, text):
    for name in (TRAIN, VALIDATION):
        spoil(embeddings, lambda content: a_comparison(content).update(text=text), name)
    study = tldr.load_embeddings(embeddings, None, 150, 50)
    assert study.prompts == study.texts == {}


def test_own_data_without_a_name_have_the_data_sets(embeddings):
    head = embeddings / lore.embedding_files.HEAD_FILE
    tensors, record = lore.files.load_tensors(head)
    del record["data"]
    lore.files.save_tensors(head, tensors, **record | {"own": True})
    assert tldr.load_embeddings(embeddings, None, 150, 50).title == "Reddit TL;DR"


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda content: a_pair(content)["losing"][0].fill_(float("nan")), "NaN"),
        (lambda content: a_pair(content)["winning"][0][3:4].fill_(float("inf")), "infinite"),
        (lambda content: a_pair(content).clear(), "without embeddings"),
        (lambda content: next(reversed(content.values())).clear(), "worker"),
        (lambda content: a_pair(content).update(losing=[torch.zeros(32)]), "unequally long"),
        (
            lambda content: [
                pair["embeddings"].update({side: [torch.ones(64).long()] for side in tldr.SIDES})
                for pair in next(reversed(content.values()))
            ],
            "without embeddings",
        ),
        (lambda content: content.clear(), "not a dict of workers"),
        (halve, "d = 32"),
        (
            lambda content: [content.update({f"new {w}": content.pop(w)}) for w in list(content)],
            "workers in both",
        ),
    ],
)
def test_spoilt_embeddings_are_named_and_nothing_written(
    monkeypatch, capsys, embeddings, trainer, change, named
):
    spoil(embeddings, change)
    before = content_of(embeddings)
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], "train", named)
    assert content_of(embeddings) == before


def test_embeddings_that_do_not_fit_the_head_are_named(monkeypatch, capsys, embeddings, trainer):
    for name in (TRAIN, VALIDATION):
        spoil(embeddings, halve, name)
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], "reward head", "d = 32")
    shutil.copy(embeddings / TRAIN, embeddings / VALIDATION)
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], VALIDATION, "another run")


def test_missing_truncated_and_hostile_pickles_are_named(monkeypatch, capsys, embeddings, trainer):
    path = embeddings / VALIDATION
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path, "truncated")
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(embeddings / "owned").encode() + b"'\ntR.")
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path, "os.system")
    assert not (embeddings / "owned").exists()
    path.unlink()
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path, "prepare.py")


@pytest.mark.parametrize(
    "name, constant, value",
    [
        ("train_basis", "K_list", []),
        ("train_basis", "K_list", [-1]),
        ("train_basis", "K_list", [1.5]),
        ("train_basis", "K_list", [2, 2]),
        ("train_basis", "K_list", [True]),
        ("train_basis", "K_list", 5),
        ("train_basis", "alpha_list", [float("nan")]),
        ("train_basis", "alpha_list", [-1]),
        ("train_basis", "seeds", 0),
        ("train_basis", "num_iterations", -1),
        ("train_basis", "num_iterations", 10.0),
        ("train_basis", "split_seed", "a"),
        ("train_basis", "train_pairs", 0),
        ("train_basis", "unseen_pairs", 2.5),
        ("vary_fewshot", "num_shots", [0]),
        ("vary_fewshot", "trials", 0),
        ("vary_fewshot", "seed", -1),
        ("vary_fewshot", "K_list", [0.5]),
    ],
)
def test_an_unusable_constant_is_named_before_any_data_are_read(
    monkeypatch, capsys, tmp_path, name, constant, value
):
    module = quick(monkeypatch, script(name), **{constant: value})
    refused(monkeypatch, capsys, module, ["--dir", tmp_path], f"{constant}: ")
    assert not content_of(tmp_path)


def test_ranks_and_seeds_may_be_ranges_and_arrays_and_files_of_an_earlier_sweep_go(
    monkeypatch, embeddings, trainer
):
    (embeddings / "results").mkdir()
    for name in ("K_9.safetensors", "K_3_seed_7.safetensors", "vary_fewshot.json"):
        (embeddings / "results" / name).write_text("of an earlier run")
    quick(monkeypatch, trainer, K_list=range(2), seeds=np.arange(2), num_iterations=5)
    call(monkeypatch, trainer, "--dir", embeddings)
    results = results_in(embeddings)
    assert results["config"]["K_list"] == [0, 1] and results["seeds"] == [0, 1]
    assert [(fit["K"], fit["seed"]) for fit in results["fits"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert set(content_of(embeddings / "results")) == {
        "results.json",
        "results.csv",
        "results_long.csv",
        "report.md",
        "report.html",
        "reading.json",
        "weights.csv",
        "accuracy_by_rank.png",
        "accuracy_by_rank.pdf",
        "vary_fewshot.json",
        *(fit["file"] for fit in results["fits"]),
    }


@pytest.mark.parametrize("name", ["train_basis", "vary_fewshot"])
def test_a_sweep_with_a_name_is_kept_beside_the_first(monkeypatch, capsys, embeddings, name):
    short = dict(K_list=[2], num_iterations=20)
    if name == "train_basis":
        short |= dict(seeds=[0], controls=False)
        stopped = "save_results"
    else:
        short |= dict(num_shots=[3], trials=2, num_questions=1, question_seeds=[0])
        stopped = "save_few_shot_curves"
    module = quick(monkeypatch, script(name), **short)
    call(monkeypatch, module, "--dir", embeddings)
    first = content_of(embeddings / "results")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    quick(monkeypatch, module, K_list=[3])
    second = ["--dir", embeddings, "--results", "second"]
    with monkeypatch.context() as patch:
        patch.setattr(lore.scripts, stopped, stop)
        interrupted(monkeypatch, capsys, module, *second)
    call(monkeypatch, module, *second)
    assert "after 20 iterations" in capsys.readouterr().out  # its checkpoint was found again

    named = content_of(embeddings / "results" / "second")
    others = content_of(embeddings / "results")
    assert {path: others[path] for path in others if not path.startswith("second/")} == first
    renamed = {path.replace("K_2", "K_3") for path in first}
    assert named.keys() == renamed
    assert named[next(path for path in named if path.endswith(".json"))] not in first.values()


@pytest.mark.parametrize("name", ["train_basis", "vary_fewshot"])
def test_a_sweep_whose_name_is_a_path_is_refused_and_nothing_written(
    monkeypatch, capsys, embeddings, name
):
    before = content_of(embeddings)
    arguments = ["--dir", embeddings, "--results", "../up"]
    refused(monkeypatch, capsys, script(name), arguments, "--results ../up")
    assert content_of(embeddings) == before
    assert not (embeddings / "up").exists()


def test_the_released_reference_takes_the_heads_place_where_asked_for(
    monkeypatch, ran, embeddings, trainer
):
    from transformers import AutoModel

    quick(monkeypatch, trainer, MODEL_NAME=str(ran.model), released_reference=True)
    call(monkeypatch, trainer, "--dir", embeddings)
    model = AutoModel.from_pretrained(
        ran.model
    )  # without its head, as the released scripts load it
    last = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
    assert torch.equal(
        load_file(embeddings / "results" / "K_0.safetensors")["V"], last.weight[:, :1].float()
    )
    assert results_in(embeddings)["config"]["released_reference"] is True


def test_released_pickles_without_a_head_and_workers_with_one_pair_are_fine(
    monkeypatch, ran, embeddings, trainer
):
    (embeddings / lore.embedding_files.HEAD_FILE).unlink()
    first = ran.results["unseen_users"][0]
    for name in (TRAIN, VALIDATION):
        spoil(
            embeddings,
            lambda content: content.update(
                {
                    "tiny 1": content[first][:1],
                    "tiny 2": content[first][:1],
                    first: content[first][:1] * 2,
                }
            ),
            name,
        )
    quick(monkeypatch, trainer, MODEL_NAME=str(ran.model), K_list=[0, 2], num_iterations=5)
    call(monkeypatch, trainer, "--dir", embeddings)
    head = load_file(ran.model / "model.safetensors")["score.weight"].T
    assert torch.equal(load_file(embeddings / "results" / "K_0.safetensors")["V"], head)
    assert {fit["K"] for fit in results_in(embeddings)["fits"]} == {0, 2}


@pytest.mark.parametrize("protocol", [2, 4])
def test_files_of_the_versions_before_load(monkeypatch, tmp_path, trainer, protocol):
    """A head with its metadata and pickles as an earlier prepare.py wrote them."""
    generator = torch.Generator().manual_seed(0)
    for name in (TRAIN, VALIDATION):
        content = {
            f"worker {w}": [
                {
                    "text": "post",
                    "winning_summary": "good",
                    "losing_summary": "bad",
                    "embeddings": {
                        side: [torch.randn(4, generator=generator).bfloat16()]
                        for side in ("winning", "losing")
                    },
                }
                for _ in range(2 + w)
            ]
            for w in range(6)
        }
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol))
    head = torch.randn(4, 1, generator=generator)
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
            for name in (TRAIN, VALIDATION)
        },
    }
    save_file(
        {"reward_head": head},
        tmp_path / lore.embedding_files.HEAD_FILE,
        {"about": json.dumps(about)},
    )
    call(monkeypatch, trainer, "--dir", tmp_path)
    assert results_in(tmp_path)["config"]["data"] == "Reddit TL;DR (d)"
    study = tldr.load_embeddings(tmp_path, None, 150, 50)
    assert torch.equal(study.reward_head, head)
    assert study.provenance["identity"] == about["identity"] and study.left_out == 2
    assert len(study.seen) == len(study.unseen) == 2


PEAK = """
import sys
sys.path.insert(0, job["arguments"][0])
import tldr
def kilobytes(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0])
tldr.read_embeddings(job["arguments"][1])
before = kilobytes("VmRSS")
content = tldr.read_embeddings(job["arguments"][2])
print(1024 * (kilobytes("VmHWM") - before))
"""


def test_reading_takes_at_most_a_third_more_memory_than_the_files(tmp_path):
    """The unpickler keeps the bytes of a file until it is read, so the vectors must be in these."""
    sizes = {}
    for kind, workers in (("small", 2), ("large", 24)):
        (tmp_path / kind).mkdir()
        sizes[kind] = 0
        for name in (TRAIN, VALIDATION):
            generator = torch.Generator().manual_seed(0)
            vectors = iter(torch.randn(workers * 200, 8192, generator=generator).bfloat16())
            content = {
                f"worker {w}": [
                    {"embeddings": {side: [next(vectors).clone()] for side in tldr.SIDES}}
                    for _ in range(100)
                ]
                for w in range(workers)
            }
            sizes[kind] += (tmp_path / kind / name).write_bytes(pickle.dumps(content, 4))
    peak = printed(start_code(PEAK, ROOT, SCRIPTS, tmp_path / "small", tmp_path / "large"))
    assert 0.7 * sizes["large"] < int(peak) < 1.3 * sizes["large"]


LEAVES = """
import os, sys
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)  # nobody reads what is printed
import train_basis
train_basis.K_list, train_basis.num_iterations = [0, 2], 20
train_basis.run_script(train_basis.main)
"""


def test_a_reader_that_leaves_is_no_traceback(embeddings):
    """As `| head -0` does: the results, or one line that says what stopped."""
    status, _, err = start_code(LEAVES, SCRIPTS, "--dir", embeddings).outcome()
    assert [line.startswith("error: standard output") for line in err.splitlines()] == [True] * (
        status == 2
    )
    assert status == 2 or len(results_in(embeddings)["fits"]) == 2


# ---- Real text


@pytest.mark.skipif(
    not REAL_TEXT.is_dir(), reason="the real text lies beside the repository of its developers only"
)
def test_real_text_goes_through_the_pipeline(monkeypatch, ran, tmp_path):
    prepare(monkeypatch, REAL_TEXT, ran.model, tmp_path, "--limit", "120")
    call(
        monkeypatch,
        quick(monkeypatch, script("train_basis"), K_list=[0, 2], num_iterations=20),
        "--dir",
        tmp_path,
    )
    workers = {row["worker"] for row in rows_in(REAL_TEXT / "comparisons_train.jsonl.gz")}
    assert set(results_in(tmp_path)["users"]) <= set(pickles_in(tmp_path)[0]) <= workers


def test_a_head_other_than_the_one_it_names_is_refused(monkeypatch, capsys, embeddings):
    tensors, about = lore.files.load_tensors(embeddings / lore.embedding_files.HEAD_FILE)
    lore.files.save_tensors(
        embeddings / lore.embedding_files.HEAD_FILE,
        {"reward_head": -tensors["reward_head"]},
        **about,
    )
    refused(
        monkeypatch,
        capsys,
        script("train_basis"),
        ["--dir", embeddings],
        lore.embedding_files.HEAD_FILE,
        "not the one that it names",
    )
