"""The configuration of a model in Hugging Face's terms, from the metadata of a GGUF file.

Invariant: what is returned builds a model that computes what llama.cpp computes of the file; a
setting that mlx-lm's class cannot express is refused. Where GGUF keeps a value silent because
llama.cpp has it in its code (the softmax scale of Gemma, its window pattern), it is written here
under the name of the model. Try it: ``mlx-slim convert model.gguf -o DIR``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlx_slim.errors import SlimError
from mlx_slim.models.config_checks import MOST_WIDE
from mlx_slim.models.gguf.architectures import Architecture
from mlx_slim.models.gguf.file import GGUFFile, GGUFTensor
from mlx_slim.reading import JsonObject, ModelConfig, field, short, shown

_HINT = "convert the original Hugging Face folder instead"
_NONE = GGUFTensor("", (), 0, 0)
LOCAL_BASE, WINDOW_PATTERN = 10000.0, 6  # Gemma 3's, in the code of llama.cpp
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = ("rope_freqs.weight", LONG, SHORT)


class _Metadata:
    """Typed reading of the keys of one architecture."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.where = file, short(file.path)
        self.prefix = file.metadata["general.architecture"]

    def count(self, key: str, *default: int, low: int = 1, high: int = MOST_WIDE) -> int:
        return field(
            self.file.metadata,
            self.where,
            f"{self.prefix}.{key}",
            int,
            *default,
            low=low,
            high=high,
        )

    def number(self, key: str, *default: float) -> float:
        where = f"{self.prefix}.{key}"
        return float(field(self.file.metadata, self.where, where, float, *default, low=0))

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.file.metadata


def read_settings(file: GGUFFile, architecture: Architecture, notes: list[str]) -> ModelConfig:
    """Return the config of the model in ``file``.

    Args:
        file: With the tensors of all shards.
        architecture: Of the file.
        notes: Gets a line for whatever had to be assumed.

    Raises:
        SlimError: If a key is missing or wrong, or mlx-lm's class cannot do what it asks.
    """
    meta = _Metadata(file)
    count, number = meta.count, meta.number
    if len(file.tensors.get("token_embd.weight", _NONE).shape) != 2:
        raise SlimError(
            f"{file.path} has no tensor token_embd.weight", "it is not a complete model"
        )
    kind = architecture.model_type
    width, heads = count("embedding_length"), count("attention.head_count")
    head_dim = count("attention.key_length", width // heads)
    rotated = count("rope.dimension_count", head_dim)
    names = file.tensors.keys()
    config: ModelConfig = {
        "model_type": kind,
        "architectures": [architecture.hf_class],
        "hidden_size": width,
        "num_hidden_layers": count("block_count", high=len(file.tensors)),
        "intermediate_size": count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", heads),
        "max_position_embeddings": count("context_length", high=1 << 40),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "rope_theta": float(np.float32(number("rope.freq_base", 10000.0))),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
    }
    if kind == "phi":
        config["layer_norm_eps"] = _rounded(number("attention.layer_norm_epsilon"))
        config["hidden_act"] = "gelu_new"
    else:
        config["rms_norm_eps"] = _rounded(number("attention.layer_norm_rms_epsilon"))
        config["head_dim"] = head_dim
        config["hidden_act"] = "silu"
    if kind in ("phi", "phi3"):
        config["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise SlimError(
            f"{file.path} rotates {rotated} of {head_dim} dimensions, which mlx-lm's {kind} class "
            "does not support",
            _HINT,
        )
    if kind in ("qwen2", "phi3", "mixtral") and head_dim * heads != width:
        raise SlimError(f"{file.path} has head size {head_dim}, {kind} needs {width // heads}")
    if config["tie_word_embeddings"]:
        notes.append("output.weight is absent: the head is tied to the embedding")
    _family(config, meta)
    config["rope_scaling"] = _rope_scaling(meta, config, notes)
    for role in ("bos", "eos", "pad"):
        key = "padding" if role == "pad" else role
        if (value := file.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{role}_token_id"] = int(value)
    turn = file.metadata.get("tokenizer.ggml.eot_token_id")
    if turn is not None and int(turn) != config.get("eos_token_id"):
        ends = [config["eos_token_id"]] if "eos_token_id" in config else []
        config["eos_token_id"] = [*ends, int(turn)]
    return config


def _family(config: ModelConfig, meta: _Metadata) -> None:
    """Add the keys that only some model types have."""
    kind = config["model_type"]
    if kind in ("qwen3_moe", "mixtral"):
        experts, chosen = meta.count("expert_count"), meta.count("expert_used_count")
        config["num_experts_per_tok"] = chosen
        if kind == "mixtral":
            config["num_local_experts"] = experts
            return
        config |= {
            "num_experts": experts,
            "moe_intermediate_size": meta.count("expert_feed_forward_length"),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,  # what llama.cpp does
        }
    elif kind in ("gemma2", "gemma3_text"):
        config["hidden_act"] = config["hidden_activation"] = "gelu_pytorch_tanh"
        config["query_pre_attn_scalar"] = softmax_width(config)
        config["final_logit_softcapping"] = meta.number("final_logit_softcapping", 0.0) or None
        config["attn_logit_softcapping"] = meta.number("attn_logit_softcapping", 0.0) or None
        default = [4096] if kind == "gemma2" else []  # llama.cpp's
        config["sliding_window"] = meta.count("attention.sliding_window", *default)
    if kind == "gemma2":
        for key, default in (("final_logit_softcapping", 30.0), ("attn_logit_softcapping", 50.0)):
            config[key] = config[key] or default  # llama.cpp's
    elif kind == "gemma3_text":
        config["sliding_window_pattern"] = meta.count(
            "attention.sliding_window_pattern", WINDOW_PATTERN
        )
        local = meta.number("rope.freq_base_swa", LOCAL_BASE)
        config["rope_local_base_freq"] = float(np.float32(local))
        for key in ("final_logit_softcapping", "attn_logit_softcapping"):
            if config[key] is not None:
                raise SlimError(
                    f"{meta.where} caps its logits ({key} {config[key]:g}), which mlx-lm's "
                    "gemma3_text class does not support",
                    _HINT,
                )
    elif kind == "phi3":
        window = meta.count("attention.sliding_window", 0, low=0, high=1 << 40)
        config["sliding_window"] = window or None


def softmax_width(config: ModelConfig) -> float:
    """Return the d of Gemma's softmax scale 1/√d, which llama.cpp knows by the number of layers."""
    largest = {"gemma2": 46, "gemma3_text": 62}[config["model_type"]]
    if config["num_hidden_layers"] == largest:  # the 27B
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _rounded(value: Any) -> float:
    """Return the short decimal that a float32 stands for: 1e-05, not 9.999999747e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(meta: _Metadata, config: ModelConfig, notes: list[str]) -> JsonObject | None:
    file, model_type = meta.file, config["model_type"]
    kind = field(file.metadata, meta.where, f"{meta.prefix}.rope.scaling.type", str, "none")
    factor = meta.number("rope.scaling.factor", 0.0)
    linear = meta.number("rope.scale_linear", 0.0)
    original = (
        meta.count("rope.scaling.original_context_length", high=1 << 40)
        if meta.has("rope.scaling.original_context_length")
        else None
    )
    if LONG in file.tensors or SHORT in file.tensors:
        return _longrope(meta, config, original, notes)
    if "rope_freqs.weight" in file.tensors:
        scaling = _llama3_scaling(file, config)
    elif kind == "linear" or (kind == "none" and linear not in (0.0, 1.0)):
        scaling = {"rope_type": "linear", "type": "linear", "factor": factor or linear}
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "type": "yarn", "factor": factor}
        if original is not None:
            scaling["original_max_position_embeddings"] = original
    elif kind == "none":
        return None
    else:
        raise SlimError(
            f"{file.path} uses the RoPE scaling {kind!r}, which cannot be imported from GGUF",
            _HINT,
        )
    if model_type in ("phi", "gemma2"):
        raise SlimError(
            f"{file.path} scales RoPE, which mlx-lm's {model_type} class does not support"
        )
    notes.append(f"RoPE scaling {scaling['rope_type']}, factor {scaling['factor']:g}")
    return scaling


def _longrope(
    meta: _Metadata, config: ModelConfig, original: int | None, notes: list[str]
) -> JsonObject:
    """Return Phi-3's scaling: one divisor a frequency for short rows, one for long ones."""
    file = meta.file
    if config["model_type"] != "phi3" or original is None or not {LONG, SHORT} <= set(file.tensors):
        raise SlimError(
            f"{file.path} has RoPE factors for long rows that cannot be used: "
            f"architecture {shown(meta.prefix)}, original context {shown(original)}",
            _HINT,
        )
    lists = {
        key: np.array(file.read(name)["weight"], np.float32).reshape(-1).tolist()
        for key, name in (("long_factor", LONG), ("short_factor", SHORT))
    }
    config["original_max_position_embeddings"] = original
    scaling: JsonObject = {"rope_type": "longrope", "type": "longrope", **lists}
    longer = config["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
    stored = meta.number("rope.scaling.attn_factor", 1.0)  # llama.cpp's default
    if not math.isclose(stored, usual, rel_tol=1e-4):
        scaling["attention_factor"] = _rounded(stored)
    notes.append(f"RoPE scaling longrope, beyond {original:,} tokens")
    return scaling


def _llama3_scaling(file: GGUFFile, config: ModelConfig) -> JsonObject:
    """Recover Llama 3's four numbers from the per-frequency factors that GGUF keeps instead."""
    factors = np.array(file.read("rope_freqs.weight")["weight"], np.float32)
    scaling = {
        "rope_type": "llama3",
        "type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    head_dim = config["head_dim"] if "head_dim" in config else 2 * factors.size
    expected = llama3_factors(scaling, head_dim, config["rope_theta"])
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise SlimError(
            f"{file.path} has RoPE frequency factors that are not Llama 3's",
            _HINT,
        )
    return scaling


def llama3_factors(scaling: JsonObject, head_dim: int, theta: float) -> np.ndarray:
    """Return what Llama 3's scaling divides each rotary frequency by (head_dim / 2,)."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / waves - low) / (high - low)
    blend = 1.0 / ((1.0 - smooth) / factor + smooth)
    return np.where(waves < original / high, 1.0, np.where(waves > original / low, factor, blend))
