"""Advantages of answers from their rewards, and how the four losses weigh tokens and steps.

Invariant: an advantage depends on the rewards of its group alone. A step's loss is
Σ w·L / Σ d over all its micro-batches, with one d an answer, never a mean of means: the
same answers in other micro-batches give the same loss. Over a step with N tokens in R answers of
n_i tokens, and a round of N' tokens in R' answers, w and Σ d are

    grpo      1/n_i   R                    the mean over answers of each answer's mean
    bnpo      1       N                    the mean over tokens
    dr_grpo   1       R·max_tokens         a length that no answer changes (arXiv 2503.20783)
    dapo      1       N'·R/R'              the mean over tokens of the round (arXiv 2503.14476)

Answers that are masked count in R and R', not in N and N'. Legend: A answers of a round. Try it:
``mlx-slim train smollm2-grpo -o runs/grpo``.
"""

from __future__ import annotations

import numpy as np

from mlx_slim.config.reward import LossType

_EPSILON = 1e-4  # beside the standard deviation, as in TRL


def alike(rewards_A: np.ndarray, group_size: int) -> np.ndarray:
    """Return, for each group of neighbouring answers, whether all its rewards are the same."""
    groups = rewards_A.reshape(-1, group_size)
    return (groups == groups[:, :1]).all(axis=1)


def spread(rewards_A: np.ndarray, group_size: int) -> np.ndarray:
    """Return the standard deviation of each group, with Bessel's correction, float64 (groups,)."""
    return rewards_A.astype(np.float64).reshape(-1, group_size).std(axis=1, ddof=1)


def advantages(rewards_A: np.ndarray, group_size: int, *, divide: bool) -> np.ndarray:
    """Return the advantage of every answer, float32 (A,).

    Args:
        rewards_A: Finite rewards; the answers to a question are neighbours.
        group_size: Answers to a question.
        divide: Whether by the standard deviation of the group (with Bessel's correction) + 1e-4.
    """
    groups = rewards_A.astype(np.float64).reshape(-1, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    centred[alike(rewards_A, group_size)] = 0.0  # not the rounding of a mean
    if divide:
        centred /= spread(rewards_A, group_size)[:, None] + _EPSILON
    return centred.reshape(-1).astype(np.float32)


def token_weights(loss_type: LossType, tokens_A: np.ndarray) -> np.ndarray:
    """Return the weight w of the tokens of each answer, float32 (A,), from their numbers."""
    if loss_type == "grpo":
        return (1.0 / np.maximum(tokens_A, 1)).astype(np.float32)
    return np.ones(len(tokens_A), np.float32)


def divisors(
    loss_type: LossType, tokens_A: np.ndarray, learned_A: np.ndarray, max_tokens: int
) -> np.ndarray:
    """Return what each answer adds to the divisor of its step, float64 (A,).

    Args:
        loss_type: Of the four.
        tokens_A: Tokens of each answer.
        learned_A: Whether an answer is learned from; the others are masked.
        max_tokens: Longest answer.
    """
    counted_A = (tokens_A * learned_A).astype(np.float64)
    if loss_type == "bnpo":
        return counted_A
    each = {"grpo": 1.0, "dr_grpo": float(max_tokens), "dapo": counted_A.sum() / len(counted_A)}
    return np.full(len(counted_A), each[loss_type])
