"""Fixtures of the tests of ``compare``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.matrix_run import write_files


@pytest.fixture
def files(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with training rows, a task, held-out text, and a matrix over the tiny llama."""
    monkeypatch.chdir(tmp_path)
    return write_files(tmp_path, tiny())
