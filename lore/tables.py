"""Results as tables of text."""

from typing import Any

import pandas as pd

from lore.intervals import DIFFERENCE, INTERVAL

REFERENCE = "ref"  # the name of K = 0 in tables and pictures

Results = dict[str, Any]  # what results.json holds
Entry = dict[str, Any]  # one row of its `evidence`: the model of one K and one alpha


def shown_rows(results: Results) -> list[Entry]:
    """The entries of `results["evidence"]` that tables and pictures show.

    The reference (K = 0) does not depend on alpha, so it is shown with the first alpha only.
    """
    entries = results["evidence"]
    first_alpha = entries[0]["alpha"]
    return [entry for entry in entries if entry["K"] > 0 or entry["alpha"] == first_alpha]


def model_name(K: int, alpha: float) -> str:
    """The name of a model in tables and pictures: `K = 3, alpha 0.5`, or `ref`."""
    if K == 0:
        return REFERENCE
    return f"K = {K}, alpha {alpha:g}"


def model_cells(entry: Entry) -> dict[str, str]:
    """The first two cells in the row of a model, by their headings."""
    if entry["K"] == 0:
        return {"K": REFERENCE, "alpha": "-"}
    return {"K": str(entry["K"]), "alpha": f"{entry['alpha']:g}"}


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
