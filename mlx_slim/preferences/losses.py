"""Losses of preferred and other answers, from their summed log-probabilities.

Invariant: each is TRL 1.16's, value and gradient (``tests/parity/test_preferences.py``), and a sum
over pairs or rows needs nothing but the arguments. With h the log-probability of an
answer minus the reference's, n its tokens, m its mean log-probability, w the chosen and l the
rejected answer, Δ = h_w − h_l::

    sigmoid  −(1−ε) log σ(βΔ) − ε log σ(−βΔ)               (DPO, arXiv 2305.18290; ε > 0: cDPO)
    robust   the same with +ε, divided by 1 − 2ε           (arXiv 2403.00409)
    ipo      (h_w/n_w − h_l/n_l − 1/(2β))²                 (arXiv 2310.12036)
    simpo    sigmoid of β(m_w − m_l) − γ                   (arXiv 2405.14734)
    orpo     −β log σ(log odds_w − log odds_l), odds = p/(1−p), p = exp m (arXiv 2403.07691)
    kto      w_D (1 − σ(β(h − z))) of a wanted answer, w_U (1 − σ(β(z − h))) of another one
                                                           (arXiv 2402.01306)

Legend: U pairs, R rows. Try it: ``mlx-slim train smollm2-dpo preference.loss=ipo -o runs/ipo``.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.config.preference import PreferenceConfig


@dataclass(frozen=True)
class AnswerPairs:
    """Both answers of each pair, chosen and rejected; float32 (U, 2).

    Attributes:
        log_probs: Σ log-probability of the answer's tokens, nats.
        tokens: How many these are, at least 1.
        reference: The same sum under the reference; None where the loss has none.
    """

    log_probs: mx.array
    tokens: mx.array
    reference: mx.array | None = None

    @property
    def means(self) -> mx.array:
        """Mean log-probability of a token."""
        return self.log_probs / self.tokens

    @property
    def ratios(self) -> mx.array:
        """Log-ratio of policy and reference."""
        assert self.reference is not None
        return self.log_probs - self.reference


def smoothed(logits_U: mx.array, smoothing: float, *, robust: bool = False) -> mx.array:
    """Return the logistic loss of ``logits_U`` (U,) where a share ``smoothing`` is mislabelled."""
    clean_U = -nn.log_sigmoid(logits_U)
    if not smoothing:
        return clean_U
    flipped_U = -nn.log_sigmoid(-logits_U)
    if robust:
        return ((1 - smoothing) * clean_U - smoothing * flipped_U) / (1 - 2 * smoothing)
    return (1 - smoothing) * clean_U + smoothing * flipped_U


def log_one_minus_exp(x: mx.array) -> mx.array:
    """Return log(1 − exp x) of x < 0, exact near 0 and far from it."""
    near = x > -0.6931472
    small, large = mx.where(near, x, -1.0), mx.where(near, -1.0, x)  # no branch is infinite
    return mx.where(near, mx.log(-mx.expm1(small)), mx.log1p(-mx.exp(large)))


def pair_losses(config: PreferenceConfig, answers: AnswerPairs) -> mx.array:
    """Return the loss of each pair, float32 (U,); ORPO's without its NLL."""
    beta = config.beta
    if config.loss == "ipo":
        means = answers.ratios / answers.tokens
        return mx.square(means[:, 0] - means[:, 1] - 1 / (2 * beta))
    if config.loss == "simpo":
        means = answers.means
        logits = beta * (means[:, 0] - means[:, 1]) - config.simpo_gamma
        return smoothed(logits, config.label_smoothing)
    if config.loss == "orpo":
        means = mx.minimum(answers.means, -1e-7)  # an answer of probability 1 has infinite odds
        log_odds = means - log_one_minus_exp(means)
        return -beta * nn.log_sigmoid(log_odds[:, 0] - log_odds[:, 1])
    ratios = answers.ratios
    logits = beta * (ratios[:, 0] - ratios[:, 1])
    return smoothed(logits, config.label_smoothing, robust=config.loss == "robust")


def pair_rewards(config: PreferenceConfig, answers: AnswerPairs) -> mx.array:
    """Return the implicit reward of both answers, (U, 2): β times log-ratio or mean."""
    return config.beta * (answers.ratios if config.has_reference else answers.means)


def kto_losses(
    config: PreferenceConfig, ratios_R: mx.array, desirable_R: mx.array, kl: mx.array
) -> mx.array:
    """Return the loss of each row (R,).

    Args:
        config: β and both weights.
        ratios_R: Log-ratio of each answer.
        desirable_R: Whether it is wanted, bool.
        kl: z, a scalar.
    """
    margins_R = config.beta * (ratios_R - kl)
    desirable_loss_R = config.desirable_weight * (1 - mx.sigmoid(margins_R))
    other_loss_R = config.undesirable_weight * (1 - mx.sigmoid(-margins_R))
    return mx.where(desirable_R, desirable_loss_R, other_loss_R)
