"""What the last model of a finished run does over depth, on held-out tokens, and the file that keeps it.

Where the checkpoints of a run are it is taken anew, for the analysis may have changed since, and kept in the
run's folder as reading.npz. Where they are not, it is what was kept: a run that was made elsewhere can be
compared, and its figures drawn again, without its checkpoints (three times the parameters) and its text.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnres_jax.analysis.dynamics import DepthStatistics, depth_statistics
from attnres_jax.analysis.evidence import Look
from attnres_jax.analysis.matrix import diagonal, one_token
from attnres_jax.analysis.outputs import Shares, shares, without_each
from attnres_jax.models.table import parameter_table
from attnres_jax.train import checkpoint, workdir
from attnres_jax.train.data import heldout_windows, open_corpus

FILE = "reading.npz"
WINDOWS = 4
"""Held-out windows that the statistics over depth are taken on."""
SKIPPED = 32
"""Those that the loss without a sublayer is taken on."""


class Reading(NamedTuple):
    """Of one run."""

    device: str
    """That it was taken on, with JAX's version, in words."""
    parameters: int
    statistics: DepthStatistics
    matrix: np.ndarray
    """M of the last token of the first held-out window, [L+1, L+1]: what a channel passes on to itself, in
    the mean over channels."""
    look: Look | None
    """Only where asked for: L + 1 losses."""


def take_all(folders: Sequence[Path], deep: Sequence[bool], at_once: int = 1) -> list[Reading]:
    """`take` of each, some at a time: what they wait for is the compiler, which uses one core."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(take, folders, deep))


def take(folder: Path, deep: bool) -> Reading:
    """Of the run in `folder`; with a `look` if `deep`. `RunError` if there is neither model nor file."""
    file = folder / FILE
    if (folder / workdir.CHECKPOINTS).is_dir() or not file.is_file():
        reading = _taken(folder, deep)
        _keep(reading, file)
        return reading
    reading = _kept(file)
    if deep and reading.look is None:
        raise workdir.RunError(
            f"{file} is without the losses that pages of evidence need, and {folder} has no "
            f"{workdir.CHECKPOINTS} to take them from: bring these too"
        )
    return reading


def _taken(folder, deep):
    loaded = checkpoint.load_run(folder)
    model, config = loaded.model, loaded.config
    statistics, matrix = jax.device_get(_depth(model, _first_windows(config, WINDOWS)))
    count = sum(int(np.prod(p.shape)) for p in parameter_table(model))
    look = Look(*jax.device_get(_look(model, _first_windows(config, SKIPPED)))) if deep else None
    return Reading(_device(), count, statistics, matrix, look)


def _device():
    kind = jax.devices()[0].device_kind
    return f"{f'{os.cpu_count()} CPU cores' if kind == 'cpu' else f'one {kind}'}, JAX {jax.__version__}"


@jax.jit
def _depth(model, tokens):
    record = model(tokens[:, :-1], record=True).depth.record
    matrix = diagonal(model.config.scheme, one_token(record, 0, -1))[:, :, 0, 0]
    return depth_statistics(record), jnp.mean(matrix, -1)


@jax.jit
def _look(model, tokens):
    record = model(tokens[:WINDOWS, :-1], record=True).depth.record
    return shares(model.config.scheme, model.mix.mix, record), without_each(model, tokens)


def _first_windows(config, most):
    """int32 [B, T + 1] of held-out text, without padding; B is at most `most`."""
    text = open_corpus(config.data.corpus).heldout
    length = min(config.data.length, len(text) - 1)
    batch = min(most, (len(text) - 1) // length)
    return next(heldout_windows(text, length, batch)).tokens


_NUMBER: Any = np.zeros(())
_SHALLOW = Reading("", 0, DepthStatistics(*[_NUMBER] * 3), _NUMBER, None)  # what matters is the structure
_DEEP = _SHALLOW._replace(look=Look(Shares(*[_NUMBER] * 3), _NUMBER))


def _keep(reading, file):
    """Whole or not at all."""
    draft = file.with_name(f".{file.name}")
    leaves = jax.tree.leaves_with_path(reading)
    with draft.open("wb") as out:
        np.savez(out, **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})
    draft.replace(file)


def _kept(file):
    with np.load(file) as kept:
        like = _DEEP if len(kept.files) == len(jax.tree.leaves(_DEEP)) else _SHALLOW
        found = [kept[jax.tree_util.keystr(path)] for path, _ in jax.tree.leaves_with_path(like)]
    reading = jax.tree.unflatten(jax.tree.structure(like), found)
    return reading._replace(device=str(reading.device), parameters=int(reading.parameters))
