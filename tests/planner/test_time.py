"""Times on a machine of which only the peak is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_slim.cli import plan as command
from mlx_slim.planner import time
from mlx_slim.planner.macs import CHIPS
from mlx_slim.planner.memory import predict
from mlx_slim.planner.run import plan
from mlx_slim.planner.shapes import training_shapes
from mlx_slim.planner.shipped_models import SHIPPED_CONFIGS
from mlx_slim.planner.time import Machine, Range, apple, estimate, this_machine
from mlx_slim.planner.work import FILLED, Operations, TrainingWork, operations
from tests.support.planner import config_of, recipe
from tests.support.runs import recipe as tiny_recipe
from tests.support.runs import write_rows

_QWEN = {
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
}
# The shape keys of each model's public config.json.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        **_QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        **_QWEN,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "Llama-3.2-3B": {
        **_QWEN,
        "model_type": "llama",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": {
        **_QWEN,
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}
ROW = 120  # tokens of an Alpaca row, about


def work_of(
    config: dict[str, Any], tokens: int, batch: int, method: str = "qlora", **train: Any
) -> Operations:
    """Training with the head at every position, as the published runs computed it."""
    train = {"batch_tokens": batch, "max_length": min(batch, 512), **train}
    plan = recipe(method, data={"mask_prompt": False}, train=train)
    shapes = training_shapes(config, plan, mx.bfloat16)
    return operations(shapes, plan, TrainingWork(tokens, tokens, ROW, ""))


@pytest.mark.parametrize(
    ("chip", "model", "batch", "published"),
    [
        ("m1", "Qwen2.5-0.5B", 4 * ROW, 240),
        ("m1", "Llama-3.2-3B", 4 * ROW, 82),
        ("m1", "Qwen2.5-7B", 4 * ROW, 33),
        ("m1-max", "Qwen3-8B", ROW, 33),
        ("m1-max", "Qwen3-8B", 2048, 99),
        ("m1-max", "Llama-3.2-3B", ROW, 77),
        ("m1-max", "Llama-3.2-3B", 2048, 226),
    ],
)
def test_published_speeds_are_within_the_range(
    chip: str, model: str, batch: int, published: float
) -> None:
    """LoRA over 4-bit bases, 8 and 32 GB; the M1's batch is not published: mlx-lm's default."""
    tokens = int(FILLED * 10**6)
    between = estimate(work_of(MODELS[model], tokens, batch), apple(chip, CHIPS[chip]))
    slowest, fastest = tokens / between.high, tokens / between.low
    assert slowest < published < fastest
    assert fastest < 5 * slowest  # a range that everything is in says nothing


def test_this_project_on_a_cpu_is_within_the_range() -> None:
    """The lab log's speeds and the matrix products measured on the same days."""
    config = SHIPPED_CONFIGS["HuggingFaceTB/SmolLM2-135M-Instruct"]
    plan = recipe("lora", train={"batch_tokens": 2048})
    shapes = training_shapes(config, plan, mx.float32)
    run = operations(shapes, plan, TrainingWork(10**5, 10**5, ROW, ""), size=4)
    for gflops, measured in ((157, 86.3), (181, 153.8), (181, 138.9)):
        peak = gflops * 1e9
        machine = Machine("", (peak, peak), time.CPU_UTILISATION, 0, None, "")
        between = estimate(run, machine)
        assert 10**5 / between.high < measured < 10**5 / between.low


def test_every_setting_changes_the_time_in_the_right_direction() -> None:
    machine = apple("m2", CHIPS["m2"])
    config = config_of()

    def high(method: str = "lora", tokens: int = 10**6, batch: int = 2048, **train: Any) -> float:
        between = estimate(work_of(config, tokens, batch, method, **train), machine)
        assert 0 < between.low < between.high
        return between.high

    assert high(tokens=2 * 10**6) == pytest.approx(2 * high(), rel=1e-6)
    assert high(grad_checkpoint=True) > high()
    assert high(batch=512) > high()  # smaller matrices
    assert high("full") > high()
    assert high("full", accumulate=8) < high("full")  # fewer updates
    seconds = [estimate(work_of(config, 10**6, 2048), apple(n, CHIPS[n])) for n in ("m1", "m4-max")]
    assert seconds[1].high < seconds[0].low


def test_peaks_are_those_of_published_tables() -> None:
    """The Hugging Face hub: TFLOP/s in float32 of the largest GPU of each chip."""
    published = {"m1": 2.6, "m1-pro": 5.2, "m1-max": 10.4, "m1-ultra": 21, "m2": 3.6}
    published |= {"m2-pro": 6.8, "m2-max": 13.49, "m2-ultra": 27.2, "m3-max": 14.2}
    published |= {"m3-ultra": 28.4}
    for name, tflops in published.items():
        assert CHIPS[name].tflops == pytest.approx(tflops, rel=0.025), name
    families = {name.partition("-")[0] for name in CHIPS}
    assert families == {"m1", "m2", "m3", "m4", "m5"}
    for name, chip in CHIPS.items():
        assert chip.cores[0] < chip.cores[1] and 60 < chip.bandwidth < 900, name


def test_the_machine_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = this_machine(mx.float32)
    assert measured.flops[0] == measured.flops[1] > 0
    assert "measured here" in measured.basis
    assert measured.utilisation == time.CPU_UTILISATION or time.on_gpu()
    monkeypatch.setattr(time, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M1 Max"})
    assert this_machine(mx.bfloat16) == apple("m1-max", CHIPS["m1-max"])
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M9 Max"})
    monkeypatch.setattr(time, "matmul_gflops", lambda dtype, size, rounds: 5000.0)
    unlisted = this_machine(mx.bfloat16)
    assert unlisted.flops == (5e12, 5e12)
    assert "Apple M9 Max is not in the table" in unlisted.basis


def test_plan_says_how_long_a_mac_takes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    small = tiny_recipe(tiny("llama"), rows, steps=None, epochs=2).recipe
    prediction, _ = plan(small, mac="m2-16gb")
    between = prediction.time_range
    assert between is not None and 0 < between.low < between.high
    assert prediction.predicted_seconds is None  # a range only
    assert prediction.as_record()["time_range"] == {"low": between.low, "high": between.high}
    assert "20% to 60% of the 2.9 to 3.6 TFLOP/s of m2" in prediction.time_basis
    assert (
        plan(tiny_recipe(tiny("llama"), Path("a/b"), steps=None).recipe, mac="m2-16gb")[
            0
        ].time_range
        is None
    )
    words = [f"model={tiny('llama')}", "revision=null", f"data.path={rows}", "data.format=auto"]
    text = CliRunner().invoke(command.command, ["smollm2-lora", *words, "--for", "m2-16gb"]).output
    assert (
        "between " in text and "an estimate from 20% to 60% of the 2.9 to 3.6 TFLOP/s of m2" in text
    )
    record = json.loads(
        CliRunner()
        .invoke(command.command, ["smollm2-lora", *words, "--for", "m2-16gb", "--json"])
        .stdout
    )
    assert 0 < record["time_range"]["low"] < record["time_range"]["high"]


def test_two_students_take_the_time_of_both() -> None:
    machine = apple("m2", CHIPS["m2"])
    work = TrainingWork(10**6, 10**6, ROW, "")
    one = predict(config_of(), recipe(), gpu=True, budget=1, machine=machine, work=work)
    assert one.time_range is not None
    assert one.time_range + Range(1, 2) == Range(one.time_range.low + 1, one.time_range.high + 2)
