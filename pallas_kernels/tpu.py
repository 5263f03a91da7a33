"""What the TPU kernels of both ops share: the chip's limits, from JAX's table, and how a kernel is called."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

LANES = 128
NN, NT = ((1,), (0,)), ((1,), (1,))
"""Contracted dimensions of `a b` and `a b^T`."""
ASSUMED_VMEM = 64 << 20
"""Bytes, where no TPU is named (interpret mode): the least of the chips of today, v4 aside."""


def chip():
    """Bytes of VMEM to ask for at most, and TensorCores, of the TPU that is traced for."""
    if not pltpu.is_tpu_device():
        return int(0.9 * ASSUMED_VMEM), 1
    info = pltpu.get_tpu_info()
    return int(0.9 * info.vmem_capacity_bytes), info.num_cores


def mxu():
    """Width of the matrix unit of the TPU that is traced for."""
    return pltpu.get_tpu_info().mxu_column_size if pltpu.is_tpu_device() else LANES


def output(shape, dtype, like):
    """An output that varies over the mesh axes of `shard_map` that `like` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def params(vmem):
    """Of a grid (cores, steps of a core), with `vmem` bytes."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem)


def dot(a, b, contract):
    """A product accumulated in fp32; fp32 operands at full precision, whatever JAX's default is."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision, preferred_element_type=jnp.float32)


def upper(x):
    """What bf16 holds of fp32 exactly, its upper 16 bits, as fp32."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def thirds(x):
    """fp32 as a sum of three that bf16 holds exactly."""
    parts = []
    for _ in range(2):
        parts.append(upper(x))
        x = x - parts[-1]
    return *parts, x
