"""Phase 2 on TPU (Mosaic): one read of a block. Tokens lie on sublanes, the width on lanes.

A row of D is in VMEM once and walked twice: for sums over it, and to write. Forward, the MXU takes three of
the four sums of bf16, of some tokens beside the writing of those before. Backward, the first walk leaves
fp32 for the second, which goes over columns. Statistics of a token are `[8, tokens]`. README.md derives it.
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
from pallas_kernels.tpu import LANES, NN, NT, dot, output, params, thirds

ROWS = 32
"""Tokens that are worked on at once."""
STATS = 8
"""Rows of statistics: score and rstd of the running sum, its share, rstd of the mixture, and how far the
normed mixture points from `o` to `p`."""


class Sizes(NamedTuple):
    """Static numbers of a call."""

    S: int
    tokens: int
    D: int
    tile: int
    columns: int
    square: int
    unpacked: bool
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
    args |= {
        "lse": (lse[..., 0], _stat(size, size.S)),
        **_vectors(w=_pieces(w[None], streams.dtype, 16), scale=scale),
    }
    outs = {"x": (like, row), "mixture": (like if keep_mixture else None, row), "p_new": (y, row)}
    outs |= {"stats": (jax.ShapeDtypeStruct((STATS, size.tokens), jnp.float32), _stat(size, STATS))}
    args, outs = _given(args), _given(outs)
    out = pl.pallas_call(
        functools.partial(_forward_kernel, size, tuple(args), tuple(outs)),
        grid_spec=_grid(size, args, outs, [(size.tile, LANES)]),
        out_shape=[output(a.shape, a.dtype, streams) for a, _ in outs.values()],
        input_output_aliases={2: list(outs).index("p_new")} if y is not None else {},
        compiler_params=params(vmem),
        name="depth_merge_forward",
    )(_scalars(j, at, first), *[a for a, _ in args.values()])
    out = {k: v if k == "stats" else v[:tokens] for k, v in zip(outs, out, strict=True)}
    return Forward(out["x"], out.get("mixture"), out.get("p_new"), out["stats"])


def backward(w, scale, mixtures, lse, streams, at, j, first, stats, *cotangents, eps, norm_eps):
    """From those of x, mixture, stream, mixtures, lse: dw, dscale; the last three with this read's part."""
    d_x, d_mixture, d_stream, d_mixtures, d_lse = cotangents
    tokens = streams.shape[1]
    mixtures, streams, d_x, d_mixture, d_stream = _padded(mixtures, streams, d_x, d_mixture, d_stream)
    d_mixtures, d_lse = _padded(d_mixtures, d_lse[..., None])
    size, vmem = _sizes("backward", mixtures, eps, norm_eps)
    row, d_p = _row(size), _row(size, hide=True)
    per_core = pl.BlockSpec((None, 8, size.D), lambda c, i, n: (c, 0, 0))
    args = {"d_ps": (d_stream, d_p), "d_os": (d_mixtures, pl.BlockSpec(memory_space=pl.ANY))}
    args |= {"d_lses": (d_lse[..., 0], _stat(size, size.S)), "p": (streams, _stream(size, True))}
    args |= {"o": (mixtures, _row_of_j(size)), "d_x": (d_x, row), "d_mixture": (d_mixture, row)}
    args |= {"stats": (stats, _stat(size, STATS)), **_vectors(w=w, scale=scale)}
    sums = jax.ShapeDtypeStruct((size.cores, 8, size.D), jnp.float32)
    outs = {"d_p": (d_stream, d_p), "d_o": (d_mixtures, _row_of_j(size))}
    outs |= {"d_lse": (d_lse[..., 0], _stat(size, size.S)), "d_w": (sums, per_core)}
    outs |= {"d_scale": (None if scale is None else sums, per_core)}
    args, outs = _given(args), _given(outs)
    # Coefficients of a token on all lanes, and three rows of it in fp32 if there is room.
    scratch = [(STATS, size.tile, LANES), *([(3, size.tile, size.D)] if size.unpacked else [])]
    out = pl.pallas_call(
        functools.partial(_backward_kernel, size, tuple(args), tuple(outs)),
        grid_spec=_grid(size, args, outs, scratch),
        out_shape=[output(a.shape, a.dtype, streams) for a, _ in outs.values()],
        input_output_aliases={1: 0, 2: 1, 3: 2},
        compiler_params=params(vmem),
        name="depth_merge_backward",
    )(_scalars(j, at, first), *[a for a, _ in args.values()])
    out = dict(zip(outs, out, strict=True))
    d_w, d_scale = (None if k not in out else jnp.sum(out[k], (0, 1)) for k in ("d_w", "d_scale"))
    return d_w, d_scale, out["d_p"][:tokens], out["d_o"][:, :tokens], out["d_lse"][:, :tokens]


def _forward_kernel(size, names_in, names_out, scalars, *refs):
    at = dict(zip((*names_in, *names_out), refs, strict=False))
    normed, columns = "scale" in at, refs[-1]
    at["sum"] = at["p_new"] if "y" in at else at["p"]
    lse = at["lse"][pl.ds(scalars[0], 1), :]

    def add_up(rows):
        for cols in _tiles(size.D) if "y" in at else ():
            p = _load(at, rows, "p", cols) + _load(at, rows, "y", cols)
            at["p_new"][rows, cols] = p.astype(at["p_new"].dtype)
        pairs = (("o", "o"),) if normed else ()
        if at["sum"].dtype == jnp.bfloat16:
            return _products(size, at, rows, normed) + _sums(size, at, rows, pairs)
        across = (("sum", "o"),) if normed else ()
        return _sums(size, at, rows, (("sum", "sum"), ("sum", "w"), *across, *pairs))

    def weigh(rows, square, raw, across=None, own=None):
        rstd = lax.rsqrt(square / size.D + size.eps)
        score = raw * rstd
        share = jax.nn.sigmoid(score - lse[:, rows.start : rows.start + LANES])
        share = share if _first(scalars) is None else jnp.where(_first(scalars), 0.0, share)
        other, norm, skew = 1.0 - share, jnp.ones_like(share), jnp.zeros_like(share)
        if normed:
            of_h = other * other * own + 2.0 * share * other * across + share * share * square
            norm = lax.rsqrt(jnp.maximum(of_h, 0.0) / size.D + size.norm_eps)
            skew = norm * (other * (across - own) + share * (square - across))
        at["stats"][:, rows] = _stacked(score, rstd, share, norm, skew)
        columns[rows, :] = _as_columns(_stacked(other, share, other * norm, share * norm))

    def write(rows):
        load = functools.partial(_load, at, rows)
        of_o, of_p, x_of_o, x_of_p = (columns[rows, k : k + 1] for k in range(4))
        for cols in _tiles(size.D):
            o, p = load("o", cols), load("sum", cols)
            x = o * x_of_o + p * x_of_p
            x = x * at["scale"][:, cols] if normed else x
            at["x"][rows, cols] = x.astype(at["x"].dtype)
            if "mixture" in at:
                at["mixture"][rows, cols] = (o * of_o + p * of_p).astype(at["mixture"].dtype)

    # The products of some tokens stand before the writing of the last ones, so that both may run at once.
    groups = [pl.ds(first, LANES) for first in range(0, size.tile, LANES)]
    for before, rows in zip([None, *groups], [*groups, None], strict=True):
        sums = add_up(rows) if rows else ()
        for part in _parts(before) if before else ():
            write(part)
        if rows:
            weigh(rows, *sums)


def _backward_kernel(size, names_in, names_out, scalars, *refs):
    at = dict(zip((*names_in, *names_out), refs, strict=False))
    spread, *wide = refs[len(at) :]
    at |= {"wide": wide[0]} if wide else {}

    @pl.when(pl.program_id(1) == 0)
    def _():
        for name in ("d_w", "d_scale"):
            if name in at:
                at[name][...] = jnp.zeros_like(at[name])

    found = []
    for group in _parts(pl.ds(0, size.tile), LANES):
        sums = zip(*(_along(size, at, rows) for rows in _parts(group)), strict=True)
        found.append([_over_width(jnp.concatenate(parts, 0)) for parts in sums])
    sums = (jnp.concatenate(rows, 1) for rows in zip(*found, strict=True))
    c_w, coefficients = _through_gate(size, at, scalars, *sums)
    _spread(spread, coefficients)
    left = _pieces(c_w, at["p"].dtype)

    write = functools.partial(_write, size, at, spread, left, len(coefficients))

    def step(c, carry):
        write(pl.ds(pl.multiple_of(c * size.columns, size.columns), size.columns))
        return carry

    lax.fori_loop(0, size.D // size.columns, step, 0)
    if rest := size.D % size.columns:
        write(pl.ds(size.D - rest, rest))


def _along(size, at, rows):
    """The first walk: t . p and t . o, and those of d_mixture, 128 partial sums each."""
    load = functools.partial(_load, at, rows)
    totals = [0.0] * (4 if "d_mixture" in at else 2)
    for cols in _tiles(size.D):
        d_x, p, o = load("d_x", cols), load("p", cols), load("o", cols)
        for k, x in enumerate((d_x, p, o) if "wide" in at else ()):
            at["wide"][k, rows, cols] = x
        pull = d_x * at["scale"][:, cols] if "scale" in at else d_x
        d_h = load("d_mixture", cols) if "d_mixture" in at else None
        terms = [pull * p, pull * o, *((d_h * p, d_h * o) if d_h is not None else ())]
        totals = [a + _narrow(x) for a, x in zip(totals, terms, strict=True)]
    return totals


def _through_gate(size, at, scalars, along_p, along_o, *rest):
    """Row j of d_lse; the cotangent of w . p, and the coefficients of a token in the second walk."""
    score, rstd, share, norm, skew = (at["stats"][k : k + 1, :] for k in range(5))
    other, along, mean = 1.0 - share, along_p - along_o, jnp.zeros_like(share)
    if "scale" in at:
        mean = norm * (other * along_o + share * along_p) / size.D
        along = norm * (along - mean * skew)
    along = along + rest[0] - rest[1] if rest else along
    d_score = share * other * along
    c_w = d_score * rstd
    c_p = c_w * score * rstd / size.D
    mine = lax.broadcasted_iota(jnp.int32, at["d_lse"].shape, 0) == scalars[0]
    at["d_lse"][...] = jnp.where(mine, -d_score, at["d_lses"][...])
    return c_w, (other * norm, share * norm, mean, c_w, c_p, *((other, share) if rest else ()))


def _write(size, at, spread, left, count, cols):
    """The second walk, of some columns: d_w, d_o, d_p and d_scale. `left` is c_w, as pieces."""
    at["d_w"][:, cols] += dot(left, at["p"][:, cols], NN)
    d_scale = 0.0
    for rows in _parts(pl.ds(0, size.tile), 16):
        load = functools.partial(_load, at, rows)
        of_o, of_p, mean, c_w, c_p, *plain = (_repeated(spread[k, rows, :], cols.size) for k in range(count))
        row = at["wide"][:, rows, cols] if "wide" in at else [load(name, cols) for name in ("d_x", "p", "o")]
        d_x, p, o = (row[k] for k in range(3))
        d_h = d_x
        if "scale" in at:
            u = o * of_o + p * of_p
            d_scale = d_scale + _fold(d_x * u)
            d_h = d_x * at["scale"][:, cols] - u * mean
        d_o, d_p = d_h * of_o, d_h * of_p + at["w"][:, cols] * c_w - p * c_p
        if plain:
            d_h = load("d_mixture", cols)
            d_o, d_p = d_o + d_h * plain[0], d_p + d_h * plain[1]
        at["d_o"][rows, cols] = d_o.astype(at["d_o"].dtype)
        at["d_p"][rows, cols] = (load("d_ps", cols) + d_p).astype(at["d_p"].dtype)
    if "scale" in at:
        at["d_scale"][:, cols] += d_scale


def _products(size, at, rows, normed):
    """p.p, p.w and, of a normed read, p.o: on the MXU, where products of bf16 are exact.

    Of a square of tokens by tokens the diagonal is wanted; its sum over sublanes is `[1, tokens]`."""
    found, G = [], size.square
    for part in _parts(rows, G):
        p, o = at["sum"][part, :], at["o"][part, :]
        out = dot(jnp.concatenate([p, at["w"][...]], 0), jnp.concatenate([p, o], 0) if normed else p, NT)
        square = [out[:G, first : first + G] for first in range(0, out.shape[1], G)]
        on = functools.reduce(jnp.equal, (lax.broadcasted_iota(jnp.int32, (G, G), k) for k in range(2)))
        square, *across = (jnp.sum(jnp.where(on, x, 0.0), 0, keepdims=True) for x in square)
        found.append([square, jnp.sum(out[G : G + 8, :G], 0, keepdims=True), *across])
    return [jnp.concatenate(sums, 1) for sums in zip(*found, strict=True)]


def _sums(size, at, rows, pairs):
    """Of the products of two arrays, over a row: on the VPU."""
    totals = [0.0] * len(pairs)
    for cols in _tiles(size.D) if pairs else ():
        for k, (a, b) in enumerate(pairs):
            b = at["w"][:1, cols] if b == "w" else _load(at, rows, b, cols)
            totals[k] = totals[k] + _narrow(_load(at, rows, a, cols) * b)
    return [_over_width(total) for total in totals]


def _spread(out, rows):
    """Each of `rows` [1, tokens] to [tokens, 128], the same on all lanes: a product with ones, exact."""
    pieces = [_stacked(*part) for part in zip(*(thirds(row) for row in rows), strict=True)]
    left = _as_columns(jnp.concatenate(pieces, 0)).astype(jnp.bfloat16)
    row, lane = (lax.broadcasted_iota(jnp.int32, (LANES, len(rows) * LANES), k) for k in range(2))
    product = dot(left, jnp.where(row % STATS == lane // LANES, 1.0, 0.0).astype(jnp.bfloat16), NN)
    for k in range(len(rows)):
        out[k] = product[:, k * LANES : (k + 1) * LANES]


def _pieces(x, dtype, rows=8):
    """[1, n] as `rows` of `dtype` that add up to it, most of them zeros."""
    parts = thirds(x) if dtype == jnp.bfloat16 else (x,)
    return jnp.concatenate([*parts, *[jnp.zeros_like(x)] * (rows - len(parts))], 0).astype(dtype)


def _load(at, rows, name, cols):
    return at[name][rows, cols].astype(jnp.float32)


def _narrow(x):
    """To 128 columns, by adding or filling up."""
    parts = [x[:, first : first + LANES] for first in range(0, x.shape[1], LANES)]
    short = LANES - parts[-1].shape[1]
    if short:
        parts[-1] = jnp.concatenate([parts[-1], jnp.zeros((len(x), short), x.dtype)], 1)
    return functools.reduce(jnp.add, parts)


def _repeated(x, width):
    """[tokens, 128], all lanes the same, to another width."""
    return jnp.concatenate([x] * -(-width // LANES), 1)[:, :width]


def _parts(rows, size=ROWS):
    return [pl.ds(first, size) for first in range(rows.start, rows.start + rows.size, size)]


def _over_width(partial):
    """[tokens, 128 partial sums] to sums, [1, tokens]."""
    return jnp.sum(partial.T, 0, keepdims=True)


def _stacked(*rows):
    """[1, tokens] each, as statistics [STATS, tokens]."""
    return jnp.concatenate([*rows, *[jnp.zeros_like(rows[0])] * (STATS - len(rows))], 0)


def _fold(x):
    """[rows, n] to [8, n] by whole registers; the rest of the sum over tokens is left to the end."""
    return functools.reduce(jnp.add, [x[at : at + 8] for at in range(0, len(x), 8)])


def _tiles(D):
    """256 columns of 8 tokens fill a register of bf16."""
    return [pl.ds(at, min(256, D - at)) for at in range(0, D, 256)]


def _as_columns(x):
    """[n, tokens] statistics to [tokens, 128], one column each."""
    return jnp.concatenate([x, jnp.zeros((LANES - len(x), x.shape[1]), x.dtype)], 0).T


def _given(table):
    return {name: entry for name, entry in table.items() if entry[0] is not None}


def _sizes(direction, mixtures, eps, norm_eps):
    S, tokens, D = mixtures.shape
    *config, cores, vmem = tpu_config(direction, D, mixtures.dtype, tokens)
    return Sizes(S, tokens, D, *config, cores, tokens // config[0] // cores, eps, norm_eps), vmem


def _padded(*arrays):
    """To whole tiles of tokens, the last axis but one: a copy, for odd numbers of tokens only."""
    short = -next(a for a in arrays if a is not None).shape[-2] % LANES
    if not short:
        return arrays
    return [None if a is None else jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, short), (0, 0)]) for a in arrays]


def _scalars(j, at, first):
    """What kernels are told: `first` only where it may be."""
    return jnp.stack([jnp.asarray(n, jnp.int32) for n in (j, at, first) if n is not None])


def _first(scalars):
    return scalars[2] == 1 if scalars.shape[0] == 3 else None


def _grid(size, args, outs, scratch):
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(size.cores, size.steps),
        in_specs=[spec for _, spec in args.values()],
        out_specs=[spec for _, spec in outs.values()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )


def _row(size, hide=False):
    """A tile a step; `hide`: of the first read of a block, which has no running sum, one tile a core."""

    def index(c, i, scalars):
        at = c * size.steps + i
        hidden = hide and _first(scalars) is not None
        return (jnp.where(_first(scalars), c * size.steps, at) if hidden else at, 0)

    return pl.BlockSpec((size.tile, size.D), index)


def _stream(size, hide):
    """Row `at` of the running sums, by tiles as `_row`."""
    row = _row(size, hide).index_map
    return pl.BlockSpec((None, size.tile, size.D), lambda c, i, scalars: (scalars[1], *row(c, i, scalars)))


def _row_of_j(size):
    return pl.BlockSpec((None, size.tile, size.D), lambda c, i, scalars: (scalars[0], c * size.steps + i, 0))


def _stat(size, rows):
    return pl.BlockSpec((rows, size.tile), lambda c, i, scalars: (0, c * size.steps + i))


def _vectors(**arrays):
    """[D] or [n, D], of which every step takes all."""
    rows = {name: x[None] if x is not None and x.ndim == 1 else x for name, x in arrays.items()}
    shapes = {name: None if x is None else x.shape for name, x in rows.items()}
    return {name: (x, pl.BlockSpec(shapes[name], lambda c, i, n: (0, 0))) for name, x in rows.items()}
