"""The clipped policy-gradient loss of drawn tokens, and its gradient by the logits.

Invariant: log-probabilities are float32 and of the policy that drew the tokens, that is, at its
temperature T; value and gradient are those of autodiff over full logits, which never exist. With
l = log π(token), l_old of the policy that drew it, l_ref of the reference, ρ = exp(l − l_old):

    L = −min(ρ·A, clip(ρ, 1 − ε_lo, 1 + ε_hi)·A) + β·c·k3     k3 = e^(l_ref − l) − (l_ref − l) − 1
    ∂L/∂l = −ρ·A·[not clipped] + β·(1 − e^(l_ref − l))                             with c = 1
            −ρ·A·[not clipped] + β·ρ·(k3 + 1 − e^(l_ref − l))                      with c = ρ
    clipped: A < 0 and ρ < 1 − ε_lo, or A > 0 and ρ > 1 + ε_hi
    ∂l/∂logit_j = ([j = token] − p_j)/T

Papers: arXiv 2402.03300 (GRPO), 2503.20783 (Dr. GRPO), 2503.14476 (DAPO). Legend: C positions, V
vocabulary. Try it: ``mlx-slim train smollm2-grpo -o runs/grpo``.

A worked example: two tokens over a vocabulary of two, T = 1, ε = 0.2, β = 0, both drawn from
(1/2, 1/2) with advantage 1. The policy gives the first 1/2, so ρ = 1, L = −1 and the gradient by
its logits is −(1 − 1/2, −1/2). It gives the second 3/4: ρ = 1.5 is clipped at 1.2, L = −1.2 and
the gradient is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_slim.models.activations import exp
from mlx_slim.models.logits import logsumexp, row_sums
from mlx_slim.training.losses import LogitsGradient

METRICS = ("kl", "clip_low", "clip_high", "entropy")


@dataclass(frozen=True)
class PolicyLoss:
    """Σ w·L over drawn tokens, and after it, over the tokens with w > 0, what ``METRICS`` names.

    Those are Σ k3 (0 without a reference), the counts of tokens clipped below and above, and the
    sum of the entropies of the next-token distributions, in nats.

    Columns: ``targets_C`` the drawn tokens, ``old_C`` their log-probabilities when they were drawn,
    ``advantage_C``, ``weight_C``, and ``reference_C`` if β > 0; float32 but for the targets.

    Attributes:
        low: ε_lo.
        high: ε_hi.
        beta: β.
        bias_correction: Whether c = ρ.
        temperature: T.
    """

    low: float = 0.2
    high: float = 0.2
    beta: float = 0.0
    bias_correction: bool = True
    temperature: float = 1.0

    def _terms(
        self, logp_C: mx.array, columns: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        """Return L, ∂L/∂log π and the first three of ``METRICS``, each (C,)."""
        old_C, advantage_C, *reference = columns
        ratio_C = mx.exp(logp_C - old_C)
        low_C = (ratio_C < 1 - self.low) & (advantage_C < 0)
        high_C = (ratio_C > 1 + self.high) & (advantage_C > 0)
        clipped_C = mx.clip(ratio_C, 1 - self.low, 1 + self.high)
        loss_C = -mx.minimum(ratio_C * advantage_C, clipped_C * advantage_C)
        by_logp_C = mx.where(low_C | high_C, 0.0, -ratio_C * advantage_C)
        if not self.beta:
            return loss_C, by_logp_C, [mx.zeros_like(loss_C), low_C, high_C]
        gap_C = reference[0] - logp_C
        k3_C = mx.exp(gap_C) - gap_C - 1
        by_k3_C, kl_C = 1 - mx.exp(gap_C), k3_C
        if self.bias_correction:
            by_k3_C, kl_C = ratio_C * (k3_C + by_k3_C), ratio_C * k3_C
        return loss_C + self.beta * kl_C, by_logp_C + self.beta * by_k3_C, [kl_C, low_C, high_C]

    def _sums(
        self, loss_C: mx.array, weight_C: mx.array, more: list[mx.array], entropy_C: mx.array
    ) -> mx.array:
        counts_C = (weight_C > 0).astype(mx.float32)
        return mx.stack(
            [(weight_C * loss_C).sum(), *((counts_C * one_C).sum() for one_C in (*more, entropy_C))]
        )

    def value(self, logits_CV: mx.array, *columns: mx.array) -> mx.array:
        """Return the sums, float32 (5,); the first is differentiable."""
        targets_C, old_C, advantage_C, weight_C, *reference = columns
        scaled_CV = logits_CV.astype(mx.float32) / self.temperature
        total_C1 = logsumexp(scaled_CV)
        logp_C = (mx.take_along_axis(scaled_CV, targets_C[:, None], axis=-1) - total_C1)[:, 0]
        loss_C, by_logp_C, more = self._terms(
            mx.stop_gradient(logp_C), (old_C, advantage_C, *reference)
        )
        # Of this value and derivative; autodiff of the minimum would halve it where both are equal.
        loss_C = loss_C + by_logp_C * (logp_C - mx.stop_gradient(logp_C))
        centred_CV = mx.stop_gradient(scaled_CV - total_C1)
        entropy_C = -row_sums(exp(centred_CV) * centred_CV)[:, 0]
        return self._sums(loss_C, weight_C, more, entropy_C)

    def value_and_gradient(
        self, logits_CV: mx.array, *columns: mx.array
    ) -> tuple[mx.array, LogitsGradient]:
        """Return the same, and the gradient of the first by the logits."""
        targets_C, old_C, advantage_C, weight_C, *reference = columns
        scaled_CV = logits_CV if self.temperature == 1 else logits_CV / self.temperature
        target_C1 = mx.take_along_axis(scaled_CV, targets_C[:, None], axis=-1)
        peak_C1 = scaled_CV.max(axis=-1, keepdims=True)
        shifted_CV = scaled_CV - peak_C1
        exp_CV = exp(shifted_CV)
        total_C1 = row_sums(exp_CV)
        logp_C = (target_C1 - peak_C1 - mx.log(total_C1))[:, 0]
        entropy_C = (mx.log(total_C1) - row_sums(exp_CV * shifted_CV) / total_C1)[:, 0]
        loss_C, by_logp_C, more = self._terms(logp_C, (old_C, advantage_C, *reference))
        label_weight_C = -weight_C * by_logp_C / self.temperature
        gradient = LogitsGradient(exp_CV, total_C1, label_weight_C, targets_C, label_weight_C)
        return self._sums(loss_C, weight_C, more, entropy_C), gradient
