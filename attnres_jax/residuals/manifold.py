"""Manifold-constrained hyper-connections: mHC (arXiv 2512.24880) and mHC-lite (arXiv 2601.05732)."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from attnres_jax.residuals.base import Mix
from attnres_jax.residuals.states import States, Step, positive

OFF = -8.0
"""Logit of what hardly counts at first."""


@dataclass(frozen=True)
class Manifold(States):
    """`x <- H_res x + H_post^T f(H_pre x)` with a doubly stochastic H_res (2512.24880, eqs. 3 and 6 to 8):

        H_pre = sigmoid(l_pre), H_post = 2 sigmoid(l_post), H_res of l_res;  l = a (x' phi) + b

    x' is the RMSNorm of all streams together; phi holds its scale. a starts at 0.01. Other starts are those
    of mHC-lite's released code, for both schemes: phi zero, b_pre and b_post 1 at one stream, here l mod m,
    and -1 elsewhere, H_res all but the identity. So step 0 is near, not at, the pre-norm residual. Streams
    are copies of the embedding and are summed at the end, as in HC; as there phi decays, a and b do not.
    """

    streams: int = 4
    norm_eps: float = 1e-6
    axes: ClassVar = {"pre": "Lm", "post": "Lm", "res": "Lk", "scale": "Lc", "phi": "LmD>k"}

    @property
    @abstractmethod
    def identity(self) -> np.ndarray:
        """b_res at the start, [k]."""

    @abstractmethod
    def mixing(self, logits: Float[Array, "k B T"]) -> Float[Array, "m m B T"]:
        """H_res of its logits."""

    def init(self, sublayers, width):
        m, res = self.streams, jnp.asarray(self.identity, "float32")
        own = {name: 2.0 * jnp.eye(m)[jnp.arange(sublayers) % m] - 1 for name in ("pre", "post")}
        return Mix(
            {
                **own,
                "res": jnp.broadcast_to(res, (sublayers, len(res))),
                "scale": jnp.full((sublayers, 3), 0.01, "float32"),
                "phi": jnp.zeros((sublayers, m, width, 2 * m + len(res))),
            },
            {},
        )

    def weigh(self, slot, s):
        return jax.nn.sigmoid(self._logits(slot, s)["pre"])[..., None]

    def move(self, slot, s, y):
        logits = self._logits(slot, s)
        return Step(self.mixing(logits["res"])[..., None], 2 * jax.nn.sigmoid(logits["post"])[..., None])

    def _logits(self, slot: Any, s: Float[Array, "m B T D"]) -> dict[str, Array]:
        normed = s * lax.rsqrt(jnp.mean(s * s, (0, -1), keepdims=True) + self.norm_eps)
        dynamic = jnp.einsum("mbtd,mdk->kbt", normed, slot["phi"], precision="highest")
        parts = jnp.split(dynamic, [len(s), 2 * len(s)])
        names = zip(("pre", "post", "res"), parts, slot["scale"], strict=True)
        return {name: scale * part + slot[name][:, None, None] for name, part, scale in names}


@dataclass(frozen=True)
class MHC(Manifold):
    """H_res = Sinkhorn-Knopp of exp(l_res) (2512.24880, eq. 9): columns, then rows, `sinkhorn` times, 20.

    So rows sum to 1, and columns do at the start and where logits are moderate. Near the identity the
    iteration is slow (with noise of 0.5 on the first logits columns are 4e-3 off, 3e-3 after 100 rounds), and
    trained nets are there: configs/LOG.md. mHC-lite has no such gap.
    """

    sinkhorn: int = 20

    def __post_init__(self):
        super().__post_init__()
        positive(sinkhorn=self.sinkhorn)

    @property
    def identity(self):
        return np.where(np.eye(self.streams), 0.0, OFF).ravel()

    def mixing(self, logits):
        def normalise(log, _):
            for axis in (0, 1):
                log = log - jax.nn.logsumexp(log, axis, keepdims=True)
            return log, None

        log = logits.reshape(self.streams, self.streams, *logits.shape[1:])
        return jnp.exp(lax.scan(normalise, log, length=self.sinkhorn)[0])


@dataclass(frozen=True)
class MHCLite(Manifold):
    """H_res = sum_p softmax(l_res)_p P_p over the m! permutations P_p (2601.05732, section 4): exact."""

    @property
    def identity(self):
        return np.where(np.arange(math.factorial(self.streams)) == 0, 0.0, OFF)

    def mixing(self, logits):
        matrices = np.eye(self.streams)[list(permutations(range(self.streams)))]
        return jnp.einsum("pbt,pij->ijbt", jax.nn.softmax(logits, 0), matrices, precision="highest")
