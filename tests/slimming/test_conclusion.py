"""What the end of a search says of the machines that scored."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_slim.slimming.conclusion import commands_again, mixed_machines
from mlx_slim.slimming.folder import REPORT_FILE
from mlx_slim.slimming.options import SlimOptions
from mlx_slim.slimming.records import read_report
from mlx_slim.slimming.run import slim
from mlx_slim.slimming.search import Search
from tests.slimming.conftest import Setting
from tests.support.runs import Recorder


def test_scores_of_another_kind_of_machine_are_noted(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished / "candidates", out / "candidates")
    rows = {row.candidate.key: row for row in read_report(finished).rows}
    search: Any = SimpleNamespace(rows=rows, folder=lambda one: out / "candidates" / one.key)
    assert mixed_machines(search) == []
    scored = [key for key, row in rows.items() if row.selection is not None]
    file = out / "candidates" / scored[0] / "size.json"
    values = json.loads(file.read_text())
    values["provenance"]["machine"] = "another chip"
    file.write_text(json.dumps(values))
    (note,) = mixed_machines(search)
    assert note.startswith("scores are of 2 kinds of machine")
    assert f"original, {scored[1]}" in note and f"{scored[0]}: another chip; Python" in note


def test_a_search_that_made_nothing_small_enough_says_so(
    setting: Setting, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Counted sizes are estimates of files: folders may be over the budget all the same."""
    model, options = setting
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / REPORT_FILE).unlink()
    monkeypatch.setattr(Search, "_too_large", lambda *_: True)
    monkeypatch.setattr(Search, "_is_scored", lambda *_, **__: True)
    report = slim(model, out, options, Recorder(), resume=True)
    assert report.winner is None and report.demand_met is None
    assert "meets the budget: the nearest is" in report.headline
    assert "its folder is over the budget; the original stays" in report.headline


def test_an_original_within_the_budget_is_said_to_be(setting: Setting, tmp_path: Path) -> None:
    model, options = setting
    report = slim(model, tmp_path / "out", replace(options, disk=10**9), Recorder())
    assert report.winner is None and not report.rows
    assert report.headline.endswith("on disk and meets the budget")


def test_commands_make_the_very_model_again(finished: Path, tmp_path: Path) -> None:
    """A revision is that of the original alone, and an adapter is fused."""
    shutil.copytree(finished / "candidates", tmp_path / "candidates")
    report = read_report(finished)
    search: Any = SimpleNamespace(
        material=SimpleNamespace(source="org/name"),
        options=SlimOptions(revision="abc"),
        original=report.original,
        folder=lambda one: tmp_path / "candidates" / one.key,
        out=tmp_path,
    )
    candidates = {row.candidate.kind: row.candidate for row in report.rows if row.selection}
    (quantize,) = commands_again(search, candidates["mixed"])
    assert quantize[:3] == ["mlx-slim", "quantize", "org/name"] and "--revision" in quantize
    recipe = search.folder(candidates["depth"]) / "recover.yaml"
    assert "method: full" in recipe.read_text()
    prune, distill = commands_again(search, candidates["depth"])
    assert prune[-2:] == ["--revision", "abc"] and "--revision" not in distill
    recipe.write_text(recipe.read_text().replace("method: full", "method: lora"))
    *same, fuse = commands_again(search, candidates["depth"])
    assert same == [prune, distill] and "--revision" not in fuse
    assert fuse[:3] == ["mlx-slim", "fuse", prune[prune.index("-o") + 1]]
    assert fuse[fuse.index("--adapter") + 1] == f"{distill[-1]}/adapters"
