"""Scores of groups, and the calibration rows that they are measured on.

Invariant: a score stands for one group; rows are of equal length and nothing is padded. Try it:
``mlx-slim prune MODEL -o DIR --ratio 0.2``, then look into ``DIR/prune_scores.safetensors``.

Legend: N rows, T tokens a row, G groups of a family.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_slim.data.batches import Batch, collate
from mlx_slim.models.kinds import HIDDEN

_BATCH_TOKENS = 2048  # tokens that go through a block together

# "LAYER.KIND", or "hidden" -> scores (G,), float32; more is more important
Scores = dict[str, np.ndarray]


def name_of(layer: int, kind: str) -> str:
    """Return the key of a block's family in ``Scores``; all blocks have the same channels."""
    return kind if kind == HIDDEN else f"{layer}.{kind}"


class _CalibrationRows:
    """Calibration rows as ``Rows``: every token but the first is a target."""

    def __init__(self, rows_NT: np.ndarray) -> None:
        self._rows_NT = rows_NT
        count, length = rows_NT.shape
        self._mask_T = np.arange(length) > 0
        self.lengths = np.full(count, length)
        self.supervised = np.full(count, length - 1)

    def __len__(self) -> int:
        return len(self._rows_NT)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int32 (T,) and the mask bool (T,)."""
        return self._rows_NT[i], self._mask_T

    def weights(self, i: int) -> None:
        """Return None: all targets have weight 1."""


def batches_of(rows_NT: mx.array, *, single: bool = False) -> list[Batch]:
    """Return the rows as batches for next-token loss, in order; nothing is padded.

    Args:
        rows_NT: Token ids.
        single: A row a batch.
    """
    rows = _CalibrationRows(np.array(rows_NT, np.int32))
    count = 1 if single else max(1, _BATCH_TOKENS // rows_NT.shape[1])
    groups = [range(i, min(i + count, len(rows))) for i in range(0, len(rows), count)]
    return [collate(rows, [[i] for i in group], isolate=False) for group in groups]
