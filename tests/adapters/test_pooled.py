"""QA-LoRA: the pooled adapter, its gradients, and what its folder is to others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from pydantic import ValidationError

from mlx_slim.adapters.inject import adapters_of, inject
from mlx_slim.adapters.lora import LoRALinear
from mlx_slim.adapters.pooled import PooledLoRALinear, folded_biases, grouped
from mlx_slim.adapters.store import load_adapter, save_adapter
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.schema import AdapterConfig, Recipe
from mlx_slim.errors import SlimError
from mlx_slim.export.fuse import FuseOptions, fuse
from mlx_slim.finetuning.build import prepare_model
from mlx_slim.finetuning.run import finetune
from mlx_slim.models.load import load
from mlx_slim.models.quantized import use_fast_matmul
from tests.adapters.support import IDS, linear, shake
from tests.support.adapters import write_quantized
from tests.support.gpu import gpu_path
from tests.support.runs import Recorder, recipe, write_rows
from tests.support.stock import stock_load

X = mx.random.normal((2, 5, 128), key=mx.random.key(3))
POOLED = AdapterConfig(pooled=True, rank=4, alpha=8)


def _base(stored: mx.Dtype, bits: int = 4) -> Any:
    base = linear(128, 24, bias=True, bits=bits)
    for name in ("scales", "biases"):
        base[name] = base[name].astype(stored).astype(mx.float32)
    use_fast_matmul(base)
    return base


def _pooled(stored: mx.Dtype = mx.float16, dropout: float = 0.0) -> PooledLoRALinear:
    mx.random.seed(1)
    return PooledLoRALinear(_base(stored), 4, 0.7, dropout, stored)


@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16])
def test_a_fresh_one_is_its_base_and_a_trained_one_its_folded_layer(stored: mx.Dtype) -> None:
    adapter = _pooled(stored)
    assert mx.array_equal(adapter(X), adapter.linear(X)).item()
    assert adapter.lora_a.shape == (2, 4) and adapter.lora_b.shape == (4, 24)
    bound = 128**-0.5
    assert bound / 4 < mx.abs(adapter.lora_a).max().item() <= bound  # type: ignore[operator]
    shake(adapter)
    biases = folded_biases(adapter)
    assert biases is not None
    assert mx.array_equal(biases.astype(stored).astype(mx.float32), biases).item()
    target = adapter.linear["biases"] + 0.7 * (adapter.lora_a @ adapter.lora_b).T
    assert mx.array_equal(biases, target.astype(stored).astype(mx.float32)).item()
    folded = _base(stored)
    folded["biases"] = biases
    assert mx.allclose(adapter(X), folded(X), atol=2e-5).item()
    dense = mx.dequantize(folded["weight"], folded["scales"], biases, 64, 4)
    assert mx.allclose(adapter.merged_weight(), dense, atol=1e-6).item()


def test_gradients_are_those_of_the_low_rank_update_at_the_rounded_biases() -> None:
    adapter = _pooled()
    shake(adapter)
    weigh = mx.random.normal((2, 5, 24), key=mx.random.key(4))

    def ours(a: mx.array, b: mx.array, x: mx.array) -> mx.array:
        adapter.lora_a, adapter.lora_b = a, b
        return (adapter(x) * weigh).sum()

    def plain(a: mx.array, b: mx.array, x: mx.array) -> mx.array:
        biases = adapter.linear["biases"]
        exact = biases + (0.7 * (a @ b)).T
        rounded = exact + mx.stop_gradient(exact.astype(mx.float16).astype(mx.float32) - exact)
        dense = mx.dequantize(adapter.linear["weight"], adapter.linear["scales"], biases, 64, 4)
        weight = dense + mx.repeat(rounded - biases, 64, axis=1)
        return ((x @ weight.T + adapter.linear["bias"]) * weigh).sum()

    arguments = adapter.lora_a, adapter.lora_b, X
    for got, expected in zip(
        mx.grad(ours, argnums=(0, 1, 2))(*arguments),
        mx.grad(plain, argnums=(0, 1, 2))(*arguments),
        strict=True,
    ):
        assert mx.abs(got - expected).max() <= 1e-5 * mx.abs(expected).max()


def test_dropout_drops_pooled_inputs_and_makes_up_for_them() -> None:
    adapter = _pooled(dropout=0.5)
    shake(adapter)
    whole = adapter.eval()(X) - adapter.linear(X)
    adapter.train()
    mx.random.seed(0)
    mean = sum((adapter(X) - adapter.linear(X) for _ in range(300)), mx.zeros(whole.shape)) / 300
    assert mx.abs(mean - whole).max() < 0.25 * mx.abs(whole).max()
    adapter.lora_b = mx.zeros(adapter.lora_b.shape)
    assert mx.array_equal(adapter(X), adapter.linear(X)).item()


def test_compiled_on_a_gpu_in_half_precision() -> None:
    with gpu_path():
        base = linear(128, 24, bias=True, bits=4)
        base.set_dtype(mx.float16)
        adapter = PooledLoRALinear(base, 4, 0.7, 0.0, mx.float16)
        shake(adapter)
        x = X.astype(mx.float16)
        assert adapter(x).dtype == mx.float16

        def loss(a: mx.array) -> mx.array:
            adapter.lora_a = a
            return adapter(x).astype(mx.float32).sum()

        start = adapter.lora_a
        plain, compiled = mx.grad(loss)(start), mx.compile(mx.grad(loss))(start)
        assert plain.dtype == mx.float32 and mx.abs(plain).max() > 0
        assert mx.allclose(plain, compiled, rtol=1e-2, atol=1e-2).item()


def test_constant_inside_groups_or_not() -> None:
    a_NR = mx.random.normal((2, 3), key=mx.random.key(0))
    assert mx.array_equal(grouped(mx.repeat(a_NR, 64, axis=0), 64), a_NR).item()  # type: ignore[arg-type]
    assert grouped(mx.random.normal((128, 3)), 64) is None
    ordinary = LoRALinear(_base(mx.float16), 3, 1.0)
    assert folded_biases(ordinary) is None
    ordinary.lora_a = mx.repeat(a_NR, 64, axis=0)
    shake(ordinary, 0.0)
    assert folded_biases(ordinary) is not None
    assert folded_biases(LoRALinear(nn.Linear(128, 24), 3, 1.0)) is None


def _trained(base: Path, folder: Path, size: float = 0.05) -> Any:
    model: Any = load(base, dtype=mx.float32).model
    injected = inject(model, POOLED, dora=False, stored=mx.float16)
    shake(model, size)
    save_adapter(folder, model, POOLED, injected, dora=False, base=str(base))
    return model


def test_its_folder_is_an_ordinary_adapter(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "q", tiny("llama"), dtype=mx.float16)
    model = _trained(base, tmp_path / "a")
    again: Any = load(base, dtype=mx.float32).model
    injected = load_adapter(again, tmp_path / "a")
    assert all(isinstance(each, PooledLoRALinear) for _, each in adapters_of(again))
    assert injected.parameters == sum(
        each.lora_a.size + each.lora_b.size for _, each in adapters_of(model)
    )
    assert mx.array_equal(model(IDS), again(IDS)).item()
    stock, _ = stock_load(str(base), adapter_path=str(tmp_path / "a"))
    stock.set_dtype(mx.float32)
    gap = mx.abs(stock(IDS) - model(IDS)).max()
    effect = mx.abs(model(IDS) - load(base, dtype=mx.float32).model(IDS)).max()  # type: ignore[operator]
    assert gap < 0.02 * effect  # the biases are not rounded there
    other: Any = load(tiny("llama"), dtype=mx.float32).model  # dense: nothing to fold into
    load_adapter(other, tmp_path / "a")
    assert {type(each) for _, each in adapters_of(other)} == {LoRALinear}


def test_what_cannot_be_pooled(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")

    def prepared(model: Path, **train: Any) -> Any:
        resolved = recipe(model, rows, "qlora", **train).recipe
        return prepare_model(resolved.model_copy(update={"adapter": POOLED}))

    with pytest.raises(SlimError, match="is not quantized") as caught:
        prepared(tiny("llama"))
    assert "mlx-slim quantize" in caught.value.hint
    half = write_quantized(tmp_path / "q", tiny("llama"), dtype=mx.float16)
    assert prepared(half, dtype="float16").injected
    with pytest.raises(SlimError, match="stores its biases in float16, which bfloat16 would") as e:
        prepared(half, dtype="bfloat16")
    assert e.value.hint == "set train.dtype=float16"
    with pytest.raises(SlimError, match=r"needs linear layers .* in mode mxfp4"):
        model: Any = load(tiny("llama")).model
        nn.quantize(model, group_size=32, bits=4, mode="mxfp4")
        inject(model, POOLED, dora=False, stored=mx.float16)
    for settings, named in (
        ({"init": "pissa"}, "init"),
        ({"on": ["runs/a"]}, "on"),
        ({"init_from": "runs/a"}, "init_from"),
        ({"adaptive": {"target_rank": 2}}, "adaptive"),
    ):
        with pytest.raises(ValidationError, match=f"{named} is set too"):
            AdapterConfig.model_validate({"pooled": True, **settings})
    with pytest.raises(ValidationError, match="and method=dora: use qlora"):
        Recipe.model_validate({"model": "m", "method": "dora", "adapter": {"pooled": True}})


def test_a_run_trains_it_and_its_adapter_folds(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = write_quantized(tmp_path / "q", tiny("llama"), dtype=mx.float16)
    resolved = recipe(base, write_rows(tmp_path / "rows.jsonl"), "qlora", steps=4, save_every=2)
    small = resolved.recipe.model_copy(update={"adapter": POOLED})
    result = finetune(replace(resolved, recipe=small), tmp_path / "run", observer=Recorder())
    config = json.loads((result.out / "adapters" / "adapter_config.json").read_text())
    assert config["biases_rounded_to"] == "float16"
    weights = load_tensors(result.out / "adapters" / "adapters.safetensors")
    model: Any = load(base).model
    chosen = [name for name in weights if name.endswith("lora_a")]
    sides = [weights[name].shape[0] // 32 + weights[f"{name[:-1]}b"].shape[1] for name in chosen]
    assert config["parameters"] == 4 * sum(sides)  # r(in/g + out)
    options = FuseOptions(samples=2, length=32)
    fused = fuse(base, tmp_path / "run", tmp_path / "fused", options)
    assert fused.mode == "biases" and fused.effect.logit_fraction > 0.99
    again: Any = load(tmp_path / "fused").model
    for name in ("weight", "scales"):
        before, after = (each.layers[0].mlp.up_proj[name] for each in (model, again))
        assert mx.array_equal(before, after).item()
