"""The pipeline's timetable as data: interleaved 1F1B, and the block summaries that each hop carries.

P stages hold V virtual stages each; chunk c = v P + p, of C = P V, runs on stage p. All stages keep step: in
one tick a stage runs at most one chunk forward and one backward, and what it sends arrives for the next tick.
Numbers of blocks are those of histories: 0 is the embedding, which every stage looks up itself, 1..N are the
AttnRes blocks; the running sum of an open block is the newest of them. A *unit* is one activation [B,T,D] of
a microbatch.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from attnres_jax.schedule import BlockSchedule


class Hop(NamedTuple):
    """What the message into a chunk carries: blocks `first` .. `last`, of which the receiver has none yet.

    Those before `fresh` were complete before the sender's chunk ran, and leave while it runs.
    """

    first: int
    fresh: int
    last: int

    @property
    def blocks(self) -> int:
        """Units of the message."""
        return self.last - self.first + 1


class Segment(NamedTuple):
    """Sublayers `first` .. `last - 1` of every chunk, in none of which a block begins or ends elsewhere.

    The other fields have a value for each chunk.
    """

    first: int
    last: int
    runs: tuple[bool, ...]
    """Whether the chunk is that long."""
    block: tuple[int, ...]
    """Number of the block they are of; as many are complete before, the embedding counted."""
    begins: tuple[bool, ...]
    """Whether the block begins here."""


class Cache(NamedTuple):
    """How a stage keeps the blocks of a microbatch, and which of them a message holds: all sizes are static.

    Rows are numbered as blocks are. A window that would reach beyond the last row begins earlier: what it
    then holds beside the hop's blocks the receiver has, with the same values.
    """

    rows: int
    window: int
    """Rows of a message: K."""
    conveyor: int
    """Rows of its early part."""
    written: int
    """Rows that a chunk makes, and that leave when it is done."""
    first: tuple[int, ...]
    """Row where the message into a chunk begins, C + 1 numbers."""
    early: tuple[int, ...]
    """Row where its early part begins."""
    fresh: tuple[int, ...]
    """The first row of those that a chunk makes, C numbers."""


@dataclass(frozen=True)
class Chunks:
    """`sublayers` L in AttnRes blocks of `block_size` S, cut into C = P V chunks of whole transformer blocks.

    Where C does not divide them, chunks differ by one transformer block; block boundaries need not be those
    of chunks. `together` is how many sublayers are never parted: the 2 of a transformer block.
    """

    sublayers: int
    block_size: int
    stages: int
    virtual_stages: int
    together: int = 2

    def __post_init__(self):
        if self.stages < 2 or self.virtual_stages < 1:
            raise ValueError(
                f"a pipeline has at least 2 stages of at least 1 virtual stage, got {self.stages} of "
                f"{self.virtual_stages}"
            )
        if self.sublayers % self.together:
            raise ValueError(f"{self.sublayers} sublayers are not whole groups of {self.together}")
        if self.sublayers // self.together < self.count:
            raise ValueError(
                f"{self.sublayers // self.together} transformer blocks cannot fill {self.count} chunks "
                f"({self.stages} stages x {self.virtual_stages}): use fewer stages or virtual stages"
            )

    @property
    def count(self) -> int:
        """C."""
        return self.stages * self.virtual_stages

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """C + 1 numbers: chunk c runs sublayers `bounds[c]` .. `bounds[c + 1] - 1`."""
        groups = self.sublayers // self.together
        return tuple(self.together * (c * groups // self.count) for c in range(self.count + 1))

    @cached_property
    def complete(self) -> tuple[int, ...]:
        """Blocks that are complete when chunk c begins; C + 1 numbers."""
        schedule = BlockSchedule(self.sublayers, self.block_size)
        ends = [at + size for at, size in zip(schedule.openings, schedule.sizes, strict=True)]
        return tuple(sum(end <= at for end in ends) for at in self.bounds)

    @cached_property
    def begun(self) -> tuple[int, ...]:
        """Blocks with any output when chunk c begins; C + 1 numbers."""
        openings = BlockSchedule(self.sublayers, self.block_size).openings
        return tuple(sum(opening < at for opening in openings) for at in self.bounds)

    @cached_property
    def hops(self) -> tuple[Hop, ...]:
        """The C - 1 messages into chunks 1 .. C - 1: what was made since the receiver's own last chunk.

        That chunk's blocks are there, and complete up to where it ended. P - 1 chunks' worth is new, which is
        the least: every stage that has work left must be sent each block once.
        """
        found = []
        for c in range(1, self.count):
            had = self.complete[c - self.stages + 1] if c >= self.stages else 0
            found.append(Hop(had + 1, self.complete[c - 1] + 1, self.begun[c]))
        return tuple(found)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The longest chunk, cut wherever in some chunk a block begins or the chunk ends."""
        schedule = BlockSchedule(self.sublayers, self.block_size)
        edges = {*schedule.openings, self.sublayers}
        spans = [(at, to) for at, to in zip(self.bounds[:-1], self.bounds[1:], strict=True)]
        cuts = {edge - at for at, to in spans for edge in (*edges, to) if at <= edge <= to}
        found = []
        for first, last in zip(sorted(cuts)[:-1], sorted(cuts)[1:], strict=True):
            begun = [(at + first, at + first < to, to) for at, to in spans]
            found.append(
                Segment(
                    *(first, last, tuple(runs for _, runs, _ in begun)),
                    tuple(sum(o <= min(at, to - 1) for o in schedule.openings) for at, _, to in begun),
                    tuple(runs and at in edges for at, runs, _ in begun),
                )
            )
        return tuple(found)

    @cached_property
    def cache(self) -> Cache:
        """See `Cache`."""
        rows = self.begun[-1] + 1
        # Nothing that counts goes into the first chunk, nor out of the last.
        first = [1, *(hop.first for hop in self.hops), 1]
        return Cache(
            *(rows, self.window, self.conveyor, self.written),
            tuple(min(row, rows - self.window) for row in first),
            tuple(min(row, rows - self.conveyor) for row in first),
            tuple(min(row + 1, rows - self.written) for row in self.complete[:-1]),
        )

    @property
    def window(self) -> int:
        """Units of the longest message: all are sent this long, for shapes are static."""
        return max(hop.blocks for hop in self.hops)

    @property
    def conveyor(self) -> int:
        """Units of the longest part that leaves before the sender's chunk is done."""
        return max(hop.fresh - hop.first for hop in self.hops)

    @property
    def written(self) -> int:
        """The most blocks that one chunk writes to, the one it found open among them."""
        return max(self.begun[c + 1] - self.complete[c] for c in range(self.count))


class Sent(NamedTuple):
    """Units that one microbatch moves in one direction, by three ways of sending."""

    naive: int
    """The whole history at every hop: C (C - 1) / 2 N_p, as the paper counts it, without the embedding."""
    cached: float
    """The paper's formula: P (P - 1) / 2 N_p + (V - 1) P^2 N_p. It sends a stage its own blocks again."""
    needed: int
    """What `Chunks.hops` carry: P (P - 1) (V - 1/2) N_p where N_p is whole."""
    longest: int
    """The longest hop of these."""


def sent(chunks: Chunks) -> Sent:
    """See `Sent`; N_p = N / C, which need not be whole for the paper's formula."""
    P, V, C = chunks.stages, chunks.virtual_stages, chunks.count
    per_chunk = chunks.begun[-1] / C
    cached = (P * (P - 1) / 2 + (V - 1) * P * P) * per_chunk
    needed = sum(hop.blocks for hop in chunks.hops)
    return Sent(sum(chunks.begun[1:C]), cached, needed, chunks.window)


@dataclass(frozen=True)
class Timetable:
    """Who runs what when: `microbatches` M through P stages of V virtual stages, forward before backward.

    Microbatches go in groups of P, a group through one virtual stage after the other; the backward pass
    takes chunks in the opposite order. Chunk c + 1 runs one tick after chunk c, so nothing ever waits.
    """

    stages: int
    virtual_stages: int
    microbatches: int

    def __post_init__(self):
        if self.microbatches < 1 or self.microbatches % self.stages:
            raise ValueError(
                f"microbatches go through the stages in groups of {self.stages}: their number must be a "
                f"multiple of it, got {self.microbatches}"
            )

    @property
    def units(self) -> int:
        """Chunks that a stage runs in each direction: M V."""
        return self.microbatches * self.virtual_stages

    @property
    def phases(self) -> tuple[int, int, int]:
        """Ticks with a forward chunk only, with both, with a backward chunk only."""
        warm = self.stages * self.virtual_stages - 1
        return warm, self.units + self.stages - 1 - warm, warm

    @cached_property
    def forward(self) -> np.ndarray:
        """[ticks, P, 2]: microbatch and virtual stage that a stage runs forward; -1 where it idles."""
        return self._at(lambda tick, stage: tick - stage, lambda virtual: virtual)

    @cached_property
    def backward(self) -> np.ndarray:
        """The same, backward."""
        first = self.stages * self.virtual_stages - 1 + self.stages - 1
        return self._at(
            lambda tick, stage: tick - first + stage, lambda virtual: self.virtual_stages - 1 - virtual
        )

    def _at(self, unit, order):
        table = np.full((sum(self.phases), self.stages, 2), -1)
        for tick, stage in np.ndindex(*table.shape[:2]):
            at = unit(tick, stage)
            if 0 <= at < self.units:
                group, inside = divmod(at, self.stages * self.virtual_stages)
                virtual, place = divmod(inside, self.stages)
                table[tick, stage] = group * self.stages + place, order(virtual)
        return table

    @property
    def slots(self) -> int:
        """Microbatches whose blocks a stage holds at once, at the most: 2 P, or all of them."""
        return min(self.microbatches, 2 * self.stages)

    @cached_property
    def peak_chunks(self) -> int:
        """Chunks, at the most, that a stage has run forward and not yet backward, this tick's included."""
        begun, ended = (np.cumsum(table[..., 0] >= 0, 0) for table in (self.forward, self.backward))
        before = np.concatenate([np.zeros_like(ended[:1]), ended[:-1]])
        return int((begun - before).max())

    def bubble(self, backward: float = 2.0) -> float:
        """Idle time over busy time, where a chunk's backward pass takes `backward` of its forward pass."""
        ahead, both, behind = self.phases
        whole = ahead + both * (1 + backward) + behind * backward
        return whole / (self.units * (1 + backward)) - 1


def text(table: Timetable) -> str:
    """The timetable, a line a tick and a column a stage: F and B, microbatch, chunk."""
    lines = []
    for tick in range(len(table.forward)):
        cells = [" ".join(_cells(table, tick, stage)) or "-" for stage in range(table.stages)]
        lines.append((tick, *cells))
    widths = [max(len(str(line[k])) for line in lines) for k in range(table.stages + 1)]
    rows = [" | ".join(str(cell).ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(row.rstrip() for row in rows)


def _cells(table, tick, stage):
    for letter, entries in (("F", table.forward), ("B", table.backward)):
        microbatch, virtual = entries[tick, stage]
        if microbatch >= 0:
            yield f"{letter} m{microbatch} c{virtual * table.stages + stage}"
