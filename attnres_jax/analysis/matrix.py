"""The depth mixing matrix M, h_l = sum_i M[l, i] v_i, explicit (paper.md, last section)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attnres_jax.axes import compute_dtype
from attnres_jax.residuals import Scheme
from attnres_jax.stack import Record


def depth_matrix(scheme: Scheme, record: Record) -> Float[Array, "reads outputs B T 1"]:
    """M of recorded tokens: [L+1, L+1, B, T, 1]; the last row is the output read.

    M[l, i] is the sum of the weights of those sources of read l that contain output v_i, one number
    per token. A row sums to one where every source is one output; a block summary counts S times.
    """
    sources = scheme.sources(len(record.weights) - 1)
    rows = [_row(weights, sources[read]) for read, weights in enumerate(record.weights)]
    return jnp.stack(rows)[..., None]


def _row(weights, sources):
    dtype = compute_dtype(weights.dtype)
    members = jnp.asarray(sources[: len(weights)], dtype)
    exact = lax.Precision.HIGHEST
    return jnp.einsum("rbt,ri->ibt", weights.astype(dtype), members, precision=exact)
