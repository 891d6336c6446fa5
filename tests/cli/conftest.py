"""Fixtures of the command line's tests: a recipe that would run, and a run that must fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_slim.cli.main import run
from tests.support.runs import write_rows

Fails = Callable[..., str]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 6)


@pytest.fixture
def small(tiny: Callable[..., Path], rows: Path, tmp_path: Path) -> Path:
    """A recipe that would run."""
    path = tmp_path / "small.yaml"
    path.write_text(
        f"model: {tiny('llama')}\n"
        f"data: {{path: {rows}, validation: 0}}\n"
        "train: {steps: 2, max_length: 128, batch_tokens: 256}\n"
    )
    return path


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Fails:
    """Run a command line that must fail cleanly; return its error line and what follows it."""

    def check(*words: object, code: int = 2, keeps: bool = False) -> str:
        def files() -> set[str]:
            return {str(path) for path in tmp_path.rglob("*")}

        before = files()
        capfd.readouterr()
        assert run([str(word) for word in words]) == code
        lines = capfd.readouterr().err.splitlines()
        # A slow machine is told now and then how long a stage takes.
        lines = [line for line in lines if not re.search(r"\(\d+:\d\d\)$", line)]
        assert [line[:6] for line in lines].count("error:") == 1, lines
        at = [line[:6] for line in lines].index("error:")
        assert not any(lines[:at]), lines
        assert all(line.startswith(("hint: ", "  ")) for line in lines[at + 1 :]), lines
        assert not any("Traceback" in line for line in lines)
        if not keeps:
            assert files() == before
        return "\n".join(lines[at:])

    return check
