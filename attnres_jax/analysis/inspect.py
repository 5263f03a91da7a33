"""What a model is made of, before it is trained: parameters, FLOPs and bytes of the residual stream.

FLOPs: 2 for each multiply-add of the matrix products, of attention scores and values over all T
positions (the causal half is computed and masked, so it is counted), and of every read over depth:
key norm, score and mixture of each source, 6D in all, as the definition says (the two-phase form
shares the key norms of a block and executes fewer). Under a value residual the first attention's values
are made twice. Element-wise work is not counted, the plain residual's addition included. What other residual
schemes add is counted by XLA, of the literal form on one token: element-wise work included, the body of a
loop once. Training is three times forward; rematerialisation is not counted.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from attnres_jax.analysis.stream import moved
from attnres_jax.configs import UserError
from attnres_jax.models.table import Parameter, parameter_table
from attnres_jax.models.transformer import ModelConfig, abstract
from attnres_jax.residuals import AttnRes, Plain
from attnres_jax.residuals.dense import InputQuery
from attnres_jax.stack import Layer, through_depth


class Cost(NamedTuple):
    """Of one model at one length; FLOPs of one token."""

    parameters: int
    matmul_flops: int
    attention_flops: int
    depth_flops: int

    @property
    def forward_flops(self) -> int:
        """Of one token, forward."""
        return self.matmul_flops + self.attention_flops + self.depth_flops

    @property
    def training_flops(self) -> int:
        """Forward and backward."""
        return 3 * self.forward_flops


def parameters(config: ModelConfig) -> list[Parameter]:
    """The parameter table of a model that is never allocated."""
    return parameter_table(abstract(config))


def totals(table: Iterable[Parameter]) -> dict[str, int]:
    """Number of parameters by group."""
    counts: dict[str, int] = {}
    for parameter in table:
        counts[parameter.group] = counts.get(parameter.group, 0) + _count(parameter)
    return counts


def active(config: ModelConfig) -> int:
    """Parameters that a token uses in its sublayers: all but embedding and head, which 6ND leaves out."""
    return sum(_count(p) for p in parameters(config) if p.group not in ("embedding", "head"))


def cost(config: ModelConfig, length: int) -> Cost:
    """Parameters and FLOPs of a model on sequences of `length` tokens."""
    counts = totals(parameters(config))
    head = config.width * config.vocab
    head_width = config.width // config.heads
    again = config.width * config.kv_heads * head_width if config.value_residual else 0
    return Cost(
        sum(counts.values()),
        2 * (counts["matrix"] + again + head),
        4 * config.blocks * config.heads * head_width * length,
        _depth_flops(config),
    )


def report(config: ModelConfig, length: int) -> None:
    """Print parameters, cost per token at `length`, and what the residual scheme adds to plain."""
    console = Console()
    console.print(_parameter_table(parameters(config)))
    console.print(_cost_table(config, length))


def _depth_flops(config):
    if isinstance(config.scheme, Plain):
        return 0
    if isinstance(config.scheme, AttnRes | InputQuery):
        asked = 2 * totals(parameters(config)).get("projection", 0)  # queries made of the input
        return asked + 6 * config.width * sum(config.scheme.schedule(config.sublayers).counts)
    return _counted(config.scheme, config.sublayers, config.width)


@cache
def _counted(scheme, sublayers, width):
    """All reads and writes of a forward pass whose sublayers do nothing."""

    def forward(mix, x):
        layer = Layer(lambda _: lambda h: h, lambda params, x, _: (x, None), jnp.zeros(sublayers))
        return through_depth(scheme, mix, "a" * sublayers, {"a": layer}, x, implementation="reference").h

    mix = jax.eval_shape(lambda: scheme.init(sublayers, width))
    args = mix, jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
    counts: Any = jax.jit(forward).lower(*args).cost_analysis()
    if counts is None:  # a GPU's compiler counts nothing before it compiles
        with jax.default_device(_cpu()):
            counts = jax.jit(forward).lower(*args).cost_analysis()
    return int(counts["flops"])


def _cpu():
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as absent:
        wanted = "leave JAX_PLATFORMS unset, or add the CPU to it (JAX_PLATFORMS=cuda,cpu)"
        raise UserError(f"FLOPs are counted on the CPU, which JAX does not have here: {wanted}") from absent


def residual_bytes(config: ModelConfig) -> float:
    """Traffic of the residual stream, per token and sublayer, forward, by the rule of `analysis.stream`."""
    elements = moved(config.scheme, config.sublayers).total * config.width
    return float(elements * np.dtype(config.dtype).itemsize)


def _count(parameter):
    return int(np.prod(parameter.shape))


def _parameter_table(table):
    rich = Table("path", "shape", "count", "group", "weight decay", title="Parameters")
    rich.columns[2].justify = "right"
    for p in table:
        shape = " x ".join(map(str, p.shape))
        rich.add_row(p.path, shape, f"{_count(p):,}", p.group, "yes" if p.decay else "")
    rich.add_section()
    for group, count in totals(table).items():
        rich.add_row(f"total {group}", "", f"{count:,}", group)
    rich.add_row("total", "", f"{sum(map(_count, table)):,}")
    return rich


def _cost_table(config, length):
    own, plain = cost(config, length), cost(replace(config, residual=BASELINE), length)
    title = f"Cost of one token, sequences of {length} tokens"
    rich = Table("", BASELINE, config.residual, "added", "added %", title=title, caption=DEFINITION)
    for column in rich.columns[1:]:
        column.justify = "right"
    found = {name: [getattr(c, field) for c in (plain, own)] for name, field in ROWS.items()}
    found |= {BYTES: [residual_bytes(c) for c in (replace(config, residual=BASELINE), config)]}
    for name, (a, b) in found.items():
        rich.add_row(name, f"{a:,.0f}", f"{b:,.0f}", f"{b - a:+,.0f}", _percent(a, b))
    return rich


ROWS: dict[str, Any] = {
    "parameters": "parameters",
    "FLOPs: matrix products": "matmul_flops",
    "FLOPs: attention over T": "attention_flops",
    "FLOPs: reads over depth": "depth_flops",
    "FLOPs: forward": "forward_flops",
    "FLOPs: training (3 x)": "training_flops",
}

BYTES = "bytes: residual stream, a sublayer"

BASELINE = "plain"

DEFINITION = (
    "2 FLOPs a multiply-add: matrix products, attention scores and values at all positions "
    "(no causal saving), 6D a source of a read. Bytes: forward, one kernel between two sublayers."
)


def _percent(before, after):
    return f"{100 * (after / before - 1):+.2f}" if before else ""
