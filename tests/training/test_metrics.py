"""``metrics.jsonl`` after a kill: the lines of the run that was not killed."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path

import pytest

from mlx_slim.events import Done, Notice, Resumed, Saved, Started, StepDone, ValidationDone
from mlx_slim.training.metrics import MetricsFile
from tests.test_reading import nested

BEFORE = [Notice("of the rows"), Started(4, 1.0, 0)]
SAVED = Saved(2, "checkpoints/step-2")
FIRST = [*BEFORE, ValidationDone(2, 1.5, 10, 0.1, True), SAVED]
LATER = [ValidationDone(4, 1.2, 10, 0.1, True), Saved(4, "checkpoints/step-4")]
DONE = Done(4, "complete", 10, 1.0, 0, None, None)


def event_names(path: Path) -> list[str]:
    return [json.loads(line)["event"] for line in path.read_text().splitlines()]


def test_a_resume_repeats_no_line_and_misses_none(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    metrics = MetricsFile(whole)
    for event in [*FIRST, *LATER, DONE]:
        metrics.notify(event)
    resumed = Resumed(2, "checkpoints/step-2")
    for lost in (0, 1):  # the line of the checkpoint too, where the kill came before it
        for more in ([], LATER, [*LATER, DONE], [Notice("anything")]):
            file = tmp_path / f"{lost}-{len(more)}.jsonl"
            metrics = MetricsFile(file)
            if lost and more:
                continue  # nothing comes after a kill
            for event in [*FIRST[: len(FIRST) - lost], *more]:
                metrics.notify(event)
            with file.open("a") as handle:
                handle.write('{"event": "step", "st')  # torn
            metrics = MetricsFile(file)
            metrics.rewind(SAVED)
            for event in [resumed, BEFORE[1], *LATER, DONE]:
                metrics.notify(event)
            lines = file.read_text().splitlines()
            assert [line for line in lines if '"resumed"' not in line] == (
                whole.read_text().splitlines()
            )
            assert event_names(file).count("resumed") == 1


def test_a_start_without_lines_of_steps_is_kept(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for event in BEFORE:
        metrics.notify(event)
    metrics.rewind(SAVED)
    assert event_names(metrics.path) == ["notice", "started", "saved"]


def test_a_run_from_its_first_step_keeps_nothing(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.clear()
    metrics.notify(BEFORE[1])
    metrics.clear()
    assert not metrics.path.exists()


@pytest.mark.parametrize("line", [nested(5000), "[]", "7", '{"event": "step", "step": "x"}'])
def test_metrics_end_at_a_line_that_is_none(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    first = '{"event": "step", "step": 1}'
    file.write_text(f"{first}\n{line}\n" + '{"event": "step", "step": 2}\n')
    MetricsFile(file).rewind(Saved(2, "checkpoints/step-2"))
    lines = file.read_text().splitlines()
    assert lines[0] == first
    assert [json.loads(one)["event"] for one in lines] == ["step", "saved"]


def test_lines_take_no_memory(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")

    def write(first: int, count: int) -> int:
        for step in range(first, first + count):
            metrics.notify(StepDone(step, 0.1, 1.0, 9, 9, 3, 50.0, 1e-4, 1.0, 1, 1))
            if step % 100 == 0:
                metrics.notify(Saved(step, f"checkpoints/step-{step}"))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = write(0, 200)
        assert write(200, 2000) - before < 20_000  # 2,000 numbers kept would be 64,000
    finally:
        tracemalloc.stop()
    assert metrics.path.read_text().count("\n") == 2200 + 22
