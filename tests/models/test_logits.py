"""Sums over a wide vocabulary keep float32's precision."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.models.logits import kl_divergence, largest, logsumexp, token_nll


def test_logsumexp_of_a_wide_peaked_row_keeps_its_small_terms() -> None:
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(16, 49152)) * 2.5).astype(np.float32)
    logits[:, 5] += 12
    wide = logits.astype(np.float64)
    peak = wide.max(-1, keepdims=True)
    exact = np.log(np.exp(wide - peak).sum(-1)) + peak[:, 0]
    off = np.abs(np.array(logsumexp(mx.array(logits)))[:, 0] - exact)
    # How many partial sums a BLAS kernel keeps depends on the processor.
    assert off.max() < 2e-5
    if mx.default_device() == mx.cpu:  # which adds up one after the other
        plain = np.abs(np.array(mx.logsumexp(mx.array(logits), axis=-1)) - exact)
        assert off.mean() < plain.mean() / 5
    nll = np.array(token_nll(mx.array(logits), mx.arange(16)))
    assert np.abs(nll - (exact - wide[np.arange(16), np.arange(16)])).max() < 2e-5


def test_gradient_is_softmax_minus_one_hot() -> None:
    logits = mx.random.normal((3, 50))
    targets = mx.array([4, 0, 49])
    gradient = mx.grad(lambda x: token_nll(x, targets).sum())(logits)
    expected = mx.softmax(logits, axis=-1) - (mx.arange(50)[None] == targets[:, None])
    assert mx.allclose(gradient, expected, atol=1e-6)


def test_kl_divergence_of_wide_rows_is_exact() -> None:
    rng = np.random.default_rng(1)
    p, q = ((rng.normal(size=(4, 49152)) * 2.5).astype(np.float32) for _ in range(2))
    wide_p, wide_q = (
        x - np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True)) for x in (p, q)
    )
    exact = (np.exp(wide_p) * (wide_p - wide_q)).sum(-1)
    ours = np.array(kl_divergence(mx.array(p), mx.array(q)))
    assert np.abs(ours / exact - 1).max() < 1e-5
    assert np.abs(np.array(kl_divergence(mx.array(p), mx.array(p)))).max() < 1e-6


@pytest.mark.parametrize("width", [5, 64, 264, 1000, 49152, 50257])
@pytest.mark.parametrize("k", [1, 5, 64, 1000])
@pytest.mark.parametrize("kind", ["normal", "ties", "few are finite", "ascending"])
def test_the_largest_are_those_of_a_sorted_row(kind: str, k: int, width: int) -> None:
    if k > width:
        pytest.skip("more than there are")
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, width)).astype(np.float32)
    if kind == "ties":
        values = np.round(values)
    elif kind == "few are finite":
        values[:, 3:] = -np.inf
    elif kind == "ascending":
        values = np.sort(values, axis=-1)
    places = np.array(largest(mx.array(values), k))
    assert places.shape == (3, k) and places.min() >= 0 and places.max() < width
    assert all(len(set(row)) == k for row in places.tolist())
    chosen = np.sort(np.take_along_axis(values, places, axis=-1), axis=-1)
    np.testing.assert_array_equal(chosen, np.sort(values, axis=-1)[:, -k:])
