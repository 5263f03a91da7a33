"""What a compiled pipeline sends and keeps: the units of the timetable, and no more the more microbatches."""

import re
from collections import Counter
from functools import cache
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toys
import wire
from test_pipeline import LENGTH, ROWS, SMALL, VOCAB, config_of

from attnres_jax.parallel.timetable import Chunks, Timetable
from attnres_jax.train import step

WIDTH = SMALL["model.width"]
# P, V, M, transformer blocks; sublayers in an AttnRes block; units per hop forward, backward; of the history
# at the longest hop. With three stages the two rings are different pairs.
CELLS = {
    "N_p 1": ((3, 2, 6, 6), 2, (2, 2), 5),
    "N_p 2": ((3, 2, 6, 6), 1, (4, 4), 10),
    "N_p 1/2": ((4, 2, 8, 8), 4, (2, 2), 4),
    "N_p 1/4": ((8, 1, 8, 8), 8, (2, 2), 2),
    # A row more forward than back: the most that leaves early and the most that is fresh are of two hops.
    "uneven": ((3, 2, 6, 7), 4, (3, 2), 3),
}
FAST = {"N_p 1"}


def compiled(size, residual="block", block_size=2, mesh=()):
    """The train step, and what it says of itself."""
    return _compiled(size, residual, block_size, mesh)


@cache
def _compiled(size, residual, block_size, mesh):
    run, program = update(config_of(size, residual, block_size, dict(mesh)))
    at = dict(zip(run.mesh.axis_names, np.indices(run.mesh.devices.shape), strict=True))
    return SimpleNamespace(
        stage=at["stage"].ravel(),
        rows=(at["data"] * run.mesh.shape["fsdp"] + at["fsdp"]).ravel(),
        messages=wire.messages(program.as_text(), run.mesh.devices.size),
    )


def update(config, **options):
    """The programs of a train step, and its update compiled."""
    run = step.programs(config, VOCAB, jax.devices()[: np.prod([*config.mesh.values()])])
    tokens = jax.ShapeDtypeStruct((config.data.batch, config.data.length + 1), np.int32, sharding=run.place)
    return run, run.update.lower(run.like, tokens).compile(toys.QUICK | options)


def hops(found):
    return wire.hops(found.messages, found.stage, ROWS * LENGTH * WIDTH)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CELLS]
)
def test_units_per_hop(name):
    """Those of the timetable in every tick, forward and backward: (P - 1) N_p where N_p is whole."""
    size, block_size, (forward, backward), history = CELLS[name]
    P, V, M, blocks = size
    chunks = Chunks(2 * blocks, block_size, P, V)
    listed = chunks.cache
    assert (listed.conveyor + listed.written, listed.window) == (forward, backward)
    found = hops(compiled(size, block_size=block_size))
    assert found.ticks == Timetable(P, V, M).phases
    assert found.units == (forward, forward + backward, backward)
    assert max(chunks.begun[1:-1]) == history
    assert backward <= forward <= history
    if V > 1 and chunks.begun == chunks.complete:
        assert forward < history


def test_each_way_has_its_ring():
    """Forward to the next stage, cotangents to the one before; no pair beside these."""
    found = compiled(CELLS["N_p 1"][0])
    ahead = {(p, (p + 1) % 3) for p in range(3)}
    ways = {frozenset(m.groups): 0 for m in found.messages if m.opcode == "collective-permute"}
    for m in found.messages:
        if m.opcode == "collective-permute":
            ways[frozenset(m.groups)] += m.loops[0] * m.elements
    ticks, unit = hops(found).ticks, ROWS * LENGTH * WIDTH
    assert ways == {
        frozenset(ahead): 2 * unit * (ticks[0] + ticks[1]),
        frozenset((b, a) for a, b in ahead): 2 * unit * (ticks[1] + ticks[2]),
    }


def test_nothing_else_goes_over_stage_in_a_tick():
    """But for the head: the last activation and its cotangent, one maximum and two sums of [B,T]."""
    found = compiled(CELLS["N_p 1"][0])
    others = [m for m in found.messages if m.opcode != "collective-permute" and m.crosses(found.stage)]
    inside = [m for m in others if m.loops]
    phases = {m.place: Counter() for m in inside}
    for m in inside:
        assert m.opcode == "all-reduce", m
        phases[m.place].update(shape.dims for shape in m.shapes)
    head = {(ROWS, LENGTH, WIDTH): 2, (ROWS, LENGTH): 3}
    assert [*phases.values()] == [head, head]
    assert len(others) > len(inside)  # once a step: the sums of what every stage has


@pytest.mark.slow
@pytest.mark.parametrize(("residual", "streams"), [("plain", 1), ("mhc", 4)])
def test_a_history_that_is_one_unit_is_sent_whole(residual, streams):
    """The stream, or all of several, goes from stage to stage and around, the cotangents back."""
    found = hops(compiled((3, 2, 6, 6), residual))
    assert found.ticks == Timetable(3, 2, 6).phases
    assert found.units == (streams, 2 * streams, streams)


def memory(folder, M, residual, block_size):
    """Bytes of a step: of the heap of temporaries, with its holes; and live at the peak, arguments too."""
    config = config_of((2, 2, M, 4), residual, block_size, data__length=31)
    _, program = update(config, xla_dump_to=str(folder), xla_dump_hlo_as_text=True)
    (report,) = folder.glob("*.cpu_after_optimizations-live-range.txt")
    live = re.search(r"peak usage: ([\d ]+) bytes", report.read_text())[1]
    return program.memory_analysis().temp_size_in_bytes, int(live.replace(" ", ""))


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["plain", "block"])
@pytest.mark.parametrize("block_size", [2, 4], ids=["aligned", "parted"])
def test_memory_is_flat_in_the_microbatches(residual, block_size, tmp_path):
    """For M = 2 P and 8 P the same, but for the tokens: as they are given, and cut into microbatches. Those
    of one are whole units of 64 bytes, which is how buffers are aligned."""
    few, many = (memory(tmp_path / str(M), M, residual, block_size) for M in (4, 16))
    heap, live = np.subtract(many, few)
    tokens = 4 * ROWS * (31 + 1) * (16 - 4)
    assert heap - tokens < 128  # of alignment
    assert 0 <= live - 2 * tokens < 64 * (16 - 4)  # numbers of a tick, of 4 bytes


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_a_tick_is_of_a_device_s_own_rows(axis):
    """stage x data (fsdp) x tensor: within a tick nothing goes between devices that have other rows, neither
    parameters nor gradients; over `tensor` activations of one microbatch are gathered, and no blocks that a
    stage keeps."""
    found = compiled((2, 2, 4, 4), mesh=((axis, 2), ("tensor", 2)))
    inside, after = ([m for m in found.messages if bool(m.loops) is loops] for loops in (True, False))
    assert not any(m.crosses(found.rows) for m in inside)
    assert any(m.crosses(found.rows) for m in after)  # once an update
    gathered = {shape.dims for m in inside if m.opcode == "all-gather" for shape in m.shapes}
    assert gathered <= {(ROWS, LENGTH, WIDTH), (ROWS, LENGTH)}
    unit = ROWS * (LENGTH // 2) * WIDTH  # tokens are cut over `tensor` outside sublayers
    # After the loops the head's gradient may go from stage to stage, to where its parameter lies.
    assert wire.hops(found.messages, found.stage, unit).units[:3] == (1, 2, 1)
