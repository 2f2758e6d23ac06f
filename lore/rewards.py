"""Rewards of users, for trainers and for choosing the best of several answers."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lore.embedding import embed_conversations
from lore.reward_model import load_reward_model
from lore.rows import as_messages
from utils import InputError, check_matrix

Text = str | list[dict[str, str]]  # a text, or a list of messages
Weights = torch.Tensor | np.ndarray | list[float]  # (K,)
Reward = Callable[..., list[float]]  # reward(prompts, completions, user=[..], **columns)


def personal_reward(
    model_name: str | Path,
    V: torch.Tensor | np.ndarray,
    weights: dict[Hashable, Weights] | Sequence[Weights],
    device: str | torch.device | None = None,
    **options: Any,
) -> Reward:
    """A reward function as TRL's trainers call it: `reward(prompts, completions, user=[..], ..)`.

    V: the basis `[d, K]`.
    weights: a dict, user -> w `[K]`; or rows `[N, K]`, of the users 0 to N - 1.
    device: default a GPU, or the CPU if there is none.
    options: of `embed_conversations`, such as token_budget.

    The function takes prompts and completions, each a text or a list of messages, and the user of
    each, and returns a list of floats: `phi @ V @ w` of each completion. TRL gives it every other
    column of the data too; these are ignored.
    Raises InputError: V or weights of a wrong shape or not finite; in a call, a user without
    weights, lists of different lengths.
    """
    model, tokenizer = load_reward_model(model_name, device)
    V = check_matrix(V, "V", model.config.hidden_size).cpu()
    if not isinstance(weights, dict):
        weights = dict(enumerate(weights))
    weights_by_user = {
        user: check_matrix(torch.as_tensor(w)[None], f"weights of {user}", 1, V.shape[1]).cpu()[0]
        for user, w in weights.items()
    }  # user -> (K,)

    # TRL logs the mean of a reward under the name of its function.
    def personal_reward(
        prompts: list[Text], completions: list[Text], user: list[Hashable], **columns: Any
    ) -> list[float]:
        if not len(prompts) == len(completions) == len(user):
            raise InputError(
                f"{len(prompts)} prompts, {len(completions)} completions, {len(user)} users; give "
                "equally many"
            )
        for name in user:
            if name not in weights_by_user:
                raise InputError(
                    f"user {name!r}: no weights; fit them from this user's choices with "
                    "fit_new_user, and give them to personal_reward"
                )
        conversations = [
            as_messages("user", prompt) + as_messages("assistant", completion)
            for prompt, completion in zip(prompts, completions)
        ]
        phi = embed_conversations(conversations, model, tokenizer, **options).float()  # (n, d)
        W = torch.stack([weights_by_user[name] for name in user])  # (n, K)
        return (phi @ V * W).sum(dim=1).tolist()

    return personal_reward


def best_of_n(
    reward: Reward, prompt: Text, completions: list[Text], user: Hashable
) -> tuple[list[float], list[int]]:
    """Score the completions of one prompt for one user.

    reward: of `personal_reward`. Returns (the scores, the completions' numbers, best first).
    """
    count = len(completions)
    scores = reward([prompt] * count, completions, user=[user] * count)
    order = sorted(range(count), key=lambda i: scores[i], reverse=True)
    return scores, order
