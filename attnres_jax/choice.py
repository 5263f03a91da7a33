"""Which implementation of the ops runs, and why: kernels where the devices and the shapes allow."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnres_jax.placement import Placement, platform

KERNELS = ("tpu", "gpu", "triton")
IMPLEMENTATIONS = ("reference", "xla", *KERNELS)


class Choice(NamedTuple):
    """The implementation that runs, and why."""

    implementation: str
    reason: str


def choose(
    implementation: str | None = None,
    placement: Placement | None = None,
    dtype: Any = None,
    refusal: Callable[[str], str | None] = lambda kernel: None,
    unfit: str | None = None,
) -> Choice:
    """Which implementation runs, and why. Raises `ValueError` for a name that is none.

    "xla" is the reference's ops, here; `through_depth` takes "reference" literally and "xla" not.

    Args:
      placement: whose devices it runs on; None: JAX's default ones.
      dtype, refusal: of the sources, and what "tpu" or "gpu" has against their shape (raised, if named).
      unfit: what every kernel has against the call.
    """
    refuse(implementation, unfit)
    target = platform(placement)
    if implementation is None and target in ("tpu", "gpu") and not _alone(placement):
        return Choice("reference", "jnp, compiled by XLA: kernels on several devices need a placement")
    if implementation in ("reference", "xla"):
        return Choice("reference", "named by the caller")
    kernel = implementation or target
    if kernel not in KERNELS:
        return Choice("reference", f"jnp, compiled by XLA: there is no kernel for {target}")
    problem = unfit or (unproven(placement, dtype) if kernel == "gpu" and not implementation else None)
    if kernel != "triton" and not problem:
        with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh) if placement else nullcontext():
            problem = refusal(kernel)
    if dtype is not None and dtype not in (jnp.bfloat16, jnp.float32):
        problem = f"kernels take bfloat16 and float32 sources, got {jnp.dtype(dtype)}"
    if problem and implementation:
        raise ValueError(f"implementation {implementation!r}: {problem}")
    if implementation:
        return Choice(implementation, "named by the caller")
    return Choice("reference", problem) if problem else Choice(kernel, f"Pallas kernels, on {kernel.upper()}")


def unproven(placement: Placement | None, dtype: Any) -> str | None:
    """Why the Mosaic kernels do not run on these GPUs unless named, or None: they were run on an H200."""
    device = placement.mesh.devices.flat[0] if placement else jax.devices()[0]
    if not str(getattr(device, "compute_capability", "")).startswith("9."):
        return f"the Mosaic kernels are for Hopper GPUs, this is {device.device_kind}; name triton"
    if jax.__version_info__ >= (0, 12):
        return f"the kernels for GPUs were run on one with JAX 0.11.2, not with {jax.__version__}; name gpu"
    if dtype is not None and dtype != jnp.bfloat16:
        return f"on GPUs a step was run with kernels in bfloat16, not in {jnp.dtype(dtype)}; name triton"
    return None


def refuse(implementation: str | None, unfit: str | None) -> None:
    """Raises `ValueError` for a name that is none, or of a kernel where none fits, and why."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation must be None or one of {names}, got {implementation!r}")
    if unfit and implementation in KERNELS:
        raise ValueError(f"implementation {implementation!r}: {unfit}")


def _alone(placement):
    """Whether a kernel meets one device's part only: XLA does not cut kernels up for several devices."""
    around = jax.sharding.get_abstract_mesh()
    if placement or around.empty:
        return bool(placement) or jax.device_count() == 1
    return around.size == 1 or {*around.axis_names} == {*around.manual_axes}
