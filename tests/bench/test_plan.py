"""``mlx-slim bench plan``: each case is measured once, over models that load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_slim.bench import plan as bench
from mlx_slim.models.load import load


def test_the_benchmark_runs_a_case_once(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SHAPES", {"given": ((128, 2),), "random": ()})
    monkeypatch.setattr(bench, "METHODS", ("full",))
    monkeypatch.setattr(bench, "random_model", lambda folder, _: folder)
    out, lines = tmp_path / "plan.jsonl", []
    record = bench.bench_plan(str(tiny("llama")), out, lines.append)
    assert record["n"] == len(lines) == 2
    assert record["worst_error"] >= record["median_error"] >= 0
    assert {c["case"] for c in record["cases"]} == {
        "given full 2x128",
        "given full 2x128 checkpointed",
    }
    assert all(c["measured_peak_bytes"] > 0 for c in record["cases"])
    monkeypatch.setattr(bench, "run_side", lambda *_: pytest.fail("measured again"))
    assert bench.bench_plan(str(tiny("llama")), out, lines.append)["cases"] == record["cases"]


def test_the_random_model_of_the_benchmark_loads(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = bench.random_model(tmp_path / "random", str(tiny("llama")))
    loaded = load(folder)
    assert loaded.config["model_type"] == "phi"
    assert loaded.config["vocab_size"] % 64 == 0
