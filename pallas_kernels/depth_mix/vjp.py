"""Phase 1 with its derivative: S reads at once over R sources (paper, Block AttnRes; README.md)."""

import functools
import importlib
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import sequential_vmap
from jax.typing import DTypeLike

from pallas_kernels.depth_mix import config

BACKENDS = ("tpu", "gpu", "triton")


class Forward(NamedTuple):
    """What a backend's `forward` returns, of flat tokens."""

    mixture: jax.Array
    """[S, tokens, D] in the sources' dtype."""
    lse: jax.Array
    """[S, tokens] fp32."""
    stats: Any
    """What its `backward` takes."""


def depth_mix(w, sources, counts, eps, handed_on, backend, slots=None):
    """Mixtures [S, *tokens, D] in the sources' dtype, log-sum-exp [S, *tokens] fp32, and the sources.

    Args:
      w: [S, D] fp32, query * key_scale of each read.
      sources: tuple of arrays [R_k, *tokens, D], bf16 or fp32, none stacked or copied.
      counts: for each array None, or an int32 scalar n: n rows are read, the others cost nothing; of
        all arrays at least one row is.
      eps: of the key norm.
      handed_on: return the sources too, for later reads to take: their cotangents then arrive here
        summed, and this read adds its own in place. Else the third result is ().
      backend: one of `BACKENDS`: Mosaic on TPU, Mosaic on GPU, jax-triton.
      slots: None, or for each array an int32 scalar: all arrays are [slots, R_k, *tokens, D], and the sources
        lie in this slot. "tpu" alone takes them so.

    Raises:
      ValueError: for shapes or dtypes that do not fit together, and for sizes that the backend does not take.
    """
    _check(w, sources, counts, slots, backend)
    return _depth_mix(w, sources, counts, eps, handed_on, backend, slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _depth_mix(w, sources, counts, eps, handed_on, backend, slots):
    return _forward(w, sources, counts, eps, handed_on, backend, slots)[0]


def _forward(w, sources, counts, eps, handed_on, backend, slots):
    lead = 1 if slots is None else 2
    run = sequential_vmap(functools.partial(_module(backend).forward, eps=eps))
    out = run(w, _flat(sources, lead), counts, *(() if slots is None else (slots,)))
    shape = sources[0].shape[lead:]
    done = out.mixture.reshape(-1, *shape), out.lse.reshape(-1, *shape[:-1])
    lse, stats = jax.tree.map(lambda a: checkpoint_name(a, "statistics"), (out.lse, out.stats))
    # The sources as they came: a reshaped one would be another value, and kept as such.
    return (*done, sources if handed_on else ()), (w, sources, counts, slots, lse, stats)


def _backward(eps, handed_on, backend, kept, cotangents):
    w, sources, counts, slots, lse, stats = kept
    d_mixture, d_lse, d_sources = cotangents
    lead, given = (1, ()) if slots is None else (2, (slots,))
    if not handed_on:  # rows that nobody reads need zeros from somewhere
        partly = slots is not None or any(n is not None for n in counts)
        d_sources = tuple(map(jnp.zeros_like, sources)) if partly else None
    d_sources = None if d_sources is None else _flat(d_sources, lead)
    run = sequential_vmap(functools.partial(_module(backend).backward, eps=eps))
    (d_mixture,) = _flat((d_mixture,), 1)
    args = (w, _flat(sources, lead), counts, lse, stats, d_mixture, d_lse.reshape(len(w), -1), d_sources)
    d_w, d_sources = run(*args, *given)
    return d_w, tuple(d.reshape(v.shape) for d, v in zip(d_sources, sources, strict=True)), None, None


def refusal(S: int, R: int, D: int, dtype: DTypeLike, backend: str) -> str | None:
    """Why "tpu" or "gpu" cannot run the op in both directions on the device at hand, or None."""
    return (config.tpu_refusal if backend == "tpu" else _module(backend).refusal)(S, R, D, dtype)


def _check(w, sources, counts, slots, backend):
    if w.ndim != 2 or not len(w) or w.dtype != jnp.float32:
        raise ValueError(f"w must be [S, D] of float32 with S >= 1, got {w.shape} of {w.dtype}")
    if not sources or not all(v.size for v in sources):
        shapes = [v.shape for v in sources]
        raise ValueError(f"sources must hold at least one row, token and column each, got {shapes}")
    if sources[0].dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"sources must be bfloat16 or float32, got {sources[0].dtype}")
    if len(counts) != len(sources):
        raise ValueError(
            f"counts must say None or a number for each of {len(sources)} arrays, got {len(counts)}"
        )
    rows = [v.shape[slots is not None] for v in sources]
    known = [(n, r) for n, r in zip(counts, rows, strict=True) if isinstance(n, Integral)]
    if any(not 0 <= n <= r for n, r in known) or (len(known) == len(rows) and not any(n for n, _ in known)):
        raise ValueError(f"counts must be within the rows {rows}, not all 0, got {list(counts)}")
    if slots is not None and (backend != "tpu" or len(slots) != len(sources)):
        raise ValueError(
            f"slots are for 'tpu', one for each of {len(sources)} arrays, got {slots} for {backend!r}: "
            "give it array[slot] instead"
        )
    lead, leading = (1, "R") if slots is None else (2, "slots, R")
    shape, dtype = (*sources[0].shape[lead:-1], w.shape[-1]), sources[0].dtype
    for k, v in enumerate(sources):
        if v.shape[lead:] != shape or v.dtype != dtype:
            raise ValueError(
                f"sources[{k}] must be [{leading}, {shape}] of {dtype}, got {v.shape} of {v.dtype}"
            )


def _flat(arrays, lead):
    return tuple(a.reshape(*a.shape[:lead], -1, a.shape[-1]) for a in arrays)


def _module(backend):
    return importlib.import_module(f"pallas_kernels.depth_mix.{backend}")


_depth_mix.defvjp(_forward, _backward)
