"""Finished runs, read back from their workdirs for `analysis.compare` and `analysis.scaling`."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from attnres_jax import configs
from attnres_jax.analysis import compare as comparison
from attnres_jax.analysis import inspect, pages, scaling
from attnres_jax.analysis.dynamics import depth_statistics
from attnres_jax.analysis.evidence import Look
from attnres_jax.analysis.matrix import diagonal, one_token
from attnres_jax.analysis.outputs import shares, without_each
from attnres_jax.models.table import parameter_table
from attnres_jax.train import checkpoint
from attnres_jax.train.data import heldout_windows, open_corpus
from attnres_jax.train.workdir import EVALUATION, RunError, load_config, read_json, read_rows

WINDOWS = 4
"""Held-out windows that the statistics over depth are taken on."""
SKIPPED = 32
"""Those that the loss without a sublayer is taken on."""


def compare(workdirs: Sequence[Path], out: Path) -> None:
    """Print and write the comparison of the runs in `workdirs` into the folder `out`."""
    try:
        comparison.report([read(workdir) for workdir in workdirs], out)
    except comparison.NotComparable as error:
        raise RunError(str(error)) from None


def evidence(workdirs: Sequence[Path], command: str, out: Path) -> None:
    """Write the pages of evidence of finished runs of Table 4's rows, and their comparison, into `out`."""
    found = [read(workdir) for workdir in workdirs]
    main = [w for w, run in zip(workdirs, found, strict=True) if run.config["residual"] in pages.MAIN]
    try:
        comparison.report(found, out)
        pages.report(found, {workdir.name: look(workdir) for workdir in main}, _made(workdirs, command), out)
    except comparison.NotComparable as error:
        raise RunError(str(error)) from None


def _made(workdirs, command):
    days = sorted({time.strftime("%Y-%m-%d", time.gmtime(_ended(workdir))) for workdir in workdirs})
    kind, cores = jax.devices()[0].device_kind, os.cpu_count()
    device = f"{cores} CPU cores, " if kind == "cpu" else f"one {kind}, "
    return pages.Made(
        command, f"{device}JAX {jax.__version__}", " to ".join(dict.fromkeys((days[0], days[-1])))
    )


def _ended(workdir):
    return (workdir / EVALUATION).stat().st_mtime


def look(workdir: Path) -> Look:
    """What the last model of a run does with each of its outputs, on the first held-out windows."""
    config = load_config(workdir)
    model = checkpoint.load_run(workdir).model
    tokens = _first_windows(config, SKIPPED)

    @jax.jit
    def shares_of(model, tokens):
        record = model(tokens, record=True).depth.record
        return shares(model.config.scheme, model.mix.mix, record)

    found = shares_of(model, tokens[:WINDOWS, :-1]), jax.jit(without_each)(model, tokens)
    return Look(*jax.device_get(found))


def fit_scaling(workdirs: Sequence[Path], exact: bool, out: Path) -> None:
    """Print and write the scaling laws of the runs in `workdirs`; `exact` counts all FLOPs."""
    definition = scaling.EXACT if exact else scaling.SIX
    try:
        curves = scaling.paired(points(workdirs, exact))
        scaling.report(curves, definition, out, "scaling", "Scaling laws")
    except scaling.NotFitted as error:
        raise RunError(str(error)) from None


def points(workdirs: Sequence[Path], exact: bool) -> list[scaling.Point]:
    """Compute and held-out loss of finished runs; no model is restored."""
    configs_ = [configs.to_flat(load_config(workdir)) for workdir in workdirs]
    labels = comparison.scheme_labels(configs_)
    return [
        scaling.Point(label, comparison.pair(config), _compute(config, exact), _evaluation(workdir)["loss"])
        for label, config, workdir in zip(labels, configs_, workdirs, strict=True)
    ]


def _compute(flat, exact):
    """FLOPs of a run, as `analysis.scaling` defines them."""
    config = configs.from_flat(flat)
    model = configs.model_config(config, open_corpus(config.data.corpus).vocab)
    tokens = config.train.steps * config.data.batch * config.data.length
    if exact:
        return float(inspect.cost(model, config.data.length).training_flops * tokens)
    return float(6 * inspect.active(model) * tokens)


def _evaluation(workdir):
    return read_json(workdir, EVALUATION, "is not finished; the same train command continues it: --workdir")


def read(workdir: Path) -> comparison.Run:
    """A finished run: its rows, its evaluation, and its last model looked at on held-out tokens."""
    config = load_config(workdir)
    evaluation = _evaluation(workdir)
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
    tokens = _first_windows(config, WINDOWS)[:, :-1]

    @jax.jit
    def look(model, tokens):
        record = model(tokens, record=True).depth.record
        matrix = diagonal(model.config.scheme, one_token(record, 0, -1))[:, :, 0, 0]
        return depth_statistics(record), jnp.mean(matrix, -1)

    return jax.device_get(look(model, tokens))


def _first_windows(config, most):
    """int32 [B, T + 1] of held-out text, without padding; B is at most `most`."""
    text = open_corpus(config.data.corpus).heldout
    length = min(config.data.length, len(text) - 1)
    batch = min(most, (len(text) - 1) // length)
    return next(heldout_windows(text, length, batch)).tokens


def _logged(workdir, rows, kind, key):
    found = _of_kind(rows, kind)
    if not found:
        raise RunError(f"{workdir} logged no {kind} rows to compare: train with a smaller {key}")
    return found


def _of_kind(rows, kind):
    return [row for row in rows if row["kind"] == kind]
