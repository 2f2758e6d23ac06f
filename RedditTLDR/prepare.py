"""Embed the Reddit TL;DR comparisons with the frozen reward model.

    python prepare.py                                  on a CUDA GPU with 18 GB or more; downloads
                                                       data and model
    torchrun --nproc-per-node 8 prepare.py             the same on eight GPUs
    python prepare.py --demo                           on any machine: tiny stand-in model,
                                                       synthetic comparisons
    python prepare.py --data DIR --model ID_OR_PATH    a copy of the data in the schema of demo/,
                                                       another reward model

Comparisons of your own are prepared in OwnData/.

Writes beside itself tldr_embeddings_train.pkl and tldr_embeddings_val.pkl (worker -> list of
comparisons with the embeddings of both summaries) and reward_head.safetensors. An interrupted run
resumes from .embedding_cache/.
The full data set has 92,858 rows for train and 86,086 for val (the hub's validation split). 2,284
of the latter are CNN/DM articles without a post, and are left out.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import torch

import tldr
from lore.data_notes import (
    notes_on_comparisons,
    notes_on_removed_prompts,
    print_notes,
    warn_of_equal_sides,
)
from lore.files import digest_of
from lore.scripts import EmbeddingFile, embed_files, prepare_arguments, run_script

# ---- Settings

MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
TOKEN_BUDGET = None  # tokens in a batch; None: as the device takes
SHARD_SIZE = 1024  # summaries per file of the cache, the most that an interruption loses


def read(args: argparse.Namespace) -> tuple[list[tldr.ByWorker], list[str]]:
    """The comparisons of the train and the val split, and notes.

    Prints what was read, and the notes: what is odd in it.
    Raises InputError if it could not be trained on.
    """
    rows_of = tldr.read_comparisons(args.data)
    splits = {}
    notes = []
    for split, rows in rows_of.items():
        by_worker, dropped, repeats = tldr.comparisons_by_worker(rows, args.limit)
        comparisons = tldr.comparisons_of(by_worker)
        print(
            f"{split}: {len(comparisons):,} comparisons by {len(by_worker)} workers, {dropped:,} "
            "rows without a post or a summary dropped"
        )
        equal = sum(map(tldr.has_equal_sides, comparisons))
        warn_of_equal_sides(split, equal, len(comparisons))
        notes += notes_on_removed_prompts(split, repeats)
        splits[split] = by_worker
    tldr.split_workers(*splits.values())
    judged = {split: tldr.judged_of(by_worker) for split, by_worker in splits.items()}
    notes += notes_on_comparisons(judged)
    print_notes(notes)
    return list(splits.values()), notes


def file_of(name: str, by_worker: tldr.ByWorker) -> EmbeddingFile:
    """The file of embeddings of a split."""

    def write(path: Path, table: torch.Tensor, rows: torch.Tensor) -> None:
        tldr.save_embeddings(path, by_worker, table, rows)

    conversations = tldr.conversations_of(by_worker)
    winning_places = range(0, len(conversations), 2)  # each winning one is before the losing one
    return EmbeddingFile(
        name,
        f"{len(by_worker)} workers, {len(tldr.comparisons_of(by_worker)):,} pairs",
        conversations,
        write,
        pairs=[(place, place + 1) for place in winning_places],
    )


def main() -> None:
    args = prepare_arguments(__doc__, HERE, MODEL_NAME)
    splits, notes = read(args)
    files = [file_of(name, by_worker) for name, by_worker in zip(tldr.FILES, splits)]
    summaries = sum(len(file.conversations) for file in files)
    embed_files(
        files,
        f"{summaries:,} summaries to embed, {tldr.distinct_conversations(splits):,} distinct ones",
        folder=args.dir,
        checkpoint=args.model,
        model="stand-in" if args.demo else args.model,
        data=args.label or tldr.DATASET,
        data_digest=digest_of(splits),
        token_budget=TOKEN_BUDGET,
        shard_size=SHARD_SIZE,
        overwrite=args.overwrite,
        max_length=args.max_length,
        demo=args.demo,
        data_notes=notes,
    )


if __name__ == "__main__":
    run_script(main)
