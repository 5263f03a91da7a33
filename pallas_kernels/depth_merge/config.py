"""How a call is tiled: tokens a grid step, some at a time. Limits come from JAX's own chip table."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.depth_merge.tuned import TUNED
from pallas_kernels.tpu import LANES, chip

TILES = (512, 256, 128)
ELEMENTS = 512 * 1024
"""Of an array in a grid step, unless 128 tokens have more: a step costs about 400 cycles, however narrow."""
CHUNK = {"forward": 128, "backward": 32}
"""Tokens worked on at once: fewer spill less and take longer (libtpu 0.0.50.1, v5p and v6e)."""
ARRAYS = {"forward": 6, "backward": 7}
"""[tokens, D] that are copied in or out, options included."""


class Config(NamedTuple):
    """Tokens of a grid step, tokens worked on at once, TensorCores, and bytes of VMEM to ask for."""

    tile: int
    chunk: int
    cores: int
    vmem: int


def tpu_config(direction: str, D: int, dtype: DTypeLike, tokens: int) -> Config:
    """For a number of tokens that 128 divides; `ValueError` if D is too wide."""
    limit, cores = chip()
    if (need := _vmem_bytes(direction, D, dtype, LANES)) > limit:
        raise ValueError(_too_wide(D, need, limit))
    fits = (t for t in TILES if t * D <= ELEMENTS and _vmem_bytes(direction, D, dtype, t) <= limit)
    tile = next((t for t in fits if tokens % (t * cores) == 0), LANES)
    steps = tokens // tile
    return Config(
        tile, TUNED.get((direction, D), CHUNK[direction]), cores if steps % cores == 0 else 1, limit
    )


def tpu_refusal(D: int, dtype: DTypeLike) -> str | None:
    """Why this TPU cannot run the op in both directions, or None."""
    limit, _ = chip()
    need = max(_vmem_bytes(direction, D, dtype, LANES) for direction in ARRAYS)
    return _too_wide(D, need, limit) if need > limit else None


def _vmem_bytes(direction, D, dtype, tile):
    sums = 5 * 4 * tile * LANES
    return 2 * ARRAYS[direction] * tile * D * jnp.dtype(dtype).itemsize + sums + 128 * D + (1 << 20)


def _too_wide(D, need, limit):
    return (
        f"depth_merge holds {LANES} tokens of width D = {D} of up to {ARRAYS['backward']} arrays in VMEM: "
        f"{need / 2**20:.0f} MiB, the limit is {limit / 2**20:.0f} MiB. Use a smaller width, or no kernel"
    )
