"""The backward kernels of Phase 1 in Mosaic GPU: `dscore` and `apply`; see gpu.py."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.depth_mix.gpu_tiles import (
    BF16,
    COLUMNS,
    DOWN,
    F32,
    TOKENS,
    WGMMA,
    Sources,
    barriers,
    copy_or_arrive,
    fetch_rows,
    named,
    products,
    tiled,
    walk,
    zero,
    zero_arrivals,
)
from pallas_kernels.mosaic import KIBIBYTE, PROCESSORS, SHARED_BYTES, run, shaped, up


def _fetch_cotangents(r, shape, at, slot, tokens, cols):
    """The cotangents of this call's queries, those of `d_mixture` from `at` on."""
    for s in range(shape.queries):
        target = r.cotangents.at[slot, pl.ds(s * TOKENS, TOKENS)]
        plgpu.copy_gmem_to_smem(r.d_mixture.at[at + s, tokens, cols], target, r.full.at[slot])


def _zero_both(r, shape, rows):
    zero(r.zeros, r.rows, rows.visible, r.zeroed)
    zero(r.zeros, r.cotangents, [True] * shape.queries, r.zeroed)


def dscore(shape, logits, lse, d_lse, sources, counts, d_mixture, at, interpret):
    """Cotangents of the logits [blocks, R, queries * 8]: a (dO . V - sum a dO . V + dlse)."""
    chunk, groups, inner = shape.chunk, shape.padded // 8, up(TOKENS * shape.R, 16)
    chunks, depth = shape.D // chunk, shape.depth(3, chunk)
    arrivals = zero_arrivals(depth, inner, sources, counts) + depth * (shape.padded - shape.queries)

    def body(r):
        block, group = lax.axis_index("block"), lax.axis_index("group")
        mine, tokens, rows = pl.ds(group * 64, 64), pl.ds(block * TOKENS, TOKENS), Sources(r, sources, counts)

        def fetch(j):
            slot, cols = lax.rem(j, depth), pl.ds(j * chunk, chunk)
            fetch_rows(r, rows, slot, tokens, cols)
            _fetch_cotangents(r, shape, at, slot, tokens, cols)

        @pl.when(group == 0)
        def _():
            _zero_both(r, shape, rows)
            for j in range(depth):
                fetch(j)

        if arrivals:
            plgpu.barrier_wait(r.zeroed)

        def traces(slot):
            return products((64, inner), (r.cotangents.at[slot, mine], r.rows.at[slot].transpose((1, 0))))

        none = plgpu.layout_cast(jnp.zeros((64, inner), F32), WGMMA)
        d_weights = walk(r, group, chunks, fetch, traces, total=none)
        _through_softmax(r, block, mine, _blocks_of(d_weights, shape.R))

    out = run(
        body,
        {
            **named(sources, counts),
            "logits": logits,
            "lse_in": lse,
            "d_lse": d_lse,
            "d_mixture": d_mixture,
            "zeros": jnp.zeros((TOKENS, chunk), BF16),
        },
        {"d_logits": shaped(logits.shape)},
        {
            "rows": tiled(depth, inner, chunk, inner=chunk),
            "cotangents": tiled(depth, groups * 64, chunk, inner=chunk),
        }
        | barriers(depth, shape.R + shape.queries, groups, arrivals),
        grid={"block": shape.blocks},
        groups=groups,
        name="depth_mix_dscore",
        interpret=interpret,
    )
    return out.d_logits


def _blocks_of(matrix, R):
    """The R diagonals of a matrix whose rows are (query, token) and whose columns are (row, token)."""
    row, col = (plgpu.broadcasted_iota(jnp.int32, matrix.shape, d, layout=WGMMA) for d in (0, 1))
    which = jnp.where((row & 7) == (col & 7), col >> 3, -1)
    return [jnp.sum(jnp.where(which == i, matrix, 0.0), axis=1) for i in range(R)]


def _through_softmax(r, block, mine, d_weights):
    """Store the cotangents of the logits."""
    lse = plgpu.load(r.lse_in.at[block, mine], layout=DOWN, optimized=False)
    d_lse = plgpu.load(r.d_lse.at[block, mine], layout=DOWN, optimized=False)
    a = [
        jnp.exp(plgpu.load(r.logits.at[block, i, mine], layout=DOWN, optimized=False) - lse)
        for i in range(len(d_weights))
    ]
    mean = sum(x * d for x, d in zip(a, d_weights, strict=True)) - d_lse
    for i, (x, d) in enumerate(zip(a, d_weights, strict=True)):
        r.d_logits[block, i, mine] = x * (d - mean)


class _Tile(NamedTuple):
    """How `apply` is cut: columns of a thread, slots, programs per chunk."""

    columns: int
    depth: int
    programs: int

    @property
    def chunk(self):
        """Columns of a program, in 256s."""
        return 128 * self.columns // COLUMNS, COLUMNS

    @property
    def vector(self):
        """Columns of one access of a thread: the widest that its own are a multiple of."""
        return next(v for v in (8, 4, 2) if self.columns % v == 0)


def _tile(shape, given):
    """As wide as registers hold queries, their cotangents and dw of two programs on a processor, as deep as
    shared memory allows."""
    most = 8 if shape.queries <= 6 else 6 if shape.queries <= 8 else 4 if shape.queries <= 12 else 2
    columns = next(v for v in (8, 6, 4, 2) if v <= most and shape.D % (128 * v) == 0)
    for resident, depth in ((2, 4), (2, 3), (2, 2), (1, 2), (1, 1)):
        rows = depth * (shape.R * (1 + given) + shape.queries) + shape.R
        needed = 128 * columns * 2 * rows + 4 * depth * math.prod(_numbers(shape)) + 4 * KIBIBYTE
        if needed <= SHARED_BYTES // resident:
            break
    chunks = shape.D // (128 * columns)
    return _Tile(columns, depth, min(shape.tokens, max(1, PROCESSORS * resident // chunks)))


def _numbers(shape):
    """Scalars of a token, [rows, of each]: a slot is a whole number of 128 bytes, where a copy may land."""
    each = up(2 * shape.queries + 1, 8)
    return up(shape.R, 32 // math.gcd(each, 32)), each


def apply(shape, w, a, c, along, sources, counts, d_mixture, at, d_sources, interpret):
    """d_sources += A^T dO + C w - along * v, and dw = C^T V.

    `a` are the weights, `c` the cotangents of the logits times rstd, both [tokens, R, queries]; `along` is
    the mean of C logit rstd, [tokens, R]. A token at a time, a chunk of D in registers: `3 S + 1` products an
    element are fewer than the memory leaves time for.
    """
    given = d_sources is not None
    tile = _tile(shape, given)
    names = [f"d_source{k}" for k in range(len(sources))]
    refs = [jax.new_ref(_fold(d)) for d in d_sources] if given else []
    fresh = {} if given else {k: shaped(_fold(v).shape, BF16) for k, v in zip(names, sources, strict=True)}
    numbers = jnp.concatenate([a, c, along[..., None]], -1)
    missing = [(0, n - m) for n, m in zip(_numbers(shape), numbers.shape[1:], strict=True)]
    numbers = jnp.pad(numbers, ((0, 0), *missing))
    row, copies = (tile.depth, shape.R, *tile.chunk), shape.R * (1 + given) + shape.queries + 1
    out = run(
        lambda r: _Apply(r, shape, tile, sources, counts, at, given).run(),
        {
            **named([_fold(v) for v in sources], counts),
            "numbers": numbers,
            "d_mixture": _fold(d_mixture),
            "w": _fold(w),
            **dict(zip(names, refs, strict=False)),
        },
        {"dw": shaped((tile.programs, *_fold(w).shape)), **fresh},
        {
            "rows": plgpu.SMEM(row, BF16),
            "cotangents": plgpu.SMEM((tile.depth, shape.queries, *tile.chunk), BF16),
            "number_ring": plgpu.SMEM((tile.depth, *numbers.shape[1:]), F32),
            **({"given": plgpu.SMEM(row, BF16)} if given else {}),
            "out": plgpu.SMEM(row[1:], BF16),
            "full": plgpu.Barrier(num_arrivals=copies, num_barriers=tile.depth),
        },
        grid={"program": tile.programs, "chunk": shape.D // (128 * tile.columns)},
        groups=1,
        name="depth_mix_apply",
        interpret=interpret,
    )
    results = [ref[...] for ref in refs] if given else [getattr(out, name) for name in names]
    results = tuple(d.reshape(v.shape) for d, v in zip(results, sources, strict=True))
    return jnp.sum(out.dw, 0).reshape(w.shape), results


def _fold(a):
    """[..., D] as [..., D / 256, 256], as long as a copy may be along an axis."""
    return a.reshape(*a.shape[:-1], -1, COLUMNS)


class _Apply:
    """The warpgroup of a program of `apply`: its columns of every token in strides of the grid."""

    def __init__(self, refs, shape, tile, sources, counts, at, given):
        self.r, self.shape, self.tile, self.at, self.given = refs, shape, tile, at, given
        self.sources = Sources(refs, sources, counts)
        self.outs = [
            getattr(refs, f"d_source{k}").at[i] for k, v in enumerate(sources) for i in range(len(v))
        ]
        self.start, part = lax.axis_index("program"), lax.axis_index("chunk")
        self.steps = (shape.tokens - self.start + tile.programs - 1) // tile.programs
        self.cols = pl.ds(part * tile.chunk[0], tile.chunk[0])
        self.layout = plgpu.Layout.WG_STRIDED(tile.chunk, vec_size=tile.vector)

    def token(self, b):
        """The token of step b."""
        return self.start + b * self.tile.programs

    def load(self, ref):
        """This program's columns of one row, in fp32."""
        return plgpu.load(ref, layout=self.layout, optimized=False).astype(F32)

    def fetch(self, b):
        """Start the copies of step b into its slot."""
        r, slot, t = self.r, lax.rem(b, self.tile.depth), self.token(b)
        full = r.full.at[slot]
        plgpu.copy_gmem_to_smem(r.numbers.at[t], r.number_ring.at[slot], full)
        for s in range(self.shape.queries):
            plgpu.copy_gmem_to_smem(r.d_mixture.at[self.at + s, t, self.cols], r.cotangents.at[slot, s], full)
        for i, (row, seen) in enumerate(zip(self.sources.rows, self.sources.visible, strict=True)):
            copy_or_arrive(seen, row.at[t, self.cols], r.rows.at[slot, i], full)
            if self.given:
                copy_or_arrive(seen, self.outs[i].at[t, self.cols], r.given.at[slot, i], full)

    def open(self):
        """Zeros for the rows that are not visible, and the first tokens."""
        zero = plgpu.layout_cast(jnp.zeros(self.tile.chunk, BF16), self.layout)
        for i, seen in enumerate(self.sources.visible):
            if seen is not True:

                @pl.when(jnp.logical_not(seen))
                def _(i=i):
                    for slot in range(self.tile.depth):
                        self.r.rows.at[slot, i][...] = zero

        for b in range(self.tile.depth):

            @pl.when(b < self.steps)
            def _(b=b):
                self.fetch(b)

    def row(self, slot, i, w, d, dw):
        """Stage the cotangent of row i; returns dw with this row's share."""
        r, queries = self.r, range(self.shape.queries)
        number = [r.number_ring[slot, i, k] for k in range(2 * len(queries) + 1)]
        a, c, along = number[: len(queries)], number[len(queries) : -1], number[-1]
        v = self.load(r.rows.at[slot, i])
        z = self.load(r.given.at[slot, i]) - along * v if self.given else -along * v
        for q in queries:
            z += a[q] * d[q] + c[q] * w[q]
        r.out.at[i][...] = z.astype(BF16)
        return tuple(dw[q] + c[q] * v for q in queries)

    def send(self, t):
        """Start the copies of a token to memory; a hidden row keeps what was given."""
        for i, (out, seen) in enumerate(zip(self.outs, self.sources.visible, strict=True)):

            @pl.when(seen if self.given else True)
            def _(i=i, out=out):
                plgpu.copy_smem_to_gmem(self.r.out.at[i], out.at[t, self.cols], commit_group=False)

        plgpu.commit_smem_to_gmem_group()

    def run(self):
        """All tokens of this program, then its sum of dw."""
        r, queries = self.r, range(self.shape.queries)
        self.open()
        w = [self.load(r.w.at[q, self.cols]) for q in queries]

        def step(b, dw):
            slot = lax.rem(b, self.tile.depth)
            plgpu.barrier_wait(r.full.at[slot])
            d = [self.load(r.cotangents.at[slot, q]) for q in queries]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dw = lax.fori_loop(0, self.shape.R, lambda i, dw: self.row(slot, i, w, d, dw), dw)
            plgpu.commit_smem()
            self.send(self.token(b))

            @pl.when(b + self.tile.depth < self.steps)
            def _():
                self.fetch(b + self.tile.depth)

            return dw

        zero = plgpu.layout_cast(jnp.zeros(self.tile.chunk, F32), self.layout)
        for q, total in enumerate(lax.fori_loop(0, self.steps, step, tuple(zero for _ in queries))):
            r.dw[self.start, q, self.cols] = total
        plgpu.wait_smem_to_gmem(0)
