"""Embed PRISM's responses with the frozen reward model, each chosen and each rejected one as prose.

    python generate-prism-embeddings.py                        after prepare.py, on a CUDA GPU
                                                               with 18 GB or more
    torchrun --nproc-per-node 8 generate-prism-embeddings.py   the same on eight GPUs
    python generate-prism-embeddings.py --model ID_OR_PATH     another reward model; on the CPU if
                                                               there is no GPU

After `prepare.py --demo` it takes the stand-in model.
Writes beside itself train_embeddings.pkl and test_embeddings.pkl (torch.save of the list of rows,
with chosen_conv_embedding `[d]` and rejected_conv_embedding `[rejected, d]` in extra_info) and
reward_head.safetensors. An interrupted run resumes from .embedding_cache/.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import torch

import prism
from lore.files import save_torch
from lore.reward_model import check_gpu
from lore.scripts import (
    STANDIN_FOLDER,
    EmbeddingFile,
    add_max_length,
    embed_files,
    run_script,
    script_parser,
)
from utils import check_whole

# ---- Settings

MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
TOKEN_BUDGET = None  # tokens in a batch; None: as the device takes
SHARD_SIZE = 1024  # conversations per file of the cache, the most that an interruption loses


def read_arguments() -> argparse.Namespace:
    """Read and check the command line. Raises InputError: --max_length below 1."""
    parser = script_parser(__doc__, HERE)
    parser.add_argument(
        "--model", metavar="ID_OR_PATH", help="the reward model (default: the one prepare.py names)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace finished embeddings of another model or data",
    )
    add_max_length(parser)
    args = parser.parse_args()
    if args.max_length is not None:
        check_whole("--max_length", args.max_length, 1)
    return args


def write_rows(path: Path, rows: list[prism.Row], embeddings: torch.Tensor) -> None:
    """Add the embeddings of its responses to each row, and the format of its pairs; write the rows.

    embeddings: bfloat16 `[n, d]`, of the `prism.row_conversations` of one row after the other.
    """
    counts = [1 + len(row["extra_info"]["rejected_utterance"]) for row in rows]
    for row, (chosen, *rejected) in zip(rows, embeddings.split(counts)):
        row["extra_info"].update(
            chosen_conv_embedding=chosen.clone(),  # a view would be saved with its whole table
            rejected_conv_embedding=torch.stack(rejected),
            pair_format=prism.PAIR_FORMAT,
        )
    save_torch(path, rows)


def file_of(name: str, rows: list[prism.Row]) -> EmbeddingFile:
    """The file of embeddings of the train or the test rows."""
    conversations = []
    pairs = []
    for row in rows:
        chosen = len(conversations)
        conversations += prism.row_conversations(row)
        pairs += [(chosen, rejected) for rejected in range(chosen + 1, len(conversations))]

    def write(path: Path, table: torch.Tensor, row_of_conversation: torch.Tensor) -> None:
        write_rows(path, rows, table[row_of_conversation])

    return EmbeddingFile(name, f"{len(rows):,} turns", conversations, write, pairs)


def main() -> None:
    args = read_arguments()
    rows, split = prism.load_split(args.dir / prism.SPLIT_FOLDER)
    is_standin = split["demo"] and args.model is None
    if is_standin:
        checkpoint = str(args.dir / STANDIN_FOLDER)
    else:
        checkpoint = args.model or split["model"]
    if checkpoint == MODEL_NAME:
        check_gpu(MODEL_NAME)

    files = [file_of(name, rows[part]) for name, part in zip(prism.FILES, ("train", "test"))]
    distinct = {json.dumps(conversation) for file in files for conversation in file.conversations}
    embed_files(
        files,
        f"{len(distinct):,} distinct conversations to embed",
        folder=args.dir,
        checkpoint=checkpoint,
        model="stand-in" if is_standin else checkpoint,
        data=split["data"],
        data_digest=split["rows"],
        token_budget=TOKEN_BUDGET,
        shard_size=SHARD_SIZE,
        overwrite=args.overwrite,
        max_length=args.max_length,
        demo=split["demo"],
        data_notes=split.get("data_notes", []),
    )


if __name__ == "__main__":
    run_script(main)
