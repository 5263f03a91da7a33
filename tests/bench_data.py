"""Tokens per second of the input pipeline: `train_batches` on a memory-mapped corpus, batch after batch.

    python tests/bench_data.py FOLDER > docs/results/input_pipeline.md

FOLDER is a corpus made by `data prepare`. One process reads, nothing else runs; the least of the
repeats is told, their median beside it. Windows come in random order, from a file in the page cache.
"""

import sys
import time
from pathlib import Path
from statistics import median

import bench_compile

from attnres_jax.train.data import open_corpus, train_batches

SHAPES = [(length, batch) for length in (128, 1024) for batch in (16, 64)]
TOKENS = 1 << 21  # per repeat
REPEATS = 5
PAGE = """# Input pipeline

`python tests/bench_data.py {name}`: {processor}; {tokens:,} training tokens of {bytes} bytes each.
Predictions per second over {read:,} tokens, {repeats} repeats.

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


def main(folder: str):
    tokens = open_corpus(folder).train
    about = {"name": Path(folder).name, "processor": bench_compile.processor(), "tokens": len(tokens)}
    print(PAGE.format(**about, bytes=tokens.itemsize, read=TOKENS, repeats=REPEATS))
    for length, batch in SHAPES:
        found = [rate / 1e6 for rate in rates(tokens, length, batch)]
        print(f"| {length} | {batch} | {median(found):.1f} | {min(found):.1f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
