"""A run as it was trained, ready to be asked: its parameters on its own mesh, where the devices are there."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from attnres_jax.configs import Config, ConfigError
from attnres_jax.parallel import mesh as meshes
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

    That takes the first of `devices` (None: all there are); where they do not make the mesh, one process
    computes on the first device, and says so.

    Raises:
      RunError: where there is no such checkpoint.
      ConfigError: where several processes do not have the devices of the mesh.
    """
    config = workdir.load_config(folder)
    corpus = open_corpus(config.data.corpus)
    step = checkpoint.choose(folder, step)
    run = _programs(config, corpus, devices or meshes.available())
    params = checkpoint.parameters(folder, step, run.stored.params)
    return Restored(config, corpus, run, run.resume(params), step)


def _programs(config, corpus, devices):
    sizes = config.mesh.to_dict().values()
    used = math.prod(size for size in sizes if size != meshes.REST)
    used = len(devices) // used * used if meshes.REST in sizes else used
    try:
        return programs(config, corpus.vocab, devices[: used or None], corpus.end)
    except ConfigError as problem:
        if jax.process_count() > 1:
            raise
        alone = config.copy_and_resolve_references()
        alone.mesh = dict.fromkeys(alone.mesh, 1)
        run = programs(alone, corpus.vocab, jax.local_devices()[:1], corpus.end)
        print(f"on one device, not on the mesh of the run: {problem}", file=sys.stderr)
        return run
