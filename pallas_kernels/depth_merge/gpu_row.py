"""The kernels of Phase 2 in Mosaic GPU, as one warpgroup sees them; see gpu.py."""

from dataclasses import dataclass
from types import SimpleNamespace

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import LANES, WARPS, SharedRow

F32 = jnp.float32
LANES_OWN = {  # what each row of a program has for itself
    *("o_ring", "p_ring", "y_ring", "dx_ring", "dp_ring", "dh_ring", "exchange", "exchanged"),
    *("x_out", "h_out", "p_out", "do_out", "dp_out"),
}


@dataclass(frozen=True)
class Tile(SharedRow):
    """How a row is cut: warpgroups; and rows of a program at a time, slots of a ring and of the staging,
    programs at most."""

    tokens: int
    D: int
    groups: int
    lanes: int
    depth: int
    staged: int
    most: int

    @property
    def vector(self):
        """Columns of one access of a lane: the widest that a warpgroup's columns allow."""
        return next(v for v in (8, 4, 2) if self.D // self.groups % (WARPS * LANES * v) == 0)

    @property
    def programs(self):
        """Size of the grid."""
        return min(self.most, -(-self.tokens // self.lanes))

    def ring(self, slots, dtype):
        """Shared memory for `slots` rows of each lane."""
        return plgpu.SMEM((self.lanes, slots, *self.folded), dtype)

    def barriers(self, arrivals):
        """One barrier for each warpgroup and slot of the ring."""
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=self.lanes * self.groups * self.depth)


def _shares(over):
    """Of the running sum and of the rest in a read; 1 - the first would cancel where it is near 1."""
    return 1.0 / (1.0 + jnp.exp(-over)), 1.0 / (1.0 + jnp.exp(over))


class Row:
    """One warpgroup inside a kernel: its columns, its walk over the rows, its sums over a whole row."""

    def __init__(self, refs, tile):
        self.tile, self.all = tile, lax.axis_index("group")
        self.lane, self.group = lax.div(self.all, tile.groups), lax.rem(self.all, tile.groups)
        lanes = {k: ref.at[self.lane] for k, ref in vars(refs).items() if k in LANES_OWN}
        self.r = SimpleNamespace(**vars(refs) | lanes)
        self.start = lax.axis_index("program") * tile.lanes + self.lane
        self.stride = tile.programs * tile.lanes
        self.steps = (tile.tokens - self.start + self.stride - 1) // self.stride
        self.cols = pl.ds(self.group * tile.part[0], tile.part[0])
        self.row_j, self.first, self.at = refs.control[0], refs.control[1] != 0, refs.control[2]
        self.norm, self.keep = hasattr(refs, "scale"), hasattr(refs, "h_out") or hasattr(refs, "dh_ring")

    def token(self, i):
        """Of step i; the last one for a step past the end, which only prefetches scalars."""
        return lax.min(self.start + i * self.stride, self.tile.tokens - 1)

    def load(self, ref):
        """This warpgroup's columns, in fp32."""
        return plgpu.load(ref.at[self.cols], layout=self.tile.layout, optimized=False).astype(F32)

    def row_sums(self, values, slot):
        """Sums of elementwise values over the row, hence over the warps, in a fixed order.

        Two slots in turn: a warpgroup may write the next sums before another has read these.
        """
        for m, v in enumerate(values):
            self.r.exchange[slot, self.group, m] = jnp.sum(jnp.sum(v, 0), 1)
        plgpu.barrier_arrive(self.r.exchanged)
        plgpu.barrier_wait(self.r.exchanged)
        parts = [(g, warp) for g in range(self.tile.groups) for warp in range(WARPS)]
        return [sum(self.r.exchange[slot, g, m, warp] for g, warp in parts) for m in range(len(values))]

    def open(self, p_rings):
        """Load the parameters, close the running sum's ring if there is no sum yet, fill the rings."""
        r, loaded = self.r, self.r.parameters_full.at[self.group]

        @pl.when(self.lane == 0)
        def _():
            plgpu.copy_gmem_to_smem(r.w.at[self.cols], r.w_row.at[self.cols], loaded)
            if self.norm:
                plgpu.copy_gmem_to_smem(r.scale.at[self.cols], r.scale_row.at[self.cols], loaded)

        @pl.when(self.first)
        def _():
            zero = plgpu.layout_cast(jnp.zeros(self.tile.part, r.p_ring.dtype), self.tile.layout)
            for ring in p_rings:
                for slot in range(self.tile.depth):
                    ring.at[slot][self.cols] = zero

        for i in range(self.tile.depth):
            self.fetch(i)
        plgpu.barrier_wait(loaded)

    def fetch(self, i):
        """Start the copies of step i into its slot."""
        slot, t = lax.rem(i, self.tile.depth), self.token(i)
        full = self.all * self.tile.depth + slot

        def copy(sources, full):
            for source, ring in sources:
                plgpu.copy_gmem_to_smem(source.at[t, self.cols], ring.at[slot, self.cols], full)

        @pl.when(i < self.steps)
        def _():
            copy(self.o_sources, self.r.o_full.at[full])

        @pl.when((i < self.steps) & jnp.logical_not(self.first))
        def _():
            copy(self.p_sources, self.r.p_full.at[full])

    def arrived(self, i):
        """Wait for the copies of step i; returns their slot."""
        slot = lax.rem(i, self.tile.depth)
        full = self.all * self.tile.depth + slot
        plgpu.barrier_wait(self.r.o_full.at[full])

        @pl.when(jnp.logical_not(self.first))
        def _():
            plgpu.barrier_wait(self.r.p_full.at[full])

        return slot

    def send(self, staged, out, t):
        """Start the copy of one staged row to memory."""
        plgpu.copy_smem_to_gmem(staged.at[self.cols], out.at[t, self.cols], commit_group=False)

    def forward(self, eps, norm_eps):
        """All rows of this program."""
        r = self.r
        self.o_sources = [(r.mixtures.at[self.row_j], r.o_ring)]
        self.p_sources = [(r.streams.at[self.at], r.p_ring)] + ([(r.y, r.y_ring)] if hasattr(r, "y") else [])
        self.open([ring for _, ring in self.p_sources])

        def step(i, lse):
            following = r.lse[self.row_j, self.token(i + 1)]  # one step ahead: its latency is hidden
            slot, out = self.arrived(i), lax.rem(i, self.tile.staged)
            plgpu.wait_smem_to_gmem(self.tile.staged - 1, wait_read_only=True)
            p = self.summed(slot, out)
            score, r_p, over = self.score(p, lse, eps, 0 if self.norm else lax.rem(i, 2))
            o = self.load(r.o_ring.at[slot])
            h = o + _shares(over)[0] * (p - o)
            r_h = self.finish(h, out, norm_eps)
            plgpu.commit_smem()
            t = self.token(i)
            self.store(t, out, (score, r_p, over, r_h))
            self.fetch(i + self.tile.depth)
            return following

        lax.fori_loop(0, self.steps, step, r.lse[self.row_j, self.token(0)])
        plgpu.wait_smem_to_gmem(0)

    def summed(self, slot, out):
        """The running sum, with y added and rounded where it is pending."""
        r, p = self.r, self.load(self.r.p_ring.at[slot])
        if not hasattr(r, "y"):
            return p
        new = (p + self.load(r.y_ring.at[slot])).astype(r.p_ring.dtype)
        r.p_out.at[out][self.cols] = new
        return new.astype(F32)

    def score(self, p, lse, eps, exchange):
        """Score and reciprocal rms of the running sum, and how far the score is above the rest's."""
        squares, dot = self.row_sums((p * p, p * self.load(self.r.w_row)), exchange)
        r_p = lax.rsqrt(squares * (1.0 / self.tile.D) + eps)
        score = dot * r_p
        return score, r_p, jnp.where(self.first, -jnp.inf, score - lse)

    def finish(self, h, out, norm_eps):
        """Stage the normed read (and the mixture); returns the reciprocal rms."""
        r, dtype = self.r, self.r.x_out.dtype
        if not self.norm:
            r.x_out.at[out][self.cols] = h.astype(dtype)
            return jnp.float32(1.0)
        (squares,) = self.row_sums((h * h,), 1)
        r_h = lax.rsqrt(squares * (1.0 / self.tile.D) + norm_eps)
        r.x_out.at[out][self.cols] = (h * r_h * self.load(r.scale_row)).astype(dtype)
        if self.keep:
            r.h_out.at[out][self.cols] = h.astype(dtype)
        return r_h

    def store(self, t, out, stats):
        """Send one row's outputs and statistics."""
        r = self.r
        if hasattr(r, "y"):

            @pl.when(jnp.logical_not(self.first))
            def _():
                self.send(r.p_out.at[out], r.streams.at[self.at], t)

        if self.keep:
            self.send(r.h_out.at[out], r.mixture, t)
        self.send(r.x_out.at[out], r.x, t)
        plgpu.commit_smem_to_gmem_group()

        @pl.when(self.group == 0)
        def _():
            for m, v in enumerate(stats):
                r.stats[m, t] = v

    def backward(self):
        """All rows of this program, then its sums of dw and dscale."""
        r = self.r
        self.o_sources = [(r.mixtures.at[self.row_j], r.o_ring), (r.d_x, r.dx_ring), (r.d_stream, r.dp_ring)]
        self.o_sources += [(r.d_mixture, r.dh_ring)] if self.keep else []
        self.p_sources = [(r.streams.at[self.at], r.p_ring)]
        self.open([r.p_ring])
        zero = plgpu.layout_cast(jnp.zeros(self.tile.part, F32), self.tile.layout)

        def step(i, carry):
            stats, *sums = carry
            following = self.stats(i + 1)
            slot, t = self.arrived(i), self.token(i)
            m1, d_score = self.reductions(slot, stats, lax.rem(i, 2))
            out = lax.rem(i, self.tile.staged)
            plgpu.wait_smem_to_gmem(self.tile.staged - 1, wait_read_only=True)
            own = self.cotangents(slot, out, stats, m1, d_score)
            plgpu.commit_smem()
            self.send_cotangents(t, out, d_score)
            self.fetch(i + self.tile.depth)
            return following, *(a + b for a, b in zip(sums, own, strict=True))

        _, *sums = lax.fori_loop(0, self.steps, step, (self.stats(0), *[zero] * (1 + self.norm)))
        self.send_sums(sums)
        plgpu.wait_smem_to_gmem(0)

    def stats(self, i):
        """Scalars of step i: score, reciprocal rms of p, score - lse, reciprocal rms of h."""
        return tuple(self.r.stats[m, self.token(i)] for m in range(4))

    def parts(self, slot, stats):
        """The row again: p, p - o, the normed h, and its cotangent before the scale."""
        (gate, _), r_h = _shares(stats[2]), stats[3]
        p, o = self.load(self.r.p_ring.at[slot]), self.load(self.r.o_ring.at[slot])
        return p, p - o, (o + gate * (p - o)) * r_h, self.load(self.r.dx_ring.at[slot])

    def reductions(self, slot, stats, exchange):
        """Mean of (normed h) * (its cotangent), and the cotangent of the score."""
        (gate, rest), r_h = _shares(stats[2]), stats[3]
        _, u, h, d = self.parts(slot, stats)
        q = d * self.load(self.r.scale_row) if self.norm else d
        direct = q + self.load(self.r.dh_ring.at[slot]) * (1.0 / r_h) if self.keep else q
        if not self.norm:
            (d_gate,) = self.row_sums((direct * u,), exchange)
            return jnp.float32(0.0), gate * rest * d_gate
        hq, qu, hu = self.row_sums((h * q, direct * u, h * u), exchange)
        m1 = hq * (1.0 / self.tile.D)
        return m1, gate * rest * r_h * (qu - m1 * hu)

    def cotangents(self, slot, out, stats, m1, d_score):
        """Stage the cotangents of p and of row j; returns this row's share of dw and dscale."""
        r, (score, r_p, over, r_h) = self.r, stats
        gate, rest = _shares(over)
        p, _, h, d = self.parts(slot, stats)
        d_h = (d * self.load(r.scale_row) - h * m1) * r_h if self.norm else d
        if self.keep:
            d_h += self.load(r.dh_ring.at[slot])
        c = d_score * r_p
        own = gate * d_h + c * self.load(r.w_row) - (c * score * r_p * (1.0 / self.tile.D)) * p
        r.dp_out.at[out][self.cols] = (self.load(r.dp_ring.at[slot]) + own).astype(r.dp_out.dtype)
        r.do_out.at[out][self.cols] = (rest * d_h).astype(r.do_out.dtype)
        return (c * p, h * d) if self.norm else (c * p,)

    def send_cotangents(self, t, out, d_score):
        """One row of the stream's cotangent, and of row j, in place."""
        r = self.r
        self.send(r.dp_out.at[out], r.d_p, t)
        self.send(r.do_out.at[out], r.d_mixtures.at[self.row_j], t)
        plgpu.commit_smem_to_gmem_group()

        @pl.when(self.group == 0)
        def _():
            r.d_lse[self.row_j, t] = -d_score

    def send_sums(self, sums):
        """This program's dw and dscale, through the parameters' shared memory: it has one lane."""
        r = self.r
        rows = [(r.w_row, r.dw)] + ([(r.scale_row, r.dscale)] if self.norm else [])
        for (row, _), value in zip(rows, sums, strict=True):
            row[self.cols] = value
        plgpu.commit_smem()
        for row, out in rows:
            self.send(row, out, self.start)
        plgpu.commit_smem_to_gmem_group()
