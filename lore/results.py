"""What a training leaves in results/."""

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from lore.evidence import kept_fit
from lore.files import replace_files_in, save_json, save_tensors, save_text
from lore.html_report import report_html
from lore.intervals import interval
from lore.pictures import (
    draw_accuracy_by_rank,
    draw_personal_part,
    draw_reading,
    save_pictures,
    small_multiples,
)
from lore.reading import weights_table
from lore.report import rank_remarks, report
from lore.report_directions import PICTURE as DIRECTIONS
from lore.report_directions import directions_section
from lore.study import PARTS, Study
from lore.tables import (
    REFERENCE,
    Results,
    csv_text,
    format_cell,
    latex_text,
    model_cells,
    model_name,
    shown_rows,
    text_table,
)
from utils import UNSEEN_SETTINGS, UNSEEN_TEST, Curves, Fit, fits_per_model, pair_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The four lists that `run_few_shot_vary_shots` returns, as vary_fewshot.json names them.
CURVE_NAMES = ("few_shot_train_mean", "few_shot_train_std", "unseen_mean", "unseen_std")


# ---- What every result carries


def run_info(study: Study, config: dict[str, Any]) -> dict[str, Any]:
    """What every result carries, in JSON values.

    `config` (with the names of data and model), the `identity` of model and data, the ids of
    `users` and `unseen_users` in the order of the rows of W and W_unseen, `versions`, `counts`.
    config: the settings that a reader set.
    """
    names = {"data": study.title, "model": study.provenance.get("model")}
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "numba"):
        versions[package] = version(package)
    return {
        "config": names | config,
        "identity": study.provenance.get("identity"),
        "users": study.seen,
        "unseen_users": study.unseen,
        "versions": versions,
        "counts": count_study(study),
    }


def count_study(study: Study) -> dict[str, int]:
    """How many users and pairs the study has, and the width d of the embeddings."""
    counts = {"seen users": len(study.seen), "unseen users": len(study.unseen)}
    for part in PARTS:
        counts[f"{part.replace('_', ' ')} pairs"] = study.pair_count(part)
    counts["pairs with equal sides"] = count_equal_sides(study)
    counts["d"] = study.train[0].shape[1]
    return counts


def count_equal_sides(study: Study) -> int:
    """How many pairs have the same embedding on both sides.

    These are the pairs that score 0 under a random direction. Comparing the sides themselves would
    need all pairs of a table in memory.
    """
    d = study.train[0].shape[1]
    direction = torch.randn(d, 1, generator=torch.Generator().manual_seed(0))
    equal = 0
    for features in study.features().values():
        for scores in pair_scores(features, direction):
            equal += int((scores == 0).sum())
    return equal


# ---- A sweep


def save_results(
    folder: Path,
    fits: list[Fit],
    study: Study,
    config: dict[str, Any],
    seconds: float,
    evidence: dict[str, Any],
    reading: dict[str, Any] | None = None,
) -> Results:
    """Write results.json, results.csv, report.md, a safetensors file of each fit, and the pictures.

    Also reading.json, weights.csv (a row for each person, with the weights in the model that the
    verdict names) and report.html.

    They replace the files of an earlier sweep together, or, if one cannot be written, not at all.
    Only then the pictures are drawn, so that no result is lost to them, and put into report.html.

    folder: where to write. fits: of all ranks, alphas and seeds. config: the settings that a reader
    set, JSON values. seconds: how long training and evaluation took. evidence: what
    `lore.evidence.evidence` returned for these fits. reading: what `read_named_model` returned for
    them.
    Returns what results.json holds. Raises OSError that names the file: disk full, read-only.
    """
    provenance = run_info(study, config)
    results = {
        **provenance,
        "seeds": sorted({fit.seed for fit in fits}),
        "seconds": seconds,
        "fits": describe_fits(fits, study),
        **evidence,
    }
    drawings = {"accuracy_by_rank": lambda: draw_accuracy_by_rank(results)}
    if any(entry["personal_part"] for entry in results["evidence"]):
        drawings["personal_part"] = lambda: draw_personal_part(results)
    if reading and reading["attributes"]:
        drawings[DIRECTIONS] = lambda: draw_reading(results, reading)
    earlier = [
        *("K_*.safetensors", "accuracy_by_rank.*", "personal_part.*"),
        *("reading.json", f"{DIRECTIONS}.*", "report.html"),
    ]
    text = report(results, directions_section(results, reading))
    people = weights_table(fits, study, (results["verdict"]["K"], results["verdict"]["alpha"]))
    with replace_files_in(folder, earlier) as new:
        for fit, description in zip(fits, results["fits"]):
            save_basis(new / description["file"], fit, provenance)
        save_json(new / "results.json", results)
        if reading:
            save_json(new / "reading.json", reading)
        save_text(new / "report.md", text)
        save_text(new / "weights.csv", csv_text(people))
        save_text(new / "results.csv", csv_text(pd.json_normalize(shown_rows(results))))
    save_pictures(folder, drawings)
    save_text(folder / "report.html", report_html(text, results, folder))
    return results


def describe_fits(fits: list[Fit], study: Study) -> list[dict[str, Any]]:
    """What results.json says of each fit: its file, whether it is kept, its accuracies."""
    models = fits_per_model(fits)
    several_alphas = len({fit.alpha for fit in fits}) > 1
    descriptions = []
    for fit in fits:
        kept = fit is kept_fit(models[fit.K, fit.alpha])
        accuracies = fit.accuracies.items()
        descriptions.append(
            {
                "K": fit.K,
                "alpha": fit.alpha,
                "seed": fit.seed,
                "columns": fit.V.shape[1],
                "file": basis_file(fit, kept, several_alphas),
                "kept": kept,
                "training_loss": None if math.isnan(fit.loss) else fit.loss,
                "mean_accuracy": {setting: float(a.mean()) for setting, a in accuracies},
                "std_over_users": {setting: float(a.std()) for setting, a in accuracies},
                "accuracy_of_user": {
                    setting: dict(zip(users_of(setting, study), a.tolist()))
                    for setting, a in accuracies
                },
            }
        )
    return descriptions


def basis_file(fit: Fit, kept: bool, several_alphas: bool) -> str:
    """The name of a fit's file, such as `K_3.safetensors`.

    It has the alpha if the sweep has several, and the seed if another seed of the model is kept.
    """
    name = f"K_{fit.K}"
    if several_alphas:
        name += f"_alpha_{fit.alpha}"
    if not kept:
        name += f"_seed_{fit.seed}"
    return name + ".safetensors"


def users_of(setting: str, study: Study) -> list[str]:
    """The ids of the users whose accuracies a setting has."""
    return study.unseen if setting in UNSEEN_SETTINGS else study.seen


def save_basis(path: Path, fit: Fit, provenance: dict[str, Any]) -> None:
    """Write V, W and W_unseen of a fit, with its provenance (of `run_info`) as metadata."""
    metadata = {key: value for key, value in provenance.items() if key != "counts"}
    save_tensors(
        path,
        {"V": fit.V, "W": fit.W, "W_unseen": fit.W_unseen},
        K=fit.K,
        alpha=fit.alpha,
        seed=fit.seed,
        **metadata,
    )


def print_results(results: Results) -> None:
    """Print how a sweep ends: the accuracies with their intervals, the verdict, odd ranks."""
    rows = [model_cells(entry) | entry["accuracy"] for entry in shown_rows(results)]
    remarks = rank_remarks([entry["K"] for entry in results["evidence"]], results["counts"])
    closing = "\n".join([results["verdict"]["text"], *remarks])
    print(f"\n{text_table(rows).to_string(index=False)}\n\n{closing}")


# ---- The number of shots


def save_few_shot_curves(
    folder: Path, curves: Curves, study: Study, config: dict[str, Any]
) -> pd.DataFrame:
    """Write vary_fewshot.json, .csv, .tex, .png and .pdf; print if shots are few or ranks large.

    They replace those of an earlier run, and the files of the questions that belonged to these.

    folder: where to write. curves: what `run_few_shot_vary_shots` returned for this study.
    config: the settings that a reader set, with K_list, alpha_list, num_shots and trials, and, if a
    shot is one of `study.groups`, with `shots_are`: "conversations".
    Returns a table of the accuracies on unseen prompts with their intervals, in texts: a row for
    each number of shots, a column for each model. Raises OSError that names the file.
    """
    shots = [int(count) for count in config["num_shots"]]
    unit, available = available_shots(study, config)
    reached = [float(np.minimum(available, count).mean()) for count in shots]
    note = ""
    if max(shots) > min(available):
        note = f"\nfrom {min(available) + 1} {unit} on not every unseen user has so many"
        print(f"{note}: of {max(shots)} the mean user has {max(reached):.1f}")

    provenance = run_info(study, config)
    for remark in rank_remarks(config["K_list"], provenance["counts"]):
        print(remark)
    content = {
        **provenance,
        "shots_are": unit,
        "shots_of_the_mean_user": reached,
        "curves": curves_per_model(curves, config, len(shots)),
    }
    intervals = few_shot_intervals(curves)
    is_trained = intervals["K"] > 0
    is_first_alpha = intervals["alpha"] == intervals["alpha"][0]
    shown = intervals[is_trained | is_first_alpha]  # the reference once, as in `shown_rows`
    table = few_shot_table(shown)
    caption = latex_text(f"{study.title}: {UNSEEN_TEST}, with 95 % intervals over users")
    with replace_files_in(folder, ["vary_fewshot.*", "vary_questions.*"]) as new:
        save_json(new / "vary_fewshot.json", content)
        save_text(new / "vary_fewshot.csv", csv_text(shown))
        save_text(new / "vary_fewshot.tex", table.to_latex(escape=True, caption=caption))

    def draw() -> "Figure":
        return draw_few_shot_curves(
            {**provenance, "seeds": [config.get("seed", 0)]},
            intervals,
            f"{unit} per unseen user",
            f", {config['trials']} draws{note}",
        )

    save_pictures(folder, {"vary_fewshot": draw})
    return table


def available_shots(study: Study, config: dict[str, Any]) -> tuple[str, list[int]]:
    """What a shot is, "conversations" or "pairs", and how many of them each unseen user has."""
    if config.get("shots_are") == "conversations" and "train_unseen" in study.groups:
        return "conversations", [int(group.max()) + 1 for group in study.groups["train_unseen"]]
    return "pairs", [len(X) for X in study.train_unseen]


def curves_per_model(curves: Curves, config: dict[str, Any], shots: int) -> list[dict[str, Any]]:
    """What vary_fewshot.json says of each model: K, alpha, and a list under each of `CURVE_NAMES`.

    curves: four lists, with `shots` values for each model, alpha outer and K inner.
    """
    models = [(alpha, K) for alpha in config["alpha_list"] for K in config["K_list"]]
    entries = []
    for i, (alpha, K) in enumerate(models):
        entry = {"K": K, "alpha": alpha}
        for name, values in zip(CURVE_NAMES, curves):
            entry[name] = list(values[i * shots : (i + 1) * shots])
        entries.append(entry)
    return entries


def few_shot_intervals(curves: Curves) -> pd.DataFrame:
    """A row for each point of the curves: K, alpha, shots, setting, mean, low, high."""
    rows = []
    for setting in UNSEEN_SETTINGS:
        for row in curves.rows:
            point = {"K": row["K"], "alpha": row["alpha"], "shots": row["shots"]}
            rows.append(point | {"setting": setting} | interval(row[setting]))
    return pd.DataFrame(rows)


def few_shot_table(intervals: pd.DataFrame) -> pd.DataFrame:
    """The accuracies on unseen prompts, in texts: a row per number of shots, a column per model."""
    on_unseen = intervals[intervals["setting"] == UNSEEN_TEST]
    columns = {}
    for (alpha, K), rows in on_unseen.groupby(["alpha", "K"], sort=False):
        cells = [format_cell(row) for row in rows.to_dict("records")]
        columns[model_name(K, alpha)] = pd.Series(cells, rows["shots"])
    return pd.DataFrame(columns)


def draw_few_shot_curves(results: Results, intervals: pd.DataFrame, x: str, note: str) -> "Figure":
    """A row of panels for each setting, a column for each alpha, a curve for each rank."""
    points = [
        {
            **row,
            "row": row["setting"].replace(" Performance", ""),
            "column": f"alpha {row['alpha']:g}",
            "line": f"K = {row['K']}" if row["K"] else REFERENCE,
            x: row["shots"],
        }
        for row in intervals.to_dict("records")
    ]
    return small_multiples(results, points, x, note=note)


# ---- The number of questions


def save_question_curves(
    folder: Path, frame: pd.DataFrame, study: Study, config: dict[str, Any]
) -> None:
    """Write vary_questions.json, .csv, .png and .pdf.

    frame: what `lore.questions.question_curves` returned; if it is empty, as no model has a rank
    from 2 up, nothing is written. config: the settings that a reader set, with `question_seeds`.
    Raises OSError that names the file.
    """
    if frame.empty:
        return
    content = {**run_info(study, config), "seeds": config["question_seeds"]}
    named = with_model_names(frame)
    with replace_files_in(folder, ["vary_questions.*"]) as new:
        save_json(new / "vary_questions.json", {**content, "curves": named.to_dict("records")})
        save_text(new / "vary_questions.csv", csv_text(named))
    save_pictures(folder, {"vary_questions": lambda: draw_question_curves(content, named)})


def question_table(frame: pd.DataFrame) -> str:
    """The accuracies of `lore.questions.question_curves` with their intervals, to be printed.

    There is a row for each number of questions, and a column for each model and fit.
    """
    cells = [format_cell(ends) for ends in frame[["mean", "low", "high"]].to_dict("records")]
    named = with_model_names(frame).assign(cell=cells)
    table = named.pivot(index="questions", columns=["model", "fit"], values="cell")
    return table.to_string()


def draw_question_curves(results: Results, named: pd.DataFrame) -> "Figure":
    """A panel for each model, with a curve for each fit."""
    x = "questions per unseen user"
    points = [
        {**row, "row": "accuracy", "column": row["model"], "line": row["fit"], x: row["questions"]}
        for row in named.to_dict("records")
    ]
    return small_multiples(results, points, x, note=f"; {UNSEEN_TEST}")


def with_model_names(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with a further column, `model`."""
    return frame.assign(model=[model_name(*model) for model in zip(frame["K"], frame["alpha"])])
