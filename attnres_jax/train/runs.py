"""Finished runs, read back from their workdirs for `analysis.compare` and `analysis.scaling`."""

import time
from collections.abc import Sequence
from pathlib import Path

from attnres_jax import configs
from attnres_jax.analysis import compare as comparison
from attnres_jax.analysis import grids, inspect, made, pages, scaling
from attnres_jax.train import readings
from attnres_jax.train.data import open_corpus
from attnres_jax.train.readings import Reading
from attnres_jax.train.workdir import EVALUATION, RunError, load_config, read_json, read_rows


def compare(workdirs: Sequence[Path], out: Path, at_once: int = 1, page: str = "") -> None:
    """Print and write the comparison of the runs in `workdirs` into the folder `out`.

    `at_once`: how many models are looked at in parallel. `page`: one of `grids.PAGES`, to be written too.
    """
    found, taken = read(workdirs, (), at_once)
    how = _made(workdirs, [one.device for one in taken])
    try:
        comparison.report(found, out, how)
    except comparison.NotComparable as error:
        raise RunError(str(error)) from None
    if page:
        grids.report(page, found, how, out)


def evidence(workdirs: Sequence[Path], out: Path, at_once: int = 1) -> None:
    """Write the pages of evidence of finished runs of Table 4's rows, and their comparison, into `out`."""
    found, taken = read(workdirs, pages.MAIN, at_once)
    how = _made(workdirs, [one.device for one in taken])
    looks = {run.name: one.look for run, one in zip(found, taken, strict=True) if one.look}
    try:
        comparison.report(found, out, how)
        pages.report(found, looks, how, out)
    except comparison.NotComparable as error:
        raise RunError(str(error)) from None


def _made(workdirs, devices):
    days = sorted({time.strftime("%Y-%m-%d", time.gmtime(_ended(workdir))) for workdir in workdirs})
    device = " and ".join(filter(None, dict.fromkeys(devices)))
    return made.Made(made.typed(), device, " to ".join(dict.fromkeys((days[0], days[-1]))), made.commit())


def _ended(workdir):
    return (workdir / EVALUATION).stat().st_mtime


def fit_scaling(workdirs: Sequence[Path], exact: bool, out: Path) -> None:
    """Print and write the scaling laws of the runs in `workdirs`; `exact` counts all FLOPs."""
    definition = scaling.EXACT if exact else scaling.SIX
    try:
        curves = scaling.paired(points(workdirs, exact))
        seeds = {load_config(workdir).seed for workdir in workdirs}
        how = _made(workdirs, map(readings.device, workdirs)).line(len(curves), seeds)
        scaling.report(curves, definition, out, "scaling", "Scaling laws", f"{how}.")
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


def read(
    workdirs: Sequence[Path], deep: Sequence[str], at_once: int = 1
) -> tuple[list[comparison.Run], list[Reading]]:
    """Finished runs: rows, evaluations, and readings of their last models, deep ones of schemes `deep`."""
    loaded = [load_config(workdir) for workdir in workdirs]
    # Before a model is looked at.
    written = [(_evaluation(workdir), read_rows(workdir)) for workdir in workdirs]
    taken = readings.take_all(workdirs, [config.residual in deep for config in loaded], at_once)
    found = [
        comparison.Run(
            name=workdir.name,
            config=configs.to_flat(config),
            kinds=configs.model_config(config, vocab=1).kinds,
            parameters=one.parameters,
            train=_logged(workdir, rows, "train", "train.log_every"),
            depth=_logged(workdir, rows, "depth", "train.depth_every"),
            heldout=_of_kind(rows, "eval"),
            evaluation=evaluation,
            statistics=one.statistics,
            matrix=one.matrix,
        )
        for workdir, config, (evaluation, rows), one in zip(workdirs, loaded, written, taken, strict=True)
    ]
    return found, taken


def _logged(workdir, rows, kind, key):
    found = _of_kind(rows, kind)
    if not found:
        raise RunError(f"{workdir} logged no {kind} rows to compare: train with a smaller {key}")
    return found


def _of_kind(rows, kind):
    return [row for row in rows if row["kind"] == kind]
