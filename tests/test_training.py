"""The three models, step by step against float64 loops over the users, and on users planted from a known basis."""

import contextlib
import threading
import time

import numpy as np
import pytest
import torch
from helpers import input_error, planted_basis, planted_pairs, planted_weights, random_users
from threadpoolctl import threadpool_info, threadpool_limits
from torch.nn.functional import logsigmoid

import utils
from utils import LoRe, LoRe_regularized, Member, Pairs, PersonalizeBatch, fit_basis, pack

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS, d = (1, 40, 3, 7, 1, 12), 9  # ragged users


class Killed(Exception):
    pass


# ---------------------------------------------------------------------------------------------------------------------
# The models written out: one loop over users, float64, autograd
# ---------------------------------------------------------------------------------------------------------------------


def mean_loss_of_user(X, V, logits):
    """The user's mean negative log-likelihood."""
    return -torch.log(torch.sigmoid(X.double() @ V @ torch.softmax(logits, 0) / 100)).mean()


def sum_over_users(features, V, W):
    return sum(mean_loss_of_user(X, V, logits) for X, logits in zip(features, W))


def mean_over_pairs(features, V, W):
    return sum(len(X) * mean_loss_of_user(X, V, logits) for X, logits in zip(features, W)) / sum(map(len, features))


def squared_distance(V, V_sft):
    return sum(((V[:, j] - V_sft.double()[:, 0]) ** 2).sum() for j in range(V.shape[1]))


def one_minus_cosine(V, V_sft):
    reference = V_sft.double()[:, 0]
    return sum(1 - V[:, j] @ reference / V[:, j].norm() / reference.norm() for j in range(V.shape[1])) / V.shape[1]


def start_of(w, V):
    """Logits and basis of a model of 0 iterations: adding a number to a row of W changes nothing, so W = log(w)."""
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
        W.grad, = torch.autograd.grad(mean_over_pairs(features, V, W), [W])
        adam_W.step()
        share = np.interp(t / num_iterations, [0.2, 0.8], [0, 1])
        V.grad, = torch.autograd.grad(mean_over_pairs(features, V, W) + share * alpha * one_minus_cosine(V, V_sft), [V])
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


# ---------------------------------------------------------------------------------------------------------------------
# LoRe
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, 0.2])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_lore_follows_the_plain_loop_over_users(features, V_sft, K, alpha):
    shape = len(COUNTS), d, K
    start = start_of(*LoRe(V_sft, alpha, *shape, num_iterations=0, learning_rate=0.5).train(features))
    ours = LoRe(V_sft, alpha, *shape, num_iterations=40, learning_rate=0.5).train(features)
    assert_same_model(ours, plain_lore(start, features, V_sft, alpha, 40, 0.5))


def test_lore_without_penalty_needs_no_reward_head(features, V_sft):
    with_head, without = (LoRe(head, 0, len(COUNTS), d, 2, 10, 0.5).train(features) for head in (V_sft, None))
    assert torch.equal(with_head[1], without[1])
    with input_error("V_sft"):
        LoRe(None, 1.0, len(COUNTS), d, 2, 10, 0.5).train(features)


def test_lore_starts_from_standard_normal_logits_and_basis(V_sft):
    w, V = LoRe(V_sft, 0, 400, d, 60, 0, 0.5).train(random_users([1] * 400, d))
    difference = torch.log(w[:, 0] / w[:, 1])  # of two logits
    assert difference.std().item() == pytest.approx(2 ** 0.5, rel=0.15)
    assert V.mean().item() == pytest.approx(0, abs=0.15)
    assert V.std().item() == pytest.approx(1, rel=0.15)


def test_a_large_alpha_holds_every_column_at_the_reward_head(features, V_sft):
    _, V = LoRe(V_sft, 1e4, len(COUNTS), d, 3, 400, 0.05).train(features)
    torch.testing.assert_close(V, V_sft.expand(-1, 3), rtol=0, atol=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# LoRe_regularized
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, 1.0])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_regularized_lore_follows_the_plain_alternating_loop(features, V_sft, K, alpha):
    def model(num_iterations):
        return LoRe_regularized(V_sft, alpha, len(COUNTS), d, K, num_iterations, 0.1, threshold=0)

    plain = plain_lore_regularized(start_of(*model(0).train(features)), features, V_sft, alpha, 60, 0.1)
    assert_same_model(model(60).train(features), plain)


def test_the_anchor_is_off_until_a_fifth_and_full_from_four_fifths():
    assert [utils._ramp(t, 1000) for t in (0, 100, 200)] == [0, 0, 0]
    assert [utils._ramp(t, 1000) for t in (350, 500, 650)] == pytest.approx([0.25, 0.5, 0.75])
    assert [utils._ramp(t, 1000) for t in (800, 900, 999)] == [1, 1, 1]


def test_a_large_alpha_turns_every_column_towards_the_reward_head(features, V_sft):
    _, V = LoRe_regularized(V_sft, 1e3, len(COUNTS), d, 3, 400, 0.1, threshold=0).train(features)
    cosines = torch.nn.functional.cosine_similarity(V, V_sft, dim=0)
    assert cosines.min() > 0.999


def test_regularized_lore_starts_from_uniform_logits_and_normal_basis(V_sft):
    w, V = LoRe_regularized(V_sft, 0, 400, d, 60, 0, 0.5, threshold=0).train(random_users([1] * 400, d))
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
    w_left, V_left = LoRe_regularized(V_sft, 0, len(COUNTS), d, 4, 5, 0.5, threshold=2.0).train(features)
    assert torch.equal(V_left, V[:, [largest]]) and torch.equal(w_left, w[:, [largest]])


# ---------------------------------------------------------------------------------------------------------------------
# Few-shot
# ---------------------------------------------------------------------------------------------------------------------


def test_personalize_follows_the_plain_loop_with_the_basis_frozen(features):
    V = planted_basis(d, 3, length=5.0)
    frozen = V.clone()
    start = PersonalizeBatch(len(COUNTS), d, 3, num_iterations=0).train(features, V)
    ours = PersonalizeBatch(len(COUNTS), d, 3, num_iterations=80, learning_rate=0.1).train(features, V)
    assert len(ours) == len(COUNTS) and all(w.shape == (3,) for w in ours)
    assert_same_model([torch.stack(ours)], [plain_personalize(start, features, V, 80, 0.1)])
    assert torch.equal(V, frozen)


def test_personalize_starts_from_standard_normal_logits():
    w = torch.stack(PersonalizeBatch(400, d, 3, 0).train(random_users([1] * 400, d), torch.ones(d, 3)))
    assert torch.log(w[:, 0] / w[:, 1]).std().item() == pytest.approx(2 ** 0.5, rel=0.15)


def test_few_shot_recovers_the_planted_weights():
    V, W = planted_basis(16, 3), planted_weights(6, 3, concentration=2.0)
    w = PersonalizeBatch(6, 16, 3, 500, 0.1).train(planted_pairs(V, W, 8000, sampled=True), V)
    torch.testing.assert_close(torch.stack(w), W, rtol=0, atol=0.06)


def test_a_user_is_fitted_alone_or_in_company_to_the_same_weights():
    V, W = planted_basis(16, 3), planted_weights(5, 3)
    users = planted_pairs(V, W, 60, sampled=True)
    together = PersonalizeBatch(5, 16, 3, 2000, 0.1).train(users, V)
    for X, w in zip(users, together):
        alone, = PersonalizeBatch(1, 16, 3, 2000, 0.1).train([X], V)
        torch.testing.assert_close(alone, w, rtol=0, atol=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# The likelihood under all three
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_batches(monkeypatch):
    """Blocks of at most 8 pairs and batches of 40, so that a few users make several of each."""
    monkeypatch.setattr(utils, "BLOCK_NUMBERS", 8 * d)
    monkeypatch.setattr(utils, "CPU_BATCH_NUMBERS", 40 * d)


@pytest.fixture(params=["torch", "numpy"])
def library(request, monkeypatch):
    """Both libraries that may multiply on a CPU, whichever the tests' machine would take; numpy two members at once."""
    monkeypatch.setattr(utils, "_array_library", lambda device, d: {"torch": torch, "numpy": np}[request.param])
    monkeypatch.setattr(utils, "SMALL_PRODUCT", 2 * 8 * d)
    return request.param


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


@pytest.mark.parametrize("over", ["users", "pairs"])
@pytest.mark.parametrize("sizes", [[4], [1, 2, 4], [2, 2, 2, 1, 2]], ids=str)
def test_loss_and_gradients_are_those_of_autograd_in_float64(features, small_batches, library, over, sizes):
    N, C = len(COUNTS), sum(sizes)
    generator = torch.Generator().manual_seed(3)
    W, V = (torch.randn(*shape, generator=generator) for shape in ((N, C), (d, C)))
    likelihood = utils._Likelihood(features, sizes, total=None if over == "users" else sum(COUNTS))
    assert len(likelihood.batches) > 1 and len(likelihood.user) > N
    w = likelihood.weights(W)
    by_weight, by_basis = likelihood.gradients(w, V.T)
    ours = likelihood.loss(w, V.T), likelihood.gradient_of_logits(w, by_weight), by_basis.T
    for one, plain in zip(ours, plain_loss_and_gradients(features, W, V, sizes, over), strict=True):
        torch.testing.assert_close(one.double(), plain, rtol=1e-4, atol=1e-6)
    for wanted in ({"of_weights": False}, {"of_basis": False}):
        parts = likelihood.gradients(w, V.T, **wanted)
        assert (parts[0] is None) == ("of_weights" in wanted) and (parts[1] is None) == ("of_basis" in wanted)
        assert all(part is None or torch.equal(part, whole) for part, whole in zip(parts, (by_weight, by_basis)))


@pytest.fixture
def three_threads():
    """Three threads of PyTorch and of numpy's BLAS, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with threadpool_limits(3, "blas"):
        yield
    torch.set_num_threads(before)


def many_pairs():
    """Over 2^20 numbers in three batches, which threads share out: features, W, V `[d, C]` and the members' ranks."""
    generator = torch.Generator().manual_seed(4)
    return (random_users([60] * 100, 512), torch.randn(100, 4, generator=generator),
            torch.randn(512, 4, generator=generator), [1, 3])


def test_threads_share_the_batches_of_many_pairs(three_threads, library):
    features, W, V, sizes = many_pairs()
    likelihood = utils._Likelihood(features, sizes)
    assert len(likelihood.shares) == 3
    w = likelihood.weights(W)
    with likelihood.workers():
        shared = [likelihood.gradients(w, V.T) for _ in range(5)]
    torch.set_num_threads(1)
    by_weight, by_basis = likelihood.gradients(w, V.T)  # the same shares in turn
    assert all(torch.equal(one, by_weight) and torch.equal(other, by_basis) for one, other in shared)
    _, by_W, by_V = plain_loss_and_gradients(features, W, V, sizes, "users")
    torch.testing.assert_close(likelihood.gradient_of_logits(w, by_weight).double(), by_W, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(by_basis.T.double(), by_V, rtol=1e-4, atol=1e-6)


def blas_threads():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_each_share_has_one_thread_and_the_libraries_get_theirs_back(three_threads, monkeypatch, ends):
    features, W, V, sizes = many_pairs()
    likelihood, seen, margins = utils._Likelihood(features, sizes), [], utils._Likelihood._margins

    def watched(*arguments):
        seen.append((threading.current_thread().name, torch.get_num_threads(), blas_threads()))
        if ends == "with an error":
            raise Killed
        time.sleep(0.05)  # or one thread might do the work of all
        return margins(*arguments)

    monkeypatch.setattr(utils._Likelihood, "_margins", watched)
    with pytest.raises(Killed) if ends == "with an error" else contextlib.nullcontext(), likelihood.workers():
        likelihood.gradients(likelihood.weights(W), V.T)
    names, torch_threads, of_blas = zip(*seen)
    assert threading.main_thread().name not in names and set(torch_threads) == {1}
    assert all(threads <= {1} for threads in of_blas) and (ends == "with an error" or len(set(names)) == 3)
    assert torch.get_num_threads() == 3 and blas_threads() <= {3}


@pytest.mark.parametrize("threads", [1, 30])
def test_there_are_no_more_threads_than_batches_nor_than_most_threads(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert len(utils._Likelihood(random_users([60] * 100, 512), [1, 3]).shares) == min(threads, 3)
    monkeypatch.setattr(utils, "MOST_THREADS", 2)
    assert len(utils._Likelihood(random_users([60] * 100, 512), [1, 3]).shares) == min(threads, 2)


def test_parameters_that_require_a_gradient_train_like_others(features, V_sft):
    def trained(wrap):
        users, basis = [wrap(X) for X in features], wrap(planted_basis(d, 2))
        return (*LoRe(wrap(V_sft), 0.1, len(COUNTS), d, 2, 5).train(users),
                *utils.learn_multiple_few_shot(users, basis, 5), *utils.learn_multiple(users, 5)[1])

    for one, other in zip(trained(torch.nn.Parameter), trained(torch.clone), strict=True):
        assert torch.equal(one, other) and not one.requires_grad


@pytest.mark.filterwarnings("error")
def test_the_loss_stays_finite_and_exact_for_margins_of_a_million(library):
    X, V = torch.tensor([[1e6], [-1e6], [0.0]]), torch.ones(1, 1)
    likelihood = utils._Likelihood(X.split(1), [1])
    assert likelihood.loss(torch.ones(3, 1), V).item() == pytest.approx(0 + 1e4 + np.log(2))
    by_weight, by_basis = likelihood.gradients(torch.ones(3, 1), V)  # residual * x V, and the sum of residual * x
    assert by_weight.flatten().tolist() == pytest.approx([0, 1e4, 0]) and by_basis.item() == pytest.approx(1e4)


@pytest.mark.parametrize("model", [LoRe, LoRe_regularized])
def test_training_stays_finite_for_margins_of_a_million(model):
    users = random_users([3, 8], d, scale=1e6)
    for result in model(torch.ones(d, 1), 0.1, 2, d, 2, 30, 0.5).train(users):
        assert torch.isfinite(result).all()


# ---------------------------------------------------------------------------------------------------------------------
# The sweep
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularized", [False, True])
def test_a_member_learns_the_same_alone_and_beside_others(features, V_sft, regularized):
    members = [Member(1), Member(3, alpha=0.3), Member(3, alpha=0.3, seed=5), Member(2, alpha=2.0, seed=1), Member(3)]
    together = fit_basis(features, members, V_sft, 40, 0.1, regularized)
    for member, (w, V) in zip(members, together, strict=True):
        alone, = fit_basis(features, [member], V_sft, 40, 0.1, regularized)
        assert_same_model((w, V), [x.double() for x in alone], 1e-4)


def test_frozen_bases_are_fitted_the_same_alone_and_beside_others(features):
    members = [Member(2), Member(5, seed=3), Member(3), Member(2, seed=1), Member(2, 0.5)]
    bases = [planted_basis(d, m.K, seed, length=5.0) for seed, m in enumerate(members)]
    together = utils.fit_users(features, members, bases, 60, 0.1)
    for member, V, w in zip(members, bases, together, strict=True):
        assert_same_model([w], [utils.fit_users(features, [member], [V], 60, 0.1)[0].double()], 1e-4)


@pytest.mark.parametrize("train", [
    lambda seed, features: LoRe(torch.ones(d, 1), 0.1, len(COUNTS), d, 3, 20, 0.1, seed).train(features),
    lambda seed, features: LoRe_regularized(torch.ones(d, 1), 0.1, len(COUNTS), d, 3, 20, 0.1, seed).train(features),
    lambda seed, features: PersonalizeBatch(len(COUNTS), d, 3, 20, 0.1, seed).train(features, planted_basis(d, 3)),
], ids=["LoRe", "LoRe_regularized", "PersonalizeBatch"])
def test_a_seed_fixes_the_result_to_the_bit_whatever_torch_drew_before(features, train):
    first = train(4, features)
    torch.rand(17)
    for one, same, other in zip(first, train(4, features), train(5, features), strict=True):
        assert torch.equal(one, same)
        assert not torch.allclose(one, other)


# ---------------------------------------------------------------------------------------------------------------------
# Planted users
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [LoRe, LoRe_regularized])
def test_planted_users_are_predicted_at_the_planted_rank_and_not_by_one_model_for_all(model):
    V, W = planted_basis(8, 3), planted_weights(60, 3)
    train, test = planted_pairs(V, W, 100), planted_pairs(V, W, 200, seed=1)
    accuracy = {}
    for K in (1, 3):
        w, learned = model(None, 0, 60, 8, K, 1000, 0.5).train(train)
        accuracy[K] = np.mean([((X @ learned @ w[i]) > 0).double().mean().item() for i, X in enumerate(test)])
    assert accuracy[3] > 0.9 > 0.8 > accuracy[1]


def test_k1_is_the_pooled_bradley_terry_model():
    V, W = planted_basis(6, 2, length=150.0), planted_weights(8, 2)
    features = [X[: 20 + 10 * i] for i, X in enumerate(planted_pairs(V, W, 90, sampled=True))]
    theta = torch.zeros(6, 1, dtype=torch.double, requires_grad=True)  # V / 100 at the minimum of the pooled loss
    newton = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def pooled_loss():
        newton.zero_grad()
        loss = -sum(logsigmoid(X.double() @ theta).mean() for X in features)
        loss.backward()
        return loss

    newton.step(pooled_loss)
    w, learned = LoRe(None, 0, 8, 6, 1, 1500, 0.5).train(features)
    assert torch.equal(w, torch.ones(8, 1))
    torch.testing.assert_close(learned.double(), 100 * theta.detach(), rtol=0, atol=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The released functions
# ---------------------------------------------------------------------------------------------------------------------


def test_solve_is_lore_without_penalty_at_a_hundredth(features, V_sft):
    start = start_of(*LoRe(None, 0, len(COUNTS), d, 3, 0).train(features))
    assert_same_model(utils.solve(features, 3, num_iterations=50), plain_lore(start, features, V_sft, 0, 50, 0.01))


def test_solve_regularized_is_lore_with_its_penalty(features, V_sft):
    start = start_of(*LoRe(V_sft, 0.2, len(COUNTS), d, 3, 0).train(features))
    ours = utils.solve_regularized(V_sft, 0.2, features, 3, num_iterations=50, learning_rate=0.1)
    assert_same_model(ours, plain_lore(start, features, V_sft, 0.2, 50, 0.1))


def test_solve_regularized_simplex_is_the_alternating_model(features, V_sft):
    start = start_of(*LoRe_regularized(V_sft, 1.0, len(COUNTS), d, 3, 0, threshold=0).train(features))
    w, V = plain_lore_regularized(start, features, V_sft, 1.0, 50, 0.1)
    used = w.max(0).values >= 1e-2
    ours = utils.solve_regularized_simplex(V_sft, 1.0, features, 3, num_iterations=50, learning_rate=0.1)
    assert_same_model(ours, (w[:, used], V[:, used]))


def test_learn_multiple_few_shot_is_the_few_shot_fit(features):
    V = planted_basis(d, 4, length=5.0)
    start = PersonalizeBatch(len(COUNTS), d, 4, 0).train(features, V)
    ours = utils.learn_multiple_few_shot(features, V, num_iterations=50, learning_rate=0.2)
    assert isinstance(ours, list)
    assert_same_model([torch.stack(ours)], [plain_personalize(start, features, V, 50, 0.2)])


def test_learn_multiple_fits_every_user_a_model_of_their_own(features):
    _, starts = utils.learn_multiple(features, num_iterations=0)
    w, V = utils.learn_multiple(features, num_iterations=60, learning_rate=0.1)
    assert all(torch.equal(one, torch.ones(1)) for one in w) and len(w) == len(V) == len(COUNTS)
    plain = [plain_bradley_terry(X, v[:, 0], 60, 0.1)[:, None] for X, v in zip(features, starts)]
    assert_same_model(V, plain)


def test_learn_multiple_takes_pairs_of_a_table(features):
    table = torch.cat([torch.zeros(1, d), features[1]])
    (_, V), (_, expected) = (utils.learn_multiple([X], num_iterations=20, learning_rate=0.1)
                             for X in (Pairs(table, range(1, 41), [0] * 40), features[1]))
    torch.testing.assert_close(V, expected)


def test_learn_single_reward_fits_one_model_for_all(features, V_sft):
    start = start_of(*LoRe(None, 0, len(COUNTS), d, 1, 0).train(features))
    ours = utils.learn_single_reward(features, num_iterations=60, learning_rate=0.1)
    assert_same_model([ours], plain_lore(start, features, V_sft, 0, 60, 0.1)[1:])


# ---------------------------------------------------------------------------------------------------------------------
# The layout of the pairs
# ---------------------------------------------------------------------------------------------------------------------


def packed_pairs(features, **options):
    """What `pack` made of the users: their pairs in order, one matrix `[pairs, d + 1]` a user, the last column the
    pair's weight; rows of zeros must weigh nothing and fill up what is left."""
    batches, user = pack(features, **options)
    assert torch.cat([torch.arange(len(user))[batch.blocks] for batch in batches]).tolist() == list(range(len(user)))
    found = [[] for _ in features]
    for batch in batches:
        assert batch.X.dtype == torch.float32 and batch.weight.shape == batch.X.shape[:2]
        for of_user, X, weight in zip(user[batch.blocks].tolist(), batch.X, batch.weight):
            pairs = int((weight > 0).sum())
            assert (weight[:pairs] > 0).all() and not X[pairs:].any()
            found[of_user].append(torch.cat([X, weight[:, None]], 1)[:pairs])
    return [torch.cat(blocks) for blocks in found]


@pytest.mark.parametrize("total", [None, 50])
def test_every_pair_stands_in_one_batch_with_its_weight(features, small_batches, total):
    for user, X in zip(packed_pairs(features, total=total), features, strict=True):
        weight = torch.full((len(X), 1), 1 / (total or len(X)))
        ours, plain = (sorted(rows.tolist()) for rows in (user, torch.cat([X, weight], 1)))
        assert ours == plain


def test_blocks_and_batches_stay_small(features, small_batches):
    batches, user = pack(features)
    assert max(batch.X.shape[1] for batch in batches) <= 8 and max(batch.X.numel() for batch in batches) <= 40 * d
    assert user.bincount().tolist() == [1, 5, 1, 1, 1, 2]  # of users with 1, 40, 3, 7, 1 and 12 pairs


def test_slices_other_dtypes_and_pairs_of_a_table_are_packed_alike():
    X = torch.randn(64, d)
    table = Pairs(X, range(10), range(10, 20))
    for users in (X.split(8), [X[10:20], X[0:10]], [X[0:4], X[0:4]], [X[0:8:2], X[8:12]], [X[0:4].bfloat16(), X[4:9]],
                  [X[:, :5][0:3], X[:, :5][3:6]], [table, table[:7]]):
        for packed, user in zip(packed_pairs(users), users, strict=True):
            assert torch.equal(packed[:, :-1], user.dense() if isinstance(user, Pairs) else user.float())


def test_separately_allocated_users_and_pairs_of_a_table_train_the_same_model(features, V_sft):
    slices = torch.cat(features).split(COUNTS)
    table = torch.cat([torch.zeros(1, d), *features])
    ends = np.cumsum(COUNTS)
    pairs = [Pairs(table, range(1 + end - m, 1 + end), [0] * m) for m, end in zip(COUNTS, ends)]
    expected = LoRe(V_sft, 0.1, len(COUNTS), d, 2, 20, 0.5).train(features)
    for same in (slices, pairs):
        for one, other in zip(LoRe(V_sft, 0.1, len(COUNTS), d, 2, 20, 0.5).train(same), expected):
            assert torch.equal(one, other)


@pytest.mark.parametrize("model", [LoRe, LoRe_regularized])
def test_training_leaves_features_and_reward_head_as_they_were(V_sft, model):
    X = torch.cat(random_users(COUNTS, d))
    before, head = X.clone(), V_sft.clone()
    model(V_sft, 0.1, len(COUNTS), d, 2, 10, 0.5).train(X.split(COUNTS))
    assert torch.equal(X, before) and torch.equal(V_sft, head)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [LoRe, LoRe_regularized])
def test_features_that_do_not_fit_the_model_are_refused(features, V_sft, model):
    def train(features, N=len(COUNTS)):
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


def test_personalize_refuses_a_basis_of_another_shape(features):
    with input_error("V", "(9, 4)", "(9, 3)"):
        PersonalizeBatch(len(COUNTS), d, 3).train(features, torch.zeros(d, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularized", [False, True])
def test_an_interrupted_training_goes_on_where_it_was_and_ends_the_same(regularized, tmp_path, monkeypatch, capsys):
    features, path, calls = random_users(COUNTS, d), tmp_path / "state.pt", []
    V_sft, sweep = torch.randn(d, 1), [Member(1, 0.5), Member(3, 0.5)]

    def train(checkpoint=None):
        return fit_basis(features, sweep, V_sft, 30, 0.5, regularized, checkpoint=checkpoint)

    gradient = utils._Likelihood.gradient_of_logits

    def killed_in_iteration_20(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise Killed
        return gradient(*arguments)

    unbroken = train()
    monkeypatch.setattr(utils, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(utils._Likelihood, "gradient_of_logits", killed_in_iteration_20)
    with pytest.raises(Killed):
        train(path)
    assert path.exists()
    resumed = train(path)
    assert len(calls) == 20 + 30 - 19  # the 19 finished iterations were not done again
    assert "after 19 of 30" in capsys.readouterr().out
    for found, expected in zip(resumed, unbroken):
        assert all(torch.equal(*pair) for pair in zip(found, expected))
    train(path)  # of a pipeline that was interrupted after the training
    assert "after 30 of 30" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["pairs", "users", "learning rate", "damaged"])
def test_the_state_of_another_training_is_not_used(other, tmp_path):
    features, path = random_users(COUNTS, d), tmp_path / "state.pt"
    fit_basis(features, [Member(2)], None, 5, 0.5, checkpoint=path)
    learning_rate = 0.4 if other == "learning rate" else 0.5
    if other == "pairs":
        features = random_users(COUNTS, d, seed=1)
    if other == "users":  # the same blocks of pairs, of others
        features = [features[i] for i in (4, 1, 2, 3, 0, 5)]
    if other == "damaged":
        path.write_bytes(path.read_bytes()[:-100])
    (w, V), = fit_basis(features, [Member(2)], None, 5, learning_rate, checkpoint=path)
    (w_expected, V_expected), = fit_basis(features, [Member(2)], None, 5, learning_rate)
    assert torch.equal(w, w_expected) and torch.equal(V, V_expected)


def test_an_interruption_after_the_training_keeps_its_state(tmp_path, monkeypatch):
    features = [random_users([5] * users, d, seed) for seed, users in enumerate((3, 3, 2, 2))]
    monkeypatch.setattr(utils, "fit_users", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        utils.run([2], [0], torch.ones(d, 1), *features, 3, 2, "cpu", num_iterations=4,
                  checkpoint=tmp_path / utils.CHECKPOINT_FILE)
    assert utils.load_pickle(tmp_path / utils.CHECKPOINT_FILE)["iterations"] == 4


@pytest.mark.parametrize("model", [LoRe, LoRe_regularized])
@pytest.mark.parametrize("settings, named", [({"num_basis_vectors": 0}, "num_basis_vectors = 0"), ({"seed": -1}, "-1"),
                                             ({"V_sft": torch.zeros(d, 1), "alpha": 1.0}, "V_sft")])
def test_settings_without_a_meaning_are_refused(model, settings, named):
    settings = {"V_sft": None, "alpha": 0.0, "num_basis_vectors": 2, **settings}
    with input_error(named):
        model(num_classes=len(COUNTS), num_features=d, num_iterations=1, **settings).train(random_users(COUNTS, d))
