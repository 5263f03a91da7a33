"""attnres_jax.analysis.scaling and statistics: fits, intervals, differences, and the paper's Table 2."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from attnres_jax import __main__, configs
from attnres_jax.analysis import compare, inspect, scaling, statistics
from attnres_jax.train import runs

COMPUTE = np.geomspace(1e12, 1e15, 6)


def curve(label, A, exponent, noise=0.0, seed=0, compute=COMPUTE):
    rng = np.random.default_rng(seed)
    loss = A * compute**-exponent * np.exp(noise * rng.standard_normal(len(compute)))
    return scaling.Curve(label, compute, loss)


@pytest.mark.parametrize(("A", "exponent"), [(1.89, 0.057), (30.0, 0.31), (2.5, 0.0)])
def test_synthetic_laws_are_recovered(A, exponent):
    law = scaling.fit(*curve("plain", A, exponent)[1:])
    assert law.exponent == pytest.approx(exponent, abs=1e-6)
    np.testing.assert_allclose(law.A, A, rtol=1e-6)
    if exponent:
        assert law.compute(law.at(3e13)) == pytest.approx(3e13)


def test_the_fit_is_least_squares():
    """Against numpy's polyfit, on points that no line passes through."""
    noisy = curve("plain", 2.0, 0.05, 0.1)
    law = scaling.fit(noisy.compute, noisy.loss)
    slope, intercept = np.polyfit(np.log(noisy.compute), np.log(noisy.loss), 1)
    assert (law.exponent, np.log(law.A)) == pytest.approx((-slope, intercept))


def test_advantage_of_known_curves():
    """Half the loss constant at a = 1/2: four times the compute."""
    assert scaling.advantage(scaling.PowerLaw(1.0, 0.5), scaling.PowerLaw(2.0, 0.5), 7e9) == pytest.approx(4)


def test_table_2_of_the_paper():
    """The acceptance of the issue: exponents to 0.0005, Block's advantage 1.28 to 0.03."""
    rows = {row.label: row for row in scaling.rows(scaling.table2())}
    expected = {"plain": 0.0549, "block N=8": 0.0565, "full": 0.0558}
    assert {label: rows[label].law.exponent for label in expected} == pytest.approx(expected, abs=5e-4)
    gain = rows["block N=8"].advantage
    assert gain is not None
    assert gain.value == pytest.approx(1.28, abs=0.03)
    assert 1 < gain.low < gain.value < gain.high < 1.5
    assert scaling.largest(scaling.table2()) == 6 * 528e6 * 119e9


def test_exact_points_have_no_interval():
    rows = scaling.rows([curve("plain", 2.0, 0.05), curve("full", 1.9, 0.06)])
    for row in rows:
        assert row.exponent.high - row.exponent.low < 1e-9
    assert rows[0].advantage is None
    assert rows[1].advantage is not None


def test_intervals_are_those_of_the_seed():
    curves = [curve("plain", 2.0, 0.05, 0.01)]
    first, again, other = (scaling.bootstrap(curves, 50, seed)[0].exponent for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_points_are_drawn_alike_for_all_schemes():
    """The same noise in both, and the same constants: every draw has the advantage 1."""
    plain, full = scaling.bootstrap([curve(name, 2.0, 0.05, 0.02) for name in ("plain", "full")], 500)
    np.testing.assert_allclose(scaling.advantage(full, plain, 1e15), 1)
    assert np.ptp(full.exponent) > 0.001


@pytest.mark.parametrize(("points", "covered"), [(3, 0.64), (5, 0.85), (12, 0.92)])
def test_coverage_is_as_said(points, covered):
    compute, hits = np.geomspace(1e12, 1e14, points), 0
    for seed in range(500):
        many = scaling.bootstrap([curve("plain", 2.0, 0.05, 0.01, seed, compute)], 500, seed)[0].exponent
        low, high = np.quantile(many, [0.025, 0.975])
        hits += low <= 0.05 <= high
    assert hits / 500 == pytest.approx(covered, abs=0.04)


@pytest.mark.parametrize(
    ("compute", "loss", "message"),
    [
        ([1e12], [2.0], "two or more computes, got 1 at 1"),
        ([1e12, 1e12], [2.0, 2.1], "two or more computes, got 2 at 1"),
        ([1e12, 1e13], [2.0, -1.0], "above zero"),
        ([1e12, 1e13], [2.0, np.nan], "above zero"),
    ],
)
def test_what_cannot_be_fitted(compute, loss, message):
    with pytest.raises(scaling.NotFitted, match=message):
        scaling.fit(np.array(compute), np.array(loss))


def test_two_points_have_no_interval():
    with pytest.raises(scaling.NotFitted, match="three points or more of each scheme, got 2"):
        scaling.bootstrap([curve("plain", 2.0, 0.05, compute=COMPUTE[:2])])


def points(label, pairs, compute=1e12):
    return [scaling.Point(label, pair, compute * (1 + pair), 3.0 - 0.1 * pair) for pair in pairs]


def test_curves_are_paired():
    plain, full = scaling.paired(points("plain", (2, 0, 1)) + points("full", (1, 2, 0), 1.5e12))
    np.testing.assert_allclose(plain.compute, [1e12, 2e12, 3e12])
    np.testing.assert_allclose(full.compute, [1.5e12, 3e12, 4.5e12])
    np.testing.assert_allclose(full.loss, plain.loss)
    with pytest.raises(scaling.NotFitted, match="full has 2 of the 3 sizes and seeds that plain has, and 1"):
        scaling.paired(points("plain", (0, 1, 2)) + points("full", (1, 2, 3)))
    with pytest.raises(scaling.NotFitted, match="two runs of full have the same size and seed"):
        scaling.paired(points("full", (1, 1)))


def test_difference_by_hand():
    """Student's t of two degrees of freedom: 4.3027."""
    found = statistics.difference([-0.1, -0.2, -0.3])
    assert (found.mean, found.deviation, found.n) == (pytest.approx(-0.2), pytest.approx(0.1), 3)
    assert found.half == pytest.approx(4.3027 * 0.1 / np.sqrt(3), rel=1e-4)
    assert statistics.difference([0.5]) == (0.5, None, 1, None, None)


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_a_detectable_difference_is_detected_as_often_as_said(seeds):
    """Simulated t-tests of normal differences with that mean."""
    shift = statistics.detectable(seeds) / np.sqrt(seeds)
    values = np.random.default_rng(0).normal(shift, 1.0, (20_000, seeds))
    t = values.mean(1) / (values.std(1, ddof=1) / np.sqrt(seeds))
    seen = np.abs(t) > statistics._critical(seeds - 1)
    assert seen.mean() == pytest.approx(statistics.POWER, abs=0.012)


def test_compute_of_a_model():
    """6ND counts what a token uses, by hand: four projections and SwiGLU, norms, reads over depth."""
    config = configs.load("quick:block")
    model = configs.model_config(config, vocab=256)
    matrices = 8 * (4 * 64 * 64 + 3 * 64 * 192)
    assert inspect.active(model) == matrices + 64 * 17 + 2 * 64 * 17


SIZES = ((2, 16, 40), (3, 32, 80), (4, 48, 160))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Finished runs of three sizes, plain and Block, of which only config and evaluation are there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return [finished(tmp_path, name, size) for size in SIZES for name in ("plain", "block")]


def finished(folder, name, size, **changes):
    blocks, width, steps = size
    overrides = {"model.blocks": blocks, "model.width": width, "train.steps": steps} | changes
    flat = configs.to_flat(configs.load(f"quick:{name}")) | overrides | {"optim.warmup": 2}
    path = folder / f"{name}-{width}-{'-'.join(map(str, changes.values()))}"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(flat))
    loss = {"plain": 3.0, "block": 2.9}[name] * steps**-0.1
    (path / "eval.json").write_text(json.dumps({"step": steps, "loss": loss}))
    return path


def test_the_command_fits_runs(folders, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = ["scaling", *map(str, folders), f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["-m", *words])
    assert __main__.main(words) == 0
    said = capsys.readouterr().out
    assert "C = 6 x active parameters x tokens" in said
    text = (out / "scaling.md").read_text()
    assert "| plain | 3 |" in text
    assert "| block | 3 |" in text
    assert scaling.SIX in text
    assert re.search(
        r"^`python -m attnres_jax scaling .*`; 20\d\d-.*, page of commit .*\. 2 rows, seed 0\.$", text, re.M
    )
    assert (out / "scaling.png").is_file()
    stored = json.loads((out / "scaling.json").read_text())
    model = configs.model_config(configs.load("quick:plain", ["--config.model.width=16"]), 256)
    per_block = (4 * 16 * 16 + 3 * 16 * 192) + 2 * 16
    assert stored["fits"][0]["compute"][0] == 6 * (2 * per_block + 16) * 40 * 16 * 128
    exact = runs.points(folders[:1], exact=True)[0].compute
    model = configs.model_config(configs.from_flat(json.loads((folders[0] / "config.json").read_text())), 256)
    assert exact == inspect.cost(model, 128).training_flops * 40 * 16 * 128


def test_schemes_with_a_switch_twice_are_two_curves(folders, tmp_path):
    flat = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert compare.scheme_labels(flat) == ["plain", "block"] * 3
    twins = [finished(tmp_path, "block", size, block_size=2) for size in SIZES]
    points = runs.points(folders + twins, exact=False)
    labels = list(dict.fromkeys(point.label for point in points))
    assert [label[:18].rstrip(",") for label in labels] == [
        "plain",
        "block block_size=4",
        "block block_size=2",
    ]
    # S may follow depth: one curve.
    deep = [flat[1], flat[3] | {"block_size": 6}]
    assert compare.scheme_labels(deep) == ["block", "block"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("scaling --out={0}", "three sizes or more, or --table2"),
        ("scaling a --table2 --out={0}", "three sizes or more, or --table2"),
        ("scaling --table2 --compute=exact --out={0}", "its C is --compute=6nd"),
        ("scaling {0} --out={0}", "has no config.json"),
    ],
)
def test_mistakes_end_in_one_line(words, message, tmp_path, capsys):
    assert __main__.main(words.format(tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_too_few_sizes_are_the_users_mistake(folders, tmp_path, capsys):
    assert __main__.main(["scaling", *map(str, folders[:4]), f"--out={tmp_path}"]) == 2
    assert "three points or more" in capsys.readouterr().err


def test_the_committed_page_is_that_of_the_command(tmp_path):
    assert __main__.main(["scaling", "--table2", f"--out={tmp_path}"]) == 0
    page = Path(__file__).parent.parent / "docs/results/scaling/table2.md"
    assert (tmp_path / "table2.md").read_text() == page.read_text()
