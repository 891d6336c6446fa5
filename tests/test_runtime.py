"""The machine, where Linux's own calls and files are absent; sizes and times as text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_slim import blas, runtime


def test_nothing_about_the_machine_needs_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(
        Path, "exists", lambda path: not str(path).startswith(("/proc", "/sys")) and exists(path)
    )
    monkeypatch.setattr("sys.platform", "darwin")
    assert blas.physical_cores() == os.cpu_count()
    assert runtime.default_num_threads() == min(4, os.cpu_count() or 1)
    assert runtime.device_memory() > 1 << 30
    assert blas._activate() == blas.Status("platform")


@pytest.mark.parametrize(
    ("info", "size"),
    [
        ({"max_recommended_working_set_size": 11, "memory_size": 16}, 11),
        ({"total_memory": 85_520_809_984, "free_memory": 84_465_090_560}, 85_520_809_984),
    ],
    ids=["metal", "cuda"],
)
def test_the_budget_on_a_gpu_is_that_of_the_gpu(
    info: dict[str, Any], size: int, as_on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys are those that MLX 0.32.4 reports on either; the host's memory counts on neither."""
    monkeypatch.setattr(runtime.mx, "device_info", lambda: info)
    assert runtime.device_memory() == size


def test_float32_is_float32_unless_the_user_says_otherwise() -> None:
    code = "import os, mlx_slim; print(os.environ['MLX_ENABLE_TF32'])"
    for setting, expected in ((None, "0"), ("1", "1")):
        environment = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
        environment |= {} if setting is None else {"MLX_ENABLE_TF32": setting}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


@pytest.mark.skipif(runtime._malloc_trim() is None, reason="the C library has no malloc_trim")
def test_holes_in_the_heap_are_returned_to_the_system() -> None:
    code = """
import numpy as np
from pathlib import Path
from mlx_slim.runtime import return_free_memory
from mlx_slim.units import human_bytes, human_duration, human_seconds, parse_size

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before = resident()
arrays = [np.ones(12_000) for _ in range(2_000)]  # 192 MB, each too small for a mapping of its own
arrays = arrays[::10]
holes = resident() - before
return_free_memory()
print(holes, resident() - before, sum(float(a.sum()) for a in arrays))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    holes, left, total = map(float, done.stdout.split())
    assert holes > 150e6
    assert left < 60e6 and total == 200 * 12_000


def test_memory_is_returned_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    clock = iter([10.0, 10.5, 11.1, 11.2])
    monkeypatch.setattr(runtime, "_malloc_trim", lambda: calls.append)
    monkeypatch.setattr(runtime, "_returned", [0.0])
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for _ in range(4):
        runtime.return_free_memory()
    assert len(calls) == 2
