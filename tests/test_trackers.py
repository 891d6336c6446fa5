"""Trackers: the numbers arrive, a missing package is one line, nothing is lost on a failure."""

# pyright: reportMissingImports=false

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.events import Done, Notice, Saved, Started, ValidationDone
from mlx_slim.trackers import Trackers, scalars
from tests.console.test_training import step

START = Started(total_steps=2, total_epochs=1.0, budget_bytes=1)
EVENTS = [
    Notice("hello"),
    step(1, 2.5),
    step(2, 2.25),
    ValidationDone(2, 2.0, 100, 0.1, best=True),
    Saved(2, "checkpoints/step-2"),
]
DONE = Done(2, "complete", 8192, 3.0, 5_200_000_000)


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict]] = []
        self.summary: dict = {}
        self.finished = 0

    def log(self, values: Any, step: Any) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stand in for the package: no account, no network."""
    fake = SimpleNamespace(calls=[], run=FakeRun())

    def init(**settings: Any) -> Any:
        fake.calls.append(settings)
        return fake.run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_the_numbers_and_a_resumed_run_keeps_its_id(wandb: Any, tmp_path: Path) -> None:
    for number in range(2):
        config = {"model": "tiny"}
        with Trackers(["wandb"], tmp_path, name="try", config=config, rank=0) as trackers:
            assert len(wandb.calls) == number  # nothing begins before the loop does
            for event in [START, *EVENTS, DONE]:
                trackers.notify(event)
            trackers.notify(step(3))  # after the end: ignored
    first, second = wandb.calls
    assert first["id"] == second["id"]
    assert first["config"] == {"model": "tiny"}
    steps = [step for step, _ in wandb.run.logged]
    assert steps == [1, 2, 2, 1, 2, 2]
    assert wandb.run.logged[0][1]["train/loss"] == 2.5
    assert wandb.run.logged[2][1] == {"validation/loss": 2.0}
    assert wandb.run.summary["reason"] == "complete"
    assert wandb.run.finished == 2


def test_wandb_that_refuses_is_one_line(wandb: Any, tmp_path: Path) -> None:
    def refuse(**settings: Any) -> None:
        raise RuntimeError("no API key")

    wandb.init = refuse
    trackers = Trackers(["wandb"], tmp_path, rank=0)
    with pytest.raises(SlimError, match="no API key") as caught:
        trackers.notify(START)
    assert "WANDB_MODE=offline" in caught.value.hint


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_with_the_install_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("wandb", "tensorboard", "tensorboard.summary.writer.event_file_writer"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SlimError, match="not installed") as caught:
        Trackers([name], tmp_path, rank=0)
    assert f"pip install 'mlx-slim[{name}]'" in caught.value.hint


def test_an_unknown_tracker_and_other_ranks(wandb: Any, tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="did you mean 'tensorboard'"):
        Trackers(["tensorbord"], tmp_path, rank=0)
    assert Trackers(["wandb"], tmp_path, rank=1).observers == []
    assert wandb.calls == []


def test_only_numbers_of_steps_and_validation_are_drawn() -> None:
    assert scalars(DONE) == {}
    assert set(scalars(step(1))) >= {"train/loss", "memory/peak_bytes"}


@pytest.mark.parametrize("fail", [False, True])
def test_tensorboard_reads_what_was_written(fail: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def loop() -> None:
        with Trackers(["tensorboard"], tmp_path, rank=0) as trackers:
            for event in EVENTS:
                trackers.notify(event)
            if fail:
                raise ValueError("the loop failed")
            trackers.notify(DONE)

    if fail:
        with pytest.raises(ValueError, match="the loop failed"):
            loop()
    else:
        loop()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(1, 2.5), (2, 2.25)]
    assert [e.value for e in read.Scalars("validation/loss")] == [2.0]
