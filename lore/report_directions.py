"""The section of report.md on what the directions mean."""

from typing import Any

from lore.report import bullets, markdown_table, paragraphs
from lore.tables import Entry, Results, markdown_text, model_name

SHOWN_COLUMNS = 6  # examples are shown of so many columns, those that most users weigh most
SHOWN_EXAMPLES = 3  # of each of them

PICTURE = "directions"  # the name of the picture's files


def directions_section(results: Results, reading: Entry | None) -> str:
    """What the columns of the model that the verdict names prefer, and who weighs them.

    results: what results.json holds. reading: of `lore.reading.read_named_model`.
    """
    heading = "## What the directions mean"
    if reading is None:
        return paragraphs(heading, "The directions were not read.")
    if not reading["columns"]:
        return paragraphs(heading, *reading["notes"])
    return paragraphs(
        heading,
        *first_line(results["verdict"]["personal"], reading),
        subject(reading),
        *reading["notes"],
        *attributes_part(reading),
        *known_part(reading),
        "For each column: how many users give it their largest weight, how well these users are "
        "predicted, and how similar the nearest column of each other seed is.",
        markdown_table([people_row(column) for column in reading["columns"]]),
        *examples_part(reading),
    )


def first_line(personal: str, reading: Entry) -> list[str]:
    """What the people differ in, in a line; under another verdict than "yes" that nothing is known.

    Empty if it cannot be told.
    """
    if personal != "yes":
        return [
            f"**The verdict is “{personal}”: the directions describe nothing that is known to be "
            "personal, and may be noise.**"
        ]
    if reading["attributes"] is None:
        return []
    tastes = [
        f"some choose {', '.join(phrases_of(column))} (column {column['column']})"
        for column in reading["columns"]
        if column["attributes"]
    ]
    if not tastes:
        return [
            f"**The rewards are personal, but {reading['users']} unseen users do not tell in which "
            "attribute of texts they differ.**"
        ]
    return [f"**What people differ in, as far as it was found: {'; '.join(tastes)}.**"]


def phrases_of(column: Entry) -> list[str]:
    """What a column goes with, such as "longer texts"."""
    return [entry["phrase"] for entry in column["attributes"]]


def subject(reading: Entry) -> str:
    """Which model is read, and how."""
    name = model_name(reading["K"], reading["alpha"])
    return (
        f"This is about the model that the verdict names, {name}, seed {reading['seed']}. Its "
        f"basis has {len(reading['columns'])} columns, which are the directions, and each user has "
        "a weight for each of them. If users who weigh a column more also choose, for example, the "
        "longer text more often, the column goes with longer texts. More is in `reading.json`; "
        "`weights.csv` has the weights of every user."
    )


# ---- Attributes and answers


def attributes_part(reading: Entry) -> list[str]:
    """What is found of the texts, and the picture; empty if nothing could be told."""
    table = reading["attributes"]
    if table is None:
        return []
    found = [
        f"**Column {column['column']}** goes with {entry['text']}{shares_in_words(entry)}."
        for column in reading["columns"]
        for entry in column["attributes"]
    ]
    if found:
        parts = [
            "The weights of the unseen users go with these attributes of the texts that they "
            "choose. A p holds for all columns and attributes together. With so few users the "
            "attributes in brackets cannot be told from the one before them.",
            bullets(*found),
        ]
    else:
        parts = ["No correlation of weights and attributes can be told from chance."]
    alike = [
        name for name, values in zip(table["names"], zip(*table["correlation"])) if not any(values)
    ]
    if alike:
        parts.append(
            "Nothing can be told of these attributes, as the texts lack them or all users choose "
            f"them alike: {', '.join(alike)}."
        )
    return [*parts, f"![{picture_in_words(reading)}]({PICTURE}.png)"]


def shares_in_words(entry: Entry) -> str:
    """How often what the column goes with is chosen; empty if that is not known."""
    own, others = entry["share_of_its_users"], entry["share_of_others"]
    if own is None or others is None:
        return ""
    if entry["correlation"] < 0:  # the shares are those of the text with more of the attribute
        own, others = 1 - own, 1 - others
    return (
        f"; those who weigh it most choose {entry['phrase']} in {100 * own:.0f} % of the pairs "
        f"that differ in this, the others in {100 * others:.0f} %"
    )


def picture_in_words(reading: Entry) -> str:
    """The text for those who do not see the picture."""
    found = [
        f"column {column['column']} with {entry['attribute']} {entry['correlation']:+.2f}"
        for column in reading["columns"]
        for entry in column["attributes"]
    ]
    return (
        f"Correlations of the weights of {len(reading['columns'])} columns with the attributes of "
        f"the chosen texts. Told from chance: {', '.join(found) or 'none'}."
    )


def known_part(reading: Entry) -> list[str]:
    """What is known of the people and goes with their weights; empty if nothing is known."""
    table = reading["known"]
    if table is None:
        return []
    found = [
        f"**Column {column['column']}** goes with {markdown_text(entry['text'])}."
        for column in reading["columns"]
        for entry in column["known"]
    ]
    compared = (
        f"The weights of {table['users']} people were also compared with {len(table['names'])} "
        "answers that are known of them."
    )
    if not found:
        return [f"{compared} They go with none of these."]
    return [f"{compared} A p holds for all columns and answers together.", bullets(*found)]


# ---- People


def people_row(column: Entry) -> dict[str, Any]:
    """Who weigh a column most, and how similar the most similar column of each other seed is."""
    most = column["weigh_most"]
    correlations = [f"{again['correlation']:.2f}" for again in column["found_again"]]
    return {
        "column": column["column"],
        "goes with": phrases_of(column) or None,
        "unseen users": most["unseen"],
        "accuracy of the unseen": accuracy_cell(most["unseen_accuracy"]),
        "seen users": most["seen"],
        "accuracy of the seen": accuracy_cell(most["seen_accuracy"]),
        "correlation with the nearest column of other seeds": correlations or None,
    }


def accuracy_cell(accuracy: float | None) -> str | None:
    return None if accuracy is None else f"{accuracy:.3f}"


# ---- Examples


def examples_part(reading: Entry) -> list[str]:
    """Pairs of the columns that most unseen users weigh most; empty without texts."""
    columns = [
        column
        for column in reading["columns"]
        if column["examples"] and column["weigh_most"]["unseen"] > 0
    ]
    if not columns:
        return []
    columns.sort(key=lambda column: -column["weigh_most"]["unseen"])
    parts = [
        "For each column that some unseen user gives the largest weight: the test pairs on which "
        "it contradicts everybody's mean reward most. Long texts are shortened."
    ]
    for column in sorted(columns[:SHOWN_COLUMNS], key=lambda column: column["column"]):
        parts.append(f"### Examples of column {column['column']}")
        parts.append(bullets(*map(example_point, column["examples"][:SHOWN_EXAMPLES])))
    return parts


def example_point(example: Entry) -> str:
    """A pair as a point of a list, with a point below it for each of its texts."""
    prompt = example["prompt"]
    choice = "as the column does" if example["user_agrees"] else "the other one"
    lines = [
        "(the prompt is not known)" if prompt is None else f"*{markdown_text(prompt)}*",
        f"  - **The column prefers** {markdown_text(example['preferred'])}",
        f"  - **to** {markdown_text(example['other'])}",
        f"  - User {markdown_text(example['user'])} chose {choice}.",
    ]
    return "\n".join(lines)
