"""What one rendering of a template may use: blocks run, values made, text written, time.

Invariant: every value that a template makes is counted, items inside items as often as they would
be written; the limits grow with the inputs, so that a large row is no attack. Used by
``sandbox.py``, one budget a rendering and thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from types import GeneratorType
from typing import Any

from jinja2 import TemplateRuntimeError, Undefined
from jinja2.utils import Namespace

SECONDS = 1.0  # CPU time of one rendering, and of one compilation
# What a rendering has at its disposal, and how much more for each character or item of its inputs.
_STEPS, _STEPS_EACH = 200_000, 50  # blocks run, functions called
_LARGEST, _LARGEST_EACH = 1 << 19, 4  # characters and items of one value
_BYTES, _BYTES_EACH = 32 << 20, 64  # bytes of all values made and text written
DEEPEST = 100  # containers inside containers, macros inside macros
_CLOCK = 64  # steps between two looks at the clock
_LONG_INTEGER = 1 << 14  # bits


class TooMuch(TemplateRuntimeError):
    """The template takes more than it may; the message says of what."""


_active = threading.local()


def budget() -> Budget:
    """Return the budget of the rendering that runs in this thread."""
    return _active.budget


class Budget:
    """What one rendering may still use; a context manager that makes it the thread's own.

    Args:
        inputs: What the template reads; larger inputs give a larger budget.
    """

    def __init__(self, inputs: Iterable[Any] = ()) -> None:
        self._sizes: dict[int, tuple[Any, int, int]] = {}  # id -> the container, its size and depth
        self.largest = 1 << 40
        input_size = sum(self.size(value) for value in inputs)
        self.largest = _LARGEST + _LARGEST_EACH * input_size
        self._steps, self._bytes = (
            _STEPS + _STEPS_EACH * input_size,
            _BYTES + _BYTES_EACH * input_size,
        )
        self._clock, self._until = _CLOCK, time.thread_time() + SECONDS
        self.output_length = 0  # characters of the text so far
        self.spans: list[tuple[int, int]] = []  # that extensions mark in it
        self.depth = 0

    def __enter__(self) -> Budget:
        self._before = getattr(_active, "budget", None)
        _active.budget = self
        return self

    def __exit__(self, *_: object) -> None:
        _active.budget = self._before

    def step(self, steps: int = 1, characters: int = 0) -> bool:
        """Count blocks or calls, and characters that they write; returns True."""
        self._steps -= steps
        self._bytes -= characters
        self._clock -= steps
        if self._steps < 0:
            raise TooMuch("the template runs too long: too many loops or calls")
        if self._clock < 0 or characters > 10_000:
            self._clock = _CLOCK
            if time.thread_time() > self._until:
                raise TooMuch(f"the template takes more than {SECONDS:g} s")
        if self._bytes < 0:
            raise TooMuch("the template makes too much text or too long lists")
        return True

    def reserve(self, size: int, what: str = "a value") -> None:
        """Refuse a value of ``size`` characters or items before it is made."""
        if size > self.largest:
            raise TooMuch(
                f"the template makes {what} of {size} characters or items: at most "
                f"{self.largest} are allowed"
            )

    def size(self, value: Any) -> int:
        """Return the characters and items of a value, those inside counted as often as they stand.

        Raises:
            TooMuch: If it is larger or deeper than a value may be, or writing it out could be.
        """
        if type(value) is str and len(value) <= self.largest:
            return len(value)
        return self._measure(value)[0]

    def _measure(self, value: Any) -> tuple[int, int]:
        if isinstance(value, str):
            size = len(value)
            if size > self.largest:
                self.reserve(size)
            return size, 0
        if isinstance(value, int):
            if value.bit_length() > _LONG_INTEGER:
                raise TooMuch("the template makes a number of thousands of digits")
            return 1 + value.bit_length() // 3, 0
        if isinstance(value, dict):
            inner: Iterable[Any] = (part for pair in value.items() for part in pair)
        elif isinstance(value, list | tuple | set | frozenset):
            inner = value
        elif isinstance(value, range):
            return len(value), 0
        elif isinstance(value, Namespace):
            raise TooMuch("a namespace is not a value: name one of its attributes")
        else:
            return (0 if isinstance(value, Undefined) else 30), 0
        cached = self._sizes.get(id(value))
        if cached is not None:
            return cached[1], cached[2]
        size, depth = 2, 0
        if len(value) > self.largest:
            self.reserve(len(value))
        for item in inner:
            if type(item) is str:
                size += 2 + len(item)
                continue
            size_of, depth_of = self._measure(item)
            size, depth = size + 2 + size_of, max(depth, depth_of)
        if depth >= DEEPEST:
            raise TooMuch(f"a value is nested more than {DEEPEST} deep")
        self.reserve(size)
        self._sizes[id(value)] = (value, size, depth + 1)  # it lives on, so its id is its own
        return size, depth + 1

    def count_value(self, value: Any, each: int = 16) -> Any:
        """Count a value that was made and return it; what a generator gives is counted as it comes.

        Args:
            value: Of any type.
            each: Bytes that an item of a list takes.
        """
        if isinstance(value, str):
            self.step(1, len(value) * (1 if value.isascii() else 4))
            self.size(value)
        elif isinstance(value, list | tuple | dict):
            self.step(1, each * len(value))
            self.size(value)
        elif isinstance(value, GeneratorType):
            return self._counted(value)
        else:
            self.step()
            if isinstance(value, int):
                self.size(value)
        return value

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            yield self.count_value(value)
