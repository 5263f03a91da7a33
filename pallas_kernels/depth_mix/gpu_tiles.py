"""What the kernels of Phase 1 in Mosaic GPU share: sizes, tiles, rows of the sources, matrices of weights."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

F32, BF16 = jnp.float32, jnp.bfloat16
TOKENS = 8  # of one matrix product
COLUMNS = 256  # at most, of a copy along an axis; D is a multiple
WGMMA = plgpu.Layout.WGMMA
DOWN = WGMMA.reduce(1)  # a vector over the rows of a matrix


class Shape(NamedTuple):
    """Sizes of one call: R rows, `queries` padded to eights, `blocks` of eight tokens, chunks of D."""

    tokens: int
    D: int
    R: int
    queries: int

    chunk = 128  # columns of one step

    @property
    def blocks(self):
        """Blocks of eight tokens."""
        return -(-self.tokens // TOKENS)

    @property
    def padded(self):
        """Queries rounded up to eights: what a warpgroup of 64 rows holds."""
        return -(-self.queries // 8) * 8

    def depth(self, wanted, chunk):
        """Slots of the ring."""
        return min(wanted, self.D // chunk)


def thirds(a, rows):
    """[S, D] fp32 as three bf16 [3 * rows, D] that add up to it."""
    rest, parts = jnp.pad(a, ((0, rows - len(a)), (0, 0))), []
    for _ in range(3):
        parts.append(rest.astype(BF16))
        rest = rest - parts[-1].astype(F32)
    return jnp.concatenate(parts)


def tiled(*shape, inner):
    """Shared memory as WGMMA reads it; both operands need the swizzle of the length they contract."""
    swizzle = plgpu.find_swizzle(inner * 16)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(BF16).itemsize))
    return plgpu.SMEM(shape, BF16, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


class Sources:
    """The rows of all arrays inside a kernel, and which of them are visible."""

    def __init__(self, r, sources, counts):
        arrays = [getattr(r, f"source{k}") for k in range(len(sources))]
        self.rows = [array.at[i] for array, v in zip(arrays, sources, strict=True) for i in range(len(v))]
        self.visible = []
        for k, (v, n) in enumerate(zip(sources, counts, strict=True)):
            seen = True if n is None else r.counts[k]
            self.visible += [True if n is None else i < seen for i in range(len(v))]


def named(sources, counts):
    """The kernel's inputs for the sources: the counts, then one array each."""
    n = [len(v) if n is None else n for v, n in zip(sources, counts, strict=True)]
    counts = jnp.stack([jnp.asarray(x, jnp.int32) for x in n])
    return {"counts": counts} | {f"source{k}": v for k, v in enumerate(sources)}


def copy_or_arrive(visible, source, target, barrier):
    """A visible row is copied; one that is not moves no bytes, and its barrier is told so."""
    if visible is True:
        plgpu.copy_gmem_to_smem(source, target, barrier)
        return

    @pl.when(visible)
    def _():
        plgpu.copy_gmem_to_smem(source, target, barrier)

    @pl.when(jnp.logical_not(visible))
    def _():
        plgpu.barrier_arrive(barrier)


def fetch_rows(r, rows, slot, tokens, cols):
    """Start the copies of all visible rows into a slot."""
    for i, (row, seen) in enumerate(zip(rows.rows, rows.visible, strict=True)):
        target = r.rows.at[slot, pl.ds(i * TOKENS, TOKENS)]
        copy_or_arrive(seen, row.at[tokens, cols], target, r.full.at[slot])


def zero(zeros, ring, visible, barrier):
    """Zeros where no copy will land: rows not visible, and those that fill up the matrix."""
    for slot in range(ring.shape[0]):
        for i in range(ring.shape[1] // TOKENS):
            seen = visible[i] if i < len(visible) else False
            hidden = True if seen is False else (False if seen is True else jnp.logical_not(seen))
            if hidden is not False:
                copy_or_arrive(hidden, zeros, ring.at[slot, pl.ds(i * TOKENS, TOKENS)], barrier)


def zero_arrivals(depth, rows, sources, counts):
    """Arrivals that `zero` makes on its barrier."""
    fixed = sum(len(v) for v, n in zip(sources, counts, strict=True) if n is None)
    return depth * (rows // TOKENS - fixed)


def products(shape, *pairs):
    """Sum of a b over the pairs in shared memory, [64, columns] of this warpgroup, on the tensor cores.

    They cut off what their sum does not hold: one of all of D would be biased, so this one is of a chunk."""

    def add(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(add, plgpu.ACC(shape, F32))


def barriers(depth, copies, groups, arrivals):
    """Of a ring of `depth` slots: `copies` fill one, `groups` warpgroups empty it; and those of `zero`."""
    return {
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=depth),
        "empty": plgpu.Barrier(num_arrivals=groups, num_barriers=depth),
        "zeroed": plgpu.Barrier(num_arrivals=max(1, arrivals)),
    }


def walk(r, group, chunks, fetch, product, send=None, total=None):
    """`product(slot)` of each chunk j of D, which `fetch(j)` brings to a slot of the ring: sent by
    `send(j, product)`, or added up from `total` on.

    The first warpgroup fills a slot again when all are done with it."""
    depth = r.rows.shape[0]

    def step(j, total):
        slot = lax.rem(j, depth)
        plgpu.barrier_wait(r.full.at[slot])
        part = product(slot)

        @pl.when(j + depth < chunks)
        def _():
            plgpu.barrier_arrive(r.empty.at[slot])

        if send is not None:
            send(j, part)

        @pl.when((group == 0) & (j + depth < chunks))
        def _():
            plgpu.barrier_wait(r.empty.at[slot])
            fetch(j + depth)

        # Added up before the next fetch it spills (configs/LOG.md, 2026-11-28).
        return None if total is None else total + part

    return lax.fori_loop(0, chunks, step, total)


def diagonal(shape, count, value, axis):
    """The block-diagonal matrix whose block i holds `value(i)` along `axis`, as two bf16 halves.

    The loop holds one value at a time: all of them at once spill.
    """
    row, col = (plgpu.broadcasted_iota(jnp.int32, shape, d, layout=WGMMA) for d in (0, 1))
    which = jnp.where((row & 7) == (col & 7), (col if axis == 0 else row) >> 3, -1)

    def block(i, matrix):
        return jnp.where(which == i, lax.broadcast_in_dim(value(i), shape, (axis,)), matrix)

    matrix = lax.fori_loop(0, count, block, plgpu.layout_cast(jnp.zeros(shape, F32), WGMMA))
    high = matrix.astype(BF16)
    return high, (matrix - high.astype(F32)).astype(BF16)
