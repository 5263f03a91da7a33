"""Continue a text, token by token. The whole window is computed anew for each token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from attnres_jax.models.tokenizer import Tokenizer
from attnres_jax.models.transformer import Transformer


class CannotSample(ValueError):
    """A prompt or a model that text cannot be drawn from."""


def sample(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompt: str,
    length: int,
    key: Array,
    temperature: float,
    window: int,
) -> str:
    """`prompt` and `length` more tokens of text, fewer where the model ends the document.

    Args:
      model: over the tokens of `tokenizer`.
      tokenizer: of the corpus; None says that its tokens are no text.
      key: of the draws; the same key gives the same text.
      temperature: 0 takes the likeliest token, 1 draws as the model says.
      window: tokens that the model sees at most, the length it was trained on.

    Raises:
      CannotSample: for an empty prompt, or a model over other tokens.
    """
    if tokenizer is None:
        raise CannotSample("the corpus of this model has no tokenizer: its tokens are no text")
    if model.config.vocab != tokenizer.vocab:
        values = f"{model.config.vocab} token values, its corpus now {tokenizer.vocab}"
        raise CannotSample(f"this model has {values}: put the corpus back that it was trained on")
    text = tokenizer.encode(prompt).tolist()
    if not text:
        raise CannotSample("the prompt is empty: give at least one character to continue")
    graph, params = nnx.split(model)

    for step in range(length):
        seen = text[-window:]
        tokens = np.zeros(window, np.int32)
        tokens[: len(seen)] = seen  # what stands behind the last token is not seen by it
        step_key = jax.random.fold_in(key, step)
        drawn = int(_draw(graph, params, tokens, len(seen) - 1, step_key, temperature))
        if drawn == tokenizer.end:
            break
        text.append(drawn)
    return tokenizer.decode(np.array(text))


@partial(jax.jit, static_argnums=0)
def _draw(graph, params, tokens, last, key, temperature):
    logits = nnx.merge(graph, params)(tokens[None]).logits[0, last]
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-9))
    return jnp.where(temperature == 0, jnp.argmax(logits), drawn)
