"""Runs of 30 M parameters on a GPU, as far as there is none: the config, the session's script, its pages."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cluster
import jax.numpy as jnp
import numpy as np
import pytest

from attnres_jax import __main__, configs
from attnres_jax.analysis import inspect
from attnres_jax.bench import h200
from attnres_jax.configs import sweeps
from attnres_jax.train import data
from pallas_kernels.depth_merge import vjp as depth_merge
from pallas_kernels.depth_mix import vjp as depth_mix

SCRIPT = Path(__file__).with_name("h200_evidence.sh")
ROWS = ("baseline", "block-s4", "full", "mhc")
MEMBERS = sweeps.members(sweeps.SWEEPS["table4"].only(ROWS), "gpu", seeds=1)
FAKE = """#!/bin/bash
[ "$3" = sweep ] || exit 0
echo "$@" >> "$CALLS"
for word in "$@"; do case $word in --out=*) out=${word#--out=};; --seeds=*) seed=${word#--seeds=};; esac; done
mkdir -p "$out/full-$seed/checkpoints"
touch "$out/full-$seed/"{metrics.jsonl,reading.npz,checkpoints/large}
echo "out of luck" > "$out/full-$seed/log.txt"
trap 'echo saved > "$out/saved"; exit 0' TERM
sleep "$NAP" & wait $!
[ "$NAP" != 0.01 ] || [ "$seed" -lt "$BREAKS" ] || exit 2
touch "$out/README.md"
"""
"""In place of Python: of the sweep what it leaves behind, after a nap."""


@pytest.fixture
def corpus(tmp_path):
    text = np.random.default_rng(0).integers(0, 8192, 3000)
    data.prepare(tmp_path / "corpus", text[:2500], text[2500:], vocab=8192, source="noise")
    return tmp_path / "corpus"


def session(tmp_path, corpus, **more):
    """The script, with RUNS and OUT of its own; what it printed, and its exit code."""
    places = {"CORPUS": str(corpus), "RUNS": str(tmp_path / "runs"), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", str(SCRIPT)],
        env=cluster.environment() | places | more,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr, done.returncode


def pretended(tmp_path, corpus, nap="0.01", **more):
    """With a stand-in for Python; what it printed, the sweeps it asked for, and its exit code."""
    fake, calls = tmp_path / "python", tmp_path / "calls"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    keys = {"PYTHON": str(fake), "CALLS": str(calls), "NAP": nap, "BREAKS": "99"} | more
    said, code = session(tmp_path, corpus, **keys)
    return said, calls.read_text().splitlines() if calls.is_file() else [], code


def packed(tmp_path):
    with tarfile.open(tmp_path / "out/evidence.tgz") as files:
        return {name.removeprefix("./") for name in files.getnames()}


@pytest.mark.parametrize("member", MEMBERS, ids=ROWS)
def test_size_of_the_config(member):
    config = member.config
    model = configs.model_config(config, vocab=8192)
    count = sum(int(np.prod(p.shape)) for p in inspect.parameters(model))
    assert 29e6 < count < 33e6
    assert config.model.blocks >= 12
    assert config.model.dtype == "bfloat16"
    if config.residual == "plain":  # as the config's head has it
        assert round(inspect.cost(model, config.data.length).training_flops / 1e6) == 223
    tokens = {m.config.train.steps * m.config.data.batch * m.config.data.length for m in MEMBERS}
    assert tokens == {8_192_000}


def test_kernels_take_the_reads_of_block():
    """Those of the last block, the largest: six summaries and the embedding. Full's are XLA's."""
    (block,) = (m.config for m in MEMBERS if m.config.residual == "block")
    sizes = configs.model_config(block, 8192).scheme.schedule(2 * block.model.blocks).sizes
    width = block.model.width
    assert depth_mix.refusal(max(sizes), len(sizes) + 1, width, jnp.bfloat16, "gpu") is None
    assert depth_merge.refusal(width, jnp.bfloat16, "gpu") is None
    assert "R = 25 rows, not from 1 to 16" in str(depth_mix.refusal(1, 25, width, jnp.bfloat16, "gpu"))


def test_inspect(corpus, capsys):
    assert __main__.main(["inspect", "--config=gpu:block", f"--config.data.corpus={corpus}"]) == 0
    assert "30,971,392" in capsys.readouterr().out
    assert __main__.main(["inspect", "--config=gpu:blck"]) == 2
    assert capsys.readouterr().err == "error: residual scheme 'blck' does not exist; did you mean 'block'?\n"
    assert __main__.main(["inspect", "--config=gpu", "--config.data.corpus=nowhere"]) == 2
    assert "corpus 'nowhere': no such folder" in capsys.readouterr().err


def test_a_seed_after_the_other(tmp_path, corpus):
    """Each round is a command that is understood; what comes back is pages and runs without checkpoints."""
    said, calls, code = pretended(tmp_path, corpus, SEEDS="3", JOBS="2", KEYS="--config.train.log_every=5")
    assert [call.split("--seeds=")[1][0] for call in calls] == ["1", "2", "3"]
    args = __main__._parse(calls[-1].split()[2:])
    assert (args.name, args.config, args.rows, args.jobs) == ("table4", "gpu", [*ROWS], 2)
    assert configs.load(args.config, args.overrides).data.corpus == str(corpus)
    assert configs.load(args.config, args.overrides).train.log_every == 5
    runs = {f"full-{n}/{file}" for n in (1, 2, 3) for file in ("metrics.jsonl", "reading.npz", "log.txt")}
    assert packed(tmp_path) == runs | {"README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evidence.tgz",
        "log.txt",
        "environment.txt",
    }
    assert "== 3 seeds: exit 0" in said
    assert code == 0


def test_no_seed_is_begun_that_does_not_fit(tmp_path, corpus):
    """Of 14 s two seeds take 8, and half again as long as one is 6; that is no failure."""
    said, calls, code = pretended(tmp_path, corpus, nap="4", LIMIT="14")
    assert (len(calls), code) == (2, 0)
    assert "no time for seed 2" in said


def test_no_time_at_all(tmp_path, corpus):
    said, calls, code = pretended(tmp_path, corpus, LIMIT="0")
    assert (calls, code) == ([], 124)
    assert "no time for seed 0" in said


def test_stopped_by_time(tmp_path, corpus):
    """SIGTERM, on which a sweep saves; what there is comes back, and why."""
    said, calls, code = pretended(tmp_path, corpus, nap="60", LIMIT="2")
    assert (len(calls), code) == (1, 124)
    assert "== 1 seeds: exit 124" in said
    assert "out of luck" in said
    assert {"saved", "full-1/log.txt"} <= packed(tmp_path)
    assert "README.md" not in packed(tmp_path)


def test_a_failure_ends_it_and_keeps_what_there_was(tmp_path, corpus):
    said, calls, code = pretended(tmp_path, corpus, BREAKS="2")
    assert (len(calls), code) == (2, 2)
    assert "== 2 seeds: exit 2" in said
    assert "README.md" in packed(tmp_path)


def test_no_corpus(tmp_path):
    said, code = session(tmp_path, tmp_path / "none")
    assert (code, said.count("\n")) == (2, 1)
    assert "the head of tests/h200_evidence.sh says how it is made" in said


def test_the_script_is_sound():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert shellcheck
    subprocess.run([shellcheck, "--severity=warning", str(SCRIPT)], check=True)


COMPILED = """
import sys, types, jax
from attnres_jax import choice, configs
from attnres_jax.bench import h200
from attnres_jax.configs import sweeps
from attnres_jax.models import attention
from attnres_jax.train.step import programs

device, (row,) = h200._device(), sys.argv[1:]
choice.platform = attention.platform = lambda placement: "gpu"  # as where it is the default device
choice.jax = types.SimpleNamespace(
    devices=lambda: [device], device_count=lambda: 1, numpy=jax.numpy, sharding=jax.sharding,
    __version_info__=jax.__version_info__)
(member,) = sweeps.members(sweeps.SWEEPS["table4"].only([row]), "gpu", seeds=1)
batch = member.config.data
with jax.sharding.use_abstract_mesh(h200.mesh()):
    run = programs(member.config, 8192, [device])
    tokens = jax.ShapeDtypeStruct((batch.batch, batch.length + 1), "int32", sharding=run.place)
    step = run.update.lower(run.like, tokens)
    print("mosaic" in step.as_text(), "cudnn$fmha" in step.as_text())
    print(step.compile().memory_analysis().temp_size_in_bytes / 1e9)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("row", "kernels", "most"), [("block-s4", True, 2), ("mhc", False, 4)])
def test_an_update_compiles_for_an_h200(row, kernels, most, tmp_path):
    """By XLA's own compiler, with no GPU: attention by cuDNN, Block's reads by Mosaic; GB of temporaries."""
    if not h200.toolkit() or not importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("the compilers for CUDA are not installed: pip install 'jax[cuda13]==0.11.2'")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, row],
        env=os.environ | h200.environment(str(tmp_path)),
        cwd=cluster.ROOT,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    chosen, size = done.stdout.splitlines()
    assert chosen == f"{kernels} True"
    assert 1 < float(size) < most


@pytest.mark.slow
def test_the_session_in_miniature(tmp_path, corpus):
    """Eight runs of two blocks, their pages; and these again from what comes back, where nothing else is."""
    keys = cluster.TINY | {"train.steps": 6, "train.depth_every": 3, "train.eval_every": 6}
    keys = {key: value for key, value in keys.items() if key != "block_size"} | {"checkpoint.every": 6}
    words = [f"--config.{key}={value}" for key, value in keys.items()]
    said, code = session(tmp_path, corpus, PYTHON=sys.executable, SEEDS="2", JOBS="2", KEYS=" ".join(words))
    assert code == 0, said
    text = (tmp_path / "runs/README.md").read_text()
    assert "4 rows, seeds 0, 1: 2 transformer blocks (4 sublayers) of width 16" in text
    home = tmp_path / "home"
    with tarfile.open(tmp_path / "out/evidence.tgz") as files:
        files.extractall(home, filter="data")
    assert not list(home.glob("*/checkpoints"))
    (home / "README.md").unlink()
    shutil.rmtree(corpus)
    command = [
        sys.executable,
        "-m",
        "attnres_jax",
        "sweep",
        "table4",
        "--config=gpu",
        f"--rows={','.join(ROWS)}",
    ]
    command += ["--seeds=2", f"--out={home}", f"--config.data.corpus={corpus}", *words]
    subprocess.run(command, env=cluster.environment(), cwd=cluster.ROOT, check=True)
    for page in ("README.md", "comparison.md"):
        again, before = ((folder / page).read_text() for folder in (home, tmp_path / "runs"))
        assert again.split("; ", 1)[1] == before.split("; ", 1)[1]  # but for the command
