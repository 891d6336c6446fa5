"""Plots as inline SVG that take their colours and fonts from the page, light or dark.

Invariant: Matplotlib draws with placeholder colours, each of which becomes a CSS variable of the
report; text stays text; ids are unique over the page; the same numbers give the same bytes.
Try it: ``mlx-slim report DIR``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlx_slim.plot_records import (
    Axis,
    Coordinate,
    CoordinateLine,
    Curve,
    Dot,
    Panel,
    Point,
    PredictedCost,
    ScoreLine,
    TrialPoint,
)

SERIES = 8
# Placeholder → CSS variable of report.css.
_INK, _SOFT, _LINE = "#0b0b01", "#0b0b02", "#0b0b03"
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _LINE: "--line", "#0b0b04": "--paper"}
_VARIABLES |= {f"#0a0a{i:02d}": f"--c{i}" for i in range(SERIES)}
_FONT = re.compile(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mlx-slim",
    "font.size": 9.5,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "ytick.left": False,
    "xtick.major.size": 3,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}


def color(index: int) -> str:
    """Return the placeholder of a series."""
    return f"#0a0a{index % SERIES:02d}"


@contextmanager
def _figure(width: float, height: float, name: str, **subplots: Any) -> Iterator[tuple[Any, list]]:
    """Yield (axes, list): what is put into the list is the SVG. Sizes in inches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    svgs: list[str] = []
    style: dict[Any, Any] = {**mpl.rcParamsDefault, "backend": "svg", **_STYLE}
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(**subplots)
        yield axes, svgs
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svgs.append(_themed(buffer.getvalue(), name))


def _themed(svg: str, name: str) -> str:
    """Return Matplotlib's file as an element of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    svg = _FONT.sub(lambda m: f"font-size: {m[2]}px; font-weight: {m[1] or 400}", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    width, height = (re.search(rf'{side}="([\d.]+)pt"', svg) for side in ("width", "height"))
    assert width and height
    svg = re.sub(r'(width|height)="[\d.]+pt" ?', "", svg, count=2)
    label = f'role="img" aria-label="{name}" style="max-width:{float(width[1]) * 1.25:.0f}px"'
    return re.sub(r"\n\s*", "\n", svg.replace("<svg ", f"<svg {label} ", 1)).strip()


def _points(value: float, _: Any = None) -> str:
    return f"{100 * value:g}"


def _in(unit: float) -> Callable[[float, Any], str]:
    return lambda value, _=None: f"{value / unit:,.10g}"


# ------------------------------------------------------------------------------------- pareto


def pareto(points: Sequence[Point], lines: Sequence[ScoreLine], axis: Axis) -> str:
    """Return a scatter of score against a cost, with the points that nothing beats joined."""
    with _figure(3.7, 3.1, f"pareto-{axis.name}") as (ax, svgs):
        best = _front(points, axis.less)
        if len(best) > 1:
            xs, ys = zip(*best, strict=True)
            where = "post" if axis.less else "pre"
            ax.step(xs, ys, where=where, color=_SOFT, linewidth=1, linestyle=(0, (1, 2)))
        for point in points:
            tint = color(point.series)
            ax.plot(point.x, point.y, "o", color=tint, markersize=7, alpha=0.95)
        right = max((p.x for p in points), default=1)
        levels = sorted(lines, key=lambda line: -line.y)
        for number, line in enumerate(levels):
            ax.axhline(line.y, color=_SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
            _note(ax, right, line.y, line.label, above=number == 0)
        ax.margins(x=0.22, y=0.2)
        _labels(ax, points)
        ax.set_xlabel(axis.label)
        ax.set_ylabel("mean score, points")
        ax.xaxis.set_major_formatter(_in(axis.unit))
        ax.yaxis.set_major_formatter(_points)
    return svgs[0]


def _front(points: Sequence[Point], less: bool) -> list[tuple[float, float]]:
    """Return the points that no other one beats in both directions, by x."""
    sign = 1 if less else -1
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (sign * p.x, -p.y)):
        if not best or point.y > best[-1][1]:
            best.append((point.x, point.y))
    return sorted(best)


def _note(ax: Any, x: float, y: float, text: str, *, above: bool) -> None:
    """Write the name of a level over its line, or under it."""
    style = {"textcoords": "offset points", "ha": "right", "color": _SOFT, "fontsize": 8.5}
    if above:
        ax.annotate(text, (x, y), (0, 3), va="bottom", **style)
    else:
        ax.annotate(text, (x, y), (0, -3), va="top", **style)


def _labels(ax: Any, points: Sequence[Point], most: int = 24) -> None:
    """Write each point's name beside it, moved up or down where two would overlap."""
    if len(points) > most:
        return
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda p: -p.y):
        across = (point.x - x0) / (x1 - x0)
        up = (point.y - y0) / (y1 - y0)
        left = across > 0.6
        width = 0.024 * len(point.label)
        start = across - width - 0.03 if left else across + 0.03
        place = up
        while any(
            abs(place - other) < 0.055 and start < end and begin < start + width
            for begin, end, other in taken
        ):
            place -= 0.012
        taken.append((start, start + width, place))
        ax.annotate(
            point.label,
            (point.x, point.y),
            (-7 if left else 7, (place - up) * 175 - 3),
            textcoords="offset points",
            ha="right" if left else "left",
            color=_INK,
            fontsize=8.5,
        )


# ------------------------------------------------------------------------------------- curves


def losses(curves: Sequence[Curve], name: str) -> str:
    """Return training loss (smoothed, the raw one behind it) and validation loss (dots)."""
    with _figure(5.4, 3.1, f"loss-{name}") as (ax, svgs):
        for curve in curves:
            tint = color(curve.series)
            steps, values = _columns(curve.train)
            ax.plot(steps, values, color=tint, linewidth=0.6, alpha=0.28)
            ax.plot(steps, _smooth(values), color=tint, label=curve.label)
            if curve.validation:
                at, loss = _columns(curve.validation)
                ax.plot(at, loss, "o", color=tint, markersize=4.5, markeredgecolor="#0b0b04")
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("loss, nats per supervised token")
        if len(curves) <= 12:
            ax.legend(frameon=False, fontsize=8.5, labelcolor=_INK, loc="upper right", ncols=2)
    return svgs[0]


def _columns(pairs: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential mean over about a twentieth of the run, corrected at its start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    total = weight = 0.0
    smooth = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(total / weight)
    return smooth


# ------------------------------------------------------------------------------------- rows of dots


def dumbbells(rows: Sequence[PredictedCost], name: str, label: str, unit: float) -> str:
    """Return predicted (ring) against measured (disc), a line a cell.

    Args:
        rows: A line each.
        name: For ids.
        label: Of the x axis.
        unit: Values are divided by it.
    """
    with _figure(5.4, 0.75 + 0.27 * len(rows), name) as (ax, svgs):
        places = range(len(rows), 0, -1)
        for place, row in zip(places, rows, strict=True):
            tint = color(row.series)
            both = [row.predicted, row.measured]
            ax.plot(both, [place, place], color=tint, linewidth=1.4, alpha=0.5)
            ax.plot(both[0], place, "o", color=tint, markersize=7.5, markerfacecolor="#0b0b04")
            ax.plot(both[1], place, "o", color=tint, markersize=6.5)
        _named(ax, places, [row.label for row in rows])
        ax.set_xlim(0, 1.06 * max(max(row.predicted, row.measured) for row in rows))
        ax.set_xlabel(label)
        ax.xaxis.set_major_formatter(_in(unit))
    return svgs[0]


def _named(ax: Any, places: Sequence[int], labels: list[str]) -> None:
    ax.set_yticks(list(places), labels)
    ax.tick_params(axis="y", labelcolor=_INK)
    ax.set_ylim(0.4, len(labels) + 0.6)
    ax.grid(axis="y", visible=False)


def dots(rows: Sequence[Dot], name: str, label: str, level: float | None) -> str:
    """Return one dot a cell on a common scale, with the base's level as a line.

    Args:
        rows: A line each.
        name: For ids.
        label: Of the x axis.
        level: Of the base; None for no line.
    """
    with _figure(5.4, 0.75 + 0.27 * len(rows), name) as (ax, svgs):
        places = range(len(rows), 0, -1)
        if level is not None:
            ax.axvline(level, color=_SOFT, linewidth=1, linestyle=(0, (4, 3)))
        for place, row in zip(places, rows, strict=True):
            tint = color(row.series)
            if level is not None:
                ax.plot([level, row.value], [place, place], color=tint, linewidth=1.4, alpha=0.5)
            ax.plot(row.value, place, "o", color=tint, markersize=6.5)
        _named(ax, places, [row.label for row in rows])
        ax.margins(x=0.12)
        ax.set_xlabel(label)
    return svgs[0]


def forest(panels: Sequence[Panel], labels: Sequence[str]) -> str:
    """Return paired differences with their intervals: a panel a task, a line a cell."""
    count = len(panels)
    width = 1.5 + 1.75 * count
    size = (min(width, 9.2), 0.9 + 0.27 * len(labels))
    with _figure(*size, "forest", nrows=1, ncols=count, sharey=True, squeeze=False) as (grid, svgs):
        places = range(len(labels), 0, -1)
        for ax, panel in zip(grid[0], panels, strict=True):
            ax.axvline(0, color=_SOFT, linewidth=1)
            for place, row in zip(places, panel.rows, strict=True):
                if row is None:
                    continue
                tint = color(row.series)
                ends = [row.low, row.high]
                ax.plot(ends, [place, place], color=tint, linewidth=1.6, alpha=0.75)
                face = tint if row.significant else "#0b0b04"
                ax.plot(row.delta, place, "o", color=tint, markersize=6, markerfacecolor=face)
            ax.set_title(panel.task, fontsize=9.5)
            ax.xaxis.set_major_formatter(_points)
            ax.margins(x=0.1)
            ax.grid(axis="y", visible=False)
        ax = grid[0][0]
        ax.set_yticks(list(places), list(labels))
        ax.set_ylim(0.4, len(labels) + 0.6)
        for ax in grid[0]:
            ax.tick_params(axis="y", labelcolor=_INK)
    return svgs[0]


def agreement(points: Sequence[PredictedCost], name: str, label: str, unit: float) -> str:
    """Return measured against predicted as a scatter with its diagonal, for many cells."""
    with _figure(3.7, 3.4, name) as (ax, svgs):
        high = max(max(p.predicted, p.measured) for p in points) * 1.08
        ax.plot([0, high], [0, high], color=_SOFT, linewidth=1)
        for point in points:
            spot = (point.predicted, point.measured)
            ax.plot(*spot, "o", color=color(point.series), markersize=4, alpha=0.8)
        ax.set_xlabel(f"predicted, {label}")
        ax.set_ylabel(f"measured, {label}")
        ax.xaxis.set_major_formatter(_in(unit))
        ax.yaxis.set_major_formatter(_in(unit))
    return svgs[0]


# ------------------------------------------------------------------------------------- sweeps


def trial_history(points: Sequence[TrialPoint]) -> str:
    """Return losses by trial, rings for those that were pruned, and the best so far as a line."""
    with _figure(5.4, 3.1, "history") as (ax, svgs):
        best, steps = float("inf"), []
        for point in points:
            face = color(2) if point.complete else "#0b0b04"
            ax.plot(
                point.number, point.loss, "o", color=color(2), markersize=6, markerfacecolor=face
            )
            if point.complete:
                best = min(best, point.loss)
            if best < float("inf"):
                steps.append((point.number, best))
        if len(steps) > 1:
            xs, ys = _columns(steps)
            ax.step(xs, ys, where="post", color=_SOFT, linewidth=1, linestyle=(0, (4, 3)))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("trial")
        ax.set_ylabel("validation loss, nats per token")
    return svgs[0]


def parallel_coordinates(axes: Sequence[Coordinate], lines: Sequence[CoordinateLine]) -> str:
    """Return a line a trial over axes from 0 to 1; the last lines are drawn on top."""
    with _figure(max(5.4, 1.25 * len(axes)), 3.4, "coordinates") as (ax, svgs):
        places = range(len(axes))
        for line in lines:
            width, alpha = (2.4, 1.0) if line.strong else (1.0, 0.55)
            ax.plot(places, line.heights, color=color(line.series), linewidth=width, alpha=alpha)
        for place, one in zip(places, axes, strict=True):
            ax.axvline(place, color=_SOFT, linewidth=0.9)
            for height, text in one.ticks:
                ax.annotate(
                    text,
                    (place, height),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    color=_INK,
                    fontsize=8,
                )
        ax.set_xticks(list(places), [one.label for one in axes])
        ax.set_yticks([])
        ax.set_ylim(-0.06, 1.06)
        ax.margins(x=0.1)
        ax.grid(visible=False)
    return svgs[0]
