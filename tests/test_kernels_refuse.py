"""What the ops do not take is said at the call, by argument, with what was expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.depth_merge import vjp as merge
from pallas_kernels.depth_mix import vjp as mix

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
S, R, T, D = 2, 3, 4, 256


def of(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def call(op, whole):
    """Of arrays that are not there."""
    arrays = {
        name: value
        for name, value in whole.items()
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value))
    }
    return jax.eval_shape(lambda arrays: op(*(whole | arrays).values()), arrays)


MIX = {  # changed arguments, what the error says
    "w of a vector": ({"w": of(D)}, r"w must be \[S, D\] of float32 with S >= 1, got \(256,\)"),
    "no queries": ({"w": of(0, D)}, r"w must be .* S >= 1, got \(0, 256\)"),
    "w in bf16": ({"w": of(S, D, dtype=BF16)}, r"w must be .* float32 .* got \(2, 256\) of bfloat16"),
    "no arrays": ({"sources": (), "counts": ()}, r"sources must hold at least one row, .* got \[\]"),
    "no rows": ({"sources": (of(0, T, D, dtype=BF16),)}, r"at least one row, .* got \[\(0, 4, 256\)\]"),
    "no tokens": ({"sources": (of(R, 0, D, dtype=BF16),)}, r"one row, token and column each"),
    "fp16": ({"sources": (of(R, T, D, dtype=F16),)}, "sources must be bfloat16 or float32, got float16"),
    "another width": (
        {"sources": (of(R, T, 512, dtype=BF16),)},
        r"sources\[0\] must be \[R, \(4, 256\)\]",
    ),
    "two dtypes": (
        {"sources": (of(R, T, D, dtype=BF16), of(R, T, D)), "counts": (None, None)},
        r"sources\[1\] must be .* of bfloat16, got \(3, 4, 256\) of float32",
    ),
    "too few counts": ({"counts": ()}, "counts must say None or a number for each of 1 arrays, got 0"),
    "more than there are": ({"counts": (np.int64(5),)}, r"counts must be within the rows \[3\], not all 0"),
    "none visible": ({"counts": (0,)}, r"counts must be within the rows \[3\], not all 0, got \[0\]"),
    "slots on a GPU": ({"slots": (0,), "backend": "gpu"}, "slots are for 'tpu', .* give it array"),
    "too large for VMEM": (
        {"w": of(S, 2**20), "sources": (of(16, T, 2**20, dtype=BF16),), "backend": "tpu"},
        r"holds 8 tokens of R = 16 sources and S = 2 mixtures, D = 1048576 wide, in VMEM: .* the limit is",
    ),
}


@pytest.mark.parametrize(("change", "message"), MIX.values(), ids=MIX)
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_depth_mix_refuses(backend, change, message):
    whole = {"w": of(S, D), "sources": (of(R, T, D, dtype=BF16),), "counts": (None,), "eps": 1e-6}
    whole |= {"handed_on": False, "backend": backend, "slots": None} | change
    with pytest.raises(ValueError, match=message):
        call(mix.depth_mix, whole)


MERGE = {
    "w in bf16": ({"w": of(D, dtype=BF16)}, r"w must be \(256,\) of float32 .*"),
    "another width of w": ({"w": of(D + 1)}, r"w must be \(256,\) .* got \(257,\)"),
    "scale in bf16": ({"scale": of(D, dtype=BF16)}, r"scale must be \(256,\) of float32"),
    "lse in bf16": ({"lse": of(S, T, dtype=BF16)}, r"lse must be \(2, 4\) of float32"),
    "lse of other tokens": ({"lse": of(S, T + 1)}, r"lse must be \(2, 4\) .* got \(2, 5\)"),
    "fp16": ({"stream": of(T, D, dtype=F16)}, "stream must be bfloat16 or float32, got float16"),
    "no rows": ({"mixtures": of(0, T, D, dtype=BF16)}, r"mixtures must hold at least one row, token"),
    "no tokens": (
        {"mixtures": of(S, 0, D, dtype=BF16), "stream": of(0, D, dtype=BF16)},
        r"mixtures must hold at least one row, token and column, got \(2, 0, 256\)",
    ),
    "two dtypes": (
        {"mixtures": of(S, T, D)},
        r"mixtures must be .* of bfloat16 .* got \(2, 4, 256\) of float32",
    ),
    "kept of other tokens": (
        {"kept": of(2, T + 1, D, dtype=BF16), "at": 0},
        r"kept must be \(2, 4, 256\) of bfloat16 .* got \(2, 5, 256\)",
    ),
    "y of another shape": ({"y": of(1, D, dtype=BF16)}, r"y must be \(4, 256\)"),
    "y and kept": (
        {"y": of(T, D, dtype=BF16), "kept": of(1, T, D, dtype=BF16), "at": 0},
        "kept and first must be None",
    ),
    "y and first": ({"y": of(T, D, dtype=BF16), "first": of(dtype=jnp.bool_)}, "kept and first must be None"),
    "too large for VMEM": (
        {
            "w": of(2**20),
            "mixtures": of(1, 128, 2**20, dtype=BF16),
            "lse": of(1, 128),
            "stream": of(128, 2**20, dtype=BF16),
            "backend": "tpu",
        },
        r"holds 128 tokens of width D = 1048576 .* in VMEM: .* the limit is",
    ),
}


@pytest.mark.parametrize(("change", "message"), MERGE.values(), ids=MERGE)
@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_depth_merge_refuses(backend, change, message):
    whole = {"w": of(D), "scale": None, "mixtures": of(S, T, D, dtype=BF16), "lse": of(S, T)}
    whole |= {"stream": of(T, D, dtype=BF16), "kept": None, "y": None, "at": None, "j": 0, "first": None}
    whole |= {"eps": 1e-6, "norm_eps": 1e-6, "keep_mixture": False, "backend": backend} | change
    with pytest.raises(ValueError, match=message):
        call(merge.depth_merge, whole)
