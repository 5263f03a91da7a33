"""Linen = NNX = the seven verbs = `through_depth`: a model that loops over its own layers, four times.

Linen, NNX and the verbs run the same operations in the same order and agree bit for bit, values and
gradients; `through_depth` scans, and agrees in fp64 to rounding. Names, shapes and initial values
are the same in both; a model that writes too often, or too seldom, is told what to do.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys
from flax import linen, nnx

import attnres_jax.linen
import attnres_jax.nnx
from attnres_jax.residuals import Mix, Scheme
from attnres_jax.stack import Layer, through_depth

SHAPE = (2, 3, 8)  # B, T, D
# name: (scheme, L)
CASES = {
    "plain": (toys.make("plain", 1), 2),
    "full": (toys.make("full", 1), 3),
    "short_last": (toys.make("block", 2), 5),
}
cases = pytest.mark.parametrize(("scheme", "L"), CASES.values(), ids=CASES)


class Nnx(nnx.Module):
    """Any NNX model: four lines are about depth."""

    def __init__(self, scheme, L, D):
        self.depth = attnres_jax.nnx.DepthMix(scheme, L, D)
        self.layers = nnx.List([nnx.Linear(D, D, rngs=nnx.Rngs(0)) for _ in range(L)])

    def __call__(self, x):
        depth = self.depth(x)
        for layer in self.layers:
            depth = depth.write(jnp.tanh(layer(depth.read().x)))
        return depth.finish().x


class Linen(linen.Module):
    """The same in Linen."""

    scheme: Scheme
    L: int

    @linen.compact
    def __call__(self, x):
        depth = attnres_jax.linen.DepthMix(self.scheme, self.L, name="depth")(x)
        for l in range(self.L):
            layer = linen.Dense(x.shape[-1], name=f"layer{l}")
            depth = depth.write(jnp.tanh(layer(depth.read().x)))
        return depth.finish().x


def drawn(scheme, L, dtype="float32"):
    """The parameters of all four, and the embedding."""
    rng, D = np.random.default_rng(0), SHAPE[-1]
    mix = scheme.init(L, D)
    mix = Mix(toys.queries(rng, mix.sublayers), toys.queries(rng, mix.output))
    layers = {"kernel": toys.draw(rng, (L, D, D), D**-0.5), "bias": toys.draw(rng, (L, D), 0.1)}
    return toys.cast(({"mix": mix, "layers": layers}, toys.draw(rng, SHAPE)), dtype)


def each(params, name=lambda l: l):
    """The layers one by one, and the mix under the names of a module; without parameters, no module."""
    L, mix = len(params["layers"]["bias"]), params["mix"].named()
    layers = {name(l): jax.tree.map(lambda leaf, l=l: leaf[l], params["layers"]) for l in range(L)}
    return layers, {"depth": mix} if mix else {}


def nnx_model(scheme, L, params):
    model = Nnx(scheme, L, SHAPE[-1])
    layers, depth = each(params)
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, {"layers": layers} | depth)
    nnx.update(model, state)
    return model


def by_nnx(scheme, L, params, x):
    return nnx_model(scheme, L, params)(x)


def by_linen(scheme, L, params, x):
    layers, depth = each(params, "layer{}".format)
    return Linen(scheme, L).apply({"params": layers | depth}, x)


def by_verbs(scheme, L, params, x):
    """By hand, block by block, as a scheme is defined."""
    (layers, _), mix, at, history = each(params), params["mix"], 0, scheme.start(x)
    for size in scheme.schedule(L).sizes:
        share = {name: leaf[at : at + size] for name, leaf in mix.sublayers.items()}
        slots, history = scheme.open(share, history)
        stream = scheme.begin(history)
        for i in range(size):
            slot = jax.tree.map(lambda leaf, i=i: leaf[i], slots)
            read = scheme.read(slot, history, stream, lambda h: h)
            stream = scheme.write(slot, stream, apply(layers[at + i], read.x, None)[0])
        history = scheme.close(history, stream)
        at += size
    return scheme.finish(mix.output, history).mixture


def by_scan(scheme, L, params, x):
    layers = {"m": Layer(lambda _: lambda h: h, apply, params["layers"])}
    return through_depth(scheme, params["mix"], "m" * L, layers, x).h


def apply(layer, x, _):
    return jnp.tanh(x @ layer["kernel"] + layer["bias"]), None


def loss_of(network, params, x):
    h = network(params, x)
    return jnp.sum(h * jnp.asarray(toys.probe(x), h.dtype)), h


def differentiated(network):
    """Value, and the gradient of <probe, value> by parameters and embedding."""
    gradient = jax.value_and_grad(partial(loss_of, network), (0, 1), has_aux=True)

    def evaluate(params, x):
        (_, h), gradients = gradient(params, x)
        return h, gradients

    return evaluate


compiled = partial(jax.jit, compiler_options=toys.QUICK)


def evaluated(network, params, x):
    return compiled(differentiated(network))(params, x)


@cache
def verbs(scheme, L):
    """What all of them have to give, in fp32."""
    return evaluated(partial(by_verbs, scheme, L), *drawn(scheme, L))


# One network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [by_nnx, by_linen])
@cases
def test_linen_and_nnx_are_the_verbs(scheme, L, network):
    """Bit for bit, in fp32."""
    got, want = evaluated(partial(network, scheme, L), *drawn(scheme, L)), verbs(scheme, L)
    assert all(np.linalg.norm(leaf) > 1e-2 for leaf in jax.tree.leaves(want))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@cases
def test_through_depth_is_the_verbs(scheme, L, x64):
    params, x = drawn(scheme, L, "float64")
    want, got = (evaluated(partial(network, scheme, L), params, x) for network in (by_verbs, by_scan))
    oracle.assert_close(got, want, 1e-12)


@cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_names_shapes_and_initial_values(scheme, L, dtype):
    """Zeros and ones in fp32, whatever the activations are; the plain residual has no parameters."""
    D = SHAPE[-1]
    want = {
        "query": np.zeros((L, D)),
        "key_scale": np.ones((L, D)),
        "query_out": np.zeros(D),
        "key_scale_out": np.ones(D),
    }
    want = want if scheme != toys.make("plain", 1) else {}
    module = attnres_jax.nnx.DepthMix(scheme, L, D)
    x = jnp.ones(SHAPE, dtype)
    variables = attnres_jax.linen.DepthMix(scheme, L).init(jax.random.key(0), x)
    assert set(variables) == ({"params"} if want else set())
    for got in (nnx.to_pure_dict(nnx.state(module)), variables.get("params", {})):
        assert {name: leaf.dtype for name, leaf in got.items()} == dict.fromkeys(want, jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, dict(got), want)
    assert not jax.tree.leaves(nnx.state(module, nnx.Not(nnx.Param)))


# Inside transformations -------------------------------------------------------------------------


@cases
def test_transforms_of_nnx(scheme, L):
    """`nnx.grad` and `nnx.remat` under `nnx.jit`: the same gradient, under the same names."""
    params, x = drawn(scheme, L)
    h, (want, _) = verbs(scheme, L)

    def loss(model, x):
        return loss_of(lambda model, x: nnx.remat(Nnx.__call__)(model, x), model, x)

    got, value = nnx.jit(nnx.grad(loss, has_aux=True))(nnx_model(scheme, L, params), x)
    layers, depth = each(want)
    oracle.assert_close(value, h, 1e-6)
    oracle.assert_close(nnx.to_pure_dict(got), {"layers": layers} | depth, 2e-6)


@pytest.mark.parametrize("network", [by_nnx, by_linen])
def test_vmap_of_a_checkpoint(network):
    """Values and gradients, over two networks with two embeddings at once."""
    scheme, L = CASES["full"]
    network, one = partial(network, scheme, L), drawn(scheme, L)
    other = jax.tree.map(lambda leaf: leaf / 2, one)
    single = compiled(differentiated(network))
    mapped = compiled(jax.vmap(differentiated(jax.checkpoint(network))))
    oracle.assert_close(mapped(*stacked(one, other)), stacked(single(*one), single(*other)), 2e-6)


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@cases
def test_the_state_of_a_pass_crosses_transformations(scheme, L):
    """`Depth` is a pytree: every layer in a jit and a checkpoint of its own."""
    params, x = drawn(scheme, L)

    @jax.jit
    @jax.checkpoint
    def step(depth, layer):
        return depth.write(apply(layer, depth.read().x, None)[0])

    def network(params, x):
        layers, _ = each(params)
        depth = nnx_model(scheme, L, params).depth(x)
        for l in range(L):
            depth = step(depth, layers[l])
        return depth.finish().x

    oracle.assert_close(evaluated(network, params, x), verbs(scheme, L), 2e-6)


# Errors -----------------------------------------------------------------------------------------


def begun(flavour, scheme, L):
    x = jnp.ones(SHAPE)
    if flavour == "nnx":
        return attnres_jax.nnx.DepthMix(scheme, L, SHAPE[-1])(x)
    return attnres_jax.linen.DepthMix(scheme, L).init_with_output(jax.random.key(0), x)[0]


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
@cases
def test_too_few_and_too_many_writes(flavour, scheme, L):
    """Every part of a pass refuses to finish, a whole one all else; the message counts and says why."""
    depth = begun(flavour, scheme, L)
    for l in range(L):
        with pytest.raises(ValueError, match=f"{l} of {L} sublayers.*too early to finish"):
            depth.finish()
        depth = depth.write(depth.read().x)
    with pytest.raises(ValueError, match=rf"{L} sublayers.*call finish\(\)"):
        depth.read()
    with pytest.raises(ValueError, match=f"{L} sublayers.*one more wrote"):
        depth.write(jnp.ones(SHAPE))
    assert depth.finish().x.shape == SHAPE


def test_what_does_not_fit_fails_early():
    """A block larger than the model at construction; an embedding of another width at the call."""
    with pytest.raises(ValueError, match="block_size"):
        attnres_jax.nnx.DepthMix(toys.make("block", 5), 4, 8)
    with pytest.raises(ValueError, match="width 6"):
        attnres_jax.nnx.DepthMix(toys.make("block", 2), 4, 8)(jnp.ones((2, 3, 6)))
    with pytest.raises(ValueError, match="block_size"):
        begun("linen", toys.make("block", 5), 4)
