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
from mlx_slim.models import opening
from mlx_slim.models.half_weights import keep_half
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


def test_what_fits_in_16_bits_alone_is_scored_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    model = tiny_model(tmp_path / "m", dtype=mx.bfloat16, **shape)
    choices, generated = (str(task) for task in write_tasks(tmp_path)[:2])
    cast: list[nn.Module] = []
    monkeypatch.setattr(opening, "keep_half", lambda model: (cast.append(model), keep_half(model)))
    evaluate(model, choices, tmp_path / "wide", EvalOptions(limit=4))
    assert not cast
    monkeypatch.setattr("mlx_slim.runtime.device_memory", lambda: 28_000_000)
    evaluate(model, choices, tmp_path / "half", EvalOptions(limit=4))
    assert len(cast) == 1 and "HalfLinear" in {type(one).__name__ for one in cast[0].modules()}
    answers = [next((tmp_path / name).glob("samples_*")).read_text() for name in ("wide", "half")]
    assert answers[0] == answers[1]
    with pytest.raises(ResourceError, match="the device has"):
        evaluate(model, generated, tmp_path / "generated", EvalOptions(limit=4))
