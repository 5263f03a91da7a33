"""Static integers: BlockSchedule and each scheme's sources, against tables and the paper's words."""

import itertools

import numpy as np
import oracle
import pytest

from attnres_jax import residuals
from attnres_jax.schedule import BlockSchedule

SHAPES = [(L, S) for L in (*range(1, 14), 54) for S in (1, 2, 3, 5, 6, L) if S <= L]


def test_paper_example():
    """The 48B model: 54 sublayers in blocks of 6, 10 sources with the embedding."""
    schedule = BlockSchedule(54, 6)
    assert schedule.sizes == (6,) * 9
    assert tuple(schedule.openings) == (0, 6, 12, 18, 24, 30, 36, 42, 48)
    assert schedule.sources.shape == (55, 10, 55)
    assert max(schedule.counts) == 10
    assert schedule.counts[0] == 1
    assert schedule.counts[-1] == 10


def test_by_hand():
    """L = 5 in blocks of 2: reads of v_0; v_0, v_1; v_0, b_1; v_0, b_1, v_3; and so on."""
    schedule = BlockSchedule(5, 2)
    assert schedule.sizes == (2, 2, 1)
    assert tuple(schedule.openings) == (0, 2, 4)
    reads = [
        ["0"],
        ["0", "1"],
        ["0", "12"],
        ["0", "12", "3"],
        ["0", "12", "34"],
        ["0", "12", "34", "5"],
    ]
    assert tuple(schedule.counts) == tuple(map(len, reads))
    for read, row in zip(reads, schedule.sources, strict=True):
        found = ["".join(map(str, np.flatnonzero(source))) for source in row if source.any()]
        assert found == read


@pytest.mark.parametrize(("L", "S"), SHAPES)
def test_against_the_oracle(L, S):
    np.testing.assert_array_equal(BlockSchedule(L, S).sources, oracle.block_sources(L, S))
    np.testing.assert_array_equal(
        residuals.make("block", block_size=S).sources(L), oracle.block_sources(L, S)
    )


@pytest.mark.parametrize("L", [1, 2, 7])
def test_full_and_plain_sources(L):
    np.testing.assert_array_equal(residuals.make("full").sources(L), oracle.full_sources(L))
    np.testing.assert_array_equal(residuals.make("plain").sources(L), oracle.plain_sources(L))


@pytest.mark.parametrize(("L", "S"), SHAPES)
def test_sources_partition_what_exists(L, S):
    """Every output that exists at a read is in exactly one source, no later one in any."""
    schedule = BlockSchedule(L, S)
    assert sum(schedule.sizes) == L
    assert set(schedule.sizes[:-1]) <= {S}
    assert tuple(schedule.openings) == tuple(itertools.accumulate((0, *schedule.sizes[:-1])))
    members = schedule.sources.sum(axis=1)
    np.testing.assert_array_equal(members, np.tri(L + 1))
    np.testing.assert_array_equal(schedule.counts, schedule.sources.any(axis=2).sum(axis=1))


@pytest.mark.parametrize(
    ("L", "S", "named"),
    [(0, 1, "sublayers"), (4, 0, "block_size"), (4, -2, "block_size"), (4, 5, "block_size")],
)
def test_impossible_sizes(L, S, named):
    with pytest.raises(ValueError, match=rf"{named}.*{S if L else L}"):
        BlockSchedule(L, S)


def test_unknown_scheme():
    with pytest.raises(ValueError, match="block"):
        residuals.make("blok")


def test_schemes_are_values():
    """Static arguments of jit: equal when made alike, hashable, and not equal otherwise."""
    assert residuals.make("block", block_size=3) == residuals.make("block", block_size=3)
    assert len({residuals.make("block", block_size=size) for size in (3, 3, 4)}) == 2
    assert set(residuals.SCHEMES) >= {"plain", "full", "block"}
