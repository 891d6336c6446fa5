"""Micro-batches whose rows share what they begin with: every distinct beginning is computed once.

The rows become one list of tokens, the nodes of a prefix tree one behind the other; a position of
the list stands for that position of all rows below its node::

    rows    a b c d      list    a b c d x y       nodes  0:2 (a b), 2:4 (c d), 4:6 (x y)
            a b x y      depth   0 1 2 3 2 3              paths: -, 0:2, 0:2

Invariant: each target of each row is predicted once, from the position that ends the same tokens as
in its row; so loss and gradients are those of the padded rows, up to rounding. Nothing is padded.
``models/prefix_attention.py`` computes attention and rotary positions of such a list.
Legend: P positions of the list, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_slim.data.batches import Batcher
from mlx_slim.data.collate import Batch, TokenNode
from mlx_slim.data.token_runs import ROW_COST, TokenRun, plan

LEAST_GAIN = 0.03  # of the time, below which rows stay side by side
_IN_BLAS = 0.6  # of a step's CPU time is spent in matrix products: docs/lab-log.md
_SAMPLE = 16  # micro-batches that are counted before a run


@dataclass(frozen=True)
class _Rows:
    """The rows of a micro-batch in lexicographic order.

    Attributes:
        inputs: Token ids of each row, up to its last supervised position.
        targets: Indices of each row's targets in the batch.
        positions: Of these in the row.
        units: Number of the unit of each row (``Batch.unit``).
    """

    inputs: list[tuple[int, ...]]
    targets: list[np.ndarray]
    positions: list[np.ndarray]
    units: list[int]

    def part(self, chosen: Sequence[int]) -> _Rows:
        """Return some of the rows, in their order."""
        return _Rows(*([column[i] for i in chosen] for column in vars(self).values()))

    def cut(self, count: int) -> list[_Rows]:
        """Return up to ``count`` shards of neighbouring rows, whole units each."""
        order = list(dict.fromkeys(self.units))  # by the first row of each
        shards = [
            set(units.tolist()) for units in np.array_split(np.array(order), min(count, len(order)))
        ]
        return [self.part([i for i, u in enumerate(self.units) if u in units]) for units in shards]


def _rows_of(batch: Batch) -> _Rows:
    width = batch.tokens_BT.shape[1]
    targets = np.arange(len(batch.targets_N))
    if batch.weights_N is not None:
        targets = targets[batch.weights_N > 0]
    row_N, column_N = np.divmod(batch.positions_N[targets], width)
    rows = []
    for row in np.unique(row_N):
        here = row_N == row
        positions = column_N[here]
        ids = tuple(batch.tokens_BT[row, : int(positions.max()) + 1].tolist())
        rows.append((ids, targets[here], positions, int(row) // batch.unit))
    rows.sort(key=lambda row: row[0])
    return _Rows(*(list(column) for column in zip(*rows, strict=True)))


def _listed(batch: Batch, rows: _Rows) -> Batch:
    """Return ``rows`` of ``batch`` as one list of tokens."""
    distinct = sorted(set(rows.inputs))
    places = [np.zeros(len(ids), dtype=np.int32) for ids in distinct]  # of a row in the list
    nodes: list[TokenNode] = []
    tokens: list[int] = []
    waiting: list[tuple[TokenRun, tuple[tuple[int, int], ...]]]
    waiting = [(run, ()) for run in reversed(plan(distinct))]
    while waiting:
        run, path = waiting.pop()
        begin, end = len(tokens), len(tokens) + run.end - run.begin
        tokens += distinct[run.low][run.begin : run.end]
        for row in range(run.low, run.high):
            places[row][run.begin : run.end] = np.arange(begin, end)
        nodes.append(TokenNode(begin, end, run.begin, path))
        waiting += [(after, (*path, (begin, end))) for after in reversed(run.after)]
    number = {ids: row for row, ids in enumerate(distinct)}
    order = np.concatenate(rows.targets)
    positions = [
        places[number[ids]][positions]
        for ids, positions in zip(rows.inputs, rows.positions, strict=True)
    ]
    fraction = len(rows.inputs) / batch.rows
    weights = None if batch.weights_N is None else batch.weights_N[order]
    return replace(
        batch,
        tokens_BT=np.array([tokens], dtype=np.int32),
        lengths_BT=np.zeros((1, len(tokens)), dtype=np.int32),
        positions_N=np.concatenate(positions).astype(np.int32),
        targets_N=batch.targets_N[order],
        sources_N=batch.sources_N[order],
        weights_N=None if weights is None or (weights == 1).all() else weights,
        real_tokens=round(batch.real_tokens * fraction),
        rows=len(rows.inputs),
        nodes=tuple(nodes),
    )


def list_rows(batch: Batch, counts: Sequence[int] = (1,)) -> list[list[Batch]]:
    """Return ``batch`` cut into so many shards of rows that begin alike, for each of ``counts``.

    Args:
        batch: Rows side by side, not packed.
        counts: Most shards of each way.
    """
    rows = _rows_of(batch)
    return [[_listed(batch, part) for part in rows.cut(count)] for count in counts]


def cost(batch: Batch) -> int:
    """Return the positions that ``batch`` computes, and what its nodes cost besides."""
    return batch.computed_tokens + ROW_COST * len(batch.nodes or ())


def duration(costs: Sequence[int], num_threads: int) -> float:
    """Return how long shards of these costs take, in the time of a token on one thread.

    Shards run side by side on ``num_threads``; a single one has them for its matrix products only.
    """
    if len(costs) == 1:
        return costs[0] * (1 - _IN_BLAS + _IN_BLAS / num_threads)
    return max(max(costs), sum(costs) / num_threads)


def cheapest(batch: Batch, plain: list[Batch], num_threads: int) -> list[Batch]:
    """Return the shards of a micro-batch that take the least time: ``plain``, or shared ones.

    A batch for measuring stays as it is. Shared ones hold no more tokens in memory at one time
    than ``plain``.

    Args:
        batch: The micro-batch, rows side by side.
        plain: Its shards without sharing.
        num_threads: Threads that compute shards side by side.
    """
    measuring = (batch.sources_N < 0).all()  # the same row again and again
    if measuring or batch.segments_BT is not None or batch.tokens_BT.shape[0] == 1:
        return plain
    at_once = _at_once(plain, num_threads)
    best, least = (
        plain,
        (1 - LEAST_GAIN) * duration([cost(part) for part in plain], num_threads),
    )
    for shards in list_rows(batch, sorted({1, num_threads, len(plain)})):
        seconds = duration([cost(part) for part in shards], num_threads)
        if seconds < least and _at_once(shards, num_threads) <= at_once:
            best, least = shards, seconds
    return best


def _at_once(shards: list[Batch], num_threads: int) -> int:
    """Return the most positions that are in memory at one time."""
    return sum(sorted((part.computed_tokens for part in shards), reverse=True)[:num_threads])


def shared_fraction(batcher: Batcher) -> float:
    """Return the fraction of their cost that some micro-batches of ``batcher`` have when shared."""
    plan = batcher.plan(0)
    chosen = plan[:: -(-len(plan) // _SAMPLE)]
    batches = [batcher.batch(groups) for groups in chosen]
    shared = [cheapest(batch, [batch], 1)[0] for batch in batches]
    return sum(map(cost, shared)) / sum(map(cost, batches))
