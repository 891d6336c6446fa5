"""Random models of the real architectures in Hugging Face format, trained in a second.

``tiny_model(folder, "llama")`` writes ``config.json``, sharded safetensors with an index and a real
``tokenizer.json`` (bytes as tokens), the way a hub download looks.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer

from mlx_slim.bench.small_model import CHATML, SPECIALS, byte_tokenizer

VOCAB = 256 + len(SPECIALS) + 5  # five spare ids: a real head is wider than its tokenizer

_LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA},  # grouped-query attention
    "llama-mha": {"model_type": "llama", **_LLAMA, "num_key_value_heads": 4},
    "llama-tied": {"model_type": "llama", **_LLAMA, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_LLAMA},
    "qwen2": {"model_type": "qwen2", **_LLAMA, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 16},
    "phi": {
        "model_type": "phi",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.5,
        "layer_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}
# Architectures that only the tests of pruning go through.
OTHERS: dict[str, dict[str, Any]] = {
    "gemma3_text": {  # every other layer has full attention
        "model_type": "gemma3_text",
        **_LLAMA,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        **_LLAMA,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_scaling": {"rope_type": "default"},
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **_LLAMA,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
}
# Mixtures of experts; a row of 64 and more choices is sorted by expert, a shorter one is not.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "model_type": "mixtral",
        **_LLAMA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **_LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_LLAMA,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "olmoe": {"model_type": "olmoe", **_LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
}


class TinyModels(Protocol):
    """The fixture ``tiny``: architecture name -> folder of a tiny model."""

    def __call__(self, architecture: str = "llama") -> Path:
        """Return the folder, made once a session."""
        ...


def tiny_model(
    folder: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    shards: int = 2,
    chat_template: str | None = CHATML,
    bos: bool = False,
    dtype: mx.Dtype = mx.float32,
    **changes: Any,
) -> Path:
    """Write a random model; return its folder.

    ``architecture`` is a key of ``ARCHITECTURES``, ``MIXTURES`` or ``OTHERS``.
    """
    config = {**(ARCHITECTURES | MIXTURES | OTHERS)[architecture], **changes}
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    if config["tie_word_embeddings"]:  # some classes have a head until they see that file has none
        parameters.pop("lm_head.weight", None)
    weights = {key: value.astype(dtype) for key, value in parameters.items()}
    byte_tokenizer(folder, chat_template=chat_template, bos=bos)
    names = sorted(weights)
    index: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in names[shard::shards]}
        mx.save_safetensors(str(folder / name), part, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, name))
    total = sum(value.nbytes for value in weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["Tiny"], "torch_dtype": "float32"}, indent=1)
    )
    return folder


def fixed_answer_model(folder: Path, text: str) -> Path:
    """Write a model that answers everything with ``text``, whose characters are all different.

    Embeddings are unit vectors, blocks add nothing, and the head names each token's successor.
    """
    assert len(set(text)) == len(text)
    tiny_model(folder, shards=1, hidden_size=288, num_hidden_layers=1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [*tokenizer.encode(text).ids, tokenizer.token_to_id(SPECIALS[2])]
    following = dict(pairwise(ids))
    head = mx.zeros((VOCAB, 288))
    for token in range(VOCAB):
        head[following.get(token, ids[0]), token] = 1.0
    file = folder / "model-00001-of-00001.safetensors"
    weights = cast(dict[str, mx.array], mx.load(str(file)))
    weights["model.embed_tokens.weight"] = mx.eye(VOCAB, 288)
    weights["lm_head.weight"] = head
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        key = f"model.layers.0.{name}.weight"
        weights[key] = mx.zeros_like(weights[key])
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})
    return folder
