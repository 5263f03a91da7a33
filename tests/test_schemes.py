"""Every residual scheme: M v = h, its rank, scanned as literal, gradients at depth."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys

from attnres_jax import residuals
from attnres_jax.analysis import matrix, ranks
from attnres_jax.residuals import Mix
from attnres_jax.residuals.base import Appending, Read
from attnres_jax.stack import Layer, through_depth

KINDS = "amkmamkmk"
D = 8
SCHEMES = list(residuals.SCHEMES)
every = pytest.mark.parametrize("name", SCHEMES)


def make(name, L=len(KINDS), **options):
    return residuals.make(name, **{"block_size": 3, "sublayers": L} | options)


def drawn(scheme, kinds=KINDS, seed=0, spread=0.3, **shape) -> toys.Toy:
    """A toy whose scheme is well away from its start, yet near enough to be well conditioned."""
    rng = np.random.default_rng(seed)
    blank = toys.toy(toys.make("plain", 1), kinds, seed=seed, **{"D": D} | shape)
    mix = jax.tree.map(lambda a: np.asarray(a), scheme.init(len(kinds), blank.x.shape[-1]))

    def away(path, a):
        matrix = ">" in scheme.axes.get(path[-1].key, "") and a.ndim > 1
        scale = spread * a.shape[-2] ** -0.5 if matrix else spread
        return (a + toys.draw(rng, a.shape, scale)).astype("float32")

    return blank._replace(mix=jax.tree.map_with_path(away, mix)._asdict())


def started(scheme, kinds=KINDS, **shape) -> toys.Toy:
    """The same sublayers under the scheme as it is initialised."""
    blank = drawn(scheme, kinds, **shape)
    return blank._replace(mix=scheme.init(len(kinds), blank.x.shape[-1])._asdict())


@cache
def recorded(name, kinds=KINDS, size=3):
    """Of a drawn toy, in fp64: the scheme, the record, M v, and the diagonals of M's entries."""
    scheme = make(name, len(kinds), block_size=size)

    def run(toy):
        record = toys.run(scheme, kinds, toy, record=True).record
        return record, matrix.apply(scheme, record, record.outputs), matrix.diagonal(scheme, record)

    with jax.enable_x64(True):
        toy = toys.cast(drawn(scheme, kinds, B=1, T=2), "float64")
        return scheme, *jax.device_get(jax.jit(run, compiler_options=toys.QUICK)(toy))


@every
def test_matrix_times_outputs_is_mixtures(name, x64):
    scheme, record, h, diagonal = recorded(name)
    np.testing.assert_allclose(h, record.mixtures, rtol=0, atol=1e-10)
    L1, (B, T), G = len(KINDS) + 1, record.outputs.shape[1:3], diagonal.shape[-1]
    assert diagonal.shape == (L1, L1, B, T, G)
    assert not diagonal[~np.tri(L1, dtype=bool)].any()
    if scheme.matrices:
        with pytest.raises(ValueError, match="D x D"):
            matrix.depth_matrix(scheme, record)
    else:
        product = np.sum(diagonal * record.outputs, 1)  # G is 1 or D
        np.testing.assert_allclose(product, record.mixtures, rtol=0, atol=1e-10)


FAST = ("highway", "hc", "denseformer", "full_input_query")
ALL = [name for name in SCHEMES if name not in FAST]
OTHERS = [name for name in ALL if name not in ("plain", "full", "block")]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_scanned_is_literal(name, x64):
    """Values and every gradient, in fp64; those of AttnRes are in test_stack.py."""
    kinds = "mkmkm"
    scheme = make(name, len(kinds))
    toy = toys.cast(drawn(scheme, kinds, B=1, T=2), "float64")
    scanned, literal = (
        toys.value_and_gradient(lambda toy, i=i: toys.run(scheme, kinds, toy, implementation=i))(toy)
        for i in (None, "reference")
    )
    oracle.assert_close(scanned, literal, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hc", "ddl", "denseformer"])
def test_what_is_kept_changes_nothing(name, x64):
    """For the backward pass: nothing, products, everything."""
    kinds = "mkmkm"
    scheme = make(name, len(kinds))
    toy = toys.cast(drawn(scheme, kinds, B=1, T=2), "float64")
    policies = jax.checkpoint_policies
    nothing, *others = (
        toys.value_and_gradient(lambda toy, p=p: toys.run(scheme, kinds, toy, policy=p))(toy)
        for p in (policies.nothing_saveable, policies.dots_saveable, policies.everything_saveable)
    )
    for found in others:
        oracle.assert_close(found, nothing, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hc", "mhc", "ddl", "siamese", "denseformer", "rms_block"])
def test_bf16(name, x64):
    """Of each kind of state: streams and sublayers in bf16, the scheme's parameters in fp32, against fp64."""
    scheme = make(name)
    toy = drawn(scheme, B=1, T=2)
    exact, rounded = toys.cast(toy, "float64"), toys.cast(toy, "bfloat16")
    rounded = rounded._replace(mix=toys.cast(toy.mix, "float32"))
    found, wanted = (
        np.asarray(jax.jit(lambda t: toys.run(scheme, KINDS, t).h)(t).astype("float64"))
        for t in (rounded, exact)
    )
    assert 0 < np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)


DEEP = 128


@pytest.mark.slow
@every
def test_gradients_are_finite_at_depth(name):
    """128 sublayers, fp32, as initialised."""
    kinds = "am" * (DEEP // 2)
    scheme = make(name, DEEP, block_size=16)
    toy = toys.cast(started(scheme, kinds, B=1, T=2), "float32")
    gradient = toys.value_and_gradient(lambda toy: toys.run(scheme, kinds, toy))(toy)["gradient"]
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
    assert np.abs(gradient.x).max() > 1e-6


@pytest.mark.parametrize(("name", "wanted"), [("plain", np.arange(len(KINDS) + 1) + 1), ("full", 1)])
def test_row_sums(name, wanted):
    """A sum of all outputs so far; an average."""
    M = recorded(name)[-1]
    np.testing.assert_allclose(matrix.row_sums(M)[:, 0, 0, 0], wanted, rtol=1e-12)


RANKS = {
    1: "plain rezero layerscale highway deepnorm keel mrla",
    2: "siamese",
    4: "hc hc_static mhc mhc_lite",
    6: "block block_unnormed block_heads block_sliced block_additive delta_block",  # N
    7: "rms_block",  # whose running sum is a state of its own
    9: "window",  # eight outputs and the embedding
    11: "full_recency",
    13: "full full_sigmoid full_unnormed full_static full_input_query delta ddl densenet denseformer",
}
"""Of 24 sublayers, S = 4: no block of M has more than 13 rows and columns."""


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in ALL)])
def test_semiseparable_rank(name):
    """Of every token and two channels, at random parameters: 1 of one state, m of m states, N of N blocks
    (the paper: between N and N + S), all that there is of Full; the others as they were found."""
    M = recorded(name, "amk" * 8, 4)[-1]
    ranks = {matrix.rank(M[:, :, 0, t, g]) for t in range(M.shape[3]) for g in range(min(2, M.shape[-1]))}
    (wanted,) = (rank for rank, names in RANKS.items() if name in names.split())
    assert ranks == {wanted}


@pytest.mark.parametrize(("name", "wanted"), [("plain", 1), ("highway", 1), ("hc_static", 4), ("block", 6)])
def test_ranks_of_the_page_are_measured(name, wanted):
    """By its own toy, of another width of sublayers: 1, m, N."""
    scheme = residuals.make(name, block_size=ranks.S, sublayers=ranks.L, streams=ranks.STREAMS)
    assert ranks.measured(scheme) == [wanted]


def test_the_page_of_ranks_has_those_found_here():
    """All schemes; full_recency, whose old outputs fade, is at the edge of what counts as zero."""
    page = Path(__file__).parent.parent / "docs/results/schemes/ranks.md"
    found = dict(re.findall(r"^\| (\w+) \| ([\d, ]+) \|", page.read_text(), re.M))
    wanted = {name: str(rank) for rank, names in RANKS.items() for name in names.split()}
    assert found == wanted | {"full_recency": "11, 12"}


@every
def test_parameters_are_declared(name):
    """Strong fp32, which an optimizer keeps, and a row of the table of parameters for each."""
    scheme = make(name)
    mix, axes = scheme.init(6, D), {"query": "LD", "key_scale": "LD"} | scheme.axes
    for part, drop in ((mix.sublayers, ""), (mix.output, "L")):
        for key, leaf in part.items():
            assert (leaf.dtype, leaf.weak_type) == (np.float32, False)
            assert len(axes[key].removeprefix(drop).replace(">", "")) == leaf.ndim
    assert all(len(leaf) == 6 for leaf in mix.sublayers.values())


@pytest.mark.parametrize("name", ["denseformer", "hc"])
def test_a_kernel_where_there_is_none_is_refused(name):
    scheme = make(name)
    toy = toys.cast(drawn(scheme, B=1, T=2), "float32")
    with pytest.raises(ValueError, match=r"implementation 'tpu'.*jnp"):
        toys.run(scheme, KINDS, toy, implementation="tpu")
    with pytest.raises(ValueError, match="must be None or one of"):
        toys.run(scheme, KINDS, toy, implementation="tqu")


@pytest.mark.parametrize(
    ("name", "option"), [("hc", "streams"), ("ddl", "streams"), ("mhc", "sinkhorn"), ("window", "window")]
)
def test_a_size_below_one_is_refused(name, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        residuals.make(name, **{option: 0})


@every
def test_parameters_can_be_donated(name):
    """Each is an array of its own."""
    arrays = jax.tree.leaves(make(name).init(len(KINDS), D))
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)


@dataclass(frozen=True)
class Newest(Appending):
    """A user's: reads the last row alone; `open` is the default."""

    def init(self, sublayers, width):
        return Mix({}, {})

    def begin(self, history, begins=True):
        return jnp.zeros_like(history[0].array[0])

    def read(self, slot, history, stream, norm, row=None):
        rows = history[-1]
        last = rows.array[-1] if rows.n is None else rows.array[rows.n - 1]
        return Read(norm(last), last, None, history, stream)

    def write(self, slot, stream, y):
        return stream + y

    def finish(self, mix, history):
        last = history[-1].array[-1]
        return Read(last, last, None)


def test_a_user_s_scheme_on_rows_runs_in_loops_and_unrolled():
    scheme, x = Newest(), jax.random.normal(jax.random.key(0), (1, 2, D))
    layers = {"a": Layer(lambda _: lambda h: h, lambda p, x, _: (jnp.tanh(p * x), None), jnp.arange(1.0, 5))}
    want = x
    for p in range(1, 5):
        want = jnp.tanh(p * want)
    for implementation in (None, "reference"):
        got = through_depth(scheme, Mix({}, {}), "aaaa", layers, x, implementation=implementation).h
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_scheme_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="made for 6 sublayers, not 7"):
        make("keel", 6).schedule(7)
