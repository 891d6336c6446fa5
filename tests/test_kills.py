"""Commands killed at drawn moments, going on, and ending as if nothing had been."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import kill_commands

ROOT = Path(__file__).parents[1]
# One command of each way to be killed: training that resumes (with a quantized base, a second
# teacher's targets, a second student), a run of several steps, scores, a folder that appears whole.
# ``make kills`` takes all commands.
KILLED = (
    *("train qlora", "distill sequence", "distill mutual", "prune recover", "eval"),
    *("quantize", "fuse", "export gguf"),
)
POINTS = 12


def kill(folder: Path, names: Sequence[str], points: int) -> list[tuple[str, str]]:
    """Kill commands at ``points`` drawn moments; return of each the command and how it ended."""
    command = ["-m", "tests.support.kill_commands", folder, "--points", points, "--seed", "0"]
    command += ["--only", *names]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    moments = [line for line in done.stdout.splitlines() if ", at " in line]
    return [(line.partition(", at ")[0], line.rpartition(": ")[2]) for line in moments]


def test_killed_at_drawn_moments_every_command_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    """``make kills`` takes every moment. The seed stands here: a failure can be run again."""
    ends = kill(tmp_path, KILLED, POINTS)
    assert [end for _, end in ends] == ["equal"] * POINTS
    assert {name for name, _ in ends} == set(KILLED)


def test_a_killed_sweep_has_the_trials_losses_and_winner_of_the_undisturbed_one(
    tmp_path: Path,
) -> None:
    """Every file is compared: what is proposed after many trials, ``sweeping/test_study.py``."""
    assert kill(tmp_path, ["sweep"], 3) == [("sweep", "equal")] * 3


def test_a_command_that_is_none_is_named_before_anything_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        kill_commands.main([str(tmp_path / "out"), "--only", "convert", "trian"])
    assert caught.value.code == 2 and not list(tmp_path.iterdir())
    message = capfd.readouterr().err
    assert "'trian'" in message and "'train lora'" in message
