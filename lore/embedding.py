"""phi(prompt, response): embeddings of conversations by a frozen reward model.

The steps of `embed_distinct`, and where they are described:

    conversations -> sorted distinct sequences of token ids     lore.conversations
    a trial on the model chooses how sequences are batched      lore.batching_trial
    sequences are cut into shards, and shards into batches      lore.batching
    a batch goes through the model                              lore.prefix_attention
    finished shards are kept in a cache folder                  here

The cache folder has a folder for each model and way of computing, named after a fingerprint. There
a shard's file is named after its token ids, so a call for the same conversations finds it again.
Shards are cut from the sorted sequences: other conversations than before make other shards.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from lore.batching import Shard, last_states
from lore.batching_trial import known_batching
from lore.checkpoint import is_plain_table
from lore.conversations import (
    TEMPLATE_DATE,
    Conversation,
    group_equal,
    quoted,
    token_ids,
    tokenize_to_bytes,
    truncate,
)
from lore.files import check_writable, load_tensors, save_tensors
from lore.reward_model import load_reward_model, load_tokenizer, model_identity
from utils import InputError, check_whole, is_finite, process_count, process_rank, progress_bar

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CACHE_VERSION = 5  # of how embeddings are computed and kept; another version reads no older shards
GPU_TOKEN_BUDGET = 8192  # tokens in a batch
CPU_TOKEN_BUDGET = 4096
SHARD_SIZE = 1024  # sequences in a shard
NUMBERS_NAMED = 5  # of conversations that an error counts


# ---- From conversations to sequences


def distinct_sequences(
    conversations: list[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None = None,
    truncation_side: str = "left",
    rank: int = 0,
    ranks: int = 1,
) -> dict[bytes, list[int]]:
    """The distinct sequences of conversations, sorted: sequence -> its conversations' numbers.

    Equal conversations are tokenized once, and each of `ranks` processes tokenizes a share.
    Raises InputError: one that is not a list of messages, or that the template cannot format.
    """
    distinct, groups = group_equal(conversations)
    share = [
        truncate(sequence, max_length, truncation_side)
        for sequence in tokenize_to_bytes(distinct[rank::ranks], tokenizer)
    ]
    shares = [share]
    if ranks > 1:
        shares = [None] * ranks
        dist.all_gather_object(shares, share)

    conversations_of = {}
    for group, numbers in enumerate(groups):
        # The processes took turns: each tokenized every `ranks`-th group.
        tokenized = shares[group % ranks]
        sequence = tokenized[group // ranks]
        conversations_of.setdefault(sequence, []).extend(numbers)
    return dict(sorted(conversations_of.items()))


def check_sequences(
    conversations_of: dict[bytes, list[int]],
    model: "PreTrainedModel",
    conversations: list[Conversation],
) -> None:
    """Raise InputError if sequences are empty, or beyond the model's context or vocabulary.

    The error counts all such conversations, so that one repair is enough.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None or context <= 0:  # some configs have -1 for no limit
        context = math.inf
    vocabulary = model.get_input_embeddings().weight.shape[0]
    empty = []
    too_long = []
    unknown = []
    longest = 0
    largest_id = 0
    for sequence, numbers in conversations_of.items():
        ids = token_ids(sequence)
        if len(ids) == 0:
            empty += numbers
            continue
        if len(ids) > context:
            too_long += numbers
            longest = max(longest, len(ids))
        if ids.max() >= vocabulary:
            unknown += numbers
            largest_id = max(largest_id, int(ids.max()))

    problems = []
    if empty:
        problems.append(f"{_count_and_name(empty, conversations)} no tokens; leave them out")
    if too_long:
        problems.append(
            f"{_count_and_name(too_long, conversations)} more than the {context:,} tokens of the "
            f"model's context, the longest {longest:,}; leave them out, or cut them with "
            f"max_length={context} (a script: --max_length {context})"
        )
    if unknown:
        problems.append(
            f"{_count_and_name(unknown, conversations)} tokens up to id {largest_id}, and the "
            f"model's vocabulary has {vocabulary}; leave them out, or take the model's "
            "own tokenizer"
        )
    if problems:
        raise InputError("; and ".join(problems))


def _count_and_name(numbers: list[int], conversations: list[Conversation]) -> str:
    """How many conversations these are, and which: the beginning of "3 of 60 conversations have".

    numbers: places in `conversations`, not empty.
    """
    numbers = sorted(numbers)
    first_numbers = ", ".join(map(str, numbers[:NUMBERS_NAMED]))
    if len(numbers) > NUMBERS_NAMED:
        first_numbers += ", .."
    return (
        f"{len(numbers):,} of {len(conversations):,} conversations (counted from 0: "
        f"{first_numbers}; the first is {quoted(conversations[numbers[0]])}) have"
    )


def warn_of_equal_token_ids(
    label: str,
    pairs: list[tuple[int, int]],
    conversations: list[Conversation],
    rows: torch.Tensor,
    max_length: int | None = None,
) -> int:
    """How many pairs have two sides that the model cannot tell apart.

    Their margin is 0, so they count as wrong under every reward. Prints how many these are if the
    texts of any of them differ; `lore.data_notes.warn_of_equal_sides` tells of equal texts.
    pairs: the places of both sides in `conversations`. rows: int64 `[n]`, from `embed_distinct` for
    these conversations. max_length: what they were cut to.
    """
    row_of = rows.tolist()
    equal = [(a, b) for a, b in pairs if row_of[a] == row_of[b]]
    different_texts = sum(conversations[a] != conversations[b] for a, b in equal)
    if different_texts:
        cause = "the chat template"
        if max_length is not None:
            cause += f" or the cut to {max_length:,} tokens"
        message = (
            f"{label}: {len(equal):,} of {len(pairs):,} pairs have two sides of equal token ids "
            "and count as wrong under every reward; the texts of "
            f"{different_texts:,} of them differ: {cause} leaves out what they differ in"
        )
        if len(equal) > 0.01 * len(pairs):
            message += f"; warning: that is {len(equal) / len(pairs):.1%}, leave them out"
        print(message)
    return len(equal)


# ---- Shards that are kept


def model_fingerprint(model: "PreTrainedModel", cache_dir: str | Path | None) -> str:
    """A digest of what a model's states depend on, besides the tokens.

    The weights are a part of it only if states are kept, in `cache_dir`: reading them takes time.
    Of transformers' version it has the first two numbers: a model's code may change between these,
    while a release such as 5.23.1 repairs what fails, and need not cost a night's work.
    """
    checkpoint = getattr(model, "reward_checkpoint", None)
    settings = model.config.to_dict()
    # Another path, or the version that saved it, does not make another model.
    settings.update(_name_or_path=None, transformers_version=None)
    how_it_runs = [
        CACHE_VERSION,
        model.dtype,
        model.config._attn_implementation,
        model.device.type,
        torch.__version__,
        transformers_version(),
        settings,
    ]
    if checkpoint and cache_dir:
        how_it_runs.append(model_identity(checkpoint, cache_dir)["weights"])
    digest = hashlib.sha256(json.dumps(how_it_runs, sort_keys=True, default=str).encode())
    if cache_dir:
        for name, weights in model.state_dict().items():
            values = weights.flatten()
            if checkpoint:  # a sample tells if they have changed since they were loaded
                values = values[:: len(values) // 64 + 1]
            values = values.cpu().contiguous()
            digest.update(f"{name} {len(values)}".encode())
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def transformers_version() -> str:
    """The first two numbers of transformers' version, such as "5.23"."""
    from transformers import __version__

    return ".".join(__version__.split(".")[:2])


def say_if_nothing_is_kept(cache_dir: Path, folder: Path) -> None:
    """Print a line if the cache has embeddings, and none for this model and way of computing."""
    kept = {path.parent for path in cache_dir.glob("*/*.safetensors")}
    if kept and folder not in kept and process_rank() == 0:
        print(
            f"note: what {cache_dir} keeps is of another model, device, setting or version than "
            f"this run's (torch {torch.__version__}, transformers {transformers_version()}), so "
            "all embeddings are computed"
        )


def shard_path(folder: Path, sequences: list[bytes]) -> Path:
    """The file of a shard with these sequences."""
    separator = b" end"  # as a token id it is above any vocabulary
    digest = hashlib.sha256(separator.join(sequences)).hexdigest()
    return folder / f"{digest[:24]}.safetensors"


def load_shard_states(path: Path, count: int) -> torch.Tensor | None:
    """The states in a shard's file, `[count, d]`; None if they are missing, damaged or others."""
    with contextlib.suppress(InputError):
        tensors, _ = load_tensors(path)
        states = tensors.get("embeddings", torch.zeros(0))
        if is_plain_table(states) and len(states) == count and is_finite(states):
            return states
    return None


def open_shards(parts: Iterable[list[bytes]], folder: Path | None) -> Iterator[Shard]:
    """A shard for each part of the sequences, with its states if `folder` has them."""
    for sequences in parts:
        if folder is None:
            yield Shard(sequences)
        else:
            path = shard_path(folder, sequences)
            yield Shard(sequences, path, load_shard_states(path, len(sequences)))


# ---- From sequences to embeddings


class DistinctEmbeddings(NamedTuple):
    """Embeddings of conversations, of which equal ones share a row."""

    table: torch.Tensor  # (distinct, d) on the CPU, in the order of the token ids
    rows: torch.Tensor  # int64 (n,): the row of each conversation
    record: dict  # what the embeddings depend on, JSON values


class EmbeddingTable:
    """The embeddings of all distinct sequences, filled shard by shard.

    embeddings: `[distinct, d]` on the CPU, None before the first shard.
    """

    def __init__(
        self,
        conversations: list[Conversation],
        conversations_of: dict[bytes, list[int]],
        dtype: torch.dtype | None,
    ) -> None:
        """conversations_of: from `distinct_sequences`. dtype: None for that of the states."""
        self.conversations = conversations
        self.conversations_of = conversations_of
        self.row_of = {sequence: row for row, sequence in enumerate(conversations_of)}
        self.dtype = dtype
        self.embeddings: torch.Tensor | None = None

    def fill(self, sequences: list[bytes], states: torch.Tensor) -> None:
        """Put the states `[len(sequences), d]` in the rows of their sequences.

        Raises InputError: states that are not finite.
        """
        if not is_finite(states):
            is_broken = ~states.isfinite().all(1)  # (len(sequences),)
            broken = sequences[int(is_broken.nonzero()[0])]
            first_number = self.conversations_of[broken][0]
            conversation = self.conversations[first_number]
            raise InputError(
                f"the model gives the conversation {quoted(conversation)} NaN or infinite values "
                f"in {states.dtype}; leave it out, or check the model"
            )
        if self.embeddings is None:
            shape = len(self.row_of), states.shape[1]
            self.embeddings = torch.empty(shape, dtype=self.dtype or states.dtype)
        rows = [self.row_of[sequence] for sequence in sequences]
        self.embeddings[rows] = states.to(self.embeddings.dtype)

    def row_of_conversation(self) -> torch.Tensor:
        """The row of each conversation: int64 `[n]`."""
        rows = torch.empty(len(self.conversations), dtype=torch.int64)
        for sequence, numbers in self.conversations_of.items():
            rows[numbers] = self.row_of[sequence]
        return rows


def compute_shards(
    parts: list[list[bytes]],
    folder: Path | None,
    table: EmbeddingTable,
    model: "PreTrainedModel",
    batching: str,
    budget: int,
    batch_size: int | None,
) -> None:
    """Fill the table with the states of these shards, and keep them in `folder`.

    parts: the sequences of each shard. batching, budget, batch_size: see `lore.batching`.
    """
    shards = open_shards(parts, folder)
    with progress_bar("embedding", sum(map(len, parts)), unit="text") as bar:
        for shard, states in last_states(model, shards, batching, budget, batch_size, bar.update):
            table.fill(shard.sequences, states)
            if shard.path and shard.states is None:
                save_tensors(shard.path, {"embeddings": states})


def collect_shards(parts: list[list[bytes]], folder: Path, table: EmbeddingTable) -> None:
    """Fill the table with shards that other processes made. Raises InputError: one is missing."""
    for shard in open_shards(parts, folder):
        if shard.states is None:
            raise InputError(
                f"{shard.path}: not made by the other processes; give all one folder, and run the "
                "same command again"
            )
        table.fill(shard.sequences, shard.states)


def embed_distinct(
    conversations: Iterable[Conversation],
    model: "PreTrainedModel | str | Path",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    cache_dir: str | Path | None = None,
    token_budget: int | None = None,
    shard_size: int = SHARD_SIZE,
    max_length: int | None = None,
    truncation_side: str = "left",
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> DistinctEmbeddings:
    """As `embed_conversations`, but equal conversations share a row of what is returned.

    The record is a dict of JSON values: device, torch, transformers, attention, dtype,
    token_budget, date (of the chat template) and the fields of
    `lore.batching_trial.BatchingTrial`.
    """
    settings = dict(
        token_budget=token_budget,
        shard_size=shard_size,
        max_length=max_length,
        batch_size=batch_size,
    )
    for name, value in settings.items():
        if value is not None:
            check_whole(name, value, 1)
    if truncation_side not in ("left", "right"):
        raise InputError(f"truncation_side = {truncation_side!r}: give left or right")
    conversations = list(conversations)
    if not conversations:
        raise InputError("no conversations to embed; give at least one")
    # Processes share the work through the cache folder. Without one, each does all of it.
    rank = process_rank() if cache_dir else 0
    ranks = process_count() if cache_dir else 1

    if tokenizer is None:
        tokenizer = load_tokenizer(getattr(model, "reward_checkpoint", model))
    conversations_of = distinct_sequences(
        conversations, tokenizer, max_length, truncation_side, rank, ranks
    )
    if isinstance(model, (str, Path)):  # only now: the texts may be refused, and loading is slow
        model, _ = load_reward_model(model, tokenizer=tokenizer)
    check_sequences(conversations_of, model, conversations)
    sequences = list(conversations_of)

    fingerprint = model_fingerprint(model, cache_dir)
    folder = Path(cache_dir, fingerprint[:16]) if cache_dir else None
    if folder:
        say_if_nothing_is_kept(Path(cache_dir), folder)
        check_writable(folder)
    trial = known_batching(model, sequences, fingerprint, folder)

    on_gpu = model.device.type == "cuda"
    budget = token_budget
    if budget is None:
        budget = GPU_TOKEN_BUDGET if on_gpu else CPU_TOKEN_BUDGET
    table = EmbeddingTable(conversations, conversations_of, dtype)
    parts = [sequences[n : n + shard_size] for n in range(0, len(sequences), shard_size)]
    compute_shards(parts[rank::ranks], folder, table, model, trial.batching, budget, batch_size)
    if ranks > 1:
        dist.barrier()  # all processes have kept their shards
        other_parts = [part for n, part in enumerate(parts) if n % ranks != rank]
        collect_shards(other_parts, folder, table)

    record = dict(
        device=torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        torch=torch.__version__,
        transformers=transformers_version(),
        attention=model.config._attn_implementation,
        dtype=str(model.dtype),
        token_budget=budget,
        date=time.strftime("%Y-%m-%d", TEMPLATE_DATE),
        **dataclasses.asdict(trial),
    )
    return DistinctEmbeddings(table.embeddings, table.row_of_conversation(), record)


def embed_conversations(
    conversations: Iterable[Conversation],
    model: "PreTrainedModel | str | Path",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    cache_dir: str | Path | None = None,
    token_budget: int | None = None,
    shard_size: int = SHARD_SIZE,
    max_length: int | None = None,
    truncation_side: str = "left",
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """phi of each conversation: the state of its last token, after the final norm.

    Equal conversations are embedded once. A beginning that several share is computed once too,
    unless `lore.batching_trial` finds that this changes the model's states.

    conversations: lists of {"role", "content"} messages, the last one the response that is judged.
    model, tokenizer: from `load_reward_model`. The model may be the name or path of a checkpoint,
        which is loaded when all conversations are tokenized. The tokenizer is by default the
        model's.
    cache_dir: a folder for finished shards. A call for the same conversations computes only what
        is not there, and processes that torchrun started share the work.
    token_budget: tokens in a batch that has more than one conversation; default 8192 on a GPU,
        4096 on a CPU.
    shard_size: distinct conversations in a shard, the most that an interruption loses.
    max_length: longer conversations are cut to so many tokens, at their "left" or "right"
        `truncation_side`; default: none is cut.
    batch_size: conversations in a batch; default: as many as the budget allows.
    dtype: of what is returned; default the model's.

    Returns `[n, d]` on the CPU. Raises InputError: no conversation; one that is empty, or beyond
    the model's context or vocabulary, or with an embedding that is not finite; a model with another
    score than phi @ head; a `cache_dir` that not all processes see.
    """
    table, rows, _ = embed_distinct(
        conversations,
        model,
        tokenizer,
        cache_dir,
        token_budget,
        shard_size,
        max_length,
        truncation_side,
        batch_size,
        dtype,
    )
    return table[rows]
