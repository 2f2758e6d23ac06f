"""Parse PRISM's conversations, split its users and write one row per turn.

    python prepare.py                          downloads the three JSONL files; no GPU, no model
    python prepare.py --demo                   a synthetic corpus in the same schema, and a tiny stand-in model
    python prepare.py --data DIR               survey.jsonl, conversations.jsonl (and utterances.jsonl) from a folder

Writes to data/prism/ beside itself: train.parquet, test.parquet, split.json. Next: python generate-prism-embeddings.py
The full data set must come to 1,030 seen users and, of seen and unseen users together, 12,999 train turns, 19,638 train
and 19,727 test pairs.
"""

import sys
from pathlib import Path
from typing import List, Literal, Optional

from pydantic import BaseModel, Field, ValidationError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from utils import *

# ---------------------------------------------------------------------------------------------------------------------
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"  # what generate-prism-embeddings.py will use
DATASET = "HannahRoseKirk/prism-alignment"
FILES = ("survey.jsonl", "conversations.jsonl", "utterances.jsonl")  # the last repeats the second, one row a response
split_seed = 123  # of the released split
seen_share = 0.8  # of the users, rounded down
fewest_conversations = 6  # users with fewer are left out
EXPECTED = {"seen users": 1030, "train turns": 12999, "train pairs": 19638, "test pairs": 19727}  # of the full data set
# ---------------------------------------------------------------------------------------------------------------------


class User(BaseModel):
    user_id: str
    num_completed_conversations: int


class Message(BaseModel):
    turn: int = Field(ge=0, lt=10000)
    role: Literal["user", "model"]
    content: str
    if_chosen: Optional[bool] = None


class Conversation(BaseModel):
    conversation_id: str
    user_id: str
    conversation_history: List[Message]


class Utterance(BaseModel):
    conversation_id: str
    user_id: str


def build_demo(data, model):
    """The demo's synthetic corpus, its benchmark for eval_rb2.py, and the stand-in reward model."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import standin
    print(standin.STANDIN_NOTE)
    standin.write_prism_corpus(data)
    standin.write_rewardbench_corpus(data.with_name("benchmark"))
    standin.build_reward_model(model)


def source_files(folder):
    """The paths of FILES in a folder, or downloaded where it is None."""
    if folder is not None:
        return [folder / name for name in FILES if name != FILES[2] or (folder / name).exists()]
    return [hub_file(DATASET, name) for name in FILES]


def parse(path, schema):
    """The rows of a JSONL file as objects of a pydantic schema. Raises InputError that names row and field."""
    for where, row in read_jsonl(path):
        try:
            yield schema(**row)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}; expected is the schema of "
                             f"{DATASET}") from None


def turns(conversation):
    """The complete turns of a conversation, each with what was said before on the chosen path, and how many are not.

    A complete turn has a user message, one chosen response (twice the same text counts once) and a rejected one.
    Returns ([{prompt, turn_nb, chosen_utterance, rejected_utterance}], number of turns left out).
    """
    by_turn = {}
    for message in conversation.conversation_history:
        by_turn.setdefault(message.turn, []).append(message)
    found, left_out, history = [], 0, []
    for number in sorted(by_turn):
        asked = [m.content for m in by_turn[number] if m.role == "user"]
        chosen = {m.content for m in by_turn[number] if m.role == "model" and m.if_chosen}
        rejected = [m.content for m in by_turn[number] if m.role == "model" and not m.if_chosen]
        if len(asked) != 1 or len(chosen) != 1:
            left_out += 1
            continue
        answer = chosen.pop()
        history = history + [{"role": "user", "content": asked[0]}]
        if rejected:
            found.append({"prompt": history, "turn_nb": number, "chosen_utterance": answer,
                          "rejected_utterance": rejected})
        else:
            left_out += 1
        history = history + [{"role": "assistant", "content": answer}]
    return found, left_out


def split_users(conversations_of, seed=split_seed):
    """The released split, from one generator: user -> (seen, train conversation ids, test conversation ids).

    conversations_of: user id -> list of conversation ids, users in survey order, conversations in file order.
    """
    generator = np.random.RandomState(seed)
    users = np.array(list(conversations_of))
    generator.shuffle(users)
    first_unseen = int(seen_share * len(users))
    split = {}
    for place, user in enumerate(users.tolist()):
        ids = np.array(conversations_of[user])
        if len(ids) < fewest_conversations:
            continue
        generator.shuffle(ids)
        split[user] = (place < first_unseen, ids[:len(ids) // 2].tolist(), ids[len(ids) // 2:].tolist())
    return split


def rows_of(split, turns_of):
    """One row per turn -> {"train": rows, "test": rows}."""
    rows = {"train": [], "test": []}
    for user, (seen, *parts) in split.items():
        for name, ids in zip(rows, parts):
            for dialog in ids:
                for turn in turns_of[dialog]:
                    rows[name].append({"prompt": turn["prompt"], "extra_info": {
                        "split": name, "seen": seen, "user_id": user, "dialog_id": dialog, "turn_nb": turn["turn_nb"],
                        "total_turn_nb": len(turns_of[dialog]), "chosen_utterance": turn["chosen_utterance"],
                        "rejected_utterance": turn["rejected_utterance"]}})
    return rows


def main():
    args = prepare_arguments(__doc__, HERE, MODEL_NAME, build_demo, embeds=False)
    check_whole("split_seed", split_seed, 0)
    check_whole("fewest_conversations", fewest_conversations, 2)
    if not is_number(seen_share, 0.01, 0.99):
        raise InputError(f"seen_share = {seen_share}: give a share from 0.01 to 0.99")
    survey, conversations, *others = source_files(args.data)
    for path in others:
        for _ in parse(path, Utterance):  # whole, and no error page
            pass
    people = list(parse(survey, User))
    users = [user.user_id for user in people if user.num_completed_conversations > 0][:args.limit]
    everyone = {user.user_id for user in people}
    conversations_of, turns_of, left_out, ids = {user: [] for user in users}, {}, 0, set()
    for conversation in parse(conversations, Conversation):
        if conversation.user_id not in everyone:
            raise InputError(f"{conversations}: conversation {conversation.conversation_id} is of user "
                             f"{conversation.user_id}, who is not in {survey}; take both files of one release")
        if conversation.user_id not in conversations_of:
            continue
        if conversation.conversation_id in ids:
            raise InputError(f"{conversations}: conversation {conversation.conversation_id} stands there twice; leave "
                             "one out")
        ids.add(conversation.conversation_id)
        found, incomplete = turns(conversation)
        left_out += incomplete
        if found:
            turns_of[conversation.conversation_id] = found
            conversations_of[conversation.user_id].append(conversation.conversation_id)
    conversations_of = {user: of_user for user, of_user in conversations_of.items() if of_user}
    split = split_users(conversations_of)
    rows = rows_of(split, turns_of)
    print(f"{len(users):,} users, {len(ids):,} conversations, {sum(map(len, turns_of.values())):,} complete "
          f"turns; {left_out:,} turns without exactly one message, one chosen and a rejected response left out")
    if not split:
        raise InputError(f"no user has {fewest_conversations} conversations with a complete turn; take the whole "
                         "data set, or a larger --limit")

    counts = {"seen users": sum(seen for seen, *_ in split.values())}
    counts["unseen users"] = len(split) - counts["seen users"]
    for name in rows:
        infos = [row["extra_info"] for row in rows[name]]
        counts[f"{name} turns"] = len(infos)
        counts[f"{name} pairs"] = sum(len(info["rejected_utterance"]) for info in infos)
        counts[f"{name} pairs of seen users"] = sum(len(info["rejected_utterance"]) for info in infos if info["seen"])
    for key, count in counts.items():
        differs = not args.demo and args.limit is None and EXPECTED.get(key, count) != count
        print(f"{key}: {count:,}" + (f"  WARNING: {EXPECTED[key]:,} expected of the full data set" if differs else ""))

    folder = args.dir / "data" / "prism"
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    about = {"data": args.label or DATASET, "rows": digest_of(rows), "model": model, "demo": args.demo,
             "counts": counts, "split_seed": split_seed,
             "users": {user: dict(zip(("seen", "train", "test"), parts)) for user, parts in split.items()}}
    split_file = folder / "split.json"
    if not args.overwrite and any((folder / name).exists() for name in ("split.json", "train.parquet", "test.parquet")):
        old = load_json(split_file, "rows", "data") if split_file.exists() else {"rows": None, "data": "unknown"}
        if old["rows"] != about["rows"]:
            raise InputError(f"{folder} holds other rows ({old['data']}); move it away, or replace it with --overwrite")
    with together(folder) as new:
        for name in rows:
            save_parquet(new / f"{name}.parquet", rows[name])
        save_json(new / "split.json", about)
    print(f"train.parquet, test.parquet and split.json are in {folder}; next: python generate-prism-embeddings.py")


if __name__ == "__main__":
    run_script(main)
