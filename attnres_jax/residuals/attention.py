"""Full and Block Attention Residuals, in two phases or in one (paper, sections of these names).

Sources of the i-th sublayer of block n: `[b_0 .. b_{n-1}]` and, for i >= 2, the block's running sum.
History: the completed summaries b_0 (the embedding), b_1, ... as append-only rows. Stream: the running sum.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnres_jax import depth, ops
from attnres_jax.autodiff import Once, take
from attnres_jax.axes import compute_dtype
from attnres_jax.norm import RMSNorm
from attnres_jax.residuals.base import Appending, Mix, Read, asking
from attnres_jax.rules import Rule, no_kernel


class Slot(NamedTuple):
    """A sublayer's share: query, row of Phase 1, whether the running sum is empty, logits. `open` returns the
    S of a block, stacked. Where the first is run by itself, its stream is None, and `first` for all."""

    w: Float[Array, "... K"]
    j: Int[Array, "..."]
    first: Bool[Array, "..."] | None
    logits: Float[Array, "... R"] | None


class Opened(NamedTuple):
    """History inside a block: the summaries, and Phase 1 of all its S reads (None in one phase)."""

    rows: tuple[depth.Rows, ...]
    done: Once | None


@dataclass(frozen=True)
class AttnRes(Appending):
    """Block AttnRes with `block_size` S sublayers per block; S = 1 is Full AttnRes.

    `two_phase=False` reads all sources at once, as the definition is written. Others are of `rules.Rule`.
    """

    in_place: ClassVar = True
    block_size: int = 1
    eps: float = 1e-6
    two_phase: bool = True
    activation: str = "softmax"
    key_norm: bool = True
    heads: int = 1
    key_width: int | None = None

    @property
    def rule(self) -> Rule:
        """How reads weigh their sources."""
        return Rule(self.eps, self.activation, self.key_norm, self.heads, self.key_width)

    @property
    def no_kernel(self) -> str | None:
        return no_kernel(self.rule, None)

    def literal(self):
        return replace(self, two_phase=False)

    def init(self, sublayers, width):
        self.rule.check(width)
        keys = self.key_width or width
        return Mix(asking(sublayers, keys), asking(keys))

    def open(self, mix, history, begins=True) -> tuple[Any, Any]:
        w = self._weight(mix, history)
        j = jnp.arange(len(w))
        slot = Slot(w, j, None if begins is True else (j == 0) & begins, mix.get("logits"))
        if not self.two_phase:
            return slot, Opened(history, None)
        done, rows = ops.depth_mix(w, history, logits=_of_rows(slot.logits, history), **self._how)
        return slot, Opened(rows, Once(done))

    def begin(self, history, begins=True) -> Any:
        return None if begins is True or not self.two_phase else jnp.zeros_like(history.done.rows.mixture[0])

    def read(self, slot, history, stream, norm, row=None):
        if not self.two_phase:
            mixture, weights = _at_once(self.rule, slot.w, history.rows, stream, slot.logits)
            return Read(norm(mixture), mixture, weights, history, stream)
        if stream is None or self.block_size == 1:
            (mixture, _), done = take(history.done.rows, slot.j)
            return Read(norm(mixture), mixture, None, history._replace(done=Once(done)), stream)
        fused = norm if isinstance(norm, RMSNorm) else None
        logit = None if slot.logits is None else slot.logits[-1]
        args = (slot.w, history.done.rows, stream, slot.j, slot.first)
        h, done, stream = ops.depth_merge(*args, norm=fused, row=row, logit=logit, **self._how)
        x, mixture = (h, None) if fused else (norm(h), h)
        return Read(x, mixture, None, history._replace(done=Once(done)), stream)

    def write(self, slot, stream, y):
        return y if stream is None else stream + y

    def finish(self, mix, history):
        mix = {k: v[None] for k, v in mix.items()}
        w, logits = self._weight(mix, history), mix.get("logits")
        if not self.two_phase:
            logits = None if logits is None else logits[0]
            mixture, weights = _at_once(self.rule, w[0], history, None, logits)
            return Read(mixture, mixture, weights)
        done, rows = ops.depth_mix(w, history, last=True, logits=_of_rows(logits, history), **self._how)
        return Read(done.mixture[0], done.mixture[0], None, rows)

    def _weight(self, mix, history):
        dtype = compute_dtype(history[0].array.dtype)
        return mix["query"].astype(dtype) * mix["key_scale"].astype(dtype)

    @property
    def _how(self):
        return {"rule": self.rule, "implementation": self.implementation, "placement": self.placement}


def _of_rows(logits, history):
    """Of completed summaries, seen or to come: the first columns. The last is the running sum's."""
    return None if logits is None else logits[:, : sum(len(rows.array) for rows in history)]


def _at_once(rule, w, history, stream, logits):
    """One phase, all sources of a read at once; the running sum's logit is the last."""
    if any(rows.n is not None for rows in history):
        raise ValueError('two_phase=False is literal: call through_depth(implementation="reference")')
    rows = [v for some in history for v in some.array]
    sources = rows if stream is None else [*rows, stream]
    if logits is not None:
        logits = logits[jnp.array([*range(len(rows)), -1][: len(sources)])]
    return depth.mix(w, sources, rule, logits)
