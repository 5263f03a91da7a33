"""What a compiled program sends from device to device, read from the text of its optimized HLO."""

import math
import re
from itertools import groupby
from typing import NamedTuple

import numpy as np

from attnres_jax.bench import hlo
from attnres_jax.bench.cost import COLLECTIVES


class Message(NamedTuple):
    """One collective. `loops` are the trip counts of the loops around it, outermost first."""

    opcode: str
    shapes: tuple[hlo.Shape, ...]
    groups: tuple[tuple[int, ...], ...]
    """Devices that take part together; of a permute (source, target)."""
    loops: tuple[int, ...]
    place: int
    """How many loops have ended or begun before it, of those of the entry computation."""
    op_name: str

    @property
    def elements(self) -> int:
        """Of the results on one device."""
        return sum(shape.size for shape in self.shapes)

    def crosses(self, stage: np.ndarray) -> bool:
        """Whether devices of different stages take part; `stage` [devices] says which each is of."""
        return any(len({stage[device] for device in group}) > 1 for group in self.groups)


class Hops(NamedTuple):
    """What a stage sends to its neighbours in one tick, in each phase: forward only, both, backward only."""

    ticks: tuple[int, ...]
    units: tuple[float, ...]


def hops(found: list[Message], stage: np.ndarray, unit: int) -> Hops:
    """Of the permutes between stages; `unit` is the size of an activation [B,T,D] on one device.

    The phases are loops one after the other. XLA unrolls one of a single tick: it stands before or after.
    """
    sent = [m for m in found if m.opcode == "collective-permute" and m.crosses(stage)]
    phases = [list(phase) for _, phase in groupby(sent, key=lambda m: (m.place, m.loops))]
    assert all(len(phase[0].loops) <= 1 for phase in phases)
    ticks = tuple(sum(phase[0].loops) or 1 for phase in phases)
    return Hops(ticks, tuple(sum(m.elements for m in phase) / unit for phase in phases))


def messages(text: str, devices: int) -> list[Message]:
    """Every collective of `compiled.as_text()`, in the order they run."""
    module = hlo.parse(text)
    return list(_messages(module, module.entry, (), [0], devices))


def _messages(module, name, loops, place, devices):
    for i in module.computations[name].instructions.values():
        if i.opcode == "while":
            (body,) = i.called("body")
            if not loops:
                place[0] += 1
            yield from _messages(module, body, (*loops, hlo.trips(module, i)), place, devices)
        elif i.opcode in ("conditional", "call", "async-start"):
            keys = "branch_computations", "true_computation", "false_computation", "to_apply", "calls"
            for called in i.called(*keys):
                yield from _messages(module, called, loops, place, devices)
        elif i.opcode in COLLECTIVES:
            yield Message(i.opcode, i.shapes, _groups(i.attributes, devices), loops, place[0], i.op_name)
        elif i.opcode.removesuffix("-start") in COLLECTIVES:
            raise ValueError(f"{i.opcode}: written for compilers that do not part a collective")


def _groups(attributes, devices):
    """In each of the ways that XLA writes them."""
    listed = re.search(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,{}]*\})\}", attributes)
    if listed:
        found = re.findall(r"\{([\d,]+)\}", listed[1])
        return tuple(tuple(map(int, group.split(","))) for group in found)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        over = re.findall(r"'(\w+)'", named[2])
        assert math.prod(sizes.values()) == devices
        at = np.arange(devices).reshape(*sizes.values())
        at = np.moveaxis(at, [list(sizes).index(axis) for axis in over], range(-len(over), 0))
        return _rows(at, math.prod(sizes[axis] for axis in over))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if counted:
        at = np.arange(devices).reshape([int(n) for n in counted[3].split(",")])
        at = at.transpose([int(n) for n in counted[4].split(",")]) if counted[4] else at
        return _rows(at, int(counted[2]))
    if re.search(r"replica_groups=\{\}", attributes):
        return (tuple(range(devices)),)
    raise ValueError(f"no groups of devices in {attributes[:200]!r}")


def _rows(at, size):
    return tuple(tuple(row) for row in at.reshape(-1, size).tolist())
