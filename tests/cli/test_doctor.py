"""``doctor``: the facts, under stable names, and a way out of each problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.cli import doctor
from mlx_slim.cli.main import run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Skip the measuring, and the network."""
    rates = {"matmul_float32_gflops": 150.0, "matmul_bfloat16_gflops": 3.0, "exp_ns": 20.0}
    monkeypatch.setattr(doctor, "speed", lambda: rates)
    monkeypatch.setattr(doctor, "hub", lambda: {"endpoint": "hub", "state": "reachable"})
    return rates


def test_json_has_the_facts(
    quick: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca" / "train.jsonl").write_text("{}\n")
    monkeypatch.setenv("MLX_SLIM_DATA", str(tmp_path))
    assert run(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["memory"]["total_bytes"] >= facts["memory"]["budget_bytes"] > 0
    assert facts["device"]["type"] in ("cpu", "gpu")
    assert {"mlx", "mlx-lm"} <= set(facts["versions"])
    assert facts["data"] == {"folder": str(tmp_path), "found": True, "datasets": ["alpaca"]}
    assert facts["schema_version"] == 1


def test_what_is_slow_or_absent_comes_with_a_way_out(
    quick: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick["matmul_float32_gflops"] = 3.0
    monkeypatch.setattr(doctor, "hub", lambda: {"endpoint": "hub", "state": "unreachable"})
    monkeypatch.setattr(doctor, "compiler", lambda: {"needed": True, "path": None})
    monkeypatch.setenv("MLX_SLIM_DATA", "/no/such/folder")
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("3 GFLOP/s, which is slow", "hub does not answer", "no g++", "/no/such/folder"):
        assert part in text
    assert text.count("fix: ") == 4


def test_offline_by_choice_is_not_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert doctor.hub()["state"] == "offline by choice"


def test_an_unreachable_hub_is_reported_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    answer = doctor.hub()
    assert answer["state"] == "unreachable"
    assert answer["why"]


def test_the_rates_are_measured() -> None:
    rates = doctor.speed()
    assert all(value > 0 for value in rates.values())
