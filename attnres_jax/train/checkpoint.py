"""Checkpoints of a run, in its folder `checkpoints/STEP`. All of Orbax stays behind this file."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx

from attnres_jax import configs
from attnres_jax.configs import Config
from attnres_jax.models.transformer import Transformer, abstract
from attnres_jax.train import state, workdir
from attnres_jax.train.data import open_corpus
from attnres_jax.train.state import State


class LoadedRun(NamedTuple):
    """A model as it was after `step` updates."""

    config: Config
    model: Transformer
    step: int


class Checkpoints:
    """The newest `keep` checkpoints; saving goes on in the background until the block is left."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def save(self, now: State) -> None:
        """Copy the state at once, write it in the background; a step that is there already stays."""
        step = int(now.step)
        if step in self._manager.all_steps():
            return
        items = {"params": now.params, "optimizer": now.opt_state}
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**saves), force=True)

    def restore(self, like: State) -> State | None:
        """The newest state, of the shapes of `like`; None where nothing is saved."""
        step = self._manager.latest_step()
        if step is None:
            return None
        items = {"params": like.params, "optimizer": like.opt_state}
        loads = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**loads))
        return State(jax.numpy.int32(step), found["params"], found["optimizer"])


def load_run(folder: Path, step: int | None = None) -> LoadedRun:
    """The model of a run after `step` updates (None: the newest); `RunError` where there is none."""
    config = workdir.load_config(folder)
    model = configs.model_config(config, open_corpus(config.data.corpus).vocab)
    saved = folder / workdir.CHECKPOINTS
    step = _choose(folder, step, ocp.utils.checkpoint_steps(saved) if saved.is_dir() else [])
    like = nnx.to_pure_dict(nnx.state(abstract(model)))
    with ocp.StandardCheckpointer() as reader:
        params = reader.restore(saved.absolute() / str(step) / "params", like)
    return LoadedRun(config, state.merge(model, params), step)


def _choose(folder: Path, step: int | None, steps: Sequence[int]) -> int:
    if not steps:
        raise workdir.RunError(f"{folder} has no checkpoint yet: the same train command continues it")
    if step is not None and step not in steps:
        there = ", ".join(map(str, sorted(steps)))
        raise workdir.RunError(f"{folder} has no checkpoint of step {step}; there are: {there}")
    return max(steps) if step is None else step
