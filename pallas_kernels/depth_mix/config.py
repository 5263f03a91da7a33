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
    """Tokens of a grid step and of a group, how halves of weights lie, groups of one backward loop body,
    TensorCores, and bytes of VMEM."""

    tile: int
    group: int
    beside: bool
    several: int
    cores: int
    vmem: int


def tpu_config(direction: str, S: int, R: int, D: int, dtype: DTypeLike, tokens: int) -> Config:
    """The largest tile that fits; forward, more than 128 tokens where sources are few: a step has its costs.

    Raises `ValueError` where not even one group of tokens of all sources fits."""
    limit, cores = chip()
    if problem := tpu_refusal(S, R, D, dtype):
        raise ValueError(problem)
    group, most = group_of(S, R, D, dtype), 4 * LANES if direction == "forward" else LANES
    tile, row = TUNED.get((direction, S, R, D), most), (R + S) * D * jnp.dtype(dtype).itemsize
    while tile > LANES and (tokens % tile or tile * row > STEP):
        tile //= 2
    while tile > group and vmem_bytes(direction, S, R, D, dtype, tile, group) > limit:
        tile //= 2
    cores = cores if math.ceil(tokens / tile) % cores == 0 else 1
    return Config(tile, group, beside(S, R), _several(S, R, D, dtype, tile, group), cores, limit)


def group_of(S: int, R: int, D: int, dtype: DTypeLike) -> int:
    """Tokens of one block-diagonal product, 8 to 64: as many as keep (source, token) within the MXU.

    (query, token), most of what the backward pass contracts, stays within two of its widths; where 16 tokens
    do not, within 512. Both directions take it."""
    width = mxu() // 2 if beside(S, R) else mxu()
    for group, most in ((64, 2 * mxu()), (32, 2 * mxu()), (16, 4 * LANES)):
        fits = vmem_bytes("backward", S, R, D, dtype, group, group) <= chip()[0]
        if R * group <= width and S * group <= most and fits:
            return group
    return 8


def _several(S, R, D, dtype, tile, group):
    """Groups of one backward loop body, a power of two: of 128 tokens, fewer where a row is wide; at least
    two, if there is VMEM, so that one's products hide what the softmax of the other waits for."""
    wanted = max(2, LANES * min(1024, D) // D // group)
    several = math.gcd(tile // group, 2 ** (wanted.bit_length() - 1))
    while several > 1 and vmem_bytes("backward", S, R, D, dtype, tile, group, several) > chip()[0]:
        several //= 2
    return several


def beside(S: int, R: int) -> bool:
    """Whether the two halves of a weight lie side by side, which costs R more rows and saves S."""
    return S > R and mxu() >= 2 * 16 * R


def tpu_refusal(S: int, R: int, D: int, dtype: DTypeLike) -> str | None:
    """Why this TPU cannot run the op in both directions, or None."""
    limit, group = chip()[0], group_of(S, R, D, dtype)
    need = max(vmem_bytes(d, S, R, D, dtype, group, group) for d in ("forward", "backward"))
    if need <= limit:
        return None
    return (
        f"depth_mix holds {group} tokens of R = {R} sources and S = {S} mixtures, D = {D} wide, in VMEM: "
        f"{need / 2**20:.0f} MiB, the limit is {limit / 2**20:.0f} MiB. Use fewer sources, or no kernel"
    )


def vmem_bytes(
    direction: str, S: int, R: int, D: int, dtype: DTypeLike, tile: int, group: int, several: int = 1
) -> int:
    """Buffers of the pipeline, W, and room for what is between two products, of `several` groups."""
    size, S8 = jnp.dtype(dtype).itemsize, 8 * math.ceil(S / 8)
    rows = 2 * R + 2 * S if direction == "forward" else 5 * R + 2 * S
    between = 4 * group * min(D, 1024) * (2 * S + R) + 4 * group * R * D
    # Of each group more: sources in fp32, or their cotangents, and dO in bf16.
    between += (several - 1) * group * D * (4 * R + 2 * S)
    if direction == "backward":
        # The left side of the product for the sources; of dO in fp32 a copy, and its parts in two products.
        between += several * group * 4 * R * LANES * math.ceil((S * group + 2 * S8) / LANES)
        between += several * group * 16 * S * D * (size == 4)
    # Statistics go through the pipeline, weights lie beside them: [groups, S and a row, lanes] in fp32.
    between += 3 * 4 * (tile // group) * 8 * math.ceil((S + 1) / 8) * LANES * math.ceil(R * group / LANES)
    return rows * tile * D * size + 12 * S8 * D + between + (2 << 20)
