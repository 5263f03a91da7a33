"""Bytes to and from HBM and FLOPs of each instruction of a scheduled program, and the least time they take.

How bytes are counted: an instruction reads its operands and writes its results, once each. What lies in
VMEM (`S(1)` in a layout) is free. Of an operand that is only sliced the slice is read; an update in place
reads and writes the slice. Of a Mosaic kernel a table says the bytes (its grid and BlockSpecs do); without
an entry its operands and results are counted whole. One that the compiler fused with what is around it counts
the same way, and the rest beside it. A loop's body counts as often as it runs; of a
conditional the mean of its branches. Tiles' padding, and operands that a matrix product reads more than once
because they do not fit VMEM, are not counted.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from attnres_jax.bench.hlo import BYTES, Computation, Module, Shape, matched, trips

FREE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "opt-barrier", "iota"),
    *("partition-id", "replica-id", "domain", "add-dependency"),
}
VIEWS = ("bitcast", "convert", "copy", "reshape", "transpose", "negate")  # of the slice only, in a fusion
SLICES = ("dynamic-slice", "slice", "gather")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Call(NamedTuple):
    """A call of a Mosaic kernel, as a program has it."""

    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    times: float
    """How often it runs in a step; above 1 in loops."""


class Cost(NamedTuple):
    """Bytes and FLOPs of one run."""

    read: float
    written: float
    flops: float


Kernel = Callable[[Call], Cost]
"""What a kernel costs: the compiler's text does not tell."""


class Row(NamedTuple):
    """One instruction; `times` is how often it runs in a step (a mean where branches are taken in turn)."""

    place: str
    name: str
    kind: str
    op_name: str
    read: float
    written: float
    flops: float
    times: float
    shapes: tuple[Shape, ...]
    """Of its operands and results, in any memory."""

    @property
    def bytes(self) -> float:
        """To and from HBM, over all its runs."""
        return (self.read + self.written) * self.times


class Chip(NamedTuple):
    """Of one device."""

    bytes_per_second: float
    flops_per_second: float


def rows(module: Module, kernels: Mapping[str, Kernel] | None = None) -> list[Row]:
    """Of every instruction that moves bytes or computes; `kernels` by the name given to `pallas_call`."""
    return list(_rows(module, module.entry, 1.0, kernels or {}))


def seconds(found: list[Row], chip: Chip) -> float:
    """Roofline time: each instruction as long as its FLOPs or its bytes take, one after the other."""
    return sum(row_seconds(row, chip) for row in found)


def row_seconds(row: Row, chip: Chip) -> float:
    """Roofline time of all runs of one instruction."""
    return max(row.flops * row.times / chip.flops_per_second, row.bytes / chip.bytes_per_second)


def _rows(module: Module, name: str, times: float, kernels: Mapping[str, Kernel]) -> Iterator[Row]:
    computation = module.computations[name]
    for i in computation.instructions.values():
        if i.opcode == "while":
            (body,) = i.called("body")
            yield from _rows(module, body, times * trips(module, i), kernels)
        elif i.opcode == "conditional":
            branches = i.called("branch_computations", "true_computation", "false_computation")
            for branch in branches:
                yield from _rows(module, branch, times / len(branches), kernels)
        elif i.opcode in ("call", "call-start", "async-start"):
            for called in i.called("to_apply", "calls"):
                yield from _rows(module, called, times, kernels)
        elif i.opcode not in FREE and not i.opcode.endswith("-done"):
            read, written, flops = _cost(module, computation, i, kernels, times)
            if read or written or flops:
                own = _kind(module, i), i.op_name, read, written, flops, times
                yield Row(name, i.name, *own, _shapes(computation, i))


def _shapes(computation, i):
    return tuple(s for o in i.operands for s in computation.instructions[o].shapes) + i.shapes


def _cost(module, computation, i, kernels, times):
    """(bytes read, bytes written, FLOPs) of one instruction that calls nothing but a fusion."""
    if i.opcode == "fusion":
        (called,) = i.called("calls")
        inner = module.computations[called]
        read, written = _fusion(module, computation, i, inner)
        own = [_custom(inner, k, kernels, times) for k in inner.instructions.values() if _is_kernel(k)]
        return (
            read + sum(cost.read for cost in own),
            written + sum(cost.written for cost in own),
            flops(module, inner) + sum(cost.flops for cost in own),
        )
    if i.opcode == "custom-call":
        return _custom(computation, i, kernels, times)
    if i.opcode in ("copy-start", "slice-start"):
        return *_moved(computation, i), 0
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        source = computation.instructions[i.operands[0]]
        return (i.hbm or i.shapes[0].bytes) if source.hbm else 0, i.hbm, 0
    if i.opcode in ("dynamic-update-slice", "scatter"):
        update = computation.instructions[i.operands[1 if i.opcode[0] == "d" else -1]]
        return update.hbm, update.shapes[0].bytes if i.hbm else 0, 0
    read = _read(computation, i)
    sourced = i.opcode in ("all-gather-start", "collective-permute-start")  # the result holds the source
    return read, i.hbm - read if sourced else i.hbm, _product(computation, i)


def _read(computation, i):
    return sum(computation.instructions[o].hbm for o in dict.fromkeys(i.operands))


def _moved(computation, i):
    """An asynchronous copy: its result holds destination and source (a slice: the source first)."""
    moved = i.shapes[1 if i.opcode == "slice-start" else 0]
    source = computation.instructions[i.operands[0]].shapes[0]
    return 0 if source.space else moved.bytes, moved.hbm


def _is_kernel(i):
    return i.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.attributes


def _custom(computation, i, kernels, times):
    if not _is_kernel(i):
        allocates = "AllocateBuffer" in i.attributes
        return Cost(0, 0, 0) if allocates else Cost(_read(computation, i), i.hbm, 0)
    operands = tuple(shape for o in i.operands for shape in computation.instructions[o].shapes)
    return kernels.get(kernel_name(i.name), whole)(Call(operands, i.shapes, times))


def whole(call: Call, flops: float = 0.0) -> Cost:
    """Operands and results, each once."""
    return Cost(sum(s.hbm for s in call.operands), sum(s.hbm for s in call.results), flops)


def kernel_name(instruction: str) -> str:
    """The name of a kernel from that of its call: the compiler appends `.7`."""
    return re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", instruction)


def _kind(module, i):
    if i.opcode == "custom-call":
        return "kernel"
    if any(i.opcode.startswith(name) for name in COLLECTIVES):
        return "collective"
    if i.opcode == "fusion":
        (called,) = i.called("calls")
        if any(map(_is_kernel, module.computations[called].instructions.values())):
            return "kernel"
        if flops(module, module.computations[called]):
            return "matmul"
        update = "dynamic-update-slice" in opcodes(module, called)
        return "update" if update else "fusion"
    names = {"dynamic-update-slice": "update", "copy-start": "copy", "convolution": "matmul", "dot": "matmul"}
    return names.get(i.opcode, "slice" if "slice" in i.opcode else i.opcode)


def opcodes(module: Module, name: str) -> set[str]:
    """Of all instructions of a computation and of the fusions in it."""
    found = set()
    for i in module.computations[name].instructions.values():
        found.add(i.opcode)
        for called in i.called("calls") if i.opcode == "fusion" else ():
            found |= opcodes(module, called)
    return found


def _fusion(module, computation, i, inner):
    """Bytes of a fusion, but for what a kernel in it reads and makes."""
    outside = [computation.instructions[o] for o in i.operands]
    read = sum(
        min(_used(module, inner, name), sum(s.size for s in o.shapes)) * BYTES[o.shapes[0].dtype]
        for name, o in zip(inner.parameters, outside, strict=True)
        if o.hbm
    )
    roots = _leaves(inner, inner.root)
    made = [(leaf, s) for leaf, s in zip(roots, i.shapes, strict=False) if s.hbm]
    return read, sum(_made(module, inner, leaf, s) for leaf, s in made if not _by_kernel(inner, leaf))


def _by_kernel(inner, i):
    """Whether a kernel in the fusion made this result, or what updates it."""
    source = {"get-tuple-element": 0, "bitcast": 0, "dynamic-update-slice": 1}.get(i.opcode)
    return _is_kernel(i) if source is None else _by_kernel(inner, inner.instructions[i.operands[source]])


def _used(module: Module, inner: Computation, name: str) -> float:
    """Elements of `name` that its users need; infinite where one needs all."""
    total = 0.0
    for user in inner.users(name):
        if _is_kernel(user):
            continue  # it says itself what it reads
        if user.opcode in VIEWS:
            total += _used(module, inner, user.name) if user.name != inner.root else math.inf
        elif user.opcode in SLICES and user.operands[0] == name:
            total += user.shapes[0].size
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            total += 0 if name not in user.operands[1:] else math.inf
        elif user.opcode == "fusion":
            nested = module.computations[user.called("calls")[0]]
            inside = zip(nested.parameters, user.operands, strict=True)
            total += sum(_used(module, nested, p) for p, o in inside if o == name)
        else:
            return math.inf
    return total


def _leaves(inner, name):
    """The instructions behind the arrays of a result."""
    i = inner.instructions[name]
    return [leaf for o in i.operands for leaf in _leaves(inner, o)] if i.opcode == "tuple" else [i]


def _made(module, inner, leaf, shape):
    """Bytes written of one result: the updates, where they are in place."""
    changed = _updated(module, inner, leaf.name)
    return shape.hbm if changed is None else min(changed * BYTES[shape.dtype], shape.hbm)


def _updated(module, inner, name):
    """Elements that differ from a parameter of the fusion which the result overwrites; None: all may."""
    i = inner.instructions[name]
    if i.opcode == "parameter":
        return 0 if name != inner.root else None
    if i.opcode == "bitcast":
        return _updated(module, inner, i.operands[0])
    if i.opcode == "dynamic-update-slice":
        before = _updated(module, inner, i.operands[0])
        update = inner.instructions[i.operands[1]].shapes[0].size
        return None if before is None else before + update
    if i.opcode == "fusion" and len(i.shapes) == 1:
        nested = module.computations[i.called("calls")[0]]
        return _updated(module, nested, nested.root)
    return None


def flops(module: Module, computation: Computation) -> float:
    """Of the matrix products in a computation, nested fusions included; elementwise work is not counted."""
    total = 0.0
    for i in computation.instructions.values():
        if i.opcode == "fusion":
            total += sum(flops(module, module.computations[name]) for name in i.called("calls"))
        total += _product(computation, i)
    return total


def _product(computation, i):
    if i.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (computation.instructions[o].shapes[0] for o in i.operands)
    if i.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        summed = math.prod(left.dims[int(a)] for a in axes[1].split(",")) if axes and axes[1] else 1
        return 2.0 * i.shapes[0].size * summed
    return _convolution(left.dims, right.dims, i.shapes[0].dims, i.attributes)


def _convolution(left, right, out, attributes):
    """2 x multiply-adds whose input is not padding: XLA:TPU writes batch axes as windows full of padding."""
    labels = matched(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    window = re.search(r"window=\{([^}]*)\}", attributes)
    window = dict(part.split("=") for part in window[1].split()) if window else {}
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    total = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    for n, axis in enumerate(sorted(set(labels[1]) - {"b", "f"})):
        sizes = left[labels[1].index(axis)], right[labels[2].index(axis)], out[labels[3].index(axis)]
        total *= _pairs(*sizes, n, window)
    return total / (int(groups[1]) if groups else 1)


def _pairs(size, kernel, out, axis, window):
    """How many (output, kernel) positions along one axis meet an input element."""

    def number(key, default):
        values = window[key].split("x") if key in window else []
        return values[axis] if values else default

    stride, base, step = (int(number(k, 1)) for k in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(str(number("pad", "0_0")).split("_")[0])
    at = np.add.outer(np.arange(out) * stride - low, np.arange(kernel) * step)
    return int(np.sum((at >= 0) & (at <= (size - 1) * base) & (at % base == 0)))
