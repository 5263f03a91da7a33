"""Every row of `shapes.py` through the TPU's own compiler, forward and backward, with no TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from attnres_jax.bench import target
from pallas_kernels.depth_merge import shapes as merge_shapes
from pallas_kernels.depth_merge import tpu as merge
from pallas_kernels.depth_mix import shapes as mix_shapes
from pallas_kernels.depth_mix import tpu as mix

pytestmark = [pytest.mark.libtpu, pytest.mark.slow]
F32, I32 = jnp.float32, jnp.int32
CHIPS = ("v5e", "v6e")


@pytest.fixture(params=CHIPS)
def compiled(request):
    """The text of a function's program for a chip, of arrays by shape and dtype."""
    (device,) = target.devices(request.param, 1)
    place = jax.sharding.SingleDeviceSharding(device)

    def compile(function, args):
        args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), args)
        with target.tracing_for(device):
            program = jax.jit(function).trace(*args)
            return program.out_info, program.lower().compile().as_text()

    return compile


def of(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("shape", mix_shapes.SHAPES.values(), ids=mix_shapes.SHAPES)
def test_depth_mix(shape, compiled):
    S, T, D = shape.S, shape.tokens, shape.D
    slots = () if shape.slot is None else (3,)
    sources = tuple(of(*slots, rows, T, D, dtype=shape.dtype) for rows in shape.rows)
    each = tuple(of(dtype=I32) for _ in sources)
    seen = each if shape.n is not None else tuple(None for _ in sources)
    where = (each,) if slots else ()
    args = (of(S, D), sources, seen)
    out, text = compiled(partial(mix.forward, eps=1e-6), (*args, *where))
    assert "depth_mix_forward" in text
    after = (of(S, T), out.stats, of(S, T, D, dtype=shape.dtype), of(S, T), sources if shape.add else None)
    _, text = compiled(partial(mix.backward, eps=1e-6), (*args, *after, *where))
    assert "depth_mix_backward" in text


@pytest.mark.parametrize("compiled", ["v5p"], indirect=True)
@pytest.mark.parametrize(("S", "R", "D"), [(16, 9, 2304), (16, 2, 7168), (16, 64, 512)])
def test_what_fills_vmem(S, R, D, compiled):
    """In fp32, as many tokens as are estimated to fit."""
    test_depth_mix(mix_shapes.Shape(S, (R,), 1024, D, "float32"), compiled)


@pytest.mark.parametrize("shape", merge_shapes.SHAPES.values(), ids=merge_shapes.SHAPES)
def test_depth_merge(shape, compiled):
    S, T, D = shape.S, shape.tokens, shape.D
    stream, rows = of(T, D, dtype=shape.dtype), of(S, T, D, dtype=shape.dtype)
    first = of(dtype=jnp.bool_) if shape.first else None
    args = (of(D), of(D) if shape.norm else None, rows, of(S, T), of(2, T, D, dtype=shape.dtype))
    args += (of(dtype=I32), of(dtype=I32), first)
    forward = partial(merge.forward, eps=1e-6, norm_eps=1e-5, keep_mixture=shape.keep)
    out, text = compiled(forward, (*args, stream if shape.add else None))
    assert "depth_merge_forward" in text
    after = (out.stats, stream, stream if shape.keep else None, stream, rows, of(S, T))
    _, text = compiled(partial(merge.backward, eps=1e-6, norm_eps=1e-5), (*args, *after))
    assert "depth_merge_backward" in text


@pytest.mark.parametrize("compiled", ["v4"], indirect=True)
@pytest.mark.parametrize("D", [1024, 1536])
def test_what_fills_the_vmem_of_phase_2(D, compiled):
    """All options, as many tokens as are estimated to fit."""
    test_depth_merge(merge_shapes.Shape(2, 1024, D, keep=True, add=True), compiled)
