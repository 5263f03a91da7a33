"""When a run stops before its end: signals, on one process and on several, and workers that died.

SIGTERM and SIGINT save and stop. With several processes JAX's preemption service tells all of them the same
step to save at, whichever of them was told. On one process a second signal ends it at once.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether and why to stop. All processes ask before every step."""

    why: str = ""

    def now(self, step: int) -> bool:
        """Whether the run ends before update `step` + 1."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.why = self.why or "another process was told to stop"
        return bool(self.why)


@contextlib.contextmanager
def handled(numbers: Sequence[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """`handler` takes these signals while in here."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Note SIGTERM and SIGINT while in here."""
    stop = Stop()
    # JAX has its own handler of SIGTERM when there are several processes: that is left alone.
    numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)

    def note(number, frame):
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            stop.why = signal.Signals(number).name

    with handled(numbers, note):
        yield stop


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """With several processes, an error of the devices ends this one at once, after a message.

    It most often means that another process is gone, and whatever is done together, as leaving in order
    is, would wait for that one.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        print(
            f"error: process {jax.process_index()} stops: the devices failed, most likely because another "
            "process is gone (see its output). The same command continues from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
