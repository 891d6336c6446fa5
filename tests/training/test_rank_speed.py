"""Ranks of unlike speed: what is measured, and that the slow one is named once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_slim.training.rank_speed import RankSpeeds, slow_rank
from mlx_slim.training.step_result import StepResult
from tests.support.runs import Recorder, run_script

RANKS = """
import json, sys
from pathlib import Path
from mlx_slim.runtime import world
from mlx_slim.training.rank_speed import RankSpeeds
from mlx_slim.training.step_result import StepResult
from tests.support.runs import Recorder

recorder = Recorder()
speeds, rank = RankSpeeds(recorder), world().rank()
for step in range(1, 15):
    waited = 0.0 if rank else 0.4
    result = StepResult(1.0, {}, 0, 0, 200, here=100, waited=waited)
    speeds.step(step, result, 0.5, report=step % 2 == 0)
records = [event.as_record() for event in recorder.events]
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(records))
"""


def test_the_slow_rank_is_named_once_with_its_figure(tmp_path: Path) -> None:
    done = run_script(RANKS, tmp_path, ranks=2)
    assert len(list(tmp_path.glob("*.json"))) == 2, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second, "all ranks know the same"
    measured = [one for one in first if one["event"] == "ranks"]
    assert [one["step"] for one in measured] == [2, 4, 6, 8, 10, 12, 14]
    assert {tuple(one["tokens_per_second"]) for one in measured} == {(1000.0, 200.0)}
    assert {tuple(one["waiting"]) for one in measured} == {(0.8, 0.0)}
    (notice,) = (one for one in first if one["event"] == "notice")
    assert notice["message"] == (
        "rank 1 computes 200 tokens/s where the others compute 1,000: each step waits for it; "
        "without it the run may be faster"
    )


@pytest.mark.parametrize(
    ("totals", "slow"),
    [
        ([[1000, 1.0], [1000, 1.4]], ""),
        ([[1000, 1.0], [1000, 1.6]], "rank 1 computes 625 tokens/s where the others compute 1,000"),
        ([[500, 1.0], [1000, 1.0], [1200, 1.0]], "rank 0 computes 500 tokens/s"),
        ([[0, 0.0], [1000, 1.0]], ""),  # a step that does not divide left it without work
        ([[600, 1.0], [600, 1.0], [1000, 1.0]], ""),
    ],
)
def test_slower_than_the_rest(totals: list[list[float]], slow: str) -> None:
    line = slow_rank(np.array(totals))
    assert line.startswith(slow) and bool(line) == bool(slow)


def test_one_rank_measures_nothing() -> None:
    recorder = Recorder()
    speeds = RankSpeeds(recorder)
    for step in range(20):
        result = StepResult(1.0, {}, 0, 0, 100, here=100, waited=0.0)
        speeds.step(step, result, 1.0, report=True)
    assert recorder.events == []
