"""The loop over depth: `through_depth` for stacked layers, `start` for a model that loops itself.

Blocks that repeat are compiled once (`append_scan`), and inside a block what repeats is scanned too. Kept for
the backward pass: the stream before each sublayer and the block summaries, one [B,T,D] each; all else
is recomputed under the caller's checkpoint policy.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from attnres_jax.autodiff import append_scan, reverse_only
from attnres_jax.depth import Rows
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
    slots: PyTree
    stream: PyTree

    def read(self, norm: Callable[[Array], Array] = lambda h: h) -> Read:
        """The input of the next sublayer."""
        if self.at >= self.sublayers:
            raise ValueError(f"all {self.sublayers} sublayers are written: call finish()")
        return self.scheme.read(self._slot(), self.history, self.stream, norm)

    def write(self, y: Float[Array, "B T D"]) -> "Depth":
        """After the sublayer's output `y`; closes its block when it was the last of it."""
        if self.at >= self.sublayers:
            raise ValueError(
                f"this model was started with {self.sublayers} sublayers; one more wrote"
            )
        stream = self.scheme.write(self._slot(), self.stream, y)
        schedule, after = self.scheme.schedule(self.sublayers), self.at + 1
        if after < self.sublayers and after not in schedule.openings:
            return replace(self, stream=stream, at=after)
        return replace(self, history=self.scheme.close(self.history, stream), at=after)._opened()

    def finish(self) -> Read:
        """The output read, which the final norm and the head take."""
        if self.at < self.sublayers:
            raise ValueError(
                f"{self.at} of {self.sublayers} sublayers are written: too early to finish"
            )
        return self.scheme.finish(self.mix.output, self.history)

    def _opened(self):
        if self.at == self.sublayers:
            return replace(self, slots=None, stream=None)
        schedule = self.scheme.schedule(self.sublayers)
        size = schedule.sizes[schedule.openings.index(self.at)]
        slots, history = self.scheme.open(_cut(self.mix.sublayers, self.at, size), self.history)
        return replace(self, slots=slots, history=history, stream=self.scheme.begin(history))

    def _slot(self):
        schedule = self.scheme.schedule(self.sublayers)
        opening = max(o for o in schedule.openings if o <= self.at)
        return jax.tree.map(lambda a: a[self.at - opening], self.slots)


def start(scheme: Scheme, mix: Mix, sublayers: int, x: Float[Array, "B T D"]) -> Depth:
    """Begin a forward pass over `sublayers` L sublayers from the embedding `x`; blocks are unrolled."""
    _check_mix(scheme, mix, sublayers, x)
    return Depth(scheme, sublayers, 0, mix, scheme.start(x), None, None)._opened()


def through_depth(
    scheme: Scheme,
    mix: Mix,
    kinds: str,
    layers: dict[str, Layer],
    x: Float[Array, "B T D"],
    *,
    policy: Callable[..., Any] | None = None,
    implementation: str | None = None,
    record: bool = False,
) -> DepthOutput:
    """Run the sublayers that `kinds` spells (one letter each) over `x`, mixed over depth by `scheme`.

    Args:
      policy: what a sublayer keeps for the backward pass, of `jax.checkpoint_policies`; None keeps nothing.
      implementation: of the ops (`ops.choose`). "reference" is also literal here: one phase, unrolled,
        no checkpoint, plain autodiff, so that forward mode, higher orders and fp64 work.
      record: also return `Record`; literal and unrolled, for analysis.

    Raises:
      ValueError: where kinds, layers, mix and x do not fit together.
    """
    _check_layers(kinds, layers)
    _check_mix(scheme, mix, len(kinds), x)
    scheme = replace(scheme, implementation=implementation)
    if record or implementation == "reference":
        return _literal(scheme.literal(), mix, kinds, layers, x, record)
    shares = {k: (layer.params, layer.inputs) for k, layer in layers.items() if k in kinds}
    mix, shares, x = reverse_only((mix, shares, x))
    return _scanned(scheme, mix, kinds, layers, shares, x, policy or policies.nothing_saveable)


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
    aux = {k: _stack(extras) for k, extras in aux.items()}
    return DepthOutput(reads[-1].mixture, aux, _record(outputs, reads) if record else None)


def _record(outputs, reads):
    mixtures = jnp.stack([read.mixture for read in reads])
    return Record(jnp.stack(outputs), mixtures, tuple(read.weights for read in reads))


def _scanned(scheme, mix, kinds, layers, shares, x, policy):
    """Equal consecutive blocks in one scan, the others one by one; every block under `jax.checkpoint`."""
    keep = policies.save_from_both_policies(policies.save_only_these_names("stream"), policy)
    run = partial(_blocks, scheme, layers, policy)
    history, at, parts, whole = scheme.start(x), 0, [], (mix.sublayers, shares)
    for blocks, reps in runs(_spell(kinds, scheme.schedule(len(kinds)))):
        scan = reps > 1 and scheme.append_only
        for some, times in [(blocks, reps)] if scan else [([b], 1) for b in blocks * reps]:
            own = partial(_own, kinds, at, "".join(some) * times)
            if scan:
                history, aux = _repeat(run, some, times, keep, own(whole), history)
            else:
                history, aux = _once(scheme, run, some, keep, own, whole, history)
            parts.append(aux)
            at += len("".join(some)) * times
    finish = jax.checkpoint(lambda mix, history: scheme.finish(mix, history).mixture)
    return DepthOutput(finish(mix.output, history), _join(parts), None)


def _repeat(run, blocks, reps, keep, own, history):
    """`reps` times the same blocks over an append-only history: one body, one array of rows."""

    def step(rows, n, own):
        history, aux = run(blocks, (Rows(rows, n),), own)
        return jnp.concatenate([r.array for r in history[1:]]), aux

    rows = jnp.concatenate([r.array for r in history])
    step = jax.checkpoint(step, policy=keep, prevent_cse=False)
    rows, aux = append_scan(step, len(rows), reps * len(blocks), rows, _fold(own, reps))
    return (Rows(rows),), _unfold(aux)


def _once(scheme, run, blocks, keep, own, whole, history):
    """Blocks as they are. Sliced inside the checkpoint, so that no copy of the parameters is kept; what an
    append-only history already held is not an output, or it would be kept twice."""
    held = len(history) if scheme.append_only else 0

    def new(history, whole):
        after, aux = run(blocks, history, own(whole))
        return after[held:] if held else after, aux

    after, aux = jax.checkpoint(new, policy=keep)(history, whole)
    return (*history, *after) if held else after, aux


def _blocks(scheme, layers, policy, blocks: Sequence[str], history, own):
    """Consecutive blocks, each opened on all that is completed. Returns the history and stacked aux."""
    kinds, at, parts = "".join(blocks), 0, []
    for block in blocks:
        mix, shares = _own(kinds, at, block, own)
        slots, history = scheme.open(mix, history)
        stream, aux = _block(scheme, layers, policy, block, slots, shares, history)
        history = scheme.close(history, stream)
        parts.append(aux)
        at += len(block)
    return history, _join(parts)


def _block(scheme, layers, policy, kinds, slots, shares, history):
    """The sublayers of one block: what repeats is scanned. The stream before each is what is kept."""

    def sublayer(j, kind, i, slots, shares, history, stream):
        slot, (params, inputs) = (
            jax.tree.map(lambda a: a[j], slots),
            jax.tree.map(lambda a: a[i], shares),
        )
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
    """Spell `seq` as repeated periods with the fewest bodies: "bmkmkm" -> ("bm", 1), ("km", 2)."""
    while seq:
        period, reps = min(
            ((p, _repeats(seq, p)) for p in range(1, len(seq) + 1)),
            key=lambda pr: (
                (pr[0] + len(seq) - pr[0] * pr[1], pr[0]) if pr[1] > 1 else (len(seq), 0)
            ),
        )
        yield seq[:period], reps
        seq = seq[period * reps :]


def _repeats(seq, p):
    reps = 1
    while seq[reps * p : (reps + 1) * p] == seq[:p]:
        reps += 1
    return reps


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


def _join(parts):
    """Aux of consecutive spans, by kind, along the first axis."""
    kinds = sorted({k for part in parts for k in part})
    by_kind = {k: [part[k] for part in parts if k in part] for k in kinds}
    return {k: jax.tree.map(lambda *a: jnp.concatenate(a), *v) for k, v in by_kind.items()}


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
