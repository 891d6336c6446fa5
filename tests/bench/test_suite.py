"""The suite: every speed is measured on the same small work, and the record names no place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.bench import eval_sides as scoring
from mlx_slim.bench import self_test, suite
from mlx_slim.bench import sides as training
from mlx_slim.bench.self_checks import CHECKS
from mlx_slim.cli.main import run
from tests.support.tiny import TinyModels


@pytest.fixture
def here(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure tiny models, in this process."""
    sides: dict[tuple[str, str], tuple[Any, type]] = {
        ("sides", "ours"): (training.ours, training.TrainWork),
        ("eval_sides", "ours"): (scoring.ours, scoring.EvalWork),
        ("eval_sides", "generation"): (scoring.generation, scoring.GenerationWork),
    }

    def side(module: str, name: str, work: dict[str, Any]) -> dict[str, Any]:
        measure, kind = sides[module, name]
        return json.loads(json.dumps(measure(kind(**work))))

    monkeypatch.setattr(suite, "run_side", side)
    monkeypatch.setattr(suite, "packaged_models", lambda folder: (tiny("llama"), tiny("llama")))
    monkeypatch.setattr(suite, "MAX_LENGTH", 512)
    monkeypatch.setattr(suite, "TRAINING_ROWS", 24)
    monkeypatch.setattr(suite, "TASKS", dict.fromkeys(suite.TASKS, 2))
    monkeypatch.setattr(suite, "NEW_TOKENS", 4)
    monkeypatch.setattr(self_test, "CHECKS", {"quantized layers": CHECKS["quantized layers"]})
    monkeypatch.setattr("mlx_slim.bench.machine.speed", lambda: {"matmul_float32_gflops": 1.0})


def test_the_suite_measures_everything_and_names_no_place(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    assert run(["bench", "suite", "-o", str(file)]) == 0
    speeds = json.loads(file.read_text())["suite"]
    assert set(speeds["train"]) == {"full", "lora", "qlora", "dora"}
    assert set(speeds["eval"]) == {"category", "line", "demo_exact_match"}
    figures = [*speeds["train"].values(), *speeds["eval"].values(), speeds["generation"]]
    assert all(each["tokens_per_second"] > 0 for each in figures)
    assert all(each["peak_memory_bytes"] > 0 for each in figures)
    assert not [text for text in file.read_text().split('"') if text.startswith("/")]
    out = capsys.readouterr().out
    for line in ("train, dora", "eval, category", "generate", "all checks ok"):
        assert line in out
