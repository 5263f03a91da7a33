"""Arms that take turns, so that what drifts (clocks, neighbours, heat) drifts for all of them."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000
"""Draws of the bootstrap."""


def order(arms: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Round and arm, there and back in every round: A B C C B A, A B C C B A."""
    for i in range(rounds):
        yield from ((i, name) for name in (*arms, *reversed(arms)))


def interval(values: Float[np.ndarray, " rounds"], seed: int = 0) -> tuple[float, float]:
    """95 % of the medians of resampled rounds lie in it."""
    drawn = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)
