"""The only dispatcher between the reference and the kernels. A named implementation runs, or raises."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from attnres_jax import depth
from attnres_jax.depth import Partial, Rows
from attnres_jax.placement import Placement

IMPLEMENTATIONS = ("reference",)


class Choice(NamedTuple):
    """The implementation that runs, and why."""

    implementation: str
    reason: str


def choose(implementation: str | None = None) -> Choice:
    """Which implementation runs. Raises `ValueError` for a name that does not exist."""
    if implementation is None:
        return Choice("reference", "the only implementation so far: jnp, compiled by XLA")
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation must be None or one of {names}, got {implementation!r}")
    return Choice(implementation, "named by the caller")


def depth_mix(
    w: Float[Array, "S D"],
    sources: Sequence[Rows],
    *,
    eps: float,
    implementation: str | None = None,
    placement: Placement | None = None,
) -> Partial:
    """Phase 1: S reads at once over completed summaries; mixture [S, ..., D], lse [S, ...]."""
    choose(implementation)

    @jax.named_scope("depth_mix")
    def mix(w, sources):
        return depth.partial_mix(w, sources, eps)

    if placement is None:
        return mix(w, sources)
    rows = PartitionSpec(None, *placement.spec)
    specs = jax.tree.map(lambda leaf: rows if jax.numpy.ndim(leaf) else PartitionSpec(), sources)
    return placement.local(mix, w, (sources,), (specs,), rows)


def depth_merge(
    w: Float[Array, " D"],
    done: Partial,
    stream: Float[Array, "*tokens D"],
    mask: Float[Array, ""],
    *,
    eps: float,
    implementation: str | None = None,
    placement: Placement | None = None,
) -> Float[Array, "*tokens D"]:
    """Phase 2: Phase 1 of one read, merged with the running sum. `mask` = -inf hides an empty sum."""
    choose(implementation)

    @jax.named_scope("depth_merge")
    def merge(w, done, stream, mask):
        return depth.merge(done, Partial(stream, depth.scores(w, stream, eps) + mask)).mixture

    if placement is None:
        return merge(w, done, stream, mask)
    spec = placement.spec
    specs = (spec, spec, PartitionSpec())
    return placement.local(merge, w, (done, stream, mask), specs, spec)
