"""What the Mosaic GPU kernels of both ops share: how a kernel is called, and the limits of the hardware."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

KIBIBYTE = 1024  # to which a buffer in shared memory is rounded up
RESERVED_BYTES = (
    KIBIBYTE + 128
)  # of shared memory, for each program: the driver's, and a byte that Mosaic declares
SHARED_BYTES = 223 * KIBIBYTE  # of a Hopper's 227 KiB per program; the rest is for barriers and the compiler
PROCESSOR_BYTES = 228 * KIBIBYTE  # of shared memory
PROCESSORS = 132  # of a Hopper
WARPS, LANES = 4, 32  # of a warpgroup, of a warp


def up(a, b):
    """`a` rounded up to a multiple of `b`."""
    return -(-a // b) * b


class SharedRow:
    """What warpgroups that share a row of D columns have of it.

    A tile that is one says `D`, `groups`, the warpgroups, and `vector`, the columns of one access of a lane.
    """

    @property
    def folded(self):
        """A row as [chunks, warps, columns of a warp]."""
        columns = LANES * self.vector
        return self.D // (WARPS * columns), WARPS, columns

    def fold(self, a):
        """[..., D] as `folded`."""
        return a.reshape(*a.shape[:-1], *self.folded)

    @property
    def part(self):
        """What one warpgroup has of `folded`."""
        chunks, *rest = self.folded
        return chunks // self.groups, *rest

    @property
    def layout(self):
        """Registers of one warpgroup's columns, so that sums over columns need no other warp.

        A sum over warps would go through a scratch that JAX gives to all warpgroups at once.
        """
        tiling = plgpu.Tiling(((WARPS, LANES * self.vector), (self.vector,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def run(body, inputs, outputs, scratch, *, grid, groups, name, interpret):
    """Call `body(refs)`; inputs, outputs and scratch are dicts, and their refs are attributes of `refs`.

    An input that is a `jax.Ref` is written in place; JAX takes those inside `jax.shard_map` with
    `check_vma=False` only. `grid` is a dict of axis names and sizes;
    `groups` warpgroups of 128 threads run the body, told apart by the axis "group".
    """
    names = [*inputs, *outputs, *scratch]

    def kernel(*refs):
        body(SimpleNamespace(**dict(zip(names, refs, strict=True))))

    call = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=groups,
        thread_name="group",
        kernel_name=name,
        interpret=interpret,
    )
    return SimpleNamespace(**dict(zip(outputs, call(*inputs.values()), strict=True)))


def shaped(shape, dtype=jnp.float32):
    """An output of a kernel."""
    return jax.ShapeDtypeStruct(shape, dtype)
