"""Results as tables of text."""

import pandas as pd

from lore.evidence import DIFFERENCE, INTERVAL


def shown_rows(results):
    """The entries that tables and pictures show: the reference once, not once an alpha."""
    return [
        entry
        for entry in results["evidence"]
        if entry["K"] or entry["alpha"] == results["evidence"][0]["alpha"]
    ]


def format_cell(value):
    """The text of an interval, a number, a list of numbers, or of what is not known."""
    if isinstance(value, dict):
        return (DIFFERENCE + ", p {p:.2g}" if "p" in value else INTERVAL).format(**value)
    if isinstance(value, list):
        return ", ".join(map(format_cell, value))
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def text_table(entries, values):
    """A DataFrame of texts, a row per dict with K and alpha; values: of such a dict {heading: value}."""
    return pd.DataFrame(
        [
            {"K": str(entry["K"] or "ref"), "alpha": f"{entry['alpha']:g}" if entry["K"] else "-"}
            | {
                heading.replace("_", " "): format_cell(value)
                for heading, value in values(entry).items()
            }
            for entry in entries
        ]
    )
