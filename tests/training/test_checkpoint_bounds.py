"""State and metrics that are no such thing: refused by file and key, or cut off."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mlx_slim.events import Saved
from mlx_slim.training.metrics import MetricsFile
from mlx_slim.training.state import TrainState, read_state
from tests.test_reading import nested, refusal


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"step": "4"}, "step is '4', expected a whole number"),
        ({"taken": -1}, "taken is -1"),
        ({"best_loss": []}, "best_loss is []"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"more": 1}, "more"),
    ],
)
def test_a_position_that_cannot_be(tmp_path: Path, changes: dict, expected: str) -> None:
    state = TrainState(step=4, best_loss=1.5)
    (tmp_path / "state.json").write_text(json.dumps(asdict(state)))
    assert read_state(tmp_path) == state
    (tmp_path / "state.json").write_text(json.dumps(asdict(state) | changes))
    message = refusal(read_state, tmp_path)
    assert "state.json" in message
    assert expected in message


@pytest.mark.parametrize("line", [nested(5000), "[]", "7", '{"event": "step", "step": "x"}'])
def test_metrics_end_at_a_line_that_is_none(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    first = '{"event": "step", "step": 1}'
    file.write_text(f"{first}\n{line}\n" + '{"event": "step", "step": 2}\n')
    MetricsFile(file).rewind(Saved(2, "checkpoints/step-2"))
    lines = file.read_text().splitlines()
    assert lines[0] == first
    assert [json.loads(one)["event"] for one in lines] == ["step", "saved"]
