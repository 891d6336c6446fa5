"""The few shapes (B, T, N) that the micro-batches of a compiled step have, fixed before the run.

``mx.compile`` traces a step for every shape that it meets and never frees a trace, so the shapes
are chosen from the lengths of the rows alone. Invariant: the set is a pure function of the lengths,
the supervised counts, the settings and the seed; it has at most ``limit`` members; every
micro-batch of every epoch is padded to one of them, and one that would fit none is taken apart.
Widths and numbers of targets are optimal levels: no others of their count pad less. Try it:
``mlx-slim train smollm2-lora train.compile=true -o runs/compiled``.
Legend: B sequences, T positions, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import NamedTuple

import numpy as np

from mlx_slim.data.plans import Frame, Plan, Run, deal, in_batches, runs

SHAPES = 24  # traces that the compiled functions of a run may make, validation included
VALIDATION_SHAPES = 3  # of these, for held-out rows
_GRID = 256  # values that are told apart when levels are chosen
_WIDTHS = 128  # classes of length that are tried at most
_FRACTIONS = (
    np.inf,
    1.0,
    0.6,
    0.35,
)  # of a micro-batch's targets: rows with more may be batched apart
_APART = 6  # frames of these at most
_TRIED = 6  # numbers of frames of the others that are tried
_ROWS = 8192  # rows, evenly spread over all lengths, of which these trials are made
_SAMPLE = 1024  # micro-batches whose targets are counted,
_EPOCHS = 16  # in at most so many epochs
_TARGET_PRICE = 0.5  # of a padded target, against a padded position, as shares of the real ones
_HEADROOM = 101  # percent of the most targets counted, for epochs that were not


Runs = list[Run]
Counted = dict[Frame, np.ndarray]  # targets of the micro-batches of each frame


class Shape(NamedTuple):
    """B, T and N of a micro-batch."""

    batch: int
    width: int
    targets: int


class Levels:
    """The best 1, 2, … levels for some numbers, each of which is raised to the next level.

    Attributes:
        costs: Sum of all numbers, raised to one level, to two, …

    Args:
        values: Positive integers.
        most: Levels wanted at most.
    """

    def __init__(self, values: np.ndarray, most: int) -> None:
        step = -(-int(values.max()) // _GRID)
        grid, counts = np.unique(-(-values // step) * step, return_counts=True)
        self._grid = grid
        size = np.arange(len(grid))
        below = np.concatenate([[0], np.cumsum(counts)])
        # Of raising the values i..j of the grid to the last of them.
        cost = grid * (below[1:] - below[:-1, None]).astype(np.float64)
        cost[size[:, None] > size] = np.inf
        best = np.full(len(grid), np.inf)
        best[0] = 0.0
        self.costs: list[int] = []
        self._starts: list[np.ndarray] = []
        for _ in range(min(most, len(grid))):
            sums = best[:, None] + cost
            start = sums.argmin(axis=0)
            reached = sums[start, size]
            self._starts.append(start)
            self.costs.append(int(reached[-1]))
            best = np.concatenate([[np.inf], reached[:-1]])

    def levels(self, count: int) -> list[int]:
        """Return ``count`` levels, ascending; no value is above the last."""
        levels, stop = [], len(self._grid)
        for starts in reversed(self._starts[:count]):
            levels.append(int(self._grid[stop - 1]))
            stop = int(starts[stop - 1])
        return levels[::-1]


@dataclass(frozen=True)
class BatchShapes:
    """The shapes of a store's micro-batches.

    Attributes:
        shapes: In the order in which they are tried: the fewest positions, then targets, first.
        lengths: Positions that each row takes.
        supervised: Targets of each row.
    """

    shapes: tuple[Shape, ...]
    lengths: np.ndarray
    supervised: np.ndarray

    def of(self, groups: Sequence[Sequence[int]]) -> Shape | None:
        """Return the first shape that holds a micro-batch, or None."""
        (number,) = self._numbers([groups])
        return self.shapes[number] if number >= 0 else None

    def of_each(self, plan: Plan) -> np.ndarray:
        """Return B, T and N of each micro-batch of a plan of this store, int64 (M, 3)."""
        return np.array(self.shapes)[self._numbers(plan)]

    def _numbers(self, plan: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
        """Return the number of the first shape that holds each micro-batch, −1 for none."""
        needed_M3 = needed(plan, self.lengths, self.supervised)
        fits_MS = (needed_M3[:, None] <= np.array(self.shapes)).all(axis=-1)
        first_M = fits_MS.argmax(axis=1)
        return np.where(fits_MS.sum(axis=1) > 0, first_M, -1)

    def fitted(self, plan: Plan) -> Plan:
        """Return ``plan`` with the micro-batches that fit no shape taken apart."""
        fitted: Plan = []
        for groups, number in zip(plan, self._numbers(plan), strict=True):
            if number >= 0:
                fitted.append(groups)
                continue
            sequences = groups if len(groups) > 1 else [[row] for row in groups[0]]
            half = len(sequences) // 2
            fitted += self.fitted([sequences[:half], sequences[half:]])
        return fitted

    @property
    def largest(self) -> Shape:
        """The one with the most positions, the widest of these."""
        return max(self.shapes, key=lambda s: (s.batch * s.width, s.width, s.targets))


def needed(
    plan: Sequence[Sequence[Sequence[int]]], lengths: np.ndarray, supervised: np.ndarray
) -> np.ndarray:
    """Return B, T and N of each micro-batch of ``plan`` without padding, int64 (M, 3)."""
    sequences = [group for groups in plan for group in groups]
    rows = np.fromiter(chain.from_iterable(sequences), np.int64)
    first = np.cumsum([0, *map(len, sequences)])[:-1]
    batch_M = np.array([len(groups) for groups in plan])
    start_M = np.cumsum(batch_M) - batch_M
    widths = np.add.reduceat(lengths[rows], first)
    targets = np.add.reduceat(supervised[rows], first)
    columns = batch_M, np.maximum.reduceat(widths, start_M), np.add.reduceat(targets, start_M)
    return np.stack(columns, axis=1)


def _allot(counted: Counted, limit: int) -> tuple[list[Shape], list[int]]:
    """Return at most ``limit`` shapes over the frames, one level of targets more at a time.

    Args:
        counted: Targets of the micro-batches of each frame.
        limit: Not below the number of frames.

    Returns:
        The shapes, and the targets of all micro-batches, padding counted, with one shape for each
        frame, with one more, and so on.
    """
    most = max(1, limit - len(counted) + 1)
    tables = {frame: Levels(targets, most) for frame, targets in counted.items()}
    counts = dict.fromkeys(tables, 1)

    def gain(frame: Frame) -> int:
        costs, count = tables[frame].costs, counts[frame]
        return costs[count - 1] - costs[count] if count < len(costs) else 0

    totals = [sum(table.costs[0] for table in tables.values())]
    while len(counted) + len(totals) <= limit and (most := gain(best := max(tables, key=gain))) > 0:
        counts[best] += 1
        totals.append(totals[-1] - most)
    shapes = [Shape(*f, level) for f, table in tables.items() for level in table.levels(counts[f])]
    return shapes, totals


def _settled(shapes: list[Shape], lengths: np.ndarray, supervised: np.ndarray) -> BatchShapes:
    """Return the shapes in order, with room for what epochs that were not counted may ask for.

    Every row was in a micro-batch that was counted, so each fits the largest shape of its frame.
    """
    tops = {Frame(shape.batch, shape.width): shape.targets for shape in sorted(shapes)}
    settled = set()
    for batch, width, targets in shapes:
        if targets == tops[Frame(batch, width)]:
            targets = min(-(-targets * _HEADROOM // 100), batch * width)
        settled.add(Shape(batch, width, targets))
    price = _TARGET_PRICE * lengths.sum() / supervised.sum()  # of a target, in positions
    ordered = sorted(settled, key=lambda s: (s.batch * s.width + price * s.targets, s))
    return BatchShapes(tuple(ordered), lengths, supervised)


def _micro_batches(run: Run) -> int:
    return -(-len(run.rows) // run.frame.batch)


def _positions(run: Run) -> int:
    """Return the positions of a run's micro-batches, padding counted."""
    return _micro_batches(run) * run.frame.batch * run.frame.width


def _options(rows: np.ndarray, lengths: np.ndarray, budget: int, limit: int) -> dict[int, Runs]:
    """Return, by how many frames they have, the runs of ``rows`` that compute the least."""
    best: dict[int, tuple[int, Runs]] = {}
    table = Levels(lengths[rows], _WIDTHS)
    for count in range(1, len(table.costs) + 1):
        chosen_runs = runs(rows, lengths, np.array(table.levels(count)), budget)
        choices = [chosen_runs]
        if len(chosen_runs) > 1 and chosen_runs[-1].frame.batch < chosen_runs[-2].frame.batch:
            # The rest as a frame of its own, or padded with empty rows.
            choices.append([*chosen_runs[:-1], Run(chosen_runs[-1].rows, chosen_runs[-2].frame)])
        for choice in choices:
            frames = len({run.frame for run in choice})
            positions = sum(map(_positions, choice))
            if frames <= limit and positions < best.get(frames, (np.inf,))[0]:
                best[frames] = positions, choice
    return {frames: choice for frames, (_, choice) in best.items()}


def _counted(chosen_runs: Runs, supervised: np.ndarray, seed: int, epochs: int) -> Counted:
    """Return the targets of the micro-batches of each frame in the first epochs."""
    counted: dict[Frame, list[np.ndarray]] = {}
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        for run in chosen_runs:
            targets = supervised[deal(run, supervised, rng)].sum(axis=1)
            counted.setdefault(run.frame, []).append(targets)
    return {frame: np.concatenate(targets) for frame, targets in counted.items()}


@dataclass(frozen=True)
class _Store:
    """What shapes are chosen from: see ``grouped_shapes``."""

    lengths: np.ndarray
    supervised: np.ndarray
    budget: int
    seed: int

    def tried(self, rows: np.ndarray, limit: int) -> dict[int, tuple[float, int]]:
        """Return, by the number of shapes for ``rows``, the least price and its number of frames.

        A price is positions and targets, padding counted, over the real ones of the store.

        Args:
            rows: Row numbers, the longest first.
            limit: Of shapes.
        """
        if not len(rows):
            return {0: (0.0, 0)}
        sample = rows[:: -(-len(rows) // _ROWS)]
        scale = len(rows) / len(sample)
        options = _options(sample, self.lengths, self.budget, limit)
        best: dict[int, tuple[float, int]] = {}
        for frames in sorted(options)[:: -max(1, len(options) // _TRIED)]:
            chosen_runs = options[frames]
            totals = _allot(_counted(chosen_runs, self.supervised, self.seed, 1), limit)[1]
            positions = scale * sum(map(_positions, chosen_runs)) / self.lengths.sum()
            for shapes, targets in enumerate(totals, frames):
                price = positions + _TARGET_PRICE * scale * targets / self.supervised.sum()
                best[shapes] = min(best.get(shapes, (np.inf, 0)), (price, frames))
        return best

    def chosen(self, rows: np.ndarray, shapes: int, frames: int) -> tuple[list[Shape], Runs]:
        """Return shapes and runs for ``rows``."""
        options = _options(rows, self.lengths, self.budget, frames)
        chosen_runs = options[max(options)]
        epochs = min(_EPOCHS, -(-_SAMPLE // max(1, sum(map(_micro_batches, chosen_runs)))))
        return _allot(_counted(chosen_runs, self.supervised, self.seed, epochs), shapes)[
            0
        ], chosen_runs


def grouped_shapes(
    lengths: np.ndarray, supervised: np.ndarray, budget: int, seed: int, limit: int
) -> tuple[BatchShapes, Runs]:
    """Return at most ``limit`` shapes for rows of like length, and the runs to deal in each epoch.

    A row with more targets than a micro-batch has on average makes any micro-batch one of many
    targets: such rows are batched apart where that pads less.

    Args:
        lengths: Positions that each row takes.
        supervised: Targets of each row.
        budget: Largest B·T.
        seed: Of the plans.
        limit: Of shapes.
    """
    store = _Store(lengths, supervised, budget, seed)
    order = np.argsort(-lengths, kind="stable")
    average = budget * supervised.sum() / lengths.sum()
    trials = []
    for fraction in _FRACTIONS:
        many = supervised[order] > fraction * average
        apart, rest = store.tried(order[many], _APART), store.tried(order[~many], limit)
        for (few, first), (more, second) in product(apart.items(), rest.items()):
            if few + more <= limit:
                trials.append((first[0] + second[0], fraction, (few, first[1]), (more, second[1])))
    _, fraction, *counts = min(trials)
    many = supervised[order] > fraction * average
    shapes, all_runs = [], []
    for rows, (count, frames) in zip((order[many], order[~many]), counts, strict=True):
        if len(rows):
            some, some_runs = store.chosen(rows, count, frames)
            shapes, all_runs = shapes + some, all_runs + some_runs
    return _settled(shapes, lengths, supervised), all_runs


def packed_shapes(
    sequences: Callable[[int], list[list[int]]],
    lengths: np.ndarray,
    supervised: np.ndarray,
    frame: Frame,
    limit: int,
) -> tuple[BatchShapes, int]:
    """Return at most ``limit`` shapes for packed rows, and the sequences of a micro-batch.

    These are as many as fill all micro-batches alike, so that the last one is hardly padded.

    Args:
        sequences: Of an epoch.
        lengths: Positions that each row takes.
        supervised: Targets of each row.
        frame: The most sequences of a micro-batch, and the positions of each.
        limit: Of shapes.
    """
    epochs = [sequences(0)]
    while len(epochs) < _EPOCHS and sum(map(len, epochs)) < _SAMPLE * frame.batch:
        epochs.append(sequences(len(epochs)))
    most = max(map(len, epochs))
    batch = -(-most // -(-most // frame.batch))
    plan = [groups for each in epochs for groups in in_batches(each, batch)]
    counted = {Frame(batch, frame.width): needed(plan, lengths, supervised)[:, 2]}
    return _settled(_allot(counted, limit)[0], lengths, supervised), batch
