"""Attention Residuals with more, or less, to learn: switches that are not a rule of weighing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnres_jax import depth
from attnres_jax.axes import compute_dtype
from attnres_jax.residuals.attention import AttnRes
from attnres_jax.residuals.base import Mix, Read


@dataclass(frozen=True)
class Biased(AttnRes):
    """Each read has a learned number for each source, added to its score: `logits` [L, R], `logits_out` [R].

    Completed summaries have the first columns, the running sum the last. They start at -`recency` times how
    many sources are younger. `queries=False` leaves the queries out: input-independent mixing (Table 4).
    """

    queries: bool = True
    recency: float = 0.0
    axes: ClassVar = {"logits": "LR"}

    @property
    def no_kernel(self):
        return "its scores have static logits, which kernels do not take"

    def init(self, sublayers, width):
        made = super().init(sublayers, width)
        logits = jnp.asarray(-self.recency * _ages(self.schedule(sublayers).counts), jnp.float32)
        own = {"logits": logits[:-1]}, {"logits": logits[-1]}
        return Mix(*(pair | one if self.queries else one for pair, one in zip(made, own, strict=True)))

    def _weight(self, mix, history):
        if self.queries:
            return super()._weight(mix, history)
        array = history[0].array
        return jnp.zeros((len(mix["logits"]), self.key_width or array.shape[-1]), compute_dtype(array.dtype))


def _ages(counts):
    """[L + 1 reads, R]: how many sources are younger; the last column of the first L is the running sum's."""
    ages = np.array(counts)[:, None] - 1 - np.arange(max(counts))
    ages[:-1, -1] = 0
    return np.maximum(ages, 0)


class Summed(NamedTuple):
    """History inside a block, with the sum of its summaries."""

    inner: Any
    total: Float[Array, "B T D"]

    @property
    def rows(self) -> tuple[depth.Rows, ...]:
        """The summaries."""
        return self.inner.rows


@dataclass(frozen=True)
class Additive(AttnRes):
    """The mixture is added to the plain residual stream, which it else replaces: `h = u_l + sum_i a_i v_i`.

    The plain stream `u_l` is the sum of all outputs so far, which the sources of any read sum to: source i
    has the weight `1 + a_i`. Our definition; the paper has none. `followups.Delta` is what came after.
    """

    in_place: ClassVar = False

    def open(self, mix, history, begins=True) -> tuple[Any, Any]:
        slots, inner = super().open(mix, history, begins)
        return slots, Summed(inner, total(history))

    def begin(self, history, begins=True) -> Any:
        return super().begin(history.inner, begins)

    def read(self, slot, history, stream, norm, row=None):
        read = super().read(slot, history.inner, stream, lambda h: h, row)
        plain = history.total if read.stream is None else plus(history.total, read.stream)
        mixture = plus(read.mixture, plain)
        weights = None if read.weights is None else 1 + read.weights
        return Read(norm(mixture), mixture, weights, history._replace(inner=read.history), read.stream)

    def finish(self, mix, history):
        read = super().finish(mix, history)
        mixture = plus(read.mixture, total(history))
        return Read(mixture, mixture, None if read.weights is None else 1 + read.weights)


def total(history: Sequence[depth.Rows]) -> Float[Array, "B T D"]:
    """The sum of all visible rows, rounded once: what the plain residual stream is."""
    found = 0.0
    for array, n, _ in history:
        wide = array.astype(compute_dtype(array.dtype))
        seen = True if n is None else (jnp.arange(len(array)) < n).reshape(-1, *[1] * (array.ndim - 1))
        found = found + jnp.sum(jnp.where(seen, wide, 0), 0)
    return jnp.asarray(found, history[0].array.dtype)


def plus(a: Any, b: Any) -> Float[Array, "B T D"]:
    """Of two [B,T,D] the sum, rounded once."""
    dtype = compute_dtype(a.dtype)
    return (a.astype(dtype) + b.astype(dtype)).astype(a.dtype)
