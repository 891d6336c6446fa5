"""The view of an evaluation: questions answered, running accuracy, remaining time.

Invariant: a running figure is over the questions that are on disk, and the live view keeps its
height. Try it: ``mlx-slim eval MODEL --task openbookqa -o OUT``, and the same piped into ``cat``.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mlx_slim.console.widgets import Clock, eta, memory_row, progress_row
from mlx_slim.events import (
    EvalAnswering,
    EvalDone,
    EvalProgress,
    EvalStarted,
    Event,
    TaskDone,
)
from mlx_slim.units import human_bytes, human_seconds


def figure(value: float, stderr: float | None) -> str:
    """Return a metric as text: ``0.4299 ± 0.0049``; without a standard error the value alone."""
    return f"{value:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


class Scoring:
    """The state of an evaluation, built from its events."""

    first: type[Event] = EvalStarted
    last: type[Event] = EvalDone

    def __init__(self) -> None:
        self.started: EvalStarted | None = None
        self.latest: EvalProgress | None = None
        self.done: EvalDone | None = None
        self.finished = 0
        self.answering: EvalProgress | EvalAnswering | None = None
        self._clock, self._questions = Clock(), Clock()

    def update(self, event: Event, now: float) -> None:
        """Take one event that happened at ``now``, seconds of a monotonic clock."""
        match event:
            case EvalStarted():  # of the first model, or of the next
                self.started, self.latest, self.finished = event, None, 0
                self.answering = None
                self._clock, self._questions = Clock(), Clock()
                self._clock.mark(event.fraction, now)
            case EvalProgress():
                self.latest = self.answering = event
                self._clock.mark(event.fraction, now)
            case EvalAnswering():
                self.answering = event
                self._clock.mark(event.fraction, now)
                self._questions.mark(event.answered, now)
            case TaskDone():
                self.finished += 1
            case EvalDone():
                self.done = event

    def remaining(self, now: float | None = None) -> str:
        """Return the time left as text; ``now`` subtracts the time since the last event."""
        waited = 0.0 if now is None else self._clock.since(now)
        return eta(self._clock.left(1.0, waited))

    def plain(self, event: Event) -> str | None:
        """Return the line of ``event`` for a pipe or a file, without colour; None for no line."""
        match event:
            case EvalStarted():
                model = f"{event.model} + {event.adapter}" if event.adapter else event.model
                before = f", {event.answered:,} answered before" if event.answered else ""
                questions = f"{event.questions:,} questions{before}"
                return f"scoring {model}: {', '.join(event.tasks)}: {questions}"
            case EvalProgress():
                return (
                    f"{event.task} {event.answered}/{event.questions} "
                    f"{event.metric} {event.value:.4f} {event.tokens_per_second:,.0f} tok/s "
                    f"peak {human_bytes(event.peak_memory_bytes)} eta {self.remaining()}"
                )
            case TaskDone():
                figures = [
                    f"{name} {figure(one['value'], one.get('stderr'))}"
                    for name, one in event.metrics.items()
                ]
                return f"{event.task}: {', '.join(figures)} ({human_seconds(event.seconds)})"
            case EvalDone():
                return f"results in {event.path} ({human_seconds(event.seconds)})"
        return None

    def questions_answered(self) -> str:
        """Return ``37 of 1,000 questions, 0.8 questions/s``."""
        if self.answering is None:
            return "–"
        rate = self._questions.rate()
        speed = f", {rate:.2g} questions/s" if rate else ""
        return f"{self.answering.answered:,} of {self.answering.questions:,} questions{speed}"

    def view(self, title: str) -> View:
        """Return the live view."""
        return View(self, title)


class View:
    """The live view: a bar, the running figures, memory."""

    def __init__(self, scoring: Scoring, title: str) -> None:
        self.scoring, self.title = scoring, title

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        """Render at the width of the terminal."""
        state, latest, started = self.scoring, self.scoring.latest, self.scoring.started
        tasks = len(started.tasks) if started else 0
        recent = state.answering or started
        fraction = recent.fraction if recent else None
        label = f"task {min(state.finished + 1, tasks)}/{tasks}"
        end = "done" if state.done else f"eta {state.remaining(time.monotonic())}"
        lines = [
            progress_row(label, fraction, end),
            self._numbers(options.max_width >= 76),
            memory_row(
                latest.active_memory_bytes if latest else 0,
                latest.peak_memory_bytes if latest else 0,
                started.budget_bytes if started else 0,
            ),
        ]
        title = self.title or (started.model if started else "")
        heading = f"[bold]{escape(title)}[/]" if title else None
        yield Panel(Group(*lines), title=heading, title_align="left", border_style="dim")

    def _numbers(self, wide: bool) -> Table:
        latest, started = self.scoring.latest, self.scoring.started
        recent = self.scoring.answering
        name = recent.task if recent else started.tasks[0] if started else "–"
        cells = [
            ("task", name),
            (latest.metric if latest else "score", f"{latest.value:.4f}" if latest else "–"),
            ("answered", self.scoring.questions_answered().replace(" questions", "", 1)),
            ("tokens/s", f"{latest.tokens_per_second:,.0f}" if latest else "–"),
        ]
        per_row = 2 if wide else 1
        table = Table.grid(expand=True, padding=(0, 1))
        for _ in range(per_row):
            table.add_column(style="dim", width=14, no_wrap=True)
            table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for start in range(0, len(cells), per_row):
            row: list[Any] = []
            for heading, value in cells[start : start + per_row]:
                row += [heading, Text(value)]
            table.add_row(*row)
        return table
