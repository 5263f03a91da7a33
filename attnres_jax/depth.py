"""THE REFERENCE: softmax attention over depth, as the equations of arXiv 2603.15031 say it. Pure jnp.

    h = sum_i a_i v_i,   a = softmax_i(s_i),   s_i = query . (key_scale * v_i / rms(v_i))

`w = query * key_scale` [D] is all that a read needs to know; keys and values are the sources `v_i`
themselves. There is no temperature and no 1/sqrt(D). `rules.Rule` holds what may be otherwise.

Rounding: everything is computed in `axes.compute_dtype` of the sources; a mixture is rounded once, to the
sources' dtype. Phase 1's mixture is stored between the two phases, hence rounded when it is made.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnres_jax.axes import compute_dtype
from attnres_jax.rules import RULE, Rule, per_channel, scores, weigh


class Rows(NamedTuple):
    """Sources in one array, of which the first `n` are visible (`None`: all). `n` may be traced.

    With a `slot`, which may be traced too, they lie in `array[slot]`: the array is then alone."""

    array: Float[Array, "R *tokens D"]
    n: Any = None
    slot: Any = None


class Mixed(NamedTuple):
    """A finished read: the mixture, and the weight of each source (with heads, H at the end)."""

    mixture: Float[Array, "*tokens D"]
    weights: Float[Array, "R ..."]


class Partial(NamedTuple):
    """A read of some of the sources: their mixture, and the log of the sum of exponentials.

    In the paper's terms `mixture = o / l` and `lse = m + log l`. A single source is `Partial(v, score)`.
    """

    mixture: Float[Array, "*tokens D"]
    lse: Float[Array, "..."] | None
    """[*tokens], with heads [*tokens, H]; None where weights do not depend on the other sources (sigmoid)."""


def mix(w: Float[Array, " K"], sources: Sequence[Any], rule: Rule, logits: Any = None) -> Mixed:
    """One read over all its sources [*tokens, D] at once (one phase): the definition of AttnRes."""
    weights, _ = weigh(jnp.stack([scores(w, v, rule) for v in sources]), 0, rule, logits)
    shares = per_channel(weights, sources[0].shape[-1], rule)
    mixture = sum(a * v.astype(a.dtype) for a, v in zip(shares, sources, strict=True))
    return Mixed(jnp.asarray(mixture, sources[0].dtype), weights)


def partial_mix(w: Float[Array, "S K"], sources: Sequence[Rows], rule: Rule, logits: Any = None) -> Partial:
    """Phase 1: S reads at once over the visible rows. Returns mixture [S, ..., D] and lse [S, ...]."""
    s = jnp.concatenate([_visible(scores(w, rows.array, rule), rows.n) for rows in sources], 1)
    weights, lse = weigh(s, 1, rule, logits)
    at, mixture = 0, 0.0
    for rows in sources:
        share, at = weights[:, at : at + len(rows.array)], at + len(rows.array)
        share = per_channel(share, rows.array.shape[-1], rule)
        mixture = mixture + jnp.sum(share * rows.array.astype(weights.dtype), 1)
    return Partial(jnp.asarray(mixture, sources[0].array.dtype), lse)


def _visible(s: Float[Array, "S R ..."], n: Any) -> Float[Array, "S R ..."]:
    if n is None:
        return s
    row = jnp.arange(s.shape[1]).reshape(-1, *[1] * (s.ndim - 2))
    return jnp.where(row < n, s, -jnp.inf)


def single(w: Float[Array, " K"], v: Float[Array, "*tokens D"], rule: Rule, logit: Any = 0.0) -> Partial:
    """The read of one source, with `logit` added to its score, for `merge`."""
    s = scores(w, v, rule) + logit
    if rule.activation == "softmax":
        return Partial(v, s)
    share = per_channel(weigh(s, 0, rule)[0], v.shape[-1], rule)
    return Partial(share * v.astype(share.dtype), None)


def merge(a: Partial, b: Partial, rule: Rule = RULE) -> Partial:
    """Phase 2: the read over the sources of both, in a's dtype. An empty side has lse = -inf, or is zero."""
    dtype, width = a.mixture.dtype, a.mixture.shape[-1]
    first, second = (part.mixture.astype(compute_dtype(dtype)) for part in (a, b))
    if a.lse is None or b.lse is None:  # weights of a source that do not depend on the others
        return Partial((first + second).astype(dtype), None)
    weights = per_channel(jax.nn.softmax(jnp.stack([a.lse, b.lse]), axis=0), width, rule)
    return Partial((weights[0] * first + weights[1] * second).astype(dtype), jnp.logaddexp(a.lse, b.lse))
