"""Checkpoints of version 0.1 in today's form: every field has a place, nothing else is touched."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_slim.training.legacy import is_legacy, upgrade_arrays, upgrade_state
from mlx_slim.training.state import TrainState, read_state

OLD = {
    "step": 5,
    "best_loss": 2.5,
    "best_step": 4,
    "since_best": 1,
    "held_out_start": 8.25,
    "held_out_step": 5,
    "held_out_over": 0,
    "open": {"held_out_step": 3, "held_out_over": 1},
}
LIMIT = {"start": 8.25, "step": 5, "over": 0, "open": {"step": 3, "over": 1}}


def test_the_measurement_of_forgetting_becomes_the_callbacks() -> None:
    assert is_legacy(OLD)
    state = upgrade_state(OLD)
    assert not is_legacy(state)
    assert state["required"] == [3, 4, 5]
    assert state["callbacks"] == {"forgetting": LIMIT}
    assert not [key for key in (*state, *state["open"]) if key.startswith("held_out")]


def test_the_train_state_reads_it(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps(OLD))
    state = read_state(tmp_path)
    assert state == TrainState(5, best_loss=2.5, best_step=4, since_best=1, required=[3, 4, 5])


def test_arrays_move_from_their_number_to_the_name_of_their_callback() -> None:
    old = {
        "1/mask": mx.ones((2,)),
        "1/mean/a.lora_a": mx.zeros((2,)),
        "2/text": mx.array([0, 255], mx.uint8),
    }
    arrays, values = upgrade_arrays(old, upgrade_state(OLD)["callbacks"])
    assert set(arrays) == {"adalora/mask", "adalora/mean/a.lora_a"}
    assert values == {"forgetting": {"text": "00ff", **LIMIT}}


def test_a_run_that_measured_no_forgetting_has_no_state_of_it() -> None:
    assert upgrade_arrays({}, upgrade_state(OLD)["callbacks"]) == ({}, {})


def test_arrays_of_no_callback_are_refused() -> None:
    with pytest.raises(KeyError, match="0"):
        upgrade_arrays({"0/unknown": mx.ones((1,))}, {})
