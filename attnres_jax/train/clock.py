"""Where the wall-clock time of a run went: goodput, and MFU.

Goodput is the share of the time of all starts in which updates ran that were kept: not start-up, compiling,
waiting for input, writing checkpoints, evaluation, nor work lost to a kill, as far as it was logged.

MFU (model FLOPs utilisation) is the model's training FLOPs per second, as `analysis.inspect` counts them
(no causal saving, no rematerialisation), over the devices' peak of dense bf16 products.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.experimental.pallas import tpu as pltpu

SPENT = ("start", "compile", "input", "checkpoint", "evaluation", "stepping", "lost")
# Dense bf16 FLOPs/s of one device (SXM), from the vendor's data sheets; TPUs are known to JAX.
GPU_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


class Clock:
    """Seconds by what they were spent on; a section inside another is taken out of the outer one."""

    def __init__(self, before: Mapping[str, float], since: float):
        self._seconds = {name: before.get(name, 0.0) for name in SPENT}
        self._open = ["start"]
        self._since = since

    @classmethod
    def resumed(
        cls, kept: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], since: float
    ) -> "Clock":
        """Going on, `since` that `time.perf_counter`, after the log's `rows`; `kept` are not of lost work."""
        before = next((row for row in reversed(kept) if row["kind"] == "time"), {})
        before = {name: before.get(name, 0.0) for name in SPENT}
        ran = max((row["seconds"] for row in rows if row["kind"] == "train"), default=0.0)
        lost = max(0.0, ran - sum(before.values()))
        return cls(before | {"lost": before["lost"] + lost}, since)

    def begin(self, what: str) -> None:
        """From here on time is spent on `what`, unless a section says otherwise."""
        self._mark()
        self._open = [what]

    @contextlib.contextmanager
    def section(self, what: str) -> Iterator[None]:
        """Time in here is spent on `what`."""
        self._mark()
        self._open.append(what)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """Seconds of each kind so far."""
        self._mark()
        return dict(self._seconds)

    def _mark(self):
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now


def goodput(seconds: Mapping[str, float]) -> float:
    """The share of time that made updates which were kept."""
    return seconds["stepping"] / max(sum(seconds.values()), 1e-9)


def peak_flops(device: Any) -> float | None:
    """Dense bf16 FLOPs per second of one device; None where no data sheet says."""
    if device.platform == "tpu":
        info = pltpu.get_tpu_info()  # of one TensorCore
        return float(info.bf16_ops_per_second * info.num_cores)
    return next((peak for name, peak in GPU_PEAK.items() if name in device.device_kind), None)
