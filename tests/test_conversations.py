"""A conversation's token ids are those of its whole text, whatever list it is in and where."""

import pytest
import tokenizers
import transformers
from helpers import input_error
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

import lore.conversations
from lore.conversations import TEXTS_AT_ONCE, dated_template, group_equal, tokenize_conversations

# ---- Tokenizers and conversations

# As that of Mistral: everything between the special tokens is text.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s> [INST] ' + message['content'] + ' [/INST] ' }}"
    "{% else %}{{ message['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)
SPECIAL_TOKENS = ["<s>", "</s>", "<unk>"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>/[]|.▁Ġ "


def build_tokenizer(*, normalizer=None, pre_tokenizer=None, extra_tokens=()):
    """A fast tokenizer with a token for each letter, and for some letters after a space."""
    letters = list(LETTERS)
    after_space = [space + letter for space in "▁Ġ" for letter in "abcxyz<["]
    vocabulary = {token: n for n, token in enumerate(SPECIAL_TOKENS + letters + after_space)}
    merges = [tuple(token) for token in after_space]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens(list(extra_tokens))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def added(content, **flags):
    return transformers.AddedToken(content, **flags)


TOKENIZERS = {
    "Mistral's": build_tokenizer(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
    "Mistral's, whole text": build_tokenizer(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    "a space before each piece": build_tokenizer(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always")
    ),
    "Llama 2's": build_tokenizer(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "bytes after a space": build_tokenizer(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "bytes": build_tokenizer(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "lower case": build_tokenizer(
        normalizer=normalizers.Lowercase(), extra_tokens=[added("xY", normalized=True)]
    ),
    "Llama 2's, with a normalized token": build_tokenizer(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        extra_tokens=[added("x|", normalized=True), added("|y", normalized=False)],
    ),
    "tokens that begin and end alike": build_tokenizer(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"),
        extra_tokens=[added(content, normalized=False) for content in ("<s>a", "a<", "s>")],
    ),
    "a token that takes in spaces": build_tokenizer(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"),
        extra_tokens=[added("|", lstrip=True, normalized=False)],
    ),
}


def conversation(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def ids_of_whole_text(messages, tokenizer):
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)

TYPED = [
    conversation("what does <s>bold</s>mean", "it is <s>struck</s>out"),
    conversation("<s>", "</s>"),
    conversation("a<s>a</s> a", "xY| |yxy<s>xy x|"),
    conversation("", "<s><s>a<s>a"),
]

# ---- Claims


@every_tokenizer
@pytest.mark.parametrize("place", [0, 1, 150, TEXTS_AT_ONCE - 1, TEXTS_AT_ONCE, 299])
def test_a_typed_special_token_gets_the_same_ids_at_every_place(name, place):
    tokenizer = TOKENIZERS[name]
    others = [conversation(f"abc {'x' * (n % 7)}", "yes") for n in range(299)]
    for typed in TYPED:
        expected = ids_of_whole_text(typed, tokenizer)
        assert tokenize_conversations([typed], tokenizer) == [expected]
        ids = tokenize_conversations([*others[:place], typed, *others[place:]], tokenizer)
        assert ids[place] == expected
        assert ids[place - 1] == ids_of_whole_text(others[place - 1], tokenizer) or place == 0


texts = st.lists(
    st.sampled_from(
        ["<s>", "</s>", "<", "s>", " ", "  ", "a", "b", "xY", "xy", "|", "▁", "[INST]"]
    ),
    max_size=6,
).map("".join)
conversations = st.lists(st.builds(conversation, texts, texts), min_size=1, max_size=6)


@every_tokenizer
@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(chats=conversations, seed=st.randoms(use_true_random=False))
def test_ids_are_the_same_in_every_list_at_every_position(name, chats, seed):
    tokenizer = TOKENIZERS[name]
    expected = [ids_of_whole_text(messages, tokenizer) for messages in chats]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lore.conversations, "TEXTS_AT_ONCE", 2)  # so that even short lists have parts
        assert tokenize_conversations(chats, tokenizer) == expected
    order = list(range(len(chats)))
    seed.shuffle(order)
    shuffled = tokenize_conversations([chats[n] for n in order], tokenizer)
    assert shuffled == [expected[n] for n in order]
    assert [tokenize_conversations([messages], tokenizer)[0] for messages in chats] == expected


@pytest.mark.parametrize("name", ["Mistral's", "Llama 2's", "bytes"])
def test_what_conversations_begin_with_is_still_encoded_once(name, monkeypatch):
    tokenizer = TOKENIZERS[name]
    encoder = lore.conversations.PieceEncoder(tokenizer)
    assert encoder.is_exact()
    encoded = []
    encode = encoder.encode_pieces
    encoder.encode_pieces = lambda pieces: encoded.extend(pieces) or encode(pieces)
    encoder.encode(["<s>a prompt</s>yes", "<s>a prompt</s>no"])
    encoder.encode(["<s>a prompt</s>maybe"])
    assert sorted(encoded) == ["</s>maybe", "</s>no", "</s>yes", "<s>a prompt"]


def test_a_tokenizer_that_takes_special_tokens_as_text_gets_whole_texts():
    tokenizer = build_tokenizer()
    tokenizer.split_special_tokens = True
    backend = tokenizer.backend_tokenizer
    backend.model = models.BPE(
        {**backend.get_vocab(), "a<": 90, ">b": 91}, [("a", "<"), (">", "b")], unk_token="<unk>"
    )
    chats = [conversation("a<s>b", "yes")]
    expected = [ids_of_whole_text(messages, tokenizer) for messages in chats]
    assert 90 in expected[0]
    assert tokenize_conversations(chats, tokenizer) == expected


def test_messages_that_differ_in_the_type_of_a_value_are_not_taken_as_equal():
    """Python takes True, 1 and 1.0 as equal keys of a dict; a template writes them differently."""
    chats = [[{"role": "user", "content": "a", "n": value}] for value in (1, True, 1.0, "1", 1)]
    distinct, numbers = group_equal(chats)
    assert len(distinct) >= 4
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['n'] }}"
    alone = [tokenize_conversations([chat], tokenizer)[0] for chat in chats]
    found = [None] * len(chats)
    for ids, group in zip(tokenize_conversations(distinct, tokenizer), numbers):
        for number in group:
            found[number] = ids
    assert found == alone


# ---- Tokenizers and templates that fail


@pytest.mark.parametrize("text", ["known unknown", "<s> known", "unknown"])
def test_what_a_tokenizer_cannot_encode_is_one_line(text):
    backend = tokenizers.Tokenizer(models.WordLevel({"known": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert tokenize_conversations([[{"role": "user", "content": "known"}]], tokenizer) == [[0]]
    with input_error("tokenizer cannot encode", "UNK"):
        tokenize_conversations([[{"role": "user", "content": text}]], tokenizer)


@pytest.mark.parametrize("template", [5, ["a"], {"default": 5}, {"default": None}, {7: "a"}])
def test_a_chat_template_that_is_no_text_is_refused(template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with input_error("chat template"):
        dated_template(tokenizer)
