"""The oracle: Attention Residuals from the paper's equations alone (arXiv 2603.15031, section 3).

Nothing here is shared with `attnres_jax`. Every scheme is one 0/1 array [read, source, output] that
says which sublayer outputs each source of each read is the sum of, and a stack is one scan over its
rows: quick to compile at any depth. It computes in the dtype it is given: fp64 for the truth, fp32
for "the literal formula's own error".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Stack(NamedTuple):
    h: jax.Array  # [B,T,D], the output read
    outputs: jax.Array  # [L+1,B,T,D], v_0 .. v_L
    mixtures: jax.Array  # [L+1,B,T,D], h_1 .. h_L and the output read
    weights: jax.Array  # [L+1,R,B,T], zero where a read has fewer sources
    aux: dict[str, Any]


def block_sources(sublayers: int, size: int) -> np.ndarray:
    """Block AttnRes: b_0, the completed blocks' sums, and the open block's partial sum if any."""
    reads = []
    for seen in range(sublayers + 1):  # outputs v_1 .. v_seen exist at this read
        blocks = [range(first, min(first + size, seen + 1)) for first in range(1, seen + 1, size)]
        reads.append([[0], *blocks])
    return _indicator(reads, sublayers)


def full_sources(sublayers: int) -> np.ndarray:
    """Full AttnRes: every earlier output is a source of its own."""
    return _indicator([[[i] for i in range(n + 1)] for n in range(sublayers + 1)], sublayers)


def plain_sources(sublayers: int) -> np.ndarray:
    """The standard residual: one source, the sum of everything so far."""
    return _indicator([[range(n + 1)] for n in range(sublayers + 1)], sublayers)


def _indicator(reads, sublayers: int) -> np.ndarray:
    array = np.zeros((sublayers + 1, max(map(len, reads)), sublayers + 1))
    for read, sources in enumerate(reads):
        for source, outputs in enumerate(sources):
            array[read, source, list(outputs)] = 1
    return array


def read(values, query, key_scale, eps, present=None):
    """h = sum_i a_i v_i with a = softmax_i(w . RMSNorm(v_i)); values [R,B,T,D] -> h, a [R,B,T]."""
    rms = jnp.sqrt(jnp.mean(values**2, axis=-1, keepdims=True) + eps)
    score = jnp.sum(query * (key_scale * values / rms), axis=-1)
    if present is not None:
        score = jnp.where(present[:, None, None], score, -jnp.inf)
    exponentials = jnp.exp(score - jax.lax.stop_gradient(score.max(axis=0)))
    weights = exponentials / exponentials.sum(axis=0)
    return jnp.sum(weights[..., None] * values, axis=0), weights


def stack(sources, queries, key_scales, kinds, layers, x, eps=1e-6, read=read, more=()) -> Stack:
    """The whole network; queries and key_scales are [L+1,D], the last row the output read's.

    `read` may be another one, which takes `more` besides: arrays [L+1,...].
    """
    order = sorted(set(kinds))
    nth = np.array([kinds[:position].count(kind) for position, kind in enumerate(kinds)])
    which = np.array([order.index(kind) for kind in kinds])
    branches = [_branch(kind, layers, x) for kind in order]

    def mixed(outputs, row):
        member, query, key_scale, *others = row
        values = jnp.einsum("ro,obtd->rbtd", member.astype(x.dtype), outputs)
        return read(values, query, key_scale, eps, member.any(axis=1), *others)

    def sublayer(outputs, step):
        position, kind, index, *row = step
        h, weights = mixed(outputs, row)
        y, aux = jax.lax.switch(kind, branches, index, h)
        return outputs.at[position + 1].set(y), (h, weights, aux)

    rows = (jnp.asarray(sources), queries, key_scales, *more)
    steps = (np.arange(len(kinds)), which, nth, *(row[:-1] for row in rows))
    outputs = jnp.zeros((len(kinds) + 1, *x.shape), x.dtype).at[0].set(x)
    outputs, (mixtures, weights, aux) = jax.lax.scan(sublayer, outputs, steps)
    h, last = mixed(outputs, tuple(row[-1] for row in rows))
    positions = {kind: np.flatnonzero(which == at) for at, kind in enumerate(order)}
    return Stack(
        h,
        outputs,
        jnp.concatenate([mixtures, h[None]]),
        jnp.concatenate([weights, last[None]]),
        {kind: jax.tree.map(lambda a, at=at: a[at], aux[kind]) for kind, at in positions.items()},
    )


def _branch(kind, layers, x):
    """The sublayers of one kind as a branch of a switch: all branches return every kind's aux."""

    def call(index, h, kind=kind):
        layer = layers[kind]
        params, inputs = jax.tree.map(lambda leaf: leaf[index], (layer.params, layer.inputs))
        return layer.apply(params, layer.norm(params)(h), inputs)

    def branch(index, h):
        y, aux = call(index, h)
        shapes = {other: jax.eval_shape(lambda other=other: call(0, x, other)[1]) for other in layers}
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return y, {**blank, kind: aux}

    return branch


def errors(got, want) -> dict[str, float]:
    """|got - want| / |want| of each leaf; a leaf that should be zero counts with its own norm."""
    got_leaves, structure = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, expected = jax.tree.flatten(want)
    assert structure == expected, f"trees differ: {structure} and {expected}"
    return {
        jax.tree_util.keystr(path): _relative(leaf, target)
        for (path, leaf), target in zip(got_leaves, want_leaves, strict=True)
    }


def _relative(got, want) -> float:
    assert got.shape == want.shape, f"shapes differ: {got.shape} and {want.shape}"
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all(), "not finite"
    assert np.isfinite(want).all(), "the oracle is not finite"
    return float(np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0))


def assert_close(got, want, tolerance: float):
    """Every leaf within the tolerance; the message names the worst."""
    found = errors(got, want)
    worst = max(found, key=found.get)
    assert found[worst] <= tolerance, f"{worst}: {found[worst]:.2e} > {tolerance:.0e}; all: {found}"
