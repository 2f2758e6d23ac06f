"""Pairs, shots, simulated users and the splits of the data sets, against loops and Python's own random module."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fresh_process, input_error, outcome, random_users

import utils
from utils import Pairs


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------

CHOSEN, REJECTED = [0, 3, 3, 5], [1, 0, 4, 5]


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def table(request):
    return torch.randn(6, 4, generator=chance()).to(request.param)


def written_out(table):
    """The pairs one by one, float64 `[4, d]`."""
    return torch.stack([table[c].double() - table[r].double() for c, r in zip(CHOSEN, REJECTED)])


def test_pairs_are_the_differences_of_rows(table):
    pairs = Pairs(table, CHOSEN, REJECTED)
    dense = pairs.dense()
    assert len(pairs) == 4 and pairs.shape == dense.shape == (4, 4)
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense.double(), written_out(table), rtol=0, atol=1e-6)


def test_pairs_times_a_basis_is_the_dense_product_in_float32(table):
    V = torch.randn(4, 3, generator=chance(1))
    product = Pairs(table, CHOSEN, REJECTED) @ V
    assert product.dtype == torch.float32
    torch.testing.assert_close(product.double(), written_out(table) @ V.double(), rtol=1e-5, atol=1e-5)


def test_a_table_longer_than_one_part_is_multiplied_whole():
    table, V = torch.randn(20_000, 2, generator=chance()), torch.randn(2, 3, generator=chance(1))
    rows = torch.randperm(20_000, generator=chance(2))
    torch.testing.assert_close(Pairs(table, rows, rows.flip(0)) @ V, (table[rows] - table[rows.flip(0)]) @ V,
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [slice(1, 3), [2, 0], torch.tensor([3, 3, 1]),
                                  torch.tensor([True, False, False, True])], ids=str)
def test_indexing_pairs_selects_rows_of_the_dense_matrix(table, rows):
    pairs = Pairs(table, CHOSEN, REJECTED)
    assert isinstance(pairs[rows], Pairs)
    assert pairs[rows].embeddings is table
    assert torch.equal(pairs[rows].dense(), pairs.dense()[rows])


def test_making_pairs_dense_leaves_the_table_as_it_was(table):
    before = table.clone()
    for chosen in (CHOSEN, list(range(6))):
        Pairs(table, chosen, chosen[::-1]).dense()
    assert torch.equal(table, before)


def test_pairs_refuse_rows_outside_the_table_and_lists_of_unequal_length(table):
    for chosen, rejected, row in (([0, 6], [1, 1], "6"), ([0, 1], [-1, 1], "-1")):
        with input_error("Pairs", row, "6 rows"):
            Pairs(table, chosen, rejected)
    with input_error("Pairs", "(2,)", "(1,)"):
        Pairs(table, [0, 1], [1])
    with input_error("Pairs", "(1, 2)"):
        Pairs(table, [[0, 1]], [[1, 0]])


# ---------------------------------------------------------------------------------------------------------------------
# Shots and sparse prompts
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(X):
    return [tuple(row) for row in X.tolist()]


def test_shots_are_distinct_pairs_of_the_user_and_all_of_them_where_there_are_fewer():
    features = random_users([3, 20, 8], 4)
    for shots in (1, 5, 30):
        for X, drawn in zip(features, utils.sample_shots(features, shots), strict=True):
            assert drawn.shape == (min(shots, len(X)), 4)
            assert len(set(rows_of(drawn))) == len(drawn)
            assert set(rows_of(drawn)) <= set(rows_of(X))


def test_shots_are_drawn_anew_at_each_call_uniformly_and_by_the_generator_given():
    X, generator = torch.arange(10.0)[:, None], chance()
    draws = [frozenset(utils.sample_shots([X], 3, generator)[0].flatten().tolist()) for _ in range(2000)]
    for pair in range(10):  # each in 3 of 10 draws, within five standard deviations
        assert np.mean([pair in draw for draw in draws]) == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 2000) ** 0.5)
    assert len(set(draws)) == 120
    assert torch.equal(utils.sample_shots([X], 3, chance(5))[0], utils.sample_shots([X], 3, chance(5))[0])


def test_shots_of_pairs_stay_pairs(table):
    drawn, = utils.sample_shots([Pairs(table, CHOSEN, REJECTED)], 2, chance())
    dense, = utils.sample_shots([Pairs(table, CHOSEN, REJECTED).dense()], 2, chance())
    assert isinstance(drawn, Pairs) and torch.equal(drawn.dense(), dense)


def test_a_sparse_tensor_keeps_the_fraction_of_each_users_prompts_rounded_down():
    dense = torch.randn(5, 30, 2, generator=chance())
    sparse = utils.create_sparse_tensor(dense, 0.25)
    assert [X.shape for X in sparse] == [(7, 2)] * 5
    kept = []
    for X, full in zip(sparse, dense, strict=True):
        kept.append([rows_of(full).index(row) for row in rows_of(X)])
        assert len(set(kept[-1])) == 7
    assert len(set(map(tuple, kept))) == 5  # other prompts for each user
    assert [len(X) for X in utils.create_sparse_tensor(dense, 1.0)] == [30] * 5
    for percent in range(1, 101):  # whatever the rounding of the product
        assert len(utils.create_sparse_tensor(torch.zeros(1, 100, 2), percent / 100)[0]) == percent


@pytest.mark.parametrize("fraction", [0.01, 0, -0.5, 1.1])
def test_a_fraction_that_leaves_no_pair_is_refused(fraction):
    with input_error(f"fraction {fraction}", "30 prompts"):
        utils.create_sparse_tensor(torch.zeros(5, 30, 2), fraction)


# ---------------------------------------------------------------------------------------------------------------------
# Simulated users
# ---------------------------------------------------------------------------------------------------------------------


def test_a_population_is_mixtures_over_the_ten_scorers():
    W = utils.generate_population(0.1, 200, seed=0)
    assert W.shape == (200, 10) and W.dtype == torch.float32
    assert W.min() >= 0
    torch.testing.assert_close(W.sum(1), torch.ones(200))
    assert utils.generate_popupulation is utils.generate_population


def test_the_population_has_the_moments_of_the_dirichlet_distribution():
    for alpha in (0.1, 5.0):
        W = utils.generate_population(alpha, 20_000, seed=0).double()
        assert W.mean(0).tolist() == pytest.approx([0.1] * 10, abs=0.015)
        variance = 0.1 * 0.9 / (10 * alpha + 1)
        assert W.var(0).tolist() == pytest.approx([variance] * 10, rel=0.1)
    W = utils.generate_population([6.0, 3.0, 1.0], 20_000, seed=0)
    assert W.mean(0).tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.01)


def test_the_population_is_fixed_by_its_seed():
    first, same, other = (utils.generate_population(0.1, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def loop_over_prompts(rewards, features, w):
    """Best minus worst response of each prompt, one by one in float64."""
    rows = []
    for prompt, responses in enumerate(rewards.tolist()):
        scores = [sum(share * score for share, score in zip(w.tolist(), scorers)) for scorers in responses]
        rows.append(features[prompt, np.argmax(scores)].double() - features[prompt, np.argmin(scores)].double())
    return torch.stack(rows)


def test_whole_scores_give_the_pairs_of_the_same_floats():
    rewards, features = torch.randint(1, 6, (12, 8, 10), generator=chance()), torch.randn(12, 8, 5, generator=chance(1))
    w = utils.generate_population(0.5, 1, seed=0)[0]
    pairs = utils.simulate_user(rewards, features, w)
    assert pairs.abs().sum() > 0 and torch.equal(pairs, utils.simulate_user(rewards.float(), features, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_simulated_user_prefers_the_best_response_to_the_worst(dtype):
    rewards, features = torch.randn(12, 8, 10, generator=chance()), torch.randn(12, 8, 5, generator=chance(1)).to(dtype)
    W = utils.generate_population(0.5, 4, seed=0)
    population = utils.simulate_population(rewards, features, W)
    assert population.shape == (4, 12, 5) and population.dtype == torch.float32
    for w, of_user in zip(W, population):
        torch.testing.assert_close(of_user.double(), loop_over_prompts(rewards, features, w), rtol=0, atol=1e-6)
        assert torch.equal(of_user, utils.simulate_user(rewards, features, w))


# ---------------------------------------------------------------------------------------------------------------------
# Reddit TL;DR
# ---------------------------------------------------------------------------------------------------------------------

D = 3


def tldr_file(sizes, first):
    """worker -> comparisons, workers in ascending order of their number of pairs; each pair has a number of its own."""
    file, number = {}, first
    for worker, pairs in sorted(sizes.items(), key=lambda item: item[1]):
        file[worker] = []
        for _ in range(pairs):
            winning = torch.tensor([number // 64, number % 64, 2]).bfloat16()  # whole numbers to 256 are exact
            losing = torch.tensor([1, 1, 5]).bfloat16()
            file[worker].append({"text": "", "winning_summary": str(number), "losing_summary": "",
                                 "embeddings": {"winning": [winning], "losing": [losing]}})
            number += 1
    return file


def tldr_files():
    """Train and validation files with eleven workers of both, one of each alone, and two tiny ones in each."""
    chance = random.Random(1)
    common = [f"worker {i:02d}" for i in chance.sample(range(100), 11)]
    train = {worker: chance.randrange(20, 300) for worker in common} | {"train only": 90, "tiny": 1, "small": 2}
    validation = {worker: chance.randrange(5, 40) for worker in common} | {"validation only": 30}
    validation |= {common[0]: 2, common[1]: 3}  # left out for their size in this file
    return tldr_file(train, 0), tldr_file(validation, 10_000)


def in_plain_python(train, validation):
    """The published split: python's global generator, seeded with 0; lists of comparisons instead of features."""
    def without_the_two_smallest(file):
        return sorted(file, key=lambda worker: len(file[worker]))[2:]

    workers = sorted(set(without_the_two_smallest(train)) & set(without_the_two_smallest(validation)))
    random.seed(0)
    random.shuffle(workers)
    seen, unseen = workers[:len(workers) // 2], workers[len(workers) // 2:]
    return {"seen": seen, "unseen": unseen,
            "train": [random.sample(train[w], min(150, len(train[w]))) for w in seen],
            "train_unseen": [random.sample(train[w], min(50, len(train[w]))) for w in unseen],
            "test": [validation[w] for w in seen], "test_unseen": [validation[w] for w in unseen]}


@pytest.fixture
def global_random():
    state = random.getstate()
    yield
    random.setstate(state)


def test_the_tldr_split_is_the_published_one(global_random):
    files = tldr_files()
    expected, found = in_plain_python(*files), utils.create_dataset_tldr(*files, 150, 50)
    assert len(found["seen"]) == 4 and len(found["unseen"]) == 5
    assert found["seen"] == expected["seen"] and found["unseen"] == expected["unseen"]
    for part in ("train", "test", "train_unseen", "test_unseen"):
        for X, comparisons in zip(found[part], expected[part], strict=True):
            rows = [c["embeddings"]["winning"][0].float() - c["embeddings"]["losing"][0].float() for c in comparisons]
            assert X.dtype == torch.float32 and torch.equal(X, torch.stack(rows))


def test_tldr_workers_keep_at_most_150_and_50_training_pairs_and_all_validation_pairs():
    train, validation = tldr_files()
    found = utils.create_dataset_tldr(train, validation, 150, 50)
    for part, workers, cap in (("train", "seen", 150), ("train_unseen", "unseen", 50)):
        assert [len(X) for X in found[part]] == [min(cap, len(train[w])) for w in found[workers]]
        assert min(map(len, found[part])) < max(map(len, found[part])) == cap
        assert all(len(set(rows_of(X))) == len(X) for X in found[part])
    for part, workers in (("test", "seen"), ("test_unseen", "unseen")):
        assert [len(X) for X in found[part]] == [len(validation[w]) for w in found[workers]]


def test_the_tldr_split_does_not_touch_the_global_generator_and_follows_its_seed(global_random):
    files = tldr_files()
    random.seed(3)
    state = random.getstate()
    first, same, other = (utils.create_dataset_tldr(*files, 150, 50, seed=seed) for seed in (0, 0, 1))
    assert random.getstate() == state
    assert first["seen"] == same["seen"] != other["seen"]
    assert all(torch.equal(a, b) for a, b in zip(first["train"], same["train"]))


HASH_SEED_CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_data, utils
found = utils.create_dataset_tldr(*test_data.tldr_files(), 150, 50)
print(json.dumps({key: [X if isinstance(X, str) else X.tolist() for X in value] for key, value in found.items()}))
print(hash("a worker"))
"""


def test_the_tldr_split_does_not_depend_on_pythons_hash_seed():
    runs = [fresh_process(HASH_SEED_CODE, Path(__file__).parent, PYTHONHASHSEED=seed) for seed in ("1", "2")]
    (status, first, err), (_, second, _) = map(outcome, runs)
    assert status == 0, err
    assert first.splitlines()[0] == second.splitlines()[0]
    assert first.splitlines()[1] != second.splitlines()[1]
    assert json.loads(first.splitlines()[0])["seen"] == utils.create_dataset_tldr(*tldr_files(), 150, 50)["seen"]


def test_tldr_files_without_two_common_workers_are_refused():
    train = tldr_file({"a": 1, "b": 2, "c": 9, "d": 9}, 0)
    validation = tldr_file({"x": 1, "y": 2, "c": 9, "z": 9}, 0)
    with input_error("1 workers", "2 smallest"):
        utils.create_dataset_tldr(train, validation, 150, 50)


# ---------------------------------------------------------------------------------------------------------------------
# PRISM
# ---------------------------------------------------------------------------------------------------------------------


def prism_row(user, dialog, turn, rejected, value):
    """A turn whose chosen embedding is [value] * D and whose rejected ones are [value - 1], [value - 2], ..."""
    vectors = [torch.full((D,), value - j) for j in range(1 + rejected)]
    return {"prompt": [], "extra_info": {
        "user_id": user, "dialog_id": dialog, "turn_nb": turn, "chosen_conv_embedding": vectors[0],
        "rejected_conv_embedding": vectors[1] if rejected == 1 else torch.stack(vectors[1:])}}


PRISM_ROWS = [prism_row("user b", "c7", 0, 2, 10.0), prism_row("user a", "c9", 0, 1, 20.0),
              prism_row("user b", "c1", 0, 3, 30.0), prism_row("user a", "c9", 1, 2, 40.0),
              prism_row("user b", "c7", 1, 1, 50.0)]


def as_lists(row):
    """The same row with its embeddings as Python lists."""
    return {**row, "extra_info": {key: value.tolist() if isinstance(value, torch.Tensor) else value
                                  for key, value in row["extra_info"].items()}}


@pytest.mark.parametrize("form", [lambda row: row, as_lists], ids=["tensors", "lists"])
def test_prism_makes_one_pair_of_each_rejected_response_users_and_conversations_in_order(form):
    user_a, user_b = utils.create_dataset_prism([form(row) for row in PRISM_ROWS])
    assert user_a.tolist() == [[gap] * D for gap in (1, 1, 2)]  # two turns of c9
    assert user_b.tolist() == [[gap] * D for gap in (1, 2, 3, 1, 2, 1)]  # c1, then the two turns of c7
    assert user_a.dtype == user_b.dtype == torch.float32


def test_prism_takes_a_dict_of_rows_too():
    by_user = {}
    for row in PRISM_ROWS:
        by_user.setdefault(row["extra_info"]["user_id"], []).append(row)
    for X, same in zip(utils.create_dataset_prism(PRISM_ROWS), utils.create_dataset_prism(by_user), strict=True):
        assert torch.equal(X, same)


def test_prism_takes_the_released_rows_of_one_vector_for_all_rejected():
    chosen, rejected = torch.randn(2, D, generator=chance()).bfloat16()
    for shape in ((D,), (1, D)):
        row = {"extra_info": {"user_id": "u", "dialog_id": "c", "chosen_conv_embedding": chosen.reshape(shape),
                              "rejected_conv_embedding": rejected.reshape(shape)}}
        X, = utils.create_dataset_prism([row])
        assert torch.equal(X, (chosen.float() - rejected.float())[None])


def test_prism_shots_are_whole_conversations_drawn_anew():
    rows = [prism_row("u", f"c{i}", turn, 1 + i, 10.0) for i in range(6) for turn in (0, 1)]
    pairs_of = {tuple(range(1, 2 + i)) * 2 for i in range(6)}  # conversation i: gaps 1 .. 1 + i, twice
    generator, drawn = chance(), set()
    for _ in range(40):
        X, = utils.create_dataset_prism_shots(rows, 1, generator)
        drawn.add(tuple(int(gap) for gap in X[:, 0].tolist()))
    assert drawn == pairs_of
    two, = utils.create_dataset_prism_shots(rows, 2, chance(3))
    same, = utils.create_dataset_prism_shots(rows, 2, chance(3))
    assert torch.equal(two, same)
    everything, = utils.create_dataset_prism_shots(rows, 99)
    assert sorted(everything[:, 0].tolist()) == sorted(utils.create_dataset_prism(rows)[0][:, 0].tolist())
