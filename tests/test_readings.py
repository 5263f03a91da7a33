"""What a finished run's model does over depth: kept in its folder, taken anew where its checkpoints are."""

import jax
import numpy as np
import pytest
from test_analysis import workdir  # noqa: F401 the fixture

from attnres_jax.train import readings, runs
from attnres_jax.train.workdir import CHECKPOINTS, RunError


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(*map(numbers, (a, b)), strict=True))


def numbers(reading):
    return jax.tree.leaves(reading._replace(device=0))


@pytest.mark.slow
def test_kept_and_taken_anew(workdir, monkeypatch):  # noqa: F811
    """Without checkpoints what was kept, deep or not; with them the model as it is now."""
    folder, model, _ = workdir
    first = readings.take(folder, deep=True)
    assert first.look is not None
    assert first.look.skipped.shape == (5,)
    monkeypatch.setattr(readings, "_taken", lambda *_: pytest.fail("taken again"))
    assert equal(readings.take(folder, deep=True), first)
    assert readings.take(folder, deep=False).device == first.device
    assert readings.take(folder, deep=False).parameters == first.parameters
    monkeypatch.undo()
    monkeypatch.setattr(readings.checkpoint, "load_run", lambda _: loaded(folder, model))
    (folder / CHECKPOINTS).mkdir()
    model.mix.query[...] = model.mix.query[...] + 1
    assert not equal(readings.take(folder, deep=True), first)
    (folder / CHECKPOINTS).rmdir()
    again = readings.take(folder, deep=True)
    assert not equal(again, first)  # the newer one was kept
    several = readings.take_all([folder] * 3, [True, False, True], at_once=3)
    assert all(equal(one, again) for one in several)


@pytest.mark.slow
def test_a_shallow_one_does_not_do_for_pages(workdir):  # noqa: F811
    folder, *_ = workdir
    readings.take(folder, deep=False)
    with pytest.raises(RunError, match=r"reading.npz is without the losses .* has no checkpoints"):
        runs.read([folder], ("block",))


def loaded(folder, model):
    config = runs.load_config(folder)
    return readings.checkpoint.LoadedRun(config, model, 20)
