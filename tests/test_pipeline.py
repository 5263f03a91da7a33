"""A pipelined model is the model: loss, gradients, evaluation, and the run that trains it."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import toys

from attnres_jax import configs, residuals
from attnres_jax.models import transformer
from attnres_jax.models.table import path_name
from attnres_jax.parallel import mesh as meshes
from attnres_jax.parallel import pipeline, timetable
from attnres_jax.parallel.chunk import Chunked
from attnres_jax.parallel.pipeline import Pipeline
from attnres_jax.train import state, step
from attnres_jax.train.loss import objective, predictions
from attnres_jax.train.pipelined import Pipelined

VOCAB, LENGTH, ROWS = 48, 8, 2
SMALL = {
    "model.width": 16,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.mlp_width": 24,
    "data.length": LENGTH,
}
TOLERANCE = 2e-5


def config_of(size, residual="block", block_size=2, mesh=None, **keys):
    """`size`: P stages, V virtual stages, M microbatches, transformer blocks."""
    stages, virtual, microbatches, blocks = size
    flat = configs.to_flat(configs.base.get_config()) | SMALL
    flat |= {"mesh.stage": stages, "train.virtual_stages": virtual, "train.accumulation": microbatches}
    flat |= {"model.blocks": blocks, "block_size": block_size, "residual": residual, "mesh.data": 1}
    rows = ROWS * microbatches
    for axis, count in (mesh or {}).items():
        flat |= {f"mesh.{axis}": count}
        rows *= count if axis != "tensor" else 1
    return configs.from_flat(flat | {"data.batch": rows} | {k.replace("__", "."): v for k, v in keys.items()})


def made(config, end=None, params=None, model=None):
    """The pipelined model, that of one device, and `params`, or else those of a start and a little more."""
    model = model or configs.model_config(config, VOCAB)
    mesh = meshes.make_mesh(config.mesh.to_dict(), jax.devices()[: int(np.prod([*config.mesh.values()]))])
    alone = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    rng = np.random.default_rng(1)
    if params is None:
        params = state.create(model, optax.identity(), 0).params
        params = jax.tree.map(lambda a: a + np.float32(0.1 * rng.standard_normal(a.shape)), params)
    tokens = rng.integers(0, VOCAB, (config.data.batch, LENGTH + 1)).astype(np.int32)
    return SimpleNamespace(
        pipe=Pipelined(config, model, mesh, end, None),
        whole=step.Whole(config, model, alone, end, None),
        params=params,
        tokens=jnp.asarray(tokens),
        count=predictions(jnp.asarray(tokens), end),
    )


def compiled(way, case):
    """Loss and gradients of a way, in its own order."""
    program = jax.jit(way.value_and_grad)
    return program.lower(way.staged(case.params), case.tokens, case.count).compile(toys.QUICK)


def run(way, case, program=None):
    """Loss and gradients of a way, in order of depth."""
    program = program or compiled(way, case)
    value, gradient = program(way.staged(case.params), case.tokens, case.count)
    named = jax.tree.leaves_with_path(way.unstaged({"": gradient})[""])
    return float(value), {path_name(path): np.asarray(leaf) for path, leaf in named}


def assert_same(case, tolerance=TOLERANCE):
    (value, gradient), (wanted_value, wanted) = run(case.pipe, case), run(case.whole, case)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
    assert off(gradient, wanted) < tolerance


def off(gradient, wanted):
    """The largest error of a leaf, beside the largest of its entries, or a 200th of the largest of all
    leaves: tiny gradients have the rounding of what they are computed from."""
    assert gradient.keys() == wanted.keys()
    largest = {k: np.abs(leaf).max() for k, leaf in wanted.items()}
    least = max(largest.values()) / 200
    return max(np.abs(gradient[k] - wanted[k]).max() / max(largest[k], least) for k in wanted)


FAST = {"uneven"}
FIRST_VALUES = {"model__value_residual": 0.5}
CELLS = {
    "N_p 1": ((2, 2, 4, 4), {}),
    "N_p 2": ((2, 1, 4, 4), {}),
    "N_p 1/2, slots reused": ((2, 2, 12, 4), {"block_size": 4}),
    "N_p 3/2, slots reused": ((2, 2, 6, 6), {}),
    "N_p 2/3, three virtual": ((2, 3, 4, 6), {"block_size": 3}),
    "N_p 1/4": ((4, 2, 8, 8), {"block_size": 8}),
    "three stages, slots reused": ((3, 2, 9, 6), {}),
    "eight stages": ((8, 1, 16, 8), {}),
    "four virtual": ((2, 4, 4, 8), {}),
    "uneven": ((2, 2, 4, 5), {"block_size": 4}),
    "uneven, short last block": ((4, 1, 8, 7), {"block_size": 4}),
    "full": ((2, 2, 4, 4), {"residual": "full"}),
    "plain": ((4, 1, 8, 6), {"residual": "plain"}),
    "first values": ((2, 2, 4, 4), FIRST_VALUES),
    "first values, plain": ((2, 2, 4, 4), FIRST_VALUES | {"residual": "plain"}),
    "first values, mhc": ((2, 2, 4, 4), FIRST_VALUES | {"residual": "mhc"}),
    "first values, siamese": ((2, 2, 4, 4), FIRST_VALUES | {"residual": "siamese"}),
}


@pytest.mark.parametrize(
    ("size", "keys"),
    [
        pytest.param(*cell, id=name, marks=[] if name in FAST else pytest.mark.slow)
        for name, cell in CELLS.items()
    ],
)
def test_a_pipeline_is_the_model(size, keys):
    """fp32: the loss, and the gradient of every parameter."""
    assert_same(made(config_of(size, **keys)))


OTHERS = [name for name in residuals.SCHEMES if name not in ("plain", "full", "block")]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_scheme(name):
    """Three stages, whose two rings differ. Streams go around as one; a block that is parted opens twice, and
    one that leaves another row than its stream travels with both."""
    assert_same(made(config_of((3, 2, 6, 7), name, 4, depth_heads=4)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "keys"),
    [
        ({"data": 2, "tensor": 2}, {}),
        ({"fsdp": 2, "tensor": 2}, {"block_size": 4}),
        ({"fsdp": 2, "tensor": 2}, {"residual": "plain"}),
        ({"data": 2, "fsdp": 2}, {"residual": "mhc"}),
        ({"fsdp": 2, "tensor": 2}, FIRST_VALUES),
        ({"fsdp": 2}, {"model__width": 256}),  # parts of whole registers
    ],
)
def test_with_other_mesh_axes(mesh, keys):
    assert_same(made(config_of((2, 2, 4, 4), mesh=mesh, **keys)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"model__tied": False, "optim__z_loss": 0.1, "train__vocab_chunks": 3, "mesh": {"fsdp": 2}},
        {"model__remat": "dots"},
        {"model__remat": "everything"},
        {"model__remat": "everything", "block_size": 3},
        {"residual": "plain", "model__remat": "everything"},
        {"residual": "rms_block", "model__remat": "dots"},
        {"data__segments": True, "mesh": {"data": 2}},
        {"residual": "mhc", "data__segments": True},
    ],
)
def test_with_what_a_run_may_have(keys):
    """An untied head, z-loss, logits in chunks, remat policies, documents apart."""
    assert_same(made(config_of((2, 2, 4, 4), **keys), end=3 if "data__segments" in keys else None))


@pytest.mark.parametrize(("remat", "count"), [("nothing", 1 + 4 + 3), ("everything", 1 + 3 + 2)])
def test_phase_1_is_kept_where_all_is(remat, count):
    """How often it stands in ticks forward, both ways, and backward: by a chunk forward, again where it runs
    backward, and then once more, but where all is kept; by the head, in the last two."""
    case = made(config_of((2, 2, 4, 4), model__remat=remat))
    program = jax.jit(case.pipe.value_and_grad)
    text = program.lower(case.pipe.staged(case.params), case.tokens, case.count).as_text(debug_info=True)
    named = set(re.findall(r'^(#loc\d+) = loc\("[^"]*\bdepth_mix\b[^"]*/exp"', text, re.MULTILINE))
    places = re.findall(r"stablehlo\.exponential .*loc\((#loc\d+)\)", text)
    assert sum(place in named for place in places) == count


def in_fp64(size, block_size, case):
    """`case`, in fp64; inside `enable_x64` only."""
    config = config_of(size, block_size=block_size)
    model = replace(configs.model_config(config, VOCAB), dtype="float64")
    wide = made(config, params=jax.tree.map(np.float64, case.params), model=model)
    return SimpleNamespace(**vars(wide) | {"tokens": case.tokens, "count": case.count})


@pytest.mark.slow
def test_in_fp64():
    """What rounding hides in fp32: uneven chunks that part blocks."""
    case = made(config_of((3, 2, 6, 7), block_size=4))
    with jax.enable_x64(True):
        assert_same(in_fp64((3, 2, 6, 7), 4, case), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "block_size"), [((2, 2, 4, 4), 2), ((4, 2, 8, 8), 4)])
def test_bf16_is_no_worse_than_without_a_pipeline(size, block_size):
    """Both against fp64, over all leaves: the pipeline's error is that of the model, in another order. Also
    where cotangents make three hops, summed on the way, and chunks part blocks."""
    case = made(config_of(size, block_size=block_size, model__dtype="bfloat16"))
    with jax.enable_x64(True):
        wide = in_fp64(size, block_size, case)
        _, wanted = run(wide.whole, wide)
    errors = [
        {k: np.linalg.norm(gradient[k] - wanted[k]) / np.linalg.norm(wanted[k]) for k in wanted}
        for _, gradient in (run(case.pipe, case), run(case.whole, case))
    ]
    assert max(errors[0].values()) < 1.05 * max(errors[1].values()) < 0.2
    assert np.mean([*errors[0].values()]) < 1.02 * np.mean([*errors[1].values()])


@pytest.mark.parametrize(
    "keys",
    [
        {"mesh": {"data": 2, "fsdp": 2}},
        pytest.param(FIRST_VALUES | {"residual": "plain"}, marks=pytest.mark.slow),
    ],
)
def test_evaluation(keys):
    """Cross-entropy by position, of a forward pipeline."""
    case = made(config_of((2, 1, 4, 4), **keys))
    mask = np.random.default_rng(0).random((len(case.tokens), LENGTH)) < 0.7
    found, wanted = (
        jax.jit(way.nats)
        .lower(way.staged(case.params), case.tokens, mask)
        .compile(toys.QUICK)(way.staged(case.params), case.tokens, mask)
        for way in (case.pipe, case.whole)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.slow
def test_a_pipelined_run_is_the_run():
    """The trainer's programs: five blocks on 2 x 2 chunks (rows that never count), Muon, clipping and decay,
    saved and resumed between: the same states in order of depth, the same statistics."""
    keys = {"optim__name": "muon", "optim__clip": 0.1, "optim__weight_decay": 0.5, "optim__warmup": 1}
    found = {}
    for size in ((1, 1, 4, 5), (2, 2, 4, 5)):
        config = config_of(size, block_size=4, **keys)
        programs = step.programs(config, VOCAB, jax.devices()[: size[0]])
        now, update = programs.create(), None
        rng = np.random.default_rng(0)
        for at in range(4):
            tokens = rng.integers(0, VOCAB, (config.data.batch, LENGTH + 1)).astype(np.int32)
            tokens = jax.device_put(tokens, programs.place)
            update = update or programs.update.lower(now, tokens).compile(toys.QUICK)
            now, out = update(now, tokens)
            if at == 1 and size[0] > 1:
                now = programs.resume(programs.save(now))
        looked = programs.look(now.params, tokens)
        found[size[0]] = jax.device_get((out, looked, programs.save(now)))
    (out, looked, now), (expected, wanted_looked, wanted) = found[2], found[1]
    np.testing.assert_allclose(out.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(out.depth_norms, expected.depth_norms, rtol=1e-4)
    assert out.leaf_norms.keys() == expected.leaf_norms.keys()
    for path, norm in expected.leaf_norms.items():  # rows that never count are in none of them
        np.testing.assert_allclose(out.leaf_norms[path], norm, rtol=1e-4, err_msg=path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), looked, wanted_looked)
    states = [toys.named(tree.params) for tree in (now, wanted)]
    assert off(*states) < 1e-4


@pytest.mark.slow
def test_it_composes_with_grad():
    case = made(config_of((2, 1, 4, 4)))

    def total(params, way):
        square = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return 3 * way(params)[0] + 0.1 * square

    def piped(params):
        return case.pipe.loss(params, case.tokens, case.count)

    def whole(params):
        found = case.whole.predict(state.merge(case.whole.model, params), case.tokens)
        return objective(found, case.count, 0.0)

    found, wanted = (jax.jit(jax.grad(total), static_argnums=1)(case.params, way) for way in (piped, whole))
    oracle.assert_close(toys.named(found), toys.named(wanted), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["block", "plain", "rms_block"])
def test_auxiliary_losses(monkeypatch, residual):
    """What sublayers return beside y is added to the objective, and has its gradient; of a layer that only
    fills up a shorter chunk nothing is."""
    real = transformer.layer

    def layer(*args):
        made = real(*args)

        def apply(params, x, inputs):
            y, _ = made.apply(params, x, inputs)
            return y, jnp.sum(y**2)

        return made._replace(apply=apply)

    monkeypatch.setattr(transformer, "layer", layer)
    case = made(config_of((2, 2, 4, 5), residual, 4, {"data": 2}))
    penalty = lambda aux: 0.01 * sum(jnp.sum(a) for a in jax.tree.leaves(aux))  # noqa: E731
    chunked, *_ = case.pipe.pipeline.args
    case.pipe.pipeline = partial(Pipeline, replace(chunked, penalty=penalty), **case.pipe.pipeline.keywords)

    def whole(params, tokens, count):
        model = state.merge(case.whole.model, params)
        found = case.whole.predict(model, tokens)
        extra = penalty(model.hidden(tokens[:, :-1]).depth.aux)
        return objective(found, count, 0.0)[0] + extra

    def piped(params, tokens, count):
        return case.pipe.loss(params, tokens, count)[0]

    args = case.params, case.tokens, case.count
    (value, gradient), (wanted_value, wanted) = (
        jax.jit(jax.value_and_grad(way))
        .lower(ordered(case.params), *args[1:])
        .compile(toys.QUICK)(ordered(case.params), *args[1:])
        for way, ordered in ((piped, case.pipe.staged), (whole, case.whole.staged))
    )
    np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(piped)(case.pipe.staged(case.params), *args[1:]), value, rtol=1e-6)
    named = [
        {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (case.pipe.unstaged(gradient), wanted)
    ]
    assert off(*named) < TOLERANCE


# Mutations: each must be seen.


def shifted(monkeypatch, field):
    """All windows of a kind begin one row early."""
    cache = Chunked.cache.func

    def wrong(self):
        found = cache(self)
        return found._replace(**{field: tuple(max(0, row - 1) for row in getattr(found, field))})

    monkeypatch.setattr(Chunked, "cache", property(wrong))


@pytest.mark.slow
@pytest.mark.parametrize("mutation", ["", "slots", "first", "early", "fresh", "uncleared"])
def test_mutations_are_seen(monkeypatch, mutation):
    """One slot too few; a window one row off, in both directions; an early or a fresh part one row off;
    cotangents that are sent and not cleared. Without any, all is well."""
    size = (2, 2, 12, 4) if mutation == "slots" else (3, 2, 6, 6)
    # Where all windows fit, no row is sent twice, cleared or not: here one begins a row early.
    case = made(config_of(size, block_size=6 if mutation == "uncleared" else 2))
    if mutation == "slots":
        monkeypatch.setattr(timetable.Timetable, "slots", 3)
    elif mutation == "uncleared":
        monkeypatch.setattr(
            pipeline, "taken", lambda d, first, count: (pipeline.slice_rows(d, first, count), d)
        )
    elif mutation:
        shifted(monkeypatch, mutation)
    (_, gradient), (_, wanted) = run(case.pipe, case), run(case.whole, case)
    assert off(gradient, wanted) > 1e-2 if mutation else off(gradient, wanted) < TOLERANCE
