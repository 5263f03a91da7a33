"""What the residual stream of a scheme moves, counted from its own verbs, beside the paper's Table 1.

The rule: one kernel runs between two sublayers. It takes the output y of the one and what the scheme keeps,
and makes the input h of the other and what is kept then: `write`, where a block ends `close`, `open` and
`begin`, then `read`. It reads each input once, of one that it slices the slices, and writes each result that
is new and that a later kernel or the sublayer takes. Counted are arrays as wide as the stream, of one token,
in units of D, over the L + 1 kernels of a forward pass, and divided by L. Parameters, coefficients,
statistics and norms are not: so the plain residual is 3, two reads and a write, as in the table.

Where the table differs: mHC's 8m + 2 is of a kernel for each of its equations; Full's S + N and Block's
N / S + 5 are of two phases, S the dispatch unit, which read a source twice, as key and as value, and leave
out that Phase 1's results are written. A window is counted as Full: here its reads mask what is outside.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from rich.console import Console
from rich.table import Table

from attnres_jax import residuals
from attnres_jax.analysis import made, ranks
from attnres_jax.depth import Rows
from attnres_jax.models.transformer import ModelConfig
from attnres_jax.residuals.base import Scheme
from attnres_jax.spelling import cut

INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
OPAQUE = ("scan", "while", "cond")
SLICES = ("slice", "dynamic_slice", "gather")
SAME = ("reshape", "squeeze", "copy", "convert_element_type", "broadcast_in_dim", "reduce_sum")
NEUTRAL = {"mul": 1.0, "add": 0.0, "add_any": 0.0}


def table_1(name: str, block_size: int, sublayers: int, streams: int) -> float | None:
    """The paper's number, in D; None where it has none. Full has two phases, dispatch unit `block_size`."""
    S, N, m = block_size, sublayers / block_size, streams
    return {"plain": 3.0, "mhc": 8.0 * m + 2, "full": S + N, "block": N / S + 5}.get(name)


class Moved(NamedTuple):
    """Of a sublayer and token, in units of D."""

    read: float
    written: float

    @property
    def total(self) -> float:
        """Both."""
        return self.read + self.written


@dataclass(eq=False)
class Node:
    """A value inside a kernel: its size in units of D, what it is made of, the number that it is if any."""

    size: float
    made_of: Sequence["Node"] = ()
    sliced: bool = False
    constant: float | None = None
    slices: list["Node"] = field(default_factory=list)


class Kernel(NamedTuple):
    """Between two sublayers: what is kept before, y, h, and what is kept after."""

    kept: list[Node]
    y: Node
    h: Node
    after: list[Node]
    groups: list[list[int]]
    """Of `after`, what the next kernel has as one array: rows, or L of them would be traced L times."""


def moved(scheme: Scheme, sublayers: int) -> Moved:
    """Reads and writes of the residual stream, the mean over `sublayers` L sublayers."""
    kernels, needed, read, written = _kernels(scheme, sublayers), set(), 0.0, 0.0
    for kernel in reversed(kernels):
        wanted = {at for group in needed for at in kernel.groups[group]}
        results = [kernel.h, *(kernel.after[at] for at in sorted(wanted))]
        inputs = {id(node) for node in (*kernel.kept, kernel.y)}
        reached, used = _reached(results)
        read += sum(_read(node, used) for node in (*kernel.kept, kernel.y) if node.constant is None)
        new = {id(node): node for node in map(_whole, results)}
        written += sum(n.size for n in new.values() if n.constant is None and id(n) not in inputs)
        needed = {at for at, node in enumerate(kernel.kept) if id(node) in reached}
    return Moved(read / sublayers, written / sublayers)


def report(config: ModelConfig, out: Path | None) -> None:
    """Print the table of all schemes at the sizes of `config`; with `out` also write it, as markdown, and
    ranks.md beside it."""
    header = ["residual", "reads", "writes", "counted", "Table 1"]
    rows = [_row(replace(config, residual=name)) for name in residuals.SCHEMES]
    title = (
        f"Residual stream of a token and sublayer, in D: L = {config.sublayers} sublayers, "
        f"S = {config.block_size}, m = {config.streams}"
    )
    rich = Table(*header, title=title)
    for row in rows:
        rich.add_row(*row)
    Console().print(rich)
    if out:
        lines = [" | ".join(cells) for cells in (header, ["---", *["---:"] * 4], *rows)]
        head = f"`{made.typed()}`, page of commit {made.commit()}."
        text = [
            f"# {title}",
            "",
            f"{head} Ranks of M: [ranks](ranks.md).",
            "",
            *(f"| {line} |" for line in lines),
            "",
            str(__doc__).strip(),
        ]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(text) + "\n")
        ranks.write(out.with_name("ranks.md"), head)


def _row(config):
    found, name = moved(config.scheme, config.sublayers), config.residual
    formula = table_1(name, config.block_size, config.sublayers, config.streams)
    numbers = [f"{n:.2f}" for n in (found.read, found.written, found.total)]
    return [name, *numbers, "" if formula is None else f"{formula:g}"]


def _read(node, used):
    """All of it, or the slices of it, if only these are used; nothing, if it is handed on at most."""
    if id(node) in used:
        return node.size
    return min(node.size, sum(_read(part, used) for part in node.slices))


def _whole(node):
    """What a slice was cut from: it lies in memory already."""
    while node.sliced:
        (node,) = node.made_of
    return node


def _reached(results):
    """Ids of all nodes that `results` need, and of those that something is computed from."""
    reached, used, todo = set(), set(), list(results)
    while todo:
        node = todo.pop()
        if id(node) in reached:
            continue
        reached.add(id(node))
        used |= set() if node.sliced else {id(n) for n in node.made_of}
        todo += node.made_of
    return reached, used


def _kernels(scheme, sublayers):
    width = 1009 * getattr(scheme, "heads", 1)  # no other axis is as long
    scheme = replace(scheme, implementation="reference")
    mix = jax.eval_shape(lambda: scheme.init(sublayers, width))
    y, schedule = jax.ShapeDtypeStruct((1, 1, width), "float32"), scheme.schedule(sublayers)
    starts = dict(zip(schedule.openings, schedule.sizes, strict=True))
    kernels, kept, slots, nodes, begun = [], y, None, [Node(1.0)], 0

    def between(l, kept, y, slots, mix):
        """The kernel before sublayer `l`; before the first one `kept` is the embedding."""
        ends = l in starts or l == sublayers
        history, stream = kept if l else (scheme.start(kept), None)
        if l:
            stream = scheme.write(_at(slots, l - 1 - begun), stream, y)
            history = scheme.close(history, stream) if ends else history
        if l == sublayers:
            return scheme.finish(mix.output, history).x, (), ()
        if ends:
            slots, history = scheme.open(cut(mix.sublayers, l, starts[l]), history)
            stream = scheme.begin(history)
        read = scheme.read(_at(slots, 0 if ends else l - begun), history, stream, lambda h: h)
        return read.x, (read.history, read.stream), slots

    for l in range(sublayers + 1):
        jaxpr, out = jax.make_jaxpr(partial(between, l), return_shape=True)(kept, y, slots, mix)
        of_y, rest = Node(float(l > 0)), len(jax.tree.leaves((slots, mix)))
        results = _trace(jaxpr, [*nodes, of_y, *[Node(0.0) for _ in range(rest)]], width)
        _, kept, slots = out
        after = results[1 : 1 + len(jax.tree.leaves(kept))]
        kept, groups = _joined(kept)
        kernels.append(Kernel(nodes, of_y, results[0], after, groups))
        nodes = [_again([after[at] for at in group]) for group in groups]
        begun = l if l in starts else begun
    return kernels


def _joined(kept):
    """Rows of a history as one array; and of each array which ones it was."""

    def is_rows(node):
        return isinstance(node, tuple) and node != () and all(isinstance(rows, Rows) for rows in node)

    groups, at, found = [], 0, []
    nodes, structure = jax.tree.flatten(kept, is_leaf=is_rows)
    for node in nodes:
        arrays = jax.tree.leaves(node)
        groups.append([*range(at, at + len(arrays))])
        at += len(arrays)
        if is_rows(node):
            node = (Rows(jax.eval_shape(lambda *a: jnp.concatenate(a), *arrays)),)
        found.append(node)
    return structure.unflatten(found), groups


def _again(nodes):
    """What was made, as the input of the next kernel."""
    constant = nodes[0].constant if len(nodes) == 1 else None
    return Node(sum(node.size for node in nodes), constant=constant)


def _at(slots, j):
    return jax.tree.map(lambda a: a[j], slots)


def _trace(closed, inputs, width):
    """The nodes of the results of a jaxpr, given those of its inputs; calls are looked into."""
    jaxpr = closed.jaxpr if hasattr(closed, "jaxpr") else closed
    nodes = dict(zip(jaxpr.invars, inputs, strict=True)) | {v: Node(0.0) for v in jaxpr.constvars}

    def node(a):
        if isinstance(a, Literal):
            return Node(0.0, constant=float(a.val) if jnp.ndim(a.val) == 0 else math.nan)
        return nodes[a]

    for eqn in jaxpr.eqns:
        args, name = [node(a) for a in eqn.invars], eqn.primitive.name
        inner = [eqn.params[key] for key in INNER if key in eqn.params and name not in OPAQUE]
        if inner:
            made = _trace(inner[0], args, width)
        elif name == "optimization_barrier":
            made = args
        else:
            made = [_made(name, args, v.aval.shape, width) for v in eqn.outvars]
        nodes |= dict(zip(eqn.outvars, made, strict=True))
    return [node(v) for v in jaxpr.outvars]


def _made(name, args, shape, width):
    """The node of an operation's result; what a compiler would leave out, times one or plus zero, is none."""
    size = math.prod(shape) / width if shape[-1:] == (width,) else 0.0
    kept = [a for a in args if name in SAME or a.constant != NEUTRAL.get(name)]
    if name in (*SAME, *NEUTRAL) and len(kept) == 1 and kept[0].size == size:
        return kept[0]
    if name in SLICES and args[0].size:
        made = Node(size, args[:1], sliced=True, constant=args[0].constant)
        args[0].slices.append(made)
        return made
    known = [a.constant for a in args]
    constant = None if None in known else known[0] if name in SAME else math.nan
    return Node(size, args, constant=constant)
