"""Counts of attnres_jax.analysis.inspect: against the model itself, by hand, and against XLA."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnres_jax import residuals
from attnres_jax.analysis import inspect
from attnres_jax.configs import UserError
from attnres_jax.models.transformer import ModelConfig, Transformer

SMALL = ModelConfig(
    vocab=96, blocks=3, width=32, heads=4, kv_heads=2, mlp_width=80, residual="block", block_size=4
)
LENGTH = 24


@pytest.mark.parametrize("residual", ["plain", "full", "block"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_the_models(residual, tied):
    config = replace(SMALL, residual=residual, tied=tied)
    model = Transformer(config, rngs=nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    counts = inspect.totals(inspect.parameters(config))
    assert sum(counts.values()) == sum(leaf.size for leaf in leaves)
    assert counts.get("depth", 0) == (0 if residual == "plain" else 2 * 32 * (6 + 1))
    assert counts["embedding"] == 96 * 32
    assert counts.get("head", 0) == (0 if tied else 96 * 32)
    assert counts["norm"] == (6 + 1) * 32
    assert counts["matrix"] == 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80)


def test_queries_of_the_input_are_counted():
    """One D x D product a read, and a read a sublayer of all its sources."""
    full, asked = (
        inspect.cost(replace(SMALL, residual=name), LENGTH) for name in ("full", "full_input_query")
    )
    assert asked.depth_flops - full.depth_flops == 2 * 7 * 32 * 32


def test_flops_are_counted_on_the_cpu_where_a_compiler_counts_none(monkeypatch):
    """As on a GPU: its lowered programs say None."""
    count, asked = jax.stages.Lowered.cost_analysis, []

    def second(lowered):
        asked.append(lowered)
        return count(lowered) if len(asked) % 2 == 0 else None

    scheme = residuals.make("mhc")
    inspect._counted.cache_clear()
    want = inspect._counted(scheme, 2, 8)
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", second)
    inspect._counted.cache_clear()
    assert inspect._counted(scheme, 2, 8) == want > 0
    inspect._counted.cache_clear()

    def absent(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", absent)
    with pytest.raises(UserError, match="JAX_PLATFORMS=cuda,cpu"):
        inspect._counted(scheme, 2, 8)


def test_values_that_are_made_twice_are_counted():
    own, shared = (inspect.cost(replace(SMALL, value_residual=share), LENGTH) for share in (0.0, 0.5))
    assert shared.forward_flops - own.forward_flops == 2 * 32 * 16
    assert shared.parameters == own.parameters


def test_nothing_is_allocated():
    huge = replace(SMALL, vocab=10**6, blocks=500, width=2**14, mlp_width=2**16)
    assert inspect.cost(huge, 8).parameters > 10**12


def lowered(config):
    """The literal, unrolled forward pass: XLA counts the body of a loop once."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def forward(params, tokens):
        return nnx.merge(graph, params)(tokens, implementation="reference").logits

    return jax.jit(forward).lower(params, jax.ShapeDtypeStruct((2, LENGTH), jnp.int32))


def flops_per_token(stage):
    return stage.cost_analysis()["flops"] / (2 * LENGTH)


@pytest.mark.parametrize("residual", ["plain", "block"])
def test_forward_flops_are_what_xla_counts(residual):
    """Within 3 %: at D = 256 the element-wise work that is left out is 1 %."""
    config = replace(SMALL, blocks=2, width=256, mlp_width=700, residual=residual, tied=False)
    counted = flops_per_token(lowered(config).compile())
    assert inspect.cost(config, LENGTH).forward_flops == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(("residual", "size"), [("block", 2), ("block", 4), ("full", 1)])
def test_depth_flops_are_what_xla_counts(residual, size):
    """Before XLA shares the key norms; within 12 %, of which most is the additions of plain."""
    config = replace(SMALL, width=256, residual=residual, block_size=size)
    plain = flops_per_token(lowered(replace(config, residual="plain")))
    added = flops_per_token(lowered(config)) - plain
    own = inspect.cost(config, LENGTH)
    assert own.depth_flops == pytest.approx(added, rel=0.12)
    assert inspect.cost(replace(config, residual="plain"), LENGTH).depth_flops == 0


def test_attention_grows_with_length_and_training_is_three_times_forward():
    short, long = inspect.cost(SMALL, 10), inspect.cost(SMALL, 1010)
    assert long.forward_flops - short.forward_flops == 1000 * 3 * 4 * 32
    assert short.training_flops == 3 * short.forward_flops


def test_report_shows_what_attnres_adds(capsys):
    inspect.report(SMALL, LENGTH)
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    total = inspect.cost(SMALL, LENGTH).parameters
    added = next(row for row in rows if row and row[0] == "parameters")
    assert added[2:4] == [f"{total:,}", "+448"]
    assert float(added[4]) == pytest.approx(100 * 448 / (total - 448), abs=0.006)
    assert ["layers/m/down/kernel", "3 x 80 x 32", f"{3 * 80 * 32:,}", "matrix", "yes"] in rows
    assert np.isclose(total, sum(inspect.totals(inspect.parameters(SMALL)).values()))
