"""Phase 2 in Triton through jax-triton (Ampere and newer): one read of a block, and its backward.

Any D up to 16384 (masked to the power of two above it; the backward spills above 4096), any number of
tokens; bf16 or fp32. In-place operands are aliased. dw and dscale leave as [programs, D] and are added up
outside: no atomics.
stats [4, tokens] fp32: the score, the reciprocal rms of p, score - lse, the reciprocal rms of h.

jax-triton 0.4 does not lower under JAX 0.12 and newer, where a call raises. Imports are made by the call.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.depth_merge.vjp import Forward
from pallas_kernels.triton import PROGRAMS, call

MAX_D = 16384
F32 = jnp.float32


def _control(j, first, at):
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in (j, first, at)])


def _row(D):
    """The padded width, and warps enough to hold a row in registers; raises where none are."""
    if D > MAX_D:
        raise ValueError(f"stream: D = {D} exceeds {MAX_D}, a row in one program's registers")
    width = 1 << (D - 1).bit_length()
    return width, min(16, max(4, width // 1024))


def forward(w, scale, mixtures, lse, streams, at, j, first, y=None, *, eps, norm_eps, keep_mixture):
    """Read row j merged with row `at` of `streams`; see vjp.py."""
    _, tokens, D = streams.shape
    norm, add = scale is not None, y is not None
    keep = keep_mixture and norm
    width, warps = _row(D)
    wide, none = (jax.ShapeDtypeStruct(shape, streams.dtype) for shape in ((tokens, D), (8,)))
    control, new = _control(j, first, at), jax.ShapeDtypeStruct(streams.shape, streams.dtype)
    operands = [w, scale if norm else w, mixtures, lse, streams, y if add else streams, control]
    new, x, mixture, stats = call(
        "depth_merge",
        "forward",
        [*operands, tokens, eps, norm_eps],
        [new if add else none, wide, wide if keep else none, jax.ShapeDtypeStruct((4, tokens), F32)],
        grid=(tokens,),
        warps=warps,
        aliases={4: 0} if add else {},
        constants={"D": D, "BD": width, "NORM": norm, "KEEP": keep, "ADD": add},
    )
    mixture = (mixture if keep else x) if keep_mixture else None
    return Forward(x, mixture, new[0] if add else None, stats)


def backward(
    w, scale, mixtures, lse, streams, at, j, first, stats, d_x, d_mixture, d_stream, d_mixtures, d_lse,
    *, eps, norm_eps,
):  # fmt: skip
    """Cotangents (dw, dscale, d_stream, d_mixtures, d_lse); the last three written in place."""
    del lse, eps, norm_eps  # all that they say is in stats
    _, tokens, D = streams.shape
    norm, keep = scale is not None, d_mixture is not None
    width, warps = _row(D)
    # As many slots as fit an A100's shared memory.
    stages = max(1, min(3, 4 - width * streams.dtype.itemsize // 8192))
    programs = min(PROGRAMS, tokens)
    sums, none = jax.ShapeDtypeStruct((programs, D), F32), jax.ShapeDtypeStruct((8,), F32)
    operands = [w, scale if norm else w, mixtures, streams, stats, d_x, d_mixture if keep else d_x]
    in_place = [d_stream, d_mixtures, d_lse]
    d_stream, d_mixtures, d_lse, dw, dscale = call(
        "depth_merge",
        "backward",
        [*operands, *in_place, _control(j, first, at), tokens],
        [*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in in_place), sums, sums if norm else none],
        grid=(programs,),
        warps=min(16, 2 * warps),
        aliases={7: 0, 8: 1, 9: 2},
        constants={"D": D, "BD": width, "NORM": norm, "KEEP": keep, "STAGES": stages},
    )
    return jnp.sum(dw, 0), jnp.sum(dscale, 0) if norm else None, d_stream, d_mixtures, d_lse
