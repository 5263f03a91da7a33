"""What a run says of itself: rows in metrics.jsonl, TensorBoard, and a line or a bar on the terminal.

A row has a `kind`: "train" (loss of that step, nats and bits, tokens/s, MFU where the device's peak is
known), "depth" (statistics of every sublayer), "eval" (held-out text), "time" (seconds by what they were
spent on).
"""

import contextlib
import errno
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from attnres_jax.analysis import heatmaps
from attnres_jax.analysis.dynamics import DepthStatistics, weighs_outputs
from attnres_jax.analysis.inspect import cost
from attnres_jax.configs import Config
from attnres_jax.parallel import processes
from attnres_jax.train import workdir
from attnres_jax.train.clock import Clock, goodput, peak_flops
from attnres_jax.train.data import Corpus
from attnres_jax.train.evaluate import Evaluation
from attnres_jax.train.optim import learning_rate
from attnres_jax.train.step import Programs, Updated


class MetricLog:
    """Log of a run that has made `start` updates and runs `since`; later steps' rows are of lost work and go.

    Every process keeps one and tells it the same; the first one's is written and shown.
    """

    def __init__(self, folder: Path, start: int, config: Config, run: Programs, corpus: Corpus, since: float):
        rows = workdir.read_rows(folder) if processes.first() else []
        kept = [row for row in rows if row["step"] <= start]
        self.clock = Clock.resumed(kept, rows, since)
        self._config, self._model, self._corpus = config, run.model, corpus
        self._rate = learning_rate(config)
        self._tokens = config.data.batch * config.data.length
        peak = peak_flops(run.mesh.devices.flat[0])
        flops = cost(run.model, config.data.length).training_flops
        self._mfu_per_rate = peak and flops / (peak * run.mesh.size)
        self._file = self._board = None
        self._console = Console(stderr=True, quiet=not processes.first())
        if processes.first():
            path = folder / workdir.METRICS
            workdir.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = path.open("a")
            self._board = SummaryWriter(str(folder / workdir.TENSORBOARD), purge_step=start + 1)
        self._bar = _progress(self._console)
        total = config.train.stop_after or config.train.steps
        self._task = self._bar.add_task(folder.name, total=total, completed=start, said="")
        self._last, self._last_step = time.perf_counter(), start

    def __enter__(self):
        if self._console.is_terminal and not self._console.quiet:
            self._bar.start()
        return self

    def __exit__(self, failed, *_):
        self._bar.stop()
        # What cannot be written either must not hide what failed first.
        with contextlib.suppress(OSError) if failed else contextlib.nullcontext():
            for open_file in filter(None, (self._file, self._board)):
                open_file.close()

    def ready(self) -> None:
        """Compilation is over: speed is measured from here."""
        self._last = time.perf_counter()
        self.clock.begin("stepping")

    def train(self, step: int, out: Updated) -> None:
        """Move the bar; after the first update and every `train.log_every`, a row."""
        self._bar.update(self._task, completed=step)
        if step % self._config.train.log_every and step != 1:
            return
        now = time.perf_counter()
        rate = self._tokens * (step - self._last_step) / (now - self._last)
        values = {
            "loss": float(out.loss),
            "bits_per_byte": float(out.loss) / math.log(2) / self._corpus.bytes_per_token,
            "gradient_norm": math.hypot(*map(float, out.leaf_norms.values())),
            "learning_rate": np.asarray(self._rate(step - 1)).item(),
            "tokens_per_s": rate,
            "seconds": sum(self.clock.read().values()),
        }
        if self._mfu_per_rate:
            values["mfu"] = self._mfu_per_rate * rate
        self._last, self._last_step = now, step
        self._row("train", step, values)
        self._scalars("train", step, values)
        said = "loss {loss:.4f}  {bits_per_byte:.3f} bits/byte  {tokens_per_s:,.0f} tokens/s"
        said += "  {mfu:.1%} MFU" if self._mfu_per_rate else ""
        self._bar.update(self._task, said=said.format(**values))
        self._say(f"step {step:>6}  {said.format(**values)}")

    def time(self, step: int) -> None:
        """A row of the seconds so far, by what they were spent on."""
        seconds = self.clock.read()
        self._row("time", step, seconds)
        self._scalars("time", step, seconds | {"goodput": goodput(seconds)})

    def spent(self) -> str:
        """Goodput in a line."""
        seconds = self.clock.read()
        parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        return f"goodput {goodput(seconds):.1%} of {sum(seconds.values()):.1f} s: {parts}"

    def depth(self, step: int, out: Updated, found: DepthStatistics) -> None:
        """A row of statistics by depth: a curve for each sublayer, and the weights as a picture."""
        values = {"gradient_norm": out.depth_norms} | found._asdict()
        values = {name: np.asarray(value) for name, value in values.items()}
        self._row("depth", step, {name: value.tolist() for name, value in values.items()})
        weights = values.pop("weights")
        if not weighs_outputs(self._model.scheme):
            del values["entropy"]
        elif board := self._living_board():
            board.add_image("weights", self._picture(weights, step), step, dataformats="HWC")
        for name, by_depth in values.items():
            labels = (f"{at + 1:03}" for at in range(len(by_depth)))
            self._scalars(name, step, dict(zip(labels, by_depth, strict=True)))

    def evaluation(self, step: int, found: Evaluation) -> None:
        """A row of held-out numbers."""
        values = found._asdict()
        del values["position_bits"]
        self._row("eval", step, values)
        self._scalars("eval", step, values)
        self._say(f"step {step:>6}  held out: {found.bits_per_byte:.4f} bits/byte")

    def _picture(self, weights, step):
        schedule = self._model.scheme.schedule(self._model.sublayers)
        figure = heatmaps.weight_heatmap(weights, self._model.kinds, schedule, f"step {step}")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3]

    def _row(self, kind, step, values):
        if self._file:
            self._file.write(json.dumps({"kind": kind, "step": step} | values) + "\n")
            self._file.flush()

    def _scalars(self, group, step, values):
        for name, value in values.items():
            if board := self._living_board():
                board.add_scalar(f"{group}/{name}", float(value), step)

    def _living_board(self):
        """Its thread ends where it cannot write; whoever goes on to hand it events waits for ever."""
        writer: Any = self._board and self._board.file_writer
        if self._board and not writer.event_writer._worker.is_alive():
            raise OSError(errno.EIO, "the thread that writes for TensorBoard has ended", self._board.logdir)
        return self._board

    def _say(self, line):
        if not self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False)


def _progress(console: Console) -> Progress:
    said = TextColumn("{task.fields[said]}")
    columns = ("{task.description}", BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), said)
    return Progress(*columns, console=console)
