"""Depth costs no compile time: the program of 48 transformer blocks is as long as that of 12.

Counted are lines of StableHLO of value-and-grad; `bench_compile.py` measures the seconds. Depth may
stand in shapes and trip counts only, hence a bound of 2 %: whatever is written once a layer, or once a
summary, grows with depth. (N = 8 at 12 blocks is longer than at 48: "ama" and "mam" alternate.)
"""

import bench_compile
import jax
import jax.numpy as jnp
import pytest
import toys
from bench_compile import CASES, DEPTHS, lines, lower

SLACK = 1.02
# name: (scheme, block size, shallow and deep kinds)
SHAPES = {
    "short_last": ("block", 6, "am" * 13, "am" * 49),
    "odd_blocks": ("block", 3, "am" * 12, "am" * 48),
    "linear_attention": ("block", 6, "kmkmkmam" * 6, "kmkmkmam" * 24),
    "full_linear_attention": ("full", 1, "kmkmkmam" * 3, "kmkmkmam" * 12),
}


@pytest.mark.parametrize("case", CASES)
def test_language_model(case):
    shallow, deep = (lines(lower(case, blocks)) for blocks in DEPTHS)
    assert 500 < deep <= SLACK * shallow


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape):
    """Blocks that repeat two by two or four by four, and what is left over."""
    name, size, *depths = shape
    shallow, deep = (lines(lower_toy(toys.make(name, size), kinds)) for kinds in depths)
    assert 500 < deep <= SLACK * shallow


def lower_toy(scheme, kinds):
    toy = toys.cast(toys.toy(scheme, kinds), "float32")
    loss = jax.grad(lambda toy: jnp.sum(toys.run(scheme, kinds, toy).h ** 2))
    return jax.jit(loss).lower(toy)


@pytest.mark.parametrize("case", ["plain", "full"])
def test_what_is_unrolled_is_seen(case):
    """The control: reference mode, a Python loop over the layers, fails by far."""
    shallow, deep = (lines(lower(case, blocks, "reference")) for blocks in (3, 6))
    assert deep > 1.6 * shallow


def test_the_benchmark_runs(monkeypatch, capsys):
    """One measurement, and the table: a row per case, with the cells that its heading names."""
    assert bench_compile.seconds("plain", 1) > 0
    monkeypatch.setattr(bench_compile, "DEPTHS", (1, 2))
    monkeypatch.setattr(bench_compile, "CASES", {"plain": CASES["plain"]})
    monkeypatch.setattr(bench_compile, "seconds", lambda case, blocks: 1.5 * blocks)
    bench_compile.main()
    heading, rule, row = capsys.readouterr().out.splitlines()[-3:]
    assert heading.count("|") == rule.count("|") == row.count("|") == 7
    assert row.startswith("| plain | 1.5 s | 3.0 s | 2.00 |")
