"""The log-probability of each row's answer under a model, without gradients.

Invariant: the sums are those of ``PreferenceObjective`` for the same rows, up to rounding; logits
exist for one chunk of positions at a time. The reference is scored with it before the first step,
and KTO's estimate of the divergence in every step. Legend: R rows, N supervised positions.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim import blas
from mlx_slim.data.batches import Batch, RowStore, collate, first_targets
from mlx_slim.data.shared import cheapest
from mlx_slim.models import structure
from mlx_slim.models.logits import token_nll
from mlx_slim.models.prefix_attention import prefix_attention
from mlx_slim.threads import run_in_threads
from mlx_slim.training.chunk_size import chunk_size, part_count
from mlx_slim.training.cross_entropy import batch_arrays, supervised_rows
from mlx_slim.training.log_probs import target_log_probs


class RowScorer:
    """Scores rows of one store.

    Args:
        rows: The store.
        model: Decides once whether it splits into body and head.
        chunk, vocabulary, num_threads: As ``CrossEntropy``.
        prefix_sharing: Whether rows share what they begin with where that is quicker.
    """

    def __init__(
        self,
        rows: RowStore,
        model: nn.Module,
        chunk: int | None,
        vocabulary: int,
        num_threads: int,
        *,
        prefix_sharing: bool = False,
    ) -> None:
        self.rows = rows
        self._firsts = first_targets(rows)
        self._split = structure.split(model, vocabulary)
        head = self._split.head.vocabulary if self._split else vocabulary
        self._chunk = chunk_size(head, chunk, num_threads)
        self._num_threads = num_threads
        self._prefix_sharing = prefix_sharing
        self._building = threading.Lock()

    def __call__(self, model: nn.Module, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return Σ log-probability of the answers of the rows ``numbers``, float32, nats."""
        numbers = np.asarray(numbers)
        groups = [[int(number)] for number in numbers]
        batch = collate(self.rows, groups, firsts=self._firsts, isolate=False)
        shards = batch.shards(part_count(self._num_threads, batch.computed_tokens))
        if self._prefix_sharing:
            shards = cheapest(batch, shards, self._num_threads)
        if len(shards) == 1:
            scored = [self._shard(model, shards[0])]
        else:
            mx.eval(model.parameters())  # a thread cannot evaluate what another one began
            work = [(model, shard) for shard in shards]
            with blas.single_threaded():
                scored = run_in_threads(self._shard, work, self._num_threads)
        sources_N = np.concatenate([shard.sources_N for shard in shards])
        row_N = np.searchsorted(self._firsts, sources_N, side="right") - 1
        order = np.argsort(numbers)
        place_N = order[np.searchsorted(numbers[order], row_N)]
        sums = np.bincount(place_N, weights=np.concatenate(scored), minlength=len(numbers))
        return sums.astype(np.float32)

    def _shard(self, model: nn.Module, batch: Batch) -> np.ndarray:
        """Return the log-probability of each target, float32 (N,)."""
        tokens_BT, positions_N, targets_N, segments_BT = batch_arrays(batch)
        # One thread at a time: it changes how all of them attend.
        with self._building, prefix_attention(batch.nodes):
            rows = supervised_rows(model, self._split, tokens_BT, positions_N, segments_BT)
        if self._split is None:
            return np.array(-token_nll(rows, targets_N))
        settings = {"chunk": self._chunk, "gradient": False}
        return np.array(target_log_probs(rows, self._split.head, targets_N, **settings))
