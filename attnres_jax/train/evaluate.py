"""Bits per byte and perplexity on held-out text, in windows of the training length, also by position."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table

from attnres_jax.configs import Config
from attnres_jax.parallel import processes
from attnres_jax.parallel.mesh import from_rows
from attnres_jax.train import workdir
from attnres_jax.train.data import Corpus, Windows, heldout_windows
from attnres_jax.train.loss import document_end
from attnres_jax.train.restored import restore


class Evaluation(NamedTuple):
    """Of `tokens` predictions; `loss` in nats per token."""

    tokens: int
    loss: float
    bits_per_byte: float
    perplexity: float
    """exp(loss), per token."""
    position_bits: tuple[float, ...]
    """Bits per byte at each position of a window, the first first."""


def evaluate(
    nats: Callable[[Any, Any], Any], windows: Iterable[Windows], bytes_per_token: float
) -> Evaluation:
    """`nats(tokens, mask)` is the sum of cross-entropies of a batch at each position."""
    total, count = 0.0, 0.0
    for batch in windows:
        total = total + np.asarray(nats(batch.tokens, batch.mask), np.float64)
        count = count + batch.mask.sum(0)
    loss = float(np.sum(total) / np.sum(count))
    bits = total / np.maximum(count, 1) / math.log(2) / bytes_per_token
    return Evaluation(
        int(np.sum(count)),
        loss,
        loss / math.log(2) / bytes_per_token,
        math.exp(min(loss, 700.0)),
        tuple(bits[count > 0].tolist()),
    )


def heldout(
    nats: Callable[[Any, Any], Any], config: Config, corpus: Corpus, limit: int, place: NamedSharding
) -> Evaluation:
    """On the first `limit` tokens (0: all), in windows of `data.length`, which lie as `place` says."""
    windows = heldout_windows(corpus.heldout, config.data.length, config.data.batch, limit)
    end = document_end(config, corpus.end)
    if end is not None:  # the first token of a document is not predicted
        windows = (w._replace(mask=w.mask & (w.tokens[:, :-1] != end)) for w in windows)

    def placed(tokens, mask):
        return nats(*(from_rows(place, a.shape, lambda i, j, a=a: a[i:j]) for a in (tokens, mask)))

    return evaluate(placed, windows, corpus.bytes_per_token)


def main(folder: Path, step: int | None) -> None:
    """Evaluate a run on the whole held-out text, on its mesh (`restored`); print, and write eval-STEP.json
    into its folder."""
    of = restore(folder, step)
    found = heldout(partial(of.run.nats, of.params), of.config, of.corpus, 0, of.run.place)
    if not processes.first():
        return
    path = folder / f"eval-{of.step}.json"
    workdir.write_json(path, {"step": of.step} | found._asdict())
    console = Console(highlight=False)
    console.print(
        f"{folder.name} after {of.step:,} updates, {found.tokens:,} held-out tokens of "
        f"{of.corpus.source}: {found.bits_per_byte:.4f} bits/byte, perplexity {found.perplexity:.3f}",
        markup=False,
    )
    console.print(_by_position(found.position_bits))
    console.print(f"Wrote {path}.", markup=False)


def _by_position(bits) -> Table:
    table = Table("position in the window", "bits/byte", title="By position")
    table.columns[1].justify = "right"
    for first, last in _octaves(len(bits)):
        span = f"{first}" if first == last else f"{first} to {last}"
        table.add_row(span, f"{np.mean(bits[first - 1 : last]):.3f}")
    return table


def _octaves(length: int):
    """1, 2 to 3, 4 to 7, ... up to `length`."""
    first = 1
    while first <= length:
        yield first, min(2 * first - 1, length)
        first *= 2
