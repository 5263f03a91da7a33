"""Which implementation of the depth ops runs where, and what is said about it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from attnres_jax import choice
from pallas_kernels.depth_merge import vjp as merge
from pallas_kernels.depth_mix import vjp as mix

HOPPER, AMPERE, BLACKWELL, AMD = (
    SimpleNamespace(device_kind=kind, compute_capability=version)
    for kind, version in (
        ("NVIDIA H200", "9.0"),
        ("NVIDIA A100", "8.0"),
        ("NVIDIA B200", "10.0"),
        ("AMD MI300X", "gfx942"),
    )
)


@pytest.fixture
def on(monkeypatch):
    """Makes the default devices those of a platform."""

    def put(platform, device, version=(0, 11, 2)):
        monkeypatch.setattr(choice, "platform", lambda placement: platform)
        monkeypatch.setattr(jax, "devices", lambda: [device])
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        monkeypatch.setattr(jax, "__version_info__", version)

    return put


@pytest.mark.parametrize(
    ("platform", "device", "version", "runs", "reason"),
    [
        ("cpu", None, (0, 11, 2), "reference", "there is no kernel for cpu"),
        ("tpu", None, (0, 12, 0), "tpu", "Pallas kernels, on TPU"),
        ("gpu", HOPPER, (0, 11, 2), "gpu", "Pallas kernels, on GPU"),
        ("gpu", HOPPER, (0, 12, 0), "reference", "JAX 0.11.2, not with"),
        ("gpu", AMPERE, (0, 11, 2), "reference", "are for Hopper GPUs, this is NVIDIA A100"),
        ("gpu", BLACKWELL, (0, 11, 2), "reference", "are for Hopper GPUs, this is NVIDIA B200"),
        ("gpu", AMD, (0, 11, 2), "reference", "are for Hopper GPUs, this is AMD MI300X"),
    ],
)
def test_kernels_run_by_themselves_where_they_were_proven(platform, device, version, runs, reason, on):
    on(platform, device, version)
    chosen = choice.choose(None, dtype=jnp.bfloat16)
    assert chosen.implementation == runs
    assert reason in chosen.reason


def test_a_shape_that_does_not_fit_is_said_and_a_named_kernel_raises(on):
    on("gpu", HOPPER)

    def odd(kernel):
        return mix.refusal(6, 9, 1000, jnp.bfloat16, kernel)

    assert choice.choose(None, dtype=jnp.bfloat16, refusal=odd) == choice.Choice(
        "reference", "sources: D = 1000 is not a multiple of 256, two columns a thread; use triton"
    )
    with pytest.raises(ValueError, match="implementation 'gpu': sources: D = 1000"):
        choice.choose("gpu", refusal=odd)
    assert choice.choose("triton", refusal=odd).implementation == "triton"


def test_only_bf16_runs_by_itself_on_a_gpu(on):
    on("gpu", HOPPER)
    assert "not in float32" in choice.choose(None, dtype=jnp.float32).reason
    assert choice.choose("gpu", dtype=jnp.float32).implementation == "gpu"


def test_several_devices_need_a_placement(on, monkeypatch):
    on("gpu", HOPPER)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "need a placement" in choice.choose(None).reason


@pytest.mark.parametrize(
    ("op", "sizes", "why"),
    [
        (mix, (6, 9, 2304, jnp.bfloat16), None),
        (mix, (6, 17, 2304, jnp.bfloat16), "R = 17 rows"),
        (mix, (6, 9, 2304, jnp.float32), "bfloat16 only"),
        (merge, (7168, jnp.bfloat16), None),
        (merge, (1000, jnp.bfloat16), "not a multiple of 256"),
        (merge, (14336, jnp.float32), "exceeds"),
    ],
)
def test_what_mosaic_gpu_refuses(op, sizes, why):
    refused = op.refusal(*sizes, "gpu")
    assert (refused is None) if why is None else (why in refused)
