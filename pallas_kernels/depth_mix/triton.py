"""Phase 1 in Triton through jax-triton (Ampere and newer): S queries over R sources, and its backward.

Any D (chunks are masked), any number of tokens, R up to 256 rows in at most ten arrays, S up to 64; bf16 or
fp32. Three kernels, in rows of D per token for n visible rows:

    forward   two sweeps over a few tokens; the second reads the sources from the cache    n + S
    dscore    cotangents of the logits                                                     n + S
    apply     cotangents of the sources, and dw as a partial for each program              3n + S

One query (a single read) has kernels of its own, a row at a time, which score, mix and forget it:

    one_forward    n + 1
    one_backward   a token's rows twice, the second time from the cache          3n + 1

The bound of the backward is 3n + S: reading sources and cotangents twice is the price of scoring whole rows
without holding them. A row that is not visible is masked everywhere: it moves no bytes. No atomics.

stats: logits [tokens, R, S] (-inf for a hidden row) and rstd [tokens, R], fp32.

jax-triton 0.4 does not lower under JAX 0.12 and newer, where a call raises. Imports are made by the call.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.depth_mix.vjp import Forward
from pallas_kernels.triton import PROGRAMS, call

ARRAYS, ROWS, QUERIES = 10, 256, 64  # at most
WIDEST = 16384  # of a row that one query's kernels hold in registers
F32 = jnp.float32


def _constants(w, sources):
    """Sizes and tile of a call; raises where the kernels do not take it."""
    D = sources[0].shape[-1]
    R, S, dtype = sum(len(v) for v in sources), len(w), sources[0].dtype
    if len(sources) > ARRAYS:
        raise ValueError(f"sources: {len(sources)} arrays, more than {ARRAYS}; give them as one buffer")
    if not 1 <= R <= ROWS:
        raise ValueError(f"sources: R = {R} rows, not from 1 to {ROWS}")
    if S > QUERIES:
        raise ValueError(f"w: S = {S} queries, more than {QUERIES}")
    rows, queries = (max(16, 1 << (n - 1).bit_length()) for n in (R, S))
    tile = {"NR": rows, "SP": queries, "TOK": max(1, 32 // rows), "BK": 64 if rows > 32 else 128}
    lengths = [len(v) for v in sources] + [0] * (ARRAYS - len(sources))
    return {
        "R": R,
        "S": S,
        "D": D,
        "BYTES": dtype.itemsize,
        **tile,
        **{f"N{k}": n for k, n in enumerate(lengths)},
    }


def _warps(sizes):
    return 8 if sizes["NR"] > 32 else 4


def _apply_tile(sizes):
    """Tile and warps of `apply`: the widest that does not spill on an H200, where one does not (NR <= 64)."""
    rows = sizes["NR"]
    return {"TOK": 1, "BK": 128 if rows <= 16 else 64 if rows <= 64 else 32}, 4 if rows <= 16 else 8


def _alone(sizes):
    """Constants of one query's kernels, and warps for a row in registers; None where they do not take it."""
    width = 1 << (sizes["D"] - 1).bit_length()
    if sizes["S"] > 1 or width > WIDEST:
        return None
    kept = {k: v for k, v in sizes.items() if k not in ("S", "SP", "NR", "TOK", "BK")}
    return kept | {"BD": width}, min(16, max(4, width // 512))


def _seen(sources, counts, rows):
    """[rows] int32: one for a visible row."""
    limits = [len(v) if n is None else n for v, n in zip(sources, counts, strict=True)]
    seen = jnp.concatenate([jnp.arange(len(v)) < n for v, n in zip(sources, limits, strict=True)])
    return jnp.pad(seen.astype(jnp.int32), (0, rows - len(seen)))


def _missing(arrays):
    """The kernels take ten pointers; stand-ins, never read or written, for those that are not there."""
    return [arrays[0]] * (ARRAYS - len(arrays))


def _ten(arrays):
    return [*arrays, *_missing(arrays)]


def forward(w, sources, counts, *, eps):
    """Mixture and lse of every query; see vjp.py."""
    sizes = _constants(w, sources)
    _, tokens, D = sources[0].shape
    R, S = sizes["R"], sizes["S"]
    shapes = [(S, tokens), (tokens, R, S), (tokens, R)]
    grid, warps, constants = -(-tokens // sizes["TOK"]), _warps(sizes), sizes
    if alone := _alone(sizes):
        grid, (constants, warps) = tokens, alone
        constants |= {"STAGES": 4}
    mixture, lse, logits, rstd = call(
        "depth_mix",
        "one_forward" if alone else "forward",
        [*_ten(sources), w, _seen(sources, counts, sizes["NR"]), tokens, eps],
        [
            jax.ShapeDtypeStruct((S, tokens, D), sources[0].dtype),
            *(jax.ShapeDtypeStruct(s, F32) for s in shapes),
        ],
        grid=(grid,),
        warps=warps,
        constants=constants,
    )
    return Forward(mixture, lse, (logits, rstd))


def backward(w, sources, counts, lse, stats, d_mixture, d_lse, d_sources, *, eps):
    """(dw, d_sources), the latter added to what was given, in place."""
    del eps  # all that it says is in stats
    sizes, tokens, (logits, rstd) = _constants(w, sources), sources[0].shape[1], stats
    seen = _seen(sources, counts, sizes["NR"])
    if alone := _alone(sizes):
        constants, warps = alone
        programs = min(tokens, PROGRAMS // 2 * (32 // warps))
        operands = [*_ten(sources), d_mixture, d_lse, lse, logits, rstd, w, seen, tokens]
        constants |= {"NR": sizes["NR"], "STAGES": 3}
        return _cotangents(
            "one_backward", operands, sources, d_sources, programs, w, (programs,), warps, constants
        )
    tile, warps = _apply_tile(sizes)
    (cs,) = call(
        "depth_mix",
        "dscore",
        [*_ten(sources), d_mixture, d_lse, lse, logits, rstd, seen, tokens],
        [jax.ShapeDtypeStruct(logits.shape, F32)],
        grid=(-(-tokens // sizes["TOK"]),),
        warps=_warps(sizes),
        constants=sizes,
    )
    chunks = -(-sizes["D"] // tile["BK"])
    programs = min(-(-tokens // tile["TOK"]), max(1, 4 * PROGRAMS // chunks))
    operands = [*_ten(sources), d_mixture, lse, logits, rstd, cs, w, seen, tokens]
    grid, constants = (programs, chunks), {**sizes, **tile}
    return _cotangents("apply", operands, sources, d_sources, programs, w, grid, warps, constants)


def _cotangents(kernel, operands, sources, d_sources, programs, w, grid, warps, constants):
    """What a kernel leaves that adds to d_sources, or makes them, and has one partial of dw per program."""
    given = d_sources is not None
    outs = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in sources]
    unused = [jax.ShapeDtypeStruct((8,), v.dtype) for v in _missing(sources)]
    in_place = [*(d_sources if given else sources), *_missing(sources)]
    results = call(
        "depth_mix",
        kernel,
        [*operands, *in_place],
        [*outs, *unused, jax.ShapeDtypeStruct((programs, *w.shape), F32)],
        grid=grid,
        warps=warps,
        aliases={len(operands) + k: k for k in range(len(sources))} if given else {},
        constants={**constants, "GIVEN": given},
    )
    return jnp.sum(results[-1], 0), tuple(results[: len(sources)])
