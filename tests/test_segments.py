"""Documents in one row that see nothing of each other: attention, positions, loss, evaluation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys

from attnres_jax import configs
from attnres_jax.models.transformer import ModelConfig
from attnres_jax.train import evaluate, loss, state, step
from attnres_jax.train.data import Corpus

VOCAB, END = 24, 0
FIRST, SECOND = [4, 11, 7, END], [9, 2, 13, 3, 8]  # the second goes on in the next row
BOTH = np.array([FIRST + SECOND])
CONFIG = {
    "model.blocks": 1,
    "model.width": 16,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.mlp_width": 24,
    "model.tied": False,
    "block_size": 2,
    "data.batch": 2,
    "data.length": 8,
}


def config_of(**changes):
    flat = configs.to_flat(configs.base.get_config()) | CONFIG
    return configs.from_flat(flat | {k.replace("__", "."): v for k, v in changes.items()})


MODEL: ModelConfig = configs.model_config(config_of(), VOCAB)


def jit(function):
    return jax.jit(function, compiler_options=toys.QUICK)


def nats(params, tokens, **options):
    function = partial(loss.next_token, **options)
    return np.asarray(jit(lambda p, t: function(state.merge(MODEL, p), t).nats)(params, jnp.asarray(tokens)))


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


@pytest.mark.parametrize("chunks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_document_is_as_if_alone(chunks):
    """Cross-entropies of two documents in a row are those of each in a row of its own."""
    params = toys.parameters(MODEL)
    both = nats(params, BOTH, chunks=chunks, end=END)[0]
    first, second = (nats(params, [doc], chunks=chunks)[0] for doc in (FIRST, SECOND))
    oracle.assert_close(both[:3], first, 1e-6)
    oracle.assert_close(both[4:], second, 1e-6)
    assert (np.abs(nats(params, BOTH, chunks=chunks)[0] - both)[4:] > 1e-3).all()


@pytest.mark.parametrize("end", [END, None])
def test_a_document_learns_nothing_from_another(end):
    """The gradient of one's loss in the embeddings of the other's tokens is zero, exactly; and where
    documents see each other it is not."""
    params = toys.parameters(MODEL)

    @jit
    @jax.grad
    def gradient(embedding, weights):
        model = state.merge(MODEL, params | {"embed": {"embedding": embedding}})
        found = loss.next_token(model, jnp.asarray(BOTH), end=end)
        return jnp.sum(jnp.where(found.mask, found.nats, 0)[0] * weights)

    embedding, weights = params["embed"]["embedding"], np.repeat(np.eye(2), 4, axis=1)
    of_first, of_second = (gradient(embedding, row) for row in weights)
    first, second = np.array(FIRST[:3]), np.array(SECOND[:-1])  # nothing is predicted from the last two
    assert (jnp.abs(of_first[first]).max(-1) > 1e-5).all()
    assert (jnp.abs(of_second[second]).max(-1) > 1e-5).all()
    assert not of_first[second].any()
    assert bool(of_second[np.array([*first, END])].any()) == (end is None)


def test_evaluation_and_statistics_see_documents():
    """Of a run with chunks and documents: held-out loss over what counts, depth statistics as apart."""
    config = config_of(data__segments=True, train__vocab_chunks=2)
    text = np.random.default_rng(0).integers(0, 6, 100, np.uint8)
    corpus = Corpus(text, text[:60], VOCAB, 2.0, "test", END, None)
    run = step.programs(config, VOCAB, end=END)
    params = toys.parameters(MODEL)
    found = evaluate.heldout(partial(run.nats, params), config, corpus, 0, run.place)

    rows = np.stack([np.pad(text[:60][at : at + 9], (0, max(0, at + 9 - 60))) for at in range(0, 59, 8)])
    each = nats(params, rows.astype(np.int32), end=END).ravel()[:59]
    counts = text[:59] != END
    assert 0 < found.tokens == counts.sum() < 59
    assert found.loss == pytest.approx(each[counts].mean(), rel=1e-5)

    tokens = jnp.asarray(BOTH)
    apart, together = (
        jit(partial(step.look, end=end))(state.merge(MODEL, params), tokens).output_rms for end in (END, None)
    )
    np.testing.assert_allclose(run.look(params, tokens).output_rms, apart, rtol=1e-4)
    assert (np.abs(apart - together)[1:] > 1e-3).any()


def test_documents_without_an_end_token():
    with pytest.raises(configs.UserError, match=r"data.segments = True needs .* end token"):
        step.programs(config_of(data__segments=True), VOCAB)
    assert loss.document_end(config_of(), 3) is None
