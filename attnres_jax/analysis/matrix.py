"""The depth mixing matrix M, h_l = sum_i M[l, i] v_i, of recorded tokens (paper.md, last section).

M depends on the activations through the recorded coefficients alone; these held fixed, a scheme is linear
in the outputs. `apply` is that linear map; where no channel enters another, its entries are numbers.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnres_jax.axes import compute_dtype
from attnres_jax.residuals.base import Scheme
from attnres_jax.walk import Record


def depth_matrix(scheme: Scheme, record: Record) -> Float[Array, "reads outputs B T G"]:
    """M of recorded tokens: [L+1, L+1, B, T, G]; the last row is the output read.

    G = 1 where one number weighs all channels, H for H heads, D for one per channel. M[l, i] counts v_i
    in every source that contains it: a row sums to one where every source is one output and weights do.

    Raises:
      ValueError: where the entries are D x D matrices; `apply` and `diagonal` know those.
    """
    if scheme.matrices:
        raise ValueError(f"entries of {scheme}'s M are D x D matrices: use apply or diagonal instead")
    coefficients = jax.tree.leaves((record.steps, [w.reshape(*w.shape[:3], -1) for w in record.weights]))
    return _columns(scheme, record, max(a.shape[-1] for a in coefficients))


def apply(scheme: Scheme, record: Record, v: Float[Array, "L1 B T D"]) -> Float[Array, "L1 B T D"]:
    """M v: with v the recorded outputs these are the recorded mixtures."""
    return _apply(scheme, record, v.astype(_dtype(record)))


def diagonal(scheme: Scheme, record: Record) -> Float[Array, "reads outputs B T G"]:
    """Each entry's diagonal, what a channel passes on to itself: M, where entries are not matrices."""
    if not scheme.matrices:
        return depth_matrix(scheme, record)
    D = record.outputs.shape[-1]
    own = jax.lax.map(lambda d: _columns(scheme, record, D, jnp.arange(D) == d)[..., d], jnp.arange(D))
    return jnp.moveaxis(own, 0, -1)


def one_token(record: Record, b: int, t: int) -> Record:
    """The record of token `t` of sequence `b`, with B = T = 1: M of a whole batch is large."""

    def cut(tree, axis):
        def at(a, axis, i):
            return a if a.shape[axis] == 1 else jnp.take(a, jnp.array([i]), axis)

        return jax.tree.map(lambda a: at(at(a, axis, b), axis + 1, t), tree)

    outputs, mixtures, weights, steps = record
    return Record(cut(outputs, 1), cut(mixtures, 1), cut(weights, 1), cut(steps, -3))


def rank(matrix: Float[np.ndarray, "reads outputs"], tolerance: float = 1e-9) -> int:
    """Semiseparable rank of one token's M (one channel): the largest of the blocks M[l:, :l+1].

    Such a block holds all that sublayers from l on get of outputs up to v_l, through whatever the scheme
    keeps: m states pass on at most m combinations. Singular values below `tolerance` of M's largest are zero.
    """
    matrix = np.asarray(matrix, np.float64)
    floor = tolerance * np.linalg.svd(matrix, compute_uv=False)[0]
    blocks = [matrix[l:, : l + 1] for l in range(len(matrix))]
    return max(int(np.sum(np.linalg.svd(block, compute_uv=False) > floor)) for block in blocks)


def row_sums(matrix: Float[np.ndarray, "reads outputs *rest"]) -> Float[np.ndarray, "reads *rest"]:
    """Of each read, over outputs: one where reads are averages, l + 1 in the plain residual."""
    return np.sum(matrix, 1)


class Reach(NamedTuple):
    """Where one token's reads look, by the absolute entries of M as shares of their row; see `reach`."""

    entropy: Float[np.ndarray, " reads"]
    """Of a read's shares, in nats."""
    effective: Float[np.ndarray, " reads"]
    """exp(entropy): how many outputs a read has, were its shares equal."""
    back: Float[np.ndarray, " reads"]
    """Mean look-back distance in sublayers; the newest output is at 0, the embedding at l."""
    drawn: Float[np.ndarray, " outputs"]
    """What an output draws, times an equal share, in the mean over the reads that see it: above 1 a sink."""


def reach(matrix: Float[np.ndarray, "reads outputs"]) -> Reach:
    """Entropy, effective depth, look-back distance and sinks of one token's M (one channel, or their mean).

    p[l, i] = |M[l, i]| / sum_j |M[l, j]|: -sum_i p log p, its exponential, sum_i p (l - i), and of output
    i the mean over reads l >= i, l > 0, of p (l + 1): the read of the embedding alone has no choice.
    """
    shares = np.abs(np.asarray(matrix, np.float64))
    shares /= np.maximum(shares.sum(1, keepdims=True), np.finfo(float).tiny)
    places = np.arange(len(shares))
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), 1)
    equal = (shares * (places + 1)[:, None])[1:]
    seen = np.tri(len(shares), dtype=bool)[1:]
    drawn = np.sum(equal * seen, 0) / seen.sum(0)
    return Reach(entropy, np.exp(entropy), np.sum(shares * (places[:, None] - places), 1), drawn)


def _apply(scheme, record, v):
    own = scheme.apply(record.weights, record.steps, v)
    return _by_sources(scheme, record.weights, v) if own is None else own


def _by_sources(scheme, weights, v):
    """Weighted sums of sources, which are sums of outputs; a head weighs its D / H channels alike."""
    mixtures, mix = [], partial(jnp.einsum, "rbtg,ri,ibtg->btg", precision="highest")
    for w, sources in zip(weights, scheme.sources(len(weights) - 1), strict=True):
        w = w.reshape(*w.shape[:3], -1)
        mixtures.append(mix(jnp.repeat(w, v.shape[-1] // w.shape[-1], -1), sources[: len(w)], v))
    return jnp.stack(mixtures)


def _columns(scheme, record, width, channels=True):
    """Outputs that are one at one place in turn (in some channels), zero elsewhere, through `apply`."""
    shape, dtype = record.outputs.shape[:-1], _dtype(record)
    where = jnp.eye(shape[0], dtype=bool)[:, :, None, None, None] & channels
    ones = jnp.broadcast_to(where, (shape[0], *shape, width)).astype(dtype)
    columns = jax.lax.map(lambda v: _apply(scheme, record, v), ones)
    return jnp.moveaxis(columns, 0, 1)


def _dtype(record):
    return compute_dtype(record.outputs.dtype)
