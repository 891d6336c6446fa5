"""What an evaluation is planned to do: result folders, and the memory and disk that it needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_slim.errors import ResourceError
from mlx_slim.evaluation.options import EvalOptions
from mlx_slim.evaluation.plan import result_folders
from mlx_slim.evaluation.run import evaluate
from mlx_slim.evaluation.scoring import loglikelihood
from mlx_slim.models import opening
from mlx_slim.models.half_weights import HalfLinear, keep_half
from tests.support.evals import write_tasks
from tests.support.tiny import tiny_model


def test_folders_are_named_safely_and_apart() -> None:
    out = Path("out")
    sources = ["a/x", "b/x", "owner/X", "../odd name:1", "/"]
    assert [folder.name for folder in result_folders(sources, out)] == [
        *["x", "x-2", "X-3"],
        *["odd-name-1", "model"],
    ]
    assert result_folders(["a/x"], out) == [out]


def test_too_little_memory_or_disk_is_refused_before_the_start(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = str(write_tasks(tmp_path)[0])
    monkeypatch.setattr("mlx_slim.runtime.device_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="the device has"):
        evaluate(tiny("llama"), task, tmp_path / "out")
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="the disk has"):
        evaluate(tiny("llama"), task, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_choices_are_scored_in_16_bits_where_that_is_fast_or_nothing_else_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    model = tiny_model(tmp_path / "m", dtype=mx.bfloat16, **shape)
    choices, generated = (str(task) for task in write_tasks(tmp_path)[:2])
    cast: list[nn.Module] = []
    monkeypatch.setattr(opening, "keep_half", lambda model: (cast.append(model), keep_half(model)))

    def stays_half(name: str, task: str = choices) -> bool:
        cast.clear()
        evaluate(model, task, tmp_path / name, EvalOptions(limit=4))
        return any(isinstance(one, HalfLinear) for each in cast for one in each.modules())

    assert not stays_half("generated", generated) and not cast
    assert stays_half("lists")
    with monkeypatch.context() as rows:
        rows.setattr(loglikelihood, "longest_row", lambda _: 0)
        assert not stays_half("rows") and cast  # and widened again
    monkeypatch.setattr("mlx_slim.runtime.device_memory", lambda: 28_000_000)
    assert stays_half("little")
    monkeypatch.setattr(loglikelihood, "longest_row", lambda _: 0)
    assert stays_half("little-rows")
    names = ("lists", "little", "rows", "little-rows")
    answers = [next((tmp_path / name).glob("samples_*")).read_text() for name in names]
    assert answers[0] == answers[1] and answers[2] == answers[3]
    with pytest.raises(ResourceError, match="the device has"):
        evaluate(model, generated, tmp_path / "too-large", EvalOptions(limit=4))
