"""AdamW with warm-up, cosine and clipping, from optax; who decays stands in the parameter table."""

from collections.abc import Sequence

import jax
import optax

from attnres_jax.configs import Config
from attnres_jax.models.table import Parameter, path_name


def learning_rate(config: Config) -> optax.Schedule:
    """Linear from 0 to `lr` in `warmup` updates, then a cosine to `lr * final_lr` at `train.steps`."""
    rise = optax.linear_schedule(0.0, config.optim.lr, config.optim.warmup)
    updates = max(1, config.train.steps - config.optim.warmup)
    fall = optax.cosine_decay_schedule(config.optim.lr, updates, config.optim.final_lr)
    return optax.join_schedules([rise, fall], [config.optim.warmup])


def optimizer(config: Config, table: Sequence[Parameter]) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with decay on the matrices of `table`."""
    decays = {parameter.path: parameter.decay for parameter in table}

    def mask(params):
        return jax.tree.map_with_path(lambda path, _: decays[path_name(path)], params)

    o = config.optim
    adamw = optax.adamw(
        learning_rate(config), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=mask
    )
    return optax.chain(optax.clip_by_global_norm(o.clip), adamw)
