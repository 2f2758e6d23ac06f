"""What a training leaves in results/."""

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lore.evidence import VALIDATION, kept_fit
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
from lore.report import choice_in_words, rank_remarks, report
from lore.report_directions import PICTURE as DIRECTIONS
from lore.report_directions import directions_section, has_picture, tastes_sentence
from lore.study import PARTS, Features, Study
from lore.tables import (
    CHOSEN_MARK,
    REFERENCE,
    Results,
    csv_text,
    format_cell,
    latex_text,
    model_cells,
    model_in_file_name,
    model_name,
    shown_rows,
    text_table,
)
from utils import (
    SETTINGS,
    TRAIN,
    UNSEEN_SETTINGS,
    UNSEEN_TEST,
    Curves,
    Fit,
    fits_per_model,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The four lists that `run_few_shot_vary_shots` returns, as vary_fewshot.json names them.
CURVE_NAMES = ("few_shot_train_mean", "few_shot_train_std", "unseen_mean", "unseen_std")


# ---- What every result carries


def run_info(study: Study, config: dict[str, Any]) -> dict[str, Any]:
    """What every result carries, in JSON values.

    `config` (with the names of data and model), the `identity` of model and data, the ids of
    `users` and `unseen_users` in the order of the rows of W and W_unseen, `versions`, `counts`, and
    whether the data are those of the synthetic `demo`.
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
        "demo": bool(study.provenance.get("demo")),
    }


def count_study(study: Study) -> dict[str, int]:
    """How many users and pairs the study has, and the width d of the embeddings."""
    counts = {"seen users": len(study.seen), "unseen users": len(study.unseen)}
    for part in PARTS:
        counts[f"{part.replace('_', ' ')} pairs"] = study.pair_count(part)
    counts["pairs with equal sides"] = sum(study.count_equal_pairs().values())
    counts["d"] = study.train[0].shape[1]
    return counts


# ---- A sweep


def save_results(
    folder: Path,
    fits: list[Fit],
    study: Study,
    config: dict[str, Any],
    seconds: float,
    evidence: dict[str, Any],
    held_out: Features | None = None,
    reading: dict[str, Any] | None = None,
) -> Results:
    """Write the tables, report.md, a safetensors file of each fit, and the pictures.

    The tables are results.json, results.csv, results_long.csv, reading.json (what the directions
    mean) and weights.csv (a row for each person, with the weights in the model that the verdict
    names). All files replace those of an earlier sweep together, or, if one cannot be written, not
    at all. Only then the pictures are drawn, so that no result is lost to them, and put into
    report.html.

    folder: where to write. fits: of all ranks, alphas and seeds. config: the settings that a reader
    set, JSON values. seconds: how long training and evaluation took. evidence: what
    `lore.evidence.evidence` returned for these fits. held_out: the pairs of `study.train` that were
    held out of the training, one entry per seen user; None: none. reading: what
    `lore.reading.read_named_model` returned for these fits.
    Returns what results.json holds. Raises OSError that names the file: disk full, read-only.
    """
    provenance = run_info(study, config)
    validation_pairs = sum(map(len, held_out or []))
    descriptions = describe_fits(fits, study)
    results = {
        **provenance,
        "counts": {**provenance["counts"], "validation pairs": validation_pairs},
        "data_notes": study.provenance.get("data_notes"),
        "equal_pairs": study.provenance.get("equal_pairs"),
        "seeds": sorted({fit.seed for fit in fits}),
        "seconds": seconds,
        "fits": descriptions,
        **with_files(evidence, descriptions),
    }
    fit_in_file: dict[str, Fit] = {}
    for fit, description in zip(fits, descriptions):
        fit_in_file.setdefault(description["file"], fit)
    drawings = {"accuracy_by_rank": lambda: draw_accuracy_by_rank(results)}
    if any(entry["personal_part"] for entry in results["evidence"]):
        drawings["personal_part"] = lambda: draw_personal_part(results)
    if has_picture(reading):
        drawings[DIRECTIONS] = lambda: draw_reading(results, reading)
    earlier = [
        *("K_*.safetensors", "accuracy_by_rank.*", "personal_part.*"),
        *("reading.json", f"{DIRECTIONS}.*", "report.html"),
    ]
    text = report(results, tastes_sentence(results, reading), directions_section(results, reading))
    people = weights_table(fits, study, (results["verdict"]["K"], results["verdict"]["alpha"]))
    with replace_files_in(folder, earlier) as new:
        for name, fit in fit_in_file.items():
            save_basis(new / name, fit, provenance)
        save_json(new / "results.json", results)
        if reading:
            save_json(new / "reading.json", reading)
        save_text(new / "report.md", text)
        save_text(new / "weights.csv", csv_text(people))
        save_text(new / "results.csv", csv_text(pd.json_normalize(shown_rows(results))))
        save_text(new / "results_long.csv", csv_text(long_table(fits, study, held_out)))
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
    The reference has one file, as it depends on neither.
    """
    if fit.K == 0:
        return "K_0.safetensors"
    name = model_in_file_name(fit.K, fit.alpha) if several_alphas else f"K_{fit.K}"
    if not kept:
        name += f"_seed_{fit.seed}"
    return name + ".safetensors"


def users_of(setting: str, study: Study) -> list[str]:
    """The ids of the users whose accuracies a setting has."""
    return study.unseen if setting in UNSEEN_SETTINGS else study.seen


def with_files(evidence: dict[str, Any], descriptions: list[dict[str, Any]]) -> dict[str, Any]:
    """The evidence in which each model has its `file`: that of the kept seed.

    evidence: of `lore.evidence.evidence`. descriptions: of `describe_fits`.
    """
    file_of_model = {(fit["K"], fit["alpha"]): fit["file"] for fit in descriptions if fit["kept"]}
    entries = [
        {**entry, "file": file_of_model[entry["K"], entry["alpha"]]}
        for entry in evidence["evidence"]
    ]
    chosen = evidence["chosen"]
    file_of_chosen = file_of_model.get((chosen["K"], chosen["alpha"]))  # None if none was chosen
    return {**evidence, "evidence": entries, "chosen": {**chosen, "file": file_of_chosen}}


def long_table(fits: list[Fit], study: Study, held_out: Features | None) -> pd.DataFrame:
    """A row for each K, alpha, seed, user and setting, with the user's pairs and accuracy.

    held_out: see `save_results`.
    """
    pairs = pairs_per_user(study, held_out)
    tables = []
    for fit in fits:
        for setting, accuracies in fit.accuracies.items():
            columns = {
                "K": fit.K,
                "alpha": fit.alpha,
                "seed": fit.seed,
                "user": users_of(setting, study),
                "setting": setting,
                "pairs": pairs[setting],
                "accuracy": accuracies,
            }
            tables.append(pd.DataFrame(columns))
    table = pd.concat(tables, ignore_index=True)
    # As categories each distinct text is made safe for spreadsheets once, and not in each row.
    return table.astype({"user": "category", "setting": "category"})


def pairs_per_user(study: Study, held_out: Features | None) -> dict[str, list[int]]:
    """How many pairs each user has in each setting; held_out: see `save_results`."""
    pairs = {
        setting: [len(X) for X in features]
        for setting, features in zip(SETTINGS, study.features().values())
    }
    if held_out is not None:
        pairs[VALIDATION] = [len(X) for X in held_out]
        pairs[TRAIN] = [len(X) - len(held) for X, held in zip(study.train, held_out)]
    return pairs


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
    """Print how a sweep ends: the accuracies, which model was chosen, the verdict, odd ranks."""
    chosen = results["chosen"]
    rows = [model_cells(entry, chosen) | entry["accuracy"] for entry in shown_rows(results)]
    choice = choice_in_words(results)
    if chosen["file"] is not None:
        choice = f"{CHOSEN_MARK.strip()} {choice}; its basis is in {chosen['file']}"
    remarks = rank_remarks([entry["K"] for entry in results["evidence"]], results["counts"])
    closing = "\n".join([results["verdict"]["text"], *remarks])
    print(f"\n{text_table(rows).to_string(index=False)}\n\n{choice}\n\n{closing}")


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
        note = f"\nnot every unseen user has more than {min(available)} {unit}"
        print(f"{note}: of {max(shots)} asked for, the mean user has {max(reached):.1f}")

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
    return small_multiples(results, points, x, note=f"\n{UNSEEN_TEST}")


def with_model_names(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with a further column, `model`."""
    return frame.assign(model=[model_name(*model) for model in zip(frame["K"], frame["alpha"])])
