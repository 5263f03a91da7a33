"""Phase 2 in Pallas Mosaic GPU (Hopper and newer): one read of a block in one kernel, and its backward.

A program is a few warpgroups that share one row of D at a time (each D / groups columns, sums exchanged
through shared memory) and walks over the rows in strides of the grid, behind a ring of TMA copies: any
number of tokens, no masks, no atomics. dw and dscale are summed in registers over a program's rows, leave
as [programs, D], and are added up outside.

When `first` is set, the running sum (and `y`, and `d_stream`) moves no bytes: its ring holds zeros and the
gate is closed. In-place operands are `jax.Ref`s.

stats [4, tokens] fp32: the score, the reciprocal rms of p, the gate, the reciprocal rms of h.

Limits: D a multiple of 256 (a TMA copy takes 256 elements along an axis) whose 256-column chunks split
evenly into at most 8 warpgroups of at most 14; one row of every operand fits the 223 KiB of shared memory;
all wide operands bf16, or all fp32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import PROGRAMS, SHARED_BYTES, run, shaped

F32 = jnp.float32
CHUNK = 256  # columns; rows are folded to [D / CHUNK, CHUNK]
MAX_GROUPS, GOOD_CHUNKS, MAX_CHUNKS = 8, 9, 14  # chunks per warpgroup: for occupancy, and before spills


class Forward(NamedTuple):
    """The sublayer's input, the mixture on request, the running sum, and what backward needs."""

    x: Any
    mixture: Any
    stream: Any
    stats: Any


class Tile(NamedTuple):
    """How a row is cut: warpgroups, slots of the input ring and of the output staging."""

    tokens: int
    D: int
    groups: int
    depth: int
    staged: int

    @property
    def chunks(self):
        """Chunks of one warpgroup."""
        return self.D // CHUNK // self.groups

    @property
    def programs(self):
        """Size of the grid."""
        return min(PROGRAMS, self.tokens)

    @property
    def layout(self):
        """Registers of one warpgroup's columns, as wide per access as they allow."""
        wide = next(v for v in (8, 4, 2) if self.chunks * CHUNK % (128 * v) == 0)
        return plgpu.Layout.WG_STRIDED((self.chunks, CHUNK), vec_size=wide)

    def ring(self, slots, dtype):
        """Shared memory for `slots` rows."""
        return plgpu.SMEM((slots, self.D // CHUNK, CHUNK), dtype)

    def barriers(self, arrivals):
        """One barrier for each warpgroup and slot of the ring."""
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=self.groups * self.depth)


def tile_of(stream, inputs, outputs):
    """The tile for so many wide inputs and outputs; raises where there is none."""
    tokens, D = stream.shape
    if D % CHUNK:
        raise ValueError(f"stream: D = {D} is not a multiple of {CHUNK}, the longest TMA copy; use triton")
    splits = [g for g in range(1, MAX_GROUPS + 1) if D // CHUNK % g == 0]
    groups = next((g for g in splits if D // CHUNK // g <= GOOD_CHUNKS), splits[-1])
    if D // CHUNK // groups > MAX_CHUNKS:
        raise ValueError(
            f"stream: D = {D} does not split into at most {MAX_GROUPS} warpgroups of at most "
            f"{MAX_CHUNKS * CHUNK} columns; use triton"
        )
    depth, staged = _slots(D, jnp.dtype(stream.dtype).itemsize, inputs, outputs)
    return Tile(tokens, D, groups, depth, staged)


def _slots(D, itemsize, inputs, outputs):
    """Deep enough to hide the memory, and two programs per processor rather than one."""
    choices = [(3, 2), (2, 2), (2, 1), (1, 1)]
    for limit, allowed in ((SHARED_BYTES // 2, choices[:3]), (SHARED_BYTES, choices)):
        for depth, staged in allowed:
            if D * ((depth * inputs + staged * outputs) * itemsize + 8) + 1024 <= limit:
                return depth, staged
    raise ValueError(
        f"stream: a row of D = {D} in {inputs} inputs and {outputs} outputs of {itemsize} bytes "
        f"exceeds {SHARED_BYTES} bytes of shared memory; use triton"
    )


def _check(stream, **wide):
    if stream.dtype not in (jnp.bfloat16, F32):
        raise ValueError(f"stream: dtype {stream.dtype} is neither bfloat16 nor float32")
    for name, array in wide.items():
        if array is not None and array.dtype != stream.dtype:
            raise ValueError(f"{name}: dtype {array.dtype} differs from that of stream, {stream.dtype}")


def forward(
    w, scale, mixtures, lse, stream, j, first, y=None, *, eps, norm_eps, keep_mixture, interpret=None
):
    """Read row j merged with the running sum; see the contract in the README of this folder."""
    _check(stream, mixtures=mixtures, y=y)
    keep, add = keep_mixture and scale is not None, y is not None
    tile = tile_of(stream, 2 + add, 1 + keep + add)
    dtype, row = stream.dtype, (tile.tokens, tile.D // CHUNK, CHUNK)
    running = jax.new_ref(_fold(stream)) if add else _fold(stream)
    inputs = {
        "control": _control(j, first),
        "lse": lse,
        "w": _fold(w),
        "mixtures": _fold(mixtures),
        "stream": running,
    }
    inputs |= {"scale": _fold(scale)} if scale is not None else {}
    inputs |= {"y": _fold(y)} if add else {}
    outputs = {"x": shaped(row, dtype), "stats": shaped((4, tile.tokens))}
    outputs |= {"mixture": shaped(row, dtype)} if keep else {}
    scratch = {"o_ring": tile.ring(tile.depth, dtype), "p_ring": tile.ring(tile.depth, dtype)}
    scratch |= {"y_ring": tile.ring(tile.depth, dtype)} if add else {}
    scratch |= {"x_out": tile.ring(tile.staged, dtype)}
    scratch |= {"h_out": tile.ring(tile.staged, dtype)} if keep else {}
    scratch |= {"p_out": tile.ring(tile.staged, dtype)} if add else {}
    scratch |= _shared(tile, scale is not None, o_arrivals=1, p_arrivals=1 + add)
    out = run(
        lambda r: _Row(r, tile).forward(eps, norm_eps),
        inputs,
        outputs,
        scratch,
        grid={"program": tile.programs},
        groups=tile.groups,
        name="depth_merge_forward",
        interpret=interpret,
    )
    x = out.x.reshape(stream.shape)
    mixture = out.mixture.reshape(stream.shape) if keep else x
    new = running[...].reshape(stream.shape) if add else stream
    return Forward(x, mixture if keep_mixture else None, new, out.stats)


def backward(
    w,
    scale,
    mixtures,
    lse,
    stream,
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
    """Cotangents (dw, dscale, d_stream, d_mixtures, d_lse); the last three written in place."""
    del lse, eps, norm_eps  # all that they say is in stats
    _check(stream, mixtures=mixtures, d_x=d_x, d_mixture=d_mixture, d_stream=d_stream, d_mixtures=d_mixtures)
    norm, keep = scale is not None, d_mixture is not None
    tile = tile_of(stream, 4 + keep, 2)
    sums = shaped((tile.programs, tile.D // CHUNK, CHUNK))
    running, row_j, lse_j = jax.new_ref(_fold(d_stream)), jax.new_ref(_fold(d_mixtures)), jax.new_ref(d_lse)
    inputs = {"control": _control(j, first), "stats": stats, "w": _fold(w), "mixtures": _fold(mixtures)}
    inputs |= {
        "stream": _fold(stream),
        "d_x": _fold(d_x),
        "d_stream": running,
        "d_mixtures": row_j,
        "d_lse": lse_j,
    }
    inputs |= {"scale": _fold(scale)} if norm else {}
    inputs |= {"d_mixture": _fold(d_mixture)} if keep else {}
    rings = ["o_ring", "p_ring", "dx_ring", "dp_ring"] + ["dh_ring"] * keep
    scratch = {ring: tile.ring(tile.depth, stream.dtype) for ring in rings}
    scratch |= {staging: tile.ring(tile.staged, stream.dtype) for staging in ("do_out", "dp_out")}
    scratch |= _shared(tile, norm, o_arrivals=2 + keep, p_arrivals=2)
    out = run(
        lambda r: _Row(r, tile).backward(),
        inputs,
        {"dw": sums} | ({"dscale": sums} if norm else {}),
        scratch,
        grid={"program": tile.programs},
        groups=tile.groups,
        name="depth_merge_backward",
        interpret=interpret,
    )
    dw = jnp.sum(out.dw, 0).reshape(-1)
    dscale = jnp.sum(out.dscale, 0).reshape(-1) if norm else None
    return dw, dscale, running[...].reshape(stream.shape), row_j[...].reshape(mixtures.shape), lse_j[...]


def _fold(a):
    return a.reshape(*a.shape[:-1], -1, CHUNK)


def _control(j, first):
    return jnp.stack([jnp.asarray(j, jnp.int32), jnp.asarray(first, jnp.int32)])


def _shared(tile, norm, o_arrivals, p_arrivals):
    """The parameters in fp32, the exchange of row sums, and the barriers."""
    parameter = plgpu.SMEM((tile.D // CHUNK, CHUNK), F32)
    return dict(
        w_row=parameter,
        **({"scale_row": parameter} if norm else {}),
        exchange=plgpu.SMEM((2, tile.groups, 4), F32),
        o_full=tile.barriers(o_arrivals),
        p_full=tile.barriers(p_arrivals),
        parameters_full=plgpu.Barrier(num_arrivals=1 + norm, num_barriers=tile.groups),
        exchanged=plgpu.Barrier(num_arrivals=tile.groups),
    )


class _Row:
    """One warpgroup inside a kernel: its columns, its walk over the rows, its sums over a whole row."""

    def __init__(self, refs, tile):
        self.r, self.tile = refs, tile
        self.group, self.start = lax.axis_index("group"), lax.axis_index("program")
        self.steps = (tile.tokens - self.start + tile.programs - 1) // tile.programs
        self.cols = pl.ds(self.group * tile.chunks, tile.chunks)
        self.row_j, self.first = refs.control[0], refs.control[1] != 0
        self.norm, self.keep = hasattr(refs, "scale"), hasattr(refs, "h_out") or hasattr(refs, "dh_ring")

    def token(self, i):
        """Of step i; the last one for a step past the end, which only prefetches scalars."""
        return lax.min(self.start + i * self.tile.programs, self.tile.tokens - 1)

    def load(self, ref):
        """This warpgroup's columns, in fp32."""
        return plgpu.load(ref.at[self.cols], layout=self.tile.layout, optimized=False).astype(F32)

    def row_sums(self, values, slot):
        """Sums of elementwise values over the row, hence over the warpgroups, in a fixed order."""
        values = [jnp.sum(v) for v in values]
        if self.tile.groups == 1:
            return values
        for m, v in enumerate(values):
            self.r.exchange[slot, self.group, m] = v
        plgpu.barrier_arrive(self.r.exchanged)
        plgpu.barrier_wait(self.r.exchanged)
        groups = range(self.tile.groups)
        return [sum(self.r.exchange[slot, g, m] for g in groups) for m in range(len(values))]

    def open(self, p_rings):
        """Load the parameters, close the running sum's ring if there is no sum yet, fill the rings."""
        r, loaded = self.r, self.r.parameters_full.at[self.group]
        plgpu.copy_gmem_to_smem(r.w.at[self.cols], r.w_row.at[self.cols], loaded)
        if self.norm:
            plgpu.copy_gmem_to_smem(r.scale.at[self.cols], r.scale_row.at[self.cols], loaded)

        @pl.when(self.first)
        def _():
            zero = plgpu.layout_cast(jnp.zeros((self.tile.chunks, CHUNK), r.p_ring.dtype), self.tile.layout)
            for ring in p_rings:
                for slot in range(self.tile.depth):
                    ring.at[slot][self.cols] = zero

        for i in range(self.tile.depth):
            self.fetch(i)
        plgpu.barrier_wait(loaded)

    def fetch(self, i):
        """Start the copies of step i into its slot."""
        slot, t = lax.rem(i, self.tile.depth), self.token(i)
        full = self.group * self.tile.depth + slot

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
        full = self.group * self.tile.depth + slot
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
        self.p_sources = [(r.stream, r.p_ring)] + ([(r.y, r.y_ring)] if hasattr(r, "y") else [])
        self.open([ring for _, ring in self.p_sources])

        def step(i, lse):
            following = r.lse[self.row_j, self.token(i + 1)]  # one step ahead: its latency is hidden
            slot, out = self.arrived(i), lax.rem(i, self.tile.staged)
            plgpu.wait_smem_to_gmem(self.tile.staged - 1, wait_read_only=True)
            p = self.summed(slot, out)
            score, r_p, gate = self.gate(p, lse, eps)
            o = self.load(r.o_ring.at[slot])
            h = o + gate * (p - o)
            r_h = self.finish(h, out, norm_eps)
            plgpu.commit_smem()
            t = self.token(i)
            self.store(t, out, (score, r_p, gate, r_h))
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

    def gate(self, p, lse, eps):
        """Score and reciprocal rms of the running sum, and its share of the read."""
        squares, dot = self.row_sums((p * p, p * self.load(self.r.w_row)), 0)
        r_p = lax.rsqrt(squares * (1.0 / self.tile.D) + eps)
        score = dot * r_p
        return score, r_p, jnp.where(self.first, 0.0, 1.0 / (1.0 + jnp.exp(lse - score)))

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
                self.send(r.p_out.at[out], r.stream, t)

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
        self.o_sources = [(r.mixtures.at[self.row_j], r.o_ring), (r.d_x, r.dx_ring)]
        self.o_sources += [(r.d_mixture, r.dh_ring)] if self.keep else []
        self.p_sources = [(r.stream, r.p_ring), (r.d_stream, r.dp_ring)]
        self.open([r.p_ring])
        zero = plgpu.layout_cast(jnp.zeros((self.tile.chunks, CHUNK), F32), self.tile.layout)

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
        """Scalars of step i: score, reciprocal rms of p, gate, reciprocal rms of h."""
        return tuple(self.r.stats[m, self.token(i)] for m in range(4))

    def parts(self, slot, stats):
        """The row again: p, p - o, the normed h, and its cotangent before the scale."""
        _, _, gate, r_h = stats
        p, o = self.load(self.r.p_ring.at[slot]), self.load(self.r.o_ring.at[slot])
        return p, p - o, (o + gate * (p - o)) * r_h, self.load(self.r.dx_ring.at[slot])

    def reductions(self, slot, stats, exchange):
        """Mean of (normed h) * (its cotangent), and the cotangent of the score."""
        _, _, gate, r_h = stats
        _, u, h, d = self.parts(slot, stats)
        q = d * self.load(self.r.scale_row) if self.norm else d
        direct = q + self.load(self.r.dh_ring.at[slot]) * (1.0 / r_h) if self.keep else q
        if not self.norm:
            (d_gate,) = self.row_sums((direct * u,), exchange)
            return jnp.float32(0.0), gate * (1.0 - gate) * d_gate
        hq, qu, hu = self.row_sums((h * q, direct * u, h * u), exchange)
        m1 = hq * (1.0 / self.tile.D)
        return m1, gate * (1.0 - gate) * r_h * (qu - m1 * hu)

    def cotangents(self, slot, out, stats, m1, d_score):
        """Stage the cotangents of p and of row j; returns this row's share of dw and dscale."""
        r, (score, r_p, gate, r_h) = self.r, stats
        p, _, h, d = self.parts(slot, stats)
        d_h = (d * self.load(r.scale_row) - h * m1) * r_h if self.norm else d
        if self.keep:
            d_h += self.load(r.dh_ring.at[slot])
        c = d_score * r_p
        own = gate * d_h + c * self.load(r.w_row) - (c * score * r_p * (1.0 / self.tile.D)) * p
        r.dp_out.at[out][self.cols] = (self.load(r.dp_ring.at[slot]) + own).astype(r.dp_out.dtype)
        r.do_out.at[out][self.cols] = ((1.0 - gate) * d_h).astype(r.do_out.dtype)
        return (c * p, h * d) if self.norm else (c * p,)

    def send_cotangents(self, t, out, d_score):
        """One row of d_stream and of row j, in place."""
        r = self.r

        @pl.when(jnp.logical_not(self.first))
        def _():
            self.send(r.dp_out.at[out], r.d_stream, t)

        self.send(r.do_out.at[out], r.d_mixtures.at[self.row_j], t)
        plgpu.commit_smem_to_gmem_group()

        @pl.when(self.group == 0)
        def _():
            r.d_lse[self.row_j, t] = -d_score

    def send_sums(self, sums):
        """This program's dw and dscale, through the parameters' shared memory."""
        r = self.r
        rows = [(r.w_row, r.dw)] + ([(r.scale_row, r.dscale)] if self.norm else [])
        for (row, _), value in zip(rows, sums, strict=True):
            row[self.cols] = value
        plgpu.commit_smem()
        for row, out in rows:
            self.send(row, out, self.start)
        plgpu.commit_smem_to_gmem_group()
