"""Residual schemes against their equations in numpy, token by token."""

from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys
from test_schemes import KINDS, D, drawn, make

L, M = len(KINDS), 4
rms = lambda v, axis=-1: np.sqrt(np.mean(v * v, axis, keepdims=True) + 1e-6)  # noqa: E731
sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731


def run(scheme, toy):
    """The record, and all parameters and outputs as fp64 numpy."""
    toy = toys.cast(toy, "float64")
    record = jax.jit(
        lambda toy: toys.run(scheme, KINDS, toy, record=True).record, compiler_options=toys.QUICK
    )(toy)
    return record, jax.tree.map(np.asarray, toy.mix), np.asarray(record.outputs)


def check(name, equation, **options):
    """`equation(p, s, y, l) -> h, s` of one sublayer and `equation(p, s, None, L) -> h` of the output, given
    the outputs of the sublayers: the recorded inputs of all of them."""
    scheme = make(name, **options)
    record, mix, v = run(scheme, drawn(scheme, B=1, T=2))
    state, h = v[:1].repeat(M, 0), []
    for l, y in enumerate(v[1:]):
        read, state = equation({k: a[l] for k, a in mix["sublayers"].items()}, state, y)
        h.append(read)
    h.append(equation(mix["output"], state, None)[0])
    oracle.assert_close(record.mixtures, np.stack(h), 1e-12)


def manifold(mixing):
    """arXiv 2512.24880, eqs. 6 to 8 and 3: one token at a time, as matrices."""

    def equation(p, x, y):
        if y is None:
            return x.sum(0), x
        h, after = np.zeros(x.shape[1:]), np.zeros(x.shape)
        for b, t in np.ndindex(*x.shape[1:3]):
            streams = x[:, b, t]  # [m, D]
            flat = streams.reshape(-1)
            normed = flat / np.sqrt(np.mean(flat**2) + 1e-6)
            phi = p["phi"].reshape(M * D, -1)
            pre, post, res = np.split(normed @ phi, [M, 2 * M])
            h_pre = sigmoid(p["scale"][0] * pre + p["pre"])
            h_post = 2 * sigmoid(p["scale"][1] * post + p["post"])
            h_res = mixing(p["scale"][2] * res + p["res"])
            h[b, t] = h_pre @ streams
            after[:, b, t] = h_res @ streams + np.outer(h_post, y[b, t])
        return h, after

    return equation


def sinkhorn(logits, iterations=20):
    matrix = np.exp(logits.reshape(M, M))
    for _ in range(iterations):
        matrix = matrix / matrix.sum(0, keepdims=True)
        matrix = matrix / matrix.sum(1, keepdims=True)
    return matrix


def convex(logits):
    share, matrix = np.exp(logits) / np.exp(logits).sum(), np.zeros((M, M))
    for weight, order in zip(share, permutations(range(M)), strict=True):
        for row, column in enumerate(order):
            matrix[row, column] += weight
    return matrix


def test_mhc(x64):
    check("mhc", manifold(sinkhorn))


def test_mhc_lite(x64):
    check("mhc_lite", manifold(convex))


@pytest.mark.parametrize("name", ["mhc", "mhc_lite"])
@pytest.mark.parametrize(("near_identity", "spread"), [(0, 0.5), (1, 0), (1, 0.5)])
def test_doubly_stochastic(name, near_identity, spread):
    """fp32, 2000 tokens. Twenty iterations leave rows exact; columns where logits are moderate and as mHC
    starts, but up to 1e-2 off in between: the gap that mHC-lite closes (2601.05732)."""
    scheme = make(name)
    noise = spread * np.random.default_rng(0).standard_normal((len(scheme.identity), 100, 20))
    logits = near_identity * scheme.identity[:, None, None] + noise
    H = np.asarray(jax.jit(scheme.mixing)(logits.astype("float32")))
    assert H.shape == (M, M, 100, 20)
    assert H.min() >= 0
    np.testing.assert_allclose(H.sum(1), 1, atol=1e-6)
    gap = np.abs(H.sum(0) - 1).max()
    assert 1e-4 < gap < 1e-2 if name == "mhc" and near_identity and spread else gap < 1e-6


def test_mhc_is_tokamax():
    """Google's mHC ops (0.0.17), by our verbs: bf16 streams, fp32 coefficients, one sublayer. Their matrix is
    ours transposed, and so the logits; their epsilons are zero here, for 2512.24880 has none."""
    why = "tokamax (Google's kernels) is not installed: pip install tokamax"
    ops = pytest.importorskip("tokamax.ops", reason=why)
    B, T, eps, rng = 2, 3, 1e-6, np.random.default_rng(0)
    scheme = make("mhc", norm_eps=eps)
    slot = jax.tree.map(lambda a: a[0] + 0.3 * toys.draw(rng, a.shape[1:]), scheme.init(1, D).sublayers)
    slot = toys.cast(slot, "float32")
    s, y = (jnp.asarray(toys.draw(rng, shape), "bfloat16") for shape in ((M, B, T, D), (B, T, D)))

    def turned(a):
        """Logits of res, the last M M of them, as a matrix transposed."""
        first, res = a[: 2 * M], a[2 * M :].reshape(M, M, *a.shape[1:])
        return jnp.concatenate([first, res.swapaxes(0, 1).reshape(M * M, *a.shape[1:])])

    flat = jnp.moveaxis(s, 0, -2).reshape(B * T, M * D)
    base = turned(jnp.concatenate([slot[name] for name in ("pre", "post", "res")]))
    gates = (turned(slot["phi"].reshape(M * D, -1).T), slot["scale"], base, eps, 0.0, 0.0, 2.0, 20)
    post, comb, read = ops.mhc_pre(flat, *gates, implementation="xla")
    after = ops.mhc_post(y.reshape(B * T, D), flat, post, comb, implementation="xla")

    ours, step = scheme.read(slot, None, s, lambda h: h), scheme.step(slot, s, y)
    tokens = lambda a: jnp.moveaxis(a, (-3, -2), (0, 1)).reshape(B * T, -1)  # noqa: E731
    np.testing.assert_allclose(tokens(step.write), post, rtol=1e-6)
    np.testing.assert_allclose(tokens(step.carry), comb.swapaxes(1, 2).reshape(B * T, -1), rtol=2e-5)
    for a, b in ((tokens(ours.x), read), (tokens(scheme.write(slot, s, y)), after)):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2**-7)  # one unit of bf16


def test_hc(x64):
    """arXiv 2409.19606, eqs. 2 to 5 and 10 to 13, with H a matrix of m rows."""

    def equation(p, x, y):
        if y is None:
            return x.sum(0), x
        h, after = np.zeros(x.shape[1:]), np.zeros(x.shape)
        for b, t in np.ndindex(*x.shape[1:3]):
            H = x[:, b, t]
            N = H / rms(H)
            A = p["alpha_scale"] * np.tanh(N @ p["alpha_weight"]) + p["alpha"]
            B = p["beta_scale"] * np.tanh(N @ p["beta_weight"])[:, 0] + p["beta"]
            h[b, t] = A[:, 0] @ H
            after[:, b, t] = A[:, 1:].T @ H + np.outer(B, y[b, t])
        return h, after

    check("hc", equation)


def test_ddl(x64):
    """arXiv 2601.00417, eq. 2.1, with the operator as a matrix."""

    def equation(p, x, y):
        h = np.einsum("m,mbtd->btd", p["combine"], x)
        if y is None:
            return h, x
        after = np.zeros(x.shape)
        for b, t in np.ndindex(*x.shape[1:3]):
            c = h[b, t] / rms(h[b, t])
            beta = 2 * sigmoid(c @ p["beta_weight"][:, 0] + p["beta"])
            v = 4 * sigmoid(c @ p["value_weight"] + p["value"])
            k = y[b, t] / np.sqrt(np.sum(y[b, t] ** 2) + 1e-6)
            X = x[:, b, t].T  # [D, m]
            after[:, b, t] = ((np.eye(D) - beta * np.outer(k, k)) @ X + beta * np.outer(k, v)).T
        return h, after

    check("ddl", equation)


def one_state(update):
    return lambda p, x, y: (x[0], x if y is None else update(p, x[0], y)[None].repeat(M, 0))


def post_norm(alpha):
    def update(p, h, y):
        z = alpha * h + y
        return z / rms(z) * p["norm"]

    return one_state(update)


def test_highway(x64):
    def update(p, h, y):
        g = sigmoid(h @ p["gate"] + p["bias"])
        return g * y + (1 - g) * h

    check("highway", one_state(update))


def test_deepnorm(x64):
    check("deepnorm", post_norm(L**0.25))


def test_keel(x64):
    check("keel", post_norm(L))


def test_siamese(x64):
    def equation(p, x, y):
        read = x[0] + x[1] / rms(x[1]) * p["pre"]
        if y is None:
            return read, x
        z = x[0] + y
        return read, np.stack([z / rms(z) * p["post"], x[1] + y])

    check("siamese", equation)


def test_layer_scale(x64):
    check("layerscale", one_state(lambda p, h, y: h + p["scale"] * y))


def test_rezero(x64):
    check("rezero", one_state(lambda p, h, y: h + p["scale"] * y))


def test_mrla(x64):
    def gate(kernel, v):
        side = len(kernel) // 2
        padded = np.pad(v / rms(v), [(0, 0)] * (v.ndim - 1) + [(side, side)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), -1)
        return 2 * sigmoid(windows @ kernel)

    def equation(p, x, y):
        read = gate(p["query"], x[0]) * x[0]
        return read, x if y is None else (x[0] + gate(p["key"], y) * y)[None]

    check("mrla", equation)


# Dense schemes: every source at hand ------------------------------------------------------------


def dense(name, mixture, **options):
    """`mixture(p, v, h) -> h` of a read, given outputs v and reads h before it."""
    scheme = make(name, **options)
    record, mix, v = run(scheme, drawn(scheme, B=1, T=2))
    h = []
    for l in range(L + 1):
        p = mix["output"] if l == L else {k: a[l] for k, a in mix["sublayers"].items()}
        h.append(mixture(p, v[: l + 1], h))
    oracle.assert_close(record.mixtures, np.stack(h), 1e-12)


def test_densenet(x64):
    dense("densenet", lambda p, v, h: sum(y @ W for y, W in zip(v, p["weight"], strict=False)))


def test_denseformer(x64):
    def mixture(p, v, h):
        x = [v[0], *(a + b for a, b in zip(h, v[1:], strict=True))]
        return sum(a * b for a, b in zip(p["weight"], x, strict=False))

    dense("denseformer", mixture)


def shares(p, sources):
    """AttnRes weights of sources [R, B, T, D]."""
    e = np.exp([np.sum(p["query"] * p["key_scale"] * y / rms(y), -1) for y in sources])
    return e / e.sum(0)


def test_rms_block(x64):
    """Blocks of 3 among 9 sublayers; sources of a read inside a block end with the raw running sum."""

    def mixture(p, v, h):
        l = len(v) - 1
        full = [sum(y / rms(y) for y in v[i : i + 3]) for i in range(1, 3 * (l // 3) + 1, 3)]
        sources = [v[0], *full, *([sum(v[3 * (l // 3) + 1 :])] if l % 3 else [])]
        return np.einsum("rbt,rbtd->btd", shares(p, sources), np.stack(sources))

    dense("rms_block", mixture)


@pytest.mark.parametrize(("name", "S"), [("delta", 1), ("delta_block", 3)])
def test_delta(name, S, x64):
    def mixture(p, v, h):
        l = len(v) - 1
        sources = [v[0], *(v[i : i + S].sum(0) for i in range(1, S * (l // S) + 1, S))]
        routed = len(sources) > 1 and "query" in p
        a = shares(p, sources) if routed else np.zeros((len(sources), *v.shape[1:3]))
        return v.sum(0) + np.einsum("rbt,rbtd->btd", a, np.stack(sources))

    dense(name, mixture)


def test_window(x64):
    def mixture(p, v, h):
        v = [v[0], *v[1:][-2:]]
        e = np.exp([np.sum(p["query"] * p["key_scale"] * y / rms(y), -1) for y in v])
        return np.einsum("rbt,rbtd->btd", e / e.sum(0), v)

    dense("window", mixture, window=2)


def test_input_query(x64):
    """Each token asks by what the read before gave it, the second by the embedding: paper, Table 4."""

    def mixture(p, v, h):
        before = h[-1] if h else v[0]
        query = p["query"] + before @ p["query_map"] / D
        return np.einsum("rbt,rbtd->btd", shares(p | {"query": query}, v), v)

    dense("full_input_query", mixture)
