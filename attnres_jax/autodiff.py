"""Pieces of automatic differentiation that the loop over depth needs, and JAX does not have."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


class Once(NamedTuple):
    """Arrays [S, ...] of which exactly one step takes each row: its cotangent is written, never added."""

    rows: Any


class Block(NamedTuple):
    """One iteration of `append_scan`: `open`, then steps in turn, `segments` of them `reps` times over.

    `open(rows, n, own)` sees n rows and returns what all steps share (first the rows; some may be `Once`),
    their carry (or None, where the first is not in a loop), and for each segment and step its inputs
    [reps, ...]. A step is `shared, carry, y = step(shared, carry, inputs, row)`, with `shared` `open`'s and
    the scan's `whole`, a pair: handed on as they are, so that later steps' cotangents come in to be added to.
    `row` is None or (array, place): where the value of the carry lies too (but for the block's first, which
    `open` makes), so that a kernel need not have it copied out. The last carry is the new row.
    `view` reshapes rows for `open`, which takes them as they come: with kernels its pullback keeps none.
    `keeps`: what it makes is kept for the backward pass, which else makes it again.
    """

    open: Callable[..., tuple[Any, Array | None, list[list[Any]]]]
    segments: tuple[tuple[tuple[Callable[..., Any], ...], int], ...]
    view: Callable[[Array], Array] = lambda rows: rows
    keeps: bool = False

    @property
    def kept(self) -> int:
        """Carries to keep: one before each step, but for the first one, which `open` makes."""
        return sum(len(steps) * reps for steps, reps in self.segments) - 1


def append_scan(blocks, split, rows, n, xs, whole):
    """Scan over `blocks`, `reps` times over, each of which writes a row, from `n` on, and sees those before.

    `rows` have room for them: numbers, for what nobody sees yet meets weights of zero. Of iteration i, block
    j takes its part of `split(xs_i)`. `whole` are arrays [n, ...] of parameters, each row of which one step
    is to `take`: scans inside scans would copy them, and their gradients, at each level. Returns the rows
    and, for each block, segment and step, the stacked y. Kept for the backward pass: the rows, once, for each
    was written once; the carry before each step, in one array that grows as they do; what steps keep of their
    own; what `open` makes, where a block `keeps` it.
    """
    reps = len(jax.tree.leaves(xs)[0])
    count_kept = reps * sum(block.kept for block in blocks)
    # One more, where the last step of a block is one of a scan: it stores its carry too, which is a row.
    kept = lax.empty((count_kept + any(b.segments[-1][1] > 1 for b in blocks), *rows.shape[1:]), rows.dtype)
    n, converted, closed_over = jnp.asarray(n, jnp.int32), [], []
    for block, own in zip(blocks, split(jax.tree.map(lambda a: a[0], xs)), strict=True):
        opened, carry, inputs = block.open(block.view(rows), n, own)  # for its types alone
        shared = opened, whole
        start, of_start = jax.closure_convert(block.open, block.view(rows), n, own)
        segments, of_steps = [], []
        row = None if block.segments[0][1] == 1 else (kept, n)
        for (steps, times), values in zip(block.segments, inputs, strict=True):
            found = []
            for step, value in zip(steps, jax.tree.map(lambda a: a[0], values), strict=True):
                found.append(jax.closure_convert(step, shared, carry, value, row))
                carry, row = rows[0], (kept, n)
            steps, closed = zip(*found, strict=True)
            segments.append((steps, times))
            of_steps.append(list(closed))
        converted.append(block._replace(open=start, segments=tuple(segments)))
        closed_over.append([of_start, of_steps])
    return _append_scan(tuple(converted), split, (count_kept, len(kept)), rows, n, xs, whole, closed_over)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _append_scan(blocks, split, counts, rows, n, xs, whole, closed_over):
    return _append_fwd(blocks, split, counts, rows, n, xs, whole, closed_over)[0]


def _append_fwd(blocks, split, counts, rows, n, xs, whole, closed_over):
    kept = lax.empty((counts[1], *rows.shape[1:]), rows.dtype)
    if any(block.segments[0][1] > 1 for block in blocks):  # see `_forward`; else XLA writes zeros to it all
        kept = lax.dynamic_update_slice_in_dim(lax.optimization_barrier(kept), jnp.zeros_like(rows[:1]), 0, 0)

    def body(state, x):
        (rows, n, kept, at), ys, pulls = state, [], []
        for block, own, closed in zip(blocks, split(x), closed_over, strict=True):
            new, (kept, at), y, pull = _forward(block, closed, rows, n, own, whole, (kept, at))
            rows, n = lax.dynamic_update_index_in_dim(rows, new, n, 0), n + 1
            ys.append(y)
            pulls.append(pull)
        return (rows, n, kept, at), (ys, pulls)

    (rows, n, kept, _), (ys, pulls) = _loop(body, (rows, n, kept, jnp.int32(0)), xs)
    return (rows, ys), (rows, n, kept, xs, whole, closed_over, pulls)


def _forward(block, closed_over, rows, n, own, whole, keep):
    """One block: its last carry, the kept ones, and for each segment and step y and pullback, [reps, ...];
    before these pullbacks, what `open` made and its own, or None."""
    ys, args = [], (block.view(rows), n, own, closed_over[0])
    if block.keeps:
        made, pull = jax.vjp(partial(_spread, block.open), *args, saveable_args=False)
        pulls: list[Any] = [(_with_rows(made, n), pull)]  # without the rows, which are written over
    else:
        made, pulls = _spread(block.open, *args), [None]
    opened, carry, inputs = made
    for s, ((steps, reps), values, closed) in enumerate(
        zip(block.segments, inputs, closed_over[1], strict=True)
    ):

        def body(state, values, steps=steps, closed=closed, s=s, reps=reps):
            (carry, kept, at), (r, values), ys, pulls = state, values, [], []
            for k, (step, value, own) in enumerate(zip(steps, values, closed, strict=True)):
                # Of the first step in a scan this is another's carry, or zeros: numbers, at least.
                row = None if reps == 1 and s == k == 0 else (kept, jnp.maximum(at - 1, 0))
                args = ((opened, whole), carry, value, row, own)
                (_, carry, y), pull = jax.vjp(partial(_spread, step), *args, saveable_args=False)
                ys.append(y)
                pulls.append(pull)
                ends = s == len(block.segments) - 1 and k == len(steps) - 1
                if not ends or reps > 1:
                    kept = lax.dynamic_update_index_in_dim(kept, carry, at, 0)
                    at = at + (r < reps - 1 if ends else 1)
            return (carry, kept, at), (ys, pulls)

        (carry, *keep), (y, pull) = _loop(body, (carry, *keep), (jnp.arange(reps), values))
        ys.append(y)
        pulls.append(pull)
    return carry, keep, ys, pulls


def _spread(f, *args):
    return f(*args[:-1], *args[-1])


def _with_rows(made, rows):
    """What `open` made with `rows`, or a number in their place."""
    (_, *others), tree = jax.tree.flatten(made)
    return jax.tree.unflatten(tree, [rows, *others])


def _append_bwd(blocks, split, counts, residuals, cotangents):
    rows, n, kept, xs, whole, closed_over, pulls = residuals
    d_rows, d_ys = cotangents
    of_y = jax.tree.map(lambda d: jax.ShapeDtypeStruct(d.shape[1:], d.dtype), d_ys)

    def body(state, values):
        (d_rows, d_whole, d_closed, n, at), (x, pulls, d_ys) = state, values
        d_ys, d_closed = _restore_float0(d_ys, of_y), list(d_closed)
        parts, join = jax.vjp(split, x)
        d_parts = [None] * len(blocks)
        for j in reversed(range(len(blocks))):
            n = n - 1
            d_new = lax.dynamic_index_in_dim(d_rows, n, 0, keepdims=False)
            args = (blocks[j], closed_over[j], rows, n, parts[j], whole, kept, at, pulls[j])
            d_rows, d_whole, d_parts[j], d_own, at = _backward(*args, (d_rows, d_whole), d_new, d_ys[j])
            d_closed[j] = jax.tree.map(jnp.add, d_closed[j], d_own)
        return (d_rows, d_whole, d_closed, n, at), _drop_float0(join(d_parts)[0])

    d_whole, d_closed = _room(whole, lax.empty), jax.tree.map(jnp.zeros_like, closed_over)
    init = (d_rows, d_whole, d_closed, n, jnp.int32(counts[0]))
    (d_rows, d_whole, d_closed, *_), d_xs = _loop(body, init, (xs, pulls, _drop_float0(d_ys)), reverse=True)
    d_xs, d_whole = (_restore_float0(d, _tangents(a)) for d, a in ((d_xs, xs), (d_whole, whole)))
    return d_rows, None, d_xs, d_whole, d_closed  # those of rows that it wrote are used up, and left


def _backward(block, closed_over, rows, n, own, whole, kept, at, pulls, d_so_far, d_carry, d_ys):
    """The transpose of `_forward`, on what it kept: cotangents of rows and whole (all so far), own,
    closed_over."""
    (of_open, *pulls), args = pulls, (block.view(rows), n, own, closed_over[0])
    opened: Any = of_open or jax.vjp(partial(_spread, block.open), *args, saveable_args=False)
    shared, first, inputs = _with_rows(opened[0], args[0])
    d_rows, d_whole = d_so_far
    d_shared, shared = (_fresh(shared, d_rows), d_whole), (shared, whole)
    of_shared = _tangents(shared)
    d_inputs: list[Any] = [None] * len(inputs)
    d_closed: list[Any] = [None] * len(inputs)
    for s in reversed(range(len(inputs))):
        (steps, reps), closed = block.segments[s], closed_over[1][s]
        of_y = jax.tree.map(lambda d: jax.ShapeDtypeStruct(d.shape[1:], d.dtype), d_ys[s])

        def body(state, values, steps=steps, closed=closed, s=s, reps=reps, of_y=of_y):
            (d_shared, d_carry, d_closed, at), (r, values, pulls, d_ys) = state, values
            d_values, d_closed = [None] * len(steps), list(d_closed)
            for k in reversed(range(len(steps))):
                carry, row, begins = first, None, s == k == 0
                if not begins or reps > 1:
                    at = at - (r > 0 if begins else 1)
                    carry, row = lax.dynamic_index_in_dim(kept, at, 0, keepdims=False), (kept, at)
                    carry = jnp.where(r > 0, carry, first) if begins else carry
                args = (shared, carry, values[k], row, closed[k])
                pull = pulls[k].replace(args_res=jax.tree.leaves(args))
                d_out = (_restore_float0(d_shared, of_shared), d_carry, _restore_float0(d_ys[k], of_y[k]))
                d_shared, d_carry, d_values[k], _, d_own = pull(d_out)
                d_shared, d_closed[k] = _drop_float0(d_shared), jax.tree.map(jnp.add, d_closed[k], d_own)
            return (d_shared, d_carry, d_closed, at), _drop_float0(d_values)

        zeros = jax.tree.map(jnp.zeros_like, closed)
        of_input = _tangents(inputs[s])
        values = (jnp.arange(reps), inputs[s], pulls[s], _drop_float0(d_ys[s]))
        state, d_value = _loop(body, (d_shared, d_carry, zeros, at), values, reverse=True)
        d_shared, d_carry, d_closed[s], at = state
        d_inputs[s] = _restore_float0(d_value, of_input)
    d_opened, d_whole = d_shared
    pull_open = opened[1].replace(args_res=jax.tree.leaves(args))
    d_view, _, d_own, d_start = pull_open((_restore_float0(d_opened, of_shared[0]), d_carry, d_inputs))
    return d_view.reshape(rows.shape), d_whole, d_own, [d_start, d_closed], at


_append_scan.defvjp(_append_fwd, _append_bwd)


def _loop(body, state, xs, reverse=False):
    """`lax.scan`, but once is not a loop."""
    if len(jax.tree.leaves(xs)[0]) > 1:
        return lax.scan(body, state, xs, reverse=reverse)
    state, y = body(state, jax.tree.map(lambda a: a[0], xs))
    return state, jax.tree.map(lambda a: a[None], y)


def _fresh(shared, d_rows):
    """The cotangent of `shared` after the last step: `d_rows` for its first leaf, nothing for the others."""
    (rows, *others), tree = jax.tree.flatten(shared, is_leaf=lambda node: isinstance(node, Once))
    others = [_room(node, lax.empty if isinstance(node, Once) else jnp.zeros) for node in others]
    return jax.tree.unflatten(tree, [d_rows.reshape(rows.shape), *others])


def _room(tree, make):
    """For cotangents; `lax.empty` for what is taken once, row by row: each is written, none is added to."""
    return jax.tree.map(lambda a: make(a.shape, a.dtype), _drop_float0(_tangents(tree)))


@jax.custom_vjp
def take(tree, j):
    """Row `j` of every leaf of `Once`, and the leaves for others to take from."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, j, 0, keepdims=False), tree), tree


def _take_bwd(j, cotangents):
    def write(d, row):
        return d if d.dtype == jax.dtypes.float0 else lax.dynamic_update_index_in_dim(d, row, j, 0)

    row, rest = cotangents
    return jax.tree.map(write, rest, row), None


take.defvjp(lambda tree, j: (take(tree, j), j), _take_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def window(tree, first, count):
    """`count` rows of every leaf, and the leaves for others, to whose cotangents those of rows are added."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, count), tree), tree


def _window_bwd(count, first, cotangents):
    rows, whole = cotangents
    sums = jax.tree.map(jnp.add, window(whole, first, count)[0], rows)
    return jax.tree.map(lambda d, a: lax.dynamic_update_slice_in_dim(d, a, first, 0), whole, sums), None


window.defvjp(lambda tree, first, count: (window(tree, first, count), first), _window_bwd)


def taking(key: Any, step: Callable[..., Any], policy: Callable[..., Any]) -> Callable[..., Any]:
    """`step` as `Block` takes it: its second input is a place in `whole[key]`, from where it has its own.

    Kept for the backward pass is what `policy` says, and never the row that was taken: it lies in `whole`.
    """

    def run(shared, carry, inputs, row):
        (opened, whole), (first, place) = shared, inputs
        own, rest = take(whole[key], place)
        opened, carry, y = step(opened, carry, (first, own), row)
        return (opened, whole | {key: rest}), carry, y

    def kept(primitive, *avals, **params):
        # A policy sees of a custom_vjp only what it calls.
        called = params.get("call_jaxpr")
        taken = called is not None and called.jaxpr.debug_info.func_name == take.__name__
        return not taken and policy(primitive, *avals, **params)

    # A barrier before what is made again, or XLA begins it early; before what is kept it would copy that.
    again = policy is not jax.checkpoint_policies.everything_saveable
    return jax.checkpoint(run, policy=kept, prevent_cse=again)


def _tangents(tree):
    return jax.tree.map(lambda a: jax.typeof(a).to_tangent_aval(), tree)


def _drop_float0(tree):
    """Cotangents of integers and keys have no values and cannot pass a scan: None in their place."""
    return jax.tree.map(lambda d: None if d.dtype == jax.dtypes.float0 else d, tree)


def _restore_float0(tree, avals):
    return jax.tree.map(lambda a, d: np.zeros(a.shape, jax.dtypes.float0) if d is None else d, avals, tree)


def reverse_only(tree):
    """Identity that refuses forward-mode differentiation with a message that says what to do."""
    return jax.tree.map(
        lambda a: _reverse_only_p.bind(a) if jnp.issubdtype(a.dtype, jnp.inexact) else a, tree
    )


def _refuse(*_):
    raise TypeError(
        "forward-mode differentiation (jvp, jacfwd, hessian) does not pass through the fast path of "
        'through_depth, which is reverse mode only: call it with implementation="reference"'
    )


# The tangent goes through a linear primitive that can be transposed (reverse mode) and never evaluated.
_reverse_only_p, _tangent_p = Primitive("reverse_only"), Primitive("reverse_only_tangent")
for _p in (_reverse_only_p, _tangent_p):
    _p.def_abstract_eval(lambda aval: aval)
    batching.defvectorized(_p)
_reverse_only_p.def_impl(lambda a: a)
mlir.register_lowering(_reverse_only_p, lambda ctx, a: [a])
ad.deflinear2(_tangent_p, lambda ct, _: [ct])
ad.defjvp(_reverse_only_p, lambda t, _: _tangent_p.bind(t))
_tangent_p.def_impl(_refuse)
mlir.register_lowering(_tangent_p, _refuse)
