"""A whole matrix on a tiny model: run, killed, resumed, changed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mlx_slim.artifacts import read_json, write_json
from mlx_slim.cli.main import run as command
from mlx_slim.compare import cell as cells
from mlx_slim.compare import identity, runner
from mlx_slim.compare.jobs import Job
from mlx_slim.compare.matrix import load_matrix
from mlx_slim.compare.questions import write_questions
from mlx_slim.compare.report import report
from mlx_slim.compare.verify import verify
from mlx_slim.config.load import from_values
from mlx_slim.errors import SlimError
from tests.support.runs import Recorder, write_rows

TASK = """
about: a toy
kind: multiple_choice
data: {path: toy.jsonl}
fields: {question: text, choices: texts, answer: integer}
prompt: "{{ question }}"
choices: "{{ choices }}"
target: "{{ answer }}"
"""


@pytest.fixture
def files(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with training rows, a task, held-out text, and a matrix over the tiny llama."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 24)
    (tmp_path / "toytask.yaml").write_text(TASK)
    rows = [
        {"question": f"Number {i} is", "choices": ["odd", "even", "prime"], "answer": i % 3}
        for i in range(12)
    ]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    write_yaml(tmp_path, tiny())
    return tmp_path


def write_yaml(folder: Path, model: Path, **changes) -> Path:
    matrix = {
        "title": "toy",
        "recipe": {
            "data": {"path": "rows.jsonl", "validation": 4},
            "quantize": {"group_size": 32},
            "train": {"steps": 2, "batch_tokens": 256, "max_length": 128},
        },
        "models": {
            "toy": {"source": str(model)},
            "gone": {"source": "./gone", "methods": ["base"]},
        },
        "methods": {
            "base": {"kind": "base"},
            "base-4bit": {"kind": "quantized"},
            "lora": {"recipe": {"method": "lora"}, "learning_rates": [1e-4, 1e-2]},
            "qlora": {"recipe": {"method": "qlora"}},
            "qlora-fused": {"kind": "fused", "of": "qlora"},
        },
        "tasks": [{"task": "./toytask.yaml", "limit": 10}],
        "sweep": {"steps": 2},
        "held_out": {"path": "text.txt"},
        **changes,
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(matrix, sort_keys=False))
    return path


def run_all(files: Path, *, resume: bool = False, overrides=(), only=None) -> runner.Ran:
    """Run the matrix in this process."""
    layout = load_matrix(str(files / "toy.yaml"), overrides)
    out = files / "out"
    todo = runner.prepare(layout, out, resume)

    def launch(cell) -> tuple[int, str]:
        if only is not None and cell.name not in only:
            return -signal.SIGKILL, ""
        try:
            cells.Making(Job(layout, out, Recorder()), cell).run()
        except SlimError as error:
            return error.exit_code, error.message
        return 0, ""

    with runner.held(out, resume=True):
        return runner.run(todo, out, launch, lambda number, cell: None)


def manifests(out: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob("cells/*/cell.json")}


def test_pruned_recovered_distilled_and_rounded(files, tiny):
    small = {"kind": "pruned", "prune": {"method": "l2", "ratio": 0.5}}
    both = {"method": "lora", "distill": {"method": "mutual"}}
    methods = {
        "base": {"kind": "base"},
        "small": small,
        "small-lora": {"of": "small", "recipe": {"method": "lora"}},
        "small-distilled": {"of": "small", "recipe": {"method": "lora", "distill": {}}},
        "small-mutual": {"of": "small", "recipe": both},
        "small-together": {"kind": "fused", "of": "small-mutual"},
        "small-fused": {"kind": "fused", "of": "small-distilled"},
        "small-4bit": {"kind": "quantized", "of": "small-fused"},
        "wrong": {"kind": "pruned", "prune": {"ratoi": 0.5}},
    }
    write_yaml(files, tiny(), models={"toy": {"source": str(tiny())}}, methods=methods)
    out = files / "out"
    ran = run_all(files)
    assert not ran.failed and len(ran.complete) == 8
    results = report(out).results
    (refused,) = results["failed"]
    assert "did you mean 'ratio'" in refused["why"]
    rows = {row["method"]: row for row in results["rows"]}
    cut = rows["small"]["pruned"]
    assert 0 < cut["parameters_after"] < cut["parameters_before"]
    assert rows["small-lora"]["train"]["total"] == cut["parameters_after"]
    # Both saw the same rows; only one saw its teacher, the model as it was.
    assert rows["small-lora"]["train"]["tokens"] == rows["small-distilled"]["train"]["tokens"]
    run = read_json(out / "cells" / "toy-small-distilled-s0" / "run" / "run.json")
    assert run["distill"]["teachers"][0]["share"] == 1.0
    recipe = read_json(out / "cells" / "toy-small-distilled-s0" / "cell.json")["recipe"]
    assert recipe["distill"]["teachers"][0]["model"] is None  # no folder of this machine
    sizes = {name: row["disk"]["model"] for name, row in rows.items()}
    assert sizes["small-4bit"] < sizes["small"] < sizes["base"]
    why = {(c["first"], c["second"]): c["why"] for c in results["contrasts"]}
    assert why["toy-small", "toy-small-lora-s0"] == "what tuning brings back"
    assert why["toy-small-lora-s0", "toy-small-distilled-s0"] == "between methods"
    assert why["toy-small-fused-s0", "toy-small-4bit-s0"] == "what rounding costs"
    assert results["headline"][0].startswith("Pruned by small: ")
    assert " after small-lora, " in results["headline"][0]
    assert verify(out).cells == 8

    # Two students: the pruned one answers for the cell, the other one was the model as it was.
    mutual = out / "cells" / "toy-small-mutual-s0"
    assert rows["small-mutual"]["train"]["tokens"] == rows["small-lora"]["train"]["tokens"]
    assert rows["small-mutual"]["train"]["total"] == sum(
        cut[f"parameters_{when}"] for when in ("before", "after")
    )
    assert (
        rows["small-mutual"]["disk"]["adapter"]
        == (mutual / "run/first/adapters.safetensors").stat().st_size
    )
    assert rows["small-mutual"]["intruders"]["matrices"] == 21
    assert (mutual / "run" / "second" / "adapters.safetensors").exists()
    assert rows["small-together"]["fidelity"]["top1"] > 0.9

    before = manifests(out)
    run_all(files, resume=True, overrides=["methods.small.prune.method=random"])
    after = manifests(out)
    assert {name for name in after if after[name] == before[name]} == {"toy-base"}


def test_killed_resumed_and_only_what_changed_is_made_again(files):
    out = files / "out"
    first = run_all(files, only={"toy-base", "toy-lora-s0"})
    assert set(first.complete) == {"toy-base", "toy-lora-s0"}
    assert dict(first.failed)["toy-qlora-s0"] == "killed by SIGKILL (out of memory?)"
    with pytest.raises(SlimError, match="holds a matrix already"):
        run_all(files)
    before = manifests(out)

    second = run_all(files, resume=True)
    assert len(second.complete) == 5
    assert [name for name, _ in second.failed] == ["gone-base"]
    assert "does not exist" in dict(second.failed)["gone-base"]
    after = manifests(out)
    assert {name: after[name] for name in before} == before

    results = report(out).results
    assert {item["cell"] for item in results["failed"]} == {"gone-base"}
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["toy-lora-s0"]["learning_rate"] in (1e-4, 1e-2)
    (sweep,) = results["sweeps"]
    assert sweep["chosen"] == rows["toy-lora-s0"]["learning_rate"]
    best = min(sweep["rates"], key=lambda item: item["validation_loss"])
    assert best["learning_rate"] == sweep["chosen"]
    assert rows["toy-base-4bit"]["disk"]["model"] < rows["toy-base"]["disk"]["model"]
    assert rows["toy-qlora-fused-s0"]["fidelity"]["top1"] > 0.9
    assert all(row["bits_per_byte"] > 0 for row in rows.values())
    assert rows["toy-qlora-s0"]["train"]["predicted_seconds"] is not None
    assert rows["toy-qlora-s0"]["intruders"]["matrices"] == 21
    assert rows["toy-base"]["intruders"] is None
    assert verify(out).questions == 50

    third = run_all(files, resume=True, overrides=["methods.qlora.recipe.train.learning_rate=0.05"])
    changed = manifests(out)
    same = {name for name in after if changed[name] == after[name]}
    assert same == {"toy-base", "toy-base-4bit", "toy-lora-s0"}
    assert len(third.complete) == 5


def test_another_task_scores_again_and_trains_nothing(files):
    run_all(files, only={"toy-base", "toy-base-4bit", "toy-qlora-s0"})
    out = files / "out"
    trained = (out / "cells/toy-qlora-s0/run/run.json").stat().st_mtime_ns
    text = (out / "cells/toy-qlora-s0/eval/held_out/results.json").stat().st_mtime_ns
    done = run_all(files, resume=True, overrides=["tasks=[{task: ./toytask.yaml, limit: 12}]"])
    assert "toy-qlora-s0" in done.complete
    assert (out / "cells/toy-qlora-s0/run/run.json").stat().st_mtime_ns == trained
    assert (out / "cells/toy-qlora-s0/eval/held_out/results.json").stat().st_mtime_ns == text
    assert report(out).results["tasks"][0]["n"] == 12


def test_changed_answers_definitions_and_texts_are_scored_again_and_nothing_else(files):
    """The keys know rows, definition and text by content, not by name."""
    out = files / "out"
    (files / "other.yaml").write_text(TASK.replace("toy.jsonl", "other.jsonl"))
    other = (files / "toy.jsonl").read_text()
    (files / "other.jsonl").write_text(other)
    tasks = "tasks=[{task: ./toytask.yaml, limit: 10}, {task: ./other.yaml}]"
    only = {"toy-base", "toy-qlora-s0"}

    def resumed() -> set[str]:
        """Return what was made anew, of the two cells."""
        made = [*out.glob("cells/*/run/run.json"), *out.glob("cells/*/eval/*/results.json")]
        before = {path: path.stat().st_mtime_ns for path in made}
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


def test_answers_that_no_field_declares_count_too(files):
    """A task may name fewer fields than its templates read."""
    (files / "toytask.yaml").write_text(TASK.replace(", answer: integer", ""))
    layout = load_matrix(str(files / "toy.yaml"))

    def asked() -> dict:
        return write_questions(layout.matrix, files / "questions")["asked"]["toytask"]

    before = asked()
    (files / "toy.jsonl").write_text(
        (files / "toy.jsonl").read_text().replace('"answer": 0', '"answer": 1')
    )
    assert asked()["rows_sha256"] != before["rows_sha256"]


def test_rows_that_change_while_the_matrix_runs_cost_their_cells(files):
    layout = load_matrix(str(files / "toy.yaml"))
    out = files / "out"
    cell = runner.prepare(layout, out, False)[0]
    (files / "toy.jsonl").write_text(
        (files / "toy.jsonl").read_text().replace('"answer": 0', '"answer": 1')
    )
    with pytest.raises(SlimError, match="changed while the matrix was running"):
        cells.Making(Job(layout, out, Recorder()), cell).run()
    assert not (out / "cells" / cell.name / "cell.json").exists()
    assert "toy-base" in run_all(files, resume=True, only={"toy-base"}).complete


@pytest.mark.parametrize("named", ["validation", "template", "held_out"])
def test_files_that_a_recipe_names_count_by_content(files, named):
    write_rows(files / "validation.jsonl", 5)
    (files / "template.jinja").write_text("{{ messages[0].content }}")
    recipe = {
        "validation": {"data": {"path": "rows.jsonl", "validation": "validation.jsonl"}},
        "template": {"data": {"path": "rows.jsonl", "template": "template.jinja"}},
        "held_out": {"data": {"path": "rows.jsonl"}, "held_out": {"path": "text.txt"}},
    }[named]
    file = {"validation": "validation.jsonl", "template": "template.jinja"}.get(named, "text.txt")
    resolved = from_values({"model": "x", **recipe}, "toy", "test")
    before = identity.contents(resolved.recipe)
    assert identity.contents(resolved.recipe) == before
    (files / file).write_text((files / file).read_text() + "\n" + (files / file).read_text())
    assert identity.contents(resolved.recipe) != before


def test_changed_rows_weights_or_code_change_the_key(files, tiny, monkeypatch):
    layout = load_matrix(str(files / "toy.yaml"))
    cell = next(cell for cell in layout.cells if cell.name == "toy-qlora-s0")

    def key() -> str:
        return cells.Making(Job(layout, files / "out", Recorder()), cell).made_of

    first = key()
    assert key() == first
    (files / "rows.jsonl").write_text((files / "rows.jsonl").read_text() + "\n")
    second = key()
    assert second != first
    monkeypatch.setattr(identity, "code_version", lambda: "other")
    assert key() != second


def test_a_manifest_of_another_version_is_made_again(files):
    run_all(files, only={"toy-base"})
    path = files / "out/cells/toy-base/cell.json"
    write_json(path, {**read_json(path), "schema_version": 0})
    assert "toy-base" in run_all(files, resume=True, only={"toy-base"}).complete
    assert read_json(path)["schema_version"] == 1


def test_an_interrupted_matrix_prints_the_command_that_goes_on(files, monkeypatch, capsys):
    """The cell says 130, as after Ctrl-C, which both processes hear."""
    cell = SimpleNamespace(wait=lambda: 130)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda command, pass_fds: cell)
        assert command(["compare", "toy.yaml", "-o", "my out", "seeds=[1]", "--limit", "3"]) == 130
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: stopped in toy-base; what is complete stays"
    words = shlex.split(hint.removeprefix("hint: resume with: "))
    assert words[:2] == ["mlx-slim", "compare"] and words[-1] == "--resume"
    layout = load_matrix("toy.yaml", ["seeds=[1]"], limit=3)
    assert runner.prepare(layout, files / "my out", resume=True)
    assert command([*words[1:-1], "--dry-run"]) == 0


def test_command_line_runs_cells_in_processes_and_fails_at_the_end(files, tiny):
    methods = {"base": {"kind": "base"}, "lora": {"recipe": {"method": "lora"}}}
    path = write_yaml(files, tiny(), methods=methods, held_out=None)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_slim", "compare", str(path), "-o", "cli", "--quiet"],
        cwd=files,
        env={**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "gone-base failed: gone does not exist" in done.stderr
    assert "2 of 3 cells" in done.stdout
    assert "report: cli/report.html" in done.stdout
    assert (files / "cli" / "report.md").exists()
    assert "Traceback" not in done.stderr
