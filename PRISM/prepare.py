"""Parse PRISM's conversations, split its users and write one row per turn.

    python prepare.py                          downloads the JSONL files; no GPU, no model
    python prepare.py --demo                   the synthetic corpus in demo/, and a tiny stand-in model
    python prepare.py --data DIR               survey.jsonl and conversations.jsonl from a folder

Writes to data/prism/ beside itself: train.parquet, test.parquet, split.json. Next: python generate-prism-embeddings.py
The full data set must come to 1,030 seen users and, of seen and unseen users together, 12,999 train turns, 19,638 train
and 19,727 test pairs.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import prism
from lore.files import digest_of, load_json
from lore.rows import warn_of_blank_texts, warn_of_equal_sides
from lore.scripts import prepare_arguments, run_script
from utils import InputError, check_settings

# ---------------------------------------------------------------------------------------------------------------------
MODEL_NAME = (
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"  # what generate-prism-embeddings.py will use
)
split_seed = 123  # of the released split
seen_share = 0.8  # of the users, rounded down
fewest_conversations = 6  # users with fewer are left out
# ---------------------------------------------------------------------------------------------------------------------


def read(args):
    """The complete turns of each conversation, and each user's conversations; says what was left out."""
    turns, dialogs_of, left_out, empty, conversations = {}, {}, 0, 0, 0
    for user, of_user in prism.read_conversations(args.data, args.limit).items():
        for conversation in of_user:
            found, incomplete, without_text = prism.turns_of(conversation)
            left_out += incomplete
            empty += without_text
            conversations += 1
            if found:
                turns[conversation.conversation_id] = found
                dialogs_of.setdefault(user, []).append(conversation.conversation_id)
    print(
        f"{len(dialogs_of):,} users, {conversations:,} conversations, {sum(map(len, turns.values())):,} complete "
        f"turns; {left_out:,} turns without exactly one message, one chosen and a rejected response left out"
        + f"; {empty:,} responses without a text left out"
        * (empty > 0)
    )
    return turns, dialogs_of


def report(counts, rows, full):
    """Print the counts, with a warning where those of the full data set are other than published."""
    for key, count in counts.items():
        expected = prism.EXPECTED.get(key, count) if full else count
        print(
            f"{key}: {count:,}"
            + f"  WARNING: {expected:,} expected of the full data set" * (count != expected)
        )
    infos = [row["extra_info"] for name in rows for row in rows[name]]
    warn_of_equal_sides(
        "both splits",
        sum(info["rejected_utterance"].count(info["chosen_utterance"]) for info in infos),
        counts["train pairs"] + counts["test pairs"],
    )
    warn_of_blank_texts(
        "responses",
        (
            text
            for info in infos
            for text in (info["chosen_utterance"], *info["rejected_utterance"])
        ),
    )


def main():
    args = prepare_arguments(__doc__, HERE, MODEL_NAME, embeds=False)
    check_settings(
        split_seed=split_seed, seen_share=seen_share, fewest_conversations=fewest_conversations
    )
    turns, dialogs_of = read(args)
    split = prism.split_users(dialogs_of, split_seed, seen_share, fewest_conversations)
    rows = prism.rows_of(split, turns)
    counts = prism.counts_of(rows)
    report(counts, rows, full=not args.demo and args.limit is None)

    folder = args.dir / prism.SPLIT_FOLDER
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    about = {
        "data": args.label or prism.DATASET,
        "model": model,
        "demo": args.demo,
        "counts": counts,
        "split_seed": split_seed,
        "users": {
            user: dict(zip(("seen", "train", "test"), parts)) for user, parts in split.items()
        },
    }
    if not args.overwrite and any(
        (folder / name).exists() for name in ("split.json", "train.parquet", "test.parquet")
    ):
        old = (
            load_json(folder / "split.json", "rows")
            if (folder / "split.json").exists()
            else {"rows": None}
        )
        if old["rows"] != digest_of(rows):
            raise InputError(
                f"{folder} holds other rows ({old.get('data', 'unknown')}); move it away, or replace it "
                "with --overwrite"
            )
    prism.save_split(folder, rows, about)
    print(
        f"train.parquet, test.parquet and split.json are in {folder}; next: python generate-prism-embeddings.py"
    )


if __name__ == "__main__":
    run_script(main)
