"""Rewards of users, for trainers and for choosing among answers, for one user or for several."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lore.basis import Basis, Weights, check_rank, check_user_weights, load_basis
from lore.embedding import embed_conversations
from lore.normal_forms import canonical_id
from lore.reward_model import load_reward_model
from lore.rows import as_messages
from utils import InputError, check_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Text = str | list[dict[str, str]]  # a text, or a list of messages
Reward = Callable[..., list[float]]  # reward(prompts, completions, user=[..], **columns)


def personal_reward(
    model_name: str | Path,
    V: Basis,
    weights: Mapping[Hashable, Weights] | Sequence[Weights],
    device: str | torch.device | None = None,
    about: dict[str, Any] | None = None,
    **options: Any,
) -> Reward:
    """A reward function as TRL's trainers call it: `reward(prompts, completions, user=[..], ..)`.

    V: the basis `[d, K]`, or the file `results/K_<rank>.safetensors` that holds it. The file says
        on which model the basis was learnt, which has to be this one.
    weights: a dict, user -> w `[K]`; or rows `[N, K]`, of the users 0 to N - 1.
    device: default a GPU, or the CPU if there is none.
    about: what is known of V if it is no file: the metadata that `load_tensors` reads with it.
    options: of `embed_conversations`, such as token_budget.

    The function takes prompts and completions, each a text or a list of messages, and the user of
    each, and returns a list of floats: `phi @ V @ w` of each completion. TRL gives it every other
    column of the data too; these are ignored. Users are the same if their ids read the same: 1 and
    "1" are.
    Raises InputError: a basis of another model; V or weights of a wrong shape or not finite; two
    users with the same id; in a call, a user without weights, lists of different lengths.
    """
    V, run_info = load_basis(model_name, V, about)
    model, tokenizer = load_reward_model(model_name, device)
    V = check_matrix(V, "V", _width_of_states(model)).cpu()
    check_rank(V, run_info)
    weights_by_id = _weights_by_id(weights, V.shape[1])

    # TRL logs the mean of a reward under the name of its function.
    def personal_reward(
        prompts: list[Text],
        completions: list[Text],
        user: list[Hashable] | None = None,
        **columns: Any,
    ) -> list[float]:
        if user is None:
            raise InputError("no users; the data need a column user, the id of each row's user")
        _check_equally_many(prompts, completions, user)
        weights_of_each = [_weights_of(name, weights_by_id) for name in user]
        conversations = [
            as_messages("user", prompt) + as_messages("assistant", completion)
            for prompt, completion in zip(prompts, completions)
        ]
        phi = embed_conversations(conversations, model, tokenizer, **options).float()  # (n, d)
        W = torch.stack(weights_of_each)  # (n, K)
        return (phi @ V * W).sum(dim=1).tolist()

    return personal_reward


def _width_of_states(model: PreTrainedModel) -> int:
    """d of a model of `load_reward_model`: that of its head, if it could be read."""
    for _, head in model.reward_scorer:
        return len(head)
    return model.config.get_text_config().hidden_size


def _check_equally_many(
    prompts: list[Text], completions: list[Text], users: list[Hashable]
) -> None:
    """Raise InputError unless these are lists of one length."""
    for name, values in (("prompts", prompts), ("completions", completions), ("user", users)):
        if isinstance(values, str):
            raise InputError(
                f"{name} = {values!r:.60}: one text; give a list, with one for each completion"
            )
    if not len(prompts) == len(completions) == len(users):
        raise InputError(
            f"{len(prompts)} prompts, {len(completions)} completions, {len(users)} users; give "
            "equally many"
        )


# ---- Users


def _user_id(user: Hashable) -> Hashable:
    """What is equal for ids of the same user, however a file or a program keeps them.

    Raises InputError: no id, or a float that may have been another one.
    """
    if getattr(user, "ndim", None) == 0:  # one of numpy's or torch's numbers
        user = user.item()
    try:
        name = canonical_id(user)
    except ValueError as error:
        raise InputError(f"user {user!r:.60}: {error}") from None
    is_missing = name is None or name != name  # NaN is not equal to itself
    if is_missing or not isinstance(name, Hashable):
        raise InputError(f"user {user!r:.60}: no id; give a text or a whole number for each user")
    return name


def _weights_by_id(
    weights: Mapping[Hashable, Weights] | Sequence[Weights], rank: int
) -> dict[Hashable, torch.Tensor]:
    """The weights `[K]` of each user by `_user_id`. Raises InputError: see `personal_reward`."""
    if not isinstance(weights, Mapping):
        weights = dict(enumerate(weights))
    found = {}
    for user, w in weights.items():
        name = _user_id(user)
        if name in found:
            raise InputError(f"weights: two users are called {name!r:.60}; give each user once")
        found[name] = check_user_weights(w, f"weights of {user}", rank)
    return found


def _weights_of(user: Hashable, weights_by_id: dict[Hashable, torch.Tensor]) -> torch.Tensor:
    """The weights `[K]` of a user. Raises InputError: there are none."""
    if _user_id(user) not in weights_by_id:
        raise InputError(
            f"user {user!r:.60}: no weights; fit them from this user's choices with fit_new_user, "
            "and give them to personal_reward"
        )
    return weights_by_id[_user_id(user)]


# ---- Choosing


def best_of_n(
    reward: Reward, prompt: Text, completions: list[Text], user: Hashable
) -> tuple[list[float], list[int]]:
    """Score the completions of one prompt for one user.

    reward: of `personal_reward`. Returns (the scores, the completions' numbers, best first); equal
    scores are in the order of the completions.
    Raises InputError: completions that are one text, and what `reward` raises.
    """
    completions = _listed(completions, "completions", "the texts to choose from")
    count = len(completions)
    scores = reward([prompt] * count, completions, user=[user] * count)
    return scores, _best_first(scores)


def rewards_of_group(
    rewards: Reward,
    completions: list[Text],
    prompt: Text,
    users: list[Hashable],
    rule: str,
) -> tuple[list[float], list[int]]:
    """Score the completions of one prompt for several users together, by a rule of voting.

    rewards: of `personal_reward`. users: each has one vote; who is named twice has two.
    rule: what the score of a completion is.
    - "mean": the mean of the users' rewards.
    - "borda": how many of the other completions it beats, as a mean over users; a tie counts half.
    - "worst_served": a user loses what the completion's reward is below that of the user's own
      favourite; the score is minus the largest loss of any user, so the best has the smallest.

    Differences of rewards are comparable between people: in the Bradley-Terry model, 100 means odds
    of e to 1 for everybody. Rewards themselves are not, as adding a constant to all rewards of one
    user changes no choice. So "worst_served" takes differences; and in the mean, such a constant
    changes all scores alike, and not their order. Both give more say to a user whose differences
    are large, because the choices were clear, or are many (those of a new user begin small, see
    `fit_new_user`). With "borda" all users have the same say.

    Returns as `best_of_n`: (the scores, the completions' numbers, best first).
    Raises InputError: another rule; no user; completions or users that are one text; and what
    `rewards` raises, such as a user without weights.
    """
    if rule not in VOTING_RULES:
        raise InputError(f"rule = {rule!r:.60}; give one of {', '.join(VOTING_RULES)}")
    completions = _listed(completions, "completions", "the texts to choose from")
    users = _listed(users, "users", "the ids of those who vote")
    if not users:
        raise InputError("users: none; give the ids of those who vote")
    count = len(completions)
    all_rewards = rewards(
        [prompt] * (len(users) * count),
        completions * len(users),
        user=[user for user in users for _ in range(count)],
    )
    by_user = torch.tensor(all_rewards, dtype=torch.float64).reshape(len(users), count)
    scores = VOTING_RULES[rule](by_user).tolist()
    return scores, _best_first(scores)


def _mean_reward(by_user: torch.Tensor) -> torch.Tensor:
    """The scores `[completions]` by "mean", from the rewards `[users, completions]`."""
    return by_user.mean(0)


def _borda(by_user: torch.Tensor) -> torch.Tensor:
    """The scores `[completions]` by "borda", from the rewards `[users, completions]`."""
    first = by_user[:, :, None]  # (users, completions, 1)
    second = by_user[:, None, :]  # (users, 1, completions)
    points = (first > second) + 0.5 * (first == second)
    return points.sum(2).mean(0) - 0.5  # without the tie with itself


def _worst_served(by_user: torch.Tensor) -> torch.Tensor:
    """The scores `[completions]` by "worst_served", from the rewards `[users, completions]`."""
    best_of_user = by_user.amax(1, keepdim=True)  # (users, 1)
    return (by_user - best_of_user).amin(0)


VOTING_RULES = {"mean": _mean_reward, "borda": _borda, "worst_served": _worst_served}


def _listed(values: Sequence[Any], name: str, content: str) -> list[Any]:
    """The values as a list. Raises InputError: one text, whose letters would be taken for them."""
    if isinstance(values, str):
        raise InputError(f"{name} = {values!r:.60}: one text; give a list of {content}")
    return list(values)


def _best_first(scores: list[float]) -> list[int]:
    """The numbers of the completions in the order of their scores; equal ones keep theirs."""
    return sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)
