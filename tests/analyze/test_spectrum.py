"""Singular directions: against dense SVD, from the cache, and through a damaged cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_slim.analyze import spectrum as module
from mlx_slim.analyze.spectrum import (
    cached_spectrum,
    effective_rank,
    leading,
    product_singular_values,
    singular_values,
    spectrum,
)

SHAPES = [(96, 64), (64, 96), (80, 80), (200, 24)]


def decaying(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape) / np.sqrt(1 + np.arange(shape[1]))
    return weight.astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectrum_is_that_of_a_dense_svd(shape: tuple[int, int]) -> None:
    weight = decaying(shape)
    left, sigma, _ = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    computed = spectrum(weight)
    assert computed.sigma_K == pytest.approx(sigma, rel=1e-5)
    assert np.abs((left * computed.left_OK).sum(axis=0)) == pytest.approx(1.0, abs=1e-5)
    assert singular_values(weight) == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_of_nothing_are_left_out(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((shape[0], 5)) @ rng.standard_normal((5, shape[1]))).astype("f4")
    computed = spectrum(weight)
    assert computed.sigma_K.shape == (5,)
    assert computed.left_OK.T @ computed.left_OK == pytest.approx(np.eye(5), abs=1e-5)
    assert len(spectrum(np.zeros(shape, np.float32)).sigma_K) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", [0, 8])
def test_subspace_iteration_finds_the_leading_ones(shape: tuple[int, int], start: int) -> None:
    weight = decaying(shape, 2)
    left, sigma, _ = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    computed = leading(weight, 6, spectrum(decaying(shape, 3)).left_OK[:, :start])
    assert computed.sigma_K == pytest.approx(sigma[:6], rel=1e-5)
    assert np.abs((left[:, :6] * computed.left_OK).sum(axis=0)) == pytest.approx(1.0, abs=1e-3)


def test_the_cache_answers_and_survives_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = decaying((40, 30))
    first = cached_spectrum(weight, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    monkeypatch.setattr(module, "spectrum", lambda _: pytest.fail("computed again"))
    again = cached_spectrum(weight, tmp_path)
    assert again.sigma_K == pytest.approx(first.sigma_K)
    assert again.left_OK == pytest.approx(first.left_OK, abs=1e-3)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:50])
    assert cached_spectrum(weight, tmp_path).sigma_K == pytest.approx(first.sigma_K)
    cached_spectrum(weight * 2, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert not list(tmp_path.glob(".*"))


def test_effective_rank() -> None:
    assert effective_rank(np.zeros(3)) == 0
    assert effective_rank(np.array([2.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(np.array([1.0, 1, 1])) == pytest.approx(3)
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((50, 4)), rng.standard_normal((4, 30))
    expected = np.linalg.svd(one @ other, compute_uv=False)[:4]
    assert product_singular_values(one, other) == pytest.approx(expected)
