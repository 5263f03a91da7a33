"""Checkpoints of a run, in its folder `checkpoints/STEP`. All of Orbax stays behind this file.

A checkpoint is written under another name, checksummed and renamed: it is whole or absent. One that is
damaged later is reported and put aside as `damaged-STEP-1`, and the one before is taken.
"""

import itertools
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from attnres_jax import configs
from attnres_jax.configs import Config
from attnres_jax.models.transformer import Transformer
from attnres_jax.parallel import processes
from attnres_jax.train import checksums, state, workdir
from attnres_jax.train.data import open_corpus
from attnres_jax.train.state import State


class LoadedRun(NamedTuple):
    """A model as it was after `step` updates, on the first device."""

    config: Config
    model: Transformer
    step: int


class Checkpoints:
    """The newest `keep` checkpoints and every `keep_every`-th step (0: none).

    Saving goes on in the background until the block is left; a `RunError` says which save failed and why.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0):
        self._folder = folder.absolute()
        if processes.first():
            _put_damaged_aside(self._folder)
        processes.meet("checkpoints are whole")
        _hush_orbax()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._before_renaming),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        if failed is None:
            self._told(self._manager.close)
        else:  # what is being written may still be finished; a second failure would hide the first
            self._told(self._manager.close, raises=False)

    def save(self, now: State) -> bool:
        """Copy the state at once, write it in the background; False where the step is there already."""
        step = int(now.step)
        if step in self._manager.all_steps():
            return False
        items = {"params": now.params, "optimizer": now.opt_state}
        saves = ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()})
        self._told(lambda: self._manager.save(step, args=saves, force=True))
        return True

    def restore(self, like: State) -> State | None:
        """The newest state, of the shapes and on the devices of `like`; None where nothing is saved."""
        newest = self._manager.latest_step()
        step = processes.agree(-1 if newest is None else newest)
        if step < 0:
            return None
        items = {"params": like.params, "optimizer": like.opt_state}
        loads = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**loads))
        return State(
            jax.device_put(jax.numpy.int32(step), like.step.sharding), found["params"], found["optimizer"]
        )

    def _before_renaming(self):
        if processes.first():
            for draft in self._folder.glob("*.orbax-checkpoint-tmp*"):  # saves come one by one
                checksums.write(draft)

    def _told(self, do: Callable[[], Any], raises: bool = True) -> None:
        """Run `do`; what fails in it is a checkpoint that could not be written."""
        try:
            do()
        except (OSError, ValueError) as error:
            # Orbax raises what TensorStore could not write as ValueError.
            if isinstance(error, ValueError) and "os_error_code" not in str(error):
                raise
            if raises:
                raise workdir.RunError(_unwritten(self._folder, str(error))) from None


def load_run(folder: Path, step: int | None = None) -> LoadedRun:
    """The model of a run after `step` updates (None: the newest); `RunError` where there is none."""
    config = workdir.load_config(folder)
    model = configs.model_config(config, open_corpus(config.data.corpus).vocab)
    step = choose(folder, step)
    params = parameters(folder, step, _on_first_device(state.shapes(model)))
    return LoadedRun(config, state.merge(model, params), step)


def choose(folder: Path, step: int | None) -> int:
    """`step`, or the newest; `RunError` where a run has no such checkpoint, or a damaged one."""
    saved = folder / workdir.CHECKPOINTS
    steps = _steps(saved)
    if not steps:
        raise workdir.RunError(f"{folder} has no checkpoint yet: the same train command continues it")
    if step is not None and step not in steps:
        there = ", ".join(map(str, sorted(steps)))
        raise workdir.RunError(f"{folder} has no checkpoint of step {step}; there are: {there}")
    step = max(steps) if step is None else step
    if damage := checksums.damage(saved / str(step)):
        raise workdir.RunError(
            f"the checkpoint of step {step} in {folder} is damaged ({damage}): name another with --step"
        )
    return step


def parameters(folder: Path, step: int, like: Any) -> Any:
    """Those of a checkpoint that is there, of the shapes and on the devices of `like`; `RunError` where the
    corpus has become one of another vocabulary."""
    path = folder.absolute() / workdir.CHECKPOINTS / str(step) / "params"
    _hush_orbax()
    with ocp.StandardCheckpointer() as reader:
        stored = jax.tree.leaves(reader.metadata(path).item_metadata.tree)
        # Asked before: a restore that fails leaves reads behind.
        if [leaf.shape for leaf in stored] != [leaf.shape for leaf in jax.tree.leaves(like)]:
            raise workdir.RunError(
                f"the parameters of step {step} in {folder} are of another vocabulary than the corpus has "
                "now: put the corpus back that it was trained on"
            )
        return reader.restore(path, like)


def _hush_orbax() -> None:
    """It logs a failure, and raises it; and that a file is missing which it never wrote."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def _put_damaged_aside(folder: Path) -> None:
    damaged: dict[int, str] = {}
    for step in sorted(_steps(folder), reverse=True):
        damage = checksums.damage(folder / str(step))
        if damage is None:
            break
        damaged[step] = damage
    else:
        if damaged:
            step, damage = next(iter(damaged.items()))
            raise workdir.RunError(
                f"no checkpoint in {folder} is whole, the newest of step {step} because {damage}: bring one "
                "back from a copy, or train into another --workdir"
            )
    for step, damage in damaged.items():
        names = (folder / f"damaged-{step}-{n}" for n in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        print(f"{folder / str(step)} is damaged ({damage}): put aside as {aside.name}", file=sys.stderr)
        (folder / str(step)).rename(aside)


def _steps(saved: Path) -> list[int]:
    return ocp.utils.checkpoint_steps(saved) if saved.is_dir() else []


def _on_first_device(tree):
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


def _unwritten(folder, error):
    kept = [s for s in _steps(folder) if checksums.damage(folder / str(s)) is None]
    found = re.search(r": ([^:]+) \[os_error_code", error)  # the end of TensorStore's long message
    why = found[1] if found else error
    last = f"the last good one is of step {max(kept)}" if kept else "there is none yet"
    return (
        f"a checkpoint could not be written ({why}); {last}. "
        f"Make room for {folder}: the same command goes on from there"
    )
