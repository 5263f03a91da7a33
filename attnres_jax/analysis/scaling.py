"""Scaling laws: loss against compute, `L = A C^-a`, over runs of several sizes (Figure 4 of the paper).

A and a are the least squares fit of `log L = log A - a log C`; there is no constant term, as in the paper.
The compute advantage of a scheme at C is how many times C the baseline needs for the scheme's loss at C,
both losses taken from the fitted curves: `(A_0 / L)^(1/a_0) / C`.

Intervals are percentiles of refits to resampled residuals (Davison and Hinkley 1997, section 6.3): the
compute of the points stays, residuals of log L are divided by sqrt(1 - leverage), centred and drawn with
replacement. All schemes are drawn alike: point k is the same size, seed and data in each, so noise that
moves all schemes together moves their ratio little. With few points such intervals are too narrow: 95 %
ones of the exponent hold the truth in 64 % of simulated sets of 3 points, 85 % of 5, 92 % of 12 (normal
noise; tests/test_scaling.py).
"""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from attnres_jax.analysis import figures, paper
from attnres_jax.analysis.statistics import LEVEL

SIX = "C = 6 x active parameters x tokens (embedding and head not counted)"
EXACT = "C = counted FLOPs of training x tokens (3 x forward: matrix products, attention over T, depth reads)"
DRAWS, SEED = 10_000, 0
"""Of the bootstrap."""


class NotFitted(ValueError):
    """Points that no power law can be fitted to; says why."""


class Point(NamedTuple):
    """A finished run: its scheme's name, what makes runs of two schemes one pair, FLOPs and held-out loss."""

    label: str
    pair: Hashable
    compute: float
    loss: float


class PowerLaw(NamedTuple):
    """`L = A C^-exponent`, C in FLOPs; numbers, or arrays of as many fits."""

    A: Any
    exponent: Any

    def at(self, compute: Any) -> Any:
        """The loss that the curve has at `compute` FLOPs."""
        return self.A * compute**-self.exponent

    def compute(self, loss: Any) -> Any:
        """The FLOPs at which the curve has `loss`."""
        return (self.A / loss) ** (1 / self.exponent)


class Curve(NamedTuple):
    """The points of a scheme; point k is the same size and seed in every curve."""

    label: str
    compute: Float[np.ndarray, " points"]
    loss: Float[np.ndarray, " points"]


class Interval(NamedTuple):
    """A number and its interval at LEVEL."""

    value: float
    low: float
    high: float


class Row(NamedTuple):
    """What is said of a curve."""

    label: str
    points: int
    law: PowerLaw
    exponent: Interval
    residual: float
    """Root mean square of log L, measured less fitted."""
    advantage: Interval | None
    """At the largest compute that every curve has; None for the baseline, the first curve."""


def fit(compute: Float[np.ndarray, " points"], loss: Float[np.ndarray, " points"]) -> PowerLaw:
    """The power law of two or more points of different compute; `NotFitted` without them."""
    different = len(np.unique(compute))
    if len(compute) != len(loss) or different < 2:
        raise NotFitted(f"a power law needs losses at two or more computes, got {len(loss)} at {different}")
    if not (np.isfinite(compute) & np.isfinite(loss) & (compute > 0) & (loss > 0)).all():
        raise NotFitted(f"computes and losses must be above zero: {compute.tolist()}, {loss.tolist()}")
    return _fit(np.log(compute), np.log(loss))


def advantage(law: PowerLaw, baseline: PowerLaw, compute: float) -> Any:
    """How many times `compute` the baseline needs for the loss that `law` has there."""
    return baseline.compute(law.at(compute)) / compute


def bootstrap(curves: Sequence[Curve], draws: int = DRAWS, seed: int = SEED) -> list[PowerLaw]:
    """Of each curve `draws` fits to resampled residuals, the same points drawn for every curve."""
    points = len(curves[0].loss)
    if points < 3:
        raise NotFitted(f"intervals need three points or more of each scheme, got {points}")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(points, size=(draws, points))
    return [_refitted(curve, drawn) for curve in curves]


def paired(points: Sequence[Point]) -> list[Curve]:
    """A curve for each label, in the order given, with the same pairs in all of them."""
    found: dict[str, dict[Hashable, Point]] = {}
    for point in points:
        own = found.setdefault(point.label, {})
        if point.pair in own:
            raise NotFitted(f"two runs of {point.label} have the same size and seed: leave one out")
        own[point.pair] = point
    first = next(iter(found.values()))
    for label, own in found.items():
        if own.keys() != first.keys():
            common, others = len(own.keys() & first.keys()), len(own.keys() - first.keys())
            raise NotFitted(
                f"{label} has {common} of the {len(first)} sizes and seeds that {next(iter(found))} has, and "
                f"{others} others: every scheme needs the same"
            )
    order = sorted(first, key=lambda pair: first[pair].compute)
    return [
        Curve(label, *(np.array([own[pair][at] for pair in order]) for at in (2, 3)))
        for label, own in found.items()
    ]


def rows(curves: Sequence[Curve], draws: int = DRAWS, seed: int = SEED) -> list[Row]:
    """The fit of each curve with its intervals, and its advantage over the first."""
    laws = [fit(curve.compute, curve.loss) for curve in curves]
    drawn, at = bootstrap(curves, draws, seed), largest(curves)
    made = []
    for curve, law, many in zip(curves, laws, drawn, strict=True):
        residual = np.log(curve.loss) - np.log(law.at(curve.compute))
        gain = _interval(advantage(law, laws[0], at), advantage(many, drawn[0], at))
        exponent = _interval(law.exponent, many.exponent)
        rms = float(np.sqrt(np.mean(residual**2)))
        made.append(Row(curve.label, len(residual), law, exponent, rms, gain if made else None))
    return made


def largest(curves: Sequence[Curve]) -> float:
    """The largest compute that every curve has reached, in FLOPs."""
    return float(min(curve.compute.max() for curve in curves))


def table2() -> list[Curve]:
    """The paper's Table 2 with C = 6 x active parameters x tokens: the paper does not tabulate its own C."""
    compute = np.array([6 * size.parameters * size.tokens for size in paper.TABLE2])
    labels = paper.TABLE2[0].loss
    return [Curve(label, compute, np.array([size.loss[label] for size in paper.TABLE2])) for label in labels]


def report(
    curves: Sequence[Curve], definition: str, out: Path, name: str, about: str, made: str = ""
) -> None:
    """Print the table and what C is; write NAME.md, NAME.json and NAME.png into folder `out`.

    `made`: of runs, how.
    """
    out.mkdir(parents=True, exist_ok=True)
    found, unit = rows(curves), _unit(curves)
    header, cells = _cells(found, largest(curves), unit)
    console = Console()
    rich = Table(*header, caption=definition)
    for line in cells:
        rich.add_row(*line)
    console.print(rich)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    figures.save(draw(curves, definition), out / f"{name}.png")
    text = (
        f"# {about}",
        *([made] if made else []),
        markdown,
        f"{definition}. {LEGEND}",
        f"![Loss against compute]({name}.png)",
    )
    (out / f"{name}.md").write_text("\n\n".join(text) + "\n")
    (out / f"{name}.json").write_text(json.dumps(_json(found, curves, definition), indent=1) + "\n")
    console.print(f"Wrote {out / name}.md, .json and .png", markup=False)


LEGEND = (
    "`L = A C^-a`: least squares of log L on log C, no constant term. In brackets 95 % intervals: "
    f"percentiles of {DRAWS:,} refits to resampled residuals, the same points drawn for every scheme (seed "
    f"{SEED}); with five points they hold the truth in 85 % of cases only, with three in 64 %. Residual: "
    "root mean square of log L. Advantage: how many times that C the first scheme needs for the same loss, "
    "from the two fitted curves."
)


def draw(curves: Sequence[Curve], definition: str) -> figures.Figure:
    """Loss against compute, points and fitted lines."""
    name, flops = _unit(curves)
    points = [figures.Series(c.label, (c.compute / flops).tolist(), c.loss.tolist()) for c in curves]
    return figures.scaling_laws(points, [_line(curve, flops) for curve in curves], definition, name)


def _line(curve, flops):
    law = fit(curve.compute, curve.loss)
    ends = np.geomspace(0.8 * curve.compute.min(), 1.25 * curve.compute.max(), 50)
    label = f"{curve.label}  {_formula(law, flops)}"
    return figures.Series(label, (ends / flops).tolist(), law.at(ends).tolist())


def _formula(law, flops):
    return f"{law.at(flops):.3f} C^{-law.exponent:.4f}"


def _unit(curves):
    """The paper's unit where runs are large; name and FLOPs."""
    return ("PFLOP/s-days", 8.64e19) if largest(curves) > 1e18 else ("TFLOP", 1e12)


def _fit(x, y):
    """Of y [..., points] on x [points]."""
    centred = x - x.mean()
    slope = (y - y.mean(-1, keepdims=True)) @ centred / (centred @ centred)
    return PowerLaw(np.exp(y.mean(-1) - slope * x.mean()), -slope)


def _refitted(curve, drawn):
    x, y = np.log(curve.compute), np.log(curve.loss)
    law = fit(curve.compute, curve.loss)
    fitted, centred = np.log(law.A) - law.exponent * x, x - x.mean()
    leverage = 1 / len(x) + centred**2 / (centred @ centred)
    free = np.maximum(1 - leverage, 1e-12)  # a point that the fit passes through has no residual either
    residual = (y - fitted) / np.sqrt(free)
    return _fit(x, fitted + (residual - residual.mean())[drawn])


def _interval(value, drawn):
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def _cells(found, at, unit):
    name, flops = unit
    header = ["scheme", "points", f"A (C in {name})", "exponent a", "residual"]
    header += [f"advantage at C = {at / flops:.3g} {name}"]
    return header, [
        [
            *(row.label, str(row.points), f"{row.law.at(flops):.4f}"),
            *(_show(row.exponent, ".4f"), f"{row.residual:.4f}"),
            _show(row.advantage, ".2f") if row.advantage else "",
        ]
        for row in found
    ]


def _show(interval, form):
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _json(found, curves, definition):
    fits = [
        {"scheme": row.label, "A": float(row.law.A), "exponent": row.exponent._asdict()}
        | {"residual": row.residual, "advantage": row.advantage and row.advantage._asdict()}
        | {"compute": curve.compute.tolist(), "loss": curve.loss.tolist()}
        for row, curve in zip(found, curves, strict=True)
    ]
    return {"definition": definition, "unit": "FLOPs", "largest": largest(curves), "fits": fits}
