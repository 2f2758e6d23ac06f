"""The verdict: is the reward personal, and what else could explain it, in sentences."""

from dataclasses import dataclass

import numpy as np

from lore.intervals import DIFFERENCE, INTERVAL, joint_intervals
from utils import UNSEEN_TEST

NEGLIGIBLE = 0.01  # of accuracy: a personal part that is surely smaller counts as none
FEWEST_USERS = 6  # with fewer no signed-rank test can reach p < 0.05, and an interval says nothing
COLLAPSED = 0.99  # |cosine| with the reward head from which on a column counts as that head

# What controls of an entry are called in sentences.
CONTROLS = {
    "tossed": "a model trained on randomly flipped choices",
    "longer": "taking the longer answer",
}


@dataclass
class ModelEvidence:
    """What is known of one model, that is of one K and one alpha, over all its seeds."""

    entry: dict  # of `evidence` in results.json
    personal_part: np.ndarray | None  # float64 [N_unseen]; None if the model has no user weights
    collapsed: bool  # all columns of all seeds are the reward head, see COLLAPSED


@dataclass
class Judgement:
    personal: str  # "yes", "no" or "undecided"
    entry: dict  # of the model that the sentences are about
    lines: list[str]


def write_verdict(
    models: list[ModelEvidence], chosen: ModelEvidence | None, leak: float | None, users: int
) -> dict[str, str]:
    """The verdict of results.json: `{personal: "yes" | "no" | "undecided", text}`.

    chosen: the model that held-out pairs have chosen; None: the verdict is about all models with
    user weights at once. leak: the share of the unseen users' test pairs whose prompt they were
    trained on; None if not known. users: how many unseen users there are.
    """
    entries = [model.entry for model in models]
    candidates = models if chosen is None else [chosen]
    personalised = [model for model in candidates if model.personal_part is not None]
    if personalised:
        judgement = judge(personalised)
    else:
        judgement = judge_one_reward_for_all(candidates[-1].entry, users)

    signs = signs_of_artefact(entries, leak, users)
    lines = list(judgement.lines)
    if signs:
        lines[0] += " But see the signs of an artefact below."
    lines += sentences_on_shared_rewards(entries, judgement, users)
    lines += sentences_on_controls(entries)
    lines.append(sentence_on_leak(leak))
    lines.append(f"Signs of an artefact: {'; '.join(signs) or 'none in these checks'}.")

    collapsed = [model.entry for model in models if model.collapsed]
    if collapsed:
        lines.append(
            f"Collapsed onto the reward head, all columns within a cosine of {COLLAPSED}: "
            f"{names_of(collapsed)}. "
            "Put smaller penalties into alpha_list and have validation_share choose."
        )
    return {"personal": judgement.personal, "text": "\n".join(lines)}


def judge(models: list[ModelEvidence]) -> Judgement:
    """Judge models with user weights, by intervals of the personal part that hold for all at once.

    The sentences are about the model with the largest personal part, of those whose interval is
    above 0 if there are any; of equal ones the first.
    """
    entries = [model.entry for model in models]
    parts = np.stack([model.personal_part for model in models], 1)  # (N, models)
    N = len(parts)
    mean = parts.mean(0)  # (models,)
    low, high = joint_intervals(parts)
    personal = decide(N, low, high)

    positive = [m for m in range(len(models)) if low[m] > 0]
    # Rounded, equal means tie in whatever order they were added up.
    best = max(positive or range(len(models)), key=lambda m: mean[m].round(9))
    lines = [sentence_on_personal_part(personal, models[best], low[best], high[best], len(models))]
    if len(models) > 1:
        ranks = names_of([entries[m] for m in positive]) or "no rank"
        lines.append(f"By such intervals the personal part is above 0 at {ranks}.")
    if entries[best]["accuracy"][UNSEEN_TEST]["mean"] <= 0.5:
        lines.append("But own weights predict no better than chance.")
    if N < FEWEST_USERS:
        lines.append(f"{N} unseen users are too few to tell, at least {FEWEST_USERS} are needed.")
    elif personal == "undecided":
        users = users_that_decide(N, mean[best], (high[best] - low[best]) / 2)
        lines.append(
            f"About {users:,.0f} unseen users with as many pairs as these {N} would decide it."
        )
    return Judgement(personal, entries[best], lines)


def decide(N: int, low: np.ndarray, high: np.ndarray) -> str:
    """The verdict on the personal parts of N users, of which these are the joint intervals.

    "yes" if any interval is above 0, "no" if all of them end below NEGLIGIBLE, else "undecided";
    of fewer than FEWEST_USERS users always "undecided".
    """
    if N < FEWEST_USERS:
        return "undecided"
    if low.max() > 0:
        return "yes"
    if high.max() < NEGLIGIBLE:
        return "no"
    return "undecided"


def sentence_on_personal_part(
    personal: str, model: ModelEvidence, low: float, high: float, judged_models: int
) -> str:
    """The first sentence: the verdict, and the numbers of the model that it is about."""
    own = model.entry["accuracy"][UNSEEN_TEST]["mean"]
    mean_weights = model.entry["controls"]["mean_weights"]["mean"]
    if judged_models > 1:
        remark = (
            f"which holds for all {judged_models} models at once and is wider than those in the "
            "tables."
        )
    else:
        remark = "a little wider than in the tables, for the number of users."
    return (
        f"{personal.capitalize()}: at {names_of([model.entry])} unseen users' own weights predict "
        f"{own:.3f} of their unseen pairs, everybody's mean weights {mean_weights:.3f}: a personal "
        f"part of {model.personal_part.mean():+.3f}, with a 95 % interval over users of "
        f"[{low:+.3f}, {high:+.3f}], {remark}"
    )


def judge_one_reward_for_all(entry: dict, users: int) -> Judgement:
    """Judge a model without user weights: nothing of it is personal, if there are users to tell."""
    personal = "no" if users >= FEWEST_USERS else "undecided"
    line = (
        f"{personal.capitalize()}: {names_of([entry])} is one reward for everybody, "
        "it has no user weights."
    )
    return Judgement(personal, entry, [line])


def users_that_decide(N: int, mean: float, half_width: float) -> float:
    """About how many users would decide it, to two digits: more than the N that have not.

    An interval shrinks with the root of the number of users. It decides once it ends above 0 or
    below NEGLIGIBLE, and it leaves out first what is farther from the mean.
    """
    distance = max(mean, NEGLIGIBLE - mean)
    users = N * (half_width / distance) ** 2
    return max(N + 1, float(f"{users:.2g}"))


def sentences_on_shared_rewards(entries: list[dict], judgement: Judgement, users: int) -> list[str]:
    """What the reference and one direction for everybody score, at the judged model's alpha."""
    judged = judgement.entry
    by_rank = {entry["K"]: entry for entry in entries if entry["alpha"] == judged["alpha"]}
    lines = []
    if 0 in by_rank and users >= FEWEST_USERS:
        reference = by_rank[0]["accuracy"][UNSEEN_TEST]
        if reference["low"] <= 0.5:
            is_at = "is at or below" if reference["mean"] <= 0.5 else "cannot be told from"
            lines.append(
                f"The reference {is_at} chance (K = 0, {INTERVAL.format(**reference)}): either "
                "this vector is not the model's reward head, or that head knows little of these "
                "choices."
            )
    if 0 in by_rank and 1 in by_rank:
        gain = by_rank[1]["minus_reference"][UNSEEN_TEST]
        line = "One direction for everybody (K = 1) against the reference: "
        line += DIFFERENCE.format(**gain)
        if judged["K"] > 1:
            more = judged["minus_pooled"][UNSEEN_TEST]
            line += f"; {names_of([judged])} against K = 1: {DIFFERENCE.format(**more)}"
        lines.append(line + ".")
        if gain["low"] > 0 and judgement.personal != "yes" and users >= FEWEST_USERS:
            lines.append(
                "So one direction explains the gain over the reference: "
                "it is the same for everybody."
            )
    return lines


def first_control(entries: list[dict], control: str) -> dict[str, float] | None:
    """The interval of a control in the first entry that has it."""
    for entry in entries:
        if entry["controls"][control] is not None:
            return entry["controls"][control]
    return None


def sentences_on_controls(entries: list[dict]) -> list[str]:
    """What models score that cannot know anybody's tastes."""
    lines = []
    for control, name in CONTROLS.items():
        accuracy = first_control(entries, control)
        if accuracy is not None:
            lines.append(f"Control: {name} scores {INTERVAL.format(**accuracy)}; chance is 0.5.")
    return lines


def sentence_on_leak(leak: float | None) -> str:
    """How many test prompts the unseen users were trained on."""
    if leak is None:
        return "Whether test prompts stand among the training prompts is not known."
    return (
        f"Of the unseen users' test pairs {leak:.1%} have a prompt that stands among their "
        "training pairs."
    )


def signs_of_artefact(entries: list[dict], leak: float | None, users: int) -> list[str]:
    """What could look like a preference and is none: shared prompts, controls above chance."""
    signs = ["shared prompts"] if leak else []
    if users < FEWEST_USERS:
        return signs
    for control, name in CONTROLS.items():
        accuracy = first_control(entries, control)
        if accuracy is not None and accuracy["low"] > 0.5:
            signs.append(name)
    return signs


def names_of(entries: list[dict]) -> str:
    """Such as `K = 2, 3 (alpha 0) and K = 2 (alpha 0.001)`; empty without entries."""
    ranks_by_alpha = {}
    for entry in entries:
        ranks_by_alpha.setdefault(entry["alpha"], []).append(str(entry["K"]))
    return " and ".join(
        f"K = {', '.join(ranks)} (alpha {alpha:g})" for alpha, ranks in ranks_by_alpha.items()
    )
