"""Optimizers and schedules against numpy: AdamW's equations, Muon matrix by matrix and layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys
from flax import nnx

from attnres_jax import configs
from attnres_jax.analysis.inspect import parameters
from attnres_jax.models.table import parameter_table
from attnres_jax.models.transformer import abstract
from attnres_jax.train import optim

VOCAB = 23
TINY = {
    "model.blocks": 3,
    "model.width": 16,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.mlp_width": 24,
    "model.tied": False,
    "block_size": 2,
    "train.steps": 4,
    "optim.warmup": 1,
    "optim.decay": 1,
}
NAMES = ("adamw", "muon")
MATRICES = {
    *(f"layers/a/{name}/kernel" for name in ("query", "key", "value", "out")),
    *(f"layers/m/{name}/kernel" for name in ("gate", "up", "down")),
}


def tiny(**changes):
    flat = configs.to_flat(configs.base.get_config()) | TINY
    return configs.from_flat(flat | {k.replace("__", "."): v for k, v in changes.items()})


def table_of(config):
    return parameters(configs.model_config(config, VOCAB))


def drawn(config, scale=1.0, seed=0):
    """Random numbers in the shapes of a model's parameters."""
    rng = np.random.default_rng(seed)
    params = nnx.to_pure_dict(nnx.state(abstract(configs.model_config(config, VOCAB))))
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.standard_normal(p.shape), p.dtype), params)


def updated(config, params, gradients):
    """The parameters after an update for each gradient, and the last update."""
    tx, updates = optim.optimizer(config, table_of(config)), None
    state, update = tx.init(params), jax.jit(tx.update, compiler_options=toys.QUICK)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return toys.named(params), toys.named(updates)


def gradients_of(config):
    """Above and below the clip."""
    return [drawn(config, scale, seed) for seed, scale in enumerate((1.0, 1e-3, 0.1), 1)]


# Schedules --------------------------------------------------------------------------------------


def test_cosine_by_hand():
    config = tiny(train__steps=20, optim__warmup=4, optim__lr=0.8, optim__final_lr=0.25)
    rate = optim.learning_rate(config)
    cosine = [0.2 + 0.6 * (1 + np.cos(np.pi * t / 16)) / 2 for t in range(17)]
    expected = [0, 0.2, 0.4, 0.6, *cosine]
    np.testing.assert_allclose([rate(at) for at in range(21)], expected, rtol=1e-6)


def test_wsd_by_hand():
    """Rise in 4 updates, stay, fall by a straight line in the last 5."""
    config = tiny(optim__schedule="wsd", train__steps=12, optim__lr=0.8, optim__final_lr=0.25)
    config.optim.update(warmup=4, decay=5)
    rate = optim.learning_rate(config)
    expected = [0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.68, 0.56, 0.44, 0.32, 0.2]
    np.testing.assert_allclose([rate(at) for at in range(13)], expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warmup_may_be_nothing_or_everything(schedule):
    options = {"optim__schedule": schedule, "optim__lr": 0.5, "optim__decay": 0}
    assert optim.learning_rate(tiny(optim__warmup=0, **options))(0) == 0.5
    assert optim.learning_rate(tiny(optim__warmup=4, **options))(4) == 0.5


def test_wsd_may_decay_from_the_first_update():
    config = tiny(optim__schedule="wsd", optim__warmup=0, optim__decay=4, optim__lr=1.0, optim__final_lr=0.0)
    rate = optim.learning_rate(config)
    np.testing.assert_allclose([rate(at) for at in range(5)], [1, 0.75, 0.5, 0.25, 0], atol=1e-6)


# Updates ----------------------------------------------------------------------------------------


def adamw(config, params, gradients):
    """Loshchilov and Hutter's equations in numpy fp64."""
    o, rate = config.optim, optim.learning_rate(config)
    p, m, v = dict(params), dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    for t, gradient in enumerate(gradients, 1):
        for name, g in gradient.items():
            m[name] = o.b1 * m[name] + (1 - o.b1) * g
            v[name] = o.b2 * v[name] + (1 - o.b2) * g**2
            direction = m[name] / (1 - o.b1**t) / (np.sqrt(v[name] / (1 - o.b2**t)) + o.eps)
            decay = o.weight_decay * name.endswith("kernel")
            p[name] = p[name] - float(rate(t - 1)) * (direction + decay * p[name])
    return p


def muon(config, params, gradients):
    """Moonlight's in numpy fp64: one matrix of one layer after the other; also each last direction."""
    o, rate = config.optim, optim.learning_rate(config)
    p, m, directions = dict(params), dict.fromkeys(params, 0.0), {}
    for t, gradient in enumerate(gradients, 1):
        for name, g in gradient.items():
            m[name] = o.momentum * m[name] + (1 - o.momentum) * g
            ahead = o.momentum * m[name] / (1 - o.momentum ** (t + 1))
            ahead = ahead + (1 - o.momentum) * g / (1 - o.momentum**t)
            layers = [orthogonal(name, layer) for layer in ahead]
            directions[name] = np.stack(layers)
            p[name] = p[name] - float(rate(t - 1)) * (directions[name] + o.weight_decay * p[name])
    return p, directions


def orthogonal(name, layer):
    """0.2 sqrt(max(inputs, outputs)) of what five Newton-Schulz steps make of [inputs, outputs]."""
    x = layer.reshape(-1, layer.shape[-1]) if "/out/" in name else layer.reshape(len(layer), -1)
    inputs, outputs = x.shape
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return 0.2 * np.sqrt(max(inputs, outputs)) * x.reshape(layer.shape)


def clipped(config, gradients):
    for gradient in map(toys.named, gradients):
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        yield {name: g * min(1, config.optim.clip / norm) for name, g in gradient.items()}


def only(tree, matrices):
    return {name: leaf for name, leaf in tree.items() if (name in MATRICES) == matrices}


STRONG = {"optim__clip": 2.0, "optim__weight_decay": 0.3, "optim__lr": 0.05}


def test_adamw_against_numpy():
    """Three updates with gradients above and below the clip, the rate moving, decay on matrices."""
    config = tiny(**STRONG)
    params, gradients = drawn(config), gradients_of(config)
    expected = adamw(config, toys.named(params), list(clipped(config, gradients)))
    oracle.assert_close(updated(config, params, gradients)[0], expected, 1e-5)


def test_muon_against_numpy():
    """Its matrices by Muon, and everything else exactly as AdamW has it. The RMS of an update, before rate
    and decay, is 0.15 to 0.21 for each matrix of each layer, at a model's usual ratios of sizes."""
    sizes = {"model__width": 64, "model__heads": 4, "model__kv_heads": 2, "model__mlp_width": 192}
    config = tiny(optim__name="muon", optim__momentum=0.8, **sizes, **STRONG)
    params, gradients = drawn(config), gradients_of(config)
    parts = list(clipped(config, gradients))
    of_muon, directions = muon(config, only(toys.named(params), True), [only(g, True) for g in parts])
    of_adamw = adamw(config, only(toys.named(params), False), [only(g, False) for g in parts])
    assert set(of_muon) == MATRICES
    after, last = updated(config, params, gradients)
    oracle.assert_close(after, of_muon | of_adamw, 1e-5)
    rate = float(optim.learning_rate(config)(len(gradients) - 1))
    for name, want in directions.items():
        direction = last[name] / -rate - config.optim.weight_decay * (after[name] - last[name])
        got, want = (np.sqrt(np.mean(a.reshape(3, -1) ** 2, 1)) for a in (direction, want))
        np.testing.assert_allclose(got, want, rtol=1e-4)
        assert ((got > 0.15) & (got < 0.21)).all()


def test_layers_do_not_touch_each_other():
    """A layer's update with the others' gradients a thousand times as large, clipping aside."""
    config = tiny(optim__name="muon", optim__clip=1e9, optim__warmup=0)
    params, gradient = drawn(config), drawn(config, seed=1)
    scaled = jax.tree.map(lambda g: g.at[1:].multiply(1000.0), gradient)
    tx = optim.optimizer(config, table_of(config))
    update = jax.jit(lambda g: tx.update(g, tx.init(params), params)[0], compiler_options=toys.QUICK)
    alone, among = (toys.named(update(g)) for g in (gradient, scaled))
    for name in MATRICES:
        np.testing.assert_allclose(among[name][0], alone[name][0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_what_decays(name):
    """Without a gradient: the matrices shrink by lr * weight_decay, nothing else moves at all."""
    config = tiny(optim__name=name, optim__warmup=0, optim__lr=0.5, optim__weight_decay=0.2)
    params = drawn(config)
    _, updates = updated(config, params, [jax.tree.map(jnp.zeros_like, params)])
    for path, before in toys.named(params).items():
        np.testing.assert_allclose(updates[path], -0.1 * before * path.endswith("kernel"), rtol=1e-6)
    layers = {row.path: row.axes.removeprefix("L") for row in table_of(config)}
    vectors = {path for path, axes in layers.items() if len(axes) == 1}
    assert {"mix/query", "mix/key_scale_out", "layers/a/norm/scale", "norm/scale"} <= vectors
    assert not any(updates[path].any() for path in (*vectors, "embed/embedding"))


# Who is updated by what -------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["plain", "full", "block"])
@pytest.mark.parametrize("tied", [True, False])
def test_who_is_in_muon(residual, tied):
    """The momenta that are kept: Muon's of the layers' matrices, AdamW's two of everything else."""
    config = tiny(optim__name="muon", residual=residual, model__tied=tied)
    _, partition = optim.optimizer(config, table_of(config)).init(drawn(config))
    kept = {name: paths(state) for name, state in partition.inner_states.items()}
    others = {row.path for row in table_of(config)} - MATRICES
    assert {path for path in kept["muon"] if "/mu/" in path} == {f"inner_state/0/mu/{p}" for p in MATRICES}
    assert {path for path in kept["adamw"] if "/nu/" in path} == {f"inner_state/0/nu/{p}" for p in others}
    assert ("head/kernel" in others) != tied
    assert len([path for path in others if path.startswith("mix/")]) == (0 if residual == "plain" else 4)


def paths(tree):
    return set(toys.named(tree))


@pytest.mark.parametrize("name", NAMES)
def test_arrays_of_the_state_end_in_a_parameters_path(name):
    """By which they are sharded; the rest are scalars."""
    config = tiny(optim__name=name)
    state = optim.optimizer(config, table_of(config)).init(drawn(config))
    shapes = {row.path: row.shape for row in table_of(config)}
    for path, leaf in toys.named(state).items():
        owners = [own for own in shapes if path.endswith("/" + own)]
        if owners:
            assert leaf.shape == shapes[max(owners, key=len)]
        else:
            assert leaf.shape == ()


def test_a_group_without_an_optimizer():
    for name in NAMES:
        config = tiny(optim__name=name)
        first, *rest = table_of(config)
        with pytest.raises(ValueError, match=r"embed/embedding .* group 'router', .* add it to GROUPS"):
            optim.optimizer(config, [first._replace(group="router"), *rest])


def test_a_matrix_without_inputs():
    config = tiny(optim__name="muon")
    rows = [row._replace(inputs="") if "up" in row.path else row for row in table_of(config)]
    with pytest.raises(ValueError, match=r'layers/m/up/kernel .* axes LDF .* "D>F"'):
        optim.optimizer(config, rows)


def test_a_parameter_without_a_rule():
    """It fails before there is an optimizer."""
    model = abstract(configs.model_config(tiny(), VOCAB))
    model.layers["m"].gain = nnx.Param(jax.ShapeDtypeStruct((3, 16), jnp.float32))
    with pytest.raises(ValueError, match=r"no rule .* layers/m/gain"):
        parameter_table(model)


def test_inputs_and_outputs():
    """As the layers themselves multiply: the inputs are the axes that disappear."""
    config = tiny()
    sizes = {"layers/a/out/kernel": ((1, 2), (3,)), "layers/a/query/kernel": ((1,), (2, 3))}
    sizes |= {f"layers/m/{name}/kernel": ((1,), (2,)) for name in ("gate", "up", "down")}
    rows = {row.path: row for row in table_of(config)}
    assert {path: optim.dimension_numbers(rows[path]) for path in sizes} == sizes
