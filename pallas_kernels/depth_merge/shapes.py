"""Shapes that the tests run, each with what it stresses."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Row 1 of S; `first`: no sum yet; with the norm, the mixture kept, an output added first, or without."""

    S: int
    tokens: int
    D: int
    dtype: str = "bfloat16"
    first: bool = False
    norm: bool = True
    keep: bool = False
    add: bool = False


SHAPES = {
    "two_steps": Shape(2, 256, 5120),
    "one_step": Shape(3, 256, 256),
    "first_of_block": Shape(3, 256, 256, first=True),  # the sum is not read, its cotangent goes through
    "all_outputs": Shape(2, 128, 384, keep=True, add=True),
    "no_norm": Shape(2, 128, 256, norm=False, keep=True),
    "odd_width": Shape(2, 128, 1000),
    "odd_and_wide": Shape(2, 16, 7186),
    "narrow": Shape(2, 128, 64),  # less than one register of lanes
    "odd_tokens": Shape(2, 63, 128, keep=True),
    "many_odd_tokens": Shape(2, 8191, 128),
    "one_token": Shape(2, 1, 128, norm=False),
    "float32": Shape(2, 128, 256, dtype="float32"),
}
