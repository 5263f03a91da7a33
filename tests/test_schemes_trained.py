"""Residual schemes in the language model and its trainer: eight devices, exact resume, decay, gains."""

import jax
import numpy as np
import pytest
import toys
from flax import nnx
from test_sharding import SMALL, config, draw_tokens, programs
from test_train import compile_once  # noqa: F401 the fixture: both starts of a run share their programs

from attnres_jax import configs, residuals
from attnres_jax.analysis.inspect import parameters
from attnres_jax.models.table import path_name
from attnres_jax.models.transformer import Transformer
from attnres_jax.parallel.sharding import spec
from attnres_jax.train import data, loop, workdir
from attnres_jax.train.checkpoint import load_run

TESTED = ("plain", "full", "block")  # on eight devices, in test_sharding.py
FAST = ("hc_static",)
EVERY = [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in residuals.SCHEMES]
NEW = [p for p in EVERY if p.values[0] not in TESTED]


def one_update(shape, name, **changes):
    """Loss and gradient of a batch, with the scheme's parameters away from their start."""
    run = programs(shape, residual=name, **changes)
    state, rng = run.create(), np.random.default_rng(1)
    for key, leaf in sorted(state.params["mix"].items()):
        drawn = np.asarray(leaf) + np.float32(rng.standard_normal(leaf.shape) * 0.1)
        state.params["mix"][key] = jax.device_put(drawn, leaf.sharding)
    tokens = jax.device_put(draw_tokens(), run.place)
    state, out = run.update.lower(state, tokens).compile(toys.QUICK)(state, tokens)
    moments = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state.opt_state)}
    return jax.device_get((out.loss, {k.split("/mu/")[1]: v for k, v in moments.items() if "/mu/" in k}))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(pytest.param(*p.values, {}, marks=p.marks, id=p.values[0]) for p in NEW),
        pytest.param("block", {"model__value_residual": 0.5}, marks=pytest.mark.slow, id="value_residual"),
    ],
)
def test_eight_devices_are_one(name, changes):
    """Streams and histories included: the loss and every gradient, beside its own size and all gradients'."""
    (loss, gradient), (wanted_loss, wanted) = (
        one_update(shape, name, **changes) for shape in ((2, 2, 2), (1, 1, 1))
    )
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    assert gradient.keys() == wanted.keys()
    sizes = {path: np.linalg.norm(leaf.ravel()) for path, leaf in wanted.items()}
    whole = np.linalg.norm(list(sizes.values()))
    for path, leaf in wanted.items():
        off = np.linalg.norm((gradient[path] - leaf).ravel())
        assert off <= 4e-5 * sizes[path] + 1e-7 * whole * (sizes[path] > 0), (path, off, sizes[path], whole)


@pytest.mark.parametrize("name", EVERY)
def test_resume_is_exact(name, tmp_path, monkeypatch):
    """Two updates, then two more from the checkpoint: the four of an uninterrupted run, bit for bit."""
    text = np.random.default_rng(0).integers(0, 19, 2000)
    data.prepare(tmp_path / "corpus", text[:1500], text[1500:], vocab=19, source="noise")
    keys = {"data.corpus": str(tmp_path / "corpus"), "train.steps": 4, "checkpoint.every": 2}
    keys |= {"train.log_every": 1, "train.depth_every": 2, "train.eval_every": 4, "train.eval_tokens": 100}
    keys |= {"optim.warmup": 1, "residual": name, "data.batch": 2}
    flat = configs.to_flat(config()) | keys

    def trained(folder, *stops):
        for stop in stops:
            loop.train(configs.from_flat(flat | {"train.stop_after": stop}), tmp_path / folder)
        model = load_run(tmp_path / folder).model
        rows = [row for row in workdir.read_rows(tmp_path / folder) if row["kind"] in ("depth", "eval")]
        return nnx.to_pure_dict(nnx.state(model, nnx.Param)), rows

    (whole, rows), (resumed, again) = trained("whole", 0), trained("resumed", 2, 0)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert again == rows
    started = nnx.state(Transformer(configs.model_config(configs.from_flat(flat), 19), rngs=nnx.Rngs(0)).mix)
    moved = jax.tree.map(lambda a, b: np.any(a != b), nnx.to_pure_dict(started), whole.get("mix", {}))
    assert any(jax.tree.leaves(moved)) == (name != "plain")


def rows_of(name):
    return {
        p.path.removeprefix("mix/"): p
        for p in parameters(configs.model_config(config(residual=name), 64))
        if p.path.startswith("mix/")
    }


DECAYED = {
    "highway": {"gate"},
    "hc": {"alpha_weight", "beta_weight"},
    "mhc": {"phi"},
    "mhc_lite": {"phi"},
    "ddl": {"beta_weight", "value_weight"},
    "densenet": {"weight", "weight_out"},
    "mrla": {"query", "query_out", "key"},
    "full_input_query": {"query_map", "query_map_out"},
}


@pytest.mark.parametrize("name", residuals.SCHEMES)
def test_what_decays(name):
    rows = rows_of(name)
    assert {path for path, row in rows.items() if row.decay} == DECAYED.get(name, set())
    assert {row.group for row in rows.values()} <= {"depth", "projection"}


def test_large_matrices_are_cut():
    """Over the mesh axis that cuts D; vectors are whole."""
    assert (*spec(rows_of("highway")["gate"]),) == (None, "fsdp", None)
    assert (*spec(rows_of("mhc")["phi"]),) == (None, None, "fsdp", None)
    assert (*spec(rows_of("densenet")["weight"]),) == (None, None, "fsdp", None)
    assert (*spec(rows_of("densenet")["weight_out"]),) == (None, "fsdp", None)
    assert (*spec(rows_of("mhc")["pre"]),) == ()


def test_gain_of_deepnorm():
    """Values, outputs and MLPs start (8 N)^(-1/4) times smaller than elsewhere, nothing else does."""
    plain, scaled = (
        toys.named(nnx.to_pure_dict(nnx.state(made(name), nnx.Param))) for name in ("plain", "deepnorm")
    )
    gained = {f"layers/a/{n}/kernel" for n in ("value", "out")}
    gained |= {f"layers/m/{n}/kernel" for n in ("gate", "up", "down")}
    for path, leaf in plain.items():
        factor = (8 * SMALL["model.blocks"]) ** -0.25 if path in gained else 1
        np.testing.assert_allclose(scaled[path], factor * leaf, rtol=1e-6)


def made(name):
    return Transformer(configs.model_config(config(residual=name), 64), rngs=nnx.Rngs(0))
