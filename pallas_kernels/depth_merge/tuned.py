"""Columns worked on at once, backward, where another number is faster: measured, with the device."""

TUNED: dict[tuple[str, int], int] = {}
"""(direction, D) -> columns."""
