"""Log-probabilities of drawn tokens under a model: the policy's own, and the reference's.

Invariant: the reference is the model at the start of the run: the trained parameters as they were
then, over the same frozen weights. For a new adapter that is the model with the adapter off. One
copy of the frozen weights is in memory, and a chunk of logits at a time. Legend: as
``training/step.py``; S drawn tokens of a store, in the order of its rows. Try it:
``mlx-slim train smollm2-grpo reward.beta=0.04 -o runs/grpo``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.data.batches import Batcher
from mlx_slim.models import structure
from mlx_slim.models.logits import token_nll
from mlx_slim.progress import tracked
from mlx_slim.training.chunk_size import chunk_size
from mlx_slim.training.cross_entropy import batch_arrays, supervised_rows
from mlx_slim.training.optim import set_trainable, trainable


class ReferenceModel:
    """The model at the start of a run; kept are its trained parameters.

    Args:
        model: Before the first step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._start = trainable(model)
        mx.eval(self._start)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(value.nbytes for value in self._start.values())

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give ``model`` the parameters of the start for a while."""
        now = trainable(model)
        set_trainable(model, self._start)
        try:
            yield
        finally:
            set_trainable(model, now)


def drawn_log_probs(
    model: nn.Module,
    batcher: Batcher,
    temperature: float,
    *,
    vocabulary: int,
    chunk: int | None = None,
) -> np.ndarray:
    """Return log π(token) of every supervised token of a store, float32 (S,), nats.

    Args:
        model: Not changed; computed without dropout.
        batcher: Of the store.
        temperature: That logits are divided by.
        vocabulary: Token ids below this may be used to probe the model.
        chunk: Positions whose logits exist at one time; None chooses.
    """
    split = structure.split(model, vocabulary)
    size = chunk_size(split.head.vocabulary if split else vocabulary, chunk, 1)
    log_probs_S = np.zeros(int(batcher.rows.supervised.sum()), np.float32)
    training = model.training
    model.eval()
    try:
        for groups in tracked(batcher.plan(0), "log-probabilities of answers", "micro-batches"):
            batch = batcher.batch(groups)
            tokens_BT, positions_N, targets_N, segments_BT = batch_arrays(batch)
            rows_NX = supervised_rows(model, split, tokens_BT, positions_N, segments_BT)
            chunks: list[mx.array] = []
            for start in range(0, rows_NX.shape[0], size):
                rows_CX = rows_NX[start : start + size]
                logits_CV = split.head(rows_CX) if split else rows_CX
                scaled_CV = logits_CV.astype(mx.float32) / temperature
                chunks.append(-token_nll(scaled_CV, targets_N[start : start + size]))
                mx.eval(chunks[-1])
            real_N = batch.sources_N >= 0
            log_probs_S[batch.sources_N[real_N]] = np.array(mx.concatenate(chunks))[real_N]
    finally:
        model.train(training)
    return log_probs_S
