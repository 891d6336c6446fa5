"""Curves of a run as inline SVG that takes its colours and fonts from the page.

Invariant: a curve is a function of its numbers: the same ones give the same bytes; what is not
finite is left out; ids are unique over the page. No plotting library is loaded: the page is written
at the end of every run, and again at each look with ``--watch``. Try it: ``mlx-slim report RUN``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from markupsafe import Markup

_WIDTH, _HEIGHT = 480.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 12.0, 22.0, 38.0
_MOST = 300  # points of a line: more than a screen shows

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points of one line.

    Attributes:
        label: In the legend; empty for none.
        points: (x, y), x ascending.
        color: CSS variable of the page, such as ``--c2``.
        kind: How they are drawn.
    """

    label: str
    points: Sequence[Point]
    color: str
    kind: Literal["line", "faint", "dots"] = "line"


@dataclass(frozen=True)
class Level:
    """A horizontal line, such as a budget."""

    value: float
    label: str


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return the exponential mean over about a twentieth of the run, corrected at its start."""
    finite = [point for point in points if math.isfinite(point[1])]
    keep = 1 - 1 / max(1.0, len(finite) / 20)
    total = weight = 0.0
    means = []
    for x, y in finite:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        means.append((x, total / weight))
    return means


def thinned(points: Sequence[Point], most: int = _MOST) -> list[Point]:
    """Return at most about ``most`` points: of each stretch the lowest and the highest."""
    if len(points) <= most:
        return list(points)
    size = 2 * len(points) / most
    chosen: list[Point] = []
    for number in range(most // 2):
        part = points[int(number * size) : int((number + 1) * size)]
        ends = {
            part.index(min(part, key=lambda p: p[1])),
            part.index(max(part, key=lambda p: p[1])),
        }
        chosen += [part[i] for i in sorted(ends)]
    return [*chosen, points[-1]]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def chart(
    name: str,
    series: Sequence[Series],
    *,
    y: Callable[[float], str],
    levels: Sequence[Level] = (),
    zero: bool = False,
    x_label: str = "optimizer step",
) -> Markup | None:
    """Return a chart; None where there is nothing to draw.

    Args:
        name: Says what it shows, to who cannot see it; unique on the page.
        series: In the order they are drawn.
        y: Writes a value of the y axis.
        levels: Horizontal lines.
        zero: Let the y axis begin at 0.
        x_label: Of the x axis.
    """
    drawn = [(one, [p for p in one.points if all(map(math.isfinite, p))]) for one in series]
    everything = [point for _, points in drawn for point in points]
    if not everything:
        return None
    xs = [p[0] for p in everything]
    ys = [p[1] for p in everything] + [level.value for level in levels]
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    y0, y1 = (0.0 if zero else min(ys)), max(ys)
    room = 0.06 * ((y1 - y0) or abs(y1) or 1.0)
    y0, y1 = (y0 if zero else y0 - room), y1 + room

    def across(value: float) -> float:
        return _LEFT + (value - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    elements = [*_axes((x0, x1), (y0, y1), across, up, y, x_label)]
    for level in levels:
        at = up(level.value)
        elements.append(
            f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" stroke="var(--soft)" '
            f'stroke-dasharray="5 4" fill="none"/>'
            f'<text x="{_WIDTH - _RIGHT}" y="{at - 4:.1f}" text-anchor="end" '
            f'fill="var(--soft)">{escape(level.label)}</text>'
        )
    for one, points in drawn:
        spots = [(across(px), up(py)) for px, py in thinned(points)]
        elements += _drawn(one, spots)
    elements += _legend([one for one, points in drawn if one.label and points])
    return Markup(
        f'<svg class="chart" role="img" aria-label="{escape(name)}" '
        f'viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" font-size="12">{"".join(elements)}</svg>'
    )


def _axes(
    xs: tuple[float, float],
    ys: tuple[float, float],
    across: Callable[[float], float],
    up: Callable[[float], float],
    y: Callable[[float], str],
    x_label: str,
) -> list[str]:
    """Return grid, tick labels and the name of the x axis."""
    elements = []
    for value in ticks(*ys):
        at = up(value)
        elements.append(
            f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" stroke="var(--line)"/>'
            f'<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end" '
            f'fill="var(--soft)">{escape(y(value))}</text>'
        )
    whole = [value for value in ticks(*xs, count=5) if value == int(value)]
    bottom = _HEIGHT - _BOTTOM
    elements += [
        f'<text x="{across(value):.1f}" y="{bottom + 16}" text-anchor="middle" '
        f'fill="var(--soft)">{value:,.0f}</text>'
        for value in whole
    ]
    elements.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.1f}" y="{_HEIGHT - 5}" text-anchor="middle" '
        f'fill="var(--soft)">{escape(x_label)}</text>'
    )
    return elements


def _drawn(one: Series, spots: Sequence[Point]) -> list[str]:
    """Return a series at places of the picture."""
    tint = f"var({one.color})"
    if one.kind == "dots" or len(spots) == 1:
        return [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.6" fill="{tint}" stroke="var(--paper)"/>'
            for px, py in spots
        ]
    way = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in spots)
    style = 'stroke-width="1" opacity=".35"' if one.kind == "faint" else 'stroke-width="2"'
    return [f'<path d="{way}" fill="none" stroke="{tint}" stroke-linejoin="round" {style}/>']


def _legend(series: Sequence[Series]) -> list[str]:
    """Return the names of the series above the picture."""
    elements, at = [], _LEFT
    for one in series if len(series) > 1 else ():
        elements.append(
            f'<circle cx="{at + 4:.1f}" cy="9" r="4" fill="var({one.color})"/>'
            f'<text x="{at + 13:.1f}" y="13" fill="var(--ink)">{escape(one.label)}</text>'
        )
        at += 30 + 6.6 * len(one.label)
    return elements
