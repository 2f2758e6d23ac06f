"""Files of embeddings, and the reward head beside them.

The reward head's file also records the provenance of the embeddings: the names of model and data,
the digest of each file, and their `identity`. The identity is a dict of JSON values: "model", a
name, and the digests of everything that the embeddings depend on; also "max_length", a number of
tokens, if conversations were cut to so many.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lore.files import digest_of, load_tensors, replace_files_in, save_tensors
from lore.reward_model import load_reward_head
from utils import InputError

HEAD_FILE = "reward_head.safetensors"

# How an error names the parts of an identity whose own names explain too little
NAMES_OF_PARTS = {"weights": "weights or config", "tokenizer": "tokenizer or chat template"}


def embeddings_are_finished(outputs: list[Path], identity: dict[str, Any], overwrite: bool) -> bool:
    """Whether the files `outputs` already hold the embeddings of this model and data.

    identity: see the module's docstring. Its "model" is only a name, and is not compared; neither
        is a digest that the files do not record.
    Files that are missing or damaged are not finished.
    Raises InputError: they hold other embeddings, or it is not known which, and `overwrite` is
    not set.
    """
    existing = [path for path in outputs if path.exists()]
    if not existing or overwrite:
        return False
    head_file = existing[0].with_name(HEAD_FILE)
    if not head_file.exists():
        raise InputError(
            f"{existing[0]}: finished embeddings without the {HEAD_FILE} that says of which model; "
            "move them away, or make them again with --overwrite"
        )
    provenance = {}
    with contextlib.suppress(InputError):  # damaged: nothing is known of the embeddings
        _, provenance = load_tensors(head_file)
    _check_same_identity(existing[0], provenance, identity)
    digests = provenance.get("files", {})
    return all(path.exists() and digest_of(path) == digests.get(path.name) for path in outputs)


def _check_same_identity(path: Path, provenance: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise InputError if the embeddings in `path` are of another model or of other data."""
    recorded = provenance.get("identity")
    if not recorded:
        recorded = dict.fromkeys(identity)  # None is no digest: all parts differ
    # Without a max_length nothing was cut.
    recorded = {"max_length": None, **recorded}
    identity = {"max_length": None, **identity}
    different = [
        part
        for part, digest in recorded.items()
        if part != "model" and part in identity and digest != identity[part]
    ]
    if different:
        parts = ", ".join(NAMES_OF_PARTS.get(part, part) for part in different)
        model = provenance.get("model", "unknown")
        data = provenance.get("data", "unknown")
        raise InputError(
            f"{path} holds finished embeddings of other {parts} (model {model}, data {data}); "
            "move it away, or replace it with --overwrite"
        )


@contextlib.contextmanager
def new_embeddings(
    folder: str | Path, head: torch.Tensor, identity: dict[str, Any], **provenance: Any
) -> Iterator[Path]:
    """Yield a temporary folder to write embeddings in.

    On success the reward head's file is added, and all files replace those in `folder` together.
    head: `[d, 1]`. identity: see the module's docstring. provenance: further JSON values.
    """
    with replace_files_in(folder) as new:
        yield new
        digests = {path.name: digest_of(path) for path in sorted(new.iterdir())}
        save_tensors(
            new / HEAD_FILE,
            {"reward_head": head},
            identity=identity,
            **provenance,
            files=digests,
        )


def find_reward_head(
    folder: str | Path,
    model_name: str | Path,
    title: str,
    width: dict[int, Any],
    outputs: list[str] | tuple[str, ...],
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The reward head of embeddings -> (float32 `[d, 1]`, their provenance).

    It is read from the file beside them in `folder`, or, if there is none, from the checkpoint
    `model_name`. The provenance gains a title for plots: `title`, with the name of the data.
    width: each width d of the embeddings -> where one of that width was read, for the error.
    outputs: the names of the files of embeddings.
    Raises InputError: one of the files, or the head, is not the one that was written together with
    the others; the widths differ; the head is not finite.
    """
    head_file = Path(folder) / HEAD_FILE
    if head_file.exists():
        tensors, provenance = load_tensors(head_file)
        _check_same_files(folder, outputs, provenance)
        head = tensors.get("reward_head", torch.zeros(0))
    else:
        provenance = {"model": model_name}
        head = load_reward_head(model_name)

    fits = len(width) == 1 and head.shape == (next(iter(width)), 1)
    if not fits or not torch.isfinite(head).all():
        widths = ", ".join(f"d = {d} in {place}" for d, place in width.items())
        raise InputError(
            f"embeddings and reward head of different models: {tuple(head.shape)} in {head_file}, "
            f"or {provenance.get('model')}'s, {widths}; prepare all files with one model"
        )
    digest = digest_of(head.tolist())
    if provenance.get("identity", {}).get("reward_head", digest) != digest:
        raise InputError(
            f"{head_file}: its head is not the one that it names; make the embeddings again"
        )

    if "data" in provenance:
        title = f"{title} ({provenance['data']})"
    return head, {**provenance, "title": title}


def _check_same_files(
    folder: str | Path, outputs: list[str] | tuple[str, ...], provenance: dict[str, Any]
) -> None:
    """Raise InputError if a file is not the one that the reward head was written with.

    Files of the released scripts, beside which a head was put, have no digests to compare.
    """
    if "files" not in provenance:
        return
    for name in outputs:
        path = Path(folder) / name
        if digest_of(path) != provenance["files"].get(name):
            raise InputError(
                f"{path}: not the file that {HEAD_FILE} was written with, but changed, or of "
                "another run; make the embeddings again"
            )
