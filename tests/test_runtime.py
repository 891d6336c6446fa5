"""The machine, where Linux's own calls and files are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlx_slim import blas, runtime
from mlx_slim.compare.identity import machine


def test_nothing_about_the_machine_needs_linux(monkeypatch: pytest.MonkeyPatch):
    exists = Path.exists
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(
        Path, "exists", lambda path: not str(path).startswith(("/proc", "/sys")) and exists(path)
    )
    monkeypatch.setattr("sys.platform", "darwin")
    assert blas.physical_cores() == os.cpu_count()
    assert runtime.cpu_lanes() == min(4, os.cpu_count() or 1)
    assert runtime.device_memory() > 1 << 30
    assert blas._activate() == blas.Status("platform")
    assert "CPU cores" in machine()["machine"]
