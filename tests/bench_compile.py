"""CPU-seconds to trace, lower and compile value-and-grad of the language model, 12 against 48 blocks.

    python tests/bench_compile.py > docs/results/compile_time.md

CPU time of this process, so that other work on the machine hardly counts. Nothing asserts it;
`test_compile.py` asserts what makes it flat: the size of the program.
"""

import platform
import subprocess
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
from flax import nnx

from attnres_jax.models.transformer import ModelConfig, Transformer
from attnres_jax.train.loss import next_token

BATCH, TIME, WIDTH = 2, 128, 64
DEPTHS = (12, 48)  # transformer blocks, two sublayers each
REPEATS = 3
# name: (residual, block size in sublayers, of L)
CASES = {
    "plain": ("plain", lambda L: 1),
    "block, S = 6": ("block", lambda L: 6),
    "block, N = 8": ("block", lambda L: L // 8),
    "full": ("full", lambda L: 1),
}
PAGE = """# Compile time over depth

`python tests/bench_compile.py > docs/results/compile_time.md`

{date:%Y-%m-%d}, {device}, JAX {jax}, Python {python}, commit {commit}.

Trace + lower + compile of the value and gradient of the language model's loss (width {width},
time {time}, batch {batch}, fp32): CPU-seconds of the process, median of {repeats} after a warm-up, caches
cleared between them. Blocks are transformer blocks, two sublayers each. The lines are those of the StableHLO.

| residual | {shallow} blocks | {deep} blocks | ratio | lines, {shallow} | lines, {deep} |
|---|---|---|---|---|---|"""


def lower(case: str, blocks: int, implementation: str | None = None) -> jax.stages.Lowered:
    """Value and gradient of the loss, traced and lowered; nothing is allocated."""
    residual, size = CASES[case]
    sizes = (256, blocks, WIDTH, 4, 4, 2 * WIDTH)  # vocab, ..., heads, kv_heads, mlp_width
    config = ModelConfig(*sizes, residual=residual, block_size=size(2 * blocks))
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def loss(params, tokens):
        model = partial(nnx.merge(graph, params), implementation=implementation)
        return jnp.mean(next_token(model, tokens).nats)

    tokens = jax.ShapeDtypeStruct((BATCH, TIME + 1), jnp.int32)
    return jax.jit(jax.value_and_grad(loss)).lower(params, tokens)


def lines(lowered: jax.stages.Lowered) -> int:
    """The size of a program: about one line per operation."""
    return lowered.as_text().count("\n")


def seconds(case: str, blocks: int) -> float:
    """CPU-seconds of this process, all its threads."""
    jax.clear_caches()
    start = time.process_time()
    lower(case, blocks).compile()
    return time.process_time() - start


def row(case: str) -> str:
    """One line of the table."""
    shallow, deep = (median(seconds(case, blocks) for _ in range(REPEATS)) for blocks in DEPTHS)
    sizes = " | ".join(str(lines(lower(case, blocks))) for blocks in DEPTHS)
    return f"| {case} | {shallow:.1f} s | {deep:.1f} s | {deep / shallow:.2f} | {sizes} |"


def processor() -> str:
    """The name of the CPU, and how many of its cores are there."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in info if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores"


def commit() -> str:
    """Of this checkout; "dirty" where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def page() -> str:
    """All but the rows: what was measured, where, and of which commit."""
    return PAGE.format(
        date=datetime.now(UTC),
        device=processor(),
        jax=jax.__version__,
        python=platform.python_version(),
        commit=commit(),
        width=WIDTH,
        time=TIME,
        batch=BATCH,
        repeats=REPEATS,
        shallow=DEPTHS[0],
        deep=DEPTHS[1],
    )


def main():
    print(page())
    seconds("plain", 2)  # the warm-up
    for case in CASES:
        print(row(case), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
