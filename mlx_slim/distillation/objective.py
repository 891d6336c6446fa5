"""What a student that learns from cached teachers minimises.

Invariant: the loop, the step and the batches are those of fine-tuning; only the rule of the loss
and the columns that it reads differ. Held-out rows are measured by cross-entropy, so that runs with
other teachers and weights can be compared, and the divergence stands beside it. Legend: as
``training/step.py``; K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.data.batches import Batch
from mlx_slim.distillation.losses import DistillationLoss
from mlx_slim.training.step import Arrays, CrossEntropy, batch_arrays, target_weights


class Columns(Protocol):
    """What one teacher said: ``targets.TargetCache``."""

    def columns(self, sources_N: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
        """Return ids_NK, kept_NK and rest_N of numbered targets."""
        ...


class DistillationObjective(CrossEntropy):
    """(1−λ)·CE + λ·T²·Σ_m share_m·D_m over what teachers said of the training rows.

    Args:
        token_loss: Divergence, T, λ and the teachers' shares.
        said: Of each teacher, in the order of the shares.
        model, chunk, vocabulary, num_threads: As ``CrossEntropy``.
    """

    parts: tuple[str, ...] = ("cross_entropy", "divergence")

    def __init__(
        self,
        token_loss: DistillationLoss,
        said: Sequence[Columns],
        model: nn.Module,
        chunk: int | None = None,
        vocabulary: int = 8,
        num_threads: int = 1,
    ) -> None:
        super().__init__(model, chunk, vocabulary, num_threads)
        self.token_loss = token_loss
        self._said = list(said)

    def arrays(self, batch: Batch) -> Arrays:
        """Return ``batch_arrays``, three columns of each teacher, and weights if it is padded."""
        said = (column for one in self._said for column in one.columns(batch.sources_N))
        return (*batch_arrays(batch), *said, *target_weights(batch))


class DistillationValidation(DistillationObjective):
    """Cross-entropy of the held-out rows, with the divergence from the teachers beside it."""

    parts: tuple[str, ...] = ("divergence",)

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ CE and Σ divergence, float32 (2,), nats."""
        return super().__call__(model, arrays, gradient=gradient)[1:]
