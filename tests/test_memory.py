"""What is kept for the backward pass, counted: L arrays [B,T,D] for the plain residual, at most N + 1
more for Block AttnRes, whatever a sublayer keeps for itself.

Counted are the residuals that JAX's own `saved_residuals` lists of a traced call. An array [..., B,T,D]
counts as many as its leading axes hold, so a stack of k streams or of k summaries counts k. B, T and D
are sizes that no other axis has. Arguments of the function are counted apart: neither scheme
keeps the embedding as such, and AttnRes keeps it as the first of its N + 1 summaries.
"""

from collections import Counter
from math import prod

import jax
import jax.numpy as jnp
import pytest
import toys
from flax import nnx
from jax._src.ad_checkpoint import saved_residuals

from attnres_jax.models.transformer import ModelConfig, Transformer

TOKENS, WIDTH = (3, 5), 14
POLICIES = jax.checkpoint_policies
DOTS = (POLICIES.dots_with_no_batch_dims_saveable, POLICIES.dots_saveable)
PATTERNS = {"am": "am", "linear": "kmkmkmam"}
# name: (scheme, block size, kinds); in the last two, blocks repeat two by two and four by four
SHAPES = {
    "eight_blocks": ("block", 4, "am" * 16),
    "full": ("full", 1, "am" * 8),
    "short_last": ("block", 6, "am" * 8),
    "one_block": ("block", 16, "am" * 8),
    "no_two_blocks_alike": ("block", 5, "kkkkkmmmmmaa"),
    "odd_blocks": ("block", 3, "am" * 12),
    "linear_attention": ("block", 2, "kmkmkmam" * 4),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def count(function, *arguments) -> Counter:
    """[B,T,D] arrays kept by the backward pass of `function`: by dtype, and those among its arguments."""
    found = Counter()
    for aval, source in saved_residuals(function, *arguments):
        if aval.shape[-3:] == (*TOKENS, WIDTH):
            place = "argument" if source.startswith("from the argument") else aval.dtype.name
            found[place] += prod(aval.shape[:-3])
    return found


def kept(scheme, kinds, policy=None, dtype="float32", implementation=None) -> int:
    """Of one call of `through_depth`; all of it in the dtype of the activations."""
    B, T = TOKENS
    toy = toys.cast(toys.toy(scheme, kinds, B=B, T=T, D=WIDTH), dtype)
    how = {"policy": policy, "implementation": implementation}
    found = count(lambda toy: toys.run(scheme, kinds, toy, **how).h, toy)
    assert set(found) == {dtype}
    return found[dtype]


def plain(kinds, policy=None):
    return kept(toys.make("plain", 1), kinds, policy)


def blocks(scheme, kinds):
    return len(scheme.schedule(len(kinds)).sizes)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("L", [16, 32, 64])
def test_eight_blocks(L, pattern):
    """L for plain. Block: no more than N + 1 beside them, and no fewer than its N + 1 summaries and
    the running sums inside blocks, without which a sublayer would have to be run once more."""
    kinds = (pattern * L)[:L]
    assert plain(kinds) == L
    assert L + 1 <= kept(toys.make("block", L // 8), kinds) <= L + 8 + 1


@pytest.mark.parametrize("size", [4, 3, 2, 1])
def test_kernels_keep_no_more(size):
    """On a TPU: as many arrays as the reference."""
    scheme, kinds = toys.make("block", size), "am" * 8
    with toys.on_tpu():
        assert kept(scheme, kinds, implementation="tpu") == kept(scheme, kinds)


@shapes
def test_any_blocks(shape):
    name, size, kinds = shape
    scheme, L = toys.make(name, size), len(kinds)
    assert L + 1 <= kept(scheme, kinds) <= L + blocks(scheme, kinds) + 1


@pytest.mark.parametrize("L", [16, 64])
def test_full(L):
    """Every output is a summary, and no stream is kept beside it."""
    assert kept(toys.make("full", 1), "am" * (L // 2)) == L + 1


@shapes
@pytest.mark.parametrize("policy", DOTS, ids=["dots_no_batch", "dots"])
def test_what_sublayers_keep_costs_no_more(shape, policy):
    """Keeping matmuls adds the same to AttnRes as to plain: no summary is kept again as the matmul
    that made it."""
    name, size, kinds = shape
    scheme = toys.make(name, size)
    assert plain(kinds, policy) > plain(kinds)
    extra = kept(scheme, kinds, policy) - kept(scheme, kinds)
    assert extra == plain(kinds, policy) - plain(kinds)


def test_parameters_are_not_kept_again():
    """Whatever may be kept: a sublayer's matrices [D,D] lie in the stack they were taken from."""
    scheme, kinds, (B, T) = toys.make("block", 4), "am" * 8, TOKENS
    toy = toys.cast(toys.toy(scheme, kinds, B=B, T=T, D=WIDTH), "float32")
    policy = POLICIES.everything_saveable
    found = saved_residuals(lambda toy: toys.run(scheme, kinds, toy, policy=policy).h, toy)
    matrices = [aval.shape for aval, _ in found if aval.shape[-2:] == (WIDTH, WIDTH)]
    assert matrices == [(8, WIDTH, WIDTH)] * sum(len(toys.MATRICES[kind]) for kind in "am")


@pytest.mark.parametrize("name", ["plain", "block"])
def test_the_counter_can_see_more(name):
    """When everything may be kept, several arrays a sublayer are; in reference mode too."""
    scheme, kinds = toys.make(name, 4), "am" * 8
    assert kept(scheme, kinds, POLICIES.everything_saveable) > 4 * len(kinds)
    B, T = TOKENS
    toy = toys.cast(toys.toy(scheme, kinds, B=B, T=T, D=WIDTH), "float32")
    literal = count(lambda toy: toys.run(scheme, kinds, toy, implementation="reference").h, toy)
    assert literal["float32"] > 4 * len(kinds)


def test_the_counter_tells_arguments_apart():
    x = jnp.ones((2, *TOKENS, WIDTH))
    assert count(lambda x: jnp.sum(x * jnp.sin(x)), x) == {"argument": 2, "float32": 4}


@pytest.mark.parametrize("name", ["plain", "full", "block"])
def test_bf16_is_kept_in_bf16(name):
    """Twice the bytes would pass unseen where arrays alone are counted."""
    assert kept(toys.make(name, 6), "am" * 8, dtype="bfloat16") >= 16


# The language model -----------------------------------------------------------------------------


def kept_by_loss(residual, blocks, remat) -> int:
    """Of the whole loss: embedding, `through_depth`, final norm and head."""
    config = ModelConfig(
        *(17, blocks, WIDTH, 1, 1, 22), residual=residual, block_size=3, remat=remat, tied=False
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def loss(params, tokens):
        logits = nnx.merge(graph, params)(tokens).logits
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), params)
    return count(lambda p: loss(p, jnp.zeros(TOKENS, jnp.int32)), params)["float32"]


def test_language_model():
    """Through the model the same: one more array a sublayer, N + 1 for the summaries of N = 8 blocks,
    and no more under the policy that keeps matmuls (here none of them is [B,T,D] but a sublayer's output)."""
    assert kept_by_loss("plain", 13, "nothing") - kept_by_loss("plain", 12, "nothing") == 2
    kept = {
        (residual, remat): kept_by_loss(residual, 12, remat)
        for residual in ("plain", "block")
        for remat in ("nothing", "dots", "everything")
    }
    more = {remat: kept["block", remat] - kept["plain", remat] for _, remat in kept}
    assert 24 <= kept["plain", "nothing"] == kept["plain", "dots"] < kept["plain", "everything"]
    assert 1 <= more["nothing"] == more["dots"] <= 8 + 1 < more["everything"]
