"""The loop over depth: `through_depth` for stacked layers, `start` for a model that loops itself.

Blocks that repeat are compiled once (`append_scan`), and inside a block what repeats is scanned too. Kept for
the backward pass: the stream before each sublayer and the block summaries, one [B,T,D] each; all else
is recomputed under the caller's checkpoint policy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from attnres_jax.autodiff import append_scan, reverse_only
from attnres_jax.depth import Rows
from attnres_jax.placement import Placement
from attnres_jax.residuals.base import Mix, PyTree, Read, Scheme

policies = jax.checkpoint_policies


class Layer(NamedTuple):
    """The layers of one kind, stacked: leaves of `params` and `inputs` are [n, ...], n layers of the kind.

    `norm(params, h) -> x` is the pre-norm; `apply(params, x, inputs) -> (y, aux)` the function of the normed
    input. `inputs` are per-layer values (caches, keys); `aux` is any pytree (losses, caches).
    """

    norm: Callable[[PyTree, Array], Array]
    apply: Callable[[PyTree, Array, PyTree], tuple[Array, PyTree]]
    params: PyTree
    inputs: PyTree = None


class Record(NamedTuple):
    """What analysis needs of one forward pass; l runs over the reads, L + 1 with the output read."""

    outputs: Float[Array, "L1 B T D"]
    """v_0 (the embedding), v_1 .. v_L (outputs of the sublayers)."""
    mixtures: Float[Array, "L1 B T D"]
    """h_l, before the pre-norm."""
    weights: tuple[Float[Array, "_ B T"], ...]
    """Of the sources of each read, as `scheme.sources` names them."""


class DepthOutput(NamedTuple):
    """`h` feeds the final norm; `aux` is stacked by kind, in order of depth; `record` if asked for."""

    h: Float[Array, "B T D"]
    aux: dict[str, PyTree]
    record: Record | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["mix", "history", "slots", "stream"],
    meta_fields=["scheme", "sublayers", "at"],
)
@dataclass(frozen=True)
class Depth:
    """Where a forward pass is: before sublayer `at` (from 0) of `sublayers`. A value, never mutated."""

    scheme: Scheme
    sublayers: int
    at: int
    mix: Mix
    history: PyTree
    slots: tuple = ()  # of the sublayers of this block that are still to come
    stream: PyTree = None

    def read(self, norm: Callable[[Array], Array] = lambda h: h) -> Read:
        """The input of the next sublayer: `.x`, which has passed `norm` if one is given."""
        self._check(self.slots, "call finish()")
        return self.scheme.read(self.slots[0], self.history, self.stream, norm)

    def write(self, y: Float[Array, "B T D"]) -> "Depth":
        """After the sublayer's output `y`; closes its block when it was the last of it."""
        self._check(self.slots, "one more wrote")
        stream = self.scheme.write(self.slots[0], self.stream, y)
        after = replace(self, at=self.at + 1, slots=self.slots[1:], stream=stream)
        return (
            after if after.slots else replace(after, history=self.scheme.close(self.history, stream))._open()
        )

    def finish(self) -> Read:
        """The output read, which the final norm and the head take."""
        self._check(not self.slots, "too early to finish")
        return self.scheme.finish(self.mix.output, self.history)

    def _open(self):
        if self.at == self.sublayers:
            return replace(self, stream=None)
        schedule = self.scheme.schedule(self.sublayers)
        size = schedule.sizes[schedule.openings.index(self.at)]
        stacked, history = self.scheme.open(_cut(self.mix.sublayers, self.at, size), self.history)
        slots = tuple(jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(size))
        return replace(self, history=history, slots=slots, stream=self.scheme.begin(history))

    def _check(self, holds, problem):
        if not holds:
            raise ValueError(f"{self.at} of {self.sublayers} sublayers are written: {problem}")


def start(scheme: Scheme, mix: Mix, sublayers: int, x: Float[Array, "B T D"]) -> Depth:
    """Begin a forward pass over `sublayers` L sublayers from the embedding `x`; blocks are unrolled."""
    _check_mix(scheme, mix, sublayers, x)
    return Depth(scheme, sublayers, 0, mix, scheme.start(x))._open()


def through_depth(
    scheme: Scheme,
    mix: Mix,
    kinds: str,
    layers: dict[str, Layer],
    x: Float[Array, "B T D"],
    *,
    policy: Callable[..., Any] | None = None,
    implementation: str | None = None,
    placement: Placement | None = None,
    record: bool = False,
) -> DepthOutput:
    """Run the sublayers that `kinds` spells (one letter each) over `x`, mixed over depth by `scheme`.

    Args:
      policy: what a sublayer keeps for the backward pass, of `jax.checkpoint_policies`; None keeps nothing.
      implementation: of the ops (`ops.choose`). "reference" is also literal here: one phase, unrolled,
        no checkpoint, plain autodiff, so that forward mode, higher orders and fp64 work.
      placement: where activations lie on a mesh; reads then run on each device's own tokens.
      record: also return `Record`; literal and unrolled, for analysis.

    Raises:
      ValueError: where kinds, layers, mix and x do not fit together.
    """
    _check_layers(kinds, layers)
    _check_mix(scheme, mix, len(kinds), x)
    scheme = replace(scheme, implementation=implementation, placement=placement)
    if placement:
        x, layers = placement.leave(x), {k: _placed(layer, placement) for k, layer in layers.items()}
    if record or implementation == "reference":
        return _literal(scheme.literal(), mix, kinds, layers, x, record)
    shares = {k: (layer.params, layer.inputs) for k, layer in layers.items() if k in kinds}
    mix, shares, x = reverse_only((mix, shares, x))
    return _scanned(scheme, mix, kinds, layers, shares, x, policy or policies.nothing_saveable)


def _placed(layer, placement):
    def apply(params, x, inputs):
        y, aux = layer.apply(params, placement.enter(x), inputs)
        return placement.leave(y), aux

    return layer._replace(apply=apply)


def _literal(scheme, mix, kinds, layers, x, record):
    depth, aux, reads, outputs = start(scheme, mix, len(kinds), x), {k: [] for k in kinds}, [], [x]
    for l, kind in enumerate(kinds):
        layer, i = layers[kind], kinds[:l].count(kind)
        params, inputs = jax.tree.map(lambda a, i=i: a[i], (layer.params, layer.inputs))
        reads.append(depth.read(partial(layer.norm, params)))
        y, extra = layer.apply(params, reads[-1].x, inputs)
        depth = depth.write(y)
        outputs.append(y)
        aux[kind].append(extra)
    reads.append(depth.finish())
    mixtures, aux = [read.mixture for read in reads], {k: _stack(extras) for k, extras in aux.items()}
    weights = tuple(read.weights for read in reads)
    recorded = Record(jnp.stack(outputs), jnp.stack(mixtures), weights) if record else None
    return DepthOutput(mixtures[-1], aux, recorded)


def _scanned(scheme, mix, kinds, layers, shares, x, policy):
    """Equal consecutive blocks in one scan, the others one by one; every block under `jax.checkpoint`."""
    keep = policies.save_from_both_policies(policies.save_only_these_names("stream"), policy)
    run = partial(_block, scheme, layers, policy)
    history, at, parts, whole = scheme.start(x), 0, [], (mix.sublayers, shares)
    for blocks, reps in runs(_spell(kinds, scheme.schedule(len(kinds)))):
        scan = reps > 1 and scheme.append_only
        for some, times in [(blocks, reps)] if scan else [([b], 1) for b in blocks * reps]:
            own = partial(_own, kinds, at, "".join(some) * times)
            if scan:
                history, aux = _repeat(run, some, times, keep, own(whole), history)
            else:
                history, aux = _once(scheme, run, some[0], keep, own, whole, history)
            parts.append(aux)
            at += len("".join(some)) * times
    finish = jax.checkpoint(lambda mix, history: scheme.finish(mix, history).mixture)
    return DepthOutput(finish(mix.output, history), _join(parts), None)


def _repeat(run, blocks, reps, keep, own, history):
    """`reps` times the same blocks over an append-only history: one body, one array of rows."""

    def step(block, rows, n, own):
        (_, new), aux = run(block, (Rows(rows, n),), own)
        return new.array, aux

    def split(own):
        places = accumulate(map(len, blocks), initial=0)
        return [_own("".join(blocks), at, b, own) for at, b in zip(places, blocks, strict=False)]

    rows = jnp.concatenate([r.array for r in history])
    steps = [jax.checkpoint(partial(step, b), policy=keep, prevent_cse=False) for b in blocks]
    rows, aux = append_scan(steps, split, len(rows), rows, _fold(own, reps))
    return (Rows(rows),), _unfold(_join(aux, 1))


def _once(scheme, run, block, keep, own, whole, history):
    """A block as it is. Sliced inside the checkpoint, so that no copy of the parameters is kept; what an
    append-only history already held is not an output, or it would be kept twice."""
    held = len(history) if scheme.append_only else 0

    def new(history, whole):
        after, aux = run(block, history, own(whole))
        return after[held:] if held else after, aux

    after, aux = jax.checkpoint(new, policy=keep)(history, whole)
    return (*history, *after) if held else after, aux


def _block(scheme, layers, policy, kinds, history, own):
    """One block, opened on all that is completed. Returns the history and aux."""
    mix, shares = own
    slots, history = scheme.open(mix, history)
    stream, aux = _sublayers(scheme, layers, policy, kinds, slots, shares, history)
    return scheme.close(history, stream), aux


def _sublayers(scheme, layers, policy, kinds, slots, shares, history):
    """The sublayers of one block: what repeats is scanned. The stream before each is what is kept."""

    def sublayer(j, kind, i, slots, shares, history, stream):
        slot, (params, inputs) = jax.tree.map(lambda a: a[j], slots), jax.tree.map(lambda a: a[i], shares)
        read = scheme.read(slot, history, stream, partial(layers[kind].norm, params))
        y, aux = layers[kind].apply(params, read.x, inputs)
        return scheme.write(slot, stream, y), aux

    def body(period, first, stream, xs):
        slots, shares = xs
        aux = {k: [] for k in period}
        for j, kind in enumerate(period):
            f = partial(sublayer, j, kind, period[:j].count(kind))
            step = jax.checkpoint(f, policy=policy, prevent_cse=False)
            kept = stream if first and j == 0 else _keep(stream)
            stream, extra = step(slots, shares[kind], history, kept)
            aux[kind].append(extra)
        return stream, {k: _stack(extras) for k, extras in aux.items()}

    stream, at, parts = scheme.begin(history), 0, []
    for period, reps in runs(kinds):
        own = _own(kinds, at, period * reps, (slots, shares))
        if reps == 1:
            stream, aux = body(period, at == 0, stream, own)
        else:
            stream, aux = lax.scan(partial(body, period, False), stream, _fold(own, reps))
            aux = _unfold(aux)
        parts.append(aux)
        at += len(period) * reps
    return stream, _join(parts)


def runs(seq: Any) -> Iterator[tuple[Any, int]]:
    """Spell `seq` as periods and how often each repeats: "bkmkm" -> ("b", 1), ("km", 2)."""

    def repeats(p):
        return next(r for r in range(1, len(seq) + 1) if seq[r * p : (r + 1) * p] != seq[:p])

    while seq:
        # The fewest bodies: a period's, and one for each sublayer that its repeats leave over.
        bodies = {p: p + len(seq) - p * repeats(p) for p in range(1, len(seq)) if repeats(p) > 1}
        period = min(bodies, key=lambda p: (bodies[p], p)) if bodies else 1
        yield seq[:period], repeats(period)
        seq = seq[period * repeats(period) :]


def _spell(kinds, schedule):
    return [kinds[o : o + s] for o, s in zip(schedule.openings, schedule.sizes, strict=True)]


def _own(kinds, at, span, whole):
    """Of (leaves [L, ...], kind -> leaves [n, ...]), those of the sublayers `kinds[at : at + len(span)]`."""
    each, by_kind = whole
    return _cut(each, at, len(span)), {
        k: _cut(by_kind[k], kinds[:at].count(k), span.count(k)) for k in sorted(set(span))
    }


def _cut(tree, at, size):
    return jax.tree.map(lambda a: a[at : at + size], tree)


def _fold(tree, reps):
    return jax.tree.map(lambda a: a.reshape(reps, -1, *a.shape[1:]), tree)


def _unfold(tree):
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)


def _stack(trees):
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def _join(parts, axis=0):
    """Aux of consecutive spans, by kind, along the axis of layers."""
    kinds = sorted({k for part in parts for k in part})
    by_kind = {k: [part[k] for part in parts if k in part] for k in kinds}
    return {k: jax.tree.map(lambda *a: jnp.concatenate(a, axis), *v) for k, v in by_kind.items()}


def _keep(stream):
    return jax.tree.map(lambda a: checkpoint_name(a, "stream"), stream)


def _check_layers(kinds, layers):
    if not kinds:
        raise ValueError("kinds is empty: spell at least one sublayer, such as 'am'")
    for kind in sorted(set(kinds)):
        if kind not in layers:
            known = ", ".join(map(repr, sorted(layers)))
            raise ValueError(f"kinds spells {kind!r}, which layers does not have (it has {known})")
        for path, leaf in jax.tree.leaves_with_path((layers[kind].params, layers[kind].inputs)):
            if jnp.shape(leaf)[:1] != (kinds.count(kind),):
                raise ValueError(
                    f"layers[{kind!r}] leaf {jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}: its "
                    f"first axis must be {kinds.count(kind)}, how often {kind!r} stands in kinds"
                )


def _check_mix(scheme, mix, sublayers, x):
    if jnp.ndim(x) != 3:
        raise ValueError(f"x must be [batch, time, width], got shape {jnp.shape(x)}")
    want = jax.eval_shape(lambda: scheme.init(sublayers, x.shape[-1]))
    if jax.tree.map(jnp.shape, mix) != jax.tree.map(jnp.shape, want):
        raise ValueError(
            f"mix has shapes {jax.tree.map(jnp.shape, mix)}, but {scheme} over {sublayers} sublayers of "
            f"width {x.shape[-1]} has {jax.tree.map(jnp.shape, want)}"
        )
