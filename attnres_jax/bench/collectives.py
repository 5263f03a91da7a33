"""Collectives of a scheduled program: what travels, and how much compute runs meanwhile.

A collective is synchronous, or a start and a done: instructions of their own (`collective-permute-start`), or
fusions that XLA:TPU calls `async-collective-start` and `-done`, whose computations hold it. What the compiler
placed between the two runs while it travels. JAX knows no bandwidth of links, so they are given no time.

Compute is counted in the compiler's own estimate of cycles where it made one; kernels and the rest take their
roofline time, copies that run beside the rest take none.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from attnres_jax.bench import cost
from attnres_jax.bench.cost import COLLECTIVES, Chip, Kernel
from attnres_jax.bench.hlo import Computation, Instruction, Module, trips


class Collective(NamedTuple):
    """One of a program, as it runs `times` in a step."""

    kind: str
    received: float
    """Bytes that a device receives in a run, by the ring that moves the least."""
    times: float
    hidden: float
    """Seconds of compute between start and done; 0: the device waits for all of it."""
    around: float
    """Seconds of compute of what it stands in, a loop's round or the whole program."""
    op_name: str

    @property
    def bytes(self) -> float:
        """Received in a step."""
        return self.received * self.times


class Schedule(NamedTuple):
    """Of a step, on one device."""

    seconds: float
    """Of compute, one instruction after the other, by the compiler's cycles; collectives take no time."""
    collectives: list[Collective]


def schedule(module: Module, kernels: Mapping[str, Kernel], chip: Chip, clock: float) -> Schedule:
    """Compute and collectives of a program, for a chip of `clock` Hz."""
    own = {(row.place, row.name): row for row in cost.rows(module, kernels)}
    found: list[Collective] = []

    def once(i: Instruction, place: str) -> float:
        """Seconds of one run."""
        if i.opcode.endswith(("-start", "-done")) or collective(module, i) is not None:
            return 0.0
        cycles = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
        if cycles and int(cycles[1]):
            return int(cycles[1]) / clock
        row = own.get((place, i.name))
        return cost.row_seconds(row._replace(times=1.0), chip) if row else 0.0

    def run(name: str, times: float) -> float:
        computation, at, now = module.computations[name], {}, 0.0
        for i in computation.instructions.values():
            at[i.name] = now
            if i.opcode == "while":
                (body,), count = i.called("body"), trips(module, i)
                now += count * run(body, times * count)
            elif i.opcode == "conditional":
                branches = i.called("branch_computations", "true_computation", "false_computation")
                now += sum(run(b, times / len(branches)) for b in branches) / len(branches)
            elif i.opcode == "call":
                now += sum(run(called, times) for called in i.called("to_apply"))
            else:
                now += once(i, name)
        for i in computation.instructions.values():
            inner = collective(module, i)
            if inner is not None and not _ends(i):
                done = _done(module, computation, i)
                # Without a done here it travels on: into the loop's next round.
                end = at[i.name] if done == i.name else at.get(done, now)
                kind, received = inner.opcode.removesuffix("-start"), _received(inner)
                hidden, op_name = end - at[i.name], i.op_name or inner.op_name
                found.append(Collective(kind, received, times, hidden, now, op_name))
        return now

    return Schedule(run(module.entry, 1.0), found)


def collective(module: Module, i: Instruction) -> Instruction | None:
    """The collective that an instruction is, starts or ends."""
    if i.opcode.startswith(COLLECTIVES):
        return i
    wraps = i.name.startswith("async-collective") if i.opcode == "fusion" else i.opcode.startswith("async-")
    for name in i.called("calls") if wraps else ():
        for inner in module.computations[name].instructions.values():
            if inner.opcode.startswith(COLLECTIVES):
                return inner
    return None


def _ends(i):
    return i.opcode.endswith(("-done", "-update")) or i.name.startswith("async-collective-done")


def _done(module: Module, computation: Computation, start: Instruction) -> str:
    """The name of what ends it: itself where it is synchronous, "" where nothing here does."""
    if start.opcode.endswith("-start"):
        following = computation.users(start.name)
        return next((user.name for user in following if user.opcode.endswith("-done")), "")
    if start.opcode != "fusion":
        return start.name
    names = list(computation.instructions)
    channel = _channel(collective(module, start))
    for name in names[names.index(start.name) + 1 :]:
        i = computation.instructions[name]
        if _ends(i) and i.opcode == "fusion" and _channel(collective(module, i)) == channel:
            return name
    return ""


def _channel(inner):
    found = inner and re.search(r"channel_id=(\d+)", inner.attributes)
    return found[1] if found else None


def _received(inner: Instruction) -> float:
    """Of the operands and results in its type: a start's has both, of which the larger is the whole."""
    devices = group(inner.attributes)
    sizes = [shape.bytes for shape in inner.shapes]
    start = inner.opcode.endswith("-start") and not inner.opcode.startswith("all-reduce")
    whole = max(sizes) if start else sum(sizes)
    if inner.opcode.startswith("collective-permute"):
        return whole
    if inner.opcode.startswith("reduce-scatter"):
        return whole * (devices - 1) / (1 if not start else devices)
    return whole * (devices - 1) / devices * (2 if inner.opcode.startswith("all-reduce") else 1)


def group(attributes: str) -> int:
    """Devices that take part together, of `replica_groups` in any of its spellings; 1 where it has none."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if named:
        sizes = dict(part.split("=") for part in named[1].split(","))
        return math.prod(int(sizes[axis]) for axis in named[2].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if counted:
        return int(counted[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed else 1


class Total(NamedTuple):
    """All of one kind in a step, on one device; bytes are those that it receives."""

    kind: str
    runs: float
    bytes: float
    exposed: float
    """Bytes of those with no compute between start and done."""
    needed: float
    """Bytes a second, of all that travel beside compute, so that none of it shows: the average."""
    hidden: float
    """Seconds of compute between their starts and dones; what runs beside two of them counts for both."""
    hardest: float
    """Bytes a second that the one with the least compute for its bytes needs: a link that is slower exposes
    a part of it."""


def totals(found: list[Collective]) -> list[Total]:
    """By kind, most bytes first."""
    kinds = sorted({c.kind for c in found}, key=lambda kind: -sum(c.bytes for c in found if c.kind == kind))
    return [_total(kind, [c for c in found if c.kind == kind]) for kind in kinds]


def _total(kind, of_kind):
    hidden = [c for c in of_kind if c.hidden > 0]
    seconds = sum(c.hidden * c.times for c in hidden)
    travels = sum(c.bytes for c in hidden)
    every = sum(c.bytes for c in of_kind)
    runs = sum(c.times for c in of_kind)
    needed = travels / seconds if hidden else 0.0
    hardest = max((c.received / c.hidden for c in hidden), default=0.0)
    return Total(kind, runs, every, every - travels, needed, seconds, hardest)
