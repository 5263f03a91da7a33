"""Differences between two schemes over paired seeds: mean, interval, and what could have been seen.

With one number a seed (the difference of two runs that share initial weights and data order) the interval is
Student's, at LEVEL of two sides. The minimum detectable difference is the true mean that a two-sided t-test
at 1 - LEVEL would call different from zero with probability POWER, were the standard deviation the measured
one. A smaller difference may be there and not be seen.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
"""Of intervals."""
POWER = 0.8
"""With which the minimum detectable difference is detected."""
GRID = 10_000
"""Points of the integral of it."""


class Difference(NamedTuple):
    """Mean and sample standard deviation of n differences; None where one difference tells nothing."""

    mean: float
    deviation: float | None
    n: int
    half: float | None
    """Of the interval at LEVEL, which lies around the mean."""
    detectable: float | None
    """The minimum detectable difference, at least zero."""


def difference(values: Sequence[float]) -> Difference:
    """The summary of one difference a seed."""
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return Difference(mean, None, 1, None, None)
    deviation = float(np.std(values, ddof=1))
    error = deviation / math.sqrt(n)
    return Difference(mean, deviation, n, _critical(n - 1) * error, detectable(n) * error)


def detectable(n: int) -> float:
    """The minimum detectable difference of n pairs, n >= 2, in standard errors of the mean."""
    critical = _critical(n - 1)
    # scipy's noncentral t gives NaN here: the same integral over the measured over the true deviation.
    measured = np.sqrt(stats.chi2.ppf((np.arange(GRID) + 0.5) / GRID, n - 1) / (n - 1))

    def missing(shift):
        either = stats.norm.cdf(shift - critical * measured) + stats.norm.cdf(-shift - critical * measured)
        return float(np.mean(either)) - POWER

    root: Any = optimize.brentq(missing, 0.0, 4 * critical)
    return float(root)


def _critical(freedom):
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))
