"""Models whose logits are scaled or capped split into body and head, exactly."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import _get_classes

from mlx_slim.models.structure import split
from mlx_slim.runtime import to_float

V = 96
_COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": V,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
_GRANITE = {
    "logits_scaling": 8.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_bias": False,
    "mlp_bias": False,
}
_MINICPM = {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 12, "rope_scaling": None}
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "granite": _GRANITE,
    "granite-untied": {**_GRANITE, "tie_word_embeddings": False},
    "cohere": {"logit_scale": 0.0625, "layer_norm_eps": 1e-5},
    "cohere2": {
        "logit_scale": 0.25,
        "num_hidden_layers": 4,
        "layer_norm_eps": 1e-5,
        "layer_norm_bias": False,
    },
    "minicpm": {**_MINICPM, "tie_word_embeddings": False},
    "nanochat": {},
    "llama": {},
}


def _model(name: str, dtype: mx.Dtype) -> nn.Module:
    config = {"model_type": name.split("-")[0], **_COMMON, **MODELS[name]}
    model_class, args_class = _get_classes(config)
    mx.random.seed(3)
    model = model_class(args_class.from_dict(config))
    model.set_dtype(dtype)
    # Untrained logits are small: of a size at which a cap is felt.
    for path, module in model.named_modules():
        if path.endswith(("embed_tokens", "lm_head", "wte")):
            module.weight = module.weight * 8
    return model


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(MODELS))
def test_logits_are_those_of_body_and_head(name: str, dtype: mx.Dtype) -> None:
    model = _model(name, dtype)
    actual = split(model, V)
    assert actual is not None
    tokens_BT = mx.array([[3, 9, 27, 81, 50, 54], [1, 2, 4, 8, 16, 32]])
    expected = model(tokens_BT).astype(mx.float32)
    logits = actual.head(actual.body(tokens_BT, None)).astype(mx.float32)
    tolerance = 1e-5 if dtype == mx.float32 else 3e-2
    assert to_float(mx.abs(logits - expected).max()) <= tolerance * to_float(mx.abs(expected).max())
    assert (actual.head.cap is not None) == (name in ("gemma2", "nanochat"))


def test_a_head_that_is_something_else_does_not_split() -> None:
    model = _model("llama", mx.float32)

    class Other(type(model)):  # type: ignore[misc]
        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            return mx.square(super().__call__(inputs, cache))

    model.__class__ = Other
    assert split(model, V) is None
