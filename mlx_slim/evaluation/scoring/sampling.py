"""Sampled answers: every answer draws from a random stream of its own.

Invariant: a token is a function of the distribution it is drawn from and of one number, the next
of the answer's stream, which follows from the answer's key alone. So an answer is the same in any
batch, after any kill and on any device, up to the rounding of float sums. Drawing inverts the
cumulative distribution: one exponential a logit, no random numbers on the device. Try it:
``python -m pytest tests/evaluation/scoring/test_sampling.py``.
Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_slim.models.activations import exp
from mlx_slim.models.logits import row_sums


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are drawn.

    Attributes:
        temperature: Above 0; logits are divided by it.
        top_p: Mass of the likeliest tokens that are drawn from, at that temperature; 1 is all.
    """

    temperature: float = 1.0
    top_p: float = 1.0


class AnswerSampler:
    """Draws the tokens of one answer (mlx-lm's batches call it once a token).

    Args:
        sampling: How.
        key: Decides the draws: (seed, round, row, number of the answer within the row).
        log_probs: Whether ``log_probs`` is filled.

    Attributes:
        log_probs: log p of each drawn token at the temperature, before ``top_p`` (what a trainer
            computes for it), float32 (1,) each, nats.
    """

    def __init__(self, sampling: Sampling, key: Sequence[int], *, log_probs: bool = False) -> None:
        self._sampling = sampling
        self._stream = np.random.default_rng(list(key))
        self._keep = log_probs
        self.log_probs: list[mx.array] = []

    def __call__(self, logits_1V: mx.array) -> mx.array:
        """Return the next token (1,) of float32 logits, normalized or not."""
        scaled_1V = logits_1V.astype(mx.float32) / self._sampling.temperature
        scaled_1V = scaled_1V - scaled_1V.max(axis=-1, keepdims=True)
        probs_1V = exp(scaled_1V)
        uniform = mx.array(self._stream.random(dtype=np.float32))
        token_1 = draw(nucleus(probs_1V, self._sampling.top_p), uniform)
        if self._keep:
            log_p_11 = mx.take_along_axis(scaled_1V, token_1[:, None], axis=-1)
            log_p_1 = (log_p_11 - mx.log(row_sums(probs_1V)))[:, 0]
            mx.async_eval(token_1, log_p_1)  # else it keeps a row of probabilities alive
            self.log_probs.append(log_p_1)
        return token_1


def draw(probs_1V: mx.array, uniform: mx.array) -> mx.array:
    """Return the token (1,) at ``uniform`` in [0, 1) of the cumulative distribution.

    A token of probability 0 is never drawn: sums of a parallel scan may differ in the last digit
    where nothing is added.

    >>> probs_1V = mx.array([[0.0, 1.0, 2.0, 1.0]])  # need not sum to 1
    >>> [draw(probs_1V, mx.array(u)).item() for u in (0.0, 0.24, 0.25, 0.74, 0.75)]
    [1, 1, 2, 2, 3]
    """
    cumulative_1V = mx.cumsum(probs_1V, axis=-1)
    above_1V = (cumulative_1V > uniform * cumulative_1V[:, -1:]) & (probs_1V > 0)
    return mx.argmax(above_1V, axis=-1)


def nucleus(probs_1V: mx.array, top_p: float) -> mx.array:
    """Return the probabilities with those outside the nucleus set to 0 (arXiv 1904.09751).

    Kept are the likeliest tokens up to the one that reaches the mass ``top_p``, and its equals.

    >>> nucleus(mx.array([[0.2, 0.5, 0.3]]), 0.6).tolist() == mx.array([[0, 0.5, 0.3]]).tolist()
    True
    """
    if top_p >= 1:
        return probs_1V
    sorted_1V = mx.sort(probs_1V, axis=-1)
    up_to_1V = mx.cumsum(sorted_1V, axis=-1)
    total_11 = up_to_1V[:, -1:]
    dropped_11 = (total_11 - up_to_1V >= top_p * total_11).sum(axis=-1, keepdims=True)
    least_11 = mx.take_along_axis(sorted_1V, dropped_11, axis=-1)
    return mx.where(probs_1V < least_11, 0.0, probs_1V)
