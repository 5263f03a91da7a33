"""A decoder-only language model in Flax NNX over stacked layers; the residual scheme is a config value."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnres_jax import residuals
from attnres_jax.axes import compute_dtype
from attnres_jax.models.attention import Attend, with_first_values
from attnres_jax.models.attention import attend as attention_over_time
from attnres_jax.models.layers import Attention, SwiGLU, rms_norm, types
from attnres_jax.nnx import DepthMix
from attnres_jax.norm import RMSNorm
from attnres_jax.placement import Placement
from attnres_jax.residuals import Scheme
from attnres_jax.residuals.base import Mix
from attnres_jax.stack import DepthOutput, Layer, through_depth
from attnres_jax.walk import start

KINDS = {"a": Attention, "m": SwiGLU}
REMAT = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices; `blocks` are transformer blocks, `block_size` counts sublayers (two per block).

    `remat` says what a sublayer keeps for the backward pass, beside the stream that enters it; `attention`
    what attends over time (`models.attention.choose`); `value_residual` the share that the first attention's
    values have in those of all others.
    """

    vocab: int
    blocks: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    rope_theta: float = 1e4
    norm_eps: float = 1e-6
    key_norm_eps: float = 1e-6
    tied: bool = True
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: Literal["nothing", "dots", "everything"] = "nothing"
    attention: Literal["auto", "xla", "flash"] = "auto"
    value_residual: float = 0.0
    residual: str = residuals.DEFAULT
    block_size: int = 8
    depth_heads: int = 16
    key_width: int = 16
    streams: int = 4
    sinkhorn: int = 20
    window: int = 8

    def __post_init__(self):
        if self.width % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"width {self.width} must be heads of even width, heads whole groups of kv_heads: got "
                f"heads {self.heads}, kv_heads {self.kv_heads}"
            )

    @property
    def kinds(self) -> str:
        """One letter per sublayer."""
        return "am" * self.blocks

    @property
    def sublayers(self) -> int:
        """L."""
        return len(self.kinds)

    @property
    def param_dtype(self) -> jnp.dtype:
        """Master parameters: fp32, or fp64 when everything is."""
        return compute_dtype(self.dtype)

    @property
    def scheme(self) -> Scheme:
        """The residual scheme."""
        own = {"eps": self.key_norm_eps, "heads": self.depth_heads}
        same = {key: getattr(self, key) for key in residuals.OPTIONS if key not in own}
        return residuals.make(self.residual, **own, **same)


class Hidden(NamedTuple):
    """What the head takes, after the final norm, and what the loop over depth returned."""

    h: Float[Array, "B T D"]
    depth: DepthOutput


class Output(NamedTuple):
    """Logits in at least fp32, and what the loop over depth returned."""

    logits: Float[Array, "B T V"]
    depth: DepthOutput


class Transformer(nnx.Module):
    """Embedding, sublayers mixed over depth, final norm, head."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        make: dict[str, Any] = {"rngs": rngs} | types(config)
        self.embed = nnx.Embed(config.vocab, config.width, **make)
        self.layers = nnx.Dict({k: _stacked(KINDS[k], config, config.kinds.count(k), rngs) for k in KINDS})
        self.mix = DepthMix(config.scheme, config.sublayers, config.width)
        self.norm = rms_norm(config, rngs)
        if not config.tied:
            self.head = nnx.Linear(config.width, config.vocab, use_bias=False, **make)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        implementation: str | None = None,
        placement: Placement | None = None,
        record: bool = False,
    ) -> Output:
        """Next-token logits. Tokens see earlier tokens of their segment; see `through_depth` for the rest."""
        options: dict[str, Any] = {"implementation": implementation, "placement": placement, "record": record}
        h, depth = self.hidden(tokens, segments, positions, **options)
        return Output(logits(h, self.unembedding), depth)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        implementation: str | None = None,
        placement: Placement | None = None,
        record: bool = False,
        keep: Float[Array, " L"] | None = None,
    ) -> Hidden:
        """All but the head, for a loss that never holds the logits whole.

        `keep` multiplies the output of each sublayer: zero skips one.
        """
        if positions is None:
            positions = counting(tokens)
        attend, x = attending(self.config, implementation, placement), self.embed(tokens)
        if self.config.value_residual:
            first = first_attention(nnx.to_pure_dict(nnx.state(self.layers)))
            first = first_values(self.config, self.layers["a"], first, self.mix.mix, x, placement)
            attend = with_first_values(attend, first, self.config.value_residual)
        kept = {k: None if keep is None else keep[_places(self.config.kinds, k)] for k in KINDS}
        depth = through_depth(
            *(self.config.scheme, self.mix.mix, self.config.kinds),
            {k: layer(stack, positions, segments, attend, kept[k]) for k, stack in self.layers.items()},
            x,
            policy=REMAT[self.config.remat],
            implementation=implementation,
            placement=placement,
            record=record,
        )
        h = self.norm(depth.h)
        return Hidden(placement.enter(h) if placement else h, depth)

    @property
    def unembedding(self) -> Float[Array, "D V"]:
        """The head's matrix: its own, or the embedding's transpose."""
        return self.embed.embedding[...].T if self.config.tied else self.head.kernel[...]


def counting(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions from the start of the row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def attending(config: ModelConfig, implementation: str | None, placement: Placement | None) -> Attend:
    """Attention over time as the config, or the literal reference, has it."""
    attention = "xla" if implementation == "reference" else config.attention
    return partial(attention_over_time, implementation=attention, placement=placement)


def first_attention(layers: dict[str, Any]) -> dict[str, Any]:
    """What makes the first attention's values, of all layers (kind -> leaves [n, ...]): row 0, whether they
    are in order of depth or of stages."""
    return {name: jax.tree.map(lambda a: a[0], layers["a"][name]) for name in ("norm", "value")}


def first_values(
    config: ModelConfig,
    stack: Any,
    first: dict[str, Any],
    mix: Mix,
    x: Float[Array, "B T D"],
    placement: Placement | None,
) -> Float[Array, "B T G K"]:
    """v_1 of value residual learning, ahead of the loop over depth: of the read of the embedding `x`.

    `stack` is the module of all attentions, which may be abstract; `first` is `first_attention`'s.
    """
    norm, value = (nnx.merge(nnx.graphdef(getattr(stack, name)), first[name]) for name in ("norm", "value"))
    depth = start(config.scheme.literal(), mix, config.sublayers, x)
    read = depth.read(RMSNorm(norm.scale[...], norm.epsilon))
    return value(placement.enter(read.x) if placement else read.x)


def logits(h: Float[Array, "*tokens D"], w: Float[Array, "D V"]) -> Float[Array, "*tokens V"]:
    """Of the columns `w` of the unembedding: products in the activations' dtype, sums in at least fp32."""
    return jnp.matmul(h, w.astype(h.dtype), preferred_element_type=compute_dtype(h.dtype))


def abstract(config: ModelConfig) -> Transformer:
    """The model as shapes and dtypes: nothing is allocated."""
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def _stacked(kind, config, count, rngs):
    def one(rngs):
        layer = kind(config, rngs=rngs)
        for name in layer.gained:
            kernel = getattr(layer, name).kernel
            kernel[...] = kernel[...] * config.scheme.gain()
        return layer

    return nnx.vmap(one)(rngs.split(count))


def _places(kinds, kind):
    return np.array([at for at, letter in enumerate(kinds) if letter == kind])


def layer(
    stack: Any, positions: Array, segments: Array | None, attend: Attend, kept: Array | None = None
) -> Layer:
    """The sublayers of a kind: `stack` is a module of `Transformer.layers`, which may be abstract.

    Outputs are multiplied by `kept` [n], if it is given.
    """
    graph, params = nnx.split(stack)

    def norm(params):
        own = nnx.merge(graph, params).norm
        return RMSNorm(own.scale[...], own.epsilon)

    def apply(params, x, keep):
        y = nnx.merge(graph, params)(x, positions, segments, attend)
        return y if keep is None else keep.astype(y.dtype) * y, None

    return Layer(norm, apply, params, kept)
