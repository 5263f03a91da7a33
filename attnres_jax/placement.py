"""Where activations lie on a device mesh, and how an op runs there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Placement:
    """`spec` says where B and T of activations [B,T,D] lie on `mesh`; D is whole: no read communicates."""

    mesh: Mesh
    spec: PartitionSpec

    def enter(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """As a sublayer takes it: T whole, so that its matrices stay where they are (tensor parallel)."""
        return self._cut(self._cut(x, 2), 1)  # both, so that cotangents go the same way back

    def leave(self, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """As it lies between sublayers (sequence parallel)."""
        return self._cut(self._cut(y, 1), 2)

    def _cut(self, x, axes):
        around, spec = _around(self.mesh), PartitionSpec(*self.spec[:axes])
        return lax.with_sharding_constraint(x, NamedSharding(around, spec))

    def local(
        self, op: Callable, shared: Any, args: tuple, specs: tuple, out_specs: Any, typed: bool = True
    ) -> Any:
        """`op(shared, *args)`, each device on its own tokens; gradients of `shared` are summed outside.

        Every axis of the mesh is manual inside, as a kernel must have it; those that are already stay so.
        What cannot say over which axes its results vary is not `typed`.
        """
        axes = {a for axes in self.spec if axes for a in (axes if isinstance(axes, tuple) else (axes,))}

        def run(shared, *args):
            if typed:
                shared = jax.tree.map(lambda a: lax.pcast(a, tuple(axes), to="varying"), shared)
            return op(shared, *args)

        around = _around(self.mesh)
        free = {*self.mesh.axis_names} - {*getattr(around, "manual_axes", ())}
        if not free:
            return op(shared, *args)
        # Inside a region that is manual already, the types of the two would meet: JAX 0.12 cannot
        # differentiate that.
        typed = typed and around is self.mesh
        where = {"mesh": around, "axis_names": free, "check_vma": typed}
        specs = (PartitionSpec(), *specs)
        return jax.shard_map(run, in_specs=specs, out_specs=out_specs, **where)(shared, *args)


def _around(mesh):
    """`mesh`, or, in a region that is manual over some of its axes, what says which."""
    around = jax.sharding.get_abstract_mesh()
    return around if around.manual_axes else mesh


def platform(placement: Placement | None = None) -> str:
    """What a program is traced for: the platform of its mesh, or of the abstract mesh in use (a compiler's
    target that is not at hand), or of the default device."""
    mesh = placement.mesh.abstract_mesh if placement else jax.sharding.get_abstract_mesh()
    return mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()
