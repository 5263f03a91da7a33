"""The device mesh: its axes, their sizes, and where activations lie on it.

`data` and `fsdp` divide the batch (fsdp the parameters too), `tensor` the heads, the MLP's channels and the
vocabulary, and between sublayers the time axis; `stage` divides the layers (`pipeline.py`). `expert` has
size 1 so far.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
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
    """The mesh over `devices` (None: all there are), in an order that suits their links."""
    devices = devices or available()
    found = sizes(wanted, len(devices))
    return jax.make_mesh(tuple(found.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


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
