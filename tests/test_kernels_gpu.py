"""The GPU kernels in interpreters on the CPU against the equations in fp64: values and every gradient.

Mosaic GPU runs in the interpreter that looks for races, Triton in its own.
"""

import importlib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.depth_merge import gpu as merge_gpu
from pallas_kernels.depth_merge import vjp as merge_op
from pallas_kernels.depth_mix import gpu as mix_gpu
from pallas_kernels.depth_mix import gpu_backward, gpu_single, gpu_token

F32, BF16 = jnp.float32, jnp.bfloat16
RACES = plgpu.InterpretGPUParams(detect_races=True)
EPS, NORM_EPS = 0.1, 0.3  # as large as what they are added to: each is seen


SUMS = {BF16: 3e-6, F32: 3e-6}
"""Relative, of fp32 sums. On a GPU more of what is not rounded to bf16 (`on_gpu.py`)."""


def wide(a):
    return None if a is None else jnp.asarray(a, jnp.float64)


def close(got, want, dtype=F32, roundings=1):
    """As near to fp64 as the exact result rounded once, plus what fp32 sums cost, in relative norm."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    once = np.linalg.norm(np.asarray(want, dtype).astype(np.float64) - want)
    assert np.linalg.norm(got - want) <= 1.001 * roundings * once + SUMS[dtype] * np.linalg.norm(want)


def merge_oracle(w, scale, mixtures, lse, stream, j, first, y, dtype):
    """x and h, and the new sum, of one read, in fp64 except that the sum is rounded as it is stored."""
    o, p = mixtures[j], stream
    if y is not None and not first:
        p = p + y
        p = p + jax.lax.stop_gradient(p.astype(dtype).astype(jnp.float64) - p)
    score = jnp.sum(w * p, -1) / jnp.sqrt(jnp.mean(p * p, -1) + EPS)
    gate = 0.0 if first else jax.nn.sigmoid(score - lse[j])[:, None]
    h = o + gate * (p - o)
    x = h if scale is None else h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True) + NORM_EPS) * scale
    return (x, h), p


def merge_inputs(tokens, D, S, dtype, *, norm=True, y=False, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    a = SimpleNamespace()
    a.w, a.scale = jnp.asarray(draw(D) * 0.1, jnp.float32), jnp.asarray(1 + 0.1 * draw(D), jnp.float32)
    a.mixtures, a.lse = jnp.asarray(draw((S, tokens, D)), dtype), jnp.asarray(draw((S, tokens)), jnp.float32)
    a.stream, a.y = jnp.asarray(draw((tokens, D)), dtype), jnp.asarray(draw((tokens, D)), dtype)
    a.scale, a.y = (a.scale if norm else None), (a.y if y else None)
    kept = jnp.full((1, tokens, D), jnp.nan, dtype)  # a row that is not to be touched
    a.streams = a.stream[None] if y else jnp.concatenate([kept, a.stream[None]])
    a.d_x, a.d_mixture, a.d_stream = (jnp.asarray(draw((tokens, D)), dtype) for _ in range(3))
    a.d_mixtures, a.d_lse = (
        jnp.asarray(draw((S, tokens, D)), dtype),
        jnp.asarray(draw((S, tokens)), jnp.float32),
    )
    return a


def check_merge(backend, a, j, first, keep, jit=jax.jit, **options):
    """Values and gradients of one read; j and first are traced."""
    dtype = a.stream.dtype.type
    if first:  # nothing is read
        a.streams = jnp.full_like(a.streams, jnp.nan)
    options |= {"eps": EPS, "norm_eps": NORM_EPS}

    @jit
    def both(at, j, first):
        out = backend.forward(
            a.w, a.scale, a.mixtures, a.lse, a.streams, at, j, first, a.y, keep_mixture=keep, **options
        )
        d_mixture, streams = a.d_mixture if keep else None, a.streams if a.y is None else out.stream[None]
        return out, backend.backward(
            a.w, a.scale, a.mixtures, a.lse, streams, at, j, first, out.stats, a.d_x, d_mixture,
            a.d_stream, a.d_mixtures, a.d_lse, **options,
        )  # fmt: skip

    out, (dw, dscale, d_stream, d_mixtures, d_lse) = both(
        jnp.int32(len(a.streams) - 1), jnp.int32(j), jnp.bool(first)
    )
    assert (out.mixture is None) != keep
    with jax.enable_x64(True):
        primals = [wide(v) for v in (a.w, a.scale, a.mixtures, a.lse, a.stream)]
        read = partial(merge_oracle, j=j, first=first, y=wide(a.y), dtype=dtype)
        (x, h), vjp, new = jax.vjp(read, *primals, has_aux=True)
        grads = vjp((wide(a.d_x), wide(a.d_mixture) * keep))
    close(out.x, x, dtype)
    if keep:
        close(out.mixture, h, dtype)
    if a.y is None:
        assert out.stream is None
    else:
        np.testing.assert_array_equal(np.asarray(out.stream, np.float64), new)
    close(dw, grads[0])
    if a.scale is None:
        assert dscale is None
    else:
        close(dscale, grads[1])
    others = np.arange(len(a.lse)) != j
    close(d_mixtures[j], grads[2][j], dtype)
    close(d_lse[j], grads[3][j])
    np.testing.assert_array_equal(d_mixtures[others], a.d_mixtures[others])
    np.testing.assert_array_equal(d_lse[others], a.d_lse[others])
    close(d_stream, np.asarray(grads[4]) + np.asarray(a.d_stream, np.float64), dtype)
    if first:
        np.testing.assert_array_equal(d_stream, a.d_stream)


MERGE = [  # tokens, D, S, dtype, norm, y, j, first, keep
    pytest.param(4, 512, 3, BF16, True, False, 1, False, False, id="read"),
    pytest.param(3, 512, 3, BF16, True, True, 2, False, True, id="add and keep", marks=pytest.mark.slow),
    pytest.param(3, 256, 3, BF16, True, False, 1, True, True, id="first"),
    pytest.param(
        1, 256, 1, BF16, False, False, 0, False, True, id="no norm, one token", marks=pytest.mark.slow
    ),
    pytest.param(5, 512, 1, F32, False, True, 0, False, False, id="no norm, add", marks=pytest.mark.slow),
    pytest.param(7, 512, 1, F32, True, True, 0, False, True, id="fp32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("tokens", "D", "S", "dtype", "norm", "y", "j", "first", "keep"), MERGE)
def test_mosaic_merge(tokens, D, S, dtype, norm, y, j, first, keep, monkeypatch):
    monkeypatch.setattr(merge_gpu, "PROCESSORS", 1)  # so that a program walks over several rows
    monkeypatch.setattr(merge_gpu, "GOOD_CHUNKS", 1)  # so that warpgroups share a row
    a = merge_inputs(tokens, D, S, dtype, norm=norm, y=y)
    check_merge(merge_gpu, a, j, first, keep, interpret=RACES)


def test_mosaic_merge_of_several_rows_at_once(monkeypatch):
    """Lanes of two warpgroups, of which some have no row left."""
    monkeypatch.setattr(merge_gpu, "PROCESSORS", 1)
    monkeypatch.setattr(merge_gpu, "GOOD_CHUNKS", 1)
    cut = merge_gpu._cut
    monkeypatch.setattr(merge_gpu, "_cut", lambda *sizes: (3, 2, 1, 1) if len(sizes[4]) > 1 else cut(*sizes))
    check_merge(merge_gpu, merge_inputs(7, 512, 2, BF16), 1, False, False, interpret=RACES)


def nearly_all(inputs):
    """The running sum has all but a few ten-thousandths of each read."""
    inputs.lse = inputs.lse - 8
    return inputs


def test_mosaic_merge_where_the_sum_has_nearly_all(monkeypatch):
    monkeypatch.setattr(merge_gpu, "PROCESSORS", 1)
    check_merge(merge_gpu, nearly_all(merge_inputs(3, 256, 2, BF16)), 1, False, False, interpret=RACES)


def test_triton_merge_where_the_sum_has_nearly_all(triton):
    a = nearly_all(merge_inputs(3, 99, 2, BF16))
    check_merge(triton("depth_merge"), a, 1, False, False, jit=lambda f: f)


def test_a_merge_that_is_not_told_whether_it_is_the_first(monkeypatch):
    """The op, with `first` None as reads outside of loops give it: to the bit as with False."""
    for name in ("forward", "backward"):
        run = partial(getattr(merge_gpu, name), interpret=plgpu.InterpretGPUParams())
        monkeypatch.setattr(merge_gpu, name, run)
    a = merge_inputs(4, 256, 3, jnp.float32)

    def loss(first, *args):
        x, _, stream, *done = merge_op.depth_merge(
            *args, None, None, None, jnp.int32(1), first, EPS, NORM_EPS, False, "gpu"
        )
        return sum(jnp.sum(out**3) for out in (x, stream, *done))

    args = (a.w, a.scale, a.mixtures, a.lse, a.stream)
    untold, told = (jax.grad(partial(loss, first), range(5))(*args) for first in (None, jnp.bool(False)))
    jax.tree.map(np.testing.assert_array_equal, untold, told)


@pytest.mark.parametrize("D", [1000, pytest.param(99, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("tokens", "_", "S", "dtype", "norm", "y", "j", "first", "keep"), MERGE)
def test_triton_merge(tokens, _, D, S, dtype, norm, y, j, first, keep, triton):
    a = merge_inputs(tokens, D, S, dtype, norm=norm, y=y)
    check_merge(triton("depth_merge"), a, j, first, keep, jit=lambda f: f)


@pytest.fixture
def triton(monkeypatch):
    """A Triton backend by name of its op, run by Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # before the first import: it is read then
    pytest.importorskip("triton", reason="triton is not installed")

    def backend(op):
        module = importlib.import_module(f"pallas_kernels.{op}.triton")
        monkeypatch.setattr(module, "PROGRAMS", 2)
        monkeypatch.setattr(module, "call", triton_interpreter.call)
        return module

    return backend


def mix_oracle(w, v):
    """Mixtures and lse of every query over the visible rows, in fp64."""
    s = jnp.einsum("sd,rtd->srt", w, v) / jnp.sqrt(jnp.mean(v * v, -1) + EPS)
    lse = jax.nn.logsumexp(s, 1)
    return jnp.einsum("srt,rtd->std", jnp.exp(s - lse[:, None]), v), lse


def seen(arrays, counts):
    return jnp.concatenate([wide(v)[:n] for v, n in zip(arrays, counts, strict=True)])


def check_mix(backend, S, lengths, counts, tokens, D, dtype, given, jit=jax.jit, roundings=1, **options):
    """Values and gradients of S queries; counts are traced, hidden rows are NaN."""
    draw = np.random.default_rng(1).standard_normal
    w = jnp.asarray(draw((S, D)) * 0.1, jnp.float32)
    sources = tuple(jnp.asarray(draw((r, tokens, D)), dtype) for r in lengths)
    sources = tuple(v if n is None else v.at[n:].set(jnp.nan) for v, n in zip(sources, counts, strict=True))
    so_far = tuple(jnp.asarray(draw(v.shape), dtype) for v in sources)
    d_mixture, d_lse = jnp.asarray(draw((S, tokens, D)), dtype), jnp.asarray(draw((S, tokens)), jnp.float32)

    @jit
    def both(counts):
        out = backend.forward(w, sources, counts, eps=EPS, **options)
        return out, backend.backward(
            w, sources, counts, out.lse, out.stats, d_mixture, d_lse, so_far if given else None,
            eps=EPS, **options,
        )  # fmt: skip

    out, (dw, d_sources) = both(tuple(None if n is None else jnp.int32(n) for n in counts))
    with jax.enable_x64(True):
        (mixture, lse), vjp = jax.vjp(mix_oracle, wide(w), seen(sources, counts))
        want_dw, want = vjp((wide(d_mixture), wide(d_lse)))
        want += seen(so_far, counts) if given else 0
        got = seen(d_sources, counts)
    close(out.mixture, mixture, dtype)
    close(out.lse, lse)
    close(dw, want_dw)
    close(got, want, dtype, roundings)
    for d, before, n in zip(d_sources, so_far, counts, strict=True):
        if n is not None:
            np.testing.assert_array_equal(d[n:], before[n:] if given else jnp.zeros_like(d[n:]))


MIX = [  # S, rows of each array, visible of them, tokens, D, given
    pytest.param(3, [1, 4], [None, 2], 5, 256, True, id="two arrays, counted"),
    pytest.param(1, [3], [None], 9, 256, False, id="single read", marks=pytest.mark.slow),
    pytest.param(1, [1, 4], [None, 2], 11, 256, True, id="single read, counted"),
    pytest.param(3, [4], [1], 3, 256, False, id="one visible row", marks=pytest.mark.slow),
    pytest.param(2, [2, 3], [0, 2], 3, 256, True, id="none of the first array"),
    pytest.param(1, [2, 3], [0, 2], 3, 256, True, id="single read, none of the first array"),
    pytest.param(12, [3, 7], [None, None], 17, 256, True, id="more than eight rows", marks=pytest.mark.slow),
    pytest.param(17, [2], [None], 3, 256, True, id="more than 16 queries", marks=pytest.mark.slow),
    pytest.param(2, [2, 7], [None, 6], 25, 512, True, id="rings turn", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("S", "lengths", "counts", "tokens", "D", "given"), MIX)
def test_mosaic_mix(S, lengths, counts, tokens, D, given, monkeypatch):
    monkeypatch.setattr(gpu_backward, "PROCESSORS", 1)  # so that a program walks over several tokens
    roundings = -(-S // mix_gpu.QUERIES)  # of d_sources, once for each 16 queries
    check_mix(mix_gpu, S, lengths, counts, tokens, D, BF16, given, roundings=roundings, interpret=RACES)


SINGLE = [  # warpgroups, rows together, rows of each array, visible of them, tokens, D, given
    pytest.param(1, 3, [1, 4], [None, 2], 3, 256, True, id="counted"),
    pytest.param(2, 2, [1, 2], [None, None], 3, 512, False, id="two warpgroups"),
    pytest.param(1, 3, [1, 1, 2], [None] * 3, 5, 768, True, id="rings turn", marks=pytest.mark.slow),
    pytest.param(2, 3, [3, 4], [1, None], 5, 1024, True, id="the first is counted", marks=pytest.mark.slow),
    pytest.param(1, 4, [4], [1], 3, 256, False, id="one visible row, none given", marks=pytest.mark.slow),
    pytest.param(1, 1, [1], [None], 1, 256, False, id="one token of one row", marks=pytest.mark.slow),
    pytest.param(1, 4, [16], [None], 3, 256, True, id="16 rows", marks=pytest.mark.slow),
    pytest.param(1, 3, [2], [None], 63, 256, False, id="63 tokens", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("groups", "together", "lengths", "counts", "tokens", "D", "given"), SINGLE)
def test_mosaic_single_read(groups, together, lengths, counts, tokens, D, given, monkeypatch):
    """With the fewest slots, so that every slot is used again."""
    monkeypatch.setattr(gpu_token, "PROCESSORS", 1)  # so that a program walks over several tokens
    tile_of = gpu_single.tile_of

    def tight(tokens, D, R, *, backward, given=False):
        tile = tile_of(tokens, D, R, backward=backward, given=given)
        others = {"given_slots": min(2, tile.given_slots), "resident": 2, "together": together}
        return replace(tile, groups=groups, slots=R + 1 + backward, **others)

    monkeypatch.setattr(gpu_single, "tile_of", tight)
    check_mix(mix_gpu, 1, lengths, counts, tokens, D, BF16, given, interpret=RACES)


TRITON_WIDTHS = [  # D, dtype
    pytest.param(200, BF16, id="D=200"),
    pytest.param(99, BF16, id="rows not aligned", marks=pytest.mark.slow),
    pytest.param(64, F32, id="fp32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("D", "dtype"), TRITON_WIDTHS)
@pytest.mark.parametrize(("S", "lengths", "counts", "tokens", "_", "given"), MIX)
def test_triton_mix(S, lengths, counts, tokens, D, _, given, dtype, triton):
    check_mix(triton("depth_mix"), S, lengths, counts, tokens, D, dtype, given, jit=lambda f: f)


def check_one_source_has_no_query_gradient(backend, **options):
    draw = np.random.default_rng(2).standard_normal
    w, v, d = (
        jnp.asarray(draw((2, 256)), F32),
        jnp.asarray(draw((1, 3, 256)), BF16),
        jnp.asarray(draw((2, 3, 256)), BF16),
    )
    out = backend.forward(w, (v,), (None,), eps=EPS, **options)
    dw, (dv,) = backend.backward(
        w, (v,), (None,), out.lse, out.stats, d, jnp.zeros((2, 3)), None, eps=EPS, **options
    )
    np.testing.assert_array_equal(out.mixture, jnp.stack([v[0], v[0]]))
    np.testing.assert_array_equal(dw, jnp.zeros_like(w))
    close(dv[0], np.asarray(d, np.float64).sum(0), BF16)


@pytest.mark.slow
def test_mosaic_one_source_has_no_query_gradient():
    check_one_source_has_no_query_gradient(mix_gpu, interpret=plgpu.InterpretGPUParams())


def test_triton_one_source_has_no_query_gradient(triton):
    check_one_source_has_no_query_gradient(triton("depth_mix"))


@pytest.mark.slow
def test_triton_mix_many_rows(triton):
    check_mix(triton("depth_mix"), 32, [1, 129], [None, 100], 2, 72, BF16, True, jit=lambda f: f)
