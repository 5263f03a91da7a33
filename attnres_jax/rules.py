"""How a read weighs its sources: the paper's rule, its ablations (Table 4) and what follow-ups propose.

    a_i = softmax_i(s_i + c_i)  or  sigmoid(s_i + c_i),      s_i = w . key(v_i)

`c_i` are static logits, one number a read and source, where a scheme has them: with zero queries they are
input-independent mixing, and how they start is a bias to recency. Statistics in at least fp32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attnres_jax.axes import compute_dtype


class Rule(NamedTuple):
    """Static. The default is Attention Residuals as defined: one softmax over keys that are normed."""

    eps: float = 1e-6
    """Of the key norm."""
    activation: str = "softmax"
    """Or "sigmoid": each source for itself, so that weights do not sum to one (Table 4)."""
    key_norm: bool = True
    """False: the key is the source itself (Table 4, without RMSNorm)."""
    heads: int = 1
    """H channel groups of D / H, each with weights of its own (Table 4); the key norm is of the whole row."""
    key_width: int | None = None
    """Keys are the last so many coordinates, normed by themselves (arXiv 2607.09694); None: all."""

    def check(self, width: int) -> None:
        """Raises `ValueError` for what no rule is, or does not fit sources that are `width` wide."""
        if self.activation not in ("softmax", "sigmoid"):
            raise ValueError(f"activation must be 'softmax' or 'sigmoid', got {self.activation!r}")
        if self.heads < 1 or width % self.heads:
            raise ValueError(f"heads must divide the width {width}, got {self.heads}")
        if self.key_width is not None and not 1 <= self.key_width <= width:
            raise ValueError(f"key_width must lie in 1..{width} (the width), got {self.key_width}")
        if self.key_width is not None and self.heads > 1:
            raise ValueError("sliced keys have one head: set heads to 1, or key_width to None")


RULE = Rule()
"""The paper's."""


def scores(w: Float[Array, "*S K"], v: Float[Array, "*tokens D"], rule: Rule) -> Float[Array, "..."]:
    """`w . key(v)`: [*S, *tokens], with heads [*S, *tokens, H]. A multiply-reduce, never a default matmul."""
    v = v.astype(compute_dtype(v.dtype))[..., -w.shape[-1] :]
    w = w.astype(v.dtype).reshape(*w.shape[:-1], *[1] * (v.ndim - 1), w.shape[-1])
    rstd = lax.rsqrt(jnp.mean(v * v, -1) + jnp.asarray(rule.eps, v.dtype)) if rule.key_norm else jnp.ones(())
    product = w * v
    if rule.heads == 1:
        return jnp.sum(product, -1) * rstd
    return jnp.sum(product.reshape(*product.shape[:-1], rule.heads, -1), -1) * rstd[..., None]


def weigh(
    s: Float[Array, "..."], axis: int, rule: Rule, logits: Float[Array, "*S R"] | None = None
) -> tuple[Float[Array, "..."], Any]:
    """Weights of the sources along `axis`, and the log of the softmax's sum of exponentials (else None)."""
    if logits is not None:
        s = s + logits.astype(s.dtype).reshape(*logits.shape, *[1] * (s.ndim - logits.ndim))
    if rule.activation == "sigmoid":
        return jax.nn.sigmoid(s), None
    top = lax.stop_gradient(jnp.max(s, axis, keepdims=True))
    e = jnp.exp(s - top)
    total = jnp.sum(e, axis, keepdims=True)
    return e / total, jnp.squeeze(top + jnp.log(total), axis)


def per_channel(a: Float[Array, "..."], width: int, rule: Rule) -> Float[Array, "..."]:
    """Weights with a last axis that meets the channels of a source, `width` wide."""
    return a[..., None] if rule.heads == 1 else jnp.repeat(a, width // rule.heads, -1)


def no_kernel(rule: Rule, logits: Any) -> str | None:
    """Why no kernel weighs so, or None."""
    if rule._replace(eps=RULE.eps) == RULE and logits is None:
        return None
    return "kernels know one softmax over keys that are normed, whole, and without static logits"
