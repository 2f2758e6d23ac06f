"""Score RewardBench 2 with the reward model's own head, or with every column of a learnt basis in one pass.

    python eval_rb2.py                                                        the reward model itself
    python eval_rb2.py --rm_head checkpoints/PRISM_V_lore_K_10_alpha_10000.0.pt --mode lmhead
    python eval_rb2.py --rm_head results/K_10.safetensors --user_weights results/K_10.safetensors
    python eval_rb2.py --model MODEL --data DIR                               a local copy, test.jsonl or .parquet

After `prepare.py --demo` it takes the stand-in model and the written benchmark beside it.

Prints accuracy by subset, a line per column; with --user_weights also the mean user's reward (the average weights) and
the average over users of each one's personalised reward. --save_csv writes the same table.
"""

import sys
from pathlib import Path
from typing import List, Literal

from pydantic import BaseModel, Field, StrictStr
from typing_extensions import Annotated

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import math

import numpy as np
import pandas as pd
import torch

import prism
from lore.embedding import embed_conversations
from lore.files import atomic_write, check_writable, digest_of, load_json, load_pickle, load_tensors
from lore.reward_model import check_gpu, load_reward_head, load_reward_model
from lore.rows import hub_rows, parse_rows, read_rows, split_files
from lore.scripts import run_script, script_parser
from utils import InputError, check_device, check_matrix, check_settings

# ---------------------------------------------------------------------------------------------------------------------
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
DATASET = "allenai/reward-bench-2"
SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
TOKEN_BUDGET = None  # tokens in a batch; None: as the device takes
# ---------------------------------------------------------------------------------------------------------------------


class Row(BaseModel):
    """A row of the benchmark, of whose columns these are needed."""

    id: StrictStr
    prompt: StrictStr
    chosen: Annotated[List[StrictStr], Field(min_length=1)]
    rejected: Annotated[List[StrictStr], Field(min_length=1)]
    subset: Literal[SUBSETS]


def arguments():
    parser = script_parser(__doc__, HERE)
    parser.add_argument(
        "--model", default=None, metavar="ID_OR_PATH", help=f"default: {MODEL_NAME}"
    )
    parser.add_argument("--tokenizer", metavar="ID_OR_PATH", help="default: the model's")
    parser.add_argument(
        "--mode",
        choices=("auto", "seqclf", "lmhead"),
        default="auto",
        help="seqclf: the checkpoint's score head; lmhead: --rm_head; auto: --rm_head where given",
    )
    parser.add_argument(
        "--rm_head",
        type=Path,
        metavar="FILE",
        help="head or basis [d, K]: .pt, .npy or .safetensors",
    )
    parser.add_argument("--head_bias", type=float, default=0.0, help="added to every score")
    parser.add_argument(
        "--head_key", help="the tensor's name in a file of several (default: V or reward_head)"
    )
    parser.add_argument(
        "--user_weights", type=Path, metavar="FILE", help="weights [users, K] over the columns"
    )
    parser.add_argument("--split", default="test")
    parser.add_argument("--subset", metavar="NAME", help=f"one of {', '.join(SUBSETS)}")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder with a local copy")
    parser.add_argument("--batch_size", type=int, help="answers in a batch (default: as fit)")
    parser.add_argument("--max_length", type=int, help="truncate conversations to so many tokens")
    parser.add_argument("--truncation_side", choices=("left", "right"), default="left")
    parser.add_argument("--device", help="default: the GPU, else the CPU")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU"
    )
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--save_csv", type=Path, metavar="FILE")
    parser.add_argument("--top_k", type=int, metavar="N", help="print only the N best lines")
    parser.add_argument(
        "--verbose_failures", action="store_true", help="list the rows that column 0 gets wrong"
    )
    args = parser.parse_args()
    for name in ("limit", "batch_size", "max_length", "top_k"):
        if getattr(args, name) is not None:
            check_settings(**{f"--{name}": getattr(args, name)})
    check_settings(**{"--head_bias": args.head_bias})
    if args.device is not None:
        check_device(args.device)
    if args.save_csv is not None:
        if args.save_csv.is_dir():
            raise InputError(f"--save_csv {args.save_csv}: a folder; give the name of a file")
        check_writable(args.save_csv.parent)
    if args.subset is not None and args.subset not in SUBSETS:
        raise InputError(f"--subset {args.subset}: unknown; one of {', '.join(SUBSETS)}")
    if args.mode == "lmhead" and args.rm_head is None:
        raise InputError("--mode lmhead needs --rm_head, the head to score with")
    if args.mode == "seqclf" and args.rm_head is not None:
        raise InputError(
            "--mode seqclf takes the checkpoint's own head; leave out --rm_head, or use --mode lmhead"
        )
    return args


def read_matrix(path, keys, what):
    """A 1- or 2-dimensional float32 tensor from a .pt, .npy or .safetensors file, by the first of `keys` it holds."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give the {what}")
    if path.suffix == ".safetensors":
        content = load_tensors(path)[0]
    elif path.suffix == ".npy":
        try:
            content = torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, OSError, TypeError, EOFError) as error:
            raise InputError(
                f"{path}: no array of numbers ({error}); save it with numpy.save"
            ) from None
    else:
        content = load_pickle(path)
    if isinstance(content, dict):
        found = [key for key in keys if key in content] or (
            list(content) if len(content) == 1 else []
        )
        if not found:
            raise InputError(
                f"{path}: holds {', '.join(map(str, content))}, and none of {', '.join(keys)}; "
                f"{'name one with --head_key' if what == 'head' else f'give a file with the {what}'}"
            )
        content = content[found[0]]
    if isinstance(content, torch.Tensor) and content.ndim == 1:
        content = content.reshape(-1, 1)
    return check_matrix(content, f"{path}, {what}")


def read_benchmark(args):
    """The rows of the split, of the subset asked for. Raises InputError that names row and field, or no row."""
    if args.data is None:
        splits = hub_rows(DATASET)
        if args.split not in splits:
            raise InputError(f"--split {args.split}: {DATASET} has {', '.join(splits)}")
        rows = splits[args.split]
    else:
        rows = (
            row
            for path in split_files(args.data, **{args.split: [args.split]})[args.split]
            for row in read_rows(path)
        )
    found = [row for _, row in parse_rows(rows, Row, DATASET) if args.subset in (None, row.subset)][
        : args.limit
    ]
    if not found:
        raise InputError(
            f"no rows of subset {args.subset or 'any'} in split {args.split}; choose another"
        )
    return found


def ties_score(prompts):
    """The benchmark's score of its Ties subset.

    prompts: list of (id, scores of the correct answers, scores of the incorrect ones); ids are `ref:P` (one correct
    answer) and `tied:P` (several). A prompt is accurate when its worst correct answer beats its best incorrect one; its
    margin is that difference, its spread the range of the correct scores. The shares of prompts are over those that
    stand there in both kinds.
    """
    kinds = {"ref": {}, "tied": {}}
    for name, correct, incorrect in prompts:
        kind, _, prompt = name.partition(":")
        if kind not in kinds:
            raise InputError(
                f"Ties row {name}: its id should begin with ref: or tied:; take the benchmark's own file"
            )
        if prompt in kinds[kind]:
            raise InputError(f"Ties row {name}: its id stands there twice; leave one out")
        kinds[kind][prompt] = (min(correct) - max(incorrect), max(correct) - min(correct))

    def share(values):
        values = list(values)
        return sum(values) / len(values) if values else 0.0

    def safely(
        margin, spread
    ):  # a quotient that the benchmark counts as 0 where it is not a number
        if spread == 0:
            return 0.0 if margin == 0 else math.copysign(1.0, margin)
        return math.tanh(margin / spread - 1)

    tied, ref = kinds["tied"], kinds["ref"]
    both = [
        (margin, min(ref[prompt][0], margin), spread)
        for prompt, (margin, spread) in tied.items()
        if prompt in ref
    ]
    return (
        0.30 * share(margin > 0 for margin, _ in tied.values())
        + 0.30 * share(margin > 0 for margin, _ in ref.values())
        + 0.20 * share(margin > spread for margin, _, spread in both)
        + 0.20 * share(smaller > spread for _, smaller, spread in both)
        + 0.01 * share(safely(smaller, spread) for _, smaller, spread in both)
    )


def evaluate(rows, scores):
    """Score by subset of one reward, their average, and the ids of the rows it gets wrong.

    scores: float64 `[answers]`, of each row's chosen and then its rejected answers. A row outside Ties counts 1 where
    its chosen answer beats every rejected one, and 1 / n where it shares the top score with n - 1 others.
    """
    by_subset, failures, ends = (
        {},
        [],
        np.cumsum([len(row.chosen) + len(row.rejected) for row in rows]),
    )
    for row, of_row in zip(rows, np.split(scores, ends[:-1])):
        chosen, rejected = of_row[: len(row.chosen)], of_row[len(row.chosen) :]
        if row.subset == "Ties":
            by_subset.setdefault("Ties", []).append((row.id, chosen.tolist(), rejected.tolist()))
            right = chosen.min() > rejected.max()
        else:
            right = float(chosen[0] == of_row.max()) / (of_row == of_row.max()).sum()
            by_subset.setdefault(row.subset, []).append(right)
        if right < 1:
            failures.append(row.id)
    table = {
        subset: ties_score(by_subset[subset]) if subset == "Ties" else np.mean(by_subset[subset])
        for subset in SUBSETS
        if subset in by_subset
    }
    return {**table, "Average": np.mean(list(table.values()))}, failures


def tables_of(rows, scores, weights):
    """A line per column of the basis, then of the mean user and the average over users -> (DataFrame, failures of the
    first). scores: float64 `[answers, K]`; weights: `[users, K]` or None."""
    columns = [evaluate(rows, column) for column in scores.T]
    tables = {
        f"column {k}" if len(columns) > 1 else "reward head": table
        for k, (table, _) in enumerate(columns)
    }
    if weights is not None:
        tables["mean user"] = evaluate(rows, scores @ weights.mean(0))[0]
        users = pd.DataFrame([evaluate(rows, scores @ w)[0] for w in weights])
        tables["average over users"] = users.mean().to_dict()
    return pd.DataFrame.from_dict(tables, orient="index"), columns[0][1]


def read_heads(args, d_of_model):
    """The heads `[d, K]` and the user weights `[users, K]`, or None. Raises InputError: other shapes, another model."""
    of_head = of_weights = None
    if args.rm_head is None:
        heads = load_reward_head(args.model)
    else:
        heads = read_matrix(
            args.rm_head,
            [args.head_key] if args.head_key else ["V", "reward_head", "score.weight"],
            "head",
        )
        of_head = check_same_model(args.rm_head, args.model)
    if heads.shape == (1, d_of_model):
        heads = heads.T
    if heads.shape[0] != d_of_model:
        raise InputError(
            f"{args.rm_head}: a matrix of shape {tuple(heads.shape)}, and {args.model} has d = {d_of_model}; "
            "it should be [d, K]"
        )
    weights = None
    if args.user_weights is not None:
        weights = read_matrix(args.user_weights, ["W", "W_unseen"], "user weights")
        of_weights = check_same_model(args.user_weights, args.model)
    if weights is not None and (
        weights.shape[1] != heads.shape[1]
        or (weights < 0).any()
        or ((weights.sum(1) - 1).abs() > 1e-2).any()
    ):
        raise InputError(
            f"{args.user_weights}: weights of shape {tuple(weights.shape)} for {heads.shape[1]} columns; "
            "they should be [users, K], shares of 1 in each row"
        )
    if None not in (of_head, of_weights) and any(
        of_head.get(key) != of_weights.get(key) for key in ("K", "alpha", "seed")
    ):
        raise InputError(
            f"{args.user_weights}: weights of another fit than {args.rm_head}; give the same file twice"
        )
    return heads, weights


def check_same_model(path, model_name):
    """What a safetensors file says of itself, None of others. Raises InputError where that is another model's basis."""
    about = load_tensors(path)[1] if path.suffix == ".safetensors" else None
    identity = about and about.get("identity")
    if identity and identity["reward_head"] != digest_of(load_reward_head(model_name).tolist()):
        raise InputError(
            f"{path}: learnt from embeddings of {identity['model']}, whose reward head is not that of "
            f"{model_name}; give --model the one it was learnt from"
        )
    return about


def is_demo(folder):
    """Whether prepare.py --demo wrote the split in this folder."""
    split = folder / prism.SPLIT_FOLDER / "split.json"
    return split.exists() and load_json(split, "demo")["demo"]


def main():
    args = arguments()
    if is_demo(args.dir) and args.model is None and args.data is None:
        print(
            "demo: a stand-in model with random weights and a synthetic benchmark; the scores say nothing"
        )
        args.model, args.data = str(args.dir / ".standin"), HERE / "demo"
    if args.model is None and args.device is None:
        check_gpu(MODEL_NAME)
    args.model = args.model or MODEL_NAME
    rows = read_benchmark(args)
    model, tokenizer = load_reward_model(
        args.model,
        args.device,
        tokenizer_name=args.tokenizer,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        trust_remote_code=args.trust_remote_code,
    )
    heads, weights = read_heads(args, model.config.hidden_size)
    conversations = [
        [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": answer}]
        for row in rows
        for answer in (*row.chosen, *row.rejected)
    ]
    embeddings = embed_conversations(
        conversations,
        model,
        tokenizer,
        args.dir / ".embedding_cache",
        TOKEN_BUDGET,
        max_length=args.max_length,
        truncation_side=args.truncation_side,
        batch_size=args.batch_size,
    )
    scores = (embeddings.float() @ heads).double().numpy() + args.head_bias  # (answers, K)
    table, failures = tables_of(rows, scores, None if weights is None else weights.double().numpy())
    if args.top_k:
        table = table.nlargest(args.top_k, "Average")
    print(f"{args.model}, {len(rows):,} rows\n" + table.to_string(float_format="{:.4f}".format))
    if args.verbose_failures:
        print(
            f"rows that {'column 0' if heads.shape[1] > 1 else 'reward head'} gets wrong: "
            f"{', '.join(failures) or 'none'}"
        )
    if args.save_csv:
        with atomic_write(args.save_csv) as file:
            table.to_csv(file, index_label="reward")


if __name__ == "__main__":
    run_script(main)
