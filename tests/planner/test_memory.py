"""Predictions of a recipe: settings, lengths, time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_slim.planner.macs import CHIPS
from mlx_slim.planner.memory import predict
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from mlx_slim.planner.time import apple
from mlx_slim.planner.work import Speed, expected_work
from tests.support.planner import config_of, recipe


def test_every_knob_turns_the_right_way() -> None:
    config = SHIPPED_CONFIGS["TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"]

    def bytes_of(method: str = "lora", gpu: bool = True, **train: Any) -> int:
        plan = recipe(method, train=train)
        return predict(config, plan, gpu=gpu, budget=1, suggest=False).predicted_peak_bytes

    base = bytes_of()
    static = bytes_of(batch_tokens=512) - (bytes_of(batch_tokens=1024) - bytes_of(batch_tokens=512))
    assert bytes_of(batch_tokens=2048) - static == pytest.approx((base - static) / 2, rel=0.05)
    assert bytes_of(grad_checkpoint=True) < 0.5 * base
    assert bytes_of(max_length=256) == base  # its attention is fused on a Mac
    assert bytes_of(max_length=256, gpu=False) == bytes_of(gpu=False)  # or in pieces on a CPU
    graph = bytes_of(gpu=False, compile=True)
    assert bytes_of(max_length=256, gpu=False, compile=True) < graph
    assert bytes_of(gpu=False) < graph
    assert bytes_of("qlora") < base < bytes_of("dora") < bytes_of("full")
    assert (
        bytes_of("full", optimizer="adafactor")
        < bytes_of("full", optimizer="sgd")
        < bytes_of("full")
    )
    assert graph > base  # float32 where a GPU has bfloat16


def test_counted_lengths_replace_the_longest_allowed() -> None:
    plan = recipe(train={"batching": "grouped", "compile": True})
    short = predict(config_of(), plan, lengths=[64] * 1000, gpu=False, budget=1)
    few = predict(config_of(), plan, lengths=[64] * 4, gpu=False, budget=1)
    blind = predict(config_of(), plan, gpu=False, budget=1)
    assert few.predicted_peak_bytes < short.predicted_peak_bytes < blind.predicted_peak_bytes
    assert short.tokens == 3 * 64 * 1000


def test_time_needs_a_speed_and_rows(tmp_path: Path) -> None:
    config = config_of()
    speed = Speed(flops=1e11, exponential=3e-8, element=3e-10)
    plan = recipe(data={"path": "nobody/nothing"})
    assert predict(config, plan, gpu=False, budget=1, speed=speed).predicted_seconds is None
    steps = recipe(data={"path": "nobody/nothing"}, train={"steps": 10})
    seconds = predict(config, steps, gpu=False, budget=1, speed=speed).predicted_seconds
    again = recipe(data={"path": "nobody/nothing"}, train={"steps": 20, "grad_checkpoint": True})
    longer = predict(config, again, gpu=False, budget=1, speed=speed).predicted_seconds
    assert seconds is not None and longer is not None
    assert 2 * seconds < longer < 4 * seconds
    half = recipe(data={"path": "nobody/nothing"}, train={"steps": 10, "duty": 0.5})
    paused = predict(config, half, gpu=False, budget=1, speed=speed).predicted_seconds
    assert paused == pytest.approx(2 * seconds)
    machine = apple("m2", CHIPS["m2"])
    ranges = [predict(config, one, gpu=True, budget=1, machine=machine) for one in (steps, half)]
    whole, slowed = (one.time_range for one in ranges)
    assert whole is not None and slowed == whole.scaled(2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a b c d", "completion": "e f g h"}\n' * 50)
    work = expected_work(recipe(data={"path": str(rows), "validation": 4}), None)
    assert work is not None
    assert "46 rows" in work.basis
