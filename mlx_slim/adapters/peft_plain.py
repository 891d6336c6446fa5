"""What a layer computes under an adapter of PEFT, written out in float32.

Invariant: nothing is rearranged. For a linear layer

    W' = W − s·B₀A₀ + s·BA        (with DoRA every row of W' is then scaled to its length in m)

B₀A₀ is 0 unless the adapter's start was taken out of the base, as PiSSA's (arXiv 2404.02948: the
largest singular triplets of W) and OLoRA's (2406.01775: the first columns of Q and rows of R,
W = QR) are; ``taken_out`` computes it again. An import is compared with ``PlainLayer``. Try it:
``python -m pytest tests/adapters/test_peft_rules.py``; ``make parity`` holds it against PEFT.

Shapes: I inputs, O outputs, R rank; of an embedding W is (I, O) and its update (B A)ᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.models.quantized import dequantize_weight

_DEFINED = 1e-4  # largest fraction of ‖W‖ by which rounding may move what is taken out
_ROUNDING = 8 * np.finfo(np.float32).eps  # of a decomposition in float32, in fractions of ‖W‖₂


@dataclass(frozen=True)
class PeftLayer:
    """The adapter of one layer as PEFT stores it, all float32.

    Attributes:
        a_RI: A.
        b_OR: B.
        m_O: DoRA's lengths; None for LoRA.
        scale: s.
        embedding: Whether it adapts an embedding.
        start: (A₀ (R, I), B₀ (O, R)) whose product was taken out of the base; None if nothing was.
    """

    a_RI: mx.array
    b_OR: mx.array
    m_O: mx.array | None
    scale: float
    embedding: bool
    start: tuple[mx.array, mx.array] | None = None


def taken_out(
    start: str, weight: mx.array, rank: int, scale: float
) -> tuple[mx.array, mx.array] | None:
    """Return (A₀ (R, I), B₀ (O, R)) of a start, float32; None if W does not determine s·B₀A₀.

    Args:
        start: ``pissa`` or ``olora``.
        weight: W (O, I), dense.
        rank: R, at most the smaller side of W.
        scale: s.
    """
    weight_OI = np.array(weight.astype(mx.float32))
    try:
        a_RI, b_OR, moved = (_pissa if start == "pissa" else _olora)(weight_OI, rank, scale)
    except np.linalg.LinAlgError:  # numbers that are not finite
        return None
    return (mx.array(a_RI), mx.array(b_OR)) if moved <= _DEFINED else None


def _pissa(weight_OI: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Return A₀, B₀ with s·B₀A₀ the best approximation of rank R, and how far rounding moves it.

    Between the singular values R and R + 1 the vectors turn by the rounding of W over their
    difference; what is taken out moves by σ_R times that. In fractions of ‖W‖.
    """
    u_OK, sigma_K, vt_KI = np.linalg.svd(weight_OI, full_matrices=False)
    root_R = np.sqrt(sigma_K[:rank] / scale)
    after = sigma_K[rank] if rank < sigma_K.size else -np.inf
    gap = sigma_K[rank - 1] - after
    turned = min(2.0, _ROUNDING * sigma_K[0] / gap) if gap > 0 else 2.0
    moved = float(sigma_K[rank - 1] * turned / max(np.linalg.norm(weight_OI), 1e-30))
    return root_R[:, None] * vt_KI[:rank], u_OK[:, :rank] * root_R, moved


def _olora(weight_OI: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Return A₀, B₀ from W = QR, and how far rounding moves their product, in fractions of ‖W‖.

    B₀A₀ is W projected on its first R columns, as sure as these are independent; all of W where R
    is the smaller side.
    """
    q_OK, r_KI = np.linalg.qr(weight_OI)
    a_RI, b_OR = r_KI[:rank], q_OK[:, :rank]
    part = rank < min(weight_OI.shape)
    moved = float(_ROUNDING * float(np.linalg.cond(a_RI[:, :rank]))) if part else 0.0
    return np.ascontiguousarray(a_RI), np.ascontiguousarray(b_OR), moved


def base_weight(module: nn.Module, layer: PeftLayer | None) -> mx.array:
    """Return W − s·B₀A₀, laid out as the module's weight, float32: the weight below the adapter."""
    weight = dequantize_weight(module).astype(mx.float32)
    if layer is None or layer.start is None:
        return weight
    a_RI, b_OR = layer.start
    return weight - layer.scale * (b_OR @ a_RI)


class PlainLayer(nn.Module):
    """A layer with its W' as the formula above has it, computed in float32 at every call."""

    def __init__(self, module: nn.Module, layer: PeftLayer) -> None:
        super().__init__()
        self.module = module
        self.layer = layer

    def change(self) -> mx.array:
        """Return W' − W, laid out as the module's weight, float32."""
        return self.weight() - dequantize_weight(self.module).astype(mx.float32)

    def weight(self) -> mx.array:
        """Return W', laid out as the module's weight, float32."""
        layer = self.layer
        weight = base_weight(self.module, layer)
        update_OI = layer.scale * (layer.b_OR @ layer.a_RI)
        weight = weight + (update_OI.T if layer.embedding else update_OI)
        if layer.m_O is None:
            return weight
        return (layer.m_O / mx.linalg.norm(weight, axis=1))[:, None] * weight

    def __call__(self, x: mx.array) -> mx.array:
        """Return x W'ᵀ + bias in the dtype of x, or the rows of W' that x names."""
        if self.layer.embedding:
            return self.weight()[x].astype(self.module(x).dtype)
        y_NO = x.astype(mx.float32) @ self.weight().T
        return (y_NO + self.module.get("bias", 0.0)).astype(x.dtype)
