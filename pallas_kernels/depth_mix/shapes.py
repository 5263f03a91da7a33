"""Shapes that the tests run, each with what it stresses."""

from typing import NamedTuple


class Shape(NamedTuple):
    """S reads over arrays of `rows` sources, `n` of them visible (None: all); `add`: to earlier sums.

    `slot`: they lie in this one of the arrays' three. `tile`: tokens of a backward step, as if tuned.
    """

    S: int
    rows: tuple[int, ...]
    tokens: int
    D: int
    dtype: str = "bfloat16"
    n: int | None = None
    add: bool = True
    slot: int | None = None
    tile: int | None = None


SHAPES = {
    "two_steps": Shape(3, (4,), 256, 256),
    "counted": Shape(3, (4,), 256, 256, n=2, tile=64),  # four steps: all three buffers of sums are used again
    "counted_in_a_slot": Shape(3, (4,), 256, 256, n=2, slot=1),
    "two_slots": Shape(1, (3, 1), 63, 128, slot=2),  # and all that is in them
    "one_source": Shape(2, (1,), 128, 256, add=False),  # weights are 1, the query's gradient exactly 0
    "separate_arrays": Shape(2, (1, 2, 1), 128, 256),
    "two_registers": Shape(1, (17,), 128, 128),  # seventeen sources of 8 tokens are more than 128 lanes
    "nine_registers": Shape(1, (130,), 128, 128, n=100),
    "groups_of_64": Shape(1, (2,), 256, 128, n=2),  # and a step of more than 128 tokens
    "halves_beside": Shape(9, (4,), 128, 128),
    "many_reads": Shape(17, (3,), 128, 128),  # S is padded to 24
    "two_bodies": Shape(2, (3,), 128, 1152),  # of the backward loop, two groups each
    "odd_width": Shape(2, (3,), 128, 1000),
    "odd_and_wide": Shape(2, (3,), 16, 7186),
    "odd_tokens": Shape(2, (3,), 63, 128, add=False),
    "many_odd_tokens": Shape(1, (2,), 8191, 128),
    "one_token": Shape(1, (2,), 1, 128),
    "float32": Shape(2, (3,), 128, 256, dtype="float32"),
}
