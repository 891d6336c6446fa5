"""Battery, pressure and a lasting loss of speed are said once each, with the figure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_slim import power
from mlx_slim.events import Event, Notice, StepDone
from mlx_slim.finetuning import conditions, run
from mlx_slim.finetuning.conditions import ConditionsWatch
from tests.support.runs import Recorder, losses, recipe, write_rows
from tests.support.tiny import TinyModels


class Watched:
    """Steps on a clock of their own, and what was said of them."""

    def __init__(self, battery: int | None = None, pressure: str | None = None) -> None:
        self.now, self.step, self.looks = 0.0, 0, 0
        self.battery, self.pressure = battery, pressure
        self.recorder = Recorder()
        self.watch = ConditionsWatch(
            self.recorder,
            clock=lambda: self.now,
            battery=self._look,
            pressure=lambda: self.pressure,
        )

    def _look(self) -> int | None:
        self.looks += 1
        return self.battery

    def steps(self, count: int, rate: float, seconds: float = 10.0, computed: int = 4096) -> None:
        for _ in range(count):
            self.now, self.step = self.now + seconds, self.step + 1
            self.watch.notify(
                StepDone(self.step, 0.1, 1.0, computed, computed, 10, rate, 1e-4, 1.0, 1, 1)
            )

    @property
    def texts(self) -> list[str]:
        events: list[Event] = self.recorder.events
        assert all(isinstance(event, Notice) and event.level == "warning" for event in events)
        return [event.message for event in events if isinstance(event, Notice)]


def test_many_short_steps_are_judged_once_a_second_and_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sorts: list[int] = []
    monkeypatch.setattr(conditions, "sorted", lambda a: sorts.append(1) or sorted(a), raising=False)
    quick = Watched()
    for _ in range(4):
        before = len(sorts)
        quick.steps(5000, 400, seconds=0.05)
        assert len(sorts) - before <= 251
        assert len(quick.watch._recent) <= 181 / 0.05
    assert len(sorts) > 500 and quick.texts == []


def test_battery_and_pressure_are_said_once() -> None:
    laptop = Watched()
    laptop.steps(30, 400)
    assert laptop.texts == [] and laptop.looks == 5  # once a minute, not each step
    laptop.battery, laptop.pressure = 57, "pressure level 2, warning"
    laptop.steps(30, 400)
    assert [text.split(":")[0] for text in laptop.texts] == [
        "running on battery, 57% left",
        "the system is short of memory (pressure level 2, warning)",
    ]


def test_a_lasting_loss_of_speed_is_said_once() -> None:
    laptop = Watched()
    laptop.steps(2, 90)  # compiled
    laptop.steps(20, 400)
    laptop.steps(15, 240)
    assert laptop.texts == []  # for two and a half minutes, which may pass
    laptop.steps(40, 240)
    (text,) = laptop.texts
    assert "60% of the speed" in text and "(240 of 400 tokens/s)" in text and "train.duty" in text


def test_a_moment_of_slowness_and_little_slowness_are_not_said() -> None:
    laptop = Watched()
    laptop.steps(20, 400)
    for _ in range(10):
        laptop.steps(6, 100)
        laptop.steps(14, 390)
    laptop.steps(60, 300)  # 75%
    assert laptop.texts == []


def test_steps_are_compared_with_those_of_their_size() -> None:
    laptop = Watched()
    for _ in range(8):
        laptop.steps(1, 400, computed=4096)
        laptop.steps(1, 200, computed=512)  # as slow from the start
    laptop.steps(40, 200, computed=512)
    assert laptop.texts == []
    laptop.steps(40, 200, computed=4096)
    assert len(laptop.texts) == 1


def test_a_run_says_it_on_the_console_and_not_in_its_metrics(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions, "battery_percent", lambda: 57)
    awake: list[bool] = []

    @power.contextlib.contextmanager
    def keep_awake(enabled: bool) -> Iterator[None]:
        awake.append(enabled)
        yield

    monkeypatch.setattr(run, "keep_awake", keep_awake)
    data = write_rows(tmp_path / "rows.jsonl", 12)
    out, recorder = tmp_path / "run", Recorder()
    small = recipe(tiny("llama"), data, steps=2, keep_awake=False)
    run.finetune(small, out, observer=recorder)
    notices = [event.message for event in recorder.events if isinstance(event, Notice)]
    assert sum("on battery, 57%" in text for text in notices) == 1
    assert "battery" not in (out / "metrics.jsonl").read_text()
    assert awake == [False] and len(losses(out)) == 2
