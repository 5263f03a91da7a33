"""The state of a run: one value, saved and restored whole."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from attnres_jax.models.transformer import ModelConfig, Transformer, abstract


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """After `step` updates. `params` is the pure dict of the model's parameters, at least fp32.

    There is nothing else to save: the data's position is `step`, and no layer draws random numbers.
    """

    step: Any  # int32 []
    params: dict[str, Any]
    opt_state: optax.OptState


def create(config: ModelConfig, tx: optax.GradientTransformation, seed: int) -> State:
    """The state before the first update."""
    params = nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(seed))))
    return State(jnp.int32(0), params, tx.init(params))


def shapes(config: ModelConfig) -> dict[str, Any]:
    """Parameters as shapes and dtypes."""
    return nnx.to_pure_dict(nnx.state(abstract(config)))


def merge(config: ModelConfig, params: dict[str, Any]) -> Transformer:
    """The model with these parameters."""
    return nnx.merge(nnx.graphdef(abstract(config)), params)
