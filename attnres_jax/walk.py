"""A forward pass over depth as a value, one sublayer at a time: for a model that loops itself."""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnres_jax.residuals.base import Mix, Norm, PyTree, Read, Scheme, summand
from attnres_jax.spelling import cut


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["mix", "history", "slots", "stream"],
    meta_fields=["scheme", "sublayers", "at"],
)
@dataclass(frozen=True)
class Depth:
    """Where a forward pass is: before sublayer `at` (from 0) of `sublayers`. A value, never mutated."""

    scheme: Scheme
    sublayers: int
    at: int
    mix: Mix
    history: PyTree
    slots: tuple = ()  # of the sublayers of this block that are still to come
    stream: PyTree = None

    def read(self, norm: Norm = lambda h: h) -> Read:
        """The input of the next sublayer: `.x`, which has passed `norm` if one is given."""
        self._check(self.slots, "call finish()")
        return self.scheme.read(self.slots[0], self.history, self.stream, norm)

    def write(self, y: Float[Array, "B T D"]) -> "Depth":
        """After the sublayer's output `y`; closes its block when it was the last of it."""
        self._check(self.slots, "one more wrote")
        stream = self.scheme.write(self.slots[0], self.stream, summand(y, self.history))
        after = replace(self, at=self.at + 1, slots=self.slots[1:], stream=stream)
        if after.slots:
            return after
        return replace(after, history=self.scheme.close(self.history, stream))._open()

    def finish(self) -> Read:
        """The output read, which the final norm and the head take."""
        self._check(not self.slots, "too early to finish")
        return self.scheme.finish(self.mix.output, self.history)

    def _open(self):
        if self.at == self.sublayers:
            return replace(self, stream=None)
        schedule = self.scheme.schedule(self.sublayers)
        size = schedule.sizes[schedule.openings.index(self.at)]
        stacked, history = self.scheme.open(cut(self.mix.sublayers, self.at, size), self.history)
        slots = tuple(jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(size))
        return replace(self, history=history, slots=slots, stream=self.scheme.begin(history))

    def _check(self, holds, problem):
        if not holds:
            raise ValueError(f"{self.at} of {self.sublayers} sublayers are written: {problem}")


def start(scheme: Scheme, mix: Mix, sublayers: int, x: Float[Array, "B T D"]) -> Depth:
    """Begin a forward pass over `sublayers` L sublayers from the embedding `x`; blocks are unrolled."""
    check_mix(scheme, mix, sublayers, x)
    return Depth(scheme, sublayers, 0, mix, scheme.start(x))._open()


def check_mix(scheme: Scheme, mix: Mix, sublayers: int, x: Array) -> None:
    """Raises `ValueError` where the embedding or the parameters do not fit the scheme."""
    if jnp.ndim(x) != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floats [batch, time, width], got {x.dtype}, shape {jnp.shape(x)}")
    made = jax.eval_shape(lambda: scheme.init(sublayers, x.shape[-1]))
    got, want = (jax.tree.map(jnp.shape, tree) for tree in (mix, made))
    if got != want:
        model = f"{scheme} over {sublayers} sublayers of width {x.shape[-1]}"
        raise ValueError(f"mix has shapes {got}, but {model} has {want}")


class Record(NamedTuple):
    """What analysis needs of one forward pass; l runs over the reads, L + 1 with the output read."""

    outputs: Float[Array, "L1 B T D"]
    """v_0 (the embedding), v_1 .. v_L (outputs of the sublayers)."""
    mixtures: Float[Array, "L1 B T D"]
    """h_l, before the pre-norm."""
    weights: tuple[Float[Array, "_ B T *G"], ...]
    """Of the sources of each read, as `scheme.sources` names them, or of the states."""
    steps: tuple[PyTree, ...] = ()
    """Coefficients of each write, as `scheme.apply` takes them."""
