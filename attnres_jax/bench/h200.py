"""What ptxas says of the GPU kernels for an H200 that is not there: registers, bytes spilled, shared memory.

JAX's CUDA plugin compiles for a device described by h200.txtpb; Mosaic and Triton write PTX, ptxas makes
machine code of it. Needs the CUDA wheels, no GPU. One JSON object a kernel; what the file already has for the
same kernel code is not made again. In its own process: JAX reads the environment when it is imported.
"""

import glob
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from attnres_jax.analysis.made import commit
from attnres_jax.bench import report
from attnres_jax.configs import UserError

BACKENDS, OPS, DIRECTIONS = ("gpu", "triton"), ("depth_mix", "depth_merge"), ("forward", "backward")
WIDTHS, SOURCES, READS = (2048, 2304, 4096, 7168), (2, 9, 10), (1, 6, 12, 16)
TOKENS, EPS = 8192, 1e-6
FACTS = Path(__file__).with_suffix(".txtpb")


class Case(NamedTuple):
    """One direction of an op of one backend: D, R sources, S reads; Phase 2 has no R."""

    backend: str
    op: str
    direction: str
    width: int
    sources: int
    reads: int


def cases(args: dict[str, Any]) -> Iterator[Case]:
    """What the command asks for, each once; `all` is the full grid."""
    widths, sources, reads = (
        (WIDTHS, SOURCES, READS) if args["all"] else ((args["width"],), (args["sources"],), (args["reads"],))
    )
    for width, backend, direction in product(widths, BACKENDS, DIRECTIONS):
        yield from (Case(backend, "depth_mix", direction, width, r, s) for r, s in product(sources, reads))
        yield Case(backend, "depth_merge", direction, width, 0, max(reads))  # one row of S, whatever S


def key(case: Case) -> dict[str, Any]:
    """What names the rows of a case: a change of the kernels' code makes others."""
    sizes = {"tokens": TOKENS, "dtype": "bfloat16", "code": digest(case.backend, case.op)}
    return {"chip": "h200", **case._asdict(), **sizes}


def digest(backend: str, op: str) -> str:
    """Of all that one backend of one op is made of."""
    package = importlib.import_module("pallas_kernels").__path__[0]
    shared = {"gpu": "mosaic.py", "triton": "triton.py"}[backend]
    files = [*sorted(Path(package, op).glob(f"{backend}*.py")), Path(package, shared)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def toolkit() -> str | None:
    """The folder of the CUDA wheels that holds bin/ptxas and nvvm/, or None."""
    found = [path for folder in sys.path for path in glob.glob(f"{folder}/nvidia/*/bin/ptxas")]
    return str(Path(found[0]).parents[1]) if found else None


def environment(folder: str) -> dict[str, str]:
    """What JAX, Mosaic and jax-triton read when they are imported; `folder` takes what they dump."""
    return {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={toolkit()} --xla_gpu_autotune_level=0",
        "PATH": f"{toolkit()}/bin:{os.environ['PATH']}",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_TO": folder,
        "JAX_TRITON_DUMP_DIR": folder,
    }


def run(args: dict[str, Any]) -> int:
    """In a child process; its exit code. Raises `UserError` where what compiles for CUDA is missing."""
    plugins = [f"jax_cuda{v}_plugin" for v in (12, 13)]
    if not toolkit() or not any(importlib.util.find_spec(name) for name in plugins):
        raise UserError(
            "the compilers for CUDA are not installed (they need no GPU, only Linux on x86): "
            "pip install 'jax[cuda13]==0.11.2' jax-triton, or make train LOCK=requirements/gpu.txt"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "attnres_jax.bench.h200", json.dumps(args | {"dumps": folder})]
        return subprocess.run(command, check=False, env=os.environ | environment(folder)).returncode


def main(words: list[str]) -> int:
    """Compile what is missing; `words` is one JSON object, see `commands.roofline`."""
    args = json.loads(words[0])
    out = args["out"] and Path(args["out"])
    done = report.done(out, ("h200",), ("chip", *Case._fields, "tokens", "dtype", "code"))
    for case in cases(args):
        names = key(case)
        if json.dumps(names) in done:
            continue
        for found in _measured(case, Path(args["dumps"])):
            row = names | found | {"versions": report.versions(), "commit": commit()}
            print(_line(row), flush=True)
            report.append(row, out)
    return 0


def _line(row):
    what = f"{row['backend']:6} {row.get('kernel', row['op']):20} D={row['width']:<5} R={row['sources']:<3}"
    what += f"S={row['reads']:<3}"
    if "error" in row:
        return f"{what} {row['error'][:120]}"
    shared = f"{row['shared_bytes'] / 1024:.0f} KiB shared"
    return f"{what} {row['registers']:3} registers, {row['spilled_bytes']} bytes spilled, {shared}"


def _measured(case, dumps):
    """One row for each kernel of the case, or one with the reason why there is none."""
    import jax

    before = set(dumps.rglob("*"))
    start = sum(os.times()[:4])
    try:
        with jax.sharding.use_abstract_mesh(mesh()):
            function, arguments = call(case, _device())
            jax.jit(function).lower(*arguments).compile()
    except (ValueError, RuntimeError) as refused:  # the op's own words on sizes, or a compiler's
        return [{"error": str(refused).splitlines()[0]}]
    took = {"compile_cpu_seconds": round(sum(os.times()[:4]) - start, 1)}  # with ptxas', where it is a child
    files = sorted(set(dumps.rglob("*")) - before)
    return [row | took for row in (_mosaic if case.backend == "gpu" else _triton)(files, case.op)]


def mesh() -> Any:
    """Of one H200 that is not there, for tracing and lowering."""
    import jax

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    return jax.sharding.AbstractMesh(
        (1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device
    )


def _device():
    from jax.experimental import topologies

    names = {"platform": "cuda", "topology_name": "h200", "topology": "1x1x1"}
    return topologies.get_topology_desc(**names, target_config=FACTS.read_text()).devices[0]


def _mosaic(files, _):
    """What MOSAIC_GPU_DUMP_PTXAS leaves: ptxas' words, and the shared memory that a launch asks for."""
    for file in (file for file in files if file.suffix == ".ptxas"):
        asked = _number(r"smem_scratch_bytes=(\d+)", file.with_suffix(".resources.txt").read_text())
        yield {"kernel": re.sub(r"_\d+$", "", file.stem)} | said(file.read_text(), asked)


def _triton(files, op):
    """jax-triton leaves PTX, which XLA hands to this ptxas, and the shared memory of a launch."""
    for file in (file for file in files if file.suffix == ".ptx"):
        command = ["ptxas", "-v", "-arch=sm_90a", str(file), "-o", os.devnull]
        words = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        asked = _number(r"shared_mem_bytes: (\d+)", file.with_suffix(".compile_info").read_text())
        yield {"kernel": f"{op}_{file.stem}"} | said(words, asked)


def said(words: str, shared: int) -> dict[str, int]:
    """Numbers of `ptxas -v`; `shared` is what a launch asks for beside what is declared."""
    declared = _number(r"(\d+) bytes smem", words) if "bytes smem" in words else 0
    return {
        "registers": _number(r"Used (\d+) registers", words),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", words))),
        "shared_bytes": shared + declared,
    }


def _number(pattern, text):
    found = re.search(pattern, text)
    if not found:
        raise LookupError(f"no {pattern} in {text!r}")
    return int(found[1])


def call(case: Case, device: Any = None) -> tuple[Any, tuple[Any, ...]]:
    """A function that runs the kernels of a case, and its arguments' shapes.

    Half of Phase 1's sources are in a buffer of which a traced count is visible; Phase 2 has all its options.
    """
    import jax
    import jax.numpy as jnp

    place = device and jax.sharding.SingleDeviceSharding(device)
    module = importlib.import_module(f"pallas_kernels.{case.op}.{case.backend}")

    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    forward, first, after = {"depth_mix": _mix, "depth_merge": _merge}[case.op](module, case, of)
    if case.direction == "forward":
        return forward, first
    stats = jax.tree.map(lambda a: of(*a.shape, dtype=a.dtype), jax.eval_shape(forward, *first).stats)
    return after(stats)


def _mix(module, case, of):
    alone = case.sources // 2
    sources = tuple(of(r, TOKENS, case.width, dtype="bfloat16") for r in (*[1] * alone, case.sources - alone))
    counts = (*[None] * alone, of(dtype="int32"))
    w, lse = of(case.reads, case.width), of(case.reads, TOKENS)
    mixture = of(case.reads, TOKENS, case.width, dtype="bfloat16")

    def backward(stats):
        return partial(module.backward, eps=EPS), (w, sources, counts, lse, stats, mixture, lse, sources)

    return partial(module.forward, eps=EPS), (w, sources, counts), backward


def _merge(module, case, of):
    row, w, lse = of(TOKENS, case.width, dtype="bfloat16"), of(case.width), of(case.reads, TOKENS)
    rows, streams = (of(n, TOKENS, case.width, dtype="bfloat16") for n in (case.reads, 1))
    first = (w, w, rows, lse, streams, of(dtype="int32"), of(dtype="int32"), of(dtype="bool"))
    norms = {"eps": EPS, "norm_eps": EPS}

    def backward(stats):
        return partial(module.backward, **norms), (*first, stats, row, row, row, rows, lse)

    def forward(*args):
        """As a step has it, and with all options; the last one's statistics."""
        plain = module.forward(*args[:-1], **norms, keep_mixture=False)
        return module.forward(*args, **norms, keep_mixture=True)._replace(stream=plain.x)

    return forward, (*first, row), backward


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
