"""How tensors are called in GGUF and in mlx-lm, and in which order their rows stand.

Invariant: one table serves import, export and adapters, so what one of them writes under a name
the others read under it; what the table does not name is refused by whoever asks. Names are those
of ``gguf.MODEL_ARCH``. Try it: ``python -m pytest tests/models/gguf/test_families.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_slim.reading import ModelConfig

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
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
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
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_WRAPPER = "language_model."  # of models with a vision part
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def inner_path(path: str) -> str:
    """Return a path inside the language model of a model that wraps one."""
    return path.removeprefix(_WRAPPER)


def _mixture(router: str, experts: str) -> dict[str, str]:
    names = {key: path for key, path in _GATED.items() if not path.startswith("mlp.")}
    rows = {f"ffn_{part}_exps": f"{experts}.{part}_proj" for part in ("gate", "up", "down")}
    return {**names, "ffn_gate_inp": router, **rows}


@dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture maps to Hugging Face.

    Attributes:
        name: ``general.architecture``.
        model_type: mlx-lm's.
        hf_class: The class of transformers.
        names: GGUF's name of a module, without its block, to mlx-lm's.
        permuted: Each head's rows of q and k stand interleaved, the two halves that RoPE rotates.
        norm_shift: What GGUF adds to the weights of the norms.
    """

    name: str
    model_type: str
    hf_class: str
    names: dict[str, str]
    permuted: bool = False
    norm_shift: int = 0

    def module_of(self, tensor: str) -> tuple[str, str] | None:
        """Return (path, ``weight`` or ``bias``) of a tensor of GGUF; None if it has no place."""
        match = _TENSOR.fullmatch(tensor)
        path = self.names.get(match[2]) if match else None
        if match is None or path is None:
            return None
        return (f"model.layers.{match[1]}.{path}" if match[1] else path), match[3]

    def tensor_of(self, path: str) -> str | None:
        """Return GGUF's name of the module at ``path``, without its leaf; None if it has none."""
        match = _LAYER.fullmatch(inner_path(path))
        inside = match[2] if match else inner_path(path)
        name = next((name for name, other in self.names.items() if other == inside), None)
        return name if name is None or match is None else f"blk.{match[1]}.{name}"

    def to_gguf(self, array: np.ndarray, path: str, leaf: str, config: ModelConfig) -> Any:
        """Return rows of mlx-lm's ``path`` as GGUF stores them; dense, or B (O, R) of an update."""
        if self.norm_shift and leaf == "weight" and path.endswith("norm"):
            return array + np.float32(self.norm_shift)
        if heads := self._interleaved(path, config):
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            return halves.swapaxes(1, 2).reshape(array.shape)
        return array

    def from_gguf(self, value: mx.array, path: str, leaf: str, config: ModelConfig) -> mx.array:
        """Undo ``to_gguf``."""
        if self.norm_shift and leaf == "weight" and path.endswith("norm"):
            return value - self.norm_shift
        if heads := self._interleaved(path, config):
            split = value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
            return split.swapaxes(1, 2).reshape(value.shape)
        return value

    def _interleaved(self, path: str, config: ModelConfig) -> int:
        """Return the number of heads whose rows are interleaved; 0 if they are not."""
        if not self.permuted or not path.endswith(("q_proj", "k_proj")):
            return 0
        heads = config["num_attention_heads"]
        return heads if path.endswith("q_proj") else config.get("num_key_value_heads") or heads


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("llama", "llama", "LlamaForCausalLM", _GATED, permuted=True),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", _GATED),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", {**_GATED, **_HEAD_NORMS}),
        Architecture(
            "qwen3moe",
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            {**_mixture("mlp.gate", "mlp.switch_mlp"), **_HEAD_NORMS},
        ),
        Architecture("phi2", "phi", "PhiForCausalLM", _PHI),
        Architecture(
            "phi3",
            "phi3",
            "Phi3ForCausalLM",
            {
                **{
                    k: v
                    for k, v in _GATED.items()
                    if k not in ("ffn_gate", "attn_q", "attn_k", "attn_v")
                },
                "attn_qkv": "self_attn.qkv_proj",
                "ffn_up": "mlp.gate_up_proj",
            },
        ),
        Architecture(
            "gemma2", "gemma2", "Gemma2ForCausalLM", {**_GATED, **_FOUR_NORMS}, norm_shift=1
        ),
        Architecture(
            "gemma3",
            "gemma3_text",
            "Gemma3ForCausalLM",
            {**_GATED, **_FOUR_NORMS, **_HEAD_NORMS},
            norm_shift=1,
        ),
    )
}
# llama.cpp reads Mistral, and Mixtral with its experts, as llama.
MIXTRAL = Architecture(
    "llama",
    "mixtral",
    "MixtralForCausalLM",
    _mixture("block_sparse_moe.gate", "block_sparse_moe.switch_mlp"),
    permuted=True,
)
BY_MODEL_TYPE = {
    **{one.model_type: one for one in ARCHITECTURES.values()},
    "mistral": ARCHITECTURES["llama"],
    "mixtral": MIXTRAL,
    "gemma3": ARCHITECTURES["gemma3"],
}
