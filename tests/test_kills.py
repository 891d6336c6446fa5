"""Commands killed at drawn moments, going on, and ending as if nothing had been."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import kill_commands

ROOT = Path(__file__).parents[1]
# One command of each way to be killed: training that resumes (with a quantized base, a second
# teacher's targets, a second student), a run of several steps, scores, a folder that appears whole.
# ``make kills`` takes all commands.
KILLED = (
    *("train qlora", "distill sequence", "distill mutual", "prune recover", "eval", "sweep"),
    *("quantize", "fuse", "export gguf"),
)
POINTS = 12


def test_killed_at_drawn_moments_every_command_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    """``make kills`` takes every moment. The seed stands here: a failure can be run again."""
    command = ["-m", "tests.support.kill_commands", tmp_path, "--points", POINTS, "--seed", "0"]
    command += ["--only", *KILLED]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    moments = [line for line in done.stdout.splitlines() if ", at " in line]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(moments) == POINTS and all(line.endswith(": equal") for line in moments), moments
    assert {line.partition(", at ")[0] for line in moments} == set(KILLED)


def test_a_command_that_is_none_is_named_before_anything_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        kill_commands.main([str(tmp_path / "out"), "--only", "convert", "trian"])
    assert caught.value.code == 2 and not list(tmp_path.iterdir())
    message = capfd.readouterr().err
    assert "'trian'" in message and "'train lora'" in message
