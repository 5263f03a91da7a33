"""Static cycles of a TPU kernel from libtpu's dump of its final schedule: one bundle is one cycle.

That is so where nothing stalls: the figure knows no latency of DMA and no conflict. A loop's body counts as
often as the loop runs. What a step does only when the grid starts (`pl.when(step == 0)`) is counted apart.
"""

import re
from itertools import pairwise
from typing import NamedTuple

_LINE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*)\s*(\{.*)")
_EXIT = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/")
_BRANCH = re.compile(r"sbr\.rel \(%(p\d+)\w*\) target = \$region(\d+)")


class Bundle(NamedTuple):
    """One line of the schedule: whether a loop's body begins, how many loops it is in, its instructions."""

    begins: bool
    depth: int
    text: str


class Loop(NamedTuple):
    """Bundles `first` to `end` (exclusive), those of the loops inside it apart."""

    first: int
    end: int
    depth: int
    trips: int | None
    inner: tuple["Loop", ...]


class Step(NamedTuple):
    """Of one grid step."""

    cycles: int
    """In the steady state."""
    starting: int
    """Besides, in the first step."""
    grid: int | None
    """How often the loop over the grid runs, the pipeline's filling included."""


def read(text: str) -> list[Bundle]:
    """The bundles of a `*-final_bundles.txt`."""
    found: list[Bundle] = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match:
            depth = len(match[3])
            if found and found[-1].begins and not found[-1].depth:  # libtpu marks not every beginning
                found[-1] = found[-1]._replace(depth=depth)
            found.append(Bundle(match[2] == "LB", depth, match[4]))
        elif found:
            found[-1] = found[-1]._replace(text=found[-1].text + line)
    return found


def loops(bundles: list[Bundle], first: int = 0, end: int | None = None, depth: int = 1) -> list[Loop]:
    """The loops `depth` deep that begin in bundles `first` to `end`."""
    end = len(bundles) if end is None else end
    starts = [i for i in range(first, end) if bundles[i].begins and bundles[i].depth == depth]
    return [_loop(bundles, *span, depth) for span in pairwise([*starts, end])] if starts else []


def _loop(bundles, start, after, depth):
    last = max(i for i in range(start, after) if bundles[i].depth >= depth)
    inner = tuple(loops(bundles, start, last + 1, depth + 1))
    own = _own(start, last + 1, inner)
    tests = [_EXIT.search(bundles[i].text) for i in own]
    trips = [int(test[1]) for test in tests if test]
    return Loop(start, last + 1, depth, trips[-1] if trips else None, inner)


def _own(first, end, inner):
    inside = {i for loop in inner for i in range(loop.first, loop.end)}
    return [i for i in range(first, end) if i not in inside]


def step(text: str, unknown: int = 1) -> Step:
    """Of a kernel with one grid; a loop whose trips are not in the program runs `unknown` times.

    Raises:
      ValueError: where there is no loop over a grid.
    """
    bundles = read(text)
    outer = loops(bundles)
    if not outer:
        raise ValueError("the schedule has no loop: give the kernel a grid of more than one step")
    grid = max(outer, key=lambda loop: _cycles(loop, unknown, set()))
    once = _only_first(bundles, grid)
    steady = _cycles(grid, unknown, once)
    return Step(steady, _cycles(grid, unknown, set()) - steady, grid.trips)


def _cycles(loop, unknown, left_out):
    """Of one pass through the loop's body."""
    total = sum(i not in left_out for i in _own(loop.first, loop.end, loop.inner))
    for inner in loop.inner:
        if inner.first not in left_out:
            total += (unknown if inner.trips is None else inner.trips) * _cycles(inner, unknown, left_out)
    return total


def _only_first(bundles, grid):
    """Bundles that a branch skips unless the step is 0."""
    skipped = set()
    for i in _own(grid.first, grid.end, grid.inner):
        branch = _BRANCH.search(bundles[i].text)
        if branch and _tests_zero(bundles, grid, branch[1]):
            target = re.compile(rf"Start(/End empty)? region {branch[2]}\b")
            ends = (j for j in range(i + 1, grid.end) if target.search(bundles[j].text))
            skipped |= set(range(i + 5, next(ends, i + 5)))  # four more run while the branch is taken
    return skipped


def _tests_zero(bundles, grid, predicate):
    """Whether it is "a counter of the grid's loop is not zero", and no condition made beforehand."""
    text = " ".join(bundle.text for bundle in bundles[grid.first : grid.end])
    test = re.search(rf"%{predicate}(?:_\w+)? = scmp\.ne\.s32\.totalorder (%\w+), 0\b", text)
    return test is not None and f"{test[1]} = sphi" in text


def slots(text: str) -> dict[str, int]:
    """How often each unit is used, from `*-final_hlo-static-per-bundle-utilization.txt`."""
    lines = text.splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    rows = [list(map(int, line.split())) for line in lines[4:] if line[:1].isdigit()]
    return dict(zip(names, (sum(column) for column in zip(*rows, strict=True)), strict=True))
