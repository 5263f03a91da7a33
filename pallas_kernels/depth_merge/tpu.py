"""Phase 2 on TPU (Mosaic): one read of a block. Tokens lie on sublanes, the width on lanes, all on the VPU.

The score of the running sum, the merge with Phase 1 and the pre-norm need three walks over a row of D, which
is in VMEM once. Statistics of a token are stored `[8, tokens]` and turned into columns once per grid step.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.depth_merge.config import TILE, tpu_config
from pallas_kernels.depth_merge.vjp import Forward
from pallas_kernels.tpu import LANES, output, params

STATS = 8
"""Rows of statistics: score and rstd of the running sum, its share, rstd of the mixture."""


class Sizes(NamedTuple):
    """Static numbers of a call."""

    S: int
    tokens: int
    D: int
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
        grid_spec=_grid(size, args, outs, [pltpu.VMEM((TILE, LANES), jnp.float32)] * 2),
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
        grid_spec=_grid(size, args, outs, [pltpu.VMEM((TILE, LANES), jnp.float32)] * 2),
        out_shape=[output(a.shape, a.dtype, streams) for a, _ in outs.values()],
        input_output_aliases={1: 0, 2: 1, 3: 2},
        compiler_params=params(vmem),
        name="depth_merge_backward",
    )(_scalars(j, first, at), *[a for a, _ in args.values()])
    out = dict(zip(outs, out, strict=True))
    d_w, d_scale = (None if k not in out else jnp.sum(out[k], (0, 1)) for k in ("d_w", "d_scale"))
    return d_w, d_scale, out["d_p"][:tokens], out["d_o"][:, :tokens], out["d_lse"][:, :tokens]


def _forward_kernel(size, names_in, names_out, scalars, *refs):
    at, columns, results = _named((*names_in, *names_out), refs)
    columns[...] = _as_columns(at["lse"][pl.ds(scalars[0], 1), :])
    results[...] = jnp.zeros_like(results)

    def chunk(c, carry):
        rows = pl.ds(pl.multiple_of(c * size.chunk, size.chunk), size.chunk)
        load = functools.partial(_load, at, rows)
        if "y" in at:
            for cols in _tiles(size.D):
                at["p_new"][rows, cols] = (load("p", cols) + load("y", cols)).astype(at["p"].dtype)
        p = functools.partial(load, "p_new" if "y" in at else "p")
        square, raw = _row_sums(size, lambda cols: (p(cols) * p(cols), p(cols) * at["w"][:, cols]))
        rstd = lax.rsqrt(square / size.D + size.eps)
        score = raw * rstd
        share = jnp.where(scalars[1] == 1, 0.0, jax.nn.sigmoid(score - columns[rows, :1]))

        def mixture(cols):
            o = load("o", cols)
            return o + share * (p(cols) - o)

        norm = jnp.zeros_like(rstd)
        if "scale" in at:
            norm = lax.rsqrt(_row_sums(size, lambda cols: (mixture(cols) ** 2,))[0] / size.D + size.norm_eps)
        for cols in _tiles(size.D):
            h = mixture(cols)
            x = h * norm * at["scale"][:, cols] if "scale" in at else h
            at["x"][rows, cols] = x.astype(at["x"].dtype)
            if "mixture" in at:
                at["mixture"][rows, cols] = h.astype(at["mixture"].dtype)
        for k, stat in enumerate((score, rstd, share, norm)):
            results[rows, k : k + 1] = stat
        return carry

    lax.fori_loop(0, TILE // size.chunk, chunk, 0)
    at["stats"][...] = results[...].T[:STATS]


def _backward_kernel(size, names_in, names_out, scalars, *refs):
    names_out = tuple("out_" + n if n == "d_p" else n for n in names_out)
    at, columns, results = _named((*names_in, *names_out), refs)
    columns[...] = _as_columns(at["stats"][...])
    results[...] = jnp.zeros_like(results)

    @pl.when(pl.program_id(1) == 0)
    def _():
        for name in ("d_w", "d_scale"):
            if name in at:
                at[name][...] = jnp.zeros_like(at[name])

    def chunk(c, carry):
        rows = pl.ds(pl.multiple_of(c * size.chunk, size.chunk), size.chunk)
        load = functools.partial(_load, at, rows)
        score, rstd, share, norm = (columns[rows, k : k + 1] for k in range(4))

        def parts(cols):
            """p - o, the normed mixture and the cotangent of it."""
            o, far = load("o", cols), load("p", cols) - load("o", cols)
            hat = (o + share * far) * norm if "scale" in at else None
            return far, hat, load("d_x", cols) * (at["scale"][:, cols] if "scale" in at else 1.0)

        def needed(cols):
            far, hat, pull = parts(cols)
            other = (load("d_mixture", cols) * far,) if "d_mixture" in at else ()
            return (pull * far, *((pull * hat, hat * far) if "scale" in at else ()), *other)

        along, *rest = _row_sums(size, needed)
        mean = 0.0
        if "scale" in at:
            mean, skew = rest[0] / size.D, rest[1]
            along = norm * (along - mean * skew)
        along = along + rest[-1] if "d_mixture" in at else along
        d_score = share * (1.0 - share) * along
        c_w = d_score * rstd
        c_p = c_w * score * rstd / size.D
        for cols in _tiles(size.D):
            _, hat, pull = parts(cols)
            d_h = (pull - hat * mean) * norm if "scale" in at else pull
            d_h = d_h + load("d_mixture", cols) if "d_mixture" in at else d_h
            p, w = load("p", cols), at["w"][:, cols]
            d_p = share * d_h + c_w * w - c_p * p + load("d_p", cols)
            at["out_d_p"][rows, cols] = d_p.astype(at["out_d_p"].dtype)
            at["d_o"][rows, cols] = ((1.0 - share) * d_h).astype(at["d_o"].dtype)
            at["d_w"][:, cols] += _fold(c_w * p)
            if "scale" in at:
                at["d_scale"][:, cols] += _fold(hat * load("d_x", cols))
        results[rows, :1] = -d_score
        return carry

    lax.fori_loop(0, TILE // size.chunk, chunk, 0)
    mine = lax.broadcasted_iota(jnp.int32, at["d_lse"].shape, 0) == scalars[0]
    at["d_lse"][...] = jnp.where(mine, results[...].T[:1], at["d_lses"][...])


def _load(at, rows, name, cols):
    return at[name][rows, cols].astype(jnp.float32)


def _row_sums(size, terms):
    """Sums over D of each of `terms(columns)`, [rows, 1]: elementwise to 128 columns first."""
    totals, rest = None, None
    for cols in _tiles(size.D):
        part = terms(cols)
        if cols.size < LANES:
            rest = [jnp.sum(x, 1, keepdims=True) for x in part]
        else:
            totals = part if totals is None else [a + x for a, x in zip(totals, part, strict=True)]
    sums = None if totals is None else [jnp.sum(x, 1, keepdims=True) for x in totals]
    if sums is None or rest is None:
        return sums or rest
    return [a + b for a, b in zip(sums, rest, strict=True)]


def _fold(x):
    """[rows, n] to [8, n] by whole registers; the rest of the sum over tokens is left to the end."""
    return functools.reduce(jnp.add, [x[at : at + 8] for at in range(0, len(x), 8)])


def _tiles(D):
    return [pl.ds(at, min(LANES, D - at)) for at in range(0, D, LANES)]


def _as_columns(x):
    """[n, 128] statistics to [128, 128], one column each."""
    return jnp.concatenate([x, jnp.zeros((LANES - len(x), TILE), x.dtype)], 0).T


def _named(names, refs):
    return dict(zip(names, refs, strict=False)), refs[-2], refs[-1]


def _given(table):
    return {name: entry for name, entry in table.items() if entry[0] is not None}


def _sizes(direction, mixtures, eps, norm_eps):
    S, tokens, D = mixtures.shape
    steps = math.ceil(tokens / TILE)
    chunk, cores, vmem = tpu_config(direction, D, mixtures.dtype, steps)
    return Sizes(S, tokens, D, chunk, cores, steps // cores, eps, norm_eps), vmem


def _padded(*arrays):
    """To whole tiles of tokens, the last axis but one: a copy, for odd numbers of tokens only."""
    short = -next(a for a in arrays if a is not None).shape[-2] % TILE
    if not short:
        return arrays
    return [None if a is None else jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, short), (0, 0)]) for a in arrays]


def _scalars(*numbers):
    return jnp.stack([jnp.asarray(n, jnp.int32) for n in numbers])


def _grid(size, args, outs, scratch):
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(size.cores, size.steps),
        in_specs=[spec for _, spec in args.values()],
        out_specs=[spec for _, spec in outs.values()],
        scratch_shapes=scratch,
    )


def _row(size, hide=False):
    """128 tokens a step; `hide`: of the first read of a block, which has no running sum, one tile a core."""

    def index(c, i, scalars):
        at = c * size.steps + i
        return (jnp.where(scalars[1] == 1, c * size.steps, at) if hide else at, 0)

    return pl.BlockSpec((TILE, size.D), index)


def _stream(size, hide):
    """Row `at` of the running sums, by tiles as `_row`."""
    row = _row(size, hide).index_map
    return pl.BlockSpec((None, TILE, size.D), lambda c, i, scalars: (scalars[2], *row(c, i, scalars)))


def _row_of_j(size):
    return pl.BlockSpec((None, TILE, size.D), lambda c, i, scalars: (scalars[0], c * size.steps + i, 0))


def _stat(size, rows):
    return pl.BlockSpec((rows, TILE), lambda c, i, scalars: (0, c * size.steps + i))


def _whole(size):
    return pl.BlockSpec((1, size.D), lambda c, i, scalars: (0, 0))
