"""A run with pauses computes the same, and pauses for as long as it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_slim.events import Done
from mlx_slim.finetuning.run import finetune
from mlx_slim.finetuning.run_dir import summary_rows
from mlx_slim.training import loop
from mlx_slim.training.duty import LONGEST_SLEEP, pause
from tests.support.runs import Recorder, losses, recipe, write_rows
from tests.support.tiny import TinyModels


class Clock:
    """Time that only sleeping passes."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sleeps: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps.append(seconds)


@pytest.mark.parametrize(("busy", "duty", "expected"), [(7, 0.7, 3), (1, 0.5, 1), (9, 1, 0)])
def test_the_pause_leaves_the_rest_of_the_time(busy: float, duty: float, expected: float) -> None:
    clock = Clock()
    pause(busy, duty, lambda: False, sleep=clock.sleep, clock=lambda: clock.now)
    assert sum(clock.sleeps) == pytest.approx(expected)
    assert max(clock.sleeps, default=0) <= LONGEST_SLEEP


def test_a_stop_ends_the_pause() -> None:
    clock = Clock()
    pause(60, 0.5, lambda: clock.now > 101, sleep=clock.sleep, clock=lambda: clock.now)
    assert sum(clock.sleeps) < 1.5


def test_a_run_with_pauses_has_the_same_losses(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 16)
    pauses: list[float] = []

    def fake(busy: float, duty: float, stopping: object) -> None:
        pauses.append(busy * (1 / duty - 1))

    monkeypatch.setattr(loop, "pause", fake)
    whole, careful = tmp_path / "whole", tmp_path / "careful"
    small = recipe(tiny("llama"), data, "qlora", steps=4, save_every=2)
    finetune(small, whole, observer=Recorder())
    assert pauses == [0, 0, 0]  # none after the last step
    recorder = Recorder()
    slow = recipe(tiny("llama"), data, "qlora", steps=4, save_every=2, duty=0.7)
    result = finetune(slow, careful, observer=recorder)
    assert losses(careful) == losses(whole)
    adapters = [run / "adapters" / "adapters.safetensors" for run in (careful, whole)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert all(seconds > 0 for seconds in pauses[3:]) and len(pauses) == 6
    assert "70% of the time" in summary_rows(result)["time"]
    (done,) = (event for event in recorder.events if isinstance(event, Done))
    assert done.duty == 0.7


def test_a_run_from_before_is_resumed_and_may_be_slowed_down(
    tiny: TinyModels, tmp_path: Path
) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl", 16), tmp_path / "run"
    finetune(recipe(tiny("llama"), data, steps=2, save_every=2), out, observer=Recorder())
    for name in ("recipe.json", "run.json"):
        record = json.loads((out / name).read_text())
        for key in ("duty", "keep_awake"):  # as a version wrote it that did not know them
            del record["recipe"]["train"][key]
        (out / name).write_text(json.dumps(record))
    longer = recipe(tiny("llama"), data, steps=3, save_every=2, duty=0.5, keep_awake=False)
    finetune(longer, out, observer=Recorder(), resume=True)
    assert sorted(losses(out)) == [1, 2, 3]
