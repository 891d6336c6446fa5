"""Distances between next-token distributions over different vocabularies, and their token loss.

Invariant: with all of a teacher's probabilities stored, value and gradients are those of TRL's
``ULDLoss`` (``tests/parity/test_uld.py``). With the k largest and the rest as one sum, the sorted
distance (arXiv 2402.12030) is a lower bound: s and t are both sides' probabilities in descending
order, S and R what is left behind the first k, and

    d = Σ_{i≤k} |s_i − t_i| + |S − R|        d ≤ Σ_i |s_i − t_i| ≤ d + 2·min(S, R)

A group of tokens that covers the same bytes as a group of the other model's has one distribution,
times a scale c: the product of the probabilities of its other tokens (TRL's extended alignment). c
of the student is differentiated too (``uld_objective.py``).
Legend: C positions of one chunk, V the student's vocabulary, K tokens of the teacher. Try it:
``mlx-slim distill distill-smollm2 distill.method=uld "distill.teachers=[{model: OTHER}]" -o run``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from mlx_slim.models.activations import exp
from mlx_slim.models.logits import largest, logsumexp, row_sums
from mlx_slim.training.losses import NLL, LogitsGradient, weighted_sum

SMALLEST = 1e-8  # probability of a token that merged tokens and logarithms are taken of, as in TRL
UNMATCHED = -1  # the teacher's token is not in the student's vocabulary
UNMATCHED_REST = -2  # all such tokens that are not stored


class MergedTargets(NamedTuple):
    """What the loss reads of one teacher at every position (columns of a ``TokenLoss``).

    Attributes:
        ids_CK: The student's id of each stored token, or ``UNMATCHED``, ``UNMATCHED_REST``.
        top_CK: Logarithms of the teacher's probabilities, descending, times its scale.
        rest_C: That of all its tokens that are not stored.
        weight_C: Weight of the position's distance, 0 where nothing is aligned.
        log_scale_C: log c of the student.
    """

    ids_CK: mx.array
    top_CK: mx.array
    rest_C: mx.array
    weight_C: mx.array
    log_scale_C: mx.array


COLUMNS = len(MergedTargets._fields)


def _largest(probs_CV: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Return the k largest of each row, descending (C, k), and the sum of the others (C, 1)."""
    k = min(k, probs_CV.shape[-1])
    fixed_CV = mx.stop_gradient(probs_CV)
    if k < probs_CV.shape[-1]:
        ids_CK = largest(fixed_CV, k)
        order_CK = mx.argsort(-mx.take_along_axis(fixed_CV, ids_CK, axis=-1), axis=-1)
        ids_CK = mx.take_along_axis(ids_CK, order_CK, axis=-1)
    else:
        ids_CK = mx.argsort(-fixed_CV, axis=-1)
    rest_C1 = row_sums(mx.put_along_axis(probs_CV, ids_CK, mx.array(0.0), axis=-1))
    return mx.take_along_axis(probs_CV, ids_CK, axis=-1), rest_C1


def sorted_distance(probs_CV: mx.array, targets: MergedTargets) -> mx.array:
    """Return d (C,) of the student's scaled probabilities, float32; differentiable."""
    teacher_CK = mx.exp(targets.top_CK)
    top_CK, rest_C1 = _largest(probs_CV, teacher_CK.shape[-1])
    missing = teacher_CK.shape[-1] - top_CK.shape[-1]  # the teacher has more tokens
    top_CK = mx.pad(top_CK, [(0, 0), (0, missing)]) if missing else top_CK
    apart_C1 = row_sums(mx.abs(top_CK - teacher_CK))
    return (apart_C1 + mx.abs(rest_C1 - mx.exp(targets.rest_C)[:, None]))[:, 0]


@dataclass(frozen=True)
class Overlap:
    """Tokens that both vocabularies have, for the hybrid distance (TRL's ``uld_use_hybrid_loss``).

    On these, the generalized Jensen-Shannon divergence of the probabilities, token by token; on
    all others, the sorted distance; each with its weight.

    Attributes:
        matched_V: 1.0 at the student's tokens that the teacher has too, else 0.0.
        weights: Of the two terms.
        beta: β of the divergence: 0 is KL(teacher‖student), 1 is KL(student‖teacher).
    """

    matched_V: mx.array
    weights: tuple[float, float]
    beta: float

    def distance(self, probs_CV: mx.array, targets: MergedTargets) -> mx.array:
        """Return the weighted sum of both terms (C,), float32; differentiable."""
        ids_CK, teacher_CK = targets.ids_CK, mx.exp(targets.top_CK)
        here_CK = ids_CK >= 0
        safe_CK = mx.maximum(ids_CK, 0)
        matched_CV = probs_CV * self.matched_V
        student_CK = mx.take_along_axis(matched_CV, safe_CK, axis=-1)
        divergence_CK = mx.where(here_CK, self._jsd(teacher_CK, student_CK), 0.0)
        # Where an entry has no id of the student, nothing may be erased: V is a column of no token.
        width = probs_CV.shape[-1]
        erased_CV = mx.put_along_axis(
            mx.pad(matched_CV, [(0, 0), (0, 1)]),
            mx.where(here_CK, ids_CK, width),
            mx.array(0.0),
            axis=-1,
        )
        others_C1 = row_sums(erased_CV)
        teacher_others_C1 = mx.exp(targets.rest_C)[:, None]
        matched_C = (row_sums(divergence_CK) + self._jsd(teacher_others_C1, others_C1))[:, 0]
        unmatched_C = self._unmatched(probs_CV * (1 - self.matched_V), ids_CK, teacher_CK)
        return self.weights[0] * matched_C + self.weights[1] * unmatched_C

    def _jsd(self, teacher: mx.array, student: mx.array) -> mx.array:
        log_p, log_q = (mx.log(mx.maximum(side, SMALLEST)) for side in (teacher, student))
        p, q, beta = mx.exp(log_p), mx.exp(log_q), self.beta
        if beta == 0:
            return p * (log_p - log_q)
        if beta == 1:
            return q * (log_q - log_p)
        log_m = mx.log((1 - beta) * q + beta * p)
        return beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)

    def _unmatched(self, probs_CV: mx.array, ids_CK: mx.array, teacher_CK: mx.array) -> mx.array:
        stored_CK = ids_CK == UNMATCHED
        count_C1 = stored_CK.sum(axis=-1, keepdims=True)
        teacher_CK1 = mx.where(stored_CK, teacher_CK, 0.0)
        teacher_CK1 = -mx.sort(-teacher_CK1, axis=-1)
        rest_C1 = row_sums(mx.where(ids_CK == UNMATCHED_REST, teacher_CK, 0.0))
        top_CK, others_C1 = _largest(probs_CV, teacher_CK.shape[-1])
        missing = teacher_CK.shape[-1] - top_CK.shape[-1]
        top_CK = mx.pad(top_CK, [(0, 0), (0, missing)]) if missing else top_CK
        ranked_CK = mx.arange(top_CK.shape[-1])[None] < count_C1
        apart_C1 = row_sums(mx.where(ranked_CK, mx.abs(top_CK - teacher_CK1), 0.0))
        others_C1 = others_C1 + row_sums(mx.where(ranked_CK, 0.0, top_CK))
        return (apart_C1 + mx.abs(others_C1 - rest_C1))[:, 0]


@dataclass(frozen=True)
class ULDLoss:
    """The token loss (1−λ)·CE + λ·Σ_m a_m·d_m; Σ CE and Σ_m a_m·d_m are reported after it.

    Columns: ``targets_C``, then the ``MergedTargets`` of each teacher, and ``weights_C`` if not
    ones. The distances have no factor T², as TRL's.

    Attributes:
        temperature: T, that of the columns.
        weight: λ.
        loss_weights: a_m of the teachers; they sum to 1.
        overlaps: Of each teacher, for the hybrid distance; None for the sorted one.
    """

    temperature: float = 1.0
    weight: float = 0.5
    loss_weights: Sequence[float] = (1.0,)
    overlaps: Sequence[Overlap | None] = (None,)

    def _probs(self, logits_CV: mx.array) -> mx.array:
        scaled_CV = logits_CV.astype(mx.float32) / self.temperature
        return exp(scaled_CV - logsumexp(scaled_CV))

    def _teachers(self, columns: Sequence[mx.array]) -> tuple[list[MergedTargets], list[mx.array]]:
        """Return the teachers' columns, and the weights of the targets, if there are any."""
        count = len(self.loss_weights)
        teachers = [MergedTargets(*columns[COLUMNS * m : COLUMNS * (m + 1)]) for m in range(count)]
        return teachers, list(columns[COLUMNS * count :])

    def distance(self, probs_CV: mx.array, teacher: int, targets: MergedTargets) -> mx.array:
        """Return the distance (C,) of a teacher from the student's probabilities."""
        scaled_CV = probs_CV * mx.exp(targets.log_scale_C)[:, None]
        overlap = self.overlaps[teacher]
        if overlap is None:
            return sorted_distance(scaled_CV, targets)
        return overlap.distance(scaled_CV, targets)

    def by_log_scale(self, logits_CV: mx.array, teacher: int, targets: MergedTargets) -> mx.array:
        """Return ∂(weight · distance)/∂(log c) of the student at each position (C,), float32."""
        probs_CV = self._probs(logits_CV)

        def total(log_scale_C: mx.array) -> mx.array:
            scaled = targets._replace(log_scale_C=log_scale_C)
            return (targets.weight_C * self.distance(probs_CV, teacher, scaled)).sum()

        return mx.grad(total)(targets.log_scale_C)

    def _apart(
        self, probs_CV: mx.array, teachers: Sequence[MergedTargets], weights: list[mx.array]
    ) -> mx.array:
        total = mx.zeros((), dtype=mx.float32)
        for m, (loss_weight, targets) in enumerate(zip(self.loss_weights, teachers, strict=True)):
            apart_C = targets.weight_C * self.distance(probs_CV, m, targets)
            total = total + loss_weight * weighted_sum(apart_C, *weights)
        return total

    def _mixed(self, nll: mx.array, apart: mx.array) -> mx.array:
        if self.weight == 0:  # bit for bit that of plain cross-entropy
            return mx.stack([nll, nll, apart])
        return mx.stack([(1 - self.weight) * nll + self.weight * apart, nll, apart])

    def value(self, logits_CV: mx.array, *columns: mx.array) -> mx.array:
        """Return Σ loss, Σ CE (nats) and Σ distance, float32 (3,)."""
        targets_C, *more = columns
        teachers, weights = self._teachers(more)
        apart = self._apart(self._probs(logits_CV), teachers, weights)
        return self._mixed(NLL().value(logits_CV, targets_C, *weights), apart)

    def value_and_gradient(
        self, logits_CV: mx.array, *columns: mx.array
    ) -> tuple[mx.array, LogitsGradient]:
        """Return the same, and the gradient of the loss by the logits."""
        targets_C, *more = columns
        teachers, weights = self._teachers(more)
        nll, plain = NLL().value_and_gradient(logits_CV, targets_C, *weights)
        probs_CV = self._probs(logits_CV)
        if self.weight == 0:
            return self._mixed(nll, self._apart(probs_CV, teachers, weights)), plain
        apart, u_CV = mx.value_and_grad(lambda p: self._apart(p, teachers, weights))(probs_CV)
        scale = self.weight / self.temperature
        by_logits_CV = scale * probs_CV * (u_CV - row_sums(probs_CV * u_CV))
        sums = self._mixed(nll, apart)
        if self.weight == 1:
            return sums, LogitsGradient(by_logits_CV)
        ce_C1 = (1 - self.weight) / row_sums(plain.probs_CV)
        label_weight_C = mx.full(targets_C.shape, 1 - self.weight)
        if weights:
            label_weight_C = label_weight_C * weights[0]
            ce_C1 = ce_C1 * weights[0][:, None]
        return sums, LogitsGradient(
            by_logits_CV + plain.probs_CV * ce_C1,
            targets_C=targets_C,
            label_weight_C=label_weight_C,
        )


@dataclass(frozen=True)
class TemperedNLL:
    """Σ w · −log softmax(logits / T)[target]; columns as ``NLL``, with weights."""

    temperature: float

    def value(self, logits_CV: mx.array, *columns: mx.array) -> mx.array:
        """Return the weighted sum, a float32 scalar in nats."""
        return NLL().value(logits_CV.astype(mx.float32) / self.temperature, *columns)

    def value_and_gradient(
        self, logits_CV: mx.array, *columns: mx.array
    ) -> tuple[mx.array, LogitsGradient]:
        """Return the sum and its gradient by the logits."""
        value, scaled = NLL().value_and_gradient(logits_CV / self.temperature, *columns)
        weights_C = columns[1] / self.temperature
        return value, replace(scaled, normalizer_C=weights_C, label_weight_C=weights_C)
