"""Plans: measured by a probe, for other machines, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_slim.cli import plan as command
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.profile import probe
from mlx_slim.planner.run import plan
from tests.support.runs import recipe, write_rows


def test_a_probe_measures_memory_and_time(tiny: Callable[..., Path], tmp_path: Path) -> None:
    small = recipe(tiny("llama"), write_rows(tmp_path / "rows.jsonl"), "qlora", accumulate=2).recipe
    guess, _ = plan(small, budget="1GB")
    prediction, _ = plan(small, budget="1GB", probe=probe)
    assert guess.measured is None and prediction.measured is not None
    assert prediction.predicted_peak_bytes == prediction.measured.peak_bytes > 0
    assert prediction.measured.steps == 3
    assert prediction.measured.seconds_per_batch > 0
    assert prediction.predicted_seconds is not None and prediction.predicted_seconds > 0
    assert "counted" in prediction.tokens_basis or "full steps" in prediction.tokens_basis
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]


def test_a_probe_leaves_the_base_alone_and_counts_its_rows(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    small = recipe(tiny("phi"), rows, "full", steps=None, epochs=2).recipe
    before = {p.name: p.read_bytes() for p in tiny("phi").iterdir()}
    prediction, _ = plan(small, probe=partial(probe, steps=1))
    assert {p.name: p.read_bytes() for p in tiny("phi").iterdir()} == before
    assert prediction.tokens_basis.startswith("2 x 8 rows, counted")
    assert prediction.measured and prediction.measured.batch_tokens <= 256


def test_for_a_mac(tiny: Callable[..., Path], tmp_path: Path) -> None:
    small = recipe(tiny("llama"), Path("someone/absent")).recipe
    prediction, note = plan(small, mac="m2-16gb")
    assert prediction.dtype == "bfloat16"
    assert prediction.budget_bytes == int(int(16 * 2**30 * 2 / 3) * 0.9)
    assert prediction.predicted_seconds is None
    assert prediction.download_bytes == 0  # the model is a local folder
    assert note.endswith("for m2-16gb")
    assert plan(small, mac="m2-16gb", budget="1MB")[0].budget_bytes == 10**6
    with pytest.raises(SlimError, match="a probe measures this machine"):
        plan(small, mac="m2-16gb", probe=probe)


def test_rules_of_thumb(tiny: Callable[..., Path], tmp_path: Path) -> None:
    prediction, _ = plan(recipe(tiny("llama"), Path("someone/absent")).recipe, mac="m2-16gb")
    assert prediction.rules_of_thumb == {
        "inference_formula": int(prediction.parameters * 4 / (32 / 16) * 1.2),
        "twelve_times": 12 * 2 * prediction.parameters,
    }
    quantized = recipe(tiny("llama"), Path("someone/absent"), "qlora").recipe
    estimate = plan(quantized, mac="m2-16gb")[0].rules_of_thumb["inference_formula"]
    assert estimate == int(prediction.parameters * 4 / (32 / 4) * 1.2)


def test_the_command(tiny: Callable[..., Path], tmp_path: Path) -> None:
    run = CliRunner().invoke
    words = ["smollm2-lora", f"model={tiny('llama')}", "revision=null", "train.steps=2"]
    text = run(command.command, [*words, "--for", "m4-max-64gb"]).output
    assert "fits in 46.4 GB" in text and "12 x the model" in text
    assert "an estimate from 20% to 60%" in text and "download" not in text
    rows = write_rows(tmp_path / "rows.jsonl")
    words += [f"data.path={rows}", "data.format=auto", "train.max_length=512"]
    words += ["train.batch_tokens=512", "train.accumulate=1"]
    text = run(command.command, [*words, "--probe", "--budget", "1GB"]).output
    assert "(measured)" in text and "steps of the largest batch" in text
    record = json.loads(run(command.command, [*words, "--probe", "--json"]).stdout)
    assert record["measured"]["batch_tokens"] <= 512
    table = run(command.command, ["--macs"]).output
    assert "| m2-16gb | 16 GB | 100 GB/s | 3.6 TFLOP/s | 11.5 GB |" in table
