"""The forward kernels of Phase 1 in Mosaic GPU: `score` and `mix`; see gpu.py."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.depth_mix.gpu_tiles import (
    BF16,
    DOWN,
    F32,
    TOKENS,
    WGMMA,
    Sources,
    barriers,
    diagonal,
    fetch_rows,
    named,
    products,
    tiled,
    walk,
    zero,
    zero_arrivals,
)
from pallas_kernels.mosaic import run, shaped, up


def score(shape, w, sources, counts, eps, interpret):
    """Logits [R, tokens in 64s, queries] and rstd [R, tokens in 64s] of the visible rows."""
    chunk, padded, blocks = shape.chunk, shape.padded, -(-shape.tokens // 64)
    depth = shape.depth(4 if padded == 8 else 3, chunk)  # two programs share a processor

    def body(r):
        tokens, at = pl.ds(lax.axis_index("block") * 64, 64), 0
        for k, v in enumerate(sources):
            _score_rows(r, shape, eps, getattr(r, f"source{k}"), at, r.counts[k], tokens)
            at += len(v)

    out = run(
        body,
        named(sources, counts) | {"w": w},
        {"logits": shaped((shape.R, blocks * 64, padded)), "rstd": shaped((shape.R, blocks * 64))},
        {
            "rows": tiled(depth, 64, chunk, inner=chunk),
            "queries": tiled(depth, 3 * padded, chunk, inner=chunk),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=depth),
        },
        grid={"block": blocks},
        groups=1,
        name="depth_mix_score",
        interpret=interpret,
    )
    return out.logits, out.rstd


def _score_rows(r, shape, eps, array, at, n, tokens):
    """The first n rows of one array, which are those from `at` on of all; its chunks follow one another."""
    chunk, chunks, depth = shape.chunk, shape.D // shape.chunk, r.rows.shape[0]

    def fetch(q):
        slot, cols = lax.rem(q, depth), pl.ds(lax.rem(q, chunks) * chunk, chunk)
        source = array.at[lax.div(q, chunks), tokens, cols]
        plgpu.copy_gmem_to_smem(source, r.rows.at[slot], r.full.at[slot])
        plgpu.copy_gmem_to_smem(r.w.at[:, cols], r.queries.at[slot], r.full.at[slot])

    @pl.when(n > 0)  # what is copied for no row would wait for the next array
    def _():
        for q in range(depth):
            fetch(q)

    @pl.loop(0, n)
    def _(row):
        def step(j, carry):
            dots, squares = carry
            q = row * chunks + j
            slot = lax.rem(q, depth)
            plgpu.barrier_wait(r.full.at[slot])
            part, v = _score_chunk(r, shape, slot)

            @pl.when(q + depth < n * chunks)
            def _():
                fetch(q + depth)

            return dots + part, squares + v * v

        zeros = [plgpu.layout_cast(jnp.zeros((64, width), F32), WGMMA) for width in (shape.padded, chunk)]
        dots, squares = lax.fori_loop(0, chunks, step, tuple(zeros))
        rstd = lax.rsqrt(jnp.sum(squares, axis=1) * (1.0 / shape.D) + eps)
        r.rstd[at + row, tokens] = rstd
        r.logits[at + row, tokens] = dots * lax.broadcast_in_dim(rstd, dots.shape, (0,))


def _score_chunk(r, shape, slot):
    """Products of a slot's rows with the queries, and the rows; the slot may be filled again."""
    thirds = [r.queries.at[slot, pl.ds(k * shape.padded, shape.padded)] for k in range(3)]
    part = products((64, shape.padded), *[(r.rows.at[slot], w.transpose((1, 0))) for w in thirds])
    v = plgpu.load(r.rows.at[slot], layout=WGMMA, optimized=False).astype(F32)
    plgpu.commit_smem()
    return part, v


def mix(shape, logits, sources, counts, interpret):
    """Mixtures [S, tokens, D] and lse [blocks, queries * 8]."""
    chunk, groups, inner = shape.chunk, shape.padded // 8, up(TOKENS * shape.R, 16)
    chunks, depth = shape.D // chunk, shape.depth(3, chunk)
    arrivals = zero_arrivals(depth, inner, sources, counts)

    def body(r):
        block, group = lax.axis_index("block"), lax.axis_index("group")
        mine, tokens, rows = pl.ds(group * 64, 64), pl.ds(block * TOKENS, TOKENS), Sources(r, sources, counts)

        def fetch(j):
            slot, cols = lax.rem(j, depth), pl.ds(j * chunk, chunk)
            fetch_rows(r, rows, slot, tokens, cols)

        @pl.when(group == 0)
        def _():
            zero(r.zeros, r.rows, rows.visible, r.zeroed)
            for j in range(depth):
                fetch(j)

        _weigh(r, shape, block, mine)
        if arrivals:
            plgpu.barrier_wait(r.zeroed)

        def mixed(slot):
            return products((64, chunk), *[(half.at[mine], r.rows.at[slot]) for half in (r.high, r.low)])

        walk(r, group, chunks, fetch, mixed, functools.partial(_send, r, shape, group, mine, tokens))
        plgpu.wait_smem_to_gmem(0)

    out = run(
        body,
        named(sources, counts) | {"logits": logits, "zeros": jnp.zeros((TOKENS, chunk), BF16)},
        {
            "mixture": shaped((shape.queries, shape.tokens, shape.D), BF16),
            "lse": shaped((shape.blocks, groups * 64)),
        },
        {
            "rows": tiled(depth, inner, chunk, inner=inner),
            "high": tiled(groups * 64, inner, inner=inner),
            "low": tiled(groups * 64, inner, inner=inner),
            "out": tiled(groups * 64, chunk, inner=chunk),
        }
        | barriers(depth, shape.R, groups, arrivals),
        grid={"block": shape.blocks},
        groups=groups,
        name="depth_mix_forward",
        interpret=interpret,
    )
    return out.mixture, out.lse


def _weigh(r, shape, block, mine):
    """Store lse, and the matrix of this warpgroup's weights in two halves."""
    logits = [plgpu.load(r.logits.at[block, i, mine], layout=DOWN, optimized=False) for i in range(shape.R)]
    top = functools.reduce(jnp.maximum, logits)
    lse = top + jnp.log(sum(jnp.exp(l - top) for l in logits))
    r.lse[block, mine] = lse

    def weight(i):
        return jnp.exp(plgpu.load(r.logits.at[block, i, mine], layout=DOWN, optimized=False) - lse)

    r.high[mine], r.low[mine] = diagonal((64, r.high.shape[1]), shape.R, weight, 0)
    plgpu.commit_smem()


def _send(r, shape, group, mine, tokens, j, mixed):
    """Start the copies of chunk j of a warpgroup's mixtures to memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    r.out[mine] = mixed.astype(BF16)
    plgpu.commit_smem()
    for s in range(shape.queries):

        @pl.when(group == s // 8)
        def _(s=s):
            target = r.mixture.at[s, tokens, pl.ds(j * shape.chunk, shape.chunk)]
            plgpu.copy_smem_to_gmem(r.out.at[pl.ds(s * 8, 8)], target, commit_group=False)

    plgpu.commit_smem_to_gmem_group()
