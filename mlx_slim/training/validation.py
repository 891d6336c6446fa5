"""The loss of a model on fixed rows, without gradients.

Invariant: rows, order and cuts are the same at every call, so losses of different steps and models
are comparable. Try it: ``mlx-slim train smollm2-lora model=runs/other/model --validate``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim import blas
from mlx_slim.data.batches import Batch, Batcher, Plan
from mlx_slim.models.host_exponentials import host_exponentials
from mlx_slim.progress import stage
from mlx_slim.runtime import on_gpu, world
from mlx_slim.sharding.model import ShardedModel
from mlx_slim.threads import run_in_threads
from mlx_slim.training.objective import Objective
from mlx_slim.training.optim import set_trainable, trainable
from mlx_slim.training.ranks import sum_numbers
from mlx_slim.training.step_result import means


class LossScorer:
    """The sums of an objective over batches, without gradients.

    Args:
        model: In evaluation mode while it is called.
        objective: Summed loss of a batch.
        num_threads: Threads that compute batches side by side on a CPU.
        compiled, captured, sharded: As ``Stepper``.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        num_threads: int = 1,
        compiled: bool = False,
        captured: Sequence[dict] = (),
        sharded: ShardedModel | None = None,
    ) -> None:
        self.sharded = sharded
        self.model = model
        self.objective = objective
        self._reading = threading.Lock()  # objectives read their files at the first batch
        # Collectives of two threads would mix.
        self._num_threads = 1 if compiled or sharded is not None else num_threads

        def sums(parameters: dict[str, mx.array], *arrays: Any) -> mx.array:
            set_trainable(model, parameters)
            if sharded is not None:
                sharded.gather_trained()
            return objective(model, arrays, gradient=False)

        self._compiled = compiled
        self._sums: Callable = mx.compile(sums, inputs=[*captured]) if compiled else sums

    def __call__(self, batch: Batch) -> mx.array:
        """Return what the objective returns, evaluated where the model is sharded."""
        if self.sharded is not None:
            with self.sharded.outside_blocks(trained=False):
                sums = self._of(batch)
                mx.eval(sums)
            return sums
        return self._of(batch)

    def _of(self, batch: Batch) -> mx.array:
        parameters = trainable(self.model)
        # A compiled graph is whole: nothing can be evaluated inside.
        with contextlib.nullcontext() if self._compiled else host_exponentials():
            sums = self._sums(parameters, *self.objective.arrays(batch))
        set_trainable(self.model, parameters)
        return sums

    def each(self, batcher: Batcher, plan: Plan) -> list[tuple[np.ndarray, Batch]]:
        """Return the sums of each micro-batch of ``plan``, and the batch, in order."""
        threads = 1 if on_gpu() else self._num_threads
        with stage("validating", len(plan), "micro-batches") as reading:

            def one(groups: Sequence[Sequence[int]]) -> tuple[np.ndarray, Batch]:
                batch = batcher.batch(groups)
                if threads == 1:
                    sums = np.array(self(batch))
                else:  # the model stays as it is: all threads read it
                    with self._reading:
                        arrays = self.objective.arrays(batch)
                    sums = np.array(self.objective(self.model, arrays, gradient=False))
                reading.advance()
                return sums, batch

            if threads == 1:
                return [one(groups) for groups in plan]
            mx.eval(self.model.parameters())  # a thread cannot evaluate what another one began
            with host_exponentials(), blas.single_threaded():
                return run_in_threads(one, [(groups,) for groups in plan], threads)


def validation_loss(scorer: LossScorer, batcher: Batcher) -> tuple[float, dict[str, float], int]:
    """Return Σ loss / Σ supervised tokens of all rows (nats), the metrics, the supervised tokens.

    Weighted where rows weigh their turns; of pairs of answers, Σ loss / pairs. The rows and their
    order are fixed; each rank computes some of the micro-batches.
    """
    model, objective = scorer.model, scorer.objective
    model.eval()
    # Summed in Python: thousands of batches would lose digits in float32.
    sums, supervised, weight = np.zeros(1 + len(objective.metrics)), 0, 0.0
    plan, group = batcher.plan(0), world()
    objective.begin_step(model, map(batcher.batch, plan))
    mine = plan[group.rank() :: group.size()]
    for one, batch in scorer.each(batcher, mine):
        sums += one
        supervised += batch.supervised_tokens
        weight += objective.weight(batch)
    if scorer.sharded is not None and len(mine) < -(-len(plan) // group.size()):
        scorer(batcher.batch(plan[0]))  # the other ranks need this one's slices
    model.train()
    if group.size() > 1:
        *values, supervised, weight = sum_numbers(*sums.tolist(), supervised, weight)
        sums = np.array(values)
    return *means(objective.metrics, sums, weight), int(supervised)
