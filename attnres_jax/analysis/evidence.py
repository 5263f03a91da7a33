"""Runs of the rows of the paper's Table 4 as one experiment, and what its pages measure of each run."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from attnres_jax.analysis.compare import NotComparable, Run, groups, scheme
from attnres_jax.analysis.figures import AGREES, CONTRARY, UNRESOLVED, Series
from attnres_jax.analysis.outputs import Shares
from attnres_jax.analysis.paper import TABLE4
from attnres_jax.analysis.statistics import Difference, difference


class Look(NamedTuple):
    """What a trained model does with each of its outputs, on held-out tokens."""

    shares: Shares
    skipped: np.ndarray
    """Nats per token, whole and without each sublayer, [L+1]."""


class Rows(NamedTuple):
    """Runs by row of Table 4: all with the same seeds."""

    names: tuple[str, ...]
    """The schemes, as `paper.TABLE4` names them."""
    labels: tuple[str, ...]
    bits: Float[np.ndarray, "rows seeds"]
    """Held-out bits per byte."""
    runs: tuple[tuple[Run, ...], ...]

    def of(self, name: str) -> tuple[Run, ...]:
        """The runs of a scheme, by seed."""
        return self.runs[self.names.index(name)]

    def label(self, name: str) -> str:
        """What a scheme is called in tables."""
        return self.labels[self.names.index(name)]

    def paired(self, first: str, second: str) -> Float[np.ndarray, " seeds"]:
        """First minus second, by seed."""
        a, b = (self.bits[self.names.index(name)] for name in (first, second))
        return a - b

    def difference(self, first: str, second: str) -> Difference:
        """Of the two, with its interval."""
        return difference(self.paired(first, second).tolist())

    def fate(self, first: str, second: str) -> str:
        """What the pair says of the paper's: its sign, where zero is outside its interval."""
        found, paper = self.difference(first, second), TABLE4[first] - TABLE4[second]
        if abs(found.mean) <= (found.half or math.inf):
            return UNRESOLVED
        return AGREES if found.mean * paper > 0 else CONTRARY

    def lines(self, names: Sequence[str], values: Callable[[Run], Any]) -> list[Series]:
        """A line over the sublayers for each run of these schemes."""
        made = ((name, np.asarray(values(run))) for name in names for run in self.of(name))
        return [Series(self.label(name), range(1, len(y) + 1), y.tolist()) for name, y in made]


def rows(runs: Sequence[Run]) -> Rows:
    """`NotComparable` unless each row has the same two seeds or more, and is a row of Table 4."""
    found = groups(runs)
    names = tuple(group.first.config["residual"] for group in found)
    seeds = {tuple(group.runs) for group in found}
    if len(found) < 2 or len(seeds) > 1 or len(next(iter(seeds))) < 2:
        raise NotComparable("evidence needs two rows or more, each of the same two seeds or more")
    if "plain" not in names:
        raise NotComparable(f"evidence needs the plain residual beside {', '.join(names)}")
    if strange := [name for name in names if name not in TABLE4]:
        raise NotComparable(f"{', '.join(strange)} is no row of Table 4: {', '.join(TABLE4)} are")
    if len(set(names)) < len(names):
        raise NotComparable(f"a scheme of {', '.join(names)} has several rows: leave all but one out")
    members = tuple(tuple(group.runs.values()) for group in found)
    bits = np.array([[run.evaluation["bits_per_byte"] for run in each] for each in members])
    return Rows(names, tuple(group.label for group in found), bits, members)


class Dynamics(NamedTuple):
    """Of one run over its sublayers; fields are the columns of a table."""

    stream_first: float
    """RMS after sublayer 1."""
    stream_last: float
    stream_largest: float
    stream_rises: float
    """After how many of the sublayers 2 .. L it is larger than before."""
    output_first_quarter: float
    """Mean RMS of the first L / 4 outputs."""
    output_last_quarter: float
    gradient_largest_over_smallest: float
    gradient_variation: float
    """Standard deviation over mean, over sublayers."""


def dynamics(run: Run, look: Look) -> Dynamics:
    """The numbers of the paper's Figure 5 for one run."""
    stream, rms, gradient = look.shares.stream, run.statistics.output_rms, gradients(run)
    quarter = max(1, len(rms) // 4)
    return Dynamics(
        *(float(stream[0]), float(stream[-1]), float(np.max(stream)), float(np.sum(np.diff(stream) > 0))),
        *(float(np.mean(rms[:quarter])), float(np.mean(rms[-quarter:]))),
        *(float(gradient.max() / gradient.min()), float(gradient.std(ddof=1) / gradient.mean())),
    )


def gradients(run: Run) -> Float[np.ndarray, " L"]:
    """Norm by sublayer, mean over the updates logged in the second half: one batch is noisy."""
    late = [row["gradient_norm"] for row in run.depth if row["step"] >= run.depth[-1]["step"] / 2]
    return np.mean(late, 0)


class Structure(NamedTuple):
    """Mean weights of reads, those of sublayers 1 and 2 left out; fields are the columns of a table."""

    newest_source: float
    embedding_before_attention: float
    embedding_before_MLP: float
    all_alike: float
    """1 / R, the mean over reads of R sources."""


def structure(run: Run) -> Structure:
    """What the paper's Figure 8 shows, for one run of a scheme whose reads weigh outputs."""
    counts, weights = scheme(run.config).schedule(len(run.kinds)).counts, run.statistics.weights
    reads = range(2, len(run.kinds))
    attention, mlp = ([weights[at][0] for at in reads if run.kinds[at] == kind] for kind in "am")
    return Structure(
        float(np.mean([weights[at][counts[at] - 1] for at in reads])),
        float(np.mean(attention)),
        float(np.mean(mlp)),
        float(np.mean([1 / counts[at] for at in reads])),
    )
