"""Hyper-connections (arXiv 2409.19606): m streams, learned reads, writes and mixing among them."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from attnres_jax.residuals.base import Mix
from attnres_jax.residuals.states import States, Step


@dataclass(frozen=True)
class HC(States):
    """`h = A_m^T H`, `H <- A_r^T H + B^T y^T` (eqs. 2 to 5), static or, by default, dynamic (eqs. 10 to 13):

        A_m = s_a tanh(N W_m) + A_m,  A_r = s_a tanh(N W_r) + A_r,  B = s_b tanh(N W_b) + B,  N = norm(H)

    At first (eq. 14) B is one, A_r the identity, A_m one stream, l mod m, W zero, s 0.01: every stream is the
    pre-norm residual. The output read sums them. W decays, the static part does not (section 4). Ours: the
    norm is RMS without a scale, which W holds; the output matrices of sublayers start as they do elsewhere,
    not sqrt(m) times as large.
    """

    streams: int = 4
    dynamic: bool = True
    norm_eps: float = 1e-6
    axes: ClassVar = {
        **{"alpha": "Lmn", "beta": "Lm", "alpha_scale": "L", "beta_scale": "L"},
        **{"alpha_weight": "LD>n", "beta_weight": "LD>n"},
    }

    def init(self, sublayers, width):
        m = self.streams
        first = jnp.arange(sublayers)[:, None] % m == jnp.arange(m)
        mixing = jnp.broadcast_to(jnp.eye(m), (sublayers, m, m))
        static = {"alpha": jnp.concatenate([first[..., None], mixing], -1), "beta": jnp.ones((sublayers, m))}
        if not self.dynamic:
            return Mix(static, {})
        scales = {name: jnp.full(sublayers, 0.01, "float32") for name in ("alpha_scale", "beta_scale")}
        weights = {
            f"{k}_weight": jnp.zeros((sublayers, width, n)) for k, n in (("alpha", m + 1), ("beta", 1))
        }
        return Mix(static | scales | weights, {})

    def weigh(self, slot, s):
        return self._coefficients("alpha", slot, s)[..., :1]

    def move(self, slot, s, y):
        mixing = self._coefficients("alpha", slot, s)[..., 1:]
        return Step(jnp.moveaxis(mixing, -1, 0)[..., None], self._coefficients("beta", slot, s))

    def _coefficients(self, name, slot, s):
        """[m, B, T, columns], a row of the matrix for each stream; [m, 1, 1, columns] where static."""
        static = slot[name].reshape(self.streams, 1, 1, -1)
        if not self.dynamic:
            return static
        normed = s * lax.rsqrt(jnp.mean(s * s, -1, keepdims=True) + self.norm_eps)
        logits = jnp.matmul(normed, slot[f"{name}_weight"], precision="highest")
        return slot[f"{name}_scale"] * jnp.tanh(logits) + static
