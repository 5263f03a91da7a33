"""How far a long piece of work is: a bar on a terminal, elsewhere a line every tenth of the way."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich import progress
from rich.console import Console

Item = TypeVar("Item")


class Progress:
    """`with Progress("encoding", total, "bytes") as bar: bar.add(done)`."""

    def __init__(self, what: str, total: int, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._done = self._said = 0
        self._console = Console(stderr=True)
        count = progress.DownloadColumn() if unit == "bytes" else progress.MofNCompleteColumn()
        columns = ("{task.description}", progress.BarColumn(), count, progress.TimeRemainingColumn())
        self._bar = progress.Progress(*columns, console=self._console)
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def add(self, done: int) -> None:
        """So much more is done."""
        self._done += done
        self._bar.update(self._task, completed=self._done)
        tenth = 10 * self._done // self._total
        if tenth > self._said and not self._console.is_terminal:
            line = f"{self._what}: {self._done:,} of {self._total:,} {self._unit}"
            self._console.print(line, markup=False, highlight=False)
        self._said = tenth

    def say(self, line: str) -> None:
        """A line that stays, above the bar if there is one."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each counted when it comes."""
        for item in items:
            self.add(1)
            yield item
