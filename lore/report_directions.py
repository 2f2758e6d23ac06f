"""What report.md says of the directions: a sentence beside the verdict, and a section."""

from typing import Any, NamedTuple

from lore.reading import phrase
from lore.report import bullets, markdown_table, paragraphs
from lore.tables import Entry, Results, everybody_is_seen, markdown_text, model_name
from lore.words import unseen_users

MOST_NAMED_FACTS = 5  # so many things that are known of people are named
SHOWN_COLUMNS = 6  # examples are shown of so many columns, those that most users weigh most
SHOWN_EXAMPLES = 3  # of each of them

PICTURE = "directions"  # the name of the picture's files


# ---- What people differ in


class Taste(NamedTuple):
    """What a column goes with, or several columns that go with the same."""

    phrase: str  # such as "longer texts or more words, and more digits"
    columns: list[int]
    users: int  # how many unseen users weigh one of these columns most
    is_chosen_more: bool  # whether these users chose it more often than the others did
    contrary: str  # what the others choose, such as "shorter texts"; empty if that is not known


def tastes_of(reading: Entry) -> list[Taste]:
    """What the columns go with, in the order of the columns."""
    alike: dict[tuple[str, ...], list[Entry]] = {}  # the columns by what they go with
    for column in reading["columns"]:
        if column["attributes"]:
            alike.setdefault(tuple(phrases_of(column)), []).append(column)
    return [taste_of(columns) for columns in alike.values()]


def taste_of(columns: list[Entry]) -> Taste:
    """The taste of columns that go with the same attributes."""
    findings = list(zip(*(column["attributes"] for column in columns)))  # each of all columns
    known_shares = [oriented_shares(entry) for entries in findings for entry in entries]
    contrary = ""
    if len(columns) > 1 and all(shares and shares[1] < 0.5 for shares in known_shares):
        firsts = [entries[0] for entries in findings]
        contrary = ", and ".join(
            phrase(entry["attribute"], -entry["correlation"]) for entry in firsts
        )
    return Taste(
        phrase=", and ".join(map(alternatives, findings)),
        columns=[column["column"] for column in columns],
        users=sum(column["weigh_most"]["unseen"] for column in columns),
        is_chosen_more=all(shares and shares[0] > shares[1] for shares in known_shares),
        contrary=contrary,
    )


def alternatives(entries: list[Entry]) -> str:
    """All attributes that a finding may be about, such as "longer texts or more words".

    entries: the same finding, of each column that has it.
    """
    names = {}  # as keys, so that each is named once
    for entry in entries:
        names[entry["phrase"]] = None
        for other in entry["with"]:
            names[phrase(other["attribute"], other["correlation"])] = None
    *before, last = names
    return f"{', '.join(before)} or {last}" if before else last


def oriented_shares(entry: Entry) -> tuple[float, float] | None:
    """How often those who weigh a column most, and the others, choose what it goes with.

    None if there is nobody of either kind.
    """
    own, others = entry["share_of_its_users"], entry["share_of_others"]
    if own is None or others is None:
        return None
    if entry["correlation"] < 0:  # the shares are those of the text with more of the attribute
        return 1 - own, 1 - others
    return own, others


def tastes_sentence(results: Results, reading: Entry | None) -> str:
    """How many people like what; empty if the rewards are not personal, or nothing was found.

    results, reading: as `directions_section` takes them.
    """
    if reading is None or results["verdict"]["personal"] != "yes":
        return ""
    tastes = [taste for taste in tastes_of(reading) if taste.users > 0 and taste.is_chosen_more]
    if not tastes:
        return ""
    first, *further = tastes
    people = unseen_users(reading["users"], everybody_is_seen(results))
    clauses = [
        f"{first.users} of {people} chose {first.phrase}",
        *(f"{taste.users} chose {taste.phrase}" for taste in further),
    ]
    return f"More often than the others, {'; '.join(clauses)}."


# ---- The section


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
        *first_line(results, reading),
        subject(reading),
        *reading["notes"],
        *attributes_part(reading),
        *known_part(reading),
        "For each column: how many users give it their largest weight, how well these users are "
        "predicted, and the correlation with the most similar column of each other seed. A column "
        "that nobody weighs most only adds to others.",
        markdown_table([people_row(column) for column in reading["columns"]]),
        *examples_part(results, reading),
    )


def first_line(results: Results, reading: Entry) -> list[str]:
    """What the people differ in, in a line; under another verdict than "yes" that nothing is known.

    Empty if it cannot be told.
    """
    personal = results["verdict"]["personal"]
    if personal != "yes":
        return [
            f"**The verdict is “{personal}”: the directions describe nothing that is known to be "
            "personal, and may be noise.**"
        ]
    if reading["attributes"] is None:
        return []
    tastes = tastes_of(reading)
    if not tastes:
        people = unseen_users(reading["users"], everybody_is_seen(results))
        return [
            f"**The rewards are personal, but {people} cannot tell in which attribute of texts "
            "they differ.**"
        ]
    clauses = "; ".join(map(taste_in_words, tastes))
    return [f"**What some choose more often than others, as far as it was found: {clauses}.**"]


def taste_in_words(taste: Taste) -> str:
    """Such as "longer texts (columns 1, 4), while others choose shorter texts"."""
    noun = "column" if len(taste.columns) == 1 else "columns"
    text = f"{taste.phrase} ({noun} {', '.join(map(str, taste.columns))})"
    return f"{text}, while others choose {taste.contrary}" if taste.contrary else text


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
    if has_picture(reading):
        parts.append(f"![{picture_in_words(reading)}]({PICTURE}.png)")
    return parts


def has_picture(reading: Entry | None) -> bool:
    """Whether there is any correlation of weights and attributes that could be drawn."""
    if reading is None or reading["attributes"] is None:
        return False
    return any(map(any, reading["attributes"]["correlation"]))


def shares_in_words(entry: Entry) -> str:
    """How often what the column goes with is chosen; empty if that is not known."""
    shares = oriented_shares(entry)
    if shares is None:
        return ""
    own, others = shares
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
    names = [markdown_text(name) for name in table["names"]]
    facts = ", ".join(names)
    if len(names) > MOST_NAMED_FACTS:
        facts = f"{len(names)} facts about each"
    compared = (
        f"The weights of {table['users']} people were also compared with what is known of them: "
        f"{facts}."
    )
    if not found:
        return [f"{compared} No correlation can be told from chance."]
    return [f"{compared} A p holds for all columns and facts together.", bullets(*found)]


# ---- People


def people_row(column: Entry) -> dict[str, Any]:
    """Who weigh a column most, and how similar the most similar column of each other seed is."""
    most = column["weigh_most"]
    correlations = [f"{again['correlation']:.2f}" for again in column["found_again"]]
    return {
        "column": column["column"],
        "goes with": [alternatives([entry]) for entry in column["attributes"]] or None,
        "unseen users": most["unseen"],
        "accuracy of the unseen": accuracy_cell(most["unseen_accuracy"]),
        "seen users": most["seen"],
        "accuracy of the seen": accuracy_cell(most["seen_accuracy"]),
        "other seeds": correlations or None,
    }


def accuracy_cell(accuracy: float | None) -> str | None:
    return None if accuracy is None else f"{accuracy:.3f}"


# ---- Examples


def examples_part(results: Results, reading: Entry) -> list[str]:
    """Pairs of the columns that most unseen users weigh most.

    Empty without texts, and if the verdict is not "yes": then they would be examples of noise.
    """
    columns = [column for column in reading["columns"] if column["examples"]]
    if not columns or results["verdict"]["personal"] != "yes":
        return []
    columns.sort(key=lambda column: -column["weigh_most"]["unseen"])
    shown = columns[:SHOWN_COLUMNS]
    left_out = ""
    if len(shown) < len(columns):
        left_out = f" Shown are the {SHOWN_COLUMNS} columns that most users weigh most."
    parts = [
        "The examples of a column are test pairs of the users who weigh it most: those on which it "
        "contradicts everybody's mean reward most, one a prompt. No pair is shown twice. "
        f"Long texts are shortened.{left_out}"
    ]
    for column in sorted(shown, key=lambda column: column["column"]):
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
