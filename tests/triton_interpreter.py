"""Triton's interpreter on the CPU without torch: `call` stands in for `pallas_kernels.triton.call`.

Arrays are numpy behind `data_ptr()`; bf16 lies there as 16-bit integers. Two of the interpreter's traps are
mended: its dot multiplies those integers, and its cast to bf16 cuts the lower bits where the hardware rounds.
"""

import importlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np


class _Array:
    def __init__(self, values):
        self.values = np.ascontiguousarray(values)
        self.dtype = str(self.values.dtype)

    def data_ptr(self):
        return self.values.ctypes.data


def _patch():
    from triton.runtime import interpreter

    tl, handle, builder = interpreter.tl, interpreter.TensorHandle, interpreter.InterpreterBuilder
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda *args: None
    dot, cast = builder.create_dot, builder.cast_impl

    def wide(h):
        if h.dtype != tl.bfloat16:
            return h
        return handle(h.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)

    def rounded(self, source, to):
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return handle(np.asarray(source.data, ml_dtypes.bfloat16).view(np.uint16), to.scalar)
        return cast(self, source, to)

    builder.create_dot = lambda self, a, b, d, *rest: dot(self, wide(a), wide(b), d, *rest)
    builder.cast_impl = rounded


_patched = []


def call(op, kernel, operands, outputs, *, grid, warps, constants, aliases=None, stages=3):
    """Run the kernel eagerly; outputs start as NaN, those in place are their operand."""
    if not _patched:
        _patch()
        _patched.append(True)
    kernels = importlib.import_module(f"pallas_kernels.{op}.triton_kernels")
    inputs = [_Array(np.array(a)) if hasattr(a, "shape") else a for a in operands]
    aliases = aliases or {}
    in_place = [inputs[i] for i in sorted(aliases, key=aliases.get)]
    inputs = [inputs[0] if i in aliases else a for i, a in enumerate(inputs)]
    results = in_place + [_Array(np.full(o.shape, np.nan, o.dtype)) for o in outputs[len(in_place) :]]
    getattr(kernels, kernel)[grid](*inputs, *results, **constants)
    return [jnp.asarray(a.values) for a in results]
