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

    aliases, results = aliases or {}, {"out_type": outputs}
    if _version(jax_triton) < (0, 4):  # for Triton 3.6, of PyTorch 2.11: scalars are not counted there
        results = {"out_shape": outputs}
        aliases = {i - sum(not hasattr(a, "shape") for a in operands[:i]): k for i, k in aliases.items()}
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
