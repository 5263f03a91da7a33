"""Sublayers of a language model: each has a pre-norm and is a function of the normed input."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnres_jax.axes import compute_dtype


class Attention(nnx.Module):
    """Causal grouped-query self-attention with rotary positions; `segments` do not see each other."""

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
        mask: Bool[Array, "B 1 T T"] | None,
    ) -> Float[Array, "B T D"]:
        """`x` is normed; `mask` is True where a token may look, on top of causality."""
        q, k = rope(self.query(x), positions, self.theta), rope(self.key(x), positions, self.theta)
        return self.out(attend(q, k, self.value(x), mask))


class SwiGLU(nnx.Module):
    """`down(silu(gate x) * up x)`."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_width
        make: dict[str, Any] = {"use_bias": False, "rngs": rngs} | types(config)
        self.norm = rms_norm(config, rngs)
        self.gate, self.up = nnx.Linear(D, F, **make), nnx.Linear(D, F, **make)
        self.down = nnx.Linear(F, D, **make)

    def __call__(self, x: Float[Array, "B T D"], positions, mask) -> Float[Array, "B T D"]:
        """`x` is normed; positions and mask are what every sublayer is given."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    mask: Bool[Array, "B 1 T T"] | None,
) -> Float[Array, "B T H K"]:
    """Causal attention, G keys for H heads. JAX's own rounds the weights to fp32; fp64 has to stay fp64."""
    if q.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    seen = jnp.tri(q.shape[1], dtype=bool) & (True if mask is None else mask)
    score = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(seen, score, -jnp.inf)), v)


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
