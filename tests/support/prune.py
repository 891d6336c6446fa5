"""Small models for pruning: groups without effect, layers without effect, plain references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from mlx_slim.models import structure
from mlx_slim.models.load import Loaded, load
from mlx_slim.models.residual import residual
from mlx_slim.runtime import to_float
from tests.support.tiny import tiny_model

TOKENS = mx.array(np.random.default_rng(0).integers(0, 250, (2, 12)))
ROWS = mx.array(np.random.default_rng(1).integers(0, 250, (6, 24)))


def load_tiny(folder: Path, architecture: str = "llama", **changes: Any) -> Loaded:
    """Return a tiny model; biases are drawn, so that a wrong one shows."""
    model = load(tiny_model(folder / architecture, architecture, **changes))
    key = mx.random.key(7)
    for block in structure.blocks(model.model):
        for module in block.modules():
            if "bias" in module:
                key, draw = mx.random.split(key)
                module.bias = 0.1 * mx.random.normal(module.bias.shape, key=draw)
    mx.eval(model.model.parameters())
    return model


def layer_of(block: Any, path: str) -> Any:
    """Return the module at ``path`` inside a block."""
    for name in path.split("."):
        block = block[name]
    return block


def scale_groups(block: Any, kind: str, groups: list[int], factor: float) -> None:
    """Multiply every weight of ``groups`` by ``factor``, member by member."""
    family = structure.coupled(block)[kind]
    for path, axis in family.members:
        owner, leaf = path.rsplit(".", 1)
        layer = layer_of(block, owner)
        value = np.array(layer[leaf])
        width = value.shape[axis] // family.count
        for group in groups:
            part = slice(group * width, (group + 1) * width)
            value[(slice(None),) * axis + (part,)] *= factor
        layer[leaf] = mx.array(value)


def draw_norms(model: Any) -> None:
    """Give the norms of the residual stream other weights than ones, so that a wrong one shows."""
    weights, key = dict(tree_flatten(model.parameters())), mx.random.key(9)
    for path in residual(model).norms:
        key, draw = mx.random.split(key)
        weights[path] = weights[path] + 0.3 * mx.random.normal(weights[path].shape, key=draw)
    model.update(tree_unflatten(list(weights.items())))


def zero_channels(model: Any, channels: list[int] | np.ndarray) -> None:
    """Make ``channels`` of the residual stream zero in every tensor; norms multiply them by 0."""
    stream = residual(model)
    weights = dict(tree_flatten(model.parameters()))
    for path, axis in stream.channels.members:
        value = np.array(weights[path])
        value[(slice(None),) * axis + (channels,)] = -stream.norms.get(path, 0.0)
        weights[path] = mx.array(value)
    model.update(tree_unflatten(list(weights.items())))


def make_identity(block: Any) -> None:
    """Make a block add nothing to what it reads."""
    for family in structure.coupled(block).values():
        layer = layer_of(block, family.output)
        layer.weight = mx.zeros_like(layer.weight)
        if "bias" in layer:
            layer.bias = mx.zeros_like(layer.bias)


def relative_gap(a: Any, b: Any, tokens: mx.array = TOKENS) -> float:
    """Return the largest difference of logits over the largest logit."""
    one, other = a(tokens), b(tokens)
    return to_float(mx.abs(one - other).max() / mx.abs(one).max())


def stock_of(config: dict[str, Any], model: Any) -> Any:
    """Return the weights of ``model`` in the class of mlx-lm that ``config`` names."""
    model_class, args_class = _get_classes(config)
    stock = model_class(args_class.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    if hasattr(stock, "sanitize"):
        weights = stock.sanitize(weights)
    stock.load_weights(list(weights.items()))
    return stock
