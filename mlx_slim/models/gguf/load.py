"""A GGUF file becomes an mlx-lm model with the same weights, code for code.

Invariant: Q4_0, Q4_1 and Q8_0 tensors stay the quantized layers they are (affine, group 32), dense
ones stay dense; nothing is requantized. An architecture or a setting that mlx-lm's class cannot
express is refused. Try it: ``mlx-slim convert model.gguf -o DIR``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.models.build import construct
from mlx_slim.models.gemma import use_exact_scale, use_row_masks
from mlx_slim.models.gguf.architectures import ARCHITECTURES, MIXTRAL, Architecture
from mlx_slim.models.gguf.file import BITS, GGUFFile
from mlx_slim.models.gguf.settings import ROPE_TENSORS, read_settings
from mlx_slim.models.gguf.split import open_gguf
from mlx_slim.models.gguf.tokenizer import build_tokenizer
from mlx_slim.models.tensors import few
from mlx_slim.progress import stage
from mlx_slim.reading import ModelConfig, field, library_errors, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file as a model: config in Hugging Face's terms and a fast tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    config: ModelConfig
    notes: list[str]


def import_gguf(path: Path) -> GGUFModel:
    """Read ``path`` into an mlx-lm model, losslessly where MLX has the format.

    Raises:
        SlimError: If the file is no readable GGUF, its architecture is not one of
            ``ARCHITECTURES``, or its tensors are not exactly those of the model.
    """
    file = open_gguf(path)
    with (
        library_errors(
            f"{short(path)} cannot be imported", "convert the original Hugging Face folder instead"
        ),
        stage(f"reading {path.name}"),
    ):
        return _import(file)


def _import(file: GGUFFile) -> GGUFModel:
    from mlx_slim.models.opening import fill, read_weights

    path = file.path
    architecture = _architecture(file)
    notes: list[str] = []
    config = read_settings(file, architecture, notes)
    weights = _weights(file, architecture, config)
    bits = {key.removesuffix(".scales"): _bits(weights, key) for key in weights if "scales" in key}
    model = construct(config)
    if (sanitize := getattr(model, "sanitize", None)) is not None:
        weights = sanitize(weights)  # a class may drop its head where the embedding is tied
    nn.quantize(
        model,
        group_size=32,
        class_predicate=lambda p, _: {"group_size": 32, "bits": bits[p]} if p in bits else False,
    )
    model.eval()
    fill(model, path, weights)
    read_weights(model, str(path))
    use_exact_scale(model, config)
    use_row_masks(model)
    dense = {t.kind for t in file.tensors.values()} - {*BITS, "F32", "F16", "BF16"}
    if dense:
        notes.append(f"{', '.join(sorted(dense))} tensors dequantized to float16")
    return GGUFModel(model, build_tokenizer(file.metadata, notes), config, notes)


def _architecture(file: GGUFFile) -> Architecture:
    """Return the row of ``file``; Mixtral is llama with experts."""
    if file.metadata.get("general.type") == "adapter":
        raise SlimError(
            f"{file.path} is an adapter, not a model",
            "llama.cpp adds it to its base: llama-cli -m BASE.gguf --lora FILE",
        )
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise SlimError(
            f"{file.path} has the GGUF architecture {name!r}, which cannot be imported",
            f"{did_you_mean(str(name), ARCHITECTURES)}; or convert the Hugging Face folder",
        )
    architecture = ARCHITECTURES[name]
    if field(file.metadata, short(file.path), f"{name}.expert_count", int, 0):
        if name == "llama":
            return MIXTRAL
        if "ffn_gate_inp" not in architecture.names:
            raise SlimError(
                f"{file.path} is a {name} mixture of experts, which cannot be imported",
                "convert the original Hugging Face folder instead",
            )
    return architecture


def _bits(weights: dict[str, mx.array], scales: str) -> int:
    """Bits per code: packed width · 32 / (groups · 32)."""
    return weights[scales.replace(".scales", ".weight")].shape[-1] // weights[scales].shape[-1]


def _weights(
    file: GGUFFile, architecture: Architecture, config: ModelConfig
) -> dict[str, mx.array]:
    weights: dict[str, mx.array] = {}
    unknown = []
    for name in file.tensors:
        if name in ROPE_TENSORS:
            continue
        place = architecture.module_of(name)
        if place is None:
            unknown.append(name)
            continue
        path, kind = place
        for part, value in file.read(name).items():
            leaf = part if kind == "weight" else kind
            weights.update(_place(path, leaf, value, architecture, config))
    if unknown:
        raise SlimError(
            f"{file.path} holds {len(unknown)} tensors that the {architecture.model_type} model "
            f"has no place for ({few(unknown)})",
            "convert the original Hugging Face folder instead",
        )
    return weights


def _place(
    path: str, leaf: str, value: mx.array, architecture: Architecture, config: ModelConfig
) -> dict[str, mx.array]:
    """Return ``value`` under its Hugging Face name, rows in Hugging Face's order."""
    if path.endswith(".qkv"):
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        size = config["hidden_size"] // heads
        cuts = [heads * size, (heads + kv_heads) * size]
        return {
            f"{path.removesuffix('qkv')}{part}_proj.{leaf}": rows
            for part, rows in zip("qkv", mx.split(value, cuts, axis=0), strict=True)
        }
    return {f"{path}.{leaf}": architecture.from_gguf(value, path, leaf, config)}
