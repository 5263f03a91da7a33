"""attnres_jax.analysis: M, statistics over depth, the comparison and its figures."""

import io
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx
from rich.console import Console

from attnres_jax import configs
from attnres_jax.analysis import compare
from attnres_jax.analysis.dynamics import DepthStatistics, depth_statistics, gradient_norm
from attnres_jax.analysis.made import Made
from attnres_jax.analysis.matrix import depth_matrix, reach
from attnres_jax.models.transformer import Transformer
from attnres_jax.residuals import make
from attnres_jax.train import checkpoint, data, readings, runs
from attnres_jax.walk import Record

CASES = [("plain", 1), ("full", 1), ("block", 3), ("block", 4), ("block", 7)]
KINDS = "amamama"


def recorded(name, size, dtype=jnp.float32):
    scheme = make(name, block_size=size)
    toy = toys.cast(toys.toy(scheme, KINDS), dtype)
    return scheme, toys.run(scheme, KINDS, toy, record=True).record


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "size"), CASES)
def test_matrix_times_outputs_is_mixtures(name, size):
    scheme, record = recorded(name, size, jnp.float64)
    matrix = depth_matrix(scheme, record)
    assert matrix.shape == (8, 8, *record.outputs.shape[1:3], 1)
    mixtures = jnp.sum(matrix * record.outputs[None], axis=1)
    np.testing.assert_allclose(mixtures, record.mixtures, rtol=0, atol=1e-10)


def test_matrix_of_plain_is_ones_up_to_the_read():
    scheme, record = recorded("plain", 1)
    expected = np.broadcast_to(np.tri(8)[:, :, None, None, None], (8, 8, 2, 4, 1))
    np.testing.assert_array_equal(depth_matrix(scheme, record), expected)


@pytest.mark.parametrize("size", [1, 3])
def test_rows_weigh_each_source_once(size):
    """Rows of Full sum to one; those of Block too, if each block counts once."""
    scheme, record = recorded("block", size)
    matrix = np.asarray(depth_matrix(scheme, record))
    for read in range(8):
        firsts = [0, *range(1, read + 1, size)]
        np.testing.assert_allclose(matrix[read, firsts].sum(0), 1, atol=1e-6)
        assert not matrix[read, read + 1 :].any()


def test_matrix_is_at_least_fp32():
    scheme, record = recorded("block", 3, jnp.bfloat16)
    assert record.outputs.dtype == jnp.bfloat16
    assert depth_matrix(scheme, record).dtype == jnp.float32


def test_depth_statistics_by_hand():
    outputs = jnp.stack([jnp.full((1, 2, 4), value) for value in (9.0, 3.0, -0.5)])
    second = jnp.array([[[1.0, 0.5]], [[0.0, 0.5]]])  # two sources, two tokens
    weights = (jnp.ones((1, 1, 2)), second, jnp.full((3, 1, 2), 1 / 3))
    statistics = jax.jit(depth_statistics)(Record(outputs, outputs, weights))
    np.testing.assert_allclose(statistics.output_rms, [3, 0.5], rtol=1e-6)
    np.testing.assert_allclose(statistics.entropy, [0, math.log(2) / 2, math.log(3)], atol=1e-6)
    expected = [[1, 0, 0], [0.75, 0.25, 0], [1 / 3, 1 / 3, 1 / 3]]
    np.testing.assert_allclose(statistics.weights, expected, rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda tree: tree, nnx.State])
def test_gradient_norm_in_order_of_depth(wrap):
    """One sublayer's leaves at a time: norms of "kmkma" against numpy."""
    rng = np.random.default_rng(0)
    count = {"a": 1, "k": 2, "m": 2}
    layers = {
        kind: {"w": rng.standard_normal((n, 3, 2)), "norm": {"scale": rng.standard_normal((n, 3))}}
        for kind, n in count.items()
    }
    layers = jax.tree.map(jnp.asarray, layers)
    expected = [
        np.sqrt(sum(np.sum(np.square(leaf[nth])) for leaf in jax.tree.leaves(layers[kind])))
        for kind, nth in (("k", 0), ("m", 0), ("k", 1), ("m", 1), ("a", 0))
    ]
    norm = jax.jit(lambda gradients: gradient_norm(gradients, "kmkma"))
    np.testing.assert_allclose(norm(wrap({"layers": layers})), expected, rtol=1e-6)


def test_reach_of_known_matrices():
    """Equal reads have log(l + 1), l + 1, l / 2 and no sink; reads of the newest or of the embedding alone
    have none of it, and look back 0 or l. Scale and sign of a row are immaterial."""
    L1, places = 7, np.arange(7)
    equal, newest, oldest = reach(np.tri(L1)), reach(-3.0 * np.eye(L1)), reach(np.eye(1, L1).repeat(L1, 0))
    np.testing.assert_allclose(equal.entropy, np.log(places + 1), atol=1e-15)
    np.testing.assert_allclose(equal.effective, places + 1, rtol=1e-12)
    np.testing.assert_allclose(equal.back, places / 2, rtol=1e-12)
    np.testing.assert_allclose(equal.drawn, 1, rtol=1e-12)
    for alone in (newest, oldest):
        np.testing.assert_array_equal(alone.entropy, 0)
        np.testing.assert_array_equal(alone.effective, 1)
    np.testing.assert_array_equal(newest.back, 0)
    np.testing.assert_array_equal(oldest.back, places)
    np.testing.assert_allclose(oldest.drawn, [np.mean(places[1:] + 1), *[0] * 6])
    np.testing.assert_allclose(newest.drawn, [0, *((i + 1) / (L1 - i) for i in range(1, L1))])


def test_reach_by_hand():
    found = reach(np.array([[2.0, 0, 0], [1, 3, 0], [-1, 0, 1]]))
    np.testing.assert_allclose(found.back, [0, 0.25, 1])
    np.testing.assert_allclose(found.effective[2], 2)
    np.testing.assert_allclose(found.drawn, [(0.25 * 2 + 0.5 * 3) / 2, (0.75 * 2 + 0) / 2, 0.5 * 3])


def statistics(scheme, kinds):
    """Uniform reads; plain has one source."""
    full = scheme.append_only
    counts = scheme.schedule(len(kinds)).counts if full else [1] * (len(kinds) + 1)
    rows = [[1 / n] * n + [0] * (max(counts) - n) for n in counts]
    rms = np.linspace(1, 2, len(kinds))
    return DepthStatistics(rms, np.log(np.asarray(counts, float)), np.asarray(rows))


def run(residual, seed=0, bits=2.5, blocks=2, **changes):
    """A made-up finished run of 20 steps."""
    config = configs.to_flat(configs.base.get_config()) | {"residual": residual, "seed": seed}
    config |= {"model.blocks": blocks, "train.steps": 20, "block_size": 4} | changes
    kinds = "am" * blocks
    train = [
        {"step": n, "loss": 5 - n / 10, "bits_per_byte": 7 - n / 5, "tokens_per_s": 100.0 * n**2}
        | {"seconds": 45.0 * n}
        for n in range(2, 21, 2)
    ]
    evaluation = {"step": 20, "tokens": 999, "loss": bits * math.log(2), "bits_per_byte": bits}
    return compare.Run(
        name=f"{residual}-{seed}",
        config=config,
        kinds=kinds,
        parameters=12345 + (residual != "plain"),
        train=train,
        depth=[{"step": 20, "gradient_norm": [0.1 * n for n in range(1, len(kinds) + 1)]}],
        heldout=[{"step": 10, "bits_per_byte": 4.0}, {"step": 20, "bits_per_byte": 77.0}],
        evaluation=evaluation | {"perplexity": 2**bits},
        statistics=statistics(compare.scheme(config), kinds),
        matrix=np.tri(len(kinds) + 1),
    )


def test_summary_numbers():
    row = compare.summaries([run("plain")])[0]
    assert (row.scheme, row.seeds, row.parameters, row.steps) == ("plain", (0,), 12345, 20)
    assert row.tokens == 20 * 16 * 128
    assert row.bits_per_byte == (2.5, None, 1)
    assert row.difference is None
    assert row.train_loss.mean == pytest.approx((3.2 + 3.0) / 2)  # steps 18 and 20
    assert row.tokens_per_s.mean == pytest.approx(100 * (10**2 + 12**2) / 2)
    assert row.minutes.mean == pytest.approx(15)


def test_seeds_are_one_row_and_differences_are_paired():
    runs = [run("block", s, bits) for s, bits in ((2, 2.5), (0, 2.0), (1, 2.1))]
    runs += [run("plain", s, bits) for s, bits in ((0, 2.4), (1, 2.3), (7, 100.0))]
    plain, block = compare.summaries(runs)
    assert (plain.scheme, block.scheme) == ("plain", "block S=4")
    assert block.seeds == (0, 1, 2)
    assert block.bits_per_byte.mean == pytest.approx(2.2)
    assert block.bits_per_byte.deviation == pytest.approx(np.std([2.5, 2.0, 2.1], ddof=1))
    assert block.difference is not None
    assert block.difference.mean == pytest.approx(-0.3)  # seeds 0 and 1: -0.4 and -0.2
    assert block.difference.deviation == pytest.approx(math.sqrt(0.02))
    assert block.difference.n == 2


def test_keys_a_scheme_does_not_read_do_not_split_it():
    runs = [run("plain", 0, block_size=4), run("plain", 1, block_size=8, key_norm_eps=1e-5)]
    assert [row.seeds for row in compare.summaries(runs)] == [(0, 1)]
    assert compare.caveats(runs) == []


def test_rows_of_one_scheme_are_told_apart():
    fast = run("plain", **{"optim.lr": 0.5})
    labels = [row.scheme for row in compare.summaries([run("plain"), fast, run("block")])]
    lr = configs.base.KEYS["optim.lr"].default
    assert labels == [f"plain (optim.lr={lr})", "plain (optim.lr=0.5)", "block S=4"]
    runs = [run("block"), run("block", block_size=2)]
    assert [row.scheme for row in compare.summaries(runs)] == ["block S=4", "block S=2"]


def test_rows_that_differ_in_much_are_called_as_their_folders():
    """Where the folders of a row's seeds are alike, and those of no other row."""

    def rows(*names):
        sizes = {"model.width": 48}, {"model.width": 96, "model.mlp_width": 200, "optim.lr": 0.5}
        made = [run("block", seed, **size) for size in sizes for seed in (0, 1)]
        made = [one._replace(name=name) for one, name in zip(made, names, strict=True)]
        return [row.scheme for row in compare.summaries(made)]

    assert rows("block-a-0", "block-a-1", "b-0", "b-1") == ["block S=4 (a)", "block S=4 (b)"]
    for unlike in (("a-0", "a-1", "a-0", "a-1"), ("a-0", "b-1", "c", "d")):
        assert all("model.width=" in label for label in rows(*unlike))


def test_same_run_twice_is_refused():
    with pytest.raises(compare.NotComparable, match="plain-0 and plain-0 have the same config"):
        compare.table([run("plain"), run("plain")])


def test_like_for_like_has_no_caveat():
    runs = [run(name, s) for name in ("plain", "full", "block") for s in (0, 1)]
    assert compare.caveats(runs) == []
    logged = run("full", 1, **{"train.log_every": 3, "checkpoint.keep": 9})
    assert compare.caveats([*runs[:3], logged, *runs[4:]]) == []


def test_caveats_name_the_keys():
    other = run("block", 0, **{"data.corpus": "/elsewhere", "train.steps": 30})
    other = other._replace(evaluation=other.evaluation | {"step": 30})
    lines = compare.caveats([run("plain", 0), run("plain", 1), other])
    assert lines == [
        "runs differ in data.corpus: austen, /elsewhere",
        "runs differ in train.steps: 20, 30",
        "runs were evaluated with different step: 20, 30",
        "runs differ in the set of seeds (plain: 0, 1; block S=4: 0); differences use common seeds",
    ]


def reached(matrix):
    found = reach(matrix)
    return [*(f"{np.mean(row):.2f}" for row in found[:3]), "v0", "1.00", f"{np.mean(np.sum(matrix, 1)):.2f}"]


def test_report(tmp_path, capsys):
    runs = [run("block", s, 2.5 + s / 10, blocks=8) for s in (0, 1)] + [run("plain", blocks=8)]
    compare.report(runs, tmp_path / "out", Made("the command", "2 CPU cores, JAX 1.2", "today", "abc"))
    text = (tmp_path / "out/comparison.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    header, _, plain, block = table[:4]
    assert table[6] == ["plain", *reached(np.tri(17))]
    assert dict(zip(header, plain, strict=True))["held-out bits/byte"] == "2.5000"
    cells = dict(zip(header, block, strict=True))
    assert cells["held-out bits/byte"] == "2.5500 ± 0.0707"
    assert (cells["difference"], cells["tokens"], cells["param."]) == (
        "+0.0000",
        "40.96k",
        "12,346",
    )
    line = "`the command`; read on 2 CPU cores, JAX 1.2, today, page of commit abc. 2 rows, seeds 0, 1."
    assert text.splitlines()[2] == line
    assert "**Not like for like:** runs differ in the set of seeds" in text
    assert "Not like for like" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert written == {"loss.png", "depth.png", "matrix.png", "weights-block-s-4.png"}
    assert all(f"({name})" in text for name in written)
    stored = json.loads((tmp_path / "out/comparison.json").read_text())
    assert stored["rows"][1]["bits_per_byte"]["mean"] == pytest.approx(2.55)
    assert [r["name"] for r in stored["runs"]] == ["block-0", "block-1", "plain-0"]


def test_three_schemes_fit_a_terminal():
    """80 columns, several seeds: every number is whole."""
    runs = [run(name, s, 2.5 + s / 10) for name in ("plain", "block", "full") for s in (0, 1)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(compare.table(runs)[0])
    text = console.export_text()
    assert "…" not in text
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in text.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["held-out bits/byte"]] == ["2.5500 ± 0.0707"] * 3


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A finished run of a model that is handed over rather than restored."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50, 101)
    data.prepare(tmp_path / "corpus", text, text[:60], vocab=50, source="noise")
    flat = run("block", **{"data.corpus": str(tmp_path / "corpus"), "data.length": 16}).config
    config = configs.from_flat(flat | {"model.width": 16, "model.mlp_width": 8})
    model = Transformer(configs.model_config(config, 50), rngs=nnx.Rngs(0))
    model.mix.query[...] = jnp.asarray(rng.standard_normal((4, 16)), jnp.float32)
    loaded = checkpoint.LoadedRun(config, model, 20)
    monkeypatch.setattr(checkpoint, "load_run", lambda path: loaded)
    made = run("block")
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [
        row | {"kind": kind}
        for kind, rows in (("train", made.train), ("depth", made.depth), ("eval", made.heldout))
        for row in rows
    ]
    (folder / "config.json").write_text(json.dumps(configs.to_flat(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval.json").write_text(json.dumps(made.evaluation))
    return folder, model, text[:60]


@pytest.mark.slow
def test_a_workdir_is_read_back(workdir, monkeypatch):
    """Statistics are of whole windows of the held-out text, M of the first one's last token."""
    folder, model, text = workdir
    assert readings.device(folder) == ""
    (found,), (taken,) = runs.read([folder], ())
    assert readings.device(folder) == taken.device
    windows = np.stack([text[at : at + 16] for at in (0, 16, 32)])  # a fourth would need padding
    record = model(jnp.asarray(windows), record=True).depth.record
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        found.statistics,
        depth_statistics(record),
    )
    matrix = depth_matrix(model.config.scheme, record)[:, :, 0, 15, 0]
    np.testing.assert_allclose(found.matrix, matrix, rtol=1e-5)
    assert (found.name, found.kinds) == ("run", "amam")
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert [len(found.train), len(found.depth), len(found.heldout)] == [10, 1, 2]
    assert found.config["data.length"] == 16
    monkeypatch.setattr(sys, "argv", ["-m", "compare", "run"])
    runs.compare([folder], folder / "out")
    written = (folder / "out/comparison.md").read_text()
    assert re.search(
        r"^`python -m attnres_jax compare run`.*CPU cores, JAX \d.*, 20\d\d-.*seed 0\.$", written, re.M
    )


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "run has no config.json: it is not a run; make one with train --workdir="),
        ("eval.json", "run has no eval.json: it is not finished; the same train command continues"),
    ],
)
def test_a_folder_that_is_no_finished_run(workdir, missing, message):
    folder = workdir[0]
    (folder / missing).unlink()
    with pytest.raises(runs.RunError, match=message):
        runs.compare([folder], folder / "out")


def test_a_run_that_logged_nothing_by_depth(workdir):
    metrics = workdir[0] / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"depth"' not in line))
    with pytest.raises(runs.RunError, match=r"run logged no depth rows .* smaller train.depth_eve"):
        runs.read([workdir[0]], ())


def test_comparing_a_run_with_itself_is_the_users_error(workdir):
    with pytest.raises(configs.UserError, match="run and run have the same config and seed 0"):
        runs.compare([workdir[0], workdir[0]], workdir[0] / "out")
