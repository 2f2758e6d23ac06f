"""How much faster the training engine of utils.py is than a plain loop over users, and how much memory `run` takes.

    python tests/benchmarks/bench_training.py             all sections, about 5 minutes on 2 cores
    python tests/benchmarks/bench_training.py memory run  only these; of memory, run, training, few-shot, seeds, prism

Prints a line per figure: seconds of ours and of the plain loop, their ratio (the median of the repeats, and the
smallest and largest of them), the target it is held against, and how many CPUs other processes kept busy meanwhile
(Linux). On a busy machine more repeats are made, while time allows, and the least disturbed are kept. Nothing is
asserted, the exit status is 0.

The plain loop stands below: in every step one user after the other, a training per rank, autograd and torch's Adam.
Both sides run in this process on the same features, in turn, so that a busy machine slows both. Features are
synthetic: standard normal, as wide as the 8B model's; neither side's cost depends on their values.
"""

import contextlib
import io
import multiprocessing
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity, logsigmoid

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import utils  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
d = 4096
REPEATS = 5  # of each comparison, ours and plain in turn
MOST_SECONDS = 35  # of a comparison; then it is content with fewer, or more disturbed, repeats
QUIET = 0.1  # CPUs that other processes may keep busy in an undisturbed repeat

# Reddit TL;DR
TLDR_USERS = 38  # seen, and as many unseen
TLDR_PAIRS = {"train": 150, "test": 100, "train_unseen": 50, "test_unseen": 100}  # of a user
TLDR_ALL_TEST_PAIRS = 1100  # of a user: all 83,802 validation rows over 76 workers
TLDR_RANKS = [1, 2, 3, 4, 5, 6]
TLDR_ITERATIONS, FEW_SHOT_ITERATIONS = 1000, 500

# PersonalLLM
PERSONAL_USERS, PERSONAL_PAIRS = 1000, 47
PERSONAL_UNSEEN_USERS, PERSONAL_UNSEEN_PAIRS = 500, 9
PERSONAL_TEST_PAIRS = 10  # of a user, in the memory section
PERSONAL_RANKS = [1, 2, 3, 4, 5]

# PRISM
PRISM_USERS, PRISM_PAIRS, PRISM_TEST_PAIRS = 1030, 19638, 19727
PRISM_UNSEEN_USERS, PRISM_UNSEEN_PAIRS = 257, 4900
PRISM_RANKS = [0, 1, 5, 10, 15, 20, 25, 50]  # rank 0 is the reference model: neither side trains it
PRISM_ALPHA = 1e4
# ---------------------------------------------------------------------------------------------------------------------

V_SFT = torch.randn(d, 1, generator=torch.Generator().manual_seed(0))


# The plain loop: the formulas of the paper, one user after the other.


def plain_lore(features, K, num_iterations, learning_rate=0.5):
    """LoRe at one rank -> (softmax(W) `[N, K]`, V `[d, K]`)."""
    W = torch.randn(len(features), K, requires_grad=True)
    V = torch.randn(d, K, requires_grad=True)
    optimizer = torch.optim.Adam([W, V], lr=learning_rate)
    for _ in range(num_iterations):
        optimizer.zero_grad()
        weights = torch.softmax(W, dim=1)
        loss = 0
        for i, X in enumerate(features):
            loss = loss - logsigmoid(X @ V @ weights[i] / 100).mean()
        loss.backward()
        optimizer.step()
    return torch.softmax(W, dim=1).detach(), V.detach()


def plain_few_shot(features, V, num_iterations, learning_rate=0.1):
    """Weights of new users, V frozen -> `[N, K]`."""
    W = torch.randn(len(features), V.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([W], lr=learning_rate)
    for _ in range(num_iterations):
        optimizer.zero_grad()
        weights = torch.softmax(W, dim=1)
        loss = 0
        for i, X in enumerate(features):
            loss = loss - logsigmoid(X @ V @ weights[i] / 100).mean()
        loss.backward()
        optimizer.step()
    return torch.softmax(W, dim=1).detach()


def plain_lore_regularized(features, K, num_iterations, learning_rate=0.5):
    """LoRe_regularized at one rank: in each iteration a step on W, V fixed, then one on V, W fixed."""
    W = torch.rand(len(features), K, requires_grad=True)
    V = torch.randn(d, K, requires_grad=True)
    optimizer_W = torch.optim.Adam([W], lr=learning_rate)
    optimizer_V = torch.optim.Adam([V], lr=learning_rate)
    pairs = sum(len(X) for X in features)

    def negative_log_likelihood(W, V):
        weights = torch.softmax(W, dim=1)
        loss = 0
        for i, X in enumerate(features):
            loss = loss - logsigmoid(X @ V @ weights[i] / 100).sum()
        return loss / pairs

    for t in range(num_iterations):
        optimizer_W.zero_grad()
        negative_log_likelihood(W, V.detach()).backward()
        optimizer_W.step()
        optimizer_V.zero_grad()
        alpha = PRISM_ALPHA * min(max((t / num_iterations - 0.2) / 0.6, 0), 1)
        penalty = (1 - cosine_similarity(V, V_SFT, dim=0)).mean()
        (negative_log_likelihood(W.detach(), V) + alpha * penalty).backward()
        optimizer_V.step()


def plain_run(K_list, train, test, train_unseen, test_unseen, num_iterations, few_shot_iterations):
    """`run` without its printing: one training, one few-shot fit and four evaluations per rank."""
    for K in K_list:
        w, V = plain_lore(train, K, num_iterations)
        w_unseen = torch.ones(len(train_unseen), 1)
        if K > 1:
            w_unseen = plain_few_shot(train_unseen, V, few_shot_iterations)
        for features, weights in ((train, w), (test, w), (train_unseen, w_unseen), (test_unseen, w_unseen)):
            for X, w_i in zip(features, weights):
                (X @ V @ w_i > 0).float().mean().item()


# Ours


def members(K_list, seeds=(0,), alpha=0.0):
    """One member of the sweep per rank that trains, and seed."""
    return [utils.Member(K, alpha, seed) for K in K_list if K > 0 for seed in seeds]


def run_silently(K_list, features, num_iterations, few_shot_iterations, pipeline=utils.run, **options):
    """`utils.run` with another number of few-shot iterations than its constant, without its printing."""
    utils.FEW_SHOT_ITERATIONS = few_shot_iterations
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pipeline(K_list, options.pop("alpha_list", [0]), V_SFT, *features, len(features[0]), len(features[2]), "cpu",
                 num_iterations=num_iterations, **options)


# Features and measuring


def slices(users, pairs):
    """Features of `users` users with `pairs` pairs each: slices of one matrix."""
    return list(torch.randn(users * pairs, d).split(pairs))


def shared_out(users, pairs):
    """`pairs` pairs in all, shared out among the users as evenly as it goes -> list of sizes."""
    return [pairs // users + (i < pairs % users) for i in range(users)]


def tldr_features():
    return [slices(TLDR_USERS, pairs) for pairs in TLDR_PAIRS.values()]


def seconds(call, *arguments):
    begin = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begin


def per_iteration(train, iterations):
    """Seconds of one iteration of `train(num_iterations)`, without what it does before the first and after the last."""
    return (seconds(train, iterations) - seconds(train, 0)) / iterations


def in_turn(one, other):
    """What `one()` and `other()` report, in turn, after a first call of each that does not count.

    Returns (values of one, values of other, CPUs that other processes kept busy), of the REPEATS least disturbed.
    """
    one(), other()
    repeats, begin = [], time.perf_counter()
    while sum(busy < QUIET for busy, *_ in repeats) < REPEATS and (
            len(repeats) < 2 or time.perf_counter() - begin < MOST_SECONDS):
        before, others = time.perf_counter(), others_seconds()
        values = one(), other()
        repeats.append(((others_seconds() - others) / (time.perf_counter() - before), *values))
    busy, *values = zip(*sorted(repeats)[:REPEATS])
    return *values, statistics.median(busy)


def print_heading(title):
    print(f"\n{title}\n{'':<48} {'ours':>9} {'plain':>9}   {'ratio (min .. max)':<24} target", flush=True)


def print_speedup(figure, ours, plain, busy, target):
    """A line of the table; ours and plain: one measurement per repeat."""
    ratios = [b / a for a, b in zip(ours, plain)]
    print_figure(figure, duration(statistics.median(ours)), duration(statistics.median(plain)), ratios,
                 f">= {target:g}", statistics.median(ratios) >= target, busy)


def print_figure(figure, ours, plain, ratios, target, reached, busy=None):
    spread = f" ({min(ratios):.1f} .. {max(ratios):.1f})" if len(ratios) > 1 else ""
    print(f"{figure:<48} {ours:>9} {plain:>9}   {f'{statistics.median(ratios):.2f}{spread}':<24} "
          f"{target:<7} {'reached' if reached else 'NOT REACHED':<11}"
          + (f"  others {busy:.2f}{', too busy to tell' if busy > 5 * QUIET else ''}" if busy is not None else ""),
          flush=True)


def others_seconds():
    """CPU seconds that other processes have used since this machine started (Linux; elsewhere 0)."""
    if not os.path.exists("/proc/stat"):
        return 0.0
    ticks = list(map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]))
    used = sum(ticks) - ticks[3] - ticks[4]  # without idle, without waiting for a disk
    return used / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])  # ours, and our finished children's


def duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


# The figures


def peak_bytes():
    """The peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_of_run(sizes, K_list, pipeline, options):
    """In a process of its own: bytes of the features, and the peak resident bytes."""
    features = [[torch.randn(pairs, d) for pairs in part] for part in sizes]
    run_silently(K_list, features, 3, 3, getattr(utils, pipeline), **options)
    return sum(X.nbytes for part in features for X in part), peak_bytes()


def bench_memory(figure, sizes, K_list, allowance, pipeline="run", **options):
    """Peak memory against the bytes of the features. A process inherits the peak of the one that starts it: run this
    before anything large has been allocated here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        features, peak = pool.submit(memory_of_run, sizes, K_list, pipeline, options).result()
    ratio = (peak - allowance) / features
    print_figure(figure, f"{peak / 1e6:.0f} MB", f"{features / 1e6:.0f} MB", [ratio], "<= 1.5", ratio <= 1.5)


def memory():
    print("\nPeak memory of `run` (3 iterations): (peak - allowance) / bytes of features; training copies those "
          "of the\nseen users' train pairs once, into its own layout")
    print(f"{'':<48} {'peak':>9} {'features':>9}   {'ratio':<24} target")
    for tests in (TLDR_PAIRS["test"], TLDR_ALL_TEST_PAIRS):
        pairs = {**TLDR_PAIRS, "test": tests, "test_unseen": tests}
        bench_memory(f"TL;DR, {tests} test pairs a user, - 500 MB",
                     [[of_user] * TLDR_USERS for of_user in pairs.values()], TLDR_RANKS, 500e6)
    sizes = [[PERSONAL_PAIRS] * PERSONAL_USERS, [PERSONAL_TEST_PAIRS] * PERSONAL_USERS,
             [PERSONAL_UNSEEN_PAIRS] * PERSONAL_UNSEEN_USERS, [PERSONAL_TEST_PAIRS] * PERSONAL_UNSEEN_USERS]
    bench_memory(f"{PERSONAL_USERS} x {PERSONAL_PAIRS}, - 500 MB", sizes, PERSONAL_RANKS, 500e6)
    unseen = shared_out(PRISM_UNSEEN_USERS, PRISM_UNSEEN_PAIRS)
    bench_memory("PRISM, `run_regularized`, - 1 GB",
                 [shared_out(PRISM_USERS, PRISM_PAIRS), shared_out(PRISM_USERS, PRISM_TEST_PAIRS), unseen, unseen],
                 PRISM_RANKS, 1e9, "run_regularized", alpha_list=[PRISM_ALPHA])


def run():
    print_heading(f"`run` as a whole, TL;DR: 2 x {TLDR_USERS} users, K = 1..6, {TLDR_ITERATIONS} + "
                  f"{FEW_SHOT_ITERATIONS} iterations. Ours: measured whole;\nplain: evaluation measured, training and "
                  "few-shot fits extrapolated from 2 iterations each")
    features = tldr_features()

    def plain():
        plain_lore(features[0], 1, 1)  # the first use of torch.optim imports for a second, which is no iteration's
        fits = TLDR_ITERATIONS * sum(per_iteration(lambda n: plain_lore(features[0], K, n), 2) for K in TLDR_RANKS)
        few_shot_fits = FEW_SHOT_ITERATIONS * sum(
            per_iteration(lambda n: plain_few_shot(features[2], torch.randn(d, K), n), 2) for K in TLDR_RANKS if K > 1)
        return fits + few_shot_fits + seconds(plain_run, TLDR_RANKS, *features, 0, 0)

    ours = [seconds(run_silently, TLDR_RANKS, features, TLDR_ITERATIONS, FEW_SHOT_ITERATIONS)]
    print_speedup("run, training + few-shot + evaluation", ours, [plain()], None, 4)


def training():
    print_heading(f"Training, {PERSONAL_USERS} users x {PERSONAL_PAIRS} pairs. Measured: one iteration, the mean of 12 "
                  "(plain: 2)")
    features = slices(PERSONAL_USERS, PERSONAL_PAIRS)
    for figure, ranks, target in (("one rank, K = 5", [5], 6), ("sweep, K = 1..5", PERSONAL_RANKS, 25)):
        times = in_turn(
            lambda: per_iteration(lambda n: utils.fit_basis(features, members(ranks), None, n, 0.5), 12),
            lambda: sum(per_iteration(lambda n: plain_lore(features, K, n), 2) for K in ranks))
        print_speedup(figure, *times, target)


def few_shot():
    print_heading(f"Few-shot fit, {PERSONAL_UNSEEN_USERS} users x {PERSONAL_UNSEEN_PAIRS} pairs, "
                  f"{FEW_SHOT_ITERATIONS} iterations. Ours: measured as a whole, with X V; plain:\nextrapolated from 5")
    features, V = slices(PERSONAL_UNSEEN_USERS, PERSONAL_UNSEEN_PAIRS), torch.randn(d, 5)
    times = in_turn(lambda: seconds(utils.fit_users, features, members([5]), [V], FEW_SHOT_ITERATIONS, 0.1),
                          lambda: FEW_SHOT_ITERATIONS * per_iteration(lambda n: plain_few_shot(features, V, n), 5))
    print_speedup("few-shot fit, K = 5", *times, 50)


def seeds():
    print(f"\nFive seeds of the K = 1..6 sweep, TL;DR, ours in both columns: `run` with a tenth of its iterations and "
          f"the whole\nevaluation\n{'':<48} {'five':>9} {'one':>9}   {'ratio (min .. max)':<24} target", flush=True)
    features = tldr_features()

    def part_of_run(seed):
        return seconds(lambda: run_silently(TLDR_RANKS, features, TLDR_ITERATIONS // 10, FEW_SHOT_ITERATIONS // 10,
                                            seed=seed))

    five, one, busy = in_turn(lambda: part_of_run([0, 1, 2, 3, 4]), lambda: part_of_run([0]))
    ratios = [a / b for a, b in zip(five, one)]
    print_figure("run", duration(statistics.median(five)), duration(statistics.median(one)), ratios, "<= 3.5",
                 statistics.median(ratios) <= 3.5, busy)


def prism():
    print_heading(f"PRISM, {PRISM_USERS} users, {PRISM_PAIRS} pairs, eight ranks {PRISM_RANKS} (0 trains nothing).\n"
                  "Measured: one iteration of the sweep, a step on W and one on V, the mean of 6 (plain: 1)")
    features = list(torch.randn(PRISM_PAIRS, d).split(shared_out(PRISM_USERS, PRISM_PAIRS)))
    times = in_turn(
        lambda: per_iteration(lambda n: utils.fit_basis(features, members(PRISM_RANKS, alpha=PRISM_ALPHA), V_SFT, n,
                                                        0.5, regularized=True), 6),
        lambda: sum(per_iteration(lambda n: plain_lore_regularized(features, K, n), 1) for K in PRISM_RANKS if K > 0))
    print_speedup("alternating sweep", *times, 40)


SECTIONS = {"memory": memory, "run": run, "training": training, "few-shot": few_shot, "seeds": seeds, "prism": prism}


def main():
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\ntorch {torch.__version__}, "
          f"{torch.get_num_threads()} threads\nd = {d}, synthetic features, float32, median of up to {REPEATS} repeats")
    chosen = sys.argv[1:] or list(SECTIONS)
    if not set(chosen) <= set(SECTIONS):
        sys.exit(f"sections: {' '.join(SECTIONS)}")
    begin = time.perf_counter()
    for name, section in SECTIONS.items():  # memory first, see bench_memory
        if name in chosen:
            torch.manual_seed(0)
            section()
    print(f"\n{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
