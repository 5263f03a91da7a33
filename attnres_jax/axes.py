"""Axis letters and the rounding policy: one place, the same in shapes, einsums and kernels.

| letter | axis                                    | letter | axis                              |
|--------|-----------------------------------------|--------|-----------------------------------|
| B      | batch                                   | R      | residual sources of one read      |
| T      | time (tokens of a sequence)             | H, K   | heads, head width                 |
| D      | model width                             | F      | MLP width                         |
| L      | sublayers, two per transformer block    | V      | vocabulary                        |
| N, S   | AttnRes blocks, sublayers per block     | M      | the depth mixing matrix           |

Rounding: scores, softmax, norms, statistics and sums over sources are taken in `compute_dtype`, at least
fp32; the result of an op is rounded once, to the dtype of the activations it came from.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that arithmetic on `dtype` runs in: fp32 for bf16 and fp32, fp64 for fp64."""
    return jnp.promote_types(dtype, jnp.float32)
