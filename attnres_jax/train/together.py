"""Several seeds of one config in one program: `vmap` over states and batches, a run's folder for each seed.

The loop is `loop.Loop`; here are its parts for K seeds. A folder is what training that seed alone makes, to
fp32 rounding, and can go on alone. On one device. Worth it where one small model leaves the device idle; on
two CPU cores two processes are faster (configs/LOG.md).
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnres_jax import configs
from attnres_jax.configs import Config, ConfigError
from attnres_jax.train import stopping, workdir
from attnres_jax.train.checkpoint import Checkpoints
from attnres_jax.train.data import Batches, open_corpus, train_batches
from attnres_jax.train.evaluate import Evaluation, heldout
from attnres_jax.train.loop import Loop
from attnres_jax.train.metrics import MetricLog
from attnres_jax.train.state import State
from attnres_jax.train.step import Programs, check_finite, programs
from attnres_jax.train.trace import Trace


def train(config: Config, seeds: int, folder: Path, devices: Sequence[Any] | None = None) -> bool:
    """Train so many seeds, from the config's on, in `folder`/seed-N; stops and resumes as `loop.train` does.

    Whether the runs are at their end.

    Raises:
      ConfigError: on a mesh of several devices.
      RunError: where the seeds have made different numbers of updates, or as `loop.train` does.
    """
    since = time.perf_counter()
    with workdir.disk(folder), stopping.signals() as stop, contextlib.ExitStack() as stack:
        return _train(config, seeds, folder, devices, stop, stack, since)


def _train(config, seeds, folder, devices, stop, stack, since):
    folders, members = _folders(folder, config, seeds), [_seeded(config, k) for k in range(seeds)]
    for own, member in zip(folders, members, strict=True):
        workdir.claim(own, member)
    corpus, data, keep = open_corpus(config.data.corpus), config.data, config.checkpoint
    each = [programs(member, corpus.vocab, devices, corpus.end) for member in members]
    one = each[0]
    if one.mesh.size > 1:
        raise ConfigError(f"seeds train together on one device, not on {one.mesh.size}: set mesh.data=1")
    checkpoints = _Checkpoints(
        stack.enter_context(Checkpoints(own / workdir.CHECKPOINTS, keep.keep, keep.keep_every))
        for own in folders
    )
    state = checkpoints.restore(one.stored, folders) or _stacked([run.create() for run in each])
    start, steps = int(state.step), config.train.steps
    done = [workdir.finished(own, start, steps) for own in folders]
    if all(done):
        _say(f"{folder} is finished: {seeds} seeds, {steps} updates; nothing to do")
        return True
    log = _Logs(
        stack.enter_context(MetricLog(own, start, member, one, corpus, since))
        for own, member in zip(folders, members, strict=True)
    )
    trace = stack.enter_context(Trace(folder / workdir.PROFILE, config.profile.first, config.profile.last))
    _say(f"{folder}: {seeds} seeds of {config.residual} in one program, updates {start} to {steps}")
    log.time(start)
    batches = _Batches([train_batches(corpus.train, data.length, data.batch, m.seed) for m in members])
    parts: Any = (checkpoints, log)
    loop = _Loop(config, _together(one, seeds), corpus, *parts)
    return loop.to_the_end(state, batches, stop, trace, folder)


class _Loop(Loop):
    def heldout(self, state: State) -> list[Evaluation]:
        """One after the other: an evaluation is a forward pass."""
        limit = self.config.train.eval_tokens
        found = []
        for own in _apart(state):
            nats = partial(self.run.nats, own.params)
            found.append(heldout(nats, self.config, self.corpus, limit, self.run.place))
        return found

    def finish(self, state: State, folder: Path) -> None:
        """The evaluations after the last step."""
        with self.log.clock.section("evaluation"):
            found: Any = self.heldout(state)
        self.log.evaluation(int(state.step), found)
        for own, one in zip(_folders(folder, self.config, len(found)), found, strict=True):
            workdir.write_json(own / workdir.EVALUATION, {"step": int(state.step)} | one._asdict())

    def check(self, step, out) -> None:
        """Names the first seed whose numbers are not finite."""
        for k, own in enumerate(_each(out, len(out.loss))):
            try:
                check_finite(step, own, self.run.names)
            except configs.UserError as problem:
                raise type(problem)(f"seed {self.config.seed + k}: {problem}") from None


class _Batches(Batches):
    """The batches of all seeds, one below the other: [K B, T + 1]."""

    def __init__(self, each: Sequence[Batches]):
        self._each = each
        rows, width = each[0].shape
        self.shape = (len(each) * rows, width)

    def rows(self, step, first, last):
        """Of the one device, which holds them all."""
        return np.concatenate([one[step] for one in self._each])[first:last]


class _Checkpoints(tuple[Checkpoints, ...]):
    def save(self, now: State) -> bool:
        """Each seed's in its own folder."""
        saved = [own.save(state) for own, state in zip(self, _apart(now), strict=True)]
        return any(saved)

    def restore(self, like: State, folders: Sequence[Path]) -> State | None:
        """What all were at; None where none has begun."""
        found = [own.restore(like) for own in self]
        at = [0 if state is None else int(state.step) for state in found]
        if len(set(at)) > 1:
            stand = ", ".join(f"{folder.name} at {step}" for folder, step in zip(folders, at, strict=True))
            raise workdir.RunError(
                f"the seeds in {folders[0].parent} are at different updates ({stand}): continue each alone, "
                "by train with its --config.seed and --workdir"
            )
        return _stacked([state for state in found if state is not None]) if any(at) else None


class _Logs(tuple[MetricLog, ...]):
    """A log for each seed; what they are told has the seeds first."""

    @property
    def clock(self):
        """Of all of them."""
        return self

    @contextlib.contextmanager
    def section(self, what: str):
        """Each counts the time as its own."""
        with contextlib.ExitStack() as stack:
            for log in self:
                stack.enter_context(log.clock.section(what))
            yield

    def ready(self) -> None:
        """Compilation is over."""
        for log in self:
            log.ready()

    def train(self, step, out) -> None:
        """A row in each log."""
        for log, own in zip(self, _each(out, len(self)), strict=True):
            log.train(step, own)

    def depth(self, step, out, found) -> None:
        """A row in each log."""
        for log, own in zip(self, _each((jax.device_get(out), found), len(self)), strict=True):
            log.depth(step, *own)

    def evaluation(self, step, found) -> None:
        """A row in each log."""
        for log, own in zip(self, found, strict=True):
            log.evaluation(step, own)

    def time(self, step) -> None:
        """A row in each log."""
        for log in self:
            log.time(step)


def _together(one: Programs, seeds: int) -> Programs:
    """The programs of one seed, for all: seeds stand first in every leaf but the step, which they share."""

    def update(state, tokens):
        def own(params, opt_state, tokens):
            after, out = one.update(State(state.step, params, opt_state), tokens)
            return after.params, after.opt_state, out

        *parts, out = jax.vmap(own)(state.params, state.opt_state, apart(tokens))
        return State(state.step + 1, *parts), out

    def apart(tokens):
        return tokens.reshape(seeds, -1, tokens.shape[1])

    return one._replace(
        update=jax.jit(update, donate_argnums=0),
        look=jax.jit(lambda params, tokens: jax.vmap(one.look)(params, apart(tokens))),
    )


def _seeded(config, k):
    return configs.from_flat(configs.to_flat(config) | {"seed": config.seed + k})


def _folders(folder, config, seeds):
    return [folder / f"seed-{config.seed + k}" for k in range(seeds)]


def _stacked(states: Sequence[State]) -> State:
    params, opt = (
        jax.tree.map(lambda *a: jnp.stack(a), *trees)
        for trees in zip(*((state.params, state.opt_state) for state in states), strict=True)
    )
    return State(states[0].step, params, opt)


def _apart(state: State) -> list[State]:
    seeds = len(jax.tree.leaves(state.params)[0])
    own = _each((state.params, state.opt_state), seeds)
    return [State(state.step, *parts) for parts in own]


def _each(tree, seeds):
    return [jax.tree.map(lambda a, k=k: a[k], tree) for k in range(seeds)]


def _say(line):
    print(line, file=sys.stderr, flush=True)
