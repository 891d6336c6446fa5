"""Removes layers and groups from a model and its config.

Invariant: the remaining weights are copied bit for bit, in order, but for the norms that fewer
channels of the residual stream correct (``models/residual.py``); removing groups whose weights are
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
from mlx_slim.models.gated_delta import use_fast_gated_delta
from mlx_slim.models.gemma import EMBEDDING_SIZE, correct_gemma
from mlx_slim.models.kinds import EXPERTS, HEADS, HIDDEN, MLP
from mlx_slim.models.mixtures import mixture_of
from mlx_slim.models.normalize import model_module
from mlx_slim.models.opening import fill
from mlx_slim.models.recorded_logits import free_weights
from mlx_slim.models.residual import corrected, residual
from mlx_slim.pruning.families import families_of
from mlx_slim.pruning.width import RetainedGroups, WidthLimits
from mlx_slim.reading import ModelConfig

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi")
# mlx-lm reads mistral with llama's class; gemma3 holds a gemma3_text.
_MODULES = ("llama", "qwen2", "qwen3", "gemma3", "gemma3_text", "phi")
# Config lists with an entry for each layer.
_BY_LAYER = ("layer_types", "no_rope_layers", WIDTHS)


def module_name(config: ModelConfig) -> str:
    """Return the name of the module of mlx-lm that reads ``config``."""
    return model_module(config).__name__.rsplit(".", 1)[-1]


def check_supported(config: ModelConfig) -> None:
    """Check that the architecture can be pruned.

    Raises:
        SlimError: With the supported ones.
    """
    if module_name(config) not in _MODULES:
        raise SlimError(
            f"{config.get('model_type')} models cannot be pruned",
            f"supported: {', '.join(SUPPORTED)}; of mixtures of experts, the experts",
        )


def text_part(config: ModelConfig) -> ModelConfig:
    """Return the object in ``config`` that holds the widths: itself, or that of its text model."""
    return config.get("text_config", config)


def limits_of(config: ModelConfig, *, hidden: bool) -> WidthLimits:
    """Return which widths ``config`` can express, the same in all layers.

    transformers, which reads the tokenizer, refuses a llama or a gemma3 (5.x) whose heads do not
    divide hidden_size, head_dim or not. A llama that is as well a mistral can be called one.

    Args:
        config: Of the source.
        hidden: Whether the residual stream is pruned too.
    """
    fields = dataclasses.fields(model_module(config).ModelArgs)
    derived = all(field.name not in ("head_dim", "text_config") for field in fields)
    kind = config["model_type"]
    divides = kind in ("llama", "gemma3", "gemma3_text")
    if hidden and kind == "llama" and _is_mistral(config):
        divides = False
    return WidthLimits(head_dim_is_derived=derived, heads_divide_hidden=divides)


def _is_mistral(config: ModelConfig) -> bool:
    """Return whether ``config`` of a llama describes a model that mistral's class computes too."""
    biased = config.get("attention_bias") or config.get("mlp_bias")
    return not biased and config.get("sliding_window") is None


def config_without_layers(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """Return ``config`` without ``layers``: their number, and every list with an entry a layer.

    Raises:
        SlimError: If mlx-lm cannot build the remaining model.
    """
    config = copy.deepcopy(config)
    part = text_part(config)
    stays = [i for i in range(part["num_hidden_layers"]) if i not in set(layers)]
    for key in _BY_LAYER:
        if isinstance(part.get(key), list):
            part[key] = [part[key][i] for i in stays]
    windowed = part.get("max_window_layers")
    if isinstance(windowed, int):
        part["max_window_layers"] = sum(i < windowed for i in stays)
    part["num_hidden_layers"] = len(stays)
    kinds = part.get("layer_types")
    if isinstance(kinds, list) and "full_attention" not in kinds:
        raise SlimError(
            f"none of the {len(stays)} remaining layers has full attention",
            "leave one of them: mlx-lm cannot build a model without it",
        )
    every = global_every(config)
    if every and (len(stays) < every or any((i - new) % every for new, i in enumerate(stays))):
        raise SlimError(
            f"every {every}th layer of a gemma3 has full attention, by its number: without these "
            "layers others would have it",
            f"remove {every} layers in a row, or a multiple, and leave {every}: --layers 0-"
            f"{every - 1}",
        )
    return config


def global_every(config: ModelConfig) -> int | None:
    """Return n where every n-th layer has full attention by its number; None for other models."""
    if not module_name(config).startswith("gemma3"):
        return None
    from mlx_lm.models.gemma3_text import ModelArgs

    return ModelArgs.from_dict({"model_type": "", **text_part(config)}).sliding_window_pattern


def config_with_sizes(
    config: ModelConfig, sizes: dict[str, list[int]], *, uniform: bool
) -> ModelConfig:
    """Return ``config`` with other numbers of groups in each layer.

    Args:
        config: Of a dense model.
        sizes: ``heads`` (key-value heads), ``mlp`` (neurons) and ``hidden`` (channels of the
            residual stream, one number): by layer; an absent kind is unchanged. Of a mixture
            ``experts``, one number in the layers that have some.
        uniform: Use the config's standard keys: the numbers must be equal in all layers.
    """
    config = copy.deepcopy(config)
    if EXPERTS in sizes:
        mixture = mixture_of(config)
        assert mixture is not None
        text_part(config).update(dict.fromkeys(mixture.keys, max(sizes[EXPERTS])))
        return config
    model = build(config)
    widths = widths_of(model)
    heads = structure.coupled(structure.blocks(model)[0])[HEADS]
    for layer, entry in enumerate(widths):
        if HEADS in sizes:
            entry["kv_heads"] = sizes[HEADS][layer]
            entry["heads"] = heads.queries_per_group * sizes[HEADS][layer]
        if MLP in sizes:
            entry["intermediate_size"] = sizes[MLP][layer]
    if not uniform:
        return {**config, WIDTHS: widths}
    assert all(entry == widths[0] for entry in widths)
    config.pop(WIDTHS, None)
    part = text_part(config)
    stream = residual(model)
    before = heads.count, stream.channels.count
    after = widths[0]["kv_heads"], sizes.get(HIDDEN, before[1:])[0]
    if after != before:
        part["head_dim"] = heads.width // heads.queries_per_group
        part["num_attention_heads"] = widths[0]["heads"]
        part["num_key_value_heads"] = widths[0]["kv_heads"]
        part["hidden_size"] = after[1]
        if stream.scaled:
            part.setdefault(EMBEDDING_SIZE, before[1])
    part["intermediate_size"] = widths[0]["intermediate_size"]
    if config["model_type"] == "llama" and after[1] % widths[0]["heads"]:
        config.update(model_type="mistral", architectures=["MistralForCausalLM"])
        config["sliding_window"] = None  # transformers' mistral has one where it is not set
    return config


def without_layers(
    model: nn.Module, config: ModelConfig, layers: Sequence[int], *, read: bool = True
) -> tuple[nn.Module, ModelConfig]:
    """Return a model without ``layers`` that reuses the weights of ``model``, and its config.

    Without ``read``, nothing is evaluated.
    """
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
    return _filled(new, weights, read), new


def with_groups(
    model: nn.Module,
    config: ModelConfig,
    retained: RetainedGroups,
    *,
    uniform: bool,
    donate: bool = False,
    read: bool = True,
) -> tuple[nn.Module, ModelConfig]:
    """Return a model of the groups ``retained`` (kind -> their numbers by layer), and its config.

    With ``donate``, ``model`` loses its weights: each is freed as soon as it is cut. Without
    ``read``, nothing is evaluated.
    """
    sizes = {kind: [len(numbers) for numbers in layers] for kind, layers in retained.items()}
    new = config_with_sizes(config, sizes, uniform=uniform)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    prefix = structure.blocks_path(model)
    cuts: list[tuple[str, int, int, np.ndarray]] = []  # path, axis, groups, those that remain
    families = families_of(model, mixture_of(config))
    for layer, of_block in enumerate(families):
        for kind, family in of_block.items():
            if kind in retained and (kind != HIDDEN or not layer):
                place = "" if kind == HIDDEN else f"{prefix}.{layer}."
                cuts += [
                    (f"{place}{path}", axis, family.count, retained[kind][layer])
                    for path, axis in family.members
                ]
    changes = {}
    if HIDDEN in retained:
        changes = corrected(residual(model), len(retained[HIDDEN][0]))
    if donate:
        free_weights(model)
    for path, axis, count, groups in cuts:
        if len(groups) < count:
            weights[path] = _take(weights[path], axis, count, groups)
            if read:
                mx.eval(weights[path])
    for path, change in changes.items():
        weights[path] = change(weights[path])
        if read:
            mx.eval(weights[path])
    return _filled(new, weights, read), new


def _take(value: mx.array, axis: int, count: int, groups: np.ndarray) -> mx.array:
    """Return ``groups`` of the ``count`` equal slices along ``axis``."""
    width = value.shape[axis] // count
    rows = (groups[:, None] * width + np.arange(width)).reshape(-1)
    return mx.take(value, mx.array(rows), axis=axis)


def _filled(config: ModelConfig, weights: dict[str, mx.array], read: bool) -> nn.Module:
    model = build(config)
    fill(model, Path("the pruned model"), weights)
    correct_gemma(model, config)
    use_fast_gated_delta(model)
    if read:
        use_fast_swiglu(model)
    model.eval()
    return model
