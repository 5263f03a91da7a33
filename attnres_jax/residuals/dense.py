"""Schemes whose reads see every earlier output: DenseNet, DenseFormer, Full AttnRes in a window or by queries
of the input.

History: the sources, as append-only rows, one a sublayer. Stream: h of the sublayer, which its block (of one
sublayer) opens with. So equal sublayers run in one scan, and parameters of read l cover L + 1 sources: those
of sources it does not see are idle.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnres_jax.axes import compute_dtype
from attnres_jax.depth import Rows
from attnres_jax.norm import RMSNorm
from attnres_jax.residuals.base import Appending, Mix, Read, asking
from attnres_jax.residuals.states import positive
from attnres_jax.rules import Rule, scores


class Opened(NamedTuple):
    """History inside a block: the rows, and h."""

    rows: tuple[Rows, ...]
    h: Float[Array, "B T D"]


@dataclass(frozen=True)
class Dense(Appending):
    """`h_l = sum_r weights_r source_r`; sources are the embedding and the outputs."""

    @abstractmethod
    def weigh(self, slot: Any, rows: Float[Array, "R B T D"], seen: Bool[Array, " R"]) -> Array:
        """Weights [R, B, T], each of the last two possibly 1; zero where not `seen`."""

    def combine(self, weights: Array, rows: Float[Array, "R B T D"]) -> Float[Array, "B T D"]:
        """The mixture."""
        return jnp.sum(weights[..., None] * rows, 0)

    def open(self, mix, history, begins=True):
        return mix, Opened(history, self._mixture(jax.tree.map(lambda a: a[0], mix), history)[0])

    def begin(self, history, begins=True):
        return history.h

    def read(self, slot, history, stream, norm, row=None):
        return Read(norm(stream), stream, self._weights(slot, history.rows)[0], history, stream)

    def write(self, slot, stream, y):
        return y

    def finish(self, mix, history):
        h, weights = self._mixture(mix, history)
        return Read(h, h, weights)

    def _mixture(self, slot, history):
        weights, rows = self._weights(slot, history)
        return self.combine(weights, rows).astype(history[0].array.dtype), weights

    def _weights(self, slot, history):
        dtype = compute_dtype(history[0].array.dtype)
        rows = jnp.concatenate([some.array for some in history]).astype(dtype)
        seen = jnp.concatenate([_seen(some) for some in history])
        return self.weigh(jax.tree.map(lambda a: a.astype(dtype), slot), rows, seen), rows


def _seen(rows):
    places = jnp.arange(len(rows.array))
    return places < (len(places) if rows.n is None else rows.n)


@dataclass(frozen=True)
class DenseNet(Dense):
    """`h_l = sum_i W[l, i] v_i`: a learned projection of the concatenation of all (arXiv 1608.06993, eq. 2).

    Its convolutions have no start to copy: every W is the identity at first, the pre-norm residual. W decays.
    """

    axes: ClassVar = {"weight": "LRD>d"}
    matrices: ClassVar = True

    def init(self, sublayers, width):
        def identities(*reads):
            return jnp.broadcast_to(jnp.eye(width), (*reads, sublayers + 1, width, width))

        return Mix({"weight": identities(sublayers)}, {"weight": identities()})

    def weigh(self, slot, rows, seen):
        return jnp.where(seen[:, None, None], slot["weight"][: len(rows)], 0)[:, None, None]

    def combine(self, weights, rows):
        return jnp.einsum("rij,rbti->btj", weights[:, 0, 0], rows, precision="highest")

    def apply(self, weights, steps, v):
        return jnp.stack([self.combine(w, v[: len(w)]) for w in weights])


@dataclass(frozen=True)
class DenseFormer(Dense):
    """Depth-weighted averages (arXiv 2402.02622, section 3): `h_l = sum_j a[l, j] x_j`, `x_j = h_j + v_j`.

    Sources x_0 (the embedding), x_1, ... hold a residual each; a starts as one at the latest, zero elsewhere:
    the pre-norm residual. The paper averages after every transformer block, here after every sublayer, which
    is what a layer is in table 5 of 2603.15031; dilation and period are 1. No decay.
    """

    axes: ClassVar = {"weight": "LR"}

    def init(self, sublayers, width):
        latest = jnp.eye(sublayers + 1)
        return Mix({"weight": latest[:-1]}, {"weight": latest[-1]})

    def weigh(self, slot, rows, seen):
        weights = jnp.where(seen, slot["weight"][: len(rows)], 0)[:, None, None]
        return jnp.broadcast_to(weights, rows.shape[:-1])

    def write(self, slot, stream, y):
        return stream + y

    def apply(self, weights, steps, v):
        x, mixtures = v[:1], []
        for w, y in zip(weights, jnp.roll(v, -1, 0), strict=True):  # after the last read nothing is written
            mixtures.append(self.combine(w, x))
            x = jnp.concatenate([x, (mixtures[-1] + y)[None]])
        return jnp.stack(mixtures)


@dataclass(frozen=True)
class SlidingWindow(Dense):
    """Full AttnRes over the embedding and the last `window` W outputs (arXiv 2603.15031, table 4: W = 8).

    Queries and key scales are those of AttnRes. All rows are scored and the others masked.
    """

    window: int = 8
    eps: float = 1e-6
    axes: ClassVar = {"query": "LD", "key_scale": "LD"}

    def __post_init__(self):
        positive(window=self.window)

    def init(self, sublayers, width):
        return Mix(asking(sublayers, width), asking(width))

    def weigh(self, slot, rows, seen):
        place = jnp.arange(len(rows))
        near = (place == 0) | (place >= jnp.sum(seen) - self.window)
        s = scores(slot["query"] * slot["key_scale"], rows, Rule(self.eps))
        return jax.nn.softmax(jnp.where((seen & near)[:, None, None], s, -jnp.inf), 0)


@dataclass(frozen=True)
class InputQuery(Dense):
    """Input-dependent queries (arXiv 2603.15031, table 4): `q_l = query_l + h_{l-1} W_l / D`, one a token.

    h_{l-1} is the mixture that the sublayer before read, as it is; for the first read, whose one source is
    the embedding, that. Rows hold an output and its sublayer's read, [2,B,T,D]: twice what Full keeps and a
    pipeline sends. The paper has the projection alone. Ours: the static query beside it and W (`query_map`)
    zero at first, which is the start of Full AttnRes; the 1 / D, by which an update of Adam's moves a query
    as much as it moves a static one (what else was tried: configs/LOG.md). W decays.
    """

    eps: float = 1e-6
    axes: ClassVar = {"query": "LD", "key_scale": "LD", "query_map": "LD>d"}

    def init(self, sublayers, width):
        def own(*shape):
            return asking(*shape) | {"query_map": jnp.zeros((*shape, width))}

        return Mix(own(sublayers, width), own(width))

    def start(self, x):
        return (Rows(jnp.stack([x, x])[None]),)

    def write(self, slot, stream, y):
        return jnp.stack([y, stream])

    def weigh(self, slot, rows, seen):
        h, keys = slot["before"], RMSNorm(slot["key_scale"], self.eps)(rows)
        query = slot["query"] + jnp.matmul(h, slot["query_map"], precision="highest") / h.shape[-1]
        return jax.nn.softmax(jnp.where(seen[:, None, None], jnp.sum(query * keys, -1), -jnp.inf), 0)

    def _weights(self, slot, history):
        array, n, _ = history[-1]
        before = array[(len(array) if n is None else n) - 1, 1]
        outputs = [Rows(some.array[:, 0], some.n) for some in history]
        return super()._weights(slot | {"before": before}, outputs)
