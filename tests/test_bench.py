"""The measuring commands, end to end on a tiny model; what they say when something is missing."""

import importlib.util
import json
from collections import Counter

import numpy as np
import pytest

from attnres_jax import __main__, configs
from attnres_jax.analysis import made
from attnres_jax.bench import step, target, turns

TINY = {
    "model.blocks": 1,
    "block_size": 2,
    "model.width": 8,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.mlp_width": 8,
    "data.length": 8,
    "data.batch": 2,
}


@pytest.mark.slow
def test_step_end_to_end(tmp_path, capsys, monkeypatch):
    """Three arms in one file, with what they took and need."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out = tmp_path / "new" / "step.json"
    keys = [f"--config.{name}={value}" for name, value in TINY.items()]
    words = ["bench", "step", "--config=quick:block", "--rounds=3", f"--out={out}", *keys]
    assert __main__.main(words) == 0
    found = json.loads(out.read_text())
    assert set(found["arms"]) == {"plain", "full", "block"}
    assert found["config"]["model.width"] == 8
    assert found["device"] == "1 x cpu"
    assert set(found["versions"]) >= {"jax", "flax"}
    for arm in found["arms"].values():
        assert np.shape(arm["seconds"]) == (3, 2)
        assert (np.asarray(arm["seconds"]) > 0).all()
        low, high = arm["ratio_95_percent"]
        assert low <= arm["ratio_to_plain"] <= high
        assert arm["arguments_bytes"] > 0
    assert found["arms"]["plain"]["ratio_95_percent"] == [1, 1]
    assert "| block | " in capsys.readouterr().out


@pytest.mark.slow
def test_step_of_two_arms(tmp_path, capsys, monkeypatch):
    """Plain is always there; the implementation is passed on to the reads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out = tmp_path / "step.json"
    keys = [f"--config.{name}={value}" for name, value in TINY.items()]
    words = ["bench", "step", "--config=quick:block", "--rounds=2", f"--out={out}", *keys, "--arms", "block"]
    assert __main__.main([*words, "--implementation=xla"]) == 0
    assert set(json.loads(out.read_text())["arms"]) == {"plain", "block"}
    assert __main__.main([*words, "--implementation=triton"]) == 2
    assert "--implementation=triton runs on gpu, this is cpu" in capsys.readouterr().err
    monkeypatch.setattr("attnres_jax.bench.step.elsewhere", lambda _: None)
    with pytest.raises(Exception, match=r"jax-triton does not lower|No module named 'jax_triton'"):
        __main__.main([*words, "--implementation=triton"])


def test_turns_are_balanced():
    """There and back: over a round every arm has the same mean place, so that drift falls on all alike."""
    taken = list(turns.order("abc", 4))
    assert [name for i, name in taken if i == 2] == list("abccba")
    places = Counter()
    for at, (_, name) in enumerate(taken):
        places[name] += at
    assert len(set(places.values())) == 1


def test_the_interval_covers_the_median():
    """Of noise around 1.1: about as often as it says, and narrower with more rounds."""
    rng, inside, widths = np.random.default_rng(0), 0, {}
    for _ in range(100):
        low, high = turns.interval(rng.normal(1.1, 0.05, 40))
        inside += low <= 1.1 <= high
    assert 88 <= inside <= 100
    for rounds in (10, 160):
        low, high = turns.interval(rng.normal(1.1, 0.05, rounds))
        widths[rounds] = high - low
    assert widths[160] < 0.6 * widths[10]


def test_ratios_are_round_by_round():
    """A machine that gets twice as slow halfway does not change the ratio."""
    plain = np.array([[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]])
    arm = step.Arm(None, None, [], 0, 0)
    summary = step._summary(arm, 1.5 * plain, plain)
    assert summary["ratio_to_plain"] == 1.5
    assert summary["ratio_95_percent"] == (1.5, 1.5)


def test_the_commit_is_that_of_this_tree(monkeypatch):
    assert len(made.commit().rstrip("+")) >= 7
    monkeypatch.setenv("PATH", "/nowhere")
    assert made.commit() == "unknown"


@pytest.mark.parametrize(
    "words",
    ["bench traffic --chip=v5e", "bench roofline --chip=v5e", "compile --config=quick --topology=v5e:2x2"],
)
def test_without_the_compiler(words, monkeypatch, capsys):
    """One line that says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert __main__.main(words.split()) == 2
    error = capsys.readouterr().err
    assert "needs no TPU" in error
    assert "pip install 'jax[tpu]'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bench", "required: MEASURE"),
        ("bench trafic", "invalid choice: 'trafic'"),
        ("bench traffic", "required: --chip"),
        ("bench traffic --chip=v3", "invalid choice: 'v3'"),
        ("bench traffic --chip=v5e --blocks=0", "'0' is not a whole number from 1"),
        ("bench traffic --chip=v5e --config.seed=1", "'--config.seed=1' is not understood by bench"),
        ("bench step", "required: --config"),
        ("bench step --config=quik", "did you mean 'quick'"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys):
    assert __main__.main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_slices_that_hold_a_count():
    """Every chip has a smallest slice for one device; what no slice holds is the user's mistake."""
    assert all(min(sizes) in (4, 8) for sizes in target.SLICES.values())
    with pytest.raises(configs.UserError, match="no slice of v5e has 999 devices: at most 256"):
        target.devices("v5e", 999)


@pytest.mark.libtpu
@pytest.mark.slow
def test_traffic_end_to_end(tmp_path, capfd):
    """A small step compiled for a v5e: no scores in memory, and Block moves more than plain."""
    sizes = "--blocks=4 --block-size=2 --width=256 --heads=2 --mlp-width=256 --length=1024 --batch=8"
    out, keep = tmp_path / "traffic.json", tmp_path / "texts"
    words = ["bench", "traffic", "--chip=v5e", *sizes.split(), f"--out={out}", f"--keep={keep}"]
    assert __main__.main(words) == 0
    found = json.loads(out.read_text())
    assert found["chip"]["name"] == "v5e"
    plain, block = (found["arms"][name] for name in ("plain", "block-xla"))
    assert plain["residual_td_per_sublayer"] == 8
    kernels = {name: "kernel" in arm["attributed_by_kind"] for name, arm in found["arms"].items()}
    assert kernels == {"plain": False, "block-xla": False, "block-kernel": True}
    assert block["residual_td_per_sublayer"] > found["bound"]["td_per_sublayer"]["phase 1 recomputed"]
    assert block["flops"] == pytest.approx(plain["flops"], rel=0.01)
    assert block["time_over_plain"] > 1
    for text in keep.iterdir():
        assert "1024,1024]" not in text.read_text()
    assert "| bound |" in capfd.readouterr().out
