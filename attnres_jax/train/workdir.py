"""The folder of a run: config.json, metrics.jsonl, eval.json, checkpoints/, tensorboard/, profile/.

With several processes all must see the same folder; the first one writes, but for checkpoints and traces.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnres_jax import configs
from attnres_jax.analysis.compare import BOOKKEEPING
from attnres_jax.configs import Config
from attnres_jax.parallel import processes
from attnres_jax.train import data

CONFIG, METRICS, EVALUATION = "config.json", "metrics.jsonl", "eval.json"
CHECKPOINTS, TENSORBOARD, PROFILE = "checkpoints", "tensorboard", "profile"


class RunError(configs.UserError):
    """A folder that is not what a command needs; says which, why and what to do."""


def claim(workdir: Path, config: Config) -> None:
    """Make `workdir` the folder of this run; raise `RunError` if it is another's."""
    wanted, held = configs.to_flat(config), check(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if processes.first() and held != wanted:
            write_json(workdir / CONFIG, wanted)
    except OSError as error:
        raise RunError(f"{workdir} cannot be written ({error.strerror}): take another --workdir") from None


def check(workdir: Path, config: Config) -> dict[str, Any]:
    """The flat config of the run in `workdir`, empty if there is none; `RunError` if it is another's."""
    if not (workdir / CONFIG).is_file():
        return {}
    wanted, held = configs.to_flat(config), configs.to_flat(load_config(workdir))
    for key in wanted:
        if held[key] != wanted[key] and key not in BOOKKEEPING:
            raise RunError(
                f"{workdir} holds a run with {key} = {held[key]!r}, not {wanted[key]!r}: "
                "take another folder, or train with the config it was made with"
            )
    return held


def finished(workdir: Path, step: int, steps: int) -> bool:
    """Whether a run that has made `step` of its `steps` updates has been evaluated too.

    An evaluation of updates that were lost since then is deleted.
    """
    evaluation = workdir / EVALUATION
    found = bool(processes.agree(int(evaluation.is_file())))
    if found and step < steps and processes.first():
        evaluation.unlink()
    return found and step == steps


@contextlib.contextmanager
def disk(workdir: Path) -> Iterator[None]:
    """What the disk refuses is told in a line."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or workdir}: {error.strerror or error}. Mend that (is the disk full?): the "
            "same command goes on from the last checkpoint"
        ) from error


def load_config(workdir: Path) -> Config:
    """The config that `workdir` was trained with."""
    flat = read_json(workdir, CONFIG, "is not a run; make one with train --workdir")
    return configs.from_flat(configs.of_run(flat))


def read_json(workdir: Path, name: str, without: str) -> dict[str, Any]:
    """A file of the run; where it is not there, a `RunError` that says what that means."""
    path = workdir / name
    if not path.is_file():
        raise RunError(f"{workdir} has no {name}: it {without}={workdir}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): restore it, or train into a new folder") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    data.write(draft, text.encode())
    draft.replace(path)


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, in order; a last line that was cut off is left out."""
    path = workdir / METRICS
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
