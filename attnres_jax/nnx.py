"""AttnRes for Flax NNX: parameters, names and initialisers over `walk`, no maths."""

from flax import nnx
from jaxtyping import Array, Float

from attnres_jax import walk
from attnres_jax.residuals.base import Mix, Scheme


class DepthMix(nnx.Module):
    """The depth mixing of a model of `sublayers` L sublayers and width D.

        depth = self.depth(x)                          # x [B,T,D]: the embedding
        for layer in self.layers:
            depth = depth.write(layer(depth.read().x))
        x = depth.finish().x                           # into the final norm

    Parameters of AttnRes: query, key_scale [L, D]; query_out, key_scale_out [D].
    """

    def __init__(self, scheme: Scheme, sublayers: int, width: int):
        self.scheme, self.sublayers = scheme, sublayers
        scheme.schedule(sublayers)  # a block size that does not fit fails here
        for name, value in scheme.init(sublayers, width).named().items():
            setattr(self, name, nnx.Param(value))

    @property
    def mix(self) -> Mix:
        """The parameters, as `stack.through_depth` takes them."""
        return Mix.of({k: v[...] for k, v in vars(self).items() if isinstance(v, nnx.Param)})

    def __call__(self, x: Float[Array, "B T D"]) -> walk.Depth:
        """Begin a forward pass."""
        return walk.start(self.scheme, self.mix, self.sublayers, x)
