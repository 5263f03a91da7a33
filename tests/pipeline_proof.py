"""A pipelined model beside the unpipelined one, over a grid of P, V and N_p, and the bytes of its hops.

    python tests/pipeline_proof.py --out=docs/results/pipeline

Each cell: loss and every gradient in fp32 and in fp64, and the units per hop counted in the compiled HLO.
Small cells come first. Rows stand in OUT/proof.jsonl, and a cell that has one is not run again; OUT/proof.md
and OUT/bytes.md are written anew after each.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import bench_compile
import jax
import jax.numpy as jnp
import numpy as np
import toys
import wire

from attnres_jax import configs
from attnres_jax.parallel.timetable import Chunks, Timetable, sent

STAGES, VIRTUAL = (2, 3, 4, 8), (1, 2, 4)
# N_p: (transformer blocks a chunk, block size in sublayers).
SHAPES = {"2": (1, 1), "3/2": (3, 4), "1": (1, 2), "1/2": (1, 4), "1/4": (1, 8)}
UNEVEN = "uneven"
GROUPS = 3  # of P microbatches: slots of the cache are used again
# Wider than the tests' model: at width 16 gradients of some rows of tokens change 500 times as much as the
# parameters do, and two orders of summing may differ by the fp32 tolerance.
SIZE = {"model__width": 64, "model__mlp_width": 96}
EXACT = 1e-12
"""Of fp64: the most that a gradient may be off."""
COMMAND = "python tests/pipeline_proof.py --out=docs/results/pipeline"
# P, V, N_p of the page of bytes: what `pipeline` sends, whether or not it was compiled.
BYTES = [
    *((2, 1, "1"), (2, 2, "1"), (2, 4, "1"), (4, 1, "1"), (4, 2, "1"), (4, 4, "1"), (8, 1, "1"), (8, 2, "1")),
    *((8, 4, "1"), (4, 2, "2"), (8, 2, "2"), (4, 2, "1/2"), (4, 4, "1/2"), (8, 2, "1/2"), (4, 2, "1/4")),
    *((8, 2, "1/4"), (4, 2, "3/2"), (16, 4, "1")),
]
PROOF = """# The pipelined model is the model

`{command}` (or `make pipeline-proof`); {host}.

P stages of V virtual stages, C = P V chunks, 3 P microbatches; a language model of width {width}, on as many
CPU devices as there are stages. The worst gradient is over all parameters: the largest error of a leaf beside
its largest entry, or a 200th of the largest of all leaves, in fp32 (at most {tolerance:.0e}) and in fp64 (at
most {exact:.0e}); rounding is the same of the unpipelined model in fp32 beside itself in fp64. Units
(activations [B,T,D]) per hop are counted in the permutes of the compiled HLO, forward / backward, and stand
beside the timetable's. Uneven: one transformer block more than chunks, AttnRes blocks of 4 sublayers, which
chunks part. There the static message forward may hold a row more than the window: the most that leaves early
and the most that is fresh are of different hops. Commits: {commits}.

At width 16, which this page had before, one of 67 cells (4, 2, uneven) was 2.5e-05 off in fp32 and 4e-14 in
fp64: there gradients of some rows of tokens change some hundred times as much as the parameters do, and two
orders of summing differ by the tolerance itself. Hence a wider model, and fp64, which rounding does not blur,
in every cell. (A commit is called dirty where pages and rows that this command writes were not committed.)

{cells}

{missing}
"""
BYTES_PAGE = """# Bytes of the hops

`{command}`; formulas from `attnres_jax/parallel/timetable.py` (`sent`), measured: from [proof](proof.md).

Units ([B,T,D] of a microbatch) in one direction; the other way is the same. *Naive* sends the whole history
at every hop, *paper* is its formula for cross-stage caching, P (P-1) / 2 N_p + (V-1) P^2 N_p, *needed* what
each receiver lacks, which is what the hops carry. Where N_p < 1 the formula leaves out the running sums of
open blocks. Messages have one static size, so that a microbatch moves C x (units per hop), *sent*; its excess
over *needed* lies in the first round and behind the last chunk. Peaks are units of the longest hop
(the paper's: P N_p, or (P-1) N_p where V = 1); measured: per hop in the compiled HLO, forward / backward.

{rows}
"""


class Cell(NamedTuple):
    """One of the grid."""

    stages: int
    virtual: int
    per_chunk: str

    @property
    def count(self) -> int:
        """C."""
        return self.stages * self.virtual

    @property
    def name(self) -> str:
        return f"{self.stages}x{self.virtual}, {self.per_chunk}"

    @property
    def blocks(self) -> int:
        """Transformer blocks."""
        return self.count + 1 if self.per_chunk == UNEVEN else SHAPES[self.per_chunk][0] * self.count

    @property
    def size(self) -> int:
        """Sublayers in an AttnRes block."""
        return 4 if self.per_chunk == UNEVEN else SHAPES[self.per_chunk][1]

    @property
    def chunks(self) -> Chunks:
        return Chunks(2 * self.blocks, self.size, self.stages, self.virtual)

    @property
    def impossible(self) -> str:
        """Why there is no such cell, "" where there is."""
        whole = self.per_chunk == UNEVEN or Fraction(self.per_chunk) * self.count
        return "" if whole is True or whole.denominator == 1 else f"N = {whole} is no integer"


def grid() -> list[Cell]:
    cells = [Cell(*at) for at in product(STAGES, VIRTUAL, (*SHAPES, UNEVEN))]
    return sorted(cells, key=lambda cell: (cell.blocks, cell.stages))


def run(cell: Cell) -> dict:
    """The row of a cell."""
    import test_pipeline as pipelines

    start, P = time.monotonic(), cell.stages
    table = Timetable(P, cell.virtual, GROUPS * P)
    size = (P, cell.virtual, table.microbatches, cell.blocks)
    config = pipelines.config_of(size, block_size=cell.size, **SIZE)
    params = toys.parameters(configs.model_config(config, pipelines.VOCAB), 1)
    case = pipelines.made(config, params=params)
    program = pipelines.compiled(case.pipe, case)
    hops = wire.hops(wire.messages(program.as_text(), P), np.arange(P), unit())
    assert hops.ticks == table.phases, (hops, table.phases)
    assert hops.units[1] == hops.units[0] + hops.units[2], hops
    value, gradient = pipelines.run(case.pipe, case, program)
    wanted_value, wanted = pipelines.run(case.whole, case)
    return cell._asdict() | {
        "microbatches": table.microbatches,
        "loss": value,
        "loss_off": abs(value / wanted_value - 1),
        "worst": float(pipelines.off(gradient, wanted)),
        **exact(config, case, wanted),
        "forward": hops.units[0],
        "backward": hops.units[2],
        "seconds": round(time.monotonic() - start),
        "commit": bench_compile.commit(),
        "jax": jax.__version__,
    }


def exact(config, case, wanted) -> dict:
    """The same two in fp64, and how far the unpipelined gradients in fp32 are from those in fp64."""
    import test_pipeline as pipelines

    with jax.enable_x64(True):
        model = replace(configs.model_config(config, pipelines.VOCAB), dtype=jnp.float64)
        params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), case.params)
        wide = pipelines.made(config, params=params, model=model)
        truth, gradient = (pipelines.run(way, wide)[1] for way in (wide.whole, wide.pipe))
    return {
        "worst_fp64": float(pipelines.off(gradient, truth)),
        "own_rounding": float(pipelines.off(wanted, truth)),
    }


def wrong(cell: Cell, row: dict) -> bool:
    """Whether a row is not what the pages say of all."""
    from test_pipeline import TOLERANCE

    cache = cell.chunks.cache
    units = row["forward"], row["backward"]
    same = max(row["loss_off"], row["worst"]) <= TOLERANCE and row["worst_fp64"] <= EXACT
    return not same or units != (cache.conveyor + cache.written, cache.window)


def unit() -> int:
    """Elements of an activation of one microbatch."""
    import test_pipeline as pipelines

    return pipelines.ROWS * pipelines.LENGTH * SIZE["model__width"]


def key(row):
    return row["stages"], row["virtual"], row["per_chunk"]


def pages(rows: dict, out: Path):
    """Both pages, of the rows there are."""
    from test_pipeline import TOLERANCE

    host = f"{bench_compile.processor()}, JAX {jax.__version__}"
    cells = sorted(grid(), key=lambda cell: (cell.stages, cell.virtual, (*SHAPES, UNEVEN).index(cell[2])))
    left = [cell.name for cell in cells if not cell.impossible and cell not in rows]
    missing = f"Not run yet, of {len(cells)} cells: {'; '.join(left)}." if left else "All cells of the grid."
    commits = ", ".join(sorted({row["commit"] for row in rows.values()}))
    page = PROOF.format(
        commits=commits,
        command=COMMAND,
        host=host,
        tolerance=TOLERANCE,
        exact=EXACT,
        width=SIZE["model__width"],
        missing=missing,
        cells=proof_table(cells, rows),
    )
    (out / "proof.md").write_text(page)
    (out / "bytes.md").write_text(BYTES_PAGE.format(command=COMMAND, rows=bytes_table(rows)))


def proof_table(cells, rows):
    lines = [
        "| P | V | N_p | transformer blocks | AttnRes blocks of | loss off by | worst gradient | in fp64 "
        "| rounding | units, HLO | timetable |",
        "|" + "---|" * 11,
    ]
    for cell in cells:
        head = f"| {cell.stages} | {cell.virtual} | {cell.per_chunk} | {cell.blocks} | {cell.size} |"
        if cell.impossible:
            lines.append(
                f"| {cell.stages} | {cell.virtual} | {cell.per_chunk} | {cell.impossible} |" + " |" * 7
            )
        elif cell in rows:
            row, cache = rows[cell], cell.chunks.cache
            measured = f"{row['forward']:g} / {row['backward']:g}"
            listed = f"{cache.conveyor + cache.written} / {cache.window}"
            errors = " | ".join(f"{row[name]:.1e}" for name in ("worst", "worst_fp64", "own_rounding"))
            lines.append(f"{head} {row['loss_off']:.0e} | {errors} | {measured} | {listed} |")
    return "\n".join(lines)


def bytes_table(rows):
    lines = [
        "| P | V | N_p | naive | paper | needed | sent | peak: naive | paper | ours | measured |",
        "|" + "---|" * 11,
    ]
    for cell in (Cell(*at) for at in BYTES):
        found, cache, row = sent(cell.chunks), cell.chunks.cache, rows.get(cell)
        hops = cell.stages - (cell.virtual == 1)  # the paper's longest: in one round it is of P - 1 chunks
        values = [
            *(*cell, found.naive, f"{found.cached:g}", found.needed),
            *(cell.count * (cache.conveyor + cache.written), max(cell.chunks.begun[1:-1])),
            *(f"{float(hops * Fraction(cell.per_chunk)):g}", found.longest),
            f"{row['forward']:g} / {row['backward']:g}" if row else "-",
        ]
        lines.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join(lines)


def kept(file: Path) -> dict:
    """The rows of a file, by cell."""
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {Cell(*key(row)): row for row in lines}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most-blocks", type=int, default=10**9, help="no cell of more transformer blocks")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "proof.jsonl"
    rows = kept(file)
    for cell in grid():
        if cell.impossible or cell in rows or cell.blocks > args.most_blocks:
            continue
        rows[cell] = run(cell)
        with file.open("a") as lines:
            lines.write(json.dumps(rows[cell]) + "\n")
        print(json.dumps(rows[cell]), flush=True)
        jax.clear_caches()
        pages(rows, args.out)
    pages(rows, args.out)
    if broken := [cell.name for cell, row in rows.items() if wrong(cell, row)]:
        sys.exit(f"not the model, or not the timetable: {'; '.join(broken)}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(STAGES))
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
