"""Anybody's comparisons, and public sets of them: the rows, the split, the files, the study.

A comparison is one answer that a person preferred to another answer to the same prompt. The parts
of this module, in their order:

    Rows            the schema of a row of own data, and of each public data set
    Reading         files, or a data set of the hub, as a list of comparisons
    The split       into train and test, so that no conversation is on both sides
    Conversations   what the reward model reads
    Files           what prepare.py writes, read by memory mapping
    The study       people, halved into seen and unseen, and their pairs
"""

import difflib
import errno
import functools
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import safetensors.torch
import torch
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, StrictStr
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from lore.checkpoint import is_plain_table
from lore.data_notes import Judged
from lore.embedding_files import HEAD_FILE, find_reward_head
from lore.files import atomic_write, explain_damage, load_tensors
from lore.normal_forms import (
    FEWEST_WORDS_REPEATED,
    Asked,
    Id,
    Turns,
    as_read,
    prompt_key,
    without_messages,
    without_repeated_prompts,
)
from lore.rows import (
    SPLIT_WORDS,
    LocatedRow,
    as_conversation,
    as_messages,
    column_names,
    columns_of,
    files_of_splits,
    hub_rows,
    parse_rows,
    read_rows,
)
from lore.study import PARTS, Study
from utils import InputError, Pairs, check_number, check_whole

EMBEDDINGS_FILE = "embeddings.safetensors"
PAIRS_FILE = "pairs.parquet"
USERS_FILE = "users.parquet"
FILES = (EMBEDDINGS_FILE, PAIRS_FILE, USERS_FILE)

SEEN_SHARE = 0.5  # of the users, as released

# Why something is left out, as `prepare.py` counts it
NO_TEXT = "pairs without a prompt or an answer, or with an empty message"
NO_PREFERENCE = "turns without a preferred response, with the turns after them"
EMPTY_TURN = "turns without a prompt before others, with the turns after them"
NO_OPINION = "annotations without a preference"
TIE = "ties"
OTHER_LANGUAGE = "pairs in other languages"
NO_LANGUAGE = "pairs whose language is not given"

Conversation = list[dict[str, str]]


# ---- Rows


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: StrictStr


def as_list(turns: Any) -> Any:
    """One message as a list of messages; anything else as it is."""
    return [turns] if isinstance(turns, dict) else turns


def none_if_blank(value: Any) -> Any:
    """None for what an empty cell becomes: an empty text, or not-a-number."""
    return None if value == "" or value != value else value


def split_called(name: Any) -> Any:
    """The split with this name, such as "validation" for "dev"; an unknown name as it is."""
    for split, names in SPLIT_WORDS.items():
        if name in names:
            return split
    return none_if_blank(name)


# A prompt or an answer in a row: a text, messages, one message, or nothing.
TurnsOfRow = Annotated[
    StrictStr | Annotated[list[Message], Field(min_length=1)] | None, BeforeValidator(as_list)
]
OptionalId = Annotated[Id | None, BeforeValidator(none_if_blank)]
OptionalText = Annotated[StrictStr | None, BeforeValidator(none_if_blank)]


class Comparison(NamedTuple):
    """Who preferred which of two answers to a prompt."""

    user: str
    prompt: Turns
    chosen: Turns
    rejected: Turns
    conversation: str | None = None  # an id, which says the same in all rows
    language: str | None = None
    split: str | None = None  # of SPLIT_WORDS; None: not given


class LeftOut(NamedTuple):
    """A part of a row that gives no comparison."""

    reason: str


class Row(BaseModel):
    """A row of own data or of a public data set.

    A kind of row is told by its columns, see `kind_of`. What a row says of its user, such as an
    age, is in columns that no field names.
    """

    model_config = ConfigDict(extra="allow")

    dataset: ClassVar[str]  # what has this schema, for errors
    telltale: ClassVar[set[str]] = set()  # columns that a row of this kind has
    full_size: ClassVar[int | None] = None  # rows of a full copy, as its own page says
    all_users_are_seen: ClassVar[bool] = False

    def comparisons(self) -> Iterator[Comparison | LeftOut]:
        """The comparisons of this row, and what is left out of it."""
        raise NotImplementedError


class OwnRow(Row):
    """A row of own data. An answer may begin with the prompt, as text or in messages."""

    dataset = "{user, prompt, chosen, rejected}, with optional split, conversation and language"

    user: Id = Field(validation_alias=AliasChoices("user", "user_id", "annotator_id", "worker"))
    prompt: TurnsOfRow = Field(validation_alias=AliasChoices("prompt", "context"))
    chosen: TurnsOfRow
    rejected: TurnsOfRow
    conversation: OptionalId = Field(
        None, validation_alias=AliasChoices("conversation", "conversation_id")
    )
    language: OptionalText = None
    split: Annotated[
        Literal["train", "validation", "test"] | None, BeforeValidator(split_called)
    ] = None

    def answers(self) -> tuple[Turns, Turns]:
        """The chosen and the rejected answer, without the messages of the prompt."""
        return without_messages(self.prompt, self.chosen), without_messages(
            self.prompt, self.rejected
        )

    @pydantic.model_validator(mode="after")
    def check_roles(self) -> Self:
        """Raise ValueError unless the assistant answers the prompt."""
        if isinstance(self.prompt, list) and self.prompt[-1]["role"] == "assistant":
            raise ValueError("the prompt ends with an assistant's message, which is no question")
        for answer in self.answers():
            if not answer:  # such a row is left out later
                continue
            messages = as_messages("assistant", answer)
            if not messages[0]["role"] == messages[-1]["role"] == "assistant":
                raise ValueError("an answer must begin and end with an assistant's message")
        return self

    def comparisons(self) -> Iterator[Comparison | LeftOut]:
        chosen, rejected = self.answers()
        yield Comparison(
            self.user,
            self.prompt,
            chosen,
            rejected,
            conversation=self.conversation,
            language=self.language,
            split=self.split,
        )


class PersonalRewardBenchRow(OwnRow):
    """A row of PersonalRewardBench: the messages before, and one message for each answer."""

    dataset = "PersonalRewardBench (MichaelR207/prism_personalized_0125)"
    telltale = {"user_id", "context", "chosen", "rejected"}
    all_users_are_seen = True


TURNS = ("first", "second", "third", "fourth")
RESPONSES = ("response_a", "response_b", "response_c", "response_d")
END_OF_TEXT = "<|end_of_text|>"

# Such as first_turn_prompt: may be missing or null, as not every conversation has four turns
TurnColumns = pydantic.create_model(
    "TurnColumns",
    __base__=Row,
    **{
        f"{turn}_turn_{part}": (OptionalText, None)
        for turn in TURNS
        for part in ("prompt", *RESPONSES, "preferred_response")
    },
)


class CommunityAlignmentRow(TurnColumns):
    """A conversation of up to four turns, in each of which one of four responses was preferred."""

    dataset = "facebook/community-alignment-dataset"
    telltale = {"annotator_id", "first_turn_prompt", "first_turn_preferred_response"}
    full_size = 90_256

    conversation_id: Id
    annotator_id: Id
    assigned_lang: OptionalText = None

    def comparisons(self) -> Iterator[Comparison | LeftOut]:
        """In each turn the preferred response against each of the others.

        The prompt of a turn holds the turns before it with their preferred responses. So a turn
        without a prompt or a preferred response ends the conversation.
        """
        history: Conversation = []
        for number, turn in enumerate(TURNS):
            question = self.text_of(turn, "prompt")
            if not question:
                if any(self.text_of(later, "prompt") for later in TURNS[number:]):
                    yield LeftOut(EMPTY_TURN)
                return
            preferred = getattr(self, f"{turn}_turn_preferred_response")
            chosen = self.text_of(turn, preferred) if preferred in RESPONSES else ""
            if not chosen:
                yield LeftOut(NO_PREFERENCE)
                return
            prompt = [*history, {"role": "user", "content": question}]
            for response in RESPONSES:
                rejected = self.text_of(turn, response)
                if response != preferred and rejected:
                    yield Comparison(
                        self.annotator_id,
                        prompt,
                        chosen,
                        rejected,
                        conversation=self.conversation_id,
                        language=self.assigned_lang,
                    )
            history = [*prompt, {"role": "assistant", "content": chosen}]

    def text_of(self, turn: str, part: str) -> str:
        """A text of a turn, without the model's end mark; "" if there is none."""
        text = getattr(self, f"{turn}_turn_{part}") or ""
        return text.removesuffix(END_OF_TEXT).rstrip() if text.strip() else ""


class Annotation(BaseModel):
    """What one annotator says of the two completions of a row of MultiPref."""

    evaluator: Id
    overall_pref: OptionalText = None


class MultiPrefRow(Row):
    """Two completions of a text, and what several annotators think of them."""

    dataset = "allenai/multipref"
    telltale = {"completion_a", "completion_b", "normal_worker_annotations"}
    full_size = 10_461

    text: OptionalText
    completion_a: OptionalText
    completion_b: OptionalText
    normal_worker_annotations: list[Annotation] | None = None
    expert_worker_annotations: list[Annotation] | None = None

    def comparisons(self) -> Iterator[Comparison | LeftOut]:
        """A comparison for each annotator who prefers one of the completions."""
        normal = self.normal_worker_annotations or []
        expert = self.expert_worker_annotations or []
        for annotation in normal + expert:
            preferred = annotation.overall_pref or ""
            if preferred.startswith("A-is-"):
                answers = self.completion_a, self.completion_b
            elif preferred.startswith("B-is-"):
                answers = self.completion_b, self.completion_a
            else:
                yield LeftOut(TIE if preferred == "Tie" else NO_OPINION)
                continue
            yield Comparison(annotation.evaluator, self.text, *answers)


KINDS = (CommunityAlignmentRow, MultiPrefRow, OwnRow)
PUBLIC = {  # data sets of the hub that prepare.py takes by name
    "facebook/community-alignment-dataset": CommunityAlignmentRow,
    "allenai/multipref": MultiPrefRow,
    "MichaelR207/prism_personalized_0125": PersonalRewardBenchRow,
    "MichaelR207/chatbot_arena_personalized_0125": PersonalRewardBenchRow,
}


# ---- Reading


@dataclass
class Reading:
    """What was read."""

    kind: type[Row]
    comparisons: list[Comparison]
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> how many
    repeats: int = 0  # comparisons whose answers repeated the text of the prompt, now without it
    about_users: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Source(NamedTuple):
    """Rows that are not parsed yet."""

    kind: type[Row]
    rows: dict[str | None, Iterable[LocatedRow]]  # split -> its rows; None: not split
    notes: list[str]


def read_comparisons(
    data: Path,
    *,
    languages: list[str] | None = None,
    about_users: list[str] | None = None,
    hub_split: str = "train",
    limit: int | None = None,
) -> Reading:
    """Read all comparisons of a file, a folder, or a data set of PUBLIC.

    languages: keep only comparisons in these; None: all. about_users: the columns that say who a
    user is, as patterns such as "annotator_*". hub_split: the one to read of a data set of the hub
    that is not split into train and test. limit: only the first rows of each split.
    Raises InputError that names file, row and field, or a setting that is no list of texts.
    """
    for name, setting in (("languages", languages), ("about_users", about_users)):
        if setting is not None and not is_list_of_texts(setting):
            raise InputError(f"{name}: {setting!r}; give None, or a list of texts")
    source = open_source(data, about_users or [], hub_split)
    reading = Reading(source.kind, [], notes=source.notes)
    without_split = None  # the place of the first row without a split
    for split, rows in source.rows.items():
        located = parse_rows(itertools.islice(rows, limit), source.kind, source.kind.dataset)
        for place, row in located:
            comparisons, left_out = comparisons_in(row, split, languages)
            reading.rows += 1
            reading.comparisons += comparisons
            reading.left_out.update(left_out)
            if comparisons and comparisons[0].split is None:
                without_split = without_split or place
            users = {comparison.user for comparison in comparisons}
            if len(users) == 1:  # else its columns are about nobody in particular
                note_user(reading.about_users, users.pop(), row, tuple(about_users or ()))

    if without_split and any(comparison.split for comparison in reading.comparisons):
        raise InputError(
            f"{without_split}: no split, and other rows have one; give each row train, validation "
            "or test"
        )
    keep_usable(reading)
    if not reading.comparisons:
        raise InputError(
            f"{data}: no comparison in {reading.rows:,} rows ({counted(reading)}); give rows with "
            "a prompt and two answers, in one of the languages"
        )
    return reading


def is_list_of_texts(value: Any) -> bool:
    """Whether this is a list; a text is none, though Python takes it for a list of letters."""
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def comparisons_in(
    row: Row, split: str | None, languages: list[str] | None
) -> tuple[list[Comparison], Counter[str]]:
    """The comparisons of a row in these languages, and how many of its parts are left out, and why.

    split: that of the file, which goes before the row's own; None: the file has none.
    """
    comparisons = []
    left_out: Counter[str] = Counter()
    for part in row.comparisons():
        if isinstance(part, LeftOut):
            left_out[part.reason] += 1
        elif languages is not None and part.language not in languages:
            left_out[OTHER_LANGUAGE if part.language else NO_LANGUAGE] += 1
        else:
            comparisons.append(part._replace(split=split or part.split))
    return comparisons, left_out


def open_source(data: Path, about_users: list[str], hub_split: str) -> Source:
    """The rows of a file, a folder, or a data set of PUBLIC. The arguments: `read_comparisons`."""
    if str(data) in PUBLIC and not data.exists():
        kind = PUBLIC[str(data)]
        splits = {split_called(name): rows for name, rows in hub_rows(str(data)).items()}
        if set(splits) <= set(SPLIT_WORDS) and len(splits) > 1:
            return Source(kind, splits, [])
        if hub_split not in splits:
            raise InputError(f"{data}: no split {hub_split!r}; it has {', '.join(splits)}")
        return Source(kind, {None: splits[hub_split]}, [])

    files_of = {None: [data]} if data.is_file() else files_of_splits(data, **SPLIT_WORDS)
    first = next(iter(files_of.values()))[0]
    names = column_names(first)
    kind = kind_of(data, names)
    about = [name for name in names if is_about_user(name, kind, tuple(about_users))]
    notes = check_own_columns(names - set(about), first) if kind is OwnRow and names else []
    read_columns = with_columns(kind, about)
    rows = {
        split: itertools.chain.from_iterable(read_rows(path, read_columns) for path in files)
        for split, files in files_of.items()
    }
    return Source(kind, rows, notes)


def kind_of(data: Path, columns: set[str]) -> type[Row]:
    """The kind of rows that files with these columns have.

    PersonalRewardBench has the columns of own data, so a copy is known by the name of its folder.
    """
    named = [kind for name, kind in PUBLIC.items() if Path(name).name == data.name]
    return next(kind for kind in (*named, *KINDS) if kind.telltale <= columns)


def with_columns(kind: type[Row], columns: list[str]) -> type[Row]:
    """The kind of row with further columns, so that these are read, too."""
    fields = {
        f"about_{number}": (Any, Field(None, validation_alias=column))
        for number, column in enumerate(columns)
    }
    return pydantic.create_model(kind.__name__, __base__=kind, **fields)


def check_own_columns(names: set[str], path: Path) -> list[str]:
    """A note on the columns that are not read, each with the known one that it may be meant for.

    Raises InputError: a column is missing, or there under two of its names.
    """
    known = columns_of(OwnRow).keys()

    def in_words(name: str) -> str:
        nearest = difflib.get_close_matches(name, known, 1)
        return f"{name!r} (is it {nearest[0]!r}?)" if nearest else repr(name)

    unread = ", ".join(in_words(name) for name in sorted(names - known))
    for column, info in OwnRow.model_fields.items():
        choices = getattr(info.validation_alias, "choices", [column])
        present = [choice for choice in choices if choice in names]
        if len(present) > 1:  # only the first would be read, such as a prompt without its context
            raise InputError(
                f"{path}, row 1: {column}: {' and '.join(map(repr, present))} are names of the "
                "same column; leave out or rename all but one"
            )
        if info.is_required() and not present:
            raise InputError(
                f"{path}, row 1: {column}: no such column, and these are not known: "
                f"{unread or 'none'}; expected is the schema of {OwnRow.dataset}"
            )
    return [f"columns that are not read: {unread}"] if unread else []


@functools.cache  # as it is asked for each row
def is_about_user(column: str, kind: type[Row], patterns: tuple[str, ...]) -> bool:
    """Whether a column says who the user is: a pattern fits, and no field of the row names it."""
    is_field = column in columns_of(kind)
    return not is_field and any(fnmatch(column, pattern) for pattern in patterns)


def note_user(
    about_users: dict[str, dict[str, Any]], user: str, row: Row, patterns: tuple[str, ...]
) -> None:
    """Add to `about_users` what a row says of its user; what was said first stays."""
    for column, value in (row.model_extra or {}).items():
        if none_if_blank(value) is None or not is_about_user(column, type(row), patterns):
            continue
        if not isinstance(value, str | int | float):
            value = str(value)
        about_users.setdefault(user, {}).setdefault(column, value)


def keep_usable(reading: Reading) -> None:
    """Leave out comparisons without a text; take prompts that answers repeat out of these."""
    with_text = [
        comparison
        for comparison in reading.comparisons
        if all(map(has_text, (comparison.prompt, comparison.chosen, comparison.rejected)))
    ]
    asked, reading.repeats = without_repeated_prompts(
        [Asked(c.prompt, c.chosen, c.rejected) for c in with_text]
    )
    usable = [
        comparison._replace(chosen=turns.chosen, rejected=turns.rejected)
        for comparison, turns in zip(with_text, asked)
        if has_text(turns.chosen) and has_text(turns.rejected)  # one may have been its prompt
    ]
    without_text = len(reading.comparisons) - len(usable)
    if without_text:
        reading.left_out[NO_TEXT] += without_text
    reading.comparisons = usable


def has_text(turns: Turns) -> bool:
    """Whether there is a message, and each has text."""
    if not turns:
        return False
    return all(message["content"].strip() for message in as_messages("user", turns))


def counted(reading: Reading) -> str:
    """What was left out, in words."""
    counts = [f"{count:,} {reason}" for reason, count in sorted(reading.left_out.items())]
    return f"left out: {', '.join(counts) or 'nothing'}"


# ---- The split


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


def split_comparisons(
    comparisons: list[Comparison], groups: np.ndarray, test_share: float, test_seed: int
) -> tuple[list[Comparison], list[str]]:
    """The comparisons with a split, and notes: lines about it.

    A split that is given stays, also if it cuts a group; that is a leak, and is noted. Else a share
    of the groups, drawn by `test_seed`, is for the test.
    groups: of `group_numbers`. test_share: from 0.01 to 0.99.
    Raises InputError: all comparisons are on one side.
    """
    check_number("test_share", test_share, 0.01, 0.99)
    check_whole("test_seed", test_seed)
    count = int(groups.max()) + 1
    notes = []
    if comparisons[0].split is None:
        drawn = np.random.default_rng(test_seed).permutation(count)
        drawn = drawn[: max(1, round(test_share * count))]
        in_test = np.isin(groups, drawn)
        print(f"split by conversation: {len(drawn):,} of {count:,} groups drawn for the test")
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
            f"{len(comparisons):,} comparisons of {count:,} groups of conversations on one side "
            "only; training and test need conversations of their own, give more rows, or a split "
            "of both kinds"
        )
    return comparisons, notes


def users_to_keep(
    comparisons: list[Comparison], groups: np.ndarray, min_pairs: int
) -> tuple[set[str], list[str]]:
    """The users with pairs on both sides and `min_pairs` or more, and lines about the others.

    Raises InputError: fewer than two are left.
    """
    check_whole("min_pairs", min_pairs, 1)
    pairs = Counter(comparison.user for comparison in comparisons)
    sides = {(comparison.user, comparison.split == "train") for comparison in comparisons}
    user_groups = {(c.user, group) for c, group in zip(comparisons, groups.tolist())}
    conversations = Counter(user for user, _ in user_groups)

    with_both = {user for user in pairs if {(user, True), (user, False)} <= sides}
    kept = {user for user in with_both if pairs[user] >= min_pairs}
    lone = sum(conversations[user] == 1 for user in pairs.keys() - with_both)
    reasons = {
        "with one conversation only": lone,
        "with pairs on one side of the split only": len(pairs) - len(with_both) - lone,
        f"with fewer than {min_pairs} pairs": len(with_both) - len(kept),
    }
    notes = [f"{count:,} users {reason} are left out" for reason, count in reasons.items() if count]
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


# ---- Conversations


def number_conversations(
    comparisons: list[Comparison],
) -> tuple[list[Conversation], np.ndarray]:
    """The distinct conversations, and the number of each comparison's two: int64 `[m, 2]`.

    The first column has the conversation with the chosen answer, the second the rejected one.
    """
    conversations = []
    number_of: dict[tuple, int] = {}
    numbers = np.empty((len(comparisons), 2), np.int64)
    for place, comparison in enumerate(comparisons):
        prompt = hashable("user", comparison.prompt)
        for side, answer in enumerate((comparison.chosen, comparison.rejected)):
            key = prompt, hashable("assistant", answer)
            number = number_of.setdefault(key, len(conversations))
            if number == len(conversations):
                conversations.append(as_conversation(comparison.prompt, answer))
            numbers[place, side] = number
    return conversations, numbers


def has_equal_sides(comparison: Comparison) -> bool:
    """Whether the model is shown the same conversation for both answers."""
    chosen, rejected = (hashable("assistant", answer) for answer in comparison[2:4])
    return chosen == rejected


def hashable(role: str, turns: Turns) -> tuple:
    """The messages as a key of a dict; a text is one message of this role."""
    if isinstance(turns, str):
        return ((role, turns),)
    return tuple((message["role"], message["content"]) for message in turns)


def digest_of_data(
    comparisons: list[Comparison], groups: np.ndarray, about_users: dict[str, dict[str, Any]]
) -> str:
    """SHA-256, in hex digits, of all that prepare.py's files depend on besides the model."""
    digest = hashlib.sha256(json.dumps(about_users, sort_keys=True).encode())
    for comparison, group in zip(comparisons, groups.tolist()):
        digest.update(json.dumps([*comparison, group]).encode())
    return digest.hexdigest()


# ---- Files

ROWS_AT_ONCE = 16_384  # of pairs.parquet, in memory when it is written

PAIRS_SCHEMA = pa.schema(
    {
        "user": pa.string(),
        "chosen": pa.int64(),  # the row of the conversation in EMBEDDINGS_FILE
        "rejected": pa.int64(),
        "split": pa.string(),  # train, validation or test
        "group": pa.int64(),  # conversations that a split must not cut
        "prompt": pa.string(),  # the messages, as JSON
        "chosen_text": pa.string(),
        "rejected_text": pa.string(),
    }
)
USERS_SCHEMA = pa.schema({"user": pa.string(), "about": pa.string()})  # about: a JSON object


def save_table(path: Path, table: torch.Tensor) -> None:
    """Write the embeddings of all distinct conversations, bfloat16 `[n, d]`.

    The file is written from the table itself: a copy of it in memory may be too much.
    """
    try:
        safetensors.torch.save_file({"embeddings": table}, path)
    except safetensors.SafetensorError as error:  # such as a full disk
        raise OSError(errno.EIO, str(error), str(path)) from None
    path.chmod(0o644)  # as other files have it; the library lets only its owner read it


def save_pairs(
    path: Path,
    comparisons: list[Comparison],
    groups: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
) -> None:
    """Write a row for each comparison; chosen, rejected: int64 `[m]`, rows of the table."""
    with (
        atomic_write(path) as file,
        pq.ParquetWriter(file, PAIRS_SCHEMA, compression="zstd") as out,
    ):
        for start in range(0, len(comparisons), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            columns = {
                "user": [comparison.user for comparison in comparisons[part]],
                "chosen": chosen[part],
                "rejected": rejected[part],
                "split": [comparison.split for comparison in comparisons[part]],
                "group": groups[part],
                "prompt": [
                    json.dumps(as_messages("user", comparison.prompt))
                    for comparison in comparisons[part]
                ],
                "chosen_text": [as_text(comparison.chosen) for comparison in comparisons[part]],
                "rejected_text": [as_text(comparison.rejected) for comparison in comparisons[part]],
            }
            out.write_table(pa.table(columns, schema=PAIRS_SCHEMA))


def as_text(answer: Turns) -> str:
    """A text as it is; the contents of messages, joined."""
    return "".join(message["content"] for message in as_messages("assistant", answer))


def save_users(path: Path, about_users: dict[str, dict[str, Any]]) -> None:
    """Write what is known of people, a row for each."""
    about = [json.dumps(known) for known in about_users.values()]
    table = pa.table({"user": list(about_users), "about": about}, schema=USERS_SCHEMA)
    with atomic_write(path) as file:
        pq.write_table(table, file)


def load_table(folder: Path) -> torch.Tensor:
    """The embeddings `[n, d]`, mapped: a row is read from the disk when it is used.

    Raises InputError: the file is missing or damaged.
    """
    path = folder / EMBEDDINGS_FILE
    tensors, _ = load_tensors(path)
    table = tensors.get("embeddings", torch.zeros(0))
    if not is_plain_table(table):
        raise InputError(f"{path}: holds no table of embeddings; run prepare.py --overwrite")
    return table


@dataclass
class Column:
    """The values of a column of texts."""

    values: list[str]  # each distinct one
    numbers: np.ndarray  # int64 [m], the place of each row's value in `values`


@dataclass
class PairTable:
    """What pairs.parquet holds, a value for each pair. Texts that are equal are held once."""

    user: Column
    split: Column
    prompt: Column
    chosen_text: Column
    rejected_text: Column
    chosen: np.ndarray  # int64 [m]
    rejected: np.ndarray
    group: np.ndarray


def load_pairs(folder: Path) -> PairTable:
    """Read pairs.parquet. Raises InputError: it is missing or damaged."""
    path = folder / PAIRS_FILE
    columns = {}
    with explain_damage(path, "table of pairs"):
        for column in PAIRS_SCHEMA:  # one by one, as the file may be large
            name = column.name
            if column.type == pa.string():
                table = pq.read_table(path, columns=[name], memory_map=True, read_dictionary=[name])
                columns[name] = distinct_values(table[name])
            else:
                table = pq.read_table(path, columns=[name], memory_map=True)
                columns[name] = table[name].to_numpy()
    return PairTable(**columns)


def distinct_values(column: pa.ChunkedArray) -> Column:
    """A column that was read as a dictionary in each of its chunks."""
    number_of: dict[str, int] = {}
    numbers = []
    for chunk in column.chunks:
        values = chunk.dictionary.to_pylist()
        places = [number_of.setdefault(value, len(number_of)) for value in values]
        numbers.append(np.array(places, np.int64)[chunk.indices.to_numpy()])
    return Column(list(number_of), np.concatenate(numbers))


def load_users(folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of people. Raises InputError: the file is missing or damaged."""
    path = folder / USERS_FILE
    with explain_damage(path, "table of users"):
        table = pq.read_table(path)
        users = zip(table["user"].to_pylist(), table["about"].to_pylist())
        return {user: json.loads(about) for user, about in users}


# ---- The study


EVERYBODY_IS_SEEN = (
    "every user is seen: the columns of unseen users show the same people, fitted once more with "
    "the basis frozen"
)


def load_embeddings(
    folder: Path | str,
    seen_share: float | None = None,
    split_seed: int = 0,
    train_pairs: int | None = None,
    unseen_pairs: int | None = None,
) -> Study:
    """Read what `prepare.py` wrote, and halve the users into seen and unseen.

    seen_share: of the users, sorted and shuffled by `split_seed`; 1: every user is seen, and the
    few shots of the same users fit their weights once more with V frozen; None: SEEN_SHARE, or 1
    for a data set that is published so. train_pairs, unseen_pairs: how many training pairs a seen
    and an unseen user keeps at most, drawn by `split_seed`; None: all.
    Features are `Pairs` over one table, which is mapped and not copied.
    Raises InputError: a file is missing, damaged, or not of the run that wrote the others; a
    setting is out of its bounds.
    """
    folder = Path(folder)
    check_whole("split_seed", split_seed)
    for name, value in (("train_pairs", train_pairs), ("unseen_pairs", unseen_pairs)):
        if value is not None:
            check_whole(name, value, 1)
    for name in (HEAD_FILE, *FILES):  # the digests in the first vouch for what is in the others
        if not (folder / name).exists():
            raise InputError(f"{folder / name}: no such file; run prepare.py first")
    table = load_table(folder)
    width = {table.shape[1]: folder / EMBEDDINGS_FILE}
    head, provenance = find_reward_head(folder, "", "own data", width, FILES)
    provenance.pop("title")
    pairs = load_pairs(folder)

    if seen_share is None:
        seen_share = 1 if provenance.get("all_users_are_seen") else SEEN_SHARE
    generator = random.Random(split_seed)
    seen, unseen = split_users(pairs.user.values, seen_share, generator)
    rows = rows_of_parts(pairs, seen, unseen, train_pairs, unseen_pairs, generator)
    if seen == unseen:
        provenance["data_notes"] = [*provenance["data_notes"], EVERYBODY_IS_SEEN]
    prompts = prompt_values(pairs.prompt)
    return Study(
        title=provenance["data"],
        seen=seen,
        unseen=unseen,
        **{
            part: [Pairs(table, pairs.chosen[user], pairs.rejected[user]) for user in rows[part]]
            for part in PARTS
        },
        reward_head=head,
        prompts={
            part: [
                [prompts[number] for number in pairs.prompt.numbers[user]] for user in rows[part]
            ]
            for part in PARTS
        },
        texts={part: [texts_of(pairs, user) for user in rows[part]] for part in PARTS},
        groups={
            part: [group_within_user(pairs.group[user]) for user in rows[part]]
            for part in ("train", "train_unseen")
        },
        conversations={part: [pairs.group[user].tolist() for user in rows[part]] for part in PARTS},
        about_users=load_users(folder),
        provenance=provenance,
    )


def users_in_words(study: Study) -> str:
    """How many seen and unseen users there are."""
    if study.everybody_is_seen:
        return f"{len(study.seen)} users ({EVERYBODY_IS_SEEN})"
    return f"{len(study.seen)} seen and {len(study.unseen)} unseen users"


def split_users(
    users: list[str], seen_share: float, generator: random.Random
) -> tuple[list[str], list[str]]:
    """The seen and the unseen users; with a share of 1 all users are both.

    Raises InputError: the share is not above 0 and at most 1.
    """
    check_number("seen_share", seen_share, 0.01, 1)
    users = sorted(users)
    generator.shuffle(users)
    if seen_share == 1:
        return users, list(users)
    count = min(max(1, round(seen_share * len(users))), len(users) - 1)
    return users[:count], users[count:]


def rows_of_parts(
    pairs: PairTable,
    seen: list[str],
    unseen: list[str],
    train_pairs: int | None,
    unseen_pairs: int | None,
    generator: random.Random,
) -> dict[str, list[np.ndarray]]:
    """The rows of each user's pairs in each part of a study."""
    order = np.argsort(pairs.user.numbers, kind="stable")
    ends = np.cumsum(np.bincount(pairs.user.numbers))[:-1]
    rows_of_user = dict(zip(pairs.user.values, np.split(order, ends)))
    is_train = np.array([split == "train" for split in pairs.split.values])[pairs.split.numbers]

    def side(users: list[str], train: bool, most: int | None = None) -> list[np.ndarray]:
        rows = [rows_of_user[user] for user in users]
        rows = [user_rows[is_train[user_rows] == train] for user_rows in rows]
        return [draw(user_rows, most, generator) for user_rows in rows]

    return {
        "train": side(seen, True, train_pairs),
        "test": side(seen, False),
        "train_unseen": side(unseen, True, unseen_pairs),
        "test_unseen": side(unseen, False),
    }


def draw(rows: np.ndarray, most: int | None, generator: random.Random) -> np.ndarray:
    """At most so many of the rows, in their order."""
    if most is None or len(rows) <= most:
        return rows
    return np.array(sorted(generator.sample(rows.tolist(), most)))


def prompt_values(prompt: Column) -> list[str]:
    """What the study tells prompts apart by: of each distinct prompt its messages as JSON.

    Prompts that are equal to a reader have the same text.
    """
    text_of_key: dict[str, str] = {}
    return [text_of_key.setdefault(prompt_key(json.loads(text)), text) for text in prompt.values]


def texts_of(pairs: PairTable, rows: np.ndarray) -> list[tuple[str, str]]:
    """The chosen and the rejected text of these pairs."""
    chosen = [pairs.chosen_text.values[number] for number in pairs.chosen_text.numbers[rows]]
    rejected = [pairs.rejected_text.values[number] for number in pairs.rejected_text.numbers[rows]]
    return list(zip(chosen, rejected))


def group_within_user(groups: np.ndarray) -> torch.Tensor:
    """The groups of one user's pairs, counted from 0 without a gap."""
    return torch.from_numpy(np.unique(groups, return_inverse=True)[1])
