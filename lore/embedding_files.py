"""Files of embeddings, and the reward head beside them."""

import contextlib
from pathlib import Path

import torch

from lore.files import digest_of, load_tensors, replace_files_in, save_tensors
from lore.reward_model import load_reward_head
from utils import InputError

HEAD_FILE = "reward_head.safetensors"


def embeddings_are_finished(outputs, identity, overwrite):
    """Whether the files `outputs` already hold the embeddings of this model and data.
    identity: a dict of JSON values; that of the files, and their digests, stand in the reward head's file beside
    them. Digests are compared as far as both hold them; "model" is but a name. Files that are damaged or missing are not
    finished. Raises InputError where they hold other embeddings and `overwrite` is not set."""
    existing = [path for path in outputs if path.exists()]
    if not existing or overwrite:
        return False
    head = existing[0].with_name(HEAD_FILE)
    if not head.exists():
        raise InputError(
            f"{existing[0]}: finished embeddings without the {HEAD_FILE} that says of which model; move "
            "them away, or make them again with --overwrite"
        )
    about = {}
    with contextlib.suppress(InputError):  # damaged
        about = load_tensors(head)[1]
    theirs = about.get("identity") or dict.fromkeys(identity)
    if other := [
        part
        for part in theirs
        if part in identity and part != "model" and theirs[part] != identity[part]
    ]:
        held = ", ".join(f"{key} {about.get(key, 'unknown')}" for key in ("model", "data"))
        names = {"weights": "weights or config", "tokenizer": "tokenizer or chat template"}
        raise InputError(
            f"{existing[0]} holds finished embeddings of other {', '.join(names.get(o, o) for o in other)} ({held}); "
            "move it away, or replace it with --overwrite"
        )
    return all(
        path.exists() and digest_of(path) == about["files"].get(path.name) for path in outputs
    )


@contextlib.contextmanager
def new_embeddings(folder, head, identity, **about):
    """Where to write embeddings that then, with the reward head beside them, replace those in `folder` together.
    identity: see `embeddings_are_finished`; about: further JSON values."""
    with replace_files_in(folder) as new:
        yield new
        save_tensors(
            new / HEAD_FILE,
            {"reward_head": head},
            identity=identity,
            **about,
            files={path.name: digest_of(path) for path in sorted(new.iterdir())},
        )


def find_reward_head(folder, model_name, title, width, outputs):
    """The reward head beside the embeddings in the files `outputs`, else from `model_name`'s checkpoint.
    width: d -> where an embedding of that width was found. Returns (float32 `[d, 1]`, a dict of what is known of model
    and data, with a `title` for plots that begins with `title`). Raises InputError where one of the files is not that
    which the head was written with, or is of another width."""
    path, about = Path(folder) / HEAD_FILE, {"model": model_name}
    if path.exists():
        tensors, about = load_tensors(path)
        for output in (Path(folder) / name for name in outputs if "files" in about):
            if digest_of(output) != about["files"].get(output.name):
                raise InputError(
                    f"{output}: not the file that {HEAD_FILE} was written with, but changed, or of another "
                    "run; make the embeddings again"
                )
        head = tensors.get("reward_head", torch.zeros(0))
    else:
        head = load_reward_head(model_name)
    if len(width) > 1 or head.shape != (next(iter(width)), 1) or not torch.isfinite(head).all():
        raise InputError(
            f"embeddings and reward head of different models: {tuple(head.shape)} in {path}, or "
            f"{about.get('model')}'s, "
            + ", ".join(f"d = {d} in {where}" for d, where in width.items())
            + "; prepare all files with one model"
        )
    if about.get("identity", {}).get("reward_head", found := digest_of(head.tolist())) != found:
        raise InputError(
            f"{path}: its head is not the one that it names; make the embeddings again"
        )
    return head, {**about, "title": f"{title} ({about['data']})" if "data" in about else title}
