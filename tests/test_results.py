"""What a sweep leaves in results/: numbers, bases and pictures that say of which model and data they are."""

import contextlib
import io
import json
import os
import statistics

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import fresh_process, outcome, random_users
from matplotlib.figure import Figure

import lore.files
import lore.pictures
import lore.results
import utils
from lore.evidence import evidence
from lore.files import load_tensors
from lore.results import save_few_shot_curves
from utils import SETTINGS

pytestmark = pytest.mark.usefixtures("one_thread")

d, SEEN, UNSEEN = 6, ["worker é", "b", "7"], ["x", "y"]
ABOUT = {
    "model": "a/model",
    "title": "A data set (own)",
    "identity": {"model": "123abc", "data": "456def"},
}
PARTS = "train", "test", "train_unseen", "test_unseen"


@pytest.fixture(scope="module")
def data():
    counts = dict(zip(PARTS, ((9, 20, 7), (8, 8, 5), (4, 9), (30, 6))))
    data = {part: random_users(counts[part], d, seed) for seed, part in enumerate(PARTS)}
    data["train"][1][3] = data["test_unseen"][0][:2] = 0  # three pairs of two equal sides
    return {"seen": SEEN, "unseen": UNSEEN, **data}


def swept(data, K_list=(0, 1, 3), alpha_list=(0,), seed=0, num_iterations=10):
    fits = []
    with contextlib.redirect_stdout(io.StringIO()):
        utils.run(
            K_list,
            alpha_list,
            torch.ones(d, 1),
            *(data[part] for part in PARTS),
            3,
            2,
            "cpu",
            seed=seed,
            num_iterations=num_iterations,
            fits=fits,
        )
    return fits


@pytest.fixture(scope="module")
def fits(data):
    return swept(data)


def save_results(folder, fits, data, config, seconds=1.0):
    return lore.results.save_results(
        folder, fits, data, ABOUT, config, seconds, evidence(fits, data, torch.ones(d, 1))
    )


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved from here on."""
    figures, savefig = [], Figure.savefig

    def watched(figure, *arguments, **options):
        figures.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    return figures


def is_a_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------------------------
# Of a sweep
# ---------------------------------------------------------------------------------------------------------------------


def test_the_results_hold_every_accuracy_of_every_user_and_what_made_them(tmp_path, data, fits):
    config = {"K_list": [0, 1, 3], "seeds": range(1), "fractions": np.array([0.5, 1])}
    save_results(tmp_path, fits, data, config, 12.5)
    results = strict_json(tmp_path / "results.json")
    assert results["config"] == {
        "data": "A data set (own)",
        "model": "a/model",
        "K_list": [0, 1, 3],
        "seeds": [0],
        "fractions": [0.5, 1.0],
    }
    assert (
        results["users"] == SEEN
        and results["unseen_users"] == UNSEEN
        and results["identity"] == ABOUT["identity"]
    )
    assert results["seeds"] == [0] and results["seconds"] == 12.5
    assert results["counts"] == {
        "seen users": 3,
        "unseen users": 2,
        "d": d,
        "train pairs": 36,
        "test pairs": 21,
        "train unseen pairs": 13,
        "test unseen pairs": 36,
        "pairs with equal sides": 3,
    }
    assert torch.__version__.startswith(results["versions"]["torch"])
    assert {"python", "numpy"} <= results["versions"].keys()
    assert [entry["K"] for entry in results["fits"]] == [0, 1, 3]
    for entry, fit in zip(results["fits"], fits, strict=True):
        assert (entry["training_loss"] is None) == (fit.K == 0) and entry["columns"] == max(
            fit.K, 1
        )
        for setting, part, W in zip(SETTINGS, PARTS, (fit.W, fit.W, fit.W_unseen, fit.W_unseen)):
            users = UNSEEN if "unseen" in part else SEEN
            of_user = {
                user: sum(m > 0 for m in (X.double() @ fit.V.double() @ w.double()).tolist())
                / len(X)
                for user, X, w in zip(users, data[part], W, strict=True)
            }
            assert entry["accuracy_of_user"][setting] == pytest.approx(of_user)
            assert entry["mean_accuracy"][setting] == pytest.approx(
                statistics.fmean(of_user.values())
            )
            assert entry["std_over_users"][setting] == pytest.approx(
                statistics.pstdev(of_user.values())
            )


def test_a_saved_basis_gives_the_accuracies_again_and_names_its_model_and_data(
    tmp_path, data, fits
):
    save_results(tmp_path, fits, data, {"num_iterations": 10})
    for entry, fit in zip(strict_json(tmp_path / "results.json")["fits"], fits, strict=True):
        tensors, about = load_tensors(tmp_path / entry["file"])
        assert all(
            torch.equal(tensors[name], getattr(fit, name)) for name in ("V", "W", "W_unseen")
        )
        assert [
            utils.evaluate_model(X, tensors["V"], w)
            for X, w in zip(data["test_unseen"], tensors["W_unseen"])
        ] == (pytest.approx(list(entry["accuracy_of_user"][SETTINGS[3]].values())))
        assert (about["K"], about["alpha"], about["seed"]) == (fit.K, fit.alpha, fit.seed)
        assert (
            about["identity"] == ABOUT["identity"]
            and about["users"] == SEEN
            and about["unseen_users"] == UNSEEN
        )
        assert about["config"] == {"data": ABOUT["title"], "model": "a/model", "num_iterations": 10}
        assert about["versions"] == strict_json(tmp_path / "results.json")["versions"]


def test_files_of_an_earlier_sweep_and_the_state_of_the_training_go_and_others_stay(
    tmp_path, data, fits
):
    for name in (
        "K_7.safetensors",
        "K_3_seed_1.safetensors",
        "notes.txt",
        "vary_fewshot.json",
        lore.files.CHECKPOINT_FILE,
    ):
        (tmp_path / name).write_text("old")
    save_results(tmp_path, fits, data, {})
    assert set(os.listdir(tmp_path)) == {
        "K_0.safetensors",
        "K_1.safetensors",
        "K_3.safetensors",
        "results.json",
        "results.csv",
        "report.md",
        "accuracy_by_rank.png",
        "accuracy_by_rank.pdf",
        "personal_part.png",
        "personal_part.pdf",
        "notes.txt",
        "vary_fewshot.json",
    }


def test_every_penalty_and_seed_has_a_file_of_its_own_without_a_seed_that_of_the_lowest_loss(
    tmp_path, data
):
    fits = swept(data, [2], [0, 0.5], [0, 1], num_iterations=2)
    save_results(tmp_path, fits, data, {})
    results = strict_json(tmp_path / "results.json")
    assert results["seeds"] == [0, 1]
    assert [(fit["alpha"], fit["seed"]) for fit in results["fits"]] == [
        (0, 0),
        (0, 1),
        (0.5, 0),
        (0.5, 1),
    ]
    files = [fit["file"] for fit in results["fits"]]
    assert len(set(files)) == 4 and set(files) == {
        path.name for path in tmp_path.glob("*.safetensors")
    }
    for fit in results["fits"]:
        assert load_tensors(tmp_path / fit["file"])[1]["seed"] == fit["seed"]
        lowest = min(other.loss for other in fits if other.alpha == fit["alpha"])
        assert fit["kept"] == ("seed" not in fit["file"]) == (fit["training_loss"] == lowest)


def test_a_failure_leaves_the_results_of_before_and_nothing_else(tmp_path, data, fits, monkeypatch):
    save_results(tmp_path, fits, data, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", no_space)  # what is written last
    with pytest.raises(OSError) as error:
        save_results(tmp_path, swept(data, [2], num_iterations=1), data, {}, 2.0)
    assert "accuracy_by_rank" in error.value.filename
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_closing_table_has_the_reference_once_and_means_over_users_and_seeds(
    tmp_path, data, capsys
):
    fits = swept(data, [0, 2], [0, 0.5], [0, 1])
    results = save_results(tmp_path, fits, data, {})
    lore.results.print_results(results)
    head, *rows = capsys.readouterr().out.strip().split("\n\n")[0].splitlines()
    assert head.split()[:2] == ["K", "alpha"]
    expected = [["ref", "-"], ["2", "0"], ["2", "0.5"]]
    for row, names, pair in zip(rows, expected, [fits[:2], fits[2:4], fits[6:]], strict=True):
        means = [
            f"{statistics.fmean(fit.accuracies[s].mean() for fit in pair):.3f}" for s in SETTINGS
        ]
        cells = row.split()
        assert [*cells[:2], *cells[2::3]] == [*names, *means]


def test_the_report_says_the_verdict_first_and_the_csv_has_a_row_per_model(tmp_path, data):
    results = save_results(tmp_path, swept(data, [0, 1, 2], [0, 0.5]), data, {})
    text = (tmp_path / "report.md").read_text()
    assert text.splitlines()[2] == f"**{results['verdict']['text'].splitlines()[0]}**"
    table = pd.read_csv(tmp_path / "results.csv")
    assert table[["K", "alpha"]].values.tolist() == [
        [0, 0],
        [1, 0],
        [2, 0],
        [1, 0.5],
        [2, 0.5],
    ]  # the reference once
    row, entry = table.iloc[-1], results["evidence"][-1]
    for end in ("mean", "low", "high", "p"):
        assert row[f"personal_part.{end}"] == pytest.approx(entry["personal_part"][end])
        assert row[f"minus_pooled.{SETTINGS[3]}.{end}"] == pytest.approx(
            entry["minus_pooled"][SETTINGS[3]][end]
        )


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("released", [False, True])
def test_the_picture_shows_the_mean_and_the_band_of_every_setting(
    tmp_path, data, fits, drawn, monkeypatch, released
):
    monkeypatch.setattr(lore.pictures, "RELEASED_BAND", released)
    results = save_results(tmp_path, fits, data, {})
    for name in ("accuracy_by_rank", "personal_part"):
        assert is_a_picture(tmp_path / f"{name}.png") and (
            tmp_path / f"{name}.pdf"
        ).read_bytes().startswith(b"%PDF")
    assert (
        ABOUT["title"] in drawn[0].get_suptitle()
        and "3 seen, 2 unseen users, 1 seed" in drawn[0].get_suptitle()
    )
    for setting, axes in zip(SETTINGS, drawn[0].axes, strict=True):
        assert axes.get_title() == setting
        of_user = np.array([fit.accuracies[setting] for fit in fits])
        chance, of_reference, curve = axes.lines
        np.testing.assert_allclose([*of_reference.get_ydata(), *curve.get_ydata()], of_user.mean(1))
        low, high = (
            of_user[1:].mean(1) - of_user[1:].std(1) / 4,
            of_user[1:].mean(1) + of_user[1:].std(1) / 4,
        )
        if not released:
            low, high = (
                [entry["accuracy"][setting][end] for entry in results["evidence"][1:]]
                for end in ("low", "high")
            )
        y = axes.collections[-1].get_paths()[0].vertices[:, 1]
        assert (y.min(), y.max()) == pytest.approx((min(low), max(high)))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ref", "1", "3"]


def test_every_penalty_has_its_own_curve_named_at_its_end(tmp_path, data, drawn):
    save_results(tmp_path, swept(data, [1, 2], [0, 0.5]), data, {})
    assert {text.get_text() for text in drawn[0].axes[3].texts} == {
        "chance",
        "alpha 0",
        "alpha 0.5",
    }
    colors = {
        line.get_color() if isinstance(line.get_color(), str) else tuple(line.get_color())
        for line in drawn[0].axes[0].lines
    }
    assert len(colors) == 3  # chance, and one for each penalty


ABOUT_A_PICTURE = {
    "config": {"data": "of"},
    "counts": {"seen users": 3, "unseen users": 2},
    "seeds": [0],
}


def picture_of(*means):
    """A picture of curves that are level."""
    return lore.pictures.small_multiples(
        ABOUT_A_PICTURE,
        [
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
        ],
        "x",
    )


def test_names_in_a_picture_do_not_lie_over_each_other():
    figure = picture_of(0.5, 0.501, 0.502, 0.7)
    figure.draw_without_rendering()
    boxes = sorted(
        (text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0
    )
    assert len(boxes) == 5
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in zip(boxes, boxes[1:]))


NOTEBOOK = """
import os, sys, lore.pictures, lore.results, utils
assert not {"matplotlib", "scipy.stats", "scipy.optimize", "sklearn"} & sys.modules.keys()  # each takes a second
for name in ("module://of_a_notebook", "no backend"):
    if os.fork() == 0:
        os.environ["MPLBACKEND"] = name
        about = {"config": {"data": "of"}, "counts": {"seen users": 3, "unseen users": 2}, "seeds": [0]}
        point = {"row": "accuracy", "column": "a", "line": "b", "rank K": 2, "mean": 0.5, "low": 0.4, "high": 0.75}
        lore.pictures.save_picture(sys.argv[1], name[:6], lore.pictures.small_multiples(about, [point], "rank K"))
        break
    os.wait()
"""


def test_pictures_are_drawn_whatever_a_notebooks_backend_and_loaded_for_no_sooner(tmp_path):
    status, _, err = outcome(fresh_process(NOTEBOOK, tmp_path, DISPLAY=""))
    assert (status, err) == (0, "")
    assert is_a_picture(tmp_path / "module.png") and is_a_picture(tmp_path / "no bac.png")


# ---------------------------------------------------------------------------------------------------------------------
# Of the number of shots
# ---------------------------------------------------------------------------------------------------------------------

CONFIG = {"K_list": [2, 1], "alpha_list": [0, 0.5], "num_shots": [2, 4, 6], "trials": 2}


def curves(start=0.0):
    """Four lists, over penalties, ranks and numbers of shots, each of 12 distinct values."""
    return tuple([start + (12 * part + i) / 100 for i in range(12)] for part in range(4))


OF_USERS = [
    {
        "K": K,
        "alpha": alpha,
        "shots": shots,
        **{
            s: np.random.default_rng([K, shots, i]).random(2) + alpha
            for i, s in enumerate(SETTINGS[2:])
        },
    }
    for alpha in CONFIG["alpha_list"]
    for K in CONFIG["K_list"]
    for shots in CONFIG["num_shots"]
]


def test_the_curves_are_told_apart_and_say_what_they_are_of(tmp_path, data, drawn, capsys):
    (tmp_path / lore.files.FEW_SHOT_CHECKPOINT_FILE).write_text("state")
    (tmp_path / "results.json").write_text("of the sweep")
    save_few_shot_curves(tmp_path, curves(), OF_USERS, data, ABOUT, CONFIG)
    assert set(os.listdir(tmp_path)) == {
        "results.json",
        *map("vary_fewshot.{}".format, ("json", "csv", "tex", "png", "pdf")),
    }
    assert is_a_picture(tmp_path / "vary_fewshot.png")
    results = strict_json(tmp_path / "vary_fewshot.json")
    assert results["config"] == {"data": ABOUT["title"], "model": "a/model", **CONFIG}
    assert (
        results["users"] == SEEN
        and results["unseen_users"] == UNSEEN
        and results["identity"] == ABOUT["identity"]
    )
    assert [(c["alpha"], c["K"]) for c in results["curves"]] == [(0, 2), (0, 1), (0.5, 2), (0.5, 1)]
    names = "few_shot_train_mean", "few_shot_train_std", "unseen_mean", "unseen_std"
    for name, values in zip(names, curves()):
        assert [v for curve in results["curves"] for v in curve[name]] == values
    table = pd.read_csv(tmp_path / "vary_fewshot.csv")
    assert sorted(set(table.columns)) == ["K", "alpha", "high", "low", "mean", "setting", "shots"]
    for row in OF_USERS:
        for setting in SETTINGS[2:]:
            found = table[
                (table.K == row["K"])
                & (table.alpha == row["alpha"])
                & (table.shots == row["shots"])
                & (table.setting == setting)
            ].iloc[0]
            assert (found["mean"], found.low, found.high) == pytest.approx(
                (row[setting].mean(), *sorted(row[setting]))
            )
    for axes, (setting, alpha) in zip(
        drawn[0].axes, [(s, a) for s in SETTINGS[2:] for a in (0, 0.5)], strict=True
    ):
        lines = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "o"]
        assert lines == [
            [row[setting].mean() for row in OF_USERS if (row["K"], row["alpha"]) == (K, alpha)]
            for K in CONFIG["K_list"]
        ]
    assert {text.get_text() for text in drawn[0].axes[1].texts} == {"chance", "K = 1", "K = 2"}


def test_the_reference_stands_in_the_few_shot_table_once(tmp_path, data, capsys):
    rows = [{**row, "K": row["K"] - 1} for row in OF_USERS]
    table = save_few_shot_curves(tmp_path, curves(), rows, data, ABOUT, CONFIG)
    assert table.columns.tolist() == [
        "K = 1, alpha 0",
        "ref",
        "K = 1, alpha 0.5",
    ] and table.index.tolist() == [2, 4, 6]
    assert (tmp_path / "vary_fewshot.tex").read_text().count("ref") == 1


def test_where_users_have_fewer_pairs_it_is_said_on_the_console_in_the_json_and_in_the_picture(
    tmp_path, data, drawn, capsys
):
    save_few_shot_curves(
        tmp_path, curves(), OF_USERS, data, ABOUT, CONFIG
    )  # of unseen users with 4 and 9 pairs
    assert (
        "from 5 pairs on" in (out := capsys.readouterr().out)
        and "of 6 the mean user has 5.0" in out
    )
    results = strict_json(tmp_path / "vary_fewshot.json")
    assert results["shots_are"] == "pairs" and results["shots_of_the_mean_user"] == [2, 4, 5]
    assert "from 5 pairs on not every unseen user has so many" in drawn[0].get_suptitle()
    save_few_shot_curves(
        tmp_path, curves(), OF_USERS, data, ABOUT, {**CONFIG, "num_shots": [2, 3, 4]}
    )
    assert capsys.readouterr().out == "" and "not every" not in drawn[-1].get_suptitle()


def test_shots_of_groups_are_counted_in_groups(tmp_path, data, drawn, capsys):
    groups = [torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 6])]
    save_few_shot_curves(tmp_path, curves(), OF_USERS, data, ABOUT, CONFIG, groups)
    results = strict_json(tmp_path / "vary_fewshot.json")
    assert results["shots_are"] == "conversations" and results["shots_of_the_mean_user"] == [
        2,
        3.5,
        4.5,
    ]
    assert "from 4 conversations on" in capsys.readouterr().out
    assert drawn[0].get_supxlabel() == "conversations per unseen user"


def test_shots_in_an_array_in_any_order_say_what_the_mean_user_has_of_the_most(
    tmp_path, data, capsys
):
    (tmp_path / "vary_questions.csv").write_text("of an earlier run")
    shots = np.array([6, 4, 2])
    save_few_shot_curves(tmp_path, curves(), OF_USERS, data, ABOUT, {**CONFIG, "num_shots": shots})
    has = [len(X) for X in data["train_unseen"]]
    expected = np.mean([min(6, m) for m in has])
    assert f"of 6 the mean user has {expected:.1f}" in capsys.readouterr().out or min(has) >= 6
    assert strict_json(tmp_path / "vary_fewshot.json")["shots_of_the_mean_user"][0] == expected
    assert not (tmp_path / "vary_questions.csv").exists()
