"""Bytes that a call of the depth kernels moves in a program, where an operand is a buffer it reads a part of.

Which rows are visible (n) and which is read (j) are values, not shapes; a step's mean is counted: in a loop
over N blocks n takes each of 1 .. N, in a buffer of N + 1 rows; outside of loops all rows are visible. Of S
reads of a block the first has no running sum, where they are one loop's or a pipeline may part them; kernels
elsewhere have one, and are not told whether. The kernels' own grids say the same, as a test holds.
"""

from collections.abc import Sequence

from attnres_jax.bench.cost import Call, Cost, Kernel
from attnres_jax.bench.hlo import Shape


def mix(call: Call) -> Cost:
    """Phase 1, both directions: sources and cotangents [R, tokens / G, G, D], each visible row once.

    Or [slots, R, ...], of which a slot is read: of all its rows where the only scalars are the slots."""
    slotted = [s for s in call.results if len(s.dims) == 5] or [s for s in call.operands if len(s.dims) == 5]
    whole = call.times == 1 or (slotted and call.operands[0].size == len(slotted))
    visible = 1.0 if whole else 0.5

    def part(shape: Shape) -> float:
        return {4: visible, 5: visible / shape.dims[0]}.get(len(shape.dims), 1.0)

    def moved(shapes: Sequence[Shape]) -> float:
        return sum(s.hbm * part(s) for s in shapes)

    return Cost(moved(call.operands), moved(call.results), 0.0)


def merge_forward(call: Call) -> Cost:
    """Phase 2: a row of the running sums [K, tokens, D], but for the first read; row j of the mixtures."""
    streams, mixtures = _arrays(call)
    rest = sum(s.hbm for s in call.operands if len(s.dims) != 3)
    read = rest + _row(mixtures) + _row(streams) * _seen(call, mixtures)
    return Cost(read, sum(s.hbm for s in call.results), 0.0)


def merge_backward(call: Call) -> Cost:
    """Cotangents of the mixtures are written, row j, and not read; the sum and its cotangent as forward."""
    _, streams, mixtures = _arrays(call)
    seen = _seen(call, mixtures)
    d_sum = next(s for s in call.operands if s.dims == mixtures.dims[1:])
    rest = sum(s.hbm for s in call.operands if len(s.dims) != 3) - d_sum.hbm
    read = rest + _row(mixtures) + (_row(streams) + d_sum.hbm) * seen
    written = {mixtures.dims: 1 / mixtures.dims[0], d_sum.dims: seen}
    return Cost(read, sum(s.hbm * written.get(s.dims, 1.0) for s in call.results), 0.0)


def _seen(call, mixtures):
    """The share of these reads that have a running sum; scalars are (j, at), and `first` where it may be."""
    return 1.0 if call.operands[0].size == 2 else 1 - 1 / mixtures.dims[0]


def _arrays(call):
    return [s for s in call.operands if len(s.dims) == 3]


def _row(shape):
    return shape.hbm / shape.dims[0]


KERNELS: dict[str, Kernel] = {
    "depth_mix_forward": mix,
    "depth_mix_backward": mix,
    "depth_merge_forward": merge_forward,
    "depth_merge_backward": merge_backward,
}
"""By the names given to `pallas_call`."""
