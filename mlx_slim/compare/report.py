"""One page that shows a matrix and its evidence; the same in Markdown and as JSON.

Invariant: everything is computed from stored files by one function (``build``), and the three files
render its result; the page needs no network and no script, and all text of models and data sets
is escaped. Try it: ``mlx-slim report DIR``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from mlx_slim.artifacts import SCHEMA_VERSION, write_json, write_text
from mlx_slim.claims import held
from mlx_slim.compare import claims, evidence, headline, plots, store, tables
from mlx_slim.compare.records import FORGETTING, as_json
from mlx_slim.errors import SlimError
from mlx_slim.pages import environment as page_environment
from mlx_slim.reading import library_errors, short
from mlx_slim.runtime import byte_unit

FEW = 30  # cells that a plot names one by one
_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        folder: Of the matrix.
        results: ``results.json``.
    """

    folder: Path
    results: dict[str, Any]

    @property
    def page(self) -> Path:
        """``report.html``."""
        return self.folder / "report.html"


def report(folder: Path) -> Report:
    """Write ``results.json``, ``report.md`` and ``report.html`` from what is stored.

    Raises:
        SlimError: If the folder holds no matrix, or none of its cells is complete.
    """
    stored = store.load(folder)
    if not stored.cells:
        reasons = [f"{name}: {why}" for name, why in stored.failed]
        raise SlimError(f"{folder} has no complete cell to report", details=reasons)
    results = build(stored)
    texts = pages(stored, results)
    done = Report(folder, results)
    with held(done.page):  # two writers at once would mix the pages of both
        write_json(folder / "results.json", results)
        for name, text in texts.items():
            write_text(folder / name, text)
    return done


def pages(stored: store.StoredMatrix, results: dict[str, Any]) -> dict[str, str]:
    """Return the text of each page, a function of what is stored.

    Raises:
        SlimError: If a record of the folder cannot be used.
    """
    with library_errors(f"{short(stored.folder)}: a record in it is damaged", store.AGAIN):
        return _pages(stored, results)


def _pages(stored: store.StoredMatrix, results: dict[str, Any]) -> dict[str, str]:
    curves = [curve for cell in stored.cells if (curve := evidence.curves(cell))]
    forgetting = results[FORGETTING]
    values = {**results, "forgetting": forgetting, "plots": drawings(results, curves)}
    environment = _environment()
    names = ("report.md", "report.html")
    return {name: environment.get_template(f"{name}.j2").render(values) for name in names}


def build(stored: store.StoredMatrix) -> dict[str, Any]:
    """Return everything that the report says, as one JSON object.

    Raises:
        SlimError: If a record of the folder cannot be used.
    """
    with library_errors(f"{short(stored.folder)}: a record in it is damaged", store.AGAIN):
        return _build(stored)


def _build(stored: store.StoredMatrix) -> dict[str, Any]:
    tasks = tables.tasks_of(stored)
    rows = [tables.row_of(cell, tasks) for cell in stored.cells]
    contrasts, notes = tables.contrasts(stored, tasks)
    pooled, scores = claims.claims(stored, tasks), claims.means(stored, tasks)
    tables.corrected(contrasts, pooled)
    record = stored.record
    return {
        "schema_version": SCHEMA_VERSION,
        "title": record.title,
        "note": record.note,
        "headline": headline.headline(rows, contrasts, pooled, scores, tasks),
        "claims": [claim.record() for claim in pooled],
        "means": {model: [vars(score) for score in methods] for model, methods in scores.items()},
        "models": _models(stored),
        "tasks": tasks,
        "rows": rows,
        "seeds": tables.seeds_of(rows, tasks),
        "contrasts": contrasts,
        "notes": notes,
        "published": evidence.published(stored, rows),
        "sweeps": [asdict(sweep) for sweep in stored.sweeps],
        FORGETTING: as_json(record.forgetting) if record.forgetting else None,
        "extraction": evidence.extraction(stored),
        "flips": evidence.flips(stored, tasks),
        "settings": evidence.differences(stored),
        "ledgers": {cell.name: lines for cell in stored.cells if (lines := evidence.ledger(cell))},
        "omitted": [asdict(cell) for cell in record.omitted],
        "failed": [{"cell": name, "why": why} for name, why in stored.failed],
        "code": record.code,
        "provenance": evidence.machine_of(stored),
    }


def _models(stored: store.StoredMatrix) -> dict[str, Any]:
    """Return the models with the hash of their weights, as recorded by the cells."""
    hashes = {cell.model: cell.record.weights_sha256 for cell in stored.cells}
    return {
        name: {**as_json(entry), "weights_sha256": hashes.get(name)}
        for name, entry in stored.record.models.items()
    }


# ------------------------------------------------------------------------------------- drawings


def drawings(results: dict[str, Any], curves: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the plots of the page: name -> SVG, ``losses`` a list of (model, SVG)."""
    rows = results["rows"]
    series = _series(rows)
    label = _labels(rows)
    named = [{**row, "label": label[row["name"]], "series": series(row)} for row in rows]
    trained = [row for row in named if row["train"]]
    svgs: dict[str, Any] = {"pareto": _paretos(named, trained)}
    of_cell = {row["name"]: row for row in named}
    svgs["losses"] = []
    several = len({row["model"] for row in rows}) > 1
    for model in dict.fromkeys(row["model"] for row in rows):
        members = [curve for curve in curves if of_cell[curve["cell"]]["model"] == model]
        labelled = [
            {
                **curve,
                "label": of_cell[curve["cell"]]["label"],
                "series": i if several else of_cell[curve["cell"]]["series"],
            }
            for i, curve in enumerate(members)
        ]
        if labelled and sum(len(curve["train"]) for curve in labelled):
            svgs["losses"].append((model, plots.losses(labelled, model)))
    memory = [
        {**row, "predicted": predicted, "measured": row["train"]["peak_memory_bytes"]}
        for row in trained
        if (predicted := row["train"].get("predicted_peak_bytes"))
    ]
    unit, name = byte_unit(max((row["measured"] for row in memory), default=0))
    svgs["memory"] = _predicted(memory, "memory", f"peak memory of training, {name}", unit)
    time = [
        {**row, "predicted": predicted / 60, "measured": row["train"]["seconds"] / 60}
        for row in trained
        if (predicted := row["train"].get("predicted_seconds"))
    ]
    svgs["time"] = _predicted(time, "time", "training time, minutes", 1)
    svgs["forgetting"] = _forgetting(named)
    svgs["forest"] = _forest(results, named)
    return {key: _markup(value) for key, value in svgs.items()}


def _markup(value: Any) -> Any:
    if isinstance(value, list):
        return [(name, Markup(svg)) for name, svg in value]
    return Markup(value) if value else None


def _labels(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return a short name for each cell: what all cells have in common is left out."""
    models = {row["model"] for row in rows}
    seeds = {row["seed"] for row in rows if row["seed"] is not None}
    return {
        row["name"]: " ".join(
            part
            for part in (
                row["model"] if len(models) > 1 else "",
                row["method"],
                f"s{row['seed']}" if len(seeds) > 1 and row["seed"] is not None else "",
            )
            if part
        )
        for row in rows
    }


def _series(rows: list[dict[str, Any]]) -> Callable[[dict[str, Any]], int]:
    """Return the color of a row: by method for one model, else by model."""
    key = "model" if len({row["model"] for row in rows}) > 1 else "method"
    order = list(dict.fromkeys(row[key] for row in rows))
    return lambda row: order.index(row[key])


def _paretos(named: list[dict[str, Any]], trained: list[dict[str, Any]]) -> list[tuple[str, str]]:
    one = len({row["model"] for row in named}) == 1
    lines = [
        {"y": row["mean"], "label": row["label"]}
        for row in named
        if one and row["kind"] in ("base", "quantized") and row["mean"] is not None
    ]

    def points(rows: list[dict[str, Any]], x: Callable[[dict[str, Any]], float]) -> list[dict]:
        return [
            {"x": x(row), "y": row["mean"], "label": row["label"], "series": row["series"]}
            for row in rows
            if row["mean"] is not None
        ]

    plotted = []
    if trained:
        peak = points(trained, lambda row: row["train"]["peak_memory_bytes"])
        unit, name = byte_unit(max((point["x"] for point in peak), default=0))
        label = f"peak memory of training, {name}"
        axis = {"name": "memory", "label": label, "unit": unit, "less": True}
        plotted.append(("Score against memory", plots.pareto(peak, lines, axis)))
        speed = points(trained, lambda row: row["train"]["tokens_per_second"])
        axis = {"name": "speed", "label": "tokens/s in training", "unit": 1, "less": False}
        plotted.append(("Score against speed", plots.pareto(speed, lines, axis)))
    stored = points([row for row in named if row["disk"]], lambda row: sum(row["disk"].values()))
    if stored:
        unit, name = byte_unit(max(point["x"] for point in stored))
        label = f"model and adapter on disk, {name}"
        axis = {"name": "disk", "label": label, "unit": unit, "less": True}
        plotted.append(("Score against size", plots.pareto(stored, [], axis)))
    return plotted


def _predicted(rows: list[dict[str, Any]], name: str, label: str, unit: float) -> str | None:
    if not rows:
        return None
    if len(rows) > FEW:
        return plots.agreement(rows, name, label, unit)
    return plots.dumbbells(rows, name, label, unit)


def _forgetting(named: list[dict[str, Any]]) -> str | None:
    rows = [{**row, "value": row["bits_per_byte"]} for row in named if row["bits_per_byte"]]
    if not rows or len(rows) > FEW:
        return None
    bases = [row for row in rows if row["kind"] == "base"]
    level = bases[0]["value"] if len(bases) == 1 else None
    return plots.dots(
        rows, "forgetting", "bits per byte of the forgetting text (less is better)", level
    )


def _forest(results: dict[str, Any], named: list[dict[str, Any]]) -> str | None:
    against = {
        (row["second"], row["task"]): row
        for row in results["contrasts"]
        if row["why"] == "against the base"
    }
    rows = [row for row in named if any(second == row["name"] for second, _ in against)]
    if not rows or len(rows) > FEW:
        return None
    panels = []
    for task in results["tasks"]:
        lines: list[dict[str, Any] | None] = []
        for row in rows:
            contrast = against.get((row["name"], task["task"]))
            lines.append(
                contrast
                and {
                    "delta": contrast["delta"],
                    "low": contrast["interval"][0],
                    "high": contrast["interval"][1],
                    "series": row["series"],
                    "sure": contrast["p_holm"] < 0.05,
                }
            )
        panels.append({"task": task["task"], "rows": lines})
    return plots.forest(panels, [row["label"] for row in rows])


# ------------------------------------------------------------------------------------- words


def _environment() -> Environment:
    environment = page_environment(_TEMPLATES)
    environment.filters.update(
        points=_points,
        signed=lambda value: f"{100 * value:+.1f}".replace("-", "−"),
        p=_p,
        cell=lambda text: " ".join(str(text).split()).replace("|", "\\|"),
    )
    environment.globals["contrast_of"] = _contrast_of
    environment.globals["by_pair"] = _by_pair
    return environment


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _p(value: float) -> str:
    if value < 0.001:
        return "p < .001"
    return "p = 1" if value > 0.995 else f"p = {value:.3f}".replace("0.", ".")


def _contrast_of(contrasts: list[dict[str, Any]], name: str, task: str) -> dict[str, Any] | None:
    """Return a cell's comparison with its base."""
    return next(
        (
            row
            for row in contrasts
            if row["second"] == name and row["task"] == task and row["why"] == "against the base"
        ),
        None,
    )


def _by_pair(contrasts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line for each pair of cells: first, second, why, and its contrasts by task."""
    by_pair: dict[tuple[str, str], dict[str, Any]] = {}
    for row in contrasts:
        line = {"first": row["first"], "second": row["second"], "why": row["why"], "tasks": {}}
        pair = by_pair.setdefault((row["first"], row["second"]), line)
        pair["tasks"][row["task"]] = row
    return list(by_pair.values())
