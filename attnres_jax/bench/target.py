"""TPUs that are not at hand, as targets of the compiler in libtpu.

The environment must be set before JAX is imported, so the commands that compile run in a child process
(`python -m attnres_jax.bench.MODULE`), which says all it has to say itself.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from attnres_jax.bench.cost import Chip
from attnres_jax.configs import UserError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
SLICES = {
    "v4": {n: f"v4:{shape}" for n, shape in CUBE.items()},
    "v5e": {n: f"v5e:{shape}" for n, shape in FLAT.items()},
    "v5p": {n: f"v5p:{shape}" for n, shape in CUBE.items()},
    "v6e": {n: f"v6e:{shape}" for n, shape in FLAT.items()},
    "7x": {2 * n: f"tpu7x:{shape}" for n, shape in CUBE.items()},
}
"""Names that libtpu knows, by chip and number of devices; 7x has two devices a chip."""
_FLAT = "|".join(FLAT.values())
_CUBE = r"2x2x1|2x2x2|2x2x4|2x4x4|(?:[48]|12|16|20|24)(?:x(?:[48]|12|16|20|24)){2}"
SHAPES = {"v4": _CUBE, "v5e": _FLAT, "v5p": _CUBE, "v6e": _FLAT, "tpu7x": _CUBE}
"""Of every chip, as patterns: libtpu takes others too, and makes something of them."""

WHOLE_PRODUCTS = {"LIBTPU_INIT_ARGS": "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"}
"""Parameters are gathered whole before a product. Cut into windows, products would trade HBM bytes, which are
counted, for overlap with the links, which is not: 141 units a sublayer instead of 104 on four v6e."""


def run(module: str, words: Sequence[str], environment: dict[str, str] | None = None) -> int:
    """`python -m attnres_jax.bench.<module> <words>` where JAX compiles for TPUs; its exit code.

    Raises:
      UserError: where libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, the compiler for TPUs, is not installed (it needs no TPU, only Linux on x86): "
            "pip install 'jax[tpu]', or make train LOCK=requirements/tpu.txt"
        )
    command = [sys.executable, "-m", f"attnres_jax.bench.{module}", *words]
    return subprocess.run(command, check=False, env=os.environ | ENVIRONMENT | (environment or {})).returncode


def devices(chip: str, count: int) -> list[Any]:
    """`count` devices of a slice of the smallest size that has them."""
    from jax.experimental import topologies

    size = min((n for n in SLICES[chip] if n >= count), default=0)
    if not size:
        raise UserError(f"no slice of {chip} has {count} devices: at most {max(SLICES[chip])}")
    name = SLICES[chip][size]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:count]


def topology(name: str, slices: int = 1) -> list[Any]:
    """The devices of a slice named as libtpu does, `v5p:4x4x8`, or of several that a network joins.

    Raises:
      UserError: where no such slice exists; names those that do.
    """
    chip, _, shape = name.partition(":")
    legal = chip in SHAPES and re.fullmatch(SHAPES[chip], shape)
    sides = [int(side) for side in shape.split("x")] if legal else []
    if not sides or (sides != sorted(sides) and shape != CUBE[4]):
        raise UserError(
            f"topology {name!r} does not exist: v5e and v6e have {', '.join(FLAT.values())}; v4, v5p and "
            "tpu7x have 2x2x1, 2x2x2, 2x2x4, 2x4x4 and multiples of 4, smallest first, as v5p:4x4x8 is"
        )
    from jax.experimental import topologies

    several = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices


def tracing_for(device: Any) -> AbstractContextManager[Any]:
    """Inside it a program is traced for this one device, which need not be at hand."""
    import jax

    kind = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
    )
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind))


def info(device: Any) -> Any:
    """JAX's own figures of a device, per TensorCore (`jax.experimental.pallas.tpu.get_tpu_info`)."""
    from jax.experimental.pallas import tpu

    with tracing_for(device):
        return tpu.get_tpu_info()


def chip(device: Any) -> Chip:
    """Bandwidth and peak of a device: of all its TensorCores, bf16 products."""
    found = info(device)
    cores = found.num_cores
    return Chip(float(found.mem_bw_bytes_per_second * cores), float(found.bf16_ops_per_second * cores))
