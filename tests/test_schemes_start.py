"""What the papers of residual schemes say of step 0, before anything is learned."""

import numpy as np
import oracle
import pytest
from test_schemes import SCHEMES, drawn, make, started
from test_schemes_equations import L, M, rms, run, sigmoid

TESTED = {"plain"}


def schemes(*names):
    """Parametrizes a test, and keeps count."""
    TESTED.update(names)
    return pytest.mark.parametrize("name", names)


def first(name, **shape):
    """Reads of a scheme as initialised, and of the pre-norm residual, over the same sublayers."""
    scheme, plain = make(name), make("plain")
    toy = started(scheme, **shape)
    blank = toy._replace(mix={"sublayers": {}, "output": {}})
    return run(scheme, toy)[0].mixtures, run(plain, blank)[0].mixtures, toy


@schemes("densenet", "denseformer", "mrla")
def test_starts_as_the_pre_norm_residual(name, x64):
    got, want, _ = first(name)
    oracle.assert_close(got, want, 1e-12)


@schemes("hc", "hc_static")
def test_hyper_connections_start_as_the_pre_norm_residual(name, x64):
    """Every read; the output read sums the m streams, which the final norm undoes."""
    got, want, _ = first(name)
    oracle.assert_close(got[:-1], want[:-1], 1e-13)
    oracle.assert_close(got[-1], M * want[-1], 1e-13)


@schemes("rezero")
def test_rezero_starts_as_the_identity(name, x64):
    got, _, toy = first(name)
    for h in got:
        np.testing.assert_array_equal(h, toy.x)


@schemes("layerscale")
@pytest.mark.parametrize(("sublayers", "small"), [(36, 0.1), (48, 1e-5), (50, 1e-6)])
def test_layer_scale_starts_small(name, sublayers, small):
    assert (make(name).init(sublayers, 3).sublayers["scale"] == np.float32(small)).all()


@schemes("deepnorm", "keel")
def test_post_norm_starts_at_unit_rms(name, x64):
    got, _, toy = first(name)
    oracle.assert_close(got[0], toy.x, 1e-15)
    np.testing.assert_allclose(rms(np.asarray(got[1:])), 1, rtol=1e-4)


@schemes("highway")
def test_highway_starts_by_carrying(name, x64):
    """Rows of M sum to one, at first with the same gate everywhere."""
    scheme = make(name)
    record = run(scheme, started(scheme))[0]
    for step in record.steps:
        np.testing.assert_allclose(step.write, sigmoid(-2.0), rtol=1e-12)
        np.testing.assert_allclose(step.carry + step.write, 1, rtol=1e-12)


@schemes("mhc", "mhc_lite")
def test_manifold_starts_near_the_identity(name, x64):
    """One stream is read and written most; streams hardly mix."""
    scheme = make(name)
    record = run(scheme, started(scheme))[0]
    for l, (step, weights) in enumerate(zip(record.steps, record.weights, strict=False)):
        own = np.where(np.arange(M) == l % M, 1.0, -1.0)
        np.testing.assert_allclose(weights[:, 0, 0, 0], sigmoid(own), rtol=1e-12)
        np.testing.assert_allclose(step.write[:, 0, 0, 0], 2 * sigmoid(own), rtol=1e-12)
        np.testing.assert_allclose(step.carry[:, :, 0, 0, 0], np.eye(M), atol=0.01)


@schemes("ddl")
def test_ddl_starts_by_writing_two_everywhere(name, x64):
    """At beta = 1 the readout along k is the target (eq. 2.3): k^T X = v^T = 2."""
    scheme = make(name)
    record = run(scheme, started(scheme))[0]
    X = np.asarray(record.outputs[:1]).repeat(M, 0)
    for step, y in zip(record.steps, record.outputs[1:], strict=True):
        np.testing.assert_array_equal(step.beta, 1)
        X = np.asarray(scheme.advance(step, X, y))
        np.testing.assert_allclose(np.sum(step.k * X, -1), 2, rtol=1e-4)


@schemes("rms_block")
def test_rms_block_starts_as_the_mean_of_its_sources(name, x64):
    scheme = make(name)
    record = run(scheme, started(scheme))[0]
    v = np.asarray(record.outputs)
    oracle.assert_close(record.mixtures[2], (v[0] + v[1] + v[2]) / 2, 1e-12)
    oracle.assert_close(record.mixtures[3], (v[0] + np.sum(v[1:4] / rms(v[1:4]), 0)) / 2, 1e-12)


@schemes("delta")
def test_delta_starts_as_the_pre_norm_residual(name, x64):
    """Times 1 + 1 / l, which the pre-norm undoes; the first read and the head's are not routed."""
    got, want, _ = first(name)
    for l, (h, u) in enumerate(zip(got, want, strict=True)):
        factor = 1 if l in (0, L) else 1 + 1 / (l + 1)
        oracle.assert_close(h, factor * u, 1e-6)  # eps of the pre-norm


@schemes("window")
def test_window_starts_as_the_mean_of_what_it_sees(name, x64):
    scheme = make(name, window=3)
    record = run(scheme, started(scheme))[0]
    for l, h in enumerate(record.mixtures):
        seen = [0, *range(max(1, l - 2), l + 1)]
        oracle.assert_close(h, np.mean(np.asarray(record.outputs)[seen], 0), 1e-12)


@schemes(
    *("full", "full_unnormed", "full_static", "full_input_query"),
    *("block", "block_unnormed", "block_heads", "block_sliced"),
)
def test_reads_start_as_the_mean_of_their_sources(name, x64):
    """R sources of any read sum to the plain stream: it over R, which the pre-norm undoes."""
    got, want, _ = first(name)
    for R, h, u in zip(make(name).schedule(L).counts, got, want, strict=True):
        oracle.assert_close(R * h, u, 1e-5)  # eps of the pre-norm


def test_input_queries_start_as_those_of_full(x64):
    """With maps of zero, whatever the static queries are."""
    full = make("full")
    toy = drawn(full)
    maps = started(make("full_input_query")).mix
    mix = {part: maps[part] | toy.mix[part] for part in maps}
    got = run(make("full_input_query"), toy._replace(mix=mix))[0].mixtures
    oracle.assert_close(got, run(full, toy)[0].mixtures, 1e-12)


@schemes("full_sigmoid")
def test_sigmoid_starts_as_half_the_stream(name, x64):
    got, want, _ = first(name)
    oracle.assert_close(2 * got, want, 1e-5)


@schemes("full_recency")
def test_recency_starts_by_weighing_the_newest_e_times_its_elder(name, x64):
    scheme = make(name)
    record = run(scheme, started(scheme))[0]
    v = np.asarray(record.outputs)
    for l, h in enumerate(record.mixtures):
        weights = np.exp(-np.arange(l, -1, -1.0))
        oracle.assert_close(h, np.tensordot(weights / weights.sum(), v[: l + 1], 1), 1e-12)


@schemes("block_additive", "delta_block")
def test_additions_to_the_stream_start_as_means(name, x64):
    """Of all sources, and of completed blocks alone: none at the first read and none at Delta's output."""
    scheme = make(name)
    record = run(scheme, started(scheme))[0]
    v = np.asarray(record.outputs)
    S = scheme.block_size
    for l, h in enumerate(record.mixtures):
        u, done = v[: l + 1].sum(0), l // S
        if name == "block_additive":
            added = u / scheme.schedule(L).counts[l]
        else:
            added = v[: 1 + done * S].sum(0) / (1 + done) * (0 < l < L) * (done > 0)
        oracle.assert_close(h, u + added, 1e-12)


@schemes("siamese")
def test_siamese_starts_with_both_streams_at_the_embedding(name, x64):
    """A read is `X + Norm(Y)`; afterwards both terms are of unit RMS."""
    got, _, toy = first(name)
    x = np.asarray(toy.x)
    oracle.assert_close(got[0], x + x / rms(x), 1e-12)
    assert np.all(rms(np.asarray(got[1:])) < 2 + 1e-6)


def test_every_scheme_has_its_step_zero():
    """`plain` is what they are compared with."""
    assert {*SCHEMES} == TESTED
