"""LoRe: low-rank reward modelling for personalised language models, the method in one file.

Bose et al., arXiv 2504.14439. People choose between two answers to a prompt. A frozen reward
model gives every conversation a vector phi(prompt, answer) in R^d, so that a choice of user i is
one vector

    x = phi(chosen) - phi(rejected).

All users share a basis V (d x K) of reward directions, and user i has only a mixture over them,

    w_i = softmax(W_i).

The Bradley-Terry model then says that the user makes this choice with the probability

    P = sigmoid(m),  with the margin  m = x V w_i / 100.

K = 0 names the reference model (the pretrained reward head, nothing is learnt), K = 1 is one
Bradley-Terry model for everybody, and from K = 2 on it is LoRe.

In this file, from top to bottom:

    1. Preference pairs        Pairs
    2. The models              LoRe, LoRe_regularized, PersonalizeBatch: forward is the loss
    3. The engine              Likelihood and its kernel, train_bases, fit_logits
    4. Scores and evaluation   pair_scores, evaluate_model, accuracies_per_user
    5. Pipelines               sweep, run, run_regularized, run_few_shot_vary_shots
    6. Released API            solve, learn_multiple, simulate_user, create_dataset_prism
    7. Checks                  InputError, check_whole, check_matrix, check_features
    8. Processes of torchrun   process_count, own_users, shared_out

Letters in shapes: N users; user i has m_i pairs, and all users have M; d numbers in an embedding;
K columns in a basis. G models that are computed side by side have C columns in all.

The file needs torch, numpy, numba and tqdm, and works without the rest of the repository.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, Protocol

import numba
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn, optim
from tqdm import tqdm

# What `from utils import *` gives: what the star of the released file gives, and our own names.
__all__ = [
    # modules, and the device that released scripts use
    "np", "torch", "nn", "optim", "F", "random", "device",
    # models
    "LoRe", "LoRe_regularized", "PersonalizeBatch",
    # pipelines
    "run", "run_regularized", "run_few_shot_vary_shots", "sweep", "Fit",
    # evaluation
    "evaluate_model", "eval_multiple",
    # released helpers
    "solve", "solve_regularized", "solve_regularized_simplex", "learn_multiple_few_shot",
    "learn_multiple", "learn_single_reward", "learn_single_reward_regularized", "sample_shots",
    "simulate_user", "simulate_population", "generate_population", "generate_popupulation",
    "create_sparse_tensor", "create_dataset_prism", "create_dataset_prism_shots",
    # pairs, checks
    "Pairs", "InputError", "check_device", "check_features", "check_groups", "check_head",
    "check_matrix", "check_number", "check_numbers", "check_sweep", "check_whole",
    "check_whole_numbers",
]  # fmt: skip

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # as released; unused here

# ---------------------------------------------------------------------------------------------
# 1. Preference pairs
#
# The features of users are a list with a float32 matrix `[m_i, d]` per user, or with Pairs: row
# numbers of a table that users share.
# ---------------------------------------------------------------------------------------------


class Pairs:
    """Preference pairs as row numbers of one table of embeddings, for many pairs of few answers.

    It behaves like the float32 matrix `embeddings[chosen] - embeddings[rejected]`, `[m, d]`,
    without holding it: a million pairs of 8,000 answers need 8,000 rows.

    embeddings: `[rows, d]`, any float dtype. chosen, rejected: row numbers `[m]`.
    Raises InputError if these are not two equally long lists of row numbers of the table.
    """

    def __init__(self, embeddings: torch.Tensor, chosen: Any, rejected: Any) -> None:
        chosen = torch.as_tensor(chosen)
        rejected = torch.as_tensor(rejected)
        for rows in (chosen, rejected):
            if not _are_rows(rows, len(embeddings)) or chosen.shape != rejected.shape:
                raise InputError(
                    f"Pairs: chosen {tuple(chosen.shape)}, rejected "
                    f"{tuple(rejected.shape)}: rows {rows.tolist()[:5]}; give two equally "
                    f"long lists of row numbers of the {len(embeddings)} rows"
                )
        self.embeddings = embeddings  # (rows, d)
        self.chosen = chosen.long()  # (m,)
        self.rejected = rejected.long()  # (m,)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self.embeddings.shape[1]))

    def __getitem__(self, rows: Any) -> "Pairs":
        return Pairs(self.embeddings, self.chosen[rows], self.rejected[rows])

    def __matmul__(self, V: torch.Tensor) -> torch.Tensor:
        (scores,) = pair_scores([self], V)
        return scores

    def dense(self) -> torch.Tensor:
        """The float32 matrix `[m, d]` itself."""
        X = self.embeddings[self.chosen].float()
        X -= self.embeddings[self.rejected]
        return X


def _are_rows(rows: torch.Tensor, count: int) -> bool:
    """Whether a tensor is a vector of whole numbers from 0 to count - 1, of any dtype."""
    if rows.ndim != 1 or rows.dtype == torch.bool:
        return False
    if len(rows) == 0:
        return True
    are_whole = (rows == rows.long()).all()
    return bool(are_whole and rows.min() >= 0 and rows.max() < count)


Features = list[torch.Tensor | Pairs]  # a float32 matrix [m_i, d], or Pairs, per user


# ---------------------------------------------------------------------------------------------
# 2. The models
#
# LoRe and LoRe_regularized learn a basis and the weights of the seen users; PersonalizeBatch fits
# the weights of new users. `forward` is the loss as the paper writes it, and `train` minimises it.
# ---------------------------------------------------------------------------------------------

TEMPERATURE = 100.0  # the fixed temperature of the Bradley-Terry model, as released


def choice_nll(X: torch.Tensor | Pairs, V: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """-log P of each choice of one user, `[m]`. X: `[m, d]` or Pairs; V: `[d, K]`; w: `[K]`."""
    margins = X @ V @ w / TEMPERATURE  # (m,)
    return -F.logsigmoid(margins)


class LoRe(nn.Module):
    """Low-rank reward model: a basis that all users share, and weights over it for each user.

    The loss (`forward`) is the sum over users of the user's mean negative log-likelihood, plus
    alpha * sum_j |V_j - V_sft|^2. One Adam changes W and V together.

    A subclass that overrides `forward` is trained by autograd on its own loss. Otherwise `train`
    takes the engine below, which computes the same derivatives many times faster and does not call
    `forward`.

    V_sft: the reward head `[d, 1]`; None if alpha is 0. num_classes: the number N of users.
    num_features: d. num_basis_vectors: K. seed: None takes torch's own generator, as released.
    Parameters: the logits `W` `[N, K]` and the basis `V` `[d, K]`, standard normal at the start.
    Raises InputError for settings that mean nothing.
    """

    regularized = False

    def __init__(
        self,
        V_sft: Any,
        alpha: float,
        num_classes: int,
        num_features: int,
        num_basis_vectors: int,
        num_iterations: int = 1000,
        learning_rate: float = 0.5,
        seed: int | None = None,
        threshold: float = 0.0,
    ) -> None:
        super().__init__()
        check_whole("num_basis_vectors", num_basis_vectors, 1)
        check_number("alpha", alpha, 0, LARGEST_ALPHA)
        check_training(num_iterations, learning_rate, seed)
        check_number("threshold", threshold, 0, 1)
        V_sft = None if V_sft is None else check_head(V_sft, "V_sft", num_features)
        check_anchor(V_sft, alpha)
        self.register_buffer("V_sft", V_sft, persistent=False)  # it moves with .to(device)
        self.alpha = float(alpha)
        self.num_classes = num_classes
        self.num_features = num_features
        self.num_iterations = num_iterations
        self.learning_rate = learning_rate
        self.threshold = threshold
        self.member = Member(num_basis_vectors, self.alpha, seed)  # what the engine trains
        W, V = self.member.start(num_classes, num_features, self.regularized)
        self.W = nn.Parameter(W)  # (N, K)
        self.V = nn.Parameter(V.T.contiguous())  # (d, K), which the engine keeps as rows (K, d)

    def forward(self, X: Features) -> tuple[torch.Tensor, ...]:
        """The loss of the choices -> (nll, penalty), two scalars whose sum is minimised."""
        w = self.W.softmax(dim=1)  # (N, K)
        nll = sum(choice_nll(X_i, self.V, w_i).mean() for X_i, w_i in zip(X, w))
        penalty = self.alpha * self._squared_distances().sum()
        return nll, penalty

    def _squared_distances(self) -> torch.Tensor:
        """|V_j - V_sft|^2 of each column, `[K]`; 0 without a reward head."""
        if self.V_sft is None:
            return torch.zeros_like(self.V[0])
        return ((self.V - self.V_sft) ** 2).sum(dim=0)

    def train(self, X: Any = True) -> Any:
        """Learn W and V from the choices -> (softmax(W) `[N, K]`, V `[d, K]`).

        X: one float32 `[m_i, d]`, or Pairs, per user. Raises InputError: other users or widths.
        Columns that no user weighs with `threshold` or more are left out of what is returned;
        `self.W` and `self.V` keep them. A truth value is nn.Module's own train(mode).
        """
        if isinstance(X, bool):
            return super().train(X)
        if type(self).forward in (LoRe.forward, LoRe_regularized.forward):
            X = check_own_features(X, "features", self.num_classes, self.num_features)
            self._train_on_engine(X)
        else:
            X = check_features(X, "features", self.num_classes, self.num_features)
            self._train_by_autograd(_on_device(X, self.V.device))
        return prune(self.W.detach().softmax(1), self.V.detach().clone(), self.threshold)

    @torch.no_grad()
    def _train_on_engine(self, X: Features) -> None:
        (trained,) = train_bases(
            X,
            members=[self.member],
            V_sft=self.V_sft,
            num_iterations=self.num_iterations,
            learning_rate=self.learning_rate,
            regularized=self.regularized,
            device=self.V.device,
            starts=[(self.W, self.V.T)],
        )
        self.W.copy_(trained.logits)
        self.V.copy_(trained.V)

    def _train_by_autograd(self, X: Features) -> None:
        """Adam on W and V together, on the loss of a subclass."""
        adam = optim.Adam([self.W, self.V], lr=self.learning_rate)
        for _ in range(self.num_iterations):
            _adam_step(adam, self.forward(X))


def _adam_step(adam: optim.Adam, loss: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    """One step of Adam on the value of a `forward`: the loss itself, or nll, penalty and more.

    nll + penalty is minimised; further parts, such as the entropy of `LoRe_regularized`, are not.
    """
    if not isinstance(loss, torch.Tensor):
        nll, penalty, *_ = loss
        loss = nll + penalty
    adam.zero_grad()
    loss.backward()
    adam.step()


def _on_device(features: Features, device: torch.device) -> Features:
    """Matrices on the device; Pairs as they are, as their products are moved to it."""
    return [X if isinstance(X, Pairs) else X.to(device) for X in features]


class LoRe_regularized(LoRe):
    """LoRe with alternating steps and a basis that is anchored to the reward head.

    The loss (`forward`) is the mean negative log-likelihood of all pairs, plus
    alpha_t * mean_j (1 - cos(V_j, V_sft)), so that one column feels alpha_t / K. alpha_t is 0 for
    the first 20 % of the iterations, then rises linearly, and is alpha from 80 % on. Each
    iteration takes one Adam step on W with V fixed, then one on V with the new W fixed.

    The logits start from U(0, 1). `train` leaves out the columns whose largest user weight is
    below `threshold`; 0 keeps all. The other arguments are those of `LoRe`.

    A subclass overrides `forward(X, alpha_t)`; it is called with alpha_t = 0 for the step on W.
    """

    regularized = True

    def __init__(
        self,
        V_sft: Any,
        alpha: float,
        num_classes: int,
        num_features: int,
        num_basis_vectors: int,
        num_iterations: int = 20000,
        learning_rate: float = 0.5,
        seed: int | None = None,
        threshold: float = 1e-2,
    ) -> None:
        super().__init__(
            V_sft,
            alpha,
            num_classes,
            num_features,
            num_basis_vectors,
            num_iterations,
            learning_rate,
            seed,
            threshold,
        )

    def forward(self, X: Features, alpha_t: float) -> tuple[torch.Tensor, ...]:
        """The loss of the choices -> (nll, penalty, entropy), three scalars.

        nll + penalty is minimised. entropy: the mean over users of their weights' entropy, in
        nats, which the release reports and does not minimise.
        """
        w = self.W.softmax(dim=1)  # (N, K)
        nll = torch.cat([choice_nll(X_i, self.V, w_i) for X_i, w_i in zip(X, w)]).mean()
        penalty = alpha_t * self._one_minus_cosines().mean()
        entropy = torch.special.entr(w).sum(dim=1).mean()
        return nll, penalty, entropy

    def _one_minus_cosines(self) -> torch.Tensor:
        """1 - cos(V_j, V_sft) of each column, `[K]`; 0 without a reward head."""
        if self.V_sft is None:
            return torch.zeros_like(self.V[0])
        return 1 - F.cosine_similarity(self.V, self.V_sft, dim=0)

    def _train_by_autograd(self, X: Features) -> None:
        """Adam on W, then on V, in each iteration, on the loss of a subclass."""
        adam_W = optim.Adam([self.W], lr=self.learning_rate)
        adam_V = optim.Adam([self.V], lr=self.learning_rate)
        for t in range(self.num_iterations):
            alpha_t = self.alpha * anchor_schedule(t, self.num_iterations)
            _adam_step(adam_W, self.forward(X, 0.0))
            _adam_step(adam_V, self.forward(X, alpha_t))


def anchor_schedule(t: int, num_iterations: int) -> float:
    """alpha_t / alpha of `LoRe_regularized`: 0 for 20 % of the iterations, 1 from 80 % on."""
    return min(max((t / num_iterations - 0.2) / 0.6, 0.0), 1.0)


def check_anchor(V_sft: torch.Tensor | None, alpha: float) -> None:
    """Raise InputError if there is a penalty and no reward head to measure it from."""
    if alpha and (V_sft is None or not V_sft.any()):
        raise InputError("V_sft: missing or all 0, and alpha is not 0; give the reward head [d, 1]")


def prune(w: torch.Tensor, V: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the columns whose largest user weight reaches the threshold, at least the largest.

    w: `[N, K]`; V: `[d, K]`. Returns both with the columns that are left.
    """
    largest = w.max(0).values  # (K,)
    keep = largest >= threshold
    if not keep.any():
        keep = largest == largest.max()
    return w[:, keep], V[:, keep]


class PersonalizeBatch(nn.Module):
    """Few-shot fit: the weights of new users over a basis V that is frozen.

    The loss (`forward`) is the sum over users of the user's mean negative log-likelihood; Adam
    changes the logits `W` `[N, K]`, which start from N(0, 1). Arguments and subclasses as of
    `LoRe`. This is the released fit, which the pipelines report; `lore.questions.fit_new_user` is
    another, in closed form and with an uncertainty.
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        num_basis_vectors: int,
        num_iterations: int = 500,
        learning_rate: float = 0.1,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_whole("num_basis_vectors", num_basis_vectors, 1)
        check_training(num_iterations, learning_rate, seed)
        self.num_classes = num_classes
        self.num_features = num_features
        self.num_iterations = num_iterations
        self.learning_rate = learning_rate
        start = Member(num_basis_vectors, seed=seed).few_shot_start(num_classes)
        self.W = nn.Parameter(start)  # (N, K)

    def forward(self, X: Features, V: torch.Tensor) -> torch.Tensor:
        """The negative log-likelihood of the choices, a scalar. V: `[d, K]`."""
        w = self.W.softmax(dim=1)  # (N, K)
        return sum(choice_nll(X_i, V, w_i).mean() for X_i, w_i in zip(X, w))

    def train(self, X: Any = True, V: Any = None) -> Any:
        """Learn the users' weights -> a list of N simplex vectors `[K]`.

        X: one `[m_i, d]`, or Pairs, per user; V: `[d, K]`. Raises InputError: other users, shapes.
        A truth value is nn.Module's own train(mode).
        """
        if isinstance(X, bool):
            return super().train(X)
        X = check_features(X, "features", self.num_classes, self.num_features)
        V = check_matrix(V, "V", self.num_features, self.W.shape[1]).to(self.W.device)
        if type(self).forward is PersonalizeBatch.forward:
            self._train_on_engine(X, V)
        else:
            self._train_by_autograd(_on_device(X, self.W.device), V)
        return list(self.W.detach().softmax(1))

    @torch.no_grad()
    def _train_on_engine(self, X: Features, V: torch.Tensor) -> None:
        scores = list(pair_scores(X, V))
        (W,) = fit_logits(scores, [self.W], self.num_iterations, self.learning_rate)
        self.W.copy_(W)

    def _train_by_autograd(self, X: Features, V: torch.Tensor) -> None:
        adam = optim.Adam([self.W], lr=self.learning_rate)
        for _ in range(self.num_iterations):
            _adam_step(adam, self.forward(X, V))


# ---------------------------------------------------------------------------------------------
# 3. The engine
#
# It trains every rank, penalty and seed of a sweep side by side: the members of the sweep. All of
# them read the same pairs, and Adam treats each number on its own, so the bases of all members are
# columns of one wide basis. Inside the engine a basis is kept as rows, `[C, d]`: it works on one
# column after the other, whose numbers then lie side by side.
#
# The steps of a training, `train_bases`: stack the pairs, draw the start, descend (the gradients of
# the likelihood and of the penalty, one step of Adam), evaluate the loss.
# ---------------------------------------------------------------------------------------------

# What a member draws random numbers for; each purpose has a generator of its own. The number of
# shots is added to SHOTS.
START, FEW_SHOT_START, SHOTS = 0, 1, 2

KERNEL_NUMBERS = 2**22  # from so many numbers in the pairs on, the kernel is worth compiling
KERNEL_BLOCK = 1024  # numbers of a pair that it takes at a time: four such blocks fit the L1 cache
CHECKPOINT_SECONDS = 60  # how much of a training an interruption may lose

# torch has a fused Adam on the CPU from 2.6 on.
FUSED_ADAM = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of a sweep: its rank, its penalty and its seed."""

    K: int
    alpha: float = 0.0
    seed: int | None = None  # None: torch's own generator

    def generator(self, purpose: int) -> torch.Generator | None:
        """A generator for one purpose: START, FEW_SHOT_START, or SHOTS plus a number.

        It is the member's own, so that its numbers do not depend on the other members.
        """
        if self.seed is None:
            return None
        sequence = np.random.SeedSequence([self.seed, self.K, purpose])
        state = int(sequence.generate_state(1, np.uint64)[0])
        return torch.Generator().manual_seed(state >> 1)

    def start(self, N: int, d: int, regularized: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits `[N, K]` and the basis, as rows `[K, d]`, that a training starts from."""
        generator = self.generator(START)
        draw_logits = torch.rand if regularized else torch.randn
        W = draw_logits(N, self.K, generator=generator)
        return W, torch.randn(self.K, d, generator=generator)

    def few_shot_start(self, N: int) -> torch.Tensor:
        """The logits `[N, K]` that a few-shot fit starts from."""
        return torch.randn(N, self.K, generator=self.generator(FEW_SHOT_START))


class Checkpoint(Protocol):
    """Where a training leaves its state and finds it again, as `lore.files.TrainingCheckpoint`.

    Under torchrun the first process loads and saves the state of all of them.
    """

    def load(self, identity: str) -> dict | None: ...
    def save(self, identity: str, state: dict) -> None: ...
    def clear(self) -> None: ...


class Likelihood:
    """The Bradley-Terry likelihood of all choices under every member at once, with derivatives.

    With P = X V `[M, C]` and the user weights w `[N, C]`, the loss of a member is

        sum over pairs of  -scale_i * log sigmoid(m),
        with  m = (P * w_i) summed over the member's columns / 100.

    The scale makes the sum a mean: for a pair of user i it is 1 / (the pairs of user i) in `LoRe`,
    and 1 / (all pairs) in `LoRe_regularized`.

    counts: how many pairs each user has. sizes: the K of each member.
    all_pairs: the number of pairs that the loss is the mean over; None if it is the sum over users
    of each one's mean.
    """

    def __init__(
        self,
        counts: list[int],
        sizes: list[int],
        device: torch.device,
        all_pairs: int | None = None,
    ) -> None:
        self.counts = torch.tensor(counts, device=device)  # (N,)
        self.sizes = list(sizes)  # (G,)
        self.threads = torch.get_num_threads()  # before `one_torch_thread` limits them

        users = torch.arange(len(counts), device=device)
        self.user_of_pair = users.repeat_interleave(self.counts)  # (M,)
        members = torch.arange(len(sizes), device=device)
        columns = torch.tensor(self.sizes, device=device)
        self.member_of_column = members.repeat_interleave(columns)  # (C,)
        self.columns_of_member = F.one_hot(self.member_of_column, len(sizes)).float()  # (C, G)

        if all_pairs is None:
            self.scale = 1 / self.counts  # (N,)
        else:
            self.scale = 1 / torch.full_like(self.counts, all_pairs)  # (N,)

    def weights(self, W: torch.Tensor) -> torch.Tensor:
        """The user weights, softmax over each member's logits. W: `[N, C]` -> `[N, C]`."""
        return torch.cat([logits.softmax(1) for logits in W.split(self.sizes, 1)], 1)

    def margins(self, P: torch.Tensor, w: torch.Tensor, pairs: slice = slice(None)) -> torch.Tensor:
        """m = x V w_i / 100 of each pair under each member: `[M, G]`.

        pairs: which of the pairs; P has their rows alone.
        """
        return (P * w[self.user_of_pair[pairs]]) @ self.columns_of_member / TEMPERATURE

    def loss(self, P: torch.Tensor, w: torch.Tensor, pairs: slice = slice(None)) -> torch.Tensor:
        """The negative log-likelihood under each member: `[G]`. P and pairs as of `margins`."""
        log_likelihoods = F.logsigmoid(self.margins(P, w, pairs))  # (M, G)
        scale = self.scale[self.user_of_pair[pairs], None]  # (M, 1)
        return -(scale * log_likelihoods).sum(0)

    def residuals(self, P: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """The derivative of the loss with respect to x V w_i of each pair, `[M, C]`.

        There is one for each member; all columns of a member repeat it.
        """
        p_rejected = torch.sigmoid(-self.margins(P, w))  # (M, G): 1 - P(chosen beats rejected)
        scale = self.scale[self.user_of_pair, None]  # (M, 1)
        return (-scale * p_rejected / TEMPERATURE)[:, self.member_of_column]

    def grad_w(self, P: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        """The derivative with respect to the user weights: `[N, C]`."""
        return torch.segment_reduce(residuals * P, "sum", lengths=self.counts, axis=0)

    def grad_logits(self, w: torch.Tensor, grad_w: torch.Tensor) -> torch.Tensor:
        """The derivative with respect to the logits, through the softmax: `[N, C]`."""
        mean = (w * grad_w) @ self.columns_of_member  # (N, G)
        return w * (grad_w - mean[:, self.member_of_column])

    def plain(
        self,
        X: torch.Tensor,
        w: torch.Tensor,
        V: torch.Tensor,
        need_w: bool = True,
        need_V: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The derivatives with respect to w `[N, C]` and V `[C, d]`, on any device.

        X: `[M, d]`; V: `[C, d]`, a basis as rows. need_w, need_V: which derivatives are wanted.
        These are two matrix products, which is what a GPU is best at.
        """
        P = X @ V.T  # (M, C)
        residuals = self.residuals(P, w)  # (M, C)
        grad_w = self.grad_w(P, residuals) if need_w else None  # (N, C)
        grad_V = (residuals * w[self.user_of_pair]).T @ X if need_V else None  # (C, d)
        return grad_w, grad_V

    def kernel(
        self,
        X: torch.Tensor,
        w: torch.Tensor,
        V: torch.Tensor,
        need_w: bool = True,
        need_V: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`plain` for many pairs on a CPU, in one reading of X: see `_gradients`.

        A derivative that is not wanted comes back as zeros.
        """
        threads = min(self.threads, numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(threads)
        first_pair = np.concatenate([[0], np.cumsum(self.counts.numpy())])  # (N + 1,)
        first_column = np.concatenate([[0], np.cumsum(self.sizes)])  # (G + 1,)
        grad_w = torch.zeros(w.shape)  # (N, C)
        grad_V = torch.zeros(threads, *V.shape)  # (threads, C, d)
        _gradients(
            X.numpy(),
            first_pair,
            self.scale.numpy(),
            w.numpy(),
            V.numpy(),
            first_column,
            grad_w.numpy(),
            grad_V.numpy(),
            need_w,
            need_V,
        )
        return grad_w, grad_V.sum(0)


def _numba_can_cache() -> bool:
    """Whether numba finds a folder for the machine code of this file's functions."""
    try:
        numba.njit(cache=True)(_numba_can_cache)  # looks for the folder; compiles nothing
    except RuntimeError:
        return False
    return True


CACHE_KERNEL = _numba_can_cache()

# float32 constants: a Python number would make the kernel compute in float64
_ZERO, _ONE, _TEMPERATURE = np.float32([0, 1, TEMPERATURE])


@numba.njit
def _four_pairs(X, p, last, start, end):
    """The numbers start to end of the pairs p to p + 3; behind the last pair, it is repeated."""
    return (
        X[p, start:end],
        X[min(p + 1, last), start:end],
        X[min(p + 2, last), start:end],
        X[min(p + 3, last), start:end],
    )


@numba.njit(
    cache=CACHE_KERNEL, parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp", "afn"}
)
def _gradients(X, first_pair, scale, w, V, first_column, grad_w, grad_V, need_w, need_V):
    """The kernel: fills grad_w `[N, C]`, and grad_V `[threads, C, d]`, to be summed over threads.

    It reads X `[M, d]` from memory once. The margin x V w_i / 100 is computed as x reward_g. The
    pairs of user i are thus multiplied by one reward vector per member, and not by K columns:

        reward_g = V w_i / 100.

    The residual of a pair is the derivative of the loss with respect to x V w_i, as in
    `Likelihood.residuals`. From the sum over the user's pairs

        total_g = sum of residual * x

    come both derivatives: V total_g with respect to w_i, and w_i total_g^T with respect to V.

    User i has the rows first_pair[i] up to first_pair[i + 1] of X, member g the columns
    first_column[g] up to first_column[g + 1] of w and V. Thread t of T takes the users
    t, t + T, t + 2 T, ..

    Four pairs are taken at a time: each number of a reward vector is then loaded once for four
    products. They are taken in blocks of numbers, which stay in the L1 cache while all members
    read them; one member alone needs no blocks.
    """
    threads = len(grad_V)
    users = len(scale)
    G = len(first_column) - 1
    d = X.shape[1]
    block = KERNEL_BLOCK if G > 1 else d
    for thread in numba.prange(threads):
        reward = np.empty((G, d), np.float32)
        total = np.empty((G, d), np.float32)
        margin = np.empty((G, 4), np.float32)
        residual = np.empty((G, 4), np.float32)
        for i in range(thread, users, threads):
            last = first_pair[i + 1] - 1

            # Each member's reward vector of this user
            for g in range(G):
                reward[g] = _ZERO
                total[g] = _ZERO
                for c in range(first_column[g], first_column[g + 1]):
                    for j in range(d):
                        reward[g, j] += w[i, c] / _TEMPERATURE * V[c, j]

            for p in range(first_pair[i], last + 1, 4):
                # The margins of four pairs under each member
                margin[:] = _ZERO
                for j in range(0, d, block):
                    x0, x1, x2, x3 = _four_pairs(X, p, last, j, j + block)
                    for g in range(G):
                        v = reward[g, j : j + block]
                        m0, m1, m2, m3 = margin[g, 0], margin[g, 1], margin[g, 2], margin[g, 3]
                        for k in range(len(v)):
                            m0 += x0[k] * v[k]
                            m1 += x1[k] * v[k]
                            m2 += x2[k] * v[k]
                            m3 += x3[k] * v[k]
                        margin[g, 0], margin[g, 1], margin[g, 2], margin[g, 3] = m0, m1, m2, m3

                # Their residuals: 0 for the copies of the last pair that make up four
                for q in range(4):
                    pair_scale = scale[i] if p + q <= last else _ZERO
                    for g in range(G):
                        p_rejected = _ONE / (_ONE + math.exp(margin[g, q]))
                        residual[g, q] = -pair_scale * p_rejected / _TEMPERATURE

                # The sum of residual * x
                for j in range(0, d, block):
                    x0, x1, x2, x3 = _four_pairs(X, p, last, j, j + block)
                    for g in range(G):
                        s = total[g, j : j + block]
                        r0, r1 = residual[g, 0], residual[g, 1]
                        r2, r3 = residual[g, 2], residual[g, 3]
                        for k in range(len(s)):
                            s[k] += r0 * x0[k] + r1 * x1[k] + r2 * x2[k] + r3 * x3[k]

            # Both derivatives
            for g in range(G):
                for c in range(first_column[g], first_column[g + 1]):
                    if need_V:
                        for j in range(d):
                            grad_V[thread, c, j] += w[i, c] * total[g, j]
                    if need_w:
                        product = _ZERO
                        for j in range(d):
                            product += V[c, j] * total[g, j]
                        grad_w[i, c] = product


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Limit torch to one thread: its idle threads spin on the cores that the kernel needs, and
    small products are faster without them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# (w, need_w, need_V) -> the derivatives of the likelihood with respect to w and V
Gradients = Callable[[torch.Tensor, bool, bool], tuple[torch.Tensor | None, torch.Tensor | None]]

# (V `[C, d]`, the iteration t) -> the penalty on each column, `[C]`
Penalty = Callable[[torch.Tensor, int], torch.Tensor]


@one_torch_thread()
def _descend(
    likelihood: Likelihood,
    W: torch.Tensor,
    V: torch.Tensor | None,
    gradients: Gradients,
    num_iterations: int,
    learning_rate: float,
    penalty: Penalty | None = None,
    alternating: bool = False,
    checkpoint: Checkpoint | None = None,
    identity: str = "",
) -> None:
    """Adam on the logits W `[N, C]` and, if it is given, on the basis V `[C, d]`, both in place.

    Both must be contiguous, for torch's fused Adam. penalty(V, t): `[C]`, added to the loss.
    alternating: the step on V in an iteration uses the W that its step on W has made.
    checkpoint: the state is saved there every CHECKPOINT_SECONDS, and found there again; identity
    says which training it belongs to.
    """
    variables = [W] if V is None else [W, V]
    adams = [
        optim.Adam([variable], lr=learning_rate, fused=FUSED_ADAM or None) for variable in variables
    ]
    first = _resume(checkpoint, identity, variables, adams)
    saved = time.monotonic()
    label = "few-shot" if V is None else "training"
    bar = progress_bar(label, num_iterations, initial=first, unit="it", leave=False)
    for t in range(first, num_iterations):
        w = likelihood.weights(W)
        grad_w, grad_V = gradients(w, True, V is not None and not alternating)
        W.grad = likelihood.grad_logits(w, grad_w)
        adams[0].step()
        if V is not None:
            if alternating:
                _, grad_V = gradients(likelihood.weights(W), False, True)
            if process_count() > 1:
                dist.all_reduce(grad_V)  # each process has that of its own users
            if penalty is not None:
                grad_V = grad_V + _penalty_gradient(penalty, V, t)
            V.grad = grad_V
            adams[1].step()
        is_last = t + 1 == num_iterations
        if checkpoint and (is_last or _is_time(saved + CHECKPOINT_SECONDS)):
            _save_state(checkpoint, identity, t + 1, variables, adams)
            saved = time.monotonic()
        bar.update()
    bar.close()


def _penalty_gradient(penalty: Penalty, V: torch.Tensor, t: int) -> torch.Tensor:
    """The derivative of the sum of penalty(V, t) with respect to V: `[C, d]`."""
    return torch.func.grad(lambda V: penalty(V, t).sum())(V)


def _is_time(moment: float) -> bool:
    """Whether time.monotonic() is past a moment, on the clock of the first process.

    All processes must save in the same iteration, and their clocks differ.
    """
    is_past = torch.tensor(time.monotonic() > moment)
    if process_count() > 1:
        dist.broadcast(is_past, 0)
    return bool(is_past)


def _save_state(
    checkpoint: Checkpoint,
    identity: str,
    iterations: int,
    variables: list[torch.Tensor],
    adams: list[optim.Adam],
) -> None:
    """Save the state of a training: the first process does it, for all of them."""
    own = {
        "variables": [variable.cpu() for variable in variables],
        "adams": [_state_on_cpu(adam) for adam in adams],
    }
    states = to_first_process(own)
    if process_rank() == 0:
        checkpoint.save(identity, {"iterations": iterations, "processes": states})


def _state_on_cpu(adam: optim.Adam) -> dict:
    """The state of an Adam that has made a step on its only variable."""
    state = adam.state_dict()
    moments = {name: tensor.cpu() for name, tensor in state["state"][0].items()}
    return {**state, "state": {0: moments}}


def _resume(
    checkpoint: Checkpoint | None,
    identity: str,
    variables: list[torch.Tensor],
    adams: list[optim.Adam],
) -> int:
    """Take over the state of an interrupted training -> how many iterations it had done."""
    if checkpoint is None:
        return 0
    states = _load_states(checkpoint, identity) if process_rank() == 0 else None
    state = from_first_process(states)
    if state is None:
        return 0
    for variable, adam, saved_variable, saved_adam in zip(
        variables, adams, state["variables"], state["adams"]
    ):
        variable.copy_(saved_variable)
        adam.load_state_dict(saved_adam)
    print(f"resuming the training after {state['iterations']:,} iterations")
    return state["iterations"]


def _load_states(checkpoint: Checkpoint, identity: str) -> list[dict | None]:
    """The saved state of each process and the iterations behind it; None if there is none."""
    saved = checkpoint.load(identity)
    if saved is None:
        return [None] * process_count()
    return [{**state, "iterations": saved["iterations"]} for state in saved["processes"]]


class TrainedBasis(NamedTuple):
    """What the training of one member gives."""

    weights: torch.Tensor  # (N, K), softmax of the logits
    V: torch.Tensor  # (d, K)
    loss: float  # without the penalty
    logits: torch.Tensor  # (N, K)


@torch.no_grad()
def train_bases(
    features: Features,
    members: list[Member],
    V_sft: torch.Tensor | None,
    num_iterations: int,
    learning_rate: float,
    regularized: bool = False,
    device: torch.device | None = None,
    checkpoint: Checkpoint | None = None,
    starts: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> list[TrainedBasis]:
    """Learn basis and user weights of every member of a sweep, side by side.

    features: one float32 `[m_i, d]` (or Pairs) per user. V_sft: `[d, 1]`, needed if an alpha is
    not 0. regularized: the loss and steps of `LoRe_regularized` in place of `LoRe`'s.
    starts: the logits `[N, K]` and basis `[K, d]` that each member starts from; None draws them.
    checkpoint: where the state is kept; the caller clears it.

    Under torchrun each process holds a part of the users; all return the whole.
    Raises InputError: fewer users than processes, a training that diverges.
    """
    N = len(features)
    processes = process_count()
    if N < processes:
        raise InputError(f"{N} users for {processes} processes; start at most one process per user")
    check_anchor(V_sft, max(member.alpha for member in members))
    device = torch.device(device or getattr(features[0], "device", "cpu"))

    own_features = features[own_users()]
    X = _stack(own_features, device)  # (M, d)
    sizes = [member.K for member in members]
    all_pairs = sum(map(len, features)) if regularized else None
    likelihood = Likelihood([len(X_i) for X_i in own_features], sizes, device, all_pairs)
    if starts is None:
        d = X.shape[1]
        starts = [member.start(N, d, regularized) for member in members]
    W, V = _common_start(starts, device)  # (N, C), (C, d)
    W = W[own_users()].contiguous()

    on_kernel = device.type == "cpu" and X.numel() >= KERNEL_NUMBERS
    derivatives = likelihood.kernel if on_kernel else likelihood.plain
    identity = ""
    if checkpoint:
        identity = _training_identity(
            features, X, members, V_sft, num_iterations, learning_rate, regularized
        )
    _descend(
        likelihood,
        W,
        V,
        lambda w, need_w, need_V: derivatives(X, w, V, need_w, need_V),
        num_iterations,
        learning_rate,
        _penalty(members, V_sft, num_iterations, regularized, likelihood),
        alternating=regularized,
        checkpoint=checkpoint,
        identity=identity,
    )
    if not V.isfinite().all():
        if checkpoint:
            checkpoint.clear()
        raise InputError(
            "the training has diverged, its basis is not finite; give a smaller alpha, or smaller "
            "pairs"
        )

    loss = _final_loss(likelihood, X, likelihood.weights(W), V)  # (G,)
    logits = torch.zeros(N, sum(sizes), device=device)
    logits[own_users()] = W
    if processes > 1:
        dist.all_reduce(logits)  # each process has zeros for the users of the others
        dist.all_reduce(loss)
    return [
        TrainedBasis(logits_k.softmax(1), V_k.T, loss_k, logits_k)
        for logits_k, V_k, loss_k in zip(logits.split(sizes, 1), V.split(sizes), loss.tolist())
    ]


def _common_start(
    starts: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of all members' logits `[N, C]` and bases `[C, d]`, the same in all processes."""
    W = torch.cat([W for W, _ in starts], 1).to(device, copy=True)  # (N, C)
    V = torch.cat([V for _, V in starts]).to(device, copy=True).contiguous()  # (C, d)
    if process_count() > 1:  # without a seed, each process has drawn numbers of its own
        dist.broadcast(W, 0)
        dist.broadcast(V, 0)
    return W, V


def _final_loss(
    likelihood: Likelihood, X: torch.Tensor, w: torch.Tensor, V: torch.Tensor
) -> torch.Tensor:
    """The loss of each member, `[G]`, some pairs at a time, as P of all of them would be large."""
    step = max(1, BATCH_NUMBERS // X.shape[1])
    slices = [slice(first, first + step) for first in range(0, len(X), step)]
    return sum(likelihood.loss(X[pairs] @ V.T, w, pairs) for pairs in slices)


def _stack(features: Features, device: torch.device) -> torch.Tensor:
    """The pairs of all users, `[M, d]`, without a second copy of them on the way."""
    d = features[0].shape[1]
    X = torch.empty(sum(map(len, features)), d, device=device)
    first = 0
    for table, users in itertools.groupby(features, table_number):
        if table is not None:
            users = _joined(users, 4 * d)  # a quarter of a batch, as `dense` makes copies
        for X_i in users:
            rows = X[first : first + len(X_i)]
            rows.copy_(X_i.dense() if isinstance(X_i, Pairs) else X_i)
            first += len(rows)
    return X


def _joined(users: Iterable[Pairs], columns: int) -> Iterator[Pairs]:
    """The Pairs of many users as fewer and longer ones, because torch is slow for small ones."""
    for batch in _user_batches(users, columns):
        chosen = torch.cat([X.chosen for X in batch])
        rejected = torch.cat([X.rejected for X in batch])
        yield Pairs(batch[0].embeddings, chosen, rejected)


def _penalty(
    members: list[Member],
    V_sft: torch.Tensor | None,
    num_iterations: int,
    regularized: bool,
    likelihood: Likelihood,
) -> Penalty | None:
    """The penalty on each column, as a function; None if no member has one."""
    if not any(member.alpha for member in members):
        return None
    reference = V_sft.to(likelihood.scale.device, torch.float32).reshape(1, -1)  # (1, d)
    # LoRe_regularized takes the mean over a member's columns, LoRe the sum.
    alphas = [member.alpha / (member.K if regularized else 1) for member in members]
    alpha = torch.tensor(alphas, device=reference.device)[likelihood.member_of_column]  # (C,)

    def squared_distance(V: torch.Tensor, t: int) -> torch.Tensor:
        return alpha * ((V - reference) ** 2).sum(1)

    def scheduled_cosine(V: torch.Tensor, t: int) -> torch.Tensor:
        share = anchor_schedule(t, num_iterations)
        return share * alpha * (1 - F.cosine_similarity(V, reference, dim=1))

    return scheduled_cosine if regularized else squared_distance


def _training_identity(
    features: Features,
    X: torch.Tensor,
    members: list[Member],
    V_sft: torch.Tensor | None,
    num_iterations: int,
    learning_rate: float,
    regularized: bool,
) -> str:
    """A digest of all that a training depends on, so that a saved state continues no other one.

    X: the pairs of this process's users. The digest is the same in all processes.
    """
    parts = (
        torch.__version__,
        X.device.type,
        [len(X_i) for X_i in features],
        members,
        num_iterations,
        learning_rate,
        regularized,
        None if V_sft is None else V_sft.tolist(),
        from_each_process(_digest(X)),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _digest(X: torch.Tensor) -> str:
    """A digest of the numbers of a tensor."""
    return hashlib.sha256(X.cpu().numpy()).hexdigest()


@torch.no_grad()
def fit_logits(
    scores: list[torch.Tensor],
    starts: Sequence[torch.Tensor],
    num_iterations: int,
    learning_rate: float,
) -> list[torch.Tensor]:
    """Few-shot fit of users over several frozen bases, side by side -> logits `[N, K]` of each.

    With V frozen, X V is a constant: the fit works on K numbers a pair, not on d.

    scores: X_i V `[m_i, C]` of each user, the columns of all bases side by side.
    starts: the logits `[N, K]` to start from, for each basis.
    """
    P = torch.cat(scores)  # (M, C)
    sizes = [logits.shape[1] for logits in starts]
    likelihood = Likelihood([len(S) for S in scores], sizes, P.device)
    W = torch.cat(list(starts), 1).to(P.device, copy=True)  # (N, C)

    def gradients(w: torch.Tensor, need_w: bool, need_V: bool) -> tuple[torch.Tensor, None]:
        return likelihood.grad_w(P, likelihood.residuals(P, w)), None

    _descend(likelihood, W, None, gradients, num_iterations, learning_rate)
    return list(W.split(sizes, 1))


def fit_weights(
    scores: list[torch.Tensor],
    starts: Sequence[torch.Tensor],
    num_iterations: int,
    learning_rate: float,
) -> list[torch.Tensor]:
    """The user weights of `fit_logits`: the softmax of the logits, `[N, K]` for each basis."""
    fitted = fit_logits(scores, starts, num_iterations, learning_rate)
    return [logits.softmax(1) for logits in fitted]


# ---------------------------------------------------------------------------------------------
# 4. Scores and evaluation
#
# The scores of a user are X V: a row per pair, a column per column of the basis. Few-shot fits and
# accuracies start from them. Below: the scores of many users, then the released functions that
# judge a model, then the accuracies of many users under many models.
# ---------------------------------------------------------------------------------------------

BATCH_NUMBERS = 2**22  # how many numbers a batch of pairs has: 16 MB in float32


def pair_scores(
    features: Iterable[torch.Tensor | Pairs], V: torch.Tensor
) -> Iterator[torch.Tensor]:
    """The scores X_i V `[m_i, C]` of each user in turn.

    features: `[m_i, d]` or Pairs, one per user. V: `[d, C]`.
    """
    for scores, counts in score_batches(features, V):
        yield from scores.split(counts.tolist())


def score_batches(
    features: Iterable[torch.Tensor | Pairs], V: torch.Tensor, result_columns: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The scores of many users at once: yields (`[rows, C]`, the number of rows of each user).

    One product over many users replaces a small one per user: for small ones, torch's threads take
    longer to start than to multiply. The rows of a table that users share are multiplied once, and
    rows that nobody names are not read.

    features: `[m_i, d]` or Pairs, one per user. V: `[d, C]`.
    result_columns: how many numbers the caller computes from a row of scores. If they are more
    than C, the batches are smaller, so that the caller's results need no more memory.
    """
    columns = max(result_columns, V.shape[1])
    for table, users in itertools.groupby(features, table_number):
        if table is None:
            yield from _matrix_scores(users, V, columns)
        else:
            yield from _table_scores(list(users), V, columns)


def _matrix_scores(
    users: Iterable[torch.Tensor], V: torch.Tensor, columns: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`score_batches` of matrices. columns: how many numbers come of a pair."""
    d = len(V)
    for batch in _user_batches(users, max(columns, d)):
        X = batch[0] if len(batch) == 1 else torch.cat(batch)  # (rows, d)
        yield X.to(V.device) @ V, _pairs_per_user(batch, V.device)


def _table_scores(
    users: list[Pairs], V: torch.Tensor, columns: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`score_batches` of Pairs of one table. columns: how many numbers come of a pair."""
    table = users[0].embeddings
    rows = named_rows(users)

    # Multiply each named row once. The result is allocated before the slices are read: small
    # results between them would fragment the memory.
    row_scores = torch.empty(len(rows), V.shape[1], device=V.device)
    first = 0
    for part in slices_of_rows(table, rows):
        row_scores[first : first + len(part)] = part.to(V.device, torch.float32) @ V
        first += len(part)

    # Subtract the scores of the two rows of each pair.
    position = torch.empty(len(table), dtype=torch.int64)  # row of the table -> row of row_scores
    position[rows] = torch.arange(len(rows))
    for batch in _user_batches(users, columns):
        chosen = position[torch.cat([X.chosen for X in batch]).cpu()].to(V.device)
        rejected = position[torch.cat([X.rejected for X in batch]).cpu()].to(V.device)
        yield row_scores[chosen] - row_scores[rejected], _pairs_per_user(batch, V.device)


def table_number(X: torch.Tensor | Pairs) -> int | None:
    """A number that all Pairs of one table have in common; None for a matrix."""
    return id(X.embeddings) if isinstance(X, Pairs) else None


def named_rows(users: list[Pairs]) -> torch.Tensor:
    """The rows of their table that these users' pairs name: int64, ascending, each once."""
    named = torch.zeros(len(users[0].embeddings), dtype=torch.bool)
    named[torch.cat([X.chosen for X in users]).cpu()] = True
    named[torch.cat([X.rejected for X in users]).cpu()] = True
    return named.nonzero()[:, 0]


def slices_of_rows(table: torch.Tensor, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some rows of a table, a batch at a time, so that no copy of the table is made.

    rows: int64, ascending, each once.
    """
    step = max(1, BATCH_NUMBERS // table.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        first = int(part[0])
        last = int(part[-1])
        none_is_left_out = last - first + 1 == len(part)
        if none_is_left_out:
            yield table[first : last + 1]  # a view
        else:
            yield table[part]  # a copy


def _user_batches(
    users: Iterable[torch.Tensor | Pairs], columns: int
) -> Iterator[list[torch.Tensor | Pairs]]:
    """Batches of consecutive users: of one user, or with at most BATCH_NUMBERS numbers.

    columns: how many numbers a pair counts for.
    """
    batch: list[torch.Tensor | Pairs] = []
    numbers = 0
    for X in users:
        size = len(X) * columns
        if batch and numbers + size > BATCH_NUMBERS:
            yield batch
            batch = []
            numbers = 0
        batch.append(X)
        numbers += size
    if batch:
        yield batch


def _pairs_per_user(users: list[torch.Tensor | Pairs], device: torch.device) -> torch.Tensor:
    """How many pairs each user has, `[users]`."""
    return torch.tensor([len(X) for X in users], device=device)


def evaluate_model(X: Any, V: Any, w: Any) -> float:
    """The share of pairs with a positive margin x V w.

    X: `[m, d]` or Pairs; V: `[d, K]`; w: `[K]`; tensors or arrays.
    Raises InputError: no pairs, other shapes, NaN.
    """
    V = check_matrix(V, "V")
    X = check_matrix(X, "X", None, len(V))
    w = w.detach() if isinstance(w, torch.Tensor) else np.asarray(w)
    w = check_matrix(w.reshape(-1, 1), "w", V.shape[1], 1).to(V.device)
    return float(accuracies_per_user([X], [V], [w.T])[0, 0])


def eval_multiple(W_list: Iterable, V_list: Iterable, test_features: Iterable) -> list[float]:
    """`evaluate_model` for every user; prints the mean and the standard deviation over users.

    W_list: a w `[K]` per user; V_list: a V `[d, K]` per user; test_features: `[m_i, d]` per user.
    Raises InputError: not equally many of each, and as `evaluate_model`.
    """
    W_list, V_list, test_features = list(W_list), list(V_list), list(test_features)
    if not len(W_list) == len(V_list) == len(test_features) > 0:
        raise InputError(
            f"{len(W_list)} weights, {len(V_list)} bases, {len(test_features)} users; "
            "give equally many"
        )
    accuracies = [evaluate_model(X, V, w) for w, V, X in zip(W_list, V_list, test_features)]
    print_accuracy(accuracies)
    return accuracies


def print_accuracy(accuracies: Iterable[float]) -> None:
    """The two lines that the release prints."""
    print(f"Average accuracy: {np.mean(accuracies):.4f}")
    print(f"Standard deviation of accuracy: {np.std(accuracies):.4f}")


def share_right(margins: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The share of positive margins of each user: float64 `[users, columns]`.

    margins: `[rows, columns]`, the rows of one user after the other; counts: `[users]`, how many
    rows each has.
    """
    right = (margins > 0).double()
    return torch.segment_reduce(right, "mean", lengths=counts, axis=0)


@torch.no_grad()
def accuracies_per_user(
    features: Iterable[torch.Tensor | Pairs],
    bases: list[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> np.ndarray:
    """The accuracy of each of N users under each of G models: float64 `[G, N]`.

    features: `[m_i, d]` or Pairs, one per user. bases: G tensors `[d, K]`; weights: G `[N, K]`.
    """
    sizes = [V.shape[1] for V in bases]
    V = torch.cat(bases, 1)  # (d, C)
    w = torch.cat(weights, 1)  # (N, C)
    shares = []
    first = 0
    for scores, counts in score_batches(features, V):  # (rows, C), (users,)
        users = slice(first, first + len(counts))
        w_of_rows = w[users].repeat_interleave(counts, 0)  # (rows, C)
        products = (scores * w_of_rows).split(sizes, 1)  # G times (rows, K)
        margins = torch.stack([product.sum(1) for product in products], 1)  # (rows, G)
        shares.append(share_right(margins, counts))  # (users, G)
        first += len(counts)
    return torch.cat(shares).T.cpu().numpy()


def shared_accuracies(
    features: Features, bases: list[torch.Tensor], weights: list[torch.Tensor]
) -> np.ndarray:
    """`accuracies_per_user`, but each process of torchrun judges its own users only."""

    def judge(own_features: Features, *own_weights: torch.Tensor) -> np.ndarray:
        return accuracies_per_user(own_features, bases, own_weights).T  # (users, G)

    return shared_out(judge, features, *weights).T


@torch.no_grad()
def accuracies_under_each(
    features: Iterable[torch.Tensor | Pairs], V: torch.Tensor, weights: torch.Tensor
) -> np.ndarray:
    """The accuracy of each of N users under each of J weight vectors: float64 `[N, J]`.

    features: `[m_i, d]` or Pairs, one per user. V: `[d, K]`; weights: `[J, K]`.
    """
    shares = [
        share_right(scores @ weights.T, counts)
        for scores, counts in score_batches(features, V, result_columns=len(weights))
    ]
    return torch.cat(shares).cpu().numpy()


# ---------------------------------------------------------------------------------------------
# 5. Pipelines
#
# `sweep` trains the members of a sweep on the seen users, fits the unseen users, and evaluates all.
# `run` and `run_regularized` print it and return it as released. `run_few_shot_vary_shots` fits
# the unseen users from several numbers of pairs, each several times.
# ---------------------------------------------------------------------------------------------

SETTINGS = (
    "Train Performance",  # seen users, the pairs that were trained on
    "Seen User Unseen Prompts",
    "Few Shot Train Performance",  # unseen users, the pairs that their weights were fitted from
    "Unseen User Unseen Prompts",
)
TRAIN, SEEN_TEST, FEW_SHOT_TRAIN, UNSEEN_TEST = SETTINGS
UNSEEN_SETTINGS = (FEW_SHOT_TRAIN, UNSEEN_TEST)

LEARNING_RATE = 0.5  # of the training, `LoRe` and `LoRe_regularized`, as released
FEW_SHOT_LEARNING_RATE = 0.1  # of the few-shot fit after `LoRe`
FEW_SHOT_LEARNING_RATE_REGULARIZED = 0.5  # of the few-shot fit after `LoRe_regularized`
FEW_SHOT_ITERATIONS = 500


@dataclasses.dataclass
class Fit:
    """What a sweep finds at one rank, one alpha and one seed."""

    K: int
    alpha: float
    seed: int | None
    V: torch.Tensor  # (d, columns), the basis
    W: torch.Tensor  # (N, columns), the weights of the seen users
    W_unseen: torch.Tensor  # (N_unseen, columns), the weights of the unseen users
    loss: float  # of the training, without the penalty; NaN for the reference, which is not trained
    accuracies: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of each user

    @property
    def model(self) -> tuple[int, float]:
        """What the seeds of one model share: (K, alpha)."""
        return self.K, self.alpha


def fits_per_model(fits: list[Fit]) -> dict[tuple[int, float], list[Fit]]:
    """The fits of each model, one per seed: {(K, alpha): fits}, in the order of the sweep."""
    models: dict[tuple[int, float], list[Fit]] = {}
    for fit in fits:
        models.setdefault(fit.model, []).append(fit)
    return models


def accuracy_per_user(fits: list[Fit], setting: str) -> np.ndarray:
    """Each user's accuracy in a setting, the mean over a model's seeds: float64 `[users]`."""
    return np.mean([fit.accuracies[setting] for fit in fits], 0)


def sweep_members(
    K_list: Iterable, alpha_list: Iterable, seeds: Iterable[int | None]
) -> list[Member]:
    """The members of a sweep: alpha is the outer loop, then the rank, then the seed."""
    # A whole alpha stays whole: released file names and lines show it as it was given.
    alphas = [alpha if isinstance(alpha, int) else float(alpha) for alpha in alpha_list]
    return [
        Member(int(K), alpha, None if seed is None else int(seed))
        for alpha in alphas
        for K in K_list
        for seed in seeds
    ]


def _check_users(named: dict[str, tuple[Any, Any]], d: int) -> list[Features]:
    """Each of {argument name: (features, number of users)} checked, in their order."""
    return [
        check_own_features(features, name, users, d) for name, (features, users) in named.items()
    ]


def sweep(
    K_list: Any,
    alpha_list: Any,
    V_final: Any,
    train_features: Any,
    test_features_sparse: Any,
    train_features_unseen: Any,
    test_features_sparse_unseen: Any,
    N: int,
    N_unseen: int,
    device: Any,
    seed: Any = None,
    num_iterations: int = 1000,
    checkpoint: Checkpoint | None = None,
    regularized: bool = False,
    threshold: float = 0.0,
) -> list[Fit]:
    """Learn LoRe on the seen users at several ranks and penalties, fit the unseen, evaluate all.

    K_list: ranks; 0 is the reference (V_final, every weight 1), 1 one Bradley-Terry model for all.
    alpha_list: penalties, see `LoRe`. V_final: the reward head `[d, 1]`; it may be None if no rank
    is 0 and no alpha above 0. The four features: one float32 `[m_i, d]` (or Pairs) per user;
    N and N_unseen: how many users. seed: a whole number, a list of several that are trained side
    by side, or None for torch's own generator. regularized: `LoRe_regularized` in place of `LoRe`.
    threshold: columns whose largest weight among the seen users is below it are left out.
    checkpoint: where the state of the training is kept; the caller clears it.

    Under torchrun each process reads and computes only the pairs of its own users, every P-th of
    each list; all return the whole. So a table may be larger than what a process can hold, if it
    is mapped from a file.

    Returns a Fit for each alpha, rank and seed. Raises InputError for arguments without a meaning.
    """
    seeds = seed if isinstance(seed, (list, tuple, range, np.ndarray)) else [seed]
    given_seeds = [0] if seed is None else seeds  # None has nothing to check
    check_sweep(K_list, alpha_list, given_seeds, num_iterations, threshold)
    device = check_device(device)
    members = sweep_members(K_list, alpha_list, seeds)
    d = None
    if V_final is not None or any(member.K == 0 or member.alpha for member in members):
        V_final = check_head(V_final, "V_final").to(device)
        d = len(V_final)
    train, test, train_unseen, test_unseen = _check_users(
        {
            "train_features": (train_features, N),
            "test_features_sparse": (test_features_sparse, N),
            "train_features_unseen": (train_features_unseen, N_unseen),
            "test_features_sparse_unseen": (test_features_sparse_unseen, N_unseen),
        },
        d,
    )

    fits = _train_seen(
        members,
        train,
        N_unseen,
        V_final,
        num_iterations=num_iterations,
        regularized=regularized,
        threshold=threshold,
        device=device,
        checkpoint=checkpoint,
    )
    few_shot_rate = FEW_SHOT_LEARNING_RATE_REGULARIZED if regularized else FEW_SHOT_LEARNING_RATE
    _fit_unseen(fits, train_unseen, few_shot_rate)

    W = [fit.W for fit in fits]
    W_unseen = [fit.W_unseen for fit in fits]
    _evaluate(fits, TRAIN, train, W)
    _evaluate(fits, SEEN_TEST, test, W)
    _evaluate(fits, FEW_SHOT_TRAIN, train_unseen, W_unseen)
    _evaluate(fits, UNSEEN_TEST, test_unseen, W_unseen)
    return fits


def _train_seen(
    members: list[Member],
    train: Features,
    N_unseen: int,
    V_final: torch.Tensor | None,
    num_iterations: int,
    regularized: bool,
    threshold: float,
    device: torch.device,
    checkpoint: Checkpoint | None,
) -> list[Fit]:
    """A Fit of each member with the weights of the seen users; all unseen users weigh 1 so far.

    The reference is not trained: its basis is V_final, and its weights are 1.
    """
    to_train = [member for member in members if member.K > 0]
    trained = {}
    if to_train:
        bases = train_bases(
            train, to_train, V_final, num_iterations, LEARNING_RATE, regularized, device, checkpoint
        )
        trained = dict(zip(to_train, bases))

    fits = []
    for member in members:
        if member in trained:
            w, V, loss, _ = trained[member]
            w, V = prune(w, V, threshold)
        else:
            w = torch.ones(len(train), 1, device=device)
            V = V_final
            loss = math.nan
        W_unseen = torch.ones(N_unseen, 1, device=device)
        fits.append(Fit(member.K, member.alpha, member.seed, V, w, W_unseen, loss))
    return fits


def _fit_unseen(fits: list[Fit], train_unseen: Features, learning_rate: float) -> None:
    """Set the few-shot weights of the unseen users in every fit that has several columns."""
    personal = [fit for fit in fits if fit.V.shape[1] > 1]
    if not personal:
        return
    V = torch.cat([fit.V for fit in personal], 1)  # (d, C)
    sizes = [fit.V.shape[1] for fit in personal]  # the K that is left, without pruned columns
    members = [Member(K, fit.alpha, fit.seed) for K, fit in zip(sizes, personal)]
    starts = [member.few_shot_start(len(train_unseen)) for member in members]

    def fit_users(features: Features, *starts: torch.Tensor) -> np.ndarray:
        scores = list(pair_scores(features, V))
        weights = fit_weights(scores, starts, FEW_SHOT_ITERATIONS, learning_rate)
        return torch.cat(weights, 1).cpu().numpy()  # (users, C)

    weights = torch.from_numpy(shared_out(fit_users, train_unseen, *starts)).to(V.device)
    for fit, w in zip(personal, weights.split(sizes, 1)):
        fit.W_unseen = w


def _evaluate(
    fits: list[Fit], setting: str, features: Features, weights: list[torch.Tensor]
) -> None:
    """Set the accuracies of the users in one setting in every fit. weights: one `[N, K]` a fit."""
    accuracies = shared_accuracies(features, [fit.V for fit in fits], weights)  # (fits, N)
    for fit, per_user in zip(fits, accuracies):
        fit.accuracies[setting] = per_user


class Accuracies(tuple):
    """The eight arrays that the released `run` returns, with the models behind them as `.fits`."""

    fits: list[Fit]

    @classmethod
    def of(cls, fits: list[Fit]) -> "Accuracies":
        """The eight arrays: means over users in each of SETTINGS, then quarters of deviations."""
        models = fits_per_model(fits).values()
        means = []
        quarters = []  # of the standard deviation over users: the band of the released plots
        for setting in SETTINGS:
            accuracies = [accuracy_per_user(seeds, setting) for seeds in models]
            means.append(np.array([np.mean(users) for users in accuracies]))
            quarters.append(np.array([np.std(users) / 4 for users in accuracies]))
        accuracies = cls(means + quarters)
        accuracies.fits = fits
        return accuracies


def run(
    K_list: Any,
    alpha_list: Any,
    V_final: Any,
    train_features: Any,
    test_features_sparse: Any,
    train_features_unseen: Any,
    test_features_sparse_unseen: Any,
    N: int,
    N_unseen: int,
    device: Any,
    seed: Any = None,
    num_iterations: int = 1000,
    checkpoint: Checkpoint | None = None,
    threshold: float = 0.0,
) -> Accuracies:
    """`sweep` with `LoRe`, printed and returned as released; arguments and errors as of `sweep`.

    Returns 8 arrays of length len(alpha_list) * len(K_list), alpha outer: the mean accuracy over
    users of the four SETTINGS, then for each a quarter of the standard deviation over users (the
    band of the released plots). Several seeds are averaged within a user. `.fits` has the models.
    """
    fits = sweep(
        K_list,
        alpha_list,
        V_final,
        train_features,
        test_features_sparse,
        train_features_unseen,
        test_features_sparse_unseen,
        N,
        N_unseen,
        device,
        seed,
        num_iterations,
        checkpoint,
        threshold=threshold,
    )
    _print_sweep(fits, {"K": "K"})
    return Accuracies.of(fits)


def run_regularized(
    K_list: Any,
    alpha_list: Any,
    V_final: Any,
    train_features: Any,
    test_features_sparse: Any,
    train_features_unseen: Any,
    test_features_sparse_unseen: Any,
    N: int,
    N_unseen: int,
    device: Any,
    seed: Any = None,
    num_iterations: int = 20000,
    checkpoint: Checkpoint | None = None,
    threshold: float = 1e-2,
) -> Accuracies:
    """`run` with `LoRe_regularized`: alternating steps, an anchor, unused columns left out.

    threshold: columns whose largest weight among the seen users is below it go; 0 keeps all.
    """
    fits = sweep(
        K_list,
        alpha_list,
        V_final,
        train_features,
        test_features_sparse,
        train_features_unseen,
        test_features_sparse_unseen,
        N,
        N_unseen,
        device,
        seed,
        num_iterations,
        checkpoint,
        regularized=True,
        threshold=threshold,
    )
    _print_sweep(fits, {"alpha": "alpha", "Rank": "K"})
    return Accuracies.of(fits)


def _print_sweep(fits: list[Fit], headings: dict[str, str]) -> None:
    """The lines of the quickstart's step 5. headings: label -> the field of Fit behind it."""
    for seeds in fits_per_model(fits).values():
        for label, field in headings.items():
            print(label, ":", getattr(seeds[0], field))
        for setting in SETTINGS:
            print(setting)
            print_accuracy(accuracy_per_user(seeds, setting))


class Curves(list):
    """The four lists that `run_few_shot_vary_shots` returns, and what is behind them.

    rows: a dict per alpha, rank and number of shots: K, alpha, shots, and under each of
    UNSEEN_SETTINGS float64 `[N_unseen]`, each unseen user's accuracy, the mean over trials.
    fits: the trained models of all seeds; their `W_unseen` are 1, as nobody is fitted in them yet.
    """

    rows: list[dict[str, Any]]
    fits: list[Fit]


def run_few_shot_vary_shots(
    trials: int,
    alpha_list: Any,
    K_list: Any,
    num_shots: Any,
    train_features: Any,
    train_features_unseen: Any,
    test_features_sparse_unseen: Any,
    V_final: Any,
    N: int,
    N_unseen: int,
    device: Any,
    seed: int | None = None,
    num_iterations: int = 500,
    groups: list[torch.Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
    further_seeds: Iterable[int] = (),
) -> Curves:
    """How the accuracy on unseen users grows with the number of pairs that they are fitted from.

    trials: how often each number of shots is drawn. num_shots: a list of whole numbers.
    groups: int64 `[m_i]` per unseen user, the number of each pair's group, such as its
    conversation, counted from 0; a shot is then a whole group. further_seeds: models that are
    trained beside that of `seed`, for `.fits` alone. V_final: `[d, 1]`. The other arguments are
    those of `sweep`.

    Returns 4 lists over num_shots (for each alpha and rank in turn, if there are several): mean
    and standard deviation over trials of the accuracy on the shots, then of that on the unseen
    users' unseen prompts.
    """
    given_seeds = [0] if seed is None else [seed, *further_seeds]  # None has nothing to check
    check_sweep(K_list, alpha_list, given_seeds, num_iterations)
    check_whole_numbers("num_shots", num_shots, 1)
    check_whole("trials", trials, 1)
    device = check_device(device)
    V_final = check_head(V_final, "V_final").to(device)
    train, train_unseen, test_unseen = _check_users(
        {
            "train_features": (train_features, N),
            "train_features_unseen": (train_features_unseen, N_unseen),
            "test_features_sparse_unseen": (test_features_sparse_unseen, N_unseen),
        },
        len(V_final),
    )
    if groups is not None:
        check_groups(groups, train_unseen)

    members = sweep_members(K_list, alpha_list, [seed])
    further = [m for m in sweep_members(K_list, alpha_list, further_seeds) if m.K > 0]
    fits = _train_seen(
        members + further,
        train,
        N_unseen,
        V_final,
        num_iterations=num_iterations,
        regularized=False,
        threshold=0.0,
        device=device,
        checkpoint=checkpoint,
    )

    means: dict[str, list[float]] = {setting: [] for setting in UNSEEN_SETTINGS}
    deviations: dict[str, list[float]] = {setting: [] for setting in UNSEEN_SETTINGS}
    rows = []
    for member, fit in zip(members, fits):
        print("K :", member.K)
        accuracies = accuracies_by_shots(
            member, fit.V, train_unseen, test_unseen, num_shots, trials, groups
        )  # (N_unseen, numbers of shots, settings, trials)
        for i, shots in enumerate(num_shots):
            print("Shots :", shots)
            row = {"K": member.K, "alpha": member.alpha, "shots": shots}
            for j, setting in enumerate(UNSEEN_SETTINGS):
                in_setting = accuracies[:, i, j]  # (N_unseen, trials)
                of_trials = in_setting.mean(axis=0)
                print(setting)
                print_accuracy(of_trials)
                means[setting].append(float(np.mean(of_trials)))
                deviations[setting].append(float(np.std(of_trials)))
                row[setting] = in_setting.mean(axis=1)  # (N_unseen,)
            rows.append(row)

    curves = Curves(
        [
            means[FEW_SHOT_TRAIN],
            deviations[FEW_SHOT_TRAIN],
            means[UNSEEN_TEST],
            deviations[UNSEEN_TEST],
        ]
    )
    curves.rows = rows
    curves.fits = fits
    return curves


def accuracies_by_shots(
    member: Member,
    V: torch.Tensor,
    train_unseen: Features,
    test_unseen: Features,
    num_shots: Iterable[int],
    trials: int,
    groups: list[torch.Tensor] | None,
) -> np.ndarray:
    """Fit every unseen user from each number of shots, which each trial draws again.

    Returns the accuracies on the drawn and on the test pairs, float64
    `[N_unseen, numbers of shots, 2, trials]`. Under torchrun each process fits and judges its own
    users.
    """
    draws = [draw_shots(member, train_unseen, shots, trials, groups) for shots in num_shots]

    def judge(train: Features, test: Features, *draws: list[Draw]) -> np.ndarray:
        S_train = list(pair_scores(train, V))
        S_test = list(pair_scores(test, V))
        return np.stack([fit_and_judge(S_train, S_test, drawn) for drawn in draws], 1)

    return shared_out(judge, train_unseen, test_unseen, *draws)


def few_shot_trials(
    member: Member,
    S_train: list[torch.Tensor],
    S_test: list[torch.Tensor],
    shots: int,
    trials: int,
    groups: list[torch.Tensor] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Fit every unseen user from `shots` pairs, which each trial draws again.

    S_train, S_test: the scores X_i V `[m_i, K]` of each user's pairs. member: the model that these
    are of; its generator draws. Returns the accuracies on the drawn and on the test pairs, two
    float64 arrays `[trials, users]`.
    """
    drawn = draw_shots(member, S_train, shots, trials, groups)
    accuracies = fit_and_judge(S_train, S_test, drawn)  # (users, 2, trials)
    return accuracies[:, 0].T, accuracies[:, 1].T


class Draw(NamedTuple):
    """What is drawn for the few-shot fits of one user, one fit per trial."""

    rows: list[torch.Tensor]  # the numbers of the pairs to fit from, int64, one vector per trial
    start: torch.Tensor  # (trials, K), the logits to start from; K = 1 if there is nothing to fit


def draw_shots(
    member: Member,
    pairs: Features,
    shots: int,
    trials: int,
    groups: list[torch.Tensor] | None = None,
) -> list[Draw]:
    """Draw `shots` of each user's pairs, and a start, for each trial -> a Draw per user.

    pairs: of each user; only how many there are matters.
    """
    generator = member.generator(SHOTS + shots)
    users = len(pairs)
    all_rows = [torch.arange(len(X)) for X in pairs]
    rows = [sample_shots(all_rows, shots, generator, groups) for _ in range(trials)]
    starts = torch.zeros(trials * users, 1)
    if member.K > 1:
        starts = member.few_shot_start(trials * users)
    starts = starts.reshape(trials, users, -1)
    return [Draw([of_trial[i] for of_trial in rows], starts[:, i]) for i in range(users)]


@torch.no_grad()
def fit_and_judge(
    S_train: list[torch.Tensor], S_test: list[torch.Tensor], drawn: list[Draw]
) -> np.ndarray:
    """Fit users from their drawn pairs, and judge them -> float64 `[users, 2, trials]`.

    These are the accuracies on the drawn pairs, then on the test pairs.
    S_train, S_test: the scores X_i V `[m_i, K]` of each user's pairs.
    """
    users = len(drawn)
    trials = len(drawn[0].rows)

    # A user is fitted once per trial: each user's trials are side by side in S_drawn, start and w.
    S_drawn = [S[rows] for S, draw in zip(S_train, drawn) for rows in draw.rows]
    start = torch.cat([draw.start for draw in drawn])  # (users * trials, K)
    if start.shape[1] > 1:
        (w,) = fit_weights(S_drawn, [start], FEW_SHOT_ITERATIONS, FEW_SHOT_LEARNING_RATE)
    else:
        w = torch.ones_like(start, device=S_drawn[0].device)

    on_drawn = _accuracies_of_scores(torch.cat(S_drawn), _pairs_per_user(S_drawn, w.device), w)
    S = torch.cat(S_test)  # (rows, K)
    counts = _pairs_per_user(S_test, w.device)
    w_of_trials = w.reshape(users, trials, -1).unbind(1)  # trials times (users, K)
    on_test = [_accuracies_of_scores(S, counts, w_t) for w_t in w_of_trials]
    return np.stack([on_drawn.reshape(users, trials), np.stack(on_test, 1)], 1)


def _accuracies_of_scores(S: torch.Tensor, counts: torch.Tensor, w: torch.Tensor) -> np.ndarray:
    """The accuracy of each user, float64 `[users]`.

    S: the scores X V `[rows, K]`, the rows of one user after the other; counts: `[users]`, how
    many rows each has; w: `[users, K]`.
    """
    margins = (S * w.repeat_interleave(counts, 0)).sum(1, keepdim=True)  # (rows, 1)
    return share_right(margins, counts)[:, 0].cpu().numpy()


# ---------------------------------------------------------------------------------------------
# 6. Released API
#
# The other functions of the released file, for scripts that were written for it. Without a seed or
# a generator, they draw as the release does: from torch's generator (starts, shots),
# numpy's (populations, sparse draws) or Python's `random` (shots of whole dialogs).
# ---------------------------------------------------------------------------------------------


def solve(
    train_features: Any,
    num_basis_vectors: int,
    num_iterations: int = 1000,
    learning_rate: float = 0.01,
    seed: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train `LoRe` without a penalty -> (softmax(W) `[N, K]`, V `[d, K]`)."""
    return solve_regularized(
        None, 0.0, train_features, num_basis_vectors, num_iterations, learning_rate, seed
    )


def solve_regularized(
    V_sft: Any,
    alpha: float,
    train_features: Any,
    num_basis_vectors: int,
    num_iterations: int = 1000,
    learning_rate: float = 0.01,
    seed: int | None = None,
    model: type[LoRe] = LoRe,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train `LoRe` (or another `model`) -> (softmax(W) `[N, K]`, V `[d, K]`)."""
    X = check_features(train_features, "train_features")
    d = X[0].shape[1]
    lore = model(V_sft, alpha, len(X), d, num_basis_vectors, num_iterations, learning_rate, seed)
    return lore.train(X)


def solve_regularized_simplex(
    V_sft: Any,
    alpha: float,
    train_features: Any,
    num_basis_vectors: int,
    num_iterations: int = 1000,
    learning_rate: float = 0.01,
    seed: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Train `LoRe_regularized` -> (softmax(W) `[N, kept]`, V `[d, kept]`), kept <= K columns."""
    return solve_regularized(
        V_sft,
        alpha,
        train_features,
        num_basis_vectors,
        num_iterations,
        learning_rate,
        seed,
        LoRe_regularized,
    )


def learn_multiple_few_shot(
    train_features: Any,
    V: Any,
    num_iterations: int = 1000,
    learning_rate: float = 0.01,
    seed: int | None = None,
) -> list[torch.Tensor]:
    """Train `PersonalizeBatch` -> a list of N simplex vectors `[K]`."""
    X = check_features(train_features, "train_features")
    V = check_matrix(V, "V")
    return PersonalizeBatch(len(X), *V.shape, num_iterations, learning_rate, seed).train(X, V)


def learn_single_reward(
    train_features: Any,
    num_iterations: int = 1000,
    learning_rate: float = 0.01,
    seed: int | None = None,
) -> torch.Tensor:
    """One Bradley-Terry model for all users, LoRe at K = 1 -> V `[d, 1]`. A baseline."""
    _, V = solve(train_features, 1, num_iterations, learning_rate, seed)
    return V


def learn_single_reward_regularized(
    V_ref: Any,
    alpha: float,
    train_features: Any,
    num_iterations: int = 1000,
    learning_rate: float = 0.01,
    seed: int | None = None,
) -> torch.Tensor:
    """`learn_single_reward` with the penalty alpha * |V - V_ref|^2 -> V `[d, 1]`. A baseline."""
    _, V = solve_regularized(V_ref, alpha, train_features, 1, num_iterations, learning_rate, seed)
    return V


def learn_multiple(
    train_features: Any,
    num_iterations: int = 1000,
    learning_rate: float = 0.01,
    seed: int | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A baseline: a Bradley-Terry model per user -> (N weights `[1]`, all 1; N bases `[d, 1]`)."""
    features = check_features(train_features, "train_features")
    V = [learn_single_reward([X], num_iterations, learning_rate, seed) for X in features]
    return [torch.ones(1) for _ in V], V


def sample_shots(
    train_features_unseen: Features,
    shots: int,
    generator: torch.Generator | None = None,
    groups: list[torch.Tensor] | None = None,
) -> Features:
    """Draw `shots` of each user's pairs without replacement; all of them if there are fewer.

    train_features_unseen: `[m_i, d]` per user. Returns `[min(shots, m_i), d]` per user.
    generator: on the CPU; None for torch's own. groups: see `run_few_shot_vary_shots`.
    """
    check_whole("shots", shots, 1)
    if groups is None:
        return [
            X[torch.randperm(len(X), generator=generator)[:shots]] for X in train_features_unseen
        ]
    check_groups(groups, train_features_unseen)
    drawn = []
    for X, group in zip(train_features_unseen, groups):
        count = int(group.max()) + 1
        chosen = torch.randperm(count, generator=generator)[:shots]
        drawn.append(X[torch.isin(group, chosen)])
    return drawn


def generate_population(alpha: Any, N: int, seed: Any = None) -> np.ndarray:
    """N users as mixtures over scorers: Dirichlet draws, float64 `[N, scorers]`.

    alpha: the concentration, one number per scorer, or one for all ten. seed: None draws from
    numpy's own generator, as released.
    """
    concentration = np.full(10, alpha) if np.ndim(alpha) == 0 else np.asarray(alpha)
    for value in concentration.tolist():
        check_number("concentration", value, 1e-6, 1e6)
    check_whole("N", N, 1)
    generator = np.random if seed is None else np.random.default_rng(seed)
    return generator.dirichlet(concentration, N)


generate_popupulation = generate_population  # the released spelling


def best_and_worst(reward_tensor: Any, w: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The answers that a user scores highest and lowest -> two int64 `[prompts]`.

    reward_tensor: `[prompts, answers, scorers]`, a tensor or an array (of objects, too).
    w: the user's mixture `[scorers]`. Both numbers are equal where all answers are tied.
    """
    if not isinstance(reward_tensor, torch.Tensor):
        reward_tensor = torch.from_numpy(np.asarray(reward_tensor, np.float64))
    if not reward_tensor.is_floating_point():
        reward_tensor = reward_tensor.float()
    scores = reward_tensor @ torch.as_tensor(
        w, dtype=reward_tensor.dtype, device=reward_tensor.device
    )
    best = scores.argmax(1)
    worst = scores.argmin(1)
    # If every scorer ties all answers, rounding would decide.
    tied = (reward_tensor == reward_tensor[:, :1]).all(2).all(1)
    return best, torch.where(tied, best, worst)


def simulate_user(reward_tensor: Any, features: Any, w: Any) -> torch.Tensor:
    """A simulated user's pairs: the answer scored highest minus that scored lowest, `[prompts, d]`.

    reward_tensor: `[prompts, answers, scorers]`. features: `[prompts, answers, d]`, a tensor or
    nested lists of vectors. w: `[scorers]`. Returns float32.
    """
    return simulate_population(reward_tensor, features, [w])[0]


def simulate_population(reward_tensor: Any, features: Any, W: Any) -> torch.Tensor:
    """`simulate_user` for every row of W `[N, scorers]` -> float32 `[N, prompts, d]`.

    For many users take `Pairs`, which need not hold users x prompts x d numbers.
    """
    if not isinstance(features, torch.Tensor):
        features = torch.stack(
            [torch.stack([torch.as_tensor(phi) for phi in answers]) for answers in features]
        )
    prompts = torch.arange(len(features))
    users = []
    for w in W:
        best, worst = best_and_worst(reward_tensor, w)
        users.append(features[prompts, best].float() - features[prompts, worst].float())
    return torch.stack(users)


def create_sparse_tensor(
    dense_tensor: torch.Tensor,
    sample_percentage: float,
    generator: np.random.Generator | None = None,
) -> list[torch.Tensor]:
    """For each user a random share of the prompts -> N tensors `[int(share * prompts), d]`.

    dense_tensor: `[N, prompts, d]`. sample_percentage: a share from 0 to 1, in spite of its
    released name. generator: None for numpy's own. Raises InputError if that leaves no pair.
    """
    prompts = dense_tensor.shape[1]
    count = count_of_share(prompts, sample_percentage)
    permutation = (generator or np.random).permutation
    return [X[torch.from_numpy(permutation(prompts)[:count])] for X in dense_tensor]


def count_of_share(prompts: int, fraction: float, what: str = "sample_percentage") -> int:
    """How many prompts a fraction of them is, rounded down. Raises InputError if none is left."""
    rounding = 1e-9  # 0.29 of 100 is 29, and not the 28.999.. of the floating-point product
    is_number = isinstance(fraction, Real)
    if not is_number or not 1 - rounding <= fraction * prompts <= prompts + rounding:
        raise InputError(
            f"{what}: fraction {fraction} of {prompts} prompts leaves no pairs for a user, or is "
            f"more than all; give a number from {1 / prompts:.2g} to 1.0, or more prompts"
        )
    return int(fraction * prompts + rounding)


def turn_pairs(row: dict) -> torch.Tensor:
    """The pairs of one turn, chosen minus each rejected answer: float32 `[rejected, d]`.

    row: one of our files, with `chosen_conv_embedding` `[d]` and `rejected_conv_embedding`
    `[rejected, d]` (`[d]` in released files) in its `extra_info`.
    Raises InputError: the embeddings differ in width.
    """
    info = row["extra_info"]
    chosen = _tensor_of_lists(info["chosen_conv_embedding"]).float().reshape(1, -1)
    rejected = _tensor_of_lists(info["rejected_conv_embedding"]).float()
    d = chosen.shape[1]
    if rejected.shape[-1:] != (d,):
        raise InputError(
            f"a turn whose chosen embedding has {d} numbers, and whose rejected ones have the "
            f"shape {tuple(rejected.shape)}; make both with one model"
        )
    return chosen - rejected.reshape(-1, d)


def group_by_dialog(embeddings: Any) -> dict[str, dict[str, list[dict]]]:
    """user -> dialog -> list of rows, users and dialogs in the order of their ids.

    embeddings: a list of rows with `user_id` and `dialog_id` in `extra_info`, or a dict of lists.
    """
    rows = embeddings if isinstance(embeddings, list) else itertools.chain(*embeddings.values())

    def ids(row: dict) -> list[str]:
        return [str(row["extra_info"][key]) for key in ("user_id", "dialog_id")]

    users: dict[str, dict[str, list[dict]]] = {}
    for row in sorted(rows, key=ids):
        info = row["extra_info"]
        users.setdefault(info["user_id"], {}).setdefault(info["dialog_id"], []).append(row)
    return users


def create_dataset_prism(embeddings: Any) -> list[torch.Tensor]:
    """The pairs of each user: float32 `[m_i, d]`.

    embeddings: our rows, see `group_by_dialog` (users sorted by id); or the released nesting,
    user -> dialog -> {"chosen": [vectors], "rejected": [vectors]}, in its own order.
    """
    return create_dataset_prism_shots(embeddings, None)


def create_dataset_prism_shots(
    embeddings: Any, shots: int | None, generator: random.Random | None = None
) -> list[torch.Tensor]:
    """As `create_dataset_prism`, from `shots` dialogs of each user; every call draws again.

    shots: None, or more than a user has, takes all. generator: None for Python's `random`.
    """
    features = []
    for dialogs in _pairs_per_dialog(embeddings).values():
        drawn = list(dialogs.values())
        if shots is not None:
            drawn = (generator or random).sample(drawn, min(shots, len(drawn)))
        features.append(torch.cat(drawn))
    return features


def _pairs_per_dialog(embeddings: Any) -> dict[str, dict[str, torch.Tensor]]:
    """user -> dialog -> the pairs of its turns, float32 `[m, d]`."""
    if _is_released_nesting(embeddings):
        users = embeddings
        pairs_of_dialog = _released_pairs
    else:
        users = group_by_dialog(embeddings)
        pairs_of_dialog = _pairs_of_rows
    return {
        user: {name: pairs_of_dialog(dialog) for name, dialog in dialogs.items()}
        for user, dialogs in users.items()
    }


def _pairs_of_rows(rows: list[dict]) -> torch.Tensor:
    """The pairs of a dialog in our rows, one per rejected answer: float32 `[m, d]`."""
    return torch.cat([turn_pairs(row) for row in rows])


def _is_released_nesting(embeddings: Any) -> bool:
    """Whether users are dicts of dialogs, as in the release, and not lists of our rows."""
    return isinstance(embeddings, dict) and all(
        isinstance(dialogs, dict) for dialogs in embeddings.values()
    )


def _released_pairs(dialog: dict[str, list]) -> torch.Tensor:
    """The pairs of a dialog in the released nesting, one per turn: float32 `[turns, d]`."""
    chosen = torch.stack([torch.as_tensor(phi).float().flatten() for phi in dialog["chosen"]])
    rejected = torch.stack([torch.as_tensor(phi).float().flatten() for phi in dialog["rejected"]])
    return chosen - rejected


# ---------------------------------------------------------------------------------------------
# 7. Checks
#
# What callers give is checked once, where it enters. An error is one line: what is wrong, where,
# and the remedy. Below: settings, the device, then matrices, features, reward heads and groups.
# ---------------------------------------------------------------------------------------------


class InputError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


LARGEST_WHOLE = 2**32 - 1  # the largest seed or count
LARGEST_ALPHA = 1e15  # the largest penalty


def check_whole(name: str, value: Any, least: int = 0, most: int = LARGEST_WHOLE) -> None:
    """Raise InputError that names the setting if it is not a whole number from least to most."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most:
        raise InputError(f"{name}: {value!r}; give a whole number from {least} to {most}")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raise InputError that names the setting if it is not a number from least to most."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise InputError(f"{name}: {value!r}; give a number from {least} to {most}")


def check_whole_numbers(name: str, values: Any, least: int = 0) -> None:
    """Raise InputError if it is not a list of one or more distinct whole numbers from least on."""
    _check_list(name, values)
    for value in values:
        check_whole(name, value, least)
    _check_distinct(name, values)


def check_numbers(name: str, values: Any, least: float, most: float) -> None:
    """Raise InputError if it is not a list of one or more distinct numbers from least to most."""
    _check_list(name, values)
    for value in values:
        check_number(name, value, least, most)
    _check_distinct(name, values)


def _check_list(name: str, values: Any) -> None:
    if not isinstance(values, (list, tuple, range, np.ndarray)) or len(values) == 0:
        raise InputError(f"{name}: {values!r}; give a list of one value or more")


def _check_distinct(name: str, values: Any) -> None:
    if len(set(values)) < len(values):
        raise InputError(f"{name}: {list(values)}; give each value once")


def check_training(num_iterations: Any, learning_rate: Any, seed: Any = None) -> None:
    """Raise InputError that names the first setting of a training that has no meaning.

    seed: None if torch's own generator draws.
    """
    check_whole("num_iterations", num_iterations)
    check_number("learning_rate", learning_rate, 1e-9, 1e9)
    if seed is not None:
        check_whole("seed", seed)


def check_sweep(
    K_list: Any, alpha_list: Any, seeds: Any, num_iterations: Any, threshold: Any = 0.0
) -> None:
    """Raise InputError that names the first setting of a sweep that has no meaning."""
    check_whole_numbers("K_list", K_list)
    check_numbers("alpha_list", alpha_list, 0, LARGEST_ALPHA)
    check_whole_numbers("seeds", seeds)
    check_whole("num_iterations", num_iterations)
    check_number("threshold", threshold, 0, 1)


def check_device(device: Any) -> torch.device:
    """The device as a torch.device. Raises InputError if this machine does not have it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device {device!r}: not on this machine ({reason}); give cpu, or a GPU that is there, "
            "such as cuda:0"
        ) from None


def is_finite(table: torch.Tensor) -> bool:
    """Whether no number is NaN, infinite or beyond float32. Needs no copy of the tensor."""
    lowest, highest = table.aminmax()  # both are NaN if a number is, and a comparison fails
    largest = torch.finfo(torch.float32).max
    return -largest <= float(lowest) and float(highest) <= largest


def are_finite(features: Iterable[torch.Tensor | Pairs]) -> bool:
    """`is_finite` of all users' pairs. Of a table the rows that they name are read, each once."""
    for table, users in itertools.groupby(features, table_number):
        if table is None:
            matrices = users
        else:
            pairs = list(users)
            matrices = slices_of_rows(pairs[0].embeddings, named_rows(pairs))
        if not all(map(is_finite, matrices)):
            return False
    return True


def check_matrix(
    X: Any, what: str, rows: int | None = None, columns: int | None = None
) -> torch.Tensor | Pairs:
    """X as a finite float32 tensor `[rows, columns]`, or as the Pairs that it is.

    X: a tensor, an array, nested lists of numbers, or Pairs. rows, columns: None for any number.
    Raises InputError that begins with `what`: no numbers, another shape, NaN or infinite values.
    """
    X = _check_shape(X, what, rows, columns)
    _check_finite([X], what)
    return X


def _check_shape(
    X: Any, what: str, rows: int | None = None, columns: int | None = None
) -> torch.Tensor | Pairs:
    """`check_matrix` without reading the numbers: NaN and infinite values pass."""
    given = type(X).__name__
    if not isinstance(X, Pairs):
        X = _as_float32(X)
    elif not _is_real(X.embeddings):
        X = None
    if X is None:
        raise InputError(
            f"{what}: {given} where a matrix of numbers should be; give a float32 tensor"
        )
    fits = len(X.shape) == 2 and 0 not in X.shape
    fits = fits and (rows is None or rows == X.shape[0])
    fits = fits and (columns is None or columns == X.shape[1])
    if not fits:
        raise InputError(
            f"{what}: shape {tuple(X.shape)} where [{rows or 'rows >= 1'}, {columns or 'd'}] "
            "should be; give one of that shape, of the same model and users, none without pairs"
        )
    return X


def _check_finite(features: list[torch.Tensor | Pairs], what: str) -> None:
    """Raise InputError that begins with `what` if a number is NaN or infinite."""
    if not are_finite(features):
        raise InputError(f"{what}: NaN or infinite values; leave them out, or make them again")


def _as_float32(values: Any) -> torch.Tensor | None:
    """A float32 tensor of the values, dense and without a gradient; None if they are no numbers."""
    try:
        tensor = _tensor_of_lists(values).detach()
    except (TypeError, ValueError, RuntimeError):
        return None
    is_dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
    if not is_dense or not _is_real(tensor):
        return None
    try:
        return tensor.float()
    except RuntimeError:  # a number format that torch only stores, or quantised numbers
        return None


def _is_real(tensor: torch.Tensor) -> bool:
    """Whether these are numbers, and not complex ones."""
    return not tensor.is_complex() and tensor.dtype != torch.bool


def _tensor_of_lists(values: Any) -> torch.Tensor:
    """`torch.as_tensor` of a tensor, an array, a list, or a list of lists.

    Deeper lists are refused before torch counts their numbers: a pickle of a few bytes may hold
    billions of them, because a list may contain the same list twice, and that one another twice.
    Raises TypeError: lists are nested deeper; and what torch raises.
    """
    inner = values
    for _ in range(2):
        if isinstance(inner, (list, tuple)) and inner:
            inner = inner[0]
    if isinstance(inner, (list, tuple)) and inner:
        raise TypeError("lists in lists in lists where a matrix of numbers should be")
    return torch.as_tensor(values)


def check_features(
    features: Any,
    what: str,
    users: int | None = None,
    d: int | None = None,
    users_to_read: slice = slice(None),
) -> Features:
    """The features as a list with one finite float32 `[m_i, d]` tensor, or Pairs, per user.

    features: an iterable of tensors, arrays or Pairs. users, d: None for any number.
    users_to_read: the users whose numbers are read, to see that they are finite.
    Raises InputError that names the user: no users, or not `users` of them; a user without pairs;
    another width than `d`, or than the first user's; NaN or infinite values.
    """
    features = list(features) if isinstance(features, Iterable) else []
    if not features or users not in (None, len(features)):
        raise InputError(
            f"{what}: {len(features)} users where {users or 'at least 1'} should be; "
            "give one tensor per user"
        )
    for i, X in enumerate(features):
        features[i] = _check_shape(X, f"{what}, user {i}", None, d)
        d = features[i].shape[1]  # the other users must be as wide as the first
    if not are_finite(features[users_to_read]):  # all at once is fast; the culprit is found after
        for i in range(len(features))[users_to_read]:
            _check_finite([features[i]], f"{what}, user {i}")
    return features


def check_own_features(features: Any, what: str, users: int | None, d: int | None) -> Features:
    """`check_features`, but each process of torchrun reads the numbers of its own users only.

    All processes must call this. If one of them finds an error, all raise it.
    """
    error = None
    try:
        features = check_features(features, what, users, d, own_users())
    except InputError as found:
        error = str(found)
    for message in from_each_process(error):
        if message is not None:
            raise InputError(message)
    return features


def check_head(V: Any, what: str, d: int | None = None) -> torch.Tensor:
    """A reward head as float32 `[d, 1]`. Raises InputError: no vector, not finite, all zero."""
    if isinstance(V, (torch.Tensor, np.ndarray)) and V.ndim > 0:
        longer_sides = [size for size in V.shape if size > 1]
        if len(longer_sides) <= 1:  # [d], [1, d] or [d, 1]
            V = V.reshape(-1, 1)
    V = check_matrix(V, what, d, 1)
    if not V.any():
        raise InputError(f"{what}: all zero; read the reward head again")
    return V


def check_groups(groups: Any, features: Features) -> None:
    """Raise InputError if not every user has an int64 `[m_i]` of group numbers without a gap."""
    groups = groups if isinstance(groups, (list, tuple)) else []
    for i, (group, X) in enumerate(itertools.zip_longest(groups, features)):
        if X is None or not _are_group_numbers(group, len(X)):
            raise InputError(
                f"groups, user {i}: not a number for each pair of this user; give a list with a "
                "tensor per user that has the number of each pair's group, counted from 0 without "
                "a gap"
            )


def _are_group_numbers(group: Any, pairs: int) -> bool:
    """Whether this is a vector `[pairs]` that has each number from 0 to its largest."""
    if not isinstance(group, torch.Tensor) or tuple(group.shape) != (pairs,):
        return False
    return set(group.tolist()) == set(range(int(group.max()) + 1))


# ---------------------------------------------------------------------------------------------
# 8. Processes of torchrun
#
# Under torchrun each process reads and computes the pairs of its own users only, and all end with
# the results of all users. Without it there is one process, which has all users.
# ---------------------------------------------------------------------------------------------


def process_rank() -> int:
    """The number of this process under torchrun; 0 without it."""
    return int(os.environ.get("RANK", 0))


def process_count() -> int:
    """How many processes torchrun has started; 1 without it. The first call connects them."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1 and not dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(default_device())  # NCCL's barrier runs on the current device
            backend = "cpu:gloo,cuda:nccl"
        # A slow neighbour may embed for hours before the next exchange.
        dist.init_process_group(backend, timeout=datetime.timedelta(days=7))
    return count


def own_users() -> slice:
    """The users of this process: of P processes, process p has the users p, p + P, p + 2 P, .."""
    return slice(process_rank(), None, process_count())


def from_each_process(value: Any) -> list:
    """The `value` of every process, in the order of their ranks. All processes must call this."""
    if process_count() == 1:
        return [value]
    values = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def to_first_process(value: Any) -> list | None:
    """`from_each_process` for the first process; None in the others. All must call this."""
    if process_count() == 1:
        return [value]
    values = [None] * process_count() if process_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def from_first_process(values: list | None) -> Any:
    """This process's entry of the list that the first process has. All must call this.

    values: an entry per process; only the first process is asked for it.
    """
    if process_count() == 1:
        return values[0]
    own = [None]
    dist.scatter_object_list(own, values if process_rank() == 0 else None)
    return own[0]


def shared_out(compute: Callable[..., np.ndarray | list], *users: Any) -> np.ndarray | list:
    """compute(*users), with the users shared out among the processes of torchrun.

    users: lists, tensors or ranges with an entry per user, all equally long and not empty.
    compute: takes the entries of some users, and returns an array or a list with an entry for
    each of these. All processes must call this, and all return the result of all users.
    """
    if process_count() == 1:
        return compute(*users)
    N = len(users[0])
    own = None
    if process_rank() < N:
        own = compute(*[values[own_users()] for values in users])
    parts = from_each_process(own)
    if isinstance(parts[0], np.ndarray):
        whole = np.empty((N, *parts[0].shape[1:]), parts[0].dtype)
    else:
        whole = [None] * N
    with_users = parts[:N]  # if there are more processes than users, the last ones have none
    for rank, part in enumerate(with_users):
        whole[rank :: len(parts)] = part
    return whole


def default_device() -> torch.device:
    """This process's GPU, or the CPU if there is none. InputError: more processes than GPUs."""
    if torch.cuda.is_available():
        return check_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return check_device("cpu")


def progress_bar(label: str, total: int, **options: Any) -> tqdm:
    """A bar on stderr, shown from the third second on; in a log file one line in ten seconds."""
    return tqdm(
        desc=label,
        total=total,
        delay=2,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        disable=process_rank() > 0,
        **options,
    )
