"""The programs of a run, compiled once each: update, evaluate, look."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import stages
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from attnres_jax import configs
from attnres_jax.analysis.dynamics import DepthStatistics, depth_statistics, gradient_norm
from attnres_jax.analysis.inspect import parameters
from attnres_jax.configs import Config
from attnres_jax.models.table import path_name
from attnres_jax.models.transformer import ModelConfig
from attnres_jax.parallel import sharding
from attnres_jax.parallel.mesh import make_mesh, placement
from attnres_jax.parallel.mesh import tokens as token_sharding
from attnres_jax.placement import Placement
from attnres_jax.train import state
from attnres_jax.train.optim import optimizer
from attnres_jax.train.state import State

LOOK = 4
"""Sequences of a batch that the statistics over depth are taken on."""
Loss = Callable[[Any, Int[Array, "B T1"]], Float[Array, ""]]


class NonFinite(configs.UserError):
    """Training diverged; names the step and the first leaf that is not finite."""


class Updated(NamedTuple):
    """What one update says of itself, before clipping."""

    loss: Float[Array, ""]
    """Nats per token, mean over the batch, at the parameters before the update."""
    leaf_norms: dict[str, Float[Array, ""]]
    """L2 norm of each leaf of the gradient, by path."""
    depth_norms: Float[Array, " L"]
    """L2 norm of the gradient of each sublayer's parameters."""


class Programs(NamedTuple):
    """Jitted functions of one config on one mesh; `update` takes over the memory of the state it is given."""

    model: ModelConfig
    mesh: Mesh
    names: tuple[str, ...]
    """Paths of the parameters, in order of the forward pass."""
    place: NamedSharding
    """Of tokens and masks [B, ...]."""
    like: State
    """Shapes and places of a state."""
    create: Callable[[], State]
    update: stages.Wrapped  # (State, tokens) -> (State, Updated)
    nats: Callable[[Any, Array, Array], Array]
    look: Callable[[Any, Array], DepthStatistics]


def programs(config: Config, vocab: int, devices: Sequence[Any] | None = None) -> Programs:
    """Everything a run computes, on `devices` (None: all there are).

    Raises:
      ConfigError: where mesh and model do not fit together.
    """
    model, mesh = configs.model_config(config, vocab), make_mesh(config.mesh.to_dict(), devices)
    table, place, whole = parameters(model), placement(mesh), NamedSharding(mesh, P())
    sharding.check(table, mesh, config.data.batch // config.train.accumulation, config.data.length)
    tx = optimizer(config, table)
    create = partial(state.create, model, tx, config.seed)
    places = sharding.shardings(jax.eval_shape(create), table, mesh)
    batch = token_sharding(mesh)

    def loss(params, tokens):
        return jnp.mean(token_nats(state.merge(model, params), tokens, place))

    def step(now, tokens):
        value, gradient = accumulated(loss, now.params, tokens, config.train.accumulation)
        return _updated(tx, now, value, gradient, model.kinds)

    def nats(params, tokens, mask):
        return position_nats(state.merge(model, params), tokens, mask, place)

    return Programs(
        *(model, mesh, tuple(parameter.path for parameter in table), batch),
        sharding.placed(jax.eval_shape(create), places),
        jax.jit(create, out_shardings=places),
        jax.jit(step, in_shardings=(places, batch), out_shardings=(places, whole), donate_argnums=0),
        jax.jit(nats, in_shardings=(places.params, batch, batch), out_shardings=whole),
        jax.jit(
            lambda params, tokens: look(state.merge(model, params), tokens),
            in_shardings=(places.params, batch),
            out_shardings=whole,
        ),
    )


def token_nats(model: Any, tokens: Int[Array, "B T1"], place: Placement | None = None) -> Float[Array, "B T"]:
    """Cross-entropy of each next token."""
    logits = model(tokens[:, :-1], placement=place).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def position_nats(
    model: Any, tokens: Int[Array, "B T1"], mask: Bool[Array, "B T"], place: Placement | None = None
) -> Float[Array, " T"]:
    """Sum over a batch of the cross-entropy at each position."""
    return jnp.sum(jnp.where(mask, token_nats(model, tokens, place), 0), 0)


def look(model: Any, tokens: Int[Array, "B T1"]) -> DepthStatistics:
    """Statistics over depth of a recorded forward pass on the first `LOOK` sequences."""
    return depth_statistics(model(tokens[:LOOK, :-1], record=True).depth.record)


def accumulated(
    loss: Loss, params: Any, tokens: Int[Array, "B T1"], microbatches: int
) -> tuple[Float[Array, ""], Any]:
    """Loss and gradient of the batch, computed in equal microbatches one after the other."""
    function = jax.value_and_grad(loss)
    if microbatches == 1:
        return function(params, tokens)

    def add(total, tokens):
        return jax.tree.map(jnp.add, total, function(params, tokens)), None

    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, params, tokens))
    total, _ = jax.lax.scan(add, zero, tokens.reshape(microbatches, -1, tokens.shape[1]))
    return jax.tree.map(lambda leaf: leaf / microbatches, total)


def _updated(tx, now, loss, gradient, kinds):
    updates, opt_state = tx.update(gradient, now.opt_state, now.params)
    params: Any = optax.apply_updates(now.params, updates)
    norms = {path_name(path): jnp.linalg.norm(g) for path, g in jax.tree.leaves_with_path(gradient)}
    out = Updated(loss, norms, gradient_norm(gradient, kinds))
    return State(now.step + 1, params, opt_state), out


def check_finite(step: int, out: Updated, names: Sequence[str]) -> None:
    """Raise `NonFinite` unless the loss and the whole gradient of `step` are finite."""
    bad = [name for name in names if not np.isfinite(out.leaf_norms[name])]
    if bad or not np.isfinite(out.loss):
        where = f"the gradient of {bad[0]} is the first that is not" if bad else "all gradients are"
        raise NonFinite(
            f"step {step}: loss {float(out.loss)} is not finite; {where}. Nothing after the last "
            "checkpoint is kept: train in a new --workdir with a lower optim.lr or more optim.warmup"
        )
