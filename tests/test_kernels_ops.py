"""TPU kernels through ops and dispatcher: stacks, chunks, vmap, devices, and the kernels of a program."""

import re
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.experimental.pallas import tpu as pltpu
from test_kernels_tpu import EPS, NORM_EPS, SUMS, close, drawn, interpreted, wide

from attnres_jax import depth, ops
from attnres_jax.depth import Partial, Rows
from attnres_jax.norm import RMSNorm
from attnres_jax.parallel import mesh
from attnres_jax.parallel.chunk import Chunked
from attnres_jax.parallel.timetable import Chunks
from attnres_jax.rules import Rule
from pallas_kernels.depth_merge import shapes as merge_shapes
from pallas_kernels.depth_merge import vjp as merge_op
from pallas_kernels.depth_mix import shapes as mix_shapes

__all__ = ["interpreted"]  # a fixture of every test here


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
    """Errors of values and of every gradient of a phase beside those of the reference in bf16, compiled."""
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
    found = jax.block_until_ready(run("tpu", args, given))
    for a, b, want in zip(found, run("reference", args, given), exact, strict=True):
        assert a.dtype == b.dtype
        a, b = (np.linalg.norm(np.asarray(x, np.float64) - want) / np.linalg.norm(want) for x in (a, b))
        assert a <= min(5e-3, 1.02 * b + SUMS["bfloat16"]), (want.shape, a, b)


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
