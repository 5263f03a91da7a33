"""`eval` and `sample` of a run on its own mesh: what it says is what one device says."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from test_pipeline import SMALL
from test_train import compile_once  # noqa: F401 the fixture: both commands share their programs

from attnres_jax import __main__, configs
from attnres_jax.parallel import mesh as meshes
from attnres_jax.parallel import processes
from attnres_jax.train import data, restored, state, step, workdir
from attnres_jax.train.checkpoint import Checkpoints
from attnres_jax.train.restored import restore

VOCAB, STEP = 256, 3
STAGED = {"mesh.stage": 2, "train.virtual_stages": 2, "train.accumulation": 4}
# Five transformer blocks in four chunks: one is longer, and AttnRes blocks of 4 sublayers are parted.
MODEL = SMALL | {"model.blocks": 5, "block_size": 4, "data.batch": 8, "data.segments": True}
MESHES = {
    "rest": ({"mesh.data": -1}, 8),
    "fsdp-tensor": ({"mesh.fsdp": 2, "mesh.tensor": 2}, 4),
    "stages": (STAGED, 2),
    "stages-fsdp-tensor": (STAGED | {"mesh.fsdp": 2, "mesh.tensor": 2}, 8),
}


def config(folder, **keys):
    flat = configs.to_flat(configs.base.get_config()) | MODEL | {"data.corpus": str(folder / "corpus")}
    return configs.from_flat(flat | {"mesh.data": 1} | keys)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of one device as its first checkpoint leaves it; queries that weigh sources unevenly."""
    folder = tmp_path_factory.mktemp("saved")
    text = np.frombuffer(b"Stages keep step.\0" * 40, np.uint8)
    corpus = folder / "corpus"
    data.prepare(corpus, text[:600], text[600:], vocab=VOCAB, source="a sentence", bytewise=True)
    data.write_meta(corpus, data.read_meta(corpus) | {"end": 0})
    run = step.programs(config(folder), VOCAB, jax.devices()[:1], 0)
    rng = np.random.default_rng(0)
    made = state.create(run.model, optax.identity(), 0).params
    params = jax.tree.map(lambda a: a + np.float32(0.1 * rng.standard_normal(a.shape)), made)
    with Checkpoints(folder / "run" / workdir.CHECKPOINTS, 1) as checkpoints:
        checkpoints.save(state.State(np.int32(STEP), params, {"count": np.int32(STEP)}))
    workdir.write_json(folder / "run" / "config.json", configs.to_flat(config(folder)))
    return folder


@pytest.fixture
def run_on(saved, tmp_path, monkeypatch):
    """The run, as if it had been trained on another mesh; all eight devices are there."""

    def copy(**keys):
        monkeypatch.setattr(meshes, "available", jax.devices)
        shutil.copytree(saved / "run", tmp_path / "run")
        workdir.write_json(tmp_path / "run" / "config.json", configs.to_flat(config(saved, **keys)))
        return tmp_path / "run"

    return copy


def said(capsys, run):
    """What both commands say of a run."""
    assert __main__.main(["eval", f"--workdir={run}"]) == 0
    printed = capsys.readouterr()
    found = json.loads((run / f"eval-{STEP}.json").read_text())
    assert f"{found['bits_per_byte']:.4f} bits/byte" in printed.out
    words = ["--prompt=St\0Sta", "--length=12", "--temperature=0"]
    assert __main__.main(["sample", f"--workdir={run}", *words]) == 0
    text = capsys.readouterr().out
    assert text.startswith("St\0Sta")
    return printed.err, found, text


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "devices"), MESHES.values(), ids=MESHES)
def test_a_mesh_says_what_one_device_says(saved, run_on, capsys, keys, devices):
    run = run_on(**keys)
    ours, alone = restore(run), restore(saved / "run", devices=jax.devices()[:1])
    assert (ours.run.mesh.size, alone.run.mesh.size, ours.step) == (devices, 1, STEP)
    text = np.frombuffer(b"eps\0Stag", np.uint8).astype(np.int32)
    for at in (0, 5, 7):
        found, wanted = (np.asarray(of.run.logits(of.params, text, at)) for of in (ours, alone))
        assert found.shape == (VOCAB,)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    (err, found, words), (_, wanted, expected) = said(capsys, run), said(capsys, saved / "run")
    assert err == ""
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    np.testing.assert_allclose(found["position_bits"], wanted["position_bits"], rtol=1e-5)
    assert words == expected


def test_logits_are_the_models(saved):
    """Of documents apart: what stands before an end token is not seen, nor what stands behind."""
    alone = restore(saved / "run")
    text = np.frombuffer(b"eps\0Stag", np.uint8).astype(np.int32)
    model = state.merge(alone.run.model, alone.params)
    tokens, segments, positions = (np.array([row]) for row in (text[4:6], [0, 0], [0, 1]))
    wanted = np.asarray(jax.jit(lambda *args: model(*args).logits)(tokens, segments, positions))[0, 1]
    found = np.asarray(alone.run.logits(alone.params, text, 5))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_another_corpus_is_said(saved, run_on, tmp_path, capsys):
    """Of fewer token values than the run was trained on."""
    text = np.zeros(100, np.uint8)
    data.prepare(tmp_path / "other", text, text, vocab=128, source="another", bytewise=True)
    run = run_on(**{"data.corpus": str(tmp_path / "other"), "data.segments": False})
    assert __main__.main(["eval", f"--workdir={run}"]) == 2
    assert "another vocabulary than the corpus has now: put the corpus back" in capsys.readouterr().err


def test_too_few_devices_are_said(saved, run_on, capsys, monkeypatch):
    """A run of a pod on a laptop: one device computes, and the error output has the reason."""
    run = run_on(**STAGED)
    monkeypatch.setattr(meshes, "available", lambda: jax.devices()[:1])
    err, found, text = said(capsys, run)
    assert "on one device, not on the mesh of the run: the mesh data 1 x fsdp 1 x stage 2" in err
    _, wanted, expected = said(capsys, saved / "run")
    assert (found, text) == (wanted, expected)
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # several processes have no one device
    monkeypatch.setattr(processes, "agree", lambda step: step)
    assert __main__.main(["eval", f"--workdir={run}"]) == 2
    assert "does not fit 1 devices" in capsys.readouterr().err


def test_processes_take_the_same_checkpoint(saved, monkeypatch):
    """That of the first: another, which would take a newer one, is told; so is what the first met."""
    told = []
    monkeypatch.setattr(processes, "agree", lambda step: told.append(step) or 7)
    assert restored._agreed(saved / "run", None) == 7
    monkeypatch.setattr(processes, "first", lambda: False)
    assert restored._agreed(saved / "nowhere", None) == 7
    monkeypatch.setattr(processes, "agree", lambda step: -1)
    with pytest.raises(workdir.RunError, match="the first process could not take"):
        restored._agreed(saved / "run", None)
    monkeypatch.setattr(processes, "first", lambda: True)
    with pytest.raises(workdir.RunError, match="no checkpoint of step 5; there are: 3"):
        restored._agreed(saved / "run", 5)
    assert told == [STEP, -1]
