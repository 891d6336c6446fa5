"""The page of a search: candidates, the front, the claim, and what makes the winner again.

Invariant: a function of ``slim.json``; each share has its interval and its number of questions. Try
it: ``mlx-slim report DIR`` on the folder of a finished search.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from markupsafe import Markup

from mlx_slim.artifacts import write_text
from mlx_slim.pages import environment
from mlx_slim.plot_records import Axis, Point, ScoreLine
from mlx_slim.plots import pareto
from mlx_slim.slimming.folder import MODEL
from mlx_slim.slimming.published import PUBLISHED
from mlx_slim.slimming.records import CandidateRow, SlimReport, read_report

PAGE = "report.html"
# The colours of the plot.
_KINDS = (
    "bits",
    "depth",
    "width",
    "hidden",
    "mixed",
    "depth+width",
    "experts",
)  # the colours of the plot


def write_page(folder: Path) -> Path:
    """Write ``report.html``; return its path.

    Raises:
        SlimError: If ``slim.json`` is absent or damaged.
    """
    page = folder / PAGE
    write_text(page, render(read_report(folder), folder.name))
    return page


def render(report: SlimReport, name: str) -> str:
    """Return the page of a report."""
    scored = [row for row in report.rows if row.selection is not None]
    commands = [shlex.join(words) for words in report.commands]
    template = environment(Path(__file__).with_name("templates")).get_template("slim.html.j2")
    return template.render(
        name=name,
        report=report,
        rows=sorted(report.rows, key=lambda row: (row.selection is None, row.kl or 0.0)),
        plots=_plots(report, scored),
        commands=commands,
        published=PUBLISHED,
        selection=sum(sizes[0] for sizes in report.questions.values()),
        claim_n=sum(sizes[1] for sizes in report.questions.values()),
        model=MODEL,
    )


def _plots(report: SlimReport, scored: list[CandidateRow]) -> list[tuple[str, Markup]]:
    """Return (title, SVG) of selection score against each cost that was counted or measured."""
    if not scored:
        return []
    first = scored[0].selection
    assert first is not None
    level = [ScoreLine(first.first, "original")]

    def draw(title: str, axis: Axis, costs: list[float | None]) -> tuple[str, Markup]:
        points = [
            Point(cost, row.selection.second, _short(row), _series(row))
            for row, cost in zip(scored, costs, strict=True)
            if cost is not None and row.selection is not None
        ]
        return title, Markup(pareto(points, level, axis))

    mega = 1e6 if report.original.cost.disk_bytes < 2e9 else 1e9
    unit = "MB" if mega == 1e6 else "GB"
    drawn = [
        draw(
            "Score and bytes on disk",
            Axis("disk", f"{unit} on disk", mega, less=True),
            [row.disk_bytes for row in scored],
        ),
        draw(
            "Score and memory while answering",
            Axis("memory", f"{unit} in memory, counted", mega, less=True),
            [row.candidate.cost.memory_bytes for row in scored],
        ),
    ]
    if any(row.speed for row in scored):
        speeds = [row.speed.generation if row.speed else None for row in scored]
        drawn.append(
            draw("Score and speed", Axis("speed", "tokens/s of generation", 1, less=False), speeds)
        )
    return drawn


def _series(row: CandidateRow) -> int:
    return 1 + _KINDS.index(row.candidate.kind) if row.candidate.kind in _KINDS else 0


def _short(row: CandidateRow) -> str:
    return row.candidate.key
