"""`compile` without a compiler: arithmetic of memory, what is tried and in which order, what is said."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from attnres_jax import __main__, configs
from attnres_jax.bench import aot, fit, target
from attnres_jax.parallel import pipeline
from attnres_jax.train import step

GB, VOCAB, DEVICES = 10**9, 32768, 16
SAID = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
    "HLO temporaries (23.06G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee errors/error_1000"
)


def config(*words):
    return configs.load("lm:d12,block8", [f"--config.{word}" for word in words])


def memory(config, temporaries, available=16 * GB):
    parameters, moments = fit.state(config, VOCAB, DEVICES)
    return fit.memory(config, VOCAB, DEVICES, parameters + moments + temporaries, available)


def tried(config, temporaries, **more):
    return [str(knob) for knob in fit.knobs(config, VOCAB, DEVICES, memory(config, temporaries, **more))]


def test_the_state_by_hand():
    """fp32 parameters and two moments, whole or over four devices; the vectors are on every device."""
    whole, moments = fit.state(config(), VOCAB, DEVICES)
    d, layers = 768, 12
    matrices = layers * (4 * d * d + 3 * d * 2048) + VOCAB * d
    assert matrices * 4 < whole < matrices * 4 * 1.001
    assert moments == 2 * whole
    cut, _ = fit.state(config("mesh.fsdp=4"), VOCAB, DEVICES)
    assert cut - (whole - matrices * 4) == matrices


def test_the_state_of_a_stage():
    """Of four stages a quarter of the layers each, the embedding whole; five blocks fill six places."""
    d = 768
    layer, table = 4 * d * d + 3 * d * 2048, VOCAB * d
    accumulation = "train.accumulation=4", "data.batch=64"
    for blocks, each in ((12, 3), (5, 2)):
        c = config("mesh.stage=4", f"model.blocks={blocks}", *accumulation)
        parameters, _ = fit.state(c, VOCAB, DEVICES)
        assert parameters == pytest.approx(4 * (each * layer + table), rel=1e-3)
    cut = config("mesh.stage=4", "mesh.fsdp=4", "mesh.data=1", *accumulation)
    parameters, _ = fit.state(cut, VOCAB, DEVICES)
    assert fit.gradients(cut, parameters, DEVICES) == 4 * parameters  # while it runs fsdp divides nothing
    assert fit.gradients(config("mesh.fsdp=4"), parameters, DEVICES) == parameters


def test_what_fits():
    assert fit.Memory(1, 2, 1, 0, 0, 7, 10).fits
    assert not fit.Memory(1, 2, 1, 0, 0, 8, 10).fits
    assert fit.Memory(1, 2, 4, 8, 16, 100, 10).activations == 100 - 4 - 8 - 16


def test_caches_by_hand():
    """Units [B,T,D] of a device: of the embedding and four blocks and of their cotangents, for each slot and
    the idle one; and messages."""
    c = config("mesh.stage=4", "mesh.tensor=2", "data.batch=64", "train.accumulation=16", "model.blocks=16")
    unit = 64 // 16 // 2 * 512 * 768 * 2  # over data 2; tensor cuts T; bf16
    # 16 transformer blocks in blocks of four: each chunk makes one whole, and nothing leaves before it is
    # done but the two that the stage before it had passed on.
    slots, rows, hop = 2 * 4, 5, 3
    early, fresh = hop - 1, 1
    assert fit.caches(c, VOCAB, DEVICES) == unit * (2 * (slots + 1) * rows + early + fresh + hop)
    assert fit.caches(config(), VOCAB, DEVICES) == 0


def staged(residual, *more):
    words = ["data.length=8", "data.batch=16", "train.accumulation=4", "mesh.stage=2", "model.width=16"]
    words += ["model.heads=2", "model.kv_heads=2", "model.mlp_width=16", f"residual={residual}", *more]
    return config(*words)


@pytest.mark.parametrize(
    ("residual", "more"),
    [
        ("plain", ()),
        ("block", ("model.blocks=5", "block_size=4", "train.virtual_stages=2")),  # parted: `given` is kept
        ("mhc", ("model.blocks=4",)),
    ],
)
def test_caches_are_what_a_pipeline_carries(residual, more, monkeypatch):
    """Of the real train step, as it is traced: no gradients, no sums among them."""
    c, seen, place = staged(residual, *more), [], pipeline._Run._placed
    fields = "cache", "given", "early", "fresh", "d_cache", "back"

    def placed(run, state):
        seen.append(
            sum(a.size * a.dtype.itemsize for f in fields for a in jax.tree.leaves(getattr(state, f)))
        )
        return place(run, state)

    monkeypatch.setattr(pipeline._Run, "_placed", placed)
    run = step.programs(c, 64, jax.devices()[:4])
    run.update.trace(run.like, jax.ShapeDtypeStruct((16, 9), jnp.int32, sharding=run.place))
    assert set(seen) == {fit.caches(c, 64, 4)}


def test_matrices_of_a_pipeline():
    """Gathered in bf16: half of their gradients; none where they are the parameters themselves."""
    c = config("mesh.stage=4", "train.accumulation=4", "data.batch=64")
    assert fit.matrices(c, 8, DEVICES) == 4
    assert fit.matrices(config("mesh.fsdp=4"), 8, DEVICES) == 0
    whole = "mesh.stage=4", "train.accumulation=4", "data.batch=64", "model.dtype=float32"
    assert fit.matrices(config(*whole), 8, DEVICES) == 0
    assert fit.matrices(config(*whole, "mesh.fsdp=2"), 8, DEVICES) == 8


def test_the_order_of_knobs():
    """The cheapest first, of each the least value that should do; remat is tried, whatever comes of it."""
    c = config("data.batch=256", "model.remat=everything", "train.vocab_chunks=2")
    assert tried(c, 14_900_000_000) == [
        "--config.train.accumulation=2",
        "--config.model.remat=nothing",
        "--config.mesh.data=8 --config.mesh.fsdp=2",
        "--config.train.vocab_chunks=4",  # 16 x 1024 tokens: 4.3 GB of logits and cotangents, now in halves
        "--config.mesh.data=8 --config.mesh.tensor=2",
    ]
    assert tried(c, 50 * GB) == ["--config.train.accumulation=4", "--config.model.remat=nothing"]
    # No more sequences to part with, nothing to forget: parameters are what is too much.
    c = config("data.batch=16", "model.blocks=160", "train.vocab_chunks=64")
    cut = ["--config.mesh.data=8 --config.mesh.fsdp=2", "--config.mesh.data=8 --config.mesh.tensor=2"]
    assert tried(c, 6 * GB) == cut
    assert tried(c, 30 * GB) == []


def test_knobs_are_legal():
    """A device keeps whole sequences in a microbatch: of 48 over 16 devices a third, not half."""
    c = config("data.batch=48")
    assert "train.accumulation=3" in tried(c, 20 * GB)[0]


SEVENTY = "mesh.stage=8 mesh.data=1 mesh.fsdp=64 train.accumulation=8 train.vocab_chunks=64"


def seventy(*words, needed=140 * GB, available=103 * GB):
    """What to try for 70 B on v5p:8x8x8, and what it needs."""
    c = configs.load("lm:70b,block20", [f"--config.{word}" for word in (*SEVENTY.split(), *words)])
    now = fit.memory(c, 131072, 512, needed, available)
    return {str(knob): knob.predicted for knob in fit.knobs(c, 131072, 512, now)}, now


def test_tensor_divides_what_a_stage_holds():
    """70 B: fsdp divides neither the gradients of a stage nor its matrices while it runs; tensor does."""
    found, now = seventy()
    ((knob, predicted),) = found.items()
    assert knob == "--config.mesh.fsdp=16 --config.mesh.tensor=4"
    held = now.gradients + now.matrices
    assert held == pytest.approx(
        6 * (68.7e9 / 8 + 2 * 131072 * 8192), rel=0.02
    )  # fp32 and bf16; tables whole
    assert predicted == pytest.approx(140 * GB - held * 3 / 4, rel=1e-3)
    least, _ = seventy(needed=130 * GB)
    assert list(least) == ["--config.mesh.fsdp=32 --config.mesh.tensor=2"]


def test_stages_divide_it_too():
    """Their memory is the compiler's to say, but what is known must fit; they divide the microbatches."""
    cut = "mesh.fsdp=32", "mesh.tensor=2", "train.accumulation=16"
    found, _ = seventy(*cut, needed=125 * GB)
    knob = "--config.mesh.fsdp=16 --config.mesh.stage=16"
    assert list(found)[-2:] == ["--config.mesh.fsdp=8 --config.mesh.tensor=8", knob]
    assert found[knob] is None
    _, then = seventy(*cut, "mesh.fsdp=16", "mesh.stage=16")
    assert knob in seventy(*cut, available=then.known)[0]
    assert knob not in seventy(*cut, available=then.known - 1)[0]
    assert not any("stage" in knob for knob in seventy()[0])  # 16 stages, 8 microbatches


def test_tensor_where_it_is_legal():
    """From fsdp, or from data; heads, tokens and the vocabulary say how far."""
    c = config(
        "mesh.fsdp=4", "model.kv_heads=2", "model.blocks=160", "data.batch=16", "train.vocab_chunks=64"
    )
    found = [changes for changes, _ in fit.tensors(c, VOCAB, DEVICES, memory(c, 6 * GB))]
    assert found == [{"mesh.fsdp": 2, "mesh.tensor": 2}, {"mesh.data": 2, "mesh.tensor": 2}]
    assert tried(c, 13 * GB)[-1] == "--config.mesh.data=2 --config.mesh.tensor=2"
    c = config("mesh.stage=4", "train.accumulation=8", "model.blocks=7", "data.batch=64")
    assert list(fit.stages(c, VOCAB, DEVICES, memory(c, 6 * GB))) == []  # seven blocks, not eight stages


def test_slices_keep_their_data():
    """Only data goes over the network between slices: of each it keeps a row."""
    c = config("data.batch=16", "model.blocks=160", "train.vocab_chunks=64", "mesh.data=2", "mesh.fsdp=8")
    now = memory(c, 15 * GB)
    found = [str(knob) for knob in fit.knobs(c, VOCAB, DEVICES, now)]
    assert found == [
        "--config.mesh.data=1 --config.mesh.fsdp=16",
        "--config.mesh.data=1 --config.mesh.tensor=2",
    ]
    assert fit.knobs(c, VOCAB, DEVICES, now, slices=2) == []


def test_predictions_by_hand():
    c = config("data.batch=64")
    now = memory(c, 10 * GB)
    ((changes, needed), *_) = fit.accumulations(c, VOCAB, DEVICES, now)
    assert changes == {"train.accumulation": 2}
    beside = 10 * GB - now.gradients
    assert needed == now.parameters + now.optimizer + 2 * now.gradients + beside // 2
    ((changes, needed), *_) = fit.chunks(c, VOCAB, DEVICES, now)
    logits = 2 * 4 * 4 * 1024 * VOCAB
    assert (changes, needed) == ({"train.vocab_chunks": 2}, now.needed - logits // 2)
    ((changes, needed), *_) = fit.fsdps(c, VOCAB, DEVICES, now)
    assert changes == {"mesh.data": 8, "mesh.fsdp": 2}
    assert needed == pytest.approx(now.needed - 4 * now.parameters / 2, rel=1e-3)
    assert list(fit.remats(c, VOCAB, DEVICES, now)) == []


def test_the_compiler_s_complaint():
    found = aot.too_large(SAID)
    assert (found.needed, found.available) == (int(23.06 * 2**30), int(15.75 * 2**30))
    assert aot.too_large("INTERNAL: Mosaic failed to compile TPU kernel (1.5G)") is None
    assert aot.too_large("RESOURCE_EXHAUSTED: too many notes") is None


def arm(fits, needed=10 * GB, **more):
    now = fit.Memory(GB, 2 * GB, GB, GB // 2, GB // 4, needed - 3 * GB, 16 * GB)
    return (
        aot._said(now, fits)
        | {
            "compile_seconds": 9,
        }
        | more
    )


def test_what_is_said():
    assert aot.verdict("block", arm(True)) == ["block: fits, 10 GB of 16 GB"]
    fails = {"knob": "--config.train.accumulation=2", "predicted": 15 * GB} | arm(False, 17 * GB)
    fits = {"knob": "--config.model.remat=nothing", "predicted": None} | arm(True)
    assert aot.verdict("block", arm(False, 20 * GB, tried=[fails, fits])) == [
        "block: does not fit, 20 GB of 16 GB",
        "  --config.train.accumulation=2: compiled, does not fit, 17 GB (arithmetic said 15 GB)",
        "  --config.model.remat=nothing: compiled, fits, 10 GB",
    ]


def test_what_is_said_of_what_was_not_tried():
    """That nothing is enough is said only where the list is at its end."""
    fails = {"knob": "--config.train.accumulation=2", "predicted": 15 * GB} | arm(False, 17 * GB)
    left = {"knob": "--config.mesh.fsdp=2", "predicted": 14 * GB}
    assert aot.verdict("block", arm(False, 20 * GB, tried=[], untried=[left]))[1:] == [
        "  --config.mesh.fsdp=2: not tried (arithmetic said 14 GB)",
        "  0 of 1 changes tried: --tries=1 tries all",
    ]
    assert aot.verdict("block", arm(False, 20 * GB, tried=[fails], untried=[left]))[2:] == [
        "  --config.mesh.fsdp=2: not tried (arithmetic said 14 GB)",
        "  1 of 2 changes tried: --tries=2 tries all",
    ]
    (last,) = aot.verdict("block", arm(False, 20 * GB, tried=[fails], untried=[]))[2:]
    assert last == "  1 of 1 changes tried, none is enough: change several or use more devices"
    (last,) = aot.verdict("block", arm(False, 20 * GB, tried=[], untried=[]))[1:]
    assert last.startswith(
        "  by arithmetic no single change of accumulation, remat, fsdp, vocab_chunks, tensor"
    )


@pytest.mark.parametrize(
    ("tries", "enough", "counts"), [(0, 9, (0, 2)), (1, 9, (1, 1)), (9, 9, (2, 0)), (9, 0, (1, 1))]
)
def test_what_is_tried(tries, enough, counts, monkeypatch, capsys):
    """As many as may be, until one fits; the others are named."""
    seen = []

    def measure(config, vocab, on):
        seen.append((config.train.accumulation, config.model.remat))
        return arm(len(seen) > enough)

    knobs = [fit.Knob({"train.accumulation": 4}, GB), fit.Knob({"model.remat": "nothing"}, None)]
    monkeypatch.setattr(aot, "measure", measure)
    monkeypatch.setattr(fit, "knobs", lambda *_: knobs)
    c, on = config("data.batch=256", "model.remat=everything"), aot.Slice("v", [None] * DEVICES, *[None] * 3)
    found = aot.advice(c, VOCAB, on, arm(False), tries)
    assert (len(found["tried"]), len(found["untried"])) == counts
    assert seen == [(4, "everything"), (1, "nothing")][: counts[0]]
    assert [one["knob"] for one in found["tried"] + found["untried"]] == [str(knob) for knob in knobs]


def test_the_report(capsys, monkeypatch):
    """Every number in its place, side by side; an arm that does not fit has no times."""
    monkeypatch.setenv("COLUMNS", "200")
    gather = {"kind": "all-gather", "runs": 4, "bytes": 3e9, "exposed": 1.5e9, "needed": 2e9}
    gather |= {"hidden": 0.75, "hardest": 7e9}
    sent = {"kind": "collective-permute", "received": 6e6, "times": 60, "hidden": 5e-4, "around": 2e-3}
    times = {"estimate_seconds": 0.2, "roofline_seconds": 0.1, "estimate_mfu": 0.4}
    times |= {"collectives": [gather], "messages": [sent]}
    block = arm(True, flops=5e12, hbm_bytes=7e9, **times)
    whole = {"topology": "v5e:4x4", "devices": 16, "compile_memory": 2e9}
    aot.show(whole | {"arms": {"block": block, "plain": arm(False, 20 * GB, tried=[], untried=[])}})
    text = re.sub(r"[│┃ ]+", " ", capsys.readouterr().out)
    assert " needed 10 GB 20 GB " in text
    assert " matrices of a pipeline's stage, whole 500 MB 500 MB " in text
    assert " caches of a pipeline 250 MB 250 MB " in text
    assert " activations and the rest of temporaries 5.25 GB 15.2 GB " in text
    assert " FLOPs of matrix products 5e+12 " in text
    assert " step by the compiler's cycles, ms 200.0 \n" in text
    assert " block all-gather 4 3 GB 50% 750 2.0 7.0 " in text
    assert " block 60 6 MB 2 25.0% 12.0 " in text
    assert "plain: does not fit, 20 GB of 16 GB" in text
    assert "memory of the compiler: 2 GB" in text


@pytest.mark.parametrize(
    "name", ["v9:2x2", "v5p:4x4", "v5e:2x2x1", "v5p:4x4x5", "v5p:8x4x4", "v5e", "v5p:4x4x"]
)
def test_topologies_that_do_not_exist(name):
    with pytest.raises(
        configs.UserError, match=f"'{name}' does not exist: v5e and v6e have 2x2, 2x4.*v5p:4x4x8"
    ):
        target.topology(name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config=quick", "required: --topology"),
        ("--topology=v5e:2x2", "required: --config"),
        ("--config=quick --topology=v5e:2x2 --slices=0", "'0' is not a whole number from 1"),
        ("--config=quick --topology=v5e:2x2 --beside blok", "invalid choice: 'blok'"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys):
    assert __main__.main(["compile", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


SMALL = [
    *(
        "--config=quick:block",
        "--topology=v5e:2x2",
        "--config.model.dtype=bfloat16",
        "--config.model.blocks=2",
    ),
    *("--config.model.width=128", "--config.model.mlp_width=256", "--config.model.heads=1"),
    *("--config.model.kv_heads=1", "--config.data.length=256", "--config.mesh.fsdp=2"),
]


def compile_it(*words):
    command = [sys.executable, "-m", "attnres_jax", "compile", *SMALL, *words]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"}
    )
    return ran.returncode, ran.stdout, ran.stderr


@pytest.mark.libtpu
@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--config.mesh.stage=2 --config.train.accumulation=4"])
def test_a_small_step_end_to_end(tmp_path, more):
    """On two slices, also as a pipeline: kernels on, what is counted is plausible."""
    code, said, error = compile_it("--slices=2", f"--out={tmp_path / 'r.json'}", *more.split())
    assert code == 0, error
    assert "block: fits" in said
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["topology"], found["devices"]) == ("2 x v5e:2x2", 8)
    block = found["arms"]["block"]
    caches = block["memory"]["caches"]
    assert (caches > 0) == bool(more)
    assert block["memory"]["activations"] > 0
    assert any(name.startswith("depth_mix") for name in block["kernels"])
    assert 0.5 < block["flops"] / block["model_flops"] < 3
    assert block["estimate_seconds"] > block["roofline_seconds"] > 0
    kinds = {total["kind"] for total in block["collectives"]}
    assert kinds >= {"all-gather", "all-reduce"}
    assert ("collective-permute" in kinds) == bool(more)
    assert found["compile_memory"] > 1e8


@pytest.mark.libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_permutes_of_a_pipeline_run_beside_compute(tmp_path, topology):
    """They are asynchronous: blocks and their cotangents travel while a chunk runs. What left before the
    chunk has much of the first ticks, what the chunk made little: it waits for the chunk."""
    more = [f"--topology={topology}", "--config.mesh.stage=4", "--config.train.virtual_stages=2"]
    more += ["--config.model.blocks=16", "--config.train.accumulation=8", f"--out={tmp_path / 'r.json'}"]
    code, said, error = compile_it(*more, "--config.mesh.fsdp=1", "--config.data.batch=512")
    assert code == 0, error
    (block,) = json.loads((tmp_path / "r.json").read_text())["arms"].values()
    (permutes,) = (c for c in block["collectives"] if c["kind"] == "collective-permute")
    assert permutes["exposed"] == 0
    assert permutes["needed"] > 0
    assert {name.split(".")[0] for name in block["kernels"]} >= {"depth_mix_forward", "depth_merge_backward"}
    # Forward alone 7 ticks, both 12, backward alone 7: two blocks early, one fresh, three back.
    unit = 16 * 1024 * 128 * 2
    sent = [(m["times"], m["received"] / unit) for m in block["messages"]]
    assert sorted(sent) == [(7, 1), (7, 2), (7, 3), (12, 1), (12, 2), (12, 3)]
    first = {m["received"] / unit: m["hidden"] / m["around"] for m in block["messages"] if m["times"] == 7}
    assert first[2] > 0.3 > first[1]
    assert "Messages of a pipeline" in said


COPIES = """
import json, sys
from attnres_jax import configs
from attnres_jax.bench import aot, cost, hlo, reads
on = aot.found_slice("v5p:2x2x1", 1)
config = configs.load(sys.argv[1].removeprefix("--config="), sys.argv[3:])
found = cost.rows(hlo.parse(aot.compiled(config, 1024, on.devices).text), reads.KERNELS)
print(json.dumps([
    (row.kind, row.name, row.times, row.read, row.written, [s.size for s in row.shapes]) for row in found
]))
"""


@pytest.mark.libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "batch", "length"), [("nothing", 512, 256), ("everything", 512, 256), ("everything", 8, 4096)]
)
def test_a_stage_s_cache_is_not_copied(remat, batch, length):
    """What takes it, or its cotangents, but is no kernel, moves less than the rows of one microbatch."""
    more = ["--config.mesh.stage=4", "--config.train.virtual_stages=2", "--config.mesh.fsdp=1"]
    more += ["--config.model.blocks=16", "--config.train.accumulation=8", f"--config.data.batch={batch}"]
    more += [f"--config.model.remat={remat}", f"--config.data.length={length}"]
    command = [sys.executable, "-c", COPIES, *SMALL, *more]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    unit, kept, slots = batch // 8 * length * 128, 9, 8 + 1
    whole = [row for row in rows if row[2] > 1 and slots * kept * unit in row[5]]
    assert {row[0] for row in whole} > {"kernel"}
    copies = [row for row in whole if row[0] != "kernel" and max(row[3:5]) >= kept * unit * 2]
    assert not copies


@pytest.mark.libtpu
@pytest.mark.slow
def test_a_step_that_does_not_fit(tmp_path):
    """The compiler refuses it; the first knob in order is compiled and fits."""
    more = ["--vocab=65536", "--config.data.batch=2048", "--config.data.length=2048", "--tries=1"]
    more += ["--config.residual=plain", "--config.model.blocks=1"]
    code, said, error = compile_it(*more, f"--out={tmp_path / 'r.json'}")
    assert code == 1, error
    (tried,) = json.loads((tmp_path / "r.json").read_text())["arms"]["plain"]["tried"]
    assert tried["knob"].startswith("--config.train.accumulation=")
    assert tried["fits"]
    assert "compiled, fits" in said


@pytest.mark.libtpu
@pytest.mark.slow
def test_a_mesh_that_does_not_fit(tmp_path):
    code, _, error = compile_it("--config.mesh.fsdp=3")
    assert code == 2
    assert "does not fit 4 devices" in error
    assert "Traceback" not in error
