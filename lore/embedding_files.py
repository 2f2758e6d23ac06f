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

from lore.files import (
    digest_of,
    load_json,
    load_tensors,
    printable,
    replace_files_in,
    save_tensors,
)
from lore.reward_model import load_reward_head
from utils import InputError, process_rank

HEAD_FILE = "reward_head.safetensors"

# The types of what is read from the head's file, if it is there
PROVENANCE_TYPES = {
    "identity": dict[str, Any],
    "files": dict[str, Any],
    "model": str,
    "data": str,
    "demo": bool,
    "own": bool,
    "data_notes": list[str],
    "equal_pairs": dict[str, dict[str, int]],
}

# What trainings leave beside the embeddings: folders, and the files in results/ that have the
# identity of the embeddings. What was learned from other embeddings goes into a subfolder.
RESULT_FOLDERS = ("results", "checkpoints")
FILES_WITH_IDENTITY = ("results.json", "vary_fewshot.json", "vary_questions.json")
EARLIER = "earlier"

# How an error names the parts of an identity whose own names explain too little
NAMES_OF_PARTS = {
    "data": "data or another selection of them by a setting such as --limit",
    "weights": "weights or config",
    "backbone": "weights or config",  # whose digest differs then, too
    "tokenizer": "tokenizer or chat template",
}


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
        _, provenance = load_tensors(head_file, **PROVENANCE_TYPES)
    _check_same_identity(existing[0], provenance, identity)
    digests = provenance.get("files", {})
    return all(path.exists() and digest_of(path) == digests.get(path.name) for path in outputs)


def _check_same_identity(path: Path, provenance: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise InputError if the embeddings in `path` are of another model or of other data."""
    recorded = provenance.get("identity")
    if not recorded:
        recorded = dict.fromkeys(identity)  # None is no digest: all parts differ
    different = _different_parts(recorded, identity)
    if different:
        names = [NAMES_OF_PARTS.get(part, part) for part in different]
        parts = ", ".join(dict.fromkeys(names))  # each once
        model = provenance.get("model", "unknown")
        data = provenance.get("data", "unknown")
        message = (
            f"{path} holds finished embeddings of other {parts} (model {model}, data {data}); "
            "move it away, or replace it with --overwrite"
        )
        raise InputError(printable(message))


def _different_parts(recorded: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """The parts of a recorded identity that are not as in `identity`, as far as both have them."""
    # Without a max_length nothing was cut.
    recorded = {"max_length": None, **recorded}
    identity = {"max_length": None, **identity}
    return [
        part
        for part, digest in recorded.items()
        if part != "model" and part in identity and digest != identity[part]
    ]


@contextlib.contextmanager
def new_embeddings(
    folder: str | Path, head: torch.Tensor, identity: dict[str, Any], **provenance: Any
) -> Iterator[Path]:
    """Yield a temporary folder to write embeddings in.

    On success the reward head's file is added, and all files replace those in `folder` together.
    Results of other embeddings do not stay beside them, see `set_aside_other_results`.
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
        set_aside_other_results(folder, identity)


def set_aside_other_results(folder: str | Path, identity: dict[str, Any]) -> None:
    """Move results of embeddings with another identity into a subfolder, and print where to.

    Beside new embeddings they would be taken for theirs. They are moved and not removed, because
    they took a training, and --overwrite is said of embeddings only. In the subfolder, such as
    results/earlier-1, no script reads or replaces them.
    If no file says of which embeddings the results are, they are moved, too. Hidden files stay:
    those are checkpoints of unfinished trainings, which name their data themselves.
    """
    if _have_identity(Path(folder) / RESULT_FOLDERS[0], identity):
        return
    for name in RESULT_FOLDERS:
        results = Path(folder) / name
        files = [path for path in results.glob("[!.]*") if not path.name.startswith(EARLIER)]
        if not files:
            continue
        number = 1
        while (results / f"{EARLIER}-{number}").exists():
            number += 1
        earlier = results / f"{EARLIER}-{number}"
        earlier.mkdir()
        for path in files:
            path.rename(earlier / path.name)
        print(
            f"{results} was not learned from the new embeddings: what it held is now in {earlier}"
        )


def _have_identity(results: Path, identity: dict[str, Any]) -> bool:
    """Whether all results in a folder say that they are of embeddings with this identity.

    Those of sweeps with a name are in subfolders.
    """
    named = [path for path in results.glob("[!.]*") if not path.name.startswith(EARLIER)]
    recorded = []
    for path in (folder / name for folder in (results, *named) for name in FILES_WITH_IDENTITY):
        if path.exists():
            content = {}
            with contextlib.suppress(InputError):  # damaged: it does not say of what it is
                content = load_json(path, identity=dict)
            recorded.append(content.get("identity"))
    return bool(recorded) and all(
        parts and not _different_parts(parts, identity) for parts in recorded
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
    The names of data and model, which are file names, are made printable.
    width: each width d of the embeddings -> where one of that width was read, for the error.
    outputs: the names of the files of embeddings.
    Raises InputError: one of the files, or the head, is not the one that was written together with
    the others; the widths differ; the head is not finite.
    """
    head_file = Path(folder) / HEAD_FILE
    if head_file.exists():
        tensors, provenance = load_tensors(head_file, **PROVENANCE_TYPES)
        if process_rank() == 0:  # else each process of a training would read all files
            _check_same_files(folder, outputs, provenance)
        head = tensors.get("reward_head", torch.zeros(0))
        head = head.float() if head.is_floating_point() else torch.zeros(0)
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

    for name in ("data", "model"):
        if name in provenance:
            provenance[name] = printable(provenance[name])
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
