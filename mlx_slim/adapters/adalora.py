"""AdaLoRA's layer: an update in the form of a singular value decomposition (arXiv 2303.10512).

ΔW = s · P Λ Q with P (O, R), Λ diagonal, Q (R, I); stored the way of the other adapters, P = Bᵀ and
Q = Aᵀ, with Λ in ``lora_e``. Invariant: Λ = 0 at the start, so a fresh adapter is the base's output
bit for bit; a triplet whose λ is 0 adds nothing, so what is saved is a plain LoRA of the triplets
that are left. Which ones stay, ``training/adalora.py`` decides. A and B start orthonormal rather
than Gaussian: the penalty that keeps them so is 0 then, and clipping does not cut the loss's
gradient for its sake.

Shapes: I inputs, O outputs, R rank.

Try it: ``mlx-slim train smollm2-lora adapter.rank=12 adapter.adaptive.target_rank=8``.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_slim.adapters.lora import LoRALinear


def _orthonormal(rows: int, columns: int) -> mx.array:
    """Return a random (rows, columns) matrix with orthonormal columns, float32."""
    return mx.linalg.qr(mx.random.normal((rows, columns)), stream=mx.cpu)[0]


class AdaLoRALinear(LoRALinear):
    """y = linear(x) + s · (dropout(x) A ∘ λ) B.

    Attributes:
        lora_e: λ (R,), float32, zero.
    """

    trainable = ("lora_a", "lora_b", "lora_e")

    def __init__(self, linear: Any, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(linear, rank, scale, dropout)
        inputs, outputs = self.lora_a.shape[0], self.lora_b.shape[1]
        self.lora_a = _orthonormal(inputs, rank)
        self.lora_b = _orthonormal(outputs, rank).T
        self.lora_e = mx.zeros((rank,))
        mx.eval(self.lora_a, self.lora_b)

    def factors(self) -> tuple[mx.array, mx.array]:
        """Return (A diag(λ), B)."""
        return self.lora_a * self.lora_e, self.lora_b

    def plain_factors(self, rank: int) -> tuple[mx.array, mx.array]:
        """Return (A diag(λ), B) of the triplets in use, as (I, rank) and (rank, O), zeros behind.

        Args:
            rank: At least ``active``.
        """
        used = [i for i, value in enumerate(self.lora_e.tolist()) if value != 0]  # pyright: ignore
        a_IR, b_RO = (
            mx.zeros((self.lora_a.shape[0], rank)),
            mx.zeros((rank, self.lora_b.shape[1])),
        )
        if used:
            a_all, b_all = self.factors()
            a_IR[:, : len(used)] = a_all[:, mx.array(used)]
            b_RO[: len(used)] = b_all[mx.array(used)]
        return a_IR, b_RO

    @property
    def active(self) -> int:
        """Triplets in use."""
        return sum(value != 0 for value in self.lora_e.tolist())  # pyright: ignore
