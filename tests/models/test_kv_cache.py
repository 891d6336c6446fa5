"""Quantized caches: which models take them, and that codes and rounded numbers compute alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from mlx_slim.errors import SlimError
from mlx_slim.models.build import build
from mlx_slim.models.kv_cache import KVFormat, cache_format, quantize_cache, rounded_caches
from mlx_slim.models.load import load, read_config
from mlx_slim.runtime import to_float
from tests.support.tiny import tiny_model

TOKENS = mx.array([[5, 3, 1, 2, 6, 4, 0, 2, 1, 5, 3, 6]])


@pytest.mark.parametrize(
    ("architecture", "changes", "group_size"),
    [
        ("llama", {"head_dim": 32}, 32),
        ("llama", {"head_dim": 96}, 32),
        ("qwen3", {"head_dim": 64}, 64),
        ("qwen3", {"head_dim": 128}, 64),
    ],
)
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_rounded_numbers_give_the_same_logits(
    tmp_path: Path, architecture: str, changes: dict[str, Any], group_size: int, bits: int
) -> None:
    model: Any = load(tiny_model(tmp_path / "m", architecture, **changes)).model
    plain, rounded = make_prompt_cache(model), rounded_caches(model, KVFormat(bits, group_size))
    assert quantize_cache(model, bits) == KVFormat(bits, group_size)
    codes = make_prompt_cache(model)
    assert {type(cache) for cache in codes} == {QuantizedKVCache}
    logits = [
        mx.concatenate([model(TOKENS[:, :8], cache=c), model(TOKENS[:, 8:], cache=c)], axis=1)
        for c in (plain, rounded, codes)
    ]
    gaps = [to_float(mx.abs(each - logits[2]).max()) for each in logits[:2]]
    # Kernels round products otherwise: one number that goes to another code is 1% of the first gap.
    assert gaps[1] < 0.02 * gaps[0]


def test_rounded_caches_of_a_batch_are_those_of_each_row() -> None:
    format = KVFormat(4, 32)
    mx.random.seed(0)
    keys, values = mx.random.normal((2, 1, 2, 5, 32))
    single = [rounded_caches_of(format, keys, values, length) for length in (3, 5)]
    assert mx.array_equal(single[1].keys[..., :5, :], format.round(keys))
    batch = single[0].merge(single)
    new = mx.random.normal((2, 2, 1, 32))
    merged_keys, _ = batch.update_and_fetch(new, new)
    assert mx.array_equal(merged_keys[:, :, 5:], format.round(new))
    assert mx.array_equal(merged_keys[0, :, 2:5], format.round(keys)[0, :, :3])


def rounded_caches_of(format: KVFormat, keys: mx.array, values: mx.array, length: int) -> Any:
    class Model:
        layers = (None,)

    (cache,) = rounded_caches(Model(), format)  # type: ignore[arg-type]
    cache.update_and_fetch(keys[..., :length, :], values[..., :length, :])
    return cache


@pytest.mark.parametrize(
    ("architecture", "changes", "why"),
    [
        ("llama", {}, "its heads have 16 numbers, expected a multiple of 32"),
        ("gemma3_text", {"head_dim": 32}, "it is a RotatingKVCache"),
        ("gpt_oss", {"head_dim": 32}, "it is a RotatingKVCache"),
        ("deepseek_v3", {}, "its heads have 8 and 16 numbers"),
        ("phi", {"hidden_size": 128}, "its class refuses ("),  # reads the dtype of the keys
    ],
)
def test_families_whose_cache_cannot_be_quantized_are_one_line(
    tmp_path: Path, architecture: str, changes: dict[str, Any], why: str
) -> None:
    folder = tiny_model(tmp_path / "m", architecture, **changes)
    with pytest.raises(SlimError) as caught:
        cache_format(build(read_config(folder)), 8, "models/mine")  # from the config alone
    assert caught.value.message.startswith("models/mine cannot keep its cache in 8 bits: ")
    assert why in caught.value.message
    assert "\n" not in caught.value.message


def test_attention_that_misreads_the_codes_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_model(tmp_path / "m", head_dim=32)).model
    fetch = QuantizedKVCache.update_and_fetch

    def swapped(self: Any, keys: mx.array, values: mx.array) -> Any:
        return fetch(self, values, keys)

    monkeypatch.setattr(QuantizedKVCache, "update_and_fetch", swapped)
    with pytest.raises(SlimError, match="over the rounded numbers"):
        quantize_cache(model, 8)
    assert type(make_prompt_cache(model)[0]) is KVCache
