"""Schemes that keep m states and nothing else: recurrences over depth."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attnres_jax.axes import compute_dtype
from attnres_jax.residuals.base import Read, Scheme
from attnres_jax.schedule import BlockSchedule


class Step(NamedTuple):
    """`s_m <- sum_n carry[m, n] s_n + write[m] y`; axes of size one broadcast, G is 1 or D."""

    carry: Float[Array, "m m B T G"]
    write: Float[Array, "m B T G"]


def positive(**sizes: int) -> None:
    """Raises `ValueError` for a size below 1, by its name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


@dataclass(frozen=True)
class States(Scheme):
    """`streams` m states [m,B,T,D], all the embedding at first; a read weighs them, a write moves them.

        h = sum_m c_m s_m,  c = weigh(slot, s);      s <- A s + b y,  (A, b) = move(slot, s, y)

    Coefficients are in at least fp32, states are rounded once, to the activations' dtype.
    """

    streams: int = 1
    prenorm: ClassVar[bool] = True

    def __post_init__(self):
        positive(streams=self.streams)

    def weigh(self, slot: Any, s: Float[Array, "m B T D"]) -> Float[Array, "m #B #T #D"]:
        """c of a sublayer's read."""
        return jnp.ones((len(s), 1, 1, 1), s.dtype)

    @abstractmethod
    def move(self, slot: Any, s: Float[Array, "m B T D"], y: Float[Array, "B T D"]) -> Any:
        """The `Step` of a write."""

    def last(self, slot: Any, s: Float[Array, "m B T D"]) -> Float[Array, "m #B #T #D"]:
        """c of the output read."""
        return jnp.ones((len(s), 1, 1, 1), s.dtype)

    def advance(self, step: Any, s: Float[Array, "m B T D"], y: Float[Array, "B T D"]):
        """A s + b y."""
        moved = sum(step.carry[:, n] * s[n].astype(step.carry.dtype) for n in range(len(s)))
        return (moved + step.write * y).astype(s.dtype)

    def schedule(self, sublayers):
        return BlockSchedule(sublayers, sublayers)

    def sources(self, sublayers):
        raise TypeError(f"reads of {self} weigh states, which are no sums of outputs: use apply")

    def start(self, x):
        return jnp.broadcast_to(x, (self.streams, *x.shape))

    def begin(self, history, begins=True):
        return history

    def read(self, slot, history, stream, norm, row=None):
        h, weights = self._weighed(self.weigh, slot, stream)
        return Read(norm(h) if self.prenorm else h, h, weights, history, stream)

    def write(self, slot, stream, y):
        return self.advance(self.step(slot, stream, y), stream, y)

    def close(self, history, stream):
        return stream

    def finish(self, mix, history):
        h, weights = self._weighed(self.last, mix, history)
        return Read(h, h, weights)

    def step(self, slot, stream, y):
        return self.move(*_promoted((slot, stream, y), stream.dtype))

    def apply(self, weights, steps, v):
        def body(s, at):
            c, step, y = at
            return self.advance(step, s, y), jnp.sum(c * s, 0)

        stacked = jax.tree.map(lambda *a: jnp.stack(a), *zip(weights[:-1], steps, v[1:], strict=True))
        s, h = lax.scan(body, self.start(v[0]), stacked)
        return jnp.concatenate([h, jnp.sum(weights[-1] * s, 0)[None]])

    def _weighed(self, weigh, slot, s):
        c = weigh(*_promoted((slot, s), s.dtype))
        return jnp.sum(c * s, 0).astype(s.dtype), jnp.broadcast_to(c, (*s.shape[:-1], c.shape[-1]))


def _promoted(tree, dtype):
    return jax.tree.map(lambda a: a.astype(compute_dtype(dtype)), tree)
