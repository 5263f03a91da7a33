"""Phase 1 in Pallas Mosaic GPU (Hopper: WGMMA): S queries at once over R sources, and its backward.

One query (S = 1) has kernels of its own (gpu_single.py), which read each row once in each direction, where a
token's R rows fit shared memory and its D the registers: R = 16 up to D = 4096, 14 at 5120, 11 at 7168, 9 at
8192, none above. They pad no token. All else runs in the four kernels below.

Four kernels, all of them streams over D in chunks, so that no whole row must fit shared memory:

    score     logits and reciprocal rms of every visible row     reads the sources
    mix       softmax over the rows and the mixtures             reads the sources, writes S mixtures
    dscore    cotangents of the logits                           reads the sources and S cotangents
    apply     cotangents of the sources, and dw                  reads both again, and d_sources

Bytes per token, in rows of D, for n visible rows: forward 2n + S (the bound is n + S), backward 4n + 2S
(bound 3n + S). What is read twice is the price of scoring whole rows without holding them: eight tokens of
eight sources at D = 2304 are 295 KB. Logits, weights and their cotangents are fp32 and small.

In the first three eight tokens make one matrix product: a block-diagonal matrix of weights, rows (query,
token) and columns (row, token), times the rows. Queries enter as three bf16 that add up to them, weights as
two halves (2^-16), so nothing but the result is rounded. `apply` multiplies in fp32, outside the tensor
cores: no matrix is built. dw is summed in registers over a program's tokens, leaves as one [S, D] partial
per program, and is added up outside: fixed order, no atomics.

A row beyond its array's count moves no bytes: its barrier gets an arrival instead of a copy, its slot in
shared memory holds zeros. A box of more tokens than there are is zero-filled and clipped.

stats, one for each 16 queries: logits [tokens / 8, R, 8 queries] (entry query * 8 + token; -inf for a hidden
row), rstd [R, tokens].

Limits: sources bf16, D a multiple of 256, R at most 16 in all. More than 16 queries run 16 at a time: the
sources are read, and d_sources rounded, once for each 16, and the mixtures are put together by a copy. More
than 8 tokens that 8 does not divide are padded, which copies the sources.
"""

import jax.numpy as jnp

from pallas_kernels.depth_mix import gpu_single
from pallas_kernels.depth_mix.gpu_backward import apply, dscore
from pallas_kernels.depth_mix.gpu_forward import mix, score
from pallas_kernels.depth_mix.gpu_tiles import BF16, COLUMNS, TOKENS, Shape, thirds
from pallas_kernels.depth_mix.vjp import Forward

QUERIES = 16  # at once
ROWS = 16


def _shape(w, sources):
    _, tokens, D = sources[0].shape
    R = sum(len(v) for v in sources)
    if problem := refusal(len(w), R, D, sources[0].dtype):
        raise ValueError(problem)
    return Shape(tokens, D, R, len(w))


def refusal(S, R, D, dtype):
    """Why this backend cannot run the op, or None; it takes any S."""
    del S
    if dtype != BF16:
        return f"sources: dtype {jnp.dtype(dtype)}; Mosaic GPU mixes bfloat16 only, use triton"
    if D % COLUMNS:
        return f"sources: D = {D} is not a multiple of {COLUMNS}, two columns a thread; use triton"
    if not 1 <= R <= ROWS:
        return f"sources: R = {R} rows, not from 1 to {ROWS}; use triton"
    return None


def _single(shape):
    """Whether the kernels of a single read run."""
    return shape.queries == 1 and gpu_single.fits(shape.D, shape.R)


def _whole(a):
    """[rows, tokens, ...] with tokens in whole eights, the tiles of a copy; fewer than eight are one."""
    missing = -a.shape[1] % TOKENS if a.shape[1] > TOKENS else 0
    return jnp.pad(a, ((0, 0), (0, missing), *((0, 0) for _ in a.shape[2:]))) if missing else a


def forward(w, sources, counts, *, eps, interpret=None):
    """Mixture and lse of every query; see vjp.py."""
    shape = _shape(w, sources)
    if _single(shape):
        return gpu_single.forward(w, sources, counts, eps=eps, interpret=interpret)
    tokens, sources = shape.tokens, tuple(map(_whole, sources))
    parts = [_forward(w[s : s + QUERIES], sources, counts, eps, interpret) for s in range(0, len(w), QUERIES)]
    stats = tuple(p.stats for p in parts)
    mixture, lse = parts[0][:2]
    if len(parts) > 1:
        mixture, lse = (jnp.concatenate([p[i] for p in parts]) for i in range(2))
    return Forward(mixture[:, :tokens], lse[:, :tokens], stats)


def backward(w, sources, counts, lse, stats, d_mixture, d_lse, d_sources, *, eps, interpret=None):
    """(dw, d_sources), the latter added to what was given, in place."""
    del eps  # all that it says is in stats
    shape = _shape(w, sources)
    if _single(shape):
        kept = lse, stats, d_mixture, d_lse, d_sources
        return gpu_single.backward(w, sources, counts, *kept, interpret=interpret)
    tokens, sources = shape.tokens, tuple(map(_whole, sources))
    lse, d_mixture, d_lse = map(_whole, (lse, d_mixture, d_lse))
    d_sources = None if d_sources is None else tuple(map(_whole, d_sources))
    dw = []
    for i, stat in enumerate(stats):
        some = slice(i * QUERIES, min((i + 1) * QUERIES, len(w)))
        part, d_sources = _backward(
            w[some],
            sources,
            counts,
            lse[some],
            stat,
            d_mixture,
            i * QUERIES,
            d_lse[some],
            d_sources,
            interpret,
        )
        dw.append(part)
    return jnp.concatenate(dw), tuple(d[:, :tokens] for d in d_sources)


def _forward(w, sources, counts, eps, interpret):
    shape = _shape(w, sources)
    logits, rstd = score(shape, thirds(w, shape.padded), sources, counts, eps, interpret)
    visible = _visible(sources, counts)[:, None, None]
    logits = _block_queries(jnp.where(visible, logits, -jnp.inf)[:, : shape.blocks * TOKENS])
    mixture, lse = mix(shape, logits, sources, counts, interpret)
    return Forward(mixture, _from_blocks(lse, shape), (logits, rstd[:, : shape.tokens]))


def _backward(w, sources, counts, lse, stat, d_mixture, at, d_lse, d_sources, interpret):
    """The backward of 16 queries, those of `d_mixture` from `at` on."""
    shape, (logits, rstd) = _shape(w, sources), stat
    lse, d_lse = _to_blocks(lse, shape), _to_blocks(d_lse, shape)
    d_logits = dscore(shape, logits, lse, d_lse, sources, counts, d_mixture, at, interpret)
    visible = _visible(sources, counts)[None, :, None, None]
    rstd = jnp.pad(rstd, ((0, 0), (0, shape.blocks * TOKENS - shape.tokens)))
    rstd = rstd.reshape(shape.R, shape.blocks, 1, TOKENS).swapaxes(0, 1)
    tile = (shape.blocks, shape.R, shape.padded, TOKENS)
    c = jnp.where(visible, d_logits.reshape(tile) * rstd, 0)
    along = jnp.sum(jnp.where(visible, c * logits.reshape(tile) * rstd, 0), 2) / shape.D
    weights = jnp.exp(logits - lse[:, None]).reshape(tile)
    a, c, along = (_tokens(x, shape) for x in (weights, c, along[:, :, None]))
    return apply(shape, w, a, c, along[..., 0], sources, counts, d_mixture, at, d_sources, interpret)


def _visible(sources, counts):
    """[R]: which rows are seen."""
    rows = [jnp.arange(len(v)) < (len(v) if n is None else n) for v, n in zip(sources, counts, strict=True)]
    return jnp.concatenate(rows)


def _block_queries(a):
    """[R, blocks * 8, queries] to [blocks, R, queries * 8]: a block's (query, token) in one line."""
    R, _, queries = a.shape
    return a.reshape(R, -1, TOKENS, queries).transpose(1, 0, 3, 2).reshape(-1, R, queries * TOKENS)


def _to_blocks(a, shape):
    """[S, tokens] to [blocks, queries * 8]."""
    a = jnp.pad(a, ((0, shape.padded - len(a)), (0, shape.blocks * TOKENS - shape.tokens)))
    return a.reshape(shape.padded, shape.blocks, TOKENS).swapaxes(0, 1).reshape(shape.blocks, -1)


def _from_blocks(a, shape):
    """The inverse of `_to_blocks`."""
    a = a.reshape(shape.blocks, shape.padded, TOKENS).swapaxes(0, 1)
    return a.reshape(shape.padded, -1)[: shape.queries, : shape.tokens]


def _tokens(a, shape):
    """[blocks, R, queries, 8] to [tokens, R, queries]."""
    a = a.transpose(0, 3, 1, 2).reshape(-1, *a.shape[1:3])
    return a[: shape.tokens, :, : shape.queries]
