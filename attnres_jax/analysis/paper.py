"""Numbers of the paper (arXiv 2603.15031) that commands set beside their own."""

from typing import NamedTuple


class Size(NamedTuple):
    """A row of Table 2: a size of the scaling-law family, and the validation loss of each scheme."""

    parameters: float
    """Active ones, embeddings not counted."""
    tokens: float
    loss: dict[str, float]
    """In nats per token."""


def _size(parameters, tokens, *losses):
    return Size(
        parameters, tokens, dict(zip(("plain", "block N=8", "full", "mhc_lite"), losses, strict=True))
    )


TABLE2 = (
    _size(194e6, 38.7e9, 1.931, 1.909, 1.899, 1.906),
    _size(241e6, 45.4e9, 1.895, 1.875, 1.874, 1.869),
    _size(296e6, 62.1e9, 1.829, 1.809, 1.804, 1.807),
    _size(436e6, 87.9e9, 1.766, 1.746, 1.737, 1.747),
    _size(528e6, 119.0e9, 1.719, 1.693, 1.692, 1.694),
)

TABLE4 = {
    "plain": 1.766,
    "denseformer": 1.767,
    "mhc": 1.747,
    "full": 1.737,
    "full_input_query": 1.731,
    "full_static": 1.749,
    "full_sigmoid": 1.741,
    "full_unnormed": 1.743,
    "window": 1.764,
    "block": 1.746,
    "block_heads": 1.752,
    "block_unnormed": 1.750,
}
"""Validation loss at 436M active parameters, in nats per token, by the name of the scheme here: block with
S = 4, 16 heads, a window of 8 outputs and the embedding."""

FIGURE6 = {0: 1.766, 1: 1.737, 2: 1.746, 4: 1.746, 8: 1.748, 16: 1.753, 32: 1.757}
"""Validation loss of Block by S at the same size, in nats per token; 0: the plain residual."""
