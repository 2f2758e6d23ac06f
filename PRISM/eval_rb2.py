"""Score RewardBench 2 with the reward model's own head, or with all columns of a basis in one pass.

    python eval_rb2.py                                   the reward model itself
    python eval_rb2.py --rm_head checkpoints/PRISM_V_lore_K_10_alpha_10000.0.pt --mode lmhead
    python eval_rb2.py --rm_head results/K_10.safetensors --user_weights results/K_10.safetensors
    python eval_rb2.py --rm_head results                 after a sweep: the model that validation
                                                         chose
    python eval_rb2.py --model MODEL --data DIR          a local copy, test.jsonl or .parquet
    python eval_rb2.py --demo                            a stand-in model, a synthetic benchmark

After `prepare.py --demo` it does what --demo does, if neither --model nor --data is given.

Prints accuracy by subset, a line per column; with --user_weights also the mean user's reward (the
average weights) and the average over users of each one's personalised reward. --save_csv writes
the same table.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, Field, StrictStr

import prism
from lore.basis import check_same_model
from lore.data_files import split_files
from lore.embedding import embed_conversations
from lore.files import (
    atomic_write,
    check_writable,
    load_json,
    load_pickle,
    load_tensors,
    printable,
)
from lore.reward_model import check_gpu, load_reward_head, load_reward_model
from lore.rows import hub_rows, parse_rows, read_rows
from lore.scripts import CACHE_FOLDER, STANDIN_FOLDER, run_script, script_parser
from lore.standin import build_standin_model
from lore.tables import csv_text
from utils import InputError, check_device, check_matrix, check_number, check_whole

# ---- Settings

MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
TOKEN_BUDGET = None  # tokens in a batch; None: as the device takes

DATASET = "allenai/reward-bench-2"
SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# ---- The command line


def read_arguments() -> argparse.Namespace:
    """Read and check the command line. Raises InputError that names the option."""
    parser = script_parser(__doc__, HERE)
    add = parser.add_argument
    add("--demo", action="store_true", help="a tiny stand-in model, and the benchmark in demo/")
    add("--model", metavar="ID_OR_PATH", help=f"default: {MODEL_NAME}")
    add("--tokenizer", metavar="ID_OR_PATH", help="default: the model's")
    add(
        "--mode",
        choices=("auto", "seqclf", "lmhead"),
        default="auto",
        help="seqclf: the checkpoint's score head; lmhead: --rm_head; auto: --rm_head if given",
    )
    add(
        "--rm_head",
        type=Path,
        metavar="FILE",
        help="head or basis: .pt, .npy or .safetensors; of a folder of results the model that "
        "validation chose",
    )
    add("--head_bias", type=float, default=0.0, help="added to every score")
    add("--head_key", help="the tensor's name in a file of several (default: V or reward_head)")
    add(
        "--user_weights",
        type=Path,
        metavar="FILE",
        help="weights [users, K] over the columns; or a folder, as of --rm_head",
    )
    add("--split", default="test")
    add("--subset", metavar="NAME", help=f"one of {', '.join(SUBSETS)}")
    add("--limit", type=int, metavar="N", help="only the first N rows")
    add("--data", type=Path, metavar="DIR", help="a folder with a local copy")
    add("--batch_size", type=int, help="answers in a batch (default: as many as fit)")
    add("--max_length", type=int, help="truncate conversations to so many tokens")
    add("--truncation_side", choices=("left", "right"), default="left")
    add("--device", help="default: the GPU, or the CPU if there is none")
    add("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on the CPU")
    add("--trust_remote_code", action="store_true")
    add("--save_csv", type=Path, metavar="FILE")
    add("--top_k", type=int, metavar="N", help="print only the N best lines")
    add("--verbose_failures", action="store_true", help="list the rows that column 0 gets wrong")
    args = parser.parse_args()
    check_arguments(args)
    for name in ("rm_head", "user_weights"):
        path = getattr(args, name)
        if path is not None:
            setattr(args, name, find_model(path))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError for a value out of range, or options that exclude each other."""
    if args.demo and (args.data or args.model):
        raise InputError(
            "--demo brings its own data and model; leave out --data and --model, or --demo"
        )
    for name in ("limit", "batch_size", "max_length", "top_k"):
        value = getattr(args, name)
        if value is not None:
            check_whole(f"--{name}", value, least=1)
    check_number("--head_bias", args.head_bias, -1e6, 1e6)
    if args.device is not None:
        check_device(args.device)
    if args.save_csv is not None:
        if args.save_csv.is_dir():
            raise InputError(f"--save_csv {args.save_csv}: a folder; give the name of a file")
        check_writable(args.save_csv.parent)
    if args.subset is not None and args.subset not in SUBSETS:
        raise InputError(f"--subset {args.subset}: unknown; give one of {', '.join(SUBSETS)}")
    if args.mode == "lmhead" and args.rm_head is None:
        raise InputError("--mode lmhead needs --rm_head, the head to score with")
    if args.mode == "seqclf" and args.rm_head is not None:
        raise InputError(
            "--mode seqclf takes the checkpoint's own head; leave out --rm_head, or use "
            "--mode lmhead"
        )


def is_demo(folder: Path) -> bool:
    """Whether prepare.py --demo wrote the split in this folder."""
    split_file = folder / prism.SPLIT_FOLDER / "split.json"
    return split_file.exists() and load_json(split_file, "demo", **prism.SPLIT_TYPES)["demo"]


def demo_model(folder: Path) -> Path:
    """The stand-in model in this folder, built now if prepare.py --demo has not built it yet."""
    model = folder / STANDIN_FOLDER
    if not (model / "tokenizer.json").exists():  # the file that is written last
        texts = []
        for path in sorted((HERE / "demo").glob("*.jsonl.gz")):
            texts += [json.dumps(row) for _, row in read_rows(path)]
        build_standin_model(model, texts)
    return model


# ---- The benchmark


class BenchmarkRow(BaseModel):
    """A row of the benchmark; only these columns are needed."""

    id: StrictStr
    prompt: StrictStr
    chosen: Annotated[list[StrictStr], Field(min_length=1)]
    rejected: Annotated[list[StrictStr], Field(min_length=1)]
    subset: Literal[SUBSETS]

    @property
    def answers(self) -> list[str]:
        """All answers: the chosen, then the rejected ones."""
        return [*self.chosen, *self.rejected]


def read_benchmark(
    data: Path | None, split: str, subset: str | None, limit: int | None
) -> list[BenchmarkRow]:
    """The first `limit` rows of the split that are of the subset (None: of any).

    data: a folder with a local copy; None: download it. Raises InputError that names row and field,
    or says that the split is unknown or no row is left.
    """
    if data is None:
        splits = hub_rows(DATASET, BenchmarkRow)
        if split not in splits:
            raise InputError(f"--split {split}: {DATASET} has {', '.join(splits)}")
        raw_rows = splits[split]
    else:
        paths = split_files(data, **{split: [split]})[split]
        raw_rows = (row for path in paths for row in read_rows(path, BenchmarkRow))

    rows = [row for _, row in parse_rows(raw_rows, BenchmarkRow, DATASET)]
    if subset is not None:
        rows = [row for row in rows if row.subset == subset]
    if not rows:
        raise InputError(f"no rows of subset {subset or 'any'} in split {split}; choose another")
    return rows[:limit]


class TiesPrompt(NamedTuple):
    """How the answers to a prompt of the Ties subset were scored."""

    margin: float  # of the worst correct answer over the best incorrect one
    spread: float  # between the best and the worst correct answer


def ties_score(answers: list[tuple[str, list[float], list[float]]]) -> float:
    """The score of the Ties subset, as the benchmark defines it.

    answers: of each prompt its id, the scores of the correct and of the incorrect answers. Ids are
    `ref:P` (one correct answer) and `tied:P` (several); most P are there in both kinds.

    A prompt is accurate if its worst correct answer beats its best incorrect one. The last three
    terms are about the prompts that are there in both kinds: their margin must exceed the spread of
    the tied correct answers. Raises InputError: an id of another form, or one that is there twice.
    """
    prompts: dict[str, dict[str, TiesPrompt]] = {"ref": {}, "tied": {}}
    for row_id, correct, incorrect in answers:
        kind, _, name = row_id.partition(":")
        if kind not in prompts:
            raise InputError(
                f"Ties row {row_id}: its id should begin with ref: or tied:; take the benchmark's "
                "own file"
            )
        if name in prompts[kind]:
            raise InputError(f"Ties row {row_id}: its id is there twice; leave one out")
        prompts[kind][name] = TiesPrompt(
            margin=min(correct) - max(incorrect), spread=max(correct) - min(correct)
        )

    tied = prompts["tied"]
    ref = prompts["ref"]
    in_both = [name for name in tied if name in ref]
    smaller_margins = {name: min(ref[name].margin, tied[name].margin) for name in in_both}
    return (
        0.30 * mean_or_zero([prompt.margin > 0 for prompt in tied.values()])
        + 0.30 * mean_or_zero([prompt.margin > 0 for prompt in ref.values()])
        + 0.20 * mean_or_zero([tied[name].margin > tied[name].spread for name in in_both])
        + 0.20 * mean_or_zero([smaller_margins[name] > tied[name].spread for name in in_both])
        + 0.01
        * mean_or_zero([ties_bonus(smaller_margins[name], tied[name].spread) for name in in_both])
    )


def mean_or_zero(values: list[float]) -> float:
    """The mean; 0 if there are no values, as the benchmark counts."""
    return sum(values) / len(values) if values else 0.0


def ties_bonus(margin: float, spread: float) -> float:
    """tanh(margin / spread - 1), and its limit for a spread of 0; 0 if both are 0."""
    if spread > 0:
        return math.tanh(margin / spread - 1)
    if margin == 0:
        return 0.0  # the benchmark counts what is not a number as 0
    return math.copysign(1.0, margin)


def row_score(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """1 if the chosen answer beats every rejected one, 1 / n if it shares the top with n - 1.

    chosen, rejected: scores, float64; only the first chosen answer counts, as in the benchmark.
    """
    scores = np.concatenate([chosen, rejected])
    top = scores.max()
    if scores[0] < top:
        return 0.0
    return 1 / np.count_nonzero(scores == top)


def evaluate(rows: list[BenchmarkRow], scores: np.ndarray) -> tuple[dict[str, float], list[str]]:
    """What one reward reaches: its score by subset and their average, and the ids it gets wrong.

    scores: float64 `[answers]`, of the answers of one row after the other.
    """
    row_scores: dict[str, list[float]] = {}  # by subset, without Ties
    ties = []
    wrong_ids = []
    ends = np.cumsum([len(row.chosen) + len(row.rejected) for row in rows])
    for row, answer_scores in zip(rows, np.split(scores, ends[:-1])):
        chosen, rejected = np.split(answer_scores, [len(row.chosen)])
        if row.subset == "Ties":
            ties.append((row.id, chosen.tolist(), rejected.tolist()))
            is_right = chosen.min() > rejected.max()
        else:
            score = row_score(chosen, rejected)
            row_scores.setdefault(row.subset, []).append(score)
            is_right = score == 1
        if not is_right:
            wrong_ids.append(row.id)

    table = {}
    for subset in SUBSETS:
        if subset in row_scores:
            table[subset] = float(np.mean(row_scores[subset]))
    if ties:
        table["Ties"] = ties_score(ties)
    table["Average"] = float(np.mean(list(table.values())))
    return table, wrong_ids


def table_of_rewards(
    rows: list[BenchmarkRow], scores: np.ndarray, weights: np.ndarray | None
) -> tuple[pd.DataFrame, list[str]]:
    """A line per column of the basis, then the mean user's and the average over users.

    scores: float64 `[answers, K]`; weights: float64 `[users, K]`, or None for no users' lines.
    Returns the table and the ids of the rows that column 0 gets wrong.
    """
    columns = [evaluate(rows, column_scores) for column_scores in scores.T]
    if len(columns) == 1:
        lines = {"reward head": columns[0][0]}
    else:
        lines = {f"column {k}": table for k, (table, _) in enumerate(columns)}
    if weights is not None:
        lines["mean user"], _ = evaluate(rows, scores @ weights.mean(0))
        users = pd.DataFrame([evaluate(rows, scores @ w)[0] for w in weights])
        lines["average over users"] = users.mean().to_dict()
    _, wrong_ids = columns[0]
    return pd.DataFrame.from_dict(lines, orient="index"), wrong_ids


# ---- Heads and user weights


def find_model(path: Path) -> Path:
    """The file at `path`, or, if that is a folder of results, that of the model chosen there.

    Raises InputError that lists the models beside it: no such file, or a folder in which validation
    chose none, or one that is not there.
    """
    if path.is_file():
        return path
    folder = path.parent
    problem = "no such file"
    if path.is_dir():
        folder = path
        problem = "a folder in which validation chose no model"
        results = path / "results.json"
        if results.exists():
            chosen = load_json(results, chosen=dict).get("chosen", {}).get("file")
            if isinstance(chosen, str) and (path / chosen).is_file():
                return path / chosen
            if chosen is not None:
                problem = f"validation chose {chosen!r:.100}, which is no file in it"
    kinds = (".pt", ".npy", ".safetensors")
    models = sorted(model.name for model in folder.glob("[!.]*") if model.suffix in kinds)
    listed = ", ".join(models) or "no models"
    raise InputError(f"{path}: {problem}; give the file of a model, {folder} has {listed}")


class ModelFile(NamedTuple):
    """What is in the file of a model, which is read once."""

    path: Path
    content: Any  # a tensor, or a dict of tensors by name; of a .pt file whatever it holds
    provenance: dict[str, Any] | None  # None for files that say nothing of themselves


def read_model_file(path: Path) -> ModelFile:
    """Read a .pt, .npy or .safetensors file; only the last one says what it was learnt from.

    Raises InputError: damaged, or provenance of another shape.
    """
    if path.suffix == ".safetensors":
        return ModelFile(path, *load_tensors(path, identity=dict[str, Any] | None))
    if path.suffix == ".npy":
        return ModelFile(path, _read_array(path), None)
    return ModelFile(path, load_pickle(path), None)


def _read_array(path: Path) -> torch.Tensor:
    """The numbers in a .npy file. Raises InputError: there are none."""
    try:
        array = np.load(path, allow_pickle=False)
        own_order = array.dtype.newbyteorder("=")  # the file may be of a machine of another order
        return torch.from_numpy(array.astype(own_order, copy=False))
    except Exception as error:  # numpy has a class for each kind of damage
        raise InputError(
            f"{path}: no array of numbers ({error}); save it with numpy.save"
        ) from None


def matrix_in(file: ModelFile, names: list[str], what: str) -> torch.Tensor:
    """The matrix in a file: float32, of two dimensions.

    names: of a file of several tensors take the first of these that it holds. what: "head" or
    "user weights", for messages. A vector becomes a matrix of one column.
    Raises InputError: none of the names in it, not a finite matrix of numbers.
    """
    content = file.content
    if isinstance(content, dict):
        held_names = [name for name in names if name in content]
        if len(content) == 1:
            held_names += list(content)  # a file of one tensor, whatever its name
        if not held_names:
            remedy = "name one with --head_key"
            if what != "head":
                remedy = f"give a file with the {what}"
            raise InputError(
                f"{file.path}: holds {', '.join(map(str, content))}, and none of "
                f"{', '.join(names)}; {remedy}"
            )
        content = content[held_names[0]]
    if isinstance(content, torch.Tensor) and content.ndim == 1:
        content = content.reshape(-1, 1)
    return check_matrix(content, f"{file.path}, {what}")


def check_learnt_on(file: ModelFile, model_name: str) -> None:
    """Raise InputError if the file says that it was learnt with another model's embeddings."""
    identity = (file.provenance or {}).get("identity") or {}
    check_same_model(str(file.path), model_name, identity, identity.get("model"))


def heads_in(file: ModelFile, key: str | None, model_name: str, d: int) -> torch.Tensor:
    """The reward vectors in a file, float32 `[d, K]`.

    key: the name of the tensor in the file. d: the width of the model's states.
    Raises InputError: no matrix, or of another width.
    """
    heads = matrix_in(file, [key] if key else ["V", "reward_head", "score.weight"], "head")
    if heads.shape == (1, d):  # a score.weight
        heads = heads.T
    if heads.shape[0] != d:
        raise InputError(
            f"{file.path}: a matrix of shape {tuple(heads.shape)}, and {model_name} has d = {d}; "
            "it should be [d, K]"
        )
    return heads


def user_weights_in(file: ModelFile, K: int) -> torch.Tensor:
    """The weights of users over the K heads, float32 `[users, K]`.

    Raises InputError: no matrix, or not shares of 1 for K columns.
    """
    weights = matrix_in(file, ["W", "W_unseen"], "user weights")
    sums = weights.sum(1)
    if weights.shape[1] != K or (weights < 0).any() or ((sums - 1).abs() > 1e-2).any():
        raise InputError(
            f"{file.path}: weights of shape {tuple(weights.shape)} for {K} columns; they should be "
            "[users, K], shares of 1 in each row"
        )
    return weights


def check_same_fit(heads: torch.Tensor, heads_file: ModelFile, weights_file: ModelFile) -> None:
    """Raise InputError if the weights are of another fit than the heads, as far as this shows.

    heads: `[d, K]`, as read from `heads_file`.
    """
    if weights_file.provenance is None:
        return
    # Rank, alpha and seed are not enough, as a run on other data may have the same. A file of
    # weights holds the basis that they belong to.
    V = weights_file.content.get("V")
    differ = V is not None and not torch.equal(V.float(), heads)
    if heads_file.provenance is not None:
        differ |= any(
            heads_file.provenance.get(key) != weights_file.provenance.get(key)
            for key in ("K", "alpha", "seed")
        )
    if differ:
        raise InputError(
            f"{weights_file.path}: weights of another fit than {heads_file.path}; give the same "
            "file twice"
        )


def read_rewards(args: argparse.Namespace, d: int) -> tuple[torch.Tensor, np.ndarray | None]:
    """The heads to score with, float32 `[d, K]`, and users' weights, float64 `[users, K]` or None.

    The heads are those of --rm_head, or the model's own head. d: the width of the model's states.
    Each file is read once, and compared once with the model.
    """
    if args.rm_head is None:
        heads_file = None
        heads = load_reward_head(args.model)
    else:
        heads_file = read_model_file(args.rm_head)
        check_learnt_on(heads_file, args.model)
        heads = heads_in(heads_file, args.head_key, args.model, d)
    if args.user_weights is None:
        return heads, None

    weights_file = heads_file
    if args.user_weights != args.rm_head:
        weights_file = read_model_file(args.user_weights)
        check_learnt_on(weights_file, args.model)
    weights = user_weights_in(weights_file, K=heads.shape[1])
    if heads_file is not None:
        check_same_fit(heads, heads_file, weights_file)
    return heads, weights.double().numpy()


def main() -> None:
    args = read_arguments()
    if args.model is None and args.data is None and (args.demo or is_demo(args.dir)):
        print(
            "demo: a stand-in model with random weights and a synthetic benchmark; the scores say "
            "nothing"
        )
        args.model = str(demo_model(args.dir))
        args.data = HERE / "demo"
    if args.model is None:
        args.model = MODEL_NAME
        if args.device is None:
            check_gpu(MODEL_NAME)

    rows = read_benchmark(args.data, args.split, args.subset, args.limit)
    model, tokenizer = load_reward_model(
        args.model,
        args.device,
        dtype=DTYPES.get(args.dtype),
        tokenizer_name=args.tokenizer,
        trust_remote_code=args.trust_remote_code,
    )
    heads, weights = read_rewards(args, model.config.hidden_size)

    conversations = [
        [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": answer}]
        for row in rows
        for answer in row.answers
    ]
    embeddings = embed_conversations(
        conversations,
        model,
        tokenizer,
        cache_dir=args.dir / CACHE_FOLDER,
        token_budget=TOKEN_BUDGET,
        max_length=args.max_length,
        truncation_side=args.truncation_side,
        batch_size=args.batch_size,
    )
    scores = (embeddings.float() @ heads).double().numpy() + args.head_bias  # (answers, K)

    table, wrong_ids = table_of_rewards(rows, scores, weights)
    if args.top_k:
        table = table.nlargest(args.top_k, "Average")
    print(f"{args.model}, {len(rows):,} rows")
    print(table.to_string(float_format="{:.4f}".format))
    if args.verbose_failures:
        reward = "column 0" if heads.shape[1] > 1 else "reward head"
        print(printable(f"rows that {reward} gets wrong: {', '.join(wrong_ids) or 'none'}"))
    if args.save_csv:
        with atomic_write(args.save_csv) as file:
            file.write(csv_text(table.rename_axis("reward").reset_index()).encode())


if __name__ == "__main__":
    run_script(main)
