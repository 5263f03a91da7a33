"""Tokens of a grid step where fewer than the most that fit are faster: measured, with the device."""

TUNED: dict[tuple[str, int, int, int], int] = {}
"""(direction, S, R, D) -> tokens."""
