"""Rewards of users for trainers."""

import torch

from lore.embedding import embed_conversations
from lore.reward_model import load_reward_model
from lore.rows import as_messages
from utils import InputError, check_matrix


def personal_reward(model_name, V, weights, device=None, **options):
    """A reward as TRL's trainers call it: reward(prompts, completions, user=[..], **columns) -> list of float.
    V: `[d, K]`; weights: a dict, user -> w `[K]`; options: of `embed_conversations`. Prompts and completions are texts
    or lists of messages. Raises InputError, also when called: a user without weights."""
    model, tokenizer = load_reward_model(model_name, device)
    V = check_matrix(V, "V", model.config.hidden_size).cpu()
    W = {
        user: check_matrix(torch.as_tensor(w)[None], f"weights of {user}", 1, V.shape[1]).cpu()
        for user, w in (weights if isinstance(weights, dict) else dict(enumerate(weights))).items()
    }

    def personal_reward(prompts, completions, user, **columns):
        if not len(prompts) == len(completions) == len(user):
            raise InputError(
                f"{len(prompts)} prompts, {len(completions)} completions, {len(user)} users; give equally many"
            )
        for unknown in set(user) - W.keys():
            raise InputError(
                f"user {unknown!r}: no weights; fit them from this user's choices with fit_new_user, and "
                "give them to personal_reward"
            )
        conversations = [
            as_messages("user", p) + as_messages("assistant", c)
            for p, c in zip(prompts, completions)
        ]
        phi = embed_conversations(conversations, model, tokenizer, **options).float()
        return (phi @ V * torch.cat([W[one] for one in user])).sum(1).tolist()

    return personal_reward


def best_of_n(reward, prompt, completions, user):
    """Score the completions of one prompt for one user -> (scores, their numbers in order, best first)."""
    scores = reward([prompt] * len(completions), completions, user=[user] * len(completions))
    return scores, sorted(range(len(scores)), key=lambda i: -scores[i])
