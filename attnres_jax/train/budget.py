"""What a state takes on each device, before anything is allocated."""

import math
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console
from rich.table import Table

from attnres_jax import configs
from attnres_jax.analysis.inspect import parameters
from attnres_jax.configs import Config
from attnres_jax.models.table import path_name
from attnres_jax.parallel import mesh, sharding
from attnres_jax.train import optim, pipelined, state


class Row(NamedTuple):
    """Of one parameter, and its bytes on one device."""

    path: str
    optimizer: str
    place: str
    parameter: int
    moments: int


def report(config: Config, vocab: int, count: int) -> None:
    """Print, for `count` devices, where every parameter lies, which optimizer has it, and the bytes.

    Raises:
      ConfigError: where mesh, model and count do not fit together.
    """
    sizes = mesh.sizes(config.mesh.to_dict(), count)
    axes = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "alone"
    console, title = Console(), f"On each of {count} devices ({axes})" if count > 1 else "On one device"
    table = Table("path", "by", "place", "parameter", "moments", title=title, caption=CAPTION)
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for column in table.columns[3:]:
        column.justify = "right"
    found = rows(config, vocab, sizes)
    for row in found:
        table.add_row(row.path, row.optimizer, row.place, f"{row.parameter:,}", f"{row.moments:,}")
    table.add_section()
    totals = sum(row.parameter for row in found), sum(row.moments for row in found)
    table.add_row("total", "", "", *(f"{total:,}" for total in totals))
    console.print(table)


def rows(config: Config, vocab: int, sizes: dict[str, int]) -> list[Row]:
    """One for each parameter, on a mesh of these sizes."""
    on = AbstractMesh(tuple(sizes.values()), mesh.AXES, axis_types=(AxisType.Auto,) * len(mesh.AXES))
    model = configs.model_config(config, vocab)
    table = parameters(model)
    sharding.check(table, on, config.data.batch // config.train.accumulation, config.data.length)
    create, of = partial(state.create, model, optim.optimizer(config, table), 0), sharding.spec
    like = jax.eval_shape(create)
    if sizes[mesh.STAGE] > 1:
        pipelined.check(config, model)
        of = sharding.staged_spec
        like = jax.eval_shape(pipelined.layout(config, model, sizes[mesh.STAGE]).staged, like)
    own = _bytes(like.params, sharding.shardings(like.params, table, on, of))
    kept = _bytes(like.opt_state, sharding.shardings(like.opt_state, table, on, of))
    return [
        Row(
            p.path,
            optim.group(config, p),
            " ".join(f"{a}:{m}" for a, m in zip(p.axes, of(p), strict=False) if m) or "whole",
            own[p.path],
            sum(size for path, size in kept.items() if sharding.owner(path, own) == p.path),
        )
        for p in table
    ]


def _bytes(tree, places):
    def size(leaf, place):
        return math.prod(place.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

    sizes = jax.tree.map(size, tree, places)
    return {path_name(path): size for path, size in jax.tree.leaves_with_path(sizes)}


CAPTION = (
    "Bytes; place: which axis lies along which mesh axis. During an update there is a gradient of the "
    "parameters' size too, and activations, which are not counted."
)
