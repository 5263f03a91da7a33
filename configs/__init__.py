"""Configs by name: `load("quick:block", ["--config.train.steps=10"])`; every key stands in base.py.

A config file has `get_config(arg)`, which returns a ConfigDict made by `base.get_config()`.
"""

import importlib
import pkgutil
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attnres_jax.configs.base import (
    SCHEME_KEYS,
    Config,
    ConfigError,
    UserError,
    check,
    choose,
    from_flat,
    of_run,
    set_text,
    to_flat,
)

if TYPE_CHECKING:
    import attnres_jax.models.transformer

PREFIX = "--config."


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The locked, checked config `NAME[:ARG]` or `FILE.py[:ARG]`, then `--config.KEY=VALUE`."""
    file, _, arg = name.partition(":")
    config = _get_config(file)(arg)
    for override in overrides:
        key, equals, text = override.removeprefix(PREFIX).partition("=")
        if not (override.startswith(PREFIX) and equals):
            raise ConfigError(f"{override!r} is not {PREFIX}KEY=VALUE, as {PREFIX}train.steps=10 is")
        set_text(config, key, text)
    check(config)
    return config.lock()


def names() -> tuple[str, ...]:
    """The configs inside the package."""
    return tuple(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("base", "shapes", "sweeps"))


def model_config(config: Config, vocab: int) -> "attnres_jax.models.transformer.ModelConfig":
    """What `models.transformer` needs of a config, for `vocab` token values."""
    # Imported here: a wrong config is told in a moment, not after the seconds JAX takes to start.
    from attnres_jax.models.transformer import ModelConfig

    keys = config.to_dict()
    scheme = {key: value for key, value in keys.items() if key in SCHEME_KEYS}
    return ModelConfig(vocab=vocab, **scheme, **keys["model"])


def _get_config(file: str) -> Callable[[str], Config]:
    if not file.endswith(".py"):
        name = choose("config", file, names())
        return importlib.import_module(f"{__name__}.{name}").get_config
    if not Path(file).is_file():
        raise ConfigError(f"config file {file!r} does not exist; inside the package: {', '.join(names())}")
    found = runpy.run_path(file)
    if "get_config" not in found:
        raise ConfigError(f"config file {file!r} has no get_config(arg)")
    return found["get_config"]


__all__ = [
    "SCHEME_KEYS",
    "Config",
    "ConfigError",
    "UserError",
    "check",
    "from_flat",
    "load",
    "model_config",
    "names",
    "of_run",
    "to_flat",
]
