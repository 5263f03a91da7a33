"""Deep delta learning (arXiv 2601.00417): the delta rule over depth, on a matrix state."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attnres_jax.residuals.base import Mix
from attnres_jax.residuals.states import States

TARGET = 4.0


class Delta(NamedTuple):
    """`X <- (I - beta k k^T) X + y write^T`; `beta k v^T = y write^T`, for k is y over its length."""

    k: Float[Array, "B T D"]
    beta: Float[Array, "B T 1"]
    write: Float[Array, "m B T 1"]


@dataclass(frozen=True)
class DDL(States):
    """`X <- X + beta k (v^T - k^T X)` (eq. 2.2), X [D, m]; the direction is the output, k = y / |y|.

    `h = X r`, r 1/m at first; `beta = 2 sigmoid(w c + b)`, one at first; v too is of c = RMSNorm(h), whose
    scale W holds. Columns of X start as the embedding. Of the paper's variants this is the one without
    embedding convolution, and it compresses with r alone, no convolution. `v = 4 sigmoid(W c + b)`, as in the
    released code (the text has W c): W and w start at zero, so step 0 goes to v = 2. W and w decay.
    """

    streams: int = 4
    norm_eps: float = 1e-6
    axes: ClassVar = {
        **{"beta": "L", "value": "Lm", "combine": "Lm"},
        **{"beta_weight": "LD>k", "value_weight": "LD>m"},
    }
    matrices: ClassVar = True

    def init(self, sublayers, width):
        m = self.streams
        equal = jnp.full((sublayers, m), 1 / m, "float32")
        start = {"beta": jnp.zeros(sublayers), "value": jnp.zeros((sublayers, m)), "combine": equal}
        weights = {k: jnp.zeros((sublayers, width, n)) for k, n in (("beta_weight", 1), ("value_weight", m))}
        return Mix(start | weights, {"combine": equal[0]})

    def weigh(self, slot, s):
        return slot["combine"].reshape(-1, 1, 1, 1)

    last = weigh

    def move(self, slot, s, y):
        h = jnp.sum(self.weigh(slot, s) * s, 0)
        c = h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + self.norm_eps)
        logit, value = (jnp.matmul(c, slot[f"{n}_weight"], precision="highest") for n in ("beta", "value"))
        beta = 2 * jax.nn.sigmoid(logit + slot["beta"])
        v = jnp.moveaxis(TARGET * jax.nn.sigmoid(value + slot["value"]), -1, 0)[..., None]
        over = lax.rsqrt(jnp.sum(y * y, -1, keepdims=True) + self.norm_eps)
        return Delta(y * over, beta, beta * over * v)

    def advance(self, step, s, y):
        erased = step.beta * step.k * jnp.sum(step.k * s, -1, keepdims=True)
        return (s - erased + step.write * y).astype(s.dtype)
