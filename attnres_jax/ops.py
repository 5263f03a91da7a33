"""The only dispatcher between the reference and the kernels. A named implementation runs, or raises."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Array, Float

from attnres_jax import depth
from attnres_jax.depth import Partial, Rows

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
) -> Partial:
    """Phase 1: S reads at once over completed summaries; mixture [S, ..., D], lse [S, ...]."""
    choose(implementation)
    return depth.partial_mix(w, sources, eps)


def depth_merge(
    w: Float[Array, " D"],
    done: Partial,
    stream: Float[Array, "*tokens D"],
    mask: Float[Array, ""],
    *,
    eps: float,
    implementation: str | None = None,
) -> Float[Array, "*tokens D"]:
    """Phase 2: Phase 1 of one read, merged with the running sum. `mask` = -inf hides an empty sum."""
    choose(implementation)
    return depth.merge(done, Partial(stream, depth.scores(w, stream, eps) + mask)).mixture
