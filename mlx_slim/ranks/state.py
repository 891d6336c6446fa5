"""Where this process stands among the collectives: what its watchdog reports and judges.

Invariant: the main thread writes, the watchdog's thread reads; ``number`` counts the collectives
entered, so it is the same on all ranks at the same line of the program. Used by ``collectives.py``
and ``watchdog.py``. Try it: ``python -m pytest tests/ranks/test_collectives.py``.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mlx_slim.interrupts import finishing

LEAST_TIMEOUT = 2.0  # seconds: a heartbeat is sent eight times in that


@dataclass
class CollectiveState:
    """The collectives of this process.

    Attributes:
        number: Entered so far.
        since: When the last one was entered, monotonic seconds; None outside of any.
        patient: Whether it may take as long as it takes: another rank works alone meanwhile.
        waited: Seconds spent in collectives so far.
        sent: Bytes that this rank sent so far, by what for.
    """

    number: int = 0
    since: float | None = None
    patient: bool = False
    waited: float = 0.0
    sent: Counter[str] = field(default_factory=Counter)

    @contextlib.contextmanager
    def collective(self, *, patient: bool = False) -> Iterator[None]:
        """Be in a collective."""
        began = time.monotonic()
        self.number += 1
        self.patient, self.since = patient, began
        try:
            yield
        finally:
            self.since = None
            self.waited += time.monotonic() - began

    def seconds(self, now: float) -> float:
        """Return the seconds in a collective that has a limit; 0 outside of any.

        −1 where there is no limit: in a patient one, and while a file or a folder is written.
        """
        since = self.since
        if since is None:
            return -1.0 if finishing() else 0.0
        return -1.0 if self.patient else max(0.0, now - since)


state = CollectiveState()
_commands: list[Callable[[], str]] = []


@contextlib.contextmanager
def resumed_by(command: Callable[[], str]) -> Iterator[None]:
    """Inside, a rank that leaves names this command; empty where there is nothing to resume."""
    _commands.append(command)
    try:
        yield
    finally:
        _commands.remove(command)


def resume_hint() -> str:
    """Return what to do after a rank was lost."""
    command = ""
    with contextlib.suppress(Exception):  # nothing may keep this process from ending
        command = _commands[-1]() if _commands else ""
    return f"resume with: {command}" if command else "start the command again"
