"""Figures: one function each, which returns a `Figure` (no pyplot: nothing global or to close).

How a scheme is drawn, `looks` says.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from attnres_jax.analysis.looks import Style, colour, scheme, styles

FEW = 6
"""Schemes whose seeds are drawn one by one, and named inside the first panel."""
MANY = 8
"""Those that a panel has room for; more are shared out among panels."""
ALIKE = 3
"""Lines of one colour that are told apart in a panel; more are shared out too."""
ACROSS = 3
"""Columns of panels at the width of a page."""
WIDE = 1e3
"""Times the least value: a logarithmic axis that goes so far has decades alone, and suits no other lines."""
FAINT = 0.4
"""How opaque the scheme is that all are compared with, where it is in several panels: black becomes grey."""
FAR = 4
"""Times the distance of the median from the least loss: what lies farther is not drawn close up."""
AGREES, CONTRARY, UNRESOLVED = "as in the paper", "contrary to the paper", "not resolved"
FATES = {AGREES: "#0072B2", CONTRARY: "#D55E00", UNRESOLVED: "#e3e3e3"}
"""What became of a pair of the paper's order."""


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
    """Bits per byte against the step: the whole run, and its second half close up.

    Where there are several columns, those schemes are left out of the close-up whose loss lies far above the
    others', and named there.
    """
    figure, columns, looks = _columns(train)
    last = max(max(line.x) for line in train)
    late = [(line.label, y) for line in (*train, *heldout) for y in _late(line, last)]
    losses = [y for _, y in late if math.isfinite(y)] or [0.0, 1.0]
    low, high = min(losses), max(losses)
    if len(columns) > 1:
        high = min(high, low + FAR * (float(np.median(losses)) - low))
    margin = 0.05 * (high - low) or 0.05
    _one_scale([whole for _, whole, _ in columns], train)
    for names, whole, end in columns:
        for axes in (whole, end):
            _lines(axes, _of(names, train), looks, linewidth=1.6, markersize=3, markevery=0.1)
            _dots(axes, _of(names, heldout), looks)
            axes.set(xlabel="step (optimizer updates)", ylabel="bits / byte")
        end.set(xlim=(0.49 * last, 1.01 * last), ylim=(low - margin, high + margin))
        ends = {name: [y for label, y in late if label == name] for name in names}
        # A run that ended before the second half is not above.
        far = [name for name, ys in ends.items() if ys and not any(y <= high for y in ys)]
        if far and len(columns) > 1:
            end.text(0.98, 0.97, f"above: {', '.join(far)}", transform=end.transAxes, ha="right", va="top")
    _title(columns, "Training (lines), held-out (large marks)", "The second half")
    _legend(figure, columns)
    return figure


def _late(line, last):
    return [y for x, y in zip(line.x, line.y, strict=True) if x >= last / 2]


def _columns(lines):
    """A figure of two kinds of panels, which labels go into which two of them, and the looks of all labels.

    The two lie side by side; or labels are shared out, each share beside the first label, to which the others
    are compared, in a column of its own. The figure's axes are all of one kind, then all of the other.
    """
    looks = styles([line.label for line in lines])
    first, *rest = looks
    shares = _shares(first, *rest)
    if len(shares) == 1:
        figure = blank(10.0, 4.0)
        return figure, [((first, *rest), *figure.subplots(1, 2))], looks
    deep = -(-len(shares) // ACROSS)
    across = -(-len(shares) // deep)
    figure = blank(0.8 + 4.2 * across, 8.6 * deep)
    grid, places = figure.add_gridspec(2 * deep, across), [divmod(at, across) for at in range(len(shares))]
    kinds = [[figure.add_subplot(grid[2 * row + kind, at]) for row, at in places] for kind in (0, 1)]
    return figure, [((first, *share), *pair) for share, *pair in zip(shares, *kinds, strict=True)], looks


def _shares(first, *rest):
    """Which labels go into a panel together, beside the first: all if few, else `FEW` at most in their order;
    where that puts more than `ALIKE` of one colour together, those of each such colour apart, the first's
    counted with it, so that the same sizes of two schemes come together in both."""
    shares = [rest] if len(rest) < MANY else _split(rest, FEW)
    if all(n <= ALIKE for share in shares for n in Counter(map(colour, share)).values()):
        return shares
    counts = Counter(map(colour, rest))
    many = [paint for paint, n in counts.items() if n > ALIKE]
    alike = [[label for label in (first, *rest) if colour(label) == paint] for paint in many]
    shares = [share for labels in alike for share in _split(labels, ALIKE)]
    shares += _split([label for label in rest if counts[colour(label)] <= ALIKE], FEW)
    return [[label for label in share if label != first] for share in shares]


def _split(labels, most):
    count = -(-len(labels) // most)
    return [[str(label) for label in share] for share in np.array_split(labels, count)] if count else []


def _one_scale(panels, lines):
    """Share the y axis, whether or not the lines are all in one panel; False where they go too far apart."""
    ys = [y for line in lines for y in line.y if y > 0 and math.isfinite(y)] or [1.0]
    if len(panels) > 1 and max(ys) > WIDE * min(ys):
        return False
    for axes in panels[1:]:
        axes.sharey(panels[0])
    return True


def _of(labels, lines):
    return [line for line in lines if line.label in labels]


def _title(columns, *kinds):
    """Above the panels of each kind: once, at the left, where they are a row; and of which scheme each is."""
    if len(columns) == 1:
        for axes, kind in zip(columns[0][1:], kinds, strict=True):
            axes.set_title(kind)
        return
    for (_, *rest), *pair in columns:
        of = {scheme(label) for label in rest}
        look: dict[str, Any] = {"loc": "left", "fontsize": "medium" if len(of) == 1 else "large"}
        for axes, kind in zip(pair, kinds, strict=True):
            said = [kind] if axes.get_subplotspec().is_first_col() else []
            axes.set_title(": ".join([*said, *of] if len(of) == 1 else said), **look)


def _legend(figure, columns=()):
    """In the first panel; where it would hide what is drawn there, beside all of them; below each column."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    look = {"frameon": False, "fontsize": 8, "handlelength": 3}
    if len(columns) > 1:
        for _, _, lower in columns:
            lower.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, **look)
    elif len(labels) > FEW:
        figure.legend(handles, labels, loc="outside right upper", **look)
    else:
        figure.axes[0].legend(frameon=False)


def depth_dynamics(output_rms: Sequence[Series], gradient_norm: Sequence[Series]) -> Figure:
    """Output RMS and gradient norm of every sublayer."""
    figure, columns, looks = _columns(output_rms)
    shares, *kinds = zip(*columns, strict=True)
    last = max(max(line.x) for line in output_rms)
    few = 1 if last <= 24 else 0.05
    marks = max(3, int(last) // 8 | 1) if len(columns) > 1 else few  # odd: attention and MLP in turn
    units = "RMS over tokens and channels", "L2 norm (nats / token)"
    for panels, lines, unit in zip(kinds, (output_rms, gradient_norm), units, strict=True):
        said = unit if _one_scale(panels, lines) else f"{unit}, own scale"
        for names, axes in zip(shares, panels, strict=True):
            _lines(axes, _of(names, lines), looks, linewidth=1.6, markersize=3, markevery=marks)
            axes.set(xlabel="sublayer", ylabel=said, yscale="log", xlim=(0.5, last + 0.5))
            axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        for axes in panels:
            _plain_log_ticks(axes.yaxis)
    _title(columns, "Output of each sublayer", "Parameter gradient of each sublayer")
    _legend(figure, columns)
    return figure


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
        _lines(axes, panel.lines, styles([line.label for line in panel.lines]), linewidth=1.6, markersize=2.5)
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
    _lines(axes, lines, styles([line.label for line in lines]), linewidth=1.6, markevery=0.5, markersize=0)
    _dots(axes, points, styles([line.label for line in points]))
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


def blank(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> Figure:
    """An empty figure, in inches."""
    figure = Figure((width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _lines(axes: Axes, lines, looks: Mapping[str, Style], **look):
    """A line for each label: the mean over its seeds, at the x that all of them have.

    `looks` are those of all labels of the figure: of at most `FEW` the seeds, if several, are drawn too,
    faint. `look` is that of the means alone.
    """
    for label in dict.fromkeys(line.label for line in lines):
        paint, dash, marker = looks[label]
        style: dict[str, Any] = {"color": paint, "linestyle": dash}
        seeds = [line for line in lines if line.label == label]
        for seed in seeds if len(seeds) > 1 and len(looks) <= FEW else ():
            axes.plot(seed.x, seed.y, **style, alpha=0.25, linewidth=0.8)
        alpha = _alpha(label, looks, lines)
        axes.plot(*_mean(seeds), **style, marker=marker, label=label, alpha=alpha, **look)
    _clean(axes)


def _dots(axes: Axes, lines, looks):
    for line in lines:
        paint, _, marker = looks[line.label]
        look: dict[str, Any] = {"color": paint, "linestyle": "none", "marker": marker, "markersize": 6}
        axes.plot(line.x, line.y, **look, markeredgecolor="white", alpha=_alpha(line.label, looks, lines))


def _alpha(label, looks, lines):
    """Of the first label, where the others are in several panels, it in all."""
    shared = len(looks) > len({line.label for line in lines})
    return FAINT if shared and label == next(iter(looks)) else 1.0


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
        subs = (1,) if high / low > WIDE else (1, 2, 5) if high / low > 6 else range(1, 10)
        axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.set_minor_formatter(NullFormatter())
