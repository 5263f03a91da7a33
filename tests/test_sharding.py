"""Eight devices compute what one does, and a read over depth never communicates."""

import re
import shutil

import cluster
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnres_jax import configs, depth
from attnres_jax.models.table import path_name
from attnres_jax.parallel import mesh, sharding
from attnres_jax.rules import Rule
from attnres_jax.train import loop, step

VOCAB = 64
MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]
SMALL = {
    "model.blocks": 2,
    "model.width": 32,
    "model.heads": 8,
    "model.kv_heads": 8,
    "model.mlp_width": 48,
    "data.length": 16,
    "data.batch": 16,
    "block_size": 2,
    # After one update the first moment is the gradient itself.
    "optim.b1": 0.0,
    "optim.clip": 1e9,
}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
SCOPES = ("depth_mix", "depth_merge")


def config(shape=(1, 1, 1), **changes):
    flat = configs.to_flat(configs.base.get_config()) | SMALL
    flat |= {f"mesh.{axis}": size for axis, size in zip(("data", "fsdp", "tensor"), shape, strict=True)}
    return configs.from_flat(flat | {k.replace("__", "."): v for k, v in changes.items()})


def programs(shape, **changes):
    return step.programs(config(shape, **changes), VOCAB, jax.devices()[: int(np.prod(shape))])


def draw_tokens():
    return np.random.default_rng(0).integers(0, VOCAB, (16, 17)).astype(np.int32)


def one_update(shape, **changes):
    """Loss and gradient of a batch, and the compiled program."""
    run = programs(shape, **changes)
    state = run.create()
    queries = state.params.get("mix", {}).get("query")
    if queries is not None:  # zero at the start: give the reads something to weigh
        drawn = np.random.default_rng(1).standard_normal(queries.shape) / 32**0.5
        state.params["mix"]["query"] = jax.device_put(np.float32(drawn), queries.sharding)
    compiled = run.update.lower(state, jax.ShapeDtypeStruct((16, 17), np.int32, sharding=run.place)).compile(
        toys.QUICK
    )
    state, out = compiled(state, jax.device_put(draw_tokens(), run.place))
    moments = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state.opt_state)}
    gradient = {name.split("/mu/")[1]: leaf for name, leaf in moments.items() if "/mu/" in name}
    assert set(gradient) == set(run.names)
    return jax.device_get((out.loss, gradient)), compiled.as_text()


@pytest.fixture(scope="module")
def alone():
    made = {}

    def get(**changes):
        key = tuple(sorted(changes.items()))
        if key not in made:
            made[key] = one_update((1, 1, 1), **changes)[0]
        return made[key]

    return get


FAST = {("block", (2, 2, 2))}
CASES = [
    pytest.param(scheme, shape, marks=[] if (scheme, shape) in FAST else pytest.mark.slow)
    for scheme in ("plain", "block", "full")
    for shape in MESHES
]


@pytest.mark.parametrize(("residual", "shape"), CASES)
def test_eight_devices_are_one(alone, residual, shape):
    """The loss and every gradient; no collective of the compiled program lies in a read over depth."""
    (loss, gradient), text = one_update(shape, residual=residual)
    wanted_loss, wanted = alone(residual=residual)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    for name, leaf in wanted.items():
        oracle.assert_close({name: gradient[name]}, {name: leaf}, 1e-5)
    found = collectives(text)
    assert found
    assert not [name for name in found if any(scope in name for scope in SCOPES)]
    seen = {scope for scope in SCOPES if scope in text}
    assert seen == {"plain": set(), "full": {"depth_mix"}, "block": set(SCOPES)}[residual]


def collectives(text):
    """The op_name of every collective in compiled HLO."""
    lines = [line for line in text.splitlines() if COLLECTIVE.search(line)]
    return [(re.findall(r'op_name="([^"]*)"', line) or [""])[0] for line in lines]


def test_a_read_that_communicates_is_seen():
    """Were D cut over devices, the score would be a sum over them: the search above finds it."""
    where = NamedSharding(mesh.make_mesh({"tensor": 8}, jax.devices()), P(None, None, None, "tensor"))

    @jax.named_scope("depth_mix")
    def read(w, v):
        return depth.partial_mix(w, [depth.Rows(v)], Rule(1e-6)).mixture

    v = jax.ShapeDtypeStruct((3, 2, 4, 16), jnp.float32, sharding=where)
    text = jax.jit(read).lower(jnp.ones((1, 16)), v).compile().as_text()
    assert [name for name in collectives(text) if "depth_mix" in name]


def test_an_op_without_types_has_the_same_gradient():
    """GPU kernels cannot say over which axes they vary: what is shared is summed over them all the same."""
    devices = mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
    place, spec = mesh.placement(devices), P(None, ("data", "fsdp"), "tensor")
    v, w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 4, 8)), jnp.float32), jnp.ones(8)

    def read(w, v, typed):
        mix = lambda w, v: depth.partial_mix(w[None], [depth.Rows(v)], Rule(1e-6)).mixture  # noqa: E731
        return jnp.sum(place.local(mix, w, (v,), (spec,), spec, typed=typed) ** 2)

    one, other = (jax.jit(jax.grad(read, (0, 1)), static_argnums=2)(w, v, typed) for typed in (True, False))
    oracle.assert_close(dict(enumerate(one)), dict(enumerate(other)), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
def test_accumulation_under_sharding(alone, shape):
    loss, gradient = one_update(shape, residual="block", train__accumulation=2)[0]
    wanted_loss, wanted = alone(residual="block")
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    oracle.assert_close(gradient, wanted, 1e-5)


def test_a_state_is_made_where_it_lies():
    """Matrices are cut over tensor and fsdp; every device holds an eighth of them from the start."""
    run = programs((1, 4, 2))
    state = run.create()
    for tree in (state, run.like):
        leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        cut = [name for name in leaves if name.endswith("/kernel") or name.endswith("/embedding")]
        assert len(cut) == 3 * 8  # parameters and two moments
        for name, leaf in leaves.items():
            part = leaf.sharding.shard_shape(leaf.shape)
            assert np.prod(leaf.shape) == np.prod(part) * (8 if name in cut else 1), name
    query = state.params["layers"]["a"]["query"]["kernel"]
    assert query.sharding.spec == P(None, "fsdp", "tensor", None)


def test_a_leaf_without_a_rule_is_named():
    table = step.parameters(configs.model_config(config(), VOCAB))
    on = mesh.make_mesh({"data": 8}, jax.devices())
    tree = {"mu": {"embed": {"embedding": jnp.ones((64, 32))}}, "count": jnp.int32(0)}
    assert sharding.shardings(tree, table, on)["mu"]["embed"]["embedding"].spec == P("tensor", "fsdp")
    with pytest.raises(ValueError, match=r"says where nu/other \(2, 3\) lies"):
        sharding.shardings(tree | {"nu": {"other": jnp.ones((2, 3))}}, table, on)


def test_the_longest_path_decides():
    table = step.parameters(configs.model_config(config(), VOCAB))
    tree = {"mu": {"layers": {"a": {"norm": {"scale": jnp.ones((2, 32))}}}}}
    on = mesh.make_mesh({"tensor": 8}, jax.devices())
    assert jax.tree.leaves(sharding.shardings(tree, table, on))[0].spec == P()


@pytest.mark.parametrize(
    ("wanted", "count", "expected"),
    [
        ({"data": -1, "fsdp": 1, "tensor": 1}, 8, (8, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, 8, (2, 2, 2)),
        ({"data": 1, "fsdp": 2, "tensor": 4}, 8, (1, 2, 4)),
        ({"data": -1, "fsdp": 1, "tensor": 8}, 8, (1, 1, 8)),
    ],
)
def test_sizes(wanted, count, expected):
    found = mesh.sizes(wanted, count)
    assert tuple(found) == mesh.AXES
    assert tuple(found[axis] for axis in ("data", "fsdp", "tensor")) == expected
    assert found["stage"] == found["expert"] == 1


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"data": 3, "fsdp": -1, "tensor": 1}, r"data 3 x tensor 1 = 3 does not fit 8 .* be 1, 2, 4, 8$"),
        ({"data": 4, "fsdp": 1, "tensor": 1}, r"= 4 does not fit 8 .*mesh.data may be 8$"),
        ({"data": 3, "fsdp": 3, "tensor": 1}, r"= 9 does not fit 8 .*mesh.data=-1 with all others 1"),
        ({"data": -1, "fsdp": -1, "tensor": 1}, "only one mesh axis may be -1"),
    ],
)
def test_a_mesh_that_does_not_fit(wanted, message):
    with pytest.raises(configs.ConfigError, match=message):
        mesh.sizes(wanted, 8)


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((8, 1, 1), {"data__batch": 12}, r"mesh.data x mesh.fsdp = 8 .*12 sequences .*a multiple of 8 x"),
        ((8, 1, 1), {"train__accumulation": 4}, "does not divide the 4 sequences of a microbatch"),
        ((1, 1, 8), {"model__kv_heads": 4}, r"mesh.tensor = 8 .*the 4 H of .*key/kernel: it may be 1, 2, 4$"),
        ((1, 1, 8), {"data__length": 12}, r"mesh.tensor = 8 does not divide the 12 tokens of data.length"),
        ((1, 8, 1), {"model__width": 48, "model__heads": 4, "model__kv_heads": 4}, None),
        ((1, 8, 1), {"model__width": 36, "model__heads": 2, "model__kv_heads": 2}, "the 36 D of"),
    ],
)
def test_a_mesh_that_cuts_nothing_evenly(shape, changes, message):
    if message is None:
        programs(shape, **changes)
        return
    with pytest.raises(configs.ConfigError, match=message):
        programs(shape, **changes)


def test_rows_are_made_where_they_are_held():
    """Two devices share rows, which are made once."""
    on, asked = mesh.make_mesh({"data": 4, "tensor": 2}, jax.devices()), []

    def rows(first, last):
        asked.append((first, last))
        return np.arange(first * 3, last * 3).reshape(-1, 3)

    made = mesh.from_rows(mesh.tokens(on), (8, 3), rows)
    assert sorted(asked) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    np.testing.assert_array_equal(made, np.arange(24).reshape(8, 3))


def test_batches_by_rows_are_the_batch():
    from attnres_jax.train import data

    batches = data.train_batches(np.arange(400, dtype=np.uint16), 7, 6, seed=3)
    assert batches.shape == (6, 8)
    for at in (0, 9, 31):
        parts = [batches.rows(at, first, last) for first, last in ((0, 2), (2, 3), (3, 6))]
        np.testing.assert_array_equal(np.concatenate(parts), batches[at])


@pytest.mark.slow
def test_stop_and_resume_on_eight_devices(tmp_path, capsys):
    """Bit for bit on the same mesh; from there on one device to fp32 rounding, with the same data."""
    devices = jax.devices()

    def run(name, shape=(2, 2, 2), **changes):
        made = config(
            shape, train__steps=6, train__log_every=1, train__eval_tokens=256, optim__warmup=2, **changes
        )
        loop.train(made, tmp_path / name, devices[: int(np.prod(shape))])

    run("whole")
    run("stopped", train__stop_after=3)
    shutil.copytree(tmp_path / "stopped", tmp_path / "moved")
    run("stopped")
    run("moved", (1, 1, 1))
    assert capsys.readouterr().err.count("updates 3 to 6") == 2
    whole, stopped, moved = (cluster.losses(tmp_path / name) for name in ("whole", "stopped", "moved"))
    assert whole == stopped
    assert list(moved) == list(whole)
    np.testing.assert_allclose([*moved.values()], [*whole.values()], rtol=1e-5)
    evaluated = [(tmp_path / name / "eval.json").read_text() for name in ("whole", "stopped")]
    assert evaluated[0] == evaluated[1]
