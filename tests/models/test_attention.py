"""Which attention the fused backward pass takes, seen without computing anything."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.models import attention
from mlx_slim.models.attention import (
    UNBOUNDED,
    attention_balance,
    attention_of,
    fused_here,
    has_fused_backward,
)
from mlx_slim.models.build import build
from mlx_slim.models.normalize import normalize_config
from tests.support.tiny import ARCHITECTURES

_HEAD = {"head_dim": 64}
_SLIDING = {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
_GPT_OSS = {
    "sliding_window": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_scaling": None,
}


def model_of(kind: str, **changes: Any) -> Any:
    config = {**ARCHITECTURES["llama"], "model_type": kind, **changes}
    return build(normalize_config(config).config)


@pytest.mark.parametrize(
    ("kind", "changes", "lengths"),
    [
        ("llama", _HEAD, [UNBOUNDED] * 3),
        ("llama", {}, [0] * 3),  # heads of 16 numbers have no kernel
        ("qwen3", _HEAD, [UNBOUNDED] * 3),
        ("phi", {"hidden_size": 256}, [UNBOUNDED] * 3),
        ("gemma", {"head_dim": 256}, [0] * 3),  # its kernel is only taken when forced
        ("gemma2", {**_HEAD, **_SLIDING}, [0] * 3),  # a soft cap: its own attention
        ("gemma3_text", {**_HEAD, **_SLIDING}, [16, UNBOUNDED, 16]),  # beyond the window, an array
        ("gpt_oss", {**_HEAD, **_GPT_OSS}, [0] * 3),  # sinks
        ("mamba", {"intermediate_size": 64, "state_size": 4, "conv_kernel": 4}, None),
    ],
)
def test_what_the_fused_backward_pass_takes(
    kind: str, changes: dict[str, Any], lengths: list[int] | None
) -> None:
    if kind == "mamba":
        changes |= {"use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
    original = mx.fast.scaled_dot_product_attention
    seen = attention_of(model_of(kind, **changes))
    assert mx.fast.scaled_dot_product_attention is original
    assert (seen and [layer.fused_length for layer in seen]) == lengths


def test_a_mac_with_this_mlx_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_SDPA_VJP_FALLBACK", raising=False)
    assert has_fused_backward()  # this project needs mlx 0.32.4
    assert fused_here() == (mx.metal.is_available() and attention.on_metal())
    monkeypatch.setattr(attention, "on_metal", lambda: True)
    assert fused_here()
    for number, has in (("0.32.3", False), ("0.31.9", False), ("0.33.0", True), ("1.0.0", True)):
        monkeypatch.setattr(attention, "version", lambda package, number=number: number)
        assert has_fused_backward() == fused_here() == has, number
    monkeypatch.setenv("MLX_SDPA_VJP_FALLBACK", "1")
    assert not has_fused_backward()


def test_a_mask_of_segments_costs_more_where_attention_is_fused() -> None:
    model = model_of("llama", **_HEAD)
    plain = attention_balance(model, 512, gpu=False, fused=False)
    assert plain.causal == plain.masked
    fused = attention_balance(model, 512, gpu=True, fused=True)
    assert fused.masked < fused.causal
    sliding = model_of("gemma3_text", **_HEAD, **_SLIDING)
    short, long = (attention_balance(sliding, n, gpu=True, fused=True) for n in (16, 17))
    assert short.masked == long.masked < long.causal < short.causal
