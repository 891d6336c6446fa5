"""Scores beside those of the pruning papers: which cells are shown, and what they drop by."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_slim.artifacts import read_json
from mlx_slim.compare.pruning_papers import METRICS, PAPERS
from mlx_slim.compare.report import report
from mlx_slim.evaluation.tasks.spec import expand
from tests.support.matrix import write_matrix


def test_the_tasks_are_those_of_the_suite() -> None:
    selections = expand(["pruning-7"])
    assert [selection.task.name for selection in selections] == list(METRICS)
    assert all(METRICS[s.task.name] in s.task.metrics for s in selections)


def test_the_papers_means_are_those_of_their_tables() -> None:
    means = [round(sum(values) / len(values), 2) for values in PAPERS.values()]
    assert means == [63.25, 59.23]


def test_ours_stand_beside_the_papers(tmp_path: Path) -> None:
    sizes = dict.fromkeys(METRICS, 20)
    folder = write_matrix(tmp_path / "m", questions=sizes, methods=("base", "lora"))
    report(folder)
    results = read_json(folder / "results.json")
    rows = {row["name"]: row for row in results["protocol"]}
    assert [row["published"] for row in rows.values()] == [True, True, True, False, False]
    base, tuned = rows["toy0-base"], rows["toy0-lora-s0"]
    assert base["drop"] is None and base["n"] == sizes
    assert tuned["drop"] == pytest.approx(base["mean"] - tuned["mean"])
    (scores,) = [row["scores"] for row in results["rows"] if row["name"] == "toy0-base"]
    assert base["mean"] == pytest.approx(sum(base["scores"].values()) / 7)
    assert base["scores"]["piqa"] * 20 == pytest.approx(round(base["scores"]["piqa"] * 20))
    assert set(scores) == set(METRICS)
    for page in ("report.md", "report.html"):
        text = (folder / page).read_text()
        assert "Beside the pruning papers" in text and "compare drops, not levels" in text
        assert "73.2" in text and "59.2" in text


def test_without_all_seven_tasks_there_are_no_such_rows(tmp_path: Path) -> None:
    sizes = dict.fromkeys(list(METRICS)[:6], 4)
    folder = write_matrix(tmp_path / "m", questions=sizes, methods=("base", "lora"))
    report(folder)
    assert "protocol" not in read_json(folder / "results.json")
