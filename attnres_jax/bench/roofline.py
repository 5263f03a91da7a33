"""How far the TPU kernels are from their own DMA, by static analysis: libtpu compiles them, with no TPU.

For each kernel, shape and chip: cycles of a grid step (`bundles`), bytes it moves (`grids`), their ratio,
VMEM, spills, compile time. One JSON object a line; what the file already has of the same program is not made
again. A process a chip, for libtpu reads its dump flags once.
"""

import hashlib
import importlib
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from attnres_jax.analysis.made import commit
from attnres_jax.bench import report, target

KERNELS = ("depth_mix_forward", "depth_mix_backward", "depth_merge_forward", "depth_merge_backward")
WIDTHS, SOURCES, READS = (896, 1024, 2304, 4096, 7168), (2, 5, 9, 10), (1, 6, 12, 16)
TOKENS, EPS = 8192, 1e-6
CLOCK = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "7x": 2.2e9}
"""Hz, public figures to about 10 %: JAX has none."""
FLAGS = (
    "--xla_jf_dump_to={0} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=true --xla_jf_debug_level=2 "
    "--xla_jf_dump_llo_pass_label_regex=final_bundles|final_hlo-static-per-bundle-utilization"
)
"""Dumps of the two texts that are read: others that libtpu can make take minutes."""


class Case(NamedTuple):
    """One kernel of one shape: D, R sources, S reads; Phase 2 has no R."""

    kernel: str
    width: int
    sources: int
    reads: int

    @property
    def op(self) -> str:
        """The folder of `pallas_kernels`."""
        return self.kernel.rpartition("_")[0]

    @property
    def direction(self) -> str:
        """The function there."""
        return self.kernel.rpartition("_")[2]


def cases(args: dict[str, Any]) -> Iterator[Case]:
    """What the command asks for, each once; `all` is the full grid."""
    widths, sources, reads = (
        (WIDTHS, SOURCES, READS) if args["all"] else ((args["width"],), (args["sources"],), (args["reads"],))
    )
    for width, kernel in product(widths, KERNELS):
        if kernel.startswith("depth_merge"):
            yield Case(kernel, width, 0, max(reads))  # one row of S is read, whatever S
        else:
            yield from (Case(kernel, width, r, s) for r, s in product(sources, reads))


def key(chip: str, case: Case, program: str) -> dict[str, Any]:
    """What names a row: another program makes another, the same one from other code does not."""
    digest = hashlib.sha256(program.encode()).hexdigest()[:12]
    return {"chip": chip, **case._asdict(), "tokens": TOKENS, "dtype": "bfloat16", "program": digest}


def program(traced: Any) -> str:
    """What makes the program of a traced call of one kernel: not where its source stands, nor its names."""
    from attnres_jax.bench import grids

    (call,) = grids.calls(traced.jaxpr.jaxpr)
    # The text of a jaxpr has its kernel, grid and limits, but not which block comes at which step.
    blocks = [str(block.index_map_jaxpr) for block in call.params["grid_mapping"].block_mappings]
    return "\n".join([str(traced.jaxpr), *blocks])


def run(args: dict[str, Any]) -> int:
    """A child process for each chip, one after the other; the first exit code that is not 0."""
    for chip in [args["chip"]] if args["chip"] else target.SLICES:
        with tempfile.TemporaryDirectory() as dumps:
            words = [json.dumps(args | {"chip": chip, "dumps": dumps})]
            code = target.run("roofline", words, {"LIBTPU_INIT_ARGS": FLAGS.format(dumps)})
        if code:
            return code
    return 0


def main(words: list[str]) -> int:
    """Measure what is missing for one chip; `words` is one JSON object, see `commands.roofline`."""
    args = json.loads(words[0])
    out, chip = args["out"] and Path(args["out"]), args["chip"]
    done = report.done(out, target.SLICES, ("chip", *Case._fields, "tokens", "dtype", "program"))
    device = target.devices(chip, 1)[0]
    for case in cases(args):
        try:
            traced = trace(case, device)
            text = program(traced)
        except ValueError as refused:  # what the op says of sizes that it does not take
            traced, text = None, str(refused)
        names = key(chip, case, text)
        if json.dumps(names) in done:
            continue
        found = _measured(case, traced, device, chip, Path(args["dumps"])) if traced else {"error": text}
        row = names | found
        row |= {"versions": report.versions(), "commit": commit()}
        print(_line(row), flush=True)
        report.append(row, out)
    return 0


def _line(row):
    what = f"{row['chip']:4} {row['kernel']:21} D={row['width']:<5} R={row['sources']:<3} S={row['reads']:<3}"
    if "error" in row:
        return f"{what} {row['error'][:120]}"
    memory = f"VMEM {row['vmem_bytes'] / 2**20:.1f} MiB, spills {row['spilled']}+{row['filled']}"
    took = f"compiled in {row['compile_cpu_seconds']:.1f} s of CPU"
    return f"{what} {row['cycles']:6} cycles, {row['ratio']:.2f} of DMA, {memory}, {took}"


def trace(case: Case, device: Any) -> Any:
    """The call of a kernel, traced for the chip. Raises `ValueError` of sizes that the op does not take."""
    import jax

    with target.tracing_for(device):
        return jax.jit(_function(case)).trace(*_arguments(case, device))


def _measured(case, traced, device, chip, dumps):
    import jax

    from attnres_jax.bench import grids

    shutil.rmtree(dumps)
    dumps.mkdir()
    (call,) = grids.calls(traced.jaxpr.jaxpr)
    # The rows of sources are copied by hand, each once; the buffer Phase 2 writes rows of is not read.
    share = float(case.op == "depth_mix")
    moved = grids.moved(call, [_scalars(case)], lambda _: share)
    start = time.process_time()
    try:
        text = traced.lower().compile().as_text() or ""
    except jax.errors.JaxRuntimeError as refused:
        return {"error": str(refused).splitlines()[0]}
    seconds = time.process_time() - start
    per_core = target.info(device).mem_bw_bytes_per_second
    return _static(case, dumps, moved, CLOCK[chip] / per_core) | {
        "vmem_bytes": _vmem(text, case.kernel),
        # Of all threads, so that a busy machine changes little; the dumps are in it.
        "compile_cpu_seconds": round(seconds, 1),
    }


def _static(case, dumps, moved, cycles_per_byte):
    """Numbers of the dumped schedule, beside those of the grid."""
    from attnres_jax.bench import bundles

    def dump(kind):
        (file,) = (f for f in dumps.iterdir() if re.search(rf"-{case.kernel}[.\d]*-\d+-{kind}\.txt$", f.name))
        return file.read_text()

    step = bundles.step(dump("final_bundles"), max(case.sources, 1))
    slots = bundles.slots(dump("final_hlo-static-per-bundle-utilization"))
    dma = (moved.read + moved.written) / moved.steps
    return {
        "cycles": step.cycles,
        "starting_cycles": step.starting,
        "dma_bytes": dma,
        "dma_cycles": round(dma * cycles_per_byte),
        "ratio": round(step.cycles / (dma * cycles_per_byte), 3),
        "read_bytes": moved.read,
        "written_bytes": moved.written,
        "steps": moved.steps,
        "spilled": slots["VSTORE:SPILL"],
        "filled": slots["VLOAD:FILL"],
        "slots": {name: used for name, used in slots.items() if used},
    }


def _vmem(text, kernel):
    """Bytes of VMEM that a kernel's call uses, from the compiled program."""
    call = re.search(rf"%{kernel}[.\d]* = .*?used_scoped_memory_configs\":\[([^]]*)\]", text, re.DOTALL)
    sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', call[1]) if call else []
    return max(map(int, sizes), default=0)


def _scalars(case):
    return [case.sources] if case.op == "depth_mix" else [0, 0, 0]


def _function(case, counted=False):
    """Of `_arguments`; `counted` takes one more, the number of visible rows."""
    function = getattr(importlib.import_module(f"pallas_kernels.{case.op}.tpu"), case.direction)
    if case.op == "depth_mix":
        if counted:
            return lambda w, v, *rest: function(w, (v,), (rest[-1],), *_tupled(rest[:-1]), eps=EPS)
        return lambda w, v, *rest: function(w, (v,), (None,), *_tupled(rest), eps=EPS)
    if case.direction == "forward":
        return lambda *a: function(*a, eps=EPS, norm_eps=EPS, keep_mixture=False)
    return lambda *a: function(*a[:10], None, *a[10:], eps=EPS, norm_eps=EPS)


def _tupled(rest):
    """The last argument of Phase 1's backward pass is a tuple of arrays, as its sources are."""
    return (*rest[:-1], (rest[-1],)) if rest else ()


def _arguments(case, device):
    import jax
    import jax.numpy as jnp

    place = device and jax.sharding.SingleDeviceSharding(device)

    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    bf16 = jnp.bfloat16
    S, D, lse = case.reads, case.width, of(case.reads, TOKENS)
    rows, stream = of(S, TOKENS, D, dtype=bf16), of(TOKENS, D, dtype=bf16)
    if case.op == "depth_mix":
        sources = of(case.sources, TOKENS, D, dtype=bf16)
        first, after = (of(S, D), sources), (rows, lse, sources)
    else:
        streams, at = of(1, TOKENS, D, dtype=bf16), of(dtype=jnp.int32)
        first = (of(D), of(D), rows, lse, streams, at, at, of(dtype=jnp.bool_))
        after = (stream, stream, rows, lse)
    if case.direction == "forward":
        return first
    forward = jax.eval_shape(_function(case._replace(kernel=f"{case.op}_forward")), *first)
    stats = jax.tree.map(lambda a: of(*a.shape, dtype=a.dtype), forward.stats)
    return (*first, lse, stats, *after) if case.op == "depth_mix" else (*first, stats, *after)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
