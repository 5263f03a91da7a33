"""Sublayers of a language model: each has a pre-norm and is a function of the normed input."""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax.axes import compute_dtype
from attnres_jax.models.attention import Attend


class Attention(nnx.Module):
    """Causal grouped-query self-attention with rotary positions; `segments` do not see each other."""

    gained: ClassVar = ("value", "out")
    """Matrices that start larger or smaller where the residual scheme says so (`Scheme.gain`)."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        D, H, K = config.width, config.heads, config.width // config.heads
        make: dict[str, Any] = {"use_bias": False, "rngs": rngs} | types(config)
        self.norm = rms_norm(config, rngs)
        self.query = nnx.LinearGeneral(D, (H, K), **make)
        self.key = nnx.LinearGeneral(D, (config.kv_heads, K), **make)
        self.value = nnx.LinearGeneral(D, (config.kv_heads, K), **make)
        self.out = nnx.LinearGeneral((H, K), D, axis=(-2, -1), **make)
        self.theta = config.rope_theta

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None,
        attend: Attend,
    ) -> Float[Array, "B T D"]:
        """`x` is normed; `attend(q, k, v, segments)` is causal attention, see `models.attention`."""
        q, k = rope(self.query(x), positions, self.theta), rope(self.key(x), positions, self.theta)
        return self.out(attend(q, k, self.value(x), segments))


class SwiGLU(nnx.Module):
    """`down(silu(gate x) * up x)`."""

    gained: ClassVar = ("gate", "up", "down")

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_width
        make: dict[str, Any] = {"use_bias": False, "rngs": rngs} | types(config)
        self.norm = rms_norm(config, rngs)
        self.gate, self.up = nnx.Linear(D, F, **make), nnx.Linear(D, F, **make)
        self.down = nnx.Linear(F, D, **make)

    def __call__(self, x: Float[Array, "B T D"], positions, segments, attend) -> Float[Array, "B T D"]:
        """`x` is normed; the others are what every sublayer is given."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


def types(config: Any) -> dict[str, Any]:
    """Activations in the config's dtype over master parameters in at least fp32."""
    return {"dtype": config.dtype, "param_dtype": config.param_dtype}


def rms_norm(config: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Flax's RMSNorm: statistics in at least fp32, result in the activations' dtype."""
    return nnx.RMSNorm(config.width, epsilon=config.norm_eps, **types(config), rngs=rngs)


def rope(x: Float[Array, "B T H K"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T H K"]:
    """Rotary positions (Su et al. 2021): halves of a head are turned by `position * theta^(-2i/K)`."""
    dtype = compute_dtype(x.dtype)
    rate = jnp.asarray(theta, dtype) ** -(jnp.arange(0, x.shape[-1], 2, dtype=dtype) / x.shape[-1])
    angle = positions[..., None, None].astype(dtype) * rate
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
