"""Compile the Mosaic GPU kernels for an H200 with no GPU: `python tests/h200.py merge:2304 mix:2304 ...`.

Prints one line of JSON a kernel: its name, registers, bytes spilled, bytes of shared memory. Needs the CUDA
plugin of the same JAX version and the CUDA compiler's package; the device's facts are in h200.txtpb.
"""

import glob
import json
import os
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TOKENS, S, N = 8192, 12, 8


def toolkit():
    """The folder with bin/ptxas and nvvm/, or None."""
    found = [p for folder in sys.path for p in glob.glob(f"{folder}/nvidia/*/bin/ptxas")]
    return str(Path(found[0]).parents[1]) if found else None


def prepare(dump):
    """The environment that JAX reads when imported."""
    os.environ |= {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={toolkit()} --xla_gpu_autotune_level=0",
        "PATH": f"{toolkit()}/bin:{os.environ['PATH']}",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_TO": dump,
    }
    sys.path.insert(0, str(HERE.parent))


def abstract(jax):
    """A mesh of one H200 that is not there, for lowering."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.sharding.AbstractMesh((1,), ("x",), axis_types=kinds, abstract_device=device)


def merge(shape, D):
    """Forward and backward of one read, with every option."""
    from pallas_kernels.depth_merge import gpu

    eps = {"eps": 1e-6, "norm_eps": 1e-6}
    row, rows, lse = shape((TOKENS, D)), shape((S, TOKENS, D)), shape((S, TOKENS), "float32")
    w, j, first = shape((D,), "float32"), shape((), "int32"), shape((), "bool")
    stats = shape((4, TOKENS), "float32")

    def forward(w, g, o, lse, p, j, first, y):
        return gpu.forward(w, g, o, lse, p, j, first, y, keep_mixture=True, **eps)

    def backward(w, g, o, lse, p, j, first, stats, dx, dh, dp, do, dl):
        return gpu.backward(w, g, o, lse, p, j, first, stats, dx, dh, dp, do, dl, **eps)

    yield forward, (w, w, rows, lse, row, j, first, row)
    yield backward, (w, w, rows, lse, row, j, first, stats, row, row, row, rows, lse)


def mix(shape, D):
    """Forward and backward of S queries over N rows, the last half in a buffer with a count."""
    from pallas_kernels.depth_mix import gpu

    sources = tuple(shape((r, TOKENS, D)) for r in (*[1] * (N // 2), N // 2))
    counts = (*[None] * (N // 2), shape((), "int32"))
    w, lse = shape((S, D), "float32"), shape((S, TOKENS), "float32")
    stats = ((shape((TOKENS // 8, N, 8 * -(-S // 8) * 8), "float32"), shape((N, TOKENS), "float32")),)

    def forward(w, sources, counts):
        return gpu.forward(w, sources, counts, eps=1e-6)

    def backward(w, sources, counts, lse, stats, d_mixture, d_lse, d_sources):
        return gpu.backward(w, sources, counts, lse, stats, d_mixture, d_lse, d_sources, eps=1e-6)

    yield forward, (w, sources, counts)
    yield backward, (w, sources, counts, lse, stats, shape((S, TOKENS, D)), lse, sources)


def report(dump):
    """What ptxas said of each kernel."""
    for path in sorted(Path(dump).glob("*.ptxas")):
        text, resources = path.read_text(), path.with_suffix(".resources.txt").read_text()
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        shared = int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1])
        name = re.sub(r"_\d+$", "", path.stem)
        yield {"kernel": name, "registers": registers, "spilled": spilled, "shared": shared}


def compile_all(rows):
    """Compile each row, a generator's name and a width, and print what came of it."""
    import jax
    from jax.experimental import topologies

    facts = (HERE / "h200.txtpb").read_text()
    h200 = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=facts, topology="1x1x1"
    )
    here = jax.sharding.SingleDeviceSharding(h200.devices[0])

    def shape(sizes, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=here)

    for row in rows:
        kind, D = row.split(":")
        with tempfile.TemporaryDirectory() as dump:
            prepare(dump)
            for f, args in {"merge": merge, "mix": mix}[kind](shape, int(D)):
                with jax.sharding.use_abstract_mesh(abstract(jax)):
                    jax.jit(f).lower(*args).compile()
            for found in report(dump):
                print(json.dumps({"D": int(D), **found}), flush=True)


if __name__ == "__main__":
    prepare("")
    compile_all(sys.argv[1:])
