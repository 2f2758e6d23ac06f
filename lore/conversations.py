"""Conversations as the token ids that the reward model reads."""

import re
import time

import numpy as np

from utils import InputError

TEMPLATE_DATE = time.strptime(
    "2024-07-26", "%Y-%m-%d"
)  # for templates that print the date; Llama 3.1's own default


def quoted(conversation):
    """How an error message names a conversation: its beginning and end."""
    return " .. ".join(
        repr(message["content"][:60]) for message in (conversation[0], conversation[-1])
    )


def tokenize_to_bytes(conversations, tokenizer):
    """Chat-format and tokenize: of each conversation the ids as bytes, four each, which sort as the ids do. What stands
    between special tokens, which a tokenizer takes out first, is tokenized once, if the first texts allow."""
    template, known = tokenizer.chat_template, {}
    if isinstance(template, dict):
        template = template.get(
            "default", "{{ raise_exception('none of its templates is named default') }}"
        )
    template = re.sub(
        r"""strftime_now\((['"])(.*?)\1\)""",
        lambda call: repr(time.strftime(call[2], TEMPLATE_DATE)),
        template,
    )
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    marks = sorted((token.content for token in added), reverse=True)
    cut = re.compile(f"({'|'.join(map(re.escape, marks))})")
    fast = getattr(
        getattr(tokenizer, "backend_tokenizer", None), "encode_batch_fast", None
    )  # ids without offsets
    whole = (
        any(token.lstrip or token.rstrip or token.single_word for token in added)
        or not marks
        or None
    )  # to be tried

    def formatted(conversation):
        try:
            text = tokenizer.apply_chat_template(
                conversation, chat_template=template, tokenize=False
            )
            text.encode()  # half a surrogate pair is no Unicode
            return text
        except Exception as error:  # the template is the checkpoint's program
            raise InputError(
                f"the model's chat template cannot format the conversation {quoted(conversation)} "
                f"({error}); repair it or leave it out"
            ) from None

    def encode(
        texts, fast=None
    ):  # the template has written the special tokens: the tokenizer must not add its own again
        ids = (
            [one.ids for one in fast(texts, add_special_tokens=False)]
            if fast
            else texts
            and tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        )
        return [np.array(sequence, ">u4").tobytes() for sequence in ids]

    def encode_pieces(texts):
        pieces = [[piece for piece in cut.split(text) if piece] for text in texts]
        new = list({piece for of_text in pieces for piece in of_text if piece not in known})
        known.update(zip(new, encode(new, fast)))
        return [b"".join(map(known.get, of_text)) for of_text in pieces]

    for start in range(0, len(conversations), 256):
        texts = list(map(formatted, conversations[start : start + 256]))
        whole = encode(texts) != encode_pieces(texts) if whole is None else whole
        yield from encode(texts) if whole else encode_pieces(texts)


def token_ids(sequence):
    return np.frombuffer(sequence, ">u4").astype(np.int64)


def tokenize_conversations(conversations, tokenizer):
    """Chat-format and tokenize conversations -> one list of token ids each, special tokens once. Raises InputError."""
    return [
        token_ids(sequence).tolist() for sequence in tokenize_to_bytes(conversations, tokenizer)
    ]
