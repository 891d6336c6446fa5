"""Which rows make up each micro-batch of an epoch, from their lengths.

Invariant: a plan is a pure function of its arguments and the state of ``rng``; every row is in it
exactly once, and no micro-batch of several rows computes more than the budget, padding counted.
Legend: B sequences, T positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlx_slim.data.pack import pack_rows

_ROUNDS = 24  # in which micro-batches exchange rows, at most,
_EVEN = 0.01  # until their targets differ by no more than this share,
_CHOICE = 12  # each one of these many rows

Plan = list[list[list[int]]]  # micro-batches of sequences of row numbers


class Frame(NamedTuple):
    """B and T of a micro-batch."""

    batch: int
    width: int


class Run(NamedTuple):
    """Rows that share micro-batches of one frame in every epoch; they fill all of these but one."""

    rows: np.ndarray
    frame: Frame


def by_class(classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return row numbers, highest class first, each class in random order."""
    order = rng.permutation(len(classes))
    return order[np.argsort(-classes[order], kind="stable")]


def tallest(classes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return, for each row, the greatest length in its class."""
    longest = np.zeros(int(classes.max()) + 1, dtype=np.int64)
    np.maximum.at(longest, classes, lengths)
    return longest[classes]


def grouped(
    classes: np.ndarray, lengths: np.ndarray, budget: int, rng: np.random.Generator
) -> Plan:
    """Return micro-batches of rows of like length, padded area within the budget."""
    order = by_class(classes, rng)
    # Within a class the longest row may come late: it decides how many fit, so that the number of
    # rows in each micro-batch is the same in every epoch.
    widths = tallest(classes, lengths)
    batches: Plan = []
    start = 0
    while start < len(order):
        count = max(1, budget // int(widths[order[start]]))
        batches.append([[int(i)] for i in order[start : start + count]])
        start += count
    return batches


def packed(
    lengths: np.ndarray, order: np.ndarray, capacity: int, rng: np.random.Generator
) -> list[list[int]]:
    """Return sequences in random order, each filled with several rows up to ``capacity``."""
    sequences = pack_rows(lengths, order, capacity)
    rng.shuffle(sequences)
    return sequences


def in_batches(sequences: list[list[int]], count: int) -> Plan:
    """Return ``sequences`` in micro-batches of ``count``; the last may have fewer."""
    return [sequences[i : i + count] for i in range(0, len(sequences), count)]


def runs(rows: np.ndarray, lengths: np.ndarray, levels: np.ndarray, budget: int) -> list[Run]:
    """Return ``rows`` as runs with a width for each level.

    The last micro-batch of a width is filled up with the longest rows of the next one, so only the
    very last of all is smaller: it is a run of its own.

    Args:
        rows: Row numbers, the longest first.
        lengths: Positions that each row of the store takes.
        levels: Largest length of each class, ascending.
        budget: Largest B·T, unless one row is longer.
    """
    chosen, start, descending = [], 0, -lengths[rows]
    while start < len(rows):
        width = -int(descending[start])
        batch = max(1, budget // width)
        below = int(np.searchsorted(levels, width))
        stop = int(np.searchsorted(descending, -levels[below - 1])) if below else len(rows)
        count = min(-(-(stop - start) // batch), (len(rows) - start) // batch)
        batch = batch if count else len(rows) - start
        stop = start + max(1, count) * batch
        chosen.append(Run(rows[start:stop], Frame(batch, width)))
        start = stop
    return chosen


def deal(run: Run, supervised: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the rows of a run in random micro-batches of nearly equal targets, (micro-batches, B).

    Dealt at random; then the micro-batch with the most targets exchanges a row with the one that
    has the fewest, the second with the last but one, and so on, until little is left to even out.
    """
    batch = min(run.frame.batch, len(run.rows))
    dealt = rng.permutation(run.rows).reshape(-1, batch)
    sums = supervised[dealt].sum(axis=1)
    for _ in range(_ROUNDS if batch > 1 else 0):
        order = np.argsort(sums)
        low, high = order[: len(order) // 2], order[::-1][: len(order) // 2]
        apart = sums[high] - sums[low] > _EVEN * sums.mean()
        if not apart.any():
            break
        low, high = low[apart], high[apart]
        more_P = sums[high] - sums[low]
        columns = rng.permutation(batch)[:_CHOICE]
        high_PC = supervised[dealt[high][:, columns]]
        low_PC = supervised[dealt[low][:, columns]]
        left_PX = np.abs(more_P[:, None, None] - 2 * (high_PC[:, :, None] - low_PC[:, None]))
        left_PX = left_PX.reshape(len(low), -1)
        best = left_PX.argmin(axis=1)
        better = left_PX[np.arange(len(low)), best] < more_P
        low, high, best = low[better], high[better], best[better]
        i, j = columns[best // len(columns)], columns[best % len(columns)]
        dealt[high, i], dealt[low, j] = dealt[low, j], dealt[high, i]
        sums = supervised[dealt].sum(axis=1)
    return dealt
