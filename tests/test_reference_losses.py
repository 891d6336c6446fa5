"""Losses of tiny fixed runs are those committed (``make reference-losses`` renews them)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.reference_losses import FILE, RUNS

EXPECTED = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def computed() -> dict[str, Any]:
    """The same runs, in a process of one BLAS thread."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.reference_losses", "--print"],
        cwd=FILE.parents[1],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_committed(computed: dict[str, Any], name: str) -> None:
    losses, expected = computed["losses"][name], EXPECTED["losses"][name]
    assert losses.keys() == expected.keys()
    for event, values in expected.items():
        if computed["machine"] == EXPECTED["machine"]:
            assert losses[event] == values
        else:
            assert losses[event] == pytest.approx(values, rel=1e-5)


def test_every_run_learns() -> None:
    for losses in EXPECTED["losses"].values():
        assert len(losses["step"]) == 8 and losses["validation"][-1] < losses["validation"][0]
