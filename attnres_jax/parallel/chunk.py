"""One chunk of a pipelined model: the verbs of `through_depth`, on the blocks that a stage keeps.

A *unit* is what a message is counted in: a block [B,T,D] where completed blocks are kept apart; else the
whole history, which goes from chunk to chunk as one (the plain residual's stream; the m streams of mHC).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from attnres_jax import stack
from attnres_jax.autodiff import Block, append_scan, taking, window
from attnres_jax.depth import Rows
from attnres_jax.parallel.timetable import Cache, Chunks
from attnres_jax.residuals.base import PyTree, Scheme
from attnres_jax.spelling import belonging, by_kind, fold, runs, segments, starts

Layers = Mapping[str, stack.Layer]


class Kept(NamedTuple):
    """A unit of a scheme whose blocks leave another row than their stream."""

    summary: PyTree
    stream: PyTree


@dataclass(frozen=True)
class Chunked:
    """A model's sublayers `kinds`, whose period is `chunks.together` long, cut into chunks of `scheme`.

    `penalty` is what a sublayer's auxiliary output, of a device's own rows of a microbatch, adds to the
    objective: of kind -> stacked outputs.
    """

    scheme: Scheme
    kinds: str
    chunks: Chunks
    policy: Callable[..., Any]
    penalty: Callable[[dict[str, PyTree]], Array] | None = None

    def __post_init__(self):
        period = self.kinds[: self.chunks.together]
        if self.kinds != period * (len(self.kinds) // len(period)):
            raise ValueError(
                f"chunks of a pipeline are alike: {self.kinds!r} must repeat its first {len(period)} letters"
            )

    @property
    def longest(self) -> str:
        """The kinds of the longest chunk; every other one is the beginning of it."""
        return self.kinds[: self.chunks.segments[-1].last]

    @cached_property
    def apart(self) -> bool:
        """Whether units are blocks."""
        return apart(self.scheme)

    @cached_property
    def cache(self) -> Cache:
        """How a stage keeps units; one row where the history is one unit."""
        if self.apart:
            return self.chunks.cache
        zeros = (0,) * (self.chunks.count + 1)
        where: dict[str, Any] = {"first": zeros, "early": zeros, "fresh": zeros[:-1]}
        return Cache(rows=1, window=1, conveyor=0, written=1, **where)

    @property
    def parted(self) -> bool:
        """Whether some chunk changes a row that it is given: the running sum of a block, or the history."""
        return not self.apart or self.chunks.begun != self.chunks.complete

    @property
    def open(self) -> tuple[int, ...]:
        """The row that a chunk may find begun, C numbers."""
        return tuple(n + 1 for n in self.chunks.complete[:-1]) if self.apart else self.cache.fresh

    def first(self, x: Float[Array, "B T D"]) -> PyTree:
        """The unit that stands in row 0 before the first chunk that a stage runs."""
        history = self.scheme.start(x)
        if self.scheme.append_only or not self.apart:
            return history[0].array[0] if self.apart else history
        mix = self.scheme.init(1, x.shape[-1]).sublayers
        return Kept(x, self.scheme.begin(self.scheme.open(mix, history)[1], jnp.bool(True)))

    @property
    def in_place(self) -> bool:
        """Whether reads take blocks where a stage keeps them; else a chunk copies them out."""
        return self.scheme.append_only and self.scheme.in_place and self.scheme.no_kernel is None

    def run(
        self,
        layers: Layers,
        mix: dict[str, Array],
        params: Any,
        rows: PyTree,
        base: Int[Array, ""],
        c: Int[Array, ""],
    ) -> tuple[PyTree, Array]:
        """Chunk `c` over the `cache.rows` units of `rows` from `base` on: `rows` with what it makes, in the
        `written` units from `cache.fresh[c]` on; and the penalty.

        `rows` holds other units too, which stay as they are. `params` are kind -> leaves [n, ...] of the
        longest chunk, `mix` the parameters of all sublayers. A chunk runs forward in its own tick and again
        in that of its backward pass, which starts from the rows alone; what a sublayer does not keep there,
        by `policy`, is computed a third time, and what opens a block unless all is kept.
        """
        given = jnp.asarray(self.chunks.bounds)[c] + jnp.arange(len(self.longest))
        # Beyond the end of a shorter chunk stands some sublayer, whose output is left out.
        mix = jax.tree.map(lambda a: a[jnp.minimum(given, len(self.kinds) - 1)], mix)
        own = mix, {kind: (leaves, None) for kind, leaves in params.items()}
        append = partial(self._appending, base if self.in_place else None)
        if self.in_place:
            return self._segments(append, layers, own, rows, c)
        run = append if self.scheme.append_only else self._closing if self.apart else self._whole
        here, rows = window(rows, base, self.cache.rows)
        here, total = self._segments(run, layers, own, here, c)
        fresh = at(self.cache.fresh, c)
        return put_rows(rows, slice_rows(here, fresh, self.cache.written), base + fresh), total

    def _segments(self, run, layers, own, rows, c):
        total = jnp.float32(0)
        for segment in self.chunks.segments:
            rows, penalty = run(layers, segment, own, rows, c)
            total = total + penalty
        return rows, total

    def finish(
        self, mix: dict[str, Array], rows: PyTree, base: Int[Array, ""]
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        """The output read of all units from `base` on, after the last chunk; and `rows`, as they were."""
        if self.in_place:
            read: Any = self.scheme.finish(mix, (Rows(self._slots(rows), None, base // self.cache.rows),))
            return read.mixture, read.history[0].array.reshape(rows.shape)
        here, rows = window(rows, base, self.cache.rows)
        read = self.scheme.finish(mix, (Rows(_summaries(here)),) if self.apart else pick(here, 0))
        return read.mixture, rows

    def _appending(self, base, layers, segment, own, rows, c):
        """A segment that makes a block, or goes on with the one that it finds begun. `base` is as in `run`,
        or None where there are no other units."""
        scheme, kinds = self.scheme, self.longest[segment.first : segment.last]
        block, running = at(segment.block, c) + (0 if base is None else base), at(segment.runs, c)
        # Where it does not run, nothing stays of it: as if a block began, so that S = 1 goes on with none.
        begins = at(tuple(not r or b for r, b in zip(segment.runs, segment.begins, strict=True)), c)
        known, spans = begins is True, self._spans(segment)
        begins = starts(spans, begins)
        mix, shares = belonging(self.longest, segment.first, kinds, own)
        places = {k: jnp.arange(kinds.count(k)) for k in shares}
        (found,), rows = window(rows, block, 1)

        def start(rows, n, own) -> Any:
            seen = Rows(rows, n) if base is None else Rows(rows, n - base, base // self.cache.rows)
            slots, history = scheme.open(own[0], (seen,), begins)
            stream = scheme.begin(history, begins)
            if not known:
                stream = select(begins, stream, found)
            return history, stream, segments(spans, (slots, own[1]))

        def step(kind):
            one = stack.sublayer(scheme, layers[kind])
            # The first running sum of a block begun elsewhere is from `start`, not from where sums are kept.
            alone = one if known else lambda history, stream, own, row: one(history, stream, own)
            return taking(kind, alone, self.policy)

        steps = {k: step(k) for k in set(kinds)}
        parts = tuple((tuple(steps[k] for k in some), n) for some, n in spans)
        xs = fold((mix, places), 1)
        # `append_scan` leaves a used cotangent where it writes: cleared here, no part of what was found.
        rows = put(rows, lax.stop_gradient(found), block)
        view = (lambda rows: rows) if base is None else self._slots
        one = Block(start, parts, view, self.policy is jax.checkpoint_policies.everything_saveable)
        rows, (ys,) = append_scan([one], lambda own: [own], rows, block, xs, shares)
        if running is not True:
            (new,), rows = window(rows, block, 1)
            rows = put(rows, select(running, new, found), block)
        return rows, self._penalty(running, segment, jax.tree.map(lambda a: a[0], ys))

    def _slots(self, rows):
        """Units by slot of the cache, in one of which reads take them where they lie."""
        return rows.reshape(-1, self.cache.rows, *rows.shape[1:])

    def _closing(self, layers, segment, own, rows, c):
        """The same where a block leaves another row than its stream: both are kept, as `Kept`."""
        block, begins, running = (at(v, c) for v in (segment.block, segment.begins, segment.runs))
        found = pick(rows, block)

        def begun(stream):
            return stream if begins is True else select(begins, stream, found.stream)

        def run(own, rows):
            history = (Rows(rows.summary, block),)
            history, stream, ys = self._through(layers, segment, own, history, begins, begun)
            return Kept(self.scheme.close(history, stream)[-1].array[0], stream), ys

        new, ys = jax.checkpoint(run, policy=self._kept)(own, rows)
        return put(rows, select(running, new, found), block), self._penalty(running, segment, ys)

    def _whole(self, layers, segment, own, rows, c):
        """A segment of a history that is one unit, which it makes anew."""

        def run(own, rows):
            history, stream, ys = self._through(layers, segment, own, pick(rows, 0), True, lambda s: s)
            return self.scheme.close(history, stream), ys

        (new, ys), running = jax.checkpoint(run, policy=self._kept)(own, rows), at(segment.runs, c)
        return select(running, put(rows, new, 0), rows), self._penalty(running, segment, ys)

    def _through(self, layers, segment, own, history, begins, begun):
        """History, stream and outputs after the sublayers of a segment, as `stack.sublayers` runs them."""
        scheme, kinds = self.scheme, self.longest[segment.first : segment.last]
        mix, shares = belonging(self.longest, segment.first, kinds, own)
        steps = {
            k: jax.checkpoint(stack.sublayer(scheme, layers[k]), policy=self.policy, prevent_cse=False)
            for k in set(kinds)
        }
        spans = self._spans(segment)
        begins = starts(spans, begins)
        slots, history = scheme.open(mix, history, begins)
        stream = begun(scheme.begin(history, begins))
        return stack.sublayers(steps, spans, history, stream, (slots, shares))

    def _spans(self, segment):
        """Loops, also of two turns (`spelling.periods`): over a whole one XLA lets a message travel."""
        return tuple(runs(self.longest[segment.first : segment.last]))

    @property
    def _kept(self):
        """What a segment keeps: the stream before each sublayer, and what the policy says."""
        policies = jax.checkpoint_policies
        return policies.save_from_both_policies(policies.save_only_these_names("stream"), self.policy)

    def _penalty(self, running, segment, ys):
        if self.penalty is None:
            return jnp.float32(0)
        return jnp.where(running, self.penalty(by_kind(self._spans(segment), ys)), 0)


def apart(scheme: Scheme) -> bool:
    """Whether the history is rows, one for each completed block."""
    history = jax.eval_shape(scheme.start, jax.ShapeDtypeStruct((1, 1, 1), jnp.float32))
    return type(history) is tuple and all(isinstance(rows, Rows) for rows in history)


def _summaries(rows):
    return rows.summary if isinstance(rows, Kept) else rows


def at(values: tuple, c: Any) -> Any:
    """The value of chunk `c`, itself where it is that of every chunk."""
    return values[0] if len(set(values)) == 1 else jnp.asarray(values)[c]


def select(which: Any, yes: PyTree, no: PyTree) -> PyTree:
    """`yes` or `no`; where `which` is no array, the other is not looked at."""
    if isinstance(which, bool):
        return yes if which else no
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), yes, no)


def pick(tree: PyTree, row: Any) -> PyTree:
    """One row of every leaf."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, row, 0, keepdims=False), tree)


def put(tree: PyTree, value: PyTree, row: Any) -> PyTree:
    """`value` as one row of every leaf."""
    return jax.tree.map(lambda a, v: lax.dynamic_update_index_in_dim(a, v, row, 0), tree, value)


def slice_rows(tree: PyTree, first: Any, count: int) -> PyTree:
    """`count` rows of every leaf."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, count), tree)


def put_rows(tree: PyTree, rows: PyTree, first: Any) -> PyTree:
    """`rows` in place of as many of every leaf, from row `first` on."""
    return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, first, 0), tree, rows)
