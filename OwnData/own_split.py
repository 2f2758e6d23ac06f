"""The split into train and test, so that no conversation is on both sides; who takes part in it."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lore.data_notes import Judged
from lore.normal_forms import FEWEST_WORDS_REPEATED, Turns, as_read
from lore.rows import as_messages
from lore.words import count_of
from own_rows import Comparison
from utils import InputError, check_number, check_whole

# The most draws of a test. More than one is tried for people who share all their conversations.
DRAWS = 20


def group_numbers(comparisons: list[Comparison]) -> np.ndarray:
    """The number of the group of each comparison, int64 `[m]`.

    Comparisons that share the id of a conversation, or its opening, are of one group, and so are
    those that others link: groups are the connected components.
    """
    texts = [opening_of(comparison.prompt) for comparison in comparisons]
    read = {text: as_read(text) for text in set(texts)}
    beginning = shortest_beginnings(set(read.values()))
    opening_number = {text: n for n, text in enumerate(sorted(set(beginning.values())))}
    openings = np.array([opening_number[beginning[read[text]]] for text in texts])

    ids = {c.conversation for c in comparisons if c.conversation is not None}
    id_number = {name: len(opening_number) + n for n, name in enumerate(sorted(ids))}
    # A comparison without an id is linked to its opening alone.
    conversations = np.array(
        [id_number.get(c.conversation, opening) for c, opening in zip(comparisons, openings)]
    )
    nodes = len(opening_number) + len(id_number)
    links = coo_array(
        (np.ones(len(comparisons), bool), (openings, conversations)), shape=(nodes, nodes)
    )
    _, component = connected_components(links, directed=False)
    return np.unique(component[openings], return_inverse=True)[1]


def opening_of(prompt: Turns) -> str:
    """The first message of the user."""
    messages = as_messages("user", prompt)
    users = (message["content"] for message in messages if message["role"] == "user")
    return next(users, messages[0]["content"])


def shortest_beginnings(texts: set[str]) -> dict[str, str]:
    """For each text the shortest one of them that it begins with, which may be itself.

    So the turns of a conversation meet, too, if each prompt holds the turns before it as one plain
    text. Beginnings of fewer than FEWEST_WORDS_REPEATED words do not count.
    texts: as `as_read` gives them, with one space between two words.
    """
    beginnings = {}
    beginning = None
    for text in sorted(texts):  # what begins with a text comes right behind it
        if beginning is None or not text.startswith(beginning + " "):
            long_enough = len(text.split()) >= FEWEST_WORDS_REPEATED
            beginning = text if long_enough else None
        beginnings[text] = beginning or text
    return beginnings


class People:
    """Who has comparisons in which groups."""

    def __init__(self, comparisons: list[Comparison], groups: np.ndarray) -> None:
        """groups: of `group_numbers`."""
        pairs = {(c.user, group) for c, group in zip(comparisons, groups.tolist())}
        self.groups_of = Counter(user for user, _ in pairs)  # user -> how many groups
        self.in_group: list[list[str]] = [[] for _ in range(int(groups.max()) + 1)]
        for user, group in pairs:
            self.in_group[group].append(user)


def split_comparisons(
    comparisons: list[Comparison], groups: np.ndarray, test_share: float, test_seed: int
) -> tuple[list[Comparison], list[str]]:
    """The comparisons with a split, and notes: lines about it.

    A split that is given stays, also if it cuts a group; that is a leak, and is noted. Else the
    test is drawn, see `draw_test`.
    groups: of `group_numbers`. test_share: from 0.01 to 0.99.
    Raises InputError: all comparisons are on one side.
    """
    check_number("test_share", test_share, 0.01, 0.99)
    check_whole("test_seed", test_seed)
    count = int(groups.max()) + 1
    notes = []
    if comparisons[0].split is None:
        drawn = draw_test(People(comparisons, groups), test_share, test_seed)
        in_test = drawn[groups]
        print(f"split by conversation: {drawn.sum():,} of {count:,} groups drawn for the test")
        comparisons = [
            comparison._replace(split="test" if is_test else "train")
            for comparison, is_test in zip(comparisons, in_test)
        ]
    else:
        in_test = np.array([comparison.split != "train" for comparison in comparisons])
        cut = np.intersect1d(groups[in_test], groups[~in_test])
        if len(cut):
            notes.append(
                f"the given split cuts {len(cut):,} of {count:,} groups of conversations, which "
                "have rows in train and in test: a leak, as test answers may be in training prompts"
            )
    if in_test.all() or not in_test.any():
        raise InputError(
            f"{count_of(len(comparisons), 'comparison')} of {count_of(count, 'group')} of "
            "conversations on one side only; training and test need conversations of their own, "
            "give more rows, or a split of both kinds"
        )
    return comparisons, notes


def draw_test(people: People, test_share: float, test_seed: int) -> np.ndarray:
    """Which groups are for the test, bool `[groups]`: about a share of them, drawn by `test_seed`.

    A person with two or more groups has some on both sides, if one of them is that person's alone.
    People who share all their groups may still have one side only, as it may be impossible for all
    at once: think of three people, each with another two of three groups. Then a few draws are
    tried, and that with the fewest such people is taken.
    The share is larger if people have few groups: of two groups one is for the test.
    """
    generator = np.random.default_rng(test_seed)
    draws = []
    for _ in range(DRAWS):
        in_test, one_sided = draw_once(people, test_share, generator)
        draws.append((one_sided, in_test))
        if one_sided == 0:
            break
    return min(draws, key=lambda draw: draw[0])[1]


def draw_once(
    people: People, test_share: float, generator: np.random.Generator
) -> tuple[np.ndarray, int]:
    """A draw of groups for the test, bool `[groups]`, and how many people have one side only.

    First a share of the groups is drawn. Then groups change sides, one by one, as long as this
    leaves fewer people with one side only. People who have one group do not count.
    """
    count = len(people.in_group)
    order = generator.permutation(count)
    in_test = np.zeros(count, bool)
    in_test[order[: max(1, round(test_share * count))]] = True
    tested: Counter[str] = Counter()  # user -> how many groups in the test
    for group in np.flatnonzero(in_test):
        tested.update(people.in_group[group])

    def one_sided(users: Iterable[str], change: int = 0) -> int:
        """How many of these users have one side only, if `change` is added to their tests."""
        return sum(
            tested[user] + change in (0, people.groups_of[user])
            for user in users
            if people.groups_of[user] > 1
        )

    has_changed = True
    while has_changed:
        has_changed = False
        for group in order:
            users = people.in_group[group]
            change = -1 if in_test[group] else 1
            if one_sided(users, change) < one_sided(users):
                in_test[group] = not in_test[group]
                for user in users:
                    tested[user] += change
                has_changed = True
    return in_test, one_sided(people.groups_of)


def users_to_keep(
    comparisons: list[Comparison], groups: np.ndarray, min_pairs: int
) -> tuple[set[str], list[str]]:
    """The users with pairs on both sides and `min_pairs` or more, and lines about the others.

    Raises InputError: fewer than two are left.
    """
    check_whole("min_pairs", min_pairs, 1)
    pairs = Counter(comparison.user for comparison in comparisons)
    sides = {(comparison.user, comparison.split == "train") for comparison in comparisons}
    conversations = People(comparisons, groups).groups_of

    with_both = {user for user in pairs if {(user, True), (user, False)} <= sides}
    kept = {user for user in with_both if pairs[user] >= min_pairs}
    lone = sum(conversations[user] == 1 for user in pairs.keys() - with_both)
    reasons = {
        "with one conversation only": lone,
        "with pairs on one side of the split only": len(pairs) - len(with_both) - lone,
        f"with fewer than {count_of(min_pairs, 'pair')}": len(with_both) - len(kept),
    }
    notes = [
        f"left out: {count_of(count, 'user')} {reason}"
        for reason, count in reasons.items()
        if count > 0
    ]
    if len(kept) < 2:
        reasons = f" ({'; '.join(notes)})" if notes else ""
        raise InputError(
            f"users with pairs in train and in test: {len(kept)} of {len(pairs)}, and at least 2 "
            f"are needed{reasons}; give rows of more people, and more rows of the same people"
        )
    return kept, notes


def judged_of(comparisons: list[Comparison]) -> dict[str, list[Judged]]:
    """The comparisons on each side of the split: {"train": .., "test": ..}."""
    sides: dict[str, list[Judged]] = {"train": [], "test": []}
    for comparison in comparisons:
        side = "train" if comparison.split == "train" else "test"
        sides[side].append(Judged(*comparison[:4]))
    return sides
