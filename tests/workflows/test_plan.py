"""Planning: measured where asked, for other machines, on the command line; and the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_slim.bench import plan as bench
from mlx_slim.cli import plan as command
from mlx_slim.config.load import load_recipe
from mlx_slim.errors import SlimError
from mlx_slim.planner.memory import Prediction
from mlx_slim.workflows.plan import plan
from tests.support.runs import recipe, write_rows


def test_a_probe_measures_memory_and_time(tiny, tmp_path: Path):
    small = recipe(tiny("llama"), write_rows(tmp_path / "rows.jsonl"), "qlora", accumulate=2).recipe
    guess, _ = plan(small, budget="1GB")
    found, _ = plan(small, budget="1GB", measure=True)
    assert guess.measured is None and found.measured is not None
    assert found.predicted_peak_bytes == found.measured["peak_bytes"] > 0
    assert found.measured["steps"] == 3
    assert found.measured["seconds_per_batch"] > 0
    assert found.predicted_seconds is not None and found.predicted_seconds > 0
    assert "counted" in found.tokens_basis or "full steps" in found.tokens_basis
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]


def test_a_probe_leaves_the_base_alone_and_counts_its_rows(tiny, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    small = recipe(tiny("phi"), rows, "full", steps=None, epochs=2).recipe
    before = {p.name: p.read_bytes() for p in tiny("phi").iterdir()}
    found, _ = plan(small, measure=True, steps=1)
    assert {p.name: p.read_bytes() for p in tiny("phi").iterdir()} == before
    assert found.tokens_basis.startswith("2 x 8 rows, counted")
    assert found.measured and found.measured["batch_tokens"] <= 256


def test_for_a_mac(tiny, tmp_path: Path):
    small = recipe(tiny("llama"), Path("someone/absent")).recipe
    found, note = plan(small, mac="m2-16gb")
    assert found.dtype == "bfloat16"
    assert found.budget_bytes == int(int(16 * 2**30 * 2 / 3) * 0.9)
    assert found.predicted_seconds is None
    assert note.endswith("for m2-16gb")
    assert plan(small, mac="m2-16gb", budget="1MB")[0].budget_bytes == 10**6
    with pytest.raises(SlimError, match="a probe runs here"):
        plan(small, mac="m2-16gb", measure=True)


def test_rules_of_thumb_stand_beside_the_prediction(tiny, tmp_path: Path):
    found, _ = plan(recipe(tiny("llama"), Path("someone/absent")).recipe, mac="m2-16gb")
    assert found.rules_of_thumb == {
        "inference_formula": int(found.parameters * 4 / (32 / 16) * 1.2),
        "twelve_times": 12 * 2 * found.parameters,
    }
    quantized = recipe(tiny("llama"), Path("someone/absent"), "qlora").recipe
    rule = plan(quantized, mac="m2-16gb")[0].rules_of_thumb["inference_formula"]
    assert rule == int(found.parameters * 4 / (32 / 4) * 1.2)


def test_the_command(tiny, tmp_path: Path):
    run = CliRunner().invoke
    words = ["smollm2-lora", f"model={tiny('llama')}", "revision=null", "train.steps=2"]
    text = run(command.command, [*words, "--for", "m4-max-64gb"]).output
    assert "fits in 46.4 GB" in text and "12 x the model" in text
    rows = write_rows(tmp_path / "rows.jsonl")
    words += [f"data.path={rows}", "data.format=auto", "train.max_length=512"]
    words += ["train.batch_tokens=512", "train.accumulate=1"]
    text = run(command.command, [*words, "--probe", "--budget", "1GB"]).output
    assert "(measured)" in text and "steps of the largest batch" in text
    record = json.loads(run(command.command, [*words, "--probe", "--json"]).output)
    assert record["measured"]["batch_tokens"] <= 512
    table = run(command.command, ["--macs"]).output
    assert "| m2-16gb | 16 GB | 100 GB/s | 11.5 GB |" in table


def test_the_benchmark_runs_a_case_once(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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


def test_the_random_model_of_the_benchmark_loads(tiny, tmp_path: Path):
    from mlx_slim.models.load import load

    folder = bench.random_model(tmp_path / "random", str(tiny("llama")))
    loaded = load(folder)
    assert loaded.config["model_type"] == "phi"
    assert loaded.config["vocab_size"] % 64 == 0


def test_teachers_cost_the_student_a_few_columns_and_two_students_add_up(tiny) -> None:
    def found(*overrides: str) -> Prediction:
        words = [f"model={tiny('llama')}", "revision=null", *overrides]
        return plan(load_recipe("smollm2-lora", words).recipe, budget="4GB")[0]

    alone = found()
    other = found(f"model={tiny('llama-tied')}")
    taught = found(f"distill.teachers=[{{model: {tiny('mistral')}}}]", "distill.temperature=2")
    assert alone.predicted_peak_bytes < taught.predicted_peak_bytes
    assert taught.breakdown["weights"] == alone.breakdown["weights"]
    second = f"{{method: mutual, teachers: [{{model: {tiny('llama-tied')}}}]}}"
    both = found(f"distill={second}")
    for part in ("weights", "gradients", "optimizer"):
        assert both.breakdown[part] == alone.breakdown[part] + other.breakdown[part]
    assert both.predicted_peak_bytes >= alone.predicted_peak_bytes + other.predicted_peak_bytes
    assert both.predicted_peak_bytes == sum(both.breakdown.values())
    twin = found("distill={method: mutual}")  # without a name the second student is the model too
    assert twin.breakdown["weights"] == 2 * alone.breakdown["weights"]
