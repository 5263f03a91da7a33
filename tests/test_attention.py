"""Attention over time: the TPU kernel against XLA's path, who is chosen and why, no scores in memory."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnres_jax import configs
from attnres_jax.models import attention
from attnres_jax.parallel import mesh
from attnres_jax.placement import Placement, platform
from attnres_jax.train import step

B, T, H, G, K = 2, 256, 4, 2, 64  # the narrowest heads that the kernel takes


def drawn(dtype="float32", shape=(B, T, H, K), groups=G):
    rng = np.random.default_rng(0)
    narrow = (*shape[:2], groups, shape[3])
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in (shape, narrow, narrow))


def packed():
    """One document in the first row; in the second one of 100 tokens, then one that crosses the tiles."""
    return jnp.asarray([[0] * T, [0] * 100 + [1] * (T - 100)], "int32")


def value_and_gradients(attend, qkv, segments):
    """The result, and the cotangents of q, k and v for a random one of the result."""

    def loss(q, k, v):
        out = attend(q, k, v, segments)
        return jnp.sum(out.astype("float32") * toys.probe(out)), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), compiler_options=toys.QUICK)
    (_, out), gradients = run(*qkv)
    return [np.asarray(a, np.float64) for a in (out, *gradients)]


@pytest.mark.parametrize(
    ("dtype", "segments", "tolerance"),
    [("float32", None, 2e-5), ("float32", packed(), 2e-5), ("bfloat16", packed(), 2e-2)],
    ids=["fp32", "fp32 packed", "bf16 packed"],
)
def test_splash_is_the_xla_path(dtype, segments, tolerance, monkeypatch):
    """Values and all gradients: two heads a key, two tiles."""
    monkeypatch.setattr(attention, "TILE", 128)
    qkv = drawn(dtype)
    want = value_and_gradients(attention.xla, qkv, segments)
    got = value_and_gradients(partial(attention.splash, interpret=True), qkv, segments)
    for a, b in zip(got, want, strict=True):
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


def test_splash_on_a_mesh_is_that_on_one_device():
    """Batch over data and fsdp, heads over tensor."""
    devices = mesh.make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, jax.devices()[:4])
    place, qkv, segments = mesh.placement(devices), drawn(), packed()
    on_mesh = jax.jit(partial(attention.splash, placement=place, interpret=True))
    want = attention.splash(*qkv, segments, interpret=True)
    heads = NamedSharding(devices, P(("data", "fsdp"), None, "tensor"))
    got = on_mesh(*(jax.device_put(a, heads) for a in qkv), segments)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "expected", "reason"),
    [
        (("tpu", 4096, 128, "bfloat16"), "splash", "on the chip"),
        (("tpu", 4096, 64, "float32", True), "splash", "on the chip"),
        (("tpu", 100, 128, "bfloat16"), "xla", "multiple of 128 tokens, got T = 100"),
        (("tpu", 4096, 32, "bfloat16"), "xla", "heads of width 64 or a multiple of 128, got 32"),
        (("tpu", 4096, 128, "float64"), "xla", "no float64"),
        (("gpu", 4096, 128, "bfloat16"), "cudnn", "on the chip"),
        (("gpu", 4096, 128, "bfloat16", True), "xla", "segments as a mask"),
        (("gpu", 4096, 128, "float32"), "xla", "16-bit activations, got float32"),
        (("gpu", 4096, 256, "bfloat16"), "xla", "up to 128"),
        (("cpu", 4096, 128, "bfloat16"), "xla", "platform 'cpu'"),
    ],
)
def test_auto_chooses_and_says_why(sizes, expected, reason):
    choice = attention.choose("auto", *sizes)
    assert choice.implementation == expected
    assert reason in choice.reason
    assert attention.choose("xla", *sizes).implementation == "xla"
    if expected == "xla":
        with pytest.raises(ValueError, match=re.escape(reason)):
            attention.choose("flash", *sizes)
    else:
        assert attention.choose("flash", *sizes) == choice


def test_a_config_that_asks_for_it_in_vain():
    config = configs.load("quick:plain", ["--config.model.attention=flash"])
    with pytest.raises(configs.ConfigError, match=r"^model.attention = 'flash' .* 'cpu'; 'xla' runs"):
        step.programs(config, 64, jax.devices()[:1])


def test_a_name_that_does_not_exist():
    with pytest.raises(ValueError, match="one of 'auto', 'xla', 'flash', got 'splash'"):
        attention.choose("splash", "tpu", 128, 128, "bfloat16")


def test_the_platform_is_that_of_the_target():
    """Of the mesh, of the abstract mesh in use, of the default device."""
    assert platform() == "cpu"
    assert platform(Placement(mesh.make_mesh({"data": 1}, jax.devices()[:1]), P())) == "cpu"
    with toys.on_tpu("TPU v6 lite"):
        assert platform() == "tpu"


def test_lowered_for_a_tpu_there_are_no_scores():
    """The kernel stands in the program, forward and backward, and no [T,T]; XLA's path has one."""

    def gradient(q, k, v, implementation):
        run = partial(attention.attend, implementation=implementation)
        return jax.grad(lambda *qkv: jnp.sum(run(*qkv).astype("float32")), (0, 1, 2))(q, k, v)

    texts = {}
    with toys.on_tpu():
        for name in ("auto", "xla"):
            traced = jax.jit(gradient, static_argnums=3).trace(*drawn("bfloat16", (B, 384, H, K)), name)
            texts[name] = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert texts["auto"].count("tpu_custom_call") == 3
    assert "384x384" not in texts["auto"]
    assert "384x384" in texts["xla"]
