"""AdamW or Muon with warm-up, cosine or WSD, and clipping, from optax; groups and decay stand in the
parameter table.

Muon is Moonlight's (arXiv 2502.16982): Nesterov momentum, orthogonalized by five Newton-Schulz steps
for each layer of a stack, times 0.2 sqrt(max(inputs, outputs)). The RMS of its update is then about that
of AdamW's, so both share one learning rate and one weight decay. Optax corrects the momentum of the first
updates for its start at zero, as Nadam does; Moonlight does not. After 50 updates that is under 1 %.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from attnres_jax.configs import Config
from attnres_jax.models.table import Parameter, path_name

UPDATE_RMS = 0.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Which of the two updates a group of the parameter table when optim.name is muon.
GROUPS = {
    "matrix": "muon",
    "embedding": "adamw",
    "depth": "adamw",
    "projection": "adamw",
    "norm": "adamw",
    "head": "adamw",
}


def learning_rate(config: Config) -> optax.Schedule:
    """Linear from 0 to `lr` in `warmup` updates; at `train.steps` it is `lr * final_lr`, by a cosine
    or, in WSD, by a linear fall in the last `decay` updates."""
    o, steps = config.optim, config.train.steps
    rise = optax.linear_schedule(0.0, o.lr, o.warmup)
    if o.schedule == "cosine":
        fall = optax.cosine_decay_schedule(o.lr, max(1, steps - o.warmup), o.final_lr)
        return optax.join_schedules([rise, fall], [o.warmup])
    stable, fall = optax.constant_schedule(o.lr), optax.linear_schedule(o.lr, o.lr * o.final_lr, o.decay)
    return optax.join_schedules([rise, stable, fall], [o.warmup, steps - o.decay])


def optimizer(config: Config, table: Sequence[Parameter]) -> optax.GradientTransformation:
    """Clipping by the global norm, then what `config.optim.name` says. A parameter whose group has no
    optimizer raises `ValueError`."""
    names = {parameter.path: _name(parameter) for parameter in table}
    decays = _by_path({parameter.path: parameter.decay for parameter in table})
    update = _adamw(config, decays)
    if config.optim.name == "muon":
        muon = _muon(config, table, decays)
        both: dict[Hashable, optax.GradientTransformation] = {"muon": muon, "adamw": update}
        update = optax.partition(both, _by_path(names))
    return optax.chain(optax.clip_by_global_norm(config.optim.clip), update)


def group(config: Config, parameter: Parameter) -> str:
    """Which update the parameter gets: adamw or muon."""
    return "adamw" if config.optim.name == "adamw" else _name(parameter)


def dimension_numbers(parameter: Parameter) -> MuonDimensionNumbers:
    """Axes of the inputs and of the outputs of a matrix; that of the stack, which comes first, is neither."""
    first = len(parameter.axes) - len(parameter.axes.removeprefix("L"))
    cut = first + len(parameter.inputs)
    inputs, outputs = tuple(range(first, cut)), tuple(range(cut, len(parameter.axes)))
    if not (inputs and outputs):
        raise ValueError(
            f"the parameter {parameter.path} is to go to Muon, but its axes {parameter.axes} are not "
            'inputs and outputs: write them as "D>F" in models/table.py'
        )
    return MuonDimensionNumbers(inputs, outputs)


def _adamw(config, decays):
    o = config.optim
    decay = {"weight_decay": o.weight_decay, "mask": decays}
    return optax.adamw(learning_rate(config), b1=o.b1, b2=o.b2, eps=o.eps, **decay)


def _muon(config, table, decays):
    o = config.optim
    numbers = {p.path: dimension_numbers(p) for p in table if _name(p) == "muon"}
    factors = _by_path({p.path: _factor(p, numbers[p.path]) for p in table if p.path in numbers})
    return optax.chain(
        _orthogonalized(o.momentum, _by_path(numbers)),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors(updates))),
        optax.add_decayed_weights(o.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def _orthogonalized(momentum, numbers):
    """Optax's, but the coefficients stay out of its state: there all arrays are some parameter's."""
    inner: Any = scale_by_muon(NEWTON_SCHULZ, beta=momentum, weight_dimension_numbers=numbers)

    def init(params):
        return inner.init(params)._replace(ns_coeffs=())

    def update(updates: Any, state: Any, params: Any = None):
        whole = state._replace(ns_coeffs=jnp.asarray(NEWTON_SCHULZ))
        updates, after = inner.update(updates, whole, params)
        return updates, after._replace(ns_coeffs=())

    return optax.GradientTransformation(init, update)


def _factor(parameter, numbers):
    """An orthogonal matrix of I inputs and O outputs has RMS 1 / sqrt(max(I, O))."""
    sizes = [math.prod(parameter.shape[axis] for axis in axes) for axes in numbers]
    return UPDATE_RMS * math.sqrt(max(sizes))


def _name(parameter):
    if parameter.group not in GROUPS:
        raise ValueError(
            f"the parameter {parameter.path} is in the group {parameter.group!r}, which has no optimizer: "
            f"add it to GROUPS of train/optim.py, or take one of {', '.join(GROUPS)} in models/table.py"
        )
    return GROUPS[parameter.group]


def _by_path(values: Mapping[str, Any]) -> Callable[[Any], Any]:
    """A function of a tree of parameters (or of some of them) that puts each one's value in its place."""
    return partial(jax.tree.map_with_path, lambda path, _: values[path_name(path)])
