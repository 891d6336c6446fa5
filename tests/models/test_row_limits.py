"""Up to how many tokens a row is computed as transformers computes it."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.errors import SlimError
from mlx_slim.models.normalize import normalize_config
from mlx_slim.models.row_limits import row_limit, shortest_limit
from tests.support.memory import reset_peak
from tests.support.tiny import ARCHITECTURES

WINDOW = 16
_QWEN = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 128,
}


def limit(kind: str, **changes: Any) -> Any:
    config = {**ARCHITECTURES["llama"], "model_type": kind, **changes}
    return row_limit(normalize_config(config).config)


@pytest.mark.parametrize(
    ("kind", "changes", "tokens"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": WINDOW}, WINDOW),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {}, 4096),  # transformers' default where the key is absent
        ("mixtral", {"sliding_window": WINDOW}, WINDOW),
        ("phi3", {"sliding_window": WINDOW}, WINDOW),
        ("starcoder2", {"sliding_window": WINDOW, "norm_epsilon": 1e-5}, WINDOW),
        ("gemma2", _GEMMA, WINDOW),
        ("gemma2", {**_GEMMA, "layer_types": ["full_attention"] * 3}, None),
        ("gemma3_text", {**_GEMMA, "sliding_window_pattern": 2}, None),
        ("gemma3_text", {**_GEMMA, "sliding_window_pattern": 2, "layer_types": _TYPES}, None),
        ("gemma3_text", {**_GEMMA, "sliding_window_pattern": 3, "layer_types": _TYPES}, WINDOW),
        ("olmo2", {"sliding_window": WINDOW}, None),  # no key of that class
        ("olmo3", {"sliding_window": WINDOW, "layer_types": _TYPES}, None),
        ("qwen2", {}, None),
        ("qwen2", _QWEN, WINDOW),
        ("qwen2", {**_QWEN, "use_sliding_window": False}, None),
        ("qwen2", {**_QWEN, "max_window_layers": 3}, None),
        ("qwen2", {**_QWEN, "layer_types": ["full_attention"] * 3}, None),
        ("qwen3", {**_QWEN, "head_dim": 16}, WINDOW),
        ("qwen3", {**_QWEN, "head_dim": 16, "layer_types": _TYPES}, WINDOW),
        ("llama", {"rope_scaling": _LONGROPE}, 128),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 512),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, None),
        ("minicpm", {"sliding_window": WINDOW, "dim_model_base": 64}, WINDOW),  # mlx-lm's alone
    ],
)
def test_a_window_counts_where_transformers_has_it_and_the_class_has_not(
    kind: str, changes: Any, tokens: Any
) -> None:
    extra = {"minicpm": {"scale_depth": 1.0, "scale_emb": 1.0}}.get(kind, {})
    actual = limit(kind, **changes, **extra)
    assert (actual.tokens if actual else None) == tokens
    if actual and tokens == WINDOW:
        assert f"sliding window of {WINDOW} tokens" in actual.why and kind in actual.why


def test_generation_that_starts_anew_has_no_limit_with_longrope() -> None:
    for scaling, tokens in ((_LONGROPE, None), ({"type": "dynamic", "factor": 2.0}, 512)):
        config = normalize_config({**ARCHITECTURES["llama"], "rope_scaling": scaling}).config
        actual = row_limit(config, restarts=True)
        assert (actual.tokens if actual else None) == tokens


def test_a_pruned_or_quantized_config_has_the_same_limit() -> None:
    config = {**ARCHITECTURES["mistral"], "sliding_window": WINDOW}
    config["quantization"] = {"group_size": 32, "bits": 4}
    actual = row_limit(normalize_config(config).config)
    assert actual is not None and actual.tokens == WINDOW


def test_the_shortest_limit_of_several_models_counts() -> None:
    configs = [{**ARCHITECTURES["mistral"], "sliding_window": n} for n in (64, WINDOW, None)]
    actual = shortest_limit([normalize_config(config).config for config in configs])
    assert actual is not None and actual.tokens == WINDOW
    actual.check(WINDOW, "a row")
    with pytest.raises(SlimError, match=r"rows\.jsonl, row 3: 17 tokens.*window of 16"):
        actual.check(WINDOW + 1, "rows.jsonl, row 3")
    assert shortest_limit([ARCHITECTURES["llama"]]) is None


def test_looking_at_a_large_model_computes_nothing() -> None:
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    large |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
    before, began = reset_peak(), time.monotonic()
    assert limit("mistral", **large, sliding_window=4096).tokens == 4096
    assert mx.get_peak_memory() - before < 1_000_000, "7 billion numbers stay unmade"
    assert time.monotonic() - began < 5
