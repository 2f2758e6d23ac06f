"""The pictures of results: small multiples, a panel for each setting or model."""

import contextlib
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from lore.files import atomic_write, escape, printable, replace_files_in
from lore.reading import FOUND
from lore.tables import (
    REFERENCE,
    Entry,
    Results,
    everybody_is_seen,
    model_name,
    shown_rows,
)
from lore.words import count_of, unseen_users
from utils import SETTINGS, UNSEEN_TEST

if TYPE_CHECKING:  # matplotlib takes a second to load, and only a picture needs it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# True: the picture shows a quarter of the standard deviation over users, as the released scripts
# do, instead of the 95 % interval.
RELEASED_BAND = False

RANK = "rank K"  # the x axis that has a place for each rank, whatever its value
# The row of panels in which 0 is the baseline.
PERSONAL_PART = "accuracy with own weights\nminus that with mean weights"
PANELS_ABREAST = 2  # if there is a single row of panels; more would be too small on a phone
CURVES_WITH_BANDS = 3  # in a panel with more curves bands would hide each other: they have bars

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "pdf.fonttype": 42,
    # Names are plain text: what stands between two dollar signs is no formula.
    "text.parse_math": False,
    "text.usetex": False,
}

Color = str | list[float]


class Label(NamedTuple):
    """A name that is written at the right end of a curve, or of the baseline."""

    height: float
    name: str
    color: Color


CHANCE = Label(0.5, "chance", "0.3")
NOTHING_PERSONAL = Label(0.0, "nothing personal", "0.3")


def small_multiples(
    results: Results,
    points: list[dict[str, Any]],
    x: str,
    band: str = "95 % interval",
    note: str = "",
) -> "Figure":
    """A picture with a panel for each row and column, and in it a curve for each line.

    A single row is broken into lines of PANELS_ABREAST panels.

    results: its `config`, `counts` and `seeds` are named above the panels.
    points: dicts with `row`, `column` and `line` (texts), `mean`, `low` and `high`, and a number
        under the key that `x` names. Panels and curves are in the order of the points.
    x: the key of the horizontal axis, which is also its label. Ranks are spaced evenly, see `RANK`.
    band: what `low` and `high` are the ends of. note: what else is said above the panels.
    """
    matplotlib = import_matplotlib()
    frame = pd.DataFrame(points)
    ranks = frame[x].unique()
    frame["x"] = pd.factorize(frame[x])[0] if x == RANK else frame[x]
    lines = lines_of_panels(frame)
    colors = line_colors(matplotlib, list(frame["line"].unique()))

    with matplotlib.rc_context(STYLE):
        columns = len(lines[0])
        longest_name = max(map(len, [*colors, CHANCE.name]))
        width = max(2.0 * columns + 0.5 + 0.07 * longest_name, 4.0)  # inches
        figure = matplotlib.figure.Figure((width, 2.3 * len(lines) + 0.7), layout="constrained")
        figure.suptitle(fitted(describe_study(results, band) + note, width), fontsize=9)
        figure.supxlabel(x, fontsize=9)
        shared = "all" if is_one_row(frame) else "row"
        grid = figure.subplots(len(lines), columns, sharex=True, sharey=shared, squeeze=False)
        for line, panels in zip(lines, grid):
            for (row, column), axes in zip(line, panels):
                curves = curves_in(frame, row, column)
                baseline = NOTHING_PERSONAL if row == PERSONAL_PART else CHANCE
                draw_panel(axes, curves, baseline, colors)
                if line is lines[0] or is_one_row(frame):
                    axes.set_title(column)
                axes.tick_params(labelbottom=True)
                if x == RANK:
                    axes.set_xticks(range(len(ranks)), [K or REFERENCE for K in ranks])
            # Of the last panel of the line.
            label_right_end(axes, curves, baseline, colors)
            panels[0].set_ylabel(row)
            for empty in panels[len(line) :]:
                empty.set_visible(False)
        escape_missing_glyphs(matplotlib, figure)
    return figure


def is_one_row(frame: pd.DataFrame) -> bool:
    """Whether all points belong to a single row of panels."""
    return frame["row"].nunique() == 1


def lines_of_panels(frame: pd.DataFrame) -> list[list[tuple[str, str]]]:
    """The (row, column) of each panel, by the lines that they are drawn in.

    frame: a table of points, see `small_multiples`.
    """
    rows = frame["row"].unique()
    columns = frame["column"].unique()
    abreast = PANELS_ABREAST if is_one_row(frame) else len(columns)
    return [
        [(row, column) for column in columns[start : start + abreast]]
        for row in rows
        for start in range(0, len(columns), abreast)
    ]


def fitted(text: str, width: float) -> str:
    """A title of font size 9 with its lines broken so that they fit a width in inches."""
    characters = int(14 * width)
    return "\n".join(textwrap.fill(line, characters) for line in text.split("\n"))


def import_matplotlib() -> Any:
    """matplotlib, whatever backend the environment names.

    A notebook names its own there, and in a process without that backend matplotlib refuses to
    load. A Figure that is only written to files needs no backend.
    """
    os.environ.pop("MPLBACKEND", None)
    import matplotlib.figure
    import matplotlib.font_manager
    import matplotlib.patches
    import matplotlib.text

    return matplotlib


def escape_missing_glyphs(matplotlib: Any, figure: "Figure") -> None:
    """Write characters that the picture's font lacks as their numbers, such as \\u4f60.

    They would be empty boxes, with a warning for each. Other fonts that are installed can be named
    in `font.family` of a matplotlibrc.
    """
    fonts = available_fonts(matplotlib)

    def shown(character: str) -> str:
        has_glyph = any(font.get_char_index(ord(character)) for font in fonts)
        return character if has_glyph or character == "\n" else escape(character)

    for text in figure.findobj(matplotlib.text.Text):
        escaped = "".join(map(shown, text.get_text()))
        if escaped != text.get_text():
            text.set_text(escaped)


def available_fonts(matplotlib: Any) -> list[Any]:
    """The fonts that matplotlib takes the characters of a text from, the first one first."""
    fonts = matplotlib.font_manager
    files = []
    for family in fonts.FontProperties().get_family():
        with contextlib.suppress(ValueError):  # not installed
            properties = fonts.FontProperties(family=family)
            files.append(fonts.findfont(properties, fallback_to_default=False))
    return [fonts.get_font(file) for file in files or [fonts.findfont(fonts.FontProperties())]]


def describe_study(results: Results, band: str) -> str:
    """The title of pictures with curves: the data, how many users and seeds, what the bands are."""
    return (
        f"{printable(results['config']['data'])}\n"
        f"{describe_users(results)}; {count_of(len(results['seeds']), 'seed')}\n"
        f"band or bar: {band} over users"
    )


def describe_users(results: Results) -> str:
    """How many users there are, and how many test pairs of the unseen ones."""
    counts = results["counts"]
    everybody = everybody_is_seen(results)
    seen = "" if everybody else f"{counts['seen users']:,} seen, "
    return (
        f"{seen}{unseen_users(counts['unseen users'], everybody)} "
        f"({count_of(counts['test unseen pairs'], 'test pair')})"
    )


def line_colors(matplotlib: Any, lines: list[str]) -> dict[str, Color]:
    """A colour for each line, along a scale from dark to light; the reference is grey."""
    named = [line for line in lines if line != REFERENCE]
    scale = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, len(named)))
    return dict(zip(named, scale.tolist())) | {REFERENCE: "0.4"}


def curves_in(frame: pd.DataFrame, row: str, column: str) -> dict[str, pd.DataFrame]:
    """The points of a panel by line, in the order of their first points."""
    points = frame[(frame["row"] == row) & (frame["column"] == column)]
    curves = {}
    for line, curve in points.groupby("line", sort=False):
        curves[line] = curve
    return curves


def draw_panel(
    axes: "Axes", curves: dict[str, pd.DataFrame], baseline: Label, colors: dict[str, Color]
) -> None:
    """Draw the baseline and the curves; a curve is a table with the columns x, mean, low, high."""
    axes.axhline(baseline.height, color=baseline.color, linewidth=0.9, linestyle="--")
    for i, (line, points) in enumerate(curves.items()):
        if len(points) > 1 and len(curves) <= CURVES_WITH_BANDS:
            draw_curve_with_band(axes, points, colors[line])
        else:
            off_centre = i - (len(curves) - 1) / 2  # in curves
            draw_curve_with_bars(axes, points, off_centre, colors[line])


def draw_curve_with_band(axes: "Axes", points: pd.DataFrame, color: Color) -> None:
    """Draw a curve in a band from `low` to `high`."""
    axes.fill_between(
        points["x"], points["low"], points["high"], color=color, alpha=0.15, linewidth=0
    )
    axes.plot(points["x"], points["mean"], "o-", color=color, markersize=3, linewidth=1.4)


def draw_curve_with_bars(
    axes: "Axes", points: pd.DataFrame, off_centre: float, color: Color
) -> None:
    """Draw a curve with a bar from `low` to `high` at each point.

    The bars of several curves would hide each other, so the curves are drawn side by side: each is
    moved by 0.12 of the distance between two points, times `off_centre`.
    """
    width = points["x"].max() - points["x"].min()
    distance = width / max(len(points) - 1, 1)
    x = points["x"] + off_centre * 0.12 * distance
    axes.vlines(x, points["low"], points["high"], color=color, linewidth=1)
    axes.plot(x, points["mean"], "o-", color=color, markersize=3, linewidth=0.7)


def label_right_end(
    axes: "Axes", curves: dict[str, pd.DataFrame], baseline: Label, colors: dict[str, Color]
) -> None:
    """Write the names of the curves and of the baseline beside the panel, none over another."""
    labels = [baseline]
    for line, points in curves.items():
        if line == REFERENCE and len(points) == 1:  # at the left, and named by the axis
            continue
        labels.append(Label(points["mean"].iloc[-1], line, colors[line]))
    labels.sort(key=lambda label: (label.height, label.name))
    text_height = 0.085 * np.ptp(axes.get_ylim())
    heights = spread(np.array([label.height for label in labels]), text_height)
    for height, label in zip(heights, labels):
        axes.annotate(
            label.name,
            xy=(1, height),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            color=label.color,
            fontsize=8,
            annotation_clip=False,
        )


def spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """The nearest heights (least squares) that are at least `gap` apart; heights: ascending `[n]`.

    If i gaps are taken off the i-th height, the rest only has to ascend. The nearest values that
    ascend are found by isotonic regression.
    """
    from scipy.optimize import isotonic_regression  # here, because it takes a second to load

    gaps = gap * np.arange(len(heights))
    return isotonic_regression(heights - gaps).x + gaps


def draw_accuracy_by_rank(results: Results) -> "Figure":
    """A panel for each setting, with a curve for each alpha and the reference at its left."""
    points = []
    for entry in shown_rows(results):
        for setting in SETTINGS:
            if RELEASED_BAND:
                ends = released_band(results, entry, setting)
            else:
                ends = entry["accuracy"][setting]
            points.append(
                {
                    "row": "accuracy",
                    "column": setting,
                    "line": f"alpha {entry['alpha']:g}" if entry["K"] else REFERENCE,
                    RANK: entry["K"],
                    **ends,
                }
            )
    band = "a quarter of the standard deviation" if RELEASED_BAND else "95 % interval"
    return small_multiples(results, points, RANK, band)


def released_band(results: Results, entry: Entry, setting: str) -> dict[str, float]:
    """{low, mean, high}: a quarter of the standard deviation over users, below and above the mean.

    As in the released plots. The accuracy of a user is the mean over the seeds of the model.
    """
    model = (entry["K"], entry["alpha"])
    per_seed = [
        list(fit["accuracy_of_user"][setting].values())
        for fit in results["fits"]
        if (fit["K"], fit["alpha"]) == model
    ]
    per_user = np.mean(per_seed, axis=0)
    mean = per_user.mean()
    quarter = per_user.std() / 4
    return {"low": mean - quarter, "mean": mean, "high": mean + quarter}


def draw_personal_part(results: Results) -> "Figure":
    """Unseen users' accuracy by whose weights are used, and the personal part below it.

    There is a column for each alpha. Models without a personal part are left out.
    """
    points = []
    for entry in results["evidence"]:
        if entry["personal_part"] is None:
            continue
        curves = [
            ("accuracy", "own weights", entry["accuracy"][UNSEEN_TEST]),
            ("accuracy", "everybody's mean weights", entry["controls"]["mean_weights"]),
            ("accuracy", "other users' weights", entry["controls"]["other_users"]),
            ("accuracy", "a model per user", entry["controls"]["model_per_user"]),
            ("accuracy", "worst tenth, own weights", entry["worst_served"]),
            (PERSONAL_PART, "own weights", entry["personal_part"]),
        ]
        for row, line, interval in curves:
            if interval is None:  # one unseen user has no others; without K = 1 no model per user
                continue
            points.append(
                {
                    "row": row,
                    "column": f"alpha {entry['alpha']:g}",
                    "line": line,
                    RANK: entry["K"],
                    **interval,
                }
            )
    return small_multiples(results, points, RANK, note=f"\n{UNSEEN_TEST}")


# ---- What the directions mean

SHOWN_DIRECTIONS = 12  # the columns that most users weigh most; more would not be legible


def draw_reading(results: Results, reading: Entry) -> "Figure":
    """The correlations of columns and attributes: a row for each attribute, a column for each.

    The colour and the number in a field are the correlation. Fields with p < FOUND have a frame
    and a bold number. A negative one has its sign and hatching, so the picture is also legible in
    grey. Attributes in which users do not differ at all are left out.

    results: what results.json holds. reading: of `lore.reading.read_directions`, with attributes.
    """
    matplotlib = import_matplotlib()
    shown = columns_to_draw(reading)
    correlation = np.array(reading["attributes"]["correlation"]).T  # (attributes, columns)
    varies = correlation.any(1)  # users do not differ in the other attributes at all
    names = [name for name, v in zip(reading["attributes"]["names"], varies) if v]
    correlation = correlation[varies][:, shown]
    is_found = np.array(reading["attributes"]["p"]).T[varies][:, shown] < FOUND
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "hatch.linewidth": 0.5}):
        width = max(0.48 * len(shown) + 1.8, 4.5)  # inches
        figure = matplotlib.figure.Figure((width, 0.27 * len(names) + 2.2), layout="constrained")
        title = describe_reading(results, reading, len(shown))
        figure.suptitle(fitted(title, width), fontsize=9)
        axes = figure.subplots()
        fields = axes.imshow(correlation, "PuOr", aspect="auto", vmin=-1, vmax=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(len(shown)), [column_label(reading["columns"][k]) for k in shown])
        axes.set_xlabel("column, and below it how many users weigh it most", fontsize=8)
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        for (j, k), value in np.ndenumerate(correlation):
            color = fields.cmap(fields.norm(value))
            draw_field(matplotlib, axes, (k, j), value, color, is_found[j, k])
        ticks = [-1, -0.5, 0, 0.5, 1]
        figure.colorbar(
            fields, ax=axes, label="correlation", location="bottom", aspect=40, ticks=ticks
        )
        escape_missing_glyphs(matplotlib, figure)
    return figure


def columns_to_draw(reading: Entry) -> list[int]:
    """The numbers of SHOWN_DIRECTIONS columns that most unseen users weigh most, ascending."""
    by_users = sorted(
        range(len(reading["columns"])),
        key=lambda k: -reading["columns"][k]["weigh_most"]["unseen"],
    )
    return sorted(by_users[:SHOWN_DIRECTIONS])


def column_label(column: Entry) -> str:
    """The number of a column, and below it how many users weigh it most."""
    return f"{column['column']}\n({column['weigh_most']['unseen']})"


def describe_reading(results: Results, reading: Entry, shown: int) -> str:
    """The title: the data, the model, what a field and its frame mean."""
    columns = len(reading["columns"])
    model = model_name(reading["K"], reading["alpha"])
    if shown < columns:
        model += f", {shown} of {columns} columns"
    return (
        f"{printable(results['config']['data'])}; {model}\n"
        f"{describe_users(results)}\n"
        "how a column's weight goes with choosing more of an attribute\n"
        f"framed: p < {FOUND:g}, corrected for all fields; hatched: below 0"
    )


def draw_field(
    matplotlib: Any,
    axes: "Axes",
    place: tuple[int, int],
    value: float,
    color: tuple[float, ...],
    found: bool,
) -> None:
    """Write a correlation into its field, hatch the field below 0, and frame it if it was found."""
    corner = (place[0] - 0.5, place[1] - 0.5)
    red, green, blue, _ = color
    is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5  # as bright as they are seen
    if round(value, 2) < 0:
        hatching = (1, 1, 1, 0.4) if is_dark else (0, 0, 0, 0.2)
        axes.add_patch(
            matplotlib.patches.Rectangle(
                corner, 1, 1, fill=False, hatch="//", edgecolor=hatching, linewidth=0
            )
        )
    if found:
        axes.add_patch(
            matplotlib.patches.Rectangle(
                corner, 1, 1, fill=False, edgecolor="black", linewidth=1.8, zorder=3, clip_on=False
            )
        )
    axes.text(
        *place,
        f"{value:+.2f}".replace("0.", ".").replace("-", "−"),
        ha="center",
        va="center",
        fontsize=8,
        color="white" if is_dark else "black",
        fontweight="bold" if found else "normal",
    )


# ---- Files


def save_pictures(folder: Path, drawings: dict[str, Callable[[], "Figure"]]) -> None:
    """Draw pictures, and write each as `name`.png and `name`.pdf.

    Call it when all else is written, so that nothing is lost to a picture. One that cannot be drawn
    is left out, which is printed.
    drawings: the name of each picture, and what draws it.
    Raises OSError that names the file: disk full, read-only.
    """
    with replace_files_in(folder) as new:
        for name, draw in drawings.items():
            try:
                save_picture(new, name, draw())
            except OSError:
                raise
            except Exception as error:  # whatever matplotlib raises
                reason = printable(f"{type(error).__name__}: {error}")
                print(f"note: no picture {name} ({reason}); all else is in {folder}")


def save_picture(folder: Path, name: str, figure: "Figure") -> None:
    """Write `name`.png and `name`.pdf to the folder; equal figures give equal files."""
    metadata = {"png": None, "pdf": {"CreationDate": None}}  # without the time of writing
    for form in ("png", "pdf"):
        with atomic_write(Path(folder) / f"{name}.{form}") as file:
            figure.savefig(file, format=form, dpi=200, metadata=metadata[form])
