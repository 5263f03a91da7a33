"""Phase 2 in Pallas Mosaic GPU (Hopper and newer): one read of a block in one kernel, and its backward.

A few warpgroups share one row of D at a time (each D / groups columns, sums exchanged through shared memory)
and walk over the rows in strides of the grid, behind a ring of TMA copies: any number of tokens, no masks, no
atomics. A program is one such lane, or in the forward pass several, which share the parameters: a row is a
chain of latencies (two sums over it), so a processor has a few rows at a time. dw and dscale are summed in
registers over a program's rows, leave as [programs, D], and are added up outside.

When `first` is set, the running sum (and `y`) moves no bytes: its ring holds zeros and the gate is closed.
In-place operands are `jax.Ref`s.

stats [4, tokens] fp32: the score, the reciprocal rms of p, score - lse, the reciprocal rms of h.

Limits: D a multiple of 256 (four warps of 32 lanes, two columns each) whose 256-column chunks split
evenly into at most 8 warpgroups of at most 14; one row of every operand fits the 223 KiB of shared memory;
all wide operands bf16, or all fp32. Above D = 8192 the backward spills (48 bytes a thread at 9216).
"""

from itertools import product

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.depth_merge.gpu_row import F32, Row, Tile
from pallas_kernels.depth_merge.vjp import Forward
from pallas_kernels.mosaic import (
    KIBIBYTE,
    PROCESSOR_BYTES,
    PROCESSORS,
    RESERVED_BYTES,
    SHARED_BYTES,
    WARPS,
    run,
    shaped,
    up,
)

CHUNK = 256  # columns, at least, of a warpgroup
MAX_GROUPS, GOOD_CHUNKS, MAX_CHUNKS = 8, 9, 14  # chunks per warpgroup: for occupancy, and before spills
ROWS = 4  # at a time on a processor: their latencies then hide each other (docs/results/kernels)


def tile_of(streams, inputs, outputs, resident, lanes=1):
    """The tile for so many wide inputs and outputs; raises where there is none.

    `resident` warpgroups have registers on a processor; a program has at most `lanes` rows at a time.
    """
    _, tokens, D = streams.shape
    if D % CHUNK:
        raise ValueError(f"stream: D = {D} is not a multiple of {CHUNK}, two columns a thread; use triton")
    splits = [g for g in range(1, MAX_GROUPS + 1) if D // CHUNK % g == 0]
    groups = next((g for g in splits if D // CHUNK // g <= GOOD_CHUNKS), splits[-1])
    if D // CHUNK // groups > MAX_CHUNKS:
        raise ValueError(
            f"stream: D = {D} does not split into at most {MAX_GROUPS} warpgroups of at most "
            f"{MAX_CHUNKS * CHUNK} columns; use triton"
        )
    lanes = range(1, max(1, min(lanes, MAX_GROUPS // groups)) + 1)
    rows = max(1, resident // groups)
    cut = _cut(D, jnp.dtype(streams.dtype).itemsize, inputs, outputs, lanes, rows)
    return Tile(tokens, D, groups, *cut[:3], PROCESSORS * cut[3])


def refusal(D, dtype):
    """Why this backend cannot run the op in both directions, or None; a kept mixture takes a row more."""
    try:
        tile_of(jax.ShapeDtypeStruct((1, 1, D), dtype), inputs=4, outputs=2, resident=2)
    except ValueError as problem:
        return str(problem)
    return None


def _cut(D, itemsize, inputs, outputs, lanes, rows):
    """Lanes, slots of the rings and of the staging, programs of a processor: at most `rows` rows at a time,
    which share the parameters in lanes only; then as deep as shared memory allows."""
    found = []
    for some, (depth, staged) in product(lanes, ((3, 2), (2, 2), (3, 1), (2, 1), (1, 1))):
        ring, staging, parameter = (
            up(size, KIBIBYTE) for size in (some * depth * D * itemsize, some * staged * D * itemsize, 4 * D)
        )
        # The last: exchange and barriers.
        needed = inputs * ring + outputs * staging + 2 * parameter + 3 * KIBIBYTE
        programs = min(PROCESSOR_BYTES // (needed + RESERVED_BYTES), rows // some)
        if needed <= SHARED_BYTES and programs:
            at_once = min(some * programs, ROWS)
            found.append(((depth > 1, at_once, -some, depth + staged), (some, depth, staged, programs)))
    if not found:
        raise ValueError(
            f"stream: a row of D = {D} in {inputs} inputs and {outputs} outputs of {itemsize} bytes "
            f"exceeds {SHARED_BYTES} bytes of shared memory; use triton"
        )
    return max(found)[1]


def forward(
    w, scale, mixtures, lse, streams, at, j, first, y=None, *, eps, norm_eps, keep_mixture, interpret=None
):
    """Read row j merged with row `at` of `streams`; see vjp.py."""
    keep, add = keep_mixture and scale is not None, y is not None
    tile = tile_of(streams, 2 + add, 1 + keep + add, resident=8, lanes=MAX_GROUPS)
    dtype, row, fold = streams.dtype, (tile.tokens, *tile.folded), tile.fold
    running = jax.new_ref(fold(streams)) if add else fold(streams)
    inputs = {
        "control": _control(j, first, at),
        "lse": lse,
        "w": fold(w),
        "mixtures": fold(mixtures),
        "streams": running,
    }
    inputs |= {"scale": fold(scale)} if scale is not None else {}
    inputs |= {"y": fold(y)} if add else {}
    outputs = {"x": shaped(row, dtype), "stats": shaped((4, tile.tokens))}
    outputs |= {"mixture": shaped(row, dtype)} if keep else {}
    scratch = {"o_ring": tile.ring(tile.depth, dtype), "p_ring": tile.ring(tile.depth, dtype)}
    scratch |= {"y_ring": tile.ring(tile.depth, dtype)} if add else {}
    scratch |= {"x_out": tile.ring(tile.staged, dtype)}
    scratch |= {"h_out": tile.ring(tile.staged, dtype)} if keep else {}
    scratch |= {"p_out": tile.ring(tile.staged, dtype)} if add else {}
    scratch |= _shared(tile, scale is not None, o_arrivals=1, p_arrivals=1 + add)
    out = run(
        lambda r: Row(r, tile).forward(eps, norm_eps),
        inputs,
        outputs,
        scratch,
        grid={"program": tile.programs},
        groups=tile.groups * tile.lanes,
        name="depth_merge_forward",
        interpret=interpret,
    )
    x = out.x.reshape(streams.shape[1:])
    mixture = out.mixture.reshape(x.shape) if keep else x
    new = running[...].reshape(x.shape) if add else None
    return Forward(x, mixture if keep_mixture else None, new, out.stats)


def backward(
    w,
    scale,
    mixtures,
    lse,
    streams,
    at,
    j,
    first,
    stats,
    d_x,
    d_mixture,
    d_stream,
    d_mixtures,
    d_lse,
    *,
    eps,
    norm_eps,
    interpret=None,
):
    """Cotangents (dw, dscale, d_stream, d_mixtures, d_lse); the last two written in place.

    That of the stream is an array of its own: the sublayer's output has the same cotangent, which XLA
    would have to copy before it is written to.
    """
    del lse, eps, norm_eps  # all that they say is in stats
    norm, keep = scale is not None, d_mixture is not None
    tile = tile_of(streams, 4 + keep, 2, resident=2)
    sums, fold = shaped((tile.programs, *tile.folded)), tile.fold
    row_j, lse_j = jax.new_ref(fold(d_mixtures)), jax.new_ref(d_lse)
    inputs = {"control": _control(j, first, at), "stats": stats, "w": fold(w), "mixtures": fold(mixtures)}
    inputs |= {
        "streams": fold(streams),
        "d_x": fold(d_x),
        "d_stream": fold(d_stream),
        "d_mixtures": row_j,
        "d_lse": lse_j,
    }
    inputs |= {"scale": fold(scale)} if norm else {}
    inputs |= {"d_mixture": fold(d_mixture)} if keep else {}
    outputs = {"dw": sums} | ({"dscale": sums} if norm else {})
    outputs |= {"d_p": shaped((tile.tokens, *tile.folded), streams.dtype)}
    rings = ["o_ring", "p_ring", "dx_ring", "dp_ring"] + ["dh_ring"] * keep
    scratch = {ring: tile.ring(tile.depth, streams.dtype) for ring in rings}
    scratch |= {staging: tile.ring(tile.staged, streams.dtype) for staging in ("do_out", "dp_out")}
    scratch |= _shared(tile, norm, o_arrivals=3 + keep, p_arrivals=1)
    out = run(
        lambda r: Row(r, tile).backward(),
        inputs,
        outputs,
        scratch,
        grid={"program": tile.programs},
        groups=tile.groups * tile.lanes,
        name="depth_merge_backward",
        interpret=interpret,
    )
    dw = jnp.sum(out.dw, 0).reshape(-1)
    dscale = jnp.sum(out.dscale, 0).reshape(-1) if norm else None
    return dw, dscale, out.d_p.reshape(d_stream.shape), row_j[...].reshape(mixtures.shape), lse_j[...]


def _control(j, first, at):
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in (j, first, at)])


def _shared(tile, norm, o_arrivals, p_arrivals):
    """The parameters in fp32, the exchange of row sums, and the barriers."""
    parameter = plgpu.SMEM(tile.folded, F32)
    return dict(
        w_row=parameter,
        **({"scale_row": parameter} if norm else {}),
        exchange=plgpu.SMEM((tile.lanes, 2, tile.groups, 3, WARPS), F32),
        o_full=tile.barriers(o_arrivals),
        p_full=tile.barriers(p_arrivals),
        parameters_full=plgpu.Barrier(num_arrivals=1 + norm, num_barriers=tile.groups),
        exchanged=plgpu.Barrier(num_arrivals=tile.groups, num_barriers=tile.lanes),
    )
