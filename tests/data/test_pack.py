"""Best-fit packing: every row once, never over the capacity, near the fewest sequences."""

from __future__ import annotations

from bisect import insort

import numpy as np
import pytest

from mlx_slim.data import pack
from mlx_slim.data.pack import pack_rows


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    return np.argsort(-lengths, kind="stable")


@pytest.mark.parametrize("seed", range(30))
def test_every_row_once_and_within_the_capacity(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(8, 600))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 400)))
    sequences = pack_rows(lengths, rng.permutation(len(lengths)), capacity)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(len(lengths)))
    filled = [int(lengths[sequence].sum()) for sequence in sequences]
    assert max(filled) <= capacity
    if len(filled) > 1:  # a sequence is opened only when no other has room
        assert sum(sorted(filled)[:2]) > capacity


@pytest.mark.parametrize("seed", range(10))
def test_longest_first_is_near_the_lower_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4.2, 0.6, 2000).astype(np.int64), 8, 512)
    sequences = pack_rows(lengths, _longest_first(lengths), 512)
    assert len(sequences) <= 1.02 * np.ceil(lengths.sum() / 512) + 1


def test_the_tightest_fit_is_taken() -> None:
    lengths = np.array([6, 5, 4, 3])
    # 4 goes beside 6 (nothing left), not beside 5; 3 then goes beside 5.
    assert pack_rows(lengths, np.arange(4), 10) == [[0, 2], [1, 3]]


def test_a_row_as_long_as_the_capacity_stands_alone() -> None:
    assert pack_rows(np.array([8, 8, 1]), np.arange(3), 8) == [[0], [1], [2]]


def test_a_row_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 9 positions exceeds 8"):
        pack_rows(np.array([3, 9]), np.arange(2), 8)


def test_no_rows_give_no_sequences() -> None:
    assert pack_rows(np.array([], dtype=np.int64), np.array([], dtype=np.int64), 8) == []


@pytest.mark.parametrize("longest_first", [True, False])
def test_the_work_of_a_row_does_not_grow_with_the_rows(
    longest_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = []

    def counting(entries: list[int], entry: int) -> None:
        looked_at.append(len(entries))  # what an insertion may move
        insort(entries, entry)

    monkeypatch.setattr(pack, "insort", counting)
    # More than half of the capacity: no two rows share a sequence, so all 20,000 stay open.
    lengths = np.random.default_rng(0).integers(9, 17, 20_000)
    order = _longest_first(lengths) if longest_first else np.arange(len(lengths))
    assert len(pack_rows(lengths, order, 16)) == 20_000
    assert max(looked_at) <= 16 + 1
    assert sum(looked_at) <= 20_000 * 17
