"""Static analysis of kernels: cycles of a small schedule, bytes from grids, no row made twice."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnres_jax import __main__
from attnres_jax.bench import bundles, cost, grids, hlo, reads, roofline
from pallas_kernels.depth_mix import tpu as mix

HLO = {"bfloat16": "bf16", "float32": "f32", "int32": "s32"}
SCHEDULE = (Path(__file__).parent / "golden/kernel_final_bundles.txt").read_text()


def test_cycles_of_a_grid_step_by_hand():
    """17 bundles of the grid's loop: 12 of its own, 2 of a loop that runs `unknown` times, 3 of one that runs
    8. Of the 12, two stores are for the first step only; the four behind the branch always run."""
    step = bundles.step(SCHEDULE, unknown=5)
    assert step.cycles == (12 - 2) + 5 * 2 + 8 * 3
    assert step.starting == 2
    assert step.grid == 66
    assert bundles.step(SCHEDULE).cycles == (12 - 2) + 2 + 8 * 3


def test_a_branch_on_anything_else_is_of_every_step():
    """The pipeline skips its body by a condition made beforehand, which is compared with zero too."""
    step = bundles.step(SCHEDULE.replace("%s3_s2 = sphi", "%s3_s2 = scalar_select"))
    assert (step.starting, step.cycles) == (0, 12 + 2 + 8 * 3)


def test_a_predicate_is_not_another_that_begins_like_it():
    step = bundles.step(SCHEDULE.replace("(%p10_p0)", "(%p1_p0)"))
    assert (step.starting, step.cycles) == (0, 12 + 2 + 8 * 3)


def test_the_beginning_of_a_loop_may_bear_no_mark():
    """libtpu, v4: `LB:` without the `>` that the loop's other bundles have."""
    marked, bare = re.subn(r"LB: >> ", "LB:  ", SCHEDULE)
    assert bare == 2
    assert bundles.step(marked, unknown=5) == bundles.step(SCHEDULE, unknown=5)


def test_loops_nest():
    (grid,) = bundles.loops(bundles.read(SCHEDULE))
    assert [(loop.trips, loop.end - loop.first) for loop in grid.inner] == [(None, 2), (8, 3)]


def test_a_schedule_without_a_grid():
    with pytest.raises(ValueError, match="no loop"):
        bundles.step("   0   :  { %1 = vsyncpa 0 }\n")


def test_slots_are_summed_by_unit():
    text = "== CAPACITY:\nMXU, VSTORE:SPILL\n 4 1\n== UTILIZATION:\n1 0\n2 1\n3 0\n"
    assert bundles.slots(text) == {"MXU": 6, "VSTORE:SPILL": 1}


def call(kernel, grid, in_specs, out_specs, shapes, out_shape):
    """The equation of one kernel with a prefetched scalar, inside a scan as a model has it."""

    def body(n, _):
        args = [jnp.zeros(s, "bfloat16") for s in shapes]
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs
        )
        pl.pallas_call(kernel, grid_spec=spec, out_shape=out_shape)(n, *args)
        return n, None

    traced = jax.make_jaxpr(lambda n: jax.lax.scan(body, n, length=2))(jnp.zeros((1,), "int32"))
    (found,) = grids.calls(traced.jaxpr)
    return found


def copies_nothing(*refs):
    pass


def test_bytes_from_grid_and_blocks():
    """A source of which row n alone is read, a block that stays, one left in HBM."""
    block = 16 * 128 * 2
    found = call(
        *(copies_nothing, (2, 4)),
        [
            pl.BlockSpec((None, 16, 128), lambda c, i, n: (n[0], c * 4 + i, 0)),
            pl.BlockSpec((16, 128), lambda c, i, n: (0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        pl.BlockSpec((16, 128), lambda c, i, n: (c * 4 + i, 0)),
        [(5, 128, 128), (16, 128), (5, 128, 128)],
        jax.ShapeDtypeStruct((128, 128), "bfloat16"),
    )
    for n in (0, 4):
        assert grids.moved(found, [[n]]) == grids.Moved(9 * block, 8 * block, 8)
    shared = grids.moved(found, [[0]], lambda i: {2: 0.6}[i])
    assert shared.read == 9 * block + 0.6 * 5 * 128 * 128 * 2


def test_a_hidden_block_is_copied_once():
    """An index that does not move costs no copy: how a row beyond n moves no bytes."""
    spec = pl.BlockSpec((16, 128), lambda i, n: (jnp.where(n[0] == 1, 0, i), 0))
    out = jax.ShapeDtypeStruct((128, 128), "bfloat16")
    found = call(copies_nothing, (8,), [spec], spec, [(128, 128)], out)
    assert [grids.moved(found, [[n]]).read for n in (0, 1)] == [8 * 4096, 4096]


def test_the_full_grid_has_each_case_once():
    """Phase 1 of every D, R and S, both directions; Phase 2 of every D."""
    found = list(roofline.cases({"all": True}))
    assert len(found) == len(set(found)) == 5 * (2 * 4 * 4 + 2)
    one = list(roofline.cases({"all": False, "width": 2304, "sources": 9, "reads": 6}))
    assert [case.kernel for case in one] == list(roofline.KERNELS)


def test_rows_that_are_there_are_not_made_again(tmp_path, monkeypatch, capsys):
    """Until a kernel's program changes; a case that is refused is a row too."""
    made, out = [], tmp_path / "rows.jsonl"
    programs = dict.fromkeys(roofline.KERNELS, "a")

    def traced(case, _):
        if case.kernel == "depth_merge_forward":
            raise ValueError("too large for this chip")
        return case

    def measured(case, *_):
        made.append(case.kernel)
        return {"error": "the compiler refused"}

    monkeypatch.setattr(roofline, "trace", traced)
    monkeypatch.setattr(roofline, "program", lambda case: programs[case.kernel])
    monkeypatch.setattr(roofline, "_measured", measured)
    monkeypatch.setattr(roofline.target, "devices", lambda *_: [None])
    sizes = {"all": False, "width": 128, "sources": 2, "reads": 1}
    words = [json.dumps(sizes | {"chip": "v5e", "out": str(out), "dumps": str(tmp_path)})]
    for _ in range(2):
        assert roofline.main(words) == 0
        assert len(made) == 3
        assert len(out.read_text().splitlines()) == 4
    programs["depth_mix_backward"] = "b"
    roofline.main(words)
    assert made[3:] == ["depth_mix_backward"]
    said = capsys.readouterr().out
    assert "the compiler refused" in said
    assert said.count("too large for this chip") == 1


def test_a_row_is_of_a_program():
    """The same from a traced call again; another for another tile, or another order of blocks."""

    def program(rows, order):
        spec = pl.BlockSpec((rows, 128), lambda i, n: (order(i), 0))
        shape = jax.ShapeDtypeStruct((128, 128), "bfloat16")
        steps = (128 // rows,)
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=steps, in_specs=[spec], out_specs=spec
        )
        run = pl.pallas_call(copies_nothing, grid_spec=grid, out_shape=shape)
        return roofline.program(jax.jit(run).trace(jax.ShapeDtypeStruct((1,), "int32"), shape))

    first = program(16, lambda i: i)
    assert first == program(16, lambda i: i)
    assert first != program(32, lambda i: i)
    assert first != program(16, lambda i: 7 - i)


def test_vmem_of_a_call_is_read():
    used = '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"%d"}]'
    call = f"  %depth_mix_forward.1 = f32[] custom-call(), x={{\n}}, {used % 9}\n"
    text = f"  %a.1 = f32[] fusion(), {used % 7}\n{call}"
    assert roofline._vmem(text, "depth_mix_forward") == 9


def test_a_process_for_each_chip(monkeypatch):
    """Each with dump flags of its own; the first that fails ends it."""
    seen = []

    def run(module, words, environment):
        seen.append((json.loads(words[0])["chip"], environment["LIBTPU_INIT_ARGS"]))
        return 3 if len(seen) == 4 else 0

    monkeypatch.setattr(roofline, "target", SimpleNamespace(run=run, SLICES=roofline.target.SLICES))
    assert roofline.run({"chip": None}) == 3
    assert [chip for chip, _ in seen] == ["v4", "v5e", "v5p", "v6e"]
    assert len({flags for _, flags in seen}) == 4


@pytest.mark.parametrize(
    ("kernel", "N", "told"),
    [
        *((kernel, N, True) for kernel in roofline.KERNELS for N in (4, 9)),  # groups of 16 and of 8 tokens
        *((kernel, 4, False) for kernel in roofline.KERNELS if "merge" in kernel),
    ],
)
def test_what_a_program_is_charged_is_what_the_grids_move(kernel, N, told, monkeypatch):
    """A step's mean over n = 1 .. N, or over the S reads of a block, of which the first has no sum; where a
    kernel is not told which is the first, all it reads have one."""
    monkeypatch.setattr(roofline, "TOKENS", 4096)
    S = 3
    case = roofline.Case(kernel, 256, N + 1, S)
    counted = jax.ShapeDtypeStruct((), "int32")
    function, arguments = (
        roofline._function(case, counted=case.op == "depth_mix"),
        roofline._arguments(case, None),
    )
    if case.op == "depth_mix":
        arguments = (*arguments, counted)
        scalars, shares = [[n] for n in range(1, N + 1)], [n / (N + 1) for n in range(1, N + 1)]
    else:
        scalars, shares = [[j, 0, j == 0] if told else [j, 0] for j in range(S)], [0.0] * S
        arguments = arguments if told else (*arguments[:7], None, *arguments[8:])
    (found,) = grids.calls(jax.make_jaxpr(function)(*arguments).jaxpr)
    moved = [grids.moved(found, [s], lambda _, p=p: p) for s, p in zip(scalars, shares, strict=True)]
    shapes = [hlo.Shape(HLO[a.aval.dtype.name], a.aval.shape, 0) for a in found.invars]
    results = [hlo.Shape(HLO[a.aval.dtype.name], a.aval.shape, 0) for a in found.outvars]
    charged = reads.KERNELS[kernel](cost.Call(tuple(shapes), tuple(results), float(N)))
    # A hidden sum is copied once; a prefetched scalar and small vectors may differ.
    assert charged.read == pytest.approx(np.mean([m.read for m in moved]), rel=0.03)
    assert charged.written == pytest.approx(np.mean([m.written for m in moved]), rel=0.03)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_slot_is_charged_as_an_array(direction, counted):
    """One of three; where its rows are not counted all of them, also in a loop."""
    w, v, *rest = roofline._arguments(roofline.Case(f"depth_mix_{direction}", 256, 5, 3), None)

    def charged(slots, times):
        def run(w, v, n, slot, *rest):
            more = ((slot,),) if slots else ()
            rest = (*rest[:-1], (rest[-1],)) if rest else ()
            return getattr(mix, direction)(w, (v,), (n if counted else None,), *rest, *more, eps=1e-6)

        index, wide = jax.ShapeDtypeStruct((), "int32"), jax.ShapeDtypeStruct((3, *v.shape), v.dtype)
        given = (
            (w, wide, index, index, *rest[:-1], *[wide][: len(rest)])
            if slots
            else (w, v, index, index, *rest)
        )
        (found,) = grids.calls(jax.make_jaxpr(run)(*given).jaxpr)
        shapes = (
            tuple(hlo.Shape(HLO[a.aval.dtype.name], a.aval.shape, 0) for a in some)
            for some in (found.invars, found.outvars)
        )
        return reads.KERNELS[f"depth_mix_{direction}"](cost.Call(*shapes, times))

    of_array, of_slot = charged(False, 4.0 if counted else 1.0), charged(True, 4.0)
    assert of_slot.read == pytest.approx(of_array.read, rel=1e-6)
    assert of_slot.written == pytest.approx(of_array.written, rel=1e-6)


@pytest.mark.libtpu
@pytest.mark.slow
def test_roofline_end_to_end(tmp_path):
    """Every kernel at a small width compiles for a v5e and is counted."""
    out = tmp_path / "rows.jsonl"
    sizes = "--width=256 --sources=2 --reads=2"
    assert __main__.main(["bench", "roofline", "--chip=v5e", *sizes.split(), f"--out={out}"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kernel"] for row in rows] == list(roofline.KERNELS)
    for row in rows:
        assert 0.1 < row["ratio"] < 10
        assert 0 < row["vmem_bytes"] <= 128 << 20
    by = {row["kernel"]: row for row in rows}
    array = 8192 * 256 * 2
    assert by["depth_mix_forward"]["read_bytes"] == pytest.approx(2 * array, rel=0.05)
    stats = 8192 // 64 * 8 * 128 * 4 + 8 * 8192 * 4  # scores and rstd of 64 tokens, and lse
    assert by["depth_mix_forward"]["written_bytes"] == pytest.approx(2 * array + stats, rel=0.02)
    assert by["depth_merge_forward"]["read_bytes"] == pytest.approx(2 * array, rel=0.1)
