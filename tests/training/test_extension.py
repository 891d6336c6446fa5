"""A run that is given more steps: its rates, its checkpoint, and what its former end measured.

Whole runs that grow are in ``tests/finetuning/test_longer.py``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mlx_slim.config.train import TrainConfig
from mlx_slim.training.extension import newest, reopen
from mlx_slim.training.optim import Extended, schedule
from mlx_slim.training.state import TrainState


def _checkpoint(folder: Path, step: int, total: int) -> Path:
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    state = dataclasses.asdict(TrainState(step=step, total=total))
    (path / "state.json").write_text(json.dumps(state))
    return path


def test_rates_of_a_run_that_was_extended_twice(tmp_path: Path) -> None:
    config = TrainConfig(schedule="linear", learning_rate=1.0, warmup=2)
    rate = schedule(config, 20, Extended(2, (6, 10)))
    first = schedule(config, 6)
    assert [rate(n) for n in range(6)] == [first(n) for n in range(6)]
    assert rate(6) == rate(5) == pytest.approx(0.25)
    assert rate(10) == rate(9) == pytest.approx(0.25 / 4)
    assert rate(19) == pytest.approx(0.25 / 4 / 10)
    assert newest(tmp_path / "none", config, 20, Extended(2, (6, 10)), None) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TrainConfig(schedule="constant", warmup=0), 10),
        (TrainConfig(schedule="wsd", decay=0.5, warmup=0), 5),  # the decay began after step 5
        (TrainConfig(schedule="cosine", warmup=0), 10),  # its rates continue from the last step
    ],
)
def test_the_longer_run_resumes_before_the_rates_differ(
    tmp_path: Path, config: TrainConfig, expected: int
) -> None:
    for step in (4, 5, 7, 10):
        _checkpoint(tmp_path, step, 10)
    path = newest(tmp_path, config, 40, Extended(0, (10,)), None)
    assert path == tmp_path / f"step-{expected}"


@pytest.mark.parametrize(
    ("name", "undone"), [("constant", {"validation", "task_validation"}), ("cosine", set())]
)
def test_a_longer_run_has_not_made_the_validation_of_the_end(name: str, undone: set[str]) -> None:
    config = TrainConfig.model_validate({"schedule": name})
    state = TrainState(step=5, best_step=3)
    state.keep_open()
    assert reopen(state, [], config, 5) == set()  # not longer: it stays
    assert reopen(state, [], config, 9) == undone and state.open == {}
