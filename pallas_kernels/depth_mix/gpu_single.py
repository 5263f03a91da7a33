"""Phase 1 of one query in Pallas Mosaic GPU: every row of the sources is read once in each direction.

A program is a few warpgroups that share a token at a time (each D / groups columns) and walks over tokens
in strides of the grid. The visible rows of its tokens stream through a ring of shared memory, one row a
slot, as many rows ahead as there are slots: a token needs no whole number of slots.

    forward     v.w and v.v of each row as it arrives, softmax, the mixture from the same slots
    backward    dO.v of each row as it arrives, d_logits, then each row's cotangent in the slot of the row,
                from where it is copied out; what was given streams through a ring of its own

Bytes per token, in rows of D, for n visible rows: forward n + 1, backward 2n + 1, and n more where
cotangents were given. Sums of a row stay inside a warp until they are in `exchange`; there a lane takes
the sums of one row from all warps, and softmax and its cotangent are a few operations on 32 lanes. dw is
summed in registers and leaves as [programs, D]: fixed order, no atomics. A row beyond its array's count is
in no slot and costs nothing.

stats: logits and rstd of the visible rows, in their order, [2, tokens, 32] fp32.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.depth_mix.gpu_tiles import BF16, COLUMNS, F32, named
from pallas_kernels.depth_mix.gpu_token import Single, Tile
from pallas_kernels.depth_mix.vjp import Forward
from pallas_kernels.mosaic import KIBIBYTE, LANES, PROCESSOR_BYTES, RESERVED_BYTES, WARPS, run, shaped

BARRIERS, REGISTERS = 32, 65536  # of one scratch, at most; of a processor
WIDEST = 32  # columns of a thread: w, dO and dw of more would spill


def tile_of(tokens, D, R, *, backward, given=False):
    """The tile of one direction, or None where a token's rows fit no shared memory, registers or barriers.

    Programs of a processor hide each other's latencies: as many as leave rows of a next token in flight. A
    lone program has warpgroups for that.
    """
    needed = R + 2 if backward else R + 1  # slots: backward a token has its dO; one is on its way
    together = next((n for n in (3, 4, 2) if R % n == 0), 3)
    splits = [g for g in _splits(D) if BARRIERS // g >= needed]
    for resident in range(max(3, 6144 // D), 0, -1) if splits else ():
        groups = next((g for g in splits if resident > 1 or g > 1), splits[0])
        threads = groups * WARPS * LANES
        if resident * threads * _registers(D // threads, together, backward) > REGISTERS:
            continue
        rest = RESERVED_BYTES + (3 + 2 * groups) * KIBIBYTE  # exchange, numbers, barriers
        rest += 3 * (2 * D % KIBIBYTE)  # each of the rows' buffers is rounded up
        rows = (PROCESSOR_BYTES // resident - rest) // (2 * D) - (not backward)  # one is staged
        spare, most = rows - needed, BARRIERS // groups
        others = min(R, most, max(2, spare // 2)) if given else 0
        if spare >= others and (resident == 1 or spare >= (4 if given else 2)):
            return Tile(tokens, D, groups, min(most, rows - others), others, resident, together)
    return None


def _splits(D):
    """Numbers of warpgroups that can share a row; with fewer of them sums have fewer parts."""
    return [g for g in range(1, 9) if D // COLUMNS % g == 0 and D // g <= WIDEST * WARPS * LANES]


def _registers(columns, together, backward):
    """Of a thread with so many columns, at most, as ptxas said at D = 2048, 2304, 4096 and 7168."""
    return 56 + 6 * columns if backward else 48 + (1 + together) * columns


def fits(D, R):
    """Whether both directions have a tile: then a single read runs here."""
    return R <= LANES // 2 and all(tile_of(1, D, R, backward=b, given=g) for b, g in ((0, 0), (1, 0), (1, 1)))


def forward(w, sources, counts, *, eps, interpret=None):
    """Mixture and lse of the query [1, D]; see vjp.py."""
    _, tokens, D = sources[0].shape
    tile = tile_of(tokens, D, sum(map(len, sources)), backward=False)
    rows, full = tile.ring(tile.slots)
    out = run(
        lambda r: Single(r, tile, sources, counts).forward(eps),
        named([tile.fold(v) for v in sources], counts) | {"w": tile.fold(w[0]), "lane": _lanes()},
        {
            "mixture": shaped((tokens, *tile.folded), BF16),
            "lse": shaped((tokens,)),
            "stats": shaped((2, tokens, LANES)),
        },
        {
            "rows": rows,
            "full": full,
            "out": plgpu.SMEM(tile.folded, BF16),
            **_scratch(tile, sums=2, numbers=1),
        },
        grid={"program": tile.programs},
        groups=tile.groups,
        name="depth_mix_single_forward",
        interpret=interpret,
    )
    return Forward(out.mixture.reshape(1, tokens, D), out.lse[None], out.stats)


def backward(w, sources, counts, lse, stats, d_mixture, d_lse, d_sources, *, interpret=None):
    """(dw, d_sources), the latter added to what was given, in place."""
    _, tokens, D = sources[0].shape
    if d_sources is None and any(n is not None for n in counts):
        d_sources = tuple(map(jnp.zeros_like, sources))  # of rows that nobody reads
    given = d_sources is not None
    tile = tile_of(tokens, D, sum(map(len, sources)), backward=True, given=given)
    names = [f"d_source{k}" for k in range(len(sources))]
    refs = [jax.new_ref(tile.fold(d)) for d in d_sources] if given else []
    fresh = [] if given else [shaped(tile.fold(v).shape, BF16) for v in sources]
    scratch = dict(zip(("rows", "full"), tile.ring(tile.slots), strict=True))
    if given:
        scratch |= dict(zip(("given", "given_full"), tile.ring(tile.given_slots), strict=True))
    out = run(
        lambda r: Single(r, tile, sources, counts).backward(given),
        {
            **named([tile.fold(v) for v in sources], counts),
            "w": tile.fold(w[0]),
            "lane": _lanes(),
            "lse": lse[0],
            "d_lse": d_lse[0],
            "stats": stats,
            "d_mixture": tile.fold(d_mixture),
            **dict(zip(names, refs, strict=False)),
        },
        {"dw": shaped((tile.programs, *tile.folded)), **dict(zip(names, fresh, strict=False))},
        scratch | _scratch(tile, sums=1, numbers=3),
        grid={"program": tile.programs},
        groups=tile.groups,
        name="depth_mix_single_backward",
        interpret=interpret,
    )
    results = [ref[...] for ref in refs] if given else [getattr(out, name) for name in names]
    results = tuple(d.reshape(v.shape) for d, v in zip(results, sources, strict=True))
    return jnp.sum(out.dw, 0).reshape(1, D), results


def _lanes():
    return jnp.arange(LANES, dtype=jnp.int32)


def _scratch(tile, sums, numbers):
    """What rows are summed through, two slots in turn, and the numbers of a token's rows."""
    return {
        "exchange": plgpu.SMEM((2, tile.groups, sums, LANES, WARPS), F32),
        "exchanged": plgpu.Barrier(num_arrivals=tile.groups),
        "numbers": plgpu.SMEM((tile.groups, numbers, LANES), F32),
    }
