"""What a rank computes at a time, and how ranks of a sharded model stay in step.

Invariant: ranks that gather blocks from each other compute equally many parts of a step; one that
has fewer computes a part that counts nothing. Try it:
``python -m pytest tests/finetuning/test_sharding.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mlx_slim.data.batches import Batch
from mlx_slim.runtime import all_gather_bytes

IDLE = 0.0  # the factor of a part that counts nothing


@dataclass(frozen=True)
class Part:
    """What is computed at a time.

    Attributes:
        batch: Rows of a micro-batch.
        seed: Of what it draws at random, if that is its own.
        factor: Of its sums and gradients; ``IDLE`` where a rank only takes part.
    """

    batch: Batch
    seed: int | None = None
    factor: float = 1.0


def in_step(parts: list[Part], idle: Callable[[], Part]) -> list[Part]:
    """Return ``parts`` and as many idle ones as make them those of the busiest rank.

    All ranks call it. An idle part is the last one once more, or ``idle()`` where there is none.
    """
    most = max(int(count) for count in all_gather_bytes(str(len(parts)).encode()))
    missing = most - len(parts)
    if not missing:
        return parts
    last = replace(parts[-1], factor=IDLE) if parts else idle()
    return [*parts, *[last] * missing]
