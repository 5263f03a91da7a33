"""Causal attention over T: the dispatcher between XLA, a TPU kernel (splash) and cuDNN's.

XLA writes the scores of every pair of tokens, [B,H,T,T], to memory; the other two keep them on the chip.
`choose` says which runs and why. A named implementation runs, or raises with the reason.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnres_jax.axes import compute_dtype
from attnres_jax.choice import Choice
from attnres_jax.placement import Placement, platform

Attend = Callable[[Array, Array, Array, Array | None], Array]
"""`attend(q, k, v, segments)`: q [B,T,H,K], k and v [B,T,G,K] -> [B,T,H,K]."""

IMPLEMENTATIONS = ("auto", "xla", "flash")
LANES = 128
"""Splash tiles time in multiples of these, and takes a head width of half of them or a multiple."""
TILE = 512
"""Tokens of a tile of queries and of keys, at most: 1 MiB of scores in fp32, which any chip's VMEM holds."""


def choose(
    name: str, on: str, length: int, head_width: int, dtype: DTypeLike, segmented: bool = False
) -> Choice:
    """Which attention runs on platform `on` ("tpu", "gpu", "cpu", ...) for T = `length`.

    Raises:
      ValueError: where "flash" is named and cannot run, with the reason; for a name that does not exist.
    """
    if name not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"attention must be one of {names}, got {name!r}")
    if name == "xla":
        return Choice("xla", "named by the caller")
    flash, obstacle = _flash(on, length, head_width, jnp.dtype(dtype), segmented)
    if not obstacle:
        return Choice(flash, f"keeps the scores on the chip ({on})")
    if name == "flash":
        raise ValueError(f"attention = 'flash' cannot run here: {obstacle}; 'xla' runs everywhere")
    return Choice("xla", obstacle)


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    segments: Int[Array, "B T"] | None = None,
    *,
    implementation: str = "auto",
    placement: Placement | None = None,
) -> Float[Array, "B T H K"]:
    """Causal attention, G keys for H heads; a token sees its own segment only."""
    sizes = (q.shape[1], q.shape[3], q.dtype, segments is not None)
    match choose(implementation, platform(placement), *sizes).implementation:
        case "splash":
            return splash(q, k, v, segments, placement=placement)
        case "cudnn":
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return xla(q, k, v, segments)


def with_first_values(attend: Attend, first: Float[Array, "B T G K"], share: float) -> Attend:
    """Value residual learning (arXiv 2410.17897): `v_n <- share v_1 + (1 - share) v_n`, v_1 = `first`.

    `share` = 1/2 is the paper's Identity-ResFormer. No residual scheme: the stream over depth is as it was.
    """

    def mixed(q, k, v, segments):
        wide = compute_dtype(v.dtype)
        v_mixed = share * first.astype(wide) + (1 - share) * v.astype(wide)
        return attend(q, k, v_mixed.astype(v.dtype), segments)

    return mixed


def xla(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H K"]:
    """With scores in memory. JAX's own rounds the weights to fp32; fp64 has to stay fp64."""
    mask = None if segments is None else (segments[:, :, None] == segments[:, None])[:, None]
    if q.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="xla")
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    seen = jnp.tri(q.shape[1], dtype=bool) & (True if mask is None else mask)
    score = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(seen, score, -jnp.inf)), v)


def splash(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    segments: Int[Array, "B T"] | None = None,
    *,
    placement: Placement | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """JAX's splash kernel, each device on its own sequences and heads: Mosaic kernels are not partitioned."""
    run = partial(_splash, interpret=interpret)
    if placement is None:
        return run(q, k, v, segments)
    batch, heads = placement.spec[0], placement.spec[1]  # T lies there between sublayers, H inside
    spec = P(batch, None, heads)
    specs = (spec, spec, spec, P(batch))
    return placement.local(lambda _, *args: run(*args), (), (q, k, v, segments), specs, spec, typed=False)


def _flash(on, length, head_width, dtype, segmented):
    """The kernel of a platform, and what keeps it from running ("" if nothing does)."""
    if on == "tpu":
        return "splash", _splash_obstacle(length, head_width, dtype)
    if on in ("gpu", "cuda"):
        return "cudnn", _cudnn_obstacle(head_width, dtype, segmented)
    return "", f"no such kernel for the platform {on!r}"


def _splash_obstacle(length, head_width, dtype):
    if length % LANES:
        return f"the TPU kernel takes a multiple of {LANES} tokens, got T = {length}"
    if head_width % LANES and head_width != LANES // 2:
        return f"the TPU kernel takes heads of width {LANES // 2} or a multiple of {LANES}, got {head_width}"
    return "" if dtype.itemsize <= 4 else f"the TPU kernel has no {dtype}"


def _cudnn_obstacle(head_width, dtype, segmented):
    if segmented:
        return "cuDNN takes segments as a mask of [T,T] only"
    if dtype.itemsize != 2:
        return f"cuDNN's kernel takes 16-bit activations, got {dtype}"
    fits = head_width % 8 == 0 and head_width <= 128
    return "" if fits else f"cuDNN takes heads of a width up to 128 that 8 divides, got {head_width}"


def _splash(q, k, v, segments, *, interpret):
    # Imported here: 0.2 s, and of use on a TPU only.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    heads, length = q.shape[2], q.shape[1]
    mask = kernels.MultiHeadMask([kernels.CausalMask((length, length))] * heads)
    tile = math.gcd(length, TILE)
    # Of q, kv and kv at a time: forward, of keys' cotangents, of queries'.
    sizes = kernels.BlockSizes(tile, tile, tile, tile, tile, tile, tile, tile)
    kernel = kernels.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def one(q, k, v, segments):
        own = None if segments is None else kernels.SegmentIds(segments, segments)
        out: Any = kernel(q, k, v, own)
        return out

    q, k, v = (a.swapaxes(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    return jax.vmap(one)(q, k, v, segments).swapaxes(1, 2)
