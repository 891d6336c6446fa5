"""Adapter folders: stock mlx-lm reads ours, we read stock's, and nothing that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_slim.adapters.inject import adapter_state, inject
from mlx_slim.adapters.store import load_adapter, load_adapter_state, save_adapter
from mlx_slim.config.schema import AdapterConfig
from mlx_slim.errors import SlimError

IDS = mx.array([[1, 5, 9, 70, 200, 31, 8, 8, 2, 100]])

CASES = {
    "lora": ("llama", {}, False),
    "lora-phi": ("phi", {}, False),
    "lora-mistral-quantized": ("mistral", {}, False, 4),
    "lora-tied-embedding": ("llama-tied", {"targets": ["all-linear", "embed_tokens"]}, False),
    "lora-quantized-embedding-head": ("llama", {"targets": ["embed_tokens", "lm_head"]}, False, 8),
    "rslora": ("llama", {"scaling": "rslora"}, False),
    "names": ("llama", {"targets": ["q_proj", "mlp.down_proj"]}, False),
    "regex": ("phi", {"targets": "re:fc[12]$"}, False),
    "last-two": ("llama", {"layers": 2}, False),
    "first-and-head": ("llama", {"layers": [0], "targets": ["v_proj", "lm_head"]}, False),
    "middle-quantized": ("llama", {"layers": [1]}, False, 4),
    "dora": ("llama", {}, True),
    "dora-phi": ("phi", {}, True),
    "dora-phi-quantized": ("phi", {}, True, 4),
    "dora-first": ("mistral", {"layers": [0, 1], "targets": "q_proj"}, True, 8),
    "pissa": ("llama", {"init": "pissa"}, False),
    "pissa-quantized": ("phi", {"init": "pissa"}, False, 4),
    "pissa-dora": ("llama", {"init": "pissa"}, True),
}


def base(folder: Path, bits: int | None = None):
    """The model at ``folder`` by stock mlx-lm, quantized in memory when ``bits`` are given."""
    model, _ = stock_load(str(folder))
    return quantized(model, bits)


def quantized(model, bits: int | None):
    if bits:
        from mlx import nn

        nn.quantize(model, group_size=32, bits=bits)
    return model


def shake(model) -> None:
    """Move every trainable parameter away from its start, as training would."""
    mx.random.seed(7)
    moved = [
        (name, value + 0.05 * mx.random.normal(value.shape))
        for name, value in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(moved, strict=False)


def trained(folder: Path, config: AdapterConfig, dora: bool = False, bits: int | None = None):
    model = base(folder, bits)
    injected = inject(model, config, dora=dora)
    shake(model)
    return model, injected


@pytest.mark.parametrize("case", CASES)
def test_stock_mlx_lm_and_we_read_the_same_logits(case, tiny, tmp_path, monkeypatch):
    architecture, settings, dora, *bits = CASES[case]
    bits = bits[0] if bits else None
    config = AdapterConfig(rank=4, alpha=8, **settings)
    model, injected = trained(tiny(architecture), config, dora, bits)
    expected = model(IDS)
    untouched = base(tiny(architecture), bits)(IDS)
    assert mx.abs(expected - untouched).max().item() > 1e-3

    folder = tmp_path / "adapters"
    save_adapter(folder, model, config, injected, dora=dora, base="tiny")
    assert mx.array_equal(model(IDS), expected)

    from mlx_lm import utils
    from mlx_lm.tuner.utils import load_adapters

    stock = base(tiny(architecture), bits)
    load_adapters(stock, str(folder))
    stock.eval()
    assert mx.allclose(stock(IDS), expected, rtol=1e-4, atol=1e-5)
    if bits is None:
        whole, _ = utils.load(str(tiny(architecture)), adapter_path=str(folder))
        assert mx.allclose(whole(IDS), expected, rtol=1e-4, atol=1e-5)

    again = base(tiny(architecture), bits)
    loaded = load_adapter(again, folder)
    assert loaded.paths == injected.paths
    assert loaded.scale == injected.scale
    assert mx.allclose(again(IDS), expected, rtol=1e-5, atol=1e-6)
    if config.init == "standard":
        assert mx.array_equal(again(IDS), expected)
        assert loaded.parameters == injected.parameters
