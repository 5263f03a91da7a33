"""TPU kernels on the CPU: values and every gradient in the race-detecting interpreter, against fp64."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import effects
from jax._src.callback import IOEffect, OrderedIOEffect
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from attnres_jax import depth
from attnres_jax.depth import Partial, Rows
from attnres_jax.norm import RMSNorm
from attnres_jax.rules import Rule
from pallas_kernels.depth_merge import config as merge_config
from pallas_kernels.depth_merge import shapes as merge_shapes
from pallas_kernels.depth_merge import tpu as merge
from pallas_kernels.depth_mix import config as mix_config
from pallas_kernels.depth_mix import shapes as mix_shapes
from pallas_kernels.depth_mix import tpu as mix

EPS, NORM_EPS = 0.1, 0.3  # as large as what they are added to: each is seen
SUMS = {"bfloat16": 2e-5, "float32": 2e-6}
"""Relative error against fp64, of what stays fp32."""
FAST = ("counted", "first_of_block")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Memory that nothing wrote is NaN, and two grid steps that touch the same memory are found."""
    for name in ("remat", "custom_derivatives", "control_flow"):  # the interpreter's callbacks have effects
        allowed = getattr(effects, f"{name}_allowed_effects")
        monkeypatch.setattr(allowed, "_effect_types", {*allowed._effect_types, IOEffect, OrderedIOEffect})
    how = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(how):
        yield
    assert not interpret_pallas_call.races or not interpret_pallas_call.races.races_found


def rows(table):
    marks = {name: () if name in FAST else pytest.mark.slow for name in table}
    return pytest.mark.parametrize("shape", [pytest.param(s, id=n, marks=marks[n]) for n, s in table.items()])


def drawn(shape, *names):
    """Standard normal arrays by name and shape, in the dtype of the case unless fp32 is said."""
    keys = jax.random.split(jax.random.key(7), len(names))
    return [
        jax.random.normal(key, size).astype(dtype or shape.dtype)
        for key, (size, dtype) in zip(keys, names, strict=True)
    ]


def wide(tree):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), tree)


ready = jax.block_until_ready
"""Before anything else runs: threads of the interpreter and of JAX share two cores, and were seen to wait for
one another without end."""


def close(got, want, tolerance, rounding=1e-30):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want) + rounding


def rounded(got, want, dtype):
    """As near as the exact result rounded once, plus what stays fp32 on the way."""
    want = np.asarray(want)
    once = np.linalg.norm(want.astype(jnp.dtype(dtype)).astype(np.float64) - want)
    close(got, want, SUMS[dtype], 1.001 * once)


@rows(mix_shapes.SHAPES)
def test_depth_mix(shape):
    S, R, T, D = shape.S, sum(shape.rows), shape.tokens, shape.D
    w, v, d_out, d_lse, added = drawn(
        *(
            shape,
            ((S, D), "float32"),
            ((R, T, D), None),
            ((S, T, D), None),
            ((S, T), "float32"),
            ((R, T, D), None),
        )
    )
    w, cuts = w / D**0.5, np.cumsum(shape.rows)[:-1]
    d_lse = d_lse * (R > 1)  # the weights of one source are constant, its log-sum-exp is its score
    parts, before = jnp.split(v, cuts), jnp.split(added, cuts)
    counts = tuple(None if shape.n is None else jnp.int32(shape.n) for _ in parts)
    slots = []
    if shape.slot is not None:  # other slots are not read, and stay as they are
        slots = [(jnp.int32(shape.slot),) * len(parts)]
        parts, before = (
            [jnp.full((3, *a.shape), jnp.nan, a.dtype).at[shape.slot].set(a) for a in some]
            for some in (parts, before)
        )
    out = ready(mix.forward(w, tuple(parts), counts, *slots, eps=EPS))
    sums = tuple(before) if shape.add else None
    tuned = {("backward", S, R, D): shape.tile} if shape.tile else {}
    with mock.patch.dict(mix_config.TUNED, tuned):
        after = out.lse, out.stats, d_out, d_lse, sums
        d_w, d_v = ready(mix.backward(w, tuple(parts), counts, *after, *slots, eps=EPS))
    if shape.slot is not None:
        assert all(np.isnan(np.delete(np.asarray(d, np.float32), shape.slot, 0)).all() for d in d_v)
        d_v = [d[shape.slot] for d in d_v]
    with jax.enable_x64():
        exact, pull = jax.vjp(
            lambda w, v: depth.partial_mix(w, (Rows(v, shape.n),), Rule(EPS)), *wide((w, v))
        )
        want_w, want_v = pull(Partial(*wide((d_out, d_lse))))
        want_v = want_v + wide(added) if shape.add else want_v
    rounded(out.mixture, exact.mixture, shape.dtype)
    close(out.lse, exact.lse, SUMS[shape.dtype])
    rounded(jnp.concatenate(d_v), want_v, shape.dtype)
    if R == 1:
        assert not np.any(d_w)
    else:
        close(d_w, want_w, SUMS[shape.dtype])


@pytest.mark.parametrize("n", [1, 4])
def test_what_is_copied(n, monkeypatch):
    """Of four rows the n visible ones, each once: forward the sources; backward these, the sums so far and
    what they become. A row beyond n moves no bytes."""
    moved, read = [], interpret_pallas_call.DMA.execute_read

    def counted(dma):
        begins = dma.state == interpret_pallas_call.DmaState.STARTED
        read(dma)
        moved.extend([dma.data.size] * begins)

    monkeypatch.setattr(interpret_pallas_call.DMA, "execute_read", counted)
    shape = mix_shapes.Shape(2, (4,), 128, 128, n=n)
    w, v, d = drawn(shape, ((2, 128), "float32"), ((4, 128, 128), None), ((2, 128, 128), None))
    out = ready(mix.forward(w, (v,), (jnp.int32(n),), eps=EPS))
    assert sum(moved) == n * 128 * 128
    moved.clear()
    after = out.lse, out.stats, d, jnp.zeros_like(out.lse), (v,)
    ready(mix.backward(w, (v,), (jnp.int32(n),), *after, eps=EPS))
    assert sum(moved) == 3 * n * 128 * 128


@rows(merge_shapes.SHAPES)
def test_depth_merge(shape):
    S, T, D, j = shape.S, shape.tokens, shape.D, 1
    p, y, o, lse, w, scale, d_x, d_h, d_p, d_os, d_lses = drawn(
        *(shape, ((T, D), None), ((T, D), None), ((S, T, D), None), ((S, T), "float32"), ((D,), "float32")),
        *(
            ((D,), "float32"),
            ((T, D), None),
            ((T, D), None),
            ((T, D), None),
            ((S, T, D), None),
            ((S, T), "float32"),
        ),
    )
    w, scale = w / D**0.5, 1 + 0.3 * scale if shape.norm else None
    at = (jnp.int32(j), jnp.bool_(shape.first))
    options = {"eps": EPS, "norm_eps": NORM_EPS}
    added = y if shape.add else None
    streams = jnp.stack([jnp.full_like(p, jnp.nan), p])  # row 0 is not to be read
    here = (streams[1:], jnp.int32(0)) if shape.add else (streams, jnp.int32(1))
    out = ready(merge.forward(w, scale, o, lse, *here, *at, added, keep_mixture=shape.keep, **options))
    total = (p.astype(jnp.float32) + y.astype(jnp.float32)).astype(p.dtype) if shape.add else p
    if shape.add:
        np.testing.assert_array_equal(out.stream, total)
        here = (out.stream[None], here[1])
    cotangents = (d_x, d_h if shape.keep else None, d_p, d_os, d_lses)
    got = ready(merge.backward(w, scale, o, lse, *here, *at, out.stats, *cotangents, **options))

    def read(w, scale, o, lse, p):
        seen = jnp.where(shape.first, -jnp.inf, depth.scores(w, p, Rule(EPS)))
        h = depth.merge(Partial(o, lse), Partial(p, seen)).mixture
        return h if scale is None else RMSNorm(scale, NORM_EPS)(h), h

    with jax.enable_x64():
        (x, h), pull = jax.vjp(read, *wide((w, scale, o[j], lse[j], total)))
        d_w, d_scale, d_o, d_lse, want_p = pull((wide(d_x), wide(d_h) * shape.keep))
        want_p = want_p + wide(d_p)
    rounded(out.x, x, shape.dtype)
    if shape.keep:
        rounded(out.mixture, h, shape.dtype)
    close(got[0], d_w, SUMS[shape.dtype])
    if shape.norm:
        close(got[1], d_scale, SUMS[shape.dtype])
    rounded(got[2], want_p, shape.dtype)
    rounded(got[3][j], d_o, shape.dtype)
    close(got[4][j], d_lse, SUMS[shape.dtype])
    others = np.arange(S) != j
    np.testing.assert_array_equal(got[3][others], d_os[others])
    np.testing.assert_array_equal(got[4][others], d_lses[others])


@pytest.mark.slow
@pytest.mark.parametrize(("S", "R"), [(2, 9), (9, 8)], ids=["groups_of_16", "halves_beside"])
def test_wide_mxu(monkeypatch, S, R):
    """Of a v6e or 7x: groups are larger, and take two registers of lanes."""
    monkeypatch.setattr(mix_config, "mxu", lambda: 256)
    test_depth_mix(mix_shapes.Shape(S, (R,), 128, 128))


@pytest.mark.slow
def test_merge_of_another_chip(monkeypatch):
    """Squares of 128 tokens on a wide MXU; no room for rows in fp32."""
    monkeypatch.setattr(merge_config, "mxu", lambda: 256)
    test_depth_merge(merge_shapes.SHAPES["one_step"])
    monkeypatch.setattr(merge_config, "chip", lambda: (2_400_000, 1))
    assert not merge_config.tpu_config("backward", 256, "bfloat16", 256).unpacked
    test_depth_merge(merge_shapes.SHAPES["one_step"])


@pytest.mark.slow
def test_two_cores(monkeypatch):
    """Of a v4 or v5p: they never write the same memory, also where there is no running sum."""
    for config in (mix_config, merge_config):
        monkeypatch.setattr(config, "chip", lambda: (64 << 20, 2))
    test_depth_mix(mix_shapes.SHAPES["two_steps"])
    test_depth_merge(merge_shapes.SHAPES["first_of_block"])
