"""PRISM: its source files, turns, the released split, and its embeddings files.

PRISM is a survey of people and their conversations with language models. In each turn of a
conversation a person read up to four responses and chose one. A row of our files is one turn.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, BeforeValidator, Field, StrictStr

from lore.data_files import print_unread, split_files
from lore.data_notes import Judged
from lore.embedding_files import find_reward_head
from lore.files import (
    atomic_write,
    digest_of,
    explain_damage,
    load_json,
    load_pickle,
    replace_files_in,
    save_json,
)
from lore.normal_forms import Id, prompt_key
from lore.reading import is_missing, is_number
from lore.rows import LocatedRow, are_messages, parse_rows, read_rows
from lore.study import PARTS, Study
from utils import InputError, create_dataset_prism, group_by_dialog, is_finite, turn_pairs

DATASET = "HannahRoseKirk/prism-alignment"
FILES = ("train_embeddings.pkl", "test_embeddings.pkl")
SPLIT_FOLDER = Path("data") / "prism"  # prepare.py writes there, and the released scripts do too
PAIR_FORMAT = "one embedding per rejected response"
ABOUT_FILE = "about_users.json"  # in SPLIT_FOLDER: the survey's answers
MESSAGE_KEYS = ("role", "content")
INFO_KEYS = (
    "split",
    "seen",
    "user_id",
    "dialog_id",
    "turn_nb",
    "total_turn_nb",
    "chosen_utterance",
    "rejected_utterance",
)
# What split.json has that the scripts read
SPLIT_TYPES = {"rows": str, "model": str, "demo": bool, "data": str, "data_notes": list[str]}
# Counts of the full data set, as independent reruns of the release report them.
EXPECTED_COUNTS = {
    "seen users": 1030,
    "train turns": 12999,
    "train pairs": 19638,
    "test pairs": 19727,
}

Row = dict[str, Any]  # {"prompt": messages, "extra_info": {key: value for each of INFO_KEYS}}
Users = dict[str, dict[str, list[Row]]]  # user -> conversation -> its turns


# ---- The data set's own files


class User(BaseModel):
    """A row of survey.jsonl; only these columns are needed."""

    user_id: Id
    num_completed_conversations: int


def object_or_none(answer: Any) -> dict[str, Any] | None:
    """An answer that is an object; None for any other."""
    return answer if isinstance(answer, dict) else None


Details = Annotated[dict[str, Any] | None, BeforeValidator(object_or_none)]


class Answers(BaseModel):
    """What a row of survey.jsonl tells of the person, as far as it is there."""

    user_id: Id
    age: Any = None  # as of those below, one of the survey's answers, a text
    gender: Any = None
    education: Any = None
    employment_status: Any = None
    marital_status: Any = None
    english_proficiency: Any = None
    lm_familiarity: Any = None
    lm_frequency_use: Any = None
    religion: Details = None  # of this and the next two see SURVEY_DETAILS
    ethnicity: Details = None
    location: Details = None
    stated_prefs: Details = None  # how much each quality matters, from 0 to 100


SURVEY_DETAILS = {  # what is taken of an object: its column, and the name in it
    "religion": ("religion", "simplified"),
    "ethnicity": ("ethnicity", "simplified"),
    "country": ("location", "reside_country"),
}


class Message(BaseModel):
    """An item of `conversation_history`."""

    turn: int = Field(ge=0, lt=10000)
    role: Literal["user", "model"]
    content: StrictStr | None
    if_chosen: bool | None = None


class Conversation(BaseModel):
    """A row of conversations.jsonl; only these columns are needed."""

    conversation_id: Id
    user_id: Id
    conversation_history: list[Message]


def source_files(folder: Path | None, name: str) -> list[Path]:
    """`name`.jsonl or all its shards, in a folder or, if that is None, downloaded from the hub.

    name: "survey" or "conversations". A folder may also hold the other formats that `read_rows`
    reads. Raises InputError: not in the folder, several there, not served by the hub.
    """
    if folder is not None:
        return split_files(folder, **{name: [name]})[name]

    from huggingface_hub import hf_hub_download  # only the download needs it

    try:
        return [Path(hf_hub_download(DATASET, f"{name}.jsonl", repo_type="dataset"))]
    except Exception as error:  # no network, no such file, no access: each has its own class
        raise InputError(
            f"data set {DATASET}, {name}.jsonl: the hub did not serve it ({type(error).__name__}); "
            "check the network, or give a downloaded copy with --data"
        ) from None


def source_rows(paths: list[Path], schema: type[BaseModel]) -> Iterator[LocatedRow]:
    """The rows of a file or of all its shards, with their places; errors: as of `read_rows`."""
    for path in paths:
        yield from read_rows(path, schema)


def read_conversations(
    folder: Path | None, limit: int | None = None
) -> dict[str, list[Conversation]]:
    """Read the conversations of each user who completed one: user id -> conversations.

    folder: holds the survey and the conversations; None: download them. limit: only the first
    so many of these users. Users are in the order of the survey, conversations in that of the file.
    Raises InputError that names file, row and field; also if a user or a conversation is there
    twice, or the user of a conversation is not in the survey.
    """
    survey = source_files(folder, "survey")
    conversations = source_files(folder, "conversations")
    if folder is not None:
        benchmark = list(Path(folder).glob("rewardbench*"))  # which eval_rb2.py reads
        print_unread(folder, [*survey, *conversations, *benchmark])

    surveyed = set()
    active = []
    for where, user in parse_rows(source_rows(survey, User), User, DATASET):
        if user.user_id in surveyed:
            raise InputError(
                f"{where}: user {user.user_id} is in the file twice; remove one of the two rows"
            )
        surveyed.add(user.user_id)
        if user.num_completed_conversations > 0:
            active.append(user.user_id)
    conversations_per_user: dict[str, list[Conversation]] = {user: [] for user in active[:limit]}

    known_ids = set()
    rows = source_rows(conversations, Conversation)
    for where, conversation in parse_rows(rows, Conversation, DATASET):
        if conversation.conversation_id in known_ids:
            raise InputError(
                f"{where}: conversation {conversation.conversation_id} is in the file twice; "
                "remove one of the two rows"
            )
        if conversation.user_id not in surveyed:
            raise InputError(
                f"{where}: conversation {conversation.conversation_id} is of user "
                f"{conversation.user_id}, who is not in {survey[0]}; take both files of one release"
            )
        known_ids.add(conversation.conversation_id)
        if conversation.user_id in conversations_per_user:
            conversations_per_user[conversation.user_id].append(conversation)
    return conversations_per_user


def read_survey(folder: Path | None) -> dict[str, dict[str, Any]]:
    """What each user told in the survey: user id -> {column: answer}, a text or a number.

    folder: as of `read_conversations`. Raises InputError that names file, row and field.
    """
    rows = source_rows(source_files(folder, "survey"), Answers)
    return {row.user_id: answers_of(row) for _, row in parse_rows(rows, Answers, DATASET)}


def answers_of(row: Answers) -> dict[str, Any]:
    """The answers of one person; what was not answered is missing."""
    answers = row.model_dump(exclude={"user_id"})
    for name, (column, detail) in SURVEY_DETAILS.items():
        answers[name] = (getattr(row, column) or {}).get(detail)
    for quality, points in (row.stated_prefs or {}).items():
        if is_number(points):  # beside the points there is a text of one's own
            answers[f"stated preference for {quality}"] = points
    return {
        name: answer
        for name, answer in answers.items()
        if isinstance(answer, str | int | float) and not is_missing(answer)
    }


# ---- Turns


@dataclass
class Turn:
    """One question, the response that was chosen, and at least one that was not."""

    prompt: list[dict[str, str]]  # messages, up to the question of this turn
    number: int
    chosen: str
    rejected: list[str]


def complete_turns(conversation: Conversation) -> list[Turn]:
    """The turns of a conversation that have one question, one chosen and some rejected responses.

    A chosen response that is repeated with the same text counts once. Messages without a text are
    passed over. A prompt follows the chosen path: it holds the question and the chosen response of
    each earlier turn that has one of both, also if nothing was rejected there.
    """
    messages_per_turn: dict[int, list[Message]] = {}
    for message in conversation.conversation_history:
        if message.content is not None:
            messages_per_turn.setdefault(message.turn, []).append(message)

    turns = []
    history: list[dict[str, str]] = []
    for number in sorted(messages_per_turn):
        messages = messages_per_turn[number]
        responses = [message for message in messages if message.role == "model"]
        questions = [message.content for message in messages if message.role == "user"]
        chosen = {message.content for message in responses if message.if_chosen}
        rejected = [message.content for message in responses if not message.if_chosen]
        if len(questions) != 1 or len(chosen) != 1:
            continue

        answer = chosen.pop()
        prompt = [*history, {"role": "user", "content": questions[0]}]
        if rejected:
            turns.append(Turn(prompt, number, answer, rejected))
        history = [*prompt, {"role": "assistant", "content": answer}]
    return turns


# ---- The released split


@dataclass
class UserSplit:
    """Where one user's conversations go: ids for training and for testing."""

    seen: bool
    train: list[str]
    test: list[str]


def split_users(
    conversations_per_user: dict[str, list[str]],
    seed: int,
    seen_share: float,
    fewest_conversations: int,
) -> dict[str, UserSplit]:
    """Split users into seen and unseen, and each one's conversations into train and test.

    conversations_per_user: user id -> conversation ids; users in the order of the survey,
    conversations in that of the file. Users with fewer than `fewest_conversations` are left out.

    This is the released split, to the letter. One legacy generator shuffles the users, the first
    `seen_share` of whom, rounded down, are seen. Then it shuffles the conversation ids of one kept
    user after the other; the first half, rounded down, is for training.
    Raises InputError: no seen or no unseen user is left.
    """
    generator = np.random.RandomState(seed)
    users = np.array(list(conversations_per_user))
    generator.shuffle(users)
    seen_count = int(seen_share * len(users))

    split = {}
    for place, user in enumerate(users.tolist()):
        conversations = np.array(conversations_per_user[user])
        if len(conversations) < fewest_conversations:
            continue
        generator.shuffle(conversations)
        half = len(conversations) // 2
        split[user] = UserSplit(
            seen=place < seen_count,
            train=conversations[:half].tolist(),
            test=conversations[half:].tolist(),
        )

    seen = [user.seen for user in split.values()]
    if all(seen) or not any(seen):
        raise InputError(
            f"no seen or no unseen user has {fewest_conversations} conversations with a complete "
            "turn; take the whole data set, or a larger --limit"
        )
    return split


def rows_per_part(
    split: dict[str, UserSplit], turns: dict[str, list[Turn]]
) -> dict[str, list[Row]]:
    """One row per turn: {"train": rows, "test": rows}. turns: conversation id -> its turns."""
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    for user, user_split in split.items():
        for part in rows:
            for conversation in getattr(user_split, part):
                for turn in turns[conversation]:
                    info = {
                        "split": part,
                        "seen": user_split.seen,
                        "user_id": user,
                        "dialog_id": conversation,
                        "turn_nb": turn.number,
                        "total_turn_nb": len(turns[conversation]),
                        "chosen_utterance": turn.chosen,
                        "rejected_utterance": turn.rejected,
                    }
                    rows[part].append({"prompt": turn.prompt, "extra_info": info})
    return rows


def count_rows(rows: dict[str, list[Row]]) -> dict[str, int]:
    """Users of both parts together, and turns and pairs of each part; see `EXPECTED_COUNTS`."""
    infos = {part: [row["extra_info"] for row in rows[part]] for part in rows}
    users = {(info["user_id"], info["seen"]) for part in rows for info in infos[part]}
    seen_count = sum(seen for _, seen in users)
    turns = {f"{part} turns": len(infos[part]) for part in rows}
    pairs = {
        f"{part} pairs": sum(len(info["rejected_utterance"]) for info in infos[part])
        for part in rows
    }
    return {"seen users": seen_count, "unseen users": len(users) - seen_count, **turns, **pairs}


def judged_of(rows: list[Row]) -> list[Judged]:
    """Each rejected response of each turn, with the chosen one and the user."""
    judged = []
    for row in rows:
        info = row["extra_info"]
        for rejected in info["rejected_utterance"]:
            judged.append(
                Judged(info["user_id"], row["prompt"], info["chosen_utterance"], rejected)
            )
    return judged


def save_split(
    folder: Path,
    rows: dict[str, list[Row]],
    split: dict[str, UserSplit],
    about_users: dict[str, dict[str, Any]],
    provenance: dict,
) -> None:
    """Write train.parquet, test.parquet, split.json and about_users.json, all or none.

    split.json holds `provenance` (JSON values), each user's conversations and the rows' digest;
    about_users.json what is known of the users in the split.
    """
    users = {user: asdict(user_split) for user, user_split in split.items()}
    about = {user: about_users[user] for user in users if user in about_users}
    with replace_files_in(folder) as new_folder:
        for part in rows:
            with atomic_write(new_folder / f"{part}.parquet") as file:
                pd.DataFrame(rows[part]).to_parquet(file)
        save_json(
            new_folder / "split.json", {**provenance, "users": users, "rows": digest_of(rows)}
        )
        save_json(new_folder / ABOUT_FILE, {"users": about})


def load_split(folder: Path) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Read what `save_split` wrote -> ({"train": rows, "test": rows}, the content of split.json).

    Raises InputError: files missing or damaged, or not of one run.
    """
    content = load_json(folder / "split.json", "rows", "model", "demo", "data", **SPLIT_TYPES)
    with explain_damage(folder, "train.parquet and test.parquet of prepare.py"):
        rows = {
            part: [_in_written_order(row) for _, row in read_rows(folder / f"{part}.parquet")]
            for part in ("train", "test")
        }
        digest = digest_of(rows)
    if digest != content["rows"]:
        raise InputError(
            f"{folder}: train.parquet, test.parquet and split.json are of different runs; "
            "run prepare.py --overwrite"
        )
    return rows, content


def load_about_users(folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of the users, as `save_split` wrote it; empty if there is no such file.

    Raises InputError: the file is damaged.
    """
    path = folder / ABOUT_FILE
    if not path.exists():
        return {}
    users = load_json(path, "users", users=dict)["users"]
    if not all(isinstance(answers, dict) for answers in users.values()):
        raise InputError(f"{path}: not answers by user; run prepare.py again")
    return users


def _in_written_order(row: Row) -> Row:
    """The row with its keys in the order of `rows_per_part`; some versions of pyarrow sort them."""
    return {
        "prompt": [{key: message.get(key) for key in MESSAGE_KEYS} for message in row["prompt"]],
        "extra_info": {key: row["extra_info"].get(key) for key in INFO_KEYS},
    }


# ---- Embeddings


def row_conversations(row: Row) -> list[list[dict[str, str]]]:
    """What the reward model reads for one turn, as lists of messages.

    The first is the prompt with the chosen response, the others with each rejected response.
    """
    info = row["extra_info"]
    responses = [info["chosen_utterance"], *info["rejected_utterance"]]
    return [[*row["prompt"], {"role": "assistant", "content": response}] for response in responses]


def load_embeddings(folder: Path | str, model_name: str) -> Study:
    """Read the embeddings of generate-prism-embeddings.py, or of the released script.

    The files are in `folder`, or in data/prism/ below it, where the released script wrote them.
    model_name: the checkpoint whose reward head is read if there is none beside the files.

    Users of the `Study` are in the order of their ids, a user's pairs in that of the conversations'
    ids. `groups` numbers the conversation of each training pair. `prompts` and `texts` are there if
    all rows hold texts and none is in the released format, whose rejected side is malformed.
    `about_users` has the answers of the survey, if prepare.py has kept them in data/prism/.
    Raises InputError that names file and row: files missing or damaged; embeddings missing, not
    finite, of different widths, or of other rows than those in data/prism/.
    """
    folder = Path(folder)
    place = _find_embeddings(folder)
    train_rows = _load_rows(place / FILES[0])
    test_rows = _load_rows(place / FILES[1])
    first_rows = {
        **_first_row_per_width(test_rows, place / FILES[1]),
        **_first_row_per_width(train_rows, place / FILES[0]),
    }
    reward_head, provenance = find_reward_head(place, model_name, "PRISM", first_rows, FILES)
    title = provenance.pop("title")
    _check_split(folder, provenance)

    all_rows = train_rows + test_rows
    malformed = sum("pair_format" not in row["extra_info"] for row in all_rows)
    if malformed:
        print(
            f"{malformed:,} rows are in the released format, whose rejected side is malformed: "
            "all rejected responses of a turn as one printed list"
        )
    texts_are_known = not malformed and all(_holds_texts(row) for row in all_rows)

    part_rows = {
        "train": [row for row in train_rows if row["extra_info"]["seen"]],
        "test": [row for row in test_rows if row["extra_info"]["seen"]],
        "train_unseen": [row for row in train_rows if not row["extra_info"]["seen"]],
        "test_unseen": [row for row in test_rows if not row["extra_info"]["seen"]],
    }
    features = {part: create_dataset_prism(rows) for part, rows in part_rows.items()}
    users = {part: group_by_dialog(rows) for part, rows in part_rows.items()}
    _check_users(users, place)

    pairs = {}  # part -> one list per user
    for part in PARTS:
        pairs[part] = [_user_pairs(conversations) for conversations in users[part].values()]
    prompts = {}
    texts = {}
    if texts_are_known:
        for part in PARTS:
            prompts[part] = [[pair.prompt for pair in user_pairs] for user_pairs in pairs[part]]
            texts[part] = [[pair.texts for pair in user_pairs] for user_pairs in pairs[part]]
    conversations = {
        part: [[pair.dialog for pair in user] for user in pairs[part]] for part in PARTS
    }
    groups = {}
    for part in ("train", "train_unseen"):
        numbers = [[pair.conversation for pair in user_pairs] for user_pairs in pairs[part]]
        groups[part] = [torch.tensor(user_numbers) for user_numbers in numbers]

    return Study(
        title=title,
        seen=list(users["train"]),
        unseen=list(users["train_unseen"]),
        **features,
        reward_head=reward_head,
        prompts=prompts,
        texts=texts,
        groups=groups,
        conversations=conversations,
        about_users=load_about_users(folder / SPLIT_FOLDER),
        provenance=provenance,
    )


def _find_embeddings(folder: Path) -> Path:
    """The folder that holds the embeddings files: `folder`, or else data/prism/ below it.

    Raises InputError that names both places, if one of the files is missing.
    """
    released = folder / SPLIT_FOLDER
    beside = [name for name in FILES if (folder / name).exists()]
    below = [name for name in FILES if (released / name).exists()]
    # A place that holds one file of two is not passed over: the other place may hold older ones.
    place = released if below and not beside else folder
    for name in FILES:
        if not (place / name).exists():
            raise InputError(
                f"{place / name}: no such file; both embeddings files are needed in {folder} or, "
                f"as released, in {released}; run generate-prism-embeddings.py first"
            )
    return place


def _load_rows(path: Path) -> list[Row]:
    """The rows of an embeddings file. Raises InputError that names file and row."""
    rows = load_pickle(path, "generate-prism-embeddings.py")
    if not isinstance(rows, list) or not rows:
        raise InputError(
            f"{path}: not a list of rows; run generate-prism-embeddings.py --overwrite"
        )
    for i, row in enumerate(rows):
        if not _is_usable(row):
            raise InputError(
                f"{path}, row {i}: no user, no embeddings, or NaN or infinite ones; run "
                "generate-prism-embeddings.py --overwrite"
            )
    return rows


def _is_usable(row: Any) -> bool:
    """Whether a row, which may be anything, names its user and has at least one finite pair."""
    try:
        pairs = turn_pairs(row)  # (rejected, d)
        is_named = {"seen", "user_id", "dialog_id"} <= row["extra_info"].keys()
        return is_named and len(pairs) > 0 and is_finite(pairs)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
        return False


def _first_row_per_width(rows: list[Row], path: Path) -> dict[int, str]:
    """The widths d of the embeddings of a file, each with the first row that has it."""
    first_rows: dict[int, str] = {}
    for i, row in enumerate(rows):
        width = torch.as_tensor(row["extra_info"]["chosen_conv_embedding"]).numel()
        first_rows.setdefault(width, f"{path}, row {i}")
    return first_rows


def _check_split(folder: Path, provenance: dict[str, Any]) -> None:
    """Raise InputError if data/prism/ holds other rows than those of the embeddings."""
    split_file = folder / SPLIT_FOLDER / "split.json"
    if "identity" not in provenance or not split_file.exists():
        return
    if load_json(split_file, "rows")["rows"] != provenance["identity"].get("data"):
        raise InputError(
            f"the embeddings in {folder} are of other rows than {split_file.parent} holds; "
            "run generate-prism-embeddings.py --overwrite"
        )


def _check_users(users: dict[str, Users], folder: Path) -> None:
    """Raise InputError unless both files have the same seen and the same unseen users."""
    ids = {part: list(users[part]) for part in PARTS}
    both_kinds = ids["train"] and ids["train_unseen"]
    same = ids["train"] == ids["test"] and ids["train_unseen"] == ids["test_unseen"]
    if not both_kinds or not same:
        raise InputError(
            f"{folder}: {len(ids['train'])} seen and {len(ids['train_unseen'])} unseen users in "
            f"{FILES[0]}, {len(ids['test'])} and {len(ids['test_unseen'])} in {FILES[1]}; "
            "they must be the same, at least one of each kind; make both files in one run of "
            "generate-prism-embeddings.py"
        )


def _holds_texts(row: Row) -> bool:
    """Whether a row has its prompt, and the text of each response that has an embedding."""
    info = row["extra_info"]
    chosen = info.get("chosen_utterance")
    rejected = info.get("rejected_utterance")
    if not are_messages(row.get("prompt")):
        return False
    if not isinstance(chosen, str) or not isinstance(rejected, list):
        return False
    return len(rejected) == len(turn_pairs(row)) and all(isinstance(t, str) for t in rejected)


class PairSource(NamedTuple):
    """What a pair was made of."""

    conversation: int  # its number, counted from 0 for each user
    row: Row  # the turn
    response: int  # which of the turn's rejected responses

    @property
    def prompt(self) -> str:
        """One text for the messages of the prompt, equal for prompts that are equal to a reader."""
        return prompt_key(self.row["prompt"])

    @property
    def dialog(self) -> str:
        """The id of the conversation."""
        return self.row["extra_info"]["dialog_id"]

    @property
    def texts(self) -> tuple[str, str]:
        """The chosen and the rejected response."""
        info = self.row["extra_info"]
        return info["chosen_utterance"], info["rejected_utterance"][self.response]


def _user_pairs(conversations: dict[str, list[Row]]) -> list[PairSource]:
    """The pairs of one user, in the order in which `create_dataset_prism` makes them."""
    pairs = []
    for number, rows in enumerate(conversations.values()):
        for row in rows:
            for response in range(len(turn_pairs(row))):
                pairs.append(PairSource(number, row, response))
    return pairs
