"""Ranges of numbers and names of methods, for sections and for options of commands.

Invariant: importing this imports no pydantic, which takes a third of a ``--help``; pydantic reads
the ranges all the same. Try it: ``mlx-slim prune --help``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from annotated_types import Interval

Method = Literal["full", "lora", "qlora", "dora"]

TASK = "task:"  # how a source names an evaluation task

MOST = 1_000_000_000  # of everything that is counted; more is a slip of the keyboard
LARGEST = 1e6  # of factors: beyond it float16 and bfloat16 compute nothing of use
MOST_SHOTS = 100  # examples in a prompt
Fraction = Annotated[float, Interval(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Interval(ge=1, le=MOST)]
Count = Annotated[int, Interval(ge=0, le=MOST)]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]
Steps = Annotated[float, Interval(ge=0, le=MOST)]  # or, below 1, a share of them
Factor = Annotated[float, Interval(gt=0, le=LARGEST)]
Rate = Annotated[float, Interval(gt=0, lt=10)]
Bytes = Annotated[int, Interval(ge=1, le=2**60)]


class Strict:
    """Marks a number that no text, and no true or false, is converted to."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Return pydantic's schema of the number, strict."""
        return {**handler(source), "strict": True}
