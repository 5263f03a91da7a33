"""Bits per byte of given cross-entropies, by hand."""

import numpy as np
import pytest

from attnres_jax.train import evaluate
from attnres_jax.train.data import Windows


def test_evaluation_by_hand():
    """Masked predictions do not count; every position has its own mean."""
    nats = np.array([[1.0, 2.0, 4.0], [3.0, 6.0, 100.0]])
    mask = np.array([[True, True, True], [True, True, False]])
    tokens = np.zeros((2, 4), np.int32)
    found = evaluate.evaluate(
        lambda tokens, mask: np.where(mask, nats, 0).sum(0), [Windows(tokens, mask)] * 2, 2.0
    )
    assert found.tokens == 10
    assert found.loss == pytest.approx(16 / 5)
    assert found.bits_per_byte == pytest.approx(16 / 5 / np.log(2) / 2)
    assert found.perplexity == pytest.approx(np.exp(16 / 5))
    np.testing.assert_allclose(found.position_bits, np.array([2, 4, 4]) / np.log(2) / 2)


def test_octaves():
    assert [*evaluate._octaves(12)] == [(1, 1), (2, 3), (4, 7), (8, 12)]
