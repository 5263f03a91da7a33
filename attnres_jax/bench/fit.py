"""Whether a train step fits a device's memory, and what would make it: arithmetic, nothing is compiled.

What is known without a compiler is the state: parameters, moments, gradients. The compiler says what the step
needs beside it, also where that is too much.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from attnres_jax import configs
from attnres_jax.configs import Config, ConfigError
from attnres_jax.parallel import mesh
from attnres_jax.train import budget

REMAT = "nothing"
"""What `model.remat` keeps when it keeps least."""
LOGITS = 4
"""Bytes of a logit: the loss is computed in fp32."""


class Memory(NamedTuple):
    """Bytes of one device."""

    parameters: int
    optimizer: int
    """Moments."""
    gradients: int
    """At least (`gradients`). They are temporaries."""
    temporaries: int
    """All that is live at the peak beside parameters, moments and tokens, by the compiler."""
    available: int

    @property
    def needed(self) -> int:
        """At the peak."""
        return self.parameters + self.optimizer + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether the device has it."""
        return self.needed <= self.available


class Knob(NamedTuple):
    """A change of config, and what it should need by arithmetic; None: only a compiler can tell."""

    changes: dict[str, Any]
    predicted: int | None

    def __str__(self) -> str:
        return " ".join(f"--config.{key}={value}" for key, value in self.changes.items())


def state(config: Config, vocab: int, devices: int) -> tuple[int, int]:
    """Bytes of parameters and of moments on each of so many devices."""
    found = budget.rows(config, vocab, mesh.sizes(config.mesh.to_dict(), devices))
    return sum(row.parameter for row in found), sum(row.moments for row in found)


def gradients(config: Config, parameters: int, devices: int) -> int:
    """Bytes of one for each parameter that a device has at rest; in a pipeline of all of its stage's, which
    `mesh.fsdp` does not divide while it runs."""
    sizes = mesh.sizes(config.mesh.to_dict(), devices)
    return parameters * (sizes["fsdp"] if sizes[mesh.STAGE] > 1 else 1)


def knobs(config: Config, vocab: int, devices: int, memory: Memory) -> list[Knob]:
    """What to try, the cheapest first: `train.accumulation` up, `model.remat` down, `mesh.fsdp` up,
    `train.vocab_chunks` up.

    The first two cost time only where the devices were busy with small microbatches or nothing was computed
    twice; fsdp costs traffic between devices. Of each, the least value that should fit by arithmetic, or
    none; arithmetic does not know what another `remat` saves.
    """
    found = []
    for values in (accumulations, remats, fsdps, chunks):
        for changes, predicted in values(config, vocab, devices, memory):
            likely = predicted is None or predicted <= memory.available
            if likely and _legal(config, changes, vocab, devices):
                found.append(Knob(changes, predicted))
                break
    return found


def accumulations(config: Config, vocab: int, devices: int, memory: Memory) -> Iterator[tuple[dict, int]]:
    """More microbatches: activations shrink, a sum of gradients is kept beside."""
    over = math.prod(mesh.sizes(config.mesh.to_dict(), devices)[axis] for axis in mesh.BATCH)
    now, activations = config.train.accumulation, memory.temporaries - memory.gradients
    kept = memory.gradients * (2 if now == 1 else 1)
    for more in range(2 * now, config.data.batch // over + 1):
        if config.data.batch % more == 0:
            whole = memory.needed - memory.temporaries + kept + activations * now // more
            yield {"train.accumulation": more}, whole


def remats(config: Config, vocab: int, devices: int, memory: Memory) -> Iterator[tuple[dict, None]]:
    """Keep less for the backward pass."""
    if config.model.remat != REMAT:
        yield {"model.remat": REMAT}, None


def fsdps(config: Config, vocab: int, devices: int, memory: Memory) -> Iterator[tuple[dict, int]]:
    """Parameters cut finer, over devices that had copies: the batch of a device stays."""
    sizes = mesh.sizes(config.mesh.to_dict(), devices)
    for factor in mesh.divisors(sizes["data"])[1:]:
        changes = {"mesh.data": sizes["data"] // factor, "mesh.fsdp": sizes["fsdp"] * factor}
        if not _legal(config, changes, vocab, devices):
            continue
        other = changed(config, changes)
        parameters, moments = state(other, vocab, devices)
        kept = gradients(other, parameters, devices)
        yield changes, parameters + moments + memory.temporaries - memory.gradients + kept


def chunks(config: Config, vocab: int, devices: int, memory: Memory) -> Iterator[tuple[dict, int]]:
    """Logits of a part of the vocabulary at a time: they and their cotangents shrink."""
    sizes = mesh.sizes(config.mesh.to_dict(), devices)
    over = math.prod(sizes[axis] for axis in mesh.BATCH)
    tokens = config.data.batch // config.train.accumulation // over * config.data.length
    logits = 2 * LOGITS * tokens * vocab // (sizes["tensor"] * sizes["stage"])
    now = config.train.vocab_chunks
    for more in mesh.divisors(vocab // (sizes["tensor"] * sizes["stage"])):
        if now < more <= 64:
            yield {"train.vocab_chunks": more}, memory.needed - logits // now + logits // more


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The config with these keys."""
    return configs.from_flat(configs.to_flat(config) | changes)


def _legal(config, changes, vocab, devices):
    try:
        state(changed(config, changes), vocab, devices)
    except ConfigError:
        return False
    return True
