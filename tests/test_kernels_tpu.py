"""TPU kernels on the CPU: values and every gradient in the race-detecting interpreter, against fp64."""

import re
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax._src import effects
from jax._src.callback import IOEffect, OrderedIOEffect
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from attnres_jax import depth, ops
from attnres_jax.depth import Partial, Rows
from attnres_jax.norm import RMSNorm
from attnres_jax.parallel import mesh
from attnres_jax.parallel.chunk import Chunked
from attnres_jax.parallel.timetable import Chunks
from attnres_jax.rules import Rule
from pallas_kernels.depth_merge import config as merge_config
from pallas_kernels.depth_merge import shapes as merge_shapes
from pallas_kernels.depth_merge import tpu as merge
from pallas_kernels.depth_merge import vjp as merge_op
from pallas_kernels.depth_mix import config as mix_config
from pallas_kernels.depth_mix import shapes as mix_shapes
from pallas_kernels.depth_mix import tpu as mix

EPS, NORM_EPS = 0.1, 0.3  # as large as what they are added to: each is seen
TOLERANCE = {"bfloat16": 5e-3, "float32": 2e-6}
"""Relative error against fp64, of what is rounded to the dtype; `SUMS`: of what stays fp32."""
SUMS = {"bfloat16": 2e-5, "float32": 2e-6}
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


def close(got, want, tolerance):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want) + 1e-30


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
    out = mix.forward(w, tuple(parts), counts, *slots, eps=EPS)
    sums = tuple(before) if shape.add else None
    d_w, d_v = mix.backward(w, tuple(parts), counts, out.lse, out.stats, d_out, d_lse, sums, *slots, eps=EPS)
    if shape.slot is not None:
        assert all(np.isnan(np.delete(np.asarray(d, np.float32), shape.slot, 0)).all() for d in d_v)
        d_v = [d[shape.slot] for d in d_v]
    with jax.enable_x64():
        exact, pull = jax.vjp(
            lambda w, v: depth.partial_mix(w, (Rows(v, shape.n),), Rule(EPS)), *wide((w, v))
        )
        want_w, want_v = pull(Partial(*wide((d_out, d_lse))))
        want_v = want_v + wide(added) if shape.add else want_v
    close(out.mixture, exact.mixture, TOLERANCE[shape.dtype])
    close(out.lse, exact.lse, SUMS[shape.dtype])
    close(jnp.concatenate(d_v), want_v, TOLERANCE[shape.dtype])
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
    out = jax.block_until_ready(mix.forward(w, (v,), (jnp.int32(n),), eps=EPS))
    assert sum(moved) == n * 128 * 128
    moved.clear()
    after = out.lse, out.stats, d, jnp.zeros_like(out.lse), (v,)
    jax.block_until_ready(mix.backward(w, (v,), (jnp.int32(n),), *after, eps=EPS))
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
    out = merge.forward(w, scale, o, lse, *here, *at, added, keep_mixture=shape.keep, **options)
    total = (p.astype(jnp.float32) + y.astype(jnp.float32)).astype(p.dtype) if shape.add else p
    if shape.add:
        np.testing.assert_array_equal(out.stream, total)
        here = (out.stream[None], here[1])
    cotangents = (d_x, d_h if shape.keep else None, d_p, d_os, d_lses)
    got = merge.backward(w, scale, o, lse, *here, *at, out.stats, *cotangents, **options)

    def read(w, scale, o, lse, p):
        seen = jnp.where(shape.first, -jnp.inf, depth.scores(w, p, Rule(EPS)))
        h = depth.merge(Partial(o, lse), Partial(p, seen)).mixture
        return h if scale is None else RMSNorm(scale, NORM_EPS)(h), h

    with jax.enable_x64():
        (x, h), pull = jax.vjp(read, *wide((w, scale, o[j], lse[j], total)))
        d_w, d_scale, d_o, d_lse, want_p = pull((wide(d_x), wide(d_h) * shape.keep))
        want_p = want_p + wide(d_p)
    close(out.x, x, TOLERANCE[shape.dtype])
    if shape.keep:
        close(out.mixture, h, TOLERANCE[shape.dtype])
    close(got[0], d_w, SUMS[shape.dtype])
    if shape.norm:
        close(got[1], d_scale, SUMS[shape.dtype])
    close(got[2], want_p, TOLERANCE[shape.dtype])
    close(got[3][j], d_o, TOLERANCE[shape.dtype])
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
    monkeypatch.setattr(merge_config, "chip", lambda: (2_700_000, 1))
    assert not merge_config.tpu_config("backward", 256, "bfloat16", 256).unpacked
    test_depth_merge(merge_shapes.SHAPES["one_step"])


@pytest.mark.slow
def test_two_cores(monkeypatch):
    """Of a v4 or v5p: they never write the same memory, also where there is no running sum."""
    for config in (mix_config, merge_config):
        monkeypatch.setattr(config, "chip", lambda: (64 << 20, 2))
    test_depth_mix(mix_shapes.SHAPES["two_steps"])
    test_depth_merge(merge_shapes.SHAPES["first_of_block"])


# Through the op and the dispatcher ----------------------------------------------------------------


@pytest.mark.slow
def test_an_output_that_is_added_first():
    """`y` and the mixture, through the op: the cotangent of `y` is that of the sum, which goes on."""
    shape = merge_shapes.SHAPES["float32"]
    p, y, o = drawn(shape, ((8, 128), None), ((8, 128), None), ((2, 8, 128), None))
    w, scale, lse = drawn(shape, ((128,), None), ((128,), None), ((2, 8), None))
    args = (w / 11, 1 + 0.3 * scale, o, lse, p, y)

    def total(x, h, stream):
        return jnp.sum(x**3) + jnp.sum(h**2) + jnp.sum(jnp.sin(stream))

    def by_kernel(w, scale, o, lse, p, y):
        x, h, stream, *_ = merge_op.depth_merge(
            w, scale, o, lse, p, None, y, None, 1, None, EPS, NORM_EPS, True, "tpu"
        )
        return total(x, h, stream)

    def by_equations(w, scale, o, lse, p, y):
        stream = p + y
        h = depth.merge(Partial(o[1], lse[1]), depth.single(w, stream, Rule(EPS))).mixture
        return total(RMSNorm(scale, NORM_EPS)(h), h, stream)

    with jax.enable_x64():
        want = jax.grad(by_equations, range(6))(*wide(args))
    for got, exact in zip(jax.grad(by_kernel, range(6))(*args), want, strict=True):
        close(got, exact, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["mix", "merge"])
def test_bf16_beside_xla(op):
    """Errors of values and of every gradient of a phase beside those of the reference in bf16, compiled: no
    worse, but for cotangents of Phase 1's sources, whose weights are one bf16 (LOG, 2026-11-28)."""
    shape, tall, row = mix_shapes.Shape(3, (4,), 128, 128), (3, 128, 128), (128, 128)
    v, o, p, d_out, d_x = drawn(
        shape, ((4, *row), None), (tall, None), (row, None), (tall, None), (row, None)
    )
    w, scale, *lses = drawn(shape, *((size, "float32") for size in ((3, 128), (128,), (3, 128), (3, 128))))
    if op == "mix":
        args, given = (w / 11, v), Partial(d_out, lses[0])
    else:
        args, given = (w[0] / 11, 1 + 0.3 * scale, Partial(o, lses[0]), p), d_x

    def results(implementation, args, given):
        how = {"rule": Rule(EPS), "implementation": implementation}

        def mixed(w, v):
            return ops.depth_mix(w, (Rows(v),), last=True, **how)[0]

        def merged(w, scale, done, p):
            norm = RMSNorm(scale, NORM_EPS)
            return ops.depth_merge(w, done, p, jnp.int32(1), jnp.bool(False), norm=norm, **how)[0]

        out, pull = jax.vjp(mixed if op == "mix" else merged, *args)
        return jax.tree.leaves((out, pull(given)))

    run = jax.jit(results, static_argnums=0)
    with jax.enable_x64():
        exact = [np.asarray(a) for a in results("reference", *wide((args, given)))]
    for a, b, want in zip(run("tpu", args, given), run("reference", args, given), exact, strict=True):
        assert a.dtype == b.dtype
        a, b = (np.linalg.norm(np.asarray(x, np.float64) - want) / np.linalg.norm(want) for x in (a, b))
        most = 1.6 if want.shape == v.shape else 1.02
        assert a <= min(5e-3, most * b + SUMS["bfloat16"]), (want.shape, a, b)


@pytest.mark.slow
def test_on_several_devices():
    """Rows and time cut over four: values and gradients of both phases."""
    place = mesh.placement(mesh.make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4]))
    w, scale, v = drawn(
        mix_shapes.SHAPES["float32"], ((2, 128), None), ((128,), None), ((3, 2, 16, 128), None)
    )

    def read(w, scale, v, implementation, placement):
        how = {"rule": Rule(EPS), "implementation": implementation, "placement": placement}
        done, _ = ops.depth_mix(w / 11, (Rows(v[:2]),), **how)
        x, done, p = ops.depth_merge(
            w[1] / 11, done, v[2], jnp.int32(1), jnp.bool(False), norm=RMSNorm(scale, NORM_EPS), **how
        )
        return jnp.sum(x**3) + jnp.sum(done.mixture[0] ** 2) + jnp.sum(done.lse) + jnp.sum(p), x

    gradients = jax.jit(jax.grad(read, range(3), has_aux=True), static_argnums=(3, 4))
    got, want = gradients(w, scale, v, "tpu", place), gradients(w, scale, v, "reference", None)
    jax.tree.map(lambda g, w: close(g, w, 2e-6), got, want)


@pytest.mark.slow
def test_vmap_over_slots():
    """Reads of other rows of other slots, one handing the array on to the other."""
    w, v = drawn(mix_shapes.SHAPES["float32"], ((2, 3, 128), None), ((2, 3, 4, 8, 128), None))

    def gradients(implementation):
        def loss(w, v, n, slot):
            how = {"rule": Rule(EPS), "implementation": implementation}
            done, rows = ops.depth_mix(w / 11, (Rows(v, n, slot),), **how)
            again, (rows,) = ops.depth_mix(w / 5, rows, last=True, **how)
            return jnp.sum(done.mixture**2) + jnp.sum(again.mixture**3) + jnp.sum(rows.array[..., 0])

        return jax.vmap(jax.grad(loss, (0, 1)))(w, v, jnp.array([3, 4]), jnp.array([2, 0]))

    for got, want in zip(gradients("tpu"), gradients("reference"), strict=True):
        close(got, want, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["nothing_saveable", "everything_saveable"])
@pytest.mark.parametrize("S", [6, 4, 2])
def test_a_chunk_in_its_slot(S, policy):
    """The second chunk of a pipeline and the output read, which add their cotangents to those of their slot:
    one block, or the second half of one; other slots are NaN, and stay so. What opens a block is made again
    for the backward pass, or kept."""
    scheme, L = toys.make("block", S), 8 if S == 2 else 12
    toy = toys.cast(toys.toy(scheme, "am" * (L // 2), B=1, T=8, D=128), "float32")
    chunks = Chunks(L, S, 2, 1)
    rows, d_rows = drawn(mix_shapes.SHAPES["float32"], *[((chunks.cache.rows, 1, 8, 128), None)] * 2)
    rows, d_rows = (
        jnp.pad(a, [(len(a), len(a)), *[(0, 0)] * 3], constant_values=np.nan) for a in (rows, d_rows / 10)
    )
    base, c = jnp.int32(chunks.cache.rows), jnp.int32(1)

    def run(implementation):
        chunked = Chunked(
            replace(scheme, implementation=implementation),
            "am" * (L // 2),
            chunks,
            getattr(jax.checkpoint_policies, policy),
        )
        params = jax.tree.map(lambda a: a[: len(chunked.longest) // 2], toy.params)
        (after, total), pull = jax.vjp(
            lambda *a: chunked.run(toys.layers(params), *a, base, c), toy.mix["sublayers"], params, rows
        )
        (h, _), pull_read = jax.vjp(lambda *a: chunked.finish(*a, base), toy.mix["output"], after)
        *d_output, d_after = pull_read((jnp.ones_like(h), d_rows))
        return (h, *d_output, *pull((d_after, total))), after

    (got, after), (want, _) = (
        jax.jit(run, static_argnums=0)("tpu"),
        jax.jit(run, static_argnums=0)("reference"),
    )
    own = slice(chunks.cache.rows, 2 * chunks.cache.rows)
    for one, other in zip(jax.tree.leaves((got, after)), jax.tree.leaves((want, after)), strict=True):
        if one.shape == rows.shape:
            assert np.isnan(np.delete(np.asarray(one), np.r_[own], 0)).all()
            one, other = one[own], other[own]
        close(one, other, 1e-5)


def layers(params):
    """The norm as the value that a kernel fuses."""
    made = toys.layers(params)
    return {k: layer._replace(norm=lambda p: RMSNorm(p["scale"], NORM_EPS)) for k, layer in made.items()}


def loss(scheme, kinds, implementation):
    def run(toy):
        out = toys.run(scheme, kinds, toy, layers, implementation=implementation)
        return jnp.sum(out.h.astype(jnp.float32) * toys.probe(out.h))

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "kinds"),
    [(4, "am" * 4), (6, "am" * 6), (1, "am"), (3, "mmmmm")],
    ids=["block", "loop", "full", "short"],
)
def test_whole_stack(size, kinds):
    """Scans, remat, rows that grow, cotangents that are handed on: every gradient as XLA's."""
    scheme = toys.make("block", size)
    toy = toys.cast(toys.toy(scheme, kinds, B=2, T=8, D=128), "float32")
    got = jax.jit(jax.grad(loss(scheme, kinds, "tpu")))(toy)
    want = jax.jit(jax.grad(loss(scheme, kinds, None)))(toy)
    jax.tree.map(lambda g, w: close(g, w, 2e-5), got, want)


@pytest.mark.slow
def test_vmap():
    """Of a kernel, one after the other; `w` and the sources may both be batched."""
    w, v = drawn(mix_shapes.SHAPES["float32"], ((2, 3, 128), None), ((2, 4, 8, 128), None))

    w = w / 128**0.5

    def read(w, v, implementation):
        done = ops.depth_mix(w, (Rows(v),), rule=Rule(EPS), implementation=implementation)[0]
        return jnp.sum(done.mixture**2) + jnp.sum(done.lse)

    batched = jax.vmap(jax.grad(partial(read, implementation="tpu"), (0, 1)))
    want = jax.vmap(jax.grad(partial(read, implementation="reference"), (0, 1)))(w, v)
    jax.tree.map(lambda g, w: close(g, w, 2e-6), batched(w, v), want)
    assert kernels(batched, w, v) == {"mix_forward": 1, "mix_backward": 1}


def kernels(function, *args):
    """Calls by kernel in the program for a TPU."""
    with pltpu.force_tpu_interpret_mode(None), toys.on_tpu():
        text = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    return Counter(re.findall(r'kernel_name = "depth_(\w+)"', text))


LOWERED = {
    # scheme, S, kinds: kernels of a step; a forward one also where the backward pass makes it again
    ("block", 4, "am" * 8): {"mix_forward": 3, "mix_backward": 2, "merge_forward": 6, "merge_backward": 3},
    ("block", 6, "am" * 9): {"mix_forward": 3, "mix_backward": 2, "merge_forward": 4, "merge_backward": 2},
    ("full", 1, "am" * 4): {"mix_forward": 5, "mix_backward": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("case", "wanted"), LOWERED.items(), ids=["block", "loop", "full"])
def test_one_kernel_a_site(case, wanted, times):
    """In the program for a TPU, whatever its depth: what repeats is one loop, but for what comes twice in a
    block, whose first read then is Phase 1's own row: no kernel. Phase 1 is made again in the backward pass;
    the output read, which keeps its statistics, is not."""
    name, size, kinds = case
    scheme, kinds = toys.make(name, size), kinds * times
    toy = toys.cast(toys.toy(scheme, kinds, B=1, T=128, D=128), "float32")
    assert kernels(jax.value_and_grad(loss(scheme, kinds, "tpu")), toy) == wanted
