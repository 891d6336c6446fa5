"""Shapes of the models that the shipped recipes name, so that a plan needs no hub.

Invariant: these are the shape keys of each model's public ``config.json``, nothing else; a plan
that uses them needs no network and reports them as its source. Try it:
``mlx-slim plan mistral-qlora``.
"""

from __future__ import annotations

from mlx_slim.artifacts import public_name
from mlx_slim.config.schema import Recipe
from mlx_slim.models.load import read_config
from mlx_slim.progress import stage
from mlx_slim.reading import ModelConfig

_LLAMA_1_2 = {
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}

_TINYLLAMA = {
    **_LLAMA_1_2,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
}
_MISTRAL = {
    **_LLAMA_1_2,
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
}

SHIPPED_CONFIGS: dict[str, ModelConfig] = {
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _TINYLLAMA,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINYLLAMA,
    "meta-llama/Llama-2-7b-hf": {
        **_LLAMA_1_2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
    },
    "mistralai/Mistral-7B-v0.1": {**_MISTRAL, "sliding_window": 4096},
    "mistralai/Mistral-7B-Instruct-v0.2": {**_MISTRAL, "rope_theta": 1e6},
    "microsoft/phi-2": {
        "model_type": "phi",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.4,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 51200,
    },
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
}


def model_config(recipe: Recipe) -> tuple[ModelConfig, str]:
    """Return the config of the recipe's model, and its source as text.

    Raises:
        SlimError: If the model is not in the table, no folder, and not on the hub.
    """
    if recipe.model in SHIPPED_CONFIGS:
        return SHIPPED_CONFIGS[recipe.model], "shapes from the table shipped with mlx-slim"
    with stage(f"reading the configuration of {public_name(recipe.model)}"):
        config = read_config(recipe.model, recipe.revision)
    return config, "shapes from the model's config.json"
