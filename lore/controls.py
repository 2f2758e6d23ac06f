"""What models score that cannot know anybody's tastes, or know one person only.

All are judged on the unseen users' unseen prompts. Under torchrun each process judges its own
users, so all processes must call these functions. The parts of this module, in their order:

    Exchanged weights   the same basis under everybody's mean weights and under other users'
    Tossed choices      a model of choices that mean nothing
    Longer answers      always taking the longer answer: a description of the people
    A model per user    what can be learnt from one person's pairs alone
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from lore.files import TrainingCheckpoint
from lore.intervals import Interval
from lore.leaks import Identity, identities
from lore.study import Features, Study
from utils import (
    TEMPERATURE,
    Fit,
    Pairs,
    accuracies_per_user,
    accuracies_under_each,
    one_torch_thread,
    pair_scores,
    shared_out,
    sweep,
)

# ---- Exchanged weights


@dataclass
class ExchangedWeights:
    """Accuracy of each unseen user's pairs under different people's weights, float64 `[N]` each."""

    own: np.ndarray
    mean: np.ndarray  # under everyone's mean weights
    others: np.ndarray | None  # the mean over every other user's weights; None for a single user

    @property
    def personal_part(self) -> np.ndarray:
        """How much of the accuracy is due to the weights being the user's own, float64 `[N]`."""
        return self.own - self.mean


def exchanged_accuracies(features: Features, fits: list[Fit]) -> ExchangedWeights:
    """Judge unseen users' pairs by their own weights, by everyone's mean and by other people's.

    features: of each of the N unseen users. fits: all seeds of one model; the accuracies are
    means over them.
    """
    N = len(features)

    def judge(features: Features, users: range) -> np.ndarray:
        accuracies = np.zeros((len(users), N + 1))
        for fit in fits:
            mean_weights = fit.W_unseen.mean(0, keepdim=True)  # (1, K)
            candidates = torch.cat([fit.W_unseen, mean_weights])  # (N + 1, K)
            accuracies += accuracies_under_each(features, fit.V, candidates)
        accuracies /= len(fits)
        own = accuracies[np.arange(len(users)), users]
        return np.stack([own, accuracies[:, N], accuracies[:, :N].sum(1)], 1)  # (users, 3)

    own, mean, sum_over_users = shared_out(judge, features, range(N)).T
    others = (sum_over_users - own) / (N - 1) if N > 1 else None
    return ExchangedWeights(own, mean, others)


# ---- Tossed choices

ALARM = 2.6  # standard deviations of the tossed control: chance exceeds them once in 200 times


@dataclass
class TossedControl:
    """What a model scores if nobody's choices mean anything, see `tossed_control`."""

    K: int
    alpha: float
    accuracies: np.ndarray  # float64 [N_unseen], on the unseen users' unseen prompts
    deviation: float  # the most that the standard deviation of their mean can be, by chance alone

    @property
    def interval(self) -> Interval:
        """The mean accuracy, give or take ALARM standard deviations.

        An interval above 0.5 is an alarm: such a mean is no chance, see `tossed_deviation`.
        """
        mean = float(self.accuracies.mean())
        margin = ALARM * self.deviation
        return {"mean": mean, "low": max(mean - margin, 0.0), "high": min(mean + margin, 1.0)}


def tossed_control(
    study: Study,
    K_list: Sequence[int],
    alpha_list: Sequence[float],
    seeds: Sequence[int],
    num_iterations: int,
    device: torch.device | str,
    checkpoint: TrainingCheckpoint | None = None,
    regularized: bool = False,
    threshold: float = 0.0,
) -> TossedControl | None:
    """Train the largest rank of a sweep on choices that a coin has made: it must be at chance.

    The coin belongs to the pair, so a pair that is in the training and in the test falls the same
    way in both, and a model that remembers it predicts it. Pairs that are not repeated cannot be
    predicted. The first alpha and the first seed are taken. Other arguments: as of `sweep`; the
    checkpoint must not be the one of the sweep itself.
    Returns None if no rank is above 1. Raises InputError: see `sweep`.
    """
    K = max(K_list)
    if K <= 1:
        return None
    pairs = identities(study, ("train", "train_unseen", "test_unseen"), share_out=True)
    train = list(toss(study.train, pairs["train"]))
    train_unseen = list(toss(study.train_unseen, pairs["train_unseen"]))
    # The test pairs are many, so they are tossed and judged one user at a time, further down.
    # `sweep` would need all of them at once; in their place it is given the training pairs.
    (fit,) = sweep(  # one rank, one alpha, one seed: one fit
        [K],
        [alpha_list[0]],
        study.reward_head,
        train,
        train,
        train_unseen,
        train_unseen,
        len(train),
        len(train_unseen),
        device,
        seed=seeds[0],
        num_iterations=num_iterations,
        checkpoint=checkpoint,
        regularized=regularized,
        threshold=threshold,
    )

    def judge(features: Features, pairs: list[Identity], w: torch.Tensor) -> np.ndarray:
        return accuracies_per_user(toss(features, pairs), [fit.V], [w])[0]

    accuracies = shared_out(judge, study.test_unseen, pairs["test_unseen"], fit.W_unseen)
    return TossedControl(fit.K, fit.alpha, accuracies, tossed_deviation(pairs["test_unseen"]))


def toss(features: Features, pairs: Iterable[Identity]) -> Iterator[torch.Tensor | Pairs]:
    """Yield the pairs of each user in turn, each turned round or not by the coin of the pair.

    pairs: the identity of each user's pairs. A bit of a pair's key is its coin. A pair that the
    data hold the other way round ends up the same way.
    """
    for X, identity in zip(features, pairs):
        coin = identity.keys % 2 == 0
        heads = torch.from_numpy(coin ^ identity.turned)  # (m_i,)
        if isinstance(X, Pairs):
            chosen = X.chosen.where(heads, X.rejected)
            rejected = X.rejected.where(heads, X.chosen)
            yield Pairs(X.embeddings, chosen, rejected)
        else:
            yield X.where(heads[:, None].to(X.device), -X)


def tossed_deviation(pairs: list[Identity]) -> float:
    """The most that chance makes the standard deviation of the mean accuracy on flipped test pairs.

    pairs: the identity of each user's test pairs, none of which is in the training. Whatever the
    model, it then predicts a pair with probability one half. Different pairs are independent. A
    pair that several users have falls the same way for all of them, so at worst they are all right
    or all wrong.
    """
    N = len(pairs)
    keys = np.concatenate([identity.keys for identity in pairs])
    weights = np.concatenate(
        [np.full(len(identity.keys), 1 / (N * len(identity.keys))) for identity in pairs]
    )  # of each pair in the mean over users of the mean over a user's pairs
    _, places = np.unique(keys, return_inverse=True)
    weight_per_pair = np.bincount(places, weights)
    return float(np.sqrt((weight_per_pair**2).sum() / 4))


# ---- Longer answers


def longer_answer_accuracies(study: Study) -> np.ndarray | None:
    """What always taking the longer answer scores on each unseen user's test pairs, float64 `[N]`.

    Equally long answers count half. None if the study does not know the texts.
    This describes people, who may like long answers; it is no sign that anything is wrong.
    """
    if "test_unseen" not in study.texts:
        return None

    def judge(users: list[list[tuple[str, str]]]) -> np.ndarray:
        accuracies = []
        for texts in users:
            signs = [np.sign(len(chosen) - len(rejected)) for chosen, rejected in texts]
            accuracies.append((1 + np.mean(signs)) / 2)
        return np.array(accuracies)

    return shared_out(judge, study.texts["test_unseen"])


# ---- A model per user

# How strongly a model per user is held to the pooled direction, see `own_directions`.
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0)
MOST_JUDGES = 100  # seen users who choose the strength
MOST_PAIRS = 300  # that a user's model is fitted to: time grows with their third power
MOST_STEPS = 20  # then the direction of the weakest strength is right to about a hundredth
USERS_AT_ONCE = 32  # whose models are judged by one product


@one_torch_thread()  # the products are small, and its threads would wait for one another
def model_per_user_accuracies(study: Study, pooled: torch.Tensor) -> np.ndarray:
    """The accuracy of a model of each unseen user's own few shots: float64 `[N_unseen]`.

    Such a model is a direction for this user alone, fitted by a logistic ridge about the pooled
    direction. Its strength is the one that does best on the seen users' test pairs, which favours
    this comparison.

    pooled: `[d, 1]`, one reward for everybody.
    """
    length = root_mean_square_length(study.train)
    judges = slice(0, MOST_JUDGES)
    judge = partial(own_model_accuracies, pooled=pooled, length=length)
    of_strengths = shared_out(
        partial(judge, strengths=STRENGTHS), study.train[judges], study.test[judges]
    ).mean(0)  # (strengths,)
    # Rounded, equal means tie in whatever order they were added up. Of equals the last, strongest.
    strength = max(zip(of_strengths.round(9), STRENGTHS))[1]
    accuracies = shared_out(
        partial(judge, strengths=[strength]), study.train_unseen, study.test_unseen
    )
    return accuracies[:, 0]


def root_mean_square_length(features: Features) -> float:
    """The root of the mean squared length of all pairs of some users; 1 if all have length 0."""
    squares = torch.cat(shared_out(squared_lengths, features[:MOST_JUDGES]))
    length = float(squares.double().mean().sqrt())
    return length if length > 0 else 1.0


def squared_lengths(features: Features) -> list[torch.Tensor]:
    """The squared lengths of each user's first MOST_PAIRS pairs, `[m_i]`."""
    return [dense(X).square().sum(1) for X in features]


def dense(X: torch.Tensor | Pairs) -> torch.Tensor:
    """The first MOST_PAIRS pairs of a user as a float32 matrix on the CPU."""
    X = X[:MOST_PAIRS]
    if isinstance(X, Pairs):
        X = X.dense()
    return X.float().cpu()


def own_model_accuracies(
    train: Features,
    test: Features,
    pooled: torch.Tensor,
    length: float,
    strengths: Sequence[float],
) -> np.ndarray:
    """The accuracy on each user's test pairs of models of the user's train pairs: `[N, strengths]`.

    float64. Other arguments: as of `own_directions`.
    """
    accuracies = []
    for first in range(0, len(train), USERS_AT_ONCE):
        users = slice(first, first + USERS_AT_ONCE)
        directions = [own_directions(dense(X), pooled, length, strengths) for X in train[users]]
        # The directions of all these users side by side, as they often share a table.
        all_scores = pair_scores(test[users], torch.cat(directions, 1))
        for user, scores in enumerate(all_scores):
            start = user * len(strengths)
            own_scores = scores[:, start : start + len(strengths)]  # (m_i, strengths)
            accuracies.append((own_scores > 0).double().mean(0))
    return torch.stack(accuracies).numpy()


def own_directions(
    X: torch.Tensor, pooled: torch.Tensor, length: float, strengths: Sequence[float]
) -> torch.Tensor:
    """Directions of one user's choices, held to the pooled one: float32 `[d, strengths]`.

    With X the pairs `[m, d]`, v the pooled direction `[d, 1]` and T the temperature, the direction
    v + T u / length of each strength s has the least

        sum over the pairs of log(1 + exp(-x (v + T u / length) / T))  +  s / 2 |u|^2.

    length: of a usual pair, so that one strength means the same for all features.

    The least u is in the span of the pairs, u = X^T a / length, so the problem has m numbers
    whatever d is. Each step solves the quadratic problem that touches the loss and is nowhere
    below it (Jaakkola and Jordan's bound), so no step can overshoot.
    """
    pooled = pooled.float().cpu()
    offsets = (X @ pooled)[:, 0].double() / TEMPERATURE  # (m,)
    products = (X @ X.T).double() / length**2  # (m, m)
    s = torch.tensor(strengths, dtype=torch.float64)  # (strengths,)
    ridge = s[:, None, None] * torch.eye(len(X), dtype=torch.float64)  # (strengths, m, m)
    a = torch.zeros(len(s), len(X), dtype=torch.float64)
    for _ in range(MOST_STEPS):
        margins = offsets + a @ products  # (strengths, m)
        gradient = s[:, None] * a - torch.sigmoid(-margins)
        curvature = logistic_bound(margins)
        step = torch.linalg.solve(ridge + curvature[:, :, None] * products, gradient)
        a -= step
        if step.abs().max() < 1e-6:
            break
    return pooled + TEMPERATURE / length**2 * (X.T @ a.T.float())


def logistic_bound(margins: torch.Tensor) -> torch.Tensor:
    """The curvature of the tightest parabola that is nowhere below log(1 + exp(-margin))."""
    size = margins.abs().clamp(min=1e-6)
    return torch.tanh(size / 2) / (2 * size)
