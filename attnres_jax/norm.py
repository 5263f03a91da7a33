"""A sublayer's pre-norm as a value, which a kernel computes together with the read over depth."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attnres_jax.axes import compute_dtype


@partial(jax.tree_util.register_dataclass, data_fields=["scale"], meta_fields=["eps"])
@dataclass(frozen=True)
class RMSNorm:
    """`v / rms(v) * scale`; `eps` is static."""

    scale: Float[Array, " D"]
    eps: float

    def __call__(self, v: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """Statistics in at least fp32; rounded once, to the dtype of `v`."""
        x = v.astype(compute_dtype(v.dtype))
        rstd = lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + jnp.asarray(self.eps, x.dtype))
        return (x * (rstd * self.scale.astype(x.dtype))).astype(v.dtype)
