"""What a loop minimises: the interface of losses.

Invariant: an objective returns sums, never means, so that micro-batches add up to a step. Try it:
``python -m pytest tests/training/test_step.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.data.batches import Batch

# The arrays of a batch, in the order of the objective; None where a batch has no such array.
Arrays = tuple[Any, ...]


class Objective(Protocol):
    """What a loop minimises: Σ loss of a batch, in nats, over Σ ``weight`` of the step's batches.

    Attributes:
        metrics: Names of what it reports besides the loss, sums of the same kind.
    """

    metrics: tuple[str, ...]

    def arrays(self, batch: Batch) -> Arrays:
        """Return what the loss of ``batch`` needs: ``batch_arrays``, and a teacher's after them."""
        ...

    def weight(self, batch: Batch) -> float:
        """Return what ``batch`` counts: its supervised tokens, or its pairs of answers."""
        ...

    def begin_step(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Measure what the loss of each batch needs of all; called by all ranks, before ``arrays``.

        Args:
            model: In the mode of what follows.
            batches: Of the step, or of a validation: those of all ranks.
        """
        ...

    def __call__(self, model: nn.Module, arrays: Arrays, *, gradient: bool) -> mx.array:
        """Return float32: a scalar, or with ``metrics`` a vector of the loss and them.

        Only the loss is differentiated; ``gradient`` says whether it will be.
        """
        ...
