"""Phase 1 in Triton: tl.dot over chunks of D. See triton.py, which imports this only when called.

Inputs (scalars too) come first, then outputs, then constants. An input in the place of which an output lies
is read through the output's argument: `_0` and so on stand where its own would be. The sources are up to ten
arrays of N0 .. N9 rows; a tile holds TOK tokens of all rows, padded to NR of them, and SP padded queries.
`seen` [NR] says which rows are visible: the others move no bytes. The fp32 side of a product enters as two
halves in the sources' dtype (2^-16), queries in three, so nothing but the result is rounded; fp32 sources
multiply in fp32.
"""

import triton
import triton.language as tl


@triton.jit
def pick(address, row, array, at: tl.constexpr, rows: tl.constexpr, stride):
    """Addresses, with those of the rows from `at` on in `array`."""
    mine = (row >= at) & (row < at + rows)
    return tl.where(mine, array.to(tl.int64) + (row - at).to(tl.int64) * stride, address)


@triton.jit
def addresses(
    row, token, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, T, BYTES: tl.constexpr, D: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    N5: tl.constexpr, N6: tl.constexpr, N7: tl.constexpr, N8: tl.constexpr, N9: tl.constexpr,
):  # fmt: skip
    """Pointers to each row and token, 16-byte aligned where a row of D is."""
    stride = (tl.full([], 0, tl.int64) + T) * (D * BYTES)
    a = tl.zeros(row.shape, tl.int64) + v0.to(tl.int64)
    a = pick(a, row, v0, 0, N0, stride)
    a = pick(a, row, v1, N0, N1, stride)
    a = pick(a, row, v2, N0 + N1, N2, stride)
    a = pick(a, row, v3, N0 + N1 + N2, N3, stride)
    a = pick(a, row, v4, N0 + N1 + N2 + N3, N4, stride)
    a = pick(a, row, v5, N0 + N1 + N2 + N3 + N4, N5, stride)
    a = pick(a, row, v6, N0 + N1 + N2 + N3 + N4 + N5, N6, stride)
    a = pick(a, row, v7, N0 + N1 + N2 + N3 + N4 + N5 + N6, N7, stride)
    a = pick(a, row, v8, N0 + N1 + N2 + N3 + N4 + N5 + N6 + N7, N8, stride)
    a = pick(a, row, v9, N0 + N1 + N2 + N3 + N4 + N5 + N6 + N7 + N8, N9, stride)
    a += token.to(tl.int64) * (D * BYTES)
    # Without the promise every load is two bytes wide; a pointer chosen by tl.where carries none.
    if D * BYTES % 16 == 0:
        a = tl.multiple_of(a, 16)
    pointers = a.to(tl.pointer_type(v0.dtype.element_ty), bitcast=False)
    if D * BYTES % 16 == 0:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def product(a, b, acc):
    """acc + a @ b, a in fp32 as two halves in b's dtype."""
    if b.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        high = a.to(b.dtype)
        acc = tl.dot(high, b, acc)
        acc = tl.dot((a - high.to(tl.float32)).to(b.dtype), b, acc)
    return acc


@triton.jit
def scores(w, v, acc):
    """acc + w @ v, w in fp32 as three parts in v's dtype: where it is bf16 they add up to it."""
    acc = product(w, v, acc)
    if v.dtype != tl.float32:
        rest = w - w.to(v.dtype).to(tl.float32)
        acc = tl.dot((rest - rest.to(v.dtype).to(tl.float32)).to(v.dtype), v, acc)
    return acc


@triton.jit
def forward(
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, w, seen, T, eps,
    mixture, lse, logits, rstd,
    R: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr,
    NR: tl.constexpr, SP: tl.constexpr, TOK: tl.constexpr, BK: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    N5: tl.constexpr, N6: tl.constexpr, N7: tl.constexpr, N8: tl.constexpr, N9: tl.constexpr,
):  # fmt: skip
    """TOK tokens in two sweeps over D; the second finds the sources in the cache."""
    line = tl.arange(0, TOK * NR)
    row, t = line % NR, tl.program_id(0) * TOK + line // NR
    live = (tl.load(seen + row) != 0) & (t < T)
    source = addresses(
        row, t, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, T, BYTES, D, N0, N1, N2, N3, N4, N5, N6, N7, N8, N9
    )
    kc, q = tl.arange(0, BK), tl.arange(0, SP)
    dots = tl.zeros([SP, TOK * NR], tl.float32)
    squares = tl.zeros([TOK * NR], tl.float32)
    for k in range(0, D, BK):
        c = k + kc
        v = tl.load(source[:, None] + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0)
        wk = tl.load(w + q[:, None] * D + c[None, :], mask=(q < S)[:, None] & (c < D)[None, :], other=0.0)
        dots = scores(wk, tl.trans(v), dots)
        f = v.to(tl.float32)
        squares += tl.sum(f * f, 1)
    r = tl.rsqrt(squares / D + eps)
    score = tl.trans(dots) * r[:, None]
    at = t.to(tl.int64) * R + row
    stored = (row < R) & (t < T)
    tl.store(logits + at[:, None] * S + q[None, :], tl.where(live[:, None], score, -float("inf")),
             mask=stored[:, None] & (q < S)[None, :])  # fmt: skip
    tl.store(rstd + at, r, mask=stored)
    visible = tl.reshape(tl.load(seen + row) != 0, [TOK, NR, 1])
    x = tl.where(visible, tl.reshape(score, [TOK, NR, SP]), -float("inf"))
    top = tl.max(x, 1)
    e = tl.exp(x - top[:, None, :])
    total = tl.sum(e, 1)
    tt = tl.program_id(0).to(tl.int64) * TOK + tl.arange(0, TOK)
    out = (tt < T)[:, None] & (q < S)[None, :]
    tl.store(lse + q[None, :] * T + tt[:, None], top + tl.log(total), mask=out)
    a = tl.permute(e / total[:, None, :], [0, 2, 1])
    target = mixture + (q[None, :] * T + tt[:, None]) * D
    for k in range(0, D, BK):
        c = k + kc
        v = tl.load(source[:, None] + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0)
        y = product(a, tl.reshape(v, [TOK, NR, BK]), tl.zeros([TOK, SP, BK], tl.float32))
        tl.store(target[:, :, None] + c[None, None, :], y.to(mixture.dtype.element_ty),
                 mask=out[:, :, None] & (c < D)[None, None, :])  # fmt: skip


@triton.jit
def dscore(
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, d_mixture, d_lse, lse, logits, rstd, seen, T,
    cs,
    R: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr,
    NR: tl.constexpr, SP: tl.constexpr, TOK: tl.constexpr, BK: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    N5: tl.constexpr, N6: tl.constexpr, N7: tl.constexpr, N8: tl.constexpr, N9: tl.constexpr,
):  # fmt: skip
    """C [tokens, R, S]: cotangents of the logits times rstd."""
    line = tl.arange(0, TOK * NR)
    row, t = line % NR, tl.program_id(0) * TOK + line // NR
    live = (tl.load(seen + row) != 0) & (t < T)
    source = addresses(
        row, t, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, T, BYTES, D, N0, N1, N2, N3, N4, N5, N6, N7, N8, N9
    )
    kc, q = tl.arange(0, BK), tl.arange(0, SP)
    tt = tl.program_id(0).to(tl.int64) * TOK + tl.arange(0, TOK)
    out = (tt < T)[:, None] & (q < S)[None, :]
    cotangent = d_mixture + (q[None, :] * T + tt[:, None]) * D
    d_a = tl.zeros([TOK, NR, SP], tl.float32)
    for k in range(0, D, BK):
        c = k + kc
        v = tl.load(source[:, None] + c[None, :], mask=live[:, None] & (c < D)[None, :], other=0.0)
        y = tl.load(
            cotangent[:, :, None] + c[None, None, :], mask=out[:, :, None] & (c < D)[None, None, :], other=0.0
        )
        d_a = tl.dot(tl.reshape(v, [TOK, NR, BK]), tl.permute(y, [0, 2, 1]), d_a, input_precision="ieee")
    at = t.to(tl.int64) * R + row
    stored = ((row < R) & (t < T))[:, None] & (q < S)[None, :]
    score = tl.load(logits + at[:, None] * S + q[None, :], mask=stored, other=-float("inf"))
    total = tl.load(lse + q[None, :] * T + tt[:, None], mask=out, other=0.0)
    d_total = tl.load(d_lse + q[None, :] * T + tt[:, None], mask=out, other=0.0)
    a = tl.exp(tl.reshape(score, [TOK, NR, SP]) - total[:, None, :])
    d_score = a * (d_a - (tl.sum(a * d_a, 1) - d_total)[:, None, :])
    r = tl.load(rstd + at, mask=live, other=0.0)
    tl.store(cs + at[:, None] * S + q[None, :], tl.reshape(d_score, [TOK * NR, SP]) * r[:, None], mask=stored)


@triton.jit
def apply(
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, d_mixture, lse, logits, rstd, cs, w, seen, T,
    _0, _1, _2, _3, _4, _5, _6, _7, _8, _9, d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, dw,
    R: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr,
    NR: tl.constexpr, SP: tl.constexpr, TOK: tl.constexpr, BK: tl.constexpr, GIVEN: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    N5: tl.constexpr, N6: tl.constexpr, N7: tl.constexpr, N8: tl.constexpr, N9: tl.constexpr,
):  # fmt: skip
    """d += A^T dO + C w - mean(C logit) rstd v for one chunk of D, and dw [programs, S, D] = C^T V.

    d0 .. d9 are added to in place if GIVEN, only written if not.
    """
    start, line = tl.program_id(0), tl.arange(0, TOK * NR)
    row, c, q = line % NR, tl.program_id(1) * BK + tl.arange(0, BK), tl.arange(0, SP)
    visible = tl.load(seen + row) != 0
    wk = tl.load(w + q[:, None] * D + c[None, :], mask=(q < S)[:, None] & (c < D)[None, :], other=0.0)
    w_high = wk.to(v0.dtype.element_ty)
    w_low = (wk - w_high.to(tl.float32)).to(v0.dtype.element_ty)
    dw_sum = tl.zeros([SP, BK], tl.float32)
    for block in range(start, tl.cdiv(T, TOK), tl.num_programs(0)):
        t = block * TOK + line // NR
        live, inside = visible & (t < T), (row < R) & (t < T)
        full = live[:, None] & (c < D)[None, :]
        source = addresses(
            row, t, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, T, BYTES, D,
            N0, N1, N2, N3, N4, N5, N6, N7, N8, N9
        )  # fmt: skip
        at = t.to(tl.int64) * R + row
        small = inside[:, None] & (q < S)[None, :]
        tt = (tl.full([], 0, tl.int64) + block) * TOK + tl.arange(0, TOK)
        out = (tt < T)[:, None] & (q < S)[None, :]
        score = tl.load(logits + at[:, None] * S + q[None, :], mask=small, other=-float("inf"))
        total = tl.load(lse + q[None, :] * T + tt[:, None], mask=out, other=0.0)
        cm = tl.load(cs + at[:, None] * S + q[None, :], mask=live[:, None] & (q < S)[None, :], other=0.0)
        v = tl.load(source[:, None] + c[None, :], mask=full, other=0.0)
        y = tl.load(d_mixture + (q[None, :, None] * T + tt[:, None, None]) * D + c[None, None, :],
                    mask=out[:, :, None] & (c < D)[None, None, :], other=0.0)  # fmt: skip
        a = tl.exp(tl.reshape(score, [TOK, NR, SP]) - total[:, None, :])
        z = tl.reshape(product(a, y, tl.zeros([TOK, NR, BK], tl.float32)), [TOK * NR, BK])
        z = product(cm, w_high, z)
        if BYTES == 2:
            z = product(cm, w_low, z)
        r = tl.load(rstd + at, mask=live, other=0.0)
        along = tl.sum(cm * tl.where(score > -float("inf"), score, 0.0), 1) * r / D
        z -= along[:, None] * v.to(tl.float32)
        dw_sum = product(tl.trans(cm), v, dw_sum)
        target = addresses(
            row, t, d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, T, BYTES, D,
            N0, N1, N2, N3, N4, N5, N6, N7, N8, N9
        )  # fmt: skip
        if GIVEN:
            z += tl.load(target[:, None] + c[None, :], mask=full, other=0.0).to(tl.float32)
        written = full if GIVEN else inside[:, None] & (c < D)[None, :]
        tl.store(target[:, None] + c[None, :], z.to(d0.dtype.element_ty), mask=written)
    tl.store(dw + (start.to(tl.int64) * S + q[:, None]) * D + c[None, :], dw_sum,
             mask=(q < S)[:, None] & (c < D)[None, :])  # fmt: skip


@triton.jit
def one_forward(
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, w, seen, T, eps,
    mixture, lse, logits, rstd,
    R: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    N5: tl.constexpr, N6: tl.constexpr, N7: tl.constexpr, N8: tl.constexpr, N9: tl.constexpr,
):  # fmt: skip
    """One query, one token: rows come one after the other and are forgotten; the softmax is a running one."""
    t, c = tl.program_id(0), tl.arange(0, BD)
    wv = tl.load(w + c, mask=c < D, other=0.0)
    out = tl.zeros([BD], tl.float32)
    top = tl.full([], -1e30, tl.float32)  # not -inf: a hidden row may come first
    total = tl.zeros([], tl.float32)
    for step in tl.range(0, R, num_stages=STAGES):
        i = tl.full([], 0, tl.int32) + step
        source = addresses(
            i, t, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, T, BYTES, D, N0, N1, N2, N3, N4, N5, N6, N7, N8, N9
        )
        live = tl.load(seen + i) != 0
        v = tl.load(source + c, mask=c < tl.where(live, D, 0), other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(v * v) / D + eps)
        score = tl.where(live, tl.sum(v * wv) * r, -float("inf"))
        at = t.to(tl.int64) * R + i
        tl.store(logits + at, score)
        tl.store(rstd + at, r)
        higher = tl.maximum(top, score)
        kept, e = tl.exp(top - higher), tl.exp(score - higher)
        out, total, top = out * kept + e * v, total * kept + e, higher
    tl.store(lse + t, top + tl.log(total))
    tl.store(mixture + t.to(tl.int64) * D + c, (out / total).to(mixture.dtype.element_ty), mask=c < D)


@triton.jit
def one_backward(
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, d_mixture, d_lse, lse, logits, rstd, w, seen, T,
    _0, _1, _2, _3, _4, _5, _6, _7, _8, _9, d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, dw,
    R: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr, BD: tl.constexpr, NR: tl.constexpr,
    STAGES: tl.constexpr, GIVEN: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    N5: tl.constexpr, N6: tl.constexpr, N7: tl.constexpr, N8: tl.constexpr, N9: tl.constexpr,
):  # fmt: skip
    """One query: a token's rows twice, then from the cache; dw leaves as one partial per program."""
    start, c, rows = tl.program_id(0), tl.arange(0, BD), tl.arange(0, NR)
    dw_sum = tl.zeros([BD], tl.float32)
    for token in range(start, T, tl.num_programs(0)):
        t = tl.full([], 0, tl.int32) + token
        d = tl.load(d_mixture + t.to(tl.int64) * D + c, mask=c < D, other=0.0).to(tl.float32)
        d_a = tl.zeros([NR], tl.float32)
        for step in tl.range(0, R, num_stages=STAGES):
            i = tl.full([], 0, tl.int32) + step
            source = addresses(
                i, t, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, T, BYTES, D,
                N0, N1, N2, N3, N4, N5, N6, N7, N8, N9
            )  # fmt: skip
            live = tl.load(seen + i) != 0
            v = tl.load(source + c, mask=c < tl.where(live, D, 0), other=0.0).to(tl.float32)
            d_a = tl.where(rows == i, tl.sum(v * d), d_a)
        at = t.to(tl.int64) * R + rows
        score = tl.load(logits + at, mask=rows < R, other=-float("inf"))
        a = tl.exp(score - tl.load(lse + t))
        r = tl.load(rstd + at, mask=rows < R, other=0.0)
        cs = a * (d_a - (tl.sum(a * d_a) - tl.load(d_lse + t))) * r
        along = cs * tl.where(score > -float("inf"), score, 0.0) * r / D
        for step in tl.range(0, R, num_stages=STAGES):
            i = tl.full([], 0, tl.int32) + step
            source = addresses(
                i, t, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, T, BYTES, D,
                N0, N1, N2, N3, N4, N5, N6, N7, N8, N9
            )  # fmt: skip
            target = addresses(
                i, t, d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, T, BYTES, D,
                N0, N1, N2, N3, N4, N5, N6, N7, N8, N9
            )  # fmt: skip
            live = tl.load(seen + i) != 0
            full = c < tl.where(live, D, 0)
            v = tl.load(source + c, mask=full, other=0.0).to(tl.float32)
            mine = rows == i
            a_i, c_i = tl.sum(tl.where(mine, a, 0.0)), tl.sum(tl.where(mine, cs, 0.0))
            wv = tl.load(w + c, mask=c < D, other=0.0)  # out of the cache: registers are scarcer
            z = a_i * d + c_i * wv - tl.sum(tl.where(mine, along, 0.0)) * v
            dw_sum += c_i * v
            if GIVEN:
                z += tl.load(target + c, mask=full, other=0.0).to(tl.float32)
                tl.store(target + c, z.to(d0.dtype.element_ty), mask=full)
            else:
                tl.store(target + c, z.to(d0.dtype.element_ty), mask=c < D)
    tl.store(dw + start.to(tl.int64) * D + c, dw_sum, mask=c < D)
