"""LoRe: low-rank reward modelling for personalised language models (arXiv 2504.14439).

What the scripts of the three data sets share, in nine parts, each using only those above it:

    1. Errors and files           one line for what a user can mend; whole files; hostile ones refused (`load_pickle`)
    2. Reward model               the frozen model, its head, its identity; files of embeddings
    3. Embedding                  phi(prompt, response), every token once (`embed_conversations`); the model's proof
    4. Preference pairs           rows of others' files; differences of embeddings, shots, simulated users
    5. The models                 the loss (`Likelihood`), its kernel (`_gradients`), few-shot fit (`fit_weights`)
    6. Evaluation and evidence    accuracies of personalised rewards; is it personal, by how much
    7. Pipelines                  run, run_regularized, run_few_shot_vary_shots; baselines; what prepare.py begins with
    8. Results and plots          JSON, safetensors, CSV, report.md, pictures
    9. Use                        exported reward models, rewards for trainers, new users, which question to ask

In formulas: x = phi(chosen) - phi(rejected) is a preference pair of user i, V (d x K) the shared reward basis,
w_i = softmax(W_i) that user's weights, m = x V w_i / 100 the margin, and P(chosen beats rejected) = sigmoid(m).
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import itertools
import math
import os
import random  # noqa: F401
import sys
import time
from collections.abc import Iterable
from numbers import Integral, Real

import numba
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch.nn.functional import cosine_similarity, logsigmoid
from tqdm import tqdm

FUSED_ADAM = tuple(map(int, torch.__version__.split(".")[:2])) >= (
    2,
    6,
)  # torch has it on the CPU from then on


class InputError(ValueError):
    """Input that cannot be used; its message is one line that says what, where and the remedy."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))


WHOLE, POSITIVE = (Integral, 0, 2**32 - 1), (Integral, 1, 2**32 - 1)
RULES = {  # for what stands at the top of a script, or is given to a function; of lists, for each value
    **dict.fromkeys(
        (
            "seed",
            "split_seed",
            "population_seed",
            "seeds",
            "question_seeds",
            "test_seed",
            "K_list",
            "num_iterations",
        ),
        WHOLE,
    ),
    **dict.fromkeys(
        (
            "N",
            "N_unseen",
            "trials",
            "train_pairs",
            "unseen_pairs",
            "num_basis_vectors",
            "shots",
            "num_shots",
            "num_questions",
            "limit",
            "top_k",
            "token_budget",
            "shard_size",
            "max_length",
            "batch_size",
        ),
        POSITIVE,
    ),
    "fewest_conversations": (Integral, 2, 2**32 - 1),
    "alpha_list": (Real, 0, 1e15),
    "learning_rate": (Real, 1e-9, 1e9),
    "threshold": (Real, 0, 1),
    "validation_share": (Real, 0, 0.9),
    "seen_share": (Real, 0.01, 0.99),
    "test_share": (Real, 0.01, 0.99),
    "concentration": (Real, 1e-6, 1e6),
    "fractions": (Real, 1e-9, 1),
    "head_bias": (Real, -1e6, 1e6),
}


def check_settings(**settings):
    """Check settings by their names, before any data are loaded. Raises InputError that names the setting."""
    for name, value in settings.items():
        kind, least, most = RULES[name.lstrip("-")]
        is_list = name in (
            "K_list",
            "alpha_list",
            "seeds",
            "question_seeds",
            "num_shots",
            "fractions",
        )
        if is_list and (not isinstance(value, (list, tuple, range, np.ndarray)) or len(value) == 0):
            raise InputError(f"{name}: {value!r}; give a list of one value or more")
        for one in value if is_list else [value]:
            if not isinstance(one, kind) or isinstance(one, bool) or not least <= one <= most:
                raise InputError(
                    f"{name}: {one!r}; give a {'whole ' * (kind is Integral)}number from {least} to {most}"
                )
        if is_list and name != "fractions" and len(set(value)) < len(value):
            raise InputError(f"{name}: {list(value)}; give each value once")


def process_rank():
    """The number of this process under torchrun, 0 without it."""
    return int(os.environ.get("RANK", 0))


def process_count():
    """How many processes torchrun has started, 1 without it. Connects them at the first call."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(default_device())  # where NCCL's barrier runs
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            timeout=datetime.timedelta(days=7),
        )  # a slow neighbour may embed for hours
    return count


def default_device():
    """This process's GPU, or the CPU where there is none. Raises InputError where processes outnumber the GPUs."""
    return check_device(
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    )


def check_device(device):
    """A torch.device that is there. Raises InputError where it is not."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"device {device!r}: not on this machine ({str(error).splitlines()[0]}); give cpu, or a GPU "
            "that is there, such as cuda:0"
        ) from None


def progress_bar(label, total, **options):
    """A tqdm bar on stderr, shown from the third second on; in a log file it writes a line every ten seconds."""
    return tqdm(
        desc=label,
        total=total,
        delay=2,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        disable=process_rank() > 0,
        **options,
    )


class Pairs:
    """Preference pairs as row numbers of one table of embeddings, for many pairs over few responses.
    embeddings: `[rows, d]`, any float dtype; chosen, rejected: int64 `[m]`. Behaves like the float32 matrix
    `embeddings[chosen] - embeddings[rejected]` of shape `[m, d]` without holding it."""

    def __init__(self, embeddings, chosen, rejected):
        self.embeddings, self.chosen, self.rejected = (
            embeddings,
            torch.as_tensor(chosen),
            torch.as_tensor(rejected),
        )
        for rows in (self.chosen, self.rejected):
            if (
                rows.shape != self.chosen.shape
                or rows.ndim != 1
                or rows.dtype == torch.bool
                or len(rows)
                and (rows.min() < 0 or rows.max() >= len(embeddings) or (rows != rows.long()).any())
            ):
                raise InputError(
                    f"Pairs: chosen {tuple(self.chosen.shape)}, rejected {tuple(self.rejected.shape)}: rows "
                    f"{rows.tolist()[:5]}; give two equally long lists of row numbers of the "
                    f"{len(embeddings)} rows"
                )
        self.chosen, self.rejected = self.chosen.long(), self.rejected.long()

    def __len__(self):
        return len(self.chosen)

    @property
    def shape(self):
        return torch.Size((len(self), self.embeddings.shape[1]))

    def __getitem__(self, rows):
        return Pairs(self.embeddings, self.chosen[rows], self.rejected[rows])

    def __matmul__(self, V):
        return next(pair_scores([self], V))

    def dense(self):
        """The float32 matrix `[m, d]` itself."""
        return self.embeddings[self.chosen].float() - self.embeddings[self.rejected].float()


def pair_scores(features, V):
    """X_i V of each user in turn, `[m_i, C]`; the rows of a table that users share are multiplied once."""
    table = scores = None
    for X in features:
        if isinstance(X, Pairs):
            if X.embeddings is not table:
                table = X.embeddings
                scores = torch.cat(
                    [part.to(V.device, torch.float32) @ V for part in table.split(8192)]
                )
            yield scores[X.chosen.to(V.device)] - scores[X.rejected.to(V.device)]
        else:
            yield X.to(V.device) @ V


def is_finite(table):
    """Whether a tensor's numbers are no NaN and within float32, without a copy of it."""
    return all(abs(float(extreme)) <= torch.finfo(torch.float32).max for extreme in table.aminmax())


def check_matrix(X, what, rows=None, columns=None, finite=None):
    """X, a tensor, array or Pairs, as a finite float32 tensor `[rows, columns]` (None: any number from 1) or as Pairs.
    finite: a table that is known to be. Raises InputError that begins with `what`."""
    try:
        table = X.embeddings if isinstance(X, Pairs) else torch.as_tensor(X).detach()
    except (TypeError, ValueError, RuntimeError):
        table = torch.zeros(0, dtype=torch.bool)
    if table.is_complex() or table.dtype == torch.bool:
        raise InputError(
            f"{what}: {type(X).__name__} where a matrix of numbers should be; give a float32 tensor"
        )
    X = X if isinstance(X, Pairs) else table.float()
    if (
        len(X.shape) != 2
        or 0 in X.shape
        or rows not in (None, X.shape[0])
        or columns not in (None, X.shape[1])
    ):
        raise InputError(
            f"{what}: shape {tuple(X.shape)} where [{rows or 'rows >= 1'}, {columns or 'd'}] should be; "
            "give one of that shape, of the same model and users, none without pairs"
        )
    if table is not finite and not is_finite(table):
        raise InputError(f"{what}: NaN or infinite values; leave them out, or make them again")
    return X


def check_features(features, what, users=None, d=None):
    """A list with one finite float32 `[m_i, d]` tensor (or Pairs) per user, of any iterable of tensors, arrays or Pairs.
    Raises InputError that names the user: no users or not `users` of them, a user without pairs, another width than `d`
    or than the first user's, NaN or infinite values."""
    features = list(features) if isinstance(features, Iterable) else []
    if not features or users not in (None, len(features)):
        raise InputError(
            f"{what}: {len(features)} users where {users or 'at least 1'} should be; "
            "give one tensor per user"
        )
    for i, X in enumerate(features):
        before = getattr(features[i - 1], "embeddings", None) if i else None
        features[i] = check_matrix(X, f"{what}, user {i}", None, d, before)
        d = features[i].shape[1]
    return features


def check_head(V, what, d=None):
    """A reward head as float32 `[d, 1]`; raises InputError where it is no such vector, not finite or all zero."""
    if isinstance(V, (torch.Tensor, np.ndarray)) and math.prod(V.shape) == max(V.shape, default=0):
        V = V.reshape(-1, 1)
    V = check_matrix(V, what, d, 1)
    if not V.any():
        raise InputError(f"{what}: all zero; read the reward head again")
    return V


def sample_shots(train_features_unseen, shots, generator=None, groups=None):
    """For each user `shots` of the pairs, drawn without replacement anew at each call (all pairs of a user with fewer).
    train_features_unseen: list of `[m_i, d]`. Returns a list of `[min(shots, m_i), d]`.
    generator: a CPU torch.Generator; default torch's own. groups: see `run_few_shot_vary_shots`."""
    check_settings(shots=shots)
    if groups is None:
        return [
            X[torch.randperm(len(X), generator=generator)[:shots]] for X in train_features_unseen
        ]
    check_groups(groups, train_features_unseen)
    return [
        X[torch.isin(group, torch.randperm(int(group.max()) + 1, generator=generator)[:shots])]
        for X, group in zip(train_features_unseen, groups)
    ]


def check_groups(groups, features):
    """Raise InputError unless each user has one int64 `[m_i]` that numbers groups of pairs from 0 without a gap."""
    groups = groups if isinstance(groups, (list, tuple)) else []
    for i, (group, X) in enumerate(itertools.zip_longest(groups, features)):
        if (
            X is None
            or not isinstance(group, torch.Tensor)
            or tuple(group.shape) != (len(X),)
            or (set(group.tolist()) != set(range(int(group.max()) + 1)))
        ):
            raise InputError(
                f"groups, user {i}: not a number for each pair of this user; give a list with a tensor per "
                "user that has the number of each pair's group, counted from 0 without a gap"
            )


def generate_population(alpha, N, seed=None):
    """N users as mixtures over scorers: Dirichlet draws, numpy float64 `[N, scorers]`.
    alpha: the concentration, one number per scorer, or a single number for ten scorers. seed: default another each time.
    """
    concentration = np.full(10, alpha) if np.ndim(alpha) == 0 else np.asarray(alpha)
    for value in concentration.tolist():
        check_settings(concentration=value, N=N)
    return np.random.default_rng(seed).dirichlet(concentration, N)


generate_popupulation = generate_population  # the released spelling


def best_and_worst(reward_tensor, w):
    """The responses that a user scores highest and lowest -> two int64 `[prompts]`, equal where all are tied.
    reward_tensor: `[prompts, responses, scorers]`, a tensor or an array, also of objects; w: the mixture `[scorers]`."""
    if not isinstance(reward_tensor, torch.Tensor):
        reward_tensor = torch.from_numpy(np.asarray(reward_tensor, np.float64))
    reward_tensor = reward_tensor if reward_tensor.is_floating_point() else reward_tensor.float()
    scores = reward_tensor @ torch.as_tensor(
        w, dtype=reward_tensor.dtype, device=reward_tensor.device
    )
    best, worst = scores.argmax(1), scores.argmin(1)
    tied = (reward_tensor == reward_tensor[:, :1]).all(2).all(1)  # here rounding would decide
    return best, torch.where(tied, best, worst)


def simulate_user(reward_tensor, features, w):
    """One simulated user's pairs: the embedding of the response scored highest minus that of the one scored lowest.
    reward_tensor: `[prompts, responses, scorers]`; features: `[prompts, responses, d]`, a tensor or nested lists of
    vectors; w: `[scorers]`. Returns float32 `[prompts, d]`."""
    return simulate_population(reward_tensor, features, [w])[0]


def simulate_population(reward_tensor, features, W):
    """`simulate_user` for every row of W `[N, scorers]` -> float32 `[N, prompts, d]`. For many users take `Pairs`."""
    if not isinstance(features, torch.Tensor):
        features = torch.stack(
            [torch.stack(list(map(torch.as_tensor, responses))) for responses in features]
        )
    prompts = torch.arange(len(features))
    choices = (best_and_worst(reward_tensor, w) for w in W)
    return torch.stack(
        [
            features[prompts, best].float() - features[prompts, worst].float()
            for best, worst in choices
        ]
    )


def create_sparse_tensor(dense_tensor, sample_percentage, generator=None):
    """For each user a random share of the prompts, rounded down, as a list of N tensors `[int(share * prompts), d]`.
    dense_tensor: `[N, prompts, d]`; sample_percentage: a share from 0 to 1, as released. InputError: that leaves no pair.
    """
    return sample_shots(
        list(dense_tensor), share_of(dense_tensor.shape[1], sample_percentage), generator
    )


def share_of(prompts, fraction, what="sample_percentage"):
    """How many a fraction of so many prompts is, rounded down. Raises InputError where none is left."""
    if not isinstance(fraction, Real) or not 1 <= fraction * prompts + 1e-9 <= prompts + 1e-6:
        raise InputError(
            f"{what}: fraction {fraction} of {prompts} prompts leaves no pairs for a user, or is more "
            f"than all; give a number from {1 / prompts:.2g} to 1.0, or more prompts"
        )
    return int(
        fraction * prompts + 1e-9
    )  # 0.29 of 100 is 29, not the 28.999.. of the floating-point product


def turn_pairs(row):
    """The pairs of one turn of a dialogue, chosen minus each rejected response: float32 `[rejected, d]`.
    row: `extra_info` holds `chosen_conv_embedding` `[d]` and `rejected_conv_embedding` `[rejected, d]` (released: `[d]`).
    """
    chosen, rejected = (
        torch.as_tensor(row["extra_info"][side]).float()
        for side in ("chosen_conv_embedding", "rejected_conv_embedding")
    )
    return chosen.reshape(1, -1) - rejected.reshape(-1, chosen.numel())


def group_by_dialog(embeddings):
    """user -> conversation -> list of rows, users and conversations in order of their ids.
    embeddings: a list of rows with `user_id` and `dialog_id` in `extra_info`, or a dict of such lists."""
    rows = embeddings if isinstance(embeddings, list) else itertools.chain(*embeddings.values())
    users = {}
    for row in sorted(
        rows, key=lambda row: [str(row["extra_info"][key]) for key in ("user_id", "dialog_id")]
    ):
        users.setdefault(row["extra_info"]["user_id"], {}).setdefault(
            row["extra_info"]["dialog_id"], []
        ).append(row)
    return users


def create_dataset_prism(embeddings):
    """The pairs of each user, users sorted by id: list of float32 `[m_i, d]`. embeddings: see `group_by_dialog`."""
    return create_dataset_prism_shots(embeddings, None)


def create_dataset_prism_shots(embeddings, shots, generator=None):
    """As `create_dataset_prism`, from `shots` conversations of each user (None: all), drawn anew at each call."""
    features = []
    for dialogs in group_by_dialog(embeddings).values():
        drawn = (
            range(len(dialogs))
            if shots is None
            else torch.randperm(len(dialogs), generator=generator)[:shots]
        )
        features.append(
            torch.cat([turn_pairs(row) for i in drawn for row in list(dialogs.values())[i]])
        )
    return features


TEMPERATURE = 100.0  # of the Bradley-Terry model, fixed
FEW_SHOT_ITERATIONS = 500
BLOCK = 1024  # numbers of a pair that the kernel takes at a time; four pairs' lie in a core's first cache
KERNEL_NUMBERS = (
    2**22
)  # in the pairs, from which on a CPU compiles the kernel: seconds, at its first use
CHECKPOINT_SECONDS = 60  # of training that an interruption loses at most


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of a sweep: `K` columns of the wide basis that all members are trained in, side by side."""

    K: int
    alpha: float = 0.0
    seed: int = 0

    def generator(
        self, step
    ):  # of the member's own, so that its start does not depend on its neighbours
        (state,) = np.random.SeedSequence([self.seed, self.K, step]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state) >> 1)

    def start(self, N, d, regularized):
        """The logits and the basis that a training begins with, `[N, K]` and `[K, d]`."""
        generator = self.generator(0)
        return (torch.rand if regularized else torch.randn)(
            N, self.K, generator=generator
        ), torch.randn(self.K, d, generator=generator)


class Likelihood:
    """The Bradley-Terry likelihood of the users' choices under every member of a sweep at once, and its derivatives.
    N users with M pairs in all, G members with C columns in all; P = X V `[M, C]`, w `[N, C]` the user weights.
    counts: pairs of each user; sizes: K of each member; total: the loss is a mean over that many pairs, None: the sum
    over users of each one's mean."""

    def __init__(self, counts, sizes, device, total=None):
        self.counts, self.sizes, self.threads = (
            torch.tensor(counts, device=device),
            list(sizes),
            torch.get_num_threads(),
        )
        self.user = torch.arange(len(counts), device=device).repeat_interleave(self.counts)  # (M,)
        self.weight = 1 / (
            self.counts if total is None else torch.full_like(self.counts, total)
        )  # (N,)
        self.member = torch.tensor(
            [g for g, K in enumerate(sizes) for _ in range(K)], device=device
        )  # (C,)
        self.of_member = torch.nn.functional.one_hot(self.member, len(sizes)).float()  # (C, G)

    def weights(self, W):  # the softmax over each member's logits: (N, C)
        return torch.cat([logits.softmax(1) for logits in W.split(self.sizes, 1)], 1)

    def margins(self, P, w):  # x V w_i / 100 of each pair under each member: (M, G)
        return (P * w[self.user]) @ self.of_member / TEMPERATURE

    def loss(self, P, w):  # negative log-likelihood of each member: (G,)
        return -(self.weight[self.user, None] * logsigmoid(self.margins(P, w))).sum(0)

    def residuals(self, P, w):  # the loss derived by x V w_i, at each column of its member: (M, C)
        return (-self.weight[self.user, None] * torch.sigmoid(-self.margins(P, w)) / TEMPERATURE)[
            :, self.member
        ]

    def by_weights(self, P, r):  # the loss derived by w: (N, C)
        return torch.segment_reduce(r * P, "sum", lengths=self.counts, axis=0)

    def by_logits(self, w, by_weights):  # the loss derived by W, through the softmax: (N, C)
        return w * (by_weights - ((w * by_weights) @ self.of_member)[:, self.member])

    def plain(self, X, w, V, of_weights=True, of_basis=True):
        """The loss derived by w: (N, C), and by V: (C, d), of X `[M, d]` and V `[C, d]` on any device."""
        P = X @ V.T  # (M, C)
        r = self.residuals(P, w)
        return self.by_weights(P, r) if of_weights else None, (
            r * w[self.user]
        ).T @ X if of_basis else None

    def kernel(self, X, w, V, of_weights=True, of_basis=True):
        """The same for many pairs on a CPU: see `_gradients`."""
        numba.set_num_threads(threads := min(self.threads, numba.config.NUMBA_NUM_THREADS))
        size, start = np.array(self.sizes), np.concatenate([[0], np.cumsum(self.counts.numpy())])
        by_weights, by_basis = torch.zeros(w.shape), torch.zeros(threads, *V.shape)
        _gradients(
            X.numpy(),
            start,
            self.weight.numpy(),
            w.numpy(),
            V.numpy(),
            np.cumsum(size) - size,
            size,
            by_weights.numpy(),
            by_basis.numpy(),
            of_weights,
            of_basis,
        )
        return by_weights, by_basis.sum(0)


_zero, _one, _temperature = np.float32([0, 1, TEMPERATURE])
try:  # machine code is kept on disk, or only in this process where no folder for it can be written
    CACHE_KERNEL = bool(numba.njit(cache=True)(process_rank))
except RuntimeError:
    CACHE_KERNEL = False
_four = numba.njit(
    lambda X, p, last, j, end: (  # a block of the numbers of four pairs, or less and the last again
        X[p, j:end],
        X[min(p + 1, last), j:end],
        X[min(p + 2, last), j:end],
        X[min(p + 3, last), j:end],
    )
)


@numba.njit(
    cache=CACHE_KERNEL, parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp", "afn"}
)
def _gradients(X, start, weight, w, V, first, size, by_weights, by_basis, of_weights, of_basis):
    """The kernel: fills by_weights `[N, C]`, and by_basis `[threads, C, d]`, whose sum is the loss derived by V.
    It reads X `[M, d]` once, users shared out among threads: user i's pairs are the rows start[i] to start[i + 1],
    member g's columns first[g] to first[g] + size[g]. The margin x V w_i is taken as x (V w_i): one reward vector
    v_g = V w_i / 100 of a member meets the pairs; s_g, their sum weighted by the residuals, gives both derivatives."""
    threads, G, d, block = (
        len(by_basis),
        len(size),
        X.shape[1],
        BLOCK if len(size) > 1 else X.shape[1],
    )
    for thread in numba.prange(threads):
        v, s, m = (
            np.empty((G, d), np.float32),
            np.empty((G, d), np.float32),
            np.empty((G, 4), np.float32),
        )
        for i in range(thread, len(weight), threads):
            last = start[i + 1] - 1
            for g in range(G):
                v[g], s[g] = _zero, _zero
                for c in range(first[g], first[g] + size[g]):
                    for j in range(d):
                        v[g, j] += w[i, c] / _temperature * V[c, j]
            for p in range(
                start[i], last + 1, 4
            ):  # four pairs, of which a block stays in the cache for all members
                m[:] = _zero
                for j in range(0, d, block):
                    x0, x1, x2, x3 = _four(X, p, last, j, j + block)
                    for g in range(G):
                        vg, m0, m1, m2, m3 = v[g, j : j + block], m[g, 0], m[g, 1], m[g, 2], m[g, 3]
                        for k in range(len(vg)):
                            m0 += x0[k] * vg[k]
                            m1 += x1[k] * vg[k]
                            m2 += x2[k] * vg[k]
                            m3 += x3[k] * vg[k]
                        m[g, 0], m[g, 1], m[g, 2], m[g, 3] = m0, m1, m2, m3
                for q in range(
                    4
                ):  # where there are fewer than four, the last stands in, weighted 0
                    for g in range(G):
                        m[g, q] = (
                            -(weight[i] if p + q <= last else _zero)
                            / (_one + math.exp(m[g, q]))
                            / _temperature
                        )
                for j in range(0, d, block):
                    x0, x1, x2, x3 = _four(X, p, last, j, j + block)
                    for g in range(G):
                        sg, r0, r1, r2, r3 = s[g, j : j + block], m[g, 0], m[g, 1], m[g, 2], m[g, 3]
                        for k in range(len(sg)):
                            sg[k] += r0 * x0[k] + r1 * x1[k] + r2 * x2[k] + r3 * x3[k]
            for g in range(G):
                for c in range(first[g], first[g] + size[g]):
                    total = _zero
                    if of_basis:
                        for j in range(d):
                            by_basis[thread, c, j] += w[i, c] * s[g, j]
                    if of_weights:
                        for j in range(d):
                            total += V[c, j] * s[g, j]
                        by_weights[i, c] = total


@contextlib.contextmanager
def _one_thread_of_torch():
    """Torch's own threads would wait, busily, on the kernel's cores, and for small products longer than these take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread_of_torch()
def _descend(
    likelihood,
    W,
    V,
    derivatives,
    num_iterations,
    learning_rate,
    penalty=None,
    alternating=False,
    checkpoint=None,
    identity=None,
):
    """Adam on the logits W `[N, C]` and, unless it is None, on the basis V `[C, d]`; both are changed in place, and have to
    be contiguous for torch's fused Adam, taken from torch 2.6 on.
    derivatives(w, of_weights, of_basis) are the loss's, penalty(V, t) is `[C]`. Alternating: the step on V sees the new
    W. checkpoint: a `TrainingCheckpoint` to leave the state in and to go on from, which belongs to `identity`."""
    variables = [W] if V is None else [W, V]
    adams = [
        torch.optim.Adam([variable], lr=learning_rate, fused=FUSED_ADAM or None)
        for variable in variables
    ]
    first, saved = 0, time.monotonic()
    if checkpoint and (state := checkpoint.load(identity)):
        for variable, adam, variable_saved, adam_saved in zip(
            variables, adams, state["variables"], state["adams"]
        ):
            variable.copy_(variable_saved)
            adam.load_state_dict(adam_saved)
        first = state["iterations"]
        print(f"resuming the training after {first:,} iterations")
    bar = progress_bar(
        "few-shot" if V is None else "training",
        num_iterations,
        initial=first,
        unit="it",
        leave=False,
    )
    for t in range(first, num_iterations):
        w = likelihood.weights(W)
        by_weights, by_basis = derivatives(w, True, V is not None and not alternating)
        W.grad = likelihood.by_logits(w, by_weights)
        adams[0].step()
        if V is not None:
            if alternating:
                _, by_basis = derivatives(likelihood.weights(W), False, True)
            if process_count() > 1:
                dist.all_reduce(by_basis)
            V.grad = (
                by_basis
                if penalty is None
                else by_basis + torch.func.grad(lambda V: penalty(V, t).sum())(V)
            )
            adams[1].step()
        if checkpoint and (
            t + 1 == num_iterations or time.monotonic() - saved > CHECKPOINT_SECONDS
        ):
            checkpoint.save(
                identity,
                {
                    "iterations": t + 1,
                    "variables": variables,
                    "adams": [adam.state_dict() for adam in adams],
                },
            )
            saved = time.monotonic()
        bar.update()
    bar.close()


@torch.no_grad()
def train_bases(
    features,
    members,
    V_sft,
    num_iterations,
    learning_rate,
    regularized=False,
    device=None,
    checkpoint=None,
):
    """Learn basis and user weights of every member of a sweep together -> list of (w `[N, K]`, V `[d, K]`, loss).
    features: list of float32 `[m_i, d]` (or Pairs), one per user. Members share nothing but the reading of X, as Adam is
    elementwise. V_sft: `[d, 1]`, needed where an alpha is not 0. regularized: as `LoRe_regularized`. checkpoint: a
    `TrainingCheckpoint`, to go on from when it is started again, which the caller clears. loss: without penalty.
    Under torchrun each process holds a part of the users, all return the whole, and nothing is saved on the way."""
    ranks, N, d = process_count(), len(features), features[0].shape[1]
    mine = slice(process_rank(), None, ranks)
    if N < ranks:
        raise InputError(f"{N} users for {ranks} processes; start at most one process per user")
    if any(member.alpha for member in members) and (V_sft is None or not V_sft.any()):
        raise InputError("V_sft: missing or all 0, and alpha is not 0; give the reward head [d, 1]")
    device = torch.device(device or getattr(features[0], "device", "cpu"))
    counts, sizes = list(map(len, features[mine])), [member.K for member in members]
    X = torch.empty(sum(counts), d, device=device)  # (M, d)
    for rows, of_user in zip(X.split(counts), features[mine]):
        rows.copy_(of_user.dense() if isinstance(of_user, Pairs) else of_user)
    likelihood = Likelihood(counts, sizes, device, sum(map(len, features)) if regularized else None)
    W, V = zip(*(member.start(N, d, regularized) for member in members))
    W, V = torch.cat(W, 1)[mine].contiguous().to(device), torch.cat(V).to(device)  # (N, C), (C, d)
    alpha = torch.tensor([m.alpha / (m.K if regularized else 1) for m in members], device=device)[
        likelihood.member
    ]

    def penalty(V, t):  # (C,)
        reference = V_sft.to(V).reshape(1, -1)
        if not regularized:
            return alpha * ((V - reference) ** 2).sum(1)
        share = min(
            max((t / num_iterations - 0.2) / 0.6, 0.0), 1.0
        )  # 0 for 20 % of the iterations, 1 from 80 % on
        return share * alpha * (1 - cosine_similarity(V, reference, dim=1))

    on_kernel = device.type == "cpu" and X.numel() >= KERNEL_NUMBERS
    derivatives = functools.partial(likelihood.kernel if on_kernel else likelihood.plain, X)
    identity, checkpoint = None, None if ranks > 1 else checkpoint
    if checkpoint:
        settings = (
            torch.__version__,
            str(device),
            list(map(len, features)),
            members,
            num_iterations,
            learning_rate,
            regularized,
            None if V_sft is None else V_sft.tolist(),
        )
        identity = (
            hashlib.sha256(repr(settings).encode()).hexdigest()
            + hashlib.sha256(X.cpu().numpy()).hexdigest()
        )
    _descend(
        likelihood,
        W,
        V,
        lambda w, *of: derivatives(w, V, *of),
        num_iterations,
        learning_rate,
        penalty if alpha.any() else None,
        regularized,
        checkpoint,
        identity,
    )
    if not V.isfinite().all():
        if checkpoint:
            checkpoint.clear()
        raise InputError(
            "the training has diverged, its basis is not finite; give a smaller alpha, or smaller pairs"
        )
    w = torch.zeros(N, sum(sizes), device=device)
    w[mine] = likelihood.weights(W)
    loss = likelihood.loss(X @ V.T, w[mine])
    for total in (w, loss) if ranks > 1 else ():
        dist.all_reduce(total)
    return list(zip(w.split(sizes, 1), (V_k.T for V_k in V.split(sizes)), loss.tolist()))


@torch.no_grad()
def fit_weights(scores, members, sizes, num_iterations, learning_rate):
    """Few-shot fit of new users: their weights over each of several frozen bases -> list of w `[N, K]`.
    scores: P_i = X_i V `[m_i, C]` of each user under all bases, constants; members, sizes: Member and K of each."""
    P, N = torch.cat(scores), len(scores)
    likelihood = Likelihood(list(map(len, scores)), sizes, P.device)
    W = torch.cat(
        [
            torch.randn(N, K, generator=dataclasses.replace(member, K=K).generator(1))
            for member, K in zip(members, sizes)
        ],
        1,
    ).to(P.device)
    _descend(
        likelihood,
        W,
        None,
        lambda w, *of: (likelihood.by_weights(P, likelihood.residuals(P, w)), None),
        num_iterations,
        learning_rate,
    )
    return list(likelihood.weights(W).split(sizes, 1))


class LoRe:
    """Low-rank reward model: basis and user weights by one Adam on both.
    Loss: the sum over users of the user's mean negative log-likelihood, plus alpha * sum_j |V_j - V_sft|^2.
    V_sft: `[d, 1]` (None where alpha is 0). num_classes: users N; num_features: d; num_basis_vectors: K."""

    regularized = False

    def __init__(
        self,
        V_sft,
        alpha,
        num_classes,
        num_features,
        num_basis_vectors,
        num_iterations=1000,
        learning_rate=0.5,
        seed=0,
        threshold=0.0,
    ):
        check_settings(
            num_basis_vectors=num_basis_vectors,
            alpha_list=[alpha],
            num_iterations=num_iterations,
            learning_rate=learning_rate,
            seed=seed,
            threshold=threshold,
        )
        self.V_sft = None if V_sft is None else check_head(V_sft, "V_sft", num_features)
        self.shape, self.steps, self.threshold = (
            (num_classes, num_features),
            (num_iterations, learning_rate),
            threshold,
        )
        self.member = Member(num_basis_vectors, float(alpha), seed)

    def train(self, X):
        """X: a float32 `[m_i, d]` per user -> (softmax(W) `[N, K]`, V `[d, K]`). Raises InputError: other users or widths."""
        X = check_features(X, "features", *self.shape)
        w, V, _ = train_bases(X, [self.member], self.V_sft, *self.steps, self.regularized)[0]
        return prune(w, V, self.threshold)


class LoRe_regularized(LoRe):
    """LoRe with alternating steps and a cosine anchor: in each iteration one Adam step on W, then one on V.
    Loss: the mean negative log-likelihood of all pairs, plus alpha_t * mean_j (1 - cos(V_j, V_sft)), so one column feels
    alpha_t / K; alpha_t is 0 for the first 20 % of the iterations, rises linearly and is alpha from 80 % on.
    `train` leaves out columns whose largest user weight is below `threshold` (0 keeps all)."""

    regularized = True

    def __init__(
        self,
        V_sft,
        alpha,
        num_classes,
        num_features,
        num_basis_vectors,
        num_iterations=20000,
        learning_rate=0.5,
        seed=0,
        threshold=1e-2,
    ):
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


def prune(w, V, threshold):
    """Keep the columns whose largest user weight reaches `threshold`, at least the largest -> (w, V)."""
    keep = (largest := w.max(0).values) >= largest.max().clamp(max=threshold)
    return w[:, keep], V[:, keep]


class PersonalizeBatch(LoRe):
    """Few-shot fit of new users' weights with the basis V frozen, from logits drawn from N(0, 1).
    Loss: the sum over users of the user's mean negative log-likelihood. Arguments as of `LoRe`."""

    def __init__(
        self,
        num_classes,
        num_features,
        num_basis_vectors,
        num_iterations=FEW_SHOT_ITERATIONS,
        learning_rate=0.1,
        seed=0,
    ):
        super().__init__(
            None,
            0.0,
            num_classes,
            num_features,
            num_basis_vectors,
            num_iterations,
            learning_rate,
            seed,
        )

    def train(self, X, V):
        """X: list of `[m_i, d]`, one per user; V: `[d, K]`. Returns a list of N simplex vectors `[K]`."""
        scores = pair_scores(
            check_features(X, "features", *self.shape),
            check_matrix(V, "V", self.shape[1], self.member.K),
        )
        return list(fit_weights(list(scores), [self.member], [self.member.K], *self.steps)[0])


SETTINGS = (
    "Train Performance",
    "Seen User Unseen Prompts",
    "Few Shot Train Performance",
    "Unseen User Unseen Prompts",
)
UNSEEN_TEST, VALIDATION = (
    SETTINGS[3],
    "Validation",
)  # the setting that counts; held-out training pairs


@dataclasses.dataclass
class Fit:
    """What a pipeline found at one rank, one alpha, one seed."""

    K: int
    alpha: float
    seed: int
    V: torch.Tensor  # (d, columns), the basis
    W: torch.Tensor  # (N, columns), weights of the seen users
    W_unseen: torch.Tensor  # (N_unseen, columns), weights of the unseen users
    loss: float  # of the training, without the penalty; NaN for the reference, which is not trained
    accuracies: dict = dataclasses.field(
        default_factory=dict
    )  # setting -> float64 array, one accuracy per user


def evaluate_model(X, V, w):
    """The fraction of pairs with a positive margin x V w, a float.
    X: `[m, d]` or Pairs; V: `[d, K]`; w: `[K]`, tensors or arrays. Raises InputError: no pairs, other shapes, NaN."""
    V = check_matrix(V, "V")
    w = w.detach() if isinstance(w, torch.Tensor) else np.asarray(w)
    w = check_matrix(w.reshape(-1, 1), "w", V.shape[1], 1).to(V.device)
    return float(accuracies_per_user([check_matrix(X, "X", None, len(V))], [V], [w.T])[0, 0])


def eval_multiple(W_list, V_list, test_features):
    """`evaluate_model` for every user, with a w `[K]`, a V `[d, K]` and pairs of each -> list of accuracies; prints
    their mean and standard deviation."""
    W_list, V_list, test_features = map(list, (W_list, V_list, test_features))
    if not len(W_list) == len(V_list) == len(test_features) > 0:
        raise InputError(
            f"{len(W_list)} weights, {len(V_list)} bases, {len(test_features)} users; give equally many"
        )
    accuracies = [evaluate_model(X, V, w) for w, V, X in zip(W_list, V_list, test_features)]
    _print_accuracy(accuracies)
    return accuracies


def _print_accuracy(accuracies):
    print(f"Average accuracy: {np.mean(accuracies):.4f}")
    print(f"Standard deviation of accuracy: {np.std(accuracies):.4f}")


def accuracies_per_user(features, bases, weights):
    """Accuracy of each user under each of G models: float64 array `[G, N]`; `[G, N, J]` for J weight vectors a user.
    features: N of `[m_i, d]` or Pairs; bases: G tensors `[d, K]`; weights: G tensors `[N, K]` or `[N, J, K]`."""
    sizes = [V.shape[1] for V in bases]
    right = [
        torch.stack(
            [
                (w[i] @ P.T).gt_(0).sum(-1).double() / len(P)
                for w, P in zip(weights, S.split(sizes, 1))
            ]
        )
        for i, S in enumerate(pair_scores(features, torch.cat(bases, 1)))
    ]
    return torch.stack(right, 1).cpu().numpy()


def fits_per_model(fits):
    """The fits of each row of the tables, one a seed: {(K, alpha): [Fit]}, in the order of the sweep."""
    return {
        row: [fit for fit in fits if (fit.K, fit.alpha) == row]
        for row in dict.fromkeys((fit.K, fit.alpha) for fit in fits)
    }


def accuracy_per_user(fits, setting):
    """The accuracy of each user in a setting, averaged over the seeds of one row: float64 `[users]`."""
    return np.mean([fit.accuracies[setting] for fit in fits], 0)


def toss(features, seed=0):
    """The same pairs, each turned round or not by the toss of a seeded coin, user after user."""
    coin = torch.Generator().manual_seed(seed)
    for X in features:
        heads = torch.rand(len(X), generator=coin) < 0.5
        yield (
            Pairs(
                X.embeddings, X.chosen.where(heads, X.rejected), X.rejected.where(heads, X.chosen)
            )
            if isinstance(X, Pairs)
            else X.where(heads.to(X.device)[:, None], -X)
        )


def hold_out(prompts, share, seed=0):
    """Which pairs of each user are held out: bool `[m_i]`, those of a seeded `share` of the user's prompts.
    prompts: one list of prompts (texts, ids or digests) per user. Raises InputError where a user has one prompt only."""
    chance, held = np.random.default_rng(seed), []
    for i, of_user in enumerate(prompts):
        numbers, distinct = pd.factorize(np.array(of_user, object))
        if len(distinct) < 2:
            raise InputError(
                f"validation_share: user {i} has training pairs of one prompt only; leave this user out"
            )
        count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
        held.append(torch.from_numpy(np.isin(numbers, chance.permutation(len(distinct))[:count])))
    return held


def sweep_members(K_list, alpha_list, seeds):
    """The members of a sweep: alpha outer, rank, seed inner. A whole alpha stays whole, as it is printed."""
    alphas = [alpha if isinstance(alpha, int) else float(alpha) for alpha in alpha_list]
    return [Member(int(K), alpha, int(seed)) for alpha in alphas for K in K_list for seed in seeds]


def _fit(members, parts, V_final, num_iterations, regularized, threshold, device, checkpoint=None):
    """Train the members, fit the unseen users few-shot, evaluate -> a Fit each. parts: features under each setting."""
    trained = [member for member in members if member.K]
    N, N_unseen = (len(parts[setting]) for setting in (SETTINGS[0], SETTINGS[2]))
    bases, fits = (
        iter(
            train_bases(
                parts[SETTINGS[0]],
                trained,
                V_final,
                num_iterations,
                0.5,
                regularized,
                device,
                checkpoint,
            )
            if trained
            else ()
        ),
        [],
    )
    for member in members:
        w, V, loss = (
            next(bases) if member.K else (torch.ones(N, 1, device=device), V_final, math.nan)
        )
        w, V = prune(w, V, threshold)
        fits.append(
            Fit(
                member.K,
                member.alpha,
                member.seed,
                V,
                w,
                torch.ones(N_unseen, 1, device=device),
                loss,
            )
        )
    personal = [fit for fit in fits if fit.V.shape[1] > 1]
    if personal:
        scores = list(pair_scores(parts[SETTINGS[2]], torch.cat([fit.V for fit in personal], 1)))
        weights = fit_weights(
            scores,
            [Member(fit.K, fit.alpha, fit.seed) for fit in personal],
            [fit.V.shape[1] for fit in personal],
            FEW_SHOT_ITERATIONS,
            0.5 if regularized else 0.1,
        )
        for fit, w in zip(personal, weights):
            fit.W_unseen = w
    for setting, features in parts.items():
        weights = [fit.W_unseen if setting in SETTINGS[2:] else fit.W for fit in fits]
        for fit, accuracies in zip(
            fits, accuracies_per_user(features, [fit.V for fit in fits], weights)
        ):
            fit.accuracies[setting] = accuracies
    return fits


def run(
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
    seed=0,
    num_iterations=1000,
    fits=None,
    checkpoint=None,
    validation_share=0,
    prompts=None,
    tossed=None,
    regularized=False,
    threshold=0.0,
):
    """Sweep ranks and penalties: learn LoRe on the seen users, fit the unseen few-shot, evaluate and print.
    K_list: ranks; 0 is the reference model (V_final, every weight 1), 1 the pooled Bradley-Terry model.
    alpha_list: penalties of `LoRe`. V_final: the reward head, float32 `[d, 1]`.
    The four features: one float32 `[m_i, d]` (or Pairs) per user; N and N_unseen: how many users.
    seed: whole number, or several whose accuracies are averaged; all are trained together.
    fits: a list that is extended with a `Fit` per alpha, rank and seed. checkpoint: see `train_bases`.
    validation_share: of each seen user's training prompts, held out; fits then have accuracies of "Validation", too.
    prompts: a list per seen user of what tells the pairs' prompts apart; default every pair has its own.
    tossed: a list that is extended with (K, alpha, accuracies `[N_unseen]`) of the largest rank where no choice means
    anything. All pairs are tossed: an untossed test would still see on which side of any direction their mean lies.
    Returns 8 arrays of length len(alpha_list) * len(K_list), alpha outer: the mean accuracy over users of the four
    SETTINGS, then for each a quarter of the standard deviation over users. Raises InputError on unusable arguments."""
    seeds = seed if isinstance(seed, (list, tuple, range, np.ndarray)) else [seed]
    check_settings(
        K_list=K_list,
        alpha_list=alpha_list,
        seeds=seeds,
        num_iterations=num_iterations,
        threshold=threshold,
        validation_share=validation_share,
    )
    device, V_final = check_device(device), check_head(V_final, "V_final")
    parts = {
        setting: check_features(features, name, users, len(V_final))
        for setting, features, name, users in zip(
            SETTINGS,
            (
                train_features,
                test_features_sparse,
                train_features_unseen,
                test_features_sparse_unseen,
            ),
            (
                "train_features",
                "test_features_sparse",
                "train_features_unseen",
                "test_features_sparse_unseen",
            ),
            (N, N, N_unseen, N_unseen),
        )
    }
    if validation_share:
        train = parts[SETTINGS[0]]
        held = hold_out(prompts or [range(len(X)) for X in train], validation_share)
        parts[VALIDATION], parts[SETTINGS[0]] = (
            [X[rows] for X, rows in zip(train, of)] for of in (held, [~h for h in held])
        )
    members, how = (
        sweep_members(K_list, alpha_list, seeds),
        (V_final.to(device), num_iterations, regularized, threshold, device),
    )
    found = _fit(members, parts, *how, checkpoint)
    largest = max(members, key=lambda member: member.K)
    if tossed is not None and largest.K > 1:
        coins = {
            setting: toss(parts[setting], i)
            for i, setting in enumerate((SETTINGS[0], *SETTINGS[2:]))
        }
        (fit,) = _fit(
            [largest],
            {s: coin if s == UNSEEN_TEST else list(coin) for s, coin in coins.items()},
            *how,
        )
        tossed.append((fit.K, fit.alpha, fit.accuracies[UNSEEN_TEST]))
    if fits is not None:
        fits.extend(found)
    return _report(found, {"alpha": "alpha", "Rank": "K"} if regularized else {"K": "K"})


def _report(fits, lines):
    """Print each model's accuracies and return the eight arrays of `run`; seeds are averaged user by user."""
    means, bands = ([[] for _ in SETTINGS] for _ in range(2))
    for group in fits_per_model(fits).values():
        for label, field in lines.items():
            print(label, ":", getattr(group[0], field))
        for i, setting in enumerate(SETTINGS):
            print(setting)
            accuracies = accuracy_per_user(group, setting)
            _print_accuracy(accuracies)
            means[i].append(np.mean(accuracies))
            bands[i].append(np.std(accuracies) / 4)
    return tuple(np.array(values) for values in means + bands)


def run_regularized(
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
    seed=0,
    num_iterations=20000,
    threshold=1e-2,
    **options,
):
    """`run` with `LoRe_regularized`: alternating steps, a cosine anchor to V_final, unused columns left out.
    threshold: leave out columns whose largest weight among the seen users is below it; 0 keeps all."""
    return run(
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
        regularized=True,
        threshold=threshold,
        **options,
    )


def run_few_shot_vary_shots(
    trials,
    alpha_list,
    K_list,
    num_shots,
    train_features,
    train_features_unseen,
    test_features_sparse_unseen,
    V_final,
    N,
    N_unseen,
    device,
    seed=0,
    num_iterations=500,
    groups=None,
    checkpoint=None,
    of_users=None,
):
    """How the accuracy on unseen users grows with the number of pairs that they are fitted from.
    trials: how often each number of shots is drawn anew; num_shots: list of whole numbers. Otherwise as `run`.
    groups: for each unseen user an int64 `[m_i]` that names the group of each pair, such as its conversation, numbered
    from 0; a shot is then a whole group. of_users: a list that is extended with a dict per alpha, rank and number of
    shots: K, alpha, shots, and under each of SETTINGS[2:] means over trials `[N_unseen]`.
    Returns 4 lists over num_shots (for each alpha and rank in turn, where there are several): mean and standard
    deviation over trials of the few-shot train accuracy, then of the accuracy on unseen users' unseen prompts."""
    check_settings(
        K_list=K_list,
        alpha_list=alpha_list,
        num_shots=num_shots,
        trials=trials,
        seed=seed,
        num_iterations=num_iterations,
    )
    device, V_final = check_device(device), check_head(V_final, "V_final")
    train, train_unseen, test_unseen = (
        check_features(part, name, users, len(V_final))
        for part, name, users in (
            (train_features, "train_features", N),
            (train_features_unseen, "train_features_unseen", N_unseen),
            (test_features_sparse_unseen, "test_features_sparse_unseen", N_unseen),
        )
    )
    if groups is not None:
        check_groups(groups, train_unseen)
    members = sweep_members(K_list, alpha_list, [seed])
    trained = [member for member in members if member.K]
    bases = iter(
        train_bases(
            train, trained, V_final, num_iterations, 0.5, device=device, checkpoint=checkpoint
        )
        if trained
        else ()
    )
    results = ([], [], [], [])
    for member in members:
        V = next(bases)[1] if member.K else V_final.to(device)
        print("K :", member.K)
        S_train, S_test = (list(pair_scores(part, V)) for part in (train_unseen, test_unseen))
        for shots in num_shots:
            print("Shots :", shots)
            found = dict(
                zip(SETTINGS[2:], few_shot_trials(member, S_train, S_test, shots, trials, groups))
            )
            for i, (setting, accuracies) in enumerate(found.items()):
                print(setting)
                _print_accuracy(values := accuracies.mean(1))
                results[2 * i].append(float(np.mean(values)))
                results[2 * i + 1].append(float(np.std(values)))
            if of_users is not None:
                of_users.append(
                    {
                        "K": member.K,
                        "alpha": member.alpha,
                        "shots": shots,
                        **{setting: accuracies.mean(0) for setting, accuracies in found.items()},
                    }
                )
    return results


def few_shot_trials(member, S_train, S_test, shots, trials, groups):
    """Fit every unseen user from `shots` pairs, drawn anew in each trial -> two float64 arrays `[trials, users]`,
    the accuracy on these pairs and on the test pairs. S: the pairs' scores X V `[m_i, K]` of each user."""
    generator = member.generator(2 + shots)
    drawn = [S for _ in range(trials) for S in sample_shots(S_train, shots, generator, groups)]
    w = torch.ones(len(drawn), 1, device=drawn[0].device)
    if member.K > 1:
        (w,) = fit_weights(drawn, [member], [member.K], FEW_SHOT_ITERATIONS, 0.1)
    train = [(S @ w[i] > 0).double().mean().item() for i, S in enumerate(drawn)]
    w = w.reshape(trials, len(S_test), -1)
    test = torch.stack(
        [(S @ w[:, i].T > 0).double().mean(0) for i, S in enumerate(S_test)]
    )  # (users, trials)
    return np.reshape(train, (trials, -1)), test.T.cpu().numpy()


def solve(train_features, num_basis_vectors, num_iterations=1000, learning_rate=0.01, seed=0):
    """Train `LoRe` without a penalty -> (softmax(W) `[N, K]`, V `[d, K]`)."""
    return solve_regularized(
        None, 0.0, train_features, num_basis_vectors, num_iterations, learning_rate, seed
    )


def solve_regularized(
    V_sft,
    alpha,
    train_features,
    num_basis_vectors,
    num_iterations=1000,
    learning_rate=0.01,
    seed=0,
    model=LoRe,
):
    """Train `LoRe` -> (softmax(W) `[N, K]`, V `[d, K]`)."""
    X = check_features(train_features, "train_features")
    return model(
        V_sft, alpha, len(X), X[0].shape[1], num_basis_vectors, num_iterations, learning_rate, seed
    ).train(X)


def solve_regularized_simplex(
    V_sft, alpha, train_features, num_basis_vectors, num_iterations=1000, learning_rate=0.01, seed=0
):
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
    train_features, V, num_iterations=FEW_SHOT_ITERATIONS, learning_rate=0.1, seed=0
):
    """Train `PersonalizeBatch` -> list of N simplex vectors `[K]`."""
    X, V = check_features(train_features, "train_features"), check_matrix(V, "V")
    return PersonalizeBatch(len(X), *V.shape, num_iterations, learning_rate, seed).train(X, V)


def learn_single_reward(train_features, num_iterations=1000, learning_rate=0.01, seed=0):
    """One Bradley-Terry model for all users, LoRe at K = 1 -> V `[d, 1]`. A baseline."""
    return solve(train_features, 1, num_iterations, learning_rate, seed)[1]


def learn_single_reward_regularized(
    V_ref, alpha, train_features, num_iterations=1000, learning_rate=0.01, seed=0
):
    """`learn_single_reward` with the penalty alpha * |V - V_ref|^2 -> V `[d, 1]`. A baseline."""
    return solve_regularized(V_ref, alpha, train_features, 1, num_iterations, learning_rate, seed)[
        1
    ]


def learn_multiple(train_features, num_iterations=1000, learning_rate=0.01, seed=0):
    """A Bradley-Terry model of each user's own -> (N weights `[1]`, all 1, and N bases `[d, 1]`). A baseline."""
    features = check_features(train_features, "train_features")
    V = [learn_single_reward([X], num_iterations, learning_rate, seed) for X in features]
    return [torch.ones(1) for _ in V], V
