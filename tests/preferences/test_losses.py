"""The losses at values that are known; TRL's own values: parity/test_preferences.py."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from mlx_slim.config.preference import PreferenceConfig
from mlx_slim.preferences.losses import (
    AnswerPairs,
    kto_losses,
    log_one_minus_exp,
    pair_losses,
    pair_rewards,
)

ANSWERS = AnswerPairs(
    log_probs=mx.array([[-4.0, -9.0], [-5.0, -5.0]]),
    tokens=mx.array([[2.0, 3.0], [5.0, 1.0]]),
    reference=mx.array([[-5.0, -7.0], [-5.0, -5.0]]),
)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_of_a_pair_and_of_one_without_a_margin() -> None:
    losses = pair_losses(PreferenceConfig(beta=0.5), ANSWERS).tolist()
    assert losses == pytest.approx([-math.log(_sigmoid(0.5 * 3)), math.log(2)])
    rewards = pair_rewards(PreferenceConfig(beta=0.5), ANSWERS).tolist()
    assert rewards == [[0.5, -1.0], [0.0, 0.0]]


def test_smoothing_mixes_the_wrong_way_round_in_and_robust_takes_it_out() -> None:
    right, wrong = -math.log(_sigmoid(1.5)), -math.log(_sigmoid(-1.5))
    smooth = PreferenceConfig(beta=0.5, label_smoothing=0.1)
    assert pair_losses(smooth, ANSWERS)[0].item() == pytest.approx(0.9 * right + 0.1 * wrong)
    robust = PreferenceConfig(loss="robust", beta=0.5, label_smoothing=0.1)
    expected = (0.9 * right - 0.1 * wrong) / 0.8
    assert pair_losses(robust, ANSWERS)[0].item() == pytest.approx(expected)


def test_ipo_compares_means_of_ratios() -> None:
    losses = pair_losses(PreferenceConfig(loss="ipo", beta=0.5), ANSWERS).tolist()
    assert losses == pytest.approx([(1 / 2 + 2 / 3 - 1) ** 2, 1.0])


def test_simpo_and_orpo_compare_means_without_a_reference() -> None:
    answers = AnswerPairs(ANSWERS.log_probs, ANSWERS.tokens)
    simpo = PreferenceConfig(loss="simpo", beta=2, simpo_gamma=0.5)
    assert pair_losses(simpo, answers)[0].item() == pytest.approx(-math.log(_sigmoid(2 - 0.5)))
    orpo = PreferenceConfig(loss="orpo", beta=0.2)
    odds = [math.exp(-m) for m in (2, 3)]
    ratio = math.log(odds[0] / (1 - odds[0])) - math.log(odds[1] / (1 - odds[1]))
    assert pair_losses(orpo, answers)[0].item() == pytest.approx(-0.2 * math.log(_sigmoid(ratio)))


def test_an_answer_that_is_certain_has_a_finite_loss_and_gradient() -> None:
    config = PreferenceConfig(loss="orpo")
    tokens = mx.ones((1, 2))

    def loss(log_probs: mx.array) -> mx.array:
        return pair_losses(config, AnswerPairs(log_probs, tokens)).sum()

    value, gradient = mx.value_and_grad(loss)(mx.array([[0.0, -80.0]]))
    assert mx.isfinite(value).item()
    assert mx.isfinite(gradient).all().item()
    values = [-1e-6, -0.5, -0.7, -50.0]
    assert log_one_minus_exp(mx.array(values)).tolist() == pytest.approx(
        [math.log(-math.expm1(x)) for x in values], rel=1e-5, abs=1e-20
    )


def test_kto_is_half_where_an_answer_is_as_likely_as_the_divergence_says() -> None:
    config = PreferenceConfig(loss="kto", beta=0.5, desirable_weight=2, undesirable_weight=3)
    ratios, desirable = mx.array([1.0, 1.0, 5.0, 5.0]), mx.array([True, False, True, False])
    losses = kto_losses(config, ratios, desirable, mx.array(1.0)).tolist()
    high = _sigmoid(2.0)
    assert losses == pytest.approx([1.0, 1.5, 2 * (1 - high), 3 * high])
