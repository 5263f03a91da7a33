"""The NNX language model: against a decoder in numpy, and what must hold for any scheme."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys
from flax import nnx

from attnres_jax.models import attention, transformer
from attnres_jax.models.layers import rope
from attnres_jax.models.table import RULES, parameter_table, path_name
from attnres_jax.models.transformer import REMAT, ModelConfig, Transformer, abstract
from attnres_jax.nnx import DepthMix
from attnres_jax.train import state

SMALL = ModelConfig(
    vocab=17,
    blocks=3,
    width=16,
    heads=4,
    kv_heads=2,
    mlp_width=24,
    rope_theta=50.0,
    norm_eps=1e-2,
    tied=False,
    residual="block",
    block_size=2,
)
DOUBLE = replace(SMALL, dtype="float64")
SCHEMES = ["plain", "full", "block"]


def trained(config, seed=0) -> Transformer:
    """A model as training might leave it: no norm scale is one and no query zero. All numbers are
    exact in fp32, and the same whatever the dtype."""
    return state.merge(config, toys.parameters(config, seed))


def tokens_of(*shape, vocab=17):
    return jnp.asarray(np.random.default_rng(1).integers(0, vocab, shape), "int32")


def pure(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def jit(function, **options):
    return jax.jit(function, compiler_options=toys.QUICK, **options)


def forward(model, *inputs, **options):
    return called(*nnx.split(model), *inputs, **options)


@partial(jit, static_argnums=0, static_argnames=("implementation", "record"))
def called(graph, params, *inputs, **options):
    """Compiled once for models of one config."""
    return nnx.merge(graph, params)(*inputs, **options)


def logits(model, *inputs, **options):
    return np.asarray(forward(model, *inputs, **options).logits)


def loss(model, *inputs, **options):
    """params -> <probe, logits>, logits."""
    graph, params = nnx.split(model, nnx.Param)

    def function(params):
        logits = nnx.merge(graph, params)(*inputs, **options).logits
        return jnp.sum(logits * jnp.asarray(toys.probe(logits), logits.dtype)), logits

    return function, params


def evaluate(model, *inputs, **options):
    """Logits, and the gradient of <probe, logits> in every parameter."""
    function, params = loss(model, *inputs, **options)
    (_, value), gradient = jit(jax.value_and_grad(function, has_aux=True))(params)
    return {"logits": np.asarray(value), "gradient": pure(gradient)}


# Against a decoder in numpy ---------------------------------------------------------------------


def decoder(config, params, tokens):
    """An ordinary pre-norm decoder, in numpy's fp64."""
    embedding = params["embed"]["embedding"]
    h, values = embedding[tokens], []
    for block in range(config.blocks):
        attention, mlp = (
            jax.tree.map(lambda leaf, i=block: leaf[i], params["layers"][kind]) for kind in "am"
        )
        x = rms_norm(config, attention, h)
        h = h + self_attention(config, attention, x, values)
        values.append(np.einsum("btd,dgk->gbtk", x, attention["value"]["kernel"]))
        h = h + swiglu(mlp, rms_norm(config, mlp, h))
    head = embedding.T if config.tied else params["head"]["kernel"]
    return rms_norm(config, params, h) @ head


def rms_norm(config, params, h):
    mean = np.mean(h**2, axis=-1, keepdims=True)
    return h / np.sqrt(mean + config.norm_eps) * params["norm"]["scale"]


def swiglu(params, x):
    gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
    return ((x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down


def self_attention(config, params, x, values=()):
    """Heads one by one; consecutive heads share a key and a value. `values` are those of layers so far."""
    query, key, value, out = (params[name]["kernel"] for name in ("query", "key", "value", "out"))
    own = np.einsum("btd,dgk->gbtk", x, value)
    v = config.value_residual * (*values, own)[0] + (1 - config.value_residual) * own
    y, share = np.zeros_like(x), config.heads // config.kv_heads
    for head in range(config.heads):
        q, k = turned(x @ query[:, head], config), turned(x @ key[:, head // share], config)
        score = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        score[:, ~np.tri(x.shape[1], dtype=bool)] = -np.inf
        weights = np.exp(score - score.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        y += weights @ v[head // share] @ out[head]
    return y


def turned(x, config):
    """Rotary positions 0, 1, ... as turns of complex numbers: x [B,T,K]."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * config.rope_theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize(("tied", "value_residual"), [(True, 0.0), (False, 0.0), (False, 0.25)])
def test_plain_is_the_ordinary_decoder(tied, value_residual, x64):
    """Logits, and the gradient of every parameter by central differences of the numpy decoder."""
    config, tokens = replace(DOUBLE, residual="plain", tied=tied), tokens_of(2, 8)
    config = replace(config, value_residual=value_residual)
    model = trained(config)
    got, params = evaluate(model, tokens), pure(model)
    want = decoder(config, params, np.asarray(tokens))
    oracle.assert_close(got["logits"], want, 1e-12)
    check_gradient(
        lambda params: np.sum(toys.probe(want) * decoder(config, params, np.asarray(tokens))),
        *(params, got["gradient"]),
    )


def check_gradient(function, params, gradient, step=1e-5):
    """Along one random direction of each leaf."""
    rng = np.random.default_rng(3)
    leaves, structure = jax.tree.flatten(params)
    for i, slope in enumerate(jax.tree.leaves(gradient)):
        direction = rng.standard_normal(slope.shape)

        def moved(by, i=i, direction=direction):
            return function(structure.unflatten([*leaves[:i], leaves[i] + by * direction, *leaves[i + 1 :]]))

        expected = (moved(step) - moved(-step)) / (2 * step)
        assert abs(expected) > 1e-3
        np.testing.assert_allclose(np.vdot(slope, direction), expected, rtol=1e-6)


@pytest.mark.parametrize("residual", ["densenet", pytest.param("block", marks=pytest.mark.slow)])
def test_later_attentions_have_the_first_ones_values(residual, x64, monkeypatch):
    """v_1 is the first attention's own, whatever the residual scheme reads first; scanned as literal."""
    config, tokens, seen = replace(DOUBLE, residual=residual, blocks=2), tokens_of(2, 8), []

    def spy(q, k, v, segments=None, **how):
        seen.append(v)
        return attention.xla(q, k, v, segments)

    with monkeypatch.context() as patch:
        patch.setattr(transformer, "attention_over_time", spy)
        for share in (0.0, 0.75):
            trained(replace(config, value_residual=share))(tokens, implementation="reference")
    first, own, mixed_first, mixed = seen
    oracle.assert_close(mixed_first, first, 1e-13)
    oracle.assert_close(mixed, 0.75 * first + 0.25 * own, 1e-13)
    model = trained(replace(config, value_residual=0.75))
    literal, scanned = (evaluate(model, tokens, implementation=how) for how in ("reference", None))
    oracle.assert_close(scanned, literal, 1e-11)


# Who sees whom ----------------------------------------------------------------------------------


def test_packed_documents_do_not_see_each_other(x64):
    """Two documents in one row give the logits of each alone; as one segment they do not."""
    model, tokens = trained(DOUBLE), tokens_of(2, 8)
    positions = jnp.asarray([[*range(4)] * 2] * 2, "int32")
    alone = np.concatenate([logits(model, tokens[:, at : at + 4]) for at in (0, 4)], axis=1)

    def packed(segments):
        return logits(model, tokens, jnp.asarray([segments] * 2, "int32"), positions)

    oracle.assert_close(packed([3] * 4 + [1] * 4), alone, 1e-13)
    oracle.assert_close(packed([0] * 8)[:, :4], alone[:, :4], 1e-13)
    assert (np.abs(packed([0] * 8) - alone)[:, 4:].max(axis=-1) > 1e-2).all()


def test_rows_are_segmented_each_in_its_own_way(x64):
    """A row of one segment beside a row of two: the first is as without segments."""
    model, tokens = trained(DOUBLE), tokens_of(2, 8)
    segments = jnp.asarray([[0] * 8, [0, 0, 1, 1, 1, 1, 1, 1]], "int32")
    positions = jnp.asarray([[*range(8)]] * 2, "int32")
    (first, second), whole = logits(model, tokens, segments, positions), logits(model, tokens)
    oracle.assert_close(first, whole[0], 1e-13)
    oracle.assert_close(second[:2], whole[1, :2], 1e-13)
    assert (np.abs(second - whole[1])[2:].max(axis=-1) > 1e-2).all()


@pytest.mark.parametrize("residual", SCHEMES)
def test_no_token_sees_a_later_one(residual):
    """The gradient of one position's logits in the embeddings of all: zero exactly where later."""
    tokens, t = jnp.asarray([[4, 11, 0, 7, 2, 9]], "int32"), 3
    model = trained(replace(SMALL, residual=residual))
    graph, table, others = nnx.split(model, lambda path, _: "embed" in path, ...)

    def one(table):
        return jnp.sum(nnx.merge(graph, table, others)(tokens).logits[:, t] ** 2)

    rows = jit(jax.grad(one))(table)["embed"]["embedding"][...][tokens[0]]
    assert not rows[t + 1 :].any()
    assert (jnp.abs(rows[: t + 1]).max(axis=1) > 1e-5).all()


# Rotary positions -------------------------------------------------------------------------------


def scores(q, k, positions):
    q, k = (rope(x, positions, 50.0) for x in (q, k))
    return jnp.einsum("bthk,bshk->bhts", q, k)


def test_scores_depend_on_relative_positions(x64):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 5, 2, 8))) for _ in range(2))
    positions = jnp.asarray([[0, 1, 2, 5, 9]])
    score = scores(q, k, positions)
    np.testing.assert_allclose(scores(q, k, positions + 1000), score, atol=1e-11)
    assert jnp.abs(scores(q, k, 2 * positions) - score).max() > 0.1


def test_position_zero_is_the_identity(x64):
    """Elsewhere a turn: the length stays."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 2, 8)))
    turned = rope(x, jnp.asarray([[0, 1, 7]] * 2), 50.0)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    assert jnp.abs(turned - x)[:, 1:].max(axis=(2, 3)).min() > 0.1
    np.testing.assert_allclose(*(jnp.linalg.norm(a, axis=-1) for a in (turned, x)), rtol=1e-14)


def test_the_model_knows_relative_positions_only(x64):
    model, tokens = trained(DOUBLE), tokens_of(2, 8)
    positions = jnp.asarray([[*range(8)]] * 2, "int32")
    want = logits(model, tokens)
    oracle.assert_close(logits(model, tokens, None, positions + 40), want, 1e-11)
    assert oracle.errors(logits(model, tokens, None, 3 * positions), want)[""] > 1e-3


# Precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("residual", SCHEMES)
def test_activations_are_as_asked_and_the_rest_fp32(residual, dtype):
    """Of shapes alone: nothing is computed."""
    config, tokens = replace(SMALL, residual=residual, dtype=dtype), tokens_of(2, 8)
    model = abstract(config)
    graph, params = nnx.split(model, nnx.Param)
    output = jax.eval_shape(lambda params: nnx.merge(graph, params)(tokens, record=True), params)
    record = output.depth.record
    assert {a.dtype for a in (output.depth.h, record.outputs, record.mixtures)} == {np.dtype(dtype)}
    assert {a.dtype for a in (output.logits, *record.weights)} == {np.dtype("float32")}
    gradient = jax.eval_shape(jax.grad(loss(model, tokens)[0], has_aux=True), params)[0]
    for leaf in jax.tree.leaves((params, gradient)):
        assert leaf.dtype == np.float32


def test_rounding_against_fp64():
    """The same weights in three precisions, documents packed. |error| / |logits| is as many unit
    roundoffs in bf16 as in fp32, about one per sublayer; the head's sums stay in fp32."""
    config, tokens, got = replace(SMALL, width=32), tokens_of(2, 12), {}
    segments = jnp.asarray([[0] * 5 + [1] * 7] * 2, "int32")
    with jax.enable_x64(True):
        want = logits(trained(replace(config, dtype="float64")), tokens, segments)
    for dtype, unit in (("bfloat16", 2**-9), ("float32", 2**-24)):
        got[dtype] = logits(trained(replace(config, dtype=dtype)), tokens, segments)
        assert 1 < oracle.errors(got[dtype], want)[""] / unit < 16
    assert (got["bfloat16"].astype(toys.BF16) != got["bfloat16"]).mean() > 0.9


def test_remat_changes_only_what_is_computed_anew(x64):
    """Values and gradients agree; the more is kept, the fewer FLOPs the backward pass costs."""
    tokens, results, flops = tokens_of(2, 8), {}, {}
    for remat in REMAT:
        model = trained(replace(DOUBLE, residual="plain", blocks=1, remat=remat))
        results[remat] = evaluate(model, tokens)
        function, params = loss(model, tokens)
        lowered = jax.jit(jax.grad(function, has_aux=True)).lower(params)
        flops[remat] = lowered.cost_analysis()["flops"]
    assert flops["nothing"] > flops["dots"] > flops["everything"]
    oracle.assert_close(results["dots"], results["nothing"], 1e-13)
    oracle.assert_close(results["everything"], results["nothing"], 1e-13)


# The table of parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("residual", SCHEMES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_row(residual, tied):
    model = abstract(replace(SMALL, residual=residual, tied=tied))
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    rows = {row.path: row for row in parameter_table(model)}
    assert len(rows) == len(parameter_table(model))
    assert rows.keys() == {path_name(path) for path, _ in leaves}
    for path, leaf in leaves:
        row = rows[path_name(path)]
        assert (row.shape, row.dtype) == (leaf.shape, leaf.dtype)
        assert sum(re.fullmatch(rule, row.path) is not None for rule, *_ in RULES) == 1


def test_axes_name_the_sizes():
    """Every letter has a size of its own; H counts queries or keys, L sublayers or layers."""
    sizes = {"V": {17}, "D": {16}, "H": {2, 1}, "K": {8}, "F": {24}, "L": {6, 3}}
    for row in parameter_table(abstract(replace(SMALL, heads=2, kv_heads=1))):
        assert len(row.axes) == len(row.shape)
        assert all(size in sizes[axis] for axis, size in zip(row.axes, row.shape, strict=True))
        stacked = re.fullmatch(r"layers/.*|mix/(query|key_scale)", row.path) is not None
        assert row.axes.startswith("L") == stacked


def test_rows_are_in_forward_order():
    """The order of computation; what is computed side by side is in the alphabet's."""
    assert [row.path for row in parameter_table(abstract(SMALL))] == [
        "embed/embedding",
        "mix/key_scale",
        "mix/query",
        "layers/a/norm/scale",
        "layers/a/query/kernel",
        "layers/a/key/kernel",
        "layers/a/value/kernel",
        "layers/a/out/kernel",
        "layers/m/norm/scale",
        "layers/m/gate/kernel",
        "layers/m/up/kernel",
        "layers/m/down/kernel",
        "mix/key_scale_out",
        "mix/query_out",
        "norm/scale",
        "head/kernel",
    ]


def test_groups_and_decay():
    """Matrices decay, the head's among them; vectors, embeddings and depth parameters do not."""
    table = parameter_table(abstract(SMALL))
    groups = {row.path: row.group for row in table}
    assert {groups[path] for path in groups if path.startswith("mix/")} == {"depth"}
    assert {groups[path] for path in groups if path.endswith("norm/scale")} == {"norm"}
    assert (groups["embed/embedding"], groups["head/kernel"]) == ("embedding", "head")
    assert {row.path for row in table if row.decay} == {p for p in groups if p.endswith("kernel")}
    assert all(row.group in ("matrix", "head") for row in table if row.decay)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 20, "heads": 3}, "width 20 must be heads of even width"),
        ({"width": 18, "heads": 6}, "width 18 must be heads of even width"),
        ({"heads": 4, "kv_heads": 3}, "heads whole groups of kv_heads: got heads 4, kv_heads 3"),
    ],
)
def test_sizes_that_do_not_fit_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_a_parameter_without_a_rule_raises():
    model = abstract(SMALL)
    model.layers["a"].gain = nnx.Param(jax.ShapeDtypeStruct((3, 16), jnp.float32))
    with pytest.raises(ValueError, match=r"layers/a/gain \(3, 16\)"):
        parameter_table(model)


# Other ways through the same model --------------------------------------------------------------


@pytest.mark.parametrize("residual", SCHEMES)
def test_the_record_is_of_this_forward_pass(residual, x64):
    """Each mixture is the weighted sum of its sources, each output its sublayer's of the normed
    mixture, and the last mixture gives the logits."""
    config, tokens = replace(DOUBLE, residual=residual), tokens_of(2, 8)
    model = trained(config)
    output, params = forward(model, tokens, record=True), pure(model)
    outputs, mixtures, weights, _ = output.depth.record
    np.testing.assert_array_equal(outputs[0], params["embed"]["embedding"][tokens])
    for l, members in enumerate(config.scheme.sources(config.sublayers)):
        sources = np.einsum("ro,obtd->rbtd", members[: len(weights[l])], outputs)
        oracle.assert_close(np.einsum("rbt,rbtd->btd", weights[l], sources), mixtures[l], 1e-14)
    for l, kind in enumerate(config.kinds):
        layer = jax.tree.map(lambda leaf, i=l // 2: leaf[i], params["layers"][kind])
        x = rms_norm(config, layer, np.asarray(mixtures[l]))
        y = self_attention(config, layer, x) if kind == "a" else swiglu(layer, x)
        oracle.assert_close(y, outputs[l + 1], 1e-12)
    last = rms_norm(config, params, np.asarray(mixtures[-1])) @ params["head"]["kernel"]
    oracle.assert_close(last, output.logits, 1e-13)
    np.testing.assert_array_equal(output.depth.h, mixtures[-1])
    oracle.assert_close(logits(model, tokens), output.logits, 1e-13)


@pytest.mark.parametrize("residual", SCHEMES)
def test_the_reference_gives_the_same(residual, x64):
    model, tokens = trained(replace(DOUBLE, residual=residual)), tokens_of(2, 8)
    literal = logits(model, tokens, implementation="reference")
    oracle.assert_close(logits(model, tokens), literal, 1e-13)


@pytest.mark.parametrize("residual", ["full", "block"])
def test_attention_residuals_added_to_a_trained_model(residual, x64):
    """A trained plain model's weights under the queries of a new one give the plain logits."""
    exact, tokens = replace(DOUBLE, norm_eps=1e-14, key_norm_eps=1e-14), tokens_of(2, 8)
    plain = trained(replace(exact, residual="plain"))
    model, want = trained(replace(exact, residual=residual), seed=1), logits(plain, tokens)
    model.mix = DepthMix(model.config.scheme, model.config.sublayers, model.config.width)
    assert oracle.errors(logits(model, tokens), want)[""] > 0.1
    nnx.update(model, nnx.state(plain))
    oracle.assert_close(logits(model, tokens), want, 1e-11)
    model.mix.query[...] += 0.3
    assert oracle.errors(logits(model, tokens), want)[""] > 1e-3
