"""Divergence of a student's next-token distribution from a teacher's, and its gradient.

Invariant: a divergence is that of k + 1 buckets: the teacher's k likeliest tokens, each alone, and
all others lumped. Lumping never increases it: it is a lower bound of the divergence over all
tokens, monotone in k, exact at k = V. It is 0 at equal distributions, and its gradient by the
student's logits is exact. Formulas (arXiv 1503.02531), with q the student's buckets at temperature
T, p the teacher's, u_b = ∂D/∂log q_b:

    forward   D = Σ p log(p/q)    u = −p
    reverse   D = Σ q log(q/p)    u = q log(q/p)     (both up to terms that cancel below)
    symmetric the mean of both
    jsd       D = β Σ p log(p/m) + (1−β) Σ q log(q/m)    u = (1−β) q log(q/m),  m = β p + (1−β) q
              (arXiv 2306.13649; β = 0 is forward and β = 1 reverse: D would vanish at both ends)
    T² ∂D/∂logit_j = T (u_j − q_j Σ_b u_b)                 j one of the top tokens
                   = T (u_tail · q_j/q_tail − q_j Σ_b u_b) j in the tail

so that forward at k = V gives T (q − p). Legend: C positions, V vocabulary, K top tokens of the
teacher, B = K + 1 buckets. Try it: ``mlx-slim distill distill-smollm2 -o runs/distilled``.

A worked example: V = 3, k = 1, T = 1, forward. The teacher has p = (0.7, 0.2, 0.1): stored are
token 0 with log 0.7, and log 0.3 for the rest. The student has q = (0.5, 0.3, 0.2). Then
D = 0.7 log(0.7/0.5) + 0.3 log(0.3/0.5) = 0.082, u = (−0.7, −0.3) and Σ u = −1. The gradient by
logit 0 is −0.7 + 0.5 = −0.2; by the tail's logits −0.3 · 0.3/0.5 + 0.3 = 0.12 and
−0.3 · 0.2/0.5 + 0.2 = 0.08.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_slim.models.activations import exp
from mlx_slim.models.logits import largest, logsumexp, row_sums
from mlx_slim.training.losses import NLL, LogitsGradient, weighted_sum

Divergence = Literal["forward", "reverse", "symmetric", "jsd"]

FLOOR = -100.0  # log of a probability; float32 has no smaller ones
_NOTHING = -1e30  # logit of a token that is left out of a sum


def tail(scaled_CV: mx.array, ids_CK: mx.array) -> mx.array:
    """Return log Σ exp (C, 1) over the tokens that are not in ``ids_CK``, differentiable."""
    return logsumexp(mx.put_along_axis(scaled_CV, ids_CK, mx.array(_NOTHING), axis=-1))


def top(logits_CV: mx.array, k: int, temperature: float) -> tuple[mx.array, mx.array, mx.array]:
    """Return the part of a teacher's logits that is stored.

    Args:
        logits_CV: Any floating dtype.
        k: Number of top tokens.
        temperature: T.

    Returns:
        ids_CK int32, their log-probabilities at T (C, K), and that of all others (C,), float32 and
        not below ``FLOOR``.
    """
    scaled_CV = logits_CV.astype(mx.float32) / temperature
    width = scaled_CV.shape[-1]
    if k < width:
        ids_CK = largest(scaled_CV, k)
    else:
        ids_CK = mx.broadcast_to(mx.arange(width, dtype=mx.int32), scaled_CV.shape)
    total_C1 = logsumexp(scaled_CV)
    top_CK = mx.take_along_axis(scaled_CV, ids_CK, axis=-1) - total_C1
    rest_C = (tail(scaled_CV, ids_CK) - total_C1)[:, 0]
    return ids_CK, mx.maximum(top_CK, FLOOR), mx.maximum(rest_C, FLOOR)


def _buckets(top_CK: mx.array, rest_C: mx.array) -> mx.array:
    """Return k + 1 log-probabilities (C, K + 1), the tail last."""
    return mx.maximum(mx.concatenate([top_CK, rest_C[:, None]], axis=-1), FLOOR)


def _ends(kind: Divergence, beta: float) -> Divergence:
    """Return what ``jsd`` is at the ends of β."""
    if kind != "jsd" or 0 < beta < 1:
        return kind
    return "forward" if beta == 0 else "reverse"


def _log_mixture(log_p_CB: mx.array, log_q_CB: mx.array, beta: float) -> mx.array:
    """Return log m of each bucket, m = β·p + (1−β)·q."""
    return mx.logaddexp(log_p_CB + math.log(beta), log_q_CB + math.log1p(-beta))


def between(
    log_p_CB: mx.array, log_q_CB: mx.array, kind: Divergence, beta: float = 0.5
) -> mx.array:
    """Return the divergence (C,) of buckets from their log-probabilities, nats; differentiable."""
    kind = _ends(kind, beta)
    if kind == "jsd":
        log_m_CB = _log_mixture(log_p_CB, log_q_CB, beta)
        of_p_CB = beta * mx.exp(log_p_CB) * (log_p_CB - log_m_CB)
        of_q_CB = (1 - beta) * mx.exp(log_q_CB) * (log_q_CB - log_m_CB)
        return row_sums(of_p_CB + of_q_CB)[:, 0]
    gap_CB = log_p_CB - log_q_CB
    forward_C = row_sums(mx.exp(log_p_CB) * gap_CB)[:, 0]
    if kind == "forward":
        return forward_C
    reverse_C = -row_sums(mx.exp(log_q_CB) * gap_CB)[:, 0]
    return reverse_C if kind == "reverse" else 0.5 * (forward_C + reverse_C)


def bucket_gradient(
    log_p_CB: mx.array, log_q_CB: mx.array, kind: Divergence, beta: float = 0.5
) -> mx.array:
    """Return u = ∂D/∂log q of each bucket (C, B), up to multiples of q, which cancel."""
    kind = _ends(kind, beta)
    if kind == "jsd":
        log_m_CB = _log_mixture(log_p_CB, log_q_CB, beta)
        return (1 - beta) * mx.exp(log_q_CB) * (log_q_CB - log_m_CB)
    forward_CB = -mx.exp(log_p_CB)
    if kind == "forward":
        return forward_CB
    reverse_CB = mx.exp(log_q_CB) * (log_q_CB - log_p_CB)
    return reverse_CB if kind == "reverse" else 0.5 * (forward_CB + reverse_CB)


@dataclass(frozen=True)
class DistillationLoss:
    """The token loss (1−λ)·CE + λ·T²·Σ_m a_m·D_m; Σ CE and Σ_m a_m·D_m are reported after it.

    Columns: ``targets_C``, then ``ids_CK``, ``top_CK`` and ``rest_C`` (see ``top``) of each
    teacher, and ``weights_C`` if not ones. At T = 1 cross-entropy and divergence use the same
    exponentials.

    Attributes:
        divergence: Of each teacher from the student.
        temperature: T, that of the columns.
        weight: λ.
        loss_weights: a_m of the teachers; they sum to 1.
        beta: β of ``jsd``.
    """

    divergence: Divergence = "forward"
    temperature: float = 1.0
    weight: float = 0.5
    loss_weights: Sequence[float] = (1.0,)
    beta: float = 0.5

    def _split(self, columns: Sequence[mx.array]) -> tuple[Sequence[mx.array], list[mx.array]]:
        """Return the teachers' columns, and the weights of the targets, if there are any."""
        count = 3 * len(self.loss_weights)
        return columns[:count], list(columns[count:])

    def _mixed(self, nll: mx.array, apart: mx.array) -> mx.array:
        if self.weight == 0:  # bit for bit that of plain cross-entropy
            return mx.stack([nll, nll, apart])
        loss = (1 - self.weight) * nll + self.weight * self.temperature**2 * apart
        return mx.stack([loss, nll, apart])

    def value(self, logits_CV: mx.array, *columns: mx.array) -> mx.array:
        """Return Σ loss, Σ CE and Σ divergence, float32 (3,), nats."""
        targets_C, *more = columns
        teachers, weights = self._split(more)
        logits_CV = logits_CV.astype(mx.float32)
        scaled_CV = logits_CV / self.temperature
        total_C1 = logsumexp(scaled_CV)
        apart = mx.zeros((), dtype=mx.float32)
        for m, loss_weight in enumerate(self.loss_weights):
            ids_CK, top_CK, rest_C = teachers[3 * m : 3 * m + 3]
            student_CK = mx.take_along_axis(scaled_CV, ids_CK, axis=-1) - total_C1
            student_rest_C = (tail(scaled_CV, ids_CK) - total_C1)[:, 0]
            log_p_CB, log_q_CB = _buckets(top_CK, rest_C), _buckets(student_CK, student_rest_C)
            apart_C = between(log_p_CB, log_q_CB, self.divergence, self.beta)
            apart = apart + loss_weight * weighted_sum(apart_C, *weights)
        return self._mixed(NLL().value(logits_CV, targets_C, *weights), apart)

    def value_and_gradient(
        self, logits_CV: mx.array, *columns: mx.array
    ) -> tuple[mx.array, LogitsGradient]:
        """Return the same, and the gradient of the loss by the logits."""
        targets_C, *more = columns
        teachers, weights = self._split(more)
        nll, plain = NLL().value_and_gradient(logits_CV, targets_C, *weights)
        scaled_CV = logits_CV if self.temperature == 1 else logits_CV / self.temperature
        peak_C1 = scaled_CV.max(axis=-1, keepdims=True)
        exp_CV = plain.probs_CV if self.temperature == 1 else exp(scaled_CV - peak_C1)
        total_C1 = row_sums(exp_CV)
        log_total_C1 = mx.log(total_C1) + peak_C1
        apart = mx.zeros((), dtype=mx.float32)
        probs_CV = None
        for m, loss_weight in enumerate(self.loss_weights):
            ids_CK, top_CK, rest_C = teachers[3 * m : 3 * m + 3]
            weight = self.weight * self.temperature * loss_weight
            # Summed without the top tokens: subtracting them would leave their rounding errors.
            others_C1 = row_sums(mx.put_along_axis(exp_CV, ids_CK, mx.array(0.0), axis=-1))
            student_CK = mx.take_along_axis(scaled_CV, ids_CK, axis=-1) - log_total_C1
            log_p_CB = _buckets(top_CK, rest_C)
            log_q_CB = _buckets(student_CK, mx.log(others_C1 / total_C1)[:, 0])
            apart_C = between(log_p_CB, log_q_CB, self.divergence, self.beta)
            apart = apart + loss_weight * weighted_sum(apart_C, *weights)
            u_CB = bucket_gradient(log_p_CB, log_q_CB, self.divergence, self.beta)
            back_C1 = row_sums(u_CB)
            lumped_C1 = mx.where(others_C1 > 0, u_CB[:, -1:] / others_C1, 0.0)
            part_CV = exp_CV * (weight * (lumped_C1 - back_C1 / total_C1))
            single_CK = weight * (u_CB[:, :-1] - mx.exp(student_CK) * back_C1)
            part_CV = mx.put_along_axis(part_CV, ids_CK, single_CK, axis=-1)
            probs_CV = part_CV if probs_CV is None else probs_CV + part_CV
        sums = self._mixed(nll, apart)
        if self.weight == 0:
            return sums, plain
        assert probs_CV is not None
        if self.weight == 1:
            return sums, LogitsGradient(probs_CV, normalizer_C=plain.normalizer_C)
        ce_CV = plain.probs_CV * ((1 - self.weight) / row_sums(plain.probs_CV))
        label_weight_C = mx.full(targets_C.shape, 1 - self.weight)
        label_weight_C = label_weight_C * weights[0] if weights else label_weight_C
        probs_CV = probs_CV + ce_CV
        return sums, LogitsGradient(
            probs_CV,
            normalizer_C=plain.normalizer_C,
            targets_C=targets_C,
            label_weight_C=label_weight_C,
        )
