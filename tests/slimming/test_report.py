"""The page of a search from its record alone: what it shows, what it escapes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mlx_slim.slimming.candidate import Candidate, Cost, Cut
from mlx_slim.slimming.folder import REPORT_FILE
from mlx_slim.slimming.proof import Retention
from mlx_slim.slimming.published import PUBLISHED
from mlx_slim.slimming.records import CandidateRow, SlimReport, TaskClaim
from mlx_slim.slimming.report import render
from tests.support.imports import HEAVY, imported_by

ORIGINAL = Candidate(None, (), 30, 3, 1536, 576, 0, Cost(134, 269_000_000, 272_000_000, 9, 9))


def report() -> SlimReport:
    small = replace(
        ORIGINAL, bits=8, cuts=(Cut("depth", 4),), layers=26, cost=Cost(120, 128, 131, 9, 9)
    )
    retention = Retention(600, 0.5, 0.475, 0.95, (0.91, 0.99), 0.9)
    rows = [
        CandidateRow(small, small.name(ORIGINAL), 0.5, 0.7, "full", retention, None, 131, "chosen"),
        CandidateRow(replace(small, bits=4, cuts=()), "4 <b>bits</b>", 0.2, verdict="not among"),
    ]
    return SlimReport(
        schema_version=1,
        source="owner/<script>",
        revision=None,
        options={"keep": 90.0},
        original=ORIGINAL,
        questions={"hellaswag": (300, 300)},
        provable=0.96,
        rows=rows,
        winner=small.key,
        claim=retention,
        tasks=[TaskClaim("hellaswag", "acc_norm", 300, 0.5, 0.475, -0.025, (-0.05, 0.0), 0.25)],
        demand_met=True,
        headline="8 bits, 26 of 30 layers: keeps 90%",
        forgotten=(0.91, 0.97),
        forgotten_text="test.jsonl",
        commands=[["mlx-slim", "quantize", "a b", "-o", "c"]],
        provenance={"system": "Linux"},
    )


def test_every_figure_is_on_the_page() -> None:
    page = render(report(), "half")
    for text in (
        "8 bits, 26 of 30 layers: keeps 90%",
        "95.0%",
        "[91.0, 99.0]",
        "-2.5",
        "0.9100 bits per byte before, 0.9700 after",
        "mlx-slim quantize &#39;a b&#39; -o c",
        "not among",
        *(one.source for one in PUBLISHED),
    ):
        assert text in page, text
    assert page.count("<svg") == 2 and "<script>" not in page and "<b>bits" not in page


def test_a_search_without_a_winner_has_a_page() -> None:
    nothing = replace(report(), winner=None, claim=None, tasks=[], forgotten=None, commands=[])
    page = render(nothing, "none")
    assert "The claim" not in page and "Make it again" not in page and "All candidates" in page


def test_published_shares_are_of_published_scores() -> None:
    assert all(0.5 < one.retained < 1 for one in PUBLISHED)
    assert round(PUBLISHED[0].retained, 3) == 0.936


def test_the_page_is_written_without_what_searches(tmp_path: Path) -> None:
    (tmp_path / REPORT_FILE).write_text(json.dumps(report().as_json()))
    out, heavy = imported_by(
        f"from mlx_slim.cli.main import run; print(run(['report', {str(tmp_path)!r}]))"
    )
    assert "report.html" in out and out.endswith("0\n")
    assert not (HEAVY - {"numpy", "jinja2"}) & set(heavy.split("'")), heavy
