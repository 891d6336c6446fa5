"""Ctrl-C, SIGTERM and SIGHUP: one interrupt, told once, and never inside a file operation.

Invariant: a command that is stopped leaves as it leaves on an error: each ``finally`` runs, so no
temporary and no child stays. What must not be cut in half (a lock and its entry, a rename and what
follows it) runs under ``deferred_signals``, which holds the signal back for that moment. A signal
that was ignored when the program started (``nohup``) stays ignored. Try it: start a command and
``kill -TERM`` it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME = 0.5  # seconds in which several signals are one: a terminal and a parent both send theirs

ENDS_WITH_INPUT = "MLX_SLIM_ENDS_WITH_INPUT"  # set by a parent that holds the standard input open

_Handler = Callable[[int, FrameType | None], Any]
_Listener = TypeVar("_Listener", bound="SignalFlag")


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: the command ends, also where Ctrl-C would only end a part of it."""


@contextlib.contextmanager
def _handled_by(handler: _Handler) -> Iterator[None]:
    """Send the signals that are not ignored to ``handler``; only the main thread can."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextlib.contextmanager
def raise_on_signal() -> Iterator[None]:
    """Raise KeyboardInterrupt (``Terminated``) in the main thread when a signal comes.

    Those that follow within half a second are the same wish: they do not cut the clean-up short.
    """
    first: list[float] = []

    def handle(number: int, _: FrameType | None) -> None:
        if first and time.monotonic() - first[0] < SAME:
            return
        first.append(time.monotonic())
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def lost(unraisable: sys.UnraisableHookArgs) -> None:
        """Send an interrupt again that Python met in a destructor and could not raise."""
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            hook(unraisable)
            return
        first.clear()
        again = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
        threading.Timer(0.01, os.kill, (os.getpid(), again)).start()

    hook = sys.unraisablehook
    sys.unraisablehook = lost
    try:
        with _handled_by(handle):
            yield
    finally:
        sys.unraisablehook = hook


class SignalFlag:
    """Notes the wish to stop instead of raising it; a second wish is raised.

    Attributes:
        requested: Whether a signal came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._stack = contextlib.ExitStack()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._first >= SAME:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        if not self.requested:
            self.requested, self._first = True, time.monotonic()

    def __enter__(self: _Listener) -> _Listener:
        """Listen."""
        self._stack.enter_context(_handled_by(self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        self._stack.close()


_finishing: list[object] = []  # of all threads; append and remove are atomic


@contextlib.contextmanager
def finished_first() -> Iterator[None]:
    """Inside, a thread that would end the process waits (``ranks/watch.py``)."""
    mark = object()
    _finishing.append(mark)
    try:
        yield
    finally:
        _finishing.remove(mark)


def finishing() -> bool:
    """Return whether something is under way that should be done before the process ends."""
    return bool(_finishing)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold signals back until the block is done, and send the first one again then."""
    held: list[int] = []
    try:
        with finished_first(), _handled_by(lambda number, _: held.append(number)):
            yield
    finally:
        if held:
            signal.raise_signal(held[0])


def end_with_parent() -> None:
    """End this process when its parent does, where the parent asks for it; call it once.

    The parent holds a pipe open that nobody writes to. When it is killed the pipe closes: this
    process ends as if it were killed too, so that whoever takes the work over finds nobody there.
    """
    if os.environ.pop(ENDS_WITH_INPUT, None) is None:
        return

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1 << 10):
                pass
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
