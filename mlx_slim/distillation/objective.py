"""The objective of a student that learns from cached targets of teachers.

Invariant: the loop, the step and the batches are those of fine-tuning; only the token loss and the
columns that it reads differ. Validation rows are measured by cross-entropy, so that runs with other
teachers and weights can be compared, and the divergence is reported with it. Legend: as
``training/step.py``; K top tokens. Try it: ``mlx-slim distill distill-smollm2 -o runs/distilled``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.data.batches import Batch
from mlx_slim.distillation.losses import DistillationLoss
from mlx_slim.training.cross_entropy import CrossEntropy, batch_arrays, target_weights
from mlx_slim.training.objective import Arrays


class Columns(Protocol):
    """The targets of one teacher: ``target_cache.TargetCache``."""

    def columns(self, sources_N: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
        """Return ids_NK, top_NK and rest_N of the numbered targets."""
        ...


class DistillationObjective(CrossEntropy):
    """(1−λ)·CE + λ·T²·Σ_m a_m·D_m over the training rows.

    Args:
        token_loss: Divergence, T, λ and the teachers' loss weights.
        teachers: The targets of each, in the order of the loss weights.
        model, chunk, vocabulary, num_threads: As ``CrossEntropy``.
    """

    metrics: tuple[str, ...] = ("cross_entropy", "divergence")

    def __init__(
        self,
        token_loss: DistillationLoss,
        teachers: Sequence[Columns],
        model: nn.Module,
        chunk: int | None = None,
        vocabulary: int = 8,
        num_threads: int = 1,
    ) -> None:
        super().__init__(model, chunk, vocabulary, num_threads)
        self.token_loss = token_loss
        self._teachers = list(teachers)

    def arrays(self, batch: Batch) -> Arrays:
        """Return ``batch_arrays``, three columns of each teacher, and weights if it is padded."""
        return self.arrays_of(batch, self._teachers)

    @staticmethod
    def arrays_of(batch: Batch, teachers: Sequence[Columns]) -> Arrays:
        """Return the arrays with the columns of ``teachers``."""
        targets = (column for t in teachers for column in t.columns(batch.sources_N))
        return (*batch_arrays(batch), *targets, *target_weights(batch))


class DistillationValidation(DistillationObjective):
    """Cross-entropy of validation rows; the divergence from the teachers is reported with it."""

    metrics: tuple[str, ...] = ("divergence",)

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ CE and Σ divergence, float32 (2,), nats."""
        return super().__call__(model, arrays, gradient=gradient)[1:]
