"""The loop over depth: `through_depth`, for stacked layers.

Blocks that repeat are compiled once (`append_scan`), inside a block what `spelling.periods` says. Kept for
the backward pass are the stream before each sublayer and the summaries; the caller's policy rules the rest.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from attnres_jax import spelling
from attnres_jax.autodiff import Block, append_scan, reverse_only, taking
from attnres_jax.choice import refuse
from attnres_jax.depth import Rows
from attnres_jax.placement import Placement
from attnres_jax.residuals.base import Mix, Norm, PyTree, Scheme, summand
from attnres_jax.walk import Record, check_mix, start

policies = jax.checkpoint_policies


class Layer(NamedTuple):
    """The layers of one kind, stacked: leaves of `params` and `inputs` are [n, ...], n layers of the kind.

    `norm(params)` is the pre-norm, a function of h: a `norm.RMSNorm`, which a kernel computes together with
    the read, or any other. `apply(params, x, inputs) -> (y, aux)` is the function of the normed input.
    `inputs` are per-layer values (caches, keys); `aux` is any pytree (losses, caches).
    """

    norm: Callable[[PyTree], Norm]
    apply: Callable[[PyTree, Array, PyTree], tuple[Array, PyTree]]
    params: PyTree
    inputs: PyTree = None


class DepthOutput(NamedTuple):
    """`h` feeds the final norm; `aux` is stacked by kind, in order of depth; `record` if asked for."""

    h: Float[Array, "B T D"]
    aux: dict[str, PyTree]
    record: Record | None


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
      implementation: of the ops (`choice.choose`); None: the scheme's. "reference" is also literal here: one
        phase, unrolled, no checkpoint, plain autodiff, so that forward mode, higher orders and fp64 work.
      placement: where activations lie on a mesh, None: as the scheme says; reads run on each device's tokens.
      record: also return `Record`; literal and unrolled, for analysis.

    Raises:
      ValueError: where kinds, layers, mix and x do not fit together.
    """
    spelling.check_layers(kinds, layers)
    check_mix(scheme, mix, len(kinds), x)
    implementation, placement = implementation or scheme.implementation, placement or scheme.placement
    refuse(implementation, scheme.no_kernel if mix.sublayers else None)
    scheme = replace(scheme, implementation=implementation, placement=placement)
    if placement:
        x, layers = placement.leave(x), {k: placed(layer, placement) for k, layer in layers.items()}
        # And its cotangent: XLA turned those of all rows, as the embedding's gradient wants its own.
        x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    if record or implementation == "reference":
        return _literal(scheme.literal(), mix, kinds, layers, x, record)
    shares = {k: (layer.params, layer.inputs) for k, layer in layers.items() if k in kinds}
    mix, shares, x = reverse_only((mix, shares, x))
    return _scanned(scheme, mix, kinds, layers, shares, x, policy or policies.nothing_saveable)


def placed(layer: Layer, placement: Placement) -> Layer:
    """`layer`, whose input has T whole and whose output lies as activations do between sublayers."""

    def apply(params, x, inputs):
        y, aux = layer.apply(params, placement.enter(x), inputs)
        return placement.leave(y), aux

    return layer._replace(apply=apply)


def _literal(scheme, mix, kinds, layers, x, record):
    depth, aux, reads, outputs = start(scheme, mix, len(kinds), x), {k: [] for k in kinds}, [], [x]
    steps = []
    for l, kind in enumerate(kinds):
        layer, i = layers[kind], kinds[:l].count(kind)
        params, inputs = jax.tree.map(lambda a, i=i: a[i], (layer.params, layer.inputs))
        reads.append(depth.read(layer.norm(params)))
        y, extra = layer.apply(params, reads[-1].x, inputs)
        steps.append(scheme.step(depth.slots[0], depth.stream, y))
        depth = depth.write(y)
        outputs.append(y)
        aux[kind].append(extra)
    reads.append(depth.finish())
    mixtures, aux = [read.mixture for read in reads], {k: spelling.stack(extras) for k, extras in aux.items()}
    weights = tuple(read.weights for read in reads)
    recorded = Record(jnp.stack(outputs), jnp.stack(mixtures), weights, tuple(steps)) if record else None
    return DepthOutput(mixtures[-1], aux, recorded)


def _scanned(scheme, mix, kinds, layers, shares, x, policy):
    """Equal consecutive blocks in one scan, the others one by one."""
    steps = {k: sublayer(scheme, layer) for k, layer in layers.items()}
    history, at, parts, whole = scheme.start(x), 0, [], (mix.sublayers, shares)
    schedule = scheme.schedule(len(kinds))
    spelled = [kinds[o : o + s] for o, s in zip(schedule.openings, schedule.sizes, strict=True)]
    for blocks, reps in spelling.runs(spelled):
        scan = reps > 1 and scheme.append_only
        for some, times in [(blocks, reps)] if scan else [([b], 1) for b in blocks * reps]:
            own = partial(spelling.belonging, kinds, at, "".join(some) * times)
            if scan:
                history, aux = _repeat(scheme, steps, some, times, policy, *own(whole), history)
            else:
                history, aux = _once(scheme, steps, some[0], policy, own, whole, history)
            parts.append(aux)
            at += len("".join(some)) * times
    kept = policies.save_only_these_names("statistics")
    h = jax.checkpoint(lambda *args: scheme.finish(*args).mixture, policy=kept)(mix.output, history)
    return DepthOutput(h, spelling.join(parts), None)


def sublayer(scheme, layer):
    """One sublayer of a kind; `own` are its slot and its share of the layers' parameters and inputs."""

    def step(history, stream, own, row=None):
        slot, (params, inputs) = own
        read = scheme.read(slot, history, stream, layer.norm(params), row)
        y, aux = layer.apply(params, read.x, inputs)
        return read.history, scheme.write(slot, read.stream, summand(y, history)), aux

    return step


def _repeat(scheme, steps, blocks, reps, policy, mix, shares, history):
    """`reps` times the same blocks over an append-only history: one body, one array of rows."""
    steps = {k: taking(k, s, policy) for k, s in steps.items()}
    places = {k: jnp.arange("".join(blocks).count(k) * reps) for k in shares}

    def split(own):
        each = zip(accumulate(map(len, blocks), initial=0), blocks, strict=False)
        return [spelling.belonging("".join(blocks), at, b, own) for at, b in each]

    def block(kinds):
        def start(rows, n, own):
            slots, history = scheme.open(own[0], (Rows(rows, n),), begins)
            return history, scheme.begin(history, begins), spelling.segments(spans, (slots, own[1]))

        begins = spelling.starts(spans := spelling.periods(kinds))
        return Block(start, tuple((tuple(steps[k] for k in period), times) for period, times in spans))

    parts, rows = [block(b) for b in blocks], jnp.concatenate([r.array for r in history])
    room = jnp.pad(rows, [(0, len(blocks) * reps)] + [(0, 0)] * (rows.ndim - 1))
    rows, ys = append_scan(parts, split, room, len(rows), spelling.fold((mix, places), reps), shares)
    aux = [spelling.by_kind(spelling.periods(b), y, 1) for b, y in zip(blocks, ys, strict=True)]
    return (Rows(rows),), spelling.unfold(spelling.join(aux, 1))


def _once(scheme, steps, kinds, policy, own, whole, history):
    """A block as it is. Sliced inside the checkpoint, so that no copy of the parameters is kept; what an
    append-only history already held is not an output, or it would be kept twice."""
    held = len(history) if scheme.append_only else 0
    steps = {k: jax.checkpoint(step, policy=policy, prevent_cse=False) for k, step in steps.items()}
    spans = spelling.periods(kinds)

    def block(history, whole):
        (mix, shares), begins = own(whole), spelling.starts(spans)
        slots, history = scheme.open(mix, history, begins)
        stream = scheme.begin(history, begins)
        history, stream, ys = sublayers(steps, spans, history, stream, (slots, shares))
        after = scheme.close(history, stream)
        return after[held:] if held else after, spelling.by_kind(spans, ys)

    policy = policies.save_from_both_policies(policies.save_only_these_names("stream"), policy)
    after, aux = jax.checkpoint(block, policy=policy)(history, whole)
    return (*history, *after) if held else after, aux


def sublayers(steps, spans, history, stream, own):
    """The sublayers of one block, scanned as `spans` say. The stream before each is what is kept."""

    def body(stream, values, period, history, begins=False):
        ys = []
        for k, (kind, value) in enumerate(zip(period, values, strict=True)):
            if not (begins and k == 0):
                stream = jax.tree.map(lambda a: checkpoint_name(a, "stream"), stream)
            history, stream, y = steps[kind](history, stream, value)
            ys.append(y)
        return stream, ys, history

    ys = []
    for (period, reps), values in zip(spans, spelling.segments(spans, own), strict=True):
        if reps > 1:
            stream, y = lax.scan(lambda s, v, p=period, h=history: body(s, v, p, h)[:2], stream, values)
        else:
            values = jax.tree.map(lambda a: a[0], values)
            stream, y, history = body(stream, values, period, history, begins=not ys)
            y = jax.tree.map(lambda a: a[None], y)
        ys.append(y)
    return history, stream, ys
