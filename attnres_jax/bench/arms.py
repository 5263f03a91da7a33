"""This project's implementations as arms of `bench kernels`, through the ops that a model calls.

A block is one Phase 1 and S merges, as `residuals/attention.py` has them. A call, with all its reads and
their derivatives, is one compiled program.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnres_jax import ops
from attnres_jax.bench.work import EPS, Inputs, Work, named_gradients
from attnres_jax.depth import Partial, Rows
from attnres_jax.norm import RMSNorm
from attnres_jax.rules import Rule

RULE = Rule(EPS)
PLATFORMS = {"xla": ("cpu", "gpu", "tpu"), "tpu": ("tpu",), "gpu": ("gpu",), "triton": ("gpu",)}
"""Where an implementation runs."""


def elsewhere(implementation: str) -> str | None:
    """Why it does not run on the device at hand, or None."""
    legal, here = PLATFORMS[implementation], jax.default_backend()
    return None if here in legal else f"runs on {' and '.join(legal)}, this is {here}"


class Unsupported(Exception):
    """An arm that does not run here, or not this task; the words are the reason."""


class Ready(NamedTuple):
    """An arm that is compiled for one work."""

    results: Callable[[Inputs], dict[str, Any]]
    """JAX arrays by name, or sequences of their rows: `work.truth`'s names."""
    start: Callable[[], Any]
    """Starts `calls` calls, one after the other, over the input sets in turn."""
    wait: Callable[[Any], None]
    """Until what `start` returned is done."""
    calls: int
    note: str = ""


Maker = Callable[[Work, Sequence[Inputs], int], Ready]
"""Of a work, its input sets, and how often one start is to go through them."""


def make(implementation: str, work: Work, sets: Sequence[Inputs], repeats: int) -> Ready:
    """A `Maker`, but for its first argument. Raises `Unsupported`."""
    if problem := elsewhere(implementation):
        raise Unsupported(problem)
    call = jax.jit(
        partial(_both, {"mix": _mix, "merge": _merge, "block": _block}[work.task], implementation, work)
    )
    if repeats == len(sets) == 1:
        return Ready(call, partial(call, sets[0]), jax.block_until_ready, 1)
    loop = jax.jit(partial(_loop, call, repeats))
    return Ready(call, partial(loop, tuple(sets)), jax.block_until_ready, repeats * len(sets))


def _both(task, implementation, work, inputs):
    run = partial(task, implementation)
    if not work.backward:
        return run(inputs.arguments)
    results, pull = jax.vjp(run, inputs.arguments)
    (grads,) = pull(inputs.cotangents)
    return results | named_gradients(grads)


def _loop(call, repeats, sets):
    """Calls chained by a number that depends on all results: none is left out, none overtakes another."""

    def step(_, last):
        for inputs in sets:
            inputs, last = jax.lax.optimization_barrier((inputs, last))
            results = jax.lax.optimization_barrier(jax.tree.leaves(call(inputs)))
            last = sum((a.ravel()[0].astype(jnp.float32) for a in results), 0 * last)
        return last

    return jax.lax.fori_loop(0, repeats, step, jnp.float32(0))


def _mix(implementation, a):
    rows = (Rows(a["sources"]),)
    done, _ = ops.depth_mix(a["w"], rows, rule=RULE, last=True, implementation=implementation)
    return {"mixture": done.mixture}


def _merge(implementation, a):
    done = Partial(a["mixture"][None], a["lse"][None])
    how = {"norm": RMSNorm(a["scale"], EPS), "rule": RULE, "implementation": implementation}
    x, done, stream = ops.depth_merge(a["w"], done, a["stream"], jnp.int32(0), jnp.bool(False), **how)
    return {"x": _after(x, done), "stream": stream}


def _block(implementation, a):
    how, rows = {"rule": RULE, "implementation": implementation}, (Rows(a["sources"]),)
    done, _ = ops.depth_mix(a["w"], rows, last=True, **how)
    x, p = [], a["y"][0]
    for j, (w, scale, y) in enumerate(zip(a["w"], a["scale"], a["y"], strict=True)):
        read, done, p = ops.depth_merge(
            w, done, p, jnp.int32(j), jnp.bool(j == 0), norm=RMSNorm(scale, EPS), **how
        )
        # A sublayer makes y of x, after it: the sums of a block cannot be one fusion.
        read, y, p = jax.lax.optimization_barrier((read, y, p))
        x.append(read)
        p = p + y if j else p  # the first read has no sum; the sum then is y_0
    return {"x": (*x[:-1], _after(x[-1], done)), "summary": p}


@jax.custom_vjp
def _after(x, done):
    """`x`, when no read is to come: each wrote its row of the cotangents of `done`, which start as nothing.

    So it is in a model (`autodiff.Once`); autodiff alone would fill them with zeros first."""
    del done
    return x


def _after_bwd(done, d_x):
    return d_x, jax.tree.map(lambda a: jax.lax.empty(a.shape, a.dtype), done)


_after.defvjp(lambda x, done: (x, done), _after_bwd)
