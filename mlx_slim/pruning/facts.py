"""What pruning says of a folder that it made, a fact a line: what was cut, and what it cost.

Invariant: only records are read; nothing is loaded, so that ``mlx-slim report`` is quick. Try it:
``mlx-slim report FOLDER``.
"""

from __future__ import annotations

from pathlib import Path

from mlx_slim.pruning.records import (
    RECORD_FILE,
    REPORT_FILE,
    PruneRecord,
    RecoveryReport,
    TaskFigures,
)
from mlx_slim.reading import library_errors, read_object, short
from mlx_slim.units import human_bytes

_PREFERRED = ("acc_norm", "acc")  # of a task's metrics, in the table


def facts(folder: Path) -> list[str]:
    """Return what was cut from a model and what it cost, a fact a line.

    Args:
        folder: A pruned model, or the folder of ``prune --recover``.

    Raises:
        SlimError: If a record is damaged; names the file.
    """
    lines: list[str] = []
    records = ((RECORD_FILE, PruneRecord), (REPORT_FILE, RecoveryReport))
    for name, kind in records:
        if not (file := folder / name).is_file():
            continue
        values = read_object(file)
        with library_errors(f"{short(file)} is damaged", "prune again into a new folder"):
            record = kind.from_json(values)
        lines += record.lines() if isinstance(record, PruneRecord) else report_lines(record)
    return lines


def report_lines(report: RecoveryReport) -> list[str]:
    """Return the report as an aligned table, a row a model."""
    tasks = {task: _metric(figures) for task, figures in report.rows[0].tasks.items()}
    heading = ["", "parameters", "size", "perplexity", "KL"]
    for task, metric in tasks.items():
        heading += [f"{task} {metric}", "recovery", "above chance"]
    table = [heading]
    for row in report.rows:
        parameters = f"{row.parameters:,}"
        if row.adapter_parameters:
            parameters += f" + {row.adapter_parameters:,}"
        cells = [row.name, parameters, human_bytes(row.bytes)]
        cells += [
            _number(row.text and row.text.perplexity, ".2f"),
            _number(row.text and row.text.kl, ".4f"),
        ]
        for task, metric in tasks.items():
            recovery = row.tasks[task].recovery[metric]
            cells += [
                _number(row.tasks[task].metrics[metric], ".4f"),
                _number(recovery.plain, ".1f", "%"),
                _number(recovery.chance_corrected, ".1f", "%"),
            ]
        table.append(cells)
    widths = [max(len(line[i]) for line in table) for i in range(len(heading))]
    lines = [
        "  ".join(
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    text = report.validation
    return [*lines, f"perplexity and KL on {text.tokens:,} tokens: {text.text}"]


def _metric(figures: TaskFigures) -> str:
    names = figures.metrics
    return next((name for name in _PREFERRED if name in names), next(iter(names)))


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
