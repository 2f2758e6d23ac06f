"""The reward model, its head, and embeddings against one forward pass per conversation."""

import json
import math
import os
import random
import shutil
import time

import numpy as np
import pytest
import torch
import transformers
from demos import build_model, start_code
from helpers import ROOT, fresh_process, input_error, outcome
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import lore.embedding
import lore.files
import lore.reward_model
from lore.conversations import tokenize_conversations
from lore.embedding import embed_conversations
from lore.reward_model import (
    load_released_reference,
    load_reward_head,
    load_reward_model,
    model_identity,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "standin"
    build_model(folder, layers=3)
    return folder


@pytest.fixture(scope="module")
def reward_model(checkpoint):
    return load_reward_model(str(checkpoint), device="cpu")


def conversation(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def ragged_conversations(prompts=12, seed=0):
    """Prompts of 1 to 90 words with 1 to 5 responses each, some of them beginnings of one another, some repeated."""
    chance = np.random.default_rng(seed)
    words = "my sister never pays me back and it is not funny any more 17 times \u00e9t\u00e9 \U0001f600".split()

    def text(most):
        return " ".join(chance.choice(words, chance.integers(1, most)))

    found = [
        conversation(prompt, text(40))
        for prompt in (text(90) for _ in range(prompts))
        for _ in range(chance.integers(1, 6))
    ]
    found += [
        conversation(found[0][0]["content"], found[0][1]["content"] + " indeed"),
        found[3],
        found[3],
    ]
    found.append(
        [
            *found[1],
            {"role": "user", "content": "why?"},
            {"role": "assistant", "content": "because"},
        ]
    )
    return found


def one_at_a_time(conversations, model, tokenizer):
    """The released way: template, tokenize, one forward pass each, the last state of the last token."""
    states = []
    for messages in conversations:
        ids = tokenizer(
            tokenizer.apply_chat_template(messages, tokenize=False),
            add_special_tokens=False,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            states.append(model(ids).last_hidden_state[0, -1])
    return torch.stack(states)


@pytest.mark.parametrize("token_budget", [1, 300, 100000])
def test_batched_embeddings_equal_one_forward_each(reward_model, token_budget):
    conversations = ragged_conversations()
    embeddings = embed_conversations(conversations, *reward_model, token_budget=token_budget)
    expected = one_at_a_time(conversations, *reward_model)
    assert expected.std() > 0.1
    assert (embeddings - expected).abs().max() < 1e-5


def test_bfloat16_embeddings_point_the_same_way(checkpoint):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu", dtype=torch.bfloat16)
    conversations = ragged_conversations(6)
    embeddings = embed_conversations(conversations, model, tokenizer)
    assert embeddings.dtype == torch.bfloat16
    expected = one_at_a_time(conversations, model, tokenizer).float()
    assert torch.nn.functional.cosine_similarity(embeddings.float(), expected).min() > 0.999


def tokens_through(model, call):
    """How many tokens, padding among them, go through the model while `call()` runs."""
    seen = []
    table = model.get_input_embeddings()
    hook = table.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].numel()))
    try:
        call()
    finally:
        hook.remove()
    return sum(seen)


def prefixes(sequences):
    """How many tokens are left when every token behind the same tokens is counted once."""
    return len({tuple(ids[:end]) for ids in sequences for end in range(1, len(ids) + 1)})


@pytest.mark.parametrize(
    "attention, way", [("eager", "rows"), ("flash_attention_2", "shared"), ("sdpa", "shared")]
)
def test_other_attention_implementations_give_the_same(checkpoint, reward_model, attention, way):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu", attention=attention)
    conversations, about = ragged_conversations(), {}
    embeddings = embed_conversations(conversations, model, tokenizer, about=about)
    assert (embeddings - one_at_a_time(conversations, *reward_model)).abs().max() < 1e-5
    assert about["way"] == way


@pytest.mark.parametrize("budget", [None, 400])
def test_what_conversations_begin_with_is_computed_once(reward_model, budget):
    """Answers behind one post, and turns that repeat the dialogue before them, in batches that hold a family."""
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
    conversations += [
        dialogue[:2],
        dialogue[:4],
        dialogue,
        [*dialogue[:5], {"role": "assistant", "content": "no"}],
    ]
    embed_conversations(conversations, model, tokenizer)  # the proof, once
    computed = tokens_through(
        model, lambda: embed_conversations(conversations, model, tokenizer, token_budget=budget)
    )
    sequences = tokenize_conversations(conversations, tokenizer)
    assert (
        computed
        <= (1 if budget is None else 1.05) * prefixes(sequences)
        < sum(map(len, sequences)) / 2
    )


OUT_OF_MEMORY = torch.cuda.OutOfMemoryError(), RuntimeError("error: CUBLAS_STATUS_ALLOC_FAILED")


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_beyond_the_gpus_memory_is_halved_and_stays_so(reward_model, monkeypatch, error):
    forward, failed, done = lore.embedding.forward_last_states, [], []

    def small_gpu(model, ids, shared=None):
        size = sum(map(len, ids))
        if len(ids) > 1 and size > 250:
            failed.append(len(done))
            raise error
        done.append(size)
        return forward(model, ids, shared)

    conversations = ragged_conversations()
    expected = embed_conversations(conversations, *reward_model)
    monkeypatch.setattr(lore.embedding, "forward_last_states", small_gpu)
    embeddings = embed_conversations(conversations, *reward_model, shard_size=4)
    assert 0 < len(failed) < 8 and len(done) > 8 and max(failed) < len(done) / 2
    assert (embeddings - expected).abs().max() < 1e-5
    monkeypatch.setattr(
        lore.embedding, "forward_last_states", lambda *arguments: forward(None)
    )  # an error of another kind is not hidden
    with pytest.raises(TypeError):
        embed_conversations(conversations, *reward_model)


def test_special_tokens_stand_once(reward_model):
    _, tokenizer = reward_model
    (ids,) = tokenize_conversations([conversation("hello", "there")], tokenizer)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|begin_of_text|>")) == 1
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_reference_head_is_the_score_layer(checkpoint, reward_model):
    model, tokenizer = reward_model
    whole = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1)
    ids = torch.tensor(tokenize_conversations([conversation("hello", "there")], tokenizer))
    with torch.no_grad():
        states = whole.model(ids).last_hidden_state[:, -1]
        score = whole.score(states)
    head = load_reward_head(str(checkpoint))
    assert head.dtype == torch.float32 and head.shape == (model.config.hidden_size, 1)
    torch.testing.assert_close(states @ head, score)


def test_head_is_found_in_a_sharded_checkpoint(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({"score.weight": tensors.pop("score.weight")}, tmp_path / "b.safetensors")
    save_file(tensors, tmp_path / "a.safetensors")
    weight_map = {name: "a.safetensors" for name in tensors} | {"score.weight": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "a.safetensors").unlink()  # only the shard with the head is read
    assert torch.equal(load_reward_head(str(tmp_path)), load_reward_head(str(checkpoint)))


def test_released_reference_is_a_column_of_the_last_linear_layer(checkpoint, reward_model):
    last = [layer for layer in reward_model[0].modules() if isinstance(layer, torch.nn.Linear)][-1]
    found = load_released_reference(str(checkpoint))
    assert found.dtype == torch.float32 and torch.equal(found, last.weight[:, :1].float())


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
)
def test_checkpoint_without_exactly_one_scalar_head_is_refused(heads, tmp_path):
    save_file({"norm.weight": torch.zeros(8), **heads}, tmp_path / "model.safetensors")
    with input_error(str(tmp_path), "scalar"):
        load_reward_head(str(tmp_path))


def test_truncated_checkpoint_is_named(checkpoint, tmp_path):
    data = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with input_error("model.safetensors"):
        load_reward_head(str(tmp_path))


def test_model_without_chat_template_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    with input_error("chat template"):
        load_reward_model(str(tmp_path / "model"), device="cpu")


def test_model_in_another_format_than_safetensors_loads(checkpoint, reward_model, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model, _ = load_reward_model(str(folder), device="cpu")
    for found, expected in zip(model.parameters(), reward_model[0].parameters(), strict=True):
        assert torch.equal(found, expected)
    expected = embed_conversations(ragged_conversations(2), *reward_model)
    assert torch.equal(
        embed_conversations(ragged_conversations(2), model, reward_model[1]), expected
    )


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
)
def test_options_that_mean_nothing_are_named(reward_model, options):
    with input_error(*options, str(*options.values())):
        embed_conversations([conversation("hello", "there")], *reward_model, **options)


def test_conversation_longer_than_the_context_is_named(reward_model):
    with input_error("word and word", "tokens"):
        embed_conversations(
            [conversation("hi", "you"), conversation("hi", "word and word " * 9000)], *reward_model
        )
    with input_error("no conversations"):
        embed_conversations([], *reward_model)


def cached(conversations, reward_model, folder, **options):
    """(embeddings, number of conversations that went through the model)."""
    model, tokenizer = reward_model
    states = []
    hook = model.norm.register_forward_hook(lambda layer, inputs, output: states.append(output))
    try:
        embeddings = embed_conversations(
            conversations, model, tokenizer, cache_dir=folder, shard_size=4, **options
        )
    finally:
        hook.remove()
    return embeddings, len(states)


def test_second_call_computes_nothing_and_a_lost_shard_is_made_again(reward_model, tmp_path):
    conversations = ragged_conversations()
    first, forwards = cached(conversations, reward_model, tmp_path)
    again, none = cached(conversations[::-1], reward_model, tmp_path)
    assert forwards > 3 and none == 0 and torch.equal(first, again.flip(0))
    shards = sorted(tmp_path.glob("*/*.safetensors"))
    content = shards[0].read_bytes()
    shards[0].unlink()
    mended, one = cached(conversations, reward_model, tmp_path)
    assert one == 1 and torch.equal(first, mended) and shards[0].read_bytes() == content


def test_new_conversations_reuse_the_cache(reward_model, tmp_path):
    conversations = ragged_conversations()
    cached(conversations[:-8], reward_model, tmp_path)
    embeddings, _ = cached(conversations, reward_model, tmp_path)
    assert (embeddings - one_at_a_time(conversations, *reward_model)).abs().max() < 1e-5


def test_another_template_or_model_does_not_hit_the_cache(reward_model, checkpoint, tmp_path):
    conversations = ragged_conversations(4)
    model, tokenizer = reward_model
    cached(conversations, reward_model, tmp_path)
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template + " "
        assert cached(conversations, reward_model, tmp_path)[1] > 0
    finally:
        tokenizer.chat_template = template
    other, _ = load_reward_model(str(checkpoint), device="cpu")
    other.norm.weight.data[0] += 0.5
    embeddings, forwards = cached(conversations, (other, tokenizer), tmp_path)
    assert forwards > 0
    assert (embeddings - one_at_a_time(conversations, other, tokenizer)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.embed_tokens.weight.data[1:-1].mul_(1.5),
        lambda model: setattr(model.config, "rms_norm_eps", 0.1),
    ],
    ids=["inner values", "settings"],
)
def test_a_retrained_model_does_not_hit_the_cache(reward_model, checkpoint, tmp_path, change):
    conversations = ragged_conversations(2)
    cached(conversations, reward_model, tmp_path)
    other, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    change(other)
    assert cached(conversations, (other, tokenizer), tmp_path)[1] > 0
    assert cached(conversations, load_reward_model(str(checkpoint), device="cpu"), tmp_path)[1] == 0


def test_damaged_shard_is_made_again(reward_model, tmp_path):
    conversations = ragged_conversations(4)
    embeddings, _ = cached(conversations, reward_model, tmp_path)
    shard = next(tmp_path.glob("*/*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    again, forwards = cached(conversations, reward_model, tmp_path)
    assert forwards > 0 and torch.equal(again, embeddings)
    assert shard.read_bytes() == whole


@pytest.mark.parametrize(
    "spoilt",
    [{"embeddings": torch.full((99, 64), math.nan)}, {"states": torch.ones(99, 64)}],
    ids=["NaN", "other tensors"],
)
def test_shard_without_usable_embeddings_is_made_again(reward_model, tmp_path, spoilt):
    conversations = ragged_conversations(4)
    embeddings, _ = cached(conversations, reward_model, tmp_path)
    shard = next(tmp_path.glob("*/*.safetensors"))
    whole = shard.read_bytes()
    count = len(lore.files.load_tensors(shard)[0]["embeddings"])
    lore.files.save_tensors(shard, {name: tensor[:count] for name, tensor in spoilt.items()})
    again, forwards = cached(conversations, reward_model, tmp_path)
    assert forwards == 1 and torch.equal(again, embeddings) and shard.read_bytes() == whole


def test_conversation_whose_embedding_is_not_finite_is_named(checkpoint, tmp_path):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    model.norm.weight.data[3] = math.inf
    conversations = ragged_conversations(2)
    with input_error("NaN or infinite", repr(conversations[0][0]["content"][:60])[1:-1]):
        embed_conversations(conversations[:1], model, tokenizer, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_repeated_conversations_have_equal_rows_in_their_places(reward_model):
    conversations = ragged_conversations(3)
    order = [0, 1, 0, 2, 2, 1, 0]
    model, tokenizer = reward_model
    embeddings = lore.embedding.embed_conversations(
        [conversations[i] for i in order], model, tokenizer
    )
    assert (embeddings - one_at_a_time(conversations, model, tokenizer)[order]).abs().max() < 1e-5


def test_a_checkpoint_is_loaded_when_all_is_tokenized(checkpoint, reward_model, monkeypatch):
    loaded, load, conversations = [], lore.reward_model.load_reward_model, ragged_conversations(3)
    monkeypatch.setattr(
        lore.embedding, "load_reward_model", lambda name: loaded.append(name) or load(name, "cpu")
    )
    with input_error("half a \\ud83d"):
        embed_conversations([*conversations, conversation("half a \ud83d", "yes")], str(checkpoint))
    assert not loaded
    expected = one_at_a_time(conversations, *reward_model)
    for model in (
        str(checkpoint),
        checkpoint,
        reward_model[0],
    ):  # a name, a path, a model that knows its tokenizer
        assert (embed_conversations(conversations, model) - expected).abs().max() < 1e-5
    assert loaded == [str(checkpoint), checkpoint]


def test_text_that_is_no_unicode_is_named(reward_model):
    model, tokenizer = reward_model
    with input_error("half a \\ud83d"):
        lore.embedding.embed_conversations(
            [[{"role": "user", "content": "half a \ud83d"}]], model, tokenizer
        )


def test_embeddings_that_another_process_did_not_make_are_missed(
    reward_model, tmp_path, monkeypatch
):
    model, tokenizer = reward_model
    twice = [
        one for one in ragged_conversations() for _ in range(2)
    ]  # the other process's share is as this one's
    monkeypatch.setattr(lore.embedding, "process_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda parts, mine: parts.__setitem__(1, mine)
    )
    embeddings = embed_conversations(
        ragged_conversations(3), model, tokenizer
    )  # each process all, without a folder
    assert (
        embeddings - one_at_a_time(ragged_conversations(3), model, tokenizer)
    ).abs().max() < 1e-5
    with input_error(str(tmp_path), "other processes"):
        embed_conversations(twice, model, tokenizer, cache_dir=tmp_path, shard_size=4)
    monkeypatch.undo()  # one process alone completes what is there
    embeddings = embed_conversations(twice, model, tokenizer, cache_dir=tmp_path, shard_size=4)
    assert (embeddings - one_at_a_time(twice, model, tokenizer)).abs().max() < 1e-5


# ---- What a model's own scores say ----------------------------------------------------------------------------------


SMALL = dict(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
)
LLAMA = dict(SMALL, intermediate_size=48, num_key_value_heads=1, max_position_embeddings=512)
GEMMA = dict(LLAMA, head_dim=16, sliding_window=400)
ARCHITECTURES = {  # name -> its configuration and how its states are to be computed
    "Llama": (LLAMA, "shared"),
    "Mistral, its window shorter than the text": (dict(LLAMA, sliding_window=8), "rows"),
    "Mistral, its window longer": (dict(LLAMA, sliding_window=400), "shared"),
    "Gemma2, soft caps": (dict(GEMMA, attn_logit_softcapping=0.5), "rows"),
    "Gemma3, settings nested under text_config": (
        dict(
            text_config=GEMMA,
            vision_config=dict(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
            ),
        ),
        "shared",
    ),
    "Phi3, rope that depends on the batch": (
        dict(
            LLAMA,
            original_max_position_embeddings=40,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
        ),
        "alone",
    ),
    "Phi3, the same, with a bound among the short": (
        dict(
            LLAMA,
            original_max_position_embeddings=36,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
        ),
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


class Numbers:
    """A tokenizer of conversations that are numbers of prepared sequences."""

    chat_template = "numbers"

    def __init__(self, sequences):
        self.sequences = sequences

    def apply_chat_template(self, conversation, **options):
        return conversation[-1]["content"]

    def __call__(self, texts, **options):
        return {"input_ids": [self.sequences[int(text)] for text in texts]}

    def conversations(self):
        return [conversation("the same", str(n)) for n in range(len(self.sequences))]


def answers_behind_prompts(lengths=(40, 25, 3), answers=(5, 9, 3, 14), seed=0):
    chance = np.random.default_rng(seed)
    prompts = [chance.integers(3, 300, size=n).tolist() for n in lengths]
    return Numbers(
        [prompt + chance.integers(3, 300, size=n).tolist() for prompt in prompts for n in answers]
    )


def random_checkpoint(folder, name, settings, weights=AutoModelForSequenceClassification):
    config = getattr(transformers, f"{name.split(',')[0]}Config", None)
    if config is None:
        pytest.skip("not in this version of transformers")
    torch.manual_seed(0)
    config = config(**settings)
    config.num_labels = 1
    model = weights.from_config(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return folder


def loaded(folder, dtype=None):
    """The backbone of a checkpoint that has no tokenizer, as load_reward_model would give it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformers.AutoTokenizer, "from_pretrained", lambda *arguments, **options: Numbers([])
        )
        return load_reward_model(folder, device="cpu", dtype=dtype)[0]


def last_states(model, sequences):
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1] for ids in sequences]
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_models_states_come_out_as_one_by_one_however_it_attends(name, tmp_path, capsys):
    settings, way = ARCHITECTURES[name]
    model, tokenizer, about = (
        loaded(random_checkpoint(tmp_path, name, settings)),
        answers_behind_prompts(),
        {},
    )
    embeddings = embed_conversations(
        tokenizer.conversations(), model, tokenizer, token_budget=300, about=about
    )
    expected = last_states(model, tokenizer.sequences)
    assert expected.std() > 0.1 and (embeddings - expected).abs().max() < 1e-5
    assert way in (about["way"], None) and about["score"] < 1e-5
    assert len(capsys.readouterr().out.splitlines()) == (about["way"] != "shared")


def test_short_answers_show_what_a_recurrent_model_remembers_of_others(tmp_path):
    """Those few that share a prompt are short behind it; all others are long, and forget what was before them."""
    settings = dict(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        num_heads=8,
        head_dim=8,
        n_groups=1,
    )
    model = loaded(
        random_checkpoint(tmp_path, "Mamba2", settings, transformers.AutoModel), torch.bfloat16
    )
    chance = np.random.default_rng(0)
    of = {n: chance.integers(3, 300, size=n).tolist() for n in range(60, 400, 20)}
    tokenizer, about = Numbers([*of.values(), *(of[380] + [answer] for answer in range(3, 9))]), {}
    found = embed_conversations(tokenizer.conversations(), model, tokenizer, about=about).float()
    off = (found - last_states(model, tokenizer.sequences).float()).norm(dim=1) / found.norm(dim=1)
    assert about["way"] == "rows" and off.max() < 0.1


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
    model, tokenizer = (
        loaded(random_checkpoint(tmp_path, "ModernBertDecoder", settings)),
        answers_behind_prompts(),
    )
    found = embed_conversations(tokenizer.conversations(), model, tokenizer)
    assert (
        found - last_states(model, tokenizer.sequences)
    ).abs().max() < 1e-5 and model.config.pad_token_id == 0


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_trial_that_fails_leaves_the_model_as_it_was(checkpoint, monkeypatch, error):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    forward, config = model.forward, model.config.to_dict()

    def full(*arguments, **options):
        raise error

    model.forward = full
    with pytest.raises(type(error)):
        embed_conversations(ragged_conversations(2), model, tokenizer)
    model.forward = forward
    assert model.config.to_dict() == config and not model._forward_hooks
    monkeypatch.setattr(
        lore.embedding, "forward_last_states", full
    )  # of the rows: no reason to take each conversation alone for ever
    with pytest.raises(type(error)):
        embed_conversations(ragged_conversations(2), model, tokenizer)
    monkeypatch.undo()
    embed_conversations(ragged_conversations(2), model, tokenizer, about=(about := {}))
    assert about["way"] == "shared"


def test_one_conversation_proves_sharing_for_those_to_come(tmp_path):
    name = "Mistral, its window shorter than the text"
    model, tokenizer = (
        loaded(random_checkpoint(tmp_path, name, ARCHITECTURES[name][0])),
        answers_behind_prompts(),
    )
    found = [
        embed_conversations(part, model, tokenizer)
        for conversations in [tokenizer.conversations()]
        for part in (conversations[3:4], conversations)
    ]
    assert (found[1] - last_states(model, tokenizer.sequences)).abs().max() < 1e-5


def test_a_proof_is_made_once_a_cache_and_for_longer_texts_again(
    reward_model, checkpoint, tmp_path, monkeypatch
):
    made, proof = [], lore.embedding.choose_batching
    monkeypatch.setattr(
        lore.embedding,
        "choose_batching",
        lambda model, sequences: made.append(1) or proof(model, sequences),
    )
    conversations, tokenizer = (
        [*ragged_conversations(4), conversation("a longer one " * 99, "yes")],
        reward_model[1],
    )
    for some in (conversations[:-1], conversations[:-1], conversations[1:-1], conversations):
        model, _ = load_reward_model(str(checkpoint), device="cpu")
        embed_conversations(some, model, tokenizer, cache_dir=tmp_path)
        embed_conversations(some[:1], model, tokenizer, cache_dir=tmp_path)
    assert len(made) == 2


def test_a_model_whose_own_score_is_another_is_refused(reward_model, monkeypatch, checkpoint):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    forward = transformers.LlamaForSequenceClassification.forward

    def biased(*arguments, **options):
        found = forward(*arguments, **options)
        found.logits = found.logits + 1
        return found

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
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        "pad token" in line
        and (embeddings - one_at_a_time(conversations, *reward_model)).abs().max() < 1e-5
    )


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("layers.1.mlp.up", "elsewhere"),
    ],
)
def test_a_backbone_whose_weights_are_not_all_there_is_refused(checkpoint, tmp_path, rename):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tensors = {
        rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with input_error(str(folder), "weights"):
        load_reward_model(str(folder), device="cpu")


def test_embeddings_record_what_they_depend_on(reward_model):
    about = {}
    embed_conversations(ragged_conversations(2), *reward_model, token_budget=77, about=about)
    assert json.loads(json.dumps(about)) == about
    assert (
        about.items()
        >= {
            "device": "cpu",
            "torch": torch.__version__,
            "attention": "sdpa",
            "dtype": "torch.float32",
            "token_budget": 77,
            "date": "2024-07-26",
            "way": "shared",
        }.items()
    )
    assert 0 <= about["shared"] < 1e-5 and 0 < about["rows"] < 1e-5


# ---- Templates and tokens -------------------------------------------------------------------------------------------


def test_pieces_between_special_tokens_give_the_tokens_of_the_whole_text(reward_model):
    tokenizer = reward_model[1]
    texts = [
        "",
        " ",
        "x",
        "  two  spaces\n\n",
        "a <|eot_id|> in the text",
        "<|eot_id|><|pad|>",
        "\u00e9t\u00e9",
        "123",
    ]
    conversations = [conversation(a, b) for a in texts for b in texts] * 5  # more than a chunk
    found = tokenize_conversations(conversations, tokenizer)
    for ids, messages in zip(found, conversations, strict=True):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert ids == tokenizer(text, add_special_tokens=False).input_ids


def test_a_tokenizer_that_sees_beyond_special_tokens_gets_whole_texts():
    class Lengths:
        chat_template, added_tokens_decoder = "", {0: transformers.AddedToken("|")}

        def apply_chat_template(self, conversation, **options):
            return "|".join(message["content"] for message in conversation)

        def __call__(self, texts, **options):
            return {"input_ids": [[len(text)] for text in texts]}

    assert tokenize_conversations(
        [conversation("hello", "you"), conversation("a", "b")], Lengths()
    ) == [[9], [3]]


def test_ids_are_those_of_whole_texts_with_a_slow_tokenizer_and_one_saved_with_truncation(
    checkpoint,
):
    _, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    conversations = [conversation(f"hello {n % 3}", "there it is " * 9) for n in range(300)]
    expected = [
        tokenizer(tokenizer.apply_chat_template(one, tokenize=False), add_special_tokens=False)[
            "input_ids"
        ]
        for one in conversations
    ]

    class Slow:
        chat_template, added_tokens_decoder = (
            tokenizer.chat_template,
            tokenizer.added_tokens_decoder,
        )
        apply_chat_template = staticmethod(tokenizer.apply_chat_template)

        def __call__(self, texts, **options):
            assert texts
            return tokenizer(texts, **options)

    assert tokenize_conversations(conversations, Slow()) == expected
    tokenizer.backend_tokenizer.enable_truncation(8)
    assert tokenize_conversations(conversations, tokenizer) == expected


@pytest.mark.parametrize(
    "flag, text", [("single_word", "xfoo y"), ("lstrip", "a   foo b"), ("rstrip", "a foo   b")]
)
def test_a_token_that_takes_in_what_stands_beside_it_is_met_late_as_well(checkpoint, flag, text):
    _, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    tokenizer.add_tokens([transformers.AddedToken("foo", **{flag: True})])
    late = conversation(text, "ok")
    expected = tokenizer(
        tokenizer.apply_chat_template(late, tokenize=False), add_special_tokens=False
    )["input_ids"]
    assert (
        tokenize_conversations(
            [*(conversation(f"q{n}", "ok") for n in range(256)), late], tokenizer
        )[-1]
        == expected
    )


def test_a_conversation_of_one_token_is_right_in_a_batch_of_its_own(reward_model):
    model, alone = reward_model[0], np.array([3], ">u4").tobytes()
    found, expected = (
        next(lore.embedding.last_states(model, [(None, [alone], None)], way, 99))[1]
        for way in ("shared", "alone")
    )
    assert torch.equal(found, expected)


def test_todays_date_and_the_template_named_default_are_the_ones(reward_model, checkpoint):
    _, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    expected = tokenize_conversations([conversation("26 Jul 2024, 2024-07-26", "x")], tokenizer)
    dates = "strftime_now('%d %b %Y') + ', ' + strftime_now(\"%Y-%m-%d\")"
    shout = tokenizer.chat_template.replace("message['content']", dates, 1)
    tokenizer.chat_template = {"default": "{% set m = messages %}" + shout, "tools": "{{ 1 }}"}
    (dated,) = tokenize_conversations([conversation("x", "y")], tokenizer)
    assert (
        tokenizer.decode(dated).count("26 Jul 2024, 2024-07-26") == 2
        and expected[0][:8] == dated[:8]
    )
    tokenizer.chat_template = {"tools": shout}
    with input_error("default"):
        tokenize_conversations([conversation("x", "y")], tokenizer)


def test_a_token_outside_the_embedding_table_is_named(reward_model, checkpoint):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    with input_error("new", str(len(tokenizer) - 1), str(model.config.vocab_size)):
        embed_conversations(
            [conversation("hi", "you"), conversation("<|new|>", "it is")], model, tokenizer
        )


# ---- Which checkpoint it is -----------------------------------------------------------------------------------------


def test_identity_is_of_the_contents_and_says_which_part_differs(checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    known = model_identity("model")
    assert known == model_identity(folder) == model_identity(str(checkpoint)) and set(known) == {
        "weights",
        "tokenizer",
    }
    templates = [
        path
        for path in (folder / "chat_template.jinja", folder / "tokenizer_config.json")
        if path.exists()
    ]
    templates[0].write_text(templates[0].read_text().replace("assistant", "critic"))
    edited = model_identity("model")
    assert edited["weights"] == known["weights"] and edited["tokenizer"] != known["tokenizer"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][7] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    retrained = model_identity("model")
    assert (
        retrained["weights"] != known["weights"] and retrained["tokenizer"] == edited["tokenizer"]
    )


def test_digests_of_files_are_remembered_until_the_files_change(checkpoint, tmp_path, monkeypatch):
    read, digest_of, folder = (
        [],
        lore.files.digest_of,
        shutil.copytree(checkpoint, tmp_path / "model"),
    )
    monkeypatch.setattr(
        lore.reward_model, "digest_of", lambda content: read.append(content) or digest_of(content)
    )
    first = model_identity(folder, tmp_path)
    assert folder / "model.safetensors" in read
    read.clear()
    monkeypatch.setattr(lore.reward_model, "_known_digests", {})  # another process
    assert model_identity(folder, tmp_path) == first and folder / "model.safetensors" not in read
    os.utime(folder / "model.safetensors")
    assert model_identity(folder, tmp_path) == first and folder / "model.safetensors" in read


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
    status, out, err = outcome(
        fresh_process(
            """if True:
        import sys
        from pathlib import Path
        from lore.embedding import embed_conversations
        from lore.files import load_json
        from lore.reward_model import load_reward_head, load_reward_model, model_identity
        from utils import InputError
        model, tokenizer = load_reward_model("some/model", device="cpu")
        chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
        about, first = {}, model_identity("some/model", sys.argv[1])
        states = embed_conversations([chat], model, tokenizer, cache_dir=sys.argv[1], about=about)
        reward = float(states.float() @ load_reward_head("some/model"))
        print(reward, about["score"], load_json(Path(sys.argv[1], "digests.json")))
        try:
            load_reward_head("some/other")
        except InputError as error:
            print(error)""",
            tmp_path,
            HF_HUB_CACHE=str(tmp_path / "hub"),
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS="1",
        )
    )
    assert status == 0, err
    found, missing = out.splitlines()
    whole = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    ids = torch.tensor(
        tokenize_conversations(
            [conversation("hello", "there")], load_reward_model(str(checkpoint))[1]
        )
    )
    assert (
        float(found.split()[0]) == pytest.approx(whole(ids).logits.item(), abs=1e-4)
        and "0" * 63 in found
    )
    assert "some/other" in missing


# ---- A run that is killed -------------------------------------------------------------------------------------------


def test_a_run_killed_at_any_moment_loses_at_most_a_shard(checkpoint, reward_model, tmp_path):
    code = """if True:
        import json, sys, lore.embedding, lore.reward_model, utils
        model, tokenizer = lore.reward_model.load_reward_model(sys.argv[1], device="cpu")
        lore.embedding.embed_conversations(json.load(open(sys.argv[2])), model, tokenizer, sys.argv[3], shard_size=8)"""
    conversations = ragged_conversations(100)
    (tmp_path / "texts.json").write_text(json.dumps(conversations))
    chance, cache = random.Random(0), tmp_path / "cache"

    def shards():
        return {path: path.read_bytes() for path in cache.glob("*/*.safetensors")}

    for _ in range(3):
        before = shards()
        run = start_code(code, ROOT, checkpoint, tmp_path / "texts.json", cache)
        more = len(before) + chance.randrange(1, 9)
        while run.running() and len(shards()) < more:
            time.sleep(0.001)
        run.kill()
        assert before.items() <= shards().items()
    done = sum(len(lore.files.load_tensors(path)[0]["embeddings"]) for path in shards())
    assert done >= 8 * 3
    embeddings = embed_conversations(conversations, *reward_model, cache_dir=cache, shard_size=8)
    assert (embeddings - one_at_a_time(conversations, *reward_model)).abs().max() < 1e-5
    assert before.items() <= shards().items()  # none was made again


def test_a_proof_of_long_texts_is_made_again_for_short_ones_among_them(tmp_path):
    name = "Phi3, rope that depends on the batch"
    tokenizer = answers_behind_prompts((60, 50, 3))
    model, conversations = (
        loaded(random_checkpoint(tmp_path, name, ARCHITECTURES[name][0])),
        tokenizer.conversations(),
    )
    embed_conversations(conversations[:8], model, tokenizer)
    found = embed_conversations(conversations, model, tokenizer)
    assert (found - last_states(model, tokenizer.sequences)).abs().max() < 1e-5


def test_in_bfloat16_a_window_that_the_text_just_exceeds_is_noticed(tmp_path):
    name, tokenizer = (
        "Mistral, its window shorter than the text",
        answers_behind_prompts((100, 90, 3)),
    )
    model = loaded(
        random_checkpoint(tmp_path, name, dict(LLAMA, sliding_window=104)), torch.bfloat16
    )
    found = embed_conversations(tokenizer.conversations(), model, tokenizer).float()
    off = (found - last_states(model, tokenizer.sequences).float()).norm(dim=1) / found.norm(dim=1)
    assert off.max() < 0.03


def test_a_damaged_proof_is_made_again(reward_model, tmp_path):
    model, tokenizer = reward_model
    conversations, found = ragged_conversations(3), []
    for content in ("", '{"way": "shared"}', '{"way'):
        for path in tmp_path.glob("*/proof.json"):
            path.write_text(content)
        vars(model).pop("reward_proofs", None)
        found.append(embed_conversations(conversations, model, tokenizer, cache_dir=tmp_path))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_config_of_fewer_layers_than_the_weights_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with input_error(str(folder), "layers.2"):
        load_reward_model(str(folder), device="cpu")


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
