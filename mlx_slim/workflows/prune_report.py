"""What pruning took and recovery brought back, as numbers and as a table.

Invariant: every share is computed from two stored scores; the level of chance is counted from the
questions themselves. Try it: ``mlx-slim prune MODEL -o DIR --ratio 0.2 --recover smollm2-lora``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_slim.evaluate.results import read_samples, samples_name
from mlx_slim.runtime import human_bytes

_PREFERRED = ("acc_norm", "acc")  # of a task's metrics, in the table


def task_figures(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return task -> ``n``, ``metrics`` (name -> value) and ``chance``, from a scored folder."""
    figures = {}
    for task, section in results["tasks"].items():
        figures[task] = {
            "n": section["n"],
            "metrics": {name: found["value"] for name, found in section["metrics"].items()},
            "chance": chance(read_samples(folder / samples_name(task))),
        }
    return figures


def chance(samples: list[dict[str, Any]]) -> float:
    """Return the accuracy of guessing: the mean of 1 / choices; 0 where answers are written."""
    counts = [len(sample.get("loglikelihoods") or []) for sample in samples]
    return sum(1 / count for count in counts if count) / max(len(counts), 1)


def add_recovery(rows: list[dict[str, Any]]) -> None:
    """Add to each row's tasks how much of the first row's score it has, in percent.

    ``plain`` is 100 · score / score of the original (arXiv 2410.19185); ``chance_corrected`` takes
    the level of chance off both, for accuracies. None where the original is not above it.
    """
    base = rows[0]["tasks"]
    for row in rows:
        for task, figures in row["tasks"].items():
            figures["recovery"] = {
                name: {
                    "plain": _share(value, base[task]["metrics"][name], 0.0),
                    "chance_corrected": _share(
                        value, base[task]["metrics"][name], base[task]["chance"]
                    )
                    if name.startswith("acc") or not base[task]["chance"]
                    else None,
                }
                for name, value in figures["metrics"].items()
            }


def _share(value: float, base: float, floor: float) -> float | None:
    return 100 * (value - floor) / (base - floor) if base > floor else None


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return ``report.json`` as an aligned table, a row a model."""
    rows = report["rows"]
    tasks = list(rows[0]["tasks"])
    heading = ["", "parameters", "size", "perplexity", "KL"]
    for task in tasks:
        heading += [f"{task} {_metric(rows[0]['tasks'][task])}", "recovery", "above chance"]
    table = [heading]
    for row in rows:
        own = f"{row['parameters']:,}"
        if row["adapter_parameters"]:
            own += f" + {row['adapter_parameters']:,}"
        cells = [row["name"], own, human_bytes(row["bytes"])]
        cells += [_number(row.get("perplexity"), ".2f"), _number(row.get("kl"), ".4f")]
        for task in tasks:
            figures = row["tasks"][task]
            metric = _metric(figures)
            recovery = figures["recovery"][metric]
            cells += [
                _number(figures["metrics"][metric], ".4f"),
                _number(recovery["plain"], ".1f", "%"),
                _number(recovery["chance_corrected"], ".1f", "%"),
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
    held = report["held_out"]
    return [*lines, f"perplexity and KL on {held['tokens']:,} tokens: {held['text']}"]


def _metric(figures: dict[str, Any]) -> str:
    metrics = figures["metrics"]
    return next((name for name in _PREFERRED if name in metrics), next(iter(metrics)))


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
