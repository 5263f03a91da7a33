"""A run as it was trained, ready to be asked: its parameters on its own mesh, where the devices are there."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from attnres_jax.configs import Config, ConfigError
from attnres_jax.parallel import mesh as meshes
from attnres_jax.parallel import processes
from attnres_jax.train import checkpoint, workdir
from attnres_jax.train.data import Corpus, open_corpus
from attnres_jax.train.step import Programs, programs


class Restored(NamedTuple):
    """After `step` updates; `params` lie as `run` takes them."""

    config: Config
    corpus: Corpus
    run: Programs
    params: Any
    step: int


def restore(folder: Path, step: int | None = None, devices: Sequence[Any] | None = None) -> Restored:
    """The parameters after `step` updates (None: the newest), on the run's mesh.

    One process takes as many of `devices` (None: all there are) as the mesh has; where they do not make it,
    or it does not divide what it cuts, the first device, and says so. Several take all, as they trained.

    Raises:
      RunError: where there is no such checkpoint.
      ConfigError: where the devices of several processes are not those of the mesh.
    """
    config = workdir.load_config(folder)
    corpus = open_corpus(config.data.corpus)
    step = _agreed(folder, step)
    run = _programs(config, corpus, devices or meshes.available())
    params = checkpoint.parameters(folder, step, run.stored.params)
    return Restored(config, corpus, run, run.resume(params), step)


def _agreed(folder, step):
    """The first process's choice, on all of them: a checkpoint may land meanwhile."""
    chosen, problem = -1, workdir.RunError(f"the first process could not take a checkpoint of {folder}")
    if processes.first():
        try:
            chosen = checkpoint.choose(folder, step)
        except workdir.RunError as error:
            problem = error
    chosen = processes.agree(chosen)
    if chosen < 0:
        raise problem
    return chosen


def _programs(config, corpus, devices):
    if jax.process_count() > 1:
        return programs(config, corpus.vocab, devices, corpus.end)
    sizes = config.mesh.to_dict().values()
    used = math.prod(size for size in sizes if size != meshes.REST)
    used = len(devices) // used * used if meshes.REST in sizes else used
    try:
        return programs(config, corpus.vocab, devices[: used or None], corpus.end)
    except ConfigError as problem:
        print(f"on one device, not on the mesh of the run: {problem}", file=sys.stderr)
        alone = config.copy_and_resolve_references()
        alone.mesh = dict.fromkeys(alone.mesh, 1)
        return programs(alone, corpus.vocab, devices[:1], corpus.end)
