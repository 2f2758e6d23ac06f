"""The verdict: is the reward personal, in at most six sentences.

They say what the answer is, what was tested, what came out, what to compare it with, whether
anything points to an artefact, and what to do next. Each has a function of its own, and is there
only if it is true.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lore.intervals import Interval, joint_intervals
from lore.leaks import Shares
from lore.words import count_of, unseen_users
from utils import UNSEEN_TEST

NEGLIGIBLE = 0.01  # of accuracy: a personal part that is surely smaller counts as none
FEWEST_USERS = 6  # with fewer no signed-rank test can reach p < 0.05, and an interval says nothing
PROBABLY = 0.84  # standard errors; four of five measured means are less than so far below the true
MANY_EQUAL = 0.1  # of the test pairs; equal sides count as wrong, and lower all accuracies
COLLAPSED = 0.99  # |cosine| with the reward head from which on a column counts as that head

# What to try if a sweep has left it out. On real text that was held out, alpha 0 predicted .571 to
# .587 of the unseen users' pairs, 0.001 predicted .618.
ALPHAS_TO_TRY = [0, 0.0001, 0.001, 0.01, 0.1]
SHARE_TO_TRY = "validation_share = 0.2"


@dataclass
class ModelEvidence:
    """What is known of one model, that is of one K and one alpha, over all its seeds."""

    entry: dict  # of `evidence` in results.json
    personal_part: np.ndarray | None  # float64 [N_unseen]; None if the model has no user weights
    collapsed: bool  # all columns of all seeds are the reward head, see COLLAPSED

    @property
    def name(self) -> str:
        return f"K = {self.entry['K']} (alpha {self.entry['alpha']:g})"

    @property
    def accuracy(self) -> Interval:
        """The interval of the accuracy on the unseen users' unseen prompts."""
        return self.entry["accuracy"][UNSEEN_TEST]


@dataclass
class UnseenTest:
    """What the unseen users were tested on."""

    users: int
    pairs: int  # of all of them together
    leaks: Shares  # of these pairs that repeat training pairs
    tossed: Interval | None  # of the control on flipped choices; None if it was not trained
    equal_pairs: int = 0  # how many of the pairs have the same embedding on both sides
    everybody_is_seen: bool = False  # the basis was learned from the same users, on other pairs
    head_is_random: bool = False  # as that of the demo's stand-in for a reward model

    @property
    def users_in_words(self) -> str:
        """Such as `20 unseen users`, see `unseen_users`."""
        return unseen_users(self.users, self.everybody_is_seen)

    @property
    def has_many_equal_pairs(self) -> bool:
        """Whether pairs that no reward can tell apart lower all accuracies."""
        return self.equal_pairs > MANY_EQUAL * self.pairs

    @property
    def largest_leak(self) -> float:
        """The largest share of repeated pairs that is known."""
        return max((share for share in self.leaks.values() if share is not None), default=0.0)

    @property
    def is_alarm(self) -> bool:
        """Whether the control is above chance: then its model remembers some of the test pairs."""
        return self.tossed is not None and self.tossed["low"] > 0.5

    def repeats_could_explain(self, gain: float) -> bool:
        """Whether repeated pairs could be all that there is to so large a gain in accuracy.

        To remember a share of the test pairs raises the accuracy by that share at most.
        """
        return self.is_alarm or self.largest_leak >= gain


@dataclass
class Judgement:
    """The answer, and the model that the other sentences are about."""

    personal: str  # "yes", "no" or "undecided"
    answer: str  # the first sentence
    model: ModelEvidence
    low: float | None = None  # the interval of the model's personal part; None if it has none
    high: float | None = None
    models_at_once: int = 1  # for how many models the interval holds together


def write_verdict(
    models: list[ModelEvidence], chosen: ModelEvidence | None, test: UnseenTest
) -> dict[str, Any]:
    """The verdict of results.json: `{personal: "yes" | "no" | "undecided", text, K, alpha}`.

    chosen: the model that held-out pairs have chosen; None: the verdict is about all models with
    user weights at once. The text has a sentence per line; it names the model K, alpha.
    """
    judgement = judge(models, chosen, test)
    if judgement.personal == "no" and test.has_many_equal_pairs:
        answer = "Undecided: too many test pairs are equal on both sides."
        judgement = replace(judgement, personal="undecided", answer=answer)
    sentences = [
        judgement.answer,
        sentence_on_test(test),
        sentence_on_result(judgement, chosen, test),
        sentence_on_comparisons(models, judgement.model, test),
        sentence_on_artefacts(test),
        sentence_on_next_step(models, chosen, judgement, test),
    ]
    text = "\n".join(sentence for sentence in sentences if sentence)
    named = judgement.model.entry
    return {
        "personal": judgement.personal,
        "text": text,
        "K": named["K"],
        "alpha": named["alpha"],
    }


# ---- The answer


def judge(models: list[ModelEvidence], chosen: ModelEvidence | None, test: UnseenTest) -> Judgement:
    """The answer on the chosen model, or on all models with user weights if none was chosen."""
    candidates = models if chosen is None else [chosen]
    personalised = [model for model in candidates if model.personal_part is not None]
    if personalised:
        return judge_personal_parts(personalised, test)
    model = candidates[-1]
    if chosen is None:
        return Judgement("undecided", "Undecided: no model with user weights was trained.", model)
    if test.users < FEWEST_USERS:
        return Judgement("undecided", answer_on_few_users(test), model)
    return Judgement(
        "no", f"No: validation chose {model.name}, which is one reward for everybody.", model
    )


def judge_personal_parts(models: list[ModelEvidence], test: UnseenTest) -> Judgement:
    """The answer by the personal parts of models with user weights.

    "yes" if the interval of one is above 0, unless test pairs that repeat training pairs could
    explain it; "no" if all intervals end below NEGLIGIBLE; else, and of few users, "undecided".
    The intervals hold for all models at once. The judgement is about the model with the largest
    personal part, of those whose interval is above 0 if there are any; of equal ones the first.
    """
    parts = np.stack([model.personal_part for model in models], 1)  # (N, models)
    N = len(parts)
    mean = parts.mean(0)  # (models,)
    low, high = joint_intervals(parts)

    positive = [m for m in range(len(models)) if low[m] > 0]
    # Rounded, equal means tie in whatever order they were added up.
    best = max(positive or range(len(models)), key=lambda m: mean[m].round(9))
    if N < FEWEST_USERS:
        personal = "undecided"
        answer = answer_on_few_users(test)
    elif positive and test.repeats_could_explain(low[best]):
        personal = "undecided"
        answer = f"Undecided: {flaw_in_words(test)}, which could explain the whole result."
    elif positive:
        personal = "yes"
        answer = "Yes: the reward is personal."
    elif high.max() < NEGLIGIBLE:
        personal = "no"
        answer = (
            "No: users' own weights gain less than one point of accuracy over everybody's mean "
            "weights."
        )
    elif test.repeats_could_explain(NEGLIGIBLE):
        personal = "undecided"
        answer = f"Undecided: {test.users_in_words} cannot tell, and {flaw_in_words(test)}."
    else:
        personal = "undecided"
        answer = answer_on_open_result(parts, best, low, high, test)
    return Judgement(personal, answer, models[best], low[best], high[best], len(models))


def answer_on_few_users(test: UnseenTest) -> str:
    """The answer if there are fewer than FEWEST_USERS."""
    return f"Undecided: {test.users_in_words} cannot tell, at least {FEWEST_USERS} are needed."


def answer_on_open_result(
    parts: np.ndarray, best: int, low: np.ndarray, high: np.ndarray, test: UnseenTest
) -> str:
    """The answer if no interval is above 0, and one does not end below NEGLIGIBLE.

    parts: float64 `[N, models]`, of the judged models. best: the column of the largest mean.
    low, high: the joint intervals, `[models]` each.

    The largest of several noisy differences is the largest partly by chance. If it were taken for
    the true one, the number of users would be too small, so the median of the models is taken. In
    simulations with true differences of 0.02 or 0.03, and 15 or 40 users that could not tell, 73
    to 100 of 100 new data sets with so many users could. By the largest, and without PROBABLY, 47
    to 86 could. The number is too small if there is no difference: then 30 to 43 of 100 could.
    """
    N, models = parts.shape
    difference = float(np.median(parts.mean(0)))
    half_width = (high[best] - low[best]) / 2
    error = parts[:, best].std() / N**0.5
    users = users_that_decide(N, difference, half_width, high.max(), error)
    of_models = f", the median of the {models} models" if models > 1 else ""
    return (
        f"Undecided: {test.users_in_words} cannot tell, about {users:,.0f} probably could if the "
        f"true difference is {difference:+.3f}{of_models}."
    )


def users_that_decide(
    N: int, difference: float, half_width: float, high: float, error: float
) -> float:
    """About how many users would decide it in four of five data sets, to two digits: more than N.

    difference: the true one, of all models. With N users: half_width, of the interval of the
    largest mean; high, the end of the highest interval; error, the standard error of the mean.

    How far means and ends of intervals are from the true difference shrinks with the root of the
    number of users. It is decided once one interval is above 0, or all end below NEGLIGIBLE.
    """
    margin = PROBABLY * error
    shrinkages = []  # how much smaller the distances must become, for a yes and for a no
    if difference > 0:
        shrinkages.append((half_width + margin) / difference)
    if difference < NEGLIGIBLE:
        shrinkages.append((high - difference + margin) / (NEGLIGIBLE - difference))
    users = N * min(shrinkages) ** 2
    return max(N + 1, float(f"{users:.2g}"))


# ---- What was tested, and what came out


def sentence_on_test(test: UnseenTest) -> str:
    """Who was tested on how many pairs, and whether many of these are equal on both sides."""
    seen = ", all of them seen in the training" if test.everybody_is_seen else ""
    pairs = count_of(test.pairs, "test pair")
    tested = f"Tested: {test.users_in_words}{seen}, on their {pairs}"
    if test.has_many_equal_pairs:
        return (
            f"{tested}; in {test.equal_pairs:,} of these both sides are equal, so no reward can "
            "tell them apart, and they count as wrong."
        )
    return f"{tested}."


def sentence_on_result(judgement: Judgement, chosen: ModelEvidence | None, test: UnseenTest) -> str:
    """What the judged model predicts, and how much of it is personal."""
    model = judgement.model
    own = model.accuracy["mean"]
    name = f"At {model.name}"
    if chosen is not None:
        name += ", chosen by validation,"
    chance = ""
    if own <= 0.5 and not test.has_many_equal_pairs:
        chance = ", no better than chance"
    if model.personal_part is None:
        return f"{name} {own:.3f} of them are predicted right{chance}."
    mean_weights = model.entry["controls"]["mean_weights"]["mean"]
    return (
        f"{name} the users' own weights predict {own:.3f} of them right{chance}, everybody's mean "
        f"weights {mean_weights:.3f}: a difference of {model.personal_part.mean():+.3f}"
        f"{interval_in_words(judgement, test.users)}."
    )


def interval_in_words(judgement: Judgement, users: int) -> str:
    """The interval of the personal part, in brackets; empty if the users are too few for one."""
    if users < FEWEST_USERS:
        return ""
    ends = f"{judgement.low:+.3f} to {judgement.high:+.3f}"
    if judgement.models_at_once > 1:
        return f" (95 % interval, for all {judgement.models_at_once} models at once: {ends})"
    return f" (95 % interval: {ends})"


def sentence_on_comparisons(
    models: list[ModelEvidence], judged: ModelEvidence, test: UnseenTest
) -> str:
    """What is right without LoRe, at the judged model's alpha; empty if nothing else is known."""
    others = {
        model.entry["K"]: model
        for model in models
        if model is not judged and model.entry["alpha"] == judged.entry["alpha"]
    }
    comparisons = []
    if 0 in others:
        reference = others[0].accuracy
        comparison = f"the reference (K = 0) {reference['mean']:.3f}"
        is_known = test.users >= FEWEST_USERS and not test.has_many_equal_pairs
        if is_known and reference["low"] <= 0.5:
            is_at = "is below" if reference["high"] < 0.5 else "cannot be told from"
            remark = "check that it is the model's reward head"
            if test.head_is_random:
                remark = "it is the random head of the demo's stand-in"
            comparison += f", which {is_at} chance ({remark})"
        comparisons.append(comparison)
    if 1 in others:
        comparisons.append(f"one reward for everybody (K = 1) {others[1].accuracy['mean']:.3f}")
    model_per_user = judged.entry["controls"]["model_per_user"]
    if model_per_user is not None:
        comparisons.append(f"a model per user {model_per_user['mean']:.3f}")
    if not comparisons:
        return ""
    return f"For comparison: {'; '.join(comparisons)}."


# ---- Artefacts

FLIPPED = "randomly flipped choices"


def flaw_in_words(test: UnseenTest) -> str:
    """What is wrong with a test in which repeats could explain something."""
    if test.largest_leak > 0:
        return "test pairs repeat training pairs"
    return f"a control on {FLIPPED} is above chance"


def sentence_on_artefacts(test: UnseenTest) -> str:
    """What points to an artefact, and which checks could not be made."""
    signs = "; ".join(signs_of_artefact(test))
    checks = {f"repeats {in_words(repeat)}": share for repeat, share in test.leaks.items()}
    checks[FLIPPED] = test.tossed
    unchecked = ", ".join(check for check, outcome in checks.items() if outcome is None)
    if signs and unchecked:
        return f"Signs of an artefact: {signs} (not checked: {unchecked})."
    if signs:
        return f"Signs of an artefact: {signs}."
    if unchecked:
        return f"Not checked for signs of an artefact: {unchecked}."
    return f"Signs of an artefact: none in these checks ({', '.join(checks)})."


def signs_of_artefact(test: UnseenTest) -> list[str]:
    """Test pairs that repeat training pairs, and an alarm of the control on flipped choices."""
    signs = []
    leaks = [
        f"{percent(share)} {in_words(repeat)}" for repeat, share in test.leaks.items() if share
    ]
    if leaks:
        signs.append(f"a leak, as test pairs repeat training pairs, {', '.join(leaks)}")
    if test.is_alarm:
        mean = test.tossed["mean"]
        signs.append(f"a model trained on {FLIPPED} predicts {mean:.3f} of others, not 0.5")
    return signs


def in_words(repeat: str) -> str:
    """Such as `by prompt` for by_prompt."""
    return repeat.replace("_", " ")


def percent(share: float) -> str:
    """A share above 0 in words, never as 0.0 %."""
    return "under 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


# ---- What to do next


def sentence_on_next_step(
    models: list[ModelEvidence],
    chosen: ModelEvidence | None,
    judgement: Judgement,
    test: UnseenTest,
) -> str:
    """The one thing to do next: first what spoils the answer, then what the sweep has left out."""
    if test.repeats_could_explain(NEGLIGIBLE):
        return (
            "Next: keep whole conversations, and all copies of a pair, on one side of the split, "
            "and run again."
        )
    if test.has_many_equal_pairs:
        return (
            "Next: leave out pairs with equal sides, or mend what makes them equal (the cut to "
            "--max_length, the chat template), and run again."
        )
    if all(model.personal_part is None for model in models):
        return "Next: put ranks from 2 on into K_list."
    if test.users < FEWEST_USERS:
        return "Next: collect the choices of more users."

    judged = models if chosen is None else [chosen]
    collapsed = [
        model
        for model in judged
        if model.collapsed and model.personal_part is not None and model.entry["alpha"] > 0
    ]
    with_validation = f" with {SHARE_TO_TRY}" if chosen is None else ""
    if collapsed:
        least = min(model.entry["alpha"] for model in collapsed)
        smaller = [alpha for alpha in ALPHAS_TO_TRY if alpha < least]
        return (
            f"Next: try alpha_list = {smaller}{with_validation}, as the basis has collapsed onto "
            f"the reward head at {names_of(collapsed)}."
        )
    too_few = ""
    if judgement.personal == "undecided":
        too_few = ", and collect the choices of more users"
    alphas = {model.entry["alpha"] for model in models}
    if len(alphas) == 1:
        return (
            f"Next: try alpha_list = {ALPHAS_TO_TRY}{with_validation}, as only alpha "
            f"{alphas.pop():g} was tried{too_few}."
        )
    if chosen is None:
        return f"Next: set {SHARE_TO_TRY}, so that held-out pairs choose K and alpha{too_few}."
    if judgement.personal == "undecided":
        return "Next: collect the choices of more users."
    if judgement.personal == "no" and chosen.personal_part is not None:
        return "Next: give everybody the mean weights."
    return f"Next: use {chosen.name}."


def names_of(models: list[ModelEvidence]) -> str:
    """Such as `K = 2, 3 (alpha 0) and K = 2 (alpha 0.001)`; empty without models."""
    ranks_by_alpha = {}
    for model in models:
        ranks_by_alpha.setdefault(model.entry["alpha"], []).append(str(model.entry["K"]))
    return " and ".join(
        f"K = {', '.join(ranks)} (alpha {alpha:g})" for alpha, ranks in ranks_by_alpha.items()
    )
