"""How a call is tiled: tokens per grid step, from what VMEM holds. Limits come from JAX's own chip table."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.depth_mix.tuned import TUNED
from pallas_kernels.tpu import LANES, chip, mxu

GROUP = 16
"""Tokens of one block-diagonal product: the height of a bf16 tile."""


class Config(NamedTuple):
    """Tokens of a grid step, TensorCores, and bytes of VMEM to ask for."""

    tile: int
    group: int
    cores: int
    vmem: int


def tpu_config(direction: str, S: int, R: int, D: int, dtype: DTypeLike, tokens: int) -> Config:
    """The largest tile that fits. Raises `ValueError` where not even `GROUP` tokens of all sources do."""
    limit, cores = chip()
    tile = TUNED.get((direction, S, R, D), LANES)
    while tile > GROUP and vmem_bytes(direction, S, R, D, dtype, tile) > limit:
        tile //= 2
    if (need := vmem_bytes(direction, S, R, D, dtype, tile)) > limit:
        raise ValueError(_too_large(S, R, D, need, limit))
    return Config(tile, group(R), cores if math.ceil(tokens / tile) % cores == 0 else 1, limit)


def group(R: int) -> int:
    """Tokens of one block-diagonal product: as many as keep (source, token) within the MXU, 8 to 64."""
    return next((g for g in (64, 32, 16) if R * g <= mxu()), 8)


def tpu_refusal(S: int, R: int, D: int, dtype: DTypeLike) -> str | None:
    """Why this TPU cannot run the op in both directions, or None."""
    limit, _ = chip()
    need = max(vmem_bytes(d, S, R, D, dtype, GROUP) for d in ("forward", "backward"))
    return _too_large(S, R, D, need, limit) if need > limit else None


def vmem_bytes(direction: str, S: int, R: int, D: int, dtype: DTypeLike, tile: int) -> int:
    """Buffers of the pipeline, W, and room for what is between two products."""
    row = tile * D * jnp.dtype(dtype).itemsize
    rows = 2 * R + 2 * S if direction == "forward" else 5 * R + 2 * S
    between = 4 * GROUP * min(D, 1024) * (2 * S + R) + 4 * GROUP * R * D
    return rows * row + 12 * 8 * math.ceil(S / 8) * D + between + (2 << 20)


def _too_large(S, R, D, need, limit):
    return (
        f"depth_mix holds {GROUP} tokens of R = {R} sources and S = {S} mixtures, D = {D} wide, in VMEM: "
        f"{need / 2**20:.0f} MiB, the limit is {limit / 2**20:.0f} MiB. Use fewer sources, or no kernel"
    )
