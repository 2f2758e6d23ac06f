"""New users: their weights from a few choices, and which question to ask them next."""

from typing import NamedTuple

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
    InputError,
    Member,
    Pairs,
    check_matrix,
    check_whole,
    few_shot_trials,
    fits_per_model,
    pair_scores,
)

# The prior of a new user who is unlike the seen ones: draws from N(0, DRAWN_DEVIATION^2 I).
DRAWS = 600
DRAWN_DEVIATION = 0.5
DRAWN_SHARE = 0.5  # of the prior

BATCH_NUMBERS = 2**21  # of a table `[pairs, particles]` that is made at once: 16 MB in float64

# How weights are fitted to the answers, and how questions are chosen; see `question_curves`.
RELEASED_FIT = "released fit, random"
SEEN_RANDOM = "seen users only, random"
SEEN_CHOSEN = "seen users only, chosen"
WIDENED_RANDOM = "widened prior, random"
WIDENED_CHOSEN = "widened prior, chosen"
METHODS = (RELEASED_FIT, SEEN_RANDOM, SEEN_CHOSEN, WIDENED_RANDOM, WIDENED_CHOSEN)

# One user's pairs, `[m, d]`; an empty list if there are none.
Choices = torch.Tensor | Pairs | list


# ---- Who a new user may be


class Prior(NamedTuple):
    """The weights that a new user may have, each called a particle, before any choice is known."""

    weights: torch.Tensor  # (particles, K), float64
    probability: torch.Tensor  # (particles,), float64, sums to 1


def seen_prior(W: torch.Tensor) -> Prior:
    """A new user is one of the seen users, each with the same probability. W: `[N, K]`."""
    W = check_matrix(W, "W").cpu().double()
    return Prior(W, torch.full((len(W),), 1 / len(W), dtype=torch.float64))


def widened_prior(W: torch.Tensor) -> Prior:
    """A new user is like one of the seen users, or unlike all of them.

    The particles are the N seen users, who have half of the probability, and then 600 draws from
    N(0, I/4), which have the other half. A mean of seen users' weights cannot leave their hull, so
    without the draws it cannot describe a person of the opposite taste. The draws depend on K
    alone: every call makes the same ones.

    W: `[N, K]`, of the size of LoRe's weights, whose rows sum to 1.
    Raises InputError: no matrix, NaN or infinite values.
    """
    seen = seen_prior(W)
    K = seen.weights.shape[1]
    generator = torch.Generator().manual_seed(0)
    drawn = DRAWN_DEVIATION * torch.randn(DRAWS, K, generator=generator, dtype=torch.float64)
    share_of_each = torch.full((DRAWS,), DRAWN_SHARE / DRAWS, dtype=torch.float64)
    return Prior(
        torch.cat([seen.weights, drawn]),
        torch.cat([(1 - DRAWN_SHARE) * seen.probability, share_of_each]),
    )


# ---- A new user


def fit_new_user(
    features: Choices, V: torch.Tensor, W: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A new user's weights from a few choices, in closed form.

    Bayes' rule with the Bradley-Terry likelihood of the choices, sigmoid(x V w / 100), gives each
    particle of `widened_prior` its posterior probability. The user's weights are the mean of the
    particles. They may be negative and need not sum to 1. Without choices they are the prior's
    mean; the fewer and the less consistent the choices, the closer they stay to it.

    With K = 1 the one weight says how much the user agrees with the pooled reward; it is negative
    for a user who prefers the opposite.

    features: the user's choices, chosen minus rejected, float32 `[m, d]` or Pairs; m may be 0.
    V: the basis `[d, K]`. W: the weights of the seen users `[N, K]`.
    Returns (w, posterior): w `[K]`; posterior `[N + 600]`, the probability of each seen user's
    weights and then of each draw, after these choices. Both float32.
    Raises InputError: other shapes, NaN or infinite values.
    """
    S = choice_scores(features, V)  # (m, K)
    prior = widened_prior(check_matrix(W, "W", None, S.shape[1]))
    log_posterior = prior.probability.log()
    for batch in split_for_particles(S, prior):
        log_posterior += log_likelihoods(batch, prior).sum(0)
    posterior = log_posterior.softmax(0)  # (N + 600,)
    w = posterior @ prior.weights  # (K,)
    return w.float(), posterior.float()


def choice_scores(features: Choices, V: torch.Tensor) -> torch.Tensor:
    """The scores x V of one user's pairs on the CPU, float32 `[m, K]`; m may be 0.

    Raises InputError: other shapes, NaN or infinite values.
    """
    V = check_matrix(V, "V").cpu()
    if len(features) == 0:
        return torch.zeros(0, V.shape[1])
    features = check_matrix(features, "features", None, len(V))
    return next(pair_scores([features], V))


def log_likelihoods(S: torch.Tensor, prior: Prior) -> torch.Tensor:
    """The log-likelihood of each choice for each particle: log sigmoid(x V w / 100).

    S: the scores x V of the choices, `[.., K]`. Returns float64 `[.., particles]`.
    """
    return logsigmoid(S.double() @ prior.weights.T / TEMPERATURE)


def split_for_particles(S: torch.Tensor, prior: Prior) -> tuple[torch.Tensor, ...]:
    """The rows of S in batches, so that a table of a batch and all particles stays small."""
    return S.split(max(1, BATCH_NUMBERS // len(prior.weights)))


# ---- What to ask


def question_values(
    candidates: Choices,
    V: torch.Tensor,
    W: torch.Tensor,
    posterior: torch.Tensor,
) -> torch.Tensor:
    """How much the answer to each candidate pair would tell about a new user; ask the largest next.

    It is the mutual information of the answer and the user: the entropy of the mean answer, minus
    the mean entropy of the answer, H(E[p]) - E[H(p)], with means under the posterior.

    Stop asking when the largest value is small, such as 0.05: no further answer is expected to tell
    more than that. The questions of the few largest values may be asked at once: on planted users,
    five at once cost two points of accuracy as the first questions, and half a point as the next.

    candidates: pairs of answers, one minus the other in either order, `[n, d]` or Pairs.
    V: `[d, K]`. W: `[N, K]`. posterior: `[N + 600]`, of `fit_new_user` with this W.
    Returns float32 `[n]`, in nats, from 0. Raises InputError: other shapes, NaN or infinite values.
    """
    S = choice_scores(candidates, V)  # (n, K)
    prior = widened_prior(check_matrix(W, "W", None, S.shape[1]))
    posterior = check_posterior(posterior, prior)
    values = []
    for batch in split_for_particles(S, prior):
        first_wins = log_likelihoods(batch, prior).exp()
        values.append(mutual_information(first_wins, binary_entropy(first_wins), posterior))
    return torch.cat(values).float()


def check_posterior(posterior: torch.Tensor, prior: Prior) -> torch.Tensor:
    """The posterior of `fit_new_user` as float64 `[particles]` that sums to 1.

    Raises InputError: another length, NaN or infinite values.
    """
    particles = len(prior.weights)
    shape = tuple(np.shape(posterior))
    if shape != (particles,):
        raise InputError(
            f"posterior: shape {shape} where [{particles}] should be, for {particles - DRAWS} seen "
            f"users and {DRAWS} draws; give the one that fit_new_user returns with this W"
        )
    (posterior,) = check_matrix(torch.as_tensor(posterior)[None], "posterior").cpu().double()
    return posterior / posterior.sum()  # float32 rounds the sum


def mutual_information(
    first_wins: torch.Tensor, entropies: torch.Tensor, posterior: torch.Tensor
) -> torch.Tensor:
    """The mutual information of each pair's answer and the user, in nats: float64 `[n]`.

    first_wins: the probability that the first answer wins, for each pair and particle, float64
    `[n, particles]`; entropies: `binary_entropy` of these. posterior: `[particles]`.
    """
    entropy_of_mean = binary_entropy(first_wins @ posterior)  # (n,)
    mean_entropy = entropies @ posterior  # (n,)
    return (entropy_of_mean - mean_entropy).clamp(min=0)


def binary_entropy(p: torch.Tensor) -> torch.Tensor:
    """The entropy in nats of an answer that is yes with probability p, elementwise."""
    return torch.special.entr(p) + torch.special.entr(1 - p)


# ---- Accuracy by the number of questions


def question_curves(fits: list[Fit], study: Study, questions: int, trials: int) -> pd.DataFrame:
    """Unseen users' accuracy on unseen prompts after 1, 2, .. `questions` answered questions.

    A question is a pair of `study.train_unseen`, and its answer is the choice the user made there.
    fits: trained models with all their columns; those of a rank below 2 have no weights to fit, and
    are skipped. trials: how often random questions are drawn.

    Returns a table with a row for each K, alpha, `fit` and number of `questions`: the mean over
    users, and `low` and `high`, its 95 % interval over users. A user's accuracy is the mean over
    the seeds of a model. `fit` is one of
    - "released fit, random": random questions, and weights by gradient descent as in the paper;
    - "widened prior, random": the same questions, and weights by `fit_new_user`;
    - "widened prior, chosen": weights by `fit_new_user`, after each answer the question that has
      the largest of `question_values`;
    - "seen users only, random" and "seen users only, chosen": the same two with `seen_prior`.
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
    member = Member(fit.K, fit.alpha, fit.seed)
    S_train = scores_per_user(study.train_unseen, fit.V)
    S_test = scores_per_user(study.test_unseen, fit.V)

    released = []
    for shots in range(1, questions + 1):
        _, on_test = few_shot_trials(member, S_train, S_test, shots, trials, None)
        released.append(on_test.mean(0))  # (users,)
    accuracies = {RELEASED_FIT: np.stack(released, axis=1)}

    generator = member.generator(SHOTS)
    random_orders = [random_questions(len(S), questions, trials, generator) for S in S_train]
    for prior, if_random, if_chosen in (
        (seen_prior(fit.W), SEEN_RANDOM, SEEN_CHOSEN),
        (widened_prior(fit.W), WIDENED_RANDOM, WIDENED_CHOSEN),
    ):
        chosen_orders = [chosen_questions(S, prior, questions)[None] for S in S_train]
        for method, orders in ((if_random, random_orders), (if_chosen, chosen_orders)):
            accuracies[method] = accuracies_by_question(S_train, S_test, prior, orders, questions)
    return accuracies


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


def chosen_questions(S: torch.Tensor, prior: Prior, questions: int) -> torch.Tensor:
    """The pair numbers that `question_values` puts first, each after the answers before it.

    S: the scores X V of the user's pairs `[m, K]`. Returns int64 `[min(questions, m)]`. A few
    tables `[m, particles]` are held, for one user at a time.
    """
    log_likelihood = log_likelihoods(S, prior)  # (m, particles)
    first_wins = log_likelihood.exp()
    entropies = binary_entropy(first_wins)
    log_posterior = prior.probability.log()
    asked = []
    for _ in range(min(questions, len(S))):
        values = mutual_information(first_wins, entropies, log_posterior.softmax(0))
        values[asked] = -1  # below every value, so that no pair is asked twice
        best = int(values.argmax())
        asked.append(best)
        log_posterior = log_posterior + log_likelihood[best]
    return torch.tensor(asked)


def accuracies_by_question(
    S_train: list[torch.Tensor],
    S_test: list[torch.Tensor],
    prior: Prior,
    orders: list[torch.Tensor],
    questions: int,
) -> np.ndarray:
    """The accuracy on the test pairs after each question, a mean over a user's orders of asking.

    S_train, S_test: scores `[m_i, K]` of each user's pairs. orders: pair numbers `[orders, n_i]` of
    each user. Returns float64 `[users, questions]`.
    """
    accuracies = []
    for S, test, order in zip(S_train, S_test, orders):
        w = weights_after_questions(S[order], prior, questions)  # (orders, questions, K)
        right = test @ w.mT > 0  # (orders, m_i, questions)
        accuracies.append(right.double().mean((0, 1)).numpy())
    return np.stack(accuracies)


def weights_after_questions(S: torch.Tensor, prior: Prior, questions: int) -> torch.Tensor:
    """A user's weights by the answers to the first 1, 2, .. `questions` pairs of each order.

    S: the scores X V of the pairs in several orders of asking, `[orders, n, K]`. If n is less than
    `questions`, all later weights are those after the n-th.
    Returns float32 `[orders, questions, K]`, the means of the particles as in `fit_new_user`.
    """
    log_likelihood = log_likelihoods(S, prior).cumsum(1)  # (orders, n, particles)
    posterior = (prior.probability.log() + log_likelihood).softmax(2)
    w = posterior @ prior.weights  # (orders, n, K)
    last = S.shape[1] - 1
    return w[:, np.minimum(range(questions), last)].float()
