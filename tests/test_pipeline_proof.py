"""The committed proof: its pages are its rows, and none of them is wrong."""

from pathlib import Path

import pipeline_proof as proof
import pytest

FOLDER = Path(__file__).parents[1] / "docs/results/pipeline"


def test_the_grid_is_whole_and_right():
    rows = proof.kept(FOLDER / "proof.jsonl")
    assert {*rows} == {cell for cell in proof.grid() if not cell.impossible}
    assert [cell.name for cell, row in rows.items() if proof.wrong(cell, row)] == []


def test_the_pages_are_the_rows(tmp_path):
    """But for the machine that wrote them."""
    proof.pages(proof.kept(FOLDER / "proof.jsonl"), tmp_path)
    for page in ("proof.md", "bytes.md"):
        ours, committed = ((folder / page).read_text().split("\n\n", 2)[2] for folder in (tmp_path, FOLDER))
        assert ours == committed


@pytest.mark.parametrize("field", ["worst", "worst_fp64", "loss_off", "forward", "backward"])
def test_a_wrong_row_is_seen(field):
    cell, row = next(iter(proof.kept(FOLDER / "proof.jsonl").items()))
    assert not proof.wrong(cell, row)
    assert proof.wrong(cell, row | {field: row[field] + 1})
