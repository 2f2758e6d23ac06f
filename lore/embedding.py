"""phi(prompt, response), every token computed once."""

import contextlib
import hashlib
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lore.conversations import TEMPLATE_DATE, quoted, token_ids, tokenize_to_bytes
from lore.files import check_writable, load_json, load_tensors, save_json, save_tensors
from lore.reward_model import load_reward_model, load_tokenizer, model_identity
from utils import InputError, check_whole, is_finite, process_count, process_rank, progress_bar

CACHE_VERSION = 4  # of the embeddings' cache: how they are computed


def to_device(device, array):
    """An array as a tensor on a device, without waiting for what that still computes."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def is_out_of_memory(error):
    """Whether an error says that a GPU's memory ran out."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(
        error
    )


def _fingerprint(model, folder):
    """A digest of what a loaded model's states depend on besides the tokens; of its weights only where states are kept."""
    checkpoint, settings = getattr(model, "reward_checkpoint", None), model.config.to_dict()
    settings.update(
        _name_or_path=None, transformers_version=None
    )  # another path or version is no other model
    runs = [
        CACHE_VERSION,
        model.dtype,
        model.config._attn_implementation,
        model.device.type,
        torch.__version__,
        settings,
        checkpoint and folder and model_identity(checkpoint, folder)["weights"],
    ]
    digest = hashlib.sha256(json.dumps(runs, sort_keys=True, default=str).encode())
    for name, values in (
        model.state_dict().items() if folder else ()
    ):  # of a checkpoint's a sample: changed since?
        values = (
            values.flatten()[:: values.numel() // 64 + 1 if checkpoint else 1].cpu().contiguous()
        )
        digest.update(f"{name} {len(values)}".encode() + values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class SharedPrefixAttention(TorchFunctionMode):
    """Within it, causal attention over one row of tails, each what a sequence does not share with the one before, is
    that of the whole sequences: a tail asks the keys of its own path and no other. Nothing is padded or masked out."""

    def __init__(self, lengths, shared, model):
        super().__init__()
        paths, path, new, device = [], np.zeros(0, np.int64), lengths - shared, model.device
        ends = np.cumsum(new)
        for n, start, end in zip(
            shared, ends - new, ends
        ):  # path: where the row has the sequence's tokens
            paths.append(path := np.concatenate([path[:n], np.arange(start, end)]))
        self.keys = to_device(device, np.concatenate(paths))
        self.key_heads, self.flash = (
            getattr(model.config.get_text_config(), "num_key_value_heads", None),
            None,
        )
        if device.type == "cuda" and model.dtype.itemsize == 2:
            first = [
                to_device(device, np.cumsum([0, *counts], dtype=np.int32))
                for counts in (new, lengths)
            ]
            self.flash = *first, int(new.max()), int(lengths.max())
        else:
            masks = (
                torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n) if n < m else None
                for n, m in zip(new.tolist(), lengths.tolist())
            )
            self.tails = list(
                zip(map(slice, ends - new, ends), self.keys.split(lengths.tolist()), masks)
            )

    def gathered(
        self, x
    ):  # (keys, heads, width): a head of keys that was repeated for several of queries once
        x = x[0, :: max(1, x.shape[1] // (self.key_heads or x.shape[1]))].transpose(0, 1)
        return x.flatten(1)[self.keys].view(-1, *x.shape[1:])

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs or {})
        q, k, v = args[:3]  # (1, heads, tokens, width)
        options = {
            name: value for name, value in (kwargs or {}).items() if name in ("scale", "enable_gqa")
        }
        if self.flash:
            out = torch.ops.aten._flash_attention_forward(
                q[0].transpose(0, 1),
                self.gathered(k),
                self.gathered(v),
                *self.flash,
                0.0,
                True,
                False,
                scale=options.get("scale"),
            )
            return out[0].transpose(0, 1)[None]
        out = torch.empty_like(q)
        for tail, keys, mask in self.tails:
            out[:, :, tail] = scaled_dot_product_attention(
                q[:, :, tail], k[:, :, keys], v[:, :, keys], mask, is_causal=mask is None, **options
            )
        return out


def forward_last_states(model, ids, shared=None):
    """The last tokens' states of sequences, `[n, d]`: of rows padded on the right, which causal attention does not see;
    or, given how many tokens each shares with the one before, of their tails in one row."""
    lengths, device, options, within = (
        np.array(list(map(len, ids))),
        model.device,
        {},
        contextlib.nullcontext(),
    )
    if shared is None:
        width, last = lengths.max(), np.arange(len(ids)) * lengths.max() + lengths - 1
        tokens = np.stack([np.pad(sequence, (0, width - len(sequence))) for sequence in ids])
    else:
        within, last = (
            SharedPrefixAttention(lengths, shared, model),
            np.cumsum(lengths - shared) - 1,
        )
        tokens = np.concatenate([sequence[n:] for sequence, n in zip(ids, shared)])[None]
        position = np.concatenate([np.arange(n, length) for n, length in zip(shared, lengths)])[
            None
        ]
        no_mask = torch.zeros(
            1, 1, 1, tokens.shape[1], dtype=model.dtype, device=device
        )  # 4-D: taken as it is
        options = {"position_ids": to_device(device, position), "attention_mask": no_mask}
    with within:
        states = model(
            input_ids=to_device(device, tokens), use_cache=False, **options
        ).last_hidden_state
    return states.flatten(0, 1)[to_device(device, last)]


def _next_batch(lengths, shared, way, budget, batch_size):
    """How many of sorted sequences the next batch holds, at most `budget` tokens or one sequence, and its tokens."""
    tokens = (
        np.cumsum(lengths - shared)
        if way == "shared"
        else lengths[0] * np.arange(1, len(lengths) + 1)
    )
    least, most = (max(1, int((tokens <= limit).sum())) for limit in (budget / 2, budget))
    if way == "shared" and most < len(tokens):  # cut where least is shared, in the second half
        most -= int(shared[least : most + 1][::-1].argmin())
    count = 1 if way == "alone" else min(most, batch_size or most)
    return count, int(tokens[count - 1])


@torch.inference_mode()
def run_batches(model, shards, way, budget, batch_size):
    """Each batch of the shards of `last_states` once it is on its way to be computed: (shard, its rows, their states on the
    CPU, what tells when they are there). The budget is halved where memory runs out, and stays so."""
    on_gpu = model.device.type == "cuda"
    for shard in shards:
        _, sequences, states = shard
        order, start = list(range(len(sequences))), 0
        if states is not None:
            yield shard, order, states, None
            continue
        if way == "rows":  # longest first
            order.sort(key=lambda n: -len(sequences[n]))
        ids = [token_ids(sequences[n]) for n in order]
        same = [a[: len(b)] == b[: len(a)] for a, b in zip(ids, ids[1:])]
        shared = np.array([0] + [len(s) if s.all() else int(s.argmin()) for s in same])
        lengths = np.array(list(map(len, ids)))
        while start < len(ids):
            before = np.append(0, shared[start + 1 :])  # the first of a batch has none before it
            count, tokens = _next_batch(lengths[start:], before, way, budget, batch_size)
            in_one_row = (
                way == "shared" and tokens > 1
            )  # a lone token's heads may be laid out otherwise
            try:
                states = forward_last_states(
                    model, ids[start : start + count], before[:count] if in_one_row else None
                )
            except RuntimeError as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                torch.cuda.empty_cache()
                budget = min(budget, tokens) // 2
            else:
                states = states.to("cpu", non_blocking=on_gpu)
                copied = torch.cuda.current_stream(model.device).record_event() if on_gpu else None
                yield shard, order[start : start + count], states, copied
                start += count


def last_states(model, shards, way, budget, batch_size=None, update=lambda count: None):
    """(shard, the last tokens' states of its sequences, `[n, d]` on the CPU) of each shard: (path, sorted sequences, states
    where these are known). A GPU's are copied while the next batch runs. way: "shared" (tails in one row), "rows" or "alone"."""
    done, parts, batches = [], [], run_batches(model, shards, way, budget, batch_size)
    if model.device.type == "cuda":  # each is looked at when the next one is on its way
        batches = (batch for batch, _ in itertools.pairwise(itertools.chain(batches, [None])))
    for shard, rows, states, copied in batches:
        if copied:
            copied.synchronize()
        done.extend(rows)
        parts.append(states)
        update(len(rows))
        if len(done) == len(shard[1]):
            yield shard, torch.cat(parts)[np.argsort(done)]
            done, parts = [], []


def choose_batching(model, sequences):
    """How the model's states are rightly computed, tried on some of the sorted sequences: the shortest, the middle one,
    its neighbour, one token behind half of it, which will stand behind its other half, and the longest; each by itself,
    in padded rows, and with shared beginnings.

    Returns {"way", "tokens": the shortest, the longest; "rows", "shared", "score": relative differences to one by one},
    the fastest way that differs no more than the number format rounds: shared by 3 % in bfloat16, 1e-5 in float32.
    Raises InputError where phi @ head is not what the checkpoint's own class gives without a pad token."""
    by_length = sorted(sequences, key=len)
    middle, longest = by_length[len(by_length) // 2], by_length[-1]
    neighbour, ids = (
        sequences[sequences.index(middle) - 1],
        [middle[n : n + 4] for n in range(0, len(middle), 4)],
    )
    half = next((n for n in range(len(ids) // 2, len(ids)) if ids[n] < max(ids)), 0)
    sample = sorted({by_length[0], neighbour, middle, b"".join(ids[:half]) + max(ids), longest})
    ((whole, head),) = getattr(model, "reward_scorer", None) or [(model, None)]
    config, alone, eps = whole.config.get_text_config(), [], torch.finfo(model.dtype).eps
    pad, config.pad_token_id = (
        config.pad_token_id,
        -1,
    )  # at one that ends a text, its class scores an earlier token
    hook = model.register_forward_hook(lambda model, inputs, output: alone.append(output[0][0, -1]))
    try:
        with torch.inference_mode():
            own = [
                whole(input_ids=to_device(model.device, token_ids(one)[None]), use_cache=False)[0]
                for one in sample
            ]
    finally:
        hook.remove()
        config.pad_token_id = pad
    alone = torch.stack(alone).float().cpu()
    proof = {
        "way": "alone",
        "tokens": [len(by_length[0]) // 4, len(longest) // 4 if alone.isfinite().all() else 0],
    }

    def off(found, wanted):
        return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()

    if head is not None:
        own, scores = torch.cat(own)[:, 0].float().cpu(), (alone @ head)[:, 0]
        proof["score"] = off(scores, own)
        if proof["score"] > eps**0.5:
            raise InputError(
                f"model {model.reward_checkpoint}: its own score of a conversation is {own[0]:.5g}, its "
                f"last state times its head {scores[0]:.5g}: more than that is in it; give another model"
            )
        if pad == token_ids(longest)[-1]:
            print(
                "note: the model's pad token ends its chats: its class scores the token before, phi is the last"
            )
    for way in ("rows", "shared"):
        try:  # all in one batch, as one's neighbours may change it
            ((_, states),) = last_states(
                model, [(None, sample, None)], way, len(sample) * len(longest)
            )
        except (TypeError, ValueError, IndexError, RuntimeError) as error:  # it takes no such input
            if is_out_of_memory(error):
                raise
            continue
        proof[way] = off(states.float(), alone)
        noise = (
            eps**0.5 if way == "rows" else min(eps**0.5, max(eps**0.7, 3 * proof.get("rows", 0)))
        )
        proof["way"] = way if proof[way] <= noise else proof["way"]
    if proof["way"] != "shared":
        changed = {
            way: f"changes its states by {proof[way]:.1e}" if way in proof else "fails"
            for way in ("rows", "shared")
        }
        print(
            f"note: this model takes conversations whole{' and alone' * (proof['way'] == 'alone')}: sharing what they "
            f"begin with {changed['shared']}, a batch of rows {changed['rows']}"
        )
    return proof


def known_batching(model, sequences, fingerprint, folder):
    """The proof that is kept with the model and in the cache folder, made anew for shorter or longer sequences."""
    proofs, path = model.__dict__.setdefault("reward_proofs", {}), folder and folder / "proof.json"
    with contextlib.suppress(InputError):  # missing or damaged
        proofs.setdefault(fingerprint, load_json(path, "way", "tokens") if path else {})
    least, most = proofs.get(fingerprint, {}).get("tokens", (math.inf, 0))
    if new := not least <= min(map(len, sequences)) // 4 <= max(map(len, sequences)) // 4 <= most:
        proofs[fingerprint] = choose_batching(model, sequences)
    if path and process_rank() == 0 and (new or not path.exists()):
        save_json(path, proofs[fingerprint])
    return proofs[fingerprint]


def distinct_sequences(conversations, tokenizer, cut, ranks):
    """The distinct sequences of conversations, cut and sorted: bytes -> conversations' numbers. Each of `ranks`
    processes tokenizes a share. Raises InputError."""
    if not conversations:
        raise InputError("no conversations to embed; give at least one")
    for one in conversations:
        if not one or not all(
            isinstance(message, dict) and isinstance(message.get("content"), str) for message in one
        ):
            raise InputError(
                f"the conversation {one!r:.80}: not a list of messages {{'role': .., 'content': a text}}"
            )
    rank, parts, numbers = process_rank() if ranks > 1 else 0, [None] * ranks, {}
    parts[rank] = [
        sequence[cut] for sequence in tokenize_to_bytes(conversations[rank::ranks], tokenizer)
    ]
    if ranks > 1:
        dist.all_gather_object(parts, parts[rank])
    for n in range(len(conversations)):
        numbers.setdefault(parts[n % ranks][n // ranks], []).append(n)
    return dict(sorted(numbers.items()))


def _check_sequences(numbers, model, conversations):
    """Raise InputError for a sequence that the model does not take."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    table = model.get_input_embeddings().weight.shape[0]
    for sequence, (n, *_) in numbers.items():
        ids = token_ids(sequence)
        if not 0 < len(ids) <= limit or ids.max() >= table:
            raise InputError(
                f"the conversation {quoted(conversations[n])} has {len(ids)} tokens up to id "
                f"{ids.max(initial=0)}, the model takes 1 to {limit} of {table}; leave it out or cut it"
            )


def embed_shards(model, sequences, cache_dir, ranks, budget, shard_size, batch_size, about):
    """(sequences, states) of each shard of sorted sequences, kept or made by this process, then those of the others."""
    fingerprint = _fingerprint(model, cache_dir)
    if folder := cache_dir and Path(cache_dir, fingerprint[:16]):
        check_writable(folder)
    about.update(known_batching(model, sequences, fingerprint, folder))

    def kept(path, count):
        with contextlib.suppress(InputError):  # it is missing or damaged
            states = load_tensors(path)[0].get("embeddings", torch.zeros(0))
            return states if len(states) == count and is_finite(states) else None

    def shards(starts):
        for start in starts:
            shard = sequences[start : start + shard_size]
            digest = hashlib.sha256(
                b" end".join(shard)
            ).hexdigest()  # " end" as an id is above any vocabulary
            path = folder and folder / f"{digest[:24]}.safetensors"
            yield path, shard, path and kept(path, len(shard))

    starts = range(0, len(sequences), shard_size)
    mine = starts[process_rank() if ranks > 1 else 0 :: ranks]
    total = sum(min(shard_size, len(sequences) - start) for start in mine)
    with progress_bar("embedding", total, unit="text") as bar:
        for (path, shard, old), states in last_states(
            model, shards(mine), about["way"], budget, batch_size, bar.update
        ):
            yield (
                shard,
                states,
            )  # where they are not finite, the caller raises, and they are not kept
            if path and old is None:
                save_tensors(path, {"embeddings": states})
    if ranks > 1:
        dist.barrier()
        for other in set(range(ranks)) - {process_rank()}:
            for path, shard, states in shards(starts[other::ranks]):
                if states is None:
                    raise InputError(
                        f"{path}: not made by the other processes; give all one folder, and run "
                        "the same command again"
                    )
                yield shard, states


def embed_conversations(
    conversations,
    model,
    tokenizer=None,
    cache_dir=None,
    token_budget=None,
    shard_size=1024,
    max_length=None,
    truncation_side="left",
    batch_size=None,
    dtype=None,
    about=None,
):
    """phi of each conversation: the state, after the final norm, of its last token.
    conversations: list of lists of {"role", "content"} messages, the last one the response that is judged.
    model, tokenizer: from `load_reward_model`; or a checkpoint's name, which is loaded when all is tokenized; the tokenizer
    is the model's by default. Returns a CPU tensor `[n, d]` of `dtype`, default the model's.
    Equal conversations are computed once, and so is what several begin with, unless `choose_batching` finds that this changes
    the model's states. A batch holds up to `token_budget` tokens (default 8192 on a GPU, 4096 on a CPU), or one
    conversation, and up to `batch_size` of them. max_length: cut longer ones, at their "left" or "right"
    `truncation_side`. about: a dict that is told what the embeddings depend on. With `cache_dir`, shards of that size
    are saved as they are made: a call for the same conversations resumes behind the last, and processes share them.
    Raises InputError: no conversation; an empty one, one beyond the model's context or vocabulary, or with an embedding
    that is not finite; a model whose own score is not phi @ head; a `cache_dir` that not all processes see."""
    given = dict(
        token_budget=token_budget,
        shard_size=shard_size,
        max_length=max_length,
        batch_size=batch_size,
    )
    for name, value in given.items():
        if value is not None:
            check_whole(name, value, 1)
    if truncation_side not in ("left", "right"):
        raise InputError(f"truncation_side = {truncation_side!r}: give left or right")
    end, about, embeddings = max_length and 4 * max_length, {} if about is None else about, None
    cut = slice(end and -end, None) if truncation_side == "left" else slice(end)
    conversations = list(conversations)
    tokenizer = tokenizer or load_tokenizer(getattr(model, "reward_checkpoint", model))
    ranks = process_count() if cache_dir else 1
    numbers = distinct_sequences(conversations, tokenizer, cut, ranks)
    model = load_reward_model(model)[0] if isinstance(model, (str, Path)) else model
    _check_sequences(numbers, model, conversations)
    on_gpu = model.device.type == "cuda"
    budget = token_budget or (8192 if on_gpu else 4096)
    about.update(
        device=torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        torch=torch.__version__,
        attention=model.config._attn_implementation,
        dtype=str(model.dtype),
        token_budget=budget,
        date=time.strftime("%Y-%m-%d", TEMPLATE_DATE),
    )
    for shard, states in embed_shards(
        model, list(numbers), cache_dir, ranks, budget, shard_size, batch_size, about
    ):
        if not is_finite(states):
            worst = conversations[numbers[shard[int(states.isfinite().all(1).int().argmin())]][0]]
            raise InputError(
                f"the model gives the conversation {quoted(worst)} NaN or infinite values in "
                f"{model.dtype}; leave it out, or check the model"
            )
        if embeddings is None:
            embeddings = torch.empty(
                len(conversations), states.shape[1], dtype=dtype or states.dtype
            )
        rows, places = zip(
            *((row, n) for row, sequence in enumerate(shard) for n in numbers[sequence])
        )
        embeddings[list(places)] = states[list(rows)].to(embeddings.dtype)
    return embeddings
