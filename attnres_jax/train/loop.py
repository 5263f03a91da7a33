"""The training loop. Variants are configs or models, never another loop."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from attnres_jax import configs, ops
from attnres_jax.configs import Config
from attnres_jax.train import workdir
from attnres_jax.train.checkpoint import Checkpoints
from attnres_jax.train.data import Corpus, open_corpus, train_batches
from attnres_jax.train.evaluate import heldout
from attnres_jax.train.metrics import MetricLog
from attnres_jax.train.state import State
from attnres_jax.train.step import Programs, Updated, check_finite, programs

LOOK = 4
"""Sequences of a batch that the statistics over depth are taken on."""


def train(config: Config, folder: Path) -> None:
    """Train, or continue what stands in `folder`, until the end, `train.stop_after` or a signal."""
    # To resume: 1. the folder holds this config, or none yet.
    workdir.claim(folder, config)
    # 2. The text is whole.
    corpus = open_corpus(config.data.corpus)
    batches = train_batches(corpus.train, config.data.length, config.data.batch, config.seed)
    run, model = programs(config, corpus.vocab, corpus.end), configs.model_config(config, corpus.vocab)
    with Checkpoints(folder / workdir.CHECKPOINTS, config.checkpoint.keep) as checkpoints:
        # 3. The newest checkpoint, or the beginning.
        state = checkpoints.restore(jax.eval_shape(run.create)) or run.create()
        if _finished(config, folder, state):
            _say(f"{folder} is finished: {config.train.steps} updates; nothing to do")
            return
        _say(_announcement(folder, config, state, model.sublayers))
        # 4. The log as it was then.
        log = MetricLog(folder, int(state.step), config, model, corpus)
        with log, _signals() as signals:
            loop = _Loop(config, run, corpus, checkpoints, log)
            # 5. Batches from there on: the step is their position.
            state = loop.steps(state, batches, signals)
            if int(state.step) == config.train.steps:
                workdir.write_json(folder / workdir.EVALUATION, loop.finish(state))
            elif signals:
                _say(f"{signals[0]}: saved step {int(state.step)}; the same command continues it")


class _Loop(NamedTuple):
    config: Config
    run: Programs
    corpus: Corpus
    checkpoints: Checkpoints
    log: MetricLog

    def steps(self, state: State, batches: Any, signals: Sequence[str]) -> State:
        """Update from `state.step` on; `batches[step]` are the tokens of a step."""
        every, waiting, update = self.config.train, [], None
        at, last = int(state.step), every.stop_after or every.steps
        while at < last and not signals:
            batch = batches[at]
            update = update or self._compiled(state, batch)
            state, out = update(state, batch)
            self._settle(waiting)  # the step before, while this one runs
            at += 1
            waiting.append((at, out))
            look, evaluate = at % every.depth_every == 0, at % every.eval_every == 0
            if look or evaluate:
                self._settle(waiting)  # nothing is looked at that is not finite
            if look:
                self.log.depth(at, out, self.run.look(state.params, batch[:LOOK]))
            if evaluate and at < every.steps:
                self.log.evaluation(at, self._heldout(state))
            if at % self.config.checkpoint.every == 0:
                self._save(state, waiting)
        self._save(state, waiting)
        return state

    def finish(self, state: State) -> dict[str, Any]:
        """The evaluation after the last step."""
        found = self._heldout(state)
        self.log.evaluation(int(state.step), found)
        return {"step": int(state.step)} | found._asdict()

    def _heldout(self, state):
        limit = self.config.train.eval_tokens
        return heldout(self.run.nats, self.config, self.corpus, limit, state.params)

    def _save(self, state, waiting):
        self._settle(waiting)  # what is saved is finite
        self.checkpoints.save(state)

    def _compiled(self, state, batch):
        start = time.perf_counter()
        update = self.run.update.lower(state, batch).compile()
        self.log.ready()
        _say(f"compiled the step in {time.perf_counter() - start:.1f} s")
        return update

    def _settle(self, waiting: list[tuple[int, Updated]]) -> None:
        while waiting:
            step, out = waiting.pop(0)
            out = jax.device_get(out)
            check_finite(step, out, self.run.names)
            self.log.train(step, out)


def _finished(config, folder, state):
    return int(state.step) == config.train.steps and (folder / workdir.EVALUATION).is_file()


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """The names of SIGTERM and SIGINT as they come; a second one ends the process at once."""
    names: list[str] = []

    def note(number, frame):
        names.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield names
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announcement(folder, config, state, sublayers):
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    size = f" of S = {config.block_size}" if config.residual == "block" else ""
    device, ran = jax.devices()[0], ops.choose()
    return (
        f"{folder}: {config.residual} residual{size}, {sublayers} sublayers, {count:,} parameters, "
        f"updates {int(state.step)} to {config.train.steps}, {config.data.batch} x {config.data.length} "
        f"tokens each, on {device.device_kind} with JAX {jax.__version__}; "
        f"depth mixing: {ran.implementation} ({ran.reason})"
    )


def _say(line):
    print(line, file=sys.stderr, flush=True)
