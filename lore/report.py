"""report.md: the verdict first, then the tables that it rests on."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from lore.evidence import VALIDATION
from lore.tables import (
    CHOSEN_MARK,
    Entry,
    Results,
    everybody_is_seen,
    markdown_text,
    model_cells,
    model_name,
    shown_rows,
    text_table,
)
from lore.words import count_of
from utils import FEW_SHOT_TRAIN, SEEN_TEST, TRAIN, UNSEEN_TEST


class Column(NamedTuple):
    """A column of a table: its heading, and a sentence that explains it."""

    heading: str
    meaning: str


# What each setting measures. Their names, which the released scripts print, are the headings.
SETTING_MEANINGS = {
    TRAIN: "Seen users, on the pairs that the basis was learned from.",
    SEEN_TEST: "Seen users, on other pairs.",
    FEW_SHOT_TRAIN: "Unseen users, on the pairs that their weights are fitted to.",
    UNSEEN_TEST: "Unseen users, on other pairs. This is the setting that counts.",
    VALIDATION: "Seen users, on those of their training pairs that were held out of the training, "
    "to choose K and alpha by.",
}

# The columns of the other tables, by their keys in results.json.
CONTROLS = {
    "mean_weights": Column(
        "everybody's mean weights",
        "The accuracy if every user has the mean of all unseen users' weights.",
    ),
    "other_users": Column(
        "other users' weights",
        "The accuracy if every user has the weights of another unseen user, averaged over all "
        "other users.",
    ),
    "tossed": Column(
        "randomly flipped choices",
        "The accuracy of the model of the largest rank, trained and tested on choices that are "
        "flipped by a coin. The coin belongs to the pair, so a pair that is asked again falls the "
        "same way; otherwise nothing can be learned, and an accuracy above 0.5 is memory of pairs "
        "that the test repeats. Its interval is 2.6 standard deviations of chance to each side, so "
        "that chance leaves it about once in a hundred runs.",
    ),
    "model_per_user": Column(
        "a model per user",
        "The accuracy of one Bradley-Terry model for each user, fitted to the user's own pairs and "
        "drawn to the direction of K = 1 (a ridge). It is drawn as strongly as gives the highest "
        "accuracy on the seen users' unseen prompts.",
    ),
    "longer": Column(
        "longer answer",
        "The accuracy of always predicting that the longer answer is chosen. It shows "
        "how often users choose the longer answer.",
    ),
}
WORST = {
    "worst_served": Column(
        "worst tenth",
        "The mean accuracy of the tenth of users with the lowest accuracies.",
    ),
    "served_worse": Column(
        "served worse",
        "The share of users whom everybody's mean weights serve better than their own.",
    ),
}
DIFFERENCES = {
    "personal_part": Column(
        "personal part",
        "The accuracy with the user's own weights, minus that with everybody's mean weights.",
    ),
    "minus_reference": Column(
        "gain over the reference",
        "The accuracy minus that of the reference (K = 0).",
    ),
    "minus_pooled": Column(
        "gain over K = 1",
        "The accuracy minus that of one direction for everybody.",
    ),
}
LEAKS = {
    "by_prompt": Column("prompts", "Their prompt or conversation."),
    "by_answers": Column("answers", "Their two answers, either way round."),
    "by_answer_in_prompt": Column(
        "answers in prompts",
        "Their prompt and one of their answers, at the beginning of a longer prompt: a later turn "
        "of their conversation.",
    ),
    "by_features": Column(
        "features", "Nearly their features, of the same user and either way round."
    ),
}
BASIS = {
    "columns": Column("columns", "How many directions the basis has."),
    "effective_rank": Column(
        "effective rank",
        "How many directions are really in use, with each column scaled by its mean user weight: "
        "the exponential of the entropy of the squared singular values.",
    ),
    "largest_cosine_between_columns": Column(
        "largest cosine between columns",
        "The absolute cosine of the two columns that are most alike.",
    ),
    "largest_cosine_to_head": Column(
        "largest cosine to the reward head",
        "The absolute cosine of the head and the column that is most like it.",
    ),
    "mean_weight_entropy": Column(
        "mean entropy of user weights",
        "In nats, a mean over seen users. It is 0 if every user takes one column only.",
    ),
    "angles_between_seeds": Column(
        "angles between seeds",
        "The principal angles in degrees between the bases of two seeds, the smallest first, as "
        "means over all pairs of seeds. Small angles mean that the seeds found the same basis.",
    ),
}
SEED = Column("seed", "The seed of the training.")
KEPT = Column("kept", "Whether the basis of this seed is the one to use.")
FILE = Column("file", "The basis and the weights of this seed.")
LOSS = Column("training loss", "The loss at the end of the training, without the penalty.")


def report(results: Results, tastes: str = "", directions: str = "") -> str:
    """The text of report.md, in Markdown.

    results: what results.json holds. tastes: of `lore.report_directions.tastes_sentence`.
    directions: of `lore.report_directions.directions_section`. Either may be empty.
    """
    sections = [
        verdict_section(results, tastes),
        reading_section(results),
        data_section(results),
        directions,
        accuracy_section(results),
        controls_section(results),
        basis_section(results),
        leaks_section(results),
    ]
    return paragraphs(*sections) + "\n"


def verdict_section(results: Results, tastes: str) -> str:
    """The title and the verdict, its first line in bold; tastes: how many people like what."""
    first, *further = results["verdict"]["text"].splitlines()
    data = markdown_text(results["config"]["data"])
    synthetic = ""
    if results["demo"]:
        synthetic = (
            "*These data are synthetic: they were made up to try the scripts, and say nothing "
            "about people.*"
        )
    title = f"# {data}: is the reward personal?"
    return paragraphs(title, synthetic, f"**{first}**", tastes, *further)


def reading_section(results: Results) -> str:
    """What the verdict is about, which data it rests on, and how to read the tables."""
    counts = results["counts"]
    chosen = results["chosen"]
    marks = []
    if chosen["by"] == "none" and not any(entry["personal_part"] for entry in results["evidence"]):
        subject = (
            "No model has user weights, so the verdict can only name one reward for everybody "
            f"({choice_in_words(results)})."
        )
    elif chosen["by"] == "none":
        subject = (
            f"The verdict is about all ranks from K = 2 on at once ({choice_in_words(results)}), "
            "and names the one with the largest personal part."
        )
    else:
        subject = (
            f"The verdict is about one model ({choice_in_words(results)}); its basis is in "
            f"`{chosen['file']}`."
        )
        marks = [f"`{CHOSEN_MARK.strip()}` marks the model that was chosen by validation."]
    validation = ""
    if counts["validation pairs"] > 0:
        held_out = count_of(counts["validation pairs"], "other pair")
        validation = f" Validation had {held_out} of theirs."
    equal_sides = ""
    if counts["pairs with equal sides"] > 0:
        equal_sides = (
            f" In {count_of(counts['pairs with equal sides'], 'pair')} both sides are equal. No "
            "reward can tell them apart, so such a pair counts as predicted wrong."
        )
    learned = count_of(counts["train pairs"] - counts["validation pairs"], "pair")
    fitted = count_of(counts["train unseen pairs"], "pair")
    tested = count_of(counts["test unseen pairs"], "other pair")
    if everybody_is_seen(results):
        people = count_of(counts["seen users"], "user")
        fit = (
            "No user is unseen: what this report says of unseen users is about the same people. "
            "Their weights were fitted once more, with the basis frozen, to "
            f"{fitted} of their training, and tested on {tested}."
        )
    else:
        people = count_of(counts["seen users"], "seen user")
        unseen = count_of(counts["unseen users"], "unseen user")
        fit = (
            f"{unseen} had no part in this: only their weights were fitted, to {fitted} of theirs, "
            f"and tested on {tested}."
        )
    return paragraphs(
        "## What the verdict rests on",
        f"{subject} The basis was learned from {learned} of {people}.{validation} {fit}"
        f"{equal_sides}",
        bullets(
            *marks,
            "**K** is the rank. `ref` (K = 0) is the reference, the pretrained reward head. K = 1 "
            "is one direction for everybody. From K = 2 on there is a basis of K directions, and "
            "each user has weights over them.",
            "**alpha** is the weight of the penalty on the distance between basis and reward head.",
            "**Accuracies** are shares of pairs that are predicted right. They are means over "
            "users and seeds, with 95 % intervals over users. An interval holds for its own row "
            "alone, not for all rows at once.",
            "**p** is the p-value of the Wilcoxon signed-rank test over users.",
            "A dash means that a value is not known or does not exist.",
        ),
    )


def choice_in_words(results: Results) -> str:
    """Which model validation chose, and its accuracy there; or that it chose none, and why."""
    chosen = results["chosen"]
    if chosen["by"] == "none":
        return "none chosen by validation, as validation_share is 0"
    model = (chosen["K"], chosen["alpha"])
    accuracy = {(entry["K"], entry["alpha"]): entry["accuracy"] for entry in results["evidence"]}
    share = accuracy[model][VALIDATION]["mean"]
    return f"chosen by validation: {model_name(*model)}, {share:.3f}"


def data_section(results: Results) -> str:
    """What is odd in the data."""
    notes = results["data_notes"]
    equal_pairs = results["equal_pairs"] or {}
    points = [markdown_text(note) for note in notes or []]
    for file, counts in equal_pairs.items():
        points.append(
            f"{markdown_text(file)}: in {counts['equal']:,} of {count_of(counts['pairs'], 'pair')} "
            "both sides have equal token ids"
        )
    if points:
        content = bullets(*points)
    elif notes is None:
        content = "Not known: these embeddings were made without notes on their data."
    else:
        content = (
            "Nothing odd was found when the data were read. What the test repeats of the training "
            "is under Leaks."
        )
    return paragraphs("## What is odd in the data", content)


def accuracy_section(results: Results) -> str:
    """The accuracy of every model in every setting."""
    entries = shown_rows(results)
    settings = [Column(setting, SETTING_MEANINGS[setting]) for setting in entries[0]["accuracy"]]
    return paragraphs(
        "## Accuracy",
        explain(settings),
        markdown_table(
            [model_cells(entry, results["chosen"]) | entry["accuracy"] for entry in entries]
        ),
        f"![Accuracy by rank. {on_unseen_prompts(entries)}.](accuracy_by_rank.png)",
    )


def controls_section(results: Results) -> str:
    """What the accuracy on unseen users' unseen prompts would be without anything personal."""
    trained = trained_models(results["evidence"])
    names = [model_cells(entry, results["chosen"]) for entry in trained]
    controls = [with_headings(CONTROLS, entry["controls"]) for entry in trained]
    comparisons = [comparison_cells(entry) for entry in trained]
    section = paragraphs(
        f"## Controls and comparisons, on {UNSEEN_TEST}",
        "The first table has other ways to predict the same choices. Most of them know nothing of "
        "what the user likes.",
        explain(list(CONTROLS.values())),
        markdown_table([name | cells for name, cells in zip(names, controls)]),
        "The second table compares models, and users with one another.",
        explain([*WORST.values(), *DIFFERENCES.values()]),
        markdown_table([name | cells for name, cells in zip(names, comparisons)]),
    )
    if any(entry["personal_part"] for entry in trained):
        parts = [entry for entry in trained if entry["personal_part"]]
        means = ", ".join(
            f"{model_name(entry['K'], entry['alpha'])} {entry['personal_part']['mean']:+.3f}"
            for entry in parts
        )
        picture = (
            "![Personal part by rank: the accuracy with own weights minus that with everybody's "
            f"mean weights. {means}.](personal_part.png)"
        )
        section = paragraphs(section, picture)
    return section


def on_unseen_prompts(entries: list[Entry]) -> str:
    """The accuracies of the setting that counts, for those who do not see the picture."""
    means = ", ".join(
        f"{model_name(entry['K'], entry['alpha'])} {entry['accuracy'][UNSEEN_TEST]['mean']:.3f}"
        for entry in entries
    )
    return f"{UNSEEN_TEST}: {means}"


def comparison_cells(entry: Entry) -> dict[str, Any]:
    """Whom one model serves worst and what it gains, by the headings of the columns."""
    gains = {
        "personal_part": entry["personal_part"],
        "minus_reference": entry["minus_reference"][UNSEEN_TEST],
        "minus_pooled": entry["minus_pooled"][UNSEEN_TEST],
    }
    return with_headings(WORST, entry) | with_headings(DIFFERENCES, gains)


def basis_section(results: Results) -> str:
    """What the kept basis of every model looks like, and what its seeds reached."""
    chosen = results["chosen"]
    if chosen["by"] == "none":
        kept = "the lowest training loss"
    else:
        kept = "the best accuracy in validation"
    bases = [
        model_cells(entry, chosen) | with_headings(BASIS, entry["basis"])
        for entry in trained_models(results["evidence"])
    ]
    seeds = [
        model_cells(fit, chosen)
        | {
            SEED.heading: fit["seed"],
            KEPT.heading: fit["kept"],
            LOSS.heading: fit["training_loss"],
            UNSEEN_TEST: fit["mean_accuracy"][UNSEEN_TEST],
            FILE.heading: f"`{fit['file']}`",
        }
        for fit in trained_models(results["fits"])
    ]
    return paragraphs(
        "## Basis and seeds",
        *rank_remarks([entry["K"] for entry in results["evidence"]], results["counts"]),
        f"Of each model the seed with {kept} is kept. The first table describes its basis. The "
        "accuracies above are means over all seeds.",
        explain(list(BASIS.values())),
        markdown_table(bases),
        "The second table lists all seeds.",
        explain([SEED, KEPT, LOSS, FILE]),
        markdown_table(seeds),
    )


def rank_remarks(ranks: Iterable[int], counts: dict[str, int]) -> list[str]:
    """A sentence for each reason why the largest rank is larger than can be of use.

    counts: of results.json.
    """
    rank = max(ranks)
    users = counts["seen users"]
    d = counts["d"]
    remarks = []
    if rank > max(users, 1):
        remarks.append(
            f"K = {rank} is more directions than there are seen users ({users}): each can have one "
            "to themselves, so nothing needs to be shared."
        )
    if rank > d:
        remarks.append(
            f"K = {rank} is more directions than the embeddings have numbers (d = {d}): some are "
            "mixtures of others."
        )
    return remarks


def leaks_section(results: Results) -> str:
    """How many test pairs the training has seen in some form."""
    lines = []
    for setting, leaks in results["leaks"].items():
        shares = []
        for key, repeat in LEAKS.items():
            share = leaks[key]
            shares.append(f"{repeat.heading} {'not known' if share is None else f'{share:.1%}'}")
        lines.append(f"**{setting}**: {', '.join(shares)}")
    return paragraphs(
        "## Leaks",
        "These are the shares of test pairs of which something is also in the training pairs of "
        "the same group of users, seen or unseen. One test pair may count several times.",
        explain(list(LEAKS.values())),
        bullets(*lines),
    )


def trained_models(entries: list[Entry]) -> list[Entry]:
    """The entries without those of the reference, which is not trained."""
    return [entry for entry in entries if entry["K"] > 0]


def with_headings(columns: dict[str, Column], values: dict[str, Any]) -> dict[str, Any]:
    """The values under the headings of their columns."""
    return {column.heading: values[key] for key, column in columns.items()}


def explain(columns: list[Column]) -> str:
    """A bullet for each column of a table, with its meaning."""
    return bullets(*(f"**{column.heading}**: {column.meaning}" for column in columns))


def bullets(*points: str) -> str:
    """A Markdown list."""
    return "\n".join(f"- {point}" for point in points)


def paragraphs(*texts: str) -> str:
    """The texts with an empty line between them; empty texts are left out."""
    return "\n\n".join(text for text in texts if text)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows `{heading: value}`."""
    if not rows:
        return "No model was trained, so there is no table."
    table = text_table(rows)
    lines = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
