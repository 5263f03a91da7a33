"""The plain residual, h_{l+1} = h_l + f_l(h_l): every weight of the depth mixing matrix is one."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from attnres_jax.axes import compute_dtype
from attnres_jax.residuals.base import Mix, Read, Scheme
from attnres_jax.schedule import BlockSchedule


@dataclass(frozen=True)
class Plain(Scheme):
    """One block, no parameters; the stream is the running sum and the only source of a read."""

    def init(self, sublayers, width):
        return Mix({}, {})

    def schedule(self, sublayers):
        return BlockSchedule(sublayers, sublayers)

    def sources(self, sublayers):
        reads = np.arange(sublayers + 1)
        return (reads[:, None] >= reads)[:, None].astype(np.int8)

    def start(self, x):
        return x

    def begin(self, history, begins=True):
        return history

    def read(self, slot, history, stream, norm, row=None):
        return Read(norm(stream), stream, _ones(stream), history, stream)

    def write(self, slot, stream, y):
        return stream + y

    def close(self, history, stream):
        return stream

    def finish(self, mix, history):
        return Read(history, history, _ones(history))


def _ones(h):
    return jnp.ones((1, *h.shape[:-1]), compute_dtype(h.dtype))
