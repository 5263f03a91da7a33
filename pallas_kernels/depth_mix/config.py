"""How a call is tiled: tokens per grid step, from what VMEM holds. Limits come from JAX's own chip table."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.depth_mix.tuned import TUNED
from pallas_kernels.tpu import LANES, chip, mxu

STEP = 2 << 20
"""Bytes that one grid step moves at least, if there are tokens enough."""


class Config(NamedTuple):
    """Tokens of a grid step, TensorCores, and bytes of VMEM to ask for."""

    tile: int
    group: int
    beside: bool
    cores: int
    vmem: int


def tpu_config(direction: str, S: int, R: int, D: int, dtype: DTypeLike, tokens: int) -> Config:
    """The largest tile that fits, in the forward pass a larger one where sources are few: a step has its costs.

    Raises `ValueError` where not even one group of tokens of all sources fits."""
    limit, cores = chip()
    least, tile = group(S, R), TUNED.get((direction, S, R, D), 4 * LANES if direction == "forward" else LANES)
    row = (R + S) * D * jnp.dtype(dtype).itemsize
    while tile > LANES and (tokens % tile or tile * row > STEP):
        tile //= 2
    while tile > least and vmem_bytes(direction, S, R, D, dtype, tile) > limit:
        tile //= 2
    if (need := vmem_bytes(direction, S, R, D, dtype, tile)) > limit:
        raise ValueError(_too_large(S, R, D, need, limit))
    return Config(tile, least, beside(S, R), cores if math.ceil(tokens / tile) % cores == 0 else 1, limit)


def group(S: int, R: int) -> int:
    """Tokens of one block-diagonal product, 8 to 64: as many as keep (source, token) within the MXU.

    (query, token), over which the backward pass contracts, stays within 512."""
    width = mxu() // 2 if beside(S, R) else mxu()
    return next((g for g in (64, 32, 16) if R * g <= width and S * g <= 4 * LANES), 8)


def beside(S: int, R: int) -> bool:
    """Whether the two halves of a weight lie side by side, which costs R more rows and saves S."""
    return S > R and R * 16 <= mxu() // 2


def tpu_refusal(S: int, R: int, D: int, dtype: DTypeLike) -> str | None:
    """Why this TPU cannot run the op in both directions, or None."""
    limit, _ = chip()
    need = max(vmem_bytes(d, S, R, D, dtype, group(S, R)) for d in ("forward", "backward"))
    return _too_large(S, R, D, need, limit) if need > limit else None


def vmem_bytes(direction: str, S: int, R: int, D: int, dtype: DTypeLike, tile: int) -> int:
    """Buffers of the pipeline, W, and room for what is between two products."""
    row = tile * D * jnp.dtype(dtype).itemsize
    rows = 2 * R + 2 * S if direction == "forward" else 5 * R + 2 * S
    between = 4 * group(S, R) * min(D, 1024) * (2 * S + R) + 4 * group(S, R) * R * D
    return rows * row + 12 * 8 * math.ceil(S / 8) * D + between + (2 << 20)


def _too_large(S, R, D, need, limit):
    return (
        f"depth_mix holds {group(S, R)} tokens of R = {R} sources and S = {S} mixtures, D = {D} wide, in VMEM: "
        f"{need / 2**20:.0f} MiB, the limit is {limit / 2**20:.0f} MiB. Use fewer sources, or no kernel"
    )
