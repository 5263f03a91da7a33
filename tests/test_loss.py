"""The loss: chunks over the vocabulary against the whole, z-loss by hand, documents that see no other."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys
from flax import nnx

from attnres_jax import configs
from attnres_jax.models.table import path_name
from attnres_jax.models.transformer import ModelConfig, abstract
from attnres_jax.train import evaluate, loss, state, step
from attnres_jax.train.data import Corpus

VOCAB = 24
SMALL = ModelConfig(
    vocab=VOCAB, blocks=1, width=16, heads=2, kv_heads=1, mlp_width=24, tied=False, block_size=2
)


def drawn(model, seed=0):
    """Parameters that give every token a probability of its own: logits have a variance of about 1."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        mean, scale = (1.0, 0.3) if "scale" in path_name(path) else (0.0, model.width**-0.5)
        return jnp.asarray(toys.draw(rng, leaf.shape, scale, mean), leaf.dtype)

    return jax.tree.map_with_path(fill, nnx.to_pure_dict(nnx.state(abstract(model))))


def tokens_of(*shape, vocab=VOCAB):
    return jnp.asarray(np.random.default_rng(1).integers(0, vocab, shape), "int32")


def jit(function):
    return jax.jit(function, compiler_options=toys.QUICK)


def value_and_gradient(model, params, tokens, *, microbatches=1, z_loss=0.0, end=None, chunks=1):
    """Both losses of a batch and the gradient, as a training step takes them."""
    count = loss.predictions(tokens, end)

    def function(params, tokens):
        found = loss.next_token(state.merge(model, params), tokens, chunks=chunks, end=end)
        return loss.objective(found, count, z_loss)

    run = jit(lambda params, tokens: step.accumulated(function, params, tokens, microbatches))
    return jax.tree.map(np.asarray, run(params, tokens))


def nats(model, params, tokens, **options):
    function = partial(loss.next_token, **options)
    return np.asarray(jit(lambda p, t: function(state.merge(model, p), t).nats)(params, tokens))


# Chunks over the vocabulary ---------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_chunks_are_the_whole(tied):
    """Loss, z-loss and every gradient in fp32, accumulated over microbatches, documents apart."""
    model = replace(SMALL, tied=tied)
    params, tokens = drawn(model), tokens_of(4, 9)
    run = partial(value_and_gradient, model, params, tokens, microbatches=2, z_loss=0.1, end=5)
    whole = run(chunks=1)
    for chunks in (2, 4, 8):
        oracle.assert_close(run(chunks=chunks), whole, 1e-6)


def test_each_prediction(x64):
    """Cross-entropy and log Z of each token, from the logits by hand, in fp64."""
    model = replace(SMALL, dtype="float64")
    params, tokens = drawn(model), tokens_of(2, 9)
    z = np.asarray(jit(lambda p, t: state.merge(model, p)(t).logits)(params, tokens[:, :-1]))
    log_z = np.log(np.sum(np.exp(z), -1))
    target = np.take_along_axis(z, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    for chunks in (1, 3, VOCAB):
        run = partial(loss.next_token, chunks=chunks)
        found = jit(lambda p, t, run=run: run(state.merge(model, p), t))(params, tokens)
        np.testing.assert_allclose(found.nats, log_z - target, rtol=1e-12)
        np.testing.assert_allclose(found.log_z, log_z, rtol=1e-12)
        assert found.mask.all()


def test_cotangents_of_chunks_are_added_in_fp32():
    """Of bf16 activations: 128 of them lose no more than one product of the whole vocabulary does."""
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
    assert often < 1.1 * once


V, B, T = 1009 * 8, 5, 17  # no other axis has these sizes
WIDE = {
    "model.blocks": 1,
    "model.width": 16,
    "model.heads": 1,
    "model.kv_heads": 1,
    "model.mlp_width": 24,
    "block_size": 2,
    "data.batch": B,
    "data.length": T,
}


def compiled(**changes):
    """The training step, as a run compiles it."""
    flat = configs.to_flat(configs.base.get_config()) | WIDE
    config = configs.from_flat(flat | {k.replace("__", "."): v for k, v in changes.items()})
    run = step.programs(config, V)
    tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    return run.update.lower(jax.eval_shape(run.create), tokens).compile()


def buffers(program):
    """The shapes of all arrays in a compiled program."""
    found = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program.as_text())
    return {tuple(map(int, shape.split(","))) for shape in found}


def logit_buffers(program):
    """Those with all of the vocabulary for each token, or beside an axis of tokens, however folded."""
    return [
        shape
        for shape in buffers(program)
        if prod(shape) >= B * T * V or (V in shape and {B, T, B * T} & set(shape))
    ]


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
import jax, re, sys
import numpy as np
from functools import partial
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[1])
import test_loss
from attnres_jax.train import loss, state, step
model = test_loss.replace(test_loss.SMALL, vocab=1024)
params, tokens = test_loss.drawn(model), test_loss.tokens_of(16, 9, vocab=1024)
def function(params, tokens):
    return loss.objective(loss.next_token(state.merge(model, params), tokens, chunks=4), 128, 0.1)
def run(params, tokens):
    return step.accumulated(function, params, tokens, 2)
def moved(program, kinds):
    found = re.findall(rf"= [a-z]+\\d+\\[([\\d,]+)\\]\\S* (?:{kinds})\\(", program.as_text())
    return [np.prod([int(n) for n in shape.split(",")]) for shape in found]
want = jax.jit(run)(params, tokens)
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))
rows = jax.jit(run).lower(put(params), put(tokens, "x")).compile()
assert moved(rows, "all-reduce") and not moved(rows, "all-gather|all-to-all|collective-permute")
spread = put(params) | {"head": {"kernel": put(params["head"]["kernel"], None, "x")}}
columns = jax.jit(run).lower(spread, put(tokens)).compile()
assert max(moved(columns, "all-gather|all-to-all|collective-permute"), default=0) < 1024
for got in (rows(put(params), put(tokens, "x")), columns(spread, put(tokens))):
    test_loss.oracle.assert_close(jax.device_get(got), jax.device_get(want), 1e-6)
"""


def test_nothing_is_gathered():
    """On four devices: microbatches of rows that are spread, and chunks of a vocabulary that is spread,
    take from each device its share; the results are those of one device."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", SHARDED, os.path.dirname(__file__)]
    subprocess.run(words, env=os.environ | flags, check=True)


# z-loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 4])
def test_z_loss_by_hand(chunks, x64):
    """Its gradient in the logits is 2 log(Z) softmax / count; what is reported leaves it out."""
    model, end = replace(SMALL, dtype="float64"), 5
    params, tokens = drawn(model), tokens_of(2, 9).at[0, 3].set(end)
    run = partial(value_and_gradient, model, params, tokens, chunks=chunks, end=end)
    ((plain, reported), without), ((value, again), gradient) = run(), run(z_loss=0.3)
    assert plain == reported == again

    seen = loss.documents(tokens[:, :-1], end)
    hidden = jit(lambda p, t: state.merge(model, p).hidden(t, *seen).h)(params, tokens[:, :-1])
    h, w = np.asarray(hidden), np.asarray(params["head"]["kernel"])
    z = np.exp(h @ w)
    log_z, softmax = np.log(z.sum(-1)), z / z.sum(-1, keepdims=True)
    mask = np.asarray(tokens[:, :-1]) != end
    np.testing.assert_allclose(value - plain, 0.3 * np.mean(log_z[mask] ** 2), rtol=1e-11)
    slope = 0.3 * 2 * (mask * log_z)[..., None] * softmax / mask.sum()
    got = gradient["head"]["kernel"] - without["head"]["kernel"]
    oracle.assert_close(got, np.einsum("btd,btv->dv", h, slope), 1e-11)


# Documents --------------------------------------------------------------------------------------

END = 0


def test_documents_by_hand():
    """The end token is the last of its document; a row may begin and end with one."""
    tokens = jnp.asarray([[5, 7, 0, 3, 0, 0, 2, 9], [0, 4, 4, 4, 4, 4, 4, 0], [1, 2, 3, 4, 5, 6, 7, 8]])
    segments, positions = loss.documents(tokens, END)
    assert segments.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0] + [1] * 7, [0] * 8]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6], [*range(8)]]
    assert loss.counted(tokens, END)[0].tolist() == [True, True, False, True, False, False, True]
    assert loss.predictions(tokens, END) == 4 + 6 + 7
    assert loss.predictions(tokens, None) == 21
    assert loss.predictions(jnp.full((2, 3), END), END) == 1


FIRST, SECOND = [4, 11, 7, END], [9, 2, 13, 3, 8]  # the second goes on in the next row


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_document_is_as_if_alone(chunks, x64):
    """Cross-entropies of two documents in a row are those of each in a row of its own."""
    model = replace(SMALL, dtype="float64")
    params = drawn(model)
    both = nats(model, params, jnp.asarray([FIRST + SECOND]), chunks=chunks, end=END)[0]
    first, second = (nats(model, params, jnp.asarray([doc]), chunks=chunks)[0] for doc in (FIRST, SECOND))
    oracle.assert_close(both[:3], first, 1e-13)
    oracle.assert_close(both[4:], second, 1e-13)
    together = nats(model, params, jnp.asarray([FIRST + SECOND]), chunks=chunks)[0]
    assert (np.abs(together - both)[4:] > 1e-3).all()


@pytest.mark.parametrize("end", [END, None])
def test_a_document_learns_nothing_from_another(end):
    """The gradient of one's loss in the embeddings of the other's tokens is zero, exactly; and where
    documents see each other it is not."""
    params, tokens = drawn(SMALL), jnp.asarray([FIRST + SECOND])

    def part(embedding, where):
        model = state.merge(SMALL, params | {"embed": {"embedding": embedding}})
        found = loss.next_token(model, tokens, end=end)
        return jnp.sum(jnp.where(found.mask, found.nats, 0)[0, where])

    slope = [jit(jax.grad(part))(params["embed"]["embedding"], at) for at in (np.arange(4), np.arange(4, 8))]
    first, second = FIRST[:3], SECOND[:-1]  # nothing is predicted from the last two
    assert (jnp.abs(slope[0][jnp.array(first)]).max(-1) > 1e-5).all()
    assert (jnp.abs(slope[1][jnp.array(second)]).max(-1) > 1e-5).all()
    assert not slope[0][jnp.array(second)].any()
    assert bool(slope[1][jnp.array([*first, END])].any()) == (end is None)


def test_the_mean_is_over_the_whole_batch(x64):
    """Microbatches with 3 and with 8 predictions: each prediction weighs the same."""
    model = replace(SMALL, dtype="float64")
    params = drawn(model)
    tokens = jnp.asarray([[END, 1, END, END, 2, END, 3, END, 4], [*range(1, 10)]])
    run = partial(value_and_gradient, model, params, tokens, end=END, z_loss=0.1)
    oracle.assert_close(run(microbatches=2), run(microbatches=1), 1e-13)
    each, mask = nats(model, params, tokens, end=END), np.asarray(loss.counted(tokens, END))
    assert mask.sum(1).tolist() == [3, 8]
    np.testing.assert_allclose(run()[0][1], each[mask].mean(), rtol=1e-13)


def small_config(**changes):
    flat = configs.to_flat(configs.base.get_config()) | WIDE | {"data.length": 8, "data.batch": 2}
    return configs.from_flat(flat | {k.replace("__", "."): v for k, v in changes.items()})


def test_evaluation_and_statistics_see_documents():
    """Of a run with chunks and documents: held-out loss over what counts, depth weights of one document."""
    config = small_config(data__segments=True, train__vocab_chunks=2)
    text = np.random.default_rng(0).integers(0, 6, 100)
    run, corpus = step.programs(config, VOCAB, END), Corpus(text, text[:60], VOCAB, 2.0, "test", END)
    params = drawn(configs.model_config(config, VOCAB))
    found = evaluate.heldout(run.nats, config, corpus, 0, params)

    model, starts = configs.model_config(config, VOCAB), range(0, 59, 8)
    rows = np.stack([np.pad(text[:60][at : at + 9], (0, max(0, at + 9 - 60))) for at in starts])
    each = nats(model, params, jnp.asarray(rows, "int32"), end=END).ravel()[:59]
    counts = text[:59] != END
    assert 0 < found.tokens == counts.sum() < 59
    assert found.loss == pytest.approx(each[counts].mean(), rel=1e-5)

    tokens = jnp.asarray([FIRST + SECOND], "int32")
    apart, together = (
        jit(partial(step.look, end=end))(state.merge(model, params), tokens).output_rms for end in (END, None)
    )
    np.testing.assert_allclose(run.look(params, tokens).output_rms, apart, rtol=1e-4)
    assert (np.abs(apart - together)[1:] > 1e-3).any()


# What cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "chunks", "near"), [(24, 5, "4 or 6"), (23, 3, "1 or 23"), (24, 99, "24 or 12"), (1, 2, "1")]
)
def test_chunks_that_do_not_divide(vocab, chunks, near):
    message = rf"train.vocab_chunks = {chunks} must be a divisor .* vocabulary of {vocab}, such as {near}$"
    with pytest.raises(configs.UserError, match=message):
        step.programs(small_config(train__vocab_chunks=chunks), vocab)


def test_documents_without_an_end_token():
    with pytest.raises(configs.UserError, match=r"data.segments = True needs .* end token"):
        step.programs(small_config(data__segments=True), VOCAB)
    assert loss.document_end(small_config(), 3) is None
