"""Whether a train step fits a device's memory, and what would make it: arithmetic, nothing is compiled.

What is known without a compiler is the state: parameters, moments, gradients; and what a pipeline carries
from tick to tick. The compiler says what the step needs beside it, also where that is too much.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnres_jax import configs
from attnres_jax.configs import Config, ConfigError
from attnres_jax.models.transformer import REMAT
from attnres_jax.parallel import mesh, pipeline
from attnres_jax.parallel.chunk import Chunked
from attnres_jax.parallel.timetable import Timetable
from attnres_jax.train import budget, pipelined

LEAST = "nothing"
"""What `model.remat` keeps when it keeps least."""
FP32 = 4
"""Bytes of a parameter, a gradient, a logit."""


class Memory(NamedTuple):
    """Bytes of one device."""

    parameters: int
    optimizer: int
    """Moments."""
    gradients: int
    """At least (`gradients`). They, matrices and caches are temporaries."""
    matrices: int
    """The copy of parameters that a pipeline computes with (`matrices`)."""
    caches: int
    """Of a pipeline (`caches`)."""
    temporaries: int
    """All that is live at the peak beside parameters, moments and tokens, by the compiler."""
    available: int

    @property
    def known(self) -> int:
        """What arithmetic knows of it."""
        return self.parameters + self.optimizer + self.gradients + self.matrices + self.caches

    @property
    def activations(self) -> int:
        """And the rest of temporaries: what arithmetic does not know."""
        return self.needed - self.known

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


def memory(config: Config, vocab: int, devices: int, needed: int, available: int) -> Memory:
    """Of each of so many devices, which needs `needed` bytes at the peak and has `available`."""
    parameters, moments = state(config, vocab, devices)
    whole = gradients(config, parameters, devices)
    held = matrices(config, whole, devices), caches(config, vocab, devices)
    return Memory(parameters, moments, whole, *held, needed - parameters - moments, available)


def state(config: Config, vocab: int, devices: int) -> tuple[int, int]:
    """Bytes of parameters and of moments on each of so many devices."""
    found = budget.rows(config, vocab, mesh.sizes(config.mesh.to_dict(), devices))
    return sum(row.parameter for row in found), sum(row.moments for row in found)


def gradients(config: Config, parameters: int, devices: int) -> int:
    """Bytes of one for each parameter that a device has at rest; in a pipeline of all of its stage's, which
    `mesh.fsdp` does not divide while it runs."""
    sizes = mesh.sizes(config.mesh.to_dict(), devices)
    return parameters * (sizes["fsdp"] if sizes[mesh.STAGE] > 1 else 1)


def matrices(config: Config, gradients: int, devices: int) -> int:
    """Bytes of its stage's parameters as a pipeline gathers and rounds them before the first tick; 0 without
    stages, and where they are that already. `gradients` are the bytes of theirs, in fp32."""
    sizes, size = mesh.sizes(config.mesh.to_dict(), devices), jnp.dtype(config.model.dtype).itemsize
    copied = sizes[mesh.STAGE] > 1 and (sizes["fsdp"] > 1 or size < FP32)
    return gradients * size // FP32 if copied else 0


def caches(config: Config, vocab: int, devices: int) -> int:
    """Bytes of blocks, of their cotangents and of messages that a device of a pipeline carries from tick to
    tick (`pipeline.carried`); 0 without stages."""
    sizes, model = mesh.sizes(config.mesh.to_dict(), devices), configs.model_config(config, vocab)
    if sizes[mesh.STAGE] == 1:
        return 0
    cut = pipelined.layout(config, model, sizes[mesh.STAGE]).chunks
    chunked = Chunked(model.scheme, model.kinds, cut, REMAT[model.remat])
    table = Timetable(sizes[mesh.STAGE], config.train.virtual_stages, config.train.accumulation)
    rows = config.data.batch // config.train.accumulation // math.prod(sizes[axis] for axis in mesh.BATCH)
    x = jax.ShapeDtypeStruct((rows, config.data.length // sizes["tensor"], model.width), model.dtype)
    units = sum(math.prod(lead) for lead in pipeline.carried(chunked, table, table.slots, True).values())
    return units * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(chunked.first, x)))


def knobs(config: Config, vocab: int, devices: int, memory: Memory, slices: int = 1) -> list[Knob]:
    """What to try, the cheapest first: `train.accumulation` up, `model.remat` down, `mesh.fsdp` up,
    `train.vocab_chunks` up, `mesh.tensor` up, `mesh.stage` up.

    The first two cost time only where the devices were busy with small microbatches or nothing was computed
    twice; fsdp costs traffic between devices. The last two are the dearest: tensor costs traffic in every
    sublayer, stages idle while a pipeline fills and drains. In a pipeline they alone divide what a stage
    holds while it runs. Of each, the least value that should fit by arithmetic, or none; where it cannot
    tell, as of another `remat` or more stages, the least that may. `mesh.data` stays a multiple of `slices`.
    """
    found = []
    for values in (accumulations, remats, fsdps, chunks, tensors, stages):
        for changes, predicted in values(config, vocab, devices, memory):
            likely = predicted is None or predicted <= memory.available
            if likely and _legal(config, changes, vocab, devices, slices):
                found.append(Knob(changes, predicted))
                break
    return found


def accumulations(config: Config, vocab: int, devices: int, memory: Memory) -> Iterator[tuple[dict, int]]:
    """More microbatches: activations shrink, a sum of gradients is kept beside."""
    over = math.prod(mesh.sizes(config.mesh.to_dict(), devices)[axis] for axis in mesh.BATCH)
    now = config.train.accumulation
    beside = memory.gradients if now == 1 else 0
    for more in range(2 * now, config.data.batch // over + 1):
        changes = {"train.accumulation": more}
        known = _known(config, changes, vocab, devices) if config.data.batch % more == 0 else None
        if known is not None:
            yield changes, known + beside + memory.activations * now // more


def remats(config: Config, vocab: int, devices: int, memory: Memory) -> Iterator[tuple[dict, None]]:
    """Keep less for the backward pass."""
    if config.model.remat != LEAST:
        yield {"model.remat": LEAST}, None


def fsdps(config: Config, vocab: int, devices: int, memory: Memory) -> Iterator[tuple[dict, int]]:
    """Parameters cut finer, over devices that had copies: the batch of a device stays."""
    for changes in _moved(config, devices, "fsdp", ("data",)):
        known = _known(config, changes, vocab, devices)
        if known is not None:
            yield changes, known + memory.activations


def chunks(config: Config, vocab: int, devices: int, memory: Memory) -> Iterator[tuple[dict, int]]:
    """Logits of a part of the vocabulary at a time: they and their cotangents shrink."""
    sizes = mesh.sizes(config.mesh.to_dict(), devices)
    over = math.prod(sizes[axis] for axis in mesh.BATCH)
    tokens = config.data.batch // config.train.accumulation // over * config.data.length
    logits = 2 * FP32 * tokens * vocab // (sizes["tensor"] * sizes["stage"])
    now = config.train.vocab_chunks
    for more in mesh.divisors(vocab // (sizes["tensor"] * sizes["stage"])):
        if now < more <= 64:
            yield {"train.vocab_chunks": more}, memory.needed - logits // now + logits // more


def tensors(config: Config, vocab: int, devices: int, memory: Memory) -> Iterator[tuple[dict, int]]:
    """Heads, channels and vocabulary cut finer: a device has more sequences, of each fewer tokens."""
    for changes in _moved(config, devices, "tensor", ("fsdp", "data")):
        known = _known(config, changes, vocab, devices)
        if known is not None:
            yield changes, known + memory.activations


def stages(config: Config, vocab: int, devices: int, memory: Memory) -> Iterator[tuple[dict, None]]:
    """Fewer layers a device, of more sequences; what is known of it fits."""
    for changes in _moved(config, devices, mesh.STAGE, ("fsdp", "data")):
        known = _known(config, changes, vocab, devices)
        if known is not None and known <= memory.available:
            yield changes, None


def _moved(config: Config, devices: int, axis: str, donors: Sequence[str]) -> Iterator[dict[str, int]]:
    """Changes that give a mesh axis a factor that another has, the least factor first."""
    sizes = mesh.sizes(config.mesh.to_dict(), devices)
    for factor in mesh.divisors(max(sizes[donor] for donor in donors))[1:]:
        for donor in donors:
            if sizes[donor] % factor == 0:
                yield {f"mesh.{donor}": sizes[donor] // factor, f"mesh.{axis}": sizes[axis] * factor}


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The config with these keys."""
    return configs.from_flat(configs.to_flat(config) | changes)


def _known(config, changes, vocab, devices):
    """Bytes, of the config with these keys; None where it is not legal."""
    try:
        return memory(changed(config, changes), vocab, devices, 0, 0).known
    except ConfigError:
        return None


def _legal(config, changes, vocab, devices, slices):
    if _known(config, changes, vocab, devices) is None:
        return False
    return mesh.sizes(changed(config, changes).mesh.to_dict(), devices)["data"] % slices == 0
