"""Two pieces of automatic differentiation that the loop over depth needs, and JAX does not have."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def append_scan(steps, split, count, rows, xs):
    """Scan whose carry only grows: the `steps`, in turn, each append a row, `reps` times over.

    Of iteration i, step j takes its part of `split(xs_i)`: `new, y = step(rows, n, part)`, then
    `rows[n : n + 1] = new`; it sees n rows (`count` at first) and must read none beyond. Returns the
    full rows and, for each step, the stacked y. Each row is written once, so the finished array
    serves the backward pass of every step: a plain scan would keep one copy of the rows a step, and
    steps joined into one would compute the rows that they hand each other again.
    """
    new_rows = len(steps) * len(jax.tree.leaves(xs)[0])
    rows = jnp.pad(rows, [(0, new_rows)] + [(0, 0)] * (rows.ndim - 1))
    parts = split(jax.tree.map(lambda a: a[0], xs))
    args = [(step, rows, jnp.int32(count), part) for step, part in zip(steps, parts, strict=True)]
    steps, closed_over = zip(*(jax.closure_convert(*a) for a in args), strict=True)
    return _append_scan(steps, split, count, rows, xs, closed_over)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _append_scan(steps, split, count, rows, xs, closed_over):
    return _append_fwd(steps, split, count, rows, xs, closed_over)[0]


def _append_fwd(steps, split, count, rows, xs, closed_over):
    starts = jnp.arange(count, len(rows), len(steps), dtype=jnp.int32)

    def body(rows, nx):
        (n, x), ys, pulls = nx, [], []
        for j, own in enumerate(zip(split(x), closed_over, strict=True)):
            (new, y), pull = jax.vjp(
                lambda rows, part, closed, j=j: steps[j](rows, n + j, part, *closed),
                *(rows, *own),
                saveable_args=False,  # they are handed back below, once, not kept for each step
            )
            rows = lax.dynamic_update_slice_in_dim(rows, new, n + j, 0)
            ys.append(y)
            pulls.append(pull)
        return rows, (ys, pulls)

    rows, (ys, pulls) = lax.scan(body, rows, (starts, xs))
    return (rows, ys), (rows, starts, xs, closed_over, pulls)


def _append_bwd(steps, split, count, residuals, cotangents):
    rows, starts, xs, closed_over, pulls = residuals
    d_rows, d_ys = cotangents
    y_avals = jax.tree.map(lambda d: jax.ShapeDtypeStruct(d.shape[1:], d.dtype), d_ys)

    def body(carry, step_values):
        (d_rows, d_closed), (n, x, pulls, d_ys) = carry, step_values
        d_ys, d_closed = _restore_float0(d_ys, y_avals), list(d_closed)
        parts, join = jax.vjp(split, x)
        d_parts = [None] * len(steps)
        for j in reversed(range(len(steps))):
            args = jax.tree.leaves((rows, parts[j], closed_over[j]))
            d_new = lax.dynamic_slice_in_dim(d_rows, n + j, 1)
            more, d_parts[j], d_own = pulls[j].replace(args_res=args)((d_new, d_ys[j]))
            d_rows, d_closed[j] = d_rows + more, jax.tree.map(jnp.add, d_closed[j], d_own)
        return (d_rows, tuple(d_closed)), _drop_float0(join(d_parts)[0])

    init = (d_rows, jax.tree.map(jnp.zeros_like, closed_over))
    values = (starts, xs, pulls, _drop_float0(d_ys))
    (d_rows, d_closed), d_xs = lax.scan(body, init, values, reverse=True)
    # A new row's own cotangent, used up, stays in d_rows: the transpose of the pad drops it.
    return d_rows, _restore_float0(d_xs, jax.tree.map(_tangent_aval, xs)), d_closed


_append_scan.defvjp(_append_fwd, _append_bwd)


def _tangent_aval(x):
    return jax.typeof(x).to_tangent_aval()


def _drop_float0(tree):
    """Cotangents of integers and keys have no values and cannot pass a scan: None in their place."""
    return jax.tree.map(lambda d: None if d.dtype == jax.dtypes.float0 else d, tree)


def _restore_float0(tree, avals):
    def fill(aval, d):
        return np.zeros(aval.shape, jax.dtypes.float0) if d is None else d

    return jax.tree.map(fill, avals, tree)


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
