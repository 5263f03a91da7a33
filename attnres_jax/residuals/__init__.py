"""Residual schemes by name."""

from attnres_jax.residuals.additive import Plain
from attnres_jax.residuals.attention import AttnRes
from attnres_jax.residuals.base import Mix, Read, Scheme
from attnres_jax.rules import Rule

SCHEMES = {
    "plain": lambda block_size, eps: Plain(),
    "full": lambda block_size, eps: AttnRes(block_size=1, rule=Rule(eps)),
    "block": lambda block_size, eps: AttnRes(block_size=block_size, rule=Rule(eps)),
}


def make(name: str, *, block_size: int = 1, eps: float = 1e-6) -> Scheme:
    """The scheme called `name`; `block_size` counts sublayers, `eps` is the key norm's."""
    if name not in SCHEMES:
        raise ValueError(f"residual must be one of {', '.join(map(repr, SCHEMES))}, got {name!r}")
    return SCHEMES[name](block_size, eps)


__all__ = ["SCHEMES", "AttnRes", "Mix", "Plain", "Read", "Scheme", "make"]
