"""How the runs of a page were made: one line, the same on every page."""

import shlex
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Made(NamedTuple):
    """What is known of runs, and of the code that read them."""

    command: str
    device: str
    """Where the runs' models were read, with JAX's version, in words; "" where it was not kept."""
    date: str
    """When the runs ended."""
    commit: str
    """Of the code that wrote the page."""

    def line(self, rows: int, seeds: Collection[int]) -> str:
        """Without a full stop: a page goes on with what else its runs have in common."""
        device = f"read on {self.device}, " if self.device else ""
        counted = f"{rows} row{'s' * (rows > 1)}, seed{'s' * (len(seeds) > 1)}"
        said = f"{device}{self.date}, page of commit {self.commit}. {counted}"
        return f"`{self.command}`; {said} {', '.join(map(str, sorted(seeds)))}"


def typed() -> str:
    """The command that this process was started with."""
    return shlex.join(["python", "-m", "attnres_jax", *sys.argv[1:]])


def commit() -> str:
    """Of the working tree this code lies in, with "+" where files differ from it; "unknown" elsewhere."""
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no such program
        return "unknown"
    return said.stdout.strip() or "unknown"
