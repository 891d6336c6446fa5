"""The targets of a teacher with another tokenizer: distributions, merged over groups of tokens.

Invariant: a group's stored distribution is that of its base position times the probabilities of its
other tokens, each at least ``SMALLEST``; the stored logarithms descend. Computed a batch of the
teacher's rows at a time, a chunk of logits at a time. Legend: N positions of a batch, G groups that
have their base there, K stored tokens, V the teacher's vocabulary. Try it:
``mlx-slim distill distill-smollm2 distill.method=uld "distill.teachers=[{model: OTHER}]" -o run``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim import blas
from mlx_slim.data.batches import Batch, Batcher
from mlx_slim.data.plans import Plan
from mlx_slim.distillation.losses import FLOOR, top
from mlx_slim.distillation.target_cache import TargetLayout, TeacherTargets
from mlx_slim.distillation.uld_loss import SMALLEST
from mlx_slim.distillation.uld_objective import scaling_arrays
from mlx_slim.models import structure
from mlx_slim.models.host_exponentials import host_exponentials
from mlx_slim.models.logits import logsumexp
from mlx_slim.threads import run_in_threads
from mlx_slim.training.chunk_size import chunk_size, part_count
from mlx_slim.training.cross_entropy import batch_arrays, supervised_rows

_NOTHING = -1e30  # logit of a token that is left out of a sum


@dataclass(frozen=True)
class MergedBatch:
    """A batch of a teacher's rows.

    Attributes:
        batch: The rows.
        sources_N: Number of each group that has its base here, int64 (G,).
        base_G: The position of that base among the batch's.
        pairs_N2: The group of each position, and the token that scales it, or −1 for a base.
    """

    batch: Batch
    sources_N: np.ndarray
    base_G: np.ndarray
    pairs_N2: np.ndarray


class MergedBatches:
    """Batches of a teacher's rows, their targets numbered by group.

    Args:
        batcher: Over the teacher's rows.
        pairs_U2: ``Alignment.teacher_U2``.
    """

    def __init__(self, batcher: Batcher, pairs_U2: np.ndarray) -> None:
        self._batcher, self._pairs_U2 = batcher, pairs_U2

    def plan(self, epoch: int) -> Plan:
        """Return the batches of an epoch, as row numbers."""
        return self._batcher.plan(epoch)

    def batch(self, groups: Sequence[Sequence[int]]) -> MergedBatch:
        """Build one batch."""
        batch = self._batcher.batch(groups)
        pairs_N2 = self._pairs_U2[batch.sources_N]
        base_G = np.flatnonzero(pairs_N2[:, 1] < 0)
        return MergedBatch(batch, pairs_N2[base_G, 0], base_G, pairs_N2)


class ULDTargetGenerator:
    """Computes the merged targets of a loaded teacher.

    Args:
        model: In evaluation mode.
        shape: Of the cache; with ``matched_V`` it has one entry and one token more.
        temperature: T.
        matched_V: Whether the student has each token too, bool (V,), for the hybrid distance: what
            is not stored is then two sums, that of unmatched tokens as a token of number V.
        num_threads: Shards of a batch that are computed concurrently on a CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: TargetLayout,
        temperature: float,
        matched_V: mx.array | None,
        num_threads: int,
    ) -> None:
        self.model = model
        self._shape, self._temperature, self._matched_V = shape, temperature, matched_V
        self._num_threads = num_threads
        hybrid = int(matched_V is not None)
        self._vocabulary, self._top_k = shape.vocabulary - hybrid, shape.top_k - hybrid
        self._split = structure.split(model, self._vocabulary)
        mx.eval(model.parameters())

    @host_exponentials()
    def __call__(self, merged: MergedBatch) -> TeacherTargets:
        """Return the targets of the groups of a batch."""
        token_N = merged.pairs_N2[:, 1]
        shards = merged.batch.shards(part_count(self._num_threads, merged.batch.computed_tokens))
        cuts = np.cumsum([len(shard.targets_N) for shard in shards])[:-1]
        work = list(zip(shards, np.split(np.maximum(token_N, 0), cuts), strict=True))
        if len(shards) == 1:
            columns = [self._shard(*work[0])]
        else:
            with blas.single_threaded():
                columns = run_in_threads(self._shard, work, self._num_threads)
        ids_NK, top_NK, rest_N, log_prob_N = (
            np.concatenate(column) for column in zip(*columns, strict=True)
        )
        scaling_M, _, base_M, _ = scaling_arrays(merged.pairs_N2[:, 0], token_N, None)
        log_scale_N = np.zeros(len(token_N), np.float32)
        np.add.at(log_scale_N, base_M, np.maximum(log_prob_N[scaling_M], math.log(SMALLEST)))
        base_G = merged.base_G
        scale_G1 = log_scale_N[base_G][:, None]
        return (
            ids_NK[base_G].astype(self._shape.id_type),
            np.maximum(top_NK[base_G] + scale_G1, FLOOR),
            np.maximum(rest_N[base_G] + scale_G1[:, 0], FLOOR),
        )

    def _shard(self, batch: Batch, token_N: np.ndarray) -> tuple[np.ndarray, ...]:
        tokens_BT, positions_N, _, segments_BT = batch_arrays(batch)
        rows = supervised_rows(self.model, self._split, tokens_BT, positions_N, segments_BT)
        chunk = chunk_size(self._vocabulary, None, self._num_threads)
        columns: list[tuple[np.ndarray, ...]] = []
        for start in range(0, rows.shape[0], chunk):
            hidden = rows[start : start + chunk]
            logits_CV = hidden if self._split is None else self._split.head(hidden)
            targets = self._targets(
                logits_CV[:, : self._vocabulary], mx.array(token_N[start : start + chunk])
            )
            mx.eval(targets)
            columns.append(tuple(np.array(value) for value in targets))
        return tuple(np.concatenate(column) for column in zip(*columns, strict=True))

    def _targets(self, logits_CV: mx.array, tokens_C: mx.array) -> tuple[mx.array, ...]:
        """Return ids and log-probabilities, descending, the rest's, and that of ``tokens_C``."""
        ids_CK, top_CK, rest_C = top(logits_CV, self._top_k, self._temperature)
        order_CK = mx.argsort(-top_CK, axis=-1)
        ids_CK, top_CK = (mx.take_along_axis(x, order_CK, axis=-1) for x in (ids_CK, top_CK))
        scaled_CV = logits_CV.astype(mx.float32) / self._temperature
        total_C1 = logsumexp(scaled_CV)
        token_C = (mx.take_along_axis(scaled_CV, tokens_C[:, None], axis=-1) - total_C1)[:, 0]
        if self._matched_V is None:
            return ids_CK, top_CK, rest_C, token_C
        others_CV = mx.put_along_axis(scaled_CV, ids_CK, mx.array(_NOTHING), axis=-1)
        matched_C1, unmatched_C1 = (
            mx.maximum(logsumexp(mx.where(kind, others_CV, _NOTHING)) - total_C1, FLOOR)
            for kind in (self._matched_V, mx.logical_not(self._matched_V))
        )
        number_C1 = mx.full(unmatched_C1.shape, self._vocabulary, dtype=mx.int32)
        ids_CK1 = mx.concatenate([ids_CK, number_C1], axis=-1)
        top_CK1 = mx.concatenate([top_CK, unmatched_C1], axis=-1)
        return ids_CK1, top_CK1, matched_C1[:, 0], token_C
