"""The profiler's trace of some updates, for `xprof` or TensorBoard's profile page."""

from collections.abc import Callable
from pathlib import Path

import jax


class Trace:
    """Of the updates `first` to `last` (first = 0: of none), into `folder`."""

    def __init__(self, folder: Path, first: int, last: int):
        self._folder, self._first, self._last, self._on = folder, first, last, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def before(self, step: int, settle: Callable[[], None]) -> None:
        """Called before update `step`; `settle` waits for those before."""
        if step == self._first:
            settle()
            jax.profiler.start_trace(self._folder)
            self._on = True
        elif self._on and step == self._last + 1:
            settle()
            self._stop()

    def _stop(self):
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
