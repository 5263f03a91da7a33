"""Semiseparable rank of every scheme's M, measured at random parameters, beside the paper's where it has one.

Measured is `matrix.rank` of M of two tokens and of two channels where M has several, in fp64: {L} sublayers
tanh(h W) with random W of width {D}, the scheme's parameters drawn around their start (standard deviation
{SPREAD}), its other options the defaults. A block M[l:, :l+1] has at most {MOST} rows or columns: {MOST} is
all that there is. Paper: 1 of one state, m of m streams, between N and N + S of N blocks, L of Full; of the
others it says none, and what is measured is reported.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnres_jax import residuals
from attnres_jax.analysis import matrix
from attnres_jax.residuals.base import Scheme
from attnres_jax.stack import Layer, through_depth

L, S, D, STREAMS, SPREAD = 24, 4, 8, 4, 0.3
MOST = L // 2 + 1
PAPER: dict[str, str] = dict.fromkeys(("plain", "rezero", "layerscale", "highway"), "1")
PAPER |= dict[str, str].fromkeys(("hc", "hc_static", "mhc"), f"m = {STREAMS}")
PAPER |= {"block": f"{L // S} to {L // S + S}", "full": f"L, here at most {MOST}"}
"""Where section 2 of the paper has one."""
QUICK = {"xla_backend_optimization_level": 0}


def measured(scheme: Scheme, seed: int = 0) -> list[int]:
    """The ranks found, each once."""
    rng = np.random.default_rng(seed)

    def away(path, leaf):
        square = ">" in scheme.axes.get(path[-1].key, "") and leaf.ndim > 1
        scale = SPREAD * leaf.shape[-2] ** -0.5 if square else SPREAD
        return np.asarray(leaf + scale * rng.standard_normal(leaf.shape), "float64")

    def run(mix, kernels, x):
        layers = {"m": Layer(partial(partial, _same), _sublayer, kernels)}
        record: Any = through_depth(scheme, mix, "m" * L, layers, x, record=True).record
        return matrix.diagonal(scheme, record)

    with jax.enable_x64(True):
        mix = jax.tree.map_with_path(away, scheme.init(L, D))
        kernels, x = D**-0.5 * rng.standard_normal((L, D, D)), rng.standard_normal((1, 2, D))
        M = np.asarray(jax.jit(run, compiler_options=QUICK)(mix, kernels, x))
    places = [(t, g) for t in range(2) for g in range(min(2, M.shape[-1]))]
    return sorted({matrix.rank(M[:, :, 0, t, g]) for t, g in places})


def _same(params, h):
    return h


def _sublayer(params, x, inputs):
    return jnp.tanh(x @ params), None


def write(out: Path, head: str) -> None:
    """The page, as markdown, with `head` below its title: a minute or two."""
    lines = ["| residual | measured | paper |", "| --- | ---: | --- |"]
    for name in residuals.SCHEMES:
        found = measured(residuals.make(name, block_size=S, sublayers=L, streams=STREAMS))
        lines.append(f"| {name} | {', '.join(map(str, found))} | {PAPER.get(name, '')} |")
    text = [f"# Semiseparable rank of the depth mixing matrix: L = {L}, S = {S}, m = {STREAMS}", "", head, ""]
    said = str(__doc__).strip().format(L=L, S=S, D=D, SPREAD=SPREAD, MOST=MOST)
    out.write_text("\n".join([*text, *lines, "", said]) + "\n")
