"""What `bench kernels` gives every arm to do: inputs, the least bytes, and the equations that judge a result.

Three tasks, for R or n sources that lie in one array [R, tokens, D], as a model keeps its summaries:

    mix     S reads of all sources, without a norm. S = 1 is the single read.
    merge   one read merged with the running sum p, then normed: p, mixture, lse -> x; p goes on.
    block   the residual path of S sublayers over n complete summaries, whose outputs y_0 .. y_{S-1} are
            given: x_j is read j (sources and p_j), normed; p_1 = y_0, p_{j+1} = p_j + y_j; p_S is the new
            summary.

Backward: cotangents of all results are given; those of parameters, sources, `lse`, `mixture`, `stream` and
of y_0 are wanted. The cotangent of p passes through all S reads on its way to y_0; those of y_1 .. y_{S-1}
are its values on the way, and no arm has to hand them out (in a step a matmul's backward pass takes them).
Parameters are exact in bf16, so that every arm has the same ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

EPS = 1e-6
SAMPLE = 256
"""Tokens that are compared with the equations."""
LIMIT = {"bfloat16": 2e-2, "float32": 1e-4}
"""Of the error of a result, in relative norm. Wide: a peer's bf16 sums of cotangents are to pass, a wrong
term is not. The errors are reported."""


class Work(NamedTuple):
    """One task of one size: R or n `sources`, S `reads`."""

    task: str
    tokens: int
    width: int
    sources: int
    reads: int
    backward: bool
    dtype: str = "bfloat16"

    @property
    def bytes(self) -> int:
        """Read or written, small fp32 statistics aside: every array once, a block in two phases."""
        n, s = self.sources, self.reads
        rows = {
            "mix": (n + s, 2 * n + s),
            "merge": (3, 6),
            # Phase 1; the first read: o -> x; the others: p, o -> x, and the sum in jnp: p, y -> p.
            "block": (n + s + 2 + 6 * (s - 1), 6 * (s - 1) + 3 + 2 * n + s),
        }[self.task]
        return sum(rows[: 1 + self.backward]) * self.tokens * self.width * jnp.dtype(self.dtype).itemsize


class Inputs(NamedTuple):
    """Arguments by name, and the cotangents of the results by theirs."""

    arguments: dict[str, Any]
    cotangents: dict[str, Any]


def draw(work: Work, seed: int) -> Inputs:
    """Random inputs on the default device; `sources` is one array, `y` and the block's `x` are tuples."""
    keys = iter(jax.random.split(jax.random.key(seed), max(100, 2 * work.reads + 4)))

    def wide(*shape):
        return jax.random.normal(next(keys), (*shape, work.tokens, work.width), work.dtype)

    def parameter(*shape, mean=0.0, std=1.0):
        drawn = mean + std * jax.random.normal(next(keys), (*shape, work.width))
        return drawn.astype(jnp.bfloat16).astype(jnp.float32)

    several, std = range(work.reads), 2 * work.width**-0.5  # scores of size 2
    if work.task == "mix":
        arguments = {"w": parameter(work.reads, std=std), "sources": wide(work.sources)}
        return Inputs(arguments, {"mixture": wide(work.reads)})
    if work.task == "merge":
        arguments = {"w": parameter(std=std), "scale": parameter(mean=1.0, std=0.1)}
        lse = 2 + jax.random.normal(next(keys), (work.tokens,))
        arguments |= {"mixture": wide(), "lse": lse, "stream": wide()}
        return Inputs(arguments, {"x": wide(), "stream": wide()})
    arguments = {"w": parameter(work.reads, std=std), "scale": parameter(work.reads, mean=1.0, std=0.1)}
    arguments |= {"sources": wide(work.sources), "y": tuple(wide() for _ in several)}
    return Inputs(arguments, {"x": tuple(wide() for _ in several), "summary": wide()})


def places(tokens: int) -> np.ndarray:
    """The tokens that are compared: the first, the last, and some in between."""
    if tokens <= SAMPLE:
        return np.arange(tokens)
    some = np.random.default_rng(0).choice(np.arange(1, tokens - 1), SAMPLE - 2, replace=False)
    return np.sort(np.append(some, [0, tokens - 1]))


def sampled(inputs: Inputs, work: Work) -> Inputs:
    """The same, with cotangents of the compared tokens only: they alone make every sum over tokens."""
    seen = jnp.zeros((work.tokens, 1), bool).at[places(work.tokens)].set(True)
    return inputs._replace(cotangents=jax.tree.map(lambda d: jnp.where(seen, d, 0), inputs.cotangents))


def truth(inputs: Inputs, work: Work) -> dict[str, Any]:
    """Results by name and cotangents by "d_" and theirs, of the compared tokens; fp64, but on TPU fp32."""
    exact = jnp.float32 if jax.default_backend() == "tpu" else jnp.float64
    with jax.enable_x64(exact == jnp.float64), jax.default_matmul_precision("highest"):
        return _truth(inputs, work, exact)


def _truth(inputs, work, exact):
    at = places(work.tokens)

    def some(values):
        return {k: jax.tree.map(lambda a, k=k: _at(k, a, at).astype(exact), v) for k, v in values.items()}

    def equations(arguments):
        return {"mix": _mix, "merge": _merge, "block": _block}[work.task](arguments, work.dtype)

    @jax.jit
    def both(arguments, cotangents):
        if not work.backward:
            return equations(arguments)
        results, pull = jax.vjp(equations, arguments)
        (grads,) = pull(cotangents)
        return results | named_gradients(grads)

    return jax.tree.map(np.asarray, both(some(inputs.arguments), some(inputs.cotangents)))


def named_gradients(grads: dict[str, Any]) -> dict[str, Any]:
    """As results are named; of `y` the first only."""
    return {f"d_{k}": v[0] if k == "y" else v for k, v in grads.items()}


def _at(name, array, tokens):
    """These tokens of an array, all of a parameter."""
    axis = _axis(name)
    return array if axis is None or isinstance(tokens, slice) else jnp.take(array, tokens, axis)


def _axis(name):
    """Of the tokens, from the end; None: a parameter has none."""
    return {"w": None, "scale": None, "lse": -1}.get(name.removeprefix("d_"), -2)


def _read(w, v):
    """The mixture of [R, tokens, D]: the definition, over all sources at once."""
    s = jnp.sum(w * v, -1) / jnp.sqrt(jnp.mean(v * v, -1) + EPS)
    return jnp.sum(jax.nn.softmax(s, 0)[..., None] * v, 0)


def _norm(h, scale):
    return h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True) + EPS) * scale


def _mix(a, _):
    return {"mixture": jnp.stack([_read(w, a["sources"]) for w in a["w"]])}


def _merge(a, _):
    p, o = a["stream"], a["mixture"]
    score = jnp.sum(a["w"] * p, -1) / jnp.sqrt(jnp.mean(p * p, -1) + EPS)
    h = o + jax.nn.sigmoid(score - a["lse"])[:, None] * (p - o)
    return {"x": _norm(h, a["scale"]), "stream": p}


def _block(a, dtype):
    x, p = [], None
    for w, scale, y in zip(a["w"], a["scale"], a["y"], strict=True):
        sources = a["sources"] if p is None else jnp.concatenate([a["sources"], p[None]])
        x.append(_norm(_read(w, sources), scale))
        p = y if p is None else _stored(p + y, dtype)
    return {"x": tuple(x), "summary": p}


def _stored(p, dtype):
    """Rounded as every arm stores it; the rounding has no derivative."""
    return p + jax.lax.stop_gradient(p.astype(dtype).astype(p.dtype) - p)


def errors(got: dict[str, Any], want: dict[str, Any], work: Work) -> dict[str, float]:
    """Of each result, in relative norm; what a cotangent has at tokens that were not seen counts in full."""
    if missing := want.keys() - got.keys():
        raise ValueError(f"an arm must give all results, {sorted(missing)} are missing")
    return {name: _error(name, got[name], value, work.tokens) for name, value in want.items()}


def _error(name, got, want, tokens):
    """Both may come as a sequence of rows."""
    near, exact = _whole(name, got, places(tokens)), _whole(name, want, slice(None))
    if near.shape != exact.shape:
        raise ValueError(f"{name} must be {exact.shape} at the compared tokens, got {near.shape}")
    off = np.sum((near - exact) ** 2)
    if name.startswith("d_"):
        off += sum(_elsewhere(name, row, tokens) for row in (got if isinstance(got, tuple | list) else [got]))
    return float(np.sqrt(off / (np.sum(exact**2) or 1.0)))  # one source: its query has no gradient at all


def _whole(name, value, tokens):
    if isinstance(value, tuple | list):
        return np.stack([_whole(name, row, tokens) for row in value])
    return np.asarray(_at(name, value, tokens)).astype(np.float64)


def _elsewhere(name, array, tokens):
    """The sum of squares at the tokens that are not compared."""
    axis = _axis(name)
    if axis is None:
        return 0.0
    hidden = jnp.ones(tokens, bool).at[places(tokens)].set(False)
    shape = [1] * array.ndim
    shape[axis] = tokens
    return float(
        jax.jit(lambda a: jnp.sum(jnp.square(a.astype(jnp.float32)), where=hidden.reshape(shape)))(array)
    )
