"""Phase 2 with its derivative: one read of a block, merged with Phase 1 and normed (README.md)."""

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.typing import DTypeLike

from pallas_kernels.depth_merge import config
from pallas_kernels.tpu import LANES

BACKENDS = ("tpu", "gpu", "triton")


class Forward(NamedTuple):
    """What a backend's `forward` returns, of flat tokens."""

    x: jax.Array
    """[tokens, D], input of the sublayer."""
    mixture: jax.Array | None
    """[tokens, D], before the norm, if it is to be kept."""
    stream: jax.Array | None
    """[tokens, D], the new running sum, if `y` was added."""
    stats: Any
    """What its `backward` takes."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(10, 11, 12, 13))
def depth_merge(w, scale, mixtures, lse, stream, kept, y, at, j, first, eps, norm_eps, keep_mixture, backend):
    """The sublayer's input x, the mixture or None, and stream, mixtures and lse for later reads to take.

    Args:
      w: [D] fp32, query * key_scale of this read.
      scale: [D] fp32 of the sublayer's RMSNorm, or None: x is the mixture.
      mixtures, lse: [S, *tokens, D] and fp32 [S, *tokens], all of Phase 1; row `j` (int32, may be traced) is
        this read's.
      stream: [*tokens, D], the running sum of the block's outputs.
      kept: None, or an array [K, *tokens, D] whose row `at` is the sum too. It is read there, and `stream`
        takes the cotangent only: a sum that a loop over depth has kept need not be copied out.
      y: [*tokens, D] or None: an output to add to the sum before it is read; then `kept` must be None.
      first: bool, may be traced: the block has no sum yet, and none counts (what is there must be finite);
        y must be None. None: it has.
      eps, norm_eps: of the key norm and of the sublayer's norm.
      keep_mixture: also return the mixture, before the norm.
      backend: one of `BACKENDS`: Mosaic on TPU, Mosaic on GPU, jax-triton.

    Raises:
      ValueError: for shapes or dtypes that do not fit together, and for sizes that the backend does not take.
    """
    args = (w, scale, mixtures, lse, stream, kept, y, at, j, first)
    return _forward(*args, eps, norm_eps, keep_mixture, backend)[0]


def _forward(w, scale, mixtures, lse, stream, kept, y, at, j, first, eps, norm_eps, keep_mixture, backend):
    _check(w, scale, mixtures, lse, stream, kept, y, first)
    first = False if first is None and backend != "tpu" else first  # TPU alone has a kernel that is not told
    options = {"eps": eps, "norm_eps": norm_eps, "keep_mixture": keep_mixture}
    run = sequential_vmap(functools.partial(_module(backend).forward, **options))
    place = _place(backend, stream, kept, at)
    done = _rows(mixtures), lse.reshape(len(lse), -1)
    out = run(w, scale, *done, *place, j, first, None if y is None else _flat(y))
    x, mixture = (None if a is None else a.reshape(stream.shape) for a in (out.x, out.mixture))
    if y is not None:
        stream, kept = out.stream.reshape(stream.shape), None
    # As they came: a reshaped one would be another value, and kept as such.
    saved = (w, scale, mixtures, lse, stream if kept is None else None, kept, at, j, first, out.stats)
    return (x, mixture if keep_mixture else None, stream, mixtures, lse), (saved, y is None)


def _backward(eps, norm_eps, keep_mixture, backend, saved, cotangents):
    (w, scale, mixtures, lse, stream, kept, at, j, first, stats), alone = saved
    d_x, d_mixture, d_stream, d_mixtures, d_lse = cotangents
    run = sequential_vmap(functools.partial(_module(backend).backward, eps=eps, norm_eps=norm_eps))
    place = _place(backend, stream, kept, at)
    d_mixture = None if d_mixture is None else _flat(d_mixture)
    d_w, d_scale, d_p, d_o, d_l = run(
        *(w, scale, _rows(mixtures), lse.reshape(len(lse), -1), *place, j, first, stats),
        *(_flat(d_x), d_mixture, _flat(d_stream), _rows(d_mixtures), d_lse.reshape(len(lse), -1)),
    )
    d_p = d_p.reshape(d_stream.shape)
    done = d_o.reshape(mixtures.shape), d_l.reshape(lse.shape)
    return d_w, d_scale, *done, d_p, None, None if alone else d_p, None, None, None


def refusal(D: int, dtype: DTypeLike, backend: str) -> str | None:
    """Why "tpu" or "gpu" cannot run the op in both directions on the device at hand, or None."""
    return (config.tpu_refusal if backend == "tpu" else _module(backend).refusal)(D, dtype)


def _check(w, scale, mixtures, lse, stream, kept, y, first):
    wide, D, S = stream.dtype, stream.shape[-1], len(mixtures)
    if wide not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"stream must be bfloat16 or float32, got {wide}")
    if not mixtures.size:
        raise ValueError(f"mixtures must hold at least one row, token and column, got {mixtures.shape}")
    wanted = {
        "w": (w, (D,), jnp.float32),
        "scale": (scale, (D,), jnp.float32),
        "mixtures": (mixtures, (S, *stream.shape), wide),
        "lse": (lse, (S, *stream.shape[:-1]), jnp.float32),
        "kept": (kept, None if kept is None else (len(kept), *stream.shape), wide),
        "y": (y, stream.shape, wide),
    }
    for name, (array, shape, dtype) in wanted.items():
        if array is not None and (array.shape != shape or array.dtype != dtype):
            raise ValueError(
                f"{name} must be {shape} of {jnp.dtype(dtype)} beside a stream {stream.shape} of {wide}, "
                f"got {array.shape} of {array.dtype}"
            )
    if y is not None and not (kept is first is None):
        raise ValueError(
            "y is added to the sum before it is read, so there is one, and none is kept: kept and first must "
            "be None"
        )


def _place(backend, stream, kept, at):
    """Where a backend finds the sum: row `at` of an array."""
    if kept is None:
        return _flat(stream)[None], jnp.int32(0)
    rows = _rows(kept)
    if backend == "tpu" and rows.shape[1] % LANES:  # the kernel pads, which would copy all that is kept
        return jax.lax.dynamic_slice_in_dim(rows, at, 1), jnp.int32(0)
    return rows, at


def _rows(a):
    return a.reshape(len(a), -1, a.shape[-1])


def _flat(a):
    return a.reshape(-1, a.shape[-1])


def _module(backend):
    return importlib.import_module(f"pallas_kernels.depth_merge.{backend}")


depth_merge.defvjp(_forward, _backward)
