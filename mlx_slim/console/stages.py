"""The status line of a command: the current stage, its rate and its remaining time.

Invariant: ``Stages.line`` always names the current work and its duration, so a console that shows
the line is never silent; rates and remaining times are those of the stage.
Try it: ``mlx-slim quantize MODEL -o DIR``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_slim.console.widgets import Clock, eta
from mlx_slim.events import (
    EvalAnswering,
    EvalProgress,
    Event,
    Notice,
    StageProgress,
    Started,
    StepDone,
    TaskDone,
)
from mlx_slim.units import human_bytes, human_seconds

OFTEN, _SELDOM = 2.0, 10.0  # seconds of silence
_STARTING = "loading libraries and checking the input"
_FIRST = 60.0  # seconds of a stage with frequent lines


@dataclass
class _Open:
    """A stage that has begun and not ended."""

    event: StageProgress
    began: float
    clock: Clock = field(default_factory=Clock)


class Stages:
    """The open stages, innermost last; where there is none, the latest notice or what ended."""

    def __init__(self, now: float) -> None:
        self._open: list[_Open] = []
        self._label, self._since, self._steps = _STARTING, now, 0

    def update(self, event: Event, now: float) -> None:
        """Take one event that happened at ``now``, seconds of a monotonic clock."""
        match event:
            case StageProgress():
                self._advance(event, now)
            case EvalAnswering() | EvalProgress():
                done, total = event.answered, event.questions
                self._advance(StageProgress(_scoring(event.task), done, total, "questions"), now)
            case TaskDone():
                self._advance(StageProgress(_scoring(event.task), finished=True), now)
            case Started():
                self._steps, self._label = event.total_steps, f"step {event.first_step + 1}"
            case StepDone():
                self._label = f"step {event.step + 1} of {self._steps}"
            case Notice():
                self._label = event.message
            case _:
                self._label = f"after {event.name.replace('_', ' ')}"
        self._since = now

    def _advance(self, event: StageProgress, now: float) -> None:
        names = [one.event.stage for one in self._open]
        if event.finished:
            if event.stage in names:  # and the stages still open inside it
                del self._open[len(names) - 1 - names[::-1].index(event.stage) :]
            self._label = f"after {event.stage}"
            return
        if event.stage not in names:
            self._open.append(_Open(event, now))
            names.append(event.stage)
        one = self._open[names.index(event.stage)]
        one.event = event
        one.clock.mark(event.done, now)

    def line(self, now: float) -> str:
        """Return the status line: ``comparing: 3 of 8 rows, 1.2 rows/s, 0:04 left``."""
        if not self._open:
            return f"{self._label} ({human_seconds(now - self._since)})"
        one = self._open[-1]
        event, spent = one.event, human_seconds(now - one.began)
        if not event.unit:
            return f"{event.stage} ({spent})"
        phrases = [_count(event)]
        if rate := one.clock.rate():
            phrases.append(_rate(rate, event.unit))
        left = one.clock.left(event.total, one.clock.since(now))
        phrases.append(f"{spent} so far" if left is None else f"{eta(left)} left")
        return f"{event.stage}: {', '.join(phrases)}"

    def interval(self, now: float) -> float:
        """Return after how many seconds of silence a pipe gets a line.

        Two in the first minute of a stage, ten later, so that long logs stay short.
        """
        since = self._open[-1].began if self._open else self._since
        return OFTEN if now - since < _FIRST else _SELDOM


def _scoring(task: str) -> str:
    return f"scoring {task}"


def _count(event: StageProgress) -> str:
    """Return ``3 of 8 rows``; ``3 rows`` where their number is unknown."""
    if event.unit == "bytes":
        done = human_bytes(int(event.done))
        return done if event.total is None else f"{done} of {human_bytes(int(event.total))}"
    of = "" if event.total is None else f" of {event.total:,.0f}"
    return f"{int(event.done):,}{of} {event.unit}"


def _rate(rate: float, unit: str) -> str:
    """Return ``1.2 rows/s``."""
    if unit == "bytes":
        return f"{human_bytes(int(rate))}/s"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"
