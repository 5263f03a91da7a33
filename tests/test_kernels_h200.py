"""GPU kernels with no GPU: what they refuse, their tiles, their programs lowered and compiled for an H200."""

import importlib.util
import json
import sys
from itertools import product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels_gpu import BF16, EPS, F32, merge_inputs

import pallas_kernels.triton
from attnres_jax import __main__
from attnres_jax.bench import h200
from pallas_kernels.depth_merge import gpu as merge_gpu
from pallas_kernels.depth_mix import gpu as mix_gpu
from pallas_kernels.depth_mix import gpu_backward, gpu_single
from pallas_kernels.depth_mix.gpu_tiles import Shape


def bf16(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_mosaic_merge_takes_rows_enough_at_once():
    """Four of a processor where shared memory has room: the parameters are 8 bytes a column, a row 10."""
    for D, rows in ((2048, 4), (2304, 4), (4096, 4), (7168, 2)):
        tile = merge_gpu.tile_of(bf16((1, 8192, D)), inputs=2, outputs=1, resident=8, lanes=8)
        assert tile.lanes * tile.most // merge_gpu.PROCESSORS >= rows
        assert tile.depth >= 2


def fits_a_processor(programs, *buffers):
    """Buffers in whole KiB; a program costs 1 KiB and 128 bytes more, and shares 228 KiB with the others."""
    whole = sum(-(-size // 1024) * 1024 for size in buffers)
    return whole <= 227 * 1024 and programs * (whole + 1024 + 128) <= 228 * 1024


def test_mosaic_merge_claims_no_more_programs_than_fit():
    for D, (inputs, outputs, resident, lanes) in product(
        range(256, 8193, 256), ((2, 1, 8, 8), (3, 2, 8, 8), (3, 3, 8, 8), (4, 2, 2, 1), (5, 2, 2, 1))
    ):
        try:
            tile = merge_gpu.tile_of(bf16((1, 8192, D)), inputs, outputs, resident, lanes)
        except ValueError:  # a prime number of copies
            continue
        row = 2 * D * tile.lanes
        rings = [row * tile.depth] * inputs + [row * tile.staged] * outputs
        assert fits_a_processor(tile.most // merge_gpu.PROCESSORS, *rings, 4 * D, 4 * D, 1024, 2048)


BAD_MERGE = [  # a change of the operands, what the error says
    pytest.param({"D": 1000}, r"stream: D = 1000 is not a multiple of 256", id="D not of whole copies"),
    pytest.param({"D": 17 * 256}, r"stream: D = 4352 does not split", id="D of a prime number of copies"),
    pytest.param({"D": 14336, "dtype": F32}, r"stream: a row of D = 14336 .* exceeds", id="D too large"),
]


@pytest.mark.parametrize(("change", "message"), BAD_MERGE)
def test_mosaic_merge_refuses(change, message):
    a = merge_inputs(**{"tokens": 1, "D": 256, "S": 1, "dtype": BF16} | change)
    with pytest.raises(ValueError, match=message):
        merge_gpu.forward(
            a.w, a.scale, a.mixtures, a.lse, a.streams, 0, 0, False, eps=EPS, norm_eps=EPS, keep_mixture=False
        )


BAD_MIX = [  # rows, D, dtype, what the error says
    pytest.param(2, 72, BF16, r"sources: D = 72 is not a multiple of 256", id="D"),
    pytest.param(17, 256, BF16, r"sources: R = 17 rows, not from 1 to 16", id="too many rows"),
    pytest.param(0, 256, BF16, r"sources: R = 0 rows", id="no rows"),
    pytest.param(2, 256, F32, r"sources: dtype float32", id="fp32"),
]


@pytest.mark.parametrize(("R", "D", "dtype", "message"), BAD_MIX)
def test_mosaic_mix_refuses(R, D, dtype, message):
    with pytest.raises(ValueError, match=message):
        mix_gpu.forward(jnp.ones((1, D)), (jnp.ones((R, 4, D), dtype),), (None,), eps=EPS)


def test_mosaic_single_read_has_a_tile():
    """Within shared memory and barriers, or none: then the four kernels run."""
    found = product(range(256, 8193, 256), range(1, 17), ((False, False), (True, False), (True, True)))
    for D, R, (backward, given) in found:
        tile = gpu_single.tile_of(8192, D, R, backward=backward, given=given)
        assert tile or R > 8 or D % 512
        if tile:
            rows = [2 * D * n for n in (tile.slots, tile.given_slots, not backward)]
            exchange = tile.groups * 1024 * (2 - backward)
            assert fits_a_processor(tile.resident, *rows, exchange, 1024, 2048)
            assert tile.groups * max(tile.slots, tile.given_slots) <= 32
            assert tile.slots >= R + 1 + backward
            assert tile.given_slots >= min(R, 2) * given
    assert gpu_single.fits(7168, 11)
    assert not gpu_single.fits(7168, 12)
    assert not gpu_single.fits(2048, 17)


def test_mosaic_mix_lands_copies_where_the_hardware_takes_them():
    """At multiples of 128 bytes; no interpreter knows that."""
    for rows, queries in product(range(1, 17), repeat=2):
        padded, each = gpu_backward._numbers(Shape(8, 256, rows, queries))
        assert padded >= rows
        assert each >= 2 * queries + 1
        assert 4 * padded * each % 128 == 0


@pytest.mark.skipif(jax.version.__version_info__ < (0, 12), reason="jax-triton lowers under this JAX")
def test_triton_says_why_it_does_not_lower():
    backend = importlib.import_module("pallas_kernels.depth_mix.triton")
    with pytest.raises(RuntimeError, match=r"jax-triton does not lower under JAX 0\.12"):
        backend.forward(jnp.ones((1, 16)), (jnp.ones((1, 1, 16)),), (None,), eps=EPS)


@pytest.mark.parametrize(
    ("version", "results", "alias", "seen"),
    [("0.4.1", "out_type", 4, "a 5 1e-6 a b"), ("0.3.1", "out_shape", 1, "a 5 1e-6 b")],
)
def test_triton_is_called_as_its_version_wants(version, results, alias, seen, monkeypatch):
    """jax-triton 0.3, for Triton 3.6: aliases do not count scalars, and a Python float would be fp64.

    There an output in place is an argument beside its operand; in 0.4 the operand is its argument.
    """
    calls = []

    def triton_call(*operands, **options):
        calls.append((operands, options))

    package = SimpleNamespace(__version__=version, triton_call=triton_call)
    monkeypatch.setitem(sys.modules, "jax_triton", package)
    monkeypatch.setitem(
        sys.modules, "pallas_kernels.depth_mix.triton_kernels", SimpleNamespace(apply="kernel")
    )
    monkeypatch.setattr(jax.version, "__version_info__", (0, 11, 2))
    a, b = jnp.zeros(3), jnp.ones(2)
    options = {"grid": (1,), "warps": 4, "constants": {"D": 3}, "aliases": {3: 0}}
    pallas_kernels.triton.call("depth_mix", "apply", [a, 5, 1e-6, b], ["shape", "other"], **options)
    ((operands, said),) = calls
    assert said[results] == ["shape", "other"]
    assert said["input_output_aliases"] == {alias: 0}
    assert said["kernel"] == "kernel"
    assert said["D"] == 3
    assert isinstance(operands[2], np.float32)
    named = {"a": a, "b": b, "5": 5, "1e-6": operands[2]}
    assert len(operands) == len(seen.split())
    assert all(got is named[name] for got, name in zip(operands, seen.split(), strict=True))


KERNELS = {  # of an op and its reads: calls of each kernel in forward and backward
    ("depth_merge", 2): {"depth_merge_forward": 2, "depth_merge_backward": 1},  # forward without options too
    ("depth_mix", 2): {
        "depth_mix_score": 1,
        "depth_mix_forward": 1,
        "depth_mix_dscore": 1,
        "depth_mix_apply": 1,
    },
    ("depth_mix", 1): {"depth_mix_single_forward": 1, "depth_mix_single_backward": 1},
}


@pytest.mark.parametrize(("op", "reads"), KERNELS)
def test_lowering_for_cuda_holds_each_kernel(op, reads):
    programs = []
    for direction in h200.DIRECTIONS:
        # Lowering takes as long as there are rows and queries.
        f, args = h200.call(h200.Case("gpu", op, direction, 512, 2, reads))
        with jax.sharding.use_abstract_mesh(h200.mesh()):
            programs.append(jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)))
    text = "".join(p.as_text(debug_info=True) for p in programs)
    assert text.count("custom_call @mosaic_gpu") == sum(KERNELS[op, reads].values())
    assert {name: text.count(f"/{name}/mpmd_map") for name in KERNELS[op, reads]} == KERNELS[op, reads]


@pytest.mark.slow
def test_no_kernel_spills_on_an_h200(tmp_path):
    """ptxas itself, for a device that is not there; jax-triton where this JAX takes it."""
    if not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)) or not h200.toolkit():
        pytest.skip("the CUDA plugin of JAX or the CUDA compiler is not installed")
    out = tmp_path / "rows.jsonl"
    for width, reads in product((2048, 2304, 4096), (1, 6)):
        words = ["bench", "roofline", "--chip=h200", f"--width={width}", f"--reads={reads}", f"--out={out}"]
        assert __main__.main(words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    compiled = [row for row in rows if "error" not in row]
    names = {name for op in KERNELS.values() for name in op}
    assert {row["kernel"] for row in compiled if row["backend"] == "gpu"} == names
    lowers = jax.version.__version_info__ < (0, 12) and importlib.util.find_spec("jax_triton")
    assert {row["kernel"] for row in compiled if row["backend"] == "triton"} == (
        {name.replace("single", "one") for name in names - {"depth_mix_score"}} if lowers else set()
    )
    assert all(row["spilled_bytes"] == 0 and row["registers"] <= 255 for row in compiled), rows


def test_what_ptxas_says_is_read():
    """Spills are stores and loads; shared memory is what is declared and what a launch asks for."""
    words = (
        "    48 bytes stack frame, 44 bytes spill stores, 52 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers, 1024 bytes smem\n"
    )
    assert h200.said(words, 2048) == {"registers": 128, "spilled_bytes": 96, "shared_bytes": 3072}


def test_each_case_of_an_h200_is_made_once():
    found = list(h200.cases({"all": True}))
    assert len(found) == len(set(found)) == 4 * 2 * 2 * (3 * 4 + 1)
    one = list(h200.cases({"all": False, "width": 2304, "sources": 9, "reads": 6}))
    assert [(case.backend, case.op, case.direction) for case in one] == [
        (backend, op, direction)
        for backend in h200.BACKENDS
        for direction in h200.DIRECTIONS
        for op in h200.OPS
    ]


def test_without_the_compiler_for_cuda(monkeypatch, capsys):
    """One line that says what to install."""
    monkeypatch.setattr(h200, "toolkit", lambda: None)
    assert __main__.main(["bench", "roofline", "--chip=h200"]) == 2
    error = capsys.readouterr().err
    assert "they need no GPU" in error
    assert error.count("\n") == 1
