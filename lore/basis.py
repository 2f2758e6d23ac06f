"""A basis that was learnt before: where it is from, and whether it belongs to a reward model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lore.checkpoint import backbone_digest, download, inspect_checkpoint
from lore.files import digest_of, load_tensors
from lore.reward_model import load_reward_head
from utils import InputError, check_matrix, process_rank

# A basis [d, K], or the file of results/ that holds one
Basis = torch.Tensor | np.ndarray | str | Path
Weights = torch.Tensor | np.ndarray | list[float]  # (K,)


def load_basis(
    model_name: str | Path, V: Basis, run_info: dict[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """A basis that is to be used with a model -> (V `[d, K]`, not checked yet, its run_info).

    V: the basis itself, or the file `results/K_<rank>.safetensors`, which also says on which model
        it was learnt.
    run_info: what is known of the basis: the dict of results.json, updated by the metadata of the
        rank's file. These take precedence if V is that file.
    If the model of the basis is not known, a note says so.
    Raises InputError: no file with a basis; a run_info that is none; a basis of another model.
    """
    if not isinstance(run_info, dict | None):
        raise InputError(f"about: {run_info!r:.100}; give the dict of results.json")
    run_info = dict(run_info or {})
    if isinstance(V, str | Path):
        tensors, metadata = load_tensors(V)
        if "V" not in tensors or not isinstance(metadata, dict):
            raise InputError(f"{V}: no basis in it; give a file results/K_<rank>.safetensors")
        V = tensors["V"]
        run_info |= metadata
    for name, kind in (("identity", dict), ("config", dict), ("K", int)):
        if not isinstance(run_info.get(name), kind | None):
            raise InputError(
                f"about: {name} = {run_info[name]!r:.100}; give the dict of results.json, or "
                "metadata of a file results/K_<rank>.safetensors"
            )
    identity = run_info.get("identity") or {}
    if identity.get("reward_head") is None and process_rank() == 0:
        print(
            "note: nothing says on which model V was learnt, so this is not checked; give its "
            "file results/K_<rank>.safetensors in place of V, or the file's metadata as about"
        )
    check_same_model("V", model_name, identity, (run_info.get("config") or {}).get("model"))
    return V, run_info


def check_same_model(
    what: str, model_name: str | Path, identity: dict[str, Any], learnt_on: Any
) -> None:
    """Raise InputError if a basis was learnt on another model than the one it is used with.

    Reward heads are compared first, as one can be read before a large model is downloaded. Models
    with one head can differ below it: a checkpoint that was trained further with its head frozen,
    or the base of a merged adapter.
    what: begins the message: "V", or the file of the basis. learnt_on: the name of its model.
    identity: that of the embeddings it was learnt on, see `lore.embedding_files`. What it does not
        hold is not compared: the identities of earlier versions have no "backbone".
    """
    head = identity.get("reward_head")
    backbone = identity.get("backbone")
    if head is not None and head != digest_of(load_reward_head(model_name).tolist()):
        different = "reward heads"
    elif backbone is not None and backbone != backbone_digest(
        download(inspect_checkpoint(model_name))
    ):
        different = "weights below equal reward heads"
    else:
        return
    raise InputError(
        f"{what} was learnt on another model than {model_name}, as the {different} differ; give "
        f"the model of this basis ({learnt_on!r:.200})"
    )


def check_rank(V: torch.Tensor, run_info: dict[str, Any]) -> None:
    """Raise InputError if a basis `[d, K]` has more columns than the rank that its run had.

    It may have fewer, as columns that no user needs are removed. The reference, rank 0, has one:
    the reward head.
    """
    rank = run_info.get("K")
    if rank is not None and max(rank, 1) < V.shape[1]:
        raise InputError(
            f"V has {V.shape[1]} columns, and its run had the rank {rank}; give the `about` of "
            "this basis"
        )


def check_user_weights(w: Weights, what: str, rank: int) -> torch.Tensor:
    """One user's weights as float32 `[K]` on the CPU, given as a vector, lying or upright.

    Raises InputError that begins with `what`: no numbers, not `rank` of them, not finite.
    """
    with contextlib.suppress(TypeError, ValueError, RuntimeError):  # no numbers: said below
        w = torch.as_tensor(w).reshape(1, -1)
    return check_matrix(w, what, 1, rank).cpu()[0]
