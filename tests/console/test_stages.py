"""No command is silent: what is under way is shown after two seconds, by a clock that is given."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console as RichConsole

from mlx_slim.console import Console, Mode
from mlx_slim.console.scoring import Scoring
from mlx_slim.console.stages import Stages
from mlx_slim.console.training import TrainingProgress
from mlx_slim.events import EvalAnswering, EvalStarted, Notice, StageProgress, Started
from tests.console.test_training import step


def stage(done: float, total: float | None = 8, *, finished: bool = False) -> StageProgress:
    return StageProgress("comparing", done, total, "rows", finished)


def test_a_line_names_the_stage_its_rate_and_its_end() -> None:
    stages = Stages(0.0)
    assert stages.line(1.0) == "loading libraries and checking the input (0:01)"
    stages.update(Notice("loading x"), 2.0)
    assert stages.line(5.0) == "loading x (0:03)"
    stages.update(stage(0), 10.0)
    assert stages.line(11.0) == "comparing: 0 of 8 rows, 0:01 so far"
    stages.update(stage(2), 14.0)
    assert stages.line(15.0) == "comparing: 2 of 8 rows, 0.5 rows/s, 0:11 left"
    stages.update(stage(2, finished=True), 16.0)
    assert stages.line(18.0) == "after comparing (0:02)"


def test_the_innermost_stage_is_shown_and_the_outer_one_again_after_it() -> None:
    stages = Stages(0.0)
    stages.update(stage(1), 0.0)
    stages.update(StageProgress("hashing w", 0, 1e9, "bytes"), 1.0)
    stages.update(StageProgress("hashing w", 5e8, 1e9, "bytes"), 2.0)
    assert stages.line(2.0) == "hashing w: 500 MB of 1.00 GB, 500 MB/s, 0:01 left"
    stages.update(StageProgress("hashing w", 1e9, 1e9, "bytes", True), 3.0)
    assert stages.line(3.0).startswith("comparing: 1 of 8 rows")


def test_an_outer_stage_that_ends_closes_what_was_left_open_in_it() -> None:
    stages = Stages(0.0)
    stages.update(stage(0), 0.0)
    stages.update(StageProgress("loading x"), 1.0)
    stages.update(stage(8, finished=True), 2.0)
    assert stages.line(2.0) == "after comparing (0:00)"


@pytest.fixture
def plain() -> tuple[Console, io.StringIO]:
    """Return a console of a pipe whose clock stands still unless it is ticked."""
    file = io.StringIO()
    console = Console("plain", rank=0, output=RichConsole(file=file, width=80))
    console._shown = 0.0  # where the given clock begins
    console._stages = Stages(0.0)
    return console, file


def test_a_pipe_hears_every_two_seconds_in_the_first_minute_then_every_ten(plain: Any) -> None:
    console, file = plain
    console._stages.update(stage(1), 0.0)
    printed = []
    for quarter in range(4 * 180):
        now, before = quarter / 4, file.tell()
        console.tick(now)
        if file.tell() > before:
            printed.append(now)
            console._shown = now
    gaps = [later - earlier for earlier, later in pairwise([0.0, *printed])]
    assert max(gaps[:29]) == 2.0 and printed[28] == 58.0
    assert max(gaps) == 10.0
    assert "comparing: 1 of 8 rows" in file.getvalue()


def test_lines_of_the_command_itself_count_as_shown(plain: Any) -> None:
    console, file = plain
    console.notify(Notice("here"))  # shown now, by the real clock
    console.tick(console._shown + 1.9)
    assert file.getvalue() == "here\n"
    console.tick(console._shown + 2.1)
    assert file.getvalue().splitlines()[1].startswith("here (0:0")


def test_a_slow_step_and_slow_questions_are_named(plain: Any) -> None:
    console, file = plain
    console.notify(Started(40, 1.0, 10**9))
    console.notify(step(3))
    console.tick(console._shown + 2.5)
    assert file.getvalue().splitlines()[-1].startswith("step 4 of 40 (0:0")
    scoring = Console("plain", rank=0, display=Scoring(), output=RichConsole(file=file))
    scoring.notify(EvalStarted("m", ("boolq",), 200, 0, 0.0, 10**9))
    scoring.notify(EvalAnswering("boolq", 37, 200, 0.19))
    scoring.tick(scoring._shown + 2.5)
    assert file.getvalue().splitlines()[-1].startswith("scoring boolq: 37 of 200 questions")


@pytest.mark.parametrize("mode", ["json", "quiet"])
def test_other_modes_stay_as_they_are(mode: Mode) -> None:
    file = io.StringIO()
    console = Console(mode, rank=0, output=RichConsole(file=file))
    console.notify(stage(1))
    console.tick(console._shown + 100)
    assert file.getvalue() == ""


def test_json_gets_progress_after_two_seconds_of_silence() -> None:
    file = io.StringIO()
    console = Console("json", rank=0, output=RichConsole(file=file))
    console._shown -= 3
    console.notify(stage(1))
    console.notify(stage(2))
    assert file.getvalue().count('"event": "progress"') == 1


def test_a_terminal_shows_the_stage_and_wipes_it() -> None:
    file = io.StringIO()
    output = RichConsole(file=file, force_terminal=True, width=80, height=30)
    with Console("plain", rank=0, output=output) as console:
        console.notify(stage(1))
        console.tick(console._shown + 1)
        console.notify(Notice("a line above"))
    text = file.getvalue()
    assert "comparing: 1 of 8 rows" in text
    assert "a line above" in text
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text.rsplit("a line above", 1)[1]


def test_the_pulse_shows_by_itself_and_ends_with_the_block() -> None:
    file = io.StringIO()
    with Console("plain", rank=0, output=RichConsole(file=file)) as console:
        pulse = console._pulse
        console.notify(stage(1))
        console._shown -= 3  # three seconds ago
        for _ in range(200):
            if "comparing" in file.getvalue():
                break
            assert pulse is not None
            pulse.join(0.05)
    assert "comparing: 1 of 8 rows" in file.getvalue()
    assert pulse is not None and not pulse.is_alive()


def test_a_slow_first_step_shows_that_time_passes() -> None:
    display = TrainingProgress()
    display.update(Started(40, 1.0, 10**9), 100.0)
    assert display.left_or_spent(100.5) == "eta –"
    assert display.left_or_spent(141.0) == "0:41 so far"
    display.update(step(1), 150.0)
    assert display.left_or_spent(160.0).startswith("eta ")


def test_validation_is_seen_in_the_live_view() -> None:
    console = Console("live", rank=0, output=RichConsole(file=io.StringIO(), force_terminal=True))
    console.display.update(StageProgress("validating", 3, 12, "micro-batches"), 0.0)
    assert console.display.validating == 0.25  # type: ignore[attr-defined]
