"""Sequences in batches through a model, shard by shard.

There are three ways to batch, from fast to safe:

    "shared"   a batch is one row of tails, each shared token once (`lore.prefix_attention`)
    "rows"     a batch is sequences of similar length, padded
    "alone"    a batch is one sequence

`lore.batching_trial` chooses the fastest that is right for a model.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lore.conversations import token_ids
from lore.prefix_attention import common_prefix, forward_last_states

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedModel

BATCHINGS = ("shared", "rows", "alone")


@dataclasses.dataclass
class Shard:
    """Sorted sequences that are kept together in one file.

    path: the file, or None if nothing is kept. states: the last tokens' states `[n, d]` if they are
    known already.
    """

    sequences: list[bytes]
    path: Path | None = None
    states: torch.Tensor | None = None


@dataclasses.dataclass
class BatchStates:
    """The states of some of a shard's sequences.

    rows: the sequences' numbers in the shard. states: `[len(rows), d]` on the CPU. A GPU's states
    may still be on their way there; then `copied` tells when they have come.
    """

    shard: Shard
    rows: list[int]
    states: torch.Tensor
    copied: torch.cuda.Event | None = None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU's memory ran out."""
    is_allocator = isinstance(error, torch.cuda.OutOfMemoryError)
    is_cublas = "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    return is_allocator or is_cublas


def tokens_of_batches(lengths: np.ndarray, shared: np.ndarray, batching: str) -> np.ndarray:
    """How many tokens a batch of the first 1, 2, .. sequences sends through the model, `[n]`.

    lengths: of the sequences that are left, `[n]`. shared: leading tokens that each shares with the
    one before it; the first one's is 0.
    """
    if batching == "shared":
        return np.cumsum(lengths - shared)
    longest = lengths[0]  # rows come longest first, and all of a batch are padded to its length
    return longest * np.arange(1, len(lengths) + 1)


def next_batch_size(
    tokens: np.ndarray, shared: np.ndarray, batching: str, budget: int, batch_size: int | None
) -> int:
    """How many of the sequences that are left are in the next batch.

    tokens: from `tokens_of_batches`. A batch has up to `budget` tokens, or one sequence, and up to
    `batch_size` sequences if that is given.
    """
    if batching == "alone":
        return 1
    size = max(1, int((tokens <= budget).sum()))
    if batching == "shared" and size < len(tokens):
        # The next batch has to compute again what its first sequence shares with this batch. So the
        # cut is where least is shared, in the second half of this batch.
        smallest = max(1, int((tokens <= budget / 2).sum()))
        shared_at_cut = shared[smallest : size + 1]
        size = smallest + int(np.flatnonzero(shared_at_cut == shared_at_cut.min())[-1])
    return min(size, batch_size or size)


def batch_order(sequences: list[bytes], batching: str) -> list[int]:
    """The order in which sorted sequences are batched, as their numbers."""
    order = list(range(len(sequences)))
    if batching == "rows":  # longest first, so that a batch's rows need little padding
        order.sort(key=lambda n: -len(sequences[n]))
    return order


@torch.inference_mode()
def run_batches(
    model: "PreTrainedModel",
    shards: Iterable[Shard],
    batching: str,
    budget: int,
    batch_size: int | None,
) -> Iterator[BatchStates]:
    """The shards' batches, each once it is run or a GPU has been told to; see `last_states`.

    If a GPU's memory runs out, the budget is halved, and stays so.
    """
    on_gpu = model.device.type == "cuda"
    for shard in shards:
        if shard.states is not None:
            yield BatchStates(shard, list(range(len(shard.sequences))), shard.states)
            continue
        order = batch_order(shard.sequences, batching)
        ids = [token_ids(shard.sequences[n]) for n in order]
        lengths = np.array([len(sequence) for sequence in ids])
        shared = np.array([0] + [common_prefix(a, b) for a, b in itertools.pairwise(ids)])
        start = 0
        while start < len(ids):
            shared_in_batch = shared[start:].copy()
            shared_in_batch[0] = 0  # the first of a batch has none before it
            tokens = tokens_of_batches(lengths[start:], shared_in_batch, batching)
            size = next_batch_size(tokens, shared_in_batch, batching, budget, batch_size)
            batch_tokens = int(tokens[size - 1])
            end = start + size
            # A single token goes as a row: with one query, transformers may hand over the heads in
            # another layout, which the attention over tails does not read.
            as_tails = batching == "shared" and batch_tokens > 1
            try:
                states = forward_last_states(
                    model, ids[start:end], shared_in_batch[:size] if as_tails else None
                )
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                torch.cuda.empty_cache()
                budget = min(budget, batch_tokens) // 2
                continue
            states = states.to("cpu", non_blocking=on_gpu)
            copied = torch.cuda.current_stream(model.device).record_event() if on_gpu else None
            yield BatchStates(shard, order[start:end], states, copied)
            start = end


def one_behind(batches: Iterator[BatchStates]) -> Iterator[BatchStates]:
    """Each batch when the next one has been started: a GPU computes it while this one is copied."""
    started = None
    for batch in batches:
        if started is not None:
            yield started
        started = batch
    if started is not None:
        yield started


def last_states(
    model: "PreTrainedModel",
    shards: Iterable[Shard],
    batching: str,
    budget: int,
    batch_size: int | None = None,
    update: Callable[[int], object] = lambda count: None,
) -> Iterator[tuple[Shard, torch.Tensor]]:
    """Each shard with the states of its sequences' last tokens, `[n, d]` on the CPU.

    batching: one of BATCHINGS. budget: tokens in a batch, or one sequence. batch_size: sequences in
    a batch, None for any number. update: told how many sequences are done, after each batch.
    """
    batches = run_batches(model, shards, batching, budget, batch_size)
    if model.device.type == "cuda":
        batches = one_behind(batches)
    rows_done = []
    states_done = []
    for batch in batches:
        if batch.copied is not None:
            batch.copied.synchronize()
        rows_done.extend(batch.rows)
        states_done.append(batch.states)
        update(len(batch.rows))
        if len(rows_done) == len(batch.shard.sequences):
            yield batch.shard, torch.cat(states_done)[np.argsort(rows_done)]
            rows_done = []
            states_done = []
