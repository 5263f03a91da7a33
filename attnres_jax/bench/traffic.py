"""Bytes and roofline time of a whole train step, compiled for a TPU that need not be there.

The real update (`train.step`: forward, backward, optimizer) is compiled for one device or a slice, for each
arm; the scheduled HLO is counted by `cost`. Nothing is run and no parameter is ever made.
"""

import json
import math
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attnres_jax import configs
from attnres_jax.bench import bound, cost, hlo, reads, report, target
from attnres_jax.bench.cost import Chip, Kernel, Row
from attnres_jax.configs import Config, UserError, base
from attnres_jax.train import step

VOCAB, CHUNKS = 32768, 8
ARMS: dict[str, tuple[str, str | None]] = {
    "plain": ("plain", None),
    "block-xla": ("block", "xla"),
    "block-kernel": ("block", "tpu"),
}
"""Residual and implementation (`choice.choose`) of each arm."""
LARGEST = 40
"""Rows of a report."""
SCOPES = ("depth_mix", "depth_merge")


class Compiled(NamedTuple):
    """One arm's program."""

    text: str
    temporaries: int
    """Bytes that are live at the peak beyond the arguments, of one device."""
    heap: int
    """Bytes of the heap that the compiler lays these out in, with what lies idle between them."""
    peak: int
    """Bytes of one device at the peak, arguments and code among them."""
    seconds: float
    """That the compiler took."""


def config(shape: dict[str, Any], residual: str) -> Config:
    """The step that is counted: bf16, nothing kept but streams and summaries, logits in chunks."""
    flat = configs.to_flat(base.get_config())
    flat |= {"model.dtype": "bfloat16", "train.vocab_chunks": CHUNKS, "mesh.data": 1, "residual": residual}
    return configs.from_flat(flat | shape)


def shape_of(args: dict[str, Any]) -> dict[str, Any]:
    """Config keys of the command's arguments: heads 128 wide and F 8/3 D in whole tiles, if not named."""
    width = args["width"]
    heads = args["heads"] or max(width // 128, 1)
    return {
        "model.blocks": args["blocks"],
        "block_size": args["block_size"],
        "model.width": width,
        "model.heads": heads,
        "model.kv_heads": heads,
        "model.mlp_width": args["mlp_width"] or -(-8 * width // 3 // 128) * 128,
        "data.length": args["length"],
        "data.batch": args["batch"] * args["fsdp"],
        "mesh.fsdp": args["fsdp"],
    }


def compiled(
    config: Config, devices: list[Any], implementation: str | None = None, vocab: int = VOCAB
) -> Compiled:
    """The update of `config` on `devices`, which need not be at hand."""
    run = step.programs(config, vocab, devices, implementation=implementation)
    tokens = jax.ShapeDtypeStruct((config.data.batch, config.data.length + 1), np.int32, sharding=run.place)
    start = time.monotonic()
    # So that what asks for the platform or the chip while it is traced is told of the target.
    with jax.sharding.use_abstract_mesh(run.mesh.abstract_mesh):
        program = run.update.trace(run.like, tokens).lower().compile()
    text, memory = program.as_text(), program.memory_analysis()
    if text is None or memory is None:
        raise UserError("this compiler does not tell what it made: use the libtpu of requirements/tpu.txt")
    beside = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    whole = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    return Compiled(text, beside, memory.temp_size_in_bytes, whole, time.monotonic() - start)


def wide(row: Row, batch: int, length: int, width: int) -> bool:
    """Whether a row belongs to the residual path: no matrix product, moves [B,T,D] or is of a read."""
    if row.kind == "matmul":
        return False
    inside = any(scope in row.op_name for scope in SCOPES)
    return inside or any(_activation(s.dims, batch, length, width) for s in row.shapes)


def attention_kernels(shape: dict[str, Any]) -> dict[str, Kernel]:
    """FLOPs of a call of splash on one device: two products forward, three for queries' cotangents, four for
    keys' and values', of which causality leaves half. Their bytes are whole operands, each once."""
    sequences = shape["data.batch"] // shape["mesh.fsdp"]
    product = 2.0 * sequences * shape["data.length"] ** 2 * shape["model.width"] / 2
    names = {"fwd_residuals": 2, "fwd_no_residuals": 2, "dq_no_residuals": 3, "dkv_no_residuals": 4}
    return {f"splash_mha_{name}": partial(cost.whole, flops=n * product) for name, n in names.items()}


def _activation(dims, batch, length, width):
    tokens = dims[-3:] == (batch, length, width), dims[-2:] == (batch * length, width)
    return any(tokens)


def measure(program: Compiled, shape: dict[str, Any], chip: Chip) -> dict[str, Any]:
    """Of one arm: bytes in TD per sublayer, roofline time, temporaries; and the largest of its rows."""
    batch, length = shape["data.batch"] // shape["mesh.fsdp"], shape["data.length"]
    width, sublayers = shape["model.width"], 2 * shape["model.blocks"]
    td = batch * length * width * 2
    rows = cost.rows(hlo.parse(program.text), attention_kernels(shape) | reads.KERNELS)
    path = [row for row in rows if wide(row, batch, length, width)]
    return {
        "bytes": sum(row.bytes for row in rows),
        "flops": sum(row.flops * row.times for row in rows),
        "td_per_sublayer": sum(row.bytes for row in rows) / td / sublayers,
        "by_kind": _by_kind(rows, td * sublayers),
        "attributed_td_per_sublayer": sum(row.bytes for row in path) / td / sublayers,
        "attributed_by_kind": _by_kind(path, td * sublayers),
        "roofline_seconds": cost.seconds(rows, chip),
        "temporaries_td": program.temporaries / td,
        "heap_td": program.heap / td,
        "compile_seconds": round(program.seconds, 1),
        "largest": [_line(row, td, sublayers) for row in sorted(path, key=lambda r: -r.bytes)[:LARGEST]],
    }


def _by_kind(rows, unit):
    total = defaultdict(float)
    for row in rows:
        total[row.kind] += row.bytes / unit
    return {k: round(v, 2) for k, v in sorted(total.items(), key=lambda kv: -kv[1]) if v >= 0.005}


def _line(row, td, sublayers):
    return {
        "td_per_sublayer": round(row.bytes / td / sublayers, 2),
        "read_td": round(row.read / td, 2),
        "written_td": round(row.written / td, 2),
        "times": row.times,
        "kind": row.kind,
        "name": row.name,
        "op_name": row.op_name[-100:],
    }


def against_plain(arms: dict[str, Any], shape: dict[str, Any], chip: Chip) -> None:
    """Add to every arm what it costs beyond the plain one, and what the bound would."""
    sublayers, plain = 2 * shape["model.blocks"], arms["plain"]
    least = bound.two_phase(sublayers, shape["block_size"])
    tokens = shape["data.batch"] // shape["mesh.fsdp"] * shape["data.length"]
    td = tokens * shape["model.width"] * 2
    extra = (least.recomputed - bound.PLAIN) * td * sublayers / chip.bytes_per_second
    for arm in arms.values():
        path = arm["td_per_sublayer"] - plain["td_per_sublayer"] + bound.PLAIN
        arm["residual_td_per_sublayer"] = path
        arm["residual_over_bound"] = path / least.recomputed
        arm["time_over_plain"] = arm["roofline_seconds"] / plain["roofline_seconds"]
        arm["temporaries_over_plain_td"] = arm["temporaries_td"] - plain["temporaries_td"]
        arm["heap_over_plain_td"] = arm["heap_td"] - plain["heap_td"]
    plain["residual_over_bound"] = None
    plain["bound"] = {
        "td_per_sublayer": {"phase 1 kept": least.kept, "phase 1 recomputed": least.recomputed},
        "time_over_plain": 1 + extra / plain["roofline_seconds"],
        "temporaries_over_plain_td": 2 * math.ceil(sublayers / shape["block_size"])
        + 2 * shape["block_size"]
        + 8,
    }


def table(whole: dict[str, Any]) -> str:
    """The arms in Markdown, and the bound."""
    lines = [
        "| arm | residual path | of the bound | whole step | roofline ms | over plain | temporaries (heap) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in whole["arms"].items():
        over = arm["residual_over_bound"]
        lines.append(
            f"| {name} | {arm['residual_td_per_sublayer']:.1f} | {f'{over:.2f}x' if over else ''} "
            f"| {arm['td_per_sublayer']:.1f} | {1e3 * arm['roofline_seconds']:.1f} "
            f"| {arm['time_over_plain']:.4f} | {arm['temporaries_td']:.0f} ({arm['heap_td']:.0f}) |"
        )
    least = whole["bound"]
    kept, again = least["td_per_sublayer"].values()
    lines.append(f"| bound | {again:.1f} ({kept:.1f} if kept) | | | | {least['time_over_plain']:.4f} | |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Compile, count, print and write; `words` is one JSON object, see `commands.traffic`."""
    args = json.loads(words[0])
    shape = shape_of(args)
    try:
        devices = target.devices(args["chip"], args["fsdp"])
        chip = target.chip(devices[0])
        names = [name for name, (_, how) in ARMS.items() if how != "xla" or not args["without_xla"]]
        found = {name: _arm(args, shape, name, devices, chip) for name in names}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    against_plain(found, shape, chip)
    whole = report.provenance(f"{devices[0].device_kind}, compiled for and not run")
    whole |= {"chip": {"name": args["chip"]} | chip._asdict(), "shape": shape | {"vocab": VOCAB}}
    whole |= {"bound": found["plain"].pop("bound"), "arms": found}
    print(table(whole))
    report.write(whole, args["out"])
    return 0


def _arm(args, shape, name, devices, chip):
    residual, implementation = ARMS[name]
    program = compiled(config(shape, residual), devices, implementation)
    if ("%depth_mix" in program.text) != (name == "block-kernel"):
        raise UserError(f"the arm {name} was compiled with the other arm's reads over depth")
    print(f"{args['chip']} {name}: compiled in {program.seconds:.0f} s", file=sys.stderr, flush=True)
    if args["keep"]:
        file = Path(args["keep"]) / f"{args['chip']}-{shape['model.blocks']}-{name}.hlo"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(program.text)
    return measure(program, shape, chip)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
