"""Embed comparisons of your own, or a public set of them, with the frozen reward model.

    python prepare.py --data mine.jsonl --model ID_OR_PATH      a file or a folder of your own
    python prepare.py --data allenai/multipref                  a public data set, downloaded; the
                                                                default model needs a CUDA GPU
    torchrun --nproc-per-node 8 prepare.py --data ..            the same on eight GPUs
    python prepare.py --demo                                    on any machine: tiny stand-in model,
                                                                synthetic comparisons

A row of your own has `user`, `prompt`, `chosen`, `rejected` (texts or messages) and, if you have
them, `conversation` (an id), `language` and `split`. The public data sets are
facebook/community-alignment-dataset, allenai/multipref, MichaelR207/prism_personalized_0125 and
MichaelR207/chatbot_arena_personalized_0125; a downloaded copy of one is told by its columns.

Writes beside itself embeddings.safetensors (each distinct conversation once), pairs.parquet (a row
for each comparison), users.parquet (what is known of people) and reward_head.safetensors. An
interrupted run resumes from .embedding_cache/.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import numpy as np
import torch

import own_files
import own_reading
import own_rows
import own_split
from lore.data_notes import (
    notes_on_comparisons,
    notes_on_removed_prompts,
    print_notes,
    warn_of_equal_sides,
)
from lore.scripts import EmbeddingFile, embed_files, prepare_arguments, run_script
from lore.words import count_of
from utils import InputError

# ---- Settings

MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
TOKEN_BUDGET = None  # tokens in a batch; None: as the device takes
SHARD_SIZE = 1024  # conversations per file of the cache, the most that an interruption loses

languages = None  # keep only comparisons in these, as the rows write them: ["en"]; None: all
min_pairs = 2  # how many pairs a user needs to take part

# Of data without a split of their own:
test_share = 0.2  # of the groups of conversations, for the test
test_seed = 0  # of the draw of these groups

# The columns that say who a user is, as patterns: they are kept for the reading of the results.
about_users = ["annotator_*", "age", "gender", "education*", "politic*", "ethnicity", "country"]
# Of a public data set without a split into train and test the part that is downloaded. Community
# Alignment has "train" and "filtered".
hub_split = "train"


def read(data: Path, limit: int | None) -> tuple[own_reading.Reading, np.ndarray, list[str]]:
    """What was read, with a split; the group of each comparison, int64 `[m]`; notes.

    Prints what was read, what was left out, and the notes: what is odd in it.
    Raises InputError if it could not be trained on.
    """
    reading = own_reading.read_comparisons(
        data, languages=languages, about_users=about_users, hub_split=hub_split, limit=limit
    )
    kind = reading.kind
    users = len({comparison.user for comparison in reading.comparisons})
    if kind is not own_rows.OwnRow:
        print(f"these are rows of {kind.dataset}")
    print(
        f"{count_of(reading.rows, 'row')}, {count_of(len(reading.comparisons), 'comparison')} by "
        f"{count_of(users, 'user')}; {own_reading.counted(reading)}"
    )
    print_notes(reading.notes)  # now, as they may say why the split is refused
    if kind.full_size not in (None, reading.rows) and limit is None:
        print(f"a full copy of {kind.dataset} has {kind.full_size:,} rows")

    groups = own_split.group_numbers(reading.comparisons)
    comparisons, split_notes = own_split.split_comparisons(
        reading.comparisons, groups, test_share, test_seed
    )
    kept, user_notes = own_split.users_to_keep(comparisons, groups, min_pairs)
    is_kept = [comparison.user in kept for comparison in comparisons]
    reading.comparisons = [c for c, keep in zip(comparisons, is_kept) if keep]
    reading.about_users = {
        user: about for user, about in reading.about_users.items() if user in kept
    }
    for note in user_notes:
        print(note)
    equal = sum(map(own_files.has_equal_sides, reading.comparisons))
    warn_of_equal_sides("all", equal, len(reading.comparisons))

    notes = [
        *split_notes,
        *notes_on_removed_prompts("all", reading.repeats),
        *notes_on_comparisons(own_split.judged_of(reading.comparisons)),
    ]
    print_notes(notes)
    return reading, groups[is_kept], reading.notes + notes


def files_to_write(reading: own_reading.Reading, groups: np.ndarray) -> list[EmbeddingFile]:
    """The three files. The conversations are those of the pairs, each distinct one once."""
    comparisons = reading.comparisons
    conversations, numbers = own_files.number_conversations(comparisons)

    def write_table(path: Path, table: torch.Tensor, rows: torch.Tensor) -> None:
        own_files.save_table(path, table)

    def write_pairs(path: Path, table: torch.Tensor, rows: torch.Tensor) -> None:
        chosen, rejected = rows.numpy()[numbers].T
        own_files.save_pairs(path, comparisons, groups, chosen, rejected)

    def write_users(path: Path, table: torch.Tensor, rows: torch.Tensor) -> None:
        own_files.save_users(path, reading.about_users)

    users = len({comparison.user for comparison in comparisons})
    known_users = "nothing is known of users"
    if reading.about_users:
        known_users = f"something is known of {count_of(len(reading.about_users), 'user')}"
    return [
        EmbeddingFile(
            own_files.EMBEDDINGS_FILE,
            count_of(len(conversations), "conversation"),
            [],
            write_table,
        ),
        EmbeddingFile(
            own_files.PAIRS_FILE,
            f"{count_of(len(comparisons), 'pair')} of {count_of(users, 'user')}",
            conversations,
            write_pairs,
            pairs=list(map(tuple, numbers.tolist())),
        ),
        EmbeddingFile(
            own_files.USERS_FILE,
            known_users,
            [],
            write_users,
        ),
    ]


def main() -> None:
    args = prepare_arguments(__doc__, HERE, MODEL_NAME)
    if args.data is None:
        raise InputError(
            "no data: give --data a file, a folder or one of "
            f"{', '.join(own_rows.PUBLIC)}; or try --demo"
        )
    reading, groups, notes = read(args.data, args.limit)
    files = files_to_write(reading, groups)
    count = sum(len(file.conversations) for file in files)
    embed_files(
        files,
        f"{count_of(count, 'distinct conversation')} to embed",
        folder=args.dir,
        checkpoint=args.model,
        model="stand-in" if args.demo else args.model,
        data=args.label,
        data_digest=own_files.digest_of_data(reading.comparisons, groups, reading.about_users),
        token_budget=TOKEN_BUDGET,
        shard_size=SHARD_SIZE,
        overwrite=args.overwrite,
        max_length=args.max_length,
        demo=args.demo,
        all_users_are_seen=reading.kind.all_users_are_seen,
        data_notes=notes,
    )


if __name__ == "__main__":
    run_script(main)
