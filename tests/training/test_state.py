"""The train state: a damaged ``state.json`` is refused by key, a measurement can be undone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mlx_slim.training.state import TrainState, read_state
from tests.test_reading import refusal


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
def test_a_damaged_state_is_refused(tmp_path: Path, changes: dict, expected: str) -> None:
    state = TrainState(step=4, best_loss=1.5)
    (tmp_path / "state.json").write_text(json.dumps(asdict(state)))
    assert read_state(tmp_path) == state
    (tmp_path / "state.json").write_text(json.dumps(asdict(state) | changes))
    message = refusal(read_state, tmp_path)
    assert "state.json" in message
    assert expected in message


def test_the_validation_of_the_last_step_is_undone_or_kept() -> None:
    for undo in (True, False):
        state = TrainState(step=5, best_loss=2.0, best_step=3)
        assert not state.reopen(undo)  # nothing was measured only because the run ended
        state.keep_open()
        state.best_loss, state.best_step = 1.0, 5
        assert state.best_steps() == {3, 5}
        assert state.reopen(undo) == undo
        assert (state.best_loss, state.best_step) == ((2.0, 3) if undo else (1.0, 5))
        assert state.open == {} and state.best_steps() == {state.best_step}
