"""Several rows in one sequence: best-fit packing.

Invariant: every row is placed once, whole, and no sequence is longer than the capacity. Rows are
placed in the order given; longest first gives the fewest sequences (best-fit decreasing).
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def pack_rows(lengths: np.ndarray, order: np.ndarray, capacity: int) -> list[list[int]]:
    """Return sequences as lists of row numbers.

    Args:
        lengths: Positions that each row takes, (rows,).
        order: Row numbers in the order in which they are placed.
        capacity: Positions of a sequence.

    Raises:
        ValueError: If a row is longer than the capacity.
    """
    if len(order) and int(lengths[order].max()) > capacity:
        raise ValueError(f"a row of {int(lengths.max())} positions exceeds {capacity}")
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free positions, sequence), sorted: the tightest fit first
    for row in order.tolist():
        length = int(lengths[row])
        slot = bisect_left(room, (length, -1))
        if slot == len(room):
            sequences.append([row])
            free, number = capacity - length, len(sequences) - 1
        else:
            free, number = room.pop(slot)
            sequences[number].append(row)
            free -= length
        insort(room, (free, number))
    return sequences
