"""Kernels for depth mixing on TPU and GPU."""
