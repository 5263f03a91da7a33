"""The pipeline's timetable: who runs what when, and what each hop must carry, against brute force."""

import itertools

import numpy as np
import pytest

from attnres_jax.parallel.timetable import Chunks, Timetable, sent, text
from attnres_jax.schedule import BlockSchedule

SIZES = [
    (2, 1, 8),
    (2, 2, 8),
    (3, 2, 6),
    (4, 1, 16),
    (4, 2, 16),
    (4, 4, 16),
    (8, 2, 32),
    (8, 4, 32),
    (4, 3, 4),
]


def runs(table, entries):
    """(microbatch, chunk) -> tick."""
    found = {}
    for tick, stage in np.ndindex(*entries.shape[:2]):
        microbatch, virtual = entries[tick, stage]
        if microbatch >= 0:
            key = int(microbatch), int(virtual * table.stages + stage)
            assert key not in found
            found[key] = tick
    return found


@pytest.mark.parametrize("size", SIZES)
def test_order(size):
    """Every chunk of every microbatch once each way, one tick after what it needs, however deep."""
    table = Timetable(*size)
    last = table.stages * table.virtual_stages - 1
    forward, backward = runs(table, table.forward), runs(table, table.backward)
    everything = set(itertools.product(range(table.microbatches), range(last + 1)))
    assert set(forward) == set(backward) == everything
    for m, c in everything:
        assert c == 0 or forward[m, c] == forward[m, c - 1] + 1
        assert c == last or backward[m, c] == backward[m, c + 1] + 1
    assert all(forward[m, last] == backward[m, last] for m in range(table.microbatches))


@pytest.mark.parametrize("size", SIZES)
def test_phases_say_where_both_run(size):
    table = Timetable(*size)
    ahead, both, behind = table.phases
    runs_forward, runs_backward = (
        (entries[..., 0] >= 0).any(1) for entries in (table.forward, table.backward)
    )
    ticks = np.arange(ahead + both + behind)
    np.testing.assert_array_equal(runs_forward, ticks < ahead + both)
    np.testing.assert_array_equal(runs_backward, ticks >= ahead)


@pytest.mark.parametrize("size", SIZES)
def test_slots_are_enough_and_one_less_is_not(size):
    """A slot is free again after its microbatch's last backward chunk; m takes slot m mod slots."""
    table = Timetable(*size)
    forward, backward = runs(table, table.forward), runs(table, table.backward)

    def fits(slots):
        pairs = itertools.product(range(table.stages), range(table.microbatches - slots))
        return all(forward[m + slots, stage] > backward[m, stage] for stage, m in pairs)

    assert fits(table.slots)
    needed = table.slots - (table.virtual_stages == 1)  # without virtual stages 2 P - 1 would do
    assert needed == table.microbatches or not fits(needed - 1)


@pytest.mark.parametrize("size", [size for size in SIZES if size[2] >= 2 * size[0]])
def test_peak_and_bubble(size):
    """P V + P - 1 chunks, Megatron's number for V > 1; the bubble is (P - 1) / (M V)."""
    P, V, M = size
    table = Timetable(*size)
    assert table.peak_chunks == P * V + P - 1
    assert table.bubble() == pytest.approx((P - 1) / (M * V))
    assert table.bubble(3.5) == pytest.approx((P - 1) / (M * V))


GRID = [
    (stages, virtual, sublayers, size)
    for stages, virtual in itertools.product((2, 3, 4, 8), (1, 2, 4))
    for sublayers, size in ((2 * 32, 1), (2 * 32, 2), (2 * 32, 6), (2 * 32, 16), (2 * 33, 7), (2 * 48, 64))
]
# 27 and 93 transformer blocks.
GRID += [
    (stages, virtual, *depth)
    for stages, virtual, depth in itertools.product((4, 8, 16), (1, 2), ((54, 6), (186, 12), (186, 24)))
    if depth[0] // 2 >= stages * virtual
]


def stores(chunks):
    """Brute force: for each chunk, the outputs that each block number stands for on its stage, as sent.

    A store maps a block to the outputs summed in it. A chunk adds its own; a hop copies the sender's blocks.
    """
    sources = BlockSchedule(chunks.sublayers, chunks.block_size)
    block = [1 + l // sources.block_size for l in range(chunks.sublayers)]
    held = [{} for _ in range(chunks.stages)]
    for c in range(chunks.count):
        mine = held[c % chunks.stages]
        if c:
            hop, theirs = chunks.hops[c - 1], held[(c - 1) % chunks.stages]
            mine |= {k: set(theirs[k]) for k in range(hop.first, hop.last + 1)}
        yield c, {k: set(v) for k, v in mine.items()}
        for l in range(chunks.bounds[c], chunks.bounds[c + 1]):
            mine.setdefault(block[l], set()).add(l)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_a_chunk_has_all_that_was_made_before_it(case):
    P, V, L, S = case
    chunks = Chunks(L, S, P, V)
    for c, held in stores(chunks):
        made = {}
        for l in range(chunks.bounds[c]):
            made.setdefault(1 + l // S, set()).add(l)
        assert held == made


@pytest.mark.parametrize("case", GRID, ids=str)
def test_nothing_is_sent_twice(case):
    """Each message is all new to its receiver, and what leaves early is complete by then."""
    P, V, L, S = case
    chunks = Chunks(L, S, P, V)
    before = {}
    for c, held in stores(chunks):
        if c:
            hop = chunks.hops[c - 1]
            had = before.get(c % P, {})
            assert all(had.get(k) != held[k] for k in range(hop.first, hop.last + 1))
            assert all(max(held[k]) < chunks.bounds[c - 1] for k in range(hop.first, hop.fresh))
        before[c % P] = held | _own(chunks, c, held)


def _own(chunks, c, held):
    found = {k: set(v) for k, v in held.items()}
    for l in range(chunks.bounds[c], chunks.bounds[c + 1]):
        found.setdefault(1 + l // chunks.block_size, set()).add(l)
    return found


@pytest.mark.parametrize(("stages", "virtual"), [*itertools.product((2, 4, 8), (1, 2, 4))])
@pytest.mark.parametrize("per_chunk", [1, 2])
def test_a_hop_carries_what_p_minus_1_chunks_made(stages, virtual, per_chunk):
    """(P - 1) N_p for whole N_p, and P (P - 1) (V - 1/2) N_p in all: less than the paper's formula by
    (V - 1) P N_p."""
    chunks = Chunks(4 * stages * virtual, 4 // per_chunk, stages, virtual)
    found = sent(chunks)
    assert chunks.window == found.longest == (stages - 1) * per_chunk
    assert found.needed == stages * (stages - 1) * (virtual - 0.5) * per_chunk
    assert found.cached - found.needed == (virtual - 1) * stages * per_chunk
    assert found.naive == chunks.count * (chunks.count - 1) / 2 * per_chunk
    assert (chunks.conveyor, chunks.written) == ((stages - 2) * per_chunk, per_chunk)


def test_example_of_the_paper():
    """P = 4, V = 2, one block a chunk: the second virtual stage resends none of the first's."""
    chunks = Chunks(16, 2, 4, 2)
    assert [(hop.first, hop.last) for hop in chunks.hops] == [
        *((1, 1), (1, 2), (1, 3)),
        *((2, 4), (3, 5), (4, 6), (5, 7)),
    ]


def test_uneven_depth():
    """27 transformer blocks over 4 stages: none is parted, sizes differ by one, all run."""
    chunks = Chunks(54, 6, 4, 1)
    sizes = np.diff(chunks.bounds)
    assert chunks.bounds[-1] == 54
    assert set(sizes) == {12, 14}


def test_drawn():
    lines = text(Timetable(2, 2, 4)).splitlines()
    assert len(lines) == 12
    assert lines[3].split(" | ")[1:] == ["F m1 c2        ", "F m0 c3 B m0 c3"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Chunks(8, 2, 1, 1), "at least 2 stages"),
        (lambda: Chunks(9, 2, 2, 1), "not whole groups of 2"),
        (lambda: Chunks(8, 2, 4, 2), "4 transformer blocks cannot fill 8 chunks"),
        (lambda: Chunks(8, 9, 2, 1).complete, "block_size counts sublayers"),
        (lambda: Timetable(4, 1, 6), "multiple of it, got 6"),
    ],
)
def test_errors(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("case", GRID, ids=str)
def test_segments_are_the_chunks(case):
    """Each chunk's segments are its sublayers in order, no block begins or ends inside one; their numbers are
    the schedule's."""
    P, V, L, S = case
    chunks = Chunks(L, S, P, V)
    for c in range(chunks.count):
        at, to = chunks.bounds[c : c + 2]
        run = [s for s in chunks.segments if s.runs[c]]
        assert [l for s in run for l in range(at + s.first, at + s.last)] == [*range(at, to)]
        assert run == [*chunks.segments[: len(run)]]
        for s in run:
            spans = {1 + l // S for l in range(at + s.first, at + s.last)}
            assert spans == {s.block[c]}
            assert s.begins[c] == ((at + s.first) % S == 0)
        for s in chunks.segments[len(run) :]:  # writes nothing, to a row that is there
            assert not s.begins[c]
            assert s.block[c] == run[-1].block[c]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_windows_hold_what_hops_carry(case):
    """And beside it only what the receiver has, or what nobody has begun; rows are as many as there are."""
    P, V, L, S = case
    chunks = Chunks(L, S, P, V)
    cache, complete, begun = chunks.cache, chunks.complete, chunks.begun
    assert cache.rows == max(begun[-1] + 1, cache.window, cache.written)
    for c in range(1, chunks.count):
        hop = chunks.hops[c - 1]
        window = range(cache.first[c], cache.first[c] + cache.window)
        early = range(cache.early[c], cache.early[c] + cache.conveyor)
        assert min(window.start, early.start) >= 0
        assert max(window.stop, early.stop) <= cache.rows
        assert {*range(hop.first, hop.last + 1)} <= {*window}
        assert {*range(hop.first, hop.fresh)} <= {*early}
        fresh = range(cache.fresh[c - 1], cache.fresh[c - 1] + cache.written)
        assert {*range(hop.fresh, hop.last + 1)} <= {*fresh}
        assert {*range(complete[c - 1] + 1, begun[c] + 1)} <= {*fresh}
        had = complete[c - P + 1] if c >= P else 0
        for row in {*window, *early, *fresh} - {*range(hop.first, hop.last + 1)}:
            assert row <= had or row > begun[c], (c, row)
