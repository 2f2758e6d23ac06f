"""Intervals over users: how far a mean could be from that of other people like these.

Every draw of the bootstrap takes whole users, never single pairs: the pairs of one user depend
on each other.
"""

import functools

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

DRAWS = 2000  # of the bootstrap

# How an interval is written: INTERVAL of an accuracy, DIFFERENCE of a difference of two.
INTERVAL = "{mean:.3f} [{low:.3f}, {high:.3f}]"
DIFFERENCE = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]"

WORST_SHARE = 0.1  # of the users, whom `worst_served` is about

Interval = dict[str, float]  # mean, low, high; of a difference also p


@functools.cache
def resampled_shares(N: int) -> np.ndarray:
    """The share of each of N users in each bootstrap draw, float64 `[DRAWS, N]`; rows sum to 1.

    `resampled_shares(N) @ values` are the means of all draws. The draws depend on N alone, so
    all quantities of the same users are resampled alike.
    """
    counts = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), DRAWS)
    return counts / N


def widened(errors: float, N: int) -> float:
    """What a half-width of so many standard errors of the bootstrap should be, in such errors.

    The bootstrap of N users takes the normal distribution for Student's t, and N for N - 1. Its
    intervals of few users are too narrow: those of 6 to 9 users cover 86 to 90 of 100 means.
    """
    freedom = max(N - 1, 1)
    return (N / freedom) ** 0.5 * float(stdtrit(freedom, ndtr(errors)))


def bootstrap_interval(mean: float, draws: np.ndarray, N: int, least: float) -> Interval:
    """The 95 % interval of a mean over N users, within `least` and 1.

    draws: its values in the draws of the bootstrap, float64 `[DRAWS]`. The distances of their
    percentiles from the mean are widened for few users, see `widened`.
    """
    low, high = np.percentile(draws, (2.5, 97.5))
    errors = float(ndtri(0.975))
    factor = widened(errors, N) / errors
    return {
        "mean": float(mean),
        "low": float(max(mean - factor * (mean - low), least)),
        "high": float(min(mean + factor * (high - mean), 1)),
    }


def interval(values: np.ndarray | None, difference: bool = False) -> Interval | None:
    """The mean over users and its 95 % bootstrap interval.

    values: float64 `[N]`, one share per user; None if they are not known.
    difference: the values are differences between two models on the same user. Then `p` is that
    of the Wilcoxon signed-rank test that they are symmetric about 0.
    Returns `{mean, low, high}`, with `p` for a difference; None for None.
    """
    if values is None:
        return None
    N = len(values)
    draws = resampled_shares(N) @ values
    result = bootstrap_interval(np.mean(values), draws, N, least=-1 if difference else 0)
    if difference:
        result["p"] = signed_rank_p(values)
    return result


def worst_served(accuracies: np.ndarray) -> Interval:
    """The mean accuracy of the worst served tenth of the users, with its 95 % bootstrap interval.

    accuracies: float64 `[N]`, one per user. A tenth of N need not be whole: of 25 users it is the
    two lowest and half of the third. In each draw of the bootstrap it is the lowest tenth of the
    users who were drawn.
    """
    N = len(accuracies)
    ascending = np.sort(accuracies)
    mean = lowest_mean(ascending, np.full((1, N), 1 / N))[0]
    draws = lowest_mean(ascending, resampled_shares(N)[:, np.argsort(accuracies)])
    return bootstrap_interval(mean, draws, N, least=0)


def lowest_mean(ascending: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The mean of the lowest WORST_SHARE of the users: float64 `[draws]`.

    ascending: float64 `[N]`. shares: of each of these users in each draw, float64 `[draws, N]`.
    """
    before = shares.cumsum(1) - shares  # (draws, N), the share of all lower users
    taken = np.clip(WORST_SHARE - before, 0, shares)
    return taken @ ascending / WORST_SHARE


def signed_rank_p(differences: np.ndarray) -> float:
    """The p of Wilcoxon's signed-rank test that float64 `[N]` is symmetric about 0."""
    from scipy.stats import wilcoxon  # here: scipy.stats takes a second to import

    # The test ranks the differences. Rounded, equal ones tie in whatever order they were added up.
    differences = differences.round(9)
    if not differences.any():
        return 1.0
    return float(wilcoxon(differences, method="approx").pvalue)


def joint_intervals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of several means over the same users, which hold for all of them at once.

    values: float64 `[N, M]`, M quantities of each of N users. Returns low and high, `[M]` each.
    All half-widths are the same number of standard errors: the 95 % quantile, over the draws, of
    the largest deviation of any quantity, widened for few users.
    """
    N = len(values)
    mean = values.mean(0)  # (M,)
    draws = resampled_shares(N) @ values  # (DRAWS, M)
    error = draws.std(0)  # (M,)

    # A quantity without any spread never deviates.
    deviation = np.abs(draws - mean) / np.where(error > 0, error, np.inf)  # (DRAWS, M)
    errors = np.percentile(deviation.max(1), 95)
    half_width = widened(errors, N) * error
    return mean - half_width, mean + half_width
