"""Conversations as the token ids that the reward model reads.

A conversation is a list of messages, `{"role": .., "content": ..}`. The model's chat template makes
it a text with special tokens, and the tokenizer makes the text token ids.

A *sequence* is the ids of one conversation as bytes: each id takes four bytes, unsigned and
big-endian. Bytes take little memory, and equal sequences meet as keys of a dict. Bytes in this
format also sort as lists of the ids do, so sequences that begin alike are neighbours once sorted.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from utils import InputError

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, str]]

# Some templates print today's date. They get this one, Llama 3.1's own default, so that embeddings
# do not depend on the day.
TEMPLATE_DATE = time.strptime("2024-07-26", "%Y-%m-%d")
DATE_CALL = re.compile(r"""strftime_now\s*\(\s*(['"])([^'"]*)\1\s*\)""")  # a text is the format
ANY_DATE_CALL = re.compile(r"strftime_now\s*\(")
TEXTS_AT_ONCE = 256  # conversations that are formatted before they are tokenized

ID_FORMAT = ">u4"  # of an id in a sequence
ID_BYTES = 4


# ---- Sequences


def to_sequence(ids: list[int] | np.ndarray) -> bytes:
    """The sequence of these token ids."""
    return np.array(ids, ID_FORMAT).tobytes()


def token_ids(sequence: bytes) -> np.ndarray:
    """The token ids of a sequence, int64 `[tokens]`."""
    return np.frombuffer(sequence, ID_FORMAT).astype(np.int64)


def token_count(sequence: bytes) -> int:
    """How many tokens a sequence has."""
    return len(sequence) // ID_BYTES


def truncate(sequence: bytes, max_length: int | None, side: str) -> bytes:
    """A sequence without the tokens beyond `max_length`, which are cut off at its "left" or "right"
    `side`. max_length: None to keep all."""
    if max_length is None:
        return sequence
    if side == "left":
        return sequence[-max_length * ID_BYTES :]
    return sequence[: max_length * ID_BYTES]


# ---- Conversations


def quoted(conversation: Conversation) -> str:
    """How an error message names a conversation: its beginning and end."""
    ends = (conversation[0], conversation[-1])
    return " .. ".join(repr(message["content"][:60]) for message in ends)


def check_conversation(conversation: object) -> None:
    """Raise InputError unless this is a list of messages with texts."""
    is_list = isinstance(conversation, (list, tuple)) and len(conversation) > 0
    if not is_list or not all(
        isinstance(message, dict) and isinstance(message.get("content"), str)
        for message in conversation
    ):
        raise InputError(
            f"the conversation {conversation!r:.80}: not a list of messages "
            "{'role': .., 'content': a text}"
        )


def group_equal(
    conversations: Iterable[Conversation],
) -> tuple[list[Conversation], list[list[int]]]:
    """Find equal conversations, so that only one of them has to be formatted and tokenized.

    Returns the distinct conversations, and for each the numbers of all that are equal to it.
    Raises InputError: one that is not a list of messages.
    """
    distinct = []
    numbers = []
    group_of = {}  # messages -> number of their group
    for number, conversation in enumerate(conversations):
        check_conversation(conversation)
        group = len(distinct)
        # A message with anything but texts in it gets a group of its own: a list or a dict has no
        # hash, and True is equal to 1 although a template writes them differently.
        if all(isinstance(value, str) for message in conversation for value in message.values()):
            messages = tuple(tuple(message.items()) for message in conversation)
            group = group_of.setdefault(messages, group)
        if group == len(distinct):
            distinct.append(conversation)
            numbers.append([])
        numbers[group].append(number)
    return distinct, numbers


# ---- From conversations to texts


def dated_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokenizer's chat template, with TEMPLATE_DATE in place of today's date.

    Raises InputError: several templates, and none is named default; one that is no text; one that
    computes the format of the date.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(map(str, template))
            raise InputError(
                f"the model has chat templates for {names} and none named default; give the one "
                "for plain chats that name"
            )
        template = template["default"]
    if not isinstance(template, str):
        raise InputError(f"the model's chat template is {template!r:.60}; write a text there")

    def as_text(call: re.Match) -> str:
        date_format = call[2]
        return repr(time.strftime(date_format, TEMPLATE_DATE))

    template = DATE_CALL.sub(as_text, template)
    if ANY_DATE_CALL.search(template):
        raise InputError(
            "the model's chat template writes today's date in a format that it computes, so "
            "embeddings would depend on the day; write a format in quotes into each call of "
            "strftime_now"
        )
    return template


def format_conversation(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", template: str
) -> str:
    """The text of a conversation, with special tokens. Raises InputError if the template fails."""
    try:
        text = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
        text.encode()  # fails at half a surrogate pair, which is no Unicode
        return text
    except Exception as error:  # the template is the checkpoint's program: it may raise anything
        raise InputError(
            f"the model's chat template cannot format the conversation {quoted(conversation)} "
            f"({error}); repair it or leave it out"
        ) from None


# ---- From texts to sequences


def encode_whole(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[bytes]:
    """The sequences of texts, by the tokenizer's own call."""
    if not texts:  # some tokenizers refuse an empty list
        return []
    # The template has written the special tokens; the tokenizer must not add its own again.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    return [to_sequence(ids) for ids in encoded["input_ids"]]


class PieceEncoder:
    """Encodes texts piece by piece, and each distinct piece once for all texts.

    A piece is a special token with the text up to the next one. A fast tokenizer takes the special
    tokens out of a text first, and then looks at each text between them alone; all that it may also
    ask is whether this text is the first (Mistral's puts a space before it then). So pieces may be
    encoded one by one and joined, and a prompt with many answers is encoded once. Not every
    tokenizer keeps to that: `is_exact` tells.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.added_tokens = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
        # A normalized token is looked for later, in the normalized text between the others: there
        # it may read differently, and it is a part of that text.
        marks = [token.content for token in self.added_tokens if not token.normalized]
        # In reverse order a longer token is tried before one that it begins with.
        self.marks = sorted(filter(None, marks), reverse=True)
        self.special_token = re.compile(f"({'|'.join(map(re.escape, self.marks))})")
        self.encode_pieces = self._fastest_encoder()
        self.sequence_of = {}  # piece -> its sequence

    def _fastest_encoder(self) -> Callable[[list[str]], list[bytes]]:
        """Newer tokenizers can leave out where in the text each token is, which takes them time."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        encode_batch_fast = getattr(backend, "encode_batch_fast", None)
        if encode_batch_fast is None:
            return lambda texts: encode_whole(texts, self.tokenizer)

        def encode(texts: list[str]) -> list[bytes]:
            encodings = encode_batch_fast(texts, add_special_tokens=False)
            return [to_sequence(encoding.ids) for encoding in encodings]

        return encode

    def is_exact(self) -> bool:
        """Whether every text gets the same sequence piece by piece as whole.

        Only the tokenizer decides, and no text that is to be encoded: a conversation must not get
        other ids because of the list that it is in. So a tokenizer in Python, whose steps may look
        at anything, is given whole texts.
        """
        is_fast = getattr(self.tokenizer, "backend_tokenizer", None) is not None
        reads_them_as_text = getattr(self.tokenizer, "split_special_tokens", False)
        if not is_fast or reads_them_as_text or not self.marks:
            return False
        # Such a token takes in characters beside it, or depends on them.
        if any(token.lstrip or token.rstrip or token.single_word for token in self.added_tokens):
            return False
        return self._agrees_on_marks()

    def _agrees_on_marks(self) -> bool:
        """Whether texts with each special token get the same sequences piece by piece as whole.

        They do unless the tokenizer's class changes what its compiled part does.
        """
        texts = [f"a{mark}b c{mark} d {mark}{mark}\n" for mark in self.marks]
        texts += ["".join(self.marks), " ".join(self.marks)]
        # Whole texts first: the tokenizer's own call switches off a truncation that was saved with
        # it, and encode_batch_fast would apply that.
        whole = encode_whole(texts, self.tokenizer)
        agrees = self.encode(texts) == whole
        self.sequence_of.clear()
        return agrees

    def _pieces(self, text: str) -> list[str]:
        """The pieces of a text: what is before the first special token, and each with its text."""
        before, *rest = self.special_token.split(text)  # then token, text, token, text, ..
        pieces = [mark + piece for mark, piece in zip(rest[::2], rest[1::2])]
        return [before, *pieces] if before else pieces

    def encode(self, texts: list[str]) -> list[bytes]:
        """The sequences of texts."""
        texts_in_pieces = [self._pieces(text) for text in texts]
        distinct_pieces = {piece for pieces in texts_in_pieces for piece in pieces}
        new_pieces = [piece for piece in distinct_pieces if piece not in self.sequence_of]
        self.sequence_of.update(zip(new_pieces, self.encode_pieces(new_pieces)))
        return [b"".join(self.sequence_of[piece] for piece in pieces) for pieces in texts_in_pieces]


@contextlib.contextmanager
def _explain_tokenizer() -> Iterator[None]:
    """While active, an error of the tokenizer becomes an InputError."""
    try:
        yield
    except Exception as error:  # as the template it is the checkpoint's: it may raise anything
        raise InputError(
            f"the model's tokenizer cannot encode a text ({type(error).__name__}: {error}); give "
            "the one that the model was trained with"
        ) from None


def tokenize_to_bytes(
    conversations: list[Conversation], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[bytes]:
    """Chat-format and tokenize conversations, one sequence each.

    Raises InputError: the template cannot format a conversation, or the tokenizer encode it; no
    template is named default.
    """
    template = dated_template(tokenizer)
    piece_encoder = PieceEncoder(tokenizer)
    with _explain_tokenizer():
        by_pieces = piece_encoder.is_exact()
    for start in range(0, len(conversations), TEXTS_AT_ONCE):
        texts = [
            format_conversation(conversation, tokenizer, template)
            for conversation in conversations[start : start + TEXTS_AT_ONCE]
        ]
        with _explain_tokenizer():
            if by_pieces:
                sequences = piece_encoder.encode(texts)
            else:
                sequences = encode_whole(texts, tokenizer)
        yield from sequences


def tokenize_conversations(
    conversations: list[Conversation], tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    """Chat-format and tokenize conversations: a list of token ids each, special tokens once.

    Raises InputError: the template cannot format a conversation; no template is named default.
    """
    return [
        token_ids(sequence).tolist() for sequence in tokenize_to_bytes(conversations, tokenizer)
    ]
