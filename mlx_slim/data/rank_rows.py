"""The rows of one micro-batch dealt to several ranks.

Invariant: every row is in exactly one rank's batch, rows of a unit in the same one, and a rank has
at most one unit more than another; which rows, follows from the micro-batch alone. Their random
numbers are those that they have in the whole micro-batch (``DrawnRows``), so that the sums of all
ranks are those of one, up to rounding. Try it: ``python -m pytest tests/data/test_rank_rows.py``.
Legend: B sequences, T positions, N supervised positions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mlx_slim.data.collate import Batch, DrawnRows, padded
from mlx_slim.data.shapes import Shape

_EVEN = 1.25  # of an even deal's targets: what a rank's are padded to, where that is enough


def rows_of_rank(batch: Batch, rank: int, ranks: int, *, fixed: bool = False) -> Batch | None:
    """Return the rows of ``batch`` that ``rank`` computes; None where there are none for it.

    Rows are dealt by their number of targets, the most first, to and fro.

    Args:
        batch: The micro-batch.
        rank: From 0.
        ranks: How many.
        fixed: Whether micro-batches have few shapes: then all ranks' of a shape have the same one.
    """
    (count, width), unit = batch.tokens_BT.shape, batch.unit
    used = batch.used_rows
    counted = np.ones(len(batch.targets_N)) if batch.weights_N is None else batch.weights_N > 0
    targets_U = np.bincount(
        batch.positions_N // width // unit, weights=counted, minlength=count // unit
    )[: used // unit]
    order = np.argsort(-targets_U, kind="stable")
    turn = np.arange(len(order)) % (2 * ranks)
    dealt = np.minimum(turn, 2 * ranks - 1 - turn)
    units = np.sort(order[dealt == rank])
    if not len(units):
        return None
    rows = (units[:, None] * unit + np.arange(unit)).reshape(-1)
    some = replace(batch.only(rows), entropy=batch.entropy)
    if fixed:
        most = -(-(count // unit) // ranks) * unit
        even = int(_EVEN * len(batch.targets_N) / ranks) + 1
        even = even if some.supervised_tokens <= even else len(batch.targets_N)
        some = padded(some, Shape(most, width, min(even, most * width)))
        rows = np.pad(rows, (0, most - len(rows)))
    return replace(some, drawn=DrawnRows(rows.astype(np.int32), count, width))
