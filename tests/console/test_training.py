"""What a user sees: live, plain, JSON and quiet, and a cursor that comes back."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console as RichConsole

from mlx_slim.console import Console, TrainingProgress, sparkline
from mlx_slim.events import (
    Done,
    Event,
    Notice,
    Resumed,
    Saved,
    Started,
    StepDone,
    TaskValidated,
    ValidationDone,
)
from mlx_slim.round_events import RoundBegun
from mlx_slim.trackers import scalars

SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"


def step(number: int, loss: float = 2.0) -> StepDone:
    return StepDone(
        step=number,
        epoch=number / 20,
        loss=loss,
        tokens=4096,
        computed_tokens=4200,
        supervised_tokens=3011,
        tokens_per_second=512.4,
        learning_rate=2e-4,
        grad_norm=0.8,
        active_memory_bytes=3_100_000_000,
        peak_memory_bytes=5_200_000_000,
    )


STORY: list[Event] = [
    Notice("2 rows dropped"),
    Started(total_steps=40, total_epochs=2.0, budget_bytes=14_400_000_000, first_step=10),
    Resumed(10, "checkpoints/step-10"),
    *(step(number, 3 - number / 40) for number in range(11, 41)),
    Notice("the budget is near", "warning"),
    ValidationDone(40, 2.1, 500, 0.4, best=True),
    Saved(40, "checkpoints/step-40"),
    Done(40, "complete", 163840, 61.0, 5_200_000_000, 2.1, 40),
]
ROWS = {"rows": "118 used of 120", "peak memory": "5.2 GB", "a [markup] name": "run/[x]"}


def show(
    mode: Any,
    *,
    terminal: Any = False,
    width: Any = 100,
    rank: Any = 0,
    story: Any = STORY,
    fail: Any = False,
) -> str:
    file = io.StringIO()
    output = RichConsole(file=file, force_terminal=terminal, width=width, height=30)
    console = Console(mode, title="tiny [lora]", rank=rank, output=output)
    with console:
        for event in story:
            console.notify(event)
        if fail:
            raise ValueError("the loop failed")
        console.summary("done", ROWS)
    return file.getvalue()


def test_plain_lines_have_one_line_an_event_and_no_colour() -> None:
    text = show("auto")
    assert "\x1b" not in text
    assert text.count("\nstep ") == 30
    assert "step 11/40 epoch 0.55 loss 2.7250 lr 2.00e-04 512 tok/s grad 0.800" in text
    assert "mem 3.10 GB peak 5.20 GB eta 0:00" in text
    assert "warning: the budget is near" in text
    assert "validation at step 40: loss 2.1000 (best)" in text
    assert "saved checkpoints/step-40" in text
    assert "done after 40 steps, 163,840 tokens, 1:01" in text
    assert "a [markup] name  run/[x]" in text


def test_json_has_one_event_a_line_and_nothing_else() -> None:
    records = [json.loads(line) for line in show("json").splitlines()]
    assert [record["event"] for record in records] == [*(e.name for e in STORY), "summary"]
    assert records[-1]["rows"] == ROWS
    assert records[3] == STORY[3].as_record()


def test_json_knows_no_nan() -> None:
    record = json.loads(show("json", story=[step(1, math.nan)]).splitlines()[0])
    assert record["loss"] is None


def test_quiet_says_only_warnings_and_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    text = show("quiet")
    assert text.startswith("done after 40 steps")
    assert "118 used of 120" in text
    assert capsys.readouterr().err == "warning: the budget is near\n"


def test_other_ranks_are_silent() -> None:
    for mode in ("live", "plain", "json", "quiet"):
        assert show(mode, rank=1, terminal=mode == "live") == ""


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_live_view_shows_the_numbers_at_any_width(width: int) -> None:
    text = show("auto", terminal=True, width=width)
    assert "step 40/40" in text
    if width >= 60:
        for part in ("2.1000", "2.1000 at step 40", "2.00e-04", "512", "0.800", "14.4 GB"):
            assert part in text
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)


def test_the_cursor_comes_back_after_a_failure() -> None:
    file = io.StringIO()
    output = RichConsole(file=file, force_terminal=True, width=80, height=30)
    with pytest.raises(ValueError, match="the loop failed"), Console(rank=0, output=output) as c:
        for event in STORY[:8]:
            c.notify(event)
        raise ValueError("the loop failed")
    assert file.getvalue().rindex(SHOW_CURSOR) > file.getvalue().rindex(HIDE_CURSOR)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "step 11/40 epoch" in show("auto", terminal=True)


def test_an_unknown_event_is_no_error() -> None:
    class Other(Event):
        name = "other"

    for mode in ("live", "plain", "quiet"):
        terminal = mode == "live"
        assert show(mode, story=[Other()], terminal=terminal) == show(
            mode, story=[], terminal=terminal
        )
    assert json.loads(show("json", story=[Other()]).splitlines()[0]) == {"event": "other"}


def test_remaining_time_follows_the_recent_steps() -> None:
    progress = TrainingProgress()
    assert progress.remaining_seconds() is None
    progress.update(Started(100, 1.0, 1), 0.0)
    progress.update(step(1), 50.0)  # the first step compiles
    for number in range(2, 61):
        progress.update(step(number), 50.0 + number)
    assert progress.remaining_seconds() == pytest.approx(40.0)


def test_the_smoothed_loss_starts_at_the_first_and_skips_what_is_not_finite() -> None:
    progress = TrainingProgress()
    progress.update(step(1, 4.0), 0.0)
    assert progress.smoothed == pytest.approx(4.0)
    progress.update(step(2, math.inf), 1.0)
    assert progress.smoothed == pytest.approx(4.0)
    progress.update(step(3, 2.0), 2.0)
    assert progress.smoothed == pytest.approx((0.9 * 4 + 2) / 1.9)


def test_sparkline() -> None:
    assert sparkline([1.0], 10) == ""
    assert sparkline([3.0, 2.0, 1.0], 10) == "█▅▁"
    assert sparkline([1.0, 1.0], 10) == "▁▁"
    assert len(sparkline([float(i) for i in range(1000)], 17)) == 17
    assert sparkline([1.0, math.nan, 2.0], 10) == "▁█"


def test_the_metric_of_a_task_is_a_line_and_the_best_one_stands_in_the_view() -> None:
    progress = TrainingProgress()
    lines = []
    for number, value, best in ((2, 0.5, True), (4, 0.25, False)):
        event = TaskValidated(number, "gsm8k", "strict_match", value, 8, 1.0, best)
        progress.update(event, 0.0)
        lines.append(progress.plain(event))
        assert scalars(event) == {"validation/gsm8k/strict_match": value}
    assert lines[0] == "gsm8k at step 2: strict_match 50.0% (8 questions) (best)"
    assert lines[1] == "gsm8k at step 4: strict_match 25.0% (8 questions)"
    assert progress.best_task is not None and progress.best_task.step == 2
    shown = io.StringIO()
    RichConsole(file=shown, width=100).print(progress.view("run"))
    assert "strict_match 25.0%" in shown.getvalue()
    assert "strict_match 50.0% at step 2" in shown.getvalue()


def test_a_round_says_what_was_written_and_how_old_a_steps_text_is() -> None:
    begun = RoundBegun(
        step=16, round=1, steps=16, answers=64, tokens=5120, cut=3, writing_seconds=61.0,
        scoring_seconds=12.0, metrics={"mean_reward": 0.25},
    )  # fmt: skip
    aged = replace(step(17, 2.0), text_age=0)
    text = show("plain", story=[begun, aged])
    assert (
        "round 2 at step 16: 64 answers, 5,120 tokens, 3 cut, mean reward 0.25; written in" in text
    )
    assert "1:01, scored in 0:12" in text
    assert "text 0 steps old eta" in text
    assert "round 2: 64 answers" in show(
        "live", terminal=True, width=200, story=[STORY[1], begun, aged, STORY[-1]]
    )
