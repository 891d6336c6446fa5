"""Rows of a token store as one micro-batch: inputs, positions of the loss and its targets.

Invariant: every supervised target of every row is predicted once, with its loss weight; padding
has weight 0. Used by ``batches.py``.
Legend: B sequences, T positions, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from mlx_slim.data.shapes import Shape


class RowStore(Protocol):
    """What a token store offers: see ``data/store.py``."""

    lengths: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids int32 (T,) and the supervised mask bool (T,)."""
        ...

    def weights(self, i: int) -> np.ndarray | None:
        """Return loss weights float32 (T,), None where all targets' are 1."""
        ...


class DrawnRows(NamedTuple):
    """Some rows of a micro-batch, which have the random numbers that they have in the whole of it.

    Attributes:
        rows_B: int32 numbers of the rows in the micro-batch; 0 of padding.
        batch: Its rows.
        width: Its positions.
    """

    rows_B: np.ndarray
    batch: int
    width: int


class TokenNode(NamedTuple):
    """A run of positions of a list of tokens that rows share (``data/shared.py``).

    Attributes:
        begin: Its first position in the list.
        end: Behind its last one.
        depth: Positions of its rows before it.
        path: (begin, end) of the nodes that hold these, first to last.
    """

    begin: int
    end: int
    depth: int
    path: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: inputs, and which targets the loss counts at which positions.

    A row of ids 0..L-1 is fed without its last id, and position t predicts id t+1::

        ids      a b c d        supervised  - - x x
        inputs   a b c          positions   1 2      (of c and d, the ids they predict)
        targets                             c d

    Positions after the last supervised target cannot change the loss and are not computed.

    Attributes:
        tokens_BT: int32 inputs, zero where padded.
        positions_N: int32 indices into the flattened (B·T) positions.
        targets_N: int32 ids that those positions predict.
        sources_N: int64 number of each target among all supervised ids of the store, in row order:
            where a teacher's answer for it is kept. −1 in a batch that is for measuring only.
        segments_BT: int32 segment numbers of packed rows (padding is −1), or None: one row each.
        real_tokens: Ids of the rows, the unit of every tokens/s here.
        rows: How many rows are inside.
        weights_N: float32 loss weight of each target, above 0, and 0 where positions, targets and
            sources are padded; None where every target's is 1 and nothing is padded.
        lengths_BT: int32 inputs of the row that each position is in, 0 where padded, and where
            several rows share a position.
        entropy: Numbers that what is random in this batch alone is drawn from; empty in a batch
            that is for measuring only.
        nodes: Of a batch whose rows share their beginnings: the one sequence is a list of nodes.
        sampled: Its rows are answers that the model wrote (``training/rounds.py``): ``sources_N``
            numbers the targets of these.
        unit: Neighbouring rows that one shard holds, such as both answers of a pair.
        drawn: Of rows that one rank computes of a micro-batch (``data/rank_rows.py``).
    """

    tokens_BT: np.ndarray
    positions_N: np.ndarray
    targets_N: np.ndarray
    sources_N: np.ndarray
    segments_BT: np.ndarray | None
    real_tokens: int
    rows: int
    lengths_BT: np.ndarray
    weights_N: np.ndarray | None = None
    entropy: tuple[int, ...] = ()
    nodes: tuple[TokenNode, ...] | None = None
    sampled: bool = False
    unit: int = 1
    drawn: DrawnRows | None = None

    def shards(self, count: int) -> list[Batch]:
        """Return up to ``count`` batches of neighbouring sequences that make up this one.

        Only a batch that stays whole keeps what it is padded with.
        """
        batch = self.used_rows
        count = min(count, batch // self.unit)
        if count <= 1:
            return [self]
        units = np.array_split(np.arange(batch).reshape(-1, self.unit), count)
        shards = [self.only(rows.reshape(-1)) for rows in units]
        if not self.entropy:
            return shards
        return [replace(one, entropy=(*self.entropy, i)) for i, one in enumerate(shards)]

    @property
    def _targets(self) -> np.ndarray:
        """Whether a target counts, bool (N,)."""
        return np.ones(len(self.targets_N), bool) if self.weights_N is None else self.weights_N > 0

    @property
    def used_rows(self) -> int:
        """Rows up to the last one with a target: what follows is padding."""
        return int(self.positions_N[self._targets].max()) // self.tokens_BT.shape[1] + 1

    def only(self, rows: np.ndarray) -> Batch:
        """Return the batch of some rows (ascending numbers), without what it is padded with."""
        batch, width = self.used_rows, self.tokens_BT.shape[1]
        row_N = self.positions_N // width
        here = self._targets & np.isin(row_N, rows)
        columns = self.positions_N[here] % width
        used = int(columns.max()) + 1  # later positions predict nothing
        weights = None if self.weights_N is None else self.weights_N[here]
        return Batch(
            tokens_BT=self.tokens_BT[rows, :used],
            positions_N=(np.searchsorted(rows, row_N[here]) * used + columns).astype(np.int32),
            targets_N=self.targets_N[here],
            sources_N=self.sources_N[here],
            segments_BT=None if self.segments_BT is None else self.segments_BT[rows, :used],
            real_tokens=round(self.real_tokens * len(rows) / batch),
            rows=round(self.rows * len(rows) / batch),
            lengths_BT=self.lengths_BT[rows, :used],
            entropy=self.entropy,
            weights_N=None if weights is None or (weights == 1).all() else weights,
            sampled=self.sampled,
            unit=self.unit,
        )

    @property
    def computed_tokens(self) -> int:
        """Positions computed, padding counted."""
        return int(self.tokens_BT.size)

    @property
    def supervised_tokens(self) -> int:
        """Targets that the loss counts."""
        count = len(self.targets_N) if self.weights_N is None else np.count_nonzero(self.weights_N)
        return int(count)

    @property
    def total_weight(self) -> float:
        """Sum of their weights, by which the loss is divided: their number where these are 1."""
        if self.weights_N is None:
            return float(len(self.targets_N))
        return float(self.weights_N.sum(dtype=np.float64))


def first_targets(rows: RowStore) -> np.ndarray:
    """Return how many targets the rows before each row have, int64 (rows,)."""
    return np.cumsum(rows.supervised, dtype=np.int64) - rows.supervised


def collate(
    rows: RowStore,
    groups: Sequence[Sequence[int]],
    *,
    isolate: bool,
    width: int = 0,
    firsts: np.ndarray | None = None,
    unit: int = 1,
) -> Batch:
    """Build a micro-batch.

    Args:
        rows: Where token ids come from.
        groups: Row numbers of each sequence; several in one sequence are packed.
        isolate: Whether sequences are packed, so that segments are needed.
        width: Fewest positions of a sequence.
        firsts: ``first_targets(rows)``, where it was computed before.
        unit: Neighbouring sequences that one shard holds.
    """
    firsts = first_targets(rows) if firsts is None else firsts
    sequences: list[list[tuple[np.ndarray, np.ndarray, int]]] = []
    weights: list[np.ndarray | None] = []
    real = 0
    for group in groups:
        sequence = []
        for index in group:
            ids, supervised = rows.row(index)
            real += len(ids)
            last = int(np.flatnonzero(supervised)[-1])
            row_weights = rows.weights(index)
            weights.append(None if row_weights is None else row_weights[supervised])
            sequence.append((ids[: last + 1], supervised[: last + 1], int(firsts[index])))
        sequences.append(sequence)
    width = max(width, *(sum(len(ids) - 1 for ids, _, _ in sequence) for sequence in sequences))
    tokens_BT = np.zeros((len(sequences), width), dtype=np.int32)
    segments_BT = np.full((len(sequences), width), -1, dtype=np.int32)
    lengths_BT = np.zeros((len(sequences), width), dtype=np.int32)
    positions: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    sources: list[np.ndarray] = []
    for b, sequence in enumerate(sequences):
        start = 0
        for number, (ids, supervised, first) in enumerate(sequence):
            stop = start + len(ids) - 1
            tokens_BT[b, start:stop] = ids[:-1]
            segments_BT[b, start:stop] = number
            lengths_BT[b, start:stop] = stop - start
            where = np.flatnonzero(supervised[1:])
            positions.append((b * width + start + where).astype(np.int32))
            targets.append(ids[1:][where].astype(np.int32))
            sources.append(first + np.arange(len(where), dtype=np.int64))
            start = stop
    return Batch(
        tokens_BT=tokens_BT,
        positions_N=np.concatenate(positions),
        targets_N=np.concatenate(targets),
        sources_N=np.concatenate(sources),
        segments_BT=segments_BT if isolate else None,
        real_tokens=real,
        rows=sum(len(group) for group in groups),
        lengths_BT=lengths_BT,
        weights_N=_joined(weights),
        unit=unit,
    )


def _joined(weights: list[np.ndarray | None]) -> np.ndarray | None:
    """Return the weights of all rows' targets; a store has them for every row or for none."""
    present = [each for each in weights if each is not None]
    return np.concatenate(present).astype(np.float32) if present else None


def to_the_end(batch: Batch) -> Batch:
    """Return a batch for measuring: every sequence has a target at its end, so none is cut."""
    count, width = batch.tokens_BT.shape
    ends = np.arange(1, count + 1) * width - 1
    positions_N = np.union1d(batch.positions_N, ends).astype(np.int32)
    return replace(
        batch,
        positions_N=positions_N,
        targets_N=np.zeros_like(positions_N),
        sources_N=np.full(len(positions_N), -1, dtype=np.int64),
        weights_N=None if batch.weights_N is None else np.ones(len(positions_N), np.float32),
    )


def padded(batch: Batch, shape: Shape) -> Batch:
    """Return ``batch`` with rows, positions and targets added that count for nothing."""
    (count, width), targets = batch.tokens_BT.shape, len(batch.targets_N)
    sides = ((0, shape.batch - count), (0, shape.width - width))
    rest = (0, shape.targets - targets)
    segments = batch.segments_BT
    return replace(
        batch,
        tokens_BT=np.pad(batch.tokens_BT, sides),
        positions_N=np.pad(
            batch.positions_N + batch.positions_N // width * (shape.width - width), rest
        ),
        targets_N=np.pad(batch.targets_N, rest),
        sources_N=np.pad(batch.sources_N, rest, constant_values=-1),
        segments_BT=None if segments is None else np.pad(segments, sides, constant_values=-1),
        lengths_BT=np.pad(batch.lengths_BT, sides),
        weights_N=np.pad(
            np.ones(targets, np.float32) if batch.weights_N is None else batch.weights_N, rest
        ),
    )


def filled(batch: Batch, shape: Shape) -> Batch:
    """Return a batch of ``shape`` for measuring, with targets all over."""
    positions_N = np.linspace(0, shape.batch * shape.width - 1, shape.targets).astype(np.int32)
    return replace(
        batch,
        positions_N=positions_N,
        targets_N=np.zeros_like(positions_N),
        sources_N=np.full(len(positions_N), -1, dtype=np.int64),
        weights_N=np.ones(len(positions_N), np.float32),
    )
