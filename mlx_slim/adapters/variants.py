"""Variants that change the start or the learning rates of an adapter, not its forward pass.

Invariant: PiSSA leaves the base untouched. Its frozen residual W − s·B₀A₀ is written as the base
minus a frozen pair of factors, which is the same function and the same gradients, so it works over
a quantized base, rounds nothing, and is at any time a plain adapter of rank 2r on the unmodified
base (``Adapter.factors``). rsLoRA is ``AdapterConfig.resolved_scale`` and needs no code.

Shapes: I inputs, O outputs, R rank.

Try it: ``python -m pytest tests/adapters/test_variants.py``.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_slim.adapters.lora import Adapter, LoRAEmbedding
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.models.quantized import dequantize_weight

_OVERSAMPLE = 8
_ITERATIONS = 8  # subspace iterations; the error of rank R is then within 0.1% of the best one


def learning_rate_scale(path: str, config: AdapterConfig) -> float:
    """Return the factor on the learning rate of the parameter at ``path``.

    LoRA+ (arXiv 2402.12354) trains B at ``lora_plus_ratio`` times the rate of A.
    """
    return config.lora_plus_ratio if path.rsplit(".", 1)[-1] == "lora_b" else 1.0


def principal_factors(weight_IO: mx.array, rank: int, scale: float) -> tuple[mx.array, mx.array]:
    """Return (A (I, R), B (R, O)), float32, with s · A B the best approximation of rank R.

    A = U √(Σ/s), B = √(Σ/s) Vᵀ from the top-R singular triplets (arXiv 2404.02948). Large weights
    take randomized subspace iteration (arXiv 0909.4061) with a fixed key: the same weight gives the
    same factors, and the global random state is not touched.
    """
    weight_IO = weight_IO.astype(mx.float32)
    width = rank + _OVERSAMPLE
    if 4 * width >= min(weight_IO.shape):
        u_IK, sigma_K, vt_KO = _thin_svd(weight_IO)
    else:
        basis_IK = weight_IO @ mx.random.normal((weight_IO.shape[1], width), key=mx.random.key(0))
        for _ in range(_ITERATIONS):
            basis_IK = mx.linalg.qr(basis_IK, stream=mx.cpu)[0]  # no GPU has it
            basis_IK = weight_IO @ (weight_IO.T @ basis_IK)
        basis_IK = mx.linalg.qr(basis_IK, stream=mx.cpu)[0]
        u_KK, sigma_K, vt_KO = _thin_svd(basis_IK.T @ weight_IO)
        u_IK = basis_IK @ u_KK
    root_R = mx.sqrt(sigma_K[:rank] / scale)
    return u_IK[:, :rank] * root_R, root_R[:, None] * vt_KO[:rank]


def _thin_svd(matrix_IO: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return U (I, K), σ (K,) and Vᵀ (K, O) with K = min(I, O), float32.

    Computed by LAPACK through NumPy: ``mx.linalg.svd`` makes a square U and a square Vᵀ, 822 MB of
    float32 at 14,336 outputs, however few rows there are.
    """
    u_IK, sigma_K, vt_KO = np.linalg.svd(np.array(matrix_IO), full_matrices=False)
    return mx.array(u_IK), mx.array(sigma_K), mx.array(vt_KO)


def start_pissa(adapter: Adapter) -> None:
    """Start ``adapter`` at the principal factors of its own base weight, subtracted from it."""
    weight = dequantize_weight(adapter.base)
    weight_IO = weight if isinstance(adapter, LoRAEmbedding) else weight.T
    a_IR, b_RO = principal_factors(weight_IO, adapter.rank, adapter.scale)
    mx.eval(a_IR, b_RO)
    adapter.start_from(a_IR, b_RO)
