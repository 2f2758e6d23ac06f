"""How much faster `embed_conversations` is than padded rows, and than one conversation at a time.

    python tests/benchmarks/bench_embedding.py              all workloads, some minutes on two cores
    python tests/benchmarks/bench_embedding.py tldr prism   only these: tldr, prism, personalllm,
                                                            rewardbench, own
    python tests/benchmarks/bench_embedding.py bookkeeping  a full Reddit TL;DR without the model,
                                                            6 GB of memory, 8 of disk

Printed for each workload:
- computed / unique tokens;
- the median ratio of CPU seconds of rows to ours, with the smallest and the largest, and the ratio
  of one by one, the released way, to ours; all run in this process in turn;
- the largest deviation from one by one;
- what the trial took, in conversations.

Nothing is asserted. Token ids are random, in the shapes of the data sets (answers, turns, tokens).
The model is a Llama of random weights in float32: its cost does not depend on the values. On a busy
machine OMP_NUM_THREADS=1 gives steadier ratios.
"""

import contextlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import lore.batching
import lore.batching_trial
import lore.embedding
import lore.reward_model

REPEATS = 3
BUDGET = 4096  # tokens in a batch, of rows as well as of ours
MODEL = dict(
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=8192,
    max_position_embeddings=8192,
)


class Shape(NamedTuple):
    """The shape of a data set, and how many times faster than rows ours should be."""

    prompts: int
    answers: int  # to each turn
    prompt_tokens: int  # the median of a log-normal distribution, as the next
    answer_tokens: int
    turns: tuple[int, int]  # the fewest and the most of a prompt
    target: float


WORKLOADS = {
    "tldr": Shape(6, 14, 350, 32, (1, 1), target=2.5),
    "prism": Shape(5, 3, 30, 110, (2, 6), target=3),
    "personalllm": Shape(4, 8, 45, 260, (1, 1), target=1.15),
    "rewardbench": Shape(5, 4, 120, 300, (1, 1), target=1),
    "own": Shape(16, 2, 150, 120, (1, 1), target=1),
}
BOOKKEEPING_ROWS = (30_000, 89_000)  # rows of a split; the second is a full TL;DR


class NumberTokenizer:
    """Token ids for conversations that are numbers of prepared lists."""

    chat_template = "numbers"

    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences = sequences

    def apply_chat_template(self, conversation: list[dict], **options: object) -> str:
        return conversation[0]["content"]

    def __call__(self, texts: list[str], **options: object) -> dict:
        return {"input_ids": [self.sequences[int(text)] for text in texts]}


def random_sequences(shape: Shape, seed: int = 0) -> list[list[int]]:
    """Token ids in this shape, shuffled: each turn is behind everything before it, and the next
    turn follows its first answer."""
    generator = np.random.default_rng(seed)

    def tokens(median: int) -> list[int]:
        count = max(4, int(generator.lognormal(np.log(median), 0.5)))
        return generator.integers(8, 8192, count).tolist()

    sequences = []
    fewest, most = shape.turns
    for number in range(shape.prompts):
        dialogue = list(range(8))  # what every chat begins with
        for _ in range(fewest + number % (most - fewest + 1)):
            dialogue = dialogue + tokens(shape.prompt_tokens)
            answered = [dialogue + tokens(shape.answer_tokens) + [3] for _ in range(shape.answers)]
            sequences += answered
            dialogue = answered[0]
    return [sequences[i] for i in generator.permutation(len(sequences))]


@torch.inference_mode()
def embed_rows(model: LlamaModel, sequences: list[list[int]]) -> torch.Tensor:
    """Sorted by length and padded on the right, which needs no mask: as fast as rows can be."""
    order = sorted(range(len(sequences)), key=lambda n: -len(sequences[n]))
    state_of = {}
    while order:
        longest = len(sequences[order[0]])
        batch = order[: max(1, BUDGET // longest)]
        order = order[len(batch) :]
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, n in zip(ids, batch):
            row[: len(sequences[n])] = torch.tensor(sequences[n])
        states = model(input_ids=ids, use_cache=False).last_hidden_state
        for row, n in enumerate(batch):
            state_of[n] = states[row, len(sequences[n]) - 1]
    return torch.stack([state_of[n] for n in range(len(sequences))])


@torch.inference_mode()
def embed_one_by_one(model: LlamaModel, sequences: list[list[int]]) -> torch.Tensor:
    states = []
    for ids in sequences:
        output = model(input_ids=torch.tensor([ids]), use_cache=False)
        states.append(output.last_hidden_state[:, -1])
    return torch.cat(states)


def cpu_seconds(function: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """CPU seconds of a call, and what it returns."""
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def compare(name: str, model: LlamaModel) -> None:
    """Print the line of a workload."""
    shape = WORKLOADS[name]
    sequences = random_sequences(shape)
    conversations = [[{"role": "user", "content": str(n)}] for n in range(len(sequences))]
    tokenizer = NumberTokenizer(sequences)

    def ours() -> torch.Tensor:
        return lore.embedding.embed_conversations(
            conversations, model, tokenizer, token_budget=BUDGET
        )

    lore.batching_trial.KEPT_TRIALS.pop(model, None)
    seconds_with_trial, _ = cpu_seconds(ours)

    computed = []
    hook = model.embed_tokens.register_forward_hook(
        lambda layer, inputs, output: computed.append(inputs[0].numel())
    )
    ours()
    hook.remove()
    unique = len({tuple(ids[:end]) for ids in sequences for end in range(1, len(ids) + 1)})

    seconds_alone, expected = cpu_seconds(lambda: embed_one_by_one(model, sequences))
    our_seconds, ratios, errors = [], [], []
    for _ in range(REPEATS):
        seconds, states = cpu_seconds(ours)
        row_seconds, _ = cpu_seconds(lambda: embed_rows(model, sequences))
        our_seconds.append(seconds)
        ratios.append(row_seconds / seconds)
        errors.append((states - expected).abs().max().item())
    seconds = statistics.median(our_seconds)
    trial = (seconds_with_trial - seconds) / seconds * len(sequences)
    print(
        f"{name:12} {len(sequences):4} conversations, {seconds:5.1f} s, "
        f"computed / unique {sum(computed) / unique:.3f}; "
        f"rows / ours {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, "
        f"of {shape.target}) and one by one / ours {seconds_alone / seconds:.2f}; "
        f"off by {max(errors):.1e}; trial {trial:.0f} conversations",
        flush=True,
    )


def write_comparisons(folder: Path, words: list[str], rows: int, seed: int = 0) -> None:
    """Synthetic comparisons in the shape of TL;DR, two splits of `rows` rows, as parquet."""
    import pandas as pd

    generator = np.random.default_rng(seed)
    text = np.array(words)[generator.integers(len(words), size=2**20)].tolist()
    posts = rows * 23 // 178
    for split, first in (("train", 0), ("validation", posts)):
        post_texts = [" ".join(text[n : n + 345]) for n in range(first, first + posts)]
        comparisons = []
        for n in range(rows):
            summaries = [
                {"text": " ".join(text[k : k + 30])}
                for k in generator.integers(len(text) - 30, size=2)
            ]
            comparisons.append(
                {
                    "info": {"post": post_texts[n % posts]},
                    "choice": n % 2,
                    "worker": f"worker {n % 76}",
                    "summaries": summaries,
                }
            )
        pd.DataFrame(comparisons).to_parquet(folder / f"{split}.parquet")


def bookkeeping(rows: int, width: int = 4096) -> None:
    """RedditTLDR/prepare.py around a model that costs nothing: what reading, tokenizing, sorting,
    batching and writing take. The data are two splits of `rows` comparisons."""
    from demos import build_model
    from helpers import load_script

    with tempfile.TemporaryDirectory() as folder:
        model, data, out = (Path(folder, name) for name in ("model", "data", "out"))
        data.mkdir()
        tokenizer = lore.reward_model.load_tokenizer(str(build_model(model)))
        words = [
            word[1:] for word in tokenizer.get_vocab() if word[0] == "Ġ" and word[1:].isalpha()
        ]
        write_comparisons(data, words, rows)

        states = torch.randn(8192, width).bfloat16()
        trial = lore.batching_trial.BatchingTrial("shared", shortest=0, longest=2**30)
        script = load_script("RedditTLDR", "prepare")
        script.load_reward_head = lambda model_name: torch.ones(width, 1)
        sys.argv[1:] = map(str, ("--data", data, "--model", model, "--dir", out))
        before = resource.getrusage(resource.RUSAGE_SELF)
        with (
            mock.patch.object(
                lore.batching,
                "forward_last_states",
                lambda model, ids, shared=None: states[: len(ids)],
            ),
            mock.patch.object(
                lore.batching_trial, "choose_batching", lambda model, sequences: trial
            ),
            contextlib.redirect_stdout(None),
        ):
            script.main()
        after = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"bookkeeping: {4 * rows:,} conversations, {after.ru_utime - before.ru_utime:.0f} CPU s "
        f"and {after.ru_stime - before.ru_stime:.0f} of the system, at most "
        f"{after.ru_maxrss / 1e6:.1f} GB, {4 * rows * width * 2 / 1e9:.1f} of them embeddings",
        flush=True,
    )


def main() -> None:
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**MODEL)).eval()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, budget {BUDGET}, float32")
    for name in sys.argv[1:] or [*WORKLOADS, "bookkeeping"]:
        if name == "bookkeeping":
            for rows in BOOKKEEPING_ROWS:
                bookkeeping(rows)
        else:
            compare(name, model)


if __name__ == "__main__":
    main()
