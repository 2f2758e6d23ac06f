"""The PersonalLLM scripts as a user runs them: eight responses a prompt, simulated users, interruptions, every slip."""

import contextlib
import functools
import io
import json
import multiprocessing
import random
import shutil
import sys
import time
import types

import numpy as np
import pytest
import torch
from helpers import ROOT, call, fresh_process, load_script, outcome, refused, sign_again
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from standin import PLANTED_RANK

import utils

SCRIPTS = ROOT / "PersonalLLM"
SCORERS = ("gemma_2b", "gemma_7b", "mistral_raft", "llama3_sfairx", "oasst_deberta_v3", "beaver_7b", "oasst_pythia_7b",
           "oasst_pythia_1b", "mistral_ray", "mistral_weqweasdas")
D, TRAIN, TEST = 64, 240, 60  # width of the stand-in model, prompts of the demo
N, N_UNSEEN = 60, 30  # users of the demo
SEEN_TEST, UNSEEN = "Seen User Unseen Prompts", "Unseen User Unseen Prompts"
RUN_MAIN = ("import sys; sys.path.insert(0, {0!r}); sys.argv = ['script.py', *{1!r}]; import {2} as script; {3}; "
            "script.run_script(script.main)")

script = functools.partial(load_script, "PersonalLLM")


def read_rows(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores_of(rows):
    """The scores in the rows of a file, column by column: nested lists `[prompts][8][10]`."""
    return [[[row[f"response_{j}_{scorer}"] for scorer in SCORERS] for j in range(1, 9)] for row in rows]


def content_of(folder):
    """What stands in a folder, below it too: path -> bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def results_in(folder):
    return json.loads((folder / "results" / "results.json").read_text())


@pytest.fixture(scope="module")
def forks():
    """Starts processes that have the libraries already, so that a run to be killed takes a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "transformers", "safetensors"])
    multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def demo(forks, tmp_path_factory):
    """A folder beside which prepare.py --demo and train_basis.py ran: (folder, script -> what it printed)."""
    folder, printed = tmp_path_factory.mktemp("demo") / "PersonalLLM", {}
    with pytest.MonkeyPatch.context() as patch:
        for name, arguments in (("prepare", ["--demo"]), ("train_basis", [])):
            module = script(name)
            patch.setattr(module, "HERE", folder)  # where the script reads and writes, unless told with --dir
            with contextlib.redirect_stdout(io.StringIO()) as out:
                call(patch, module, *arguments)
            printed[name] = out.getvalue()
    return folder, printed


@pytest.fixture(scope="module")
def sources(demo):
    """The folder of the demo's corpus (`PersonalLLM`) and stand-in model (`model`)."""
    return demo[0] / ".standin"


@pytest.fixture(scope="module")
def backbone(sources):
    """The stand-in model and its tokenizer as transformers loads them."""
    from transformers import AutoModel, AutoTokenizer
    return AutoModel.from_pretrained(sources / "model").eval(), AutoTokenizer.from_pretrained(sources / "model")


@pytest.fixture
def embeddings(demo, tmp_path):
    """A folder with the demo's embeddings, scores and head, to be spoilt."""
    folder = tmp_path / "embeddings"
    folder.mkdir()
    for name in (*utils.PERSONALLLM_FILES, utils.HEAD_FILE):
        shutil.copy(demo[0] / name, folder)
    return folder


@pytest.fixture
def trainer(monkeypatch):
    """The training script with the reference model only, which takes no training."""
    module = script("train_basis")
    monkeypatch.setattr(module, "K_list", [0])
    return module


def set_constants(monkeypatch, module, **constants):
    for name, value in constants.items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)


def alone(backbone, prompt, response):
    """The last token's state of one conversation, computed alone."""
    model, tokenizer = backbone
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt},
                                          {"role": "assistant", "content": response}], tokenize=False)
    with torch.no_grad():
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return model(input_ids=ids).last_hidden_state[0, -1]


# ---- Row numbers and dense matrices ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(demo):
    """Twenty of the demo's test prompts and six users: (rows, embeddings, scores, mixtures)."""
    tables = load_file(demo[0] / "test.safetensors")
    rows = read_rows(demo[0] / ".standin" / "PersonalLLM", "test")[:20]
    W = torch.from_numpy(np.random.default_rng(3).dirichlet([0.3] * 10, 6)).float()
    return rows, tables["embeddings"][:160], tables["scores"][:20], W


def loop_over_responses(rows, w):
    """Row numbers of the best and the worst response to each prompt, by a plain loop in float64."""
    best, worst = [], []
    for i, responses in enumerate(scores_of(rows)):
        scores = [sum(share * score for share, score in zip(w.tolist(), of_response)) for of_response in responses]
        best.append(8 * i + scores.index(max(scores)))
        worst.append(8 * i + scores.index(min(scores)))
    return best, worst


def test_indexed_pairs_are_the_dense_ones_and_those_of_a_plain_loop(small):
    rows, table, scores, W = small
    users, dropped = utils.simulate_pairs(table, scores, W, 1.0, np.random.default_rng(0))
    assert dropped == 0 and len(users) == len(W)
    for w, pairs in zip(W, users):
        best, worst = loop_over_responses(rows, w)
        assert (pairs.chosen.tolist(), pairs.rejected.tolist()) == (best, worst)
        assert torch.equal(pairs.dense(), utils.simulate_user(scores, table.reshape(20, 8, D), w))
        expected = [[a - b for a, b in zip(table[c].tolist(), table[r].tolist())] for c, r in zip(best, worst)]
        torch.testing.assert_close(pairs.dense().double(), torch.tensor(expected, dtype=torch.float64), rtol=0,
                                   atol=1e-6)


def test_a_fraction_of_the_prompts_is_drawn_anew_for_each_user(small):
    rows, table, scores, W = small
    users, _ = utils.simulate_pairs(table, scores, W, 0.47, np.random.default_rng(0))
    drawn = []
    for w, pairs in zip(W, users):
        prompts = (pairs.chosen // 8).tolist()
        assert len(set(prompts)) == len(prompts) == 9  # of 9.4
        best, worst = loop_over_responses(rows, w)
        assert pairs.chosen.tolist() == [best[i] for i in prompts]
        assert pairs.rejected.tolist() == [worst[i] for i in prompts]
        drawn.append(frozenset(prompts))
    assert len(set(drawn)) == len(W)


def test_accuracy_through_row_numbers_is_that_of_the_dense_matrices(small):
    _, table, scores, W = small
    generator = torch.Generator().manual_seed(0)
    V, w = torch.randn(D, 3, generator=generator), torch.rand(6, 3, generator=generator).softmax(1)
    users, _ = utils.simulate_pairs(table, scores, W, 1.0, np.random.default_rng(0))
    dense = utils.simulate_population(scores, table.reshape(20, 8, D), W)
    reward = table.double() @ V.double() @ w.double().T  # (rows, users)
    accuracies = [np.mean([float(reward[c, i]) > float(reward[r, i]) for c, r in zip(pairs.chosen, pairs.rejected)])
                  for i, pairs in enumerate(users)]
    assert len(set(accuracies)) > 1
    assert [utils.evaluate_model(pairs, V, w[i]) for i, pairs in enumerate(users)] == pytest.approx(accuracies)
    assert [utils.evaluate_model(X, V, w[i]) for i, X in enumerate(dense)] == pytest.approx(accuracies)


# ---- prepare.py: the files ------------------------------------------------------------------------------------------


def test_demo_says_that_it_is_synthetic(demo):
    folder, printed = demo
    assert "stand-in" in printed["prepare"] and "synthetic" in printed["prepare"]
    assert "warning" not in printed["prepare"]
    assert "synthetic" in printed["train_basis"] and "synthetic" in results_in(folder)["config"]["data"]


def test_files_hold_an_embedding_a_response_and_the_scores_of_the_rows(demo, sources):
    folder, printed = demo
    for split, prompts in (("train", TRAIN), ("test", TEST)):
        tensors = load_file(folder / f"{split}.safetensors")
        assert set(tensors) == {"embeddings", "scores"}
        assert tensors["embeddings"].dtype == torch.bfloat16 and tensors["embeddings"].shape == (8 * prompts, D)
        rows = read_rows(sources / "PersonalLLM", split)
        assert torch.equal(tensors["scores"], torch.tensor(scores_of(rows), dtype=torch.float32))
        assert tensors["scores"].shape == (prompts, 8, 10)
        with safe_open(folder / f"{split}.safetensors", "pt") as file:
            assert json.loads(file.metadata()["about"])["scorers"] == list(SCORERS)
        assert f"{split}: {prompts:,} prompts, {8 * prompts:,} responses" in printed["prepare"]
    head = load_file(folder / utils.HEAD_FILE)["reward_head"]
    checkpoint = load_file(sources / "model" / "model.safetensors")
    assert torch.equal(head, checkpoint["score.weight"].T.float())


def test_response_j_of_prompt_i_is_row_8_i_plus_j(demo, sources, backbone):
    for split, prompts in (("train", (0, 101, 239)), ("test", (0, 59))):
        rows = read_rows(sources / "PersonalLLM", split)
        table = load_file(demo[0] / f"{split}.safetensors")["embeddings"]
        for i in prompts:
            states = torch.stack([alone(backbone, rows[i]["prompt"], rows[i][f"response_{j}"]) for j in range(1, 9)])
            cosines = torch.nn.functional.cosine_similarity(states[:, None], table.float()[None], dim=2)  # (8, rows)
            assert cosines.argmax(1).tolist() == list(range(8 * i, 8 * i + 8))
            assert float(cosines.max(1).values.min()) >= 0.999


def test_finished_embeddings_are_recognised(monkeypatch, capsys, embeddings, sources):
    before = content_of(embeddings)
    call(monkeypatch, script("prepare"), "--demo", "--dir", embeddings)
    assert "finished already" in capsys.readouterr().out
    after = content_of(embeddings)
    assert {path: after[path] for path in before} == before
    assert not (embeddings / ".embedding_cache").exists()


def test_file_lost_after_an_interruption_is_written_again_from_the_cache(monkeypatch, demo, embeddings, sources):
    expected = content_of(embeddings)
    shutil.copytree(demo[0] / ".embedding_cache", embeddings / ".embedding_cache")
    monkeypatch.setattr(utils, "_forward", None)  # no conversation is embedded again
    (embeddings / "test.safetensors").unlink()
    call(monkeypatch, script("prepare"), "--demo", "--dir", embeddings)
    after = content_of(embeddings)
    assert {path: after[path] for path in expected} == expected


def test_limit_takes_the_first_prompts_of_each_split(monkeypatch, demo, sources, tmp_path):
    call(monkeypatch, script("prepare"), "--data", sources / "PersonalLLM", "--model", sources / "model", "--dir",
         tmp_path, "--limit", 5)
    for name in utils.PERSONALLLM_FILES:
        first, everything = load_file(tmp_path / name), load_file(demo[0] / name)
        assert torch.equal(first["scores"], everything["scores"][:5])
        assert first["embeddings"].shape == (40, D)
        torch.testing.assert_close(first["embeddings"], everything["embeddings"][:40], rtol=0.01, atol=0.01)


def test_parquet_and_a_split_named_validation_give_the_same_files(monkeypatch, sources, tmp_path):
    import pyarrow
    import pyarrow.parquet
    for split, name in (("train", "train-0"), ("test", "validation-0")):
        rows = read_rows(sources / "PersonalLLM", split)[:4]
        write_rows(tmp_path / "plain" / f"{split}.jsonl", rows)
        (tmp_path / "parquet").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet" / f"{name}.parquet")
    for kind in ("plain", "parquet"):
        call(monkeypatch, script("prepare"), "--data", tmp_path / kind, "--model", sources / "model", "--dir",
             tmp_path / f"{kind}.out")
    for name in utils.PERSONALLLM_FILES:
        assert (tmp_path / "plain.out" / name).read_bytes() == (tmp_path / "parquet.out" / name).read_bytes()


def hub(monkeypatch, splits):
    """Let the hub serve these rows, name of a data set -> split -> list, and no others."""
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=splits.__getitem__))


def test_hub_of_another_size_than_published_is_warned_about(monkeypatch, capsys, sources, tmp_path):
    hub(monkeypatch, {"namkoong-lab/PersonalLLM": {split: read_rows(sources / "PersonalLLM", split)[:2] for split in
                                                   ("train", "test")}})
    call(monkeypatch, script("prepare"), "--model", sources / "model", "--dir", tmp_path)
    printed = capsys.readouterr().out
    assert "warning: the full train split has 9,402 prompts" in printed
    assert "warning: the full test split has 1,000 prompts" in printed
    assert load_file(tmp_path / "train.safetensors")["embeddings"].shape == (16, D)
    with safe_open(tmp_path / utils.HEAD_FILE, "pt") as file:
        assert json.loads(file.metadata()["about"])["data"] == "namkoong-lab/PersonalLLM"


def test_other_embeddings_are_replaced_only_with_overwrite(monkeypatch, capsys, embeddings, sources):
    before = content_of(embeddings)
    options = ["--data", sources / "PersonalLLM", "--model", sources / "model", "--dir", embeddings, "--limit", 3]
    refused(monkeypatch, capsys, script("prepare"), options, "train.safetensors", "--overwrite")
    assert content_of(embeddings) == before
    call(monkeypatch, script("prepare"), *options, "--overwrite")
    assert load_file(embeddings / "train.safetensors")["scores"].shape == (3, 8, 10)
    refused(monkeypatch, capsys, script("prepare"), options[:-2], "--overwrite")
    (embeddings / utils.HEAD_FILE).unlink()  # files of the released script come without
    refused(monkeypatch, capsys, script("prepare"), options, "--overwrite")


# ---- prepare.py: interruptions --------------------------------------------------------------------------------------


def shards_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob(".embedding_cache/*/*.safetensors")}


def test_prepare_killed_at_random_moments_ends_with_the_same_files(forks, sources, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"

    def start(folder):
        arguments = ["--data", sources / "PersonalLLM", "--model", sources / "model", "--dir", folder, "--limit", "15"]
        process = forks.Process(target=exec, args=(RUN_MAIN.format(
            str(SCRIPTS), list(map(str, arguments)), "prepare", "script.SHARD_SIZE = 8"), {}))
        process.start()
        return process

    def finish(folder):
        process = start(folder)
        process.join()
        assert process.exitcode == 0

    began = time.perf_counter()
    finish(unbroken)
    seconds = time.perf_counter() - began
    everything = len(shards_in(unbroken))
    assert everything >= 20
    chance, partial = random.Random(0), 0
    for kill in range(8):
        if len(shards_in(broken)) > everything // 2:  # little is left to be interrupted: begin again
            shutil.rmtree(broken)
        before = shards_in(broken)
        process = start(broken)
        if kill % 2:  # any moment of its life
            time.sleep(chance.uniform(0, seconds))
        else:  # in the midst of the embedding
            more = len(before) + chance.randint(1, everything // 6)
            while process.is_alive() and len(shards_in(broken)) < more:
                time.sleep(0.001)
        process.kill()
        process.join()
        after = shards_in(broken)
        assert before.items() <= after.items()  # what was finished is neither lost nor made again
        partial += 0 < len(after) < everything
    assert partial >= 3
    finish(broken)
    assert len(shards_in(broken)) == everything
    for name in (*utils.PERSONALLLM_FILES, utils.HEAD_FILE):
        assert (broken / name).read_bytes() == (unbroken / name).read_bytes()


# ---- prepare.py: what it refuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("column, value", [
    ("response_4_beaver_7b", ...), ("response_4_beaver_7b", None), ("response_1_gemma_2b", "0.5"),
    ("response_8_mistral_ray", float("nan")), ("response_8_mistral_ray", float("-inf")),
    ("response_2_oasst_pythia_1b", True), ("response_5_gemma_7b", [1.0]), ("response_3", None), ("response_8", ...),
    ("response_8", 3), ("prompt", None), ("prompt", ...)])
def test_spoilt_row_is_named_and_nothing_written_or_lost(monkeypatch, capsys, embeddings, sources, tmp_path, column,
                                                         value):
    for split in ("train", "test"):
        rows = read_rows(sources / "PersonalLLM", split)[:6]
        if split == "test":
            rows[2][column] = value
            if value is ...:
                del rows[2][column]
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    before = content_of(embeddings)
    refused(monkeypatch, capsys, script("prepare"), ["--data", tmp_path / "data", "--model", sources / "model", "--dir",
                                                     embeddings, "--overwrite"], "test.jsonl, row 3: ",
            f"no column {column};" if value is ... else f"{column} is {value!r} and no ")
    assert content_of(embeddings) == before


def test_six_responses_a_prompt_are_counted_as_missing_columns(monkeypatch, capsys, sources, tmp_path):
    for split in ("train", "test"):
        rows = [{name: value for name, value in row.items() if not name.startswith(("response_7", "response_8"))}
                for row in read_rows(sources / "PersonalLLM", split)[:3]]
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    refused(monkeypatch, capsys, script("prepare"), ["--data", tmp_path / "data", "--model", sources / "model", "--dir",
                                                     tmp_path / "out"], "row 1: ", "response_7 and 21 more", "8 resp")
    assert not content_of(tmp_path / "out")


@pytest.mark.parametrize("spoil, named", [
    (lambda path: path.write_bytes(path.read_bytes()[:-20]), "row 240"),
    (lambda path: path.write_text("<html>429 Too Many Requests</html>"), "row 1"),
    (lambda path: path.write_text("[1, 2]\n"), "row 1"), (lambda path: path.unlink(), "train"),
    (lambda path: path.write_text(""), "no rows"),
    (lambda path: shutil.copy(path, path.with_name("train-2.jsonl")), "2 files")])
def test_damaged_data_is_named(monkeypatch, capsys, sources, tmp_path, spoil, named):
    shutil.copytree(sources / "PersonalLLM", tmp_path / "data")
    spoil(tmp_path / "data" / "train.jsonl")
    refused(monkeypatch, capsys, script("prepare"), ["--data", tmp_path / "data", "--model", sources / "model", "--dir",
                                                     tmp_path / "out"], named)
    assert not content_of(tmp_path / "out")


@pytest.mark.parametrize("arguments, named", [
    (["--limit", 0], "--limit 0"), (["--limit", "many"], "--limit"), (["--demo", "--model", "x"], "--demo"),
    (["--data", "/nowhere", "--model", "x"], "/nowhere"), (["--sideways"], "--sideways")])
def test_unusable_command_line_is_one_line(monkeypatch, capsys, tmp_path, arguments, named):
    refused(monkeypatch, capsys, script("prepare"), [*arguments, "--dir", tmp_path], named)


def test_without_a_gpu_the_demo_is_offered(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(monkeypatch, capsys, script("prepare"), ["--dir", tmp_path], "CUDA", "--demo")


# ---- train_basis.py: the results ------------------------------------------------------------------------------------


def test_demo_rises_from_the_pooled_model_to_the_planted_rank_on_unseen_users(demo):
    unseen = {fit["K"]: fit["mean_accuracy"][UNSEEN] for fit in results_in(demo[0])["fits"]}
    assert all(unseen[K] < unseen[K + 1] for K in range(1, PLANTED_RANK))
    assert unseen[PLANTED_RANK] > unseen[1] + 0.2


def test_printed_ranks_and_closing_table_are_the_saved_results(demo):
    fits = results_in(demo[0])["fits"]
    lines = demo[1]["train_basis"].splitlines()
    assert [line for line in lines if line.startswith("K : ")] == [f"K : {K}" for K in range(6)]
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["K", "alpha"])
    table = [line.split() for line in lines[head + 1:head + 7]]
    assert [row[0] for row in table] == ["ref", "1", "2", "3", "4", "5"]
    for row, fit in zip(table, fits):
        assert [float(cell) for cell in row[2:]] == pytest.approx(list(fit["mean_accuracy"].values()), abs=5.1e-5)


def test_results_name_what_was_set_and_every_user(demo):
    results = results_in(demo[0])
    assert results["users"] == [f"seen_{i}" for i in range(N)]
    assert results["unseen_users"] == [f"unseen_{i}" for i in range(N_UNSEEN)]
    pairs = {"train pairs": 24 * N, "test pairs": 60 * N, "train unseen pairs": 12 * N_UNSEEN,
             "test unseen pairs": 60 * N_UNSEEN}
    assert results["counts"] == {"seen users": N, "unseen users": N_UNSEEN, **pairs, "d": D}
    expected = {"K_list": [0, 1, 2, 3, 4, 5], "alpha_list": [0], "seeds": [0], "population_seed": 0,
                "concentration": 0.1, "fractions": [0.1, 0.05, 1.0], "pairs_dropped": 0}
    assert {name: results["config"][name] for name in expected} == expected
    for fit in results["fits"]:
        for setting, of_user in fit["accuracy_of_user"].items():
            assert list(of_user) == results["users" if "Seen" in setting or setting.startswith("Train") else
                                            "unseen_users"]
            assert np.mean(list(of_user.values())) == pytest.approx(fit["mean_accuracy"][setting])
    assert (demo[0] / "results" / "accuracy_by_rank.png").read_bytes().startswith(b"\x89PNG")


def test_bases_have_a_column_a_rank_and_weights_that_sum_to_one(demo):
    for K in range(6):
        tensors, columns = load_file(demo[0] / "results" / f"K_{K}.safetensors"), max(K, 1)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            "V": (D, columns), "W": (N, columns), "W_unseen": (N_UNSEEN, columns)}
        for name in ("W", "W_unseen"):
            torch.testing.assert_close(tensors[name].sum(1), torch.ones(len(tensors[name])))
    head = load_file(demo[0] / utils.HEAD_FILE)["reward_head"]
    assert torch.equal(load_file(demo[0] / "results" / "K_0.safetensors")["V"], head)


def test_population_is_the_dirichlet_draw_of_its_seed(demo):
    population = load_file(demo[0] / "results" / "population.safetensors")
    for number, (name, users) in enumerate((("seen", N), ("unseen", N_UNSEEN))):
        mixtures = np.random.default_rng([0, number]).dirichlet(np.full(10, 0.1), users)
        assert population[name].shape == (users, 10)
        torch.testing.assert_close(population[name].sum(1), torch.ones(users))
        np.testing.assert_allclose(population[name].numpy(), mixtures, rtol=0, atol=1e-7)
    with safe_open(demo[0] / "results" / "population.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["scorers"] == list(SCORERS) and about["users"] == [f"seen_{i}" for i in range(N)]
    assert about["unseen_users"] == [f"unseen_{i}" for i in range(N_UNSEEN)]


def test_accuracies_agree_with_the_saved_tensors_and_the_rows(demo, sources):
    rows = read_rows(sources / "PersonalLLM", "test")
    table = load_file(demo[0] / "test.safetensors")["embeddings"].double()
    population = load_file(demo[0] / "results" / "population.safetensors")
    pairs = {name: [loop_over_responses(rows, w) for w in population[name][:10]] for name in population}
    for fit in results_in(demo[0])["fits"]:
        tensors = load_file(demo[0] / "results" / fit["file"])
        for name, weights, setting in (("seen", "W", SEEN_TEST), ("unseen", "W_unseen", UNSEEN)):
            rewards = (table @ tensors["V"].double() @ tensors[weights].double().T).numpy()  # (rows, users)
            expected = [np.mean(rewards[best, i] > rewards[worst, i]) for i, (best, worst) in enumerate(pairs[name])]
            found = [fit["accuracy_of_user"][setting][f"{name}_{i}"] for i in range(len(expected))]
            assert found == pytest.approx(expected, abs=0.02)  # float32 may turn one margin near 0 of 60


def test_results_do_not_depend_on_the_hash_seed_or_the_run(demo, embeddings, tmp_path):
    def found(folder):
        results = results_in(folder)
        del results["seconds"]
        return results, {path.name: path.read_bytes() for path in sorted((folder / "results").glob("*.safetensors"))}

    folders = {seed: shutil.copytree(embeddings, tmp_path / seed) for seed in ("1", "2")}
    few = "script.K_list, script.num_iterations = [0, 3], 30"
    processes = [fresh_process(RUN_MAIN.format(str(SCRIPTS), ["--dir", str(folder)], "train_basis", few),
                               PYTHONHASHSEED=seed, OMP_NUM_THREADS="1") for seed, folder in folders.items()]
    for process in processes:
        status, _, err = outcome(process)
        assert status == 0, err
    first, second = map(found, folders.values())
    assert first == second
    assert len(first[1]) == 3  # K = 0, K = 3 and the population
    assert first[1]["population.safetensors"] == (demo[0] / "results" / "population.safetensors").read_bytes()
    ours, theirs = (results["fits"][0]["accuracy_of_user"] for results in (first[0], results_in(demo[0])))
    assert ours == theirs  # of the reference model, which is not trained


def test_another_population_seed_gives_other_users(monkeypatch, demo, embeddings, trainer):
    set_constants(monkeypatch, trainer, population_seed=1)
    call(monkeypatch, trainer, "--dir", embeddings)
    population, first = (load_file(folder / "results" / "population.safetensors") for folder in (embeddings, demo[0]))
    assert (population["seen"] - first["seen"]).abs().sum(1).min() > 1e-3


def test_published_size_gives_47_and_9_pairs_a_user():
    module = script("train_basis")
    assert (module.K_list, module.alpha_list) == ([0, 1, 2, 3, 4, 5], [0])
    users, unseen, concentration, fractions = module.population(None)
    assert (users, unseen, concentration, fractions) == (1000, 500, 0.1, (0.005, 0.001, 1.0))
    generator = torch.Generator().manual_seed(0)
    tables = {split: tuple(torch.randn(shape, generator=generator) for shape in ((8 * prompts, 3), (prompts, 8, 10)))
              for split, prompts in (("train", 9402), ("test", 1000))}
    data = utils.create_dataset_personalllm(tables, users, unseen, concentration, fractions)
    assert [len(data[part]) for part in ("train", "test", "train_unseen", "test_unseen")] == [1000, 1000, 500, 500]
    for part, pairs, prompts in (("train", 47, 9402), ("train_unseen", 9, 9402), ("test", 1000, 1000),
                                 ("test_unseen", 1000, 1000)):
        assert {len(X) for X in data[part]} == {pairs}
        assert {len(set((X.chosen // 8).tolist())) for X in data[part]} == {pairs}
        used = torch.cat([X.chosen // 8 for X in data[part]]).unique()
        assert len(used) <= prompts and len(used) > 0.35 * prompts  # the users do not all compare the same
    assert data["dropped"] == 0
    assert script("vary_fewshot").population(None) == (1000, 500, 0.1, (0.005, 0.01, 1.0))


def test_vary_fewshot_writes_its_curves(monkeypatch, capsys, embeddings):
    module = script("vary_fewshot")
    set_constants(monkeypatch, module, num_shots=[1, 30], K_list=[PLANTED_RANK], trials=3)
    call(monkeypatch, module, "--dir", embeddings)
    found = json.loads((embeddings / "results" / "vary_fewshot.json").read_text())
    curve, = found["curves"]
    assert curve["K"] == PLANTED_RANK and found["config"]["num_shots"] == [1, 30]
    assert curve["unseen_mean"][1] > curve["unseen_mean"][0] + 0.05
    assert curve["unseen_std"][0] > 1e-3  # the shots are drawn anew in each trial
    assert (embeddings / "results" / "vary_fewshot.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Shots : 1\n" in printed and "Shots : 30\n" in printed


# ---- train_basis.py: files of the released kind ---------------------------------------------------------------------


def as_released(monkeypatch, folder, sources, module):
    """Keep the embeddings only, in files without metadata, and set the demo's sizes, of which they do not speak."""
    for name in utils.PERSONALLLM_FILES:
        save_file({"embeddings": load_file(folder / name)["embeddings"]}, folder / name)
    (folder / utils.HEAD_FILE).unlink()
    set_constants(monkeypatch, module, MODEL_NAME=str(sources / "model"), N=N, N_unseen=N_UNSEEN, train_fraction=0.1,
                  few_shot_fraction=0.05)


def test_released_files_read_their_scores_from_the_data_set(monkeypatch, demo, embeddings, sources, trainer):
    as_released(monkeypatch, embeddings, sources, trainer)
    call(monkeypatch, trainer, "--dir", embeddings, "--data", sources / "PersonalLLM")
    fit, = results_in(embeddings)["fits"]
    assert fit["accuracy_of_user"] == results_in(demo[0])["fits"][0]["accuracy_of_user"]
    (embeddings / "results" / "results.json").unlink()
    hub(monkeypatch, {"namkoong-lab/PersonalLLM": {split: read_rows(sources / "PersonalLLM", split) for split in
                                                   ("train", "test")}})
    call(monkeypatch, trainer, "--dir", embeddings)
    assert results_in(embeddings)["fits"] == [fit]


def test_released_files_of_another_data_set_are_named(monkeypatch, capsys, embeddings, sources, trainer, tmp_path):
    as_released(monkeypatch, embeddings, sources, trainer)
    for split, prompts in (("train", TRAIN), ("test", TEST - 1)):
        write_rows(tmp_path / "data" / f"{split}.jsonl", read_rows(sources / "PersonalLLM", split)[:prompts])
    before = content_of(embeddings)
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings, "--data", tmp_path / "data"],
            embeddings / "test.safetensors", "480 embeddings", "(59, 8, 10)")
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings, "--data", tmp_path / "nowhere"], "nowhere")
    hub(monkeypatch, {})
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], "namkoong-lab/PersonalLLM", "--data")
    assert content_of(embeddings) == before


# ---- train_basis.py: what it refuses and drops ----------------------------------------------------------------------


def spoil(folder, name, change):
    """Apply `change` to the dict of tensors in a file; what the file says of itself stays."""
    tensors, about = utils.load_tensors(folder / name)
    change(tensors)
    utils.save_tensors(folder / name, tensors, **about)
    if name != utils.HEAD_FILE:
        sign_again(folder)


@pytest.mark.parametrize("name, change, named", [
    ("train", lambda t: t.update(embeddings=t["embeddings"][:-8]), ["1,912 embeddings", "(240, 8, 10)"]),
    ("test", lambda t: t.update(embeddings=t["embeddings"][1:]), ["479 embeddings", "(60, 8, 10)"]),
    ("train", lambda t: t.update(scores=t["scores"][:, :7]), ["(240, 7, 10)"]),
    ("train", lambda t: t.update(scores=t["scores"][:, :, :9]), ["(240, 8, 9)"]),
    ("test", lambda t: t["embeddings"][13, 5:6].fill_(float("nan")), ["row 13", "NaN"]),
    ("train", lambda t: t["embeddings"][1919, :1].fill_(float("-inf")), ["row 1919", "infinite"]),
    ("test", lambda t: t["scores"][3, 2, 1:2].fill_(float("nan")), ["scores", "NaN"]),
    ("test", lambda t: t.pop("embeddings"), ["no matrix of embeddings"]),
    ("test", lambda t: t.update(embeddings=t["embeddings"].int()), ["no matrix of embeddings"]),
    ("test", lambda t: t.update(embeddings=t["embeddings"][:, :32]), ["d = 32", "d = 64", "train.safetensors"])])
def test_spoilt_embeddings_are_named_and_nothing_written(monkeypatch, capsys, embeddings, trainer, name, change, named):
    spoil(embeddings, f"{name}.safetensors", change)
    before = content_of(embeddings)
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], embeddings / f"{name}.safetensors", *named)
    assert content_of(embeddings) == before


def test_embeddings_of_another_run_than_the_heads_are_named(monkeypatch, capsys, embeddings, trainer):
    path = embeddings / "test.safetensors"
    tensors, about = utils.load_tensors(path)
    utils.save_tensors(path, {**tensors, "embeddings": tensors["embeddings"] + 1}, **about)
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path, "another run")


def test_reward_head_of_another_width_is_named(monkeypatch, capsys, embeddings, trainer):
    spoil(embeddings, utils.HEAD_FILE, lambda t: t.update(reward_head=t["reward_head"][:32]))
    before = content_of(embeddings)
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], "reward head", "(32, 1)", "d = 64")
    assert content_of(embeddings) == before


@pytest.mark.parametrize("name", [*utils.PERSONALLLM_FILES, utils.HEAD_FILE])
def test_truncated_and_missing_files_are_named(monkeypatch, capsys, embeddings, trainer, name):
    path = embeddings / name
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path, "delete it")
    assert path.read_bytes() == content[:len(content) // 2]
    path.unlink()
    if name != utils.HEAD_FILE:  # without it the head is read from the checkpoint
        refused(monkeypatch, capsys, trainer, ["--dir", embeddings], path, "prepare.py")
    assert not content_of(embeddings / "results")


@pytest.mark.parametrize("name, constants, named", [
    ("train_basis", {"demo_train_fraction": 0.004}, ["fraction 0.004", "240 prompts", "no pairs"]),
    ("train_basis", {"demo_few_shot_fraction": 0.0}, ["fraction 0.0", "no pairs"]),
    ("train_basis", {"test_fraction": 1.1}, ["fraction 1.1", "60 prompts", "to 1.0"]),
    ("train_basis", {"demo_train_fraction": -0.5}, ["fraction -0.5"]),
    ("train_basis", {"demo_N": 0}, ["N = 0"]), ("train_basis", {"demo_N": 2.5}, ["N = 2.5"]),
    ("train_basis", {"demo_N_unseen": 0}, ["N_unseen = 0"]), ("train_basis", {"demo_N": True}, ["N = True"]),
    ("train_basis", {"concentration": 0}, ["concentration = 0"]),
    ("train_basis", {"concentration": [0.1] * 10}, ["concentration"]),
    ("train_basis", {"population_seed": -1}, ["seed", "-1"]),
    ("train_basis", {"population_seed": 2**32}, ["seed", "4294967296"]), ("train_basis", {"K_list": []}, ["K_list"]),
    ("vary_fewshot", {"demo_pool_fraction": 0.004}, ["train_unseen", "fraction 0.004", "no pairs"]),
    ("vary_fewshot", {"demo_N": 0}, ["N = 0"]), ("vary_fewshot", {"num_shots": [0]}, ["num_shots"])])
def test_unusable_constant_is_named_and_nothing_written(monkeypatch, capsys, embeddings, name, constants, named):
    module = script(name)
    set_constants(monkeypatch, module, **constants)
    before = content_of(embeddings)
    refused(monkeypatch, capsys, module, ["--dir", embeddings], *named)
    assert content_of(embeddings) == before


def tie(prompts):
    """A change of a file's tensors: all responses to these prompts have the scores of the first."""
    def change(tensors):
        tensors["scores"][prompts] = tensors["scores"][prompts, :1].expand(-1, 8, -1)
    return change


def test_tied_prompts_are_dropped_and_counted(monkeypatch, capsys, demo, embeddings, sources, trainer):
    spoil(embeddings, "test.safetensors", tie([5, 17]))
    call(monkeypatch, trainer, "--dir", embeddings)
    assert f"{2 * (N + N_UNSEEN)} pairs dropped, all responses tied" in capsys.readouterr().out
    results = results_in(embeddings)
    assert results["config"]["pairs_dropped"] == 2 * (N + N_UNSEEN)
    rows = read_rows(sources / "PersonalLLM", "test")
    reward = load_file(embeddings / "test.safetensors")["embeddings"].double() @ load_file(
        embeddings / utils.HEAD_FILE)["reward_head"].double()[:, 0]
    for i, w in enumerate(load_file(embeddings / "results" / "population.safetensors")["unseen"][:5]):
        right = [float(reward[best] > reward[worst]) for place, (best, worst) in
                 enumerate(zip(*loop_over_responses(rows, w))) if place not in (5, 17)]
        found = results["fits"][0]["accuracy_of_user"][UNSEEN][f"unseen_{i}"]
        assert found == pytest.approx(np.mean(right), abs=0.02)
        assert found * 58 == pytest.approx(round(found * 58), abs=1e-4)  # of 58 pairs, not of 60


def test_tied_prompts_leave_fewer_pairs_to_those_who_drew_them(small):
    _, table, scores, W = small
    scores = scores.clone()
    scores[::2] = 1.0
    untied, _ = utils.simulate_pairs(table, small[2], W, 0.5, np.random.default_rng(4))
    users, dropped = utils.simulate_pairs(table, scores, W, 0.5, np.random.default_rng(4))
    for pairs, everything in zip(users, untied):
        odd = (everything.chosen // 8) % 2 == 1
        assert torch.equal(pairs.chosen, everything.chosen[odd])
        assert torch.equal(pairs.rejected, everything.rejected[odd])
    assert dropped == sum(int(((pairs.chosen // 8) % 2 == 0).sum()) for pairs in untied) > 0


@pytest.mark.parametrize("name", utils.PERSONALLLM_FILES)
def test_all_prompts_tied_is_an_error_that_says_so(monkeypatch, capsys, embeddings, trainer, name):
    spoil(embeddings, name, tie(slice(None)))
    before = content_of(embeddings)
    refused(monkeypatch, capsys, trainer, ["--dir", embeddings], "tied", "user 0")
    assert content_of(embeddings) == before
