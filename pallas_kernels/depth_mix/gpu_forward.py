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
    diagonal,
    fetch_rows,
    named,
    tiled,
    zero,
    zero_arrivals,
)
from pallas_kernels.mosaic import run, shaped, up


def score(shape, w, sources, counts, eps, interpret):
    """Logits [R, tokens in 64s, queries] and rstd [R, tokens in 64s] of the visible rows."""
    chunk, padded = shape.chunk, shape.padded
    chunks, blocks = shape.D // chunk, -(-shape.tokens // 64)
    depth = shape.depth(4 if padded == 8 else 3, chunk)  # two programs share a processor

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

                def product(acc):
                    for third in range(3):
                        queries = r.queries.at[slot, pl.ds(third * padded, padded)]
                        plgpu.wgmma(acc, r.rows.at[slot], queries.transpose((1, 0)))
                    return acc[...]

                # The tensor cores cut off what their sum does not hold: one of all of D would be biased.
                part = pl.run_scoped(product, plgpu.ACC((64, padded), F32))
                v = plgpu.load(r.rows.at[slot], layout=WGMMA, optimized=False).astype(F32)
                plgpu.commit_smem()

                @pl.when(q + depth < n * chunks)
                def _():
                    fetch(q + depth)

                return dots + part, squares + v * v

            zeros = [plgpu.layout_cast(jnp.zeros((64, width), F32), WGMMA) for width in (padded, chunk)]
            dots, squares = lax.fori_loop(0, chunks, step, tuple(zeros))
            rstd = lax.rsqrt(jnp.sum(squares, axis=1) * (1.0 / shape.D) + eps)
            r.rstd[at + row, tokens] = rstd
            r.logits[at + row, tokens] = dots * lax.broadcast_in_dim(rstd, dots.shape, (0,))

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

        lse = _log_sum_exp(r, shape.R, block, mine)
        r.lse[block, mine] = lse

        def weight(i):
            return jnp.exp(plgpu.load(r.logits.at[block, i, mine], layout=DOWN, optimized=False) - lse)

        r.high[mine], r.low[mine] = diagonal((64, inner), shape.R, weight, 0)
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
            "full": plgpu.Barrier(num_arrivals=shape.R, num_barriers=depth),
            "empty": plgpu.Barrier(num_arrivals=groups, num_barriers=depth),
            "zeroed": plgpu.Barrier(num_arrivals=max(1, arrivals)),
        },
        grid={"block": shape.blocks},
        groups=groups,
        name="depth_mix_forward",
        interpret=interpret,
    )
    return out.mixture, out.lse


def _log_sum_exp(r, R, block, span):
    logits = [plgpu.load(r.logits.at[block, i, span], layout=DOWN, optimized=False) for i in range(R)]
    top = functools.reduce(jnp.maximum, logits)
    return top + jnp.log(sum(jnp.exp(l - top) for l in logits))
