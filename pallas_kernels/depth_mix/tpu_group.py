"""What the TPU kernels of Phase 1 do to one group of tokens: products on the MXU, and the softmax between.

A group is `[R * group, D]`, as it lies in VMEM; `size` is `tpu.Sizes`. See tpu.py.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import LANES, NN, NT, dot, upper

WIDTH = 512
"""Columns of a mixture that are computed at once."""


def pull_groups(size, some, held, add, visible, w, d_mixture, d_lse, stats, d_w):
    """Cotangents of some groups, each stage for all of them: what waits in one is hidden by the others.

    `held` are references to the sources of each, and to where the cotangents of its sources go."""
    d_out = [_of_group(size, d_mixture, q) for q in some]
    products = [dot(d, _rows(v), NT) for d, (v, _) in zip(d_out, held, strict=True)]
    found = [
        _through_softmax(size, visible, stats.at[q], p, d_lse, q) for q, p in zip(some, products, strict=True)
    ]
    for d, (v, total), (weights, pulls, shrink) in zip(d_out, held, found, strict=True):
        _pull(size, weights, pulls, shrink, d, w, v, add, total)
    parts = []
    for (v, _), (_, pulls, _) in zip(held, found, strict=True):
        pulls = jnp.concatenate(pulls, 1)[:, : size.R * size.group]
        parts.append(_two_halves(pulls, _rows(v)))
    d_w[...] += functools.reduce(jnp.add, parts)


def _through_softmax(size, visible, stats, products, d_lse, q):
    """Weights, `pulls` (cotangents of w . v) and `shrink` (those of rstd, of which V's norm takes its part).

    Of group q, from `products` dO V^T [S * group, R * group]; lists by registers of (source, token)."""
    stat = [stats[:, pl.ds(b * LANES, LANES)] for b in range(size.lanes // LANES)]
    scores, rstd = [s[: size.S8] for s in stat], [s[size.S : size.S + 1] for s in stat]
    weights, _ = softmax(
        size, [jnp.where(seen, s, -jnp.inf) for seen, s in zip(visible, scores, strict=True)]
    )
    d_weights = _traces(size, products)
    own = jnp.where(lane((size.S8, LANES)) // size.group == q, d_lse[...], 0.0)  # d_lse is the tile's
    center = _over_sources(size, sum(a * d for a, d in zip(weights, d_weights, strict=True)), jnp.add)
    center = center - _over_sources(size, own, jnp.add)
    d_scores = [a * (d - center) for a, d in zip(weights, d_weights, strict=True)]
    pulls = [d * r for d, r in zip(d_scores, rstd, strict=True)]
    shrink = [
        jnp.sum(p * s, 0, keepdims=True) * r / size.D for p, s, r in zip(pulls, scores, rstd, strict=True)
    ]
    return weights, pulls, shrink


def _of_group(size, d_mixture, q):
    """Cotangents of a group's mixtures, [S * group, D]."""
    rows = pl.ds(pl.multiple_of(q * size.group, size.group), size.group)
    return jnp.concatenate([d_mixture[s, rows, :] for s in range(size.S)], 0)


def scores(size, w, v):
    """Scores [S8, lanes] and rstd [8, lanes] of one group; lanes are (source, token)."""
    raw, square = _both_halves(dot(w[...], _rows(v), NT), size.S8), _squares(v)
    rstd = lax.rsqrt(square / size.D + size.eps)
    return _widen(size, raw * jnp.concatenate([rstd] * (size.S8 // 8), 0)), _widen(size, rstd)


def with_rstd(size, scores, rstd):
    """What is kept of a group: rstd takes the row after the scores."""
    rows = size.stats[0]
    scores = scores if rows == size.S8 else jnp.concatenate([scores, rstd], 0)
    here = lax.broadcasted_iota(jnp.int32, scores.shape, 0) == size.S
    return jnp.where(here, jnp.concatenate([rstd] * (rows // 8), 0), scores)


def _squares(v):
    """sum_d v^2 of the rows of `v`, along lanes [8, rows]: to 128 columns first, the rest by a product."""
    D, whole = v.shape[-1], v.shape[-1] // LANES * LANES
    tiles = [_rows(v, at, LANES).astype(jnp.float32) for at in range(0, whole, LANES)]
    parts = [functools.reduce(jnp.add, [t * t for t in tiles])] if tiles else []
    if whole < D:
        tail = _rows(v, whole, D - whole).astype(jnp.float32)
        parts.append(tail * tail)
    halves = [h for p in parts for h in ((p,) if v.dtype == jnp.float32 else _halves(p))]
    return sum(dot(jnp.ones((16, h.shape[1]), h.dtype), h, NT) for h in halves)[:8]


def softmax(size, scores):
    """Weights over all sources, and log-sum-exp; lanes are (source, token), so tokens repeat."""
    top = _over_sources(size, functools.reduce(jnp.maximum, scores), jnp.maximum)
    e = [jnp.exp(s - top) for s in scores]
    total = _over_sources(size, functools.reduce(jnp.add, e), jnp.add)
    return [x / total for x in e], top + jnp.log(total)


def _over_sources(size, x, op):
    """Reduce a register over its sources; the result stands at each of them."""
    shift = LANES // 2
    while shift >= size.group:
        x, shift = op(x, pltpu.roll(x, shift, 1)), shift // 2
    return x


def _diagonal(size, rows):
    """[len(rows) * group, width of a row]: of each row, the diagonal of every source's square."""
    keep = _on_diagonal(size, rows[0].shape[1])
    return jnp.concatenate([jnp.where(keep, jnp.broadcast_to(row, keep.shape), 0.0) for row in rows], 0)


def _on_diagonal(size, width):
    token = lax.broadcasted_iota(jnp.int32, (size.group, width), 0)
    return lane(token.shape) % size.group == token


def _traces(size, products):
    """The inverse of `_diagonal`: [S * group, R * group] to lists of [S8, 128]."""
    rows = [_widen(size, products[s * size.group : (s + 1) * size.group]) for s in range(size.S)]
    keep = _on_diagonal(size, size.lanes)
    sums = [jnp.sum(jnp.where(keep, row, 0.0), 0, keepdims=True) for row in rows]
    sums += [jnp.zeros((size.S8 - size.S, size.lanes), jnp.float32)] if size.S8 > size.S else []
    whole = jnp.concatenate(sums, 0)
    return [whole[:, b : b + LANES] for b in range(0, size.lanes, LANES)]


def mix(size, weights, v, mixture, q):
    """Mixtures of one group, some columns at a time.

    The two halves of a weight stand side by side, and the sources twice, or one below the other."""
    rows, G = pl.ds(pl.multiple_of(q * size.group, size.group), size.group), size.group
    weights = weights[:, : size.R * G]
    parts = [weights] if v.dtype == jnp.float32 else [h.astype(jnp.float32) for h in _halves(weights)]
    parts, copies = ([jnp.concatenate(parts, 1)], len(parts)) if size.beside else (parts, 1)
    left = _diagonal(size, [part[s : s + 1] for s in range(size.S) for part in parts]).astype(v.dtype)
    for at, width in _columns(size.D):
        out = dot(left, jnp.concatenate([_rows(v, at, width)] * copies, 0), NN)
        for s in range(size.S):
            of = [out[k * G : (k + 1) * G] for k in range(s * len(parts), (s + 1) * len(parts))]
            mixture[s, rows, pl.ds(at, width)] = sum(of).astype(mixture.dtype)


def _pull(size, weights, pulls, shrink, d_out, w, v, add, out):
    """Cotangents of the sources of one group: A^T dO + C^T W - e V, and what later reads have added.

    W is two halves, one below the other, and meets C twice; A and C become two, as in `_two_halves`."""
    whole = jnp.concatenate(weights, 1)[:, : size.R * size.group]
    pulls = jnp.concatenate(pulls, 1)[:, : size.R * size.group]
    left = [_diagonal(size, [whole[s : s + 1] for s in range(size.S)]), *[pulls] * (len(w) // size.S8)]
    left = jnp.concatenate(left, 0).T
    short = -len(shrink) % 8
    columns = jnp.concatenate([*shrink, *[jnp.zeros((1, LANES), jnp.float32)] * short], 0).T
    shrink = jnp.concatenate([columns[:, b : b + 1] for b in range(size.lanes // LANES)], 0)
    shrink = shrink[: size.R * size.group]
    for at, width in _columns(size.D):
        cols = pl.ds(at, width)
        right = jnp.concatenate([d_out[:, at : at + width], w[:, cols]], 0)
        total = _two_halves(left, right) - shrink * _rows(v, at, width).astype(jnp.float32)
        if add:
            total = total + _rows(out, at, width).astype(jnp.float32)
        out[:, :, cols] = total.astype(out.dtype).reshape(size.R, size.group, width)


def _halves(x):
    """fp32 as two bf16: the upper 16 bits, exactly, and 8 more."""
    high = upper(x)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _both_halves(product, rows):
    """Adds what the two halves of the left side gave."""
    return product if len(product) == rows else product[:rows] + product[rows:]


def _two_halves(x, v):
    left = x if v.dtype == jnp.float32 else jnp.concatenate(_halves(x), 0)
    return _both_halves(dot(left, v, NN), len(x))


def _widen(size, x):
    """To whole registers of lanes."""
    short = size.lanes - x.shape[1]
    return jnp.concatenate([x, jnp.zeros((len(x), short), x.dtype)], 1) if short else x


def visible_lanes(size, counts):
    """Which lanes hold a source that may be seen, for each register."""
    masks = []
    for b in range(size.lanes // LANES):
        source, seen, at = (lane((size.S8, LANES)) + b * LANES) // size.group, None, 0
        for k, rows in enumerate(size.rows):
            here = (source >= at) & (source < at + (counts[k] if size.counted else rows))
            seen, at = here if seen is None else seen | here, at + rows
        masks.append(seen)
    return masks


def lane(shape):
    """Of each element."""
    return lax.broadcasted_iota(jnp.int32, shape, 1)


def _rows(ref, at=0, width=None):
    """Columns of all (source, token) of a group, [R * group, width]."""
    width = ref.shape[-1] if width is None else width
    return ref[:, :, pl.ds(at, width)].reshape(-1, width)


def _columns(D):
    """Pieces of a row, (first, width): an even number of registers, for an MXU 256 wide, but for the last."""
    return [(at, min(WIDTH, D - at)) for at in range(0, D, WIDTH)]
