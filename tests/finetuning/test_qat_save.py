"""A quantization-aware run from recipe to a quantized folder that stock mlx-lm reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim import events
from mlx_slim.adapters.lora import LoRALinear
from mlx_slim.adapters.merge import merge
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.finetuning.run import finetune
from mlx_slim.finetuning.strategy import load_tuned
from mlx_slim.finetuning.validate import validate
from mlx_slim.models.load import load
from mlx_slim.planner.memory import predict
from mlx_slim.quantization.apply import quantize_model
from tests.support.adapters import write_quantized
from tests.support.runs import CtrlC, Recorder, losses, recipe, write_rows
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels, tiny_model


def qat_recipe(model: Path, data: Path, method: str, **changes: Any) -> Resolved:
    """Return the small recipe with three-bit weights in training."""
    values = recipe(model, data, method).recipe.model_dump(mode="json", exclude_none=True)
    values["quantize"] = {"bits": 3, "group_size": 32, "qat": True}
    values["train"] |= changes
    return from_values(values, "qat", "test")


@pytest.mark.parametrize(
    ("architecture", "method"), [("llama-tied", "full"), ("llama", "lora"), ("qwen2", "dora")]
)
def test_the_saved_model_is_the_one_that_was_validated(
    tiny: TinyModels, tmp_path: Path, architecture: str, method: str
) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    small = qat_recipe(tiny(architecture), data, method)
    result = finetune(small, out, observer=Recorder())
    assert losses(out)[10] < losses(out)[1]
    assert (out / "adapters").exists() == (method != "full")
    model, _ = stock_load(str(out / "model"))
    layer = model.layers[0].mlp.up_proj
    assert (layer.bits, layer.group_size) == (3, 32)
    again = validate(small.recipe.model_copy(update={"model": str(out / "model")}))
    assert again.loss == pytest.approx(result.done.best_validation, rel=1e-5)
    assert json.loads((out / "run.json").read_text())["result"]["artifact"] == "model"


def test_16_bit_sources_are_stored_as_they_came(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "base", dtype=mx.bfloat16)
    out = tmp_path / "run"
    data = write_rows(tmp_path / "rows.jsonl")
    result = finetune(qat_recipe(source, data, "full"), out, observer=Recorder())
    weights = load_tensors(out / "model" / "model.safetensors")
    assert weights["model.layers.0.mlp.up_proj.scales"].dtype == mx.bfloat16
    again = validate(qat_recipe(out / "model", data, "full").recipe)
    assert again.loss == pytest.approx(result.done.best_validation, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "dtype", "stored"),
    [
        ("full", "bfloat16", mx.float32),
        ("lora", "bfloat16", mx.float32),
        ("dora", "bfloat16", mx.float32),
        ("lora", "bfloat16", mx.float16),
        ("full", "bfloat16", mx.bfloat16),
        ("dora", "float16", mx.float32),
        ("lora", "float16", mx.bfloat16),
        ("full", "float32", mx.float16),
    ],
)
def test_what_is_saved_is_what_was_trained_in_any_dtype(
    tmp_path: Path, method: str, dtype: str, stored: mx.Dtype
) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    base = tiny_model(tmp_path / "base", dtype=stored)
    finetune(qat_recipe(base, data, method, dtype=dtype, steps=4), out, observer=Recorder())
    assert (out / "run.json").exists()
    weights = load_tensors(out / "model" / "model.safetensors")
    assert weights["model.norm.weight"].dtype == stored


def _other_bits(model: Any, config: dict[str, Any], quantize: QuantizeConfig, *rest: Any):
    return quantize_model(model, config, quantize.model_copy(update={"bits": 4}), *rest)


def _one_layer_off(model: Any, config: dict[str, Any], quantize: QuantizeConfig, *rest: Any):
    report = quantize_model(model, config, quantize, *rest)
    layer = model.layers[1].mlp.down_proj
    layer.scales, layer.biases = 0.8 * layer.scales, 0.8 * layer.biases
    return report


@pytest.mark.parametrize("wrong", ["adapters lost", _other_bits, _one_layer_off])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_saved_model_that_is_another_one_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, wrong: Callable[..., Any]
) -> None:
    if callable(wrong):
        monkeypatch.setattr("mlx_slim.finetuning.qat_save.quantize_model", wrong)
    else:
        monkeypatch.setattr(
            "mlx_slim.finetuning.qat_save.merge",
            lambda model: (
                monkeypatch.setattr(LoRALinear, "merged_weight", lambda layer: layer.linear.weight),
                merge(model),
            ),
        )
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    with pytest.raises(SlimError, match="the quantized model differs"):
        finetune(
            qat_recipe(tiny_model(tmp_path / "base"), data, "lora", dtype=dtype),
            out,
            observer=Recorder(),
        )
    assert not (out / "run.json").exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_resumed_equals_uninterrupted_and_checkpoints_are_floats(
    tiny: TinyModels, tmp_path: Path, method: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    small = qat_recipe(tiny("llama"), data, method)
    finetune(small, tmp_path / "straight", observer=Recorder())
    out = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        finetune(small, out, observer=CtrlC())
    saved = load_tensors(out / "checkpoints" / "step-3" / "weights.safetensors")
    if method == "full":
        weight = saved["model.layers.0.mlp.up_proj.weight"]
        assert (
            np.unique(np.array(weight[0, :32])).size > 8
        )  # three bits have eight values in a group
    finetune(small, out, observer=Recorder(), resume=True)
    assert losses(out) == losses(tmp_path / "straight")
    files = [
        load_tensors(run / "model" / "model.safetensors") for run in (out, tmp_path / "straight")
    ]
    assert all(mx.array_equal(files[0][name], files[1][name]) for name in files[1])


def test_it_beats_quantizing_afterwards(tiny: TinyModels, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 48)
    steps = {"steps": 60, "learning_rate": 3e-3, "validate_every": 60, "save_every": 60}
    best_losses = {}
    for name, is_qat in (("qat", True), ("afterwards", False)):
        values = qat_recipe(tiny("llama"), data, "full", **steps).recipe.model_dump(mode="json")
        values["quantize"] |= {"bits": 2, "group_size": 32, "qat": is_qat}
        values = {key: value for key, value in values.items() if value is not None}
        out = tmp_path / name
        done = finetune(from_values(values, name, "test"), out, observer=Recorder()).done
        best_losses[name] = done.best_validation
    loaded = load(tmp_path / "afterwards" / "model")
    quantize_model(loaded.model, loaded.config, QuantizeConfig(bits=2, group_size=32))
    from mlx_slim.models.save import save_model

    save_model(tmp_path / "rounded", loaded.model, loaded.tokenizer, loaded.config)
    afterwards = validate(qat_recipe(tmp_path / "rounded", data, "full").recipe).loss
    assert best_losses["qat"] < afterwards
    assert best_losses["afterwards"] < afterwards


def test_what_does_not_go_together_is_one_error(tiny: TinyModels, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(SlimError, match="method=qlora has a quantized base"):
        qat_recipe(tiny("llama"), data, "qlora")
    base = write_quantized(tmp_path / "q", tiny("llama"))
    for method in ("full", "lora"):
        with pytest.raises(SlimError, match="is quantized, and"):
            finetune(
                qat_recipe(base, data, method), tmp_path / "run", observer=events.Broadcast([])
            )
        assert not (tmp_path / "run").exists()


def test_the_planner_counts_the_rounded_copy(tiny: TinyModels, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    small = qat_recipe(tiny("llama"), data, "lora").recipe
    loaded = load(tiny("llama"))
    plain = small.model_copy(update={"quantize": QuantizeConfig()})
    peaks = [predict(loaded.config, r, gpu=False).breakdown["weights"] for r in (small, plain)]
    layers = [m for _, m in loaded.model.named_modules() if hasattr(m, "to_quantized")]
    assert peaks[0] - peaks[1] == sum(layer.weight.nbytes for layer in layers)
    shown = predict(loaded.config, small, gpu=False, budget=1)
    assert not any("qlora" in each.set for each in shown.suggestions)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_reloaded_model_that_is_another_one_is_caught_in_bfloat16(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def off(*arguments: Any):
        model: Any = load_tuned(*arguments)
        layer = model.layers[1].mlp.down_proj
        layer = layer.linear if "linear" in layer else layer
        layer.weight = 0.8 * layer.weight
        return model

    monkeypatch.setattr("mlx_slim.finetuning.strategy.load_tuned", off)
    data = write_rows(tmp_path / "rows.jsonl")
    plain = recipe(tiny("llama"), data, method, dtype="bfloat16", steps=2)
    with pytest.raises(SlimError, match="reloaded logits differ"):
        finetune(plain, tmp_path / "run", observer=Recorder())
    assert not (tmp_path / "run" / "run.json").exists()
