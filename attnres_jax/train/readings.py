"""What the last model of a finished run does over depth, on held-out tokens, and the file that keeps it.

Where the checkpoints of a run are it is taken anew, for the analysis may have changed since, and kept in the
run's folder as reading.npz. Where they are not, it is what was kept: a run that was made elsewhere can be
compared, and its figures drawn again, without its checkpoints (three times the parameters) and its text.
"""

import contextlib
import os
import sys
import threading
import zipfile
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
from attnres_jax.train.data import DataError, heldout_windows, open_corpus

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
    """Where it was asked for, now or before: L + 1 losses."""


def take_all(folders: Sequence[Path], deep: Sequence[bool], at_once: int = 1) -> list[Reading]:
    """`take` of each, some at a time: what they wait for is the compiler, which uses one core."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(take, folders, deep))


def take(folder: Path, deep: bool) -> Reading:
    """Of the run in `folder`; with a `look` if `deep`, or if one of the same model was kept before.

    Where the text is gone or damaged it is what was kept, and that is told. `RunError` if there is neither
    model nor file, or the file does not do or cannot be written; `DataError` without text and file.
    """
    file = folder / FILE
    if file.is_file() and not (folder / workdir.CHECKPOINTS).is_dir():
        return _enough(file, deep, f"{folder} has no {workdir.CHECKPOINTS} to take them from")
    try:
        taken = _taken(folder, deep)
    except DataError as error:
        if not file.is_file():
            raise
        reading = _enough(file, deep, str(error))
        print(f"{error}; of {folder} what {file.name} kept is used", file=sys.stderr)
        return reading
    reading = _with_kept_look(taken, file)
    _keep(reading, file)
    return reading


def device(folder: Path) -> str:
    """Where a kept reading was taken, in words; "" where there is none, or another version's."""
    with contextlib.suppress(workdir.RunError):
        return _kept(folder / FILE).device
    return ""


def _enough(file, deep, without):
    """What was kept, if it is as deep as asked for."""
    reading = _kept(file)
    if deep and reading.look is None:
        raise workdir.RunError(
            f"{file} is without the losses that pages of evidence need, and {without}: bring these too"
        )
    return reading


def _with_kept_look(taken, file):
    """`taken`; where it is shallow, with the look of a kept one that is of the same model, to the bit."""
    if taken.look is not None or not file.is_file():
        return taken
    try:
        kept = _kept(file)
    except workdir.RunError:  # it is replaced
        return taken
    both = [jax.tree.leaves((one.statistics, one.matrix)) for one in (taken, kept)]
    same = all(np.array_equal(new, old, equal_nan=True) for new, old in zip(*both, strict=True))
    return taken._replace(look=kept.look) if same else taken


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
    """Whole or not at all; the draft is this thread's own, for others may write the same file."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with draft.open("wb") as out:
            np.savez(out, **_by_name(reading))
        draft.replace(file)
    except OSError as error:
        raise workdir.RunError(
            f"{file} cannot be written ({error.strerror or error}): make the folder writable, or copy the "
            "run to one that is"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it has its name, or never was
            draft.unlink()


def _kept(file):
    """`RunError` if it is damaged, or another version's."""
    try:
        with file.open("rb") as opened, np.load(opened) as kept:
            found = dict(kept)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise _unknown(file, f"it cannot be read ({error})") from error
    for like in (_SHALLOW, _DEEP):
        if found.keys() == _by_name(like).keys():
            leaves = [found[name] for name in _by_name(like)]
            reading = jax.tree.unflatten(jax.tree.structure(like), leaves)
            return reading._replace(device=str(reading.device), parameters=int(reading.parameters))
    raise _unknown(file, f"it has other arrays ({', '.join(found)})")


def _unknown(file, why):
    return workdir.RunError(
        f"{file} is not a reading of this version: {why}. Bring the run's {workdir.CHECKPOINTS} and text, "
        "and the same command makes it anew"
    )


def _by_name(reading):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(reading)}
