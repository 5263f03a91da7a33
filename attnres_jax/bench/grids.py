"""Bytes that a Pallas kernel moves between HBM and VMEM, from its grid and BlockSpecs.

A block is copied when its index differs from that of the step before. Operands left in HBM (`pl.ANY`) are
copied by the kernel itself: how much of them is for the caller to say.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun


class Moved(NamedTuple):
    """Bytes of one call, and in how many grid steps."""

    read: float
    written: float
    steps: int


def calls(jaxpr: Any) -> Iterator[Any]:
    """The `pallas_call` equations of a jaxpr, those in inner ones included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(value):
                    yield from calls(getattr(value, "jaxpr", value))


def _is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def moved(call: Any, scalars: Sequence[Any], by_hand: Callable[[int], float] = lambda _: 0.0) -> Moved:
    """Of one call, the prefetched `scalars` having these values.

    Args:
      by_hand: what share the kernel copies of operand i, if that is left in HBM; results are counted on.
    """
    grid = call.params["grid_mapping"]
    refs = [jax.new_ref(jnp.asarray(s)) for s in scalars]
    read = written = 0.0
    for i, block in enumerate(grid.block_mappings):
        size = np.dtype(block.array_aval.dtype).itemsize
        if "any" in str(block.transformed_block_aval).partition("{")[0]:
            total = by_hand(i) * math.prod(block.array_aval.shape) * size
        else:
            total = _copies(grid.grid, block, refs) * math.prod(block.transformed_block_aval.shape) * size
        read, written = (read + total, written) if i < grid.num_inputs else (read, written + total)
    return Moved(read, written, math.prod(grid.grid))


def _copies(grid, block, refs):
    """How often the block of an operand changes while the steps pass in order, the first included."""
    steps = jnp.asarray(list(np.ndindex(*grid)), jnp.int32)
    index = jaxpr_as_fun(block.index_map_jaxpr)
    at = np.stack(jax.vmap(lambda step: index(*step, *refs))(steps))
    return 1 + int(np.any(at[:, 1:] != at[:, :-1], axis=0).sum())
