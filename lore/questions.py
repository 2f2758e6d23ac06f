"""New users, and what to ask them."""

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import logsigmoid

from lore.evidence import interval
from utils import (
    TEMPERATURE,
    check_matrix,
    check_settings,
    few_shot_trials,
    pair_scores,
    sweep_members,
    train_bases,
)


def _log_likelihoods(features, V, W):
    """log P of each choice under the reward V w_j of each seen user j: float64 `[m, N]`, m from 0."""
    V, W = check_matrix(V, "V").cpu(), check_matrix(W, "W", None, V.shape[1]).cpu()
    if len(features) == 0:
        return torch.zeros(0, len(W), dtype=torch.float64)
    (scores,) = pair_scores([check_matrix(features, "features", None, len(V))], V)
    return logsigmoid(scores.double() @ W.double().T / TEMPERATURE)


def fit_new_user(features, V, W):
    """A new user's weights, with the seen users as the prior -> (w `[K]`, posterior `[N]`).
    features: `[m, d]` (or Pairs), chosen minus rejected, m from 0; V: `[d, K]`; W: `[N, K]`, the seen users' weights.
    posterior: how probable each seen user's weights are after these choices; w is their mean."""
    posterior = _log_likelihoods(features, V, W).sum(0).softmax(0)
    return (posterior @ torch.as_tensor(W).cpu().double()).float(), posterior.float()


def question_values(candidates, V, W, posterior):
    """What the answer to each candidate pair would tell of a new user, in nats `[n]`: ask the largest next.
    candidates: `[n, d]` (or Pairs), either answer minus the other; posterior: `[N]`, of `fit_new_user`. The value is
    the mutual information of answer and user, the entropy of the mean answer less the mean entropy."""
    posterior = (
        check_matrix(torch.as_tensor(posterior)[None], "posterior", 1, len(W))[0].cpu().double()
    )  # (N,)
    P = _log_likelihoods(candidates, V, W).exp()  # (n, N)

    def entropy(p):
        return torch.special.entr(p) + torch.special.entr(1 - p)

    return (entropy(P @ posterior) - entropy(P) @ posterior).clamp(min=0).float()


def _asked(S, W, orders, questions):
    """A user's posterior weights after 1, 2, .. of the questions in each order: `[orders, questions, K]`.
    S: the scores X V of the user's pairs `[m, K]`; orders: pair numbers `[orders, n]`, the last one is repeated."""
    w = _log_likelihoods(S, torch.eye(S.shape[1]), W)[orders].cumsum(1).softmax(2) @ W.double()
    return w[:, np.minimum(range(questions), orders.shape[1] - 1)].float()


def _chosen_order(S, W, questions):
    """The pairs that `question_values` asks, each after the answers to those before: `[1, n]`."""
    order, V = [], torch.eye(S.shape[1])
    for _ in range(min(questions, len(S))):
        values = question_values(S, V, W, fit_new_user(S[order], V, W)[1])
        values[order] = -1
        order.append(int(values.argmax()))
    return torch.tensor([order])


def question_curves(
    questions,
    trials,
    alpha_list,
    K_list,
    data,
    V_final,
    device,
    seeds=(0, 1, 2),
    num_iterations=500,
):
    """Accuracy on unseen users' unseen prompts after 1, 2, .. answered questions, which are pairs of `train_unseen`.
    data: as for `save_results`; trials: how often random questions are drawn; ranks from 2 up. Returns a DataFrame K,
    alpha, fit, questions, mean, low, high: means over seeds, then over users, with their 95 % intervals."""
    check_settings(
        num_questions=questions,
        K_list=K_list,
        alpha_list=alpha_list,
        seeds=seeds,
        trials=trials,
        num_iterations=num_iterations,
    )
    questions = min(questions, max(map(len, data["train_unseen"])))
    members, found = (
        [member for member in sweep_members(K_list, alpha_list, seeds) if member.K > 1],
        {},
    )
    fits = (
        train_bases(data["train"], members, V_final, num_iterations, 0.5, device=device)
        if members
        else []
    )
    for member, (W, V, _) in zip(members, fits):
        S_train, S_test = (
            [S.cpu() for S in pair_scores(data[part], V)]
            for part in ("train_unseen", "test_unseen")
        )
        W, generator = W.cpu(), member.generator(2)
        random_orders = [
            torch.stack(
                [torch.randperm(len(S), generator=generator)[:questions] for _ in range(trials)]
            )
            for S in S_train
        ]
        by_fit = {
            "released fit, random": np.stack(
                [
                    few_shot_trials(member, S_train, S_test, shots, trials, None)[1].mean(0)
                    for shots in range(1, questions + 1)
                ],
                1,
            )
        }  # (users, questions)
        for name, orders in (
            ("posterior, random", random_orders),
            ("posterior, chosen", [_chosen_order(S, W, questions) for S in S_train]),
        ):
            by_fit[name] = np.stack(
                [
                    (test @ _asked(S, W, order, questions).mT > 0).double().mean((0, 1)).numpy()
                    for S, test, order in zip(S_train, S_test, orders)
                ]
            )
        for name, accuracies in by_fit.items():
            found.setdefault((name, member.K, member.alpha), []).append(accuracies)
    return pd.DataFrame(
        [
            {"K": K, "alpha": alpha, "fit": name, "questions": i, **interval(of_users)}
            for (name, K, alpha), of_seeds in found.items()
            for i, of_users in enumerate(np.mean(of_seeds, 0).T, 1)
        ]
    )
