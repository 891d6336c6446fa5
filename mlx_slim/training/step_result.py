"""What an optimizer step measured, per token or pair.

Invariant: sums over the whole step, all ranks, divided once. Try it:
``python -m pytest tests/training/test_step.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class StepResult:
    """What a step measured, summed over all ranks.

    Attributes:
        loss: Σ NLL / Σ supervised tokens, nats; weighted where rows weigh their turns; of pairs of
            answers, Σ loss / pairs.
        gradients: path -> float32 gradient of that loss.
        supervised: Σ supervised tokens.
        tokens: Σ real tokens.
        computed: Σ positions computed.
        here: Of them, those that this rank computed.
        waited: Seconds that this rank was in collectives (``ranks/state.py``).
        metrics: What the objective reports besides, per token or pair too.
    """

    loss: float
    gradients: dict[str, mx.array]
    supervised: int
    tokens: int
    computed: int
    here: int
    waited: float
    metrics: dict[str, float] = field(default_factory=dict)


def means(names: Sequence[str], sums: np.ndarray, weight: float) -> tuple[float, dict[str, float]]:
    """Return the loss and the metrics ``names`` per token or pair, from their sums.

    A metric that is not a number was not measured, and is left out. ``weight`` is the sum of
    ``Objective.weight``.
    """
    first, *others = [float(value) for value in sums.reshape(-1)]
    metrics = zip(names, others, strict=True)
    return first / weight, {k: value / weight for k, value in metrics if not math.isnan(value)}
