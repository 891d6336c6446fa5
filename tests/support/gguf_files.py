"""Tiny models of each GGUF architecture, written with the tables of the ``gguf`` package itself.

What is written here is what llama.cpp's converter writes: names by ``gguf.get_tensor_name_map``,
the rows of llama's q and k interleaved, 1 added to the norms of Gemma, and only those settings
that it stores.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from mlx.utils import tree_flatten

from mlx_slim.models.load import load
from tests.support.tiny import tiny_model

_GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
_EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
LONGROPE = {
    "type": "longrope",
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
# Name: GGUF's architecture, what the tiny llama changes.
FAMILIES: dict[str, tuple[MODEL_ARCH, dict[str, Any]]] = {
    "mistral": (MODEL_ARCH.LLAMA, {"model_type": "mistral", "sliding_window": None}),
    "mixtral": (MODEL_ARCH.LLAMA, {"model_type": "mixtral", "num_local_experts": 4, **_EXPERTS}),
    "qwen3": (MODEL_ARCH.QWEN3, {"model_type": "qwen3", "head_dim": 32}),
    "qwen3moe": (
        MODEL_ARCH.QWEN3MOE,
        {
            "model_type": "qwen3_moe",
            "head_dim": 16,
            "num_experts": 4,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            **_EXPERTS,
        },
    ),
    "phi3": (MODEL_ARCH.PHI3, {"model_type": "phi3"}),
    "phi3-long": (
        MODEL_ARCH.PHI3,
        {
            "model_type": "phi3",
            "rope_scaling": LONGROPE,
            "original_max_position_embeddings": 256,
        },
    ),
    "gemma2": (
        MODEL_ARCH.GEMMA2,
        {
            "model_type": "gemma2",
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            **_GEMMA,
        },
    ),
    "gemma3": (
        MODEL_ARCH.GEMMA3,
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
            **_GEMMA,
        },
    ),
}
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def family_model(folder: Path, family: str, **changes: Any) -> Path:
    """Write the tiny model of ``family``; return its folder."""
    return tiny_model(folder, **{**FAMILIES[family][1], **changes})


def hf_name(path: str) -> str:
    """Return the name under which ``gguf`` knows a module of mlx-lm."""
    stem, _, last = path.replace("switch_mlp", "experts").rpartition(".")
    return f"{stem}.{_MIXTRAL[last] if 'block_sparse_moe.experts' in stem else last}".lstrip(".")


def write_family(path: Path, folder: Path, family: str, kind: str = "F32") -> None:
    """Write the model of ``folder`` as llama.cpp's converter would; matrices in ``kind``."""
    loaded = load(folder)
    arch, config = FAMILIES[family][0], loaded.config
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    _settings(writer, arch, config)
    _tokenizer(writer, loaded.tokenizer, config["vocab_size"])
    if arch == MODEL_ARCH.PHI3 and (scaling := config.get("rope_scaling")):
        original = config["original_max_position_embeddings"]
        longer = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(longer) / math.log(original)))
        for part in ("long", "short"):
            factors = np.array(scaling[f"{part}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{part}.weight", factors)
    block = GGMLQuantizationType[kind]
    for full, value in tree_flatten(loaded.model.parameters()):
        array = np.array(value, np.float32)
        module, leaf = full.rsplit(".", 1)
        name = names.get_name(hf_name(module))
        assert name is not None, full
        if arch in (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3) and full.endswith("norm.weight"):
            array = array + 1
        if arch == MODEL_ARCH.LLAMA and module.endswith(("q_proj", "k_proj")):
            array = _interleaved(array, config, module)
        if array.ndim == 1 or block == GGMLQuantizationType.F32 or module.endswith("gate"):
            writer.add_tensor(f"{name}.{leaf}", array)
        else:
            writer.add_tensor(f"{name}.{leaf}", quantize(array, block), raw_dtype=block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(array: np.ndarray, config: dict[str, Any], module: str) -> np.ndarray:
    heads = config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _settings(writer: GGUFWriter, arch: MODEL_ARCH, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if arch == MODEL_ARCH.PHI3:
        writer.add_rope_dimension_count(head_dim)
        writer.add_sliding_window(0)
    elif arch != MODEL_ARCH.LLAMA:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if (experts := config.get("num_experts") or config.get("num_local_experts")) is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if arch in (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3):
        writer.add_sliding_window(config["sliding_window"])
    if arch == MODEL_ARCH.GEMMA2:
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if arch == MODEL_ARCH.GEMMA3 and (scaling := config.get("rope_scaling")):
        writer.add_string("gemma3.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(scaling["factor"])


def _tokenizer(writer: GGUFWriter, tokenizer: Any, size: int) -> None:
    """Write the bytes as tokens, one merge, without which llama.cpp reads none, and pads."""
    vocab = tokenizer.get_vocab()
    tokens = [*sorted(vocab, key=lambda token: vocab[token]), "ab"]
    pads = [f"[PAD{index}]" for index in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + pads)
    kinds = [3 if token.startswith("<|") else 1 for token in tokens]
    writer.add_token_types(kinds + [5] * len(pads))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(vocab["<|im_start|>"])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_chat_template(tokenizer.chat_template)
