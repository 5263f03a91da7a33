"""Depth mixing as a value with seven verbs: start, open, begin, read, write, close, finish.

A scheme is static; no verb takes a layer index. A history lives across blocks, a stream inside one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnres_jax.depth import Rows
from attnres_jax.placement import Placement
from attnres_jax.schedule import BlockSchedule

PyTree = Any
Norm = Callable[[Array], Array]


class Mix(NamedTuple):
    """Parameters of a scheme: leaves [L, ...] of the sublayers, and those of the output read."""

    sublayers: dict[str, Array]
    output: dict[str, Array]

    def named(self) -> dict[str, Array]:
        """One flat table, as modules name their parameters: `query`, ..., `query_out`, ..."""
        return self.sublayers | {f"{k}_out": v for k, v in self.output.items()}

    @classmethod
    def of(cls, named: dict[str, Array]) -> "Mix":
        """The inverse of `named`."""
        output = {k.removesuffix("_out"): v for k, v in named.items() if k.endswith("_out")}
        return cls({k: v for k, v in named.items() if not k.endswith("_out")}, output)


class Read(NamedTuple):
    """`x` enters the sublayer, `mixture` is h before the norm, `weights` [R,B,T] or [R,B,T,G] of the sources.

    `mixture` is `None` where a kernel took the norm, `weights` in two-phase reads. Later reads and `write`
    take `history` and `stream`: the same values, whose cotangents kernels sum as they go.
    """

    x: Float[Array, "B T D"]
    mixture: Float[Array, "B T D"] | None
    weights: Float[Array, "R B T *G"] | None
    history: PyTree = None
    stream: PyTree = None


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """The protocol; `implementation` names that of the ops (`choice.choose`), `placement` its devices."""

    implementation: str | None = None
    placement: Placement | None = None
    append_only: ClassVar[bool] = False
    """History is a tuple of `Rows`, to which `close` appends the stream and nothing else changes."""
    in_place: ClassVar[bool] = False
    """Where kernels run, reads also take it in one slot of an array (`Rows.slot`), and hand that on."""
    axes: ClassVar[Mapping[str, str]] = {}
    """Parameters as rows of models/table.py: "LD", or "LD>m": a matrix, which decays. No L at the output."""
    matrices: ClassVar[bool] = False
    """Entries of M are D x D: only `apply` gives them."""

    @property
    def no_kernel(self) -> str | None:
        """Why no kernel runs its reads, or None."""
        return "its reads are jnp, compiled by XLA"

    def literal(self) -> "Scheme":
        """The same scheme with every read as its equation is written."""
        return self

    def gain(self) -> float:
        """What matrices of values, outputs and MLPs are multiplied by at initialisation."""
        return 1.0

    @abstractmethod
    def init(self, sublayers: int, width: int) -> Mix:
        """The parameters at initialisation, fp32."""

    @abstractmethod
    def schedule(self, sublayers: int) -> BlockSchedule:
        """How L sublayers are cut into blocks."""

    @abstractmethod
    def sources(self, sublayers: int) -> np.ndarray:
        """0/1 [L + 1 reads, R sources, L + 1 outputs]: what `Read.weights` weigh."""

    @abstractmethod
    def start(self, x: Float[Array, "B T D"]) -> PyTree:
        """The history before the first block, its first leaf [..., B, T, D]; `x` is the embedding."""

    def open(self, mix: dict[str, Array], history: PyTree, begins: Any = True) -> tuple[PyTree, PyTree]:
        """Slots of the block's S sublayers, stacked, and the history; `mix` are their parameters.

        A pipeline may part a block: then of some of them, `begins` where its first is. `begins` is True only
        where that one is run by itself; in a loop it is an array, and traced where it is not known."""
        return mix, history

    @abstractmethod
    def begin(self, history: PyTree, begins: Any = True) -> PyTree:
        """The stream at the start of a block: its carry, and what the backward pass keeps. `begins` as `open`
        had it; None, if it is True, is a sum of nothing."""

    @abstractmethod
    def read(self, slot: PyTree, history: PyTree, stream: PyTree, norm: Norm, row: Any = None) -> Read:
        """What the sublayer sees; `stream`, as of `begin`, may be None. `row` (array, place): where the loop
        has it too, but for a block's first, for kernels."""

    @abstractmethod
    def write(self, slot: PyTree, stream: PyTree, y: Float[Array, "B T D"]) -> PyTree:
        """The stream after the sublayer's output `y` (`summand`); `stream` as in `read`."""

    @abstractmethod
    def close(self, history: PyTree, stream: PyTree) -> PyTree:
        """The history after the block."""

    @abstractmethod
    def finish(self, mix: dict[str, Array], history: PyTree) -> Read:
        """The output read, for the final norm and the head; its `x` is not normed. `history` as of reads."""

    def step(self, slot: PyTree, stream: PyTree, y: Float[Array, "B T D"]) -> PyTree:
        """For analysis: the coefficients of this `write`, where it has any that are not one."""
        return None

    def apply(self, weights: tuple, steps: tuple, v: Float[Array, "L1 B T G"]) -> Array | None:
        """M v by recorded weights and steps, [L1,B,T,G]; None: as `sources` say. G < D: alike channels."""
        return None


@dataclass(frozen=True)
class Appending(Scheme):
    """Sources are the embedding and the sums of blocks' outputs; history is these, as append-only rows."""

    append_only: ClassVar = True
    block_size: ClassVar = 1

    def schedule(self, sublayers):
        """Blocks of `block_size` sublayers."""
        return BlockSchedule(sublayers, self.block_size)

    def sources(self, sublayers):
        """Those of the schedule."""
        return self.schedule(sublayers).sources

    def start(self, x):
        """The first row."""
        return (Rows(x[None]),)

    def close(self, history, stream):
        """The stream as one more row. The barrier's transpose sums cotangents block by block."""
        return (*getattr(history, "rows", history), Rows(jax.lax.optimization_barrier(stream)[None]))


def summand(y: Array, history: PyTree) -> Array:
    """`y`, which may begin a sum, in the dtype of a history, whose first leaf is [..., B, T, D]."""
    like = jax.tree.leaves(history)[0]
    if jnp.shape(y) != like.shape[-3:] or not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(f"y must be floats {[*like.shape[-3:]]} as x is, got {y.dtype}{[*jnp.shape(y)]}")
    return y.astype(like.dtype)


def asking(*shape: int) -> dict[str, Array]:
    """Of reads by AttnRes, as initialised: a query, and the scale of the keys' norm."""
    return {"query": jnp.zeros(shape), "key_scale": jnp.ones(shape)}
