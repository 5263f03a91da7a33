"""One read, one merge, one block against the fp64 oracle: values and every gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys

from attnres_jax import depth, ops
from attnres_jax.axes import compute_dtype
from attnres_jax.depth import Rows
from attnres_jax.rules import Rule

EPS = 1e-6
# name: (R, B, T, D)
CELLS = {
    "one_source": (1, 2, 3, 8),
    "one_token_odd_width": (2, 1, 1, 7),
    "middling": (5, 2, 4, 16),
    "paper_48b_sources_odd_width": (10, 2, 3, 33),
    "most_sources_one_token": (20, 1, 1, 5),
    "wide": (13, 3, 5, 64),
}
GRID = [(R, 2, T, D) for R in range(1, 21) for T, D in ((1, 9), (3, 16))]
# dtype: (values, gradients); one bf16 rounding is 1.7e-3 in this norm
TOLERANCES = {"float32": (2e-6, 1e-5), "bfloat16": (5e-3, 5e-3)}

cells = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES)


def w_of(arguments):
    dtype = compute_dtype(arguments["values"].dtype)
    return arguments["query"].astype(dtype) * arguments["key_scale"].astype(dtype)


def direct(arguments):
    """All sources at once."""
    return depth.mix(w_of(arguments), list(arguments["values"]), Rule(EPS)).mixture[None]


def first_phase(arguments, spare=0):
    """S = 3 reads at once over two histories; rows beyond `n` hold rubbish."""
    values = arguments["values"]
    rubbish = jnp.full((spare, *values.shape[1:]), 77.0, values.dtype)
    first = Rows(values[:1])
    rest = Rows(jnp.concatenate([values[1:], rubbish]), len(values) - 1 if spare else None)
    w = jnp.stack([w_of(arguments) * factor for factor in (1.0, -0.5, 0.25)])
    sources = (first, rest) if len(rest.array) else (first,)
    return ops.depth_mix(w, sources, rule=Rule(EPS))[0].mixture


def two_phases(arguments):
    """All but the last source in phase 1, the last merged in phase 2."""
    *done, stream = arguments["values"]
    w = w_of(arguments)
    phase1 = ops.depth_mix(w[None], (Rows(jnp.stack(done)),), rule=Rule(EPS))[0]
    return ops.depth_merge(w, phase1, stream, 0, False, rule=Rule(EPS))[0][None]


def equation(arguments, factors=(1.0,)):
    values = arguments["values"]
    query, scale = arguments["query"], arguments["key_scale"]
    return jnp.stack([oracle.read(values, query * f, scale, EPS)[0] for f in factors])


SCALED = partial(equation, factors=(1.0, -0.5, 0.25))
READS = {
    "mix": (direct, equation),
    "first_phase": (first_phase, SCALED),
    "padded_rows": (partial(first_phase, spare=2), SCALED),
    "merge": (two_phases, equation),
}


def arguments_of(cell, dtype, seed=0):
    """Sources of different sizes, as depth grows them; exactly representable in `dtype`."""
    R, B, T, D = cell
    rng = np.random.default_rng(seed)
    exact = np.float32 if dtype == "float32" else toys.BF16
    sizes = np.linspace(0.5, 3.0, R)[:, None, None, None]
    arguments = {
        "values": toys.draw(rng, (R, B, T, D), sizes, dtype=exact),
        "query": toys.draw(rng, (D,), D**-0.5),
        "key_scale": toys.draw(rng, (D,), 0.5, 1.0),
    }
    return arguments, exact


def evaluated(function, arguments, exact):
    """Values, and the gradient of <probe, value> with a probe exact in the dtype on trial."""

    def loss(arguments):
        h = function(arguments)
        c = toys.probe(h).astype(exact).astype(np.float64)
        return jnp.sum(h.astype(compute_dtype(h.dtype)) * jnp.asarray(c, compute_dtype(h.dtype))), h

    (_, h), gradient = jax.value_and_grad(loss, has_aux=True)(arguments)
    return h, gradient


def run(function, arguments):
    compiled = jax.jit(function, compiler_options=toys.QUICK)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), compiled(arguments))


def check_reads(cell, dtype):
    arguments, exact = arguments_of(cell, dtype)
    names = [name for name in READS if name != "merge" or cell[0] > 1]

    def all_reads(side):
        return lambda given: {name: evaluated(READS[name][side], given, exact) for name in names}

    with jax.enable_x64(True):
        want = run(all_reads(1), toys.cast(arguments, "float64"))
    given = toys.cast(arguments, "float32") | {"values": jnp.asarray(arguments["values"], dtype)}
    got = run(all_reads(0), given)
    for name in names:
        check_accuracy(got[name], want[name], dtype)


def check_accuracy(got, want, dtype):
    for leaf, target, tolerance in zip(got, want, TOLERANCES[dtype], strict=True):
        oracle.assert_close(leaf, target, tolerance)


@cells
@dtypes
def test_reads(cell, dtype):
    check_reads(cell, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("cell", GRID, ids=str)
@dtypes
def test_reads_grid(cell, dtype):
    check_reads(cell, dtype)


# name: (scheme, block size, L, B, T, D)
BLOCKS = {
    "full": ("full", 1, 5, 2, 3, 32),
    "one_block": ("block", 6, 6, 2, 4, 33),
    "two_blocks": ("block", 3, 6, 2, 4, 16),
    "short_last_one_token": ("block", 3, 8, 8, 1, 33),
}


def constants(params):
    """Layers that return a fixed array and, as aux, what they read: the reads alone are on trial."""

    def apply(params, x, inputs):
        return params["y"].astype(x.dtype), x

    return toys.identity_layers(params, apply)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@dtypes
def test_block(block, dtype):
    """The reads of whole blocks, outputs given: one rounding per read and per partial sum."""
    name, size, L, B, T, D = block
    scheme, kinds = toys.make(name, size), "a" * L
    rng = np.random.default_rng(3)
    exact = np.float32 if dtype == "float32" else toys.BF16
    toy = toys.toy(scheme, kinds, T=T, D=D)
    toy = toy._replace(
        x=toys.draw(rng, (B, T, D), dtype=exact),
        params={"a": {"y": toys.draw(rng, (L, B, T, D), dtype=exact)}},
    )

    def reads(network):
        return lambda toy: evaluated(lambda toy: network(toy).aux["a"], toy, exact)

    equations = reads(lambda toy: toys.literal(name, size, kinds, toy, constants))
    with jax.enable_x64(True):
        want = run(equations, toys.cast(toy, "float64"))
    given = toys.cast(toy, "float32")._replace(
        x=jnp.asarray(toy.x, dtype), params=toys.cast(toy.params, dtype)
    )
    got = run(reads(lambda toy: toys.run(scheme, kinds, toy, constants)), given)
    check_accuracy(got, want, dtype)


@dtypes
def test_result_has_the_dtype_of_the_sources(dtype):
    """Rounded once, to the activations' dtype; statistics stay at least fp32."""
    arguments, _ = arguments_of(CELLS["middling"], dtype)
    given = toys.cast(arguments, "float32") | {"values": jnp.asarray(arguments["values"], dtype)}
    assert direct(given).dtype == dtype
    phase1 = depth.partial_mix(w_of(given)[None], (Rows(given["values"]),), Rule(EPS))
    assert (phase1.mixture.dtype, phase1.lse.dtype) == (dtype, jnp.float32)
    assert depth.scores(w_of(given), given["values"], Rule(EPS)).dtype == jnp.float32


def test_no_matmul_in_a_read():
    """Scores are a multiply-reduce: a default-precision matmul on a TPU would round to bf16."""
    arguments, _ = arguments_of(CELLS["middling"], "float32")
    for function in (direct, first_phase, two_phases):
        program = str(jax.make_jaxpr(jax.grad(lambda a, f=function: f(a).sum()))(arguments))
        assert "dot_general" not in program
