"""QA-LoRA: an adapter that folds into the biases of a quantized layer without loss.

Inputs are summed over each quantization group before A, so that ΔW is constant inside a group, and
the layer's own form w = scale · code + bias takes it: bias + s · (A B)ᵀ (arXiv 2309.14717; its
authors take means, so their s is ours times the group size). Invariant: the biases that the forward
pass computes with are rounded to the dtype that the base stores them in, and gradients pass the
rounding unchanged; so the folded layer has the very weights that were trained. As an ordinary
adapter it is A with each row repeated for its group, which is how it is stored. Try it:
``mlx-slim train smollm2-qlora adapter.pooled=true model=QUANTIZED -o runs/pooled``.

Shapes: M rows, I inputs, N groups of them, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx

from mlx_slim.adapters.lora import Adapter, LoRALinear
from mlx_slim.errors import SlimError
from mlx_slim.models.quantized import as_stored, format_of
from mlx_slim.models.structure import is_linear


def takes_pooled(module: Any) -> bool:
    """Return whether ``module`` is a linear layer with a bias for each group of its inputs."""
    return is_linear(module) and "biases" in module


def check_pooled(path: str, module: Any) -> None:
    """Raise a ``SlimError`` unless ``module`` can carry a pooled adapter."""
    if not takes_pooled(module):
        raise SlimError(
            f"adapter.pooled=true needs linear layers quantized in mode affine, and {path} is a "
            f"{type(module).__name__}" + (f" in mode {module.mode}" if "scales" in module else ""),
            "quantize the model first (mlx-slim quantize MODEL -o DIR, then model=DIR), or set "
            "adapter.pooled=false",
        )


def grouped(a_IR: mx.array, group_size: int) -> mx.array | None:
    """Return A (N, R) if A (I, R) is the same for all inputs of each group, else None."""
    a_NGR = a_IR.reshape(-1, group_size, a_IR.shape[-1])
    same = mx.array_equal(a_NGR, mx.broadcast_to(a_NGR[:, :1], a_NGR.shape))
    return a_NGR[:, 0] if same.item() else None


def folded_biases(adapter: Adapter) -> mx.array | None:
    """Return bias + s · (A B)ᵀ (O, N), float32, of a layer with ``adapter``; None if ΔW varies.

    Any adapter whose A is constant inside the groups has such biases, a sum of pooled ones too.
    """
    base = adapter.base
    if not takes_pooled(base) or type(adapter) not in (LoRALinear, PooledLoRALinear):
        return None
    if isinstance(adapter, PooledLoRALinear):
        return adapter.biases()
    a_NR = grouped(adapter.factors()[0], format_of(base).group_size)
    if a_NR is None or "under_a" in adapter:
        return None
    b_RO = adapter.factors()[1]
    return base["biases"].astype(mx.float32) + (adapter.scale * (a_NR @ b_RO)).T


class PooledLoRALinear(LoRALinear):
    """y = linear(x) + pool(dropout(x)) Δᵀ, bias + Δ = stored(bias + s · (A B)ᵀ).

    Args:
        linear: A quantized linear layer of mode affine.
        rank: R.
        scale: s.
        dropout: Fraction of the pooled inputs dropped in training.
        stored: Dtype that the layer's biases are stored in; they hold its values now.

    Attributes:
        lora_a: A (N, R), float32, uniform in ±1/√I.
        lora_b: B (R, O), float32, zero.
    """

    def __init__(
        self, linear: Any, rank: int, scale: float, dropout: float, stored: mx.Dtype
    ) -> None:
        super().__init__(linear, rank, scale, dropout)
        self.group_size = format_of(linear).group_size
        self.stored = stored
        self.lora_a = self.lora_a[:: self.group_size]

    def biases(self) -> mx.array:
        """Return the biases (O, N) of the folded layer, float32 with the values of ``stored``."""
        return self.linear["biases"].astype(mx.float32) + self._delta(self.lora_a, self.lora_b)

    def _delta(self, a_NR: mx.array, b_RO: mx.array) -> mx.array:
        """Return Δ (O, N), float32: what the rounded update adds to the biases."""
        biases_ON = self.linear["biases"].astype(mx.float32)
        return as_stored(biases_ON + (self.scale * (a_NR @ b_RO)).T, self.stored) - biases_ON

    def __call__(self, x: mx.array) -> mx.array:
        """Return (..., O) in the dtype of the base's output."""
        y = self.linear(x)
        sums = x.reshape(*x.shape[:-1], -1, self.group_size).astype(mx.float32).sum(axis=-1)
        dropped, scale = self._dropped(sums.astype(y.dtype))
        more = scale / self.scale  # what dropout makes up for

        def forward(x_MN: mx.array, a_NR: mx.array, b_RO: mx.array) -> mx.array:
            return x_MN @ (more * self._delta(a_NR, b_RO)).T.astype(x_MN.dtype)

        def backward(
            primals: list[mx.array], cotangent_MO: mx.array, _y: mx.array
        ) -> tuple[mx.array, mx.array, mx.array]:
            """Gradients of s · x A B, but that by x, which meets the rounded update."""
            x_MN, a_NR, b_RO = primals
            delta_ON = (more * self._delta(a_NR, b_RO)).astype(cotangent_MO.dtype)
            z_MR = cotangent_MO @ b_RO.T.astype(cotangent_MO.dtype)
            by_a_NR = scale * (x_MN.T @ z_MR).astype(mx.float32)
            xa_MR = x_MN @ (scale * a_NR).astype(x_MN.dtype)
            return cotangent_MO @ delta_ON, by_a_NR, (xa_MR.T @ cotangent_MO).astype(mx.float32)

        multiply = mx.custom_function(forward)
        multiply.vjp(backward)
        rows_MN = dropped.reshape(-1, dropped.shape[-1])
        update = cast(mx.array, multiply(rows_MN, self.lora_a, self.lora_b))
        return y + update.reshape(y.shape)

    def factors(self) -> tuple[mx.array, mx.array]:
        """Return (A (I, R), B): the ordinary adapter, before its biases are rounded."""
        return mx.repeat(self.lora_a, self.group_size, axis=0), self.lora_b

    def _update_OI(self) -> mx.array:
        return mx.repeat(self._delta(self.lora_a, self.lora_b), self.group_size, axis=1)
