"""What a sweep leaves in results/: numbers, bases and pictures that say of which model and data they are."""

import contextlib
import io
import json
import os
import statistics

import numpy as np
import pytest
import torch
from helpers import fresh_process, outcome, random_users
from matplotlib.figure import Figure

import utils
from utils import SETTINGS, load_tensors, save_few_shot_curves, save_results

pytestmark = pytest.mark.usefixtures("one_thread")

d, SEEN, UNSEEN = 6, ["worker é", "b", "7"], ["x", "y"]
ABOUT = {"model": "a/model", "title": "A data set (own)", "identity": {"model": "123abc", "data": "456def"}}
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
        utils.run(K_list, alpha_list, torch.ones(d, 1), *(data[part] for part in PARTS), 3, 2, "cpu", seed=seed,
                  num_iterations=num_iterations, fits=fits)
    return fits


@pytest.fixture(scope="module")
def fits(data):
    return swept(data)


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


def texts(figure):
    """The legend's lines."""
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def is_a_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------------------------
# Of a sweep
# ---------------------------------------------------------------------------------------------------------------------


def test_the_results_hold_every_accuracy_of_every_user_and_what_made_them(tmp_path, data, fits):
    config = {"K_list": [0, 1, 3], "seeds": range(1), "fractions": np.array([0.5, 1])}
    save_results(tmp_path, fits, data, ABOUT, config, 12.5)
    results = strict_json(tmp_path / "results.json")
    assert results["config"] == {"data": "A data set (own)", "model": "a/model", "K_list": [0, 1, 3], "seeds": [0],
                                 "fractions": [0.5, 1.0]}
    assert results["users"] == SEEN and results["unseen_users"] == UNSEEN and results["identity"] == ABOUT["identity"]
    assert results["seeds"] == [0] and results["seconds"] == 12.5
    assert results["counts"] == {
        "seen users": 3, "unseen users": 2, "d": d, "train pairs": 36, "test pairs": 21, "train unseen pairs": 13,
        "test unseen pairs": 36, "pairs with equal sides": 3}
    assert {"python", "torch"} <= results["versions"].keys() and results["versions"]["numpy"] == np.__version__
    assert [entry["K"] for entry in results["fits"]] == [0, 1, 3]
    for entry, fit in zip(results["fits"], fits, strict=True):
        assert (entry["training_loss"] is None) == (fit.K == 0) and entry["columns"] == max(fit.K, 1)
        for setting, part, W in zip(SETTINGS, PARTS, (fit.W, fit.W, fit.W_unseen, fit.W_unseen)):
            users = UNSEEN if "unseen" in part else SEEN
            of_user = {user: sum(m > 0 for m in (X.double() @ fit.V.double() @ w.double()).tolist()) / len(X)
                       for user, X, w in zip(users, data[part], W, strict=True)}
            assert entry["accuracy_of_user"][setting] == pytest.approx(of_user)
            assert entry["mean_accuracy"][setting] == pytest.approx(statistics.fmean(of_user.values()))
            assert entry["std_over_users"][setting] == pytest.approx(statistics.pstdev(of_user.values()))


def test_a_saved_basis_gives_the_accuracies_again_and_names_its_model_and_data(tmp_path, data, fits):
    save_results(tmp_path, fits, data, ABOUT, {"num_iterations": 10}, 1.0)
    for entry, fit in zip(strict_json(tmp_path / "results.json")["fits"], fits, strict=True):
        tensors, about = load_tensors(tmp_path / entry["file"])
        assert all(torch.equal(tensors[name], getattr(fit, name)) for name in ("V", "W", "W_unseen"))
        assert [utils.evaluate_model(X, tensors["V"], w) for X, w in zip(data["test_unseen"], tensors["W_unseen"])] == (
            pytest.approx(list(entry["accuracy_of_user"][SETTINGS[3]].values())))
        assert (about["K"], about["alpha"], about["seed"]) == (fit.K, fit.alpha, fit.seed)
        assert about["identity"] == ABOUT["identity"] and about["users"] == SEEN and about["unseen_users"] == UNSEEN
        assert about["config"] == {"data": ABOUT["title"], "model": "a/model", "num_iterations": 10}
        assert about["versions"]["numpy"] == np.__version__


def test_files_of_an_earlier_sweep_and_the_state_of_the_training_go_and_others_stay(tmp_path, data, fits):
    for name in ("K_7.safetensors", "K_3_seed_1.safetensors", "notes.txt", "vary_fewshot.json", utils.CHECKPOINT_FILE):
        (tmp_path / name).write_text("old")
    save_results(tmp_path, fits, data, ABOUT, {}, 1.0)
    assert set(os.listdir(tmp_path)) == {"K_0.safetensors", "K_1.safetensors", "K_3.safetensors", "results.json",
                                         "accuracy_by_rank.png", "notes.txt", "vary_fewshot.json"}


def test_every_penalty_and_seed_has_a_file_of_its_own(tmp_path, data):
    save_results(tmp_path, swept(data, [2], [0, 0.5], [0, 1], num_iterations=2), data, ABOUT, {}, 1.0)
    results = strict_json(tmp_path / "results.json")
    assert results["seeds"] == [0, 1]
    assert [(fit["alpha"], fit["seed"]) for fit in results["fits"]] == [(0, 0), (0, 1), (0.5, 0), (0.5, 1)]
    files = [fit["file"] for fit in results["fits"]]
    assert len(set(files)) == 4 and set(files) == {path.name for path in tmp_path.glob("*.safetensors")}
    for fit in results["fits"]:
        assert load_tensors(tmp_path / fit["file"])[1]["seed"] == fit["seed"]


def test_a_failure_leaves_the_results_of_before_and_nothing_else(tmp_path, data, fits, monkeypatch):
    save_results(tmp_path, fits, data, ABOUT, {}, 1.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", no_space)  # what is written last
    with pytest.raises(OSError) as error:
        save_results(tmp_path, swept(data, [2], num_iterations=1), data, ABOUT, {}, 2.0)
    assert error.value.filename.endswith("accuracy_by_rank.png")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_table_has_a_row_a_rank_and_means_over_users_and_seeds(data, capsys):
    fits = swept(data, [0, 2], [0, 0.5], [0, 1])
    utils.print_table(fits)
    head, *rows = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert head.split()[:2] == ["K", "alpha"]
    expected = [["ref", "0"], ["2", "0"], ["ref", "0.5"], ["2", "0.5"]]
    for row, names, pair in zip(rows, expected, zip(fits[::2], fits[1::2]), strict=True):
        means = [f"{statistics.fmean(fit.accuracies[s].mean() for fit in pair):.4f}" for s in SETTINGS]
        assert row.split() == [*names, *means]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_the_picture_shows_the_mean_and_the_band_of_every_setting(tmp_path, data, fits, drawn):
    save_results(tmp_path, fits, data, ABOUT, {}, 1.0)
    assert is_a_picture(tmp_path / "accuracy_by_rank.png")
    axes, = drawn[0].axes
    assert axes.get_title() == ABOUT["title"] and [t.get_text() for t in axes.get_xticklabels()] == ["ref", "1", "3"]
    for setting, line, band in zip(SETTINGS, axes.lines, axes.collections, strict=True):
        of_user = np.array([fit.accuracies[setting] for fit in fits])
        np.testing.assert_allclose(line.get_ydata(), of_user.mean(1))
        quarter = of_user.std(1) / 4
        y = band.get_paths()[0].vertices[:, 1]
        assert y.min() == pytest.approx(min(of_user.mean(1) - quarter))
        assert y.max() == pytest.approx(max(of_user.mean(1) + quarter))
    assert len(set(texts(drawn[0]))) == 4


def test_every_penalty_has_its_own_curves(tmp_path, data, drawn):
    utils.plot_accuracy_by_rank(tmp_path / "a.png", swept(data, [1, 2], [0, 0.5]), "title")
    assert len(drawn[0].axes[0].lines) == 8 and len(set(texts(drawn[0]))) == 8


NOTEBOOK = """
import os, sys, torch, utils
assert "matplotlib" not in sys.modules
fit = utils.Fit(1, 0, 0, torch.ones(2, 1), torch.ones(2, 1), torch.ones(1, 1), 0.5)
fit.accuracies = {setting: utils.np.array([0.5, 0.75]) for setting in utils.SETTINGS}
for name in ("module://of_a_notebook", "no backend"):
    if os.fork() == 0:
        os.environ["MPLBACKEND"] = name
        utils.plot_accuracy_by_rank(f"{sys.argv[1]}/{name[:6]}.png", [fit], "title")
        break
    os.wait()
"""


def test_a_notebooks_backend_does_not_end_a_training(tmp_path):
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


def test_the_curves_are_told_apart_and_say_what_they_are_of(tmp_path, data, drawn, capsys):
    (tmp_path / utils.FEW_SHOT_CHECKPOINT_FILE).write_text("state")
    (tmp_path / "results.json").write_text("of the sweep")
    save_few_shot_curves(tmp_path, curves(), data, ABOUT, CONFIG)
    assert set(os.listdir(tmp_path)) == {"vary_fewshot.json", "vary_fewshot.png", "results.json"}
    assert is_a_picture(tmp_path / "vary_fewshot.png")
    results = strict_json(tmp_path / "vary_fewshot.json")
    assert results["config"] == {"data": ABOUT["title"], "model": "a/model", **CONFIG}
    assert results["users"] == SEEN and results["unseen_users"] == UNSEEN and results["identity"] == ABOUT["identity"]
    assert [(c["alpha"], c["K"]) for c in results["curves"]] == [(0, 2), (0, 1), (0.5, 2), (0.5, 1)]
    names = "few_shot_train_mean", "few_shot_train_std", "unseen_mean", "unseen_std"
    for name, values in zip(names, curves()):
        assert [v for curve in results["curves"] for v in curve[name]] == values
    axes, = drawn[0].axes
    lines = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert lines == [curve[name] for curve in results["curves"] for name in ("few_shot_train_mean", "unseen_mean")]


def test_where_users_have_fewer_pairs_it_is_said_on_the_console_in_the_json_and_in_the_picture(tmp_path, data, drawn,
                                                                                               capsys):
    save_few_shot_curves(tmp_path, curves(), data, ABOUT, CONFIG)  # of unseen users with 4 and 9 pairs
    assert "from 5 pairs on" in (out := capsys.readouterr().out) and "of 6 the mean user has 5.0" in out
    results = strict_json(tmp_path / "vary_fewshot.json")
    assert results["shots_are"] == "pairs" and results["shots_of_the_mean_user"] == [2, 4, 5]
    assert "not every user has so many pairs" in texts(drawn[0])
    save_few_shot_curves(tmp_path, curves(), data, ABOUT, {**CONFIG, "num_shots": [2, 3, 4]})
    assert capsys.readouterr().out == "" and len(texts(drawn[1])) == len(texts(drawn[0])) - 1


def test_shots_of_groups_are_counted_in_groups(tmp_path, data, drawn, capsys):
    groups = [torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 6])]
    save_few_shot_curves(tmp_path, curves(), data, ABOUT, CONFIG, groups)
    results = strict_json(tmp_path / "vary_fewshot.json")
    assert results["shots_are"] == "conversations" and results["shots_of_the_mean_user"] == [2, 3.5, 4.5]
    assert "from 4 conversations on" in capsys.readouterr().out
    assert drawn[0].axes[0].get_xlabel() == "conversations per unseen user"
