"""Residual schemes by name."""

from attnres_jax.residuals.ablations import Additive, Biased, InputQuery
from attnres_jax.residuals.additive import Plain
from attnres_jax.residuals.attention import AttnRes
from attnres_jax.residuals.base import Mix, Read, Scheme

SCHEMES = {
    "plain": lambda block_size, eps: Plain(),
    "full": lambda block_size, eps: AttnRes(block_size=1, eps=eps),
    "block": lambda block_size, eps: AttnRes(block_size=block_size, eps=eps),
}


SCHEMES |= {
    "full_sigmoid": lambda block_size, eps: AttnRes(eps=eps, activation="sigmoid"),
    "full_unnormed": lambda block_size, eps: AttnRes(eps=eps, key_norm=False),
    "full_static": lambda block_size, eps: Biased(eps=eps, queries=False),
    "full_recency": lambda block_size, eps: Biased(eps=eps, recency=1.0),
    "full_input_query": lambda block_size, eps: InputQuery(eps=eps),
    "block_unnormed": lambda block_size, eps: AttnRes(block_size=block_size, eps=eps, key_norm=False),
    "block_heads": lambda block_size, eps: AttnRes(block_size=block_size, eps=eps, heads=16),
    "block_additive": lambda block_size, eps: Additive(block_size=block_size, eps=eps),
}
"""Rows of the paper's Table 4, and what others propose."""


def make(name: str, *, block_size: int = 1, eps: float = 1e-6) -> Scheme:
    """The scheme called `name`; `block_size` counts sublayers, `eps` is the key norm's."""
    if name not in SCHEMES:
        raise ValueError(f"residual must be one of {', '.join(map(repr, SCHEMES))}, got {name!r}")
    return SCHEMES[name](block_size, eps)


__all__ = ["SCHEMES", "AttnRes", "Mix", "Plain", "Read", "Scheme", "make"]
