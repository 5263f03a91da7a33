"""The loss: chunks over the vocabulary against the whole, z-loss by hand, means over unequal microbatches."""

import os
import re
import subprocess
import sys
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys

from attnres_jax import configs
from attnres_jax.models.transformer import Hidden, ModelConfig, Output, logits
from attnres_jax.train import loss, state, step

VOCAB, END = 24, 5


class Bigram(NamedTuple):
    """The smallest model with a head: what the loss does with it compiles in a moment."""

    embedding: Any
    unembedding: Any

    def hidden(self, tokens, *segments, placement=None):
        return Hidden(jnp.tanh(self.embedding[tokens]), None)

    def __call__(self, tokens, *segments, placement=None):
        return Output(logits(self.hidden(tokens).h, self.unembedding), None)


def bigram(*, vocab=VOCAB, width=8, dtype="float32"):
    rng = np.random.default_rng(0)
    return Bigram(*(jnp.asarray(toys.draw(rng, s), dtype) for s in ((vocab, width), (width, vocab))))


def tokens_of(*shape, vocab=VOCAB):
    return jnp.asarray(np.random.default_rng(1).integers(0, vocab, shape), "int32")


def jit(function):
    return jax.jit(function, compiler_options=toys.QUICK)


def value_and_gradient(params, tokens, make=lambda p: p, *, microbatches=1, z_loss=0.0, end=None, chunks=1):
    """Both losses of a batch and the gradient, as a training step takes them."""
    count = loss.predictions(tokens, end)

    def function(params, tokens):
        found = loss.next_token(make(params), tokens, chunks=chunks, end=end)
        return loss.objective(found, count, z_loss)

    run = jit(lambda params, tokens: step.accumulated(function, params, tokens, microbatches))
    return jax.tree.map(np.asarray, run(params, tokens))


# Chunks over the vocabulary ---------------------------------------------------------------------


SLOW = [(tied, chunks) for tied in (True, False) for chunks in (2, 4, 8) if (tied, chunks) != (True, 4)]


@pytest.mark.parametrize(
    ("tied", "chunks"), [(True, 4), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in SLOW)]
)
def test_chunks_are_the_whole(tied, chunks):
    """Of the language model: loss, z-loss and every gradient in fp32, over microbatches, documents apart."""
    model = ModelConfig(VOCAB, 1, 16, 2, 1, 24, tied=tied, residual="plain")
    params, tokens = toys.parameters(model), tokens_of(4, 9)
    options = {"microbatches": 2, "z_loss": 0.1, "end": END}
    run = partial(value_and_gradient, params, tokens, partial(state.merge, model), **options)
    oracle.assert_close(run(chunks=chunks), run(chunks=1), 1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_chunks_of_a_bigram(chunks, microbatches):
    run = partial(value_and_gradient, bigram(), tokens_of(4, 9), microbatches=microbatches, z_loss=0.1)
    oracle.assert_close(run(chunks=chunks), run(chunks=1), 1e-6)


@pytest.mark.parametrize("chunks", [1, 3, VOCAB])
def test_each_prediction(chunks, x64):
    """Cross-entropy and log Z of each token, from the logits by hand, in fp64."""
    model, tokens = bigram(dtype="float64"), tokens_of(2, 9)
    z = np.tanh(np.asarray(model.embedding)[tokens[:, :-1]]) @ np.asarray(model.unembedding)
    log_z = np.log(np.sum(np.exp(z), -1))
    target = np.take_along_axis(z, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    found = loss.next_token(model, tokens, chunks=chunks)
    np.testing.assert_allclose(found.nats, log_z - target, rtol=1e-12)
    np.testing.assert_allclose(found.log_z, log_z, rtol=1e-12)
    assert found.mask.all()


def test_cotangents_of_chunks_are_added_in_fp32():
    """Of bf16 activations: 128 of them lose what one product of the whole vocabulary loses, not thrice."""
    h, w = (jnp.asarray(toys.draw(np.random.default_rng(0), s), "bfloat16") for s in ((2, 8, 32), (32, 1024)))
    targets = tokens_of(2, 8, vocab=1024)

    def gradient(h, w, chunks):
        def total(h):
            log_z, target = loss._chunked(h, w, targets, chunks)
            return jnp.sum(log_z - target)

        return np.asarray(jit(jax.grad(total))(h), np.float64)

    want = gradient(h.astype(jnp.float32), w.astype(jnp.float32), 1)
    once, often = (oracle.errors(gradient(h, w, chunks), want)[""] for chunks in (1, 128))
    assert 1e-4 < once < 4e-3
    assert often < 1.5 * once


V, B, T = 1009 * 8, 5, 17  # no other axis has these sizes
WIDE = {
    "model.blocks": 1,
    "model.width": 16,
    "model.heads": 1,
    "model.kv_heads": 1,
    "model.mlp_width": 24,
    "residual": "plain",
    "data.batch": B,
    "data.length": T,
}


def config_of(**changes):
    flat = configs.to_flat(configs.base.get_config()) | WIDE
    return configs.from_flat(flat | {k.replace("__", "."): v for k, v in changes.items()})


def compiled(**changes):
    """The training step, as a run compiles it but for LLVM's own optimiser."""
    run = step.programs(config_of(**changes), V)
    tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    return run.update.lower(jax.eval_shape(run.create), tokens).compile(compiler_options=toys.QUICK)


def logit_buffers(program):
    """Shapes of arrays with all of the vocabulary for each token, or beside an axis of tokens."""
    found = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program.as_text())
    shapes = {tuple(map(int, shape.split(","))) for shape in found}
    axes = {B, T, B * T}
    return [s for s in shapes if prod(s) >= B * T * V or (V in s and axes & set(s))]


def test_logits_are_never_whole(capsys):
    """No buffer of the compiled training step has a token axis and the whole vocabulary. Without chunks
    there are such; the control sees them."""
    programs = {chunks: compiled(train__vocab_chunks=chunks, optim__z_loss=1e-4) for chunks in (1, 8)}
    room = {chunks: p.memory_analysis().temp_size_in_bytes for chunks, p in programs.items()}
    with capsys.disabled():
        print(f"\ntemporaries of a step, V = {V}, {B} x {T} tokens: {room} bytes by number of chunks")
    assert logit_buffers(programs[1])
    assert logit_buffers(programs[8]) == []
    assert room[8] < 0.5 * room[1]


SHARDED = """
import re, sys
sys.path.insert(0, sys.argv[1])
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_loss import bigram, loss, np, oracle, step, tokens_of
model, tokens = bigram(vocab=1024), tokens_of(16, 9, vocab=1024)
def function(model, tokens):
    return loss.objective(loss.next_token(model, tokens, chunks=4), np.int32(128), 0.1)
@jax.jit
def run(model, tokens):
    return step.accumulated(function, model, tokens, 2)
def moved(program):
    "Sizes of what devices hand each other but sums."
    kinds = "all-gather|all-to-all|collective-permute"
    results = re.findall(rf" = (.*) (?:{kinds})(?:-start)?\\(", program.as_text())
    shapes = [shape for result in results for shape in re.findall(r"\\d\\[([\\d,]+)\\]", result)]
    return [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
def put(tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))
whole = put(model)
want = jax.device_get(run(model, tokens))
columns = whole._replace(unembedding=put(model.unembedding, None, "x"))
for arguments in ((whole, put(tokens, "x")), (columns, put(tokens))):
    program = run.lower(*arguments).compile()
    assert not moved(program), moved(program)
    assert "all-reduce" in program.as_text()
    oracle.assert_close(jax.device_get(program(*arguments)), want, 1e-5)
"""


def test_nothing_is_gathered():
    """On four devices: microbatches of rows that are spread, and chunks of a vocabulary that is spread,
    take from each device its share; the results are those of one device."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", SHARDED, os.path.dirname(__file__)]
    subprocess.run(words, env=os.environ | flags, check=True)


@pytest.mark.parametrize(
    ("vocab", "chunks", "near"), [(24, 5, "4 or 6"), (23, 3, "1 or 23"), (24, 99, "24 or 12"), (1, 2, "1")]
)
def test_chunks_that_do_not_divide(vocab, chunks, near):
    message = rf"train.vocab_chunks = {chunks} must be a divisor .* vocabulary of {vocab}, such as {near}$"
    with pytest.raises(configs.UserError, match=message):
        step.programs(config_of(train__vocab_chunks=chunks), vocab)


# Z-loss and means -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 4])
def test_z_loss_by_hand(chunks, x64):
    """Its gradient in the logits is 2 log(Z) softmax / count; what is reported leaves it out."""
    model, tokens = bigram(dtype="float64"), tokens_of(2, 9).at[0, 3].set(END)
    run = partial(value_and_gradient, model, tokens, chunks=chunks, end=END)
    ((plain, reported), without), ((value, again), gradient) = run(), run(z_loss=0.3)
    assert plain == reported == again

    h, w = np.asarray(model.hidden(tokens[:, :-1]).h), np.asarray(model.unembedding)
    z, mask = np.exp(h @ w), np.asarray(tokens[:, :-1]) != END
    log_z, softmax = np.log(z.sum(-1)), z / z.sum(-1, keepdims=True)
    np.testing.assert_allclose(value - plain, 0.3 * np.mean(log_z[mask] ** 2), rtol=1e-11)
    slope = 0.3 * 2 * (mask * log_z)[..., None] * softmax / mask.sum()
    got = gradient.unembedding - without.unembedding
    oracle.assert_close(got, np.einsum("btd,btv->dv", h, slope), 1e-11)


def test_the_mean_is_over_the_whole_batch(x64):
    """Microbatches with 3 and with 8 predictions: each prediction weighs the same."""
    model, e = bigram(dtype="float64"), END
    tokens = jnp.asarray([[e, 1, e, e, 2, e, 3, e, 4], [*range(10, 19)]])
    run = partial(value_and_gradient, model, tokens, end=END, z_loss=0.1)
    oracle.assert_close(run(microbatches=2), run(microbatches=1), 1e-13)
    found = loss.next_token(model, tokens, end=END)
    assert found.mask.sum(1).tolist() == [3, 8]
    np.testing.assert_allclose(run(microbatches=2)[0][1], found.nats[found.mask].mean(), rtol=1e-13)
