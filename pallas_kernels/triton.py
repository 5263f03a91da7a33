"""How the Triton kernels of both ops are called. Nothing is imported before the call."""

import importlib

import jax

PROGRAMS = 264  # two for each of a Hopper's 132 processors


def call(op, kernel, operands, outputs, *, grid, warps, constants, aliases=None, stages=3):
    """Run `kernel` of `pallas_kernels.<op>.triton_kernels`; raises where jax-triton cannot lower."""
    if jax.version.__version_info__ >= (0, 12):
        raise RuntimeError(
            f"implementation triton: jax-triton does not lower under JAX {jax.__version__} "
            "(its dead-code rule takes two arguments, JAX passes three); use JAX 0.11.2"
        )
    import jax_triton

    kernels = importlib.import_module(f"pallas_kernels.{op}.triton_kernels")
    return jax_triton.triton_call(
        *operands,
        kernel=getattr(kernels, kernel),
        out_type=outputs,
        name=f"{op}_{kernel}",
        grid=grid,
        num_warps=warps,
        num_stages=stages,
        input_output_aliases=aliases or {},
        **constants,
    )
