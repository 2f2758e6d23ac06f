"""Reddit TL;DR: where the comparisons are from, how a row becomes conversations, what the embeddings files hold."""

from typing import List, Optional

from pydantic import BaseModel, BeforeValidator, Field, StrictStr
from typing_extensions import Annotated

from utils import *

DATASET = "openai/summarize_from_feedback"
FILES = ("tldr_embeddings_train.pkl", "tldr_embeddings_val.pkl")
SIDES = ("winning", "losing")


def name_of(worker):
    """A worker's id as text; a whole number, as a table may hold it, is its digits."""
    if isinstance(worker, float) and worker.is_integer():
        worker = int(worker)
    return str(worker) if isinstance(worker, int) and not isinstance(worker, bool) else worker


Worker = Annotated[StrictStr, Field(min_length=1, pattern=r"\S"), BeforeValidator(name_of)]


class Info(BaseModel):
    post: Optional[StrictStr]


class Summary(BaseModel):
    text: Optional[StrictStr]


class Comparison(BaseModel):
    """A row of the hub's `comparisons`, of whose columns these are needed."""
    info: Info
    summaries: Annotated[List[Summary], Field(min_length=2, max_length=2)]
    choice: Annotated[int, Field(ge=0, le=1)]
    worker: Worker


def read_comparisons(folder):
    """The rows of both splits, (where, row) pairs: from a folder, or from the hub where it is None."""
    if folder is not None:
        files = split_files(folder, train=["train"], validation=["validation", "test"])
        return {split: (row for path in paths for row in read_rows(path)) for split, paths in files.items()}
    return hub_rows(DATASET, revision="refs/convert/parquet", data_files={
        split: f"comparisons/{split}/*.parquet" for split in ("train", "validation")})


def comparisons_by_worker(rows, limit=None):
    """Group the first `limit` usable rows: worker -> list of {text, winning_summary, losing_summary}.

    Workers come in ascending order of their number of comparisons. Returns also how many rows were dropped because
    their post or a summary is null or empty. Raises InputError that names row and field.
    """
    by_worker, kept, dropped = {}, 0, 0
    for _, row in parse_rows(rows, Comparison, DATASET):
        post, first, second = row.info.post, *(summary.text for summary in row.summaries)
        if not all(text and text.strip() for text in (post, first, second)):
            dropped += 1
            continue
        winning, losing = (second, first) if row.choice else (first, second)
        by_worker.setdefault(row.worker, []).append(
            {"text": post, "winning_summary": winning, "losing_summary": losing})
        kept += 1
        if kept == limit:
            break
    return dict(sorted(by_worker.items(), key=lambda item: len(item[1]))), dropped


def conversation(post, summary):
    """What the reward model is shown: the post as the user's turn, the summary as the answer."""
    return [{"role": "user", "content": post}, {"role": "assistant", "content": summary}]


def load_embeddings(folder, model_name):
    """Read the embeddings of prepare.py (or of the released script) and the reward head.

    Returns (train, validation, head `[d, 1]`, what is known of model and data). A head that is not beside the pickles
    is read from `model_name`'s checkpoint. Raises InputError that names file and worker: files missing or damaged,
    embeddings missing, not finite or of different widths.
    """
    files, width = [], {}  # width: d -> where it was first seen
    for path in (Path(folder) / name for name in FILES):
        content = load_pickle(path)
        if not isinstance(content, dict) or not content:
            raise InputError(f"{path}: not a dict of workers; write it again with prepare.py --overwrite")
        for worker, pairs in content.items():
            try:
                vectors = torch.stack([pair["embeddings"][side][0] for pair in pairs for side in SIDES])
                usable = vectors.ndim == 2 and is_finite(vectors)
            except (KeyError, IndexError, TypeError, RuntimeError):
                usable = False
            if not usable:
                raise InputError(f"{path}, worker {worker}: a pair without embeddings, or with NaN, infinite or "
                                 "unequally long ones; run prepare.py --overwrite")
            width.setdefault(vectors.shape[1], f"{path}, worker {worker}")
        files.append(content)
    head, about = find_reward_head(folder, model_name, "Reddit TL;DR", width, FILES)
    return *files, head, about


def split_workers(train, validation, seed=0, leave_out=2):
    """The workers of both files, halved into (seen, unseen), and the generator that goes on to draw their pairs.

    train, validation: dicts of `comparisons_by_worker`. The `leave_out` workers with the fewest pairs of each file are
    left out; the others are sorted, so that nothing depends on Python's hash seed, and shuffled by `seed`.
    Raises InputError where fewer than two workers are in both files.
    """
    def kept(file):
        return set(sorted(file, key=lambda worker: (len(file[worker]), str(worker)))[leave_out:])

    workers = sorted(kept(train) & kept(validation), key=str)
    if len(workers) < 2:
        raise InputError(f"{len(workers)} workers are in both the train and the validation file (after the {leave_out} "
                         "smallest of each), at least 2 are needed; take both from one data set, without --limit")
    chance = random.Random(seed)
    chance.shuffle(workers)
    return workers[:len(workers) // 2], workers[len(workers) // 2:], chance


def create_dataset(train, validation, train_pairs, unseen_pairs, seed=0):
    """Split the workers and form their pairs.

    train_pairs, unseen_pairs: how many training pairs a seen and an unseen worker keep at most, drawn by `seed`.
    Returns a dict: `seen` and `unseen`, lists of workers; one float32 `[m_i, d]` per worker under each of `train`,
    `test`, `train_unseen`, `test_unseen`; `prompts` and `longer` of `evidence`, where the file holds the texts.
    """
    seen, unseen, chance = split_workers(train, validation, seed)

    def sample(file, workers, most):
        return [chance.sample(file[worker], min(most, len(file[worker]))) for worker in workers]

    def features(groups):
        winning, losing = (torch.stack([pair["embeddings"][side][0] for pairs in groups for pair in pairs]).float()
                           for side in SIDES)  # (M, d)
        return list(winning.sub_(losing).split([len(pairs) for pairs in groups]))

    drawn = {"train": sample(train, seen, train_pairs), "test": [validation[w] for w in seen],
             "train_unseen": sample(train, unseen, unseen_pairs), "test_unseen": [validation[w] for w in unseen]}
    data = {"seen": seen, "unseen": unseen, **{part: features(groups) for part, groups in drawn.items()},
            "prompts": {}, "longer": None}
    if all({"text", "winning_summary", "losing_summary"} <= pair.keys() for groups in drawn.values() for pairs in groups
           for pair in pairs):
        data["prompts"] = {part: [[pair["text"] for pair in pairs] for pairs in groups]
                           for part, groups in drawn.items()}
        data["longer"] = {"test_unseen": [np.sign([len(pair["winning_summary"]) - len(pair["losing_summary"])
                                                   for pair in pairs]) for pairs in drawn["test_unseen"]]}
    return data
