"""Quantizing a model in memory: sizes, errors of the formats, what is skipped and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import load_config

from mlx_slim.bench.small_configs import small_config
from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import SlimError
from mlx_slim.models.build import build
from mlx_slim.models.quantized import LayerFormat, is_quantized
from mlx_slim.quantization.apply import quantize_model
from mlx_slim.quantization.policy import RECIPES, make_policy
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels

# Relative Frobenius error on Gaussian weights: bfloat16, group 64 for the affine formats.
ERRORS = [
    ("affine", 2, 64, 0.396),
    ("affine", 3, 64, 0.190),
    ("affine", 4, 64, 0.091),
    ("affine", 5, 64, 0.0445),
    ("affine", 6, 64, 0.022),
    ("affine", 8, 64, 0.0083),
    ("mxfp4", 4, 32, 0.1185),
    ("mxfp8", 8, 32, 0.0266),
    ("nvfp4", 4, 16, 0.103),
]
Source = Callable[..., tuple[Any, dict[str, Any]]]


@pytest.fixture
def source(tiny: TinyModels) -> Source:
    """Return a function: architecture -> (fresh dense model, config)."""

    def get(architecture: str = "llama") -> tuple[Any, dict[str, Any]]:
        folder = tiny(architecture)
        model, _ = stock_load(str(folder))
        return model, load_config(folder)

    return get


@pytest.mark.parametrize(("mode", "bits", "group", "expected"), ERRORS)
def test_relative_error_and_bits_per_weight(
    mode: str, bits: int, group: int, expected: float
) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1024, 512, bias=False)

    mx.random.seed(1)
    model = Model()
    weight = (0.02 * mx.random.normal((512, 1024))).astype(mx.bfloat16)
    model.linear.weight = weight
    result = quantize_model(
        model, {}, QuantizeConfig.model_validate({"mode": mode, "bits": bits, "group_size": group})
    )
    layer: Any = model.linear
    dense = mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=group,
        bits=bits,
        mode=mode,
        dtype=mx.float32,
    )
    source = weight.astype(mx.float32)
    error = (mx.linalg.norm(dense - source) / mx.linalg.norm(source)).item()
    assert error == pytest.approx(expected, rel=0.05)
    overhead = 32 / group if mode == "affine" else 8 / group
    assert result.bits_per_weight == pytest.approx(bits + overhead)
    assert result.bytes_before == 2 * weight.size
    assert result.bytes_after == pytest.approx((bits + overhead) / 8 * weight.size)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "phi", "qwen2"])
def test_every_layer_is_quantized_or_explained(source: Source, architecture: str) -> None:
    model, config = source(architecture)
    names = {path for path, _ in model.named_modules()}
    result = quantize_model(model, config, QuantizeConfig(bits=4, group_size=32))
    assert is_quantized(model) and "quantization" not in config
    assert result.config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert result.skipped and all("norm" in skip.reason for skip in result.skipped)
    assert {skip.path for skip in result.skipped} < names
    blocks = 4 + (2 if architecture == "phi" else 3)
    heads = 1 if architecture in ("llama-tied", "qwen2") else 2
    assert result.quantized == {"4-bit affine, group 32": 3 * blocks + heads}
    assert mx.isfinite(model(mx.array([[1, 2, 3, 4, 5]]))).all()


def test_a_width_that_the_group_does_not_divide_is_listed(source: Source) -> None:
    model, config = source()
    result = quantize_model(model, config, QuantizeConfig(bits=4, group_size=128))
    assert result.quantized == {"4-bit affine, group 128": 3}  # down_proj: 128 inputs
    reasons = {skip.path: skip.reason for skip in result.skipped}
    assert "input width 64 is not divisible by group_size=128" in reasons["lm_head"]
    assert len(reasons) == 3 * (6 + 2) + 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_mixed_recipes(source: Source, recipe: str) -> None:
    low, high = (int(part) for part in recipe.split("_")[1:])
    model, config = source()
    result = quantize_model(model, config, QuantizeConfig(group_size=32), recipe)
    assert set(result.quantized) == {f"{b}-bit affine, group 32" for b in (low, high)}
    per_layer = result.config["quantization"]
    assert per_layer.get("lm_head", per_layer)["bits"] == high
    assert per_layer.get("model.layers.1.self_attn.q_proj", per_layer)["bits"] == low


def test_refusals(source: Source) -> None:
    model, config = source("phi")
    with pytest.raises(SlimError, match="does not fit phi"):
        make_policy(model, QuantizeConfig(), "mixed_3_6")
    with pytest.raises(SlimError, match="did you mean 'mixed_3_6'"):
        make_policy(model, QuantizeConfig(), "mixed_3_7")
    with pytest.raises(SlimError, match="needs mode affine"):
        make_policy(model, QuantizeConfig(mode="mxfp4", group_size=32), "mixed_3_6")
    quantize_model(model, config, QuantizeConfig(group_size=32))
    with pytest.raises(SlimError, match="quantized already"):
        quantize_model(model, config, QuantizeConfig(group_size=32))


def test_a_layer_that_takes_no_mode_is_left_out() -> None:
    policy = make_policy(build(small_config("afm7")), QuantizeConfig(group_size=32))
    reasons = {skipped.path: skipped.reason for skipped in policy.skipped}
    assert reasons["model.layers.0.self_attn.qkv_proj"] == "FusedLinear has no quantized form"
    assert "model.layers.0.mlp.up_proj" in policy.chosen


def test_a_policys_group_that_does_not_divide_a_width_is_a_reason() -> None:
    """RWKV-7 asks for 8 bits of some layers; MLX's default of 64 does not divide their width."""
    policy = make_policy(build(small_config("rwkv7")), QuantizeConfig(group_size=32))
    reasons = {skipped.reason for skipped in policy.skipped}
    assert "input width 32 is not divisible by group_size=64" in reasons
    assert all(each.bits == 4 or each.group_size == 64 for each in policy.chosen.values())


def test_no_layer_fits() -> None:
    model = nn.Sequential(nn.Linear(24, 8))
    with pytest.raises(SlimError, match="input widths are 24"):
        quantize_model(model, {}, QuantizeConfig(group_size=32))


def test_a_models_own_policy_may_name_bits_alone(source: Source) -> None:
    """The rest is MLX's default, whatever the other layers have, in the config too."""
    model, config = source()
    name = "lm_head"
    type(model).quant_predicate = property(  # type: ignore[attr-defined]
        lambda _: lambda path, _module: {"bits": 8} if path == name else True
    )
    try:
        assert make_policy(model, QuantizeConfig(bits=4, group_size=32)).chosen[name] == (
            LayerFormat(group_size=64, bits=8, mode="affine")
        )
        report = quantize_model(model, config, QuantizeConfig(bits=4, group_size=32))
    finally:
        del type(model).quant_predicate
    settings = report.config["quantization"]
    assert settings[name] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert (settings["group_size"], settings["bits"]) == (32, 4)
    assert (model.lm_head.group_size, model.lm_head.bits) == (64, 8)
