"""Phase 2 with its derivative: one read of a block, merged with Phase 1 and normed (README.md)."""

import functools

import jax
from jax.custom_batching import sequential_vmap

from pallas_kernels.depth_merge import tpu

BACKENDS = {"tpu": tpu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10, 11))
def depth_merge(w, scale, mixtures, lse, stream, y, j, first, eps, norm_eps, keep_mixture, backend):
    """The sublayer's input x, the mixture or None, and stream, mixtures and lse for later reads to take.

    Args:
      w: [D] fp32, query * key_scale of this read.
      scale: [D] fp32 of the sublayer's RMSNorm, or None: x is the mixture.
      mixtures, lse: [S, tokens, D] and fp32 [S, tokens], all of Phase 1; row `j` (int32, may be traced) is
        this read's.
      stream: [tokens, D], the running sum of the block's outputs.
      y: [tokens, D] or None: an output to add to the sum before it is read; x and the sum are in its dtype.
      first: bool, may be traced: the block has no sum yet, and `stream` is not read. Then y must be None.
      eps, norm_eps: of the key norm and of the sublayer's norm.
      keep_mixture: also return the mixture, before the norm.
      backend: a key of `BACKENDS`.
    """
    return _forward(w, scale, mixtures, lse, stream, y, j, first, eps, norm_eps, keep_mixture, backend)[0]


def _forward(w, scale, mixtures, lse, stream, y, j, first, eps, norm_eps, keep_mixture, backend):
    options = {"eps": eps, "norm_eps": norm_eps, "keep_mixture": keep_mixture}
    run = sequential_vmap(functools.partial(BACKENDS[backend].forward, **options))
    out = run(w, scale, mixtures, lse, stream, j, first, y)
    kept = (w, scale, mixtures, lse, out.stream, j, first, out.stats, y is None)
    return (out.x, out.mixture, out.stream, mixtures, lse), kept


def _backward(eps, norm_eps, keep_mixture, backend, kept, cotangents):
    w, scale, mixtures, lse, stream, j, first, stats, alone = kept
    d_x, d_mixture, d_stream, d_mixtures, d_lse = cotangents
    run = sequential_vmap(functools.partial(BACKENDS[backend].backward, eps=eps, norm_eps=norm_eps))
    d_w, d_scale, d_stream, d_mixtures, d_lse = run(
        *(w, scale, mixtures, lse, stream, j, first, stats, d_x, d_mixture, d_stream, d_mixtures, d_lse)
    )
    return d_w, d_scale, d_mixtures, d_lse, d_stream, None if alone else d_stream, None, None


depth_merge.defvjp(_forward, _backward)
