"""Measuring tools: `python -m attnres_jax bench ...`."""
