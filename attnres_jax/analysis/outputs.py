"""What each sublayer's output counts for: its share of the stream it is added to, and the loss without it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from attnres_jax.analysis import matrix
from attnres_jax.axes import compute_dtype
from attnres_jax.models.transformer import logits
from attnres_jax.residuals.base import Mix, Scheme
from attnres_jax.walk import Record, start


class Shares(NamedTuple):
    """Root mean squares over tokens and channels (and states), for sublayers 1 .. L."""

    stream: Float[Array, " L"]
    """RMS of the stream after the sublayer has written: h + y in the plain residual, the running sum of
    its block in Block AttnRes, y itself in Full."""
    added: Float[Array, " L"]
    """RMS of the output over that of the stream it is added to; NaN where a block begins without one."""
    read: Float[Array, " L"]
    """RMS of M[l+1, l] v_l over that of h_{l+1}: what the next read has of the output."""


def shares(scheme: Scheme, mix: Mix, record: Record) -> Shares:
    """Of a recorded forward pass, whose writes are made again; usable inside jit."""
    scheme, outputs = scheme.literal(), _wide(record.outputs)
    depth, stream, added = start(scheme, mix, len(outputs) - 1, outputs[0]), [], []
    for y in outputs[1:]:
        before, slot = depth.stream, depth.slots[0]
        added.append(jnp.nan if before is None else _rms(y) / _rms(before))
        stream.append(_rms(scheme.write(slot, before, y)))
        depth = depth.write(y)
    return Shares(jnp.stack(stream), jnp.stack(added), _read(scheme, record, outputs))


def without_each(model: Any, tokens: Int[Array, "B T1"]) -> Float[Array, " L1"]:
    """Mean nats per token of the model as it is, then with the output of sublayer 1, 2, .. L times zero.

    The other parameters, and whatever weighs the outputs, stay: a skipped output is a zero that is read.
    """
    L, inputs, targets = model.config.sublayers, tokens[:, :-1], tokens[:, 1:]

    def nats(keep):
        h = model.hidden(inputs, keep=keep).h
        each = optax.softmax_cross_entropy_with_integer_labels(logits(h, model.unembedding), targets)
        return jnp.mean(each)

    keeps = jnp.concatenate([jnp.ones((1, L)), 1 - jnp.eye(L)])
    return jax.lax.map(nats, keeps)


def _read(scheme, record, outputs):
    def share(l):
        alone = jnp.where((jnp.arange(len(outputs)) == l)[:, None, None, None], outputs, 0)
        part, whole = matrix.apply(scheme, record, alone)[l], _wide(record.mixtures[l])
        return _rms(part) / _rms(whole)

    return jax.lax.map(share, jnp.arange(1, len(outputs)))


def _rms(v):
    return jnp.sqrt(jnp.mean(_wide(v) ** 2))


def _wide(v):
    return v.astype(compute_dtype(v.dtype))
