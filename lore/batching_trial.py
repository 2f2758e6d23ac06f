"""A trial that chooses how a model's sequences are batched.

Every model is new to us, and no list of architectures would be complete: recurrent layers, local
attention, ALiBi, rope that depends on the batch or soft caps make shared prefixes wrong, some also
padded rows. So before the long work five sequences go through the model alone, in rows and with
shared prefixes, and the fastest batching that gives the states of one by one is taken.
"""

import contextlib
import dataclasses
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
    """What was chosen for a model, and why.

    batching: "shared", "rows" or "alone", see `lore.batching`.
    shortest, longest: the tokens of the shortest and the longest sequence that were tried. Outside
    of this range a model may behave in another way.
    The differences are relative, of a state or score to that of one sequence alone; the largest one
    counts. shared_difference, rows_difference: None if the model cannot be run in this way.
    score_difference: of state times head to the model's own score; None without a known head.
    """

    batching: str
    shortest: int
    longest: int
    shared_difference: float | None = None
    rows_difference: float | None = None
    score_difference: float | None = None

    def covers(self, sequences: list[bytes]) -> bool:
        """Whether no sequence is shorter or longer than those that were tried."""
        counts = [token_count(sequence) for sequence in sequences]
        return self.shortest <= min(counts) and max(counts) <= self.longest


# ---- The steps of the trial


def trial_sequences(sequences: list[bytes]) -> list[bytes]:
    """Up to five sequences that show where a batch changes a model's states, sorted.

    The shortest, the one of middle length and its neighbour, which probably begins alike, and the
    longest. The fifth is one token behind the first half of the middle one. As this token is large,
    it sorts behind the middle one, and its tail comes right after the middle one's other half: a
    recurrent model takes that half for its past.
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


@contextlib.contextmanager
def _without_pad_token(config: "PretrainedConfig") -> Iterator[None]:
    """While active, no token is the pad token: at one in a text, a model's own class would score an
    earlier token. -1 and not None, which some configs refuse."""
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
    `[n, d]` on the CPU, and the first output of `whole` for each sequence.
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
    return torch.stack(states).float().cpu(), outputs


def _largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far vectors are from those expected, relative to their length; of the worst vector."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def _check_scores(
    model: "PreTrainedModel", states: torch.Tensor, head: torch.Tensor, own_scores: torch.Tensor
) -> float:
    """How far states times head are from the model's own scores, relative to all scores together.

    states: float32 `[n, d]`. head: `[d, 1]`. own_scores: `[n]`. Raises InputError if it is far.
    """
    scores = (states @ head)[:, 0]  # (n,)
    difference = _largest_difference(scores, own_scores)
    if difference > torch.finfo(model.dtype).eps ** 0.5:
        raise InputError(
            f"model {model.reward_checkpoint}: its own score of a conversation is "
            f"{own_scores[0]:.5g}, its last state times its head {scores[0]:.5g}: more than that "
            "is in it; give another model"
        )
    return difference


def _try_batching(
    model: "PreTrainedModel", sequences: list[bytes], batching: str, expected: torch.Tensor
) -> float | None:
    """How far this batching's states are from those expected; None if the model takes no such
    input. All sequences are in one batch, as one may be changed by its neighbours."""
    budget = len(sequences) * max(token_count(sequence) for sequence in sequences)
    try:
        # One shard, so one pair of the shard and its states.
        [(_, states)] = last_states(model, [Shard(sequences)], batching, budget)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return None
    return _largest_difference(states.float(), expected)


def _tolerance(model: "PreTrainedModel", batching: str, rows_difference: float | None) -> float:
    """The largest difference that is still rounding in the model's number format.

    Rows may differ by 9 % in bfloat16 and by 3e-4 in float32. Shared prefixes are held to 3 % and
    1e-5, as there a small difference can be a real one, such as from a window of attention that a
    text barely exceeds. If rows differ by more than a third of that, so much is rounding.
    """
    eps = torch.finfo(model.dtype).eps
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
        trial.longest = 0  # covers nothing, so that it is not taken for a choice

    if head is not None:
        own_scores = torch.cat(outputs)[:, 0].float().cpu()  # (n,)
        trial.score_difference = _check_scores(model, alone, head, own_scores)
        longest = max(sequences, key=len)
        if whole.config.get_text_config().pad_token_id == token_ids(longest)[-1]:
            print(
                "note: the model's pad token ends its chats: its class scores the token before, "
                "phi is the last"
            )

    trial.rows_difference = _try_batching(model, samples, "rows", alone)
    trial.shared_difference = _try_batching(model, samples, "shared", alone)
    for batching, difference in (
        ("rows", trial.rows_difference),
        ("shared", trial.shared_difference),  # the faster one comes last
    ):
        tolerance = _tolerance(model, batching, trial.rows_difference)
        if difference is not None and difference <= tolerance:
            trial.batching = batching
    if trial.batching != "shared":
        _print_choice(trial)
    return trial


# ---- Trials that are kept


def _load_trial(path: Path) -> BatchingTrial | None:
    """The trial in a file, None if there is none or it is damaged."""
    with contextlib.suppress(InputError, TypeError):  # TypeError: not the fields of a trial
        trial = BatchingTrial(**load_json(path))
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
