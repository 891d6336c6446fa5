"""What a rank computes at a time, and how ranks of a sharded model stay in step.

Invariant: ranks that gather blocks from each other compute equally many chunks of a step; one that
has fewer computes a chunk that counts nothing. Try it:
``python -m pytest tests/finetuning/test_sharding.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mlx_slim.data.batches import Batch
from mlx_slim.runtime import all_gather_bytes

IDLE = 0.0  # the factor of a chunk that counts nothing


@dataclass(frozen=True)
class Chunk:
    """What is computed at a time.

    Attributes:
        batch: Rows of a micro-batch.
        seed: Of what it draws at random, if that is its own.
        factor: Of its sums and gradients; ``IDLE`` where a rank only stays in step.
    """

    batch: Batch
    seed: int | None = None
    factor: float = 1.0


def in_step(chunks: list[Chunk], idle: Callable[[], Chunk]) -> list[Chunk]:
    """Return ``chunks`` and as many idle ones as make them those of the busiest rank.

    All ranks call it. An idle chunk is the last one once more, or ``idle()`` where there is none.
    """
    most = max(int(count) for count in all_gather_bytes(str(len(chunks)).encode()))
    missing = most - len(chunks)
    if not missing:
        return chunks
    last = replace(chunks[-1], factor=IDLE) if chunks else idle()
    return [*chunks, *[last] * missing]
