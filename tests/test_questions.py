"""A new user's weights from a few choices, and which question to ask next."""

import dataclasses
import json
import math

import numpy as np
import pytest
import studies
import torch
from helpers import input_error, planted_basis, planted_pairs, planted_weights
from hypothesis import given, settings
from hypothesis import strategies as st

import lore.evidence
import lore.questions
import lore.results
from lore.questions import (
    fit_new_user,
    question_curves,
    question_values,
    seen_prior,
    widened_prior,
)
from lore.study import Study
from utils import Pairs

pytestmark = pytest.mark.usefixtures("one_thread")
D, K = 64, 3


@pytest.fixture(scope="module")
def basis():
    return planted_basis(D, K, length=30.0), planted_weights(7, K)


def study_of(V, seen, unseen, counts):
    """A study whose users choose by planted weights `[users, K]`.

    counts: how many pairs each user has in `train`, `train_unseen` and `test_unseen`.
    """
    return Study(
        title="planted",
        seen=[f"seen {i}" for i in range(len(seen))],
        unseen=[f"unseen {i}" for i in range(len(unseen))],
        train=planted_pairs(V, seen, counts[0]),
        test=planted_pairs(V, seen, 1, seed=3),
        train_unseen=planted_pairs(V, unseen, counts[1], seed=1),
        test_unseen=planted_pairs(V, unseen, counts[2], seed=2),
        reward_head=torch.ones(len(V), 1),
    )


def trained(study, K_list, seeds=(0,), num_iterations=200):
    """A fit of each rank and seed, trained on the seen users."""
    return studies.swept(study, K_list, seeds, num_iterations=num_iterations)


# ---- A new user


def log_sigmoid(z):
    """In plain floats; no exponential overflows."""
    return min(z, 0.0) - math.log1p(math.exp(-abs(z)))


def posterior_in_plain_floats(X, V, W):
    """The posterior and its mean, choice by choice and particle by particle."""
    draws = widened_prior(W).weights[len(W) :]
    particles = torch.cat([W.double(), draws])
    log = [math.log(0.5 / len(W))] * len(W) + [math.log(0.5 / 600)] * 600
    margins = (X.double() @ V.double() @ particles.T).tolist()
    for choice in margins:
        for j, margin in enumerate(choice):
            log[j] += log_sigmoid(margin / 100)
    odds = [math.exp(value - max(log)) for value in log]
    posterior = torch.tensor([value / sum(odds) for value in odds])
    return posterior, (posterior[:, None] * particles).sum(0)


@pytest.mark.parametrize("m", [1, 4, 1000])
def test_a_new_users_weights_are_the_mean_of_the_particles_by_their_posterior(basis, m):
    V, W = basis
    X = planted_pairs(V, W[:1], m, seed=3, sampled=True)[0]
    w, posterior = fit_new_user(X, V, W)
    expected_posterior, expected_w = posterior_in_plain_floats(X, V, W)
    torch.testing.assert_close(posterior, expected_posterior, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(w, expected_w.float(), rtol=1e-4, atol=1e-6)


def problems(test):
    """Runs a test on small problems of all kinds, which are arguments of `problem`."""
    property_of = given(
        N=st.integers(1, 5),
        K=st.integers(1, 4),
        pairs=st.integers(0, 6),
        length=st.sampled_from([1.0, 30.0, 1e3, 1e6]),
        seed=st.integers(0, 10**6),
    )
    return settings(max_examples=30, derandomize=True, deadline=None)(property_of(test))


def problem(N, K, pairs, length, seed):
    """Pairs `[pairs, 5]`, a basis `[5, K]` of the given length, and seen users, signed or not."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(pairs, 5, generator=generator)
    V = length * torch.randn(5, K, generator=generator)
    W = torch.randn(N, K, generator=generator)
    return X, V, W if seed % 2 else W.softmax(1)


@problems
def test_every_new_user_follows_from_bayes_rule(N, K, pairs, length, seed):
    X, V, W = problem(N, K, pairs, length, seed)
    w, posterior = fit_new_user(X, V, W)
    expected_posterior, expected_w = posterior_in_plain_floats(X, V, W)
    # Margins of 1e6 / 100 in float32 are off by .001, and so are the log-likelihoods.
    torch.testing.assert_close(posterior, expected_posterior, rtol=0.01, atol=0.01)
    torch.testing.assert_close(w, expected_w.float(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("m", [1, 4, 1000])
def test_pairs_of_a_table_give_the_same_new_user(basis, m):
    V, W = basis
    X = planted_pairs(V, W[:1], m, seed=3, sampled=True)[0]
    table = torch.cat([X, torch.zeros(1, D)])  # the last row is everybody's rejected answer
    pairs = Pairs(table, list(range(m)), [m] * m)
    torch.testing.assert_close(
        fit_new_user(pairs, V, W), fit_new_user(X, V, W), rtol=1e-4, atol=1e-5
    )


def test_half_of_the_prior_is_the_seen_users_and_half_600_normal_draws(basis):
    _, W = basis
    weights, probability = widened_prior(W)
    assert torch.equal(weights[:7], W.double())
    assert probability[:7].tolist() == pytest.approx([1 / 14] * 7)
    assert probability[7:].tolist() == pytest.approx([1 / 1200] * 600)
    draws = weights[7:]
    torch.testing.assert_close(draws.mean(0), torch.zeros(K).double(), rtol=0, atol=0.08)
    torch.testing.assert_close(draws.T.cov(), torch.eye(K).double() / 4, rtol=0, atol=0.06)


def test_the_draws_are_the_same_in_every_call_and_for_every_seen_user(basis):
    _, W = basis
    torch.manual_seed(1)  # the draws do not depend on it, and do not change it
    draws = widened_prior(W).weights[7:]
    following = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), following)
    torch.manual_seed(2)
    assert torch.equal(widened_prior(W[:2]).weights[2:], draws)


@pytest.mark.parametrize("nothing", [[], torch.zeros(0, D)], ids=["list", "tensor"])
def test_without_choices_a_new_user_is_the_mean_of_the_prior(basis, nothing):
    V, W = basis
    w, posterior = fit_new_user(nothing, V, W)
    draws = widened_prior(W).weights[7:].float()
    torch.testing.assert_close(w, (W.mean(0) + draws.mean(0)) / 2)
    torch.testing.assert_close(posterior, torch.tensor([1 / 14] * 7 + [1 / 1200] * 600))


def test_contradictory_and_extreme_choices_give_finite_weights(basis):
    V, W = basis
    X = 1e4 * torch.randn(500, D, generator=torch.Generator().manual_seed(1))
    for features in (torch.cat([X, -X]), X):
        w, posterior = fit_new_user(features, V, W)
        assert w.isfinite().all()
        assert posterior.sum() == pytest.approx(1, abs=1e-5)
        assert (posterior >= 0).all()


def test_with_one_direction_a_new_user_is_for_or_against_it(basis):
    V = 10 * basis[0][:, :1]
    W = torch.ones(5, 1)
    for true_weight in (1.0, -1.0):
        X = planted_pairs(V, torch.tensor([[true_weight]]), 40)[0]
        w, posterior = fit_new_user(X, V, W)
        assert true_weight * w > 0.5
        assert posterior[:5].tolist() == pytest.approx([posterior[0].item()] * 5)


def test_many_choices_find_the_seen_user_who_makes_them():
    V, W = planted_basis(D, K), torch.eye(K)
    X = planted_pairs(V, W[1:2], 1000, sampled=True)[0]
    w, posterior = fit_new_user(X, V, W)
    assert posterior[1] > 0.99
    torch.testing.assert_close(w, W[1], rtol=0, atol=0.01)


# ---- People unlike all seen ones


LENGTH = 300.0  # of the planted directions: a user's choices are fairly decided
CHOICES = 10


@pytest.fixture(scope="module")
def people():
    """A basis, 40 seen users, and 40 new ones with their choices and test pairs, as scores x V."""
    V = planted_basis(24, K, length=LENGTH)
    like_seen = planted_weights(40, K, 0.3, seed=5)
    new = {"like the seen ones": like_seen, "opposite": -like_seen}
    scores = {}
    for kind, W in new.items():
        choices = planted_pairs(V, W, 30, seed=1, sampled=True)
        test = planted_pairs(V, W, 200, seed=2)
        scores[kind] = [X @ V for X in choices], [X @ V for X in test]
    return planted_weights(40, K, 0.3), scores


def mean_accuracy(weights, tests):
    """The mean over users of the share of test pairs that their weights predict."""
    return np.mean([float((S @ w > 0).float().mean()) for w, S in zip(weights, tests)])


def posterior_mean(choices, prior):
    """A user's weights with a prior, from the scores of the choices."""
    log_likelihood = lore.questions.log_likelihoods(choices, prior).sum(0)
    return ((prior.probability.log() + log_likelihood).softmax(0) @ prior.weights).float()


def accuracies_with_both_priors(people, kind):
    """After ten random choices of each user: with the seen users only, and with all particles."""
    W, scores = people
    choices, tests = scores[kind]
    seen_only = [posterior_mean(S[:CHOICES], seen_prior(W)) for S in choices]
    widened = [fit_new_user(S[:CHOICES], torch.eye(K), W)[0] for S in choices]
    return mean_accuracy(seen_only, tests), mean_accuracy(widened, tests)


def test_people_of_the_opposite_taste_gain_by_the_widened_prior(people):
    seen_only, widened = accuracies_with_both_priors(people, "opposite")
    assert seen_only < 0.5  # no mean of the seen users likes the opposite of all they like
    assert widened > 0.75


def test_people_like_the_seen_ones_lose_little_by_the_widened_prior(people):
    seen_only, widened = accuracies_with_both_priors(people, "like the seen ones")
    assert seen_only > 0.85
    assert widened > seen_only - 0.02


# ---- What to ask


def information_in_plain_floats(x, V, W, posterior):
    """The mutual information of the answer to one pair and the user, from their joint table."""
    margins = (widened_prior(W).weights @ (x.double() @ V.double())).tolist()
    posterior = [q / sum(posterior.tolist()) for q in posterior.tolist()]
    information = 0.0
    for answer in (1, -1):
        joint = [
            q * math.exp(log_sigmoid(answer * margin / 100))
            for q, margin in zip(posterior, margins, strict=True)
        ]
        for p, q in zip(joint, posterior, strict=True):
            if p > 0:
                information += p * math.log(p / (q * sum(joint)))
    return information


def any_posterior(N, seed):
    """A posterior over N seen users and the draws, some of them impossible."""
    odds = torch.rand(N + 600, generator=torch.Generator().manual_seed(seed)) - 0.2
    return odds.clamp(min=0) / odds.clamp(min=0).sum()


def test_a_questions_value_is_the_mutual_information_of_answer_and_user(basis):
    V, W = basis
    X = torch.randn(6, D, generator=torch.Generator().manual_seed(2))
    posterior = any_posterior(7, seed=0)
    values = question_values(X, V, W, posterior)
    for x, value in zip(X, values, strict=True):
        expected = information_in_plain_floats(x, V, W, posterior)
        assert expected > 1e-4
        assert float(value) == pytest.approx(expected, rel=1e-3)
    assert question_values(1e6 * X, V, W, posterior).isfinite().all()


@problems
def test_every_questions_value_is_the_mutual_information(N, K, pairs, length, seed):
    X, V, W = problem(N, K, pairs, length, seed)
    posterior = any_posterior(N, seed)
    values = question_values(X, V, W, posterior)
    expected = [information_in_plain_floats(x, V, W, posterior) for x in X]
    assert values.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_question_is_worth_nothing_if_its_answer_tells_nothing(basis):
    V, W = basis
    X = torch.randn(6, D, generator=torch.Generator().manual_seed(2))
    anybody = any_posterior(7, seed=0)
    known_user = torch.eye(607)[2]
    assert not question_values(X, V, W, known_user).any()
    assert not question_values(0 * X, V, W, anybody).any()  # both answers are the same
    assert not question_values(X, 0 * V, W, anybody).any()  # nobody cares
    assert len(question_values([], V, W, anybody)) == 0


def test_a_posterior_that_does_not_fit_is_one_line(basis):
    V, W = basis
    for posterior in (torch.ones(7) / 7, torch.ones(608) / 608, [], 1.0):
        with input_error("posterior: ", "[607]", "7 seen users and 600 draws", "fit_new_user"):
            question_values(torch.ones(2, D), V, W, posterior)
    with input_error("posterior: NaN"):
        question_values(torch.ones(2, D), V, W, torch.full((607,), math.nan))


def test_many_pairs_are_taken_a_batch_at_a_time_with_the_same_result(monkeypatch, basis):
    V, W = basis
    X = torch.randn(50, D, generator=torch.Generator().manual_seed(2))
    w, posterior = fit_new_user(X, V, W)
    values = question_values(X, V, W, posterior)

    sizes = []
    log_likelihoods = lore.questions.log_likelihoods

    def listening(S, prior):
        table = log_likelihoods(S, prior)
        sizes.append(table.numel())
        return table

    monkeypatch.setattr(lore.questions, "log_likelihoods", listening)
    monkeypatch.setattr(lore.questions, "BATCH_NUMBERS", 5000)
    in_batches = fit_new_user(X, V, W)
    torch.testing.assert_close(in_batches, (w, posterior))
    torch.testing.assert_close(question_values(X, V, W, posterior), values)
    assert max(sizes) <= 5000
    assert sum(sizes) == 2 * 50 * 607


def test_one_stops_asking_when_the_largest_value_is_small(people):
    """Then the rest of the 30 questions adds little."""
    W, scores = people
    choices, tests = scores["like the seen ones"]
    stopped = []
    asked = []
    for S in choices:
        order = lore.questions.chosen_questions(S, widened_prior(W), 30)
        for count in range(31):
            w, posterior = fit_new_user(S[order[:count]], torch.eye(K), W)
            values = question_values(S[order[count:]], torch.eye(K), W, posterior)
            if count == 30 or values.max() < 0.05:
                break
        stopped.append(w)
        asked.append(count)
    all_answered = [fit_new_user(S, torch.eye(K), W)[0] for S in choices]
    assert np.mean(asked) < 20
    assert mean_accuracy(stopped, tests) > mean_accuracy(all_answered, tests) - 0.02


def test_the_five_questions_of_the_largest_values_may_be_asked_at_once(people):
    W, scores = people
    choices, tests = scores["like the seen ones"]
    basis = torch.eye(K)
    weights = {"one by one": [], "at once": [], "random": []}
    for S in choices:
        one_by_one = lore.questions.chosen_questions(S, widened_prior(W), 5)
        _, posterior = fit_new_user([], basis, W)
        at_once = question_values(S, basis, W, posterior).topk(5).indices
        for name, asked in (("one by one", one_by_one), ("at once", at_once), ("random", slice(5))):
            weights[name].append(fit_new_user(S[asked], basis, W)[0])
    accuracy = {name: mean_accuracy(w, tests) for name, w in weights.items()}
    assert accuracy["at once"] > accuracy["random"] + 0.01
    assert accuracy["at once"] > accuracy["one by one"] - 0.04


# ---- Accuracy by the number of questions


@pytest.fixture(scope="module")
def planted():
    V, W = planted_basis(24, K), planted_weights(60, K, concentration=0.1)
    return study_of(V, W[:40], W[40:], counts=(40, 30, 60))


@pytest.fixture(scope="module")
def planted_fits(planted):
    return trained(planted, [0, 1, K])


def test_chosen_questions_tell_more_than_random_ones(planted, planted_fits):
    frame = question_curves(planted_fits, planted, questions=4, trials=5)
    assert list(frame) == ["K", "alpha", "fit", "questions", "mean", "low", "high"]
    mean = frame.pivot(index="questions", columns="fit", values="mean")
    assert set(mean.columns) == set(lore.questions.METHODS)
    for prior in ("seen users only", "widened prior"):
        chosen = mean[f"{prior}, chosen"]
        assert (chosen > mean[f"{prior}, random"])[1:].all()
        assert chosen[4] > 0.8
    assert mean["released fit, random"][4] > mean["released fit, random"][1]


def test_the_curves_gain_by_the_widened_prior_if_new_people_have_the_opposite_taste(planted):
    V = planted_basis(24, K)
    W = planted_weights(60, K, concentration=0.1)
    study = study_of(V, W[:40], -W[40:], counts=(40, 30, 60))
    frame = question_curves(trained(study, [K]), study, questions=4, trials=5)
    mean = frame.pivot(index="questions", columns="fit", values="mean").loc[4]
    for how in ("random", "chosen"):
        assert mean[f"widened prior, {how}"] > mean[f"seen users only, {how}"] + 0.1


def test_the_curves_ask_and_fit_as_question_values_and_fit_new_user_do(basis):
    V, W = basis
    S = planted_pairs(V, W[:1], 8, sampled=True)[0] @ (10 * V)  # decided: no two values are close
    prior = widened_prior(W)
    asked = []
    expected = []
    for _ in range(5):
        _, posterior = fit_new_user(S[asked], torch.eye(K), W)
        values = question_values(S, torch.eye(K), W, posterior)
        left = [i for i in range(8) if i not in asked]
        asked.append(max(left, key=lambda i: values[i]))
        expected.append(fit_new_user(S[asked], torch.eye(K), W)[0])
    order = lore.questions.chosen_questions(S, prior, 5)
    assert order.tolist() == asked
    weights = lore.questions.weights_after_questions(S[order[None]], prior, 7)[0]
    torch.testing.assert_close(weights, torch.stack(expected + expected[-1:] * 2))


def test_ranks_without_user_weights_have_no_curves(planted, planted_fits):
    with_weights = question_curves(planted_fits, planted, questions=1, trials=1)
    assert set(with_weights["K"]) == {K}
    without_weights = [fit for fit in planted_fits if fit.K < 2]
    assert len(without_weights) == 2
    assert question_curves(without_weights, planted, questions=4, trials=5).empty


def test_the_questions_of_a_trained_model_need_no_training_pairs(planted, planted_fits):
    without = dataclasses.replace(planted, train=[], test=[])
    frame = question_curves(planted_fits, without, questions=2, trials=1)
    assert frame.equals(question_curves(planted_fits, planted, questions=2, trials=1))


def test_seeds_are_averaged_within_a_user(basis):
    V, W = basis
    study = study_of(V, W, W, counts=(10, 4, 30))
    fits = trained(study, [2], seeds=(0, 1), num_iterations=5)
    together = question_curves(fits, study, questions=2, trials=2)
    alone = [question_curves([fit], study, questions=2, trials=2)["mean"] for fit in fits]
    assert not np.allclose(*alone)
    np.testing.assert_allclose(together["mean"], np.mean(alone, axis=0))


def test_random_questions_are_drawn_without_repetition_and_chosen_ones_never_asked_twice(basis):
    V, W = basis
    S = planted_pairs(V, W[:1], 6)[0] @ V
    prior = widened_prior(W)
    drawn = lore.questions.random_questions(6, 4, trials=50, generator=torch.Generator())
    assert drawn.shape == (50, 4)
    for order in [*drawn.tolist(), lore.questions.chosen_questions(S, prior, 9).tolist()]:
        assert len(set(order)) == len(order)
    assert len(lore.questions.chosen_questions(S, prior, 9)) == 6  # all there are


def test_no_more_questions_are_asked_than_there_are(basis):
    V, W = basis
    study = study_of(V, W, W, counts=(5, 5, 5))
    fits = trained(study, [2], num_iterations=5)
    assert question_curves(fits, study, questions=9, trials=2)["questions"].max() == 5


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_unusable_numbers_of_questions_and_trials_are_one_line(planted, planted_fits, wrong):
    with input_error("num_questions: "):
        question_curves(planted_fits, planted, questions=wrong, trials=2)
    with input_error("trials: "):
        question_curves(planted_fits, planted, questions=2, trials=wrong)


# ---- Weights that are no simplex


def test_reports_take_signed_weights(monkeypatch, basis, tmp_path):
    """Of seen and of unseen users, such as those of `fit_new_user`."""
    monkeypatch.setattr(lore.results, "save_pictures", lambda *_: None)  # these take seconds
    V, W = basis
    study = study_of(10 * V, W, -W, counts=(20, 20, 20))
    (fit,) = trained(study, [K], num_iterations=50)
    signed = torch.tensor([[-0.5, 0.5, 0.0], [0.0, 0.0, -2.0]])  # entropies: ln 2, and 0
    fit = dataclasses.replace(
        fit,
        W=torch.cat([signed, signed, signed, signed[:1]]),
        W_unseen=torch.stack([fit_new_user(X, fit.V, fit.W)[0] for X in study.train_unseen]),
    )
    assert (fit.W_unseen < 0).any()
    evidence = lore.evidence.evidence([fit], study, None)
    basis_found = evidence["evidence"][0]["basis"]
    assert basis_found["mean_weight_entropy"] == pytest.approx(4 / 7 * math.log(2))
    config = {"K_list": [K], "alpha_list": [0], "seeds": [0]}
    results = lore.results.save_results(tmp_path, [fit], study, config, 1.0, evidence)
    json.loads(json.dumps(results, allow_nan=False))
    assert "nan" not in (tmp_path / "report.md").read_text()
