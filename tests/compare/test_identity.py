"""What a cell's numbers depend on: equal inputs give equal cells, other inputs new ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.artifacts import hash_file, read_json, write_json
from mlx_slim.compare import cell as cells
from mlx_slim.compare import identity, runner
from mlx_slim.compare.jobs import MatrixRun
from mlx_slim.compare.matrix import load_matrix
from mlx_slim.compare.questions import write_questions
from mlx_slim.compare.report import report
from mlx_slim.config.load import from_values
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.contents import contents
from mlx_slim.models.load import model_hash
from tests.support.matrix_run import TASK, run_all, write_yaml
from tests.support.runs import Recorder, write_rows

# What is measured anew in every run.
MEASURED = {"seconds", "tokens_per_second", "peak_memory_bytes", "predicted_seconds"}
MEASURED |= {"eval_seconds", "eval_peak_memory_bytes"}


def unmeasured(value: Any) -> Any:
    """Return JSON without times and measured memory."""
    if isinstance(value, dict):
        return {key: unmeasured(inner) for key, inner in value.items() if key not in MEASURED}
    return [unmeasured(inner) for inner in value] if isinstance(value, list) else value


def test_what_is_no_time_is_the_same_twice(files: Path, tiny: Callable[..., Path]) -> None:
    methods = {
        "base": {"kind": "base"},
        "small": {"kind": "pruned", "prune": {"ratio": 0.5, "calibration": "rows.jsonl"}},
        "small-4bit": {"kind": "quantized", "of": "small"},
        "qlora": {"recipe": {"method": "qlora"}},
    }
    write_yaml(files, tiny(), models={"toy": {"source": str(tiny())}}, methods=methods)
    folders = []
    for name in ("first", "second"):
        run_all(files)
        out = (files / "out").rename(files / name)
        hashes = read_json(out / "models" / "hashes.json")
        folders.append(
            {
                "results": unmeasured(report(out).results),
                "hashes": {model: entry["sha256"] for model, entry in hashes.items()},
                "cells": [unmeasured(read_json(f)) for f in sorted(out.glob("cells/*/cell.json"))],
                "samples": {
                    str(file.relative_to(out)): hash_file(file)
                    for file in sorted(out.glob("cells/*/eval/*/samples_*.jsonl"))
                },
                "scored": [
                    unmeasured(read_json(file))
                    for file in sorted(out.glob("cells/*/eval/*/results.json"))
                ],
            }
        )
    assert folders[0] == folders[1]
    assert len(folders[0]["samples"]) == 8
    assert set(folders[0]["hashes"]) >= {"cells/toy-small/model", "models/toy-4bit-g32-affine"}
    small = [files / name / "cells/toy-small/model" for name in ("first", "second")]
    assert read_json(small[0] / "prune.json") != read_json(small[1] / "prune.json")
    assert model_hash(small[0]) == model_hash(small[1])
    (small[1] / "tokenizer_config.json").write_text("{}")
    assert model_hash(small[0]) != model_hash(small[1])


def test_changed_answers_definitions_and_texts_are_scored_again_and_nothing_else(
    files: Path,
) -> None:
    """The keys know rows, definition and text by content, not by name."""
    out = files / "out"
    (files / "other.yaml").write_text(TASK.replace("toy.jsonl", "other.jsonl"))
    other = (files / "toy.jsonl").read_text()
    (files / "other.jsonl").write_text(other)
    tasks = "tasks=[{task: ./toytask.yaml, limit: 10}, {task: ./other.yaml}]"
    only = {"toy-base", "toy-qlora-s0"}

    def resumed() -> set[str]:
        """Return what was computed again, of the two cells."""
        outputs = [*out.glob("cells/*/run/run.json"), *out.glob("cells/*/eval/*/results.json")]
        before = {path: path.stat().st_mtime_ns for path in outputs}
        done = run_all(files, resume=True, overrides=[tasks], only=only)
        assert set(done.complete) == only
        return {
            "/".join(path.relative_to(out).parts[1:-1])
            for path, then in before.items()
            if path.stat().st_mtime_ns != then
        }

    run_all(files, overrides=[tasks], only=only)
    assert resumed() == set()

    rows = [json.loads(line) for line in (files / "toy.jsonl").read_text().splitlines()]
    right = [row["answer"] for row in rows]
    rows = [{**row, "answer": (row["answer"] + 1) % 3} for row in rows]
    (files / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = {f"{cell}/eval/toytask" for cell in only}
    assert resumed() == both
    samples = (out / "cells/toy-base/eval/toytask/samples_toytask.jsonl").read_text().splitlines()
    assert [json.loads(line)["target"] for line in samples] == [(t + 1) % 3 for t in right[:10]]

    (files / "toytask.yaml").write_text(TASK + "metrics: [acc]\n")
    assert resumed() == both
    results = read_json(out / "cells/toy-base/eval/toytask/results.json")
    assert list(results["tasks"]["toytask"]["metrics"]) == ["acc"]

    (files / "text.txt").write_text("Another text, of other words. " * 4)
    assert resumed() == {f"{cell}/eval/held_out" for cell in only}

    (files / "rows.jsonl").write_text((files / "rows.jsonl").read_text() + "\n")
    assert resumed() == {
        f"toy-qlora-s0/{part}" for part in ("run", "eval/toytask", "eval/other", "eval/held_out")
    }


def test_answers_that_no_field_declares_count_too(files: Path) -> None:
    """A task may name fewer fields than its templates read."""
    (files / "toytask.yaml").write_text(TASK.replace(", answer: integer", ""))
    layout = load_matrix(str(files / "toy.yaml"))

    def request() -> dict:
        return write_questions(layout.matrix, files / "questions").requests["toytask"]

    before = request()
    (files / "toy.jsonl").write_text(
        (files / "toy.jsonl").read_text().replace('"answer": 0', '"answer": 1')
    )
    assert request()["rows_sha256"] != before["rows_sha256"]


def test_rows_that_change_while_the_matrix_runs_cost_their_cells(files: Path) -> None:
    layout = load_matrix(str(files / "toy.yaml"))
    out = files / "out"
    cell = runner.prepare(layout, out, False)[0][0]
    (files / "toy.jsonl").write_text(
        (files / "toy.jsonl").read_text().replace('"answer": 0', '"answer": 1')
    )
    with pytest.raises(SlimError, match="changed while the matrix was running"):
        cells.CellRun(MatrixRun(layout, out, Recorder()), cell).run()
    assert not (out / "cells" / cell.name / "cell.json").exists()
    assert "toy-base" in run_all(files, resume=True, only={"toy-base"}).complete


@pytest.mark.parametrize("named", ["validation", "template", "forgetting"])
def test_files_that_a_recipe_names_count_by_content(files: Path, named: str) -> None:
    write_rows(files / "validation.jsonl", 5)
    (files / "template.jinja").write_text("{{ messages[0].content }}")
    recipe = {
        "validation": {"data": {"path": "rows.jsonl", "validation": "validation.jsonl"}},
        "template": {"data": {"path": "rows.jsonl", "template": "template.jinja"}},
        "forgetting": {"data": {"path": "rows.jsonl"}, "forgetting": {"path": "text.txt"}},
    }[named]
    file = {"validation": "validation.jsonl", "template": "template.jinja"}.get(named, "text.txt")
    resolved = from_values({"model": "x", **recipe}, "toy", "test")
    before = contents(resolved.recipe)
    assert contents(resolved.recipe) == before
    (files / file).write_text((files / file).read_text() + "\n" + (files / file).read_text())
    assert contents(resolved.recipe) != before


def test_changed_rows_weights_or_code_change_the_key(
    files: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = load_matrix(str(files / "toy.yaml"))
    cell = next(cell for cell in layout.cells if cell.name == "toy-qlora-s0")

    def key() -> str:
        return cells.CellRun(MatrixRun(layout, files / "out", Recorder()), cell).model_key

    first = key()
    assert key() == first
    (files / "rows.jsonl").write_text((files / "rows.jsonl").read_text() + "\n")
    second = key()
    assert second != first
    monkeypatch.setattr(identity, "code_version", lambda: "other")
    assert key() != second


def test_a_folder_that_an_older_version_prepared_is_one_line(files: Path) -> None:
    layout = load_matrix(str(files / "toy.yaml"))
    out = files / "out"
    cell = runner.prepare(layout, out, False)[0][0]
    record = read_json(out / "matrix.json")
    del record["asked"]
    write_json(out / "matrix.json", record)
    with pytest.raises(SlimError, match="prepared by another version"):
        cells.CellRun(MatrixRun(layout, out, Recorder()), cell).run()
