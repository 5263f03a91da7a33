"""Many runs, each in a process of its own, some at a time: `python -m attnres_jax train` for every one.

A finished run (eval.json is there) is left alone, an unfinished one goes on from its checkpoint. SIGTERM,
SIGINT and SIGHUP are passed on as SIGTERM, on which a run saves and ends; a second one ends it at once. A
run that fails does not stop the others. What a run says stands in log.txt of its folder. A SIGKILL of the
sweep itself leaves its processes running: let them end before the sweep goes on.
"""

import contextlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from attnres_jax import configs
from attnres_jax.configs.sweeps import Member, Sweep, members
from attnres_jax.train import runs, workdir
from attnres_jax.train.progress import Progress
from attnres_jax.train.stopping import handled

LOG = "log.txt"
POLL = 0.5
"""Seconds between looks at the processes."""


class SweepError(configs.UserError):
    """Runs that failed; says which, and where to read why."""


class Job(NamedTuple):
    """A run to be made: its folder, and the config and command that make it."""

    folder: Path
    member: Member
    command: list[str]

    @property
    def steps(self) -> int:
        """All its updates."""
        return self.member.config.train.steps

    def step(self) -> int:
        """Updates that it has logged."""
        rows = workdir.read_rows(self.folder)
        return rows[-1]["step"] if rows else 0

    def finished(self) -> bool:
        """Whether it has been evaluated after its last update."""
        if not (self.folder / workdir.EVALUATION).is_file():
            return False
        return workdir.read_json(self.folder, workdir.EVALUATION, "")["step"] == self.steps


def sweep(chosen: Sweep, made: Sequence[Job], at_once: int, out: Path) -> None:
    """Run what is not finished, `at_once` at a time, then compare all runs, into folder `out`.

    What else is written there, `chosen` says; pages of evidence take two seeds. `SweepError` if a run did not
    finish.
    """
    stopped = run(made, at_once)
    unfinished = [job for job in made if not job.finished()]
    if stopped:
        left = f"{len(unfinished)} of {len(made)} runs are not finished"
        print(f"{stopped}: {left}; the same command goes on", file=sys.stderr)
        return
    if unfinished:
        first = unfinished[0]
        names = ", ".join(job.member.name for job in unfinished)
        raise SweepError(
            f"{len(unfinished)} of {len(made)} runs did not finish: {names}. {first.folder / LOG} ends with "
            f"{_last_line(first)!r}; the same command goes on with them"
        )
    folders = [job.folder for job in made]
    several = len({job.member.config.seed for job in made}) > 1
    if chosen.claims and not several:
        print(_no_pages(out), file=sys.stderr)
    if chosen.claims and several:
        runs.evidence(folders, out, at_once)
    else:
        runs.compare(folders, out, at_once, chosen.page)
    if chosen.sizes:
        runs.fit_scaling(folders, False, out)


def _no_pages(out):
    page = out / "README.md"
    old = f"; {page} is an earlier sweep's" if page.is_file() else ""
    return f"no pages of evidence: their intervals take two seeds (--seeds=2){old}"


def jobs(sweep: Sweep, config: str, overrides: Sequence[str], seeds: int, out: Path) -> list[Job]:
    """A job for each member of the sweep, in a folder below `out`; `RunError` if one holds another run."""
    made = []
    for member in members(sweep, config, overrides, seeds):
        folder = out / member.name
        workdir.check(folder, member.config)
        words = ["train", f"--config={config}", f"--workdir={folder}", *member.overrides]
        made.append(Job(folder, member, [sys.executable, "-m", "attnres_jax", *words]))
    return made


def show(made: Sequence[Job]) -> None:
    """Print the command of every job, those of finished runs as comments."""
    for job in made:
        print(f"{'# finished: ' if job.finished() else ''}{shlex.join(['python', *job.command[1:]])}")


def run(made: Sequence[Job], at_once: int) -> str:
    """Run the unfinished jobs, in order; the name of the signal that stopped them, or ""."""
    waiting = [job for job in made if not job.finished()]
    done = {job.folder: job.step() for job in waiting}
    total = sum(job.steps - done[job.folder] for job in waiting)
    running: dict[Path, tuple[Job, subprocess.Popen]] = {}
    passed = 0
    with _signals() as told, Progress("sweep", max(total, 1), "updates") as bar, _ended(running):
        while running or (waiting and not told):
            while waiting and not told and len(running) < at_once:
                job = waiting.pop(0)
                running[job.folder] = job, _start(job)
            # Not from the handler: it may run between the start of a process and its entry in `running`.
            while passed < len(told):
                _terminate(running)
                passed += 1
            time.sleep(POLL)
            for job, code in _looked(running, done, bar):
                bar.say(f"{job.folder}: {_outcome(job, code)}, {len(waiting) + len(running)} runs left")
    return told[0] if told else ""


def _looked(running, done, bar):
    """Count new updates; those that have ended, and no longer run, with their exit codes."""
    codes = {folder: process.poll() for folder, (_, process) in running.items()}
    for folder, (job, _) in running.items():
        before, done[folder] = done[folder], job.step()
        bar.add(done[folder] - before)
    ended = {folder: code for folder, code in codes.items() if code is not None}
    return [(running.pop(folder)[0], code) for folder, code in ended.items()]


def _terminate(running):
    for _, process in running.values():
        process.terminate()


def _start(job):
    """In a session of its own: Ctrl-C reaches this process alone, which tells it once."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _outcome(job, code):
    if job.finished():
        return "finished"
    return f"stopped at update {job.step()}" if code in (0, -signal.SIGTERM) else f"failed ({code})"


def _last_line(job):
    lines = (job.folder / LOG).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """The names of the signals that came while in here."""
    told: list[str] = []

    def note(number, frame):
        told.append(signal.Signals(number).name)

    with handled((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), note):
        yield told


@contextlib.contextmanager
def _ended(running) -> Iterator[None]:
    """No process outlives this one's own failure."""
    try:
        yield
    finally:
        _terminate(running)
        for _, process in running.values():
            process.wait()
