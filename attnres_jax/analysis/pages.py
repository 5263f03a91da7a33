"""The pages of evidence: what the runs say of the paper's claims, a page for each.

A page has the numbers, a figure, what it shows and what it does not. Every number is computed from the runs;
what decides a word ("lower", "not resolved") is computed too. A row that was not run is left out.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from attnres_jax.analysis import compare, figures, heatmaps
from attnres_jax.analysis.compare import Run
from attnres_jax.analysis.evidence import (
    Dynamics,
    Look,
    Rows,
    Structure,
    dynamics,
    gradients,
    rows,
    structure,
)
from attnres_jax.analysis.figures import AGREES, CONTRARY, UNRESOLVED, Panel
from attnres_jax.analysis.made import Made
from attnres_jax.analysis.paper import TABLE4
from attnres_jax.analysis.statistics import LEVEL, difference

MAIN = ("plain", "block", "full", "mhc")
"""Schemes that all pages show, as far as they were run."""
CLAIMS = (("block", "plain"), ("full", "plain"), ("full", "block"), ("mhc", "plain"), ("full", "mhc"))
"""Pairs named in advance: in the paper the first's loss is the lower."""
RMS = "RMS over tokens and channels"


class Page(NamedTuple):
    """`answer` is one paragraph; `body` the table, figures and limits."""

    title: str
    answer: str
    body: Sequence[str]


def report(runs: Sequence[Run], looks: Mapping[str, Look], made: Made, out: Path) -> None:
    """Write the pages and their figures into `out`; `looks` by the name of the run, for those of `MAIN`."""
    out.mkdir(parents=True, exist_ok=True)
    table = rows(runs)
    pages = {
        "schemes": schemes(table, out),
        "dynamics": by_depth(table, looks, out),
        "ablations": ablations(table, out),
        "weights": weights(table, out),
        "skipping": skipping(table, looks, out),
    }
    head = _head(table, made)
    for name, page in pages.items():
        (out / f"{name}.md").write_text(
            "\n\n".join([f"# {page.title}", page.answer, *page.body, head]) + "\n"
        )
    answers = [f"- [{page.title}]({name}.md). {page.answer}" for name, page in pages.items()]
    parts = ["# Evidence at small scale", head, "\n".join(answers), LIMITS]
    (out / "README.md").write_text("\n\n".join(parts) + "\n")


LIMITS = """The losses of all rows, with caveats and speed: [comparison](comparison.md).

None of this shows anything at the paper's size, at convergence or on another text. One learning rate serves
all rows, at most tuned for the plain residual (the config and `configs/LOG.md` say what was tried), as the
paper tunes for its baseline."""


def _head(table, made):
    run, seeds = table.runs[0][0], [run.config["seed"] for run in table.runs[0]]
    c = run.config
    return (
        f"{made.line(len(table.names), seeds)}: {c['model.blocks']} transformer blocks ({len(run.kinds)} "
        f"sublayers) of width {c['model.width']}, {run.parameters:,} parameters (plain), {c['train.steps']} "
        f"updates of {c['data.batch']} x {c['data.length']} tokens of {c['data.corpus']}, learning rate "
        f"{c['optim.lr']:g} for all. The "
        "rows of a seed share initial weights where shapes agree, data and their order."
    )


def schemes(table: Rows, out: Path) -> Page:
    """Pairs named in advance."""
    pairs = [pair for pair in CLAIMS if set(pair) <= set(table.names)]
    seeds = table.bits.shape[1]
    order = _paper_order(table)
    gains = [_gain(table, at) for at in order if table.names[at] != "plain"]
    drawn = figures.differences(gains, "to plain (bits / byte)", "to its baseline (nats / token)")
    body = [
        markdown(
            ["pair", "paper", "by seed", "mean", "interval", "detectable", ""],
            [_claim(table, *pair) for pair in pairs],
        ),
        "Held-out bits per byte, the first minus the second; the paper's are nats per token (Table 4). "
        f"Intervals are at {LEVEL:.0%}, Student's t of the pair's {seeds} differences alone; the last "
        "column goes by them. Detectable: the true difference that so many seeds of that spread show with "
        "power 80 %.",
        f"Parameters: {_parameters(table)}.",
        _figure(drawn, out, "differences", "Differences to plain, beside the paper's"),
        _figure(compare.loss_curves(_main_runs(table)), out, "loss-main", "Loss"),
        "**Not shown**: whether a difference lasts to convergence or with a rate tuned for each scheme. "
        "Seeds vary initial weights and data order, not the text.",
    ]
    answer = "; ".join(_relation(table, *pair) for pair in pairs) + "."
    return Page("Does Block beat plain, does Full beat Block", answer, body)


def by_depth(table: Rows, looks: Mapping[str, Look], out: Path) -> Page:
    """The paper's Figure 5."""
    names = _main(table)
    panels = [
        Panel("Stream after each sublayer", RMS, table.lines(names, lambda r: looks[r.name].shares.stream)),
        Panel("Output of each sublayer", RMS, table.lines(names, lambda r: r.statistics.output_rms)),
        Panel("Gradient of each sublayer", "L2 norm (nats / token)", table.lines(names, gradients)),
    ]
    found = {name: [dynamics(run, looks[run.name]) for run in table.of(name)] for name in names}
    cells = [[table.label(name), *_columns(found[name])] for name in names]
    body = [
        _figure(figures.by_depth(panels, _block_size(table)), out, "dynamics", "Dynamics by depth"),
        markdown(["scheme", *_words(Dynamics)], cells),
        "Mean ± standard deviation over seeds; in the figure thick lines are means, faint ones seeds, and "
        "dotted lines ends of Block's blocks. The stream is what outputs are added to: the residual sum in "
        "plain, the running sum of its own block in Block, which starts anew with each, the output alone "
        "in Full; of mHC its four streams together. RMS on four held-out windows; gradients before "
        "clipping, mean of the batches logged in the second half of training. The paper's Figure 5: plain "
        "grows from 1 to 15 over 27 blocks, Block is bounded and periodic, and its gradients are more even "
        "over depth.",
        "**Not shown**: growth over more depth or longer training. Weight decay and rate move these curves "
        "too.",
    ]
    streams = [
        f"{table.label(name)}'s stream is {_mean(found[name], 0):.2f} after the first sublayer, "
        f"{_mean(found[name], 1):.2f} after the last, {_mean(found[name], 2):.2f} at its largest"
        f"{_rising(found[name], table)}"
        for name in names
    ]
    return Page("Outputs and gradients by depth", "; ".join(streams) + "." + _evenness(found), body)


def ablations(table: Rows, out: Path) -> Page:
    """The order of Table 4: all pairs of rows."""
    order = _paper_order(table)
    names, labels = ([which[at] for at in order] for which in (table.names, table.labels))
    ours, paper = table.bits.mean(1)[order], np.array([TABLE4[name] for name in names])
    pairs = [(i, j) for i, j in itertools.product(range(len(order)), repeat=2) if j < i]
    fates = {(i, j): table.fate(names[i], names[j]) for i, j in pairs}
    count = {each: list(fates.values()).count(each) for each in (AGREES, CONTRARY, UNRESOLVED)}
    tau: Any = stats.kendalltau(ours, paper)
    against = [f"{labels[j]} above {labels[i]}" for (i, j), each in fates.items() if each == CONTRARY]
    cells = [
        [table.labels[at], f"{TABLE4[table.names[at]]:.3f}", _spread(table.bits[at], 4), _gained(table, at)]
        for at in order
    ]
    answer = (
        f"Of {len(pairs)} pairs of {len(order)} rows {count[AGREES]} come out as in the paper, "
        f"{count[CONTRARY]} contrary to it, {count[UNRESOLVED]} are not resolved; Kendall's tau of the two "
        f"orders is {tau.statistic:.2f} (p = {tau.pvalue:.2g})."
    )
    body = [
        markdown(["row, in the paper's order", "paper, nats/token", "here, bits/byte", "to plain"], cells),
        _figure(
            figures.orders(labels, ours[:, None] - ours[None], fates), out, "orders", "All pairs of rows"
        ),
        f"A pair is resolved where zero lies outside the {LEVEL:.0%} interval of its own differences by "
        "seed (Student's t), each pair by itself: were there no differences at all, "
        f"{(1 - LEVEL) * len(pairs):.1f} of these pairs would still be expected to come out resolved. Rows "
        "and columns are in the paper's order, the best first; a number is the row's loss minus the "
        "column's in thousandths of a bit per byte, so a positive one is in the paper's order.",
        f"Contrary, in loss: {'; '.join(against) or 'none'}.",
        "**Not shown**: that an unresolved pair is equal. The paper has one run of each row, at 436M active "
        "parameters: its smallest differences (0.001) come without an interval.",
    ]
    return Page("The order of the ablations", answer, body)


def weights(table: Rows, out: Path) -> Page:
    """The paper's Figures 8 and 9."""
    weighed = [name for name in ("full", "block") if name in table.names]
    found = {name: [structure(run) for run in table.of(name)] for name in weighed}
    drawn = [
        _figure(
            compare.heatmap(table.label(name), table.of(name)), out, f"weights-{name}", f"Weights of {name}"
        )
        for name in weighed
    ]
    matrices = {table.label(name): table.of(name)[0].matrix for name in _main(table)}
    token = "last token of the first held-out window, first seed"
    cells = [[table.label(name), *_columns(found[name], 3)] for name in weighed]
    said = [
        f"{table.label(name)} gives its newest source {_mean(found[name], 0):.3f} "
        f"({_excess(found[name], 0, 3)} to an equal share), the embedding {_mean(found[name], 1):.3f} before "
        f"attention ({_excess(found[name], 1, 2)} to before MLP)"
        for name in weighed
    ]
    body = [
        markdown(["scheme", *_words(Structure)], cells),
        *drawn,
        _figure(heatmaps.depth_matrices(matrices, token), out, "matrices", "Depth mixing matrices"),
        "Means over tokens and reads, ± standard deviation over seeds, without the reads of the first two "
        "sublayers, which have one source or two. The newest source is the last output in Full, in Block "
        "the running sum, or the last block where a block begins. The paper's Figure 8: much weight on the "
        "predecessor, lasting weight on the embedding, more before attention than before MLP, a few long "
        f"skips. Behind ±: intervals of differences, paired by seed, at {LEVEL:.0%}.",
        "**Not shown**: the weights of a token, which means hide, or use: norms of sources differ.",
    ]
    return Page("Learned depth weights", "; ".join(said) + "." if said else "No such row was run.", body)


def skipping(table: Rows, looks: Mapping[str, Look], out: Path) -> Page:
    """The two curves that motivate the work."""
    names = _main(table)

    def rise(run):
        return looks[run.name].skipped[1:] - looks[run.name].skipped[0]

    def added(run):
        return looks[run.name].shares.added

    def read(run):
        return looks[run.name].shares.read

    panels = [
        Panel("Loss without the sublayer", "rise (nats / token)", table.lines(names, rise)),
        Panel("Share of the stream it is added to", "ratio of RMS", table.lines(names, added)),
        Panel("Share of the next read", "ratio of RMS", table.lines(names, read)),
    ]
    quarter = max(1, len(table.runs[0][0].kinds) // 4)
    cells = [
        [
            table.label(name),
            _spread([np.median(rise(run)) for run in table.of(name)], 3),
            _spread([rise(run)[:quarter].mean() for run in table.of(name)], 3),
            _spread([rise(run)[-quarter:].mean() for run in table.of(name)], 3),
            _spread([read(run)[:quarter].mean() for run in table.of(name)], 3),
            _spread([read(run)[-quarter:].mean() for run in table.of(name)], 3),
        ]
        for name in names
    ]
    header = ["scheme", "rise, median sublayer", "rise, first quarter", "last quarter"]
    body = [
        _figure(figures.by_depth(panels, _block_size(table)), out, "skipping", "Skipping and shares"),
        markdown([*header, "share of the next read, first quarter", "last quarter"], cells),
        "One sublayer's output is zero, all else stays as trained, on held-out text: nats per token, mean "
        "± standard deviation over seeds. A zero that is read keeps its weight. Share of the stream: RMS "
        "of the output over RMS of the sum that it is added to; Block has none where a block begins, Full "
        "has none at all. A loss that falls has no point in the figure. Share of the next read: RMS of "
        "M[l+1, l] v_l over RMS of h_{l+1}, before its norm.",
        "**Not shown**: what would be lost had the model been trained without the sublayer.",
    ]
    medians = {name: np.array([np.median(rise(run)) for run in table.of(name)]) for name in names}
    said = ", ".join(f"{table.label(name)} {values.mean():.3f}" for name, values in medians.items())
    answer = f"Without one sublayer the loss rises, in the median over sublayers, by {said} nats per token."
    if {"plain", "block"} <= set(names):
        change = difference((medians["block"] - medians["plain"]).tolist())
        answer += f" Block minus plain: {change.mean:+.3f} ± {change.half:.3f}, paired, {LEVEL:.0%}."
    return Page("What each sublayer's output counts for", answer, body)


def _main(table):
    return [name for name in MAIN if name in table.names]


def _parameters(table):
    counts = (f"{table.label(name)} {table.of(name)[0].parameters:,}" for name in _main(table))
    return ", ".join(counts)


def _main_runs(table):
    return [run for name in _main(table) for run in table.of(name)]


def _block_size(table):
    return table.of("block")[0].config["block_size"] if "block" in table.names else 0


def _paper_order(table):
    """Places of the rows, the paper's best first."""
    return sorted(range(len(table.names)), key=lambda at: TABLE4[table.names[at]])


def _gain(table, at):
    name = table.names[at]
    found, paper = table.difference(name, "plain"), TABLE4[name] - TABLE4["plain"]
    return figures.Gain(table.labels[at], table.paired(name, "plain").tolist(), found.half, paper)


def _gained(table, at):
    return "" if table.names[at] == "plain" else f"{table.paired(table.names[at], 'plain').mean():+.4f}"


def _claim(table, first, second):
    found = table.difference(first, second)
    return [
        f"{table.label(first)} - {table.label(second)}",
        f"{TABLE4[first] - TABLE4[second]:+.3f}",
        ", ".join(f"{value:+.4f}" for value in table.paired(first, second)),
        f"{found.mean:+.4f}",
        f"± {found.half:.4f}",
        f"{found.detectable:.4f}",
        table.fate(first, second),
    ]


def _relation(table, first, second):
    found, values = table.difference(first, second), table.paired(first, second)
    wins = f"lower in {np.sum(values < 0)} of {len(values)} seeds"
    one, other = table.label(first), table.label(second)
    if table.fate(first, second) == UNRESOLVED:
        return (
            f"{one} and {other} are not told apart ({found.mean:+.4f} ± {found.half:.4f} bits/byte, {wins})"
        )
    word = "below" if found.mean < 0 else "above"
    return f"{one} is {word} {other} by {abs(found.mean):.4f} ± {found.half:.4f} bits/byte ({wins})"


def _evenness(found):
    """How even gradients are with Block and with plain, paired by seed."""
    if not {"plain", "block"} <= set(found):
        return ""
    plain, block = (
        np.array([each.gradient_variation for each in found[name]]) for name in ("plain", "block")
    )
    change = difference((block - plain).tolist())
    word = "more even than" if change.mean < 0 else "less even than"
    if abs(change.mean) <= (change.half or math.inf):
        word = "not shown to be more or less even than"
    return (
        f" Block's gradients over depth are {word} plain's: coefficient of variation {block.mean():.2f} "
        f"against {plain.mean():.2f}, difference {change.mean:+.2f} ± {change.half:.2f}, paired."
    )


def _rising(found, table):
    last, rises = len(table.runs[0][0].kinds) - 1, [each.stream_rises for each in found]
    return " and rises after every sublayer" if min(rises) == last else ""


def _excess(found, first, second):
    """Of one number of each run over another: mean and interval."""
    of = difference([run[first] - run[second] for run in found])
    return f"{of.mean:+.3f}" + (f" ± {of.half:.3f}" if of.half is not None else "")


def _mean(found, at):
    return float(np.mean([each[at] for each in found]))


def _columns(found, digits=2):
    """A cell for each number of some named tuples, over seeds."""
    return [_spread(values, digits) for values in zip(*found, strict=True)]


def _spread(values, digits=2):
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def markdown(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A table: a header, and rows of as many words."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells))


def _words(fields):
    return [name.replace("_", " ") for name in fields._fields]


def _figure(figure, out, name, caption):
    return f"![{caption}]({figures.save(figure, out / f'{name}.png').name})"
