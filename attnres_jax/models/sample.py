"""Continue a text, token by token. The whole window is computed anew for each token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from attnres_jax.models.transformer import Transformer


class CannotSample(ValueError):
    """A prompt or a model that text cannot be drawn from."""


def sample(model: Transformer, prompt: str, length: int, key: Array, temperature: float, window: int) -> str:
    """`prompt` and `length` more bytes of text.

    Args:
      model: over bytes: its vocabulary is 256.
      key: of the draws; the same key gives the same text.
      temperature: 0 takes the likeliest byte, 1 draws as the model says.
      window: bytes that the model sees at most, the length it was trained on.

    Raises:
      CannotSample: for an empty prompt, or a model whose tokens are not bytes.
    """
    if model.config.vocab != 256:
        raise CannotSample(f"sample writes bytes, but this model has {model.config.vocab} token values")
    text = list(prompt.encode(errors="surrogateescape"))  # a shell may pass any bytes
    if not text:
        raise CannotSample("the prompt is empty: give at least one character to continue")
    graph, params = nnx.split(model)

    for step in range(length):
        seen = text[-window:]
        tokens = np.zeros(window, np.int32)
        tokens[: len(seen)] = seen  # what stands behind the last byte is not seen by it
        step_key = jax.random.fold_in(key, step)
        text.append(int(_draw(graph, params, tokens, len(seen) - 1, step_key, temperature)))
    return bytes(text).decode(errors="replace")


@partial(jax.jit, static_argnums=0)
def _draw(graph, params, tokens, last, key, temperature):
    logits = nnx.merge(graph, params)(tokens[None]).logits[0, last]
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-9))
    return jnp.where(temperature == 0, jnp.argmax(logits), drawn)
