"""Embed the Reddit TL;DR comparisons with the frozen reward model.

    python prepare.py                                  on a CUDA GPU with 18 GB or more; downloads data and model
    torchrun --nproc-per-node 8 prepare.py             the same on eight GPUs
    python prepare.py --demo                           on any machine: tiny stand-in model, synthetic comparisons
    python prepare.py --data DIR --model ID_OR_PATH    a copy of the data in the schema of demo/, another reward model
    python prepare.py --data mine.jsonl                your own comparisons, rows as in demo/own_data/: user, prompt,
                                                       chosen, rejected, texts or lists of messages, and where you
                                                       want it split (train, validation); also a folder, a file a split

Writes beside itself tldr_embeddings_train.pkl and tldr_embeddings_val.pkl (worker -> list of comparisons with the
embeddings of both summaries) and reward_head.safetensors. An interrupted run resumes from .embedding_cache/.
The full data set has 92,858 train and 86,086 validation rows, of which 2,284 (CNN/DM articles) have no post and are
left out.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import functools
import json
import pickle

import numpy as np
import torch

import tldr
from lore.embedding import embed_with_record
from lore.embedding_files import embeddings_are_finished, new_embeddings
from lore.files import atomic_write, digest_of
from lore.reward_model import load_reward_head, model_identity
from lore.rows import warn_of_equal_sides
from lore.scripts import prepare_arguments, run_script
from utils import process_rank

# ---------------------------------------------------------------------------------------------------------------------
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
TOKEN_BUDGET = None  # tokens in a batch; None: as the device takes
SHARD_SIZE = 1024  # summaries per file of the cache, the most that an interruption loses
test_share = 0.2  # of the prompts of own data in one file without a split, for validation
test_seed = 0  # of the draw of these prompts
# ---------------------------------------------------------------------------------------------------------------------


def read(args):
    """Whether the data are somebody's own, and the comparisons of both splits, by worker; says what was read, and
    refuses what could not be trained on."""
    splits, (schema, rows_of) = [], tldr.read_comparisons(args.data, test_share, test_seed)
    own = schema is tldr.OwnComparison
    for split, rows in rows_of.items():
        by_worker, dropped = tldr.comparisons_by_worker(rows, schema, args.limit)
        pairs = [pair for pairs in by_worker.values() for pair in pairs]
        print(
            f"{split}: {len(pairs):,} comparisons by {len(by_worker)} workers, {dropped:,} rows without a post or a "
            "summary dropped"
        )
        warn_of_equal_sides(
            split, sum(p["winning_summary"] == p["losing_summary"] for p in pairs), len(pairs)
        )
        splits.append(by_worker)
    tldr.split_workers(*splits, leave_out=0 if own else tldr.LEAVE_OUT)
    return own, splits


def embed(splits, args):
    """Add to every comparison of both splits its embeddings, a row of one bfloat16 table per distinct (post, summary);
    returns what they depend on."""
    numbers, conversations, rows = (
        {},
        [],
        [],
    )  # rows: of the winning and the losing summary of each pair
    pairs = [
        pair for by_worker in splits for comparisons in by_worker.values() for pair in comparisons
    ]
    for pair in pairs:
        for side in tldr.SIDES:
            texts = pair["text"], pair[f"{side}_summary"]
            key = tuple(text if isinstance(text, str) else (json.dumps(text),) for text in texts)
            rows.append(numbers.setdefault(key, len(conversations)))
            if rows[-1] == len(conversations):
                conversations.append(tldr.conversation(*texts))
    print(f"{2 * len(pairs):,} summaries to embed, {len(conversations):,} distinct ones")
    embeddings, about = embed_with_record(
        conversations,
        args.model,
        None,
        args.dir / ".embedding_cache",
        TOKEN_BUDGET,
        SHARD_SIZE,
        dtype=torch.bfloat16,
    )
    vectors = embeddings.unbind()  # (d,) each
    for pair, *of_pair in zip(pairs, rows[::2], rows[1::2]):
        pair["embeddings"] = {side: [vectors[row]] for side, row in zip(tldr.SIDES, of_pair)}
    return about


@functools.cache
def pickled(d):
    """How torch pickles a bfloat16 tensor `[d]`: what rebuilds it, what loads its memory, what stands before the memory."""
    rebuild, (storage, *_) = torch.zeros(d, dtype=torch.bfloat16).__reduce_ex__(4)
    load, (memory,) = storage.__reduce__()
    return rebuild, load, memory[: -2 * d]


class RowPickler(pickle.Pickler):
    """Writes each row of a bfloat16 table as torch pickles a tensor with memory of its own, without making it one."""

    def reducer_override(self, value):
        if isinstance(value, torch.Tensor):
            rebuild, _, _ = pickled(len(value))
            return rebuild, (value.view(torch.uint8).numpy(), 0, (len(value),), (1,), False, None)
        if isinstance(value, np.ndarray):
            _, load, begin = pickled(len(value) // 2)
            return load, (begin + value.tobytes(),)
        return NotImplemented


def main():
    args = prepare_arguments(__doc__, HERE, MODEL_NAME)
    own, splits = read(args)
    head = load_reward_head(args.model)
    outputs = [args.dir / name for name in tldr.FILES]
    identity = {
        "model": "stand-in" if args.demo else args.model,
        "data": digest_of(splits),
        "reward_head": digest_of(head.tolist()),
        **model_identity(args.model, args.dir / ".embedding_cache"),
    }
    if embeddings_are_finished(outputs, identity, args.overwrite):
        print(f"these embeddings are finished already, in {args.dir}; next: python train_basis.py")
        return

    about = embed(splits, args)
    if process_rank() > 0:
        return
    with new_embeddings(
        args.dir,
        head,
        identity,
        model=identity["model"],
        data=args.label or tldr.DATASET,
        demo=args.demo,
        own=own,
        embedding=about,
    ) as folder:
        for path, by_worker in zip(outputs, splits):
            with atomic_write(folder / path.name) as file:
                RowPickler(file, protocol=4).dump(by_worker)
    for path, by_worker in zip(outputs, splits):
        print(
            f"{path.name}: {len(by_worker)} workers, {sum(map(len, by_worker.values())):,} pairs, d = {len(head)}, "
            f"{path.stat().st_size / 1e6:,.1f} MB"
        )
    print("next: python train_basis.py")


if __name__ == "__main__":
    run_script(main)
