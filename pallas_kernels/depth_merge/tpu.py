"""Phase 2 on TPU (Mosaic): one read of a block. Tokens lie on sublanes, the width on lanes, all on the VPU.

A row of D is in VMEM once and walked twice: for sums, of all tokens of a grid step, and to write. Statistics
of a token are stored `[8, tokens]` and turned into columns once per grid step.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.depth_merge.config import tpu_config
from pallas_kernels.depth_merge.vjp import Forward
from pallas_kernels.tpu import LANES, output, params

STATS = 8
"""Rows of statistics: score and rstd of the running sum, its share, rstd of the mixture, and how far the
normed mixture points from `o` to `p`."""


class Sizes(NamedTuple):
    """Static numbers of a call."""

    S: int
    tokens: int
    D: int
    tile: int
    chunk: int
    cores: int
    steps: int
    eps: float
    norm_eps: float


def forward(
    w, scale, mixtures, lse, streams, at, j, first, y=None, *, eps, norm_eps, keep_mixture
) -> Forward:
    """See vjp.py for shapes. Rows of `mixtures` and `streams` other than `j` and `at` are not touched."""
    tokens, (mixtures, lse, streams, y) = streams.shape[1], _padded(mixtures, lse[..., None], streams, y)
    size, vmem = _sizes("forward", mixtures, eps, norm_eps)
    row, like = _row(size), jax.ShapeDtypeStruct(streams.shape[1:], streams.dtype)
    args = {"p": (streams, _stream(size, y is None)), "y": (y, row), "o": (mixtures, _row_of_j(size))}
    args |= {"lse": (lse[..., 0], _stat(size, size.S)), "w": (w[None], _whole(size))}
    args |= {"scale": (None if scale is None else scale[None], _whole(size))}
    outs = {"x": (like, row), "mixture": (like if keep_mixture else None, row), "p_new": (y, row)}
    outs |= {"stats": (jax.ShapeDtypeStruct((STATS, size.tokens), jnp.float32), _stat(size, STATS))}
    args, outs = _given(args), _given(outs)
    out = pl.pallas_call(
        functools.partial(_forward_kernel, size, tuple(args), tuple(outs)),
        grid_spec=_grid(size, args, outs),
        out_shape=[output(a.shape, a.dtype, streams) for a, _ in outs.values()],
        input_output_aliases={2: list(outs).index("p_new")} if y is not None else {},
        compiler_params=params(vmem),
        name="depth_merge_forward",
    )(_scalars(j, first, at), *[a for a, _ in args.values()])
    out = {k: v if k == "stats" else v[:tokens] for k, v in zip(outs, out, strict=True)}
    return Forward(out["x"], out.get("mixture"), out.get("p_new"), out["stats"])


def backward(w, scale, mixtures, lse, streams, at, j, first, stats, *cotangents, eps, norm_eps):
    """From those of x, mixture, stream, mixtures, lse: dw, dscale; the last three with this read's part."""
    d_x, d_mixture, d_stream, d_mixtures, d_lse = cotangents
    tokens = streams.shape[1]
    mixtures, streams, d_x, d_mixture, d_stream = _padded(mixtures, streams, d_x, d_mixture, d_stream)
    d_mixtures, d_lse = _padded(d_mixtures, d_lse[..., None])
    size, vmem = _sizes("backward", mixtures, eps, norm_eps)
    row, d_p, per_core = (
        _row(size),
        _row(size, hide=True),
        pl.BlockSpec((None, 8, size.D), lambda c, i, n: (c, 0, 0)),
    )
    args = {"d_p": (d_stream, d_p), "d_os": (d_mixtures, pl.BlockSpec(memory_space=pl.ANY))}
    args |= {"d_lses": (d_lse[..., 0], _stat(size, size.S)), "p": (streams, _stream(size, True))}
    args |= {"o": (mixtures, _row_of_j(size)), "d_x": (d_x, row), "d_mixture": (d_mixture, row)}
    args |= {"stats": (stats, _stat(size, STATS)), "w": (w[None], _whole(size))}
    args |= {"scale": (None if scale is None else scale[None], _whole(size))}
    sums = jax.ShapeDtypeStruct((size.cores, 8, size.D), jnp.float32)
    outs = {"d_p": (d_stream, d_p), "d_o": (d_mixtures, _row_of_j(size))}
    outs |= {"d_lse": (d_lse[..., 0], _stat(size, size.S)), "d_w": (sums, per_core)}
    outs |= {"d_scale": (None if scale is None else sums, per_core)}
    args, outs = _given(args), _given(outs)
    out = pl.pallas_call(
        functools.partial(_backward_kernel, size, tuple(args), tuple(outs)),
        grid_spec=_grid(size, args, outs),
        out_shape=[output(a.shape, a.dtype, streams) for a, _ in outs.values()],
        input_output_aliases={1: 0, 2: 1, 3: 2},
        compiler_params=params(vmem),
        name="depth_merge_backward",
    )(_scalars(j, first, at), *[a for a, _ in args.values()])
    out = dict(zip(outs, out, strict=True))
    d_w, d_scale = (None if k not in out else jnp.sum(out[k], (0, 1)) for k in ("d_w", "d_scale"))
    return d_w, d_scale, out["d_p"][:tokens], out["d_o"][:, :tokens], out["d_lse"][:, :tokens]


def _forward_kernel(size, names_in, names_out, scalars, *refs):
    at, columns, sums = _named((*names_in, *names_out), refs)
    normed = "scale" in at
    p_name = "p_new" if "y" in at else "p"

    def add_up(rows):
        load = functools.partial(_load, at, rows)
        totals = [0.0] * (4 if normed else 2)
        for cols in _tiles(size.D):
            p = load("p", cols)
            if "y" in at:
                at["p_new"][rows, cols] = (p + load("y", cols)).astype(at["p"].dtype)
                p = load("p_new", cols)
            terms = [p * p, p * at["w"][:, cols]]
            if normed:
                o = load("o", cols)
                terms += [p * o, o * o]
            totals = [a + _widen(x) for a, x in zip(totals, terms, strict=True)]
        for k, total in enumerate(totals):
            sums[k, rows, :] = total

    _each_chunk(size, add_up)
    square, raw, *rest = (_over_width(sums[k]) for k in range(4 if normed else 2))
    rstd = lax.rsqrt(square / size.D + size.eps)
    score = raw * rstd
    share = jax.nn.sigmoid(score - at["lse"][pl.ds(scalars[0], 1), :])
    share = jnp.where(scalars[1] == 1, 0.0, share)
    other, norm, skew = 1.0 - share, jnp.ones_like(share), jnp.zeros_like(share)
    if normed:
        across, own = rest
        of_h = other * other * own + 2.0 * share * other * across + share * share * square
        norm = lax.rsqrt(jnp.maximum(of_h, 0.0) / size.D + size.norm_eps)
        skew = norm * (other * (across - own) + share * (square - across))
    at["stats"][...] = _stacked(score, rstd, share, norm, skew)
    columns[...] = _as_columns(_stacked(other, share, other * norm, share * norm))

    def write(rows):
        load = functools.partial(_load, at, rows)
        of_o, of_p, x_of_o, x_of_p = (columns[rows, k : k + 1] for k in range(4))
        for cols in _tiles(size.D):
            o, p = load("o", cols), load(p_name, cols)
            x = o * x_of_o + p * x_of_p
            x = x * at["scale"][:, cols] if normed else x
            at["x"][rows, cols] = x.astype(at["x"].dtype)
            if "mixture" in at:
                at["mixture"][rows, cols] = (o * of_o + p * of_p).astype(at["mixture"].dtype)

    _each_chunk(size, write)


def _backward_kernel(size, names_in, names_out, scalars, *refs):
    names_out = tuple("out_" + n if n == "d_p" else n for n in names_out)
    at, columns, sums = _named((*names_in, *names_out), refs)
    normed, kept = "scale" in at, "d_mixture" in at

    @pl.when(pl.program_id(1) == 0)
    def _():
        for name in ("d_w", "d_scale"):
            if name in at:
                at[name][...] = jnp.zeros_like(at[name])

    def pull(load, cols):
        return load("d_x", cols) * at["scale"][:, cols] if normed else load("d_x", cols)

    def add_up(rows):
        load = functools.partial(_load, at, rows)
        totals = [0.0] * (4 if kept else 2)
        for cols in _tiles(size.D):
            d_x, p, o = pull(load, cols), load("p", cols), load("o", cols)
            d_h = load("d_mixture", cols) if kept else None
            terms = [d_x * p, d_x * o, *((d_h * p, d_h * o) if kept else ())]
            totals = [a + _widen(x) for a, x in zip(totals, terms, strict=True)]
        for k, total in enumerate(totals):
            sums[k, rows, :] = total

    _each_chunk(size, add_up)
    score, rstd, share, norm, skew = (at["stats"][k : k + 1, :] for k in range(5))
    along_p, along_o, *rest = (_over_width(sums[k]) for k in range(4 if kept else 2))
    other, along, mean = 1.0 - share, along_p - along_o, jnp.zeros_like(share)
    if normed:
        mean = norm * (other * along_o + share * along_p) / size.D
        along = norm * (along - mean * skew)
    along = along + rest[0] - rest[1] if kept else along
    d_score = share * other * along
    c_w = d_score * rstd
    c_p = c_w * score * rstd / size.D
    shrink = norm * norm * mean
    coefficients = share, other, norm, shrink * other, shrink * share, c_w, c_p, other * norm
    columns[...] = _as_columns(_stacked(*coefficients, share * norm))
    mine = lax.broadcasted_iota(jnp.int32, at["d_lse"].shape, 0) == scalars[0]
    at["d_lse"][...] = jnp.where(mine, -d_score, at["d_lses"][...])

    def write(rows):
        load = functools.partial(_load, at, rows)
        of_p, of_o, norm, less_o, less_p, c_w, c_p, hat_o, hat_p = (
            columns[rows, k : k + 1] for k in range(9)
        )
        for cols in _tiles(size.D):
            d_h, p, o = pull(load, cols), load("p", cols), load("o", cols)
            if normed:
                d_h = d_h * norm - o * less_o - p * less_p
                at["d_scale"][:, cols] += _fold((o * hat_o + p * hat_p) * load("d_x", cols))
            d_h = d_h + load("d_mixture", cols) if kept else d_h
            pulled = p * c_w
            d_p = load("d_p", cols) + d_h * of_p + at["w"][:, cols] * c_w - p * c_p
            at["out_d_p"][rows, cols] = d_p.astype(at["out_d_p"].dtype)
            at["d_o"][rows, cols] = (d_h * of_o).astype(at["d_o"].dtype)
            at["d_w"][:, cols] += _fold(pulled)

    _each_chunk(size, write)


def _each_chunk(size, body):
    """Some tokens at a time; what is done with sums over a row waits for those of all tokens, so that only
    one reduction over lanes, and its latency, is paid for."""

    def step(c, carry):
        body(pl.ds(pl.multiple_of(c * size.chunk, size.chunk), size.chunk))
        return carry

    lax.fori_loop(0, size.tile // size.chunk, step, 0)


def _load(at, rows, name, cols):
    return at[name][rows, cols].astype(jnp.float32)


def _widen(x):
    """To 128 columns: the last ones of a row may be fewer."""
    short = LANES - x.shape[1]
    return jnp.concatenate([x, jnp.zeros((len(x), short), x.dtype)], 1) if short else x


def _over_width(partial):
    """[tokens, 128 partial sums] to sums, [1, tokens]."""
    return jnp.sum(partial.T, 0, keepdims=True)


def _stacked(*rows):
    """[1, tokens] each, as statistics [8 or 16, tokens]."""
    short = -len(rows) % STATS
    return jnp.concatenate([*rows, *[jnp.zeros_like(rows[0])] * short], 0)


def _fold(x):
    """[rows, n] to [8, n] by whole registers; the rest of the sum over tokens is left to the end."""
    return functools.reduce(jnp.add, [x[at : at + 8] for at in range(0, len(x), 8)])


def _tiles(D):
    return [pl.ds(at, min(LANES, D - at)) for at in range(0, D, LANES)]


def _as_columns(x):
    """[n, tokens] statistics to [tokens, 128], one column each."""
    return jnp.concatenate([x, jnp.zeros((LANES - len(x), x.shape[1]), x.dtype)], 0).T


def _named(names, refs):
    return dict(zip(names, refs, strict=False)), refs[-2], refs[-1]


def _given(table):
    return {name: entry for name, entry in table.items() if entry[0] is not None}


def _sizes(direction, mixtures, eps, norm_eps):
    S, tokens, D = mixtures.shape
    tile, chunk, cores, vmem = tpu_config(direction, D, mixtures.dtype, tokens)
    return Sizes(S, tokens, D, tile, min(chunk, tile), cores, tokens // tile // cores, eps, norm_eps), vmem


def _padded(*arrays):
    """To whole tiles of tokens, the last axis but one: a copy, for odd numbers of tokens only."""
    short = -next(a for a in arrays if a is not None).shape[-2] % LANES
    if not short:
        return arrays
    return [None if a is None else jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, short), (0, 0)]) for a in arrays]


def _scalars(*numbers):
    return jnp.stack([jnp.asarray(n, jnp.int32) for n in numbers])


def _grid(size, args, outs):
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(size.cores, size.steps),
        in_specs=[spec for _, spec in args.values()],
        out_specs=[spec for _, spec in outs.values()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in _scratch(size.tile)],
    )


def _scratch(tokens):
    """Columns of statistics, and partial sums over a row."""
    return (tokens, LANES), (4, tokens, LANES)


def _row(size, hide=False):
    """A tile a step; `hide`: of the first read of a block, which has no running sum, one tile a core."""

    def index(c, i, scalars):
        at = c * size.steps + i
        return (jnp.where(scalars[1] == 1, c * size.steps, at) if hide else at, 0)

    return pl.BlockSpec((size.tile, size.D), index)


def _stream(size, hide):
    """Row `at` of the running sums, by tiles as `_row`."""
    row = _row(size, hide).index_map
    return pl.BlockSpec((None, size.tile, size.D), lambda c, i, scalars: (scalars[2], *row(c, i, scalars)))


def _row_of_j(size):
    return pl.BlockSpec((None, size.tile, size.D), lambda c, i, scalars: (scalars[0], c * size.steps + i, 0))


def _stat(size, rows):
    return pl.BlockSpec((rows, size.tile), lambda c, i, scalars: (0, c * size.steps + i))


def _whole(size):
    return pl.BlockSpec((1, size.D), lambda c, i, scalars: (0, 0))
