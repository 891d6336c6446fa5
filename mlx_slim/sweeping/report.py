"""The page of a sweep: history, importances, parallel coordinates, every trial, the winner.

Invariant: a function of the report; nothing is read besides. Try it: ``mlx-slim report DIR`` on the
folder of a sweep, also of one that is not finished.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mlx_slim.artifacts import write_text
from mlx_slim.config.recipe_file import value_text
from mlx_slim.pages import environment
from mlx_slim.plot_records import (
    Coordinate,
    CoordinateLine,
    Dot,
    TrialPoint,
)
from mlx_slim.plots import dots, parallel_coordinates, trial_history
from mlx_slim.reading import JsonObject
from mlx_slim.sweeping.records import SweepReport, TrialRow

PAGE = "report.html"
_GOOD = 0.25  # of the complete trials, drawn in colour


def write_page(folder: Path, report: SweepReport) -> Path:
    """Write ``report.html``; return its path."""
    page = folder / PAGE
    write_text(page, render(report, folder.name))
    return page


def render(report: SweepReport, name: str) -> str:
    """Return the page of a report."""
    losses = [row.outcome.loss for row in report.seeds if row.outcome.loss is not None]
    best = next((row for row in report.rows if row.number == report.best), None)
    if best is not None and best.outcome.loss is not None:
        losses.insert(0, best.outcome.loss)
    template = environment(Path(__file__).with_name("templates")).get_template("sweep.html.j2")
    return template.render(
        name=name,
        report=report,
        best=best,
        baseline=next((row for row in report.rows if row.number == report.baseline), None),
        spread=((statistics.mean(losses), statistics.stdev(losses)) if len(losses) > 1 else None),
        keys=[one["key"] for one in report.space],
        plots=_plots(report),
        text=_value,
        attempts=sum(row.attempts - 1 for row in report.rows),
    )


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value_text(value)


def _plots(report: SweepReport) -> list[tuple[str, str, Markup]]:
    """Return (title, explanation, SVG) of what can be drawn."""
    rows = [row for row in report.rows if row.outcome.loss is not None]
    complete = [row for row in rows if row.outcome.state == "complete"]
    if not complete:
        return []
    drawn = [
        (
            "History",
            "Best validation loss of each trial; a ring is one that was pruned, at its best loss "
            "until then. Dashed: the best complete one so far.",
            trial_history(
                [TrialPoint(r.number, r.outcome.loss or 0.0, r in complete) for r in rows]
            ),
        )
    ]
    if report.importances:
        ordered = sorted(report.importances.items(), key=lambda item: -item[1])
        drawn.append(
            (
                "Importances",
                "How much each key decides between good trials and all (PED-ANOVA, arXiv "
                "2304.10255), of the complete trials only; few trials say little.",
                dots(
                    [Dot(key, 2, weight) for key, weight in ordered], "importances", "fraction", 0.0
                ),
            )
        )
    if len(complete) > 1:
        drawn.append(
            (
                "Parallel coordinates",
                "A line is a complete trial; the best quarter in colour, the best one thick.",
                _coordinates(report, complete),
            )
        )
    return [(title, lead, Markup(svg)) for title, lead, svg in drawn]


def _coordinates(report: SweepReport, rows: list[TrialRow]) -> str:
    losses = [row.outcome.loss or 0.0 for row in rows]
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0
    axes = [Coordinate(one["key"].rpartition(".")[2], _ticks(one)) for one in report.space]
    axes.append(Coordinate("loss", [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")]))
    limit = sorted(losses)[max(0, math.ceil(_GOOD * len(losses)) - 1)]
    lines = []
    for row in sorted(rows, key=lambda row: -(row.outcome.loss or 0.0)):  # the best on top
        loss = row.outcome.loss or 0.0
        heights = [_height(one, row.values[one["key"]]) for one in report.space]
        series = 2 if loss <= limit else 0
        lines.append(
            CoordinateLine([*heights, (loss - low) / span], series, row.number == report.best)
        )
    return parallel_coordinates(axes, lines)


def _height(one: JsonObject, value: Any) -> float:
    """Return the place of a value on its axis, from 0 to 1."""
    if one["choices"] is not None:
        return one["choices"].index(value) / (len(one["choices"]) - 1)
    scale = math.log if one["log"] else float
    low, high = scale(one["low"]), scale(one["high"])
    return (scale(value) - low) / (high - low)


def _ticks(one: JsonObject) -> list[tuple[float, str]]:
    if one["choices"] is not None:
        return [(_height(one, choice), _short(choice)) for choice in one["choices"]]
    return [(0.0, f"{one['low']:.4g}"), (1.0, f"{one['high']:.4g}")]


def _short(value: Any, most: int = 16) -> str:
    text = value_text(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
