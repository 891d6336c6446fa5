"""A small configuration for each model type of the installed mlx-lm, from the class that reads it.

Invariant: a field gets its size from its name, wherever a model type has it; what names do not tell
(lists with an entry a layer, nested objects) is in one short table. So a model type that a newer
mlx-lm brings is built in the same way, or the table shows that it does not build. Try it:
``python -c "from mlx_slim.bench.small_configs import small_config; print(small_config('qwen3'))"``.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from types import ModuleType
from typing import Any

from mlx_slim.bench.small_special import HEAD_DIM, LAYERS, MIXED, SPECIAL, WIDTH
from mlx_slim.reading import JsonObject, ModelConfig

VOCABULARY = 272  # bytes, special tokens, spare ids: a real head is wider than its tokenizer
_MOE = 32  # inputs of an expert's second layer: one group of a quantized layer

# Field -> value; a field that is not here keeps the default of its class.
_SIZES: JsonObject = {
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_transformer_layers"), LAYERS
    ),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "hidden_dim", "model_dim"), WIDTH),
    **dict.fromkeys(
        ("num_attention_heads", "n_heads", "n_head", "num_heads", "swa_num_attention_heads"), 4
    ),
    **dict.fromkeys(
        (
            "num_key_value_heads",
            "num_kv_heads",
            "n_kv_heads",
            "swa_num_key_value_heads",
            "num_attention_groups",
            "n_shared_head",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "head_dim",
            "v_head_dim",
            "swa_head_dim",
            "swa_v_head_dim",
            "qk_nope_head_dim",
            "hidden_size_per_head",
            "index_head_dim",
            "kv_channels",
            "mamba_d_head",
            "mamba_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
        ),
        HEAD_DIM,
    ),
    "global_head_dim": 2 * HEAD_DIM,
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "moe_hidden_size": WIDTH,
    "hidden_size_per_layer_input": 32,
    "query_pre_attn_scalar": HEAD_DIM,
    **dict.fromkeys(("vocab_size", "num_vocab", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        (
            "intermediate_size",
            "intermediate_size_mlp",
            "ff_intermediate_size",
            "ffn_hidden_size",
            "block_dim",
            "block_ff_dim",
            "n_inner",
            "dense_intermediate_size",
            "mamba_d_ssm",
        ),
        2 * WIDTH,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
            "share_expert_dim",
            "expert_hidden_dim",
        ),
        _MOE,
    ),
    **dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "linear_num_value_heads",
            "mamba_n_heads",
            "mamba_num_heads",
            "index_n_heads",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            "num_experts_per_tok",
            "num_experts_per_token",
            "top_k_experts",
            "moe_topk",
            "moe_k",
            "moe_top_k",
            "linear_num_key_heads",
            "full_attention_interval",
            "sliding_window_pattern",
            "no_rope_layer_interval",
            "layer_group_size",
            "zero_expert_num",
            "index_topk",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "n_shared_experts",
            "num_shared_experts",
            "num_shared_expert",
            "moe_num_shared_experts",
            "n_group",
            "topk_group",
            "num_expert_group",
            "n_groups",
            "mamba_n_groups",
            "group_norm_size",
            "first_k_dense_replace",
            "num_dense_layers",
            "moe_layer_freq",
            "decoder_sparse_step",
            "num_kv_shared_layers",
            "num_kv_reuse_layers",
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "q_lora_rank",
            "kv_lora_rank",
            "o_lora_rank",
            "a_low_rank_dim",
            "v_low_rank_dim",
            "gate_low_rank_dim",
            "decay_low_rank_dim",
        ),
        32,
    ),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "time_step_rank"), 16),
    **dict.fromkeys(
        (
            "conv_kernel",
            "mamba_d_conv",
            "linear_conv_kernel_dim",
            "conv_L_cache",
            "conv_window",
            "conv1d_width",
            "short_conv_kernel_size",
        ),
        4,
    ),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 16
    ),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "original_max_position_embeddings",
            "n_positions",
            "n_ctx",
            "block_size",
            "model_max_length",
        ),
        512,
    ),
}
# What a field without a default gets where its name says nothing of it, by the last part of it.
_ENDS: JsonObject = {
    "_eps": 1e-5,
    "_epsilon": 1e-5,
    "theta": 10000.0,
    "_base": 10000,
    "_pct": 0.5,
    "_factor": 1.0,
    "_multiplier": 1.0,
    "_scaling": None,
}
# The same by its whole name: needed by some classes, better left to the others.
_NEEDED: JsonObject = {
    "layer_types": MIXED,
    "logits_scaling": 4.0,
}
_BY_TYPE: JsonObject = {
    "bool": False,
    "float": 1.0,
    "int": 1,
    "str": "",
    "list": [],
    "dict": {},
}

# Model type -> the type whose class reads its text_config, where its own module has none.
_TEXT = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "lfm2-vl": "lfm2",
    "mistral3": "llama",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
_TEXT_CLASSES = ("TextArgs", "TextConfig", "TextModelArgs")


def small_config(model_type: str) -> ModelConfig:
    """Return a ``config.json`` of ``model_type`` with some 10^5 parameters.

    Raises:
        ImportError: If the module of the type cannot be imported.
    """
    module = _module(model_type)
    config = {**_fields(module.ModelArgs), "model_type": model_type}
    if "text_config" in config:
        config["text_config"] = _text_config(model_type, module)
    special = copy.deepcopy(SPECIAL.get(model_type, {}))
    config.get("text_config", {}).update(special.pop("text_config", {}))
    return {**config, **special}


def _module(model_type: str) -> ModuleType:
    try:
        return importlib.import_module(f"mlx_lm.models.{model_type}")
    except SystemExit as error:  # a module that wants another library
        raise ImportError(f"mlx_lm.models.{model_type} ends the process") from error


def _text_config(model_type: str, module: ModuleType) -> ModelConfig:
    if inner := _TEXT.get(model_type):
        return small_config(inner)
    bases = (*module.ModelArgs.__mro__, *module.Model.__mro__)
    modules = (module, *(sys.modules[base.__module__] for base in bases))
    places = [(each, name) for each in modules for name in _TEXT_CLASSES]
    return _fields(next(getattr(each, name) for each, name in places if hasattr(each, name)))


def _fields(args: Any) -> ModelConfig:
    """Return field -> value of the fields of a class that need one, or have a size by name."""
    values: ModelConfig = {}
    for each in dataclasses.fields(args):
        needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if each.name in _SIZES:
            values[each.name] = _SIZES[each.name]
        elif each.name == "text_config":
            values[each.name] = {}
        elif needed:
            values[each.name] = _required(each.name, str(each.type))
    return values


def _required(name: str, kind: str) -> Any:
    """Return a value for a field without a default, from the end of its name or its type."""
    if name in _NEEDED:
        return copy.deepcopy(_NEEDED[name])
    for end, value in _ENDS.items():
        if name.endswith(end):
            return value
    plain = kind.removeprefix("<class '").removesuffix("'>").removeprefix("typing.").lower()
    return copy.deepcopy(next((v for key, v in _BY_TYPE.items() if plain.startswith(key)), None))
