"""A compiled run traces few shapes, keeps no more, and trains as an uncompiled one does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim import events
from mlx_slim.config.train import TrainConfig
from mlx_slim.data.batches import Batcher, Mode, collate, padded
from mlx_slim.data.shapes import SHAPES, VALIDATION_SHAPES, Shape
from mlx_slim.distillation.losses import DistillationLoss
from mlx_slim.distillation.mutual import ModelPair, MutualObjective
from mlx_slim.distillation.objective import DistillationObjective
from mlx_slim.distillation.target_cache import PlaceholderTargets, TargetLayout
from mlx_slim.runtime import to_float
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.loop import Loop
from mlx_slim.training.objective import Arrays, Objective
from mlx_slim.training.step import Stepper
from mlx_slim.training.validation import LossScorer
from tests.support.rows import MemoryRows
from tests.support.stock import stock_load
from tests.support.tiny import VOCAB, TinyModels, tiny_model

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None, reason="mx.compile needs a C++ compiler on a CPU"
)
ROWS = MemoryRows(np.random.default_rng(0).integers(3, 60, 60).tolist())


class Traced(CrossEntropy):
    """Counts the calls of the loss: in a compiled run each is a trace."""

    calls = 0

    def __call__(self, model: Any, arrays: Arrays, *, gradient: bool) -> mx.array:
        self.calls += 1
        return super().__call__(model, arrays, gradient=gradient)


def _loop(out: Path, rows: MemoryRows, mode: Mode, **settings: Any) -> Loop:
    model, _ = stock_load(str(tiny_model(out / "model", num_hidden_layers=1)))
    model.freeze()
    model.model.layers[-1].mlp.down_proj.unfreeze()
    config = TrainConfig(**{"batch_tokens": 128, "max_length": 64, "epochs": 3, **settings})
    validation = MemoryRows(np.random.default_rng(5).integers(3, 60, 40).tolist())
    limits = SHAPES - VALIDATION_SHAPES, VALIDATION_SHAPES
    batcher, validator = (
        Batcher(some, config.batch_tokens, config.max_length, mode, 0, limit)
        for some, limit in zip((rows, validation), limits, strict=True)
    )
    objective, observer = Traced(model, chunk=64), events.Broadcast([])
    return Loop(model, objective, config, batcher, validator, observer, out, compiled=True)


def _resident() -> int:
    """Return the bytes of this process that lie in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("mode", ["grouped", "packed"])
def test_a_run_of_three_epochs_traces_no_more_than_its_shapes(tmp_path: Path, mode: Mode) -> None:
    rows = MemoryRows(np.random.default_rng(3).integers(3, 60, 250).tolist())
    loop = _loop(tmp_path, rows, mode, validate_every=40)
    assert isinstance(loop.objective, Traced)
    loop.preflight()
    loop.run()
    assert loop.state.step > 4 * SHAPES
    assert loop.objective.calls <= SHAPES


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="resident memory is read on Linux"
)
def test_host_memory_does_not_grow_with_the_batches(tmp_path: Path) -> None:
    rows = MemoryRows(np.random.default_rng(4).integers(3, 60, 1200).tolist())
    loop = _loop(tmp_path, rows, "grouped", epochs=1)
    plan = loop.batcher.plan(0)
    assert len(plan) >= 250
    sizes = []
    for number, groups in enumerate([*plan, *loop.batcher.plan(1)][:500], 1):
        loop.stepper.micro(loop.batcher.batch(groups))
        if number in (50, 500):
            sizes.append(_resident())
    assert sizes[1] - sizes[0] < 20e6


def _objective(kind: str, folder: Path, tmp_path: Path) -> tuple[Any, Objective]:
    """Return a model and what it minimises."""
    model: Any = stock_load(str(folder))[0]
    total = int(ROWS.supervised.sum())
    if kind == "mutual":
        pair = ModelPair(model, stock_load(str(tiny_model(tmp_path / "other", seed=1)))[0])
        return pair, MutualObjective(pair, "symmetric", 2.0, 0.5, chunk=16)
    if kind in ("distilled", "divergence"):
        token_loss = DistillationLoss("reverse", 2.0, 0.5 if kind == "distilled" else 1.0)
        return model, DistillationObjective(
            token_loss, [PlaceholderTargets(TargetLayout(len(ROWS), total, 4, VOCAB))], model, 16
        )
    weights_S = np.random.default_rng(0).uniform(0.2, 2, total).astype(np.float32)
    return model, CrossEntropy(model, 16, weights_S=weights_S if kind == "weighted" else None)


@pytest.mark.parametrize("mode", ["grouped", "packed"])
@pytest.mark.parametrize("kind", ["plain", "weighted", "distilled", "divergence", "mutual"])
def test_padding_changes_no_loss_and_no_gradient(
    tiny: TinyModels, tmp_path: Path, mode: Mode, kind: str
) -> None:
    model, objective = _objective(kind, tiny("llama"), tmp_path)
    plan = Batcher(ROWS, 200, 64, mode, 0).plan(0)[:4]
    exact = [collate(ROWS, groups, isolate=mode == "packed") for groups in plan]
    batches = [
        padded(batch, Shape(b + 2, t + 3, batch.supervised_tokens + 5))
        for batch in exact
        for b, t in [batch.tokens_BT.shape]
    ]
    ours, plain = (Stepper(model, objective).step(some) for some in (batches, exact))
    assert (ours.supervised, ours.tokens) == (plain.supervised, plain.tokens)
    assert ours.loss == pytest.approx(plain.loss, rel=1e-5)
    assert ours.metrics == pytest.approx(plain.metrics, rel=1e-4)
    for path, value in plain.gradients.items():
        scale = to_float(mx.abs(value).max()) + 1e-6
        assert to_float(mx.abs(ours.gradients[path] - value).max()) < 1e-3 * scale, path
    score = LossScorer(model, objective)
    for batch, same in zip(batches, exact, strict=True):
        assert np.allclose(np.array(score(batch)), np.array(score(same)), rtol=1e-5)


@pytest.mark.parametrize("mode", ["grouped", "packed"])
def test_a_compiled_step_of_fixed_shapes_equals_an_exact_one(tmp_path: Path, mode: Mode) -> None:
    loop = _loop(tmp_path, ROWS, mode)
    plan = loop.batcher.plan(0)
    exact = [collate(ROWS, groups, isolate=mode == "packed") for groups in plan]
    ours = loop.stepper.step(loop.batcher.batch(groups) for groups in plan)
    plain = Stepper(loop.model, CrossEntropy(loop.model, chunk=64)).step(exact)
    assert ours.loss == pytest.approx(plain.loss, rel=1e-5)
    for path, value in plain.gradients.items():
        assert mx.allclose(ours.gradients[path], value, rtol=1e-3, atol=1e-6), path
    score = LossScorer(loop.model, loop.objective)
    for groups, batch in zip(plan, exact, strict=True):
        sums = loop.scorer(loop.batcher.batch(groups))
        assert sums.item() == pytest.approx(score(batch).item(), rel=1e-5)
