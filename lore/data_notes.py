"""What is odd in data, a line each: printed when they are read, and kept for the report.

Nothing here stops a run. The lines go, as `data_notes`, into the provenance of the embeddings.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lore.normal_forms import Asked, Turns, answer_key, as_read, repeated_answers
from lore.rows import as_messages
from lore.words import count_of

# What other programs write as the id of nobody, or of nothing.
NOBODY = {"nan", "none", "null", "na", "n/a", "<na>", "nat", "undefined"}
LONGEST_NOBODY = max(map(len, NOBODY))  # so that long texts need not be looked up
# A text that is the whole of a list or an object, as Python, JSON or numpy print it.
PRINTED = re.compile(r"""\s*(\[\s*['"{\[]|\{\s*['"]).*['"}\]]\s*[\]}]\s*""", re.DOTALL)


class Judged(NamedTuple):
    """A comparison, and who made it."""

    user: str
    prompt: Turns
    chosen: Turns
    rejected: Turns


class _Numbered(NamedTuple):
    """A comparison in little memory: prompts and answers that are equal to a reader are numbers."""

    user: str
    prompt: int
    chosen: int
    rejected: int


def notes_on_comparisons(splits: dict[str, list[Judged]]) -> list[str]:
    """What is odd in the comparisons of each split, a line each."""
    numbers = _Numbers()
    numbered = {split: [numbers.of_row(row) for row in rows] for split, rows in splits.items()}
    notes = []
    for split, rows in splits.items():
        alike = [
            (row.chosen, row.rejected)
            for row, numbered_row in zip(rows, numbered[split])
            if numbered_row.chosen == numbered_row.rejected
        ]
        notes += notes_on_repeats(f"rows of {split}", numbered[split])
        notes += notes_on_likeness(split, alike)
        notes += _notes_on_kept_prompts(split, rows)
        for name, texts in zip(("prompts", "chosen answers", "rejected answers"), _columns(rows)):
            notes += notes_on_texts(f"{name} of the pairs in {split}", texts)
    notes += notes_on_overlap("rows", numbered)
    notes += _notes_on_turned_pairs(numbered)
    notes += _notes_on_users({split: [row.user for row in rows] for split, rows in splits.items()})
    return notes


def print_notes(notes: list[str]) -> None:
    """Print the notes as one block; nothing if there are none."""
    if notes:
        print("odd in these data:")
    for note in notes:
        print(f"  - {note}")


def warn_of_equal_sides(label: str, equal: int, pairs: int) -> None:
    """Print how many of these pairs have two equal texts; nothing if none has.

    Their margin is 0, so they count as wrong under every reward, as in the released scripts.
    """
    if not equal:
        return
    message = (
        f"{label}: {equal:,} of {pairs:,} pairs have two equal texts and count as wrong under "
        "every reward"
    )
    if equal > 0.01 * pairs:
        message += f"; warning: that is {equal / pairs:.1%}, leave them out"
    print(message)


# ---- One kind each


def notes_on_repeats(label: str, keys: Iterable) -> list[str]:
    """How many of the things that a label names, "rows of train", are there a second time.

    keys: equal for equal things.
    """
    keys = list(keys)
    repeats = len(keys) - len(set(keys))
    return [f"{label} that repeat an earlier one word for word: {repeats:,}"] if repeats else []


def notes_on_overlap(things: str, splits: dict[str, list]) -> list[str]:
    """How many "rows" or "prompts" of the second split are also in the first; keys as above."""
    (first, first_keys), (second, second_keys) = splits.items()
    shared = sum(map(set(first_keys).__contains__, second_keys))
    if not shared:
        return []
    return [
        f"{shared:,} of {len(second_keys):,} {things} of {second} are also in {first}: they test "
        "nothing new"
    ]


def notes_on_likeness(label: str, answers: Iterable[Sequence[Turns]]) -> list[str]:
    """How many answers differ from another answer to their prompt in nothing that a reader sees.

    answers: of each prompt. Equal texts are not counted here.
    """
    alike = 0
    for of_prompt in answers:
        looks = {answer_key(answer) for answer in of_prompt}
        if len(looks) < len(of_prompt):
            alike += len({_exact_key(answer) for answer in of_prompt}) - len(looks)
    if not alike:
        return []
    return [
        f"{label}: {count_of(alike, 'answer looks', 'answers look')} the same as another one to "
        "the same prompt: only white space differs, or how Unicode writes it"
    ]


def notes_on_texts(label: str, texts: Iterable[Turns]) -> list[str]:
    """How many texts are blank, "nan" or alike, or a printed list or object.

    Of messages the text of the last one counts. pandas' astype(str) makes "nan" of a missing text.
    Printed lists on one side only made the released results on PRISM: a model learns the brackets.
    """
    blank = 0
    missing = Counter()
    printed = 0
    for turns in texts:
        text = turns[-1]["content"] if turns and isinstance(turns, list) else turns
        if isinstance(text, str):
            stripped = text.strip()
            blank += not stripped
            if len(stripped) <= LONGEST_NOBODY and _is_nobody(stripped):
                missing[stripped] += 1
            printed += stripped[:1] in ("[", "{") and bool(PRINTED.fullmatch(text))
    notes = []
    if blank:
        are_blank = count_of(
            blank, "is blank, and stays as it is", "are blank, and stay as they are"
        )
        notes.append(f"{label}: {are_blank}")
    if missing:
        words = " or ".join(map(repr, sorted(missing)))
        are_missing = count_of(
            missing.total(),
            f"is {words}, as programs write for a missing text, and is taken as a text",
            f"are {words}, as programs write for a missing text, and are taken as texts",
        )
        notes.append(f"{label}: {are_missing}")
    if printed:
        are_printed = count_of(
            printed,
            "is a list or object printed as text, and is taken as a text",
            "are lists or objects printed as text, and are taken as texts",
        )
        notes.append(f"{label}: {are_printed}")
    return notes


def notes_on_removed_prompts(label: str, count: int) -> list[str]:
    """How many pairs of answers lost the text of their prompt, see `without_repeated_prompts`."""
    if not count:
        return []
    return [
        f"{label}: both answers of {count_of(count, 'pair')} began with the text of their prompt, "
        "which is left out of them"
    ]


def notes_on_conversations(ids: Iterable[str | None]) -> list[str]:
    """Ids of conversations that other programs write for none; None: no id is given."""
    counts = Counter(name for name in ids if name is not None)
    return [
        f"a conversation is called {name!r}, with {count_of(counts[name], 'row')}, which stay "
        "together: is this none? Then leave the id empty"
        for name in sorted(filter(_is_nobody, counts))
    ]


def _notes_on_kept_prompts(label: str, rows: list[Judged]) -> list[str]:
    count = sum(repeated_answers(Asked(*row[1:])) > 0 for row in rows)
    if not count:
        return []
    return [
        f"{label}: in {count_of(count, 'pair')} an answer begins with the text of its prompt, and "
        "stays as it is"
    ]


def _notes_on_turned_pairs(splits: dict[str, list[_Numbered]]) -> list[str]:
    """Of a pair that one person chose both ways round, one is wrong under every reward."""
    rows = {row for of_split in splits.values() for row in of_split}
    turned = sum(
        row.chosen < row.rejected and row._replace(chosen=row.rejected, rejected=row.chosen) in rows
        for row in rows
    )
    if not turned:
        return []
    return [
        f"{count_of(turned, 'pair was', 'pairs were')} chosen both ways round by the same user: "
        "one way of each is wrong under every reward"
    ]


def _notes_on_users(splits: dict[str, list[str]]) -> list[str]:
    """Users who are nobody, who have most of the rows, or who are in one split only.

    splits: the user of each row.
    """
    notes = []
    counts = Counter(user for users in splits.values() for user in users)
    rows = sum(counts.values())
    for user in sorted(filter(_is_nobody, counts)):
        notes.append(
            f"a user is called {user!r}, with {count_of(counts[user], 'row')}: is this nobody?"
        )
    for user, count in counts.most_common(1):
        if count > rows / 2 and len(counts) > 1:
            notes.append(f"user {user!r} has {count:,} of the {rows:,} rows")
    for split, users in splits.items():
        others = {user for name in splits if name != split for user in splits[name]}
        lone = set(users) - others
        if lone and others:
            are_lone = count_of(len(lone), "user is", "users are")
            notes.append(f"{are_lone} in {split} only, and so left out")
    return notes


# ---- Helpers


def _is_nobody(name: str) -> bool:
    return name.casefold() in NOBODY


def _columns(rows: list[Judged]) -> list[list[Turns]]:
    """The prompts, the chosen and the rejected answers."""
    return [[row[column] for row in rows] for column in (1, 2, 3)]


class _Numbers:
    """Numbers of prompts and answers, which are equal if these are equal to a reader.

    A text recurs in several pairs, and in prompts that hold earlier turns: it is read once.
    """

    def __init__(self) -> None:
        self.digest_of: dict[str, bytes] = {}  # text -> digest of how it is read, to save memory
        self.number_of: dict[tuple, int] = {}  # roles and digests of messages -> number

    def of_row(self, row: Judged) -> _Numbered:
        """A comparison by its numbers."""
        return _Numbered(
            row.user,
            self.of_turns("user", row.prompt),
            self.of_turns("assistant", row.chosen),
            self.of_turns("assistant", row.rejected),
        )

    def of_turns(self, role: str, turns: Turns) -> int:
        """The number of a prompt or an answer; a text is one message of this role."""
        key = []
        for message in as_messages(role, turns or ""):
            text = message["content"]
            if text not in self.digest_of:
                content = as_read(text).encode(errors="surrogatepass")
                self.digest_of[text] = hashlib.blake2b(content, digest_size=16).digest()
            key += [message["role"], self.digest_of[text]]
        return self.number_of.setdefault(tuple(key), len(self.number_of))


def _exact_key(answer: Turns) -> str:
    """A text that is equal for equal answers; a text and the assistant's message are equal."""
    return json.dumps(as_messages("assistant", answer or ""), sort_keys=True)
