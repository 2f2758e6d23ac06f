"""Memory and seconds of `utils.run` in 1, 2 and 4 processes of torchrun, on one mapped table.

    python tests/benchmarks/bench_processes.py                          minutes, 2 GB of disk
    python tests/benchmarks/bench_processes.py --users 2000             a tenth
    python tests/benchmarks/bench_processes.py --utils FILE             another utils.py

The data are synthetic: every user has 50 pairs, and each pair two rows of its own in a table of
random bfloat16 numbers, a safetensors file that is mapped. Nine of ten users are seen.

Memory is that of a process beyond what it has after the libraries are loaded and have trained a
tiny model once. `own` is the peak of what belongs to the largest process alone. `mapped` is the
peak of all mapped pages of the table, divided by the number of processes: these pages are there
once for all processes, and are dropped when memory is short. Both are watched from outside, many
times a second. `X` is a process's share of the training pairs in float32. Seconds are those of the
slowest process. Nothing is asserted.

On 2 CPUs, a million pairs of 20,000 users, d = 512, K = 1..5, 20 iterations (one process had busy
neighbours, so its seconds say little; without any, two processes of one thread each are about as
fast as one of two threads):

    processes      X    own mapped MB a process;  check  train    fit  judge s
            1   1659   1705   2120                 4.86  28.54   3.31   6.15
            2    829    909   1536                 1.28   7.93   1.47   2.53
            4    415    450    528                 1.07   6.81   1.62   2.33

Losses differ from those of one process by at most 2.4e-7 of them, mean accuracies by 1.2e-6.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 50  # of a user
SEEN_SHARE = 0.9
SEEN_TRAIN, UNSEEN_TRAIN = 45, 10  # of a user's pairs; the others are for the test
RANKS = [1, 2, 3, 4, 5]
TIMED = ("check_features", "train_bases", "_fit_unseen", "sweep")  # functions of utils.py


# ---- The data


def write_table(path: Path, users: int, width: int) -> None:
    """A table with two rows of each pair, the chosen ones a little along one direction."""
    table = torch.empty(2 * users * PAIRS, width, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for rows in table.split(2**15):
        noise = torch.randn(len(rows), width, generator=generator)
        noise[::2] += 0.1
        rows.copy_(30 * noise)
    save_file({"embeddings": table}, path)


def features_of(table: torch.Tensor, utils: ModuleType) -> list[list]:
    """The four lists of features that `run` takes."""
    users = len(table) // (2 * PAIRS)
    seen = round(SEEN_SHARE * users)
    parts = [[], [], [], []]
    for user in range(users):
        chosen = 2 * (user * PAIRS + torch.arange(PAIRS))
        pairs = utils.Pairs(table, chosen, chosen + 1)
        first = 0 if user < seen else 2
        count = SEEN_TRAIN if user < seen else UNSEEN_TRAIN
        parts[first].append(pairs[:count])
        parts[first + 1].append(pairs[count:])
    return parts


# ---- In each process


def memory_of(process: int) -> tuple[int, int]:
    """What a process has in memory, in bytes: of its own, and its share of mapped pages."""
    rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    lines = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("Pss_Anon", "Pss_File"))


def load_utils(path: Path) -> ModuleType:
    """A utils.py as the module `utils`."""
    spec = importlib.util.spec_from_file_location("utils", path)
    utils = importlib.util.module_from_spec(spec)
    sys.modules["utils"] = utils
    spec.loader.exec_module(utils)
    return utils


def timed(utils: ModuleType, name: str, seconds: dict[str, float]) -> None:
    """Add up the seconds that a function of utils.py takes."""
    function = getattr(utils, name)

    def call(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = function(*arguments, **options)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
        return result

    setattr(utils, name, call)


def measure(folder: Path, utils_file: Path, iterations: int) -> None:
    """Run in one process of torchrun; write what it took to `folder`, a file for each process."""
    utils = load_utils(utils_file)

    def run(features: list[list], iterations: int) -> Any:
        counts = len(features[0]), len(features[2])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return utils.run(RANKS, [0], None, *features, *counts, "cpu", 0, iterations)

    tiny = [[torch.randn(9, 8) for _ in range(8)] for _ in range(4)]
    kernel_numbers = utils.KERNEL_NUMBERS
    utils.KERNEL_NUMBERS = 0  # so that the kernel is compiled before memory is measured
    run(tiny, 2)
    utils.KERNEL_NUMBERS = kernel_numbers

    with safe_open(folder / "table.safetensors", "pt") as file:
        table = file.get_tensor("embeddings")
        features = features_of(table, utils)
    name = f"{utils.process_rank()}.json"
    at_start = memory_of(os.getpid())
    (folder / f"started_{name}").write_text(json.dumps([os.getpid(), *at_start]))

    seconds = {}
    for function in TIMED:
        timed(utils, function, seconds)
    fits = run(features, iterations).fits
    losses = [fit.loss for fit in fits]
    accuracies = [[of.mean() for of in fit.accuracies.values()] for fit in fits]
    result = {"seconds": seconds, "losses": losses, "accuracies": accuracies}
    (folder / f"ended_{name}").write_text(json.dumps(result))


# ---- From outside


def watch(folder: Path, count: int, arguments: list[str]) -> tuple[list[dict], int, float]:
    """Run `measure` in so many processes -> (what each wrote, peaks of memory: own, mapped)."""
    for path in folder.glob("*.json"):
        path.unlink()
    launcher = [sys.executable]
    environment = dict(os.environ)
    if count > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // count))
    command = [*launcher, __file__, *arguments, "--measure", str(folder)]
    running = subprocess.Popen(command, env=environment)
    own_peak = mapped_peak = 0
    while running.poll() is None:
        grown = list(growth(folder))  # of each process: own, mapped
        own_peak = max([own_peak, *(own for own, _ in grown)])
        mapped_peak = max(mapped_peak, sum(mapped for _, mapped in grown) / count)
        time.sleep(0.02)
    if running.returncode:
        sys.exit(running.returncode)
    ended = [json.loads((folder / f"ended_{rank}.json").read_text()) for rank in range(count)]
    return ended, own_peak, mapped_peak


def growth(folder: Path) -> Iterator[tuple[int, int]]:
    """How much memory each process has beyond its start; nothing of one that has ended."""
    for path in folder.glob("started_*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # not written yet, or ended
            process, *at_start = json.loads(path.read_text())
            own, mapped = memory_of(process)
            yield own - at_start[0], mapped - at_start[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--utils", type=Path, default=ROOT / "utils.py")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.utils, args.iterations)
        return

    print(
        f"{args.users * PAIRS:,} pairs of {args.users:,} users, d = {args.width}, synthetic; ranks "
        f"{RANKS}, {args.iterations} iterations; {os.cpu_count()} CPUs, torch {torch.__version__}\n"
        f"{'processes':>9} {'X':>6} {'own':>6} {'mapped':>6} MB a process; {'check':>6} "
        f"{'train':>6} {'fit':>6} {'judge':>6} s; loss, accuracy: largest difference from the first"
    )
    arguments = [f"--iterations={args.iterations}", f"--utils={args.utils}"]
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "table.safetensors", args.users, args.width)
        first = None
        for count in args.processes:
            ended, own, mapped = watch(Path(folder), count, arguments)
            first = first or ended[0]
            X = SEEN_SHARE * args.users * SEEN_TRAIN * args.width * 4 / count
            memory = " ".join(f"{size / 1e6:>6.0f}" for size in (X, own, mapped))
            print(f"{count:>9} {memory} {'':>13} {line(ended, first)}", flush=True)


def line(ended: list[dict], first: dict) -> str:
    """Seconds of the slowest process, and how far results are from those of one process."""
    slowest = {name: max(e["seconds"][name] for e in ended) for name in first["seconds"]}
    check, train, fit, whole = (slowest[name] for name in TIMED)
    judge = whole - check - train - fit
    seconds = " ".join(f"{value:>6.2f}" for value in (check, train, fit, judge))
    losses = [max(abs(a / b - 1) for a, b in zip(e["losses"], first["losses"])) for e in ended]
    accuracies = torch.tensor([e["accuracies"] for e in ended], dtype=torch.float64)
    difference = accuracies - torch.tensor(first["accuracies"], dtype=torch.float64)
    return f"{seconds}    {max(losses):.1e}, {difference.abs().max():.1e}"


if __name__ == "__main__":
    main()
