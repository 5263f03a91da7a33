"""The trainer: one update, exact resume, and what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys
from flax import nnx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attnres_jax import __main__, configs
from attnres_jax.train import checkpoint, data, loop, metrics, optim, step, workdir
from attnres_jax.train.checkpoint import Checkpoints

VOCAB, STEPS = 23, 4
TINY = {
    "model.blocks": 3,
    "model.width": 16,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.mlp_width": 24,
    "data.length": 12,
    "data.batch": 4,
    "block_size": 2,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.depth_every": 2,
    "train.eval_every": 2,
    "train.eval_tokens": 100,
    "optim.warmup": 2,
    "checkpoint.every": 2,
}


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Many tests start a run of the same config: its programs are compiled once, and quickly."""
    options = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache"))}
    options |= {"jax_persistent_cache_min_compile_time_secs": 0.1}
    options |= {"jax_disable_most_optimizations": True}
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text with a rule (each token is the one before plus 0 to 2), so that it can be learned."""
    folder = tmp_path_factory.mktemp("data") / "corpus"
    steps = np.random.default_rng(0).integers(0, 3, 3000)
    text = np.cumsum(steps) % VOCAB
    data.prepare(folder, text[:2500], text[2500:], vocab=VOCAB, source="rule")
    return folder


@pytest.fixture
def tiny(corpus):
    """A config of a network that compiles in a moment."""

    def make(**changes):
        flat = configs.to_flat(configs.base.get_config()) | TINY | {"data.corpus": str(corpus)}
        return configs.from_flat(flat | {k.replace("__", "."): v for k, v in changes.items()})

    return make


def restored(config, folder):
    """The newest state in a folder, as numpy."""
    run = step.programs(config, VOCAB)
    with Checkpoints(folder / workdir.CHECKPOINTS, 2) as checkpoints:
        return jax.device_get(checkpoints.restore(jax.eval_shape(run.create)))


def rows(folder, kind):
    return [row for row in workdir.read_rows(folder) if row["kind"] == kind]


def losses(folder):
    return {row["step"]: row["loss"] for row in rows(folder, "train")}


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# One update -------------------------------------------------------------------------------------


def test_accumulation_is_one_batch(tiny):
    """The same update, loss and norms to fp32 rounding from two microbatches as from one."""
    tokens = data.open_corpus(tiny().data.corpus).train[: 4 * 13].reshape(4, 13).astype(np.int32)

    def update(count):
        run = step.programs(tiny(train__accumulation=count), VOCAB)
        state, out = run.update(run.create(), tokens)
        return state.opt_state, out

    oracle.assert_close(update(2), update(1), 1e-5)


def test_update_reports_its_gradient(tiny):
    """Loss and norms against a plain value_and_grad of what the config asks for, written out; z-loss is
    not in the loss that is reported. The step is counted."""
    config, end = tiny(optim__z_loss=0.1, data__segments=True), 4
    run, tokens = step.programs(config, VOCAB, end=end), np.tile(np.arange(13, dtype=np.int32), (4, 1))
    seen = [jnp.asarray(np.tile(row, (4, 1))) for row in ([0] * 5 + [1] * 7, [*range(5), *range(7)])]
    state = run.create()

    def loss(params):
        model = step.state.merge(configs.model_config(config, VOCAB), params)
        logits = model(jnp.asarray(tokens[:, :-1]), *seen).logits
        keep, log_z = np.arange(12) != end, jax.nn.logsumexp(logits, -1)
        nats = log_z - jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        nats = jnp.mean(nats[:, keep])
        return nats + 0.1 * jnp.mean(log_z[:, keep] ** 2), nats

    (_, value), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    after, out = run.update(state, tokens)
    np.testing.assert_allclose(out.loss, value, rtol=1e-6)
    norms = {name: np.linalg.norm(leaf) for name, leaf in toys.named(gradient).items()}
    assert set(run.names) == set(norms) == set(out.leaf_norms)
    assert run.names[0] == "embed/embedding"
    np.testing.assert_allclose([out.leaf_norms[n] for n in norms], [*norms.values()], rtol=1e-4)
    attention = gradient["layers"]["a"]
    second = np.sqrt(sum(np.sum(np.square(leaf[1])) for leaf in jax.tree.leaves(attention)))
    np.testing.assert_allclose(out.depth_norms[2], second, rtol=1e-4)
    assert after.step == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masters_are_fp32(tiny, dtype):
    config = tiny(model__dtype=dtype)
    run = step.programs(config, VOCAB)
    tokens = jax.ShapeDtypeStruct((4, 13), np.int32)
    state, out = jax.eval_shape(run.update, jax.eval_shape(run.create), tokens)
    kept = [leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim]
    assert set(kept) == {jnp.dtype("float32")}
    assert out.loss.dtype == jnp.float32
    model = configs.model_config(config, VOCAB)
    h = jax.eval_shape(lambda p, t: step.state.merge(model, p)(t).depth.h, state.params, tokens)
    assert h.dtype == dtype


def test_the_first_bad_leaf_in_forward_order():
    good, bad = jnp.float32(1), jnp.float32(jnp.nan)
    norms = {"a": good, "b": bad, "c": bad}
    out = step.Updated(good, norms, jnp.ones(2))
    with pytest.raises(step.NonFinite, match=r"step 7: .*gradient of c is the first") as error:
        step.check_finite(7, out, ("a", "c", "b"))
    assert "\n" not in str(error.value)
    step.check_finite(7, out._replace(leaf_norms={"a": good}), ("a",))
    with pytest.raises(step.NonFinite, match=r"loss inf is not finite; all gradients are"):
        step.check_finite(7, step.Updated(jnp.float32(jnp.inf), {"a": good}, jnp.ones(2)), ("a",))


# Whole runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run of STEPS updates in one go."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    flat = configs.to_flat(configs.base.get_config()) | TINY | {"data.corpus": str(corpus)}
    loop.train(configs.from_flat(flat), folder)
    return folder


def test_what_a_run_leaves(whole, tiny):
    assert set(losses(whole)) == set(range(1, STEPS + 1))
    assert [row["step"] for row in rows(whole, "eval")] == [2, 4]
    assert [row["step"] for row in rows(whole, "depth")] == [2, 4]
    evaluation = json.loads((whole / "eval.json").read_text())
    assert (evaluation["step"], evaluation["tokens"]) == (STEPS, 100)
    assert evaluation["loss"] == rows(whole, "eval")[-1]["loss"]
    assert workdir.load_config(whole) == tiny()
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {"2", "4"}
    depth = rows(whole, "depth")[-1]
    assert len(depth["output_rms"]) == len(depth["gradient_norm"]) == 6
    np.testing.assert_allclose(np.sum(depth["weights"], 1), 1, rtol=1e-5)


def test_rows_of_the_training_loss(whole, tiny):
    row = rows(whole, "train")[2]
    assert row["bits_per_byte"] == pytest.approx(row["loss"] / np.log(2))
    assert row["learning_rate"] == pytest.approx(float(optim.learning_rate(tiny())(2)))
    assert row["tokens_per_s"] > 0
    assert row["gradient_norm"] > 0


def test_tensorboard_has_every_curve(whole):
    board = EventAccumulator(str(whole / "tensorboard")).Reload()
    tags = board.Tags()
    names = ("loss", "bits_per_byte", "tokens_per_s", "learning_rate", "gradient_norm")
    wanted = {f"train/{name}" for name in names} | {"eval/bits_per_byte"}
    wanted |= {f"{name}/006" for name in ("output_rms", "gradient_norm", "entropy")}
    assert wanted <= set(tags["scalars"])
    assert tags["images"] == ["weights"]
    image = board.Images("weights")[-1]
    assert (image.step, image.width > 500) == (STEPS, True)
    curve = [event.value for event in board.Scalars("train/loss")]
    np.testing.assert_allclose(curve, [*losses(whole).values()], rtol=1e-6)


def test_a_finished_run_is_left_alone(whole, tiny, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != "config.json"}
    loop.train(tiny(), whole)
    assert "is finished" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_stop_and_resume_bit_for_bit(whole, tiny, tmp_path, capsys):
    loop.train(tiny(train__stop_after=2), tmp_path / "run")
    assert not (tmp_path / "run/eval.json").exists()
    loop.train(tiny(), tmp_path / "run")
    assert "updates 2 to 4" in capsys.readouterr().err
    check_same_run(tmp_path / "run", whole, tiny())


@pytest.mark.slow
def test_other_choices_stop_and_resume_bit_for_bit(tiny, tmp_path):
    """Muon's state too is saved whole."""
    changes = {"optim__name": "muon", "optim__schedule": "wsd", "optim__decay": 1}
    changes["train__vocab_chunks"] = VOCAB
    for stops in ((STEPS,), (2, STEPS)):
        for stop in stops:
            config = tiny(**changes, optim__z_loss=1e-3, train__accumulation=2, train__stop_after=stop)
            loop.train(config, tmp_path / str(len(stops)))
    check_same_run(tmp_path / "2", tmp_path / "1", tiny(**changes))


def test_the_clock_goes_on(whole, tiny, tmp_path):
    """Time of a resumed run counts what was spent before."""
    loop.train(tiny(train__stop_after=2), tmp_path / "run")
    before = rows(tmp_path / "run", "train")[-1]
    path = tmp_path / "run/metrics.jsonl"
    path.write_text(path.read_text().replace(str(before["seconds"]), "1000.0"))
    loop.train(tiny(), tmp_path / "run")
    assert rows(tmp_path / "run", "train")[-1]["seconds"] > 1000


def check_same_run(folder, whole, config):
    """State, losses, statistics and evaluation are those of the run in one go."""
    check_same_run_values(folder, whole, config)
    for kind in ("depth", "eval"):
        assert rows(folder, kind) == rows(whole, kind)
    assert (folder / "eval.json").read_text() == (whole / "eval.json").read_text()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from attnres_jax import configs
from attnres_jax.train import loop, metrics, workdir
folder, kill_at = Path(sys.argv[1]), int(sys.argv[2])
train = metrics.MetricLog.train
def dying(self, step, out):
    train(self, step, out)
    while step == kill_at:  # what was saved before is on disk by then
        if (folder / "checkpoints/2").is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
metrics.MetricLog.train = dying
import jax
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)
loop.train(configs.from_flat(__import__("json").loads(sys.argv[3])), folder)
"""


def test_kill_and_resume_bit_for_bit(whole, tiny, tmp_path, capsys):
    """SIGKILL in step 3, another process goes on from step 2; rows of the lost step are made anew."""
    folder, config = tmp_path / "run", tiny()
    words = [str(folder), "3", json.dumps(configs.to_flat(config))]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert max(losses(folder)) == 3
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "train", "st')  # a line cut off
    loop.train(config, folder)
    assert "updates 2 to 4" in capsys.readouterr().err
    check_same_run(folder, whole, config)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_save_and_stop(whole, tiny, tmp_path, monkeypatch, number, capsys):
    folder, train = tmp_path / "run", metrics.MetricLog.train

    def signalled(self, step, out):
        if step == 1:
            os.kill(os.getpid(), number)
        train(self, step, out)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricLog, "train", signalled)
        loop.train(tiny(), folder)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert f"{number.name}: saved step" in capsys.readouterr().err
    assert 1 <= restored(tiny(), folder).step < STEPS
    loop.train(tiny(), folder)
    check_same_run_values(folder, whole, tiny())


def check_same_run_values(folder, whole, config):
    """No row of the log twice, none missing."""
    steps = [[row["step"] for row in rows(run, "train")] for run in (folder, whole)]
    assert steps[0] == steps[1]
    assert losses(folder) == losses(whole)
    assert_same(restored(config, folder), restored(config, whole))


def test_the_evaluation_is_made_up_for(whole, tiny, tmp_path):
    """Killed between the last checkpoint and the evaluation: the next start only evaluates."""
    loop.train(tiny(), tmp_path / "run")
    (tmp_path / "run/eval.json").unlink()
    loop.train(tiny(), tmp_path / "run")
    assert (tmp_path / "run/eval.json").read_text() == (whole / "eval.json").read_text()


def test_another_config_is_refused(whole, tiny, capsys):
    for change, named in (
        ({"optim__lr": 0.5}, "optim.lr = 0.004, not 0.5"),
        ({"seed": 3}, "seed = 0"),
    ):
        with pytest.raises(workdir.RunError, match=named) as error:
            loop.train(tiny(**change), whole)
        assert "\n" not in str(error.value)
    loop.train(tiny(train__log_every=3, checkpoint__keep=5, train__stop_after=1), whole)  # no matter


def test_a_workdir_that_is_no_folder(tiny, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(workdir.RunError, match=r"cannot be written .*take another --workdir"):
            workdir.claim(path, tiny())


def test_divergence_stops_the_run(tiny, tmp_path, capsys):
    """One line, exit code 2, and no checkpoint of what is not finite."""
    flat = configs.to_flat(tiny(optim__lr=1e38, optim__warmup=1, checkpoint__every=1))
    words = [f"--config.{key}={value}" for key, value in flat.items()]
    assert __main__.main(["train", "--config=quick", f"--workdir={tmp_path}", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step ")
    assert "is the first that is not" in error
    state = restored(tiny(), tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_saved_state_is_a_copy(tiny, tmp_path):
    """Training goes on in the same memory while a checkpoint is written."""
    config = tiny(checkpoint__every=1, checkpoint__keep=STEPS)
    run, folder = step.programs(config, VOCAB), tmp_path / workdir.CHECKPOINTS
    tokens, state, states = np.zeros((4, 13), np.int32), run.create(), {}
    with Checkpoints(folder, STEPS) as checkpoints:
        for at in range(1, STEPS + 1):
            state, _ = run.update(state, tokens)
            states[at] = jax.tree.map(np.array, state.params)
            checkpoints.save(state)
    workdir.write_json(tmp_path / "config.json", configs.to_flat(config))
    for at, params in states.items():
        loaded = checkpoint.load_run(tmp_path, at)
        assert loaded.step == at
        assert_same(nnx.to_pure_dict(nnx.state(loaded.model)), params)


def test_which_checkpoint(whole, tmp_path):
    assert checkpoint.load_run(whole).step == STEPS
    assert checkpoint.load_run(whole, 2).step == 2
    with pytest.raises(workdir.RunError, match=r"no checkpoint of step 3; there are: 2, 4"):
        checkpoint.load_run(whole, 3)
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    with pytest.raises(workdir.RunError, match="no checkpoint yet"):
        checkpoint.load_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(workdir.RunError, match=r"config.json is damaged"):
        checkpoint.load_run(tmp_path)


SCHEMES = ["block", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "full"))]


@pytest.mark.parametrize("residual", SCHEMES)
def test_it_learns(tiny, tmp_path, residual):
    """To near the text's own entropy, log 3 nats a token; log 23 is 3.1."""
    changes = {"train__steps": 120, "train__depth_every": 60, "optim__lr": 0.02, "optim__warmup": 5}
    config = tiny(residual=residual, **changes, checkpoint__every=120, train__log_every=10)
    loop.train(config, tmp_path / "run")
    assert np.log(3) - 0.05 < json.loads((tmp_path / "run/eval.json").read_text())["loss"] < 1.35


# Evaluation -------------------------------------------------------------------------------------


def test_eval_command(whole, tiny, capsys):
    """The whole held-out text, against a direct computation; the file and the table."""
    assert __main__.main(["eval", f"--workdir={whole}", "--step=2"]) == 0
    written = json.loads((whole / "eval-2.json").read_text())
    text = data.open_corpus(tiny().data.corpus).heldout.astype(np.int32)
    assert written["tokens"] == len(text) - 1 == 499
    model, starts = checkpoint.load_run(whole, 2).model, range(0, 499, 12)
    windows = np.stack([np.pad(text[at : at + 13], (0, max(0, at + 13 - 500))) for at in starts])
    logits = jax.jit(lambda model, tokens: model(tokens).logits)(model, windows[:, :-1])
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), windows[:, 1:, None], -1).ravel()
    total = -float(each[:499].sum())
    assert written["loss"] == pytest.approx(total / 499, rel=1e-5)
    out = capsys.readouterr().out
    assert f"{written['bits_per_byte']:.4f} bits/byte" in out
    assert [line for line in out.splitlines() if "8 to 12" in line]


def test_the_log_is_whole_or_as_before(tmp_path):
    path = Path(tmp_path) / "x.json"
    workdir.write_json(path, {"a": 1})
    workdir.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
