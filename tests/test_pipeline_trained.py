"""A pipeline in the trainer: checkpoints know no stages, resuming is exact, optimizers see the same."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from test_pipeline import SMALL
from test_train import compile_once  # noqa: F401 the fixture: starts of a run share their programs

from attnres_jax import __main__, configs
from attnres_jax.models.table import path_name
from attnres_jax.parallel import mesh as meshes
from attnres_jax.train import data, loop, step, workdir
from attnres_jax.train.checkpoint import Checkpoints, load_run

LAST, RATE = 4, 0.01
# Five transformer blocks in four chunks: one is longer, and AttnRes blocks of 4 sublayers are parted.
STAGED = {"mesh.stage": 2, "train.virtual_stages": 2}
RUN = SMALL | {
    "model.blocks": 5,
    "block_size": 4,
    "data.batch": 4,
    "mesh.data": 1,
    "train.accumulation": 4,
    "train.steps": LAST,
    "train.log_every": 1,
    "train.depth_every": 2,
    "train.eval_every": LAST,
    "train.eval_tokens": 100,
    "checkpoint.every": 2,
    "optim.warmup": 1,
    "optim.lr": RATE,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "noise"
    text = np.random.default_rng(0).integers(0, 20, 2000)
    data.prepare(folder, text[:1500], text[1500:], vocab=20, source="noise")
    return folder


def config(corpus, **keys):
    flat = configs.to_flat(configs.base.get_config()) | RUN | {"data.corpus": str(corpus)} | keys
    return configs.from_flat(flat)


def devices(config):
    return jax.devices()[: config.mesh.stage]


def train(config, folder, *stops):
    """Up to each of `stops` in a start of its own; 0 is the end."""
    for stop in stops:
        changed = config.copy_and_resolve_references()
        changed.train.stop_after = stop
        loop.train(changed, folder, devices(config))


def parameters(folder, at=None):
    """Those of a checkpoint, in order of depth."""
    return named(nnx.to_pure_dict(nnx.state(load_run(folder, at).model, nnx.Param)))


def named(tree):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def rows(folder):
    """Of the log, but the times."""
    kinds = "depth", "eval"
    found = [row for row in workdir.read_rows(folder) if row["kind"] in kinds]
    return found, [row["loss"] for row in workdir.read_rows(folder) if row["kind"] == "train"]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run on two stages, never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config(corpus, **STAGED), folder, 0)
    return folder


@pytest.mark.slow
def test_resume_is_exact(corpus, whole, tmp_path):
    """Two updates, then two more from the checkpoint: the four of an uninterrupted run, bit for bit."""
    train(config(corpus, **STAGED), tmp_path / "run", 2, 0)
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path / "run"), parameters(whole))
    assert rows(tmp_path / "run") == rows(whole)


@pytest.mark.slow
def test_a_checkpoint_knows_no_stages(corpus, whole):
    """What one stage reads of it are the parameters and moments of two, one by one, in order of depth."""
    staged, alone = (config(corpus, **STAGED), config(corpus))
    runs = [step.programs(c, 20, devices(c)) for c in (staged, alone)]
    found = []
    for run in runs:
        with Checkpoints(whole / workdir.CHECKPOINTS, 2) as checkpoints:
            found.append(checkpoints.restore(run.stored))
    ours = runs[0].resume(found[0])
    stacked = ours.params["layers"]["a"]["query"]["kernel"]
    assert stacked.shape[0] == 8  # four chunks of the longest, two
    assert {shard.index[0] for shard in stacked.addressable_shards} == {slice(0, 4), slice(4, 8)}
    jax.tree.map(np.testing.assert_array_equal, named(runs[0].save(ours)), named(found[1]))
    jax.tree.map(np.testing.assert_array_equal, named(found[1].params), parameters(whole))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_trained_on_stages_as_on_one(corpus, tmp_path, optimizer):
    """Losses, held-out loss and parameters; gradients are clipped by their norm over all stages."""
    keys, staged = {"optim.name": optimizer, "optim.clip": 0.5}, tmp_path / "stages"
    train(config(corpus, **STAGED, **keys), staged, 0)
    train(config(corpus, **keys), tmp_path / "one", 0)
    (events, losses), (wanted_events, wanted) = rows(staged), rows(tmp_path / "one")
    np.testing.assert_allclose(losses, wanted, rtol=2e-6)
    assert [row["kind"] for row in events] == [row["kind"] for row in wanted_events]
    found, expected = parameters(staged), parameters(tmp_path / "one")
    moved = parameters(staged, 2)
    for path, leaf in expected.items():
        assert np.any(moved[path] != leaf), path
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-3 * RATE, err_msg=path)


def test_a_vocabulary_that_stages_do_not_divide(corpus):
    with pytest.raises(
        configs.ConfigError, match=r"mesh.stage x train.vocab_chunks = 2 x 3 must divide .* 20: each stage"
    ) as error:
        step.programs(config(corpus, **STAGED, **{"train.vocab_chunks": 3}), 20, jax.devices()[:2])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_evaluated_and_sampled(tmp_path, capsys, monkeypatch):
    """`eval` and `sample` of a run of stages, on its stages: the held-out loss is the trainer's own."""
    text = np.frombuffer(b"Stages keep step. " * 100, np.uint8)
    data.prepare(tmp_path / "corpus", text[:1500], text[1500:], vocab=256, source="a sentence", bytewise=True)
    run = tmp_path / "run"
    train(config(tmp_path / "corpus", **STAGED, **{"train.eval_tokens": 0}), run, 0)
    monkeypatch.setattr(meshes, "available", jax.devices)
    assert __main__.main(["eval", f"--workdir={run}"]) == 0
    again, trained = (json.loads((run / name).read_text()) for name in (f"eval-{LAST}.json", "eval.json"))
    assert again == trained
    words = ["--prompt=Stages", "--length=4", "--temperature=0"]
    assert __main__.main(["sample", f"--workdir={run}", *words]) == 0
    printed = capsys.readouterr()
    assert "one device" not in printed.err
    assert "\nStages" in printed.out
