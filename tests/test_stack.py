"""Whole stacks against the fp64 oracle, and everything `through_depth` carries beside the stream."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys
from jax.sharding import PartitionSpec

from attnres_jax.autodiff import Block, append_scan
from attnres_jax.parallel.mesh import make_mesh
from attnres_jax.placement import Placement
from attnres_jax.residuals import AttnRes
from attnres_jax.stack import Layer, through_depth
from attnres_jax.walk import check_mix, start

# name: (scheme, block size, kinds, network shape)
CELLS = {
    "plain_two_kinds": ("plain", 1, "amamam", {}),
    "full_odd_width": ("full", 1, "kmkmkmam", {"D": 33}),
    "blocks_of_three_short_last": ("block", 3, "am" * 4, {}),
    "blocks_of_two_cut_one_token": ("block", 2, "kmkmkmamk", {"B": 8, "T": 1}),
    "one_block": ("block", 6, "kmkmkm", {"B": 1}),
    "blocks_of_what_comes_twice": ("block", 4, "am" * 6, {}),
    "deep_blocks_of_six": ("block", 6, "am" * 27, {}),
}
GRID = [
    (name, size, (pattern * 54)[:L], {})
    for L in (1, 3, 8, 13, 54)
    for pattern in ("am", "kmkmkmam")
    for name, size in [("full", 1), *(("block", S) for S in (1, 2, 3, 5, 6, L) if S <= L)]
    if (name, size, L) not in {("block", 1, 3), ("block", 1, 8), ("block", 1, 13)}
]
GRID = list(dict.fromkeys((name, size, kinds) for name, size, kinds, _ in GRID))
cells = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)


def check(name, size, kinds, shape):
    """fp64: <= 1e-11. fp32: no worse than twice the literal formula, or 2e-6; two draws are pooled
    and the width is 32, because the error of a few dozen numbers is a lottery."""
    scheme = toys.make(name, size)
    literal = toys.value_and_gradient(lambda toy: toys.literal(name, size, kinds, toy))
    core = toys.value_and_gradient(lambda toy: toys.run(scheme, kinds, toy))
    drawn = [toys.toy(scheme, kinds, seed=seed, **{"T": 8, "D": 32} | shape) for seed in (0, 1)]
    with jax.enable_x64(True):
        truth = [literal(toys.cast(toy, "float64")) for toy in drawn]
        oracle.assert_close(core(toys.cast(drawn[0], "float64")), truth[0], 1e-11)
    single = [toys.cast(toy, "float32") for toy in drawn]
    own = oracle.errors([literal(toy) for toy in single], truth)
    oracle.assert_close([core(toy) for toy in single], truth, max(2 * max(own.values()), 2e-6))


@cells
def test_stack(cell):
    check(*cell)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "kinds"), GRID, ids=str)
def test_stack_grid(name, size, kinds):
    check(name, size, kinds, {})


FEW = ("full_odd_width", "blocks_of_two_cut_one_token", "plain_two_kinds")
MARKS = {name: () if name in FEW else pytest.mark.slow for name in CELLS}


@pytest.mark.parametrize("cell", [pytest.param(CELLS[n], id=n, marks=MARKS[n]) for n in CELLS])
def test_reference_mode_and_record(cell, x64):
    """Values, gradients, and the outputs, mixtures and weights of every read."""
    name, size, kinds, shape = cell
    kinds = kinds[:8]
    scheme = toys.make(name, size)
    toy = toys.cast(toys.toy(scheme, kinds, **shape), "float64")

    def recorded(out):
        record = getattr(out, "record", out)  # the oracle's output is its own record
        names = ("outputs", "mixtures", "weights")
        return out.h, {name: getattr(record, name) for name in names}

    def evaluated(network):
        def loss(toy):
            h, record = recorded(network(toy))
            return jnp.sum(h * toys.probe(h)) + jnp.sum(record["mixtures"] ** 2), (h, record)

        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=toys.QUICK)(toy)

    (_, (h, record)), gradient = evaluated(
        lambda toy: toys.run(scheme, kinds, toy, implementation="reference", record=True)
    )
    (_, (want, truth)), target = evaluated(lambda toy: toys.literal(name, size, kinds, toy))
    assert len(record["weights"]) == len(kinds) + 1
    for weights, padded in zip(record.pop("weights"), truth.pop("weights"), strict=True):
        oracle.assert_close(weights, padded[: len(weights)], 1e-11)
        assert not padded[len(weights) :].any()
    oracle.assert_close((h, record, gradient), (want, truth, target), 1e-11)


def test_record_only_when_asked():
    scheme = toys.make("block", 2)
    toy = toys.cast(toys.toy(scheme, "amam"), "float32")
    assert toys.run(scheme, "amam", toy).record is None


# Everything a layer may carry -------------------------------------------------------------------


class Extras:
    """Layers that use all that `through_depth` carries: per-layer inputs of float, integer and key
    dtype, closed-over arrays, and auxiliary outputs that differ from kind to kind."""

    def __init__(self, kinds, toy):
        self.counts = {kind: kinds.count(kind) for kind in set(kinds)}
        T = toy.x.shape[1]
        rng = np.random.default_rng(5)
        self.mask = rng.random((toy.x.shape[0], T, T)) < 0.5
        self.gains = {k: toys.draw(rng, (n,), 0.3, 1.0) for k, n in sorted(self.counts.items())}
        self.bias = toys.draw(rng, (toy.x.shape[-1],), 0.3)

    def arguments(self, toy):
        return {"toy": toy, "gains": self.gains, "bias": self.bias}

    def layers(self, arguments):
        """`mask` and `bias` enter by closure, as traced arrays; `bias` is differentiated."""
        bias, x = arguments["bias"], arguments["toy"].x
        mask = jnp.asarray(self.mask) & (x[:, :1, :1] < 1e9)  # traced
        causal = np.tri(x.shape[1], dtype=bool)

        def attention(params, x, inputs):
            score = jnp.einsum("btd,bsd->bts", x @ params["query"], x @ params["key"])
            score = jnp.where(mask & causal | np.eye(len(causal), dtype=bool), score, -jnp.inf)
            y = jax.nn.softmax(score) @ (x @ params["value"]) @ params["out"]
            noise = jax.random.normal(inputs["key"], x.shape, "float32").astype(x.dtype)
            y = inputs["gain"] * y + 0.1 * noise
            return y, {"square": jnp.mean(y**2), "keys": x @ params["key"]}

        def mlp(params, x, inputs):
            x = jnp.roll(x, inputs["shift"], axis=-1) + bias
            y = inputs["gain"] * jnp.tanh(x @ params["up"]) @ params["down"]
            return y, jnp.sum(jnp.abs(y), axis=(1, 2))

        def make(params):
            apply = {"a": attention, "m": mlp, "k": toys.cumulative}
            return {
                k: Layer(
                    partial(partial, toys.rms_norm), apply[k], params[k], self.inputs(k, arguments["gains"])
                )
                for k in params
            }

        return make

    def inputs(self, kind, gains):
        n = self.counts[kind]
        other = {
            "a": {"key": jax.random.split(jax.random.key(7), n)},
            "m": {"shift": jnp.arange(n, dtype=jnp.int32)},
            "k": {"unused": jnp.zeros((n, 2), jnp.int32)},
        }
        return {"gain": gains[kind]} | other[kind]

    def result(self, network, toy, dtype="float64"):
        """h, aux, and all gradients of a loss that hangs on both."""

        def loss(arguments):
            out = network(arguments["toy"], self.layers(arguments))
            total = jnp.sum(out.h * jnp.asarray(toys.probe(out.h), out.h.dtype))
            losses = [jnp.sum(leaf**2) / leaf.size for leaf in jax.tree.leaves(out.aux)]
            return total + sum(losses), {"h": out.h, "aux": out.aux}

        arguments = toys.cast(self.arguments(toy), dtype)
        (_, values), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=toys.QUICK)(
            arguments
        )
        return values | {"gradient": gradient}


POLICIES = (
    jax.checkpoint_policies.nothing_saveable,
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.everything_saveable,
)
CARRIED = {
    "plain": ("plain", 1, "amkm"),
    "full": ("full", 1, "amkm"),
    "repeated_then_not": ("block", 2, "amamk"),
    "short_last": ("block", 3, "amkma"),
    "full_two_by_two": ("full", 1, "amamk"),
}


SLOWER = ("plain", "full", "repeated_then_not")
MARKED = {name: pytest.mark.slow if name in SLOWER else () for name in CARRIED}


@pytest.mark.parametrize("case", [pytest.param(CARRIED[n], id=n, marks=MARKED[n]) for n in CARRIED])
def test_everything_carried(case, x64):
    """Auxiliary outputs, inputs and closures give the oracle's values and gradients."""
    name, size, kinds = case
    scheme = toys.make(name, size)
    toy = toys.toy(scheme, kinds, B=2, T=3, D=6)
    extras = Extras(kinds, toy)
    want = extras.result(lambda toy, make: toys.literal(name, size, kinds, toy, make), toy)
    assert np.abs(want["gradient"]["bias"]).max() > 1e-3
    got = extras.result(lambda toy, make: toys.run(scheme, kinds, toy, make), toy)
    oracle.assert_close(got, want, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "block"])
def test_policies(name, x64):
    """What is kept for the backward pass changes no value and no gradient."""
    kinds, scheme = "amkmam", toys.make(name, 4)
    toy = toys.toy(scheme, kinds, B=1, T=3, D=6)
    extras = Extras(kinds, toy)
    want = extras.result(lambda toy, make: toys.literal(name, 4, kinds, toy, make), toy)
    for policy in POLICIES:
        got = extras.result(lambda t, make, p=policy: toys.run(scheme, kinds, t, make, policy=p), toy)
        oracle.assert_close(got, want, 1e-11)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_aux_is_stacked_in_order_of_depth(implementation):
    """A kind's auxiliary outputs come back in the order its letters stand in `kinds`."""
    kinds, scheme = "amkmamam", toys.make("block", 3)
    toy = toys.cast(toys.toy(scheme, kinds, B=1, T=2, D=4), "float32")

    def make(params):
        def apply(params, x, inputs):
            return x, {"place": inputs}

        return {
            kind: Layer(partial(partial, toys.rms_norm), apply, params[kind], places)
            for kind, places in (
                (kind, np.flatnonzero(np.array(list(kinds)) == kind).astype(np.int32)) for kind in params
            )
        }

    out = jax.jit(lambda t: toys.run(scheme, kinds, t, make, implementation=implementation))(toy)
    places = {kind: aux["place"].tolist() for kind, aux in out.aux.items()}
    assert places == {"a": [0, 4, 6], "m": [1, 3, 5, 7], "k": [2]}


def test_no_aux_stays_none():
    scheme = toys.make("block", 2)
    toy = toys.cast(toys.toy(scheme, "amam"), "float32")
    assert toys.run(scheme, "amam", toy).aux == {"a": None, "m": None}


@pytest.mark.parametrize("name", ["plain", "full", "block"])
def test_activations_keep_their_dtype(name):
    """bf16 in, bf16 out, with the AttnRes parameters in fp32."""
    kinds, scheme = "amamam", toys.make(name, 2)
    toy = toys.cast(toys.toy(scheme, kinds), "float32")
    toy = toy._replace(x=toy.x.astype("bfloat16"), params=toys.cast(toy.params, "bfloat16"))
    h = jax.eval_shape(lambda t: toys.run(scheme, kinds, t).h, toy)
    assert h.dtype == jnp.bfloat16
    loss = jax.grad(lambda t: toys.run(scheme, kinds, t).h.astype("float32").sum())
    gradient = jax.eval_shape(loss, toy)
    dtypes = [[leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (gradient, toy)]
    assert dtypes[0] == dtypes[1]


# Errors -----------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong():
    scheme = toys.make("block", 2)
    toy = toys.cast(toys.toy(scheme, "amam"), "float32")
    with pytest.raises(ValueError, match="k"):
        toys.run(scheme, "amak", toy)  # no layer of this kind
    with pytest.raises(ValueError, match=r"'a'.*must be 3"):
        toys.run(scheme, "amamam", toy)  # two layers of a kind, three in the string
    with pytest.raises(ValueError, match="kernel"):
        toys.run(scheme, "amam", toy, implementation="kernel")
    with pytest.raises(ValueError, match="block_size"):
        toys.run(toys.make("block", 5), "amam", toy)
    with pytest.raises(ValueError, match=r"x must be floats \[batch, time, width\], got int32"):
        check_mix(scheme, scheme.init(4, 8), 4, jnp.ones((1, 2, 8), "int32"))


@pytest.mark.parametrize("scheme", [toys.make("plain", 2), toys.make("block", 2), toys.make("block", 4)])
@pytest.mark.parametrize(
    ("change", "got"),
    [(lambda y: y[..., :1], r"float32\[2, 3, 1\]"), (lambda y: y > 0, r"bool\[2, 3, 8\]")],
    ids=["one channel", "no floats"],
)
def test_an_output_that_is_not_as_the_stream_is(scheme, change, got):
    """It would be broadcast, or cut: an error, in the loop and in the walk."""
    x, norm = jnp.ones((2, 3, 8)), lambda h: h
    mix = scheme.init(4, 8)

    def apply(_, x, __):
        return change(x), None

    said = rf"y must be floats \[2, 3, 8\] as x is, got {got}"
    with pytest.raises(ValueError, match=said):
        through_depth(scheme, mix, "aaaa", {"a": Layer(lambda _: norm, apply, jnp.ones(4))}, x)
    if got.startswith("float"):  # else jaxtyping says it here, under pytest
        with pytest.raises(ValueError, match=said):
            start(scheme, mix, 4, x).write(change(x))


def test_what_a_scheme_says_itself_is_heard():
    """Its own implementation and placement, where the call names none; and S by position."""
    scheme = toys.make("block", 2)
    toy = toys.cast(toys.toy(scheme, "amam"), "float32")
    with pytest.raises(ValueError, match="nonsense"):
        toys.run(replace(scheme, implementation="nonsense"), "amam", toy)
    assert AttnRes(4) == AttnRes(block_size=4)
    place = Placement(make_mesh({"data": 2}, jax.devices()[:2]), PartitionSpec("data"))
    called, own = (
        jax.jit(partial(toys.run, one, "amam", placement=given)).lower(toy).as_text()
        for one, given in ((scheme, place), (replace(scheme, placement=place), None))
    )
    assert called == own
    assert "sdy.sharding_constraint" in own


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kinds"), [(1, "amam"), (3, "am" * 5), (4, "am" * 4)])
def test_memory_that_nothing_wrote_is_not_read(size, kinds, monkeypatch):
    """On a CPU `lax.empty` is zeros: here it is NaN, as memory of a TPU may be."""
    scheme = toys.make("block", size)
    toy = toys.cast(toys.toy(scheme, kinds, B=1, T=4, D=8), "float32")
    want = toys.value_and_gradient(lambda toy: toys.run(scheme, kinds, toy))(toy)
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    got = toys.value_and_gradient(lambda toy: toys.run(scheme, kinds, toy))(toy)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("reps", [1, 2])
def test_blocks_that_end_in_a_scan_before_one_that_keeps_nothing(reps):
    """The row that the former leaves beside its carries is none of the latter's."""

    def open_(rows, n, own):
        seen = jnp.where(jnp.arange(len(rows)) < n, 1.0, 0.0) @ jnp.tanh(rows)
        return (rows, None), seen, [[w] for w in own]

    def step(shared, carry, w, row):
        return shared, carry + jnp.sin(carry * w), ()

    def scanned(x, ws):
        blocks = [Block(open_, (((step,), times),)) for times in (2, 1)]
        rows = jnp.pad(x[None], ((0, 2 * reps), (0, 0)))
        rows, _ = append_scan(blocks, lambda own: [[own[:2]], [own[2:]]], rows, 1, ws, {})
        return jnp.sum(rows[1:] ** 2)

    def plain(x, ws):
        rows = [x]
        for own in ws:
            for some in (own[:2], own[2:]):
                carry = sum(map(jnp.tanh, rows))
                for w in some:
                    carry = carry + jnp.sin(carry * w)
                rows.append(carry)
        return jnp.sum(jnp.stack(rows[1:]) ** 2)

    x, ws = jnp.linspace(-1.0, 1.0, 4), jnp.linspace(0.3, 1.5, reps * 3 * 4).reshape(reps, 3, 4)
    got, want = (jax.grad(f, (0, 1))(x, ws) for f in (scanned, plain))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5), got, want)


def test_it_is_exported():
    """For serving elsewhere: nothing in it but what `jax.export` writes down."""
    scheme = toys.make("block", 2)
    toy = toys.cast(toys.toy(scheme, "am" * 4), "float32")
    run = jax.jit(lambda toy: toys.run(scheme, "am" * 4, toy).h)
    np.testing.assert_allclose(jax.export.export(run)(toy).call(toy), run(toy), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "steps"), [(4, 4), (6, 2)], ids=["spelled_out", "loop"])
@pytest.mark.parametrize("policy", ["nothing_saveable", "everything_saveable"])
def test_what_is_made_again_waits_for_what_needs_it(policy, size, steps):
    """Behind a barrier in each step's backward pass: else XLA makes it early, and keeps it. Not where all is
    kept, which the barrier would copy."""
    scheme, kinds = toys.make("block", size), "am" * size
    toy = toys.toy(scheme, kinds)
    policy = getattr(jax.checkpoint_policies, policy)
    loss = jax.grad(lambda toy: jnp.sum(toys.run(scheme, kinds, toy, policy=policy).h))
    others = 1 if size == 4 else 2  # the output read; beside a loop, the first row of what is kept
    made_again = policy is jax.checkpoint_policies.nothing_saveable
    assert jax.jit(loss).lower(toy).as_text().count("optimization_barrier") == others + steps * made_again


@pytest.mark.parametrize(("stream", "outputs"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("plain", 2),
        ("block", 2),
        ("block", 4),
        ("block", 6),
        ("full", 1),
        ("rms_block", 2),
        ("delta_block", 2),
    ],
)
def test_a_stream_keeps_its_dtype(name, size, stream, outputs):
    """Sublayers in bf16 do not narrow it, parameters in fp32, as Flax has them, do not widen it: a block's
    sum begins with an output, and has the rows' dtype. In loops as in the walk."""
    scheme, kinds = toys.make(name, size), "am" * 6
    toy = toys.cast(toys.toy(scheme, kinds), stream)
    mix = scheme.init(len(kinds), toy.x.shape[-1])._replace(**toy.mix)
    norm = lambda h: h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)  # noqa: E731

    def apply(scale, x, _):
        return jnp.tanh(scale * x).astype(outputs), None

    scales = jnp.linspace(1, 2, len(kinds))
    layers = {k: Layer(lambda _: norm, apply, scales[at::2]) for at, k in enumerate("am")}
    scanned = through_depth(scheme, mix, kinds, layers, toy.x).h
    depth = start(scheme, mix, len(kinds), toy.x)
    for scale in scales:
        depth = depth.write(apply(scale, depth.read(norm).x, None)[0])
    for summary in jax.tree.leaves(depth.history):
        assert summary.dtype == stream
    got, want = (np.asarray(h, np.float32) for h in (depth.finish().mixture, scanned))
    oracle.assert_close(got, want, 2e-6 if stream == "float32" else 1e-2)
