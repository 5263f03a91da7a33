"""The pipeline's timetable for people: what each hop carries, what it costs, who runs what when."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from attnres_jax.analysis import figures
from attnres_jax.parallel.timetable import Chunks, Timetable, sent, text

SHADES = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#F0E442", "#999999")
"""Of virtual stages, Okabe and Ito's."""


def report(chunks: Chunks, table: Timetable, out: Path | None = None) -> None:
    """Print chunks and their messages, costs, and the timetable; draw it at `out`."""
    console = Console()
    console.print(_messages(chunks))
    console.print(_costs(chunks, table))
    print(f"Tick, then what each stage runs in it: F(orward) or B(ackward), microbatch, chunk\n{text(table)}")
    if out:
        print(f"wrote {figures.save(figure(table), out)}")


def figure(table: Timetable) -> Figure:
    """A row a stage, a column a tick: forward above backward, numbers are microbatches, colours virtual
    stages."""
    ticks = len(table.forward)
    drawn = figures.blank(min(2.0 + 0.22 * ticks, 40.0), 1.4 + 0.6 * table.stages)
    axes = drawn.subplots()
    for height, entries, hatch in ((0.0, table.forward, ""), (0.45, table.backward, "////")):
        for tick, stage in np.argwhere(entries[..., 0] >= 0):
            microbatch, virtual = entries[tick, stage]
            shade = SHADES[virtual % len(SHADES)]
            box = {"width": 1, "height": 0.45, "color": shade, "ec": "white", "hatch": hatch, "alpha": 0.75}
            axes.barh(stage + height, left=tick, align="edge", **box)
            place = tick + 0.5, stage + height + 0.225
            axes.annotate(str(microbatch), place, ha="center", va="center", fontsize=6)
    axes.set(xlim=(0, ticks), ylim=(table.stages, 0), xlabel="tick", ylabel="stage")
    axes.set_yticks(np.arange(table.stages) + 0.45, [str(stage) for stage in range(table.stages)])
    P, V, M = table.stages, table.virtual_stages, table.microbatches
    axes.set_title(f"{P} stages x {V} virtual, {M} microbatches: forward plain, backward hatched")
    return drawn


def _messages(chunks):
    title = f"{chunks.sublayers} sublayers, AttnRes blocks of {chunks.block_size}, in {chunks.count} chunks"
    rich = Table("chunk", "stage", "sublayers", "receives blocks", "early", "fresh", "naive", title=title)
    for c in range(chunks.count):
        span = f"{chunks.bounds[c] + 1}..{chunks.bounds[c + 1]}"
        if not c:
            rich.add_row("0", "0", span, "", "", "", "")
            continue
        hop = chunks.hops[c - 1]
        early = hop.fresh - hop.first
        numbers = f"{hop.first}..{hop.last}", str(early), str(hop.blocks - early), str(chunks.begun[c])
        rich.add_row(str(c), str(c % chunks.stages), span, *numbers)
    return rich


def _costs(chunks, table):
    found = sent(chunks)
    rich = Table("", "", title="A unit is one activation [B,T,D] of a microbatch", show_header=False)
    rows = {
        "units a microbatch sends, one way: the whole history at every hop": found.naive,
        "the paper's formula for cached stages, made for whole blocks a chunk": found.cached,
        "needed, and sent": found.needed,
        "longest hop, whole history": chunks.begun[chunks.count - 1],
        "longest hop, needed": found.longest,
        "of it before the sender's chunk is done": chunks.conveyor,
        "ticks": len(table.forward),
        "idle over busy time": f"{table.bubble():.3f}",
        "chunks in flight on a stage, at most": table.peak_chunks,
        "microbatches whose blocks a stage holds, at most": table.slots,
    }
    for name, value in rows.items():
        rich.add_row(name, value if isinstance(value, str) else f"{value:g}")
    return rich
