"""Toy sublayers for tests: small, smooth, well conditioned, the same functions on both sides.

`a` attends causally over T, `m` is an MLP, `k` is a gated causal cumulative mixing. All arrays are
drawn with numpy and rounded to fp32 (or bf16), so that every precision sees the same numbers.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
from flax import nnx

from attnres_jax import residuals
from attnres_jax.models.table import path_name
from attnres_jax.models.transformer import abstract
from attnres_jax.stack import Layer, through_depth

# Compile time is nearly all that a tiny test costs; LLVM's optimiser is a third of it.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BF16 = ml_dtypes.bfloat16
MATRICES = {"a": ("query", "key", "value", "out"), "m": ("up", "down"), "k": ("gate", "up", "out")}


def on_tpu(kind: str = "TPU v5 lite"):
    """As the target of what is traced."""
    chip = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=chip))


class Toy(NamedTuple):
    """The differentiable arguments of a toy network."""

    params: dict[str, Any]  # kind -> name -> [n_kind, ...]
    mix: dict[str, dict[str, Any]]  # "sublayers" -> name -> [L,D]; "output" -> name -> [D]
    x: Any  # [B,T,D]


def draw(rng, shape, scale=1.0, mean=0.0, dtype=np.float32):
    """Normal numbers that every precision from `dtype` upwards represents exactly."""
    return (mean + scale * rng.standard_normal(shape)).astype(dtype).astype(np.float64)


def toy(scheme, kinds: str, *, B=2, T=4, D=8, seed=0) -> Toy:
    rng = np.random.default_rng(seed)
    params = {
        kind: {name: draw(rng, (kinds.count(kind), D, D), D**-0.5) for name in MATRICES[kind]}
        | {"scale": draw(rng, (kinds.count(kind), D), 0.2, 1.0)}
        for kind in sorted(set(kinds))
    }
    mix = {
        "sublayers": queries(rng, scheme.init(len(kinds), D).sublayers),
        "output": queries(rng, scheme.init(len(kinds), D).output),
    }
    return Toy(params, mix, draw(rng, (B, T, D)))


def queries(rng, template) -> dict[str, Any]:
    """Query entries ~ N(0, 1/D) and key scales around one, in the shapes of a scheme's init."""
    draws = {
        "query": lambda shape: draw(rng, shape, shape[-1] ** -0.5),
        "key_scale": lambda shape: draw(rng, shape, 0.5, 1.0),
        "logits": lambda shape: draw(rng, shape),
    }
    return {name: draws[name](leaf.shape) for name, leaf in template.items()}


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def rms_norm(params, h, eps=1e-6):
    return h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + eps) * params["scale"]


def exact_rms_norm(params, h):
    return rms_norm(params, h, 1e-12)


def attention(params, x, inputs):
    query, key, value = (x @ params[name] for name in ("query", "key", "value"))
    score = jnp.einsum("btd,bsd->bts", query, key) / x.shape[-1] ** 0.5
    score = jnp.where(_causal(x), score, -jnp.inf)
    return jax.nn.softmax(score, axis=-1) @ value @ params["out"], None


def mlp(params, x, inputs):
    return jnp.tanh(x @ params["up"]) @ params["down"], None


def cumulative(params, x, inputs):
    decay = jnp.where(_causal(x), 0.5 ** jnp.abs(_lag(x)), 0.0).astype(x.dtype)
    return jax.nn.sigmoid(x @ params["gate"]) * (decay @ (x @ params["up"])) @ params["out"], None


def _lag(x):
    return np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])


def _causal(x):
    return _lag(x) >= 0


APPLY = {"a": attention, "m": mlp, "k": cumulative}


def layers(params, norm=rms_norm) -> dict[str, Layer]:
    return {kind: Layer(partial(partial, norm), APPLY[kind], params[kind]) for kind in params}


def identity_layers(params, apply) -> dict[str, Layer]:
    """Layers without a pre-norm, all with the same function."""
    return {kind: Layer(partial(partial, _identity), apply, params[kind]) for kind in params}


def _identity(params, h):
    return h


def run(scheme, kinds, toy, make_layers=layers, **options):
    """The network through the core."""
    mix = scheme.init(len(kinds), toy.x.shape[-1])._replace(**toy.mix)
    return through_depth(scheme, mix, kinds, make_layers(toy.params), toy.x, **options)


def literal(name, size, kinds, toy, make_layers=layers, eps=1e-6) -> oracle.Stack:
    """The same network through the oracle."""
    L, D = len(kinds), toy.x.shape[-1]
    sources = {
        "plain": oracle.plain_sources(L),
        "full": oracle.full_sources(L),
        "block": oracle.block_sources(L, size),
    }[name]
    blank = {"query": jnp.zeros((L, D), toy.x.dtype), "key_scale": jnp.ones((L, D), toy.x.dtype)}
    rows = {key: blank[key] if name == "plain" else toy.mix["sublayers"][key] for key in blank}
    last = {key: blank[key][0] if name == "plain" else toy.mix["output"][key] for key in blank}
    query, scale = (jnp.concatenate([rows[key], last[key][None]]) for key in ("query", "key_scale"))
    return oracle.stack(sources, query, scale, kinds, make_layers(toy.params), toy.x, eps)


def probe(like, seed=1):
    """A random cotangent: one number per output entry, the same in every precision."""
    return draw(np.random.default_rng(seed), like.shape, like.size**-0.5)


def value_and_gradient(function):
    """A compiled toy -> h and the gradient of <probe, h>, as numpy arrays."""

    def loss(toy):
        h = function(toy).h
        return jnp.sum(h * jnp.asarray(probe(h), h.dtype)), h

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)

    def evaluate(toy):
        (_, h), gradient = compiled(toy)
        return jax.tree.map(np.asarray, {"h": h, "gradient": gradient})

    return evaluate


def parameters(model, seed=0) -> dict[str, Any]:
    """Of a language model, as training might leave them: no scale is one, no query zero, and the logits
    differ by about 1."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        mean, scale = (1.0, 0.3) if "scale" in path_name(path) else (0.0, model.width**-0.5)
        return jnp.asarray(draw(rng, leaf.shape, scale, mean), leaf.dtype)

    return jax.tree.map_with_path(fill, nnx.to_pure_dict(nnx.state(abstract(model))))


def named(tree) -> dict[str, np.ndarray]:
    """Path -> leaf, in fp64."""
    leaves = jax.tree.leaves_with_path(tree)
    return {path_name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def make(name: str, size: int, **options):
    return residuals.make(name, block_size=size, **options)
