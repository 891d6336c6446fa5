"""Loss and every gradient of the real model against PyTorch, through the real data and batches."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_slim.config.schema import DataConfig
from mlx_slim.data.batches import Batch, Batcher, collate
from mlx_slim.data.prepare import prepare
from mlx_slim.data.store import TokenStore
from mlx_slim.models.load import load
from mlx_slim.models.quantized import densify
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.step import Stepper
from mlx_slim.training.step_result import StepResult

MAX_LENGTH = 512


@dataclass(frozen=True)
class Setting:
    """The imported model in float32, all weights trainable, and the reference's rows."""

    model: nn.Module
    rows: TokenStore
    reference: dict


@pytest.fixture(scope="module")
def setting(
    smollm2: Path, data_mirror: Path, references: Path, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    reference = json.loads(
        (references / "alpaca_loss_and_gradients.json").read_text(encoding="utf-8")
    )
    with (data_mirror / "alpaca" / "train.jsonl").open(encoding="utf-8") as lines:
        every = list(lines)
    folder = tmp_path_factory.mktemp("reference")
    chosen = folder / "rows.jsonl"
    chosen.write_text("".join(every[row["row"]] for row in reference["rows"]), encoding="utf-8")
    loaded = load(smollm2, dtype=mx.float32)
    prepared = prepare(
        DataConfig(path=str(chosen), validation=0),
        loaded.tokenizer,
        max_length=MAX_LENGTH,
        seed=0,
        folder=folder,
    )
    densify(loaded.model)
    loaded.model.unfreeze()
    return Setting(loaded.model, prepared.train, reference)


def _step(setting: Setting, batches: Iterable[Batch]) -> StepResult:
    return Stepper(setting.model, CrossEntropy(setting.model)).step(batches)


def _norm(value: mx.array) -> float:
    """Return the L2 norm in float64: sums of many squares in float32 are 1e-3 off on a CPU."""
    return float(np.linalg.norm(np.array(value, dtype=np.float64)))


def _total(result: StepResult) -> float:
    return float(np.sqrt(sum(_norm(value) ** 2 for value in result.gradients.values())))


def test_rows_are_the_reference_rows(setting: Setting) -> None:
    assert len(setting.rows) == len(setting.reference["rows"])
    for i, expected in enumerate(setting.reference["rows"]):
        ids, supervised = setting.rows.row(i)
        last = int(np.flatnonzero(supervised)[-1]) + 1  # after it nothing is computed
        assert ids.tolist()[:last] == expected["ids"][:last]
        assert np.flatnonzero(supervised)[0] == expected["first_supervised"]
        assert int(supervised.sum()) == expected["supervised"]


def test_loss_and_every_gradient_norm_equal_pytorch(setting: Setting) -> None:
    batcher = Batcher(setting.rows, 2048, MAX_LENGTH, "grouped", 0)
    result = _step(setting, (batcher.batch(groups) for groups in batcher.plan(0)))
    reference = setting.reference
    assert result.supervised == reference["supervised"]
    assert result.loss == pytest.approx(reference["mean_loss"], rel=1e-4)
    assert set(result.gradients) == set(reference["gradient_norms"])
    measured = {path: _norm(value) for path, value in result.gradients.items()}
    assert measured == pytest.approx(reference["gradient_norms"], rel=1e-3)
    assert _total(result) == pytest.approx(reference["total_gradient_norm"], rel=1e-3)


def test_packed_rows_give_the_same_loss_and_gradients(setting: Setting) -> None:
    short = np.argsort(setting.rows.lengths)[:4].tolist()
    expected = [setting.reference["rows"][i] for i in short]
    packed = _step(setting, [collate(setting.rows, [short], isolate=True)])
    assert packed.supervised == sum(row["supervised"] for row in expected)
    nll = sum(row["nll_sum"] for row in expected)
    assert packed.loss == pytest.approx(nll / packed.supervised, rel=1e-4)
    norms = {path: _norm(value) for path, value in packed.gradients.items()}
    total = _total(packed)
    del packed  # 0.5 GB
    grouped = _step(setting, [collate(setting.rows, [[i] for i in short], isolate=False)])
    assert total == pytest.approx(_total(grouped), rel=1e-3)
    measured = {path: _norm(value) for path, value in grouped.gradients.items()}
    assert norms == pytest.approx(measured, rel=2e-3)
