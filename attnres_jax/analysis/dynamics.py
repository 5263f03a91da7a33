"""Dynamics by depth: output RMS, gradient norm, entropy and weights of reads (Figures 5 and 8)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float

from attnres_jax.axes import compute_dtype
from attnres_jax.residuals import AttnRes
from attnres_jax.residuals.base import Scheme
from attnres_jax.walk import Record


class DepthStatistics(NamedTuple):
    """Means over all recorded tokens; what a trainer logs and a figure shows."""

    output_rms: Float[Array, " L"]
    """RMS of v_1 .. v_L, what each sublayer adds."""
    entropy: Float[Array, " reads"]
    """Entropy in nats of the weights of each of the L + 1 reads; 0 for one source."""
    weights: Float[Array, "reads R"]
    """Mean weight of each source of each read, zero where a read has fewer sources."""


def weighs_outputs(scheme: Scheme) -> bool:
    """Whether the sources of a read are outputs or sums of them, so that its weights say who is read."""
    return isinstance(scheme, AttnRes) or (scheme.append_only and not scheme.matrices)


def depth_statistics(record: Record) -> DepthStatistics:
    """Statistics of a recorded forward pass; usable inside jit. The entropy is that of absolute weights,
    as shares of their sum."""
    outputs = record.outputs[1:].astype(compute_dtype(record.outputs.dtype))
    most = max(map(len, record.weights))
    return DepthStatistics(
        jnp.sqrt(jnp.mean(outputs**2, (1, 2, 3))),
        jnp.stack([_entropy(w) for w in record.weights]),
        jnp.stack([jnp.pad(jnp.mean(w.reshape(len(w), -1), 1), (0, most - len(w))) for w in record.weights]),
    )


def _entropy(weights):
    total = jnp.sum(jnp.abs(weights), 0)
    return jnp.mean(jnp.sum(entr(jnp.abs(weights) / jnp.where(total > 0, total, 1)), 0))


def gradient_norm(
    gradients: Mapping[str, Any], kinds: str, ordered: Callable[[Any], Any] = lambda tree: tree
) -> Float[Array, " L"]:
    """L2 norm of each sublayer's parameter gradient, in order of depth; usable inside jit.

    `gradients` is an `nnx.State` or a pure dict with leaves `layers/<kind>/...` [n_kind, ...]; `ordered` puts
    what is not in order of depth in that order.
    """
    order = sorted(set(kinds))
    found = ordered({"layers": {kind: {"": _squares(gradients["layers"][kind])} for kind in order}})
    squares = jnp.concatenate([found["layers"][kind][""] for kind in order])
    first = {kind: sum(map(kinds.count, order[:at])) for at, kind in enumerate(order)}
    position = [first[kind] + kinds[:at].count(kind) for at, kind in enumerate(kinds)]
    return jnp.sqrt(squares[np.array(position)])


def _squares(stacked):
    leaves = (leaf.astype(compute_dtype(leaf.dtype)) for leaf in jax.tree.leaves(stacked))
    return sum(jnp.sum(leaf**2, tuple(range(1, leaf.ndim))) for leaf in leaves)
