"""Bytes of the residual stream: counts against closed forms, made by hand, and the paper's Table 1."""

from dataclasses import dataclass

import jax.numpy as jnp
import pytest

from attnres_jax import __main__, residuals
from attnres_jax.analysis import inspect, ranks, stream
from attnres_jax.models.transformer import ModelConfig
from attnres_jax.residuals.base import Mix
from attnres_jax.residuals.states import States, Step

L, S, N, M = 16, 4, 4, 4


def moved(name, **options):
    return stream.moved(residuals.make(name, **{"block_size": S, "sublayers": L} | options), L)


def by_hand():
    """(reads, writes) of a whole forward pass: L + 1 kernels, the last of which makes h of the head."""
    ahead = sum(range(1, N))  # summaries that the openings of blocks 2 .. N read: what is just made they have
    # A block: its first kernel writes S results, one of them h, its second has y as the sum: result, y -> h.
    block = (2 + (S - 2) * 3, S + 1 + (S - 2) * 2)
    table = {
        # Stream and y -> stream.
        "plain": (2 * L, L),
        # The first embedding is read, the last h written; the streams come and go.
        **dict.fromkeys(("hc", "mhc", "mhc_lite", "ddl"), (1 + L * (M + 1), L * (M + 1) + 1)),
        "block": (1 + N * block[0] + 2 * (N - 1) + ahead + 2 + N, N * block[1] + (N - 1) + 1),
        # All rows and y, once for each read; h.
        "full": ((L + 1) * (L + 2) / 2, L + 1),
        "denseformer": ((L + 1) * (L + 2) / 2 + L, 2 * L),
    }
    one = ("rezero", "layerscale", "highway", "deepnorm", "keel")  # a state that is h
    return table | dict.fromkeys(one, table["plain"]) | dict.fromkeys(("window", "densenet"), table["full"])


@pytest.mark.parametrize("name", by_hand())
def test_counts_are_those_made_by_hand(name):
    read, written = by_hand()[name]
    assert moved(name) == (read / L, written / L)


def test_two_streams_and_two_sums_cost_more():
    """SiameseNorm: two states, and h is neither. RMS Block: of all but the first and last in a block the
    sum of unit outputs too is read and written; of the last the new summary is that. Delta: h and the sum,
    and h of a block's first read, which in Block is a result of Phase 1."""
    assert moved("siamese").total == pytest.approx(6, abs=2 / L)
    more = moved("rms_block").read - moved("block").read
    assert more == (S - 1 - 1 + 1 - 1) * N / L
    assert moved("delta") == moved("full")
    assert moved("delta_block").total - moved("block").total == pytest.approx(1 + 1 / S, abs=0.2)


@pytest.mark.parametrize(("name", "formula"), [("plain", 3), ("mhc", 34), ("full", 24), ("block", 5.5)])
def test_formulas_of_table_1(name, formula):
    """At the paper's L = 128, S = 16, m = 4."""
    assert stream.table_1(name, 16, 128, 4) == formula
    assert stream.table_1("highway", 16, 128, 4) is None


def test_table_1_counts_otherwise():
    """Plain is equal. Sources read twice and Phase 1's results not written, Block comes to N / S + 5, but for
    what a block's first and last sublayers save. A kernel for each equation of mHC adds 6m."""
    assert moved("plain").total == stream.table_1("plain", S, L, M)
    assert moved("mhc").total + 6 * M == pytest.approx(stream.table_1("mhc", S, L, M), abs=2 / L)
    sources = (1 + sum(range(1, N)) + N) / L
    saved = moved("block").total + sources - 1 - stream.table_1("block", S, L, M)
    assert -4 / S <= saved <= 0


@dataclass(frozen=True)
class Idle(States):
    """Reads a state that it never writes, and keeps one that nobody reads."""

    streams: int = 2

    def init(self, sublayers, width):
        return Mix({"a": jnp.ones((sublayers, width))}, {})

    def move(self, slot, s, y):
        return Step(jnp.eye(2)[..., None, None, None], jnp.ones((2, 1, 1, 1)) * slot["a"])


def test_parameters_and_what_nobody_reads_are_not_counted():
    """A scheme of two states: 5 reads and writes a sublayer beside h; its parameters [L, D] are none."""
    assert stream.moved(Idle(), L).total == pytest.approx(2 * 2 + 1 + 1, abs=3 / L)


def test_inspect_prints_all_schemes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ranks, "measured", lambda scheme: [2, 3])
    words = ["inspect", "--config=quick", "--schemes", f"--out={tmp_path}/b.md", "--config.model.blocks=2"]
    assert __main__.main([*words, "--config.block_size=2"]) == 0
    text, printed = (tmp_path / "b.md").read_text(), capsys.readouterr().out
    assert "| plain | 2.00 | 1.00 | 3.00 | 3 |" in text.splitlines()
    beside = (tmp_path / "ranks.md").read_text()
    assert text.splitlines()[2] == f"{beside.splitlines()[2]} Ranks of M: [ranks](ranks.md)."
    assert "| block | 2, 3 | 6 to 10 |" in beside.splitlines()
    for name in residuals.SCHEMES:
        assert f"| {name} |" in text
        assert f"| {name} | 2, 3 |" in beside
        assert name in printed
    assert __main__.main([*words, "--devices=8"]) == 2


def test_inspect_counts_the_bytes_of_its_scheme():
    config = ModelConfig(17, 4, 8, 2, 2, 8, residual="mhc", dtype="bfloat16")
    assert inspect.residual_bytes(config) == 8 * 2 * stream.moved(config.scheme, 8).total
