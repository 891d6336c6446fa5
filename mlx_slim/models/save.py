"""A live model becomes an MLX folder that stock ``mlx_lm.load`` reads.

Invariant: the folder appears whole or not at all, the live weights stay as they are, and
``config.json`` says what the weights are (dtype and quantization are read off the model). Try it:
``mlx-slim quantize MODEL -o DIR``.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_slim.artifacts import atomic_folder
from mlx_slim.errors import ResourceError
from mlx_slim.models.quantized import format_of
from mlx_slim.models.shards import Shards, open_shards
from mlx_slim.progress import stage
from mlx_slim.reading import JsonObject, ModelConfig
from mlx_slim.runtime import dtype_name, free_disk
from mlx_slim.units import human_bytes

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_SLACK = 32_000_000  # tokenizer, index and file system


def save_model(
    folder: Path,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: ModelConfig,
    *,
    code_from: Path | None = None,
) -> dict[str, str]:
    """Write ``model`` as sharded safetensors with config, index, tokenizer and chat template.

    Args:
        folder: Must not exist.
        model: Plain or quantized layers; its weights are not touched.
        tokenizer: Saved with its chat template.
        config: The config it was loaded with; not changed.
        code_from: Folder whose ``*.py`` and ``generation_config.json`` go along.

    Returns:
        Name -> SHA-256 of each tensor.

    Raises:
        ResourceError: If the disk is too small.
        SlimError: If the folder exists or cannot be written.
    """
    with new_folder(folder, model, tokenizer, config, code_from=code_from) as shards:
        tensors: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
        for name, value in tensors:
            shards.write(name, value)
    return shards.hashes


@contextlib.contextmanager
def new_folder(
    folder: Path,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: ModelConfig,
    *,
    code_from: Path | None = None,
) -> Iterator[Shards]:
    """Yield the open files of a model folder, for each tensor of ``model``; else as ``save_model``.

    Args:
        folder: Must not exist.
        model: Its weights may be unread: names, shapes and dtypes are looked at.
        tokenizer: As ``save_model`` takes it.
        config: As ``save_model`` takes it.
        code_from: As ``save_model`` takes it.
    """
    from mlx_lm.utils import save_config

    needed = sum(value.nbytes for value in _arrays(model)) + _SLACK
    with atomic_folder(folder) as temporary:
        free = free_disk(temporary)
        if free < needed:
            raise ResourceError(
                f"{folder} needs {human_bytes(needed)}, the disk has {human_bytes(free)} left",
                "free some space or choose another output",
            )
        with (
            stage(f"writing {human_bytes(needed - _SLACK)} of weights"),
            open_shards(temporary, model) as shards,
        ):
            yield shards
        save_config(saved_config(model, config), temporary / "config.json")
        tokenizer.save_pretrained(temporary)
        if code_from is not None:
            for file in [*code_from.glob("*.py"), *code_from.glob("generation_config.json")]:
                shutil.copy(file, temporary)


def _arrays(model: nn.Module) -> list[Any]:
    return [value for _, value in tree_flatten(model.parameters())]


def saved_config(model: nn.Module, config: ModelConfig) -> ModelConfig:
    """Return ``config`` with the dtype and quantization that ``model`` really has."""
    config = copy.deepcopy(config)
    bytes_of: Counter[str] = Counter()
    for value in _arrays(model):
        if mx.issubdtype(value.dtype, mx.floating):
            bytes_of[dtype_name(value.dtype)] += value.nbytes
    if bytes_of:
        config["dtype"] = config["torch_dtype"] = bytes_of.most_common(1)[0][0]
    config.pop("quantization_config", None)
    config.pop("quantization", None)
    if quantization := quantization_of(model):
        config["quantization"] = quantization
    return config


def quantization_of(model: nn.Module) -> JsonObject | None:
    """Return the ``quantization`` entry of a config: the commonest setting, others by path.

    None if no layer is quantized.
    """
    formats = {
        path: format_of(module)
        for path, module in model.named_modules()
        if hasattr(module, "bits") and hasattr(module, "group_size") and "scales" in module
    }
    if not formats:
        return None
    common = Counter(formats.values()).most_common(1)[0][0]
    others = {path: asdict(one) for path, one in sorted(formats.items()) if one != common}
    return {**asdict(common), **others}
