"""The text of a compiled, scheduled HLO module as values: computations, instructions, shapes.

Only what counting needs is read: opcode, operands, shapes with their memory space, attributes as text.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {
    **{"token": 0.0, "s4": 0.5, "u4": 0.5, "pred": 1.0, "s8": 1.0, "u8": 1.0, "f8e4m3fn": 1.0, "f8e5m2": 1.0},
    **{"s16": 2.0, "u16": 2.0, "f16": 2.0, "bf16": 2.0, "s32": 4.0, "u32": 4.0, "f32": 4.0},
    **{"s64": 8.0, "u64": 8.0, "f64": 8.0, "c64": 8.0},
}
_SHAPE = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?")
_START = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)", re.DOTALL)
_BODY = re.compile(r"(\(.*?\)|\S+) ([\w\-]+)\((.*)", re.DOTALL)
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")


class Shape(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    space: int
    """Memory space of the layout: 0 is HBM; 1 is VMEM, the others small memories on the chip."""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Without the padding of tiles."""
        return self.size * BYTES[self.dtype]

    @property
    def hbm(self) -> float:
        """Bytes if it lies in HBM, else 0."""
        return 0.0 if self.space else self.bytes


class Instruction(NamedTuple):
    """One line of a computation; a tuple's shapes are flattened."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def hbm(self) -> float:
        """Bytes of the result that lie in HBM."""
        return sum((shape.hbm for shape in self.shapes), 0.0)

    @property
    def op_name(self) -> str:
        """Where JAX made it: named scopes and primitives, "" where the compiler did."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *keys: str) -> list[str]:
        """Names of the computations under attributes `keys`, such as "calls" or "body"."""
        found = []
        for key in keys:
            for braces, single in re.findall(rf"\b{key}=(?:\{{([^}}]*)\}}|%([\w.\-]+))", self.attributes):
                found += re.findall(r"%([\w.\-]+)", braces) if braces else [single]
        return found


class Computation(NamedTuple):
    """Instructions by name, in the order they run."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def users(self, name: str) -> Iterator[Instruction]:
        """The instructions that take `name`."""
        return (i for i in self.instructions.values() if name in i.operands)

    @property
    def parameters(self) -> list[str]:
        """Their names, in order."""
        found = {i.attributes: i.name for i in self.instructions.values() if i.opcode == "parameter"}
        return [found[key] for key in sorted(found, key=int)]


class Module(NamedTuple):
    """A whole program."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`.

    Raises:
      ValueError: where there is no entry computation.
    """
    computations, entry, lines, name = {}, None, [], ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line.startswith("}") and not line.startswith("}}") and name:
            computations[name], name = _computation(name, lines), ""
        elif name and _START.match(line):
            lines.append(line)
        elif name and lines:
            lines[-1] += line  # attributes may hold line breaks
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return Module(computations, entry)


def matched(pattern: str | re.Pattern[str], text: str) -> re.Match[str]:
    """What `pattern` finds in `text`.

    Raises:
      ValueError: where it finds nothing: not the text that this was written for.
    """
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in {text[:200]!r}")
    return found


def _computation(name, lines):
    found, root = {}, ""
    for line in lines:
        start = matched(_START, line)
        instruction = _instruction(start[2], start[3])
        found[instruction.name] = instruction
        root = instruction.name if start[1] else root
    resolved = {i.name: i._replace(operands=_resolved(i.operands, found)) for i in found.values()}
    return Computation(name, resolved, root)


def _instruction(name, text):
    body = matched(_BODY, text)
    inside, _, attributes = body[3].partition(")")
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    kept = inside if body[2] in ("parameter", "constant") else attributes
    return Instruction(name, tuple(shapes(body[1])), body[2], operands, kept)


def _resolved(operands, known):
    """A kernel's operands carry the names of its refs behind their own: `%fusion.7.q_ref`."""
    return tuple(o if o in known else o.rpartition(".")[0] for o in operands)


def shapes(text: str) -> Iterator[Shape]:
    """The arrays of a type, a tuple's in order."""
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        yield Shape(dtype, tuple(map(int, filter(None, dims.split(",")))), int(space[1]) if space else 0)


def trips(module: Module, loop: Instruction) -> int:
    """How often a `while` runs: its known trip count, or the constant that its counter is compared with.

    Raises:
      ValueError: where neither is there.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    (condition,) = loop.called("condition")
    limits = [
        int(i.attributes)
        for i in module.computations[condition].instructions.values()
        if i.opcode == "constant" and i.attributes.isdecimal()
    ]
    if len(limits) != 1:
        raise ValueError(f"cannot tell how often {loop.name} runs: its condition has constants {limits}")
    return limits[0]
