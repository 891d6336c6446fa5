"""What a user sees of a fine-tune: loss, speed, memory, remaining time.

Invariant: the live view has the same number of rows at every moment, so nothing jumps. Try it:
``mlx-slim train smollm2-lora -o run``.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlx_slim import runtime
from mlx_slim.events import Done, Event, Resumed, Saved, Started, StepDone, ValidationDone

_BARS = "▁▂▃▄▅▆▇█"
_SMOOTHING = 0.9  # of the running mean of the loss, a step
_RECENT_STEPS = 30  # that the remaining time is judged by: a slow first step is soon forgotten
_REASONS = {
    "complete": "done",
    "early_stopping": "stopped early: validation no longer improves",
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


class Progress:
    """The state of a loop, gathered from its events; ``None`` where nothing was reported yet."""

    first, last = Started, Done

    def __init__(self) -> None:
        self.started: Started | None = None
        self.step: StepDone | None = None
        self.validation: ValidationDone | None = None
        self.best: ValidationDone | None = None
        self.saved: Saved | Resumed | None = None
        self.done: Done | None = None
        self.smoothed = math.nan
        self.losses: list[float] = []
        self._weight = 0.0
        self._times: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS)

    def update(self, event: Event, now: float) -> None:
        """Take one event that happened at ``now``, seconds of a monotonic clock."""
        match event:
            case Started():
                self.started = event
                self._times.append((event.first_step, now))
            case StepDone():
                self.step = event
                self._times.append((event.step, now))
                self._smooth(event.loss)
            case ValidationDone():
                self.validation = event
                if event.best:
                    self.best = event
            case Saved() | Resumed():
                self.saved = event
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
        """Optimizer steps of the whole run, once the loop has said so."""
        return self.started.total_steps if self.started else None

    def remaining_seconds(self) -> float | None:
        """Return the seconds left at the rate of the recent steps, or None if it is unknown."""
        if self.total_steps is None or len(self._times) < 2:
            return None
        (first, begun), (last, now) = self._times[0], self._times[-1]
        if last <= first:
            return None
        return (now - begun) / (last - first) * max(0, self.total_steps - last)

    def plain(self, event: Event) -> str | None:
        """Return the line of ``event`` for a pipe or a file, without colour; None for no line."""
        match event:
            case Started():
                resumed = f", from step {event.first_step}" if event.first_step else ""
                budget = runtime.human_bytes(event.budget_bytes)
                return (
                    f"training {event.total_steps} steps, {event.total_epochs:g} epochs{resumed}, "
                    f"memory budget {budget}"
                )
            case StepDone():
                left = self.remaining_seconds()
                eta = "–" if left is None else runtime.human_seconds(left)
                return (
                    f"step {event.step}/{self.total_steps or '–'} epoch {event.epoch:.2f} "
                    f"loss {event.loss:.4f} lr {event.learning_rate:.2e} "
                    f"{event.tokens_per_second:.0f} tok/s grad {event.grad_norm:.3f} "
                    f"mem {runtime.human_bytes(event.active_memory_bytes)} "
                    f"peak {runtime.human_bytes(event.peak_memory_bytes)} eta {eta}"
                )
            case ValidationDone():
                mark = " (best)" if event.best else ""
                return f"validation at step {event.step}: loss {event.loss:.4f}{mark}"
            case Saved():
                return f"saved {event.path}"
            case Resumed():
                return f"resumed at step {event.step} from {event.path}"
            case Done():
                reason = _REASONS.get(event.reason, event.reason)
                return (
                    f"{reason} after {event.step} steps, {event.tokens:,} tokens, "
                    f"{runtime.human_seconds(event.seconds)}, "
                    f"peak memory {runtime.human_bytes(event.peak_memory_bytes)}"
                )
        return None

    def view(self, title: str) -> View:
        """Return the live view."""
        return View(self, title)


def share_style(share: float) -> str:
    """Return the colour of a part of the memory budget."""
    return "green" if share < 0.75 else "yellow" if share < 0.9 else "red"


class View:
    """The live view: the same number of rows at every moment, so nothing jumps."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress, self.title = progress, title

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        """Render at the width of the terminal."""
        width = options.max_width
        lines = [self._progress_line(), self._numbers(width), self._memory_line()]
        title = f"[bold]{escape(self.title)}[/]" if self.title else None
        yield Panel(Group(*lines), title=title, title_align="left", border_style="dim")

    def _progress_line(self) -> Table:
        p = self.progress
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        total = p.total_steps or 0
        left = p.remaining_seconds()
        if p.done:
            end = _REASONS.get(p.done.reason, p.done.reason).split(":")[0]
        elif left is None:
            end = "eta –"
        else:
            end = f"eta {runtime.human_seconds(left)}"
        share = f"{p.steps_done / total:>4.0%}" if total else "  – "
        row.add_row(
            Text(f"step {p.steps_done}/{total or '–'}", style="bold"),
            ProgressBar(total=max(total, 1), completed=p.steps_done),
            f"{share}  {end}",
        )
        return row

    def _numbers(self, width: int) -> Table:
        p, step = self.progress, self.progress.step
        wide = width >= 76
        epochs = f" of {p.started.total_epochs:g}" if p.started else ""
        validation = f"{p.validation.loss:.4f}" if p.validation else "–"
        best = f"{p.best.loss:.4f} at step {p.best.step}" if p.best else "–"
        curve = sparkline(p.losses, max(0, width // 2 - 40 if wide else width - 40))
        cells = [
            ("loss", f"{p.smoothed:.4f}  last {step.loss:.4f}  {curve}" if step else "–"),
            ("validation", validation),
            ("epoch", f"{step.epoch:.2f}{epochs}" if step else "–"),
            ("best", best),
            ("tokens/s", f"{step.tokens_per_second:,.0f}" if step else "–"),
            ("learning rate", f"{step.learning_rate:.2e}" if step else "–"),
            ("saved", p.saved.path if p.saved else "–"),
            ("gradient norm", f"{step.grad_norm:.3f}" if step else "–"),
        ]
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

    def _memory_line(self) -> Table:
        step, started = self.progress.step, self.progress.started
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(style="dim", width=13, no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        active = step.active_memory_bytes if step else 0
        peak = step.peak_memory_bytes if step else 0
        budget = started.budget_bytes if started else 0
        style = share_style(peak / budget if budget else 0.0)
        row.add_row(
            "memory",
            ProgressBar(total=max(budget, 1), completed=active, complete_style=style),
            Text.assemble(
                f"{runtime.human_bytes(active)} of {runtime.human_bytes(budget)}  peak ",
                (runtime.human_bytes(peak), style),
            ),
        )
        return row
