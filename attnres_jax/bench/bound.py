"""The bytes that the residual path has to move at least, as far as we know: the two-phase schedule.

Unit: TD = tokens x D x bytes of an activation, for one sublayer. n summaries are complete when a block of S
sublayers opens (the embedding is one of them). The producing matrix product adds to the running sum.
"""

from typing import NamedTuple

from attnres_jax.schedule import BlockSchedule

PLAIN = 8.0
"""Forward: the product adds (2), the norm reads and writes (2). Backward the same."""


class Bound(NamedTuple):
    """TD per sublayer, forward and backward, the mean over all blocks."""

    kept: float
    """Phase 1's results are kept for the backward pass."""
    recomputed: float
    """They are computed again: what is kept is then a plain net's."""


def two_phase(sublayers: int, block_size: int) -> Bound:
    """Of Block AttnRes: each block reads what is complete once in each direction."""
    sizes = BlockSchedule(sublayers, block_size).sizes
    kept = sum(_forward(n, s) + _backward(n, s) for n, s in enumerate(sizes, 1)) / sublayers
    again = sum(n + s for n, s in enumerate(sizes, 1)) / sublayers
    return Bound(kept, kept + again)


def _forward(n, s):
    """Phase 1 reads n, writes S. A read of Phase 2: running sum read and written, output, Phase 1's row,
    result; not for the first of a block. The last output is added into the summary."""
    return n + s + 5 * (s - 1) + 3


def _backward(n, s):
    """Phase 2: cotangents of result and sum, sum, Phase 1's row; both cotangents back. Phase 1: sources,
    their cotangents read and written, those of S results."""
    return 6 * (s - 1) + 3 + 3 * n + s
