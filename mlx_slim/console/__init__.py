"""The output of a loop: a live view, plain lines, JSON lines, or warnings only.

Invariant: the loop does not depend on the console; only rank 0 shows anything;
the terminal's cursor is restored however the loop ends (``with Console() as console``). Inside that
block no command is silent: a terminal shows the current stage, a pipe gets a line after two seconds
of silence (``stages.py``). Standard output holds JSON lines and nothing else in ``json``
mode. Try it:
``mlx-slim train smollm2-lora -o run``, and the same piped into ``cat``.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mlx_slim import progress, runtime
from mlx_slim.console.stages import OFTEN, Stages
from mlx_slim.console.training import TrainingProgress, sparkline
from mlx_slim.events import ClosingObserver, EvalAnswering, Event, Notice, StageProgress

__all__ = ["Console", "Display", "Mode", "TrainingProgress", "sparkline"]

Mode = Literal["auto", "live", "plain", "json", "quiet"]
_BEAT = 0.25  # seconds between checks for silence


class Display(Protocol):
    """The view of one kind of loop, built from its events.

    Attributes:
        first: The event that the live view appears with.
        last: The event that ends it; shown in ``quiet`` mode too.
    """

    first: type[Event]
    last: type[Event]

    def update(self, event: Event, now: float) -> None:
        """Take one event that happened at ``now``, seconds of a monotonic clock."""
        ...

    def plain(self, event: Event) -> str | None:
        """Return the line of ``event`` for a pipe or a file, without colour; None for no line."""
        ...

    def view(self, title: str) -> RenderableType:
        """Return the live view, which shows the state at the moment it is rendered."""
        ...


class _Status:
    """One line of a terminal, computed when it is rendered: the current stage."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._spinner = Spinner("dots")

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        """Render at the width of the terminal."""
        text = Text(self._stages.line(time.monotonic()), style="dim", no_wrap=True)
        text.truncate(max(1, options.max_width - 3), overflow="ellipsis")
        self._spinner.update(text=text)
        yield self._spinner


def _finite(value: Any) -> Any:
    """Return ``value`` with numbers that JSON cannot represent (NaN, infinities) as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console(ClosingObserver):
    """The observer that shows a loop to its user; use it as a context manager.

    Args:
        mode: ``live`` (a terminal's default), ``plain`` (the default otherwise), ``json`` (one
            event a line) or ``quiet`` (warnings, the end and the summary).
        title: One line: the heading of the live view.
        display: View of the loop; a fine-tune by default.
        rank: This process's rank; every rank but 0 is silent. Default: ``runtime.world``'s.
        output: Where to write, for tests; standard output by default.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        *,
        title: str = "",
        display: Display | None = None,
        rank: int | None = None,
        output: RichConsole | None = None,
    ) -> None:
        self._output = output or RichConsole(highlight=False)
        self._output.file = (
            self._output.file
        )  # fixed now: a later redirection of standard output has no effect
        if mode == "auto":
            terminal = self._output.is_terminal and not self._output.is_dumb_terminal
            mode = "live" if terminal else "plain"
        self.mode = mode
        self.display = display or TrainingProgress()
        self._silent = (runtime.world().rank() if rank is None else rank) != 0
        self._live: Live | None = None
        if mode == "live" and not self._silent:
            view = self.display.view(title)
            self._live = self._new_live(view)
        self._shown = time.monotonic()  # time of the last line
        self._stages = Stages(self._shown)
        self._status: Live | None = None
        self._lock = threading.RLock()  # the pulse runs in another thread
        self._closing = threading.Event()
        self._pulse: threading.Thread | None = None
        self._listening: contextlib.AbstractContextManager[None] | None = None

    def __enter__(self) -> Console:
        """Subscribe to stage events, and start the thread that reports progress."""
        self._listening = progress.listening(self)
        self._listening.__enter__()
        if self.mode in ("live", "plain") and not self._silent:
            self._pulse = threading.Thread(target=self._beat, name="console", daemon=True)
            self._pulse.start()
        return self

    def close(self) -> None:
        """Stop the live views, leave their last state, show the cursor; safe to call twice."""
        self._closing.set()
        if self._listening is not None:
            self._listening.__exit__(None, None, None)
            self._listening = None
        if self._pulse is not None and self._pulse is not threading.current_thread():
            self._pulse.join()
            self._pulse = None
        with self._lock:
            self._end_status()
            if self._live is not None and self._live.is_started:
                self._live.stop()

    def notify(self, event: Event) -> None:
        """Show one event."""
        if self._silent:
            return
        try:
            with self._lock:
                self._show(event, time.monotonic())
        except BrokenPipeError:
            self._abandon()

    def _abandon(self) -> None:
        """Stop as after Ctrl-C: the reader closed the pipe (``| head``)."""
        self._silent = True
        signal.raise_signal(signal.SIGINT)

    def _beat(self) -> None:
        """Check periodically for silence."""
        try:
            while not self._closing.wait(_BEAT):
                with self._lock:
                    self.tick(time.monotonic())
        except BrokenPipeError:
            self._abandon()

    def tick(self, now: float) -> None:
        """Show the current stage after a period of silence.

        Args:
            now: Seconds of a monotonic clock.
        """
        if self._silent or self.mode not in ("live", "plain"):
            return
        if self._output.is_terminal and not self._output.is_dumb_terminal:
            if self._status is None and not (self._live and self._live.is_started):
                self._status = self._new_live(_Status(self._stages), transient=True)
                self._status.start()
            return
        if now - self._shown >= self._stages.interval(now):
            self._line(self._stages.line(now))

    def _new_live(self, shown: RenderableType, *, transient: bool = False) -> Live:
        """Return a live display; a stream that goes to a file or a pipe is not redirected."""
        return Live(
            shown,
            console=self._output,
            refresh_per_second=8,
            transient=transient,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _show(self, event: Event, now: float) -> None:
        self._stages.update(event, now)
        self.display.update(event, now)
        if isinstance(event, (StageProgress, EvalAnswering)):
            if self.mode == "json" and now - self._shown >= OFTEN:
                self._line(json.dumps(event.as_record(), ensure_ascii=False))
            return
        if self.mode == "json":
            record = {key: _finite(value) for key, value in event.as_record().items()}
            self._line(json.dumps(record, ensure_ascii=False))
        elif self._live is not None:
            self._notify_live(event, self._live)
        elif self.mode == "plain" or isinstance(event, self.display.last):
            if (line := self._plain(event)) is not None:
                self._line(line)
        elif isinstance(event, Notice) and event.level == "warning":
            print(f"warning: {event.message}", file=sys.stderr, flush=True)

    def _notify_live(self, event: Event, live: Live) -> None:
        if isinstance(event, Notice):  # stays above the view, in the scroll-back
            style = "yellow" if event.level == "warning" else "dim"
            self._output.print(Text(self._plain(event) or "", style=style), soft_wrap=True)
        elif isinstance(event, self.display.first) and not live.is_started:
            self._end_status()
            live.start()
        elif isinstance(event, self.display.last):
            live.refresh()
            live.stop()

    def _plain(self, event: Event) -> str | None:
        if isinstance(event, Notice):
            return f"warning: {event.message}" if event.level == "warning" else event.message
        return self.display.plain(event)

    def _line(self, line: str) -> None:
        """Write one line as it is: no colour, no wrapping."""
        self._shown = time.monotonic()
        if self._status is not None:  # the line goes above it
            self._output.print(Text(line), soft_wrap=True)
            return
        self._output.file.write(line + "\n")
        self._output.file.flush()

    def summary(self, title: str, rows: Mapping[str, str]) -> None:
        """Show the final panel: ``rows`` of name and value, in order; an event in ``json`` mode."""
        self.close()
        if self._silent:
            return
        if self.mode == "json":
            record = {"event": "summary", "title": title, "rows": dict(rows)}
            self._line(json.dumps(record, ensure_ascii=False))
        elif self._live is not None or (self.mode == "quiet" and self._output.is_terminal):
            table = Table.grid(padding=(0, 2))
            table.add_column(style="dim", no_wrap=True)
            table.add_column(overflow="fold")
            for name, value in rows.items():
                table.add_row(name, Text(value))
            heading = f"[bold]{escape(title)}[/]"
            self._output.print(
                Panel(table, title=heading, title_align="left", border_style="green")
            )
        else:
            width = max((len(name) for name in rows), default=0)
            for line in (title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())):
                self._line(line)
