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
from mlx_slim.data.shapes import BatchShapes, grouped_shapes, needed, packed_shapes

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
    """

    rows: RowStore
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
    def _grouped(self) -> tuple[BatchShapes, list[Run]]:
        assert self.limit is not None
        supervised = self.rows.supervised
        return grouped_shapes(self._lengths, supervised, self.batch_tokens, self.seed, self.limit)

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

    def largest_batch(self) -> Batch:
        """Build a micro-batch, for measuring only, as large as the largest of any epoch.

        Where shapes are fixed it is the largest of them. Grouped micro-batches have as many rows in
        every epoch, so only the width can differ, up to the longest row of the bucket. Packed
        sequences are filled differently in each epoch: they are taken as full, and as many as
        best-fit can leave (the sum of any two exceeds the capacity).
        """
        lengths = self._lengths
        if self.shapes is not None:
            shape = self.shapes.largest
            row = int(np.where(lengths <= shape.width, lengths, 0).argmax())
            return filled(self._collated([[row]] * shape.batch, shape.width), shape)
        plan = self.plan(0)
        if self.mode == "grouped":
            tallest = plans.tallest(lengths // BUCKET, lengths)

            def bound(groups: list[list[int]]) -> tuple[int, int]:
                width = max(int(tallest[i]) for group in groups for i in group)
                return len(groups) * width, width

            groups = max(plan, key=bound)
            return to_the_end(self._collated(groups, bound(groups)[1]))
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
