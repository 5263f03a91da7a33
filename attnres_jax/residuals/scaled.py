"""h <- h + a f(h), with a learned scale of what is added: ReZero, LayerScale."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from attnres_jax.residuals.base import Mix
from attnres_jax.residuals.states import States, Step


@dataclass(frozen=True)
class ReZero(States):
    """One number a sublayer, zero at first: the network starts as the identity (arXiv 2003.04887, eq. 1).

    The paper's transformer also drops the norms; here f keeps its pre-norm, as in every scheme compared.
    """

    axes: ClassVar = {"scale": "L"}

    def init(self, sublayers, width):
        return Mix({"scale": jnp.zeros(sublayers)}, {})

    def move(self, slot, s, y):
        return Step(jnp.ones((1, 1, 1, 1, 1), s.dtype), slot["scale"].reshape(1, 1, 1, -1))


@dataclass(frozen=True)
class LayerScale(ReZero):
    """One number a channel, small at first (arXiv 2103.17239, eq. 4 and section 2.3): 0.1 up to 18
    transformer blocks, 1e-5 up to 24, 1e-6 beyond. No weight decay, as for vectors in the paper's code."""

    axes: ClassVar = {"scale": "LD"}

    def init(self, sublayers, width):
        small = 0.1 if sublayers <= 36 else 1e-5 if sublayers <= 48 else 1e-6
        return Mix({"scale": jnp.full((sublayers, width), small, "float32")}, {})
