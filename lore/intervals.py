"""Intervals over users: how far a mean could be from that of other people like these.

Every draw of the bootstrap takes whole users, never single pairs: the pairs of one user depend
on each other.
"""

import functools

import numpy as np

DRAWS = 2000  # of the bootstrap

# How an interval is written: INTERVAL of an accuracy, DIFFERENCE of a difference of two.
INTERVAL = "{mean:.3f} [{low:.3f}, {high:.3f}]"
DIFFERENCE = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


@functools.cache
def resampled_shares(N: int) -> np.ndarray:
    """The share of each of N users in each bootstrap draw, float64 `[DRAWS, N]`; rows sum to 1.

    `resampled_shares(N) @ values` are the means of all draws. The draws depend on N alone, so
    all quantities of the same users are resampled alike.
    """
    counts = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), DRAWS)
    return counts / N


def interval(values: np.ndarray | None, difference: bool = False) -> dict[str, float] | None:
    """The mean over users and its 95 % bootstrap interval (percentiles).

    values: float64 `[N]`, one per user; None if they are not known.
    difference: the values are differences between two models on the same user. Then `p` is that
    of the Wilcoxon signed-rank test that they are symmetric about 0.
    Returns `{mean, low, high}`, with `p` for a difference; None for None.
    """
    if values is None:
        return None
    low, high = np.percentile(resampled_shares(len(values)) @ values, (2.5, 97.5)).tolist()
    result = {"mean": float(np.mean(values)), "low": low, "high": high}
    if difference:
        result["p"] = signed_rank_p(values)
    return result


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
    the largest deviation of any quantity. A bootstrap of few users is too narrow, so this number
    is taken from the normal distribution to Student's t, and N to N - 1.
    """
    from scipy.stats import norm, t  # here: scipy.stats takes a second to import

    N = len(values)
    freedom = max(N - 1, 1)
    mean = values.mean(0)  # (M,)
    draws = resampled_shares(N) @ values  # (DRAWS, M)
    error = draws.std(0)  # (M,)

    # A quantity without any spread never deviates.
    deviation = np.abs(draws - mean) / np.where(error > 0, error, np.inf)  # (DRAWS, M)
    errors = np.percentile(deviation.max(1), 95)
    half_width = (N / freedom) ** 0.5 * t.ppf(norm.cdf(errors), freedom) * error
    return mean - half_width, mean + half_width
