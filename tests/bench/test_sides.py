"""Compiled against not compiled: what is timed is what was traced before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.bench import sides, train
from mlx_slim.bench.options import BenchTrainOptions
from mlx_slim.data.shapes import SHAPES
from tests.support.runs import write_rows
from tests.support.tiny import TinyModels


def test_a_compiled_side_times_the_shapes_that_it_has_met(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple] = []

    def compiled(function: Any, **_: Any) -> Any:
        def call(parameters: Any, *arrays: Any) -> Any:
            if len(arrays) > 3:  # a step: tokens, positions, targets, segments
                called.append(tuple(np.shape(array) for array in arrays))
            return function(parameters, *arrays)

        return call

    monkeypatch.setattr(mx, "compile", compiled)
    rows = str(write_rows(tmp_path / "rows.jsonl", 120))
    work = sides.TrainWork(str(tiny("llama")), rows, "lora", 2, 96, "float32", compile=True)
    ours = sides.ours(work)
    assert 2 <= ours["shapes"] == len(set(called)) <= SHAPES
    second = called[len(called) // 2 :]
    assert ours["steps"] == sum(
        shape in called[: len(called) // 2 + index] for index, shape in enumerate(second)
    )
    assert ours["first_epoch_seconds"] > 0
    eager = sides.ours(replace(work, compile=False))
    assert eager["steps"] == len(called) // 2 or eager["shapes"] > SHAPES
    assert eager["tokens"] >= ours["tokens"] > 0


def test_against_eager_the_same_method_runs_compiled_and_not(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run_side(module: str, side: str, work: dict[str, Any]) -> dict[str, Any]:
        seen.append((side, work["method"], work["compile"]))
        return {"tokens_per_second": 2.0 if work["compile"] else 1.0, "peak_memory_bytes": 1}

    monkeypatch.setattr(train, "run_side", run_side)
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    options = BenchTrainOptions(data=str(rows), against="eager", rows=12, rounds=1)
    record = train.bench_train(str(tiny("llama")), options, lambda line: None)
    assert seen == [("ours", "lora", True), ("ours", "lora", False)]
    assert record["ratio"]["speed"] == 2.0 and record["work"]["against"] == "eager"
