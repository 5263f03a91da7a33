"""How a call is tiled: tokens a grid step, some at a time. Limits come from JAX's own chip table."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.depth_merge.tuned import TUNED
from pallas_kernels.tpu import LANES, chip, mxu

TILES = (512, 256, 128)
ELEMENTS = 1024 * 1024
"""Of an array in a grid step, unless 128 tokens have more: a step costs 250 to 450 cycles, however narrow."""
COLUMNS = 512
"""That a loop's body of the backward pass works on, of all tokens of a step; at most half a row."""
ARRAYS = {"forward": 6, "backward": 7}
"""[tokens, D] that are copied in or out, options included."""


class Config(NamedTuple):
    """Tokens of a grid step, columns of a loop's body, tokens of a square, whether rows are kept in fp32,
    TensorCores, and bytes of VMEM to ask for."""

    tile: int
    columns: int
    square: int
    unpacked: bool
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
    columns = min(TUNED.get((direction, D), COLUMNS), max(LANES, D // 2 // LANES * LANES))
    room = _vmem_bytes(direction, D, dtype, tile) + 3 * 4 * tile * D <= limit
    unpacked, square = room and jnp.dtype(dtype) == jnp.bfloat16, min(LANES, mxu() // 2)
    return Config(tile, columns, square, unpacked, cores if steps % cores == 0 else 1, limit)


def tpu_refusal(D: int, dtype: DTypeLike) -> str | None:
    """Why this TPU cannot run the op in both directions, or None."""
    limit, _ = chip()
    need = max(_vmem_bytes(direction, D, dtype, LANES) for direction in ARRAYS)
    return _too_wide(D, need, limit) if need > limit else None


def _vmem_bytes(direction, D, dtype, tile):
    """Buffers of the pipeline, what stands between the walks, scratch, and parameters.

    Between the walks libtpu keeps up to 6 bytes an element of bf16, 7 of fp32 (LOG, 2026-11-28)."""
    size, row = jnp.dtype(dtype).itemsize, tile * D
    scratch = 4 * tile * LANES * (1 if direction == "forward" else 8)
    return 2 * ARRAYS[direction] * row * size + (5 + size // 2) * row + scratch + 128 * D + (1 << 19)


def _too_wide(D, need, limit):
    return (
        f"depth_merge holds {LANES} tokens of width D = {D} of up to {ARRAYS['backward']} arrays in VMEM: "
        f"{need / 2**20:.0f} MiB, the limit is {limit / 2**20:.0f} MiB. Use a smaller width, or no kernel"
    )
