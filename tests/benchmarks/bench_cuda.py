"""On a GPU, with random weights in the shape of Skywork-Reward-Llama-3.1-8B: is it right, how fast?

    python tests/benchmarks/bench_cuda.py           all of it: five minutes, 40 GB of disk and a GPU
                                                    with 40 GB
    python tests/benchmarks/bench_cuda.py training  only this: loading, embedding, training

loading: the checkpoint is written to a temporary folder. Seconds, and the most that the host and
the GPU hold.
embedding: how far shared prefixes (varlen flash attention over gathered keys) and padded rows are
from one conversation at a time in bfloat16; seconds and tokens per second of each at several
budgets; the trial; and the whole `embed_conversations`, from texts to embeddings. It also says what
the rate comes to for a full Reddit TL;DR of 24.5 million tokens. By arithmetic, 2 * 7.0e9
operations a token are 3.4e17, and so 10 to 13 minutes at the 450 to 550 TFLOPS of an H100.
training: the same sweep on the GPU and on the CPU, synthetic pairs of the sizes of TL;DR, and of
PRISM on the GPU.

With torch 2.11, transformers 5.17 and 16 CPU cores, 2,880 conversations of 149,000 distinct tokens:

                                          H100 80GB               H200
    loading                               2.3 s                   2.4 s; 0.8 GB on the host,
                                                                  15 GB on the GPU
    one at a time, from an eighth         229 s                   161 and 243 s, by the host
    rows, budget 8,192, from an eighth    4,000 distinct tokens/s 4,200
    shared, budget 4,096 to 32,768        29,400 to 31,300        31,200 to 32,400; 15.5 to 19 GB
    a full TL;DR at the default 8,192     13.4 minutes            12.8 minutes
    off one at a time                     rows 4 %, shared 5 %: bfloat16's noise in 32 random layers
    11,520 conversations, whole           21.4 s                  20.1 s
      texts to tokens                     0.7 s                   1.0 s
      the states alone                    19.5 s                  18.8 s
    training, TL;DR's size                                        1.8 s (the CPU 8.9 s); accuracies
                                                                  equal to four digits
    training, PRISM's size                                        4.4 ms an iteration, 20,000 in
                                                                  1.5 minutes

On the H200 the GPU computed 98.5 % of the time between its first and last kernel of 5,000
conversations. Matrix products take 60 % of the kernels' time, flash attention 11 %. A trial took
0.32 s there and 0.47 s beside the H100, 1.9 and 2.8 % of 10,000 such conversations. Most of that is
what the host takes to start five forward passes (one of the five is another now, and no key cache
is filled). With 0.5 GB free, batches of a budget of 32,768 came down to 2,025 tokens, with equal
states. In float32 shared prefixes are within 3e-6 of one by one. Four layers in bfloat16 are as far
from float32 with shared prefixes as alone (2.5 %, the median).
"""

import contextlib
import io
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import lore.batching
import lore.batching_trial
import lore.embedding
import lore.reward_model
import lore.rows
import lore.standin
import utils
from lore.conversations import ID_BYTES, Conversation, token_count

SHAPE = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)
PARAMETERS = 7.0e9  # that a token meets
POSTS, ANSWERS = 192, 15  # answers to each post, as in TL;DR
POST_WORDS, ANSWER_WORDS = 88, 8  # the medians; about 350 and 32 tokens
FULL_TLDR = 24.5e6  # distinct tokens
PARTS = ("loading", "embedding", "training")


class HostMemory(threading.Thread):
    """Measures the most memory that this process holds from the start on, in GB.

    Files that are mapped are not counted.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.02):
            with open("/proc/self/status") as status:
                line = next(line for line in status if line.startswith("RssAnon"))
            kilobytes = int(line.split()[1])
            self.peak = max(self.peak, kilobytes / 1e6)


def timed(function: Callable, *arguments: Any, **options: Any) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = function(*arguments, **options)
    torch.cuda.synchronize()
    return result, time.perf_counter() - began


def fastest(repeats: int, function: Callable, *arguments: Any) -> tuple[Any, float]:
    """What the fastest of several equal calls returns, and its seconds."""
    runs = [timed(function, *arguments) for _ in range(repeats)]
    return min(runs, key=lambda run: run[1])


def gpu_peak() -> float:
    """The most memory that the GPU held since the last reset, in GB."""
    return torch.cuda.max_memory_allocated() / 1e9


def write_checkpoint(folder: Path) -> list[str]:
    """Write a checkpoint of SHAPE in bfloat16, with the stand-in's tokenizer, to folder/model.

    Returns words of its vocabulary.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    texts = []
    for path in sorted((ROOT / "RedditTLDR" / "demo").glob("*.jsonl.gz")):
        texts.extend(str(row) for _, row in lore.rows.read_rows(path))
    lore.standin.build_standin_model(folder / "standin", texts)
    tokenizer = AutoTokenizer.from_pretrained(folder / "standin")
    config = LlamaConfig(**SHAPE, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForSequenceClassification(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model", max_shard_size="4GB")
    tokenizer.save_pretrained(folder / "model")
    return [word for word in tokenizer.get_vocab() if word.isalpha()]


def loading(folder: Path) -> tuple[Any, Any]:
    """Load the checkpoint, print what that takes, and return model and tokenizer."""
    name = str(folder / "model")
    memory = HostMemory()
    torch.cuda.reset_peak_memory_stats()
    (model, tokenizer), seconds = timed(lore.reward_model.load_reward_model, name)
    memory.over.set()
    print(
        f"loading: {seconds:.1f} s; the host holds at most {memory.peak:.1f} GB, the GPU "
        f"{gpu_peak():.1f} GB; scorer {len(model.reward_scorer)}, {model.dtype}"
    )
    _, seconds = timed(lore.reward_model.model_identity, name)
    print(f"identity of the weights: {seconds:.1f} s")
    return model, tokenizer


def embed_sequences(model: Any, sequences: list[bytes], batching: str, budget: int) -> torch.Tensor:
    """The last states of sequences in one shard."""
    shard = lore.batching.Shard(sequences)
    [(_, states)] = lore.batching.last_states(model, [shard], batching, budget)
    return states


def synthetic_conversations(words: list[str], posts: int) -> list[Conversation]:
    """ANSWERS conversations behind each of `posts` prompts, in the shape of TL;DR, shuffled."""
    generator = np.random.default_rng(0)

    def text(median: int) -> str:
        count = int(generator.lognormal(np.log(median), 0.4))
        return " ".join(generator.choice(words, count))

    prompts = [text(POST_WORDS) for _ in range(posts)]
    return [
        [
            {"role": "user", "content": prompts[n % posts]},
            {"role": "assistant", "content": text(ANSWER_WORDS)},
        ]
        for n in generator.permutation(posts * ANSWERS)
    ]


def distinct_tokens(sequences: list[bytes]) -> int:
    """How many tokens are left if every token behind the same tokens is counted once."""
    return len(
        {
            sequence[:end]
            for sequence in sequences
            for end in range(ID_BYTES, len(sequence) + ID_BYTES, ID_BYTES)
        }
    )


def print_batching(
    model: Any, sequences: list[bytes], alone: torch.Tensor, batching: str, budget: int
) -> None:
    """Print speed, memory and error of a batching. alone: the states of the first sequences."""
    torch.cuda.reset_peak_memory_stats()
    states, seconds = fastest(2, embed_sequences, model, sequences, batching, budget)
    tokens = distinct_tokens(sequences)
    rate = tokens / seconds
    alone = alone.float()
    error = (states[: len(alone)].float() - alone).norm(dim=1) / alone.norm(dim=1)
    print(
        f"{batching}, budget {budget}, {len(sequences):,}: {seconds:.2f} s, "
        f"{rate:,.0f} distinct tokens/s, {rate * 2 * PARAMETERS / 1e12:.0f} TFLOPS for these; "
        f"GPU {gpu_peak():.1f} GB; a full TL;DR {FULL_TLDR / rate / 60:.1f} minutes; "
        f"off one by one {error.median():.1e} to {error.max():.1e}"
    )


def embedding(model: Any, tokenizer: Any, words: list[str]) -> None:
    """Print what each batching takes, and the trial that chooses between them."""
    conversations = synthetic_conversations(words, POSTS)
    sequences = list(lore.embedding.distinct_sequences(conversations, tokenizer))
    all_tokens = sum(map(token_count, sequences))
    print(
        f"{len(sequences):,} conversations, {all_tokens:,} tokens, "
        f"{distinct_tokens(sequences):,} distinct"
    )
    few = sequences[: len(sequences) // 8]
    alone, seconds = timed(embed_sequences, model, few, "alone", 1)
    print(f"alone: {seconds * len(sequences) / len(few):.1f} s for all")
    print_batching(model, few, alone, "rows", 8192)
    print_batching(model, few, alone, "rows", 16384)
    print_batching(model, few, alone, "shared", 8192)
    for budget in (4096, 8192, 16384, 32768):
        print_batching(model, sequences, alone, "shared", budget)

    trial, seconds = fastest(3, lore.batching_trial.choose_batching, model, sequences)
    _, shared_seconds = timed(embed_sequences, model, sequences, "shared", 8192)
    seconds_of_10_000 = 10_000 * shared_seconds / len(sequences)
    print(
        f"trial: {seconds:.2f} s, {100 * seconds / seconds_of_10_000:.1f} % of 10,000 such "
        f"conversations: {trial}"
    )
    print_kernels(model, sequences)


def from_texts(model: Any, tokenizer: Any, words: list[str]) -> None:
    """Print what `embed_conversations` takes from texts to embeddings, and its parts."""
    conversations = synthetic_conversations(words, 4 * POSTS)
    sequences, tokenizing = timed(lore.embedding.distinct_sequences, conversations, tokenizer)
    _, computing = fastest(2, embed_sequences, model, list(sequences), "shared", 8192)
    with tempfile.TemporaryDirectory() as cache:
        arguments = (lore.embedding.embed_conversations, conversations, model, tokenizer, cache)
        _, seconds = timed(*arguments)
        _, seconds_again = timed(*arguments)
    print(
        f"embed_conversations, {len(conversations):,}: {seconds:.2f} s, of which tokenizing "
        f"{tokenizing:.2f}; the states alone, in one piece {computing:.2f}; all kept "
        f"{seconds_again:.2f}"
    )


def print_kernels(model: Any, sequences: list[bytes]) -> None:
    """What the GPU's time goes to, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        _, seconds = timed(embed_sequences, model, sequences[:512], "shared", 8192)
    kernels = sorted(profiled.key_averages(), key=lambda kernel: -kernel.device_time_total)
    total = sum(kernel.device_time_total for kernel in kernels)
    print(f"profile: {seconds:.2f} s, kernels {total / 1e6:.2f} s")
    for kernel in kernels[:9]:
        print(f"  {kernel.device_time_total / total:6.1%} {kernel.count:6} {kernel.key[:90]}")


def random_users(counts: list[int]) -> list[torch.Tensor]:
    """Pairs `[m, 4096]` of each user, who leans towards a direction of their own."""
    generator = torch.Generator().manual_seed(0)
    users = []
    for m in counts:
        noise = torch.randn(m, 4096, generator=generator)
        taste = torch.randn(4096, generator=generator)
        users.append(30 * (noise + 0.3 * taste))
    return users


def training() -> None:
    """Print what trainings of the sizes of TL;DR and PRISM take."""
    seen, unseen = random_users([450] * 38), random_users([350] * 38)
    train = [X[:150] for X in seen]
    few_shots = [X[:50] for X in unseen]
    test = [X[50:] for X in unseen]
    V_final = torch.randn(4096, 1, generator=torch.Generator().manual_seed(1))
    results = {}
    for device in ("cuda", "cuda", "cpu"):  # the first run on a GPU loads its libraries
        sizes = (len(seen), len(unseen))
        with contextlib.redirect_stdout(io.StringIO()):
            results[device], seconds = timed(
                utils.run, range(7), [0], V_final, train, test, few_shots, test, *sizes, device
            )
        accuracies = ", ".join(f"{value:.4f}" for value in results[device][3])
        print(f"training, TL;DR's size, {device}: {seconds:.1f} s; accuracies {accuracies}")
    differences = [abs(a - b).max() for a, b in zip(results["cuda"], results["cpu"])]
    print(f"largest difference of an accuracy: {max(differences):.4f}")

    torch.cuda.reset_peak_memory_stats()
    features = random_users([19] * 1030)
    members = [utils.Member(K, 1e4) for K in (1, 5, 10, 15, 20, 25, 50)]
    seconds_of = {}
    for iterations in (20, 420):
        _, seconds_of[iterations] = timed(
            utils.train_bases, features, members, V_final, iterations, 0.5, True, "cuda"
        )
    seconds = (seconds_of[420] - seconds_of[20]) / 400
    print(
        f"training, PRISM's size, cuda: {seconds * 1e3:.1f} ms an iteration, 20,000 take "
        f"{seconds * 20000 / 60:.1f} minutes; GPU {gpu_peak():.1f} GB"
    )


def main() -> None:
    parts = sys.argv[1:] or PARTS
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if "training" in parts:
        training()
    if "loading" in parts or "embedding" in parts:
        with tempfile.TemporaryDirectory() as folder:
            words, seconds = timed(write_checkpoint, Path(folder))
            torch.cuda.empty_cache()
            print(f"checkpoint written: {seconds:.0f} s", flush=True)
            model, tokenizer = loading(Path(folder))
            if "embedding" in parts:
                embedding(model, tokenizer, words)
                from_texts(model, tokenizer, words)


if __name__ == "__main__":
    main()
