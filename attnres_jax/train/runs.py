"""Finished runs, read back from their workdirs for `analysis.compare`."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from attnres_jax import configs
from attnres_jax.analysis import compare as comparison
from attnres_jax.analysis.dynamics import depth_statistics
from attnres_jax.analysis.matrix import diagonal, one_token
from attnres_jax.models.table import parameter_table
from attnres_jax.train import checkpoint
from attnres_jax.train.data import heldout_windows, open_corpus
from attnres_jax.train.workdir import EVALUATION, RunError, load_config, read_json, read_rows

WINDOWS = 4
"""Held-out windows that the statistics over depth are taken on."""


def compare(workdirs: Sequence[Path], out: Path) -> None:
    """Print and write the comparison of the runs in `workdirs` into the folder `out`."""
    try:
        comparison.report([read(workdir) for workdir in workdirs], out)
    except comparison.NotComparable as error:
        raise RunError(str(error)) from None


def read(workdir: Path) -> comparison.Run:
    """A finished run: its rows, its evaluation, and its last model looked at on held-out tokens."""
    config = load_config(workdir)
    unfinished = "is not finished; the same train command continues it: --workdir"
    evaluation = read_json(workdir, EVALUATION, unfinished)
    rows = read_rows(workdir)
    model = checkpoint.load_run(workdir).model
    statistics, matrix = _look(model, config)
    return comparison.Run(
        name=workdir.name,
        config=configs.to_flat(config),
        kinds=model.config.kinds,
        parameters=sum(int(np.prod(p.shape)) for p in parameter_table(model)),
        train=_logged(workdir, rows, "train", "train.log_every"),
        depth=_logged(workdir, rows, "depth", "train.depth_every"),
        heldout=_of_kind(rows, "eval"),
        evaluation=evaluation,
        statistics=statistics,
        matrix=matrix,
    )


def _look(model, config):
    """Statistics over depth on the first held-out windows, and M of the first one's last token: what a
    channel passes on to itself, in the mean over channels."""
    tokens = _first_windows(config)

    @jax.jit
    def look(model, tokens):
        record = model(tokens, record=True).depth.record
        matrix = diagonal(model.config.scheme, one_token(record, 0, -1))[:, :, 0, 0]
        return depth_statistics(record), jnp.mean(matrix, -1)

    return jax.device_get(look(model, tokens))


def _first_windows(config):
    """int32 [B, T] of held-out text, without padding."""
    text = open_corpus(config.data.corpus).heldout
    length = min(config.data.length, len(text) - 1)
    batch = min(WINDOWS, (len(text) - 1) // length)
    return next(heldout_windows(text, length, batch)).tokens[:, :-1]


def _logged(workdir, rows, kind, key):
    found = _of_kind(rows, kind)
    if not found:
        raise RunError(f"{workdir} logged no {kind} rows to compare: train with a smaller {key}")
    return found


def _of_kind(rows, kind):
    return [row for row in rows if row["kind"] == kind]
