"""How a tensor is cut among ranks: equal slices of axis 0, the last one padded with zeros.

Invariant: the slices of all ranks, one after the other and less the padding, are the tensor; every
rank's slice has the same shape. What has fewer rows than there are ranks is kept whole on each.
Try it: ``python -m pytest tests/sharding/test_layout.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Slice:
    """The place of a tensor among ranks.

    Attributes:
        shape: Of the whole tensor.
        rows: Rows of axis 0 on each rank, padding included; 0 keeps the tensor whole on each.
    """

    shape: tuple[int, ...]
    rows: int

    @property
    def size(self) -> int:
        """Numbers of the whole tensor."""
        return math.prod(self.shape)

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of what a rank keeps."""
        return (self.rows, *self.shape[1:]) if self.rows else self.shape

    def cut(self, whole: mx.array, rank: int) -> mx.array:
        """Return the slice of ``rank``, in memory of its own once it is evaluated."""
        if not self.rows:
            return whole
        count = self.shape[0]
        begin = min(rank * self.rows, count)
        end = min(begin + self.rows, count)
        if begin == end:
            return mx.zeros(self.slice_shape, whole.dtype)
        # Taken by number: a view, and a contiguous copy of a small view, would keep all of it.
        slice_ = mx.take(whole, mx.arange(begin, end), axis=0)
        missing = self.rows - (end - begin)
        if missing:
            slice_ = mx.pad(slice_, [(0, missing)] + [(0, 0)] * (len(self.shape) - 1))
        return slice_

    def trim(self, gathered: mx.array) -> mx.array:
        """Return the whole tensor of all slices one after the other: a view without padding."""
        return gathered[: self.shape[0]] if self.rows else gathered


def slice_of(shape: tuple[int, ...], ranks: int) -> Slice:
    """Return how a tensor of ``shape`` is cut among ``ranks``."""
    if not shape or shape[0] < ranks:
        return Slice(shape, 0)
    return Slice(shape, -(-shape[0] // ranks))


@dataclass(frozen=True)
class SliceCounts:
    """What cutting a model came to.

    Attributes:
        tensors: That are cut.
        padded: Of these, those whose axis 0 the ranks do not divide.
        padding_bytes: Zeros that padding adds, over all ranks.
        uncut: Tensors that each rank holds whole.
        uncut_bytes: Of these, on each rank.
    """

    tensors: int
    padded: int
    padding_bytes: int
    uncut: int
    uncut_bytes: int

    def __str__(self) -> str:
        """Return one line for the log."""
        uncut = f"{self.uncut} kept whole ({self.uncut_bytes:,} bytes)"
        padded = f"{self.padded} of them padded ({self.padding_bytes:,} bytes)"
        return f"{self.tensors} tensors cut, {padded}; {uncut}"


def count(layout: Mapping[str, Slice], sizes: Mapping[str, int], ranks: int) -> SliceCounts:
    """Return the counts of ``layout``; ``sizes`` are the bytes of one number of each tensor."""
    cut = {path: one for path, one in layout.items() if one.rows}
    padding = {
        path: (one.rows * ranks - one.shape[0]) * math.prod(one.shape[1:]) * sizes[path]
        for path, one in cut.items()
    }
    uncut = {path: one for path, one in layout.items() if not one.rows}
    return SliceCounts(
        tensors=len(cut),
        padded=sum(nbytes > 0 for nbytes in padding.values()),
        padding_bytes=sum(padding.values()),
        uncut=len(uncut),
        uncut_bytes=sum(one.size * sizes[path] for path, one in uncut.items()),
    )
