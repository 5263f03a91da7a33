"""Images of numbers over depth: weights of reads, matrices M, losses of shapes; a `Figure` each."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, Normalize, PowerNorm
from matplotlib.patches import Rectangle

from attnres_jax.analysis.figures import Figure, blank
from attnres_jax.analysis.looks import colour
from attnres_jax.schedule import BlockSchedule

BEYOND = 1.005
"""Weights that the scale of matrices does not reach: one, and what rounding adds to it."""
MATRICES = 4
"""Beside each other, in a row."""
READS = {"a": "Pre-attention reads", "m": "Pre-MLP reads"}
TICKS = (0, 0.02, 0.1, 0.25, 0.5, 0.75, 1)


def weight_heatmap(
    weights: Float[Any, "reads R"], kinds: str, schedule: BlockSchedule, title: str = ""
) -> Figure:
    """Mean weight of every source in every read, one panel for each kind of sublayer.

    The output read stands below the reads of the first kind, whose place in depth it takes.
    """
    table, columns = _by_source(np.asarray(weights), schedule)
    norm, colours = _weight_colours(table[np.isfinite(table)])
    letters = list(dict.fromkeys(kinds))
    figure = blank(max(5.0, 4.6 * len(letters)), 4.6)
    panels = np.atleast_1d(figure.subplots(1, len(letters)))
    for letter, axes in zip(letters, panels, strict=True):
        reads = [at for at, kind in enumerate(kinds) if kind == letter]
        names = [str(at + 1) for at in reads]
        if letter == letters[0]:
            reads, names = [*reads, len(kinds)], [*names, "out"]
        _image(axes, table[reads], norm, colours)
        _ticks(axes.yaxis, names)
        _ticks(axes.xaxis, columns)
        axes.set_title(READS.get(letter, f"Reads before kind {letter!r}"))
        axes.set_xlabel(_source_axis(schedule))
    panels[0].set_ylabel("sublayer that reads (out: the output read)")
    _colourbar(figure, panels, "mean weight", norm, colours, _tick_values(norm))
    figure.suptitle(title)
    return figure


def depth_matrices(matrices: Mapping[str, Float[Any, "reads outputs"]], token: str) -> Figure:
    """M of one token, side by side: the weight of every output v_i in every read h_l.

    On one colour scale up to one, from zero or, where an entry of one is negative, from minus one. A panel
    whose entries go beyond has that scale times the largest of them, as its title says.
    """
    columns = min(len(matrices), MATRICES)
    rows = -(-len(matrices) // columns)
    figure = blank(max(5.0, 3.7 * columns + 0.7), 0.6 + 3.8 * rows, "compressed")
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    past = {label: np.tri(len(matrix), dtype=bool) for label, matrix in matrices.items()}
    entries = np.concatenate([matrix[past[label]] for label, matrix in matrices.items()])
    signed = bool(np.any(entries < -1e-6))
    for (label, matrix), axes in zip(matrices.items(), panels, strict=False):
        reads = len(matrix)
        largest = float(np.nanmax(np.abs(matrix[past[label]])))
        norm, colours = _scale(largest if largest > BEYOND else 1.0, signed)
        _image(axes, np.where(past[label], matrix, np.nan), norm, colours, "equal")
        _ticks(axes.xaxis, ["emb", *map(str, range(1, reads))])
        _ticks(axes.yaxis, [*map(str, range(1, reads)), "out"])
        axes.set(xlabel="output of sublayer (emb: embedding)")
        axes.set_title(label + (f", scale x {largest:.3g}" if largest > BEYOND else ""), color=colour(label))
    for axes in panels[::columns]:
        axes.set_ylabel("sublayer that reads (out: output read)")
    for axes in panels[len(matrices) :]:
        axes.remove()
    norm, colours = _scale(1.0, signed)
    scaled = np.nanmax(np.abs(entries)) > BEYOND
    unit = "weight, over its panel's scale where it has one" if scaled else "weight"
    _colourbar(figure, panels[: len(matrices)], unit, norm, colours, _tick_values(norm))
    figure.suptitle(f"Depth mixing matrix M, {token}", fontsize="medium")
    return figure


def _tick_values(norm):
    """TICKS as far as the scale goes, both ways if it does."""
    low, high = norm.vmin or 0.0, norm.vmax or 1.0
    ticks = TICKS if high == 1 else [float(f"{tick * high:.2g}") for tick in TICKS]
    return sorted({sign * tick for sign in (1, -1) for tick in ticks if low <= sign * tick <= high})


def _weight_colours(entries):
    """The one scale of weights that are shares, or of none (all NaN); another where some are not, as
    DenseFormer's."""
    if np.all((entries >= -1e-6) & (entries <= 1 + 1e-6)):
        return _scale(1.0, signed=False)
    limit = max(1.0, float(np.max(np.abs(entries))))
    return _scale(limit, bool(np.min(entries) < -1e-6 * limit))


def _scale(limit, signed):
    """Norm and colours up to `limit`; with negative weights two colours, zero white. The square root keeps
    1/L visible beside 1."""
    if not signed:
        return PowerNorm(0.5, 0, limit), "viridis"
    both = FuncNorm((lambda w: np.sign(w) * np.sqrt(np.abs(w)), lambda w: np.sign(w) * w**2), -limit, limit)
    return both, "PuOr_r"


def depth_width(
    tables: Mapping[str, Float[Any, "ratios heads"]], ratios: Sequence[int | float], heads: Sequence[float]
) -> Figure:
    """Held-out loss of every shape, a panel for each scheme, on one scale; the best is framed."""
    figure = blank(max(5.0, 4.2 * len(tables) + 0.8), 4.2)
    panels = np.atleast_1d(figure.subplots(1, len(tables)))
    entries = np.concatenate([table.ravel() for table in tables.values()])
    norm = Normalize(float(np.nanmin(entries)), float(np.nanmax(entries)))
    for (name, table), axes in zip(tables.items(), panels, strict=True):
        _image(axes, table, norm)
        best = np.nanargmin(table)
        for at, loss in np.ndenumerate(table):
            ink = "black" if norm(loss) > 0.6 else "white"
            axes.text(
                at[1], at[0], f"{loss:.3f}" if np.isfinite(loss) else "", ha="center", va="center", color=ink
            )
        row, column = np.unravel_index(best, table.shape)
        frame: dict[str, Any] = {"fill": False, "edgecolor": "#D55E00", "linewidth": 3}
        axes.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, **frame))
        axes.set_xticks(range(len(heads)), [f"{head:g}" for head in heads])
        axes.set_yticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
        axes.set_xlabel("H / L_b (heads per transformer block)")
        axes.set_title(name, color=colour(name))
    panels[0].set_ylabel("D / L_b (channels per transformer block)")
    _colourbar(figure, panels, "held-out loss (bits / byte), best framed", norm)
    return figure


def _by_source(weights, schedule: BlockSchedule):
    """[L+1, sources], one column a block, the running sum last; NaN: not a source of that read."""
    blocks, size = len(schedule.sizes), schedule.block_size
    table = np.full((schedule.sublayers + 1, blocks + 2), np.nan)
    for read, count in enumerate(schedule.counts):
        completed = blocks if read == schedule.sublayers else read // size
        table[read, : completed + 1] = weights[read, : completed + 1]
        if count > completed + 1:
            table[read, -1] = weights[read, completed + 1]
    names = ["emb", *map(str, range(1, blocks + 1))]
    return (table[:, :-1], names) if size == 1 else (table, [*names, "sum"])


def _source_axis(schedule):
    if schedule.block_size == 1:
        return "source: embedding, sublayer"
    return "source: embedding, block, running sum"


def _image(axes, values, norm: Normalize, colours="viridis", aspect="auto"):
    axes.set_facecolor("#d9d9d9")
    axes.imshow(values, colours, norm, aspect=aspect, interpolation="nearest")


def _ticks(axis, names, most=11):
    """Name every row or column, or every second, third ...; the last always, none too near it."""
    last, every = len(names) - 1, -(-len(names) // most)
    shown = [*range(0, last - every + 1, every), last]
    axis.set_ticks(shown, [names[at] for at in shown])


def _colourbar(figure, panels, label, norm, colours="viridis", ticks=None):
    look = {"ticks": ticks, "format": "%g", "pad": 0.02}
    figure.colorbar(ScalarMappable(norm, colours), ax=list(panels), label=label, **look)
