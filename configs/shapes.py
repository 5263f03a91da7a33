"""Depth against width at equal parameters (Figure 7 of the paper): the integers of one cell of the grid.

Equal parameters and equal tokens are equal compute by `C = 6 x parameters x tokens`; the same tokens in the
same order make the cells pairs. FLOPs counted exactly differ a little, by attention over T.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from attnres_jax.configs.base import ConfigError

TOLERANCE = 0.01
"""Of the parameters."""
MISS = 0.3
"""How far a ratio may be from the one asked for, as the logarithm of their quotient."""


class Shape(NamedTuple):
    """L_b, D, H and F of a model whose queries have as many heads as its keys."""

    blocks: int
    width: int
    heads: int
    mlp_width: int

    @property
    def parameters(self) -> int:
        """Of the matrices: four projections and SwiGLU's three."""
        return self.blocks * self.width * (4 * self.width + 3 * self.mlp_width)


def solve(
    parameters: int | float,
    width_per_block: int | float,
    heads_per_block: int | float,
    mlp_per_width: int | float = 3,
) -> Shape:
    """The shape of so many parameters (to TOLERANCE) whose D/L_b, H/L_b and F/D are nearest to those asked.

    Heads are of even width (RoPE), so D is a multiple of 2 H; F takes up what that leaves. `ConfigError` if
    no shape is near enough.
    """
    goal = (width_per_block, heads_per_block, mlp_per_width)

    def misses(shape):
        ratios = (shape.width / shape.blocks, shape.heads / shape.blocks, shape.mlp_width / shape.width)
        return [abs(math.log(ratio / wanted)) for ratio, wanted in zip(ratios, goal, strict=True)]

    equal = [s for s in _near(parameters, *goal) if abs(s.parameters / parameters - 1) <= TOLERANCE]
    found = [shape for shape in equal if max(misses(shape)) <= MISS]
    if not found:
        raise ConfigError(
            f"no shape has {parameters:,.0f} parameters with D/L_b = {width_per_block:g} and heads/L_b = "
            f"{heads_per_block:g}: ask for more parameters, or for ratios nearer to 8 and 0.5"
        )
    return min(found, key=lambda shape: sum(misses(shape)))


def _near(parameters, width_per_block, heads_per_block, mlp_per_width) -> Iterator[Shape]:
    ideal = (parameters / (width_per_block**2 * (4 + 3 * mlp_per_width))) ** (1 / 3)
    for blocks in range(max(1, round(ideal) - 2), round(ideal) + 3):
        width = math.sqrt(parameters / (blocks * (4 + 3 * mlp_per_width)))
        for heads in {max(1, math.floor(heads_per_block * blocks)), math.ceil(heads_per_block * blocks)}:
            for multiple in (math.floor(width / (2 * heads)), math.ceil(width / (2 * heads))):
                D = 2 * heads * multiple
                F = round((parameters / blocks - 4 * D * D) / (3 * D)) if D else 0
                if F > 0:
                    yield Shape(blocks, D, heads, F)
