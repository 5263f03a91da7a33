"""Compiled programs are kept between starts, in the user's cache, by JAX's own compilation cache."""

import jax

from attnres_jax.train.data import cache_dir


def keep() -> None:
    """Use the cache, unless JAX was told of another one (JAX_COMPILATION_CACHE_DIR)."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
