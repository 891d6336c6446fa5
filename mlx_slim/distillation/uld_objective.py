"""The objective of a student that learns from a teacher with another tokenizer, from its logits.

Invariant: the loss of a batch and its gradient are those of ``uld_loss.ULDLoss`` over full logits,
and no more logits exist than a chunk's. A group of several tokens of the student has the scale
c = Π q_j(token j), and d loss/d logits runs through c as well. It is computed in steps that each
need one chunk of logits at a time, here for a group with base position b and one other token j::

    1  log c = log q_j(token j)                          of the positions j, no gradient
    2  w = ∂(weight · distance_b)/∂(log c)                of the positions b, no gradient
    3  weight · distance_b(q_b, c)                        of all positions, c a constant
    4  w · log q_j(token j), less its value              of the positions j: the gradient through c

Legend: N supervised positions, M of them that scale a group. Try it:
``mlx-slim distill distill-smollm2 distill.method=uld "distill.teachers=[{model: OTHER}]" -o run``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.data.batches import Batch
from mlx_slim.distillation.uld_loss import (
    COLUMNS,
    SMALLEST,
    MergedTargets,
    TemperedNLL,
    ULDLoss,
)
from mlx_slim.models.logits import logsumexp
from mlx_slim.training.cross_entropy import CrossEntropy, batch_arrays, supervised_rows
from mlx_slim.training.cross_entropy import target_weights as weights_of
from mlx_slim.training.objective import Arrays

_LOG_SMALLEST = math.log(SMALLEST)
_COPIES = 2  # float32 copies of a chunk that sorting and differentiating take, over cross-entropy's


class BatchTargets(NamedTuple):
    """What one teacher says about a batch.

    Attributes:
        merged: Its columns; ``log_scale_C`` is filled in by the objective.
        scaling_M: Index (of N) of each position that scales a group.
        tokens_M: The token whose probability it is.
        base_M: Index (of N) of the group's base.
        valid_M: 1.0, and 0.0 where padded.
    """

    merged: MergedTargets
    scaling_M: mx.array
    tokens_M: mx.array
    base_M: mx.array
    valid_M: mx.array


_ARRAYS = COLUMNS + len(BatchTargets._fields) - 1


class AlignedTargets(Protocol):
    """Cached targets of one teacher, by the student's positions: ``uld.StoredTargets``."""

    def batch(self, batch: Batch) -> BatchTargets:
        """Return those of a batch."""
        ...


class ULDObjective(CrossEntropy):
    """(1−λ)·CE + λ·Σ_m a_m·d_m over the training rows.

    Args:
        token_loss: λ, T and the teachers' loss weights.
        teachers: The targets of each, in the order of the loss weights.
        model, chunk, vocabulary, num_threads: As ``CrossEntropy``.
    """

    metrics: tuple[str, ...] = ("cross_entropy", "divergence")

    def __init__(
        self,
        token_loss: ULDLoss,
        teachers: Sequence[AlignedTargets],
        model: nn.Module,
        chunk: int | None = None,
        vocabulary: int = 8,
        num_threads: int = 1,
    ) -> None:
        super().__init__(model, chunk, vocabulary, _COPIES * num_threads)
        self.uld = token_loss
        self._teachers = list(teachers)

    def arrays(self, batch: Batch) -> Arrays:
        """Return ``batch_arrays``, the arrays of each teacher, and weights if it is padded."""
        columns: list[mx.array] = []
        for teacher in self._teachers:
            merged, *scales = teacher.batch(batch)
            columns += [*merged, *scales]
        return (*batch_arrays(batch), *columns, *weights_of(batch))

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ loss, Σ CE (nats) and Σ distance, float32 (3,)."""
        tokens_BT, positions_N, targets_N, segments_BT, *rest = arrays
        rows = supervised_rows(model, self.split, tokens_BT, positions_N, segments_BT)
        columns, through_scale = self._columns(rows, rest, gradient=gradient)
        sums = self.head_loss(rows, (targets_N, *columns), gradient=gradient, token_loss=self.uld)
        return sums + mx.stack([through_scale, mx.array(0.0), mx.array(0.0)])

    def rows_gradient(self, rows_ND: mx.array, arrays: Arrays) -> tuple[mx.array, mx.array] | None:
        """As that of ``CrossEntropy``, whose loss it is at λ = 0; else None."""
        if self.uld.weight > 0 or self.split is None:
            return None
        _, _, targets_N, _, *rest = arrays
        columns, _ = self._columns(rows_ND, rest, gradient=False)
        return self.rows_loss_gradient(rows_ND, (targets_N, *columns), self.uld)

    def _columns(
        self, rows: mx.array, arrays: Sequence[mx.array], *, gradient: bool
    ) -> tuple[list[mx.array], mx.array]:
        """Return the columns of ``ULDLoss``, and 0 whose gradient is that through log c."""
        teachers = _unpacked(arrays, len(self._teachers))
        weights = arrays[_ARRAYS * len(teachers) :]
        columns: list[mx.array] = []
        through_scale = mx.zeros((), dtype=mx.float32)
        for m, targets in enumerate(teachers):
            merged = targets.merged
            if targets.scaling_M.shape[0]:
                log_probs_M, log_scale_N = self._scales(rows, targets)
                merged = merged._replace(log_scale_C=log_scale_N)
                if gradient and self.uld.weight > 0:
                    gradient_M = self._scale_gradients(
                        rows, m, merged, targets, log_probs_M, weights
                    )
                    through_scale = through_scale + self._through_scale(rows, targets, gradient_M)
            columns += merged
        return [*columns, *weights], through_scale

    def _each(
        self,
        rows: mx.array,
        of_logits: Callable[..., mx.array],
        columns: Sequence[mx.array],
    ) -> mx.array:
        """Return ``of_logits`` of each position's logits (M,), a chunk at a time, constant."""
        done: list[mx.array] = []
        for start in range(0, rows.shape[0], self._chunk):
            cut = [array[start : start + self._chunk] for array in (rows, *columns)]
            hidden, *values = mx.depends(cut, done[-1:]) if done else cut
            logits = hidden if self.split is None else self.split.head(hidden)
            done.append(mx.stop_gradient(of_logits(logits, *values)))
        return mx.concatenate(done)

    def _scales(self, rows: mx.array, targets: BatchTargets) -> tuple[mx.array, mx.array]:
        """Return log q of the scaling tokens (M,), and log c of every position (N,)."""

        def log_probs(logits: mx.array, tokens: mx.array) -> mx.array:
            scaled = logits.astype(mx.float32) / self.uld.temperature
            chosen = mx.take_along_axis(scaled, tokens[:, None], axis=-1)
            return (chosen - logsumexp(scaled))[:, 0]

        log_probs_M = self._each(rows[targets.scaling_M], log_probs, [targets.tokens_M])
        clamped_M = mx.maximum(log_probs_M, _LOG_SMALLEST) * targets.valid_M
        log_scale_N = mx.zeros(rows.shape[0]).at[targets.base_M].add(clamped_M)
        return log_probs_M, log_scale_N

    def _scale_gradients(
        self,
        rows: mx.array,
        teacher: int,
        merged: MergedTargets,
        targets: BatchTargets,
        log_probs_M: mx.array,
        weights: Sequence[mx.array],
    ) -> mx.array:
        """Return ∂loss/∂(log q of each scaling token) (M,)."""
        bases = [column[targets.base_M] for column in merged]

        def by_scale(logits: mx.array, *columns: mx.array) -> mx.array:
            return self.uld.by_log_scale(logits, teacher, MergedTargets(*columns))

        gradient_M = self._each(rows[targets.base_M], by_scale, bases)
        counted_M = mx.where(log_probs_M > _LOG_SMALLEST, targets.valid_M, 0.0)
        for weights_N in weights:
            counted_M = counted_M * weights_N[targets.base_M]
        return self.uld.weight * self.uld.loss_weights[teacher] * counted_M * gradient_M

    def _through_scale(
        self, rows: mx.array, targets: BatchTargets, gradient_M: mx.array
    ) -> mx.array:
        """Return 0, whose gradient by the hidden states is that of the loss through c."""
        columns = (targets.tokens_M, -gradient_M)
        token_loss = TemperedNLL(self.uld.temperature)
        value = self.head_loss(
            rows[targets.scaling_M], columns, gradient=True, token_loss=token_loss
        )
        return value - mx.stop_gradient(value)


def _unpacked(arrays: Sequence[mx.array], count: int) -> list[BatchTargets]:
    teachers = []
    for m in range(count):
        values = arrays[_ARRAYS * m : _ARRAYS * (m + 1)]
        teachers.append(BatchTargets(MergedTargets(*values[:COLUMNS]), *values[COLUMNS:]))
    return teachers


class ULDValidation(ULDObjective):
    """Cross-entropy of validation rows; the distance from the teachers is reported with it."""

    metrics: tuple[str, ...] = ("divergence",)

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ CE (nats) and Σ distance, float32 (2,)."""
        return super().__call__(model, arrays, gradient=gradient)[1:]


def scaling_arrays(
    group_N: np.ndarray, token_N: np.ndarray, size: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return ``scaling_M``, ``tokens_M``, ``base_M`` and ``valid_M`` of a batch.

    Args:
        group_N: Number of the group that each position belongs to; below 0 for none.
        token_N: Token of a position that scales its group, −1 of the group's base.
        size: Padded to so many; None leaves it as it is.
    """
    base = np.flatnonzero((group_N >= 0) & (token_N < 0))
    base = base[np.argsort(group_N[base], kind="stable")]
    scaling = np.flatnonzero((group_N >= 0) & (token_N >= 0))
    places = base[np.searchsorted(group_N[base], group_N[scaling])] if len(scaling) else scaling
    pad = (0, 0 if size is None else size - len(scaling))
    return (
        np.pad(scaling, pad).astype(np.int32),
        np.pad(token_N[scaling], pad).astype(np.int32),
        np.pad(places, pad).astype(np.int32),
        np.pad(np.ones(len(scaling), np.float32), pad),
    )
