"""Checkpoints under faults: damage, half-written ones, a full disk; and a move to another mesh."""

import json
import re
import shutil

import cluster
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnres_jax.parallel import mesh, sharding
from attnres_jax.train import checksums
from attnres_jax.train.checkpoint import Checkpoints
from attnres_jax.train.state import State
from attnres_jax.train.workdir import RunError


def state(step, size=300):
    """Random numbers, so that files do not compress."""
    rng = np.random.default_rng(step)
    params = {
        "a": {"w": rng.standard_normal((size, 8)).astype(np.float32)},
        "b": np.full(3, step, np.float32),
    }
    return jax.device_put(State(np.int32(step), params, {"mu": params, "count": np.int32(step)}))


def like(step=0):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), state(step))


def save(folder, *steps, keep=2, keep_every=0):
    with Checkpoints(folder, keep, keep_every) as checkpoints:
        for step in steps:
            checkpoints.save(state(step))


def restored(folder):
    with Checkpoints(folder, 2) as checkpoints:
        return checkpoints.restore(like())


def assert_is(found, step):
    jax.tree.map(np.testing.assert_array_equal, found, state(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 1, 2)
    return folder


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_is_whole(saved):
    assert checksums.damage(saved / "2") is None
    covered = json.loads((saved / "2/checksums.json").read_text())
    rest = {str(path.relative_to(saved / "2")) for path in files(saved / "2")} - set(covered)
    assert rest == {"checksums.json", *checksums.LATE}
    assert_is(restored(saved), 2)


@pytest.mark.parametrize("how", ["empty", "half", "one byte short", "one bit", "gone"])
def test_damage_to_any_file_is_found(saved, tmp_path, how):
    """Every file of a checkpoint, one at a time. One bit: where there are checksums."""
    whole = tmp_path / "2"
    shutil.copytree(saved / "2", whole)
    for path in files(whole):
        if how in ("one bit", "gone") and path.parent == whole and path.name in checksums.LATE:
            continue
        raw = path.read_bytes()
        middle = len(raw) // 2
        cut = {"empty": b"", "half": raw[: len(raw) // 2], "one byte short": raw[:-1], "gone": b""}
        flipped = raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
        path.write_bytes(cut.get(how, flipped))
        if how == "gone":
            path.unlink()
        assert checksums.damage(whole), path
        path.write_bytes(raw)
    assert checksums.damage(whole) is None


def test_the_one_before_is_taken(saved, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    victim = max(files(folder / "2"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    assert_is(restored(folder), 1)
    said = capsys.readouterr().err
    assert f"2 is damaged ({victim.name} has" in said
    assert "put aside as damaged-2-1" in said
    save(folder, 2)  # the step is made again
    assert_is(restored(folder), 2)
    assert (folder / "damaged-2-1").is_dir()


def test_nothing_whole_is_no_new_beginning(saved, tmp_path):
    """The run is told, and nothing is moved."""
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    for step in ("1", "2"):
        (folder / step / "checksums.json").write_text("{")
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole, the newest of step 2 because check"):
        restored(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_a_disk_that_does_not_answer_is_no_damage(saved, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checksums, "_describe", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        restored(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]


def test_a_half_written_one_is_cleared_away(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    with Checkpoints(folder, 3) as checkpoints:
        assert_is(checkpoints.restore(like()), 2)
        checkpoints.save(state(3))  # waits until it is cleared
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_which_are_kept(tmp_path):
    save(tmp_path, *range(1, 8), keep=2, keep_every=3)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 6, 7]


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """Files may not grow beyond 16 kB: the run says so and ends; room made, it goes on from the last good."""
    changes = {"train__steps": 1000, "train__compile_cache": False, "checkpoint__every": 2}
    code, said = cluster.run(cluster.command(tmp_path, **changes, train__stop_after=2))
    assert code == 0, said
    limited = ["bash", "-c", 'ulimit -f 16; exec "$@"', "limited", *cluster.command(tmp_path, **changes)]
    code, said = cluster.run(limited)
    assert code == 2, said
    wanted = (
        r"^error: a checkpoint could not be written \(File too large\); the last good one is of step 2\. Make"
    )
    assert re.search(wanted, said, re.MULTILINE), said
    code, said = cluster.run(cluster.command(tmp_path, **changes, train__stop_after=4))
    assert code == 0, said
    assert cluster.finished(tmp_path) == [4]


def test_onto_another_mesh(tmp_path):
    """Saved on eight devices, restored on two and on one: the same numbers, where they were asked for."""
    on = {count: mesh.make_mesh({"data": count}, jax.devices()[:count]) for count in (8, 2, 1)}
    value = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)

    def placed(count):
        cut = jax.sharding.NamedSharding(on[count], jax.sharding.PartitionSpec("data"))
        places = State(mesh.whole(on[count]), {"w": cut}, {"mu": {"w": cut}})
        return places, State(jnp.int32(5), {"w": value}, {"mu": {"w": value + 1}})

    places, now = placed(8)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(jax.device_put(now, places))
    for count in (2, 1):
        places, now = placed(count)
        with Checkpoints(tmp_path, 2) as checkpoints:
            found = checkpoints.restore(sharding.placed(now, places))
        jax.tree.map(np.testing.assert_array_equal, found, now)
        assert jax.tree.map(lambda leaf: leaf.sharding, found) == places
