"""Which sublayers share a block, and what each read sees: static integers (paper, Block AttnRes)."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class BlockSchedule:
    """`sublayers` L cut into blocks of `block_size` S; the last block takes the remainder."""

    sublayers: int
    block_size: int

    def __post_init__(self):
        if self.sublayers < 1:
            raise ValueError(f"sublayers must be at least 1, got {self.sublayers}")
        if not 1 <= self.block_size <= self.sublayers:
            raise ValueError(
                f"block_size counts sublayers and must lie in 1..{self.sublayers} (all sublayers), "
                f"got {self.block_size}"
            )

    @cached_property
    def openings(self) -> tuple[int, ...]:
        """First sublayer of each block."""
        return tuple(range(0, self.sublayers, self.block_size))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Sublayers of each block, summing to L."""
        return tuple(min(self.block_size, self.sublayers - at) for at in self.openings)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of sources of each of the L + 1 reads; the last is the output read."""
        return tuple(1 - -l // self.block_size for l in range(self.sublayers + 1))

    @cached_property
    def sources(self) -> np.ndarray:
        """0/1 array [L + 1 reads, R sources, L + 1 outputs]: a source is the sum of the outputs marked 1.

        Output 0 is the embedding, output l that of the l-th sublayer. Unused sources are zero rows.
        """
        output = np.arange(self.sublayers + 1)
        of_source = np.arange(max(self.counts))[:, None] == -(-output // self.block_size)
        return (of_source & (output <= output[:, None, None])).astype(np.int8)
