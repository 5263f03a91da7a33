"""What a finished run's model does over depth: kept in its folder, taken anew where its checkpoints are."""

import errno
import threading

import jax
import numpy as np
import pytest
from test_analysis import workdir  # noqa: F401 the fixture

from attnres_jax.analysis.dynamics import DepthStatistics
from attnres_jax.analysis.evidence import Look
from attnres_jax.analysis.outputs import Shares
from attnres_jax.train import data, readings, runs
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


def reading(seed=0, deep=False):
    """As of one model for each seed."""
    rng = np.random.default_rng(seed)
    numbers = [rng.standard_normal(3) for _ in range(8)]
    numbers[0][1] = np.nan  # not a source of that read
    look = Look(Shares(*numbers[4:7]), numbers[7]) if deep else None
    return readings.Reading("a toy", 7, DepthStatistics(*numbers[:3]), numbers[3], look)


@pytest.fixture
def taken(tmp_path, monkeypatch):
    """A run with checkpoints, and a function that says what its model gives."""
    (tmp_path / CHECKPOINTS).mkdir()

    def gives(seed):
        monkeypatch.setattr(readings, "_taken", lambda _, deep: reading(seed, deep))

    gives(0)
    return gives


def test_a_shallow_one_does_not_replace_the_deep_one_of_the_same_model(tmp_path, taken):
    deep = readings.take(tmp_path, deep=True)
    assert equal(readings.take(tmp_path, deep=False), deep)
    (tmp_path / CHECKPOINTS).rmdir()
    assert equal(readings.take(tmp_path, deep=True), deep)


def test_the_look_of_another_model_is_not_kept(tmp_path, taken):
    readings.take(tmp_path, deep=True)
    taken(1)
    assert readings.take(tmp_path, deep=False).look is None
    (tmp_path / CHECKPOINTS).rmdir()
    assert equal(readings.take(tmp_path, deep=False), reading(1))


def test_without_the_text_what_was_kept_is_used_and_told(tmp_path, taken, monkeypatch, capsys):
    def gone(*_):
        data.open_corpus(str(tmp_path / "gone"))

    shallow = readings.take(tmp_path, deep=False)
    monkeypatch.setattr(readings, "_taken", gone)
    assert equal(readings.take(tmp_path, deep=False), shallow)
    said = capsys.readouterr().err
    assert "gone': no such folder" in said
    assert said.endswith(f"of {tmp_path} what reading.npz kept is used\n")
    with pytest.raises(RunError, match=r"reading.npz is without the losses .*gone': no such folder"):
        readings.take(tmp_path, deep=True)
    (tmp_path / readings.FILE).unlink()
    with pytest.raises(data.DataError, match="gone': no such folder"):
        readings.take(tmp_path, deep=False)


def test_a_file_that_cannot_be_written(tmp_path, taken):
    """A folder in its place: who is root may write wherever the file system lets it."""
    (tmp_path / readings.FILE).mkdir()
    with pytest.raises(RunError, match=r"reading.npz cannot be written \(Is a directory\): make the folder"):
        readings.take(tmp_path, deep=False)
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINTS, readings.FILE}


def test_a_file_system_that_cannot_be_written(tmp_path, taken, monkeypatch):
    """It refuses to remove a draft, too, even one that is not there."""

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("open", "unlink"):
        monkeypatch.setattr(readings.Path, name, refuse)
    with pytest.raises(RunError, match=r"reading.npz cannot be written \(Read-only file system\)"):
        readings.take(tmp_path, deep=False)


def test_two_write_at_once(tmp_path, taken, monkeypatch):
    """Both drafts are open before either is whole."""
    both, drafts, save = threading.Barrier(2), [], np.savez

    def savez(out, **arrays):
        drafts.append(out.name)
        both.wait(10)
        save(out, **arrays)

    monkeypatch.setattr(np, "savez", savez)
    readings.take_all([tmp_path] * 2, [True, True], at_once=2)
    assert len(set(drafts)) == 2
    (tmp_path / CHECKPOINTS).rmdir()
    assert equal(readings.take(tmp_path, deep=True), reading(deep=True))


def other_arrays(file):
    np.savez(file, **{str(n): np.zeros(1) for n in range(10)})


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (other_arrays, r"it has other arrays \(0, 1, .*\)"),
        (lambda file: file.write_bytes(b"PK\x03\x04 cut off"), r"it cannot be read \(.*\)"),
        (lambda file: file.write_bytes(b""), r"it cannot be read \(.*\)"),
    ],
)
def test_a_file_that_is_no_reading(write, why, tmp_path, taken):
    write(tmp_path / readings.FILE)
    (tmp_path / CHECKPOINTS).rmdir()
    with pytest.raises(RunError, match=rf"not a reading of this version: {why}. Bring the run's checkpoints"):
        readings.take(tmp_path, deep=False)
    (tmp_path / CHECKPOINTS).mkdir()
    assert equal(readings.take(tmp_path, deep=False), reading())
