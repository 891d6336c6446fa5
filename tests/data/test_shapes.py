"""Shapes of compiled steps: few, fixed before the run, never exceeded, hardly padded."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from mlx_slim.data.batches import Batcher, Mode, choose_mode, collate
from mlx_slim.data.plans import Frame, Run, deal
from mlx_slim.data.shapes import SHAPES, VALIDATION_SHAPES, Levels, needed
from tests.data.test_batches import MODES, Lengths
from tests.support.rows import MemoryRows

TRAINING = SHAPES - VALIDATION_SHAPES


class Counted(Lengths):
    """Lengths with supervised counts of their own."""

    def __init__(self, lengths: np.ndarray, supervised: np.ndarray) -> None:
        super().__init__(lengths)
        self.supervised = np.clip(supervised, 1, self.lengths - 1).astype(np.int64)


def alpaca_like(rows: int, answers: str, seed: int = 0) -> Counted:
    """Rows as long as Alpaca's, of which ``half`` or 5% are answers (all alike, or any length)."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(40 + rng.lognormal(4.2, 0.8, rows), 45, 512).astype(np.int64)
    if answers == "half":
        return Counted(lengths, (lengths - 40) * rng.uniform(0.2, 1.0, rows))
    spread = rng.exponential(1.0, rows) if answers == "uneven" else 1.0
    return Counted(lengths, np.round(0.05 * lengths * spread))


def shapes_of(batcher: Batcher, epochs: int) -> np.ndarray:
    """Return B, T and N of each micro-batch of the first epochs, as it is computed."""
    plans = [batcher.plan(epoch) for epoch in range(epochs)]
    if batcher.shapes is not None:
        return np.concatenate([batcher.shapes.of_each(plan) for plan in plans])
    lengths = np.maximum(batcher.rows.lengths - 1, 1)
    return np.concatenate([needed(plan, lengths, batcher.rows.supervised) for plan in plans])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("answers", ["half", "even", "uneven"])
@pytest.mark.parametrize("budget", [2048, 8192])
def test_few_shapes_pad_little(mode: Mode, answers: str, budget: int) -> None:
    rows = alpaca_like(6000, answers)
    exact = shapes_of(Batcher(rows, budget, 512, mode, 0), 3)
    fixed = shapes_of(Batcher(rows, budget, 512, mode, 0, TRAINING), 3)
    assert len(np.unique(fixed, axis=0)) <= TRAINING < len(np.unique(exact, axis=0))
    positions = [int((shapes[:, 0] * shapes[:, 1]).sum()) for shapes in (fixed, exact)]
    assert positions[0] <= 1.05 * positions[1]
    assert fixed[:, 2].sum() <= 1.10 * exact[:, 2].sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [1, 3, TRAINING])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_rows_there_are_no_more_shapes(mode: Mode, limit: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [
        np.arange(2, 302),  # every length once
        rng.integers(2, 300, int(rng.integers(1, 400))),
        np.full(int(rng.integers(1, 60)), 77),
        np.append(rng.integers(2, 9, 100), 300),
    ][seed % 4]
    rows = Counted(lengths, lengths * rng.choice([0.02, 0.1, 1.0], len(lengths)))
    batcher = Batcher(rows, int(rng.integers(300, 900)), 300, mode, seed, limit)
    assert batcher.shapes is not None
    shapes = batcher.shapes.shapes
    assert len(set(shapes)) <= limit
    assert max(s.batch * s.width for s in shapes) <= batcher.batch_tokens
    for epoch in range(12):
        plan = batcher.plan(epoch)
        assert sorted(i for groups in plan for g in groups for i in g) == list(range(len(rows)))
        expected = needed(plan, np.maximum(rows.lengths - 1, 1), rows.supervised)
        assert (expected <= batcher.shapes.of_each(plan)).all()
        assert {tuple(shape) for shape in batcher.shapes.of_each(plan)} <= set(shapes)


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_is_the_same_in_another_process(mode: Mode) -> None:
    rows = alpaca_like(500, "half")
    batchers = [Batcher(rows, 2048, 512, mode, 3, TRAINING) for _ in range(2)]
    later = batchers[1].plan(5)  # asked for first, as a resumed run does
    assert batchers[0].plan(0) == batchers[1].plan(0) != batchers[0].plan(5) == later


@pytest.mark.parametrize("answers", ["half", "uneven"])
def test_few_rows_are_hardly_padded(answers: str) -> None:
    rows = alpaca_like(150, answers)
    exact = shapes_of(Batcher(rows, 4096, 512, "grouped", 0), 3)
    fixed = shapes_of(Batcher(rows, 4096, 512, "grouped", 0, TRAINING), 3)
    assert (fixed[:, 0] * fixed[:, 1]).sum() <= 1.02 * (exact[:, 0] * exact[:, 1]).sum()
    assert fixed[:, 2].sum() <= 1.05 * exact[:, 2].sum()


def test_levels_are_the_best_ones() -> None:
    values = np.array([3, 3, 4, 9, 10, 10, 10, 31])
    for count in range(1, 5):
        chosen = min(
            (
                sum(min(level for level in (*some, 31) if level >= value) for value in values)
                for some in combinations([3, 4, 9, 10], count - 1)
            ),
        )
        table = Levels(values, 8)
        levels = table.levels(count)
        assert len(levels) == count
        assert levels[-1] == 31
        raised = sum(min(level for level in levels if level >= value) for value in values)
        assert raised == table.costs[count - 1] == chosen


def test_dealt_micro_batches_have_nearly_equal_targets_and_other_rows_in_each_epoch() -> None:
    supervised = np.random.default_rng(0).lognormal(2, 0.7, 800).astype(np.int64) + 1
    run = Run(np.arange(800), Frame(10, 100))
    dealt = [deal(run, supervised, np.random.default_rng(epoch)) for epoch in range(2)]
    sums = supervised[dealt[0]].sum(axis=1)
    assert sums.max() <= 1.02 * sums.mean()
    joint = [{frozenset(p) for row in d.tolist() for p in combinations(row, 2)} for d in dealt]
    assert len(joint[0] & joint[1]) < 0.1 * len(joint[0])


@pytest.mark.parametrize("mode", MODES)
def test_padding_counts_for_nothing(mode: Mode) -> None:
    rows = MemoryRows(np.random.default_rng(1).integers(3, 60, 70).tolist())
    batcher = Batcher(rows, 256, 64, mode, 0, 4)
    real = supervised = 0
    for groups in batcher.plan(0):
        batch, plain = batcher.batch(groups), collate(rows, groups, isolate=mode == "packed")
        assert batcher.shapes is not None
        assert batcher.shapes.of(groups) == (*batch.tokens_BT.shape, len(batch.targets_N))
        assert batch.weights_N is not None
        retained = batch.weights_N == 1
        assert batch.targets_N[retained].tolist() == plain.targets_N.tolist()
        assert batch.sources_N[retained].tolist() == plain.sources_N.tolist()
        assert (batch.sources_N[~retained] == -1).all()
        picked = batch.tokens_BT.reshape(-1)[batch.positions_N[retained]]
        assert picked.tolist() == plain.tokens_BT.reshape(-1)[plain.positions_N].tolist()
        pieces = batch.shards(2)
        assert sum(part.supervised_tokens for part in pieces) == plain.supervised_tokens
        real, supervised = real + batch.real_tokens, supervised + batch.supervised_tokens
    assert (real, supervised) == (int(rows.lengths.sum()), int(rows.supervised.sum()))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_measured_is_the_largest_shape(mode: Mode) -> None:
    rows = MemoryRows(np.random.default_rng(2).integers(3, 60, 90).tolist())
    batcher = Batcher(rows, 256, 64, mode, 0, 6)
    largest, seen = batcher.largest_batch(), shapes_of(batcher, 20)
    assert batcher.shapes is not None
    assert (*largest.tokens_BT.shape, largest.supervised_tokens) in batcher.shapes.shapes
    assert largest.computed_tokens >= (seen[:, 0] * seen[:, 1]).max()
    computed, squares = batcher.computed()
    first = shapes_of(batcher, 1)
    assert computed == (first[:, 0] * first[:, 1]).sum()
    assert squares == (first[:, 0] * first[:, 1] ** 2).sum()


def test_the_mode_is_chosen_with_the_padding_of_few_shapes() -> None:
    rows = Lengths([*range(8, 120)])
    balance = 120.0
    assert choose_mode(rows, 480, 120, 0, balance) == "grouped"
    assert choose_mode(rows, 480, 120, 0, balance, limit=2) == "packed"
