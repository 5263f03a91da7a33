"""What the training loop costs beside its compiled update: data, optimizer state, metrics, signals.

    python tests/bench_loop.py

For 12 and 48 transformer blocks (or those named) of tiny width it runs 200 updates by `loop.train`, which
logs every tenth, and 200 by the compiled program alone on one batch, in turns of 50; prints the medians.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

from attnres_jax import configs
from attnres_jax.train import loop, metrics
from attnres_jax.train.data import open_corpus, train_batches
from attnres_jax.train.step import programs

TURNS, UPDATES = 4, 50
TINY = {
    "model.width": 32,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.mlp_width": 64,
    "data.length": 64,
    "data.batch": 4,
    "block_size": 4,
    "train.log_every": 10,
}


def config(blocks, **changes):
    steps = TURNS * UPDATES
    flat = configs.to_flat(configs.base.get_config()) | TINY | {"model.blocks": blocks, "train.steps": steps}
    flat |= {f"train.{name}_every": steps + 1 for name in ("depth", "eval")} | {"train.eval_tokens": 64}
    return configs.from_flat(flat | {"checkpoint.every": steps} | changes)


def bare(blocks):
    """Seconds of each update, without the first."""
    own = config(blocks)
    corpus = open_corpus(own.data.corpus)
    run = programs(own, corpus.vocab, None, corpus.end)
    batch = jax.device_put(train_batches(corpus.train, own.data.length, own.data.batch, 0)[0], run.place)
    state = run.create()
    update = run.update.lower(state, batch).compile()
    state, out = update(state, batch)
    while True:
        seconds = []
        for _ in range(UPDATES):
            start = time.perf_counter()
            state, out = update(state, batch)
            jax.block_until_ready(out)
            seconds.append(time.perf_counter() - start)
        yield seconds


def looped(blocks, folder, stop):
    """Seconds between the updates up to `stop` as the loop's log sees them."""
    seen, train = [], metrics.MetricLog.train

    def timed(self, step, out):
        train(self, step, out)
        seen.append(time.perf_counter())

    metrics.MetricLog.train = timed
    try:
        loop.train(config(blocks, **{"train.stop_after": stop}), folder)
    finally:
        metrics.MetricLog.train = train
    return [b - a for a, b in itertools.pairwise(seen[1:])]


def main():
    print(
        f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; milliseconds, medians of {TURNS * UPDATES}"
    )
    for blocks in map(int, sys.argv[1:] or (12, 48)):
        plain, with_loop, alone = [], [], bare(blocks)
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(1, TURNS + 1):
                plain += next(alone)
                with_loop += looped(blocks, Path(folder) / "run", turn * UPDATES)
        a, b = (1e3 * statistics.median(seconds) for seconds in (plain, with_loop))
        print(
            f"{blocks} transformer blocks: update {a:.2f}, in the loop {b:.2f}, added {b - a:+.2f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
