"""Phase 1 in Pallas Mosaic GPU (Hopper: WGMMA): S queries at once over R sources, and its backward.

Four kernels, all of them streams over D in chunks, so that no whole row must fit shared memory:

    score     logits and reciprocal rms of every visible row     reads the sources
    mix       softmax over the rows and the mixtures             reads the sources, writes S mixtures
    dscore    cotangents of the logits                           reads the sources and S cotangents
    apply     cotangents of the sources, and dw                  reads both again, and d_sources

Bytes per token, in rows of D, for n visible rows: forward 2n + S (the bound is n + S), backward 4n + 2S
(bound 3n + S). What is read twice is the price of scoring whole rows without holding them: eight tokens of
eight sources at D = 2304 are 295 KB. Logits, weights and their cotangents are fp32 and small.

Eight tokens make one matrix product: a block-diagonal matrix of weights, rows (query, token) and columns
(row, token), times the rows. Weights, queries and the cotangents of logits enter as two bf16 halves (2^-16),
so nothing but the result is rounded. dw is summed in registers over a program's tokens, leaves as one
[2 * 16, D] partial per program, and is added up outside: fixed order, no atomics.

A row beyond its array's count moves no bytes: its barrier gets an arrival instead of a copy, its slot in
shared memory holds zeros. Boxes of eight tokens are zero-filled and clipped at the end of the array.

stats, one for each 16 queries: logits [tokens / 8, R, 8 queries] (entry query * 8 + token), rstd [R, tokens].

Limits: sources bf16, D a multiple of 64, R at most 16 in all. More than 16 queries run 16 at a time: the
sources are read once for each 16, and the mixtures are put together by a copy.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import PROGRAMS, SHARED_BYTES, run, shaped

F32, BF16 = jnp.float32, jnp.bfloat16
TOKENS = 8  # of one matrix product
QUERIES = 16  # at once
ROWS = 16
WGMMA = plgpu.Layout.WGMMA
DOWN, ACROSS = WGMMA.reduce(1), WGMMA.reduce(0)  # a vector over the rows or the columns of a matrix


class Forward(NamedTuple):
    """The mixtures, the log of the sum of exponentials, and what backward needs."""

    mixture: Any
    lse: Any
    stats: Any


class Shape(NamedTuple):
    """Sizes of one call: R rows, `queries` padded to eights, `blocks` of eight tokens, chunks of D."""

    tokens: int
    D: int
    R: int
    queries: int

    @property
    def blocks(self):
        """Blocks of eight tokens."""
        return -(-self.tokens // TOKENS)

    @property
    def padded(self):
        """Queries rounded up to eights: what a warpgroup of 64 rows holds."""
        return -(-self.queries // 8) * 8

    @property
    def chunk(self):
        """Columns of one step."""
        return 128 if self.D % 128 == 0 else 64

    def depth(self, wanted, chunk):
        """Slots of the ring."""
        return min(wanted, self.D // chunk)


def _shape(w, sources):
    _, tokens, D = sources[0].shape
    R = sum(len(v) for v in sources)
    for k, v in enumerate(sources):
        if v.dtype != BF16:
            raise ValueError(f"sources[{k}]: dtype {v.dtype}; Mosaic GPU mixes bfloat16 only, use triton")
        if v.shape[1:] != (tokens, D):
            raise ValueError(f"sources[{k}]: shape {v.shape} does not end in {(tokens, D)}")
    if D % 64:
        raise ValueError(f"sources: D = {D} is not a multiple of 64, a WGMMA tile; use triton")
    if not 1 <= R <= ROWS:
        raise ValueError(f"sources: R = {R} rows, not from 1 to {ROWS}; use triton")
    return Shape(tokens, D, R, len(w))


def forward(w, sources, counts, *, eps, interpret=None):
    """Mixture and lse of every query; see the contract in the README of this folder."""
    _shape(w, sources)
    parts = [_forward(w[s : s + QUERIES], sources, counts, eps, interpret) for s in range(0, len(w), QUERIES)]
    if len(parts) == 1:
        return Forward(parts[0].mixture, parts[0].lse, (parts[0].stats,))
    mixture, lse = (jnp.concatenate([p[i] for p in parts]) for i in range(2))
    return Forward(mixture, lse, tuple(p.stats for p in parts))


def backward(w, sources, counts, lse, stats, d_mixture, d_lse, d_sources, *, eps, interpret=None):
    """(dw, d_sources), the latter added to what was given, in place."""
    del eps  # all that it says is in stats
    _shape(w, sources)
    dw = []
    for i, stat in enumerate(stats):
        some = slice(i * QUERIES, min((i + 1) * QUERIES, len(w)))
        part, d_sources = _backward(
            w[some], sources, counts, lse[some], stat, d_mixture, i * QUERIES, d_lse[some], d_sources, interpret
        )
        dw.append(part)
    return jnp.concatenate(dw), d_sources


def _forward(w, sources, counts, eps, interpret):
    shape = _shape(w, sources)
    logits, rstd = _score(shape, _halves(w, shape.padded), sources, counts, eps, interpret)
    logits = _block_queries(logits[:, : shape.blocks * TOKENS])
    mixture, lse = _mix(shape, logits, sources, counts, interpret)
    return Forward(mixture, _from_blocks(lse, shape), (logits, rstd[:, : shape.tokens]))


def _backward(w, sources, counts, lse, stat, d_mixture, at, d_lse, d_sources, interpret):
    """The backward of 16 queries, those of `d_mixture` from `at` on."""
    shape, (logits, rstd) = _shape(w, sources), stat
    lse, d_lse = _to_blocks(lse, shape), _to_blocks(d_lse, shape)
    d_logits = _dscore(shape, logits, lse, d_lse, sources, counts, d_mixture, at, interpret)
    visible = _visible(sources, counts)[None, :, None, None]
    rstd = jnp.pad(rstd, ((0, 0), (0, shape.blocks * TOKENS - shape.tokens)))
    rstd = rstd.reshape(shape.R, shape.blocks, 1, TOKENS).swapaxes(0, 1)
    tile = (shape.blocks, shape.R, shape.padded, TOKENS)
    c = jnp.where(visible, d_logits.reshape(tile) * rstd, 0)
    along = jnp.sum(jnp.where(visible, c * logits.reshape(tile) * rstd, 0), 2) / shape.D
    return _apply(
        shape, w, _columns(c), _pad_rows(along), logits, lse, sources, counts, d_mixture, at, d_sources, interpret
    )


def _visible(sources, counts):
    """[R]: which rows are seen."""
    rows = [jnp.arange(len(v)) < (len(v) if n is None else n) for v, n in zip(sources, counts, strict=True)]
    return jnp.concatenate(rows)


def _halves(a, rows):
    """[S, D] fp32 as bf16 halves [2 * rows, D] whose sum has 2^-16 of its error."""
    a = jnp.pad(a, ((0, rows - len(a)), (0, 0)))
    high = a.astype(BF16)
    return jnp.concatenate([high, (a - high.astype(F32)).astype(BF16)])


def _block_queries(a):
    """[R, blocks * 8, queries] to [blocks, R, queries * 8]: the rows (query, token) of a block in one line."""
    R, _, queries = a.shape
    return a.reshape(R, -1, TOKENS, queries).transpose(1, 0, 3, 2).reshape(-1, R, queries * TOKENS)


def _to_blocks(a, shape):
    """[S, tokens] to [blocks, queries * 8]."""
    a = jnp.pad(a, ((0, shape.padded - len(a)), (0, shape.blocks * TOKENS - shape.tokens)))
    return a.reshape(shape.padded, shape.blocks, TOKENS).swapaxes(0, 1).reshape(shape.blocks, -1)


def _from_blocks(a, shape):
    """The inverse of `_to_blocks`."""
    a = a.reshape(shape.blocks, shape.padded, TOKENS).swapaxes(0, 1)
    return a.reshape(shape.padded, -1)[: shape.queries, : shape.tokens]


def _columns(c):
    """[blocks, R, queries, 8] to bf16 [blocks, rows (row, token) in 64s, 64]: its halves high, low, high."""
    c = c.swapaxes(2, 3).reshape(len(c), -1, c.shape[2])
    high = c.astype(BF16)
    columns = jnp.concatenate([high, (c - high.astype(F32)).astype(BF16), high], 2)
    return jnp.pad(columns, ((0, 0), (0, -c.shape[1] % 64), (0, 64 - columns.shape[2])))


def _pad_rows(a):
    """[blocks, R, 8] to [blocks, rows (row, token) in 64s]."""
    a = a.reshape(len(a), -1)
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % 64)))


def _tiled(*shape, inner, dtype=BF16):
    """Shared memory as WGMMA reads it; both operands need the swizzle of the length they contract."""
    swizzle = plgpu.find_swizzle(inner * 16)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _up(a, b):
    return -(-a // b) * b


class _Sources:
    """The rows of all arrays inside a kernel, and which of them are visible."""

    def __init__(self, r, sources, counts):
        arrays = [getattr(r, f"source{k}") for k in range(len(sources))]
        self.rows = [array.at[i] for array, v in zip(arrays, sources, strict=True) for i in range(len(v))]
        self.visible = []
        for k, (v, n) in enumerate(zip(sources, counts, strict=True)):
            seen = True if n is None else r.counts[k]
            self.visible += [True if n is None else i < seen for i in range(len(v))]


def _named(sources, counts):
    """The kernel's inputs for the sources: the counts, then one array each."""
    n = [len(v) if n is None else n for v, n in zip(sources, counts, strict=True)]
    counts = jnp.stack([jnp.asarray(x, jnp.int32) for x in n])
    return dict(counts=counts) | {f"source{k}": v for k, v in enumerate(sources)}


def _copy_or_arrive(visible, source, target, barrier):
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


def _zero(zeros, ring, visible, barrier):
    """Zeros where no copy will land: rows not visible, and those that fill up the matrix."""
    for slot in range(ring.shape[0]):
        for i in range(ring.shape[1] // TOKENS):
            seen = visible[i] if i < len(visible) else False
            hidden = True if seen is False else (False if seen is True else jnp.logical_not(seen))
            if hidden is not False:
                _copy_or_arrive(hidden, zeros, ring.at[slot, pl.ds(i * TOKENS, TOKENS)], barrier)


def _zero_arrivals(depth, rows, sources, counts):
    """Arrivals that `_zero` makes on its barrier."""
    fixed = sum(len(v) for v, n in zip(sources, counts, strict=True) if n is None)
    return depth * (rows // TOKENS - fixed)


def _score(shape, w, sources, counts, eps, interpret):
    """Logits [R, tokens in 64s, queries] and rstd [R, tokens in 64s] of the visible rows."""
    chunk, padded = shape.chunk, shape.padded
    chunks, depth, blocks = shape.D // chunk, shape.depth(4, chunk), -(-shape.tokens // 64)

    def body(r):
        tokens = pl.ds(lax.axis_index("block") * 64, 64)
        at = 0
        for k, v in enumerate(sources):
            _score_array(r, getattr(r, f"source{k}"), at, r.counts[k], tokens)
            at += len(v)

    def _score_array(r, array, at, n, tokens):
        def fetch(q):
            slot, cols = lax.rem(q, depth), pl.ds(lax.rem(q, chunks) * chunk, chunk)
            source = array.at[lax.div(q, chunks), tokens, cols]
            plgpu.copy_gmem_to_smem(source, r.rows.at[slot], r.full.at[slot])
            plgpu.copy_gmem_to_smem(r.w.at[:, cols], r.queries.at[slot], r.full.at[slot])

        for q in range(depth):
            fetch(q)

        @pl.loop(0, n)
        def _(row):
            def product(acc):
                def step(j, squares):
                    q = row * chunks + j
                    slot = lax.rem(q, depth)
                    plgpu.barrier_wait(r.full.at[slot])
                    for half in range(2):
                        queries = r.queries.at[slot, pl.ds(half * padded, padded)]
                        plgpu.wgmma(acc, r.rows.at[slot], plgpu.transpose_ref(queries, (1, 0)))
                    v = plgpu.load(r.rows.at[slot], layout=WGMMA, optimized=False).astype(F32)
                    plgpu.wgmma_wait(0)
                    plgpu.commit_smem()

                    @pl.when(q + depth < n * chunks)
                    def _():
                        fetch(q + depth)

                    return squares + v * v

                zero = plgpu.layout_cast(jnp.zeros((64, chunk), F32), WGMMA)
                squares = lax.fori_loop(0, chunks, step, zero)
                return acc[...], jnp.sum(squares, axis=1)

            dots, squares = pl.run_scoped(product, plgpu.ACC((64, padded), F32))
            rstd = lax.rsqrt(squares * (1.0 / shape.D) + eps)
            r.rstd[at + row, tokens] = rstd
            r.logits[at + row, tokens] = dots * lax.broadcast_in_dim(rstd, dots.shape, (0,))

    out = run(
        body,
        _named(sources, counts) | dict(w=w),
        dict(logits=shaped((shape.R, blocks * 64, padded)), rstd=shaped((shape.R, blocks * 64))),
        dict(
            rows=_tiled(depth, 64, chunk, inner=chunk),
            queries=_tiled(depth, 2 * padded, chunk, inner=chunk),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=depth),
        ),
        grid=dict(block=blocks),
        groups=1,
        name="depth_mix_score",
        interpret=interpret,
    )
    return out.logits, out.rstd


def _diagonal(shape, values, axis):
    """The block-diagonal matrix whose block i holds `values[i]` over its other axis, as two bf16 halves."""
    row, col = (plgpu.broadcasted_iota(jnp.int32, shape, d, layout=WGMMA) for d in (0, 1))
    which = (col if axis == 0 else row) >> 3
    which = jnp.where((row & 7) == (col & 7), which, -1)
    matrix = plgpu.layout_cast(jnp.zeros(shape, F32), WGMMA)
    for i, value in enumerate(values):
        matrix = jnp.where(which == i, lax.broadcast_in_dim(value, shape, (axis,)), matrix)
    high = matrix.astype(BF16)
    return high, (matrix - high.astype(F32)).astype(BF16)


def _weights(r, rows, block, span, lse, layout, visible):
    """Softmax weights of `rows` at the entries `span` of a block."""
    weights = []
    for i in rows:
        e = jnp.exp(plgpu.load(r.logits.at[block, i, span], layout=layout, optimized=False) - lse)
        weights.append(e if visible[i] is True else jnp.where(visible[i], e, 0.0))
    return weights


def _mix(shape, logits, sources, counts, interpret):
    """Mixtures [S, tokens, D] and lse [blocks, queries * 8]."""
    chunk, groups, inner = shape.chunk, shape.padded // 8, _up(TOKENS * shape.R, 16)
    chunks, depth = shape.D // chunk, shape.depth(3, chunk)
    arrivals = _zero_arrivals(depth, inner, sources, counts)

    def body(r):
        block, group = lax.axis_index("block"), lax.axis_index("group")
        mine, tokens, rows = pl.ds(group * 64, 64), pl.ds(block * TOKENS, TOKENS), _Sources(r, sources, counts)

        def fetch(j):
            slot, cols = lax.rem(j, depth), pl.ds(j * chunk, chunk)
            for i, (row, seen) in enumerate(zip(rows.rows, rows.visible, strict=True)):
                target = r.rows.at[slot, pl.ds(i * TOKENS, TOKENS)]
                _copy_or_arrive(seen, row.at[tokens, cols], target, r.full.at[slot])

        @pl.when(group == 0)
        def _():
            _zero(r.zeros, r.rows, rows.visible, r.zeroed)
            for j in range(depth):
                fetch(j)

        lse = _log_sum_exp(r, block, mine, rows.visible)
        r.lse[block, mine] = lse
        weights = _weights(r, range(shape.R), block, mine, lse, DOWN, rows.visible)
        r.high[mine], r.low[mine] = _diagonal((64, inner), weights, 0)
        plgpu.commit_smem()
        if arrivals:
            plgpu.barrier_wait(r.zeroed)

        def step(j, _):
            slot = lax.rem(j, depth)
            plgpu.barrier_wait(r.full.at[slot])

            def product(acc):
                plgpu.wgmma(acc, r.high.at[mine], r.rows.at[slot])
                plgpu.wgmma(acc, r.low.at[mine], r.rows.at[slot])
                return acc[...]

            mixed = pl.run_scoped(product, plgpu.ACC((64, chunk), F32))

            @pl.when(j + depth < chunks)
            def _():
                plgpu.barrier_arrive(r.empty.at[slot])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            r.out[mine] = mixed.astype(BF16)
            plgpu.commit_smem()
            for s in range(shape.queries):

                @pl.when(group == s // 8)
                def _(s=s):
                    target = r.mixture.at[s, tokens, pl.ds(j * chunk, chunk)]
                    plgpu.copy_smem_to_gmem(r.out.at[pl.ds(s * 8, 8)], target, commit_group=False)

            plgpu.commit_smem_to_gmem_group()

            @pl.when((group == 0) & (j + depth < chunks))
            def _():
                plgpu.barrier_wait(r.empty.at[slot])
                fetch(j + depth)

        lax.fori_loop(0, chunks, step, None)
        plgpu.wait_smem_to_gmem(0)

    out = run(
        body,
        _named(sources, counts) | dict(logits=logits, zeros=jnp.zeros((TOKENS, chunk), BF16)),
        dict(
            mixture=shaped((shape.queries, shape.tokens, shape.D), BF16),
            lse=shaped((shape.blocks, groups * 64)),
        ),
        dict(
            rows=_tiled(depth, inner, chunk, inner=inner),
            high=_tiled(groups * 64, inner, inner=inner),
            low=_tiled(groups * 64, inner, inner=inner),
            out=_tiled(groups * 64, chunk, inner=chunk),
            full=plgpu.Barrier(num_arrivals=shape.R, num_barriers=depth),
            empty=plgpu.Barrier(num_arrivals=groups, num_barriers=depth),
            zeroed=plgpu.Barrier(num_arrivals=max(1, arrivals)),
        ),
        grid=dict(block=shape.blocks),
        groups=groups,
        name="depth_mix_forward",
        interpret=interpret,
    )
    return out.mixture, out.lse


def _log_sum_exp(r, block, span, visible):
    logits = [plgpu.load(r.logits.at[block, i, span], layout=DOWN, optimized=False) for i in range(len(visible))]
    logits = [l if seen is True else jnp.where(seen, l, -jnp.inf) for l, seen in zip(logits, visible, strict=True)]
    top = functools.reduce(jnp.maximum, logits)
    return top + jnp.log(sum(jnp.exp(l - top) for l in logits))


def _dscore(shape, logits, lse, d_lse, sources, counts, d_mixture, at, interpret):
    """Cotangents of the logits [blocks, R, queries * 8]: a (dO . V - sum a dO . V + dlse)."""
    chunk, groups, inner = shape.chunk, shape.padded // 8, _up(TOKENS * shape.R, 16)
    chunks, depth = shape.D // chunk, shape.depth(3, chunk)
    padding = depth * (shape.padded - shape.queries)
    arrivals = _zero_arrivals(depth, inner, sources, counts) + padding

    def body(r):
        block, group = lax.axis_index("block"), lax.axis_index("group")
        mine, tokens, rows = pl.ds(group * 64, 64), pl.ds(block * TOKENS, TOKENS), _Sources(r, sources, counts)

        def fetch(j):
            slot, cols = lax.rem(j, depth), pl.ds(j * chunk, chunk)
            _fetch_rows(r, rows, slot, tokens, cols)
            _fetch_cotangents(r, shape, at, slot, tokens, cols)

        @pl.when(group == 0)
        def _():
            _zero(r.zeros, r.rows, rows.visible, r.zeroed)
            _zero(r.zeros, r.cotangents, [True] * shape.queries, r.zeroed)
            for j in range(depth):
                fetch(j)

        if arrivals:
            plgpu.barrier_wait(r.zeroed)

        def product(acc):
            @pl.loop(0, chunks)
            def _(j):
                slot = lax.rem(j, depth)
                plgpu.barrier_wait(r.full.at[slot])
                plgpu.wgmma(acc, r.cotangents.at[slot, mine], plgpu.transpose_ref(r.rows.at[slot], (1, 0)))
                plgpu.wgmma_wait(0)

                @pl.when(j + depth < chunks)
                def _():
                    plgpu.barrier_arrive(r.empty.at[slot])

                @pl.when((group == 0) & (j + depth < chunks))
                def _():
                    plgpu.barrier_wait(r.empty.at[slot])
                    fetch(j + depth)

            return acc[...]

        dots = pl.run_scoped(product, plgpu.ACC((64, inner), F32))
        row, col = (plgpu.broadcasted_iota(jnp.int32, dots.shape, d, layout=WGMMA) for d in (0, 1))
        which = jnp.where((row & 7) == (col & 7), col >> 3, -1)
        d_weights = [jnp.sum(jnp.where(which == i, dots, 0.0), axis=1) for i in range(shape.R)]
        load = lambda ref: plgpu.load(ref.at[block, mine], layout=DOWN, optimized=False)
        weights = _weights(r, range(shape.R), block, mine, load(r.lse_in), DOWN, rows.visible)
        mean = sum(a * d for a, d in zip(weights, d_weights, strict=True)) - load(r.d_lse)
        for i, (a, d) in enumerate(zip(weights, d_weights, strict=True)):
            r.d_logits[block, i, mine] = a * (d - mean)

    out = run(
        body,
        _named(sources, counts)
        | dict(logits=logits, lse_in=lse, d_lse=d_lse, d_mixture=d_mixture, zeros=jnp.zeros((8, chunk), BF16)),
        dict(d_logits=shaped(logits.shape)),
        dict(
            rows=_tiled(depth, inner, chunk, inner=chunk),
            cotangents=_tiled(depth, groups * 64, chunk, inner=chunk),
            full=plgpu.Barrier(num_arrivals=shape.R + shape.queries, num_barriers=depth),
            empty=plgpu.Barrier(num_arrivals=groups, num_barriers=depth),
            zeroed=plgpu.Barrier(num_arrivals=max(1, arrivals)),
        ),
        grid=dict(block=shape.blocks),
        groups=groups,
        name="depth_mix_dscore",
        interpret=interpret,
    )
    return out.d_logits


def _fetch_rows(r, rows, slot, tokens, cols):
    for i, (row, seen) in enumerate(zip(rows.rows, rows.visible, strict=True)):
        target = r.rows.at[slot, pl.ds(i * TOKENS, TOKENS)]
        _copy_or_arrive(seen, row.at[tokens, cols], target, r.full.at[slot])


def _fetch_cotangents(r, shape, at, slot, tokens, cols):
    for s in range(shape.queries):
        target = r.cotangents.at[slot, pl.ds(s * TOKENS, TOKENS)]
        plgpu.copy_gmem_to_smem(r.d_mixture.at[at + s, tokens, cols], target, r.full.at[slot])


def _apply(shape, w, c, along, logits, lse, sources, counts, d_mixture, at, d_sources, interpret):
    """d_sources += A^T dO + C w - along * v, and dw = C^T V; `c` and `along` are C's halves and mean(C logit rstd)."""
    groups, padded = -(-shape.R // 8), shape.padded
    rows8, given = groups * 64, d_sources is not None
    chunk, depth = _apply_tile(shape, rows8, given)
    chunks = shape.D // chunk
    programs = min(shape.blocks, max(1, PROGRAMS // chunks))
    arrivals = _zero_arrivals(depth, rows8, sources, counts) + depth * (padded - shape.queries)

    def body(r):
        part, start, group = lax.axis_index("chunk"), lax.axis_index("program"), lax.axis_index("group")
        mine, cols, rows = pl.ds(group * 64, 64), pl.ds(part * chunk, chunk), _Sources(r, sources, counts)
        steps = (shape.blocks - start + programs - 1) // programs
        outs = [getattr(r, f"d_source{k}").at[i] for k, v in enumerate(sources) for i in range(len(v))]

        def fetch(b):
            slot, block = lax.rem(b, depth), start + b * programs
            tokens = pl.ds(block * TOKENS, TOKENS)
            _fetch_rows(r, rows, slot, tokens, cols)
            _fetch_cotangents(r, shape, at, slot, tokens, cols)
            plgpu.copy_gmem_to_smem(r.c.at[block], r.scores.at[slot], r.full.at[slot])
            if given:
                for i, (out, seen) in enumerate(zip(outs, rows.visible, strict=True)):
                    target = r.given.at[slot, pl.ds(i * TOKENS, TOKENS)]
                    _copy_or_arrive(seen, out.at[tokens, cols], target, r.full.at[slot])

        @pl.when(group == 0)
        def _():
            plgpu.copy_gmem_to_smem(r.w.at[:, cols], r.queries, r.parameters)
            _zero(r.zeros, r.rows, rows.visible, r.zeroed)
            _zero(r.zeros, r.cotangents, [True] * shape.queries, r.zeroed)
            for b in range(depth):

                @pl.when(b < steps)
                def _(b=b):
                    fetch(b)

        plgpu.barrier_wait(r.parameters)
        if arrivals:
            plgpu.barrier_wait(r.zeroed)

        def transposed_weights(block):
            """A^T of this warpgroup's eight sources: rows (source, token), columns (query, token)."""
            lse = plgpu.load(r.lse_in.at[block], layout=ACROSS, optimized=False)
            for m in range(groups):

                @pl.when(group == m)
                def _(m=m):
                    eight = range(8 * m, min(shape.R, 8 * m + 8))
                    span = pl.ds(0, padded * TOKENS)
                    weights = _weights(r, eight, block, span, lse, ACROSS, rows.visible)
                    r.high[mine], r.low[mine] = _diagonal((64, padded * TOKENS), weights, 1)

            plgpu.commit_smem()

        def run_blocks(dw):
            @pl.loop(0, steps)
            def _(b):
                slot, block = lax.rem(b, depth), start + b * programs
                tokens = pl.ds(block * TOKENS, TOKENS)
                transposed_weights(block)
                plgpu.barrier_wait(r.full.at[slot])
                plgpu.wgmma(dw, plgpu.transpose_ref(r.scores.at[slot, mine], (1, 0)), r.rows.at[slot, mine])

                def product(acc):
                    plgpu.wgmma(acc, r.high.at[mine], r.cotangents.at[slot])
                    plgpu.wgmma(acc, r.low.at[mine], r.cotangents.at[slot])
                    plgpu.wgmma(acc, r.scores.at[slot, mine], r.queries)
                    return acc[...]

                y = pl.run_scoped(product, plgpu.ACC((64, chunk), F32))
                e = plgpu.load(r.along.at[block, mine], layout=DOWN, optimized=False)
                load = lambda ref: plgpu.load(ref.at[slot, mine], layout=WGMMA, optimized=False).astype(F32)
                y -= lax.broadcast_in_dim(e, y.shape, (0,)) * load(r.rows)
                if given:
                    y += load(r.given)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                r.out[mine] = y.astype(BF16)
                plgpu.wgmma_wait(0)
                plgpu.commit_smem()

                @pl.when(b + depth < steps)
                def _():
                    plgpu.barrier_arrive(r.empty.at[slot])

                for i, (out, seen) in enumerate(zip(outs, rows.visible, strict=True)):

                    @pl.when((group == i // 8) & (seen if given else True))
                    def _(i=i, out=out):
                        staged = r.out.at[pl.ds(i * TOKENS, TOKENS)]
                        plgpu.copy_smem_to_gmem(staged, out.at[tokens, cols], commit_group=False)

                plgpu.commit_smem_to_gmem_group()

                @pl.when((group == 0) & (b + depth < steps))
                def _():
                    plgpu.barrier_wait(r.empty.at[slot])
                    fetch(b + depth)

            return dw[...]

        r.dw[start, group, :, cols] = pl.run_scoped(run_blocks, plgpu.ACC((64, chunk), F32))
        plgpu.wait_smem_to_gmem(0)

    halves = _halves(w, padded)
    queries = jnp.concatenate([halves[:padded], halves[:padded], halves[padded:]])
    inputs = _named(sources, counts) | dict(c=c, along=along, logits=logits, lse_in=lse, d_mixture=d_mixture)
    inputs |= dict(w=jnp.pad(queries, ((0, 64 - 3 * padded), (0, 0))), zeros=jnp.zeros((TOKENS, chunk), BF16))
    outputs = dict(dw=shaped((programs, groups, 64, shape.D)))
    names = [f"d_source{k}" for k in range(len(sources))]
    if given:
        refs = [jax.new_ref(d) for d in d_sources]
        inputs |= dict(zip(names, refs, strict=True))
    else:
        outputs |= {name: shaped(v.shape, BF16) for name, v in zip(names, sources, strict=True)}
    out = run(
        body,
        inputs,
        outputs,
        dict(
            rows=_tiled(depth, rows8, chunk, inner=64),
            cotangents=_tiled(depth, padded * TOKENS, chunk, inner=64),
            scores=_tiled(depth, rows8, 64, inner=64),
            **(dict(given=_tiled(depth, rows8, chunk, inner=64)) if given else {}),
            high=_tiled(rows8, padded * TOKENS, inner=64),
            low=_tiled(rows8, padded * TOKENS, inner=64),
            queries=_tiled(64, chunk, inner=64),
            out=_tiled(rows8, chunk, inner=64),
            full=plgpu.Barrier(
                num_arrivals=shape.R * (1 + given) + shape.queries + 1, num_barriers=depth
            ),
            empty=plgpu.Barrier(num_arrivals=groups, num_barriers=depth),
            zeroed=plgpu.Barrier(num_arrivals=max(1, arrivals)),
            parameters=plgpu.Barrier(),
        ),
        grid=dict(program=programs, chunk=chunks),
        groups=groups,
        name="depth_mix_apply",
        interpret=interpret,
    )
    d_sources = [ref[...] for ref in refs] if given else [getattr(out, name) for name in names]
    dw = jnp.sum(out.dw, (0, 1))
    return (dw[:padded] + dw[padded : 2 * padded])[: shape.queries], tuple(d_sources)


def _apply_tile(shape, rows, given):
    """Columns and ring slots of `apply`: the widest and deepest that fit shared memory."""
    entries = shape.padded * TOKENS
    for chunk, depth in ((128, 2), (64, 2), (64, 1)):
        ring = depth * (chunk * (rows * (1 + given) + entries) + rows * 64)
        if shape.D % chunk == 0 and 2 * (ring + 2 * rows * entries + (64 + rows) * chunk) <= SHARED_BYTES:
            return chunk, depth
    raise AssertionError("the limits of R and queries let the smallest tile fit")
