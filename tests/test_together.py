"""Seeds that train in one program: each is the run that its seed makes alone."""

import jax
import numpy as np
import pytest
from test_train import assert_same, compile_once, corpus, losses, restored, rows, tiny

from attnres_jax import configs
from attnres_jax.train import loop, step, together, workdir

__all__ = ["compile_once", "corpus", "tiny"]  # fixtures


def flat(folder):
    found = workdir.read_json(folder, workdir.EVALUATION, "")
    return [found["step"], found["tokens"], found["loss"], *found["position_bits"]]


@pytest.mark.slow
def test_each_seed_is_its_single_run(tiny, tmp_path):
    """Losses, evaluation, statistics by depth and parameters, to fp32 rounding; each has its own data."""
    config = tiny(seed=3, residual="block")
    together.train(config, 2, tmp_path / "both")
    for seed in (3, 4):
        own, alone = tmp_path / f"both/seed-{seed}", tmp_path / f"alone-{seed}"
        loop.train(tiny(seed=seed, residual="block"), alone)
        assert workdir.load_config(own).seed == seed
        np.testing.assert_allclose(list(losses(own).values()), list(losses(alone).values()), rtol=2e-6)
        np.testing.assert_allclose(flat(own), flat(alone), rtol=1e-5)
        for kind in ("depth", "eval"):
            assert len(rows(own, kind)) == len(rows(alone, kind)) == 2
        for name in ("gradient_norm", "output_rms", "weights"):
            pair = [rows(folder, "depth")[-1][name] for folder in (own, alone)]
            np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-6)
    assert losses(tmp_path / "both/seed-3") != losses(tmp_path / "both/seed-4")
    # A finished one is left alone; its folder goes on as a run of its own.
    together.train(config, 2, tmp_path / "both")
    loop.train(config, tmp_path / "both/seed-3")
    assert len(losses(tmp_path / "both/seed-3")) == 4


@pytest.mark.slow
def test_seeds_resume_bit_for_bit(tiny, tmp_path):
    """Train 4 = train 2, stop, resume 2."""
    together.train(tiny(), 2, tmp_path / "whole")
    assert not together.train(tiny(train__stop_after=2), 2, tmp_path / "halves")
    assert together.train(tiny(), 2, tmp_path / "halves")
    for seed in ("seed-0", "seed-1"):
        whole, halves = tmp_path / "whole" / seed, tmp_path / "halves" / seed
        assert losses(whole) == losses(halves)
        assert_same(restored(tiny(), whole), restored(tiny(), halves))


@pytest.mark.slow
def test_seeds_at_different_updates_are_refused(tiny, tmp_path):
    together.train(tiny(train__stop_after=2), 2, tmp_path)
    loop.train(tiny(seed=1), tmp_path / "seed-1")
    with pytest.raises(
        workdir.RunError, match=r"different updates \(seed-0 at 2, seed-1 at 4\): continue each"
    ):
        together.train(tiny(), 2, tmp_path)


def test_two_devices_are_refused(tiny, tmp_path):
    with pytest.raises(configs.ConfigError, match=r"on one device, not on 2: set mesh\.data=1"):
        together.train(tiny(), 2, tmp_path, jax.devices()[:2])


def test_a_seed_that_diverges_is_named(tiny, tmp_path, monkeypatch):
    """Seed 1's parameters are not finite: its first update says so, and which seed it is."""
    whole = step.programs

    def broken(config, *args):
        run = whole(config, *args)
        if config.seed != 1:
            return run

        def create():
            state = run.create()
            state.params["norm"]["scale"] = state.params["norm"]["scale"] * np.nan
            return state

        return run._replace(create=create)

    monkeypatch.setattr(together, "programs", broken)
    with pytest.raises(step.NonFinite, match=r"seed 1: step 1: loss nan is not finite"):
        together.train(tiny(), 2, tmp_path)
