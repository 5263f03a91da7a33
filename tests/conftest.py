"""Common ground of all tests: eight CPU devices, full matmul precision, fp64 by request."""

import jax
import matplotlib
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
matplotlib.use("agg")


@pytest.fixture(scope="session", autouse=True)
def one_device():
    """A run takes one of the eight, unless the test says which."""
    # Not above: the type checks of pytest's options come first.
    from attnres_jax.parallel import mesh, processes

    mesh.available = lambda: jax.devices()[:1]
    processes.join = lambda: None  # the tests' own process has started JAX already


@pytest.fixture(autouse=True)
def targets(request, monkeypatch):
    """Where a test compiles for TPUs, libtpu looks for none and need not be alone: as in the commands."""
    from attnres_jax.bench import target

    if request.node.get_closest_marker("libtpu"):
        for name, value in target.ENVIRONMENT.items():
            monkeypatch.setenv(name, value)


@pytest.fixture
def x64():
    """Run the test with 64-bit types; nothing made outside the test may enter it."""
    with jax.enable_x64(True):
        yield
