"""How the Triton kernels of both ops are called. Nothing is imported before the call."""

import importlib

import jax
import numpy as np

PROGRAMS = 264  # two for each of a Hopper's 132 processors


def call(op, kernel, operands, outputs, *, grid, warps, constants, aliases=None, stages=3):
    """Run `kernel` of `pallas_kernels.<op>.triton_kernels`; raises where jax-triton cannot lower.

    A kernel takes its operands, then its outputs. `aliases` says which operand lies where an output does: the
    first outputs, in their order. The kernel touches those through the output's argument only.
    """
    if jax.version.__version_info__ >= (0, 12):
        raise RuntimeError(
            f"implementation triton: jax-triton does not lower under JAX {jax.__version__} "
            "(its dead-code rule takes two arguments, JAX passes three); use JAX 0.11.2"
        )
    import jax_triton

    aliases, results = aliases or {}, {"out_type": outputs}
    if _version(jax_triton) < (0, 4):  # for Triton 3.6, of PyTorch 2.11: aliases do not count scalars there
        results = {"out_shape": outputs}
        aliases = {i - sum(isinstance(a, int | float) for a in operands[:i]): k for i, k in aliases.items()}
    else:  # an output in place has no argument of its own: its operand goes where that would be
        in_place = [operands[i] for i in sorted(aliases, key=aliases.get)]
        operands = [operands[0] if i in aliases else a for i, a in enumerate(operands)]
        aliases = {len(operands) + k: k for k in range(len(in_place))}
        operands += in_place
    operands = [np.float32(a) if isinstance(a, float) else a for a in operands]  # else fp64, in 0.3
    kernels = importlib.import_module(f"pallas_kernels.{op}.triton_kernels")
    return jax_triton.triton_call(
        *operands,
        kernel=getattr(kernels, kernel),
        **results,
        name=f"{op}_{kernel}",
        grid=grid,
        num_warps=warps,
        num_stages=stages,
        input_output_aliases=aliases,
        **constants,
    )


def _version(module):
    return tuple(map(int, module.__version__.split(".")[:2]))
