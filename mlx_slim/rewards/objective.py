"""The objective of a policy that learns from the answers of a round.

Invariant: the loop, the step and the batches are those of fine-tuning; only the token loss, the
columns that it reads and the divisors of a step differ. Validation rows are measured by
cross-entropy. Legend: as ``training/step.py``; S drawn tokens of a round, in the order of its rows.
Try it: ``mlx-slim train smollm2-grpo -o runs/grpo``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.config.reward import LossType
from mlx_slim.data.batches import Batch
from mlx_slim.rewards.advantages import divisors, token_weights
from mlx_slim.rewards.losses import METRICS, PolicyLoss
from mlx_slim.training.cross_entropy import CrossEntropy, batch_arrays
from mlx_slim.training.objective import Arrays


@dataclass(frozen=True)
class PolicyColumns:
    """What is known of every drawn token of a round.

    Attributes:
        old_S: Its log-probability when it was drawn, float32.
        advantage_S: Of its answer, float32.
        weight_S: In the loss, float32; 0 in an answer that is masked.
        divisor_S: What it adds to the divisor of its step, float64.
        reference_S: Its log-probability under the reference, float32; None without one.
    """

    old_S: np.ndarray
    advantage_S: np.ndarray
    weight_S: np.ndarray
    divisor_S: np.ndarray
    reference_S: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        loss_type: LossType,
        max_tokens: int,
        tokens_A: np.ndarray,
        learned_A: np.ndarray,
        advantage_A: np.ndarray,
        old_S: np.ndarray,
        reference_S: np.ndarray | None = None,
    ) -> PolicyColumns:
        """Return the columns of the answers of a round.

        Args:
            loss_type: How tokens and answers weigh.
            max_tokens: Longest answer.
            tokens_A: Tokens of each answer, above 0.
            learned_A: Whether it is learned from; the others are masked.
            advantage_A: Of each.
            old_S: Log-probability of each token when it was drawn, answer after answer.
            reference_S: Under the reference.
        """
        divisor_A = divisors(loss_type, tokens_A, learned_A, max_tokens) / tokens_A
        weight_A = token_weights(loss_type, tokens_A) * learned_A
        return cls(
            old_S.astype(np.float32),
            np.repeat(advantage_A.astype(np.float32), tokens_A),
            np.repeat(weight_A, tokens_A),
            np.repeat(divisor_A, tokens_A),
            None if reference_S is None else reference_S.astype(np.float32),
        )


class PolicyObjective(CrossEntropy):
    """Σ w·L of drawn tokens.

    Args:
        token_loss: The clipped loss.
        columns: Returns those of the round that batches are of.
        model, chunk, vocabulary, num_threads: As ``CrossEntropy``.
    """

    metrics: tuple[str, ...] = METRICS

    def __init__(
        self,
        token_loss: PolicyLoss,
        columns: Callable[[], PolicyColumns],
        model: nn.Module,
        chunk: int | None = None,
        vocabulary: int = 8,
        num_threads: int = 1,
    ) -> None:
        super().__init__(model, chunk, vocabulary, num_threads)
        self.token_loss = token_loss
        self._columns = columns
        self._scale, self._empty = np.ones(1 + len(self.metrics), np.float32), False

    def weight(self, batch: Batch) -> float:
        """Return what the answers of ``batch`` add to the divisor of its step."""
        if self._empty:
            return float(batch.rows)
        return self._sums(batch)[0]

    def _sums(self, batch: Batch) -> tuple[float, float]:
        """Return Σ d, and how many tokens are not masked."""
        columns, real_N = self._columns(), batch.sources_N[batch.sources_N >= 0]
        if not len(real_N):  # a batch for measuring
            return 1.0, 1.0
        tokens = np.count_nonzero(columns.weight_S[real_N])
        return float(columns.divisor_S[real_N].sum()), float(tokens)

    def begin_step(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Find what makes means over tokens of metrics that are divided as the loss is."""
        totals = np.array([self._sums(batch) for batch in batches]).reshape(-1, 2).sum(axis=0)
        divisor, tokens = map(float, totals)
        self._empty = divisor == 0  # all answers are masked: the loss is 0
        per_token = divisor / tokens if tokens else 1.0
        self._scale = np.array([1.0, *[per_token] * len(self.metrics)], np.float32)

    def arrays(self, batch: Batch) -> Arrays:
        """Return ``batch_arrays``, old log-probabilities, advantages, weights, reference, scale.

        Padded targets, and those of a batch for measuring, have the weight 0 and 1.
        """
        columns, sources_N = self._columns(), batch.sources_N

        def of(column_S: np.ndarray, other: float = 0.0) -> mx.array:
            if not len(column_S):  # a batch for measuring, before the first round
                return mx.full(sources_N.shape, other)
            return mx.array(np.where(sources_N < 0, other, column_S[sources_N]).astype(np.float32))

        weight_N = of(columns.weight_S, 1.0)
        if batch.weights_N is not None:
            weight_N = weight_N * mx.array((batch.weights_N > 0).astype(np.float32))
        reference = [] if columns.reference_S is None else [of(columns.reference_S)]
        policy = of(columns.old_S), of(columns.advantage_S)
        return (*batch_arrays(batch), *policy, weight_N, *reference, mx.array(self._scale))

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ w·L, and after it Σ of each metric, scaled to be divided as the loss is."""
        *others, scale = arrays
        return scale * super().__call__(model, tuple(others), gradient=gradient)
