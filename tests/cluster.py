"""Runs of a tiny model in processes of their own, one or several, for the tests of faults."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from attnres_jax.train import workdir

ROOT = Path(__file__).parent.parent
TINY = {
    "model.blocks": 2,
    "model.width": 16,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.mlp_width": 24,
    "data.length": 16,
    "data.batch": 8,
    "block_size": 2,
    "train.log_every": 1,
    "train.eval_tokens": 1000,
    "optim.warmup": 2,
}


def command(folder, **changes):
    """Train in `folder`; `steps` and what else is asked for."""
    steps = changes.get("train__steps", 6)
    flat = TINY | {"train.steps": steps} | {f"train.{key}_every": steps for key in ("depth", "eval")}
    flat |= {key.replace("__", "."): value for key, value in changes.items()}
    words = [f"--config.{key}={value}" for key, value in flat.items()]
    return [sys.executable, "-m", "attnres_jax", "train", "--config=quick", f"--workdir={folder}", *words]


def environment():
    """One CPU device a process; the compilation cache is the caller's, exact arithmetic all the same."""
    optimized = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    return os.environ | optimized | {"JAX_PLATFORMS": "cpu"}


def start(words, count=1):
    """One process, or `count` of them joined; stderr and stdout together."""
    cluster = [str(ROOT / "launch/local_cluster.sh"), str(count), "--"] if count > 1 else []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(cluster + words, env=environment(), cwd=ROOT, start_new_session=True, **pipes)


def ended(process, seconds):
    """All that a process of `start` said; none of its workers is left, even if it is not done by then."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def run(words, count=1):
    """Until it ends; (exit code, all it said)."""
    process = start(words, count)
    said = ended(process, 300)
    return process.returncode, said


def wait_for_step(folder, step, process):
    """Until the log of the run has that step."""
    while not any(row["kind"] == "train" and row["step"] >= step for row in workdir.read_rows(folder)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def member(folder, number):
    """The process id of the worker `number` of the run in `folder`."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = ((place / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:  # it ended meanwhile
            continue
        mine = f"--workdir={folder}".encode() in words and b"bash" not in words[0]
        if mine and f"JAX_PROCESS_ID={number}".encode() in variables:
            return int(place.name)
    raise AssertionError(f"no worker {number} of {folder}")


def losses(folder):
    return {row["step"]: row["loss"] for row in workdir.read_rows(folder) if row["kind"] == "train"}


def finished(folder):
    """Steps of the checkpoints that have their names."""
    saved = folder / workdir.CHECKPOINTS
    return sorted(int(p.name) for p in saved.iterdir() if p.name.isdecimal()) if saved.is_dir() else []
