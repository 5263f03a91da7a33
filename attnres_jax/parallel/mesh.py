"""The device mesh: its axes, their sizes, and where activations lie on it.

`data` and `fsdp` divide the batch (fsdp the parameters too), `tensor` the heads, the MLP's channels and the
vocabulary, and between sublayers the time axis; `stage` divides the layers (`pipeline.py`). `expert` has
size 1 so far. Of several slices, which only a network joins (DCN), each has whole rows of `data`: sums of
gradients alone cross it.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnres_jax.configs import ConfigError
from attnres_jax.placement import Placement

STAGE = "stage"
AXES = (STAGE, "data", "fsdp", "expert", "tensor")
BATCH = ("data", "fsdp")
REST = -1


def sizes(wanted: Mapping[str, int], count: int) -> dict[str, int]:
    """The size of every axis on `count` devices; one of `wanted` may be -1, what the others leave.

    Raises:
      ConfigError: where they do not fit, with sizes that would.
    """
    for axis, size in wanted.items():
        if axis not in AXES or (size < 1 and size != REST):
            raise ConfigError(f"mesh.{axis} = {size}: axes are {_names(AXES)}, sizes from 1 on, or {REST}")
    fixed = {axis: size for axis, size in wanted.items() if size != REST}
    used = math.prod(fixed.values())
    rest = [axis for axis in wanted if axis not in fixed]
    if len(rest) > 1:
        raise ConfigError(f"only one mesh axis may be {REST} (what the others leave), not {_names(rest)}")
    if count % used or (not rest and used != count):
        said = " x ".join(f"{axis} {size}" for axis, size in fixed.items())
        raise ConfigError(f"the mesh {said} = {used} does not fit {count} devices: {_fitting(wanted, count)}")
    return dict.fromkeys(AXES, 1) | fixed | dict.fromkeys(rest, count // used)


def make_mesh(wanted: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (None: all there are), in an order that suits their links.

    Raises:
      ConfigError: where sizes do not fit the devices, or slices do not divide `data`.
    """
    devices = devices or available()
    found = sizes(wanted, len(devices))
    # A GPU's slice is its host: there every axis may go between them.
    slices = 1 if devices[0].platform == "gpu" else len({getattr(d, "slice_index", 0) for d in devices})
    if found["data"] % slices:
        raise ConfigError(
            f"mesh.data = {found['data']} must be a multiple of the {slices} slices: of the mesh axes only "
            f"data goes over the network between them; each has {len(devices) // slices} devices"
        )
    within, across = found | {"data": found["data"] // slices}, dict.fromkeys(AXES, 1) | {"data": slices}
    # jax.make_mesh refuses slices, and axes that are part of an axis of links, as 8 is of v6e's 4x4.
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices > 1:
        order = mesh_utils.create_hybrid_device_mesh((*within.values(),), (*across.values(),), **options)
    else:
        order = mesh_utils.create_device_mesh((*within.values(),), **options)
    return Mesh(order, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def available() -> Sequence[Any]:
    """The devices of all processes."""
    return jax.devices()


def placement(mesh: Mesh) -> Placement | None:
    """Activations [B,T,D]: B over data and fsdp, T over tensor, D whole. One device needs none."""
    return Placement(mesh, P(BATCH, "tensor")) if mesh.size > 1 else None


def tokens(mesh: Mesh) -> NamedSharding:
    """Of tokens [B, T + 1]: the batch as activations have it, time whole."""
    return NamedSharding(mesh, P(BATCH))


def whole(mesh: Mesh) -> NamedSharding:
    """The same values on every device."""
    return NamedSharding(mesh, P())


def from_rows(
    place: NamedSharding, shape: tuple[int, ...], rows: Callable[[int, int], np.ndarray]
) -> jax.Array:
    """A global array [B, ...] of which each process makes only the rows that its devices hold.

    `rows(first, last)` are those rows of it; they are asked for once however many devices share them.
    """
    made = functools.cache(rows)

    def local(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(shape[0])
        return made(first, last)

    return jax.make_array_from_callback(shape, place, local)


def repeated(text: jax.Array, mesh: Mesh, count: int = 1) -> jax.Array:
    """One text [T] as a batch [B,T] that lies as tokens do, `count` times on each part of it."""
    rows = count * math.prod(mesh.shape[axis] for axis in BATCH)
    return jax.lax.with_sharding_constraint(jnp.broadcast_to(text, (rows, len(text))), tokens(mesh))


def microbatches(batch: jax.Array, count: int) -> jax.Array:
    """[B, ...] as [count, B / count, ...]. Each takes every `count`-th row: rows spread over devices are
    spread in each of them alike."""
    return batch.reshape(-1, count, *batch.shape[1:]).swapaxes(0, 1)


def divisors(number: int) -> list[int]:
    """Of a positive number, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _fitting(wanted, count):
    """Which single axis, changed, would make the mesh fit; else the simplest mesh that does."""
    for axis, size in wanted.items():
        others = math.prod(s for a, s in wanted.items() if a != axis and s != REST)
        if size != REST and count % others == 0:
            legal = divisors(count // others) if REST in wanted.values() else [count // others]
            return f"with the others as they are, mesh.{axis} may be {_names(legal)}"
    return f"mesh.data={REST} with all others 1 takes them all"


def _names(values):
    return ", ".join(map(str, values))
