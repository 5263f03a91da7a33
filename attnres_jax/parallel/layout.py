"""Stacks of layers in order of stages, for a pipelined mesh, and in order of depth, as checkpoints have them.

On a pipelined mesh the first axis of every leaf `layers/KIND/...` is cut over `stage`. So it runs over
stages, over a stage's chunks, over a chunk's layers of the kind; shorter chunks are filled up with layers
that never count.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from attnres_jax.models.table import path_name
from attnres_jax.parallel.timetable import Chunks
from attnres_jax.residuals.base import PyTree

LAYERS = re.compile(r"(?:^|/)layers/(\w+)/")


@dataclass(frozen=True)
class Layout:
    """Of sublayers `kinds` in `chunks`."""

    kinds: str
    chunks: Chunks

    def staged(self, tree: PyTree) -> PyTree:
        """Leaves [n, ...] below `layers/KIND`, in order of depth, as [P V n', ...]; others unchanged."""
        return self._taken(tree, lambda kind: self._places(kind)[0])

    def unstaged(self, tree: PyTree) -> PyTree:
        """The inverse of `staged`."""
        return self._taken(tree, lambda kind: self._places(kind)[1])

    def _taken(self, tree, rows):
        def take(path, leaf):
            found = LAYERS.search(path_name(path))
            return leaf[rows(found[1])] if found else leaf

        return jax.tree.map_with_path(take, tree)

    def _places(self, kind: str) -> tuple[Any, Any]:
        """For each row in order of stages the layer of the kind, and for each layer its row."""
        chunks, period = self.chunks, self.kinds[: self.chunks.together]
        longest = chunks.segments[-1].last // len(period)
        starts = np.array(chunks.bounds[:-1]) // len(period)
        groups = starts.reshape(chunks.virtual_stages, chunks.stages).T[..., None] + np.arange(longest)
        ends = np.array(chunks.bounds[1:]).reshape(chunks.virtual_stages, chunks.stages).T // len(period)
        runs = groups < ends[..., None]
        each = np.arange(count := period.count(kind))
        groups = np.minimum(groups, len(self.kinds) // len(period) - 1)
        layers = (groups[..., None] * count + each).ravel()
        counts = np.broadcast_to(runs[..., None], (*runs.shape, count)).ravel()
        rows = np.zeros(self.kinds.count(kind), int)
        rows[layers[counts]] = np.flatnonzero(counts)
        return layers, rows
