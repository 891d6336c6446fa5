"""Building blocks of live views: clock, progress row, memory row."""

from __future__ import annotations

from collections import deque

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlx_slim.units import human_bytes, human_seconds

_RECENT = 30  # steps in the estimate of the remaining time: a slow first one drops out


class Clock:
    """Estimate of the remaining time from the rate of the last steps."""

    def __init__(self) -> None:
        self._times: deque[tuple[float, float]] = deque(maxlen=_RECENT)

    def since(self, now: float) -> float:
        """Return the seconds since the last mark."""
        return now - self._times[-1][1] if self._times else 0.0

    def mark(self, done: float, now: float) -> None:
        """Record that ``done`` (of any unit) was reached at ``now``, seconds."""
        self._times.append((done, now))

    def rate(self) -> float | None:
        """Return the units a second of the last marks; None before there are two."""
        if len(self._times) < 2:
            return None
        (first, begun), (last, now) = self._times[0], self._times[-1]
        return (last - first) / (now - begun) if last > first and now > begun else None

    def left(self, total: float | None, waited: float = 0.0) -> float | None:
        """Return the seconds until ``total`` is reached; None if that is unknown.

        Args:
            total: In the unit of ``mark``.
            waited: Seconds since the last mark.
        """
        rate = self.rate()
        if total is None or rate is None:
            return None
        return max(0.0, total - self._times[-1][0]) / rate - waited


def eta(seconds: float | None) -> str:
    """Return ``12:03``, or a dash."""
    return "–" if seconds is None else human_seconds(seconds)


def progress_row(label: str, fraction: float | None, end: str) -> Table:
    """Return a progress bar between ``label`` and ``end``."""
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True, justify="right")
    percent = "  – " if fraction is None else f"{fraction:>4.0%}"
    bar = ProgressBar(total=1.0, completed=fraction or 0.0)
    row.add_row(Text(label, style="bold"), bar, f"{percent}  {end}")
    return row


def memory_row(active: int, peak: int, budget: int) -> Table:
    """Return memory in use and at its peak, in bytes, as a bar relative to the budget."""
    fraction = peak / budget if budget else 0.0
    style = "green" if fraction < 0.75 else "yellow" if fraction < 0.9 else "red"
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(style="dim", width=13, no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True, justify="right")
    row.add_row(
        "memory",
        ProgressBar(total=max(budget, 1), completed=active, complete_style=style),
        Text.assemble(
            f"{human_bytes(active)} of {human_bytes(budget)}  peak ",
            (human_bytes(peak), style),
        ),
    )
    return row
