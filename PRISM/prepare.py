"""Parse PRISM's conversations, split its users and write one row per turn.

    python prepare.py               downloads the JSONL files; no GPU, no model
    python prepare.py --demo        the synthetic corpus in demo/, and a tiny stand-in model
    python prepare.py --data DIR    survey.jsonl and conversations.jsonl from a folder

Writes to data/prism/ beside itself: train.parquet, test.parquet, split.json and about_users.json,
the answers of the survey.
Next: python generate-prism-embeddings.py
The full data set must come to 1,030 seen users and, of seen and unseen users together, 12,999
train turns, 19,638 train pairs and 19,727 test pairs.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import prism
from lore.data_notes import notes_on_comparisons, print_notes, warn_of_equal_sides
from lore.files import digest_of, load_json
from lore.scripts import next_command, prepare_arguments, run_script
from utils import InputError, check_number, check_whole

# ---- Settings

# The model that generate-prism-embeddings.py will use.
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"

# The split. These are the released values.
split_seed = 123
seen_share = 0.8  # of the users, rounded down
fewest_conversations = 6  # users with fewer are left out


def read_turns(
    data: Path | None, limit: int | None
) -> tuple[dict[str, list[prism.Turn]], dict[str, list[str]]]:
    """Read the complete turns, and print how many there are and how many are left out.

    Returns (conversation id -> its turns, user id -> conversation ids), of the conversations that
    have a complete turn and the users who have such a conversation.
    """
    turns = {}
    conversations_per_user: dict[str, list[str]] = {}
    conversation_count = 0
    incomplete_count = 0
    textless_count = 0
    for user, conversations in prism.read_conversations(data, limit).items():
        conversation_count += len(conversations)
        for conversation in conversations:
            complete = prism.complete_turns(conversation)
            messages = conversation.conversation_history
            incomplete_count += len({message.turn for message in messages}) - len(complete)
            textless_count += sum(message.content is None for message in messages)
            if complete:
                turns[conversation.conversation_id] = complete
                conversations_per_user.setdefault(user, []).append(conversation.conversation_id)

    turn_count = sum(len(complete) for complete in turns.values())
    line = (
        f"{len(conversations_per_user):,} users, {conversation_count:,} conversations, "
        f"{turn_count:,} complete turns; {incomplete_count:,} turns without exactly one message, "
        "one chosen and a rejected response left out"
    )
    if textless_count > 0:
        line += f"; {textless_count:,} responses without a text left out"
    print(line)
    return turns, conversations_per_user


def print_counts(counts: dict[str, int], is_full: bool) -> None:
    """Print the counts; of the full data set, with a warning if they are not the published ones."""
    for name, count in counts.items():
        expected = prism.EXPECTED_COUNTS.get(name, count)
        line = f"{name}: {count:,}"
        if is_full and count != expected:
            line += f"  WARNING: {expected:,} expected of the full data set"
        print(line)


def look_at_texts(rows: dict[str, list[prism.Row]]) -> list[str]:
    """Print what is odd in the rows; return it, but for the pairs of two equal responses."""
    judged = {part: prism.judged_of(rows[part]) for part in rows}
    pairs = [pair for part in judged for pair in judged[part]]
    equal_count = sum(pair.chosen == pair.rejected for pair in pairs)
    warn_of_equal_sides("both splits", equal_count, len(pairs))
    notes = notes_on_comparisons(judged)
    print_notes(notes)
    return notes


def check_replaceable(folder: Path, rows: dict[str, list[prism.Row]]) -> None:
    """Raise InputError if the folder holds other rows, or rows whose split.json is missing."""
    files = [folder / name for name in ("split.json", "train.parquet", "test.parquet")]
    if not any(file.exists() for file in files):
        return
    present = {"rows": None}
    if files[0].exists():
        present = load_json(files[0], "rows")
    if present["rows"] != digest_of(rows):
        raise InputError(
            f"{folder} holds other rows ({present.get('data', 'unknown')}); move it away, or "
            "replace it with --overwrite"
        )


def absolute_model(model: str) -> str:
    """The model's id on the hub, or its absolute path, so that any script finds it."""
    if Path(model).is_dir():
        return str(Path(model).resolve())
    return model


def main() -> None:
    args = prepare_arguments(__doc__, HERE, MODEL_NAME, embeds=False)
    check_whole("split_seed", split_seed)
    check_number("seen_share", seen_share, 0.01, 0.99)
    check_whole("fewest_conversations", fewest_conversations, least=2)

    turns, conversations_per_user = read_turns(args.data, args.limit)
    split = prism.split_users(conversations_per_user, split_seed, seen_share, fewest_conversations)
    rows = prism.rows_per_part(split, turns)
    counts = prism.count_rows(rows)
    print_counts(counts, is_full=not args.demo and args.limit is None)
    notes = look_at_texts(rows)

    folder = args.dir / prism.SPLIT_FOLDER
    if not args.overwrite:
        check_replaceable(folder, rows)
    provenance = {
        "data": args.label or prism.DATASET,
        "model": absolute_model(args.model),
        "demo": args.demo,
        "counts": counts,
        "split_seed": split_seed,
        "data_notes": notes,
    }
    prism.save_split(folder, rows, split, prism.read_survey(args.data), provenance)
    command = next_command("generate-prism-embeddings.py", args.dir)
    print(
        f"train.parquet, test.parquet, split.json and about_users.json are in {folder}; "
        f"next: {command}"
    )


if __name__ == "__main__":
    run_script(main)
