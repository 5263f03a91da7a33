"""Cross-entropy of the next token: logits whole or in chunks over the vocabulary, documents apart or not."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnres_jax.axes import compute_dtype
from attnres_jax.configs import Config, UserError
from attnres_jax.models.transformer import logits
from attnres_jax.parallel.mesh import STAGE, divisors
from attnres_jax.parallel.pipeline import summed
from attnres_jax.placement import Placement


class NextToken(NamedTuple):
    """Of each prediction."""

    nats: Float[Array, "B T"]
    """Cross-entropy."""
    log_z: Float[Array, "B T"]
    """Log of the sum over the vocabulary of exp(logits)."""
    mask: Bool[Array, "B T"]
    """Whether it counts."""


def configured(
    config: Config,
    vocab: int,
    end: int | None,
    place: Placement | None = None,
    implementation: str | None = None,
) -> Callable[[Any, Array], NextToken]:
    """`next_token` as `config` asks for it; raises `UserError` where this corpus does not allow it.

    `end` is the corpus's end token, None where it has none.
    """
    chunks = config.train.vocab_chunks
    if vocab % chunks:
        near = sorted(divisors(vocab), key=lambda n: abs(n - chunks))[:2]
        raise UserError(
            f"train.vocab_chunks = {chunks} must be a divisor of the corpus's vocabulary of {vocab}, "
            f"such as {' or '.join(map(str, near))}"
        )
    how = {"chunks": chunks, "place": place, "implementation": implementation}
    return partial(next_token, end=document_end(config, end), **how)


def document_end(config: Config, end: int | None) -> int | None:
    """The token that ends a document, None where documents see each other."""
    if config.data.segments and end is None:
        raise UserError(
            "data.segments = True needs a corpus whose documents end with an end token, this one has none: "
            "set it to False, or make the corpus again with one"
        )
    return end if config.data.segments else None


def next_token(
    model: Any,
    tokens: Int[Array, "B T1"],
    *,
    chunks: int = 1,
    end: int | None = None,
    place: Placement | None = None,
    implementation: str | None = None,
) -> NextToken:
    """Cross-entropy of each next token; with an `end`, of each within its document, which sees no other.

    `implementation` is that of the reads over depth (`choice.choose`). More `chunks` than one cost a second
    product with the head in the backward pass, and leave room: no array holds all of the vocabulary for each
    token.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    how: dict[str, Any] = {"placement": place}
    how |= {"implementation": implementation} if implementation else {}
    seen = apart(inputs, end)
    mask = counted(tokens, end)
    if chunks == 1:
        whole = model(inputs, *seen, **how).logits
        nats = optax.softmax_cross_entropy_with_integer_labels(whole, targets)
        return NextToken(nats, jax.nn.logsumexp(whole, -1), mask)
    hidden = model.hidden(inputs, *seen, **how).h
    log_z, target = _chunked(hidden, model.unembedding, targets, chunks)
    return NextToken(log_z - target, log_z, mask)


def over_stages(
    h: Float[Array, "B T D"],
    unembedding: Float[Array, "D W"],
    tokens: Int[Array, "B T1"],
    stages: int,
    *,
    chunks: int = 1,
    end: int | None = None,
) -> NextToken:
    """`next_token` where stage p of a pipeline has the columns p, P + p, ... of the unembedding, all of them
    the same `h`: inside `shard_map`, manual over `stage`. Two sums and a maximum over stages, of [B,T]."""
    inside, stage = tokens[:, 1:] // stages, lax.axis_index(STAGE)
    own = jnp.where(tokens[:, 1:] % stages == stage, inside, -1)
    log_z, target = _chunked(h, unembedding, own, chunks)
    most = lax.pmax(lax.stop_gradient(log_z), STAGE)
    log_z = most + jnp.log(summed(jnp.exp(log_z - most)))
    return NextToken(log_z - summed(target), log_z, counted(tokens, end))


def documents(tokens: Int[Array, "B T"], end: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The number of each token's document in its row, and its position in the document.

    An end token is the last of its document.
    """
    ends = (tokens == end).astype(jnp.int32)
    at = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    starts = jnp.pad(ends[:, :-1] * at[1:], ((0, 0), (1, 0)))
    return jnp.cumsum(ends, 1) - ends, at - lax.cummax(starts, axis=1)


def apart(tokens: Int[Array, "B T"], end: int | None) -> tuple[Int[Array, "B T"], ...]:
    """`documents`, as a model takes them after its tokens: nothing where they see each other."""
    return () if end is None else documents(tokens, end)


def counted(tokens: Int[Array, "B T1"], end: int | None) -> Bool[Array, "B T"]:
    """Which predictions count: what follows an `end` has nothing to do with what stands before it."""
    inputs = tokens[:, :-1]
    return jnp.ones(inputs.shape, bool) if end is None else inputs != end


def predictions(tokens: Int[Array, "B T1"], end: int | None) -> Int[Array, ""]:
    """How many count, at least 1, to divide by."""
    return jnp.maximum(jnp.sum(counted(tokens, end)), 1)


def objective(
    found: NextToken, count: Int[Array, ""], z_loss: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What is minimised, and the part of it that is reported (nats per token), of `count` predictions.

    They add up over microbatches, `count` being that of the whole batch.
    """
    nats = jnp.sum(jnp.where(found.mask, found.nats, 0)) / count
    if not z_loss:
        return nats, nats
    return nats + z_loss * jnp.sum(jnp.where(found.mask, jnp.square(found.log_z), 0)) / count, nats


def _chunked(h, w, targets, chunks):
    """Log Z and the target's logit. Chunk c is columns c, C + c, 2C + c, ... of `w`, one from each run
    of C, so that a vocabulary spread over devices is spread in every chunk alike."""
    size = w.shape[1] // chunks
    parts = jnp.moveaxis(w.reshape(w.shape[0], size, chunks), 2, 0).astype(h.dtype)
    wide = h.astype(compute_dtype(h.dtype))  # the chunks' cotangents of h are added up in this dtype

    @partial(jax.checkpoint, prevent_cse=False)
    def part(wide, c, w):
        some = logits(wide.astype(h.dtype), w)
        own = targets[..., None] == c + chunks * jnp.arange(size)
        return jax.nn.logsumexp(some, -1), jnp.sum(jnp.where(own, some, 0), -1)

    def body(_, cw):
        return None, part(wide, *cw)

    _, (log_z, target) = lax.scan(body, None, (jnp.arange(chunks), parts))
    return jax.nn.logsumexp(log_z, 0), jnp.sum(target, 0)
