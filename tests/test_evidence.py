"""Evidence: the loss without each output, its share of the stream, rows by seeds, the pages."""

import json
import re
import subprocess
import sys

import cluster
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from flax import nnx
from test_analysis import run
from test_figures import untidy

from attnres_jax.analysis import compare, evidence, figures, heatmaps, pages
from attnres_jax.analysis.made import Made
from attnres_jax.analysis.matrix import depth_matrix
from attnres_jax.analysis.outputs import Shares, shares, without_each
from attnres_jax.analysis.paper import TABLE4
from attnres_jax.configs import sweeps
from attnres_jax.models.transformer import ModelConfig, Transformer
from attnres_jax.residuals import SCHEMES, make

KINDS = "amamama"
SIZES = {"vocab": 19, "blocks": 2, "width": 16, "heads": 2, "kv_heads": 2, "mlp_width": 24}


def rms(v):
    return np.sqrt(np.mean(np.asarray(v, np.float64) ** 2))


@pytest.mark.parametrize(("name", "size"), [("plain", 1), ("block", 3), ("block", 7), ("full", 1)])
def test_shares_are_those_of_sums_over_blocks(name, size):
    """Against sums of the recorded outputs, block by block, and against M."""
    scheme = make(name, block_size=size)
    toy = toys.cast(toys.toy(scheme, KINDS), jnp.float32)
    mix = scheme.init(len(KINDS), 8)._replace(**toy.mix)
    record = toys.run(scheme, KINDS, toy, record=True).record
    found = jax.jit(lambda record: shares(scheme, mix, record))(record)
    outputs, matrix = np.asarray(record.outputs), np.asarray(depth_matrix(scheme, record))
    for l in range(1, len(KINDS) + 1):
        first = 0 if name == "plain" else 1 + (l - 1) // size * size
        before = outputs[first:l].sum(0)
        assert found.stream[l - 1] == pytest.approx(rms(before + outputs[l]), rel=1e-5)
        if l == first:
            assert np.isnan(found.added[l - 1])
        else:
            assert found.added[l - 1] == pytest.approx(rms(outputs[l]) / rms(before), rel=1e-5)
        read = rms(matrix[l, l] * outputs[l]) / rms((matrix[l] * outputs).sum(0))
        assert found.read[l - 1] == pytest.approx(read, rel=1e-5)


def test_shares_of_states_are_those_of_all_states():
    """mHC at initialisation: each write adds b_m y to stream m, after the streams were mixed."""
    scheme = make("hc_static", streams=2)
    toy = toys.cast(toys.toy(make("plain"), "am"), jnp.float32)
    mix = scheme.init(2, 8)
    record = toys.run(scheme, "am", toy._replace(mix=mix._asdict()), record=True).record
    found, state = shares(scheme, mix, record), np.stack([np.asarray(record.outputs[0])] * 2)
    for l, step in enumerate(record.steps):
        y = np.asarray(record.outputs[l + 1])
        assert found.added[l] == pytest.approx(rms(y) / rms(state), rel=1e-5)
        state = np.einsum("mnbtg,nbtd->mbtd", np.broadcast_to(step.carry, (2, 2, 1, 1, 1)), state)
        state = state + np.asarray(step.write) * y
        assert found.stream[l] == pytest.approx(rms(state), rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "block", "mhc"])
def test_loss_without_a_sublayer_is_that_with_its_last_matrix_zero(name):
    """A sublayer's output is linear in its last matrix: no output, the same loss as without it."""
    config = ModelConfig(**SIZES, residual=name, block_size=3)
    model = Transformer(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (3, 9), 0, 19)

    @jax.jit
    def loss(model):
        whole = model(tokens[:, :-1]).logits
        return optax.softmax_cross_entropy_with_integer_labels(whole, tokens[:, 1:]).mean()

    found = jax.jit(without_each)(model, tokens)
    assert found.shape == (5,)
    assert len(set(np.asarray(found).tolist())) == 5
    last = {"a": model.layers["a"].out.kernel, "m": model.layers["m"].down.kernel}
    for l, kind in enumerate(f" {config.kinds}"):
        kernels = {k: kernel[...] for k, kernel in last.items()}
        if l:
            last[kind][...] = kernels[kind].at[(l - 1) // 2].set(0)
        assert found[l] == pytest.approx(float(loss(model)), abs=2e-6)
        for k, kernel in kernels.items():
            last[k][...] = kernel


LOSSES = {"plain": 2.5, "block": 2.4, "full": 2.39, "mhc": 2.47, "window": 2.6, "full_static": 2.3}


def experiment(losses=LOSSES, seeds=(0, 1, 2)):
    """Made-up runs of four blocks, whose seeds are apart by a tenth and pairs by thousandths."""
    rng = np.random.default_rng(0)
    made = []
    for name, loss in losses.items():
        for seed in seeds:
            one = run(name, seed, loss + seed / 10 + 0.002 * rng.normal(), blocks=4)
            late = {"step": 20, "gradient_norm": [0.1 + 0.01 * n for n in range(8)]}
            made.append(one._replace(depth=[{"step": 5, "gradient_norm": [9.0] * 8}, late]))
    return made


def looks(made):
    look = evidence.Look(
        Shares(np.arange(1.0, 9), np.array([np.nan, *np.full(7, 0.5)]), np.full(8, 0.25)),
        np.array([2.0, *np.linspace(2.1, 2.8, 8)]),
    )
    return {one.name: look for one in made}


def test_pages(tmp_path):
    made = experiment()
    pages.report(made, looks(made), Made("make evidence", "2 CPU cores", "today", "abc"), tmp_path)
    text = {path.stem: path.read_text() for path in tmp_path.glob("*.md")}
    assert set(text) == {"README", "schemes", "dynamics", "ablations", "weights", "skipping"}
    for name, page in text.items():
        assert (
            "`make evidence`; read on 2 CPU cores, today, page of commit abc. 6 rows, seeds 0, 1, 2: 4 tra"
            in page
        )
        assert "**Not shown**" in page or name == "README"
        assert f"({name}.md)" in text["README"] or name == "README"
        drawn = re.findall(r"!\[.*\]\((.*)\)", page)
        assert all((tmp_path / file).stat().st_size > 5000 for file in drawn)
    assert re.search(
        r"block S=4 is below plain by 0\.10\d\d ± 0\.00\d\d bits/byte \(lower in 3 of", text["schemes"]
    )
    claim = next(line for line in text["schemes"].splitlines() if line.startswith("| full - block S=4 |"))
    assert claim.split("|")[2].strip() == "-0.009"
    assert claim.split("|")[-2].strip() == figures.AGREES
    # window above plain and full_static below full: contrary to the paper.
    assert "Of 15 pairs of 6 rows" in text["ablations"]
    assert "plain above full_static" not in text["ablations"]
    assert "contrary to it" in text["ablations"]
    assert re.search(r"Contrary, in loss: .*full above full_static", text["ablations"])
    assert "| plain | 1.00 ± 0.00 | 8.00 ± 0.00 | 8.00 ± 0.00 | 7.00 ± 0.00 |" in text["dynamics"]
    assert "8.00 at its largest and rises after every sublayer" in text["dynamics"]
    assert "rises, in the median over sublayers, by plain 0.450" in text["skipping"]
    assert re.search(r"full gives its newest source \d\.\d{3} \([+-]\d\.\d{3} ± ", text["weights"])


def test_weights_beside_an_equal_share():
    """By seed: 12.7 standard errors of two differences are 0.254."""
    found = [evidence.Structure(0.30, 0.2, 0.1, 0.25), evidence.Structure(0.34, 0.2, 0.1, 0.25)]
    assert pages._excess(found, 0, 3) == "+0.070 ± 0.254"
    assert pages._excess(found[:1], 2, 1) == "-0.100"


def test_gradients_are_those_of_the_second_half():
    one = experiment()[0]
    np.testing.assert_allclose(evidence.gradients(one), [0.1 + 0.01 * n for n in range(8)])
    found = evidence.dynamics(one, looks([one])[one.name])
    assert found.stream_first == 1
    assert found.stream_largest == 8
    assert found.gradient_largest_over_smallest == pytest.approx(1.7)
    assert found.output_first_quarter == pytest.approx(np.linspace(1, 2, 8)[:2].mean())


def test_structure_of_full_by_hand():
    """Reads 3 and 4 of four: [0.5, 0.2, 0.3] and [0.1, 0.2, 0.3, 0.4]."""
    one = run("full", blocks=2)
    weights = np.zeros((5, 5))
    weights[2, :3], weights[3, :4] = [0.5, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]
    found = evidence.structure(one._replace(statistics=one.statistics._replace(weights=weights)))
    assert found.newest_source == pytest.approx(0.35)
    assert found.embedding_before_attention == 0.5
    assert found.embedding_before_MLP == 0.1
    assert found.all_alike == pytest.approx((1 / 3 + 1 / 4) / 2)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (experiment({"plain": 2.5}), "two rows or more"),
        (experiment(seeds=(0,)), "the same two seeds or more"),
        ([*experiment({"plain": 2.5, "full": 2.4}), run("plain", 7, blocks=4)], "the same two seeds"),
        (experiment({"block": 2.5, "full": 2.4}), "needs the plain residual beside block, full"),
        (experiment({"plain": 2.5, "rezero": 2.4}), "rezero is no row of Table 4: plain, denseformer"),
    ],
)
def test_runs_that_make_no_experiment(made, message):
    with pytest.raises(compare.NotComparable, match=message):
        evidence.rows(made)


def test_fates():
    """The paper has Full below Block by 0.009."""
    for values, fate in (
        ([-0.20, -0.21, -0.19], figures.AGREES),
        ([0.20, 0.21, 0.19], figures.CONTRARY),
        ([-0.20, 0.10, -0.21], figures.UNRESOLVED),
    ):
        made = [run("full", seed, 2.5 + change) for seed, change in enumerate(values)]
        table = evidence.rows([*made, *(run(name, seed) for name in ("plain", "block") for seed in range(3))])
        assert table.fate("full", "block") == fate
        assert table.difference("full", "block").mean == pytest.approx(np.mean(values))


def test_every_row_of_table_4_is_a_scheme_with_a_number():
    assert sorted(TABLE4) == sorted(row["residual"] for row in sweeps.TABLE4.values())


def test_matrices_are_coloured_up_to_one_or_to_what_their_title_says():
    """An entry of 12.7 leaves the others their colours and its panel legible; none above the diagonal."""
    small, large = np.tri(4) / 4, np.tri(4) + np.triu(np.full((4, 4), 99.0), 1)
    for entry, lowest in ((12.7, 0), (-12.7, -1)):
        large[3, 1] = entry
        figure = heatmaps.depth_matrices({"full": small, "denseformer": large}, "a token")
        norms = [axes.images[0].norm for axes in figure.axes[:2]]
        assert [(norm.vmin, norm.vmax) for norm in norms] == [(lowest, 1), (12.7 * lowest, 12.7)]
        assert [axes.get_title() for axes in figure.axes[:2]] == ["full", "denseformer, scale x 12.7"]
        bar = figure.axes[-1]
        assert bar.get_ylim() == (lowest, 1)
        assert bar.get_ylabel() == "weight, over its panel's scale where it has one"
        assert "0.25" in [label.get_text() for label in bar.get_yticklabels()]
        assert not list(untidy(figure))
    assert norms[0](0.0) == pytest.approx(0.5)
    within = heatmaps.depth_matrices({"plain": np.tri(4) * (1 + 1e-6)}, "a token").axes
    assert (within[0].get_title(), within[0].images[0].norm.vmax) == ("plain", 1)
    assert within[-1].get_ylabel() == "weight"


def test_many_matrices_stand_in_rows():
    names = list(SCHEMES)[:6]
    figure = heatmaps.depth_matrices(dict.fromkeys(names, np.tri(25)), "a token")
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in panels] == names
    assert len({round(axes.get_position().y0, 3) for axes in panels}) == 2
    assert not list(untidy(figure))


def test_figures_of_evidence_are_legible():
    names = list(TABLE4)
    gains = [figures.Gain(name, [-0.1, -0.12, -0.11], 0.02, -0.02) for name in names]
    assert not list(untidy(figures.differences(gains, "to plain (bits / byte)", "paper (nats / token)")))
    pairs = {(i, j): figures.AGREES for i in range(12) for j in range(i)}
    assert not list(untidy(figures.orders(names, np.zeros((12, 12)), pairs)))
    lines = [figures.Series(name, range(1, 25), np.linspace(0.5, 3, 24).tolist()) for name in pages.MAIN]
    figure = figures.by_depth([figures.Panel("a", "RMS", lines), figures.Panel("b", "ratio", lines)], 4)
    assert not list(untidy(figure))
    assert [line.get_xdata()[0] for line in figure.axes[0].lines[:5]] == [4.5, 8.5, 12.5, 16.5, 20.5]


@pytest.mark.slow
def test_evidence_in_miniature(tmp_path):
    """Two rows, two seeds, twelve updates, by the command of `make evidence`; then pages once more."""
    keys = cluster.TINY | {"train.steps": 12, "train.depth_every": 6, "train.eval_every": 12}
    keys = {key: value for key, value in keys.items() if key != "block_size"}
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    code = (
        "import sys; from attnres_jax.configs import sweeps; from attnres_jax.__main__ import main\n"
        "rows = {name: sweeps.TABLE4[name] for name in ('baseline', 'block-s4')}\n"
        "sweeps.SWEEPS['table4'] = sweeps.SWEEPS['table4']._replace(common={}, rows=rows)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "sweep", "table4", "--config=evidence", f"--out={tmp_path}"]
    words += ["--seeds=2", "--jobs=2", *overrides]
    subprocess.run(words, env=cluster.environment(), cwd=cluster.ROOT, check=True)
    text = (tmp_path / "README.md").read_text()
    assert "2 rows, seeds 0, 1: 2 transformer blocks (4 sublayers) of width 16" in text
    assert "block S=4" in (tmp_path / "schemes.md").read_text()
    plain = json.loads((tmp_path / "comparison.json").read_text())["rows"][0]
    mean = re.search(r"\| plain \| 1\.766 \| (\S+) ±", (tmp_path / "ablations.md").read_text())
    assert mean
    assert float(mean[1]) == pytest.approx(plain["bits_per_byte"]["mean"], abs=1e-4)
    (tmp_path / "README.md").unlink()
    subprocess.run(words, env=cluster.environment(), cwd=cluster.ROOT, check=True)  # nothing to train
    assert (tmp_path / "README.md").read_text() == text
