"""Embed the prompts of PersonalLLM, each with its eight responses, with the frozen reward model.

    python prepare.py                                  on a CUDA GPU with 18 GB or more; downloads data and model
    torchrun --nproc-per-node 8 prepare.py             the same on eight GPUs
    python prepare.py --demo                           on any machine: tiny stand-in model, synthetic prompts
    python prepare.py --data DIR --model ID_OR_PATH    your own data in the schema of demo/, another reward model

Writes beside itself train.safetensors and test.safetensors (`embeddings`, `[8 * prompts, d]`, and `scores`, `[prompts,
8, 10]`) and reward_head.safetensors. An interrupted run resumes from .embedding_cache/.
The full data set has 9,402 train and 1,000 test prompts: 75,216 and 8,000 embeddings.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import itertools

import torch

import personalllm
from lore.embedding import embed_with_record
from lore.embedding_files import embeddings_are_finished, new_embeddings
from lore.files import digest_of, save_tensors
from lore.reward_model import load_reward_head, model_identity
from lore.rows import warn_of_blank_texts, warn_of_equal_sides
from lore.scripts import prepare_arguments, run_script
from utils import process_rank

# ---------------------------------------------------------------------------------------------------------------------
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
TOKEN_BUDGET = None  # tokens in a batch; None: as the device takes
SHARD_SIZE = 1024  # responses per file of the cache, the most that an interruption loses
# ---------------------------------------------------------------------------------------------------------------------


def read(args):
    """Prompts, responses and scores of each split; says what was read."""
    splits = {}
    for split, rows in personalllm.read_prompts(args.data).items():
        prompts, responses, scores = splits[split] = personalllm.parse(rows, args.limit)
        print(
            f"{split}: {len(prompts):,} prompts, {len(prompts) * personalllm.RESPONSES:,} responses with "
            f"{len(personalllm.SCORERS)} scores each"
        )
        equal = sum(len(texts) - len(set(texts)) for texts in responses)
        warn_of_equal_sides(
            f"{split}, responses to one prompt", equal, personalllm.RESPONSES * len(prompts)
        )
        warn_of_blank_texts(
            f"prompts or responses of {split}", itertools.chain(prompts, *responses)
        )
        if args.data is None and args.limit is None and len(prompts) != personalllm.FULL[split]:
            print(
                f"warning: the full {split} split has {personalllm.FULL[split]:,} prompts; the hub's data has changed"
            )
    return splits


def embed(splits, args):
    """The embeddings of each split, bfloat16 `[8 * prompts, d]`: split -> slice of one matrix; what they depend on."""
    conversations = {
        split: personalllm.conversations_of(*texts) for split, (*texts, _) in splits.items()
    }
    print(f"{sum(map(len, conversations.values())):,} responses to embed")
    embeddings, about = embed_with_record(
        sum(conversations.values(), []),
        args.model,
        None,
        args.dir / ".embedding_cache",
        TOKEN_BUDGET,
        SHARD_SIZE,
        dtype=torch.bfloat16,
    )
    return dict(
        zip(conversations, embeddings.split([len(part) for part in conversations.values()]))
    ), about


def main():
    args = prepare_arguments(__doc__, HERE, MODEL_NAME)
    splits = read(args)
    head = load_reward_head(args.model)
    outputs = [args.dir / name for name in personalllm.FILES]
    identity = {
        "model": "stand-in" if args.demo else args.model,
        "reward_head": digest_of(head.tolist()),
        "data": digest_of([(*texts, scores.tolist()) for *texts, scores in splits.values()]),
        **model_identity(args.model, args.dir / ".embedding_cache"),
    }
    if embeddings_are_finished(outputs, identity, args.overwrite):
        print(f"these embeddings are finished already, in {args.dir}; next: python train_basis.py")
        return

    embeddings, about = embed(splits, args)
    if process_rank() > 0:
        return
    with new_embeddings(
        args.dir,
        head,
        identity,
        model=identity["model"],
        data=args.label or personalllm.DATASET,
        demo=args.demo,
        embedding=about,
    ) as folder:
        for path, (split, (_, _, scores)) in zip(outputs, splits.items()):
            save_tensors(
                folder / path.name,
                {"embeddings": embeddings[split], "scores": scores},
                scorers=personalllm.SCORERS,
            )
    for path, split in zip(outputs, splits):
        print(
            f"{path.name}: {len(embeddings[split]):,} embeddings, d = {len(head)}, "
            f"{path.stat().st_size / 1e6:,.1f} MB"
        )
    print("next: python train_basis.py")


if __name__ == "__main__":
    run_script(main)
