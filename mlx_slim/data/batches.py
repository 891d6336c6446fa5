"""From rows to micro-batches under a token budget, the same for every rank and every resume.

Invariant: a plan is a pure function of (row lengths, settings, seed, epoch); every row is in it
exactly once, and no micro-batch computes more than ``batch_tokens`` tokens, padding counted. So the
whole position of a run is two integers: the epoch and the micro-batches already taken.
Legend: B sequences, T positions, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from mlx_slim.data import plans
from mlx_slim.data.plans import Frame, Plan, Run
from mlx_slim.data.shapes import Shape, Shapes, grouped_shapes, needed, packed_shapes

Mode = Literal["grouped", "packed"]

BUCKET = 8  # rows whose lengths differ by less are shuffled together: at most 7 padded positions


class Rows(Protocol):
    """What a token store offers: see ``data/store.py``."""

    lengths: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids int32 (T,) and the supervised mask bool (T,)."""
        ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch: inputs, and where and what the loss asks.

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
        weights_N: float32, 1 for a target and 0 where positions, targets and sources are padded;
            None where they are not.
    """

    tokens_BT: np.ndarray
    positions_N: np.ndarray
    targets_N: np.ndarray
    sources_N: np.ndarray
    segments_BT: np.ndarray | None
    real_tokens: int
    rows: int
    weights_N: np.ndarray | None = None

    def parts(self, count: int) -> list[Batch]:
        """Return up to ``count`` batches of neighbouring sequences that make up this one.

        Only a batch that stays whole keeps what it is padded with.
        """
        batch, width = self.tokens_BT.shape
        targets = (
            np.ones(len(self.targets_N), bool) if self.weights_N is None else self.weights_N > 0
        )
        batch = int(self.positions_N[targets].max()) // width + 1
        count = min(count, batch)
        if count <= 1:
            return [self]
        parts = []
        for rows in np.array_split(np.arange(batch), count):
            here = targets & np.isin(self.positions_N // width, rows)
            positions = self.positions_N[here] - rows[0] * width
            used = int((positions % width).max()) + 1  # later positions predict nothing
            segments = None if self.segments_BT is None else self.segments_BT[rows, :used]
            part = Batch(
                tokens_BT=self.tokens_BT[rows, :used],
                positions_N=(positions // width * used + positions % width).astype(np.int32),
                targets_N=self.targets_N[here],
                sources_N=self.sources_N[here],
                segments_BT=segments,
                real_tokens=round(self.real_tokens * len(rows) / batch),
                rows=round(self.rows * len(rows) / batch),
            )
            parts.append(part)
        return parts

    @property
    def computed_tokens(self) -> int:
        """Positions computed, padding counted."""
        return int(self.tokens_BT.size)

    @property
    def supervised_tokens(self) -> int:
        """Targets that the loss counts."""
        return len(self.targets_N) if self.weights_N is None else int(self.weights_N.sum())


def first_targets(rows: Rows) -> np.ndarray:
    """Return how many targets the rows before each row have, int64 (rows,)."""
    return np.cumsum(rows.supervised, dtype=np.int64) - rows.supervised


def collate(
    rows: Rows,
    groups: Sequence[Sequence[int]],
    *,
    isolate: bool,
    width: int = 0,
    firsts: np.ndarray | None = None,
) -> Batch:
    """Build a micro-batch.

    Args:
        rows: Where token ids come from.
        groups: Row numbers of each sequence; several in one sequence are packed.
        isolate: Whether sequences are packed, so that segments are needed.
        width: Fewest positions of a sequence.
        firsts: ``first_targets(rows)``, where it was computed before.
    """
    firsts = first_targets(rows) if firsts is None else firsts
    parts: list[list[tuple[np.ndarray, np.ndarray, int]]] = []
    real = 0
    for group in groups:
        sequence = []
        for index in group:
            ids, supervised = rows.row(index)
            real += len(ids)
            last = int(np.flatnonzero(supervised)[-1])
            sequence.append((ids[: last + 1], supervised[: last + 1], int(firsts[index])))
        parts.append(sequence)
    width = max(width, *(sum(len(ids) - 1 for ids, _, _ in sequence) for sequence in parts))
    tokens_BT = np.zeros((len(parts), width), dtype=np.int32)
    segments_BT = np.full((len(parts), width), -1, dtype=np.int32)
    positions: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    sources: list[np.ndarray] = []
    for b, sequence in enumerate(parts):
        start = 0
        for number, (ids, supervised, first) in enumerate(sequence):
            stop = start + len(ids) - 1
            tokens_BT[b, start:stop] = ids[:-1]
            segments_BT[b, start:stop] = number
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
    )


def _to_the_end(batch: Batch) -> Batch:
    """Return a batch for measuring: every sequence has a target at its end, so none is cut."""
    count, width = batch.tokens_BT.shape
    ends = np.arange(1, count + 1) * width - 1
    positions_N = np.union1d(batch.positions_N, ends).astype(np.int32)
    return replace(
        batch,
        positions_N=positions_N,
        targets_N=np.zeros_like(positions_N),
        sources_N=np.full(len(positions_N), -1, dtype=np.int64),
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
        weights_N=np.pad(np.ones(targets, np.float32), rest),
    )


def _filled(batch: Batch, shape: Shape) -> Batch:
    """Return a batch of ``shape`` for measuring, with targets all over."""
    positions_N = np.linspace(0, shape.batch * shape.width - 1, shape.targets).astype(np.int32)
    return replace(
        batch,
        positions_N=positions_N,
        targets_N=np.zeros_like(positions_N),
        sources_N=np.full(len(positions_N), -1, dtype=np.int64),
        weights_N=np.ones(len(positions_N), np.float32),
    )


@dataclass(frozen=True)
class Batcher:
    """Plans epochs over one store.

    Attributes:
        rows: The store.
        batch_tokens: Largest B·T of a micro-batch.
        max_length: Longest row, ids; also the length of packed sequences.
        mode: ``grouped`` or ``packed``.
        seed: Of the shuffles.
        limit: Most shapes (B, T, N) that the micro-batches may have, padded to them
            (``data/shapes.py``); None leaves each as it is.
    """

    rows: Rows
    batch_tokens: int
    max_length: int
    mode: Mode
    seed: int
    limit: int | None = None

    @cached_property
    def _firsts(self) -> np.ndarray:
        return first_targets(self.rows)

    @cached_property  # computed once: plans ask for it row by row
    def _lengths(self) -> np.ndarray:
        return np.maximum(self.rows.lengths - 1, 1)  # the last id is only a target

    def _rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch])

    def _sequences(self, rng: np.random.Generator) -> list[list[int]]:
        order = plans.by_class(self._lengths // BUCKET, rng)
        return plans.packed(self._lengths, order, self.max_length, rng)

    @cached_property
    def _grouped(self) -> tuple[Shapes, list[Run]]:
        assert self.limit is not None
        supervised = self.rows.supervised
        return grouped_shapes(self._lengths, supervised, self.batch_tokens, self.seed, self.limit)

    @cached_property
    def _packed(self) -> tuple[Shapes | None, int]:
        """The shapes, and the sequences of a micro-batch."""
        most = max(1, self.batch_tokens // self.max_length)
        if self.limit is None:
            return None, most
        return packed_shapes(
            lambda epoch: self._sequences(self._rng(epoch)),
            self._lengths,
            self.rows.supervised,
            Frame(most, min(int(self._lengths.sum()), self.max_length)),
            self.limit,
        )

    @property
    def shapes(self) -> Shapes | None:
        """The shapes of all micro-batches of all epochs; None where each has its own."""
        if self.limit is None:
            return None
        return self._packed[0] if self.mode == "packed" else self._grouped[0]

    def plan(self, epoch: int) -> Plan:
        """Return the micro-batches of an epoch, as row numbers per sequence, in order."""
        rng = self._rng(epoch)
        if self.mode == "packed":
            batches = plans.in_batches(self._sequences(rng), self._packed[1])
        elif self.limit is None:
            batches = plans.grouped(self._lengths // BUCKET, self._lengths, self.batch_tokens, rng)
        else:
            dealt = [plans.deal(run, self.rows.supervised, rng) for run in self._grouped[1]]
            batches = [[[row] for row in rows] for each in dealt for rows in each.tolist()]
        if self.shapes is not None:
            batches = self.shapes.fitted(batches)
        order = rng.permutation(len(batches))
        return [batches[i] for i in order]

    def batch(self, groups: Sequence[Sequence[int]]) -> Batch:
        """Build one micro-batch of a plan."""
        batch = collate(self.rows, groups, firsts=self._firsts, isolate=self.mode == "packed")
        if self.shapes is None:
            return batch
        shape = self.shapes.of(groups)
        assert shape is not None, "a plan has fitting micro-batches only"
        return padded(batch, shape)

    def worst(self) -> Batch:
        """Build a micro-batch, for measuring only, as large as the largest of any epoch.

        Where shapes are fixed it is the largest of them. Grouped micro-batches have as many rows in
        every epoch, so only the width can differ, up to the longest row of the bucket. Packed
        sequences are filled differently in each epoch: they are taken as full, and as many as
        best-fit can leave (any two together exceed the capacity).
        """
        lengths = self._lengths
        if self.shapes is not None:
            shape = self.shapes.largest
            row = int(np.where(lengths <= shape.width, lengths, 0).argmax())
            return _filled(self._collated([[row]] * shape.batch, shape.width), shape)
        plan = self.plan(0)
        if self.mode == "grouped":
            tallest = plans.tallest(lengths // BUCKET, lengths)

            def bound(groups: list[list[int]]) -> tuple[int, int]:
                width = max(int(tallest[i]) for group in groups for i in group)
                return len(groups) * width, width

            groups = max(plan, key=bound)
            return _to_the_end(self._collated(groups, bound(groups)[1]))
        total = int(lengths.sum())
        sequences = sorted(
            (group for groups in plan for group in groups),
            key=lambda group: int(lengths[group].sum()),
            reverse=True,
        )
        most = max(1, -(-2 * total // self.max_length) - 1)
        count = min(max(1, self.batch_tokens // self.max_length), most)
        groups = [sequences[i % len(sequences)] for i in range(count)]
        return _to_the_end(self._collated(groups, min(total, self.max_length)))

    def _collated(self, groups: Sequence[Sequence[int]], width: int) -> Batch:
        isolate = self.mode == "packed"
        return collate(self.rows, groups, firsts=self._firsts, isolate=isolate, width=width)

    def computed(self, epoch: int = 0) -> tuple[int, float]:
        """Return the positions computed in an epoch, and Σ B·T² (what attention costs)."""
        plan = self.plan(epoch)
        if self.shapes is None:
            batch_M, width_M, _ = needed(plan, self._lengths, self.rows.supervised).T
        else:
            batch_M, width_M, _ = self.shapes.of_each(plan).T
        return int((batch_M * width_M).sum()), float((batch_M * width_M.astype(float) ** 2).sum())


def choose_mode(
    rows: Rows,
    batch_tokens: int,
    max_length: int,
    seed: int,
    balance: float,
    limit: int | None = None,
) -> Mode:
    """Return ``grouped`` or ``packed``, whichever costs less for these rows.

    Args:
        rows: The store.
        batch_tokens: Largest B·T of a micro-batch.
        max_length: Length of packed sequences.
        seed: Of the shuffles.
        balance: The length T at which a token's attention costs as much as all else in it.
        limit: Most shapes, padded to; None for none.
    """
    costs: dict[Mode, float] = {}
    modes: tuple[Mode, Mode] = ("grouped", "packed")
    for mode in modes:
        total, squares = Batcher(rows, batch_tokens, max_length, mode, seed, limit).computed()
        costs[mode] = total + squares / balance
    return min(costs, key=lambda mode: costs[mode])
