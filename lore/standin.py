"""The demo's reward model: tiny, with random weights, and made in a second on any machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch

from lore.files import atomic_write

# transformers and tokenizers are imported in the functions below: importing them takes seconds,
# and this module is imported by scripts that need it for --demo alone.
if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY_SIZE = 2048  # tokens

SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)

# How large the random weights are. EMBEDDING_DEVIATION is the standard deviation of the token
# embeddings; that of another layer is its gain, divided by the square root of its number of inputs.
# Small queries and keys make attention nearly uniform, and a weak MLP changes little. So the last
# token's state is near a mean over the words that were read, which tells styles of writing apart.
EMBEDDING_DEVIATION = 1.0
GAINS = {"v_proj": 1.0, "o_proj": 2.0, "score": 1.0}
GAIN_OF_OTHERS = 0.3


def build_standin_model(
    folder: Path | str,
    texts: Iterable[str],
    seed: int = 0,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    key_value_heads: int = 2,
    context: int = 8192,
) -> None:
    """Write a tiny Llama reward model to `folder`: config, safetensors, tokenizer, chat template.

    texts: what the tokenizer is trained on.
    seed: chooses the weights. Equal arguments give equal files, in any process.
    hidden_size: d, a multiple of 2 * heads.
    context: the longest conversation, in tokens.
    Raises OSError: the folder cannot be written.
    """
    from transformers import LlamaConfig

    tokenizer = _train_tokenizer(texts)
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
    weights = _random_weights(config, seed)
    with atomic_write(Path(folder) / "model.safetensors") as file:
        file.write(safetensors.torch.save(weights, {"format": "pt"}))
    try:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library reports a full disk as a class of its own
        raise OSError(0, str(error), str(folder)) from None


def _train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that is trained on `texts`, with Llama 3's chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=SPECIAL_TOKENS,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",  # not <|eot_id|>, which ends every turn and so is part of the text
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _random_weights(config: LlamaConfig, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a Llama reward model of this shape by name, float32; norms are 1."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    with torch.device("meta"):  # only names and shapes are needed
        # The model writes to its config, so it gets a copy.
        model = LlamaForSequenceClassification(LlamaConfig(**config.to_dict()))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in sorted(model.named_parameters()):
        weight = torch.ones(parameter.shape)
        if weight.ndim == 2:  # all but the norms
            torch.nn.init.normal_(weight, std=_deviation(name, weight), generator=generator)
        weights[name] = weight
    return weights


def _deviation(name: str, weight: torch.Tensor) -> float:
    """The standard deviation of the weights `name`, such as "model.layers.0.mlp.up_proj.weight"."""
    layer = name.split(".")[-2]
    if layer == "embed_tokens":
        return EMBEDDING_DEVIATION
    inputs = weight.shape[1]
    return GAINS.get(layer, GAIN_OF_OTHERS) / inputs**0.5
