"""A GGUF file becomes an mlx-lm model with the same weights, code for code.

Invariant: Q4_0, Q4_1 and Q8_0 tensors stay the quantized layers they are (affine, group 32), dense
ones stay dense; nothing is requantized. An architecture or a setting that mlx-lm's class cannot
express is refused. Try it: ``mlx-slim convert model.gguf -o DIR``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.models.build import construct
from mlx_slim.models.config_checks import MOST_WIDE
from mlx_slim.models.gguf.file import BITS, GGUFFile, GGUFTensor
from mlx_slim.models.gguf.split import open_gguf
from mlx_slim.models.gguf.tokenizer import build_tokenizer
from mlx_slim.models.tensors import few
from mlx_slim.reading import field, library_errors, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NONE = GGUFTensor("", (), 0, 0)
_GATED = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PHI = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.final_layernorm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv",
    "attn_output": "self_attn.dense",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


@dataclass(frozen=True)
class _Architecture:
    """How one GGUF architecture maps to Hugging Face: model type, module names, q/k row order."""

    model_type: str
    hf_class: str
    names: dict[str, str]
    permuted: bool = False


ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", _GATED, permuted=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", _GATED),
    "qwen3": _Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_GATED, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    ),
    "phi2": _Architecture("phi", "PhiForCausalLM", _PHI),
}


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file as a model: config in Hugging Face's terms and a fast tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    config: dict[str, Any]
    notes: list[str]


def import_gguf(path: Path) -> GGUFModel:
    """Read ``path`` into an mlx-lm model, losslessly where MLX has the format.

    Raises:
        SlimError: If the file is no readable GGUF, its architecture is not one of
            ``ARCHITECTURES``, or its tensors are not exactly those of the model.
    """
    file = open_gguf(path)
    with library_errors(
        f"{short(path)} cannot be imported", "convert the original Hugging Face folder instead"
    ):
        return _import(file)


def _import(file: GGUFFile) -> GGUFModel:
    from mlx_slim.models.load import fill, read_weights

    path = file.path
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise SlimError(
            f"{path} has the GGUF architecture {name!r}, which cannot be imported",
            f"{did_you_mean(str(name), ARCHITECTURES)}; or convert the Hugging Face folder",
        )
    architecture = ARCHITECTURES[name]
    notes: list[str] = []
    config = _config(file, architecture, notes)
    weights = _weights(file, architecture, config)
    bits = {key.removesuffix(".scales"): _bits(weights, key) for key in weights if "scales" in key}
    model = construct(config)
    nn.quantize(
        model,
        group_size=32,
        class_predicate=lambda p, _: {"group_size": 32, "bits": bits[p]} if p in bits else False,
    )
    model.eval()
    fill(model, path, weights)
    read_weights(model, str(path))
    dense = {t.kind for t in file.tensors.values()} - {*BITS, "F32", "F16", "BF16"}
    if dense:
        notes.append(f"{', '.join(sorted(dense))} tensors dequantized to float16")
    return GGUFModel(model, build_tokenizer(file.metadata, notes), config, notes)


def _bits(weights: dict[str, mx.array], scales: str) -> int:
    """Bits per code: packed width · 32 / (groups · 32)."""
    return weights[scales.replace(".scales", ".weight")].shape[1] // weights[scales].shape[1]


def _config(file: GGUFFile, architecture: _Architecture, notes: list[str]) -> dict[str, Any]:
    prefix = file.metadata["general.architecture"]

    where = short(file.path)

    def count(key: str, *default: int, high: int = MOST_WIDE) -> int:
        return field(file.metadata, where, f"{prefix}.{key}", int, *default, low=1, high=high)

    def number(key: str, *default: float) -> float:
        return field(file.metadata, where, f"{prefix}.{key}", float, *default, low=0)

    if field(file.metadata, where, f"{prefix}.expert_count", int, 0):
        raise SlimError(
            f"{file.path} is a mixture of experts, which cannot be imported from GGUF",
            "convert the original Hugging Face folder instead",
        )
    if len(file.tensors.get("token_embd.weight", _NONE).shape) != 2:
        raise SlimError(
            f"{file.path} has no tensor token_embd.weight", "it is not a complete model"
        )
    width, heads = count("embedding_length"), count("attention.head_count")
    head_dim = count("attention.key_length", width // heads)
    rotated = count("rope.dimension_count", head_dim)
    names = file.tensors.keys()
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
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
    if architecture.model_type == "phi":
        config["layer_norm_eps"] = _rounded(number("attention.layer_norm_epsilon"))
        config["partial_rotary_factor"] = rotated / head_dim
        config["hidden_act"] = "gelu_new"
    else:
        config["rms_norm_eps"] = _rounded(number("attention.layer_norm_rms_epsilon"))
        config["head_dim"] = head_dim
        config["hidden_act"] = "silu"
        if rotated != head_dim:
            raise SlimError(
                f"{file.path} rotates {rotated} of {head_dim} dimensions, which mlx-lm's "
                f"{architecture.model_type} class cannot",
                "convert the original Hugging Face folder instead",
            )
    if architecture.model_type == "qwen2" and head_dim * heads != width:
        raise SlimError(f"{file.path} has head size {head_dim}, qwen2 needs {width // heads}")
    if config["tie_word_embeddings"]:
        notes.append("output.weight is absent: the head is tied to the embedding")
    config["rope_scaling"] = _rope_scaling(file, prefix, config, notes)
    for role in ("bos", "eos", "pad"):
        key = "padding" if role == "pad" else role
        if (value := file.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{role}_token_id"] = int(value)
    turn = file.metadata.get("tokenizer.ggml.eot_token_id")
    if turn is not None and int(turn) != config.get("eos_token_id"):
        ends = [config["eos_token_id"]] if "eos_token_id" in config else []
        config["eos_token_id"] = [*ends, int(turn)]
    return config


def _rounded(value: Any) -> float:
    """Return the short decimal that a float32 stands for: 1e-05, not 9.999999747e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    file: GGUFFile, prefix: str, config: dict[str, Any], notes: list[str]
) -> dict[str, Any] | None:
    meta, where, rope = file.metadata, short(file.path), f"{prefix}.rope"
    kind = field(meta, where, f"{rope}.scaling.type", str, "none")
    factor = float(field(meta, where, f"{rope}.scaling.factor", float, 0.0))
    linear = float(field(meta, where, f"{rope}.scale_linear", float, 0.0))
    original = field(meta, where, f"{rope}.scaling.original_context_length", int, None)
    if "rope_freqs.weight" in file.tensors:
        scaling = _llama3_scaling(file, config)
    elif kind == "linear" or (kind == "none" and linear not in (0.0, 1.0)):
        scaling = {"rope_type": "linear", "type": "linear", "factor": factor or linear}
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "type": "yarn", "factor": factor}
        if original is not None:
            scaling["original_max_position_embeddings"] = int(original)
    elif kind == "none":
        return None
    else:
        raise SlimError(
            f"{file.path} uses the RoPE scaling {kind!r}, which cannot be imported from GGUF",
            "convert the original Hugging Face folder instead",
        )
    if config["model_type"] == "phi":
        raise SlimError(f"{file.path} scales RoPE, which mlx-lm's phi class cannot")
    notes.append(f"RoPE scaling {scaling['rope_type']}, factor {scaling['factor']:g}")
    return scaling


def _llama3_scaling(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
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
            "convert the original Hugging Face folder instead",
        )
    return scaling


def llama3_factors(scaling: dict[str, Any], head_dim: int, theta: float) -> np.ndarray:
    """Return what Llama 3's scaling divides each rotary frequency by (head_dim / 2,)."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / waves - low) / (high - low)
    blend = 1.0 / ((1.0 - smooth) / factor + smooth)
    return np.where(waves < original / high, 1.0, np.where(waves > original / low, factor, blend))


def _weights(
    file: GGUFFile, architecture: _Architecture, config: dict[str, Any]
) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    unknown = []
    for name in file.tensors:
        if name == "rope_freqs.weight":
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        target = architecture.names.get(match[2]) if match else None
        if match is None or target is None:
            unknown.append(name)
            continue
        path = f"model.layers.{match[1]}.{target}" if match[1] else target
        for part, value in file.read(name).items():
            leaf = part if match[3] == "weight" else match[3]
            weights.update(_place(path, leaf, value, architecture, config))
    if unknown:
        raise SlimError(
            f"{file.path} holds {len(unknown)} tensors that the {architecture.model_type} model "
            f"has no place for ({few(unknown)})",
            "convert the original Hugging Face folder instead",
        )
    return weights


def _place(
    path: str, leaf: str, value: mx.array, architecture: _Architecture, config: dict[str, Any]
) -> dict[str, mx.array]:
    """Return ``value`` under its Hugging Face name, rows in Hugging Face's order."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if path.endswith(".qkv"):
        size = config["hidden_size"] // heads
        cuts = [heads * size, (heads + kv_heads) * size]
        return {
            f"{path.removesuffix('qkv')}{part}_proj.{leaf}": rows
            for part, rows in zip("qkv", mx.split(value, cuts, axis=0), strict=True)
        }
    if architecture.permuted and path.endswith(("q_proj", "k_proj")):
        value = _unpermute(value, heads if path.endswith("q_proj") else kv_heads)
    return {f"{path}.{leaf}": value}


def _unpermute(value: mx.array, heads: int) -> mx.array:
    """Undo GGUF's interleaving of the two halves that RoPE rotates, within each head's rows."""
    pairs = value.shape[0] // heads // 2
    split = value.reshape(heads, pairs, 2, *value.shape[1:])
    return split.swapaxes(1, 2).reshape(value.shape)
