"""Results as tables of text, and names as plain text in Markdown, LaTeX and CSV."""

import re
from decimal import Decimal
from typing import Any

import pandas as pd

from lore.files import printable
from lore.intervals import DIFFERENCE, INTERVAL

REFERENCE = "ref"  # the name of K = 0 in tables and pictures
CHOSEN_MARK = " *"  # behind the rank of the model that validation chose

Results = dict[str, Any]  # what results.json holds
Entry = dict[str, Any]  # one row of its `evidence`: the model of one K and one alpha


def shown_rows(results: Results) -> list[Entry]:
    """The entries of `results["evidence"]` that tables and pictures show.

    The reference (K = 0) does not depend on alpha, so it is shown with the first alpha only.
    """
    entries = results["evidence"]
    first_alpha = entries[0]["alpha"]
    return [entry for entry in entries if entry["K"] > 0 or entry["alpha"] == first_alpha]


def everybody_is_seen(results: Results) -> bool:
    """Whether the unseen users are the seen ones, as in `lore.study.Study`."""
    return results["users"] == results["unseen_users"]


def model_name(K: int, alpha: float) -> str:
    """The name of a model in tables and pictures: `K = 3, alpha 0.5`, or `ref`."""
    if K == 0:
        return REFERENCE
    return f"K = {K}, alpha {alpha:g}"


def model_in_file_name(K: int, alpha: float) -> str:
    """A model in the name of a file, such as `K_3_alpha_0.001`.

    Every alpha has a point and no exponent: 1e-5 is 0.00001, and 1e4 is 10000.0, as in the names of
    the released checkpoints.
    """
    shortest = Decimal(str(float(alpha)))
    return f"K_{K}_alpha_{shortest:f}"


def model_cells(entry: Entry, chosen: dict[str, Any]) -> dict[str, str]:
    """The first two cells in the row of a model, by their headings.

    chosen: of results.json; the model that it names is marked.
    """
    mark = ""
    if (entry["K"], entry["alpha"]) == (chosen["K"], chosen["alpha"]):
        mark = CHOSEN_MARK
    if entry["K"] == 0:
        return {"K": REFERENCE + mark, "alpha": "-"}
    return {"K": f"{entry['K']}{mark}", "alpha": f"{entry['alpha']:g}"}


def format_cell(value: Any) -> str:
    """The text of a cell.

    value: an interval or a difference, as `lore.intervals.interval` returns them; a number, a truth
    value or a text; a list of these; or None for what is not known.
    """
    if value is None:
        return "-"
    if isinstance(value, dict):
        if "p" in value:
            return (DIFFERENCE + ", p {p:.2g}").format(**value)
        return INTERVAL.format(**value)
    if isinstance(value, list):
        return ", ".join(format_cell(element) for element in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def text_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A table of texts from rows `{heading: value}`; see `format_cell` for the values."""
    return pd.DataFrame(
        [{heading: format_cell(value) for heading, value in row.items()} for row in rows]
    )


# ---- Names
#
# The names of data, models and people are whatever somebody called them. In a file that is a
# program to its reader they must be plain text, so each goes through the escape of that file.
# Pictures have theirs in lore/pictures.py.

# Markdown, as CommonMark and GitHub read it. A backslash stands before most signs; for those before
# which not every reader takes one, and for those of HTML, there is an entity.
MARKDOWN_SIGNS = re.compile(r"[\\`*_{}\[\]#!]")
MARKDOWN_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {
    sign: f"&#{ord(sign)};" for sign in "|~$"
}

LATEX_SIGNS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{sign: "\\" + sign for sign in "{}$&#%_"},
}


def markdown_text(name: str) -> str:
    """A name as plain text in Markdown, in a heading, a cell of a table or within a line."""
    text = MARKDOWN_SIGNS.sub(r"\\\g<0>", printable(name))
    return text.translate(str.maketrans(MARKDOWN_ENTITIES))


def latex_text(name: str) -> str:
    """A name as plain text in LaTeX."""
    text = printable(name).translate(str.maketrans(LATEX_SIGNS))
    return re.sub("-(?=-)", "-{}", text)  # two hyphens would be a dash


def csv_text(frame: pd.DataFrame) -> str:
    """The text of a CSV file with a table, without its index.

    Texts are printable. One that a spreadsheet would take for a formula has an apostrophe before
    it, as those have that are typed there.
    """
    safe = frame.rename(columns=_csv_cell)
    for heading in safe.select_dtypes(exclude=["number", "bool"]):
        safe[heading] = safe[heading].map(_csv_cell)
    return safe.to_csv(index=False)


def _csv_cell(value: Any) -> Any:
    """The value of a cell, safe in a spreadsheet if it is a text."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    if text.lstrip()[:1] in ("=", "+", "-", "@") and not _is_number(text):
        return f"'{text}"
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
