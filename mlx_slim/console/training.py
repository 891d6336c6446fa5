"""The view of a fine-tune: loss, speed, memory, remaining time.

Invariant: the live view has the same number of rows at every moment. Try it:
``mlx-slim train smollm2-lora -o run``.
"""

from __future__ import annotations

import itertools
import math
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
    Done,
    Event,
    ForgettingMeasured,
    Resumed,
    Saved,
    StageProgress,
    Started,
    StepDone,
    TaskValidated,
    ValidationDone,
)
from mlx_slim.round_events import RoundBegun
from mlx_slim.training.rank_speed import RanksMeasured
from mlx_slim.units import human_bytes, human_seconds

_BARS = "▁▂▃▄▅▆▇█"
_SMOOTHING = 0.9  # decay per step of the running mean of the loss
_REASONS = {
    "complete": "done",
    "early_stopping": "stopped early: validation no longer improves",
    "forgetting": "stopped early: the text of forgetting.path costs more bits than allowed",
    "interrupted": "interrupted",
    "non_finite_loss": "stopped: the loss is not finite",
}


def sparkline(values: list[float], width: int) -> str:
    """Return ``values`` as at most ``width`` bars, lowest to highest; empty without two values."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2 or width < 2:
        return ""
    count = min(width, len(finite))
    cuts = [i * len(finite) // count for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def _metrics(metrics: dict[str, float] | None) -> str:
    """Return `` (cross entropy 1.2345, divergence 0.1234)``; empty if there are none."""
    if not metrics:
        return ""
    each = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
    return f" ({', '.join(each)})"


def _short_metrics(metrics: dict[str, float] | None) -> str:
    """Return the metrics for the live view: of preferences margin and accuracies, else all."""
    if not metrics or "rewards/margins" not in metrics:
        return _metrics(metrics)
    text = f"  margin {metrics['rewards/margins']:+.3f}"
    for label, name in (("reward", "rewards/accuracies"), ("policy", "policy/accuracies")):
        if name in metrics:
            text += f"  {label} accuracy {metrics[name]:.0%}"
    return text


def _figure(event: TaskValidated) -> str:
    if event.metric == "reward":  # any number, where a function gives it
        return f"reward {event.value:.4g}"
    return f"{event.metric} {event.value:.1%}"


def _round(event: RoundBegun) -> str:
    cut = f", {event.cut:,} cut" if event.cut else ""
    figures = "".join(f", {k.replace('_', ' ')} {v:.3g}" for k, v in (event.metrics or {}).items())
    return f"{event.answers:,} answers, {event.tokens:,} tokens{cut}{figures}"


def _speeds(event: RanksMeasured) -> str:
    """Return the speed of each rank, and how long it waited."""
    each = zip(event.tokens_per_second, event.waiting, strict=True)
    return ", ".join(f"{speed:,.0f} tok/s {waiting:.0%} waiting" for speed, waiting in each)


def _forgetting(event: ForgettingMeasured) -> str:
    return f"{event.bits_per_byte:.4f} bits/byte ({event.rise:+.2%})"


class TrainingProgress:
    """The state of a loop, built from its events; ``None`` where nothing was reported yet."""

    first: type[Event] = Started
    last: type[Event] = Done

    def __init__(self) -> None:
        self.started: Started | None = None
        self.step: StepDone | None = None
        self.ranks: RanksMeasured | None = None
        self.validation: ValidationDone | None = None
        self.validating: float | None = None
        self.best: ValidationDone | None = None
        self.task: TaskValidated | None = None
        self.best_task: TaskValidated | None = None
        self.forgetting: ForgettingMeasured | None = None
        self.round: RoundBegun | None = None
        self.rewards: list[float] = []  # the mean of each round
        self.saved: Saved | Resumed | None = None
        self.done: Done | None = None
        self.smoothed = math.nan
        self.losses: list[float] = []
        self._weight = 0.0
        self._clock = Clock()

    def update(self, event: Event, now: float) -> None:
        """Take one event that happened at ``now``, seconds of a monotonic clock."""
        match event:
            case Started():
                self.started = event
                self._clock.mark(event.first_step, now)
            case StepDone():
                self.step = event
                self._clock.mark(event.step, now)
                self._smooth(event.loss)
            case RanksMeasured():
                self.ranks = event
            case ValidationDone():
                self.validation = event
                if event.best:
                    self.best = event
            case TaskValidated():
                self.task = event
                if event.best:
                    self.best_task = event
            case ForgettingMeasured():
                self.forgetting = event
            case RoundBegun():
                self.round = event
                if "reward" in (event.metrics or {}):
                    self.rewards.append((event.metrics or {})["reward"])
            case Saved() | Resumed():
                self.saved = event
            case StageProgress(stage="validating"):
                fraction = event.done / event.total if event.total else 0.0
                self.validating = None if event.finished else fraction
            case Done():
                self.done = event

    def _smooth(self, loss: float) -> None:
        if math.isfinite(loss):  # mean with weights 0.9^age, exact from the first step on
            before = _SMOOTHING * self._weight
            total = (0.0 if before == 0 else self.smoothed * before) + (1 - _SMOOTHING) * loss
            self._weight = before + 1 - _SMOOTHING
            self.smoothed = total / self._weight
        self.losses.append(self.smoothed)

    @property
    def steps_done(self) -> int:
        """Optimizer steps done, those of a resumed run included."""
        if self.step:
            return self.step.step
        return self.started.first_step if self.started else 0

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, once the loop has reported it."""
        return self.started.total_steps if self.started else None

    def remaining_seconds(self, now: float | None = None) -> float | None:
        """Return the seconds left at the rate of the recent steps, or None if it is unknown.

        ``now`` subtracts the time since the last step.
        """
        waited = 0.0 if now is None else self._clock.since(now)
        return self._clock.left(self.total_steps, waited)

    def left_or_spent(self, now: float) -> str:
        """Return the time left; during the first step, the time spent."""
        left = self.remaining_seconds(now)
        spent = self._clock.since(now)
        return f"eta {eta(left)}" if left is not None or spent < 1 else f"{eta(spent)} so far"

    def plain(self, event: Event) -> str | None:
        """Return the line of ``event`` for a pipe or a file, without colour; None for no line."""
        match event:
            case Started():
                resumed = f", from step {event.first_step}" if event.first_step else ""
                ranks = f" on {event.ranks} ranks" if event.ranks else ""
                budget = human_bytes(event.budget_bytes)
                return (
                    f"training {event.total_steps} steps{ranks}, {event.total_epochs:g} "
                    f"epochs{resumed}, memory budget {budget}"
                )
            case StepDone():
                left = eta(self.remaining_seconds())
                age = "" if event.text_age is None else f"text {event.text_age} steps old "
                return (
                    f"step {event.step}/{self.total_steps or '–'} epoch {event.epoch:.2f} "
                    f"loss {event.loss:.4f}{_metrics(event.metrics)} lr {event.learning_rate:.2e} "
                    f"{event.tokens_per_second:.0f} tok/s grad {event.grad_norm:.3f} "
                    f"mem {human_bytes(event.active_memory_bytes)} "
                    f"peak {human_bytes(event.peak_memory_bytes)} {age}eta {left}"
                )
            case RanksMeasured():
                return f"ranks at step {event.step}: {_speeds(event)}"
            case ValidationDone():
                mark = " (best)" if event.best else ""
                metrics = _metrics(event.metrics)
                return f"validation at step {event.step}: loss {event.loss:.4f}{metrics}{mark}"
            case TaskValidated():
                mark = " (best)" if event.best else ""
                return (
                    f"{event.task} at step {event.step}: {_figure(event)} "
                    f"({event.questions:,} questions){mark}"
                )
            case ForgettingMeasured():
                over = "" if event.within else ": over the limit"
                return f"forgetting at step {event.step}: {_forgetting(event)}{over}"
            case RoundBegun():
                return (
                    f"round {event.round + 1} at step {event.step}: {_round(event)}; written in "
                    f"{human_seconds(event.writing_seconds)}, scored in "
                    f"{human_seconds(event.scoring_seconds)}"
                )
            case Saved():
                return f"saved {event.path}"
            case Resumed():
                return f"resumed at step {event.step} from {event.path}"
            case Done():
                reason = _REASONS.get(event.reason, event.reason)
                return (
                    f"{reason} after {event.step} steps, {event.tokens:,} tokens, "
                    f"{human_seconds(event.seconds)}, "
                    f"peak memory {human_bytes(event.peak_memory_bytes)}"
                )
        return None

    def view(self, title: str) -> TrainingView:
        """Return the live view."""
        return TrainingView(self, title)


class TrainingView:
    """The live view: the same number of rows at every moment, so the output does not move."""

    def __init__(self, progress: TrainingProgress, title: str) -> None:
        self.progress, self.title = progress, title

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        """Render at the width of the terminal."""
        width = options.max_width
        p, step = self.progress, self.progress.step
        end = _REASONS.get(p.done.reason, p.done.reason).split(":")[0] if p.done else ""
        lines = [
            progress_row(
                f"step {p.steps_done}/{p.total_steps or '–'}",
                p.steps_done / p.total_steps if p.total_steps else None,
                end or p.left_or_spent(time.monotonic()),
            ),
            self._numbers(width),
            memory_row(
                step.active_memory_bytes if step else 0,
                step.peak_memory_bytes if step else 0,
                p.started.budget_bytes if p.started else 0,
            ),
        ]
        ranks = f" on {p.started.ranks} ranks" if p.started and p.started.ranks else ""
        title = f"[bold]{escape(self.title)}[/]{ranks}" if self.title else None
        yield Panel(Group(*lines), title=title, title_align="left", border_style="dim")

    def _numbers(self, width: int) -> Table:
        p, step = self.progress, self.progress.step
        wide = width >= 76
        epochs = f" of {p.started.total_epochs:g}" if p.started else ""
        validation = "–"
        if p.validating is not None:
            validation = f"{p.validating:.0%} of the rows …"
        elif p.validation:
            validation = f"{p.validation.loss:.4f}{_short_metrics(p.validation.metrics)}"
        if p.task:
            validation = f"{_figure(p.task)}" + f"  loss {validation}" * (validation != "–")
        if p.forgetting:
            validation += f"  forgetting {_forgetting(p.forgetting)}"
        best = f"{p.best.loss:.4f} at step {p.best.step}" if p.best else "–"
        if p.best_task:
            best = f"{_figure(p.best_task)} at step {p.best_task.step}"
        compared = ""
        if step and step.metrics and "rewards/margins" in step.metrics:
            compared = _short_metrics(step.metrics)
        ranks = f"  {_speeds(p.ranks)}" if p.ranks else ""
        saved = p.saved.path if p.saved else "–"
        if p.round:
            saved += f"  round {p.round.round + 1}: {_round(p.round)}"
        curve = sparkline(p.losses, max(0, width // 2 - 40 if wide else width - 40))
        cells = [
            ("loss", f"{p.smoothed:.4f}  last {step.loss:.4f}{compared}  {curve}" if step else "–"),
            ("validation", validation),
            ("epoch", f"{step.epoch:.2f}{epochs}" if step else "–"),
            ("best", best),
            ("tokens/s", f"{step.tokens_per_second:,.0f}{ranks}" if step else "–"),
            ("learning rate", f"{step.learning_rate:.2e}" if step else "–"),
            ("saved", saved),
            ("gradient norm", f"{step.grad_norm:.3f}" if step else "–"),
        ]
        if p.round and p.rewards:
            figures = p.round.metrics or {}
            curve = sparkline(p.rewards, max(0, width // 2 - 60 if wide else width - 60))
            cells[0] = (
                "reward",
                f"{figures['reward']:.3f}  spread {figures['reward_std']:.3f}  "
                f"{figures['frac_reward_zero_std']:.0%} of groups alike  {curve}",
            )
            cells[2] = ("policy", _metrics(step.metrics).strip(" ()") if step else "–")
        per_row = 2 if wide else 1
        table = Table.grid(expand=True, padding=(0, 1))
        for _ in range(per_row):
            table.add_column(style="dim", width=13, no_wrap=True)
            table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for start in range(0, len(cells), per_row):
            row: list[Any] = []
            for name, value in cells[start : start + per_row]:
                row += [name, Text(value.rstrip())]
            table.add_row(*row)
        return table
