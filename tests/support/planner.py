"""Recipes, configs and models that the tests of the planner share."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.utils import _get_classes

from mlx_slim.adapters.inject import inject
from mlx_slim.config.schema import Recipe
from mlx_slim.models.activations import use_fast_swiglu
from mlx_slim.models.quantized import use_fast_matmul
from mlx_slim.quantization.apply import quantize_model
from tests.support.tiny import ARCHITECTURES


def recipe(method: str = "lora", **sections: Any) -> Recipe:
    return Recipe(model="x", method=method, **sections)  # pyright: ignore[reportArgumentType]


def build(config: dict[str, Any], plan: Recipe) -> Any:
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    if plan.method == "qlora":
        quantize_model(model, config, plan.quantize)
    use_fast_matmul(model)  # as ``load`` does
    use_fast_swiglu(model)
    if plan.method != "full":
        inject(model, plan.adapter, dora=plan.method == "dora")
    mx.eval(model.parameters())
    return model


def dora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "_base_norm2_O")]


def config_of(**changes: Any) -> dict[str, Any]:
    base = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 768,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 1024,
    }
    return {**ARCHITECTURES["llama"], **base, **changes}
