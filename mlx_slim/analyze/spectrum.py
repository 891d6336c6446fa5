"""Singular directions of weights: all of a base's (once, cached on disk), the top ones of the rest.

Invariant: the left singular vectors of a matrix come from the eigenvectors of its smaller Gram
matrix in float64, which is three times as fast as an SVD and exact to 1e-6; they are kept in the
cache (``MLX_SLIM_CACHE`` moves it) under a hash of the weight, so that a changed weight is never
confused with its former self. Try it:
``mlx-slim analyze intruders BASE --adapter DIR -o OUT``.

Shapes: O rows, I columns, K = min(O, I) or fewer, J leading vectors.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_slim.artifacts import atomic_file, load_tensors, save_tensors
from mlx_slim.errors import SlimError
from mlx_slim.models import hub

_NULL = 1e-6  # directions below this fraction of the largest singular value are rounding
_SPARE = 8  # directions iterated besides those that are wanted
_ROUNDS = 40
_TOLERANCE = 1e-4  # of the residual of a singular pair, relative to its square


@dataclass(frozen=True)
class Spectrum:
    """The left singular side of a matrix.

    Attributes:
        left_OK: Orthonormal columns, largest singular value first, float32.
        sigma_K: Singular values, float32, descending, none of them zero.
    """

    left_OK: np.ndarray
    sigma_K: np.ndarray


def spectrum(weight_OI: np.ndarray) -> Spectrum:
    """Return all left singular vectors of ``weight_OI`` (float32) that belong to it."""
    weight = weight_OI.astype(np.float64)
    wide = weight.shape[0] <= weight.shape[1]
    gram = weight @ weight.T if wide else weight.T @ weight
    values, vectors = np.linalg.eigh(gram)
    sigma = np.sqrt(np.maximum(values[::-1], 0.0))
    nonzero = sigma > _NULL * max(sigma[0], 1e-300)
    sigma, vectors = sigma[nonzero], vectors[:, ::-1][:, nonzero]
    left = vectors if wide else weight @ vectors / sigma
    return Spectrum(left.astype(np.float32), sigma.astype(np.float32))


def cache_folder() -> Path:
    """Return the folder of cached spectra."""
    return hub.cache_folder() / "svd"


def cached_spectrum(weight_OI: np.ndarray, folder: Path | None) -> Spectrum:
    """Return the spectrum of ``weight_OI``, from ``folder`` if it was computed before.

    Stored vectors are float16 (cosines are then off by 1e-4 at most). A damaged file is computed
    again; a full disk is no reason to fail.

    Args:
        weight_OI: Float32.
        folder: Of the cache; None computes without one.
    """
    if folder is None:
        return spectrum(weight_OI)
    weight_OI = np.ascontiguousarray(weight_OI, dtype=np.float32)
    name = hashlib.sha256(repr(weight_OI.shape).encode() + weight_OI.tobytes()).hexdigest()
    file = folder / f"{name[:32]}.safetensors"
    if file.exists():
        with contextlib.suppress(SlimError, KeyError):
            stored = load_tensors(file)
            left = np.array(stored["left"]).astype(np.float32)
            return Spectrum(left, np.array(stored["sigma"]))
    computed = spectrum(weight_OI)
    with contextlib.suppress(SlimError), atomic_file(file) as temporary:
        left = mx.array(computed.left_OK.astype(np.float16))
        save_tensors(temporary, {"left": left, "sigma": mx.array(computed.sigma_K)})
    return computed


def leading(weight_OI: np.ndarray, count: int, start_OK: np.ndarray) -> Spectrum:
    """Return the ``count`` leading left singular vectors of ``weight_OI`` by subspace iteration.

    Args:
        weight_OI: Float32.
        count: J, at most min(O, I).
        start_OK: Directions that are probably near: those of the matrix that this one grew from,
            and those of what was added. Random ones are put beside them.
    """
    count = min(count, *weight_OI.shape)
    rng = np.random.default_rng(0)
    probes = weight_OI @ rng.standard_normal((weight_OI.shape[1], count + _SPARE), np.float32)
    basis = np.concatenate([start_OK[:, : 4 * (count + _SPARE)], probes], axis=1)
    basis = np.linalg.qr(basis.astype(np.float32))[0][:, : min(weight_OI.shape)]
    left, sigma = basis[:, :count], np.zeros(count, np.float32)
    for _ in range(_ROUNDS):
        image_IK = weight_OI.T @ basis
        inner, sigma, _ = np.linalg.svd(image_IK.T, full_matrices=False)
        left, sigma = basis @ inner[:, :count], sigma[:count]
        next_OK = weight_OI @ (image_IK @ inner)  # W Wᵀ y for every Ritz vector y
        residual = np.linalg.norm(next_OK[:, :count] - left * sigma**2, axis=0)
        if (residual <= _TOLERANCE * sigma[0] * np.maximum(sigma, 1e-30)).all():
            break
        basis = np.linalg.qr(next_OK)[0]
    return Spectrum(left, sigma)


def effective_rank(sigma_K: np.ndarray) -> float:
    """Return exp(−Σ p ln p) with p = σ / Σσ: 1 for one direction, K for K equal ones, 0 for none.

    (Roy and Vetterli, 2007.)
    """
    sigma = sigma_K[sigma_K > 0].astype(np.float64)
    if not len(sigma):
        return 0.0
    weights = sigma / sigma.sum()
    return float(np.exp(-(weights * np.log(weights)).sum()))


def singular_values(weight_OI: np.ndarray) -> np.ndarray:
    """Return all singular values of ``weight_OI``, descending, float64."""
    weight = weight_OI.astype(np.float64)
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))
    return np.where(values > 1e-7 * values[0], values, 0.0)


def product_singular_values(one_OR: np.ndarray, other_RI: np.ndarray) -> np.ndarray:
    """Return the R singular values of ``one_OR @ other_RI`` without forming it, float64."""
    left = np.linalg.qr(one_OR.astype(np.float64))[1]
    right = np.linalg.qr(other_RI.T.astype(np.float64))[1]
    return np.linalg.svd(left @ right.T, compute_uv=False)
