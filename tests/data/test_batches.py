"""Plans: every row once, never over the budget, the same for the same seed and epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from mlx_slim.data.batches import BUCKET, Batcher, choose_mode, collate
from tests.support.rows import MemoryRows

Mode = Literal["grouped", "packed"]
MODES: list[Mode] = ["grouped", "packed"]


class Lengths:
    """Rows that have lengths and no ids: enough for planning."""

    def __init__(self, lengths: list[int] | np.ndarray) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.supervised = np.maximum(self.lengths // 2, 1)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("a plan reads no ids")

    def weights(self, i: int) -> None:
        """All targets count alike."""


def _random_lengths(seed: int) -> tuple[np.ndarray, int, int]:
    rng = np.random.default_rng(seed)
    max_length = int(rng.integers(8, 300))
    lengths = rng.integers(2, max_length + 1, int(rng.integers(1, 300)))
    if seed % 3 == 0:
        lengths[:] = max_length
    return lengths, max_length, int(max_length * rng.integers(1, 9) + rng.integers(0, 7))


def _area(batcher: Batcher, groups: list[list[int]]) -> int:
    lengths = np.maximum(batcher.rows.lengths - 1, 1)
    return len(groups) * max(int(lengths[group].sum()) for group in groups)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(25))
def test_every_row_once_and_within_the_budget(mode: Mode, seed: int) -> None:
    lengths, max_length, budget = _random_lengths(seed)
    batcher = Batcher(Lengths(lengths), budget, max_length, mode, seed)
    for epoch in range(3):
        plan = batcher.plan(epoch)
        rows = [i for groups in plan for group in groups for i in group]
        assert sorted(rows) == list(range(len(lengths)))
        assert max(_area(batcher, groups) for groups in plan) <= budget


@pytest.mark.parametrize("mode", MODES)
def test_plans_are_functions_of_seed_and_epoch(mode: Mode) -> None:
    rows = Lengths(np.random.default_rng(0).integers(4, 60, 200))

    def plan(seed: int, epoch: int) -> list[list[list[int]]]:
        return Batcher(rows, 256, 64, mode, seed).plan(epoch)

    assert plan(1, 4) == plan(1, 4)
    different = [plan(1, 0), plan(1, 1), plan(2, 0), plan(2, 1)]
    assert all(a != b for k, a in enumerate(different) for b in different[:k])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_rows_than_a_batch_are_a_batch(mode: Mode, count: int) -> None:
    batcher = Batcher(Lengths([20] * count), 4096, 64, mode, 0)
    (groups,) = batcher.plan(0)
    assert sorted(i for group in groups for i in group) == list(range(count))


def test_the_tail_batch_is_kept() -> None:
    plan = Batcher(Lengths([33] * 10), 128, 64, "grouped", 0).plan(0)
    assert sorted(len(groups) for groups in plan) == [2, 4, 4]


def test_rows_of_max_length_fill_the_budget() -> None:
    plan = Batcher(Lengths([64] * 8), 4 * 63, 64, "grouped", 0).plan(0)
    assert [len(groups) for groups in plan] == [4, 4]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(12))
def test_largest_batch_bounds_every_epoch(mode: Mode, seed: int) -> None:
    lengths, max_length, budget = _random_lengths(seed)
    batcher = Batcher(MemoryRows(lengths.tolist()), budget, max_length, mode, seed)
    largest = batcher.largest_batch()
    areas = [_area(batcher, groups) for epoch in range(40) for groups in batcher.plan(epoch)]
    assert max(areas) <= largest.computed_tokens <= budget
    assert sum(part.computed_tokens for part in largest.shards(2)) == largest.computed_tokens
    if mode == "grouped":  # and it is no larger than a bucket makes it
        rows = len(largest.tokens_BT)
        assert largest.computed_tokens < max(areas) + rows * BUCKET


def test_largest_batch_of_few_packed_rows_is_not_a_full_one() -> None:
    batcher = Batcher(MemoryRows([40, 40]), 4096, 512, "packed", 0)
    assert batcher.largest_batch().tokens_BT.shape == (1, 78)


def test_collate_of_padded_rows() -> None:
    rows = Hand()
    batch = collate(rows, [[0], [1]], isolate=False)
    #   row 0  ids 10 11 12 13     targets 12 13         inputs 10 11 12
    #   row 1  ids 20 21 22        target 21, 22 is not  inputs 20
    assert batch.tokens_BT.tolist() == [[10, 11, 12], [20, 0, 0]]
    assert batch.positions_N.tolist() == [1, 2, 3]
    assert batch.targets_N.tolist() == [12, 13, 21]
    assert batch.sources_N.tolist() == [0, 1, 2]
    assert batch.segments_BT is None
    assert (batch.real_tokens, batch.rows) == (7, 2)
    assert (batch.computed_tokens, batch.supervised_tokens) == (6, 3)


def test_collate_of_packed_rows() -> None:
    batch = collate(Hand(), [[1, 0], [2]], isolate=True)
    assert batch.tokens_BT.tolist() == [[20, 10, 11, 12], [30, 31, 0, 0]]
    assert batch.segments_BT is not None
    assert batch.segments_BT.tolist() == [[0, 1, 1, 1], [0, 0, -1, -1]]
    assert batch.positions_N.tolist() == [0, 2, 3, 4, 5]
    assert batch.targets_N.tolist() == [21, 12, 13, 31, 32]
    assert batch.sources_N.tolist() == [2, 0, 1, 3, 4]
    halves = batch.shards(2)
    assert [part.sources_N.tolist() for part in halves] == [[2, 0, 1], [3, 4]]
    assert (batch.real_tokens, batch.rows) == (10, 3)


def test_collate_can_be_widened() -> None:
    plain = collate(Hand(), [[0], [1]], isolate=False)
    wide = collate(Hand(), [[0], [1]], isolate=False, width=5)
    assert wide.tokens_BT.shape == (2, 5)
    assert wide.targets_N.tolist() == plain.targets_N.tolist()
    picked = wide.tokens_BT.reshape(-1)[wide.positions_N]
    assert picked.tolist() == plain.tokens_BT.reshape(-1)[plain.positions_N].tolist()


class Hand:
    """Three rows written by hand; the last id of row 1 is no target."""

    lengths = np.array([4, 3, 3])
    supervised = np.array([2, 1, 2])
    _ids = ([10, 11, 12, 13], [20, 21, 22], [30, 31, 32])
    _masks = ([0, 0, 1, 1], [0, 1, 0], [0, 1, 1])

    def __len__(self) -> int:
        return 3

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self._ids[i], np.int32), np.array(self._masks[i], bool)

    def weights(self, i: int) -> None:
        """All targets count alike."""


def test_packing_is_chosen_where_attention_is_cheap() -> None:
    # Lengths spread so thin that a batch of like lengths needs padding.
    short = Lengths([*range(8, 40), 500])
    assert choose_mode(short, 512, 512, 0, balance=1e9) == "packed"
    assert choose_mode(short, 512, 512, 0, balance=50.0) == "grouped"
    assert choose_mode(short, 512, 512, 0, balance=1e9, packed_balance=50.0) == "grouped"


class _Counted(np.ndarray):
    """Counts the elements that numpy operations give out."""

    elements = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [x.view(np.ndarray) if isinstance(x, _Counted) else x for x in inputs]
        result = getattr(ufunc, method)(*plain, **options)
        if isinstance(result, np.ndarray) and result.ndim:
            _Counted.elements += result.size
            return result.view(_Counted)
        return result


@pytest.mark.parametrize("max_length", [40, 128])
def test_choosing_the_mode_is_linear_in_the_rows(max_length: int) -> None:
    def elements(rows: int) -> int:
        lengths = np.random.default_rng(0).integers(2, 41, rows)
        counted = Lengths(lengths)
        counted.lengths = counted.lengths.view(_Counted)
        _Counted.elements = 0
        choose_mode(counted, 1024, max_length, 0, balance=1e9)
        return _Counted.elements

    few, many = elements(1000), elements(8000)
    assert few > 0
    assert many <= 8.5 * few
    assert many <= 40 * 8000


def test_grouped_padding_of_real_lengths_is_small(data_mirror: Path) -> None:
    lengths = []
    with (data_mirror / "alpaca" / "train.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)  # about 4 bytes a token, and 30 tokens of template
            text = row["instruction"] + row["input"] + row["output"]
            lengths.append(min(512, 30 + len(text.encode()) // 4))
    batcher = Batcher(Lengths(lengths), 2048, 512, "grouped", 0)
    computed, _ = batcher.computed()
    real = int(np.maximum(batcher.rows.lengths - 1, 1).sum())
    assert 0 <= 1 - real / computed < 0.05
