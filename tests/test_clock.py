"""Where the time of a run went, over stops and kills; the profiler's trace; the compilation cache."""

import contextlib
import time

import cluster
import jax
import pytest

from attnres_jax.train import clock, compiled, workdir
from attnres_jax.train.clock import SPENT, Clock, goodput
from attnres_jax.train.trace import Trace


@pytest.fixture
def hands(monkeypatch):
    """A clock that moves when it is told."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def test_every_second_has_one_place(hands):
    watch = Clock({}, 97.0)  # start-up began 3 s ago
    hands(2)
    with watch.section("compile"):
        hands(5)
    watch.begin("stepping")
    hands(10)
    with watch.section("evaluation"):
        hands(1)
        with watch.section("input"):
            hands(0.5)
        hands(1)
    hands(7)
    wanted = {"start": 5.0, "compile": 5.0, "stepping": 17.0, "evaluation": 2.0, "input": 0.5}
    assert watch.read() == dict.fromkeys(SPENT, 0.0) | wanted
    assert goodput(watch.read()) == pytest.approx(17 / 29.5)


def test_a_section_that_fails_ends(hands):
    watch = Clock({}, 100.0)
    with contextlib.suppress(KeyError), watch.section("input"):
        hands(1)
        raise KeyError
    hands(2)
    assert (watch.read()["input"], watch.read()["start"]) == (1, 2)


def row(kind, step, **values):
    return {"kind": kind, "step": step} | values


def test_what_was_not_saved_is_lost(hands):
    saved = dict.fromkeys(SPENT, 0.0) | {"start": 4.0, "stepping": 30.0, "lost": 2.0}
    rows = [row("train", 10, seconds=35.0), row("time", 10, **saved), row("train", 17, seconds=50.0)]
    found = Clock.resumed(rows[:2], rows, 100.0).read()
    assert found == saved | {"lost": 2.0 + (50 - 36)}
    assert Clock.resumed(rows[:2], rows[:2], 100.0).read() == saved  # stopped in order
    assert Clock.resumed([], rows[:1], 100.0).read()["lost"] == 35  # killed before a checkpoint
    assert sum(Clock.resumed([], [], 100.0).read().values()) == 0


class Device:
    def __init__(self, platform, kind):
        self.platform, self.device_kind = platform, kind


def test_peaks_are_those_of_data_sheets(monkeypatch):
    assert clock.peak_flops(Device("gpu", "NVIDIA H100 80GB HBM3")) == 989e12
    assert clock.peak_flops(Device("gpu", "some other")) is None
    assert clock.peak_flops(jax.devices()[0]) is None  # a CPU
    from jax._src.tpu_info import ChipVersion, get_tpu_info_for_chip

    megacore = get_tpu_info_for_chip(ChipVersion.TPU_V5P, 2)
    monkeypatch.setattr(clock.pltpu, "get_tpu_info", lambda: megacore)
    assert clock.peak_flops(Device("tpu", "TPU v5")) == pytest.approx(459e12)


def test_a_trace_of_some_updates(tmp_path):
    settled = []
    with Trace(tmp_path / "profile", 2, 3) as trace:
        for step in (1, 2, 3, 4, 5):
            trace.before(step, lambda step=step: settled.append(step))
            jax.numpy.ones(step).block_until_ready()
    assert settled == [2, 4]
    assert len([*(tmp_path / "profile").rglob("*.xplane.pb")]) == 1
    with Trace(tmp_path / "none", 0, 0) as trace:
        trace.before(1, lambda: settled.append("never"))
    assert settled == [2, 4]
    assert not (tmp_path / "none").exists()


def test_a_trace_of_the_last_update_is_written(tmp_path):
    with Trace(tmp_path, 1, 9) as trace:
        trace.before(1, lambda: None)
    assert [*tmp_path.rglob("*.xplane.pb")]


def test_the_cache_of_the_user_comes_first(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compiled.keep()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "attnres_jax/compiled")
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        compiled.keep()
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
def test_a_run_says_where_its_time_went(tmp_path, monkeypatch):
    """In the log, and in a line; the second start finds the programs compiled, and traces two updates."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, changes = tmp_path / "run", {"train__steps": 40, "checkpoint__every": 10}
    code, said = cluster.run(cluster.command(folder, **changes, train__stop_after=20))
    assert code == 0, said
    changes |= {"profile__first": 25, "profile__last": 26}
    code, said = cluster.run(cluster.command(folder, **changes))
    assert code == 0, said
    assert "goodput " in said
    rows = [row for row in workdir.read_rows(folder) if row["kind"] == "time"]
    assert [row["step"] for row in rows] == [
        0,
        10,
        20,
        20,
        20,
        30,
        40,
        40,
    ]  # also where a start begins and ends
    first, last = rows[3], rows[-1]
    assert last["compile"] - first["compile"] < first["compile"]
    assert all(last[kind] > 0 for kind in set(SPENT) - {"lost"})
    assert [*(folder / "profile").rglob("*.xplane.pb")]
