"""The pictures of results."""

import itertools
import os
from pathlib import Path

import numpy as np
import pandas as pd

from lore.files import atomic_write
from lore.tables import shown_rows
from utils import SETTINGS, UNSEEN_TEST

RELEASED_BAND = (
    False  # True: in the picture a quarter of the standard deviation over users, as released
)
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "pdf.fonttype": 42,
}


def small_multiples(results, points, x, band="95 % interval", note=""):
    """A Figure of small multiples: a panel for each `row` and `column` of the points, a curve for each `line`, with its
    name at its end. Intervals are bands, or, of more than three curves, bars. x: "rank K", or a column of numbers."""
    from scipy.optimize import isotonic_regression

    os.environ.pop(
        "MPLBACKEND", None
    )  # a notebook's backend, none here, would keep the library from loading
    import matplotlib.figure

    counts, seeds, frame = results["counts"], len(results["seeds"]), pd.DataFrame(points)
    positions, ranks = pd.factorize(frame[x])
    frame["x"] = positions if x == "rank K" else frame[x]
    rows, columns, lines = (frame[key].unique() for key in ("row", "column", "line"))
    scale = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, len({*lines} - {"ref"})))
    colors = dict(zip([line for line in lines if line != "ref"], scale.tolist())) | {"ref": "0.4"}
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(
            (2.2 * len(columns) + 2.4, 2.4 * len(rows) + 0.5), layout="constrained"
        )
        figure.suptitle(
            f"{results['config']['data']}: {counts['seen users']} seen, {counts['unseen users']} unseen "
            f"users, {seeds} seed{'s' * (seeds > 1)}\nband or bar: {band} over users{note}",
            fontsize=9,
        )
        figure.supxlabel(x, fontsize=9)
        grid = figure.subplots(len(rows), len(columns), sharex=True, sharey="row", squeeze=False)
        for axes, (row, column) in zip(grid.flat, itertools.product(rows, columns)):
            level = (
                (0, "nothing personal", "0.3")
                if row.startswith("personal")
                else (0.5, "chance", "0.3")
            )
            axes.set(
                title=column if row == rows[0] else "", ylabel=row if column == columns[0] else ""
            )
            axes.axhline(level[0], color="0.3", linewidth=0.9, linestyle="--")
            if x == "rank K":
                axes.set_xticks(range(len(ranks)), [K or "ref" for K in ranks])
            curves = list(
                frame[(frame["row"] == row) & (frame["column"] == column)].groupby(
                    "line", sort=False
                )
            )
            for i, (line, of_line) in enumerate(curves):
                at, mean, low, high = of_line[["x", "mean", "low", "high"]].to_numpy(float).T
                if bars := len(curves) > 3 or len(at) == 1:
                    at = at + (i - (len(curves) - 1) / 2) * 0.12 * np.ptp(at) / max(
                        len(at) - 1, 1
                    )  # side by side
                    axes.vlines(at, low, high, color=colors[line], linewidth=1)
                else:
                    axes.fill_between(at, low, high, color=colors[line], alpha=0.15, linewidth=0)
                axes.plot(
                    at, mean, "o-", color=colors[line], markersize=3, linewidth=0.7 if bars else 1.4
                )
            if column == columns[-1]:
                ends = sorted(
                    [level]
                    + [
                        (of_line["mean"].iloc[-1], line, colors[line])
                        for line, of_line in curves
                        if len(of_line) > 1 or line != "ref"
                    ]
                )
                gaps = (
                    0.085 * np.ptp(axes.get_ylim()) * np.arange(len(ends))
                )  # lest names lie over each other
                for y, (_, name, color) in zip(
                    isotonic_regression([y for y, *_ in ends] - gaps).x + gaps, ends
                ):
                    axes.annotate(
                        name,
                        (1, y),
                        (3, 0),
                        ("axes fraction", "data"),
                        "offset points",
                        va="center",
                        color=color,
                        fontsize=8,
                        annotation_clip=False,
                    )
    return figure


def draw_accuracy_by_rank(results):
    """A Figure: a panel per setting, a curve per alpha, the reference at its left."""

    def released(entry, setting):
        of_user = np.mean(
            [
                list(fit["accuracy_of_user"][setting].values())
                for fit in results["fits"]
                if (fit["K"], fit["alpha"]) == (entry["K"], entry["alpha"])
            ],
            0,
        )
        return dict(
            zip(("low", "mean", "high"), of_user.mean() + of_user.std() / 4 * np.array([-1, 0, 1]))
        )

    return small_multiples(
        results,
        [
            {
                "row": "accuracy",
                "column": setting,
                "line": f"alpha {entry['alpha']:g}" if entry["K"] else "ref",
                "rank K": entry["K"],
                **(released(entry, setting) if RELEASED_BAND else entry["accuracy"][setting]),
            }
            for entry in shown_rows(results)
            for setting in SETTINGS
        ],
        "rank K",
        "a quarter of the standard deviation" if RELEASED_BAND else "95 % interval",
    )


def draw_personal_part(results):
    """A Figure: accuracy by whose weights are used, and the personal part below; a column per alpha."""
    return small_multiples(
        results,
        [
            {
                "row": row,
                "column": f"alpha {entry['alpha']:g}",
                "line": line,
                "rank K": entry["K"],
                **values,
            }
            for entry in results["evidence"]
            if entry["personal_part"]
            for row, line, values in (
                ("accuracy", "own weights", entry["accuracy"][UNSEEN_TEST]),
                ("accuracy", "everybody's mean", entry["controls"]["mean_weights"]),
                ("accuracy", "other users'", entry["controls"]["other_users"]),
                ("personal part, own less mean", "own weights", entry["personal_part"]),
            )
            if values
        ],
        "rank K",
        note=f"; {UNSEEN_TEST}",
    )


def save_picture(folder, name, figure):
    """Write `name`.png and `name`.pdf."""
    for form, metadata in (
        ("png", None),
        ("pdf", {"CreationDate": None}),
    ):  # equal figures give equal files
        with atomic_write(Path(folder) / f"{name}.{form}") as file:
            figure.savefig(file, format=form, dpi=200, metadata=metadata)
