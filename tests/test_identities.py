"""The algebra of depth mixing: statements that hold whatever the numbers are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys
from flax import nnx

from attnres_jax import depth
from attnres_jax.depth import Partial, Rows
from attnres_jax.models.transformer import ModelConfig, Transformer
from attnres_jax.rules import Rule
from attnres_jax.stack import start

EPS = 1e-6
QUICK = toys.QUICK


def sources_of(R, D=8, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    values = jnp.asarray(toys.draw(rng, (R, 2, 3, D), 2.0), dtype)
    return jnp.asarray(toys.draw(rng, (D,), D**-0.5), dtype), list(values)


# One read ---------------------------------------------------------------------------------------


def test_zero_query_is_the_mean(x64):
    w, sources = sources_of(5)
    read = depth.mix(0 * w, sources, Rule(EPS))
    np.testing.assert_allclose(read.mixture, np.mean(sources, axis=0), rtol=0, atol=1e-15)
    np.testing.assert_allclose(read.weights, 0.2, rtol=1e-15)


def test_one_source_is_the_identity(x64):
    """Bit for bit, and the query gets a gradient of exactly zero."""
    w, (v,) = sources_of(1)
    np.testing.assert_array_equal(depth.mix(w, [v], Rule(EPS)).mixture, v)
    assert not jax.grad(lambda w: jnp.sum(depth.mix(w, [v], Rule(EPS)).mixture ** 2))(w).any()


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("name", ["full", "block"])
def test_first_sublayer_reads_the_embedding(name, implementation):
    """Through the stack too, in fp32: the first query is idle, all others are not."""
    kinds, scheme = "amamamam", toys.make(name, 2)
    toy = toys.cast(toys.toy(scheme, kinds), "float32")

    def loss(toy):
        return jnp.sum(toys.run(scheme, kinds, toy, implementation=implementation).h ** 2)

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)(toy).mix
    for leaf in gradient["sublayers"].values():
        assert not leaf[0].any()
        assert leaf[1:].any(axis=1).all()
    assert all(leaf.any() for leaf in gradient["output"].values())


def test_order_of_sources_is_immaterial(x64):
    w, sources = sources_of(6)
    order = [3, 0, 5, 1, 4, 2]
    read, shuffled = (depth.mix(w, s, Rule(EPS)) for s in (sources, [sources[i] for i in order]))
    np.testing.assert_allclose(shuffled.mixture, read.mixture, rtol=1e-13)
    np.testing.assert_allclose(shuffled.weights, read.weights[jnp.array(order)], rtol=1e-13)


def test_scaling_a_source_leaves_its_score(x64):
    w, (v, *_) = sources_of(2)
    score = depth.scores(w, v, Rule(1e-300))
    assert np.abs(score).min() > 1e-3
    np.testing.assert_allclose(depth.scores(w, 1000 * v, Rule(1e-300)), score, rtol=1e-13)
    np.testing.assert_allclose(depth.scores(w, -v, Rule(1e-300)), -score, rtol=1e-13)


def test_output_lies_in_the_convex_hull(x64):
    w, sources = sources_of(4)
    read = depth.mix(30 * w, sources, Rule(EPS))
    np.testing.assert_allclose(read.weights.sum(axis=0), 1, rtol=1e-14)
    assert (read.weights > 0).all()
    assert (read.mixture >= np.min(sources, axis=0) - 1e-14).all()
    assert (read.mixture <= np.max(sources, axis=0) + 1e-14).all()
    assert read.weights.max() > 0.9  # far from the mean, which would lie inside as well


def part(w, sources):
    partial = depth.partial_mix(w[None], (Rows(jnp.stack(sources)),), Rule(EPS))
    return Partial(partial.mixture[0], partial.lse[0])


def test_partial_and_merge_is_direct_at_any_cut(x64):
    w, sources = sources_of(6)
    whole = depth.mix(w, sources, Rule(EPS)).mixture
    for cut in range(1, 6):
        merged = depth.merge(part(w, sources[:cut]), part(w, sources[cut:]))
        np.testing.assert_allclose(merged.mixture, whole, rtol=1e-12)
        np.testing.assert_allclose(merged.lse, part(w, sources).lse, rtol=1e-12)


def test_merge_commutes_and_associates(x64):
    w, sources = sources_of(6)
    a, b, c = part(w, sources[:1]), part(w, sources[1:4]), part(w, sources[4:])
    oracle.assert_close(depth.merge(a, b), depth.merge(b, a), 1e-14)
    left, right = depth.merge(depth.merge(a, b), c), depth.merge(a, depth.merge(b, c))
    oracle.assert_close(left, right, 1e-13)


def test_huge_scores_do_not_overflow():
    """fp32, scores of about a thousand: the softmax is a choice, and everything stays finite."""
    w, sources = sources_of(5, dtype="float32")
    w = 1000 * w
    read = depth.mix(w, sources, Rule(EPS))
    merged = depth.merge(part(w, sources[:2]), part(w, sources[2:]))
    winner = jnp.argmax(depth.scores(w, jnp.stack(sources), Rule(EPS)), axis=0)
    chosen = jnp.take_along_axis(jnp.stack(sources), winner[None, ..., None], axis=0)[0]
    sure = read.weights.max(axis=0) > 1 - 1e-6
    assert sure.any()
    np.testing.assert_allclose(read.mixture[sure], chosen[sure], rtol=1e-6)
    np.testing.assert_allclose(merged.mixture[sure], chosen[sure], rtol=1e-6)
    gradient = jax.grad(lambda w: depth.merge(part(w, sources[:2]), part(w, sources[2:])).mixture.sum())
    assert np.isfinite(gradient(w)).all()


# Whole stacks -----------------------------------------------------------------------------------


def evaluate(function, toy):
    return toys.value_and_gradient(function)(toy)


@pytest.mark.slow
def test_block_of_one_is_full_exactly():
    """Bit for bit, values and gradients, in fp32."""
    kinds = "amkmamk"
    toy = toys.cast(toys.toy(toys.make("full", 1), kinds), "float32")
    full, block = (
        evaluate(lambda toy, s=toys.make(name, 1): toys.run(s, kinds, toy), toy) for name in ("full", "block")
    )
    jax.tree.map(np.testing.assert_array_equal, full, block)


def cursor(scheme, kinds, toy):
    """A model's own Python loop over layers, with the cursor: unrolled, two-phase."""
    mix = scheme.init(len(kinds), toy.x.shape[-1])._replace(**toy.mix)
    layers, state = toys.layers(toy.params), start(scheme, mix, len(kinds), toy.x)
    for l, kind in enumerate(kinds):
        params = jax.tree.map(lambda a, i=kinds[:l].count(kind): a[i], layers[kind].params)
        x = state.read(lambda h, kind=kind, params=params: layers[kind].norm(params)(h)).x
        state = state.write(layers[kind].apply(params, x, None)[0])
    return toys.oracle.Stack(state.finish().mixture, None, None, None, {})


OTHERS = [("block", 2, "amamamk"), ("full", 1, "amkma"), ("plain", 1, "amam")]


@pytest.mark.parametrize(
    ("name", "size", "kinds"),
    [("block", 3, "kmakmakm"), *(pytest.param(*mode, marks=pytest.mark.slow) for mode in OTHERS)],
)
def test_scan_unrolled_and_one_phase_agree(name, size, kinds, x64):
    """The scanned two-phase stack, the unrolled two-phase cursor, the unrolled one-phase literal."""
    scheme = toys.make(name, size)
    toy = toys.cast(toys.toy(scheme, kinds), "float64")
    scanned = evaluate(lambda toy: toys.run(scheme, kinds, toy), toy)
    unrolled = evaluate(lambda toy: cursor(scheme, kinds, toy), toy)
    one_phase = evaluate(lambda toy: toys.run(scheme, kinds, toy, implementation="reference"), toy)
    oracle.assert_close(unrolled, scanned, 1e-12)
    oracle.assert_close(one_phase, scanned, 1e-12)


def ordinary(kinds, toy, norm=toys.rms_norm):
    """h = h + f(norm(h)), as every pre-norm network is written."""
    layers, h = toys.layers(toy.params, norm), toy.x
    for l, kind in enumerate(kinds):
        params = jax.tree.map(lambda a, i=kinds[:l].count(kind): a[i], layers[kind].params)
        h = h + layers[kind].apply(params, norm(params, h), None)[0]
    return oracle.Stack(h, None, None, None, {})


def test_plain_is_the_ordinary_residual(x64):
    kinds, scheme = "amkmamk", toys.make("plain", 1)
    toy = toys.cast(toys.toy(scheme, kinds), "float64")
    got = evaluate(lambda toy: toys.run(scheme, kinds, toy), toy)
    oracle.assert_close(got, evaluate(lambda toy: ordinary(kinds, toy), toy), 1e-12)


def test_the_oracle_against_a_plain_loop(x64):
    """The oracle itself, against numpy loops that spell the paper's definition of a block."""
    kinds, size = "kmkmkmam"[:7], 3
    toy = toys.cast(toys.toy(toys.make("block", size), kinds, B=1), "float64")
    layers, blocks, partial = toys.layers(toy.params), [np.asarray(toy.x)], None

    def read(query, scale):
        sources = blocks if partial is None else [*blocks, partial]
        keys = [v / np.sqrt(np.mean(v**2, -1, keepdims=True) + EPS) * scale for v in sources]
        e = [np.exp(key @ query) for key in keys]
        return sum(a[..., None] * v for a, v in zip(e, sources, strict=True)) / sum(e)[..., None]

    sublayers = {name: np.asarray(leaf) for name, leaf in toy.mix["sublayers"].items()}
    for l, kind in enumerate(kinds):
        h = read(sublayers["query"][l], sublayers["key_scale"][l])
        params = jax.tree.map(lambda a, i=kinds[:l].count(kind): a[i], layers[kind].params)
        y = np.asarray(layers[kind].apply(params, layers[kind].norm(params)(h), None)[0])
        partial = y if partial is None else partial + y
        if (l + 1) % size == 0:
            blocks, partial = [*blocks, partial], None
    h = read(np.asarray(toy.mix["output"]["query"]), np.asarray(toy.mix["output"]["key_scale"]))
    oracle.assert_close(toys.literal("block", size, kinds, toy).h, h, 1e-13)


# Step 0: zero queries are the plain network -----------------------------------------------------

TOLERANCES = {"float64": (1e-9, 1e-9), "float32": (2e-6, 5e-6)}  # loss, gradients


def check_same_loss(results, dtype):
    plain = results.pop("plain")
    for loss, gradient in results.values():
        oracle.assert_close(loss, plain[0], TOLERANCES[dtype][0])
        oracle.assert_close(gradient, plain[1], TOLERANCES[dtype][1])


@pytest.mark.slow  # the language model below says the same with real sublayers
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_step_zero_is_the_plain_network(dtype):
    kinds = "amkmamk"
    toy = toys.toy(toys.make("plain", 1), kinds, T=8, D=32)

    def loss(scheme):
        def function(trained):
            params, x = trained
            mix = scheme.init(len(kinds), x.shape[-1])
            toy = toys.Toy(params, mix._asdict(), x)
            exact = lambda params: toys.layers(params, toys.exact_rms_norm)  # noqa: E731
            h = toys.run(scheme, kinds, toy, exact).h
            logits = toys.exact_rms_norm({"scale": 1.0}, h)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

        return jax.jit(jax.value_and_grad(function), compiler_options=QUICK)

    schemes = {name: toys.make(name, 3, eps=1e-12) for name in ("plain", "full", "block")}
    with jax.enable_x64(dtype == "float64"):
        trained = toys.cast((toy.params, toy.x), dtype)
        check_same_loss({name: loss(scheme)(trained) for name, scheme in schemes.items()}, dtype)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_step_zero_of_the_language_model(dtype):
    """The same seed, and all parameters but the AttnRes ones."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 9)), "int32")
    base = ModelConfig(17, 3, 32, 4, 2, 48, norm_eps=1e-12, key_norm_eps=1e-12, dtype=dtype)

    def result(config):
        model = Transformer(config, rngs=nnx.Rngs(0))
        graph, mix, others = nnx.split(model, lambda path, _: "mix" in path, ...)

        def loss(others):
            logits = nnx.merge(graph, mix, others)(tokens[:, :-1]).logits
            chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

        loss, gradient = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(others)
        return loss, nnx.to_pure_dict(gradient)

    with jax.enable_x64(dtype == "float64"):
        results = {
            name: result(replace(base, residual=name, block_size=size))
            for name, size in (("plain", 1), ("full", 1), ("block", 4))
        }
        assert all(np.linalg.norm(leaf) > 1e-4 for leaf in jax.tree.leaves(results["plain"][1]))
        check_same_loss(results, dtype)


# Causality --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "full", "block"])
def test_no_token_sees_a_later_one(name):
    """Differentiate one token's output: later inputs get exactly zero, earlier ones do not."""
    kinds, scheme, t = "amkmam", toys.make(name, 2), 2
    toy = toys.cast(toys.toy(scheme, kinds, T=5), "float32")
    gradient = jax.jit(
        jax.grad(lambda x: jnp.sum(toys.run(scheme, kinds, toy._replace(x=x)).h[:, t] ** 2)),
        compiler_options=QUICK,
    )(toy.x)
    assert not gradient[:, t + 1 :].any()
    assert (jnp.abs(gradient[:, : t + 1]).max(axis=(0, 2)) > 1e-6).all()


@pytest.mark.parametrize("name", ["plain", "full", "block"])
def test_no_read_sees_a_later_output(name):
    """Layers that return constants and report what they read: d read l / d output j is zero
    exactly where j > l, and nowhere else."""
    L, scheme = 7, toys.make(name, 3)
    toy = toys.cast(toys.toy(scheme, "a" * L, B=1, T=2), "float32")
    rng = np.random.default_rng(2)
    outputs = jnp.asarray(toys.draw(rng, (L, *toy.x.shape)), "float32")

    def layers(params):
        return toys.identity_layers(params, lambda params, x, _: (params["y"], x))

    @jax.jit
    @jax.grad
    def sensitivity(outputs, read):
        given = toy._replace(params={"a": {"y": outputs}})
        return jnp.sum(toys.run(scheme, "a" * L, given, layers).aux["a"][read] ** 2)

    seen = np.array([np.any(sensitivity(outputs, read), axis=(1, 2, 3)) for read in range(L)])
    np.testing.assert_array_equal(seen, np.tri(L, k=-1, dtype=bool))


# Other modes of differentiation -----------------------------------------------------------------

MODES = [("block", 2, "amkma"), ("full", 1, "amk"), ("plain", 1, "amk")]
SECOND_ORDER = [MODES[0], *(pytest.param(*mode, marks=pytest.mark.slow) for mode in MODES[1:])]


def loss_of(network):
    def loss(toy):
        h = network(toy).h
        return jnp.sum(h * toys.probe(h)) + jnp.sum(h**4) / h.size

    return loss


def tiny(name, size, kinds):
    scheme = toys.make(name, size)
    draws = [toys.toy(scheme, kinds, B=1, T=3, D=4, seed=seed) for seed in (0, 1)]
    return scheme, *(toys.cast(toy, "float64") for toy in draws)


@pytest.mark.parametrize(("name", "size", "kinds"), SECOND_ORDER)
def test_forward_mode_and_hessian_in_reference_mode(name, size, kinds, x64):
    scheme, toy, direction = tiny(name, size, kinds)

    def products(network):
        loss = loss_of(network)

        @jax.jit
        def both(toy):
            return (
                jax.jvp(loss, (toy,), (direction,)),
                jax.jvp(jax.grad(loss), (toy,), (direction,))[1],
            )

        return both(toy)

    got = products(lambda toy: toys.run(scheme, kinds, toy, implementation="reference"))
    want = products(lambda toy: toys.literal(name, size, kinds, toy))
    assert abs(want[0][1]) > 1e-2
    oracle.assert_close(got, want, 1e-11)


@pytest.mark.parametrize(("name", "size", "kinds"), [*MODES, ("block", 5, "amkma")])
def test_forward_mode_of_the_fast_path_names_the_way_out(name, size, kinds, x64):
    scheme, toy, direction = tiny(name, size, kinds)
    loss = loss_of(lambda toy: toys.run(scheme, kinds, toy))
    for mode in (
        lambda: jax.jvp(loss, (toy,), (direction,)),
        lambda: jax.jit(lambda t: jax.jvp(loss, (t,), (direction,)))(toy),
        lambda: jax.jvp(jax.grad(loss), (toy,), (direction,)),
        lambda: jax.jacfwd(lambda x: loss(toy._replace(x=x)))(toy.x),
        lambda: jax.hessian(lambda x: loss(toy._replace(x=x)))(toy.x),
    ):
        with pytest.raises(TypeError, match='implementation="reference"'):
            mode()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "kinds"), SECOND_ORDER)
def test_reverse_over_reverse(name, size, kinds, x64):
    """A Hessian-vector product by two reverse passes through the fast path."""
    scheme, toy, direction = tiny(name, size, kinds)

    def product(network):
        loss = loss_of(network)
        return jax.jit(jax.grad(lambda toy: inner(jax.grad(loss)(toy), direction)), compiler_options=QUICK)(
            toy
        )

    got = product(lambda toy: toys.run(scheme, kinds, toy))
    oracle.assert_close(got, product(lambda toy: toys.literal(name, size, kinds, toy)), 1e-11)


def inner(a, b):
    return sum(jnp.vdot(u, v) for u, v in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("over", ["everything", pytest.param("inputs", marks=pytest.mark.slow)])
def test_vmap(over, x64):
    """Over three networks at once, or over three inputs of one network; and gradients per example."""
    name, size, kinds = "block", 2, "amamk"
    scheme = toys.make(name, size)
    draws = [toys.toy(scheme, kinds, B=1, T=3, D=4, seed=seed) for seed in range(3)]
    if over == "inputs":
        draws = [draws[0]._replace(x=toy.x) for toy in draws]
    stacked = toys.cast(jax.tree.map(lambda *leaves: np.stack(leaves), *draws), "float64")
    axes = jax.tree.map(lambda _: 0, stacked)
    if over == "inputs":
        stacked = toys.cast(draws[0], "float64")._replace(x=stacked.x)
        axes = jax.tree.map(lambda _: None, stacked)._replace(x=0)
    function = jax.value_and_grad(loss_of(lambda toy: toys.run(scheme, kinds, toy)))
    got = jax.jit(jax.vmap(function, in_axes=(axes,)), compiler_options=QUICK)(stacked)
    literal = jax.value_and_grad(loss_of(lambda toy: toys.literal(name, size, kinds, toy)))
    each = [jax.jit(literal)(toys.cast(toy, "float64")) for toy in draws]
    oracle.assert_close(got, jax.tree.map(lambda *leaves: np.stack(leaves), *each), 1e-11)
