"""How much faster `embed_conversations` is than rows sorted by length, and than one forward pass per conversation.

    python tests/benchmarks/bench_embedding.py                  all workloads, some minutes on two cores
    python tests/benchmarks/bench_embedding.py tldr prism       only these: tldr, prism, personalllm, rewardbench, own
    python tests/benchmarks/bench_embedding.py bookkeeping      a full Reddit TL;DR without the model, 6 GB, 8 of disk

Per workload: computed / unique tokens; the median ratio of CPU seconds (and the smallest and largest) of rows to ours,
and that of one by one, the released way, all in this process in turn; the largest deviation from one by one; what the
proof took, in conversations. Nothing is asserted. Token ids are random, in the shapes of the data sets (answers, turns
and tokens); the model is a Llama of random weights in float32, whose cost does not depend on the values.
"""

import contextlib
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import lore.embedding
import lore.reward_model
import utils

# ---------------------------------------------------------------------------------------------------------------------
REPEATS = 3
BUDGET = 4096  # tokens in a batch of either side
MODEL = dict(
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=8192,
    max_position_embeddings=8192,
)
# workload -> prompts, answers to each, tokens of a prompt and of an answer (log-normal, the median), turns from and to
SHAPES = {
    "tldr": (6, 14, 350, 32, (1, 1)),
    "prism": (5, 3, 30, 110, (2, 6)),
    "personalllm": (4, 8, 45, 260, (1, 1)),
    "rewardbench": (5, 4, 120, 300, (1, 1)),
    "own": (16, 2, 150, 120, (1, 1)),
}
BOOKKEEPING = (30_000, 89_000)  # rows of a split; with the second a full TL;DR
TARGETS = {"tldr": 2.5, "prism": 3, "personalllm": 1.15, "rewardbench": 1, "own": 1}  # rows / ours
# ---------------------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Token ids for conversations that are numbers of prepared sequences."""

    chat_template = "numbers"

    def __init__(self, sequences):
        self.sequences = sequences
        self.apply_chat_template = lambda conversation, **options: conversation[0]["content"]

    def __call__(self, texts, **options):
        return {"input_ids": [self.sequences[int(text)] for text in texts]}


def workload(prompts, answers, of_prompt, of_answer, turns, seed=0):
    """Sequences of token ids: `answers` per turn behind everything before, the first of which the next turn follows."""
    chance, found = np.random.default_rng(seed), []

    def tokens(median):
        return chance.integers(8, 8192, max(4, int(chance.lognormal(np.log(median), 0.5)))).tolist()

    for number in range(prompts):
        before = list(range(8))  # what every chat begins with
        for _ in range(turns[0] + number % (turns[1] - turns[0] + 1)):
            before = before + tokens(of_prompt)
            of_turn = [before + tokens(of_answer) + [3] for _ in range(answers)]
            found += of_turn
            before = of_turn[0]
    return [found[i] for i in chance.permutation(len(found))]


@torch.inference_mode()
def rows(model, sequences):
    """Padded on the right and sorted by length, which needs no mask: as fast as rows can be."""
    order, out = sorted(range(len(sequences)), key=lambda n: -len(sequences[n])), {}
    while order:
        batch = order[: max(1, BUDGET // len(sequences[order[0]]))]
        ids = torch.zeros(len(batch), len(sequences[batch[0]]), dtype=torch.long)
        for row, n in zip(ids, batch):
            row[: len(sequences[n])] = torch.tensor(sequences[n])
        states = model(input_ids=ids, use_cache=False).last_hidden_state
        out.update({n: states[r, len(sequences[n]) - 1] for r, n in enumerate(batch)})
        order = order[len(batch) :]
    return torch.stack([out[n] for n in range(len(sequences))])


@torch.inference_mode()
def one_by_one(model, sequences):
    return torch.cat(
        [
            model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[:, -1]
            for ids in sequences
        ]
    )


def compare(name, model):
    sequences, computed = workload(*SHAPES[name]), []
    unique = len({tuple(ids[:end]) for ids in sequences for end in range(1, len(ids) + 1)})
    conversations = [[{"role": "user", "content": str(n)}] for n in range(len(sequences))]

    def ours():
        return lore.embedding.embed_conversations(
            conversations, model, Tokenizer(sequences), token_budget=BUDGET
        )

    def seconds(way, *arguments):
        began = time.process_time()
        states = way(*arguments)
        return time.process_time() - began, states

    model.__dict__.pop("reward_proofs", None)
    with_proof, _ = seconds(ours)
    hook = model.embed_tokens.register_forward_hook(
        lambda layer, inputs, output: computed.append(inputs[0].numel())
    )
    ours()
    hook.remove()
    alone, expected = seconds(one_by_one, model, sequences)
    pairs = [(seconds(ours), seconds(rows, model, sequences)) for _ in range(REPEATS)]
    ratios = [theirs / mine for (mine, _), (theirs, _) in pairs]
    mine = statistics.median(mine for (mine, _), _ in pairs)
    error = max((states - expected).abs().max().item() for (_, states), _ in pairs)
    print(
        f"{name:12} {len(sequences):4} conversations, {mine:5.1f} s, computed / unique {sum(computed) / unique:.3f}; "
        f"rows / ours {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, of {TARGETS[name]})"
        f" and one by one / ours {alone / mine:.2f}; off by {error:.1e}; "
        f"proof {(with_proof - mine) / mine * len(sequences):.0f} conversations",
        flush=True,
    )


def bookkeeping(rows, width=4096):
    """RedditTLDR/prepare.py on synthetic data in TL;DR's shape, two splits of `rows` comparisons, around a model that costs
    nothing: what reading, tokenizing, sorting, batching and writing take."""
    import pandas as pd
    from demos import build_model
    from helpers import load_script

    chance, posts = np.random.default_rng(0), rows * 23 // 178
    with tempfile.TemporaryDirectory() as folder:
        model, data, out = (Path(folder, name) for name in ("model", "data", "out"))
        data.mkdir()
        _, tokenizer = lore.reward_model.load_reward_model(str(build_model(model)), device="cpu")
        words = [
            word[1:] for word in tokenizer.get_vocab() if word[0] == "Ġ" and word[1:].isalpha()
        ]
        words = np.array(words)[chance.integers(len(words), size=2**20)].tolist()
        for split, first in (("train", 0), ("validation", posts)):
            texts = [" ".join(words[n : n + 345]) for n in range(first, first + posts)]
            pd.DataFrame(
                {
                    "info": {"post": texts[n % posts]},
                    "choice": n % 2,
                    "worker": f"worker {n % 76}",
                    "summaries": [
                        {"text": " ".join(words[k : k + 30])}
                        for k in chance.integers(2**20 - 30, size=2)
                    ],
                }
                for n in range(rows)
            ).to_parquet(data / f"{split}.parquet")
        del words, texts
        states, prepare = torch.randn(8192, width).bfloat16(), load_script("RedditTLDR", "prepare")
        prepare.load_reward_head = lambda model_name: torch.ones(width, 1)
        free = {
            "forward_last_states": lambda model, ids, shared=None: states[: len(ids)],
            "choose_batching": lambda model, sequences: {"way": "shared", "tokens": [0, 2**30]},
        }
        sys.argv[1:] = map(str, ("--data", data, "--model", model, "--dir", out))
        before, held = resource.getrusage(resource.RUSAGE_SELF), 4 * rows * width * 2 / 1e9
        with mock.patch.multiple(utils, **free), contextlib.redirect_stdout(None):
            prepare.main()
        after = resource.getrusage(resource.RUSAGE_SELF)
        print(
            f"bookkeeping: {4 * rows:,} conversations, {after.ru_utime - before.ru_utime:.0f} CPU s and "
            f"{after.ru_stime - before.ru_stime:.0f} of the system, at most {after.ru_maxrss / 1e6:.1f} GB, "
            f"{held:.1f} of them embeddings",
            flush=True,
        )


def main():
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**MODEL)).eval()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, budget {BUDGET}, float32")
    for name in sys.argv[1:] or [*SHAPES, "bookkeeping"]:
        if name == "bookkeeping":
            for rows in BOOKKEEPING:
                bookkeeping(rows)
        else:
            compare(name, model)


if __name__ == "__main__":
    main()
