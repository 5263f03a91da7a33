"""Sampling: which bytes the model is shown, and how the next one is drawn from its logits."""

import string
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx

from attnres_jax.models import sample as sampling
from attnres_jax.models.sample import CannotSample
from attnres_jax.models.tokenizer import BPE, Bytes, train_bpe
from attnres_jax.models.transformer import ModelConfig, abstract

CONFIG = ModelConfig(
    vocab=256,
    blocks=2,
    width=16,
    heads=2,
    kv_heads=1,
    mlp_width=24,
    tied=False,
    residual="plain",
)
KEY = jax.random.key(7)
LETTERS = string.ascii_lowercase
BYTES = Bytes()


def writer(alphabet: str, spread=1.0, vocab=256):
    """A random model that writes only letters of `alphabet`: width 0 of the stream is one positive
    number for all bytes, which no sublayer changes; by it the head keeps other bytes away."""
    rng = np.random.default_rng(1)
    graph, params = nnx.split(abstract(replace(CONFIG, vocab=vocab)))
    params = jax.tree.map(lambda a: jnp.asarray(toys.draw(rng, a.shape, 0.5), a.dtype), params)
    model, letters = nnx.merge(graph, params), np.array(list(alphabet.encode()), "int32")
    for constant in (model.layers["a"].out.kernel, model.layers["m"].down.kernel):
        constant[...] = constant[...].at[..., 0].set(0.0)
    model.embed.embedding[...] = model.embed.embedding[...].at[:, 0].set(3.0)
    model.norm.scale[...] = jnp.ones(16)
    head = spread * model.head.kernel[...]
    model.head.kernel[...] = head.at[0].set(-1000.0).at[0, letters].set(0.0)
    return model


def automaton(follows: dict[int, int], vocab=256):
    """A model whose every sublayer is zero: token `a` is followed by token `follows[a]`."""
    model = writer("", vocab=vocab)
    for kind, name in (("a", "out"), ("m", "down")):
        kernel = getattr(model.layers[kind], name).kernel
        kernel[...] = 0 * kernel[...]
    embedding, head = np.zeros((vocab, 16), "float32"), np.zeros((16, vocab), "float32")
    for i, (byte, following) in enumerate(follows.items()):
        embedding[byte, i], head[i, following] = 1, 1
    model.embed.embedding[...], model.head.kernel[...] = jnp.asarray(embedding), jnp.asarray(head)
    return model


def sample(model, *args):
    graph, params = nnx.split(model)
    return sampling.sample(partial(after, graph, params), model.config.vocab, *args)


def seen_by(model, tokens):
    """The logits after the last of `tokens`, which stand alone: no padding."""
    return np.asarray(after(*nnx.split(model), jnp.asarray(tokens, "int32"), -1), np.float64)


@partial(jax.jit, static_argnums=0, compiler_options=toys.QUICK)
def after(graph, params, tokens, at):
    return nnx.merge(graph, params)(tokens[None]).logits[0, at]


# What the model is shown ------------------------------------------------------------------------


def test_greedy_takes_the_likeliest_byte_after_the_true_prefix():
    """From a prompt shorter than the window until well beyond it."""
    model, window, text = writer(LETTERS), 5, list(b"abc")
    for _ in range(16):
        text.append(int(seen_by(model, text[-window:]).argmax()))
    assert len(set(text)) > 8
    assert sample(model, BYTES, "abc", 16, KEY, 0.0, window) == bytes(text).decode()


def test_the_window_is_the_last_bytes():
    model = writer(LETTERS)
    text, other, inside = (
        sample(model, BYTES, prompt, 16, KEY, 1.0, 4)[-16:] for prompt in ("xxabcd", "yabcd", "xxybcd")
    )
    assert other == text
    assert inside != text


# How the next byte is drawn ---------------------------------------------------------------------


def test_the_key_decides_and_padding_does_not():
    """A window far wider than the text draws what one that just holds it draws, by the same key."""
    model = writer(LETTERS)
    text = sample(model, BYTES, "abc", 12, KEY, 1.0, 15)
    assert len(set(text)) > 5
    assert sample(model, BYTES, "abc", 12, KEY, 1.0, 40) == text
    assert sample(model, BYTES, "abc", 12, jax.random.key(8), 1.0, 15) != text


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_models_probabilities(temperature):
    """A window of one byte is a Markov chain of four letters: chi squared of its transitions, with
    12 degrees of freedom, exceeds 40 once in 14,000 keys; another temperature is told apart."""
    letters = "abcd"
    model = writer(letters, spread=0.5)
    text = sample(model, BYTES, "a", 1500, KEY, temperature, 1)
    assert set(text) == set(letters)
    seen = Counter(pairwise(text))
    counts = np.array([[seen[a, b] for b in letters] for a in letters])
    logits = np.array([seen_by(model, [ord(a)])[[ord(b) for b in letters]] for a in letters])
    assert surprise(counts, logits / temperature) < 40
    assert surprise(counts, logits / (1.5 - temperature)) > 100


def surprise(counts, logits):
    """Chi squared of counts [from, to] under the logits of each row."""
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = counts.sum(axis=1, keepdims=True) * probability
    return np.sum((counts - expected) ** 2 / expected)


# Bytes and text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 5])
def test_as_many_bytes_as_asked(length):
    text = sample(writer(LETTERS), BYTES, "né", length, KEY, 1.0, 4)
    assert text.startswith("né")
    assert len(text.encode()) == 3 + length


def test_bytes_of_a_letter_are_drawn_one_by_one():
    """a -> é, two bytes, -> a ...; the last letter is cut in half, and marked."""
    model = automaton({ord("a"): 0xC3, 0xC3: 0xA9, 0xA9: ord("a")})
    assert sample(model, BYTES, "a", 4, KEY, 0.0, 3) == "aéa\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_text_are_marked():
    """In the prompt, where the shell's byte 0xFF is a lone surrogate, or drawn by the model."""
    model = automaton({0xFF: ord("b"), ord("b"): 0xFF})
    marked = "\N{REPLACEMENT CHARACTER}"
    assert sample(model, BYTES, "\udcff", 3, KEY, 0.0, 3) == f"{marked}b{marked}b"


def test_the_end_of_a_document_ends_the_text():
    """a -> b -> end; without ends of documents, byte 0 is a byte as any other."""
    model = automaton({ord("a"): ord("b"), ord("b"): 0})
    assert sample(model, Bytes(end=0), "a", 5, KEY, 0.0, 3) == "ab"
    assert sample(model, BYTES, "a", 2, KEY, 0.0, 3) == "ab\0"


def test_pieces_of_words(tmp_path):
    """The prompt in pieces, and the pieces that the model draws, as one text."""
    (tmp_path / "model").write_bytes(train_bpe(["depth mixing, depth"] * 9, 280))
    tokenizer = BPE(tmp_path / "model", 280, end=1)
    depth, *rest = tokenizer.encode("depth mix").tolist()
    assert len(rest) < 4
    path = [depth, *rest, 1]
    model = automaton(dict(pairwise(path)), vocab=280)
    assert sample(model, tokenizer, "depth", 20, KEY, 0.0, 3) == "depth mix"


@pytest.mark.parametrize(
    ("vocab", "tokenizer", "prompt", "message"),
    [
        (256, BYTES, "", "prompt is empty"),
        (300, BYTES, "It", "300 token values, its corpus now 256"),
        (50, None, "It", "no tokenizer"),
    ],
)
def test_what_cannot_be_sampled_says_so_in_a_line(vocab, tokenizer, prompt, message):
    model = abstract(replace(CONFIG, vocab=vocab))
    with pytest.raises(CannotSample, match=message) as error:
        sample(model, tokenizer, prompt, 3, KEY, 1.0, 8)
    assert "\n" not in str(error.value)
