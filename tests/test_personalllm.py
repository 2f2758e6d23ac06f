"""PersonalLLM as a user runs it: eight responses a prompt, simulated users, files, slips."""

import functools
import gzip
import hashlib
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpora import PLANTED_RANK, SCORERS
from demos import (
    EMBEDDINGS,
    FINAL,
    closing_table,
    content_of,
    interrupted,
    plain,
    quick,
    results_in,
    rows_in,
    serve_hub,
    start,
    state_alone,
    two_processes,
    without_forward,
    write_rows,
)
from helpers import ROOT, call, input_error, load_script, refused, sign_again, writes_complex
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lore.embedding_files
import lore.files
import lore.reward_model
import lore.scripts
import personalllm
import utils
from lore.reading import excerpt, one_line, prompt_text
from lore.study import PARTS

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPTS = ROOT / "PersonalLLM"
TEXTS = personalllm.TEXTS_FILE
QUICK = dict(K_list=[0, 2], seeds=[0], num_iterations=5, controls=False)
FILES = EMBEDDINGS["PersonalLLM"]
D, TRAIN, TEST = 64, 240, 60  # width of the stand-in model, prompts of the demo
N, N_UNSEEN = 60, 30  # users of the demo
SEEN_TEST = "Seen User Unseen Prompts"
script = functools.partial(load_script, "PersonalLLM")


@pytest.fixture
def trainer(monkeypatch):
    """train_basis.py with the reference model alone, which takes no training."""
    return quick(monkeypatch, script("train_basis"), K_list=[0])


def prepare(monkeypatch, data, model, folder, *options):
    """Run prepare.py on data in this process."""
    arguments = ["--data", data, "--model", model, "--dir", folder, *options]
    call(monkeypatch, script("prepare"), *arguments)


def rows_of(ran, split):
    return rows_in(ran.data / f"{split}.jsonl.gz")


def data_of(folder, ran, prompts):
    """A data folder with the first prompts of each split, one JSON line each."""
    for split in ("train", "test"):
        write_rows(folder / f"{split}.jsonl", rows_of(ran, split)[:prompts])
    return folder


def scores_of(rows):
    """The scores in the rows of a file, column by column: nested lists `[prompts][8][10]`."""
    return [
        [[row[f"response_{j}_{scorer}"] for scorer in SCORERS] for j in range(1, 9)] for row in rows
    ]


def split_of(embeddings, scores):
    return personalllm.ScoredEmbeddings(embeddings, scores)


# ---- Row numbers and dense matrices


@pytest.fixture(scope="module")
def small(ran):
    """Twenty of the demo's test prompts and six users: (rows, embeddings, scores, mixtures)."""
    tables = load_file(ran.folder / "test.safetensors")
    W = torch.from_numpy(np.random.default_rng(3).dirichlet([0.3] * 10, 6)).float()
    return rows_of(ran, "test")[:20], tables["embeddings"][:160], tables["scores"][:20], W


def loop_over_responses(rows, w):
    """Row numbers of the best and the worst response to each prompt, by a plain loop in float64."""
    best, worst = [], []
    for i, responses in enumerate(scores_of(rows)):
        scores = [
            sum(share * score for share, score in zip(w.tolist(), of_response))
            for of_response in responses
        ]
        best.append(8 * i + scores.index(max(scores)))
        worst.append(8 * i + scores.index(min(scores)))
    return best, worst


def test_simulated_pairs_are_the_dense_ones_and_those_of_a_plain_loop(small):
    rows, table, scores, W = small
    users, dropped = personalllm.simulate_pairs(
        split_of(table, scores), W, 1.0, np.random.default_rng(0), "test"
    )
    assert dropped == 0 and len(users) == len(W)
    for w, pairs in zip(W, users):
        best, worst = loop_over_responses(rows, w)
        assert (pairs.chosen.tolist(), pairs.rejected.tolist()) == (best, worst)
        assert torch.equal(pairs.dense(), utils.simulate_user(scores, table.reshape(20, 8, D), w))
        assert torch.equal(pairs.dense().double(), table.double()[best] - table.double()[worst])


def test_a_fraction_of_the_prompts_is_drawn_anew_for_each_user(small):
    rows, table, scores, W = small
    users, _ = personalllm.simulate_pairs(
        split_of(table, scores), W, 0.47, np.random.default_rng(0), "test"
    )
    drawn = []
    for w, pairs in zip(W, users):
        prompts = (pairs.chosen // 8).tolist()
        assert len(set(prompts)) == len(prompts) == 9  # of 9.4
        best, worst = loop_over_responses(rows, w)
        assert pairs.chosen.tolist() == [best[i] for i in prompts]
        assert pairs.rejected.tolist() == [worst[i] for i in prompts]
        drawn.append(frozenset(prompts))
    assert len(set(drawn)) == len(W)


def test_tied_prompts_leave_fewer_pairs_to_those_who_drew_them(small):
    _, table, scores, W = small
    tied = scores.clone()
    tied[::2] = 1.0
    untied, _ = personalllm.simulate_pairs(
        split_of(table, scores), W, 0.5, np.random.default_rng(4), "test"
    )
    users, dropped = personalllm.simulate_pairs(
        split_of(table, tied), W, 0.5, np.random.default_rng(4), "test"
    )
    for pairs, everything in zip(users, untied):
        odd = (everything.chosen // 8) % 2 == 1
        assert torch.equal(pairs.chosen, everything.chosen[odd])
        assert torch.equal(pairs.rejected, everything.rejected[odd])
    assert dropped == sum(int(((pairs.chosen // 8) % 2 == 0).sum()) for pairs in untied) > 0


def test_published_size_gives_47_and_9_pairs_a_user():
    module = script("train_basis")
    assert (module.K_list, module.alpha_list) == ([0, 1, 2, 3, 4, 5], [0])
    assert asdict(module.population) == dict(
        N=1000, N_unseen=500, concentration=0.1, fractions=(0.005, 0.001, 1.0), population_seed=0
    )
    assert script("vary_fewshot").population == replace(
        module.population, fractions=(0.005, 0.01, 1.0)
    )
    generator = torch.Generator().manual_seed(0)
    splits = {
        split: split_of(
            torch.randn(8 * prompts, 3, generator=generator),
            torch.randn(prompts, 8, 10, generator=generator),
        )
        for split, prompts in personalllm.FULL.items()
    }
    few_users = replace(module.population, N=40, N_unseen=20)
    study = personalllm.simulate_study(splits, few_users, "PersonalLLM", torch.ones(3, 1), {})
    for part, users, pairs in (
        ("train", 40, 47),
        ("train_unseen", 20, 9),
        ("test", 40, 1000),
        ("test_unseen", 20, 1000),
    ):
        features = study.features()[part]
        assert [len(X) for X in features] == [pairs] * users
        assert {len(set((X.chosen // 8).tolist())) for X in features} == {pairs}
    prompts = torch.cat([X.chosen // 8 for X in study.train])
    assert len(prompts.unique()) > 1500  # the users do not compare the same
    assert study.pairs_dropped == 0


def demo_study(folder):
    module = script("train_basis")
    return personalllm.load_embeddings(folder, None, module.population, module.demo_population)


def test_a_study_knows_the_texts_that_its_pairs_were_embedded_from(ran):
    study = demo_study(ran.folder)
    for part, split in zip(PARTS, ("train", "test", "train", "test")):
        rows = rows_of(ran, split)
        responses = [row[f"response_{j}"] for row in rows for j in range(1, 9)]
        for X, prompts, texts in zip(
            study.features()[part], study.prompts[part], study.texts[part], strict=True
        ):
            assert texts == [
                (responses[c], responses[r])
                for c, r in zip(X.chosen.tolist(), X.rejected.tolist(), strict=True)
            ]
            asked = [rows[c // 8]["prompt"] for c in X.chosen.tolist()]
            assert [prompt_text(prompt) for prompt in prompts] == [
                excerpt(one_line(prompt)) for prompt in asked
            ]


def test_users_share_the_texts_of_equal_pairs(ran):
    study = demo_study(ran.folder)
    texts = [pair for user in study.texts["test_unseen"] for pair in user]
    assert len({id(pair) for pair in texts}) == len(set(texts)) < len(texts) / 2


def test_embeddings_without_texts_load_and_the_report_says_that_there_are_none(
    monkeypatch, embeddings
):
    (embeddings / TEXTS).unlink(missing_ok=True)
    study = demo_study(embeddings)
    assert study.texts == {}
    assert study.prompts == {"train": [(X.chosen // 8).tolist() for X in study.train]}
    call(monkeypatch, quick(monkeypatch, script("train_basis"), **QUICK), "--dir", embeddings)
    report = (embeddings / "results" / "report.md").read_text()
    assert "The texts are not known, so there are no attributes and no examples." in report
    assert not (embeddings / "results" / "directions.png").exists()


def test_texts_of_another_run_are_named(monkeypatch, capsys, embeddings, trainer):
    arguments = ["--dir", embeddings]
    for prompts, named in (
        ({"train": TRAIN, "test": TEST}, [embeddings / TEXTS, "another run"]),
        ({"train": 1, "test": TEST}, [f"{TRAIN} prompts", TEXTS, "has 1;"]),
    ):
        others = {
            split: personalllm.Prompts(["p"] * count, [["r"] * 8] * count)
            for split, count in prompts.items()
        }
        personalllm.save_texts(embeddings / TEXTS, others)
        refused(monkeypatch, capsys, trainer, arguments, *named)


def test_a_study_has_the_population_of_the_demo_and_names_it(ran):
    module = script("train_basis")
    study = demo_study(ran.folder)
    assert study.population == module.demo_population
    assert study.seen == ran.results["users"] and study.unseen == ran.results["unseen_users"]
    assert study.title == ran.results["config"]["data"] and study.groups == {}
    assert study.provenance["demo"] and "title" not in study.provenance


@pytest.mark.parametrize(
    "changes",
    [
        {"embeddings": torch.ones(16, 4, dtype=torch.int64)},
        pytest.param(
            {"embeddings": torch.ones(16, 4, dtype=torch.complex64)}, marks=writes_complex
        ),
        {"embeddings": torch.ones(16, 4).to(torch.float8_e4m3fn)},
        {"embeddings": torch.tensor(1.0)},
        {"embeddings": torch.ones(16)},
        {"embeddings": torch.ones(16, 0)},
        {"embeddings": torch.ones(0, 4), "scores": torch.ones(0, 8, 10)},
        {"scores": torch.ones(2, 8, 10, dtype=torch.bool)},
        {"scores": torch.ones(2, 8, 10).to(torch.float8_e4m3fn)},
        {"scores": torch.tensor(1.0)},
    ],
)
def test_what_is_no_table_of_numbers_is_refused(tmp_path, changes):
    tensors = {"embeddings": torch.ones(16, 4), "scores": torch.ones(2, 8, 10)}
    for name in personalllm.FILES:
        save_file(tensors, tmp_path / name)
    personalllm.read_embeddings(tmp_path)
    save_file(tensors | changes, tmp_path / "test.safetensors")
    with input_error("test.safetensors", "--overwrite"):
        personalllm.read_embeddings(tmp_path)


# ---- The demo and its files


def test_demo_says_that_it_is_synthetic_and_rises_to_the_planted_rank(ran):
    assert "stand-in" in ran.printed["prepare"] and "synthetic" in ran.printed["prepare"]
    assert "warning" not in ran.printed["prepare"]
    assert (
        "synthetic" in ran.printed["train_basis"] and "synthetic" in ran.results["config"]["data"]
    )
    unseen = {fit["K"]: fit["mean_accuracy"][FINAL] for fit in ran.results["fits"]}
    assert list(unseen) == [0, 1, 2, 3, 4, 5]
    assert unseen[1] < unseen[2] < unseen[PLANTED_RANK] and unseen[PLANTED_RANK] > unseen[1] + 0.2


def test_files_hold_the_scores_of_the_rows_and_the_head(ran):
    for split, prompts in (("train", TRAIN), ("test", TEST)):
        tensors = load_file(ran.folder / f"{split}.safetensors")
        assert set(tensors) == {"embeddings", "scores"}
        assert tensors["embeddings"].dtype == torch.bfloat16 and tensors["embeddings"].shape == (
            8 * prompts,
            D,
        )
        assert torch.equal(
            tensors["scores"], torch.tensor(scores_of(rows_of(ran, split)), dtype=torch.float32)
        )
        with safe_open(ran.folder / f"{split}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["about"])["scorers"] == list(SCORERS)
        assert f"{split}: {prompts:,} prompts, {8 * prompts:,} responses" in ran.printed["prepare"]
    head = load_file(ran.folder / lore.embedding_files.HEAD_FILE)["reward_head"]
    assert torch.equal(head, load_file(ran.model / "model.safetensors")["score.weight"].T.float())


def test_response_j_of_prompt_i_is_row_8_i_plus_j(ran):
    model, tokenizer = lore.reward_model.load_reward_model(ran.model, device="cpu")
    for split, prompts in (("train", (0, 239)), ("test", (59,))):
        rows, table = (
            rows_of(ran, split),
            load_file(ran.folder / f"{split}.safetensors")["embeddings"].float(),
        )
        for i in prompts:
            states = torch.stack(
                [
                    state_alone(
                        model,
                        tokenizer,
                        [
                            {"role": "user", "content": rows[i]["prompt"]},
                            {"role": "assistant", "content": rows[i][f"response_{j}"]},
                        ],
                    )
                    for j in range(1, 9)
                ]
            )
            torch.testing.assert_close(table[8 * i : 8 * i + 8], states, rtol=0.01, atol=0.02)
            assert torch.cdist(states, table).argmin(1).tolist() == list(range(8 * i, 8 * i + 8))


def test_closing_table_and_results_name_what_was_set_and_every_user(ran):
    results, fits = ran.results, ran.results["fits"]
    for leaks in results["leaks"].values():
        assert leaks["by_answer_in_prompt"] == 0  # a prompt has one turn
    assert results["users"] == [f"seen_{i}" for i in range(N)]
    assert results["unseen_users"] == [f"unseen_{i}" for i in range(N_UNSEEN)]
    pairs = {
        "train pairs": 24 * N,
        "test pairs": 60 * N,
        "train unseen pairs": 12 * N_UNSEEN,
        "test unseen pairs": 60 * N_UNSEEN,
    }
    assert results["counts"] == {
        "seen users": N,
        "unseen users": N_UNSEEN,
        **pairs,
        "validation pairs": 0,
        "pairs with equal sides": 0,
        "d": D,
    }
    expected = {
        "K_list": [0, 1, 2, 3, 4, 5],
        "alpha_list": [0],
        "seeds": [0, 1, 2],
        "population_seed": 0,
        "concentration": 0.1,
        "fractions": [0.1, 0.05, 1.0],
        "pairs_dropped": 0,
        "N": N,
        "N_unseen": N_UNSEEN,
    }
    assert {name: results["config"][name] for name in expected} == expected
    lines = ran.printed["train_basis"].splitlines()
    assert [line for line in lines if line.startswith("K : ")] == [f"K : {K}" for K in range(6)]
    table = closing_table(ran.printed["train_basis"])
    for fit in fits:
        of_seeds = [other["mean_accuracy"] for other in fits if other["K"] == fit["K"]]
        means = [
            np.mean([of_seed[setting] for of_seed in of_seeds]) for setting in fit["mean_accuracy"]
        ]
        assert table["ref" if fit["K"] == 0 else str(fit["K"])] == pytest.approx(means, abs=5.1e-4)
        for setting, of_user in fit["accuracy_of_user"].items():
            seen = "Seen" in setting or setting.startswith("Train")
            assert list(of_user) == results["users" if seen else "unseen_users"]
            assert np.mean(list(of_user.values())) == pytest.approx(fit["mean_accuracy"][setting])


def test_bases_have_a_column_a_rank_and_weights_that_sum_to_one(ran):
    for K in range(6):
        tensors, columns = load_file(ran.folder / "results" / f"K_{K}.safetensors"), max(K, 1)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            "V": (D, columns),
            "W": (N, columns),
            "W_unseen": (N_UNSEEN, columns),
        }
        for name in ("W", "W_unseen"):
            torch.testing.assert_close(tensors[name].sum(1), torch.ones(len(tensors[name])))
    head = load_file(ran.folder / lore.embedding_files.HEAD_FILE)["reward_head"]
    assert torch.equal(load_file(ran.folder / "results" / "K_0.safetensors")["V"], head)
    with safe_open(ran.folder / "results" / "K_3.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
    assert (
        about["identity"]["reward_head"]
        == hashlib.sha256(json.dumps(head.tolist()).encode()).hexdigest()
    )
    assert about["config"]["N"] == N and "synthetic" in about["config"]["data"]


def test_population_is_the_dirichlet_draw_of_its_seed(monkeypatch, ran, embeddings, trainer):
    path = ran.folder / "results" / "population.safetensors"
    for number, (name, users) in enumerate((("seen", N), ("unseen", N_UNSEEN))):
        mixtures = np.random.default_rng([0, number]).dirichlet(np.full(10, 0.1), users)
        np.testing.assert_allclose(load_file(path)[name].numpy(), mixtures, rtol=0, atol=1e-7)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["scorers"] == list(SCORERS) and about["users"] == [f"seen_{i}" for i in range(N)]
    assert about["unseen_users"] == [f"unseen_{i}" for i in range(N_UNSEEN)]
    other_seed = replace(trainer.demo_population, population_seed=1)
    call(monkeypatch, quick(monkeypatch, trainer, demo_population=other_seed), "--dir", embeddings)
    other = load_file(embeddings / "results" / "population.safetensors")["seen"]
    assert (other - load_file(path)["seen"]).abs().sum(1).min() > 1e-3


def test_accuracies_agree_with_the_saved_tensors_and_the_rows(ran):
    rows, table = (
        rows_of(ran, "test"),
        load_file(ran.folder / "test.safetensors")["embeddings"].double(),
    )
    population = load_file(ran.folder / "results" / "population.safetensors")
    pairs = {
        name: [loop_over_responses(rows, w) for w in population[name][:5]] for name in population
    }
    for fit in ran.results["fits"]:
        tensors = load_file(ran.folder / "results" / fit["file"])
        for name, weights, setting in (("seen", "W", SEEN_TEST), ("unseen", "W_unseen", FINAL)):
            rewards = (
                table @ tensors["V"].double() @ tensors[weights].double().T
            ).numpy()  # (rows, users)
            expected = [
                np.mean(rewards[best, i] > rewards[worst, i])
                for i, (best, worst) in enumerate(pairs[name])
            ]
            found = [fit["accuracy_of_user"][setting][f"{name}_{i}"] for i in range(len(expected))]
            assert found == pytest.approx(
                expected, abs=0.02
            )  # float32 may turn one margin near 0 of 60


def test_two_processes_give_the_same_embeddings(ran, tmp_path):
    first, second = two_processes(
        SCRIPTS, "prepare", "--data", ran.data, "--model", ran.model, "--dir", tmp_path
    )
    assert "next: " in first and second == ""
    for name in FILES:
        assert plain(load_file(tmp_path / name)) == plain(load_file(ran.folder / name))


def test_vary_fewshot_writes_curves_as_far_as_the_users_go(monkeypatch, capsys, embeddings):
    module = quick(
        monkeypatch,
        script("vary_fewshot"),
        num_shots=[1, 30, 80],
        K_list=[PLANTED_RANK],
        trials=3,
        num_iterations=300,
    )
    call(monkeypatch, module, "--dir", embeddings)
    found = json.loads((embeddings / "results" / "vary_fewshot.json").read_text())
    (curve,) = found["curves"]
    assert (
        curve["unseen_mean"][1] > curve["unseen_mean"][0] + 0.02 and curve["unseen_std"][0] > 1e-3
    )
    assert found["shots_of_the_mean_user"] == [1, 30, 60] and found["config"]["num_shots"] == [
        1,
        30,
        80,
    ]
    assert (embeddings / "results" / "vary_fewshot.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "Shots : 30\n" in out and "has more than 60 pairs" in out


# ---- prepare.py


def test_a_file_lost_after_an_interruption_is_written_again_from_the_cache(
    monkeypatch, capsys, ran, embeddings
):
    expected = content_of(embeddings)
    call(monkeypatch, script("prepare"), "--demo", "--dir", embeddings)
    assert (
        "finished already" in capsys.readouterr().out
        and not (embeddings / ".embedding_cache").exists()
    )
    shutil.copytree(ran.folder / ".embedding_cache", embeddings / ".embedding_cache")
    (embeddings / "test.safetensors").unlink()
    without_forward(monkeypatch)
    call(monkeypatch, script("prepare"), "--demo", "--dir", embeddings)
    assert expected.items() <= content_of(embeddings).items()


def test_ctrl_c_in_the_embedding_says_that_a_second_run_resumes(monkeypatch, capsys, ran, tmp_path):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lore.scripts, "embed_distinct", stop)
    data = data_of(tmp_path / "data", ran, 2)
    arguments = ["--data", data, "--model", ran.model, "--dir", tmp_path]
    interrupted(monkeypatch, capsys, script("prepare"), *arguments)


def test_every_kind_of_file_and_a_split_named_validation_give_the_same(monkeypatch, ran, tmp_path):
    """JSON lines, CSV, both packed too, parquet, shards; --limit takes the first prompts."""
    for kind in ("csv", "hub", "gz"):
        (tmp_path / kind).mkdir()
    data_of(tmp_path / "plain", ran, 6)
    for split, name in (("train", "train"), ("test", "validation")):
        frame = pd.DataFrame(rows_of(ran, split)[:4])
        frame.to_csv(
            tmp_path / "csv" / (f"{name}.csv.gz" if split == "train" else f"{name}.csv"),
            index=False,
        )
        for shard in (0, 1):
            frame[2 * shard : 2 * shard + 2].to_parquet(
                tmp_path / "hub" / f"{name}-0000{shard}-of-00002.parquet"
            )
        (tmp_path / "gz" / f"{name}.jsonl.gz").write_bytes(
            gzip.compress((tmp_path / "plain" / f"{split}.jsonl").read_bytes())
        )
    for kind in ("plain", "csv", "hub", "gz"):
        prepare(monkeypatch, tmp_path / kind, ran.model, tmp_path / f"{kind}.out", "--limit", 4)
    for name in FILES:
        first, *others = (
            plain(load_file(tmp_path / f"{kind}.out" / name))
            for kind in ("plain", "csv", "hub", "gz")
        )
        assert others == [first] * 3
        assert first["scores"] == plain(load_file(ran.folder / name)["scores"][:4])
        assert len(first["embeddings"][1]) == 32


def test_a_hub_of_another_size_is_warned_about_and_its_rows_are_named(
    monkeypatch, capsys, ran, tmp_path
):
    splits = {split: rows_of(ran, split)[:2] for split in ("train", "test")}
    serve_hub(monkeypatch, **splits)
    call(monkeypatch, script("prepare"), "--model", ran.model, "--dir", tmp_path)
    out = capsys.readouterr().out
    assert "warning: the full train split has 9,402 prompts" in out
    assert "warning: the full test split has 1,000 prompts" in out
    with safe_open(tmp_path / lore.embedding_files.HEAD_FILE, "pt") as file:
        assert json.loads(file.metadata()["about"])["data"] == personalllm.DATASET
    for split in splits:
        serve_hub(
            monkeypatch,
            **{**splits, split: [splits[split][0], {**splits[split][1], "prompt": None}]},
        )
        refused(
            monkeypatch,
            capsys,
            script("prepare"),
            ["--model", ran.model, "--dir", tmp_path],
            f"{personalllm.DATASET}, {split}, row 2: prompt",
        )


def test_two_equal_responses_are_counted_and_warned_about(monkeypatch, capsys, ran, tmp_path):
    data = data_of(tmp_path / "data", ran, 4)
    rows = rows_of(ran, "test")[:4]
    rows[1]["response_7"] = rows[1]["response_2"]
    rows[2]["response_1"], rows[3]["prompt"] = " ", ""
    write_rows(data / "test.jsonl", rows)
    prepare(monkeypatch, data, ran.model, tmp_path)
    train, test = capsys.readouterr().out.split("test: ", 1)
    assert "equal" not in train and "1 of 32" in test and "warning" in test
    assert "blank" not in train
    assert "prompts of test: 1 is blank" in test and "responses of test: 1 is blank" in test


def test_what_is_odd_in_prompts_and_responses_is_said_once_and_kept(
    monkeypatch, capsys, ran, tmp_path
):
    data = data_of(tmp_path / "data", ran, 4)
    train, test = (rows_of(ran, split)[:4] for split in ("train", "test"))
    train[1]["prompt"] = f" {train[0]['prompt']}\u00a0"
    test[2]["prompt"] = train[3]["prompt"] + "\n"
    test[0]["response_1"] = test[0]["response_5"] + " "
    test[1]["response_2"] = "['Yes.', 'No.']"
    write_rows(data / "train.jsonl", train)
    write_rows(data / "test.jsonl", test)
    prepare(monkeypatch, data, ran.model, tmp_path)
    notes = [
        "prompts of train that repeat an earlier one word for word: 1",
        "test: 1 answer looks the same as another one to the same prompt: only white space "
        "differs, or how Unicode writes it",
        "responses of test: 1 is a list or object printed as text, and is taken as a text",
        "1 of 4 prompts of test are also in train: they test nothing new",
    ]
    block = "odd in these data:\n" + "".join(f"  - {note}\n" for note in notes)
    assert capsys.readouterr().out.count(block) == 1
    _, provenance = lore.files.load_tensors(tmp_path / lore.embedding_files.HEAD_FILE)
    assert provenance["data_notes"] == notes


def test_a_column_that_is_not_needed_may_hold_what_python_cannot(tmp_path, ran):
    for split in ("train", "test"):
        table = pa.Table.from_pylist(rows_of(ran, split)[:4])
        late = pa.array([2**60] * 4, pa.timestamp("us"))
        pq.write_table(table.append_column("scored_at", late), tmp_path / f"{split}.parquet")
    splits = personalllm.read_prompts(tmp_path)
    prompts = {split: personalllm.parse(rows).prompts for split, rows in splits.items()}
    assert prompts == {
        split: [row["prompt"] for row in rows_of(ran, split)[:4]] for split in ("train", "test")
    }


def test_other_embeddings_are_replaced_only_with_overwrite(monkeypatch, capsys, ran, embeddings):
    before = content_of(embeddings)
    options = ["--data", ran.data, "--model", ran.model, "--dir", embeddings, "--limit", 3]
    refused(monkeypatch, capsys, script("prepare"), options, "train.safetensors", "--overwrite")
    assert content_of(embeddings) == before
    call(monkeypatch, script("prepare"), *options, "--overwrite")
    assert load_file(embeddings / "train.safetensors")["scores"].shape == (3, 8, 10)
    refused(monkeypatch, capsys, script("prepare"), options[:-2], "--overwrite")
    (
        embeddings / lore.embedding_files.HEAD_FILE
    ).unlink()  # files of the released script come without
    refused(monkeypatch, capsys, script("prepare"), options, "--overwrite")


@pytest.mark.parametrize(
    "column, value",
    [
        ("response_4_beaver_7b", ...),
        ("response_4_beaver_7b", None),
        ("response_1_gemma_2b", "high"),
        ("response_1_gemma_2b", True),
        ("response_8_mistral_ray", float("nan")),
        ("response_8_mistral_ray", float("-inf")),
        ("response_8_mistral_ray", 1e300),
        ("response_5_gemma_7b", [1.0]),
        ("response_3", None),
        ("response_8", ...),
        ("response_8", 3),
        ("prompt", None),
        ("prompt", ...),
    ],
)
def test_a_spoilt_row_is_named_and_nothing_is_lost(
    monkeypatch, capsys, ran, embeddings, tmp_path, column, value
):
    data = data_of(tmp_path / "data", ran, 6)
    rows = rows_in(data / "test.jsonl")
    rows[2][column] = value
    if value is ...:
        del rows[2][column]
    write_rows(data / "test.jsonl", rows)
    before = content_of(embeddings)
    refused(
        monkeypatch,
        capsys,
        script("prepare"),
        ["--data", data, "--model", ran.model, "--dir", embeddings, "--overwrite"],
        f"test.jsonl, row 3: {column}: ",
    )
    assert content_of(embeddings) == before


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "row 6"),
        (lambda path: path.write_text("<html>429 Too Many Requests</html>"), "row 1"),
        (lambda path: path.write_text("[1, 2]\n"), "row 1"),
        (lambda path: path.unlink(), "test.jsonl"),
        (lambda path: path.write_text(""), "no row in it"),
        (lambda path: shutil.copy(path, path.with_name("train-2.jsonl")), "train-2.jsonl"),
        (
            lambda path: (
                shutil.move(path, path.with_name("train_latest.jsonl"))
                and path.with_name("test.jsonl").unlink()
            ),
            "train_latest.jsonl",
        ),
    ],
)
def test_damaged_data_are_named(monkeypatch, capsys, ran, tmp_path, spoil, named):
    data = data_of(tmp_path / "data", ran, 6)
    spoil(data / "train.jsonl")
    refused(
        monkeypatch,
        capsys,
        script("prepare"),
        ["--data", data, "--model", ran.model, "--dir", tmp_path / "out"],
        "train",
        named,
    )
    assert not content_of(tmp_path / "out")


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


def test_a_demo_on_a_full_disk_is_one_line(tmp_path):
    status, _, err = start(
        SCRIPTS, "prepare", "--demo", "--dir", tmp_path / "out", largest_file=200_000
    ).outcome()
    assert status == 2 and [line.startswith("error: ") for line in err.splitlines()] == [True]
    assert not list(tmp_path.glob("out/*.safetensors"))


# ---- train_basis.py: files of the released kind and of earlier versions


@pytest.fixture
def released(monkeypatch, ran, embeddings, trainer):
    """Embeddings alone, in files without metadata, and the demo's sizes, which they do not name."""
    for name in FILES:
        save_file({"embeddings": load_file(embeddings / name)["embeddings"]}, embeddings / name)
    (embeddings / lore.embedding_files.HEAD_FILE).unlink()
    quick(
        monkeypatch,
        trainer,
        MODEL_NAME=str(ran.model),
        population=trainer.demo_population,
    )
    return embeddings


def test_released_files_read_their_scores_from_the_data_set(monkeypatch, ran, released, trainer):
    call(monkeypatch, trainer, "--dir", released, "--data", ran.data)
    fits = results_in(released)["fits"]
    assert fits[0]["accuracy_of_user"] == ran.results["fits"][0]["accuracy_of_user"]
    (released / "results" / "results.json").unlink()
    serve_hub(monkeypatch, train=rows_of(ran, "train"), test=rows_of(ran, "test"))
    call(monkeypatch, trainer, "--dir", released)
    assert results_in(released)["fits"] == fits


def test_released_files_of_another_data_set_are_named(
    monkeypatch, capsys, ran, released, trainer, tmp_path
):
    for split, prompts in (("train", TRAIN), ("test", TEST - 1)):
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows_of(ran, split)[:prompts])
    before = content_of(released)
    refused(
        monkeypatch,
        capsys,
        trainer,
        ["--dir", released, "--data", tmp_path / "data"],
        released / "test.safetensors",
        "(480, 64)",
        "(59, 8, 10)",
    )
    refused(
        monkeypatch, capsys, trainer, ["--dir", released, "--data", tmp_path / "nowhere"], "nowhere"
    )
    serve_hub(monkeypatch)
    refused(monkeypatch, capsys, trainer, ["--dir", released], personalllm.DATASET, "--data")
    assert content_of(released) == before


def test_files_of_the_versions_before_load(monkeypatch, tmp_path, trainer):
    generator = torch.Generator().manual_seed(0)
    for name in FILES:
        save_file(
            {
                "embeddings": torch.randn(160, 4, generator=generator).bfloat16(),
                "scores": torch.randn(20, 8, 10, generator=generator),
            },
            tmp_path / name,
            {"about": json.dumps({"scorers": SCORERS})},
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
        "demo": True,
        "files": {
            name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in FILES
        },
    }
    save_file(
        {"reward_head": torch.ones(4, 1)},
        tmp_path / lore.embedding_files.HEAD_FILE,
        {"about": json.dumps(about)},
    )
    call(monkeypatch, trainer, "--dir", tmp_path)
    results = results_in(tmp_path)
    assert (
        results["config"]["data"] == "PersonalLLM (d)" and results["identity"] == about["identity"]
    )
    assert (
        results["counts"]["train pairs"] == 2 * N and results["config"]["N"] == N
    )  # the demo's users


# ---- train_basis.py: what it refuses and drops


def spoil(folder, name, change):
    """Apply `change` to the dict of tensors in a file; what the file says of itself stays."""
    tensors, about = lore.files.load_tensors(folder / name)
    change(tensors)
    lore.files.save_tensors(folder / name, tensors, **about)
    if name != lore.embedding_files.HEAD_FILE:
        sign_again(folder)


@pytest.mark.parametrize(
    "name, change, named",
    [
        (
            "train",
            lambda t: t.update(embeddings=t["embeddings"][:-8]),
            ["(1912, 64)", "(240, 8, 10)"],
        ),
        ("test", lambda t: t.update(embeddings=t["embeddings"][1:]), ["(479, 64)", "(60, 8, 10)"]),
        ("train", lambda t: t.update(scores=t["scores"][:, :7]), ["(240, 7, 10)"]),
        ("train", lambda t: t.update(scores=t["scores"][:, :, :9]), ["(240, 8, 9)"]),
        ("test", lambda t: t["embeddings"][13, 5:6].fill_(float("nan")), ["NaN"]),
        ("train", lambda t: t["embeddings"][1919, :1].fill_(float("-inf")), ["infinite"]),
        ("test", lambda t: t["scores"][3, 2, 1:2].fill_(float("nan")), ["NaN"]),
        ("test", lambda t: t.pop("embeddings"), ["embeddings of shape (0,)"]),
        (
            "test",
            lambda t: t.update(embeddings=t["embeddings"][:, :32]),
            ["d = 32", "d = 64", "train.safetensors"],
        ),
    ],
)
def test_spoilt_embeddings_are_named_and_nothing_written(
    monkeypatch, capsys, embeddings, trainer, name, change, named
):
    spoil(embeddings, f"{name}.safetensors", change)
    before = content_of(embeddings)
    refused(
        monkeypatch,
        capsys,
        trainer,
        ["--dir", embeddings],
        embeddings / f"{name}.safetensors",
        *named,
    )
    assert content_of(embeddings) == before


def test_embeddings_of_another_run_and_heads_of_another_width_or_with_nan_are_named(
    monkeypatch, capsys, embeddings, trainer
):
    path, head = embeddings / "test.safetensors", embeddings / lore.embedding_files.HEAD_FILE
    whole = head.read_bytes()
    for change, named in (
        (lambda t: t.update(reward_head=t["reward_head"][:32]), ["(32, 1)", "d = 64"]),
        (lambda t: t["reward_head"][5].fill_(float("nan")), [lore.embedding_files.HEAD_FILE]),
    ):
        spoil(embeddings, lore.embedding_files.HEAD_FILE, change)
        refused(monkeypatch, capsys, trainer, ["--dir", embeddings], "reward head", *named)
        head.write_bytes(whole)
    tensors, about = lore.files.load_tensors(path)
    lore.files.save_tensors(path, {**tensors, "embeddings": tensors["embeddings"] + 1}, **about)
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path, "another run")


@pytest.mark.parametrize("name", [*FILES, lore.embedding_files.HEAD_FILE])
def test_truncated_and_missing_files_are_named(monkeypatch, capsys, embeddings, trainer, name):
    path = embeddings / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path, "write it again")
    assert path.read_bytes() == content[: len(content) // 2]
    path.unlink()
    if name != lore.embedding_files.HEAD_FILE:  # without it the head is read from the checkpoint
        refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path, "prepare.py")
    assert not (embeddings / "results").exists()


@pytest.mark.parametrize(
    "name, constant, changes, named",
    [
        ("train_basis", "demo_population", {"fractions": (0.0, 0.05, 1.0)}, "fractions: "),
        ("train_basis", "population", {"fractions": (0.1, 0.05, 1.1)}, "fractions: 1.1"),
        ("train_basis", "population", {"fractions": 0.1}, "fractions"),
        ("train_basis", "population", {"fractions": (0.1, 0.05)}, "fractions"),
        ("train_basis", "demo_population", {"N": 0}, "N: 0"),
        ("train_basis", "population", {"N": 2.5}, "N: 2.5"),
        ("train_basis", "demo_population", {"N_unseen": 0}, "N_unseen: 0"),
        ("train_basis", "demo_population", {"N": True}, "N: True"),
        ("train_basis", "population", {"concentration": 0}, "concentration: 0"),
        ("train_basis", "population", {"concentration": [0.1] * 10}, "concentration"),
        ("train_basis", "population", {"population_seed": -1}, "seed: -1"),
        ("train_basis", "population", {"population_seed": 2**32}, "seed: 4294967296"),
        ("train_basis", "K_list", [], "K_list"),
        ("train_basis", "num_iterations", -5, "num_iterations"),
        ("train_basis", "alpha_list", [None], "alpha_list"),
        ("train_basis", "validation_share", 0.95, "validation_share: 0.95"),
        ("vary_fewshot", "demo_population", {"fractions": (0.1, -1, 1.0)}, "fractions: -1"),
        ("vary_fewshot", "demo_population", {"N": 0}, "N: 0"),
        ("vary_fewshot", "num_shots", [0], "num_shots"),
        ("vary_fewshot", "trials", 1.5, "trials"),
        ("vary_fewshot", "num_questions", 0, "num_questions: 0"),
        ("vary_fewshot", "question_seeds", [0, 0], "question_seeds"),
    ],
)
def test_an_unusable_constant_is_named_before_any_data_are_read(
    monkeypatch, capsys, tmp_path, name, constant, changes, named
):
    module = script(name)
    value = changes
    if "population" in constant:
        value = replace(getattr(module, constant), **changes)
    quick(monkeypatch, module, **{constant: value})
    refused(monkeypatch, capsys, module, ["--dir", tmp_path / "out"], named)
    assert not content_of(tmp_path)


def test_a_fraction_that_leaves_no_pairs_of_these_prompts_is_named(
    monkeypatch, capsys, embeddings, trainer
):
    too_few = replace(trainer.demo_population, fractions=(0.004, 0.05, 1.0))
    quick(monkeypatch, trainer, demo_population=too_few)
    before = content_of(embeddings)
    expected = ["train: fraction 0.004", "240 prompts", "no pairs"]
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], *expected)
    assert content_of(embeddings) == before


def tie(prompts):
    """A change of a file's tensors: all responses to these prompts have the scores of the first."""

    def change(tensors):
        tensors["scores"][prompts] = tensors["scores"][prompts, :1].expand(-1, 8, -1)

    return change


def test_tied_prompts_are_dropped_and_counted(monkeypatch, capsys, ran, embeddings, trainer):
    spoil(embeddings, "test.safetensors", tie([5, 17]))
    call(monkeypatch, trainer, "--dir", embeddings)
    assert f"{2 * (N + N_UNSEEN)} pairs dropped, all responses tied" in capsys.readouterr().out
    results = results_in(embeddings)
    assert results["config"]["pairs_dropped"] == 2 * (N + N_UNSEEN)
    reward = (
        load_file(embeddings / "test.safetensors")["embeddings"].double()
        @ load_file(embeddings / lore.embedding_files.HEAD_FILE)["reward_head"].double()[:, 0]
    )
    rows = rows_of(ran, "test")
    for i, w in enumerate(
        load_file(embeddings / "results" / "population.safetensors")["unseen"][:5]
    ):
        right = [
            float(reward[best] > reward[worst])
            for place, (best, worst) in enumerate(zip(*loop_over_responses(rows, w)))
            if place not in (5, 17)
        ]
        found = results["fits"][0]["accuracy_of_user"][FINAL][f"unseen_{i}"]
        assert found == pytest.approx(np.mean(right), abs=0.02)
        assert found * 58 == pytest.approx(round(found * 58), abs=1e-4)  # of 58 pairs, not of 60


@pytest.mark.parametrize("name", FILES)
def test_all_prompts_tied_is_an_error_that_says_so(monkeypatch, capsys, embeddings, trainer, name):
    spoil(embeddings, name, tie(slice(None)))
    before = content_of(embeddings)
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], "tied", "user 0")
    assert content_of(embeddings) == before
