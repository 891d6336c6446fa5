"""Next-token cross-entropy of a batch, and what every other loss of tokens reads from a batch.

Invariant: head rows exist only where tokens are supervised, and never all logits at one time.
Try it: ``python -m pytest tests/training/test_step.py``.
Legend: B sequences, T positions, N supervised positions, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.data.batches import Batch
from mlx_slim.models import structure
from mlx_slim.models.quantized import dequantize_weight
from mlx_slim.runtime import on_gpu
from mlx_slim.training import host_loss
from mlx_slim.training.chunk_size import chunk_size
from mlx_slim.training.losses import NLL, TokenLoss, linear_loss
from mlx_slim.training.objective import Arrays


class CrossEntropy:
    """Next-token cross-entropy, with head rows only where tokens are supervised.

    Args:
        model: Decides once whether it splits into body and head.
        chunk: Positions whose logits exist at one time; None chooses.
        vocabulary: Token ids below this may be used for the probe.
        num_threads: Threads that compute chunks of a batch, with ``chunk`` positions in total.
        weights_S: float32 weight of each target, by its number in the store (``Batch.sources_N``);
            None is 1 for all.
    """

    metrics: tuple[str, ...] = ()
    token_loss: TokenLoss = NLL()

    def __init__(
        self,
        model: nn.Module,
        chunk: int | None = None,
        vocabulary: int = 8,
        num_threads: int = 1,
        weights_S: np.ndarray | None = None,
    ) -> None:
        self.split = structure.split(model, vocabulary)
        head = self.split.head.vocabulary if self.split else vocabulary
        self._chunk = chunk_size(head, chunk, num_threads)
        self._weights_S = weights_S
        self._dense_VD: mx.array | None = None

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Inside, all shards of a batch use one dense copy of a quantized head (on a CPU)."""
        module = self.split.head.module if self.split else None
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)) and not on_gpu():
            self._dense_VD = dequantize_weight(module)
            mx.eval(self._dense_VD)
        try:
            yield
        finally:
            self._dense_VD = None

    def arrays(self, batch: Batch) -> Arrays:
        """Return ``batch_arrays`` and, where targets have weights, these."""
        return (*batch_arrays(batch), *target_weights(batch, self._weights_S))

    def weight(self, batch: Batch) -> float:
        """Return the sum of the targets' loss weights: their number where these are 1."""
        return batch.total_weight

    def begin_step(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Do nothing: a token's loss needs no other token."""

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return Σ loss of the targets, float32, nats."""
        tokens_BT, positions_N, targets_N, segments_BT, *rest = arrays
        rows = supervised_rows(model, self.split, tokens_BT, positions_N, segments_BT)
        return self.head_loss(rows, (targets_N, *rest), gradient=gradient)

    def rows_gradient(self, rows_ND: mx.array, arrays: Arrays) -> tuple[mx.array, mx.array] | None:
        """Return the loss of evaluated ``supervised_rows`` and its gradient by them, evaluated.

        On a CPU, with NumPy's exponentials; None where the head is trained, or the loss is another.
        """
        if type(self).__call__ is not CrossEntropy.__call__ or self.split is None:
            return None
        _, _, targets_N, _, *rest = arrays
        return self.rows_loss_gradient(rows_ND, (targets_N, *rest), self.token_loss)

    def rows_loss_gradient(
        self, rows_ND: mx.array, columns: tuple[mx.array, ...], token_loss: TokenLoss
    ) -> tuple[mx.array, mx.array] | None:
        """Return ``host_loss.rows_gradient`` of this head."""
        assert self.split is not None
        return host_loss.rows_gradient(
            rows_ND,
            self.split.head,
            token_loss,
            columns,
            chunk=self._chunk,
            dense_VD=self._dense_VD,
        )

    def head_loss(
        self,
        rows: mx.array,
        columns: tuple[mx.array, ...],
        *,
        gradient: bool,
        token_loss: TokenLoss | None = None,
    ) -> mx.array:
        """Return Σ loss of what ``supervised_rows`` returns, float32, nats.

        ``token_loss`` replaces the objective's own.
        """
        token_loss = token_loss or self.token_loss
        if self.split is None:
            return token_loss.value(rows, *columns)
        return linear_loss(
            rows,
            self.split.head,
            token_loss,
            columns,
            chunk=self._chunk,
            gradient=gradient,
            dense_VD=self._dense_VD,
        )


def supervised_rows(
    model: nn.Module,
    split: structure.Split | None,
    tokens_BT: mx.array,
    positions_N: mx.array,
    segments_BT: mx.array | None,
) -> mx.array:
    """Return the hidden states (N, D) of a batch's supervised positions, before the head.

    Of a model that does not split: its logits (N, V) there.
    """
    cache = None
    if segments_BT is not None:
        cache = structure.segment_caches(model, segments_BT)
    rows_BTX = (split.body if split else model)(tokens_BT, cache=cache)
    return rows_BTX.reshape(-1, rows_BTX.shape[-1])[positions_N]


def batch_arrays(batch: Batch) -> Arrays:
    """Return tokens_BT, positions_N, targets_N and segments_BT (or None) as mlx arrays."""
    segments = None if batch.segments_BT is None else mx.array(batch.segments_BT)
    return (
        mx.array(batch.tokens_BT),
        mx.array(batch.positions_N),
        mx.array(batch.targets_N),
        segments,
    )


def target_weights(batch: Batch, weights_S: np.ndarray | None = None) -> list[mx.array]:
    """Return the weights of a batch's targets (N,), float32, if they are not all 1: 0 for padding.

    Args:
        batch: The batch.
        weights_S: Weight of each target, by its number in the store; None is 1 for all.
    """
    weights_N = batch.weights_N
    if weights_S is not None:
        loss_weights_N = weights_S[batch.sources_N].astype(np.float32)
        weights_N = loss_weights_N if weights_N is None else loss_weights_N * weights_N
    return [] if weights_N is None else [mx.array(weights_N)]
