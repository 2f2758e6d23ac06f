"""Intervals over users against plain loops, closed forms and planted means."""

import numpy as np
import pytest
import torch
from scipy.stats import t

import lore.intervals
from lore.intervals import interval, joint_intervals, worst_served


def factor_for_few_users(N):
    """What design and textbook say: Student's t for the normal distribution, N - 1 for N."""
    return t.ppf(0.975, N - 1) / 1.959964 * (N / (N - 1)) ** 0.5


def drawn_users(N):
    """The users of each bootstrap draw: DRAWS lists of N numbers."""
    counts = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), lore.intervals.DRAWS)
    return [np.repeat(range(N), draw) for draw in counts]


@pytest.mark.parametrize("N", [7, 40])
def test_an_interval_is_that_of_plain_means_over_drawn_users_wider_for_few_users(N):
    values = np.random.default_rng(1).uniform(-0.3, 0.3, N)
    draws = [np.mean([values[user] for user in users]) for users in drawn_users(N)]
    low, high = np.percentile(draws, (2.5, 97.5))
    mean = values.mean()
    result = interval(values, difference=True)
    assert result["mean"] == pytest.approx(mean)
    assert result["low"] == pytest.approx(mean - factor_for_few_users(N) * (mean - low))
    assert result["high"] == pytest.approx(mean + factor_for_few_users(N) * (high - mean))


def test_what_is_not_known_has_no_interval():
    assert interval(None) is None


def test_an_interval_of_shares_stays_between_0_and_1():
    result = interval(np.array([1.0, 1.0, 1.0, 0.7]))
    assert 0 < result["low"] < 0.9
    assert result["high"] == 1
    assert interval(np.array([0.0, 0.0, 0.3]))["low"] == 0
    assert interval(np.array([-0.2, 0.1, 0.0]), difference=True)["low"] < 0


@pytest.mark.parametrize("N", [6, 9, 15, 38, 100])
def test_intervals_of_however_many_users_cover_the_planted_mean_in_93_to_97_of_100(N):
    generator = np.random.default_rng(N)
    accuracies = generator.binomial(50, 0.6, (1500, N)) / 50
    intervals = [interval(values) for values in accuracies]
    covered = np.mean([found["low"] <= 0.6 <= found["high"] for found in intervals])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("N", [6, 40])
def test_joint_intervals_cover_all_planted_means_at_once_in_91_to_99_of_100(N):
    covered = 0
    for repeat in range(200):
        parts = np.random.default_rng(repeat).binomial(50, 0.6, (N, 4)) / 50 - 0.6
        low, high = joint_intervals(parts)
        covered += (low <= 0).all() and (high >= 0).all()
    assert 0.91 <= covered / 200 <= 0.99


def test_a_joint_interval_is_wider_than_that_of_each_mean_alone():
    parts = np.random.default_rng(0).normal(0.03, 0.05, (40, 3))
    low, high = joint_intervals(parts)
    for m in range(3):
        alone = interval(parts[:, m], difference=True)
        assert low[m] < alone["low"] < alone["high"] < high[m]


def test_differences_are_paired_within_a_user():
    level = np.random.default_rng(0).random(30)  # users differ widely, the two models by a constant
    result = interval((level + 0.02) - level, difference=True)
    assert result["low"] == pytest.approx(0.02)
    assert result["high"] == pytest.approx(0.02)
    assert result["p"] < 1e-4


def test_the_signed_rank_p_is_that_of_a_sum_of_ranks():
    differences = np.random.default_rng(3).normal(0.3, 1, 40)
    ranks = np.abs(differences).argsort().argsort() + 1
    statistic = min(ranks[differences > 0].sum(), ranks[differences < 0].sum())
    z = (statistic - 40 * 41 / 4) / (40 * 41 * 81 / 24) ** 0.5
    expected = torch.special.ndtr(torch.tensor(z, dtype=torch.float64)).item() * 2
    assert interval(differences, difference=True)["p"] == pytest.approx(expected)
    nothing = interval(np.zeros(9), difference=True)
    assert nothing == {"mean": 0, "low": 0, "high": 0, "p": 1}
    rounding_error = 0.1 + 0.2 - 0.3
    assert interval(np.array([rounding_error] * 9), difference=True)["p"] == 1


# ---- The worst served


def lowest_tenth(accuracies):
    """Its mean, by ten copies of every user."""
    copies = np.sort(np.repeat(accuracies, 10))
    return copies[: len(accuracies)].mean()


@pytest.mark.parametrize("N", [5, 10, 25, 40])
def test_the_worst_served_are_the_lowest_tenth_also_if_it_is_not_whole(N):
    accuracies = np.random.default_rng(0).random(N)
    result = worst_served(accuracies)
    assert result["mean"] == pytest.approx(lowest_tenth(accuracies))
    draws = [lowest_tenth(accuracies[users]) for users in drawn_users(N)]
    low, high = np.percentile(draws, (2.5, 97.5))
    mean = result["mean"]
    assert result["low"] == pytest.approx(max(mean - factor_for_few_users(N) * (mean - low), 0))
    assert result["high"] == pytest.approx(min(mean + factor_for_few_users(N) * (high - mean), 1))


def test_of_25_users_the_worst_served_are_two_and_half_of_the_third():
    accuracies = np.array([0.9] * 22 + [0.1, 0.2, 0.4])
    assert worst_served(accuracies)["mean"] == pytest.approx((0.1 + 0.2 + 0.4 / 2) / 2.5)
