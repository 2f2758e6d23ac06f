"""New users: their weights from a few choices, and which question to ask them next."""

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import logsigmoid

from lore.intervals import interval
from lore.study import Features, Study
from utils import (
    SHOTS,
    TEMPERATURE,
    Fit,
    Member,
    Pairs,
    check_matrix,
    check_whole,
    few_shot_trials,
    fits_per_model,
    pair_scores,
)

# One user's pairs, `[m, d]`; an empty list if there are none.
Choices = torch.Tensor | Pairs | list

# How weights are fitted to the answers, and how questions are chosen; see `question_curves`.
RELEASED_FIT = "released fit, random"
POSTERIOR_RANDOM = "posterior, random"
POSTERIOR_CHOSEN = "posterior, chosen"
METHODS = (RELEASED_FIT, POSTERIOR_RANDOM, POSTERIOR_CHOSEN)


def log_likelihoods(features: Choices, V: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """The log-likelihood of each choice for each seen user: log sigmoid(x V w_j / 100).

    features: chosen minus rejected, `[m, d]`; m may be 0. V: `[d, K]`. W: `[N, K]`.
    Returns float64 `[m, N]`. Raises InputError: other shapes, NaN or infinite values.
    """
    V = check_matrix(V, "V").cpu()
    W = check_matrix(W, "W", None, V.shape[1]).cpu()
    if len(features) == 0:
        return torch.zeros(0, len(W), dtype=torch.float64)
    features = check_matrix(features, "features", None, len(V))
    scores = next(pair_scores([features], V))  # (m, K)
    return logsigmoid(scores.double() @ W.double().T / TEMPERATURE)


def fit_new_user(
    features: Choices, V: torch.Tensor, W: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A new user's weights from a few choices, in closed form, with the seen users as the prior.

    The new user is taken to be one of the seen users, each with the same probability beforehand.
    Bayes' rule with the Bradley-Terry likelihood of the choices gives the posterior.

    features: the user's choices, chosen minus rejected, float32 `[m, d]` or Pairs; m may be 0.
    V: the basis `[d, K]`. W: the weights of the seen users `[N, K]`.
    Returns (w, posterior): w `[K]`, the mean of the seen users' weights under the posterior;
    posterior `[N]`, the probability of each seen user's weights after these choices. Both float32.
    Raises InputError: other shapes, NaN or infinite values.
    """
    posterior = log_likelihoods(features, V, W).sum(0).softmax(0)  # (N,)
    w = posterior @ torch.as_tensor(W).cpu().double()  # (K,)
    return w.float(), posterior.float()


def question_values(
    candidates: Choices,
    V: torch.Tensor,
    W: torch.Tensor,
    posterior: torch.Tensor,
) -> torch.Tensor:
    """How much the answer to each candidate pair would tell about a new user; ask the largest next.

    It is the mutual information of the answer and the user: the entropy of the mean answer, minus
    the mean entropy of the answer, H(E[p]) - E[H(p)], with means under the posterior.

    candidates: pairs of answers, one minus the other in either order, `[n, d]` or Pairs.
    V: `[d, K]`. W: `[N, K]`. posterior: `[N]`, of `fit_new_user`.
    Returns float32 `[n]`, in nats, from 0. Raises InputError: other shapes, NaN or infinite values.
    """
    posterior = torch.as_tensor(posterior)[None]
    posterior = check_matrix(posterior, "posterior", 1, len(W))[0].cpu().double()  # (N,)
    first_wins = log_likelihoods(candidates, V, W).exp()  # (n, N)
    entropy_of_mean = binary_entropy(first_wins @ posterior)  # (n,)
    mean_entropy = binary_entropy(first_wins) @ posterior  # (n,)
    return (entropy_of_mean - mean_entropy).clamp(min=0).float()


def binary_entropy(p: torch.Tensor) -> torch.Tensor:
    """The entropy in nats of an answer that is yes with probability p, elementwise."""
    return torch.special.entr(p) + torch.special.entr(1 - p)


def question_curves(fits: list[Fit], study: Study, questions: int, trials: int) -> pd.DataFrame:
    """Unseen users' accuracy on unseen prompts after 1, 2, .. `questions` answered questions.

    A question is a pair of `study.train_unseen`, and its answer is the choice the user made there.
    fits: trained models with all their columns; those of a rank below 2 have no weights to fit, and
    are skipped. trials: how often random questions are drawn.

    Returns a table with a row for each K, alpha, `fit` and number of `questions`: the mean over
    users, and `low` and `high`, its 95 % interval over users. A user's accuracy is the mean over
    the seeds of a model. `fit` is one of
    - "released fit, random": random questions, and weights by gradient descent as in the paper;
    - "posterior, random": random questions, and weights by `fit_new_user`;
    - "posterior, chosen": weights by `fit_new_user`, after each answer the question that has the
      largest of `question_values`.
    Raises InputError: questions or trials below 1.
    """
    check_whole("num_questions", questions, least=1)
    check_whole("trials", trials, least=1)
    questions = min(questions, max(len(X) for X in study.train_unseen))
    personal = [fit for fit in fits if fit.K > 1]
    rows = []
    for (K, alpha), seeds in fits_per_model(personal).items():
        per_seed = [question_accuracies(fit, study, questions, trials) for fit in seeds]
        for method in METHODS:
            per_user = np.mean([accuracies[method] for accuracies in per_seed], axis=0)
            for asked in range(1, questions + 1):
                row = {"K": K, "alpha": alpha, "fit": method, "questions": asked}
                rows.append(row | interval(per_user[:, asked - 1]))
    return pd.DataFrame(rows)


def question_accuracies(
    fit: Fit, study: Study, questions: int, trials: int
) -> dict[str, np.ndarray]:
    """The accuracy of each unseen user after each number of questions, with one trained model.

    Returns a float64 array `[users, questions]` for each of `METHODS`.
    """
    W = fit.W.cpu()  # (N, K)
    member = Member(fit.K, fit.alpha, fit.seed)
    S_train = scores_per_user(study.train_unseen, fit.V)
    S_test = scores_per_user(study.test_unseen, fit.V)

    released = []
    for shots in range(1, questions + 1):
        _, on_test = few_shot_trials(member, S_train, S_test, shots, trials, None)
        released.append(on_test.mean(0))  # (users,)

    generator = member.generator(SHOTS)
    random_orders = [random_questions(len(S), questions, trials, generator) for S in S_train]
    chosen_orders = [chosen_questions(S, W, questions)[None] for S in S_train]
    return {
        RELEASED_FIT: np.stack(released, axis=1),
        POSTERIOR_RANDOM: posterior_accuracies(S_train, S_test, W, random_orders, questions),
        POSTERIOR_CHOSEN: posterior_accuracies(S_train, S_test, W, chosen_orders, questions),
    }


def scores_per_user(features: Features, V: torch.Tensor) -> list[torch.Tensor]:
    """X_i V of each user on the CPU, `[m_i, K]`."""
    return [S.cpu() for S in pair_scores(features, V)]


def random_questions(
    pairs: int, questions: int, trials: int, generator: torch.Generator
) -> torch.Tensor:
    """Random pair numbers without repetition, in the order of asking: `[trials, questions]`.

    A user with fewer pairs is asked all of them: `[trials, pairs]`.
    """
    draws = [torch.randperm(pairs, generator=generator)[:questions] for _ in range(trials)]
    return torch.stack(draws)


def chosen_questions(S: torch.Tensor, W: torch.Tensor, questions: int) -> torch.Tensor:
    """The pair numbers that `question_values` puts first, each after the answers before it.

    S: the scores X V of the user's pairs `[m, K]`. Returns int64 `[min(questions, m)]`.
    """
    basis = identity_basis(S)
    asked = []
    for _ in range(min(questions, len(S))):
        _, posterior = fit_new_user(S[asked], basis, W)
        values = question_values(S, basis, W, posterior)
        values[asked] = -1  # below every value, so that no pair is asked twice
        asked.append(int(values.argmax()))
    return torch.tensor(asked)


def posterior_accuracies(
    S_train: list[torch.Tensor],
    S_test: list[torch.Tensor],
    W: torch.Tensor,
    orders: list[torch.Tensor],
    questions: int,
) -> np.ndarray:
    """The accuracy on the test pairs after each question, a mean over a user's orders of asking.

    S_train, S_test: scores `[m_i, K]` of each user's pairs. orders: pair numbers `[orders, n_i]` of
    each user. Returns float64 `[users, questions]`.
    """
    accuracies = []
    for S, test, order in zip(S_train, S_test, orders):
        w = weights_after_questions(S, W, order, questions)  # (orders, questions, K)
        right = test @ w.mT > 0  # (orders, m_i, questions)
        accuracies.append(right.double().mean((0, 1)).numpy())
    return np.stack(accuracies)


def weights_after_questions(
    S: torch.Tensor, W: torch.Tensor, orders: torch.Tensor, questions: int
) -> torch.Tensor:
    """A user's weights by `fit_new_user` after 1, 2, .. `questions` answers.

    S: the scores X V of the user's pairs `[m, K]`. orders: pair numbers `[orders, n]`; if n is less
    than `questions`, all later weights are those after the n-th.
    Returns float32 `[orders, questions, K]`.
    """
    log_likelihood = log_likelihoods(S, identity_basis(S), W)[orders]  # (orders, n, N)
    posterior = log_likelihood.cumsum(1).softmax(2)
    w = posterior @ W.double()  # (orders, n, K)
    last = orders.shape[1] - 1
    return w[:, np.minimum(range(questions), last)].float()


def identity_basis(S: torch.Tensor) -> torch.Tensor:
    """The basis for scores X V in place of X: they are weighted as they are."""
    return torch.eye(S.shape[1])
