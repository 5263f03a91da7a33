"""What a compiled program moves and computes, counted from its text: a small one by hand, and JAX's own."""

from pathlib import Path

import pytest

from attnres_jax.bench import bound, cost, hlo
from attnres_jax.bench.cost import Chip, Cost

GOLDEN = Path(__file__).parent / "golden"
ROW, MATRIX = 16 * 128 * 2, 128 * 128 * 2  # bytes of one [16,128] and of the [128,128] of the golden step


@pytest.fixture(scope="module")
def module():
    return hlo.parse((GOLDEN / "step.hlo").read_text())


def by_name(rows):
    return {row.name: row for row in rows}


def test_every_instruction_is_counted_as_by_hand(module):
    """(bytes read, written, times, kind); the counter's additions lie in small memories on the chip."""
    found = {n: (r.read, r.written, r.times, r.kind) for n, r in by_name(cost.rows(module)).items()}
    assert found.pop("next.5")[:2] == (8, 0)  # two scalars, read
    scalar = 4
    assert found == {
        "copy-start.1": (MATRIX, 0, 1, "copy"),  # into VMEM
        "slice-start.1": (ROW, 0, 1, "slice"),
        "copy.1": (8 * ROW, 8 * ROW, 1, "copy"),
        "all-gather-start.1": (8 * ROW, 16 * ROW, 1, "collective"),
        "slice_fusion": (ROW + scalar, ROW, 5, "fusion"),  # of eight rows it reads one
        "read.7": (9 * ROW, ROW, 5, "kernel"),  # whole operands, for want of a table
        "product_fusion.1": (2 * ROW, ROW, 5, "matmul"),  # its weights are in VMEM
        "update_fusion": (ROW + scalar, ROW, 5, "update"),  # in place
    }


def test_products_are_counted(module):
    flops = {n: r.flops for n, r in by_name(cost.rows(module)).items() if r.flops}
    assert flops == {"product_fusion.1": 2 * 16 * 128 * 128}


def test_a_table_says_what_a_kernel_moves(module):
    def read(call):
        seen.append(call)
        return Cost(3 * ROW, ROW, 10.0)

    seen = []
    row = by_name(cost.rows(module, {"read": read}))["read.7"]
    assert (row.read, row.written, row.flops, row.bytes) == (3 * ROW, ROW, 10.0, 5 * 4 * ROW)
    (call,) = seen
    assert ([s.dims for s in call.operands], call.times) == ([(8, 16, 128), (16, 128)], 5)
    assert [s.space for s in call.results] == [0, 1]


def test_names_from_scopes(module):
    rows = by_name(cost.rows(module))
    assert rows["slice_fusion"].op_name == "jit(step)/while/body/depth_mix/neg"
    assert rows["read.7"].op_name == "jit(step)/while/body/read/pallas_call"  # behind a line break


def test_roofline_time_is_the_larger_of_two(module):
    """Bytes at 1 B/s but for the product, which computes at 1 FLOP/s."""
    rows = cost.rows(module)
    product = by_name(rows)["product_fusion.1"]
    rest = sum(row.bytes for row in rows) - product.bytes
    assert cost.seconds(rows, Chip(1.0, 1.0)) == rest + 5 * 2 * 16 * 128 * 128
    assert cost.seconds(rows, Chip(1.0, 1e12)) == rest + product.bytes


def test_the_mean_of_the_branches():
    text = """HloModule m, is_scheduled=true

%left (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  ROOT %n = f32[64]{0} negate(%a)
}

%right (b: f32[64]) -> f32[64] {
  ROOT %b = f32[64]{0} parameter(0)
}

ENTRY %main (i: s32[], x: f32[64]) -> f32[64] {
  %i = s32[] parameter(0)
  %x = f32[64]{0} parameter(1)
  ROOT %c = f32[64]{0} conditional(%i, %x, %x), branch_computations={%left, %right}
}
"""
    (row,) = cost.rows(hlo.parse(text))
    assert (row.name, row.times, row.bytes) == ("n", 0.5, 256)


def test_a_kernel_in_a_fusion_says_itself_what_it_moves():
    """Of what is around it an operand that it does not read is counted, and not where it updates."""
    text = """HloModule m, is_scheduled=true

%f (a: f32[4,64], i: s32[], rows: f32[8,64], other: f32[64]) -> (f32[4,64], f32[64], f32[64]) {
  %a = f32[4,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %rows = f32[8,64]{1,0} parameter(2)
  %other = f32[64]{0} parameter(3)
  %read.3 = (f32[64]{0}, f32[64]{0}) custom-call(%rows), custom_call_target="tpu_custom_call"
  %x = f32[64]{0} get-tuple-element(%read.3), index=0
  %stats = f32[64]{0} get-tuple-element(%read.3), index=1
  %row = f32[1,64]{1,0} bitcast(%stats)
  %z = s32[] constant(0)
  %kept = f32[4,64]{1,0} dynamic-update-slice(%a, %row, %i, %z)
  %sum = f32[64]{0} add(%other, %other)
  ROOT %all = (f32[4,64]{1,0}, f32[64]{0}, f32[64]{0}) tuple(%kept, %x, %sum)
}

ENTRY %main (a: f32[4,64], i: s32[], rows: f32[8,64], other: f32[64]) -> (f32[4,64], f32[64], f32[64]) {
  %a = f32[4,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %rows = f32[8,64]{1,0} parameter(2)
  %other = f32[64]{0} parameter(3)
  ROOT %read.5 = (f32[4,64]{1,0}, f32[64]{0}, f32[64]{0}) fusion(%a, %i, %rows, %other), calls=%f
}
"""

    def table(call):  # two of eight rows, and both results
        assert ([s.dims for s in call.operands], len(call.results)) == ([(8, 64)], 2)
        return Cost(2 * 256, 2 * 256, 7.0)

    (row,) = cost.rows(hlo.parse(text), {"read": table})
    assert (row.kind, row.name, row.flops) == ("kernel", "read.5", 7.0)
    assert row.read == 2 * 256 + 4 + 256  # its rows, the place, the other operand
    assert row.written == 2 * 256 + 256  # its results, wherever they go, and the sum


CONVOLUTIONS = {
    "rows": ((16, 32), (32, 8), (16, 8), "dim_labels=bf_io->bf", 16 * 32 * 8),
    # [8,4096,2304] x [2304,18,128]: the heads are a window full of padding.
    "heads": (
        *((8, 4096, 2304, 1), (2304, 18, 128, 1), (8, 4096, 18, 128)),
        "window={size=1x18 pad=0_0x17_17 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
        8 * 4096 * 2304 * 18 * 128,
    ),
    # A sum over 8 batches as a window of 8.
    "batches": (
        *((8, 2304, 4096), (8, 4096, 512), (1, 2304, 512)),
        "window={size=8}, dim_labels=0bf_0io->0bf",
        8 * 2304 * 4096 * 512,
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_as_products(name):
    """FLOPs are 2 x multiply-adds of the product that the convolution stands for."""
    *arguments, multiply_adds = CONVOLUTIONS[name]
    assert cost._convolution(*arguments) == 2 * multiply_adds


def test_a_loop_without_a_limit(module):
    loop = module.computations["main"].instructions["while.6"]
    assert hlo.trips(module, loop) == 5
    bare = module.computations["condition"]
    bare.instructions.pop("limit.4")
    with pytest.raises(ValueError, match=r"how often while.6 runs"):
        hlo.trips(module, loop)


def test_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")


def test_the_bound_is_that_of_the_tables():
    """Derived by hand for L=54, N=9 and L=96, N=8; a plain net is 8."""
    assert bound.two_phase(54, 6).kept == 15.5
    assert bound.two_phase(54, 6).recomputed == pytest.approx(17.4, abs=0.1)
    assert bound.two_phase(96, 12).kept == pytest.approx(14.1, abs=0.05)
    assert bound.two_phase(96, 12).recomputed == pytest.approx(15.5, abs=0.1)
    assert bound.PLAIN == 8
