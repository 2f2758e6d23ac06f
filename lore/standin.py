"""The demo's reward model."""

from pathlib import Path

import safetensors.torch
import torch

from lore.files import atomic_write


def build_standin_model(
    folder, texts, seed=0, hidden_size=64, layers=2, heads=4, key_value_heads=2, context=8192
):
    """Write a tiny Llama reward model of random weights to `folder`: config, safetensors, tokenizer, chat template.
    texts: what the byte-level BPE tokenizer is trained on. hidden_size: d, a multiple of 2 * heads. Equal arguments
    give equal weights, in any process."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2048,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
            special_tokens=[
                "<|begin_of_text|>",
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|eot_id|>",
                "<|pad|>",
            ],
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
    )  # of its own, as the end of a turn stands in the middle too
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>"
        "\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=context,
        num_labels=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.architectures = ["LlamaForSequenceClassification"]
    with torch.device("meta"):
        weights = dict(
            LlamaForSequenceClassification(LlamaConfig(**config.to_dict())).named_parameters()
        )
    # Flat attention and a weak MLP keep the last state near a mean over the words read, which tells styles apart.
    gains, generator = (
        {"v_proj": 1.0, "o_proj": 2.0, "score": 1.0},
        torch.Generator().manual_seed(seed),
    )
    for name, weight in sorted(weights.items()):
        layer, weights[name] = name.split(".")[-2], torch.ones(weight.shape)  # as the norms stay
        if weight.ndim == 2:
            std = 1.0 if layer == "embed_tokens" else gains.get(layer, 0.3) / weight.shape[1] ** 0.5
            torch.nn.init.normal_(weights[name], std=std, generator=generator)
    with atomic_write(Path(folder) / "model.safetensors") as file:
        file.write(safetensors.torch.save(weights, {"format": "pt"}))
    try:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (
        Exception
    ) as error:  # a full disk: the tokenizers' library in Rust has a class of its own for it
        raise OSError(0, str(error), str(folder)) from None
