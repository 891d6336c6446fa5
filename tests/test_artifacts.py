"""Files that are whole or absent: what a power cut and another system leave of that."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.artifacts import write_text
from mlx_slim.events import Notice, Saved
from mlx_slim.training.metrics import MetricsFile


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which calls were made, in order, on a system that has ``F_FULLFSYNC`` as macOS does."""
    calls: list[str] = []

    def control(descriptor: int, command: int, *rest: Any) -> int:
        assert (command, *rest) == (51,)
        calls.append("full")
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("plain"))
    return calls


def test_a_durable_write_on_macos_empties_the_drives_cache(
    synced: list[str], tmp_path: Path
) -> None:
    write_text(tmp_path / "a.txt", "whole")
    assert synced == ["full", "full"]  # the file, then the folder that names it


def test_a_file_system_without_it_gets_the_plain_call(
    synced: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    write_text(tmp_path / "a.txt", "whole")
    monkeypatch.delattr(fcntl, "F_FULLFSYNC")
    write_text(tmp_path / "b.txt", "whole")
    assert synced == ["plain"] * 4


def test_metrics_are_durable_when_a_checkpoint_is(synced: list[str], tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.notify(Notice("a step"))
    assert synced == []  # a step waits for no drive
    metrics.notify(Saved(2, "checkpoints/step-2"))
    assert synced == ["full"]
