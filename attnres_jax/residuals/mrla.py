"""Multi-head recurrent layer attention, light (arXiv 2302.03985): a separable product of queries and keys."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from attnres_jax.residuals.base import Mix
from attnres_jax.residuals.states import States, Step


@dataclass(frozen=True)
class MRLA(States):
    """`h_l = q_l * sum_i k_i * v_i`, q and k sigmoid gates, one head a channel: M[l, i] = diag(q_l k_i).

    Queries and keys are convolutions over channels, their kernel by ECA's rule, as in the paper; here of the
    running sum and of the output, at unit RMS. The sum over i is a recurrence, as in MRLA-light (eq. 8).
    Sigmoid gates are those of table 5 of 2603.15031. Ours, where the paper speaks of images: no pooling over
    positions, which would see the future; values are the outputs; a gate is 2 sigmoid of a convolution that
    starts at zero, so step 0 is the pre-norm residual; the embedding's key is one. Kernels decay.
    """

    norm_eps: float = 1e-6
    axes: ClassVar = {"query": "L>c", "key": "L>c"}

    def init(self, sublayers, width):
        size = int((math.log2(width) + 1) / 2) // 2 * 2 + 1
        return Mix(
            {name: jnp.zeros((sublayers, size)) for name in ("query", "key")}, {"query": jnp.zeros(size)}
        )

    def weigh(self, slot, s):
        return self._gate(slot["query"], s)

    last = weigh

    def move(self, slot, s, y):
        return Step(jnp.ones((1, 1, 1, 1, 1), s.dtype), self._gate(slot["key"], y)[None])

    def _gate(self, kernel, v):
        v = v * lax.rsqrt(jnp.mean(v * v, -1, keepdims=True) + self.norm_eps)
        size, width = len(kernel), v.shape[-1]
        padded = jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(size // 2, size // 2)])
        return 2 * jax.nn.sigmoid(sum(kernel[j] * padded[..., j : j + width] for j in range(size)))
