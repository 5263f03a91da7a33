"""The only dispatcher between the reference and the kernels. A named implementation runs, or raises."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from attnres_jax import depth
from attnres_jax.autodiff import take, window
from attnres_jax.choice import choose
from attnres_jax.depth import Partial, Rows
from attnres_jax.norm import RMSNorm
from attnres_jax.placement import Placement
from attnres_jax.rules import RULE, Rule, no_kernel
from pallas_kernels.depth_merge import vjp as merge_kernel
from pallas_kernels.depth_mix import vjp as mix_kernel


def depth_mix(
    w: Float[Array, "S K"],
    sources: Sequence[Rows],
    *,
    rule: Rule = RULE,
    logits: Float[Array, "S R"] | None = None,
    last: bool = False,
    implementation: str | None = None,
    placement: Placement | None = None,
) -> tuple[Partial, tuple[Rows, ...]]:
    """Phase 1: S reads at once over completed summaries: mixtures and lse, [S, ...], and the sources.

    Later reads take the sources that come back, so that cotangents add up in place. `last`: none do, and
    only those in slots come back. `logits` are added to the scores of all rows, visible or not."""
    arrays, counts, slots = zip(*sources, strict=True)
    slotted = slots[0] is not None
    shape = len(w), sum(a.shape[slotted] for a in arrays), arrays[0].shape[-1], arrays[0].dtype
    unfit = no_kernel(rule, logits)
    chosen, _ = choose(implementation, placement, shape[-1], partial(mix_kernel.refusal, *shape), unfit)

    @jax.named_scope("depth_mix")
    def mix(shared, arrays):
        (w, counts, slots, logits), keep = shared, slotted or not last
        after = arrays if keep else ()
        if slotted and chosen != "tpu":  # which reads them where they lie
            (rows,), whole = window(*arrays, *slots, 1)
            arrays, after, slots, keep = (rows,), (whole,), None, False
        if chosen == "reference":
            return depth.partial_mix(w, tuple(map(Rows, arrays, counts)), rule, logits), after
        *done, same = mix_kernel.depth_mix(w, arrays, counts, rule.eps, keep, chosen, slots)
        return Partial(*done), same or after

    shared, kinds = (w, counts, slots if slotted else None, logits), ("slots" if slotted else "rows",)
    done, after = _local(chosen, placement, mix, shared, (arrays,), kinds, ("rows", *kinds))
    return done, tuple(map(Rows, after, counts, slots))


def depth_merge(
    w: Float[Array, " K"],
    done: Partial,
    stream: Float[Array, "*tokens D"],
    j: Any,
    first: Any,
    *,
    norm: RMSNorm | None = None,
    row: tuple[Array, Any] | None = None,
    rule: Rule = RULE,
    logit: Float[Array, ""] | None = None,
    implementation: str | None = None,
    placement: Placement | None = None,
) -> tuple[Float[Array, "*tokens D"], Partial, Float[Array, "*tokens D"]]:
    """Phase 2: row `j` of Phase 1, and the running sum (`first`: it is empty; or None), merged and normed.
    Also `done` and the sum, for later reads. `row` (array, place) holds the sum too; `logit` is its own."""
    fits = partial(merge_kernel.refusal, stream.shape[-1], stream.dtype)
    chosen, _ = choose(implementation, placement, stream.dtype, fits, no_kernel(rule, logit))

    @jax.named_scope("depth_merge")
    def merge(shared, done, stream, kept):
        w, scale, j, first, at, logit = shared
        if chosen == "reference":
            one, done = take(done, j)
            logit = jnp.where(first is not None and first, -jnp.inf, 0 if logit is None else logit)
            mixture = depth.merge(one, depth.single(w, stream, rule, logit), rule).mixture
            return mixture if scale is None else RMSNorm(scale, norm_eps)(mixture), done, stream
        args = (w, scale, *done, stream, kept, None, at, j, first, rule.eps, norm_eps, False, chosen)
        x, _, stream, *done = merge_kernel.depth_merge(*args)
        return x, Partial(*done), stream

    scale, norm_eps = (None, 0.0) if norm is None else (norm.scale.astype(w.dtype), norm.eps)
    kept, at = (None, None) if row is None or chosen == "reference" else row
    shared, kinds = (w, scale, j, first, at, logit), ("tokens", "rows", "tokens")
    return _local(chosen, placement, merge, shared, (done, stream, kept), (*kinds[1:], "rows"), kinds)


def _local(chosen, placement, op, shared, args, kinds, out_kinds):
    """`op(shared, *args)`, each device on its own tokens: before them "rows" have an axis, "slots" two."""
    if placement is None:
        return op(shared, *args)
    specs = {kind: P(*[None] * k, *placement.spec) for k, kind in enumerate(("tokens", "rows", "slots"))}
    inside, outside = (tuple(specs[k] for k in some) for some in (kinds, out_kinds))
    return placement.local(op, shared, args, inside, outside, typed=chosen not in ("gpu", "triton"))
