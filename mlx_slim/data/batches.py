"""From rows to micro-batches under a token budget, the same for every rank and every resume.

Invariant: a plan is a pure function of (row lengths, settings, seed, epoch); every row is in it
exactly once, and no micro-batch computes more than ``batch_tokens`` tokens, padding counted. So the
whole position of a run is two integers: the epoch and the micro-batches already taken.
Legend: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from mlx_slim.data import plans
from mlx_slim.data.collate import (
    Batch,
    RowStore,
    collate,
    filled,
    first_targets,
    padded,
    to_the_end,
)
from mlx_slim.data.plans import Frame, Plan, Run
from mlx_slim.data.shapes import BatchShapes, Shape, grouped_shapes, needed, packed_shapes

__all__ = [
    "Batch",
    "Batcher",
    "Mode",
    "RowStore",
    "choose_mode",
    "collate",
    "first_targets",
    "padded",
]

Mode = Literal["grouped", "packed"]

BUCKET = 8  # rows whose lengths differ by less are shuffled together: at most 7 padded positions


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
        unit: Neighbouring rows of the store kept side by side, such as both answers of a pair;
            above 1 only ``grouped``. Shapes and plans are made of units, each as wide as its rows
            side by side.
    """

    rows: RowStore
    batch_tokens: int
    max_length: int
    mode: Mode
    seed: int
    limit: int | None = None
    unit: int = 1

    @cached_property
    def _firsts(self) -> np.ndarray:
        return first_targets(self.rows)

    @cached_property  # computed once: plans ask for it row by row
    def _lengths(self) -> np.ndarray:
        """Positions that each unit takes, padded to its longest row."""
        rows = np.maximum(self.rows.lengths - 1, 1)  # the last id is only a target
        return rows.reshape(-1, self.unit).max(axis=1) * self.unit

    @cached_property
    def _supervised(self) -> np.ndarray:
        return self.rows.supervised.reshape(-1, self.unit).sum(axis=1)

    def _rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch])

    def _sequences(self, rng: np.random.Generator) -> list[list[int]]:
        order = plans.by_class(self._lengths // BUCKET, rng)
        return plans.packed(self._lengths, order, self.max_length, rng)

    @cached_property
    def _grouped(self) -> tuple[BatchShapes, list[Run]]:
        assert self.limit is not None
        settings = self.batch_tokens, self.seed, self.limit
        return grouped_shapes(self._lengths, self._supervised, *settings)

    @cached_property
    def _packed(self) -> tuple[BatchShapes | None, int]:
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
    def shapes(self) -> BatchShapes | None:
        """The shapes, in units, of all micro-batches of all epochs; None where each has its own."""
        if self.limit is None:
            return None
        return self._packed[0] if self.mode == "packed" else self._grouped[0]

    def plan(self, epoch: int) -> Plan:
        """Return the micro-batches of an epoch, as row numbers per sequence, in order."""
        return [self._rows_of(groups) for groups in self._plan(epoch)]

    def _rows_of(self, groups: list[list[int]]) -> list[list[int]]:
        """Return the rows of units, a sequence each."""
        if self.unit == 1:
            return groups
        return [[unit * self.unit + i] for (unit,) in groups for i in range(self.unit)]

    def _plan(self, epoch: int) -> Plan:
        """Return the micro-batches of an epoch as numbers of units."""
        rng = self._rng(epoch)
        if self.mode == "packed":
            batches = plans.in_batches(self._sequences(rng), self._packed[1])
        elif self.limit is None:
            classes = self._lengths // (BUCKET * self.unit)
            batches = plans.grouped(classes, self._lengths, self.batch_tokens, rng)
        else:
            dealt = [plans.deal(run, self._supervised, rng) for run in self._grouped[1]]
            batches = [[[row] for row in rows] for each in dealt for rows in each.tolist()]
        if self.shapes is not None:
            batches = self.shapes.fitted(batches)
        order = rng.permutation(len(batches))
        return [batches[i] for i in order]

    def batch(self, groups: Sequence[Sequence[int]]) -> Batch:
        """Build one micro-batch of a plan."""
        batch = self._collated(groups, 0)
        if self.shapes is None:
            return batch
        units = [[row // self.unit for row in group] for group in groups[:: self.unit]]
        shape = self.shapes.of(units)
        assert shape is not None, "a plan has fitting micro-batches only"
        return padded(batch, self._in_rows(shape))

    def _in_rows(self, shape: Shape) -> Shape:
        return Shape(shape.batch * self.unit, shape.width // self.unit, shape.targets)

    def largest_batch(self) -> Batch:
        """Build a micro-batch, for measuring only, as large as the largest of any epoch.

        Where shapes are fixed it is the largest of them. Grouped micro-batches have as many rows in
        every epoch, so only the width can differ, up to the longest row of the bucket. Packed
        sequences are filled differently in each epoch: they are taken as full, and as many as
        best-fit can leave (the sum of any two exceeds the capacity).
        """
        lengths = self._lengths
        if self.shapes is not None:
            unit = int(np.where(lengths <= self.shapes.largest.width, lengths, 0).argmax())
            shape = self._in_rows(self.shapes.largest)
            rows = self._rows_of([[unit]] * self.shapes.largest.batch)
            return filled(self._collated(rows, shape.width), shape)
        plan = self._plan(0)
        if self.mode == "grouped":
            tallest = plans.tallest(lengths // (BUCKET * self.unit), lengths)

            def bound(groups: list[list[int]]) -> tuple[int, int]:
                width = max(int(tallest[i]) for group in groups for i in group)
                return len(groups) * width, width

            groups = max(plan, key=bound)
            width = bound(groups)[1] // self.unit
            return to_the_end(self._collated(self._rows_of(groups), width))
        total = int(lengths.sum())
        sequences = sorted(
            (group for groups in plan for group in groups),
            key=lambda group: int(lengths[group].sum()),
            reverse=True,
        )
        most = max(1, -(-2 * total // self.max_length) - 1)
        count = min(max(1, self.batch_tokens // self.max_length), most)
        groups = [sequences[i % len(sequences)] for i in range(count)]
        return to_the_end(self._collated(groups, min(total, self.max_length)))

    def _collated(self, groups: Sequence[Sequence[int]], width: int) -> Batch:
        isolate = self.mode == "packed"
        settings = {"firsts": self._firsts, "isolate": isolate, "unit": self.unit}
        return collate(self.rows, groups, width=width, **settings)

    def computed(self, epoch: int = 0) -> tuple[int, float]:
        """Return the positions computed in an epoch, and Σ B·T² (what attention costs)."""
        plan = self._plan(epoch)
        if self.shapes is None:
            batch_M, width_M, _ = needed(plan, self._lengths, self._supervised).T
        else:
            batch_M, width_M, _ = self.shapes.of_each(plan).T
        positions_M = batch_M * width_M
        return int(positions_M.sum()), float((positions_M * (width_M / self.unit)).sum())


def choose_mode(
    rows: RowStore,
    batch_tokens: int,
    max_length: int,
    seed: int,
    balance: float,
    limit: int | None = None,
    *,
    packed_balance: float | None = None,
    grouped_fraction: float = 1.0,
) -> Mode:
    """Return ``grouped`` or ``packed``, whichever costs less for these rows.

    Args:
        rows: The store.
        batch_tokens: Largest B·T of a micro-batch.
        max_length: Length of packed sequences.
        seed: Of the shuffles.
        balance: The length T at which a token's attention costs as much as all else in it.
        limit: Most shapes, padded to; None for none.
        packed_balance: That length under the mask of packed sequences; None is the same.
        grouped_fraction: Fraction of the cost of grouped rows that is left where these share their
            beginnings.
    """
    costs: dict[Mode, float] = {}
    balances: dict[Mode, float] = {"grouped": balance, "packed": packed_balance or balance}
    for mode in balances:
        total, squares = Batcher(rows, batch_tokens, max_length, mode, seed, limit).computed()
        costs[mode] = total + squares / balances[mode]
    costs["grouped"] *= grouped_fraction
    return min(costs, key=lambda mode: costs[mode])
