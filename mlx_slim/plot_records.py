"""What the plots of the report draw.

Invariant: ``series`` is the number of a colour; a score is a fraction. Used by
``compare/drawings.py`` and ``plots.py``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A cell's score ``y`` (a fraction) at a cost ``x``; ``series`` is its colour."""

    x: float
    y: float
    label: str
    series: int


@dataclass(frozen=True)
class ScoreLine:
    """A score without a cost: a line across."""

    y: float
    label: str


@dataclass(frozen=True)
class Axis:
    """An axis of costs.

    Attributes:
        name: For ids.
        label: Under the axis.
        unit: Values are divided by it.
        less: Whether less is better.
    """

    name: str
    label: str
    unit: float
    less: bool


@dataclass(frozen=True)
class Curve:
    """Losses of a cell as (step, loss), nats a token."""

    label: str
    series: int
    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]


@dataclass(frozen=True)
class PredictedCost:
    """What was predicted of a cell, and what was measured."""

    label: str
    series: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class Dot:
    """One value of a cell."""

    label: str
    series: int
    value: float


@dataclass(frozen=True)
class DifferenceBar:
    """A paired difference with its interval, fractions.

    Attributes:
        delta: The difference.
        low: End of its interval.
        high: Other end.
        series: Its colour.
        significant: Whether the corrected p value is under 5%.
    """

    delta: float
    low: float
    high: float
    series: int
    significant: bool


@dataclass(frozen=True)
class Panel:
    """The differences of a task, a line a cell; None where there is no comparison."""

    task: str
    rows: list[DifferenceBar | None]


@dataclass(frozen=True)
class TrialPoint:
    """A trial of a sweep: its number, its loss, and whether it took all its steps."""

    number: int
    loss: float
    complete: bool


@dataclass(frozen=True)
class Coordinate:
    """An axis of parallel coordinates.

    Attributes:
        label: Under it.
        ticks: (height from 0 to 1, text).
    """

    label: str
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class CoordinateLine:
    """A trial as a line.

    Attributes:
        heights: On each axis, from 0 to 1.
        series: Its colour.
        strong: Whether it stands out.
    """

    heights: list[float]
    series: int
    strong: bool
