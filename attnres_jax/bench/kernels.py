"""Timing of the depth kernels on the device at hand, beside PyTorch's where that is installed.

Every arm gets the same work (`work`) and the same inputs, and has its results compared with the equations
first: an arm that is wrong, that fails or that does not run here stays in the table with the reason, without
a speed. The others take turns (A B C C B A), a copy of a large array among them. Time is the host's, from
the first call of a turn until the device is done with the last, over the number of calls; nothing is
subtracted. Calls go through several input sets in turn, or one that is itself beyond what a cache holds.

Bandwidth is that of the least bytes of a work (`Work.bytes`), whatever the arm moves, beside the copy's.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnres_jax.bench import arms, peers, report, turns
from attnres_jax.bench.arms import Maker, Ready, Unsupported
from attnres_jax.bench.work import LIMIT, Work, draw, errors, sampled, truth

OURS, PEERS = tuple(arms.PLATFORMS), tuple(peers.PEERS)
COPY, TASKS = "copy", ("block", "mix", "merge")


class Scale(NamedTuple):
    """Of a kind of device: how much is enough to measure."""

    cache: int
    """Bytes of all input sets together."""
    start: int
    """Least bytes of one start: beside it the host's part, up to a millisecond, is small."""
    copy: int
    """Bytes of the array that is copied."""
    turn: float
    """Seconds of one turn at least."""


SCALES = {"cpu": Scale(1 << 28, 0, 1 << 26, 0.0)}
LARGE = Scale(1 << 29, 1 << 37, 1 << 30, 0.01)
"""Eight times an H200's cache; 33 milliseconds of its memory's time."""
MOST_SETS = 8


def works(args: dict[str, Any]) -> Iterator[Work]:
    """What the command asks for, the most telling first, for its time may run out."""
    n, reads = args["sources"], sorted(args["reads"], reverse=True)
    # The single read sees what the last of a block does: the summaries and the running sum.
    sizes = [("mix", n + 1, 1), *((t, n, s) for t in TASKS[:2] for s in reads), ("merge", n, 1)]
    sizes.sort(key=lambda size: (TASKS.index(size[0]), size[2] != 1))
    for tokens, (task, sources, s), backward, width in product(
        args["tokens"], sizes, (True, False), args["width"]
    ):
        if task in args["tasks"]:
            yield Work(task, tokens, width, sources, s, backward)


def makers(names: Sequence[str]) -> dict[str, Maker]:
    """By name of an arm."""
    return {name: partial((arms if name in OURS else peers).make, name) for name in names}


def measure(work: Work, chosen: dict[str, Maker], rounds: int) -> dict[str, Any]:
    """Of one work: what each arm's results are off by, its seconds a call, or why it has none."""
    scale = SCALES.get(jax.default_backend(), LARGE)
    count, repeats = plan(work, scale)
    sets = [draw(work, seed) for seed in range(count)]
    few = sampled(sets[0], work)
    want = truth(few, work)
    found, ready = {}, {COPY: copy(scale.copy)}
    for name, make in chosen.items():
        start = time.monotonic()
        try:
            arm = make(work, sets, repeats)
            found[name] = {"errors": errors(arm.results(few), want, work), "note": arm.note}
            arm.wait(arm.start())
        except Unsupported as reason:
            found[name] = {"reason": str(reason)}
            continue
        except Exception as failure:  # whatever a kernel of other people's makes raises is its row's reason
            found[name] = {
                "reason": f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
            }
            continue
        found[name]["prepared_seconds"] = round(time.monotonic() - start, 1)
        if wrong := _wrong(found[name]["errors"], LIMIT[work.dtype]):
            found[name]["reason"] = wrong
        else:
            ready[name] = arm
    seconds = time_in_turns(ready, rounds, scale.turn)
    moved = 2 * scale.copy / float(np.median(seconds.pop(COPY)))
    _judge(found, seconds, work.bytes, moved)
    sizes = work._asdict() | {"least_bytes": work.bytes, "input_sets": count, "calls": count * repeats}
    return sizes | {"rounds": rounds, "copy_bytes_per_second": moved, "arms": found}


def plan(work: Work, scale: Scale) -> tuple[int, int]:
    """How many input sets there are, and how often one start of an arm goes through them."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda: draw(work, 0)))
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)
    sets = min(MOST_SETS, math.ceil(scale.cache / size))
    return sets, max(1, math.ceil(scale.start / (sets * work.bytes)))


def copy(size: int) -> Ready:
    """A copy of `size` bytes on the device: what memory gives."""
    array = jnp.zeros(size // 4, jnp.float32)
    run = jax.jit(jnp.copy)
    return Ready(lambda _: {}, partial(run, array), jax.block_until_ready, 1)


def _wrong(found, limit):
    """Why an arm gets no speed, or None."""
    name = max(found, key=lambda k: np.inf if np.isnan(found[k]) else found[k])
    return (
        None if found[name] <= limit else f"wrong: {name} is off by {found[name]:.2g}, the limit is {limit}"
    )


def time_in_turns(ready: dict[str, Ready], rounds: int, least: float) -> dict[str, np.ndarray]:
    """Seconds [rounds, 2] of one call of each arm, there and back; a turn takes `least` seconds or more."""
    starts = {}
    for name, arm in ready.items():
        _turn(arm, 1)
        starts[name] = max(1, math.ceil(least / (_turn(arm, 1) * arm.calls)))
    seconds = {name: np.zeros((rounds, 2)) for name in ready}
    for at, (i, name) in enumerate(turns.order(list(ready), rounds)):
        seconds[name][i, at // len(ready) % 2] = _turn(ready[name], starts[name])
    return seconds


def _turn(arm, starts):
    begun, handle = time.perf_counter(), None
    for _ in range(starts):
        handle = arm.start()
    arm.wait(handle)
    return (time.perf_counter() - begun) / (starts * arm.calls)


def _judge(found, seconds, least_bytes, copied):
    """Adds the speeds to the rows of `found`; ours are set beside the fastest of the others."""
    others = [name for name in seconds if name not in OURS]
    fastest = min(others, key=lambda name: float(np.median(seconds[name])), default=None)
    for name, taken in seconds.items():
        median = float(np.median(taken))
        found[name] |= {
            "median_seconds": median,
            "seconds_95_percent": turns.interval(taken.mean(1)),
            "bytes_per_second": least_bytes / median,
            "share_of_copy": least_bytes / median / copied,
            "seconds": [[float(f"{s:.4g}") for s in pair] for pair in taken.tolist()],
        }
        if fastest and name in OURS:
            ratios = seconds[fastest].sum(1) / taken.sum(1)
            over = {"peer": fastest, "median": float(np.median(ratios)), "95_percent": turns.interval(ratios)}
            found[name]["over_fastest_peer"] = over


HEADER = (
    "| work | arm | ms | 95 % | GB/s | of copy | fastest peer / this | worst error | |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def lines(row: dict[str, Any]) -> Iterator[str]:
    """One line of Markdown an arm, or for several that have no speed for the same reason."""
    what = f"{row['task']} {'forward + backward' if row['backward'] else 'forward'}, D={row['width']}"
    what += f", {row['tokens']} tokens, R={row['sources']}, S={row['reads']}"
    if "reason" in row:
        yield f"| {what} | | | | | | | | {row['reason']} |"
    for arm, names in _grouped(row.get("arms", {})):
        worst = f"{max(arm['errors'].values()):.1e}" if "errors" in arm else ""
        times, over = " | | | ", ""
        if "median_seconds" in arm:
            low, high = (1e3 * s for s in arm["seconds_95_percent"])
            times = f"{1e3 * arm['median_seconds']:.3f} | {low:.3f} to {high:.3f} | "
            times += f"{arm['bytes_per_second'] / 1e9:.3g} | {arm['share_of_copy']:.2f}"
        if "over_fastest_peer" in arm:
            low, high = arm["over_fastest_peer"]["95_percent"]
            over = f"{arm['over_fastest_peer']['median']:.2f} ({low:.2f} to {high:.2f})"
        said = arm.get("reason") or arm["note"]
        yield f"| {what} | {', '.join(names)} | {times} | {over} | {worst} | {said.replace('|', '/')} |"


def _grouped(found):
    """Each arm's row with its name; those that are only a reason together."""
    names = {}
    for name, arm in found.items():
        names.setdefault(name if "errors" in arm else arm["reason"], []).append(name)
    return [(found[several[0]], several) for several in names.values()]


def main(args: dict[str, Any]) -> None:
    """Measure, print and write: one JSON line a work, made as soon as it is done, and the table."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of its own
    out, begun = args["out"] and Path(args["out"]), time.monotonic()
    devices = jax.devices()
    whence = report.provenance(devices[0].device_kind)
    chosen, table = makers(args["arms"]), [HEADER]
    print(f"{whence['device']}, {whence['versions']}, commit {whence['commit']}\n{HEADER}")
    for work in works(args):
        if args["minutes"] and time.monotonic() - begun > 60 * args["minutes"]:
            row = work._asdict() | {"reason": "not run: out of time"}
        else:
            row = measure(work, chosen, args["rounds"])
            peers.release()
        table += lines(row)
        print("\n".join(lines(row)), flush=True)
        report.append(whence | row, out)
        if out:
            out.with_suffix(".md").write_text("\n".join(table) + "\n")
