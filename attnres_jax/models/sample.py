"""Continue a text, token by token. The whole window is computed anew for each token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnres_jax.models.tokenizer import Tokenizer


class CannotSample(ValueError):
    """A prompt or a model that text cannot be drawn from."""


def sample(
    logits: Callable[[Int[np.ndarray, " window"], int], Float[Array, " V"]],
    vocab: int,
    tokenizer: Tokenizer | None,
    prompt: str,
    length: int,
    key: Array,
    temperature: float,
    window: int,
) -> str:
    """`prompt` and `length` more tokens of text, fewer where the model ends the document.

    Args:
      logits: `logits(tokens, at)` of the model, after the token at position `at`; it sees none behind it.
      vocab: how many token values the model has.
      tokenizer: of the corpus; None says that its tokens are no text.
      key: of the draws; the same key gives the same text.
      temperature: 0 takes the likeliest token, 1 draws as the model says.
      window: tokens that the model sees at most, the length it was trained on.

    Raises:
      CannotSample: for an empty prompt, or a model over other tokens.
    """
    if tokenizer is None:
        raise CannotSample("the corpus of this model has no tokenizer: its tokens are no text")
    if vocab != tokenizer.vocab:
        values = f"{vocab} token values, its corpus now {tokenizer.vocab}"
        raise CannotSample(f"this model has {values}: put the corpus back that it was trained on")
    text = tokenizer.encode(prompt).tolist()
    if not text:
        raise CannotSample("the prompt is empty: give at least one character to continue")
    for step in range(length):
        seen = text[-window:]
        tokens = np.zeros(window, np.int32)
        tokens[: len(seen)] = seen  # what stands behind the last token is not seen by it
        step_key = jax.random.fold_in(key, step)
        drawn = int(_draw(np.asarray(logits(tokens, len(seen) - 1)), step_key, temperature))
        if drawn == tokenizer.end:
            break
        text.append(drawn)
    return tokenizer.decode(np.array(text))


@jax.jit
def _draw(logits, key, temperature):
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-9))
    return jnp.where(temperature == 0, jnp.argmax(logits), drawn)
