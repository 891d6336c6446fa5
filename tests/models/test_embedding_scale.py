"""Gemma 3's embedding scale is said where mlx-lm rounds it."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_slim.models.normalize import normalize_config

_GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 640,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (_GEMMA, "25.25, √640 in bfloat16, for 25.298"),
        ({**_GEMMA, "hidden_size": 1024}, ""),  # 32 is exact
        ({**_GEMMA, "model_type": "llama"}, ""),
    ],
)
def test_a_rounded_scale_is_noted(config: dict[str, Any], said: str) -> None:
    notes = "\n".join(normalize_config(config).notes)
    assert (said in notes) if said else ("Gemma" not in notes)
