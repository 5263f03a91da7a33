"""Pallas kernels of depth mixing; each op is a folder whose vjp.py is the way in."""
