"""A trial that chooses how a model's sequences are batched.

Shared prefixes are wrong for models with recurrent layers, local attention, ALiBi, soft caps or
rope that depends on the batch, and for some of these padded rows are wrong too. No list of such
models would be complete. So, before the long work, five sequences go through the model alone, in
rows and with shared prefixes, and the fastest batching is taken that gives the states of one alone.
"""

import contextlib
import dataclasses
import typing
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lore.batching import BATCHINGS, Shard, is_out_of_memory, last_states
from lore.conversations import ID_BYTES, token_count, token_ids
from lore.files import load_json, save_json
from lore.prefix_attention import to_device
from utils import InputError, process_rank

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PretrainedConfig, PreTrainedModel

TRIAL_FILE = "batching.json"  # in the folder of a model's kept embeddings

# model -> fingerprint, of the model and how it runs -> BatchingTrial
KEPT_TRIALS = weakref.WeakKeyDictionary()


@dataclasses.dataclass
class BatchingTrial:
    """The batching that was chosen for a model, and why.

    A difference is relative to what one sequence alone gives, and of the sequence with the largest.
    """

    batching: str  # one of lore.batching.BATCHINGS
    shortest: int  # tokens of the shortest sequence; a model may treat a shorter one in another way
    longest: int
    shared_difference: float | None = None  # of states; None if the model cannot be run so
    rows_difference: float | None = None
    score_difference: float | None = None  # of states times head to the model's own scores

    def covers(self, sequences: list[bytes]) -> bool:
        """Whether no sequence is shorter or longer than those that were tried."""
        counts = [token_count(sequence) for sequence in sequences]
        return self.shortest <= min(counts) and max(counts) <= self.longest


# ---- The steps of the trial


def trial_sequences(sequences: list[bytes]) -> list[bytes]:
    """Up to five sequences whose states a batch would change, if it changes any; sorted.

    - the shortest and the longest;
    - the one of middle length and its neighbour in sorted order, which probably begins alike;
    - the first half of the middle one, followed by a token with a larger id than the middle one
      has there. It therefore sorts right behind the middle one, and in a row of tails this token
      follows the middle one's second half. A recurrent model would read on from that half, which
      is not in this sequence.

    sequences: distinct and sorted.
    """
    by_length = sorted(sequences, key=len)
    shortest = by_length[0]
    middle = by_length[len(by_length) // 2]
    longest = by_length[-1]
    neighbour = sequences[sequences.index(middle) - 1]

    ids = [middle[n : n + ID_BYTES] for n in range(0, len(middle), ID_BYTES)]
    largest_id = max(ids)
    second_half = range(len(ids) // 2, len(ids))
    cut = next((n for n in second_half if ids[n] < largest_id), 0)
    spliced = b"".join(ids[:cut]) + largest_id
    return sorted({shortest, neighbour, middle, spliced, longest})


def _exactly_on_cpu(values: torch.Tensor) -> torch.Tensor:
    """Values on the CPU, in float32, or in float64 if they are: no number is rounded."""
    return values.to("cpu", torch.promote_types(values.dtype, torch.float32))


@contextlib.contextmanager
def _without_pad_token(config: "PretrainedConfig") -> Iterator[None]:
    """While active, no token is the pad token.

    If a text ends with the pad token, a model's own class scores the token before it. The id is -1
    and not None, because some configs refuse None.
    """
    pad_token = config.pad_token_id
    config.pad_token_id = -1
    try:
        yield
    finally:
        config.pad_token_id = pad_token


def _run_alone(
    model: "PreTrainedModel", whole: "PreTrainedModel", sequences: list[bytes]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Each sequence by itself through the model's own class.

    whole: `model` with its head on top, or `model` again. Returns the last tokens' states, float32
    or float64 `[n, d]` on the CPU, and the first output of `whole` for each sequence.
    """
    states = []
    outputs = []
    hook = model.register_forward_hook(
        lambda model, inputs, output: states.append(output[0][0, -1])
    )
    try:
        with torch.inference_mode(), _without_pad_token(whole.config.get_text_config()):
            for sequence in sequences:
                ids = to_device(token_ids(sequence)[None], model.device)
                outputs.append(whole(input_ids=ids, use_cache=False)[0])
    finally:
        hook.remove()
    return _exactly_on_cpu(torch.stack(states)), outputs


def _largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far vectors are from those expected, relative to their length; of the worst vector."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def _check_scores(
    model: "PreTrainedModel", states: torch.Tensor, head: torch.Tensor, own_scores: torch.Tensor
) -> float:
    """How far states times head are from the model's own scores, relative to all scores together.

    states: float32 or float64 `[n, d]`. head: `[d, 1]`. own_scores: `[n]`.
    Raises InputError: it is far.
    """
    scores = (states @ head.to(states.dtype))[:, 0]  # (n,)
    difference = _largest_difference(scores, own_scores)
    # The head that we have is float32, even if the model's is float64.
    eps = max(torch.finfo(model.dtype).eps, torch.finfo(head.dtype).eps)
    if difference > eps**0.5:
        raise InputError(
            f"model {model.reward_checkpoint}: its own score of a conversation is "
            f"{own_scores[0]:.5g}, its last state times its head {scores[0]:.5g}: it computes "
            "scores in another way; give another model"
        )
    return difference


def _try_batching(
    model: "PreTrainedModel", sequences: list[bytes], batching: str, expected: torch.Tensor
) -> float | None:
    """How far this batching's states are from those expected.

    All sequences are in one batch, because one may be changed by its neighbours. None if the model
    takes no such input.
    """
    budget = len(sequences) * max(token_count(sequence) for sequence in sequences)
    try:
        # One shard, so one pair of the shard and its states.
        [(_, states)] = last_states(model, [Shard(sequences)], batching, budget)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return None
    return _largest_difference(_exactly_on_cpu(states), expected)


def _tolerance(dtype: torch.dtype, batching: str, rows_difference: float | None) -> float:
    """The largest difference that is still rounding in a number format.

    Rows may differ by 9 % in bfloat16 and by 3e-4 in float32. Shared prefixes may differ by 3 % and
    1e-5: there a small difference may be a real one, such as that of a window of attention that a
    text barely exceeds. A model that rounds more is given three times the difference of its rows,
    which have passed their own bound, and never more than rows may differ.
    """
    eps = torch.finfo(dtype).eps
    if batching == "rows":
        return eps**0.5
    return min(eps**0.5, max(eps**0.7, 3 * (rows_difference or 0)))


def _print_choice(trial: BatchingTrial) -> None:
    """Say why a model cannot share prefixes."""

    def effect(difference: float | None) -> str:
        return "fails" if difference is None else f"changes its states by {difference:.1e}"

    alone = " and alone" if trial.batching == "alone" else ""
    print(
        f"note: this model takes conversations whole{alone}: sharing what they begin with "
        f"{effect(trial.shared_difference)}, a batch of rows {effect(trial.rows_difference)}"
    )


def choose_batching(model: "PreTrainedModel", sequences: list[bytes]) -> BatchingTrial:
    """Try five sequences in every batching, and choose the fastest that leaves states as they are.

    model: from `load_reward_model`. sequences: distinct and sorted. Prints a note if prefixes
    cannot be shared, or if the model's pad token ends its chats.
    Raises InputError: state times head is not the score that the model's own class gives.
    """
    samples = trial_sequences(sequences)
    counts = [token_count(sequence) for sequence in sequences]

    whole, head = model, None
    if getattr(model, "reward_scorer", None):
        [(whole, head)] = model.reward_scorer  # load_reward_model leaves none or one
    alone, outputs = _run_alone(model, whole, samples)
    trial = BatchingTrial("alone", min(counts), max(counts))
    if not alone.isfinite().all():
        trial.longest = 0  # it covers no sequence, so the next call makes a trial of its own

    if head is not None:
        own_scores = _exactly_on_cpu(torch.cat(outputs)[:, 0])  # (n,)
        trial.score_difference = _check_scores(model, alone, head, own_scores)
        longest = max(sequences, key=len)
        if whole.config.get_text_config().pad_token_id == token_ids(longest)[-1]:
            print(
                "note: the model's pad token ends its chats: its class scores the token before, "
                "phi is the last"
            )

    trial.rows_difference = _try_batching(model, samples, "rows", alone)
    trial.shared_difference = _try_batching(model, samples, "shared", alone)
    for batching, difference in (  # the last one that is exact wins, and it is the fastest
        ("rows", trial.rows_difference),
        ("shared", trial.shared_difference),
    ):
        tolerance = _tolerance(model.dtype, batching, trial.rows_difference)
        if difference is not None and difference <= tolerance:
            trial.batching = batching
    if trial.batching != "shared":
        _print_choice(trial)
    return trial


# ---- Trials that are kept


def _load_trial(path: Path) -> BatchingTrial | None:
    """The trial in a file, None if there is none or it is damaged."""
    with contextlib.suppress(InputError, TypeError):  # TypeError: not the fields of a trial
        trial = BatchingTrial(**load_json(path, **typing.get_type_hints(BatchingTrial)))
        if trial.batching in BATCHINGS:
            return trial
    return None


def known_batching(
    model: "PreTrainedModel", sequences: list[bytes], fingerprint: str, folder: Path | None
) -> BatchingTrial:
    """The trial that is kept for a model, or a new one if there is none or if it was of longer or
    shorter sequences only.

    fingerprint: of the model and how it runs. folder: of the model's kept embeddings, None if they
    are not kept.
    """
    trials = KEPT_TRIALS.setdefault(model, {})
    path = folder / TRIAL_FILE if folder else None
    trial = trials.get(fingerprint)
    if trial is None and path:
        trial = _load_trial(path)
    is_new = trial is None or not trial.covers(sequences)
    if is_new:
        trial = choose_batching(model, sequences)
    trials[fingerprint] = trial
    if path and process_rank() == 0 and (is_new or not path.exists()):
        save_json(path, dataclasses.asdict(trial))
    return trial
