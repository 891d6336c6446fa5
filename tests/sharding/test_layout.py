"""Slices: one after the other they are the tensor; padding and what stays whole are counted."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_slim.sharding.layout import count, slice_of
from tests.support.memory import reset_peak


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(6, 4), (7, 2), (5,), (3, 2, 2)])
def test_slices_of_all_ranks_are_the_tensor(shape: tuple[int, ...], ranks: int) -> None:
    whole = mx.random.normal(shape)
    place = slice_of(shape, ranks)
    slices = [place.cut(whole, rank) for rank in range(ranks)]
    assert {tuple(one.shape) for one in slices} == {place.slice_shape}
    if place.rows:
        assert mx.array_equal(place.trim(mx.concatenate(slices)), whole)
    else:
        assert shape[0] < ranks and all(mx.array_equal(one, whole) for one in slices)


def test_a_rank_beyond_the_last_row_has_zeros() -> None:
    place = slice_of((4, 2), 3)  # 2 rows each: the third rank has none
    assert mx.array_equal(place.cut(mx.ones((4, 2)), 2), mx.zeros((2, 2)))


def test_scalars_and_codes_stay_what_they_are() -> None:
    assert slice_of((), 2).rows == 0
    codes = mx.arange(8, dtype=mx.uint32).reshape(4, 2)
    assert slice_of((4, 2), 2).cut(codes, 1).dtype == mx.uint32


@pytest.mark.parametrize("width", [4, 1 << 10])
def test_a_slice_does_not_keep_the_whole_tensor(width: int) -> None:
    before = reset_peak()
    whole = mx.ones((1 << 10, width))
    slice_ = slice_of((1 << 10, width), 4).cut(whole, 1)
    mx.eval(slice_)
    del whole
    mx.synchronize()
    assert mx.get_active_memory() - before < 1.1 * slice_.nbytes


def test_counts_padding_and_what_is_whole() -> None:
    shapes = {"a": (6, 2), "b": (7, 2), "c": (2,)}
    layout = {path: slice_of(shape, 3) for path, shape in shapes.items()}
    counts = count(layout, dict.fromkeys(shapes, 4), 3)
    assert (counts.tensors, counts.padded, counts.padding_bytes) == (2, 1, 2 * 2 * 4)
    assert (counts.uncut, counts.uncut_bytes) == (1, 8)
    assert "1 of them padded (16 bytes)" in str(counts)
