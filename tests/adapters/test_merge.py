"""Merged models answer as unmerged ones, and a small delta survives 16 bits."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_slim.adapters.inject import adapters_of, inject
from mlx_slim.adapters.lora import LoRALinear
from mlx_slim.adapters.merge import merge
from mlx_slim.config.schema import AdapterConfig
from tests.adapters.support import IDS, relative_error, shake, stock_model
from tests.support.tiny import TinyModels

CASES = [
    ("llama", {}, False, None),
    ("phi", {}, False, None),
    ("llama-tied", {"targets": ["all-linear", "embed_tokens"]}, False, None),
    ("llama", {"targets": ["q_proj", "lm_head"], "layers": [0, 2]}, False, 4),
    ("llama-tied", {"targets": "embed_tokens"}, False, 8),
    ("phi", {}, True, None),
    ("mistral", {}, True, 4),
    ("llama", {"init": "pissa"}, False, None),
    ("phi", {"init": "pissa"}, True, 4),
]


@pytest.mark.parametrize(("architecture", "settings", "dora", "bits"), CASES)
def test_merged_is_unmerged(
    architecture: str, settings: dict[str, Any], dora: bool, bits: int, tiny: TinyModels
) -> None:
    model = stock_model(tiny(architecture), bits)
    plain = {name for name, _ in tree_flatten(stock_model(tiny(architecture)).parameters())}
    injected = inject(model, AdapterConfig(rank=4, **settings), dora=dora)
    shake(model)
    model.eval()
    expected = model(IDS)
    assert merge(model) == len(injected.paths)
    assert mx.allclose(model(IDS), expected, rtol=1e-4, atol=1e-5)
    assert not adapters_of(model)
    assert not tree_flatten(model.trainable_parameters())
    assert merge(model) == 0
    if bits is None:
        assert {name for name, _ in tree_flatten(model.parameters())} == plain


@pytest.mark.parametrize("size", [0.001, 0.01, 0.1])
def test_the_sum_is_made_in_float32_and_cast_last(size: float) -> None:
    mx.random.seed(0)
    base = nn.Linear(256, 256, bias=False)
    base.set_dtype(mx.bfloat16)
    base.freeze()
    weight = base["weight"].astype(mx.float32)
    adapter = LoRALinear(base, 8, 1.0)
    shake(adapter)
    delta = (adapter.lora_a @ adapter.lora_b).T
    adapter.lora_b = adapter.lora_b * (size * mx.linalg.norm(weight) / mx.linalg.norm(delta))
    delta = (adapter.lora_a @ adapter.lora_b).T
    holder = nn.Sequential(adapter)
    merge(holder)
    merged = holder.layers[0]["weight"]
    assert merged.dtype == mx.bfloat16
    relative = relative_error(merged.astype(mx.float32) - weight, delta)
    rounded = base["weight"] + delta.astype(mx.bfloat16)
    naive = relative_error(rounded.astype(mx.float32) - weight, delta)
    assert relative <= naive
    # What one cast of the sum costs: half a unit in the last place, ~0.17% of a weight.
    assert relative < 0.0025 / size


def test_a_dtype_can_be_asked_for(tiny: TinyModels) -> None:
    model = stock_model(tiny("llama"), 4)
    model.set_dtype(mx.bfloat16)
    inject(model, AdapterConfig(rank=4, targets="q_proj"), dora=False)
    shake(model)
    merge(model, mx.float32)
    assert model.layers[0].self_attn.q_proj.weight.dtype == mx.float32
    model = stock_model(tiny("llama"), 4)
    model.set_dtype(mx.bfloat16)
    inject(model, AdapterConfig(rank=4, targets="q_proj"), dora=False)
    merge(model)
    assert model.layers[0].self_attn.q_proj.weight.dtype == mx.bfloat16
