"""What travels in a compiled step and what hides it, of a program small enough to count by hand."""

from pathlib import Path

import pytest

from attnres_jax.bench import collectives, hlo
from attnres_jax.bench.cost import Chip

CHIP, CLOCK = Chip(1e12, 1e12), 1e6  # a cycle is a microsecond
ROW = 16 * 128 * 2  # bytes of a row, bf16[16,128]
TEXT = (Path(__file__).parent / "golden/collectives.hlo").read_text()


@pytest.fixture(scope="module")
def step():
    return collectives.schedule(hlo.parse(TEXT), {}, CHIP, CLOCK)


def test_every_collective_as_by_hand(step):
    """(kind, bytes received in a run, runs, microseconds of compute while it travels)."""
    found = [(c.kind, c.received, c.times, round(c.hidden * 1e6)) for c in step.collectives]
    assert {round(c.around * 1e6) for c in step.collectives if c.times == 5} == {87}
    assert found == [
        ("collective-permute", ROW, 5, 30),
        ("all-gather", 3 * ROW, 5, 50),  # of four devices: three rows of others
        ("all-reduce", 2 * ROW * 7 / 8, 5, 0),
        ("collective-permute", ROW, 5, 7),  # ends in the loop's next round
        ("collective-permute", ROW, 1, 0),  # a start and a done with nothing between
        ("reduce-scatter", 3 * ROW / 4, 1, 0),
    ]


def test_compute_is_the_compiler_s_cycles(step):
    """Five rounds of 87, and a copy by its bytes."""
    assert step.seconds == pytest.approx(5 * 87e-6 + 2 * ROW / CHIP.bytes_per_second)


def test_totals(step):
    """Most bytes first; what is needed of the links counts only what can hide."""
    found = {total.kind: total for total in collectives.totals(step.collectives)}
    assert list(found) == ["all-gather", "collective-permute", "all-reduce", "reduce-scatter"]
    assert found["all-gather"][1:4] == (5, 15 * ROW, 0)
    assert found["all-gather"].needed == pytest.approx(3 * ROW / 50e-6)
    assert found["collective-permute"][1:4] == (11, 11 * ROW, ROW)
    assert found["collective-permute"].needed == pytest.approx(10 * ROW / (5 * 37e-6))
    # What hides: 30 and 7 microseconds a round, a row each; the second is the harder.
    assert found["collective-permute"].hidden == pytest.approx(5 * 37e-6)
    assert found["collective-permute"].hardest == pytest.approx(ROW / 7e-6)
    assert found["all-gather"].hardest == pytest.approx(found["all-gather"].needed)
    assert (found["all-reduce"].hidden, found["all-reduce"].hardest) == (0, 0)
    assert found["all-reduce"].exposed == found["all-reduce"].bytes
    assert found["all-reduce"].needed == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=16] {'axis_0'}", 16),
        ("replica_groups=mesh['stage'=1,'data'=2,'fsdp'=4,'tensor'=2] {'data','tensor'}", 4),
        ("channel_id=1", 1),
    ],
)
def test_groups(text, size):
    assert collectives.group(text) == size
