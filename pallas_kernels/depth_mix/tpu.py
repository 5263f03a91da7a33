"""Phase 1 on TPU (Mosaic): a source is copied to VMEM once, and stays for scores, softmax and mixing.

Tokens are walked in groups of 8 to 64. Sources lie in VMEM as `[R, groups, group, D]`, of which a group is
`[R * group, D]`: both its matrix products, scores `W V^T` (lanes are `(source, token)`) and the mixture
`A V` (block-diagonal weights), take it as it is. README.md derives it.
"""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.depth_mix import tpu_group as group
from pallas_kernels.depth_mix.config import tpu_config
from pallas_kernels.depth_mix.vjp import Forward
from pallas_kernels.tpu import LANES, output, params


class Sizes(NamedTuple):
    """Static numbers of a call."""

    S: int
    rows: tuple[int, ...]
    tokens: int
    D: int
    tile: int
    group: int
    beside: bool
    several: int
    cores: int
    eps: float
    counted: bool
    slotted: bool

    @property
    def R(self) -> int:
        """Sources of all arrays."""
        return sum(self.rows)

    @property
    def S8(self) -> int:
        """S in whole registers."""
        return 8 * math.ceil(self.S / 8)

    @property
    def lanes(self):
        """Of (source, token), in whole registers."""
        return LANES * math.ceil(self.R * self.group / LANES)

    @property
    def groups(self) -> int:
        """Of a tile."""
        return self.tile // self.group

    @property
    def span(self) -> int:
        """Lanes that hold the tokens of a tile."""
        return max(LANES, self.tile)

    def together(self, tokens: int) -> int:
        """Groups of one loop body: a power of two of about `tokens`, fewer where a row is wide."""
        wanted = max(1, tokens * min(1024, self.D) // self.D // self.group)
        return math.gcd(self.groups, 2 ** (wanted.bit_length() - 1))

    @property
    def steps(self) -> int:
        """Of the grid, on one core."""
        return self.tokens // self.tile // self.cores

    @property
    def stats(self):
        """Of one group: S rows of scores, the next is rstd, in whole registers."""
        return (8 * math.ceil((self.S + 1) / 8), self.lanes)


def forward(w, sources, counts, slots=None, *, eps) -> Forward:
    """See vjp.py: `w` [S, D] fp32, `sources` arrays [R_k, tokens, D], `counts` None or int32 each."""
    tokens, sources = sources[0].shape[-2], _padded(sources)
    size, vmem = _sizes("forward", w, sources, counts, slots, eps)
    packed = _packed(w, sources[0].dtype, size)
    mixture, lse, stats = pl.pallas_call(
        functools.partial(_forward_kernel, size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(size.cores, size.steps),
            in_specs=[_whole(packed), *[_hbm()] * len(sources)],
            out_specs=[_tokens(size), _per_tile(size, size.S8, size.span), _groups(size)],
            scratch_shapes=[
                _buffer(size, 2, sources[0].dtype),
                pltpu.VMEM((size.groups, size.S8, size.lanes), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            output((size.S, size.tokens, size.D), sources[0].dtype, sources[0]),
            output((size.tokens // size.tile, size.S8, size.span), jnp.float32, sources[0]),
            output((size.tokens // size.group, *size.stats), jnp.float32, sources[0]),
        ],
        compiler_params=params(vmem),
        name="depth_mix_forward",
    )(_counts(counts, slots, size), packed, *[_grouped(size, v) for v in sources])
    lse = lse[:, : size.S, : size.tile].swapaxes(0, 1).reshape(size.S, size.tokens)
    return Forward(mixture[:, :tokens], lse[:, :tokens], stats)


def backward(w, sources, counts, lse, stats, d_mixture, d_lse, d_sources, slots=None, *, eps):
    """`d_sources` holds what later reads have added, and so does the result. Returns dw, d_sources."""
    tokens, many = sources[0].shape[-2], len(sources)
    sources, (d_mixture,) = _padded(sources), _padded((d_mixture,))
    size, vmem = _sizes("backward", w, sources, counts, slots, eps)
    dtype, add = sources[0].dtype, d_sources is not None
    d_lse = jnp.pad(d_lse, [(0, size.S8 - size.S), (0, size.tokens - tokens)])
    d_lse = d_lse.reshape(size.S8, -1, size.tile).swapaxes(0, 1)
    d_lse = jnp.pad(d_lse, [(0, 0), (0, 0), (0, LANES - size.tile)])
    args = [_packed(w, dtype, size), d_mixture, d_lse, stats, *[_grouped(size, v) for v in sources]]
    args += [_grouped(size, v) for v in _padded(d_sources)] if add else []
    d_w, *d_sources = pl.pallas_call(
        functools.partial(_backward_kernel, size, many, add),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(size.cores, size.steps),
            in_specs=[
                _whole(args[0]),
                _tokens(size),
                _per_tile(size, size.S8, size.span),
                _groups(size),
                *[_hbm()] * (many + many * add),
            ],
            out_specs=[pl.BlockSpec((None, size.S8, size.D), lambda c, i, n: (c, 0, 0)), *[_hbm()] * many],
            scratch_shapes=[
                _buffer(size, 2, dtype),
                _buffer(size, 3, dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((3,)),
                pltpu.SemaphoreType.DMA((3,)),
            ],
        ),
        out_shape=[
            output((size.cores, size.S8, size.D), jnp.float32, sources[0]),
            *[output(_grouped(size, v).shape, dtype, sources[0]) for v in sources],
        ],
        input_output_aliases={5 + many + k: 1 + k for k in range(many)} if add else {},
        compiler_params=params(vmem),
        name="depth_mix_backward",
    )(_counts(counts, slots, size), *args)
    d_sources = tuple(d.reshape(v.shape)[..., :tokens, :] for d, v in zip(d_sources, sources, strict=True))
    return jnp.sum(d_w, 0)[: size.S], d_sources


def _forward_kernel(size, counts, w, *refs):
    *sources, mixture, lse, stats, buffer, weights, arrived = refs
    step, slot = pl.program_id(1), lax.rem(pl.program_id(1), 2)
    _clear(size, buffer)
    copies = functools.partial(_copies, size, counts, sources, buffer, arrived)
    _prefetch(size, step, copies)
    _each(copies(step, slot), "wait")
    visible = group.visible_lanes(size, counts)

    scored, weighed, mixed = size.together(64), math.gcd(size.groups, 8), size.together(128)
    # Three loops, each over several groups at once, for what waits in one group is hidden by the others.

    def score(i, carry):
        some = [i * scored + k for k in range(scored)]
        found = [group.scores(size, w, buffer.at[slot, :, q]) for q in some]
        for q, (scores, rstd) in zip(some, found, strict=True):
            stats[q] = group.with_rstd(size, scores, rstd)
        return carry

    def weigh(i, lses):
        for q in [i * weighed + k for k in range(weighed)]:
            stat = [stats[q, : size.S8, pl.ds(b, LANES)] for b in range(0, size.lanes, LANES)]
            shares, lse = group.softmax(
                size, [jnp.where(seen, s, -jnp.inf) for seen, s in zip(visible, stat, strict=True)]
            )
            weights[q] = jnp.concatenate(shares, 1)
            lse = jnp.concatenate([lse] * (size.span // LANES), 1)
            lses = jnp.where(group.lane(lse.shape) // size.group == q, lse, lses)
        return lses

    def mix(i, carry):
        for q in [i * mixed + k for k in range(mixed)]:
            group.mix(size, weights[q], buffer.at[slot, :, q], mixture, q)
        return carry

    lax.fori_loop(0, size.groups // scored, score, 0)
    none = jnp.zeros((size.S8, size.span), jnp.float32)
    lse[...] = lax.fori_loop(0, size.groups // weighed, weigh, none)
    lax.fori_loop(0, size.groups // mixed, mix, 0)


def _backward_kernel(size, many, add, counts, w, d_mixture, d_lse, stats, *refs):
    sources, refs = refs[:many], refs[many + many * add :]  # d_sources is read through its alias, the output
    d_w, *d_sources, buffer, sums, arrived, added, left = refs
    step, slot, third = pl.program_id(1), lax.rem(pl.program_id(1), 2), lax.rem(pl.program_id(1), 3)
    copies = functools.partial(_copies, size, counts, sources, buffer, arrived)
    sums_in = functools.partial(_copies, size, counts, d_sources, sums, added)
    sums_out = functools.partial(_copies, size, counts, d_sources, sums, left, out=True)
    _clear(size, buffer)

    @pl.when(step == 0)
    def _():
        d_w[...] = jnp.zeros_like(d_w)

    @pl.when(step >= 2)
    def _():
        _each(sums_out(step - 2, lax.rem(step + 1, 3)), "wait")

    _prefetch(size, step, copies)
    if add:
        _prefetch(size, step, sums_in, slots=3)
        _each(sums_in(step, third), "wait")
    _each(copies(step, slot), "wait")
    visible = group.visible_lanes(size, counts)

    def body(i, carry):
        some = [i * size.several + k for k in range(size.several)]
        held = [(buffer.at[slot, :, q], sums.at[third, :, q]) for q in some]
        group.pull_groups(size, some, held, add, visible, w, d_mixture, d_lse, stats, d_w)
        return carry

    lax.fori_loop(0, size.groups // size.several, body, 0)
    _each(sums_out(step, third), "start")

    @pl.when(step == size.steps - 1)
    def _():
        _each(sums_out(step, third), "wait")
        if size.steps > 1:
            _each(sums_out(step - 1, lax.rem(step + 2, 3)), "wait")


def _packed(w, dtype, size):
    """W as the left side of a product: fp32, or the two halves [2 S8, D] that bf16 sources meet."""
    w = jnp.pad(w.astype(jnp.float32), [(0, size.S8 - size.S), (0, 0)])
    if dtype == jnp.float32:
        return w
    high = w.astype(dtype)
    return jnp.concatenate([high, (w - high.astype(jnp.float32)).astype(dtype)], 0)


def _copies(size, counts, arrays, buffer, semaphore, step, slot, out=False):
    """The copies of one tile, of each array (rows, how many may be seen or None, (first, number) -> copy)."""
    tile = pl.ds((pl.program_id(0) * size.steps + step) * size.groups, size.groups)
    plans, at = [], 0
    for k, (rows, array) in enumerate(zip(size.rows, arrays, strict=True)):
        lead = (counts[len(arrays) * size.counted + k],) if size.slotted else ()

        def copy(r, number, array=array, at=at, lead=lead):
            ends = (array.at[*lead, pl.ds(r, number), tile], buffer.at[slot, pl.ds(at + r, number)])
            return pltpu.make_async_copy(*(reversed(ends) if out else ends), semaphore.at[slot])

        plans.append((rows, counts[k] if size.counted else None, copy))
        at += rows
    return plans


def _each(plans, verb):
    for rows, visible, copy in plans:
        if visible is None:
            getattr(copy(0, rows), verb)()
        else:
            lax.fori_loop(0, visible, lambda r, c, copy=copy: (getattr(copy(r, 1), verb)(), c)[1], 0)


def _prefetch(size, step, copies, slots=2):
    """This step's copies if it is the first, and the next step's."""

    @pl.when(step == 0)
    def _():
        _each(copies(step, 0), "start")

    @pl.when(step + 1 < size.steps)
    def _():
        _each(copies(step + 1, lax.rem(step + 1, slots)), "start")


def _clear(size, buffer):
    """Rows that are never copied meet weights of zero: they must be numbers."""
    if size.counted:

        @pl.when(pl.program_id(1) == 0)
        def _():
            buffer[...] = jnp.zeros_like(buffer)


def _sizes(direction, w, sources, counts, slots, eps):
    (S, D), rows, tokens = w.shape, tuple(v.shape[-3] for v in sources), sources[0].shape[-2]
    *tiled, vmem = tpu_config(direction, S, sum(rows), D, sources[0].dtype, tokens)
    counted = any(n is not None for n in counts)
    return Sizes(S, rows, tokens, D, *tiled, eps, counted, slots is not None), vmem


def _counts(counts, slots, size):
    """Of each array, how many rows may be seen; and in which slot they lie, alone if all may."""
    found = [r if n is None else n for n, r in zip(counts, size.rows, strict=True)]
    if size.slotted:
        found = [*(found if size.counted else []), *slots]
    return jnp.stack(list(map(jnp.int32, found)))


def _padded(arrays):
    """To whole tiles of tokens: a copy, for odd numbers of tokens only."""
    short = -arrays[0].shape[-2] % LANES
    pads = [(0, 0)] * (arrays[0].ndim - 2) + [(0, short), (0, 0)]
    return tuple(jnp.pad(a, pads) for a in arrays) if short else tuple(arrays)


def _grouped(size, v):
    return v.reshape(*v.shape[:-2], -1, size.group, v.shape[-1])


def _buffer(size, slots, dtype):
    return pltpu.VMEM((slots, size.R, size.groups, size.group, size.D), dtype)


def _hbm():
    return pl.BlockSpec(memory_space=pl.ANY)


def _whole(x):
    return pl.BlockSpec(x.shape, lambda c, i, n: (0, 0))


def _tokens(size):
    return pl.BlockSpec((size.S, size.tile, size.D), lambda c, i, n: (0, c * size.steps + i, 0))


def _per_tile(size, *shape):
    return pl.BlockSpec((None, *shape), lambda c, i, n: (c * size.steps + i, *[0] * len(shape)))


def _groups(size):
    return pl.BlockSpec((size.groups, *size.stats), lambda c, i, n: (c * size.steps + i, 0, 0))
