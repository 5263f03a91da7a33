"""Phase 2 with its derivative: one read of a block, merged with Phase 1 and normed (README.md)."""

import functools
import importlib

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

BACKENDS = ("tpu", "gpu", "triton")


@functools.partial(jax.custom_vjp, nondiff_argnums=(10, 11, 12, 13))
def depth_merge(w, scale, mixtures, lse, stream, kept, y, at, j, first, eps, norm_eps, keep_mixture, backend):
    """The sublayer's input x, the mixture or None, and stream, mixtures and lse for later reads to take.

    Args:
      w: [D] fp32, query * key_scale of this read.
      scale: [D] fp32 of the sublayer's RMSNorm, or None: x is the mixture.
      mixtures, lse: [S, tokens, D] and fp32 [S, tokens], all of Phase 1; row `j` (int32, may be traced) is
        this read's.
      stream: [tokens, D], the running sum of the block's outputs.
      kept: None, or an array [..., tokens, D] whose row `at` is the sum too. It is read there, and `stream`
        takes the cotangent only: a sum that a loop over depth has kept need not be copied out.
      y: [tokens, D] or None: an output to add to the sum before it is read; then `kept` must be None.
      first: bool, may be traced: the block has no sum yet, and none is read. Then y must be None.
      eps, norm_eps: of the key norm and of the sublayer's norm.
      keep_mixture: also return the mixture, before the norm.
      backend: one of `BACKENDS`: Mosaic on TPU, Mosaic on GPU, jax-triton.
    """
    args = (w, scale, mixtures, lse, stream, kept, y, at, j, first)
    return _forward(*args, eps, norm_eps, keep_mixture, backend)[0]


def _forward(w, scale, mixtures, lse, stream, kept, y, at, j, first, eps, norm_eps, keep_mixture, backend):
    options = {"eps": eps, "norm_eps": norm_eps, "keep_mixture": keep_mixture}
    run = sequential_vmap(functools.partial(_module(backend).forward, **options))
    place = _place(backend, stream, kept, at)
    out = run(w, scale, mixtures, lse, *place, j, first, y)
    if y is not None:
        stream, place = out.stream, _place(backend, out.stream, None, None)
    saved = (w, scale, mixtures, lse, *place, j, first, out.stats)
    return (out.x, out.mixture, stream, mixtures, lse), (saved, y is None)


def _backward(eps, norm_eps, keep_mixture, backend, saved, cotangents):
    args, alone = saved
    run = sequential_vmap(functools.partial(_module(backend).backward, eps=eps, norm_eps=norm_eps))
    d_w, d_scale, d_stream, d_mixtures, d_lse = run(*args, *cotangents)
    return d_w, d_scale, d_mixtures, d_lse, d_stream, None, None if alone else d_stream, None, None, None


def _place(backend, stream, kept, at):
    """Where a backend finds the sum: on TPU row `at` of an array."""
    if backend != "tpu":
        return (stream,)
    return (stream[None], jnp.int32(0)) if kept is None else (kept, at)


def _module(backend):
    return importlib.import_module(f"pallas_kernels.depth_merge.{backend}")


depth_merge.defvjp(_forward, _backward)
