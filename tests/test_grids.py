"""The pages of the sweeps over S and over depth and width, from made-up evaluations."""

import numpy as np
import pytest
from test_analysis import run
from test_figures import untidy

from attnres_jax import configs
from attnres_jax.analysis import figures, grids
from attnres_jax.analysis.made import Made
from attnres_jax.configs import sweeps

MADE = Made("the command", "2 CPU cores", "today", "abc")


def finished(name, bits, seeds=1, rows=()):
    """Runs of a sweep; `bits` of (scheme, S, D / L_b) plus a hundredth for each seed."""
    made, sweep = [], sweeps.SWEEPS[name]
    for member in sweeps.members(sweep.only(rows) if rows else sweep, "quick", seeds=seeds):
        flat = configs.to_flat(member.config)
        loss = bits(flat["residual"], flat["block_size"], flat["model.width"] / flat["model.blocks"])
        made.append(run("plain", 0, loss + 0.01 * flat["seed"])._replace(name=member.name, config=flat))
    return [one._replace(kinds="am" * one.config["model.blocks"]) for one in made]


def page(name, made, out, monkeypatch):
    """README.md and the figure that it shows."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append((figure, path.name)))
    grids.report(name, made, MADE, out)
    text = (out / "README.md").read_text()
    assert f"({drawn[0][1]})" in text
    assert "`the command`; read on 2 CPU cores, today, page of commit abc. " in text
    assert not list(untidy(drawn[0][0]))
    return text, drawn[0][0]


def test_loss_against_block_size(tmp_path, monkeypatch):
    made = finished("block_size", lambda name, size, _: 2.6 if name == "plain" else 2.5 + size / 1000, 3)
    text, figure = page("block_size", made, tmp_path, monkeypatch)
    assert "7 rows, seeds 0, 1, 2. All runs" in text
    assert "no more than seeds do (3 here); another text than austen; another size than 12,345 param" in text
    assert f"for each shape: all have {made[0].config['optim.lr']:g}." in text
    assert "| 16 | 2 | 3 | 2.5260 ± 0.0100 | 1.753 |" in text
    assert "| plain |  | 3 | 2.6100 ± 0.0100 | 1.766 |" in text
    axes = figure.axes[0]
    mean = next(line for line in axes.lines if len(line.get_xdata()) == 6 and line.get_linestyle() == "-")
    sizes = [1, 2, 4, 8, 16, 32]
    np.testing.assert_allclose(mean.get_xydata(), [(size, 2.51 + size / 1000) for size in sizes])
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "held-out loss (bits / byte)"
    named = [label.get_text() for label in axes.get_xticklabels()]
    assert named == ["1\nFull", "2", "4", "8", "16", "32\none block"]
    level = [line for line in axes.lines if line.get_label() == "plain"]
    np.testing.assert_allclose(level[0].get_ydata(), 2.61)


def test_some_sizes_of_one_seed(tmp_path, monkeypatch):
    made = finished("block_size", lambda _, size, __: 2.5 + size / 1000, rows=("s4", "s2"))
    text, figure = page("block_size", made, tmp_path, monkeypatch)
    assert "| 2 | 16 | 1 | 2.5020 | 1.746 |" in text
    assert "plain" not in text
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["block"]


def test_depth_against_width(tmp_path, monkeypatch):
    """Widths apart by a tenth: every number stands in its cell, the lowest is framed."""

    def bits(name, _, ratio):
        return (2.6 if name == "plain" else 2.5) + abs(np.log2(ratio / 8)) / 10

    made = finished("depth_width", bits)
    text, figure = page("depth_width", made, tmp_path, monkeypatch)
    rates = [one.config["optim.lr"] for one in made]
    assert "over 1 seed: plain at D/L_b = 8, H/L_b = 0.25; block at D/L_b = 8, H/L_b = 0.25." in text
    assert f"for each shape: it goes by the width, {min(rates):g} to {max(rates):g}." in text
    assert "| 8 | 0.25 | 8 | 64 | 2 | 188 | 2.6000 | 2.5000 |" in text
    for axes, (name, low) in zip(figure.axes[:2], (("plain", 2.6), ("block", 2.5)), strict=True):
        assert axes.get_title() == name
        assert axes.get_xlabel() == "H / L_b (heads per transformer block)"
        table = np.asarray(axes.images[0].get_array())
        for at, cell in enumerate(sweeps.CELLS.values()):
            assert table.ravel()[at] == pytest.approx(bits(name, 4, cell.width / cell.blocks))
        texts = [text.get_text() for text in axes.texts]
        assert texts == [f"{loss:.3f}" for loss in table.ravel()]
        assert axes.patches[0].get_y() == pytest.approx(0.53)
        assert table.min() == pytest.approx(low)
    assert figure.axes[0].get_ylabel() == "D / L_b (channels per transformer block)"
    assert figure.axes[-1].get_ylabel() == "held-out loss (bits / byte), best framed"


def test_cells_that_were_not_run_are_blank(tmp_path, monkeypatch):
    made = finished("depth_width", lambda *_: 2.5, 2, ("plain-w8-h0.5", "plain-w4-h0.25"))
    text, figure = page("depth_width", made, tmp_path, monkeypatch)
    assert text.count("| 2.5050 |") == 2
    assert "over 2 seeds: " in text
    assert len(figure.axes) == 2  # one scheme and the scale
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text()] == ["2.505"] * 2


def test_every_page_that_a_sweep_names_exists():
    named = {sweep.page for sweep in sweeps.SWEEPS.values()} - {""}
    assert named == set(grids.PAGES)
