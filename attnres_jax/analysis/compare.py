"""Runs side by side: one table, a caveat for whatever is not like for like, and the figures.

Runs that differ only in the seed are one row: mean and sample standard deviation. Differences are
to the first row (the plain residual if it is there), paired by seed.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from attnres_jax import configs, residuals
from attnres_jax.analysis import figures, heatmaps
from attnres_jax.analysis.dynamics import DepthStatistics, weighs_outputs
from attnres_jax.analysis.figures import Series
from attnres_jax.analysis.made import Made
from attnres_jax.analysis.matrix import reach, row_sums
from attnres_jax.analysis.statistics import Difference, difference

BOOKKEEPING = (
    *(f"train.{key}_every" for key in ("log", "depth", "eval")),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.keep_every", "train.stop_after"),
    *(
        "mesh.stage",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "train.virtual_stages",
        "train.accumulation",
        "profile.first",
        "profile.last",
        "train.compile_cache",
    ),
)
"""Keys that change what is written down, never what is trained or measured."""


class NotComparable(ValueError):
    """Runs that make no table."""


class Run(NamedTuple):
    """A finished run: what its workdir holds, and what its model does on held-out tokens."""

    name: str
    config: dict[str, Any]
    """Flat: dotted key to value."""
    kinds: str
    parameters: int
    train: list[dict[str, Any]]
    depth: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    evaluation: dict[str, Any]
    statistics: DepthStatistics
    matrix: np.ndarray
    """M of the last token of the first held-out window, [L+1, L+1]."""


class Group(NamedTuple):
    """Runs that differ only in the seed, by seed."""

    label: str
    runs: dict[int, Run]

    @property
    def first(self) -> Run:
        """The run with the lowest seed."""
        return next(iter(self.runs.values()))


class Spread(NamedTuple):
    """Mean and sample standard deviation (None for one value) of n values."""

    mean: float
    deviation: float | None
    n: int


class Summary(NamedTuple):
    """A row of the table."""

    scheme: str
    seeds: tuple[int, ...]
    parameters: int
    steps: int
    tokens: int
    bits_per_byte: Spread
    difference: Difference | None
    """In bits per byte, to the first row, over common seeds; None for the first, or without any."""
    perplexity: Spread
    train_loss: Spread
    """Nats per token, mean of the last tenth of the logged steps."""
    tokens_per_s: Spread
    """Median over the logged steps."""
    minutes: Spread


def scheme(config: dict[str, Any]) -> residuals.Scheme:
    """The residual scheme of a flat config."""
    return configs.model_config(configs.from_flat(config), vocab=1).scheme


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs by everything but the seed, the plain residual first, else in the order given."""
    found: dict[tuple, dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: run.config["residual"] != "plain"):
        seeds = found.setdefault(tuple(sorted(_identity(run).items())), {})
        seed = run.config["seed"]
        if seed in seeds:
            names = f"{seeds[seed].name} and {run.name}"
            raise NotComparable(f"{names} have the same config and seed {seed}: leave one out")
        seeds[seed] = run
    members = [dict(sorted(seeds.items())) for seeds in found.values()]
    return [Group(label, runs) for label, runs in zip(_labels(members), members, strict=True)]


def pair(config: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What two runs have in common that are a pair: everything but the scheme, the seed included.

    Same seed, batch, length and text: same data in the same order.
    """
    return tuple(item for item in config.items() if item[0] not in {*configs.SCHEME_KEYS, *BOOKKEEPING})


def scheme_labels(flat: Sequence[dict[str, Any]]) -> list[str]:
    """A name for the scheme of each flat config, over all sizes: with the keys it reads where a pair of runs
    has the scheme's name twice, as Block with S = 2 and 4; else S may differ between sizes."""
    names = [config["residual"] for config in flat]
    twice = [names[at] for at in range(len(flat)) if _twin(flat, at)]
    return [_switches(c) if name in twice else name for name, c in zip(names, flat, strict=True)]


def _twin(flat, at):
    same = [other for other in flat if pair(other) == pair(flat[at])]
    return len({_switches(other) for other in same if other["residual"] == flat[at]["residual"]}) > 1


def _switches(config):
    """`block block_size=4, key_norm_eps=1e-06`: the name, and all that the scheme reads."""
    read = residuals.SCHEMES[config["residual"]].reads
    keys = [key for key, option in configs.SCHEME_KEYS.items() if option in read]
    return " ".join([config["residual"], ", ".join(f"{key}={config[key]}" for key in keys)]).strip()


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """The rows of the table."""
    rows = groups(runs)
    return [_summary(group, None if group is rows[0] else rows[0]) for group in rows]


def caveats(runs: Sequence[Run]) -> list[str]:
    """Why the comparison is not like for like, one line each; empty when it is."""
    flat = [run.config for run in runs]
    free = {*configs.SCHEME_KEYS, *BOOKKEEPING, "seed"}
    differing = [key for key in sorted(set().union(*flat) - free) if _different(flat, key)]
    lines = [f"runs differ in {key}: {_values(flat, key)}" for key in differing]
    for key in ("step", "tokens"):
        if _different([run.evaluation for run in runs], key):
            values = _values([run.evaluation for run in runs], key)
            lines.append(f"runs were evaluated with different {key}: {values}")
    seeds = {group.label: tuple(group.runs) for group in groups(runs)}
    if len(set(seeds.values())) > 1:
        spelled = "; ".join(f"{label}: {', '.join(map(str, s))}" for label, s in seeds.items())
        lines.append(f"runs differ in the set of seeds ({spelled}); differences use common seeds")
    return lines


def table(runs: Sequence[Run]) -> tuple[Table, str]:
    """The comparison for the terminal, a column for each scheme, and as markdown, a row for each."""
    header, rows = _cells(summaries(runs))
    rich = Table()
    for name, *cells in zip(header, *rows, strict=True):
        if not rich.columns:
            rich.add_column(name)
            for cell in cells:
                rich.add_column(cell, justify="right")
        else:
            rich.add_row(name, *cells)
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [header, rule, *rows]
    return rich, "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def reach_table(runs: Sequence[Run]) -> tuple[Table, str]:
    """Where reads look, by M of one token, mean over seeds: for the terminal, and as markdown."""
    header = ["scheme", "entropy, nats", "effective depth", "look-back, sublayers", "largest sink", "draws"]
    header += ["row sum"]
    rich, lines = Table(*header), [header, ["---", *["---:"] * (len(header) - 1)]]
    for group in groups(runs):
        found = [reach(run.matrix) for run in group.runs.values()]
        means = [np.mean([getattr(one, name) for one in found]) for name in ("entropy", "effective", "back")]
        drawn = np.mean([one.drawn for one in found], 0)
        sink = int(np.argmax(drawn))
        rows = np.mean([row_sums(run.matrix) for run in group.runs.values()])
        cells = [*(f"{mean:.2f}" for mean in means), f"v{sink}", f"{drawn[sink]:.2f}", f"{rows:.2f}"]
        rich.add_row(group.label, *cells)
        lines.append([group.label, *cells])
    return rich, "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(runs: Sequence[Run], out: Path, made: Made) -> None:
    """Print the table; write comparison.md, comparison.json and the figures into folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rich, markdown = table(runs)
    notes = caveats(runs)
    console = Console()
    console.print(rich)
    for note in notes:
        console.print(f"Not like for like: {note}", style="yellow", markup=False)
    where, reaching = reach_table(runs)
    console.print(where)
    drawn = draw(runs, out)
    head = made.line(len(groups(runs)), {run.config["seed"] for run in runs})
    text = [
        "# Comparison\n",
        f"{head}.\n",
        *(f"> **Not like for like:** {note}\n" for note in notes),
        markdown,
    ]
    text += [LEGEND, reaching, REACHING]
    text += [f"## {caption}\n\n![{caption}]({path.name})\n" for path, caption in drawn]
    (out / "comparison.md").write_text("\n".join(text))
    (out / "comparison.json").write_text(json.dumps(_json(runs, notes), indent=1) + "\n")
    console.print(f"Wrote {out / 'comparison.md'} and {len(drawn)} figures.", markup=False)


LEGEND = """
Several seeds: mean ± sample standard deviation. The difference is to the first row, in bits per
byte, paired by seed (negative is better), then half its 95 % interval (Student's t), then the minimum
detectable difference: the true one that so many seeds of that spread show with power 80 % at a
two-sided level of 5 %; one seed has neither. Train loss: nats per token, mean of the last tenth of the
logged steps. Speed: median. Held-out numbers are those of the evaluation after the last step.
"""


REACHING = """
By the shares |M| of each read, of the last token of the first held-out window, mean over reads and seeds.
Effective depth: exp(entropy), the outputs a read has, were they equal. Look-back: the newest output is at 0.
Sink: the output that draws most, v0 the embedding, as a multiple of an equal share of the reads that see it.
Row sum: of M itself, 1 where reads are averages; l + 1 at read l of the plain residual.
"""


def draw(runs: Sequence[Run], out: Path) -> list[tuple[Path, str]]:
    """Write every figure; returns (path, caption)."""
    rows = groups(runs)
    matrices = {group.label: group.first.matrix for group in rows}
    token = "last token of the first held-out window"
    made = [
        ("loss", "Loss", loss_curves(runs)),
        ("depth", "Output RMS and gradient norm", figures.depth_dynamics(*_by_depth(rows))),
        *(_weights(group) for group in rows if weighs_outputs(scheme(group.first.config))),
        ("matrix", "Depth mixing matrix M", heatmaps.depth_matrices(matrices, token)),
    ]
    return [(figures.save(figure, out / f"{name}.png"), caption) for name, caption, figure in made]


def loss_curves(runs: Sequence[Run]) -> figures.Figure:
    """Loss against the step, a line for each scheme."""
    return figures.loss_curves(*_curves(groups(runs)))


def heatmap(label: str, runs: Sequence[Run]) -> figures.Figure:
    """Depth weights of one scheme, in the mean over its runs."""
    kinds = runs[0].kinds
    weights = np.mean([run.statistics.weights for run in runs], axis=0)
    return heatmaps.weight_heatmap(weights, kinds, scheme(runs[0].config).schedule(len(kinds)), label)


def _weights(group):
    slug = "".join(c if c.isalnum() else "-" for c in group.label.lower()).strip("-")
    figure = heatmap(group.label, list(group.runs.values()))
    return f"weights-{slug}", f"Depth weights: {group.label}", figure


def _curves(rows):
    pairs = [(group.label, run) for group in rows for run in group.runs.values()]
    train = [_bits(label, run.train) for label, run in pairs]
    return train, [_bits(label, _heldout(run)) for label, run in pairs]


def _heldout(run):
    last = run.evaluation
    return [*(row for row in run.heldout if row["step"] < last["step"]), last]


def _bits(label, metrics):
    return Series(label, [m["step"] for m in metrics], [m["bits_per_byte"] for m in metrics])


def _by_depth(rows):
    rms, gradients = [], []
    for group in rows:
        for run in group.runs.values():
            sublayers = range(1, len(run.kinds) + 1)
            rms.append(Series(group.label, sublayers, run.statistics.output_rms.tolist()))
            gradients.append(Series(group.label, sublayers, run.depth[-1]["gradient_norm"]))
    return rms, gradients


def _identity(run):
    """What makes two runs seeds of one thing; keys that a scheme does not read do not count."""
    read = residuals.SCHEMES[run.config["residual"]].reads
    unread = [key for key, option in configs.SCHEME_KEYS.items() if option and option not in read]
    drop = {"seed", *BOOKKEEPING, *unread}
    return {key: value for key, value in run.config.items() if key not in drop}


def _labels(members):
    """The scheme, and what else tells rows of the same scheme apart: up to two keys, else their folders."""
    each = [_identity(next(iter(runs.values()))) for runs in members]
    names = [_scheme_label(config) for config in each]
    folders = [(name, _stem(runs)) for name, runs in zip(names, members, strict=True)]
    labels = []
    for folder, config in zip(folders, each, strict=True):
        name, stem = folder
        twins = [other for label, other in zip(names, each, strict=True) if label == name]
        keys = [key for key in sorted(set().union(*twins)) if _different(twins, key)]
        detail = ", ".join(f"{key}={config.get(key)}" for key in keys)
        if len(keys) > 2 and stem and folders.count(folder) == 1:
            detail = stem
        labels.append(f"{name} ({detail})" if detail else name)
    return labels


def _stem(runs):
    """What the folders of a group's runs are called, without the scheme and the seed; "" where not alike."""
    found = {
        run.name.removesuffix(f"-{seed}").removeprefix(f"{run.config['residual']}-")
        for seed, run in runs.items()
    }
    return found.pop() if len(found) == 1 else ""


def _scheme_label(config):
    name = config["residual"]
    return f"{name} S={config['block_size']}" if "block_size" in config else name


def _different(dicts, key):
    return len({json.dumps(d.get(key)) for d in dicts}) > 1


def _values(dicts, key):
    return ", ".join(dict.fromkeys(str(d.get(key, "absent")) for d in dicts))


def _summary(group, baseline):
    runs = list(group.runs.values())
    return Summary(
        group.label,
        tuple(group.runs),
        runs[0].parameters,
        runs[0].evaluation["step"],
        _tokens(runs[0]),
        _spread([run.evaluation["bits_per_byte"] for run in runs]),
        baseline and _difference(group, baseline),
        _spread([run.evaluation["perplexity"] for run in runs]),
        _spread([_train_loss(run) for run in runs]),
        _spread([float(np.median([row["tokens_per_s"] for row in run.train])) for run in runs]),
        _spread([run.train[-1]["seconds"] / 60 for run in runs]),
    )


def _tokens(run):
    return run.evaluation["step"] * run.config["data.batch"] * run.config["data.length"]


def _difference(group, baseline):
    common = [seed for seed in group.runs if seed in baseline.runs]
    bits = [[of.runs[seed].evaluation["bits_per_byte"] for seed in common] for of in (group, baseline)]
    return difference([a - b for a, b in zip(*bits, strict=True)]) if common else None


def _train_loss(run):
    first = 0.9 * run.train[-1]["step"]
    return float(np.mean([row["loss"] for row in run.train if row["step"] >= first]))


def _spread(values):
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), deviation, len(values))


def _cells(rows):
    header = ["scheme", "seeds", "param.", "steps", "tokens", "held-out bits/byte", "difference"]
    header += ["95 % interval", "detectable at 80 %"]
    header += ["perplexity", "train loss", "tokens/s", "minutes"]
    return header, [
        [
            row.scheme,
            str(len(row.seeds)),
            f"{row.parameters:,}",
            f"{row.steps:,}",
            _short(row.tokens),
            _show(row.bits_per_byte, ".4f"),
            *_differences(row.difference),
            _show(row.perplexity, ".3f"),
            _show(row.train_loss, ".4f"),
            f"{row.tokens_per_s.mean:,.0f}",
            f"{row.minutes.mean:.1f}",
        ]
        for row in rows
    ]


def _show(spread, form):
    mean = format(spread.mean, form)
    return mean if spread.deviation is None else f"{mean} ± {format(spread.deviation, form[-3:])}"


def _differences(found):
    """Three cells: mean and deviation, half the interval, minimum detectable difference."""
    if found is None:
        return "", "", ""
    if found.deviation is None:
        return _show(found, "+.4f"), "", ""
    return _show(found, "+.4f"), f"± {found.half:.4f}", f"{found.detectable:.4f}"


def _short(count):
    power = min(3, int(math.log10(max(count, 1)) // 3))
    return f"{count / 1000**power:.4g}{('', 'k', 'M', 'G')[power]}"


def _json(runs, notes):
    rows = [
        {key: v._asdict() if isinstance(v, Spread | Difference) else v for key, v in row._asdict().items()}
        for row in summaries(runs)
    ]
    each = [{"name": run.name, "config": run.config, "eval": run.evaluation} for run in runs]
    return {"rows": rows, "not_like_for_like": notes, "runs": each}
