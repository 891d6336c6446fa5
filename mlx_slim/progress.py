"""How far a stage of work is, reported to whoever listens without an observer in every signature.

Invariant: code that takes long opens a ``stage``; it does not learn who listens, and reports to
nobody where nobody does. Stages may nest; each one that begins also ends, also by an error. A
listener hears only of its own context: other threads report nothing, except through a stage that
they were handed. Try it: ``mlx-slim quantize MODEL -o DIR``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mlx_slim.events import Observer

_listener: ContextVar[Observer | None] = ContextVar("listener", default=None)
_Item = TypeVar("_Item")


@contextlib.contextmanager
def listening(observer: Observer | None) -> Iterator[None]:
    """Let ``observer`` hear of every stage inside the block; None silences them."""
    token = _listener.set(observer)
    try:
        yield
    finally:
        _listener.reset(token)


def listener() -> Observer | None:
    """Return who listens here, or None."""
    return _listener.get()


class Stage:
    """A stage of work under way; ``stage`` opens one.

    Args:
        name: What is done, in words: ``loading MODEL``.
        total: All its work in ``unit``; None where that is unknown.
        unit: Plural noun: ``rows``, ``questions``.
    """

    def __init__(self, name: str, total: float | None, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0.0
        self._lock = threading.Lock()
        self._listener = _listener.get()  # threads that it is handed to report there too

    def advance(self, count: float = 1) -> None:
        """Report ``count`` more."""
        with self._lock:
            self.done += count
            self.report()

    def reach(self, done: float) -> None:
        """Report that ``done`` of all is reached."""
        self.done = done
        self.report()

    def report(self, *, finished: bool = False) -> None:
        """Tell the listener, if there is one."""
        if self._listener is not None:
            # Imported here: the thirty classes of that module are a tenth of a command's start.
            from mlx_slim.events import StageProgress

            event = StageProgress(self.name, self.done, self.total, self.unit, finished)
            self._listener.notify(event)


@contextlib.contextmanager
def stage(name: str, total: float | None = None, unit: str = "") -> Iterator[Stage]:
    """Open a stage for a block; see ``Stage`` for the arguments."""
    opened = Stage(name, total, unit)
    opened.report()
    try:
        yield opened
    finally:
        opened.report(finished=True)


def tracked(
    items: Iterable[_Item], name: str, unit: str, total: float | None = None
) -> Iterator[_Item]:
    """Yield ``items`` inside a stage that advances by one after each.

    Args:
        items: What is worked on.
        name: Of the stage.
        unit: Plural noun of an item.
        total: Items; None takes their length, where they have one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with stage(name, total, unit) as opened:
        for item in items:
            yield item
            opened.advance()
