"""DoRA: a learned length for every row of the adapted weight (arXiv 2402.09353).

Invariant: W' = diag(m / ‖V‖row) · V with V = W + s·BA, where ‖V‖row is exact, is treated as a
constant by autodiff, and is computed without forming V or dequantizing W into it:
‖V_i‖² = ‖W_i‖² + 2s[(W Aᵀ)∘B]_i + s²[(B A Aᵀ)∘B]_i; W is only ever applied, to the R rows of A.
At the start m is that same norm, so the factor is exactly 1 and the output the base's, bit for bit.

Shapes: as in ``lora``; factors are stored transposed, A (I, R) and B (R, O).

Try it: ``python -m pytest tests/adapters/test_dora.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx

from mlx_slim.adapters.lora import LoRALinear
from mlx_slim.models.quantized import dequantize_weight

_TINY = 1e-30  # keeps an all-zero row (a pruned neuron) at 0 instead of 0/0


def without_bias(linear: Any) -> Any:
    """Return ``linear`` as it is, or a shallow copy with the same arrays and no bias."""
    if "bias" not in linear:
        return linear
    bare = copy.copy(linear)
    bare.pop("bias")
    return bare


class DoRALinear(LoRALinear):
    """y = (m / ‖V‖) ∘ (x Wᵀ + s · dropout(x) A B) + bias.

    Attributes:
        m: Length of each output row (O,), float32, trainable.
    """

    trainable = ("lora_a", "lora_b", "m")

    def __init__(self, linear: Any, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(linear, rank, scale, dropout)
        self._held_norm_O: mx.array | None = None
        self._base_norm2_O = dequantize_weight(linear).astype(mx.float32).square().sum(axis=1)
        self.m = self.norm()
        # Evaluated here, one layer at a time: a dequantized W must not outlive this line.
        mx.eval(self._base_norm2_O, self.m)

    def start_from(self, a_IR: mx.array, b_RO: mx.array) -> None:
        """Begin at these factors (see ``Adapter``), with m the norm that they give."""
        super().start_from(a_IR, b_RO)
        self.m = self.norm()
        mx.eval(self.m)

    def norm(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """Return ‖V‖ of every row (O,), float32, constant to autodiff.

        Args:
            dtype: What W is applied in (that of the activations); sums are float32 always.
        """
        if self._held_norm_O is not None:
            return self._held_norm_O
        a_IR, b_RO = (mx.stop_gradient(factor) for factor in self.factors())
        wa_RO = without_bias(self.linear)(a_IR.T.astype(dtype)).astype(mx.float32)
        cross_O = (wa_RO * b_RO).sum(axis=0)
        square_O = (((a_IR.T @ a_IR) @ b_RO) * b_RO).sum(axis=0)
        norm2_O = self._base_norm2_O + 2 * self.scale * cross_O + self.scale**2 * square_O
        return mx.stop_gradient(mx.sqrt(mx.maximum(norm2_O, _TINY)))

    def __call__(self, x_NI: mx.array) -> mx.array:
        """Return (N, O) in the dtype of the base's output."""
        y_NO = self._add_update(without_bias(self.linear)(x_NI), x_NI)
        y_NO = (self.m / self.norm(x_NI.dtype)).astype(y_NO.dtype) * y_NO
        return y_NO + self.linear.bias if "bias" in self.linear else y_NO

    def merged_weight(self) -> mx.array:
        """Return diag(m / ‖V‖) · V (O, I), float32."""
        return (self.m / self.norm())[:, None] * super().merged_weight()

    def fake_quantize(self, target: mx.array) -> mx.array:
        """Return ‖V‖/m · target − ΔW (O, I), float32; ‖V‖ stays what it is now."""
        norm_O = self.norm()
        mx.eval(norm_O)
        ratio_O = mx.where(mx.abs(self.m) > _TINY, norm_O / self.m, 0.0)
        self._held_norm_O = norm_O
        return ratio_O[:, None] * target.astype(mx.float32) - self._update_OI()

    def end_fake_quantize(self) -> None:
        """‖V‖ is computed again."""
        self._held_norm_O = None
