"""Score RewardBench 2 with the reward model's own head, or with every column of a learnt basis in one pass.

    python eval_rb2.py                                                        the reward model itself
    python eval_rb2.py --rm_head checkpoints/PRISM_V_lore_K_10_alpha_10000.0.pt --mode lmhead
    python eval_rb2.py --rm_head results/K_10.safetensors --user_weights results/K_10.safetensors
    python eval_rb2.py --model MODEL --data DIR                               a local copy, test.jsonl or .parquet

After `prepare.py --demo` it takes the stand-in model and the written benchmark beside it.

Prints accuracy by subset, a line per column; with --user_weights also the mean user's reward (the average weights) and
the average over users of each one's personalised reward. --save_csv writes the same table.
"""

import csv
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from utils import *

# ---------------------------------------------------------------------------------------------------------------------
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
DATASET = "allenai/reward-bench-2"
SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
ATTENTION = "sdpa"  # computes a prompt once for all answers; flash_attention_2 cannot. None: flash where installed
TOKEN_BUDGET = 8192  # tokens in a batch
# ---------------------------------------------------------------------------------------------------------------------


def arguments():
    parser = script_parser(__doc__, HERE)
    parser.add_argument("--model", default=None, metavar="ID_OR_PATH", help=f"default: {MODEL_NAME}")
    parser.add_argument("--tokenizer", metavar="ID_OR_PATH", help="default: the model's")
    parser.add_argument("--mode", choices=("auto", "seqclf", "lmhead"), default="auto",
                        help="seqclf: the checkpoint's score head; lmhead: --rm_head; auto: --rm_head where given")
    parser.add_argument("--rm_head", type=Path, metavar="FILE", help="head or basis [d, K]: .pt, .npy or .safetensors")
    parser.add_argument("--head_bias", type=float, default=0.0, help="added to every score")
    parser.add_argument("--head_key", help="the tensor's name in a file of several (default: V or reward_head)")
    parser.add_argument("--user_weights", type=Path, metavar="FILE", help="weights [users, K] over the columns")
    parser.add_argument("--split", default="test")
    parser.add_argument("--subset", metavar="NAME", help=f"one of {', '.join(SUBSETS)}")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder with a local copy")
    parser.add_argument("--batch_size", type=int, help="prompts, each with its answers, in a batch (default: as fit)")
    parser.add_argument("--max_length", type=int, help="truncate conversations to so many tokens")
    parser.add_argument("--truncation_side", choices=("left", "right"), default="left")
    parser.add_argument("--device", help="default: the GPU, else the CPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU")
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--save_csv", type=Path, metavar="FILE")
    parser.add_argument("--top_k", type=int, metavar="N", help="print only the N best lines")
    parser.add_argument("--verbose_failures", action="store_true", help="list the rows that column 0 gets wrong")
    args = parser.parse_args()
    for name in ("limit", "batch_size", "max_length", "top_k"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: give a whole number from 1")
    if not is_number(args.head_bias, -1e6, 1e6):
        raise InputError(f"--head_bias {args.head_bias}: give a number from -1e6 to 1e6")
    try:
        usable = torch.empty(0, device=args.device).device.type in ("cpu", "cuda")
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise InputError(f"--device {args.device}: not on this machine; give cpu, or a GPU such as cuda:0")
    if args.save_csv is not None:
        if args.save_csv.is_dir():
            raise InputError(f"--save_csv {args.save_csv}: a folder; give the name of a file")
        check_writable(args.save_csv.parent)
    if args.subset is not None and args.subset not in SUBSETS:
        raise InputError(f"--subset {args.subset}: unknown; one of {', '.join(SUBSETS)}")
    if args.mode == "lmhead" and args.rm_head is None:
        raise InputError("--mode lmhead needs --rm_head, the head to score with")
    if args.mode == "seqclf" and args.rm_head is not None:
        raise InputError("--mode seqclf takes the checkpoint's own head; leave out --rm_head, or use --mode lmhead")
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
            raise InputError(f"{path}: no array of numbers ({error}); save it with numpy.save") from None
    else:
        content = load_pickle(path)
    if isinstance(content, dict):
        found = [key for key in keys if key in content] or (list(content) if len(content) == 1 else [])
        if not found:
            raise InputError(f"{path}: holds {', '.join(map(str, content))}, and none of {', '.join(keys)}; "
                             f"{'name one with --head_key' if what == 'head' else f'give a file with the {what}'}")
        content = content[found[0]]
    if not isinstance(content, torch.Tensor) or content.is_complex() or content.ndim not in (1, 2) or (
            content.numel() == 0) or not torch.isfinite(content).all():
        raise InputError(f"{path}: the {what} is not a finite vector or matrix of numbers")
    return content.float()


def read_rows(args):
    """The benchmark's rows: dicts with id, prompt, chosen, rejected, subset. Raises InputError that names the row."""
    splits = hub_splits(DATASET) if args.data is None else {args.split: read_split(args.data, args.split)}
    if args.split not in splits:
        raise InputError(f"--split {args.split}: {DATASET} has {', '.join(splits)}")
    found = []
    for where, row in splits[args.split]:
        try:
            kept = {key: row[key] for key in ("id", "prompt", "chosen", "rejected", "subset")}
        except KeyError as error:
            raise InputError(f"{where}: no column {error}; expected is the schema of {DATASET}") from None
        if not isinstance(kept["prompt"], str) or not isinstance(kept["id"], str):
            raise InputError(f"{where}: id {kept['id']!r} and prompt {repr(kept['prompt'])[:20]}; both should be text")
        if kept["subset"] not in SUBSETS:
            raise InputError(f"{where}: unknown subset {kept['subset']!r}; one of {', '.join(SUBSETS)}")
        for side in ("chosen", "rejected"):
            if not isinstance(kept[side], (list, tuple)) or not kept[side] or not all(
                    isinstance(text, str) for text in kept[side]):
                raise InputError(f"{where}: no list of {side} answers; every row needs one or more")
        if args.subset in (None, kept["subset"]):
            found.append(kept)
        if len(found) == args.limit:
            break
    if not found:
        raise InputError(f"no rows of subset {args.subset or 'any'} in split {args.split}")
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
            raise InputError(f"Ties row {name}: its id should begin with ref: or tied:; take the benchmark's own file")
        if prompt in kinds[kind]:
            raise InputError(f"Ties row {name}: its id stands there twice; leave one out")
        kinds[kind][prompt] = (min(correct) - max(incorrect), max(correct) - min(correct))

    def share(values):
        values = list(values)
        return sum(values) / len(values) if values else 0.0

    def safely(margin, spread):  # a quotient that the benchmark counts as 0 where it is not a number
        if spread == 0:
            return 0.0 if margin == 0 else math.copysign(1.0, margin)
        return math.tanh(margin / spread - 1)

    tied, ref = kinds["tied"], kinds["ref"]
    both = [(margin, min(ref[prompt][0], margin), spread) for prompt, (margin, spread) in tied.items() if prompt in ref]
    return (0.30 * share(margin > 0 for margin, _ in tied.values())
            + 0.30 * share(margin > 0 for margin, _ in ref.values())
            + 0.20 * share(margin > spread for margin, _, spread in both)
            + 0.20 * share(smaller > spread for _, smaller, spread in both)
            + 0.01 * share(safely(smaller, spread) for _, smaller, spread in both))


def evaluate(rows, scores):
    """Score by subset of one reward, and the ids of the rows it gets wrong.

    scores: for each row (scores of the chosen, scores of the rejected answers). A row outside Ties is right when its
    first chosen answer beats every rejected one.
    """
    by_subset, failures = {}, []
    for row, (chosen, rejected) in zip(rows, scores):
        if row["subset"] == "Ties":
            by_subset.setdefault("Ties", []).append((row["id"], chosen, rejected))
            right = min(chosen) > max(rejected)
        else:
            right = chosen[0] > max(rejected)
            by_subset.setdefault(row["subset"], []).append(right)
        if not right:
            failures.append(row["id"])
    table = {subset: ties_score(found) if subset == "Ties" else sum(found) / len(found)
             for subset, found in by_subset.items()}
    return table, failures


def is_demo(folder):
    """Whether prepare.py --demo wrote the split in this folder."""
    split = folder / "data" / "prism" / "split.json"
    return split.exists() and load_json(split, "demo")["demo"]


def mean_tables(tables):
    return {subset: float(np.mean([table[subset] for table in tables])) for subset in tables[0]}


def main():
    args = arguments()
    standin = args.dir / ".standin"
    if is_demo(args.dir) and args.model is None and args.data is None:
        print("demo: a stand-in model with random weights and a synthetic benchmark; the scores say nothing")
        args.model, args.data = str(standin / "model"), standin / "benchmark"
    asks_for_gpu = args.model is None and args.device is None
    args.model = args.model or MODEL_NAME
    rows = read_rows(args)
    if args.mode == "seqclf" or (args.mode == "auto" and args.rm_head is None):
        heads = load_reward_head(args.model)
    else:
        keys = [args.head_key] if args.head_key else ["V", "reward_head", "score.weight"]
        heads = read_matrix(args.rm_head, keys, "head")
    weights = read_matrix(args.user_weights, ["W", "W_unseen"], "user weights") if args.user_weights else None
    if asks_for_gpu:
        check_gpu(MODEL_NAME)
    model, tokenizer = load_reward_model(args.model, args.device, attention=ATTENTION, tokenizer_name=args.tokenizer,
                                         dtype=getattr(torch, args.dtype) if args.dtype else None,
                                         trust_remote_code=args.trust_remote_code)
    d = model.config.hidden_size
    if heads.ndim == 1 or (heads.shape[0] != d and heads.shape == (1, d)):
        heads = heads.reshape(-1, 1)
    if heads.shape[0] != d:
        raise InputError(f"{args.rm_head}: a matrix of shape {tuple(heads.shape)}, and {args.model} has d = {d}; "
                         "it should be [d, K]")
    if weights is not None and (weights.ndim != 2 or weights.shape[1] != heads.shape[1]):
        raise InputError(f"{args.user_weights}: weights of shape {tuple(weights.shape)} for {heads.shape[1]} columns; "
                         "they should be [users, K]")

    conversations = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
                     for row in rows for answer in (*row["chosen"], *row["rejected"])]
    embeddings = embed_conversations(conversations, model, tokenizer, args.dir / ".embedding_cache", TOKEN_BUDGET,
                                     max_length=args.max_length, truncation_side=args.truncation_side,
                                     batch_size=args.batch_size)
    scores = (embeddings.float() @ heads).double() + args.head_bias  # (answers, K)
    ends = np.cumsum([len(row["chosen"]) + len(row["rejected"]) for row in rows])

    def table_of(column):
        parts = [part.tolist() for part in np.split(column.numpy(), ends[:-1])]
        return evaluate(rows, [(part[:len(row["chosen"])], part[len(row["chosen"]):])
                               for row, part in zip(rows, parts)])

    tables, failures = {}, None
    for k in range(heads.shape[1]):
        tables[f"column {k}" if heads.shape[1] > 1 else "reward head"], wrong = table_of(scores[:, k])
        failures = wrong if failures is None else failures
    if weights is not None:
        tables["mean user"] = table_of(scores @ weights.double().mean(0))[0]
        tables["average over users"] = mean_tables([table_of(scores @ w)[0] for w in weights.double()])

    subsets = [subset for subset in SUBSETS if any(row["subset"] == subset for row in rows)]
    for table in tables.values():
        table["Average"] = float(np.mean([table[subset] for subset in subsets]))
    names = sorted(tables, key=lambda name: -tables[name]["Average"])[:args.top_k] if args.top_k else list(tables)
    print(f"{args.model}, {len(rows):,} rows")
    print(f"{'':20}" + "".join(f"{subset:>12}" for subset in (*subsets, "Average")))
    for name in names:
        print(f"{name:20}" + "".join(f"{tables[name][subset]:>12.4f}" for subset in (*subsets, "Average")))
    if args.verbose_failures:
        print(f"rows that {next(iter(tables))} gets wrong: {', '.join(map(str, failures)) or 'none'}")
    if args.save_csv:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["reward", *subsets, "Average"])
        writer.writerows([name, *(tables[name][subset] for subset in (*subsets, "Average"))] for name in names)
        with atomic_write(args.save_csv) as file:
            file.write(text.getvalue().encode())


if __name__ == "__main__":
    run_script(main)
