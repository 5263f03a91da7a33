"""The backward kernels of Phase 1 in Mosaic GPU: `dscore` and `apply`; see gpu.py."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.depth_mix.gpu_tiles import (
    ACROSS,
    BF16,
    DOWN,
    F32,
    TOKENS,
    WGMMA,
    Sources,
    copy_or_arrive,
    diagonal,
    fetch_rows,
    halves,
    named,
    tiled,
    up,
    zero,
    zero_arrivals,
)
from pallas_kernels.mosaic import PROGRAMS, SHARED_BYTES, run, shaped


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

        def products(acc):
            @pl.loop(0, chunks)
            def _(j):
                slot = lax.rem(j, depth)
                plgpu.barrier_wait(r.full.at[slot])
                plgpu.wgmma(acc, r.cotangents.at[slot, mine], r.rows.at[slot].transpose((1, 0)))
                plgpu.wgmma_wait(0)

                @pl.when(j + depth < chunks)
                def _():
                    plgpu.barrier_arrive(r.empty.at[slot])

                @pl.when((group == 0) & (j + depth < chunks))
                def _():
                    plgpu.barrier_wait(r.empty.at[slot])
                    fetch(j + depth)

            return acc[...]

        d_weights = _blocks_of(pl.run_scoped(products, plgpu.ACC((64, inner), F32)), shape.R)
        _through_softmax(r, block, mine, d_weights)

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
            "full": plgpu.Barrier(num_arrivals=shape.R + shape.queries, num_barriers=depth),
            "empty": plgpu.Barrier(num_arrivals=groups, num_barriers=depth),
            "zeroed": plgpu.Barrier(num_arrivals=max(1, arrivals)),
        },
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
    """How `apply` is cut: rows in 64s, columns of a program and of a warpgroup, slots, programs per chunk."""

    rows: int
    chunk: int
    depth: int
    programs: int

    @property
    def sides(self):
        """Warpgroups side by side, of 64 columns each: their accumulators stay in registers."""
        return self.chunk // 64

    @property
    def groups(self):
        """Warpgroups in all."""
        return self.rows // 64 * self.sides


def _tile(shape, given):
    """The widest and deepest tile that fits shared memory; the last fits whatever gpu.py lets through."""
    entries, rows = shape.padded * TOKENS, up(shape.R * TOKENS, 64)
    for chunk, depth in ((128, 2), (64, 2), (64, 1)):
        ring = depth * (chunk * (rows * (1 + given) + entries) + rows * 64 + 2 * shape.R * entries)
        if shape.D % chunk == 0 and 2 * (ring + 2 * rows * entries + (64 + rows) * chunk) <= SHARED_BYTES:
            break
    return _Tile(rows, chunk, depth, min(shape.blocks, max(1, PROGRAMS // (shape.D // chunk))))


def apply(shape, w, c, along, logits, lse, sources, counts, d_mixture, at, d_sources, interpret):
    """d_sources += A^T dO + C w - along * v, and dw = C^T V.

    `c` holds the halves of C, the cotangents of the logits times rstd; `along` the mean of C logit rstd.
    """
    given = d_sources is not None
    tile = _tile(shape, given)
    names = [f"d_source{k}" for k in range(len(sources))]
    refs = [jax.new_ref(d) for d in d_sources] if given else []
    sums = shaped((tile.programs, tile.rows // 64, 64, shape.D))
    fresh = {} if given else {k: shaped(v.shape, BF16) for k, v in zip(names, sources, strict=True)}
    out = run(
        lambda r: _Apply(r, shape, tile, sources, counts, at, given).run(),
        {
            **named(sources, counts),
            "logits": logits,
            "lse_in": lse,
            "c": c,
            "along": along,
            "d_mixture": d_mixture,
            "w": _query_columns(w, shape.padded),
            "zeros": jnp.zeros((TOKENS, tile.chunk), BF16),
            **dict(zip(names, refs, strict=False)),
        },
        {"dw": sums, **fresh},
        _apply_scratch(shape, tile, sources, counts, given),
        grid={"program": tile.programs, "chunk": shape.D // tile.chunk},
        groups=tile.groups,
        name="depth_mix_apply",
        interpret=interpret,
    )
    dw = jnp.sum(out.dw, (0, 1))
    dw = dw[: shape.padded] + dw[shape.padded : 2 * shape.padded]
    results = [ref[...] for ref in refs] if given else [getattr(out, name) for name in names]
    return dw[: shape.queries], tuple(results)


def _query_columns(w, padded):
    """[64, D] bf16: what the columns of C, its halves high, low, high, are multiplied with."""
    both = halves(w, padded)
    columns = jnp.concatenate([both[:padded], both[:padded], both[padded:]])
    return jnp.pad(columns, ((0, 64 - 3 * padded), (0, 0)))


def _apply_scratch(shape, tile, sources, counts, given):
    entries, (rows, chunk, depth, _) = shape.padded * TOKENS, tile
    ring = tiled(depth, rows, chunk, inner=64)
    arrivals = _apply_arrivals(shape, tile, sources, counts)
    return {
        "rows": ring,
        "cotangents": tiled(depth, entries, chunk, inner=64),
        "scores": tiled(depth, rows, 64, inner=64),
        "logit_ring": plgpu.SMEM((depth, shape.R, entries), F32),
        **({"given": ring} if given else {}),
        "high": tiled(rows, entries, inner=64),
        "low": tiled(rows, entries, inner=64),
        "queries": tiled(64, chunk, inner=64),
        "out": tiled(rows, chunk, inner=64),
        "full": plgpu.Barrier(num_arrivals=shape.R * (1 + given) + shape.queries + 2, num_barriers=depth),
        "done": plgpu.Barrier(num_arrivals=tile.groups),
        "weighted": plgpu.Barrier(num_arrivals=tile.groups),
        "zeroed": plgpu.Barrier(num_arrivals=max(1, arrivals)),
        "parameters": plgpu.Barrier(),
    }


def _apply_arrivals(shape, tile, sources, counts):
    zeros = zero_arrivals(tile.depth, tile.rows, sources, counts)
    return zeros + tile.depth * (shape.padded - shape.queries)


class _Apply:
    """One warpgroup of `apply`: 64 rows (row, token) and 64 columns of every block of its program."""

    def __init__(self, refs, shape, tile, sources, counts, at, given):
        self.r, self.shape, self.tile, self.at, self.given = refs, shape, tile, at, given
        self.sources = Sources(refs, sources, counts)
        self.arrivals = _apply_arrivals(shape, tile, sources, counts)
        self.outs = [
            getattr(refs, f"d_source{k}").at[i] for k, v in enumerate(sources) for i in range(len(v))
        ]
        self.start, part, self.group = (lax.axis_index(a) for a in ("program", "chunk", "group"))
        self.band, self.side = lax.div(self.group, tile.sides), lax.rem(self.group, tile.sides)
        self.steps = (shape.blocks - self.start + tile.programs - 1) // tile.programs
        self.rows, self.cols = pl.ds(self.band * 64, 64), pl.ds(self.side * 64, 64)
        self.all_cols = pl.ds(part * tile.chunk, tile.chunk)
        self.out_cols = pl.ds(part * tile.chunk + self.side * 64, 64)

    def block(self, b):
        """The block of eight tokens of step b."""
        return self.start + b * self.tile.programs

    def fetch(self, b):
        """Start the copies of step b into its slot."""
        r, slot, tokens = self.r, lax.rem(b, self.tile.depth), pl.ds(self.block(b) * TOKENS, TOKENS)
        fetch_rows(r, self.sources, slot, tokens, self.all_cols)
        _fetch_cotangents(r, self.shape, self.at, slot, tokens, self.all_cols)
        plgpu.copy_gmem_to_smem(r.c.at[self.block(b)], r.scores.at[slot], r.full.at[slot])
        plgpu.copy_gmem_to_smem(r.logits.at[self.block(b)], r.logit_ring.at[slot], r.full.at[slot])
        if self.given:
            for i, (out, seen) in enumerate(zip(self.outs, self.sources.visible, strict=True)):
                target = r.given.at[slot, pl.ds(i * TOKENS, TOKENS)]
                copy_or_arrive(seen, out.at[tokens, self.all_cols], target, r.full.at[slot])

    def open(self):
        """Queries, zeros and the first blocks."""

        @pl.when(self.group == 0)
        def _():
            plgpu.copy_gmem_to_smem(self.r.w.at[:, self.all_cols], self.r.queries, self.r.parameters)
            _zero_both(self.r, self.shape, self.sources)
            for b in range(self.tile.depth):

                @pl.when(b < self.steps)
                def _(b=b):
                    self.fetch(b)

        plgpu.barrier_wait(self.r.parameters)
        if self.arrivals:
            plgpu.barrier_wait(self.r.zeroed)

    def weights(self, slot, block):
        """Store A^T, rows (row, token), columns (query, token): the sides take turns at eight queries."""
        for eighth in range(self.shape.padded // 8):

            @pl.when(self.side == eighth % self.tile.sides)
            def _(eighth=eighth):
                self.some_weights(slot, block, pl.ds(eighth * 64, 64))

        plgpu.commit_smem()
        plgpu.barrier_arrive(self.r.weighted)
        plgpu.barrier_wait(self.r.weighted)

    def some_weights(self, slot, block, span):
        """The columns `span` of this band's rows."""
        r, at = self.r, self.band * 8
        lse = plgpu.load(r.lse_in.at[block, span], layout=ACROSS, optimized=False)

        def weight(i):
            logit = plgpu.load(r.logit_ring.at[slot, at + i, span], layout=ACROSS, optimized=False)
            return jnp.exp(logit - lse)

        count = lax.min(8, self.shape.R - at)
        r.high[self.rows, span], r.low[self.rows, span] = diagonal((64, 64), count, weight, 1)

    def cotangent(self, slot, block):
        """What these rows add to d_sources."""
        r = self.r

        def products(acc):
            cotangents = r.cotangents.at[slot, :, self.cols]
            plgpu.wgmma(acc, r.high.at[self.rows], cotangents)
            plgpu.wgmma(acc, r.low.at[self.rows], cotangents)
            plgpu.wgmma(acc, r.scores.at[slot, self.rows], r.queries.at[:, self.cols])
            return acc[...]

        y = pl.run_scoped(products, plgpu.ACC((64, 64), F32))
        along = plgpu.load(r.along.at[block, self.rows], layout=DOWN, optimized=False)
        y -= lax.broadcast_in_dim(along, y.shape, (0,)) * self.load(r.rows, slot)
        return y + self.load(r.given, slot) if self.given else y

    def load(self, ring, slot):
        """This warpgroup's part of a slot, in fp32."""
        return plgpu.load(ring.at[slot, self.rows, self.cols], layout=WGMMA, optimized=False).astype(F32)

    def send(self, block):
        """Start the copies of this warpgroup's rows to memory; a hidden row keeps what was given."""
        tokens = pl.ds(block * TOKENS, TOKENS)
        for i, (out, seen) in enumerate(zip(self.outs, self.sources.visible, strict=True)):

            @pl.when((self.band == i // 8) & (seen if self.given else True))
            def _(i=i, out=out):
                staged = self.r.out.at[pl.ds(i * TOKENS, TOKENS), self.cols]
                plgpu.copy_smem_to_gmem(staged, out.at[tokens, self.out_cols], commit_group=False)

        plgpu.commit_smem_to_gmem_group()

    def run(self):
        """All blocks of this program, then its sum of dw."""
        r = self.r
        self.open()

        def blocks(dw):
            @pl.loop(0, self.steps)
            def _(b):
                slot, block = lax.rem(b, self.tile.depth), self.block(b)
                plgpu.barrier_wait(r.full.at[slot])
                self.weights(slot, block)
                c = r.scores.at[slot, self.rows].transpose((1, 0))
                plgpu.wgmma(dw, c, r.rows.at[slot, self.rows, self.cols])
                y = self.cotangent(slot, block)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                r.out[self.rows, self.cols] = y.astype(BF16)
                plgpu.wgmma_wait(0)
                plgpu.commit_smem()
                plgpu.barrier_arrive(r.done)
                plgpu.barrier_wait(r.done)
                self.send(block)

                @pl.when((self.group == 0) & (b + self.tile.depth < self.steps))
                def _():
                    self.fetch(b + self.tile.depth)

            return dw[...]

        r.dw[self.start, self.band, :, self.out_cols] = pl.run_scoped(blocks, plgpu.ACC((64, 64), F32))
        plgpu.wait_smem_to_gmem(0)
