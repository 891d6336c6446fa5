"""The time of a search: what scoring takes is counted before recoveries share what is left."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mlx_slim.slimming.questions import TaskPlan
from mlx_slim.slimming.time_limit import TimeLimit

# The original took 200 s for 40 + 60 questions of one task, 30 s for 10 + 20 of another.
TASKS = [TaskPlan("a", "a", 100, 40, 40, 60), TaskPlan("b.yaml", "b", 30, 10, 10, 20)]
SECONDS = {"a": 200.0, "b": 30.0}
CLAIM = 200.0 + 30.0  # of the winner: all questions
SELECTION = 40 * 2.0 + 10 * 1.0  # of a candidate


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    for name, seconds in SECONDS.items():
        (tmp_path / name).mkdir()
        timings = {"tasks": {name: {"seconds": seconds}}}
        (tmp_path / name / "timings.json").write_text(json.dumps(timings))
    return tmp_path


def limit(scores: Path, seconds: float | None, elapsed: float = 0.0) -> TimeLimit:
    return TimeLimit(seconds, scores, TASKS, time.perf_counter() - elapsed)


def test_scoring_is_counted_at_the_speed_of_the_original(scores: Path) -> None:
    assert limit(scores, None).scoring(0) == CLAIM
    assert limit(scores, None).scoring(3) == 3 * SELECTION + CLAIM


def test_recoveries_share_what_scoring_leaves(scores: Path) -> None:
    assert limit(scores, None).recoveries(3) == []
    whole = 0.9 * (5000 - SELECTION - CLAIM)
    assert limit(scores, 5000).recoveries(1) == [pytest.approx(whole, abs=1)]
    third = 0.9 * (4000 - 3 * SELECTION - CLAIM) / 3
    assert limit(scores, 5000, elapsed=1000).recoveries(3) == [
        pytest.approx(third, abs=1),
        pytest.approx(whole - 900, abs=1),  # all of what is left, where a third is too little
    ]
    assert limit(scores, 300).recoveries(3) == [0.0, 0.0]  # nothing is left


def test_scoring_that_takes_too_long_is_said(scores: Path) -> None:
    needed = 4 * SELECTION + CLAIM
    assert limit(scores, None).warning(4) is None
    assert limit(scores, needed + 1).warning(4) is None
    warning = limit(scores, needed + 1, elapsed=60).warning(4)
    assert warning is not None and "scoring takes 11 min" in warning and "10 min" in warning
