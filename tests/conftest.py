"""Common ground of all tests: CPU, full matmul precision, fp64 by request."""

import jax
import matplotlib
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")
matplotlib.use("agg")


@pytest.fixture
def x64():
    """Run the test with 64-bit types; nothing made outside the test may enter it."""
    with jax.enable_x64(True):
        yield
