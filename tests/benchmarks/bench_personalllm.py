"""PersonalLLM at its published size: memory, evaluation, and one training iteration against a plain per-user loop.

    python tests/benchmarks/bench_personalllm.py             some minutes on two cores, 4 GB of memory

Embeddings (75,216 + 8,000 rows, d = 4096, bfloat16) and scores are random and so synthetic; users, pairs, training and
evaluation are those of PersonalLLM/train_basis.py with its own constants, K_list = [0, 1, 2, 3, 4, 5].
"""

import contextlib
import io
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent)]
import utils
from bench_training import (V_SFT, d, duration, in_turn, members, peak_bytes, per_iteration, plain_lore,
                            print_figure, print_heading, print_speedup)
from helpers import load_script

# ---------------------------------------------------------------------------------------------------------------------
PROMPTS = {"train": 9402, "test": 1000}
ITERATIONS = 5  # of the training in the memory section: its peak does not depend on them
# ---------------------------------------------------------------------------------------------------------------------


def tables():
    """Random tables of the published size: split -> (bfloat16 `[8 * prompts, d]`, scores `[prompts, 8, 10]`)."""
    found = {}
    for split, prompts in PROMPTS.items():
        embeddings = torch.empty(8 * prompts, d, dtype=torch.bfloat16)
        for part in embeddings.split(8192):
            part.copy_(torch.randn(part.shape))
        found[split] = embeddings, torch.randn(prompts, 8, 10)
    return found


def population(script, of):
    return utils.create_dataset_personalllm(of, *script.population(demo=False), script.population_seed)


def write_inputs(folder):
    """What prepare.py would write, in a process of its own so that the peak of this one stays low."""
    for name, (embeddings, scores) in zip(utils.PERSONALLLM_FILES, tables().values()):
        utils.save_tensors(folder / name, {"embeddings": embeddings, "scores": scores})
    utils.save_tensors(folder / utils.HEAD_FILE, {"reward_head": V_SFT}, model="random", data="synthetic benchmark")


def whole_script(folder):
    """main() of train_basis.py with few iterations -> peak resident bytes, seconds, seconds of the evaluation."""
    script, evaluate, spent = load_script("PersonalLLM", "train_basis"), utils._accuracies, []

    def timed(*arguments):
        begin = time.perf_counter()
        found = evaluate(*arguments)
        spent.append(time.perf_counter() - begin)
        return found

    script.num_iterations, utils._accuracies, sys.argv = ITERATIONS, timed, ["train_basis.py", "--dir", str(folder)]
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        script.main()
    return peak_bytes(), time.perf_counter() - begin, sum(spent), len(spent)


def main():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; synthetic embeddings, d = {d}")
    with tempfile.TemporaryDirectory() as folder:
        for work in (write_inputs, whole_script):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(work, Path(folder)).result()
    peak, seconds, evaluation, settings = found
    print(f"\ntrain_basis.py as a whole, {ITERATIONS} iterations: {duration(seconds)}\n"
          f"{'':<48} {'measured':>9} {'':>9}   {'':<24} target")
    print_figure("peak memory", f"{peak / 1e9:.2f} GB", "", [peak / 1e9], "<= 8", peak <= 8e9)
    print_figure(f"evaluation, {settings} settings, all ranks", duration(evaluation), "", [evaluation], "<= 60",
                 evaluation <= 60)

    script = load_script("PersonalLLM", "train_basis")
    users = population(script, tables())["train"]
    dense = [X.dense() for X in users]
    print_heading(f"Training, {len(users)} users, {sum(map(len, users)):,} pairs, K_list = {script.K_list}. Measured: "
                  "one iteration, the mean\nof 12 (plain: 2; pooled Bradley-Terry counts as a loop of its own)")
    ranks = [K for K in script.K_list if K > 0]
    times = in_turn(
        lambda: per_iteration(lambda n: utils.fit_basis(users, members(ranks), None, n, 0.5), 12),
        lambda: sum(per_iteration(lambda n: plain_lore(dense, K, n), 2) for K in ranks))
    print_speedup(f"sweep, K = 1..{max(ranks)}, against {len(ranks)} plain loops", *times, 25)


if __name__ == "__main__":
    main()
