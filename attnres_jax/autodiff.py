"""Two pieces of automatic differentiation that the loop over depth needs, and JAX does not have."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def append_scan(step, count, new_rows, rows, xs):
    """Scan whose carry only grows: `new, y_i = step(rows, n, xs_i)`, then `rows[n : n + p] = new`.

    `rows` [count, ...] is padded to hold `new_rows` more; a step sees n rows and must read none
    beyond. Returns the full rows and the stacked y. Each row is written once, so the finished array
    serves the backward pass of every step: a plain scan would keep one copy of the rows a step.
    """
    rows = jnp.pad(rows, [(0, new_rows)] + [(0, 0)] * (rows.ndim - 1))
    first = jax.tree.map(lambda a: a[0], xs)
    step, closed_over = jax.closure_convert(step, rows, jnp.int32(count), first)
    return _append_scan(step, count, rows, xs, closed_over)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _append_scan(step, count, rows, xs, closed_over):
    return _append_fwd(step, count, rows, xs, closed_over)[0]


def _append_fwd(step, count, rows, xs, closed_over):
    reps = len(jax.tree.leaves(xs)[0])
    starts = count + (len(rows) - count) // reps * jnp.arange(reps, dtype=jnp.int32)

    def body(rows, nx):
        n, x = nx
        (new, y), pull = jax.vjp(
            lambda rows, x, closed_over: step(rows, n, x, *closed_over),
            *(rows, x, closed_over),
            saveable_args=False,  # they are handed back below, once, rather than kept for each step
        )
        return lax.dynamic_update_slice_in_dim(rows, new, n, 0), (y, pull)

    rows, (ys, pulls) = lax.scan(body, rows, (starts, xs))
    return (rows, ys), (rows, starts, xs, closed_over, pulls)


def _append_bwd(step, count, residuals, cotangents):
    rows, starts, xs, closed_over, pulls = residuals
    d_rows, d_ys = cotangents
    period = (len(rows) - count) // len(starts)
    y_avals = jax.tree.map(lambda d: jax.ShapeDtypeStruct(d.shape[1:], d.dtype), d_ys)

    def body(carry, step_values):
        d_rows, d_closed = carry
        n, x, pull, d_y = step_values
        pull = pull.replace(args_res=jax.tree.leaves((rows, x, closed_over)))
        d_new = lax.dynamic_slice_in_dim(d_rows, n, period)
        more, d_x, more_closed = pull((d_new, _restore_float0(d_y, y_avals)))
        rest = lax.dynamic_update_slice_in_dim(d_rows, jnp.zeros_like(d_new), n, 0)
        return (rest + more, jax.tree.map(jnp.add, d_closed, more_closed)), _drop_float0(d_x)

    init = (d_rows, jax.tree.map(jnp.zeros_like, closed_over))
    values = (starts, xs, pulls, _drop_float0(d_ys))
    (d_rows, d_closed), d_xs = lax.scan(body, init, values, reverse=True)
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
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [_differentiable(a) for a in leaves])


def _differentiable(a):
    return _reverse_only_p.bind(a) if jnp.issubdtype(a.dtype, jnp.inexact) else a


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
