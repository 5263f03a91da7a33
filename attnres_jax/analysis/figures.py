"""Figures: one function each, which returns a `Figure` (no pyplot: nothing global or to close).

How a scheme is drawn, `looks` says.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import FuncNorm, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from attnres_jax.analysis.looks import colour, styles
from attnres_jax.schedule import BlockSchedule

FEW = 6
"""Schemes whose seeds are drawn one by one, and named inside the first panel."""
BEYOND = 1.005
"""Weights that the scale of matrices does not reach: one, and what rounding adds to it."""
MATRICES = 4
"""Beside each other, in a row."""
READS = {"a": "Pre-attention reads", "m": "Pre-MLP reads"}
AGREES, CONTRARY, UNRESOLVED = "as in the paper", "contrary to the paper", "not resolved"
FATES = {AGREES: "#0072B2", CONTRARY: "#D55E00", UNRESOLVED: "#e3e3e3"}
"""What became of a pair of the paper's order."""
WEIGHT_NORM = PowerNorm(0.5, 0, 1)
"""Weights on one scale in every figure; the square root keeps 1/L visible beside 1."""


TICKS = (0, 0.02, 0.1, 0.25, 0.5, 0.75, 1)


class Series(NamedTuple):
    """One run's line. Lines with the same label (seeds of a scheme) share their look."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG, sharp at the width of a README."""
    figure.savefig(path, dpi=150)
    return path


def loss_curves(train: Sequence[Series], heldout: Sequence[Series]) -> Figure:
    """Bits per byte against the step: the whole run, and its second half close up."""
    figure = blank(10.0, 4.0)
    whole, end = figure.subplots(1, 2)
    last = max(max(line.x) for line in train)
    for axes in (whole, end):
        _lines(axes, train, linewidth=1.6, markersize=3, markevery=0.1)
        _dots(axes, heldout)
        axes.set(xlabel="step (optimizer updates)", ylabel="bits / byte")
    whole.set_title("Training (lines), held-out (large marks)")
    end.set_title("The second half")
    points = [point for line in (*train, *heldout) for point in zip(line.x, line.y, strict=True)]
    late = [y for x, y in points if x >= last / 2]
    margin = 0.05 * (max(late) - min(late)) or 0.05
    end.set(xlim=(0.49 * last, 1.01 * last), ylim=(min(late) - margin, max(late) + margin))
    _legend(figure)
    return figure


def _legend(figure):
    """In the first panel; where it would hide what is drawn there, beside all of them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > FEW:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, handlelength=3)
    else:
        figure.axes[0].legend(frameon=False)


def depth_dynamics(output_rms: Sequence[Series], gradient_norm: Sequence[Series]) -> Figure:
    """Output RMS and gradient norm of every sublayer."""
    figure = blank(10.0, 4.0)
    left, right = figure.subplots(1, 2)
    for axes, lines in ((left, output_rms), (right, gradient_norm)):
        last = max(max(line.x) for line in lines)
        _lines(axes, lines, linewidth=1.6, markersize=3, markevery=1 if last <= 24 else 0.05)
        axes.set(xlabel="sublayer", yscale="log", xlim=(0.5, last + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        _plain_log_ticks(axes.yaxis)
    left.set(title="Output of each sublayer", ylabel="RMS over tokens and channels")
    right.set(title="Parameter gradient of each sublayer", ylabel="L2 norm (nats / token)")
    _legend(figure)
    return figure


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
        _image(axes, table[reads], norm=norm, colours=colours)
        _ticks(axes.yaxis, names)
        _ticks(axes.xaxis, columns)
        axes.set_title(READS.get(letter, f"Reads before kind {letter!r}"))
        axes.set_xlabel(_source_axis(schedule))
    panels[0].set_ylabel("sublayer that reads (out: the output read)")
    _colourbar(figure, panels, "mean weight", _tick_values(norm))
    figure.suptitle(title)
    return figure


def depth_matrices(matrices: Mapping[str, Float[Any, "reads outputs"]], token: str) -> Figure:
    """M of one token, side by side: the weight of every output v_i in every read h_l.

    All on one colour scale up to one, from zero or, where an entry is negative, from minus one. A title says
    how far its panel's entries go beyond.
    """
    columns = min(len(matrices), MATRICES)
    rows = -(-len(matrices) // columns)
    figure = blank(max(5.0, 3.7 * columns + 0.7), 0.6 + 3.8 * rows, "compressed")
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    below = [matrix[np.tri(len(matrix), dtype=bool)] for matrix in matrices.values()]
    norm, colours = _matrix_colours(np.clip(np.concatenate(below), -1, 1))
    for (label, matrix), axes in zip(matrices.items(), panels, strict=False):
        reads = len(matrix)
        past = np.tri(reads, dtype=bool)
        _image(axes, np.where(past, matrix, np.nan), "equal", norm, colours)
        _ticks(axes.xaxis, ["emb", *map(str, range(1, reads))])
        _ticks(axes.yaxis, [*map(str, range(1, reads)), "out"])
        axes.set(xlabel="output of sublayer (emb: embedding)")
        largest = float(np.max(np.abs(matrix[past])))
        beyond = f", |M| up to {largest:.3g}" if largest > BEYOND else ""
        axes.set_title(label + beyond, color=colour(label))
    for axes in panels[::columns]:
        axes.set_ylabel("sublayer that reads (out: output read)")
    for axes in panels[len(matrices) :]:
        axes.remove()
    extend = "neither"
    if np.max(np.abs(np.concatenate(below))) > BEYOND:
        extend = "both" if norm.vmin else "max"
    _colourbar(figure, panels[: len(matrices)], "weight", _tick_values(norm), extend)
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
    shares = bool(np.all((entries >= -1e-6) & (entries <= 1 + 1e-6)))
    return (WEIGHT_NORM, "viridis") if shares else _matrix_colours(entries)


def _matrix_colours(entries):
    """The scale of `WEIGHT_NORM` as far as the entries go; with negative ones two colours, zero white."""
    limit = max(1.0, float(np.max(np.abs(entries))))
    if np.min(entries) >= -1e-6 * limit:
        return PowerNorm(0.5, 0, limit), "viridis"
    both = FuncNorm((lambda w: np.sign(w) * np.sqrt(np.abs(w)), lambda w: np.sign(w) * w**2), -limit, limit)
    return both, "PuOr_r"


class Panel(NamedTuple):
    """What is drawn against the sublayer: lines from 1 to L, and what their heights are."""

    title: str
    unit: str
    lines: Sequence[Series]
    log: bool = True


def by_depth(panels: Sequence[Panel], blocks: int = 0) -> Figure:
    """Panels beside each other; a dotted line after each `blocks` sublayers, where AttnRes blocks end."""
    figure = blank(4.6 * len(panels), 4.0)
    for panel, axes in zip(panels, np.atleast_1d(figure.subplots(1, len(panels))), strict=True):
        last = max(max(line.x) for line in panel.lines)
        for end in np.arange(blocks, last, blocks) if blocks else ():
            axes.axvline(end + 0.5, color="#b0b0b0", linestyle=":", linewidth=0.8)
        _lines(axes, panel.lines, linewidth=1.6, markersize=2.5)
        axes.set(xlabel="sublayer", xlim=(0.5, last + 0.5), title=panel.title, ylabel=panel.unit)
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        if panel.log:
            axes.set_yscale("log", nonpositive="mask")
            _plain_log_ticks(axes.yaxis)
    _legend(figure)
    return figure


class Gain(NamedTuple):
    """A row of `differences`: to the plain residual, ours by seed, and the paper's."""

    label: str
    seeds: Sequence[float]
    half: float
    paper: float


def differences(gains: Sequence[Gain], unit: str, paper: str) -> Figure:
    """Dots for seeds, their mean with its interval, and beside them the same difference in the paper."""
    figure = blank(9.5, 0.9 + 0.36 * len(gains))
    ours, theirs = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for at, gain in enumerate(gains):
        paint = colour(gain.label)
        mean = float(np.mean(gain.seeds))
        ours.errorbar(mean, at, xerr=gain.half, fmt="D", color=paint, markersize=5, capsize=3, linewidth=1.4)
        ours.plot(gain.seeds, [at + 0.22] * len(gain.seeds), "o", color=paint, markersize=3, alpha=0.55)
        theirs.plot(gain.paper, at, "s", color=paint, markersize=6)
    ours.set_yticks(range(len(gains)), [gain.label for gain in gains])
    ours.set(xlabel=unit, title="Here: mean and interval (diamonds), seeds (dots)")
    theirs.set(xlabel=paper, title="Paper, Table 4")
    ours.invert_yaxis()
    for axes in (ours, theirs):
        axes.axvline(0, color="#000000", linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _clean(axes)
    return figure


def orders(labels: Sequence[str], ours: Float[Any, "n n"], fates: Mapping[tuple[int, int], str]) -> Figure:
    """Every pair below the diagonal: the row's loss minus the column's in thousandths, in the colour of its
    fate in `FATES`."""
    count = len(labels)
    figure = blank(2.6 + 0.56 * count, 2.0 + 0.46 * count)
    axes = figure.subplots()
    for (row, column), fate in fates.items():
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=FATES[fate], linewidth=0))
        ink = "#333333" if fate == UNRESOLVED else "white"
        text = f"{1000 * ours[row, column]:+.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    axes.set(xlim=(-0.5, count - 1.5), ylim=(count - 0.5, 0.5), aspect="auto")
    axes.set_xticks(range(count - 1), labels[:-1], rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(1, count), labels[1:])
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=shade, label=fate) for fate, shade in FATES.items()]
    axes.legend(handles=handles, frameon=False, loc="upper right")
    return figure


def scaling_laws(points: Sequence[Series], lines: Sequence[Series], definition: str, unit: str) -> Figure:
    """Loss against compute on logarithmic axes; a line's label is its scheme's, then its formula."""
    figure = blank(7.0, 5.0)
    axes = figure.subplots()
    _lines(axes, lines, linewidth=1.6, markevery=0.5, markersize=0)
    _dots(axes, points)
    axes.set(xscale="log", yscale="log", xlabel=f"compute C ({unit})", ylabel="held-out loss (nats / token)")
    axes.set_title(definition, fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        _plain_log_ticks(axis)
    axes.legend(frameon=False)
    return figure


def against_block_size(
    bits: Mapping[int, Sequence[float]], plain: Sequence[float], named: Mapping[int, str]
) -> Figure:
    """Held-out loss of every S by seed (dots), mean and standard deviation; `plain` as a line across."""
    figure = blank(6.5, 4.2)
    axes, sizes = figure.subplots(), list(bits)
    deviations = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in bits.values()]
    means = [np.mean(values) for values in bits.values()]
    look: dict[str, Any] = {"color": colour("block"), "marker": "o", "capsize": 3, "label": "block"}
    axes.errorbar(sizes, means, yerr=deviations, **look)
    for size, values in bits.items():
        axes.plot([1.08 * size] * len(values), values, ".", color=colour("block"), alpha=0.6)
    if plain:
        axes.axhline(float(np.mean(plain)), color=colour("plain"), linestyle="--", label="plain")
        if len(plain) > 1:
            low, high = (np.mean(plain) + sign * np.std(plain, ddof=1) for sign in (-1, 1))
            axes.axhspan(float(low), float(high), color=colour("plain"), alpha=0.08, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size}\n{named.get(size, '')}".strip() for size in sizes])
    axes.set(xlabel="block size S (sublayers)", ylabel="held-out loss (bits / byte)")
    axes.set_title("Mean and standard deviation; seeds (small dots)", fontsize="medium")
    axes.legend(frameon=False)
    _clean(axes)
    return figure


def depth_width(
    tables: Mapping[str, Float[Any, "ratios heads"]], ratios: Sequence[int | float], heads: Sequence[float]
) -> Figure:
    """Held-out loss of every shape, a panel for each scheme, on one scale; the best is framed."""
    figure = blank(max(5.0, 4.2 * len(tables) + 0.8), 4.2)
    panels = np.atleast_1d(figure.subplots(1, len(tables)))
    entries = np.concatenate([table.ravel() for table in tables.values()])
    norm = Normalize(float(np.nanmin(entries)), float(np.nanmax(entries)))
    for (name, table), axes in zip(tables.items(), panels, strict=True):
        _image(axes, table, norm=norm)
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
    _colourbar(figure, panels, "held-out loss (bits / byte), best framed", None)
    return figure


def blank(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> Figure:
    """An empty figure, in inches."""
    figure = Figure((width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _lines(axes: Axes, lines, **look):
    """A line for each label: the mean over its seeds, at the x that all of them have.

    Of at most `FEW` labels the seeds, if several, are drawn too, faint. `look` is that of the means alone.
    """
    looks = styles([line.label for line in lines])
    for label, (paint, dash, marker) in looks.items():
        style: dict[str, Any] = {"color": paint, "linestyle": dash}
        seeds = [line for line in lines if line.label == label]
        for seed in seeds if len(seeds) > 1 and len(looks) <= FEW else ():
            axes.plot(seed.x, seed.y, **style, alpha=0.25, linewidth=0.8)
        axes.plot(*_mean(seeds), **style, marker=marker, label=label, **look)
    _clean(axes)


def _dots(axes: Axes, lines):
    looks = styles([line.label for line in lines])
    for line in lines:
        paint, _, marker = looks[line.label]
        edge: dict[str, Any] = {"markersize": 6, "markeredgecolor": "white"}
        axes.plot(line.x, line.y, color=paint, linestyle="none", marker=marker, **edge)


def _mean(seeds):
    """Mean over seeds at the x that all of them have."""
    values = [dict(zip(map(float, seed.x), seed.y, strict=True)) for seed in seeds]
    x = sorted(set.intersection(*map(set, values)))
    return x, [float(np.mean([value[at] for value in values])) for at in x]


def _clean(axes):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_log_ticks(axis):
    """Numbers rather than powers of ten: 1, 2, 5 of each decade, of less than one more, of many the decades
    alone, or every second, third ...: `LogLocator` that must leave some out has no tick between them."""
    low, high = axis.get_view_interval()
    if high / low < 2:
        axis.set_major_locator(MaxNLocator(6))
        axis.set_minor_locator(NullLocator())
    else:
        subs = (1,) if high / low > 1e3 else (1, 2, 5) if high / low > 6 else range(1, 10)
        axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.set_minor_formatter(NullFormatter())


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


def _image(axes, values, aspect="auto", norm: Normalize = WEIGHT_NORM, colours="viridis"):
    axes.set_facecolor("#d9d9d9")
    axes.imshow(values, colours, norm, aspect=aspect, interpolation="nearest")


def _ticks(axis, names, most=11):
    """Name every row or column, or every second, third ...; the last always, none too near it."""
    last, every = len(names) - 1, -(-len(names) // most)
    shown = [*range(0, last - every + 1, every), last]
    axis.set_ticks(shown, [names[at] for at in shown])


def _colourbar(figure, panels, label, ticks=TICKS, extend="neither"):
    look = {"ticks": ticks, "extend": extend, "format": "%g", "pad": 0.02}
    figure.colorbar(panels[0].images[0], ax=list(panels), label=label, **look)
