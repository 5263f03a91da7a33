"""Tokens worked on at once where another number than config.CHUNK is faster: measured, with the device."""

TUNED: dict[tuple[str, int], int] = {}
"""(direction, D) -> tokens."""
