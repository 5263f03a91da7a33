"""Schemes that normalise what they keep: DeepNorm, KEEL, SiameseNorm.

The RMS is a number per token, recorded with the write: given it, they are linear, with one weight a channel.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from attnres_jax.residuals.base import Mix
from attnres_jax.residuals.states import States, Step


def _rescale(scale, v, eps):
    """RMSNorm(v) = this times v, [B,T,D]."""
    return scale * lax.rsqrt(jnp.mean(v * v, -1, keepdims=True) + eps)


@dataclass(frozen=True)
class DeepNorm(States):
    """`h <- Norm(a h + f(h))`, `a = (2 N)^(1/4)` for N decoder blocks, so L^(1/4) (2203.00555, figure 2).

    f has no pre-norm: the model's gets a zero gradient. Matrices of values, outputs and MLPs start `gain`
    times smaller, (8 N)^(-1/4). The norm is RMS, as everywhere here; the embedding is not normed.
    """

    sublayers: int = field(kw_only=True)
    norm_eps: float = 1e-6
    axes: ClassVar = {"norm": "LD"}
    prenorm: ClassVar = False

    @property
    def alpha(self) -> float:
        """What the kept part is multiplied by."""
        return self.sublayers**0.25

    def gain(self):
        return (4 * self.sublayers) ** -0.25

    def init(self, sublayers, width):
        return Mix({"norm": jnp.ones((sublayers, width))}, {})

    def schedule(self, sublayers):
        if sublayers != self.sublayers:
            raise ValueError(f"{self} was made for {self.sublayers} sublayers, not {sublayers}")
        return super().schedule(sublayers)

    def move(self, slot, s, y):
        r = _rescale(slot["norm"], self.alpha * s[0] + y, self.norm_eps)
        return Step((self.alpha * r)[None, None], r[None])


@dataclass(frozen=True)
class Keel(DeepNorm):
    """`h <- Norm(a h + f(Norm h))`, `a = L` (arXiv 2601.19895): the inner norm is the sublayer's pre-norm.

    From table 5 of 2603.15031, the abstract and others' summaries, the full text was not at hand. These agree
    on two RMSNorms with learned scales and on `a`, the number of layers; that it counts sublayers is our
    choice. Nothing starts smaller than elsewhere: the abstract has no special initialisation.
    """

    prenorm: ClassVar = True

    @property
    def alpha(self):
        return float(self.sublayers)

    def gain(self):
        return 1.0


@dataclass(frozen=True)
class SiameseNorm(States):
    """Two streams that get the same outputs (arXiv 2602.08064): `X <- Norm(X + y)`, `Y <- Y + y`.

    A sublayer reads `X + Norm(Y)` through its pre-norm, and so does the head through the final norm; both
    streams start as the embedding. From the authors' DeiT file we keep the pre-norm of the sum, and leave
    out the factor 1 / sqrt(depth) of X's updates, which the update in table 5 of 2603.15031 does not have.
    """

    streams: int = field(default=2, init=False)
    norm_eps: float = 1e-6
    axes: ClassVar = {"post": "LD", "pre": "LD"}

    def init(self, sublayers, width):
        pair = {name: jnp.ones((sublayers, width)) for name in ("post", "pre")}
        return Mix(pair, {"pre": jnp.ones(width)})

    def weigh(self, slot, s):
        r = _rescale(slot["pre"], s[1], self.norm_eps)
        return jnp.stack([jnp.ones_like(r), r])

    last = weigh

    def move(self, slot, s, y):
        r = _rescale(slot["post"], s[0] + y, self.norm_eps)
        one, zero = jnp.ones_like(r), jnp.zeros_like(r)
        return Step(jnp.stack([jnp.stack([r, zero]), jnp.stack([zero, one])]), jnp.stack([r, one]))
