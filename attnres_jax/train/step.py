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
from jaxtyping import Array, Bool, Float, Int

from attnres_jax import configs
from attnres_jax.analysis.dynamics import DepthStatistics, depth_statistics, gradient_norm
from attnres_jax.analysis.inspect import parameters
from attnres_jax.configs import Config
from attnres_jax.models import attention
from attnres_jax.models.table import path_name
from attnres_jax.models.transformer import ModelConfig, logits
from attnres_jax.parallel import mesh as meshes
from attnres_jax.parallel import sharding
from attnres_jax.train import state
from attnres_jax.train.loss import NextToken, apart, configured, document_end, objective, predictions
from attnres_jax.train.optim import optimizer
from attnres_jax.train.pipelined import Pipelined
from attnres_jax.train.pipelined import check as check_pipeline
from attnres_jax.train.state import State

LOOK = 4
"""Sequences of a batch that the statistics over depth are taken on."""
Loss = Callable[[Any, Int[Array, "B T1"]], tuple[Float[Array, ""], Any]]
"""Of parameters and tokens: what is minimised and what is reported, parts of sums over the batch."""


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
    """Shapes and places of a state. On a pipelined mesh layers are in order of stages (`parallel.layout`)."""
    stored: State
    """Of one as it is saved, on any mesh: in order of depth."""
    create: Callable[[], State]
    resume: Callable[[Any], Any]
    """A state, or a part of one (its parameters), of a saved one."""
    save: Callable[[State], State]
    """The inverse."""
    update: stages.Wrapped  # (State, tokens) -> (State, Updated)
    nats: Callable[[Any, Array, Array], Array]
    logits: Callable[[Any, Any, Any], Array]  # (params, tokens [T], position) -> [V] of what follows it
    look: Callable[[Any, Array], DepthStatistics]


def programs(
    config: Config,
    vocab: int,
    devices: Sequence[Any] | None = None,
    end: int | None = None,
    implementation: str | None = None,
) -> Programs:
    """Everything a run computes, on `devices` (None: all there are); the token `end` ends a document.

    `implementation` names that of the reads over depth, for measurements; None chooses (`choice.choose`).

    Raises:
      UserError: where mesh and model, or chunks or documents and corpus, do not fit together.
    """
    model, mesh = configs.model_config(config, vocab), meshes.make_mesh(config.mesh.to_dict(), devices)
    table, whole = parameters(model), meshes.whole(mesh)
    sharding.check(table, mesh, config.data.batch // config.train.accumulation, config.data.length)
    pipelined = mesh.shape[meshes.STAGE] > 1
    if pipelined:
        check_pipeline(config, model)
    _check_attention(config, mesh)
    tx = optimizer(config, table)
    way = (Pipelined if pipelined else Whole)(config, model, mesh, end, implementation)
    created = partial(state.create, model, tx, config.seed)
    stored = sharding.shardings(
        jax.eval_shape(created),
        table,
        mesh,
        partial(sharding.stored_spec, mesh) if pipelined else sharding.spec,
    )

    def create():
        return way.staged(created())

    places = stored
    if pipelined:
        places = sharding.shardings(jax.eval_shape(create), table, mesh, sharding.staged_spec)
    batch = meshes.tokens(mesh)
    end = document_end(config, end)

    def resume(saved):
        staged = jax.eval_shape(way.staged, saved)
        to = sharding.shardings(staged, table, mesh, sharding.staged_spec)
        return jax.jit(way.staged, out_shardings=to)(saved)

    def step(now, tokens):
        count = predictions(tokens, end)  # of the whole batch: microbatches may hold unequal numbers
        value, gradient = way.value_and_grad(now.params, tokens, count)
        return _updated(
            tx, now, value, gradient, partial(gradient_norm, kinds=model.kinds, ordered=way.unstaged)
        )

    return Programs(
        *(model, mesh, tuple(parameter.path for parameter in table), batch),
        sharding.placed(jax.eval_shape(create), places),
        sharding.placed(jax.eval_shape(created), stored),
        jax.jit(create, out_shardings=places),
        resume if pipelined else lambda saved: saved,
        jax.jit(way.unstaged, out_shardings=stored) if pipelined else lambda now: now,
        jax.jit(step, in_shardings=(places, batch), out_shardings=(places, whole), donate_argnums=0),
        jax.jit(way.nats, in_shardings=(places.params, batch, batch), out_shardings=whole),
        jax.jit(way.logits, in_shardings=(places.params, whole, whole), out_shardings=whole),
        jax.jit(
            lambda params, tokens: look(state.merge(model, way.unstaged(params)), tokens, end),
            in_shardings=(places.params, batch),
            out_shardings=whole,
        ),
    )


class Whole:
    """All layers on every device of the mesh, microbatches one after the other. Methods are `Pipelined`'s."""

    def __init__(
        self, config: Config, model: ModelConfig, mesh: Mesh, end: int | None, implementation: str | None
    ):
        self.config, self.model, self.mesh, self.end = config, model, mesh, document_end(config, end)
        place = meshes.placement(mesh)
        self.how = {"placement": place, "implementation": implementation}
        self.predict = configured(config, model.vocab, end, place, implementation)

    def value_and_grad(
        self, params: Any, tokens: Int[Array, "B T1"], count: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Any]:
        """The reported loss, of `count` predictions, and the gradient of `params`."""

        def loss(params, tokens):
            found = self.predict(state.merge(self.model, params), tokens)
            return objective(found, count, self.config.optim.z_loss)

        (_, value), gradient = accumulated(loss, params, tokens, self.config.train.accumulation)
        return value, gradient

    def nats(self, params: Any, tokens: Int[Array, "B T1"], mask: Bool[Array, "B T"]) -> Float[Array, " T"]:
        """`position_nats`."""
        return position_nats(self.predict, state.merge(self.model, params), tokens, mask)

    def logits(self, params: Any, text: Int[Array, " T"], at: Int[Array, ""]) -> Float[Array, " V"]:
        """Of the token after position `at` of one text, which sees none behind it."""
        tokens, model = meshes.repeated(text, self.mesh), state.merge(self.model, params)
        return logits(model.hidden(tokens, *apart(tokens, self.end), **self.how).h[0, at], model.unembedding)

    def staged(self, tree: Any) -> Any:
        """Layers are in order of depth."""
        return tree

    unstaged = staged


def _check_attention(config, mesh):
    m, on = config.model, mesh.devices.flat[0].platform
    sizes = config.data.length, m.width // m.heads, m.dtype, config.data.segments
    try:
        attention.choose(m.attention, on, *sizes)
    except ValueError as problem:
        raise configs.ConfigError(f"model.{problem}") from None


def position_nats(
    predict: Callable[[Any, Array], NextToken],
    model: Any,
    tokens: Int[Array, "B T1"],
    mask: Bool[Array, "B T"],
) -> Float[Array, " T"]:
    """Sum over a batch of the cross-entropy at each position."""
    return jnp.sum(jnp.where(mask, predict(model, tokens).nats, 0), 0)


def look(model: Any, tokens: Int[Array, "B T1"], end: int | None = None) -> DepthStatistics:
    """Statistics over depth of a recorded forward pass on the first `LOOK` sequences."""
    inputs = tokens[:LOOK, :-1]
    return depth_statistics(model.hidden(inputs, *apart(inputs, end), record=True).depth.record)


def accumulated(
    loss: Loss, params: Any, tokens: Int[Array, "B T1"], microbatches: int
) -> tuple[tuple[Float[Array, ""], Any], Any]:
    """Loss and gradient of the batch, added up over equal microbatches one after the other."""
    function = jax.value_and_grad(loss, has_aux=True)
    if microbatches == 1:
        return function(params, tokens)

    def add(total, tokens):
        return jax.tree.map(jnp.add, total, function(params, tokens)), None

    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, params, tokens))
    return jax.lax.scan(add, zero, meshes.microbatches(tokens, microbatches))[0]


def _updated(tx, now, loss, gradient, by_depth):
    updates, opt_state = tx.update(gradient, now.opt_state, now.params)
    params: Any = optax.apply_updates(now.params, updates)
    norms = {path_name(path): jnp.linalg.norm(g) for path, g in jax.tree.leaves_with_path(gradient)}
    out = Updated(loss, norms, by_depth(gradient))
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
