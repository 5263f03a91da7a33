"""Phase 1 with its derivative: S reads at once over R sources (paper, Block AttnRes; README.md)."""

import functools
import importlib

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

BACKENDS = ("tpu", "gpu", "triton")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def depth_mix(w, sources, counts, eps, handed_on, backend):
    """Mixtures [S, tokens, D] in the sources' dtype, log-sum-exp [S, tokens] fp32, and the sources.

    Args:
      w: [S, D] fp32, query * key_scale of each read.
      sources: tuple of arrays [R_k, tokens, D], bf16 or fp32, none stacked or copied.
      counts: for each array None, or an int32 scalar n >= 1: n rows are read, the others cost nothing.
      eps: of the key norm.
      handed_on: return the sources too, for later reads to take: their cotangents then arrive here
        summed, and this read adds its own in place. Else the third result is ().
      backend: one of `BACKENDS`: Mosaic on TPU, Mosaic on GPU, jax-triton.
    """
    return _forward(w, sources, counts, eps, handed_on, backend)[0]


def _forward(w, sources, counts, eps, handed_on, backend):
    run = sequential_vmap(functools.partial(_module(backend).forward, eps=eps))
    out = run(w, sources, counts)
    return (out.mixture, out.lse, sources if handed_on else ()), (w, sources, counts, out.lse, out.stats)


def _backward(eps, handed_on, backend, kept, cotangents):
    w, sources, counts, lse, stats = kept
    d_mixture, d_lse, d_sources = cotangents
    if not handed_on:  # rows that nobody reads need zeros from somewhere
        d_sources = None if all(n is None for n in counts) else tuple(map(jnp.zeros_like, sources))
    run = sequential_vmap(functools.partial(_module(backend).backward, eps=eps))
    d_w, d_sources = run(w, sources, counts, lse, stats, d_mixture, d_lse, d_sources)
    return d_w, d_sources, None


def _module(backend):
    return importlib.import_module(f"pallas_kernels.depth_mix.{backend}")


depth_mix.defvjp(_forward, _backward)
