"""LoRA over linear and embedding layers, dense or quantized (arXiv 2106.09685).

Invariant: the base layer is never changed, and a fresh adapter (B = 0) returns the base's output
bit for bit. Parameters have mlx-lm's names and shapes (``lora_a``, ``lora_b``, ``linear`` or
``embedding``), so that saved tensors load there; they stay float32 whatever the base is, and only
the products are computed in the dtype of the activations.

Shapes: N rows of activations (any leading axes), I inputs, O outputs, V vocabulary, D width,
E experts, R rank (twice the rank when a frozen start pair is subtracted, see ``variants``).

Try it: ``python -m pytest tests/adapters/test_lora.py``.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.models.dropout import dropout_mask
from mlx_slim.models.quantized import dequantize_weight


def dimensions(module: Any) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear layer or expert, (vocabulary, width) of an embedding.

    Quantized weights are packed: their width is counted in scales, right for every bit width.
    """
    rows, width = module.weight.shape[-2:]
    if "scales" in module:
        width = module.scales.shape[-1] * module.group_size
    embeds = isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    return (rows, width) if embeds else (width, rows)


def is_experts(module: Any) -> bool:
    """Return whether a layer holds the weights of all experts of a mixture (E, O, I)."""
    return hasattr(module, "num_experts")


def rank_axes(module: Any) -> tuple[int, int]:
    """Return the axes of the rank in A and in B of an adapter on ``module``."""
    return (-2, -1) if is_experts(module) else (-1, -2)


def factor_shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B on ``module``: (I, R), (R, O); (E, R, I), (E, O, R) of experts.

    They are mlx-lm's.
    """
    inputs, outputs = dimensions(module)
    if is_experts(module):
        return (module.num_experts, rank, inputs), (module.num_experts, outputs, rank)
    return (inputs, rank), (rank, outputs)


class Adapter(nn.Module):
    """The two factors, and what is common to all adapters.

    Args:
        module: The layer that is adapted; only its shape is read.
        rank: R.
        scale: s in ΔWᵀ = s · A B.
        dropout: Fraction of the adapter's inputs dropped in training.

    Attributes:
        lora_a: A (I, R), float32, uniform in ±1/√I; on experts (E, R, I).
        lora_b: B (R, O), float32, zero; on experts (E, O, R).
        start_a, start_b: Frozen factors whose product is subtracted (PiSSA); absent otherwise.
        under_a, under_b: Frozen adapters below this one, their scale in B; absent otherwise.
    """

    base_name = "linear"
    trainable = ("lora_a", "lora_b")

    def __init__(self, module: Any, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.scale = float(scale)
        self.rank = rank
        bound = 1 / math.sqrt(dimensions(module)[0])
        shape_a, shape_b = factor_shapes(module, rank)
        self.lora_a = mx.random.uniform(-bound, bound, shape_a)
        self.lora_b = mx.zeros(shape_b)

    @property
    def base(self) -> nn.Module:
        """The layer that is adapted, as it was."""
        return self[self.base_name]

    def start_from(self, a_IR: mx.array, b_RO: mx.array) -> None:
        """Begin at these factors, and subtract their product from the update for ever after."""
        self.lora_a, self.lora_b = a_IR, b_RO
        self.start_a, self.start_b = mx.array(a_IR), mx.array(b_RO)
        self.freeze(keys=["start_a", "start_b"], recurse=False)

    def stack_on(self, a_IR: mx.array, b_RO: mx.array) -> None:
        """Apply the frozen update A B below this one, without dropout, for ever after."""
        self.under_a, self.under_b = a_IR, b_RO
        self.freeze(keys=["under_a", "under_b"], recurse=False)

    def factors(self) -> tuple[mx.array, mx.array]:
        """Return (A, B) of the update ΔWᵀ = s · A B, start included, adapters below not."""
        if "start_a" not in self:
            return self.lora_a, self.lora_b
        return (
            mx.concatenate([self.lora_a, self.start_a], axis=1),
            mx.concatenate([self.lora_b, -self.start_b], axis=0),
        )

    @property
    def stored_rank(self) -> int:
        """The rank of ``factors``, the start included."""
        return self.factors()[0].shape[rank_axes(self.base)[0]]

    def merged_weight(self) -> mx.array:
        """Return the adapted weight, laid out as the base's, in float32."""
        raise NotImplementedError

    def fake_quantize(self, target: mx.array) -> mx.array:
        """Return the base weight with which this adapter computes x · ``target``ᵀ.

        Both have the shape of the base weight. Call ``end_fake_quantize`` once it is restored.
        """
        raise NotImplementedError

    def end_fake_quantize(self) -> None:
        """The base weight was restored: drop what depended on the fake-quantized one."""

    def _dropped(self, x: mx.array) -> tuple[mx.array, float]:
        """Return x with its dropped elements zero, and s with the rest's compensation in it."""
        if not self.training or self.dropout == 0:
            return x, self.scale
        keep = 1 - self.dropout
        return mx.where(dropout_mask(keep, x.shape), x, mx.zeros((), x.dtype)), self.scale / keep

    def _add_update(self, y_NO: mx.array, x_NI: mx.array) -> mx.array:
        """Return y + s · dropout(x) A B in the dtype of y: one pass over y, no temporary of it."""
        a_IR, b_RO = self.factors()
        if "under_a" in self:
            z_NR = x_NI @ self.under_a.astype(x_NI.dtype)
            y_NO = mx.addmm(y_NO, z_NR.astype(y_NO.dtype), self.under_b.astype(y_NO.dtype))
        x_NI, scale = self._dropped(x_NI)
        # s goes into the smallest operand, so that no pass over the rows is spent on it.
        z_NR = x_NI @ (scale * a_IR).astype(x_NI.dtype)
        return mx.addmm(y_NO, z_NR.astype(y_NO.dtype), b_RO.astype(y_NO.dtype))


class LoRALinear(Adapter):
    """y = linear(x) + s · dropout(x) A B.

    Args:
        linear: ``nn.Linear`` or ``nn.QuantizedLinear`` (or a subclass), with or without a bias.
        rank: R.
        scale: s.
        dropout: Fraction of the adapter's inputs dropped in training.
    """

    def __init__(self, linear: Any, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(linear, rank, scale, dropout)
        self.linear = linear

    def __call__(self, x_NI: mx.array) -> mx.array:
        """Return (N, O) in the dtype of the base's output."""
        return self._add_update(self.linear(x_NI), x_NI)

    def _update_OI(self) -> mx.array:
        a_IR, b_RO = self.factors()
        update_OI = (self.scale * b_RO).T @ a_IR.T
        return update_OI + self.under_b.T @ self.under_a.T if "under_a" in self else update_OI

    def merged_weight(self) -> mx.array:
        """Return W + ΔW (O, I), float32."""
        return dequantize_weight(self.linear).astype(mx.float32) + self._update_OI()

    def fake_quantize(self, target: mx.array) -> mx.array:
        """Return target − ΔW (O, I), float32."""
        return target.astype(mx.float32) - self._update_OI()


class LoRAEmbedding(Adapter):
    """y = embedding(ids) + s · A[ids] B, and the same update where it serves as a tied head.

    Args:
        embedding: ``nn.Embedding`` or ``nn.QuantizedEmbedding`` (or a subclass).
        rank: R.
        scale: s.
        dropout: Fraction of the update's inputs dropped in training.
    """

    base_name = "embedding"

    def __init__(self, embedding: Any, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(embedding, rank, scale, dropout)
        self.embedding = embedding

    def __call__(self, ids: mx.array) -> mx.array:
        """Return (*ids.shape, D) in the embedding's dtype."""
        y_ND = self.embedding(ids)
        if "under_a" in self:
            z_NR = self.under_a[ids].astype(y_ND.dtype)
            y_ND = mx.addmm(y_ND, z_NR, self.under_b.astype(y_ND.dtype))
        a_VR, b_RD = self.factors()
        z_NR, scale = self._dropped(a_VR[ids])
        return mx.addmm(y_ND, (scale * z_NR).astype(y_ND.dtype), b_RD.astype(y_ND.dtype))

    def as_linear(self, x_ND: mx.array) -> mx.array:
        """Return logits (N, V) of the tied head, the update included."""
        y_NV = self.embedding.as_linear(x_ND)
        if "under_a" in self:
            z_NR = x_ND @ self.under_b.T.astype(x_ND.dtype)
            y_NV = mx.addmm(y_NV, z_NR.astype(y_NV.dtype), self.under_a.T.astype(y_NV.dtype))
        a_VR, b_RD = self.factors()
        x_ND, scale = self._dropped(x_ND)
        z_NR = x_ND @ (scale * b_RD).T.astype(x_ND.dtype)
        return mx.addmm(y_NV, z_NR.astype(y_NV.dtype), a_VR.T.astype(y_NV.dtype))

    def _update_VD(self) -> mx.array:
        a_VR, b_RD = self.factors()
        update_VD = a_VR @ (self.scale * b_RD)
        return update_VD + self.under_a @ self.under_b if "under_a" in self else update_VD

    def merged_weight(self) -> mx.array:
        """Return W + ΔW (V, D), float32."""
        return dequantize_weight(self.embedding).astype(mx.float32) + self._update_VD()

    def fake_quantize(self, target: mx.array) -> mx.array:
        """Return target − ΔW (V, D), float32."""
        return target.astype(mx.float32) - self._update_VD()
