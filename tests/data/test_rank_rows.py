"""Rows of a micro-batch on several ranks: each on one of them, evenly, and of one shape."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_slim.data.collate import Batch, collate, padded
from mlx_slim.data.rank_rows import rows_of_rank
from mlx_slim.data.shapes import Shape
from tests.support.rows import MemoryRows

ROWS = MemoryRows([5, 9, 17, 3, 30, 12, 2, 25, 8, 31])


def _batch(count: int, unit: int = 1) -> Batch:
    return collate(ROWS, [[row] for row in range(count)], isolate=False, unit=unit)


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_target_is_on_one_rank(ranks: int, unit: int) -> None:
    batch = _batch(8, unit)
    dealt = [rows_of_rank(batch, rank, ranks) for rank in range(ranks)]
    some = [one for one in dealt if one is not None]
    sources = np.concatenate([one.sources_N for one in some])
    assert sorted(sources) == sorted(batch.sources_N)
    sizes = [len(one.tokens_BT) // unit for one in some]
    assert max(sizes) - min(sizes) <= 1
    assert len(some) == min(ranks, 8 // unit)
    for one in some:
        assert one.drawn is not None
        rows_B, count, width = one.drawn
        assert (count, width) == batch.tokens_BT.shape
        assert (one.tokens_BT == batch.tokens_BT[rows_B, : one.tokens_BT.shape[1]]).all()
        assert (rows_B.reshape(-1, unit) // unit == rows_B[::unit, None] // unit).all()


def test_of_few_shapes_each_rank_has_the_same() -> None:
    batch = padded(_batch(7), Shape(8, 32, 80))
    first, second = (rows_of_rank(batch, rank, 2, fixed=True) for rank in range(2))
    assert first is not None and second is not None
    assert first.tokens_BT.shape == second.tokens_BT.shape == (4, 32)
    assert len(first.targets_N) == len(second.targets_N) == 51
    assert first.supervised_tokens + second.supervised_tokens == batch.supervised_tokens
    assert abs(first.supervised_tokens - second.supervised_tokens) < 8


def test_one_long_row_takes_the_targets_of_the_whole() -> None:
    rows = MemoryRows([60, 3, 3, 3])
    batch = padded(collate(rows, [[0], [1], [2], [3]], isolate=False), Shape(4, 60, 40))
    long, short = (rows_of_rank(batch, rank, 2, fixed=True) for rank in range(2))
    assert long is not None and short is not None
    assert len(long.targets_N) == 40 and len(short.targets_N) == 26
