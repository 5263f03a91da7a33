"""A whole train step of plain, Full and Block on the devices at hand, in turns: forward, backward, optimizer.

The arms run in ABBA order, so that what drifts (clocks, neighbours, heat) drifts for all of them. Each has a
state of its own in memory, all at once. A turn is a few updates, started one behind the other as the trainer
starts them, and one wait: what the host does for an update is hidden by the one before, or it counts.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from attnres_jax import configs
from attnres_jax.bench import report, turns
from attnres_jax.bench.arms import elsewhere
from attnres_jax.configs import Config, UserError
from attnres_jax.parallel import mesh
from attnres_jax.train import step
from attnres_jax.train.data import open_corpus

ARMS = ("plain", "full", "block")
WARM, BATCHES, UPDATES = 2, 4, 4
"""Untimed turns of each arm; batches that are taken in turn; updates of a turn."""


class Arm(NamedTuple):
    """A compiled update, and what its program needs on each device."""

    update: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    tokens: list[Any]
    arguments: int
    """Bytes of state and tokens."""
    temporaries: int
    """Bytes beside them, at the peak."""


def measure(
    config: Config, rounds: int, names: Sequence[str] = ARMS, implementation: str | None = None
) -> dict[str, Any]:
    """Seconds of a step of every arm, and its ratio to plain round by round; plain is always one of them.

    `implementation` names that of the reads over depth; None chooses (`choice.choose`).
    """
    names = ["plain", *(name for name in names if name != "plain")]
    if jax.process_count() > 1:
        raise UserError("bench step is for one process: its clock is that of one host")
    if implementation and (problem := elsewhere(implementation)):
        raise UserError(f"--implementation={implementation} {problem}")
    vocab = open_corpus(config.data.corpus).vocab
    arms = {name: _arm(config, name, vocab, implementation) for name in names}
    for name in names:
        for _ in range(WARM):
            arms[name], _ = _timed(arms[name], 0)
    seconds = {name: np.zeros((rounds, 2)) for name in names}
    for at, (i, name) in enumerate(turns.order(names, rounds)):
        arms[name], seconds[name][i, at // len(names) % 2] = _timed(arms[name], i)
    return {name: _summary(arms[name], seconds[name], seconds["plain"]) for name in names}


def _arm(config, residual, vocab, implementation):
    config = configs.from_flat(configs.to_flat(config) | {"residual": residual})
    run = step.programs(config, vocab, implementation=implementation)
    shape, rng = (config.data.batch, config.data.length + 1), np.random.default_rng(config.seed)
    tokens = [
        jax.device_put(rng.integers(vocab, size=shape, dtype=np.int32), run.place) for _ in range(BATCHES)
    ]
    compiled = run.update.lower(run.like, tokens[0]).compile()
    memory = compiled.memory_analysis()
    sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes) if memory else (0, 0)
    return Arm(compiled, run.create(), tokens, *sizes)


def _timed(arm, i):
    """A turn, from the i-th batch on: the arm after it, and the seconds of an update."""
    start, state, out = time.perf_counter(), arm.state, None
    for k in range(UPDATES):
        state, out = arm.update(state, arm.tokens[(i + k) % BATCHES])
    jax.block_until_ready((state, out))
    return arm._replace(state=state), (time.perf_counter() - start) / UPDATES


def _summary(arm, seconds, plain):
    ratios = seconds.sum(1) / plain.sum(1)
    return {
        "median_seconds": float(np.median(seconds)),
        "ratio_to_plain": float(np.median(ratios)),
        "ratio_95_percent": turns.interval(ratios),
        "arguments_bytes": arm.arguments,
        "temporaries_bytes": arm.temporaries,
        "seconds": [[round(s, 7) for s in pair] for pair in seconds.tolist()],
    }


def table(arms: dict[str, Any]) -> str:
    """In Markdown."""
    lines = ["| residual | ms | to plain | 95 % | state GB | temporaries GB |", "|---|---|---|---|---|---|"]
    for name, arm in arms.items():
        low, high = arm["ratio_95_percent"]
        times = f"{1e3 * arm['median_seconds']:.2f} | {arm['ratio_to_plain']:.3f} | {low:.3f} to {high:.3f}"
        memory = f"{arm['arguments_bytes'] / 1e9:.3f} | {arm['temporaries_bytes'] / 1e9:.3f}"
        lines.append(f"| {name} | {times} | {memory} |")
    return "\n".join(lines)


def main(
    config: Config, rounds: int, out: str | None, names: Sequence[str], implementation: str | None
) -> None:
    """Measure, print and write."""
    arms = measure(config, rounds, names, implementation)
    print(table(arms))
    devices = mesh.available()
    device = f"{len(devices)} x {devices[0].device_kind}"
    whole = {
        "rounds": rounds,
        "updates": UPDATES,
        "implementation": implementation,
        "config": configs.to_flat(config),
        "arms": arms,
    }
    report.write(report.provenance(device) | whole, out)
