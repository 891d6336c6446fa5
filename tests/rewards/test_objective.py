"""One step of the policy, however its answers are cut into micro-batches and shards."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.config.reward import LossType
from mlx_slim.data.batches import Batch, Batcher, collate
from mlx_slim.data.shapes import SHAPES
from mlx_slim.rewards.losses import METRICS, PolicyLoss
from mlx_slim.rewards.objective import PolicyColumns, PolicyObjective
from mlx_slim.training.step import Stepper
from mlx_slim.training.step_result import StepResult
from tests.support.rows import MemoryRows
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels
from tests.training.test_step import GROUPED, LENGTHS, PACKED, SEPARATE, _differing

ROWS = MemoryRows(LENGTHS)
TOKENS = ROWS.supervised
LEARNED = np.arange(len(ROWS)) != 2  # the third answer is masked
LONGEST = 64
LOSS_TYPES: list[LossType] = ["grpo", "bnpo", "dr_grpo", "dapo"]


def round_columns(loss_type: LossType) -> PolicyColumns:
    rng = np.random.default_rng(5)
    count = int(TOKENS.sum())
    return PolicyColumns.of(
        loss_type,
        LONGEST,
        TOKENS,
        LEARNED,
        rng.normal(size=len(ROWS)),
        rng.normal(-5.5, 0.3, count),
        rng.normal(-5.5, 0.3, count),
    )


def step(
    folder: Path,
    loss_type: LossType,
    plan: list[list[list[int]]],
    *,
    isolate: bool = False,
    num_threads: int = 1,
) -> StepResult:
    model, _ = stock_load(str(folder))
    columns = round_columns(loss_type)
    objective = PolicyObjective(PolicyLoss(beta=0.04), lambda: columns, model, chunk=16)
    stepper = Stepper(model, objective, num_threads=num_threads)
    return stepper.step(collate(ROWS, groups, isolate=isolate) for groups in plan)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_cut_gives_one_loss_and_gradient(tiny: TinyModels, loss_type: LossType) -> None:
    plain = step(tiny(), loss_type, SEPARATE)
    for plan, isolate, num_threads in ((GROUPED, False, 1), (GROUPED, False, 2), (PACKED, True, 3)):
        ours = step(tiny(), loss_type, plan, isolate=isolate, num_threads=num_threads)
        assert _differing(ours, plain) == []
        assert ours.metrics == pytest.approx(plain.metrics, rel=1e-4)
    assert plain.metrics["clip_low"] > 0 and plain.metrics["clip_high"] > 0
    assert set(plain.metrics) == set(METRICS)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_divisor_of_a_whole_round(loss_type: LossType) -> None:
    answers, tokens = len(ROWS), int(TOKENS[LEARNED].sum())
    expected = {
        "grpo": answers,
        "bnpo": tokens,
        "dr_grpo": answers * LONGEST,
        "dapo": tokens,
    }[loss_type]
    columns = round_columns(loss_type)
    assert columns.divisor_S.sum() == pytest.approx(expected)
    first = int(TOKENS[0])
    each = {"grpo": 1 / first}.get(loss_type, 1.0)
    assert columns.weight_S[:first].tolist() == pytest.approx([each] * first)


def test_padding_changes_nothing(tiny: TinyModels) -> None:
    model, _ = stock_load(str(tiny()))
    columns = round_columns("grpo")
    objective = PolicyObjective(PolicyLoss(beta=0.04), lambda: columns, model, chunk=16)
    batcher = Batcher(ROWS, 64, 32, "grouped", 0, SHAPES)
    padded = [batcher.batch(groups) for groups in batcher.plan(0)]
    assert any(batch.weights_N is not None and not batch.weights_N.all() for batch in padded)
    ours = Stepper(model, objective).step(padded)
    assert _differing(ours, step(tiny(), "grpo", SEPARATE)) == []


def test_a_batch_for_measuring_needs_no_round(tiny: TinyModels) -> None:
    model, _ = stock_load(str(tiny()))
    nothing = np.empty(0, np.float32)
    empty = PolicyColumns(nothing, nothing, nothing, nothing, nothing)
    objective = PolicyObjective(PolicyLoss(beta=0.04), lambda: empty, model, chunk=16)
    largest: Batch = Batcher(ROWS, 64, 32, "grouped", 0).largest_batch()
    sums, gradients = Stepper(model, objective).micro(largest)
    assert bool(mx.isfinite(sums).all())
    assert gradients and all(bool(mx.isfinite(value).all()) for value in gradients.values())
