"""How a call is tiled: 128 tokens a grid step, some at a time. Limits come from JAX's own chip table."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.depth_merge.tuned import TUNED
from pallas_kernels.tpu import chip

TILE = 128
CHUNK = {"forward": 16, "backward": 8}
"""Tokens worked on at once: with more, registers spill (libtpu 0.0.50.1, v5p and v6e, D = 2304)."""
ARRAYS = {"forward": 6, "backward": 7}
"""[tokens, D] that are copied in or out, options included."""


def tpu_config(direction: str, D: int, dtype: DTypeLike, steps: int) -> tuple[int, int, int]:
    """Tokens worked on at once, TensorCores, bytes of VMEM to ask for; `ValueError` if D is too wide."""
    limit, cores = chip()
    if (need := _vmem_bytes(direction, D, dtype)) > limit:
        raise ValueError(_too_wide(D, need, limit))
    return TUNED.get((direction, D), CHUNK[direction]), cores if steps % cores == 0 else 1, limit


def tpu_refusal(D: int, dtype: DTypeLike) -> str | None:
    """Why this TPU cannot run the op in both directions, or None."""
    limit, _ = chip()
    need = max(_vmem_bytes(direction, D, dtype) for direction in ARRAYS)
    return _too_wide(D, need, limit) if need > limit else None


def _vmem_bytes(direction, D, dtype):
    return 2 * ARRAYS[direction] * TILE * D * jnp.dtype(dtype).itemsize + 128 * D + (1 << 20)


def _too_wide(D, need, limit):
    return (
        f"depth_merge holds {TILE} tokens of width D = {D} of up to {ARRAYS['backward']} arrays in VMEM: "
        f"{need / 2**20:.0f} MiB, the limit is {limit / 2**20:.0f} MiB. Use a smaller width, or no kernel"
    )
