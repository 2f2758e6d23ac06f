"""What a training leaves in results/: files that say of which model and data they are."""

import dataclasses
import json
import os
import re
import statistics

import numpy as np
import pandas as pd
import pytest
import studies
import torch
from helpers import fresh_process, outcome, random_users
from matplotlib.figure import Figure
from scipy.stats import norm, t

import lore.files
import lore.pictures
import lore.results
import utils
from lore.evidence import VALIDATION, evidence, hold_out, judge_held_out
from lore.files import load_tensors
from lore.report import CONTROLS, report
from lore.results import (
    print_results,
    question_table,
    save_few_shot_curves,
    save_question_curves,
)
from lore.study import PARTS, Study
from lore.tables import format_cell, model_in_file_name
from utils import SEEN_TEST, SETTINGS, TRAIN, UNSEEN_SETTINGS, UNSEEN_TEST

pytestmark = pytest.mark.usefixtures("one_thread")

d = 6
SEEN = ["worker é", "b", "7"]
UNSEEN = ["x", "y"]
IDENTITY = {"model": "123abc", "data": "456def"}
TITLE = "A data set (own)"


@pytest.fixture(scope="module")
def study():
    """Three seen users and two unseen ones, and three pairs of two equal sides."""
    train, test, train_unseen, test_unseen = (
        random_users(counts, d, seed)
        for seed, counts in enumerate([(9, 20, 7), (8, 8, 5), (4, 9), (30, 6)])
    )
    train[1][3] = 0
    test_unseen[0][:2] = 0
    return Study(
        title=TITLE,
        seen=SEEN,
        unseen=UNSEEN,
        train=train,
        test=test,
        train_unseen=train_unseen,
        test_unseen=test_unseen,
        reward_head=torch.ones(d, 1),
        provenance={"model": "a/model", "identity": IDENTITY},
    )


def swept(study, K_list=(0, 1, 3), alpha_list=(0,), seeds=(0,), num_iterations=10):
    return studies.swept(study, K_list, seeds, alpha_list, num_iterations)


@pytest.fixture(scope="module")
def fits(study):
    return swept(study)


def save_results(folder, fits, study, config, seconds=1.0):
    return lore.results.save_results(folder, fits, study, config, seconds, evidence(fits, study))


SAVED_CONFIG = {  # as JSON
    "data": "A data set (own)",
    "model": "a/model",
    "K_list": [0, 1, 3],
    "seeds": [0],
    "fractions": [0.5, 1.0],
}


@pytest.fixture(scope="module")
def saved(study, fits, tmp_path_factory):
    """A folder with the results of `fits`, to be read only."""
    folder = tmp_path_factory.mktemp("results")
    config = {"K_list": [0, 1, 3], "seeds": range(1), "fractions": np.array([0.5, 1])}
    save_results(folder, fits, study, config, 12.5)
    return folder


def strict_json(path):
    """The content of a file, which has no NaN or infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved from here on."""
    figures = []
    savefig = Figure.savefig

    def watched(figure, *arguments, **options):
        figures.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


def is_a_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


# ---- A sweep


def test_the_results_name_settings_users_model_data_versions_and_counts(saved):
    results = strict_json(saved / "results.json")
    assert results["config"] == SAVED_CONFIG
    assert results["users"] == SEEN
    assert results["unseen_users"] == UNSEEN
    assert results["identity"] == IDENTITY
    assert results["seeds"] == [0]
    assert results["seconds"] == 12.5
    assert results["counts"] == {
        "seen users": 3,
        "unseen users": 2,
        "d": d,
        "train pairs": 36,
        "test pairs": 21,
        "train unseen pairs": 13,
        "test unseen pairs": 36,
        "pairs with equal sides": 3,
        "validation pairs": 0,
    }
    assert torch.__version__.startswith(results["versions"]["torch"])
    assert {"python", "numpy"} <= results["versions"].keys()


def test_results_of_embeddings_without_a_name_say_that_it_is_not_known(tmp_path, study, fits):
    unnamed = dataclasses.replace(study, provenance={})
    save_results(tmp_path, fits, unnamed, {})
    results = strict_json(tmp_path / "results.json")
    assert results["config"] == {"data": TITLE, "model": None}
    assert results["identity"] is None


def accuracy_pair_by_pair(X, V, w):
    """The share of pairs with a positive margin, in float64 and Python's own sum."""
    margins = (X.double() @ V.double() @ w.double()).tolist()
    return sum(margin > 0 for margin in margins) / len(margins)


def test_the_results_hold_every_accuracy_of_every_user(saved, study, fits):
    entries = strict_json(saved / "results.json")["fits"]
    assert [entry["K"] for entry in entries] == [0, 1, 3]
    for entry, fit in zip(entries, fits, strict=True):
        assert (entry["training_loss"] is None) == (fit.K == 0)
        assert entry["columns"] == max(fit.K, 1)
        weights = [fit.W, fit.W, fit.W_unseen, fit.W_unseen]
        for setting, part, W in zip(SETTINGS, PARTS, weights, strict=True):
            users = UNSEEN if "unseen" in part else SEEN
            expected = {
                user: accuracy_pair_by_pair(X, fit.V, w)
                for user, X, w in zip(users, getattr(study, part), W, strict=True)
            }
            mean = statistics.fmean(expected.values())
            std = statistics.pstdev(expected.values())
            assert entry["accuracy_of_user"][setting] == pytest.approx(expected)
            assert entry["mean_accuracy"][setting] == pytest.approx(mean)
            assert entry["std_over_users"][setting] == pytest.approx(std)


def test_a_saved_basis_gives_the_accuracies_again_and_names_its_model_and_data(saved, study, fits):
    results = strict_json(saved / "results.json")
    for entry, fit in zip(results["fits"], fits, strict=True):
        tensors, metadata = load_tensors(saved / entry["file"])
        for name in ("V", "W", "W_unseen"):
            assert torch.equal(tensors[name], getattr(fit, name))
        accuracies = [
            utils.evaluate_model(X, tensors["V"], w)
            for X, w in zip(study.test_unseen, tensors["W_unseen"], strict=True)
        ]
        assert accuracies == pytest.approx(list(entry["accuracy_of_user"][UNSEEN_TEST].values()))
        assert (metadata["K"], metadata["alpha"], metadata["seed"]) == (fit.K, fit.alpha, fit.seed)
        assert metadata["identity"] == IDENTITY
        assert metadata["users"] == SEEN
        assert metadata["unseen_users"] == UNSEEN
        assert metadata["config"] == SAVED_CONFIG
        assert metadata["versions"] == results["versions"]


def test_files_of_an_earlier_sweep_go_and_others_and_the_state_of_the_training_stay(
    tmp_path, study, fits
):
    checkpoint = lore.files.CHECKPOINT_FILE  # the script clears it, when everything is written
    for name in (
        "K_7.safetensors",
        "K_3_seed_1.safetensors",
        "notes.txt",
        "vary_fewshot.json",
        checkpoint,
    ):
        (tmp_path / name).write_text("old")
    save_results(tmp_path, fits, study, {})
    assert set(os.listdir(tmp_path)) == {
        "K_0.safetensors",
        "K_1.safetensors",
        "K_3.safetensors",
        "results.json",
        "results.csv",
        "results_long.csv",
        "report.md",
        "report.html",
        "weights.csv",
        "accuracy_by_rank.png",
        "accuracy_by_rank.pdf",
        "personal_part.png",
        "personal_part.pdf",
        "notes.txt",
        "vary_fewshot.json",
        checkpoint,
    }


def test_the_picture_of_the_personal_part_goes_if_no_model_has_one(tmp_path, study, fits):
    save_results(tmp_path, fits, study, {})
    save_results(tmp_path, [fit for fit in fits if fit.K < 2], study, {})
    assert not list(tmp_path.glob("personal_part.*"))


def test_every_penalty_and_seed_has_a_file_of_its_own_without_a_seed_that_of_the_lowest_loss(
    tmp_path, study
):
    fits = swept(study, [2], [0, 0.5], [0, 1], num_iterations=2)
    save_results(tmp_path, fits, study, {})
    results = strict_json(tmp_path / "results.json")
    assert results["seeds"] == [0, 1]
    assert [(fit["alpha"], fit["seed"]) for fit in results["fits"]] == [
        (0, 0),
        (0, 1),
        (0.5, 0),
        (0.5, 1),
    ]
    files = [fit["file"] for fit in results["fits"]]
    assert len(set(files)) == 4
    assert set(files) == {path.name for path in tmp_path.glob("*.safetensors")}
    for fit in results["fits"]:
        assert load_tensors(tmp_path / fit["file"])[1]["seed"] == fit["seed"]
        lowest = min(other.loss for other in fits if other.alpha == fit["alpha"])
        assert fit["kept"] == (fit["training_loss"] == lowest)
        assert fit["kept"] == ("seed" not in fit["file"])


def test_every_model_in_the_results_names_the_file_of_its_kept_seed(tmp_path, study):
    save_results(tmp_path, swept(study, [0, 2], [0, 0.5], [0, 1], num_iterations=2), study, {})
    results = strict_json(tmp_path / "results.json")
    for entry in results["evidence"]:
        metadata = load_tensors(tmp_path / entry["file"])[1]
        if entry["K"] > 0:
            assert (metadata["K"], metadata["alpha"]) == (entry["K"], entry["alpha"])
            assert "seed" not in entry["file"]
    assert results["chosen"] == {"K": None, "alpha": None, "by": "none", "file": None}


def test_the_reference_is_saved_once_whatever_the_alphas_and_seeds(tmp_path, study):
    save_results(tmp_path, swept(study, [0, 2], [0.5, 1], [0, 1], num_iterations=2), study, {})
    results = strict_json(tmp_path / "results.json")
    assert len(list(tmp_path.glob("K_0*.safetensors"))) == 1
    assert len(list(tmp_path.glob("K_2*.safetensors"))) == 4
    for entry in [*results["fits"], *results["evidence"]]:
        if entry["K"] == 0:
            tensors, _ = load_tensors(tmp_path / entry["file"])
            assert torch.equal(tensors["V"], study.reward_head)


@pytest.mark.parametrize(
    "alpha, name",
    [
        (0, "K_3_alpha_0.0"),
        (1, "K_3_alpha_1.0"),
        (0.001, "K_3_alpha_0.001"),
        (1e-3, "K_3_alpha_0.001"),
        (0.0010, "K_3_alpha_0.001"),
        (1e-5, "K_3_alpha_0.00001"),
        (2.5e-7, "K_3_alpha_0.00000025"),
        (1e4, "K_3_alpha_10000.0"),
        (1e15, "K_3_alpha_1000000000000000.0"),
        (10000, "K_3_alpha_10000.0"),
    ],
)
def test_an_alpha_in_the_name_of_a_file_is_written_in_one_way(alpha, name):
    assert model_in_file_name(3, alpha) == name
    assert float(name.removeprefix("K_3_alpha_")) == alpha


def test_files_of_several_alphas_are_named_by_them(tmp_path, study):
    save_results(tmp_path, swept(study, [2], [0, 1e-5], num_iterations=2), study, {})
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert names == {"K_2_alpha_0.0.safetensors", "K_2_alpha_0.00001.safetensors"}


def test_a_failure_leaves_the_results_of_before_and_nothing_else(
    tmp_path, study, fits, monkeypatch
):
    save_results(tmp_path, fits, study, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", no_space)  # of the tables, which are written last
    with pytest.raises(OSError):
        save_results(tmp_path, swept(study, [2], num_iterations=1), study, {}, 2.0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def fails_to_draw(error):
    def draw(*_, **__):
        raise error

    return draw


def test_results_are_whole_before_a_picture_is_drawn_and_have_no_picture_of_before(
    tmp_path, study, fits, monkeypatch
):
    save_results(tmp_path, fits, study, {})
    monkeypatch.setattr(Figure, "savefig", fails_to_draw(OSError(28, "No space left on device")))
    with pytest.raises(OSError) as error:
        save_results(tmp_path, swept(study, [2], num_iterations=1), study, {}, 2.0)
    assert "accuracy_by_rank" in error.value.filename
    assert set(os.listdir(tmp_path)) == {
        "results.json",
        "results.csv",
        "results_long.csv",
        "weights.csv",
        "report.md",
        "K_2.safetensors",
    }
    assert strict_json(tmp_path / "results.json")["seconds"] == 2.0


def test_a_picture_that_cannot_be_drawn_costs_no_result(tmp_path, study, fits, monkeypatch, capsys):
    monkeypatch.setattr(Figure, "savefig", fails_to_draw(ValueError("cannot\x1b[2K draw")))
    save_results(tmp_path, fits, study, {})
    save_few_shot_curves(tmp_path, CURVES, study, {**CONFIG, "num_shots": [2, 3, 4]})
    save_question_curves(tmp_path, QUESTIONS, study, {"question_seeds": [0]})
    lines = capsys.readouterr().out.splitlines()
    pictures = ["accuracy_by_rank", "personal_part", "vary_fewshot", "vary_questions"]
    for name, line in zip(pictures, lines, strict=True):
        assert f"no picture {name} " in line
        assert r"cannot\x1b[2K draw" in line
        assert str(tmp_path) in line
        assert not list(tmp_path.glob(f"{name}.p*"))
    kinds = {"json", "csv", "md", "html", "tex", "safetensors"}
    assert {path.suffix[1:] for path in tmp_path.iterdir()} == kinds


def test_the_closing_table_has_the_reference_once_and_means_over_users_and_seeds(
    tmp_path, study, capsys
):
    fits = swept(study, [0, 2], [0, 0.5], [0, 1])
    results = save_results(tmp_path, fits, study, {})
    print_results(results)
    printed = capsys.readouterr().out
    head, *rows = printed.strip().split("\n\n")[0].splitlines()
    assert head.split()[:2] == ["K", "alpha"]
    expected = [(["ref", "-"], fits[:2]), (["2", "0"], fits[2:4]), (["2", "0.5"], fits[6:])]
    for row, (names, seeds) in zip(rows, expected, strict=True):
        means = [
            f"{statistics.fmean(fit.accuracies[setting].mean() for fit in seeds):.3f}"
            for setting in SETTINGS
        ]
        cells = row.split()
        assert [*cells[:2], *cells[2::3]] == [*names, *means]
    choice = "none chosen by validation, as validation_share is 0"
    assert printed.endswith(f"\n\n{choice}\n\n{results['verdict']['text']}\n")


@pytest.fixture(scope="module")
def validated(study, tmp_path_factory):
    """(Folder, held-out pairs) of a sweep with two alphas, of which validation chose a model."""
    folder = tmp_path_factory.mktemp("validated")
    study_to_train, held_out = hold_out(study, 0.3)
    fits = judge_held_out(swept(study_to_train, [0, 1, 2], [0, 0.5], [0, 1]), held_out)
    lore.results.save_results(
        folder, fits, study, {}, 1.0, evidence(fits, study), held_out=held_out
    )
    return folder, held_out


def test_the_chosen_model_is_said_marked_and_its_file_named(validated, capsys):
    folder, _ = validated
    results = strict_json(folder / "results.json")
    chosen = results["chosen"]
    best = max(results["evidence"], key=lambda entry: entry["accuracy"][VALIDATION]["mean"])
    share = best["accuracy"][VALIDATION]["mean"]
    assert (chosen["K"], chosen["alpha"]) == (best["K"], best["alpha"])
    assert chosen["file"] == best["file"]
    assert load_tensors(folder / chosen["file"])[1]["K"] == best["K"]

    print_results(results)
    table, choice, _ = capsys.readouterr().out.strip().split("\n\n")
    name = f"K = {best['K']}, alpha {best['alpha']:g}" if best["K"] else "ref"
    said = f"chosen by validation: {name}, {share:.3f}"
    assert choice == f"* {said}; its basis is in {best['file']}"
    marked = [line.split()[0] for line in table.splitlines() if "*" in line]
    assert marked == [str(best["K"] or "ref")]

    text = (folder / "report.md").read_text()
    assert f"({said}); its basis is in `{best['file']}`" in text
    assert "`*` marks the model that was chosen by validation." in text
    accuracy, *_, seeds = markdown_tables(text)
    assert [row[:1] for row in accuracy if "*" in row[0]] == [[f"{best['K'] or 'ref'} *"]]
    assert sum("*" in row[0] for row in seeds) == (2 if best["K"] else 0)


def test_if_nothing_is_chosen_nothing_is_marked(saved, capsys):
    print_results(strict_json(saved / "results.json"))
    assert "*" not in capsys.readouterr().out
    text = (saved / "report.md").read_text()
    assert "marks the model" not in text
    assert not any("*" in row[0] for table in markdown_tables(text) for row in table)


def test_the_long_table_has_a_row_per_model_seed_user_and_setting(validated, study):
    folder, held_out = validated
    table = pd.read_csv(folder / "results_long.csv", dtype={"user": str})
    assert list(table) == ["K", "alpha", "seed", "user", "setting", "pairs", "accuracy"]
    pairs = {
        TRAIN: [len(X) - len(held) for X, held in zip(study.train, held_out)],
        SEEN_TEST: [8, 8, 5],
        SETTINGS[2]: [4, 9],
        UNSEEN_TEST: [30, 6],
        VALIDATION: [len(held) for held in held_out],
    }
    expected = {}
    for fit in strict_json(folder / "results.json")["fits"]:
        for setting, accuracies in fit["accuracy_of_user"].items():
            for (user, accuracy), count in zip(accuracies.items(), pairs[setting], strict=True):
                key = (fit["K"], fit["alpha"], fit["seed"], user, setting)
                expected[key] = (count, accuracy)
    assert len(expected) == len(table) == 12 * (3 * 3 + 2 * 2)
    for *key, count, accuracy in table.itertuples(index=False):
        assert expected[tuple(key)] == (count, pytest.approx(accuracy))
        assert accuracy * count == pytest.approx(round(accuracy * count))  # so many pairs are right


def test_users_in_the_long_table_are_no_formulas(tmp_path, study, fits):
    hostile = dataclasses.replace(study, seen=["=1+1", "@b", "c\nd"])
    save_results(tmp_path, fits, hostile, {})
    users = pd.read_csv(tmp_path / "results_long.csv", dtype=str)["user"]
    assert set(users) == {"'=1+1", "'@b", "c\\nd", *UNSEEN}


def test_the_csv_has_a_row_per_model_and_the_reference_once(tmp_path, study):
    results = save_results(tmp_path, swept(study, [0, 1, 2], [0, 0.5]), study, {})
    table = pd.read_csv(tmp_path / "results.csv")
    assert table[["K", "alpha"]].values.tolist() == [[0, 0], [1, 0], [2, 0], [1, 0.5], [2, 0.5]]
    row = table.iloc[-1]
    entry = results["evidence"][-1]
    gain = entry["minus_pooled"][UNSEEN_TEST]
    for end in ("mean", "low", "high", "p"):
        assert row[f"personal_part.{end}"] == pytest.approx(entry["personal_part"][end])
        assert row[f"minus_pooled.{UNSEEN_TEST}.{end}"] == pytest.approx(gain[end])


# ---- The report


def markdown_tables(text):
    """Every table of a Markdown text, as a list of rows of cells, the headings first."""
    tables = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            head, _, *rows = [line.strip("| ").split(" | ") for line in block.splitlines()]
            tables.append([head, *rows])
    return tables


def test_the_report_says_title_and_verdict_first(saved):
    results = strict_json(saved / "results.json")
    lines = (saved / "report.md").read_text().splitlines()
    verdict, *reasons = results["verdict"]["text"].splitlines()
    assert lines[0] == f"# {TITLE}: is the reward personal?"
    assert lines[2] == f"**{verdict}**"
    assert [line for line in lines[3:] if line][: len(reasons)] == reasons


def test_the_report_explains_every_column_of_its_tables(saved):
    text = (saved / "report.md").read_text()
    explained = set(re.findall(r"^- \*\*(.+?)\*\*", text, re.MULTILINE))
    tables = markdown_tables(text)
    assert len(tables) == 5
    for head, *_ in tables:
        assert set(head) <= explained


def test_the_tables_of_the_report_have_the_numbers_of_the_results(tmp_path, study):
    results = save_results(tmp_path, swept(study, [0, 1, 2], [0, 0.5], [0, 1]), study, {})
    text = (tmp_path / "report.md").read_text()
    accuracy, controls, comparisons, basis, seeds = markdown_tables(text)
    trained = [entry for entry in results["evidence"] if entry["K"]]
    models = [[str(entry["K"]), f"{entry['alpha']:g}"] for entry in trained]

    assert [row[:2] for row in accuracy[1:]] == [["ref", "-"], *models]
    for table in (controls, comparisons, basis):
        assert [row[:2] for row in table[1:]] == models
    for row, entry in zip(accuracy[2:], trained, strict=True):
        assert row[2:] == [format_cell(entry["accuracy"][setting]) for setting in SETTINGS]
    for row, entry in zip(controls[1:], trained, strict=True):
        assert row[2:] == [format_cell(entry["controls"][key]) for key in CONTROLS]
    for row, entry in zip(comparisons[1:], trained, strict=True):
        gains = [entry[name][UNSEEN_TEST] for name in ("minus_reference", "minus_pooled")]
        worst = [entry["worst_served"], entry["served_worse"]]
        expected = [*worst, entry["personal_part"], *gains]
        assert row[2:] == [format_cell(value) for value in expected]
    for row, entry in zip(basis[1:], trained, strict=True):
        assert row[2:] == [format_cell(value) for value in entry["basis"].values()]

    fits = [fit for fit in results["fits"] if fit["K"]]
    for row, fit in zip(seeds[1:], fits, strict=True):
        assert row[2:] == [
            str(fit["seed"]),
            "yes" if fit["kept"] else "no",
            f"{fit['training_loss']:.3g}",
            f"{fit['mean_accuracy'][UNSEEN_TEST]:.3g}",
            f"`{fit['file']}`",
        ]


def test_the_report_counts_the_data_and_says_how_the_model_was_chosen(saved):
    results = strict_json(saved / "results.json")
    text = report(results)
    assert "learned from 36 pairs of 3 seen users" in text
    assert "fitted, to 13 pairs of theirs, and tested on 36 other pairs. In 3 pairs both" in text
    assert (
        "about all ranks from K = 2 on at once (none chosen by validation, as validation_share"
        in text
    )
    assert "the lowest training loss" in text
    assert "Validation had" not in text

    for entry in results["evidence"]:
        entry["accuracy"][VALIDATION] = entry["accuracy"][TRAIN]
    results["chosen"] = {"K": 3, "alpha": 0, "by": "validation", "file": "K_3.safetensors"}
    results["counts"]["validation pairs"] = 6
    text = report(results)
    share = results["evidence"][2]["accuracy"][TRAIN]["mean"]
    assert (
        f"about one model (chosen by validation: K = 3, alpha 0, {share:.3f}); its basis is in "
        "`K_3.safetensors`. The basis was learned from 30 pairs of 3 seen users. Validation had 6 "
        "other pairs of theirs."
    ) in text
    assert "the best accuracy in validation" in text
    assert f"- **{VALIDATION}**" in text


def test_the_report_of_the_demo_says_at_its_top_that_the_data_are_synthetic(tmp_path, study, fits):
    demo = dataclasses.replace(study, provenance=study.provenance | {"demo": True})
    for data, is_said in ((demo, True), (study, False)):
        results = save_results(tmp_path, fits, data, {})
        assert results["demo"] == is_said
        assert strict_json(tmp_path / "results.json")["demo"] == is_said
        for name in ("report.md", "report.html"):
            before, verdict, _ = (tmp_path / name).read_text().partition("Undecided: ")
            assert verdict and ("These data are synthetic: " in before) == is_said


def test_the_report_says_how_many_people_like_what_below_the_answer(saved):
    results = strict_json(saved / "results.json")
    answer = results["verdict"]["text"].splitlines()[0]
    text = report(results, "5 of 9 users chose this.")
    assert f"**{answer}**\n\n5 of 9 users chose this.\n\nTested: " in text
    assert f"**{answer}**\n\nTested: " in report(results)


def test_a_report_on_one_seen_and_one_unseen_user_with_a_pair_each_counts_in_the_singular(tmp_path):
    pair = [torch.ones(1, d)]
    study = studies.study_of(dict(train=pair, test=pair, train_unseen=pair, test_unseen=pair))
    save_results(tmp_path, swept(study, [0, 1, 2]), study, {})
    text = (tmp_path / "report.md").read_text()
    assert "The basis was learned from 1 pair of 1 seen user. 1 unseen user had no part in" in text
    assert "fitted, to 1 pair of theirs, and tested on 1 other pair." in text
    assert not re.search(r"\b1 (\w+ )?(users|pairs)\b", text)


def test_if_everybody_is_seen_the_report_and_the_pictures_call_nobody_unseen_beside_the_count(
    tmp_path, study, drawn
):
    seen = dataclasses.replace(
        study, unseen=study.seen, train_unseen=study.train, test_unseen=study.test
    )
    save_results(tmp_path, swept(seen, [0, 1, 2]), seen, {})
    text = (tmp_path / "report.md").read_text()
    assert "36 pairs of 3 users. No user is unseen: " in text
    assert "Tested: 3 users, all of them seen in the training, on their 21 test pairs." in text
    assert not re.search(r"\d unseen user", text)
    assert f"{TITLE}\n3 users (21 test pairs); 1 seed\n" in drawn[0].get_suptitle()


def test_without_user_weights_no_rank_is_said_to_be_judged(tmp_path, study):
    save_results(tmp_path, swept(study, [0, 1]), study, {})
    text = (tmp_path / "report.md").read_text()
    assert (
        "No model has user weights, so the verdict can only name one reward for everybody" in text
    )
    assert "all ranks from K = 2 on" not in text


NOTES = ["a user is called 'nan', with 1 rows", "rows of train: 3 | *are* <there> already"]


def odd_section(text):
    """The lines of the report's section on what is odd in the data."""
    section = text.split("## What is odd in the data\n\n")[1].split("\n\n##")[0]
    return section.splitlines()


def test_report_and_results_say_what_is_odd_in_the_data(tmp_path, study, fits):
    equal_pairs = {"a_[b].pkl": {"equal": 1200, "pairs": 2000}}
    provenance = study.provenance | {"data_notes": NOTES, "equal_pairs": equal_pairs}
    save_results(tmp_path, fits, dataclasses.replace(study, provenance=provenance), {})
    results = strict_json(tmp_path / "results.json")
    assert results["data_notes"] == NOTES
    assert results["equal_pairs"] == equal_pairs
    assert odd_section((tmp_path / "report.md").read_text()) == [
        "- a user is called 'nan', with 1 rows",
        r"- rows of train: 3 &#124; \*are\* &lt;there&gt; already",
        r"- a\_\[b\].pkl: in 1,200 of 2,000 pairs both sides have equal token ids",
    ]


def test_data_in_which_nothing_is_odd_and_data_without_notes_are_told_apart(saved):
    results = strict_json(saved / "results.json")
    assert (results["data_notes"], results["equal_pairs"]) == (None, None)
    assert odd_section(report(results))[0].startswith("Not known")
    results["data_notes"] = []
    assert odd_section(report(results)) == [
        "Nothing odd was found when the data were read. What the test repeats of the training is "
        "under Leaks."
    ]


def test_the_report_tells_no_leak_from_a_leak_that_is_not_known(saved):
    results = strict_json(saved / "results.json")
    unknown = dict.fromkeys(["by_prompt", "by_answers", "by_answer_in_prompt", "by_features"])
    results["leaks"] = {SEEN_TEST: unknown, UNSEEN_TEST: {**unknown, "by_prompt": 0.25}}
    text = report(results)
    assert f"- **{SEEN_TEST}**: prompts not known, answers not known" in text
    assert f"- **{UNSEEN_TEST}**: prompts 25.0%, answers not known" in text


def test_a_report_on_the_reference_alone_has_no_empty_tables(tmp_path, study):
    save_results(tmp_path, swept(study, [0]), study, {})
    text = (tmp_path / "report.md").read_text()
    assert len(markdown_tables(text)) == 1
    assert "No model was trained" in text
    assert "personal_part.png" not in text


def test_a_cell_is_an_interval_a_number_or_a_dash_if_it_is_not_known():
    ends = {"mean": 0.5, "low": 0.25, "high": 0.75}
    assert format_cell(ends) == "0.500 [0.250, 0.750]"
    assert format_cell({**ends, "p": 0.012345}) == "+0.500 [+0.250, +0.750], p 0.012"
    assert format_cell([1.0, 12.345]) == "1, 12.3"
    assert [format_cell(value) for value in (None, True, False, 3)] == ["-", "yes", "no", "3"]


# ---- Pictures


@pytest.mark.parametrize("released", [False, True])
def test_the_picture_shows_the_mean_and_the_band_of_every_setting(
    tmp_path, study, fits, drawn, monkeypatch, released
):
    monkeypatch.setattr(lore.pictures, "RELEASED_BAND", released)
    results = save_results(tmp_path, fits, study, {})
    for name in ("accuracy_by_rank", "personal_part"):
        assert is_a_picture(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    title = drawn[0].get_suptitle()
    assert TITLE in title
    assert "3 seen, 2 unseen users (36 test pairs); 1 seed\n" in title
    for setting, axes in zip(SETTINGS, drawn[0].axes, strict=True):
        assert axes.get_title() == setting
        per_user = np.array([fit.accuracies[setting] for fit in fits])  # (models, users)
        _, reference, curve = axes.lines  # the first is the level of chance
        heights = [*reference.get_ydata(), *curve.get_ydata()]
        np.testing.assert_allclose(heights, per_user.mean(1))
        if released:
            low = per_user[1:].mean(1) - per_user[1:].std(1) / 4
            high = per_user[1:].mean(1) + per_user[1:].std(1) / 4
        else:
            trained = [entry["accuracy"][setting] for entry in results["evidence"][1:]]
            low = [ends["low"] for ends in trained]
            high = [ends["high"] for ends in trained]
        y = axes.collections[-1].get_paths()[0].vertices[:, 1]
        assert (y.min(), y.max()) == pytest.approx((min(low), max(high)))
        assert [label.get_text() for label in axes.get_xticklabels()] == ["ref", "1", "3"]


def test_the_picture_of_the_personal_part_shows_whose_weights_predict_what(
    tmp_path, study, fits, drawn
):
    results = save_results(tmp_path, fits, study, {})
    accuracy, personal = drawn[2].axes  # after PNG and PDF of the accuracies
    entry = results["evidence"][2]  # K = 3, the only model with a personal part
    heights = [line.get_ydata().tolist() for line in accuracy.lines if line.get_marker() == "o"]
    controls = entry["controls"]
    expected = [
        entry["accuracy"][UNSEEN_TEST],
        controls["mean_weights"],
        controls["other_users"],
        controls["model_per_user"],
        entry["worst_served"],
    ]
    assert heights == [[ends["mean"]] for ends in expected]
    assert personal.lines[-1].get_ydata().tolist() == [entry["personal_part"]["mean"]]
    assert {text.get_text() for text in accuracy.texts} == {
        "chance",
        "own weights",
        "everybody's mean weights",
        "other users' weights",
        "a model per user",
        "worst tenth, own weights",
    }
    assert {text.get_text() for text in personal.texts} == {"nothing personal", "own weights"}


def test_without_K_1_the_picture_has_no_model_per_user(tmp_path, study, drawn):
    save_results(tmp_path, swept(study, [2]), study, {})
    names = {text.get_text() for text in drawn[2].axes[0].texts}
    assert "own weights" in names
    assert "a model per user" not in names


def test_four_settings_are_two_by_two_and_a_fifth_panel_leaves_its_neighbour_out(study, drawn):
    point = {"row": "accuracy", "line": "b", "x": 1, "mean": 0.5, "low": 0.4, "high": 0.75}
    for panels in (4, 5):
        points = [point | {"column": str(i)} for i in range(panels)]
        points += [point | {"x": 2} for point in points]
        figure = lore.pictures.small_multiples(studies.described_results("planted"), points, "x")
        figure.draw_without_rendering()
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert [axes.get_title() for axes in shown] == [str(i) for i in range(panels)]
        corners = np.array([axes.get_position().p0 for axes in shown]).round(3)
        assert len(set(corners[:, 0])) == 2 and len(set(corners[:, 1])) == -(-panels // 2)
        assert [bool(axes.texts) for axes in shown] == [False, True, False, True, True][:panels]
        assert figure.get_figwidth() < 5.5
        for axes in shown:
            assert any(label.get_window_extent().width for label in axes.get_xticklabels())


def test_several_rows_of_panels_have_a_column_for_each_penalty():
    point = {"line": "b", "x": 1, "mean": 0.5, "low": 0.4, "high": 0.75}
    points = [point | {"row": row, "column": column} for row in "ab" for column in "cde"]
    figure = lore.pictures.small_multiples(studies.described_results("planted"), points, "x")
    assert [axes.get_title() for axes in figure.axes] == ["c", "d", "e", "", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["a", "", "", "b", "", ""]


def test_every_penalty_has_its_own_curve_named_at_its_end(tmp_path, study, drawn):
    save_results(tmp_path, swept(study, [1, 2], [0, 0.5]), study, {})
    names = {text.get_text() for text in drawn[0].axes[3].texts}
    assert names == {"chance", "alpha 0", "alpha 0.5"}
    colors = {str(line.get_color()) for line in drawn[0].axes[0].lines}
    assert len(colors) == 3  # one of chance, and one of each penalty


def picture_of(*means):
    """A picture with a level curve of each mean."""
    results = studies.described_results("planted")
    points = [
        {
            "row": "accuracy",
            "column": "a",
            "line": str(i),
            "x": x,
            "mean": mean,
            "low": mean - 0.1,
            "high": mean + 0.1,
        }
        for i, mean in enumerate(means)
        for x in (0, 1)
    ]
    return lore.pictures.small_multiples(results, points, "x")


def test_names_in_a_picture_do_not_lie_over_each_other():
    figure = picture_of(0.5, 0.501, 0.502, 0.7)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) == 5
    for lower, upper in zip(boxes, boxes[1:]):
        assert lower.y1 <= upper.y0 + 1


@pytest.mark.parametrize("gap", [0.0, 0.1, 1.0])
def test_heights_are_spread_as_little_as_needed(gap):
    heights = np.array([0.0, 0.05, 0.07, 2.5])
    spread = lore.pictures.spread(heights, gap)
    assert (np.diff(spread) >= gap - 1e-9).all()
    assert spread.mean() == pytest.approx(heights.mean())  # as many go up as down
    if gap == 0:
        np.testing.assert_allclose(spread, heights)


def test_more_than_three_curves_have_bars_side_by_side():
    three = picture_of(0.5, 0.6, 0.7).axes[0]
    four = picture_of(0.5, 0.6, 0.7, 0.8).axes[0]
    starts = [[line.get_xdata()[0] for line in axes.lines[1:]] for axes in (three, four)]
    assert starts[0] == [0, 0, 0]
    assert starts[1] == pytest.approx([-0.18, -0.06, 0.06, 0.18])


NOTEBOOK = """
import os, sys, lore.pictures, lore.results, utils
slow_to_load = {"matplotlib", "scipy.stats", "scipy.optimize", "sklearn"}
assert not slow_to_load & sys.modules.keys()
for name in ("module://of_a_notebook", "no backend"):
    if os.fork() == 0:
        os.environ["MPLBACKEND"] = name
        results = {
            "config": {"data": "planted"},
            "counts": {"seen users": 3, "unseen users": 2, "test unseen pairs": 36},
            "users": ["a", "b", "c"],
            "unseen_users": ["d", "e"],
            "seeds": [0],
        }
        point = {"row": "accuracy", "column": "a", "line": "b", "rank K": 2}
        point |= {"mean": 0.5, "low": 0.4, "high": 0.75}
        figure = lore.pictures.small_multiples(results, [point], "rank K")
        lore.pictures.save_picture(sys.argv[1], name[:6], figure)
        break
    os.wait()
"""


def test_pictures_are_drawn_whatever_a_notebooks_backend_and_loaded_for_no_sooner(tmp_path):
    status, _, err = outcome(fresh_process(NOTEBOOK, tmp_path, DISPLAY=""))
    assert (status, err) == (0, "")
    assert is_a_picture(tmp_path / "module.png")
    assert is_a_picture(tmp_path / "no bac.png")


# ---- The number of shots

CONFIG = {"K_list": [2, 1], "alpha_list": [0, 0.5], "num_shots": [2, 4, 6], "trials": 2}
CURVE_NAMES = ("few_shot_train_mean", "few_shot_train_std", "unseen_mean", "unseen_std")


class FewShotCurves(list):
    """What `run_few_shot_vary_shots` returns: four lists, and the rows behind them."""

    def __init__(self, rows):
        """Four lists over alphas, ranks and numbers of shots, each of 12 distinct values."""
        super().__init__([(12 * part + i) / 100 for i in range(12)] for part in range(4))
        self.rows = rows


def few_shot_rows():
    """Random accuracies of two users for each alpha, rank and number of shots."""
    rows = []
    for alpha in CONFIG["alpha_list"]:
        for K in CONFIG["K_list"]:
            for shots in CONFIG["num_shots"]:
                row = {"K": K, "alpha": alpha, "shots": shots}
                for i, setting in enumerate(UNSEEN_SETTINGS):
                    row[setting] = np.random.default_rng([K, shots, i]).random(2) + alpha
                rows.append(row)
    return rows


ROWS = few_shot_rows()
CURVES = FewShotCurves(ROWS)


@pytest.fixture(scope="module")
def saved_curves(study, tmp_path_factory):
    """A folder with the files of `CURVES`, to be read only."""
    folder = tmp_path_factory.mktemp("curves")
    save_few_shot_curves(folder, CURVES, study, CONFIG)
    return folder


def test_the_curves_are_saved_with_what_they_are_of(saved_curves):
    results = strict_json(saved_curves / "vary_fewshot.json")
    assert results["config"] == {"data": TITLE, "model": "a/model", **CONFIG}
    assert results["users"] == SEEN
    assert results["unseen_users"] == UNSEEN
    assert results["identity"] == IDENTITY
    models = [(curve["alpha"], curve["K"]) for curve in results["curves"]]
    assert models == [(0, 2), (0, 1), (0.5, 2), (0.5, 1)]
    for name, values in zip(CURVE_NAMES, CURVES, strict=True):
        assert [value for curve in results["curves"] for value in curve[name]] == values


def test_the_curves_replace_their_own_files_and_the_questions_and_nothing_else(tmp_path, study):
    checkpoint = lore.files.FEW_SHOT_CHECKPOINT_FILE  # the script clears it
    for name in ("results.json", "vary_fewshot.csv", "vary_questions.csv", checkpoint):
        (tmp_path / name).write_text("of an earlier run")
    save_few_shot_curves(tmp_path, CURVES, study, CONFIG)
    assert set(os.listdir(tmp_path)) == {
        "results.json",
        checkpoint,
        *(f"vary_fewshot.{form}" for form in ("json", "csv", "tex", "png", "pdf")),
    }
    assert (tmp_path / "results.json").read_text() == "of an earlier run"
    assert (tmp_path / "vary_fewshot.csv").read_text() != "of an earlier run"
    assert is_a_picture(tmp_path / "vary_fewshot.png")


def test_the_csv_of_the_curves_has_means_over_users_with_their_intervals(saved_curves):
    table = pd.read_csv(saved_curves / "vary_fewshot.csv")
    assert sorted(table.columns) == ["K", "alpha", "high", "low", "mean", "setting", "shots"]
    assert len(table) == 2 * len(ROWS)
    points = table.set_index(["K", "alpha", "shots", "setting"])
    for row in ROWS:
        for setting in UNSEEN_SETTINGS:
            point = points.loc[row["K"], row["alpha"], row["shots"], setting]
            # That of two users reaches from the one to the other, widened to Student's t.
            mean = row[setting].mean()
            half = np.ptp(row[setting]) / 2 * t.ppf(0.975, 1) / norm.ppf(0.975) * 2**0.5
            expected = (mean, max(mean - half, 0), min(mean + half, 1))
            assert (point["mean"], point["low"], point["high"]) == pytest.approx(expected)


def test_the_picture_of_the_curves_has_a_panel_per_setting_and_alpha(tmp_path, study, drawn):
    save_few_shot_curves(tmp_path, CURVES, study, CONFIG)
    panels = [(setting, alpha) for setting in UNSEEN_SETTINGS for alpha in CONFIG["alpha_list"]]
    for axes, (setting, alpha) in zip(drawn[0].axes, panels, strict=True):
        heights = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "o"]
        expected = [
            [row[setting].mean() for row in ROWS if (row["K"], row["alpha"]) == (K, alpha)]
            for K in CONFIG["K_list"]
        ]
        assert heights == expected
    names = {text.get_text() for text in drawn[0].axes[1].texts}
    assert names == {"chance", "K = 1", "K = 2"}


def test_the_few_shot_table_has_the_reference_once(tmp_path, study):
    with_reference = FewShotCurves([{**row, "K": row["K"] - 1} for row in ROWS])
    table = save_few_shot_curves(tmp_path, with_reference, study, CONFIG)
    assert table.columns.tolist() == ["K = 1, alpha 0", "ref", "K = 1, alpha 0.5"]
    assert table.index.tolist() == [2, 4, 6]
    assert (tmp_path / "vary_fewshot.tex").read_text().count("ref") == 1


def test_if_users_have_fewer_pairs_console_json_and_picture_say_so(tmp_path, study, drawn, capsys):
    save_few_shot_curves(tmp_path, CURVES, study, CONFIG)  # the unseen users have 4 and 9 pairs
    printed = capsys.readouterr().out
    assert "not every unseen user has more than 4 pairs" in printed
    assert "of 6 asked for, the mean user has 5.0" in printed
    results = strict_json(tmp_path / "vary_fewshot.json")
    assert results["shots_are"] == "pairs"
    assert results["shots_of_the_mean_user"] == [2, 4, 5]
    assert "not every unseen user has more than 4 pairs" in drawn[0].get_suptitle()


def test_if_users_have_enough_pairs_nothing_is_said(tmp_path, study, drawn, capsys):
    save_few_shot_curves(tmp_path, CURVES, study, {**CONFIG, "num_shots": [2, 3, 4]})
    assert capsys.readouterr().out == ""
    assert "not every" not in drawn[0].get_suptitle()


@pytest.fixture(scope="module")
def study_with_conversations(study):
    groups = [torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 6])]
    return dataclasses.replace(study, groups={"train_unseen": groups})


def test_shots_of_conversations_are_counted_in_conversations(
    tmp_path, study_with_conversations, drawn, capsys
):
    config = {**CONFIG, "shots_are": "conversations"}
    save_few_shot_curves(tmp_path, CURVES, study_with_conversations, config)
    results = strict_json(tmp_path / "vary_fewshot.json")
    assert results["shots_are"] == "conversations"
    assert results["shots_of_the_mean_user"] == [2, 3.5, 4.5]
    assert "not every unseen user has more than 3 conversations" in capsys.readouterr().out
    assert drawn[0].get_supxlabel() == "conversations per unseen user"


def test_shots_are_pairs_unless_the_settings_say_otherwise(
    tmp_path, study, study_with_conversations
):
    conversations = {**CONFIG, "shots_are": "conversations"}
    for of_pairs, config in ((study_with_conversations, CONFIG), (study, conversations)):
        save_few_shot_curves(tmp_path, CURVES, of_pairs, config)
        results = strict_json(tmp_path / "vary_fewshot.json")
        assert results["shots_are"] == "pairs"
        assert results["shots_of_the_mean_user"] == [2, 4, 5]


def test_shots_in_an_array_in_any_order_say_what_the_mean_user_has_of_the_most(
    tmp_path, study, capsys
):
    config = {**CONFIG, "num_shots": np.array([6, 4, 2])}
    save_few_shot_curves(tmp_path, CURVES, study, config)
    expected = np.mean([min(6, len(X)) for X in study.train_unseen])
    assert f"of 6 asked for, the mean user has {expected:.1f}" in capsys.readouterr().out
    assert strict_json(tmp_path / "vary_fewshot.json")["shots_of_the_mean_user"][0] == expected


# ---- The number of questions

QUESTIONS = pd.DataFrame(
    [
        {
            "K": 2,
            "alpha": 0.5,
            "fit": fit,
            "questions": questions,
            "mean": mean + questions / 100,
            "low": mean,
            "high": mean + 0.1,
        }
        for fit, mean in (("widened prior, random", 0.5), ("widened prior, chosen", 0.75))
        for questions in (1, 2)
    ]
)


def test_question_curves_are_saved_with_what_they_are_of(tmp_path, study, drawn):
    config = {"question_seeds": [0, 1]}
    save_question_curves(tmp_path, QUESTIONS, study, config)
    assert set(os.listdir(tmp_path)) == {
        f"vary_questions.{form}" for form in ("json", "csv", "png", "pdf")
    }
    expected = QUESTIONS.assign(model="K = 2, alpha 0.5")
    results = strict_json(tmp_path / "vary_questions.json")
    assert results["config"] == {"data": TITLE, "model": "a/model", "question_seeds": [0, 1]}
    assert results["identity"] == IDENTITY
    assert results["seeds"] == [0, 1]
    assert results["curves"] == expected.to_dict("records")
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "vary_questions.csv"), expected, check_dtype=False
    )
    assert is_a_picture(tmp_path / "vary_questions.png")
    assert "2 seeds" in drawn[0].get_suptitle()
    heights = [line.get_ydata().tolist() for line in drawn[0].axes[0].lines[1:]]
    assert heights == [curve["mean"].tolist() for _, curve in QUESTIONS.groupby("fit", sort=False)]


def test_without_question_curves_nothing_is_written(tmp_path, study):
    (tmp_path / "vary_questions.csv").write_text("of an earlier run")
    save_question_curves(tmp_path, pd.DataFrame([]), study, {"question_seeds": [0]})
    assert os.listdir(tmp_path) == ["vary_questions.csv"]


def test_the_question_table_has_a_row_per_number_of_questions():
    lines = question_table(QUESTIONS).splitlines()
    assert "K = 2, alpha 0.5" in lines[0]
    assert "widened prior, random" in lines[1] and "widened prior, chosen" in lines[1]
    last = lines[-1].split()
    assert last[0] == "2"
    assert "0.520 [0.500, 0.600]" in lines[-1] and "0.770 [0.750, 0.850]" in lines[-1]
