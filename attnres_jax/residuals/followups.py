"""What came after Attention Residuals: RMS Block AttnRes and Delta AttnRes."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attnres_jax import depth
from attnres_jax.autodiff import Once, take
from attnres_jax.axes import compute_dtype
from attnres_jax.residuals.ablations import Additive, plus, total
from attnres_jax.residuals.attention import AttnRes
from attnres_jax.residuals.base import Mix, Read


class Sums(NamedTuple):
    """Of a block's outputs so far: as they are, which reads see, and each at unit RMS, the summary to be."""

    raw: Float[Array, "B T D"] | None
    unit: Float[Array, "B T D"] | None


@dataclass(frozen=True)
class RMSBlock(AttnRes):
    """A completed block's summary is `sum_i v_i / rms(v_i)`: large outputs do not rule its direction.

    By the text of its released code (kimmichtank/rms-block-attnres; it names no paper): the embedding and the
    running sum stay as they are. The RMS has AttnRes's eps, which that text leaves open. Two sums are kept
    for each sublayer, where Block AttnRes keeps one, and blocks are unrolled.
    """

    append_only: ClassVar = False

    def begin(self, history, begins=True):
        return Sums(super().begin(history, begins), super().begin(history, begins))

    def read(self, slot, history, stream, norm, row=None):
        read = super().read(slot, history, stream.raw, norm)
        return read._replace(stream=stream._replace(raw=read.stream))

    def write(self, slot, stream, y):
        unit = (self.step(slot, stream, y) * y).astype(y.dtype)
        return Sums(super().write(slot, stream.raw, y), super().write(slot, stream.unit, unit))

    def close(self, history, stream):
        return super().close(history, stream.unit)

    def step(self, slot: Any, stream: Any, y: Float[Array, "B T D"]) -> Float[Array, "B T 1"]:
        """1 / rms(y)."""
        wide = y.astype(compute_dtype(y.dtype))
        return lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)

    def apply(self, weights, steps, v):
        unit = v * jnp.stack([jnp.ones_like(steps[0]), *steps])
        mixtures = []
        for l, (w, sources) in enumerate(zip(weights, self.sources(len(steps)), strict=True)):
            summaries = jnp.einsum("ri,ibtg->rbtg", sources[: len(w)], unit, precision="highest")
            if l < len(steps) and l % self.block_size:
                summaries = summaries.at[-1].set(
                    jnp.einsum("i,ibtg->btg", sources[len(w) - 1], v, precision="highest")
                )
            w = w.reshape(*w.shape[:3], -1)
            mixtures.append(jnp.sum(jnp.repeat(w, v.shape[-1] // w.shape[-1], -1) * summaries, 0))
        return jnp.stack(mixtures)


@dataclass(frozen=True)
class Delta(Additive):
    """Delta AttnRes (arXiv 2605.18855): `h_l = u_l + sum_i a_i v_i`, u_l the plain residual stream.

    a is a softmax over the embedding and earlier outputs, with S > 1 over the embedding and the sums of
    completed blocks alone (Delta Block; the running sum is in u_l only). The first read has no sources and is
    the embedding; the head reads the plain stream. From the abstract, the authors' note and their code; ours,
    where that differs from their text: queries start at zero, so step 0 is the plain network, and a block's
    sum is a source of all of the next block. The optional null source for fine-tuning is left out.
    """

    def init(self, sublayers, width):
        return Mix(super().init(sublayers, width).sublayers, {})

    def read(self, slot, history, stream, norm, row=None):
        rows, done, weights = history.rows, history.inner.done, None
        if self.two_phase:
            (mixture, _), done = take(done.rows, slot.j)
            done = Once(done)
        else:
            mixture, weights = depth.mix(slot.w, [v for some in rows for v in some.array], self.rule)
        own = sum(len(some.array) if some.n is None else some.n for some in rows) > 1
        u = history.total if stream is None else plus(history.total, stream)
        mixture = plus(jnp.where(own, mixture, 0), u)
        if weights is not None:
            running = [] if stream is None else [jnp.ones_like(weights[:1])]
            weights = jnp.concatenate([1 + jnp.where(own, weights, 0), *running])
        inner = history.inner._replace(done=done)
        return Read(norm(mixture), mixture, weights, history._replace(inner=inner), stream)

    def finish(self, mix, history):
        u = total(history)
        seen = sum(len(some.array) for some in history)
        return Read(u, u, jnp.ones((seen, *u.shape[:-1]), compute_dtype(u.dtype)))
