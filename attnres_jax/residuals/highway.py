"""Highway networks (arXiv 1505.00387): a gate that mixes what is carried and what is new."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnres_jax.residuals.base import Mix
from attnres_jax.residuals.states import States, Step

CLOSED = -2.0


@dataclass(frozen=True)
class Highway(States):
    """`h <- (1 - g) h + g f(h)`, `g = sigmoid(W h + b)`, element by element (eqs. 2 and 3 with C = 1 - T).

    So a row of M sums to one. The bias starts negative, "-1, -3, etc." (section 2.2), to carry at first: here
    -2, g = 0.12. The paper leaves W's start open: zero, one gate for all tokens. W decays, b does not.
    """

    axes: ClassVar = {"gate": "LD>d", "bias": "LD"}

    def init(self, sublayers, width):
        gate, bias = jnp.zeros((sublayers, width, width)), jnp.full((sublayers, width), CLOSED, "float32")
        return Mix({"gate": gate, "bias": bias}, {})

    def move(self, slot, s, y):
        g = jax.nn.sigmoid(jnp.matmul(s, slot["gate"], precision="highest") + slot["bias"])
        return Step((1 - g)[None], g)
