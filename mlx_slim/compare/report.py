"""One page that shows a matrix and its evidence; the same in Markdown and as JSON.

Invariant: everything is computed from stored files by one function (``build``), and the three files
render its result; the page needs no network and no script, and all text of models and data sets
is escaped. Try it: ``mlx-slim report DIR``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment

from mlx_slim.artifacts import SCHEMA_VERSION, write_json, write_text
from mlx_slim.claims import held
from mlx_slim.compare import claims, evidence, headline, store, tables
from mlx_slim.compare.claims import MethodComparison, MethodScore
from mlx_slim.compare.drawings import drawings
from mlx_slim.compare.pruning_papers import ProtocolRow, protocol
from mlx_slim.compare.records import FORGETTING, MatrixRecord, SweepRecord, as_json
from mlx_slim.compare.report_records import (
    Contrast,
    Extraction,
    FailedCell,
    Flip,
    PublishedScore,
    RecipeSettings,
    ReportModel,
    ReportTask,
    Row,
    SeedSpread,
)
from mlx_slim.errors import SlimError
from mlx_slim.pages import environment as page_environment
from mlx_slim.reading import JsonObject, library_errors, short

_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class MatrixReport:
    """Everything that the report says: ``results.json``.

    Attributes:
        matrix: The matrix: title, note, forgetting text, omitted cells, code.
        headline: The result in sentences.
        claims: The comparisons that those are made of, corrected.
        means: Model -> the mean of each of its methods.
        models: The models of the matrix.
        tasks: The tasks.
        rows: A line a cell.
        seeds: Means over seeds.
        contrasts: Paired comparisons, corrected.
        notes: A line for each comparison that could not be made.
        published: Scores beside published ones.
        protocol: Scores beside those of the pruning papers, where their tasks were scored.
        sweeps: How learning rates were chosen.
        extraction: Generated answers that could not be read.
        flips: Questions to read.
        settings: What the recipes have in common, and what differs.
        ledgers: Cell -> counts of its training rows.
        failed: Cells that are missing.
        provenance: Machine and versions.
    """

    matrix: MatrixRecord
    headline: list[str]
    claims: list[MethodComparison]
    means: dict[str, list[MethodScore]]
    models: dict[str, ReportModel]
    tasks: list[ReportTask]
    rows: list[Row]
    seeds: list[SeedSpread]
    contrasts: list[Contrast]
    notes: list[str]
    published: list[PublishedScore]
    protocol: list[ProtocolRow]
    sweeps: list[SweepRecord]
    extraction: list[Extraction]
    flips: list[Flip]
    settings: RecipeSettings
    ledgers: dict[str, JsonObject]
    failed: list[FailedCell]
    provenance: JsonObject

    def as_json(self) -> JsonObject:
        """Return the object of ``results.json``."""
        record = self.matrix
        return {
            "schema_version": SCHEMA_VERSION,
            "title": record.title,
            "note": record.note,
            "headline": self.headline,
            "claims": [claim.as_json() for claim in self.claims],
            "means": {model: list(map(asdict, scores)) for model, scores in self.means.items()},
            "models": {name: model.as_json() for name, model in self.models.items()},
            "tasks": [task.as_json() for task in self.tasks],
            "rows": [row.as_json() for row in self.rows],
            "seeds": list(map(asdict, self.seeds)),
            "contrasts": list(map(asdict, self.contrasts)),
            "notes": self.notes,
            "published": list(map(asdict, self.published)),
            **({"protocol": list(map(asdict, self.protocol))} if self.protocol else {}),
            "sweeps": list(map(asdict, self.sweeps)),
            FORGETTING: as_json(record.forgetting) if record.forgetting else None,
            "extraction": list(map(asdict, self.extraction)),
            "flips": list(map(asdict, self.flips)),
            "settings": self.settings.as_json(),
            "ledgers": self.ledgers,
            "omitted": list(map(asdict, record.omitted)),
            "failed": list(map(asdict, self.failed)),
            "code": record.code,
            "provenance": self.provenance,
        }


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        folder: Of the matrix.
        record: What the report says.
    """

    folder: Path
    record: MatrixReport

    @property
    def page(self) -> Path:
        """``report.html``."""
        return self.folder / "report.html"

    @property
    def results(self) -> JsonObject:
        """The object of ``results.json``."""
        return self.record.as_json()


def report(folder: Path) -> Report:
    """Write ``results.json``, ``report.md`` and ``report.html`` from what is stored.

    Raises:
        SlimError: If the folder holds no matrix, or none of its cells is complete.
    """
    stored = store.load(folder)
    if not stored.cells:
        reasons = [f"{name}: {why}" for name, why in stored.failed]
        raise SlimError(f"{folder} has no complete cell to report", details=reasons)
    record = build(stored)
    texts = pages(stored, record)
    done = Report(folder, record)
    with held(done.page):  # two writers at once would mix the pages of both
        write_json(folder / "results.json", done.results)
        for name, text in texts.items():
            write_text(folder / name, text)
    return done


def pages(stored: store.StoredMatrix, record: MatrixReport) -> dict[str, str]:
    """Return the text of each page, a function of what is stored.

    Raises:
        SlimError: If a record of the folder cannot be used.
    """
    with library_errors(f"{short(stored.folder)}: a record in it is damaged", store.AGAIN):
        return _pages(stored, record)


def _pages(stored: store.StoredMatrix, record: MatrixReport) -> dict[str, str]:
    curves = [curve for cell in stored.cells if (curve := evidence.curves(cell))]
    plots = drawings(
        record.rows,
        record.contrasts,
        record.tasks,
        curves,
        mixed="kinds" in record.provenance,
    )
    environment = _environment()
    names = ("report.md", "report.html")
    values = {**vars(record), "plots": plots}
    return {name: environment.get_template(f"{name}.j2").render(values) for name in names}


def build(stored: store.StoredMatrix) -> MatrixReport:
    """Return everything that the report says.

    Raises:
        SlimError: If a record of the folder cannot be used.
    """
    with library_errors(f"{short(stored.folder)}: a record in it is damaged", store.AGAIN):
        return _build(stored)


def _build(stored: store.StoredMatrix) -> MatrixReport:
    tasks = tables.tasks_of(stored)
    rows = [tables.row_of(cell, tasks) for cell in stored.cells]
    compared, notes = tables.contrasts(stored, tasks)
    scores = claims.means(stored, tasks)
    contrasts, pooled = tables.corrected(compared, claims.claims(stored, tasks))
    return MatrixReport(
        matrix=stored.record,
        headline=headline.headline(rows, contrasts, pooled, scores, tasks),
        claims=pooled,
        means=scores,
        models=_models(stored),
        tasks=tasks,
        rows=rows,
        seeds=tables.seeds_of(rows, tasks),
        contrasts=contrasts,
        notes=[*notes, *evidence.mixed_note(stored)],
        published=evidence.published(stored, rows),
        protocol=protocol(stored),
        sweeps=stored.sweeps,
        extraction=evidence.extraction(stored),
        flips=evidence.flips(stored, tasks),
        settings=evidence.differences(stored),
        ledgers={cell.name: lines for cell in stored.cells if (lines := evidence.ledger(cell))},
        failed=[FailedCell(name, why) for name, why in stored.failed],
        provenance=evidence.machine_of(stored),
    )


def _models(stored: store.StoredMatrix) -> dict[str, ReportModel]:
    """Return the models with the hash of their weights, as recorded by the cells."""
    hashes = {cell.model: cell.record.weights_sha256 for cell in stored.cells}
    return {
        name: ReportModel(entry, hashes.get(name)) for name, entry in stored.record.models.items()
    }


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


def _contrast_of(contrasts: list[Contrast], name: str, task: str) -> Contrast | None:
    """Return a cell's comparison with its base."""
    return next(
        (row for row in contrasts if row.second == name and row.task == task and row.against_base),
        None,
    )


@dataclass(frozen=True)
class _Pair:
    """A line for two cells: their comparisons by task."""

    first: str
    second: str
    tasks: dict[str, Contrast]


def _by_pair(contrasts: list[Contrast]) -> list[_Pair]:
    """Return a line for each pair of cells."""
    by_pair: dict[tuple[str, str], _Pair] = {}
    for row in contrasts:
        pair = by_pair.setdefault((row.first, row.second), _Pair(row.first, row.second, {}))
        pair.tasks[row.task] = row
    return list(by_pair.values())
