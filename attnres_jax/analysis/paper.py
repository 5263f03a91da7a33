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
