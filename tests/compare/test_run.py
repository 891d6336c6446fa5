"""A whole matrix on a tiny model: run, killed, resumed, changed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_slim.artifacts import read_json, write_json
from mlx_slim.cli.main import run as command
from mlx_slim.compare import runner
from mlx_slim.compare.matrix import load_matrix
from mlx_slim.compare.measured import measured
from mlx_slim.compare.records import as_json
from mlx_slim.compare.report import report
from mlx_slim.compare.verify import verify
from mlx_slim.errors import SlimError
from tests.support.matrix_run import run_all, write_yaml


def manifests(out: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob("cells/*/cell.json")}


def exchange(out: Path, *names: str) -> None:
    """Exchange the answers of two cells; their manifests say what a forger would say."""
    cells = [out / "cells" / name for name in names]
    for place, target in ((cells[0], out), (cells[1], cells[0]), (out, cells[1])):
        (place / "eval").rename(target / "eval")
    for cell in cells:
        manifest = read_json(cell / "cell.json")
        train = manifest["train"]
        manifest |= as_json(measured(cell))
        if train is not None:
            manifest["train"] = train
        write_json(cell / "cell.json", manifest)


def test_pruned_recovered_distilled_and_rounded(files: Path, tiny: Callable[..., Path]) -> None:
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
    for pair in (("toy-base", "toy-small"), ("toy-small-lora-s0", "toy-small-distilled-s0")):
        exchange(out, *pair)
        report(out)
        with pytest.raises(SlimError, match="numbers do not match") as caught:
            verify(out)
        assert all(f"{name} toytask" in "".join(caught.value.details) for name in pair)
        exchange(out, *pair)
    report(out)
    verify(out)

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
    chain = [
        "toy-base",
        "toy-small",
        "toy-small-lora-s0",
    ]  # a cell, one made of it, and one of that
    other = ["methods.small.prune.method=random"]
    run_all(files, resume=True, overrides=other, only=set(chain))
    after = manifests(out)
    assert [name for name in chain if after[name] == before[name]] == ["toy-base"]


def test_killed_resumed_and_only_what_changed_is_computed_again(files: Path) -> None:
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


def test_another_task_scores_again_and_trains_nothing(files: Path) -> None:
    run_all(files, only={"toy-base", "toy-base-4bit", "toy-qlora-s0"})
    out = files / "out"
    trained = (out / "cells/toy-qlora-s0/run/run.json").stat().st_mtime_ns
    text = (out / "cells/toy-qlora-s0/eval/held_out/results.json").stat().st_mtime_ns
    done = run_all(files, resume=True, overrides=["tasks=[{task: ./toytask.yaml, limit: 12}]"])
    assert "toy-qlora-s0" in done.complete
    assert (out / "cells/toy-qlora-s0/run/run.json").stat().st_mtime_ns == trained
    assert (out / "cells/toy-qlora-s0/eval/held_out/results.json").stat().st_mtime_ns == text
    assert report(out).results["tasks"][0]["n"] == 12


def test_a_manifest_of_another_version_is_computed_again(files: Path) -> None:
    run_all(files, only={"toy-base"})
    path = files / "out/cells/toy-base/cell.json"
    write_json(path, {**read_json(path), "schema_version": 0})
    assert "toy-base" in run_all(files, resume=True, only={"toy-base"}).complete
    assert read_json(path)["schema_version"] == 1


def test_an_interrupted_matrix_prints_the_command_that_goes_on(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cell says 130, as after Ctrl-C, which both processes hear."""
    cell = SimpleNamespace(poll=lambda: 130, stdin=None)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda command, **_: cell)
        assert command(["compare", "toy.yaml", "-o", "my out", "seeds=[1]", "--limit", "3"]) == 130
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: stopped in toy-base; complete cells are kept"
    words = shlex.split(hint.removeprefix("hint: resume with: "))
    assert words[:2] == ["mlx-slim", "compare"] and words[-1] == "--resume"
    layout = load_matrix("toy.yaml", ["seeds=[1]"], limit=3)
    assert runner.prepare(layout, files / "my out", resume=True)[0]
    assert command([*words[1:-1], "--dry-run"]) == 0


def test_command_line_runs_cells_in_processes_and_fails_at_the_end(
    files: Path, tiny: Callable[..., Path]
) -> None:
    methods = {"base": {"kind": "base"}, "lora": {"recipe": {"method": "lora"}}}
    path = write_yaml(files, tiny(), methods=methods, forgetting=None)
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


def test_a_signal_to_the_matrix_alone_ends_its_cell_and_the_matrix(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``kill PID`` reaches one process: it tells the cell, waits for it, and begins no other."""
    told = []

    class Cell:
        stdin = None

        def __init__(self, command: Any, **_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        def poll(self) -> int | None:
            return 0 if told else None  # done just now: the matrix stops all the same

        def terminate(self) -> None:
            told.append("terminate")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", Cell)
        assert command(["compare", "toy.yaml", "-o", "out", "--limit", "3"]) == 130
    assert told == ["terminate"]
    assert "stopped in toy-base" in capsys.readouterr().err
