"""Several processes train as one: same data, same losses; told or killed, none is left waiting."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache

import cluster
import numpy as np
import pytest

from attnres_jax.configs import UserError
from attnres_jax.parallel import processes
from attnres_jax.train import data

SAME = {"rtol": 2e-5}  # fp32, sums over the batch in another order
# Each process is a stage of a pipeline. The last of four has a transformer block more: then layers in order
# of stages, which are filled up, are not those of the checkpoint.
STAGED = {"mesh__stage": 2, "train__accumulation": 2}
FOUR = {"mesh__stage": 4, "train__accumulation": 4, "model__blocks": 5}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, of the number of transformer blocks."""

    @cache
    def run(blocks):
        folder = tmp_path_factory.mktemp("alone") / "run"
        code, said = cluster.run(cluster.command(folder, model__blocks=blocks))
        assert code == 0, said
        return folder

    return run


def assert_same_losses(folder, alone):
    found, wanted = cluster.losses(folder), cluster.losses(alone)
    assert list(found) == list(wanted)
    np.testing.assert_allclose([*found.values()], [*wanted.values()], **SAME)


def told_to_stop(folder, words, count):
    """So many processes, of which the second is sent SIGTERM; the step that all saved."""
    running = cluster.start(words, count)
    cluster.wait_for_step(folder, 2, running)
    os.kill(cluster.member(folder, 1), signal.SIGTERM)
    said = cluster.ended(running, 120)
    assert running.returncode == 0, said
    assert "told to stop: saved step" in said
    (saved,) = cluster.finished(folder)
    assert max(cluster.losses(folder)) == saved < 10_000
    return saved


@pytest.mark.slow
def test_two_processes_told_to_stop_go_on_as_one(tmp_path):
    """SIGTERM to one of two: both save the same step and exit 0. One process on another mesh goes on with
    the same data: its losses are those of one process all the way."""
    folder, whole = tmp_path / "two", tmp_path / "one"
    saved = told_to_stop(folder, cluster.command(folder, train__steps=10_000, mesh__fsdp=-1, mesh__data=1), 2)
    more = {"train__steps": 10_000, "train__stop_after": saved + 3}
    for run in (folder, whole):
        code, said = cluster.run(cluster.command(run, **more))
        assert code == 0, said
        assert f"updates {saved if run == folder else 0} to" in said
    assert_same_losses(folder, whole)


@pytest.mark.slow
def test_four_stages_told_to_stop_go_on_without_a_pipeline_and_back(tmp_path):
    """The same of a process for each stage; then one process without stages, then four stages again."""
    folder, whole = tmp_path / "stages", tmp_path / "one"
    saved = told_to_stop(folder, cluster.command(folder, train__steps=10_000, **FOUR), 4)
    alone = FOUR | {"mesh__stage": 1}
    for run, count, mesh, to in (
        (folder, 1, alone, saved + 2),
        (folder, 4, FOUR, saved + 4),
        (whole, 1, alone, saved + 4),
    ):
        words = cluster.command(run, train__steps=10_000, train__stop_after=to, **mesh)
        code, said = cluster.run(words, count)
        assert code == 0, said
        assert f"updates {0 if run == whole else to - 2} to" in said
    assert_same_losses(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, {"mesh__tensor": 2}),
        (4, {}),
        (4, {"mesh__data": 2, "mesh__fsdp": 2}),
        (2, STAGED),
        (4, FOUR),
        (4, STAGED | {"mesh__data": 2}),
    ],
    ids=["tensor", "data", "data and fsdp", "two stages", "four stages", "stage and data"],
)
def test_processes_are_one(alone, tmp_path, count, mesh):
    code, said = cluster.run(cluster.command(tmp_path / "run", **mesh), count)
    assert code == 0, said
    assert_same_losses(tmp_path / "run", alone(mesh.get("model__blocks", cluster.TINY["model.blocks"])))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [{"mesh__data": 1, "mesh__fsdp": 2}, STAGED | {"mesh__data": 1}], ids=["fsdp", "stages"]
)
def test_both_are_asked(tmp_path, mesh):
    """`eval` and `sample` of a run of two processes, on both: one file and one text, those of one process."""
    text = np.frombuffer(b"Stages keep step. " * 40, np.uint8)
    data.prepare(tmp_path / "corpus", text[:600], text[600:], vocab=256, source="a sentence", bytewise=True)
    run = tmp_path / "run"
    words = cluster.command(run, train__steps=2, data__corpus=tmp_path / "corpus", **mesh)
    code, said = cluster.run(words, 2)
    assert code == 0, said
    found = []
    for count in (2, 1):
        answers = []
        for asked in (["eval"], ["sample", "--prompt=Stag", "--length=3", "--temperature=0"]):
            words = [sys.executable, "-m", "attnres_jax", asked[0], f"--workdir={run}", *asked[1:]]
            code, said = cluster.run(words, count)
            assert code == 0, said
            assert ("on one device" in said) == (count == 1)
            answers.append(said)
        loss = json.loads((run / "eval-2.json").read_text())["loss"]
        assert answers[0].count("By position") == answers[1].count("Stag") == 1
        found.append((loss, answers[1][answers[1].index("Stag") :]))
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-5)
    assert found[0][1] == found[1][1]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "mesh"), [(0, {}), (1, {}), (1, STAGED)], ids=["0", "1", "stage 1"])
def test_the_others_stop_when_one_dies(tmp_path, victim, mesh):
    """Within the heartbeat and a little; what was saved continues on one process, without stages: its losses
    are those of one process all the way."""
    folder, whole = tmp_path / "run", tmp_path / "one"
    steps = {"train__steps": 10_000, "checkpoint__every": 2} | mesh
    running = cluster.start(cluster.command(folder, **steps), 2)
    cluster.wait_for_step(folder, 8, running)
    os.kill(cluster.member(folder, victim), signal.SIGKILL)
    start = time.monotonic()
    said = cluster.ended(running, 3 * processes.HEARTBEAT)
    assert running.returncode != 0
    assert time.monotonic() - start < processes.HEARTBEAT + 15
    assert "another process is gone" in said or "another task died" in said, said
    saved = max(cluster.finished(folder))
    steps |= {"mesh__stage": 1, "train__stop_after": saved + 2}
    for run in (folder, whole):
        code, said = cluster.run(cluster.command(run, **steps))
        assert code == 0, said
        assert f"updates {saved if run == folder else 0} to" in said
    assert_same_losses(folder, whole)


def test_what_the_environment_asks_for(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(UserError, match=r"JAX_PROCESS_ID = '' must be a whole number"):
        processes.named()
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert processes.named() == {"num_processes": 2, "process_id": 1}
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    with pytest.raises(UserError, match="but not JAX_COORDINATOR_ADDRESS"):
        processes.named()
    monkeypatch.delenv("JAX_NUM_PROCESSES")
    monkeypatch.delenv("JAX_PROCESS_ID")
    assert processes.named() == {}


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path):
    """The script that was run with a hundred."""
    words = [sys.executable, str(cluster.ROOT / "tests/sigkill.py"), "--kills=10", f"--folder={tmp_path}"]
    ran = subprocess.run(words, check=False, capture_output=True, text=True, cwd=cluster.ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "nothing lost, the same bits" in ran.stdout
