"""What a training leaves in results/."""

import itertools
import math
import platform

import numpy as np
import pandas as pd
import torch

from lore.evidence import interval, kept_fit
from lore.files import (
    CHECKPOINT_FILE,
    FEW_SHOT_CHECKPOINT_FILE,
    replace_files_in,
    save_json,
    save_tensors,
    save_text,
)
from lore.pictures import draw_accuracy_by_rank, draw_personal_part, save_picture, small_multiples
from lore.questions import question_curves
from lore.report import report
from lore.tables import format_cell, shown_rows, text_table
from utils import SETTINGS, UNSEEN_TEST, fits_per_model, pair_scores, process_rank


def run_info(data, about, config):
    """What every result carries: settings, versions, counts, the model and data that the embeddings name."""
    from importlib.metadata import version

    parts, d = ("train", "test", "train_unseen", "test_unseen"), data["train"][0].shape[1]
    probe = torch.randn(
        d, 1, generator=torch.Generator().manual_seed(0)
    )  # scores only pairs of equal sides 0
    return {
        "config": {"data": about["title"], "model": about.get("model"), **config},
        "identity": about.get("identity"),
        "users": data["seen"],
        "unseen_users": data["unseen"],
        "versions": {
            "python": platform.python_version(),
            **{n: version(n) for n in ("torch", "numpy", "numba")},
        },
        "counts": {
            "seen users": len(data["seen"]),
            "unseen users": len(data["unseen"]),
            **{f"{part.replace('_', ' ')} pairs": sum(map(len, data[part])) for part in parts},
            "pairs with equal sides": sum(
                int((S == 0).sum()) for part in parts for S in pair_scores(data[part], probe)
            ),
            "d": d,
        },
    }


def print_results(results):
    """What a sweep ends with: the accuracies with their intervals, and the verdict."""
    accuracies = text_table(shown_rows(results), lambda entry: entry["accuracy"])
    print(f"\n{accuracies.to_string(index=False)}\n\n{results['verdict']['text']}")


def save_results(folder, fits, data, about, config, seconds, found):
    """Write results.json, results.csv, report.md, pictures, and a safetensors file per Fit -> what results.json holds.
    data: users' ids, `seen` and `unseen`, in the order of the rows of W and W_unseen, and features, `train`, `test`,
    `train_unseen`, `test_unseen`. about: of `find_reward_head`. config: what the reader set, JSON values. seconds: of
    training and evaluation. found: of `evidence`. The file without a seed in its name is the kept seed's. Files of an
    earlier sweep and the training's checkpoint go when these are there."""
    entries, about, rows = [], run_info(data, about, config), fits_per_model(fits)
    with replace_files_in(folder, ["K_*.safetensors", "personal_part.*", CHECKPOINT_FILE]) as new:
        for fit in fits:
            kept, model = (
                fit is kept_fit(rows[fit.K, fit.alpha]),
                {"K": fit.K, "alpha": fit.alpha, "seed": fit.seed},
            )
            several = len({alpha for _, alpha in rows}) > 1
            name = (
                f"K_{fit.K}"
                + f"_alpha_{fit.alpha}" * several
                + f"_seed_{fit.seed}" * (not kept)
                + ".safetensors"
            )
            save_tensors(
                new / name,
                {"V": fit.V, "W": fit.W, "W_unseen": fit.W_unseen},
                **model,
                **{key: value for key, value in about.items() if key != "counts"},
            )
            entries.append(
                {
                    **model,
                    "columns": fit.V.shape[1],
                    "file": name,
                    "kept": kept,
                    "training_loss": None if math.isnan(fit.loss) else fit.loss,
                    "mean_accuracy": {s: float(a.mean()) for s, a in fit.accuracies.items()},
                    "std_over_users": {s: float(a.std()) for s, a in fit.accuracies.items()},
                    "accuracy_of_user": {
                        s: dict(zip(data["unseen" if s in SETTINGS[2:] else "seen"], a.tolist()))
                        for s, a in fit.accuracies.items()
                    },
                }
            )
        results = {
            **about,
            "seeds": sorted({fit.seed for fit in fits}),
            "seconds": seconds,
            "fits": entries,
            **found,
        }
        save_json(new / "results.json", results)
        save_text(new / "report.md", report(results))
        save_text(new / "results.csv", pd.json_normalize(shown_rows(results)).to_csv(index=False))
        save_picture(new, "accuracy_by_rank", draw_accuracy_by_rank(results))
        if any(entry["personal_part"] for entry in results["evidence"]):
            save_picture(new, "personal_part", draw_personal_part(results))
    return results


def save_few_shot_curves(folder, curves, of_users, data, about, config, groups=None):
    """Write what `run_few_shot_vary_shots` found as vary_fewshot.json, .csv, .tex, .png and .pdf.
    curves: what it returned; of_users: what it has extended; groups: what it was given. data, about: as for
    `save_results`. config: what the reader set, with K_list, alpha_list, num_shots, trials. The training's checkpoint
    in `folder` goes. Returns the table of accuracies on unseen prompts: a row per number of shots, a column per model."""
    about, shots = run_info(data, about, config), list(map(int, config["num_shots"]))
    of_shot = "conversations" if groups else "pairs"
    has = (
        [int(group.max()) + 1 for group in groups]
        if groups
        else list(map(len, data["train_unseen"]))
    )
    reached = [float(np.minimum(has, n).mean()) for n in shots]
    note = f"\nfrom {min(has) + 1} {of_shot} on not every unseen user has so many" * (
        max(shots) > min(has)
    )
    if note:
        print(f"{note}: of {max(shots)} the mean user has {max(reached):.1f}")
    names = "few_shot_train_mean", "few_shot_train_std", "unseen_mean", "unseen_std"
    by_shots = zip(*(np.reshape(curve, (-1, len(shots))).tolist() for curve in curves))
    found = [
        {"K": K, "alpha": alpha, **dict(zip(names, of_model))}
        for (alpha, K), of_model in zip(
            itertools.product(config["alpha_list"], config["K_list"]), by_shots
        )
    ]
    frame = pd.DataFrame(
        [
            {
                **{key: row[key] for key in ("K", "alpha", "shots")},
                "setting": setting,
                **interval(row[setting]),
            }
            for setting in SETTINGS[2:]
            for row in of_users
        ]
    )
    once = frame[
        (frame["K"] > 0) | (frame["alpha"] == frame["alpha"][0])
    ]  # the reference, the same at every alpha
    table = pd.DataFrame(
        {
            f"K = {K}, alpha {alpha:g}" if K else "ref": pd.Series(
                map(format_cell, rows.to_dict("records")), rows["shots"]
            )
            for (alpha, K), rows in once[once["setting"] == UNSEEN_TEST].groupby(
                ["alpha", "K"], sort=False
            )
        }
    )
    x = f"{of_shot} per unseen user"
    points = [
        {
            **row,
            "row": row["setting"].replace(" Performance", ""),
            "column": f"alpha {row['alpha']:g}",
            "line": f"K = {row['K']}" if row["K"] else "ref",
            x: row["shots"],
        }
        for row in frame.to_dict("records")
    ]
    with replace_files_in(folder, [FEW_SHOT_CHECKPOINT_FILE, "vary_questions.*"]) as new:
        save_json(
            new / "vary_fewshot.json",
            {**about, "shots_are": of_shot, "shots_of_the_mean_user": reached, "curves": found},
        )
        save_text(new / "vary_fewshot.csv", once.to_csv(index=False))
        save_text(
            new / "vary_fewshot.tex",
            table.to_latex(
                escape=True,
                caption=(
                    f"{about['config']['data']}: {UNSEEN_TEST}, with 95 \\% intervals over users"
                ),
            ),
        )
        save_picture(
            new,
            "vary_fewshot",
            small_multiples(
                {**about, "seeds": [config.get("seed", 0)]},
                points,
                x,
                note=f", {config['trials']} draws{note}",
            ),
        )
    return table


def vary_questions(folder, data, V_final, about, config, device):
    """Print `question_curves`, a table, and write vary_questions.json, .csv, .png and .pdf; needs a rank from 2 up.
    data, about: as for `save_results`; config: what the reader set, with what `question_curves` takes."""
    frame = question_curves(
        config["num_questions"],
        config["trials"],
        config["alpha_list"],
        config["K_list"],
        data,
        V_final,
        device,
        config["question_seeds"],
        config["num_iterations"],
    )
    if process_rank() > 0 or frame.empty:
        return
    about, x = (
        {**run_info(data, about, config), "seeds": config["question_seeds"]},
        "questions per unseen user",
    )
    frame["model"] = [f"K = {K}, alpha {alpha:g}" for K, alpha in zip(frame["K"], frame["alpha"])]
    points = [
        {**row, "row": "accuracy", "column": row["model"], "line": row["fit"], x: row["questions"]}
        for row in frame.to_dict("records")
    ]
    with replace_files_in(folder) as new:
        save_json(new / "vary_questions.json", {**about, "curves": frame.to_dict("records")})
        save_text(new / "vary_questions.csv", frame.to_csv(index=False))
        save_picture(
            new, "vary_questions", small_multiples(about, points, x, note=f"; {UNSEEN_TEST}")
        )
    cells = frame.assign(
        cell=list(map(format_cell, frame[["mean", "low", "high"]].to_dict("records")))
    )
    table = cells.pivot(index="questions", columns=["model", "fit"], values="cell")
    print(
        f"\n{UNSEEN_TEST}, mean over seeds {config['question_seeds']}, by questions asked: random pairs, or those that "
        "question_values puts first; as released, or with the seen users as the prior (posterior, fit_new_user):\n"
        f"{table.to_string()}"
    )
