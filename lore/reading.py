"""What does a direction of the basis prefer, and who weighs it?

`read_directions` reads the columns of one model in four ways:

    Attributes      do people who weigh a column more choose longer texts, more questions, ..?
    What is known   do the weights go with what is known of the people, such as their age?
    Examples        pairs of those who weigh a column most, on which it contradicts everybody's
                    mean reward most
    People          how many weigh it most, how well they are served, and whether the training
                    finds the column again from other seeds

The first two are correlations over people, never over pairs. Their p come from exchanging
people, and hold for all columns and attributes (or answers) together. `weights_table` has a row
for each person.
"""

import os.path
import re
from collections import Counter
from collections.abc import Sequence
from itertools import compress
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtrit

from lore.evidence import kept_fit
from lore.files import printable
from lore.leaks import identities
from lore.normal_forms import message_texts
from lore.study import Study
from lore.verdict import FEWEST_USERS
from lore.words import count_of, unseen_users
from utils import SEEN_TEST, UNSEEN_TEST, Fit, fits_per_model, pair_scores

FOUND = 0.05  # a correlation with a smaller p is reported
DRAWS = 5000  # of the permutations
SIMILAR = 5  # people with about equally many pairs, who are exchanged with one another
TYPICAL_PAIRS = 5  # how many pairs of a user like everybody are added to a user's own
ALIKE = 0.8  # attributes with a larger correlation over people are not told from one another
DISTINCT = 0.3  # nor are those with a smaller partial correlation with the weights
NEARLY = 0.05  # by how much less a correlation is about as strong
FEWEST_PEOPLE = 5  # on either side, to compare those who give an answer with the others
EXAMPLES = 5  # of each column, at most
SHOWN_CHARACTERS = 300  # of a text in an example
SHOWN_BEFORE = 60  # characters ahead of the place where two long texts begin to differ

Texts = Sequence[tuple[str, str]]  # of one user: the chosen and the rejected text of each pair
Entry = dict[str, Any]  # JSON values by name


# ---- Countable attributes of a text

WORD = re.compile(r"\w+(?:'\w+)*")

# Each counts its words and pairs of words. Their first letter may be a capital in the text, but
# no other one: "US" is not the first person.
WORD_SETS = {
    "first person": (
        "i, me, my, mine, myself, i'm, i've, i'd, i'll, "
        "we, us, our, ours, ourselves, we're, we've, we'd, we'll"
    ),
    "second person": "you, your, yours, yourself, yourselves, you're, you've, you'd, you'll",
    "hedges": (
        "maybe, perhaps, possibly, probably, likely, might, may, could, seem, seems, seemed, "
        "appears, apparently, presumably, arguably, somewhat, roughly, generally, usually, often, "
        "sometimes, I think, I guess, I believe, I suppose"
    ),
    "apologies and refusals": (
        "sorry, apologize, apologise, apologies, apology, unfortunately, "
        "I can't, I cannot, I'm unable, am unable, an AI"
    ),
}

# Each counts the matches of a pattern in the text, with a line break put ahead of it. No pattern
# looks at a character more than a few times, so no text can make it slow.
PATTERNS = {
    "sentences": r"""[.!?]["')”]?(?=\s|$)""",  # their ends
    "list items": r"\n[ \t]*(?:[-*•]|\d+[.)])[ \t]",
    "headings and bold": r"\n#{1,6}[ \t]|\*\*[^*\n]+\*\*",
    "questions": r"\?",
    "exclamations": r"!",
    "digits": r"\d",
    "code": r"`+",  # the marks before and behind it
    "emoji": "[\u2600-\u27bf\U0001f300-\U0001faff]",
    "quotations": r'"[^"\n]+"|“[^“”\n]+”',
}

ATTRIBUTES = ("length", "words", "word length", *WORD_SETS, *PATTERNS)

# How a sentence says more and less of an attribute. Of the others it says "more" and "fewer".
PHRASES = {
    "length": ("longer texts", "shorter texts"),
    "word length": ("longer words", "shorter words"),
    "first person": ("more first person", "less first person"),
    "second person": ("more second person", "less second person"),
    "code": ("more code", "less code"),
    "emoji": ("more emoji", "less emoji"),
}

SET_OF_WORD = {  # the name of the set, by a word as it is and with a capital
    spelling: name
    for name, words in WORD_SETS.items()
    for word in words.split(", ")
    for spelling in (word, word[0].upper() + word[1:])
}
COUNTED_PATTERNS = [re.compile(pattern) for pattern in PATTERNS.values()]


def count_attributes(text: str) -> list[float]:
    """How much of each of ATTRIBUTES a text has.

    `length` is in characters, `word length` is the mean length of a word (0 without words). All
    others are counts.
    """
    text = text.replace("’", "'")
    words = WORD.findall(text)
    word_length = sum(map(len, words)) / max(len(words), 1)
    occurrences = Counter(words)
    occurrences.update(map(" ".join, zip(words, words[1:])))
    in_sets = dict.fromkeys(WORD_SETS, 0)
    for word in occurrences.keys() & SET_OF_WORD.keys():
        in_sets[SET_OF_WORD[word]] += occurrences[word]
    lines = "\n" + text
    matches = [len(pattern.findall(lines)) for pattern in COUNTED_PATTERNS]
    return [len(text), len(words), word_length, *in_sets.values(), *matches]


def phrase(attribute: str, correlation: float) -> str:
    """Such as "longer texts" or "fewer questions"."""
    more, less = PHRASES.get(attribute, (f"more {attribute}", f"fewer {attribute}"))
    return more if correlation > 0 else less


# ---- What the users choose


class Choices(NamedTuple):
    """In how many pairs of each user the chosen text has more of each attribute, or less."""

    more: np.ndarray  # float64 (N, attributes)
    less: np.ndarray

    def shares(self) -> np.ndarray:
        """The share of `more` in the pairs that differ, `(N, attributes)`; NaN without such."""
        differ = self.more + self.less
        return np.divide(self.more, differ, out=np.full_like(differ, np.nan), where=differ > 0)

    def steady_shares(self) -> np.ndarray:
        """The shares `(N, attributes)` with TYPICAL_PAIRS pairs of a user like everybody added.

        The share of a user with few pairs is mostly chance. This draws it to everybody's share.
        """
        differ = self.more + self.less
        everybody = self.more.sum(0) / np.maximum(differ.sum(0), 1)
        return (self.more + TYPICAL_PAIRS * everybody) / (differ + TYPICAL_PAIRS)


def count_choices(users: Sequence[Texts]) -> Choices:
    """Compare the attributes of the chosen and the rejected texts of each user.

    What counts is which text of a pair has more, not how much more: one very long answer must not
    outweigh all other choices of a user. Each distinct text is counted once.
    """
    texts = {text: None for pairs in users for pair in pairs for text in pair}
    row_of = {text: row for row, text in enumerate(texts)}
    counts = np.array([count_attributes(text) for text in texts])  # (texts, attributes)
    more, less = [], []
    for pairs in users:
        chosen = counts[[row_of[text] for text, _ in pairs]]  # (m_i, attributes)
        rejected = counts[[row_of[text] for _, text in pairs]]
        more.append((chosen > rejected).sum(0))
        less.append((chosen < rejected).sum(0))
    return Choices(np.array(more, float), np.array(less, float))


def new_pairs(study: Study) -> list[np.ndarray]:
    """Which test pairs of each unseen user have other answers than all few shots: bool `[m_i]`.

    The weights are fitted from the few shots. If the same choices were counted again, any weights
    would go with them.
    """
    pairs = identities(study, ("train_unseen", "test_unseen"))
    return [
        ~np.isin(tested.keys, shots.keys)
        for shots, tested in zip(pairs["train_unseen"], pairs["test_unseen"])
    ]


# ---- Correlations over people


class Association(NamedTuple):
    """How K weights go with J other quantities of the same people."""

    correlation: np.ndarray  # float64 (K, J)
    p: np.ndarray  # (K, J), for all that was compared together
    threshold: float  # the absolute correlation from which on p is below FOUND


def associate(weights: np.ndarray, quantities: np.ndarray, pairs: np.ndarray) -> Association:
    """Correlate the weights of N people with other quantities of theirs.

    The p of a correlation is how often chance gives an equal or larger one to any column and
    quantity. Chance exchanges the weights of people with about equally many pairs. People with few
    pairs have extreme weights and extreme shares at once. If they were exchanged with anybody,
    that alone would look like a finding (measured in `bench_reading.py`).

    weights: `(N, K)`. quantities: `(N, J)`; NaN is what is not known of a person.
    pairs: `(N,)`, how many pairs the weights of each person were fitted from.
    """
    W = standardised(weights)
    A = standardised(quantities)
    correlation = W.T @ A / len(W)
    largest = largest_by_chance(W, A, similar_permutations(pairs))
    rounding = 1e-5  # an exchange that changes nothing must not count as smaller
    smaller = np.searchsorted(largest, np.abs(correlation) - rounding)
    p = (1 + DRAWS - smaller) / (1 + DRAWS)
    return Association(correlation, p, float(np.quantile(largest, 1 - FOUND)))


def standardised(values: np.ndarray) -> np.ndarray:
    """Each column with mean 0 and variance 1; 0 for a NaN, and in a column of equal values."""
    known = ~np.isnan(values)
    mean = np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1)
    centred = np.where(known, values - mean, 0)
    spread = np.sqrt((centred**2).mean(0))
    return np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 1e-9)


def similar_permutations(pairs: np.ndarray) -> np.ndarray:
    """Seeded permutations of N people among those with about equally many pairs: `(DRAWS, N)`.

    In the order of their number of pairs, SIMILAR people at a time are a group. People with
    equally many pairs are always in the same group: all of them, if all have equally many.
    """
    groups = np.searchsorted(np.sort(pairs), pairs) // SIMILAR  # (N,)
    shuffled = np.random.default_rng(0).random((DRAWS, len(pairs))) + groups
    permutations = np.empty((DRAWS, len(pairs)), int)
    permutations[:, groups.argsort(kind="stable")] = shuffled.argsort(1)
    return permutations


def largest_by_chance(W: np.ndarray, A: np.ndarray, permutations: np.ndarray) -> np.ndarray:
    """The largest absolute correlation of any columns of W and A under each permutation, sorted.

    W: `(N, K)`, A: `(N, J)`, both standardised. permutations: `(draws, N)`. Returns `(draws,)`.
    """
    N, K = W.shape
    weights = W.T.astype(np.float32) / N
    exchanged = A.astype(np.float32)
    numbers = max(N, K) * A.shape[1]  # of one permutation
    batches = np.array_split(permutations, -(-len(permutations) * numbers // 2**22))
    largest = [np.abs(weights @ exchanged[batch]).max((1, 2)) for batch in batches]
    return np.sort(np.concatenate(largest))


def group_attributes(
    correlation: np.ndarray, p: np.ndarray, between: np.ndarray, users: int
) -> list[list[int]]:
    """The attributes that a column goes with, in groups that these users cannot tell apart.

    A group has the strongest attribute, those that would explain it (if one of them is held fixed,
    little is left of the strongest one's correlation) and those that were found too, but are
    explained by it. What is ALIKE stays together. So a taste for long texts is never called one
    for sentences alone, only because long texts have more of them.

    The first of a group is, of the found ones that would explain the column about as well, the one
    that ATTRIBUTES name first. Then come the strongest.

    correlation, p: `(J,)`, of the column with each attribute. between: `(J, J)`, the correlations
    of the attributes with one another, over the same users.
    """
    bound = max(DISTINCT, smallest_significant(users - 3))
    alike = np.abs(between) > ALIKE
    left = (-np.abs(correlation)).argsort(kind="stable").tolist()  # the strongest first
    groups = []
    for strongest in list(left):
        if strongest not in left or p[strongest] >= FOUND:
            continue
        explaining, explained = {strongest}, set()
        for j in left:
            r_strongest, r, r_both = correlation[strongest], correlation[j], between[strongest, j]
            if alike[strongest, j] or abs(partial_correlation(r_strongest, r, r_both)) < bound:
                explaining.add(j)
            elif p[j] < FOUND and abs(partial_correlation(r, r_strongest, r_both)) < bound:
                explained.add(j)
        members = sorted(explaining | explained)
        as_strong = np.abs(correlation) > abs(correlation[strongest]) - NEARLY
        first = min(j for j in explaining if p[j] < FOUND and as_strong[j])
        group = [first] + [
            j for j in left if j != first and (j in members or alike[members, j].any())
        ]
        left = [j for j in left if j not in group]
        groups.append(group)
    return groups


def partial_correlation(r_x: float, r_z: float, r_xz: float) -> float:
    """Of a weight with x while z is held fixed; r_x, r_z: of the weight with x and with z."""
    spread = (1 - r_z**2) * (1 - r_xz**2)
    if spread < 1e-9:  # z is x or the weight itself, up to rounding: nothing is left
        return 0.0
    return (r_x - r_z * r_xz) / spread**0.5


def smallest_significant(freedom: int) -> float:
    """The absolute correlation that has p = 0.05, taken alone, with so many degrees of freedom."""
    quantile = float(stdtrit(freedom, 0.975))  # of Student's t
    return quantile / (freedom + quantile**2) ** 0.5


def association_table(association: Association, names: Sequence[str], users: int) -> Entry:
    """JSON of an association: a row per column of the basis, a column per name."""
    return {
        "names": list(names),
        "correlation": association.correlation.tolist(),
        "p": association.p.tolist(),
        "threshold": association.threshold,
        "users": users,
    }


# ---- What is known of the people


def known_answers(about: Sequence[Entry]) -> dict[str, np.ndarray]:
    """What is known of N people as numbers `(N,)` by name, NaN for what is not known of one.

    about: {column: value} for each person. Missing, None, NaN and "" are not known. A column of
    numbers is kept, such as "age". Any other column gives 1 and 0 for each of its answers, such
    as "country: Chile", if FEWEST_PEOPLE have given it and as many another one. Of two answers
    one is enough.
    """
    answers = {}
    for column in dict.fromkeys(column for person in about for column in person):
        values = [person.get(column) for person in about]
        known = np.array([not is_missing(value) for value in values], bool)
        given = list(compress(values, known.tolist()))
        if all(map(is_number, given)) and len(set(given)) > 2:
            answers[column] = np.full(len(about), np.nan)
            answers[column][known] = given
            continue
        counts = Counter(map(str, given))
        for answer in list(counts)[: 1 if len(counts) == 2 else None]:
            if FEWEST_PEOPLE <= counts[answer] <= len(given) - FEWEST_PEOPLE:
                gave_it = [str(value) == answer for value in values]
                answers[f"{column}: {answer}"] = np.where(known, gave_it, np.nan)
    return answers


def is_missing(value: Any) -> bool:
    """Whether a value says that something is not known of a person."""
    return value is None or value is pd.NA or value != value or str(value).strip() == ""


def is_number(value: Any) -> bool:
    """Whether a value can be correlated as it is; the square of a larger one may overflow."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e15


# ---- Examples, and the same column from other seeds


class TestedPairs(NamedTuple):
    """The test pairs of all unseen users in one row, M of them."""

    users: list[str]
    texts: list[tuple[str, str]]  # chosen, rejected
    prompts: list[Any]  # equal for equal prompts


def tested_pairs(study: Study) -> TestedPairs:
    """The pairs with their texts; if the prompts are not known, equal texts are of one prompt."""
    by_user = study.texts["test_unseen"]
    users = [user for user, pairs in zip(study.unseen, by_user) for _ in pairs]
    texts = [pair for pairs in by_user for pair in pairs]
    if "test_unseen" in study.prompts:
        prompts = [prompt for prompts in study.prompts["test_unseen"] for prompt in prompts]
    else:
        prompts = [frozenset(pair) for pair in texts]
    return TestedPairs(users, texts, prompts)


def tested_scores(fits: list[Fit], study: Study) -> list[np.ndarray]:
    """What each column of each fit says of the unseen users' test pairs: float64 `(M, K)` each."""
    bases = torch.cat([fit.V for fit in fits], 1)
    scores = torch.cat(list(pair_scores(study.test_unseen, bases))).cpu().double().numpy()
    ends = np.cumsum([fit.V.shape[1] for fit in fits])
    return np.split(scores, ends[:-1], 1)


def everybodys_scores(scores: np.ndarray, fit: Fit) -> np.ndarray:
    """What everybody's mean reward says of the pairs, by the unseen users' mean weights: `(M,)`."""
    return scores @ user_weights(fit).mean(0)


def unit_variance(scores: np.ndarray) -> np.ndarray:
    """Scores in standard deviations from 0, as either text of a pair could have come first."""
    spread = np.sqrt((scores**2).mean(0))
    return scores / np.where(spread > 0, spread, 1)


def strongest_contradictions(
    scores: np.ndarray, mean: np.ndarray, columns: np.ndarray, pairs: TestedPairs
) -> list[list[Entry]]:
    """For each column the pairs on which it contradicts everybody's mean reward most.

    A pair is only looked at for the column that its user weighs most. A contradiction is as strong
    as the weaker of the two, and the strongest are taken first. Of a column there is at most one
    pair a prompt, and no two texts are compared twice.

    scores, mean: what columns and mean say of the pairs, `(M, K)` and `(M,)`, in standard
    deviations. columns: `(M,)`, that of each pair. Returns an `example` for each pair.
    """
    column_scores = scores[np.arange(len(scores)), columns]  # (M,)
    weaker = np.minimum(np.abs(column_scores), np.abs(mean))
    strength = np.where(column_scores * mean < 0, weaker, 0)
    shown: list[dict[Any, Entry]] = [{} for _ in scores.T]  # by prompt
    compared = set()  # texts that are shown already
    for i in (-strength).argsort(kind="stable"):
        if strength[i] == 0:
            break
        prompt, texts = pairs.prompts[i], frozenset(pairs.texts[i])
        of_column = shown[columns[i]]
        if len(of_column) < EXAMPLES and prompt not in of_column and texts not in compared:
            of_column[prompt] = example(i, column_scores[i], mean[i], pairs)
            compared.add(texts)
    return [list(of_column.values()) for of_column in shown]


def example(i: int, column: float, mean: float, pairs: TestedPairs) -> Entry:
    """Pair i, on which a column and everybody's mean reward disagree, as JSON.

    `preferred` and `other` are the texts as the column sees them, shortened. `column_score` is
    positive and `everybody_score` negative: how much better the preferred one is. `user_agrees`
    is whether the user whose pair it is has chosen the preferred one.
    """
    user_agrees = bool(column > 0)
    chosen, rejected = shorten(*pairs.texts[i])
    return {
        "prompt": prompt_text(pairs.prompts[i]),
        "preferred": chosen if user_agrees else rejected,
        "other": rejected if user_agrees else chosen,
        "column_score": abs(float(column)),
        "everybody_score": -abs(float(mean)),
        "user": pairs.users[i],
        "user_agrees": user_agrees,
    }


def shorten(text: str, other: str) -> tuple[str, str]:
    """Two texts in one line each, and at most SHOWN_CHARACTERS of them.

    Of long texts the common beginning is left out, so that a reader sees how they differ.
    """
    texts = [one_line(text), one_line(other)]
    start = 0
    if max(map(len, texts)) > SHOWN_CHARACTERS:
        start = max(0, len(os.path.commonprefix(texts)) - SHOWN_BEFORE)
    return excerpt(texts[0], start), excerpt(texts[1], start)


def one_line(text: str) -> str:
    return " ".join(text.split())


def excerpt(text: str, start: int = 0) -> str:
    """At most SHOWN_CHARACTERS of a text, with dots for what is left out."""
    end = start + SHOWN_CHARACTERS
    return ("… " if start else "") + text[start:end] + (" …" if end < len(text) else "")


def prompt_text(prompt: Any) -> str | None:
    """The beginning of a prompt, or of the last of its messages; None if it is no text."""
    if not isinstance(prompt, str):
        return None
    return excerpt(one_line(message_texts(prompt)[-1]))


# ---- The four ways to read


class Part(NamedTuple):
    """What a correlation over people tells."""

    table: Entry | None  # see `association_table`; None if nothing could be told
    found: list[list[Entry]]  # for each column what its weights go with
    notes: list[str]


def user_weights(fit: Fit) -> np.ndarray:
    """Those of the unseen users, float64 `(N, K)`."""
    return fit.W_unseen.double().cpu().numpy()


def read_attributes(fit: Fit, others: list[Fit], study: Study) -> Part:
    """Do unseen users who weigh a column more choose texts with more of an attribute?

    The weights are fitted from the few shots. The attributes are counted in the test pairs, but
    not in those that compare the texts of a few shot again. So no choice is used twice.
    others: further fits, for whose columns p holds too.
    """
    columns = fit.V.shape[1]
    nothing: list[list[Entry]] = [[] for _ in range(columns)]
    if "test_unseen" not in study.texts:
        note = "The texts are not known, so there are no attributes and no examples."
        return Part(None, nothing, [note])

    notes = []
    is_new = new_pairs(study)
    repeated = sum(int((~mask).sum()) for mask in is_new)
    if repeated:
        notes.append(
            f"The attributes leave out {count_of(repeated, 'test pair')}, because the user's "
            "weights were fitted from the same two texts."
        )
    users = [i for i, mask in enumerate(is_new) if mask.any()]
    if len(users) < FEWEST_USERS:
        too_few = few_people(unseen_users(len(users), study.everybody_is_seen))
        return Part(None, nothing, [*notes, too_few])

    tested = study.texts["test_unseen"]
    choices = count_choices([list(compress(tested[i], is_new[i].tolist())) for i in users])
    weights = np.concatenate([user_weights(each) for each in [fit, *others]], 1)[users]
    pairs = np.array([len(study.train_unseen[i]) for i in users])
    everything = associate(weights, choices.steady_shares(), pairs)
    association = Association(
        everything.correlation[:columns], everything.p[:columns], everything.threshold
    )
    if association.threshold > 0:  # else users do not differ in any attribute
        notes.append(
            f"With {unseen_users(len(users), study.everybody_is_seen)}, a correlation of weights "
            f"and attributes must be above {association.threshold:.2f} or below "
            f"-{association.threshold:.2f} to be told from chance."
        )
    largest = weighed_most(fit.W_unseen)[users]
    found = [
        attributes_found(association.correlation[k], association.p[k], choices, largest == k)
        for k in range(columns)
    ]
    return Part(association_table(association, ATTRIBUTES, len(users)), found, notes)


def few_people(people: str) -> str:
    """The note if there are fewer than FEWEST_USERS; people: how many, in words."""
    return f"{people} cannot tell what weights go with: {FEWEST_USERS} are needed."


def attributes_found(
    correlation: np.ndarray, p: np.ndarray, choices: Choices, its_users: np.ndarray
) -> list[Entry]:
    """What a column goes with: an entry for each group of `group_attributes`.

    correlation, p: `(J,)`, of the column. its_users: who weigh it most, bool `(N,)`.

    An entry has `attribute`, `correlation` and `p` of the first of the group; `with`, a list of
    {attribute, correlation} of the rest; `share_of_its_users` and `share_of_others`, of the pairs
    that differ in the attribute the share in which the text with more is chosen, means over these
    users, None if there are none; `phrase`, such as "longer texts"; `text`, all of it in words.
    """
    shares = choices.shares()
    steady = standardised(choices.steady_shares())
    between = steady.T @ steady / len(steady)
    found = []
    for first, *rest in group_attributes(correlation, p, between, len(steady)):
        names = [phrase(ATTRIBUTES[j], correlation[j]) for j in [first, *rest]]
        text = names[0]
        if rest:
            text += f" (and with it {', '.join(names[1:])})"
        found.append(
            {
                "attribute": ATTRIBUTES[first],
                "correlation": float(correlation[first]),
                "p": float(p[first]),
                "with": [
                    {"attribute": ATTRIBUTES[j], "correlation": float(correlation[j])} for j in rest
                ],
                "share_of_its_users": known_mean(shares[its_users, first]),
                "share_of_others": known_mean(shares[~its_users, first]),
                "phrase": names[0],
                "text": f"{text}, correlation {correlation[first]:+.2f}, p {p[first]:.2g}",
            }
        )
    return found


def known_mean(values: np.ndarray) -> float | None:
    """The mean of the numbers that are not NaN; None if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def read_known(fit: Fit, study: Study) -> Part:
    """Do the weights go with what is known of the people?

    Everybody of whom anything is known counts once, the seen users too: what is known of them is
    no choice, so nothing is used twice. The entries of `found` have `answer`, `correlation`, `p`
    and `text`, the strongest first.
    """
    columns = fit.V.shape[1]
    nothing: list[list[Entry]] = [[] for _ in range(columns)]
    about = study.about_users
    if not about:
        return Part(None, nothing, [])
    table = weights_of_people(fit, study).drop_duplicates("user")  # all may be seen and unseen
    table = table[table["user"].isin(list(about))]
    if len(table) < FEWEST_USERS:
        people = count_of(len(table), "user")
        return Part(None, nothing, [few_people(f"{people} of whom something is known")])

    answers = known_answers([about[user] for user in table["user"]])
    if not answers:
        note = f"No answer of the people is that of {FEWEST_PEOPLE} of them and not of others."
        return Part(None, nothing, [note])
    names = list(answers)
    weights = table[[f"weight_{k}" for k in range(columns)]].to_numpy()
    association = associate(weights, np.stack(list(answers.values()), 1), table["pairs"].to_numpy())
    found = [
        answers_found(association.correlation[k], association.p[k], names) for k in range(columns)
    ]
    return Part(association_table(association, names, len(table)), found, [])


def answers_found(correlation: np.ndarray, p: np.ndarray, names: list[str]) -> list[Entry]:
    """The answers that a column goes with, the strongest first, see `read_known`."""
    strongest_first = (-np.abs(correlation)).argsort(kind="stable")
    return [
        {
            "answer": names[j],
            "correlation": float(correlation[j]),
            "p": float(p[j]),
            "text": f"{names[j]}, correlation {correlation[j]:+.2f}, p {p[j]:.2g}",
        }
        for j in strongest_first
        if p[j] < FOUND
    ]


def read_examples(fit: Fit, scores: np.ndarray, study: Study) -> list[list[Entry]]:
    """The `strongest_contradictions` of each column; none without texts.

    scores: of `tested_scores`.
    """
    if "test_unseen" not in study.texts:
        return [[] for _ in scores.T]
    mean = unit_variance(everybodys_scores(scores, fit))
    pairs_of_user = list(map(len, study.test_unseen))
    columns = np.repeat(weighed_most(fit.W_unseen), pairs_of_user)  # (M,)
    return strongest_contradictions(unit_variance(scores), mean, columns, tested_pairs(study))


def read_seeds(
    fit: Fit, scores: np.ndarray, others: list[Fit], scores_of_others: list[np.ndarray]
) -> list[list[Entry]]:
    """For each column the most similar one of each other seed: {seed, column, correlation}.

    The correlation is over the pairs, of what the two columns say beyond everybody's mean reward.
    Any seed finds that mean, so with it all columns would look alike.
    scores, scores_of_others: of `tested_scores`.
    """
    own = unit_variance(scores - everybodys_scores(scores, fit)[:, None])
    found: list[list[Entry]] = [[] for _ in own.T]
    for other, other_scores in zip(others, scores_of_others):
        beyond = unit_variance(other_scores - everybodys_scores(other_scores, other)[:, None])
        correlation = own.T @ beyond / len(own)  # (K, columns of the other)
        for k, column in enumerate(correlation.argmax(1).tolist()):
            entry = {"column": column, "correlation": float(correlation[k, column])}
            found[k].append({"seed": other.seed, **entry})
    return found


def who_weigh_most(fit: Fit) -> list[Entry]:
    """Who weigh each column most: how many `seen` and `unseen` users, and with which accuracy.

    `seen_accuracy` and `unseen_accuracy` are means over these users, on their test pairs; None if
    there are none.
    """
    groups = {"seen": (fit.W, SEEN_TEST), "unseen": (fit.W_unseen, UNSEEN_TEST)}
    columns: list[Entry] = [{} for _ in range(fit.V.shape[1])]
    for group, (W, setting) in groups.items():
        largest = weighed_most(W)
        accuracies = np.asarray(fit.accuracies[setting], float)
        for k, column in enumerate(columns):
            column[group] = int((largest == k).sum())
            column[f"{group}_accuracy"] = known_mean(accuracies[largest == k])
    return columns


def weighed_most(W: torch.Tensor) -> np.ndarray:
    """The column that each user gives the largest weight: `(N,)`; W: `(N, K)`."""
    return W.argmax(1).cpu().numpy()


# ---- The whole reading, and a table of the people


def read_directions(fits: list[Fit], study: Study, model: tuple[int, float]) -> Entry:
    """What the columns of one model prefer, and who weighs them, as JSON values.

    fits: all seeds of every model among which the unseen users' test pairs have picked this one,
    because p must hold for the columns of all of them. Of this model alone, if held-out pairs
    have picked it.
    model: (K, alpha) of the model that the verdict names. What is read is its kept seed.

    Returns `K`, `alpha`, `seed`; `users` and `pairs`, how many unseen users and test pairs of
    theirs there are; `notes`, sentences on what could not be told; and

        attributes  {names, correlation [columns][names], p [columns][names], threshold, users},
                    see `read_attributes`; None if nothing could be told
        known       the same for what is known of the people, see `read_known`
        columns     for each column {column, text, weigh_most, attributes, known, examples,
                    found_again}: `text` is a sentence; for the others see `who_weigh_most`,
                    `attributes_found`, `answers_found`, `strongest_contradictions`, `read_seeds`;
                    no entries for a model with a single direction
    """
    by_model = fits_per_model(fits)
    seeds = by_model[model]
    fit = kept_fit(seeds)
    reading = {
        "K": fit.K,
        "alpha": fit.alpha,
        "seed": fit.seed,
        "users": len(study.unseen),
        "pairs": study.pair_count("test_unseen"),
        "notes": ["This model has one direction for everybody, so there is nothing to compare."],
        "attributes": None,
        "known": None,
        "columns": [],
    }
    if fit.V.shape[1] < 2:
        return reading

    others = [kept_fit(other) for name, other in by_model.items() if name != model]
    attributes = read_attributes(fit, others, study)
    known = read_known(fit, study)
    other_seeds = [other for other in seeds if other is not fit]
    scores, *scores_of_others = tested_scores([fit, *other_seeds], study)
    examples = read_examples(fit, scores, study)
    found_again = read_seeds(fit, scores, other_seeds, scores_of_others)
    weigh_most = who_weigh_most(fit)
    columns = []
    for k in range(fit.V.shape[1]):
        column = {
            "column": k,
            "weigh_most": weigh_most[k],
            "attributes": attributes.found[k],
            "known": known.found[k],
            "examples": examples[k],
            "found_again": found_again[k],
        }
        users = unseen_users(len(study.unseen), study.everybody_is_seen)
        column["text"] = column_text(column, users, attributes.table is not None)
        columns.append(column)
    return reading | {
        "notes": attributes.notes + known.notes,
        "attributes": attributes.table,
        "known": known.table,
        "columns": columns,
    }


def read_named_model(fits: list[Fit], study: Study, findings: Entry) -> Entry | None:
    """`read_directions` of the model that the verdict names; None if that fails, which is printed.

    fits: of a sweep. findings: what `lore.evidence.evidence` returned for them.
    A sweep may have taken days, so it must not be lost to an error here.
    """
    verdict = findings["verdict"]
    model = verdict["K"], verdict["alpha"]
    compared = [fit for fit in fits if fit.K > 1]  # of these the test pairs have picked the model
    if findings["chosen"]["by"] == "validation" or verdict["K"] < 2:
        compared = fits_per_model(fits)[model]
    try:
        return read_directions(compared, study, model)
    except Exception as error:  # whatever numpy, pandas or a text raises
        reason = printable(f"{type(error).__name__}: {error}")
        print(f"note: the directions could not be read ({reason})")
        return None


def column_text(column: Entry, users: str, is_told: bool) -> str:
    """A sentence on what a column prefers.

    users: how many there are, in words. is_told: whether attributes could be told at all.
    """
    count = column["weigh_most"]["unseen"]
    text = f"Column {column['column']}, weighed most by {count} of {users}: "
    if not is_told:
        return text + "what it prefers could not be told."
    if not column["attributes"]:
        return text + "it goes with none of the attributes."
    return text + "; ".join(entry["text"] for entry in column["attributes"]) + "."


def weights_table(fits: list[Fit], study: Study, model: tuple[int, float]) -> pd.DataFrame:
    """A row for each person, first the seen users: what weights.csv holds.

    fits: of a sweep. model: (K, alpha); the weights are those of its kept seed. Columns: `user`;
    `seen`, bool; `weight_0`, ..; `pairs`, how many the weights were fitted from; `test_pairs` and
    `accuracy`, the share of these that is predicted right; `about_<name>` for what is known.
    """
    table = weights_of_people(kept_fit(fits_per_model(fits)[model]), study)
    about = study.about_users
    known = pd.DataFrame([about.get(user, {}) for user in table["user"]], index=table.index)
    return table.join(known.add_prefix("about_"))


def weights_of_people(fit: Fit, study: Study) -> pd.DataFrame:
    """`weights_table` of one fit, without what is known of the people."""
    weights = torch.cat([fit.W, fit.W_unseen]).double().cpu().numpy()  # (N + N_unseen, K)
    return pd.DataFrame(
        {
            "user": [*study.seen, *study.unseen],
            "seen": [True] * len(study.seen) + [False] * len(study.unseen),
            **{f"weight_{k}": column for k, column in enumerate(weights.T)},
            "pairs": list(map(len, [*study.train, *study.train_unseen])),
            "test_pairs": list(map(len, [*study.test, *study.test_unseen])),
            "accuracy": np.concatenate([fit.accuracies[SEEN_TEST], fit.accuracies[UNSEEN_TEST]]),
        }
    )
