"""One form for ids, texts and answers that come in several."""

import hashlib
import json
import numbers
import re
import unicodedata
from decimal import Decimal
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic

from lore.rows import as_messages

# Whole numbers that a float has printed: "3.0", and "1e+16", which has lost digits.
PRINTED_FLOAT = re.compile(r"(-?(?:0|[1-9]\d*))\.0+", re.ASCII)
PRINTED_EXPONENT = re.compile(r"-?\d(\.\d+)?[eE]\+\d+", re.ASCII)

# Characters that no reader sees: soft hyphen, zero-width space, marks of direction, word joiner,
# byte order mark. Joiners are not among them: they change what is seen.
INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff]")

# Two answers may begin with a prompt of fewer words by chance, such as a greeting.
FEWEST_WORDS_REPEATED = 3

# A prompt or an answer: a text, a list of messages, or nothing.
Turns = str | list[dict] | None


# ---- Ids


def canonical_id(value: Any) -> Any:
    """The one text for an id, in whatever format and type it comes: 3, 3.0 and " 3.0" are "3".

    Ids that are equal to a reader are equal: see `as_read`. What is no id (true, 1.5, a list) is
    given back as it is, for a schema to refuse.
    A column of floats of 32 bits tells whole numbers apart up to 2^24 only. `lore.rows.read_rows`
    says of which floats a parquet file is; of a text such as "16777216.0" nothing tells.
    Raises ValueError: a whole number that went through a float and may have lost digits.
    """
    if isinstance(value, str):
        text = as_read(value)
        printed = PRINTED_FLOAT.fullmatch(text)
        if printed:
            return _exact(int(printed[1]), float)
        if PRINTED_EXPONENT.fullmatch(text):
            return _exact(first_inexact(float), float)
        return text
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return str(int(value))
    if isinstance(value, float | np.floating) and value.is_integer():
        return _exact(int(value), type(value))
    return value


def first_inexact(float_type: type[float] | type[np.floating]) -> int:
    """From here on, different whole numbers are one float of this type: 2^53 of 64 bits."""
    return 2 ** (np.finfo(float_type).nmant + 1)


def _exact(number: int, float_type: type[float] | type[np.floating]) -> str:
    """The digits of a whole number that was a float. Raises ValueError if some may be wrong."""
    if abs(number) >= first_inexact(float_type):
        raise ValueError(
            "an id that went through a float, which cannot tell such large numbers apart; write "
            "ids as text or as whole numbers"
        )
    return str(number)


def _text_of_id(value: Any) -> str:
    """What `canonical_id` gives. Raises ValueError: as it does, or the value is no id."""
    text = canonical_id(value)
    if not isinstance(text, str):
        raise ValueError("an id is a text or a whole number")
    return text


# The id of a person or a conversation, in a schema.
Id = Annotated[
    pydantic.StrictStr, pydantic.Field(min_length=1), pydantic.BeforeValidator(_text_of_id)
]


# ---- Texts as a reader sees them


def as_read(text: str) -> str:
    """A text that is equal for texts that look equal, to compare them by.

    Unicode's composed and decomposed forms are one, and so is all white space between two words.
    White space at the ends and characters that nobody sees are left out.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return " ".join(text.split())


def prompt_key(prompt: Turns) -> str:
    """A text that is equal for prompts that are equal to a reader; a text is the user's message."""
    return _turns_key(as_messages("user", prompt or ""))


def answer_key(answer: Turns) -> str:
    """A text that is equal for answers that are equal to a reader; a text is the assistant's."""
    return _turns_key(as_messages("assistant", answer or ""))


def message_texts(prompt: str) -> list[str]:
    """The texts of the messages in a prompt of `Study.prompts`.

    It is the JSON of its messages, each `[role, content]` or `{"role": role, "content": content}`,
    or else a text, which is one message.
    """
    try:
        messages = json.loads(prompt)
    except (ValueError, RecursionError):
        return [prompt]
    texts = []
    for message in messages if isinstance(messages, list) else []:
        match message:
            case {"content": str(text)} | [str(), str(text)]:
                texts.append(text)
            case _:
                return [prompt]
    return texts or [prompt]


def key_of(content: bytes) -> int:
    """A hash of 64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _turns_key(messages: list[dict]) -> str:
    return json.dumps([[message["role"], as_read(message["content"])] for message in messages])


# ---- Answers without their prompt


class Asked(NamedTuple):
    """A prompt and two answers to it."""

    prompt: Turns
    chosen: Turns
    rejected: Turns


def without_messages(prompt: Turns, answer: Turns) -> Turns:
    """An answer without the messages of its prompt, if it begins with them."""
    asked = as_messages("user", prompt or "")
    if isinstance(answer, list) and answer[: len(asked)] == asked:
        return answer[len(asked) :]
    return answer


def without_repeated_prompts(rows: list[Asked]) -> tuple[list[Asked], int]:
    """The rows without the text of the prompt at the beginning of the answers; how many had it.

    Some data sets, such as hh-rlhf, write the prompt before each answer. But an answer may also
    begin with its prompt by itself. So the text is only removed if both answers begin with it, and
    if it has three words or more, or most rows repeat their prompts.
    """
    repeats = [repeated_answers(row) == 2 for row in rows]
    most_repeat = sum(repeats) > len(rows) / 2
    changed = []
    count = 0
    for row, is_repeated in zip(rows, repeats):
        words = len(_lone_text(row.prompt).split())
        if is_repeated and (most_repeat or words >= FEWEST_WORDS_REPEATED):
            answers = (_without_text(row.prompt, answer) for answer in row[1:])
            row = Asked(row.prompt, *answers)
            count += 1
        changed.append(row)
    return changed, count


def repeated_answers(row: Asked) -> int:
    """How many of the two answers begin with the text of the prompt, up to the end of a word."""
    prompt = _lone_text(row.prompt).strip()
    if not prompt:
        return 0
    count = 0
    for answer in row[1:]:
        text = _lone_text(answer).lstrip()
        rest = text[len(prompt) :]
        within_word = prompt[-1].isalnum() and rest[:1].isalnum()
        count += text.startswith(prompt) and not within_word
    return count


def _lone_text(turns: Turns) -> str:
    """A text, or that of a single message; "" for everything else."""
    if isinstance(turns, str):
        return turns
    return turns[0]["content"] if turns and len(turns) == 1 else ""


def _without_text(prompt: Turns, answer: Turns) -> Turns:
    """An answer, a text or a single message, without the text of the prompt at its beginning."""
    prompt_text = _lone_text(prompt).strip()
    text = _lone_text(answer).lstrip()[len(prompt_text) :].lstrip()
    return text if isinstance(answer, str) else [{**answer[0], "content": text}]
