"""What an evaluation is planned to do: result folders, and the memory and disk that it needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_slim.errors import ResourceError
from mlx_slim.evaluation.plan import result_folders
from mlx_slim.evaluation.run import evaluate
from tests.support.evals import write_tasks


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
