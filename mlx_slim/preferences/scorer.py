"""The log-probability of each row's answer under a model, without gradients.

Invariant: the sums are those of ``PreferenceObjective`` for the same rows, up to rounding; logits
exist for one chunk of positions at a time. The reference is scored with it before the first step,
and KTO's estimate of the divergence in every step. Legend: R rows, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim import blas
from mlx_slim.data.batches import Batch, RowStore, collate, first_targets
from mlx_slim.models import structure
from mlx_slim.models.logits import token_nll
from mlx_slim.runtime import run_in_threads
from mlx_slim.training.chunk_size import chunk_size
from mlx_slim.training.log_probs import target_log_probs
from mlx_slim.training.step import batch_arrays, part_count, supervised_rows


class RowScorer:
    """Scores rows of one store.

    Args:
        rows: The store.
        model: Decides once whether it splits into body and head.
        chunk, vocabulary, num_threads: As ``CrossEntropy``.
    """

    def __init__(
        self, rows: RowStore, model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
    ) -> None:
        self.rows = rows
        self._firsts = first_targets(rows)
        self._split = structure.split(model, vocabulary)
        head = self._split.head.vocabulary if self._split else vocabulary
        self._chunk = chunk_size(head, chunk, num_threads)
        self._num_threads = num_threads

    def __call__(self, model: nn.Module, numbers: Sequence[int]) -> np.ndarray:
        """Return Σ log-probability of the answers of the rows ``numbers``, float32, nats."""
        groups = [[number] for number in numbers]
        batch = collate(self.rows, groups, firsts=self._firsts, isolate=False)
        shards = batch.shards(part_count(self._num_threads, batch.computed_tokens))
        if len(shards) == 1:
            scored = [self._shard(model, batch)]
        else:
            mx.eval(model.parameters())  # a thread cannot evaluate what another one began
            work = [(model, shard) for shard in shards]
            with blas.single_threaded():
                scored = run_in_threads(self._shard, work, self._num_threads)
        return np.concatenate(scored)

    def _shard(self, model: nn.Module, batch: Batch) -> np.ndarray:
        tokens_BT, positions_N, targets_N, segments_BT = batch_arrays(batch)
        rows = supervised_rows(model, self._split, tokens_BT, positions_N, segments_BT)
        if self._split is None:
            log_probs_N = -token_nll(rows, targets_N)
        else:
            head = self._split.head
            log_probs_N = target_log_probs(rows, head, targets_N, chunk=self._chunk, gradient=False)
        row_N = batch.positions_N // batch.tokens_BT.shape[1]
        count = batch.tokens_BT.shape[0]
        sums_R = np.bincount(row_N, weights=np.array(log_probs_N), minlength=count)
        return sums_R.astype(np.float32)
