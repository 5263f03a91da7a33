"""Executes the timetable: one SPMD program, manual over `stage` and the batch's axes, `tensor` automatic.

All stages keep step. In a tick each runs one chunk forward and one backward (`timetable.py` says which), by
an explicit vjp; a chunk is recomputed from its stage's cache of blocks. Block summaries go around the ring of
stages in windows: what a receiver lacks, of which the part that is complete leaves before the chunk runs.
Their cotangents come back in the same windows, summed on the way: a block's uses on a stage are added up
there until the chunk that received it runs backward.

Over `data` and `fsdp` each device has rows of its own: parameters are gathered before the first tick, and
gradients, which it sums by itself, are added up after the last.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from attnres_jax.axes import compute_dtype
from attnres_jax.parallel.chunk import Chunked, Layers, at, pick, put, put_rows, select, slice_rows
from attnres_jax.parallel.mesh import BATCH, STAGE
from attnres_jax.parallel.timetable import Timetable
from attnres_jax.residuals.base import Mix, PyTree
from attnres_jax.stack import placed


class Parts(NamedTuple):
    """Parameters as stages need them; gradients come in the same form."""

    table: Any
    """Embeddings [V,D]: every stage looks up its own."""
    layers: Any
    """Kind -> leaves [P V n, ...] in order of stages: a stage's chunks lie together (`layout.py`)."""
    mix: PyTree
    """`residuals.Mix`, of all sublayers and of the output read."""
    last: PyTree
    """Of the final norm."""
    unembedding: Any
    """The head [D,V]: stage p computes the logits p, P + p, 2 P + p, ..."""
    shared: PyTree = ()
    """What the layers of every chunk take, beside their own."""


class Model(NamedTuple):
    """What a pipeline runs beside its chunks. `micro` is one microbatch of the batch, any pytree: of what has
    a batch axis, this device's rows."""

    embed: Callable[[Array, PyTree], Float[Array, "B T D"]]
    """`embed(table, micro)`: rows of the table, [B,T,D]."""
    embedded: Callable[[Array, Array, PyTree], Array]
    """`embedded(total, d_x, micro)`: `total` and the gradient of the table that `d_x` makes."""
    rounded: Callable[[Parts], Parts]
    """The parameters as they are computed with, which is how they are gathered; gradients are in at least
    fp32."""
    layers: Callable[[PyTree, PyTree, Mix, Array], Layers]
    """`layers(micro, shared, mix, x)`: kind -> `stack.Layer`; its params and inputs are not used.

    Of `Parts.shared`, the whole `mix` and the embedding x [B,T,D] it may make what no other stage sends, such
    as the first attention's values: each chunk makes it again, and gradients come back through it."""
    head: Callable[[PyTree, Array, Array, PyTree], PyTree]
    """`head(last, unembedding [D, V / P], h, micro)`: sums over these rows, on all stages the same.

    It runs on all of them, each with its own columns: collectives over `stage` are its to call. What it sums
    over stages has the same cotangent on all of them: `summed`. For training, (objective, what is
    reported)."""


def taken(d: PyTree, first: Any, count: int) -> tuple[PyTree, PyTree]:
    """`count` rows of the cotangents `d`, and the others: zeros stand where they were."""
    rows = slice_rows(d, first, count)
    return rows, put_rows(d, jax.tree.map(jnp.zeros_like, rows), first)


@jax.custom_vjp
def summed(x: Array) -> Array:
    """The sum over stages of what differs; its cotangent is the same on all stages, and each takes it."""
    return lax.psum(x, STAGE)


summed.defvjp(lambda x: (summed(x), None), lambda _, d: (d,))


@dataclass(frozen=True)
class Pipeline:
    """`chunked` sublayers and `model` on `mesh`, by `table`.

    `spec` says where a device's own B and T of activations lie on the automatic axes, `specs` where the
    layers' leaves do (kind -> `PartitionSpec`s, that of the first axis left out), `columns` where the table
    of embeddings does, and `shared` where `Parts.shared` do.
    """

    chunked: Chunked
    model: Model
    table: Timetable
    mesh: Mesh
    spec: P
    specs: Mapping[str, PyTree]
    columns: P
    gradients: Parts
    """Where gradients lie, by the axes that are manual: `stage`, and `fsdp` as their parameters do."""
    shared: PyTree = ()

    def loss(self, parts: Parts, batch: PyTree) -> tuple[Array, Any]:
        """(objective, reported), sums over the microbatches of `batch`, [M, B, ...] or [M] for what all rows
        of a microbatch share.

        The objective may be differentiated by `parts`, once and in reverse mode: the gradient is computed
        together with it. What is reported has none.
        """

        def whole(found):
            (objective, *reported), penalty = found
            return objective + penalty, *reported

        @jax.custom_vjp
        def run(parts):
            return whole(self._mapped(_Run.evaluate, parts, batch, False))

        def forward(parts):
            found, gradient = self._mapped(_Run.train, parts, batch, True)
            return whole(found), gradient

        def backward(gradient, d):
            return (jax.tree.map(lambda g: g * d[0].astype(g.dtype), gradient),)

        run.defvjp(forward, backward)
        return run(parts)

    def forward(self, parts: Parts, batch: PyTree) -> PyTree:
        """The sum over the microbatches of what `model.head` returns."""
        return self._mapped(_Run.evaluate, parts, batch, False)[0]

    def _mapped(self, program, parts, batch, gradients):
        """The program of every stage. The head is cut over stages by a new last axis, so that a vocabulary
        that is cut over `tensor` stays so on each of them."""
        parts = self.model.rounded(parts)
        w = parts.unembedding
        parts = parts._replace(unembedding=w.reshape(len(w), -1, self.table.stages))
        spec = Parts(P(), jax.tree.map(lambda _: P(STAGE), parts.layers), P(), P(), P(None, None, STAGE), P())
        rows = jax.tree.map(lambda a: P(None, BATCH) if a.ndim > 1 else P(), batch)

        def run(parts, batch):
            return program(_Run(self, parts, batch))

        found = jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=(spec, rows),
            out_specs=(P(), self.gradients) if gradients else P(),
            axis_names={STAGE, *BATCH},
            check_vma=False,
        )(parts, batch)
        if not gradients:
            return found
        value, gradient = found
        own = gradient.unembedding
        return value, gradient._replace(unembedding=own.reshape(len(own), -1))


def _summed_over_rows(g, spec):
    """The sum over the devices that have other rows, each of which keeps its part, if `fsdp` cuts it."""
    if "fsdp" not in spec:
        return lax.psum(g, BATCH)
    axis, devices = spec.index("fsdp"), lax.axis_size("fsdp")
    if g.shape[axis] // devices % 128:  # libtpu 0.0.50 refuses a psum_scatter of some such parts
        parts = jnp.moveaxis(g.reshape(*g.shape[:axis], devices, -1, *g.shape[axis + 1 :]), axis, 0)
        g = jnp.sum(lax.all_to_all(parts, "fsdp", 0, 0), 0)
    else:
        g = lax.psum_scatter(g, "fsdp", scatter_dimension=axis, tiled=True)
    return lax.psum(g, "data")


class _Unit(NamedTuple):
    """What a stage runs in a tick: virtual stage v, microbatch m, chunk c. Where it idles, not `live`."""

    live: Array
    v: Array
    m: Array
    c: Array


class _State(NamedTuple):
    """Carried from tick to tick."""

    cache: PyTree
    """[(slots + 1) rows, ...]: of each microbatch in flight, the blocks that this stage has. The last slot is
    for ticks in which it idles."""
    given: PyTree
    """[slots + 1, V, ...]: the row that each chunk found begun, where there is one."""
    early: PyTree
    fresh: PyTree
    """Messages that have arrived."""
    d_cache: PyTree
    """Cotangents of `cache`, where it lies: kernels add to them in place. Zeros, where nothing is on its way
    back."""
    back: PyTree
    """The window of cotangents to send."""
    gradient: Any
    penalty: Any
    """What this stage's auxiliary outputs add to the objective."""
    total: Any
    """Sums of what the head returns, the same on all stages."""


def carried(chunked: Chunked, table: Timetable, slots: int, trains: bool) -> dict[str, tuple[int, ...]]:
    """Of what a stage carries in units (`chunk.py`): the field of `_State` -> the axes before a unit's own.

    `slots` are the microbatches in flight; without `trains` there is no backward pass.
    """
    cache = chunked.cache
    rows = ((slots + 1) * cache.rows,)
    found: dict[str, tuple[int, ...]] = {"cache": rows, "fresh": (cache.written,)}
    if cache.conveyor:
        found["early"] = (cache.conveyor,)
    if trains:
        found |= {"d_cache": rows, "back": (cache.window,)}
        if chunked.parted:
            found["given"] = (slots + 1, table.virtual_stages)
    return found


class _Run:
    """The program of one stage, inside `shard_map`."""

    def __init__(self, pipeline: Pipeline, parts: Parts, batch: PyTree):
        self.pipeline, self.chunked, self.model = pipeline, pipeline.chunked, pipeline.model
        self.table, self.cache = pipeline.table, pipeline.chunked.cache
        self.P, self.V, self.M = self.table.stages, self.table.virtual_stages, self.table.microbatches
        self.stage = lax.axis_index(STAGE)
        self.batch = batch
        own = jax.tree.map(lambda a: a.reshape(self.V, -1, *a.shape[1:]), parts.layers)
        self.parts = parts._replace(layers=own, unembedding=parts.unembedding[..., 0])
        embed, first = self.model.embed, self.chunked.first
        self.unit = jax.eval_shape(lambda: first(embed(self.parts.table, self._micro(0))))

    def train(self) -> tuple[Any, Parts]:
        ahead, both, behind = self.table.phases
        state = self._start(self.table.slots, True)
        state = self._ticks(state, 0, ahead, True, False)
        state = self._ticks(state, ahead, ahead + both, True, True)
        state = self._placed(self._ticks(state, ahead + both, ahead + both + behind, False, True))
        d = state.gradient
        layers = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), d.layers)
        d = d._replace(layers=layers, unembedding=d.unembedding[..., None])
        d = jax.tree.map(_summed_over_rows, d, self.pipeline.gradients)
        d = d._replace(unembedding=lax.all_gather(d.unembedding, STAGE, axis=2, tiled=True))
        of_all = {name: lax.psum(getattr(d, name), STAGE) for name in ("table", "mix", "last", "shared")}
        return self._found(state), d._replace(**of_all)

    def evaluate(self) -> Any:
        state = self._start(self.P, False)
        state = self._ticks(state, 0, self.table.units + self.P - 1, True, False, self._headed)
        return self._found(state)

    def _found(self, state):
        return lax.psum(state.total, BATCH), lax.psum(state.penalty, (STAGE, *BATCH))

    def _ticks(self, state, first, last, forward, backward, after=None):
        def tick(state, t):
            back = self._sent(state.back, -1) if backward else None
            state = self._forward(state, t) if forward else state
            state = self._backward(state, t, back) if backward else state
            state = after(state, t) if after else state
            return self._placed(state), None

        return lax.scan(tick, state, jnp.arange(first, last))[0]

    def _start(self, slots, trains):
        total = jax.eval_shape(self._head_of_nothing)
        kept: dict[str, Any] = {"early": (), "given": (), "d_cache": (), "back": (), "gradient": ()}
        if trains:
            kept["gradient"] = jax.tree.map(lambda a: jnp.zeros(a.shape, compute_dtype(a.dtype)), self.parts)
        for name, lead in carried(self.chunked, self.table, slots, trains).items():
            kept[name] = self._room(*lead)
        state = _State(
            penalty=jnp.float32(0),
            total=jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), total),
            **kept,
        )
        return self._placed(state)

    def _room(self, *lead):
        return jax.tree.map(lambda a: jnp.zeros((*lead, *a.shape), a.dtype), self.unit)

    def _forward(self, state, t):
        cache, now = self.cache, self._unit(self.table.forward, t, self.stage)
        slot, base = self._place(state.cache, now)
        rows, early, micro = state.cache, state.early, self._micro(now.m)
        if cache.conveyor:
            rows = put_rows(rows, early, base + at(cache.early, now.c))
        rows = put_rows(rows, state.fresh, base + at(cache.fresh, jnp.maximum(now.c - 1, 0)))
        x = self.model.embed(self.parts.table, micro)
        rows = put(rows, select(self._embeds(now), self.chunked.first(x), pick(rows, base)), base)
        if cache.conveyor:
            early = self._sent(slice_rows(rows, base + at(cache.early, now.c + 1), cache.conveyor), 1)
        given = state.given  # nothing, where no chunk changes what it found
        if jax.tree.leaves(given):
            found = pick(rows, base + at(self.chunked.open, now.c))
            given = jax.tree.map(lambda a, b: a.at[slot, now.v].set(b), given, found)
        params = pick(self.parts.layers, now.v), self.parts.mix.sublayers, self.parts.shared
        rows, penalty = self._chunk(now, micro, base)(*params, x, rows)
        made = slice_rows(rows, base + at(cache.fresh, now.c), cache.written)
        return state._replace(
            cache=rows,
            given=given,
            early=early,
            fresh=self._sent(made, 1),
            penalty=state.penalty + self._live(now, penalty, penalty),
        )

    def _backward(self, state, t, back):
        cache, C = self.cache, self.P * self.V
        now, nothing = self._unit(self.table.backward, t, self.stage), partial(jax.tree.map, jnp.zeros_like)
        state = self._head(state, t)
        slot, base = self._place(state.cache, now)
        # What later chunks of this stage left, or the head, and what comes from the next chunk.
        d, sent = state.d_cache, select(now.c == C - 1, nothing(back), back)
        window = base + at(cache.first, now.c + 1)
        d = put_rows(d, jax.tree.map(jnp.add, slice_rows(d, window, cache.window), sent), window)
        rows, micro, opened = state.cache, self._micro(now.m), at(self.chunked.open, now.c)
        if self.chunked.parted:
            rows = put(rows, jax.tree.map(lambda a: a[slot, now.v], state.given), base + opened)
        params = pick(self.parts.layers, now.v), self.parts.mix.sublayers, self.parts.shared
        x = self.model.embed(self.parts.table, micro)
        (again, penalty), pull = jax.vjp(self._chunk(now, micro, base), *params, x, rows)
        # Of what this chunk returned, from all its uses; what it did not write passes through, added to.
        d_layers, d_mix, d_shared, d_beside, d = pull((d, jnp.ones_like(penalty)))
        # The embedding's: this stage looked it up itself, for row 0 and for what layers make of it.
        embeds = self._embeds(now) & now.live
        first = pick(d, base)
        d_first = select(embeds, first, nothing(first))
        d = put(d, select(self._embeds(now), nothing(first), first), base)
        (d_x,) = jax.vjp(self.chunked.first, x)[1](d_first)
        sums, live = state.gradient, partial(self._live, now)
        if self.parts.shared:
            d_x = d_x + live(d_beside, d_x)
        # On with what the chunk before is to have; the rest waits for earlier chunks of this stage.
        back, d = taken(d, base + at(cache.first, now.c), cache.window)
        gradient = sums._replace(
            table=self.model.embedded(sums.table, d_x, micro),
            layers=jax.tree.map(lambda a, g: a.at[now.v].add(live(g, a)), sums.layers, d_layers),
            mix=sums.mix._replace(
                sublayers=jax.tree.map(lambda a, g: a + live(g, a), sums.mix.sublayers, d_mix)
            ),
            shared=jax.tree.map(lambda a, g: a + live(g, a), sums.shared, d_shared),
        )
        cache = again if self.chunked.in_place else rows  # what it has been written over, as it was
        return state._replace(cache=cache, d_cache=d, back=back, gradient=gradient)

    def _place(self, rows, now):
        """The slot of a microbatch, and where its rows begin."""
        slots = len(jax.tree.leaves(rows)[0]) // self.cache.rows - 1
        slot = jnp.where(now.live, now.m % slots, slots)
        return slot, slot * self.cache.rows

    def _head(self, state, t):
        """Output read, norm and head of the microbatch that the last chunk has just left, if one has: that is
        a matter of the tick alone, so all stages take the same branch, and compute 1/P of it each."""
        ends, head, over = self._ending(t)

        def run():
            def objective(over, rows):
                found, rows = head(over, rows)
                return (found[0], rows), found

            (value, _), pull, found = jax.vjp(objective, over, state.cache, has_aux=True)
            return found, *pull((jnp.ones_like(value), state.d_cache))

        def idle():
            return *jax.tree.map(jnp.zeros_like, (state.total, over)), state.d_cache

        found, (d_mix, d_last, d_unembedding), d_cache = lax.cond(ends, run, idle)
        sums = state.gradient
        add = partial(jax.tree.map, lambda a, g: a + g.astype(a.dtype))
        gradient = sums._replace(
            mix=sums.mix._replace(output=add(sums.mix.output, d_mix)),
            last=add(sums.last, d_last),
            unembedding=add(sums.unembedding, d_unembedding),
        )
        found = add(state.total, found)
        # Of a batch of one on each device XLA takes the head's for [1, rows, ..], and copies them to add to.
        return state._replace(gradient=gradient, total=found, d_cache=self._rows(d_cache))

    def _headed(self, state, t):
        """The same, of a forward pass alone."""
        ends, head, over = self._ending(t)
        nothing = partial(jax.tree.map, jnp.zeros_like, state.total)
        found = lax.cond(ends, lambda: head(over, state.cache)[0], nothing)
        return state._replace(total=jax.tree.map(jnp.add, state.total, found))

    def _ending(self, t):
        """Whether a microbatch leaves the last chunk in tick `t`, its head, and the parameters of that."""
        now, parts = self._unit(self.table.forward, t, self.P - 1), self.parts
        micro = self._micro(now.m)

        def head(over, rows):
            (mix, last, unembedding), (_, base) = over, self._place(rows, now)
            h, rows = self.chunked.finish(mix, rows, base)
            own = jnp.where(self.stage == self.P - 1, h, 0)  # on the others it is not the last
            wide = lax.psum(own.astype(compute_dtype(h.dtype)), STAGE)  # cotangents are summed in fp32
            return self.model.head(last, unembedding, wide.astype(h.dtype), micro), rows

        return now.live & (now.v == self.V - 1), head, (parts.mix.output, parts.last, parts.unembedding)

    def _head_of_nothing(self):
        _, head, over = self._ending(self.P - 1)
        return head(over, self._room(2 * self.cache.rows))[0]

    def _unit(self, entries, t, stage) -> _Unit:
        """What `stage` runs in tick `t` by one of the timetable's tables."""
        m, v = jnp.asarray(entries)[t, stage]
        live = m >= 0
        m, v = jnp.maximum(m, 0), jnp.maximum(v, 0)
        return _Unit(live, v, m, v * self.P + stage)

    def _chunk(self, now, micro, base):
        place = self.chunked.scheme.placement

        def run(params, mix, shared, x, rows):
            layers = self.model.layers(micro, shared, self.parts.mix._replace(sublayers=mix), x)
            layers = {kind: placed(layer, place) if place else layer for kind, layer in layers.items()}
            return self.chunked.run(layers, mix, params, rows, base, now.c)

        return run

    def _embeds(self, now):
        """Whether row 0 is the embedding: on every stage, or where the history is one unit, at chunk 0."""
        return now.v == 0 if self.chunked.apart else now.c == 0

    def _micro(self, m):
        return pick(self.batch, m)

    def _live(self, now, gradient, like):
        return jnp.where(now.live, gradient, 0).astype(like.dtype)

    def _sent(self, rows, step):
        """To the next stage of the ring (1), or to the one before (-1)."""
        ring = [(p, (p + step) % self.P) for p in range(self.P)]
        return jax.tree.map(lambda a: lax.ppermute(a, STAGE, ring), rows)

    def _placed(self, state):
        """What is carried lies on the automatic mesh axes as activations and parameters do."""

        def leaf(a, spec, lead=()):
            return lax.with_sharding_constraint(a, P(*lead, *spec))

        gradient = state.gradient
        if gradient:
            own = partial(leaf, lead=(None, None))
            layers = jax.tree.map(own, gradient.layers, dict(self.pipeline.specs))
            table, shared = leaf(gradient.table, self.pipeline.columns), gradient.shared
            shared = jax.tree.map(leaf, shared, self.pipeline.shared)
            gradient = gradient._replace(layers=layers, table=table, shared=shared)
        names = ("cache", "given", "early", "fresh", "d_cache", "back")
        return state._replace(gradient=gradient, **{name: self._rows(getattr(state, name)) for name in names})

    def _rows(self, tree):
        """Where units lie. In another layout than all take, XLA may copy whole caches in every tick."""

        def place(a):
            a = lax.with_sharding_constraint(a, P(*[None] * (a.ndim - 3), *self.pipeline.spec))
            return with_layout_constraint(a, Layout(tuple(range(a.ndim))))

        return jax.tree.map(place, tree)
