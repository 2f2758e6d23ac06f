"""The reward model, its head, and embeddings against one forward pass per conversation."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from demos import build_model
from helpers import input_error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, MistralConfig, MistralModel

import utils
from utils import (embed_conversations, load_released_reference, load_reward_head, load_reward_model,
                   tokenize_conversations)


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

    found = [conversation(prompt, text(40)) for prompt in (text(90) for _ in range(prompts))
             for _ in range(chance.integers(1, 6))]
    found += [conversation(found[0][0]["content"], found[0][1]["content"] + " indeed"), found[3], found[3]]
    found.append([*found[1], {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}])
    return found


def one_at_a_time(conversations, model, tokenizer):
    """The released way: template, tokenize, one forward pass each, the last state of the last token."""
    states = []
    for messages in conversations:
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False,
                        return_tensors="pt").input_ids
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


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_other_attention_implementations_give_the_same(checkpoint, reward_model, attention):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu", attention="eager")
    if attention == "flash_attention_2":  # its masks, which do not share prompts, under an attention that runs here
        object.__setattr__(model.config, "_attn_implementation", "flash_attention_2")
        masks = []
        forward = model.forward

        def watched(**inputs):
            masks.append(inputs["attention_mask"])
            object.__setattr__(model.config, "_attn_implementation", "eager")
            out = forward(**inputs)
            object.__setattr__(model.config, "_attn_implementation", "flash_attention_2")
            return out

        model.forward = watched
    conversations = ragged_conversations()
    embeddings = embed_conversations(conversations, model, tokenizer)
    assert (embeddings - one_at_a_time(conversations, *reward_model)).abs().max() < 1e-5
    if attention == "flash_attention_2":
        assert all(mask.ndim == 2 for mask in masks)


def test_a_shared_prompt_is_computed_once(reward_model):
    model, tokenizer = reward_model
    prompt = "A long story about a fence. " * 20
    conversations = [conversation(prompt, answer) for answer in ("yes", "no", "move the fence", "yes")]
    lengths = [len(ids) for ids in tokenize_conversations(conversations[:3], tokenizer)]
    seen = []
    hook = model.embed_tokens.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].numel()))
    try:
        embed_conversations(conversations, model, tokenizer)
    finally:
        hook.remove()
    assert sum(seen) < lengths[0] + 60 < sum(lengths)


def test_batch_beyond_the_gpus_memory_is_halved_down_to_single_responses(reward_model, monkeypatch):
    forward, tried = utils._forward, []

    def small_gpu(model, rows):
        tried.append(sum(len(row.members) for row in rows))
        if tried[-1] > 1:
            raise torch.cuda.OutOfMemoryError
        return forward(model, rows)

    monkeypatch.setattr(utils, "_forward", small_gpu)
    conversations = ragged_conversations()
    embeddings = embed_conversations(conversations, *reward_model)
    assert max(tried) > 3 and 1 in tried
    assert (embeddings - one_at_a_time(conversations, *reward_model)).abs().max() < 1e-5


def test_special_tokens_stand_once(reward_model):
    _, tokenizer = reward_model
    ids, = tokenize_conversations([conversation("hello", "there")], tokenizer)
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


@pytest.mark.parametrize("heads", [{}, {"score.weight": torch.zeros(2, 8)},
                                   {"score.weight": torch.zeros(1, 8), "other.score.weight": torch.zeros(1, 8)}])
def test_checkpoint_without_exactly_one_scalar_head_is_refused(heads, tmp_path):
    save_file({"norm.weight": torch.zeros(8), **heads}, tmp_path / "model.safetensors")
    with input_error(str(tmp_path), "scalar"):
        load_reward_head(str(tmp_path))


def test_truncated_checkpoint_is_named(checkpoint, tmp_path):
    data = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:len(data) // 2])
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


@pytest.mark.parametrize("options", [{"max_length": 0}, {"max_length": -3}, {"batch_size": 0}, {"token_budget": 0},
                                     {"shard_size": 1.5}, {"truncation_side": "middle"}])
def test_options_that_mean_nothing_are_named(reward_model, options):
    with input_error(*options, str(*options.values())):
        embed_conversations([conversation("hello", "there")], *reward_model, **options)


def test_conversation_longer_than_the_context_is_named(reward_model):
    with input_error("word and word", "tokens"):
        embed_conversations([conversation("hi", "you"), conversation("hi", "word and word " * 9000)], *reward_model)
    with input_error("no conversations"):
        embed_conversations([], *reward_model)


def cached(conversations, reward_model, folder, **options):
    """(embeddings, number of conversations that went through the model)."""
    model, tokenizer = reward_model
    states = []
    hook = model.norm.register_forward_hook(lambda layer, inputs, output: states.append(output))
    try:
        embeddings = embed_conversations(conversations, model, tokenizer, cache_dir=folder, shard_size=4, **options)
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


@pytest.mark.parametrize("change", [
    lambda model: model.embed_tokens.weight.data[1:-1].mul_(1.5),
    lambda model: setattr(model.config, "rms_norm_eps", 0.1)], ids=["inner values", "settings"])
def test_a_retrained_model_does_not_hit_the_cache(reward_model, checkpoint, tmp_path, change):
    conversations = ragged_conversations(2)
    cached(conversations, reward_model, tmp_path)
    other, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    change(other)
    assert cached(conversations, (other, tokenizer), tmp_path)[1] > 0
    assert cached(conversations, load_reward_model(str(checkpoint), device="cpu"), tmp_path)[1] == 0


def test_sliding_window_is_kept_where_a_prompt_is_shared():
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1, sliding_window=8, max_position_embeddings=512)
    model, chance = MistralModel(config).eval(), np.random.default_rng(0)
    prompt = chance.integers(300, size=40).tolist()
    tokens = [prompt + chance.integers(300, size=n).tolist() for n in (5, 9, 3)]

    class Tokenizer:
        chat_template = "numbers"

        def apply_chat_template(self, conversation, **options):
            return conversation[-1]["content"]

        def __call__(self, texts, **options):
            return {"input_ids": [tokens[int(text)] for text in texts]}

    conversations = [[{"role": "user", "content": "the same"}, {"role": "assistant", "content": str(i)}]
                     for i in range(3)]
    embeddings = embed_conversations(conversations, model, Tokenizer())
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([ids])).last_hidden_state[:, -1] for ids in tokens])
    assert (embeddings - expected).abs().max() < 1e-5


def test_damaged_shard_is_made_again(reward_model, tmp_path):
    conversations = ragged_conversations(4)
    embeddings, _ = cached(conversations, reward_model, tmp_path)
    shard = next(tmp_path.glob("*/*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    again, forwards = cached(conversations, reward_model, tmp_path)
    assert forwards > 0 and torch.equal(again, embeddings)
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("spoilt", [{"embeddings": torch.full((99, 64), math.nan)}, {"states": torch.ones(99, 64)}],
                         ids=["NaN", "other tensors"])
def test_shard_without_usable_embeddings_is_made_again(reward_model, tmp_path, spoilt):
    conversations = ragged_conversations(4)
    embeddings, _ = cached(conversations, reward_model, tmp_path)
    shard = next(tmp_path.glob("*/*.safetensors"))
    whole = shard.read_bytes()
    about = utils.load_tensors(shard)[1]
    utils.save_tensors(shard, {name: tensor[:len(about["keys"])] for name, tensor in spoilt.items()}, **about)
    again, forwards = cached(conversations, reward_model, tmp_path)
    assert forwards == 1 and torch.equal(again, embeddings) and shard.read_bytes() == whole


def test_conversation_whose_embedding_is_not_finite_is_named(checkpoint, tmp_path):
    model, tokenizer = load_reward_model(str(checkpoint), device="cpu")
    model.norm.weight.data[3] = math.inf
    conversations = ragged_conversations(2)
    with input_error("NaN or infinite", repr(conversations[0][0]["content"][:60])[1:-1]):
        embed_conversations(conversations[:1], model, tokenizer, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*/*"))


def test_repeated_conversations_have_equal_rows_in_their_places(reward_model):
    conversations = ragged_conversations(3)
    order = [0, 1, 0, 2, 2, 1, 0]
    model, tokenizer = reward_model
    embeddings = utils.embed_conversations([conversations[i] for i in order], model, tokenizer)
    assert (embeddings - one_at_a_time(conversations, model, tokenizer)[order]).abs().max() < 1e-5


def test_text_that_is_no_unicode_is_named(reward_model):
    model, tokenizer = reward_model
    with input_error("half a \\ud83d"):
        utils.embed_conversations([[{"role": "user", "content": "half a \ud83d"}]], model, tokenizer)


def test_embeddings_that_another_process_did_not_make_are_missed(reward_model, tmp_path, monkeypatch):
    model, tokenizer = reward_model
    monkeypatch.setattr(utils, "process_count", lambda: 2)
    monkeypatch.setattr(utils.dist, "barrier", lambda: None)
    with input_error("cache_dir"):
        embed_conversations(ragged_conversations(3), model, tokenizer)
    with input_error(str(tmp_path), "other processes"):
        embed_conversations(ragged_conversations(), model, tokenizer, cache_dir=tmp_path, shard_size=4)
    monkeypatch.undo()  # one process alone completes what is there
    embeddings = embed_conversations(ragged_conversations(), model, tokenizer, cache_dir=tmp_path, shard_size=4)
    assert (embeddings - one_at_a_time(ragged_conversations(), model, tokenizer)).abs().max() < 1e-5
