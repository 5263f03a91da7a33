"""The GPU kernels in interpreters on the CPU against the equations in fp64: values and every gradient.

Mosaic GPU runs in the interpreter that looks for races, Triton in its own.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.depth_merge import gpu as merge_gpu

RACES = plgpu.InterpretGPUParams(detect_races=True)
EPS, NORM_EPS = 1e-6, 1e-5
# Relative norm of the error against fp64; bf16: what rounding once costs, and a little more.
TOLERANCE = {jnp.bfloat16: 2.4e-3, jnp.float32: 3e-6}


def wide(a):
    return None if a is None else jnp.asarray(a, jnp.float64)


def close(got, want, tolerance):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want) + 1e-30


def merge_oracle(w, scale, mixtures, lse, stream, j, first, y):
    """h, x and the new sum of one read, in fp64 except that the sum is rounded as it is stored."""
    o, p = mixtures[j], stream
    if y is not None and not first:
        p = p + y
        p = p + jax.lax.stop_gradient(p.astype(ROUND[0]).astype(jnp.float64) - p)
    score = jnp.sum(w * p, -1) / jnp.sqrt(jnp.mean(p * p, -1) + EPS)
    gate = 0.0 if first else jax.nn.sigmoid(score - lse[j])[:, None]
    h = o + gate * (p - o)
    x = h if scale is None else h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True) + NORM_EPS) * scale
    return x, h, p


ROUND = [jnp.bfloat16]


def merge_inputs(tokens, D, S, dtype, *, norm=True, y=False, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    a = SimpleNamespace()
    a.w, a.scale = jnp.asarray(draw(D) * 0.1, jnp.float32), jnp.asarray(1 + 0.1 * draw(D), jnp.float32)
    a.mixtures, a.lse = jnp.asarray(draw((S, tokens, D)), dtype), jnp.asarray(draw((S, tokens)), jnp.float32)
    a.stream, a.y = jnp.asarray(draw((tokens, D)), dtype), jnp.asarray(draw((tokens, D)), dtype)
    a.scale, a.y = (a.scale if norm else None), (a.y if y else None)
    a.d_x, a.d_mixture, a.d_stream = (jnp.asarray(draw((tokens, D)), dtype) for _ in range(3))
    a.d_mixtures, a.d_lse = (
        jnp.asarray(draw((S, tokens, D)), dtype),
        jnp.asarray(draw((S, tokens)), jnp.float32),
    )
    return a


def check_merge(backend, a, j, first, keep, **options):
    """Values and gradients of one read; j and first are traced."""
    dtype = a.stream.dtype.type
    ROUND[0], tolerance = dtype, TOLERANCE[dtype]
    options |= dict(eps=EPS, norm_eps=NORM_EPS)

    @jax.jit
    def both(j, first):
        out = backend.forward(
            a.w, a.scale, a.mixtures, a.lse, a.stream, j, first, a.y, keep_mixture=keep, **options
        )
        d_mixture = a.d_mixture if keep else None
        return out, backend.backward(
            a.w, a.scale, a.mixtures, a.lse, out.stream, j, first, out.stats, a.d_x, d_mixture,
            a.d_stream, a.d_mixtures, a.d_lse, **options,
        )  # fmt: skip

    out, (dw, dscale, d_stream, d_mixtures, d_lse) = both(jnp.int32(j), jnp.bool(first))
    assert (out.mixture is None) != keep
    with jax.enable_x64(True):
        primals = [wide(v) for v in (a.w, a.scale, a.mixtures, a.lse, a.stream)]
        read = lambda *p: merge_oracle(*p, j, first, wide(a.y))[:2]
        (x, h), vjp = jax.vjp(read, *primals)
        new = merge_oracle(*primals, j, first, wide(a.y))[2]
        grads = vjp((wide(a.d_x), wide(a.d_mixture) * keep))
    close(out.x, x, tolerance)
    if keep:
        close(out.mixture, h, tolerance)
    np.testing.assert_array_equal(np.asarray(out.stream, np.float64), new)
    close(dw, grads[0], 2e-5)
    if a.scale is None:
        assert dscale is None
    else:
        close(dscale, grads[1], 2e-5)
    others = np.arange(len(a.lse)) != j
    close(d_mixtures[j], grads[2][j], tolerance)
    close(d_lse[j], grads[3][j], 2e-5)
    np.testing.assert_array_equal(d_mixtures[others], a.d_mixtures[others])
    np.testing.assert_array_equal(d_lse[others], a.d_lse[others])
    close(d_stream, np.asarray(grads[4]) + np.asarray(a.d_stream, np.float64), tolerance)
    if first:
        np.testing.assert_array_equal(d_stream, a.d_stream)


MERGE = [  # tokens, D, S, dtype, norm, y, j, first, keep
    pytest.param(5, 512, 3, jnp.bfloat16, True, False, 1, False, False, id="read"),
    pytest.param(3, 512, 3, jnp.bfloat16, True, True, 2, False, True, id="add and keep"),
    pytest.param(5, 512, 3, jnp.bfloat16, True, True, 1, True, True, id="first"),
    pytest.param(1, 256, 1, jnp.bfloat16, False, False, 0, False, True, id="no norm, one token"),
    pytest.param(3, 256, 1, jnp.float32, False, True, 0, True, False, id="no norm, first"),
    pytest.param(7, 512, 1, jnp.float32, True, True, 0, False, True, id="fp32"),
]


@pytest.mark.parametrize("tokens, D, S, dtype, norm, y, j, first, keep", MERGE)
def test_mosaic_merge(tokens, D, S, dtype, norm, y, j, first, keep, monkeypatch):
    monkeypatch.setattr(merge_gpu, "PROGRAMS", 2)  # so that a program walks over several rows
    monkeypatch.setattr(merge_gpu, "GOOD_CHUNKS", 1)  # so that warpgroups share a row
    a = merge_inputs(tokens, D, S, dtype, norm=norm, y=y)
    check_merge(merge_gpu, a, j, first, keep, interpret=RACES)
