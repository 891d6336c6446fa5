"""Several rows in one sequence: best-fit packing.

Invariant: every row is placed once, whole, and no sequence is longer than the capacity. Rows are
placed in the order given; longest first gives the fewest sequences (best-fit decreasing). Time is
n log n in the rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush

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
    # Sequences by how many positions are free in them. There are at most capacity + 1 different
    # sizes, so that placing a row never costs more because there are more rows.
    open_by_size: dict[int, list[int]] = {}  # free positions → heap of sequence numbers
    sizes: list[int] = []  # the keys of open_by_size, sorted: the tightest fit first
    for row in order.tolist():
        length = int(lengths[row])
        slot = bisect_left(sizes, length)
        if slot == len(sizes):
            sequences.append([row])
            free, number = capacity - length, len(sequences) - 1
        else:
            size = sizes[slot]
            number = heappop(open_by_size[size])
            if not open_by_size[size]:
                del open_by_size[size], sizes[slot]
            sequences[number].append(row)
            free = size - length
        if free not in open_by_size:
            open_by_size[free] = []
            insort(sizes, free)
        heappush(open_by_size[free], number)
    return sequences
