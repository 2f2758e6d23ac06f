"""The section of report.md on what the directions mean."""

from lore.report import bullets, paragraphs
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
        return paragraphs(heading, "The directions could not be read, because of an error.")
    if not reading["columns"]:
        return paragraphs(heading, *reading["notes"])
    parts = [heading]
    if results["verdict"]["personal"] != "yes":
        parts.append(
            f"**The verdict is “{results['verdict']['personal']}”: the directions describe nothing "
            "that is known to be personal.**"
        )
    parts += [
        subject(reading),
        *attributes_part(reading),
        *known_part(reading),
        bullets(*(people_point(column, reading) for column in reading["columns"])),
        *examples_part(reading),
    ]
    return paragraphs(*parts)


def subject(reading: Entry) -> str:
    """Which model is read, and how."""
    name = model_name(reading["K"], reading["alpha"])
    return (
        f"This is about {name}, seed {reading['seed']}, the model that the verdict names, and its "
        f"{len(reading['columns'])} directions, the columns of its basis. A user has a weight for "
        "each. If users who weigh a column more also choose, for example, longer texts in their "
        "test pairs, the column goes with longer texts. More is in `reading.json`, and everybody's "
        "weights are in `weights.csv`."
    )


# ---- Attributes and answers


def attributes_part(reading: Entry) -> list[str]:
    """What is found of the texts, or why nothing is; and the picture."""
    parts = [*reading["notes"]]
    if reading["attributes"] is None:
        return parts
    found = [
        f"**Column {column['column']}** goes with {entry['text']}{shares_in_words(entry)}."
        for column in reading["columns"]
        for entry in column["attributes"]
    ]
    if found:
        parts += [
            "These are the attributes of texts that the users' weights go with. A p holds for all "
            "columns and attributes together. Of attributes in brackets these users cannot tell "
            "which one it is.",
            bullets(*found),
        ]
    else:
        parts.append("The users' weights go with none of the attributes of texts.")
    return [*parts, f"![{picture_in_words(reading)}]({PICTURE}.png)"]


def shares_in_words(entry: Entry) -> str:
    """How often the text with more of the attribute is chosen; empty if that is not known."""
    own, others = entry["share_of_its_users"], entry["share_of_others"]
    if own is None or others is None:
        return ""
    return (
        f": those who weigh it most choose the text with more in {own:.0%} of their pairs, all "
        f"others in {others:.0%}"
    )


def picture_in_words(reading: Entry) -> str:
    """The text for those who do not see the picture."""
    found = [
        f"column {column['column']} with {entry['attribute']} {entry['correlation']:+.2f}"
        for column in reading["columns"]
        for entry in column["attributes"]
    ]
    return (
        f"Correlation of the weights of {len(reading['columns'])} columns with "
        f"{len(reading['attributes']['names'])} attributes of the chosen texts. "
        f"Told from chance: {', '.join(found) or 'none'}."
    )


def known_part(reading: Entry) -> list[str]:
    """What is known of the people and goes with their weights; empty if nothing is known."""
    if reading["known"] is None:
        return []
    found = [
        f"**Column {column['column']}** goes with {markdown_text(entry['text'])}."
        for column in reading["columns"]
        for entry in column["known"]
    ]
    about = (
        f"What is known of {reading['known']['users']} people was compared with their weights, "
        f"{len(reading['known']['names'])} answers in all."
    )
    if not found:
        return [f"{about} The weights go with none of them."]
    return [f"{about} A p holds for all columns and answers together.", bullets(*found)]


# ---- People


def people_point(column: Entry, reading: Entry) -> str:
    """Who weigh a column most, and whether other seeds find it again."""
    most = column["weigh_most"]
    text = (
        f"**Column {column['column']}** is weighed most by {most['unseen']} of {reading['users']} "
        f"unseen users{accuracy_in_words(most['unseen_accuracy'])} and by {most['seen']} seen "
        f"users{accuracy_in_words(most['seen_accuracy'])}."
    )
    if column["found_again"]:
        correlations = ", ".join(f"{again['correlation']:.2f}" for again in column["found_again"])
        text += f" Correlation with the most similar column of each other seed: {correlations}."
    return text


def accuracy_in_words(accuracy: float | None) -> str:
    return "" if accuracy is None else f" (accuracy {accuracy:.3f})"


# ---- Examples


def examples_part(reading: Entry) -> list[str]:
    """Pairs of the columns that most users weigh most; empty without texts."""
    with_examples = [column for column in reading["columns"] if column["examples"]]
    if not with_examples:
        return []
    with_examples.sort(key=lambda column: -column["weigh_most"]["unseen"])
    shown = sorted(with_examples[:SHOWN_COLUMNS], key=lambda column: column["column"])
    parts = [
        "On the following test pairs a column contradicts everybody's mean reward most. Long texts "
        "are shortened."
    ]
    for column in shown:
        parts.append(f"### Examples of column {column['column']}")
        parts.append(bullets(*map(example_point, column["examples"][:SHOWN_EXAMPLES])))
    return parts


def example_point(example: Entry) -> str:
    """A pair as a point of a list, with a point below it for each of its texts."""
    user = markdown_text(example["user"])
    choice = "the first" if example["user_agrees"] else "the second"
    prompt = example["prompt"]
    lines = [
        "Without a prompt" if prompt is None else f"*{markdown_text(prompt)}*",
        f"  - **prefers** {markdown_text(example['preferred'])}",
        f"  - **to** {markdown_text(example['other'])}",
        f"  - chosen by user {user}: {choice}",
    ]
    return "\n".join(lines)
