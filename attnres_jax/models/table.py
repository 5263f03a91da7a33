"""The one table of parameters: path, shape, axes, optimizer group, decay, in forward order."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

# (path, axes of style.md without the stack's, optimizer group); every parameter matches exactly one.
# Those of other residual schemes are told by the scheme (`Scheme.axes`).
# "D>HK" is a matrix that sums over D and gives H and K.
RULES = (
    (r"embed/embedding", "VD", "embedding"),
    (r"mix/(query|key_scale)", "LD", "depth"),
    (r"layers/a/norm/scale", "D", "norm"),
    (r"layers/a/query/kernel", "D>HK", "matrix"),
    (r"layers/a/(key|value)/kernel", "D>HK", "matrix"),
    (r"layers/a/out/kernel", "HK>D", "matrix"),
    (r"layers/m/norm/scale", "D", "norm"),
    (r"layers/m/(gate|up)/kernel", "D>F", "matrix"),
    (r"layers/m/down/kernel", "F>D", "matrix"),
    (r"mix/(query|key_scale)_out", "D", "depth"),
    (r"norm/scale", "D", "norm"),
    (r"head/kernel", "D>V", "head"),
)


class Parameter(NamedTuple):
    """One leaf; a stack of layers has "L" before the layer's own `axes`, and its layers' count in `shape`."""

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: str
    group: str
    decay: bool
    inputs: str
    """Those of the layer's own axes, its first, that a matrix sums over; "" where the leaf is no matrix."""


def parameter_table(model: Any) -> list[Parameter]:
    """Every parameter of `model` (abstract or real). A parameter without a rule raises `ValueError`."""
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    rules = [*_rules_of(model.mix.scheme), *enumerate(RULES)]
    rows = [_row(path_name(path), leaf, rules) for path, leaf in leaves]
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


def path_name(path: tuple) -> str:
    """The path of a leaf as the table writes it: `layers/a/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _rules_of(scheme):
    """In the places that the parameters of reads over depth have in the forward pass."""
    reads, *_, output = (at for at, rule in enumerate(RULES) if rule[0].startswith("mix/"))
    for name, axes in scheme.axes.items():
        group = "projection" if ">" in axes else "depth"
        yield reads, (f"mix/{name}", axes, group)
        yield output, (f"mix/{name}_out", axes.removeprefix("L"), group)


def _row(path, leaf, rules):
    for order, (pattern, axes, group) in rules:
        if re.fullmatch(pattern, path):
            stack, decay = "L" * path.startswith("layers/"), group in ("matrix", "head", "projection")
            inputs = axes.partition(">")[0] if ">" in axes else ""
            axes = stack + axes.replace(">", "")
            return order, Parameter(path, leaf.shape, leaf.dtype, axes, group, decay, inputs)
    raise ValueError(f"no rule of models/table.py covers the parameter {path} {leaf.shape}: add one")
