"""Embed PRISM's responses with the frozen reward model: every chosen and every rejected one as prose of its own.

    python generate-prism-embeddings.py                        on a CUDA GPU with 18 GB or more, after prepare.py
    torchrun --nproc-per-node 8 generate-prism-embeddings.py   the same on eight GPUs
    python generate-prism-embeddings.py --model ID_OR_PATH     another reward model, on the CPU where there is no GPU

After `prepare.py --demo` it takes the stand-in model. Writes beside itself train_embeddings.pkl and test_embeddings.pkl
(torch.save of the list of rows, with chosen_conv_embedding `[d]` and rejected_conv_embedding `[rejected, d]` in
extra_info) and reward_head.safetensors. An interrupted run resumes from .embedding_cache/.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import json

import prism
from lore.embedding import embed_with_record
from lore.embedding_files import embeddings_are_finished, new_embeddings
from lore.files import digest_of, save_torch
from lore.reward_model import check_gpu, load_reward_head, model_identity
from lore.scripts import run_script, script_parser
from utils import process_rank

# ---------------------------------------------------------------------------------------------------------------------
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
TOKEN_BUDGET = None  # tokens in a batch; None: as the device takes
SHARD_SIZE = 1024  # conversations per file of the cache, the most that an interruption loses
# ---------------------------------------------------------------------------------------------------------------------


def embed(rows, args):
    """Add the embeddings to every row, bfloat16, and the format of its pairs; returns what they depend on."""
    numbers = {}
    for row in rows:
        for conversation in prism.conversations_of(row):
            numbers.setdefault(json.dumps(conversation), len(numbers))
    print(f"{len(numbers):,} distinct conversations to embed")
    embeddings, about = embed_with_record(
        [json.loads(text) for text in numbers],
        args.model,
        None,
        args.dir / ".embedding_cache",
        TOKEN_BUDGET,
        SHARD_SIZE,
    )
    embeddings = embeddings.bfloat16()
    for row in rows:
        chosen, *rejected = (
            numbers[json.dumps(conversation)] for conversation in prism.conversations_of(row)
        )
        row["extra_info"].update(
            chosen_conv_embedding=embeddings[chosen].clone(),
            rejected_conv_embedding=embeddings[rejected],
            pair_format=prism.PAIR_FORMAT,
        )
    return about


def main():
    parser = script_parser(__doc__, HERE)
    parser.add_argument(
        "--model", metavar="ID_OR_PATH", help="the reward model (default: the one prepare.py names)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace finished embeddings of another model or data",
    )
    args = parser.parse_args()
    rows, split = prism.load_split(args.dir / prism.SPLIT_FOLDER)
    standin = split["demo"] and args.model is None
    args.model = args.model or (str(args.dir / ".standin") if standin else split["model"])
    if args.model == MODEL_NAME:
        check_gpu(MODEL_NAME)
    head = load_reward_head(args.model)
    outputs = [args.dir / name for name in prism.FILES]
    identity = {
        "model": "stand-in" if standin else args.model,
        "data": split["rows"],
        "reward_head": digest_of(head.tolist()),
        **model_identity(args.model, args.dir / ".embedding_cache"),
    }
    if embeddings_are_finished(outputs, identity, args.overwrite):
        print(f"these embeddings are finished already, in {args.dir}; next: python train_basis.py")
        return

    about = embed([row for name in rows for row in rows[name]], args)
    if process_rank() > 0:
        return
    with new_embeddings(
        args.dir,
        head,
        identity,
        model=identity["model"],
        data=split["data"],
        demo=split["demo"],
        embedding=about,
    ) as folder:
        for path, name in zip(outputs, rows):
            save_torch(folder / path.name, rows[name])
    for path, name in zip(outputs, rows):
        print(
            f"{path.name}: {len(rows[name]):,} turns, d = {len(head)}, {path.stat().st_size / 1e6:,.1f} MB"
        )
    print("next: python train_basis.py")


if __name__ == "__main__":
    run_script(main)
