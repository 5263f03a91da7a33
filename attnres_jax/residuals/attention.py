"""Full and Block Attention Residuals, in two phases or in one (paper, sections of these names).

Sources of the i-th sublayer of block n: `[b_0 .. b_{n-1}]` and, for i >= 2, the block's running sum.
History: the completed summaries b_0 (the embedding), b_1, ... as append-only rows. Stream: the running sum.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnres_jax import depth, ops
from attnres_jax.axes import compute_dtype
from attnres_jax.residuals.base import Mix, Read, Scheme, append
from attnres_jax.schedule import BlockSchedule


class Slot(NamedTuple):
    """A sublayer's share of Phase 1; `open` returns S of them, stacked. `done` is None in one phase."""

    w: Float[Array, "... D"]
    mask: Float[Array, "..."]
    """-inf for the first sublayer of a block, whose running sum is empty, else 0."""
    done: depth.Partial | None


@dataclass(frozen=True)
class AttnRes(Scheme):
    """Block AttnRes with `block_size` S sublayers per block; S = 1 is Full AttnRes.

    `two_phase=False` reads all sources of a sublayer at once, as the definition is written; the result
    is the same. `eps` is the key norm's.
    """

    block_size: int = 1
    eps: float = 1e-6
    two_phase: bool = True
    append_only: ClassVar[bool] = True

    def literal(self):
        return replace(self, two_phase=False)

    def init(self, sublayers, width):
        def pair(*shape):
            return {"query": jnp.zeros(shape), "key_scale": jnp.ones(shape)}

        return Mix(pair(sublayers, width), pair(width))

    def schedule(self, sublayers):
        return BlockSchedule(sublayers, self.block_size)

    def sources(self, sublayers):
        return self.schedule(sublayers).sources

    def start(self, x):
        return (depth.Rows(x[None]),)

    def open(self, mix, history):
        w = _weight(mix, history)
        mask = jnp.where(jnp.arange(len(w)) == 0, -jnp.inf, jnp.zeros((), w.dtype))
        return Slot(w, mask, ops.depth_mix(w, history, **self._how) if self.two_phase else None), history

    def begin(self, history):
        return jnp.zeros_like(history[0].array[0]) if self.two_phase else None

    def read(self, slot, history, stream, norm):
        if not self.two_phase:
            running = () if stream is None else (stream,)
            mixture, weights = depth.mix(slot.w, (*_unstack(history), *running), self.eps)
        elif self.block_size == 1:
            mixture, weights = slot.done.mixture, None
        else:
            mixture, weights = ops.depth_merge(slot.w, slot.done, stream, slot.mask, **self._how), None
        return Read(norm(mixture), mixture, weights)

    def write(self, slot, stream, y):
        return y if stream is None else stream + y

    def close(self, history, stream):
        return append(history, stream)

    def finish(self, mix, history):
        w = _weight(mix, history)
        if self.two_phase:
            mixture, weights = ops.depth_mix(w[None], history, **self._how).mixture[0], None
        else:
            mixture, weights = depth.mix(w, _unstack(history), self.eps)
        return Read(mixture, mixture, weights)

    @property
    def _how(self):
        return {"eps": self.eps, "implementation": self.implementation, "placement": self.placement}


def _weight(mix, history):
    dtype = compute_dtype(history[0].array.dtype)
    return mix["query"].astype(dtype) * mix["key_scale"].astype(dtype)


def _unstack(history):
    return [v for rows in history for v in rows.array]
