"""Where parameters and optimizer state lie on the mesh, from the one table of parameters.

Stacks of layers are cut over `stage` (in its order, see `layout.py`), matrices, embedding and head by the
letters of their axes (style of `axes.py`); the vectors of norms and of residual schemes are on every device
of a stage, for they are small and every token needs them whole.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnres_jax.configs import ConfigError
from attnres_jax.models.table import Parameter, path_name
from attnres_jax.parallel.mesh import BATCH, STAGE, divisors

PLACES = {"V": "tensor", "H": "tensor", "F": "tensor", "D": "fsdp"}
CUT = ("matrix", "embedding", "head", "projection")


def spec(parameter: Parameter) -> P:
    """Of one parameter, in order of depth: a mesh axis or None for each of its axes."""
    return P(*(PLACES.get(axis) for axis in parameter.axes)) if parameter.group in CUT else P()


def staged_spec(parameter: Parameter) -> P:
    """The same of a pipelined mesh: stacks of layers are in order of stages, and cut over them."""
    found = spec(parameter)
    return P(STAGE, *found[1:]) if parameter.path.startswith("layers/") else found


def stored_spec(mesh: Mesh | AbstractMesh, parameter: Parameter) -> P:
    """The same of stacks in order of depth: cut over `stage` where it divides their layers, else each stage
    has them all while a state is saved or restored."""
    fits = parameter.shape[0] % mesh.shape[STAGE] == 0
    return staged_spec(parameter) if fits else spec(parameter)


def shardings(
    tree, table: Iterable[Parameter], mesh: Mesh | AbstractMesh, of: Callable[[Parameter], P] = spec
):
    """For every leaf of `tree` (parameters, gradients, optimizer state) its sharding.

    A leaf is placed as `of` says of the parameter whose path its own ends with; scalars are on every device.

    Raises:
      ValueError: for an array that no parameter's path ends.
    """
    specs = {parameter.path: of(parameter) for parameter in table}

    def place(path, leaf):
        name = path_name(path)
        if (parameter := owner(name, specs)) is not None:
            return NamedSharding(mesh, specs[parameter])
        if leaf.size == 1:
            return NamedSharding(mesh, P())
        raise ValueError(f"no parameter of models/table.py says where {name} {leaf.shape} lies")

    return jax.tree.map_with_path(place, tree)


def owner(name: str, paths: Iterable[str]) -> str | None:
    """The longest of `paths` that the path `name` ends with, if any."""
    found = [path for path in paths if name == path or name.endswith(f"/{path}")]
    return max(found, key=len, default=None)


def placed(tree, places):
    """Shapes and dtypes of `tree`, with the shardings `places`: what a restore is given."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places
    )


def check(table: Sequence[Parameter], mesh: Mesh | AbstractMesh, batch: int, length: int) -> None:
    """Raise `ConfigError` where a mesh axis does not divide what it cuts, with sizes that would fit.

    `batch` are the sequences of one microbatch, `length` its predictions a sequence.
    """
    over = math.prod(mesh.shape[axis] for axis in BATCH)
    if batch % over:
        raise ConfigError(
            f"mesh.data x mesh.fsdp = {over} does not divide the {batch} sequences of a microbatch: make "
            f"data.batch a multiple of {over} x train.accumulation, or give mesh.tensor more of the devices"
        )
    _divides(mesh, "tensor", [("tokens of data.length", length), *_cut(table, "tensor")])
    _divides(mesh, "fsdp", list(_cut(table, "fsdp")))


def _cut(table, mesh_axis):
    for parameter in table:
        for axis, size, place in zip(parameter.axes, parameter.shape, spec(parameter), strict=False):
            if place == mesh_axis:
                yield f"{axis} of {parameter.path}", size


def _divides(mesh, axis, lengths):
    size = mesh.shape[axis]
    for what, length in lengths:
        if length % size:
            fit = ", ".join(map(str, divisors(math.gcd(*(n for _, n in lengths)))))
            raise ConfigError(f"mesh.{axis} = {size} does not divide the {length} {what}: it may be {fit}")
