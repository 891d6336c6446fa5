"""LoRA on the experts of a mixture: a pair of factors for each expert, dense or quantized.

Invariant: as in ``lora``: the base is never changed, a fresh adapter returns its output bit for
bit, and names and shapes are those of mlx-lm's ``LoRASwitchLinear``, so that saved tensors load
there. Rows meet only the factors of the experts that they were routed to.

Shapes: N rows with one token and one expert each, I inputs, O outputs, E experts, R rank.

Try it: ``python -m pytest tests/adapters/test_experts.py``.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_slim.adapters.lora import Adapter
from mlx_slim.models.quantized import dequantize_weight


class LoRASwitchLinear(Adapter):
    """y = linear(x, e) + s · dropout(x) Aₑᵀ Bₑᵀ, e the expert of each row.

    Args:
        linear: mlx-lm's ``SwitchLinear`` or ``QuantizedSwitchLinear``, with or without a bias.
        rank: R.
        scale: s.
        dropout: Fraction of the adapter's inputs dropped in training.
    """

    def __init__(self, linear: Any, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(linear, rank, scale, dropout)
        self.linear = linear

    def __call__(self, x_NI: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return (N, O) in the dtype of the base's output.

        Args:
            x_NI: (..., 1, I), one row for each of ``indices`` or to be repeated for them.
            indices: The expert of each row.
            sorted_indices: Whether they ascend.
        """
        y_NO = self.linear(x_NI, indices, sorted_indices=sorted_indices)

        def routed(rows: mx.array, factor: mx.array) -> mx.array:
            factor = factor.astype(rows.dtype).swapaxes(-1, -2)
            return mx.gather_mm(rows, factor, rhs_indices=indices, sorted_indices=sorted_indices)

        if "under_a" in self:
            y_NO = y_NO + routed(routed(x_NI, self.under_a), self.under_b).astype(y_NO.dtype)
        dropped_NI, scale = self._dropped(x_NI)
        a_ERI, b_EOR = self.factors()
        z_NR = scale * routed(dropped_NI, a_ERI)
        return y_NO + routed(z_NR, b_EOR).astype(y_NO.dtype)

    def _update_EOI(self) -> mx.array:
        a_ERI, b_EOR = self.factors()
        update_EOI = (self.scale * b_EOR) @ a_ERI
        return update_EOI + self.under_b @ self.under_a if "under_a" in self else update_EOI

    def merged_weight(self) -> mx.array:
        """Return W + ΔW (E, O, I), float32."""
        return dequantize_weight(self.linear).astype(mx.float32) + self._update_EOI()

    def fake_quantize(self, target: mx.array) -> mx.array:
        """Return target − ΔW (E, O, I), float32."""
        return target.astype(mx.float32) - self._update_EOI()
