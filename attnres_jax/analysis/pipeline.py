"""The pipeline's timetable for people: what each hop carries, what it costs, who runs what when."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table

from attnres_jax.analysis import figures
from attnres_jax.parallel.chunk import Chunked
from attnres_jax.parallel.timetable import Timetable, sent, text

SHADES = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#F0E442", "#999999")
"""Of virtual stages, Okabe and Ito's."""


def report(chunked: Chunked, table: Timetable, width: int, out: Path | None = None) -> None:
    """Print chunks and their messages, costs, and the timetable; draw it at `out`.

    `width` is the model's D.
    """
    console, count = Console(), activations(chunked, width)
    console.print(_messages(chunked, count))
    console.print(_costs(chunked, table, count))
    print(f"Tick, then what each stage runs in it: F(orward) or B(ackward), microbatch, chunk\n{text(table)}")
    if out:
        print(f"wrote {figures.save(figure(table), out)}")


def activations(chunked: Chunked, width: int) -> int:
    """Activations [B,T,D] in a unit (`parallel/chunk.py`): one, the m streams of mHC, or another."""
    unit = jax.eval_shape(chunked.first, jax.ShapeDtypeStruct((1, 1, width), jnp.float32))
    return sum(leaf.size for leaf in jax.tree.leaves(unit)) // width


def figure(table: Timetable) -> Figure:
    """A row a stage, a column a tick: forward above backward, numbers are microbatches, colours virtual
    stages: with the row, that is the chunk."""
    ticks = len(table.forward)
    drawn = figures.blank(min(2.0 + 0.22 * ticks, 40.0), 1.4 + 0.6 * table.stages)
    axes = drawn.subplots()
    for height, entries, hatch in ((0.0, table.forward, ""), (0.45, table.backward, "////")):
        for tick, stage in np.argwhere(entries[..., 0] >= 0):
            microbatch, virtual = entries[tick, stage]
            box = {"width": 1, "height": 0.45, "ec": "white", "hatch": hatch, **_look(virtual)}
            axes.barh(stage + height, left=tick, align="edge", **box)
            place = tick + 0.5, stage + height + 0.225
            axes.annotate(str(microbatch), place, ha="center", va="center", fontsize=6)
    axes.set(xlim=(0, ticks), ylim=(table.stages, 0), xlabel="tick", ylabel="stage")
    axes.set_yticks(np.arange(table.stages) + 0.45, [str(stage) for stage in range(table.stages)])
    P, V, M = table.stages, table.virtual_stages, table.microbatches
    axes.set_title(f"{P} stages x {V} virtual, {M} microbatches: forward plain, backward hatched")
    chunks = [Patch(**_look(v), label=f"chunks {v * P} to {v * P + P - 1}") for v in range(V)]
    axes.legend(handles=chunks, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return drawn


def _look(virtual):
    return {"facecolor": SHADES[virtual % len(SHADES)], "alpha": 0.75}


def _messages(chunked, activations):
    chunks, apart = chunked.chunks, chunked.apart
    history = f"AttnRes blocks of {chunks.block_size}" if apart else "one history"
    headers = ("receives blocks", "early", "fresh", "naive") if apart else ("receives", "activations")
    title = f"{chunks.sublayers} sublayers, {history}, in {chunks.count} chunks"
    rich = Table("chunk", "stage", "sublayers", *headers, title=title)
    for c in range(chunks.count):
        span = f"{chunks.bounds[c] + 1}..{chunks.bounds[c + 1]}"
        numbers = [""] * len(headers)
        if c and apart:
            hop = chunks.hops[c - 1]
            early = hop.fresh - hop.first
            numbers = f"{hop.first}..{hop.last}", str(early), str(hop.blocks - early), str(chunks.begun[c])
        elif c:
            numbers = "the history", str(activations)
        rich.add_row(str(c), str(c % chunks.stages), span, *numbers)
    return rich


def _costs(chunked, table, activations):
    chunks, cache = chunked.chunks, chunked.cache
    found = sent(chunks)  # where the history is one unit, that is its only block
    blocks = {
        "units a microbatch sends, one way: the whole history at every hop": found.naive,
        "the paper's formula for cached stages, made for whole blocks a chunk": found.cached,
        "needed": found.needed,
        "longest hop, whole history": chunks.begun[chunks.count - 1],
        "longest hop, needed": found.longest,
        "of it before the sender's chunk is done": chunks.conveyor,
    }
    rows = blocks if chunked.apart else {"units a microbatch sends, one way": found.needed}
    rows |= {
        "activations [B,T,D] in a unit": activations,
        "units a stage sends in a tick, all as long: forward": cache.conveyor + cache.written,
        "backward": cache.window,
        "ticks": len(table.forward),
        "idle over busy time": f"{table.bubble():.3f}",
        "chunks in flight on a stage, at most": table.peak_chunks,
        "microbatches whose units a stage holds, at most": table.slots,
    }
    unit = "a block" if chunked.apart else "the history"
    rich = Table("", "", title=f"A unit is {unit} of a microbatch", show_header=False)
    for name, value in rows.items():
        rich.add_row(name, value if isinstance(value, str) else f"{value:g}")
    return rich
