"""THE REFERENCE: softmax attention over depth, as the equations of arXiv 2603.15031 say it. Pure jnp.

    h = sum_i a_i v_i,   a = softmax_i(s_i),   s_i = query . (key_scale * v_i / rms(v_i))

`w = query * key_scale` [D] is all that a read needs to know; keys and values are the sources `v_i`
themselves. There is no temperature and no 1/sqrt(D).

Rounding: everything is computed in `axes.compute_dtype` of the sources; a mixture is rounded once, to the
sources' dtype. Phase 1's mixture is stored between the two phases, hence rounded when it is made.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attnres_jax.axes import compute_dtype


class Rows(NamedTuple):
    """Sources in one array, of which the first `n` are visible (`None`: all). `n` may be traced."""

    array: Float[Array, "R *tokens D"]
    n: Any = None


class Mixed(NamedTuple):
    """A finished read: the mixture and the weight of each source."""

    mixture: Float[Array, "*tokens D"]
    weights: Float[Array, "R *tokens"]


class Partial(NamedTuple):
    """A read of some of the sources: their mixture, and the log of the sum of exponentials.

    In the paper's terms `mixture = o / l` and `lse = m + log l`. A single source is `Partial(v, score)`.
    """

    mixture: Float[Array, "*tokens D"]
    lse: Float[Array, "*tokens"]


class RMSNorm(NamedTuple):
    """`v / rms(v) * scale`, a sublayer's pre-norm as a value: a kernel computes it together with the read."""

    scale: Float[Array, " D"]
    eps: float

    def __call__(self, v: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """Statistics in at least fp32; rounded once, to the dtype of `v`."""
        x = v.astype(compute_dtype(v.dtype))
        rstd = lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + jnp.asarray(self.eps, x.dtype))
        return (x * (rstd * self.scale.astype(x.dtype))).astype(v.dtype)


def scores(w: Float[Array, "*S D"], v: Float[Array, "*tokens D"], eps: float) -> Float[Array, "..."]:
    """`w . RMSNorm(v)` for every query and token: an fp32 multiply-reduce, never a default matmul."""
    v = v.astype(compute_dtype(v.dtype))
    w = w.astype(v.dtype).reshape(*w.shape[:-1], *[1] * (v.ndim - 1), w.shape[-1])
    rstd = lax.rsqrt(jnp.mean(v * v, -1) + jnp.asarray(eps, v.dtype))
    return jnp.sum(w * v, -1) * rstd


def mix(w: Float[Array, " D"], sources: Sequence[Float[Array, "*tokens D"]], eps: float) -> Mixed:
    """One read over all its sources at once (one phase): the definition of AttnRes."""
    weights = jax.nn.softmax(jnp.stack([scores(w, v, eps) for v in sources]), axis=0)
    mixture = sum(a[..., None] * v.astype(a.dtype) for a, v in zip(weights, sources, strict=True))
    return Mixed(jnp.asarray(mixture, sources[0].dtype), weights)


def partial_mix(w: Float[Array, "S D"], sources: Sequence[Rows], eps: float) -> Partial:
    """Phase 1: S reads at once over the visible rows. Returns mixture [S, ..., D] and lse [S, ...]."""
    s = jnp.concatenate([_visible(scores(w, rows.array, eps), rows.n) for rows in sources], 1)
    top = lax.stop_gradient(jnp.max(s, 1))
    e = jnp.exp(s - top[:, None])
    total = jnp.sum(e, 1)
    weights, at, mixture = e / total[:, None], 0, 0.0
    for rows in sources:
        share, at = weights[:, at : at + len(rows.array), ..., None], at + len(rows.array)
        mixture = mixture + jnp.sum(share * rows.array.astype(weights.dtype), 1)
    return Partial(jnp.asarray(mixture, sources[0].array.dtype), top + jnp.log(total))


def _visible(s: Float[Array, "S R *tokens"], n: Any) -> Float[Array, "S R *tokens"]:
    if n is None:
        return s
    row = jnp.arange(s.shape[1]).reshape(-1, *[1] * (s.ndim - 2))
    return jnp.where(row < n, s, -jnp.inf)


def merge(a: Partial, b: Partial) -> Partial:
    """Phase 2: the read over the sources of both. Commutes; an empty side has lse = -inf."""
    weights = jax.nn.softmax(jnp.stack([a.lse, b.lse]), axis=0)[..., None]
    mixture = weights[0] * a.mixture.astype(weights.dtype) + weights[1] * b.mixture.astype(weights.dtype)
    return Partial(mixture.astype(a.mixture.dtype), jnp.logaddexp(a.lse, b.lse))
