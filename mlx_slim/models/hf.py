"""A model as Hugging Face's transformers expects it: names, dense weights, configuration.

Invariant: only architectures whose tensors have the same names and values on both sides are written
(compared with transformers itself, see ``tests/parity``); RoPE is stored in both forms.
Try it: ``mlx-slim export MODEL --to hf -o DIR``.
"""

from __future__ import annotations

import copy

from mlx_slim.models.build import refuse_unnamed, refuse_varied
from mlx_slim.reading import ModelConfig

# Model type -> class. mlx-lm renames or reshapes the tensors of the others while loading.
CLASSES = {
    "cohere": "CohereForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "granite": "GraniteForCausalLM",
    "helium": "HeliumForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}


def check_writable_as_hf(config: ModelConfig) -> None:
    """Refuse an architecture whose tensors have other names there.

    Raises:
        SlimError: With what would work.
    """
    refuse_varied(config, "Hugging Face's format")
    names = "mlx-lm stores their tensors under other names"
    refuse_unnamed(config, CLASSES, "the Hugging Face format", names)


def hf_config(config: ModelConfig) -> ModelConfig:
    """Return ``config`` for transformers: class, ``rope_parameters``, nothing of MLX's.

    Raises:
        SlimError: If the architecture cannot be written.
    """
    check_writable_as_hf(config)
    config = copy.deepcopy(config)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    config["architectures"] = [CLASSES[config["model_type"]]]
    scaling = config.get("rope_scaling")
    if scaling is None:
        config.pop("rope_scaling", None)
    if "rope_parameters" not in config and "rope_theta" in config:
        rope = dict(scaling or {})
        kind = rope.pop("type", None)
        rope["rope_type"] = rope.get("rope_type") or kind or "default"
        rope["rope_theta"] = config["rope_theta"]
        if "partial_rotary_factor" in config:
            rope["partial_rotary_factor"] = config["partial_rotary_factor"]
        config["rope_parameters"] = rope
    return config
