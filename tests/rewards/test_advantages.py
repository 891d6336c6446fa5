"""Advantages of groups: by hand, against TRL's formula, and of groups that score alike."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_slim.rewards.advantages import advantages, alike, divisors, token_weights


def test_by_hand() -> None:
    rewards = np.array([0.0, 1.0, 1.0, 2.0, 0.1, 0.1, 0.1, 0.1])
    spread = np.sqrt(2 / 3)  # of 0, 1, 1, 2 with Bessel's correction
    expected = [*(np.array([-1, 0, 0, 1]) / (spread + 1e-4)), 0, 0, 0, 0]
    assert advantages(rewards, 4, divide=True).tolist() == pytest.approx(expected)
    assert advantages(rewards, 4, divide=False).tolist() == [-1, 0, 0, 1, 0, 0, 0, 0]
    assert alike(rewards, 4).tolist() == [False, True]


def test_a_group_does_not_depend_on_the_others() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=12)
    whole = advantages(rewards, 4, divide=True)
    for start in (0, 4, 8):
        alone = advantages(rewards[start : start + 4], 4, divide=True)
        assert (alone == whole[start : start + 4]).all()


def test_weights_and_shares() -> None:
    tokens = np.array([2, 8])
    assert token_weights("grpo", tokens).tolist() == [0.5, 0.125]
    assert token_weights("bnpo", tokens).tolist() == [1.0, 1.0]
    tokens, learned = np.array([2, 8, 16]), np.array([True, True, False])
    assert divisors("grpo", tokens, learned, 16).tolist() == [1.0, 1.0, 1.0]
    assert divisors("bnpo", tokens, learned, 16).tolist() == [2.0, 8.0, 0.0]
    assert divisors("dr_grpo", tokens, learned, 16).tolist() == [16.0, 16.0, 16.0]
    assert divisors("dapo", tokens, learned, 16).tolist() == pytest.approx([10 / 3] * 3)
