"""Embedding on a GPU with a model of Skywork-Reward-Llama-3.1-8B's shape and random weights: is it right, and how fast.

    python tests/benchmarks/bench_cuda.py [posts] [answers]     needs a CUDA GPU with 24 GB; two minutes

Prints how far shared beginnings (one varlen flash attention) and padded rows are from one by one in bfloat16, the
proof's choice, seconds and tokens per second of each, and the host's own seconds. For the full Reddit TL;DR, 24.5
million tokens, it says what the rate comes to; by arithmetic 2 * 7.0e9 operations a token are 3.4e17, at 450 to 550
TFLOPS of an H100 10 to 13 minutes, and half a minute more for gathering keys. It has not been run yet.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]
import utils
from bench_embedding import workload

# ---------------------------------------------------------------------------------------------------------------------
SHAPE = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)
# ---------------------------------------------------------------------------------------------------------------------


def main():
    posts, answers = (int(number) for number in (*sys.argv[1:], 64, 15)[:2])
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaModel(LlamaConfig(**SHAPE)).eval()
    torch.set_default_dtype(torch.float32)
    sequences = sorted(utils.np.array(ids, ">u4").tobytes() for ids in workload(posts, answers, 350, 32, (1, 1)))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {len(sequences)} conversations")
    print(utils._proof(model, sequences))

    def run(way, budget):
        torch.cuda.synchronize()
        began = time.perf_counter()
        states, _ = utils._states(model, sequences, way, budget)
        return states.float(), time.perf_counter() - began

    run("shared", 4096)  # compiles and allocates
    alone, seconds = run("alone", 1)
    print(f"alone: {seconds:.1f} s")
    unique = len({sequence[:end] for sequence in sequences for end in range(4, len(sequence) + 4, 4)})
    for way in ("rows", "shared"):
        for budget in (4096, 8192, 16384):
            states, seconds = run(way, budget)
            off = ((states - alone).norm(dim=1) / alone.norm(dim=1)).max().item()
            print(f"{way}, budget {budget}: {seconds:.2f} s, {unique / seconds:,.0f} unique tokens/s, off {off:.1e}; "
                  f"the full TL;DR would take {24.5e6 / unique * seconds / 60:.0f} minutes")
    utils._forward = lambda model, ids, shared=None: torch.zeros(len(ids), 8, device="cuda")
    print(f"the host alone, without a forward: {run('shared', 8192)[1]:.2f} s")


if __name__ == "__main__":
    main()
