"""Embed the prompts of PersonalLLM, each with its eight responses, with the frozen reward model.

    python prepare.py                                  on a CUDA GPU with 18 GB or more; downloads
                                                       data and model
    torchrun --nproc-per-node 8 prepare.py             the same on eight GPUs
    python prepare.py --demo                           on any machine: tiny stand-in model,
                                                       synthetic prompts
    python prepare.py --data DIR --model ID_OR_PATH    your own data in the schema of demo/,
                                                       another reward model

Writes beside itself train.safetensors and test.safetensors (`embeddings`, `[8 * prompts, d]`, and
`scores`, `[prompts, 8, 10]`), texts.parquet (prompts and responses) and reward_head.safetensors.
An interrupted run resumes from .embedding_cache/.
The full data set has 9,402 train and 1,000 test prompts: 75,216 and 8,000 embeddings.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import itertools

import torch

import personalllm
from lore.data_notes import (
    notes_on_likeness,
    notes_on_overlap,
    notes_on_repeats,
    notes_on_texts,
    print_notes,
    warn_of_equal_sides,
)
from lore.files import digest_of, save_tensors
from lore.normal_forms import prompt_key
from lore.scripts import EmbeddingFile, embed_files, prepare_arguments, run_script

# ---- Settings

MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
TOKEN_BUDGET = None  # tokens in a batch; None: as the device takes
SHARD_SIZE = 1024  # responses per file of the cache, the most that an interruption loses


def read(args: argparse.Namespace) -> tuple[dict[str, personalllm.ScoredPrompts], list[str]]:
    """The prompts of both splits, with responses and scores, and notes: what is odd in them.

    Prints what was read, and the notes.
    """
    splits = {}
    for split, rows in personalllm.read_prompts(args.data).items():
        splits[split] = personalllm.parse(rows, args.limit)
        describe(split, splits[split])
        full = personalllm.FULL[split]
        is_whole = args.data is None and args.limit is None
        if is_whole and len(splits[split].prompts) != full:
            print(
                f"warning: the full {split} split has {full:,} prompts; the hub's data has changed"
            )
    notes = notes_on(splits)
    print_notes(notes)
    return splits, notes


def describe(name: str, split: personalllm.ScoredPrompts) -> None:
    """Print how much was read, and how many responses are equal."""
    responses = sum(len(texts) for texts in split.responses)
    print(
        f"{name}: {len(split.prompts):,} prompts, {responses:,} responses with "
        f"{len(personalllm.SCORERS)} scores each"
    )
    equal = sum(len(texts) - len(set(texts)) for texts in split.responses)
    warn_of_equal_sides(f"{name}, responses to one prompt", equal, responses)


def notes_on(splits: dict[str, personalllm.ScoredPrompts]) -> list[str]:
    """What is odd in the prompts and responses, a line each."""
    notes = []
    keys = {
        name: [prompt_key(prompt) for prompt in split.prompts] for name, split in splits.items()
    }
    for name, split in splits.items():
        notes += notes_on_repeats(f"prompts of {name}", keys[name])
        notes += notes_on_likeness(name, split.responses)
        notes += notes_on_texts(f"prompts of {name}", split.prompts)
        notes += notes_on_texts(f"responses of {name}", itertools.chain(*split.responses))
    return notes + notes_on_overlap("prompts", keys)


def file_of(name: str, split: personalllm.ScoredPrompts) -> EmbeddingFile:
    """The file of embeddings of a split."""
    conversations = personalllm.conversations_of(split)

    def write(path: Path, table: torch.Tensor, rows: torch.Tensor) -> None:
        tensors = {"embeddings": table[rows], "scores": split.scores}
        save_tensors(path, tensors, scorers=personalllm.SCORERS)

    pairs = []
    first = 0
    for responses in split.responses:  # any two responses to a prompt may be compared
        pairs += itertools.combinations(range(first, first + len(responses)), 2)
        first += len(responses)
    return EmbeddingFile(name, f"{len(conversations):,} embeddings", conversations, write, pairs)


def file_of_texts(splits: dict[str, personalllm.ScoredPrompts]) -> EmbeddingFile:
    """The file of the texts, which has no embeddings, but is written together with these."""

    def write(path: Path, table: torch.Tensor, rows: torch.Tensor) -> None:
        personalllm.save_texts(path, splits)

    prompts = sum(len(split.prompts) for split in splits.values())
    return EmbeddingFile(
        personalllm.TEXTS_FILE, f"{prompts:,} prompts and their responses", [], write
    )


def main() -> None:
    args = prepare_arguments(__doc__, HERE, MODEL_NAME)
    splits_by_name, notes = read(args)
    splits = list(splits_by_name.values())
    files = [file_of(name, split) for name, split in zip(personalllm.FILES, splits)]
    files.append(file_of_texts(splits_by_name))
    responses = sum(len(file.conversations) for file in files)
    contents = [[split.prompts, split.responses, split.scores.tolist()] for split in splits]
    embed_files(
        files,
        f"{responses:,} responses to embed",
        folder=args.dir,
        checkpoint=args.model,
        model="stand-in" if args.demo else args.model,
        data=args.label or personalllm.DATASET,
        data_digest=digest_of(contents),
        token_budget=TOKEN_BUDGET,
        shard_size=SHARD_SIZE,
        overwrite=args.overwrite,
        max_length=args.max_length,
        demo=args.demo,
        data_notes=notes,
    )


if __name__ == "__main__":
    run_script(main)
