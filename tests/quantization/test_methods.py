"""AWQ, GPTQ, DWQ and dynamic precision on tiny models, and what each refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_config

from mlx_slim.config.schema import QuantizeConfig
from mlx_slim.errors import ResourceError, SlimError
from mlx_slim.models.save import saved_config
from mlx_slim.quantization import methods
from mlx_slim.quantization.methods import check_method, quantize_with
from tests.support.stock import stock_load
from tests.support.tiny import TinyModels

TOKENS = mx.random.randint(0, 256, (4, 16), key=mx.random.key(0)).astype(mx.int32)
Source = Callable[..., tuple[Any, dict[str, Any]]]


@pytest.fixture
def source(tiny: TinyModels) -> Source:
    """Return a function: architecture -> (fresh dense model, config)."""

    def get(architecture: str = "llama") -> tuple[Any, dict[str, Any]]:
        folder = tiny(architecture)
        return stock_load(str(folder))[0], load_config(folder)

    return get


@pytest.mark.parametrize("method", ["awq", "gptq", "dwq", "dynamic"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "phi"])
def test_method_quantizes_every_matrix(
    source: Source, method: str, architecture: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if method == "awq" and architecture == "phi":
        pytest.skip("mlx-lm's AWQ does not know phi: see test_refusals")
    model, config = source(architecture)
    expected = model(TOKENS)
    result = quantize_with(model, config, QuantizeConfig(bits=4, group_size=32), method, TOKENS)
    assert result.method == method and result.bytes_after < result.bytes_before / 2
    assert all("norm" in skip.reason for skip in result.skipped)
    assert not tree_flatten(model.trainable_parameters())
    assert mx.abs(model(TOKENS) - expected).max() < 0.5 * mx.abs(expected).max()
    assert not any("input_feat" in name for name, _ in tree_flatten(model.parameters()))
    settings = saved_config(model, config)["quantization"]
    assert settings["mode"] == "affine" and settings == result.config["quantization"]
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_dynamic_lands_between_its_two_widths(source: Source) -> None:
    model, config = source()
    result = quantize_with(model, config, QuantizeConfig(bits=4, group_size=32), "dynamic", TOKENS)
    assert set(result.quantized) == {"4-bit affine, group 32", "5-bit affine, group 32"}
    assert 6.0 < result.bits_per_weight < 7.1  # float32 scales: two more bits a weight


def test_dwq_learns_scales_only(source: Source) -> None:
    model, config = source()
    plain, _ = source()
    methods.quantize_model(plain, config, QuantizeConfig(group_size=32))
    quantize_with(model, config, QuantizeConfig(group_size=32), "dwq", TOKENS)
    before, after = (dict(tree_flatten(m.parameters())) for m in (plain, model))
    changed = {name for name in after if not mx.array_equal(before[name], after[name])}
    assert changed and {name.rsplit(".", 1)[-1] for name in changed} <= {"scales", "biases"}


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "dwq"])
@pytest.mark.parametrize("embed", [None, 5])
def test_bits_of_embedding_and_head(source: Source, method: str, embed: int | None) -> None:
    model, config = source()
    quantize = QuantizeConfig(bits=3 if method != "gptq" else 2, group_size=32)
    if method == "rtn":
        formats = methods.embed_formats(model, quantize, embed)
        methods.quantize_model(model, config, quantize, None, formats)
    else:
        quantize_with(model, config, quantize, method, TOKENS, embed)
    least = {"awq": 4, "gptq": 6}.get(method, 3)
    assert model.model.embed_tokens.bits == (embed or least)
    # Where the head is a linear layer, mlx-lm's GPTQ treats it as one of the blocks.
    head = {"gptq": 2, "awq": 4 if embed is None else embed}.get(method, embed or 3)
    assert model.lm_head.bits == head
    assert model.layers[0].mlp.up_proj.bits == quantize.bits


def test_refusals(source: Source) -> None:
    quantize = QuantizeConfig
    for arguments, message in [
        (("awqq", quantize()), "unknown method 'awqq'"),
        (("rtn", quantize(), "mixed_9_9"), "unknown recipe 'mixed_9_9'"),
        (("awq", quantize(), "mixed_3_6"), "has no recipes"),
        (("gptq", quantize(mode="mxfp4", group_size=32)), "needs mode affine"),
        (("gptq", quantize(bits=3)), "2, 4 or 8 bits, not 3"),
        (("dwq", quantize(bits=8)), "fewer than 8 bits"),
        (("dynamic", quantize(bits=8)), "fewer than 8 bits"),
        (("blockwise", quantize(mode="mxfp4", group_size=32)), "needs mode affine"),
        (("awq", quantize(), None, "phi"), "does not support phi"),
        (("dynamic", quantize(), None, None, 6), "embed_bits=6 is for one number of bits"),
        (("rtn", quantize(), "mixed_3_6", None, 6), "embed_bits=6 is for one number of bits"),
        (("rtn", quantize(mode="mxfp4", group_size=32), None, None, 6), "embed_bits=6"),
    ]:
        with pytest.raises(SlimError, match=message) as caught:
            check_method(*arguments)
        assert caught.value.hint
    model, config = source()
    with pytest.raises(SlimError, match=r"input width of .*, 64, is not divisible"):
        quantize_with(model, config, quantize(group_size=128), "awq", TOKENS)
    with pytest.raises(SlimError, match="needs calibration text"):
        quantize_with(model, config, quantize(group_size=32), "gptq", mx.zeros((0, 16), mx.int32))
    with pytest.raises(SlimError, match="awq does not support phi"):
        quantize_with(*source("phi"), quantize(group_size=32), "awq", TOKENS)
    assert type(model.layers[0].self_attn.q_proj) is nn.Linear


def test_gptq_hessians_that_do_not_fit(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = source()
    monkeypatch.setattr(methods, "device_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="Hessian"):
        quantize_with(model, config, QuantizeConfig(group_size=32), "gptq", TOKENS)
