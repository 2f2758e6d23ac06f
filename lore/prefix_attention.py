"""The forward pass of a batch of sequences: as padded rows, or as one row of tails.

Sorted sequences often begin alike. The *tail* of a sequence is the part that differs from the
sequence before it. In a row of tails each token that sequences share is there once:

    sequences            shared   tail
    the cat sat down        0     the cat sat down
    the cat sat up          3                 up
    the dog                 1         dog

    row of tails         the  cat  sat  down  up  dog
    position of each      0    1    2    3    3    1

A transformer treats the tokens of a row one by one, each at its position, except in attention.
There each token must see the tokens before it in its own sequence and nothing else. The *path* of
a sequence says which tokens of the row make it up, and so which keys its tail sees:

    the cat sat up       path 0 1 2 4
    the dog              path 0 5
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedModel


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor on a device. A GPU goes on computing while the array is on its way."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading ids two sequences share."""
    length = min(len(a), len(b))
    is_equal = a[:length] == b[:length]
    return length if is_equal.all() else int(is_equal.argmin())


def paths_through_row(lengths: np.ndarray, shared: np.ndarray) -> list[np.ndarray]:
    """For each sequence of a row of tails, where in the row its tokens are, int64 `[length]` each.

    lengths: tokens of each sequence. shared: leading tokens that each shares with the one before.
    """
    paths = []
    path = np.zeros(0, np.int64)
    row_length = 0
    for length, shared_tokens in zip(lengths, shared):
        tail_length = length - shared_tokens
        tail = np.arange(row_length, row_length + tail_length)
        path = np.concatenate([path[:shared_tokens], tail])
        paths.append(path)
        row_length += tail_length
    return paths


def has_flash_kernel(model: "PreTrainedModel") -> bool:
    """Whether there is a kernel that takes all tails at once: in 16 bits on a GPU."""
    return model.device.type == "cuda" and model.dtype.itemsize == 2


class SharedPrefixAttention(TorchFunctionMode):
    """While active, attention over a row of tails is that of the whole sequences.

    It takes the place of `scaled_dot_product_attention`. The keys along each path are gathered, and
    each token of a tail attends to those up to its own; a mask over the whole row would cost more
    than what sharing saves. A model that attends in any other way comes out wrong, which
    `lore.batching_trial` notices.
    """

    def __init__(self, lengths: np.ndarray, shared: np.ndarray, model: "PreTrainedModel") -> None:
        """lengths, shared: as `paths_through_row` takes them. model: the model to be called."""
        super().__init__()
        device = model.device
        tail_lengths = lengths - shared
        paths = paths_through_row(lengths, shared)
        self.keys = to_device(np.concatenate(paths), device)  # (sum of lengths,)
        self.key_heads = getattr(model.config.get_text_config(), "num_key_value_heads", None)

        self.uses_flash = has_flash_kernel(model)
        if self.uses_flash:
            self.tail_starts = to_device(_starts(tail_lengths), device)  # (n + 1,)
            self.sequence_starts = to_device(_starts(lengths), device)  # (n + 1,)
            self.longest_tail = int(tail_lengths.max())
            self.longest_sequence = int(lengths.max())
        else:
            starts = _starts(tail_lengths).tolist()
            self.tail_slices = [slice(start, end) for start, end in zip(starts, starts[1:])]
            self.tail_keys = self.keys.split(lengths.tolist())
            self.tail_masks = [
                _tail_mask(tail_length, length, device)
                for tail_length, length in zip(tail_lengths.tolist(), lengths.tolist())
            ]

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Called in place of every torch function while active."""
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        return function(*args, **kwargs)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attention of a row of tails, with the arguments of `scaled_dot_product_attention`.

        The model's own mask is not used: the paths say what is seen.
        query: `[1, heads, row, width]`; key, value: `[1, heads or key heads, row, width]`.
        """
        if self.uses_flash:
            return self._attend_with_flash(query, key, value, scale)
        options = {"enable_gqa": True} if enable_gqa else {}  # unknown to torch before 2.5
        out = torch.empty_like(query)
        # This class is not active in here, so the calls below are torch's own attention.
        for tail, keys, mask in zip(self.tail_slices, self.tail_keys, self.tail_masks):
            out[:, :, tail] = scaled_dot_product_attention(
                query[:, :, tail],
                key[:, :, keys],
                value[:, :, keys],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                **options,
            )
        return out

    def _attend_with_flash(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """All tails at once.

        The kernel's causal mask is aligned at the bottom right: the last token of a tail sees all
        keys of its path, the one before it all but one, and so on.
        """
        out = torch.ops.aten._flash_attention_forward(
            query[0].transpose(0, 1),  # (row, heads, width)
            self._gather(key),
            self._gather(value),
            self.tail_starts,
            self.sequence_starts,
            self.longest_tail,
            self.longest_sequence,
            0.0,  # dropout
            True,  # causal
            False,  # no debug mask
            scale=scale,
        )[0]
        return out.transpose(0, 1)[None]  # (1, heads, row, width)

    def _gather(self, states: torch.Tensor) -> torch.Tensor:
        """The keys or values along all paths, `[sum of lengths, key heads, width]`."""
        heads = states.shape[1]
        # A model may have repeated each key head for the query heads that share it. One of the
        # copies is enough, as the kernel shares heads itself.
        copies = max(1, heads // (self.key_heads or heads))
        states = states[0, ::copies].transpose(0, 1)  # (row, key heads, width)
        gathered = states.flatten(1)[self.keys]  # rows of a matrix are gathered faster
        return gathered.view(-1, *states.shape[1:])


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where in a row the pieces of these lengths begin, and the row's end, int32 `[n + 1]`."""
    return np.cumsum([0, *lengths], dtype=np.int32)


def _tail_mask(tail_length: int, length: int, device: torch.device) -> torch.Tensor | None:
    """Which tokens of its sequence each token of a tail sees, bool `[tail_length, length]`.

    None if the tail is the whole sequence: then attention's own causal mask is right, and faster.
    """
    shared = length - tail_length
    if shared == 0:
        return None
    return torch.ones(tail_length, length, dtype=torch.bool, device=device).tril(shared)


def forward_last_states(
    model: "PreTrainedModel", ids: list[np.ndarray], shared: np.ndarray | None = None
) -> torch.Tensor:
    """The state of each sequence's last token, after the final norm.

    ids: int64 `[length]` each. shared: leading tokens that each sequence shares with the one before
    it, `[n]`, for a row of tails; None for padded rows. Returns `[n, d]` on the model's device.
    """
    if shared is None:
        return _forward_rows(model, ids)
    return _forward_tails(model, ids, shared)


def _forward_rows(model: "PreTrainedModel", ids: list[np.ndarray]) -> torch.Tensor:
    """Last states `[n, d]`, of rows padded on the right: causal attention does not look there."""
    lengths = np.array([len(sequence) for sequence in ids])
    width = lengths.max()
    padded = [np.pad(sequence, (0, width - len(sequence))) for sequence in ids]
    tokens = np.stack(padded)  # (n, width)
    last = np.arange(len(ids)) * width + lengths - 1  # in the flattened rows
    output = model(input_ids=to_device(tokens, model.device), use_cache=False)
    return output.last_hidden_state.flatten(0, 1)[to_device(last, model.device)]


def _forward_tails(
    model: "PreTrainedModel", ids: list[np.ndarray], shared: np.ndarray
) -> torch.Tensor:
    """Last states `[n, d]`, of one row of tails."""
    lengths = np.array([len(sequence) for sequence in ids])
    tails = [sequence[start:] for sequence, start in zip(ids, shared)]
    positions = [np.arange(start, length) for start, length in zip(shared, lengths)]
    row = np.concatenate(tails)
    last = np.cumsum(lengths - shared) - 1  # in the row
    # Attention ignores this mask. But without one in four dimensions, transformers would build one
    # of `[row, row]`.
    no_mask = torch.zeros(1, 1, 1, len(row), dtype=model.dtype, device=model.device)
    inputs = dict(
        input_ids=to_device(row[None], model.device),
        position_ids=to_device(np.concatenate(positions)[None], model.device),
        attention_mask=no_mask,
    )
    with SharedPrefixAttention(lengths, shared, model):
        output = model(**inputs, use_cache=False)
    return output.last_hidden_state[0][to_device(last, model.device)]
