"""Removes layers and groups from a model and its config.

Invariant: the remaining weights are copied bit for bit, in order; removing groups whose weights are
zero changes no logit. The new model is built from the new config by the code that loads models, so
it is measured as it will be read back. Try it: ``mlx-slim prune MODEL -o DIR --layers 21-29``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_slim.errors import SlimError
from mlx_slim.models import structure
from mlx_slim.models.activations import use_fast_swiglu
from mlx_slim.models.build import WIDTHS, build, widths_of
from mlx_slim.models.load import fill
from mlx_slim.models.normalize import model_module
from mlx_slim.models.recorded_logits import free_weights
from mlx_slim.models.structure import HEADS, MLP
from mlx_slim.pruning.width import RetainedGroups
from mlx_slim.reading import ModelConfig

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "phi")
_MODULES = ("llama", "qwen2", "qwen3", "phi")  # mlx-lm reads mistral with llama's class
# Config lists with an entry for each layer.
_BY_LAYER = ("layer_types", "no_rope_layers", WIDTHS)


def check_supported(config: ModelConfig) -> None:
    """Check that the architecture can be pruned.

    Raises:
        SlimError: With the supported ones.
    """
    if model_module(config).__name__.rsplit(".", 1)[-1] not in _MODULES:
        raise SlimError(
            f"{config.get('model_type')} models cannot be pruned",
            f"supported: {', '.join(SUPPORTED)}",
        )


def says_head_dim(config: ModelConfig) -> bool:
    """Return whether mlx-lm's class takes ``head_dim`` from the config, or derives it."""
    fields = dataclasses.fields(model_module(config).ModelArgs)
    return any(field.name == "head_dim" for field in fields)


def heads_must_divide(config: ModelConfig) -> int | None:
    """Return what the number of query heads must divide in ``config``; None if it is unconstrained.

    transformers, which reads the tokenizer, refuses other llama configs (5.x), head_dim or not.
    """
    return config["hidden_size"] if config["model_type"] == "llama" else None


def config_without_layers(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """Return ``config`` without ``layers``: their number, and every list with an entry a layer.

    Raises:
        SlimError: If mlx-lm cannot build the remaining model.
    """
    config = copy.deepcopy(config)
    stays = [i for i in range(config["num_hidden_layers"]) if i not in set(layers)]
    for key in _BY_LAYER:
        if isinstance(config.get(key), list):
            config[key] = [config[key][i] for i in stays]
    windowed = config.get("max_window_layers")
    if isinstance(windowed, int):
        config["max_window_layers"] = sum(i < windowed for i in stays)
    config["num_hidden_layers"] = len(stays)
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "full_attention" not in kinds:
        raise SlimError(
            f"none of the {len(stays)} remaining layers has full attention",
            "leave one of them: mlx-lm cannot build a model without it",
        )
    return config


def config_with_sizes(
    config: ModelConfig, sizes: dict[str, list[int]], *, uniform: bool
) -> ModelConfig:
    """Return ``config`` with other numbers of groups in each layer.

    Args:
        config: Of a dense model.
        sizes: ``heads`` (key-value heads) and ``mlp`` (neurons): numbers by layer; an absent kind
            is unchanged.
        uniform: Use the config's standard keys: the numbers must be equal in all layers.
    """
    config = copy.deepcopy(config)
    model = build(config)
    widths = widths_of(model)
    queries_per_group = structure.coupled(structure.blocks(model)[0])[HEADS].queries_per_group
    for layer, entry in enumerate(widths):
        if HEADS in sizes:
            entry["kv_heads"] = sizes[HEADS][layer]
            entry["heads"] = queries_per_group * sizes[HEADS][layer]
        if MLP in sizes:
            entry["intermediate_size"] = sizes[MLP][layer]
    if not uniform:
        return {**config, WIDTHS: widths}
    assert all(entry == widths[0] for entry in widths)
    config.pop(WIDTHS, None)
    heads = config["num_attention_heads"]
    if HEADS in sizes and heads != widths[0]["heads"]:
        config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
        config["num_attention_heads"] = widths[0]["heads"]
        config["num_key_value_heads"] = widths[0]["kv_heads"]
    config["intermediate_size"] = widths[0]["intermediate_size"]
    return config


def without_layers(
    model: nn.Module, config: ModelConfig, layers: Sequence[int]
) -> tuple[nn.Module, ModelConfig]:
    """Return a model without ``layers`` that reuses the weights of ``model``, and its config."""
    new = config_without_layers(config, layers)
    prefix = structure.blocks_path(model)
    stays = [i for i in range(len(structure.blocks(model))) if i not in set(layers)]
    number = {old: str(new) for new, old in enumerate(stays)}
    weights = {}
    for path, value in tree_flatten(model.parameters()):
        if path.startswith(f"{prefix}."):
            old, _, rest = path[len(prefix) + 1 :].partition(".")
            if int(old) not in number:
                continue
            path = f"{prefix}.{number[int(old)]}.{rest}"
        weights[path] = value
    return _filled(new, weights), new


def with_groups(
    model: nn.Module,
    config: ModelConfig,
    retained: RetainedGroups,
    *,
    uniform: bool,
    donate: bool = False,
) -> tuple[nn.Module, ModelConfig]:
    """Return a model of the groups ``retained`` (kind -> their numbers by layer), and its config.

    With ``donate``, ``model`` loses its weights: each is freed as soon as it is cut.
    """
    sizes = {kind: [len(numbers) for numbers in layers] for kind, layers in retained.items()}
    new = config_with_sizes(config, sizes, uniform=uniform)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    prefix = structure.blocks_path(model)
    blocks = structure.blocks(model)
    names = [[path for path, _ in tree_flatten(block.parameters())] for block in blocks]
    coupled = [structure.coupled(block) for block in blocks]
    if donate:
        free_weights(model)
    for layer, families in enumerate(coupled):
        for kind, family in families.items():
            if kind not in retained or len(retained[kind][layer]) == family.count:
                continue
            for path, axis in family.members:
                name = f"{prefix}.{layer}.{path}"
                weights[name] = _take(weights[name], axis, family.count, retained[kind][layer])
        mx.eval([weights[f"{prefix}.{layer}.{path}"] for path in names[layer]])
    return _filled(new, weights), new


def _take(value: mx.array, axis: int, count: int, groups: np.ndarray) -> mx.array:
    """Return ``groups`` of the ``count`` equal slices along ``axis``."""
    width = value.shape[axis] // count
    rows = (groups[:, None] * width + np.arange(width)).reshape(-1)
    return mx.take(value, mx.array(rows), axis=axis)


def _filled(config: ModelConfig, weights: dict[str, mx.array]) -> nn.Module:
    model = fill(build(config), Path("the pruned model"), weights)
    use_fast_swiglu(model)
    model.eval()
    return model
