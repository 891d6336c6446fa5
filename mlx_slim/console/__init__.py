"""What a user sees of a loop: a live view, plain lines, JSON lines, or next to nothing.

Invariant: the loop never waits for the console and never learns of it; only rank 0 shows anything;
the terminal's cursor comes back however the loop ends (``with Console() as console``). Standard
output holds JSON lines and nothing else in ``json`` mode. Try it:
``mlx-slim train smollm2-lora -o run``, and the same piped into ``cat``.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mlx_slim import runtime
from mlx_slim.console.training import TrainingProgress, sparkline
from mlx_slim.events import Closing, Event, Notice

__all__ = ["Console", "Display", "Mode", "Progress", "sparkline"]

Mode = Literal["auto", "live", "plain", "json", "quiet"]


class Display(Protocol):
    """What one kind of loop looks like, gathered from its events.

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


def _finite(value: Any) -> Any:
    """Return ``value`` with numbers that JSON does not know (NaN, infinities) as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console(Closing):
    """The observer that shows a loop to its user; use it as a context manager.

    Args:
        mode: ``live`` (a terminal's default), ``plain`` (the default otherwise), ``json`` (one
            event a line) or ``quiet`` (warnings, the end and the summary).
        title: What runs, one line: it heads the live view.
        display: What the loop looks like; a fine-tune by default.
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
        if mode == "auto":
            terminal = self._output.is_terminal and not self._output.is_dumb_terminal
            mode = "live" if terminal else "plain"
        self.mode = mode
        self.display = display or TrainingProgress()
        self._silent = (runtime.world().rank() if rank is None else rank) != 0
        self._live: Live | None = None
        if mode == "live" and not self._silent:
            view = self.display.view(title)
            self._live = Live(view, console=self._output, refresh_per_second=8)

    def close(self) -> None:
        """Stop the live view, leave its last state, show the cursor; safe to call twice."""
        if self._live is not None and self._live.is_started:
            self._live.stop()

    def notify(self, event: Event) -> None:
        """Show one event."""
        if self._silent:
            return
        try:
            self._show(event)
        except BrokenPipeError:  # the reader left (``| head``): as if it had pressed Ctrl-C
            self._silent = True
            signal.raise_signal(signal.SIGINT)

    def _show(self, event: Event) -> None:
        self.display.update(event, time.monotonic())
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
