"""The gradient of a step does not depend on how its pairs or rows are cut up or computed."""

from __future__ import annotations

import shutil
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.config.preference import PreferenceConfig
from mlx_slim.data.batches import Batcher
from mlx_slim.data.shared import list_rows
from mlx_slim.data.with_prompts import WithPrompts
from mlx_slim.preferences.objective import KtoObjective, PairObjective, place
from mlx_slim.preferences.rows import MismatchedRows
from mlx_slim.preferences.scorer import RowScorer
from mlx_slim.runtime import to_float
from mlx_slim.training.step import Stepper
from mlx_slim.training.step_result import StepResult
from mlx_slim.training.validation import LossScorer, validation_loss
from tests.preferences.support import Rows
from tests.support.stock import stock_load
from tests.support.tiny import VOCAB, TinyModels

LOSSES = ("sigmoid", "ipo", "robust", "orpo", "orpo-all", "simpo", "kto")


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> Any:
    loaded, _ = stock_load(str(tiny("llama")))
    loaded.set_dtype(mx.float32)
    loaded.freeze()
    for block in loaded.model.layers:
        block.self_attn.unfreeze()
    return loaded


def _rows(unit: int, prompts: int = 8) -> Rows:
    random = np.random.default_rng(0)
    rows = []
    for _ in range(prompts):
        prompt = random.integers(3, 250, random.integers(20, 30)).tolist()
        sizes = random.integers(2, 14, unit)
        rows += [(prompt, random.integers(3, 250, size).tolist()) for size in sizes]
    return Rows(rows)


def _objective(loss: str, model: Any, num_threads: int = 1) -> tuple[Any, Any, int]:
    """Return an objective over eight pairs or rows, what batches read, and the unit."""
    if loss == "kto":
        rows, config = _rows(1), PreferenceConfig(loss="kto", desirable_weight=1.5)
        mismatched = MismatchedRows(rows, 64)
        reference = np.linspace(-40, -60, 8).astype(np.float32)
        desirable = np.array([True, False, True, True, False, True, False, True])
        scorer = RowScorer(mismatched, model, 5, VOCAB, num_threads)
        inputs = (lambda n: reference[n]), scorer, (lambda n: reference[n] - 9), desirable, 64
        return KtoObjective(config, *inputs, rows, model, 5, VOCAB, num_threads), rows, 1
    name, _, everything = loss.partition("-")
    config = PreferenceConfig(
        loss=name,  # type: ignore[arg-type]
        label_smoothing=0.1 if name == "robust" else 0,
        nll="all" if everything else "answer",
    )
    rows = _rows(2)
    view = WithPrompts(rows, 2) if everything else rows
    reference = np.linspace(-40, -60, 16).astype(np.float32)
    answers = view.answers_S if isinstance(view, WithPrompts) else None
    settings = model, 5, VOCAB, num_threads, answers
    return PairObjective(config, lambda n: reference[n], view, *settings), view, 2


def _step(objective: Any, model: Any, rows: Any, unit: int, tokens: int, **how: Any) -> StepResult:
    limit = how.pop("limit", None)
    batcher = Batcher(rows, tokens, 64, "grouped", 0, limit, unit)
    batches = [batcher.batch(groups) for groups in batcher.plan(0)]
    if tokens < 1000:
        assert len(batches) > 1
    return Stepper(model, objective, **how).step(batches)


def _same(one: StepResult, other: StepResult) -> None:
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.metrics == pytest.approx(other.metrics, rel=1e-4, abs=1e-5)
    largest = max(to_float(mx.abs(value).max()) for value in other.gradients.values())
    assert largest > 0
    for path, value in other.gradients.items():
        assert to_float(mx.abs(one.gradients[path] - value).max()) <= 5e-5 * largest, path


@pytest.mark.parametrize("loss", LOSSES)
def test_one_micro_batch_equals_several_shards_and_shared_beginnings(model: Any, loss: str) -> None:
    objective, rows, unit = _objective(loss, model)
    whole = _step(objective, model, rows, unit, 4096)
    _same(_step(objective, model, rows, unit, 160), whole)
    _same(_step(objective, model, rows, unit, 4096, num_threads=3), whole)
    shared = _step(objective, model, rows, unit, 4096, prefix_sharing=True)
    _same(shared, whole)
    if unit == 2:
        assert shared.computed < 0.75 * whole.computed
        _same(_step(objective, model, rows, 2, 4096, num_threads=3, prefix_sharing=True), whole)


@pytest.mark.parametrize("loss", LOSSES)
def test_padded_to_few_shapes(model: Any, loss: str) -> None:
    objective, rows, unit = _objective(loss, model)
    whole = _step(objective, model, rows, unit, 4096)
    padded = _step(objective, model, rows, unit, 200, limit=3)
    assert padded.supervised == whole.supervised and padded.computed > whole.tokens
    _same(padded, whole)


@pytest.mark.skipif(shutil.which("c++") is None, reason="mx.compile needs a C++ compiler")
def test_compiled(model: Any) -> None:
    objective, rows, unit = _objective("orpo-all", model)
    whole = _step(objective, model, rows, unit, 4096)
    compiled = _step(objective, model, rows, unit, 200, limit=1, compiled=True)
    assert compiled.supervised == whole.supervised and compiled.computed > whole.tokens
    _same(compiled, whole)


@pytest.mark.parametrize("loss", LOSSES)
def test_validation_is_the_same_mean(model: Any, loss: str) -> None:
    objective, rows, unit = _objective(loss, model)
    step = _step(objective, model, rows, unit, 4096)
    batcher = Batcher(rows, 160, 64, "grouped", 0, unit=unit)
    value, metrics, supervised = validation_loss(LossScorer(model, objective), batcher)
    assert value == pytest.approx(step.loss, rel=1e-5)
    assert metrics == pytest.approx(step.metrics, rel=1e-4, abs=1e-5)
    # Each micro-batch is computed whole, whoever computes it.
    side_by_side = validation_loss(LossScorer(model, objective, num_threads=3), batcher)
    assert len(batcher.plan(0)) >= 3
    assert side_by_side[0] == pytest.approx(value, rel=1e-6) and side_by_side[2] == supervised
    assert side_by_side[1] == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("unit", [1, 2])
def test_the_largest_batch_is_measured(model: Any, unit: int) -> None:
    objective, rows, unit = _objective("kto" if unit == 1 else "orpo-all", model)
    for limit in (None, 3):
        batcher = Batcher(rows, 200, 64, "grouped", 0, limit, unit)
        largest = batcher.largest_batch()
        most = max(batcher.batch(groups).computed_tokens for groups in batcher.plan(0))
        assert largest.computed_tokens >= most
        assert place(largest, objective.firsts_R).measuring
        sums, gradients = Stepper(model, objective).micro(largest)
        assert np.isfinite(np.array(sums)).all()
        assert gradients


def test_both_answers_stay_together() -> None:
    rows = _rows(2)
    batcher = Batcher(rows, 200, 64, "grouped", 0, unit=2)
    seen = []
    for groups in batcher.plan(0):
        batch = batcher.batch(groups)
        shards = batch.shards(2) + [part for way in list_rows(batch, (3,)) for part in way]
        for part in (batch, *shards):
            numbers = place(part, np.cumsum(rows.supervised) - rows.supervised).numbers_R
            assert (numbers[1::2] == numbers[::2] + 1).all()
            assert (numbers[::2] % 2 == 0).all()
        seen += [row for (row,) in groups]
    assert sorted(seen) == list(range(len(rows)))


def test_a_step_without_a_label_leaves_its_metric_out(model: Any) -> None:
    objective, rows, _ = _objective("kto", model)
    batcher = Batcher(rows, 4096, 64, "grouped", 0)
    step = Stepper(model, objective).step([batcher.batch([[0], [2]])])
    assert "rewards/chosen" in step.metrics
    assert not {"rewards/rejected", "rewards/margins"} & step.metrics.keys()
    assert all(mx.isfinite(value).all().item() for value in step.gradients.values())


def test_kto_measures_its_divergence_without_dropout(model: Any) -> None:
    objective, rows, _ = _objective("kto", model)
    batcher = Batcher(rows, 4096, 64, "grouped", 0)
    model.train()
    objective.begin_step(model, [batcher.batch(groups) for groups in batcher.plan(0)])
    assert model.training
    scorer = RowScorer(MismatchedRows(rows, 64), model, 5, VOCAB, 1)
    reference = np.linspace(-40, -60, 8).astype(np.float32) - 9
    expected = max(0.0, float((scorer(model, range(8)) - reference).mean()))
    assert objective._step[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_rows_are_scored_alike_with_shared_beginnings(model: Any, num_threads: int) -> None:
    rows, numbers = _rows(2), [5, 0, 11, 1, 4, 10, 2]
    plain = RowScorer(rows, model, 5, VOCAB, 1)(model, numbers)
    alone = [RowScorer(rows, model, 5, VOCAB, 1)(model, [number])[0] for number in numbers]
    shared = RowScorer(rows, model, 5, VOCAB, num_threads, prefix_sharing=True)(model, numbers)
    assert plain == pytest.approx(np.array(alone), rel=1e-5)
    assert shared == pytest.approx(plain, rel=1e-5)
