"""Tokens per second of the input pipeline: `train_batches` on a memory-mapped corpus, batch after batch.

    python tests/bench_data.py FOLDER > docs/results/input_pipeline.md

FOLDER is a corpus made by `data prepare`. One thread reads windows in random order, from a file in the
page cache; nothing asserts the numbers.
"""

import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import median

import bench_compile

from attnres_jax.train.data import Corpus, open_corpus, train_batches

SHAPES = [(length, batch) for length in (128, 1024) for batch in (16, 64)]
TOKENS = 1 << 21  # per repeat
REPEATS = 5
PAGE = """# Input pipeline

`python tests/bench_data.py FOLDER > docs/results/input_pipeline.md`

{date:%Y-%m-%d}, {processor}, grain {grain}, commit {commit}.

`train_batches` on a memory-mapped corpus ({source}: {tokens:,} training tokens of {bytes} bytes), one thread,
beside other work on the machine: predictions per second over {read:,} of them, {repeats} repeats.

| T | batch | median Mtok/s | least Mtok/s |
|---|---|---|---|"""


def rates(tokens, length: int, batch: int) -> list[float]:
    """Predictions per second of each repeat; all read different steps."""
    batches, steps = train_batches(tokens, length, batch, seed=0), TOKENS // (length * batch)
    found = []
    for repeat in range(REPEATS):
        start = time.perf_counter()
        for step in range(repeat * steps, (repeat + 1) * steps):
            assert batches[step].shape == (batch, length + 1)
        found.append(length * batch * steps / (time.perf_counter() - start))
    return found


def page(corpus: Corpus) -> str:
    """All but the rows: what was measured, where, and of which commit."""
    return PAGE.format(
        date=datetime.now(UTC),
        processor=bench_compile.processor(),
        grain=version("grain"),
        commit=bench_compile.commit(),
        source=corpus.source,
        tokens=len(corpus.train),
        bytes=corpus.train.itemsize,
        read=TOKENS,
        repeats=REPEATS,
    )


def main(folder: str):
    corpus = open_corpus(folder)
    print(page(corpus))
    for length, batch in SHAPES:
        found = [rate / 1e6 for rate in rates(corpus.train, length, batch)]
        print(f"| {length} | {batch} | {median(found):.1f} | {min(found):.1f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
