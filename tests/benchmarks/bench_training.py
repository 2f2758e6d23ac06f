"""How much faster the engine of utils.py is than a plain loop over users, and its memory.

    python tests/benchmarks/bench_training.py                 all sections: minutes, 4 GB
    python tests/benchmarks/bench_training.py gradient run    only these sections

The sections are memory, personalllm, gradient, run, few-shot, seeds, prism and evaluation.

Prints a line per figure: seconds of ours and of the plain loop, their ratio (the median of the
repeats, and the smallest and largest of them) and the target. Nothing is asserted.

The plain loop below takes one user after the other in every step, a training per rank, autograd
and torch's Adam, and the margin as x (V w_i). Both sides run in this process on the same features,
in turn, so that a busy machine slows both; the kernel has been compiled before. Features are
synthetic: standard normal, as wide as the 8B model's. Neither side's cost depends on their values.
"""

import contextlib
import importlib.util
import io
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity, logsigmoid

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "PersonalLLM")]
import lore.embedding_files
import lore.files
import utils

d = 4096
REPEATS = 5  # of each comparison, ours and plain in turn
TLDR_USERS, TLDR_RANKS = 38, [1, 2, 3, 4, 5, 6]
TLDR_PAIRS = {"train": 150, "test": 100, "train_unseen": 50, "test_unseen": 100}  # of a user
TLDR_ALL_TEST_PAIRS = 1100  # of a user: all 83,802 validation rows over 76 workers
TLDR_ITERATIONS, FEW_SHOT_ITERATIONS = 1000, 500
PERSONAL_USERS, PERSONAL_PAIRS, PERSONAL_RANKS = 1000, 47, [1, 2, 3, 4, 5]
PERSONAL_UNSEEN_USERS, PERSONAL_UNSEEN_PAIRS = 500, 9
PERSONAL_PROMPTS = {"train": 9402, "test": 1000}
PRISM_USERS, PRISM_PAIRS, PRISM_RANKS, PRISM_ALPHA = (
    1030,
    19638 / 1030,
    [1, 5, 10, 15, 20, 25, 50],
    1e4,
)
PRISM_UNSEEN_USERS, PRISM_UNSEEN_PAIRS = 257, 4900 / 257
SMALL_USERS, SMALL_PAIRS, SMALL_WIDTH = 26_000, 20, 64  # of the evaluation of many users

V_SFT = torch.randn(d, 1, generator=torch.Generator().manual_seed(0))


# The plain loop: the formulas of the paper, one user after the other.


def loop_loss(features, W, V, total=None):
    weights = torch.softmax(W, dim=1)
    loss = 0
    for X, w in zip(features, weights):
        loss = loss - logsigmoid(X @ (V @ w) / 100).sum() / (total or len(X))
    return loss


def loop_lore(features, K, num_iterations):
    W, V = torch.randn(len(features), K, requires_grad=True), torch.randn(d, K, requires_grad=True)
    adam = torch.optim.Adam([W, V], lr=0.5)
    for _ in range(num_iterations):
        adam.zero_grad()
        loop_loss(features, W, V).backward()
        adam.step()
    return torch.softmax(W, dim=1).detach(), V.detach()


def loop_few_shot(features, V, num_iterations):
    W = torch.randn(len(features), V.shape[1], requires_grad=True)
    adam = torch.optim.Adam([W], lr=0.1)
    for _ in range(num_iterations):
        adam.zero_grad()
        loop_loss(features, W, V).backward()
        adam.step()
    return torch.softmax(W, dim=1).detach()


def loop_lore_regularized(features, K, num_iterations):
    W, V = torch.rand(len(features), K, requires_grad=True), torch.randn(d, K, requires_grad=True)
    adam_W, adam_V = torch.optim.Adam([W], lr=0.5), torch.optim.Adam([V], lr=0.5)
    total = sum(map(len, features))
    for t in range(num_iterations):
        adam_W.zero_grad()
        loop_loss(features, W, V.detach(), total).backward()
        adam_W.step()
        adam_V.zero_grad()
        share = min(max((t / num_iterations - 0.2) / 0.6, 0), 1)
        penalty = PRISM_ALPHA * share * (1 - cosine_similarity(V, V_SFT, dim=0)).mean()
        (loop_loss(features, W.detach(), V, total) + penalty).backward()
        adam_V.step()


def loop_run(features, iterations, few_shot_iterations):
    """`run` without its printing: one training, one few-shot fit and four evaluations per rank."""
    train, test, train_unseen, test_unseen = features
    for K in TLDR_RANKS:
        w, V = loop_lore(train, K, iterations)
        w_unseen = (
            loop_few_shot(train_unseen, V, few_shot_iterations)
            if K > 1
            else torch.ones(len(train_unseen), 1)
        )
        for part, weights in (
            (train, w),
            (test, w),
            (train_unseen, w_unseen),
            (test_unseen, w_unseen),
        ):
            for X, w_i in zip(part, weights):
                (X @ (V @ w_i) > 0).float().mean().item()


# Ours


def members(ranks, alpha=0.0):
    return [utils.Member(K, alpha) for K in ranks]


def silently(
    pipeline, ranks, features, alpha=0, few_shot_iterations=FEW_SHOT_ITERATIONS, **options
):
    utils.FEW_SHOT_ITERATIONS = few_shot_iterations
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pipeline(
            ranks, [alpha], V_SFT, *features, len(features[0]), len(features[2]), "cpu", **options
        )


# Features, measuring and printing


def users_of(users, pairs):
    """Features of so many users with so many pairs each, or on average."""
    ends = [round(i * pairs) for i in range(users + 1)]
    return list(
        torch.randn(ends[-1], d).split([after - before for before, after in zip(ends, ends[1:])])
    )


def seconds(call, *arguments):
    begin = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begin


def per_iteration(train, iterations):
    """Seconds of one iteration of `train(num_iterations)`, without its beginning and end."""
    return (seconds(train, iterations) - seconds(train, 0)) / iterations


def compare(figure, ours, plain, target, repeats=REPEATS):
    """A line of the table: what `ours()` and `plain()` report, in turn, after a call to warm up."""
    if repeats > 1:
        ours(), plain()
    pairs = [(ours(), plain()) for _ in range(repeats)]
    line(figure, *map(statistics.median, zip(*pairs)), [b / a for a, b in pairs], f">= {target:g}")


def line(figure, one, other, ratios, target, unit="s"):
    spread = f" ({min(ratios):.1f} .. {max(ratios):.1f})" if len(ratios) > 1 else ""
    ratio = f"{statistics.median(ratios):.2f}{spread}"
    print(
        f"{figure:<52} {one:>9.4g} {unit:<2} {other:>9.4g} {unit:<2} {ratio:<22} {target}",
        flush=True,
    )


def heading(title):
    print(
        f"\n{title}\n{'':<52} {'ours':>9} {'':<2} {'plain':>9}    "
        f"{'ratio (min .. max)':<22} target",
        flush=True,
    )


# The figures


def gradient():
    heading(
        "One gradient, by W and by V. Ours: all ranks together; plain: a loop over users per rank"
    )
    for figure, users, pairs, ranks, target in (
        ("38 x 150, K = 1..6", TLDR_USERS, TLDR_PAIRS["train"], TLDR_RANKS, 0),
        ("1000 x 47, K = 5", PERSONAL_USERS, PERSONAL_PAIRS, [5], 0),
        ("1000 x 47, K = 1..5", PERSONAL_USERS, PERSONAL_PAIRS, PERSONAL_RANKS, 0),
        ("PRISM's 19,638 pairs, seven ranks", PRISM_USERS, PRISM_PAIRS, PRISM_RANKS, 0),
    ):
        features = users_of(users, pairs)
        X = torch.cat(features)
        likelihood = utils.Likelihood(list(map(len, features)), ranks, X.device)
        W, V = torch.randn(users, sum(ranks)), torch.randn(sum(ranks), d)

        def plain():
            for logits, basis in zip(W.split(ranks, 1), V.split(ranks)):
                logits, basis = logits.clone().requires_grad_(), basis.T.clone().requires_grad_()
                loop_loss(features, logits, basis).backward()

        w = likelihood.weights(W)
        compare(figure, lambda: seconds(likelihood.kernel, X, w, V), lambda: seconds(plain), target)
        compare(
            "    the plain way of utils.py",
            lambda: seconds(likelihood.plain, X, w, V),
            lambda: seconds(plain),
            target,
        )


def run():
    heading(
        f"`run` at TL;DR's size, 2 x {TLDR_USERS} users, K = 1..6, {TLDR_ITERATIONS} + "
        f"{FEW_SHOT_ITERATIONS} iterations. Ours: measured whole; plain:\nevaluation measured, "
        "trainings extrapolated from 2 iterations each"
    )
    features = [users_of(TLDR_USERS, pairs) for pairs in TLDR_PAIRS.values()]

    def plain():
        fits = sum(per_iteration(lambda n: loop_lore(features[0], K, n), 2) for K in TLDR_RANKS)
        few = sum(
            per_iteration(lambda n: loop_few_shot(features[2], torch.randn(d, K), n), 2)
            for K in TLDR_RANKS[1:]
        )
        return (
            TLDR_ITERATIONS * fits + FEW_SHOT_ITERATIONS * few + seconds(loop_run, features, 0, 0)
        )

    silently(
        utils.run, [1], features, num_iterations=2
    )  # compiles; imports what the first Adam needs
    compare(
        "run, training + few-shot + evaluation",
        lambda: seconds(lambda: silently(utils.run, TLDR_RANKS, features)),
        plain,
        12,
        repeats=1,
    )


def few_shot():
    heading(
        f"Few-shot fit, {PERSONAL_UNSEEN_USERS} users x {PERSONAL_UNSEEN_PAIRS} pairs, K = 5, "
        f"{FEW_SHOT_ITERATIONS} iterations.\nOurs: measured whole, with X V; plain: extrapolated "
        "from 5"
    )
    features, V = users_of(PERSONAL_UNSEEN_USERS, PERSONAL_UNSEEN_PAIRS), torch.randn(d, 5)
    compare(
        "few-shot fit",
        lambda: seconds(lambda: utils.PersonalizeBatch(len(features), d, 5).train(features, V)),
        lambda: FEW_SHOT_ITERATIONS * per_iteration(lambda n: loop_few_shot(features, V, n), 5),
        50,
    )


def seeds():
    heading(
        "Five seeds of the K = 1..6 sweep against one, ours in both columns: `run` with a tenth of "
        "its iterations"
    )
    features = [users_of(TLDR_USERS, pairs) for pairs in TLDR_PAIRS.values()]

    def part(seed):
        return seconds(
            lambda: silently(
                utils.run,
                TLDR_RANKS,
                features,
                few_shot_iterations=FEW_SHOT_ITERATIONS // 10,
                num_iterations=TLDR_ITERATIONS // 10,
                seed=seed,
            )
        )

    part([0])
    found = [(part([0]), part([0, 1, 2, 3, 4])) for _ in range(REPEATS)]
    line(
        "run, one seed; five",
        *map(statistics.median, zip(*found)),
        [b / a for a, b in found],
        "<= 3.5",
    )


def prism():
    heading(
        f"PRISM, {PRISM_USERS} users, {PRISM_USERS * PRISM_PAIRS:,.0f} pairs, ranks {PRISM_RANKS}. "
        "Measured: one iteration\nof the sweep, a step on W and one on V, the mean of 6 (plain: 1)"
    )
    features = users_of(PRISM_USERS, PRISM_PAIRS)
    compare(
        "alternating sweep",
        lambda: per_iteration(
            lambda n: utils.train_bases(
                features, members(PRISM_RANKS, PRISM_ALPHA), V_SFT, n, 0.5, regularized=True
            ),
            6,
        ),
        lambda: sum(
            per_iteration(lambda n: loop_lore_regularized(features, K, n), 1) for K in PRISM_RANKS
        ),
        0,
    )


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def alone(work, *arguments):
    """What `work` reports, in a fresh process: a forked one inherits the peak of its parent."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def memory_of(sizes, ranks, pipeline, alpha):
    features = [[X for users, pairs in part for X in users_of(users, pairs)] for part in sizes]
    silently(getattr(utils, pipeline), ranks, features, alpha, 3, num_iterations=3)
    return sum(X.nbytes for part in features for X in part), peak_bytes()


def memory():
    print(
        "\nPeak memory of the pipelines (3 iterations)\n"
        f"{'':<52} {'peak':>9}    {'features':>9}    {'(peak - allowed) / features':<22} target"
    )
    tldr = [
        [
            [(TLDR_USERS, TLDR_ALL_TEST_PAIRS if tests and "test" in part else pairs)]
            for part, pairs in TLDR_PAIRS.items()
        ]
        for tests in (False, True)
    ]
    for figure, sizes, ranks, pipeline, alpha, allowed in (
        ("TL;DR, 100 test pairs a user, 0.5 GB allowed", tldr[0], TLDR_RANKS, "run", 0, 0.5),
        ("TL;DR, 1100 test pairs a user, 0.5 GB allowed", tldr[1], TLDR_RANKS, "run", 0, 0.5),
        (
            "PRISM, 1 GB allowed",
            [[(PRISM_USERS, PRISM_PAIRS)]] * 2 + [[(PRISM_UNSEEN_USERS, PRISM_UNSEEN_PAIRS)]] * 2,
            PRISM_RANKS,
            "run_regularized",
            PRISM_ALPHA,
            1,
        ),
    ):
        features, peak = (value / 1e9 for value in alone(memory_of, sizes, ranks, pipeline, alpha))
        line(figure, peak, features, [(peak - allowed) / features], "<= 1.5", "GB")


def write_personalllm(folder):
    import personalllm

    for name, prompts in zip(personalllm.FILES, PERSONAL_PROMPTS.values()):
        embeddings = torch.empty(8 * prompts, d, dtype=torch.bfloat16)
        for part in embeddings.split(8192):
            part.copy_(torch.randn(part.shape))
        lore.files.save_tensors(
            folder / name, {"embeddings": embeddings, "scores": torch.randn(prompts, 8, 10)}
        )
    lore.files.save_tensors(
        folder / lore.embedding_files.HEAD_FILE,
        {"reward_head": V_SFT},
        model="random",
        data="synthetic benchmark",
    )


def train_personalllm(folder):
    """main() of train_basis.py with few iterations -> peak bytes, seconds, those of evaluation."""
    spec = importlib.util.spec_from_file_location(
        "train_basis", ROOT / "PersonalLLM" / "train_basis.py"
    )
    script = importlib.util.module_from_spec(spec)
    evaluate = utils.accuracies_per_user
    spent = []
    spec.loader.exec_module(script)

    def timed(*arguments):
        begin = time.perf_counter()
        found = evaluate(*arguments)
        spent.append(time.perf_counter() - begin)
        return found

    script.num_iterations = 5
    utils.accuracies_per_user = timed
    sys.argv = ["train_basis.py", "--dir", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()):
        total = seconds(script.main)
    return peak_bytes(), total, sum(spent)


def personal():
    with tempfile.TemporaryDirectory() as folder:
        alone(write_personalllm, Path(folder))
        peak, total, evaluation = alone(train_personalllm, Path(folder))
    print(
        "\nPersonalLLM/train_basis.py as a whole at its published size, 5 iterations: "
        f"{total:.1f} s, "
        f"of which evaluation {evaluation:.2f} s (target 60), peak memory {peak / 1e9:.2f} GB "
        "(target 8)"
    )


def evaluation():
    heading(
        f"Evaluation of {SMALL_USERS:,} users x {SMALL_PAIRS} pairs, d = {SMALL_WIDTH}, K = 1..6. "
        "Plain: a small product per user"
    )
    features = list(torch.randn(SMALL_USERS * SMALL_PAIRS, SMALL_WIDTH).split(SMALL_PAIRS))
    bases = [torch.randn(SMALL_WIDTH, K) for K in TLDR_RANKS]
    weights = [torch.randn(SMALL_USERS, K) for K in TLDR_RANKS]

    def plain():
        for V, W in zip(bases, weights):
            for X, w in zip(features, W):
                (X @ (V @ w) > 0).float().mean()

    compare(
        "accuracies",
        lambda: seconds(utils.accuracies_per_user, features, bases, weights),
        lambda: seconds(plain),
        1,
        repeats=3,
    )


SECTIONS = {
    "memory": memory,
    "personalllm": personal,
    "gradient": gradient,
    "run": run,
    "few-shot": few_shot,
    "seeds": seeds,
    "prism": prism,
    "evaluation": evaluation,
}


def main():
    print(
        f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; d = {d}, "
        "synthetic features, float32"
    )
    chosen = sys.argv[1:] or list(SECTIONS)
    if not set(chosen) <= set(SECTIONS):
        sys.exit(f"sections: {' '.join(SECTIONS)}")
    for name, section in SECTIONS.items():
        if name in chosen:
            torch.manual_seed(0)
            section()


if __name__ == "__main__":
    main()
