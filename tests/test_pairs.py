"""Rows of local files, pairs, shots and simulated users, against loops and what was written."""

import functools
import gzip
import json
import math
import random
import sys
import types

import numpy as np
import pandas as pd
import pydantic
import pytest
import torch
from helpers import input_error, random_users

import lore.data_files
import lore.data_notes
import lore.rows
import utils
from utils import Pairs

D = 3


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Which files are a split

WORDS = dict(train=["train"], validation=["validation", "test"])


def found_in(folder, *names):
    """The names of the files of each split in a folder that holds these."""
    for name in names:
        (folder / name).write_bytes(b"")
    return {
        split: [path.name for path in paths]
        for split, paths in lore.data_files.split_files(folder, **WORDS).items()
    }


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "validation.jsonl"),
        ("train.parquet", "my_test.csv.gz"),
        ("a-train-2024.csv", "TEST.JSONL.gz"),
        ("Train.JSONL", "test.Parquet"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
    ],
    ids=str,
)
def test_a_split_is_told_by_a_whole_word_of_the_files_name(tmp_path, names):
    others = (
        "readme.md",
        "contest.jsonl",
        "trainer.csv",
        "._train.jsonl",
        ".validation.parquet",
        "train.txt",
    )
    assert found_in(tmp_path, *names, *others) == {"train": [names[0]], "validation": [names[1]]}


def test_the_shards_of_a_split_are_read_in_their_order(tmp_path):
    shards = [f"train-{i:05}-of-00003.parquet" for i in range(3)]
    assert found_in(tmp_path, *shards[::-1], "test.jsonl") == {
        "train": shards,
        "validation": ["test.jsonl"],
    }


@pytest.mark.parametrize(
    "names",
    [
        ("train_latest.jsonl",),
        ("train.jsonl", "latest.jsonl"),
        ("train_test.jsonl",),
        ("train_test.jsonl", "train.csv"),
        ("train.jsonl", "train.csv", "test.csv"),
        ("train-00000-of-00002.parquet", "test.csv"),
        ("train-00000-of-00002.parquet", "train-00001-of-00002.csv", "test.csv"),
        ("._train.jsonl", "test.jsonl"),
        ("train-00000-of-00002.csv", "train-00001-of-00002.csv", "train.csv", "test.csv"),
        ("test.csv", "validation.csv"),
    ],
    ids=str,
)
def test_a_split_without_a_file_or_with_several_is_refused_and_the_files_are_listed(
    tmp_path, names
):
    with input_error(str(tmp_path), *[name for name in names if not name.startswith(".")]):
        found_in(tmp_path, *names)


def test_an_empty_folder_and_one_that_is_none_are_refused(tmp_path):
    with input_error(str(tmp_path), "no parquet, jsonl or csv"):
        found_in(tmp_path, "readme.md")
    for nowhere in (tmp_path / "nowhere", tmp_path / "readme.md"):
        with input_error(str(nowhere), "no such folder"):
            lore.data_files.split_files(nowhere, **WORDS)


# ---- Rows

ROWS = [{"text": f'line {i}, "é"\nand one more', "n": str(i), "empty": ""} for i in range(2500)]
FORMATS = {
    "a.parquet": lambda path: pd.DataFrame(ROWS).to_parquet(path),
    "a.csv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False),
    "a.csv.gz": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False),
    "a.jsonl": lambda path: path.write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)), "utf-8"),
    "a.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode())
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_ending_of_a_file_is_the_same_in_any_case(tmp_path, name):
    FORMATS[name](tmp_path / name)
    path = (tmp_path / name).rename(tmp_path / name.upper())
    assert [row for _, row in lore.rows.read_rows(path)] == ROWS
    assert lore.rows.column_names(path) == set(ROWS[0])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows_and_says_where_each_stands(tmp_path, name):
    FORMATS[name](tmp_path / name)
    found = list(lore.rows.read_rows(tmp_path / name))
    assert [row for _, row in found] == ROWS
    assert [where for where, _ in found] == [
        f"{tmp_path / name}, row {i}" for i in range(1, len(ROWS) + 1)
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_was_cut_short_is_refused_with_the_row_and_only_where_it_is_read(
    tmp_path, name
):
    path = tmp_path / name
    FORMATS[name](path)
    whole = path.read_bytes()
    if name == "a.csv":
        path.write_bytes(whole[: whole.rindex(b'"')])  # within quotes
    else:
        path.write_bytes(whole[:-5])
    rows = lore.rows.read_rows(path)
    if name in (
        "a.csv",
        "a.jsonl",
        "a.jsonl.gz",
    ):  # parquet's directory stands at its end, pandas reads blocks
        assert next(rows)[1] == ROWS[0]
    with input_error(f"{path}, row", "cut short"):
        list(rows)


def test_an_error_page_a_missing_file_and_a_broken_line_are_refused_by_row(tmp_path):
    for name in ("a.parquet", "a.jsonl", "a.jsonl.gz", "a.csv.gz"):
        (tmp_path / name).write_bytes(b"<!DOCTYPE html><html>429 Too Many Requests</html>")
        with input_error(f"{tmp_path / name}, row 1", "error page"):
            list(lore.rows.read_rows(tmp_path / name))
    long = {"text": "x" * 200_000}
    pd.DataFrame([long]).to_csv(tmp_path / "long.csv", index=False)
    assert [row for _, row in lore.rows.read_rows(tmp_path / "long.csv")] == [long]
    with input_error("nowhere.csv", "no such file", "--data"):
        list(lore.rows.read_rows(tmp_path / "nowhere.csv"))
    for broken in ('{"a": 1,}', "[" * 100_000, '{"a": 1'):
        (tmp_path / "b.jsonl").write_text('{"a": 1}\n\n' + broken + '\n{"a": 3}\n')
        with input_error("b.jsonl, row 2"):
            list(lore.rows.read_rows(tmp_path / "b.jsonl"))
    for shifted, named in (
        ("a,b\n1,2\n3,4,5\n", "row 2"),
        ("a,b\n1,2,3\n4,5,6\n", "row 1"),
        ("a,a\n1,2\n", "twice"),
    ):
        (tmp_path / "b.csv").write_text(shifted)
        with input_error("b.csv", named):
            list(lore.rows.read_rows(tmp_path / "b.csv"))
    for name in ("b.tsv", "b.jsonlines", "b.json"):
        with input_error(name, ".jsonl"):
            list(lore.rows.read_rows(tmp_path / name))
    (tmp_path / "b.jsonl").write_bytes(b'{"a": "\xff"}\n')  # no UTF-8
    with input_error("b.jsonl, row 1"):
        list(lore.rows.read_rows(tmp_path / "b.jsonl"))


class Inner(pydantic.BaseModel):
    n: int


class Outer(pydantic.BaseModel):
    inner: Inner
    name: pydantic.StrictStr


@pytest.mark.parametrize(
    "row, field",
    [
        ({"inner": {"n": "x"}, "name": "a"}, "inner.n"),
        ({"inner": {}, "name": "a"}, "inner.n"),
        ([1], "the row"),
        ({"inner": {"n": 1}, "name": 5}, "name"),
        ({"inner": None, "name": "a\nb" * 500}, "inner"),
    ],
    ids=str,
)
def test_a_row_of_another_schema_is_refused_by_file_row_and_field(row, field):
    rows = lore.rows.parse_rows(
        [("file.csv, row 1", {"inner": {"n": "3"}, "name": "a"}), ("file.csv, row 2", row)],
        Outer,
        "some/dataset",
    )
    assert next(rows) == ("file.csv, row 1", Outer(inner=Inner(n=3), name="a"))
    with input_error("file.csv, row 2: " + field + ":", "some/dataset"):
        next(rows)


def test_rows_of_the_hub_are_named_after_their_own_split(monkeypatch):
    calls = []

    def load_dataset(name, **options):
        calls.append((name, options))
        return {"train": [{"a": 1}, {"a": 2}], "test": [{"a": 3}]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = lore.rows.hub_rows("some/dataset", revision="x")
    assert {split: list(of_split) for split, of_split in rows.items()} == {
        "train": [
            ("some/dataset, train, row 1", {"a": 1}),
            ("some/dataset, train, row 2", {"a": 2}),
        ],
        "test": [("some/dataset, test, row 1", {"a": 3})],
    }
    assert calls == [("some/dataset", {"revision": "x"})]

    def not_served(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=not_served))
    with pytest.raises(utils.InputError, match="some/dataset.*ConnectionError.*--data"):
        lore.rows.hub_rows("some/dataset")


# ---- Pairs

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
    torch.testing.assert_close(
        product.double(), written_out(table) @ V.double(), rtol=1e-5, atol=1e-5
    )


def test_a_table_longer_than_one_part_is_multiplied_whole():
    table, V = torch.randn(20_000, 2, generator=chance()), torch.randn(2, 3, generator=chance(1))
    rows = torch.randperm(20_000, generator=chance(2))
    torch.testing.assert_close(
        Pairs(table, rows, rows.flip(0)) @ V,
        (table[rows] - table[rows.flip(0)]) @ V,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    "rows",
    [slice(1, 3), [2, 0], torch.tensor([3, 3, 1]), torch.tensor([True, False, False, True])],
    ids=str,
)
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
    for wrong in ([[0, 1]], [0.5, 1], [True, False]):
        with input_error("Pairs"):
            Pairs(table, wrong, wrong)


def test_pairs_take_row_numbers_of_any_whole_kind(table):
    expected = Pairs(table, CHOSEN, REJECTED).dense()
    for kind in (
        np.array,
        torch.tensor,
        tuple,
        lambda rows: np.int32(rows),
        lambda rows: np.array(rows, float),
    ):
        assert torch.equal(Pairs(table, kind(CHOSEN), kind(REJECTED)).dense(), expected)


# ---- The check at the border


@pytest.mark.parametrize(
    "X",
    [
        torch.ones(2, 3).double(),
        np.ones((2, 3)),
        np.ones((2, 3), np.float32),
        [[1, 1, 1]] * 2,
        torch.ones(2, 3).bfloat16(),
        torch.ones(2, 3, requires_grad=True),
        torch.ones(2, 3).to(torch.float8_e4m3fn),
        np.ones((2, 3), np.uint16),
        torch.ones(2, 3, dtype=torch.int32),
    ],
)
def test_a_matrix_of_numbers_of_any_kind_becomes_float32(X):
    found = utils.check_matrix(X, "X", 2, 3)
    assert (
        found.dtype == torch.float32
        and not found.requires_grad
        and torch.equal(found, torch.ones(2, 3))
    )


@pytest.mark.parametrize(
    "X, named",
    [
        (np.array([["a", "b"]]), "matrix of numbers"),
        (None, "NoneType"),
        ("text", "str"),
        (torch.ones(2, 3) > 0, "give"),
        (torch.ones(2, 3) * 1j, "numbers"),
        ([[1, 2], [3]], "list"),
        (torch.ones(6), "(6,)"),
        (torch.ones(0, 3), "(0, 3)"),
        (torch.ones(2, 4), "(2, 4)"),
        (torch.full((2, 3), math.nan), "NaN"),
        (np.full((2, 3), np.inf), "infinite"),
        (Pairs(torch.full((2, 3), math.nan), [0], [1]), "NaN"),
        (Pairs(torch.ones(2, 3), [], []), "(0, 3)"),
        (np.array([[1.0, None, 2.0]] * 2), "numbers"),
        (np.full((2, 3), 1e300), "infinite"),
        (torch.ones(2, 3).to_sparse(), "matrix of numbers"),
        (torch.ones(2, 3, device="meta"), "matrix of numbers"),
        (torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), "matrix of numbers"),
        (torch.ones(2, 3, dtype=torch.uint8).view(torch.bits8), "matrix of numbers"),
        (functools.reduce(lambda inner, _: [inner, inner], range(60), [1.0]), "list"),
    ],
)
def test_what_is_no_finite_matrix_is_refused_by_name(X, named):
    with input_error("the basis:", named):
        utils.check_matrix(X, "the basis", None, 3)


@pytest.mark.parametrize(
    "kind",
    [
        iter,
        tuple,
        lambda features: (X.numpy() for X in features),
        lambda features: [X.double() for X in features],
    ],
    ids=["iterator", "tuple", "arrays", "float64"],
)
def test_features_may_be_any_iterable_of_matrices(kind):
    features = random_users([3, 20, 8], 4)
    found = utils.check_features(kind(features), "features", 3, 4)
    assert all(torch.equal(X, same) for X, same in zip(found, features, strict=True))


def test_features_of_one_array_are_its_users_and_a_number_is_none():
    X = torch.randn(3, 5, 2, generator=chance())
    assert all(
        torch.equal(one, other)
        for one, other in zip(utils.check_features(X.numpy(), "f"), X, strict=True)
    )
    for wrong in (5, None):
        with input_error("f:", "users"):
            utils.check_features(wrong, "f")
    with input_error("f:", "0 users"):
        utils.check_features([], "f")
    with input_error("f, user 1:", "(5, 3)"):
        utils.check_features([torch.ones(5, 2), torch.ones(5, 3)], "f")


def test_many_pairs_with_equal_sides_are_warned_about(capsys):
    lore.data_notes.warn_of_equal_sides("train", 0, 1000)
    assert capsys.readouterr().out == ""
    lore.data_notes.warn_of_equal_sides("train", 10, 1000)
    assert "train: 10 of 1,000 pairs" in (out := capsys.readouterr().out) and "warning" not in out
    lore.data_notes.warn_of_equal_sides("train", 11, 1000)
    assert "warning" in capsys.readouterr().out


# ---- Shots and sparse prompts


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
    draws = [
        frozenset(utils.sample_shots([X], 3, generator)[0].flatten().tolist()) for _ in range(2000)
    ]
    for pair in range(10):  # each in 3 of 10 draws, within five standard deviations
        assert np.mean([pair in draw for draw in draws]) == pytest.approx(
            0.3, abs=5 * (0.3 * 0.7 / 2000) ** 0.5
        )
    assert len(set(draws)) == 120
    assert torch.equal(
        utils.sample_shots([X], 3, chance(5))[0], utils.sample_shots([X], 3, chance(5))[0]
    )


def test_shots_of_pairs_stay_pairs(table):
    (drawn,) = utils.sample_shots([Pairs(table, CHOSEN, REJECTED)], 2, chance())
    (dense,) = utils.sample_shots([Pairs(table, CHOSEN, REJECTED).dense()], 2, chance())
    assert isinstance(drawn, Pairs) and torch.equal(drawn.dense(), dense)


def test_shots_of_groups_are_whole_groups_drawn_anew():
    X, groups, generator = (
        torch.arange(10.0)[:, None],
        [torch.tensor([2, 0, 0, 1, 1, 1, 2, 0, 3, 3])],
        chance(),
    )
    whole = {tuple(X[groups[0] == g].flatten().tolist()) for g in range(4)}
    assert {
        tuple(utils.sample_shots([X], 1, generator, groups)[0].flatten().tolist())
        for _ in range(60)
    } == whole
    two = {len(utils.sample_shots([X], 2, generator, groups)[0]) for _ in range(60)}
    assert two == {4, 5, 6}  # of groups of 3, 3, 2 and 2 pairs
    assert torch.equal(utils.sample_shots([X], 9, generator, groups)[0], X)


FIVE, ONE_GROUP = [torch.ones(5, 2)] * 2, torch.zeros(5).long()


@pytest.mark.parametrize(
    "groups, named",
    [
        ([ONE_GROUP], "user 1"),
        ([ONE_GROUP] * 3, "user 2"),
        ([ONE_GROUP, [0] * 5], "user 1"),
        ([ONE_GROUP, ONE_GROUP[1:]], "user 1"),
        ([ONE_GROUP, ONE_GROUP + 1], "user 1"),
        ([ONE_GROUP, torch.tensor([0, 2, 0, 2, 0])], "user 1"),
        ([torch.tensor([0, -1, 0, 0, 0])] * 2, "user 0"),
        ([torch.tensor([0, 0.5, 1, 1, 1])] * 2, "user 0"),
        ([ONE_GROUP[:, None]] * 2, "user 0"),
        ([0, 0], "user 0"),
        ([None, None], "user 0"),
        (5, "groups"),
    ],
)
def test_groups_that_do_not_number_each_users_pairs_are_refused(groups, named):
    with input_error("groups", named):
        utils.sample_shots(FIVE, 1, None, groups)


@pytest.mark.parametrize("shots", [0, -1, 1.5, None, True])
def test_shots_that_are_no_number_of_pairs_are_refused(shots):
    with input_error("shots", repr(shots)):
        utils.sample_shots(FIVE, shots)


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


@pytest.mark.parametrize("fraction", [0.01, 0, -0.5, 1.1, math.nan, "0.5"])
def test_a_fraction_that_leaves_no_pair_is_refused(fraction):
    with input_error("sample_percentage", f"fraction {fraction}", "30 prompts"):
        utils.create_sparse_tensor(torch.zeros(5, 30, 2), fraction)


# ---- Simulated users


def test_a_population_is_mixtures_over_the_ten_scorers():
    W = utils.generate_population(0.1, 200, seed=0)
    assert isinstance(W, np.ndarray) and W.shape == (200, 10)  # as released
    assert W.min() >= 0
    np.testing.assert_allclose(W.sum(1), 1)
    assert utils.generate_popupulation is utils.generate_population


def test_the_population_has_the_moments_of_the_dirichlet_distribution():
    for alpha in (0.1, 5.0):
        W = utils.generate_population(alpha, 20_000, seed=0)
        assert W.mean(0).tolist() == pytest.approx([0.1] * 10, abs=0.015)
        variance = 0.1 * 0.9 / (10 * alpha + 1)
        assert W.var(0).tolist() == pytest.approx([variance] * 10, rel=0.1)
    W = utils.generate_population([6.0, 3.0, 1.0], 20_000, seed=0)
    assert W.mean(0).tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.01)


def test_the_population_is_fixed_by_its_seed():
    first, same, other = (utils.generate_population(0.1, 5, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    for alpha, N in ((0, 5), (math.nan, 5), ([1.0, -1.0], 5), (0.1, 0), (0.1, 2.5)):
        with input_error("concentration" if N == 5 else "N"):
            utils.generate_population(alpha, N)


def loop_over_prompts(rewards, features, w):
    """Best minus worst response of each prompt, one by one in float64."""
    rows = []
    for prompt, responses in enumerate(rewards.tolist()):
        scores = [
            sum(share * score for share, score in zip(w.tolist(), scorers)) for scorers in responses
        ]
        rows.append(
            features[prompt, np.argmax(scores)].double()
            - features[prompt, np.argmin(scores)].double()
        )
    return torch.stack(rows)


def test_whole_scores_give_the_pairs_of_the_same_floats():
    rewards, features = (
        torch.randint(1, 6, (12, 8, 10), generator=chance()),
        torch.randn(12, 8, 5, generator=chance(1)),
    )
    w = utils.generate_population(0.5, 1, seed=0)[0]
    pairs = utils.simulate_user(rewards, features, w)
    assert pairs.abs().sum() > 0 and torch.equal(
        pairs, utils.simulate_user(rewards.float(), features, w)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_simulated_user_prefers_the_best_response_to_the_worst(dtype):
    rewards, features = (
        torch.randn(12, 8, 10, generator=chance()),
        torch.randn(12, 8, 5, generator=chance(1)).to(dtype),
    )
    W = utils.generate_population(0.5, 4, seed=0)
    population = utils.simulate_population(rewards, features, W)
    assert population.shape == (4, 12, 5) and population.dtype == torch.float32
    for w, of_user in zip(W, population):
        torch.testing.assert_close(
            of_user.double(), loop_over_prompts(rewards, features, w), rtol=0, atol=1e-6
        )
        assert torch.equal(of_user, utils.simulate_user(rewards, features, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_responses_of_a_prompt_that_are_all_tied_are_no_pair(dtype):
    """Equal rows of a matrix product may differ in rounding, if they do not fill a vector."""
    tied, free = (
        torch.randn(333, 1, 10, generator=chance(), dtype=dtype),
        torch.randn(50, 7, 10, generator=chance(1)),
    )
    rewards = torch.cat([tied.expand(-1, 7, -1), free.to(dtype)])
    for w in utils.generate_population(0.5, 20, seed=0):
        best, worst = utils.best_and_worst(rewards, w)
        assert torch.equal(best[:333], worst[:333]) and (best[333:] != worst[333:]).all()


# ---- Pairs of dialogues


def prism_row(user, dialog, turn, rejected, value):
    """A turn: the chosen embedding is [value] * D, the rejected ones are [value - 1] * D, ..."""
    vectors = [torch.full((D,), value - j) for j in range(1 + rejected)]
    return {
        "prompt": [],
        "extra_info": {
            "user_id": user,
            "dialog_id": dialog,
            "turn_nb": turn,
            "chosen_conv_embedding": vectors[0],
            "rejected_conv_embedding": vectors[1] if rejected == 1 else torch.stack(vectors[1:]),
        },
    }


PRISM_ROWS = [
    prism_row("user b", "c7", 0, 2, 10.0),
    prism_row("user a", "c9", 0, 1, 20.0),
    prism_row("user b", "c1", 0, 3, 30.0),
    prism_row("user a", "c9", 1, 2, 40.0),
    prism_row("user b", "c7", 1, 1, 50.0),
]


def as_lists(row):
    """The same row with its embeddings as Python lists."""
    return {
        **row,
        "extra_info": {
            key: value.tolist() if isinstance(value, torch.Tensor) else value
            for key, value in row["extra_info"].items()
        },
    }


@pytest.mark.parametrize("form", [lambda row: row, as_lists], ids=["tensors", "lists"])
def test_prism_makes_one_pair_of_each_rejected_response_users_and_conversations_in_order(form):
    user_a, user_b = utils.create_dataset_prism([form(row) for row in PRISM_ROWS])
    assert user_a.tolist() == [[gap] * D for gap in (1, 1, 2)]  # two turns of c9
    assert user_b.tolist() == [
        [gap] * D for gap in (1, 2, 3, 1, 2, 1)
    ]  # c1, then the two turns of c7
    assert user_a.dtype == user_b.dtype == torch.float32


def test_prism_takes_a_dict_of_rows_too():
    by_user = {}
    for row in PRISM_ROWS:
        by_user.setdefault(row["extra_info"]["user_id"], []).append(row)
    for X, same in zip(
        utils.create_dataset_prism(PRISM_ROWS), utils.create_dataset_prism(by_user), strict=True
    ):
        assert torch.equal(X, same)


def test_prism_takes_the_released_rows_of_one_vector_for_all_rejected():
    chosen, rejected = torch.randn(2, D, generator=chance()).bfloat16()
    for shape in ((D,), (1, D)):
        row = {
            "extra_info": {
                "user_id": "u",
                "dialog_id": "c",
                "chosen_conv_embedding": chosen.reshape(shape),
                "rejected_conv_embedding": rejected.reshape(shape),
            }
        }
        (X,) = utils.create_dataset_prism([row])
        assert torch.equal(X, (chosen.float() - rejected.float())[None])


def test_prism_shots_are_whole_conversations_drawn_anew():
    rows = [prism_row("u", f"c{i}", turn, 1 + i, 10.0) for i in range(6) for turn in (0, 1)]
    pairs_of = {
        tuple(range(1, 2 + i)) * 2 for i in range(6)
    }  # conversation i: gaps 1 .. 1 + i, twice
    generator, drawn = random.Random(0), set()
    for _ in range(40):
        (X,) = utils.create_dataset_prism_shots(rows, 1, generator)
        drawn.add(tuple(int(gap) for gap in X[:, 0].tolist()))
    assert drawn == pairs_of
    (two,) = utils.create_dataset_prism_shots(rows, 2, random.Random(3))
    (same,) = utils.create_dataset_prism_shots(rows, 2, random.Random(3))
    assert torch.equal(two, same)
    (everything,) = utils.create_dataset_prism_shots(rows, 99)
    assert sorted(everything[:, 0].tolist()) == sorted(
        utils.create_dataset_prism(rows)[0][:, 0].tolist()
    )


def test_the_released_nesting_gives_the_pairs_of_its_turns():
    """user -> dialog -> the vectors of the chosen and of the rejected answers, turn by turn."""
    one, two = torch.ones(D).bfloat16(), 2 * torch.ones(D).bfloat16()
    released = {
        "u2": {"c1": {"chosen": [two, one], "rejected": [one, two]}},
        "u1": {
            "c2": {"chosen": [two], "rejected": [two]},
            "c3": {"chosen": [3 * two], "rejected": [one]},
        },
    }
    first, second = utils.create_dataset_prism(released)  # in the order of the file
    assert first.dtype == torch.float32
    assert first.tolist() == [[1.0] * D, [-1.0] * D]
    assert second.tolist() == [[0.0] * D, [5.0] * D]
    random.seed(0)
    drawn = {
        tuple(utils.create_dataset_prism_shots(released, 1)[1][:, 0].tolist()) for _ in range(30)
    }
    assert drawn == {(0.0,), (5.0,)}


def test_without_a_seed_the_released_generators_draw():
    """numpy's for populations and sparse draws, Python's for PRISM's dialogs, torch's for shots."""
    X = torch.arange(30.0).reshape(1, 30, 1)
    rows = [prism_row("u", f"c{i}", 0, i, 10.0) for i in range(1, 9)]  # dialog i has i pairs
    cases = [
        (np.random.seed, lambda: utils.generate_population(0.1, 3).tolist()),
        (np.random.seed, lambda: utils.create_sparse_tensor(X, 0.3)[0].tolist()),
        (random.seed, lambda: utils.create_dataset_prism_shots(rows, 2)[0].tolist()),
        (torch.manual_seed, lambda: utils.sample_shots([X[0]], 3)[0].tolist()),
    ]
    for seed, draw in cases:
        seed(1)
        first, other = draw(), draw()
        seed(1)
        assert draw() == first != other
