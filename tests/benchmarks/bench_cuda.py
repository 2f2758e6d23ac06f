"""On a GPU, with a reward model of Skywork-Reward-Llama-3.1-8B's shape and random weights: is it right, and how fast.

    python tests/benchmarks/bench_cuda.py                       all of it: five minutes, 40 GB of disk, a GPU with 40 GB
    python tests/benchmarks/bench_cuda.py training              only this: loading, embedding, training

loading: the checkpoint is written to a temporary folder; seconds, and what the host and the GPU hold at most.
embedding: how far shared beginnings (varlen flash attention over gathered keys) and padded rows are from one
conversation at a time in bfloat16, seconds and tokens per second of each at several budgets, the proof, and the whole
`embed_conversations`, from texts to embeddings. Of a full Reddit TL;DR, 24.5 million tokens, it says what the rate
comes to; by arithmetic 2 * 7.0e9 operations a token are 3.4e17, at 450 to 550 TFLOPS of an H100 10 to 13 minutes.
training: the same sweep on the GPU and on the CPU, synthetic pairs of the sizes of TL;DR, and of PRISM on the GPU.

With torch 2.11, transformers 5.17 and 16 CPU cores, 2,880 conversations of 149,000 distinct tokens:

                                          H100 80GB                   H200
    loading                               2.3 s                       2.4 s; 0.8 GB on the host, 15 GB on the GPU
    one at a time, from an eighth         229 s                       161 and 243 s, by the host
    rows, budget 8,192, from an eighth    4,000 distinct tokens/s     4,200
    shared, budget 4,096 to 32,768        29,400 to 31,300            31,200 to 32,400; 15.5 to 19 GB
    a full TL;DR at the default 8,192     13.4 minutes                12.8 minutes
    off one at a time                     rows 4 %, shared 5 %, bfloat16's noise in 32 random layers
    11,520 conversations, whole           21.4 s                      20.1 s
      of which texts to tokens            0.7 s                       1.0 s
      the states alone                    19.5 s                      18.8 s
    training, TL;DR's size                                            1.8 s (the CPU 8.9 s); accuracies equal to four digits
    training, PRISM's size                                            4.4 ms an iteration, 20,000 in 1.5 minutes

On the H200 the GPU computed 98.5 % of the time between its first and last kernel of 5,000 conversations. Of the kernels'
time, matrix products take 60 %, flash attention 11 %. A proof took 0.32 s there and 0.47 s beside the H100, 1.9 and 2.8 %
of 10,000 such conversations, most of it what the host takes to start five forward passes; one of the five has become
another since, and no key cache is filled. With 0.5 GB free, batches of a budget of 32,768 came down to 2,025 tokens,
states equal. In float32 the shared way is within 3e-6 of one by one, and four layers in bfloat16 are as far from float32
shared as alone (2.5 %, the median).
"""

import contextlib
import io
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import lore.embedding
import lore.reward_model
import lore.rows
import lore.standin
import utils

# ---------------------------------------------------------------------------------------------------------------------
SHAPE = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)
POSTS, ANSWERS = 192, 15  # as of TL;DR
WORDS = (88, 8)  # in a post and in an answer, the median; about 350 and 32 tokens
FULL = 24.5e6  # distinct tokens of a full TL;DR, as counted by the design
# ---------------------------------------------------------------------------------------------------------------------


class HostMemory(threading.Thread):
    """The most memory of its own, without files that are mapped, that this process held since the start, in GB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.over = 0.0, threading.Event()
        self.start()

    def run(self):
        while not self.over.wait(0.02):
            line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(line.split()[1]) / 1e6)


def timed(function, *arguments, **options):
    torch.cuda.synchronize()
    began = time.perf_counter()
    found = function(*arguments, **options)
    torch.cuda.synchronize()
    return found, time.perf_counter() - began


def write_checkpoint(folder):
    """A checkpoint of SHAPE in bfloat16, with the stand-in's tokenizer -> words of its vocabulary."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    texts = [
        str(row)
        for path in sorted((ROOT / "RedditTLDR" / "demo").glob("*.jsonl.gz"))
        for _, row in lore.rows.read_rows(path)
    ]
    lore.standin.build_standin_model(folder / "standin", texts)
    tokenizer = AutoTokenizer.from_pretrained(folder / "standin")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForSequenceClassification(
            LlamaConfig(**SHAPE, num_labels=1, pad_token_id=tokenizer.pad_token_id)
        )
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model", max_shard_size="4GB")
    tokenizer.save_pretrained(folder / "model")
    return [word for word in tokenizer.get_vocab() if word.isalpha()]


def loading(folder):
    memory = HostMemory()
    torch.cuda.reset_peak_memory_stats()
    (model, tokenizer), seconds = timed(lore.reward_model.load_reward_model, str(folder / "model"))
    memory.over.set()
    print(
        f"loading: {seconds:.1f} s; the host holds at most {memory.peak:.1f} GB, the GPU "
        f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB; scorer {len(model.reward_scorer)}, {model.dtype}"
    )
    print(
        f"identity of the weights: {timed(lore.reward_model.model_identity, str(folder / 'model'))[1]:.1f} s"
    )
    return model, tokenizer


def states_of(model, sequences, way, budget):
    ((_, states),) = lore.embedding.last_states(model, [(None, sequences, None)], way, budget)
    return states


def synthetic(words, posts):
    """ANSWERS conversations behind each of `posts` prompts, in the shape of TL;DR."""
    chance = np.random.default_rng(0)

    def text(count):
        return " ".join(chance.choice(words, int(chance.lognormal(np.log(count), 0.4))))

    prompts = [text(WORDS[0]) for _ in range(posts)]
    return [
        [
            {"role": "user", "content": prompts[n % posts]},
            {"role": "assistant", "content": text(WORDS[1])},
        ]
        for n in chance.permutation(posts * ANSWERS)
    ]


def distinct(sequences):
    return len({sequence[:end] for sequence in sequences for end in range(4, len(sequence) + 4, 4)})


def embedding(model, tokenizer, words):
    sequences = list(
        lore.embedding.distinct_sequences(synthetic(words, POSTS), tokenizer, slice(None), 1)
    )
    print(
        f"{len(sequences):,} conversations, {sum(map(len, sequences)) // 4:,} tokens, {distinct(sequences):,} distinct"
    )
    few = sequences[: len(sequences) // 8]
    alone, one_by_one = timed(states_of, model, few, "alone", 1)
    print(f"alone: {one_by_one * len(sequences) / len(few):.1f} s for all")
    for way, some, budget in (
        ("rows", few, 8192),
        ("rows", few, 16384),
        ("shared", few, 8192),
        *(("shared", sequences, budget) for budget in (4096, 8192, 16384, 32768)),
    ):
        torch.cuda.reset_peak_memory_stats()
        states, seconds = min(
            (timed(states_of, model, some, way, budget) for _ in range(2)), key=lambda run: run[1]
        )
        tokens, off = (
            distinct(some),
            (states[: len(few)].float() - alone.float()).norm(dim=1) / alone.float().norm(dim=1),
        )
        print(
            f"{way}, budget {budget}, {len(some):,}: {seconds:.2f} s, {tokens / seconds:,.0f} distinct tokens/s, "
            f"{tokens / seconds * 14e9 / 1e12:.0f} TFLOPS for these; GPU {torch.cuda.max_memory_allocated() / 1e9:.1f} GB; a full "
            f"TL;DR {FULL / tokens * seconds / 60:.1f} minutes; off one by one {off.median():.1e} to {off.max():.1e}"
        )
    proof, seconds = min(
        (timed(lore.embedding.choose_batching, model, sequences) for _ in range(3)),
        key=lambda run: run[1],
    )
    rate = timed(states_of, model, sequences, "shared", 8192)[1] / len(sequences)
    print(
        f"proof: {seconds:.2f} s, {seconds / rate / 100:.1f} % of 10,000 such conversations: {proof}"
    )
    print_kernels(model, sequences)


def whole(model, tokenizer, words):
    """`embed_conversations` from texts to embeddings: how much of its time the GPU computes."""
    conversations = synthetic(words, 4 * POSTS)
    numbers, tokenizing = timed(
        lore.embedding.distinct_sequences, conversations, tokenizer, slice(None), 1
    )
    sequences = list(numbers)
    computing = min(timed(states_of, model, sequences, "shared", 8192)[1] for _ in range(2))
    with tempfile.TemporaryDirectory() as cache:
        _, seconds = timed(
            lore.embedding.embed_conversations, conversations, model, tokenizer, cache_dir=cache
        )
        _, again = timed(
            lore.embedding.embed_conversations, conversations, model, tokenizer, cache_dir=cache
        )
    print(
        f"embed_conversations, {len(conversations):,}: {seconds:.2f} s, of which tokenizing {tokenizing:.2f}; the states alone, "
        f"in one piece {computing:.2f}; all kept {again:.2f}"
    )


def print_kernels(model, sequences):
    """What the GPU's time goes to, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        _, seconds = timed(states_of, model, sequences[:512], "shared", 8192)
    kernels = sorted(found.key_averages(), key=lambda kernel: -kernel.device_time_total)
    total = sum(kernel.device_time_total for kernel in kernels)
    print(f"profile: {seconds:.2f} s, kernels {total / 1e6:.2f} s")
    for kernel in kernels[:9]:
        print(f"  {kernel.device_time_total / total:6.1%} {kernel.count:6} {kernel.key[:90]}")


def training():
    def users(counts):
        generator = torch.Generator().manual_seed(0)
        return [
            30
            * (
                torch.randn(m, 4096, generator=generator)
                + 0.3 * torch.randn(4096, generator=generator)
            )
            for m in counts
        ]

    seen, unseen = users([450] * 38), users([350] * 38)
    test, found, V = (
        [X[50:] for X in unseen],
        {},
        torch.randn(4096, 1, generator=torch.Generator().manual_seed(1)),
    )
    data = [X[:150] for X in seen], test, [X[:50] for X in unseen], test, len(seen), len(unseen)
    for device in ("cuda", "cuda", "cpu"):
        with contextlib.redirect_stdout(io.StringIO()):
            found[device], seconds = timed(utils.run, range(7), [0], V, *data, device)
        print(
            f"training, TL;DR's size, {device}: {seconds:.1f} s; accuracies "
            f"{', '.join(f'{value:.4f}' for value in found[device][3])}"
        )
    print(
        f"largest difference of an accuracy: {max(abs(a - b).max() for a, b in zip(*found.values())):.4f}"
    )
    torch.cuda.reset_peak_memory_stats()
    features, members = (
        users([19] * 1030),
        [utils.Member(K, 1e4) for K in (1, 5, 10, 15, 20, 25, 50)],
    )
    seconds = [
        timed(utils.train_bases, features, members, V, n, 0.5, True, "cuda")[1] for n in (20, 420)
    ]
    print(
        f"training, PRISM's size, cuda: {(seconds[1] - seconds[0]) / 400 * 1e3:.1f} ms an iteration, 20,000 take "
        f"{(seconds[1] - seconds[0]) / 400 * 20000 / 60:.1f} minutes; GPU {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    )


def main():
    parts = sys.argv[1:] or ["loading", "embedding", "training"]
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if "training" in parts:
        training()
    if {"loading", "embedding"} & set(parts):
        with tempfile.TemporaryDirectory() as folder:
            words, seconds = timed(write_checkpoint, Path(folder))
            torch.cuda.empty_cache()
            print(f"checkpoint written: {seconds:.0f} s", flush=True)
            model, tokenizer = loading(Path(folder))
            if "embedding" in parts:
                embedding(model, tokenizer, words)
                whole(model, tokenizer, words)


if __name__ == "__main__":
    main()
