"""Phase 2 in Triton: one row of D per step, in registers. See triton.py, which imports this only when called.

Inputs (scalars too) come first, then outputs, then constants. An input in the place of which an output lies
is read through the output's argument: `_0` and so on stand where its own would be. BD is the power of two
from D on.
`control` holds (j, first, at), `at` the row of `streams`: when first, no load or store of the running sum
touches memory.
"""

import triton
import triton.language as tl


@triton.jit
def forward(
    w, g, mixtures, lse, streams, y, control, T, eps, norm_eps,
    new_stream, x_out, h_out, stats,
    D: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One row: x, the mixture if KEEP, the new sum in place if ADD, and four statistics."""
    t, c = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    j, summed = tl.load(control).to(tl.int64), tl.load(control + 1) == 0
    here = (tl.load(control + 2).to(tl.int64) * T + t) * D + c
    m, k = c < D, t * D + c
    seen = c < tl.where(summed, D, 0)
    o = tl.load(mixtures + (j * T + t) * D + c, mask=m, other=0.0).to(tl.float32)
    if ADD:
        p = tl.load(new_stream + k, mask=seen, other=0.0).to(tl.float32)
        new = (p + tl.load(y + k, mask=seen, other=0.0).to(tl.float32)).to(x_out.dtype.element_ty)
        tl.store(new_stream + k, new, mask=seen)
        p = new.to(tl.float32)
    else:
        p = tl.load(streams + here, mask=seen, other=0.0).to(tl.float32)
    r_p = tl.rsqrt(tl.sum(p * p) / D + eps)
    score = tl.sum(p * tl.load(w + c, mask=m, other=0.0)) * r_p
    over = tl.where(summed, score - tl.load(lse + j * T + t), -float("inf"))
    h = o + (p - o) / (1.0 + tl.exp(-over))
    r_h = 1.0
    x = h
    if NORM:
        r_h = tl.rsqrt(tl.sum(h * h) / D + norm_eps)
        x = h * r_h * tl.load(g + c, mask=m, other=0.0)
    tl.store(x_out + k, x.to(x_out.dtype.element_ty), mask=m)
    if KEEP:
        tl.store(h_out + k, h.to(h_out.dtype.element_ty), mask=m)
    tl.store(stats + t, score)
    tl.store(stats + T + t, r_p)
    tl.store(stats + 2 * T + t, over)
    tl.store(stats + 3 * T + t, r_h)


@triton.jit
def backward(
    w, g, mixtures, streams, stats, d_x, d_h, _0, _1, _2, control, T,
    d_stream, d_mixtures, d_lse, dw, dg,
    D: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows in strides of the grid; dw and dg leave as one [D] partial per program.

    d_stream is added to in place; d_mixtures and d_lse are only written.
    """
    start, c = tl.program_id(0), tl.arange(0, BD)
    j, summed = tl.load(control).to(tl.int64), tl.load(control + 1) == 0
    at = tl.load(control + 2).to(tl.int64)
    m = c < D
    seen = c < tl.where(summed, D, 0)
    dw_sum = tl.zeros([BD], tl.float32)
    dg_sum = tl.zeros([BD], tl.float32)
    for i in tl.range(start, T, tl.num_programs(0), num_stages=STAGES):  # an asynchronous ring of rows
        t = tl.full([], 0, tl.int64) + i
        k, row_j = t * D + c, (j * T + t) * D + c
        p = tl.load(streams + (at * T + t) * D + c, mask=seen, other=0.0).to(tl.float32)
        o = tl.load(mixtures + row_j, mask=m, other=0.0).to(tl.float32)
        d = tl.load(d_x + k, mask=m, other=0.0).to(tl.float32)
        later = tl.load(d_stream + k, mask=seen, other=0.0).to(tl.float32)
        score, r_p = tl.load(stats + t), tl.load(stats + T + t)
        over, r_h = tl.load(stats + 2 * T + t), tl.load(stats + 3 * T + t)
        gate, rest = 1.0 / (1.0 + tl.exp(-over)), 1.0 / (1.0 + tl.exp(over))  # 1 - gate would cancel
        u = p - o
        d_mix = d
        if NORM:
            h = (o + gate * u) * r_h
            q = d * tl.load(g + c, mask=m, other=0.0)
            d_mix = (q - h * (tl.sum(h * q) / D)) * r_h
            dg_sum += h * d
        if KEEP:
            d_mix += tl.load(d_h + k, mask=m, other=0.0).to(tl.float32)
        d_score = gate * rest * tl.sum(d_mix * u)
        along = d_score * r_p
        wv = tl.load(w + c, mask=m, other=0.0)  # out of the cache: registers are scarcer
        own = gate * d_mix + along * wv - (along * score * r_p / D) * p
        tl.store(d_stream + k, (later + own).to(d_stream.dtype.element_ty), mask=seen)
        tl.store(d_mixtures + row_j, (rest * d_mix).to(d_mixtures.dtype.element_ty), mask=m)
        tl.store(d_lse + j * T + t, -d_score)
        dw_sum += along * p
    tl.store(dw + start * D + c, dw_sum, mask=m)
    if NORM:
        tl.store(dg + start * D + c, dg_sum, mask=m)
