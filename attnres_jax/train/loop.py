"""The training loop. Variants are configs or models, never another loop."""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnres_jax import choice, residuals
from attnres_jax.configs import Config
from attnres_jax.parallel import processes
from attnres_jax.parallel.mesh import from_rows, placement
from attnres_jax.train import stopping, workdir
from attnres_jax.train.checkpoint import Checkpoints
from attnres_jax.train.data import Batches, Corpus, open_corpus, train_batches
from attnres_jax.train.evaluate import heldout
from attnres_jax.train.metrics import MetricLog
from attnres_jax.train.state import State
from attnres_jax.train.step import Programs, Updated, check_finite, programs
from attnres_jax.train.trace import Trace
from pallas_kernels.depth_merge import vjp as depth_merge
from pallas_kernels.depth_mix import vjp as depth_mix


def train(config: Config, folder: Path, devices: Sequence[Any] | None = None) -> bool:
    """Train, or continue what stands in `folder`, until the end, `train.stop_after` or a signal.

    On the mesh of the config over `devices` (None: all there are), with all processes together. Whether the
    run is at its end.
    """
    since = time.perf_counter()
    with stopping.lost_processes(), workdir.disk(folder), stopping.signals() as stop:
        return _train(config, folder, devices, stop, since)


def _train(config, folder, devices, stop, since):
    # To resume: 1. the folder holds this config, or none yet.
    workdir.claim(folder, config)
    # 2. The text is whole.
    corpus = open_corpus(config.data.corpus)
    batches = train_batches(corpus.train, config.data.length, config.data.batch, config.seed)
    run = programs(config, corpus.vocab, devices, corpus.end)
    keep = config.checkpoint
    with Checkpoints(folder / workdir.CHECKPOINTS, keep.keep, keep.keep_every) as checkpoints:
        # 3. The newest checkpoint that is whole, on this mesh, or the beginning.
        state = _resumed(checkpoints, run) or run.create()
        start, steps = int(state.step), config.train.steps
        if workdir.finished(folder, start, steps):
            _say(f"{folder} is finished: {steps} updates; nothing to do")
            return True
        _say(_announcement(folder, config, state, run))
        # 4. The log as it was then.
        log = MetricLog(folder, start, config, run, corpus, since)
        with log, Trace(folder / workdir.PROFILE, config.profile.first, config.profile.last) as trace:
            log.time(start)
            loop = Loop(config, run, corpus, checkpoints, log)
            # 5. Batches from there on: the step is their position.
            finished = loop.to_the_end(state, batches, stop, trace, folder)
        _say(log.spent())
        return finished


def _resumed(checkpoints, run):
    """In a function of its own: no name keeps what was restored beside what is made of it."""
    found = checkpoints.restore(run.stored)
    return found and run.resume(found)


class Loop(NamedTuple):
    """Of one run, or of several seeds (`together`), whose parts do for each what is said once here."""

    config: Config
    run: Programs
    corpus: Corpus
    checkpoints: Checkpoints
    log: MetricLog

    def to_the_end(
        self, state: State, batches: Batches, stop: stopping.Stop, trace: Trace, folder: Path
    ) -> bool:
        """`steps`, and `finish` where they were the last; whether they were."""
        state = self.steps(state, batches, stop, trace)
        finished = int(state.step) == self.config.train.steps
        if finished:
            self.finish(state, folder)
        elif stop.why:
            _say(f"{stop.why}: saved step {int(state.step)}; the same command continues it")
        self.log.time(int(state.step))
        return finished

    def steps(self, state: State, batches: Batches, stop: stopping.Stop, trace: Trace) -> State:
        """Update from `state.step` on; `batches` gives the tokens of a step."""
        every, waiting, update = self.config.train, [], None
        at, last, clock = int(state.step), every.stop_after or every.steps, self.log.clock
        while at < last and not stop.now(at):
            trace.before(at + 1, partial(self._settle, waiting))
            with clock.section("input"):
                batch = from_rows(self.run.place, batches.shape, partial(batches.rows, at))
            update = update or self._compiled(state, batch)
            with jax.profiler.StepTraceAnnotation("train", step_num=at + 1):
                state, out = update(state, batch)
            self._settle(waiting)  # the step before, while this one runs
            at += 1
            waiting.append((at, out))
            look, evaluate = at % every.depth_every == 0, at % every.eval_every == 0
            if look or evaluate:
                self._settle(waiting)  # nothing is looked at that is not finite
            with clock.section("evaluation"):
                if look:
                    self.log.depth(at, out, jax.device_get(self.run.look(state.params, batch)))
                if evaluate and at < every.steps:
                    self.log.evaluation(at, self.heldout(state))
            if at % self.config.checkpoint.every == 0:
                self._save(state, waiting)
        self._save(state, waiting)
        return state

    def finish(self, state: State, folder: Path) -> None:
        """The evaluation after the last step."""
        with self.log.clock.section("evaluation"):
            found = self.heldout(state)
        self.log.evaluation(int(state.step), found)
        if processes.first():
            workdir.write_json(folder / workdir.EVALUATION, {"step": int(state.step)} | found._asdict())

    def heldout(self, state: State) -> Any:
        """What the log and the folder are told of held-out text."""
        limit = self.config.train.eval_tokens
        nats = partial(self.run.nats, state.params)
        return heldout(nats, self.config, self.corpus, limit, self.run.place)

    def _save(self, state, waiting):
        self._settle(waiting)  # what is saved is finite
        with self.log.clock.section("checkpoint"):
            saved = self.checkpoints.save(self.run.save(state))
        if saved:
            self.log.time(int(state.step))

    def _compiled(self, state, batch):
        start = time.perf_counter()
        with self.log.clock.section("compile"):
            update = self.run.update.lower(state, batch).compile()
        self.log.ready()
        _say(f"compiled the step in {time.perf_counter() - start:.1f} s")
        return update

    def _settle(self, waiting: list[tuple[int, Updated]]) -> None:
        while waiting:
            step, out = waiting.pop(0)
            out = jax.device_get(out)
            self.check(step, out)
            self.log.train(step, out)

    def check(self, step: int, out: Updated) -> None:
        """Raise `NonFinite` where training diverged."""
        check_finite(step, out, self.run.names)


def _announcement(folder, config, state, run):
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    read = residuals.SCHEMES[config.residual].reads
    size = f" of S = {config.block_size}" if "block_size" in read else ""
    model, devices = run.model, run.mesh.devices.ravel()
    dtype, unfit = jnp.dtype(model.dtype), model.scheme.no_kernel
    ran = choice.choose(None, placement(run.mesh), dtype, partial(_refusal, model, dtype), unfit)
    axes = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1)
    mesh = f" ({axes}; {jax.process_count()} processes)" if axes else ""
    return (
        f"{folder}: {config.residual} residual{size}, {run.model.sublayers} sublayers, {count:,} parameters, "
        f"updates {int(state.step)} to {config.train.steps}, {config.data.batch} x {config.data.length} "
        f"tokens each, on {devices.size} x {devices[0].device_kind}{mesh} with JAX {jax.__version__}; "
        f"depth mixing: {ran.implementation} ({ran.reason})"
    )


def _refusal(model, dtype, kernel):
    """What a kernel has against the reads of the last block."""
    sizes = model.scheme.schedule(model.sublayers).sizes
    of_mix = depth_mix.refusal(max(sizes), len(sizes) + 1, model.width, dtype, kernel)
    return of_mix or depth_merge.refusal(model.width, dtype, kernel)


def _say(line):
    if processes.first():
        print(line, file=sys.stderr, flush=True)
