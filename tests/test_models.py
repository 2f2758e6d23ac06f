"""The three models and the engine.

The models are compared step by step with float64 loops over the users, and on users planted from a
known basis; the plain likelihood and the kernel with each other and with float64 autograd.
"""

import functools
import gzip
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    fresh_process,
    input_error,
    load_script,
    outcome,
    planted_basis,
    planted_pairs,
    planted_weights,
    random_users,
)
from torch.nn.functional import logsigmoid

import lore.files
import utils
from utils import Likelihood, Pairs, train_bases

# With a seed, two models of equal arguments start from the same numbers.
LoRe = functools.partial(utils.LoRe, seed=0)
LoRe_regularized = functools.partial(utils.LoRe_regularized, seed=0)
PersonalizeBatch = functools.partial(utils.PersonalizeBatch, seed=0)


def Member(K, alpha=0.0, seed=0):
    return utils.Member(K, alpha, seed)


pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = (1, 40, 3, 7, 1, 12)  # ragged users
USERS = len(COUNTS)
d = 9


class Killed(Exception):
    pass


# ---- The models written out: one loop over users, float64, autograd


def mean_loss_of_user(X, V, logits):
    """The user's mean negative log-likelihood."""
    return -torch.log(torch.sigmoid(X.double() @ V @ torch.softmax(logits, 0) / 100)).mean()


def sum_over_users(features, V, W):
    return sum(mean_loss_of_user(X, V, logits) for X, logits in zip(features, W))


def mean_over_pairs(features, V, W):
    return sum(len(X) * mean_loss_of_user(X, V, logits) for X, logits in zip(features, W)) / sum(
        map(len, features)
    )


def squared_distance(V, V_sft):
    return sum(((V[:, j] - V_sft.double()[:, 0]) ** 2).sum() for j in range(V.shape[1]))


def one_minus_cosine(V, V_sft):
    reference = V_sft.double()[:, 0]
    return (
        sum(1 - V[:, j] @ reference / V[:, j].norm() / reference.norm() for j in range(V.shape[1]))
        / V.shape[1]
    )


def start_of(w, V):
    """Logits and basis of a model of 0 iterations.

    A number added to a row of W changes nothing, so W may be log(w).
    """
    return w.double().log().requires_grad_(), V.double().requires_grad_()


def plain_lore(start, features, V_sft, alpha, num_iterations, learning_rate):
    W, V = start
    adam = torch.optim.Adam([W, V], lr=learning_rate)
    for _ in range(num_iterations):
        adam.zero_grad()
        (sum_over_users(features, V, W) + alpha * squared_distance(V, V_sft)).backward()
        adam.step()
    return torch.softmax(W, 1).detach(), V.detach()


def plain_lore_regularized(start, features, V_sft, alpha, num_iterations, learning_rate):
    W, V = start
    adam_W, adam_V = (torch.optim.Adam([variable], lr=learning_rate) for variable in (W, V))
    for t in range(num_iterations):
        (W.grad,) = torch.autograd.grad(mean_over_pairs(features, V, W), [W])
        adam_W.step()
        share = np.interp(t / num_iterations, [0.2, 0.8], [0, 1])
        (V.grad,) = torch.autograd.grad(
            mean_over_pairs(features, V, W) + share * alpha * one_minus_cosine(V, V_sft), [V]
        )
        adam_V.step()
    return torch.softmax(W, 1).detach(), V.detach()


def plain_personalize(start, features, V, num_iterations, learning_rate):
    W, _ = start_of(torch.stack(start), V)
    adam = torch.optim.Adam([W], lr=learning_rate)
    for _ in range(num_iterations):
        adam.zero_grad()
        sum_over_users(features, V.double(), W).backward()
        adam.step()
    return torch.softmax(W, 1).detach()


def plain_bradley_terry(X, v, num_iterations, learning_rate):
    """One user's own model, from v `[d]`."""
    v = v.double().requires_grad_()
    adam = torch.optim.Adam([v], lr=learning_rate)
    for _ in range(num_iterations):
        adam.zero_grad()
        (-torch.log(torch.sigmoid(X.double() @ v / 100)).mean()).backward()
        adam.step()
    return v.detach()


def assert_same_model(ours, plain, tolerance=1e-3):
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def features():
    return random_users(COUNTS, d)


@pytest.fixture
def V_sft():
    return torch.randn(d, 1, generator=torch.Generator().manual_seed(9))


# ---- LoRe


@pytest.mark.parametrize("alpha", [0, 0.2])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_lore_follows_the_plain_loop_over_users(features, V_sft, K, alpha):
    shape = len(COUNTS), d, K
    start = start_of(
        *LoRe(V_sft, alpha, *shape, num_iterations=0, learning_rate=0.5).train(features)
    )
    ours = LoRe(V_sft, alpha, *shape, num_iterations=40, learning_rate=0.5).train(features)
    assert_same_model(ours, plain_lore(start, features, V_sft, alpha, 40, 0.5))


def test_lore_without_penalty_needs_no_reward_head(features, V_sft):
    with_head, without = (
        LoRe(head, 0, len(COUNTS), d, 2, 10, 0.5).train(features) for head in (V_sft, None)
    )
    assert torch.equal(with_head[1], without[1])
    with input_error("V_sft"):
        LoRe(None, 1.0, len(COUNTS), d, 2, 10, 0.5).train(features)


def test_lore_starts_from_standard_normal_logits_and_basis(V_sft):
    w, V = LoRe(V_sft, 0, 400, d, 60, 0, 0.5).train(random_users([1] * 400, d))
    difference = torch.log(w[:, 0] / w[:, 1])  # of two logits
    assert difference.std().item() == pytest.approx(2**0.5, rel=0.15)
    assert V.mean().item() == pytest.approx(0, abs=0.15)
    assert V.std().item() == pytest.approx(1, rel=0.15)


def test_a_large_alpha_holds_every_column_at_the_reward_head(features, V_sft):
    _, V = LoRe(V_sft, 1e4, len(COUNTS), d, 3, 400, 0.05).train(features)
    torch.testing.assert_close(V, V_sft.expand(-1, 3), rtol=0, atol=0.01)


# ---- LoRe_regularized


@pytest.mark.parametrize("alpha", [0, 1.0])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_regularized_lore_follows_the_plain_alternating_loop(features, V_sft, K, alpha):
    def model(num_iterations):
        return LoRe_regularized(V_sft, alpha, len(COUNTS), d, K, num_iterations, 0.1, threshold=0)

    plain = plain_lore_regularized(
        start_of(*model(0).train(features)), features, V_sft, alpha, 60, 0.1
    )
    assert_same_model(model(60).train(features), plain)


def test_a_large_alpha_turns_every_column_towards_the_reward_head(features, V_sft):
    _, V = LoRe_regularized(V_sft, 1e3, len(COUNTS), d, 3, 400, 0.1, threshold=0).train(features)
    cosines = torch.nn.functional.cosine_similarity(V, V_sft, dim=0)
    assert cosines.min() > 0.999


def test_regularized_lore_starts_from_uniform_logits_and_normal_basis(V_sft):
    w, V = LoRe_regularized(V_sft, 0, 400, d, 60, 0, 0.5, threshold=0).train(
        random_users([1] * 400, d)
    )
    difference = torch.log(w[:, 0] / w[:, 1])
    assert difference.abs().max() < 1
    assert difference.std().item() == pytest.approx((1 / 6) ** 0.5, rel=0.1)
    assert V.std().item() == pytest.approx(1, rel=0.15)


def test_regularized_lore_leaves_out_columns_that_no_user_gives_a_hundredth(features, V_sft):
    def train(**threshold):
        return LoRe_regularized(V_sft, 0, len(COUNTS), d, 12, 60, 0.5, **threshold).train(features)

    w, V = train(threshold=0)
    used = [k for k in range(12) if max(w[:, k].tolist()) >= 1e-2]
    assert 1 <= len(used) < 12 and V.shape[1] == 12
    assert_same_model(train(), (w[:, used].double(), V[:, used].double()), 0)


def test_the_most_used_column_always_stays(features, V_sft):
    w, V = LoRe_regularized(V_sft, 0, len(COUNTS), d, 4, 5, 0.5, threshold=0).train(features)
    largest = w.max(0).values.argmax()
    w_left, V_left = LoRe_regularized(V_sft, 0, len(COUNTS), d, 4, 5, 0.5, threshold=1.0).train(
        features
    )
    assert torch.equal(V_left, V[:, [largest]]) and torch.equal(w_left, w[:, [largest]])


# ---- Few-shot


def test_personalize_follows_the_plain_loop_with_the_basis_frozen(features):
    V = planted_basis(d, 3, length=5.0)
    frozen = V.clone()
    start = PersonalizeBatch(len(COUNTS), d, 3, num_iterations=0).train(features, V)
    ours = PersonalizeBatch(len(COUNTS), d, 3, num_iterations=80, learning_rate=0.1).train(
        features, V
    )
    assert len(ours) == len(COUNTS) and all(w.shape == (3,) for w in ours)
    assert_same_model([torch.stack(ours)], [plain_personalize(start, features, V, 80, 0.1)])
    assert torch.equal(V, frozen)


def test_personalize_starts_from_standard_normal_logits():
    w = torch.stack(
        PersonalizeBatch(400, d, 3, 0).train(random_users([1] * 400, d), torch.ones(d, 3))
    )
    assert torch.log(w[:, 0] / w[:, 1]).std().item() == pytest.approx(2**0.5, rel=0.15)


def test_few_shot_recovers_the_planted_weights():
    V, W = planted_basis(16, 3), planted_weights(6, 3, concentration=2.0)
    w = PersonalizeBatch(6, 16, 3, 500, 0.1).train(planted_pairs(V, W, 8000, sampled=True), V)
    torch.testing.assert_close(torch.stack(w), W, rtol=0, atol=0.06)


def test_a_user_is_fitted_alone_or_in_company_to_the_same_weights():
    V, W = planted_basis(16, 3), planted_weights(5, 3)
    users = planted_pairs(V, W, 60, sampled=True)
    together = PersonalizeBatch(5, 16, 3, 2000, 0.1).train(users, V)
    for X, w in zip(users, together):
        (alone,) = PersonalizeBatch(1, 16, 3, 2000, 0.1).train([X], V)
        torch.testing.assert_close(alone, w, rtol=0, atol=0.02)


# ---- The likelihood under all three: plain and kernel

THREADS = [1, 2]


def plain_loss_and_gradients(features, W, V, sizes, over):
    """In float64 by autograd, member by member -> losses (G,), by W (N, C), by V (d, C)."""
    losses, by_W, by_V = [], [], []
    for logits, basis in zip(W.double().split(sizes, 1), V.double().split(sizes, 1)):
        logits, basis = logits.requires_grad_(), basis.requires_grad_()
        loss = (sum_over_users if over == "users" else mean_over_pairs)(features, basis, logits)
        losses.append(loss.detach())
        for gradients, gradient in zip((by_W, by_V), torch.autograd.grad(loss, [logits, basis])):
            gradients.append(gradient)
    return torch.stack(losses), torch.cat(by_W, 1), torch.cat(by_V, 1)


def likelihood_of(features, sizes, over="users"):
    return Likelihood(
        list(map(len, features)),
        sizes,
        torch.device("cpu"),
        None if over == "users" else sum(COUNTS),
    )


def drawn(sizes, N=USERS, width=d):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, sum(sizes), generator=generator), torch.randn(
        sum(sizes), width, generator=generator
    )


WAYS = [("plain", 1), ("kernel", 1), ("kernel", 2)]


@pytest.mark.parametrize("over", ["users", "pairs"])
@pytest.mark.parametrize("sizes", [[4], [1, 2, 4], [2, 2, 2, 1, 2]], ids=str)
def test_both_ways_give_the_loss_and_gradients_of_autograd_in_float64(features, over, sizes):
    W, V = drawn(sizes)
    X, likelihood = torch.cat(features), likelihood_of(features, sizes, over)
    w = likelihood.weights(W)
    loss, by_W, by_V = plain_loss_and_gradients(features, W, V.T, sizes, over)
    torch.testing.assert_close(likelihood.loss(X @ V.T, w).double(), loss, rtol=1e-5, atol=1e-6)
    for way, threads in WAYS:
        torch.set_num_threads(threads)
        grad_w, grad_V = getattr(likelihood, way)(X, w, V)
        torch.testing.assert_close(
            likelihood.grad_logits(w, grad_w).double(), by_W, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(grad_V.T.double(), by_V, rtol=1e-5, atol=1e-6)
        for of_weights in (True, False):
            one, other = getattr(likelihood, way)(X, w, V, of_weights, not of_weights)
            alone, both = (one, grad_w) if of_weights else (other, grad_V)
            torch.testing.assert_close(alone, both, rtol=0, atol=1e-7)


@pytest.mark.parametrize("threads", THREADS)
def test_the_kernel_agrees_with_the_plain_way_on_users_of_every_size_to_a_millionth(threads):
    users, sizes = random_users([*range(1, 14), 100], 257), [1, 5, 2]
    W, V = drawn(sizes, len(users), 257)
    X, likelihood = torch.cat(users), likelihood_of(users, sizes)
    w = likelihood.weights(W)
    torch.set_num_threads(threads)
    plain, kernel = likelihood.plain(X, w, V), likelihood.kernel(X, w, V)
    for one, other in zip(kernel, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * other.abs().max().item())
    assert all(torch.equal(one, other) for one, other in zip(kernel, likelihood.kernel(X, w, V)))


@pytest.mark.parametrize("way, threads", WAYS)
def test_gradients_stay_finite_and_exact_for_margins_of_ten_thousand(way, threads):
    X, V = torch.tensor([[1e6], [-1e6], [0.0]]), torch.ones(1, 1)
    likelihood, w = likelihood_of(X.split(1), [1]), torch.ones(3, 1)
    torch.set_num_threads(threads)
    assert likelihood.loss(X @ V.T, w).item() == pytest.approx(0 + 1e4 + np.log(2))
    grad_w, grad_V = getattr(likelihood, way)(
        X, w, V
    )  # residual * x V, and the sum of residual * x
    assert grad_w.flatten().tolist() == pytest.approx(
        [0, 1e4, 0]
    ) and grad_V.item() == pytest.approx(1e4)
    assert likelihood.grad_w(X, likelihood.residuals(X, w)).flatten().tolist() == pytest.approx(
        [0, 1e4, 0]
    )


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("regularized", [False, True])
def test_a_sweep_on_the_kernel_is_that_of_the_plain_way(
    features, V_sft, regularized, threads, monkeypatch
):
    members = [
        Member(1),
        Member(3, alpha=0.3),
        Member(3, alpha=0.3, seed=5),
        Member(2, alpha=2.0, seed=1),
    ]
    plain = train_bases(features, members, V_sft, 15, 0.1, regularized)
    torch.set_num_threads(threads)
    monkeypatch.setattr(utils, "KERNEL_NUMBERS", 0)
    monkeypatch.setattr(Likelihood, "plain", None)
    on_kernel, again = (
        train_bases(features, members, V_sft, 15, 0.1, regularized) for _ in range(2)
    )
    for (w, V, loss, _), (w_plain, V_plain, loss_plain, _), (w_again, V_again, *_) in zip(
        on_kernel, plain, again
    ):
        assert_same_model((w, V), (w_plain.double(), V_plain.double()))
        assert loss == pytest.approx(loss_plain, rel=1e-4)
        assert torch.equal(w, w_again) and torch.equal(V, V_again)


def demo_features():
    """At most as many pairs as the training of each demo sees, at the stand-in's width."""

    def rows(name):
        with gzip.open(ROOT / name, "rt") as file:
            return [json.loads(line) for line in file]

    prism = sum(
        not m.get("if_chosen")
        for row in rows("PRISM/demo/conversations.jsonl.gz")
        for m in row["conversation_history"]
        if m["role"] == "model"
    )
    population = load_script("PersonalLLM", "train_basis").demo_population
    prompts = len(rows("PersonalLLM/demo/train.jsonl.gz"))
    personal = int(population.N * population.fractions[0] * prompts)
    for pairs in (len(rows("RedditTLDR/demo/train.jsonl.gz")), prism, personal):
        assert pairs > 200
        yield random_users([pairs - 100, 100], 64)


def test_the_demo_size_never_compiles(monkeypatch):
    monkeypatch.setattr(utils, "_gradients", None)
    for features in demo_features():
        train_bases(features, [Member(2)], None, 2, 0.5)


COMPILES = """
import os, torch, utils
assert utils.__file__ == os.path.join(os.environ["PYTHONPATH"], "utils.py")
torch.manual_seed(0)
X, V, w = torch.randn(30, 8), torch.randn(3, 8), torch.softmax(torch.randn(2, 3), 1)
likelihood = utils.Likelihood([10, 20], [3], torch.device("cpu"))
for one, other in zip(likelihood.kernel(X, w, V), likelihood.plain(X, w, V)):
    torch.testing.assert_close(one, other)
print(utils._gradients.stats.cache_path, sum(utils._gradients.stats.cache_hits.values()))
"""


def test_the_machine_code_is_kept_on_disk_also_where_the_checkout_cannot_be_written(tmp_path):
    def compiled(name, home, **environment):
        checkout = tmp_path / name
        if not checkout.exists():
            checkout.mkdir()
            shutil.copy(ROOT / "utils.py", checkout)
            (checkout / "__pycache__").write_text(
                "no folder, so that nothing can be written, not even by root"
            )
        environment = {
            "NUMBA_CACHE_DIR": "",
            "XDG_CACHE_HOME": f"{home}/.cache",
            "HOME": str(home),
            **environment,
        }
        return fresh_process(
            COMPILES, PYTHONPATH=str(checkout), PYTHONDONTWRITEBYTECODE="1", **environment
        )

    nowhere, home = "/dev/null/nowhere", tmp_path / "home"
    in_memory = compiled("a", nowhere)  # no folder at all
    at_home = compiled("b", home)  # the user's cache
    assert outcome(in_memory)[:2] == (0, "None 0\n")
    status, out, err = outcome(at_home)
    assert status == 0 and out.startswith(str(home)) and out.endswith(" 0\n"), err
    assert list(home.rglob("*.nbc"))
    again = compiled(
        "b", home, NUMBA_CACHE_DIR=nowhere
    )  # a folder that someone set and that cannot be made
    assert outcome(again)[1] == out.replace(" 0\n", " 1\n")


# ---- The sweep


@pytest.mark.parametrize("regularized", [False, True])
def test_a_member_learns_the_same_alone_and_beside_others(features, V_sft, regularized):
    members = [
        Member(1),
        Member(3, alpha=0.3),
        Member(3, alpha=0.3, seed=5),
        Member(2, alpha=2.0, seed=1),
        Member(3),
    ]
    together = train_bases(features, members, V_sft, 40, 0.1, regularized)
    for member, (w, V, loss, _) in zip(members, together, strict=True):
        ((w_alone, V_alone, loss_alone, _),) = train_bases(
            features, [member], V_sft, 40, 0.1, regularized
        )
        assert_same_model((w, V), [w_alone.double(), V_alone.double()], 1e-4)
        assert loss == pytest.approx(loss_alone, rel=1e-4)


@pytest.mark.parametrize("regularized", [False, True])
def test_the_loss_of_a_member_is_its_likelihood_without_the_penalty(features, V_sft, regularized):
    loss_of = mean_over_pairs if regularized else sum_over_users
    for w, V, loss, _ in train_bases(
        features, [Member(1, 0.5), Member(3, 0.5)], V_sft, 20, 0.5, regularized
    ):
        assert loss == pytest.approx(
            loss_of(features, V.double(), w.double().log()).item(), rel=1e-4
        )


def test_frozen_bases_are_fitted_the_same_alone_and_beside_others(features):
    members = [Member(2), Member(5, seed=3), Member(3), Member(2, seed=1), Member(2, 0.5)]
    bases = [planted_basis(d, m.K, seed, length=5.0) for seed, m in enumerate(members)]
    starts = [member.few_shot_start(len(features)) for member in members]
    scores = [X @ torch.cat(bases, 1) for X in features]
    together = utils.fit_weights(scores, starts, 60, 0.1)
    for V, start, w in zip(bases, starts, together, strict=True):
        (alone,) = utils.fit_weights([X @ V for X in features], [start], 60, 0.1)
        assert_same_model([w], [alone.double()], 1e-4)


@pytest.mark.parametrize(
    "train",
    [
        lambda seed, features: utils.LoRe(
            torch.ones(d, 1), 0.1, len(COUNTS), d, 3, 20, 0.1, seed
        ).train(features),
        lambda seed, features: utils.LoRe_regularized(
            torch.ones(d, 1), 0.1, len(COUNTS), d, 3, 20, 0.1, seed
        ).train(features),
        lambda seed, features: utils.PersonalizeBatch(len(COUNTS), d, 3, 20, 0.1, seed).train(
            features, planted_basis(d, 3)
        ),
    ],
    ids=["LoRe", "LoRe_regularized", "PersonalizeBatch"],
)
def test_a_seed_fixes_the_result_to_the_bit_whatever_torch_drew_before(features, train):
    first = train(4, features)
    torch.rand(17)
    for one, same, other in zip(first, train(4, features), train(5, features), strict=True):
        assert torch.equal(one, same)
        assert not torch.allclose(one, other)


def test_parameters_that_require_a_gradient_train_like_others(features, V_sft):
    for one, other in zip(
        trained(features, V_sft, torch.nn.Parameter), trained(features, V_sft), strict=True
    ):
        assert torch.equal(one, other) and not one.requires_grad


def trained(features, V_sft, of_user=torch.clone, of_all=list, of_matrix=None):
    """Every model, of features and matrices of some kind."""
    X, wrap = [of_user(X) for X in features], of_matrix or (lambda V: V)
    head, V = wrap(V_sft), wrap(planted_basis(d, 3))
    shape = len(COUNTS), d, 3
    return (
        *LoRe(head, 0.1, *shape, 5).train(of_all(X)),
        *LoRe_regularized(head, 0.1, *shape, 5).train(of_all(X)),
        *PersonalizeBatch(*shape, 5).train(of_all(X), V),
        *utils.learn_multiple(of_all(X), 5, seed=0)[1],
        *utils.learn_multiple_few_shot(of_all(X), V, 5, seed=0),
    )


def as_pairs(X):
    return Pairs(torch.cat([torch.zeros(1, d), X]), range(1, len(X) + 1), [0] * len(X))


@pytest.mark.parametrize(
    "of_user, of_all, of_matrix",
    [
        (torch.Tensor.double, list, torch.Tensor.double),
        (torch.Tensor.numpy, list, torch.Tensor.numpy),
        (lambda X: X.double().numpy(), tuple, lambda V: V.double().numpy()),
        (torch.clone, iter, None),
        (as_pairs, list, None),
        (lambda X: torch.cat([X, X])[len(X) :], list, None),
    ],
    ids=["float64", "numpy", "numpy float64", "generator", "Pairs", "slices"],
)
def test_features_and_bases_of_every_kind_train_the_same_models(
    features, V_sft, of_user, of_all, of_matrix
):
    for one, other in zip(
        trained(features, V_sft, of_user, of_all, of_matrix), trained(features, V_sft), strict=True
    ):
        torch.testing.assert_close(
            one, other, rtol=1e-5, atol=1e-6
        )  # to the rounding of another place in memory


@pytest.mark.parametrize("model", [LoRe, LoRe_regularized])
def test_training_stays_finite_for_margins_of_ten_thousand(model):
    users = random_users([3, 8], d, scale=1e6)
    for result in model(torch.ones(d, 1), 0.1, 2, d, 2, 30, 0.5).train(users):
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("model", [LoRe, LoRe_regularized])
def test_training_leaves_features_and_reward_head_as_they_were(V_sft, model):
    X = torch.cat(random_users(COUNTS, d))
    before, head = X.clone(), V_sft.clone()
    model(V_sft, 0.1, len(COUNTS), d, 2, 10, 0.5).train(X.split(COUNTS))
    assert torch.equal(X, before) and torch.equal(V_sft, head)


# ---- Planted users


@pytest.mark.parametrize("model", [LoRe, LoRe_regularized])
def test_planted_users_are_predicted_at_the_planted_rank_and_not_by_one_model_for_all(model):
    V, W = planted_basis(8, 3), planted_weights(60, 3)
    train, test = planted_pairs(V, W, 100), planted_pairs(V, W, 200, seed=1)
    accuracy = {}
    for K in (1, 3):
        w, learned = model(None, 0, 60, 8, K, 1000, 0.5).train(train)
        accuracy[K] = np.mean(
            [((X @ learned @ w[i]) > 0).double().mean().item() for i, X in enumerate(test)]
        )
    assert accuracy[3] > 0.9 > 0.8 > accuracy[1]


def test_k1_is_the_pooled_bradley_terry_model():
    V, W = planted_basis(6, 2, length=150.0), planted_weights(8, 2)
    features = [X[: 20 + 10 * i] for i, X in enumerate(planted_pairs(V, W, 90, sampled=True))]
    theta = torch.zeros(
        6, 1, dtype=torch.double, requires_grad=True
    )  # V / 100 at the minimum of the pooled loss
    newton = torch.optim.LBFGS(
        [theta], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def pooled_loss():
        newton.zero_grad()
        loss = -sum(logsigmoid(X.double() @ theta).mean() for X in features)
        loss.backward()
        return loss

    newton.step(pooled_loss)
    w, learned = LoRe(None, 0, 8, 6, 1, 1500, 0.5).train(features)
    assert torch.equal(w, torch.ones(8, 1))
    torch.testing.assert_close(learned.double(), 100 * theta.detach(), rtol=0, atol=0.1)


# ---- The models as modules, as a script written for the release uses them


def model_of(kind, V_sft, num_iterations=20, **options):
    return kind(V_sft, 0.3, len(COUNTS), d, 3, num_iterations, 0.1, **options)


def loss_of(model, features, alpha_t=0.3):
    if isinstance(model, utils.LoRe_regularized):
        nll, penalty, _ = model.forward(features, alpha_t)
    else:
        nll, penalty = model.forward(features)
    return nll + penalty


@pytest.mark.parametrize("kind", [utils.LoRe, utils.LoRe_regularized])
def test_forward_is_the_loss_written_out_in_float64(features, V_sft, kind):
    model = model_of(kind, V_sft)
    W, V = model.W.detach().double(), model.V.detach().double()
    if kind is utils.LoRe:
        expected = sum_over_users(features, V, W), 0.3 * squared_distance(V, V_sft)
        found = model(features)
    else:
        weights = W.softmax(1).tolist()
        entropy = np.mean([-sum(p * math.log(p) for p in w) for w in weights])
        expected = mean_over_pairs(features, V, W), 0.3 * one_minus_cosine(V, V_sft), entropy
        found = model(features, 0.3)
    assert [x.detach().item() for x in found] == pytest.approx(
        [float(x) for x in expected], rel=1e-4
    )


def test_forward_of_the_few_shot_model_is_the_loss_written_out_in_float64(features):
    V = planted_basis(d, 3, length=5.0)
    model = utils.PersonalizeBatch(len(COUNTS), d, 3)
    expected = sum_over_users(features, V.double(), model.W.double())
    assert model(features, V).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kind", [utils.LoRe, utils.LoRe_regularized])
def test_the_engine_has_the_derivatives_of_forward(features, V_sft, kind):
    model = model_of(kind, V_sft)
    model.alpha = 0.0
    loss_of(model, features, 0.0).backward()
    regularized = kind is utils.LoRe_regularized
    likelihood = likelihood_of(features, [3], "pairs" if regularized else "users")
    with torch.no_grad():
        w = likelihood.weights(model.W)
        grad_w, grad_V = likelihood.plain(torch.cat(features), w, model.V.T)
        grad_W = likelihood.grad_logits(w, grad_w)
    torch.testing.assert_close(model.W.grad, grad_W, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(model.V.grad, grad_V.T, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [utils.LoRe, utils.LoRe_regularized])
def test_a_subclass_with_the_same_forward_is_trained_by_autograd_to_the_same_model(
    features, V_sft, kind
):
    calls = []

    class Mine(kind):
        def forward(self, *arguments):
            calls.append(1)
            return super().forward(*arguments)

    ours = model_of(kind, V_sft, seed=0, threshold=0).train(features)
    mine = model_of(Mine, V_sft, seed=0, threshold=0).train(features)
    assert len(calls) == (20 if kind is utils.LoRe else 40)
    assert_same_model(ours, [x.double() for x in mine])


def test_a_subclass_may_minimise_another_loss(features):
    class Hinge(utils.LoRe):
        def forward(self, X):
            w = self.W.softmax(1)
            return sum((1 - X_i @ self.V @ w_i).relu().mean() for X_i, w_i in zip(X, w))

    hinge = Hinge(None, 0, len(COUNTS), d, 2, 200, 0.1, seed=0)
    before = hinge(features).item()
    hinge.train(features)
    assert hinge(features).item() < 0.5 * before


def test_a_subclass_of_the_few_shot_model_is_trained_by_autograd(features):
    class Mine(utils.PersonalizeBatch):
        def forward(self, X, V):
            return super().forward(X, V)

    V = planted_basis(d, 3, length=5.0)
    ours, mine = (
        torch.stack(kind(len(COUNTS), d, 3, 30, seed=0).train(features, V))
        for kind in (utils.PersonalizeBatch, Mine)
    )
    torch.testing.assert_close(ours, mine, rtol=1e-3, atol=1e-3)


def test_training_goes_on_from_the_parameters_and_leaves_the_whole_model_in_them(features, V_sft):
    model = utils.LoRe_regularized(V_sft, 0, len(COUNTS), d, 12, 60, 0.5, seed=0)
    with torch.no_grad():
        model.V[:, 0] = 7.0
    w, V = model.train(features)
    assert V.shape[1] < 12 and model.V.shape == (d, 12) and model.W.shape == (len(COUNTS), 12)
    used = model.W.softmax(1).max(0).values >= 1e-2
    assert torch.equal(V, model.V[:, used])
    stay = utils.LoRe(V_sft, 0, len(COUNTS), d, 3, num_iterations=0)
    with torch.no_grad():
        stay.V.fill_(2.0)
        stay.W.zero_()
    w, V = stay.train(features)
    assert torch.equal(V, torch.full((d, 3), 2.0)) and torch.allclose(w, torch.tensor(1 / 3))


def test_a_model_is_an_nn_module(features, V_sft):
    model = model_of(utils.LoRe, V_sft, seed=0).to(torch.device("cpu"))
    assert isinstance(model, torch.nn.Module)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "W": (len(COUNTS), 3),
        "V": (d, 3),
    }
    assert list(model.state_dict()) == ["W", "V"]
    other = model_of(utils.LoRe, V_sft, seed=1)
    other.load_state_dict(model.state_dict())
    for one, same in zip(model.train(features), other.train(features)):
        assert torch.equal(one, same)
    assert model.eval() is model and not model.training
    assert utils.PersonalizeBatch(2, d, 3).eval().training is False


def test_without_a_seed_torchs_generator_chooses_the_start(features, V_sft):
    def drawn(make):
        torch.manual_seed(3)
        return make()

    def starts():
        model = model_of(utils.LoRe, V_sft)
        return model.W.detach(), model.V.detach()

    torch.manual_seed(3)
    expected = torch.randn(len(COUNTS), 3), torch.randn(3, d).T
    assert all(map(torch.equal, drawn(starts), expected))
    for train in (
        lambda: utils.solve(features, 2, 5)[1],
        lambda: utils.solve_regularized_simplex(V_sft, 0.1, features, 2, 5)[1],
        lambda: torch.stack(utils.learn_multiple_few_shot(features, torch.ones(d, 2), 5)),
        lambda: utils.learn_single_reward(features, 5),
    ):
        first, second, other = drawn(train), drawn(train), train()
        assert torch.equal(first, second) and not torch.equal(first, other)


# ---- The released functions


def test_solve_is_lore_without_penalty_at_a_hundredth(features, V_sft):
    start = start_of(*LoRe(None, 0, len(COUNTS), d, 3, 0).train(features))
    assert_same_model(
        utils.solve(features, 3, num_iterations=50, seed=0),
        plain_lore(start, features, V_sft, 0, 50, 0.01),
    )


def test_solve_regularized_is_lore_with_its_penalty(features, V_sft):
    start = start_of(*LoRe(V_sft, 0.2, len(COUNTS), d, 3, 0).train(features))
    ours = utils.solve_regularized(
        V_sft, 0.2, features, 3, num_iterations=50, learning_rate=0.1, seed=0
    )
    assert_same_model(ours, plain_lore(start, features, V_sft, 0.2, 50, 0.1))


def test_solve_regularized_simplex_is_the_alternating_model(features, V_sft):
    start = start_of(
        *LoRe_regularized(V_sft, 1.0, len(COUNTS), d, 3, 0, threshold=0).train(features)
    )
    w, V = plain_lore_regularized(start, features, V_sft, 1.0, 50, 0.1)
    used = w.max(0).values >= 1e-2
    ours = utils.solve_regularized_simplex(
        V_sft, 1.0, features, 3, num_iterations=50, learning_rate=0.1, seed=0
    )
    assert_same_model(ours, (w[:, used], V[:, used]))


def test_learn_multiple_few_shot_is_the_few_shot_fit(features):
    V = planted_basis(d, 4, length=5.0)
    start = PersonalizeBatch(len(COUNTS), d, 4, 0).train(features, V)
    ours = utils.learn_multiple_few_shot(features, V, num_iterations=50, learning_rate=0.2, seed=0)
    assert isinstance(ours, list)
    assert_same_model([torch.stack(ours)], [plain_personalize(start, features, V, 50, 0.2)])


def test_learn_multiple_fits_every_user_a_model_of_their_own(features):
    _, starts = utils.learn_multiple(features, num_iterations=0, seed=0)
    w, V = utils.learn_multiple(features, num_iterations=60, learning_rate=0.1, seed=0)
    assert all(torch.equal(one, torch.ones(1)) for one in w) and len(w) == len(V) == len(COUNTS)
    plain = [plain_bradley_terry(X, v[:, 0], 60, 0.1)[:, None] for X, v in zip(features, starts)]
    assert_same_model(V, plain)


def test_learn_single_reward_fits_one_model_for_all(features, V_sft):
    start = start_of(*LoRe(None, 0, len(COUNTS), d, 1, 0).train(features))
    ours = utils.learn_single_reward(features, num_iterations=60, learning_rate=0.1, seed=0)
    assert_same_model([ours], plain_lore(start, features, V_sft, 0, 60, 0.1)[1:])


def test_learn_single_reward_regularized_is_pulled_to_the_reference(features, V_sft):
    start = start_of(*LoRe(V_sft, 0.2, len(COUNTS), d, 1, 0).train(features))
    ours = utils.learn_single_reward_regularized(
        V_sft, 0.2, features, num_iterations=60, learning_rate=0.1, seed=0
    )
    assert_same_model([ours], plain_lore(start, features, V_sft, 0.2, 60, 0.1)[1:])


# ---- Wrong input


@pytest.mark.parametrize("model", [LoRe, LoRe_regularized])
def test_features_that_do_not_fit_the_model_are_refused(features, V_sft, model):
    def train(features, N=USERS):
        model(V_sft, 0, N, d, 2, 5, 0.5).train(features)

    with input_error("features", "6 users", "7"):
        train(features, N=7)
    with input_error("features", "user 2", "(3, 8)"):
        train([X[:, :8] if i == 2 else X for i, X in enumerate(features)])
    with input_error("features", "user 3", "(0, 9)"):
        train([X[:0] if i == 3 else X for i, X in enumerate(features)])
    with input_error("features", "user 1", "NaN"):
        train([X * float("nan") if i == 1 else X for i, X in enumerate(features)])


@pytest.mark.parametrize("model", [LoRe, LoRe_regularized])
@pytest.mark.parametrize("shape", [(1, 1), (d - 1, 1), (d + 1, 1), (d // 3, 3)])
def test_a_reward_head_of_another_size_is_refused_where_it_is_used(features, model, shape):
    with input_error("V_sft", str(shape)):
        model(torch.ones(shape), 1.0, len(COUNTS), d, 2, 5, 0.5).train(features)


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", math.nan),
        ("learning_rate", -0.1),
        ("learning_rate", 0),
        ("learning_rate", "0.1"),
        ("num_iterations", -1),
        ("num_iterations", 2.5),
        ("num_basis_vectors", 0),
        ("num_basis_vectors", 2.0),
        ("seed", -1),
        ("alpha", math.nan),
        ("alpha", -1.0),
        ("V_sft", torch.zeros(d, 1)),
        ("V_sft", torch.full((d, 1), math.nan)),
    ],
)
def test_settings_without_a_meaning_are_refused(features, V_sft, name, value):
    shape = {"num_classes": len(COUNTS), "num_features": d, "num_iterations": 1}
    for model in (LoRe, LoRe_regularized):
        with input_error(name):
            model(
                **{"V_sft": V_sft, "alpha": 1.0, "num_basis_vectors": 2, **shape, name: value}
            ).train(features)
    if name not in ("alpha", "V_sft"):
        with input_error(name):
            PersonalizeBatch(**{"num_basis_vectors": 2, **shape, name: value}).train(
                features, torch.ones(d, 2)
            )


@pytest.mark.parametrize(
    "function, arguments",
    [
        (utils.solve, [2]),
        (utils.learn_single_reward, []),
        (utils.learn_multiple, []),
        (utils.learn_multiple_few_shot, [torch.ones(d, 2)]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("learning_rate", [math.nan, -0.1])
def test_learning_rates_without_a_meaning_are_refused_everywhere(
    features, function, arguments, learning_rate
):
    with input_error("learning_rate"):
        function(features, *arguments, num_iterations=1, learning_rate=learning_rate)


def test_features_that_cannot_be_used_are_refused_everywhere(features):
    for function, arguments in (
        (utils.solve, [2]),
        (utils.learn_single_reward, []),
        (utils.learn_multiple, []),
        (utils.learn_multiple_few_shot, [torch.ones(d, 2)]),
    ):
        for wrong, named in (
            ([], "0 users"),
            (None, "users"),
            ([*features[:2], features[2] * math.nan], "user 2"),
            ([features[0], features[1][:, :3]], "user 1"),
            ([features[0], "text"], "user 1"),
        ):
            with input_error("train_features", named):
                function(wrong, *arguments, num_iterations=1)


def test_a_training_that_diverges_is_refused(features, V_sft, tmp_path):
    path = tmp_path / "state.pt"
    with input_error("diverged", "alpha"):
        train_bases(
            [X * 1e38 for X in features],
            [Member(2, 1e15)],
            V_sft,
            30,
            1e9,
            checkpoint=lore.files.TrainingCheckpoint(path),
        )
    assert not path.exists()


def test_personalize_refuses_a_basis_of_another_shape(features):
    with input_error("V:", "(9, 4)", "[9, 3]"):
        PersonalizeBatch(len(COUNTS), d, 3).train(features, torch.zeros(d, 4))


# ---- Interruptions


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("regularized", [False, True])
def test_an_interrupted_training_goes_on_where_it_was_and_ends_the_same(
    regularized, kernel, tmp_path, monkeypatch, capsys
):
    features, path, calls = random_users(COUNTS, d), tmp_path / "state.pt", []
    V_sft, sweep = torch.randn(d, 1), [Member(1, 0.5), Member(3, 0.5)]

    if kernel:
        monkeypatch.setattr(utils, "KERNEL_NUMBERS", 0)

    def train(checkpoint=None):
        return train_bases(features, sweep, V_sft, 30, 0.5, regularized, checkpoint=checkpoint)

    grad_logits = Likelihood.grad_logits

    def killed_in_iteration_20(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise Killed
        return grad_logits(*arguments)

    unbroken = train()
    monkeypatch.setattr(utils, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(Likelihood, "grad_logits", killed_in_iteration_20)
    with pytest.raises(Killed):
        train(lore.files.TrainingCheckpoint(path))
    assert path.exists()
    resumed = train(lore.files.TrainingCheckpoint(path))
    assert len(calls) == 20 + 30 - 19  # the 19 finished iterations were not done again
    assert "after 19 iterations" in capsys.readouterr().out
    for found, expected in zip(resumed, unbroken):
        assert (
            torch.equal(found[0], expected[0])
            and torch.equal(found[1], expected[1])
            and found[2] == expected[2]
        )
    train(
        lore.files.TrainingCheckpoint(path)
    )  # of a pipeline that was interrupted after the training
    assert "after 30 iterations" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["pairs", "users", "learning rate", "damaged", "another file"])
def test_the_state_of_another_training_is_not_used(other, tmp_path):
    features, path = random_users(COUNTS, d), tmp_path / "state.pt"
    train_bases(features, [Member(2)], None, 5, 0.5, checkpoint=lore.files.TrainingCheckpoint(path))
    learning_rate = 0.4 if other == "learning rate" else 0.5
    if other == "pairs":
        features = random_users(COUNTS, d, seed=1)
    if other == "users":  # the same blocks of pairs, of others
        features = [features[i] for i in (4, 1, 2, 3, 0, 5)]
    if other == "damaged":
        path.write_bytes(path.read_bytes()[:-100])
    if other == "another file":
        lore.files.save_torch(path, [1, 2])
    ((w, V, *_),) = train_bases(
        features,
        [Member(2)],
        None,
        5,
        learning_rate,
        checkpoint=lore.files.TrainingCheckpoint(path),
    )
    ((w_expected, V_expected, *_),) = train_bases(features, [Member(2)], None, 5, learning_rate)
    assert torch.equal(w, w_expected) and torch.equal(V, V_expected)


def test_an_interruption_after_the_training_keeps_its_state(tmp_path, monkeypatch):
    features = [random_users([5] * users, d, seed) for seed, users in enumerate((3, 3, 2, 2))]
    monkeypatch.setattr(
        utils, "fit_weights", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        utils.run(
            [2],
            [0],
            torch.ones(d, 1),
            *features,
            3,
            2,
            "cpu",
            num_iterations=4,
            checkpoint=lore.files.TrainingCheckpoint(tmp_path / lore.files.CHECKPOINT_FILE),
        )
    assert lore.files.load_pickle(tmp_path / lore.files.CHECKPOINT_FILE)["iterations"] == 4


# ---- Several processes

SHARED = """
import os, sys, torch, utils
from helpers import random_users
users, V_sft = random_users([1, 40, 3, 7, 1, 12, 5], 9), torch.ones(9, 1)
found = {}
for name, numbers in (("plain", sys.maxsize), ("kernel", 0)):
    utils.KERNEL_NUMBERS = numbers
    for regularized in (False, True):
        members = [utils.Member(1, 0.3, 0), utils.Member(3, 0.3, 0)]
        fits = utils.train_bases(users, members, V_sft, 20, 0.1, regularized)
        found[name, regularized] = [(w, V.contiguous(), loss) for w, V, loss, _ in fits]
if utils.process_count() > 1:
    assert utils.process_count() == 2 and torch.distributed.get_world_size() == 2
torch.save(found, f"{sys.argv[1]}.{utils.process_rank()}")
try:
    utils.train_bases(users[:1], [utils.Member(1, seed=0)], None, 1, 0.1)
except utils.InputError as error:
    print(error, flush=True)
os._exit(0)  # torch 2.3 now and then aborts as it ends, when the other process has ended before
"""


def test_two_processes_of_torchrun_learn_what_one_learns(tmp_path):
    (tmp_path / "script.py").write_text(SHARED)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    running = [
        subprocess.Popen(
            [*launcher, tmp_path / "script.py", tmp_path / name],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for launcher, name in (([sys.executable], "one"), (two, "two"))
    ]
    (status, out, err), (status_two, out_two, err_two) = map(outcome, running)
    assert (status, out) == (0, ""), err
    assert status_two == 0 and out_two.count("1 users for 2 processes") == 2, err_two
    one, first, second = (
        lore.files.load_pickle(tmp_path / name)
        if lore.files.ARCHIVES
        else torch.load(tmp_path / name)
        for name in ("one.0", "two.0", "two.1")
    )
    for key, fits in one.items():
        for (w, V, loss), of_first, of_second in zip(fits, first[key], second[key], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(of_first[:2], of_second[:2]))
            assert_same_model((of_first[0], of_first[1]), (w.double(), V.double()), 1e-4)
            assert of_first[2] == of_second[2] == pytest.approx(loss, rel=1e-5)
