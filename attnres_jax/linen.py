"""AttnRes for Flax Linen: parameters, names and initialisers over `walk`, no maths."""

from flax import linen
from jaxtyping import Array, Float

from attnres_jax import walk
from attnres_jax.residuals.base import Mix, Scheme


class DepthMix(linen.Module):
    """The depth mixing of a model of `sublayers` L sublayers; inside a compact `__call__`:

        depth = DepthMix(scheme, len(layers))(x)       # x [B,T,D]: the embedding
        for layer in layers:
            depth = depth.write(layer(depth.read().x))
        x = depth.finish().x                           # into the final norm

    Parameters of AttnRes: query, key_scale [L, D]; query_out, key_scale_out [D].
    """

    scheme: Scheme
    sublayers: int

    @linen.compact
    def __call__(self, x: Float[Array, "B T D"]) -> walk.Depth:
        """Begin a forward pass."""
        initial = self.scheme.init(self.sublayers, x.shape[-1]).named()
        params = {k: self.param(k, lambda key, v=v: v) for k, v in initial.items()}
        return walk.start(self.scheme, Mix.of(params), self.sublayers, x)
