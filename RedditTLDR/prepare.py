"""Embed the Reddit TL;DR comparisons with the frozen reward model.

    python prepare.py                                  on a CUDA GPU with 18 GB or more; downloads data and model
    torchrun --nproc-per-node 8 prepare.py             the same on eight GPUs
    python prepare.py --demo                           on any machine: tiny stand-in model, synthetic comparisons
    python prepare.py --data DIR --model ID_OR_PATH    your own data in the hub's schema, another reward model

Writes beside itself tldr_embeddings_train.pkl and tldr_embeddings_val.pkl (worker -> list of comparisons with the
embeddings of both summaries) and reward_head.safetensors. An interrupted run resumes from .embedding_cache/.
The full data set has 92,858 train and 86,086 validation rows, of which 2,284 (CNN/DM articles) have no post and are
left out.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from utils import *

# ---------------------------------------------------------------------------------------------------------------------
MODEL_NAME = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"
DATASET = "openai/summarize_from_feedback"
ATTENTION = "sdpa"  # computes a post once for all its summaries; flash_attention_2 cannot. None: flash where installed
TOKEN_BUDGET = 8192  # tokens in a batch
SHARD_SIZE = 1024  # summaries per file of the cache, the most that an interruption loses
# ---------------------------------------------------------------------------------------------------------------------


def build_demo(data, model):
    """The demo's synthetic comparisons and stand-in reward model."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import standin
    print(standin.STANDIN_NOTE)
    standin.write_tldr_corpus(data)
    standin.build_reward_model(model)


def read_comparisons(folder):
    """The rows of both splits, (where, row) pairs: from a folder, or from the hub where it is None."""
    if folder is not None:
        return read_split(folder, "train"), read_split(folder, "validation", "test")
    names = ("train", "validation")
    splits = hub_splits(DATASET, revision="refs/convert/parquet",
                        data_files={name: f"comparisons/{name}/*.parquet" for name in names})
    return [splits[name] for name in names]


def comparisons_by_worker(rows, limit=None):
    """Group the first `limit` usable rows: worker -> list of {text, winning_summary, losing_summary}.

    Workers come in ascending order of their number of comparisons. Returns also how many rows were dropped because
    their post or a summary is null or empty. Raises InputError that names the row.
    """
    by_worker, kept, dropped = {}, 0, 0
    for where, row in rows:
        try:
            post, choice, worker = row["info"]["post"], row["choice"], row["worker"]
            summaries = [summary["text"] for summary in row["summaries"]]
        except (KeyError, TypeError) as error:
            raise InputError(f"{where}: a column is missing or of another kind ({error}); the hub's schema has "
                             "info.post, summaries with text, choice and worker") from None
        if type(choice) is not int or choice not in (0, 1) or len(summaries) != 2 or not isinstance(worker, str):
            raise InputError(f"{where}: choice {choice!r}, {len(summaries)} summaries, worker {worker!r}; needed are "
                             "choice 0 or 1, two summaries and a worker's name")
        try:
            "".join(text or "" for text in (post, *summaries)).encode()
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(f"{where}: a post or a summary is no Unicode text ({error}); repair it") from None
        if not all(isinstance(text, str) and text.strip() for text in (post, *summaries)):
            dropped += 1
            continue
        by_worker.setdefault(worker, []).append(
            {"text": post, "winning_summary": summaries[choice], "losing_summary": summaries[1 - choice]})
        kept += 1
        if kept == limit:
            break
    return dict(sorted(by_worker.items(), key=lambda item: len(item[1]))), dropped


def embed(splits, args):
    """Add to every comparison of both splits its embeddings, one bfloat16 tensor per distinct (post, summary)."""
    numbers = {}
    pairs = [pair for by_worker in splits for comparisons in by_worker.values() for pair in comparisons]
    for pair in pairs:
        for side in ("winning", "losing"):
            numbers.setdefault((pair["text"], pair[f"{side}_summary"]), len(numbers))
    print(f"{2 * len(pairs):,} summaries to embed, {len(numbers):,} distinct ones")
    model, tokenizer = load_reward_model(args.model, attention=ATTENTION)
    embeddings = embed_conversations(
        [[{"role": "user", "content": post}, {"role": "assistant", "content": summary}] for post, summary in numbers],
        model, tokenizer, args.dir / ".embedding_cache", TOKEN_BUDGET, SHARD_SIZE)
    vectors = [vector.clone() for vector in embeddings.bfloat16()]  # each with memory of its own, as pickled
    for pair in pairs:
        pair["embeddings"] = {side: [vectors[numbers[pair["text"], pair[f"{side}_summary"]]]]
                              for side in ("winning", "losing")}


def main():
    args = prepare_arguments(__doc__, HERE, MODEL_NAME, build_demo)
    splits = []
    for name, rows in zip(("train", "validation"), read_comparisons(args.data)):
        by_worker, dropped = comparisons_by_worker(rows, args.limit)
        print(f"{name}: {sum(map(len, by_worker.values())):,} comparisons by {len(by_worker)} workers, "
              f"{dropped:,} rows without a post or a summary dropped")
        if not by_worker:
            raise InputError(f"{args.data or DATASET}: the {name} split has no usable row, {dropped:,} lack a post or "
                             "a summary; give a file with comparisons")
        splits.append(by_worker)
    head = load_reward_head(args.model)
    outputs = [args.dir / name for name in TLDR_FILES]
    identity = {"model": "stand-in" if args.demo else args.model, "reward_head": digest_of(head.tolist()),
                "data": digest_of(splits)}
    if embeddings_are_finished(outputs, identity, args.overwrite):
        print(f"these embeddings are finished already, in {args.dir}; next: python train_basis.py")
        return

    embed(splits, args)
    if process_rank() > 0:
        return
    with new_embeddings(args.dir, head, identity, model=identity["model"], data=args.label or DATASET,
                        demo=args.demo) as folder:
        for path, by_worker in zip(outputs, splits):
            save_pickle(folder / path.name, by_worker)
    for path, by_worker in zip(outputs, splits):
        print(f"{path.name}: {len(by_worker)} workers, {sum(map(len, by_worker.values())):,} pairs, d = {len(head)}, "
              f"{path.stat().st_size / 1e6:,.1f} MB")
    print("next: python train_basis.py")


if __name__ == "__main__":
    run_script(main)
