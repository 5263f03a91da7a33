"""How else a read may weigh its sources: every switch against its own equations in fp64, all gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys

from attnres_jax import depth, ops
from attnres_jax.depth import Rows
from attnres_jax.residuals.ablations import Additive, Biased
from attnres_jax.residuals.attention import AttnRes
from attnres_jax.rules import Rule, no_kernel

EPS, D, HEADS, KEYS = 1e-6, 8, 2, 3
KINDS = "mmmmmm"  # three blocks of two: the last ones are one scan
CASES = {
    "sigmoid": (AttnRes, {"activation": "sigmoid"}),
    "unnormed": (AttnRes, {"key_norm": False}),
    "heads": (AttnRes, {"heads": HEADS}),
    "sliced": (AttnRes, {"key_width": KEYS}),
    "biased": (Biased, {}),
    "static": (Biased, {"queries": False}),
    "additive": (Additive, {}),
    "sigmoid_heads_biased": (Biased, {"activation": "sigmoid", "heads": HEADS}),
    "additive_unnormed_heads": (Additive, {"key_norm": False, "heads": HEADS}),
}
FAST = ("sigmoid", "heads", "biased")
cases = pytest.mark.parametrize(
    "case", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES]
)
sizes = pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])


def scheme_of(case, size):
    cls, switches = CASES[case]
    return cls(block_size=size, eps=EPS, **switches)


def read(case, values, query, key_scale, eps, present, logits):
    """The equations, head by head; values [R,B,T,D] -> h, weights [R,B,T] or, with heads, [R,B,T,H]."""
    cls, switches = CASES[case]
    values = jnp.where(present[:, None, None, None], values, 0)
    keys = values[..., D - KEYS :] if "key_width" in switches else values
    if switches.get("key_norm", True):
        keys = keys / jnp.sqrt((keys**2).mean(-1, keepdims=True) + eps)
    keys, heads, parts, found = keys * key_scale, switches.get("heads", 1), [], []
    for h in range(heads):
        own, of_keys = slice(h * D // heads, (h + 1) * D // heads), slice(None)
        of_keys = own if heads > 1 else of_keys
        score = (query[of_keys] * keys[..., of_keys]).sum(-1) + logits[:, None, None]
        score = jnp.where(present[:, None, None], score, -jnp.inf)
        if switches.get("activation") == "sigmoid":
            weights = 1 / (1 + jnp.exp(-score))
        else:
            exponentials = jnp.exp(score - score.max(0))
            weights = exponentials / exponentials.sum(0)
        weights = weights + present[:, None, None] * (cls is Additive)
        parts.append((weights[..., None] * values[..., own]).sum(0))
        found.append(weights)
    return jnp.concatenate(parts, -1), found[0] if heads == 1 else jnp.stack(found, -1)


def equations(case, size, toy):
    """The network by the oracle, its parameters in the oracle's order of sources."""
    scheme = scheme_of(case, size)
    both = {k: jnp.concatenate([v, toy.mix["output"][k][None]]) for k, v in toy.mix["sublayers"].items()}
    width, reads = KEYS if case == "sliced" else D, len(KINDS) + 1
    sources = oracle.block_sources(len(KINDS), size)
    query = both.get("query", jnp.zeros((reads, width)))
    scale = both.get("key_scale", jnp.ones((reads, width)))
    logits = jnp.zeros(sources.shape[:2])
    if "logits" in both:
        counts = scheme.schedule(len(KINDS)).counts
        for l, n in enumerate(counts):
            running = l < len(KINDS) and l % size > 0
            columns = [*range(n - running), *[sources.shape[1] - 1] * running]
            logits = logits.at[l, :n].set(both["logits"][l, np.array(columns)])
    layers = toys.layers(toy.params)
    how = partial(read, case)
    return oracle.stack(sources, query, scale, KINDS, layers, toy.x, EPS, how, (logits,))


def with_gradient(network, toy):
    def loss(toy):
        h, rest = network(toy)
        return jnp.sum(h * toys.probe(h)), (h, rest)

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=toys.QUICK)
    (_, out), gradient = compiled(toy)
    return out, gradient


@cases
@sizes
def test_network(case, size):
    """Literal with its weights, and two-phase through the scan: values and all gradients."""
    scheme = scheme_of(case, size)
    with jax.enable_x64():
        toy = toys.cast(toys.toy(scheme, KINDS, B=2, T=3, D=D), "float64")

        def literal(toy):
            out = toys.run(scheme, KINDS, toy, record=True)
            return out.h, out.record

        def fast(toy):
            return toys.run(scheme, KINDS, toy).h, None

        def by_equations(toy):
            out = equations(case, size, toy)
            return out.h, (out.outputs, out.mixtures, out.weights)

        (want, of), gradient = with_gradient(by_equations, toy)
        (h, record), got = with_gradient(literal, toy)
        oracle.assert_close(h, want, 1e-12)
        oracle.assert_close(got, gradient, 1e-10)
        sources = scheme.sources(len(KINDS))
        for l, weights in enumerate(record.weights):
            oracle.assert_close(weights, of[2][l][: len(weights)], 1e-12)
            each = jnp.repeat(weights.reshape(*weights.shape[:3], -1), D // scheme.heads, -1)
            named = jnp.einsum("rbtd,ri,ibtd->btd", each, sources[l, : len(weights)], record.outputs)
            oracle.assert_close(named, record.mixtures[l], 1e-12)
        (h, _), got = with_gradient(fast, toy)
        oracle.assert_close(h, want, 1e-12)
        oracle.assert_close(got, gradient, 1e-10)


@pytest.mark.parametrize("rule", [Rule(EPS, "sigmoid"), Rule(EPS, heads=HEADS), Rule(EPS, key_width=KEYS)])
def test_rounded_once(rule):
    """bf16: results have the sources' dtype, statistics at least fp32, and the error of one rounding."""
    v, w = jax.random.normal(jax.random.key(0), (5, 7, D), "bfloat16"), jnp.ones((2, rule.key_width or D)) / D
    done = ops.depth_mix(w, (Rows(v[:4]),), rule=rule)[0]
    h, _, _ = ops.depth_merge(w[1], done, v[4], 1, False, rule=rule)
    assert (done.mixture.dtype, h.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert done.lse is None or done.lse.dtype == jnp.float32
    with jax.enable_x64():
        wide = jnp.asarray(np.asarray(v, np.float64))
        want = depth.mix(jnp.asarray(np.asarray(w, np.float64))[1], list(wide), rule).mixture
    oracle.assert_close(h, want, 5e-3)


def test_logits_start():
    """Recency: what is older weighs less, by one unit a source; the running sum is the youngest."""
    init = Biased(block_size=2, recency=0.5).init(4, D)
    np.testing.assert_array_equal(init.sublayers["logits"][:, :1].ravel(), [0, -0.5, -0.5, -1])
    np.testing.assert_array_equal(init.sublayers["logits"][3], [-1, -0.5, 0])
    np.testing.assert_array_equal(init.output["logits"], [-1, -0.5, 0])


def test_bad_rules():
    for problem, rule in {
        "activation must be 'softmax' or 'sigmoid', got 'relu'": {"activation": "relu"},
        "heads must divide the width 8, got 3": {"heads": 3},
        "key_width must lie in 1..8": {"key_width": 9},
        "sliced keys have one head": {"key_width": 4, "heads": 2},
    }.items():
        with pytest.raises(ValueError, match=problem):
            AttnRes(**rule).init(2, D)


def test_no_kernel():
    """A named kernel raises with the reason; without a name the reference runs."""
    v, w = jnp.ones((2, 8, 128)), jnp.ones((1, 128))
    assert no_kernel(Rule(1e-5), None) is None
    for rule, logits in ((Rule(heads=2), None), (Rule(), jnp.zeros((1, 2)))):
        for name in ("tpu", "gpu", "triton"):
            with pytest.raises(ValueError, match=f"'{name}': kernels know one softmax"):
                ops.depth_mix(w, (Rows(v),), rule=rule, logits=logits, implementation=name)
        assert ops.depth_mix(w, (Rows(v),), rule=rule, logits=logits)[0].mixture.shape == (1, 8, 128)
