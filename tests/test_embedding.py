"""The reward model, its head, and embeddings, against one forward pass per conversation."""

import copy
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time

import numpy as np
import pytest
import torch
import transformers
from demos import build_model, start_code
from helpers import ROOT, fresh_process, input_error, load_script, outcome, refused, writes_complex
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import lore.batching
import lore.batching_trial
import lore.conversations
import lore.embedding
import lore.embedding_files
import lore.files
import lore.prefix_attention
import lore.reward_model
import lore.scripts
from lore.batching import Shard, next_batch_size, tokens_of_batches
from lore.conversations import (
    dated_template,
    group_equal,
    to_sequence,
    tokenize_conversations,
    tokenize_to_bytes,
)
from lore.embedding import embed_conversations, embed_distinct
from lore.prefix_attention import common_prefix, paths_through_row
from lore.reward_model import (
    load_released_reference,
    load_reward_head,
    load_reward_model,
    load_tokenizer,
    model_identity,
)


def embed_with_record(*arguments, **options):
    """The embedding of each conversation `[n, d]`, and what they depend on."""
    table, rows, record = embed_distinct(*arguments, **options)
    return table[rows], record


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a small Llama reward model of random weights."""
    folder = tmp_path_factory.mktemp("models") / "standin"
    build_model(folder, layers=3)
    return folder


@pytest.fixture(scope="module")
def reward_model(checkpoint):
    """(backbone, tokenizer) of the checkpoint, in float32."""
    return load_reward_model(str(checkpoint), device="cpu")


def conversation(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def ragged_conversations(prompts=12, seed=0):
    """Prompts of 1 to 90 words with 1 to 5 responses each; some texts begin others, one is there
    three times, one conversation goes on where another ends."""
    generator = np.random.default_rng(seed)
    words = "my sister never pays me back and it is not funny any more 17 times été 😀".split()

    def text(longest):
        return " ".join(generator.choice(words, generator.integers(1, longest)))

    conversations = []
    for prompt in [text(90) for _ in range(prompts)]:
        for _ in range(generator.integers(1, 6)):
            conversations.append(conversation(prompt, text(40)))
    first_prompt, first_response = (message["content"] for message in conversations[0])
    conversations.append(conversation(first_prompt, first_response + " indeed"))
    conversations.extend([conversations[3]] * 2)
    conversations.append([*conversations[1], *conversation("why?", "because")])
    return conversations


def one_at_a_time(conversations, model, tokenizer):
    """The released way: template, tokenize, one forward pass each, the last token's last state."""
    states = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            states.append(model(ids).last_hidden_state[0, -1])
    return torch.stack(states)


def largest_error(found, expected):
    return (found - expected).abs().max()


# ---- Every conversation gets the state that it has alone


@pytest.mark.parametrize("token_budget", [1, 300, 100000])
def test_batched_embeddings_equal_one_forward_each(reward_model, token_budget):
    conversations = ragged_conversations()
    embeddings = embed_conversations(conversations, *reward_model, token_budget=token_budget)
    expected = one_at_a_time(conversations, *reward_model)
    assert expected.std() > 0.1
    assert largest_error(embeddings, expected) < 1e-5


def test_bfloat16_embeddings_point_the_same_way(checkpoint):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu", dtype=torch.bfloat16)
    conversations = ragged_conversations(6)
    embeddings = embed_conversations(conversations, model, tokenizer)
    assert embeddings.dtype == torch.bfloat16
    expected = one_at_a_time(conversations, model, tokenizer).float()
    assert torch.nn.functional.cosine_similarity(embeddings.float(), expected).min() > 0.999


@pytest.mark.parametrize(
    "attention, batching",
    [("eager", "rows"), ("flash_attention_2", "shared"), ("sdpa", "shared")],
)
def test_other_attention_implementations_give_the_same(
    checkpoint, reward_model, attention, batching
):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu", attention=attention)
    conversations = ragged_conversations()
    embeddings, record = embed_with_record(conversations, model, tokenizer)
    assert largest_error(embeddings, one_at_a_time(conversations, *reward_model)) < 1e-5
    assert record["batching"] == batching


def test_repeated_conversations_have_equal_rows_in_their_places(reward_model):
    conversations = ragged_conversations(3)
    order = [0, 1, 0, 2, 2, 1, 0]
    embeddings = embed_conversations([conversations[i] for i in order], *reward_model)
    expected = one_at_a_time(conversations, *reward_model)[order]
    assert largest_error(embeddings, expected) < 1e-5


def test_a_conversation_of_one_token_is_right_in_a_batch_of_its_own(reward_model):
    model, _ = reward_model
    found = {}
    for batching in ("shared", "alone"):
        shards = lore.batching.last_states(model, [Shard([to_sequence([3])])], batching, 99)
        _, found[batching] = next(shards)
    assert torch.equal(found["shared"], found["alone"])


# ---- Every token is computed once


def tokens_through(model, call):
    """How many tokens, padding among them, go through the model while `call()` runs."""
    counts = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda layer, inputs, output: counts.append(inputs[0].numel())
    )
    try:
        call()
    finally:
        hook.remove()
    return sum(counts)


def distinct_tokens(sequences):
    """How many tokens are left if every token behind the same tokens is counted once."""
    return len({tuple(ids[:end]) for ids in sequences for end in range(1, len(ids) + 1)})


@pytest.mark.parametrize("budget", [None, 400])
def test_what_conversations_begin_with_is_computed_once(reward_model, budget):
    """Answers to one post, and turns that repeat the dialogue before them, in batches that hold a
    post with its answers."""
    model, tokenizer = reward_model
    conversations = [
        conversation(f"A long story about fence {post}. " * 8, answer)
        for post in range(6)
        for answer in ("yes", "no", "move the fence", "yes", "yes we do")
    ]
    dialogue = [
        *conversation("hello", "there"),
        *conversation("why?", "because of it"),
        *conversation("so?", "so"),
    ]
    other_end = [*dialogue[:5], {"role": "assistant", "content": "no"}]
    conversations += [dialogue[:2], dialogue[:4], dialogue, other_end]
    embed_conversations(conversations, model, tokenizer)  # the trial, once
    computed = tokens_through(
        model, lambda: embed_conversations(conversations, model, tokenizer, token_budget=budget)
    )
    sequences = tokenize_conversations(conversations, tokenizer)
    distinct = distinct_tokens(sequences)
    assert distinct < sum(map(len, sequences)) / 2
    assert computed <= (distinct if budget is None else 1.05 * distinct)


def random_sorted_ids(seed=0):
    """Distinct lists of few different ids, so that many begin alike; sorted."""
    generator = np.random.default_rng(seed)
    lists = {tuple(generator.integers(0, 3, generator.integers(1, 7))) for _ in range(60)}
    return [np.array(ids) for ids in sorted(lists)]


def test_a_path_leads_through_the_row_of_tails_to_each_sequence():
    ids = random_sorted_ids()
    shared = np.array([0] + [common_prefix(a, b) for a, b in zip(ids, ids[1:])])
    lengths = np.array([len(sequence) for sequence in ids])
    row = np.concatenate([sequence[start:] for sequence, start in zip(ids, shared)])
    assert len(row) == distinct_tokens([sequence.tolist() for sequence in ids]) < lengths.sum()
    for path, sequence in zip(paths_through_row(lengths, shared), ids, strict=True):
        assert row[path].tolist() == sequence.tolist()


def varlen_flash_attention(
    query, key, value, query_starts, key_starts, longest_query, longest_key, *flags, scale
):
    """What torch's kernel of that name computes, pair by pair of queries and keys."""
    assert flags == (0.0, True, False)  # no dropout, causal, no debug mask
    copies = query.shape[1] // key.shape[1]
    scale = scale or query.shape[-1] ** -0.5
    outputs = []
    queries = query.tensor_split(query_starts[1:-1].tolist())
    keys = key.tensor_split(key_starts[1:-1].tolist())
    values = value.tensor_split(key_starts[1:-1].tolist())
    assert longest_query == max(map(len, queries)) and longest_key == max(map(len, keys))
    for q, k, v in zip(queries, keys, values, strict=True):
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        scores = torch.einsum("qhw,khw->hqk", q, k) * scale
        is_seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        weights = scores.masked_fill(~is_seen, -math.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khw->qhw", weights, v))
    return (torch.cat(outputs),)


def test_a_gpus_kernel_is_given_each_tail_with_the_keys_of_its_path(reward_model, monkeypatch):
    monkeypatch.setattr(lore.prefix_attention, "has_flash_kernel", lambda model: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", varlen_flash_attention)
    conversations = ragged_conversations()
    model, tokenizer = reward_model
    lore.batching_trial.KEPT_TRIALS.pop(model, None)
    embeddings, record = embed_with_record(conversations, model, tokenizer)
    lore.batching_trial.KEPT_TRIALS.pop(model)
    assert record["batching"] == "shared"
    assert largest_error(embeddings, one_at_a_time(conversations, model, tokenizer)) < 1e-5


@pytest.mark.parametrize(
    "batching, budget, batch_size, expected",
    [
        ("shared", 21, None, 3),  # four fit, but the fourth shares least with the one before it
        ("shared", 99, None, 5),  # all fit
        ("shared", 99, 2, 2),
        ("shared", 1, None, 1),  # one sequence, though beyond the budget
        ("rows", 21, None, 2),
        ("alone", 99, None, 1),
    ],
)
def test_a_batch_ends_within_its_budget_where_least_is_shared(
    batching, budget, batch_size, expected
):
    lengths = np.array([10, 9, 9, 9, 9])
    shared = np.array([0, 8, 6, 2, 8])  # tokens of batches of 1 to 5: 10, 11, 14, 21, 22
    tokens = tokens_of_batches(lengths, shared, batching)
    assert next_batch_size(tokens, shared, batching, budget, batch_size) == expected


OUT_OF_MEMORY = [torch.cuda.OutOfMemoryError(), RuntimeError("error: CUBLAS_STATUS_ALLOC_FAILED")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_beyond_the_gpus_memory_is_halved_and_stays_so(reward_model, monkeypatch, error):
    forward = lore.batching.forward_last_states
    batches_before_failures = []
    batches = []

    def on_a_small_gpu(model, ids, shared=None):
        size = sum(map(len, ids))
        if len(ids) > 1 and size > 250:
            batches_before_failures.append(len(batches))
            raise error
        batches.append(size)
        return forward(model, ids, shared)

    conversations = ragged_conversations()
    expected = embed_conversations(conversations, *reward_model)
    monkeypatch.setattr(lore.batching, "forward_last_states", on_a_small_gpu)
    embeddings = embed_conversations(conversations, *reward_model, shard_size=4)
    assert 0 < len(batches_before_failures) < 8 < len(batches)
    assert max(batches_before_failures) < len(batches) / 2
    assert largest_error(embeddings, expected) < 1e-5


def test_an_error_of_the_forward_pass_that_is_not_of_memory_is_raised(reward_model, monkeypatch):
    conversations = ragged_conversations()
    embed_conversations(conversations, *reward_model)  # the trial takes such an error for an answer

    def failing(*arguments):
        raise TypeError("of another kind")

    monkeypatch.setattr(lore.batching, "forward_last_states", failing)
    with pytest.raises(TypeError, match="of another kind"):
        embed_conversations(conversations, *reward_model)


# ---- The checkpoint: its head, its tokenizer, its weights


def test_reference_head_is_the_score_layer(checkpoint, reward_model):
    model, tokenizer = reward_model
    whole = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1)
    ids = torch.tensor(tokenize_conversations([conversation("hello", "there")], tokenizer))
    with torch.no_grad():
        states = whole.model(ids).last_hidden_state[:, -1]
        score = whole.score(states)
    head = load_reward_head(str(checkpoint))
    assert head.dtype == torch.float32
    assert head.shape == (model.config.hidden_size, 1)
    torch.testing.assert_close(states @ head, score)


def test_head_is_found_in_a_sharded_checkpoint(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({"score.weight": tensors.pop("score.weight")}, tmp_path / "b.safetensors")
    save_file(tensors, tmp_path / "a.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {"score.weight": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "a.safetensors").unlink()  # only the shard with the head is read
    assert torch.equal(load_reward_head(str(tmp_path)), load_reward_head(str(checkpoint)))


def test_released_reference_is_a_column_of_the_last_linear_layer(checkpoint, reward_model):
    model, _ = reward_model
    linear_layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    reference = load_released_reference(str(checkpoint))
    assert reference.dtype == torch.float32
    assert torch.equal(reference, linear_layers[-1].weight[:, :1].float())


def test_model_without_an_mlp_has_no_released_reference(tmp_path):
    save_file({"score.weight": torch.zeros(1, 8)}, tmp_path / "model.safetensors")
    with input_error(str(tmp_path), "down-projection"):
        load_released_reference(str(tmp_path))


@pytest.mark.parametrize(
    "heads",
    [
        {},
        {"score.weight": torch.zeros(2, 8)},
        {"score.weight": torch.zeros(1, 8), "other.score.weight": torch.zeros(1, 8)},
    ],
    ids=["no head", "two labels", "two heads"],
)
def test_checkpoint_without_exactly_one_scalar_head_is_refused(heads, tmp_path):
    save_file({"norm.weight": torch.zeros(8), **heads}, tmp_path / "model.safetensors")
    with input_error(str(tmp_path), "scalar"):
        load_reward_head(str(tmp_path))


def test_truncated_checkpoint_is_named(checkpoint, tmp_path):
    content = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with input_error("model.safetensors"):
        load_reward_head(str(tmp_path))


def test_model_without_chat_template_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with input_error("chat template"):
        load_reward_model(str(folder), device="cpu")


def test_model_in_another_format_than_safetensors_loads(checkpoint, reward_model, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model, _ = load_reward_model(str(folder), device="cpu")
    original, tokenizer = reward_model
    for found, expected in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(found, expected)
    embeddings = embed_conversations(ragged_conversations(2), model, tokenizer)
    expected = embed_conversations(ragged_conversations(2), original, tokenizer)
    assert torch.equal(embeddings, expected)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("layers.1.mlp.up", "elsewhere"),
    ],
)
def test_a_backbone_that_lacks_weights_is_refused(checkpoint, tmp_path, rename):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with input_error(str(folder), "weights"):
        load_reward_model(str(folder), device="cpu")


def test_a_config_of_fewer_layers_than_the_weights_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with input_error(str(folder), "layers.2"):
        load_reward_model(str(folder), device="cpu")


def test_a_checkpoint_is_loaded_when_all_is_tokenized(checkpoint, reward_model, monkeypatch):
    load = lore.reward_model.load_reward_model
    conversations = ragged_conversations(3)
    loaded = []

    def load_on_cpu(name, **options):
        loaded.append(name)
        return load(name, "cpu", **options)

    monkeypatch.setattr(lore.embedding, "load_reward_model", load_on_cpu)
    with input_error("half a \\ud83d"):
        embed_conversations([*conversations, conversation("half a \ud83d", "yes")], str(checkpoint))
    assert not loaded
    expected = one_at_a_time(conversations, *reward_model)
    model_that_knows_its_tokenizer, _ = reward_model
    for model in (str(checkpoint), checkpoint, model_that_knows_its_tokenizer):
        assert largest_error(embed_conversations(conversations, model), expected) < 1e-5
    assert loaded == [str(checkpoint), checkpoint]


def test_a_checkpoints_tokenizer_is_loaded_once(checkpoint, monkeypatch):
    load = transformers.AutoTokenizer.from_pretrained
    loaded = []

    def counted(name, **options):
        loaded.append(name)
        return load(name, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", counted)
    embed_conversations(ragged_conversations(2), str(checkpoint))
    assert loaded == [str(checkpoint)]


# ---- Input that cannot be embedded


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 0},
        {"max_length": -3},
        {"batch_size": 0},
        {"token_budget": 0},
        {"shard_size": 1.5},
        {"truncation_side": "middle"},
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_named(reward_model, options):
    with input_error(*options, str(*options.values())):
        embed_conversations([conversation("hello", "there")], *reward_model, **options)


def test_conversation_longer_than_the_context_is_named(reward_model):
    conversations = [conversation("hi", "you"), conversation("hi", "word and word " * 9000)]
    with input_error("word and word", "tokens"):
        embed_conversations(conversations, *reward_model)


def test_all_conversations_beyond_the_context_are_counted(reward_model, monkeypatch):
    model, tokenizer = reward_model
    monkeypatch.setattr(model.config, "max_position_embeddings", 64)
    conversations = [conversation(f"question {n}?", "word") for n in range(40)]
    for number in (7, 30, 39):
        conversations[number] = conversation(f"question {number}?", "x " * (100 + number))
    longest = max(map(len, tokenize_conversations(conversations, tokenizer)))
    with input_error(
        "3 of 40 conversations",
        ": 7, 30, 39;",
        "question 7?",
        "64 tokens",
        f"longest {longest}",
        "max_length=64",
    ):
        embed_conversations(conversations, model, tokenizer)
    cut = embed_conversations(conversations, model, tokenizer, max_length=64)
    assert cut.shape[0] == 40

    many = [conversation("again?", "x " * 200)] * 1500  # equal ones are counted, too
    with input_error("1,500 of 1,540 conversations", ": 40, 41, 42, 43, 44, ..;", "again?"):
        embed_conversations([*map(conversations.__getitem__, [0] * 40), *many], model, tokenizer)


@pytest.mark.parametrize("unlimited", [-1, 0])
def test_a_context_that_the_config_does_not_limit_takes_every_length(
    reward_model, monkeypatch, unlimited
):
    model, tokenizer = reward_model
    conversations = [conversation("again?", "x " * 100)]
    expected = embed_conversations(conversations, model, tokenizer)
    monkeypatch.setattr(model.config, "max_position_embeddings", unlimited)
    assert torch.equal(embed_conversations(conversations, model, tokenizer), expected)


def test_texts_beyond_context_and_vocabulary_are_counted_in_one_line(checkpoint):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    model.config.max_position_embeddings = 64
    conversations = [conversation("hi", text) for text in ("<|new|>", "x " * 90, "a<|new|>", "b")]
    with input_error("1 of 4 conversations", "2 of 4 conversations", "; and ", ": 0, 2;", ": 1;"):
        embed_conversations(conversations, model, tokenizer)


def test_an_empty_sequence_is_counted(checkpoint):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    conversations = [conversation(text, "yes") for text in ("hello", "", "you", "")]
    with input_error("2 of 4 conversations", ": 1, 3;", "have no tokens"):
        embed_conversations(conversations, model, tokenizer)


def test_no_conversation_at_all_is_refused(reward_model):
    with input_error("no conversations"):
        embed_conversations([], *reward_model)


@pytest.mark.parametrize(
    "conversations",
    [
        [[]],
        ["hello"],
        conversation("not", "in a list"),
        [[{"role": "user"}]],
        [[{"role": "user", "content": None}]],
    ],
    ids=str,
)
def test_what_is_no_list_of_messages_is_refused(reward_model, conversations):
    with input_error("not a list of messages"):
        embed_conversations(conversations, *reward_model)


def test_text_that_is_no_unicode_is_named(reward_model):
    with input_error("half a \\ud83d"):
        embed_conversations([[{"role": "user", "content": "half a \ud83d"}]], *reward_model)


def test_a_token_outside_the_embedding_table_is_named(checkpoint):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    conversations = [conversation("hi", "you"), conversation("<|new|>", "it is")]
    with input_error("new", str(len(tokenizer) - 1), str(model.config.vocab_size)):
        embed_conversations(conversations, model, tokenizer)


def test_conversation_with_an_embedding_that_is_not_finite_is_named(checkpoint, tmp_path):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    model.norm.weight.data[3] = math.inf
    conversations = ragged_conversations(2)[:1]
    prompt = conversations[0][0]["content"]
    with input_error("NaN or infinite", repr(prompt[:60])[1:-1]):
        embed_conversations(conversations, model, tokenizer, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*/*.safetensors"))


# ---- What the model sees of pairs

# As Qwen3's: what an answer has before </think> is left out, and white space around the rest.
TEMPLATE_WITHOUT_THOUGHTS = (
    "{% for message in messages %}"
    "{{ '[' + message['role'] + ']' }}"
    "{{ message['content'].split('</think>')[-1] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
)


@pytest.fixture
def embed_pairs(checkpoint, tmp_path):
    """A function that embeds pairs of answers as a script does -> what the head's file records."""
    model = shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE_WITHOUT_THOUGHTS
    tokenizer.save_pretrained(model)

    def embed(pairs, folder="out", overwrite=False, **options):
        conversations = [conversation("really?", answer) for pair in pairs for answer in pair]
        file = lore.scripts.EmbeddingFile(
            "train.safetensors",
            "some pairs",
            conversations,
            lambda path, table, rows: save_file({"embeddings": table[rows]}, path),
            pairs=[(2 * n, 2 * n + 1) for n in range(len(pairs))],
        )
        lore.scripts.embed_files(
            [file],
            "pairs to embed",
            folder=tmp_path / folder,
            checkpoint=str(model),
            model="stand-in",
            data="pairs",
            data_digest=lore.files.digest_of(pairs),
            token_budget=None,
            shard_size=1024,
            overwrite=overwrite,
            **options,
        )
        return lore.files.load_tensors(tmp_path / folder / lore.embedding_files.HEAD_FILE)[1]

    embed.folder = tmp_path
    return embed


def test_pairs_that_the_template_makes_equal_are_counted_and_recorded(embed_pairs, capsys):
    pairs = [(f"<think>{n}</think>Yes.", "<think>no</think> Yes. ") for n in range(30)]
    pairs += [("Yes.", "No.")] * 25 + [("equal", "equal")] * 5
    provenance = embed_pairs(pairs)
    assert provenance["equal_pairs"] == {"train.safetensors": {"equal": 35, "pairs": 60}}
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "equal token ids" in line]
    assert "35 of 60 pairs" in line and "30 of them differ" in line
    assert "the chat template leaves out" in line and "warning: that is 58.3%" in line


def test_pairs_of_equal_texts_alone_are_recorded_and_not_told_twice(embed_pairs, capsys):
    provenance = embed_pairs([("Yes.", "No."), ("equal", "equal")])
    assert provenance["equal_pairs"] == {"train.safetensors": {"equal": 1, "pairs": 2}}
    assert "equal token ids" not in capsys.readouterr().out


def test_no_equal_pair_leaves_no_word(embed_pairs, capsys):
    assert "equal_pairs" not in embed_pairs([("Yes.", "No."), ("No.", "Yes.")])
    assert "equal token ids" not in capsys.readouterr().out


def test_embeddings_of_texts_that_are_cut_are_others(embed_pairs, capsys):
    pairs = [("a long answer " * 9 + "yes", "a long answer " * 9 + "no"), ("first end", "x end")]
    whole = embed_pairs(pairs)
    assert "max_length" not in whole["identity"]
    with input_error("of other max_length (", "--overwrite"):
        embed_pairs(pairs, max_length=3)
    capsys.readouterr()
    cut = embed_pairs(pairs, max_length=2, overwrite=True)
    assert cut["identity"] == {**whole["identity"], "max_length": 2}
    assert "or the cut to 2 tokens" in capsys.readouterr().out  # "end" and the special token
    assert cut["equal_pairs"] == {"train.safetensors": {"equal": 1, "pairs": 2}}
    embed_pairs(pairs, max_length=2)
    assert "finished already" in capsys.readouterr().out
    for other in ({}, {"max_length": 4}):
        with input_error("of other max_length (", "--overwrite"):
            embed_pairs(pairs, **other)

    found = load_file(embed_pairs.folder / "out" / "train.safetensors")["embeddings"]
    conversations = [conversation("really?", answer) for pair in pairs for answer in pair]
    expected = embed_conversations(
        conversations, embed_pairs.folder / "model", max_length=2, dtype=torch.bfloat16
    )
    assert torch.equal(found, expected)


def comparisons_of_a_script(name):
    """The file of embeddings that a script makes of four answers, and which are compared there."""
    if name == "RedditTLDR":
        comparisons = [
            {"text": "post", "winning_summary": "a", "losing_summary": "b"},
            {"text": "post", "winning_summary": "c", "losing_summary": "d"},
        ]
        file = load_script(name, "prepare").file_of("train", {"worker": comparisons})
        return file, ["ab", "cd"]
    if name == "PRISM":
        prompt = [{"role": "user", "content": "question"}]
        rows = [
            {
                "prompt": prompt,
                "extra_info": {"chosen_utterance": "a", "rejected_utterance": ["b"]},
            },
            {
                "prompt": prompt,
                "extra_info": {"chosen_utterance": "c", "rejected_utterance": ["d", "a"]},
            },
        ]
        file = load_script(name, "generate-prism-embeddings").file_of("train", rows)
        return file, ["ab", "cd", "ca"]
    prepare = load_script(name, "prepare")
    prompts = prepare.personalllm.ScoredPrompts(["one", "two"], [["a", "b", "c"], ["d", "e"]], None)
    return prepare.file_of("train", prompts), ["ab", "ac", "bc", "de"]


@pytest.mark.parametrize("name", ["RedditTLDR", "PRISM", "PersonalLLM"])
def test_a_scripts_pairs_are_those_that_are_compared(name):
    file, compared = comparisons_of_a_script(name)
    answers = [messages[-1]["content"] for messages in file.conversations]
    assert [answers[a] + answers[b] for a, b in file.pairs] == compared


@pytest.mark.parametrize(
    "folder, name",
    [
        ("RedditTLDR", "prepare"),
        ("PersonalLLM", "prepare"),
        ("PRISM", "generate-prism-embeddings"),
    ],
)
def test_a_cut_to_no_token_is_refused_by_every_script(monkeypatch, capsys, tmp_path, folder, name):
    options = ["--model", tmp_path, "--dir", tmp_path, "--max_length", 0]
    refused(monkeypatch, capsys, load_script(folder, name), options, "--max_length: 0")


def test_a_script_that_runs_no_model_cannot_cut(monkeypatch, capsys, tmp_path):
    options = ["--demo", "--dir", tmp_path, "--max_length", 9]
    refused(monkeypatch, capsys, load_script("PRISM", "prepare"), options, "--max_length")


# ---- Double precision


@pytest.fixture
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
def test_double_precision_by_default_leaves_embeddings_as_they_are(tmp_path, dtype):
    folder = build_model(tmp_path / "model")  # its weights are saved in float64
    conversations = ragged_conversations(4)
    model, tokenizer = load_reward_model(str(folder), device="cpu", dtype=dtype)
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        embeddings, record = embed_with_record(conversations, model, tokenizer, cache)
        assert embeddings.dtype == model.dtype == (dtype or torch.float32)
        assert record["batching"] == "shared"
        if dtype == torch.bfloat16:
            continue  # it rounds too much to be compared
        error = largest_error(embeddings, one_at_a_time(conversations, model, tokenizer))
        assert error < (1e-12 if dtype == torch.float64 else 1e-5)


# ---- Embeddings that are kept


def embed_with_cache(conversations, reward_model, folder, **options):
    """(embeddings, how many batches went through the model)."""
    model, tokenizer = reward_model
    batches = []
    hook = model.norm.register_forward_hook(lambda layer, inputs, output: batches.append(output))
    try:
        embeddings = embed_conversations(
            conversations, model, tokenizer, cache_dir=folder, shard_size=4, **options
        )
    finally:
        hook.remove()
    return embeddings, len(batches)


def test_second_call_computes_nothing_and_a_lost_shard_is_made_again(reward_model, tmp_path):
    conversations = ragged_conversations()
    first, batches = embed_with_cache(conversations, reward_model, tmp_path)
    assert batches > 3
    again, batches = embed_with_cache(conversations[::-1], reward_model, tmp_path)
    assert batches == 0
    assert torch.equal(first, again.flip(0))
    shard = min(tmp_path.glob("*/*.safetensors"))
    content = shard.read_bytes()
    shard.unlink()
    mended, batches = embed_with_cache(conversations, reward_model, tmp_path)
    assert batches == 1
    assert torch.equal(first, mended)
    assert shard.read_bytes() == content


def test_new_conversations_reuse_the_cache(reward_model, tmp_path):
    conversations = ragged_conversations()
    embed_with_cache(conversations[:-8], reward_model, tmp_path)
    embeddings, _ = embed_with_cache(conversations, reward_model, tmp_path)
    assert largest_error(embeddings, one_at_a_time(conversations, *reward_model)) < 1e-5


def test_another_template_does_not_hit_the_cache(reward_model, tmp_path, monkeypatch):
    conversations = ragged_conversations(4)
    _, tokenizer = reward_model
    embed_with_cache(conversations, reward_model, tmp_path)
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + " ")
    _, batches = embed_with_cache(conversations, reward_model, tmp_path)
    assert batches > 0


def test_another_model_does_not_hit_the_cache(reward_model, checkpoint, tmp_path):
    conversations = ragged_conversations(4)
    embed_with_cache(conversations, reward_model, tmp_path)
    other = load_reward_model(str(checkpoint), device="cpu")
    other[0].norm.weight.data[0] += 0.5
    embeddings, batches = embed_with_cache(conversations, other, tmp_path)
    assert batches > 0
    assert largest_error(embeddings, one_at_a_time(conversations, *other)) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.embed_tokens.weight.data[1:-1].mul_(1.5),
        lambda model: setattr(model.config, "rms_norm_eps", 0.1),
    ],
    ids=["inner values", "settings"],
)
def test_a_changed_model_does_not_hit_the_cache(reward_model, checkpoint, tmp_path, change):
    conversations = ragged_conversations(2)
    embed_with_cache(conversations, reward_model, tmp_path)
    changed, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    change(changed)
    _, batches = embed_with_cache(conversations, (changed, tokenizer), tmp_path)
    assert batches > 0
    same = load_reward_model(str(checkpoint), device="cpu")
    _, batches = embed_with_cache(conversations, same, tmp_path)
    assert batches == 0


def test_another_minor_version_of_transformers_does_not_hit_the_cache_and_that_is_said(
    reward_model, tmp_path, monkeypatch, capsys
):
    conversations = ragged_conversations(2)

    def embed_as(version):
        # transformers replaces its own module, so the one imported above may be an older object.
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        capsys.readouterr()
        _, batches = embed_with_cache(conversations, reward_model, tmp_path)
        return batches, capsys.readouterr().out

    batches, printed = embed_as("5.90.0")
    assert (batches > 0, printed) == (True, "")
    assert embed_as("5.90.1.dev0") == (0, "")
    batches, printed = embed_as("5.91.0")
    assert batches > 0
    (line,) = printed.splitlines()
    for text in (str(tmp_path), torch.__version__, "5.91"):
        assert text in line


def test_damaged_shard_is_made_again(reward_model, tmp_path):
    conversations = ragged_conversations(4)
    embeddings, _ = embed_with_cache(conversations, reward_model, tmp_path)
    shard = next(tmp_path.glob("*/*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    again, batches = embed_with_cache(conversations, reward_model, tmp_path)
    assert batches > 0
    assert torch.equal(again, embeddings)
    assert shard.read_bytes() == content


@pytest.mark.parametrize(
    "spoilt",
    [
        {"embeddings": torch.full((99, 64), math.nan)},
        {"states": torch.ones(99, 64)},
        {"embeddings": torch.ones(99)},
        {"embeddings": torch.ones(99, 0)},
        {"embeddings": torch.ones(99, 64, dtype=torch.int64)},
        pytest.param(
            {"embeddings": torch.ones(99, 64, dtype=torch.complex64)}, marks=writes_complex
        ),
        {"embeddings": torch.ones(99, 64).to(torch.float8_e4m3fn)},
    ],
    ids=["NaN", "other tensors", "a vector", "no width", "int64", "complex", "float8"],
)
def test_shard_without_usable_embeddings_is_made_again(reward_model, tmp_path, spoilt):
    conversations = ragged_conversations(4)
    embeddings, _ = embed_with_cache(conversations, reward_model, tmp_path)
    shard = next(tmp_path.glob("*/*.safetensors"))
    content = shard.read_bytes()
    count = len(lore.files.load_tensors(shard)[0]["embeddings"])
    lore.files.save_tensors(shard, {name: tensor[:count] for name, tensor in spoilt.items()})
    again, batches = embed_with_cache(conversations, reward_model, tmp_path)
    assert batches == 1
    assert torch.equal(again, embeddings)
    assert shard.read_bytes() == content


def test_a_run_killed_at_any_moment_loses_at_most_a_shard(checkpoint, reward_model, tmp_path):
    code = """if True:
        import json, sys
        from lore.embedding import embed_conversations
        from lore.reward_model import load_reward_model
        model, tokenizer = load_reward_model(sys.argv[1], device="cpu")
        conversations = json.load(open(sys.argv[2]))
        embed_conversations(conversations, model, tokenizer, sys.argv[3], shard_size=8)"""
    conversations = ragged_conversations(100)
    texts, cache = tmp_path / "texts.json", tmp_path / "cache"
    texts.write_text(json.dumps(conversations))
    generator = random.Random(0)

    def shards():
        return {path: path.read_bytes() for path in cache.glob("*/*.safetensors")}

    for _ in range(3):
        before = shards()
        run = start_code(code, ROOT, checkpoint, texts, cache)
        enough = len(before) + generator.randrange(1, 9)
        while run.running() and len(shards()) < enough:
            time.sleep(0.001)
        run.kill()
        assert before.items() <= shards().items()
    done = sum(len(lore.files.load_tensors(path)[0]["embeddings"]) for path in shards())
    assert done >= 8 * 3
    embeddings = embed_conversations(conversations, *reward_model, cache_dir=cache, shard_size=8)
    assert largest_error(embeddings, one_at_a_time(conversations, *reward_model)) < 1e-5
    assert before.items() <= shards().items()  # none was made again


# ---- Several processes


@pytest.fixture
def as_first_of_two_processes(monkeypatch):
    """This process takes itself for the first of two, of which the other one makes no shard."""
    monkeypatch.setattr(lore.embedding, "process_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)


def test_without_a_folder_each_process_embeds_all(reward_model, as_first_of_two_processes):
    conversations = ragged_conversations(3)
    embeddings = embed_conversations(conversations, *reward_model)
    assert largest_error(embeddings, one_at_a_time(conversations, *reward_model)) < 1e-5


def test_embeddings_that_another_process_did_not_make_are_missed(
    reward_model, tmp_path, monkeypatch, as_first_of_two_processes
):
    conversations = ragged_conversations()
    distinct, _ = group_equal(conversations)
    share_of_the_other = list(tokenize_to_bytes(distinct[1::2], reward_model[1]))

    def all_gather_object(shares, own_share):
        shares[:] = [own_share, share_of_the_other]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    options = dict(cache_dir=tmp_path, shard_size=4)
    with input_error(str(tmp_path), "other processes"):
        embed_conversations(conversations, *reward_model, **options)
    monkeypatch.undo()  # one process alone completes what is there
    embeddings = embed_conversations(conversations, *reward_model, **options)
    assert largest_error(embeddings, one_at_a_time(conversations, *reward_model)) < 1e-5


# ---- The trial, on models that attend in different ways


SMALL = dict(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)
LLAMA = dict(SMALL, intermediate_size=48, num_key_value_heads=1, max_position_embeddings=512)
GEMMA = dict(LLAMA, head_dim=16, sliding_window=400)
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28
)
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
SHORT_WINDOW = "Mistral, its window shorter than the text"
BATCH_DEPENDENT_ROPE = "Phi3, rope that depends on the batch"
ARCHITECTURES = {  # name -> its configuration and the batching that is right for it, None for any
    "Llama": (LLAMA, "shared"),
    SHORT_WINDOW: (dict(LLAMA, sliding_window=8), "rows"),
    "Mistral, its window longer": (dict(LLAMA, sliding_window=400), "shared"),
    "Gemma2, soft caps": (dict(GEMMA, attn_logit_softcapping=0.5), "rows"),
    "Gemma3, settings nested under text_config": (
        dict(text_config=GEMMA, vision_config=VISION),
        "shared",
    ),
    BATCH_DEPENDENT_ROPE: (
        dict(LLAMA, original_max_position_embeddings=40, rope_scaling=LONGROPE),
        "alone",
    ),
    "Phi3, the same, with a bound among the short": (
        dict(LLAMA, original_max_position_embeddings=36, rope_scaling=LONGROPE),
        "alone",
    ),
    "Jamba, recurrent": (
        dict(
            LLAMA,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            mamba_d_state=4,
            mamba_d_conv=2,
            use_mamba_kernels=False,
        ),
        "rows",
    ),
    "Qwen3Next, linear attention": (
        dict(
            LLAMA,
            head_dim=16,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        "rows",
    ),
    "GPTNeo, local attention": (
        dict(
            vocab_size=300,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            window_size=8,
            attention_types=[[["global", "local"], 1]],
        ),
        "rows",
    ),
    "Bloom, ALiBi and no limit": (
        dict(vocab_size=300, hidden_size=32, n_layer=2, n_head=2),
        "rows",
    ),
    "Falcon, ALiBi": (dict(SMALL, alibi=True, multi_query=False, parallel_attn=False), "rows"),
    "GPT2": (dict(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=512), "shared"),
    "OPT, states of another width": (
        dict(
            SMALL,
            ffn_dim=48,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
            max_position_embeddings=512,
        ),
        None,
    ),
}


class NumberTokenizer:
    """A tokenizer of conversations that are numbers of prepared lists of token ids."""

    chat_template = "numbers"

    def __init__(self, sequences):
        self.sequences = sequences

    def apply_chat_template(self, conversation, **options):
        return conversation[-1]["content"]

    def __call__(self, texts, **options):
        return {"input_ids": [self.sequences[int(text)] for text in texts]}

    def conversations(self):
        return [conversation("the same", str(n)) for n in range(len(self.sequences))]


def answers_behind_prompts(prompt_lengths=(40, 25, 3), answer_lengths=(5, 9, 3, 14), seed=0):
    """A tokenizer of random prompts, each with random answers behind it."""
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(3, 300, size=n).tolist() for n in prompt_lengths]
    return NumberTokenizer(
        [
            prompt + generator.integers(3, 300, size=n).tolist()
            for prompt in prompts
            for n in answer_lengths
        ]
    )


def save_random_model(folder, name, settings, model_class=AutoModelForSequenceClassification):
    """Save a model of an architecture, the first word of `name`, and return its folder."""
    config_class = getattr(transformers, f"{name.split(',')[0]}Config", None)
    if config_class is None:
        pytest.skip("not in this version of transformers")
    torch.manual_seed(0)
    config = config_class(**settings)
    config.num_labels = 1
    model = model_class.from_config(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return folder


def load_backbone(folder, dtype=None):
    """The backbone of a checkpoint that has no tokenizer, as load_reward_model gives it."""
    return load_reward_model(folder, "cpu", dtype=dtype, tokenizer=NumberTokenizer([]))[0]


def random_model(folder, name, settings=None, dtype=None):
    """The backbone of a random model of an architecture, by default as in ARCHITECTURES."""
    settings = settings or ARCHITECTURES[name][0]
    return load_backbone(save_random_model(folder, name, settings), dtype)


def states_one_by_one(model, sequences):
    with torch.no_grad():
        states = [model(input_ids=torch.tensor([ids])).last_hidden_state for ids in sequences]
    return torch.cat([state[:, -1] for state in states])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_models_states_come_out_as_one_by_one_however_it_attends(name, tmp_path, capsys):
    model = random_model(tmp_path, name)
    tokenizer = answers_behind_prompts()
    embeddings, record = embed_with_record(
        tokenizer.conversations(), model, tokenizer, token_budget=300
    )
    expected = states_one_by_one(model, tokenizer.sequences)
    assert expected.std() > 0.1
    assert largest_error(embeddings, expected) < 1e-5
    assert ARCHITECTURES[name][1] in (record["batching"], None)
    assert record["score_difference"] < 1e-5
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == (0 if record["batching"] == "shared" else 1)


def relative_errors(found, expected):
    found, expected = found.float(), expected.float()
    return (found - expected).norm(dim=1) / found.norm(dim=1)


def test_short_answers_show_what_a_recurrent_model_remembers_of_others(tmp_path):
    """The few that share a prompt are short behind it; all others are long, and so forget what was
    before them in the row."""
    settings = dict(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        num_heads=8,
        head_dim=8,
        n_groups=1,
    )
    folder = save_random_model(tmp_path, "Mamba2", settings, transformers.AutoModel)
    model = load_backbone(folder, torch.bfloat16)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 300, size=n).tolist() for n in range(60, 400, 20)]
    short_answers = [prompts[-2] + [answer] for answer in range(3, 9)]
    tokenizer = NumberTokenizer(prompts + short_answers)
    embeddings, record = embed_with_record(tokenizer.conversations(), model, tokenizer)
    expected = states_one_by_one(model, tokenizer.sequences)
    assert record["batching"] == "rows"
    assert relative_errors(embeddings, expected).max() < 0.1


def test_in_bfloat16_a_window_that_the_text_just_exceeds_is_noticed(tmp_path):
    tokenizer = answers_behind_prompts((100, 90, 3))
    model = random_model(tmp_path, "Mistral", dict(LLAMA, sliding_window=104), torch.bfloat16)
    embeddings = embed_conversations(tokenizer.conversations(), model, tokenizer)
    expected = states_one_by_one(model, tokenizer.sequences)
    assert relative_errors(embeddings, expected).max() < 0.03


def test_a_config_that_takes_no_empty_pad_token_is_left_as_it_was(tmp_path):
    settings = dict(
        LLAMA,
        num_attention_heads=2,
        local_attention=16,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    del settings["num_key_value_heads"]
    model = random_model(tmp_path, "ModernBertDecoder", settings)
    tokenizer = answers_behind_prompts()
    embeddings = embed_conversations(tokenizer.conversations(), model, tokenizer)
    assert largest_error(embeddings, states_one_by_one(model, tokenizer.sequences)) < 1e-5
    assert model.config.pad_token_id == 0


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_trial_that_fails_leaves_the_model_as_it_was(checkpoint, monkeypatch, error):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    conversations = ragged_conversations(2)
    forward, config = model.forward, model.config.to_dict()

    def out_of_memory(*arguments, **options):
        raise error

    model.forward = out_of_memory
    with pytest.raises(type(error)):
        embed_conversations(conversations, model, tokenizer)
    model.forward = forward
    assert model.config.to_dict() == config
    assert not model._forward_hooks

    # In the rows of the trial: no reason to take each conversation alone from then on.
    monkeypatch.setattr(lore.batching, "forward_last_states", out_of_memory)
    with pytest.raises(type(error)):
        embed_conversations(conversations, model, tokenizer)
    monkeypatch.undo()
    _, record = embed_with_record(conversations, model, tokenizer)
    assert record["batching"] == "shared"


def test_a_trial_on_one_conversation_is_right_for_those_to_come(tmp_path):
    model = random_model(tmp_path, SHORT_WINDOW)
    tokenizer = answers_behind_prompts()
    conversations = tokenizer.conversations()
    embed_conversations(conversations[3:4], model, tokenizer)
    embeddings = embed_conversations(conversations, model, tokenizer)
    assert largest_error(embeddings, states_one_by_one(model, tokenizer.sequences)) < 1e-5


def test_a_trial_of_long_texts_is_made_again_for_short_ones_among_them(tmp_path):
    model = random_model(tmp_path, BATCH_DEPENDENT_ROPE)
    tokenizer = answers_behind_prompts((60, 50, 3))
    conversations = tokenizer.conversations()
    embed_conversations(conversations[:8], model, tokenizer)
    embeddings = embed_conversations(conversations, model, tokenizer)
    assert largest_error(embeddings, states_one_by_one(model, tokenizer.sequences)) < 1e-5


def test_a_trial_is_made_once_a_cache_and_again_for_longer_texts(
    reward_model, checkpoint, tmp_path, monkeypatch
):
    choose_batching = lore.batching_trial.choose_batching
    trials = []

    def counted(model, sequences):
        trials.append(len(sequences))
        return choose_batching(model, sequences)

    monkeypatch.setattr(lore.batching_trial, "choose_batching", counted)
    longer = conversation("a longer one " * 99, "yes")
    conversations = ragged_conversations(4)
    _, tokenizer = reward_model
    for some in (conversations, conversations, conversations[1:], [*conversations, longer]):
        model, _ = load_reward_model(str(checkpoint), device="cpu")
        embed_conversations(some, model, tokenizer, cache_dir=tmp_path)
        embed_conversations(some[:1], model, tokenizer, cache_dir=tmp_path)
    assert len(trials) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"batching": "shared"}',
        '{"batching',
        "other",
        '{"batching": "shared", "shortest": 1, "longest": "99"}',
        '{"batching": "shared", "shortest": null, "longest": 99}',
        '{"batching": ["shared"], "shortest": 1, "longest": 99}',
        '{"batching": "shared", "shortest": 1, "longest": 99, "score_difference": "0"}',
        '["batching", "shortest", "longest"]',
        "[" * 100_000,
    ],
)
def test_a_damaged_file_of_the_trial_is_made_again(reward_model, tmp_path, content):
    model, _ = reward_model
    conversations = ragged_conversations(3)
    embeddings = embed_conversations(conversations, *reward_model, cache_dir=tmp_path)
    (path,) = tmp_path.glob(f"*/{lore.batching_trial.TRIAL_FILE}")
    whole = path.read_text()
    path.write_text(whole.replace("shared", "none known") if content == "other" else content)
    lore.batching_trial.KEPT_TRIALS.pop(model)  # as in another process
    again = embed_conversations(conversations, *reward_model, cache_dir=tmp_path)
    assert torch.equal(again, embeddings)
    assert json.loads(path.read_text()).keys() == json.loads(whole).keys()
    assert json.loads(path.read_text())["batching"] == "shared"


def test_a_model_with_another_score_than_phi_times_head_is_refused(checkpoint, monkeypatch):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    forward = transformers.LlamaForSequenceClassification.forward

    def biased(*arguments, **options):
        output = forward(*arguments, **options)
        output.logits = output.logits + 1
        return output

    monkeypatch.setattr(transformers.LlamaForSequenceClassification, "forward", biased)
    with input_error(str(checkpoint), "score", "head"):
        embed_conversations(ragged_conversations(2), model, tokenizer)


def test_a_pad_token_that_ends_the_template_leaves_phi_the_last_tokens(
    checkpoint, reward_model, tmp_path, capsys
):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["pad_token_id"] = reward_model[1].convert_tokens_to_ids("<|eot_id|>")
    (folder / "config.json").write_text(json.dumps(config))
    conversations = ragged_conversations(3)
    embeddings = embed_conversations(conversations, *load_reward_model(str(folder), device="cpu"))
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == 1
    assert "pad token" in notes[0]
    assert largest_error(embeddings, one_at_a_time(conversations, *reward_model)) < 1e-5


def test_embeddings_come_with_a_record_of_what_they_depend_on(reward_model):
    conversations = ragged_conversations(2)
    options = dict(token_budget=77)
    embeddings, record = embed_with_record(conversations, *reward_model, **options)
    assert torch.equal(embeddings, embed_conversations(conversations, *reward_model, **options))
    assert json.loads(json.dumps(record)) == record
    expected = {
        "device": "cpu",
        "torch": torch.__version__,
        "transformers": ".".join(transformers.__version__.split(".")[:2]),
        "attention": "sdpa",
        "dtype": "torch.float32",
        "token_budget": 77,
        "date": "2024-07-26",
        "batching": "shared",
    }
    assert record.items() >= expected.items()
    assert 0 <= record["shared_difference"] < 1e-5
    assert 0 < record["rows_difference"] < 1e-5


# ---- Templates and tokens


def ids_of_whole_text(messages, tokenizer):
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_are_there_once(reward_model):
    _, tokenizer = reward_model
    (ids,) = tokenize_conversations([conversation("hello", "there")], tokenizer)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|begin_of_text|>")) == 1
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_sequences_sort_as_lists_of_their_ids():
    generator = np.random.default_rng(0)
    values = [0, 1, 255, 256, 65535, 65536, 2**31, 2**32 - 1]
    lists = [generator.choice(values, generator.integers(0, 5)).tolist() for _ in range(300)]
    assert sorted(map(to_sequence, lists)) == [to_sequence(ids) for ids in sorted(lists)]


def test_equal_conversations_are_formatted_and_tokenized_once(reward_model, monkeypatch):
    model, tokenizer = reward_model
    distinct = [conversation(f"hello {n}", "there") for n in range(7)]
    distinct.append([{**message, "role": "user"} for message in distinct[0]])  # roles count
    conversations = copy.deepcopy(distinct * 40)
    template = tokenizer.apply_chat_template
    formatted = []

    def recorded(messages, **options):
        formatted.append(messages)
        return template(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", recorded)
    embeddings = embed_conversations(conversations, model, tokenizer)
    assert formatted == distinct
    monkeypatch.undo()
    assert largest_error(embeddings[:8], one_at_a_time(distinct, model, tokenizer)) < 1e-5
    assert torch.equal(embeddings, embeddings[:8].repeat(40, 1))


def test_messages_that_hold_lists_are_embedded_as_well(reward_model):
    plain = conversation("hello", "there")
    with_list = [{**message, "tool_calls": []} for message in plain]
    embeddings = embed_conversations([with_list, plain, with_list], *reward_model)
    expected = one_at_a_time([plain], *reward_model)
    assert largest_error(embeddings, expected.expand(3, -1)) < 1e-5


def test_pieces_between_special_tokens_give_the_tokens_of_the_whole_text(reward_model):
    _, tokenizer = reward_model
    texts = [
        "",
        " ",
        "x",
        "  two  spaces\n\n",
        "a <|eot_id|> in the text",
        "<|eot_id|><|pad|>",
        "été",
        "123",
    ]
    conversations = [conversation(a, b) for a in texts for b in texts] * 5
    assert len(conversations) > lore.conversations.TEXTS_AT_ONCE
    found = tokenize_conversations(conversations, tokenizer)
    assert found == [ids_of_whole_text(messages, tokenizer) for messages in conversations]


def test_a_tokenizer_that_sees_beyond_special_tokens_gets_whole_texts():
    class LengthTokenizer:
        chat_template = ""
        added_tokens_decoder = {0: transformers.AddedToken("|")}

        def apply_chat_template(self, conversation, **options):
            return "|".join(message["content"] for message in conversation)

        def __call__(self, texts, **options):
            return {"input_ids": [[len(text)] for text in texts]}

    conversations = [conversation("hello", "you"), conversation("a", "b")]
    assert tokenize_conversations(conversations, LengthTokenizer()) == [[9], [3]]


def test_ids_are_those_of_whole_texts_with_a_slow_tokenizer_and_one_saved_with_truncation(
    checkpoint,
):
    _, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    conversations = [conversation(f"hello {n % 3}", "there it is " * 9) for n in range(300)]
    expected = [ids_of_whole_text(messages, tokenizer) for messages in conversations]

    class SlowTokenizer:
        chat_template = tokenizer.chat_template
        added_tokens_decoder = tokenizer.added_tokens_decoder
        apply_chat_template = staticmethod(tokenizer.apply_chat_template)

        def __call__(self, texts, **options):
            assert texts
            return tokenizer(texts, **options)

    assert tokenize_conversations(conversations, SlowTokenizer()) == expected
    tokenizer.backend_tokenizer.enable_truncation(8)
    assert tokenize_conversations(conversations, tokenizer) == expected


@pytest.mark.parametrize(
    "flag, text", [("single_word", "xfoo y"), ("lstrip", "a   foo b"), ("rstrip", "a foo   b")]
)
def test_a_token_that_takes_in_what_is_beside_it_is_met_late_as_well(checkpoint, flag, text):
    _, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    tokenizer.add_tokens([transformers.AddedToken("foo", **{flag: True})])
    late = conversation(text, "ok")
    before = [conversation(f"q{n}", "ok") for n in range(lore.conversations.TEXTS_AT_ONCE)]
    found = tokenize_conversations([*before, late], tokenizer)
    assert found[-1] == ids_of_whole_text(late, tokenizer)


def test_a_template_gets_a_fixed_date(checkpoint):
    _, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    (expected,) = tokenize_conversations([conversation("26 Jul 2024, 2024-07-26", "x")], tokenizer)
    dates = "strftime_now('%d %b %Y') + ', ' + strftime_now(\"%Y-%m-%d\")"
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", dates, 1)
    (dated,) = tokenize_conversations([conversation("x", "y")], tokenizer)
    assert tokenizer.decode(dated).count("26 Jul 2024, 2024-07-26") == 2
    assert expected[:8] == dated[:8]


@pytest.mark.parametrize(
    "call", ["strftime_now( '%d %b %Y' )", 'strftime_now ("%d %b %Y")'], ids=["inside", "before"]
)
def test_white_space_in_a_templates_call_for_the_date_changes_nothing(checkpoint, call):
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = "{{ " + call + " }}"
    assert dated_template(tokenizer) == "{{ '26 Jul 2024' }}"


@pytest.mark.parametrize("call", ["strftime_now(f)", "strftime_now('%d ' + '%Y')"])
def test_a_template_that_computes_the_format_of_the_date_is_refused(checkpoint, call):
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = "{% set f = '%d %b %Y' %}{{ " + call + " }}"
    with input_error("chat template", "depend on the day", "strftime_now"):
        tokenize_conversations([conversation("x", "y")], tokenizer)


def test_a_template_that_asks_whether_there_is_a_date_is_taken(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    expected = tokenize_conversations([conversation("x", "y")], tokenizer)
    tokenizer.chat_template = "{% if strftime_now is defined %}{% endif %}" + (
        tokenizer.chat_template
    )
    assert tokenize_conversations([conversation("x", "y")], tokenizer) == expected


def test_of_several_templates_the_one_named_default_is_taken(checkpoint):
    _, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    conversations = [conversation("x", "y")]
    expected = tokenize_conversations(conversations, tokenizer)
    template = tokenizer.chat_template
    tokenizer.chat_template = {"default": template, "tools": "{{ 1 }}"}
    assert tokenize_conversations(conversations, tokenizer) == expected
    tokenizer.chat_template = {"tools": template}
    with input_error("tools", "default"):
        tokenize_conversations(conversations, tokenizer)


# ---- Which checkpoint it is


def test_identity_is_of_the_contents_and_says_which_part_differs(checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    known = model_identity("model")
    assert known.keys() == {"weights", "tokenizer", "backbone"}
    assert known == model_identity(folder) == model_identity(str(checkpoint))

    names = ("chat_template.jinja", "tokenizer_config.json")
    template = next(folder / name for name in names if (folder / name).exists())
    template.write_text(template.read_text().replace("assistant", "critic"))
    edited = model_identity("model")
    assert edited["weights"] == known["weights"]
    assert edited["tokenizer"] != known["tokenizer"]

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][7] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    retrained = model_identity("model")
    assert retrained["weights"] != known["weights"]
    assert retrained["tokenizer"] == edited["tokenizer"]


def test_digests_of_files_are_remembered_until_the_files_change(checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    weights = folder / "model.safetensors"
    digest_of = lore.files.digest_of
    digested = []

    def recorded(content):
        digested.append(content)
        return digest_of(content)

    monkeypatch.setattr(lore.reward_model, "digest_of", recorded)
    first = model_identity(folder, tmp_path)
    assert weights in digested
    digested.clear()
    monkeypatch.setattr(lore.reward_model, "_known_digests", {})  # as in another process
    assert model_identity(folder, tmp_path) == first
    assert weights not in digested
    os.utime(weights)
    assert model_identity(folder, tmp_path) == first
    assert weights in digested


def test_a_folder_that_is_called_as_the_hubs_is_known_by_its_contents(checkpoint, tmp_path):
    folder = tmp_path / "blobs"
    shutil.copytree(checkpoint, folder)
    assert model_identity(folder) == model_identity(checkpoint)


def test_a_download_in_the_hubs_cache_has_the_identity_of_a_local_copy(checkpoint, tmp_path):
    """The hub names the blob of a large file by its SHA-256, that of a small one as git does."""
    blobs = tmp_path / "blobs"
    snapshot = tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in checkpoint.iterdir():
        content = path.read_bytes()
        blob = blobs / hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if path.suffix == ".safetensors":
            blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(blob)
    assert model_identity(snapshot) == model_identity(checkpoint)


def test_a_checkpoint_in_the_hubs_cache_is_found_offline_and_named_by_its_blobs(
    checkpoint, tmp_path
):
    repository = tmp_path / "hub" / "models--some--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        shutil.copy(path, repository / "blobs" / f"{number:064}")
        (snapshot / path.name).symlink_to(repository / "blobs" / f"{number:064}")
    code = """if True:
        import sys
        from pathlib import Path
        from lore.embedding import embed_distinct
        from lore.files import load_json
        from lore.reward_model import load_reward_head, load_reward_model, model_identity
        from utils import InputError
        model, tokenizer = load_reward_model("some/model", device="cpu")
        chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
        model_identity("some/model", sys.argv[1])
        states, _, record = embed_distinct([chat], model, tokenizer, cache_dir=sys.argv[1])
        reward = float(states.float() @ load_reward_head("some/model"))
        digests = load_json(Path(sys.argv[1], "digests.json"))
        print(reward, record["score_difference"], digests)
        try:
            load_reward_head("some/other")
        except InputError as error:
            print(error)"""
    status, out, err = outcome(
        fresh_process(
            code,
            tmp_path,
            HF_HUB_CACHE=str(tmp_path / "hub"),
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS="1",
        )
    )
    assert status == 0, err
    found, missing = out.splitlines()
    reward, score_difference, *_ = found.split()
    whole = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    _, tokenizer = load_reward_model(str(checkpoint))
    ids = torch.tensor(tokenize_conversations([conversation("hello", "there")], tokenizer))
    assert float(reward) == pytest.approx(whole(ids).logits.item(), abs=1e-4)
    assert float(score_difference) < 1e-4
    assert "0" * 63 in found
    assert "some/other" in missing
