"""An mlx-lm model becomes a GGUF file for llama.cpp and Ollama.

Invariant: the inverse of ``load.py``: the file read back here is the model, but for the rounding of
its block formats, and without any where MLX holds the same blocks already (4 or 8 bits, group 32);
what GGUF or the reader cannot express (architecture, setting, tokenizer) is refused. Beside the
model there is one tensor as it is stored, and some rows of it in float32. Try it:
``mlx-slim export MODEL --to gguf --type q8_0 -o DIR``.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_slim.errors import SlimError
from mlx_slim.models.build import refuse_unnamed, refuse_varied
from mlx_slim.models.gguf.architectures import ARCHITECTURES, Architecture
from mlx_slim.models.gguf.file import pack_blocks
from mlx_slim.models.gguf.kquants import quantize_k
from mlx_slim.models.gguf.settings import (
    LOCAL_BASE,
    WINDOW_PATTERN,
    llama3_factors,
    softmax_width,
)
from mlx_slim.models.gguf.types import K_FORMATS, Shapes, block_formats, file_type
from mlx_slim.models.gguf.vocab import vocabulary
from mlx_slim.models.quantized import dequantize_rows
from mlx_slim.progress import tracked
from mlx_slim.reading import ModelConfig

# Model type -> GGUF architecture. Phi's fused qkv is read here but not written.
WRITES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
WRITES |= {"gemma3_text": "gemma3", "gemma3": "gemma3"}
_ROWS_BYTES = 32 << 20  # of rows that are in float32 at one time


@dataclass(frozen=True)
class TensorFormats:
    """How a file was written.

    Attributes:
        formats: Parameter path -> block format.
        notes: What was stored otherwise than its type says.
    """

    formats: dict[str, str]
    notes: list[str]

    def counts(self) -> str:
        """Return how many tensors have which format, the most frequent first."""
        counted = Counter(self.formats.values()).most_common()
        return ", ".join(f"{count} {name}" for name, count in counted)


def check_writable_as_gguf(config: ModelConfig) -> None:
    """Refuse a model that cannot be stored in GGUF, before its weights are read.

    Raises:
        SlimError: With what would work.
    """
    refuse_varied(config, "GGUF")
    refuse_unnamed(config, WRITES, "GGUF", "or export --to hf and use llama.cpp's converter")
    gemma3 = WRITES[config["model_type"]] == "gemma3"
    config = text_config(config)
    scaling = config.get("rope_scaling") or {}
    rope = scaling.get("rope_type") or scaling.get("type") or "default"
    if gemma3:
        _check_gemma3(config)
    if rope not in (("default", "linear") if gemma3 else ("default", "linear", "yarn", "llama3")):
        raise SlimError(
            f"RoPE scaling {rope!r} cannot be exported to GGUF",
            "export --to hf and use llama.cpp's converter",
        )


def _check_gemma3(config: ModelConfig) -> None:
    """Refuse a Gemma 3 whose settings are not those in llama.cpp's code, where GGUF has no key."""
    expected = {
        "query_pre_attn_scalar": softmax_width(config),
        "sliding_window_pattern": WINDOW_PATTERN,
        "rope_local_base_freq": LOCAL_BASE,
        "rope_parameters": None,  # by layer type: those that the class has no keys for
    }
    for key, value in expected.items():
        if config.get(key) != value:
            raise SlimError(
                f"this Gemma 3 has {key} {config.get(key)!r}, which cannot be exported to GGUF: "
                f"llama.cpp computes with {value!r}",
                "no file of it would be read right there; export --to hf",
            )


def text_config(config: ModelConfig) -> ModelConfig:
    """Return the config of the language model in ``config``, with the defaults of a Gemma 3."""
    from mlx_lm.models import gemma3, gemma3_text

    kind = config["model_type"]
    if kind not in ("gemma3", "gemma3_text"):
        return config
    text = copy.deepcopy(config)
    if kind == "gemma3":
        text = gemma3.ModelArgs.from_dict(text).text_config  # with its numbers of heads
    shape = asdict(gemma3_text.ModelArgs.from_dict({**text, "model_type": "gemma3_text"}))
    return {**config, "rope_parameters": text.get("rope_parameters"), **shape}


def language_model(model: nn.Module) -> nn.Module:
    """Return the part of ``model`` that reads text: ``model`` itself, or what a Gemma 3 wraps."""
    return model.get("language_model", model)


def write_gguf(
    path: Path, model: nn.Module, tokenizer: Any, config: ModelConfig, kind: str, name: str
) -> TensorFormats:
    """Write ``model`` to ``path``; not atomic by itself.

    Args:
        path: The file.
        model: Dense or quantized layers; not changed.
        tokenizer: mlx-lm's wrapper or the Hugging Face tokenizer.
        config: The model's, normalised.
        kind: One of ``types.TYPES``; vectors are float32.
        name: The model's name in the metadata.

    Raises:
        SlimError: If the architecture, a setting, a tensor or the tokenizer cannot be written.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    check_writable_as_gguf(config)
    architecture = ARCHITECTURES[WRITES[config["model_type"]]]
    model, config = language_model(model), text_config(config)
    places = _places(model, config, architecture)
    shapes = {target: shape for target, (_, shape) in places.items()}
    formats, notes = block_formats(kind, shapes, _shapes(config, architecture, shapes))
    writer = GGUFWriter(path, architecture.name)
    try:
        writer.add_name(name)
        writer.add_file_type(LlamaFileType[file_type(kind)])
        writer.add_quantization_version(2)
        _settings(writer, config, architecture)
        for key, value in vocabulary(tokenizer, config).items():
            _add(writer, key, value)
        for target, shape in shapes.items():
            _promise(writer, target, shape, GGMLQuantizationType[formats[target]])
        if (factors := _rope_factors(config)) is not None:
            _promise(writer, "rope_freqs.weight", factors.shape, GGMLQuantizationType.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target, (path_, _) in tracked(places.items(), "writing", "tensors", len(places)):
            block = GGMLQuantizationType[formats[target]]
            writer.write_tensor_data(_array(model, path_, config, architecture, block))
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()
    return TensorFormats({path_: formats[target] for target, (path_, _) in places.items()}, notes)


def _shapes(
    config: ModelConfig, architecture: Architecture, tensors: dict[str, tuple[int, ...]]
) -> Shapes:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    grouped = architecture.name == "llama" and config.get("num_key_value_heads", heads) != heads
    return Shapes(
        layers=layers,
        tied="output.weight" not in tensors,
        shared_values=layers == 80 and (grouped or architecture.name == "qwen2"),
    )


def _places(
    model: nn.Module, config: ModelConfig, architecture: Architecture
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return GGUF name -> (parameter path, dense shape), in the model's order."""
    modules = dict(model.named_modules())
    places: dict[str, tuple[str, tuple[int, ...]]] = {}
    unknown = []
    parameters: Any = tree_flatten(model.parameters())
    for full, value in parameters:
        path, leaf = full.rsplit(".", 1)
        if leaf in ("scales", "biases") and "scales" in modules[path]:
            continue
        name = architecture.tensor_of(path)
        if name is None or leaf not in ("weight", "bias"):
            unknown.append(full)
            continue
        shape = tuple(value.shape)
        if leaf == "weight" and "scales" in modules[path]:
            shape = (shape[0], _columns(modules[path]))
        places[f"{name}.{leaf}"] = (full, shape)
    if unknown:
        raise SlimError(
            f"{len(unknown)} tensors of this {config['model_type']} model have no place in GGUF: "
            f"{', '.join(unknown[:3])}",
            "export --to hf and use llama.cpp's converter",
        )
    return places


def _promise(writer: Any, name: str, shape: tuple[int, ...], block: Any) -> None:
    from gguf import GGML_QUANT_SIZES

    size, nbytes = GGML_QUANT_SIZES[block]
    total = int(np.prod(shape)) // size * nbytes
    writer.add_tensor_info(name, shape, np.dtype(np.float32), total, raw_dtype=block)


def _array(
    model: nn.Module, full: str, config: ModelConfig, architecture: Architecture, block: Any
) -> np.ndarray:
    """Return one parameter as it is stored, rows in GGUF's order: floats, or blocks (uint8)."""
    path, leaf = full.rsplit(".", 1)
    module: Any = model
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else module[part]
    array = None
    if leaf == "weight" and "scales" in module:
        array = pack_blocks(block.name, module)
    if array is None and leaf == "weight" and module[leaf].ndim == 2:
        array = _encoded_rows(module, block)
    if array is None:
        array = np.array(module[leaf].astype(mx.float32))
    # A row is encoded by itself, so rows are put in order afterwards.
    return np.ascontiguousarray(architecture.to_gguf(array, path, leaf, config))


def _encoded_rows(module: nn.Module, block: Any) -> np.ndarray:
    """Return a matrix as it is stored, encoded some rows at a time."""
    rows, columns = module["weight"].shape[0], _columns(module)
    step = max(1, _ROWS_BYTES // (4 * columns))
    encoded = np.empty(0)
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        part = _encoded(np.array(dequantize_rows(module, chunk).astype(mx.float32)), block)
        if start == 0:
            encoded = np.empty((rows, part.shape[1]), part.dtype)
        encoded[chunk] = part
    return encoded


def _columns(module: Any) -> int:
    if "scales" not in module:
        return module["weight"].shape[1]
    return module["scales"].shape[-1] * module.group_size


def _encoded(array: np.ndarray, block: Any) -> np.ndarray:
    from gguf import GGMLQuantizationType, quantize

    if block == GGMLQuantizationType.F16:
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.isfinite(half).all() and np.isfinite(array).all():
            raise SlimError(
                f"a weight of {np.abs(array).max():.3g} does not fit in float16",
                "this model cannot be stored as F16",
            )
        return half
    return quantize_k(array, block.name) if block.name in K_FORMATS else quantize(array, block)


def _settings(writer: Any, config: ModelConfig, architecture: Architecture) -> None:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    writer.add_context_length(config.get("max_position_embeddings") or 2048)
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim)
    if architecture.name == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    if head_dim * heads != width or architecture.name == "gemma3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind in ("linear", "yarn"):
        writer.add_string(f"{architecture.name}.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        if original := scaling.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(int(original))


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """Return Llama 3's divisors of the rotary frequencies, which GGUF keeps as a tensor."""
    scaling = config.get("rope_scaling") or {}
    if (scaling.get("rope_type") or scaling.get("type")) != "llama3":
        return None
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return llama3_factors(scaling, head_dim, config.get("rope_theta", 10000.0)).astype(np.float32)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
