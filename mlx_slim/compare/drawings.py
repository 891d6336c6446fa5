"""Which plots the report shows, of which cells.

Invariant: a plot that would be empty is None; where there are too many cells to name, a scatter
takes the place of named lines, or there is none. Used by ``compare/report.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from mlx_slim import plots
from mlx_slim.compare.evidence import LossCurves
from mlx_slim.compare.records import TrainingCost
from mlx_slim.compare.report_records import Contrast, ReportTask, Row
from mlx_slim.plot_records import (
    Axis,
    Curve,
    DifferenceBar,
    Dot,
    Panel,
    Point,
    PredictedCost,
    ScoreLine,
)
from mlx_slim.units import byte_unit

FEW = 30  # cells that a plot names one by one


@dataclass(frozen=True)
class Drawings:
    """The plots of the page, as SVG; those with a title a list of (title, SVG)."""

    pareto: list[tuple[str, Markup]]
    losses: list[tuple[str, Markup]]
    memory: Markup | None
    time: Markup | None
    forgetting: Markup | None
    forest: Markup | None


@dataclass(frozen=True)
class _Cell:
    """A row with its short name and its colour."""

    row: Row
    label: str
    series: int


def drawings(
    rows: list[Row],
    contrasts: list[Contrast],
    tasks: list[ReportTask],
    curves: list[LossCurves],
    *,
    mixed: bool = False,
) -> Drawings:
    """Return the plots of the page; none of speed where kinds of machine are mixed."""
    series, label = _series(rows), _labels(rows)
    cells = [_Cell(row, label[row.name], series(row)) for row in rows]
    trained = [(cell, cell.row.train) for cell in cells if cell.row.train is not None]
    memory = [
        PredictedCost(cell.label, cell.series, cost.predicted_peak_bytes, cost.peak_memory_bytes)
        for cell, cost in trained
        if cost.predicted_peak_bytes
    ]
    time = [
        PredictedCost(cell.label, cell.series, cost.predicted_seconds / 60, cost.seconds / 60)
        for cell, cost in trained
        if cost.predicted_seconds
    ]
    unit, name = byte_unit(max((row.measured for row in memory), default=0))
    return Drawings(
        pareto=[(title, Markup(svg)) for title, svg in _paretos(cells, trained, mixed)],
        losses=[(model, Markup(svg)) for model, svg in _losses(cells, curves)],
        memory=_markup(_predicted(memory, "memory", f"peak memory of training, {name}", unit)),
        time=_markup(_predicted(time, "time", "training time, minutes", 1)),
        forgetting=_markup(_forgetting(cells)),
        forest=_markup(_forest(contrasts, tasks, cells)),
    )


def _markup(svg: str | None) -> Markup | None:
    return Markup(svg) if svg else None


def _labels(rows: list[Row]) -> dict[str, str]:
    """Return a short name for each cell: what all cells have in common is left out."""
    models = {row.model for row in rows}
    seeds = {row.seed for row in rows if row.seed is not None}
    return {
        row.name: " ".join(
            part
            for part in (
                row.model if len(models) > 1 else "",
                row.method,
                f"s{row.seed}" if len(seeds) > 1 and row.seed is not None else "",
            )
            if part
        )
        for row in rows
    }


def _series(rows: list[Row]) -> Callable[[Row], int]:
    """Return the color of a row: by method for one model, else by model."""
    several = len({row.model for row in rows}) > 1
    order = list(dict.fromkeys(row.model if several else row.method for row in rows))
    return lambda row: order.index(row.model if several else row.method)


def _losses(cells: list[_Cell], curves: list[LossCurves]) -> list[tuple[str, str]]:
    """Return a plot of losses for each model that was trained."""
    of_name = {cell.row.name: cell for cell in cells}
    models = list(dict.fromkeys(cell.row.model for cell in cells))
    plotted = []
    for model in models:
        members = [curve for curve in curves if of_name[curve.cell].row.model == model]
        labelled = []
        for place, curve in enumerate(members):
            cell = of_name[curve.cell]
            series = place if len(models) > 1 else cell.series
            labelled.append(Curve(cell.label, series, curve.train, curve.validation))
        if any(curve.train for curve in labelled):
            plotted.append((model, plots.losses(labelled, model)))
    return plotted


def _paretos(
    cells: list[_Cell], trained: list[tuple[_Cell, TrainingCost]], mixed: bool
) -> list[tuple[str, str]]:
    one = len({cell.row.model for cell in cells}) == 1
    levels = [
        ScoreLine(cell.row.mean, cell.label)
        for cell in cells
        if one and cell.row.kind in ("base", "quantized") and cell.row.mean is not None
    ]

    def points(costs: list[tuple[_Cell, float]]) -> list[Point]:
        return [
            Point(x, cell.row.mean, cell.label, cell.series)
            for cell, x in costs
            if cell.row.mean is not None
        ]

    plotted = []
    if trained:
        peak = points([(cell, cost.peak_memory_bytes) for cell, cost in trained])
        unit, name = byte_unit(max((point.x for point in peak), default=0))
        axis = Axis("memory", f"peak memory of training, {name}", unit, less=True)
        plotted.append(("Score against memory", plots.pareto(peak, levels, axis)))
        if not mixed:
            speed = points([(cell, cost.tokens_per_second) for cell, cost in trained])
            axis = Axis("speed", "tokens/s in training", 1, less=False)
            plotted.append(("Score against speed", plots.pareto(speed, levels, axis)))
    stored = points([(cell, cell.row.disk.model + cell.row.disk.adapter) for cell in cells])
    if stored:
        unit, name = byte_unit(max(point.x for point in stored))
        axis = Axis("disk", f"model and adapter on disk, {name}", unit, less=True)
        plotted.append(("Score against size", plots.pareto(stored, [], axis)))
    return plotted


def _predicted(rows: list[PredictedCost], name: str, label: str, unit: float) -> str | None:
    if not rows:
        return None
    if len(rows) > FEW:
        return plots.agreement(rows, name, label, unit)
    return plots.dumbbells(rows, name, label, unit)


def _forgetting(cells: list[_Cell]) -> str | None:
    measured = [(cell, cell.row.bits_per_byte) for cell in cells if cell.row.bits_per_byte]
    rows = [Dot(cell.label, cell.series, value) for cell, value in measured if value]
    if not rows or len(rows) > FEW:
        return None
    bases = [value for cell, value in measured if cell.row.kind == "base"]
    level = bases[0] if len(bases) == 1 else None
    return plots.dots(
        rows, "forgetting", "bits per byte of the forgetting text (less is better)", level
    )


def _forest(contrasts: list[Contrast], tasks: list[ReportTask], cells: list[_Cell]) -> str | None:
    against = {(row.second, row.task): row for row in contrasts if row.against_base}
    compared = {second for second, _ in against}
    shown = [cell for cell in cells if cell.row.name in compared]
    if not shown or len(shown) > FEW:
        return None

    def difference(cell: _Cell, task: ReportTask) -> DifferenceBar | None:
        contrast = against.get((cell.row.name, task.task))
        if contrast is None:
            return None
        low, high = contrast.interval
        return DifferenceBar(contrast.delta, low, high, cell.series, contrast.p_holm < 0.05)

    panels = [Panel(task.task, [difference(cell, task) for cell in shown]) for task in tasks]
    return plots.forest(panels, [cell.label for cell in shown])
