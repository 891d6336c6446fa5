"""Two students that learn from the rows and from each other (deep mutual learning, 1706.00384).

Invariant: L = Σ_i CE_i + λ·T²·D(other ‖ self) over both, the other's distribution held fixed: each
student's gradient is the one it would have if the other were a teacher at that moment. Nothing is
cached and no full logits exist: the other's logits are made from its hidden states, chunk by chunk.
Legend: C positions of one chunk, N supervised positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.data.batches import Batch
from mlx_slim.distillation.losses import FLOOR, Divergence, between, pull
from mlx_slim.models import structure
from mlx_slim.models.logits import logsumexp, row_sums
from mlx_slim.training.losses import NLL, Slope, chunk_size, linear_loss, weighted_sum
from mlx_slim.training.step import Arrays, batch_arrays, supervised_rows, target_weights


class Pair(nn.Module):
    """Two models as one: their parameters are ``first.*`` and ``second.*``."""

    first: nn.Module
    second: nn.Module

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks of both."""
        return [*structure.blocks(self.first), *structure.blocks(self.second)]

    def __call__(self, tokens_BT: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Return the logits of both, one beside the other (B, T, 2V)."""
        count = len(structure.blocks(self.first))
        caches = (None, None) if cache is None else (cache[:count], cache[count:])
        logits = [self.first(tokens_BT, caches[0]), self.second(tokens_BT, caches[1])]
        return mx.concatenate(logits, axis=-1)


@dataclass(frozen=True)
class FromOther:
    """The rule CE + λ·T²·D(other ‖ self); Σ CE and Σ D are reported after it.

    Columns: ``targets_C``, the other's hidden states (its logits if it does not split), and
    ``weights_C`` if not ones.

    Attributes:
        other: Their map to logits.
        divergence: ``forward`` is KL(other ‖ self).
        temperature: T.
        weight: λ.
    """

    other: Callable[[mx.array], mx.array]
    divergence: Divergence
    temperature: float
    weight: float

    def _logs(self, logits_CV: mx.array) -> mx.array:
        scaled_CV = logits_CV.astype(mx.float32) / self.temperature
        return mx.maximum(scaled_CV - logsumexp(scaled_CV), FLOOR)

    def _sums(self, nll: mx.array, apart: mx.array) -> mx.array:
        return mx.stack([nll + self.weight * self.temperature**2 * apart, nll, apart])

    def value(self, logits_CV: mx.array, *columns: mx.array) -> mx.array:
        """Return Σ loss, Σ CE and Σ D, float32 (3,), nats."""
        targets_C, rows_CX, *weights = columns
        log_p_CV = mx.stop_gradient(self._logs(self.other(rows_CX)))
        apart_C = between(log_p_CV, self._logs(logits_CV), self.divergence)
        nll = NLL().value(logits_CV, targets_C, *weights)
        return self._sums(nll, weighted_sum(apart_C, *weights))

    def slope(self, logits_CV: mx.array, *columns: mx.array) -> tuple[mx.array, Slope]:
        """Return the same, and the gradient of the loss by this student's logits."""
        targets_C, rows_CX, *weights = columns
        nll, plain = NLL().slope(logits_CV, targets_C, *weights)
        log_p_CV, log_q_CV = self._logs(self.other(rows_CX)), self._logs(logits_CV)
        apart_C = between(log_p_CV, log_q_CV, self.divergence)
        u_CV = pull(log_p_CV, log_q_CV, self.divergence)
        apart_CV = u_CV - mx.exp(log_q_CV) * row_sums(u_CV)
        share_CV = plain.share_CV / row_sums(plain.share_CV)
        share_CV = share_CV + self.weight * self.temperature * apart_CV
        slope = Slope(share_CV, None, plain.scale_C, targets_C, plain.push_C)
        return self._sums(nll, weighted_sum(apart_C, *weights)), slope


class Mutual:
    """The objective of a ``Pair``: both cross-entropies, and what each learns from the other.

    Args:
        model: The pair.
        divergence: ``forward`` is KL(other ‖ self).
        temperature: T.
        weight: λ.
        chunk: Positions whose logits exist at one time; None chooses.
        vocabulary: Token ids below this may be used for the probe.
        lanes: Parts of a batch that are computed side by side.
    """

    parts: tuple[str, ...] = ("first", "second", "divergence")

    def __init__(
        self,
        model: Pair,
        divergence: Divergence,
        temperature: float,
        weight: float,
        chunk: int | None = None,
        vocabulary: int = 8,
        lanes: int = 1,
    ) -> None:
        self._splits = [structure.split(one, vocabulary) for one in (model.first, model.second)]
        self._settings = (divergence, temperature, weight)
        self._chunk = chunk_size(vocabulary, chunk, 2 * lanes)  # logits of both exist

    def arrays(self, batch: Batch) -> Arrays:
        """Return ``batch_arrays`` and, of a padded batch, the weights of its targets."""
        return (*batch_arrays(batch), *target_weights(batch))

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ loss of both, Σ CE of each, and the mean of both Σ D, float32 (4,), nats."""
        tokens_BT, positions_N, targets_N, segments_BT, *weights = arrays
        pair = cast(Pair, model)
        rows = [
            supervised_rows(one, split, tokens_BT, positions_N, segments_BT)
            for one, split in zip((pair.first, pair.second), self._splits, strict=True)
        ]
        sums = []
        for me, other in ((0, 1), (1, 0)):
            if sums:  # one student after the other, or the chunks of both would live together
                rows[me] = mx.depends([rows[me]], [sums[0]])[0]
            rule = FromOther(self._head(other), *self._settings)
            columns = (targets_N, mx.stop_gradient(rows[other]), *weights)
            split = self._splits[me]
            if split is None:
                sums.append(rule.value(rows[me], *columns))
                continue
            found = linear_loss(
                rows[me], split.head, rule, columns, chunk=self._chunk, gradient=gradient
            )
            sums.append(found)
        first, second = sums
        apart = 0.5 * (first[2] + second[2])
        return mx.stack([first[0] + second[0], first[1], second[1], apart])

    def _head(self, number: int) -> Callable[[mx.array], mx.array]:
        split = self._splits[number]
        return (lambda logits: logits) if split is None else split.head


class BothHeldOut(Mutual):
    """The mean cross-entropy of both on held-out rows; each one's, and D, beside it."""

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return the mean Σ CE, Σ CE of each, and the mean of both Σ D, float32 (4,), nats."""
        _, first, second, apart = super().__call__(model, arrays, gradient=gradient)
        return mx.stack([0.5 * (first + second), first, second, apart])
